"""The losses and gradients of the sharded, sparse training pass are those of the dense formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import kernels, losses
from models import sae, sharding
from models.activation_functions import TopK

B, D, L, K = 16, 12, 128, 4
MESHES = [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]
TOPK, MULTI_TOPK = ((K, 1.0),), ((K, 1.0), (4 * K, 1 / 8))
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, size=(B, D)).astype(np.float32)
MSE_SCALE = 1 / 3.7
PARAMS = {
  'encoder': RNG.normal(size=(L, D)),
  'decoder': RNG.normal(size=(L, D)),
  'pre_bias': RNG.normal(size=D),
  'latent_bias': RNG.normal(size=L),
}
DEAD = 1000  # tokens
CLOCKS = {'none': np.zeros(L, np.int32), 'few': np.zeros(L, np.int32), 'many': np.zeros(L, np.int32)}
# Latents that win get no chance to be dead: the last to be chosen are at the ends of every shard.
preacts = (X - PARAMS['pre_bias']) @ PARAMS['encoder'].T + PARAMS['latent_bias']
SILENT = np.setdiff1d(np.arange(L), np.argsort(-preacts, axis=1)[:, :K])
CLOCKS['few'][SILENT[:3]] = DEAD
CLOCKS['many'][SILENT] = DEAD


def dense_loss(params, x_bd, target_bd, dead_l, levels, auxk, auxk_coef):
  """TopK, Multi-TopK and AuxK (Gao et al. 2024, as in train.py of OpenAI's sparse_autoencoder), dense.

  The only trick is the mask of the k largest.
  """
  top = lambda z, k: jnp.where(z >= jnp.sort(z, axis=1)[:, -k, None], jax.nn.relu(z), 0)
  centred_bd = x_bd - params['pre_bias']
  bias = params.get('out_bias', params['pre_bias'])
  constant_bd = bias + centred_bd @ params['skip'].T if 'skip' in params else bias
  preacts_bl = centred_bd @ params['encoder'].T + params['latent_bias']
  total = 0
  for k, weight in levels:
    recons_bd = top(preacts_bl, k) @ params['decoder'] + constant_bd
    total += weight * MSE_SCALE * jnp.mean((recons_bd - target_bd) ** 2)
    if k == levels[0][0]:
      error_bd = target_bd - jax.lax.stop_gradient(recons_bd) + jax.lax.stop_gradient(bias)
  if dead_l.any():
    aux_bd = top(jnp.where(dead_l, jax.nn.relu(preacts_bl), 0), auxk) @ params['decoder'] + bias
    variance = jnp.mean((error_bd.mean(0) - error_bd) ** 2)
    total += auxk_coef * jnp.mean((aux_bd - error_bd) ** 2) / variance
  return total


def ours(mesh, clock, objective, params=PARAMS, target=X, row_scale=None, x=X):
  with jax.set_mesh(sharding.make_mesh(*mesh)):
    dims = {'encoder': 'latent d', 'decoder': 'latent d', 'latent_bias': 'latent', 'skip': 'd d'}
    placed = {name: sharding.place(value.astype(np.float32), dims.get(name, 'd')) for name, value in params.items()}
    model = sae.SparseAutoencoder(**placed, activation=TopK(K))
    metrics, clock, grads = jax.jit(objective.loss_and_grads)(model, x, target, clock, MSE_SCALE, 0, row_scale)
    return metrics, np.asarray(clock), {name: np.asarray(getattr(grads, name)[...]) for name in params}


def expected(params, target, new_clock, levels, auxk=8):
  with jax.enable_x64(True):
    params = {name: jnp.asarray(value.astype(np.float32), jnp.float64) for name, value in params.items()}
    x_bd, target_bd = jnp.asarray(X, jnp.float64), jnp.asarray(target, jnp.float64)
    loss, grads = jax.value_and_grad(dense_loss)(params, x_bd, target_bd, new_clock > DEAD, levels, auxk, 0.5)
    return loss, {name: np.array(grad) for name, grad in grads.items()}


def check(grads, expected_grads):
  for name, grad in grads.items():
    # A few float32 roundings of the largest entry: entries are sums over the batch.
    atol = 2e-6 * np.abs(expected_grads[name]).max()
    np.testing.assert_allclose(grad, expected_grads[name], atol=atol, err_msg=name)


@functools.cache
def on_one_device(objective, clock):
  metrics, _, grads = ours((1, 1), CLOCKS[clock], objective)
  return metrics, grads


def check_same(metrics, grads, one, one_grads):
  """Checks a loss and gradients against those of one device."""
  np.testing.assert_allclose(metrics['loss'], one['loss'], rtol=1e-6)
  for name, grad in one_grads.items():
    assert np.linalg.norm(grads[name] - grad) <= 1e-6 * np.linalg.norm(grad), name


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('levels', [TOPK, MULTI_TOPK], ids=['topk', 'multi_topk'])
def test_losses_and_gradients_equal_dense_autodiff_in_float64(shape, levels):
  objective = losses.TopK(levels, auxk=8, auxk_coef=0.5, dead_tokens=DEAD)
  for name, clock in CLOCKS.items():
    metrics, new_clock, grads = ours(shape, clock, objective)
    loss, expected_grads = expected(PARAMS, X, new_clock, levels)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
    check(grads, expected_grads)
    check_same(metrics, grads, *on_one_device(objective, name))
    assert metrics['dead'] == (clock == DEAD).sum()
    parts = [metrics[part] for part in ('normalized_mse', 'multi_topk', 'auxk') if part in metrics]
    assert len(parts) == 1 + len(levels)
    np.testing.assert_allclose(sum(parts), metrics['loss'], rtol=1e-6)


def test_the_parts_of_the_loss_are_weighted():
  metrics, _ = on_one_device(losses.TopK(MULTI_TOPK, auxk=8, auxk_coef=0.5, dead_tokens=DEAD), 'few')
  alive, dead = CLOCKS['none'], CLOCKS['few'] + B
  own, level, with_auxk = (
    expected(PARAMS, X, clock, (of,))[0] for clock, of in [(alive, TOPK[0]), (alive, MULTI_TOPK[1]), (dead, TOPK[0])]
  )
  np.testing.assert_allclose(metrics['normalized_mse'], own, rtol=1e-6)
  np.testing.assert_allclose(metrics['multi_topk'], level, rtol=1e-6)
  np.testing.assert_allclose(metrics['auxk'], with_auxk - own, rtol=1e-6)


def test_a_shard_may_have_fewer_latents_than_are_chosen():
  """Each of eight has 16 of them, of k = 20, 4 k = 80 and 24 dead ones for the error."""
  levels, hot = ((20, 1.0), (80, 1 / 8)), np.arange(48, 64)  # all of the fourth win
  dead = np.setdiff1d(np.arange(0, L, 4), hot)
  params = PARAMS | {name: np.array(PARAMS[name]) for name in ('encoder', 'latent_bias')}
  params['encoder'][dead] /= 50  # positive on many tokens, and never among the 20 largest
  params['latent_bias'][dead] = 0.1
  params['latent_bias'][hot] += 40
  clock = np.zeros(L, np.int32)
  clock[dead] = DEAD
  objective = losses.TopK(levels, auxk=24, auxk_coef=0.5, dead_tokens=DEAD)
  one, new_clock, one_grads = ours((1, 1), clock, objective, params)
  metrics, other_clock, grads = ours((1, 8), clock, objective, params)
  assert one['dead'] == len(dead)
  np.testing.assert_array_equal(other_clock, new_clock)
  check_same(metrics, grads, one, one_grads)
  loss, expected_grads = expected(params, X, new_clock, levels, 24)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  check(grads, expected_grads)


def test_the_variance_is_about_each_dimensions_mean(mesh):
  x_bd = X + np.linspace(-9, 9, D, dtype=np.float32)
  x64_bd = x_bd.astype(np.float64)
  np.testing.assert_allclose(losses.variance(jnp.asarray(x_bd)), np.mean((x64_bd - x64_bd.mean(0)) ** 2), rtol=1e-6)


@pytest.mark.parametrize(
  'options', [*({'kernels': kind} for kind in kernels.KERNELS if kind != 'sparse'), {'dtype': 'bfloat16'}], ids=str
)
@pytest.mark.parametrize('shape', [(1, 1), (2, 2)], ids=str)
def test_kernels_and_rounded_candidates_change_nothing(options, shape):
  objective = losses.TopK(MULTI_TOPK, auxk=8, auxk_coef=0.5, dead_tokens=DEAD, **options)
  metrics, new_clock, grads = ours(shape, CLOCKS['few'], objective)
  loss, expected_grads = expected(PARAMS, X, new_clock, MULTI_TOPK)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  check(grads, expected_grads)


@pytest.mark.parametrize('skip', [False, True])
def test_a_transcoder_learns_its_target(mesh, skip):
  params = PARAMS | {'out_bias': RNG.normal(size=D), **({'skip': RNG.normal(size=(D, D)) / 4} if skip else {})}
  target = RNG.normal(size=(B, D)).astype(np.float32)
  objective = losses.TopK(MULTI_TOPK, auxk=8, auxk_coef=0.5, dead_tokens=DEAD)
  metrics, new_clock, grads = ours(tuple(mesh.shape.values()), CLOCKS['few'], objective, params, target)
  loss, expected_grads = expected(params, target, new_clock, MULTI_TOPK)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  check(grads, expected_grads)


def test_a_decoder_scaled_row_by_row_has_the_gradient_across_the_scaled_rows(mesh):
  scale_l = (1 / np.linalg.norm(PARAMS['decoder'], axis=1)).astype(np.float32)
  unit = PARAMS | {'decoder': PARAMS['decoder'] * scale_l.astype(np.float64)[:, None]}
  objective = losses.TopK(MULTI_TOPK, auxk=8, auxk_coef=0.5, dead_tokens=DEAD)
  shape = tuple(mesh.shape.values())
  metrics, new_clock, grads = ours(shape, CLOCKS['few'], objective, row_scale=scale_l)
  loss, expected_grads = expected(unit, X, new_clock, MULTI_TOPK)
  along_l1 = np.sum(expected_grads['decoder'] * unit['decoder'], axis=1, keepdims=True)
  expected_grads['decoder'] -= along_l1 * unit['decoder']
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  check(grads, expected_grads)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in expected_grads.values()))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)


def test_auxk_reaches_the_encoder_of_dead_latents_and_only_theirs():
  plain = losses.TopK(TOPK, auxk=0, dead_tokens=DEAD)
  with_auxk = losses.TopK(TOPK, auxk=8, dead_tokens=DEAD)
  for name in ('encoder', 'latent_bias', 'decoder'):
    difference = np.abs(ours((2, 2), CLOCKS['few'], with_auxk)[2][name] - ours((2, 2), CLOCKS['few'], plain)[2][name])
    rows = difference.reshape(L, -1).max(1)
    assert rows[SILENT[:3]].max() > 1e-4
    assert np.delete(rows, SILENT[:3]).max() < 1e-7


def test_the_second_level_reaches_the_encoder_of_the_latents_that_only_it_chooses():
  objective = losses.TopK(MULTI_TOPK, auxk=0, dead_tokens=DEAD)
  top = np.argsort(-preacts, axis=1)[:, : 4 * K]
  chosen = np.intersect1d(SILENT, top[np.take_along_axis(preacts, top, 1) > 0])
  assert 0 < len(chosen) < len(SILENT)
  grads = ours((2, 4), CLOCKS['none'], objective)[2]
  for name in ('encoder', 'latent_bias', 'decoder'):
    rows = np.abs(grads[name]).reshape(L, -1).max(1)
    assert rows[chosen].min() > 1e-6
    assert not rows[np.setdiff1d(SILENT, chosen)].any()


def test_auxk_of_one_token_is_nothing_and_no_nan():
  recipe = losses.TopK(TOPK, auxk=8, dead_tokens=DEAD)
  metrics, _, grads = ours((1, 1), CLOCKS['many'], recipe, target=X[:1], x=X[:1])
  assert metrics['auxk'] == 0
  assert all(np.isfinite(grad).all() for grad in grads.values())


def test_auxk_a_block_of_tokens_at_a_time_is_that_of_all(mesh, monkeypatch):
  monkeypatch.setattr(losses, 'AUXK_ROWS', 4)
  objective = losses.TopK(TOPK, auxk=8, auxk_coef=0.5, dead_tokens=DEAD)
  for clock in (CLOCKS['few'], CLOCKS['many']):
    metrics, new_clock, grads = ours(tuple(mesh.shape.values()), clock, objective)
    loss, expected_grads = expected(PARAMS, X, new_clock, TOPK)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
    check(grads, expected_grads)


@pytest.mark.parametrize('shape', [(1, 1), (2, 1), (2, 4)], ids=str)
def test_tokens_that_were_chosen_again_are_counted(shape):
  near = np.array(X)
  near[3:8] = PARAMS['pre_bias']  # nothing is left of them to tell latents apart by
  chosen_in = lambda dtype: losses.TopK(TOPK, auxk=0, dtype=dtype)
  encoder_ld, bias_l, pre_bias_d = (
    jnp.asarray(PARAMS[name], jnp.float32) for name in ('encoder', 'latent_bias', 'pre_bias')
  )
  again = [
    kernels.select_topk(kernels.KERNELS['sparse'], near - pre_bias_d, encoder_ld[own], bias_l[own], K, 'bfloat16')[2]
    for own in np.split(np.arange(L), shape[1])
  ]
  metrics, *_ = ours(shape, CLOCKS['none'], chosen_in('bfloat16'), target=near, x=near)
  assert 5 / B <= np.mean(again) < 1
  np.testing.assert_allclose(metrics['chosen_again'], np.mean(again), rtol=1e-6)
  assert 'chosen_again' not in ours(shape, CLOCKS['none'], chosen_in('float32'), target=near, x=near)[0]


def test_auxk_allocates_a_block_of_tokens():
  objective, temporary = losses.TopK(TOPK, auxk=8, dead_tokens=DEAD), []
  with jax.set_mesh(sharding.make_mesh()):
    model = sae.build({name: x.astype(np.float32) for name, x in PARAMS.items()}, {'activation': 'topk', 'k': K})
    for n_tokens in (losses.AUXK_ROWS, 16 * losses.AUXK_ROWS):
      x_bd = jax.ShapeDtypeStruct((n_tokens, D), np.float32)
      step = jax.jit(objective.loss_and_grads).lower(model, x_bd, x_bd, CLOCKS['none'], MSE_SCALE, 0)
      temporary.append(step.compile().memory_analysis().temp_size_in_bytes)
  assert temporary[1] - temporary[0] < 15 * losses.AUXK_ROWS * L * 4  # what [batch, latent] more would be, once


def test_nothing_dead_adds_exactly_nothing():
  # OpenAI's trainer still pushes pre_bias towards the mean error then; that is an accident, not a rule.
  plain = ours((1, 1), CLOCKS['none'], losses.TopK(TOPK, auxk=0, dead_tokens=DEAD))
  with_auxk = ours((1, 1), CLOCKS['none'], losses.TopK(TOPK, auxk=8, dead_tokens=DEAD))
  assert with_auxk[0]['auxk'] == 0
  for name in PARAMS:
    np.testing.assert_array_equal(plain[2][name], with_auxk[2][name])


def test_the_clock_counts_tokens_since_a_latent_was_last_positive(mesh):
  shape = tuple(mesh.shape.values())
  start = np.full(L, 2**31 - 1 - B, np.int32)  # the clock must stop before it overflows
  metrics, clock, _ = ours(shape, start, losses.TopK(TOPK, auxk=0))
  top = np.argsort(-preacts, axis=1)[:, :K]
  fired = np.unique(top[np.take_along_axis(preacts, top, 1) > 0])
  np.testing.assert_array_equal(np.flatnonzero(clock == 0), fired)
  assert (np.delete(clock, fired) == 2**30 + B).all()
  assert metrics['l0'] == K
  assert metrics['dead'] == L - len(fired)


@pytest.mark.parametrize('hot', [False, True], ids=['spread', 'on one shard'])
def test_many_shards_look_at_few_candidates_and_at_all_where_one_has_many(hot):
  """With 8 shards and k = 64 a shard looks at 31 candidates; where the winners crowd on one it looks at all."""
  k, n_latents, rng = 64, 1024, np.random.default_rng(3)
  params = {
    'encoder': rng.normal(size=(n_latents, D)),
    'decoder': rng.normal(size=(n_latents, D)),
    'pre_bias': rng.normal(size=D),
    'latent_bias': 40.0 * hot * (np.arange(n_latents) // 128 == 3),
  }
  results = []
  for shape in [(1, 1), (1, 8)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model = sae.build({name: x.astype(np.float32) for name, x in params.items()}, {'activation': 'topk', 'k': k})
      recipe = losses.TopK(((k, 1.0),), auxk=0)
      metrics, clock, grads = jax.jit(recipe.loss_and_grads)(model, X, X, np.zeros(n_latents, np.int32), MSE_SCALE, 0)
      results.append((metrics, clock, {name: np.asarray(getattr(grads, name)[...]) for name in params}))
      preacts_bl = np.asarray(model.preacts(X))
  (metrics, clock, grads), (other_metrics, other_clock, other_grads) = results
  won_bl = preacts_bl >= np.sort(preacts_bl, axis=1)[:, -k, None]
  most = won_bl.reshape(B, 8, -1).sum(2).max()
  assert most > 31 if hot else most <= 31
  np.testing.assert_allclose(other_metrics['loss'], metrics['loss'], rtol=1e-6)
  np.testing.assert_array_equal(other_clock, clock)
  for name, grad in grads.items():
    np.testing.assert_allclose(other_grads[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)
