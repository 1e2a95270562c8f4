"""A batch in parts has the loss, gradients and dead clock of the whole, where the loss is a mean over tokens."""

import jax
import numpy as np
import pytest

from jax_interp.sae import hlo, losses, optimizer, train_step
from jax_interp.sae.gated import Gated
from jax_interp.sae.micro_batches import MicroBatched
from models import sae, sharding
from models.activation_functions import Gated as GatedActivation

B, D, L, K = 64, 12, 64, 4
ACTS = np.random.default_rng(0).normal(1, 2, size=(3, B, D)).astype(np.float32)
TOPK = losses.TopK(((K, 1.0), (4 * K, 1 / 8)), auxk=0)
GATED = Gated(0.3)


def start(recipe):
  if recipe is TOPK:
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


def test_parts_are_smaller_than_the_whole():
  with jax.set_mesh(sharding.make_mesh()):
    acts_sbd = np.zeros((1, 4096, D), np.float32)
    tx, temporary = optimizer.adam(1e-3), []
    for objective in (GATED, MicroBatched(GATED, 8)):
      state = train_step.init_state(start(GATED), ACTS[0], tx)
      compiled = train_step.train_steps.lower(state, acts_sbd, tx, objective).compile()
      temporary.append(compiled.memory_analysis().temp_size_in_bytes)
  assert temporary[1] < temporary[0] / 4


@pytest.mark.parametrize('recipe', [TOPK, GATED], ids=['topk', 'gated'])
def test_devices_add_their_gradients_once(recipe):
  mesh_shape, times = {'data': 2, 'model': 2}, []
  with jax.set_mesh(sharding.make_mesh(**mesh_shape)):
    clock = np.zeros(L, np.int32)
    for objective in (recipe, MicroBatched(recipe, 4)):
      step = jax.jit(objective.loss_and_grads).lower(start(recipe), ACTS[0], ACTS[0], clock, 1.0, 0).compile()
      found = [c for c in hlo.read(step.as_text(), mesh_shape).collectives if 'data' in c.axis]
      times.append(sum(c.times for c in found if f'[{L // 2},{D}]' in c.shape))
  assert times[0] == times[1] > 0


@pytest.mark.parametrize(
  ('n', 'message'),
  [(7, 'a batch of 64 is not divisible by 7 micro-batches'), (64, 'a micro-batch of 1 is not divisible by the data')],
)
def test_parts_that_do_not_divide_raise(n, message):
  with jax.set_mesh(sharding.make_mesh(2, 1)), pytest.raises(ValueError, match=message):
    MicroBatched(TOPK, n).loss_and_grads(start(TOPK), ACTS[0], ACTS[0], np.zeros(L, np.int32), 1.0, 0)
