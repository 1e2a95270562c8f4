"""Recipes whose latents are all computed and all differentiated: what ReLU, ProLU, gated, JumpReLU and BatchTopK share.

A recipe says, for one shard's latents, what the loss is made of; here that becomes metrics, gradients and the dead
clock, in one shard_map. Tokens are cut over `data`, latents over `model`; between shards travel reconstructions and
gradients, never [batch, latent].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_interp.sae import micro_batches
from jax_interp.sae.losses import partition_specs
from models.sae import SparseAutoencoder


class Terms(NamedTuple):
  """What a recipe makes of a batch, inside the map.

  Attributes:
    latents_bl: this shard's; a latent fires where they are positive.
    recons_bd: of the target.
    parts: scalars whose sum is the loss, equal on all shards.
    metrics: more scalars to report.
  """

  latents_bl: jax.Array
  recons_bd: jax.Array
  parts: dict[str, jax.Array]
  metrics: dict[str, jax.Array] | None = None


def product(x_ij: jax.Array, y_jk: jax.Array, dtype: str) -> jax.Array:
  """Returns x y [i, k]: operands are rounded to the dtype, in its gradients' products too, and sums are float32."""
  if dtype == 'float32':
    return x_ij @ y_jk
  axes = [set(jax.typeof(a).manual_axis_type.varying) for a in (x_ij, y_jk)]
  vary = lambda a, others: jax.lax.pcast(a, tuple(others), to='varying') if others else a
  return _rounded_product(vary(x_ij, axes[1] - axes[0]), vary(y_jk, axes[0] - axes[1]), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x_ij, y_jk, dtype):
  return _rounded_product_forward(x_ij, y_jk, dtype)[0]


def _rounded_product_forward(x_ij, y_jk, dtype):
  x_ij, y_jk = x_ij.astype(dtype), y_jk.astype(dtype)
  return jnp.matmul(x_ij, y_jk, preferred_element_type=jnp.float32), (x_ij, y_jk)


def _rounded_product_backward(dtype, operands, grad_ik):
  x_ij, y_jk = operands
  product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  grad_ik = grad_ik.astype(dtype)
  return product(grad_ik, y_jk.T), product(x_ij.T, grad_ik)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def linear(sae: SparseAutoencoder, x_bd: jax.Array, dtype: str) -> jax.Array:
  """Returns encoder (x - pre_bias) [b, l] of this shard's latents, as `product` in a dtype.

  The gradient of pre_bias is taken through the encoder applied to it, so that no gradient of [batch, d] is computed.
  """
  pre_bias_d, encoder_ld = sae.pre_bias[...], sae.encoder[...]
  held_d = jax.lax.stop_gradient(pre_bias_d)
  return product(x_bd - held_d, encoder_ld.T, dtype) - encoder_ld @ (pre_bias_d - held_d)


def reconstruct(sae: SparseAutoencoder, latents_bl: jax.Array, x_bd: jax.Array, dtype: str) -> jax.Array:
  """Returns the reconstruction [b, d] of this shard's latents and all others', as `product` in a dtype."""
  return jax.lax.psum(product(latents_bl, sae.decoder[...], dtype), 'model') + constant(sae, x_bd)


def constant(sae: SparseAutoencoder, x_bd: jax.Array) -> jax.Array:
  """Returns the reconstruction without any latent: the bias, and the skip connection of a transcoder."""
  return bias(sae) if sae.skip is None else bias(sae) + (x_bd - sae.pre_bias[...]) @ sae.skip[...].T


def bias(sae: SparseAutoencoder) -> jax.Array:
  """Returns what is added to every reconstruction [d]."""
  return sae.out_bias[...] if sae.is_transcoder else sae.pre_bias[...]


def batch_mean(x) -> jax.Array:
  """Returns the mean over the tokens of all shards."""
  return jax.lax.pmean(jnp.mean(x), 'data')


def squared_error(error_bd: jax.Array) -> jax.Array:
  """Returns E|error|^2, summed over d."""
  return batch_mean(jnp.sum(error_bd**2, axis=1))


def sum_over_latents(x_bl: jax.Array) -> jax.Array:
  """Returns the sums [b] over the latents of all shards."""
  return jax.lax.psum(x_bl.sum(1), 'model')


def decoder_norms(sae: SparseAutoencoder) -> jax.Array:
  """Returns the norms [l] of this shard's rows."""
  return jnp.linalg.norm(sae.decoder[...], axis=1)


def clock_after(latents_bl: jax.Array, tokens_since_fired_l: jax.Array) -> jax.Array:
  """Returns the dead clock after a batch: 0 where a latent was positive on any token, else so many tokens more."""
  fired_l = jax.lax.pmax(jnp.any(latents_bl > 0, axis=0).astype(jnp.int32), 'data')
  n_tokens = len(latents_bl) * jax.lax.axis_size('data')
  # The clock stops long before int32 overflows.
  return jnp.where(fired_l > 0, 0, jnp.minimum(tokens_since_fired_l, 2**30) + n_tokens)


def loss_and_grads(
  terms: Callable[[SparseAutoencoder, jax.Array, jax.Array, jax.Array], Terms],
  sae: SparseAutoencoder,
  x_bd: jax.Array,
  target_bd: jax.Array,
  tokens_since_fired_l: jax.Array,
  mse_scale: jax.Array,
  dead_tokens: int,
  n_parts: int = 1,
) -> tuple[dict[str, jax.Array], jax.Array, SparseAutoencoder]:
  """Returns metrics, the dead clock and gradients, as `train_step.Recipe.loss_and_grads`.

  Args:
    terms: of this shard's SAE, tokens, targets and dead clock.
    sae: parameters.
    x_bd: normalised activations.
    target_bd: what is reconstructed.
    tokens_since_fired_l: the dead clock.
    mse_scale: 1 / the variance of a sample, for the metric normalized_mse.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    n_parts: micro-batches; see `micro_batches.MicroBatched`.
  """
  specs, batch_spec = partition_specs(sae), micro_batches.rows_spec(len(x_bd))

  def loss(sae, tokens_since_fired_l, x_bd, target_bd, mse_scale):
    found = terms(sae, x_bd, target_bd, tokens_since_fired_l)
    total = sum(found.parts.values())
    tokens_since_fired_l = clock_after(jax.lax.stop_gradient(found.latents_bl), tokens_since_fired_l)
    metrics = {
      'loss': total,
      'normalized_mse': mse_scale * batch_mean((target_bd - found.recons_bd) ** 2),
      'l0': batch_mean(sum_over_latents((found.latents_bl > 0).astype(jnp.float32))),
      'dead': jax.lax.psum((tokens_since_fired_l > dead_tokens).sum(), 'model'),
    }
    return total, (metrics | found.parts | (found.metrics or {}), tokens_since_fired_l)

  @functools.partial(
    jax.shard_map,
    in_specs=(specs, batch_spec, batch_spec, P('model'), P()),
    out_specs=(P(), P('model'), specs),
  )
  def run(sae, x_bd, target_bd, tokens_since_fired_l, mse_scale):
    # Parameters vary over the batch from here on, so that a gradient is summed over `data` once, at the end.
    sae = jax.tree.map(lambda p: jax.lax.pcast(p, 'data', to='varying'), sae)

    def of_part(tokens_since_fired_l, x_bd, target_bd):
      of_sae = jax.value_and_grad(loss, has_aux=True)
      (_, (metrics, clock_l)), grads = of_sae(sae, tokens_since_fired_l, x_bd, target_bd, mse_scale)
      return metrics, clock_l, grads

    metrics, tokens_since_fired_l, grads = micro_batches.over_parts(
      of_part, n_parts, tokens_since_fired_l, x_bd, target_bd
    )
    return metrics, tokens_since_fired_l, jax.lax.psum(grads, 'data')

  return run(sae, x_bd, None if target_bd is x_bd else target_bd, tokens_since_fired_l, mse_scale)
