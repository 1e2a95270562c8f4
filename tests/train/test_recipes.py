"""config.sae becomes a recipe, an optimizer and an SAE; every recipe of configs/recipes.py trains; nonsense raises."""

import jax
import numpy as np
import pytest

from configs import recipes as recipe_configs
from configs import transcoder
from jax_interp.sae import train_step
from models import sae, sharding
from train import recipes

B, D, L, N_STEPS = 64, 12, 2048, 12
RNG = np.random.default_rng(0)
DIRECTIONS = RNG.normal(size=(40, D))
ACTS = ((RNG.random((N_STEPS, B, 40)) < 0.1) * RNG.exponential(size=(N_STEPS, B, 40)) @ DIRECTIONS).astype(np.float32)
TARGETS = (ACTS @ RNG.normal(size=(D, 10))).astype(np.float32)


def settings_of(recipe, **changes):
  return recipe_configs.get_config(recipe).sae.to_dict() | {'warmup_steps': 2, 'dead_tokens': B} | changes


@pytest.mark.parametrize('recipe', recipes.RECIPES)
def test_every_recipe_trains_resumes_and_leaves_an_sae(mesh, tmp_path, recipe):
  settings = settings_of(recipe, l1_warmup_steps=3) if recipe.startswith('relu') else settings_of(recipe)
  plan = recipes.plan(settings, N_STEPS)
  state = train_step.init_state(plan.init(jax.random.key(0), ACTS[0]), ACTS[0], plan.tx, plan.ema)
  n_metrics = set()
  for first in range(0, N_STEPS, 4):
    acts_sbd = ACTS[first : first + 4]
    state, metrics = train_step.train_steps(state, acts_sbd, plan.tx, plan.recipe, plan.ema)
    state = plan.between(state, first, acts_sbd, jax.random.key(1))
    assert np.isfinite(metrics['loss']).all()
    n_metrics.add(len(metrics))
  assert len(n_metrics) == 1
  kept = plan.finish(state, ACTS[0])
  sae.save(tmp_path / 'sae', kept)
  loaded = sae.load_sae(tmp_path / 'sae')
  latents, norm = loaded.encode(ACTS[0])
  recons = loaded.decode(latents, norm)
  assert np.isfinite(recons).all()
  assert loaded.activation.name == {
    'multi_topk': 'topk', 'batch_topk': 'jumprelu', 'matryoshka': 'jumprelu', 'relu_april': 'relu'
  }.get(recipe, recipe)  # fmt: skip
  if recipe in ('batch_topk', 'matryoshka'):
    assert (latents > 0).sum() == 16 * B  # the threshold is for what it is asked to keep
  if plan.recipe.unit_norm:
    np.testing.assert_allclose(np.linalg.norm(kept.decoder[...], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('recipe', ['topk', 'multi_topk', 'batch_topk', 'relu', 'gated', 'jumprelu'])
def test_transcoders_of_every_recipe_learn_another_site(mesh, recipe):
  changes = {'normalization': 'expected_average', 'skip': recipe == 'topk', 'ema': 0.0, 'learning_rate': 1e-2}
  changes |= {'n_latents': 128}
  if recipe in ('relu', 'gated'):
    changes |= {'resample_every': 0, 'l1_coef': 0.01}
  if recipe == 'jumprelu':
    changes |= {'coef': 0.01}
  plan = recipes.plan(settings_of(recipe, **changes), N_STEPS, target=True)
  state = train_step.init_state(plan.init(jax.random.key(0), ACTS[0], TARGETS[0]), ACTS[0], plan.tx, 0, TARGETS[0])
  for _ in range(10):
    state, metrics = train_step.train_steps(state, ACTS, plan.tx, plan.recipe, 0, TARGETS)
  assert metrics['normalized_mse'][-1] < 0.5
  kept = plan.finish(state)
  recons = kept.decode(*kept.encode(ACTS[-1]))
  assert recons.shape == TARGETS[-1].shape
  assert np.mean((recons - TARGETS[-1]) ** 2) < 0.6 * np.var(TARGETS[-1])


def test_resampling_comes_at_its_steps_and_ends(mesh):
  changes = {'resample_every': 4, 'resample_until': 8, 'n_latents': 256, 'dead_tokens': B}
  plan = recipes.plan(settings_of('relu', **changes), N_STEPS)
  state = train_step.init_state(plan.init(jax.random.key(0), ACTS[0]), ACTS[0], plan.tx)
  dead = [5, 9]
  resampled = []
  for first in range(0, N_STEPS, 2):
    clock = np.asarray(state.tokens_since_fired_l).copy()
    clock[dead] = 2 * B
    bias = np.asarray(state.sae.latent_bias[...]).copy()
    bias[dead] = -100
    state.sae.latent_bias[...] = jax.device_put(bias, state.sae.latent_bias[...].sharding)
    state = state._replace(tokens_since_fired_l=jax.device_put(clock, state.tokens_since_fired_l.sharding))
    acts_sbd = ACTS[first : first + 2]
    state, _ = train_step.train_steps(state, acts_sbd, plan.tx, plan.recipe)
    state = plan.between(state, first, acts_sbd, jax.random.key(1))
    resampled.append(bool(np.all(np.asarray(state.sae.latent_bias[...])[dead] == 0)))
  assert resampled == [False, True, False, True, False, False]


def test_a_rate_of_0_is_the_rule():
  one, four = (
    recipes.plan(settings_of('topk', learning_rate=0.0, n_latents=n, warmup_steps=0), 9) for n in (2**14, 2**16)
  )
  params, grads = {'x': np.ones(3, np.float32)}, {'x': np.ones(3, np.float32)}
  step = lambda plan: plan.tx.update(grads, plan.tx.init(params), params)[0]['x'][0]
  np.testing.assert_allclose(step(one), -2e-4, rtol=1e-4)
  np.testing.assert_allclose(step(four), -1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  ('recipe', 'changes', 'message'),
  [
    ('relu', {'k': 16}, r"sae.k means nothing to the recipe 'relu'; leave it out .*or choose one of topk, multi_topk"),
    ('topk', {'l1_coef': 1.0}, r"sae.l1_coef means nothing to the recipe 'topk'; .* choose one of relu, relu_april"),
    ('topk', {'recipe': 'vanilla'}, "sae.recipe 'vanilla' is unknown; choose one of topk, multi_topk, batch_topk"),
    ('topk', {'normalization': 'batch'}, "sae.normalization 'batch' is unknown; choose one of none, layer_norm_std"),
    ('topk', {'kernels': 'fast'}, "'fast' is unknown; choose one of auto, sparse, sorted, grouped, pallas, dense$"),
    ('relu', {'compute_dtype': 'auto'}, "sae.compute_dtype 'auto' is unknown; choose one of float32, bfloat16"),
    ('topk', {'compute_dtype': 'float16'}, "sae.compute_dtype 'float16' is unknown; choose one of auto, float32"),
    ('topk', {'k': 4096}, 'k 4096 is not within 1 and n_latents 2048'),
    ('topk', {'skip': True}, 'sae.skip is of a transcoder'),
    ('relu', {'ema': 0.9}, 'average weights from before and after a resampling'),
    ('topk', {'decay': 'linear', 'decay_fraction': 1.0}, '12 steps of linear decay do not fit behind 2 of warm-up'),
    ('jumprelu', {'target_l0': 0.0}, 'target_l0 0.0 .* is not above 0'),
    ('matryoshka', {'prefixes': (64, 512)}, r'prefixes \(64, 512\) do not rise to n_latents 2048'),
    ('topk', {'micro_batches': 3}, 'sae.micro_batches 3 does not divide sae.batch_size 4096'),
    ('topk', {'micro_batches': 0}, 'sae.micro_batches 0 does not divide'),
    ('jumprelu', {'threshold_rate': 0.0}, 'sae.threshold_rate 0.0 is not above 0'),
  ],
)
def test_what_means_nothing_raises(recipe, changes, message):
  with pytest.raises(ValueError, match=message):
    recipes.plan(settings_of(recipe) | changes, N_STEPS)


def test_a_missing_field_names_where_it_is():
  settings = settings_of('gated')
  del settings['l1_coef']
  with pytest.raises(
    ValueError, match=r"sae.l1_coef is missing, which the recipe 'gated' needs; configs/recipes.py:gated"
  ):
    recipes.plan(settings, N_STEPS)


@pytest.mark.parametrize('normalization', ['layer_norm_std', 'unit_norm'])
def test_a_transcoders_target_has_no_norm_of_its_input(normalization):
  with pytest.raises(ValueError, match='cannot be undone on the target of a transcoder; choose none or'):
    recipes.plan(settings_of('topk', normalization=normalization), N_STEPS, target=True)


def test_the_transcoder_config_is_one_that_trains(mesh):
  settings = transcoder.get_config().sae.to_dict() | {'warmup_steps': 2, 'skip': True}
  plan = recipes.plan(settings, N_STEPS, target=True)
  fresh = plan.init(jax.random.key(0), ACTS[0], TARGETS[0])
  state = train_step.init_state(fresh, ACTS[0], plan.tx, plan.ema, TARGETS[0])
  _, metrics = train_step.train_steps(state, ACTS[:4], plan.tx, plan.recipe, plan.ema, TARGETS[:4])
  assert np.isfinite(metrics['loss']).all()


def test_resampling_is_given_rows_that_stay_on_their_devices(monkeypatch):
  seen = []
  resample = lambda sae, opt, clock, acts_bd, *_: seen.append(acts_bd) or (sae, opt, clock)
  monkeypatch.setattr(recipes.resample, 'resample', resample)
  plan = recipes.plan(settings_of('relu', resample_every=2), N_STEPS)
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    acts_sbd = sharding.place(np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32), 'step row d_model')
    state = train_step.TrainState(None, None, None, None, None, 2, None)
    plan.between(state, 0, acts_sbd, jax.random.key(0))
  (acts_bd,) = seen
  np.testing.assert_array_equal(np.sort(acts_bd, 0), np.sort(np.asarray(acts_sbd).reshape(16, 4), 0))
  assert {shard.data.shape for shard in acts_bd.addressable_shards} == {(4, 4)}
