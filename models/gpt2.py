"""GPT-2 in Flax, with every site tapped once (Radford et al. 2019; the layout of the released checkpoints).

Takes tokens_bt and a tap, gives logits_btv. Parameters and sites share one namespace: the site `h.5.mlp.post_act` is
what the parameter `h.5.mlp.c_proj.kernel` multiplies. Attention kernels keep their head axis, so that heads shard over
`model`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers, sharding
from models.sites import Tap

LAYER_NORM_EPS = 1e-5


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

  @property
  def residual_std(self) -> float:
    return layers.INIT_STD / (2 * self.n_layer) ** 0.5  # at initialisation, of what writes to the residual stream


SIZES = {  # of the released checkpoints, by the last part of their hub ids
  'gpt2': GPT2Config(n_layer=12, n_head=12, d_model=768),
  'gpt2-medium': GPT2Config(n_layer=24, n_head=16, d_model=1024),
  'gpt2-large': GPT2Config(n_layer=36, n_head=20, d_model=1280),
  'gpt2-xl': GPT2Config(n_layer=48, n_head=25, d_model=1600),
}


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

  def linear(self, x: jax.Array) -> jax.Array:
    """Returns what x [..., d_model] adds to the norm times its scale, in float32: centred, times the gain."""
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) * self.gain[...]

  @property
  def shift(self) -> jax.Array:
    """What the norm gives [d_model] whatever its input."""
    return self.bias[...]


class Attention(nnx.Module):
  """Causal attention; sites as for `layers.attend`."""

  def __init__(self, config, rngs):
    n_head, d_head = config.n_head, config.d_model // config.n_head
    self.n_kv_head = n_head
    axes = sharding.head_axes(n_head, d_head)
    self.c_attn = layers.Linear(rngs, (config.d_model, 3, n_head, d_head), n_in=1, out_sharding=(None, None, *axes))
    self.c_proj = layers.Linear(
      rngs, (n_head, d_head, config.d_model), n_in=2, std=config.residual_std, out_sharding=(*axes, None)
    )

  def qkv(self, x_btd, positions_bt):
    """Returns queries, keys and values [batch, token, head, channel] of normed inputs at these positions."""
    return jnp.moveaxis(self.c_attn('btd,dxhc->btxhc', x_btd), 2, 0)

  def __call__(self, x_btd, tap):
    qkv = self.qkv(x_btd, tap.positions(x_btd.shape[1]))
    return self.c_proj('bthc,hcd->btd', layers.attend(*qkv, tap))


class MLP(nnx.Module):
  """Two linear maps around a GELU (its tanh approximation); sites pre_act, post_act [batch, token, neuron]."""

  def __init__(self, config, rngs):
    d_model, n_neurons = config.d_model, config.n_neurons
    self.c_fc = layers.Linear(rngs, (d_model, n_neurons), n_in=1, out_sharding=(None, 'model'))
    self.c_proj = layers.Linear(
      rngs, (n_neurons, d_model), n_in=1, std=config.residual_std, out_sharding=('model', None)
    )

  def __call__(self, x_btd, tap):
    pre_act_btn = tap('pre_act', self.c_fc('btd,dn->btn', x_btd), 'batch token neuron')
    post_act_btn = tap('post_act', jax.nn.gelu(pre_act_btn, approximate=True), 'batch token neuron')
    return self.c_proj('btn,nd->btd', post_act_btn)


class GPT2(nnx.Module):
  """GPT-2; a plain pytree of float32 parameters on the ambient mesh.

  Raises:
    ValueError: d_model is not divisible by n_head, or the mesh's model axis does not divide the neurons.
  """

  def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
    if config.d_model % config.n_head:
      raise ValueError(f'd_model {config.d_model} is not divisible by n_head {config.n_head}; choose a multiple')
    sharding.check_divides('n_neurons', config.n_neurons, 'model')
    self.config = config
    self.wte = layers.Embedding(rngs, config.n_vocab, config.d_model)
    self.wpe = layers.Embedding(rngs, config.n_ctx, config.d_model)
    blocks = [
      layers.Block(LayerNorm(config.d_model), Attention(config, rngs), LayerNorm(config.d_model), MLP(config, rngs))
      for _ in range(config.n_layer)
    ]
    self.h = nnx.List(blocks)
    self.ln_f = LayerNorm(config.d_model)

  def __call__(self, tokens_bt: jax.Array, tap: Tap) -> jax.Array:
    """Returns logits_btv of tokens_bt (at most n_ctx tokens long), visiting every site in order.

    Raises:
      ValueError: the tokens are longer than the context.
    """
    n_tokens = tokens_bt.shape[1]
    layers.check_length(n_tokens, self.config.n_ctx)
    x_btd = self.wte.embedding[...][tokens_bt] + self.wpe.embedding[...][tap.positions(n_tokens)]
    return layers.run(self, x_btd, tap)

  @property
  def unembedding(self) -> jax.Array:
    """The matrix [vocab, d_model] that reads the logits: the token embedding itself."""
    return self.wte.embedding[...]

  def promoted_logits(self, write_nd: jax.Array) -> jax.Array:
    """Returns logits_nv: what each write vector adds to every token's logit, up to the final norm's scale.

    This is the logit lens on a direction: the final norm's centring and gain are applied, its scale is not.
    """
    return jnp.einsum('nd,vd->nv', self.ln_f.linear(write_nd), self.unembedding)
