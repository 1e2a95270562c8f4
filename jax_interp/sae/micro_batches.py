"""A batch in parts: gradients are summed over micro-batches, so that what a step allocates is that of a part.

A batch of 131,072 tokens has 17 GB of pre-activations for every 32,768 latents of a device; sixteen parts have 1 GB.
TopK keeps no more than a block of them anyway: its parts are for arrays of [batch, d], where d is large.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from models import sharding


@dataclasses.dataclass(frozen=True)
class MicroBatched:
  """A recipe that takes another's gradients over n parts of every batch, and their mean.

  The loss is the other's, if that is a mean over tokens. What a recipe takes from a whole batch it takes from a part:
  the variance that AuxK is divided by, and the tokens that share the latents of BatchTopK. The dead clock goes on from
  part to part. However many parts, devices add their gradients once.

  Attributes:
    recipe: the other.
    n: how many parts; it must divide the batch, and the mesh's data axis the parts.
  """

  recipe: object
  n: int

  @property
  def unit_norm(self) -> bool:
    return self.recipe.unit_norm

  @property
  def scales_rows(self) -> bool:
    return getattr(self.recipe, 'scales_rows', False)

  @property
  def parity(self) -> bool:
    return getattr(self.recipe, 'parity', False)

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step, *row_scale_l):
    """See `train_step.Recipe`.

    Raises:
      ValueError: the batch is not divisible by n, or a part by the data axis.
    """
    if len(x_bd) % self.n:
      raise ValueError(f'a batch of {len(x_bd)} is not divisible by {self.n} micro-batches; choose a divisor')
    sharding.check_divides('a micro-batch of', len(x_bd) // self.n, 'data')
    batch = x_bd, target_bd, tokens_since_fired_l
    return self.recipe.loss_and_grads(sae, *batch, mse_scale, step, *row_scale_l, n_parts=self.n)


def over_parts(
  of_part: Callable[..., tuple[dict[str, jax.Array], jax.Array, object]],
  n: int,
  tokens_since_fired_l: jax.Array,
  *batch: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array, object]:
  """Returns metrics, the dead clock and gradients of this device's tokens, inside a map.

  Metrics and gradients are the means over n parts, but for how many latents are dead after the last one.

  Args:
    of_part: the dead clock and a part to its metrics, the dead clock after it, and a pytree of gradients.
    n: how many parts.
    tokens_since_fired_l: the dead clock before the batch.
    batch: arrays [b, ...], all of the same tokens.
  """
  if n == 1:
    return of_part(tokens_since_fired_l, *batch)
  parts = tuple(a.reshape(n, -1, *a.shape[1:]) for a in batch)

  def add(carry, part):
    total, clock_l = carry
    metrics, clock_l, grads = of_part(clock_l, *part)
    return (jax.tree.map(jnp.add, total, grads), clock_l), metrics

  # Never computed, only what zeros are made like: they vary over the same axes of the mesh.
  *_, like = of_part(tokens_since_fired_l, *(a[0] for a in parts))
  zeros = jax.tree.map(jnp.zeros_like, like)
  (total, tokens_since_fired_l), metrics = jax.lax.scan(add, (zeros, tokens_since_fired_l), parts)
  metrics = {name: x_n[-1] if name == 'dead' else x_n.mean(0) for name, x_n in metrics.items()}
  return metrics, tokens_since_fired_l, jax.tree.map(lambda grad: grad / n, total)
