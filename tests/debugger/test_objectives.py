"""Values and gradients of every objective, against float64 NumPy."""

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from tests.debugger import reference, subjects

D = 32  # d_model of both families
DIRECTION = np.random.default_rng(5).normal(size=D).tolist()
HEAD = schema.Node(kind='head', layer=1, index=2, token=5, source=2)
OBJECTIVES = {
  'logit_difference': schema.LogitDifference(targets=['8', '21'], distractors=['30', '2', '11']),
  'logits': schema.LogitDifference(targets=['8', '21'], token=3),
  'one_token_twice': schema.LogitDifference(targets=['8', '21', '8'], distractors=['21', '2']),
  'log_probability': schema.LogProbability(targets=['8', '21', '2']),
  'log_probability_at': schema.LogProbability(targets=['40'], token=-3),
  'entropy': schema.Entropy(token=2),
  'continuation': schema.Continuation(text='8 21 8'),
  'continuation_of_one': schema.Continuation(text='40'),
  'projection_embedding': schema.Projection(site='resid.post_emb', token=4, direction=DIRECTION),
  'projection_attn': schema.Projection(site='h.1.resid.post_attn', token=4, direction=DIRECTION),
  'projection_mlp': schema.Projection(site='h.1.resid.post_mlp', direction=DIRECTION),
  'projection_last': schema.Projection(site='h.2.resid.post_mlp', token=-2, direction=DIRECTION),
  'pre_activation': schema.PreActivation(node=schema.Node(kind='neuron', layer=2, index=17, token=6)),
  'attention_q': schema.AttentionLogit(node=HEAD, through='q'),
  'attention_k': schema.AttentionLogit(node=HEAD, through='k'),
  'attention_qk': schema.AttentionLogit(node=HEAD),
  'head_v': schema.HeadWrite(node=HEAD, of=schema.Entropy(token=5)),
  'head_all': schema.HeadWrite(node=HEAD, through='all', of=schema.LogitDifference(targets=['8'], token=5)),
}
CONTINUATIONS = [name for name in OBJECTIVES if name.startswith('continuation')]
ONE_DISTRIBUTION = [name for name in OBJECTIVES if name not in CONTINUATIONS]  # at most, whatever is asked
EXACT = {'logit_difference', 'logits', 'one_token_twice', 'pre_activation', 'attention_q', 'attention_k', 'head_v'}
EXACT |= {name for name in OBJECTIVES if name.startswith('projection')}


@pytest.fixture(scope='module', params=['gpt2', 'llama'])
def subject(request):
  return subjects.build(request.param)


@pytest.fixture(scope='module')
def gpt2():
  return subjects.build('gpt2')


@pytest.mark.parametrize('name', ONE_DISTRIBUTION)
def test_value_and_effects_equal_finite_differences(subject, name):
  _check(subject, OBJECTIVES[name])


@pytest.mark.parametrize('name', CONTINUATIONS)
def test_a_continuation_is_as_probable_as_its_tokens_after_one_another(gpt2, name):
  _check(gpt2, OBJECTIVES[name])


def _check(subject, objective):
  request = subjects.request(objective, k=4)
  expected = reference.answer(subject, request)
  n_tokens = len(expected.tokens)
  embeddings = [schema.Node(kind='embedding', token=t) for t in range(n_tokens)]
  response = engine.debug(subject, request.model_copy(update={'nodes': embeddings}))
  np.testing.assert_allclose(response.objective, expected.objective, rtol=1e-5, atol=1e-6)
  reference.assert_same(response.table, expected)
  assert [token.id for token in response.tokens] == expected.tokens


@pytest.mark.parametrize('name', list(OBJECTIVES))
def test_completeness_is_exact_where_it_says_so(gpt2, name):
  found = engine.debug(gpt2, subjects.request(OBJECTIVES[name], k=4)).completeness
  assert found.exact == (name in EXACT)
  if found.exact:  # up to the rounding of what is added up
    parts = found.embedding, found.attention, found.mlp, found.latents, found.errors, found.biases, found.final_bias
    assert abs(found.residual) < 1e-6 * max(1, sum(map(abs, parts)))
  else:
    assert abs(found.residual) > 1e-3


def test_what_the_final_norm_and_the_reader_add_is_the_objective_of_an_empty_stream(subject):
  # With the norm's scale held, a stream of zeros leaves the shift alone.
  for name in ('logit_difference', 'projection_mlp', 'pre_activation', 'attention_q', 'attention_k', 'head_v'):
    request = subjects.request(OBJECTIVES[name])
    expected = reference.answer(subject, request)
    nothing = -expected.base[expected.reading.stream][:1]
    found = engine.debug(subject, request).completeness.final_bias
    np.testing.assert_allclose(found, expected.after(expected.reading.stream, nothing), atol=1e-6, err_msg=name)


def test_kl_is_that_of_the_ablated_run_from_the_unablated_one(gpt2):
  ablation = schema.Ablation(kind='mlp', layer=1)
  held = {'h.1.resid.delta_mlp': np.zeros_like}
  for token in (-1, 3):
    request = subjects.request(schema.KL(token=token), k=4, ablations=[ablation])
    expected = reference.answer(gpt2, request, held)
    response = engine.debug(gpt2, request)
    assert expected.objective > 1e-3
    np.testing.assert_allclose(response.objective, expected.objective, rtol=1e-4, atol=1e-6)
    assert abs(response.unedited) < 1e-6
    reference.assert_same(response.table, expected)


def test_without_ablations_there_is_no_divergence(subject):
  response = engine.debug(subject, subjects.request(schema.KL()))
  assert abs(response.objective) < 1e-6
  assert np.abs(reference.column(response.table, 'total_effect')).max(initial=0) < 1e-5


def test_the_sign_of_an_effect_turns_with_the_objective(subject):
  ask = lambda targets, distractors: engine.debug(
    subject, subjects.request(schema.LogitDifference(targets=targets, distractors=distractors), k=4)
  )
  one, other = ask(['8'], ['21']), ask(['21'], ['8'])
  assert set(one.table.nodes) == set(other.table.nodes)
  turned = dict(zip(other.table.nodes, other.table.direct_effect, strict=True))
  np.testing.assert_allclose([-turned[node] for node in one.table.nodes], one.table.direct_effect, atol=1e-6)


def test_candidates_are_read_where_the_objective_is(subject):
  for name, token in [('log_probability_at', 4), ('attention_q', 5), ('logits', 3), ('entropy', 2)]:
    response = engine.debug(subject, subjects.request(OBJECTIVES[name]))
    logits_v = reference.answer(subject, subjects.request(OBJECTIVES[name])).base['logits'][0, token]
    assert response.candidates.token == token
    ids = [one.id for one in response.candidates.tokens]
    np.testing.assert_allclose(response.candidates.logits, logits_v[ids], atol=1e-5)
    assert len(ids) == min(100, subject.model.config.n_vocab)
