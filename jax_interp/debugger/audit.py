"""The estimates against the truth: nodes really ablated, many in one batch.

A node changes nothing before its own layer, so that the batch grows as the layers pass: layer i computes the prompt as
it is and the nodes of layers up to i. Nor does it change earlier tokens: nodes of late tokens share a batch that reads
only the last tokens of the prompt, behind the keys and values of the others; nodes are shared out among batches so that
little is computed. One compiled block serves all layers.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, engine, interventions, objectives, schema
from jax_interp.debugger.subject import Subject
from models import sites

SIZES = (4, 8, 12, 16, 24, 32, 48, 64)  # of batches, so that few are compiled
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the tokens that a batch may read, so that few are compiled
LAYER_TOKENS = 40  # a layer of a batch takes as long as so many tokens more than it has, on a CPU
MAX_PAIRS = SIZES[-1] * 256**2  # token pairs in memory together
LISTED = ('embedding', 'head', 'neuron', 'latent')  # kinds of the nodes of the largest estimates
ABLATABLE = (*LISTED, 'head_token', 'layer')
EMBEDDING, HEAD, NEURON, HEAD_TOKEN, ATTN, MLP, LATENT = range(7)  # codes; that of its SAE is added to a latent's
CODES = {'attn.qk_probs': HEAD, 'attn.v_out': HEAD_TOKEN, 'resid.delta_attn': ATTN}  # of what is held at a site
CODES |= {'mlp.post_act': NEURON, 'resid.delta_mlp': MLP}
READ = ('resid.post_attn', 'resid.post_mlp', 'attn.q', 'attn.k', 'attn.v', 'attn.qk_probs', 'mlp.pre_act')


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['code', 'layer', 'token', 'source', 'index'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row of a batch holds, int32 [row]; code -1: nothing. The layer of an embedding is -1."""

  code: np.ndarray
  layer: np.ndarray
  token: np.ndarray
  source: np.ndarray
  index: np.ndarray


def rows_of(nodes: Sequence[schema.Node], sae_sites: Sequence[str]) -> Rows:
  """Returns nodes, of kinds in ABLATABLE, as rows."""
  found = []
  for node in nodes:
    layer = node.layer
    match node.kind:
      case 'latent':
        code, layer = LATENT + sae_sites.index(node.site), objectives.split_site(node.site)[0]
      case 'layer':
        code = {'attn': ATTN, 'mlp': MLP}[node.site]
      case _:
        code = {'embedding': EMBEDDING, 'head': HEAD, 'neuron': NEURON, 'head_token': HEAD_TOKEN}[node.kind]
    found.append((code, -1 if layer is None else layer, node.token, node.source or 0, node.index or 0))
  return Rows(*np.array(found, np.int32).reshape(-1, 5).T)


def _hold_rows(x, tap, rows, values_b, layer, code):
  """Sets one cell of each row that holds one here; where a cell is a vector, multiplies it."""
  places = {HEAD: (rows.index, rows.token, rows.source), ATTN: (rows.token,), MLP: (rows.token,)}
  cells, mine_b = places.get(code, (rows.token, rows.index)), (rows.code == code) & (rows.layer == layer)
  cells = [jnp.where(mine_b, cell, x.shape[axis + 1]) for axis, cell in enumerate(cells)]  # else outside of the array
  at, values_b = x.at[jnp.arange(len(x)), *cells], values_b.astype(x.dtype)
  if x.ndim > 1 + len(cells):
    return at.multiply(values_b[:, None], mode='drop', unique_indices=True)
  return at.set(values_b, mode='drop')


def _edits(saes, own, held, rows, values_b, layer, codes=()):
  """Returns the edits of a layer: the request's ablations, what rows hold, and SAEs, {name: number} in `own`."""
  found = interventions.layer_edits(held, layer, own)
  codes = dict(codes) | {f'{name}.latents': LATENT + number for name, number in own.items()}
  for name, code in codes.items():
    found.append(sites.Edit(name, functools.partial(_hold_rows, code=code), (rows, values_b, layer)))
  return found + [sites.splice(name, sae, hold_error=False) for name, sae in saes.items()]


@functools.partial(jax.jit, static_argnames=('n_head', 'numbers'))
def _block(block, saes, x, past, start, held, shifts, question, rows, values_b, layer, n_head, numbers):
  """Returns the stream [row, token, d] behind a layer, and what the objective may be read from there.

  Args:
    block: the layer.
    saes: {name within the layer: SAE}.
    x: the stream before it and its derivative by the held values; None: the results have none either.
    past: keys and values of the whole prompt, [slot, g, channel]; those from `start` on are computed anew.
    start: the first token of the stream; tokens of `question` and `rows` are counted from it, sources from 0.
    held, shifts: of the request.
    question: the objective.
    rows: what is held.
    values_b: at which value.
    layer: its number.
    n_head: of the model.
    numbers: of the SAEs, among all.
  """
  own = dict(zip(saes, numbers, strict=True))

  def forward(x_btd, values_b):
    edits = _edits(saes, own, held, rows, values_b, layer, CODES)
    n_rows, (n_slots, *_) = len(x_btd), past['attn.k'].shape
    known = {name: jnp.broadcast_to(x_sgc, (n_rows, *x_sgc.shape)) for name, x_sgc in past.items()}
    tap = sites.Tap(
      [*interventions.shift_edits(shifts, layer), *edits],
      capture=(*READ, *(f'{name}.input' for name in saes)),
      past=sites.Past(known, jnp.full(n_rows, start), n_slots),
    )
    out_btd = block(x_btd, tap)
    acts = tap.acts | tap.keys_and_values
    return out_btd, jax.vmap(lambda acts: objectives.picks(question, n_head, acts))(acts)

  x_btd, slope_btd = x
  if slope_btd is None:
    out_btd, picked = forward(x_btd, values_b)
    return (out_btd, None), (picked, None)
  (out_btd, picked), slopes = jax.jvp(forward, (x_btd, values_b), (slope_btd, jnp.ones_like(values_b)))
  return (out_btd, slopes[0]), (picked, slopes[1])


@functools.partial(jax.jit, static_argnames=('n_tokens', 'numbers'))
def _embeddings(x_sd, saes, start, held, question, rows, values_b, n_tokens, numbers):
  """Returns the embedding of each row [row, token, d], and what the objective may read of it, and both derivatives.

  Args:
    x_sd: the embedding of the whole prompt, before the SAE there.
    saes, numbers: of the embedding: one or none, as for `_block`.
    start, held, question, rows, values_b: as for `_block`.
    n_tokens: of the stream, from `start` on.
  """
  own = dict(zip(saes, numbers, strict=True))
  x_td = jax.lax.dynamic_slice_in_dim(x_sd, start, n_tokens)

  def forward(values_b):
    mine_bt = (rows.code == EMBEDDING)[:, None] & (rows.token[:, None] == jnp.arange(len(x_td)))
    x_btd = jnp.where(mine_bt, values_b[:, None], 1)[..., None] * x_td
    tap = sites.Tap(
      _edits(saes, own, held, rows, values_b, -1),
      capture=('resid.post_emb', 'resid.post_emb.input'),
      past=sites.Past({}, jnp.full(len(values_b), start), len(x_sd)),
    )
    x_btd = tap('resid.post_emb', x_btd, 'batch token d_model')
    return x_btd, {name: x[:, question.token] for name, x in tap.acts.items()}

  return jax.jvp(forward, (values_b,), (jnp.ones_like(values_b),))


@jax.jit
def _objectives(model, saes, question, values, slopes):
  """Returns the objective [row] and its derivative by the held values, None without slopes."""

  def forward(x_btd, embedding, layers):
    z_bkd = model.ln_f(x_btd[:, question.positions_k], sites.Tap())
    return jax.vmap(lambda *rows: objectives.finish(question, model, saes, *rows))(z_bkd, embedding, layers)

  return (forward(*values), None) if slopes is None else jax.jvp(forward, values, slopes)


@functools.partial(jax.jit, static_argnames='n')
def _widened(tree, n):
  """Returns arrays of n rows: those that are not there yet are as the first."""
  return jax.tree.map(lambda x: x[np.where(np.arange(n) < len(x), np.arange(n), 0)], tree)


def _size(n: int) -> int:
  return next((size for size in SIZES if size >= n), n)


def held_objectives(
  subject: Subject,
  prepared: engine.Prepared,
  run: effects.Run,
  rows: Rows,
  values_b: np.ndarray,
  n_tokens: int,
  with_slope: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the objective with each row's node held at its value, [row], and its derivative by the value.

  The scales of all norms are live. The value of an embedding, of a head at a token and of a layer is a multiple of it.

  Args:
    subject: of the request.
    prepared: the request.
    run: of it; its embedding, and keys and values of earlier tokens, are read.
    rows: what is held, in the order of their layers; the first holds nothing.
    values_b: at what.
    n_tokens: how many of the last tokens of the prompt are computed: all that are held, or that the objective reads.
    with_slope: whether the derivative is wanted; else it is None.
  """
  model, question, saes, held = subject.model, prepared.question, prepared.saes, prepared.held
  start = np.int32(max(0, prepared.n_tokens - n_tokens))
  question = dataclasses.replace(
    question, token=question.token - start, positions_k=np.maximum(question.positions_k - start, 0)
  )
  rows = dataclasses.replace(rows, token=np.maximum(rows.token - start, 0))
  layers, n = rows.layer.tolist(), _size(len(rows.layer))
  padded = lambda x, value=0: np.concatenate([x, np.full(n - len(x), value, x.dtype)])
  values_b = padded(values_b.astype(np.float32))
  rows = Rows(padded(rows.code, -1), *map(padded, (rows.layer, rows.token, rows.source, rows.index)))
  first = lambda size: jax.tree.map(lambda x: x[:size], rows)
  size = _size(bisect.bisect(layers, -1))
  of_layer = lambda i: {name: site for site in saes for layer, name in [objectives.split_site(site)] if layer == i}
  numbers = lambda own: tuple(list(saes).index(site) for site in own.values())
  own = of_layer(None)
  (x, embedding), slopes = _embeddings(
    run.acts['resid.post_emb.input' if own else 'resid.post_emb'][0],
    {name: saes[name] for name in own},
    start,
    held,
    question,
    first(size),
    values_b[:size],
    n_tokens,
    numbers(own),
  )
  x, embedding = (x, slopes[0] if with_slope else None), (embedding, slopes[1])
  found, anything = [], dataclasses.replace(question, n_read=0)  # layers are compiled once for all objectives
  for i, block in enumerate(model.h):
    size = max(size, _size(bisect.bisect(layers, i)))
    own = of_layer(i)
    x, picked = _block(
      block,
      {name: saes[site] for name, site in own.items()},
      _widened(x, size),
      {name: run.acts[f'h.{i}.{name}'][0] for name in ('attn.k', 'attn.v')},
      start,
      held,
      prepared.shifts,
      anything,
      first(size),
      values_b[:size],
      np.int32(i),
      model.config.n_head,
      numbers(own),
    )
    found.append(picked)
  values = _widened((x[0], embedding[0], [layer[0] for layer in found]), n)
  slopes = _widened((x[1], embedding[1], [layer[1] for layer in found]), n) if with_slope else None
  return jax.device_get(_objectives(model, saes, question, values, slopes))


def _cheapest(widths: Sequence[int], needed_n: np.ndarray, layer_n: np.ndarray, n_layer: int) -> tuple[int, ...]:
  """Returns which widths batches should have: the last, and those before it that save more than they cost.

  It is an estimate, which leaves out that large batches are cut into lots.

  Args:
    widths: to choose from, in tokens, rising; the last holds all.
    needed_n: how many of the last tokens each node needs.
    layer_n: its layer.
    n_layer: of the model.
  """

  def cost(chosen):
    total, group_n = 0, np.searchsorted(chosen, needed_n)
    for group, width in enumerate(chosen):
      layers = np.sort(layer_n[group_n == group])
      if len(layers):
        n_rows = 1 + np.searchsorted(layers, np.arange(n_layer), 'right')
        total += sum(width * _size(n) + LAYER_TOKENS for n in n_rows.tolist())
    return total

  *some, last = widths
  subsets = itertools.chain.from_iterable(itertools.combinations(some, n) for n in range(len(some) + 1))
  return min(((*subset, last) for subset in subsets), key=cost)


def measure(
  subject: Subject,
  prepared: engine.Prepared,
  run: effects.Run,
  nodes: Sequence[schema.Node],
  values_n: np.ndarray,
  with_slope: bool = False,
  progress: engine.Progress = engine.silent,
) -> tuple[float, np.ndarray, np.ndarray | None]:
  """Returns the objective, the objectives [node] with each node held at a value, and their derivatives by it.

  Args:
    subject: of the request.
    prepared: the request.
    run: of it.
    nodes: of kinds in ABLATABLE, counted from 0.
    values_n: what each is held at; of an embedding, a head at a token and a layer, a multiple of it.
    with_slope: whether the derivatives are wanted.
    progress: told the share of nodes that are done.
  """
  rows, n_slots = rows_of(nodes, tuple(prepared.saes)), prepared.tokens_bt.shape[1]
  read = min(int(prepared.question.token), int(prepared.question.positions_k.min()))
  needed_n = prepared.n_tokens - np.minimum(rows.token, read)  # the last tokens, that must be computed
  widths = [int(np.ceil(share * n_slots)) for share in SHARES]
  widths = _cheapest(widths, needed_n, rows.layer, subject.model.config.n_layer)
  group_n = np.searchsorted(widths, needed_n)  # the least width that holds them
  objective, found_n, slopes_n, n_done = np.nan, np.zeros(len(nodes)), np.zeros(len(nodes)), 0
  nothing = Rows(*np.array([[-1], [-1], [0], [0], [0]], np.int32))
  for group, width in enumerate(widths):
    order = np.flatnonzero(group_n == group)
    order = order[np.argsort(rows.layer[order], kind='stable')]
    lot = min(SIZES[-1], max(2, MAX_PAIRS // (width * n_slots))) - 1
    for begin in range(0, len(order), lot):
      mine = order[begin : begin + lot]
      lot_rows = jax.tree.map(lambda a, b, mine=mine: np.concatenate([a, b[mine]]), nothing, rows)
      values_b = np.concatenate([[0], values_n[mine]])
      found, slopes = held_objectives(subject, prepared, run, lot_rows, values_b, width, with_slope)
      objective, found_n[mine] = float(found[0]), found[1 : len(mine) + 1]
      if with_slope:
        slopes_n[mine] = slopes[1 : len(mine) + 1]
      n_done += len(mine)
      progress(n_done / len(nodes), f'ablated {n_done} of {len(nodes)}')
  return objective, found_n, slopes_n if with_slope else None


def audit(
  subject: Subject, request: schema.AuditRequest, progress: engine.Progress = engine.silent
) -> schema.AuditResponse:
  """Returns the estimated, the measured and the integrated effects of the nodes that seem to matter most.

  The effect of a node is the objective minus the objective with its activation held at zero (of a head, at one token
  pair), or, of an embedding, a head at a token and a layer, without it. Integrated: activation times the derivative of
  the objective by it, averaged from zero to the activation by Gauss-Legendre quadrature (integrated gradients, eq. 1 of
  Sundararajan et al. 2017, along one node); with more steps it comes to the measured effect, and where few do not, the
  objective bends. Not so where the objective holds what an ablation moves: in traces through q, k or v alone, and of
  latents the scale of the SAE's input.

  Raises:
    ValueError: as `engine.debug`.
  """
  if wrong := [node for node in request.request.nodes if node.kind not in ABLATABLE]:
    raise ValueError(f'{wrong[0].label} cannot be audited; {", ".join(ABLATABLE)} can')
  k = min(100, max(request.n, request.request.k))
  analysis = engine.analyse(subject, request.request.model_copy(update={'k': k}))
  prepared, run = analysis.prepared, analysis.run
  asked = {engine.checked(subject, prepared, node) for node in request.request.nodes}
  nodes = [node for node in analysis.nodes if node in asked or node.kind in LISTED]
  described = engine.describe(subject, analysis, nodes)
  order = np.argsort(-np.abs(described.total_effect), kind='stable')
  order = [i for i in order if i < len(asked)] + [i for i in order if i >= len(asked)]
  order = np.array(order[: max(request.n, len(asked))], int)
  nodes, estimated_n = [nodes[i] for i in order], described.total_effect[order]
  is_multiple = np.array([node.kind in ('head_token', 'layer') for node in nodes], bool)
  acts_n = np.where(is_multiple, 1.0, described.activation[order])
  n_lots = 1 + request.steps
  told = lambda lot: lambda share, what: progress((lot + share) / n_lots, what)
  objective, zeroed_n, _ = measure(subject, prepared, run, nodes, np.zeros(len(nodes)), progress=told(0))
  measured_n = objective - zeroed_n
  integrated_n = np.zeros(len(nodes))
  points, weights = np.polynomial.legendre.leggauss(max(1, request.steps))
  for step in range(request.steps):
    share, weight = (points[step] + 1) / 2, weights[step] / 2
    _, _, slopes_n = measure(subject, prepared, run, nodes, share * acts_n, True, told(1 + step))
    integrated_n += weight * slopes_n * acts_n
  return schema.AuditResponse(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    objective=objective,
    nodes=nodes,
    estimated=estimated_n.tolist(),
    measured=measured_n.tolist(),
    ratio=[float(e / m) if m else None for e, m in zip(estimated_n, measured_n, strict=True)],
    integrated=integrated_n.tolist() if request.steps else None,
  )
