"""Matrix products of several axes, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import layers

KERNELS = {'qkv': ((6, 3, 4, 2), 1, 'btd,dxhc->btxhc'), 'heads': ((4, 2, 6), 2, 'bthc,hcd->btd')}


@pytest.mark.parametrize('name', list(KERNELS))
def test_a_linear_map_and_what_reads_a_direction_of_its_output(mesh, name):
  shape, n_in, subscripts = KERNELS[name]
  cut = [('model' if size == 4 else None) for size in shape]
  linear = layers.Linear(nnx.Rngs(0), shape, n_in=n_in, std=1.0, out_sharding=tuple(cut))
  rng = np.random.default_rng(0)
  linear.bias[...] = jnp.asarray(rng.normal(size=shape[n_in:]), jnp.float32)
  kernel = np.asarray(linear.kernel[...], np.float64)
  x, y = (rng.normal(size=(2, 3, *axes)).astype(np.float32) for axes in (shape[:n_in], shape[n_in:]))
  expected = np.tensordot(x, kernel, n_in) + np.asarray(linear.bias[...], np.float64)
  np.testing.assert_allclose(linear(subscripts, x), expected, atol=1e-5)
  axes = tuple(range(-len(shape) + n_in, 0))
  np.testing.assert_allclose(linear.read(y), np.tensordot(y, kernel, (axes, axes)), atol=1e-5)
