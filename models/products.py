"""Products of rows with a kernel that is read from memory: on a CPU, few rows take as long as that takes.

`multiply` is x W and `read` its transpose y W^T, each the other's gradient. Gradients of a question are often zero: at
all tokens behind the node that is traced, in the last layer at all but one, and at what an SAE reads. On a CPU, a
product with a gradient that is zero reads no kernel, and one with a single row that is not reads it in half the time.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from models import sharding

FEW_ROWS = 16  # up to as many are laid out by column, see `_by_column`
CHECKED_ROWS = 1024  # up to as many are searched for zeros


def _by_column(x):
  """Returns x [row, i] laid out by column where it has few rows.

  On a CPU, 16 rows times the transpose of a matrix that is too large for the caches take half the time like this; with
  32 rows it no longer pays. Without the barrier XLA would turn it around again.
  """
  return jax.lax.optimization_barrier(x.T).T if len(x) <= FEW_ROWS else x


def _multiply(x, kernel):
  return x @ kernel


def _read(y, kernel):
  return _by_column(y @ kernel.T)


def _of_live_rows(product, axis):
  """Returns the product for rows that may be zero; the kernel's axis is as long as the rows of the product."""

  def of_live_rows(y, kernel):
    if not 0 < len(y) <= CHECKED_ROWS:
      return product(y, kernel)
    live = (y != 0).any(-1)
    row = live.argmax()
    nothing = lambda y: jnp.zeros((len(y), kernel.shape[axis]), y.dtype)
    one = lambda y: nothing(y).at[row].set(product(y[row][None], kernel)[0])
    return jax.lax.switch(jnp.minimum(live.sum(), 2), [nothing, one, lambda y: product(y, kernel)], y)

  return of_live_rows


def _primitive(name, product, axis, on_cpu):
  """Returns a bilinear primitive of rows and a kernel; the kernel's axis is as long as the rows of the product."""
  primitive = core.Primitive(name)
  primitive.def_impl(jax.jit(primitive.bind))
  primitive.def_abstract_eval(lambda x, kernel: x.update(shape=(x.shape[0], kernel.shape[axis]), weak_type=False))
  mlir.register_lowering(primitive, mlir.lower_fun(product, multiple_results=False))
  mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform='cpu')
  batching.primitive_batchers[primitive] = lambda args, axes: (jax.vmap(product, axes)(*args), 0)
  return primitive


_multiply_p = _primitive('multiply', _multiply, 1, _multiply)
_multiply_back_p = _primitive('multiply_back', _multiply, 1, _of_live_rows(_multiply, 1))
_read_p = _primitive('read', _read, 0, _of_live_rows(_read, 0))
for _primal in (_multiply_p, _multiply_back_p):
  ad.defbilinear(_primal, lambda ct, x, kernel: _read_p.bind(ct, kernel), lambda ct, x, kernel: x.T @ ct)
ad.defbilinear(_read_p, lambda ct, y, kernel: _multiply_back_p.bind(ct, kernel), lambda ct, y, kernel: ct.T @ y)


@jax.custom_jvp
def _multiply_fast(x, kernel, transposed):
  return _by_column(x @ transposed.T)


@_multiply_fast.defjvp
def _multiply_fast_jvp(primals, tangents):
  x, kernel, _ = primals
  dx, dkernel, _ = tangents
  return _multiply_fast(*primals), _multiply_p.bind(dx, kernel) + x @ dkernel


def _is_plain(x, kernel):
  """Returns whether a product is left to XLA: a CPU has none of these of bfloat16, and kernels may be cut."""
  return x.dtype != jnp.float32 or kernel.dtype != jnp.float32 or sharding.is_cut('model')


def multiply(x: jax.Array, kernel: jax.Array, transposed: jax.Array | None = None) -> jax.Array:
  """Returns x [..., i] times a kernel [i, o], in float32.

  Args:
    x, kernel: of any type of float.
    transposed: [o, i], the kernel again: few rows take four fifths of the time with it. Gradients are by the kernel.
  """
  if _is_plain(x, kernel):
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  if transposed is None or len(rows) > FEW_ROWS:
    found = _multiply_p.bind(rows, kernel)
  else:
    found = _multiply_fast(rows, kernel, transposed)
  return found.reshape(*x.shape[:-1], kernel.shape[1])


def read(y: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns y [..., o] times the transpose of a kernel [i, o], in float32."""
  if _is_plain(y, kernel):
    return jnp.matmul(y, kernel.T, preferred_element_type=jnp.float32)
  rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
  return _read_p.bind(rows, kernel).reshape(*y.shape[:-1], len(kernel))
