import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_interp.explain import neuron2graph
from models import gpt2, sharding, sites

PAD = 0
STRINGS = [f't{i}' for i in range(20)]
W, START = neuron2graph.WILDCARD, neuron2graph.START


def by_rule(rule):
  """An activation_fn from a rule (component, tokens) -> activation at the last token."""

  def activation_fn(tokens_bt, last_b, component_b):
    rows = zip(tokens_bt, last_b, component_b, strict=True)
    return np.array([rule(component, list(tokens[: last + 1])) for tokens, last, component in rows])

  return activation_fn


def explained(rule, *documents, component=0):
  """The patterns of documents [token], whose activations are the rule's at every position."""
  acts = [[rule(component, list(tokens[: t + 1])) for t in range(len(tokens))] for tokens in documents]
  part = {component: list(zip(documents, acts, strict=True))}
  trie = neuron2graph.tries(part, by_rule(rule), PAD, 1 + max(map(len, documents)))[component]
  return dict(trie.patterns()), trie


def test_a_single_token_is_its_own_pattern():
  patterns, _ = explained(lambda c, tokens: 3.0 * (tokens[-1] == 7), [5, 6, 7, 8])
  assert patterns == {(7,): 3.0}


def test_unimportant_tokens_inside_a_suffix_are_wildcards():
  rule = lambda c, tokens: 2.0 * (tokens[-1] == 7 and tokens[-3:-2] == [4])
  patterns, trie = explained(rule, [9, 4, 5, 7, 3])
  assert patterns == {(4, W, 7): 2.0}
  assert trie.predict([4, 8, 7, 1, 7]).tolist() == [0, 0, 2, 0, 0]


def test_a_pattern_that_padding_breaks_holds_at_the_start_only():
  patterns, trie = explained(lambda c, tokens: 1.5 * (tokens == [7]), [7, 8, 9])
  assert patterns == {(START, 7): 1.5}
  assert trie.predict([7, 7]).tolist() == [1.5, 0]


def test_a_suffix_keeps_half_of_the_recorded_activation_and_stores_its_own():
  rule = lambda c, tokens: (tokens[-1] == 7) * (1.0 + 0.8 * (4 in tokens))
  patterns, _ = explained(rule, [4, 5, 6, 7])
  assert patterns == {(7,): 1.0}
  rule = lambda c, tokens: (tokens[-1] == 7) * (1.0 + 1.2 * (4 in tokens))
  patterns, _ = explained(rule, [4, 5, 6, 7])
  assert patterns == {(4, W, W, 7): pytest.approx(2.2)}


def test_of_equal_patterns_the_strongest_counts_whatever_their_order():
  trie = neuron2graph.Node()
  for value in (1.0, 3.0, 2.0):
    trie.insert([5, W], value)
  assert dict(trie.patterns()) == {(W, 5): 3.0}


def test_prediction_prefers_the_token_does_not_turn_back_and_stops_at_the_first_value():
  trie = neuron2graph.Node()
  trie.insert([7, 4, 1], 1.0)
  trie.insert([7, W, 2], 2.0)
  trie.insert([8], 3.0)
  trie.insert([8, 1], 4.0)
  assert trie.predict([1, 4, 7])[-1] == 1.0
  assert trie.predict([2, 5, 7])[-1] == 2.0
  assert trie.predict([2, 4, 7])[-1] == 0.0  # a wildcard would match, but the token's own edge was taken
  assert trie.predict([1, 8])[-1] == 3.0
  assert trie.predict([7]).tolist() == [0.0]  # the wildcard is a token, not the start
  assert trie.predict([]).shape == (0,)


def test_documents_where_it_is_silent_add_nothing():
  patterns, trie = explained(lambda c, tokens: 0.0, [1, 2, 3])
  assert patterns == {}
  assert neuron2graph.render(trie, STRINGS) == ''


def test_rendering_shows_tokens_wildcards_start_and_value():
  trie = neuron2graph.Node()
  trie.insert([5, W, 4], 1.25)
  trie.insert([3, START], 2.0)
  assert neuron2graph.render(trie, STRINGS) == "^ 't3' (2); 't4' * 't5' (1.2)"


def naive(document, acts, act_of):
  """The algorithm for one document, one sequence at a time."""
  end = int(np.argmax(acts))
  tokens = list(document[: end + 1])
  for i in range(end, -1, -1):
    suffix = tokens[i:]
    if act_of(suffix) / acts[end] >= 0.5:
      break
  full = act_of(suffix)
  pattern = []
  for i, token in enumerate(suffix):
    saliency = 1 - act_of(suffix[:i] + [PAD] + suffix[i + 1 :]) / full
    pattern.append(token if saliency >= 0.5 else W)
  if act_of([PAD] + suffix) / acts[end] < 0.5:
    pattern = [START] + pattern
  return tuple(pattern), full


def test_batches_of_components_equal_one_sequence_at_a_time(monkeypatch):
  monkeypatch.setattr(neuron2graph, 'BATCH_TOKENS', 64)
  rng = np.random.default_rng(0)
  effect = rng.gamma(0.15, 2.0, (3, 6, 20))  # component, distance from the end, token

  def rule(component, tokens):
    recent = tokens[:-7:-1]
    return float(np.prod([0.4 + effect[component, i, token] for i, token in enumerate(recent)]))

  documents, expected = {}, {}
  for c in range(3):
    documents[c] = []
    for _ in range(4):
      tokens = rng.integers(1, 20, 19)
      acts = [rule(c, list(tokens[: t + 1])) for t in range(19)]
      documents[c].append((tokens, acts))
    found = [naive(*document, lambda tokens, c=c: rule(c, tokens)) for document in documents[c]]
    expected[c] = {pattern: max(v for p, v in found if p == pattern) for pattern, _ in found}
  result = neuron2graph.tries(documents, by_rule(rule), PAD, 20)
  assert {len(pattern) > 2 for c in expected for pattern in expected[c]} == {True, False}
  for c in range(3):
    assert dict(result[c].patterns()) == {pattern: pytest.approx(value) for pattern, value in expected[c].items()}


def test_components_come_in_order_in_groups(monkeypatch):
  monkeypatch.setattr(neuron2graph, 'GROUP', 2)
  rule = lambda c, tokens: float(tokens[-1] == c)
  documents = {c: [([1, c, 2], [0.0, 1.0, 0.0])] for c in (9, 4, 6)}
  found = list(neuron2graph.explain(documents, by_rule(rule), PAD, STRINGS))
  assert [text for text, _ in found] == ["'t9' (1)", "'t4' (1)", "'t6' (1)"]
  assert found[1][1]([4, 9]).tolist() == [1.0, 0.0]


class ReversingSAE(nnx.Module):
  def encode(self, x):
    return 2 * x[..., ::-1], None


@pytest.mark.usefixtures('mesh')
@pytest.mark.parametrize('sae', [None, ReversingSAE()], ids=['neurons', 'latents'])
def test_reader_reads_each_rows_component_at_its_last_token(sae):
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, d_model=8, n_ctx=9, n_vocab=20), nnx.Rngs(0))
  site = 'h.0.mlp.post_act'
  tokens_bt = np.random.default_rng(0).integers(0, 20, (4, 7), np.int32)
  last_b, component_b = np.array([6, 0, 3, 5]), np.array([1, 31, 8, 0])
  found = neuron2graph.reader(model, site, sae)(tokens_bt, last_b, component_b)
  for tokens_t, last, component, act in zip(tokens_bt, last_b, component_b, found, strict=True):
    alone = sites.forward(model, jnp.asarray(tokens_t[None, : last + 1]), capture=(site,))[1][site][0, last]
    alone = alone if sae is None else sae.encode(alone)[0]
    assert act == pytest.approx(float(alone[component]), abs=1e-6)


def test_a_document_that_fills_the_widest_pass_loses_its_oldest_token():
  rule = lambda c, tokens: 4.0 * (len(tokens) >= 3)  # any three tokens
  documents = {0: [([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])]}
  seen = []

  def activation_fn(tokens_bt, last_b, component_b):
    seen.append(tokens_bt.shape[1])
    return by_rule(rule)(tokens_bt, last_b, component_b)

  trie = neuron2graph.tries(documents, activation_fn, PAD, widest=4)[0]
  assert max(seen) == 4
  assert dict(trie.patterns()) == {(W, W, W): 4.0}


def test_windows_as_long_as_the_context_on_a_data_axis_of_any_size(monkeypatch):
  monkeypatch.setattr(neuron2graph, 'BATCH_TOKENS', 64)
  n_ctx, site = 9, 'h.0.mlp.post_act'
  config = gpt2.GPT2Config(n_layer=1, n_head=2, d_model=8, n_ctx=n_ctx, n_vocab=20)
  windows_et = np.random.default_rng(0).integers(1, 20, (6, n_ctx), np.int32)
  texts = []
  for n_data in (1, 3):
    with jax.set_mesh(sharding.make_mesh(n_data, 1)):
      model = gpt2.GPT2(config, nnx.Rngs(0))
      acts_etn = np.asarray(sites.forward(model, windows_et, capture=(site,))[1][site])
      assert (acts_etn[..., :4].argmax(1) == n_ctx - 1).any()
      documents = {n: list(zip(windows_et, acts_etn[..., n], strict=True)) for n in range(4)}
      activation_fn = neuron2graph.reader(model, site)
      texts.append([text for text, _ in neuron2graph.explain(documents, activation_fn, PAD, STRINGS)])
  assert texts[0] == texts[1]
  assert all(texts[0])
