"""What the debugger runs on: a model, its tokenizer, its SAEs, and a sample of text for means and resamples."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import schema
from models import layers, sharding

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # prompts are padded to one of these: few compilations
MAX_COPIED = 2**30  # bytes of kernels that are kept twice
ACTIVATIONS = ('topk', 'relu', 'jumprelu')  # whose latents are pre-activations, or 0
SAE_SITES = ('attn.v_out', 'resid.delta_attn', 'resid.post_attn', 'mlp.post_act', 'resid.delta_mlp', 'resid.post_mlp')


def check_index(index: int | None, n: int, what: str):
  """Raises unless there is such a component.

  Raises:
    ValueError: there is not, or the number is missing; the message says how many there are.
  """
  if index is None:
    raise ValueError(f'the number of the {what} is missing; give one from 0 to {n - 1}')
  if not 0 <= index < n:
    raise ValueError(f'{what} {index} is not there; there are {n}, from 0')


def check_sae(site: str | None, sae_sites: Sequence[str]):
  """Raises unless there is an SAE at the site.

  Raises:
    ValueError: there is not; the message says where there are.
  """
  if site not in sae_sites:
    asked = 'the site of an SAE is missing' if site is None else f'no SAE is spliced in at {site!r}'
    raise ValueError(f'{asked}; there is one at {list(sae_sites) or "no site"}')


class WriteSizes(NamedTuple):
  """The norms of what an activation of 1 adds to the residual stream, the same for all prompts.

  Attributes:
    heads: of each layer [head, channel, channel]: a value times it has the norm of what the head writes of the value.
    neurons: of each layer [neuron].
    latents: {site: [latent]}, where the scale of the SAE's input is 1.
  """

  heads: list[jax.Array]
  neurons: list[jax.Array]
  latents: dict[str, jax.Array]


def to_stream(model, site: str, x: jax.Array) -> jax.Array:
  """Returns what x [..., width of the site] adds to the residual stream [..., d_model]."""
  if site.endswith(('v_out', 'post_act')):
    _, layer, part, _ = site.split('.')
    kernel = getattr(model.h[int(layer)], part).c_proj.kernel[...]
    return jnp.einsum('...x,xd->...d', x, kernel.reshape(-1, kernel.shape[-1]), preferred_element_type=jnp.float32)
  return x.astype(jnp.float32)


@jax.jit
def _write_sizes(model, saes):
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
  # Where a kernel's transpose is Q R, what x writes is as long as R x.
  factor = lambda kernel: jnp.linalg.qr(jnp.swapaxes(kernel.astype(jnp.float32), 1, 2), mode='r').swapaxes(1, 2)
  return WriteSizes(
    [factor(block.attn.c_proj.kernel[...]) for block in model.h],
    [norm(block.mlp.c_proj.kernel[...]) for block in model.h],
    {site: norm(to_stream(model, site, sae.decoder[...])) for site, sae in saes.items()},
  )


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
    ValueError: an SAE is at a site whose writes to the residual stream are not linear, or of another size; or it is a
      transcoder, or its latents are not the pre-activations that are on.
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
      if sae.is_transcoder or sae.activation.name not in ACTIVATIONS:
        what = 'a transcoder, which writes another site' if sae.is_transcoder else sae.activation.name
        raise ValueError(f'the SAE at {site} is {what}; the debugger reads SAEs of {", ".join(ACTIVATIONS)}')

  @functools.cached_property
  def write_sizes(self) -> WriteSizes:
    """How large writes are, of all layers and SAEs; computed when first asked for."""
    return _write_sizes(self.model, dict(self.saes))

  @functools.cached_property
  def quick_model(self):
    """The model for runs of few tokens: with kernels a second time where that makes them faster and memory allows.

    It is faster on a CPU, in float32, where kernels are not cut; elsewhere the memory would be spent for nothing.
    """
    arrays = jax.tree.leaves(self.model.h)
    faster = jax.sharding.get_mesh().devices.flat[0].platform == 'cpu' and not sharding.is_cut('model')
    faster &= all(x.dtype == jnp.float32 for x in arrays)
    return layers.with_transposed(self.model) if faster and sum(x.nbytes for x in arrays) <= MAX_COPIED else self.model

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
    return np.array([tokens + [0] * (self.padded(len(tokens)) - len(tokens))], np.int32)

  def padded(self, n_tokens: int) -> int:
    """Returns to which length so many tokens are padded."""
    n_ctx = self.model.config.n_ctx
    return min(next((n for n in LENGTHS if n >= n_tokens), n_ctx), n_ctx)

  def position(self, token: int, n_tokens: int, what: str = 'token') -> int:
    """Returns a position counted from 0.

    Raises:
      ValueError: the prompt has no such token.
    """
    if not -n_tokens <= token < n_tokens:
      raise ValueError(f'{what} {token} is not in a prompt of {n_tokens} tokens; give {-n_tokens} to {n_tokens - 1}')
    return token % n_tokens
