"""Growing changes what it says and nothing else: weights, Adam's moments, the average and the dead clock."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_interp.sae import growth, losses, optimizer, train_step
from models import activation_functions, sae, sharding, topk

B, D, L, K, WIDER, EMA, N_STEPS = 96, 12, 32, 4, 56, 0.9, 3
N_DIRECTIONS = 80
RECIPE = losses.TopK(((K, 1.0),), 8, dead_tokens=2 * B)
DIRECTIONS = np.random.default_rng(1).normal(size=(N_DIRECTIONS, D))


def acts_of(n, seed):
  """Returns n sums of a few directions, and noise."""
  rng = np.random.default_rng(seed)
  sources = (rng.random((n, N_DIRECTIONS)) < 0.05) * rng.exponential(size=(n, N_DIRECTIONS))
  return (sources @ DIRECTIONS + 0.1 * rng.normal(size=(n, D))).astype(np.float32)


ACTS = acts_of(B, 0)
TX = optimizer.adam(1e-2, warmup_steps=4)


def train(state, n_steps, seed=2, recipe=RECIPE, ema=EMA):
  batches = acts_of(n_steps * B, seed).reshape(n_steps, B, D)
  return train_step.train_steps(jax.tree.map(jnp.copy, state), batches, TX, recipe, ema)


def trained(ema=EMA):
  model = sae.init_sae(jax.random.key(0), ACTS, L, K)
  return train(train_step.init_state(model, ACTS, TX, ema), N_STEPS, ema=ema)[0]


def model_of(kind):
  extra = np.linspace(0.1, 0.3, L).astype(np.float32)
  activation = {
    'topk': lambda: activation_functions.TopK(K),
    'relu': activation_functions.ReLU,
    'prolu': activation_functions.ProLU,
    'jumprelu': lambda: activation_functions.JumpReLU(extra),
    'gated': lambda: activation_functions.Gated(-extra, extra),
  }[kind]()
  model = sae.init_tied(jax.random.key(0), ACTS, L, activation, 'layer_norm_std')
  model.latent_bias[...] = model.latent_bias[...] - 0.5
  return model


def arrays(model):
  return {name: np.asarray(p[...]) for name, p in sae.named_parameters(model).items()}


def parts_of(state):
  """Returns every SAE-shaped part of a state, by name, as arrays."""
  moments = {name: optax.tree.get(state.opt, name) for name in ('mu', 'nu')}
  return {name: arrays(x) for name, x in {'sae': state.sae, 'ema': state.ema, **moments}.items()}


def errors64(p, acts, k=K):
  """Returns the error of a TopK SAE without normalisation, in float64."""
  x = acts.astype(np.float64) - p['pre_bias']
  preacts = x @ p['encoder'].T.astype(np.float64) + p['latent_bias']
  kth = np.sort(preacts, axis=1)[:, -k, None]
  return x - np.where(preacts >= kth, np.maximum(preacts, 0), 0) @ p['decoder']


def test_old_latents_stay_bit_for_bit_and_new_ones_start_by_the_rule(mesh):
  state = trained()
  before, wide = parts_of(state), growth.widen(state, ACTS, WIDER, jax.random.key(1), EMA)
  after = parts_of(wide)
  for part in before:
    for name, x in before[part].items():
      np.testing.assert_array_equal(after[part][name][: len(x)], x)
  for moment in ('mu', 'nu'):
    for name in ('encoder', 'decoder', 'latent_bias'):
      assert after[moment][name].shape == after['sae'][name].shape
      assert not after[moment][name][L:].any()
  np.testing.assert_array_equal(
    wide.tokens_since_fired_l, [*np.asarray(state.tokens_since_fired_l), *[0] * (WIDER - L)]
  )
  for name in ('encoder', 'decoder', 'latent_bias'):
    corrected = after['ema'][name][L:] / (1 - EMA**N_STEPS)
    np.testing.assert_allclose(corrected, after['sae'][name][L:], rtol=1e-6)
    shard = getattr(wide.sae, name)[...].addressable_shards[0].data
    assert len(shard) == WIDER // mesh.shape['model']
  for same in ('step', 'mse_scale', 'threshold'):
    np.testing.assert_array_equal(getattr(wide, same), getattr(state, same))

  error = errors64(before['sae'], ACTS)
  directions = error / np.linalg.norm(error, axis=1, keepdims=True)
  cosines = after['sae']['decoder'][L:] @ directions.T
  np.testing.assert_allclose(cosines.max(1), 1, rtol=1e-5)
  assert len(set(cosines.argmax(1))) == WIDER - L  # no token twice
  np.testing.assert_allclose(np.linalg.norm(after['sae']['decoder'][L:], axis=1), 1, rtol=1e-5)
  alive = np.asarray(growth.fit(state.sae, ACTS).fired_l) > 0
  norm = np.linalg.norm(before['sae']['encoder'][alive], axis=1).mean()
  gain = np.linalg.norm(after['sae']['encoder'][L], axis=0) / norm
  assert np.abs(np.log2(gain) * 2 + np.arange(len(growth.GAINS))).min() < 1e-4
  np.testing.assert_allclose(after['sae']['encoder'][L:], gain * norm * after['sae']['decoder'][L:], atol=1e-5)
  assert not after['sae']['latent_bias'][L:].any()


def test_fit_is_that_of_numpy(mesh):
  model = trained().sae
  error, found = errors64(arrays(model), ACTS), growth.fit(model, ACTS)
  x = ACTS.astype(np.float64)
  np.testing.assert_allclose(found.normalized_mse, (error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rtol=1e-5)
  assert found.l0 == found.fired_l.sum() / B <= K


@pytest.mark.parametrize('kind', list(activation_functions.BY_NAME))
def test_the_sample_is_not_reconstructed_worse_and_other_parameters_are_as_said(mesh, kind):
  model = model_of(kind)
  before, wide = arrays(model), growth.widen(model, ACTS, WIDER, jax.random.key(1))
  after = arrays(wide)
  assert growth.fit(wide, ACTS).normalized_mse <= growth.fit(model, ACTS).normalized_mse
  for name, x in before.items():
    np.testing.assert_array_equal(after[name][: len(x)], x)
  if kind == 'jumprelu':
    alive = growth.fit(model, ACTS).fired_l > 0
    np.testing.assert_allclose(after['threshold'][L:], before['threshold'][alive].mean(), rtol=1e-5)
  if kind == 'gated':
    assert not after['r_mag'][L:].any()
    assert not after['mag_bias'][L:].any()


def test_new_latents_of_a_transcoder_read_inputs_and_write_errors(mesh):
  targets = np.concatenate([2 * ACTS, ACTS[:, :3] ** 2], axis=1)
  model = sae.as_transcoder(jax.random.key(3), sae.init_sae(jax.random.key(0), ACTS, L, K), targets, skip=True)
  wide = growth.widen(model, ACTS, WIDER, jax.random.key(1), targets_bd=targets)
  after = arrays(wide)
  assert growth.fit(wide, ACTS, targets).normalized_mse <= growth.fit(model, ACTS, targets).normalized_mse
  x = ACTS - after['pre_bias']
  rows = after['encoder'][L:] / np.linalg.norm(after['encoder'][L:], axis=1, keepdims=True)
  drawn = (rows @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T).argmax(1)
  recons = np.asarray(model.decode(*model.encode(jnp.asarray(ACTS))))
  error = (targets - recons)[drawn]
  cosines = np.sum(after['decoder'][L:] * error, axis=1) / np.linalg.norm(error, axis=1)
  np.testing.assert_allclose(cosines, 1, rtol=1e-4)
  with pytest.raises(ValueError, match='targets are what a transcoder reconstructs'):
    growth.widen(model, ACTS, WIDER, jax.random.key(1))


def test_tokens_without_a_loss_are_not_drawn():
  with jax.set_mesh(sharding.make_mesh()):
    model = trained().sae
    empty = np.tile(np.asarray(model.pre_bias[...]), (B, 1))
    model.latent_bias[...] = model.latent_bias[...] * 0 - 1e-3
    sample = np.concatenate([empty, ACTS[: WIDER - L]])
    error = errors64(arrays(model), ACTS[: WIDER - L])
    wide = arrays(growth.widen(model, sample, WIDER, jax.random.key(1)))
  cosines = wide['decoder'][L:] @ (error / np.linalg.norm(error, axis=1, keepdims=True)).T
  assert sorted(cosines.argmax(1)) == list(range(WIDER - L))


@pytest.mark.parametrize('size', [0, 1e-30])  # the square of the latter is 0
def test_tokens_without_a_loss_that_are_drawn_all_the_same_give_other_directions(mesh, size):
  """Of a sample of which fewer tokens have a loss than there are new latents."""
  model = trained().sae
  model.pre_bias[...] *= 0
  model.latent_bias[...] = model.latent_bias[...] * 0 - 1e-3
  wide = arrays(growth.widen(model, np.concatenate([size * ACTS, ACTS[:4]]), WIDER, jax.random.key(1)))
  cosines = wide['decoder'][L:] @ wide['decoder'][L:].T
  np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-5)
  assert np.abs(cosines - np.diag(np.diag(cosines))).max() < 1 - 1e-3
  assert np.isfinite(wide['encoder']).all()


def test_of_a_constant_sample_new_latents_are_finite_and_do_no_harm(mesh):
  acts = np.tile(ACTS[:1], (B, 1))
  for targets in (None, acts):
    model = sae.init_sae(jax.random.key(0), acts, L, K)
    if targets is not None:
      model = sae.as_transcoder(jax.random.key(3), model, targets)
      model.out_bias[...] = jnp.asarray(acts[0]) * model.output_scale
    model.pre_bias[...] = jnp.asarray(acts[0])  # to the last bit: there is no error
    wide = growth.widen(model, acts, WIDER, jax.random.key(1), targets_bd=targets)
    assert all(np.isfinite(x).all() for x in arrays(wide).values())
    np.testing.assert_allclose(np.linalg.norm(arrays(wide)['decoder'], axis=1), 1, rtol=1e-5)


def test_the_draws_do_not_depend_on_the_mesh():
  found = []
  for shape in [(1, 1), (2, 4)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model = sae.init_sae(jax.random.key(0), ACTS, L, K)
      found.append(arrays(growth.widen(model, ACTS, WIDER, jax.random.key(1))))
  for name in found[0]:
    np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)


def test_pruning_keeps_order_and_numbers_and_rounds_up_by_the_least_idle(mesh):
  state = trained()
  idle = np.random.default_rng(3).permutation(L)
  n_alive = 21
  n_kept = n_alive + n_alive % mesh.shape['model']
  kept = np.flatnonzero(idle < n_kept)
  state = state._replace(tokens_since_fired_l=sharding.place(idle.astype(np.int32), 'latent'))
  before, pruned = parts_of(state), growth.prune(state, idle, n_alive - 1)
  after = parts_of(pruned)
  for part in before:
    for name, x in before[part].items():
      np.testing.assert_array_equal(after[part][name], x if name == 'pre_bias' else x[kept])
  np.testing.assert_array_equal(pruned.tokens_since_fired_l, idle[kept])
  assert growth.prune(state.sae, idle, 1, least=8).n_latents == 8
  with pytest.raises(ValueError, match='latents are to stay of 32; choose fewer'):
    growth.prune(state.sae, idle, 1, least=33)


def test_without_a_pruned_latent_tokens_are_encoded_as_before(mesh):
  model = trained().sae
  gone = np.arange(L) % 3 == 1
  pruned = growth.prune(model, gone, 0)
  kept = np.flatnonzero(~gone)
  kept = np.arange(L)[~gone] if len(kept) == pruned.n_latents else np.sort([*kept, 1])
  x = jnp.asarray(acts_of(2000, 5))
  latents, norm = jax.jit(lambda m, x: m.encode(x))(model, x)
  fewer, _ = jax.jit(lambda m, x: m.encode(x))(pruned, x)
  untouched = ~np.delete(np.asarray(latents) > 0, kept, axis=1).any(1)
  assert untouched.sum() > 20
  np.testing.assert_array_equal((np.asarray(fewer) > 0)[untouched], (np.asarray(latents)[:, kept] > 0)[untouched])
  recons, of_fewer = np.asarray(model.decode(latents, norm)), np.asarray(pruned.decode(fewer, norm))
  # Products of other shapes add in another order.
  np.testing.assert_allclose(of_fewer[untouched], recons[untouched], atol=1e-5)


def test_k_changes_everywhere_and_training_goes_on(mesh):
  state = growth.change_k(trained(), 7)
  _, metrics = train(state, 2, recipe=losses.TopK(((7, 1.0),), 0))
  assert float(metrics['l0'][-1]) > K
  assert growth.fit(state.sae, ACTS).l0 > K
  jump = growth.to_jumprelu(state.sae, ACTS, 3)
  assert growth.change_k(jump, K).k == K
  for k in (0, L + 1):
    with pytest.raises(ValueError, match=f'k {k} is not within 1 and n_latents {L}'):
      growth.change_k(state, k)


@pytest.mark.parametrize('l0', [1.5, K, 6.25])
def test_the_threshold_gives_the_l0_on_the_sample(mesh, l0):
  model = trained().sae
  jump = growth.to_jumprelu(model, ACTS, l0)
  assert jump.activation.name == 'jumprelu'
  p = arrays(model)
  preacts = (ACTS.astype(np.float64) - p['pre_bias']) @ p['encoder'].T.astype(np.float64) + p['latent_bias']
  largest = np.sort(preacts, axis=None)[::-1]
  n_kept = round(l0 * B)
  expected = (largest[n_kept - 1] + largest[n_kept]) / 2
  np.testing.assert_allclose(jump.activation.threshold[...], np.full(L, expected), rtol=1e-5)
  assert growth.fit(jump, ACTS).l0 == n_kept / B


@pytest.mark.parametrize('chunk', [40, 1000])
def test_the_threshold_is_exact_however_many_tokens_are_encoded_at_a_time(mesh, monkeypatch, chunk):
  model = trained().sae
  monkeypatch.setattr(growth, 'CHUNK', chunk)
  monkeypatch.setattr(topk, 'MAX_COUNT', B * L // 2)  # no device counts the pre-activations of the whole sample
  preacts = np.concatenate([growth._preacts(model, ACTS[i : i + chunk]) for i in range(0, B, chunk)]).ravel()
  for n_kept in (1, 3 * B + 1, (preacts > 0).sum()):
    larger, smaller = np.partition(preacts, [-n_kept - 1, -n_kept])[[-n_kept, -n_kept - 1]]
    found = growth.to_jumprelu(model, ACTS, n_kept / B).activation.threshold[...]
    np.testing.assert_allclose(found, max((larger + smaller) / 2, 0), rtol=1e-6)
    assert (preacts > found[0]).sum() == n_kept
  with pytest.raises(ValueError, match=f'has {(preacts > 0).sum() / B:.1f} positive pre-activations a token'):
    growth.to_jumprelu(model, ACTS, ((preacts > 0).sum() + 1) / B)


def test_a_threshold_below_all_pre_activations_keeps_them_all(mesh):
  model = trained().sae
  model.latent_bias[...] += 1000
  assert growth.fit(growth.to_jumprelu(model, ACTS, L), ACTS).l0 == L


def test_ties_at_the_threshold_are_all_on():
  with jax.set_mesh(sharding.make_mesh()):
    model = sae.init_sae(jax.random.key(0), ACTS, L, K)
    jump = growth.to_jumprelu(model, np.tile(ACTS[:8], (3, 1)), 2 + 1 / 24)  # of every token there are three
    assert growth.fit(jump, np.tile(ACTS[:8], (3, 1))).l0 == 2 + 3 / 24


def test_a_state_becomes_jumprelu_with_moments_and_average(mesh):
  state = growth.to_jumprelu(trained(), ACTS, K, EMA)
  found = parts_of(state)
  assert not found['mu']['threshold'].any()
  np.testing.assert_allclose(found['ema']['threshold'] / (1 - EMA**N_STEPS), found['sae']['threshold'], rtol=1e-6)


def test_what_cannot_be_says_so(mesh):
  state = trained()
  with pytest.raises(ValueError, match='n_latents 32 is not more than the 32'):
    growth.widen(state, ACTS, L, jax.random.key(0), EMA)
  with pytest.raises(ValueError, match='24 new latents draw a token each from a sample of 23'):
    growth.widen(state, ACTS[:23], WIDER, jax.random.key(0), EMA)
  with pytest.raises(ValueError, match='the state has an average of the weights; give its decay'):
    growth.widen(state, ACTS, WIDER, jax.random.key(0))
  if mesh.shape['model'] == 2:
    with pytest.raises(ValueError, match='n_latents 55 is not divisible by the model axis 2'):
      growth.widen(state, ACTS, 55, jax.random.key(0), EMA)
  for l0 in (0, L):
    with pytest.raises(ValueError, match=f'no threshold gives an L0 of {l0}'):
      growth.to_jumprelu(state.sae, ACTS, l0)
  with pytest.raises(ValueError, match="latents of a 'gated' SAE are no pre-activations, so it cannot become TopK"):
    growth.change_k(model_of('gated'), 3)


def test_a_restarted_state_warms_up_again_and_keeps_its_moments(mesh):
  state = trained()
  again = growth.restart(state, EMA)
  assert (int(again.step), float(again.threshold)) == (0, 0)
  assert not any(x.any() for x in arrays(again.ema).values())
  for name, x in arrays(optax.tree.get(state.opt, 'mu')).items():
    np.testing.assert_array_equal(arrays(optax.tree.get(again.opt, 'mu'))[name], x)
  # Adam moves a weight by about the learning rate, of which step 0 has a quarter.
  after, _ = train(again, 1)
  moved = np.abs(arrays(after.sae)['pre_bias'] - arrays(state.sae)['pre_bias'])
  assert 0 < moved.max() < 0.5 * 1e-2
  kept = arrays(train_step.trained_sae(after, EMA))
  np.testing.assert_allclose(kept['encoder'], arrays(after.sae)['encoder'], atol=1e-6)
  assert growth.restart(state).ema is None


def test_a_widened_sae_trains_to_a_lower_loss_than_the_old_one():
  """On tokens of four of 128 directions, which 32 latents cannot hold."""
  d, directions = 32, np.random.default_rng(4).normal(size=(128, 32))

  def acts_of(n, seed):
    rng = np.random.default_rng(seed)
    sources = (rng.random((n, 128)) < 0.03) * rng.exponential(size=(n, 128))
    return (sources @ directions + 0.05 * rng.normal(size=(n, d))).astype(np.float32)

  def loss_after(state, n_steps, seed):
    batches = acts_of(n_steps * B, seed).reshape(n_steps, B, d)
    state, _ = train_step.train_steps(jax.tree.map(jnp.copy, state), batches, TX, RECIPE)
    return state, growth.fit(state.sae, held_out).normalized_mse

  sample, held_out = acts_of(1024, 0), acts_of(1024, 1)
  with jax.set_mesh(sharding.make_mesh()):
    state = train_step.init_state(sae.init_sae(jax.random.key(0), sample, L, K), sample, TX)
    state, before = loss_after(state, 150, 2)
    wide = growth.widen(state, sample, 3 * L, jax.random.key(1))
    assert growth.fit(wide.sae, held_out).normalized_mse < before
    assert loss_after(wide, 40, 3)[1] < 0.85 * loss_after(state, 40, 3)[1]
