"""Exact top-k over latents that are sharded over the mesh axis `model`: ties go to the lowest index, whatever the mesh.

XLA cannot partition a top-k: left to itself it gathers the whole pre-activations. Here every shard takes the top-k of
its own latents, only those k values travel, and one cut over all of them tells each shard how many of its candidates
win. `local_topk` and `wins` are called inside `jax.shard_map`; `topk_mask` is the ready-made map for dense
pre-activations.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

GROUP_SIZE = 16  # the fastest of 8 to 32 on a CPU at 2,048 to 24,576 latents
MIN_GROUPS_PER_K = 4  # with fewer groups than this times k, choosing the groups costs what it saves


def _topk(x_bl, k):
  # The barriers keep later slices of the results from turning a top-k into a full sort, 5 to 150 times slower on a CPU.
  # One barrier around both results crashes the compiler where there are several devices (jax 0.10.2).
  values_bk, indices_bk = jax.lax.top_k(x_bl, k)
  return jax.lax.optimization_barrier(values_bk), jax.lax.optimization_barrier(indices_bk)


def _ascending(indices_bk):
  """Sorts each row of distinct indices by counting: for small k, k^2 comparisons cost less than a sort."""
  rank_bk = jnp.sum(indices_bk[:, None, :] < indices_bk[:, :, None], axis=2)
  places = jnp.arange(indices_bk.shape[1])
  return jnp.sum(jnp.where(rank_bk[:, :, None] == places, indices_bk[:, :, None], 0), axis=1)


def local_topk(x_bl: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns values_bk and indices_bk of the k largest, descending, ties by lowest index: a faster `jax.lax.top_k`.

  Two stages: the k groups with the largest maxima hold every winner, because a winner outside them would mean k larger
  values. Groups are strided (latents i, i + n_groups, ...), so that their maxima vectorise. Where the k-th and the next
  maximum tie in any row the choice of groups is ambiguous, and plain top-k decides.
  """
  n_rows, n_latents = x_bl.shape
  n_groups = n_latents // GROUP_SIZE
  if n_latents % GROUP_SIZE or n_groups < MIN_GROUPS_PER_K * k:
    return _topk(x_bl, k)
  grouped = x_bl.reshape(n_rows, GROUP_SIZE, n_groups)
  maxima, groups = _topk(grouped.max(axis=1), k + 1)

  def two_stages(_):
    groups_bk = _ascending(groups[:, :k])
    candidates = jnp.take_along_axis(grouped, groups_bk[:, None, :], axis=2, mode='promise_in_bounds')
    values_bk, places_bk = _topk(candidates.reshape(n_rows, GROUP_SIZE * k), k)
    group_bk = jnp.take_along_axis(groups_bk, places_bk % k, axis=1, mode='promise_in_bounds')
    return values_bk, places_bk // k * n_groups + group_bk

  return jax.lax.cond(jnp.any(maxima[:, k - 1] == maxima[:, k]), lambda _: _topk(x_bl, k), two_stages, None)


def wins(values_bk: jax.Array, ks: tuple[int, ...]) -> list[jax.Array]:
  """Returns, for each k of ks, the mask_bk of this shard's candidates that are among the k largest of all shards.

  Each shard's candidates are in descending order and shards are in the order of their latents, so the first of equal
  values in the gathered row is the one of lowest index. Values travel, b * k of them a shard; indices do not.
  """
  n_shards, n_candidates = jax.lax.axis_size('model'), values_bk.shape[1]
  places_k = jnp.arange(n_candidates)
  if n_shards == 1:
    return [jnp.broadcast_to(places_k < k, values_bk.shape) for k in ks]
  all_values = jax.lax.all_gather(values_bk, 'model', axis=1, tiled=True)
  _, places_bk = _topk(all_values, max(ks))
  mine_bk = places_bk // n_candidates == jax.lax.axis_index('model')
  return [places_k < jnp.sum(mine_bk[:, :k], axis=1, keepdims=True) for k in ks]


def scatter_mask(indices_bk: jax.Array, mask_bk: jax.Array, n_latents: int) -> jax.Array:
  """Returns mask_bl, true at each row's indices where mask_bk is."""
  rows = jnp.arange(len(indices_bk))[:, None]
  return jnp.zeros((len(indices_bk), n_latents), bool).at[rows, indices_bk].set(mask_bk, mode='promise_in_bounds')


def latent_spec(shape: tuple[int, ...]) -> P:
  """Returns the PartitionSpec of [..., latent]: latents over `model`, the first axis over `data` if that divides it."""
  n_data = jax.sharding.get_abstract_mesh().shape['data']
  batch = ['data' if shape[0] % n_data == 0 else None] if len(shape) > 1 else []
  return P(*batch, *[None] * (len(shape) - 2), 'model')


def topk_mask(preacts: jax.Array, k: int) -> jax.Array:
  """Returns the mask [..., latent] of the k largest pre-activations of every row, exactly k of them, on any mesh."""

  def local_mask(preacts):
    rows_bl = preacts.reshape(-1, preacts.shape[-1])
    values_bk, indices_bk = local_topk(rows_bl, min(k, rows_bl.shape[1]))
    (mask_bk,) = wins(values_bk, (k,))
    return scatter_mask(indices_bk, mask_bk, rows_bl.shape[1]).reshape(preacts.shape)

  spec = latent_spec(preacts.shape)
  return jax.shard_map(local_mask, in_specs=spec, out_specs=spec)(jax.lax.stop_gradient(preacts))
