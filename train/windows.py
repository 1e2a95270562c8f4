"""Files of token windows, which every stage that reads text goes through.

Takes config.text and a tokenizer; gives the windows of a split, memory-mapped from workdir/text. They are made once,
by the first stage that asks for them. If that is stopped or killed, the next run goes on from the position saved last,
and ends with the same bytes.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
import orbax.checkpoint
from jax.experimental import multihost_utils

from jax_interp import near_copies, text
from train import command

TOKENS_AT_ONCE = 2**18  # of text, written between two looks at the clock
SAVE_SECONDS = 10  # between two saved positions in the text
MAX_WAIT_SECONDS = 7 * 24 * 3600  # for the process that writes the windows
_barriers = itertools.count()


def prepared(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, tokenizer, split: str, n_tokens: int | None = None
) -> np.ndarray:
  """Returns int32 [example, token] of a split, memory-mapped from workdir/text, where the first call writes it.

  A file's name holds a hash of everything it depends on but the text itself: the text is read once a workdir, so
  that all stages see the same, whatever is installed later. Stopped or killed, the writing goes on where it was. Of
  several processes the first writes; one that does not see its files, for want of a shared disk, writes its own.

  Args:
    config: reads config.text: the arguments of `text.Windows`, and near_duplicates, the similarity from which a window
      is left out because an earlier one is like it, held out behind train (0, the default: none is).
    workdir: where text/ is.
    tokenizer: of the subject model.
    split: 'train' or 'held_out'. With max_tokens, both end at the same document.
    n_tokens: to train a language model on: windows of this length, packed in the order of the text with eos behind each
      document. Of config.text, only source, field and max_tokens apply.
  """
  settings = config.text.to_dict()
  if n_tokens:
    settings = {name: settings[name] for name in ('source', 'field', 'max_tokens') if name in settings}
    settings['window'] = n_tokens
  vocab = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
  key = hashlib.sha256(json.dumps([settings, vocab], sort_keys=True).encode()).hexdigest()[:12]
  paths = {name: workdir / 'text' / f'{name}_{settings["window"]}_{key}.npy' for name in text.SPLITS}
  missing = lambda: not all(path.exists() for path in paths.values())
  done = False
  try:
    if missing() and jax.process_index() == 0:
      _make_windows(paths, tokenizer, **settings)
    done = True
  finally:
    if jax.process_count() > 1:
      done = _first_is_done(done)
  if not done:
    if command.stopping():
      raise command.Stopped('process 0 says what of the windows is saved; run the same command to go on')
    raise ValueError('process 0 could not write the windows of text, and says why')
  if missing():
    _make_windows(paths, tokenizer, **settings)
  return np.load(paths[split], mmap_mode='r')


def _first_is_done(done: bool) -> bool:
  """Returns what process 0 gives, in all processes, when all have come here.

  Those that come early wait at a barrier, because a collective gives up after half a minute.
  """
  wait = orbax.checkpoint.multihost.get_barrier_sync_fn()
  wait(key=f'windows {next(_barriers)}', timeout_ms=MAX_WAIT_SECONDS * 1000)  # each name serves once
  return bool(multihost_utils.broadcast_one_to_all(np.int32(done)))


def _make_windows(
  paths: Mapping[str, pathlib.Path], tokenizer, *, source: str, near_duplicates: float = 0.0, **settings
):
  print(f'reading the text {source!r}')
  near_copies.check_similarity(near_duplicates)
  make = functools.partial(text.Windows, source, tokenizer, **settings)
  raw = {split: path.with_suffix(f'.{jax.process_index()}.partial') for split, path in paths.items()}
  if not any(_position_path(path).exists() for path in raw.values()):
    for split in text.SPLITS:
      next(make(split))  # bad text and settings are told before there is work to lose
  n_documents = 0
  for split, path in paths.items():
    last = _gather(path, raw[split], functools.partial(make, split, max_documents=n_documents), f'text, {split}')
    n_documents = last['documents'] + 1 if settings.get('max_tokens') else 0
  written = raw
  if near_duplicates:
    written = {split: path.with_suffix('.kept') for split, path in raw.items()}
    _drop_near_copies(raw, written, near_duplicates)
  for split, path in paths.items():
    if written[split].exists():  # else it was renamed before a kill
      os.replace(written[split], path)
  for path in raw.values():
    path.unlink(missing_ok=True)
    _position_path(path).unlink(missing_ok=True)


def _position_path(raw: pathlib.Path) -> pathlib.Path:
  return raw.with_suffix('.position')


def _gather(path: pathlib.Path, raw: pathlib.Path, make: Callable[..., text.Windows], desc: str) -> dict:
  """Writes a stream of windows to `raw`, from where an earlier call ended; returns the stream's last position."""
  stream = make()
  position, done = stream.position(), False
  header = lambda position: _npy_header(position['windows'], stream.window)
  size = lambda position: len(header(position)) + 4 * stream.window * position['windows']
  if _position_path(raw).exists():
    saved = json.loads(_position_path(raw).read_text('utf-8'))
    same = saved['position']['of'] == position['of']
    if same and saved['done'] and (raw.exists() or path.exists()):
      return saved['position']
    if same and raw.exists() and raw.stat().st_size >= size(saved['position']):
      position = saved['position']
      stream = make(position=position)
    else:
      print(f'{raw} is of another text or damaged; it is written anew')
  raw.parent.mkdir(parents=True, exist_ok=True)
  raw.touch()
  bar = command.progress(None, stream.max_tokens or None, desc, 'tokens', initial=position['windows'] * stream.window)
  with open(raw, 'r+b') as file, bar:
    file.write(header(position))
    file.truncate(size(position))
    file.seek(0, os.SEEK_END)
    saved_at, n_windows = time.monotonic(), -(-TOKENS_AT_ONCE // stream.window)
    while not done:
      found = list(itertools.islice(stream, n_windows))
      file.write(np.array(found, np.int32).tobytes())
      bar.update(len(found) * stream.window)
      done = len(found) < n_windows
      stop = not done and command.stopping()
      if done or stop or time.monotonic() > saved_at + SAVE_SECONDS:
        position, saved_at = stream.position(), time.monotonic()
        file.seek(0)
        file.write(header(position))
        file.seek(0, os.SEEK_END)
        file.flush()
        os.fsync(file.fileno())
        command.write(_position_path(raw), json.dumps({'done': done, 'position': position}).encode())
      if stop:
        raise command.Stopped(
          f'{position["windows"]} windows of text are saved in {raw}; run the same command to go on'
        )
  return position


def _npy_header(n_windows: int, n_tokens: int) -> bytes:
  """Returns the head of a .npy file of int32 windows; NumPy pads it, so that it is as long for any number of them."""
  header = {'descr': np.dtype(np.int32).str, 'fortran_order': False, 'shape': (n_windows, n_tokens)}
  content = io.BytesIO()
  np.lib.format.write_array_header_1_0(content, header)
  return content.getvalue()


def _drop_near_copies(raw: Mapping[str, pathlib.Path], written: Mapping[str, pathlib.Path], similarity: float):
  windows = {split: np.load(path, mmap_mode='r') for split, path in raw.items()}
  distinct = near_copies.distinct(list(windows.values()), similarity)
  for split, kept_e in zip(windows, distinct, strict=True):
    windows_et, n_kept = windows[split], int(kept_e.sum())
    print(f'{split}: {len(kept_e) - n_kept} of {len(kept_e)} windows are near copies of earlier ones and left out')
    if not n_kept:
      raise ValueError(f'near_duplicates {similarity} leaves no {split} window; raise it, or give more text')
    with open(written[split], 'wb') as file:
      file.write(_npy_header(n_kept, windows_et.shape[1]))
      for start in range(0, len(windows_et), near_copies.CHUNK):
        part = slice(start, start + near_copies.CHUNK)
        file.write(windows_et[part][kept_e[part]].tobytes())
      file.flush()
      os.fsync(file.fileno())
