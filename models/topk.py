"""Exact top-k over latents that are sharded over the mesh axis `model`: ties go to the lowest index, whatever the mesh.

XLA cannot partition a top-k: left to itself it gathers the whole pre-activations. Here every shard takes the top-k of
its own latents, and one cut over all of them tells each shard how many of its candidates win. Where there are few
candidates their values travel; where there are many, and for the largest values of a whole batch, only counts do: the
k-th largest value is found a few bits at a time (`_largest`). `local_topk`, `wins` and `batch_wins` are called inside
`jax.shard_map`; `topk_mask` and `threshold_for` are ready-made maps.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models import sharding

GROUP_SIZE = 16  # the fastest of 8 to 32 on a CPU at 2,048 to 24,576 latents
FIRST_PER_K = 1.5  # at most so many maxima come first: of 0.5 to 8, at 512 to 2,048 groups, none is 3 % faster on a CPU
MIN_GROUPS_PER_K = 4  # with fewer groups than this times k, choosing the groups costs what it saves
MOST_COUNTED = 64  # k up to which [b, k, k] comparisons, in memory, sort ties
ROWS_PER_FEW = 32  # of so many rows, one at most is chosen again by itself: for it all weights are read once more
RADIX_BITS = 3  # a round: the fastest of 2 to 6 on a CPU, where more edges cost more than fewer passes save
KEY_BITS = 32
RING = 2  # an all-reduce moves each number twice, to sum it and to spread the sum; an all-gather moves it once
MAX_COUNT = 2**31 - 1


def plain_topk(x_bl: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns `jax.lax.top_k`, of which XLA makes no sort of all of x because of what follows."""
  # The barriers keep later slices of the results from turning a top-k into a full sort, 5 to 150 times slower on a CPU.
  # One barrier around both results crashes the compiler where there are several devices (jax 0.10.2).
  values_bk, indices_bk = jax.lax.top_k(x_bl, k)
  return jax.lax.optimization_barrier(values_bk), jax.lax.optimization_barrier(indices_bk)


def _ties_by_index(values_bk, indices_bk):
  """Sorts the indices of equal values: for small k by counting, as k^2 comparisons cost less than a sort."""
  keys_bk = ordered_keys(values_bk)
  if values_bk.shape[1] > MOST_COUNTED:
    return jax.lax.sort((~keys_bk, indices_bk), dimension=1, num_keys=2)[1]
  tied_bkk = keys_bk[:, None, :] == keys_bk[:, :, None]
  before_bkk = (keys_bk[:, None, :] > keys_bk[:, :, None]) | tied_bkk & (
    indices_bk[:, None, :] < indices_bk[:, :, None]
  )
  place_bk = jnp.sum(before_bkk, axis=2)
  places = jnp.arange(indices_bk.shape[1])
  return jnp.sum(jnp.where(place_bk[:, :, None] == places, indices_bk[:, :, None], 0), axis=1)


def _maxima_first(x_bmg, k, topk):
  """Returns values_bk and places_bk of the k largest of x_bmg, flattened, in descending order; ties are in any order.

  On a CPU top-k is a heap, which is quick to see that a number does not belong there, and slow to take up one that
  does: the maximum of every group comes first, and little that follows belongs there. There must be no NaN. Where -inf
  is among the k largest, places may come twice, and a zero may be of the other sign: callers take both for ties.
  """
  n_rows, n_members, n_groups = x_bmg.shape

  def heap(x_bmg):
    maxima_bg = functools.reduce(jnp.maximum, [x_bmg[:, i] for i in range(n_members)])
    member_bg = jnp.zeros((n_rows, n_groups), jnp.int32)
    for i in reversed(range(n_members)):
      member_bg = jnp.where(x_bmg[:, i] == maxima_bg, i, member_bg)
    rest_bmg = jnp.where(jnp.arange(n_members)[:, None] == member_bg[:, None], -jnp.inf, x_bmg)
    values_bk, places_bk = plain_topk(jnp.concatenate([maxima_bg, rest_bmg.reshape(n_rows, -1)], axis=1), k)
    group_bk = jnp.minimum(places_bk, n_groups - 1)
    of_maximum_bk = n_groups * jnp.take_along_axis(member_bg, group_bk, axis=1, mode='promise_in_bounds') + group_bk
    return values_bk, jnp.where(places_bk < n_groups, of_maximum_bk, places_bk - n_groups)

  return jax.lax.platform_dependent(x_bmg, cpu=heap, default=lambda x_bmg: topk(x_bmg.reshape(n_rows, -1), k))


def _topk_of_maxima(maxima_bg, k, topk):
  """Returns values_bk and groups_bk of the k largest in descending order, of equal ones any."""
  n_rows, n_groups = maxima_bg.shape
  n_first = max(n for n in range(1, int(FIRST_PER_K * k) + 1) if n_groups % n == 0)
  # So many that two stages pay again, or of a number that cannot be cut evenly.
  if n_groups >= MIN_GROUPS_PER_K * k * GROUP_SIZE or n_first < k // 2:
    return local_topk(maxima_bg, k, topk=topk)
  return _maxima_first(maxima_bg.reshape(n_rows, -1, n_first), k, topk)


def local_topk(
  x_bl: jax.Array, k: int, bias_l: jax.Array | None = None, any_tie: bool = False, topk: Callable = plain_topk
) -> tuple[jax.Array, jax.Array]:
  """Returns values_bk and indices_bk of the k largest of x_bl + bias_l, descending, ties by lowest index.

  It is a faster `jax.lax.top_k`, which never writes the sum to memory. Two stages: the k groups with the largest maxima
  hold every winner, because a winner outside them would mean k larger values. Groups are strided (latents i, i +
  n_groups, ...), so that their maxima vectorise. Rows where the k-th and the next value, or maximum, tie are ambiguous,
  and plain top-k decides them; so it does for zeros of either sign that tie, and for all rows where there is a NaN.

  Args:
    x_bl: one shard's.
    k: at most l.
    bias_l: added to every row.
    any_tie: leave open which of equal values are chosen, and in which order.
    topk: of the maxima, and of the candidates, where this is not a CPU.
  """
  n_rows, n_latents = x_bl.shape
  n_groups = n_latents // GROUP_SIZE
  plain = lambda x_bl: plain_topk(x_bl if bias_l is None else x_bl + bias_l, k)
  if n_latents % GROUP_SIZE or n_groups < MIN_GROUPS_PER_K * k:
    return plain(x_bl)
  members = [slice(i * n_groups, (i + 1) * n_groups) for i in range(GROUP_SIZE)]
  # One loop over the rows; a reduction would have the sum, or the reshaped rows, written to memory first.
  maxima_bg = functools.reduce(jnp.maximum, [x_bl[:, i] if bias_l is None else x_bl[:, i] + bias_l[i] for i in members])

  def two_stages(maxima_bg):
    maxima, groups = _topk_of_maxima(maxima_bg, k + 1, topk)
    candidates_bmk = n_groups * jnp.arange(GROUP_SIZE)[:, None] + groups[:, None, :k]
    candidates_bc = candidates_bmk.reshape(n_rows, -1)
    candidate_values = jnp.take_along_axis(x_bl, candidates_bc, axis=1, mode='promise_in_bounds')
    if bias_l is not None:
      candidate_values += bias_l.at[candidates_bc].get(mode='promise_in_bounds')
    values, places = _maxima_first(candidate_values.reshape(candidates_bmk.shape), k + 1, topk)
    indices_bk = jnp.take_along_axis(candidates_bc, places[:, :k], axis=1, mode='promise_in_bounds')
    if any_tie:
      return values[:, :k], indices_bk
    *found, ambiguous_b = _ordered(values, indices_bk)
    ambiguous_b |= maxima[:, k - 1] == maxima[:, k]
    return chosen_again(plain, ambiguous_b, tuple(found), x_bl)

  # Where ties are left open, nothing tells groups that come twice, as they may if there is nothing but -inf in some.
  odd = ~jnp.all(maxima_bg > -jnp.inf) if any_tie else jnp.any(jnp.isnan(maxima_bg))
  # As an argument of a branch, the maxima are written once; else they would be computed wherever they are read.
  return jax.lax.cond(odd, lambda _: plain(x_bl), two_stages, maxima_bg)


def _ordered(values, indices_bk):
  """Returns values_bk, indices_bk with ties by lowest index, and ambiguous_b: rows where plain top-k must decide.

  Args:
    values: [b, k + 1], the largest in descending order; the last is only compared with.
    indices_bk: of the first k.
  """
  k = indices_bk.shape[1]
  values_bk, tied_bk = values[:, :k], values[:, :k] == values[:, 1:]
  by_index = lambda indices_bk: _ties_by_index(values_bk, indices_bk)
  indices_bk = jax.lax.cond(jnp.any(tied_bk), by_index, lambda indices_bk: indices_bk, indices_bk)
  return values_bk, indices_bk, tied_bk[:, -1] | jnp.any(tied_bk & (values_bk == 0), axis=1)


def topk_of_candidates(values_bc: jax.Array, indices_bc: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns values_bk and indices_bk of the k < c largest values, as `local_topk`, and settled_b.

  A row is not settled where the k-th and the next value tie, zeros do, or there is a NaN: another choice may be right.
  """
  values, places = plain_topk(values_bc, k + 1)
  indices_bk = jnp.take_along_axis(indices_bc, places[:, :k], axis=1, mode='promise_in_bounds')
  values_bk, indices_bk, ambiguous_b = _ordered(values, indices_bk)
  return values_bk, indices_bk, ~(ambiguous_b | jnp.any(jnp.isnan(values), axis=1))


def chosen_again(
  choose: Callable, rows_b: jax.Array, found: tuple[jax.Array, jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns found, values_bk and indices_bk, with choose(x) in place of the rows where rows_b is.

  A few rows are chosen by themselves; if there are more than one in `ROWS_PER_FEW`, all rows are, and all replaced.

  Args:
    choose: rows of x to their values and indices, as found.
    rows_b: which to choose again.
    found: replaced in part.
    x: [b, ...].
  """
  n_rows = len(x)
  n_few = math.ceil(n_rows / ROWS_PER_FEW)

  def few(*found):
    (rows,) = jnp.nonzero(rows_b, size=n_few, fill_value=n_rows)
    again = choose(x.at[rows].get(mode='clip'))
    return tuple(a.at[rows].set(b, mode='drop') for a, b in zip(found, again, strict=True))

  n_again = jnp.sum(rows_b)
  branch = (n_again > 0).astype(jnp.int32) + (n_again > n_few)
  return jax.lax.switch(branch, [lambda *found: found, few, lambda *_: choose(x)], *found)


def ordered_keys(values: jax.Array) -> jax.Array:
  """Returns uint32 keys in the order of the float32 values.

  Floats are sign and magnitude: setting the sign bit of a positive number puts it above the negative ones, and flipping
  all bits of a negative one reverses them. This is the order of XLA's top-k: -0 is below 0, and a NaN is beyond the
  infinity of its own sign.
  """
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  return bits ^ jnp.where(bits >> 31, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def _value(key):
  """Returns the float32 value of a key."""
  bits = key ^ jnp.where(key >> 31, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _rounds(n_bits):
  """Returns, for each round of `_largest`, its lowest bit and its number of edges."""
  return [(low, 2 ** min(RADIX_BITS, n_bits - low) - 1) for low in reversed(range(0, n_bits, RADIX_BITS))]


def _largest(count, n, n_bits):
  """Returns the n-th largest of many keys, which no device has together, how many are larger, and how many reach it.

  The n-th largest key is the largest number that at least n keys reach. A round counts the keys that reach each value
  of the next few bits, and settles these bits. Where there are fewer than n keys, the n-th is 0. How many reach 0 is
  never counted: it is taken for MAX_COUNT. All three are of n's shape.

  Args:
    count: takes edges [..., e] and returns int32 [..., e], how many keys of all devices reach each edge.
    n: int32.
    n_bits: keys are below 2 ** n_bits.
  """
  largest, n_larger, n_reaching = jnp.zeros_like(n, jnp.uint32), jnp.zeros_like(n), jnp.full_like(n, MAX_COUNT)
  for low, n_edges in _rounds(n_bits):
    counts = count(largest[..., None] + (jnp.arange(1, n_edges + 1, dtype=jnp.uint32) << low))
    reached = counts >= n[..., None]
    largest += jnp.sum(reached, axis=-1, dtype=jnp.uint32) << low
    n_larger = jnp.max(jnp.where(reached, n_larger[..., None], counts), axis=-1)
    n_reaching = jnp.min(jnp.where(reached, counts, n_reaching[..., None]), axis=-1)
  return largest, n_larger, n_reaching


def _wins_by_counts(values_bk, ks):
  """Returns how many of this shard's candidates win, [b, j] for the j-th of ks."""
  keys_bk, n_shards = ordered_keys(values_bk), jax.lax.axis_size('model')
  k_bj = jnp.broadcast_to(jnp.array(ks, jnp.int32), (len(values_bk), len(ks)))

  def count_keys(edges_bje):
    return jax.lax.psum(jnp.sum(keys_bk[:, None, None] >= edges_bje[..., None], axis=-1), 'model')

  kth_bj, n_larger_bj, _ = _largest(count_keys, k_bj, KEY_BITS)
  n_tied_bj = jnp.sum(keys_bk[:, None] == kth_bj[..., None], axis=-1)
  # Ties are the first shard's as far as they go, then the second's: the last shard that has one of them, as a key.
  shard = (n_shards - 1 - jax.lax.axis_index('model')).astype(jnp.uint32)

  def count_tied(edges_bje):
    return jax.lax.psum(jnp.where(shard >= edges_bje, n_tied_bj[..., None], 0), 'model')

  n_ties_bj = k_bj - n_larger_bj
  last_bj, n_before_bj, _ = _largest(count_tied, n_ties_bj, (n_shards - 1).bit_length())
  n_mine_bj = jnp.where(shard == last_bj, jnp.minimum(n_ties_bj - n_before_bj, n_tied_bj), n_tied_bj)
  n_mine_bj = jnp.where(shard < last_bj, 0, n_mine_bj)
  return jnp.sum(keys_bk[:, None] > kth_bj[..., None], axis=-1) + n_mine_bj


def wins(values_bk: jax.Array, ks: tuple[int, ...], by_counts: bool | None = None) -> list[jax.Array]:
  """Returns, for each k of ks, the mask_bk of this shard's candidates that are among the k largest of all shards.

  Exactly k win, as in a `jax.lax.top_k` of all latents; where there are fewer candidates, all do. Each shard's
  candidates are in descending order and shards are in the order of their latents, so the first of equal values in the
  row of all shards is the one of lowest index. Values travel, b * k of them a shard, or counts, b * len(ks) times a
  number that depends neither on k nor, but for the logarithm that finds the shard of the last tie, on the number of
  shards. Indices do not travel.

  Args:
    values_bk: this shard's largest, with ties in the order of their latents. NaN and -0 are ordered as XLA's top-k
      orders them: a NaN beyond the infinity of its sign, -0 below 0.
    ks: static.
    by_counts: whether counts travel; by default where they are fewer bytes than the values.
  """
  n_shards, n_candidates = jax.lax.axis_size('model'), values_bk.shape[1]
  places_k = jnp.arange(n_candidates)
  if n_shards == 1:
    return [jnp.broadcast_to(places_k < k, values_bk.shape) for k in ks]
  if by_counts is None:
    n_counts = sum(n_edges for n_bits in (KEY_BITS, (n_shards - 1).bit_length()) for _, n_edges in _rounds(n_bits))
    by_counts = n_shards * n_candidates > RING * n_counts * len(ks)
  if by_counts:
    n_wins_bj = _wins_by_counts(values_bk, ks)
    return [places_k < n_wins_bj[:, j, None] for j in range(len(ks))]
  all_values = jax.lax.all_gather(values_bk, 'model', axis=1, tiled=True)
  _, places_bk = plain_topk(all_values, min(max(ks), n_shards * n_candidates))
  mine_bk = places_bk // n_candidates == jax.lax.axis_index('model')
  return [places_k < jnp.sum(mine_bk[:, :k], axis=1, keepdims=True) for k in ks]


def _total(counts, axes):
  """Sums counts over mesh axes; 2^31 and more, of which a batch may have, become MAX_COUNT instead of overflowing."""
  low, high = jax.lax.psum((counts & 0xFFFF, counts >> 16), axes)
  high += low >> 16
  return jnp.where(high >> 15, MAX_COUNT, high << 16 | low & 0xFFFF)


def _count_dense(keys_bk, edges_e):
  """Returns int32 [e], how many keys reach each edge; one reduction of all edges reads the keys once, not e times."""
  reached = tuple((keys_bk >= edge).astype(jnp.int32) for edge in edges_e)
  zeros = (jnp.int32(0),) * len(reached)
  counts = jax.lax.reduce(reached, zeros, lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True)), (0, 1))
  return jnp.stack(counts)


def _batch_kth(keys_bk, n_kept, axes):
  """Returns `_largest` of the keys of the devices along the axes."""
  size = keys_bk.size
  for axis in axes:
    size *= jax.lax.axis_size(axis)
  most = min(size, MAX_COUNT - 1)  # a count of MAX_COUNT may stand for more, and must not equal n_kept
  if not 1 <= n_kept <= most:
    raise ValueError(
      f'n_kept {n_kept} is not between 1 and {most}: there are {size} values, and counts are int32; '
      'choose k at most the number of latents, or a smaller batch'
    )
  if keys_bk.size > MAX_COUNT:
    raise ValueError(f'a device has {keys_bk.size} values and counts are int32; choose a smaller batch or more devices')
  return _largest(lambda edges_e: _total(_count_dense(keys_bk, edges_e), axes), jnp.int32(n_kept), KEY_BITS)


def batch_wins(values_bk: jax.Array, n_kept: int) -> tuple[jax.Array, jax.Array]:
  """Returns the mask_bk of this device's values that are among the n_kept largest of the batch, and the smallest kept.

  This is BatchTopK (Bussmann et al. 2024) with n_kept = k * tokens of the whole batch, over `data` and `model`. Exactly
  n_kept are kept; ties go to the lowest row, and in it to the lowest index. Only counts travel, of no size that depends
  on n_kept, the batch or the latents. -0 and NaN are ordered as in `wins`.

  Args:
    values_bk: a device's pre-activations, dense, or candidates of each row in the order of `local_topk`. With
      candidates the result is that of the dense values unless a row's last candidate on some device is kept: only then
      may one that was left out have belonged there.
    n_kept: static, below 2^31 - 1.

  Raises:
    ValueError: n_kept is not between 1 and the number of values, or 2^31 - 2, or a device has more values than that.
  """
  axes = ('data', 'model')
  n_all = [n * jax.lax.axis_size(axis) for n, axis in zip(values_bk.shape, axes, strict=True)]
  keys_bk = ordered_keys(values_bk)
  kth, n_larger, n_reaching = _batch_kth(keys_bk, n_kept, axes)

  def falling(axis):
    """Keys of this device's rows (axis 0) or places in them (1), from the largest of the first to 0 of the last."""
    n = values_bk.shape[axis]
    return (n_all[axis] - 1 - jax.lax.axis_index(axes[axis]) * n - jnp.arange(n)).astype(jnp.uint32)

  def find(keys, counts, n, axis):
    count = lambda edges_e: _total(jnp.sum(jnp.where(keys[:, None] >= edges_e, counts[:, None], 0), axis=0), axes)
    return _largest(count, n, (n_all[axis] - 1).bit_length())

  def first_ties(_):
    # The last row that has a winning tie, then the last place in it.
    tied_bk, row_b, place_k = keys_bk == kth, falling(0), falling(1)
    last_row, n_before, _ = find(row_b, jnp.sum(tied_bk, axis=1), n_kept - n_larger, 0)
    in_last_row_b1 = (row_b == last_row)[:, None]
    last_place, _, _ = find(place_k, jnp.sum(tied_bk & in_last_row_b1, axis=0), n_kept - n_larger - n_before, 1)
    first_bk = (row_b > last_row)[:, None] | in_last_row_b1 & (place_k >= last_place)
    return (keys_bk > kth) | tied_bk & first_bk

  # Most batches of floats have no two values that tie for the last place, and need not count where ties are.
  mask_bk = jax.lax.cond(n_reaching == n_kept, lambda _: keys_bk >= kth, first_ties, None)
  return mask_bk, _value(kth)


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


@functools.partial(jax.jit, static_argnames='n_kept')
def threshold_for(values_bl: jax.Array, n_kept: int) -> jax.Array:
  """Returns the largest float32 threshold that at least n_kept values are above, on any mesh; without ties, exactly.

  It turns a TopK SAE into a JumpReLU one: of the pre-activations of a sample of tokens, n_kept = tokens * L0 are above
  the threshold, so that L0 holds in the mean. Candidates will do for dense values, where each token has more than any
  token keeps. JumpReLU counts a threshold below 0 as 0: n_kept must not exceed the positive values of the sample.

  Raises:
    ValueError: as `batch_wins`.
  """
  spec = sharding.fitting('batch latent', values_bl.shape)
  axes = tuple(axis for axis in spec if axis)

  def smallest_kept(values_bl):
    return _value(_batch_kth(ordered_keys(values_bl), n_kept, axes)[0])

  kept = jax.shard_map(smallest_kept, in_specs=spec, out_specs=P())(jax.lax.stop_gradient(values_bl))
  return jnp.nextafter(kept, -jnp.inf)
