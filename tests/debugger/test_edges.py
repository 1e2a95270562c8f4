"""Edges between nodes against NumPy and float64: one reader's input changed along a write, and nothing else."""

import numpy as np
import pytest

from jax_interp.debugger import edges, engine, schema
from tests.debugger import reference, subjects

HEAD = schema.Node(kind='head', layer=2, token=6, source=3, index=3)
NEURON = schema.Node(kind='neuron', layer=2, token=6, index=11)
EARLY = schema.Node(kind='neuron', layer=1, token=6, index=4)
DIRECTION = np.random.default_rng(3).normal(size=32).tolist()
TRACE = schema.Trace(node=schema.Node(kind='head', layer=2, token=6, source=4, index=1), through='qk')


@pytest.fixture(scope='module', params=list(subjects.SUBJECTS))
def subject(request):
  return subjects.build(*subjects.SUBJECTS[request.param])


def found(subject, request=None, **asked) -> schema.EdgesResponse:
  return edges.edges(subject, schema.EdgesRequest(request=request or subjects.request(k=6), **asked))


def latents(expected: reference.Reference) -> list[schema.Node]:
  """Returns a latent of every SAE: of those that are on, the one with the largest effect on the objective."""
  nodes = []
  for site in expected.saes:
    acts_tl = expected.base[f'{site}.latents'][0]
    on = np.argwhere(acts_tl)
    parts = np.zeros((len(on), *acts_tl.shape))
    parts[np.arange(len(on)), *on.T] = 1
    token, index = on[np.argmax(np.abs(expected.slope(f'{site}.latents', parts)))].tolist()
    nodes.append(schema.Node(kind='latent', site=site, token=token, index=index))
  return nodes


def readers(expected: reference.Reference) -> list[tuple[schema.Node, str | None]]:
  heads = [(node, through) for node in (HEAD, HEAD.model_copy(update={'layer': 1})) for through in 'qkv']
  return [*heads, (NEURON, None), (EARLY, None), *((node, None) for node in latents(expected))]


def stream_of(expected: reference.Reference, reader: schema.Node) -> tuple[str, tuple[str, ...]]:
  """Returns the stream that a node reads, and the norm scale between them, if there is one."""
  if reader.kind == 'head':
    return expected._before(reader.layer, 'attn')
  reading = expected._pre_activation(reader)
  return reading.stream, reading.scales


def expected_edges(expected: reference.Reference, writes, reader, through=None, frozen=True) -> np.ndarray:
  """Returns the edges [write] of writes [write, token, d_model] into a reader, by finite differences."""
  stream, scales = stream_of(expected, reader)
  held = expected._frozen(scales) if frozen else {}
  prefix, t, i = f'h.{reader.layer}.attn', reader.token, reader.index

  def slope(site, *cell):
    unit = np.zeros((1, *expected.base[site].shape[1:]))
    unit[0][cell] = 1
    return expected.slope(site, unit)[0]

  if reader.kind == 'neuron':
    site = f'h.{reader.layer}.mlp.post_act'
    of, grad = lambda acts: acts[site][:, t, i], slope(site, t, i)
  elif reader.kind == 'latent':
    site = f'{reader.site}.latents'
    of = expected._pre_activation(reader).of if frozen else lambda acts: acts[site][:, t, i]
    grad = slope(site, t, i) if expected.base[site][0, t, i] else 0
  else:
    held |= expected._frozen([f'{prefix}.{name}' for name in 'qkv' if name != through])
    if through == 'v':
      s, site, n = reader.source, f'{prefix}.v_out', expected.base[f'{prefix}.v_out'].shape[-1]
      before_sae = site in expected.saes
      where = lambda c: (f'{site}.input', t, i * n + c) if before_sae else (site, t, i, c)
      grad_c = np.array([slope(*where(c)) for c in range(n)])
      of, grad = (
        lambda acts: (
          acts[f'{prefix}.qk_probs'][:, i, t, s] * (acts[f'{prefix}.v'][:, s, expected._group(reader)] @ grad_c)
        ),
        1,
      )
    else:
      site = f'{prefix}.qk_probs'
      of, grad = lambda acts: acts[site][:, i, t, reader.source], slope(site, i, t, reader.source)
  h = 1e-5
  run = lambda h: of(
    reference.forward(
      expected.model, expected.tokens, expected.saes, expected.held | held, {stream: lambda x: x + h * writes}
    )
  )
  return (run(h) - run(-h)) / (2 * h) * grad


def assert_edges(effects, expected):
  """Float32 against float64, in products of two numbers of order 0.1."""
  np.testing.assert_allclose(effects, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize('frozen', [True, False])
def test_edges_into_every_kind_of_reader_equal_finite_differences(subject, frozen):
  expected = reference.answer(subject, subjects.request())
  for reader, through in readers(expected):
    response = found(subject, to_node=reader, through=through, frozen=frozen)
    assert set(response.to_nodes) == {reader}
    assert set(response.through) == {through}
    writes = np.stack([expected.write(node) for node in response.from_nodes])
    assert np.abs(response.effects).max() > 1e-5
    assert_edges(response.effects, expected_edges(expected, writes, reader, through, frozen))


def test_an_edge_is_none_of_what_is_not_upstream(subject):
  expected = reference.answer(subject, subjects.request())
  order = list(expected.base)
  for reader, through in readers(expected):
    response = found(subject, subjects.request(k=10), to_node=reader, through=through)
    stream = order.index(stream_of(expected, reader)[0].removesuffix('.input'))
    # Keys of all tokens move a probability, and all of them an attention layer's latents; other readers have one token.
    several = through == 'k' or (reader.kind == 'latent' and reader.site.endswith(('v_out', 'delta_attn')))
    at = reader.source if through == 'v' else reader.token
    for node in response.from_nodes:
      assert order.index(expected.part(node)[0]) <= stream
      assert node.token <= reader.token if several else node.token == at
      assert node.kind in edges.FROM
      assert node.source is None or node.source <= node.token


def test_a_frozen_scale_is_not_a_live_one(subject):
  of = lambda frozen: dict(zip((r := found(subject, to_node=NEURON, frozen=frozen)).from_nodes, r.effects, strict=True))
  frozen, live = of(True), of(False)
  both = [node for node in frozen if node in live]
  assert len(both) > 5
  distance = np.linalg.norm([frozen[node] - live[node] for node in both])
  assert distance > 0.05 * np.linalg.norm([frozen[node] for node in both])


def test_the_edge_between_two_is_that_of_either_list(subject):
  expected = reference.answer(subject, subjects.request())
  for reader, through in readers(expected):
    into = found(subject, to_node=reader, through=through)
    rows = np.argsort(-np.abs(into.effects))[:3]
    for writer, effect in [(into.from_nodes[row], into.effects[row]) for row in rows]:
      one = found(subject, from_node=writer, to_node=reader, through=through)
      assert (one.from_nodes, one.to_nodes, one.through) == ([writer], [reader], [through])
      assert one.effects == pytest.approx([effect], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize('frozen', [True, False])
def test_edges_out_of_a_node_are_the_largest_into_its_readers(subject, frozen):
  expected = reference.answer(subject, subjects.request())
  writers = [
    schema.Node(kind='embedding', token=4),
    schema.Node(kind='head', layer=1, token=6, source=2, index=1),
    schema.Node(kind='layer', layer=0, site='attn', token=6),
    schema.Node(kind='bias', layer=0, site='mlp', token=6),
    latents(expected)[0],
  ]
  for writer in writers:
    response = found(subject, from_node=writer, n=1000, frozen=frozen)
    rows = list(zip(response.to_nodes, response.through, response.effects, strict=True))
    if not rows:
      assert (writer.kind, subject.name) == ('bias', 'llama')  # it has none
      continue
    sizes = [abs(effect) for *_, effect in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len({(reader, through) for reader, through, _ in rows}) == len(rows)
    assert {through for _, through, _ in rows} == {None, *'qkv'}
    assert {reader.kind for reader, *_ in rows} >= {'head', 'neuron'}
    for reader, through, effect in [*rows[:4], *rows[10:300:40]]:
      assert_edges(effect, expected_edges(expected, expected.write(writer)[None], reader, through, frozen)[0])
    # None is forgotten: edges into readers taken at random are in the list, or smaller than all that are.
    rng = np.random.default_rng(1)
    listed = {(reader, through): effect for reader, through, effect in rows}
    heads = [node for node in expected.nodes('head') if node.layer == 2]
    neurons = [node for node in expected.nodes('neuron') if node.layer == 2]
    for reader, through in [(heads[rng.integers(len(heads))], 'v'), (neurons[rng.integers(len(neurons))], None)]:
      effect = expected_edges(expected, expected.write(writer)[None], reader, through, frozen)[0]
      assert_edges(listed.get((reader, through), np.clip(effect, -sizes[-1], sizes[-1])), effect)
    assert found(subject, from_node=writer, n=307, frozen=frozen).effects == response.effects[:307]


def test_edges_into_values_are_of_what_heads_read_before_latents_are_ablated():
  subject = subjects.build(*subjects.SUBJECTS['llama'])  # with SAEs on what heads read and write
  saes = ['h.0.resid.delta_attn', 'h.1.attn.v_out']
  for layer, site in enumerate(saes):
    request = subjects.request(saes=saes, ablations=[schema.Ablation(kind='latent', site=site)])
    expected = reference.answer(subject, request, {f'{site}.latents': np.zeros_like})
    reader = HEAD.model_copy(update={'layer': layer})
    writers = [schema.Node(kind='embedding', token=reader.source)]
    writers += [schema.Node(kind='layer', site='mlp', layer=0, token=reader.source)] * layer
    for writer in writers:
      wanted = expected_edges(expected, expected.write(writer)[None], reader, 'v')
      assert abs(wanted[0]) > 1e-4
      assert_edges(found(subject, request, from_node=writer, to_node=reader, through='v').effects, wanted)
      listed = found(subject, request, from_node=writer, n=1000)
      rows = dict(zip(zip(listed.to_nodes, listed.through, strict=True), listed.effects, strict=True))
      assert_edges(rows[reader, 'v'], wanted[0])


def test_edges_into_a_reader_are_the_largest_of_all_there_are(subject):
  expected = reference.answer(subject, subjects.request())
  response = found(subject, subjects.request(k=1), to_node=NEURON, n=20)  # whatever the table lists
  kinds = ('embedding', 'head', 'head_token', 'neuron', 'latent', 'error', 'bias', 'layer')
  nodes = [node for kind in kinds for node in expected.nodes(kind) if node.token == NEURON.token]
  nodes = [node for node in nodes if edges.written(node, subject.saes) <= 2 * NEURON.layer + 1]
  effects_n = expected_edges(expected, np.stack([expected.write(node) for node in nodes]), NEURON)
  order = np.argsort(-np.abs(effects_n), kind='stable')[:20]
  assert_edges(np.abs(response.effects), np.abs(effects_n[order]))
  effects = dict(zip(nodes, effects_n, strict=True))
  assert_edges(response.effects, [effects[node] for node in response.from_nodes])


def test_no_edge_leads_to_what_is_not_downstream(subject):
  expected = reference.answer(subject, subjects.request())
  order = list(expected.base)
  for writer in [HEAD, EARLY, *latents(expected)]:
    response = found(subject, from_node=writer, n=1000)
    written = order.index(expected.part(writer)[0])
    for reader in response.to_nodes:
      assert written <= order.index(stream_of(expected, reader)[0].removesuffix('.input'))
      assert writer.token <= reader.token
      assert reader.source is None or reader.source <= reader.token
      assert reader.site is None or reader.site != writer.site


def test_edges_into_a_reader_add_up(subject):
  """Embedding and layers are the stream, so that their edges sum to the derivative along it; heads are a layer."""
  expected = reference.answer(subject, subjects.request())
  for reader, through in [(NEURON, None), (HEAD, 'q'), (HEAD, 'v')]:
    stream = stream_of(expected, reader)[0]
    at = reader.source if through == 'v' else reader.token
    of = lambda to=reader, through=through, at=at, **node: found(
      subject, from_node=schema.Node(token=at, **node), to_node=to, through=through
    ).effects[0]
    total = of(kind='embedding') + sum(of(kind='layer', layer=i, site=part) for i in (0, 1) for part in ('attn', 'mlp'))
    if reader.kind == 'neuron':
      attention = of(kind='layer', layer=2, site='attn')
      heads = [of(kind='head_token', layer=2, index=h) for h in range(subject.model.config.n_head)]
      assert_edges(sum(heads) + of(kind='bias', layer=2, site='attn'), attention)
      pairs = [of(kind='head', layer=2, index=1, source=s) for s in range(at + 1)]
      assert_edges(sum(pairs), heads[1])
      total += attention
    whole = np.where(np.arange(subjects.N_TOKENS)[:, None] == at, expected.base[stream], 0)
    assert_edges(total, expected_edges(expected, whole, reader, through)[0])
    assert abs(total) > 1e-4


def test_an_edge_into_values_is_what_taking_the_write_out_of_them_does(subject):
  """Values are linear in the stream with the scale held, and here the objective is in what heads write."""
  objective = schema.Projection(site='h.2.resid.post_attn', token=HEAD.token, direction=DIRECTION)
  request = subjects.request(objective, k=6)
  expected = reference.answer(subject, request)
  response = found(subject, request, to_node=HEAD, through='v')
  stream, scales = stream_of(expected, HEAD)
  for node, effect in zip(response.from_nodes[:12], response.effects[:12], strict=True):
    write = expected.write(node)
    nudged = {stream: lambda x, write=write: x - write}
    without = reference.forward(expected.model, expected.tokens, expected.saes, expected._frozen(scales), nudged)
    v = expected.base['h.2.attn.v'].copy()
    group = expected._group(HEAD)
    change = without['h.2.attn.v'][0, HEAD.source, group] - v[0, HEAD.source, group]
    z = expected.base['h.2.attn.v_out'].copy()
    z[0, HEAD.token, HEAD.index] += expected.base['h.2.attn.qk_probs'][0, HEAD.index, HEAD.token, HEAD.source] * change
    acts = reference.forward(expected.model, expected.tokens, expected.saes, {'h.2.attn.v_out': lambda _, z=z: z})
    assert_edges(effect, expected.objective - expected.reading.of(acts)[0])


@pytest.mark.parametrize(
  'trace',
  [
    schema.Trace(node=HEAD, through='q'),
    schema.Trace(node=HEAD, through='k'),
    schema.Trace(node=schema.Node(kind='neuron', layer=2, token=6, index=11)),
  ],
  ids=['query', 'key', 'neuron'],
)
def test_direct_effects_on_what_is_traced_are_what_taking_the_write_out_does(subject, trace):
  response = engine.debug(subject, subjects.request(trace=trace, k=4))
  expected = reference.answer(subject, response.request)
  rows = [i for i, node in enumerate(response.table.nodes) if expected.is_upstream(node) and node.kind != 'head_total']
  writes = np.stack([expected.write(response.table.nodes[i]) for i in rows])
  measured = expected.objective - expected.after(expected.reading.stream, -writes)
  direct = reference.column(response.table, 'direct_effect')[rows]
  assert np.abs(direct).max() > 1e-2
  np.testing.assert_allclose(direct, measured, rtol=1e-3, atol=1e-5)


def test_edges_into_a_latent_are_direct_effects_on_its_trace(subject):
  expected = reference.answer(subject, subjects.request())
  for node in latents(expected):
    response = found(subject, to_node=node)
    traced = engine.debug(subject, subjects.request(trace=schema.Trace(node=node), nodes=response.from_nodes))
    direct = dict(zip(traced.table.nodes, traced.table.direct_effect, strict=True))
    unit = np.zeros((1, *expected.base[f'{node.site}.latents'].shape[1:]))
    unit[0, node.token, node.index] = 1
    slope = expected.slope(f'{node.site}.latents', unit)[0]
    assert_edges(response.effects, [direct[writer] * slope for writer in response.from_nodes])


def test_edges_can_be_of_a_trace_and_of_an_ablated_run(subject):
  ablation = schema.Ablation(kind='neuron', layer=0, index=3, to=schema.Value(value=2.0))
  request = subjects.request(trace=TRACE, ablations=[ablation], k=4)

  def hold(x):
    x = x.copy()
    x[:, :, 3] = 2.0
    return x

  expected = reference.answer(subject, request, {'h.0.mlp.post_act': hold})
  response = found(subject, request, to_node=EARLY)
  assert response.objective == pytest.approx(expected.objective, abs=1e-5)
  assert np.abs(response.effects).max() > 1e-6
  writes = np.stack([expected.write(node) for node in response.from_nodes])
  assert_edges(response.effects, expected_edges(expected, writes, EARLY))


# Cutting edges


def cut(expected: reference.Reference, nodes, layer, head, into, held) -> dict:
  """Returns `held` and a head's input without what nodes write, recomputed with a live norm."""
  site, stream = f'h.{layer}.attn.{into}', expected._before(layer, 'attn')[0]
  write = sum(expected.write(node) for node in nodes)
  nudged = {stream: lambda x: x - write}
  without = reference.forward(expected.model, expected.tokens, expected.saes, held, nudged)[site]
  group = head if into == 'q' else head * without.shape[2] // expected.model.config.n_head

  def hold(x):
    x = x.copy()
    x[:, :, group] = without[:, :, group]
    return x

  return held | {site: hold}


def value(subject, ablations, objective=None):
  return engine.value(subject, engine.prepare(subject, subjects.request(objective, edge_ablations=ablations)))


@pytest.mark.parametrize('into', ['q', 'k', 'v'])
def test_cutting_an_edge_changes_what_one_head_reads(subject, into):
  expected = reference.answer(subject, subjects.request())
  writers = [
    schema.Node(kind='embedding', token=6 if into == 'q' else 3),
    schema.Node(kind='head', layer=1, token=6, source=2, index=1),
    schema.Node(kind='head_token', layer=0, token=6 if into == 'q' else 5, index=2),
    schema.Node(kind='neuron', layer=1, token=6, index=9),
    schema.Node(kind='layer', layer=0, site='mlp', token=6 if into == 'q' else 4),
    *latents(expected),
  ]
  changes = []
  for i, node in enumerate(writers):
    head = i % subject.model.config.n_head
    ablation = schema.EdgeAblation(node=node, layer=2, head=head, into=into)
    held = cut(expected, [node], 2, head, into, {})
    acts = reference.forward(expected.model, expected.tokens, expected.saes, held)
    after = expected.reading.of(acts)[0]
    assert value(subject, [ablation]) == pytest.approx(after, abs=3e-6)
    changes.append(abs(after - expected.objective))
  assert sorted(changes)[-3] > 1e-4


def test_edges_of_one_layer_are_cut_together_and_those_of_a_later_one_behind_them(subject):
  request = subjects.request()
  expected = reference.answer(subject, request)
  embedding, other = (schema.Node(kind='embedding', token=t) for t in (3, 6))
  neuron = schema.Node(kind='neuron', layer=1, token=6, index=9)
  ablations = [
    schema.EdgeAblation(node=neuron, layer=2, head=3, into='q'),
    schema.EdgeAblation(node=embedding, layer=1, head=2, into='k'),
    schema.EdgeAblation(node=embedding, layer=1, head=2, into='v'),
    schema.EdgeAblation(node=other, layer=1, head=2, into='v'),
  ]
  held = cut(expected, [embedding], 1, 2, 'k', {})
  held = cut(expected, [embedding, other], 1, 2, 'v', held)
  then = reference.answer(subject, request, held)
  held = cut(then, [neuron], 2, 3, 'q', held)
  after = expected.reading.of(reference.forward(expected.model, expected.tokens, expected.saes, held))[0]
  assert abs(after - expected.objective) > 1e-4
  assert value(subject, ablations) == pytest.approx(after, abs=1e-5)
  assert value(subject, ablations[::-1]) == pytest.approx(after, abs=1e-5)
  assert value(subject, [*ablations, *ablations]) == pytest.approx(after, abs=1e-5)  # an edge is cut once
  response = engine.debug(subject, subjects.request(edge_ablations=ablations))
  assert response.objective == pytest.approx(after, abs=1e-5)
  assert response.unedited == pytest.approx(expected.objective, abs=1e-5)


def test_heads_that_share_a_key_have_edges_of_both_cut():
  subject = subjects.build(*subjects.SUBJECTS['llama'])  # heads 0 to 2 share keys
  expected = reference.answer(subject, subjects.request())
  nodes = [schema.Node(kind='embedding', token=t) for t in (2, 4)]
  ablations = [schema.EdgeAblation(node=n, layer=1, head=h, into='k') for n, h in zip(nodes, (0, 2), strict=True)]
  held = cut(expected, nodes, 1, 0, 'k', {})
  after = expected.reading.of(reference.forward(expected.model, expected.tokens, expected.saes, held))[0]
  assert value(subject, ablations) == pytest.approx(after, abs=1e-5)
  assert value(subject, [*ablations, ablations[0].model_copy(update={'head': 1})]) == pytest.approx(after, abs=1e-5)


# What cannot be asked


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    ({}, 'give from_node, to_node or both'),
    ({'to_node': HEAD}, 'a head reads through q, k or v'),
    ({'to_node': NEURON, 'through': 'q'}, 'a head reads through q, k or v'),
    ({'to_node': schema.Node(kind='embedding', token=1)}, 'must be one of head, neuron, latent'),
    ({'from_node': schema.Node(kind='embedding', token=1), 'through': 'q'}, 'through q is how to_node reads'),
    ({'from_node': schema.Node(kind='head_total', layer=1, index=1)}, 'writes nothing at one token'),
    ({'from_node': NEURON, 'to_node': EARLY}, 'h.2.mlp.11 6 is not upstream of h.1.mlp.4 6'),
    ({'from_node': NEURON, 'to_node': NEURON}, 'is not upstream of'),
    ({'to_node': NEURON.model_copy(update={'token': 7})}, 'token 7 is not in a prompt of 7 tokens'),
  ],
)
def test_what_is_no_edge_is_refused(asked, message):
  subject = subjects.build(*subjects.SUBJECTS['gpt2'])
  with pytest.raises(ValueError, match=message):
    found(subject, **asked)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'layer': 3}, 'layer 3 is not there; there are 3, from 0'),
    ({'head': 4}, 'head 4 is not there; there are 4, from 0'),
    ({'node': schema.Node(kind='head', layer=1, index=0, token=3, source=2)}, 'is not upstream of heads of layer 1'),
    ({'node': schema.Node(kind='latent', site='h.1.resid.post_mlp', index=0, token=3)}, 'is not upstream'),
    ({'node': schema.Node(kind='error', site='resid.post_emb', token=3)}, 'cannot be cut'),
  ],
)
def test_what_is_no_edge_is_not_cut(change, message):
  subject = subjects.build(*subjects.SUBJECTS['gpt2'])
  ablation = {'node': schema.Node(kind='embedding', token=3), 'layer': 1, 'head': 1, 'into': 'k'} | change
  with pytest.raises(ValueError, match=message):
    value(subject, [schema.EdgeAblation(**ablation)])


# Of runs that are edited


def zero(subject, request, **asked) -> bool:
  """Returns whether an edge between two nodes, or all into or out of one, are zero."""
  return not np.any(found(subject, request, **asked).effects)


def test_edges_are_those_of_the_edited_run(subject):
  plain, embedding = subjects.request(saes=[]), schema.Node(kind='embedding', token=HEAD.token)
  ablation = schema.EdgeAblation(node=embedding, layer=HEAD.layer, head=HEAD.index, into='q')
  without_query = cut(reference.answer(subject, plain), [embedding], HEAD.layer, HEAD.index, 'q', {})
  tri_ts = np.tri(subjects.N_TOKENS, dtype=bool)

  def half(x):
    x = x.copy()
    x[:, HEAD.index] = np.where(tri_ts, 0.5, x[:, HEAD.index])
    return x

  pattern = schema.Ablation(kind='head', layer=HEAD.layer, index=HEAD.index, to=schema.Value(value=0.5))
  writers = [schema.Node(kind='embedding', token=HEAD.source), EARLY.model_copy(update={'token': HEAD.source})]
  for changes, held, throughs in [
    ({'edge_ablations': [ablation]}, without_query, 'kv'),
    ({'ablations': [pattern]}, {f'h.{HEAD.layer}.attn.qk_probs': half}, 'v'),
  ]:
    request = plain.model_copy(update=changes)
    expected = reference.answer(subject, request, held)
    for through in throughs:
      for writer in writers:
        wanted = expected_edges(expected, expected.write(writer)[None], HEAD, through)
        assert abs(wanted[0]) > 1e-5
        assert_edges(found(subject, request, from_node=writer, to_node=HEAD, through=through).effects, wanted)


def test_what_is_held_reads_nothing(subject):
  other = schema.OtherPrompt(prompt=' '.join(reversed(subjects.PROMPT.split())))
  where = {'layer': HEAD.layer, 'index': HEAD.index}
  pattern, reading = (
    subjects.request(saes=[], ablations=[schema.Ablation(kind='head', to=to, **where)])
    for to in (schema.Value(value=0.5), other)
  )
  assert all(zero(subject, pattern, to_node=HEAD, through=through) for through in 'qk')
  assert all(zero(subject, reading, to_node=HEAD, through=through) for through in 'qkv')
  assert not zero(subject, pattern, to_node=HEAD, through='v')
  ablations = [schema.Ablation(kind='neuron', layer=2, index=index) for index in (NEURON.index, 3)]
  assert zero(subject, subjects.request(saes=[], ablations=ablations[:1]), to_node=NEURON)
  assert not zero(subject, subjects.request(saes=[], ablations=ablations[1:]), to_node=NEURON)
  for latent in latents(reference.answer(subject, subjects.request())):
    held = schema.Ablation(kind='latent', site=latent.site, index=latent.index)
    assert zero(subject, subjects.request(ablations=[held]), to_node=latent)
  # Nor has what is lost edges out of it.
  pair = HEAD.model_copy(update={'layer': 1})
  held_head = schema.Ablation(kind='head', layer=1, index=pair.index, to=other)
  for writer, held in [(pair, held_head), (EARLY, schema.Ablation(kind='mlp', layer=1))]:
    request = subjects.request(saes=[], ablations=[held])
    assert zero(subject, request, from_node=writer)
    assert zero(subject, request, from_node=writer, to_node=NEURON)
    assert not zero(subject, subjects.request(saes=[]), from_node=writer)
