"""One run of a prompt -> every node's activation, write vector, direct effect and estimated total effect.

`run` is one forward and one backward pass; `describe` reads any nodes off it, and `find` finds those that matter.
A number of a node in a run is defined here alone. A compiled program serves all prompts of a padded length, whatever
is asked, held or listed.

The gradient conventions are those of Transformer Debugger: the scale of the norm that the objective is read through is
held, every other part is live; gradients upstream of an SAE are those without it.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import interventions, objectives, schema
from jax_interp.debugger.objectives import Question
from jax_interp.debugger.subject import Subject, to_stream
from models import sites

KINDS = tuple(schema.WHERE)
BLOCK = 256  # how many numbers are compared by their largest first, when the largest of many are sought
ROWS = (16, 64, 256, 1024)  # nodes of a layer are described in lots of one of these sizes
LOTS = (10, 30, 100, 300, 1000)  # as many of the largest are sought, so that few numbers are compiled
PARTS = ('attn', 'mlp')  # of a layer
RANKED = ('write_norm', 'total_effect', 'direct_effect', 'activation')  # columns, in the order that nodes are sought in
SUMMED = RANKED[:3]  # columns of all that has no activation
INNER = {'attn': ('v_out', 'delta_attn'), 'mlp': ('post_act', 'delta_mlp')}  # sites of what each adds
DELTAS = ('delta_attn', 'delta_mlp')
STREAMS = ('post_attn', 'post_mlp', '_ln.scale')

Array = jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'objective',
    'final_bias',
    'acts',
    'grads',
    'grad_td',
    'stream',
    'traced_sae',
    'cut',
    'held_heads',
    'n_tokens',
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Run:
  """A run of one prompt [1, token].

  Attributes:
    objective: [].
    final_bias: [], see `objectives.final_bias`.
    acts, grads: {site: [1, ...]} after the edits, and gradients of the objective.
    grad_td: gradient at the residual stream that the objective is read from.
    stream: number of that stream, see `Question`.
    traced_sae: number of the SAE whose latent is the objective, else -1.
    cut: {'h.0.resid.delta_attn': [token]} and so on: where what a layer's attention or MLP adds is held, so that
      nothing of its parts reaches the stream.
    held_heads: of each layer [token, head]: where what a head reads is held, so that no pair of it reaches the stream.
    n_tokens: of the prompt, without padding.
  """

  objective: Array
  final_bias: Array
  acts: dict[str, Array]
  grads: dict[str, Array]
  grad_td: Array
  stream: Array
  traced_sae: Array
  cut: dict[str, Array]
  held_heads: list[Array]
  n_tokens: Array


def _hold_scale(x, tap, question, stream):
  return jnp.where(question.stream == stream, jax.lax.stop_gradient(x), x)


def edits(model, saes: Mapping, held: interventions.Held, shifts, question: Question) -> list[sites.Edit]:
  """Returns the edits of a run: what is held, the SAEs spliced in, and the norm scales that gradients do not pass."""
  n_layer = model.config.n_layer
  found = [*interventions.edits(held, n_layer, tuple(saes)), sites.stop('ln_f.scale')]
  for i in range(n_layer):
    found += interventions.shift_edits(shifts, i, f'h.{i}.')
    found.append(sites.Edit(f'h.{i}.attn_ln.scale', _hold_scale, (question, 2 * i)))
    found.append(sites.Edit(f'h.{i}.mlp_ln.scale', _hold_scale, (question, 2 * i + 1)))
  return found + [sites.splice(site, sae, hold_error=False) for site, sae in saes.items()]


@jax.jit
def run(
  model,
  saes: Mapping,
  tokens_bt: Array,
  held: interventions.Held,
  shifts: interventions.Shifts,
  question: Question,
  n_tokens,
) -> Run:
  """Returns one run; see `Run`.

  Args:
    model: the subject model.
    saes: {site: SAE} to splice in.
    tokens_bt: int32 [1, token], padded.
    held, shifts: what is ablated.
    question: the objective.
    n_tokens: without padding.
  """
  n_layer = model.config.n_layer
  streams = [objectives.stream_site(i) for i in range(2 * n_layer + 1)]
  spliced = [f'{site}{name}' for site in saes for name in sites.SPLICED]
  deltas = 'h.*.resid.delta_attn', 'h.*.resid.delta_mlp'
  read = (*objectives.READS, *streams, *spliced, *deltas, 'h.*.mlp.post_act', 'h.*.attn.v_out', '*_ln.scale')
  objective = lambda _, acts: objectives.value(question, model, saes, acts)
  value, acts, grads = sites.acts_and_grads(
    model, tokens_bt, objective, read, edits(model, saes, held, shifts, question)
  )
  grad_td = jnp.stack([grads[site][0] for site in streams])[question.stream]
  latent, traced_sae = question.kind == objectives.LATENT, -1
  for number, site in enumerate(saes):
    traced = latent & (question.layer == number)
    traced_sae = jnp.where(traced, number, traced_sae)
    if objectives.on_stream(site):  # read from the stream as it was before the splice
      grad_td = jnp.where(traced, grads[f'{site}.input'][0], grad_td)
      grads[site] = jnp.where(traced, grads[f'{site}.input'], grads[site])
  final_bias = objectives.final_bias(question, model, saes, acts, grads['resid.post_ln_f'][0])
  kept = lambda found, names: {site: found[site] for site in found if site.endswith(names)}
  cut = {
    f'h.{i}.resid.delta_{part}': interventions.held_tokens(held, f'resid.delta_{part}', i, tokens_bt.shape[1])
    for i in range(n_layer)
    for part in PARTS
  }
  return Run(
    value,
    final_bias,
    kept(
      acts,
      ('qk_probs', '.k', '.v', 'v_out', 'post_act', 'post_emb', *DELTAS, *sites.SPLICED, 'ln_f', *STREAMS),
    ),
    kept(grads, ('qk_probs', 'v_out', 'v_out.input', 'post_act', 'post_emb', *DELTAS, '.error')),
    grad_td.astype(jnp.float32),
    jnp.asarray(question.stream),
    jnp.asarray(traced_sae),
    cut,
    [interventions.held_heads(held, i, tokens_bt.shape[1], model.config.n_head) for i in range(n_layer)],
    jnp.asarray(n_tokens),
  )


def writes_to(site: str) -> int:
  """Returns the number of the first residual stream that holds what is written at a site."""
  if site == 'resid.post_emb':
    return 0
  _, layer, *_, name = site.split('.')
  return 2 * int(layer) + (1 if name in ('v_out', 'delta_attn', 'post_attn', 'qk_probs') else 2)


def made_of(sae_sites: Sequence[str], n_layer: int, stream: int) -> list[str]:
  """Returns sites whose writes, and output biases behind the inner ones, add up to a residual stream.

  Of a layer's attention and MLP it is the site of the SAE there, else 'h.0.attn.v_out' or 'h.0.mlp.post_act'. An SAE on
  the stream stands for all before it.
  """
  on_stream = [site for site in sae_sites if objectives.on_stream(site) and writes_to(site) <= stream]
  first = max(on_stream, key=writes_to, default='resid.post_emb')
  found = [first]
  for i in range(n_layer):
    for part, inner in (('attn', 'attn.v_out'), ('mlp', 'mlp.post_act')):
      site = f'h.{i}.resid.delta_{part}'
      site = site if site in sae_sites else f'h.{i}.{inner}'
      if writes_to(first) < writes_to(site) <= stream:
        found.append(site)
  return found


@functools.partial(jax.tree_util.register_dataclass, data_fields=['written', 'number', 'cut_t'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Writer:
  """What writes at a site: the first stream that holds it, the number of the SAE there or -2, and `Run.cut` of it."""

  written: np.ndarray
  number: np.ndarray
  cut_t: Array

  def is_upstream(self, run: Run) -> Array:
    """Returns whether the stream that the objective is read from holds what is written, cut or not."""
    return (self.written <= run.stream) & (run.traced_sae != self.number)

  def reaches(self, run: Run) -> Array:
    """Returns at which tokens [token] that stream holds it."""
    return self.is_upstream(run) & ~self.cut_t


def writer(run: Run, saes: Mapping, site: str) -> Writer:
  """Returns what writes at a site of a layer's attention or MLP, or the SAE at any."""
  part = next((part for part, names in INNER.items() if site.endswith(names)), None)
  held = part is not None and (site not in saes or site.endswith(('v_out', 'post_act')))
  cut_t = run.cut[f'h.{site.split(".")[1]}.resid.delta_{part}'] if held else np.zeros(len(run.grad_td), bool)
  return Writer(np.int32(writes_to(site)), np.int32(list(saes).index(site) if site in saes else -2), cut_t)


def is_lost(run: Run, saes: Mapping, node: schema.Node) -> bool:
  """Returns whether what a node writes is lost: its layer's attention or MLP, or what its head reads, is held."""
  if node.kind in ('embedding', 'layer'):
    return False
  own, part = node.site in saes, 'attn' if node.kind.startswith('head') or node.site == 'attn' else 'mlp'
  by = writer(run, saes if own else {}, node.site if own else f'h.{node.layer}.resid.delta_{part}')
  held_head = node.kind == 'head' and np.asarray(run.held_heads[node.layer])[node.token, node.index]
  return bool(np.asarray(by.cut_t)[node.token] or held_head)


# Describing nodes


@functools.partial(jax.tree_util.register_dataclass, data_fields=['kind', 'token', 'source', 'index'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
  """Nodes of one layer, one SAE or the embedding as arrays [node]; kind in KINDS; what is missing is -1."""

  kind: np.ndarray
  token: np.ndarray
  source: np.ndarray
  index: np.ndarray

  def of(self, *kinds: str) -> Array:
    """Returns which rows are of these kinds."""
    return jnp.isin(self.kind, jnp.array([KINDS.index(kind) for kind in kinds]))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['activation', 'write_norm', 'direct_effect', 'total_effect', 'write_nd'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Described:
  """Columns of a table [node], nan where undefined, and what each node adds to the stream at its token, [node, d]."""

  activation: Array
  write_norm: Array
  direct_effect: Array
  total_effect: Array
  write_nd: Array | None  # None: it was not asked for


def groups(nodes: Sequence[schema.Node], sae_sites: Sequence[str]) -> dict[object, tuple[list[int], Rows]]:
  """Returns {layer, SAE's site or 'embedding': (numbers of its nodes, the nodes as arrays)}.

  The arrays are padded to a size of ROWS with copies of their first, so that few sizes are compiled.
  """
  found = {}
  for number, node in enumerate(nodes):
    own = node.kind in ('latent', 'error') or node.site in sae_sites
    key = node.site if own else 'embedding' if node.kind == 'embedding' else node.layer
    part = node.kind in ('bias', 'layer') and not own
    index = PARTS.index(node.site) if part else node.index
    absent = lambda position: -1 if position is None else position
    row = (KINDS.index(node.kind), absent(node.token), absent(node.source), absent(index))
    numbers, rows = found.setdefault(key, ([], []))
    numbers.append(number)
    rows.append(row)

  def padded(rows):
    size = next((size for size in ROWS if size >= len(rows)), len(rows))
    return Rows(*np.array(rows + rows[:1] * (size - len(rows)), np.int32).T)

  return {key: (numbers, padded(rows)) for key, (numbers, rows) in found.items()}


def describe(model, saes: Mapping, run: Run, nodes: Sequence[schema.Node]) -> Described:
  """Returns nodes in a run, in their order, on the host: on a device, each number of nodes would be compiled for.

  Write vectors: of a neuron activation times its row of the output matrix; of a head at a pair probability times value
  through the output matrix; of a latent activation times its row of the decoder, in the scale of the SAE's input; of a
  head_total the sum over tokens.
  """
  numbers, found = [], []
  for key, (mine, rows) in groups(nodes, tuple(saes)).items():
    if key == 'embedding':
      described = _describe_embedding(run, rows)
    elif key in saes:
      described = _describe_sae(model, saes[key], key, *own_acts(run, key), bare(run), writer(run, saes, key), rows)
    else:
      described = _describe_layer(
        model.h[key], *layer_acts(run, key), bare(run), _writers(run, key), run.held_heads[key], rows
      )
    found.append(described)
    numbers.append(mine)
  cut = lambda mine, described: jax.tree.map(operator.itemgetter(slice(len(mine))), described)
  found = [cut(mine, described) for mine, described in zip(numbers, jax.device_get(found), strict=True)]
  order = np.argsort(np.concatenate(numbers))
  return jax.tree.map(lambda *x: np.concatenate(x)[order], *found)


def layer_acts(run: Run, layer: int) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns activations and gradients of a layer, [1, ...] each, by the last part of their names.

  What heads read is that before an SAE that is spliced in there.
  """
  prefix = f'h.{layer}.'

  def of(found):
    names = [site for site in found if site.startswith(prefix) and not site.endswith(sites.SPLICED)]
    mine = {site.removeprefix(prefix).split('.', 1)[1]: found[site] for site in names if '_ln.' not in site}
    before_sae = found.get(f'{prefix}attn.v_out.input')
    return mine if before_sae is None else mine | {'v_out': before_sae.reshape(mine['v_out'].shape)}

  return of(run.acts), of(run.grads)


def own_acts(run: Run, site: str) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns activations of the SAE at a site, [1, ...] each, '.input', '.latents', '.error', and gradients.

  Of these '.error' is always there. The gradients of latents are the SAE's `read` of it.
  """
  of = lambda found: {name: found[site + name] for name in sites.SPLICED if site + name in found}
  return of(run.acts), of(run.grads)


def unbatched(*found: dict[str, Array]) -> tuple[dict[str, Array], ...]:
  """Returns the arrays [1, ...] of dicts without their first axis; for callers inside `jax.jit`, where it is free."""
  return jax.tree.map(lambda x: x[0], found)


def bare(run: Run) -> Run:
  """Returns a run without its large dicts, of which a call would pass every array."""
  return dataclasses.replace(run, acts={}, grads={}, cut={}, held_heads=[])


def _writers(run: Run, layer: int) -> dict[str, Writer]:
  return {part: writer(run, {}, f'h.{layer}.resid.delta_{part}') for part in PARTS}


@jax.jit
def _describe_embedding(run, rows) -> Described:
  x_nd, grad_nd = (x['resid.post_emb'][0, rows.token].astype(jnp.float32) for x in (run.acts, run.grads))
  return _described(jnp.ones(len(x_nd)), x_nd, run, rows, (x_nd * grad_nd).sum(-1), True)


def _described(activation, write_nd, run, rows, total, upstream) -> Described:
  norm = jnp.linalg.norm(write_nd, axis=-1)
  norm = jnp.where(rows.of('neuron') & (activation < 0), -norm, norm)
  direct = jnp.where(upstream, (write_nd * run.grad_td[rows.token]).sum(-1), 0)
  return Described(activation, norm, direct, total, write_nd)


@jax.jit
def _describe_layer(block, acts, grads, run, writers, held_th, rows) -> Described:
  acts, grads = unbatched(acts, grads)
  of, reach = rows.of, {part: writers[part].reaches(run) for part in PARTS}
  probs_hts, v_sgc, v_out_thc = acts['qk_probs'], acts['v'], acts['v_out']
  n_head = len(probs_hts)
  kept_t = jnp.arange(len(run.grad_td)) < run.n_tokens
  token, source = jnp.maximum(rows.token, 0), jnp.maximum(rows.source, 0)
  head, neuron = (jnp.clip(rows.index, 0, n - 1) for n in (n_head, acts['post_act'].shape[1]))
  probs_n, post_act_n = probs_hts[head, token, source], acts['post_act'][token, neuron]
  # Of heads: what each read, put beside zeros for the other heads, through the output matrix.
  pair_nc = probs_n[:, None] * v_sgc[source, head // (n_head // v_sgc.shape[1])]
  total_hc = jnp.where(kept_t[:, None, None], v_out_thc, 0).sum(0)
  read_nc = jnp.where(of('head_token')[:, None], v_out_thc[token, head], total_hc[head])
  read_nc = jnp.where(of('head')[:, None], pair_nc, read_nc)
  chosen_nh = of('head', 'head_token', 'head_total')[:, None] & (head[:, None] == jnp.arange(n_head))
  read_nhc = jnp.where(chosen_nh[..., None], read_nc[:, None], 0)
  write_nd = jnp.einsum('nhc,hcd->nd', read_nhc, block.attn.c_proj.kernel[...], preferred_element_type=jnp.float32)
  rows_nd = block.mlp.c_proj.kernel[...][neuron].astype(jnp.float32)
  write_nd = jnp.where(of('neuron')[:, None], post_act_n[:, None] * rows_nd, write_nd)
  by_token_ht = _head_totals(acts, grads, (probs_hts * grads['qk_probs']).sum(-1), held_th) * kept_t
  total = jnp.where(of('head_token'), by_token_ht[head, token], by_token_ht.sum(-1)[head])
  total = jnp.where(of('head'), probs_n * grads['qk_probs'][head, token, source], total)
  total = jnp.where(of('neuron'), post_act_n * grads['post_act'][token, neuron], total)
  reached = jnp.where(of('neuron'), reach['mlp'][token], reach['attn'][token] & ~(of('head') & held_th[token, head]))
  for number, (part, layer) in enumerate((('attn', block.attn), ('mlp', block.mlp))):
    mine, whole = of('layer', 'bias') & (rows.index == number), of('layer')
    delta_nd = jnp.where(whole[:, None], acts[f'delta_{part}'][token].astype(jnp.float32), _output_bias(layer.c_proj))
    write_nd = jnp.where(mine[:, None], delta_nd, write_nd)
    effect_n = (delta_nd * grads[f'delta_{part}'][token]).sum(-1)
    total = jnp.where(mine, jnp.where(whole | ~writers[part].cut_t[token], effect_n, 0), total)
    reached = jnp.where(mine, jnp.where(whole, writers[part].is_upstream(run), reach[part][token]), reached)
  activation = jnp.where(of('head'), probs_n, jnp.where(of('neuron'), post_act_n, jnp.nan))
  activation = jnp.where(of('bias'), 1.0, activation)
  found = _described(activation, write_nd, run, rows, total, reached)
  reads_thc = block.attn.c_proj.read(run.grad_td)
  direct_h = jnp.sum((v_out_thc * reads_thc).sum(-1), 0, where=(kept_t & reach['attn'])[:, None])
  return dataclasses.replace(
    found,
    write_norm=jnp.where(of('head_total'), jnp.nan, found.write_norm),
    direct_effect=jnp.where(of('head_total'), direct_h[head], found.direct_effect),
  )


def _head_totals(acts, grads, pairs_ht, held_th) -> Array:
  """Returns total effects [head, token] of what heads give: of their pairs, and where that is held, of what it is."""
  return jnp.where(held_th.T, (acts['v_out'] * grads['v_out']).sum(-1).T, pairs_ht)


@functools.partial(jax.jit, static_argnames='site')
def _describe_sae(model, sae, site, acts, grads, run, writer, rows) -> Described:
  acts, grads = unbatched(acts, grads)
  of, token = rows.of, jnp.maximum(rows.token, 0)
  _, norm_n = sae.normalize(acts['.input'][token])
  latent = jnp.clip(rows.index, 0, sae.n_latents - 1)
  latents_n = acts['.latents'][token, latent]
  scale_n1 = jnp.broadcast_to(norm_n.scale, (len(latent), 1))
  constant_nx = jnp.broadcast_to(sae.constant(norm_n), acts['.error'][token].shape)
  own_nx = jnp.where(of('error')[:, None], acts['.error'][token], constant_nx)
  own_nx = jnp.where(of('latent')[:, None], latents_n[:, None] * sae.decoder[...][latent] * scale_n1, own_nx)
  total = (own_nx * grads['.error'][token]).sum(-1)
  activation = jnp.where(of('latent'), latents_n, jnp.where(of('bias'), 1.0, jnp.nan))
  return _described(activation, to_stream(model, site, own_nx), run, rows, total, writer.reaches(run)[token])


def _output_bias(linear) -> Array:
  return jnp.zeros((), jnp.float32) if linear.bias is None else linear.bias[...].astype(jnp.float32)


# Finding nodes


def lot_of(n: int) -> int:
  """Returns the smallest of LOTS that holds n."""
  return next(lot for lot in LOTS if lot >= n)


def largest(x: Array, k: int, sign: int = 1) -> Array:
  """Returns the indices [..., k] of the k largest of x, or of -x, along the last axis; the earlier of equal ones.

  The k largest lie in the k blocks of the largest maxima, so that one pass over x and two short sorts are enough. What
  is as large as x is written nowhere.
  """
  lead, n = x.shape[:-1], x.shape[-1]
  if n <= k * BLOCK:
    return jax.lax.top_k(sign * x, min(k, n))[1]
  if n % BLOCK:
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -n % BLOCK)], constant_values=-sign * jnp.inf)
  blocks = x.reshape(*lead, -1, BLOCK)
  maxima = blocks.max(-1) if sign > 0 else -blocks.min(-1)
  chosen = jnp.sort(jax.lax.top_k(maxima, k)[1])
  within = sign * jnp.take_along_axis(blocks, chosen[..., None], -2).reshape(*lead, -1)
  place = jax.lax.top_k(within, k)[1]
  return jnp.take_along_axis(chosen, place // BLOCK, -1) * BLOCK + place % BLOCK


def ends(x: Array, k: int) -> Array:
  """Returns the indices [2, ..., k] of the k largest and of the k smallest along the last axis."""
  return jnp.stack([largest(x, k), largest(x, k, -1)])


def _extremes(columns: Sequence[Array], valid: Array, k: int) -> tuple[Array, Array]:
  """Returns flat indices [column, 2, k] of the largest and smallest that are valid, and all columns there, in front."""
  columns = [jnp.where(valid, column, 0).reshape(-1) for column in columns]
  indices = jnp.stack([ends(column, k) for column in columns])
  missing = [(0, 0)] * 3 + [(0, k - indices.shape[-1])]  # where there are fewer nodes than k
  return jnp.pad(indices, missing[1:]), jnp.pad(jnp.stack([column[indices] for column in columns]), missing)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['heads', 'neurons', 'by_head', 'parts', 'held', 'neurons_direct', 'by_token'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Layer:
  """What is found in a layer, in few arrays: each that is brought to the host takes its time.

  Attributes:
    heads, neurons: of `_extremes`; None where an SAE stands for them.
    by_head: [3, head, token], columns of SUMMED.
    parts: [attention or MLP, whole or output bias, 3, token].
    held: [attention or MLP], direct effects of what is held.
    neurons_direct: [], of all of them.
    by_token: [3, token], total effects of attention to a token and from it, and of neurons.
  """

  heads: tuple[Array, Array] | None
  neurons: tuple[Array, Array] | None
  by_head: Array
  parts: Array
  held: Array
  neurons_direct: Array
  by_token: Array


@functools.partial(jax.jit, static_argnames=('k', 'with_heads', 'with_neurons'))
def _find_in_layer(kernels, sizes, acts, grads, run, writers, held_th, k, with_heads, with_neurons) -> _Layer:
  """Returns the extremes of one layer's heads and neurons, and sums over them.

  Args:
    kernels: {'attn', 'mlp'}: the output matrices.
    sizes: of the layer's heads and neurons, see `subject.WriteSizes`.
    acts, grads: of `layer_acts`.
    run: of `bare`.
    writers: {'attn', 'mlp'}.
    held_th: where what a head reads is held.
    k: how many are sought at each end.
    with_heads, with_neurons: whether they are; not where an SAE stands for them.
  """
  acts, grads = unbatched(acts, grads)
  reach = {part: writers[part].reaches(run) for part in PARTS}
  kept_t = jnp.arange(run.grad_td.shape[0]) < run.n_tokens
  probs_hts, v_sgc, v_out_thc = acts['qk_probs'], acts['v'], acts['v_out']
  n_head, n_tokens, _ = probs_hts.shape
  v_shc = jnp.repeat(v_sgc, n_head // v_sgc.shape[1], axis=1)
  norm = lambda x_thc: jnp.linalg.norm(jnp.einsum('thc,hce->hte', x_thc.astype(jnp.float32), sizes[0]), axis=-1)
  # What does not reach the stream is no concern; see `products` for what zeros save.
  reaching = lambda part: jnp.where(reach[part][:, None], run.grad_td, 0)
  reads_thc = kernels['attn'].read(reaching('attn'))
  projected_hts = jnp.einsum('thc,shc->hts', reads_thc, v_shc, preferred_element_type=jnp.float32)
  causal_ts = kept_t[:, None] & (jnp.arange(n_tokens)[:, None] >= jnp.arange(n_tokens))
  total_hts = jnp.where(causal_ts, probs_hts * grads['qk_probs'], 0)
  heads = neurons = None
  if with_heads:
    direct_hts = probs_hts * projected_hts * (reach['attn'] & ~held_th.T)[..., None]
    heads = _extremes((jnp.abs(probs_hts) * norm(v_shc)[:, None], total_hts, direct_hts, probs_hts), causal_ts, k)
  direct_ht = (v_out_thc * reads_thc).sum(-1).T * reach['attn']
  by_head_ht = _head_totals(acts, grads, total_hts.sum(-1), held_th) * kept_t
  post_act_tn = acts['post_act'].astype(jnp.float32)
  total_tn = post_act_tn * grads['post_act'] * kept_t[:, None]
  neurons_direct = jnp.zeros(())
  if with_neurons:
    direct_tn = post_act_tn * kernels['mlp'].read(reaching('mlp')) * (reach['mlp'] & kept_t)[:, None]
    neurons = _extremes((post_act_tn * sizes[1], total_tn, direct_tn, post_act_tn), kept_t[:, None], k)
    neurons_direct = direct_tn.sum()
  parts, held = [], []
  for part in PARTS:
    delta_td, grad_td = (x[f'delta_{part}'].astype(jnp.float32) for x in (acts, grads))
    bias_td = jnp.broadcast_to(_output_bias(kernels[part]), delta_td.shape)
    cut_t = writers[part].cut_t
    whole = _summed(delta_td, grad_td, run, kept_t, True, writers[part].is_upstream(run))
    parts.append((whole, _summed(bias_td, grad_td, run, kept_t, ~cut_t, reach[part])))
    held.append((whole[SUMMED.index('direct_effect')] * cut_t).sum())
  return _Layer(
    heads,
    neurons,
    jnp.stack([norm(v_out_thc) * kept_t, by_head_ht, direct_ht * kept_t]),
    jnp.array(parts),
    jnp.array(held),
    neurons_direct,
    jnp.stack([by_head_ht.sum(0), total_hts.sum((0, 1)), total_tn.sum(1)]),
  )


def _summed(x_td, grad_td, run, kept_t, live_t, reach_t) -> Array:
  """Returns columns [3, token] of SUMMED, of what x adds to the stream where its gradient is known."""
  total_t, direct_t = (x_td * grad_td).sum(-1) * live_t, (x_td * run.grad_td).sum(-1) * reach_t
  return jnp.stack([jnp.linalg.norm(x_td, axis=-1), total_t, direct_t]) * kept_t


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['latents', 'parts', 'by_token', 'direct'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Own:
  """What is found in an SAE.

  Attributes:
    latents: of `_extremes`.
    parts: [error or bias, 3, token], columns of SUMMED.
    by_token: [token], total effects.
    direct: [], of all latents.
  """

  latents: tuple[Array, Array]
  parts: Array
  by_token: Array
  direct: Array


@functools.partial(jax.jit, static_argnames=('site', 'k'))
def _find_in_sae(model, sae, size_l, site, acts, grads, run, writer, k) -> _Own:
  """Returns the extremes of one SAE's latents, its error and bias by token, and sums."""
  (acts, grads), reach_t = unbatched(acts, grads), writer.reaches(run)
  kept_t = jnp.arange(run.grad_td.shape[0]) < run.n_tokens
  _, norm = sae.normalize(acts['.input'])
  scale_t1 = jnp.broadcast_to(norm.scale, (len(kept_t), 1))
  grad_tx = run.grad_td
  if site.endswith(('v_out', 'post_act')):
    _, layer, part, _ = site.split('.')
    grad_tx = getattr(model.h[int(layer)], part).c_proj.read(grad_tx).reshape(len(kept_t), -1)
  latents_tl = acts['.latents']
  grads_2tx = jnp.stack([grads['.error'], grad_tx * reach_t[:, None]])
  total_tl, direct_tl = sae.written_along(latents_tl, norm, grads_2tx)
  found = _extremes((jnp.abs(latents_tl) * size_l * scale_t1, total_tl, direct_tl, latents_tl), kept_t[:, None], k)
  constant_tx = jnp.broadcast_to(sae.constant(norm), acts['.error'].shape)

  def columns(x_tx):
    total_t, direct_t = (x_tx * grads['.error']).sum(-1), (x_tx * grad_tx).sum(-1) * reach_t
    return jnp.stack([jnp.linalg.norm(to_stream(model, site, x_tx), axis=-1), total_t, direct_t]) * kept_t

  direct = (direct_tl * kept_t[:, None]).sum()
  parts = jnp.stack([columns(acts['.error']), columns(constant_tx)])
  return _Own(found, parts, (total_tl * kept_t[:, None]).sum(1), direct)


@jax.jit
def _find_in_embedding(run) -> Array:
  kept_t = jnp.arange(run.grad_td.shape[0]) < run.n_tokens
  x_td, grad_td = (x['resid.post_emb'][0].astype(jnp.float32) for x in (run.acts, run.grads))
  return _summed(x_td, grad_td, run, kept_t, True, True)


@dataclasses.dataclass(frozen=True)
class Found:
  """What `find` found.

  Attributes:
    rows: {node: its columns, in the order of RANKED}, the first found first.
    by_token: sums.
    completeness: of all direct effects.
  """

  rows: dict[schema.Node, np.ndarray]
  by_token: schema.ByToken
  completeness: schema.Completeness

  @property
  def nodes(self) -> list[schema.Node]:
    return list(self.rows)

  def describe(self, nodes: Sequence[schema.Node]) -> Described:
    """Returns the columns of nodes that were found."""
    columns = np.array([self.rows[node] for node in nodes]).T
    return Described(**dict(zip(RANKED, columns, strict=True)), write_nd=None)


def find(subject: Subject, saes: Mapping, run: Run, k: int, exact: bool, columns: Sequence[str] | None = None) -> Found:
  """Returns the nodes that are among the k largest or the k smallest of their kind in a column, and sums.

  Nodes come in the order in which they are first met, by kind and then by the columns of RANKED. A node is among the
  largest only above zero, and among the smallest only below: what does nothing is in no table. Layers are reduced one
  after another, so that memory beyond the run itself is that of a layer. Heads and neurons that an SAE stands for are
  left out.

  Args:
    subject: of the run.
    saes: spliced in.
    run: of them.
    k: at most the last of LOTS.
    exact: see `schema.Completeness`.
    columns: of RANKED, in which nodes are sought; None: in all.
  """
  columns = [RANKED.index(name) for name in columns or RANKED]
  lot, model = lot_of(k), subject.model
  sae_sites, sizes = tuple(saes), subject.write_sizes
  layers = [_of_layer(model, sizes, saes, run, i, lot) for i in range(model.config.n_layer)]
  own = {
    site: _find_in_sae(
      model, sae, sizes.latents[site], site, *own_acts(run, site), bare(run), writer(run, saes, site), lot
    )
    for site, sae in saes.items()
  }
  # The run has only begun: nothing of it is waited for until all is under way.
  layers, own, embedding, objective, final_bias, stream, traced, n_tokens = jax.device_get(
    (layers, own, _find_in_embedding(run), run.objective, run.final_bias, run.stream, run.traced_sae, run.n_tokens)
  )
  rows = {}
  shapes = {'heads': (model.config.n_head, len(run.grad_td), len(run.grad_td)), 'neurons': (0, model.config.n_neurons)}
  for kind, shape in shapes.items():
    extremes = [(i, getattr(layer, kind), shape) for i, layer in enumerate(layers)]
    found = _merge([one for one in extremes if one[1]], k, columns)
    rows |= {_node(kind[:-1], i, index, sae_sites): row for (i, index), row in found.items()}
  extremes = [(number, own[site].latents, (0, saes[site].n_latents)) for number, site in enumerate(sae_sites)]
  found = _merge(extremes, k, columns)
  rows |= {_node('latent', number, index, sae_sites): row for (number, index), row in found.items()}
  small = {'embedding': {(0, 0): embedding}, 'head_token': {}, 'bias': {}, 'error': {}, 'head_total': {}, 'layer': {}}
  for i, layer in enumerate(layers):
    if layer.heads:
      totals = layer.by_head.sum(-1, keepdims=True)
      totals[0] = np.nan  # a norm of what is written at several tokens says nothing
      for head in range(model.config.n_head):
        small['head_token'][i, head], small['head_total'][i, head] = layer.by_head[:, head], totals[:, head]
    for part in range(len(PARTS)):
      small['layer'][i, part], small['bias'][i, part] = layer.parts[part]
  for site in sae_sites:
    small['error'][site, 0], small['bias'][site, None] = own[site].parts
  for kind, mine in small.items():
    rows |= {_small_node(kind, *key): row for key, row in _rank(kind, mine, k, n_tokens, columns).items()}
  by_token = sum(layer.by_token for layer in layers)[:, :n_tokens].tolist()
  by_token = dict(zip(('attention_to', 'attention_from', 'mlp'), by_token, strict=True))
  by_token['embedding'] = embedding[SUMMED.index('total_effect'), :n_tokens].tolist()
  by_token['latents'] = sum((own[site].by_token for site in saes), np.zeros(len(run.grad_td)))[:n_tokens].tolist()
  traced_site = None if traced < 0 else sae_sites[traced]
  sums = _sums(layers, own, embedding, int(stream), [site for site in sae_sites if site != traced_site])
  residual = float(objective) - sum(sums.values()) - float(final_bias)
  completeness = schema.Completeness(
    objective=float(objective), final_bias=float(final_bias), residual=residual, exact=exact, **sums
  )
  return Found(rows, schema.ByToken(**by_token), completeness)


def _of_layer(model, sizes, saes, run, i, lot) -> _Layer:
  stands_for = lambda *names: any(f'h.{i}.{name}' in saes for name in names)
  block = model.h[i]
  return _find_in_layer(
    {'attn': block.attn.c_proj, 'mlp': block.mlp.c_proj},
    (sizes.heads[i], sizes.neurons[i]),
    *layer_acts(run, i),
    bare(run),
    _writers(run, i),
    run.held_heads[i],
    lot,
    not stands_for('attn.v_out', 'resid.delta_attn'),
    not stands_for('mlp.post_act', 'resid.delta_mlp'),
  )


def _merge(extremes, k, columns) -> dict[tuple[int, tuple[int, ...]], np.ndarray]:
  """Returns {(layer or SAE, index of a node): its row} of the extremes of columns, from those of each layer."""
  found = {}
  if not extremes:
    return found
  indices = np.stack([indices for _, (indices, _), _ in extremes])  # [layer, column, 2, lot]
  values = np.stack([values for _, (_, values), _ in extremes])  # [layer, of, column, 2, lot]
  shapes = np.array([shape for *_, shape in extremes])
  for column in columns:
    for end, sign in enumerate((1, -1)):
      signed = sign * values[:, column, column, end]
      where, place = np.unravel_index(_above_zero(signed.reshape(-1), k)[::sign], signed.shape)
      cells = zip(*_unravel(indices[where, column, end, place], shapes[where]), strict=True)
      numbers = [extremes[i][0] for i in where]
      for key, row in zip(zip(numbers, cells, strict=True), values[where, :, column, end, place], strict=True):
        found.setdefault(key, row)
  return found


def _above_zero(x: np.ndarray, k: int) -> np.ndarray:
  """Returns the indices of the k largest of x that are above zero, in order; the earlier of equal ones first."""
  near = np.flatnonzero(x > 0)
  if len(near) > k:  # few of many are left to sort
    near = near[x[near] >= np.partition(x[near], -k)[-k]]
  return near[np.argsort(-x[near], kind='stable')[:k]]


def _unravel(flat_n: np.ndarray, shapes: np.ndarray) -> list[list[int]]:
  """Returns the indices [axis][n] of flat ones into arrays of shapes [n, axis]; the first axis may be of any length."""
  found = []
  for sizes_n in shapes.T[:0:-1]:
    flat_n, index_n = np.divmod(flat_n, sizes_n)
    found.insert(0, index_n.tolist())
  return [flat_n.tolist(), *found]


def _rank(kind: str, rows: dict, k: int, n_tokens: int, columns: Sequence[int]) -> dict[tuple, np.ndarray]:
  """Returns {(layer or site, index, token): row} of the k largest and smallest of columns [3, token] of few nodes."""
  found, keys = {}, list(rows)
  if not keys:
    return found
  values = np.stack(list(rows.values()))[..., :n_tokens]  # [key, 3, token]
  activation = np.full_like(values[:, :1], 1.0 if kind in ('embedding', 'bias') else np.nan)
  whole = np.concatenate([values, activation], 1)  # [key, 4, token]
  for column in columns:
    if RANKED[column] not in SUMMED or np.isnan(values[:, column]).all():
      continue
    for sign in (1, -1):
      signed = sign * values[:, column]
      places, tokens = np.unravel_index(_above_zero(signed.reshape(-1), k)[::sign], signed.shape)
      for place, token, row in zip(places.tolist(), tokens.tolist(), whole[places, :, tokens], strict=True):
        found.setdefault((*keys[place], token), row)
  return found


def _node(kind, where, index, sae_sites) -> schema.Node:
  if kind == 'head':
    head, token, source = index
    return schema.Node(kind=kind, layer=where, index=head, token=token, source=source)
  token, index = index
  if kind == 'neuron':
    return schema.Node(kind=kind, layer=where, token=token, index=index)
  return schema.Node(kind=kind, site=sae_sites[where], token=token, index=index)


def _small_node(kind, where, index, token) -> schema.Node:
  match kind:
    case 'embedding':
      return schema.Node(kind=kind, token=token)
    case 'head_token':
      return schema.Node(kind=kind, layer=where, index=index, token=token)
    case 'head_total':
      return schema.Node(kind=kind, layer=where, index=index)
    case _ if isinstance(where, str):
      return schema.Node(kind=kind, site=where, token=token)
    case _:
      return schema.Node(kind=kind, layer=where, site=PARTS[index], token=token)


def _sums(layers, own, embedding, stream: int, sae_sites: Sequence[str]) -> dict[str, float]:
  """Returns the direct effects of all that the stream is made of, by kind; an SAE stands for what it reads."""
  sums = dict.fromkeys(('embedding', 'attention', 'mlp', 'latents', 'errors', 'biases'), 0.0)
  direct = SUMMED.index('direct_effect')
  for site in made_of(sae_sites, len(layers), stream):
    part = next((number for number, part in enumerate(PARTS) if site.endswith(INNER[part])), None)
    layer = None if part is None else layers[objectives.split_site(site)[0]]
    if site in sae_sites:
      error, bias = own[site].parts[:, direct].sum(-1)
      sums['latents'] += float(own[site].direct)
      sums['errors'] += float(error)
      sums['biases'] += float(bias)
    elif layer is None:
      sums['embedding'] += float(embedding[direct].sum())
    elif PARTS[part] == 'attn':
      sums['attention'] += float(layer.by_head[direct].sum())
    else:
      sums['mlp'] += float(layer.neurons_direct)
    if site.endswith(('v_out', 'post_act')):
      sums[('attention', 'mlp')[part]] += float(layer.held[part])
      sums['biases'] += float(layer.parts[part, 1, direct].sum())
  return sums
