"""Audits against nodes really switched off: one by one in the engine, and in NumPy and float64."""

import dataclasses

import numpy as np
import pytest

from jax_interp.debugger import audit, engine, schema
from tests.debugger import reference, subjects

HEAD = schema.Node(kind='head', layer=2, token=6, source=3, index=3)
DIRECTION = np.random.default_rng(3).normal(size=32).tolist()
QUESTIONS = {
  'logits': {},
  'log_probability': {'objective': schema.LogProbability(targets=['8'], token=-2)},
  'continuation': {'objective': schema.Continuation(text='3 40')},
  'kl': {'objective': schema.KL()},
  'entropy': {'objective': schema.Entropy()},
  'projection': {'objective': schema.Projection(site='h.1.resid.post_attn', direction=DIRECTION)},
  'neuron': {'trace': schema.Trace(node=schema.Node(kind='neuron', layer=2, token=5, index=11))},
  'attention': {'trace': schema.Trace(node=HEAD, through='qk')},
  'write': {'trace': schema.Trace(node=HEAD, through='all')},
}
ABLATIONS = [
  schema.Ablation(kind='neuron', layer=0, index=5, to=schema.Value(value=0.7)),
  schema.Ablation(kind='head', layer=1, index=2, last=4),
  schema.Ablation(kind='head', layer=2, index=0, first=3, source=2, to=schema.Value(value=0.4)),
  schema.Ablation(kind='mlp', layer=1, first=2, last=3),
]
EDITED = {
  'gpt2': {
    'ablations': [
      *ABLATIONS,
      schema.Ablation(kind='head', layer=1, index=3, to=schema.OtherPrompt(prompt='40 17 5 12 9 50 31 2 3')),
    ]
  },
  'llama': {
    'ablations': ABLATIONS,
    'edge_ablations': [
      schema.EdgeAblation(node=schema.Node(kind='embedding', token=4), layer=1, head=1, into='k'),
      schema.EdgeAblation(node=schema.Node(kind='neuron', layer=1, token=6, index=20), layer=2, head=3, into='q'),
    ],
  },
}


@pytest.fixture(scope='module', autouse=True)
def batches():
  """Batches of one size that read the last 4 tokens or all, so that less is compiled."""
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(audit, 'SIZES', (32,))
    patched.setattr(audit, 'PAIRS', (512,))
    patched.setattr(audit, 'SHARES', (1 / 4, 1))
    yield


@pytest.fixture(scope='module', params=list(subjects.SUBJECTS))
def subject(request):
  return subjects.build(*subjects.SUBJECTS[request.param])


def some_nodes(subject, kinds=audit.ABLATABLE, n=9):
  """Returns nodes of each kind at random, and latents that are on of every SAE."""
  expected = reference.answer(subject, subjects.request())
  rng, found = np.random.default_rng(5), []
  for kind in kinds:
    nodes = expected.nodes(kind)
    found += [nodes[i] for i in rng.permutation(len(nodes))[:n]]
  for site in subject.saes if 'latent' in kinds else ():
    on = np.argwhere(expected.base[f'{site}.latents'][0])
    chosen = on[rng.permutation(len(on))[:4]].tolist()
    found += [schema.Node(kind='latent', site=site, token=t, index=i) for t, i in chosen]
  return list(dict.fromkeys(found))


def audited(subject, n=5, steps=0, **changes):
  request = subjects.request(**{'nodes': some_nodes(subject), 'k': 5} | changes)
  return audit.audit(subject, schema.AuditRequest(request=request, n=n, steps=steps))


def switched_off(expected: reference.Reference, nodes) -> np.ndarray:
  """Returns the objective [node] without each node, in float64, the scales of all norms live."""
  found = np.zeros(len(nodes))
  parts = [expected.part(node) for node in nodes]
  for site in dict(parts):
    mine = [i for i, (where, _) in enumerate(parts) if where == site]
    taken = np.stack([parts[i][1] for i in mine])
    nudged = {site: lambda x, taken=taken: x - taken}
    acts = reference.forward(expected.model, expected.tokens, expected.saes, expected.held, nudged)
    found[mine] = expected.reading.of(acts)
  return found


def without(node: schema.Node) -> schema.Ablation:
  where = {'layer': node.layer, 'first': node.token, 'last': node.token}
  if node.kind == 'layer':
    return schema.Ablation(kind=node.site, **where)
  kind = 'head' if node.kind == 'head_token' else node.kind
  return schema.Ablation(kind=kind, site=node.site, index=node.index, source=node.source, **where)


def one_by_one(subject, request, nodes) -> tuple[float, np.ndarray]:
  """Returns the objective, and that [node] without each node, each by a run of its own."""
  prepared, values = engine.prepare(subject, request), []
  for node in nodes:
    ablations = [*request.ablations, without(node)]
    held = engine.held_by(subject, prepared.saes, ablations, prepared.n_tokens)
    values.append(engine.value(subject, dataclasses.replace(prepared, held=held)))
  return engine.value(subject, prepared), np.array(values)


def skip_unless_chosen(subject, name):
  """Skips objectives that read the whole distribution in one family: they are compiled apart, which takes long."""
  others = {'gpt2': ('continuation',), 'llama': ('log_probability', 'kl', 'entropy')}
  if name in others[subject.name]:
    pytest.skip('tested with the other family')


@pytest.mark.parametrize('name', QUESTIONS)
def test_measured_is_what_switching_off_does_in_float64(subject, name):
  skip_unless_chosen(subject, name)
  found = audited(subject, **QUESTIONS[name])
  expected = reference.answer(subject, found.request.request)
  assert {node.kind for node in found.nodes} == set(audit.ABLATABLE)
  assert all(any(node.site == site for node in found.nodes) for site in subject.saes)
  np.testing.assert_allclose(found.objective, expected.objective, atol=1e-5)
  measured = expected.objective - switched_off(expected, found.nodes)
  assert np.abs(measured).max() > 1e-3
  np.testing.assert_allclose(found.measured, measured, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', [*(name for name in QUESTIONS if name != 'continuation'), 'latent'])
def test_measured_is_what_single_ablations_do_beside_those_of_the_request(subject, name):
  skip_unless_chosen(subject, name)
  traces = [schema.Trace(node=schema.Node(kind='latent', site=site, token=5, index=3)) for site in subject.saes]
  latents = [schema.Ablation(kind='latent', site=site, first=2, last=5, index=4) for site in subject.saes]
  edited = EDITED[subject.name] | {'ablations': [*EDITED[subject.name]['ablations'], *latents]}
  for question in [{'trace': trace} for trace in traces] if name == 'latent' else [QUESTIONS[name]]:
    found = audited(subject, **question | edited)
    objective, values = one_by_one(subject, found.request.request, found.nodes)
    np.testing.assert_allclose(found.objective, objective, rtol=1e-5, atol=1e-5)
    assert np.abs(objective - values).max() > 1e-4
    np.testing.assert_allclose(found.measured, objective - values, rtol=1e-3, atol=1e-5)


def test_estimates_are_those_of_the_table_and_ratios_theirs(subject):
  found = audited(subject, n=30, nodes=[])
  response = engine.debug(subject, subjects.request(k=30))
  rows = dict(zip(response.table.nodes, response.table.total_effect, strict=True))
  np.testing.assert_allclose(found.estimated, [rows[node] for node in found.nodes], rtol=1e-6)
  sizes = np.abs([rows[node] for node in rows if node.kind in audit.LISTED])
  np.testing.assert_allclose(np.abs(found.estimated), np.sort(sizes)[::-1][:30], rtol=1e-5)
  assert found.integrated is None
  for ratio, estimated, measured in zip(found.ratio, found.estimated, found.measured, strict=True):
    assert ratio == pytest.approx(estimated / measured)


def test_nodes_that_are_asked_for_come_first_whatever_they_do(subject):
  site = min(subject.saes)
  latents_l = reference.answer(subject, subjects.request()).base[f'{site}.latents'][0, 1]
  off = schema.Node(kind='latent', site=site, token=1, index=int(np.argmin(latents_l)))
  asked = [off, schema.Node(kind='embedding', token=-1)]
  found = audited(subject, n=7, nodes=asked)
  assert set(found.nodes[:2]) == {off, schema.Node(kind='embedding', token=6)}
  assert len(found.nodes) == 7
  row = found.nodes.index(off)
  assert (found.estimated[row], found.measured[row], found.ratio[row]) == (0, 0, None)
  assert audited(subject, n=1, nodes=[off, off]).nodes == [off]
  assert len(audited(subject, n=1, nodes=some_nodes(subject)).nodes) == len(some_nodes(subject))


@pytest.mark.parametrize('name', ['logits', 'neuron', 'attention', 'write'])
def test_integrated_gradients_come_to_the_measured_effect(subject, name):
  # Not those of embeddings: towards none the first norm's scale falls to its epsilon, which takes many more points.
  nodes = some_nodes(subject, [kind for kind in audit.ABLATABLE if kind != 'embedding'], 6)
  found = audited(subject, n=1, steps=24, nodes=nodes, **QUESTIONS[name] | {'ablations': ABLATIONS[:1]})
  measured = np.array(found.measured)
  assert np.abs(measured).max() > 1e-3
  np.testing.assert_allclose(found.integrated, measured, rtol=1e-3, atol=3e-6)
  if name == 'logits':
    assert np.abs(np.array(found.estimated) - measured).max() > 1e-3


def _linear(subject):
  """Returns (stream that the objective is a projection of, nodes that it is linear in)."""
  n = 6
  nodes = some_nodes(subject, n=40)
  yield 'h.2.resid.post_mlp', [node for node in nodes if node.kind == 'neuron' and node.layer == 2][:n]
  yield 'h.2.resid.post_attn', [node for node in nodes if node.kind == 'head' and node.layer == 2][:n]
  yield 'resid.post_emb', [schema.Node(kind='embedding', token=6)]
  for site in subject.saes:
    stream = {'delta_mlp': 'post_mlp', 'post_act': 'post_mlp'}.get(site.split('.')[-1], 'post_attn')
    stream = site if 'resid.post' in site else f'{site[:4]}resid.{stream}'
    yield stream, [node for node in nodes if node.site == site][-4:]


def test_the_ratio_is_one_where_the_objective_is_linear_in_the_node(subject):
  for stream, nodes in _linear(subject):
    assert nodes
    nodes = [node.model_copy(update={'token': 6}) for node in nodes]  # where the projection is read
    objective = schema.Projection(site=stream, direction=DIRECTION)
    found = audited(subject, n=1, steps=1, objective=objective, nodes=nodes)
    assert np.abs(found.measured).max() > (0 if nodes[0].kind == 'latent' else 1e-3)
    np.testing.assert_allclose(found.estimated, found.measured, rtol=1e-4, atol=2e-6, err_msg=stream)
    np.testing.assert_allclose(found.integrated, found.measured, rtol=1e-4, atol=2e-6, err_msg=stream)
    for ratio, measured in zip(found.ratio, found.measured, strict=True):
      assert ratio == pytest.approx(1, abs=1e-3) if abs(measured) > 1e-2 else True


def test_lots_and_batches_that_grow_change_nothing(monkeypatch):
  subject = subjects.build(*subjects.SUBJECTS['llama'])
  nodes = some_nodes(subject, n=3)
  whole = audited(subject, n=14, nodes=nodes)
  request = schema.AuditRequest(request=whole.request.request, n=14, steps=0)
  monkeypatch.setattr(audit, 'SHARES', (1,))
  monkeypatch.setattr(audit, 'SIZES', (4, 32))
  monkeypatch.setattr(audit, 'PAIRS', (16, 40, 512))
  grown = audit.audit(subject, request)
  monkeypatch.setattr(audit, 'MAX_PAIRS', 4 * 16**2)  # the run itself and three nodes
  shares = []
  lots = audit.audit(subject, request, lambda share, what: shares.append((share, what)))
  n = len(whole.nodes)
  assert n > 16
  assert grown.nodes == lots.nodes == whole.nodes
  np.testing.assert_allclose(grown.measured, whole.measured, atol=2e-6)
  np.testing.assert_allclose(lots.measured, whole.measured, atol=2e-6)
  assert [what for _, what in shares] == [f'ablated {min(i + 3, n)} of {n}' for i in range(0, n, 3)]
  assert shares[-1][0] == 1
  assert shares == sorted(shares)


@pytest.mark.parametrize('n_slots', [16, 128, 1024, 4096])
def test_lots_hold_every_node_once_and_as_many_token_pairs_as_they_may(monkeypatch, n_slots):
  monkeypatch.setattr(audit, 'SIZES', (4, 16, 32, 64))
  monkeypatch.setattr(audit, 'SHARES', (1 / 8, 1 / 4, 1 / 2, 1))
  rng = np.random.default_rng(0)
  first_n, layer_n = rng.integers(n_slots, size=100), rng.integers(12, size=100)
  lots = audit._lots(first_n, layer_n, n_slots)
  assert sorted(np.concatenate(lots)) == list(range(100))
  for lot in lots:
    assert (np.diff(layer_n[lot]) >= 0).all()
    n_rows = next(size for size in audit.SIZES if size > len(lot))
    share = next(share for share in audit.SHARES if share * n_slots >= n_slots - first_n[lot].min())
    assert n_rows * share * n_slots**2 <= audit.MAX_PAIRS or len(lot) == 1
  assert len(lots) == 2 or n_slots > 128


def test_other_nodes_prompts_and_questions_compile_nothing(subject, monkeypatch):
  monkeypatch.setattr(audit, 'SHARES', (1,))
  audited(subject)
  sizes = lambda: [f._cache_size() for f in (audit._block, audit._objectives, audit._embeddings, engine.effects.run)]
  before = sizes()
  nodes = [
    schema.Node(kind='neuron', layer=0, token=2, index=3),
    schema.Node(kind='head', layer=1, token=2, source=0, index=1),
  ]
  for prompt, name in (('5 6 7 8', 'projection'), ('1 2 3 4 5 6 7 8 9', 'neuron'), ('9 8 7 6 5 4 3', 'attention')):
    audited(subject, n=12, prompt=prompt, nodes=nodes, **QUESTIONS[name])
  assert sizes() == before


def test_only_nodes_that_can_be_switched_off_are_audited(subject):
  with pytest.raises(ValueError, match='cannot be audited; embedding, head, neuron, latent, head_token, layer can'):
    audited(subject, nodes=[schema.Node(kind='head_total', layer=1, index=2)])
  with pytest.raises(ValueError, match='layer 3 is not there; there are 3, from 0'):
    audited(subject, nodes=[schema.Node(kind='neuron', layer=3, index=2, token=4)])
