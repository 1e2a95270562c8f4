"""How fast the devices of the mesh could multiply matrices: what MFU, model FLOP utilisation, is measured against."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Dense FLOP/s of one device by `device_kind`: bfloat16, and float32 as JAX multiplies it by default (TensorFloat-32 on
# GPUs; one pass in bfloat16 on TPUs). From the vendors' data sheets: NVIDIA A100, H100 (SXM), H200 and HGX B200 (whose
# figures with sparsity are halved here); Google Cloud's pages of TPU v4, v5e, v5p and v6e.
PEAKS = {
  'NVIDIA A100-SXM4-40GB': (312e12, 156e12),
  'NVIDIA A100-SXM4-80GB': (312e12, 156e12),
  'NVIDIA H100 80GB HBM3': (989.4e12, 494.7e12),
  'NVIDIA H200': (989.4e12, 494.7e12),
  'NVIDIA B200': (2250e12, 1125e12),
  'TPU v4': (275e12, 275e12),
  'TPU v5 lite': (197e12, 197e12),
  'TPU v5': (459e12, 459e12),
  'TPU v5p': (459e12, 459e12),
  'TPU v6 lite': (918e12, 918e12),
  'TPU v6e': (918e12, 918e12),
}
_SIZE, _REPEATS = 2048, 4  # of the matrices that are multiplied where no figure is known, and how often


@jax.jit
def _products(x_ij):
  return jnp.einsum('pij,pjk->pik', x_ij, x_ij)


def peak(dtype: str) -> tuple[float, str]:
  """Returns the FLOP/s of all devices of the ambient mesh, and whether they are 'vendor' or 'measured' figures.

  Measured is the best of a few products of square matrices, one on every device at once, so that pretend devices which
  share a processor do not count twice.

  Args:
    dtype: of the weights, 'bfloat16' or 'float32'.
  """
  mesh = jax.sharding.get_mesh()
  kind = mesh.devices.flat[0].device_kind
  if kind in PEAKS:
    return PEAKS[kind][dtype != 'bfloat16'] * mesh.size, 'vendor'
  shape = mesh.size, _SIZE, _SIZE
  by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  x = jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=by_device)()
  _products(x).block_until_ready()
  best = min(_seconds(x) for _ in range(_REPEATS))
  return 2 * mesh.size * _SIZE**3 / best, 'measured'


def _seconds(x) -> float:
  began = time.perf_counter()
  _products(x).block_until_ready()
  return time.perf_counter() - began
