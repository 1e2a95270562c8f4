"""Nodes in tokens of the vocabulary: what they promote, what excites them, and what comes next.

These are rows 8 to 10, 16, 27 and 28 of the capabilities of Transformer Debugger.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, objectives, schema
from jax_interp.debugger.subject import Subject, to_stream
from models import sites

LOT = 64  # nodes whose logits are in memory together
N_CANDIDATES = 100
N_ATTRIBUTED = 3  # tokens that an attention latent is attributed to


@functools.partial(jax.jit, static_argnames='n')
def _both_ends(scores_nv, n):
  """Returns indices [2, row, n] of the largest and the smallest of each row, and their values."""
  indices = effects.ends(scores_nv, n)
  return indices, jnp.take_along_axis(scores_nv[None], indices, -1)


@functools.partial(jax.jit, static_argnames='n')
def _promoted(model, write_nd, n):
  # Through the norm's gain without its centring, as Transformer Debugger does; `promoted_logits` centres.
  logits_nv = jnp.einsum('nd,vd->nv', write_nd * model.ln_f.gain[...], model.unembedding)
  return _both_ends(logits_nv - logits_nv.mean(1, keepdims=True), n)


@functools.partial(jax.jit, static_argnames='n')
def _exciting(model, reads_nd, n):
  return _both_ends(jnp.einsum('nd,vd->nv', reads_nd, model.wte.embedding[...]), n)


def _in_lots(function, model, rows_nd, n: int, n_rows: int):
  """Returns `function` of all rows, lot by lot, on the host; n numbers at each end."""
  rows_nd = np.pad(rows_nd, ((0, -len(rows_nd) % LOT), (0, 0)))
  lot = effects.lot_of(n)
  found = [function(model, rows_nd[i : i + LOT], lot) for i in range(0, n_rows, LOT)]
  indices, values = zip(*jax.device_get(found), strict=True)
  return np.concatenate(indices, 1)[:, :n_rows, :n], np.concatenate(values, 1)[:, :n_rows, :n]


def _tokens(subject: Subject, indices, values) -> schema.Tokens:
  return schema.Tokens(tokens=subject.tokens(indices), values=[float(x) for x in values])


@jax.jit
def _neuron_reads(block, scale_t1, rows: effects.Rows):
  """Returns the gradient [node, d_model] of neurons' pre-activations at the stream behind attention, scales held."""
  rows_nd = block.mlp.c_fc.kernel[...].T[rows.index].astype(jnp.float32)
  return transposed(block.mlp_ln, rows_nd) / scale_t1[rows.token]


def transposed(norm, x_nd):
  """Returns the transpose of `norm.linear`: what reads x of a norm's output reads of its input, times the scale."""
  return jax.linear_transpose(norm.linear, jax.ShapeDtypeStruct(x_nd.shape, jnp.float32))(x_nd)[0]


@functools.partial(jax.jit, static_argnames='site')
def _latent_reads(model, sae, site, stream_td, scale_t1, tokens_n, indices_n):
  """Returns the gradient [node, d_model] of latents of an MLP, at the stream behind attention, the scale held."""
  block = model.h[int(site.split('.')[1])]

  def pre_activation(x_d, token, index):
    normed_d = block.mlp_ln.linear(x_d) / scale_t1[token] + block.mlp_ln.shift
    acts = mlp_acts(block, normed_d, site.endswith('delta_mlp'))
    return objectives.pre_activation(sae, acts, index)

  return jax.vmap(jax.grad(pre_activation))(stream_td[tokens_n].astype(jnp.float32), tokens_n, indices_n)


def mlp_acts(block, normed_d, out: bool) -> jax.Array:
  """Returns a layer's neurons [n], or what its MLP writes [d_model], of one normed input [d_model]."""
  tap = sites.Tap(capture=('post_act',))
  delta_btd = block.mlp(normed_d[None, None], tap)
  return delta_btd[0, 0] if out else tap.acts['post_act'][0, 0]


def excited(model, saes: Mapping, run: effects.Run, nodes: Sequence[schema.Node]) -> dict[int, np.ndarray]:
  """Returns {number of the node: gradient [d_model] of its pre-activation} of neurons and latents of MLPs."""
  found = {}
  mine = {i: node for i, node in enumerate(nodes) if node.kind in ('neuron', 'latent')}
  for key, (places, rows) in effects.groups(list(mine.values()), tuple(saes)).items():
    if key in saes and not key.endswith(('mlp.post_act', 'delta_mlp')):
      continue
    layer = int(key.split('.')[1]) if key in saes else key
    scale_t1 = run.acts[f'h.{layer}.mlp_ln.scale'][0]
    if key in saes:
      stream_td = run.acts[f'h.{layer}.resid.post_attn'][0]
      reads_nd = _latent_reads(model, saes[key], key, stream_td, scale_t1, rows.token, rows.index)
    else:
      reads_nd = _neuron_reads(model.h[layer], scale_t1, rows)
    numbers, reads_nd = list(mine), jax.device_get(reads_nd)
    found |= {numbers[place]: reads_nd[i] for i, place in enumerate(places)}
  return found


@functools.partial(jax.jit, static_argnames='site')
def _attributions(model, sae, site, acts, tokens_n, indices_n):
  """Returns [node, source]: what each latent of attention output has from each source token."""
  block = model.h[int(site.split('.')[1])]
  value_thc, probs_hts = acts['v'], acts['qk_probs']
  n_head, heads = probs_hts.shape[0], probs_hts.shape[0] // value_thc.shape[1]
  kernel_hcd = block.attn.c_proj.kernel[...]

  def one(token, index):
    read_x = jax.grad(lambda x: objectives.pre_activation(sae, x, index))(acts['.input'][token].astype(jnp.float32))
    whole = not site.endswith('v_out')
    reads_hc = jnp.einsum('hcd,d->hc', kernel_hcd, read_x) if whole else read_x.reshape(n_head, -1)
    v_shc = jnp.repeat(value_thc, heads, axis=1)
    found_s = jnp.einsum('hs,shc,hc->s', probs_hts[:, token], v_shc, reads_hc)
    return jnp.where(acts['.latents'][token, index] > 0, found_s, 0)

  return jax.lax.map(lambda pair: one(*pair), (tokens_n, indices_n))


def attributed(model, saes: Mapping, run: effects.Run, nodes: Sequence[schema.Node]) -> dict[int, np.ndarray]:
  """Returns {number of the node: [source]} of latents of attention output: what each source token adds to it."""
  found = {}
  for key, (numbers, rows) in effects.groups(nodes, tuple(saes)).items():
    if key in saes and key.endswith(('v_out', 'delta_attn')):
      layer, own = effects.unbatched(effects.layer_acts(run, int(key.split('.')[1]))[0], effects.own_acts(run, key)[0])
      attributions = jax.device_get(_attributions(model, saes[key], key, layer | own, rows.token, rows.index))
      latents = [(i, n) for i, n in enumerate(numbers) if nodes[n].kind == 'latent']
      found |= {number: attributions[i, : int(run.n_tokens)] for i, number in latents}
  return found


def node_tokens(
  subject: Subject,
  saes: Mapping,
  run: effects.Run,
  nodes: Sequence[schema.Node],
  described: effects.Described | None,
  n: int,
) -> list[schema.NodeTokens]:
  """Returns the tokens of each row of a table, n of each list; none if n is 0."""
  if not n or not nodes:
    return []
  model = subject.model
  indices, values = _in_lots(_promoted, model, described.write_nd, n, len(nodes))
  reads = excited(model, saes, run, nodes)
  order = {row: place for place, row in enumerate(reads)}
  if reads:
    read_indices, read_values = _in_lots(_exciting, model, np.stack(list(reads.values())), n, len(reads))
  attributions = attributed(model, saes, run, nodes)
  rows = []
  for row in range(len(nodes)):
    ends = [_tokens(subject, indices[end, row], values[end, row]) for end in (0, 1)]
    inputs = [None, None]
    if row in order:
      inputs = [_tokens(subject, read_indices[end, order[row]], read_values[end, order[row]]) for end in (0, 1)]
    own = attributions.get(row)
    top = [] if own is None else np.argsort(-own, kind='stable')[:N_ATTRIBUTED]
    rows.append(
      schema.NodeTokens(
        node=row,
        promoted=ends[0],
        suppressed=ends[1],
        excited_by=inputs[0],
        inhibited_by=inputs[1],
        attributed_to=None if own is None else [int(t) for t in top],
        attributions=None if own is None else [float(own[t]) for t in top],
      )
    )
  return rows


@jax.jit
def logits(model, z_td, token):
  """Returns the logits [vocab] at a token of the final normed stream."""
  return jnp.einsum('d,vd->v', z_td[token], model.unembedding, preferred_element_type=jnp.float32)


def candidates(subject: Subject, z_td: jax.Array, token: int, pinned: Sequence[int]) -> schema.Candidates:
  """Returns the most probable next tokens at a token, after those that are pinned."""
  logits_v = np.asarray(logits(subject.model, z_td, np.int32(token)))
  order = np.argsort(-logits_v, kind='stable')
  rank_v = np.empty(len(order), np.int64)
  rank_v[order] = np.arange(len(order))
  listed = list(dict.fromkeys([*pinned, *order[:N_CANDIDATES].tolist()]))
  log_z = np.logaddexp.reduce(logits_v.astype(np.float64))
  return schema.Candidates(
    token=token,
    tokens=subject.tokens(listed),
    logits=[float(logits_v[i]) for i in listed],
    probabilities=[float(np.exp(logits_v[i] - log_z)) for i in listed],
    ranks=[int(rank_v[i]) for i in listed],
  )


# Without a prompt


@functools.partial(jax.jit, static_argnames=('layer', 'name'))
def _alone(model, sae, layer, name, index):
  """Returns the pre-activation [vocab] of a neuron or latent of an MLP, each token's embedding alone as its input."""
  block = model.h[layer]
  column_d = block.mlp.c_fc.kernel[...][:, index]
  bias = 0.0 if block.mlp.c_fc.bias is None else block.mlp.c_fc.bias[...][index]

  def one(embedding_d):
    normed_d = block.mlp_ln(embedding_d[None, None].astype(jnp.float32), sites.Tap())[0, 0]
    if sae is None:
      return normed_d @ column_d + bias
    return objectives.pre_activation(sae, mlp_acts(block, normed_d, name == 'resid.delta_mlp'), index)

  return jax.lax.map(one, model.wte.embedding[...], batch_size=1024)


@functools.partial(jax.jit, static_argnames='site')
def unit_write(model, sae, site, index):
  """Returns what an activation of 1 adds to the residual stream, [1, d_model]."""
  if sae is None:
    return model.h[int(site.split('.')[1])].mlp.c_proj.kernel[...][index][None].astype(jnp.float32)
  return to_stream(model, site, sae.decoder[...][index][None])


def lens(subject: Subject, request: schema.LensRequest, progress=None) -> schema.LensResponse:
  """Returns the logit lens of a component: the tokens that an activation of 1 promotes, and those that excite it.

  The input side is of neurons and latents of MLPs, whose layer then reads each token's embedding alone, without a
  position. A latent's write is without the scale of its input's norm.

  Raises:
    ValueError: there is no such component.
  """
  node = schema.Node(kind=request.kind, layer=request.layer, site=request.site, index=request.index, token=0)
  node = objectives.check_node(subject, node, 1, tuple(subject.saes), (request.kind,))
  model, n, lot = subject.model, request.n, effects.lot_of(request.n)
  sae = subject.saes.get(node.site)
  site = f'h.{node.layer}.mlp.post_act' if sae is None else node.site
  index = np.int32(node.index)
  ends = jax.device_get(_promoted(model, unit_write(model, sae, site, index), lot))
  lists = [_tokens(subject, ends[0][end, 0, :n], ends[1][end, 0, :n]) for end in (0, 1)]
  inputs = [None, None]
  layer, name = objectives.split_site(site)
  if name in ('mlp.post_act', 'resid.delta_mlp'):
    ends = jax.device_get(_both_ends(_alone(model, sae, layer, name, index)[None], lot))
    inputs = [_tokens(subject, ends[0][end, 0, :n], ends[1][end, 0, :n]) for end in (0, 1)]
  return schema.LensResponse(
    request=request, promoted=lists[0], suppressed=lists[1], excited_by=inputs[0], inhibited_by=inputs[1]
  )
