"""Products and their derivatives of every order, against NumPy in float64, with few and many rows that are not zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import products, sharding

N_IN, N_OUT = 24, 40
KERNEL = np.random.default_rng(0).normal(size=(N_IN, N_OUT)).astype(np.float32)


def rows(n_rows, width, n_live, seed=1):
  rng, x = np.random.default_rng(seed), np.zeros((n_rows, width), np.float32)
  live = rng.choice(n_rows, n_live, replace=False)
  x[live] = rng.normal(size=(n_live, width))
  return x


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[(1, 1), (2, 1), (1, 2), (2, 2)], ids=['1x1', '2x1', '1x2', '2x2'])
def mesh(request):
  with jax.set_mesh(sharding.make_mesh(*request.param)):
    yield


def check(product, matrix, of_kernel, n_rows, n_live):
  """Compares a product, its derivatives, and those of its gradient; `of_kernel(x, y)` is the gradient by the kernel."""
  n_in, n_out = matrix.shape
  x, y = rows(n_rows, n_in, n_rows), rows(n_rows, n_out, n_live)
  dx, dkernel = rows(n_rows, n_in, n_live, 3), np.random.default_rng(5).normal(size=KERNEL.shape).astype(np.float32)
  assert_close(product(x, KERNEL), x @ matrix)
  assert_close(jax.jit(product)(dx, KERNEL), dx @ matrix)
  of_x, of_w = jax.jit(lambda x, y: jax.vjp(product, x, KERNEL)[1](y))(x, y)
  assert_close(of_x, y @ matrix.T)
  assert_close(of_w, of_kernel(x, y))
  moved = jax.jit(lambda x, dx: jax.jvp(product, (x, KERNEL), (dx, dkernel))[1])(x, dx)
  assert_close(moved, dx @ matrix + x @ (dkernel if n_in == N_IN else dkernel.T).astype(np.float64))
  gradient = lambda y: jax.vjp(product, x, KERNEL)[1](y)[0]  # whose own gradient by y is the product again
  assert_close(jax.jit(lambda y, dx: jax.vjp(gradient, y)[1](dx)[0])(y, dx), dx @ matrix)


@pytest.mark.parametrize('n_rows', [1, products.FEW_ROWS, products.FEW_ROWS + 2, products.CHECKED_ROWS + 2])
@pytest.mark.parametrize('n_live', [0, 1, 2])
def test_products_and_derivatives(mesh, n_rows, n_live):
  exact, n_live = KERNEL.astype(np.float64), min(n_live, n_rows)
  check(products.multiply, exact, lambda x, y: x.T @ y, n_rows, n_live)
  twice = lambda x, kernel: products.multiply(x, kernel, jnp.asarray(KERNEL.T))
  check(twice, exact, lambda x, y: x.T @ y, n_rows, n_live)
  check(products.read, exact.T, lambda x, y: y.T @ x, n_rows, n_live)


def test_batches_of_rows(mesh):
  x = np.stack([rows(5, N_IN, 5, seed) for seed in range(3)])
  y = np.stack([rows(5, N_OUT, n_live) for n_live in (0, 1, 5)])
  assert_close(jax.vmap(products.multiply, (0, None))(x, KERNEL), x @ KERNEL.astype(np.float64))
  gradient = lambda x, y: jax.vjp(lambda x: products.multiply(x, KERNEL), x)[1](y)[0]
  assert_close(jax.jit(jax.vmap(gradient))(x, y), y @ KERNEL.T.astype(np.float64))
  assert_close(products.multiply(x, KERNEL), x @ KERNEL.astype(np.float64))


def test_no_kernel_is_read_for_a_gradient_that_is_zero():
  unread = np.full_like(KERNEL, np.nan)
  with jax.set_mesh(sharding.make_mesh()):
    backward = jax.jit(lambda x, y: jax.vjp(lambda x: products.multiply(x, unread), x)[1](y)[0])
    x, y = rows(5, N_IN, 5), rows(5, N_OUT, 0)
    np.testing.assert_array_equal(backward(x, y), np.zeros_like(x))
    of_read = jax.jit(lambda x, y: jax.vjp(lambda y: products.read(y, unread), y)[1](x)[0])
    np.testing.assert_array_equal(of_read(0 * x, y), y)
    np.testing.assert_array_equal(jax.jit(products.read)(y, unread), 0 * x)
    y[3] = 1  # one row that is not zero is no concern of the others
    np.testing.assert_array_equal(np.isnan(backward(x, y)).all(1), np.arange(5) == 3)


def test_no_rows_at_all(mesh):
  assert products.multiply(np.zeros((2, 0, N_IN), np.float32), KERNEL).shape == (2, 0, N_OUT)
  assert products.read(np.zeros((0, N_OUT), np.float32), KERNEL).shape == (0, N_IN)
