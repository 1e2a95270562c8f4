import httpx
import pytest

from jax_interp.server import jobs
from tests.server import stubs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A workdir with records and explanations."""
  folder = tmp_path_factory.mktemp('run')
  stubs.write_records(folder)
  return folder


@pytest.fixture(scope='module')
def worker():
  worker = jobs.Worker(stubs.LIMITS.waiting, stubs.LIMITS.seconds)
  yield worker
  worker.stop()


@pytest.fixture(scope='module')
def url(folder, worker):
  with stubs.running(stubs.create(folder, worker)) as url:
    yield url


@pytest.fixture(scope='module')
def client(url):
  with httpx.Client(base_url=url, timeout=30) as client:
    yield client
