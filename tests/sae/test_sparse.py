"""Sparse products and their hand-written gradients are those of the dense formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.sae import sparse

B, D, L, K = 6, 5, 16, 3


def arguments():
  rng = np.random.default_rng(0)
  x_bd, w_ld = rng.normal(size=(B, D)).astype(np.float32), rng.normal(size=(L, D)).astype(np.float32)
  values_bk = rng.normal(size=(B, K)).astype(np.float32)
  indices_bk = rng.integers(L, size=(B, K))  # a latent may come twice in a row
  return tuple(map(jnp.asarray, (x_bd, w_ld, values_bk, indices_bk)))  # of order 1: atol is for sums that cancel


def test_sparse_dot_and_its_gradients():
  x_bd, w_ld, grad_bk, indices_bk = arguments()
  out_bk, vjp = jax.vjp(lambda x, w: sparse.sparse_dot(x, w, indices_bk), x_bd, w_ld)
  np.testing.assert_allclose(out_bk, np.einsum('bd,bkd->bk', x_bd, w_ld[indices_bk]), rtol=1e-5, atol=1e-6)
  grad_bl = np.einsum('bk,bkl->bl', grad_bk, np.eye(L)[indices_bk])
  grad_x, grad_w = vjp(grad_bk)
  np.testing.assert_allclose(grad_x, grad_bl @ w_ld, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(grad_w, grad_bl.T @ x_bd, rtol=1e-4, atol=1e-6)


def test_weighted_sum_and_its_gradients():
  grad_bd, w_ld, values_bk, indices_bk = arguments()
  out_bd, vjp = jax.vjp(lambda v, w: sparse.weighted_sum(v, w, indices_bk), values_bk, w_ld)
  latents_bl = np.einsum('bk,bkl->bl', values_bk, np.eye(L)[indices_bk])
  np.testing.assert_allclose(out_bd, latents_bl @ w_ld, rtol=1e-4, atol=1e-6)
  grad_values, grad_w = vjp(grad_bd)
  np.testing.assert_allclose(grad_values, np.einsum('bd,bkd->bk', grad_bd, w_ld[indices_bk]), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(grad_w, latents_bl.T @ grad_bd, rtol=1e-4, atol=1e-6)
