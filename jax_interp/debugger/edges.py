"""Edges between nodes, and attention logits as sums over pairs of nodes.

An edge is a write read directly: the derivative of what a reader does along the write vector of a node upstream, times
the derivative of the objective by what the reader does. Readers are neurons, latents, and heads at token pairs through
their query, key or value; what a run holds reads nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, engine, interventions, objectives, schema
from jax_interp.debugger.subject import Subject
from models import sites

FROM = ('embedding', 'head', 'head_token', 'neuron', 'latent', 'error', 'bias', 'layer')


def _hold(x, tap, frozen):
  return jnp.where(frozen, jax.lax.stop_gradient(x), x)


def _normed(norm, stream_td, frozen):
  """Returns the norm of a stream; its scale is a constant to gradients where frozen."""
  return norm(stream_td[None], sites.Tap([sites.Edit('scale', _hold, (frozen,))]))


@functools.partial(jax.tree_util.register_dataclass, data_fields=['held', 'shifts', 'layer'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Edited:
  """What a run changes in a layer: what readers do there is what they do in the run."""

  held: interventions.Held
  shifts: interventions.Shifts
  layer: np.ndarray

  def tap(self, capture: tuple[str, ...], frozen: tuple[str, ...] = ()) -> sites.Tap:
    """Returns a tap of the layer; what is frozen is a constant to gradients."""
    edits = [*interventions.shift_edits(self.shifts, self.layer), *map(sites.stop, frozen)]
    return sites.Tap([*edits, *interventions.layer_edits(self.held, self.layer, {})], capture=capture)


def _head_reads(block, edited, stream_td, frozen, through, grads, held_th):
  """Returns each pair's activation times the derivative of the objective by it, a constant, [head, token, source].

  Through values, what a pair moves is its activation, unless what its head reads is held; else its probability is.
  """
  tap = edited.tap(('attn.qk_probs', 'attn.v'), tuple(f'attn.{name}' for name in 'qkv' if name != through))
  block.attn(_normed(block.attn_ln, stream_td, frozen), tap.at('attn'))
  probs_hts, v_sgc = tap.acts['attn.qk_probs'][0], tap.acts['attn.v'][0]
  if through == 'v':
    v_shc = jnp.repeat(v_sgc, probs_hts.shape[0] // v_sgc.shape[1], axis=1)
    grad_thc = jax.lax.stop_gradient(jnp.where(held_th[..., None], 0, grads['v_out']))
    return probs_hts * jnp.einsum('thc,shc->hts', grad_thc, v_shc)
  return probs_hts * jax.lax.stop_gradient(grads['qk_probs'])


def _neuron_reads(block, edited, stream_td, frozen, grads):
  """Returns each neuron's activation times the derivative of the objective by it, a constant, [token, neuron]."""
  tap = edited.tap(('mlp.post_act',))
  block.mlp(_normed(block.mlp_ln, stream_td, frozen), tap.at('mlp'))
  return tap.acts['mlp.post_act'][0] * jax.lax.stop_gradient(grads['post_act'])


def _latent_reads(block, edited, sae, name, number, stream_td, frozen, grads):
  """Returns each latent's activation times the derivative of the objective by it, a constant, [token, latent].

  Args:
    block: the SAE's layer.
    edited: of the layer.
    sae: at a site of it.
    name: of the site within the layer.
    number: of the SAE.
    stream_td: before attention or MLP, or at the site if that is on the residual stream.
    frozen: whether the scales of the norm and of the SAE's input are held.
    grads: of the SAE.
  """
  tap, x = edited.tap((name,)), stream_td[None]
  for part in effects.PARTS:
    if name.split('.', 1)[1] in effects.INNER[part]:
      norm = getattr(block, f'{part}_ln')
      delta_btd = getattr(block, part)(_normed(norm, stream_td, frozen), tap.at(part))
      tap(f'resid.delta_{part}', delta_btd, 'batch token d_model')
      x = tap.acts[name]
  x_tx = x[0].reshape(len(stream_td), -1)
  _, norm = sae.normalize(x_tx)
  preacts_tl = sae.preacts((x_tx - norm.mean) / _hold(norm.scale, None, frozen))
  latents_tl = jnp.where(sae.encode(x_tx)[0] > 0, preacts_tl, 0)
  tap = sites.Tap(interventions.latent_edits(edited.held, {name: number}))
  latents_btl = tap(f'{name}.latents', latents_tl[None], 'batch token latent')
  return latents_btl[0] * jax.lax.stop_gradient(sae.read(grads['.error'], norm))


@functools.partial(jax.jit, static_argnames='through')
def _into_head(block, edited, stream_td, grads, held_th, frozen, through, cell):
  reads = lambda x: _head_reads(block, edited, x, frozen, through, grads, held_th)
  return jax.grad(lambda x: reads(x)[tuple(cell)])(stream_td)


@jax.jit
def _into_neuron(block, edited, stream_td, grads, frozen, cell):
  return jax.grad(lambda x: _neuron_reads(block, edited, x, frozen, grads)[tuple(cell)])(stream_td)


@functools.partial(jax.jit, static_argnames=('name', 'number'))
def _into_latent(block, edited, sae, name, number, stream_td, grads, frozen, cell):
  reads = lambda x: _latent_reads(block, edited, sae, name, number, x, frozen, grads)
  return jax.grad(lambda x: reads(x)[tuple(cell)])(stream_td)


@functools.partial(jax.jit, static_argnames=('through', 'n'))
def _out_to_heads(block, edited, stream_td, write_td, grads, held_th, frozen, through, n):
  reads = lambda x: _head_reads(block, edited, x, frozen, through, grads, held_th)
  return _top(jax.jvp(reads, (stream_td,), (write_td,))[1], n)


@functools.partial(jax.jit, static_argnames='n')
def _out_to_neurons(block, edited, stream_td, write_td, grads, frozen, n):
  reads = lambda x: _neuron_reads(block, edited, x, frozen, grads)
  return _top(jax.jvp(reads, (stream_td,), (write_td,))[1], n)


@functools.partial(jax.jit, static_argnames=('name', 'number', 'n'))
def _out_to_latents(block, edited, sae, name, number, stream_td, write_td, grads, frozen, n):
  reads = lambda x: _latent_reads(block, edited, sae, name, number, x, frozen, grads)
  return _top(jax.jvp(reads, (stream_td,), (write_td,))[1], n)


def _top(x, n):
  indices = effects.largest(jnp.abs(x).reshape(-1), min(n, x.size))
  return indices, x.reshape(-1)[indices]


def edges(
  subject: Subject, request: schema.EdgesRequest, progress: engine.Progress = engine.silent
) -> schema.EdgesResponse:
  """Returns the edges into a node, out of one, or between two.

  Raises:
    ValueError: neither node is given, one is not there or of a kind that cannot read or write, or from_node is not
      upstream of to_node.
  """
  if request.from_node is None and request.to_node is None:
    raise ValueError('give from_node, to_node or both')
  if request.to_node is None and request.through is not None:
    raise ValueError(f'through {request.through} is how to_node reads, and none is given; leave it out')
  prepared = engine.prepare(subject, request.request)
  run = engine.run(subject, prepared)
  if request.to_node is None:
    rows = _out(subject, prepared, run, request, progress)
  else:
    rows = _into(subject, prepared, run, request)
  from_nodes, to_nodes, through, found = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
  return schema.EdgesResponse(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    from_nodes=from_nodes,
    to_nodes=to_nodes,
    through=through,
    effects=[float(x) for x in found],
    objective=float(run.objective),
  )


def _reader(subject, prepared, request) -> schema.Node:
  node = objectives.check_node(
    subject, request.to_node, prepared.n_tokens, tuple(prepared.saes), ('head', 'neuron', 'latent')
  )
  if (node.kind == 'head') != (request.through is not None):
    raise ValueError('a head reads through q, k or v, and only a head does; give through for a head alone')
  return node


def _into(subject, prepared, run, request):
  model, saes = subject.model, prepared.saes
  node = _reader(subject, prepared, request)
  frozen, traced_sae = np.bool_(request.frozen), -1
  edited = _edited(prepared, node.layer if node.site is None else objectives.split_site(node.site)[0])
  if node.kind == 'head':
    stream, cell = 2 * node.layer, (node.index, node.token, node.source)
    grads, held_th = effects.unbatched(effects.layer_acts(run, node.layer)[1])[0], run.held_heads[node.layer]
    grad_td = _into_head(
      model.h[node.layer], edited, _stream(run, stream), grads, held_th, frozen, request.through, np.array(cell)
    )
  elif node.kind == 'neuron':
    stream, cell = 2 * node.layer + 1, (node.token, node.index)
    grads = effects.unbatched(effects.layer_acts(run, node.layer)[1])[0]
    grad_td = _into_neuron(model.h[node.layer], edited, _stream(run, stream), grads, frozen, np.array(cell))
  else:
    stream, cell = objectives.read_from(node.site), (node.token, node.index)
    layer, name = objectives.split_site(node.site)
    grads, traced_sae = effects.unbatched(effects.own_acts(run, node.site)[1])[0], list(saes).index(node.site)
    sae, x = saes[node.site], _before(run, node.site)
    grad_td = _into_latent(model.h[layer or 0], edited, sae, name, traced_sae, x, grads, frozen, np.array(cell))
  local = dataclasses.replace(run, grad_td=grad_td, stream=jnp.asarray(stream), traced_sae=jnp.asarray(traced_sae))
  if request.from_node is None:
    found = effects.find(subject, saes, local, request.n, False, columns=('direct_effect',))
    nodes = [writer for writer in found.nodes if writer.kind != 'head_total']
    direct = found.describe(nodes).direct_effect if nodes else []
  else:
    nodes = [_writer(subject, prepared, request)]
    if not _is_upstream(nodes[0], saes, stream, traced_sae):
      raise ValueError(f'{nodes[0].label} is not upstream of {node.label}')
    direct = effects.describe(model, saes, local, nodes).direct_effect
  rows = [(writer, node, request.through, x) for writer, x in zip(nodes, direct, strict=True)]
  return sorted(rows, key=lambda row: -abs(row[-1]))[: request.n]


def _writer(subject, prepared, request) -> schema.Node:
  node = engine.checked(subject, prepared, request.from_node)
  if node.kind not in FROM:
    raise ValueError(f'{node.label} writes nothing at one token; give one of {", ".join(FROM)}')
  return node


def written(node: schema.Node, saes) -> int:
  """Returns the number of the first residual stream that holds what a node writes."""
  if node.kind == 'embedding':
    return 0
  if node.site in saes:
    return effects.writes_to(node.site)
  attention = node.kind in ('head', 'head_token') or node.site == 'attn'
  return 2 * node.layer + (1 if attention else 2)


def _is_upstream(node, saes, stream, traced_sae):
  own = node.site in saes and list(saes).index(node.site) == traced_sae
  return written(node, saes) <= stream and not own


def _stream(run, stream):
  return run.acts[objectives.stream_site(stream)][0].astype(jnp.float32)


def _before(run, site):
  """Returns what the SAE at a site, or the sublayer that it is of, reads."""
  return run.acts[f'{site}.input'][0] if objectives.on_stream(site) else _stream(run, objectives.read_from(site))


def _edited(prepared, layer) -> Edited:
  return Edited(prepared.held, prepared.shifts, np.int32(layer or 0))


def _out(subject, prepared, run, request, progress):
  model, saes = subject.model, prepared.saes
  node, frozen = _writer(subject, prepared, request), np.bool_(request.frozen)
  if effects.is_lost(run, saes, node):
    return []
  write_d = effects.describe(model, saes, run, [node]).write_nd[0]
  write_td = jnp.zeros_like(run.grad_td).at[node.token].set(write_d)
  begin, n, t = written(node, saes), effects.lot_of(request.n), run.grad_td.shape[0]
  n_head, n_neurons = model.config.n_head, model.config.n_neurons
  found = []
  for i, block in enumerate(model.h):
    grads, edited = effects.unbatched(effects.layer_acts(run, i)[1])[0], _edited(prepared, i)
    if begin <= 2 * i:
      for through in 'qkv':
        stream_td, held_th = _stream(run, 2 * i), run.held_heads[i]
        top = _out_to_heads(block, edited, stream_td, write_td, grads, held_th, frozen, through, n)
        found.append((('head', i, through), (n_head, t, t), top))
    if begin <= 2 * i + 1:
      top = _out_to_neurons(block, edited, _stream(run, 2 * i + 1), write_td, grads, frozen, n)
      found.append((('neuron', i, None), (t, n_neurons), top))
    progress((i + 1) / len(model.h), f'layer {i + 1} of {len(model.h)}')
  for site, sae in saes.items():
    if begin <= objectives.read_from(site) and site != node.site:
      (layer, name), number = objectives.split_site(site), list(saes).index(site)
      grads, edited = effects.unbatched(effects.own_acts(run, site)[1])[0], _edited(prepared, layer)
      block, x = model.h[layer or 0], _before(run, site)
      top = _out_to_latents(block, edited, sae, name, number, x, write_td, grads, frozen, n)
      found.append((('latent', site, None), (t, sae.n_latents), top))
  rows = []
  for (kind, where, through), shape, (indices, values) in jax.device_get(found):
    for index, x in zip(zip(*np.unravel_index(indices, shape), strict=True), values, strict=True):
      rows.append((_reader_node(kind, where, tuple(int(i) for i in index)), through, float(x)))
  rows = sorted((row for row in rows if row[2] and row[0].token < prepared.n_tokens), key=lambda row: -abs(row[2]))
  return [(node, reader, through, x) for reader, through, x in rows[: request.n]]


def _reader_node(kind, where, index) -> schema.Node:
  if kind == 'head':
    return schema.Node(kind=kind, layer=where, index=index[0], token=index[1], source=index[2])
  place = {'layer': where} if kind == 'neuron' else {'site': where}
  return schema.Node(kind=kind, token=index[0], index=index[1], **place)


# Attention logits


@jax.jit
def _sides(block, write_nd, scale_n1, positions_n, shift_positions):
  """Returns what writes add to queries [node, head, channel] and keys [node, g, channel], and what the shift gives."""
  normed_nd = block.attn_ln.linear(write_nd) / scale_n1
  q_bthc, k_btgc, _ = block.attn.qkv(normed_nd[:, None], positions_n[:, None])
  zero = block.attn.qkv(jnp.zeros_like(normed_nd)[:, None], positions_n[:, None])
  shift_btd = jnp.broadcast_to(block.attn_ln.shift, (2, 1, write_nd.shape[-1]))
  shift_q, shift_k, _ = block.attn.qkv(shift_btd, shift_positions[:, None])
  return (q_bthc - zero[0])[:, 0], (k_btgc - zero[1])[:, 0], shift_q[0, 0], shift_k[1, 0]


def parts(subject: Subject, prepared: engine.Prepared, run: effects.Run, stream: int, token: int) -> list[schema.Node]:
  """Returns nodes that a residual stream is the sum of at a token; latents that are off are left out."""
  saes, config, nodes = prepared.saes, subject.model.config, []
  for site in effects.made_of(tuple(saes), config.n_layer, stream):
    layer, name = objectives.split_site(site)
    part = name.split('.')[0]
    if site in saes:
      nodes += _latents(run, site, token)
    elif layer is None:
      nodes.append(schema.Node(kind='embedding', token=token))
    elif part == 'attn':
      nodes += [schema.Node(kind='head_token', layer=layer, index=h, token=token) for h in range(config.n_head)]
    else:
      nodes.append(schema.Node(kind='layer', site='mlp', layer=layer, token=token))
    if name == 'attn.v_out' or (name == 'mlp.post_act' and site in saes):  # a layer's MLP has its bias in it
      nodes.append(schema.Node(kind='bias', site=part, layer=layer, token=token))
  return nodes


def _latents(run, site, token):
  latents_l = np.asarray(run.acts[f'{site}.latents'][0, token])
  nodes = [schema.Node(kind='latent', site=site, index=int(i), token=token) for i in np.flatnonzero(latents_l)]
  return nodes + [schema.Node(kind=kind, site=site, token=token) for kind in ('error', 'bias')]


def qk(subject: Subject, request: schema.QKRequest, progress: engine.Progress = engine.silent) -> schema.QKResponse:
  """Returns an attention logit split into pairs of what the query and the key are made of.

  With the scale of the norm held, queries and keys are linear in the residual stream, so that their product is the sum
  over all pairs of a node at the query's token and one at the key's.

  Raises:
    ValueError: there is no such head or token pair; and as `engine.debug`.
  """
  prepared = engine.prepare(subject, request.request)
  node = schema.Node(kind='head', layer=request.layer, index=request.head, token=request.token, source=request.source)
  node = objectives.check_node(subject, node, prepared.n_tokens, tuple(prepared.saes), ('head',))
  shared = {'q': 1, 'k': subject.model.config.n_head // subject.model.h[0].attn.n_kv_head}  # heads of one query or key
  for cut in request.request.edge_ablations:
    n = shared.get(cut.into)
    if n and cut.layer == node.layer and cut.head // n == node.index // n:
      raise ValueError('an edge into the queries or keys of this head is cut; leave that out to split its logit')
  run = engine.run(subject, prepared)
  progress(0.5, 'splitting')
  model, layer = subject.model, node.layer
  own = [parts(subject, prepared, run, 2 * layer, token) for token in (node.token, node.source)]
  nodes = own[0] + own[1]
  write_nd = effects.describe(model, prepared.saes, run, nodes).write_nd
  positions = np.array([found.token for found in nodes])
  scale_n1 = jax.device_get(run.acts[f'h.{layer}.attn_ln.scale'])[0, positions]
  n_q, group = len(own[0]), node.index // (model.config.n_head // model.h[0].attn.n_kv_head)
  size = -len(nodes) % 64  # few sizes are compiled
  padded = lambda x: np.concatenate([x, np.repeat(x[:1], size, 0)])
  q, k, shift_q, shift_k = jax.device_get(
    _sides(
      model.h[layer],
      padded(write_nd),
      padded(scale_n1),
      padded(positions),
      np.array([node.token, node.source]),
    )
  )
  q_nc = np.concatenate([q[:n_q, node.index], shift_q[None, node.index]]).astype(np.float64)
  k_nc = np.concatenate([k[n_q : len(nodes), group], shift_k[None, group]]).astype(np.float64)
  sides = [
    found + [schema.Node(kind='bias', layer=layer, index=node.index, site=name, token=token)]
    for found, name, token in zip(own, 'qk', (node.token, node.source), strict=True)
  ]
  pairs = q_nc @ k_nc.T * q_nc.shape[1] ** -0.5
  logit = float(_logit(model.h[layer], _stream(run, 2 * layer), np.array([node.index, node.token, node.source])))
  order = np.argsort(-np.abs(pairs), axis=None, kind='stable')[: request.n]
  rows, columns = np.unravel_index(order, pairs.shape)
  side = lambda nodes, effects: schema.QKSide(nodes=nodes, effects=effects.tolist())
  return schema.QKResponse(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    logit=logit,
    probability=float(run.acts[f'h.{layer}.attn.qk_probs'][0, node.index, node.token, node.source]),
    query_nodes=[sides[0][i] for i in rows],
    key_nodes=[sides[1][i] for i in columns],
    effects=pairs[rows, columns].tolist(),
    query=side(sides[0], pairs.sum(1)),
    key=side(sides[1], pairs.sum(0)),
    residual=logit - float(pairs.sum()),
  )


@jax.jit
def _logit(block, stream_td, cell):
  head, token, source = cell
  normed_btd = block.attn_ln(stream_td[None], sites.Tap())
  q_bthc, k_btgc, _ = block.attn.qkv(normed_btd, jnp.arange(len(stream_td))[None])
  group = head // (q_bthc.shape[2] // k_btgc.shape[2])
  return q_bthc[0, token, head] @ k_btgc[0, source, group] * q_bthc.shape[-1] ** -0.5
