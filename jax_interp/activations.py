"""Tokens to activations: captured at any set of sites in one pass, and shuffled for training.

Takes a model and token windows [example, token]; gives {site: [batch, token, ...]} batch by batch, or an endless stream
of shuffled rows [batch_size, d] that reads from a store and from the live model alike. `e` in a name is an example.
Several processes capture together, each its own examples, on one mesh.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp import text
from models import sharding, sites

_BUFFERS = 3  # one that is read, one whose batches are given, and one of which the last batch is still in use
# Held while a program of several devices is dispatched in one of two threads, a live reader's and the one that trains:
# were it dispatched in another order to each device, the programs' collectives would wait for each other.
DISPATCHING = threading.Lock()
BLOCK = 4  # examples that are read together, and a store's chunk: 0.4 MB for GPT-2 small in bfloat16, 64 tokens


@functools.partial(jax.jit, static_argnames=('names', 'dtype'))
def capture(
  model, tokens_bt: jax.Array, names: tuple[str, ...], dtype: str = 'float32'
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns {site: activation [batch, token, ...]} in `dtype`, and {site: int32 [batch], how many are not finite}.

  Layers after the last of the sites are not computed. Only the batch is cut over devices: where an example's tokens
  are, all of its activations are.

  Raises:
    KeyError: a name or glob matches no site.
  """
  found = sites.forward(model, tokens_bt, capture=names)[1]
  by_example = lambda x: jax.lax.with_sharding_constraint(x, sharding.spec('batch'))
  acts = {site: by_example(x.astype(jnp.dtype(dtype))) for site, x in found.items()}
  bad = {site: by_example((~jnp.isfinite(x)).sum(range(1, x.ndim), jnp.int32)) for site, x in acts.items()}
  return acts, bad


@dataclasses.dataclass
class Meter:
  """What a stream counts: batches, the floating-point operations of one, and seconds, of which some were waiting.

  Attributes:
    flops: of a batch on all devices, as XLA counts them for the compiled capture; NaN where it does not.
    batches: dispatched so far.
    started: when the first batch was dispatched, compiled by then; None before.
    waiting: seconds waited since, by cause: 'text' and 'device' here, more by who uses the stream.
  """

  flops: float = math.nan
  batches: int = 0
  started: float | None = None
  waiting: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  @contextlib.contextmanager
  def wait(self, cause: str) -> Iterator[None]:
    """Adds the time inside to `waiting`."""
    began = time.perf_counter()
    yield
    self.waiting[cause] += time.perf_counter() - began

  @property
  def seconds(self) -> float:
    """Time since the first batch."""
    return 0.0 if self.started is None else time.perf_counter() - self.started


def local_batch(batch_size: int) -> int:
  """Returns how many examples of a batch are this process's: the data axis of the mesh is cut over its processes.

  Raises:
    ValueError: the data axis does not divide batch_size, or the processes do not hold whole rows of it, each as many.
  """
  sharding.check_divides('batch_size', batch_size, 'data')
  devices = jax.sharding.get_mesh().devices
  n_processes = len({device.process_index for device in devices.flat})
  owners = [{device.process_index for device in row} for row in devices]
  n_rows = collections.Counter(min(row) for row in owners)
  if max(map(len, owners)) > 1 or len(n_rows) < n_processes or len(set(n_rows.values())) > 1:
    raise ValueError(
      f'a mesh of {"x".join(map(str, devices.shape))} does not give each of {n_processes} processes as many whole rows '
      'of the data axis; choose mesh.data x mesh.model as all devices, mesh.model within the devices of a process'
    )
  return batch_size // n_processes


def stream(
  model,
  windows_et: np.ndarray,
  names: tuple[str, ...],
  batch_size: int,
  firsts: Sequence[int] | None = None,
  dtype: str = 'float32',
  meter: Meter | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields (index of the first example, {site: activation [b, token, ...]}), in order.

  The device computes the next batch while the host copies and uses this one. Padding (`text.PAD`) is computed as token
  0, which no token before it sees.

  Args:
    model: as for `sites.forward`, on the ambient mesh.
    windows_et: int32 token ids.
    names: site names or globs.
    batch_size: examples a batch of all processes, cut over the data axis; a process's share is `local_batch` of them.
    firsts: where each batch of this process begins, by default every `local_batch` examples; what is past the last
      example is computed and dropped. All processes give as many, of their own.
    dtype: 'float32' or 'bfloat16'.
    meter: counts.

  Raises:
    ValueError: the mesh does not divide batch_size, see `local_batch`; a token is outside the vocabulary; an activation
      is not finite.
    KeyError: a name matches no site.
  """
  n, meter = local_batch(batch_size), meter or Meter()
  by_example = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec('batch'))

  def dispatch(first):
    with meter.wait('text'):
      tokens_bt = _checked(model, windows_et[first : first + n], first)
      padded_bt = np.pad(tokens_bt, ((0, n - len(tokens_bt)), (0, 0)))
    placed_bt = jax.make_array_from_process_local_data(by_example, padded_bt, (batch_size, padded_bt.shape[1]))
    if meter.started is None:
      compiled = capture.lower(model, placed_bt, names, dtype).compile()  # the call below finds it compiled
      cost = compiled.cost_analysis() or {}  # of one device
      meter.flops = cost.get('flops', math.nan) * by_example.mesh.size
      meter.waiting.clear()
      meter.started = time.perf_counter()
    meter.batches += 1
    with DISPATCHING:
      found = capture(model, placed_bt, names, dtype)
    found = jax.tree.map(_local_parts, found)
    return first, len(tokens_bt), *found

  def fetch(first, n, acts, bad):
    with meter.wait('device'):
      acts, bad = ({site: _joined(parts)[:n] for site, parts in found.items()} for found in (acts, bad))
    for site, bad_b in bad.items():
      if bad_b.any():
        raise ValueError(
          f'{site} has {bad_b.sum()} activations that are not finite in the batch from example {first} on, first '
          f'in example {first + bad_b.nonzero()[0][0]}; look at the weights of the model'
        )
    return first, acts

  dispatched = None
  for first in range(0, len(windows_et), n) if firsts is None else firsts:
    next_one = dispatch(first)
    if dispatched:
      yield fetch(*dispatched)
    dispatched = next_one
  if dispatched:
    yield fetch(*dispatched)


def _checked(model, tokens_bt, first):
  tokens_bt = np.where(tokens_bt == text.PAD, 0, tokens_bt)
  if not len(tokens_bt):  # of a process that has nothing left to do
    return tokens_bt
  try:
    sites.check_tokens(model, tokens_bt)
  except ValueError as e:
    raise ValueError(f'in the batch from example {first} on, {e}') from e
  return tokens_bt


def _local_parts(x: jax.Array) -> list[jax.Array]:
  """Returns the parts of an array that is cut over its first axis that are here, in order, on their way to the host."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}  # equal ones once
  for part in parts.values():
    part.copy_to_host_async()
  return [parts[start] for start in sorted(parts)]


def _joined(parts: Sequence[jax.Array]) -> np.ndarray:
  return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def width(site: str, shape: Sequence[int]) -> int:
  """Returns d of activations [example, token, d], the only ones that an SAE reads.

  Raises:
    ValueError: the site's shape is another one.
  """
  if len(shape) != 3:
    raise ValueError(
      f'{site} has the shape {list(shape)}, and an SAE reads [example, token, d]; choose a resid or mlp site'
    )
  return shape[2]


def live_readers(
  model, windows_et: np.ndarray, names: Sequence[str], batch_size: int = 32, dtype: str = 'float32'
) -> dict[str, Callable[..., np.ndarray]]:
  """Returns {site: read}, `read(examples, out=None, to=None)`: int [n] -> activations [n, token, d], computed anew.

  They may be called from any thread; `out` and `to` are as for `ActivationStore.reader`. Where the readers of several
  sites are asked for the same examples in the same order, as by `shuffled_batches` of one seed, the model runs once.

  Raises:
    ValueError: the activations of a site are not [example, token, d]: see `width`.
  """
  tokens_et, mesh, names = jax.ShapeDtypeStruct(windows_et.shape, jnp.int32), jax.sharding.get_mesh(), tuple(names)
  for site, x in sites.site_shapes(model, tokens_et, names).items():
    width(site, x.shape)
  running = threading.Lock()
  left = {site: collections.deque(maxlen=_BUFFERS) for site in names}  # what other sites' readers have computed

  def computed(site, examples):
    with running, jax.set_mesh(mesh):  # which is a thread's own
      while left[site]:
        others, x_etd = left[site].popleft()
        if np.array_equal(others, examples):
          return x_etd
      parts = [acts for _, acts in stream(model, windows_et[examples], names, batch_size, dtype=dtype)]
      acts = {name: np.concatenate([part[name] for part in parts]) for name in names}
      for other in set(names) - {site}:
        left[other].append((examples, acts[other]))
      return acts[site]

  def read(site, examples, out=None, to=None):
    x_etd = computed(site, examples)
    if to is None and out is None:
      return x_etd
    if out is None:
      out = np.empty((to.max(initial=-1) + 1, x_etd.shape[-1]), x_etd.dtype)
    if to is None:
      out[:] = x_etd
    else:
      out[to[to >= 0]] = x_etd[to >= 0]
    return out

  return {site: functools.partial(read, site) for site in names}


def shuffled_batches(
  read: Callable[..., np.ndarray],
  keep_et: np.ndarray,
  batch_size: int,
  buffer_examples: int,
  seed: int,
  start_step: int = 0,
  part: tuple[int, int] = (0, 1),
  unit: int = 1,
) -> Iterator[np.ndarray]:
  """Yields shuffled activations [batch_size, d] without end; the row of every token to keep comes once an epoch.

  Each epoch permutes blocks of BLOCK neighbouring examples, fills a buffer with the next of them and permutes its rows;
  the next buffer is read meanwhile. A batch is a part of a buffer, which stays in memory as long as one of its batches
  does: two or three are. A batch is a function of the seed and its number: a checkpoint need keep no more than the
  step, and resuming rereads one buffer. So several sites read with one seed are of the same tokens, row by row.

  Args:
    read: `ActivationStore.reader(site)` or one of `live_readers`; called from another thread.
    keep_et: bool [example, token]: which tokens are wanted; `ActivationStore.keep()` or `text.kept`.
    batch_size: rows a batch; a batch may end one epoch and begin the next.
    buffer_examples: examples that are mixed at a time.
    seed: of both permutations.
    start_step: the first batch to yield.
    part: (index, number of parts): only this part of every batch is read and yielded, [batch_size / parts, d]. The
      parts together are the rows of the batch, in another order; each reads little more than its share of examples.
    unit: above 1, every unit-th row of a batch, from any one on, is of the same tokens however many parts there are,
      and of each part as many. A batch of one buffer is then in the order of the examples.

  Raises:
    ValueError: no token is to be kept, or the parts do not divide the batch into whole units.
  """
  _, n_parts = part
  if batch_size % (n_parts * unit):
    of = f' of {unit} rows' * (unit > 1)
    raise ValueError(f'batch_size {batch_size} is not divisible by {n_parts} parts{of}; choose a multiple')
  size = batch_size // n_parts
  kept_e = keep_et.sum(1)
  if not kept_e.any():
    raise ValueError(f'all {keep_et.size} tokens are padding or special, so none is left; give other text')
  n_examples, fills = len(keep_et), -(-len(keep_et) // buffer_examples)
  buffers = []

  def examples_of(epoch):
    return _block_order(n_examples, np.random.default_rng((seed, epoch, 0)))

  def load(number, examples):
    """Returns the kept rows [n, d] of a fill, shuffled."""
    epoch, fill = divmod(number, fills)
    before, examples = np.split(examples[: (fill + 1) * buffer_examples], [fill * buffer_examples])
    examples = np.sort(examples)
    rows = np.random.default_rng((seed, epoch, 1 + fill)).permutation(np.flatnonzero(keep_et[examples]))
    if n_parts > 1 or unit > 1:
      rows = _part(rows, epoch * kept_e.sum() + kept_e[before].sum(), batch_size, part, unit)
    to = np.full(keep_et[examples].shape, -1)
    to.flat[rows] = np.arange(len(rows))
    if n_parts > 1:
      wanted = (to >= 0).any(1)
      wanted[0] = True  # from no example, the reader would not tell d
      examples, to = examples[wanted], to[wanted]
    # Memory that no batch uses any more is used again: touched for the first time, it costs as much as reading.
    for i, n_references in enumerate(_references(buffers)):
      if n_references == _UNUSED and len(buffers[i]) >= len(rows):
        return read(examples, buffers[i][: len(rows)], to)
    found = read(examples, None, to)
    buffers[:] = [*buffers, found][-_BUFFERS:]
    return found

  epoch, row = divmod(start_step * batch_size, kept_e.sum())
  order = examples_of(epoch)
  ends = np.cumsum(np.add.reduceat(kept_e[order], np.arange(0, n_examples, buffer_examples)))
  fill = np.searchsorted(ends, row, 'right')
  row -= ends[fill - 1] if fill else 0
  n_before = lambda row: row // batch_size * size + _share(part, row % batch_size, unit)
  row = n_before(start_step * batch_size) - n_before(start_step * batch_size - row)
  left_bd = None  # of the buffer before, less than a batch
  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    first = epoch * fills + fill
    loading = reader.submit(load, first, order)
    for number in itertools.count(first + 1):
      rows_rd = loading.result()[row:]
      row = 0
      if number % fills == 0:
        order = examples_of(number // fills)
      loading = reader.submit(load, number, order)
      if left_bd is not None:
        n = size - len(left_bd)
        left_bd, rows_rd = np.concatenate([left_bd, rows_rd[:n]]), rows_rd[n:]
        if len(left_bd) < size:
          continue
        yield left_bd
      n_whole = len(rows_rd) // size * size
      for start in range(0, n_whole, size):
        yield rows_rd[start : start + size]
      left_bd = rows_rd[n_whole:].copy() if n_whole < len(rows_rd) else None


def _units_before(index: int, n_parts: int, n: int) -> int:
  """Returns how many of the first n units of a batch are of the parts before one: they are dealt out in turn."""
  return n // n_parts * index + min(n % n_parts, index)


def _share(part: tuple[int, int], n: int, unit: int) -> int:
  """Returns how many of the first n rows of a batch are a part's."""
  index, n_parts = part
  whole, rest = divmod(n, unit)
  n_units = _units_before(index + 1, n_parts, whole) - _units_before(index, n_parts, whole)
  return n_units * unit + (rest if whole % n_parts == index else 0)


def _part(rows: np.ndarray, first: int, batch_size: int, part: tuple[int, int], unit: int) -> np.ndarray:
  """Returns a part's rows of a fill, of every batch in the order of the examples.

  Each part has an equal share of the whole units of a batch that a fill has, and they are neighbours. A unit that one
  fill begins and the next ends is of one part.

  Args:
    rows: of the fill in the order of the stream, which numbers them from `first` on.
    first: as said.
    batch_size: of all parts.
    part: which of how many.
    unit: as many rows of the batch, in that order, are of one part.
  """
  index, n_parts = part
  found = []
  cuts = range(batch_size - first % batch_size, len(rows), batch_size)
  for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
    begun = (first + start) % batch_size  # rows of the batch in the fill before
    ended = begun + stop - start
    units = -(-begun // unit), max(-(-begun // unit), ended // unit)  # the whole ones
    low, high = (_units_before(i, n_parts, units[1]) - _units_before(i, n_parts, units[0]) for i in (index, index + 1))
    n_head = min(units[0] * unit, ended) - begun  # of a unit that was begun before
    n_whole = (units[1] - units[0]) * unit
    head, whole, tail = np.split(np.sort(rows[start:stop]), [n_head, n_head + n_whole])
    if (units[0] - 1) % n_parts == index:
      found.append(head)
    found.append(whole[low * unit : high * unit])
    if units[1] % n_parts == index:
      found.append(tail)
  return np.concatenate(found)


def _references(things: list) -> list[int]:
  return [sys.getrefcount(thing) for thing in things]


_UNUSED = _references([np.empty(0)])[0]  # of an array that only a list holds


def _block_order(n_examples, rng):
  firsts = BLOCK * rng.permutation(-(-n_examples // BLOCK))
  order = (firsts[:, None] + np.arange(BLOCK)).ravel()
  return order[order < n_examples]
