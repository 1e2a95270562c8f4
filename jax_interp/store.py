"""Artefacts on disk: activations (tensorstore), training state (orbax) and small text files, all written atomically.

An activation store is a folder or bucket prefix with a zarr3 array for each site, `<site>/` [example, token, ...], one
for the tokens, `tokens/` [example, token], manifest.json, which says what they are of and never changes, and an empty
object `commits/<shard>` for every finished shard.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import math
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers as policies

from jax_interp import activations, text

TOKENS = 'tokens'
DTYPES = ('bfloat16', 'float32')
_RUN = 64  # examples that are read at a time where not all are kept: 6 MB for GPT-2 small in bfloat16, 64 tokens
_READERS = 2  # threads that read files
_CRC = 4  # bytes of a checksum
KEPT_CHECKPOINTS = 2
_MANIFEST, _COMMITS = 'manifest.json', 'commits/'
# One context for the process: stores share a cache of shard indices, and memory:// URLs share their contents.
_CONTEXT = ts.Context({'cache_pool': {'total_bytes_limit': 64 << 20}})
# What tensorstore reports for a file that is cut short or altered; anything else (network, permission) is not damage.
_DAMAGE = ('DATA_LOSS', 'FAILED_PRECONDITION', 'OUT_OF_RANGE')


@contextlib.contextmanager
def _disk_space(where) -> Iterator[None]:
  """Turns tensorstore's and orbax's ways of saying that the disk is full into the operating system's."""
  try:
    yield
  except Exception as e:
    if os.strerror(errno.ENOSPC) in str(e):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where)) from e
    raise


class ActivationStore:
  """Activations of one model on one list of token windows, in shards that are written whole or not at all.

  Made by `create` and `open`. `where` is a local path or a URL: gs://bucket/prefix, s3://bucket/prefix, memory://prefix.
  Several writers may share a store if they write different shards.
  """

  def __init__(self, where: str, kvstore: ts.KvStore, manifest: dict[str, Any]):
    self.where, self._kvstore, self.manifest = where, kvstore, manifest
    self._folder = None if '://' in where else pathlib.Path(where)
    self.n_examples, self.n_tokens = manifest['n_examples'], manifest['n_tokens']
    self.shard_examples = manifest['shard_examples']
    self._chunk = math.gcd(self.shard_examples, activations.BLOCK)
    shapes = {site: (manifest['dtype'], shape) for site, shape in manifest['sites'].items()}
    opening = {name: self._array(name, *kind) for name, kind in {**shapes, TOKENS: ('int32', [])}.items()}
    self._arrays = {name: array.result() for name, array in opening.items()}

  def _array(self, name, dtype, shape):
    plain = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
    shape = [self.n_tokens, *shape]
    sharding = {
      'chunk_shape': [self._chunk, *shape],
      'codecs': plain,
      'index_codecs': plain,
    }
    metadata = {
      # Whole chunks: what stands in a chunk beyond the array would be whatever the memory held.
      'shape': [-(-self.n_examples // self._chunk) * self._chunk, *shape],
      'data_type': dtype,
      # zarr reads a file that is not there as the fill value, so it is one that is never written: see `reader`.
      'fill_value': -1 if name == TOKENS else 'NaN',
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [self.shard_examples, *shape]}},
      'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
    }
    spec = {'driver': 'zarr3', 'metadata': metadata}
    return ts.open(spec, kvstore=self._kvstore / f'{name}/', open=True, create=True, context=_CONTEXT)

  @classmethod
  def create(
    cls,
    where: str | pathlib.Path,
    sites: Mapping[str, tuple[int, ...]],
    n_examples: int,
    n_tokens: int,
    shard_examples: int,
    dtype: str,
    special_tokens: Sequence[int] = (),
    **made_from: str,
  ) -> 'ActivationStore':
    """Makes a store, or opens the one that is there to go on with it.

    Args:
      where: a local path or a URL.
      sites: {site: shape of its activation at one token}, such as (768,).
      n_examples: windows in all.
      n_tokens: tokens of a window.
      shard_examples: windows of a shard, the unit that is written and resumed.
      dtype: 'bfloat16' or 'float32'.
      special_tokens: ids of the tokens that are no text, such as the end of a document; see `keep`.
      **made_from: fingerprints: model, tokenizer, dataset.

    Raises:
      ValueError: another store is there; the message says what differs.
    """
    if dtype not in DTYPES:
      raise ValueError(f'activations are stored as one of {DTYPES}, not {dtype!r}')
    manifest = {
      **made_from,
      'sites': {site: list(shape) for site, shape in sites.items()},
      'n_examples': n_examples,
      'n_tokens': n_tokens,
      'shard_examples': shard_examples,
      'dtype': dtype,
      'special_tokens': [int(token) for token in special_tokens],
    }
    kvstore = _open_kvstore(where)
    with _disk_space(where):
      stored = kvstore.read(_MANIFEST).result()
      if stored.state == 'missing':
        content = json.dumps(manifest).encode()
        kvstore.write(_MANIFEST, content, if_equal=stored.stamp.generation).result()
      return cls.open(where, **manifest)

  @classmethod
  def open(cls, where: str | pathlib.Path, **expected) -> 'ActivationStore':
    """Opens a store.

    Args:
      where: a local path or a URL.
      **expected: fields of the manifest that must be so, such as model=fingerprint.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a field is otherwise.
    """
    kvstore = _open_kvstore(where)
    stored = kvstore.read(_MANIFEST).result()
    if stored.state != 'value':
      raise FileNotFoundError(f'no activations at {where}; run train.capture first')
    manifest = json.loads(stored.value)
    for field, value in expected.items():
      if manifest.get(field) != value:
        raise ValueError(
          f'the activations at {where} are of another {field}: {manifest.get(field)!r}, not {value!r}; choose another '
          'place, or delete them'
        )
    return cls(str(where), kvstore, manifest)

  @property
  def n_shards(self) -> int:
    return -(-self.n_examples // self.shard_examples)

  def shard(self, index: int) -> slice:
    """Returns the examples of a shard; the last may be shorter."""
    start = index * self.shard_examples
    return slice(start, min(start + self.shard_examples, self.n_examples))

  def missing(self) -> list[int]:
    """Returns the shards still to be written: not committed, or lost or cut short since.

    Reads the index and one chunk of every committed shard; elsewhere, checksums tell of altered bytes on reading.
    """
    begin = len(_COMMITS)
    commits = [int(key[begin:]) for key in self._kvstore.list(ts.KvStore.KeyRange(_COMMITS, _COMMITS + '~')).result()]
    firsts = [(shard, self._first(array, shard)) for shard in commits for array in self._arrays.values()]
    damaged = {shard for shard, first in firsts if _is_damaged(first)}
    return sorted(set(range(self.n_shards)) - set(commits) | damaged)

  def _first(self, array, shard) -> ts.Future:
    return array[(self.shard(shard).start, *[0] * (array.rank - 1))].read()

  def write(self, shard: int, tokens_et: np.ndarray, acts: Mapping[str, np.ndarray]):
    """Writes one shard and then commits it: until then, and after a crash in between, it counts as missing.

    Args:
      shard: its number.
      tokens_et: int32 [example, token] of the shard.
      acts: {site: [example, token, ...]}.

    Raises:
      ValueError: there are other sites, shapes or dtypes than the store's, a window begins with padding, or an
        activation is not finite; nothing of the shard is committed.
      OSError: no space is left; the shards written before stay.
    """
    arrays = {TOKENS: tokens_et, **acts}
    self._check_shard(shard, arrays)
    for site, x in acts.items():
      if n_bad := _not_finite(x):
        raise ValueError(
          f'{site} has {n_bad} activations in shard {shard} that are not finite; finished shards are kept. Look at the '
          'weights of the model'
        )
    with _disk_space(self.where):
      start, n_more = self.shard(shard).start, -len(tokens_et) % self._chunk
      writes = []
      for name, array in self._arrays.items():
        x = np.pad(arrays[name], [(0, n_more)] + [(0, 0)] * (array.rank - 1)) if n_more else arrays[name]
        writes.append(array[start : start + len(x)].write(x))
      for write in writes:
        write.result()
      self._kvstore.write(f'{_COMMITS}{shard}', b'').result()

  def _check_shard(self, shard, arrays):
    if arrays.keys() != self._arrays.keys():
      raise ValueError(
        f'shard {shard} holds {sorted(arrays)}, and {self.where} {sorted(self._arrays)}; give all of them'
      )
    examples = self.shard(shard)
    for name, array in self._arrays.items():
      x, shape, dtype = arrays[name], (examples.stop - examples.start, *array.shape[1:]), array.dtype.numpy_dtype
      if (x.shape, x.dtype) != (shape, dtype):
        raise ValueError(
          f'shard {shard} of {name} has the shape {x.shape} in {x.dtype}, and the one of {self.where} {shape} in '
          f'{dtype}; give the whole shard as it is to be stored'
        )
    if padded := np.flatnonzero(arrays[TOKENS][:, 0] == text.PAD).tolist():  # it would pass for one that is lost
      raise ValueError(f'example {examples.start + padded[0]} begins with padding; put padding behind the text')

  def width(self, site: str) -> int:
    """Returns d of a site that an SAE can read.

    Raises:
      ValueError: the site is not in the store, or its activations are not [example, token, d].
    """
    self._check(site)
    return activations.width(site, (self.n_examples, *self._arrays[site].shape[1:]))

  def _check(self, site):
    if site not in self._arrays:
      there = ', '.join(self.manifest['sites'])
      raise ValueError(
        f'the activations at {self.where} are of {there}, not {site!r}; choose one of these, or '
        'capture that one too, in another --workdir'
      )

  def keep(self, examples: np.ndarray | None = None) -> np.ndarray:
    """Returns which tokens stand for text, neither padding nor special: bool [n, token] of examples, by default all."""
    examples = np.arange(self.n_examples) if examples is None else examples
    return text.kept(self._read(TOKENS, examples), self.manifest['special_tokens'])

  def reader(self, site: str) -> Callable[..., np.ndarray]:
    """Returns `read(examples, out=None, to=None)`: int [n] in any order -> activations [n, token, ...] in our dtype.

    They are written to `out` where it is given, in our dtype and contiguous: memory that is touched for the first time
    costs as much as reading.
    With `to`, int [n, token], they are written to these rows of `out` [row, ...], none where it is -1: shuffled while
    they are still in the processor's cache.
    The site `store.TOKENS` reads int32 tokens [n, token]. Neighbours are read fastest. Any thread may read.

    Raises:
      ValueError: the site is not in the store; and from `read`, a shard is missing or damaged, or `out` does not fit.
      IndexError: from `read`, there is no such example.
    """
    self._check(site)
    return functools.partial(self._read, site)

  def rows(self, site: str) -> Callable[..., np.ndarray]:
    """Returns `read(tokens, out=None)`: int [n], example * n_tokens + token, in any order -> activations [n, ...].

    They are written to `out` where it is given. Every chunk of BLOCK examples that a token is in is read once.

    Raises:
      ValueError, IndexError: as for `reader`.
    """
    self._check(site)

    def read(tokens, out=None):
      examples, places = np.divmod(np.asarray(tokens), self.n_tokens)
      wanted, inverse = np.unique(examples, return_inverse=True)
      to, numbers = np.full((len(wanted), self.n_tokens), -1), np.arange(len(examples))
      to[inverse, places] = numbers
      out = self._read(site, wanted, out, to)
      written = to[inverse, places]  # of a token that is wanted more than once, one
      again = np.flatnonzero(written != numbers)
      out[again] = out[written[again]]
      return out

    return read

  def _read(self, site, examples, out=None, to=None):
    array, examples = self._arrays[site], np.asarray(examples)
    if len(examples) and not 0 <= examples.min() <= examples.max() < self.n_examples:
      raise IndexError(f'examples {examples.min()} to {examples.max()} are wanted of {self.n_examples}; see n_examples')
    shape = (len(examples), *array.shape[1:]) if to is None else (int(to.max(initial=-1)) + 1, *array.shape[2:])
    if out is None:
      out = np.empty(shape, array.dtype.numpy_dtype)
    fits = out.dtype == array.dtype.numpy_dtype and out.shape[1:] == shape[1:] and len(out) >= shape[0]
    if not (fits and out.flags.c_contiguous):
      raise ValueError(
        f'out has the shape {out.shape} in {out.dtype}{"" if out.flags.c_contiguous else ", not contiguous"}; give '
        f'contiguous memory of {shape} in {array.dtype.numpy_dtype}'
      )
    n = max(_RUN, -(-len(examples) // _READERS)) if self._folder else _RUN
    parts = [slice(i, i + n) for i in range(0, len(examples), n)]
    if self._folder:
      with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        if to is None:
          reads = [pool.submit(self._read_files, site, examples[part], out[part], None) for part in parts]
        else:
          reads = [pool.submit(self._read_files, site, examples[part], out, to[part]) for part in parts]
        for read in reads:
          read.result()
    elif to is None:
      self._read_objects(site, examples, out)
    else:
      for part in parts:
        x, kept = self._read(site, examples[part]), to[part] >= 0
        out[to[part][kept]] = x[kept]
    return out

  def _read_objects(self, site, examples, out):
    array, target = self._arrays[site], ts.array(out)
    try:
      # By runs of neighbours: tensorstore takes four times as long for an array of indices.
      reads = [
        target[start:stop].write(array[int(examples[start]) : int(examples[start]) + stop - start])
        for start, stop in _runs(examples)
      ]
      for read in reads:
        read.result()
    except ValueError as e:
      if not str(e).startswith(_DAMAGE):
        raise
      if len(examples) == 1:
        raise self._damaged(site, examples[0]) from e
      for i, example in enumerate(examples):  # one of them says which it is
        self._read_objects(site, [example], out[i : i + 1])
      raise
    lost = _is_fill(out[(slice(None), *[0] * (out.ndim - 1))])
    if lost.any():
      raise self._damaged(site, examples[lost.argmax()])

  def _read_files(self, site, examples, out, to):
    """As `_read_objects`, from files of the local disk: four times as fast, for nothing is copied twice."""
    row = math.prod(self._arrays[site].shape[2:]) * out.itemsize
    size = self.n_tokens * row
    out = out.reshape(-1).view(np.uint8)
    chunk_of, shards = examples // self._chunk, examples // self.shard_examples
    starts = np.flatnonzero(np.diff(chunk_of, prepend=-1)).tolist()
    with contextlib.ExitStack() as files:
      shard, scratch = None, np.empty(self._chunk * size, np.uint8)
      for start, stop in itertools.pairwise([*starts, len(examples)]):
        try:
          if shards[start] != shard:
            files.close()
            shard = shards[start]
            file = files.enter_context(open(self._folder / self._file(site, shard), 'rb', buffering=0))
            places = _places(file, self.shard_examples // self._chunk)
          within = examples[start:stop] % self._chunk
          whole = np.array_equal(within, np.arange(self._chunk))
          direct = to is None and whole
          chunk = out[start * size : stop * size] if direct else scratch
          _read_chunk(file, places[chunk_of[start] % len(places)], chunk)
        except (FileNotFoundError, _Damaged) as e:
          raise self._damaged(site, examples[start]) from e
        if to is not None:  # as rows of bytes: with bfloat16, or a row as one thing, NumPy lets no other thread run
          rows, to_rows = scratch.reshape(-1, row), to[start:stop]
          kept = to_rows >= 0
          if not (whole and kept.all()):
            rows = rows[(within[:, None] * self.n_tokens + np.arange(self.n_tokens))[kept]]
          out.reshape(-1, row)[to_rows[kept]] = rows
        elif not direct:
          out.reshape(-1, size)[start:stop] = scratch.reshape(-1, size)[within]

  def _file(self, site, shard) -> str:
    return '/'.join([site, 'c', str(shard), *['0'] * (self._arrays[site].rank - 1)])

  def _damaged(self, site, example):
    shard = int(example) // self.shard_examples
    file = self._file(site, shard)
    return ValueError(
      f'shard {shard} of {site} in {self.where} is missing or damaged; delete {file} there, if there is one, and run '
      'train.capture again: it captures that shard anew'
    )


class _Damaged(Exception):
  """A file is cut short or altered."""


def _places(file, n_chunks) -> np.ndarray:
  """Returns where each chunk of a shard's file begins, uint64 [n_chunks]: the zarr3 codec "sharding_indexed"."""
  size = 16 * n_chunks + _CRC
  end = os.fstat(file.fileno()).st_size
  index = os.pread(file.fileno(), size, max(end - size, 0))
  if len(index) < size or _crc(index[:-_CRC]) != index[-_CRC:]:
    raise _Damaged
  return np.frombuffer(index[:-_CRC], '<u8')[::2]


def _read_chunk(file, place, chunk: np.ndarray):
  crc = bytearray(_CRC)
  # One that is not in the shard begins at 2^64 - 1.
  if place >= 2**63 or os.preadv(file.fileno(), [chunk, crc], int(place)) < len(chunk) + _CRC or _crc(chunk) != crc:
    raise _Damaged


def _crc(content: bytes | np.ndarray) -> bytes:
  return google_crc32c.value(content).to_bytes(_CRC, 'little')


class Writer:
  """Gathers batches into shards, and writes each whole shard in the background while the next one fills.

  A context: leaving it waits for the shard that is being written; one that is not whole is dropped. Two shards are in
  memory.
  """

  def __init__(self, saved: ActivationStore, meter: activations.Meter):
    """Waiting for the disk is counted by the meter."""
    self._saved, self._meter = saved, meter
    self._pool, self._writing = concurrent.futures.ThreadPoolExecutor(1), None
    self._filling, self._spare = {}, {}

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *error):
    with self._meter.wait('disk'):
      self._pool.shutdown()
    if self._writing and not any(error):
      self._writing.result()

  def add(self, first: int, tokens_et: np.ndarray, acts: Mapping[str, np.ndarray]):
    """Takes a batch; blocks while a shard before the last is still being written.

    Args:
      first: its first example; a shard's batches come in order.
      tokens_et: int32 [example, token], all of one shard; of no example, nothing is done.
      acts: {site: [example, token, ...]}.

    Raises:
      ValueError, OSError: as `ActivationStore.write`, of a shard that has come before.
    """
    if self._writing and self._writing.done():
      self._writing.result()
    if not len(tokens_et):  # its first example would be the end of the last shard
      return
    shard = first // self._saved.shard_examples
    examples = self._saved.shard(shard)
    place = slice(first - examples.start, first - examples.start + len(tokens_et))
    for name, x in {TOKENS: tokens_et, **acts}.items():
      if name not in self._filling:
        self._filling[name] = np.empty((self._saved.shard_examples, *x.shape[1:]), x.dtype)
      self._filling[name][place] = x
    if first + len(tokens_et) == examples.stop:
      with self._meter.wait('disk'):
        if self._writing:
          self._writing.result()
      whole = {name: x[: place.stop] for name, x in self._filling.items()}
      self._writing = self._pool.submit(self._saved.write, shard, whole.pop(TOKENS), whole)
      self._filling, self._spare = self._spare, self._filling


def _runs(examples: np.ndarray) -> Iterator[tuple[int, int]]:
  """Yields (start, stop) of each run of neighbours, cut to pieces of _RUN."""
  breaks = np.flatnonzero(np.diff(examples) != 1) + 1
  for start, stop in itertools.pairwise([0, *breaks.tolist(), len(examples)]):
    for piece in range(start, stop, _RUN):
      yield piece, min(piece + _RUN, stop)


def _not_finite(x: np.ndarray) -> int:
  if x.dtype.itemsize == 2:  # bfloat16: NumPy would call a function for every number
    return np.count_nonzero((x.view(np.uint16) & 0x7F80) == 0x7F80)
  return x.size - np.count_nonzero(np.isfinite(x))


def _open_kvstore(where) -> ts.KvStore:
  where = str(where)
  local = {'driver': 'file', 'path': os.path.abspath(where) + '/'}
  return ts.KvStore.open(where.rstrip('/') + '/' if '://' in where else local, context=_CONTEXT).result()


def _is_fill(x: np.ndarray) -> np.ndarray:
  return x == -1 if x.dtype == np.int32 else np.isnan(x)


def _is_damaged(first: ts.Future) -> bool:
  try:
    return bool(_is_fill(first.result()))
  except ValueError as e:
    if not str(e).startswith(_DAMAGE):
      raise
    return True


class Checkpoints:
  """Training states as `folder/<step>`, each whole or not there, written while training goes on.

  A context: leaving it waits for the one that is being written. The last few stay, and the best. All of several
  processes call the same methods; each writes and reads its own shards. A folder has one writer at a time, which
  removes what a killed one has left half-written.
  """

  def __init__(self, folder: str | pathlib.Path, keep: int = KEPT_CHECKPOINTS, scored: bool = False):
    """Opens or makes the folder.

    Args:
      folder: a local path or a bucket's URL.
      keep: how many of the last stay.
      scored: whether every state is saved with a score, and the one of the lowest stays too.
    """
    self.folder = folder if '://' in str(folder) else pathlib.Path(folder).absolute()
    kept, best = [policies.LatestN(keep)], None
    if scored:
      best = operator.itemgetter('score')
      kept.append(policies.BestN(get_metric_fn=best, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      best_fn=best,
      best_mode='min',
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(str(self.folder), options=options)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *error):
    with _disk_space(self.folder):
      self._manager.close()

  def save(self, step: int, state: Any, score: float | None = None):
    """Begins to write a state and returns when it is copied: its arrays may be donated, and nothing waits for the disk.

    A state that is already there, or one after it, is not written again. Waits for the one before to be written.

    Args:
      step: number of the checkpoint.
      state: a pytree of arrays, sharded or not; typed random keys are arrays too.
      score: the lower, the better; where states are scored.

    Raises:
      OSError: no space is left, for the one before as the case may be; the checkpoints before that stay.
    """
    with _disk_space(self.folder):
      metrics = None if score is None else {'score': score}
      self._manager.save(step, args=ocp.args.StandardSave(_by_path(state)), metrics=metrics)

  def wait(self):
    """Waits until what was saved is on the disk.

    Raises:
      OSError: no space is left; the checkpoints before stay.
    """
    with _disk_space(self.folder):
      self._manager.wait_until_finished()

  def steps(self) -> list[int]:
    """Returns the numbers of the checkpoints, in order, when all are on the disk."""
    self.wait()
    return sorted(self._manager.all_steps())

  def best(self) -> int | None:
    """Returns the number of the one with the lowest score, None if there is none."""
    self.wait()
    return self._manager.best_step()

  def delete(self, step: int):
    """Removes a checkpoint, and thereby lets that step be written again."""
    self.wait()
    self._manager.delete(step)

  def restore(self, abstract_state: Any, step: int | None = None) -> Any:
    """Returns a state, by default the last, each array onto its sharding, whatever mesh it was saved from.

    Args:
      abstract_state: the state's pytree, of `jax.ShapeDtypeStruct` with shardings or of arrays.
      step: number of the checkpoint.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it has other leaves or shapes.
    """
    self.wait()
    step = self._manager.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f'no checkpoint at {self.folder}')
    leaves = self._manager.restore(step, args=ocp.args.StandardRestore(_by_path(abstract_state)))
    # By name: orbax returns them in another order.
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in _by_path(abstract_state)])


def save_checkpoint(folder: str | pathlib.Path, step: int, state: Any):
  """Writes one training state and returns when it is there: see `Checkpoints`."""
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(step, state)
    checkpoints.wait()


def restore_checkpoint(folder: str | pathlib.Path, abstract_state: Any) -> Any:
  """Returns the last state in a folder: see `Checkpoints.restore`."""
  with Checkpoints(folder) as checkpoints:
    return checkpoints.restore(abstract_state)


def latest_step(folder: str | pathlib.Path) -> int | None:
  """Returns the number of the last whole checkpoint, None if there is none."""
  with Checkpoints(folder) as checkpoints:
    return max(checkpoints.steps(), default=None)


def _by_path(tree) -> dict[str, Any]:
  # Flat: orbax 0.12 cannot restore a tree that mixes names and numbers on one level, as `nnx.List` does.
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def write_lines(path: str | pathlib.Path, lines: Iterable[str]):
  """Writes lines of text under a temporary name and then renames it; makes the folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + '.partial')
  with open(partial, 'w', encoding='utf-8') as file:
    file.writelines(f'{line}\n' for line in lines)
  os.replace(partial, path)


def write_json(path: str | pathlib.Path, value: Any):
  """Writes a value as JSON, atomically; NaN and infinities, which JSON has not, are written as null."""
  write_lines(path, [json.dumps(_finite(value), indent=2, allow_nan=False)])


def _finite(value):
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
