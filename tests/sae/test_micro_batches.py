"""A batch in parts has the loss, gradients and dead clock of the whole, where the loss is a mean over tokens."""

import jax
import numpy as np
import pytest

from jax_interp.sae import hlo, losses, optimizer, train_step
from jax_interp.sae.batch_topk import BatchTopK
from jax_interp.sae.gated import Gated
from jax_interp.sae.jumprelu import JumpReLU
from jax_interp.sae.micro_batches import MicroBatched
from models import sae, sharding
from models.activation_functions import Gated as GatedActivation
from models.activation_functions import JumpReLU as JumpReLUActivation

B, D, L, K = 64, 12, 64, 4
ACTS = np.random.default_rng(0).normal(1, 2, size=(3, B, D)).astype(np.float32)
TOPK = losses.TopK(((K, 1.0), (4 * K, 1 / 8)), auxk=0)
GATED = Gated(0.3)
DEAD = 500
PER_PART = {
  'topk': losses.TopK(((K, 1.0),), auxk=8, dead_tokens=DEAD),
  'parity': losses.TopK(((K, 1.0),), auxk=8, dead_tokens=DEAD, parity=True),
  'skip': losses.TopK(TOPK.levels, auxk=8, dead_tokens=DEAD),
  'batch_topk': BatchTopK(K, 8, dead_tokens=DEAD),
  'jumprelu': JumpReLU(1.0, 'target', 0.5, target_l0=4),
}


def start(recipe):
  if isinstance(recipe, losses.TopK):
    return sae.init_sae(jax.random.key(0), ACTS[0], L, K)
  return sae.init_tied(jax.random.key(0), ACTS[0], L, GatedActivation(np.zeros(L, 'f'), np.zeros(L, 'f')))


@pytest.mark.parametrize('shape', [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize('recipe', [TOPK, GATED], ids=['topk', 'gated'])
def test_parts_train_as_the_whole(shape, recipe):
  results = []
  with jax.set_mesh(sharding.make_mesh(*shape)):
    for objective in (recipe, MicroBatched(recipe, 4)):
      tx = optimizer.adam(1e-3, clip=0.5)
      state = train_step.init_state(start(recipe), ACTS[0], tx, 0.9)
      state, metrics = train_step.train_steps(state, ACTS, tx, objective, 0.9)
      results.append((jax.device_get(metrics), np.asarray(state.tokens_since_fired_l), state))
  (whole, _, state), (parts, clock, other) = results
  assert whole.keys() == parts.keys()
  for name, value in whole.items():
    np.testing.assert_allclose(parts[name], value, rtol=2e-5, err_msg=name)
  for name, param in sae.named_parameters(state.sae).items():
    # Adam divides by the root of tiny second moments: where a gradient is near zero, rounding moves the weight.
    np.testing.assert_allclose(sae.named_parameters(other.sae)[name][...], param[...], atol=5e-5, err_msg=name)
  assert (clock % (B // 4) == 0).all()  # it goes on within a batch


@pytest.mark.parametrize('kind', PER_PART)
def test_a_batch_is_the_mean_of_its_parts(mesh, kind):
  recipe, n = PER_PART[kind], 4
  model, target_bd, row_scale = sae.init_sae(jax.random.key(0), ACTS[0], L, K), ACTS[0], ()
  if kind == 'jumprelu':
    model = sae.with_activation(model, JumpReLUActivation(np.full(L, 0.5, 'f')))
  if kind == 'skip':
    model, target_bd = sae.as_transcoder(jax.random.key(1), model, ACTS[1], skip=True), ACTS[1]
  if kind == 'topk':
    row_scale = (np.linspace(0.5, 2, L, dtype=np.float32),)
    model.decoder[...] /= row_scale[0][:, None]
  clock = np.where(np.arange(L) < 40, DEAD, 0).astype(np.int32)
  run, run_parts = (jax.jit(each.loss_and_grads) for each in (recipe, MicroBatched(recipe, n)))
  metrics, clock_after, grads = run_parts(model, ACTS[0], target_bd, clock, 0.3, 5, *row_scale)
  parts = []
  for i in range(n):
    of_part, clock, grads_of_part = run(model, ACTS[0][i::n], target_bd[i::n], clock, 0.3, 5, *row_scale)
    parts.append((of_part, sae.named_parameters(grads_of_part)))
  np.testing.assert_array_equal(clock_after, clock)
  assert metrics.get('auxk', 1) > 0
  expected_of = {name: np.mean([of_part[name] for of_part, _ in parts]) for name in metrics}
  expected_of['dead'] = parts[-1][0]['dead']
  squares = 0
  for name, grad in sae.named_parameters(grads).items():
    expected = np.mean([np.asarray(of_part[name][...]) for _, of_part in parts], axis=0)
    np.testing.assert_allclose(grad[...], expected, atol=2e-6 * np.abs(expected).max(), err_msg=name)
    squares += np.sum(expected**2)
  if row_scale:
    expected_of['grad_norm'] = squares**0.5  # not the mean of the parts'
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected_of[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize('kind', PER_PART)
def test_parts_are_the_same_tokens_on_every_mesh(kind):
  recipe, clock, results = PER_PART[kind], np.where(np.arange(L) < 40, DEAD, 0).astype(np.int32), []
  for shape in [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model = sae.init_sae(jax.random.key(0), ACTS[0], L, K)
      if kind == 'jumprelu':
        model = sae.with_activation(model, JumpReLUActivation(np.full(L, 0.5, 'f')))
      if kind == 'skip':
        model = sae.as_transcoder(jax.random.key(1), model, ACTS[1], skip=True)
      run = jax.jit(MicroBatched(recipe, 4).loss_and_grads)
      found = run(model, ACTS[0], ACTS[1] if kind == 'skip' else ACTS[0], clock, 0.3, 5)
      metrics, clock_l, grads = jax.device_get((*found[:2], sae.named_parameters(found[2])))
      results.append((metrics, clock_l, grads))
  (metrics, clock_l, grads), *others = results
  for other_metrics, other_clock_l, other_grads in others:
    np.testing.assert_array_equal(other_clock_l, clock_l)
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, err_msg=name)
    for name, grad in grads.items():
      np.testing.assert_allclose(other_grads[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


def test_parts_are_smaller_than_the_whole():
  with jax.set_mesh(sharding.make_mesh()):
    acts_sbd = np.zeros((1, 4096, D), np.float32)
    tx, temporary = optimizer.adam(1e-3), []
    for objective in (GATED, MicroBatched(GATED, 8)):
      state = train_step.init_state(start(GATED), ACTS[0], tx)
      compiled = train_step.train_steps.lower(state, acts_sbd, tx, objective).compile()
      temporary.append(compiled.memory_analysis().temp_size_in_bytes)
  assert temporary[1] < temporary[0] / 4


@pytest.mark.parametrize('recipe', [PER_PART['topk'], GATED], ids=['topk', 'gated'])
def test_devices_add_their_gradients_once(recipe):
  mesh_shape, added = {'data': 2, 'model': 2}, []
  with jax.set_mesh(sharding.make_mesh(**mesh_shape)):
    clock = np.zeros(L, np.int32)
    for objective in (recipe, MicroBatched(recipe, 4)):
      step = jax.jit(objective.loss_and_grads).lower(start(recipe), ACTS[0], ACTS[0], clock, 1.0, 0).compile()
      found = [c for c in hlo.read(step.as_text(), mesh_shape).collectives if 'data' in c.axis]
      n_of = lambda shape: sum(c.times * c.shape.count(shape) for c in found)  # noqa: B023
      added.append((n_of(f'f32[{L // 2},{D}]'), n_of(f'f32[{L // 2}]')))
  assert added[0] == added[1]
  assert added[0][0] == 2  # encoder and decoder


@pytest.mark.parametrize(
  ('n', 'message'),
  [
    (7, 'a batch of 64 is not divisible by 7 micro-batches'),
    (32, 'a micro-batch of 2 is not divisible by 4, the axes data and model'),
  ],
)
def test_parts_that_do_not_divide_raise(n, message):
  with jax.set_mesh(sharding.make_mesh(2, 2)), pytest.raises(ValueError, match=message):
    MicroBatched(TOPK, n).loss_and_grads(start(TOPK), ACTS[0], ACTS[0], np.zeros(L, np.int32), 1.0, 0)
