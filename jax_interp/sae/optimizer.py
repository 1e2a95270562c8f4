"""Adam and its learning rate: a warm-up, a constant, and a decay at the end; float32 moments whatever the compute."""

import functools
import math

import jax
import jax.numpy as jnp
import optax

DECAYS = ('constant', 'linear', 'cosine')
LATENTS_OF_BASE_RATE, BASE_RATE = 2**14, 2e-4


def scaled_rate(n_latents: int) -> float:
  """Returns 2e-4 / sqrt(n_latents / 2^14): the best rate falls as 1 / sqrt(n_latents) (Gao et al. 2024, section 3.1).

  The constant is that of the libraries sparsify and dictionary_learning.
  """
  return BASE_RATE / (n_latents / LATENTS_OF_BASE_RATE) ** 0.5


def schedule(
  step: jax.Array, learning_rate: float, warmup_steps: int = 0, decay: str = 'constant', decay_steps: int = 0, n_steps=0
) -> jax.Array:
  """Returns the learning rate of a step, counted from 0.

  Args:
    step: how many were made before.
    learning_rate: the constant between warm-up and decay.
    warmup_steps: over which the rate rises linearly; the last of them has the whole rate.
    decay: 'constant', 'linear' or 'cosine'.
    decay_steps: the last steps, over which the rate falls to 0; the step after the last would have 0.
    n_steps: of the whole training.
  """
  warm = jnp.minimum(1, (step + 1) / max(warmup_steps, 1))
  left = jnp.clip((n_steps - step) / max(decay_steps, 1), 0, 1)
  fall = {'constant': 1, 'linear': left, 'cosine': (1 - jnp.cos(jnp.pi * left)) / 2}[decay]
  return learning_rate * warm * fall


@functools.cache  # static to `train_steps`: equal settings must be the same object, or that compiles again
def adam(
  learning_rate: float,
  warmup_steps: int = 0,
  eps: float = 6.25e-10,
  clip: float = 0,
  b1: float = 0.9,
  b2: float = 0.999,
  decay: str = 'constant',
  decay_steps: int = 0,
  n_steps: int = 0,
  threshold_rate: float = 1,
) -> optax.GradientTransformation:
  """Returns Adam at the rate of `schedule`, behind a clip of the gradients' global norm where `clip` is above 0.

  Thresholds of JumpReLU move at threshold_rate times that rate; other than 1, the parameters must be a JumpReLU SAE's.

  Raises:
    ValueError: the decay is unknown, or its steps or the warm-up's do not fit into n_steps.
  """
  if decay not in DECAYS:
    raise ValueError(f'decay {decay!r} is unknown; choose one of {", ".join(DECAYS)}')
  if decay != 'constant' and not 0 < decay_steps <= n_steps - warmup_steps:
    raise ValueError(
      f'{decay_steps} steps of {decay} decay do not fit behind {warmup_steps} of warm-up into {n_steps}; choose fewer'
    )
  rate = functools.partial(
    schedule,
    learning_rate=learning_rate,
    warmup_steps=warmup_steps,
    decay=decay,
    decay_steps=decay_steps,
    n_steps=n_steps,
  )
  clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
  # Nested, so that the state is built as that of `optax.adam`.
  stages = [clipped, optax.chain(_scale_by_adam(b1, b2, eps), optax.scale_by_learning_rate(rate))]
  if threshold_rate != 1:
    stages.append(optax.stateless(functools.partial(_faster_thresholds, threshold_rate)))
  return optax.chain(*stages)


def _faster_thresholds(rate, updates, params):
  updates = jax.tree.map(lambda x: x, updates)  # not to change the caller's
  updates.activation.threshold[...] *= rate
  return updates


def _scale_by_adam(b1, b2, eps):
  """Returns `optax.scale_by_adam` with the corrections for the moments' start in scalars, and these to all digits.

  m / c1 / (sqrt(v / c2) + eps) is sqrt(c2) / c1 * m / (sqrt(v) + eps sqrt(c2)): one division a weight, not two. Of
  c = 1 - b^t, float32 would keep only five digits at the first steps.
  """

  def update(grads, state, params=None):
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    c1, c2 = (-jnp.expm1(count * math.log(b)) if b else 1 for b in (b1, b2))
    scale, eps_v = c2**0.5 / c1, eps * c2**0.5
    updates = jax.tree.map(lambda m, v: scale * (m / (jnp.sqrt(v) + eps_v)), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)
