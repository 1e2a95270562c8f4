"""Resampling changes dead latents only, by the paper's rule, and forgets their moments."""

import functools

import jax
import jax.numpy as jnp
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
  tx = optimizer.adam(1e-3)
  _, opt = tx.update(jax.tree.map(jnp.ones_like, model), tx.init(model), model)
  before = {moment: arrays(optax.tree.get(opt, moment)) for moment in ('mu', 'nu')}
  after, opt, _ = resample.resample(model, opt, CLOCK, ACTS, jax.random.key(1), DEAD_TOKENS)
  for name in ('r_mag', 'mag_bias'):
    np.testing.assert_array_equal(arrays(after)[name], np.where(DEAD, 0, old))
    for moment, old_moment in before.items():
      assert old_moment[name].all()
      np.testing.assert_array_equal(arrays(optax.tree.get(opt, moment))[name], np.where(DEAD, 0, old_moment[name]))


def test_the_draws_depend_on_neither_the_mesh_nor_the_order():
  acts_bd = np.where(np.arange(D) < 4, 0, ACTS).astype(np.float32)  # all agree in the first coordinates
  results = []
  for shape, order in [((1, 1), np.arange(B)), ((2, 4), np.random.default_rng(1).permutation(B))]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model, _, _ = resample.resample(*start(), CLOCK, acts_bd[order], jax.random.key(1), DEAD_TOKENS)
      results.append(arrays(model))
  np.testing.assert_allclose(results[0]['decoder'], results[1]['decoder'], atol=1e-6)


def anew():
  """Returns `resample`, compiled anew: with the block that is set now."""
  return jax.jit(functools.partial(resample.resample.__wrapped__, dead_tokens=DEAD_TOKENS))


@pytest.mark.parametrize('block', [8, 12])  # four whole blocks, and three that 32 inputs do not fill
def test_in_blocks_the_draws_are_the_same(mesh, monkeypatch, block):
  acts = sharding.place(ACTS, 'row d_model')
  whole, _, _ = resample.resample(*start(), CLOCK, acts, jax.random.key(1), DEAD_TOKENS)
  monkeypatch.setattr(resample, 'BLOCK', block)
  found, _, _ = anew()(*start(), CLOCK, acts, jax.random.key(1))
  for name, x in arrays(whole).items():
    np.testing.assert_allclose(arrays(found)[name], x, atol=1e-6)  # another product adds in another order


def test_no_array_has_the_latents_of_all_inputs(mesh, monkeypatch):
  n_tokens, n_latents = 4096, 1024
  monkeypatch.setattr(resample, 'BLOCK', 64)
  acts = sharding.place(np.random.default_rng(0).normal(size=(n_tokens, D)).astype(np.float32), 'row d_model')
  model = sae.init_tied(jax.random.key(0), acts, n_latents, ReLU())
  clock = sharding.place(np.arange(n_latents, dtype=np.int32), 'latent')
  lowered = anew().lower(model, optimizer.adam(1e-3).init(model), clock, acts, jax.random.key(1))
  of_latents = n_tokens * n_latents * 4 / mesh.size
  assert lowered.compile().memory_analysis().temp_size_in_bytes < of_latents / 4


def test_inputs_that_are_nothing_but_pre_bias_give_rows_of_norm_1(mesh):
  """As do inputs so small that their squares are 0."""
  for size in (0, 1e-30):
    acts = size * ACTS
    model = sae.init_tied(jax.random.key(0), acts, L, ReLU(), median=False)
    model.latent_bias[...] = model.latent_bias[...] + 0.1
    after = resample.resample(model, optimizer.adam(1e-3).init(model), CLOCK, acts, jax.random.key(1), DEAD_TOKENS)[0]
    np.testing.assert_allclose(np.linalg.norm(arrays(after)['decoder'], axis=1), 1, rtol=1e-5)
    assert np.isfinite(arrays(after)['encoder']).all()


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
