"""What every command shares: flags, the mesh, one clear sentence for bad input, stopping, progress, and stage folders.

A stage is `run(config, workdir)`: it takes what the stage before left under the workdir and leaves its own folder
there, with the settings it was made with (config.json) and, once whole, an empty file DONE.
"""

import dataclasses
import errno
import hashlib
import io
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
import numpy as np
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from jax_interp import text
from models import pretrained, sharding

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; --config.sae.k=16 overrides a field.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/tiny', 'Where artefacts are read and left.')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where an error was raised, not only what it says.')

TRAINED = 'trained'
_stop = threading.Event()


class Stopped(Exception):
  """A command was asked to stop, saved its work and says how to go on."""


def stopping() -> bool:
  """Returns whether SIGTERM or SIGINT has arrived; long loops ask between units of work, save, and raise `Stopped`."""
  return _stop.is_set()


def main(run: Callable[[ml_collections.ConfigDict, pathlib.Path], None]):
  """Runs a stage as a command: exits 0 when done or stopped with its work saved, 1 on bad input, which it names."""
  app.run(lambda argv: sys.exit(_main(run, argv)), flags_parser=_parse_flags)


def _parse_flags(argv):
  logging.set_verbosity(logging.FATAL)  # ml_collections logs what it then raises
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is None:
      raise ValueError('no config; give --config=configs/tiny.py or another file of configs/')
  except (AttributeError, KeyError) as e:
    sys.exit(f'error: unknown config field {_sentence(e)}')
  except (flags.Error, TypeError, ValueError, OSError) as e:
    sys.exit(f'error: {_sentence(e)}')
  logging.set_verbosity(logging.WARNING)
  return rest


def _main(run, argv) -> int:
  if len(argv) > 1:
    print(
      f'error: unexpected arguments {argv[1:]}; flags are --config, --config.FIELD=VALUE and --workdir', file=sys.stderr
    )
    return 1
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _ask_to_stop)
  config = _CONFIG.value
  try:
    jax.set_mesh(sharding.make_mesh(**config.mesh))
    run(config, pathlib.Path(_WORKDIR.value))
  except Stopped as e:
    print(f'stopped: {e}', file=sys.stderr)
  except (ValueError, KeyError, OSError) as e:
    if _TRACEBACK.value:
      traceback.print_exc()
    print(f'error: {_sentence(e)}', file=sys.stderr)
    return 1
  return 0


def _ask_to_stop(number, frame):
  _stop.set()
  signal.signal(number, signal.SIG_DFL)  # asked twice, it ends at once


def _sentence(e: Exception) -> str:
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
  if folder.is_dir() and {path.name for path in folder.iterdir()} - {'config.json', 'config.json.partial'}:
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
  """Loads the subject model and its tokenizer onto the ambient mesh."""
  source = subject_source(config, workdir)
  return Subject(
    pretrained.load_model(source), pretrained.load_tokenizer(source), source, pretrained.fingerprint(source)
  )


def made_from(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """Returns what every stage depends on: the subject model, by a hash of its weights too, and the text."""
  fingerprint = pretrained.fingerprint(subject_source(config, workdir))
  return {'model': config.model, 'fingerprint': fingerprint, 'text': config.text}


def windows(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, tokenizer, split: str, n_tokens: int | None = None
) -> np.ndarray:
  """Returns int32 [example, token] of a split, memory-mapped from workdir/text, where the first call writes it.

  A file's name holds a hash of everything it depends on but the text itself: the text is read once a workdir, so
  that all stages see the same, whatever is installed later.

  Args:
    config: reads config.text.source and config.text.window.
    workdir: where text/ is.
    tokenizer: of the subject model.
    split: 'train' or 'held_out'.
    n_tokens: the length of a window, config.text.window by default.
  """
  n_tokens = n_tokens or config.text.window
  vocab = json.dumps(sorted(tokenizer.get_vocab().items()))
  key = hashlib.sha256(f'{config.text.source}|{n_tokens}|{vocab}'.encode()).hexdigest()[:12]
  paths = {name: workdir / 'text' / f'{name}_{n_tokens}_{key}.npy' for name in text.SPLITS}
  if not all(path.exists() for path in paths.values()):
    print(f'reading the text {config.text.source!r}')
    for name, documents in text.documents(config.text.source).items():
      content = io.BytesIO()
      np.save(content, text.windows(documents, tokenizer, n_tokens))
      paths[name].parent.mkdir(parents=True, exist_ok=True)
      _write(paths[name], content.getbuffer())
  return np.load(paths[split], mmap_mode='r')
