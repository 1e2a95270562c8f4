"""Training steps: equal on every mesh, nothing retraces, nothing large travels, the decoder keeps its norm."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jax_interp.sae import hlo, losses, optimizer, resample, train_step
from jax_interp.sae.batch_topk import BatchTopK
from jax_interp.sae.gated import Gated
from jax_interp.sae.jumprelu import JumpReLU
from jax_interp.sae.micro_batches import MicroBatched
from jax_interp.sae.prolu import ProLU
from jax_interp.sae.relu_l1 import ReLUL1
from models import activation_functions, sae, sharding

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


def largest_moved(hlo_text, mesh_shape):
  """Returns the numbers of the largest array that a device gives to a collective or gets from one, in any branch."""
  largest = 0
  for collective in hlo.read(hlo_text, mesh_shape).collectives:
    sizes = [math.prod(map(int, dims.split(','))) for dims in re.findall(r'\w\[(\d[\d,]*)\]', collective.shape)]
    if collective.op == 'all-to-all':
      sizes = [sum(sizes)]  # one array in parts
    given = collective.n_devices if collective.op == 'reduce-scatter' else 1
    largest = max([largest, *(given * size for size in sizes)])
  return largest


LARGE = B // 2 * L // 4  # what a device of 2x4 has of [batch, latent]
MOVES = {
  'all-reduce': lambda x: jax.lax.psum(x, 'model').sum(),
  'all-gather': lambda x: jnp.sin(jax.lax.all_gather(x, 'model')).sum(),
  'reduce-scatter': lambda x: jax.lax.psum_scatter(x, 'model', scatter_dimension=1, tiled=True).sum(),
  'all-to-all': lambda x: jnp.cumsum(jax.lax.all_to_all(x, 'model', 0, 1, tiled=True)).max(),
  'collective-permute': lambda x: jnp.cumsum(jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)])).max(),
}


@pytest.mark.parametrize('op', MOVES)
def test_what_is_large_and_crosses_devices_is_seen(op):
  def f(x_bl, which):
    local = lambda x_bl: jax.lax.cond(which, MOVES[op], lambda x_bl: x_bl[0, 0], jnp.sin(x_bl))[None, None]
    spec = P('data', 'model')
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x_bl)

  with jax.set_mesh(sharding.make_mesh(2, 4)):
    x_bl = sharding.place(np.zeros((64, 512), np.float32), 'batch latent')
    text = jax.jit(f).lower(x_bl, True).compile().as_text()
  (found,) = [c for c in hlo.read(text, {'data': 2, 'model': 4}).collectives if c.branch]
  assert found.op == op
  assert largest_moved(text, {'data': 2, 'model': 4}) >= LARGE


COEF = 0.3
RECIPES = {
  'topk': ('topk', losses.TopK(((4, 1.0),), auxk=16, dead_tokens=2 * B)),
  'multi_topk': ('topk', losses.TopK(((4, 1.0), (16, 1 / 8)), auxk=16, dead_tokens=2 * B)),
  'batch_topk': ('topk', BatchTopK(4, 16, dead_tokens=2 * B)),
  'matryoshka': ('topk', BatchTopK(4, 16, dead_tokens=2 * B, prefixes=(100, 200, L))),
  'relu': ('relu', ReLUL1(COEF)),
  'relu_weighted': ('relu', ReLUL1(COEF, weighted=True)),
  'prolu': ('prolu', ProLU(COEF)),
  'gated': ('gated', Gated(COEF)),
  'jumprelu_l0': ('jumprelu', JumpReLU(COEF)),
  'jumprelu_target': ('jumprelu', JumpReLU(COEF, 'target', target_l0=7)),
  'jumprelu_tanh': ('jumprelu', JumpReLU(COEF, 'tanh', preact_coef=0.5)),
}
RECIPES |= {f'{name}_in_parts': (RECIPES[name][0], MicroBatched(RECIPES[name][1], 2)) for name in ('topk', 'gated')}


@pytest.mark.parametrize('name', RECIPES)
def test_nothing_of_batch_by_latents_crosses_devices(name):
  """Nor what one device has of B tokens, a part, in any branch; gradients, tokens and candidates are smaller."""
  kind, recipe = RECIPES[name]
  own = {'gated': ('r_mag', 'mag_bias'), 'jumprelu': ('threshold',)}.get(kind, ())
  arrays = {'encoder': np.ones((L, D), np.float32), 'decoder': np.ones((L, D), np.float32)}
  arrays |= {'pre_bias': np.zeros(D, np.float32), **dict.fromkeys(('latent_bias', *own), np.zeros(L, np.float32))}
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    model = sae.build(arrays, {'activation': kind} | ({'k': 4} if kind == 'topk' else {}))
    x_bd = np.zeros((getattr(recipe, 'n', 1) * B, D), np.float32)
    run = jax.jit(recipe.loss_and_grads)
    text = run.lower(model, x_bd, x_bd, np.zeros(L, np.int32), 1.0, 0).compile().as_text()
  assert 0 < largest_moved(text, {'data': 2, 'model': 4}) < LARGE
  if kind == 'topk':  # AuxK
    assert any(collective.branch for collective in hlo.read(text, {'data': 2, 'model': 4}).collectives)


def test_nor_does_resampling_send_them():
  n = 32 * B  # so that [latent, d], which it may send, is small beside [batch, latent]
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    acts_bd = sharding.place(np.random.default_rng(0).normal(size=(n, D)).astype(np.float32), 'row d_model')
    model = sae.init_tied(jax.random.key(0), acts_bd, L, activation_functions.ReLU())
    clock_l = sharding.place(np.zeros(L, np.int32), 'latent')
    state = model, optimizer.adam(1e-3).init(model), clock_l, acts_bd, jax.random.key(0)
    text = resample.resample.lower(*state, dead_tokens=10).compile().as_text()
  assert 0 < largest_moved(text, {'data': 2, 'model': 4}) < n // 2 * L // 4


def test_a_step_moves_no_pre_activations_and_sorts_nothing():
  tx = optimizer.adam(1e-3, warmup_steps=2)
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    objective = losses.TopK(OBJECTIVE.levels, auxk=0)
    text = train_step.train_steps.lower(start(tx), activations(1), tx, objective, EMA).compile().as_text()
  assert ' sort(' not in text
  assert 0 < largest_moved(text, {'data': 2, 'model': 2}) < B // 2 * L // 2


@pytest.mark.parametrize('kernels', ['sparse', 'grouped'])
def test_weights_change_in_place(kernels):
  tx, objective = optimizer.adam(1e-3, warmup_steps=2), losses.TopK(((K, 1.0),), auxk=0, kernels=kernels)
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
