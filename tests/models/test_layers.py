"""Matrix products of several axes, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import layers, products, sharding, sites
from tests.models import families

KERNELS = {'qkv': ((6, 3, 4, 2), 1, 'btd,dxhc->btxhc'), 'heads': ((4, 2, 6), 2, 'bthc,hcd->btd')}


@pytest.mark.parametrize('lead', [(2, 3), (3, products.FEW_ROWS)], ids=['few', 'many'])
@pytest.mark.parametrize('name', list(KERNELS))
def test_a_linear_map_and_what_reads_a_direction_of_its_output(mesh, name, lead):
  shape, n_in, subscripts = KERNELS[name]
  cut = [('model' if size == 4 else None) for size in shape]
  linear = layers.Linear(nnx.Rngs(0), shape, n_in=n_in, std=1.0, out_sharding=tuple(cut))
  rng = np.random.default_rng(0)
  linear.bias[...] = jnp.asarray(rng.normal(size=shape[n_in:]), jnp.float32)
  kernel = np.asarray(linear.kernel[...], np.float64)
  x, y = (rng.normal(size=(*lead, *axes)).astype(np.float32) for axes in (shape[:n_in], shape[n_in:]))
  expected = np.tensordot(x, kernel, n_in) + np.asarray(linear.bias[...], np.float64)
  np.testing.assert_allclose(linear(subscripts, x), expected, atol=1e-5)
  axes = tuple(range(-len(shape) + n_in, 0))
  read = np.tensordot(y, kernel, (axes, axes))
  np.testing.assert_allclose(linear.read(y), read, atol=1e-5)
  product = lambda x: linear(subscripts, x)
  changed = rng.normal(size=x.shape).astype(np.float32)
  np.testing.assert_allclose(jax.jit(lambda x: jax.vjp(product, x)[1](y)[0])(x), read, atol=1e-5)
  np.testing.assert_allclose(jax.jvp(product, (x,), (changed,))[1], np.tensordot(changed, kernel, n_in), atol=1e-5)
  np.testing.assert_allclose(jax.vmap(product)(x[:, None])[:, 0], expected, atol=1e-5)


def test_few_rows_of_bfloat16_and_their_gradient(mesh):
  linear = layers.Linear(nnx.Rngs(0), (64, 96), n_in=1, std=1.0)  # large enough that XLA calls a library
  linear = jax.tree.map(lambda x: x.astype(jnp.bfloat16), linear)
  rng, kernel = np.random.default_rng(0), np.asarray(linear.kernel[...], np.float64)
  x, y = (jnp.asarray(rng.normal(size=(1, products.FEW_ROWS, n)), jnp.bfloat16) for n in kernel.shape)
  product = lambda x: linear('btd,dn->btn', x)
  found = jax.jit(product)(x), jax.jit(lambda x, y: jax.vjp(product, x)[1](y)[0])(x, y)
  expected = np.asarray(x, np.float64) @ kernel, np.asarray(y, np.float64) @ kernel.T
  for got, exact in zip(found, expected, strict=True):
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8, atol=1e-5)  # rounded once


@pytest.mark.parametrize('name', ['odd_gpt2', 'llama'])
def test_a_model_with_kernels_a_second_time_is_the_same_model(name):
  tokens_bt = np.arange(9)[None]

  def run(model):
    objective = lambda logits_btv, _: logits_btv[0, -1, 3] - logits_btv[0, -1, 5]
    return sites.acts_and_grads(model, tokens_bt, objective, ('h.*.mlp.post_act', 'h.*.attn.v_out', 'resid.post_emb'))

  with jax.set_mesh(sharding.make_mesh()):
    model = families.build(name)
    quick = layers.with_transposed(model)
    # Their products are those of the second kernels.
    broken = jax.tree.map_with_path(lambda path, x: x * ('transposed' not in str(path)), quick)
    found, expected = run(quick), run(model)
    assert np.abs(sites.forward(broken, tokens_bt)[0] - sites.forward(model, tokens_bt)[0]).max() > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  assert model.h[0].mlp.c_fc.transposed is None
