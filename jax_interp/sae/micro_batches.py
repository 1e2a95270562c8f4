"""A batch in parts: gradients are summed over micro-batches, so that what a step allocates is that of a part.

A batch of 131,072 tokens has 17 GB of pre-activations for every 32,768 latents of a device; sixteen parts have 1 GB.
TopK keeps no more than a block of them anyway: its parts are for arrays of [batch, d], where d is large.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models import sharding


@dataclasses.dataclass(frozen=True)
class MicroBatched:
  """A recipe that takes another's gradients over n parts of every batch, and their mean.

  The loss is the other's, if that is a mean over tokens. What a recipe takes from a whole batch it takes from a part:
  the variance that AuxK is divided by, and the tokens that share the latents of BatchTopK. The i-th part has every n-th
  token, from the i-th on: the same ones on every mesh, and of each device as many. The dead clock goes on from part to
  part. However many parts, devices add their gradients once.

  Attributes:
    recipe: the other.
    n: how many parts; it must divide the batch, and the devices of the mesh the parts.
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
      ValueError: the batch is not divisible by n, or a part by the devices of the mesh.
    """
    if len(x_bd) % self.n:
      raise ValueError(f'a batch of {len(x_bd)} is not divisible by {self.n} micro-batches; choose a divisor')
    sharding.check_divides('a micro-batch of', len(x_bd) // self.n, sharding.AXES['row'])
    batch = x_bd, target_bd, tokens_since_fired_l
    return self.recipe.loss_and_grads(sae, *batch, mse_scale, step, *row_scale_l, n_parts=self.n)


def rows_spec(n_rows: int, axes: tuple[str, ...] = ('data', 'model')) -> P:
  """Returns how the rows of a batch come into a map over these axes that calls `over_parts`.

  Each is on one device, if all devices divide them: those of a row of the mesh, which all need them, normalise each its
  own and send them to each other a part at a time, and a host need only send each row once.
  """
  if sharding.is_cut('model') and sharding.divides(axes, n_rows):
    return P(axes)
  return P(tuple(axis for axis in axes if axis != 'model'))


def over_parts(
  of_part: Callable[..., tuple[dict[str, jax.Array], jax.Array, object]],
  n: int,
  tokens_since_fired_l: jax.Array,
  x_bd: jax.Array,
  target_bd: jax.Array | None,
) -> tuple[dict[str, jax.Array], jax.Array, object]:
  """Returns metrics, the dead clock and gradients of the tokens of this device's row of the mesh, inside a map.

  Tokens that are cut over `model` too are sent to all devices of the row, a part at a time. Metrics and gradients are
  the means over n parts, but for how many latents are dead after the last one.

  Args:
    of_part: the dead clock, x and targets of a part to its metrics, the dead clock after it, and a pytree of gradients.
    n: how many parts.
    tokens_since_fired_l: the dead clock before the batch.
    x_bd: tokens, cut as `rows_spec` says.
    target_bd: what is reconstructed, cut alike; None if it is x_bd, which is then sent once.
  """

  def of(tokens_since_fired_l, i):
    x, target = (None if a is None else _part(a, i, n) for a in (x_bd, target_bd))
    return of_part(tokens_since_fired_l, x, x if target is None else target)

  if n == 1:
    return of(tokens_since_fired_l, 0)

  def add(carry, i):
    total, clock_l = carry
    metrics, clock_l, grads = of(clock_l, i)
    return (jax.tree.map(jnp.add, total, grads), clock_l), metrics

  # Never computed, only what zeros are made like: they vary over the same axes of the mesh.
  *_, like = of(tokens_since_fired_l, 0)
  zeros = jax.tree.map(jnp.zeros_like, like)
  (total, tokens_since_fired_l), metrics = jax.lax.scan(add, (zeros, tokens_since_fired_l), jnp.arange(n))
  metrics = {name: x_n[-1] if name == 'dead' else x_n.mean(0) for name, x_n in metrics.items()}
  return metrics, tokens_since_fired_l, jax.tree.map(lambda grad: grad / n, total)


def _part(x_bd, i, n):
  """Returns the i-th of n parts of the tokens of this device's row of the mesh, of which x_bd are this device's."""
  own_bd = x_bd if n == 1 else x_bd.reshape(-1, n, x_bd.shape[1])[:, i]
  if 'model' not in jax.typeof(x_bd).manual_axis_type.varying:
    return own_bd
  return jax.lax.all_gather(own_bd, 'model', tiled=True, to='invarying')
