"""What ablations hold, at what, and in which order, against really replacing the cells in float64 NumPy."""

import functools

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from tests.debugger import reference, subjects

T, OTHER, DECODED = subjects.N_TOKENS, '11 2 50 8 8 30 21 6 1', 'h.1.resid.delta_mlp'
SAES = ('h.0.mlp.post_act', DECODED)
Ablation, Value, Mean = schema.Ablation, schema.Value, schema.Mean
POST_ACT, PROBS, V_OUT, LATENTS = 'h.1.mlp.post_act', 'h.1.attn.qk_probs', 'h.1.attn.v_out', f'{DECODED}.latents'
ROWS, CAUSAL = np.arange(T)[:, None], np.tri(T, dtype=bool)
WHOLE, LATER = slice(None), slice(2, 5)
# Name: ablations, and what they come to: (site, where in [...] of it, at what) in order.
CASES = {
  'neuron': ([Ablation(kind='neuron', layer=1, index=5, first=4, last=4)], [(POST_ACT, (4, 5), 0)]),
  'neuron_at_a_value_everywhere': (
    [Ablation(kind='neuron', layer=1, index=5, to=Value(value=1.5))],
    [(POST_ACT, (WHOLE, 5), 1.5)],
  ),
  'neurons_of_a_layer_in_a_range': ([Ablation(kind='neuron', layer=1, first=2, last=-3)], [(POST_ACT, (LATER,), 0)]),
  'head_at_a_token': ([Ablation(kind='head', layer=1, index=2, first=4, last=4)], [(PROBS, (2, 4), 0)]),
  'head_at_a_value': (
    [Ablation(kind='head', layer=1, index=2, first=2, last=4, to=Value(value=0.3))],
    [(PROBS, (2,), np.where((ROWS >= 2) & (ROWS < 5) & CAUSAL, 0.3, np.nan))],
  ),
  'pair': ([Ablation(kind='head', layer=1, index=2, source=2, first=5, last=5)], [(PROBS, (2, 5, 2), 0)]),
  'source_in_a_range': (
    [Ablation(kind='head', layer=1, index=2, source=2, to=Value(value=0.7))],
    [(PROBS, (2, slice(2, None), 2), 0.7)],
  ),
  'source_of_all_heads': (
    [Ablation(kind='head', layer=1, source=1, first=3)],
    [(PROBS, (WHOLE, slice(3, None), 1), 0)],
  ),
  'heads_of_a_layer': ([Ablation(kind='head', layer=1)], [(PROBS, (), 0)]),
  'attention_of_the_last_layer': (
    [Ablation(kind='attn', layer=2, first=3, to=Value(value=-0.1))],
    [('h.2.resid.delta_attn', (slice(3, None),), -0.1)],
  ),
  'attention_of_a_layer': ([Ablation(kind='attn', layer=1, first=3, last=3)], [('h.1.resid.delta_attn', (3,), 0)]),
  'mlp_of_a_layer': ([Ablation(kind='mlp', layer=0, to=Value(value=-0.2))], [('h.0.resid.delta_mlp', (), -0.2)]),
  'embedding': ([Ablation(kind='embedding', first=3, last=3)], [('resid.post_emb', (3,), 0)]),
  'latent': ([Ablation(kind='latent', site=DECODED, index=7, to=Value(value=2))], [(LATENTS, (WHOLE, 7), 2)]),
  'latents_of_an_sae': ([Ablation(kind='latent', site=DECODED, first=2, last=4)], [(LATENTS, (LATER,), 0)]),
  'a_neuron_that_an_sae_reads': (
    [Ablation(kind='neuron', layer=0, index=9, to=Value(value=3))],
    [('h.0.mlp.post_act', (WHOLE, 9), 3)],
  ),
  'several': (
    [Ablation(kind='neuron', layer=0), Ablation(kind='head', layer=1, index=0), Ablation(kind='embedding', last=0)],
    [('h.0.mlp.post_act', (), 0), (PROBS, (0,), 0), ('resid.post_emb', (0,), 0)],
  ),
  'a_later_one_wins': (
    [Ablation(kind='neuron', layer=1, first=2, last=4), Ablation(kind='neuron', layer=1, index=5, to=Value(value=1))],
    [(POST_ACT, (LATER,), 0), (POST_ACT, (WHOLE, 5), 1)],
  ),
  'an_earlier_one_loses': (
    [Ablation(kind='neuron', layer=1, index=5, to=Value(value=1)), Ablation(kind='neuron', layer=1, first=2, last=4)],
    [(POST_ACT, (WHOLE, 5), 1), (POST_ACT, (LATER,), 0)],
  ),
}


@pytest.fixture(scope='module')
def subject():
  return subjects.build('gpt2', SAES)


def _replaced(x, where, value):
  """Returns an activation [run, ...] with cells at a value, those of nan as they were; patterns stay causal."""
  x, is_pattern = x.copy(), x.ndim == 4 and x.shape[2:] == (T, T)
  x[:, *where] = np.where(np.isnan(value), x[:, *where], value)
  return np.where(CAUSAL, x, 0) if is_pattern else x


def _changes(cells):
  """Returns what `reference.forward` takes."""
  found = {}
  for site, where, value in cells:
    found.setdefault(site, []).append((where, value))

  def apply(x, changes):
    for where, value in changes:
      x = _replaced(x, where, value)
    return x

  return {site: functools.partial(apply, changes=changes) for site, changes in found.items()}


@pytest.mark.parametrize('name', list(CASES))
def test_the_run_is_that_with_the_cells_replaced(subject, name):
  ablations, cells = CASES[name]
  request = subjects.request(ablations=ablations, k=4)
  expected, clean = reference.answer(subject, request, _changes(cells)), reference.answer(subject, request)
  response = engine.debug(subject, request)
  assert abs(expected.objective - clean.objective) > 1e-4
  np.testing.assert_allclose(response.objective, expected.objective, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(response.unedited, clean.objective, rtol=1e-5, atol=2e-6)
  reference.assert_same(response.table, expected)
  assert response.completeness.exact
  assert abs(response.completeness.residual) < 1e-5


def test_what_is_held_at_zero_is_zero_in_every_column(subject):
  Node = schema.Node
  nodes = [
    Node(kind='neuron', layer=1, index=5, token=6),
    Node(kind='head', layer=1, index=2, token=6, source=3),
    Node(kind='latent', site=DECODED, index=int(_active(subject)), token=6),
    Node(kind='embedding', token=6),
  ]
  ablations = [
    Ablation(kind='neuron', layer=1, index=5),
    Ablation(kind='head', layer=1, index=2),
    Ablation(kind='latent', site=DECODED),
    Ablation(kind='embedding', first=6),
  ]
  columns = lambda **changes: np.array(
    [
      reference.column(engine.debug(subject, subjects.request(nodes=nodes, **changes)).table, name)[: len(nodes)]
      for name in reference.COLUMNS
    ]
  )
  assert columns().all()
  held = columns(ablations=ablations)
  assert held[0].tolist() == [0, 0, 0, 1]  # an embedding's activation is 1 by definition
  assert not held[1:].any()


def _active(subject):
  """Returns a latent that is on at the last token."""
  run = reference.answer(subject, subjects.request())
  return np.argmax(run.base[LATENTS][0, -1])


def test_an_sae_that_stands_for_ablated_neurons_reads_what_they_are_held_at(subject):
  site = 'h.0.mlp.post_act'
  node = schema.Node(kind='latent', site=site, index=3, token=4)
  ablation = Ablation(kind='neuron', layer=0, to=Value(value=0.5))
  request = subjects.request(schema.PreActivation(node=node), ablations=[ablation])
  expected = reference.Dictionary(subject.saes[site]).read(np.full(subject.model.config.n_neurons, 0.5))[3]
  np.testing.assert_allclose(engine.debug(subject, request).objective, expected, rtol=1e-5)


# Values of other runs

KINDS = {
  'neuron': (Ablation(kind='neuron', layer=1, index=5), POST_ACT, (WHOLE, 5)),
  'neurons': (Ablation(kind='neuron', layer=1, first=2, last=4), POST_ACT, (LATER,)),
  'head': (Ablation(kind='head', layer=1, index=2, first=2, last=4), V_OUT, (LATER, 2)),
  'heads': (Ablation(kind='head', layer=1), V_OUT, ()),
  'latent': (Ablation(kind='latent', site=DECODED, index=7), LATENTS, (WHOLE, 7)),
  'embedding': (Ablation(kind='embedding', first=2, last=4), 'resid.post_emb', (LATER,)),
  'attn': (Ablation(kind='attn', layer=1, last=3), 'h.1.resid.delta_attn', (slice(0, 4),)),
  'mlp': (Ablation(kind='mlp', layer=1), 'h.1.resid.delta_mlp', ()),
  'pair': (Ablation(kind='head', layer=1, index=2, source=2, first=5, last=5), PROBS, (2, 5, 2)),
}


def _held(ablation, to):
  return ablation.model_copy(update={'to': to})


def _objective(subject, *ablations):
  return engine.debug(subject, subjects.request(ablations=list(ablations), k=1)).objective


def _expected(subject, *cells):
  return reference.answer(subject, subjects.request(), _changes(cells)).objective


def _of(subject, tokens):
  return reference.forward(subject.model, list(tokens), subject.saes)


@pytest.mark.parametrize('kind', list(KINDS))
def test_the_value_of_another_prompt_is_taken_token_by_token(subject, kind):
  ablation, site, where = KINDS[kind]
  other = _of(subject, subject.encode(OTHER)[:T])[site][:1]
  expected = _expected(subject, (site, where, other[:, *where]))
  assert abs(expected - _expected(subject)) > 1e-4
  found = _objective(subject, _held(ablation, schema.OtherPrompt(prompt=OTHER)))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'pair'])
def test_the_mean_is_over_the_tokens_of_the_sample(subject, kind):
  ablation, site, where = KINDS[kind]
  mean = np.mean([_of(subject, window)[site][0].mean(0) for window in subject.sample_wt], 0)
  other = np.broadcast_to(mean, (T, *mean.shape))
  expected = _expected(subject, (site, where, other[*where]))
  assert abs(expected - _expected(subject)) > 1e-4
  np.testing.assert_allclose(_objective(subject, _held(ablation, Mean())), expected, rtol=1e-5, atol=2e-6)


def test_a_resample_is_a_window_of_the_sample_that_the_seed_chooses(subject):
  ablation, site, where = KINDS['heads']
  windows = [_expected(subject, (site, where, _of(subject, w[:T])[site][:1])) for w in subject.sample_wt]
  chosen = []
  for seed in range(8):
    found = [_objective(subject, _held(ablation, schema.Resample(seed=seed))) for _ in range(2)]
    assert found[0] == found[1]
    chosen.append(int(np.argmin(np.abs(np.array(windows) - found[0]))))
    np.testing.assert_allclose(found[0], windows[chosen[-1]], rtol=1e-5, atol=2e-6)
  assert len(set(chosen)) > 2


@pytest.mark.parametrize(
  'changes',
  [[('mlp', Mean()), ('latent', Mean())], [('head', schema.OtherPrompt(prompt=OTHER))]],
  ids=['mean', 'prompt'],
)
def test_columns_are_right_under_values_of_other_runs(subject, changes):
  cells, ablations = [], []
  for kind, to in changes:
    ablation, site, where = KINDS[kind]
    if isinstance(to, Mean):
      mean = np.mean([_of(subject, window)[site][0].mean(0) for window in subject.sample_wt], 0)
      other = np.broadcast_to(mean, (T, *mean.shape))[*where]
    else:
      other = _of(subject, subject.encode(OTHER)[:T])[site][0][*where]
    cells.append((site, where, other))
    ablations.append(_held(ablation, to))
  pairs = [schema.Node(kind='head', layer=1, index=index, token=4, source=1) for index in (2, 1)]
  objective = schema.LogitDifference(targets=['8'], distractors=['30'], token=4)
  for nodes in ([], pairs):
    request = subjects.request(objective, ablations=ablations, k=4, nodes=nodes)
    table = engine.debug(subject, request).table
    reference.assert_same(table, reference.answer(subject, request, _changes(cells)))
  if changes[0][0] == 'head':  # held at this token: its pairs are not what it gives
    assert [effect != 0 for effect in table.direct_effect[:2]] == [False, True]


def test_the_later_of_a_head_s_pattern_and_its_reading_wins(subject):
  off, mean = Ablation(kind='head', layer=1, index=2), _held(KINDS['head'][0], Mean())
  whole_mean = _held(off, Mean())
  assert _objective(subject, whole_mean, off) == pytest.approx(_objective(subject, off), abs=1e-6)
  assert _objective(subject, off, whole_mean) == pytest.approx(_objective(subject, whole_mean), abs=1e-6)
  # Where the later one holds nothing, the earlier one stays.
  early = off.model_copy(update={'last': 1})
  both = _objective(subject, mean, early)
  assert both == pytest.approx(_objective(subject, early, mean), abs=1e-6)
  assert abs(both - _objective(subject, mean)) > 1e-4
  assert abs(_objective(subject, off) - _objective(subject, whole_mean)) > 1e-4


def test_only_norms_of_neurons_are_negative_with_tokens_listed_or_without(subject):
  below = schema.Value(value=-3.0)
  ablations = [
    Ablation(kind='head', layer=1, index=2, to=below),
    Ablation(kind='latent', site=DECODED, index=7, to=below),
    Ablation(kind='neuron', layer=2, index=5, to=below),
  ]
  tables = [engine.debug(subject, subjects.request(ablations=ablations, k=4, n_tokens=n)).table for n in (0, 2)]
  assert tables[0].nodes == tables[1].nodes
  for name in reference.COLUMNS:
    np.testing.assert_allclose(*(reference.column(table, name) for table in tables), rtol=1e-5, atol=1e-6)
  below = {node.kind for node, norm in zip(tables[0].nodes, tables[0].write_norm, strict=True) if (norm or 0) < 0}
  assert below == {'neuron'}
  held = {node.kind for node, x in zip(tables[0].nodes, tables[0].activation, strict=True) if x == -3}
  assert held == {'head', 'latent', 'neuron'}
