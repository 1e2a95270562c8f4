"""What the families of subject models share: parameters, matrix products, attention and the residual block.

Modules taking (x_btd, tap) visit their own sites and give what they add. Parameters have one namespace with the sites,
and their names are the same where they mean the same: whatever the family, `h.5.mlp.c_proj.kernel` [neuron, d_model] is
what `h.5.mlp.post_act` multiplies, and `h.5.attn.c_proj.kernel` [head, channel, d_model] what `h.5.attn.v_out` does.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models import products, sharding
from models.sites import Tap

INIT_STD = 0.02


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = INIT_STD, out_sharding: tuple = ()) -> nnx.Param:
  """Returns a parameter of independent normal values."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape), out_sharding=out_sharding)


class Embedding(nnx.Module):
  """A table [n, d_model] of a row for each token or each position."""

  def __init__(self, rngs, n, d_model):
    self.embedding = normal(rngs, (n, d_model))


class Linear(nnx.Module):
  """A kernel of n_in input axes and, where wanted, a bias of the others; the caller writes the einsum.

  Products are summed in float32 and come back in the dtype of the input, so bfloat16 parameters round once.
  """

  def __init__(self, rngs, shape, n_in, std=INIT_STD, out_sharding=(), bias=True):
    self.n_in = n_in
    self.kernel = normal(rngs, shape, std, out_sharding)
    self.bias = nnx.Param(jnp.zeros(shape[n_in:]), out_sharding=out_sharding[n_in:]) if bias else None
    self.transposed = None  # see `with_transposed`

  def __call__(self, subscripts: str, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...]
    if sharding.is_cut('model'):
      y = jnp.einsum(subscripts, x, kernel, preferred_element_type=jnp.float32)
    else:  # as one matrix: for the gradient of a product over several axes XLA copies the kernel, transposed
      lead, shape = x.shape[: x.ndim - self.n_in], kernel.shape
      transposed = None if self.transposed is None else self.transposed[...]
      matrix = kernel.reshape(math.prod(shape[: self.n_in]), -1)
      y = products.multiply(x.reshape(*lead, -1), matrix, transposed).reshape(*lead, *shape[self.n_in :])
    if self.bias is not None:
      y += self.bias[...]
    return y.astype(x.dtype)

  def read(self, y: jax.Array) -> jax.Array:
    """Returns what inputs [..., inputs] have of a direction y [..., outputs] of the output: its gradient by them."""
    kernel = self.kernel[...]
    outputs = kernel.ndim - self.n_in
    lead, shape = y.shape[: y.ndim - outputs], kernel.shape
    if sharding.is_cut('model'):
      axes = tuple(range(-outputs, 0))
      return jnp.tensordot(y, kernel, (axes, axes), preferred_element_type=jnp.float32)
    matrix = kernel.reshape(math.prod(shape[: self.n_in]), -1)
    return products.read(y.reshape(*lead, -1), matrix).reshape(*lead, *shape[: self.n_in])


def with_transposed(model):
  """Returns the model with each kernel a second time, transposed: on a CPU, passes of few tokens are faster with it."""
  found = jax.tree.map(lambda x: x, model)
  for _, module in nnx.iter_modules(found):
    if isinstance(module, Linear):
      kernel = module.kernel[...]
      matrix = kernel.reshape(math.prod(kernel.shape[: module.n_in]), -1)
      module.transposed = nnx.data(nnx.Variable(matrix.T))
  return found


def attend(q_bthc: jax.Array, k_btgc: jax.Array, v_btgc: jax.Array, tap: Tap) -> jax.Array:
  """Returns v_out_bthc of causal attention, where n_head / g neighbouring heads share each of g keys and values.

  Sites: q [batch, token, head, channel], k and v [batch, token, g, channel], qk_logits = q k / sqrt(channels) and
  qk_probs [batch, head, token, source], v_out [batch, token, head, channel]. The logits of later sources are not
  masked at the site; their probabilities are 0.
  """
  q_bthc = tap('q', q_bthc, 'batch token head channel')
  k_bsgc = tap.extend('k', tap('k', k_btgc, 'batch token head channel'))
  v_bsgc = tap.extend('v', tap('v', v_btgc, 'batch token head channel'))
  within, q_bthc = tap.to_rows(q_bthc)
  (b, t, h, c), g = q_bthc.shape, k_bsgc.shape[2]
  # One matrix for the heads that share a key, x their tokens one head after another: einsums of the arrays as they are
  # take half as long again on a CPU.
  q_bgxc = q_bthc.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, c)
  k_bgcs, v_bgsc = k_bsgc.transpose(0, 2, 3, 1), v_bsgc.transpose(0, 2, 1, 3)
  logits_bgxs = jnp.einsum('bgxc,bgcs->bgxs', q_bgxc, k_bgcs, preferred_element_type=jnp.float32)
  logits_bhts = within('qk_logits', logits_bgxs.reshape(b, h, t, -1) * c**-0.5, 'batch head token source')
  causal_bts = within.positions(t)[..., None] >= jnp.arange(logits_bhts.shape[-1])
  probs_bhts = jax.nn.softmax(jnp.where(causal_bts[:, None], logits_bhts, -jnp.inf))
  probs_bhts = within('qk_probs', probs_bhts.astype(q_bthc.dtype), 'batch head token source')
  probs_bgxs = probs_bhts.reshape(b, g, h // g * t, -1)
  v_out_bgxc = jnp.einsum('bgxs,bgsc->bgxc', probs_bgxs, v_bgsc, preferred_element_type=jnp.float32)
  v_out_bthc = v_out_bgxc.reshape(b, g, h // g, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)
  return tap.from_rows(within('v_out', v_out_bthc.astype(q_bthc.dtype), 'batch token head channel'))


class Block(nnx.Module):
  """One layer; sites resid.delta_attn, .post_attn, .delta_mlp, .post_mlp [batch, token, d_model], and its parts'."""

  def __init__(self, attn_ln, attn, mlp_ln, mlp):
    self.attn_ln, self.attn, self.mlp_ln, self.mlp = attn_ln, attn, mlp_ln, mlp

  def __call__(self, x_btd, tap):
    attn_btd = self.attn(self.attn_ln(x_btd, tap.at('attn_ln')), tap.at('attn'))
    x_btd = x_btd + tap('resid.delta_attn', attn_btd, 'batch token d_model')
    x_btd = tap('resid.post_attn', x_btd, 'batch token d_model')
    mlp_btd = self.mlp(self.mlp_ln(x_btd, tap.at('mlp_ln')), tap.at('mlp'))
    x_btd = x_btd + tap('resid.delta_mlp', mlp_btd, 'batch token d_model')
    return tap('resid.post_mlp', x_btd, 'batch token d_model')


def run(model, x_btd: jax.Array, tap: Tap) -> jax.Array:
  """Returns logits_btv, in float32, of embedded tokens: through the blocks model.h, model.ln_f and the unembedding."""
  x_btd = tap('resid.post_emb', x_btd, 'batch token d_model')
  for i, block in enumerate(model.h):
    x_btd = block(x_btd, tap.at(f'h.{i}'))
  x_btd = tap('resid.post_ln_f', model.ln_f(x_btd, tap.at('ln_f')), 'batch token d_model')
  logits_btv = jnp.einsum('btd,vd->btv', x_btd, model.unembedding, preferred_element_type=jnp.float32)
  return tap('logits', logits_btv, 'batch token vocab')


def check_length(n_tokens: int, n_ctx: int):
  """Raises unless the tokens fit into the context.

  Raises:
    ValueError: they are longer.
  """
  if n_tokens > n_ctx:
    raise ValueError(f'{n_tokens} tokens are longer than the context of {n_ctx}; cut the prompt or the windows')
