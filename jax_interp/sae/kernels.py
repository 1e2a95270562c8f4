"""What a sparse training step is made of, on one shard of latents: select_topk, decode_and_dz, sparse_update.

Each works on [b, k]: the values and the indices of a token's k candidates. `sparse` reads and writes only their rows;
`sorted` does too, and adds to them in order, which takes a GPU less than half the time and a CPU some more; `grouped`
is for CPUs, and sums what the tokens of a latent add, on all cores, before it adds; `pallas` are kernels for CUDA, and
`sorted` elsewhere; `dense` multiplies [b, latent] matrices that are 0 elsewhere. Which is faster is a matter of
n_latents / k, of tokens and of the machine, and `fastest` measures it; `fastest_dtype` measures in which dtype
candidates are chosen faster. All give the same numbers, up to the order of sums. Kernels for another device belong
here as another `Kernels`.
"""

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.sae import pallas_kernels
from models.topk import chosen_again, local_topk, plain_topk, topk_of_candidates

# Tokens encoded at a time, so that the pre-activations of a whole batch are never allocated: on a CPU 512 are slower
# and 4,096 no faster; an accelerator needs more to be busy.
BLOCK_ROWS, ACCELERATOR_BLOCK_ROWS = 1024, 8192
# Gathers of that many of a token's k rows become one loop over [b, d]: on a CPU twice as fast as one row at a time.
# All k at once are no faster, and compiling takes as long as there are terms.
UNROLL = 16
# On a CPU, tokens whose rows are added to two gradients at a time, in two halves: XLA (jax 0.10.2) makes the gradients
# on two threads where a loop has enough operations, and with so few tokens little between them leaves the cache. One
# part or four are slower, and so are 512 tokens.
ADD_ROWS = 1024
# On an accelerator, numbers of a weight that are gathered together: 1 GB. TPUs write them to memory, so that the rows
# of all candidates of 8,192 tokens would be 51 GB at d 12,288 and k 128; GPUs may, where they add them to gradients.
ACCELERATOR_GATHERED = 2**28
# Tokens that are grouped by latent at a time: with more of them fewer slots stay empty, but fewer stay in the cache.
GROUPED_ROWS = 4096
# Slots of a group, tokens of a latent whose rows are summed together: 8 are slower, as more is added one after the
# other, and 32 are at 1,024 tokens, as more slots are empty. At most so many groups, and at most half of them, are
# summed at a time: XLA (jax 0.10.2) would, in one loop over all, look up each token anew for every number of its row.
SLOTS, SUMMED_GROUPS = 16, 4096
PACKED = 2**32  # what a number holds that is sorted with its place, which takes a CPU a quarter of the time
GATHERED_ROWS = 1024  # on a CPU, rows of a weight that are gathered together, those of 1024 / k tokens
# Candidates beyond k: some, and a share of k. What rounding may add, in standard deviations of pre-activations, grows
# with the root of d. At d 768, with k 32 of 8,192 or 24,576 latents, as many leave no token in a thousand unproven, and
# half as many up to a sixth: on the benchmark's activations, in the first 48 steps. Of the demo's trained SAE and its
# activations it is none with k 16, and 7 in a thousand with k 64.
SPARE_CANDIDATES, SPARE_PER_K, SPARE_D = 16, 0.5, 768
SMALLEST_NORM = 1e-11  # whose square, and those of what rounding takes off its numbers, float32 can tell from 0
DTYPES = 'float32', 'bfloat16'  # in which candidates may be chosen
PROBE_ROWS, PROBE_REPEATS = 1024, 3
# What is timed has as many tokens as a device has in a step, but at most so many, and above PROBE_ROWS no more than a
# dense product of so many multiplications allows, so that dense kernels take seconds and not minutes.
PROBE_MOST_ROWS, PROBE_PRODUCTS = 4096, 2**37
PROBE_STEPS = 2  # in one call, as in training; alone, on a CPU, allocating would take as long
PROBE_TOLERANCE = 1e-3  # of the largest gradient: a thousand sums in float32 differ by far less
HOPELESS = 3  # times as long as the fastest: what takes longer is not called again
CLEAR_GAIN = 0.95  # of the time in float32, what bfloat16 may take at most: so most measurements agree


class Gradients(NamedTuple):
  """Of the encoder and decoder [l, d] and the latent bias [l]; along_l is the decoder's along its own rows."""

  encoder_ld: jax.Array
  decoder_ld: jax.Array
  latent_bias_l: jax.Array
  along_l: jax.Array


class Kernels(NamedTuple):
  """Products with the rows of a few latents a token.

  Attributes:
    weighted_sum: (values_bk, w_ld, indices_bk) to out_bd = the sum over k of values_bk w[indices_bk].
    dot: (x_bd, w_ld, indices_bk) to out_bk = <x_b, w[indices_bk]>.
    add_outers: (totals_ld, values_bk, x_bd, indices_bk), tuples of as many each but for the indices, to the tuple of
      total_ld + the sum of values_bk x_bd over all b and k with indices_bk = l.
    error_and_dot: (values_bk, w_ld, indices_bk, target_bd) to error_bd = target_bd - weighted_sum, and its `dot` with
      the same rows.
    topk: (x_bc, k) to `jax.lax.top_k` of maxima of groups of pre-activations, or of the members of some groups.
  """

  weighted_sum: Callable
  dot: Callable
  add_outers: Callable
  error_and_dot: Callable
  topk: Callable = plain_topk


def _rows(w_ld, indices):
  return w_ld.at[indices].get(mode='promise_in_bounds')


def _in_blocks(f, n_rows, *arrays):
  """Maps f over blocks of n_rows rows of the arrays, and over the rows that are left."""
  n_blocks, n_left = divmod(len(arrays[0]), n_rows)
  if n_blocks + (n_left > 0) <= 1:
    return f(*arrays)
  whole = tuple(x[: n_blocks * n_rows].reshape(n_blocks, n_rows, *x.shape[1:]) for x in arrays)
  found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(lambda block: f(*block), whole))
  if not n_left:
    return found
  left = f(*(x[n_blocks * n_rows :] for x in arrays))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, left)


def _sparse_weighted_sum(values_bk, w_ld, indices_bk):
  def add(out_bd, terms):
    values_ub, indices_ub = terms
    rows = zip(values_ub, indices_ub, strict=True)
    return out_bd + sum(values_b[:, None] * _rows(w_ld, indices_b) for values_b, indices_b in rows), None

  # The first terms come before the scan, so that the carry varies over the mesh axes of its terms from the start.
  values_kb, indices_kb = values_bk.T, indices_bk.T
  first = len(values_kb) % UNROLL or UNROLL
  out_bd, _ = add(0, (values_kb[:first], indices_kb[:first]))
  if first == len(values_kb):
    return out_bd
  chunks = tuple(x[first:].reshape(-1, UNROLL, x.shape[1]) for x in (values_kb, indices_kb))
  return jax.lax.scan(add, out_bd, chunks)[0]


def _accelerator_rows(k, d):
  """Returns how many tokens' k rows of d numbers an accelerator gathers together: a power of 2, as most batches are."""
  return min(ACCELERATOR_BLOCK_ROWS, 1 << max(0, (ACCELERATOR_GATHERED // (k * d)).bit_length() - 1))


def _sparse_dot(x_bd, w_ld, indices_bk, blocks_at_once=1):
  def blocked(x_bd, w_ld, indices_bk):
    dot = lambda x_bd, indices_bk: jnp.einsum('bd,bkd->bk', x_bd, _rows(w_ld, indices_bk))
    return _in_blocks(dot, max(1, blocks_at_once * GATHERED_ROWS // indices_bk.shape[1]), x_bd, indices_bk)

  # A GPU's compiler gathers within the sum; a CPU's would do it one number at a time.
  def fused(x_bd, w_ld, indices_bk):
    dot = lambda x_bd, indices_bk: jnp.sum(x_bd[:, None] * _rows(w_ld, indices_bk), axis=-1)
    return _in_blocks(dot, _accelerator_rows(indices_bk.shape[1], w_ld.shape[1]), x_bd, indices_bk)

  return jax.lax.platform_dependent(x_bd, w_ld, indices_bk, cpu=blocked, default=fused)


def _one_after_other(weighted_sum, dot):
  def error_and_dot(values_bk, w_ld, indices_bk, target_bd):
    error_bd = target_bd - weighted_sum(values_bk, w_ld, indices_bk)
    return error_bd, dot(error_bd, w_ld, indices_bk)

  return error_and_dot


def _sparse_error_and_dot(values_bk, w_ld, indices_bk, target_bd):
  def blocked(values_bk, w_ld, indices_bk, target_bd):
    def block(values_bk, indices_bk, target_bd):
      rows_bkd = _rows(w_ld, indices_bk)
      error_bd = target_bd - jnp.einsum('bk,bkd->bd', values_bk, rows_bkd)
      return error_bd, jnp.einsum('bd,bkd->bk', error_bd, rows_bkd)

    return _in_blocks(block, max(1, GATHERED_ROWS // indices_bk.shape[1]), values_bk, indices_bk, target_bd)

  default = _one_after_other(_sparse_weighted_sum, _sparse_dot)
  return jax.lax.platform_dependent(values_bk, w_ld, indices_bk, target_bd, cpu=blocked, default=default)


def added_in_blocks(add_block: Callable, n_rows: int, totals, *batch):
  """Returns totals after add_block(totals, *block) for every block of n_rows rows, and for the rows that are left.

  Args:
    add_block: returns a pytree like totals.
    n_rows: of a block.
    totals: to begin with.
    batch: pytrees of arrays [b, ...].
  """
  n_blocks, n_left = divmod(len(jax.tree.leaves(batch)[0]), n_rows)
  if n_blocks == 1 and not n_left:
    return add_block(totals, *batch)
  if n_blocks:
    whole = jax.tree.map(lambda a: a[: n_blocks * n_rows].reshape(n_blocks, n_rows, *a.shape[1:]), batch)
    totals, _ = jax.lax.scan(lambda totals, block: (add_block(totals, *block), None), totals, whole)
  return add_block(totals, *jax.tree.map(lambda a: a[n_blocks * n_rows :], batch)) if n_left else totals


def _sparse_add_outers(totals_ld, values_bk, x_bd, indices_bk):
  def add_block(n_parts, totals_ld, values_bk, x_bd, indices_bk):
    ends = [len(indices_bk) * i // n_parts for i in range(n_parts + 1)]
    parts = [slice(*of) for of in itertools.pairwise(ends)]

    def add(totals_ld, terms):
      *values_b, indices_b = terms
      for part in parts:
        totals_ld = tuple(
          total_ld.at[indices_b[part]].add(value_b[part, None] * x[part], mode='promise_in_bounds')
          for total_ld, value_b, x in zip(totals_ld, values_b, x_bd, strict=True)
        )
      return totals_ld, None

    return jax.lax.scan(add, totals_ld, tuple(a.T for a in (*values_bk, indices_bk)))[0]

  cpu = functools.partial(added_in_blocks, functools.partial(add_block, 2), ADD_ROWS)
  default = functools.partial(add_block, 1)
  return jax.lax.platform_dependent(totals_ld, values_bk, x_bd, indices_bk, cpu=cpu, default=default)


def _sorted_add_outers(totals_ld, values_bk, x_bd, indices_bk):
  def add_block(totals_ld, values_bk, x_bd, indices_bk):
    order = jnp.argsort(indices_bk.reshape(-1))
    sorted_indices, tokens = indices_bk.reshape(-1)[order], order // indices_bk.shape[1]

    def add(total_ld, value_bk, x_bd):
      rows = value_bk.reshape(-1)[order, None] * x_bd[tokens]
      return total_ld.at[sorted_indices].add(rows, mode='promise_in_bounds', indices_are_sorted=True)

    return tuple(map(add, totals_ld, values_bk, x_bd))

  n_rows = _accelerator_rows(indices_bk.shape[1], x_bd[0].shape[1])
  return added_in_blocks(add_block, n_rows, totals_ld, values_bk, x_bd, indices_bk)


def _by_latent(indices_bk, n_latents):
  """Returns the places of the flattened indices in their order, of equal ones the first first."""
  indices = indices_bk.reshape(-1)
  n = len(indices)
  if n * n_latents > PACKED:
    return jnp.argsort(indices)
  packed = indices.astype(jnp.uint32) * jnp.uint32(n) + jnp.arange(n, dtype=jnp.uint32)
  return (jax.lax.sort(packed, is_stable=False) % jnp.uint32(n)).astype(jnp.int32)


def _grouped_add_outers(totals_ld, values_bk, x_bd, indices_bk):
  def add_block(totals_ld, values_bk, x_bd, indices_bk):
    n_latents, k = len(totals_ld[0]), indices_bk.shape[1]
    pairs = _by_latent(indices_bk, n_latents)
    count_l = jnp.zeros(n_latents, jnp.int32).at[indices_bk].add(1, mode='promise_in_bounds')
    # Every latent has a group of slots, and those of more tokens have more groups: of m, what is left over is empty.
    n_more_l = jnp.maximum(-(-count_l // SLOTS) - 1, 0)
    ends_l = jnp.cumsum(n_more_l)
    more_m = jnp.arange(max(1, len(pairs) // SLOTS))
    n_ended_m = jnp.cumsum(jnp.zeros_like(more_m).at[ends_l].add(1, mode='drop'))
    latent_m = jnp.minimum(n_ended_m, n_latents - 1)
    nth_m = jnp.where(more_m < ends_l[-1], 1 + more_m - _rows(ends_l - n_more_l, latent_m), 1 + len(more_m))
    start_l = jnp.cumsum(count_l) - count_l

    def slots(first_g, count_g, start_g):
      """Returns token_gs and each total's value_gs: from the first_g-th on of count_g pairs that begin at start_g."""
      place_gs = first_g[:, None] + jnp.arange(SLOTS)
      full_gs = place_gs < count_g[:, None]
      pair_gs = _rows(pairs, jnp.where(full_gs, start_g[:, None] + place_gs, 0))
      # An empty slot adds 0 times some token's row: if that is not finite gradients are NaN, and the run stops.
      return pair_gs // k, *(jnp.where(full_gs, _rows(value_bk.reshape(-1), pair_gs), 0) for value_bk in values_bk)

    # One loop for all totals: had each its own, XLA (jax 0.10.2) would copy the encoder's weights at every step.
    def summed(token_gs, *values_gs):
      def weighted(value_gs, x_bd):
        terms = zip(value_gs.T, token_gs.T, strict=True)
        return sum(value_g[:, None] * _rows(x_bd, token_g) for value_g, token_g in terms)

      return tuple(map(weighted, values_gs, x_bd))

    def add_more(totals_ld, latent_m, *slots_ms):
      add = lambda total_ld, sum_md: total_ld.at[latent_m].add(sum_md, mode='promise_in_bounds')
      return tuple(map(add, totals_ld, summed(*slots_ms)))

    n_summed = lambda n_groups: max(1, min(SUMMED_GROUPS, n_groups // 2))
    sums_ld = _in_blocks(summed, n_summed(n_latents), *slots(jnp.zeros_like(count_l), count_l, start_l))
    totals_ld = tuple(map(jnp.add, totals_ld, sums_ld))
    slots_ms = slots(SLOTS * nth_m, _rows(count_l, latent_m), _rows(start_l, latent_m))
    return added_in_blocks(add_more, n_summed(len(more_m)), totals_ld, latent_m, *slots_ms)

  return added_in_blocks(add_block, GROUPED_ROWS, totals_ld, values_bk, x_bd, indices_bk)


def _densified(values_bk, indices_bk, n_latents):
  rows_b1 = jnp.arange(len(indices_bk))[:, None]
  dense_bl = jnp.zeros((len(indices_bk), n_latents))
  return dense_bl.at[rows_b1, indices_bk].add(values_bk, mode='promise_in_bounds')


def _dense_weighted_sum(values_bk, w_ld, indices_bk):
  write = lambda values_bk, indices_bk: _densified(values_bk, indices_bk, len(w_ld)) @ w_ld
  return _in_blocks(write, BLOCK_ROWS, values_bk, indices_bk)


def _dense_dot(x_bd, w_ld, indices_bk):
  dot = lambda x_bd, indices_bk: jnp.take_along_axis(x_bd @ w_ld.T, indices_bk, axis=1, mode='promise_in_bounds')
  return _in_blocks(dot, BLOCK_ROWS, x_bd, indices_bk)


def _dense_add_outers(totals_ld, values_bk, x_bd, indices_bk):
  def add_block(totals_ld, values_bk, x_bd, indices_bk):
    add = lambda total_ld, value_bk, x_bd: total_ld + _densified(value_bk, indices_bk, len(total_ld)).T @ x_bd
    return tuple(map(add, totals_ld, values_bk, x_bd))

  return added_in_blocks(add_block, BLOCK_ROWS, totals_ld, values_bk, x_bd, indices_bk)


def _on_cuda(kernel, default):
  return lambda *args: jax.lax.platform_dependent(*args, cuda=kernel, default=default)


def _cuda_topk(x_bc, k):
  if x_bc.shape[1] > pallas_kernels.MOST_NUMBERS:
    return plain_topk(x_bc, k)
  kernel, default = (functools.partial(topk, k=k) for topk in (pallas_kernels.topk, plain_topk))
  return _on_cuda(kernel, default)(x_bc)


# 'grouped' reads the decoder's rows twice, first in one loop on all cores: in `_sparse_error_and_dot` XLA (jax 0.10.2)
# sums those of 32 latents a token, unlike those of 64, on one core. For its products twice as many rows are faster.
_grouped_dot = functools.partial(_sparse_dot, blocks_at_once=2)
_SORTED = Kernels(
  _sparse_weighted_sum,
  _sparse_dot,
  _sorted_add_outers,
  _one_after_other(_sparse_weighted_sum, _sparse_dot),
)
KERNELS = {
  'sparse': Kernels(_sparse_weighted_sum, _sparse_dot, _sparse_add_outers, _sparse_error_and_dot),
  'sorted': _SORTED,
  'grouped': Kernels(
    _sparse_weighted_sum,
    _grouped_dot,
    _grouped_add_outers,
    _one_after_other(_sparse_weighted_sum, _grouped_dot),
  ),
  'pallas': Kernels(
    _on_cuda(pallas_kernels.weighted_sum, _SORTED.weighted_sum),
    _on_cuda(pallas_kernels.dot, _SORTED.dot),
    _on_cuda(pallas_kernels.add_outers, _SORTED.add_outers),
    _on_cuda(pallas_kernels.error_and_dot, _SORTED.error_and_dot),
    _cuda_topk,
  ),
  'dense': Kernels(
    _dense_weighted_sum,
    _dense_dot,
    _dense_add_outers,
    _one_after_other(_dense_weighted_sum, _dense_dot),
  ),
}


def n_candidates(k: int, d: int) -> int:
  """Returns how many latents products in bfloat16 choose, for the k largest in float32 to be proven among them."""
  return k + SPARE_CANDIDATES + math.ceil(SPARE_PER_K * k * (d / SPARE_D) ** 0.5)


def select_topk(
  kernels: Kernels,
  x_bd: jax.Array,
  encoder_ld: jax.Array,
  latent_bias_l: jax.Array,
  k: int,
  dtype: str = 'float32',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns values_bk and indices_bk of the k largest pre-activations, in descending order, ties by lowest index.

  And again_b, the tokens whose choice in bfloat16 was not proven: it was made again.

  In bfloat16 the result is that of float32, up to the order of sums. Products of rounded numbers, summed in float32,
  choose `n_candidates`, whose pre-activations are computed in float32. The k largest of them are the result where no
  other latent can reach them: its rounded product is below the last candidate's, and rounding changes products by no
  more than `_rounding_error`. Tokens where this does not hold, and those with ties, are chosen again in float32.
  """

  def largest(x_bd, encoder_ld, k, precision=None, any_tie=False):
    def in_blocks(n_rows, x_bd, encoder_ld, latent_bias_l):
      product = functools.partial(jnp.einsum, 'bd,ld->bl', precision=precision, preferred_element_type=jnp.float32)
      choose = lambda x_bd: local_topk(product(x_bd, encoder_ld), k, latent_bias_l, any_tie, kernels.topk)
      return _in_blocks(choose, n_rows, x_bd)

    cpu, accelerator = (functools.partial(in_blocks, n_rows) for n_rows in (BLOCK_ROWS, ACCELERATOR_BLOCK_ROWS))
    return jax.lax.platform_dependent(x_bd, encoder_ld, latent_bias_l, cpu=cpu, default=accelerator)

  n_chosen = n_candidates(k, x_bd.shape[1])
  if dtype == 'float32' or n_chosen >= len(encoder_ld):
    values_bk, indices_bk = largest(x_bd, encoder_ld, k)
    return values_bk, indices_bk, jnp.zeros_like(values_bk[:, 0], bool)
  rounded_bc, candidates_bc = largest(x_bd.astype(dtype), encoder_ld.astype(dtype), n_chosen, any_tie=True)
  exact_bc = _sparse_dot(x_bd, encoder_ld, candidates_bc) + latent_bias_l[candidates_bc]
  values_bk, indices_bk, settled_b = topk_of_candidates(exact_bc, candidates_bc, k)
  last_b = rounded_bc[:, -1]
  # Adding the bias rounds by 2^-24 of the sum: in what is compared with the last candidate, in the pre-activation of
  # another latent, and twice here; twice that is more than enough. An infinite sum proves nothing.
  most_of_others_b = last_b + _rounding_error(x_bd, encoder_ld, dtype) + 2.0**-21 * jnp.abs(last_b)
  again_b = ~(settled_b & (most_of_others_b < values_bk[:, -1]))
  again = lambda x_bd: largest(x_bd, encoder_ld, k, 'highest')  # an accelerator would round
  return *chosen_again(again, again_b, (values_bk, indices_bk), x_bd), again_b


def _rounding_error(x_bd, encoder_ld, dtype):
  """Returns, for each token, the most that its products with any row change when both are rounded.

  x w - x' w' = (x - x') w + x' (w - w'), and each is at most a product of norms (Cauchy and Schwarz). Sums of d
  products in float32 are off by d 2^-24 times the product of norms, or twice that where additions truncate, as in
  some tensor cores: so is that of the rounded numbers, and by the former that of the others, in float32.
  """
  finfo = jnp.finfo(dtype)

  def norms(x_bd):
    norm = lambda x_bd: jnp.sum(x_bd**2, axis=1) ** 0.5
    # Not by casting there and back, which XLA may leave out.
    return norm(x_bd), norm(x_bd - jax.lax.reduce_precision(x_bd, finfo.nexp, finfo.nmant))

  # On a CPU in blocks: XLA (jax 0.10.2) would write what is summed to memory.
  blocked = functools.partial(_in_blocks, norms, BLOCK_ROWS)
  norm_b, off_b = norms(x_bd)
  norm, off = map(jnp.max, jax.lax.platform_dependent(encoder_ld, cpu=blocked, default=norms))
  most_b = off_b * norm + (norm_b + off_b) * off + 4 * x_bd.shape[1] * 2.0**-24 * norm_b * norm
  return jnp.where((norm_b > SMALLEST_NORM) & (norm > SMALLEST_NORM), most_b, jnp.inf)


def decode_and_dz(
  kernels: Kernels,
  values_bk: jax.Array,
  decoder_ld: jax.Array,
  row_scale_l: jax.Array | None,
  indices_bk: jax.Array,
  target_bd: jax.Array,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns error_bd, the target minus what all latents write, and its products_bk with the rows of these latents.

  Of a loss c * sum(error_bd^2), the gradient of the values, dz_bk, is -2 c products_bk.

  Args:
    kernels: of `KERNELS`.
    values_bk: latents; 0 for what is not kept.
    decoder_ld: this shard's rows.
    row_scale_l: what the rows are multiplied by; None for 1.
    indices_bk: whose latents they are.
    target_bd: what they reconstruct.
    axis: of the mesh, over which shards add what they write; None where this is the only one.
  """
  scale_bk = 1 if row_scale_l is None else _rows(row_scale_l, indices_bk)
  scaled_bk = values_bk * scale_bk
  if axis is None or jax.lax.axis_size(axis) == 1:
    error_bd, products_bk = kernels.error_and_dot(scaled_bk, decoder_ld, indices_bk, target_bd)
    # Over one shard, psum only tells that the error is that of all.
    return error_bd if axis is None else jax.lax.psum(error_bd, axis), products_bk * scale_bk
  error_bd = target_bd - jax.lax.psum(kernels.weighted_sum(scaled_bk, decoder_ld, indices_bk), axis)
  return error_bd, kernels.dot(error_bd, decoder_ld, indices_bk) * scale_bk


def sparse_update(
  kernels: Kernels,
  grads: Gradients,
  values_bk: jax.Array,
  dz_bk: jax.Array,
  indices_bk: jax.Array,
  centred_bd: jax.Array,
  grad_bd: jax.Array,
) -> Gradients:
  """Returns grads plus those of a few latents a token.

  Args:
    kernels: of `KERNELS`.
    grads: added to.
    values_bk: latents.
    dz_bk: the loss's gradient with respect to their pre-activations.
    indices_bk: whose they are.
    centred_bd: what the encoder read.
    grad_bd: the loss's gradient with respect to what the decoder wrote.
  """
  add = lambda total_l, terms_bk: total_l.at[indices_bk].add(terms_bk, mode='promise_in_bounds')
  return Gradients(
    *kernels.add_outers((grads.encoder_ld, grads.decoder_ld), (dz_bk, values_bk), (centred_bd, grad_bd), indices_bk),
    add(grads.latent_bias_l, dz_bk),
    add(grads.along_l, values_bk * dz_bk),  # <values_b grad_b, row> = values_b dz_b
  )


def _seconds(runs):
  """Returns the seconds of each function, the least of a few calls after the one that compiles; of slow ones, of one.

  One that takes more than `HOPELESS` times as long as another is not called again.
  """
  for run in runs.values():
    jax.block_until_ready(run())
  seconds = dict.fromkeys(runs, math.inf)
  for _ in range(PROBE_REPEATS):
    least = min(seconds.values())
    for name, run in runs.items():
      if seconds[name] <= HOPELESS * least:
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds[name] = min(seconds[name], time.perf_counter() - began)
  return seconds


def _probe(n_latents, d, n_rows=PROBE_ROWS):
  """Returns x_bd, w_ld and bias_l: random but for the first latent, which every token has, as some of trained SAEs."""
  rng = np.random.default_rng(0)
  x_bd, w_ld = (jnp.asarray(rng.normal(size=(n, d)), jnp.float32) for n in (n_rows, n_latents))
  return x_bd, w_ld, jnp.zeros(n_latents).at[0].set(8 * d**0.5)  # 8 standard deviations of pre-activations


def _update(kernels, x_bd, w_ld, values_bk, indices_bk):
  error_bd, products_bk = decode_and_dz(kernels, values_bk, w_ld, None, indices_bk, x_bd)
  grads = Gradients(*(jnp.zeros(shape) for shape in (w_ld.shape, w_ld.shape, len(w_ld), len(w_ld))))
  return sparse_update(kernels, grads, values_bk, products_bk, indices_bk, x_bd, error_bd)


@functools.cache
def check(name: str, n_latents: int, d: int, k: int):
  """Raises unless kernels run on this machine and give the latents and gradients of 'sparse', in both dtypes.

  Raises:
    ValueError: they do not.
  """

  def step(kernels, dtype, *probe):
    values_bk, indices_bk, _ = select_topk(kernels, *probe, min(k, n_latents), dtype)
    return values_bk, _update(kernels, *probe[:2], values_bk, indices_bk)

  @functools.partial(jax.jit, static_argnums=0)
  def distance(dtype, *probe):
    found, expected = (step(KERNELS[kind], dtype, *probe) for kind in (name, 'sparse'))
    apart = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)), found, expected)
    return jnp.max(jnp.stack(jax.tree.leaves(apart)))

  # A warning, as commands show no less.
  logging.warning("trying kernels '%s'; should that end this process, set sae.kernels to another than these", name)
  try:
    apart = max(float(distance(dtype, *_probe(n_latents, d))) for dtype in DTYPES)
  except Exception as e:  # whatever a compiler or a card says of these kernels, there are others
    raise ValueError(f"kernels '{name}' fail on this machine: {e}") from e
  if not apart < PROBE_TOLERANCE:
    raise ValueError(f"kernels '{name}' are wrong on this machine: gradients are off by {apart:.2g} of the largest")


def n_looked_at(k: int, n_shards: int) -> int:
  """Returns how many of its candidates a shard looks at first, of which those that win are the first.

  With S shards k / S of a token's k winners are a shard's on average; six standard deviations and six more of a Poisson
  distribution with that mean are left to chance.
  """
  mean = k / n_shards
  return min(k, math.ceil(mean + 6 * mean**0.5 + 6))


@functools.cache
def fastest(n_latents: int, d: int, k: int, n_shards: int = 1, n_tokens: int = PROBE_ROWS) -> str:
  """Returns the name of the kernels that are fastest on one device of this machine at these sizes, by trying them.

  Sparse ones move some rows a token, k of one shard and fewer of several, where dense ones multiply by all: which wins
  depends on n_latents over their number against the ratio of the machine's FLOP/s to the bytes it gathers a second
  (some 300 to 1,000 on accelerators). On a GPU 'pallas' are tried if they give what 'sparse' give there.

  Args:
    n_latents: of a shard.
    d: their width.
    k: latents of a token, of all shards.
    n_shards: of how many this is one.
    n_tokens: of a step, or of a micro-batch, on one device; some thousand at most are tried.
  """
  n_rows = max(1, min(n_tokens, PROBE_MOST_ROWS, max(PROBE_ROWS, PROBE_PRODUCTS // (n_latents * d))))
  x_bd, w_ld, bias_l = _probe(n_latents, d, n_rows)

  @functools.partial(jax.jit, static_argnums=0)
  def select(kernels, x_bd, w_ld, bias_l):
    return select_topk(kernels, x_bd, w_ld, bias_l, min(k, n_latents))

  @functools.partial(jax.jit, static_argnums=0)
  def update(kernels, x_bd, w_ld, values_bk, indices_bk):
    def step(shift):  # to other latents, so that nothing is computed once for all steps
      return jax.tree.map(jnp.sum, _update(kernels, x_bd, w_ld, values_bk, (indices_bk + shift) % n_latents))

    return jax.lax.map(step, jnp.arange(PROBE_STEPS))

  *latents, _ = select(KERNELS['sparse'], x_bd, w_ld, bias_l)
  latents = [x_bk[:, : n_looked_at(k, n_shards)] for x_bk in latents]
  names = [name for name in KERNELS if name not in ('pallas', 'grouped')]
  # Made for a CPU; where latents have less than a token each, it would mostly sum empty slots.
  if jax.default_backend() == 'cpu' and n_rows * n_looked_at(k, n_shards) >= n_latents:
    names.append('grouped')
  if jax.default_backend() == 'gpu':
    try:
      check('pallas', n_latents, d, k)
      names.append('pallas')
    except ValueError as e:
      logging.warning('%s; they are not used', e)
  run = lambda name: lambda: update(KERNELS[name], x_bd, w_ld, *latents)
  seconds = _seconds({name: run(name) for name in names})
  if 'pallas' in names:  # they alone choose latents in a way of their own
    run_select = lambda name: lambda: select(KERNELS[name], x_bd, w_ld, bias_l)
    selecting = _seconds({name: run_select(name) for name in ('sparse', 'pallas')})
    seconds['pallas'] += PROBE_STEPS * (selecting['pallas'] - selecting['sparse'])
  return min(seconds, key=seconds.get)


@functools.cache
def fastest_dtype(n_latents: int, d: int, k: int) -> str:
  """Returns the dtype in which `select_topk` is faster on one device of this machine: bfloat16 if by `CLEAR_GAIN`.

  It wins where products are so much faster that the rows of the candidates, which it reads, cost less.
  """
  probe = _probe(n_latents, d)

  @functools.partial(jax.jit, static_argnums=0)
  def select(dtype, *probe):
    return select_topk(KERNELS['sparse'], *probe, min(k, n_latents), dtype)

  run = lambda dtype: lambda: select(dtype, *probe)
  seconds = _seconds({dtype: run(dtype) for dtype in DTYPES})
  return 'bfloat16' if seconds['bfloat16'] < CLEAR_GAIN * seconds['float32'] else 'float32'
