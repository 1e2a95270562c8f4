"""Top-k, and products with the rows of a few latents a token, as Pallas kernels for CUDA: `KERNELS['pallas']`.

XLA reads a token's k rows once to decode and once more for the gradient of its latents, and adds to the gradients row
by row, where threads wait for each other. Here a program holds the rows of one token for both, and a program owns one
row of the gradients and adds up what tokens write to it: each row is read or written once, and these sums have one
order. Of top-k XLA makes a sort; here a program holds a row and finds its k-th largest number bit by bit. With
interpret=True they run anywhere, slowly; tests do that.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models.topk import ordered_keys

TILE = 8192  # numbers of a weight that a program holds, if k leaves room for FEWEST_COLUMNS of k rows
MOST_COLUMNS, FEWEST_COLUMNS = 512, 16
NUMBERS_PER_WARP = 2048  # 64 registers of each thread, where it may have 255, or 64 with most warps
FEWEST_WARPS, MOST_WARPS = 4, 32
MOST_NUMBERS = MOST_WARPS * NUMBERS_PER_WARP  # that a program can hold: k rows of FEWEST_COLUMNS, with k up to 4,096
LEAST = -(2**31)  # of int32
ADD_COLUMNS, ADD_TOKENS = 256, 16  # of a row of the gradients that a program adds up, and tokens at a time
MOST_PAIRS = 512  # of a latent and its tokens that a program adds up: few latents of a batch have more


def _power_of_2(n):
  """Returns the least power of 2 that is at least n: the only sizes that Triton has."""
  return 1 << (n - 1).bit_length()


def _like(shape, *inputs, dtype=jnp.float32):
  """Returns the type of a result, which varies over the mesh axes that inputs do."""
  varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))


def _tile(k, d):
  """Returns how many rows and columns of w a program holds at a time."""
  n_rows = _power_of_2(k)
  return n_rows, max(FEWEST_COLUMNS, min(MOST_COLUMNS, _power_of_2(d), TILE // n_rows))


def _warps(n_numbers):
  return triton.CompilerParams(num_warps=max(FEWEST_WARPS, n_numbers // NUMBERS_PER_WARP))


def _of_token(*refs, k, d, writes, reads):
  """Sums the rows of a token's latents (writes), multiplies each with a vector (reads), or both: see `_per_token`."""
  refs = list(refs)
  values_ref = refs.pop(0) if writes else None
  w_ref, indices_ref = refs.pop(0), refs.pop(0)
  x_ref = refs.pop(0) if reads else None
  out_ref = refs.pop(0) if writes else None
  dots_ref = refs.pop(0) if reads else None
  token = pl.program_id(0)
  n_rows, n_columns = _tile(k, d)
  places = jnp.arange(n_rows)
  in_k = places < k
  indices = triton.load(indices_ref.at[token, places], mask=in_k, other=0)
  values = triton.load(values_ref.at[token, places], mask=in_k, other=0.0) if writes else None

  def add(i, dots):
    columns = i * n_columns + jnp.arange(n_columns)
    in_d = columns < d
    rows = triton.load(w_ref.at[indices[:, None], columns[None]], mask=in_k[:, None] & in_d[None], other=0.0)
    x = triton.load(x_ref.at[token, columns], mask=in_d, other=0.0) if reads else None
    if writes:
      out = jnp.sum(values[:, None] * rows, axis=0)
      x = x - out if reads else out
      triton.store(out_ref.at[token, columns], x, mask=in_d)
    return dots + jnp.sum(rows * x[None], axis=1) if reads else dots

  dots = jax.lax.fori_loop(0, pl.cdiv(d, n_columns), add, jnp.zeros(n_rows if reads else (), jnp.float32))
  if reads:
    triton.store(dots_ref.at[token, places], dots, mask=in_k)


def _per_token(values_bk, w_ld, indices_bk, x_bd, interpret):
  """Returns out_bd and dots_bk of w's rows r_bk = w[indices_bk], one of them where an argument is None.

  out_b is sum_k values_bk r_bk, dots_bk <r_bk, x_b>. With both arguments out_b is x_b - sum_k values_bk r_bk, and
  dots_bk is its product with the rows.
  """
  writes, reads = values_bk is not None, x_bd is not None
  inputs = [x for x in (values_bk, w_ld, indices_bk, x_bd) if x is not None]
  (b, k), d = indices_bk.shape, w_ld.shape[1]
  shapes = [(b, d)] * writes + [(b, k)] * reads
  return pl.pallas_call(
    functools.partial(_of_token, k=k, d=d, writes=writes, reads=reads),
    out_shape=[_like(shape, *inputs) for shape in shapes],
    grid=(b,),
    compiler_params=_warps(math.prod(_tile(k, d))),
    interpret=interpret,
    name='rows_of_token',
  )(*inputs)


def weighted_sum(values_bk, w_ld, indices_bk, interpret=False):
  """As `kernels.Kernels.weighted_sum`."""
  return _per_token(values_bk, w_ld, indices_bk, None, interpret)[0]


def dot(x_bd, w_ld, indices_bk, interpret=False):
  """As `kernels.Kernels.dot`."""
  return _per_token(None, w_ld, indices_bk, x_bd, interpret)[0]


def error_and_dot(values_bk, w_ld, indices_bk, target_bd, interpret=False):
  """As `kernels.Kernels.error_and_dot`: a row is read once for both."""
  return tuple(_per_token(values_bk, w_ld, indices_bk, target_bd, interpret))


def _written(start, end, columns, order_ref, values_refs, x_refs, k, d):
  """Returns what some pairs (token, place among its k) of a latent write to these columns of its row, of each total."""
  in_d = columns < d

  def add(i, sums):
    places = start + i * ADD_TOKENS + jnp.arange(ADD_TOKENS)
    there = places < end
    pairs = triton.load(order_ref.at[places], mask=there, other=0)
    mask = there[:, None] & in_d[None]

    def of(values_ref, x_ref):
      values = triton.load(values_ref.at[pairs], mask=there, other=0.0)
      return values[:, None] * triton.load(x_ref.at[(pairs // k)[:, None], columns[None]], mask=mask, other=0.0)

    return tuple(total + jnp.sum(of(*refs), axis=0) for total, *refs in zip(sums, values_refs, x_refs, strict=True))

  zeros = (jnp.zeros(ADD_COLUMNS, jnp.float32),) * len(x_refs)
  return jax.lax.fori_loop(0, pl.cdiv(end - start, ADD_TOKENS), add, zeros)


def _to_parts(*refs, n, k, d):
  """Stores what MOST_PAIRS of a latent's pairs, or fewer, write to its row of each of n totals."""
  starts_ref, ends_ref, order_ref, *refs = refs
  values_refs, x_refs, part_refs = (refs[i * n : (i + 1) * n] for i in range(3))
  part = pl.program_id(0)
  columns = pl.program_id(1) * ADD_COLUMNS + jnp.arange(ADD_COLUMNS)
  sums = _written(starts_ref[part], ends_ref[part], columns, order_ref, values_refs, x_refs, k, d)
  for part_ref, total in zip(part_refs, sums, strict=True):
    triton.store(part_ref.at[part, columns], total, mask=columns < d)


def _to_row(*refs, n, k, d):
  """Adds to one row of each of n totals what the first MOST_PAIRS pairs of that latent write to it, and its parts."""
  starts_ref, firsts_ref, order_ref, *refs = refs
  values_refs, x_refs, part_refs, total_refs, out_refs = (refs[i * n : (i + 1) * n] for i in range(5))
  latent = pl.program_id(0)
  start, end = starts_ref[latent], starts_ref[latent + 1]
  columns = pl.program_id(1) * ADD_COLUMNS + jnp.arange(ADD_COLUMNS)
  read = lambda ref, row: triton.load(ref.at[row, columns], mask=columns < d, other=0.0)
  sums = _written(start, jnp.minimum(end, start + MOST_PAIRS), columns, order_ref, values_refs, x_refs, k, d)
  add = lambda part, sums: tuple(total + read(ref, part) for total, ref in zip(sums, part_refs, strict=True))
  sums = jax.lax.fori_loop(firsts_ref[latent], firsts_ref[latent + 1], add, sums)
  for total_ref, out_ref, total in zip(total_refs, out_refs, sums, strict=True):
    triton.store(out_ref.at[latent, columns], read(total_ref, latent) + total, mask=columns < d)


def add_outers(totals_ld, values_bk, x_bd, indices_bk, interpret=False):
  """As `kernels.Kernels.add_outers`; what is written to a row has one order.

  A latent may be that of every token: what of its pairs is beyond MOST_PAIRS is cut into parts that are summed first,
  each by a program, so that none has long to do while others wait.
  """
  n, (n_latents, d), k = len(totals_ld), totals_ld[0].shape, indices_bk.shape[1]
  latents = indices_bk.reshape(-1)
  order = jnp.argsort(latents, stable=True)
  # Arrays [l + 1]: where a latent's pairs, or its parts, begin; the next one's beginning is their end.
  from_0 = lambda n_l: jnp.cumsum(jnp.concatenate([jnp.zeros_like(n_l[:1]), n_l]))
  starts = from_0(jnp.zeros(n_latents, jnp.int32).at[latents].add(1, mode='promise_in_bounds'))
  firsts = from_0(jnp.maximum(starts[1:] - starts[:-1] - 1, 0) // MOST_PAIRS)
  parts = jnp.arange(max(1, latents.size // MOST_PAIRS))
  # Those that there are not belong to the last latent, and begin behind its end.
  latent_of = jnp.repeat(jnp.arange(n_latents), firsts[1:] - firsts[:-1], total_repeat_length=parts.size)
  part_starts = starts[latent_of] + MOST_PAIRS * (1 + parts - firsts[latent_of])
  part_ends = jnp.minimum(part_starts + MOST_PAIRS, starts[latent_of + 1])

  def call(kernel, n_rows, *inputs, aliases):
    return pl.pallas_call(
      functools.partial(kernel, n=n, k=k, d=d),
      out_shape=[_like((n_rows, d), *inputs)] * n,
      grid=(n_rows, pl.cdiv(d, ADD_COLUMNS)),
      input_output_aliases=aliases,
      compiler_params=_warps(ADD_COLUMNS * ADD_TOKENS),
      interpret=interpret,
      name=kernel.__name__.lstrip('_'),
    )(*inputs)

  of_pairs = order, *(x.reshape(-1) for x in values_bk), *x_bd
  part_sums = call(_to_parts, parts.size, part_starts, part_ends, *of_pairs, aliases={})
  inputs = starts, firsts, *of_pairs, *part_sums, *totals_ld
  aliases = {len(inputs) - n + i: i for i in range(n)}
  return tuple(call(_to_row, n_latents, *inputs, aliases=aliases))


def _of_row(x_ref, values_ref, indices_ref, *, k, c):
  """Stores the k largest numbers of a row and where they are, in the order of their places."""
  row, places = pl.program_id(0), jnp.arange(_power_of_2(c))
  in_row = places < c
  x = triton.load(x_ref.at[row, places], mask=in_row, other=0.0)
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  # The order of `models.topk.ordered_keys`, of signed numbers. No number has a smaller key than what is not there, and
  # of equal ones the first are taken.
  keys = jnp.where(in_row, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)
  count = lambda mask: jnp.sum(mask.astype(jnp.int32))

  def settle(i, kth):
    larger = kth + (jnp.int32(1) << (31 - i))  # the first wraps around, from the least number to 0
    return jnp.where(count(keys >= larger) >= k, larger, kth)

  kth = jax.lax.fori_loop(0, 32, settle, jnp.int32(LEAST))
  tied = keys == kth
  is_first = jnp.cumsum(tied.astype(jnp.int32)) <= k - count(keys > kth)
  chosen = (keys > kth) | (tied & is_first)
  n_before = jnp.cumsum(chosen.astype(jnp.int32)) - 1
  # What is not stored has places of its own beyond k: the interpreter would write there what it read.
  to = jnp.where(chosen, n_before, k + places)
  triton.store(values_ref.at[row, to], x, mask=chosen)
  triton.store(indices_ref.at[row, to], places, mask=chosen)


def topk(x_bc, k, interpret=False):
  """Returns `jax.lax.top_k` of rows of up to MOST_NUMBERS."""
  b, c = x_bc.shape
  values_bk, indices_bk = pl.pallas_call(
    functools.partial(_of_row, k=k, c=c),
    out_shape=[_like((b, k), x_bc), _like((b, k), x_bc, dtype=jnp.int32)],
    grid=(b,),
    compiler_params=_warps(_power_of_2(c)),
    interpret=interpret,
    name='largest_of_row',
  )(x_bc)
  # They are in the order of their places, which a stable sort keeps where they tie.
  _, *found = jax.lax.sort((~ordered_keys(values_bk), values_bk, indices_bk), dimension=1, num_keys=1)
  return tuple(found)
