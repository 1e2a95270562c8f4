"""GPT-2 in Flax, with every site tapped once (Radford et al. 2019; the layout of the released checkpoints).

Takes tokens_bt and a tap, gives logits_btv. Parameters and sites share one namespace: the site `h.5.mlp.post_act` is
what the parameter `h.5.mlp.c_proj.kernel` multiplies. Attention kernels keep their head axis, so that heads shard over
`model`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import sharding
from models.sites import Tap

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """The sizes of a GPT-2: the MLP has 4 * d_model neurons, a head d_model / n_head channels."""

  n_layer: int
  n_head: int
  d_model: int
  n_ctx: int = 1024
  n_vocab: int = 50257

  @property
  def n_neurons(self) -> int:
    return 4 * self.d_model


SIZES = {  # of the released checkpoints, by the last part of their hub ids
  'gpt2': GPT2Config(n_layer=12, n_head=12, d_model=768),
  'gpt2-medium': GPT2Config(n_layer=24, n_head=16, d_model=1024),
  'gpt2-large': GPT2Config(n_layer=36, n_head=20, d_model=1280),
  'gpt2-xl': GPT2Config(n_layer=48, n_head=25, d_model=1600),
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, out_sharding: tuple = ()) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(rngs.params(), shape), out_sharding=out_sharding)


class Linear(nnx.Module):
  """A kernel and a bias; the caller writes the einsum."""

  def __init__(self, rngs, shape, n_in, std=INIT_STD, out_sharding=()):
    bias_shape, bias_sharding = shape[n_in:], out_sharding[n_in:]
    self.kernel = _normal(rngs, shape, std, out_sharding)
    self.bias = nnx.Param(jnp.zeros(bias_shape), out_sharding=bias_sharding)


class Embedding(nnx.Module):
  """A table [n, d_model] of a row for each token or each position."""

  def __init__(self, rngs, n, d_model):
    self.embedding = _normal(rngs, (n, d_model), INIT_STD)


class LayerNorm(nnx.Module):
  """Layer normalisation in float32; its site `scale` [batch, token, 1] is the standard deviation that it divides by."""

  def __init__(self, d_model):
    self.gain = nnx.Param(jnp.ones(d_model), out_sharding=())
    self.bias = nnx.Param(jnp.zeros(d_model), out_sharding=())

  def __call__(self, x_btd, tap):
    centred_btd = x_btd.astype(jnp.float32)
    centred_btd -= centred_btd.mean(-1, keepdims=True)
    scale_bt1 = jnp.sqrt(jnp.mean(centred_btd**2, -1, keepdims=True) + LAYER_NORM_EPS)
    scale_bt1 = tap('scale', scale_bt1, 'batch token one')
    return (centred_btd / scale_bt1 * self.gain[...] + self.bias[...]).astype(x_btd.dtype)


class Attention(nnx.Module):
  """Causal attention.

  Sites: q, k, v, v_out [batch, token, head, channel] and qk_logits, qk_probs [batch, head, token, source].
  """

  def __init__(self, config, rngs):
    n_head, d_head = config.n_head, config.d_model // config.n_head
    residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
    qkv_shape = (config.d_model, 3, n_head, d_head)
    self.c_attn = Linear(rngs, qkv_shape, n_in=1, out_sharding=(None, None, 'model', None))
    self.c_proj = Linear(
      rngs, (n_head, d_head, config.d_model), n_in=2, std=residual_std, out_sharding=('model', None, None)
    )

  def __call__(self, x_btd, tap):
    qkv = jnp.einsum('btd,dxhc->xbthc', x_btd, self.c_attn.kernel[...])
    qkv += self.c_attn.bias[...][:, None, None]
    q_bthc, k_bshc, v_bshc = (tap(name, x, 'batch token head channel') for name, x in zip('qkv', qkv, strict=True))
    logits_bhts = jnp.einsum('bthc,bshc->bhts', q_bthc, k_bshc, preferred_element_type=jnp.float32)
    logits_bhts = tap('qk_logits', logits_bhts * q_bthc.shape[-1] ** -0.5, 'batch head token source')
    causal_ts = jnp.tri(x_btd.shape[1], dtype=bool)
    probs_bhts = jax.nn.softmax(jnp.where(causal_ts, logits_bhts, -jnp.inf))
    probs_bhts = tap('qk_probs', probs_bhts.astype(x_btd.dtype), 'batch head token source')
    v_out_bthc = tap('v_out', jnp.einsum('bhts,bshc->bthc', probs_bhts, v_bshc), 'batch token head channel')
    return jnp.einsum('bthc,hcd->btd', v_out_bthc, self.c_proj.kernel[...]) + self.c_proj.bias[...]


class MLP(nnx.Module):
  """Two linear maps around a GELU (its tanh approximation); sites pre_act, post_act [batch, token, neuron]."""

  def __init__(self, config, rngs):
    residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
    self.c_fc = Linear(rngs, (config.d_model, config.n_neurons), n_in=1, out_sharding=(None, 'model'))
    self.c_proj = Linear(
      rngs, (config.n_neurons, config.d_model), n_in=1, std=residual_std, out_sharding=('model', None)
    )

  def __call__(self, x_btd, tap):
    pre_act_btn = jnp.einsum('btd,dn->btn', x_btd, self.c_fc.kernel[...]) + self.c_fc.bias[...]
    pre_act_btn = tap('pre_act', pre_act_btn, 'batch token neuron')
    post_act_btn = tap('post_act', jax.nn.gelu(pre_act_btn, approximate=True), 'batch token neuron')
    return jnp.einsum('btn,nd->btd', post_act_btn, self.c_proj.kernel[...]) + self.c_proj.bias[...]


class Block(nnx.Module):
  """One layer; sites resid.delta_attn, .post_attn, .delta_mlp, .post_mlp [batch, token, d_model], and its parts'."""

  def __init__(self, config, rngs):
    self.attn_ln, self.attn = LayerNorm(config.d_model), Attention(config, rngs)
    self.mlp_ln, self.mlp = LayerNorm(config.d_model), MLP(config, rngs)

  def __call__(self, x_btd, tap):
    attn_btd = self.attn(self.attn_ln(x_btd, tap.at('attn_ln')), tap.at('attn'))
    x_btd = x_btd + tap('resid.delta_attn', attn_btd, 'batch token d_model')
    x_btd = tap('resid.post_attn', x_btd, 'batch token d_model')
    mlp_btd = self.mlp(self.mlp_ln(x_btd, tap.at('mlp_ln')), tap.at('mlp'))
    x_btd = x_btd + tap('resid.delta_mlp', mlp_btd, 'batch token d_model')
    return tap('resid.post_mlp', x_btd, 'batch token d_model')


class GPT2(nnx.Module):
  """GPT-2; a plain pytree of float32 parameters on the ambient mesh.

  Raises:
    ValueError: d_model is not divisible by n_head, or the mesh's model axis does not divide the heads or the neurons.
  """

  def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
    if config.d_model % config.n_head:
      raise ValueError(f'd_model {config.d_model} is not divisible by n_head {config.n_head}; choose a multiple')
    sharding.check_divides('n_head', config.n_head, 'model')
    sharding.check_divides('n_neurons', config.n_neurons, 'model')
    self.config = config
    self.wte, self.wpe = Embedding(rngs, config.n_vocab, config.d_model), Embedding(rngs, config.n_ctx, config.d_model)
    self.h = nnx.List([Block(config, rngs) for _ in range(config.n_layer)])
    self.ln_f = LayerNorm(config.d_model)

  def __call__(self, tokens_bt: jax.Array, tap: Tap) -> jax.Array:
    """Returns logits_btv of tokens_bt (at most n_ctx tokens long), visiting every site in order.

    Raises:
      ValueError: the tokens are longer than the context.
    """
    n_tokens = tokens_bt.shape[1]
    if n_tokens > self.config.n_ctx:
      raise ValueError(f'{n_tokens} tokens are longer than the context of {self.config.n_ctx}; cut the windows')
    x_btd = self.wte.embedding[...][tokens_bt] + self.wpe.embedding[...][:n_tokens]
    x_btd = tap('resid.post_emb', x_btd, 'batch token d_model')
    for i, block in enumerate(self.h):
      x_btd = block(x_btd, tap.at(f'h.{i}'))
    x_btd = tap('resid.post_ln_f', self.ln_f(x_btd, tap.at('ln_f')), 'batch token d_model')
    return tap('logits', jnp.einsum('btd,vd->btv', x_btd, self.wte.embedding[...]), 'batch token vocab')

  def promoted_logits(self, write_nd: jax.Array) -> jax.Array:
    """Returns logits_nv: what each write vector adds to every token's logit, up to the final norm's scale.

    This is the logit lens on a direction: the final norm's centring and gain are applied, its scale is not.
    """
    centred_nd = write_nd - write_nd.mean(1, keepdims=True)
    return jnp.einsum('nd,vd->nv', centred_nd * self.ln_f.gain[...], self.wte.embedding[...])
