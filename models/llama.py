"""Llama-family models in Flax (Touvron et al. 2023), with every site tapped once: the interface and the sites of GPT-2.

RMS normalisation, rotary positions, grouped-query attention, a gated MLP, tied or untied embeddings. What differs at
the sites: k and v have n_kv_head heads; q and k are taken after the rotation, so that their product is still qk_logits;
`scale` is the root mean square; `mlp.pre_act` is the gate before its SiLU, `mlp.post_act` the gated product
silu(pre_act) * up, which is what the output matrix multiplies; and `mlp.up` is a site more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers, sharding
from models.sites import Tap


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The sizes and constants of a Llama.

  Attributes:
    n_kv_head: keys and values, each shared by n_head / n_kv_head neighbouring heads.
    d_head: channels of a head.
    rope_theta: channel pair i turns by position * rope_theta ** (-2 i / d_head) radians.
    rope_divisors: what each pair's frequency is divided by, to stretch the context (d_head / 2 numbers); () for 1.
    tied: the unembedding is the token embedding.
  """

  n_layer: int
  n_head: int
  n_kv_head: int
  d_model: int
  d_head: int
  n_neurons: int
  n_ctx: int
  n_vocab: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_divisors: tuple[float, ...] = ()
  tied: bool = True


def llama3_divisors(
  d_head: int, rope_theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, n_original_ctx: int
) -> tuple[float, ...]:
  """Returns Llama 3.1's frequency divisors (its released model code, `apply_scaling`).

  A pair that turns more than high_freq_factor times within the original context keeps its frequency, one that turns
  less than low_freq_factor times is slowed down by the factor, and between them the frequency is interpolated.
  """
  frequency = rope_theta ** (-np.arange(0, d_head, 2) / d_head)
  turns = n_original_ctx * frequency / (2 * np.pi)
  kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
  return tuple((1 / (kept + (1 - kept) / factor)).tolist())


def rotate(x_bthc: jax.Array, positions_bt: jax.Array, config: LlamaConfig) -> jax.Array:
  """Returns q or k with each channel pair (i, i + d_head / 2) turned by its position (RoPE; Su et al. 2021)."""
  frequency = config.rope_theta ** (-np.arange(0, config.d_head, 2) / config.d_head)
  frequency = frequency / np.array(config.rope_divisors or 1.0)
  angle_bt1c = positions_bt[:, :, None, None] * frequency.astype(np.float32)
  cos, sin = jnp.cos(angle_bt1c), jnp.sin(angle_bt1c)
  first, second = jnp.split(x_bthc.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthc.dtype)


class RMSNorm(nnx.Module):
  """Division by the root mean square, in float32: the site `scale` [batch, token, 1] (Zhang and Sennrich 2019)."""

  def __init__(self, config):
    self.eps = config.norm_eps
    self.gain = nnx.Param(jnp.ones(config.d_model), out_sharding=())

  def __call__(self, x_btd, tap):
    float_btd = x_btd.astype(jnp.float32)
    scale_bt1 = jnp.sqrt(jnp.mean(float_btd**2, -1, keepdims=True) + self.eps)
    scale_bt1 = tap('scale', scale_bt1, 'batch token one')
    return (float_btd / scale_bt1 * self.gain[...]).astype(x_btd.dtype)

  def linear(self, x: jax.Array) -> jax.Array:
    """Returns what x [..., d_model] adds to the norm times its scale, in float32: x times the gain."""
    return x.astype(jnp.float32) * self.gain[...]

  @property
  def shift(self) -> jax.Array:
    """What the norm gives [d_model] whatever its input: nothing."""
    return jnp.zeros_like(self.gain[...])


class Attention(nnx.Module):
  """Causal grouped-query attention with rotary positions; sites as for `layers.attend`."""

  def __init__(self, config, rngs):
    self.config, self.n_kv_head = config, config.n_kv_head
    d_model, d_head = config.d_model, config.d_head
    axes, kv_axes = (sharding.head_axes(n, d_head) for n in (config.n_head, config.n_kv_head))
    linear = lambda n, axes: layers.Linear(rngs, (d_model, n, d_head), 1, out_sharding=(None, *axes), bias=False)
    self.c_q = linear(config.n_head, axes)
    self.c_k, self.c_v = linear(config.n_kv_head, kv_axes), linear(config.n_kv_head, kv_axes)
    self.c_proj = layers.Linear(rngs, (config.n_head, d_head, d_model), 2, out_sharding=(*axes, None), bias=False)

  def qkv(self, x_btd, positions_bt):
    """Returns queries [batch, token, head, channel], keys and values [batch, token, g, channel] of normed inputs.

    Queries and keys are rotated to these positions.
    """
    q_bthc, k_btgc, v_btgc = (linear('btd,dhc->bthc', x_btd) for linear in (self.c_q, self.c_k, self.c_v))
    return rotate(q_bthc, positions_bt, self.config), rotate(k_btgc, positions_bt, self.config), v_btgc

  def __call__(self, x_btd, tap):
    qkv = self.qkv(x_btd, tap.positions(x_btd.shape[1]))
    return self.c_proj('bthc,hcd->btd', layers.attend(*qkv, tap))


class MLP(nnx.Module):
  """A gated MLP (SwiGLU; Shazeer 2020); sites pre_act, up and post_act = silu(pre_act) * up [batch, token, neuron]."""

  def __init__(self, config, rngs):
    d_model, n_neurons = config.d_model, config.n_neurons
    self.c_fc = layers.Linear(rngs, (d_model, n_neurons), 1, out_sharding=(None, 'model'), bias=False)
    self.c_up = layers.Linear(rngs, (d_model, n_neurons), 1, out_sharding=(None, 'model'), bias=False)
    self.c_proj = layers.Linear(rngs, (n_neurons, d_model), 1, out_sharding=('model', None), bias=False)

  def __call__(self, x_btd, tap):
    pre_act_btn = tap('pre_act', self.c_fc('btd,dn->btn', x_btd), 'batch token neuron')
    up_btn = tap('up', self.c_up('btd,dn->btn', x_btd), 'batch token neuron')
    post_act_btn = tap('post_act', jax.nn.silu(pre_act_btn) * up_btn, 'batch token neuron')
    return self.c_proj('btn,nd->btd', post_act_btn)


class Llama(nnx.Module):
  """A Llama; a plain pytree of float32 parameters on the ambient mesh.

  Raises:
    ValueError: n_head is not divisible by n_kv_head, d_head is odd, there are not d_head / 2 rope_divisors, or the
      mesh's model axis does not divide the neurons.
  """

  def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
    if config.n_head % config.n_kv_head:
      raise ValueError(f'n_head {config.n_head} is not divisible by n_kv_head {config.n_kv_head}; choose a multiple')
    if config.d_head % 2 or len(config.rope_divisors) not in (0, config.d_head // 2):
      raise ValueError(
        f'd_head {config.d_head} is odd, or half of it is not the {len(config.rope_divisors)} rope_divisors; choose an '
        'even d_head and d_head / 2 rope_divisors, or none'
      )
    sharding.check_divides('n_neurons', config.n_neurons, 'model')
    self.config = config
    self.wte = layers.Embedding(rngs, config.n_vocab, config.d_model)
    blocks = [
      layers.Block(RMSNorm(config), Attention(config, rngs), RMSNorm(config), MLP(config, rngs))
      for _ in range(config.n_layer)
    ]
    self.h = nnx.List(blocks)
    self.ln_f = RMSNorm(config)
    self.lm_head = None if config.tied else layers.Embedding(rngs, config.n_vocab, config.d_model)

  def __call__(self, tokens_bt: jax.Array, tap: Tap) -> jax.Array:
    """Returns logits_btv of tokens_bt (at most n_ctx tokens long), visiting every site in order.

    Raises:
      ValueError: the tokens are longer than the context.
    """
    layers.check_length(tokens_bt.shape[1], self.config.n_ctx)
    return layers.run(self, self.wte.embedding[...][tokens_bt], tap)

  @property
  def unembedding(self) -> jax.Array:
    """The matrix [vocab, d_model] that reads the logits."""
    return (self.wte if self.lm_head is None else self.lm_head).embedding[...]

  def promoted_logits(self, write_nd: jax.Array) -> jax.Array:
    """Returns logits_nv: what each write vector adds to every token's logit, up to the final norm's scale.

    This is the logit lens on a direction: the final norm's gain is applied, its scale is not.
    """
    return jnp.einsum('nd,vd->nv', self.ln_f.linear(write_nd), self.unembedding)
