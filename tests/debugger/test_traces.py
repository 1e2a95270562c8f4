"""Every kind of trace: what is live and what is held, the stream it is read from, and what is upstream of it."""

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from tests.debugger import reference, subjects

HEAD = schema.Node(kind='head', layer=1, index=2, token=5, source=2)
FIRST_HEAD = schema.Node(kind='head', layer=0, index=3, token=5, source=1)
NEURON = schema.Node(kind='neuron', layer=2, index=17, token=5)
LATER_HEAD = schema.Node(kind='head', layer=2, index=1, token=5, source=4)
TRACES = {
  'neuron': schema.Trace(node=NEURON),
  'first_neuron': schema.Trace(node=schema.Node(kind='neuron', layer=0, index=5, token=3)),
  'q': schema.Trace(node=HEAD, through='q'),
  'k': schema.Trace(node=HEAD, through='k'),
  'qk': schema.Trace(node=HEAD, through='qk'),
  'v': schema.Trace(node=HEAD, through='v'),
  'all': schema.Trace(node=HEAD, through='all'),
  'first_q': schema.Trace(node=FIRST_HEAD, through='q'),
  'v_for_a_neuron': schema.Trace(node=HEAD, through='v', downstream=schema.Trace(node=NEURON)),
  'all_for_a_neuron': schema.Trace(node=HEAD, through='all', downstream=schema.Trace(node=NEURON)),
  'v_for_queries': schema.Trace(node=HEAD, through='v', downstream=schema.Trace(node=LATER_HEAD, through='q')),
  'v_for_scores': schema.Trace(node=HEAD, through='v', downstream=schema.Trace(node=LATER_HEAD, through='qk')),
}
TRACES |= {site: schema.Trace(node=schema.Node(kind='latent', site=site, index=3, token=5)) for site in subjects.SAES}
V_FOR_LATENT = schema.Trace(node=FIRST_HEAD, through='v', downstream=TRACES['h.1.resid.delta_mlp'])
TRACES['v_for_a_latent'] = V_FOR_LATENT
EXACT = {'neuron', 'first_neuron', 'q', 'k', 'first_q', *subjects.ON_STREAM}
EXACT |= {name for name in TRACES if name.startswith('v')}
# An objective that is read where the traced heads write.
OBJECTIVE = schema.LogitDifference(targets=['8', '21'], distractors=['30'], token=5)
LLAMA = [name for name in TRACES if name not in subjects.SAES and name != 'v_for_a_latent']
CASES = [('gpt2', name) for name in TRACES] + [('llama', name) for name in LLAMA]


@pytest.fixture(scope='module')
def built():
  return {'gpt2': subjects.build('gpt2', tuple(subjects.SAES)), 'llama': subjects.build('llama')}


def _asked(name, **changes):
  return subjects.request(OBJECTIVE, trace=TRACES[name], k=4, **changes)


@pytest.fixture(scope='module', params=CASES, ids=['-'.join(case) for case in CASES])
def case(built, request):
  """A trace, its answer and the reference's."""
  family, name = request.param
  subject = built[family]
  expected = reference.answer(subject, _asked(name))
  candidates = [node for kind in ('neuron', 'latent', 'head') for node in expected.nodes(kind)]
  downstream = [node for node in candidates if not expected.is_upstream(node)]
  some = [node for node in downstream if expected.part(node)[1].any()][::97]
  return name, engine.debug(subject, _asked(name, nodes=some)), expected, some


def test_value_and_effects_equal_finite_differences(case):
  _, response, expected, _ = case
  np.testing.assert_allclose(response.objective, expected.objective, rtol=1e-5, atol=1e-6)
  assert response.traced_activation == response.objective
  assert len(response.table.nodes) > 20
  reference.assert_same(response.table, expected)


def test_completeness_is_exact_where_the_trace_is_linear(case):
  name, response, *_ = case
  found = response.completeness
  assert found.exact == (name in EXACT)
  assert (abs(found.residual) < 2e-6) == found.exact
  total = found.embedding + found.attention + found.mlp + found.latents + found.errors + found.biases
  np.testing.assert_allclose(total + found.final_bias + found.residual, found.objective, atol=1e-6)


def test_direct_effects_of_linear_traces_are_what_adding_the_write_really_does(case):
  name, response, expected, _ = case
  if name not in EXACT:
    return
  nodes = [node for node in response.table.nodes if expected.is_upstream(node)]
  writes = np.stack([expected.write(node) for node in nodes])
  measured = expected.after(expected.reading.stream, writes) - expected.objective
  direct = dict(zip(response.table.nodes, response.table.direct_effect, strict=True))
  np.testing.assert_allclose([direct[node] for node in nodes], measured, rtol=2e-4, atol=2e-6)


def test_what_is_not_upstream_has_no_direct_effect(case):
  _, response, _, downstream = case
  direct = dict(zip(response.table.nodes, response.table.direct_effect, strict=True))
  assert downstream
  assert not any(direct[node] for node in downstream)


def test_only_the_scale_before_the_traced_node_is_held(case):
  name, response, expected, _ = case
  scales = tuple(site for site in expected.base if site.endswith('.scale'))
  rows = [i for i, node in enumerate(response.table.nodes) if node.kind in ('embedding', 'layer', 'head_token')]
  parts = [expected.part(response.table.nodes[i]) for i in rows]
  total = reference.column(response.table, 'total_effect')[rows]
  slopes = lambda frozen: np.array([expected.slope(site, mine[None], frozen)[0] for site, mine in parts])
  distance = lambda frozen: np.linalg.norm(total - slopes(frozen)) / np.linalg.norm(total)
  assert distance(expected.reading.scales) < 1e-4
  if expected.reading.scales:
    assert distance(()) > 0.01
  if name == 'v_for_a_latent' or name.startswith(('first', 'h.0', 'resid')):
    return  # in the first layer there is no other norm on the way
  assert distance(scales) > 0.1


def test_heads_of_one_layer_are_upstream_of_its_neurons(built):
  trace = schema.Trace(node=schema.Node(kind='neuron', layer=1, index=17, token=5))
  nodes = [schema.Node(kind='head_token', layer=i, index=1, token=5) for i in range(3)]
  table = engine.debug(built['gpt2'], subjects.request(trace=trace, nodes=nodes)).table
  assert [bool(x) for x in table.direct_effect[:3]] == [True, True, False]


def test_a_trace_is_the_objective_of_that_name(built):
  for name in ('neuron', 'q', 'all_for_a_neuron'):
    objective = reference.explained(TRACES[name], OBJECTIVE)
    traced, asked = (engine.debug(built['llama'], r) for r in (_asked(name), subjects.request(objective, k=4)))
    assert traced.table == asked.table
    assert asked.traced_activation is None


def test_keys_are_held_in_a_trace_through_queries(built):
  # In the first layer nothing but the token's own embedding reaches its query.
  table = engine.debug(built['gpt2'], _asked('first_q')).table
  embeddings = [(n.token, x) for n, x in zip(table.nodes, table.total_effect, strict=True) if n.kind == 'embedding']
  assert len(embeddings) > 1
  assert [token for token, effect in embeddings if effect] == [FIRST_HEAD.token]


def test_ablations_stay_active_while_tracing(built):
  ablation = schema.Ablation(kind='neuron', layer=0, first=2, last=4)

  def nothing(x):
    return np.where(np.isin(np.arange(x.shape[1]), (2, 3, 4))[:, None], 0, x)

  held = {'h.0.mlp.post_act': nothing}
  for name in ('neuron', 'qk', 'v'):
    request = _asked(name, ablations=[ablation])
    expected, unedited = reference.answer(built['llama'], request, held), reference.answer(built['llama'], _asked(name))
    response = engine.debug(built['llama'], request)
    np.testing.assert_allclose(response.objective, expected.objective, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(response.unedited, unedited.objective, rtol=1e-5, atol=1e-6)
    assert abs(expected.objective - unedited.objective) > 1e-4
    reference.assert_same(response.table, expected)
