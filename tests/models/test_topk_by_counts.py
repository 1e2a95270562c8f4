"""Cuts found by counting are those of a stable sort, of every row and of the batch, and only counts travel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import sharding, topk

MESHES = [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]
B, L = 6, 64
KS = (3, 20, L, L + 5)  # fewer and more than the 8 latents of the smallest shard; all; more than there are


def normal():
  return np.random.default_rng(0).normal(size=(B, L)).astype(np.float32)


def special():
  """Rows of values with an order of their own: signed zeros, infinities, NaNs of both signs, subnormal numbers."""
  bits = [0, 1 << 31, 1, (1 << 31) + 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x3F800000, 0xBF800000]
  return np.random.default_rng(1).choice(np.array(bits, np.uint32), size=(B, L)).view(np.float32)


INPUTS = {
  'no_ties': normal(),
  'ties': np.round(2 * normal()),
  'all_equal': np.full((B, L), -1.5, np.float32),
  'zeros_of_relu': np.maximum(normal() - 1, 0),
  'minus_infinity': np.where(normal() > 1, normal(), -np.inf).astype(np.float32),
  'special': special(),
}


def order(x):
  """int64 numbers in the total order of floats, with -0 below 0: the magnitude, reflected where the sign is set."""
  bits = np.ascontiguousarray(x).view(np.uint32).astype(np.int64)
  return np.where(bits >> 31, -1 - (bits & 0x7FFFFFFF), bits)


def largest_of_rows(x_bl, k):
  mask_bl = np.zeros(x_bl.shape, bool)
  np.put_along_axis(mask_bl, np.argsort(-order(x_bl), axis=1, kind='stable')[:, :k], True, 1)
  return mask_bl


def largest_of_batch(x_bl, n):
  mask = np.zeros(x_bl.size, bool)
  kept = np.argsort(-order(x_bl).ravel(), kind='stable')[:n]
  mask[kept] = True
  return mask.reshape(x_bl.shape), x_bl.ravel()[kept[-1]]


def dense_wins(ks, by_counts):
  def local(x_bl):
    values_bk, indices_bk = topk.local_topk(x_bl, min(max(ks), x_bl.shape[1]))
    return [topk.scatter_mask(indices_bk, mask, x_bl.shape[1]) for mask in topk.wins(values_bk, ks, by_counts)]

  return jax.jit(jax.shard_map(local, in_specs=P('data', 'model'), out_specs=P('data', 'model')))


def dense_batch_wins(n_kept, n_candidates=None):
  def local(x_bl):
    if n_candidates is None:
      return topk.batch_wins(x_bl, n_kept)
    values_bk, indices_bk = topk.local_topk(x_bl, min(n_candidates, x_bl.shape[1]))
    mask_bk, smallest = topk.batch_wins(values_bk, n_kept)
    return topk.scatter_mask(indices_bk, mask_bk, x_bl.shape[1]), smallest

  return jax.jit(jax.shard_map(local, in_specs=P('data', 'model'), out_specs=(P('data', 'model'), P())))


@pytest.mark.parametrize('by_counts', [True, False], ids=['counts', 'values'])
@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_wins_are_those_of_a_stable_sort(shape, by_counts):
  with jax.set_mesh(sharding.make_mesh(*shape)):
    run = dense_wins(KS, by_counts)
    for name, x_bl in INPUTS.items():
      for k, mask_bl in zip(KS, run(x_bl), strict=True):
        np.testing.assert_array_equal(mask_bl, largest_of_rows(x_bl, k), err_msg=f'{name} {k}')
        np.testing.assert_array_equal(np.sum(mask_bl, axis=1), min(k, L))


def test_wins_of_fewer_candidates_than_k():
  # Two candidates of each of eight shards: exact for k = 2, and all 16 for k = 20.
  with jax.set_mesh(sharding.make_mesh(1, 8)):
    cut = lambda x_bl: topk.wins(topk.local_topk(x_bl, 2)[0], (2, 16, 20), True)
    masks = jax.jit(jax.shard_map(cut, in_specs=P('data', 'model'), out_specs=P('data', 'model')))(INPUTS['ties'])
  assert [int(np.sum(mask)) for mask in masks] == [2 * B, 16 * B, 16 * B]


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('n_kept', [1, 7 * B, B * L - 1, B * L])
def test_batch_wins_are_those_of_a_stable_sort(shape, n_kept):
  with jax.set_mesh(sharding.make_mesh(*shape)):
    dense, candidates = dense_batch_wins(n_kept), dense_batch_wins(n_kept, L)
    for name, x_bl in INPUTS.items():
      expected_bl, smallest = largest_of_batch(x_bl, n_kept)
      for run in (dense, candidates):
        mask_bl, threshold = run(x_bl)
        np.testing.assert_array_equal(mask_bl, expected_bl, err_msg=name)
        np.testing.assert_array_equal(order(np.asarray(threshold)), order(smallest), err_msg=name)


def test_a_few_candidates_of_each_row_give_the_batch_s_winners_where_none_of_the_last_wins():
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    mask_bl, _ = dense_batch_wins(3 * B, 8)(INPUTS['no_ties'])
  expected_bl, _ = largest_of_batch(INPUTS['no_ties'], 3 * B)
  assert expected_bl.reshape(B, 4, L // 4).sum(2).max() < 8
  np.testing.assert_array_equal(mask_bl, expected_bl)


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_n_values_are_above_the_threshold(shape):
  with jax.set_mesh(sharding.make_mesh(*shape)):
    x_bl = INPUTS['no_ties']
    for n_kept in (1, 5 * B, 50 * B):
      threshold = topk.threshold_for(x_bl, n_kept)
      assert np.sum(x_bl > np.asarray(threshold)) == n_kept
      assert threshold == np.nextafter(np.sort(x_bl.ravel())[-n_kept], np.float32(-np.inf))
    tied = np.asarray(topk.threshold_for(INPUTS['ties'], 2 * B))
    assert np.sum(INPUTS['ties'] > tied) >= 2 * B
    odd_bl = x_bl[:5, :9]  # neither axis is divided
    assert np.sum(odd_bl > np.asarray(topk.threshold_for(odd_bl, 11))) == 11


def test_bfloat16_is_ordered_as_float32():
  x_bl = jnp.asarray(normal(), jnp.bfloat16)
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    mask_bl, _ = dense_batch_wins(40)(x_bl)
  np.testing.assert_array_equal(mask_bl, largest_of_batch(np.asarray(x_bl, np.float32), 40)[0])


def test_totals_stop_at_the_largest_count():
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    total = jax.shard_map(lambda x: topk._total(x[0], ('data', 'model')), in_specs=P(('data', 'model')), out_specs=P())
    for counts in ([2**31 - 1] * 8, [2**28] * 8, [2**28] * 7 + [2**28 - 1], [65535] * 8, [0, 1, 2, 3, 4, 5, 6, 7]):
      assert total(jnp.array(counts, jnp.int32)) == min(sum(counts), 2**31 - 1)


@pytest.mark.parametrize(
  ('shape', 'n_kept', 'message'),
  [
    ((B, L), 0, 'n_kept 0 is not between 1 and 384'),
    ((B, L), B * L + 1, 'n_kept 385 is not between 1 and 384'),
    ((2**17, 2**15), 2**31 - 1, 'n_kept 2147483647 is not between 1 and 2147483646'),
    ((2**18, 2**16), 2**20, 'a device has 2147483648 values'),
  ],
)
def test_what_cannot_be_counted_raises(shape, n_kept, message):
  x_bl = jax.ShapeDtypeStruct(shape, jnp.float32)
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    for run in (dense_batch_wins(n_kept), functools.partial(topk.threshold_for, n_kept=n_kept)):
      with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, x_bl)
    jax.eval_shape(dense_batch_wins(2**31 - 2), jax.ShapeDtypeStruct((2**17, 2**15), jnp.float32))


def collectives(run, x_bl):
  """Returns the shapes of all that the compiled program sends, and asserts that it sorts nothing."""
  hlo = run.lower(sharding.place(x_bl, 'batch latent')).compile().as_text()
  assert ' sort(' not in hlo
  lines = [line for line in hlo.splitlines() if re.search(r' (all-\w+|collective-permute|reduce-scatter)\(', line)]
  shapes = [shape for line in lines for shape in re.findall(r'\w\d+\[([\d,]*)\]', line)]
  return [tuple(int(n) for n in shape.split(',') if n) for shape in shapes]


@pytest.mark.parametrize('shape', [(2, 4), (1, 8)], ids=str)
def test_counts_travel_and_their_number_depends_on_nothing(shape):
  edges = 2**topk.RADIX_BITS - 1
  with jax.set_mesh(sharding.make_mesh(*shape)):
    for cut, counts, rows in (
      (lambda k: dense_wins((k,), True), (2, 16), 8 // shape[0]),
      (dense_batch_wins, (2, 200), 1),
    ):
      one, other = (collectives(cut(n), np.zeros((8, 4 * L), np.float32)) for n in counts)
      assert one == other
      assert one
      assert max(np.prod(size) for size in one) == rows * edges


def test_many_shards_count_and_few_send_values():
  with jax.set_mesh(sharding.make_mesh(1, 8)):
    hlo = lambda k: dense_wins((k,), None).lower(jnp.zeros((B, 8 * 64))).as_text()
    assert 'all_gather' in hlo(4)
    assert 'all_gather' not in hlo(64)


def test_gradients_do_not_pass_through_the_cut(mesh):
  x_bl = jnp.asarray(normal())

  def loss(x_bl):
    mask_bl, smallest = topk.batch_wins(x_bl, 5 * B)
    return jax.lax.psum(jnp.sum(jnp.where(mask_bl, x_bl, 0)), ('data', 'model')) + smallest

  run = jax.shard_map(loss, in_specs=P('data', 'model'), out_specs=P())
  expected_bl, _ = largest_of_batch(normal(), 5 * B)
  np.testing.assert_array_equal(jax.jit(jax.grad(run))(x_bl), expected_bl.astype(np.float32))
