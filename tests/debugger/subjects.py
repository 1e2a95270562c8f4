"""Small subjects for the debugger's tests: both families, untrained SAEs at all kinds of site, a tokenizer."""

import numpy as np

from jax_interp.debugger import schema, subject
from models import sae, sharding
from models.activation_functions import TopK
from tests.models import families

PROMPT = '3 17 5 44 9 20 31'
N_TOKENS = 7
# Site -> latents, how many stay on, normalization; sizes are all distinct.
INNER = {
  'h.0.mlp.post_act': (44, 6, 'none'),
  'h.0.resid.delta_attn': (22, 5, 'unit_norm'),
  'h.1.attn.v_out': (26, 4, 'layer_norm_std'),
  'h.1.resid.delta_mlp': (34, 7, 'layer_norm_std'),
}
ON_STREAM = {
  'resid.post_emb': (28, 3, 'none'),
  'h.1.resid.post_attn': (30, 8, 'layer_norm_std'),
  'h.1.resid.post_mlp': (38, 9, 'unit_norm'),
}
SAES = INNER | ON_STREAM
SUBJECTS = {  # arguments of `build`: of each family one, together with SAEs at all kinds of site
  'gpt2': ('gpt2', ('h.0.mlp.post_act', 'h.1.resid.post_mlp', 'resid.post_emb')),
  'llama': ('llama', ('h.0.resid.delta_attn', 'h.1.attn.v_out', 'h.1.resid.delta_mlp', 'h.1.resid.post_attn')),
}


class Tokenizer:
  """'3 17 5' <-> [3, 17, 5]; a word that is no number is the token of its bytes' sum."""

  def __init__(self, n_vocab: int):
    self.n_vocab = n_vocab

  def __len__(self):
    return self.n_vocab

  def encode(self, text, add_special_tokens=True):
    del add_special_tokens  # there are none
    numbers = (int(word) if word.isdecimal() else sum(word.encode()) for word in text.split())
    return [number % self.n_vocab for number in numbers]

  def decode(self, ids):
    return ' '.join(str(int(i)) for i in np.atleast_1d(ids))


def dictionary(model, site: str):
  """Returns an SAE of a site of SAES, untrained, so that its error is large; the same numbers on every mesh."""
  n_latents, k, normalization = SAES[site]
  rng, config = np.random.default_rng(list(site.encode())), model.config
  n_head, d_head, _ = model.h[0].attn.c_proj.kernel.shape
  d = {'v_out': n_head * d_head, 'post_act': config.n_neurons}.get(site.split('.')[-1], config.d_model)
  shapes = {'encoder': (n_latents, d), 'decoder': (n_latents, d), 'pre_bias': (d,), 'latent_bias': (n_latents,)}
  arrays = {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
  arrays['decoder'] /= np.linalg.norm(arrays['decoder'], axis=1, keepdims=True)
  dims = dict(zip(shapes, ('latent d_model', 'latent d_model', 'd_model', 'latent'), strict=True))
  placed = {name: sharding.place(x, dims[name]) for name, x in arrays.items()}
  return sae.SparseAutoencoder(**placed, activation=TopK(k), normalization=normalization)


def build(name: str = 'gpt2', sites=(), sample: bool = True) -> subject.Subject:
  """Returns a subject on the ambient mesh.

  Args:
    name: of `families.CONFIGS`.
    sites: of SAES.
    sample: whether it has a sample of text, 5 windows of 12 tokens.
  """
  model = families.build(name)
  tokenizer = Tokenizer(model.config.n_vocab)
  sample_wt = np.random.default_rng(7).integers(model.config.n_vocab, size=(5, 12)) if sample else None
  return subject.Subject(model, tokenizer, {site: dictionary(model, site) for site in sites}, sample_wt, name)


def request(objective=None, **changes) -> schema.Request:
  """Returns a request about PROMPT, with a logit difference if no objective is given, and no lists of tokens."""
  objective = objective or schema.LogitDifference(targets=['8', '21'], distractors=['30'])
  return schema.Request(**({'prompt': PROMPT, 'objective': objective, 'n_tokens': 0} | changes))
