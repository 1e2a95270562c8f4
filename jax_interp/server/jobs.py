"""Jobs -> their results, one after the other on one thread, with a bounded queue, progress, a time limit, cancellation.

One thread, because JAX's ambient mesh belongs to a thread, and because two computations at once would each be slower.
"""

import concurrent.futures
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

Progress = Callable[[float, str], None]  # the share that is done, from 0 to 1, and what is being done


class Full(Exception):
  """As many jobs wait as may."""


class Stopping(Exception):
  """The worker takes no more jobs."""


class Cancelled(Exception):
  """Raised by a job's progress when nobody waits for it any more."""


@dataclasses.dataclass(eq=False)
class Job:
  """A computation that waits, runs, or has ended.

  Attributes:
    future: of its result.
    fraction: the share that is done, from 0 to 1, as far as it has said.
    what: what it is doing, in its own words.
    started: when it began to run, by time.monotonic; None while it waits.
  """

  id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  future: concurrent.futures.Future | None = None
  fraction: float = 0.0
  what: str = ''
  started: float | None = None
  _cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)

  def cancel(self):
    """Takes it out of the queue or, where it runs, ends it when it next tells its progress."""
    self._cancelled.set()
    self.future.cancel()

  def runs_longer_than(self, seconds: float) -> bool:
    return self.started is not None and time.monotonic() - self.started > seconds

  def progress(self, fraction: float, what: str):
    """Notes how far it is. Raises `Cancelled`."""
    self.fraction, self.what = fraction, what
    if self._cancelled.is_set():
      raise Cancelled

  def run(self, function: Callable[[Progress], Any]):
    self.started = time.monotonic()
    self.progress(0.0, '')
    return function(self.progress)


class Worker:
  """A thread that runs jobs in the order in which they came. A job that fails leaves it as it was."""

  def __init__(self, n_waiting: int, seconds: float, prepare: Callable[[], None] = lambda: None):
    """Makes the thread.

    Args:
      n_waiting: how many jobs may wait behind the one that runs.
      seconds: how long a job may run before those who wait for it give up; waiting does not count.
      prepare: called on the thread, before the first job.
    """
    self.n_waiting, self.seconds = n_waiting, seconds
    self._pool = concurrent.futures.ThreadPoolExecutor(1, initializer=prepare)
    self._jobs = []  # the running one and those that wait, in order
    self._lock = threading.RLock()
    self._stopping = False

  @property
  def stopping(self) -> bool:
    return self._stopping

  def submit(self, function: Callable[[Progress], Any]) -> Job:
    """Puts a job behind the others.

    Raises:
      Full: as many wait as may.
      Stopping: it takes no more.
    """
    with self._lock:
      if self._stopping:
        raise Stopping
      if len(self._jobs) > self.n_waiting:
        raise Full
      job = Job()
      self._jobs.append(job)
      job.future = self._pool.submit(job.run, function)
    job.future.add_done_callback(lambda _: self._remove(job))
    return job

  def _remove(self, job):
    with self._lock:
      self._jobs.remove(job)

  def position(self, job: Job) -> int:
    """Returns how many jobs are before this one, the running one included; 0 if it runs or has ended."""
    with self._lock:
      return self._jobs.index(job) if job in self._jobs else 0

  def stop(self, wait: float = 0) -> bool:
    """Takes no more jobs, drops those that wait, and asks the running one to end; returns whether it has.

    Args:
      wait: seconds for it to end.
    """
    with self._lock:
      self._stopping = True
      jobs = list(self._jobs)
    for job in jobs:
      job.cancel()
    self._pool.shutdown(wait=False)
    return not concurrent.futures.wait([job.future for job in jobs], timeout=wait).not_done
