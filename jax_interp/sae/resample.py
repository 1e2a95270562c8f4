"""Resampling: dead latents begin anew in the directions of badly reconstructed inputs (Bricken et al. 2023).

The recipe's answer to latents that an L1 penalty has killed; their Adam moments begin at zero again, or the next steps
would undo what was set.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import sharding
from models.sae import SparseAutoencoder, named_parameters, unit_rows

ENCODER_NORM = 0.2  # of a fresh encoder row, relative to the living ones' mean
BLOCK = 4096  # inputs that are encoded at a time: those of a whole dispatch would have more latents than fit in memory


@functools.partial(jax.jit, static_argnames=('dead_tokens', 'exponent'), donate_argnames=('sae', 'opt'))
def resample(
  sae: SparseAutoencoder,
  opt: optax.OptState,
  tokens_since_fired_l: jax.Array,
  acts_bd: jax.Array,
  key: jax.Array,
  dead_tokens: int,
  exponent: float = 2,
) -> tuple[SparseAutoencoder, optax.OptState, jax.Array]:
  """Returns the SAE, its optimizer's state and the dead clock with the dead latents made anew.

  Each draws an input x, normalised and minus pre_bias, with a probability in proportion to its loss |x - recons|^2 to
  the power of `exponent`. Its decoder row becomes x / |x| (of an x that is 0, a random direction), its encoder row the
  same times 0.2 of the mean norm of the living ones' encoder rows, its latent bias and a gated SAE's r_mag and mag_bias
  0, and its Adam moments 0. Where no latent is alive 0.2 is the norm.

  Args:
    sae: donated; no transcoder, whose decoder rows live in another space than its inputs.
    opt: donated; of `optimizer.adam`.
    tokens_since_fired_l: the dead clock.
    acts_bd: raw activations to draw from.
    key: of the draws, which depend on neither the mesh nor the order of the inputs.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    exponent: 2 is a probability in proportion to the square of the loss, as in the paper.
  """
  dead_l = tokens_since_fired_l > dead_tokens
  log_odds_b = exponent * jnp.log(jnp.maximum(_losses(sae, acts_bd), jnp.finfo(jnp.float32).tiny))
  # The inputs are drawn in an order of their own: that of the batch depends on the number of processes. Two keys, as 32
  # bits of some inputs of a large batch agree by chance.
  order_b = jnp.lexsort((_digest(acts_bd), acts_bd[:, 0]))
  # Not random.categorical, which makes noise of [latent, batch].
  drawn_l = order_b[jax.random.choice(key, len(acts_bd), dead_l.shape, p=jax.nn.softmax(log_odds_b[order_b]))]
  x_ld = sharding.constrain(_centred(sae, acts_bd[drawn_l]), 'latent d_model')
  rows_ld = sharding.constrain(directions(x_ld, jax.random.fold_in(key, 1)), 'latent d_model')
  norms_l = jnp.linalg.norm(sae.encoder[...], axis=1)
  n_alive = jnp.sum(~dead_l)
  alive_norm = jnp.where(n_alive > 0, jnp.sum(jnp.where(dead_l, 0, norms_l)) / jnp.maximum(n_alive, 1), 1)

  fresh = {'encoder': ENCODER_NORM * alive_norm * rows_ld, 'decoder': rows_ld, 'latent_bias': jnp.zeros(())}
  fresh |= dict.fromkeys(sae.activation.parameters, jnp.zeros(()))
  params = named_parameters(sae)
  for name, value in fresh.items():
    param = params[name]
    param[...] = jnp.where(_as_rows(dead_l, param[...]), value, param[...])
  return sae, _without_moments(opt, dead_l), jnp.where(dead_l, 0, tokens_since_fired_l)


def directions(x_ld: jax.Array, key: jax.Array) -> jax.Array:
  """Returns the rows scaled to norm 1, also those whose squares are too small for float32; of a row of 0, random."""
  largest_l1 = jnp.max(jnp.abs(x_ld), axis=1, keepdims=True)
  is_zero_l1 = largest_l1 < jnp.finfo(x_ld.dtype).tiny
  return unit_rows(jnp.where(is_zero_l1, jax.random.normal(key, x_ld.shape), x_ld / largest_l1))


def _centred(sae, acts_bd):
  return sae.normalize(acts_bd)[0] - sae.pre_bias[...]


def _losses(sae, acts_bd):
  """Returns |x - recons|^2 of each input, [b], of which no more than BLOCK have their latents in memory at a time."""
  n_tokens, d = acts_bd.shape
  n_blocks = -(-n_tokens // BLOCK)
  n_each = -(-n_tokens // n_blocks)
  n_each += -n_each % sharding.n_parts(sharding.AXES['row'])
  padded_bd = jnp.pad(acts_bd, ((0, n_blocks * n_each - n_tokens), (0, 0)))
  # A block is every n-th input, so that it is cut as the batch was.
  acts_nbd = sharding.constrain(padded_bd.reshape(n_each, n_blocks, d).swapaxes(0, 1), 'block row d_model')

  def losses(acts_bd):
    x_bd = _centred(sae, sharding.constrain(acts_bd, 'batch d_model'))
    linear_bl = sharding.constrain(x_bd @ sae.encoder[...].T, 'batch latent')
    recons_bd = sae.activation(linear_bl, sae.latent_bias[...]) @ sae.decoder[...]
    return jnp.sum((recons_bd - x_bd) ** 2, axis=1)

  return jax.lax.map(losses, acts_nbd).T.reshape(-1)[:n_tokens]


def _digest(x_bd):
  """Returns an integer [b] of each input's bits, to order them by: its sum is the same on every mesh."""
  kind = jnp.dtype(f'uint{8 * x_bd.dtype.itemsize}')
  # Odd factors: another value of one coordinate is always another sum.
  odd_d = jax.random.bits(jax.random.key(0), x_bd.shape[1:], jnp.uint32) | 1
  return jnp.sum(jax.lax.bitcast_convert_type(x_bd, kind).astype(jnp.uint32) * odd_d, axis=1)


def _as_rows(dead_l, x):
  return dead_l if x.ndim == 1 else dead_l[:, None]


def _without_moments(opt: Any, dead_l):
  """Returns the optimizer's state with the moments of dead latents at zero; those are parameters over `model`."""

  def reset(x):
    if not isinstance(x, nnx.Param) or x.out_sharding[0] != 'model':
      return x
    x[...] = jnp.where(_as_rows(dead_l, x[...]), 0, x[...])
    return x

  return jax.tree.map(reset, opt, is_leaf=lambda x: isinstance(x, nnx.Param))
