"""A request -> its answer: runs the model, lists the nodes, and says what they do to the objective.

`debug` answers why this token and not that one, or, traced, why a node is as active as it is. What the other modules of
the debugger ask of a prompt begins with `prepare`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import effects, interventions, lens, objectives, schema
from jax_interp.debugger.subject import Subject
from models import sites

Progress = Callable[[float, str], None]  # told the share that is done and what is being done; may raise to stop


def silent(share: float, what: str):
  """Progress that nobody watches."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A request, ready to run: host arrays, and the SAEs it splices in, by site in order.

  Attributes:
    tokens: of the prompt, and of the continuation where there is one.
    n_tokens: how many.
    tokens_bt: the same, padded.
    objective: what is explained, a trace included.
  """

  tokens: list[int]
  tokens_bt: np.ndarray
  saes: dict[str, object]
  held: interventions.Held
  objective: object
  question: objectives.Question

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
  tokens_bt = subject.pad(tokens)
  held = held_by(subject, saes, request.ablations, tokens_bt, len(tokens))
  objective = request.objective if request.trace is None else traced(request.trace, request.objective)
  resolve = functools.partial(_resolve, subject, saes, tokens, tokens_bt, n_prompt, held)
  return Prepared(tokens, tokens_bt, saes, held, objective, resolve(objective))


def _resolve(subject, saes, tokens, tokens_bt, n_prompt, held, objective) -> objectives.Question:
  """Returns the arrays of an objective, with what only other runs know."""
  if isinstance(objective, schema.HeadWrite):
    if isinstance(objective.of, schema.HeadWrite | schema.AttentionLogit):
      raise ValueError(f'a head cannot write for an objective of kind {objective.of.kind}; choose another')
    found = objectives.question(subject, objective, n_prompt, len(tokens), tuple(saes), tokens)
    of = _resolve(subject, saes, tokens, tokens_bt, n_prompt, held, objective.of)
    if of.stream <= found.layer * 2:
      raise ValueError(f'{objective.node.label} is not upstream of what it is to write for')
    grad_td = run(subject, saes, tokens_bt, held, of, len(tokens)).grad_td
    return dataclasses.replace(found, direction_d=grad_td[found.token])
  found = objectives.question(subject, objective, n_prompt, len(tokens), tuple(saes), tokens)
  if isinstance(objective, schema.KL):
    z_td = unedited(subject, tokens_bt)
    found = dataclasses.replace(found, log_probs_v=_log_probs(subject.model, z_td, found.token))
  return found


def run(subject, saes, tokens_bt, held, question, n_tokens, extra=()) -> effects.Run:
  """Returns one run of a subject, on the ambient mesh."""
  return effects.run(subject.model, saes, tokens_bt, held, question, np.int32(n_tokens), extra)


@jax.jit
def _final(model, tokens_bt):
  return sites.forward(model, tokens_bt, capture=('resid.post_ln_f',))[1]['resid.post_ln_f'][0]


def unedited(subject: Subject, tokens_bt: np.ndarray) -> jax.Array:
  """Returns the final normed stream [token, d_model] of a run without any edit."""
  return _final(subject.model, jnp.asarray(tokens_bt))


@jax.jit
def _log_probs(model, z_td, token):
  return jax.nn.log_softmax(jnp.einsum('d,vd->v', z_td[token], model.unembedding, preferred_element_type=jnp.float32))


# Values of other runs


N_MEAN_WINDOWS = 64  # of the sample, that means are of
HELD_SITES = 'h.*.attn.qk_probs', 'h.*.attn.v_out', 'h.*.mlp.post_act', 'resid.post_emb', 'h.*.resid.delta_*'


@jax.jit
def _donor(model, saes, tokens_bt):
  capture = (*HELD_SITES, *(f'{site}.latents' for site in saes))
  splices = [sites.splice(site, sae) for site, sae in saes.items()]
  return sites.forward(model, tokens_bt, splices, capture=capture)[1]


def held_by(subject: Subject, saes: dict, ablations, tokens_bt: np.ndarray, n_tokens: int) -> interventions.Held:
  """Returns ablations as arrays, with the runs that they take values of.

  Raises:
    ValueError: as `interventions.held`; or there is no sample of text, or the other prompt is too short.
  """

  def donor_of(to):
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
    return {site: x[0] for site, x in _donor(subject.model, saes, subject.pad(other)).items()}

  return interventions.held(subject, ablations, n_tokens, tuple(saes), donor_of)


def _sample(subject: Subject) -> np.ndarray:
  if subject.sample_wt is None:
    raise ValueError('there is no sample of text to take means or resamples of; give the subject one (--sample)')
  return subject.sample_wt


@functools.lru_cache(maxsize=8)
def means(subject: Subject, sae_sites: tuple[str, ...]) -> dict[str, jax.Array]:
  """Returns the mean over the sample's tokens of all that can be held but attention patterns, {site: [1, ...]}.

  Raises:
    ValueError: there is no sample.
  """
  saes = {site: subject.saes[site] for site in sae_sites}
  windows = _sample(subject)[:N_MEAN_WINDOWS].astype(np.int32)
  found = [_mean(subject.model, saes, window[None]) for window in windows]
  return jax.tree.map(lambda *x: sum(x) / len(x), *found)


@jax.jit
def _mean(model, saes, tokens_bt):
  acts = _donor(model, saes, tokens_bt)
  return {site: x[0].mean(0, keepdims=True) for site, x in acts.items() if not site.endswith('qk_probs')}


# Answers


def debug(subject: Subject, request: schema.Request, progress: Progress = silent) -> schema.Response:
  """Returns the answer to a request; the mesh is the ambient one.

  Raises:
    ValueError: something that the request names is not there, or cannot be asked.
  """
  began = time.monotonic()
  prepared = prepare(subject, request)
  progress(0.1, 'running the model')
  found_run = run(subject, prepared.saes, prepared.tokens_bt, prepared.held, prepared.question, prepared.n_tokens)
  progress(0.4, 'listing nodes')
  exact = objectives.is_linear(prepared.question, tuple(prepared.saes))
  found = effects.find(subject.model, prepared.saes, found_run, request.k, exact)
  asked = [_checked(subject, prepared, node) for node in request.nodes]
  nodes = list(dict.fromkeys([*asked, *found.nodes]))
  described = effects.describe(subject.model, prepared.saes, found_run, nodes) if nodes else None
  progress(0.7, 'reading tokens')
  token = int(prepared.question.token)
  pinned = pinned_tokens(subject, request.objective)
  response = schema.Response(
    request=request,
    tokens=subject.tokens(prepared.tokens),
    objective=found.completeness.objective,
    unedited=_unedited(subject, prepared) if request.ablations or request.edge_ablations else None,
    traced_activation=found.completeness.objective if request.trace else None,
    table=tabulate(nodes, described),
    completeness=found.completeness,
    by_token=found.by_token,
    candidates=lens.candidates(subject, found_run.acts['resid.post_ln_f'][0], token, pinned),
    node_tokens=lens.node_tokens(subject, prepared.saes, found_run, nodes, described, request.n_tokens),
    seconds=time.monotonic() - began,
  )
  progress(1.0, 'done')
  return response


def _checked(subject, prepared, node):
  """Returns a node that was asked for, counted from 0. ValueError if it is not there."""
  sae_sites = tuple(prepared.saes)
  if node.kind in ('head', 'neuron', 'latent', 'embedding', 'head_token'):
    return objectives.check_node(subject, node, prepared.n_tokens, sae_sites, (node.kind,))
  own = node.kind == 'error' or (node.kind == 'bias' and node.layer is None)
  if own and node.site not in sae_sites:
    raise ValueError(f'no SAE is spliced in at {node.site!r}; there is one at {list(sae_sites) or "no site"}')
  if not own and (node.layer is None or node.layer >= subject.model.config.n_layer):
    raise ValueError(f'layer {node.layer} is not there; there are {subject.model.config.n_layer}, from 0')
  if node.kind == 'head_total':
    if node.index is None or node.index >= subject.model.config.n_head:
      raise ValueError(f'head {node.index} is not there; there are {subject.model.config.n_head}, from 0')
    return schema.Node(kind=node.kind, layer=node.layer, index=node.index)
  if not own and node.site not in ('attn', 'mlp'):
    raise ValueError(f"{node.kind} of {node.site!r} is not there; site is 'attn' or 'mlp'")
  if node.token is None:
    raise ValueError(f'{node.label} has no token; say at which token of the prompt')
  return node.model_copy(
    update={'token': subject.position(node.token, prepared.n_tokens), 'source': None, 'index': None}
  )


def tabulate(nodes: list[schema.Node], described: effects.Described | None) -> schema.Table:
  """Returns a table of nodes; `described` is None if there are none."""
  if not nodes:
    return schema.Table(nodes=[], **{name: [] for name in COLUMNS})
  columns = jax.device_get({name: getattr(described, name) for name in COLUMNS})
  numbers = lambda x_n: [None if np.isnan(x) else float(x) for x in x_n]
  return schema.Table(nodes=nodes, **{name: numbers(columns[name]) for name in COLUMNS})


COLUMNS = 'activation', 'write_norm', 'direct_effect', 'total_effect'


def pinned_tokens(subject: Subject, objective) -> list[int]:
  """Returns the tokens that an objective names."""
  texts = [*getattr(objective, 'targets', []), *getattr(objective, 'distractors', [])]
  return list(dict.fromkeys(subject.token(text) for text in texts))


def _unedited(subject, prepared) -> float:
  nothing = dataclasses.replace(
    prepared.held, cells=np.zeros_like(prepared.held.cells), values=np.zeros_like(prepared.held.values), donors=()
  )
  return float(value(subject, prepared, nothing))


@jax.jit
def _value(model, saes, tokens_bt, held, question, extra):
  spliced = [f'{site}.input' for site in saes]
  streams = [objectives.stream_site(i) for i in range(2 * model.config.n_layer + 1)]
  edits = effects.edits(model, saes, held, question, extra)
  acts = sites.forward(model, tokens_bt, edits, capture=(*objectives.READS, *streams, *spliced))[1]
  return objectives.value(question, model, saes, acts)


def value(subject: Subject, prepared: Prepared, held: interventions.Held, extra: tuple = ()) -> jax.Array:
  """Returns the objective of a prepared request under other ablations, []; a forward pass."""
  return _value(subject.model, prepared.saes, prepared.tokens_bt, held, prepared.question, extra)
