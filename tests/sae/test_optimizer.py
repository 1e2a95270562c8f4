"""The learning rate rises, stays and falls as said; Adam takes it; what does not fit raises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_interp.sae import optimizer
from models import activation_functions, sae, sharding


@pytest.mark.parametrize(
  ('decay', 'expected'),
  [
    ('constant', [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
    ('linear', [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ('cosine', [0.25, 0.5, 0.75, 1, 1, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
  ],
)
def test_the_rate_of_every_step(decay, expected):
  rates = [float(optimizer.schedule(jnp.asarray(step), 3.0, 4, decay, 4, 10)) for step in range(10)]
  np.testing.assert_allclose(rates, 3 * np.array(expected), rtol=1e-6)


def test_adam_moves_by_the_rate_where_gradients_are_constant():
  tx = optimizer.adam(1.0, 2, decay='linear', decay_steps=2, n_steps=6)
  params, grads = {'x': jnp.ones(3)}, {'x': jnp.ones(3)}
  state, moved = tx.init(params), []
  for _ in range(6):
    updates, state = tx.update(grads, state, params)
    moved.append(float(updates['x'][0]))
  np.testing.assert_allclose(moved, [-0.5, -1, -1, -1, -1, -0.5], rtol=1e-4)


@pytest.mark.parametrize(('b1', 'b2'), [(0.9, 0.999), (0.0, 0.9)])
def test_adam_is_that_of_float64_and_its_state_is_optaxs(b1, b2):
  rng, eps, rate = np.random.default_rng(0), 1e-3, 1e-2
  tx, params = optimizer.adam(rate, eps=eps, b1=b1, b2=b2), {'x': jnp.zeros(50)}
  state, m, v = tx.init(params), 0, 0
  assert jax.tree.structure(state[1]) == jax.tree.structure(optax.adam(lambda step: rate).init(params))
  for t in range(1, 21):
    grads = (rng.normal(size=50) * 10.0 ** rng.integers(-4, 2, size=50)).astype(np.float32)
    moved, state = tx.update({'x': jnp.asarray(grads)}, state)
    grads = grads.astype(np.float64)
    m, v = b1 * m + (1 - b1) * grads, b2 * v + (1 - b2) * grads**2
    expected = -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(moved['x'], expected, rtol=3e-6, atol=1e-9, err_msg=f'step {t}')


def test_moments_in_bfloat16_would_not_fall_where_gradients_do():
  """A step takes a thousandth off the second moment; numbers in bfloat16 are 4 to 8 thousandths apart."""
  grads_sx = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
  grads_sx[500:] /= 100
  tx = optimizer.adam(1e-2)

  def run(dtype):
    def step(state, grads_x):
      moved_x, state = tx.update(grads_x, state)
      state = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype) if x.dtype == jnp.float32 else x, state)
      return state, (moved_x, state[1][0].nu)

    return jax.device_get(jax.jit(lambda grads_sx: jax.lax.scan(step, tx.init(grads_sx[0]), grads_sx)[1])(grads_sx))

  m, v, expected, second = 0, 0, [], []
  for t, grads_x in enumerate(grads_sx.astype(np.float64), start=1):
    m, v = 0.9 * m + 0.1 * grads_x, 0.999 * v + 0.001 * grads_x**2
    expected.append(-1e-2 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 6.25e-10))
    second.append(v)
  (moved_sx, second_sx), (rounded_moved_sx, rounded_second_sx) = run(jnp.float32), run(jnp.bfloat16)
  size = lambda moved_sx: np.linalg.norm(moved_sx[-100:])
  assert size(moved_sx - np.array(expected)) < 1e-5 * size(np.array(expected))
  np.testing.assert_allclose(second_sx[-1], second[-1], rtol=2e-5)  # as a float32, 0.999 is 1.3e-8 off
  assert (second[-1] < 0.38 * second[499]).all()  # 1 / e
  assert (rounded_second_sx[-1] > 0.99 * rounded_second_sx[499]).all()
  assert size(rounded_moved_sx) < 0.7 * size(np.array(expected))


def test_thresholds_move_faster_and_nothing_else_does():
  with jax.set_mesh(sharding.make_mesh()):
    threshold = activation_functions.JumpReLU(np.ones(8, np.float32))
    params = sae.with_activation(sae.init_sae(jax.random.key(0), np.eye(4, dtype=np.float32), 8, 2), threshold)
    grads = jax.tree.map(jnp.ones_like, params)
    plain, faster = (optimizer.adam(1e-2, threshold_rate=rate) for rate in (1, 30))
    moved, moved_faster = (sae.named_parameters(tx.update(grads, tx.init(params))[0]) for tx in (plain, faster))
  assert moved.keys() == moved_faster.keys()
  for name, x in moved.items():
    np.testing.assert_allclose(moved_faster[name][...], x[...] * (30 if name == 'threshold' else 1), rtol=1e-6)


def test_the_rate_falls_with_the_root_of_the_latents():
  assert optimizer.scaled_rate(2**14) == 2e-4
  np.testing.assert_allclose(optimizer.scaled_rate(2**17), 7.07e-5, rtol=1e-3)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'decay': 'step'}, "decay 'step' is unknown; choose one of constant, linear, cosine"),
    ({'decay': 'linear', 'decay_steps': 9, 'warmup_steps': 2, 'n_steps': 10}, '9 steps of linear decay do not fit'),
    ({'decay': 'cosine', 'n_steps': 10}, '0 steps of cosine decay do not fit'),
  ],
)
def test_what_does_not_fit_raises(settings, message):
  with pytest.raises(ValueError, match=message):
    optimizer.adam(1e-3, **settings)
