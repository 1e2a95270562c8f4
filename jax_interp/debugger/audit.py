"""The estimates against the truth: nodes really ablated, many in one batch.

A node changes nothing before its own layer, nor at earlier tokens. So the row of a node is in the batch from its layer
on, and with the tokens from its own on: what a layer computes are pairs of a row and a token (`sites.Pairs`), more from
layer to layer, and as the first row the prompt as it is. One compiled block serves all layers.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, engine, interventions, objectives, schema
from jax_interp.debugger.subject import Subject
from models import sites

SIZES = (4, 16, 32, 64)  # rows in attention, so that few are compiled
PAIRS = (64, 96, 128, 192, *(step << power for power in range(6, 20) for step in (4, 5, 6, 7)))  # the same of pairs
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the prompt's tokens that attention computes, so that few are compiled
MAX_PAIRS = SIZES[-1] * 256**2  # token pairs in memory together
LISTED = ('embedding', 'head', 'neuron', 'latent')  # kinds of the nodes of the largest estimates
ABLATABLE = (*LISTED, 'head_token', 'layer')
EMBEDDING, HEAD, NEURON, HEAD_TOKEN, ATTN, MLP, LATENT = range(7)  # codes; that of its SAE is added to a latent's
CODES = {'attn.qk_probs': HEAD, 'attn.v_out': HEAD_TOKEN, 'resid.delta_attn': ATTN}  # of what is held at a site
CODES |= {'mlp.post_act': NEURON, 'resid.delta_mlp': MLP}
READ = ('resid.post_attn', 'resid.post_mlp', 'attn.q', 'attn.qk_probs', 'mlp.pre_act')


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


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['row_p', 'token_p', 'from_p', 'cell_r', 'read_r', 'who_r', 'first'],
  meta_fields=['n_rows', 'n_tokens', 'n_slots'],
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """The pairs that a layer computes, of rows that are there by then.

  Attributes:
    row_p, token_p, first, n_rows, n_tokens, n_slots: see `sites.Pairs`.
    from_p: int32 [pair]: which pair of the layer before it continues.
    cell_r: int32 [row]: the pair at what the row holds.
    read_r: int32 [row]: the pair at the token that the objective is read from.
    who_r: int32 [row]: the row that it is still the same as: itself from its layer on, before it the first.
  """

  row_p: np.ndarray
  token_p: np.ndarray
  from_p: np.ndarray
  cell_r: np.ndarray
  read_r: np.ndarray
  who_r: np.ndarray
  first: np.ndarray
  n_rows: int
  n_tokens: int
  n_slots: int

  def past(self, keys_and_values: dict) -> sites.Pairs:
    """Returns the past of a tap, behind keys and values of the prompt."""
    sizes = self.n_rows, self.n_tokens, self.n_slots
    return sites.Pairs(keys_and_values, self.row_p, self.token_p, self.first, *sizes)


def _hold_rows(x, tap, rows, values_r, layer, batch, code):
  """Sets one cell of each row that holds one here; where a cell is a vector, multiplies it.

  It is at its row and token in attention, else at its pair, see `sites.Pairs`.
  """
  mine_r = (rows.code == code) & (rows.layer == layer)
  if tap.prefix.startswith('attn.'):
    token = rows.token - batch.first
    places = {HEAD: (rows.index, token, rows.source)}
    cells = (jnp.arange(len(mine_r)), *places.get(code, (token, rows.index)))
  else:
    cells = (jnp.zeros_like(batch.cell_r), batch.cell_r, *(() if code in (ATTN, MLP) else (rows.index,)))
  # Rows that hold nothing here point outside of the array, each at another place.
  cells = [jnp.where(mine_r, cell, n + jnp.arange(len(mine_r))) for cell, n in zip(cells, x.shape, strict=False)]
  at, values_r = x.at[*cells], values_r.astype(x.dtype)
  if x.ndim > len(cells):
    return at.multiply(values_r[:, None], mode='drop', unique_indices=True)
  return at.set(values_r, mode='drop', unique_indices=True)


def _edits(saes, own, held, rows, values_r, layer, batch, codes=()):
  """Returns the edits of a layer: the request's ablations, what rows hold, and SAEs, {name: number} in `own`."""
  found = interventions.layer_edits(held, layer, own)
  codes = dict(codes) | {f'{name}.latents': LATENT + number for name, number in own.items()}
  for name, code in codes.items():
    found.append(sites.Edit(name, functools.partial(_hold_rows, code=code), (rows, values_r, layer, batch)))
  return found + [sites.splice(name, sae, hold_error=False) for name, sae in saes.items()]


@functools.partial(jax.jit, static_argnames=('n_head', 'numbers'))
def _block(block, saes, x, past, held, shifts, question, rows, values_r, batch, layer, n_head, numbers):
  """Returns the stream [pair, d] behind a layer, and what the objective may be read from there, by row.

  Args:
    block: the layer.
    saes: {name within the layer: SAE}.
    x: the stream before it and its derivative by the held values; None: the results have none either.
    past: keys and values of the whole prompt, [slot, g, channel].
    held, shifts: of the request.
    question: the objective.
    rows: what is held.
    values_r: at which value.
    batch: what the layer computes.
    layer: its number.
    n_head: of the model.
    numbers: of the SAEs, among all.
  """
  own = dict(zip(saes, numbers, strict=True))
  within = dataclasses.replace(question, token=question.token - batch.first)

  def forward(x_pd, values_r):
    edits = _edits(saes, own, held, rows, values_r, layer, batch, CODES)
    tap = sites.Tap(
      [*interventions.shift_edits(shifts, layer), *edits],
      capture=(*READ, *(f'{name}.input' for name in saes)),
      past=batch.past(past),
    )
    out_pd = block(x_pd[None], tap)[0]
    q_rthc = tap.to_rows(tap.acts['attn.q'])[1]
    acts = tap.acts | tap.keys_and_values | {'attn.q': q_rthc}
    of_rows = {name: x[batch.who_r] for name, x in acts.items() if name.startswith('attn.')}
    of_pairs = {name: x[0] for name, x in acts.items() if not name.startswith('attn.')}
    pick = lambda of_row, place: objectives.picks(within, n_head, of_row | of_pairs, place)
    return out_pd, jax.vmap(pick)(of_rows, batch.read_r)

  x_pd, slope_pd = x
  if slope_pd is None:
    out_pd, picked = forward(x_pd, values_r)
    return (out_pd, None), (picked, None)
  (out_pd, picked), slopes = jax.jvp(forward, (x_pd, values_r), (slope_pd, jnp.ones_like(values_r)))
  return (out_pd, slopes[0]), (picked, slopes[1])


@functools.partial(jax.jit, static_argnames='numbers')
def _embeddings(x_sd, saes, held, rows, values_r, batch, numbers):
  """Returns the embedding of each pair [pair, d], and what the objective may read of it by row, and both derivatives.

  Args:
    x_sd: the embedding of the whole prompt, before the SAE there.
    saes, numbers: of the embedding: one or none, as for `_block`.
    held, rows, values_r, batch: as for `_block`.
  """
  own = dict(zip(saes, numbers, strict=True))

  def forward(values_r):
    n_rows = len(values_r)
    mine_r, value_p = rows.code == EMBEDDING, jnp.ones(len(batch.row_p))
    value_p = value_p.at[jnp.where(mine_r, batch.cell_r, len(value_p) + jnp.arange(n_rows))].set(
      values_r, mode='drop', unique_indices=True
    )
    tap = sites.Tap(
      _edits(saes, own, held, rows, values_r, -1, batch),
      capture=('resid.post_emb', 'resid.post_emb.input'),
      past=batch.past({}),
    )
    x_pd = value_p.astype(x_sd.dtype)[:, None] * x_sd[batch.token_p]
    x_bpd = tap('resid.post_emb', x_pd[None], 'batch token d_model')
    return x_bpd[0], {name: x[0, batch.read_r] for name, x in tap.acts.items()}

  return jax.jvp(forward, (values_r,), (jnp.ones_like(values_r),))


@jax.jit
def _objectives(model, saes, question, values, slopes):
  """Returns the objective [row] and its derivative by the held values, None without slopes.

  Args:
    model, saes, question: of the request.
    values: the stream [row, k, d] at question.positions_k, and what was picked of the embedding and of each layer.
    slopes: their derivatives.
  """

  def forward(x_rkd, embedding, layers):
    z_rkd = model.ln_f(x_rkd, sites.Tap())
    return jax.vmap(lambda *rows: objectives.finish(question, model, saes, *rows))(z_rkd, embedding, layers)

  return (forward(*values), None) if slopes is None else jax.jvp(forward, values, slopes)


@jax.jit
def _taken(tree, places):
  """Returns arrays at other places; apart from what takes them, which is compiled for one size alone."""
  return jax.tree.map(lambda x: x[places], tree)


def _size(n: int, sizes: Sequence[int]) -> int:
  return next((size for size in sizes if size >= n), n)


def _padded(x: np.ndarray, n: int, value=0) -> np.ndarray:
  return np.concatenate([x, np.full(n - len(x), value, x.dtype)])


def _batches(rows: Rows, question, prepared: engine.Prepared, n_layer: int) -> tuple[list[Batch], np.ndarray]:
  """Returns what the embedding and each layer compute, and the last one's pairs [row, k] at question.positions_k.

  Pairs are in the order of rows, those of a row in the order of tokens, so that a layer's are the first of the next's.
  """
  n_rows, n_slots, layers = _size(len(rows.layer), SIZES), prepared.tokens_bt.shape[1], rows.layer.tolist()
  first_r = np.minimum(rows.token, _first_read(question))  # computed from there on
  first_r[0] = first = first_r.min()
  lengths_r = prepared.n_tokens - first_r
  offset_r = np.cumsum(lengths_r) - lengths_r - first_r  # the pair of a row at a token is their sum
  row_p = np.repeat(np.arange(len(layers)), lengths_r).astype(np.int32)
  token_p = (np.arange(len(row_p)) - offset_r[row_p]).astype(np.int32)
  n_attended, n_before, found = _attended(first, n_slots), 0, []
  for layer in range(-1, n_layer):
    n_active = bisect.bisect(layers, layer)
    n = int(lengths_r[:n_active].sum())
    who_r = np.where(np.arange(n_rows) < n_active, np.arange(n_rows), 0).astype(np.int32)
    place = lambda token_r, who_r=who_r: (offset_r[who_r] + token_r).astype(np.int32)
    from_p = np.where(np.arange(n) < n_before, np.arange(n), offset_r[0] + token_p[:n]).astype(np.int32)
    size, n_before = _size(n, PAIRS), n
    batch = Batch(
      _padded(row_p[:n], size, n_rows),
      _padded(token_p[:n], size),
      _padded(from_p, size),
      place(np.maximum(_padded(rows.token, n_rows), first)),
      place(question.token),
      who_r,
      np.int32(n_slots - n_attended),
      _size(n_active, SIZES),
      n_attended,
      n_slots,
    )
    found.append(batch)
  places_rk = _padded(offset_r, n_rows, offset_r[0])[:, None] + question.positions_k
  return found, places_rk.astype(np.int32)


def held_objectives(
  subject: Subject,
  prepared: engine.Prepared,
  run: effects.Run,
  rows: Rows,
  values_r: np.ndarray,
  with_slope: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the objective with each row's node held at its value, [row], and its derivative by the value.

  The scales of all norms are live. The value of an embedding, of a head at a token and of a layer is a multiple of it.

  Args:
    subject: of the request.
    prepared: the request.
    run: of it; its embedding, and keys and values of earlier tokens, are read.
    rows: what is held, in the order of their layers; the first holds nothing.
    values_r: at what.
    with_slope: whether the derivative is wanted; else it is None.
  """
  model, question, saes, held = subject.model, prepared.question, prepared.saes, prepared.held
  batches, places_rk = _batches(rows, question, prepared, model.config.n_layer)
  n_rows = len(places_rk)
  rows = jax.tree.map(lambda x: _padded(x, n_rows), dataclasses.replace(rows, code=_padded(rows.code, n_rows, -1)))
  values_r = _padded(values_r.astype(np.float32), n_rows)
  of_layer = lambda i: {name: site for site in saes for layer, name in [objectives.split_site(site)] if layer == i}
  numbers = lambda own: tuple(list(saes).index(site) for site in own.values())
  own = of_layer(None)
  (x, embedding), slopes = _embeddings(
    run.acts['resid.post_emb.input' if own else 'resid.post_emb'][0],
    {name: saes[name] for name in own},
    held,
    rows,
    values_r,
    batches[0],
    numbers(own),
  )
  x, embedding = (x, slopes[0] if with_slope else None), (embedding, slopes[1])
  found, anything = [], dataclasses.replace(question, n_read=0)  # layers are compiled once for all objectives
  for i, (block, batch) in enumerate(zip(model.h, batches[1:], strict=True)):
    own = of_layer(i)
    x, picked = _block(
      block,
      {name: saes[site] for name, site in own.items()},
      _taken(x, batch.from_p),
      {name: run.acts[f'h.{i}.{name}'][0] for name in ('attn.k', 'attn.v')},
      held,
      prepared.shifts,
      anything,
      rows,
      values_r,
      batch,
      np.int32(i),
      model.config.n_head,
      numbers(own),
    )
    found.append(picked)
  x = _taken(x, places_rk)
  values = x[0], embedding[0], [layer[0] for layer in found]
  slopes = (x[1], embedding[1], [layer[1] for layer in found]) if with_slope else None
  return jax.device_get(_objectives(model, saes, question, values, slopes))


def _first_read(question) -> int:
  """Returns the first token that the objective is read from."""
  return min(int(question.token), int(question.positions_k.min()))


def _attended(first: int, n_slots: int) -> int:
  """Returns how many of the last tokens attention computes, where they are computed from the first on."""
  return _size(n_slots - first, [int(np.ceil(share * n_slots)) for share in SHARES])


def _lots(first_n: np.ndarray, layer_n: np.ndarray, n_slots: int) -> list[np.ndarray]:
  """Returns which nodes are measured together, in the order of their layers.

  Args:
    first_n: the first token that each changes, or that is read.
    layer_n: its layer.
    n_slots: tokens of the prompt, padded.
  """
  order, found = np.argsort(-first_n, kind='stable'), []
  while len(order):
    n_pairs_n = np.array([_attended(first, n_slots) for first in first_n[order]]) * n_slots  # rising
    n_rows_n = np.array([_size(n + 2, SIZES) for n in range(len(order))])  # with the prompt as it is
    n = min(max(1, (n_rows_n * n_pairs_n <= MAX_PAIRS).sum()), SIZES[-1] - 1)
    found.append(order[:n][np.argsort(layer_n[order[:n]], kind='stable')])
    order = order[n:]
  return found


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
  first_n = np.minimum(rows.token, _first_read(prepared.question))
  objective, found_n, slopes_n, n_done = np.nan, np.zeros(len(nodes)), np.zeros(len(nodes)), 0
  nothing = Rows(*np.array([[-1], [-1], [prepared.n_tokens], [0], [0]], np.int32))
  for mine in _lots(first_n, rows.layer, n_slots):
    lot_rows = jax.tree.map(lambda a, b, mine=mine: np.concatenate([a, b[mine]]), nothing, rows)
    values_r = np.concatenate([[0], values_n[mine]])
    found, slopes = held_objectives(subject, prepared, run, lot_rows, values_r, with_slope)
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
  measured_n = np.where(acts_n == 0, 0, objective - zeroed_n)  # what is off changes nothing, whatever rounding says
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
