"""The recipe of Gao et al. 2024 on sharded latents: TopK or Multi-TopK with AuxK, metrics, gradients and dead clock.

The gradients are written out, on the few latents that win and never on [batch, latent], in one shard_map: tokens are
cut over `data`, latents over `model`; between shards travel the tokens, the top-k candidates, the reconstructions and
the gradients.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_interp.sae import kernels, micro_batches
from models import sharding
from models.sae import SparseAutoencoder
from models.topk import local_topk, scatter_mask, wins

AUXK_BUCKET_RATIO = 8  # every bucket is compiled
AUXK_ROWS = 4096  # tokens for which dead latents, up to all, are computed at a time
PARITY_FIRED = 1e-3  # a latent fires above it in parity mode; else above 0


@dataclasses.dataclass(frozen=True)
class TopK:
  """A recipe: the loss is the sum over levels of weight * normalized MSE(k), plus auxk_coef * AuxK (Gao et al. 2024).

  Attributes:
    levels: pairs of k and weight, the SAE's own k first: ((k, 1),) is TopK, ((k, 1), (4 * k, 1 / 8)) is Multi-TopK.
    auxk: dead latents that reconstruct the error together; a power of two near d / 2. 0 turns AuxK off.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    kernels: of `kernels.KERNELS`; `kernels.fastest` measures which are fastest.
    dtype: of the products that choose latents, 'float32' or 'bfloat16': the same ones; see `kernels.select_topk`, and
      `kernels.fastest_dtype`, which measures which is faster.
    parity: do as OpenAI's released trainer where ours differs, to compare with it. A latent fires above 1e-3, and its
      clock then says one batch (or micro-batch), not 0; with nothing dead, AuxK still draws the bias towards the mean
      error; the decoder is brought to unit norm before Adam, not after, so that it is a step off; the average takes up
      the weights from before the step.
  """

  levels: tuple[tuple[int, float], ...]
  auxk: int
  auxk_coef: float = 1 / 32
  dead_tokens: int = 10_000_000
  kernels: str = 'sparse'
  dtype: str = 'float32'
  parity: bool = False
  unit_norm: ClassVar[bool] = True
  scales_rows: ClassVar[bool] = True

  def loss_and_grads(
    self,
    sae: SparseAutoencoder,
    x_bd: jax.Array,
    target_bd: jax.Array,
    tokens_since_fired_l: jax.Array,
    mse_scale: jax.Array,
    step: jax.Array,
    row_scale_l: jax.Array | None = None,
    n_parts: int = 1,
  ) -> tuple[dict[str, jax.Array], jax.Array, SparseAutoencoder]:
    """Returns metrics, the dead clock after this batch, and the gradients of the loss.

    The loss is normalized_mse + multi_topk, of the other levels where there are any, + auxk, both weighted. Where
    latents are not chosen in float32 the metrics have chosen_again, the share of tokens for which it took that too;
    over several shards, of tokens of each.

    Args:
      sae: parameters; its own `k` is not used, the levels are.
      x_bd: normalised activations.
      target_bd: what is reconstructed: x_bd, or a transcoder's targets times its output_scale.
      tokens_since_fired_l: int32, tokens since each latent was last positive. A latent fires at any value above 0:
        OpenAI's threshold of 1e-3 depends on the input's scale, and the normalisations differ by sqrt(d - 1).
      mse_scale: 1 / `variance` of a sample, frozen.
      step: not used.
      row_scale_l: what brings the decoder's rows to norm 1. Given, the decoder's gradient is that of the rows so
        multiplied, without its component along them, and the metrics have grad_norm.
      n_parts: micro-batches; see `micro_batches.MicroBatched`.
    """
    specs = partition_specs(sae)
    axes = ('data', 'model') if sharding.is_cut('data') else ('model',)
    batch_spec = micro_batches.rows_spec(len(x_bd), axes)
    run = jax.shard_map(
      functools.partial(_loss_and_grads, self, n_parts),
      in_specs=(specs, batch_spec, batch_spec, P('model'), P(), P() if row_scale_l is None else P('model')),
      out_specs=(P(), P('model'), specs),
      axis_names=set(axes),
    )
    target_bd = None if target_bd is x_bd else target_bd
    return run(sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, row_scale_l)


def partition_specs(tree):
  """Returns the PartitionSpecs of a pytree of nnx.Params (its prefix); what is no Param is replicated."""
  is_param = lambda x: isinstance(x, nnx.Param)
  return jax.tree.map(lambda x: P(*x.out_sharding) if is_param(x) else P(), tree, is_leaf=is_param)


def variance(x_bd: jax.Array) -> jax.Array:
  """Returns mean((x - mean over the batch)^2): 1 / mse_scale of the main loss, measured once, on a sample."""
  return jnp.mean((x_bd - x_bd.mean(0)) ** 2)


def _maps(axis):
  """Whether the map that this is called in is over an axis: maps of one device leave out `data`, to save copies."""
  return axis in jax.sharding.get_abstract_mesh().manual_axes


def _over_data(collective, tree):
  """Applies psum, pmean or pmax over `data`, if the map is over it."""
  return collective(tree, 'data') if _maps('data') else tree


def _mse(error_bd):
  return _over_data(jax.lax.pmean, jnp.mean(error_bd**2))


class _Sums(NamedTuple):
  """What a device's tokens give towards the gradients: not summed over `data` yet."""

  grads: kernels.Gradients
  bias_d: jax.Array
  skip_dd: jax.Array | None
  written_d: jax.Array | None  # the gradient of what the skip connection writes; like skip_dd, only where there is one


def _loss_and_grads(recipe, n_parts, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, row_scale_l):
  of_part = functools.partial(_sums, recipe, sae, mse_scale, row_scale_l)
  metrics, tokens_since_fired_l, sums = micro_batches.over_parts(
    of_part, n_parts, tokens_since_fired_l, x_bd, target_bd
  )
  grads, bias_grad_d, skip_grad_dd, written_d = _over_data(jax.lax.psum, sums)

  # A gradient of [batch, d] is not needed: what the encoder read is x - pre_bias for every token.
  # All that is read is read before the gradients are used, or weights would be copied before they change, and squares
  # be written to memory for the norm and for Adam alike.
  squares_l = sum(jnp.einsum('ld,ld->l', g, g) for g in grads[:2]) + grads.latent_bias_l**2 - grads.along_l**2
  read_d = grads.latent_bias_l @ sae.encoder[...]
  read_d, squares_l, grads = jax.lax.optimization_barrier((read_d, squares_l, grads))
  pre_bias_grad_d = -jax.lax.psum(read_d, 'model')
  grads_of = jax.tree.map(jnp.zeros_like, sae)
  grads_of.encoder[...], grads_of.decoder[...], grads_of.latent_bias[...] = grads[:3]
  if not sae.is_transcoder:
    pre_bias_grad_d += bias_grad_d
  else:
    grads_of.out_bias[...] = bias_grad_d
  if sae.skip is not None:
    grads_of.skip[...] = skip_grad_dd
    pre_bias_grad_d -= written_d @ sae.skip[...]
  grads_of.pre_bias[...] = pre_bias_grad_d
  if row_scale_l is not None:
    grads_of.decoder[...] -= (grads.along_l * row_scale_l)[:, None] * sae.decoder[...]
    whole = jax.tree.map(lambda x: jnp.sum(x**2), (grads_of.pre_bias, grads_of.out_bias, grads_of.skip))
    metrics['grad_norm'] = (sum(jax.tree.leaves(whole)) + jax.lax.psum(squares_l.sum(), 'model')) ** 0.5
  return metrics, tokens_since_fired_l, grads_of


def _sums(recipe, sae, mse_scale, row_scale_l, tokens_since_fired_l, x_bd, target_bd):
  """Returns metrics, the dead clock and `_Sums` of a part of the batch."""
  run = kernels.KERNELS[recipe.kernels]
  encoder_ld, decoder_ld, latent_bias_l = sae.encoder[...], sae.decoder[...], sae.latent_bias[...]
  bias_d = (sae.out_bias if sae.is_transcoder else sae.pre_bias)[...]
  centred_bd = x_bd - sae.pre_bias[...]
  constant_bd = bias_d if sae.skip is None else bias_d + centred_bd @ sae.skip[...].T
  n_tokens = len(x_bd) * jax.sharding.get_abstract_mesh().shape['data']

  ks = tuple(k for k, _ in recipe.levels)
  k_local = min(max(ks), len(encoder_ld))
  preacts_bk, indices_bk, again_b = kernels.select_topk(
    run, centred_bd, encoder_ld, latent_bias_l, k_local, recipe.dtype
  )
  masks = wins(preacts_bk, ks)
  values_bk = jax.nn.relu(preacts_bk)

  latents_target_bd = target_bd - constant_bd
  losses, errors, updates = [], [], []
  for (k, weight), mask_bk in zip(recipe.levels, masks, strict=True):
    # In a shard's descending candidates the winners come first, so no more than k need a look, and mostly far fewer.
    kept_bk, level_bk = jnp.where(mask_bk, values_bk, 0)[:, :k], indices_bk[:, :k]
    few = _for_winners(run, mask_bk, k)
    error_bd, products_bk = kernels.decode_and_dz(
      few, kept_bk, decoder_ld, row_scale_l, level_bk, latents_target_bd, 'model'
    )
    slope = -2 * weight * mse_scale / (n_tokens * error_bd.shape[1])
    dz_bk = jnp.where(kept_bk > 0, slope * products_bk, 0)
    updates.append((few, kept_bk, dz_bk, level_bk, centred_bd, slope * error_bd))
    errors.append(error_bd)
    losses.append(mse_scale * _mse(error_bd))

  fired_bk = masks[0] & (values_bk > (PARITY_FIRED if recipe.parity else 0))
  fired_l = jnp.zeros(len(encoder_ld), jnp.int32).at[indices_bk].max(fired_bk.astype(jnp.int32))
  fired_l = _over_data(jax.lax.pmax, fired_l)
  # The clock stops long before int32 overflows.
  unfired_l = jnp.minimum(tokens_since_fired_l, 2**30) + n_tokens
  tokens_since_fired_l = jnp.where(fired_l > 0, n_tokens if recipe.parity else 0, unfired_l)
  dead_l = tokens_since_fired_l > recipe.dead_tokens

  auxk = jnp.zeros(())
  bias_grad_d = sum(grad_bd.sum(0) for *_, grad_bd in updates)
  # What meets the batch is marked as varying over it, so that its gradient is summed over `data` once, at the end.
  mark = lambda x: jax.lax.pcast(x, 'data', to='varying') if _maps('data') else x
  params = tuple(map(mark, (encoder_ld, decoder_ld, latent_bias_l, bias_d)))
  if recipe.auxk:
    auxk, grads, auxk_bias_grad_d = _auxk(recipe, params, row_scale_l, centred_bd, errors[0], dead_l)
    bias_grad_d += auxk_bias_grad_d
  else:
    grads = kernels.Gradients(*map(jnp.zeros_like, (*params[:3], params[2])))
  for few, *update in updates:
    grads = kernels.sparse_update(few, grads, *update)
  skip_grad_dd = written_d = None
  if sae.skip is not None:
    grad_bd = sum(grad_bd for *_, grad_bd in updates)
    skip_grad_dd, written_d = grad_bd.T @ centred_bd, grad_bd.sum(0)

  own, *more = (weight * x for (_, weight), x in zip(recipe.levels, losses, strict=True))
  parts = {'multi_topk': sum(more)} if more else {}
  parts['auxk'] = recipe.auxk_coef * auxk
  n_fired = _over_data(jax.lax.psum, jax.lax.psum((masks[0] & (values_bk > 0)).sum(), 'model'))
  n_dead = jax.lax.psum(dead_l.sum(), 'model')
  metrics = {'loss': own + sum(parts.values()), 'normalized_mse': losses[0], 'l0': n_fired / n_tokens, 'dead': n_dead}
  metrics |= parts
  if recipe.dtype != 'float32':
    metrics['chosen_again'] = _over_data(jax.lax.pmean, jax.lax.pmean(jnp.mean(again_b), 'model'))
  return metrics, tokens_since_fired_l, _Sums(grads, bias_grad_d, skip_grad_dd, written_d)


def _for_winners(run, mask_bk, k) -> kernels.Kernels:
  """Returns kernels that look at the first few candidates of a token only, in batches where those hold all winners.

  In a batch where `kernels.n_looked_at` do not do, all candidates are looked at.
  """
  n_few = kernels.n_looked_at(k, jax.lax.axis_size('model'))
  if n_few >= min(k, mask_bk.shape[1]):
    return run
  most = _over_data(jax.lax.pmax, jax.lax.pmax(jnp.max(jnp.sum(mask_bk, axis=1)), 'model'))

  def narrowed(f, *arrays_bk):
    few = [a[:, :n_few] for a in arrays_bk]
    return jax.lax.cond(most <= n_few, lambda: f(*few), lambda: f(*arrays_bk))

  def dot(x_bd, w_ld, indices_bk):
    pad = lambda out_bk: jnp.pad(out_bk, ((0, 0), (0, indices_bk.shape[1] - out_bk.shape[1])))
    return narrowed(lambda indices_bk: pad(run.dot(x_bd, w_ld, indices_bk)), indices_bk)

  # error_and_dot stays: it is of one shard, which has all winners.
  return run._replace(
    weighted_sum=lambda values_bk, w_ld, indices_bk: narrowed(
      lambda v, i: run.weighted_sum(v, w_ld, i), values_bk, indices_bk
    ),
    dot=dot,
    add_outers=lambda totals_ld, values_bk, x_bd, indices_bk: narrowed(
      lambda *few: run.add_outers(totals_ld, few[:-1], x_bd, few[-1]), *values_bk, indices_bk
    ),
  )


def _auxk(recipe, params, row_scale_l, centred_bd, error_bd, dead_l):
  """The normalised MSE of reconstructing the error by the auxk largest dead latents, and auxk_coef times its gradients.

  As in OpenAI's trainer the reconstruction includes the bias, which is added to the target as a constant, and the
  denominator is the error's variance over the batch. The dead latents are compacted into the smallest bucket that holds
  them, and are encoded and decoded densely, AUXK_ROWS tokens at a time: gathering auxk rows a token would move far
  more. With none dead it is 0 and costs the gradients' zeros, which the others are added to.
  """
  *weights, bias_d = params
  n_local, n_shards = len(dead_l), jax.lax.axis_size('model')
  target_bd = error_bd + jax.lax.stop_gradient(bias_d)
  target_variance = _mse(target_bd - _over_data(jax.lax.pmean, target_bd.mean(0)))
  varies = target_variance > 0  # a batch of one token does not
  n_numbers = float(target_bd.size * jax.sharding.get_abstract_mesh().shape['data'])
  per_square = jnp.where(varies, 1 / jnp.where(varies, target_variance, 1), 0) / n_numbers

  def squares(encoder_cd, decoder_cd, latent_bias_c, bias_d, centred_bd, target_bd):
    n_bucket = len(encoder_cd)
    latents_bc = jax.nn.relu(centred_bd @ encoder_cd.T + latent_bias_c)
    if n_bucket * n_shards > recipe.auxk:
      values_bk, indices_bk = local_topk(jax.lax.stop_gradient(latents_bc), min(recipe.auxk, n_bucket))
      (mask_bk,) = wins(values_bk, (recipe.auxk,))
      latents_bc = jnp.where(scatter_mask(indices_bk, mask_bk, n_bucket), latents_bc, 0)
    recons_bd = jax.lax.psum(latents_bc @ decoder_cd, 'model') + bias_d
    return jnp.sum((recons_bd - target_bd) ** 2)

  def auxk_and_grads(*params):
    squares_and_grads = functools.partial(jax.value_and_grad(squares, argnums=(0, 1, 2, 3)), *params)
    add_block = lambda sums, *block: jax.tree.map(jnp.add, sums, squares_and_grads(*block))
    zeros = jax.tree.map(jnp.zeros_like, (target_bd[0, 0], params))
    total, grads = kernels.added_in_blocks(add_block, AUXK_ROWS, zeros, centred_bd, target_bd)
    scaled = jax.tree.map(lambda grad: recipe.auxk_coef * per_square * grad, grads)
    return per_square * _over_data(jax.lax.psum, total), scaled

  def with_bucket(n_bucket):
    (dead_c,) = jnp.nonzero(dead_l, size=n_bucket, fill_value=n_local)
    chosen = lambda w: w.at[dead_c].get(mode='fill', fill_value=0)
    encoder_cd, decoder_cd, latent_bias_c = map(chosen, weights)
    if row_scale_l is not None:
      decoder_cd *= chosen(row_scale_l)[:, None]
    auxk, (*compact, bias_grad_d) = auxk_and_grads(encoder_cd, decoder_cd, latent_bias_c, bias_d)
    compact.append(jnp.einsum('cd,cd->c', compact[1], decoder_cd))
    placed = lambda w, g: jnp.zeros_like(w).at[dead_c].set(g, mode='drop')
    return auxk, kernels.Gradients(*map(placed, (*weights, weights[2]), compact)), bias_grad_d

  def with_none():
    auxk, bias_grad_d = jnp.zeros(()), jnp.zeros_like(bias_d)
    if recipe.parity:
      auxk, (*_, bias_grad_d) = auxk_and_grads(*(w[:0] for w in weights), bias_d)
    return auxk, kernels.Gradients(*map(jnp.zeros_like, (*weights, weights[2]))), bias_grad_d

  buckets = [0, recipe.auxk]
  while buckets[-1] * AUXK_BUCKET_RATIO < n_local:
    buckets.append(buckets[-1] * AUXK_BUCKET_RATIO)
  branches = [with_none, *(functools.partial(with_bucket, min(n, n_local)) for n in buckets[1:] + [n_local])]
  n_dead = jax.lax.pmax(dead_l.sum(), 'model')
  return jax.lax.switch(jnp.searchsorted(jnp.array(buckets), n_dead), branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def auxk_loss(recipe, params: tuple[jax.Array, ...], x_bd: jax.Array, error_bd: jax.Array, dead_l: jax.Array):
  """Returns auxk_coef * AuxK for recipes that are differentiated, inside a map over `data` and `model`.

  Args:
    recipe: has auxk, auxk_coef and parity, as `TopK`; static.
    params: this shard's encoder and decoder [l, d], latent bias [l], and the bias [d] of the reconstruction.
    x_bd: what the encoder reads: normalised activations minus pre_bias; constant.
    error_bd: what the dead latents are to reconstruct; constant.
    dead_l: which of this shard's latents are dead.
  """
  return _auxk_forward(recipe, params, x_bd, error_bd, dead_l)[0]


def _auxk_forward(recipe, params, x_bd, error_bd, dead_l):
  auxk, grads, bias_grad_d = _auxk(recipe, params, None, x_bd, error_bd, dead_l)
  return recipe.auxk_coef * auxk, (*grads[:3], bias_grad_d)


def _auxk_backward(recipe, grads, cotangent):
  return jax.tree.map(lambda grad: cotangent * grad, grads), None, None, None


auxk_loss.defvjp(_auxk_forward, _auxk_backward)
