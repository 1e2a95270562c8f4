"""Objectives as arrays: which number of a run is explained, without compiling anew for another.

`Question` is what `schema.Objective` comes to: a number that says which kind, and arrays of fixed shape. `value` reads
it off the activations of a run, differentiably; only the branch that is asked for is computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import schema
from jax_interp.debugger.subject import Subject, check_index, check_sae

N_SLOTS = 16  # token positions with a token each that an objective can be about
LOGITS, LOG_PROBS, TEXT, KL, ENTROPY, PROJECTION, NEURON, LATENT, ATTENTION, WRITE = range(10)
LINEAR = (LOGITS, PROJECTION, NEURON)  # in the residual stream they are read from, with the norm's scale held
THROUGH = {'q': (True, False), 'k': (False, True), 'qk': (True, True), 'v': (False, False), 'all': (True, True)}

# What `value` reads, of a whole run.
READS = ('resid.post_ln_f', 'h.*.mlp.pre_act', 'h.*.attn.q', 'h.*.attn.k', 'h.*.attn.v', 'h.*.attn.qk_probs')


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'kind', 'positions_k', 'tokens_k', 'weights_k', 'log_probs_v', 'direction_d', 'stream', 'layer', 'token', 'source',
    'index', 'through',
  ],
  meta_fields=['n_read'],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Question:
  """An objective.

  Attributes:
    kind: one of the constants above.
    positions_k, tokens_k, weights_k: of LOGITS and TEXT: sum of weight times the token's logit or log-probability at
      the position; of LOG_PROBS, the same, all at the first position; of KL and ENTROPY, the first position.
    log_probs_v: of KL: what the run is compared with.
    direction_d: of PROJECTION: the direction; of WRITE: the gradient that the head's write is projected on.
    stream: which residual stream the objective is read from: 0 the embedding, 2 i + 1 behind the attention of layer i,
      2 i + 2 behind its MLP.
    layer, token, source, index: of the node that NEURON, LATENT, ATTENTION, WRITE are of; of LATENT, layer is the
      number of the SAE among those spliced in. `token` is where every objective is read last.
    through: two booleans, whether gradients pass queries, and keys.
    n_read: at how many of positions_k the whole distribution of the next token is needed; another number compiles.
  """

  kind: int
  positions_k: np.ndarray
  tokens_k: np.ndarray
  weights_k: np.ndarray
  log_probs_v: jax.Array | np.ndarray
  direction_d: jax.Array | np.ndarray
  stream: int
  layer: int
  token: int
  source: int
  index: int
  through: np.ndarray
  n_read: int


def stream_site(stream: int) -> str:
  """Returns the site of a residual stream, numbered as in `Question`."""
  return 'resid.post_emb' if not stream else f'h.{(stream - 1) // 2}.resid.{("post_attn", "post_mlp")[1 - stream % 2]}'


def read_from(site: str) -> int:
  """Returns the residual stream that what stands at a site of a layer is computed from."""
  if site == 'resid.post_emb':
    return 0
  _, layer, *_, name = site.split('.')
  return (
    2 * int(layer) + {'v_out': 0, 'delta_attn': 0, 'post_act': 1, 'delta_mlp': 1, 'post_attn': 1, 'post_mlp': 2}[name]
  )


def question(
  subject: Subject, objective, n_prompt: int, n_tokens: int, sae_sites: tuple[str, ...], tokens: list[int]
) -> Question:
  """Returns the arrays of an objective; KL and head_write still lack what only other runs know.

  Args:
    subject: of the request.
    objective: any of `schema.Objective`.
    n_prompt: tokens of the prompt.
    n_tokens: with those of a continuation.
    sae_sites: where SAEs are spliced in, in the order of the run.
    tokens: of prompt and continuation.

  Raises:
    ValueError: a token, head, neuron, latent or site is not there.
  """
  config, at = subject.model.config, subject.position
  last_stream = 2 * config.n_layer
  fields = {
    'positions_k': np.zeros(N_SLOTS, np.int32),
    'tokens_k': np.zeros(N_SLOTS, np.int32),
    'weights_k': np.zeros(N_SLOTS, np.float32),
    'log_probs_v': np.zeros(config.n_vocab, np.float32),
    'direction_d': np.zeros(config.d_model, np.float32),
    'stream': last_stream,
    'layer': 0,
    'token': n_prompt - 1,
    'source': 0,
    'index': 0,
    'through': np.array([False, False]),
    'n_read': 0,
  }
  match objective:
    case schema.LogitDifference() | schema.LogProbability():
      t = at(objective.token, n_prompt)
      groups = [(objective.targets, 1.0), (getattr(objective, 'distractors', []), -1.0)]
      pairs = [(subject.token(text), sign / len(texts)) for texts, sign in groups for text in texts]
      fields |= _slots([(t, token, weight) for token, weight in _merged(pairs)]) | {'token': t}
      if objective.kind == 'logit_difference':
        fields['kind'] = LOGITS
      else:
        fields |= {'kind': LOG_PROBS, 'n_read': 1}
    case schema.Continuation():
      positions = range(n_prompt - 1, n_tokens - 1)
      if not 1 <= len(positions) <= N_SLOTS:
        raise ValueError(f'the continuation has {len(positions)} tokens; give 1 to {N_SLOTS}')
      fields |= _slots([(t, tokens[t + 1], 1.0) for t in positions]) | {'kind': TEXT, 'n_read': N_SLOTS}
    case schema.KL() | schema.Entropy():
      t = at(objective.token, n_prompt)
      fields |= _slots([(t, 0, 1.0)]) | {'token': t, 'n_read': 1}
      fields['kind'] = KL if objective.kind == 'kl' else ENTROPY
    case schema.Projection():
      sites = [stream_site(i) for i in range(last_stream + 1)]
      if objective.site not in sites:
        raise ValueError(f'{objective.site!r} is no residual stream; those are {sites[0]}, {sites[1]} to {sites[-1]}')
      if len(objective.direction) != config.d_model:
        raise ValueError(f'the direction has {len(objective.direction)} numbers; the stream has {config.d_model}')
      fields |= {'kind': PROJECTION, 'stream': sites.index(objective.site), 'token': at(objective.token, n_prompt)}
      fields['direction_d'] = np.array(objective.direction, np.float32)
    case schema.PreActivation():
      node = check_node(subject, objective.node, n_tokens, sae_sites, ('neuron', 'latent'))
      fields |= {'token': node.token, 'index': node.index}
      if node.kind == 'neuron':
        fields |= {'kind': NEURON, 'layer': node.layer, 'stream': 2 * node.layer + 1}
      else:
        fields |= {'kind': LATENT, 'layer': sae_sites.index(node.site), 'stream': read_from(node.site)}
    case schema.AttentionLogit() | schema.HeadWrite():
      node = check_node(subject, objective.node, n_tokens, sae_sites, ('head',))
      fields |= {'token': node.token, 'source': node.source, 'index': node.index, 'layer': node.layer}
      fields |= {'kind': ATTENTION if objective.kind == 'attention_logit' else WRITE, 'stream': 2 * node.layer}
      fields['through'] = np.array(THROUGH[objective.through])
  if not fields['weights_k'].any():  # no logits are read: nothing at another token matters
    fields['positions_k'] = np.full(N_SLOTS, fields['token'], np.int32)
  return Question(**fields)


def _merged(pairs):
  weights = {}
  for token, weight in pairs:
    weights[token] = weights.get(token, 0.0) + weight
  if len(weights) > N_SLOTS:
    raise ValueError(f'{len(weights)} different targets and distractors; give at most {N_SLOTS}')
  return weights.items()


def _slots(triples):
  positions, tokens, weights = np.zeros(N_SLOTS, np.int32), np.zeros(N_SLOTS, np.int32), np.zeros(N_SLOTS, np.float32)
  for i, (position, token, weight) in enumerate(triples):
    positions[i], tokens[i], weights[i] = position, token, weight
  positions[len(triples) :] = positions[0]
  return {'positions_k': positions, 'tokens_k': tokens, 'weights_k': weights}


def check_node(subject: Subject, node: schema.Node, n_tokens: int, sae_sites, kinds) -> schema.Node:
  """Returns the node with its tokens counted from 0.

  Raises:
    ValueError: it is of none of these kinds, or there is no such component or token.
  """
  if node.kind not in kinds:
    raise ValueError(f'{node.label} is of kind {node.kind}; here it must be one of {", ".join(kinds)}')
  config = subject.model.config
  if node.kind == 'latent':
    check_sae(node.site, sae_sites)
    check_index(node.index, subject.saes[node.site].n_latents, 'latent')
  elif node.kind != 'embedding':
    check_index(node.layer, config.n_layer, 'layer')
    neuron = node.kind == 'neuron'
    check_index(node.index, config.n_neurons if neuron else config.n_head, 'neuron' if neuron else 'head')
  if node.token is None:
    raise ValueError(f'{node.label} has no token; say at which token of the prompt')
  token, source = subject.position(node.token, n_tokens), None
  if node.kind == 'head':
    if node.source is None:
      raise ValueError(f'{node.label} has no source; say which token it attends to')
    source = subject.position(node.source, n_tokens, 'source')
    if source > token:
      raise ValueError(f'source {source} is behind token {token}; attention looks back')
  return node.model_copy(update={'token': token, 'source': source})


def value(question: Question, model, saes: dict, acts: dict) -> jax.Array:
  """Returns the objective [] of a run of one prompt, from the activations at READS, streams and inputs of the SAEs."""
  layers = []
  for n in range(model.config.n_layer):
    mine = {site.split('.', 2)[2]: x[0] for site, x in acts.items() if site.startswith(f'h.{n}.')}
    layers.append(picks(question, model.config.n_head, mine))
  own = {'resid.post_emb.input': acts['resid.post_emb.input'][0, question.token]} if 'resid.post_emb' in saes else {}
  z_kd = acts['resid.post_ln_f'][0, question.positions_k]
  return finish(
    question, model, saes, z_kd, {'resid.post_emb': acts['resid.post_emb'][0, question.token]} | own, layers
  )


def picks(question: Question, n_head: int, acts: dict, place=None) -> dict[str, jax.Array]:
  """Returns what the objective may be read from in a layer.

  Args:
    question: the objective.
    n_head: of the model.
    acts: of the layer, without the batch, by names as 'attn.q'; inputs of SAEs among them.
    place: of question.token in what is outside of attention; None: the same as in attention.
  """
  t, s, i = question.token, question.source, question.index
  p = t if place is None else place
  group = i // (n_head // acts['attn.k'].shape[1])
  found = {
    'attn.q': acts['attn.q'][t, i],
    'attn.k': acts['attn.k'][s, group],
    'attn.v': acts['attn.v'][s, group],
    'attn.qk_probs': acts['attn.qk_probs'][i, t, s],
    'mlp.pre_act': acts['mlp.pre_act'][p, i],
  }
  read = [name for name in acts if name.startswith('resid.post') or name.endswith('.input')]
  return found | {name: acts[name][t if name.startswith('attn.') else p] for name in read}


def finish(question: Question, model, saes: dict, z_kd: jax.Array, embedding: dict, layers: list[dict]) -> jax.Array:
  """Returns the objective [] of what `picks` found in each layer.

  Args:
    question: the objective.
    model: the subject model.
    saes: {site: SAE}, spliced in.
    z_kd: resid.post_ln_f at question.positions_k.
    embedding: {'resid.post_emb': [d_model]} at question.token, and the input of its SAE.
    layers: of `picks`.
  """
  held = lambda x, live: jnp.where(live, x, jax.lax.stop_gradient(x))
  at_layer = lambda name: jnp.stack([layer[name] for layer in layers])[question.layer].astype(jnp.float32)
  streams = [embedding['resid.post_emb']]
  for layer in layers:
    streams += [layer['resid.post_attn'], layer['resid.post_mlp']]
  inputs = []
  for site in saes:
    layer, name = split_site(site)
    inputs.append((embedding if layer is None else layers[layer])[f'{name}.input'].astype(jnp.float32))
  # What is large (unembedding, encoders) stays outside of the branches: XLA would copy it into each. Not so kernels, of
  # which a branch takes one head: those of all layers would have to be stacked.
  z_kd, index = z_kd.astype(jnp.float32), question.index
  read_kv = jnp.einsum('kd,vd->kv', z_kd[: question.n_read], model.unembedding, preferred_element_type=jnp.float32)
  kernels = [lambda head, block=block: block.attn.c_proj.kernel[...][head] for block in model.h]
  kernel_cd = jax.lax.switch(question.layer, kernels, index)
  pairs = zip(saes.values(), inputs, strict=True)
  small = {
    'logits_k': jnp.einsum('kd,kd->k', z_kd, model.unembedding[question.tokens_k].astype(jnp.float32)),
    'log_probs_kv': jax.nn.log_softmax(read_kv),
    'x_d': jnp.stack(streams)[question.stream].astype(jnp.float32),
    'pre_act': at_layer('mlp.pre_act'),
    'latents': [pre_activation(sae, x_d, index) for sae, x_d in pairs],
    'q_c': held(at_layer('attn.q'), question.through[0]),
    'k_c': held(at_layer('attn.k'), question.through[1]),
    'v_c': at_layer('attn.v'),
    'prob': held(at_layer('attn.qk_probs'), question.through.any()),
    'read_c': kernel_cd.astype(jnp.float32) @ question.direction_d,
  }

  def log_probs(x):
    first_v = x['log_probs_kv'][0]
    return jnp.sum(first_v[question.tokens_k] * question.weights_k)

  def text(x):
    found_k = jnp.take_along_axis(x['log_probs_kv'], question.tokens_k[:, None], 1)[:, 0]
    return jnp.sum(found_k * question.weights_k)

  def kl(x):
    first_v = x['log_probs_kv'][0]
    return jnp.sum(jnp.exp(question.log_probs_v) * (question.log_probs_v - first_v))

  def entropy(x):
    first_v = x['log_probs_kv'][0]
    return -jnp.sum(jnp.exp(first_v) * first_v)

  nothing = lambda x: jnp.zeros(())  # where no distribution was computed
  branches = {
    LOGITS: lambda x: x['logits_k'] @ question.weights_k,
    LOG_PROBS: log_probs if question.n_read else nothing,
    TEXT: text if question.n_read == N_SLOTS else nothing,
    KL: kl if question.n_read else nothing,
    ENTROPY: entropy if question.n_read else nothing,
    PROJECTION: lambda x: x['x_d'] @ question.direction_d,
    NEURON: lambda x: x['pre_act'],
    LATENT: lambda x: jnp.stack(x['latents'])[question.layer] if saes else nothing(x),
    ATTENTION: lambda x: x['q_c'] @ x['k_c'] * x['q_c'].shape[0] ** -0.5,
    WRITE: lambda x: x['prob'] * (x['v_c'] @ x['read_c']),
  }
  return jax.lax.switch(question.kind, [branches[kind] for kind in sorted(branches)], small)


def on_stream(site: str) -> bool:
  """Returns whether a site is the residual stream itself, not what a layer adds to it."""
  return split_site(site)[1] in ('resid.post_emb', 'resid.post_attn', 'resid.post_mlp')


def split_site(site: str) -> tuple[int | None, str]:
  """Returns the layer of a site, None for the embedding, and its name within the layer."""
  if site == 'resid.post_emb':
    return None, site
  _, layer, name = site.split('.', 2)
  return int(layer), name


def pre_activation(sae, x_d: jax.Array, index) -> jax.Array:
  """Returns the pre-activation [] of one latent; the scale of the SAE's input norm is a constant to gradients."""
  _, norm = sae.normalize(x_d)
  held_d = (x_d - norm.mean) / jax.lax.stop_gradient(norm.scale)
  return (held_d - sae.pre_bias[...]) @ sae.encoder[...][index] + sae.latent_bias[...][index]


def final_bias(question: Question, model, saes: dict, acts: dict, grad_z_td: jax.Array) -> jax.Array:
  """Returns what the objective is [] beyond the residual stream: the norm's and the reader's own constants.

  Args:
    question: the objective.
    model: the subject model.
    saes: {site: SAE}, spliced in.
    acts: as for `value`.
    grad_z_td: gradient of the objective at resid.post_ln_f.
  """
  t, s, i = question.token, question.source, question.index
  group = i // (model.config.n_head // acts['h.0.attn.k'].shape[2])
  positions_bt = jnp.stack([jnp.full((1,), t), jnp.full((1,), s)])

  def attention(x):
    found = []
    for n, block in enumerate(model.h):
      shift_btd = jnp.broadcast_to(block.attn_ln.shift, (2, 1, model.config.d_model))
      q_bthc, k_btgc, v_btgc = block.attn.qkv(shift_btd, positions_bt)
      q_c, k_c = acts[f'h.{n}.attn.q'][0, t, i], acts[f'h.{n}.attn.k'][0, s, group]
      through_q, through_k = q_bthc[0, 0, i] @ k_c, q_c @ k_btgc[1, 0, group]
      logit = jnp.where(question.through[0], through_q, 0) + jnp.where(question.through[1], through_k, 0)
      write_d = jnp.einsum('c,cd->d', v_btgc[1, 0, group], block.attn.c_proj.kernel[...][i])
      write = acts[f'h.{n}.attn.qk_probs'][0, i, t, s] * (write_d @ question.direction_d)
      found.append(jnp.where(question.kind == WRITE, write, logit * q_c.shape[0] ** -0.5))
    return jnp.stack(found)[question.layer].astype(jnp.float32)

  def neuron(x):
    mlps = [
      block.mlp.c_fc.kernel[...][:, i].astype(jnp.float32) @ block.mlp_ln.shift + _bias(block.mlp.c_fc, i)
      for block in model.h
    ]
    return jnp.stack(mlps)[question.layer]

  def latent(x):
    if not saes:
      return jnp.zeros(())
    bias = lambda sae: sae.latent_bias[...][i] - sae.pre_bias[...] @ sae.encoder[...][i]
    return jnp.stack([bias(sae) for sae in saes.values()])[question.layer]

  logits = lambda x: jnp.einsum('td,d->', grad_z_td.astype(jnp.float32), model.ln_f.shift)
  nothing = lambda x: jnp.zeros(())
  kinds = {PROJECTION: nothing, NEURON: neuron, LATENT: latent, ATTENTION: attention, WRITE: attention}
  return jax.lax.switch(question.kind, [kinds.get(kind, logits) for kind in range(WRITE + 1)], 0)


def _bias(linear, index):
  return 0.0 if linear.bias is None else linear.bias[...][index].astype(jnp.float32)


def is_linear(question: Question, sae_sites: tuple[str, ...]) -> bool:
  """Returns whether direct effects and biases add up to the objective exactly; see `schema.Completeness`."""
  if question.kind == ATTENTION:
    return question.through.sum() == 1
  if question.kind == WRITE:
    return not question.through.any()
  if question.kind == LATENT:
    return on_stream(sae_sites[question.layer])
  return question.kind in LINEAR
