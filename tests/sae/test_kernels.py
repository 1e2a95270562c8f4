"""Kernels, sparse and dense, give what NumPy gives in float64; what is chosen in bfloat16 is what float32 chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import kernels

B, D, L, K = 96, 12, 256, 19  # blocks of tokens and of k, and what is left over
KINDS = pytest.mark.parametrize('kind', kernels.KERNELS)
# Sums of up to some thousand products of order 1 in float32.
TOLERANCE = {'rtol': 2e-5, 'atol': 2e-5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(kernels, 'BLOCK_ROWS', 32)
  monkeypatch.setattr(kernels, 'DOT_ROWS', 16)
  monkeypatch.setattr(kernels, 'ADD_ROWS', 32)
  monkeypatch.setattr(kernels, 'UNROLL', 8)


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


@KINDS
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_largest_preactivations_are_chosen_and_are_float32(kind, dtype):
  x_bd, encoder_ld, _, _ = arrays()
  bias_l = jnp.asarray(np.random.default_rng(2).normal(size=L), jnp.float32)
  run = jax.jit(lambda x_bd: kernels.select_topk(kernels.KERNELS[kind], x_bd, encoder_ld, bias_l, K, dtype))
  values_bk, indices_bk = run(x_bd)
  preacts_bl = np.asarray(x_bd, np.float64) @ np.asarray(encoder_ld, np.float64).T + np.asarray(bias_l)
  expected_bk = np.argsort(-preacts_bl, axis=1)[:, :K]
  np.testing.assert_array_equal(indices_bk, expected_bk)
  np.testing.assert_allclose(values_bk, np.take_along_axis(preacts_bl, expected_bk, 1), rtol=1e-5)


def test_the_fastest_kernels_are_measured_once():
  assert kernels.fastest(64, D, 4) in kernels.KERNELS
  misses = kernels.fastest.cache_info().misses
  kernels.fastest(64, D, 4)
  assert kernels.fastest.cache_info().misses == misses
