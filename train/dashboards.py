"""Metrics where people watch them, beside metrics.jsonl: TensorBoard or Weights & Biases, each an extra to install.

Takes where to, a folder and a name; gives a function of (step, numbers). Both are imported only when asked for.
"""

import contextlib
import hashlib
import importlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

MODULES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}
PROJECT = 'jax-interp'  # at Weights & Biases, unless WANDB_PROJECT names another


@contextlib.contextmanager
def writer(
  log_to: str, folder: pathlib.Path, name: str, settings: Mapping, step: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Opens a dashboard's run, or goes on with it; yields what writes the numbers of a step to it.

  Args:
    log_to: '' for none, 'tensorboard' or 'wandb'.
    folder: where event files, or Weights & Biases' own, are left; it also identifies the run that goes on.
    name: shown.
    settings: shown beside the run.
    step: the one that training starts from or resumes at. What TensorBoard has of later ones is forgotten; Weights &
      Biases keeps it, the same numbers, but for those of time.

  Raises:
    ValueError: log_to is unknown.
    ImportError: what it needs is not installed.
  """
  if log_to and log_to not in MODULES:
    raise ValueError(f'sae.log_to {log_to!r} is unknown; choose one of {", ".join(MODULES)}, or leave it empty')
  module = _module(log_to) if log_to else None
  if not log_to:
    yield lambda step, numbers: None
  elif log_to == 'tensorboard':
    events = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(step, numbers):
      for metric, value in numbers.items():
        events.add_scalar(metric, value, step)
      events.flush()  # a run that is killed has shown what it logged

    with contextlib.closing(events):
      yield write
  else:
    folder.mkdir(parents=True, exist_ok=True)
    run = module.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=name,
      id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
      resume='allow',
      reinit='create_new',  # a sweep has a run for each SAE
      dir=str(folder),
      config=dict(settings),
    )
    try:
      yield lambda step, numbers: run.log(dict(numbers), step=step)
    finally:
      run.finish()


def _module(log_to):
  try:
    return importlib.import_module(MODULES[log_to])
  except ModuleNotFoundError as e:
    raise ImportError(
      f"sae.log_to {log_to!r} needs {MODULES[log_to]}, which is not installed; pip install 'jax-interp[{log_to}]', or "
      'leave it empty'
    ) from e
