"""What every command shares: flags, the mesh, one clear sentence for bad input, stopping, progress, and stage folders.

A stage is `run(config, workdir)`: it takes what the stage before left under the workdir and leaves its own folder
there, with the settings it was made with (config.json) and, once whole, an empty file DONE.
"""

import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping

import jax
import ml_collections
import numpy as np
import orbax.checkpoint
import tqdm
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from jax_interp import text
from models import pretrained, sharding

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; --config.sae.k=16 overrides a field.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/tiny', 'Where artefacts are read and left.')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where an error was raised, not only what it says.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, of several that run one command.')
_N_PROCESSES = flags.DEFINE_integer('n_processes', None, 'How many processes there are; with --coordinator.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0; with --coordinator.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Several processes, which JAX finds by itself: on TPU pods, under Slurm or Open MPI.'
)
_HEARTBEAT = flags.DEFINE_integer('heartbeat_timeout', 100, 'Seconds after which a silent process is taken for dead.')

TRAINED = 'trained'
TOKENS_AT_ONCE = 2**18  # of text, written between two looks at the clock
SAVE_SECONDS = 10  # between two saved positions in the text
MAX_WAIT_SECONDS = 7 * 24 * 3600  # for the process that writes the windows
_stop = threading.Event()
_barriers = itertools.count()


class Stopped(Exception):
  """A command was asked to stop, saved its work and says how to go on."""


def stopping() -> bool:
  """Returns whether SIGTERM or SIGINT has arrived; long loops ask between units of work, save, and raise `Stopped`."""
  return _stop.is_set()


def main(run: Callable[[ml_collections.ConfigDict, pathlib.Path], None], several_processes: bool = False):
  """Runs a stage as a command: exits 0 when done or stopped with its work saved, 1 on bad input, which it names.

  Args:
    run: the stage.
    several_processes: whether it can be run by several processes together, each started with the same flags and its
      own --process. When one of them dies, JAX ends the others.
  """
  app.run(lambda argv: sys.exit(_main(run, argv, several_processes)), flags_parser=_parse_flags)


def _parse_flags(argv):
  logging.set_verbosity(logging.FATAL)  # ml_collections logs what it then raises
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is None:
      raise ValueError('no config; give --config=configs/tiny.py or another file of configs/')
  except (AttributeError, KeyError) as e:
    sys.exit(f'error: unknown config field {sentence(e)}')
  except (flags.Error, TypeError, ValueError, OSError) as e:
    sys.exit(f'error: {sentence(e)}')
  logging.set_verbosity(logging.WARNING)
  return rest


def _join(several_processes: bool):
  explicit = [_COORDINATOR.value, _N_PROCESSES.value, _PROCESS.value]
  given = [value is not None for value in explicit]
  if not any(given) and not _DISTRIBUTED.value:
    return
  if not several_processes:
    raise ValueError('this command runs in one process; leave out --coordinator, --n_processes and --process')
  if any(given) and (not all(given) or _DISTRIBUTED.value or not 0 <= _PROCESS.value < _N_PROCESSES.value):
    raise ValueError(
      f'--coordinator={explicit[0]} --n_processes={explicit[1]} --process={explicit[2]} name no process of several; '
      'give all three, the last from 0, or --distributed alone'
    )
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM from us
  try:
    jax.distributed.initialize(
      *explicit, heartbeat_timeout_seconds=_HEARTBEAT.value, shutdown_timeout_seconds=_HEARTBEAT.value
    )
  except (ValueError, RuntimeError) as e:
    raise ValueError(f'the processes do not find each other: {e}') from e


def _main(run, argv, several_processes) -> int:
  if len(argv) > 1:
    print(
      f'error: unexpected arguments {argv[1:]}; flags are --config, --config.FIELD=VALUE and --workdir', file=sys.stderr
    )
    return 1
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _ask_to_stop)
  config = _CONFIG.value
  try:
    _join(several_processes)
    jax.set_mesh(sharding.make_mesh(**config.mesh))
    run(config, pathlib.Path(_WORKDIR.value))
  except Stopped as e:
    print(f'stopped: {e}', file=sys.stderr)
  except (ValueError, KeyError, OSError, ImportError) as e:
    if _TRACEBACK.value:
      traceback.print_exc()
    print(f'error: {sentence(e)}', file=sys.stderr)
    return 1
  return 0


def _ask_to_stop(number, frame):
  _stop.set()
  signal.signal(number, signal.SIG_DFL)  # asked twice, it ends at once


def sentence(e: Exception) -> str:
  """Returns what an error says, on one line."""
  if isinstance(e, OSError) and e.errno == errno.ENOSPC:
    return f'no space left on the device ({e.filename or "while writing"}); make room and run the same command again'
  while isinstance(e, KeyError | AttributeError) and e.args:  # their str() is the repr of the message
    e = e.args[0]
  return ' '.join(str(e).split())


def progress(iterable: Iterable | None, total: int, desc: str, unit: str, initial: int = 0, scale: float = 1):
  """Returns a tqdm bar with rate and time left; `.set_postfix(loss=...)` adds the number that matters.

  Args:
    iterable: what to go through, or None to call `.update(n)`.
    total: how many units there are, `initial` of them done before.
    desc: the stage.
    unit: such as 'tokens'.
    scale: units an item stands for, such as the tokens of a batch.
  """
  interval = 0.2 if sys.stderr.isatty() else 10  # a log file wants a line now and then
  return tqdm.tqdm(
    iterable,
    desc,
    total,
    unit=f' {unit}',
    initial=initial,
    unit_scale=scale if scale != 1 else True,
    mininterval=interval,
    disable=jax.process_index() > 0,  # one bar for all
  )


class MetricsLog:
  """A file of JSON lines, a training step each; opened at the step that training starts from or resumes at."""

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the file for the steps after `step`; later ones, of a run that got further than its checkpoint, go."""
    lines = path.read_text('utf-8').splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
    _write(path, ''.join(kept).encode())
    self._path = path

  def write(self, numbers: Mapping[str, float]):
    """Appends a line; `numbers` holds the step."""
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(numbers) + '\n')


def _plain(settings):
  """Returns settings as JSON gives them back: dicts, lists, numbers, strings."""
  if isinstance(settings, ml_collections.ConfigDict):
    settings = settings.to_dict()
  return json.loads(json.dumps(settings, default=lambda value: value.to_dict()))


def _first_difference(ours: Mapping, theirs: Mapping, prefix: str = '') -> str | None:
  for key in sorted({*ours, *theirs}):
    a, b = ours.get(key), theirs.get(key)
    if isinstance(a, dict) or isinstance(b, dict):
      if found := _first_difference(a or {}, b or {}, f'{prefix}{key}.'):
        return found
    elif a != b:
      return f'{prefix}{key} is {b!r} there and {a!r} now'
  return None


def claim(folder: pathlib.Path, settings: Mapping) -> bool:
  """Makes a stage's folder for these settings, or finds it; returns whether the stage is already done.

  Args:
    folder: the stage's folder.
    settings: all that the result depends on: values, dicts, ConfigDicts.

  Raises:
    ValueError: the folder was made with other settings; the message names the first that differs.
  """
  if folder.is_dir() and {path.name for path in folder.iterdir()} - {'config.json', 'config.json.partial', 'lock'}:
    _check_settings(folder, settings)
  else:  # what is not there, or holds nothing yet, may be made with any settings
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / 'config.json', json.dumps(_plain(settings), indent=2).encode())
  if done := (folder / 'DONE').exists():
    print(f'{folder} is done already')
  return done


def require(folder: pathlib.Path, settings: Mapping, stage: str):
  """Checks that the folder of an earlier stage is finished, and was made with these settings.

  Raises:
    FileNotFoundError: it is not finished.
    ValueError: it was made with other settings; the message names the first that differs.
  """
  if not (folder / 'DONE').exists():
    raise FileNotFoundError(f'{folder} is not finished; run {stage} first, with the same --config and --workdir')
  _check_settings(folder, settings)


def _check_settings(folder, settings):
  path = folder / 'config.json'
  if not path.exists():
    raise FileNotFoundError(f'{folder} holds files but no config.json, so it is not known what made them; delete it')
  there = json.loads(path.read_text('utf-8'))
  if difference := _first_difference(_plain(settings), there):
    raise ValueError(
      f'{folder} was made with another config: {difference}; choose another --workdir, or delete {folder} to make it '
      'anew'
    )


def finish(folder: pathlib.Path):
  """Marks a stage as whole."""
  _write(folder / 'DONE', b'')


def _write(path: pathlib.Path, content: bytes):
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(content)
  os.replace(partial, path)


@dataclasses.dataclass(frozen=True)
class Subject:
  """The model under study: `source` is what `models.pretrained` loads it from, `fingerprint` a hash of its weights."""

  model: object
  tokenizer: object
  source: str
  fingerprint: str


def subject_source(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
  """Returns what the subject model is loaded from: config.model.source, where 'trained' is what train.lm left.

  Raises:
    FileNotFoundError: train.lm has not finished.
  """
  if config.model.source != TRAINED:
    return config.model.source
  if not (workdir / 'lm' / 'DONE').exists():
    raise FileNotFoundError(f'{workdir / "lm"} is not finished; run train.lm first, with the same config')
  return str(workdir / 'lm' / 'model')


def subject(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Subject:
  """Loads the subject model, in config.model.dtype or float32, and its tokenizer onto the ambient mesh."""
  source = subject_source(config, workdir)
  model = pretrained.load_model(source, config.model.get('dtype', 'float32'))
  return Subject(model, pretrained.load_tokenizer(source), source, pretrained.fingerprint(source))


def made_from(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """Returns what every stage depends on: the subject model, by a hash of its weights too, and the text."""
  fingerprint = pretrained.fingerprint(subject_source(config, workdir))
  return {'model': config.model, 'fingerprint': fingerprint, 'text': config.text}


def windows(
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
    if stopping():
      raise Stopped('process 0 says what of the windows is saved; run the same command to go on')
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
  text.check_similarity(near_duplicates)
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
  bar = progress(None, stream.max_tokens or None, desc, 'tokens', initial=position['windows'] * stream.window)
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
      stop = not done and stopping()
      if done or stop or time.monotonic() > saved_at + SAVE_SECONDS:
        position, saved_at = stream.position(), time.monotonic()
        file.seek(0)
        file.write(header(position))
        file.seek(0, os.SEEK_END)
        file.flush()
        os.fsync(file.fileno())
        _write(_position_path(raw), json.dumps({'done': done, 'position': position}).encode())
      if stop:
        raise Stopped(f'{position["windows"]} windows of text are saved in {raw}; run the same command to go on')
  return position


def _npy_header(n_windows: int, n_tokens: int) -> bytes:
  """Returns the head of a .npy file of int32 windows; NumPy pads it, so that it is as long for any number of them."""
  header = {'descr': np.dtype(np.int32).str, 'fortran_order': False, 'shape': (n_windows, n_tokens)}
  content = io.BytesIO()
  np.lib.format.write_array_header_1_0(content, header)
  return content.getvalue()


def _drop_near_copies(raw: Mapping[str, pathlib.Path], written: Mapping[str, pathlib.Path], similarity: float):
  windows = {split: np.load(path, mmap_mode='r') for split, path in raw.items()}
  distinct = text.distinct(list(windows.values()), similarity)
  for split, kept_e in zip(windows, distinct, strict=True):
    windows_et, n_kept = windows[split], int(kept_e.sum())
    print(f'{split}: {len(kept_e) - n_kept} of {len(kept_e)} windows are near copies of earlier ones and left out')
    if not n_kept:
      raise ValueError(f'near_duplicates {similarity} leaves no {split} window; raise it, or give more text')
    with open(written[split], 'wb') as file:
      file.write(_npy_header(n_kept, windows_et.shape[1]))
      for start in range(0, len(windows_et), text.CHUNK):
        part = slice(start, start + text.CHUNK)
        file.write(windows_et[part][kept_e[part]].tobytes())
      file.flush()
      os.fsync(file.fileno())
