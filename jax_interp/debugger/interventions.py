"""Ablations as arrays: what a run changes, without compiling anew for another node, layer, token or value.

Every run has the same edits at the same sites; which cells they hold, and at what, is in `Held`. The later of two
ablations of a cell wins.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import schema
from jax_interp.debugger.subject import Subject, check_index, check_sae
from models import sites

N_SLOTS = 16  # ablations of a run
MAX_KEPT = 2**22  # bytes of an array of zeros that is kept
N_PLACES = 4  # activations of other runs that compile nothing, at sites whose activations are small
# Sites whose cells can be held, and the axes (token, source, component) among theirs behind the batch.
HOLDABLE = {
  'attn.qk_probs': (1, 2, 0),
  'attn.v_out': (0, None, 1),
  'mlp.post_act': (0, None, 1),
  'latents': (0, None, 1),
  'resid.post_emb': (0, None, None),
  'resid.delta_attn': (0, None, None),
  'resid.delta_mlp': (0, None, None),
}
CODES = {name: code for code, name in enumerate(HOLDABLE)}
SITES = {'neuron': 'mlp.post_act', 'latent': 'latents', 'embedding': 'resid.post_emb', 'attn': 'resid.delta_attn'}
SITES |= {'mlp': 'resid.delta_mlp'}
EVERYTHING = 2**30


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['cells', 'values', 'others', 'latents'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Held:
  """What a run holds.

  Attributes:
    cells: int32 [slot, 10]: code of the site, layer or number of the SAE, then the first and the end of tokens, of
      sources and of components, the place of an activation of another run (-1: a constant), and 1 where the slot is
      used.
    values: float32 [slot]: constants.
    others: {name of HOLDABLE but latents: [place, ...]}, activations of other runs, each of one run and layer; there
      are always some places, so that the first that are asked for compile nothing.
    latents: the same of each SAE, [place, token, latent].
  """

  cells: np.ndarray
  values: np.ndarray
  others: dict[str, jax.Array]
  latents: tuple[jax.Array, ...]


def on_device(x: np.ndarray) -> jax.Array:
  """Returns a copy that `jax.jit` takes on any mesh as one of the host, and compiles nothing for."""
  return jax.device_put(x.copy())


@functools.lru_cache(maxsize=32)
def _kept_zeros(shape):
  return on_device(np.zeros(shape, np.float32))


def zeros(shape: tuple[int, ...]) -> jax.Array:
  """Returns zeros on the device; small ones stay there: most requests hold nothing of another run and cut no edge."""
  return _kept_zeros(shape) if 4 * math.prod(shape) <= MAX_KEPT else _kept_zeros.__wrapped__(shape)


def held(
  subject: Subject, ablations: Sequence[schema.Ablation], n_tokens: int, sae_sites: Sequence[str], other_run
) -> Held:
  """Returns ablations as arrays.

  Args:
    subject: of the request.
    ablations: in order.
    n_tokens: of the prompt.
    sae_sites: where SAEs are spliced in.
    other_run: returns the activations of a `Mean`, `OtherPrompt` or `Resample`, {site: [1, token or 1, ...]}.

  Raises:
    ValueError: there is no such component or token, or there are too many ablations.
  """
  if len(ablations) > N_SLOTS:
    raise ValueError(f'{len(ablations)} ablations; give at most {N_SLOTS}')
  cells, values = np.zeros((N_SLOTS, 10), np.int32), np.zeros(N_SLOTS, np.float32)
  runs, found = {}, {}  # {value: run}, {name or number of the SAE: {(value, layer): activation}}
  for slot, ablation in enumerate(ablations):
    check(subject, ablation, sae_sites)
    constant = isinstance(ablation.to, schema.Value)
    if ablation.kind == 'head':
      site = 'attn.qk_probs' if constant or ablation.source is not None else 'attn.v_out'
    else:
      site = SITES[ablation.kind]
    where = sae_sites.index(ablation.site) if ablation.kind == 'latent' else ablation.layer or 0
    first = subject.position(ablation.first, n_tokens, 'first')
    last = subject.position(ablation.last, n_tokens, 'last')
    if first > last:
      raise ValueError(f'an ablation from token {first} to {last} is of none; give first and last in order')
    source = None if ablation.source is None else subject.position(ablation.source, n_tokens, 'source')
    if site == 'attn.qk_probs' and isinstance(ablation.to, schema.Mean):
      raise ValueError('there is no mean of attention at one token pair; leave out the source, or give another value')
    if source is not None and source > last:
      raise ValueError(f'source {source} is behind token {last}; attention looks back')
    ranges = [(first, last + 1), _range(source), _range(ablation.index)]
    place = -1
    if constant:
      values[slot] = ablation.to.value
    else:
      if ablation.to not in runs:
        runs[ablation.to] = other_run(ablation.to)
      mine = found.setdefault(where if site == 'latents' else site, {})
      full = {'latents': f'{ablation.site}.latents', 'resid.post_emb': site}.get(site, f'h.{where}.{site}')
      mine.setdefault((ablation.to, where), runs[ablation.to][full])
      place = list(mine).index((ablation.to, where))
    cells[slot] = [CODES[site], where, *np.ravel(ranges), place, 1]

  def places(key, n_least, *shape):
    mine = list(found.get(key, {}).values())
    if not mine:
      return zeros((n_least, *shape))
    n = 1 << (max(len(mine), n_least) - 1).bit_length()  # few numbers are compiled
    x = np.zeros((n, *shape), np.float32)
    for place, activation in enumerate(mine):
      x[place] = np.asarray(activation)[0]
    return on_device(x)

  config, t = subject.model.config, subject.padded(n_tokens)
  n_head, d_head, d = subject.model.h[0].attn.c_proj.kernel.shape
  shapes = {'attn.qk_probs': (n_head, t, t), 'attn.v_out': (t, n_head, d_head), 'mlp.post_act': (t, config.n_neurons)}
  shapes |= dict.fromkeys(('resid.post_emb', 'resid.delta_attn', 'resid.delta_mlp'), (t, d))
  others = {name: places(name, 1 if name == 'attn.qk_probs' else N_PLACES, *shape) for name, shape in shapes.items()}
  latents = tuple(places(i, 1, t, subject.saes[site].n_latents) for i, site in enumerate(sae_sites))
  return Held(cells, values, others, latents)


def _range(index):
  return (0, EVERYTHING) if index is None else (index, index + 1)


def check(subject: Subject, ablation: schema.Ablation, sae_sites: Sequence[str]):
  """Raises unless there is such a component.

  Raises:
    ValueError: there is not; the message says how many there are.
  """
  config = subject.model.config
  sizes = {'head': config.n_head, 'neuron': config.n_neurons}
  if ablation.kind == 'latent':
    check_sae(ablation.site, sae_sites)
    sizes['latent'] = subject.saes[ablation.site].n_latents
  elif ablation.kind != 'embedding':
    check_index(ablation.layer, config.n_layer, 'layer')
  if ablation.index is not None:
    check_index(ablation.index, sizes[ablation.kind], ablation.kind)


def _inside(cell, layer_or_sae, token, component):
  """Returns whether a cell that is used holds something of a layer or SAE at these tokens and components."""
  inside = (cell[2] <= token) & (token < cell[3]) & (cell[6] <= component) & (component < cell[7])
  return inside & (cell[1] == layer_or_sae) & (cell[9] == 1)


def _is_whole_pattern(cell):
  """Returns whether a cell holds all that heads attend to: what they read is then held no more."""
  return (cell[0] == CODES['attn.qk_probs']) & (cell[5] == EVERYTHING)


def _hold(x, tap, cells, values, layer_or_sae, others):
  name = next(name for name in HOLDABLE if tap.prefix.endswith(f'{name}.'))
  shape = tuple(tap.shape.values())[1:]

  def index_along(axis):
    if axis is None:
      return jnp.zeros((1,) * len(shape), jnp.int32)
    is_token = axis == HOLDABLE[name][0]
    index = tap.positions(shape[axis])[0] if is_token else jnp.arange(shape[axis])
    return jnp.expand_dims(index, [a for a in range(len(shape)) if a != axis])

  token, source, component = (index_along(axis) for axis in HOLDABLE[name])

  def write(slot, mask_and_value):
    mask, value = mask_and_value
    cell = cells[slot]
    inside = _inside(cell, layer_or_sae, token, component) & (cell[4] <= source) & (source < cell[5])
    freed = inside & _is_whole_pattern(cell) if name == 'attn.v_out' else jnp.zeros((), bool)
    inside &= cell[0] == CODES[name]
    inside &= (source <= token) if name == 'attn.qk_probs' else True  # what is attended to stays behind
    new = jnp.where(cell[8] < 0, values[slot], tap.here(others[jnp.maximum(cell[8], 0)][None])[0])
    return (mask & ~freed) | inside, jnp.where(inside, new, value)

  n_used = cells[:, 9].sum()
  start = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)
  mask, value = jax.lax.fori_loop(0, n_used, write, start)
  return jnp.where(mask, value, x).astype(x.dtype)


def held_tokens(held: Held, name: str, layer: int, n_tokens: int) -> jax.Array:
  """Returns whether a site of a layer that holds whole tokens, 'resid.delta_attn' or 'resid.delta_mlp', is held."""
  tokens_t = jnp.arange(n_tokens)
  inside_st = (held.cells[:, 2, None] <= tokens_t) & (tokens_t < held.cells[:, 3, None])
  mine_s = (held.cells[:, 0] == CODES[name]) & (held.cells[:, 1] == layer) & (held.cells[:, 9] == 1)
  return (inside_st & mine_s[:, None]).any(0)


def held_heads(held: Held, layer: int, n_tokens: int, n_head: int) -> jax.Array:
  """Returns whether what a head reads is held, [token, head]: it is not where its whole pattern is held later."""
  tokens_t1, heads_h, found_th = jnp.arange(n_tokens)[:, None], jnp.arange(n_head), jnp.zeros((n_tokens, n_head), bool)
  for slot in range(N_SLOTS):
    cell = jnp.asarray(held.cells)[slot]
    inside_th = _inside(cell, layer, tokens_t1, heads_h)
    found_th &= ~(inside_th & _is_whole_pattern(cell))
    found_th |= inside_th & (cell[0] == CODES['attn.v_out'])
  return found_th


def edits(held: Held, n_layer: int, sae_sites: Sequence[str]) -> tuple[sites.Edit, ...]:
  """Returns the edits of a run; those at a site where an SAE is spliced in come before the splice."""
  found = [_edit(held, 'resid.post_emb', 0)]
  for layer in range(n_layer):
    found += layer_edits(held, layer, {}, f'h.{layer}.')
  return *found, *latent_edits(held, dict(zip(sae_sites, range(len(sae_sites)), strict=True)))


def _edit(held, name, layer, prefix=''):
  return sites.Edit(f'{prefix}{name}', _hold, (held.cells, held.values, layer, held.others[name]))


def layer_edits(held: Held, layer, saes: Mapping[str, int], prefix: str = '') -> list[sites.Edit]:
  """Returns the edits of one layer, by names within it.

  Args:
    held: of the run.
    layer: its number; may be traced.
    saes: {name of a site within the layer: number of its SAE}.
    prefix: of all names, where the whole model runs.
  """
  names = [name for name in HOLDABLE if name not in ('latents', 'resid.post_emb')]
  return [_edit(held, name, layer, prefix) for name in names] + latent_edits(held, saes)


def latent_edits(held: Held, saes: Mapping[str, int]) -> list[sites.Edit]:
  """Returns the edits of SAEs, {site: number}."""
  return [
    sites.Edit(f'{site}.latents', _hold, (held.cells, held.values, number, held.latents[number]))
    for site, number in saes.items()
  ]


# Edges


N_SHIFTS = 8  # readers whose inputs are changed in a run


@functools.partial(jax.tree_util.register_dataclass, data_fields=['layers', 'deltas'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Shifts:
  """What is added to queries, keys and values: to those of layers[i] deltas['q'][i] etc. [token, head, channel].

  Where layers[i] is -1, nothing.
  """

  layers: np.ndarray
  deltas: dict[str, jax.Array]


def _shift(x, tap, layers, deltas, layer):
  mine_s = layers == layer
  delta_thc = jnp.where(mine_s.any(), deltas[jnp.argmax(mine_s)], 0)
  return (x + tap.here(delta_thc[None])).astype(x.dtype)


def shift_edits(shifts: Shifts, layer, prefix: str = '') -> list[sites.Edit]:
  """Returns the edits of a layer's queries, keys and values."""
  return [sites.Edit(f'{prefix}attn.{name}', _shift, (shifts.layers, shifts.deltas[name], layer)) for name in 'qkv']
