"""Comparisons of two runs, and templates over many prompts, against single answers."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_interp.debugger import compare, engine, schema
from tests.debugger import subjects
from tests.models import families

SITES = ('h.0.mlp.post_act', 'h.1.resid.post_mlp', 'resid.post_emb')
OTHER = '40 17 5 12 9 50 31'
ABLATIONS = [
  schema.Ablation(kind='neuron', layer=0, index=5, to=schema.Value(value=2.0)),
  schema.Ablation(kind='mlp', layer=2),
]


@pytest.fixture(scope='module')
def subject():
  return subjects.build('gpt2', SITES)


@pytest.fixture(scope='module')
def perturbed(subject):
  """Another checkpoint of the same sizes, read through the same SAEs."""
  rng = np.random.default_rng(4)
  model = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), subject.model)
  return dataclasses.replace(subject, model=model)


def columns(table: schema.Table) -> np.ndarray:
  """Returns [column, node], nan where undefined."""
  return np.array([[np.nan if x is None else x for x in getattr(table, name)] for name in engine.COLUMNS])


def assert_compares(found: schema.CompareResponse, left: schema.Response, right: schema.Response):
  """Asserts that each side is the answer on its own, over the nodes of both."""
  nodes = found.difference.nodes
  assert found.left.table.nodes == found.right.table.nodes == nodes
  assert set(nodes) == {*left.table.nodes, *right.table.nodes}
  assert nodes[: len(left.table.nodes)] == left.table.nodes
  for side, alone in ((found.left, left), (found.right, right)):
    assert side.request == alone.request
    assert side.objective == pytest.approx(alone.objective, abs=1e-6)
    assert side.completeness == alone.completeness
    rows = [nodes.index(node) for node in alone.table.nodes]
    # Rounding: columns of the nodes of both sides are worked out node by node, those of one table with their search.
    np.testing.assert_allclose(columns(side.table)[:, rows], columns(alone.table), rtol=1e-5, atol=1e-6)
  difference = columns(found.left.table) - columns(found.right.table)
  np.testing.assert_allclose(columns(found.difference), difference, atol=1e-7)
  assert np.nanmax(np.abs(difference)) > 1e-2


def test_one_prompt_with_and_without_ablations(subject):
  request = subjects.request(ablations=ABLATIONS, k=4)
  found = compare.compare(subject, schema.CompareRequest(left=request))
  assert_compares(found, engine.debug(subject, request), engine.debug(subject, subjects.request(k=4)))
  assert found.left.unedited == pytest.approx(found.right.objective, abs=1e-6)
  assert found.right.unedited is None
  assert abs(found.left.objective - found.right.objective) > 1e-2


def test_two_prompts(subject):
  left, right = (
    subjects.request(k=4),
    subjects.request(schema.LogitDifference(targets=['7'], token=-2), prompt=OTHER, k=3, n_tokens=3),
  )
  found = compare.compare(subject, schema.CompareRequest(left=left, right=right))
  assert_compares(found, engine.debug(subject, left), engine.debug(subject, right))
  assert not found.left.node_tokens
  assert len(found.right.node_tokens) == len(found.difference.nodes)


def test_two_models(subject, perturbed):
  request = subjects.request(k=4, ablations=ABLATIONS[:1])
  found = compare.compare(subject, schema.CompareRequest(left=request, right_model='other'), other=perturbed)
  assert_compares(found, engine.debug(subject, request), engine.debug(perturbed, request))
  # With a right request, that is what the other model is asked.
  asked = schema.CompareRequest(left=request, right=subjects.request(k=4), right_model='other')
  found = compare.compare(subject, asked, other=perturbed)
  assert_compares(found, engine.debug(subject, request), engine.debug(perturbed, asked.right))


def test_what_cannot_be_compared_is_refused(subject, perturbed):
  request = subjects.request()
  ask = lambda other=None, **changes: compare.compare(
    subject, schema.CompareRequest(left=request, **changes), other=other
  )
  with pytest.raises(ValueError, match='both sides are the same; give a right request'):
    ask()
  with pytest.raises(ValueError, match='the prompts have 7 and 3 tokens; nodes are compared token by token'):
    ask(right=subjects.request(prompt='1 2 3'))
  with pytest.raises(ValueError, match='the two sides splice in SAEs at different sites'):
    ask(right=subjects.request(prompt=OTHER, saes=[]))
  with pytest.raises(ValueError, match='there is no second model'):
    ask(right_model='other')
  with pytest.raises(ValueError, match='the models have different sizes'):
    ask(right_model='other', other=dataclasses.replace(perturbed, model=families.build('odd_gpt2'), saes={}))


# Templates


def requests(prompts, **changes):
  return [subjects.request(prompt=prompt, k=3, **changes) for prompt in prompts]


def prompts(n):
  words = np.random.default_rng(2).integers(53, size=(n, subjects.N_TOKENS))
  return [' '.join(map(str, row)) for row in words]


def test_a_template_is_the_mean_of_single_answers(subject):
  asked = requests(prompts(5))
  found = compare.template(subject, schema.TemplateRequest(requests=asked))
  single = [engine.debug(subject, one.model_copy(update={'nodes': found.nodes})) for one in asked]
  listed = [node for one in asked for node in engine.debug(subject, one).table.nodes]
  assert found.nodes == list(dict.fromkeys(listed))
  np.testing.assert_allclose(found.objective, [one.objective for one in single], atol=1e-6)
  for name in ('direct', 'total'):
    rows = [dict(zip(one.table.nodes, getattr(one.table, f'{name}_effect'), strict=True)) for one in single]
    values_pn = np.array([[row[node] for node in found.nodes] for row in rows])
    mean, low, high = (np.array(getattr(found, f'{name}_{end}')) for end in ('effect', 'low', 'high'))
    np.testing.assert_allclose(mean, values_pn.mean(0), atol=1e-6)
    assert (low <= mean + 1e-9).all()
    assert (mean <= high + 1e-9).all()
    assert (values_pn.min(0) - 1e-6 <= low).all()
    assert (high <= values_pn.max(0) + 1e-6).all()
    assert (high - low).max() > 1e-2


def test_intervals_are_those_of_the_bootstrap_and_shrink(subject):
  pair = prompts(2)
  two = compare.template(subject, schema.TemplateRequest(requests=requests(pair)))
  values_pn = np.array(
    [
      engine.debug(subject, one.model_copy(update={'nodes': two.nodes})).table.total_effect[: len(two.nodes)]
      for one in requests(pair)
    ]
  )
  # Of two prompts one is drawn twice in every fourth draw: the ends are the prompts themselves.
  np.testing.assert_allclose(two.total_low, values_pn.min(0), atol=1e-6)
  np.testing.assert_allclose(two.total_high, values_pn.max(0), atol=1e-6)
  # The mean of 20 draws of them is normal: plus and minus 1.96 deviations.
  many = compare.template(subject, schema.TemplateRequest(requests=requests(pair * 10)))
  assert many.nodes == two.nodes
  spread = np.subtract(many.total_high, many.total_low)
  np.testing.assert_allclose(spread, 2 * 1.96 * values_pn.std(0) / np.sqrt(20), rtol=0.2, atol=1e-6)
  same = compare.template(subject, schema.TemplateRequest(requests=requests([pair[0]] * 4)))
  np.testing.assert_allclose(same.direct_low, same.direct_effect, atol=1e-7)
  np.testing.assert_allclose(same.direct_high, same.direct_effect, atol=1e-7)


def test_prompts_that_do_not_match_are_refused(subject):
  with pytest.raises(ValueError, match='prompt 1 has 3 tokens and the first 7; nodes are matched by position'):
    compare.template(subject, schema.TemplateRequest(requests=requests([subjects.PROMPT, '1 2 3'])))
  asked = [*requests([OTHER]), *requests([OTHER], saes=[])]
  with pytest.raises(ValueError, match='with the same SAEs'):
    compare.template(subject, schema.TemplateRequest(requests=asked))
  neuron = lambda index: schema.PreActivation(node=schema.Node(kind='neuron', layer=1, index=index, token=4))
  for one, other in [
    ({}, {'objective': schema.Entropy()}),
    ({}, {'objective': schema.LogitDifference(targets=['8'], token=-2)}),
    ({}, {'trace': schema.Trace(node=neuron(3).node)}),
    ({'objective': neuron(3)}, {'objective': neuron(4)}),
  ]:
    asked = [*requests([OTHER], **one), *requests([OTHER], **other)]
    with pytest.raises(ValueError, match='prompt 1 is asked about another node, token or kind of objective than the'):
      compare.template(subject, schema.TemplateRequest(requests=asked))
  last = requests([OTHER], objective=schema.LogitDifference(targets=['9'], token=6))  # as -1
  compare.template(subject, schema.TemplateRequest(requests=[*requests([OTHER]), *last]))
