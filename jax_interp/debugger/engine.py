"""A request -> its answer: runs the model, lists the nodes, and says what they do to the objective.

`debug` answers why this token and not that one, or, traced, why a node is as active as it is. What the other modules of
the debugger ask of a prompt begins with `prepare`.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, interventions, lens, objectives, schema
from jax_interp.debugger.subject import LENGTHS, Subject, check_index, check_sae
from models import products, sites

Progress = Callable[[float, str], None]  # told the share that is done and what is being done; may raise to stop


def silent(share: float, what: str):
  """Progress that nobody watches."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A request, ready to run.

  Attributes:
    tokens: of the prompt, and of the continuation where there is one.
    n_prompt: how many are the prompt's.
    tokens_bt: all of them, padded.
    saes: {site: SAE} to splice in, in order.
    held, shifts: what is ablated: cells, and edges.
    question: what is explained.
  """

  tokens: list[int]
  n_prompt: int
  tokens_bt: np.ndarray
  saes: dict[str, object]
  held: interventions.Held
  shifts: interventions.Shifts
  question: objectives.Question | None

  @property
  def n_tokens(self) -> int:
    return len(self.tokens)


def traced(trace: schema.Trace, objective):
  """Returns the objective that a trace comes to.

  Raises:
    ValueError: the node cannot be traced in that way.
  """
  if trace.node.kind in ('neuron', 'latent'):
    if trace.through is not None or trace.downstream is not None:
      raise ValueError(f'{trace.node.label} is traced as a whole; leave out through and downstream')
    return schema.PreActivation(node=trace.node)
  if trace.node.kind != 'head':
    raise ValueError(f'{trace.node.label} cannot be traced; heads at token pairs, neurons and latents can')
  if trace.through in ('q', 'k', 'qk'):
    if trace.downstream is not None:
      raise ValueError('downstream is for a trace through v or all; an attention logit is read by nothing else')
    return schema.AttentionLogit(node=trace.node, through=trace.through)
  if trace.through is None:
    raise ValueError(f'{trace.node.label} is a head; trace through q, k, qk, v or all')
  of = objective if trace.downstream is None else traced(trace.downstream, objective)
  if isinstance(of, schema.HeadWrite):
    raise ValueError('a head cannot write for what another head writes; choose another objective or downstream node')
  return schema.HeadWrite(node=trace.node, through=trace.through, of=of)


def prepare(subject: Subject, request: schema.Request) -> Prepared:
  """Returns a request ready to run, with what it needs of other runs.

  Raises:
    ValueError: something in it is not there: a token, component, SAE; or it is too long.
  """
  tokens = subject.encode(request.prompt)
  n_prompt = len(tokens)
  if isinstance(request.objective, schema.Continuation):
    tokens = tokens + subject.tokenizer.encode(request.objective.text, add_special_tokens=False)
    n_ctx = subject.model.config.n_ctx
    if len(tokens) > n_ctx:
      raise ValueError(f'prompt and continuation have {len(tokens)} tokens; the context has {n_ctx}')
  wanted = sorted(subject.saes if request.saes is None else set(request.saes))
  if missing := [site for site in wanted if site not in subject.saes]:
    raise ValueError(f'there is no SAE at {missing[0]!r}; there is one at {sorted(subject.saes) or "no site"}')
  saes = {site: subject.saes[site] for site in wanted}
  objective = request.objective if request.trace is None else traced(request.trace, request.objective)
  prepared = _unasked(subject, saes, tokens, n_prompt, held_by(subject, saes, request.ablations, len(tokens)))
  prepared = dataclasses.replace(prepared, shifts=_shifts(subject, prepared, request.edge_ablations))
  return _asked(subject, prepared, objective)


def _unasked(subject, saes, tokens, n_prompt, held) -> Prepared:
  """Returns a request without an objective, no edge of which is cut."""
  tokens_bt, attn = subject.pad(tokens), subject.model.h[0].attn
  n_head, d_head, _ = attn.c_proj.kernel.shape
  shape = lambda n: (interventions.N_SHIFTS, tokens_bt.shape[1], n, d_head)
  deltas = {name: interventions.zeros(shape(n_head if name == 'q' else attn.n_kv_head)) for name in 'qkv'}
  shifts = interventions.Shifts(np.full(interventions.N_SHIFTS, -1, np.int32), deltas)
  return Prepared(tokens, n_prompt, tokens_bt, saes, held, shifts, None)


def _asked(subject: Subject, prepared: Prepared, objective) -> Prepared:
  """Returns the request with an objective, and with what only other runs know of that."""
  found = objectives.question(
    subject, objective, prepared.n_prompt, prepared.n_tokens, tuple(prepared.saes), prepared.tokens
  )
  if isinstance(objective, schema.HeadWrite):
    of = _asked(subject, prepared, objective.of)
    if of.question.stream <= 2 * found.layer:
      raise ValueError(f'{objective.node.label} is not upstream of what it is to write for')
    grad_td = jax.device_get(run(subject, of).grad_td)
    found = dataclasses.replace(found, direction_d=grad_td[found.token])
  if isinstance(objective, schema.KL):
    z_td = _final(subject.model, prepared.tokens_bt)
    found = dataclasses.replace(
      found, log_probs_v=jax.device_get(jax.nn.log_softmax(lens.logits(subject.model, z_td, found.token)))
    )
  return dataclasses.replace(prepared, question=found)


def run(subject: Subject, prepared: Prepared) -> effects.Run:
  """Returns the run of a request."""
  p = prepared
  model = subject.quick_model if p.tokens_bt.size <= products.FEW_ROWS else subject.model
  return effects.run(model, p.saes, p.tokens_bt, p.held, p.shifts, p.question, np.int32(p.n_tokens))


def _shifts(subject: Subject, prepared: Prepared, ablations: Sequence[schema.EdgeAblation]) -> interventions.Shifts:
  """Returns what cutting edges does to queries, keys and values, those of earlier layers seen by later ones.

  Raises:
    ValueError: there is no such head or node, or it is not upstream of the head.
  """
  config, n_kv = subject.model.config, subject.model.h[0].attn.n_kv_head
  if not ablations:
    return prepared.shifts
  layers, deltas = prepared.shifts.layers, {name: np.array(x) for name, x in prepared.shifts.deltas.items()}
  for ablation in ablations:
    _check_edge(subject, ablation)
  for slot, layer in enumerate(sorted({ablation.layer for ablation in ablations})):
    mine = [ablation for ablation in ablations if ablation.layer == layer]
    nodes = [checked(subject, prepared, ablation.node) for ablation in mine]
    so_far = dataclasses.replace(prepared, shifts=_on_device(layers, deltas))
    # Whatever the objective, the writes are the same; this one is compiled with most others.
    nothing = schema.Projection(site='resid.post_emb', direction=[0.0] * config.d_model)
    found = run(subject, _asked(subject, so_far, nothing))
    write_nd = effects.describe(subject.model, prepared.saes, found, nodes).write_nd
    stream_td = jax.device_get(found.acts[objectives.stream_site(2 * layer)][0])
    layers[slot] = layer
    # Heads that share a key or value have it changed together.
    group_of = lambda ablation: ablation.head // (1 if ablation.into == 'q' else config.n_head // n_kv)
    taken = {}
    for i, ablation in enumerate(mine):
      taken.setdefault((ablation.into, group_of(ablation)), {})[nodes[i]] = i  # a node once
    for (name, group), chosen in taken.items():
      changed_td = stream_td.copy()
      np.subtract.at(changed_td, [node.token for node in chosen], write_nd[list(chosen.values())])
      change = jax.device_get(_qkv_change(subject.model.h[layer], stream_td, changed_td))
      deltas[name][slot, :, group] = change['qkv'.index(name)][:, group]
  return _on_device(layers, deltas)


def _on_device(layers, deltas):
  return interventions.Shifts(layers.copy(), {name: interventions.on_device(x) for name, x in deltas.items()})


def _check_edge(subject, ablation):
  config, node = subject.model.config, ablation.node
  check_index(ablation.layer, config.n_layer, 'layer')
  check_index(ablation.head, config.n_head, 'head')
  if node.kind not in ('embedding', 'head', 'head_token', 'neuron', 'latent', 'layer'):
    raise ValueError(
      f'the edge from {node.label} cannot be cut; those of embeddings, heads, neurons, latents, layers can'
    )
  layer = objectives.split_site(node.site)[0] if node.kind == 'latent' and node.site else node.layer
  if layer is not None and layer >= ablation.layer:
    raise ValueError(f'{node.label} is not upstream of heads of layer {ablation.layer}')


@jax.jit
def _qkv_change(block, stream_td, changed_td):
  read = lambda x_td: block.attn.qkv(block.attn_ln(x_td[None], sites.Tap()), jnp.arange(len(x_td))[None])
  return [(changed - was)[0] for changed, was in zip(read(changed_td), read(stream_td), strict=True)]


@jax.jit
def _final(model, tokens_bt):
  """Returns the final normed stream [token, d_model] of a run without any edit."""
  return sites.forward(model, tokens_bt, capture=('resid.post_ln_f',))[1]['resid.post_ln_f'][0]


# Values of other runs


N_MEAN_WINDOWS = 64  # of the sample, that means are of
HELD_SITES = (
  'h.*.attn.qk_probs',
  'h.*.attn.v',
  'h.*.attn.v_out',
  'h.*.mlp.post_act',
  'resid.post_emb',
  'h.*.resid.delta_*',
)


@jax.jit
def _plain_acts(model, saes, tokens_bt):
  capture = (*HELD_SITES, *(f'{site}.latents' for site in saes))
  splices = [sites.splice(site, sae) for site, sae in saes.items()]
  return sites.forward(model, tokens_bt, splices, capture=capture)[1]


def held_by(subject: Subject, saes: dict, ablations: Sequence[schema.Ablation], n_tokens: int) -> interventions.Held:
  """Returns ablations as arrays, with the runs that they take values of.

  Raises:
    ValueError: as `interventions.held`; or there is no sample of text, or the other prompt is too short.
  """

  other_run = lambda to: other_acts(subject, saes, to, n_tokens)
  return interventions.held(subject, ablations, n_tokens, tuple(saes), other_run)


def other_acts(subject: Subject, saes: dict, to, n_tokens: int) -> dict[str, jax.Array]:
  """Returns the activations {site: [1, token or 1, ...]} of a `Mean`, `OtherPrompt` or `Resample`.

  Raises:
    ValueError: there is no sample of text, or the other prompt or the sample's windows are too short.
  """
  if isinstance(to, schema.Mean):
    return means(subject, tuple(saes))
  if isinstance(to, schema.OtherPrompt):
    other = subject.encode(to.prompt)
    if len(other) < n_tokens:
      raise ValueError(f'the other prompt has {len(other)} tokens and this one {n_tokens}; give as many or more')
    other = other[:n_tokens]
  else:
    sample_wt = _sample(subject)
    window = sample_wt[np.random.default_rng(to.seed).integers(len(sample_wt))]
    if len(window) < n_tokens:
      raise ValueError(f'the windows of the sample have {len(window)} tokens and the prompt {n_tokens}; shorten it')
    other = window[:n_tokens].tolist()
  return _plain_acts(subject.model, saes, subject.pad(other))


def _sample(subject: Subject) -> np.ndarray:
  if subject.sample_wt is None:
    raise ValueError('there is no sample of text to take means or resamples of; give the subject one (--sample)')
  return subject.sample_wt


@functools.lru_cache(maxsize=8)
def means(subject: Subject, sae_sites: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Returns the mean over the sample's tokens of all that can be held but attention patterns, {site: [1, 1, ...]}.

  Raises:
    ValueError: there is no sample.
  """
  saes = {site: subject.saes[site] for site in sae_sites}
  found = [jax.device_get(_mean(subject.model, saes, tokens_bt)) for tokens_bt in _windows(subject)]
  return jax.tree.map(lambda *x: np.mean(x, axis=0), *found)


def _windows(subject) -> np.ndarray:
  return _sample(subject)[:N_MEAN_WINDOWS, None].astype(np.int32)


@jax.jit
def _mean(model, saes, tokens_bt):
  acts = _plain_acts(model, saes, tokens_bt)
  return {site: x.mean(1, keepdims=True) for site, x in acts.items() if not site.endswith('qk_probs')}


# Answers


@dataclasses.dataclass(frozen=True)
class Analysis:
  """A request that has been run, and the nodes of its own table."""

  prepared: Prepared
  run: effects.Run
  found: effects.Found
  nodes: list[schema.Node]


def analyse(subject: Subject, request: schema.Request) -> Analysis:
  """Runs a request and finds its nodes: those it names, then those of the largest and smallest numbers."""
  prepared = prepare(subject, request)
  asked = [checked(subject, prepared, node) for node in request.nodes]
  found_run = run(subject, prepared)
  exact = objectives.is_linear(prepared.question, tuple(prepared.saes))
  found = effects.find(subject, prepared.saes, found_run, request.k, exact)
  if not np.isfinite(found.completeness.objective):
    raise ValueError('the numbers of this run are not finite; hold activations at smaller values')
  return Analysis(prepared, found_run, found, list(dict.fromkeys([*asked, *found.nodes])))


def describe(
  subject: Subject, analysis: Analysis, nodes: Sequence[schema.Node], writes: bool = False
) -> effects.Described | None:
  """Returns nodes of a request that has been run, None if there are none; `writes` says if `write_nd` is wanted."""
  if not nodes:
    return None
  if writes or not analysis.found.rows.keys() >= set(nodes):
    return effects.describe(subject.model, analysis.prepared.saes, analysis.run, nodes)
  return analysis.found.describe(nodes)


def answer(
  subject: Subject, request: schema.Request, analysis: Analysis, nodes: list[schema.Node], began: float
) -> schema.Response:
  """Returns the answer to a request that has been run, over these nodes; `began` is of `time.monotonic`."""
  prepared, found_run = analysis.prepared, analysis.run
  described = describe(subject, analysis, nodes, writes=request.n_tokens > 0)
  token, ablated = int(prepared.question.token), request.ablations or request.edge_ablations
  objective = analysis.found.completeness.objective
  return schema.Response(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    objective=objective,
    unedited=_unedited(subject, request) if ablated else None,
    traced_activation=objective if request.trace else None,
    table=tabulate(nodes, described),
    completeness=analysis.found.completeness,
    by_token=analysis.found.by_token,
    candidates=lens.candidates(
      subject, found_run.acts['resid.post_ln_f'][0], token, pinned_tokens(subject, request.objective)
    ),
    node_tokens=lens.node_tokens(subject, prepared.saes, found_run, nodes, described, request.n_tokens),
    seconds=time.monotonic() - began,
  )


def debug(subject: Subject, request: schema.Request, progress: Progress = silent) -> schema.Response:
  """Returns the answer to a request; the mesh is the ambient one.

  Raises:
    ValueError: something that the request names is not there, or cannot be asked.
  """
  began = time.monotonic()
  progress(0.0, 'running the model')
  analysis = analyse(subject, request)
  progress(0.6, 'reading nodes')
  return answer(subject, request, analysis, analysis.nodes, began)


def acts(subject: Subject, request: schema.ActsRequest, progress: Progress = silent) -> schema.ActsResponse:
  """Returns the activations of a component on a prompt: of a head, attention times the size of what it writes.

  Raises:
    ValueError: there is no such component, or the prompt is too long.
  """
  tokens = subject.encode(request.prompt)
  last = len(tokens) - 1
  where = {'layer': request.layer, 'site': request.site, 'index': request.index}
  node = schema.Node(kind=request.kind, token=last, source=last if request.kind == 'head' else None, **where)
  node = objectives.check_node(subject, node, len(tokens), tuple(subject.saes), (request.kind,))
  saes = {node.site: subject.saes[node.site]} if node.kind == 'latent' else {}
  found = _plain_acts(subject.model, saes, subject.pad(tokens))
  if node.kind == 'head':
    block, prefix = subject.model.h[node.layer], f'h.{node.layer}.attn'
    norms_s = _value_norms(block, found[f'{prefix}.v'][0], np.int32(node.index))
    values_ts = np.asarray(found[f'{prefix}.qk_probs'][0, node.index] * norms_s)[: len(tokens), : len(tokens)]
    values = values_ts.tolist()
  else:
    site = f'h.{node.layer}.mlp.post_act' if node.kind == 'neuron' else f'{node.site}.latents'
    values = np.asarray(found[site][0, : len(tokens), node.index]).tolist()
  return schema.ActsResponse(request=request, tokens=subject.tokens(tokens), values=values)


@jax.jit
def _value_norms(block, v_sgc, head):
  kernel_hcd = block.attn.c_proj.kernel[...]
  group = head // (len(kernel_hcd) // v_sgc.shape[1])
  return jnp.linalg.norm(jnp.einsum('sc,cd->sd', v_sgc[:, group], kernel_hcd[head]), axis=-1)


def warm(subject: Subject, lengths: Sequence[int] = LENGTHS[:3], progress: Progress = silent):
  """Compiles what requests of prompts up to these many tokens need, ablated to numbers or not, traced or not.

  Tables are of 10 a list. Continuations, and values of many other runs or layers at once, are compiled when asked for.
  """
  lengths = sorted({min(length, subject.model.config.n_ctx) for length in lengths})
  saes = dict(sorted(subject.saes.items()))
  if subject.sample_wt is not None:
    _mean(subject.model, saes, _windows(subject)[0])
  for i, length in enumerate(lengths):
    progress(i / len(lengths), f'compiling for prompts of {length} tokens')
    tokens = [0] * length
    prepared = _unasked(subject, saes, tokens, length, held_by(subject, saes, [], length))
    prepared = _asked(subject, prepared, schema.KL())
    _plain_acts(subject.model, saes, prepared.tokens_bt)
    for n_read in (0, 1):  # objectives that read no distribution, and those that read one
      asked = dataclasses.replace(prepared, question=dataclasses.replace(prepared.question, n_read=n_read))
      found_run = run(subject, asked)
      value(subject, asked)
    nodes = effects.find(subject, prepared.saes, found_run, 10, False).nodes
    described = effects.describe(subject.model, prepared.saes, found_run, nodes)
    stream_td = jax.device_get(found_run.acts['resid.post_emb'][0])
    _qkv_change(subject.model.h[0], stream_td, stream_td)
    lens.candidates(subject, found_run.acts['resid.post_ln_f'][0], length - 1, [])
    lens.node_tokens(subject, prepared.saes, found_run, nodes, described, 10)
    # However many nodes of a layer or SAE a table of 10 a list has.
    first = [schema.Node(kind='embedding', token=0), schema.Node(kind='neuron', layer=0, token=0, index=0)]
    first += [schema.Node(kind='latent', site=site, token=0, index=0) for site in saes]
    for size in effects.ROWS[:3]:
      effects.describe(subject.model, saes, found_run, first * size)
      lens.excited(subject.model, saes, found_run, first * size)
      lens.attributed(subject.model, saes, found_run, first * size)


def checked(subject, prepared, node):
  """Returns a node that was asked for, counted from 0. ValueError if it is not there."""
  sae_sites = tuple(prepared.saes)
  if node.kind in ('head', 'neuron', 'latent', 'embedding', 'head_token'):
    return objectives.check_node(subject, node, prepared.n_tokens, sae_sites, (node.kind,))
  own = node.kind == 'error' or (node.kind == 'bias' and node.layer is None)
  if own:
    check_sae(node.site, sae_sites)
  else:
    check_index(node.layer, subject.model.config.n_layer, 'layer')
  if node.kind == 'head_total':
    check_index(node.index, subject.model.config.n_head, 'head')
    return schema.Node(kind=node.kind, layer=node.layer, index=node.index)
  if not own and node.site not in ('attn', 'mlp'):
    given = 'is missing' if node.site is None else f'{node.site!r} is not there'
    raise ValueError(f"the site of a node of kind {node.kind} {given}; give 'attn' or 'mlp'")
  if node.token is None:
    raise ValueError(f'{node.label} has no token; say at which token of the prompt')
  return node.model_copy(
    update={'token': subject.position(node.token, prepared.n_tokens), 'source': None, 'index': None}
  )


def tabulate(nodes: list[schema.Node], described: effects.Described | None) -> schema.Table:
  """Returns a table of nodes; `described` is None if there are none."""
  if not nodes:
    return schema.Table(nodes=[], **{name: [] for name in COLUMNS})
  if any(np.isinf(getattr(described, name)).any() for name in COLUMNS):
    raise ValueError('effects of this run are not finite; hold activations at smaller values')
  numbers = lambda x_n: [None if math.isnan(x) else x for x in x_n.tolist()]
  return schema.Table(nodes=nodes, **{name: numbers(getattr(described, name)) for name in COLUMNS})


COLUMNS = 'activation', 'write_norm', 'direct_effect', 'total_effect'


def pinned_tokens(subject: Subject, objective) -> list[int]:
  """Returns the tokens that an objective names."""
  texts = [*getattr(objective, 'targets', []), *getattr(objective, 'distractors', [])]
  return list(dict.fromkeys(subject.token(text) for text in texts))


def _unedited(subject, request) -> float:
  return value(subject, prepare(subject, request.model_copy(update={'ablations': [], 'edge_ablations': []})))


@jax.jit
def _value(model, saes, tokens_bt, held, shifts, question):
  spliced = [f'{site}.input' for site in saes]
  streams = [objectives.stream_site(i) for i in range(2 * model.config.n_layer + 1)]
  edits = effects.edits(model, saes, held, shifts, question)
  acts = sites.forward(model, tokens_bt, edits, capture=(*objectives.READS, *streams, *spliced))[1]
  return objectives.value(question, model, saes, acts)


def value(subject: Subject, prepared: Prepared) -> float:
  """Returns the objective of a request: a forward pass."""
  p = prepared
  return float(_value(subject.model, p.saes, p.tokens_bt, p.held, p.shifts, p.question))
