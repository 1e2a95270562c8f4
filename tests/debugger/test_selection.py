"""Which nodes a table lists, against ranking every node there is."""

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from tests.debugger import reference, subjects

COLUMNS = 'write_norm', 'total_effect', 'direct_effect', 'activation'  # in the order in which they are ranked
RANKED_BY_ACTIVATION = ('head', 'neuron', 'latent')
KINDS = ('head', 'neuron', 'latent', 'embedding', 'head_token', 'bias', 'error', 'head_total', 'layer')
# Of a trace, whose later layers do nothing, and of the whole model.
REQUESTS = {
  'objective': {'k': 3},
  'trace': {'k': 5, 'trace': schema.Trace(node=schema.Node(kind='neuron', layer=1, index=17, token=4))},
}


@pytest.fixture(scope='module', params=[(), tuple(subjects.SAES)], ids=['plain', 'saes'])
def subject(request):
  return subjects.build('gpt2', request.param)


def _ranked(expected: reference.Reference, kind: str, k: int) -> list[schema.Node]:
  """Returns the k largest above zero and the k smallest below it of each column, each node once, as first met."""
  nodes, columns = expected.nodes(kind), expected.all_columns(kind)
  found = []
  for name in COLUMNS if kind in RANKED_BY_ACTIVATION else COLUMNS[:3]:
    order = np.argsort(-columns[name], kind='stable')
    found += [i for i in order if columns[name][i] > 0][:k]
    order = np.argsort(columns[name], kind='stable')
    found += [i for i in order if columns[name][i] < 0][:k][::-1]
  return [nodes[i] for i in dict.fromkeys(found)]


@pytest.mark.parametrize('name', list(REQUESTS))
def test_a_table_lists_the_extremes_of_every_column_of_every_kind(subject, name):
  request = subjects.request(**REQUESTS[name])
  table, expected = engine.debug(subject, request).table, reference.answer(subject, request)
  reference.assert_same(table, expected)
  listed = table.nodes
  assert len(set(listed)) == len(listed)
  for kind in KINDS:
    mine = [node for node in listed if node.kind == kind]
    wanted = _ranked(expected, kind, request.k)
    assert mine == wanted, kind


def test_nothing_is_acausal_and_nothing_is_zero(subject):
  for name in REQUESTS:
    table = engine.debug(subject, subjects.request(**REQUESTS[name])).table
    assert all(node.source <= node.token for node in table.nodes if node.kind == 'head')
    assert all(0 <= node.token < subjects.N_TOKENS for node in table.nodes if node.kind != 'head_total')
    columns = np.nan_to_num(np.stack([reference.column(table, column) for column in COLUMNS[:3]]))
    assert np.abs(columns).max(0).min() > 0


def test_nodes_that_are_asked_for_come_first_and_once(subject):
  Node = schema.Node
  plain = engine.debug(subject, subjects.request(k=2)).table
  late = Node(kind='neuron', layer=2, index=3, token=-2)
  asked = [late, plain.nodes[3], Node(kind='head', layer=2, index=1, token=-1, source=-4), plain.nodes[0], late]
  table = engine.debug(subject, subjects.request(k=2, nodes=asked)).table
  first = [late.model_copy(update={'token': 5}), plain.nodes[3]]
  first += [Node(kind='head', layer=2, index=1, token=6, source=3), plain.nodes[0]]
  assert table.nodes[:4] == first
  assert table.nodes[4:] == [node for node in plain.nodes if node not in first]
  again = dict(zip(plain.nodes, plain.total_effect, strict=True))
  for node, effect in zip(table.nodes, table.total_effect, strict=True):
    # Of nodes that were not found but asked for, the same sums are taken in another order.
    assert node not in again or again[node] == pytest.approx(effect, rel=1e-6, abs=1e-7)


def test_heads_and_neurons_that_an_sae_stands_for_are_left_out(subject):
  table = engine.debug(subject, subjects.request(k=10)).table
  layers = lambda *kinds: {node.layer for node in table.nodes if node.kind in kinds}
  heads, neurons = layers('head', 'head_token', 'head_total'), layers('neuron')
  assert (heads, neurons) == (({2}, {2}) if subject.saes else ({0, 1, 2}, {0, 1, 2}))
