"""What an SAE is trained on: normalised MSE at one or several k and AuxK, with their gradients, in one shard_map.

Takes an SAE and normalised activations x_bd, gives metrics, gradients and the dead clock. Tokens are cut over `data`,
latents over `model`; between shards travel the top-k candidates, the reconstructions and the gradients, never [batch,
latent].
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_interp.sae.sparse import sparse_dot, weighted_sum
from models.sae import SparseAutoencoder
from models.topk import local_topk, scatter_mask, wins

ENCODE_ROWS = 1024  # tokens encoded at a time, so that pre-activations of the whole batch are never allocated
AUXK_BUCKET_RATIO = 8  # every bucket is compiled


@dataclasses.dataclass(frozen=True)
class TopK:
  """A recipe: the loss is the sum over levels of weight * normalized MSE(k), plus auxk_coef * AuxK (Gao et al. 2024).

  Attributes:
    levels: pairs of k and weight, the SAE's own k first: ((k, 1),) is TopK, ((k, 1), (4 * k, 1 / 8)) is Multi-TopK.
    auxk: dead latents that reconstruct the error together; a power of two near d / 2. 0 turns AuxK off.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
  """

  levels: tuple[tuple[int, float], ...]
  auxk: int
  auxk_coef: float = 1 / 32
  dead_tokens: int = 10_000_000
  unit_norm: ClassVar[bool] = True

  def loss_and_grads(
    self,
    sae: SparseAutoencoder,
    x_bd: jax.Array,
    target_bd: jax.Array,
    tokens_since_fired_l: jax.Array,
    mse_scale: jax.Array,
    step: jax.Array,
  ) -> tuple[dict[str, jax.Array], jax.Array, SparseAutoencoder]:
    """Returns metrics, the dead clock after this batch, and the gradients of the loss.

    Args:
      sae: parameters; its own `k` is not used, the levels are.
      x_bd: normalised activations.
      target_bd: what is reconstructed: x_bd, or a transcoder's targets times its output_scale.
      tokens_since_fired_l: int32, tokens since each latent was last positive. A latent fires at any value above 0:
        OpenAI's threshold of 1e-3 depends on the input's scale, and the normalisations differ by sqrt(d - 1).
      mse_scale: 1 / `variance` of a sample, frozen.
      step: not used.
    """
    return _loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale)


def partition_specs(tree):
  """Returns the PartitionSpecs of a pytree of nnx.Params (its prefix); what is no Param is replicated."""
  is_param = lambda x: isinstance(x, nnx.Param)
  return jax.tree.map(lambda x: P(*x.out_sharding) if is_param(x) else P(), tree, is_leaf=is_param)


def variance(x_bd: jax.Array) -> jax.Array:
  """Returns mean((x - mean over the batch)^2): 1 / mse_scale of the main loss, measured once, on a sample."""
  return jnp.mean((x_bd - x_bd.mean(0)) ** 2)


def _mse(error_bd):
  return jax.lax.pmean(jnp.mean(error_bd**2), 'data')


def _candidates(centred_bd, encoder_ld, latent_bias_l, k):
  """Returns values and indices [b, k] of this shard's largest pre-activations."""

  def topk(rows_bd):
    return local_topk(rows_bd @ encoder_ld.T + latent_bias_l, min(k, len(encoder_ld)))

  if len(centred_bd) % ENCODE_ROWS:
    return topk(centred_bd)
  blocks = jax.lax.map(topk, centred_bd.reshape(-1, ENCODE_ROWS, centred_bd.shape[1]))
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), blocks)


def _auxk(params, centred_bd, error_bd, dead_l, auxk):
  """The normalised MSE of reconstructing the error by the auxk largest dead latents; 0, at no cost, when none is dead.

  As in OpenAI's trainer the reconstruction includes pre_bias, which is added to the target as a constant, and the
  denominator is the error's variance over the batch. The dead latents are compacted into the smallest bucket that holds
  them, and are encoded and decoded densely: gathering auxk rows a token would move far more.
  """
  encoder_ld, decoder_ld, pre_bias_d, latent_bias_l = params
  n_local, n_shards = len(encoder_ld), jax.lax.axis_size('model')
  target_bd = error_bd + jax.lax.stop_gradient(pre_bias_d)
  target_variance = _mse(target_bd - jax.lax.pmean(target_bd.mean(0), 'data'))

  def loss(n_bucket):
    (dead_c,) = jnp.nonzero(dead_l, size=n_bucket, fill_value=n_local)
    encoder_cd, decoder_cd, latent_bias_c = (
      w.at[dead_c].get(mode='fill', fill_value=0) for w in (encoder_ld, decoder_ld, latent_bias_l)
    )
    latents_bc = jax.nn.relu(centred_bd @ encoder_cd.T + latent_bias_c)
    if n_bucket * n_shards > auxk:
      values_bk, indices_bk = local_topk(jax.lax.stop_gradient(latents_bc), min(auxk, n_bucket))
      (mask_bk,) = wins(values_bk, (auxk,))
      latents_bc = jnp.where(scatter_mask(indices_bk, mask_bk, n_bucket), latents_bc, 0)
    recons_bd = jax.lax.psum(latents_bc @ decoder_cd, 'model') + pre_bias_d
    return jnp.where(target_variance > 0, _mse(recons_bd - target_bd) / target_variance, 0)

  buckets = [0, auxk]
  while buckets[-1] * AUXK_BUCKET_RATIO < n_local:
    buckets.append(buckets[-1] * AUXK_BUCKET_RATIO)
  branches = [lambda: jnp.zeros(()), *(functools.partial(loss, min(n, n_local)) for n in buckets[1:] + [n_local])]
  n_dead = jax.lax.pmax(dead_l.sum(), 'model')
  return jax.lax.switch(jnp.searchsorted(jnp.array(buckets), n_dead), branches)


def _loss_and_grads(recipe, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale):
  specs = partition_specs(sae)
  ks = tuple(k for k, _ in recipe.levels)

  def loss(sae, x_bd, target_bd, tokens_since_fired_l, mse_scale):
    # What meets the batch is marked as varying over it, so that its gradient is summed over `data` once, at the end.
    encoder_ld, decoder_ld, latent_bias_l = (
      jax.lax.pcast(p[...], 'data', to='varying') for p in (sae.encoder, sae.decoder, sae.latent_bias)
    )
    pre_bias_d = sae.pre_bias[...]
    centred_bd = x_bd - jax.lax.pcast(pre_bias_d, ('data', 'model'), to='varying')

    preacts_bk, indices_bk = _candidates(*map(jax.lax.stop_gradient, (centred_bd, encoder_ld, latent_bias_l)), max(ks))
    masks = wins(preacts_bk, ks)
    values_bk = jax.nn.relu(sparse_dot(centred_bd, encoder_ld, indices_bk) + latent_bias_l[indices_bk])
    losses, errors = [], []
    for mask_bk in masks:
      local_bd = weighted_sum(jnp.where(mask_bk, values_bk, 0), decoder_ld, indices_bk)
      errors.append(target_bd - (jax.lax.psum(local_bd, 'model') + pre_bias_d))
      losses.append(mse_scale * _mse(errors[-1]))

    fired_bk = masks[0] & (values_bk > 0)
    n_fired = jax.lax.psum(fired_bk.sum(), ('data', 'model'))
    n_tokens = len(x_bd) * jax.lax.axis_size('data')
    fired_l = jax.lax.pmax(jnp.zeros(len(encoder_ld), jnp.int32).at[indices_bk].max(fired_bk.astype(jnp.int32)), 'data')
    # The clock stops long before int32 overflows.
    tokens_since_fired_l = jnp.where(fired_l > 0, 0, jnp.minimum(tokens_since_fired_l, 2**30) + n_tokens)
    dead_l = tokens_since_fired_l > recipe.dead_tokens

    auxk = jnp.zeros(())
    if recipe.auxk:
      params = encoder_ld, decoder_ld, pre_bias_d, latent_bias_l
      auxk = _auxk(params, centred_bd, jax.lax.stop_gradient(errors[0]), dead_l, recipe.auxk)
    total = sum(weight * x for (_, weight), x in zip(recipe.levels, losses, strict=True))
    total += recipe.auxk_coef * auxk
    n_dead = jax.lax.psum(dead_l.sum(), 'model')
    metrics = {'loss': total, 'auxk': auxk, 'normalized_mse': losses[0], 'l0': n_fired / n_tokens, 'dead': n_dead}
    return total, (metrics, tokens_since_fired_l)

  @functools.partial(
    jax.shard_map,
    in_specs=(specs, P('data', None), P('data', None), P('model'), P()),
    out_specs=(P(), P('model'), specs),
  )
  def run(*args):
    (_, (metrics, tokens_since_fired_l)), grads = jax.value_and_grad(loss, has_aux=True)(*args)
    return metrics, tokens_since_fired_l, grads

  return run(sae, x_bd, target_bd, tokens_since_fired_l, mse_scale)
