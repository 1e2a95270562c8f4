"""Training steps: equal on every mesh, nothing retraces, nothing large travels, the decoder keeps its norm."""

import re

import jax
import numpy as np
import optax

from jax_interp.sae import losses, optimizer, train_step
from models import sae, sharding

S, B, D, L, K = 3, 64, 24, 512, 4
OBJECTIVE = losses.TopK(((K, 1.0), (4 * K, 1 / 8)), auxk=64, dead_tokens=2 * B)
EMA = 0.9


def activations(seed, n_steps=S):
  rng = np.random.default_rng(seed)
  sources = (rng.random((n_steps, B, 40)) < 0.1) * rng.exponential(size=(n_steps, B, 40))
  directions = np.random.default_rng(7).normal(size=(40, D))  # the same for every seed
  return (sources @ directions + 0.1 * rng.normal(size=(n_steps, B, D))).astype(np.float32)


def start(tx, ema=EMA):
  model = sae.init_sae(jax.random.key(0), activations(0)[0], L, K, 'layer_norm_std')
  return train_step.init_state(model, activations(0)[0], tx, ema)


def weights(model):
  return {name: np.asarray(getattr(model, name)[...]) for name in sae.PARAMETERS}


def test_losses_and_weights_are_the_same_on_every_mesh():
  tx = optimizer.adam(1e-3, warmup_steps=2, clip=1.0)
  results = []
  for shape in [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      state, metrics = train_step.train_steps(start(tx), activations(1), tx, OBJECTIVE, EMA)
      clock_l = np.asarray(state.tokens_since_fired_l)
      results.append((jax.device_get(metrics), clock_l, weights(train_step.trained_sae(state, EMA))))
  (metrics, clock_l, kept), *others = results
  assert metrics['dead'][-1] > 0
  assert metrics['auxk'][-1] > 0
  for other_metrics, other_clock_l, other in others:
    np.testing.assert_array_equal(other_clock_l, clock_l)  # the same latents fired
    for name in metrics:
      np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-6, err_msg=name)
    for name, value in kept.items():
      # Adam divides by the root of tiny second moments: where a gradient is near zero, rounding moves the weight.
      np.testing.assert_allclose(other[name], value, atol=2e-5, err_msg=name)


def test_new_values_do_not_retrace_and_the_state_stays_where_it_is():
  tx = optimizer.adam(1e-3, warmup_steps=2)
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    before = train_step.train_steps._cache_size()
    state = start(tx)
    shards = lambda state: [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state)]
    shards_before = shards(state)
    for seed in (1, 2):
      state, _ = train_step.train_steps(state, activations(seed), tx, OBJECTIVE, EMA)
    assert train_step.train_steps._cache_size() == before + 1
  assert shards(state) == shards_before
  assert state.sae.encoder[...].sharding.shard_shape((L, D)) == (L // 2, D)
  assert state.opt[1][0].mu.decoder[...].sharding.shard_shape((L, D)) == (L // 2, D)
  assert state.step == 2 * S


def test_no_collective_moves_pre_activations_and_nothing_is_sorted():
  tx = optimizer.adam(1e-3, warmup_steps=2)
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    objective = losses.TopK(OBJECTIVE.levels, auxk=0)
    hlo = train_step.train_steps.lower(start(tx), activations(1), tx, objective, EMA).compile().as_text()
  assert ' sort(' not in hlo
  lines = [line for line in hlo.splitlines() if re.search(r' (all-\w+|collective-permute|reduce-scatter)\(', line)]
  shapes = [tuple(map(int, shape.split(','))) for line in lines for shape in re.findall(r'\w\d+\[([\d,]+)\]', line)]
  assert shapes
  candidates, gradients = B // 2 * 2 * 4 * K, L // 2 * D
  assert max(np.prod(shape) for shape in shapes) <= max(candidates, gradients, B // 2 * D)
  assert not any({B, B // 2} & set(shape) and {L, L // 2} & set(shape) for shape in shapes)


def test_weights_change_in_place():
  tx, objective = optimizer.adam(1e-3, warmup_steps=2), losses.TopK(((K, 1.0),), auxk=0)
  with jax.set_mesh(sharding.make_mesh()):
    hlo = train_step.train_steps.lower(start(tx, ema=0), activations(1), tx, objective).compile().as_text()
  copied = re.findall(rf'= f32\[{L},{D}\]\S* copy\(%(\S+)\)', hlo)
  assert [name for name in copied if 'broadcast' not in name] == []  # but for zeros, which two gradients begin with


def test_the_decoder_keeps_unit_norm_and_its_update_is_across_its_rows(mesh):
  learning_rate = 1e-3
  tx = optax.sgd(learning_rate)
  state = start(tx, ema=0)
  before = weights(state.sae)['decoder']
  state, _ = train_step.train_steps(state, activations(1, 1), tx, losses.TopK(((K, 1.0),), auxk=0))
  after = weights(state.sae)['decoder']
  np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-6)
  change = after - before
  assert np.abs(change).max() > 1e-5
  along = np.sum(change * before, axis=1)
  # A step across a unit row, brought back to norm 1, leaves only the second-order part along it.
  np.testing.assert_allclose(along, -np.sum(change**2, axis=1) / 2, atol=1e-6)


def test_training_lowers_the_loss_and_the_average_follows():
  tx = optimizer.adam(3e-3, warmup_steps=5)
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    state, metrics = train_step.train_steps(start(tx), activations(3, 60), tx, OBJECTIVE, EMA)
  loss = np.asarray(metrics['normalized_mse'])
  assert loss[-5:].mean() < 0.7 * loss[:5].mean()
  kept = weights(train_step.trained_sae(state, EMA))['encoder']
  assert 1e-4 < np.abs(kept - weights(state.sae)['encoder']).max() < 0.05


def test_before_the_first_step_the_average_is_the_weights(mesh):
  state = start(optimizer.adam(1e-3))
  np.testing.assert_array_equal(weights(train_step.trained_sae(state, EMA))['encoder'], weights(state.sae)['encoder'])


def test_the_average_is_corrected_for_its_start_and_has_unit_rows(mesh):
  state = start(optimizer.adam(1e-3))
  expected = weights(state.sae)
  average = jax.tree.map(lambda x: (1 - EMA**3) * x, state.sae)  # three steps that changed nothing
  average.decoder[...] *= 0.99  # rows that turned: their mean is shorter than they
  kept = weights(train_step.trained_sae(state._replace(ema=average, step=3), EMA))
  for name in sae.PARAMETERS:
    np.testing.assert_allclose(kept[name], expected[name], rtol=1e-5, atol=1e-8)
