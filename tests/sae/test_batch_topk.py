"""BatchTopK and its Matryoshka prefixes: the formulas in float64 on every mesh, and a threshold after training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import batch_topk, optimizer, train_step
from models import sae, sharding

B, D, L, K = 16, 12, 64, 3
MESHES = [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]
MSE_SCALE, DEAD, AUXK, AUXK_COEF = 1 / 3.7, 1000, 4, 0.5
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, size=(B, D)).astype(np.float32)
ARRAYS = {
  'encoder': RNG.normal(size=(L, D)),
  'decoder': RNG.normal(size=(L, D)),
  'pre_bias': RNG.normal(size=D),
  'latent_bias': RNG.normal(size=L),
}
PREFIXES = (5, 24, 64)  # no shard ends at the first two
SILENT = [2, 17, 40, 41, 50, 63]
ARRAYS['encoder'][SILENT] /= 50  # some are positive on every token, none among the largest
ARRAYS['latent_bias'][SILENT] = 0.1


def formula(p, x, prefixes, dead):
  preacts = (x - p['pre_bias']) @ p['encoder'].T + p['latent_bias']
  flat = jax.lax.stop_gradient(preacts).reshape(-1)
  mask = (preacts >= jnp.sort(flat)[-K * B]).astype(preacts.dtype)
  latents = mask * jnp.maximum(preacts, 0)
  mse = 0
  for m in prefixes:
    recons = latents[:, :m] @ p['decoder'][:m] + p['pre_bias']
    mse += MSE_SCALE * ((recons - x) ** 2).mean() / len(prefixes)
  bias = jax.lax.stop_gradient(p['pre_bias'])
  target = x - jax.lax.stop_gradient(recons) + bias
  among_dead = jnp.where(dead, jnp.maximum(preacts, 0), 0)
  kept = among_dead * (among_dead >= jnp.sort(among_dead, axis=1)[:, -AUXK, None])
  error = kept @ p['decoder'] + p['pre_bias'] - target
  auxk = (error**2).mean() / ((target - target.mean(0)) ** 2).mean() if dead.any() else 0
  return mse + AUXK_COEF * auxk, (latents, mse)


def example():
  return sae.build({name: x.astype(np.float32) for name, x in ARRAYS.items()}, {'activation': 'topk', 'k': K})


@functools.cache
def measured(shape, prefixes, with_dead):
  recipe = batch_topk.BatchTopK(K, AUXK, AUXK_COEF, DEAD, prefixes)
  clock = np.zeros(L, np.int32)
  clock[SILENT] = DEAD * with_dead
  with jax.set_mesh(sharding.make_mesh(*shape)):
    metrics, _, grads = jax.jit(recipe.loss_and_grads)(example(), X, X, clock, MSE_SCALE, 0)
    return metrics, {name: np.asarray(param[...]) for name, param in sae.named_parameters(grads).items()}


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('prefixes', [(), PREFIXES], ids=['batch_topk', 'matryoshka'])
@pytest.mark.parametrize('with_dead', [False, True], ids=['alive', 'dead'])
def test_losses_and_gradients_are_the_formula_in_float64(shape, prefixes, with_dead):
  metrics, grads = measured(shape, prefixes, with_dead)
  with jax.enable_x64(True):
    params = {name: jnp.asarray(x.astype(np.float32), jnp.float64) for name, x in ARRAYS.items()}
    dead = np.isin(np.arange(L), SILENT) & with_dead
    loss = lambda p: formula(p, jnp.asarray(X, jnp.float64), prefixes or (L,), dead)
    (total, (latents, mse)), expected = jax.value_and_grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(metrics['loss'], total, rtol=2e-6)
  np.testing.assert_allclose(metrics['prefixes_mse' if prefixes else 'mse'], mse, rtol=2e-6)
  np.testing.assert_allclose(metrics['l0'], K, rtol=1e-6)
  np.testing.assert_allclose(metrics['threshold'], latents[latents > 0].min(), rtol=1e-5)
  assert metrics['dead'] == dead.sum()
  for name, grad in grads.items():
    # A few float32 roundings of the largest entry: entries are sums over the batch.
    np.testing.assert_allclose(grad, expected[name], atol=3e-6 * np.abs(expected[name]).max(), err_msg=name)
  alone, grads_alone = measured((1, 1), prefixes, with_dead)
  np.testing.assert_allclose(metrics['loss'], alone['loss'], rtol=1e-6)
  for name, grad in grads.items():
    assert np.linalg.norm(grad - grads_alone[name]) < 1e-6 * np.linalg.norm(grads_alone[name]), name


@pytest.mark.parametrize('prefixes', [(24,), (24, 24, 64), (64, 24), (0, 64), (24, 65)])
def test_prefixes_that_do_not_rise_to_all_latents_raise(mesh, prefixes):
  recipe = batch_topk.BatchTopK(K, 0, prefixes=prefixes)
  with pytest.raises(ValueError, match=r'prefixes .* do not rise to n_latents 64; the last must be all latents'):
    recipe.loss_and_grads(example(), X, X, np.zeros(L, np.int32), MSE_SCALE, 0)


def test_after_training_a_threshold_keeps_k_on_average(mesh):
  rng = np.random.default_rng(1)
  directions = rng.normal(size=(40, D))

  def batches(n):
    return ((rng.random((n, 256, 40)) < 0.1) * rng.exponential(size=(n, 256, 40)) @ directions).astype(np.float32)

  acts_sbd = batches(60)
  tx, recipe = optimizer.adam(3e-3), batch_topk.BatchTopK(K, 0)
  fresh = sae.init_sae(jax.random.key(0), acts_sbd[0], L, K)
  state, metrics = train_step.train_steps(train_step.init_state(fresh, acts_sbd[0], tx), acts_sbd, tx, recipe)
  assert metrics['normalized_mse'][-1] < 0.7 * metrics['normalized_mse'][0]
  # The average of steps' thresholds, plain as long as there are fewer than 100.
  np.testing.assert_allclose(state.threshold, np.mean(metrics['threshold']), rtol=1e-5)
  kept = batch_topk.with_threshold(state.sae, metrics['threshold'][-1])
  latents, _ = kept.encode(batches(8))
  assert abs((latents > 0).sum(-1).mean() - K) < 0.15 * K
  assert np.ptp((latents > 0).sum(-1)) > 2  # tokens differ in how many they need
