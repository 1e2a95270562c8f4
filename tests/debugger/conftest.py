"""The mesh of the debugger's tests, which those of other meshes replace."""

import jax
import pytest

from models import sharding


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    yield
