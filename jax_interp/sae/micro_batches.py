"""A batch in parts: gradients are summed over micro-batches, so that what a step allocates is that of a part.

A batch of 131,072 tokens has 17 GB of pre-activations for every 32,768 latents of a device; sixteen parts have 1 GB.
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import sharding


@dataclasses.dataclass(frozen=True)
class MicroBatched:
  """A recipe that takes another's gradients over n parts of every batch, and their mean.

  The loss is the other's, if that is a mean over tokens. What a recipe takes from a whole batch it takes from a part:
  the variance that AuxK is divided by, and the tokens that share the latents of BatchTopK. The dead clock goes on from
  part to part.

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
    # Every n-th row is of one part: so every part lies on all devices, and no row moves.
    parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, self.n, a.shape[-1]), 1, 0), (x_bd, target_bd))

    def add(carry, part):
      total, clock_l = carry
      x_bd, target_bd = (sharding.constrain(a, 'batch d_model') for a in part)
      metrics, clock_l, grads = self.recipe.loss_and_grads(sae, x_bd, target_bd, clock_l, mse_scale, step, *row_scale_l)
      metrics.pop('grad_norm', None)  # of a part
      return (jax.tree.map(jnp.add, total, grads), clock_l), metrics

    zeros = jax.tree.map(jnp.zeros_like, sae)
    (total, tokens_since_fired_l), metrics = jax.lax.scan(add, (zeros, tokens_since_fired_l), parts)
    metrics = {name: x_n[-1] if name == 'dead' else x_n.mean(0) for name, x_n in metrics.items()}
    return metrics, tokens_since_fired_l, jax.tree.map(lambda grad: grad / self.n, total)
