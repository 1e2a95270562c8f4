"""A prompt and an objective -> the few edges between components that carry it, and how much of it they really carry.

The graph is of components at all tokens. Writers: the embedding, every head, every MLP. Readers: the queries of every
head, the keys and the values of every key-value head, every MLP, and the objective, through the final norm or where it
is read. An edge that is cut reads, in place of what its writer writes in this very run, a counterfactual write; the
reader's norm sees the change. What is no writer is always there: the output biases of attention, and what an ablation
of the request holds or an SAE's ablated latents change in the sum of an attention layer or in the stream.

Edges are scored by EAP-IG (`scores`), chosen to a budget (`choose`), and all that is said of the circuit is then
measured: runs with edges cut, by masks that are arrays, so that one compiled layer serves all of them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import engine, interventions, objectives, schema
from jax_interp.debugger.subject import Subject
from models import sites

Array = jax.Array

MAX_LOT = 8  # runs that are computed together
MAX_NUMBERS = 2**27  # of what is written and read by a lot of them, so that long prompts fit into memory
MAX_MEASURED = 300  # edges that are cut one by one
READ = ('resid.post_attn', 'resid.post_mlp', 'attn.q', 'attn.k', 'attn.v', 'attn.qk_probs', 'mlp.pre_act')
WRITTEN = ('attn.v_out', 'resid.delta_mlp')


# The graph


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """Which edges there can be.

  Attributes:
    writers, readers: their names, in the order of the run; the objective is the last reader.
    components: (readers, writers, which of these readers are part of which of these writers) of each attention layer
      and each MLP, in the order of the run; the first two are slices.
    sinks_r: which readers the objective is read from.
    possible_rw: edges on some path from the embedding to the objective.
  """

  writers: list[str]
  readers: list[str]
  components: list[tuple[slice, slice, np.ndarray]]
  sinks_r: np.ndarray
  possible_rw: np.ndarray


def graph_of(model, question: objectives.Question, sae_sites: tuple[str, ...] = ()) -> Graph:
  """Returns the graph of a model upstream of an objective, with SAEs spliced in at these sites."""
  n_layer, n_head, n_kv = model.config.n_layer, model.config.n_head, model.h[0].attn.n_kv_head
  writers, writes_to = ['embedding'], [0]
  readers, reads_from = [], []
  components = []
  one_each = [np.eye(n_head), *[np.repeat(np.eye(n_kv), n_head // n_kv, axis=1)] * 2]
  for i in range(n_layer):
    heads, mlp = len(writers), len(writers) + n_head
    attn_reads, mlp_read = len(readers), len(readers) + n_head + 2 * n_kv
    components.append((slice(attn_reads, mlp_read), slice(heads, mlp), np.concatenate(one_each) > 0))
    components.append((slice(mlp_read, mlp_read + 1), slice(mlp, mlp + 1), np.ones((1, 1), bool)))
    writers += [*(f'h.{i}.attn.{head}' for head in range(n_head)), f'h.{i}.mlp']
    writes_to += [2 * i + 1] * n_head + [2 * i + 2]
    readers += [f'h.{i}.attn.{j}.{name}' for name, n in (('q', n_head), ('k', n_kv), ('v', n_kv)) for j in range(n)]
    readers.append(f'h.{i}.mlp')
    reads_from += [2 * i] * (n_head + 2 * n_kv) + [2 * i + 1]
  in_stream = question.kind in (objectives.PROJECTION, objectives.LATENT)
  readers.append('objective' if in_stream else 'logits')
  reads_from.append(int(question.stream))
  causal_rw = np.array(writes_to) <= np.array(reads_from)[:, None]
  sinks = _sinks(question, n_head // n_kv, sae_sites)
  sinks_r = np.array([any(name == sink or name.startswith(f'{sink}.') for sink in sinks) for name in readers])
  graph = Graph(writers, readers, components, sinks_r, causal_rw)
  return dataclasses.replace(graph, possible_rw=on_paths(graph, causal_rw))


def _sinks(question, n_sharing, sae_sites) -> list[str]:
  """Returns names of readers, or what they begin with, that the objective is read from."""
  layer, head, (through_q, through_k) = int(question.layer), int(question.index), question.through
  match int(question.kind):
    case objectives.NEURON:
      return [f'h.{layer}.mlp']
    case objectives.ATTENTION | objectives.WRITE as kind:
      found = [f'h.{layer}.attn.{head}.q'] * bool(through_q)
      found += [f'h.{layer}.attn.{head // n_sharing}.k'] * bool(through_k)
      return found + [f'h.{layer}.attn.{head // n_sharing}.v'] * (kind == objectives.WRITE)
    case objectives.LATENT:
      of_layer, name = objectives.split_site(sae_sites[layer])
      if name in ('attn.v_out', 'resid.delta_attn'):
        return [f'h.{of_layer}.attn']
      return [f'h.{of_layer}.mlp'] if name in ('mlp.post_act', 'resid.delta_mlp') else ['objective']
    case objectives.PROJECTION:
      return ['objective']
  return ['logits']


def _reached(graph: Graph, edges_rw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns which writers these edges lead to from the embedding, and from which readers they lead to the objective."""
  from_embedding_w = np.arange(len(graph.writers)) == 0
  for readers, writers, part_of in graph.components:
    reads_r = (edges_rw[readers] & from_embedding_w).any(1)
    from_embedding_w[writers] = (part_of & reads_r[:, None]).any(0)
  to_objective_r = graph.sinks_r.copy()
  for readers, writers, part_of in reversed(graph.components):
    is_read_w = (edges_rw[:, writers] & to_objective_r[:, None]).any(0)
    to_objective_r[readers] |= (part_of & is_read_w).any(1)
  return from_embedding_w, to_objective_r


def on_paths(graph: Graph, edges_rw: np.ndarray) -> np.ndarray:
  """Returns those of the edges that lie on a path, of these edges, from the embedding to the objective."""
  from_embedding_w, to_objective_r = _reached(graph, edges_rw)
  return edges_rw & from_embedding_w & to_objective_r[:, None]


def choose(graph: Graph, scores_rw: np.ndarray, n_edges: int) -> np.ndarray:
  """Returns a circuit of at most n_edges edges, each on a path from the embedding to the objective, as a mask [r, w].

  It is the edges of the largest |score|, in order, until as many as the budget lie on paths of them; where the last of
  them joins more, the smallest are left out again, but for those without which too many others would be on no path.
  What is left of the budget after all goes to the largest between what these paths reach.
  """
  possible = np.flatnonzero(graph.possible_rw)
  order = possible[np.argsort(-np.abs(scores_rw.reshape(-1)[possible]), kind='stable')]

  def largest(n):
    edges_rw = np.zeros(graph.possible_rw.shape, bool)
    edges_rw.reshape(-1)[order[:n]] = True
    return on_paths(graph, edges_rw)

  def without(kept_rw, edge):
    edges_rw = kept_rw.copy()
    edges_rw.reshape(-1)[edge] = False
    return on_paths(graph, edges_rw)

  too_few, n = 0, len(order)  # more edges are on paths of more
  while n - too_few > 1:
    half = (n + too_few) // 2
    too_few, n = (half, n) if largest(half).sum() < n_edges else (too_few, half)
  kept_rw = largest(n)
  smallest = [edge for edge in order[n - 1 :: -1] if kept_rw.reshape(-1)[edge]]
  for fewest in (n_edges, 0):  # where none can be left out without leaving too few, too few are left
    for edge in smallest:
      if kept_rw.sum() > n_edges and kept_rw.reshape(-1)[edge] and without(kept_rw, edge).sum() >= fewest:
        kept_rw = without(kept_rw, edge)
  from_embedding_w, to_objective_r = _reached(graph, kept_rw)
  joins_rw = ~kept_rw & from_embedding_w & to_objective_r[:, None]
  kept_rw.reshape(-1)[order[joins_rw.reshape(-1)[order]][: n_edges - kept_rw.sum()]] = True
  return kept_rw


# Runs with edges cut


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """What all runs of a request share.

  Attributes:
    subject, prepared: the request.
    graph: of its objective.
    embedding: {'resid.post_emb': [token, d_model]} after the ablations, and the input of an SAE there.
    counterfactual_wtd: what cut edges carry.
    lot: runs that are computed together.
  """

  subject: Subject
  prepared: engine.Prepared
  graph: Graph
  embedding: dict[str, Array]
  counterfactual_wtd: Array
  lot: int


def setting(subject: Subject, prepared: engine.Prepared, counterfactual) -> Setting:
  """Returns the setting of a request whose cut edges carry a `schema.Held`.

  Raises:
    ValueError: the counterfactual is a number but 0, or there is no such run.
  """
  model, question, n_tokens = subject.model, prepared.question, prepared.tokens_bt.shape[1]
  graph = graph_of(model, question, tuple(prepared.saes))
  if isinstance(counterfactual, schema.Value):
    if counterfactual.value:
      raise ValueError(f'what a cut edge carries is a vector, not {counterfactual.value}; give 0, or another run')
    counterfactual_wtd = jnp.zeros((len(graph.writers), n_tokens, model.config.d_model))
  else:
    other = engine.other_acts(subject, prepared.saes, counterfactual, prepared.n_tokens)
    counterfactual_wtd = _writes(model, other, n_tokens)
  n_reads = graph.components[1][0].stop  # of a layer
  numbers = (len(graph.writers) + 2 * n_reads) * n_tokens * model.config.d_model
  lot = max(1, min(MAX_LOT, MAX_NUMBERS // numbers))
  embedding = _embedding(model, prepared.saes, prepared.tokens_bt, prepared.held)
  return Setting(subject, prepared, graph, embedding, counterfactual_wtd, lot)


@functools.partial(jax.jit, static_argnames='n_tokens')
def _writes(model, other, n_tokens) -> Array:
  """Returns what every writer writes in another run, or in the mean, [writer, token, d_model]."""
  found = [other['resid.post_emb']]
  for i, block in enumerate(model.h):
    found += [_head_writes(block, other[f'h.{i}.attn.v_out'])[0], other[f'h.{i}.resid.delta_mlp']]
  return jnp.concatenate([jnp.broadcast_to(x, (len(x), n_tokens, x.shape[-1])).astype(jnp.float32) for x in found])


def _head_writes(block, v_out_bthc):
  kernel_hcd = block.attn.c_proj.kernel[...]
  return jnp.einsum('bthc,hcd->bhtd', v_out_bthc, kernel_hcd, preferred_element_type=jnp.float32)


@jax.jit
def _embedding(model, saes, tokens_bt, held):
  edits = [*interventions.edits(held, model.config.n_layer, tuple(saes))]
  edits += [sites.splice(site, sae, hold_error=False) for site, sae in saes.items()]
  capture = ['resid.post_emb'] + ['resid.post_emb.input'] * ('resid.post_emb' in saes)
  return {site: x[0] for site, x in sites.forward(model, tokens_bt, edits, capture=tuple(capture))[1].items()}


@jax.jit
def _start(embedding, counterfactual_wtd, token, share_b):
  """Returns the stream [run, token, d] of embeddings that are a share the prompt's and the rest the counterfactual.

  And the differences [run, writer, token, d] between writes and counterfactuals, of the embedding alone; and what the
  objective may read of the embedding.
  """
  away_btd = (1 - share_b)[:, None, None] * (embedding['resid.post_emb'] - counterfactual_wtd[0])
  x_btd = (embedding['resid.post_emb'] - away_btd).astype(embedding['resid.post_emb'].dtype)
  shape = len(share_b), *counterfactual_wtd.shape
  diffs_bwtd = jnp.zeros(shape, jnp.float32).at[:, 0].set(x_btd - counterfactual_wtd[0])
  return x_btd, diffs_bwtd, {site: x[token] - away_btd[:, token] for site, x in embedding.items()}


def _cut(cut_brw, diffs_bwtd):
  """Returns what is taken from each reader [run, reader, token, d_model]; one run's may stand for all."""
  b, w, *shape = diffs_bwtd.shape
  cut_brx = jnp.matmul(cut_brw, diffs_bwtd.reshape(b, w, -1))
  return cut_brx.reshape(*cut_brx.shape[:2], *shape)


def _read_by_heads(block, number, streams_brtd):
  """Returns queries (number 0), keys (1) or values (2) [run, token, head, channel], each head's of its own stream.

  The attention is cut into modules of one head each: all parameters that queries, keys and values are made of end in
  [head, channel]; those of another number of heads are not used.
  """
  leaves, structure = jax.tree.flatten(block.attn)
  is_mine = [x.ndim > 1 and x.shape[-2] == streams_brtd.shape[1] for x in leaves]
  of_heads = [jnp.moveaxis(x[..., None, :], -3, 0) if mine else x for x, mine in zip(leaves, is_mine, strict=True)]
  positions_bt = jnp.arange(streams_brtd.shape[2])[None]

  def read(leaves, x_btd):
    attn = jax.tree.unflatten(structure, leaves)
    return attn.qkv(block.attn_ln(x_btd, sites.Tap()), positions_bt)[number][:, :, 0]

  return jax.vmap(read, in_axes=([0 if mine else None for mine in is_mine], 1), out_axes=2)(of_heads, streams_brtd)


def _layer(
  block, saes, x_btd, diffs_bwtd, counterfactual_wtd, cut_brw, held, shifts, question, layer, n_head, numbers, live
):
  """Returns the stream [run, token, d] behind a layer, the differences, and what the objective may be read from.

  Args:
    block: the layer.
    saes: {name within the layer: SAE}.
    x_btd: the stream before it.
    diffs_bwtd: differences between writes and counterfactuals, of the writers before.
    counterfactual_wtd: of the layer's writers.
    cut_brw: the layer's rows, and the objective's; 1 where an edge is cut.
    held, shifts: of the request.
    question: the objective.
    layer: its number.
    n_head: of the model.
    numbers: of the SAEs, among all.
    live: whether the differences are those of this run, to which the layer adds its own; else they are given.
  """
  own, n_kv = dict(zip(saes, numbers, strict=True)), block.attn.n_kv_head
  *cut_heads, cut_mlp, cut_objective = jnp.split(cut_brw, np.cumsum([n_head, n_kv, n_kv, 1]), axis=1)
  first = 1 + layer * (n_head + 1)
  is_held_t = interventions.held_tokens(held, 'resid.delta_attn', layer, x_btd.shape[1])

  def by_heads(acts):
    diffs_bhtd = _head_writes(block, acts['attn.v_out']) - counterfactual_wtd[:n_head]
    return jnp.where(is_held_t[:, None], 0, diffs_bhtd)  # their sum is held: heads write nothing

  def cut(cut_brw, diffs_bwtd, own_bwtd):  # of the writers before, and of the layer's own
    cut_brtd = _cut(cut_brw, diffs_bwtd)
    if live:
      cut_brtd += _cut(jax.lax.dynamic_slice_in_dim(cut_brw, first, own_bwtd.shape[1], 2), own_bwtd)
    return cut_brtd

  def read_by_head(x, tap, number):
    streams_brtd = x_btd[:, None] - _cut(cut_heads[number], diffs_bwtd)
    return _read_by_heads(block, number, streams_brtd.astype(x.dtype))

  def read_by_mlp(x, tap, linear):
    stream_btd = tap.acts['resid.post_attn'] - cut(cut_mlp, diffs_bwtd, by_heads(tap.acts))[:, 0]
    return linear('btd,dn->btn', block.mlp_ln(stream_btd.astype(x.dtype), sites.Tap()))

  edits = []
  for number, name in enumerate('qkv'):
    edits.append(sites.Edit(f'attn.{name}', functools.partial(read_by_head, number=number)))
  linears = {'pre_act': block.mlp.c_fc, 'up': getattr(block.mlp, 'c_up', None)}
  edits += [sites.Edit(f'mlp.{name}', functools.partial(read_by_mlp, linear=x)) for name, x in linears.items()]
  edits += [*interventions.layer_edits(held, layer, own), *interventions.shift_edits(shifts, layer)]
  edits += [sites.splice(name, sae, hold_error=False) for name, sae in saes.items()]
  tap = sites.Tap(edits, capture=(*READ, *WRITTEN, *(f'{name}.input' for name in saes)))
  out_btd = block(x_btd, tap)
  picked = jax.vmap(lambda acts: objectives.picks(question, n_head, acts))(tap.acts)
  heads_bwtd = by_heads(tap.acts)
  mlp_bwtd = (tap.acts['resid.delta_mlp'] - counterfactual_wtd[n_head])[:, None]
  own_bwtd = jnp.concatenate([heads_bwtd, mlp_bwtd], axis=1)
  at_token = lambda x: jax.lax.dynamic_slice_in_dim(x, question.token, 1, 2)
  for part, written in (('post_attn', heads_bwtd), ('post_mlp', own_bwtd)):
    cut_bd = cut(cut_objective, at_token(diffs_bwtd), at_token(written))[:, 0, 0]
    picked |= {name: x - cut_bd for name, x in picked.items() if name.startswith(f'resid.{part}')}
  if live:
    diffs_bwtd = jax.lax.dynamic_update_slice_in_dim(diffs_bwtd, own_bwtd, first, axis=1)
  return out_btd, diffs_bwtd, picked


@functools.partial(jax.jit, static_argnames=('n_head', 'numbers'), donate_argnames='diffs_bwtd')
def _forward_layer(block, saes, x_btd, diffs_bwtd, *args, n_head, numbers):
  return _layer(block, saes, x_btd, diffs_bwtd, *args, n_head=n_head, numbers=numbers, live=True)


@functools.partial(jax.jit, static_argnames=('n_head', 'numbers'))
def _backward_layer(block, saes, x_btd, diffs_bwtd, counterfactual_wtd, cut_brw, *args, n_head, numbers, grads):
  """Returns the gradients at the stream before a layer and at the cuts, from those of what `_layer` returns."""

  def forward(x_btd, cut_brw):
    found = _layer(
      block, saes, x_btd, diffs_bwtd, counterfactual_wtd, cut_brw, *args, n_head=n_head, numbers=numbers, live=False
    )
    return found[0], found[2]

  return jax.vjp(forward, x_btd, cut_brw)[1](grads)


def _objectives(model, saes, question, x_btd, embedding, picked, diffs_bwtd, cut_b1w, reference):
  """Returns the objective of each run [run]; what a trace does not pass through is held at the first reference."""
  positions_k = question.positions_k
  read_bkd = x_btd[:, positions_k] - _cut(cut_b1w, diffs_bwtd[:, :, positions_k])[:, 0]
  embedding = {site: x - cut_b1w[:, 0, :1] * diffs_bwtd[:, 0, question.token] for site, x in embedding.items()}
  live = {'attn.q': question.through[0], 'attn.k': question.through[1], 'attn.qk_probs': question.through.any()}
  layers = [
    own | {name: jnp.where(is_live, own[name], first[name][:1]) for name, is_live in live.items()}
    for own, first in zip(picked, reference, strict=True)
  ]
  finish = lambda *rows: objectives.finish(question, model, saes, *rows)
  return jax.vmap(finish)(model.ln_f(read_bkd.astype(x_btd.dtype), sites.Tap()), embedding, layers)


_forward_objectives = jax.jit(_objectives)


@jax.jit
def _backward_objectives(model, saes, question, x_btd, embedding, picked, diffs_bwtd, cut_b1w, reference, weights_b):
  """Returns the gradients of the weighted sum of the objectives at the streams, at what is picked, and at the cuts."""

  def forward(x_btd, picked, cut_b1w):
    return weights_b @ _objectives(model, saes, question, x_btd, embedding, picked, diffs_bwtd, cut_b1w, reference)

  return jax.grad(forward, argnums=(0, 1, 2))(x_btd, picked, cut_b1w)


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
  """A lot of runs.

  Attributes:
    objective_b: of each.
    streams: before each layer, and behind the last, [run, token, d_model].
    embedding, picked: what the objective may be read from, of the embedding and of each layer.
    diffs_bwtd: what each writer wrote minus the counterfactual.
  """

  objective_b: Array
  streams: list[Array]
  embedding: dict[str, Array]
  picked: list[dict[str, Array]]
  diffs_bwtd: Array


def _layers(s: Setting, cut_brw):
  """Yields the arguments of each layer that all runs share: before the stream, and those behind the differences."""
  model, p, n_head = s.subject.model, s.prepared, s.subject.model.config.n_head
  numbers = {site: number for number, site in enumerate(p.saes)}
  question = dataclasses.replace(p.question, n_read=0)  # layers are compiled for all objectives
  for i, block in enumerate(model.h):
    own = {name: site for site in p.saes for layer, name in [objectives.split_site(site)] if layer == i}
    rows = slice(s.graph.components[2 * i][0].start, s.graph.components[2 * i + 1][0].stop)
    writers = slice(s.graph.components[2 * i][1].start, s.graph.components[2 * i + 1][1].stop)
    cut_layer = np.concatenate([cut_brw[:, rows], cut_brw[:, -1:]], axis=1)
    rest = s.counterfactual_wtd[writers], cut_layer, p.held, p.shifts, question
    statics = {'n_head': n_head, 'numbers': tuple(numbers[site] for site in own.values())}
    yield (block, {name: p.saes[site] for name, site in own.items()}), (*rest, np.int32(i)), statics


def run(s: Setting, cut_brw: np.ndarray, share_b: np.ndarray, reference: Runs | None = None) -> Runs:
  """Returns runs with edges cut.

  Args:
    s: what they share.
    cut_brw: float32, 1 where an edge is cut; between, what is read is in proportion.
    share_b: float32, how much of the embedding is the prompt's, and the rest the counterfactual.
    reference: whose first run is uncut; None: these.
  """
  x_btd, diffs_bwtd, embedding = _start(s.embedding, s.counterfactual_wtd, s.prepared.question.token, share_b)
  streams, picked = [x_btd], []
  for before, behind, statics in _layers(s, cut_brw):
    x_btd, diffs_bwtd, found = _forward_layer(*before, x_btd, diffs_bwtd, *behind, **statics)
    streams.append(x_btd)
    picked.append(found)
  uncut = picked if reference is None else reference.picked
  of = s.subject.model, s.prepared.saes, s.prepared.question
  objective_b = _forward_objectives(*of, x_btd, embedding, picked, diffs_bwtd, cut_brw[:, -1:], uncut)
  return Runs(objective_b, streams, embedding, picked, diffs_bwtd)


def measure(
  s: Setting, cuts: Iterable[np.ndarray], reference: Runs, told: Callable[[int], None] = lambda n: None
) -> np.ndarray:
  """Returns the objectives of runs with the edges cut_rw of each cut, computed in lots.

  Args:
    s: what they share.
    cuts: booleans or floats [reader, writer], one a run; taken as they are needed.
    reference: whose first run is uncut.
    told: told how many are done; may raise.
  """
  cuts, found = iter(cuts), []
  while mine := list(itertools.islice(cuts, s.lot)):
    cut_brw = np.zeros((s.lot, *s.graph.possible_rw.shape), np.float32)
    cut_brw[: len(mine)] = mine
    objective_b = run(s, cut_brw, np.ones(s.lot, np.float32), reference).objective_b
    found += jax.device_get(objective_b)[: len(mine)].tolist()
    told(len(found))
  return np.array(found)


def scores(s: Setting, reference: Runs, steps: int, progress: engine.Progress = engine.silent) -> np.ndarray:
  """Returns the estimated effect of every edge [reader, writer], positive where it pushes the objective up.

  Edge attribution patching with integrated gradients (EAP-IG; Hanna et al. 2024, with the sign turned): the
  clean write minus the counterfactual one, times the gradient of the objective at the reader's input, through its norm,
  summed over tokens; the gradient is averaged over runs whose input embeddings are (counterfactual + k / steps (clean -
  counterfactual)), k = 1 ... steps. With one step it is the derivative of the objective by the edge itself (edge
  attribution patching, Syed et al. 2023). Where the counterfactual is zero, the path begins at zero embeddings.

  Args:
    s: the setting.
    reference: whose first run is uncut.
    steps: points.
    progress: told the share that is done.
  """
  model, p = s.subject.model, s.prepared
  diffs_bwtd = reference.diffs_bwtd[:1]
  zeros = np.zeros((s.lot, *s.graph.possible_rw.shape), np.float32)
  points = np.arange(1, steps + 1, dtype=np.float32) / steps
  slopes_rw = np.zeros(s.graph.possible_rw.shape)
  for begin in range(0, steps, s.lot):
    mine = points[begin : begin + s.lot]
    share_b = np.pad(mine, (0, s.lot - len(mine)), constant_values=1)
    weights_b = np.pad(np.full(len(mine), 1 / steps, np.float32), (0, s.lot - len(mine)))
    found = run(s, zeros, share_b, reference)
    grad_btd, grads, slope_11w = _backward_objectives(
      *(model, p.saes, p.question, found.streams[-1], found.embedding, found.picked),
      *(diffs_bwtd, zeros[:1, -1:], reference.picked, weights_b),
    )
    slopes_rw[-1:] += jax.device_get(slope_11w)[0]
    layers = list(_layers(s, zeros[:1]))
    for i in reversed(range(len(layers))):
      before, behind, statics = layers[i]
      grad_btd, slope_1rw = _backward_layer(
        *before, found.streams[i], diffs_bwtd, *behind, **statics, grads=(grad_btd, grads[i])
      )
      *rows, last = jax.device_get(slope_1rw)[0]
      slopes_rw[s.graph.components[2 * i][0].start :][: len(rows)] += rows
      slopes_rw[-1] += last
    progress(min(1.0, (begin + s.lot) / steps), 'scoring edges')
  return np.where(s.graph.possible_rw, -slopes_rw, 0)


def _check_finite(numbers):
  if not np.isfinite(numbers).all():
    raise ValueError('the numbers of these runs are not finite; hold activations at smaller values')


def find(
  subject: Subject, request: schema.CircuitRequest, progress: engine.Progress = engine.silent
) -> schema.CircuitResponse:
  """Returns a circuit of at most n_edges edges and what real ablation says of it, the largest |score| first.

  The ablations of the request are there in all runs. Of a circuit of many edges the first 300 are cut in turn.

  Raises:
    ValueError: as `engine.prepare`; the counterfactual is a number but 0, there is no such run, or its numbers are
      not finite.
  """
  prepared = engine.prepare(subject, request.request)
  s = setting(subject, prepared, request.counterfactual)
  possible_rw = s.graph.possible_rw
  cut_brw = np.zeros((s.lot, *possible_rw.shape), np.float32)
  reference = run(s, cut_brw, np.ones(s.lot, np.float32))
  full = float(reference.objective_b[0])
  _check_finite(full)
  progress(0.1, 'scoring edges')
  scores_rw = scores(s, reference, request.steps, lambda share, what: progress(0.1 + 0.3 * share, what))
  _check_finite(scores_rw)
  kept_rw = choose(s.graph, scores_rw, request.n_edges)
  edges = np.argwhere(kept_rw)
  edges = edges[np.argsort(-np.abs(scores_rw[kept_rw]), kind='stable')]
  outside_rw = possible_rw & ~kept_rw
  in_turn = edges[: MAX_MEASURED if request.minimality else 0]

  def cuts():
    yield from (possible_rw, outside_rw, kept_rw)
    for edge in in_turn:
      cut_rw = outside_rw.copy()
      cut_rw[*edge] = True
      yield cut_rw

  n_cuts = 3 + len(in_turn)
  told = lambda n: progress(0.4 + 0.6 * n / n_cuts, f'cut {n} of {n_cuts}')
  measured = measure(s, cuts(), reference, told)
  _check_finite(measured)
  empty, circuit, complement, *without = measured.tolist()
  span = full - empty
  lost = [circuit - x for x in without]
  return schema.CircuitResponse(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    edges=[
      schema.Edge(
        writer=s.graph.writers[w],
        reader=s.graph.readers[r],
        score=float(scores_rw[r, w]),
        measured=lost[i] if i < len(lost) else None,
      )
      for i, (r, w) in enumerate(edges)
    ],
    n_possible=int(possible_rw.sum()),
    full=full,
    empty=empty,
    circuit=circuit,
    complement=complement,
    faithfulness=(circuit - empty) / span if span else None,
    completeness=(full - complement) / span if span else None,
    minimality=min(abs(x) for x in lost) / abs(span) if span and lost else None,
  )
