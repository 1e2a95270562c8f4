"""The learning rate rises, stays and falls as said; Adam takes it; what does not fit raises."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import optimizer


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
