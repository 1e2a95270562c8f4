"""Several processes that run one command: they decide together, so that all go on or all stop, and say why.

Every function here but `locked` and `answer` is called by all processes, in the same order; with one process each is
what it says, and costs nothing. `command.main` joins the processes.
"""

import collections
import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jax_interp import activations
from models import sharding
from train import command

PROBLEMS = (command.Stopped, ValueError, KeyError, OSError, ImportError)  # what a command says in one sentence
_MESSAGE = 2048  # bytes of a sentence that reach the other processes


def _gathered(value):
  """Returns what every process gives, [process, ...].

  It is a program on all devices, and a live reader dispatches others from its thread: see `activations.DISPATCHING`.
  """
  with activations.DISPATCHING:
    return multihost_utils.process_allgather(value)


def _broadcast(value):
  """Returns what process 0 gives; as `_gathered`."""
  with activations.DISPATCHING:
    return multihost_utils.broadcast_one_to_all(value)


def agree(problem: Exception | None = None):
  """Returns if no process has a problem; else each that has one raises it, and the others raise whose it was.

  Args:
    problem: one of PROBLEMS, or None.
  """
  said = [None, '']
  if problem:
    kind = next(i for i, kind in enumerate(PROBLEMS) if isinstance(problem, kind))
    said = [kind, command.sentence(problem)]
  found = [_decoded(row) for row in _gathered(_encoded(said, _MESSAGE))]
  if problem:
    raise problem
  troubled = [(kind, f'process {i}: {text}') for i, (kind, text) in enumerate(found) if kind is not None]
  for kind, text in sorted(troubled, reverse=True):  # that one was asked to stop is the least of them
    raise PROBLEMS[kind](text)


def any_of(flag: bool) -> bool:
  """Returns whether the flag is set in any process."""
  return bool(_gathered(np.bool_(flag)).any())


def part() -> tuple[int, int]:
  """Returns which of how many equal parts of a batch is this process's: rows are cut over all devices of the mesh.

  Where the mesh has the devices in another order than that of their processes, so has it the parts.

  Raises:
    ValueError: the processes do not hold as many devices of the ambient mesh each.
  """
  devices, n_processes = jax.sharding.get_mesh().devices, jax.process_count()
  n_held = collections.Counter(device.process_index for device in devices.flat)
  if [n_held[p] for p in range(n_processes)] != [devices.size / n_processes] * n_processes:
    raise ValueError(
      f'a mesh of {"x".join(map(str, devices.shape))} does not give each of {n_processes} processes as many devices; '
      'choose mesh.data x mesh.model as all devices'
    )
  return jax.process_index(), n_processes


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs a block in every process, and then raises in all if it raised in one; see `agree`."""
  problem = None
  try:
    yield
  except PROBLEMS as e:
    problem = e
  agree(problem)


def on_first(function: Callable[[], Any]) -> Any:
  """Returns what the function returns in process 0, where alone it runs, to all: a value that JSON holds."""
  value = None
  with together():
    if jax.process_index() == 0:
      value = function()
  content = json.dumps(value).encode()
  size = int(_broadcast(np.int32(len(content))))
  row = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    row[:] = np.frombuffer(content, np.uint8)
  return _decoded(_broadcast(row))


def check_same(what: str, digest: str):
  """Raises unless all processes give the same text, such as a hash of their settings.

  Raises:
    ValueError: process 0 gives another.
  """
  with together():
    rows = _gathered(_encoded(digest, _MESSAGE))
    if other := [i for i, row in enumerate(rows) if _decoded(row) != _decoded(rows[0])]:
      raise ValueError(f'process {other[0]} has another {what} than process 0; start all with the same')


def _encoded(value, size):
  row = np.zeros(size, np.uint8)
  content = json.dumps(value).encode()
  while len(content) > size:  # a message, too long
    value = [value[0], value[1][: len(value[1]) // 2]]
    content = json.dumps(value).encode()
  row[: len(content)] = np.frombuffer(content, np.uint8)
  return row


def _decoded(row):
  return json.loads(bytes(row).rstrip(b'\0'))


@jax.jit
def _any(flags_d):
  return jax.lax.with_sharding_constraint(flags_d.any(), jax.sharding.PartitionSpec())


def ask(problem: Exception | None) -> jax.Array:
  """Asks, without waiting, whether any process has a problem; `answer` waits for what was asked.

  To be called once a step on the mesh whose data axis is cut over the processes, after the answer of the step before:
  the question then waits behind one step's work on the device, and all processes get the same answer at the same step.
  """
  mesh = jax.sharding.get_mesh()
  n_local = mesh.shape['data'] // jax.process_count()
  flags = np.full(n_local, problem is not None)
  return _any(
    jax.make_array_from_process_local_data(NamedSharding(mesh, sharding.spec('batch')), flags, (mesh.shape['data'],))
  )


def answer(question: jax.Array) -> bool:
  """Returns whether any process had a problem when asked."""
  return bool(question)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the file `lock` of a folder, which it makes; the system lets go when the process ends, however it ends.

  Raises:
    ValueError: another process of this machine holds it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(f'another command is writing {folder} now; wait for it, or stop it') from e
    yield
