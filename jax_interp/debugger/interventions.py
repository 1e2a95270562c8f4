"""Ablations as arrays: what a run changes, without compiling anew for another node, layer, token or value.

Every run has the same edits at the same sites; which cells they hold, and at what, is in `Held`. The later of two
ablations of a cell wins.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import schema
from jax_interp.debugger.subject import Subject
from models import sites

N_SLOTS = 16  # ablations of a run
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


@functools.partial(jax.tree_util.register_dataclass, data_fields=['cells', 'values', 'donors'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Held:
  """What a run holds.

  Attributes:
    cells: int32 [slot, 10]: code of the site, layer or number of the SAE, then the first and the end of tokens, of
      sources and of components, the number of a donor (-1: a constant), and 1 where the slot is used.
    values: float32 [slot]: constants.
    donors: other runs' activations, {site: [token, ...]} or means [1, ...] each.
  """

  cells: np.ndarray
  values: np.ndarray
  donors: tuple[dict[str, jax.Array], ...] = ()


def held(
  subject: Subject, ablations: Sequence[schema.Ablation], n_tokens: int, sae_sites: Sequence[str], donor_of
) -> Held:
  """Returns ablations as arrays.

  Args:
    subject: of the request.
    ablations: in order.
    n_tokens: of the prompt.
    sae_sites: where SAEs are spliced in.
    donor_of: returns the activations of a `Mean`, `OtherPrompt` or `Resample`, {site: [token or 1, ...]}.

  Raises:
    ValueError: there is no such component or token, or there are too many ablations.
  """
  if len(ablations) > N_SLOTS:
    raise ValueError(f'{len(ablations)} ablations; give at most {N_SLOTS}')
  cells, values = np.zeros((N_SLOTS, 10), np.int32), np.zeros(N_SLOTS, np.float32)
  donors = {}
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
    number = -1
    if constant:
      values[slot] = ablation.to.value
    else:
      number = donors.setdefault(ablation.to, len(donors))
    cells[slot] = [CODES[site], where, *np.ravel(ranges), number, 1]
  return Held(cells, values, tuple(donor_of(to) for to in donors))


def moved(held: Held, layer: int, index: int) -> Held:
  """Returns the ablations with the first, of one head or neuron, moved to another: for many of them in turn."""
  cells = held.cells.copy()
  cells[0, 1], cells[0, 6:8] = layer, _range(index)
  return dataclasses.replace(held, cells=cells)


def _range(index):
  return (0, EVERYTHING) if index is None else (index, index + 1)


def check(subject: Subject, ablation: schema.Ablation, sae_sites: Sequence[str]):
  """Raises unless there is such a component.

  Raises:
    ValueError: there is not; the message says how many there are.
  """
  config = subject.model.config
  if ablation.kind == 'latent':
    if ablation.site not in sae_sites:
      raise ValueError(f'no SAE is spliced in at {ablation.site!r}; there is one at {list(sae_sites) or "no site"}')
    n = subject.saes[ablation.site].n_latents
  else:
    n = {'head': config.n_head, 'neuron': config.n_neurons}.get(ablation.kind, 0)
    if ablation.kind != 'embedding' and (ablation.layer is None or ablation.layer >= config.n_layer):
      raise ValueError(f'layer {ablation.layer} is not there; there are {config.n_layer}, from 0')
  if ablation.index is not None and ablation.index >= n:
    raise ValueError(f'{ablation.kind} {ablation.index} is not there; there are {n}, from 0')


def _hold(x, tap, held, layer_or_sae):
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
    cell = held.cells[slot]
    inside = (cell[2] <= token) & (token < cell[3]) & (cell[4] <= source) & (source < cell[5])
    inside &= (cell[6] <= component) & (component < cell[7]) & (cell[9] == 1) & (cell[1] == layer_or_sae)
    freed = jnp.zeros((), bool)
    if name == 'attn.v_out':  # what a head read is held no more where its whole pattern is held later
      freed = inside & (cell[0] == CODES['attn.qk_probs']) & (cell[5] == EVERYTHING)
    inside &= cell[0] == CODES[name]
    inside &= (source <= token) if name == 'attn.qk_probs' else True  # what is attended to stays behind
    new = jnp.where(cell[8] < 0, held.values[slot], 0.0)
    for number, donor in enumerate(held.donors):
      if (site := tap.prefix[:-1]) in donor:
        new = jnp.where(cell[8] == number, tap.here(donor[site][None])[0].astype(jnp.float32), new)
    return (mask & ~freed) | inside, jnp.where(inside, new, value)

  n_used = held.cells[:, 9].sum()
  start = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)
  mask, value = jax.lax.fori_loop(0, n_used, write, start)
  return jnp.where(mask, value, x).astype(x.dtype)


def held_tokens(held: Held, name: str, layer: int, n_tokens: int) -> jax.Array:
  """Returns whether a site of a layer that holds whole tokens, 'resid.delta_attn' or 'resid.delta_mlp', is held."""
  tokens_t = jnp.arange(n_tokens)
  inside_st = (held.cells[:, 2, None] <= tokens_t) & (tokens_t < held.cells[:, 3, None])
  mine_s = (held.cells[:, 0] == CODES[name]) & (held.cells[:, 1] == layer) & (held.cells[:, 9] == 1)
  return (inside_st & mine_s[:, None]).any(0)


def edits(held: Held, n_layer: int, sae_sites: Sequence[str]) -> tuple[sites.Edit, ...]:
  """Returns the edits of a run; those at a site where an SAE is spliced in come before the splice."""
  found = [sites.Edit('resid.post_emb', _hold, (held, 0))]
  for layer in range(n_layer):
    found += layer_edits(held, layer, {}, f'h.{layer}.')
  found += [sites.Edit(f'{site}.latents', _hold, (held, number)) for number, site in enumerate(sae_sites)]
  return tuple(found)


def of_layer(held: Held, layer: int) -> Held:
  """Returns what is held in a layer, whose sites are called by their names within it."""
  prefix = f'h.{layer}.'
  own = lambda donor: {site.removeprefix(prefix): x for site, x in donor.items() if site.startswith(prefix)}
  return dataclasses.replace(held, donors=tuple(own(donor) for donor in held.donors))


def layer_edits(held: Held, layer, saes: Mapping[str, int], prefix: str = '') -> list[sites.Edit]:
  """Returns the edits of one layer, by names within it.

  Args:
    held: of `of_layer`.
    layer: its number; may be traced.
    saes: {name of a site within the layer: number of its SAE}.
    prefix: of all names, where the whole model runs.
  """
  names = [name for name in HOLDABLE if name not in ('latents', 'resid.post_emb')]
  found = [sites.Edit(f'{prefix}{name}', _hold, (held, layer)) for name in names]
  return found + [sites.Edit(f'{prefix}{name}.latents', _hold, (held, number)) for name, number in saes.items()]


# Edges


N_SHIFTS = 8  # readers whose inputs are changed in a run


@functools.partial(jax.tree_util.register_dataclass, data_fields=['layers', 'deltas'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Shifts:
  """What is added to queries, keys and values: to those of layers[i] deltas['q'][i] etc. [token, head, channel]."""

  layers: np.ndarray
  deltas: dict[str, jax.Array]


def _shift(x, tap, shifts, layer):
  mine_s = (shifts.layers == layer).astype(jnp.float32)
  delta_sthc = shifts.deltas[tap.prefix[:-1].split('.')[-1]]
  return (x + tap.here(jnp.einsum('s,sthc->thc', mine_s, delta_sthc)[None])).astype(x.dtype)


def shift_edits(shifts: Shifts | None, layer, prefix: str = '') -> list[sites.Edit]:
  """Returns the edits of a layer's queries, keys and values; none if nothing is shifted in the whole run."""
  return [] if shifts is None else [sites.Edit(f'{prefix}attn.{name}', _shift, (shifts, layer)) for name in 'qkv']
