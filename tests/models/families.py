"""A small model of each family, with weights larger than at initialisation, so that no effect drowns in rounding."""

import jax
import numpy as np
from flax import nnx

from models import gpt2, llama

GPT2 = gpt2.GPT2Config(n_layer=3, n_head=4, d_model=32, n_ctx=16, n_vocab=53)
# Odd numbers of heads, which two devices do not divide: their channels are cut instead.
ODD_GPT2 = gpt2.GPT2Config(n_layer=3, n_head=5, d_model=40, n_ctx=16, n_vocab=53)
LLAMA = llama.LlamaConfig(
  n_layer=3, n_head=6, n_kv_head=2, d_model=32, d_head=8, n_neurons=72, n_ctx=16, n_vocab=53, tied=False
)
ODD_LLAMA = llama.LlamaConfig(
  n_layer=3, n_head=9, n_kv_head=3, d_model=30, d_head=6, n_neurons=72, n_ctx=16, n_vocab=53
)
CONFIGS = {'gpt2': GPT2, 'odd_gpt2': ODD_GPT2, 'llama': LLAMA, 'odd_llama': ODD_LLAMA}


def build(name: str, scale: float = 0.1):
  """Returns the model of a name of CONFIGS on the ambient mesh, the same numbers on every mesh."""
  config, rng = CONFIGS[name], np.random.default_rng(0)
  module = gpt2.GPT2 if isinstance(config, gpt2.GPT2Config) else llama.Llama
  model = module(config, nnx.Rngs(0))
  return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), model)
