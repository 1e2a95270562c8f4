"""Eight pretend CPU devices, and the meshes that tests run on."""

import gc
import os
import shutil
import tempfile

# Most of the time is compiling small programs, which is several times as fast without LLVM's optimisations, without
# XLA's emitters of fusions, and in one piece. (XLA ends at a flag it does not know; jaxlib 0.10 and 0.11 know these.)
os.environ['XLA_FLAGS'] = ' '.join([
  os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
  '--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1',
])  # fmt: skip
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What a module, or a command that a test starts, has compiled, others read, in all processes of a run.
os.environ['JAX_COMPILATION_CACHE_DIR'] = (
  os.environ['JAX_COMPILATION_CACHE_DIR']
  if 'PYTEST_XDIST_WORKER' in os.environ
  else tempfile.mkdtemp(prefix='compiled_')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax
import pytest

from models import sharding


def pytest_unconfigure():
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


@pytest.fixture(params=[(1, 1), (2, 2)], ids=['1x1', '2x2'])
def mesh(request):
  """The test runs on one device and on a 2x2 mesh; the mesh is ambient."""
  mesh = sharding.make_mesh(*request.param)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def usual_programs(monkeypatch):
  """What is compiled to be read is what XLA makes where its emitters are not left out: scatters, for one, stay."""
  compiled = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, 'compile', lambda lowered: compiled(lowered, {'xla_cpu_use_fusion_emitters': True})
  )


@pytest.fixture(scope='module', autouse=True)
def _compiled_programs_end_with_their_module():
  """Frees what a module compiled: a program takes memory maps, and Linux gives a process some 65,000."""
  yield
  jax.clear_caches()
  gc.collect()
