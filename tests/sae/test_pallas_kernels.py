"""Pallas kernels, interpreted, give what NumPy gives in float64, and lower to Triton where there is no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_interp.sae import kernels, pallas_kernels

TOLERANCE = {'rtol': 2e-5, 'atol': 1e-4}  # sums of up to some thousand products of order 1 in float32
SIZES = pytest.mark.parametrize(
  ('b', 'd', 'n', 'k'),
  # One of everything; k and d that are powers of 2 and are not; several tiles of columns, and of tokens.
  [(1, 1, 1, 1), (6, 12, 40, 5), (5, 64, 16, 8), (3, 700, 24, 33), (40, 300, 3, 2), (2, 40, 12, 600)],
)


@pytest.fixture
def interpreted():
  """The kernels as they are on CUDA, interpreted."""
  return kernels.Kernels(
    *(functools.partial(getattr(pallas_kernels, f), interpret=True) for f in kernels.Kernels._fields)
  )


def arrays(b, d, n, k):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  indices_bk = rng.integers(n, size=(b, k)).astype(np.int32)
  indices_bk[:, 0] = n - 1  # of all tokens
  return tuple(map(jnp.asarray, (normal(b, d), normal(n, d), normal(b, k), indices_bk)))


@SIZES
def test_products_with_a_few_rows(interpreted, b, d, n, k):
  x_bd, w_ld, values_bk, indices_bk = arrays(b, d, n, k)
  rows_bkd = np.asarray(w_ld, np.float64)[indices_bk]
  expected_bd = np.einsum('bk,bkd->bd', values_bk, rows_bkd)
  np.testing.assert_allclose(interpreted.weighted_sum(values_bk, w_ld, indices_bk), expected_bd, **TOLERANCE)
  expected_bk = np.einsum('bd,bkd->bk', x_bd, rows_bkd)
  np.testing.assert_allclose(interpreted.dot(x_bd, w_ld, indices_bk), expected_bk, **TOLERANCE)
  error_bd, dots_bk = interpreted.error_and_dot(values_bk, w_ld, indices_bk, x_bd)
  np.testing.assert_allclose(error_bd, x_bd - expected_bd, **TOLERANCE)
  expected_bk = np.einsum('bd,bkd->bk', x_bd - expected_bd, rows_bkd)
  np.testing.assert_allclose(dots_bk, expected_bk, rtol=1e-4, atol=1e-4 * np.abs(expected_bk).max())


@SIZES
def test_what_tokens_write_to_rows(interpreted, b, d, n, k):
  x_bd, w_ld, values_bk, indices_bk = arrays(b, d, n, k)
  out_ld = interpreted.add_outers((w_ld, 2 * w_ld), (values_bk, -values_bk), (x_bd, 3 * x_bd), indices_bk)
  added_ld = np.einsum('bk,bd,bkl->ld', values_bk, np.asarray(x_bd, np.float64), np.eye(n)[indices_bk], optimize=True)
  np.testing.assert_allclose(out_ld[0], w_ld + added_ld, **TOLERANCE)
  np.testing.assert_allclose(out_ld[1], 2 * w_ld - 3 * added_ld, **TOLERANCE)


@pytest.mark.parametrize('counts', [(64,), (0, 17, 0, 31, 16), (16, 32, 16), (7, 1, 0), (1, 0, 200, 0, 3)], ids=str)
def test_what_many_tokens_write_to_a_row_is_summed_in_parts(monkeypatch, interpreted, counts):
  """Rows of no pairs, of whole parts of 16 and of more, the last row among them."""
  monkeypatch.setattr(pallas_kernels, 'MOST_PAIRS', 16)
  rng = np.random.default_rng(0)
  indices_b1 = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)[:, None]
  x_bd, w_ld = rng.normal(size=(len(indices_b1), 5)), np.ones((len(counts), 5), np.float32)
  values_b1 = rng.normal(size=indices_b1.shape)
  to_float32 = lambda *of: tuple(jnp.asarray(x, jnp.float32) for x in of)
  (out_ld,) = interpreted.add_outers((w_ld,), to_float32(values_b1), to_float32(x_bd), jnp.asarray(indices_b1))
  expected_ld = np.ones_like(w_ld, np.float64)
  np.add.at(expected_ld, indices_b1[:, 0], values_b1 * x_bd)
  np.testing.assert_allclose(out_ld, expected_ld, **TOLERANCE)


@pytest.mark.parametrize(('c', 'k'), [(1, 1), (16, 16), (37, 5), (100, 99), (600, 33), (64, 1)])
def test_the_largest_of_rows_are_those_of_xla_ties_and_all(c, k):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(9, c)).astype(np.float32)
  rows[1] = np.round(rows[1])  # ties, also of zeros of either sign
  rows[2] = rng.choice(np.float32([0.0, -0.0]), size=c)
  rows[3] = -np.inf
  rows[4, ::2] = np.nan
  rows[5, ::3] = np.copysign(np.nan, -1)
  rows[6, ::2] = rng.choice(np.float32([np.inf, -np.inf]), size=len(rows[6, ::2]))
  rows[7] = rng.choice(np.float32([1e-45, -1e-45, 0, 3e38, -3e38]), size=c)
  rows[8] = np.uint32(0xFFFFFFFF).view(np.float32)  # the least of all: as much as what is beyond a row
  expected_values, expected_indices = jax.lax.top_k(rows, k)
  values_bk, indices_bk = pallas_kernels.topk(jnp.asarray(rows), k, interpret=True)
  np.testing.assert_array_equal(indices_bk, expected_indices)
  np.testing.assert_array_equal(np.asarray(values_bk).view(np.int32), np.asarray(expected_values).view(np.int32))


def test_latents_chosen_with_the_kernel_are_those_chosen_without(interpreted, monkeypatch):
  rng = np.random.default_rng(0)
  x_bd, w_ld = (jnp.asarray(rng.normal(size=(n, 12)), jnp.float32) for n in (6, 1024))
  x_bd = x_bd.at[0].set(0)  # ties of one token alone, so that the others stay as they were chosen
  expected = kernels.select_topk(kernels.KERNELS['sparse'], x_bd, w_ld, jnp.zeros(len(w_ld)), 9)
  widths = []

  def counted(x_bc, k):
    widths.append(x_bc.shape[1])
    return interpreted.topk(x_bc, k)

  # As on an accelerator: a CPU has a way of its own.
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **_: default(*args))
  found = kernels.select_topk(interpreted._replace(topk=counted), x_bd, w_ld, jnp.zeros(len(w_ld)), 9)
  np.testing.assert_array_equal(found[1], expected[1])
  np.testing.assert_allclose(found[0], expected[0], **TOLERANCE)
  assert set(widths) == {64, 144}  # groups, and the members of nine of them


@pytest.mark.parametrize('k', [1, 32, 128, 2048])
def test_kernels_lower_to_triton(k):
  def step(*args):
    error_bd, dots_bk = pallas_kernels.error_and_dot(*args)
    return (
      error_bd,
      pallas_kernels.add_outers((args[1],), (dots_bk,), (error_bd,), args[2]),
      pallas_kernels.topk(args[1], 2),
    )

  shape = jax.ShapeDtypeStruct
  args = shape((64, k), 'float32'), shape((4096, 768), 'float32'), shape((64, k), 'int32'), shape((64, 768), 'float32')
  text = jax.jit(step).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('xla.gpu.triton') == 4


def test_over_a_mesh_what_is_traced_varies_as_the_batch_does():
  """On a mesh both platforms are traced; that of this one runs."""
  x_bd, w_ld, values_bk, indices_bk = arrays(8, 12, 40, 5)
  chosen = kernels.KERNELS['pallas']

  def local(values_bk, w_ld, indices_bk, x_bd):
    error_bd, dots_bk = kernels.decode_and_dz(chosen, values_bk, w_ld, None, indices_bk, x_bd)
    (grad_ld,) = chosen.add_outers((jax.lax.pcast(w_ld, 'data', to='varying'),), (dots_bk,), (error_bd,), indices_bk)
    return error_bd, jax.lax.psum(grad_ld, 'data')

  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    by_row = P('data')
    mapped = jax.shard_map(local, in_specs=(by_row, P(), by_row, by_row), out_specs=(by_row, P()))
    error_bd, grad_ld = jax.jit(mapped)(values_bk, w_ld, indices_bk, x_bd)
    text = jax.jit(mapped).trace(values_bk, w_ld, indices_bk, x_bd).lower(lowering_platforms=('cuda',)).as_text()
  error64_bd, dots_bk = kernels.KERNELS['sparse'].error_and_dot(values_bk, w_ld, indices_bk, x_bd)
  (expected_ld,) = kernels.KERNELS['sparse'].add_outers((2 * w_ld,), (dots_bk,), (error64_bd,), indices_bk)
  np.testing.assert_allclose(error_bd, error64_bd, **TOLERANCE)
  np.testing.assert_allclose(grad_ld, expected_ld, rtol=1e-4, atol=1e-3)
  assert 'xla.gpu.triton' in text
