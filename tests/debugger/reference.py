"""The debugger's numbers worked out again, in NumPy and float64, without automatic differentiation.

`forward` is a pass of either family from its parameters in which any activation can be changed. A `Reference` is one
question about one prompt: it measures effects by changing what a node gives by a part in a million, up and down, with
only that held which the definitions hold: the scale of the norm that the objective is read
through, and for a trace what it does not go through. It knows nothing of the debugger but the schema.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jax_interp.debugger import schema

STEP = 1e-6  # of central differences, relative to what is changed: errors of about 1e-9
LOT = 256  # perturbed runs in memory together
ATOL = 2e-6  # of float32 numbers of order 1; effects of single nodes are of order 0.01
COLUMNS = 'activation', 'write_norm', 'direct_effect', 'total_effect'


def _array(parameter) -> np.ndarray:
  return np.asarray(parameter[...], np.float64)


def _linear(layer, subscripts, x):
  y = np.einsum(subscripts, x, _array(layer.kernel), optimize=True)
  return y if layer.bias is None else y + _array(layer.bias)


def _rotated(x_bthc, config):
  """Returns x with channels i and i + d_head / 2, as one complex number, turned by position * theta^(-2 i / d_head)."""
  n_pairs = config.d_head // 2
  frequency_c = config.rope_theta ** (-np.arange(n_pairs) / n_pairs) / (np.array(config.rope_divisors or 1.0))
  turned = x_bthc[..., :n_pairs] + 1j * x_bthc[..., n_pairs:]
  turned = turned * np.exp(1j * np.arange(x_bthc.shape[1])[:, None, None] * frequency_c)
  return np.concatenate([turned.real, turned.imag], -1)


def softmax(x):
  """Returns the softmax over the last axis."""
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def log_softmax(x):
  """Returns the logarithm of the softmax over the last axis."""
  return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Dictionary:
  """An SAE: what it reads of an input, and what latents write."""

  sae: object

  def normed(self, x):
    """Returns the normalised x [..., d], its mean and its scale."""
    if self.sae.normalization == 'none':
      return x, np.zeros_like(x[..., :1]), np.ones_like(x[..., :1])
    mean = x.mean(-1, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).sum(-1, keepdims=True))
    if self.sae.normalization == 'layer_norm_std':
      deviation /= np.sqrt(x.shape[-1] - 1)
    return (x - mean) / (deviation + 1e-5), mean, deviation + 1e-5

  def read(self, normed):
    """Returns pre-activations [..., latent] of a normalised input."""
    return (normed - _array(self.sae.pre_bias)) @ _array(self.sae.encoder).T + _array(self.sae.latent_bias)

  def latents(self, x):
    """Returns the latents of x: the k largest pre-activations, those of them that are positive."""
    preacts = self.read(self.normed(x)[0])
    kth = np.sort(preacts, -1)[..., -self.sae.k, None]
    return np.where((preacts >= kth) & (preacts > 0), preacts, 0)

  def write(self, latents, x):
    """Returns what latents write [..., d], in the scale of the input x."""
    return latents @ _array(self.sae.decoder) * self.normed(x)[2]

  def constant(self, x):
    """Returns what is written without any latent."""
    _, mean, scale = self.normed(x)
    return _array(self.sae.pre_bias) * scale + mean


def forward(model, tokens_t, saes: Mapping = {}, held: Mapping = {}, nudged: Mapping = {}) -> dict[str, np.ndarray]:
  """Returns {site: activation [run, ...]} of a prompt, in the order in which they are computed.

  Args:
    model: whose parameters are read.
    tokens_t: the prompt.
    saes: {site: SAE}; each reads its site, and adds what changed latents and error come to beyond the unchanged ones.
    held: {site: function of its activation}, applied first.
    nudged: the same, applied behind the SAE at a site, where there is one; it may return several runs of one.
  """
  acts, config = {}, model.config

  def tap(site, x):
    x = held[site](x) if site in held else x
    if site in saes:
      dictionary = Dictionary(saes[site])
      flat = tap(f'{site}.input', x.reshape(*x.shape[:2], -1))
      latents = dictionary.latents(flat)
      error = flat - dictionary.write(latents, flat) - dictionary.constant(flat)
      changed = tap(f'{site}.latents', latents)
      added = tap(f'{site}.error', error) - error
      flat = flat + dictionary.write(changed - latents, flat) + added
      x = flat.reshape(*flat.shape[:2], *x.shape[2:])
    x = nudged[site](x) if site in nudged else x
    acts[site] = x
    return x

  def norm(name, layer, x):
    if hasattr(layer, 'bias'):
      x = x - x.mean(-1, keepdims=True)
    eps = layer.eps if hasattr(layer, 'eps') else 1e-5
    scale = tap(f'{name}.scale', np.sqrt((x**2).mean(-1, keepdims=True) + eps))
    return x / scale * _array(layer.gain) + (_array(layer.bias) if hasattr(layer, 'bias') else 0)

  def attention(name, layer, x):
    if hasattr(layer, 'c_attn'):
      q, k, v = np.moveaxis(_linear(layer.c_attn, 'btd,dxhc->btxhc', x), 2, 0)
    else:
      q, k, v = (_linear(part, 'btd,dhc->bthc', x) for part in (layer.c_q, layer.c_k, layer.c_v))
      q, k = _rotated(q, config), _rotated(k, config)
    q, k, v = tap(f'{name}.q', q), tap(f'{name}.k', k), tap(f'{name}.v', v)
    group = [h * k.shape[2] // q.shape[2] for h in range(q.shape[2])]  # of keys and values, of each head
    logits = np.einsum('bthc,bshc->bhts', q, k[:, :, group], optimize=True) / np.sqrt(q.shape[-1])
    logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf)
    probs = tap(f'{name}.qk_probs', softmax(logits))
    v_out = tap(f'{name}.v_out', np.einsum('bhts,bshc->bthc', probs, v[:, :, group], optimize=True))
    return _linear(layer.c_proj, 'bthc,hcd->btd', v_out)

  def mlp(name, layer, x):
    p = tap(f'{name}.pre_act', _linear(layer.c_fc, 'btd,dn->btn', x))
    if hasattr(layer, 'c_up'):
      m = p / (1 + np.exp(-p)) * _linear(layer.c_up, 'btd,dn->btn', x)
    else:
      m = p / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (p + 0.044715 * p * p * p)))
    return _linear(layer.c_proj, 'btn,nd->btd', tap(f'{name}.post_act', m))

  r = _array(model.wte.embedding)[list(tokens_t)]
  if hasattr(model, 'wpe'):
    r = r + _array(model.wpe.embedding)[: len(tokens_t)]
  r = tap('resid.post_emb', r[None])
  for i, block in enumerate(model.h):
    for part, read in (('attn', attention), ('mlp', mlp)):
      normed = norm(f'h.{i}.{part}_ln', getattr(block, f'{part}_ln'), r)
      r = r + tap(f'h.{i}.resid.delta_{part}', read(f'h.{i}.{part}', getattr(block, part), normed))
      r = tap(f'h.{i}.resid.post_{part}', r)
  acts['logits'] = norm('ln_f', model.ln_f, r) @ _array(model.unembedding).T
  return acts


@dataclasses.dataclass(frozen=True)
class Reading:
  """What an objective is: a function of the activations of runs, the stream it is read from, and what is held."""

  of: Callable  # {site: [run, ...]} -> [run]
  stream: str
  scales: tuple[str, ...]


class Reference:
  """One question about one prompt.

  Args:
    subject: model, SAEs, tokenizer.
    objective: of the schema; a trace is asked for by the objective that it comes to.
    sites: of the SAEs that are spliced in.
    held: as for `forward`.
    tokens: of the prompt; those of a continuation behind it.
    n_prompt: how many are the prompt's.
  """

  def __init__(self, subject, objective, tokens, sites=(), held: Mapping = {}, n_prompt: int | None = None):
    self.subject, self.model, self.tokens = subject, subject.model, tokens
    self.n_prompt = n_prompt or len(tokens)
    self.saes = {site: subject.saes[site] for site in sites}
    self.held = held
    self.base = self._forward({})
    self.reading = self._reading(objective)
    self.objective = float(self.reading.of(self.base)[0])
    self._all = {}

  def _forward(self, nudged):
    return forward(self.model, self.tokens, self.saes, self.held, nudged)

  def _frozen(self, scales):
    return {name: (lambda _, name=name: self.base[name]) for name in scales}

  def slope(self, site: str, delta: np.ndarray, frozen: tuple[str, ...] | None = None) -> np.ndarray:
    """Returns the derivatives [run] of the objective along each delta [run, ...] of the activation at a site.

    Args:
      site: what is changed.
      delta: by how much; as many runs.
      frozen: norm scales that are held at those of the base run; None: those that the definitions hold.
    """
    held = self._frozen(self.reading.scales if frozen is None else frozen)
    found = []
    for lot in np.split(delta, range(LOT, len(delta), LOT)):
      up, down = (
        self.reading.of(self._forward(held | {site: (lambda x, h=h, lot=lot: x + h * lot)})) for h in (STEP, -STEP)
      )
      found.append(np.broadcast_to((up - down) / (2 * STEP), len(lot)))
    return np.concatenate(found)

  def after(self, site: str, delta: np.ndarray) -> np.ndarray:
    """Returns the objective [run] when each delta is really added, the scales that the definitions hold held."""
    held = self._frozen(self.reading.scales)
    return np.broadcast_to(self.reading.of(self._forward(held | {site: lambda x: x + delta})), len(delta))

  # Objectives

  def _reading(self, objective) -> Reading:
    last = f'h.{self.model.config.n_layer - 1}.resid.post_mlp'
    to_logits = lambda of: Reading(lambda acts: of(acts['logits']), last, ('ln_f.scale',))
    ids = lambda texts: [self.subject.token(text) for text in texts]
    match objective:
      case schema.LogitDifference():
        t, targets, distractors = self._at(objective.token), ids(objective.targets), ids(objective.distractors)
        return to_logits(lambda x: x[:, t, targets].mean(-1) - (x[:, t, distractors].mean(-1) if distractors else 0))
      case schema.LogProbability():
        t, targets = self._at(objective.token), ids(objective.targets)
        return to_logits(lambda x: log_softmax(x[:, t])[:, targets].mean(-1))
      case schema.Continuation():
        places = np.arange(self.n_prompt - 1, len(self.tokens) - 1)
        return to_logits(lambda x: log_softmax(x)[:, places, np.array(self.tokens)[places + 1]].sum(-1))
      case schema.Entropy():
        t = self._at(objective.token)
        return to_logits(lambda x: -(softmax(x[:, t]) * log_softmax(x[:, t])).sum(-1))
      case schema.KL():
        t = self._at(objective.token)
        clean_v = log_softmax(forward(self.model, self.tokens)['logits'][0, t])
        return to_logits(lambda x: (np.exp(clean_v) * (clean_v - log_softmax(x[:, t]))).sum(-1))
      case schema.Projection():
        t, direction_d = self._at(objective.token), np.array(objective.direction)
        return Reading(lambda acts: acts[objective.site][:, t] @ direction_d, objective.site, ())
      case schema.PreActivation():
        return self._pre_activation(objective.node)
      case schema.AttentionLogit():
        return self._attention_logit(objective.node, objective.through)
      case schema.HeadWrite():
        return self._head_write(objective.node, objective.through, objective.of)

  def _at(self, token):
    return range(self.n_prompt)[token]

  def _before(self, layer, part):
    """Returns the stream that a part of a layer reads, and the scale of the norm between them."""
    if part == 'mlp':
      return f'h.{layer}.resid.post_attn', (f'h.{layer}.mlp_ln.scale',)
    return f'h.{layer - 1}.resid.post_mlp' if layer else 'resid.post_emb', (f'h.{layer}.attn_ln.scale',)

  def _pre_activation(self, node):
    t, i = node.token, node.index
    if node.kind == 'neuron':
      return Reading(lambda acts: acts[f'h.{node.layer}.mlp.pre_act'][:, t, i], *self._before(node.layer, 'mlp'))
    dictionary, source = Dictionary(self.saes[node.site]), f'{node.site}.input'
    scale = dictionary.normed(self.base[source])[2]

    def of(acts):
      x = acts[source]
      mean = dictionary.normed(x)[1]
      return dictionary.read((x - mean) / scale)[:, t, i]

    name = node.site.split('.')[-1]
    if name in ('post_emb', 'post_attn', 'post_mlp'):
      return Reading(of, source, ())
    part = 'attn' if name in ('v_out', 'delta_attn') else 'mlp'
    return Reading(of, *self._before(int(node.site.split('.')[1]), part))

  def _group(self, node):
    return node.index * self.base[f'h.{node.layer}.attn.k'].shape[2] // self.model.config.n_head

  def _attention_logit(self, node, through):
    q_site, k_site = f'h.{node.layer}.attn.q', f'h.{node.layer}.attn.k'

    def of(acts):
      q = (acts if 'q' in through else self.base)[q_site][:, node.token, node.index]
      k = (acts if 'k' in through else self.base)[k_site][:, node.source, self._group(node)]
      return (q * k).sum(-1) / np.sqrt(q.shape[-1])

    return Reading(of, *self._before(node.layer, 'attn'))

  def _head_write(self, node, through, objective):
    prefix, t, s = f'h.{node.layer}.attn', node.token, node.source
    then = Reference(self.subject, objective, self.tokens, tuple(self.saes), self.held, self.n_prompt)
    stream = then.reading.stream
    unit = np.zeros((self.model.config.d_model, len(self.tokens), self.model.config.d_model))
    unit[:, t] = np.eye(self.model.config.d_model)
    read_c = _array(self.model.h[node.layer].attn.c_proj.kernel)[node.index] @ then.slope(stream, unit)

    def of(acts):
      probs = (acts if through == 'all' else self.base)[f'{prefix}.qk_probs'][:, node.index, t, s]
      return probs * (acts[f'{prefix}.v'][:, s, self._group(node)] @ read_c)

    return Reading(of, *self._before(node.layer, 'attn'))

  # Nodes

  def part(self, node: schema.Node) -> tuple[str, np.ndarray]:
    """Returns the site of a node and what of the activation there is the node's, zero elsewhere."""
    if node.kind == 'embedding':
      before_sae = 'resid.post_emb.input'  # where a latent of that SAE itself is traced
      site = before_sae if self.reading.stream == before_sae else 'resid.post_emb'
      return site, self._at_token(self.base[site][0], node.token)
    if node.kind == 'layer':
      site = f'h.{node.layer}.resid.delta_{node.site}'
      return site, self._at_token(self.base[site][0], node.token)
    if node.kind == 'bias' and node.layer is not None:
      site, layer = f'h.{node.layer}.resid.delta_{node.site}', getattr(self.model.h[node.layer], node.site)
      bias_d = 0 if layer.c_proj.bias is None else _array(layer.c_proj.bias)
      return site, self._at_token(np.broadcast_to(bias_d, self.base[site][0].shape), node.token)
    if node.kind == 'bias':
      constant = Dictionary(self.saes[node.site]).constant(self.base[f'{node.site}.input'][0])
      return f'{node.site}.error', self._at_token(constant, node.token)
    if node.kind == 'error':
      return f'{node.site}.error', self._at_token(self.base[f'{node.site}.error'][0], node.token)
    if node.kind == 'latent':
      where, site = (node.token, node.index), f'{node.site}.latents'
    elif node.kind == 'neuron':
      where, site = (node.token, node.index), f'h.{node.layer}.mlp.post_act'
    elif node.kind != 'head' and (site := f'h.{node.layer}.attn.v_out') in self.held:  # what is held are not its pairs
      where = (slice(None) if node.token is None else node.token, node.index)
    else:
      rest = {'head': (node.token, node.source), 'head_token': (node.token,), 'head_total': ()}[node.kind]
      where, site = (node.index, *rest), f'h.{node.layer}.attn.qk_probs'
    x = self.base[site][0]
    mine = np.zeros_like(x)
    mine[where] = x[where]
    return site, mine

  def _at_token(self, x_td, token):
    return np.where(np.arange(len(x_td))[:, None] == token, x_td, 0)

  def write(self, node: schema.Node) -> np.ndarray:
    """Returns what a node adds to the residual stream, [token, d_model]."""
    mine = self.part(node)[1]
    block = self.model.h[node.layer] if node.layer is not None else None
    if node.kind in ('head_token', 'head_total') and f'h.{node.layer}.attn.v_out' in self.held:
      return mine[:, node.index] @ _array(block.attn.c_proj.kernel)[node.index]
    if node.kind in ('head', 'head_token', 'head_total'):
      v_sc = self.base[f'h.{node.layer}.attn.v'][0, :, self._group(node)]
      return mine[node.index] @ v_sc @ _array(block.attn.c_proj.kernel)[node.index]
    if node.kind == 'neuron':
      return mine @ _array(block.mlp.c_proj.kernel)
    if node.kind in ('embedding', 'layer') or (node.kind == 'bias' and block is not None):
      return mine
    if node.kind == 'latent':
      mine = Dictionary(self.saes[node.site]).write(mine, self.base[f'{node.site}.input'][0])
    if node.site.endswith(('v_out', 'post_act')):
      _, layer, part, _ = node.site.split('.')
      kernel = _array(getattr(self.model.h[int(layer)], part).c_proj.kernel)
      return mine @ kernel.reshape(-1, kernel.shape[-1])
    return mine

  def is_upstream(self, node: schema.Node) -> bool:
    """Returns whether the stream that the objective is read from holds what the node writes."""
    order = list(self.base)
    return order.index(self.part(node)[0]) <= order.index(self.reading.stream)

  def cut(self, node: schema.Node) -> np.ndarray:
    """Returns where [token, 1] what the node writes is lost: what its layer's attention or MLP adds is held there."""
    parts = {'v_out': 'attn', 'post_act': 'mlp', 'attn': 'attn', 'mlp': 'mlp', None: 'mlp'}
    part = 'attn' if node.kind.startswith('head') else parts.get(node.site and node.site.split('.')[-1])
    layer = int(node.site.split('.')[1]) if node.site in self.saes and part else node.layer
    lost = np.zeros((len(self.tokens), 1), bool)
    held_at = lambda site: (self.held[site](self.base[site]) == self.held[site](self.base[site] + 1)).all(-1)[0]
    if (site := f'h.{layer}.resid.delta_{part}') in self.held and node.kind != 'layer':
      lost |= held_at(site)[:, None]
    if (site := f'h.{layer}.attn.v_out') in self.held and node.kind == 'head':  # no pair is what a held head gives
      lost |= held_at(site)[:, node.index, None]
    return lost

  def direct_effects(self, nodes: list[schema.Node]) -> np.ndarray:
    """Returns what each node's write does [node], along the objective's slope at the stream it is read from."""
    if not nodes:
      return np.zeros(0)
    writes = np.stack([np.where(self.cut(node), 0, self.write(node)) for node in nodes])
    upstream = np.array([self.is_upstream(node) for node in nodes])
    return np.where(upstream, self.slope(self.reading.stream, writes), 0)

  def columns(self, nodes: list[schema.Node]) -> dict[str, np.ndarray]:
    """Returns the columns [node] of a table; nan where undefined."""
    found = {name: np.full(len(nodes), np.nan) for name in COLUMNS}
    found['direct_effect'] = self.direct_effects(nodes)
    by_site = {}
    for i, node in enumerate(nodes):
      by_site.setdefault(self.part(node)[0], []).append(i)
    for site, numbers in by_site.items():
      parts = np.stack([self.part(nodes[i])[1] for i in numbers])
      for mine, i in zip(parts, numbers, strict=True):
        if nodes[i].kind == 'bias':  # which is added where its layer is held
          mine[self.cut(nodes[i])[:, 0]] = 0
      found['total_effect'][numbers] = self.slope(site, parts)
      for i in numbers:
        mine, write_td = self.part(nodes[i])[1], self.write(nodes[i])
        kind = nodes[i].kind
        if kind in ('head', 'neuron', 'latent'):
          found['activation'][i] = mine.sum()
        elif kind in ('embedding', 'bias'):
          found['activation'][i] = 1
        if kind != 'head_total':
          norm = np.sqrt((write_td**2).sum())
          found['write_norm'][i] = norm * (-1 if kind == 'neuron' and mine.sum() < 0 else 1)
    return found

  def all_columns(self, kind: str) -> dict[str, np.ndarray]:
    """Returns the columns of `nodes(kind)`, worked out once."""
    if kind not in self._all:
      self._all[kind] = self.columns(self.nodes(kind))
    return self._all[kind]

  def nodes(self, kind: str) -> list[schema.Node]:
    """Returns all nodes of a kind that may be in a table: causal, and without those that an SAE stands for."""
    config, tokens, node = self.model.config, range(len(self.tokens)), schema.Node
    stands = lambda i, *names: any(f'h.{i}.{name}' in self.saes for name in names)
    attn = [i for i in range(config.n_layer) if not stands(i, 'attn.v_out', 'resid.delta_attn')]
    mlps = [i for i in range(config.n_layer) if not stands(i, 'mlp.post_act', 'resid.delta_mlp')]
    heads = [(i, h) for i in attn for h in range(config.n_head)]
    if kind == 'embedding':
      return [node(kind=kind, token=t) for t in tokens]
    if kind == 'head':
      return [
        node(kind=kind, layer=i, index=h, token=t, source=s) for i, h in heads for t in tokens for s in range(t + 1)
      ]
    if kind == 'head_token':
      return [node(kind=kind, layer=i, index=h, token=t) for i, h in heads for t in tokens]
    if kind == 'head_total':
      return [node(kind=kind, layer=i, index=h) for i, h in heads]
    if kind == 'neuron':
      return [node(kind=kind, layer=i, token=t, index=n) for i in mlps for t in tokens for n in range(config.n_neurons)]
    if kind == 'latent':
      return [
        node(kind=kind, site=site, token=t, index=j)
        for site in sorted(self.saes)
        for t in tokens
        for j in range(self.saes[site].n_latents)
      ]
    own = [node(kind=kind, site=site, token=t) for site in sorted(self.saes) for t in tokens]
    if kind == 'error':
      return own
    layers = [(i, part) for i in range(config.n_layer) for part in ('attn', 'mlp')]
    parts = [node(kind=kind, layer=i, site=part, token=t) for i, part in layers for t in tokens]
    return parts + own if kind == 'bias' else parts


def explained(trace: schema.Trace | None, objective):
  """Returns the objective that a trace, if there is one, comes to."""
  if trace is None:
    return objective
  if trace.through is None:
    return schema.PreActivation(node=trace.node)
  if trace.through in ('v', 'all'):
    return schema.HeadWrite(node=trace.node, through=trace.through, of=explained(trace.downstream, objective))
  return schema.AttentionLogit(node=trace.node, through=trace.through)


def answer(subject, request: schema.Request, held: Mapping = {}) -> Reference:
  """Returns the reference of a request; its ablations are given as `held`."""
  tokens = subject.encode(request.prompt)
  text = getattr(request.objective, 'text', '')
  sites = sorted(subject.saes if request.saes is None else request.saes)
  objective = explained(request.trace, request.objective)
  return Reference(subject, objective, tokens + subject.tokenizer.encode(text), sites, held, len(tokens))


def column(table: schema.Table, name: str) -> np.ndarray:
  """Returns a column of a table, nan where it says None."""
  return np.array([np.nan if x is None else x for x in getattr(table, name)])


def assert_same(table: schema.Table, expected: Reference):
  """Asserts that all four columns of a table are those of the reference.

  They are float32 sums of up to a few hundred terms against float64, hence the tolerance; nan must be where nan is.
  """
  for name, values in expected.columns(table.nodes).items():
    np.testing.assert_allclose(column(table, name), values, rtol=2e-4, atol=ATOL, err_msg=name)
