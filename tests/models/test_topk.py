"""Top-k is exact, ties go to the lowest index, on every mesh, and no shard sees another's latents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sharding, topk

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
B, L = 6, 1024
TWO_STAGE, ONE_STAGE = 5, 200  # k at which groups pay, and k at which they do not


def stable_topk(x_bl, k):
  indices_bk = np.argsort(-x_bl, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(x_bl, indices_bk, 1), indices_bk


def preacts(ties):
  x_bl = np.random.default_rng(0).normal(size=(B, L)).astype(np.float32)
  return np.round(2 * x_bl) + np.float32(0) if ties else x_bl  # + 0 turns -0, which XLA puts below 0, into 0


@pytest.mark.parametrize('shape', MESHES, ids=str)
@pytest.mark.parametrize('k', [TWO_STAGE, ONE_STAGE, L])
def test_topk_is_numpys_on_every_mesh_ties_or_not(shape, k):
  with jax.set_mesh(sharding.make_mesh(*shape)):
    run = jax.jit(lambda x: (topk.topk_mask(x, k), *topk.local_topk(x, k)))
    for ties in (False, True):
      x_bl = preacts(ties)
      mask_bl, values_bk, indices_bk = run(x_bl)
      expected_values, expected_indices = stable_topk(x_bl, k)
      np.testing.assert_array_equal(values_bk, expected_values)
      np.testing.assert_array_equal(indices_bk, expected_indices)
      expected_mask = np.zeros((B, L), bool)
      np.put_along_axis(expected_mask, expected_indices, True, 1)
      np.testing.assert_array_equal(mask_bl, expected_mask)


def test_leading_dimensions_of_any_number_and_size(mesh):
  x_btl = preacts(ties=False).reshape(3, 2, L)  # 3 is not divisible by a data axis of 2
  expected_btl = np.zeros((3, 2, L), bool)
  np.put_along_axis(expected_btl, stable_topk(x_btl.reshape(B, L), 4)[1].reshape(3, 2, 4), True, -1)
  mask = jax.jit(topk.topk_mask, static_argnums=1)
  np.testing.assert_array_equal(mask(x_btl, 4), expected_btl)
  np.testing.assert_array_equal(mask(x_btl[0, 0], 4), expected_btl[0, 0])


def test_two_stages_hold_the_winners_of_one_group():
  x_bl = np.zeros((B, L), np.float32)
  n_groups = L // topk.GROUP_SIZE
  x_bl[:, ::n_groups] = np.arange(1, 1 + topk.GROUP_SIZE)  # the largest 16 are one strided group
  values_bk, indices_bk = jax.jit(topk.local_topk, static_argnums=1)(x_bl, 3)
  np.testing.assert_array_equal(values_bk[0], [16, 15, 14])
  np.testing.assert_array_equal(indices_bk[0], n_groups * np.array([15, 14, 13]))


def with_ties_at(places, value=10.0):
  x_bl = preacts(ties=False)
  x_bl[:, places] = value
  return x_bl


def with_both_zeros():
  x_bl = preacts(ties=False) - 10
  x_bl[:, 700], x_bl[:, 3] = 0.0, -0.0
  return x_bl


WAYS = {
  'no ties': preacts(ties=False),
  'ties above the last': with_ties_at([900, 3, 517]),
  'ties of a group': with_ties_at([3, 3 + L // topk.GROUP_SIZE, 3 + 5 * L // topk.GROUP_SIZE]),
  'ties for the last place': with_ties_at(slice(100, 110)),
  'ties of both zeros': with_both_zeros(),
  'infinities': with_ties_at([5], np.inf) + with_ties_at([3, 7, 9], -np.inf),
  'nothing finite': np.full((B, L), -np.inf),
  'NaN': with_ties_at([900, 3], np.nan),
}


@pytest.mark.parametrize('way', WAYS)
def test_every_way_to_the_largest_is_that_of_plain_topk(way):
  x_bl = jnp.asarray(WAYS[way], jnp.float32)
  for k in (1, TWO_STAGE):
    for bias_l in (None, jnp.zeros(L)):
      values_bk, indices_bk = jax.jit(topk.local_topk, static_argnums=1)(x_bl, k, bias_l)
      expected_values, expected_indices = jax.lax.top_k(x_bl if bias_l is None else x_bl + bias_l, k)
      np.testing.assert_array_equal(values_bk, expected_values)
      np.testing.assert_array_equal(np.signbit(values_bk), np.signbit(expected_values))
      np.testing.assert_array_equal(indices_bk, expected_indices)


@pytest.mark.parametrize(('n_groups', 'k'), [(521, 32), (1536, 16), (4096, 31), (200, 49), (61, 14)])
def test_groups_of_any_number_hold_the_largest(n_groups, k):
  n_latents = topk.GROUP_SIZE * n_groups
  x_bl = jnp.asarray(np.random.default_rng(1).normal(size=(B, n_latents)), jnp.float32)
  values_bk, indices_bk = jax.jit(topk.local_topk, static_argnums=1)(x_bl, k)
  expected_values, expected_indices = jax.lax.top_k(x_bl, k)
  np.testing.assert_array_equal(values_bk, expected_values)
  np.testing.assert_array_equal(indices_bk, expected_indices)


@pytest.mark.parametrize('n_tied', [1, 2, 3, 40])
def test_rows_that_tie_for_the_last_place_are_few_or_many(n_tied):
  n_rows = 2 * topk.ROWS_PER_FEW
  x_bl = np.random.default_rng(2).normal(size=(n_rows, L)).astype(np.float32)
  x_bl[5 : 5 + n_tied, 100:110] = 10
  values_bk, indices_bk = jax.jit(topk.local_topk, static_argnums=1)(x_bl, TWO_STAGE)
  expected_values, expected_indices = stable_topk(x_bl, TWO_STAGE)
  np.testing.assert_array_equal(values_bk, expected_values)
  np.testing.assert_array_equal(indices_bk, expected_indices)


@pytest.mark.parametrize('n_again', [0, 1, 3, 4, 96])
def test_few_rows_are_chosen_again_by_themselves(n_again):
  n_rows, n_few = 96, 96 // topk.ROWS_PER_FEW
  found, x = (jnp.zeros((n_rows, 2)), jnp.zeros((n_rows, 2), jnp.int32)), jnp.arange(1, n_rows + 1)
  choose = lambda x: (x[:, None] * jnp.ones(2), x[:, None] * jnp.ones(2, jnp.int32))
  rows_b = np.isin(np.arange(n_rows), np.random.default_rng(3).permutation(n_rows)[:n_again])
  for result in jax.jit(functools.partial(topk.chosen_again, choose))(rows_b, found, x):
    expected_b = np.where(rows_b | (n_again > n_few), x, 0)
    np.testing.assert_array_equal(result, np.stack([expected_b, expected_b], axis=1))


@pytest.mark.parametrize('way', WAYS)
def test_any_choice_among_ties_has_the_largest_values(way):
  x_bl = jnp.asarray(WAYS[way], jnp.float32)
  values_bk, indices_bk = jax.jit(lambda x_bl: topk.local_topk(x_bl, TWO_STAGE, any_tie=True))(x_bl)
  np.testing.assert_array_equal(values_bk, jax.lax.top_k(x_bl, TWO_STAGE)[0])
  finite = np.isfinite(values_bk)
  assert all(len(set(row[of])) == of.sum() for row, of in zip(np.asarray(indices_bk), finite, strict=True))
  np.testing.assert_array_equal(np.take_along_axis(x_bl, indices_bk, 1)[finite], values_bk[finite])


@pytest.mark.parametrize('way', WAYS)
def test_candidates_that_are_settled_are_in_the_order_of_all(way):
  x_bl = np.asarray(WAYS[way], np.float32)
  backwards = np.broadcast_to(np.arange(L)[::-1], (B, L))
  values_bk, indices_bk, settled_b = jax.jit(topk.topk_of_candidates, static_argnums=2)(x_bl[:, ::-1], backwards, 4)
  settled_b = np.asarray(settled_b)
  for found, expected in zip((values_bk, indices_bk), stable_topk(x_bl, 4), strict=True):
    np.testing.assert_array_equal(found[settled_b], expected[settled_b])
  assert settled_b.all() == (way in ('no ties', 'ties above the last', 'ties of a group', 'infinities'))


def test_many_ties_are_sorted_in_the_memory_of_a_row():
  n_rows, n_latents, k = 64, 32_768, 2 * topk.MOST_COUNTED
  x_bl = np.random.default_rng(0).normal(size=(n_rows, n_latents)).astype(np.float32)
  x_bl[:, 3000:3050] = 10  # not for the last place
  run = jax.jit(topk.local_topk, static_argnums=1).lower(x_bl, k).compile()
  values_bk, indices_bk = run(x_bl)
  np.testing.assert_array_equal(indices_bk, stable_topk(x_bl, k)[1])
  np.testing.assert_array_equal(values_bk, stable_topk(x_bl, k)[0])
  assert run.memory_analysis().temp_size_in_bytes < x_bl.nbytes / 2


def test_only_candidates_travel_and_nothing_is_sorted():
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    x_bl = sharding.place(np.zeros((8, L), np.float32), 'batch latent')
    hlo = jax.jit(lambda x: topk.topk_mask(x, TWO_STAGE)).lower(x_bl).compile().as_text()
  assert ' sort(' not in hlo
  collectives = re.findall(r'= \(?f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)', hlo)
  assert collectives
  assert max(np.prod([int(n) for n in shape.split(',')]) for shape in collectives) == 4 * 2 * TWO_STAGE


def test_gradients_do_not_pass_through_the_mask(mesh):
  x_bl = jnp.asarray(preacts(ties=False))
  grad_bl = jax.jit(jax.grad(lambda x: jnp.where(topk.topk_mask(x, 7), x, 0).sum()))(x_bl)
  np.testing.assert_array_equal(np.sum(grad_bl, axis=1), 7)
