"""Circuits against a NumPy float64 forward in which every reader reads a stream of its own."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jax_interp.debugger import circuits, engine, schema
from models import sharding, sites
from tests.debugger import subjects

FAMILIES = 'gpt2', 'llama'
OTHER = '40 17 5 12 9 50 31'
TOKENS = [int(word) for word in subjects.PROMPT.split()]
T = len(TOKENS)
NEURON = schema.Node(kind='neuron', layer=1, token=5, index=11)
HEAD = schema.Node(kind='head', layer=2, token=6, source=3, index=3)
DIRECTION = np.random.default_rng(3).normal(size=32).tolist()


# The reference


def _array(parameter):
  return np.asarray(parameter[...], np.float64)


def _norm(layer, x):
  if hasattr(layer, 'bias'):
    x = x - x.mean(-1, keepdims=True)
  eps = layer.eps if hasattr(layer, 'eps') else 1e-5
  shift = _array(layer.bias) if hasattr(layer, 'bias') else 0
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * _array(layer.gain) + shift


def _linear(layer, x, index=...):
  """Returns x [t, d] through a kernel [d, ...] and a bias, of which an index is taken."""
  kernel = _array(layer.kernel)[:, *index] if index is not ... else _array(layer.kernel)
  bias = 0 if layer.bias is None else _array(layer.bias)[index]
  return x @ kernel + bias


def _rotated(x_tc, config):
  half = config.d_head // 2
  angle = np.arange(len(x_tc))[:, None] * config.rope_theta ** (-np.arange(half) / half)
  turned = (x_tc[:, :half] + 1j * x_tc[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], 1)


def _projected(attn, x, part, j, config):
  """Returns the queries, keys or values [t, c] of one head."""
  if hasattr(attn, 'c_attn'):
    return _linear(attn.c_attn, x, ('qkv'.index(part), j))
  y = _linear(getattr(attn, f'c_{part}'), x, (j,))
  return y if part == 'v' else _rotated(y, config)


def passed(model, tokens, cut=None, carried=None, diffs=None, embedding=None):
  """Returns what stands at each reader, and what each writer writes, of one run.

  Args:
    model: of either family.
    tokens: the prompt.
    cut: {(writer, reader): share of it that is cut}.
    carried: {writer: what a cut edge carries}; None: nothing.
    diffs: {writer: what is taken from a reader where its edge is cut}; None: what is written in this run, minus that.
    embedding: in place of that of the tokens.
  """
  config, cut, acts = model.config, cut or {}, {}
  n_kv = model.h[0].attn.n_kv_head
  if embedding is None:
    embedding = _array(model.wte.embedding)[tokens]
    embedding = embedding + (_array(model.wpe.embedding)[: len(tokens)] if hasattr(model, 'wpe') else 0)
  writes, stream = {'embedding': embedding}, embedding

  def read(reader, streams):
    taken = 0
    for writer in writes:
      if share := cut.get((writer, reader), 0):
        own = writes[writer] - (0 if carried is None else carried[writer]) if diffs is None else diffs[writer]
        taken = taken + share * own
    return streams - taken

  for i, block in enumerate(model.h):
    outs = []
    for h in range(config.n_head):
      group = h * n_kv // config.n_head
      found = {}
      for part, j in (('q', h), ('k', group), ('v', group)):
        x = _norm(block.attn_ln, read(f'h.{i}.attn.{j}.{part}', stream))
        found[part] = acts[f'h.{i}.attn.{j}.{part}'] = _projected(block.attn, x, part, j, config)
      logits = np.where(np.tri(len(tokens)), found['q'] @ found['k'].T / np.sqrt(found['q'].shape[1]), -np.inf)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      acts[f'h.{i}.attn.{h}.probs'] = weights / weights.sum(-1, keepdims=True)
      outs.append(acts[f'h.{i}.attn.{h}.probs'] @ found['v'] @ _array(block.attn.c_proj.kernel)[h])
    writes |= {f'h.{i}.attn.{h}': out for h, out in enumerate(outs)}
    stream = stream + sum(outs) + (0 if block.attn.c_proj.bias is None else _array(block.attn.c_proj.bias))
    acts[f'h.{i}.post_attn'] = read('objective', stream)
    x = _norm(block.mlp_ln, read(f'h.{i}.mlp', stream))
    acts[f'h.{i}.mlp'] = p = _linear(block.mlp.c_fc, x)
    if hasattr(block.mlp, 'c_up'):
      post = p / (1 + np.exp(-p)) * _linear(block.mlp.c_up, x)
    else:
      post = p / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (p + 0.044715 * p**3)))
    writes[f'h.{i}.mlp'] = _linear(block.mlp.c_proj, post)
    stream = stream + writes[f'h.{i}.mlp']
  acts['logits'] = _norm(model.ln_f, read('logits', stream)) @ _array(model.unembedding).T
  return acts, writes


def log_softmax(x):
  return x - x.max() - np.log(np.exp(x - x.max()).sum())


def entropy(x):
  return -(np.exp(log_softmax(x)) * log_softmax(x)).sum()


GROUP = {'gpt2': 3, 'llama': 1}  # of keys and values that head 3 reads
# An objective, and the same of the reference's activations and those of its uncut run.
OBJECTIVES = {
  'logits': (
    schema.LogitDifference(targets=['8', '21'], distractors=['30']),
    lambda a, full, g: a['logits'][-1, [8, 21]].mean() - a['logits'][-1, 30],
  ),
  'log_probability': (
    schema.LogProbability(targets=['8'], token=4),
    lambda a, full, g: log_softmax(a['logits'][4])[8],
  ),
  'kl': (
    schema.KL(),
    lambda a, full, g: (
      np.exp(log_softmax(full['logits'][-1])) @ (log_softmax(full['logits'][-1]) - log_softmax(a['logits'][-1]))
    ),
  ),
  'entropy': (schema.Entropy(), lambda a, full, g: entropy(a['logits'][-1])),
  'projection': (
    schema.Projection(site='h.1.resid.post_attn', token=5, direction=DIRECTION),
    lambda a, full, g: a['h.1.post_attn'][5] @ np.array(DIRECTION),
  ),
  'neuron': (schema.PreActivation(node=NEURON), lambda a, full, g: a['h.1.mlp'][5, 11]),
  'attention': (
    schema.AttentionLogit(node=HEAD),
    lambda a, full, g: a['h.2.attn.3.q'][6] @ a[f'h.2.attn.{g}.k'][3] / np.sqrt(8),
  ),
  'attention_q': (
    schema.AttentionLogit(node=HEAD, through='q'),
    lambda a, full, g: a['h.2.attn.3.q'][6] @ full[f'h.2.attn.{g}.k'][3] / np.sqrt(8),
  ),
}


def asked(name, family, counterfactual=None, **changes):
  """Returns the subject, its setting and the run of a request."""
  subject = subjects.build(family, **{key: changes.pop(key) for key in ('sites',) if key in changes})
  prepared = engine.prepare(subject, subjects.request(OBJECTIVES[name][0], **changes))
  setting = circuits.setting(subject, prepared, counterfactual or schema.Value())
  zeros = np.zeros((setting.lot, *setting.graph.possible_rw.shape), np.float32)
  return subject, setting, circuits.run(setting, zeros, np.ones(setting.lot, np.float32))


def as_pairs(graph, cut_rw):
  return {(graph.writers[w], graph.readers[r]): float(cut_rw[r, w]) for r, w in np.argwhere(cut_rw)}


def carried_by(subject, counterfactual):
  """Returns what cut edges carry, by the reference."""
  if isinstance(counterfactual, schema.Value):
    return None
  if isinstance(counterfactual, schema.OtherPrompt):
    return passed(subject.model, [int(word) for word in counterfactual.prompt.split()])[1]
  runs = [passed(subject.model, window)[1] for window in subject.sample_wt]
  return {writer: np.mean([x[writer] for x in runs], (0, 1)) + np.zeros((T, 1)) for writer in runs[0]}


# The forward with edges cut


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('sites', [(), tuple(subjects.SAES)], ids=['no SAE', 'SAEs'])
def test_a_run_without_cuts_is_the_model(family, sites):
  _, setting, uncut = asked('logits', family, sites=sites)
  np.testing.assert_allclose(uncut.objective_b, engine.value(setting.subject, setting.prepared), atol=1e-5)


@pytest.mark.parametrize('family', [*FAMILIES, 'odd_llama'])
def test_cutting_all_edges_of_a_writer_is_its_ablation(family):
  subject, setting, uncut = asked('logits', family)
  writers = ['h.0.attn.3', 'h.1.mlp', 'h.2.attn.0']
  cuts = []
  for writer in writers:
    cuts.append(np.zeros(setting.graph.possible_rw.shape, bool))
    cuts[-1][:, setting.graph.writers.index(writer)] = True
  for writer, found in zip(writers, circuits.measure(setting, cuts, uncut), strict=True):
    _, layer, *head = writer.split('.')
    if head[0] == 'mlp':
      edit = sites.ablate(f'h.{layer}.resid.delta_mlp')
    else:
      edit = sites.ablate(
        f'h.{layer}.attn.v_out', (np.arange(subject.model.config.n_head) == int(head[1]))[None, None, :, None]
      )
    logits_v = np.asarray(sites.forward(subject.model, np.array([TOKENS]), [edit])[0][0, -1])
    np.testing.assert_allclose(found, logits_v[[8, 21]].mean() - logits_v[30], atol=2e-5)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_cut_edges_are_those_of_the_reference(family, name):
  subject, setting, uncut = asked(name, family)
  rng, (_, of) = np.random.default_rng(0), OBJECTIVES[name]
  cuts = [setting.graph.possible_rw * (rng.random(setting.graph.possible_rw.shape) < p) for p in (0.02, 0.1, 0.5, 1)]
  cuts.append(setting.graph.possible_rw * rng.random(setting.graph.possible_rw.shape))
  full, _ = passed(subject.model, TOKENS)
  for cut_rw, found in zip(cuts, circuits.measure(setting, cuts, uncut), strict=True):
    acts, _ = passed(subject.model, TOKENS, as_pairs(setting.graph, cut_rw))
    np.testing.assert_allclose(found, of(acts, full, GROUP[family]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('counterfactual', [schema.Mean(), schema.OtherPrompt(prompt=OTHER)], ids=lambda x: x.kind)
def test_cut_edges_carry_the_counterfactual(family, counterfactual):
  subject, setting, uncut = asked('logits', family, counterfactual)
  cut_rw = setting.graph.possible_rw * (np.random.default_rng(0).random(setting.graph.possible_rw.shape) < 0.3)
  carried = carried_by(subject, counterfactual)
  acts, _ = passed(subject.model, TOKENS, as_pairs(setting.graph, cut_rw), carried)
  expected = OBJECTIVES['logits'][1](acts, acts, 0)
  np.testing.assert_allclose(circuits.measure(setting, [cut_rw], uncut), expected, atol=1e-4)
  if isinstance(counterfactual, schema.OtherPrompt):  # all cut: the logits of that run, but for output biases
    everything = circuits.measure(setting, [setting.graph.possible_rw], uncut)[0]
    logits_v = passed(subject.model, [int(word) for word in OTHER.split()])[0]['logits'][-1]
    np.testing.assert_allclose(everything, logits_v[[8, 21]].mean() - logits_v[30], atol=1e-4)


def test_one_cut_edge_changes_the_queries_of_one_head():
  subject, setting, uncut = asked('logits', 'gpt2')
  graph, block = setting.graph, subject.model.h[2]
  cut_rw = np.zeros(graph.possible_rw.shape, bool)
  cut_rw[graph.readers.index('h.2.attn.1.q'), graph.writers.index('h.0.attn.3')] = True
  _, acts = sites.forward(subject.model, np.array([TOKENS]), capture=('h.0.attn.v_out', 'h.1.resid.post_mlp', '*.q'))
  kept_td = np.asarray(acts['h.1.resid.post_mlp'])[0] - np.asarray(
    acts['h.0.attn.v_out'][0, :, 3] @ subject.model.h[0].attn.c_proj.kernel[...][3]
  )
  q_tc = _linear(block.attn.c_attn, _norm(block.attn_ln, kept_td.astype(np.float64)), (0, 1))
  value_thc = np.array(acts['h.2.attn.q'][0])
  assert np.abs(value_thc[:, 1] - q_tc).max() > 1e-2
  value_thc[:, 1] = q_tc
  logits_v = sites.forward(subject.model, np.array([TOKENS]), [sites.patch('h.2.attn.q', value_thc)])[0][0, -1]
  expected = OBJECTIVES['logits'][1]({'logits': np.asarray(logits_v)[None]}, None, 0)
  np.testing.assert_allclose(circuits.measure(setting, [cut_rw], uncut), expected, atol=2e-5)
  assert abs(expected - uncut.objective_b[0]) > 1e-4


def test_ablations_stay_where_edges_are_cut():
  held = [
    schema.Ablation(kind='attn', layer=1, to=schema.Mean()),
    schema.Ablation(kind='mlp', layer=0, to=schema.OtherPrompt(prompt=OTHER)),
  ]
  subject, setting, uncut = asked('logits', 'gpt2', ablations=held)
  np.testing.assert_allclose(uncut.objective_b[0], engine.value(subject, setting.prepared), atol=1e-5)
  by_writer = {}
  for writer in ('h.1.attn.2', 'h.0.mlp', 'h.2.mlp'):
    cut_rw = np.zeros(setting.graph.possible_rw.shape, bool)
    cut_rw[:, setting.graph.writers.index(writer)] = True
    by_writer[writer] = circuits.measure(setting, [cut_rw], uncut)[0] - uncut.objective_b[0]
  assert abs(by_writer['h.1.attn.2']) < 1e-6  # the layer's sum is held
  zeroed = schema.Ablation(kind='mlp', layer=0)
  changed = engine.prepare(subject, subjects.request(ablations=[held[0], zeroed]))
  expected = engine.value(subject, changed) - uncut.objective_b[0]
  np.testing.assert_allclose(by_writer['h.0.mlp'], expected, atol=1e-5)
  assert min(abs(expected), abs(by_writer['h.2.mlp'])) > 1e-3


def test_other_cuts_and_prompts_do_not_recompile():
  subject, setting, uncut = asked('log_probability', 'gpt2')
  rng = np.random.default_rng(0)
  cuts = lambda: [rng.random(setting.graph.possible_rw.shape) < 0.5 for _ in range(setting.lot + 1)]
  circuits.measure(setting, cuts(), uncut)
  circuits.scores(setting, uncut, 2)
  layers = circuits._start, circuits._forward_layer, circuits._backward_layer
  reading = circuits._forward_objectives, circuits._backward_objectives
  sizes = lambda functions: [function._cache_size() for function in functions]
  before = sizes(layers), sizes(reading)
  circuits.measure(setting, cuts(), uncut)
  for name, prompt in (('entropy', '1 2 3'), ('neuron', '8 9 10 11 12 13')):
    request = subjects.request(OBJECTIVES[name][0], prompt=prompt)
    setting = circuits.setting(subject, engine.prepare(subject, request), schema.Value())
    uncut = circuits.run(setting, np.zeros_like(cuts()[: setting.lot], np.float32), np.ones(setting.lot, np.float32))
    circuits.scores(setting, uncut, 3)
    assert sizes(layers) == before[0]
    assert sizes(reading) == before[1] or name == 'neuron'  # of which no distribution is read


# Scores


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
  ('name', 'steps', 'counterfactual'),
  [
    ('logits', 1, schema.Value()),
    ('logits', 3, schema.OtherPrompt(prompt=OTHER)),
    ('entropy', 2, schema.Value()),
    ('projection', 1, schema.Value()),
    ('neuron', 2, schema.OtherPrompt(prompt=OTHER)),
    ('attention', 1, schema.Value()),
    ('attention_q', 1, schema.OtherPrompt(prompt=OTHER)),
  ],
)
def test_scores_are_derivatives_by_the_cuts(family, name, steps, counterfactual):
  subject, setting, uncut = asked(name, family, counterfactual)
  graph, (_, of) = setting.graph, OBJECTIVES[name]
  found_rw = circuits.scores(setting, uncut, steps)
  assert not found_rw[~graph.possible_rw].any()
  full, writes = passed(subject.model, TOKENS)
  carried = carried_by(subject, counterfactual) or dict.fromkeys(writes, 0)
  diffs = {writer: writes[writer] - carried[writer] for writer in writes}
  expected_rw, step = np.zeros(found_rw.shape), 1e-5
  edges = np.argwhere(graph.possible_rw)
  rng = np.random.default_rng(0)
  edges = edges if steps == 1 else edges[rng.permutation(len(edges))[:60]]
  for r, w in edges:
    pair = graph.writers[w], graph.readers[r]
    for point in range(1, steps + 1):
      embedding = writes['embedding'] - (1 - point / steps) * diffs['embedding']
      down, up = (
        of(passed(subject.model, TOKENS, {pair: cut}, diffs=diffs, embedding=embedding)[0], full, GROUP[family])
        for cut in (step, -step)
      )
      expected_rw[r, w] += (up - down) / (2 * step) / steps
  rows, columns = edges.T
  scale = np.abs(expected_rw).max()
  np.testing.assert_allclose(found_rw[rows, columns], expected_rw[rows, columns], atol=2e-4 * scale, rtol=1e-3)
  assert scale > 1e-3


# Choosing


def _brute_force(graph, scores_rw, n_edges):
  """Returns the circuit by listing every path of the graph."""
  pairs = sorted(map(tuple, np.argwhere(graph.possible_rw)), key=lambda e: -abs(scores_rw[e]))
  parts = {
    (r, w)
    for readers, writers, part_of in graph.components
    for r in range(readers.start, readers.stop)
    for w in range(writers.start, writers.stop)
    if part_of[r - readers.start, w - writers.start]
  }

  def paths(edges):
    on = set()

    def walk(writer, path):
      for r, w in edges:
        if w == writer:
          if graph.sinks_r[r]:
            on.update([*path, (r, w)])
          for reader, component in parts:
            if reader == r:
              walk(component, [*path, (r, w)])

    walk(0, [])
    return on

  n = next((n for n in range(len(pairs)) if len(paths(pairs[:n])) >= n_edges), len(pairs))
  kept = paths(pairs[:n])
  for fewest in (n_edges, 0):
    for pair in reversed(pairs[:n]):
      left = paths(kept - {pair})
      if len(kept) > n_edges and len(left) >= fewest:
        kept = left
  joining = [pair for pair in pairs if pair not in kept and len(paths(kept | {pair})) == len(kept) + 1]
  return kept | set(joining[: n_edges - len(kept)])


def test_choosing_is_by_brute_force():
  subject = subjects.build('gpt2', sample=False)
  prepared = engine.prepare(subject, subjects.request(OBJECTIVES['neuron'][0]))  # of layer 1: a graph of two layers
  graph = circuits.graph_of(subject.model, prepared.question)
  # Few of its edges, so that paths can be listed.
  for seed, n_edges in itertools.product(range(6), (1, 2, 5, 9, 14, 40)):
    rng = np.random.default_rng(seed)
    possible_rw = circuits.on_paths(graph, graph.possible_rw & (rng.random(graph.possible_rw.shape) < 0.35))
    small = circuits.Graph(graph.writers, graph.readers, graph.components, graph.sinks_r, possible_rw)
    scores_rw = rng.normal(size=possible_rw.shape) * possible_rw
    kept_rw = circuits.choose(small, scores_rw, n_edges)
    assert {tuple(pair) for pair in np.argwhere(kept_rw)} == _brute_force(small, scores_rw, n_edges)
    assert kept_rw.sum() <= n_edges
    assert (circuits.on_paths(small, kept_rw) == kept_rw).all()


def test_the_graph_is_what_can_reach_the_objective():
  subject = subjects.build('llama', tuple(subjects.SAES))
  saes = tuple(sorted(subject.saes))
  graphs = {}
  latents = {site: schema.Node(kind='latent', site=site, token=5, index=3) for site in saes}
  traced = {name: objective for name, (objective, _) in OBJECTIVES.items()}
  traced |= {site: schema.PreActivation(node=node) for site, node in latents.items()}
  for name, objective in traced.items():
    question = engine.prepare(subject, subjects.request(objective)).question
    graphs[name] = circuits.graph_of(subject.model, question, saes)
  edges = {name: graph.possible_rw.sum() for name, graph in graphs.items()}
  # Of 6 heads and 2 keys and values, a layer has 10 readers; heads 0 to 5 and the MLP write behind them.
  whole = 10 * (1 + 8 + 15) + (7 + 14 + 21) + 22
  assert edges['logits'] == edges['kl'] == whole
  assert edges['projection'] == 10 * (1 + 8) + 7 + 14
  assert edges['neuron'] == 10 * (1 + 8) + 7 + 14
  assert edges['attention'] == 10 * (1 + 8) + 7 + 14 + 2 * 15
  assert edges['attention_q'] == 10 * (1 + 8) + 7 + 14 + 15
  assert edges['resid.post_emb'] == 1
  assert edges['h.0.mlp.post_act'] == 10 + 7
  assert edges['h.0.resid.delta_attn'] == 10
  assert edges['h.1.attn.v_out'] == 10 + 7 + 10 * 8
  assert edges['h.1.resid.delta_mlp'] == edges['neuron']
  assert edges['h.1.resid.post_attn'] == edges['projection']
  assert edges['h.1.resid.post_mlp'] == 10 * (1 + 8) + 7 + 14 + 15


# The whole


def found_circuit(family='gpt2', n_edges=25, counterfactual=None, sites=(), progress=engine.silent, **changes):
  subject = subjects.build(family, sites)
  request = schema.CircuitRequest(
    request=subjects.request(**changes), counterfactual=counterfactual or schema.Value(), n_edges=n_edges
  )
  return subject, circuits.find(subject, request, progress)


@pytest.mark.parametrize('family', FAMILIES)
def test_what_is_said_of_a_circuit_is_measured(family):
  counterfactual = schema.OtherPrompt(prompt=OTHER)
  subject, found = found_circuit(family, counterfactual=counterfactual)
  graph = circuits.graph_of(subject.model, engine.prepare(subject, found.request.request).question)
  possible = as_pairs(graph, graph.possible_rw)
  kept = {(edge.writer, edge.reader) for edge in found.edges}
  carried = carried_by(subject, counterfactual)
  of = lambda cut: OBJECTIVES['logits'][1](passed(subject.model, TOKENS, cut, carried)[0], None, 0)
  without = lambda edges: dict.fromkeys(edges, 1.0)
  assert len(kept) == len(found.edges) == 25
  assert kept <= set(possible)
  assert found.n_possible == len(possible)
  scores = [abs(edge.score) for edge in found.edges]
  assert scores == sorted(scores, reverse=True)
  full, empty, circuit = of({}), of(without(possible)), of(without(set(possible) - kept))
  complement = of(without(kept))
  np.testing.assert_allclose(
    [found.full, found.empty, found.circuit, found.complement], [full, empty, circuit, complement], atol=1e-4
  )
  np.testing.assert_allclose(found.faithfulness, (circuit - empty) / (full - empty), rtol=1e-3)
  np.testing.assert_allclose(found.completeness, (full - complement) / (full - empty), rtol=1e-3)
  lost = [circuit - of(without((set(possible) - kept) | {(edge.writer, edge.reader)})) for edge in found.edges]
  np.testing.assert_allclose([edge.measured for edge in found.edges], lost, atol=2e-4)
  np.testing.assert_allclose(found.minimality, np.abs(lost).min() / abs(full - empty), atol=1e-4)


@pytest.mark.parametrize('sites', [(), tuple(subjects.SAES)], ids=['no SAE', 'SAEs'])
def test_all_edges_are_the_model_and_none_is_empty(sites):
  _, found = found_circuit(n_edges=10_000, sites=sites, counterfactual=schema.Resample(seed=1))
  assert len(found.edges) == found.n_possible > circuits.MAX_MEASURED - 100
  np.testing.assert_allclose([found.circuit, found.complement], [found.full, found.empty], atol=1e-6)
  assert found.faithfulness == pytest.approx(1, abs=1e-5) == found.completeness
  assert [edge.measured is None for edge in found.edges] == [
    i >= circuits.MAX_MEASURED for i in range(found.n_possible)
  ]


@pytest.mark.parametrize(('family', 'sites'), [('gpt2', ('h.1.resid.delta_mlp',)), ('llama', ())], ids=FAMILIES)
def test_a_mesh_changes_nothing(family, sites):
  found = []
  for shape in ((1, 1), (2, 2)):
    with jax.set_mesh(sharding.make_mesh(*shape)):
      found.append(found_circuit(family, counterfactual=schema.Mean(), n_edges=12, sites=sites)[1])
  one, four = found
  assert [(e.writer, e.reader) for e in one.edges] == [(e.writer, e.reader) for e in four.edges]
  for name in ('full', 'empty', 'circuit', 'complement'):
    np.testing.assert_allclose(getattr(one, name), getattr(four, name), atol=1e-5)
  np.testing.assert_allclose([e.score for e in one.edges], [e.score for e in four.edges], atol=1e-5)
  np.testing.assert_allclose([e.measured for e in one.edges], [e.measured for e in four.edges], atol=1e-5)


def test_a_latent_can_be_what_a_circuit_is_of():
  for site in subjects.SAES:
    objective = schema.PreActivation(node=schema.Node(kind='latent', site=site, token=5, index=3))
    _, found = found_circuit(objective=objective, sites=tuple(subjects.SAES), n_edges=10_000)
    np.testing.assert_allclose(found.circuit, found.full, atol=1e-5)
    assert abs(found.full - found.empty) > 1e-3


def test_minimality_is_left_out_where_it_is_not_asked_for():
  subject = subjects.build('gpt2')
  found = circuits.find(subject, schema.CircuitRequest(request=subjects.request(), n_edges=5, minimality=False))
  assert found.minimality is None
  assert [edge.measured for edge in found.edges] == [None] * 5


def test_a_number_is_no_write():
  with pytest.raises(ValueError, match=r'is a vector, not 2\.0; give 0'):
    found_circuit(counterfactual=schema.Value(value=2.0))


def test_numbers_that_are_not_finite_are_refused():
  subject = subjects.build()
  subject = dataclasses.replace(subject, model=jax.tree.map(lambda x: 1e30 * x, subject.model))
  with pytest.raises(ValueError, match='not finite; hold activations at smaller values'):
    circuits.find(subject, schema.CircuitRequest(request=subjects.request()))


def test_progress_grows_and_can_stop():
  shares = []
  found_circuit(n_edges=12, progress=lambda share, what: shares.append(share))
  assert shares == sorted(shares)
  assert shares[-1] == 1

  def stop(share, what):
    raise TimeoutError(what)

  with pytest.raises(TimeoutError):
    found_circuit(progress=stop)
