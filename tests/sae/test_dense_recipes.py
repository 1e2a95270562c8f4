"""ReLU, ProLU, gated and JumpReLU: losses and gradients are the papers' formulas in float64, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae.gated import Gated
from jax_interp.sae.jumprelu import JumpReLU
from jax_interp.sae.prolu import ProLU
from jax_interp.sae.relu_l1 import ReLUL1
from models import sae, sharding

B, D, D_OUT, L = 16, 12, 10, 64
MESHES = [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]
COEF, MSE_SCALE, DEAD, STEP, WARMUP = 0.7, 1 / 3.7, 1000, 3, 12
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, size=(B, D)).astype(np.float32)
TARGETS = RNG.normal(1, 2, size=(B, D_OUT)).astype(np.float32)
ARRAYS = {
  'encoder': RNG.normal(size=(L, D)),
  'decoder': RNG.normal(size=(L, D)),
  'pre_bias': RNG.normal(size=D),
  'latent_bias': RNG.normal(size=L),
}
OWN = {
  'relu': {},
  'prolu': {},
  'gated': {'r_mag': RNG.normal(size=L) / 2, 'mag_bias': RNG.normal(size=L)},
  'jumprelu': {'threshold': RNG.uniform(-0.1, 2, size=L)},  # of which some are below 0
}
BANDWIDTH = 1.5  # wide, so that many pre-activations are near their thresholds


def bias_like(x, slope_by):
  """A value x whose derivatives are those of sum of slope * parameter."""
  return jax.lax.stop_gradient(x) + sum(jax.lax.stop_gradient(s) * (p - jax.lax.stop_gradient(p)) for s, p in slope_by)


def constant(p, x):
  return p['out_bias'] + (x - p['pre_bias']) @ p['skip'].T if 'skip' in p else p['pre_bias']


def relu(p, x, weighted):
  latents = jnp.maximum((x - p['pre_bias']) @ p['encoder'].T + p['latent_bias'], 0)
  sizes = latents * jnp.sqrt((p['decoder'] ** 2).sum(1)) if weighted else latents
  return latents, lambda mse: mse + COEF * (STEP / WARMUP if weighted else 1) * sizes.sum(1).mean()


def prolu(p, x, gradient):
  m, b = (x - p['pre_bias']) @ p['encoder'].T, p['latent_bias']
  on = (m > 0) & (m + b > 0)
  slopes = (on, on) if gradient == 'relu' else (on * (1 + m), on * m)
  latents = bias_like(on * m, zip(slopes, (m, jnp.broadcast_to(b, m.shape)), strict=True))
  return latents, lambda mse: mse + COEF * latents.sum(1).mean()


def gated(p, x, y):
  m = (x - p['pre_bias']) @ p['encoder'].T
  gate = m + p['latent_bias']
  latents = (gate > 0) * jnp.maximum(jnp.exp(p['r_mag']) * m + p['mag_bias'], 0)
  held = jax.lax.stop_gradient(p)
  through_gate = jnp.maximum(gate, 0) @ held['decoder'] + constant(held, x)
  auxiliary = ((y - through_gate) ** 2).sum(1).mean()
  return latents, lambda mse: mse + COEF * jnp.maximum(gate, 0).sum(1).mean() + auxiliary


def jumprelu(p, x, sparsity):
  z = (x - p['pre_bias']) @ p['encoder'].T + p['latent_bias']
  theta = bias_like(jnp.maximum(p['threshold'], 0), [(jnp.ones(L), p['threshold'])])  # below 0 as at 0
  near = (jnp.abs(z - theta) < BANDWIDTH / 2).astype(z.dtype)
  thetas = jnp.broadcast_to(theta, z.shape)
  latents = bias_like(z * (z > theta), [(z > theta, z), (-theta / BANDWIDTH * near, thetas)])
  l0 = bias_like(z > theta, [(-near / BANDWIDTH, thetas)]).sum(1).mean()
  norms = jnp.sqrt((p['decoder'] ** 2).sum(1))
  warm = STEP / WARMUP
  penalty = {
    'l0': lambda: COEF * warm * l0,
    'target': lambda: COEF * warm * (l0 / 7 - 1) ** 2,
    'tanh': lambda: (
      COEF * warm * jnp.tanh(4 * norms * latents).sum(1).mean()
      + 0.5 * (jnp.maximum(theta - z, 0) * norms).sum(1).mean()
    ),
  }[sparsity]
  return latents, lambda mse: mse + penalty()


CASES = {
  'relu': ('relu', ReLUL1(COEF, dead_tokens=DEAD), lambda p, x, y: relu(p, x, False)),
  'relu_weighted': ('relu', ReLUL1(COEF, True, WARMUP, DEAD), lambda p, x, y: relu(p, x, True)),
  'prolu': ('prolu', ProLU(COEF, 'relu', DEAD), lambda p, x, y: prolu(p, x, 'relu')),
  'prolu_ste': ('prolu', ProLU(COEF, 'ste', DEAD), lambda p, x, y: prolu(p, x, 'ste')),
  'gated': ('gated', Gated(COEF, DEAD), gated),
} | {
  f'jumprelu_{kind}': (
    'jumprelu',
    JumpReLU(COEF, kind, BANDWIDTH, WARMUP, target_l0=7 * (kind == 'target'), preact_coef=0.5, dead_tokens=DEAD),
    lambda p, x, y, kind=kind: jumprelu(p, x, kind),
  )
  for kind in ('l0', 'target', 'tanh')
}


def ours(mesh, recipe, arrays, kind, clock, targets=X):
  with jax.set_mesh(sharding.make_mesh(*mesh)):
    model = sae.build({name: x.astype(np.float32) for name, x in arrays.items()}, {'activation': kind})
    metrics, clock, grads = jax.jit(recipe.loss_and_grads)(model, X, targets, clock, MSE_SCALE, STEP)
    return metrics, np.asarray(clock), {n: np.asarray(g[...]) for n, g in sae.named_parameters(grads).items()}


@functools.cache
def example(case, transcoder, mesh):
  """Returns the arrays, the targets, and what `ours` makes of them."""
  kind, recipe, _ = CASES[case]
  arrays, targets = ARRAYS | OWN[kind], X
  if transcoder:
    rng = np.random.default_rng(1)
    arrays = arrays | {'decoder': rng.normal(size=(L, D_OUT)), 'out_bias': rng.normal(size=D_OUT)}
    arrays |= {'skip': rng.normal(size=(D_OUT, D))}
    targets = TARGETS
  return arrays, targets, ours(mesh, recipe, arrays, kind, np.full(L, DEAD, np.int32), targets)


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('transcoder', [False, True], ids=['sae', 'transcoder'])
def test_losses_and_gradients_are_the_formulas_in_float64(shape, case, transcoder):
  formula = CASES[case][2]
  arrays, targets, (metrics, new_clock, grads) = example(case, transcoder, shape)
  with jax.enable_x64(True):
    params = {name: jnp.asarray(x.astype(np.float32), jnp.float64) for name, x in arrays.items()}

    def loss(p):
      x, y = jnp.asarray(X, jnp.float64), jnp.asarray(targets, jnp.float64)
      latents, whole = formula(p, x, y)
      error = latents @ p['decoder'] + constant(p, x) - y
      return whole((error**2).sum(1).mean()), (latents, (error**2).mean())

    (total, (latents, mse)), expected = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)
  np.testing.assert_allclose(metrics['normalized_mse'], MSE_SCALE * mse, rtol=1e-6)
  np.testing.assert_allclose(metrics['l0'], (latents > 0).sum(1).mean(), rtol=1e-6)
  assert grads.keys() == expected.keys()
  for name, grad in grads.items():
    # A few float32 roundings of the largest entry: entries are sums over the batch.
    np.testing.assert_allclose(grad, expected[name], atol=3e-6 * np.abs(expected[name]).max(), err_msg=name)
  _, _, (one, _, one_grads) = example(case, transcoder, (1, 1))
  np.testing.assert_allclose(metrics['loss'], one['loss'], rtol=1e-6)
  for name, grad in one_grads.items():
    assert np.linalg.norm(grads[name] - grad) <= 1e-6 * np.linalg.norm(grad), name
  fired = np.asarray((latents > 0).any(0))
  np.testing.assert_array_equal(new_clock, np.where(fired, 0, DEAD + B))
  assert metrics['dead'] == (~fired).sum()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ProLU(1, 'tanh'), "gradient 'tanh' of ProLU is unknown; choose one of relu, ste"),
    (lambda: JumpReLU(1, 'l1'), "sparsity 'l1' of JumpReLU is unknown; choose one of l0, target, tanh"),
    (lambda: JumpReLU(1, 'target'), 'target_l0 0 .* is not above 0'),
    (lambda: JumpReLU(1, target_l0=9), "target_l0 9 means nothing to sparsity 'l0'; set it to 0"),
  ],
)
def test_unknown_options_raise(make, message):
  with pytest.raises(ValueError, match=message):
    make()
