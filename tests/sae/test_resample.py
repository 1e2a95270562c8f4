"""Resampling changes dead latents only, by the paper's rule, and forgets their moments."""

import jax
import numpy as np
import optax
import pytest

from jax_interp.sae import optimizer, resample
from models import sae, sharding
from models.activation_functions import Gated, ReLU

B, D, L, DEAD_TOKENS = 32, 12, 64, 100
ACTS = np.random.default_rng(0).normal(1, 2, size=(B, D)).astype(np.float32)
DEAD = np.arange(L) % 5 == 2
CLOCK = np.where(DEAD, DEAD_TOKENS + 1, DEAD_TOKENS).astype(np.int32)


def start(dead=DEAD):
  model = sae.init_tied(jax.random.key(0), ACTS, L, ReLU(), 'layer_norm_std')
  model.encoder[...] = model.encoder[...] * np.linspace(1, 3, L)[:, None]
  model.latent_bias[...] = model.latent_bias[...] - 0.3
  tx = optimizer.adam(1e-3)
  grads = jax.tree.map(lambda x: x + 1, model)
  _, opt = tx.update(grads, tx.init(model), model)
  return model, opt


def arrays(model):
  return {name: np.asarray(p[...]) for name, p in sae.named_parameters(model).items()}


def test_only_dead_latents_change_and_by_the_rule(mesh):
  before = arrays(start()[0])
  after, opt, clock = resample.resample(*start(), CLOCK, ACTS, jax.random.key(1), DEAD_TOKENS)
  after = arrays(after)
  for name in ('encoder', 'decoder', 'latent_bias'):
    np.testing.assert_array_equal(after[name][~DEAD], before[name][~DEAD])
  np.testing.assert_array_equal(after['pre_bias'], before['pre_bias'])
  x = (ACTS - ACTS.mean(1, keepdims=True)) / (ACTS.std(1, ddof=1, keepdims=True) + 1e-5) - before['pre_bias']
  directions = x / np.linalg.norm(x, axis=1, keepdims=True)
  cosines = after['decoder'][DEAD] @ directions.T
  np.testing.assert_allclose(cosines.max(1), 1, rtol=1e-6)  # each row is the direction of one input
  np.testing.assert_allclose(np.linalg.norm(after['decoder'][DEAD], axis=1), 1, rtol=1e-6)
  alive_norm = np.linalg.norm(before['encoder'][~DEAD], axis=1).mean()
  np.testing.assert_allclose(after['encoder'][DEAD], 0.2 * alive_norm * after['decoder'][DEAD], rtol=1e-5, atol=1e-7)
  assert not after['latent_bias'][DEAD].any()
  for moment in ('mu', 'nu'):
    found = arrays(optax.tree.get(opt, moment))
    for name in ('encoder', 'decoder', 'latent_bias'):
      assert not found[name][DEAD].any()
      assert found[name][~DEAD].all()
    assert found['pre_bias'].all()
  np.testing.assert_array_equal(clock, np.where(DEAD, 0, DEAD_TOKENS))


def test_the_magnitudes_of_dead_gated_latents_begin_anew(mesh):
  old = np.linspace(-3, -1, L).astype(np.float32)
  model = sae.with_activation(start()[0], Gated(*(sharding.place(old, 'latent') for _ in range(2))))
  opt = optimizer.adam(1e-3).init(model)
  after = resample.resample(model, opt, CLOCK, ACTS, jax.random.key(1), DEAD_TOKENS)[0]
  for name in ('r_mag', 'mag_bias'):
    np.testing.assert_array_equal(arrays(after)[name], np.where(DEAD, 0, old))


def test_the_draws_depend_on_neither_the_mesh_nor_the_order():
  acts_bd = np.where(np.arange(D) < 4, 0, ACTS).astype(np.float32)  # all agree in the first coordinates
  results = []
  for shape, order in [((1, 1), np.arange(B)), ((2, 4), np.random.default_rng(1).permutation(B))]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model, _, _ = resample.resample(*start(), CLOCK, acts_bd[order], jax.random.key(1), DEAD_TOKENS)
      results.append(arrays(model))
  np.testing.assert_allclose(results[0]['decoder'], results[1]['decoder'], atol=1e-6)


@pytest.mark.parametrize('exponent', [1, 2])
def test_inputs_are_drawn_by_the_power_of_their_loss(exponent):
  """With all of many latents dead, how often an input is drawn is near its probability."""
  n = 4096
  with jax.set_mesh(sharding.make_mesh()):
    model = sae.init_tied(jax.random.key(0), ACTS, n, ReLU(), median=False)
    opt = optimizer.adam(1e-3).init(model)
    p = arrays(model)
    recons = np.maximum(ACTS @ p['encoder'].T, 0) @ p['decoder']
    odds = ((ACTS - recons) ** 2).sum(1).astype(np.float64) ** exponent
    dead = np.full(n, DEAD_TOKENS + 1, np.int32)
    after = resample.resample(model, opt, dead, ACTS, jax.random.key(2), DEAD_TOKENS, exponent)[0]
    drawn = np.argmax(np.asarray(after.decoder[...]) @ (ACTS / np.linalg.norm(ACTS, axis=1, keepdims=True)).T, axis=1)
    # With none alive the encoder's rows have the norm 0.2.
    np.testing.assert_allclose(np.linalg.norm(after.encoder[...], axis=1), 0.2, rtol=1e-5)
  expected = n * odds / odds.sum()
  found = np.bincount(drawn, minlength=B)
  assert np.abs((found - expected) / np.sqrt(expected + 1)).max() < 5  # standard deviations
