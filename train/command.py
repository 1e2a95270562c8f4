"""What every command shares: flags, the mesh, one clear sentence for bad input, stopping, progress, and stage folders.

A stage is `run(config, workdir)`: it takes what the stage before left under the workdir and leaves its own folder
there, with the settings it was made with (config.json) and, once whole, an empty file DONE.
"""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping

import jax
import ml_collections
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from models import pretrained, sharding
from train import sweep

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
GROWING = 'growing'  # in a folder where train.grow has begun and not ended
_OF_NOTHING_YET = {'config.json', 'config.json.partial', 'lock', GROWING}  # files of a stage that has made nothing
_stop = threading.Event()


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
    sys.exit(f'error: unknown config field {sentence(e)} (a flag sets what the file of --config has; add others there)')
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
    workdir = pathlib.Path(_WORKDIR.value)
    run(sweep.chosen(config, workdir), workdir)
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


class _Lines:
  """stderr that is no terminal: each state of a bar is a line."""

  def __init__(self):
    self._last = ''

  def write(self, text: str):
    if (line := text.strip()) and line != self._last:
      sys.stderr.write(f'{line}\n')
      self._last = line

  def flush(self):
    sys.stderr.flush()


def progress(iterable: Iterable | None, total: int, desc: str, unit: str, initial: int = 0, scale: float = 1):
  """Returns a tqdm bar with rate and time left; `.set_postfix(loss=...)` adds the number that matters.

  Args:
    iterable: what to go through, or None to call `.update(n)`.
    total: how many units there are, `initial` of them done before.
    desc: the stage.
    unit: such as 'tokens'.
    scale: units an item stands for, such as the tokens of a batch.
  """
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    iterable,
    desc,
    total,
    unit=f' {unit}',
    initial=initial,
    unit_scale=scale if scale != 1 else True,
    mininterval=0.2 if terminal else 10,  # a log file wants a line now and then
    file=sys.stderr if terminal else _Lines(),
    disable=jax.process_index() > 0,  # one bar for all
  )


class MetricsLog:
  """A file of JSON lines, a training step each; opened at the step that training starts from or resumes at."""

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the file for the steps after `step`; later ones, of a run that got further than its checkpoint, go."""
    lines = path.read_text('utf-8').splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
    self.before = [json.loads(line) for line in kept]  # what runs that this one goes on from have written
    self._path = path if jax.process_index() == 0 else None  # one log for all
    if self._path:
      write(path, ''.join(kept).encode())

  def write(self, numbers: Mapping[str, float]):
    """Appends a line; `numbers` holds the step."""
    if not self._path:
      return
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
  if folder.is_dir() and {path.name for path in folder.iterdir()} - _OF_NOTHING_YET:
    _check_settings(folder, settings)
  else:  # what is not there, or holds nothing yet, may be made with any settings
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / 'config.json', json.dumps(_plain(settings), indent=2).encode())
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
  write(folder / 'DONE', b'')


def write(path: pathlib.Path, content: bytes):
  """Writes a file that is there whole or, after a kill, as it was before."""
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
  """Loads the subject model, in config.model.dtype or float32, and its tokenizer onto the ambient mesh.

  Raises:
    ValueError: there is no such dtype, or the tokenizer has more tokens than the model; and as `models.pretrained`.
  """
  source = subject_source(config, workdir)
  dtype = config.model.get('dtype', 'float32')
  if dtype not in pretrained.DTYPES:
    raise ValueError(f'model.dtype {dtype!r} is unknown; choose one of {", ".join(pretrained.DTYPES)}')
  tokenizer = pretrained.load_tokenizer(source)
  model = pretrained.load_model(source, dtype)
  if len(tokenizer) > model.config.n_vocab:
    raise ValueError(
      f'the tokenizer of {source} has {len(tokenizer)} tokens, the model only {model.config.n_vocab}; give the '
      'tokenizer that the model came with'
    )
  return Subject(model, tokenizer, source, pretrained.fingerprint(source))


def made_from(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """Returns what every stage depends on: the subject model, by a hash of its weights too, and the text."""
  fingerprint = pretrained.fingerprint(subject_source(config, workdir))
  return {'model': config.model, 'fingerprint': fingerprint, 'text': config.text}
