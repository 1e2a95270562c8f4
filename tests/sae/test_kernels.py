"""All kernels give what NumPy gives in float64; what is chosen in bfloat16 is what float32 chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import kernels

B, D, L, K = 96, 12, 256, 19  # blocks of tokens and of k, and what is left over
SPARSE = kernels.KERNELS['sparse']
KINDS = pytest.mark.parametrize('kind', kernels.KERNELS)
# Sums of up to some thousand products of order 1 in float32.
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(kernels, 'BLOCK_ROWS', 32)
  monkeypatch.setattr(kernels, 'GATHERED_ROWS', 16 * K)
  monkeypatch.setattr(kernels, 'ADD_ROWS', 32)
  monkeypatch.setattr(kernels, 'UNROLL', 8)
  monkeypatch.setattr(kernels, 'GROUPED_ROWS', 40)
  monkeypatch.setattr(kernels, 'SLOTS', 3)
  monkeypatch.setattr(kernels, 'SUMMED_GROUPS', 100)


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  indices_bk = rng.integers(L, size=(B, K)).astype(np.int32)  # a latent may come twice in a row
  return tuple(map(jnp.asarray, (normal(B, D), normal(L, D), normal(B, K), indices_bk)))


def one_hot(indices_bk):
  return np.eye(L)[np.asarray(indices_bk)]


@KINDS
@pytest.mark.parametrize('k', [1, 8, K])
@pytest.mark.parametrize('n_rows', [B, 40, 33, 1])
def test_products_with_a_few_rows(kind, k, n_rows):
  x_bd, w_ld, values_bk, indices_bk = arrays()
  x_bd, values_bk, indices_bk = x_bd[:n_rows], values_bk[:n_rows, :k], indices_bk[:n_rows, :k]
  chosen = kernels.KERNELS[kind]
  w64 = np.asarray(w_ld, np.float64)
  out_bd = jax.jit(chosen.weighted_sum)(values_bk, w_ld, indices_bk)
  np.testing.assert_allclose(out_bd, np.einsum('bk,bkd->bd', values_bk, w64[indices_bk]), **TOLERANCE)
  out_bk = jax.jit(chosen.dot)(x_bd, w_ld, indices_bk)
  np.testing.assert_allclose(out_bk, np.einsum('bd,bkd->bk', x_bd, w64[indices_bk]), **TOLERANCE)
  out_ld = jax.jit(chosen.add_outers)((w_ld, 2 * w_ld), (values_bk, -values_bk), (x_bd, 3 * x_bd), indices_bk)
  added_ld = np.einsum('bk,bd,bkl->ld', values_bk, x_bd, one_hot(indices_bk), optimize=True)
  np.testing.assert_allclose(out_ld[0], w64 + added_ld, **TOLERANCE)
  np.testing.assert_allclose(out_ld[1], 2 * w64 - 3 * added_ld, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize('n_latents', [1, 2, 3, 7])
@pytest.mark.parametrize('n_rows', [1, 2, B])
def test_few_latents_are_summed_in_groups(n_latents, n_rows):
  x_bd, w_ld, values_bk, indices_bk = arrays()
  x_bd, w_ld, values_bk, indices_bk = x_bd[:n_rows], w_ld[:n_latents], values_bk[:n_rows], indices_bk[:n_rows]
  indices_bk %= n_latents
  (out_ld,) = jax.jit(kernels.KERNELS['grouped'].add_outers)((w_ld,), (values_bk,), (x_bd,), indices_bk)
  added_ld = np.einsum('bk,bd,bkl->ld', values_bk, x_bd, one_hot(indices_bk)[..., :n_latents], optimize=True)
  np.testing.assert_allclose(out_ld, w_ld + added_ld, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize('packed', [0, 2**32])
@pytest.mark.parametrize('n_often', [0, 1, K])
def test_groups_hold_latents_of_every_token_and_of_none(monkeypatch, packed, n_often):
  x_bd, w_ld, values_bk, indices_bk = arrays()
  indices_bk = (indices_bk % 7 + 9).at[:, :n_often].set(L - 1)  # most latents have no token
  monkeypatch.setattr(kernels, 'PACKED', packed)
  add = jax.jit(lambda *args: kernels.KERNELS['grouped'].add_outers(*args))
  (out_ld,) = add((w_ld,), (values_bk,), (x_bd,), indices_bk)
  added_ld = np.einsum('bk,bd,bkl->ld', values_bk, x_bd, one_hot(indices_bk), optimize=True)
  np.testing.assert_allclose(out_ld, w_ld + added_ld, rtol=2e-5, atol=2e-4)


@KINDS
@pytest.mark.parametrize('scaled', [False, True])
def test_a_step_of_gradients_is_that_of_dense_autodiff(kind, scaled):
  x_bd, decoder_ld, values_bk, indices_bk = arrays()
  target_bd = np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)
  scale_l = 1 / jnp.linalg.norm(decoder_ld, axis=1) if scaled else None
  chosen = kernels.KERNELS[kind]

  @jax.jit
  def ours():
    error_bd, products_bk = kernels.decode_and_dz(chosen, values_bk, decoder_ld, scale_l, indices_bk, target_bd)
    dz_bk, grad_bd, recons_bd = -products_bk, -error_bd, target_bd - error_bd
    zeros = kernels.Gradients(*(jnp.zeros(shape) for shape in ((L, D), (L, D), L, L)))
    return recons_bd, dz_bk, kernels.sparse_update(chosen, zeros, values_bk, dz_bk, indices_bk, x_bd, grad_bd)

  recons_bd, dz_bk, grads = ours()
  rows = np.asarray(decoder_ld, np.float64) * (1 if scale_l is None else np.asarray(scale_l, np.float64)[:, None])
  latents_bl = np.einsum('bk,bkl->bl', values_bk, one_hot(indices_bk))
  with jax.enable_x64(True):
    loss = lambda latents_bl, rows: 0.5 * jnp.sum((latents_bl @ rows - target_bd) ** 2)
    grad_bl, grad_ld = jax.grad(loss, argnums=(0, 1))(jnp.asarray(latents_bl), jnp.asarray(rows))
  np.testing.assert_allclose(recons_bd, latents_bl @ rows, **TOLERANCE)
  expected_bk = np.take_along_axis(np.asarray(grad_bl), np.asarray(indices_bk), 1)
  np.testing.assert_allclose(dz_bk, expected_bk, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(grads.decoder_ld, grad_ld, rtol=1e-4, atol=1e-4)
  dz_bl = np.einsum('bk,bkl->bl', np.asarray(dz_bk, np.float64), one_hot(indices_bk))
  np.testing.assert_allclose(grads.encoder_ld, dz_bl.T @ x_bd, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(grads.latent_bias_l, dz_bl.sum(0), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(grads.along_l, np.sum(np.asarray(grad_ld) * rows, axis=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dtype', kernels.DTYPES)
def test_the_largest_preactivations_are_chosen_and_are_float32(dtype):
  x_bd, encoder_ld, _, _ = arrays()
  bias_l = jnp.asarray(np.random.default_rng(2).normal(size=L), jnp.float32)
  run = jax.jit(lambda x_bd: kernels.select_topk(SPARSE, x_bd, encoder_ld, bias_l, K, dtype))
  values_bk, indices_bk, again_b = run(x_bd)
  assert dtype == 'bfloat16' or not again_b.any()
  preacts_bl = np.asarray(x_bd, np.float64) @ np.asarray(encoder_ld, np.float64).T + np.asarray(bias_l)
  expected_bk = np.argsort(-preacts_bl, axis=1)[:, :K]
  np.testing.assert_array_equal(indices_bk, expected_bk)
  np.testing.assert_allclose(values_bk, np.take_along_axis(preacts_bl, expected_bk, 1), rtol=1e-5)


def check_selection(x_bd, encoder_ld, k=8):
  """Checks what is chosen in bfloat16 by that of float64, but for what float32 may take for equal; returns both."""
  run = jax.jit(lambda x_bd: kernels.select_topk(SPARSE, x_bd, encoder_ld, jnp.zeros(len(encoder_ld)), k, 'bfloat16'))
  values_bk, indices_bk, _ = run(jnp.asarray(x_bd, jnp.float32))
  preacts_bl = np.asarray(x_bd, np.float64) @ np.asarray(encoder_ld, np.float64).T
  expected_bk = np.argsort(-preacts_bl, axis=1, kind='stable')[:, :k]
  preacts_bk, expected_preacts_bk = (
    np.take_along_axis(preacts_bl, of, 1) for of in (np.asarray(indices_bk), expected_bk)
  )
  np.testing.assert_allclose(preacts_bk, expected_preacts_bk, rtol=2e-6)
  np.testing.assert_allclose(values_bk, expected_preacts_bk, rtol=2e-6)
  assert all(len(set(row)) == k for row in np.asarray(indices_bk))
  return indices_bk, expected_bk


def _near(rng, n_hard):
  """Returns tokens of which n_hard are near half of the rows, and these rows, which bfloat16 takes for the same."""
  encoder_ld, x_bd = rng.normal(size=(L, D)), rng.normal(size=(B, D))
  encoder_ld[::2] = encoder_ld[0] + 1e-3 * rng.normal(size=(L // 2, D))
  x_bd -= 2 * np.maximum(x_bd @ encoder_ld[0], 0)[:, None] * encoder_ld[0] / np.sum(encoder_ld[0] ** 2)
  x_bd[rng.permutation(B)[:n_hard]] = encoder_ld[0] * rng.uniform(1, 2, size=(n_hard, 1))
  return np.asarray(x_bd, np.float32), jnp.asarray(encoder_ld, jnp.float32)


@pytest.mark.parametrize('n_hard', [1, 3, 4, B])
def test_tokens_that_rounding_hides_the_choice_from_are_chosen_again(n_hard):
  k, (x_bd, encoder_ld) = 8, _near(np.random.default_rng(3), n_hard)
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  sorted_by = lambda x_bd, w_ld: np.argsort(-(x_bd @ np.asarray(w_ld, np.float64).T), axis=1).tolist()
  candidates = [of[: kernels.n_candidates(k, D)] for of in sorted_by(rounded(x_bd), rounded(encoder_ld))]
  winners = [of[:k] for of in sorted_by(x_bd.astype(np.float64), encoder_ld)]
  n_missed = sum(not set(of) <= set(among) for of, among in zip(winners, candidates, strict=True))
  assert n_hard / 2 <= n_missed <= n_hard  # by chance rounding may hide nothing
  check_selection(x_bd, encoder_ld, k)


@pytest.mark.parametrize('scale', [0.0, 1e-25, 1e-22, 1e-13, 1e12, 1e18])
def test_tokens_of_any_size_are_chosen_in_bfloat16(scale):
  x_bd, encoder_ld = _near(np.random.default_rng(3), 9)
  x_bd *= np.float32(scale)
  check_selection(x_bd, encoder_ld)
  error_b = kernels._rounding_error(x_bd, encoder_ld, 'bfloat16')
  assert np.isinf(error_b).all() == (scale < 1e-11)


def test_latents_in_groups_are_chosen_in_bfloat16():
  rng, n_latents = np.random.default_rng(6), 2048
  x_bd, encoder_ld = rng.normal(size=(B, D)), jnp.asarray(rng.normal(size=(n_latents, D)), jnp.float32)
  check_selection(np.asarray(x_bd, np.float32), encoder_ld)


def test_a_bias_that_takes_digits_of_what_is_compared_proves_nothing():
  bias, k = 2.0**23, 2  # sums are whole numbers
  n_half = kernels.n_candidates(k, 1) - k
  # What is left out is rounded to 1/2, and with the bias to 0, as the candidates before it; in float32 it comes to 1.
  encoder_ld = np.concatenate([np.full(n_half, 0.5), np.full(40, 0.5015), [1.0, 5.0]])[:, None].astype(np.float32)
  x_bd, bias_l = jnp.ones((4, 1)), jnp.full(len(encoder_ld), bias)
  select = jax.jit(lambda x_bd: kernels.select_topk(SPARSE, x_bd, encoder_ld, bias_l, k, 'bfloat16'))
  values_bk, indices_bk, again_b = select(x_bd)
  assert again_b.all()
  np.testing.assert_array_equal(values_bk, [[bias + 5, bias + 1]] * 4)
  np.testing.assert_array_equal(indices_bk, [[len(encoder_ld) - 1, n_half]] * 4)


def test_equal_latents_chosen_in_bfloat16_are_ordered_by_index():
  rng = np.random.default_rng(4)
  encoder_ld = rng.integers(-2, 3, size=(L, D))
  encoder_ld[200:] = encoder_ld[rng.permutation(200)[: L - 200]]
  indices_bk, expected_bk = check_selection(rng.integers(-2, 3, size=(B, D)), jnp.asarray(encoder_ld, jnp.float32))
  np.testing.assert_array_equal(indices_bk, expected_bk)


def test_a_nan_of_one_token_leaves_the_others_as_they_are():
  x_bd, encoder_ld, _, _ = arrays()
  select = jax.jit(lambda x_bd: kernels.select_topk(SPARSE, x_bd, encoder_ld, jnp.zeros(L), 8, 'bfloat16'))
  with_nan, without = select(x_bd.at[3, 2].set(jnp.nan)), select(x_bd)
  others = np.arange(B) != 3
  for a, b in zip(with_nan, without, strict=True):
    np.testing.assert_array_equal(a[others], b[others])
  assert np.isnan(with_nan[0][3]).all()


@pytest.mark.parametrize('outlier', [1, 100])
def test_rounding_changes_no_product_by_more_than_the_bound(outlier):
  rng = np.random.default_rng(5)
  scale_d = np.where(np.arange(512) == 7, outlier, 1)
  x_bd, encoder_ld = (jnp.asarray(rng.normal(size=(n, 512)) * scale_d, jnp.float32) for n in (64, 512))
  rounded_bd, rounded_ld = x_bd.astype(jnp.bfloat16), encoder_ld.astype(jnp.bfloat16)
  product = jnp.einsum('bd,ld->bl', rounded_bd, rounded_ld, preferred_element_type=jnp.float32)
  exact_bl = np.asarray(x_bd, np.float64) @ np.asarray(encoder_ld, np.float64).T
  bound_b = jax.jit(kernels._rounding_error, static_argnums=2)(x_bd, encoder_ld, 'bfloat16')
  off_b = np.abs(np.asarray(product, np.float64) - exact_bl).max(1)
  norms_b = np.linalg.norm(x_bd, axis=1) * np.linalg.norm(encoder_ld, axis=1).max()
  assert (off_b < bound_b).all()
  assert (bound_b < 1.02 * 2**-7 * norms_b).all()  # two roundings by half a unit in the last of 8 places, and sums


@pytest.mark.parametrize('gathered', [1, 7 * K * D, 1e9])
@pytest.mark.parametrize('kind', ['sparse', 'sorted'])
def test_an_accelerator_gathers_in_blocks(monkeypatch, kind, gathered):
  x_bd, w_ld, values_bk, indices_bk = arrays()
  chosen = kernels.KERNELS[kind]
  results = lambda: (
    chosen.dot(x_bd, w_ld, indices_bk),
    chosen.add_outers((w_ld,), (values_bk,), (x_bd,), indices_bk),
    chosen.error_and_dot(values_bk, w_ld, indices_bk, x_bd),
  )
  expected = results()
  monkeypatch.setattr(kernels, 'ACCELERATOR_GATHERED', int(gathered))
  assert kernels._accelerator_rows(K, D) == {1: 1, 7 * K * D: 4}.get(gathered, kernels.ACCELERATOR_BLOCK_ROWS)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **_: default(*args))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4), results(), expected)


def test_on_a_gpu_pallas_kernels_are_tried_and_only_right_ones_used(monkeypatch, caplog):
  def scaled_by(found):
    return lambda *args: jax.tree.map(found, kernels.KERNELS['sparse'].error_and_dot(*args))

  def failing(*_):
    raise NotImplementedError('no such card')

  tried = []
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(kernels, '_seconds', lambda runs: tried.append(list(runs)) or dict.fromkeys(runs, 1.0))
  for error_and_dot, words in (
    (kernels.KERNELS['dense'].error_and_dot, None),
    (scaled_by(lambda x: 1.01 * x), 'off by 0.01'),
    (scaled_by(lambda x: x * jnp.nan), 'off by nan'),
    (failing, 'no such card'),
  ):
    caplog.clear()
    tried.clear()
    changed = kernels.KERNELS['sparse']._replace(error_and_dot=error_and_dot)
    monkeypatch.setitem(kernels.KERNELS, 'pallas', changed)
    kernels.check.cache_clear()
    kernels.fastest.__wrapped__(L, D, 4)
    assert ('pallas' in tried[0]) == (words is None)
    assert len(tried) == (2 if words is None else 1)  # choosing latents is timed for them alone
    assert "trying kernels 'pallas'" in caplog.text
    assert ('are not used' in caplog.text) == (words is not None)
    assert (words or '') in caplog.text
  kernels.check.cache_clear()


@pytest.mark.parametrize(('fastest', 'known'), [('fastest', kernels.KERNELS), ('fastest_dtype', kernels.DTYPES)])
@pytest.mark.parametrize('k', [4, 100])  # a shard may have fewer latents than a token keeps
def test_what_is_fastest_is_measured_once(fastest, known, k):
  measure = getattr(kernels, fastest)
  assert measure(64, D, k) in known
  misses = measure.cache_info().misses
  measure(64, D, k)
  assert measure.cache_info().misses == misses


@pytest.mark.parametrize(('n_shards', 'n_rows'), [(1, 40), (4, 35), (40, 13)])
def test_kernels_are_timed_on_the_rows_a_shard_looks_at_and_the_fastest_is_chosen(monkeypatch, n_shards, n_rows):
  seen, update, times = set(), kernels._update, {'sparse': 2.0, 'sorted': 1.0, 'grouped': 4.0, 'dense': 3.0}

  def updating(chosen, x_bd, w_ld, values_bk, indices_bk):
    seen.add((values_bk.shape[1], indices_bk.shape[1]))
    return update(chosen, x_bd, w_ld, values_bk, indices_bk)

  def seconds(runs):
    for run in runs.values():
      run()
    return {name: times[name] for name in runs}

  monkeypatch.setattr(kernels, '_update', updating)
  monkeypatch.setattr(kernels, '_seconds', seconds)
  assert kernels.fastest.__wrapped__(L, D, 40, n_shards) == 'sorted'
  assert seen == {(n_rows, n_rows)}


@pytest.mark.parametrize(('n_tokens', 'n_rows'), [(5, 5), (8, 8), (16, 16), (30, 24), (100, 24)])
@pytest.mark.parametrize('k', [4, 40])
def test_kernels_are_timed_at_the_tokens_of_a_step_up_to_a_limit(monkeypatch, n_tokens, n_rows, k):
  tried = {}
  monkeypatch.setattr(kernels, 'PROBE_ROWS', 8)
  monkeypatch.setattr(kernels, 'PROBE_PRODUCTS', 24 * L * D)
  monkeypatch.setattr(kernels, '_update', lambda chosen, x_bd, *_: tried.update(n_rows=len(x_bd)) or x_bd)
  monkeypatch.setattr(
    kernels, '_seconds', lambda runs: tried.update(names={*runs}) or dict.fromkeys(runs, runs['sparse']() is None)
  )
  kernels.fastest.__wrapped__(L, D, k, 1, n_tokens)
  assert tried['n_rows'] == n_rows
  assert tried['names'] == {'sparse', 'sorted', 'dense'} | ({'grouped'} if n_rows * k >= L else set())


def test_what_is_far_slower_is_timed_once(monkeypatch):
  now, calls = [0.0], {'quick': 0, 'slower': 0, 'hopeless': 0}
  takes = {'quick': 1.0, 'slower': 2.0, 'hopeless': 10.0}

  def run(name):
    calls[name] += 1
    now[0] += takes[name] + (calls[name] == 2)  # the first that is timed
    return jnp.zeros(())

  monkeypatch.setattr(kernels.time, 'perf_counter', lambda: now[0])
  seconds = kernels._seconds({name: lambda name=name: run(name) for name in takes})
  assert seconds == {'quick': 1.0, 'slower': 2.0, 'hopeless': 11.0}
  assert calls == {'quick': 4, 'slower': 4, 'hopeless': 2}


def test_bfloat16_has_to_be_clearly_faster(monkeypatch):
  for seconds, expected in ((0.5, 'bfloat16'), (0.99, 'float32'), (1.5, 'float32')):
    monkeypatch.setattr(kernels, '_seconds', lambda runs, of=seconds: {'float32': 1.0, 'bfloat16': of})
    kernels.fastest_dtype.cache_clear()
    assert kernels.fastest_dtype(64, D, 4) == expected
  kernels.fastest_dtype.cache_clear()
