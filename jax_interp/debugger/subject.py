"""What the debugger runs on: a model, its tokenizer, its SAEs, and a sample of text for means and resamples."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jax_interp.debugger import schema

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # prompts are padded to one of these: few compilations
SAE_SITES = ('attn.v_out', 'resid.delta_attn', 'resid.post_attn', 'mlp.post_act', 'resid.delta_mlp', 'resid.post_mlp')


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """A model under study; one is equal to itself alone.

  Attributes:
    model: as for `sites.forward`.
    tokenizer: of `transformers`.
    saes: {site: SAE}, as `sites.splice` takes them.
    sample_wt: windows of tokens, without padding, that means and resamples are of; None: there are none.
    name: what it is called.

  Raises:
    ValueError: an SAE is at a site whose writes to the residual stream are not linear, or of another size.
  """

  model: object
  tokenizer: object
  saes: Mapping[str, object] = dataclasses.field(default_factory=dict)
  sample_wt: np.ndarray | None = None
  name: str = ''

  def __post_init__(self):
    config = self.model.config
    sites = ['resid.post_emb', *(f'h.{i}.{s}' for i in range(config.n_layer) for s in SAE_SITES)]
    widths = {'v_out': self.model.h[0].attn.c_proj.kernel[...].shape[:2], 'post_act': (config.n_neurons,)}
    for site, sae in self.saes.items():
      if site not in sites:
        raise ValueError(
          f'an SAE at {site!r} cannot be debugged; the sites are resid.post_emb and h.0 to h.{config.n_layer - 1} '
          f'. {", ".join(SAE_SITES)}'
        )
      width, d = int(np.prod(widths.get(site.split('.')[-1], (config.d_model,)))), sae.decoder.shape[1]
      if d != width:
        raise ValueError(f'the SAE at {site} reads {d} numbers and the site has {width}; give the SAE of this model')

  def encode(self, prompt: str) -> list[int]:
    """Returns the tokens of a prompt; special tokens are read as such.

    Raises:
      ValueError: there are none, or more than the model's context.
    """
    tokens = self.tokenizer.encode(prompt, add_special_tokens=False)
    n_ctx = self.model.config.n_ctx
    if not 1 <= len(tokens) <= n_ctx:
      raise ValueError(f'the prompt has {len(tokens)} tokens; give one or more, and at most the context of {n_ctx}')
    return tokens

  def token(self, text: str) -> int:
    """Returns the id of a text of one token.

    Raises:
      ValueError: it is of none or several; the message shows them.
    """
    tokens = self.tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
      pieces = [self.tokenizer.decode([t]) for t in tokens]
      raise ValueError(f'{text!r} is {len(tokens)} tokens, {pieces}; give a text of exactly one')
    return tokens[0]

  def tokens(self, ids) -> list[schema.Token]:
    """Returns ids with their texts."""
    return [schema.Token(id=int(i), text=self.tokenizer.decode([int(i)])) for i in ids]

  def pad(self, tokens: list[int]) -> np.ndarray:
    """Returns tokens_bt [1, one of LENGTHS, or the context]; what is behind the prompt does not change it."""
    n_ctx = self.model.config.n_ctx
    length = min(next((n for n in LENGTHS if n >= len(tokens)), n_ctx), n_ctx)
    return np.array([tokens + [0] * (length - len(tokens))], np.int32)

  def position(self, token: int, n_tokens: int, what: str = 'token') -> int:
    """Returns a position counted from 0.

    Raises:
      ValueError: the prompt has no such token.
    """
    if not -n_tokens <= token < n_tokens:
      raise ValueError(f'{what} {token} is not in a prompt of {n_tokens} tokens; give {-n_tokens} to {n_tokens - 1}')
    return token % n_tokens
