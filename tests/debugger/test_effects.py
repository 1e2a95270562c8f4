"""Every column of every kind of node, sums of them, and which norm scales are held, against float64 NumPy."""

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from models import sae, sites
from tests.debugger import reference, subjects

SUBJECTS = {
  'gpt2': ('gpt2', ()),
  'gpt2_saes': ('gpt2', tuple(subjects.SAES)),
  'llama': ('llama', ()),
  'llama_saes': ('llama', ('h.0.mlp.post_act', 'h.1.attn.v_out')),
  'gpt2_active': ('gpt2', ('h.0.mlp.post_act', 'h.1.attn.v_out', 'h.1.resid.post_mlp')),
}
KINDS = ('embedding', 'head', 'head_token', 'head_total', 'neuron', 'latent', 'bias', 'error', 'layer')


@pytest.fixture(scope='module', params=list(SUBJECTS))
def subject(request):
  with pytest.MonkeyPatch.context() as patched:
    if request.param == 'gpt2_active':  # only active latents' rows of the decoders are read, as of large SAEs
      patched.setattr(sae, 'MIN_LATENTS', 20)
      patched.setattr(sae, 'N_ACTIVE', 10)
    yield subjects.build(*SUBJECTS[request.param])


def _some(expected, n=25):
  """Returns nodes of all kinds, chosen at random: tables list only those that matter."""
  rng = np.random.default_rng(3)
  found = []
  for kind in KINDS:
    nodes = expected.nodes(kind)
    found += [nodes[i] for i in rng.permutation(len(nodes))[:n]]
  return found


@pytest.fixture(scope='module')
def answered(subject):
  """The answer on a logit difference with nodes of all kinds, and the reference's."""
  expected = reference.answer(subject, subjects.request())
  request = subjects.request(nodes=_some(expected), k=7)
  return engine.debug(subject, request), expected


def test_the_reference_is_the_model(subject):
  tokens = subject.encode(subjects.PROMPT)
  logits_btv = sites.forward(subject.model, np.array([tokens], np.int32))[0]
  np.testing.assert_allclose(reference.forward(subject.model, tokens)['logits'], logits_btv, atol=1e-5)
  spliced = reference.forward(subject.model, tokens, subject.saes)['logits']
  np.testing.assert_allclose(spliced, reference.forward(subject.model, tokens)['logits'], atol=1e-9)


def test_all_columns_of_all_kinds_of_nodes_equal_finite_differences(subject, answered):
  response, expected = answered
  kinds = {node.kind for node in response.table.nodes}
  absent = set() if subject.saes else {'latent', 'error'}
  assert kinds == set(KINDS) - absent
  assert all(any(node.site == site for node in response.table.nodes if node.kind == 'latent') for site in subject.saes)
  np.testing.assert_allclose(response.objective, expected.objective, atol=1e-6)
  reference.assert_same(response.table, expected)


def test_direct_effects_are_what_really_adding_the_write_vector_does(answered):
  response, expected = answered
  writes = np.stack([expected.write(node) for node in response.table.nodes])
  measured = expected.after(expected.reading.stream, writes) - expected.objective
  np.testing.assert_allclose(reference.column(response.table, 'direct_effect'), measured, rtol=2e-4, atol=2e-6)


def test_direct_effects_and_biases_add_up_to_the_objective(answered):
  response, expected = answered
  found = response.completeness
  assert found.exact
  assert abs(found.residual) < 2e-6
  total = found.embedding + found.attention + found.mlp + found.latents + found.errors + found.biases
  np.testing.assert_allclose(total + found.final_bias + found.residual, found.objective, atol=1e-7)
  # An SAE on the stream stands for all before it.
  on_stream = [site for site in expected.base if site in expected.saes and '.resid.post_' in f'.{site}']
  begin = on_stream[-1] if on_stream else None
  order = list(expected.base)
  stands = lambda site: begin is None or order.index(site) > order.index(begin) or site.startswith(f'{begin}.')
  names = {'embedding': 'embedding', 'head': 'attention', 'neuron': 'mlp', 'latent': 'latents', 'error': 'errors'}
  for kind, name in names.items():
    mine = [node for node in expected.nodes(kind) if stands(expected.part(node)[0])]
    np.testing.assert_allclose(getattr(found, name), expected.direct_effects(mine).sum(), atol=1e-5, err_msg=name)


def test_effects_summed_by_token_are_those_of_all_nodes(subject, answered):
  response, expected = answered
  for kind, name, place in [
    ('embedding', 'embedding', 'token'),
    ('head', 'attention_to', 'token'),
    ('head', 'attention_from', 'source'),
    ('neuron', 'mlp', 'token'),
    ('latent', 'latents', 'token'),
  ]:
    if subject.saes and kind in ('head', 'neuron'):
      continue  # see `test_saes_are_left_out_when_they_are_not_asked_for`
    nodes, sums = expected.nodes(kind), np.zeros(subjects.N_TOKENS)
    if nodes:
      np.add.at(sums, [getattr(node, place) for node in nodes], expected.all_columns(kind)['total_effect'])
    np.testing.assert_allclose(getattr(response.by_token, name), sums, rtol=2e-4, atol=1e-5, err_msg=name)


def test_inner_norm_scales_are_live_and_the_final_one_is_held(answered):
  response, expected = answered
  inner = tuple(site for site in expected.base if site.endswith('_ln.scale'))
  rows = [i for i, node in enumerate(response.table.nodes) if node.kind in ('embedding', 'head_token', 'layer')]
  nodes = [response.table.nodes[i] for i in rows]
  total = reference.column(response.table, 'total_effect')[rows]
  parts = [expected.part(node) for node in nodes]
  slopes = lambda frozen: np.array([expected.slope(site, mine[None], frozen)[0] for site, mine in parts])
  distance = lambda frozen: np.linalg.norm(total - slopes(frozen)) / np.linalg.norm(total)
  assert distance(('ln_f.scale',)) < 1e-5
  assert distance(('ln_f.scale', *inner)) > 0.1
  assert distance(()) > 0.1


def test_the_next_tokens_are_those_of_the_model(answered):
  response, expected = answered
  logits_v = expected.base['logits'][0, -1]
  ids = [token.id for token in response.candidates.tokens]
  order = np.argsort(-logits_v)
  assert ids == [8, 21, 30] + [i for i in order if i not in (8, 21, 30)]
  assert [order[rank] for rank in response.candidates.ranks] == ids
  np.testing.assert_allclose(response.candidates.logits, logits_v[ids], atol=1e-5)
  np.testing.assert_allclose(response.candidates.probabilities, reference.softmax(logits_v)[ids], atol=1e-6)
  assert response.candidates.token == subjects.N_TOKENS - 1


def test_saes_are_left_out_when_they_are_not_asked_for(subject, answered):
  response = engine.debug(subject, subjects.request(saes=[]))
  assert not {'latent', 'error'} & {node.kind for node in response.table.nodes}
  assert not any(response.by_token.latents)
  assert response.completeness.latents == 0
  # Gradients pass SAEs as if they were not there, and heads and neurons are summed by token in any case.
  np.testing.assert_allclose(response.objective, answered[0].objective, atol=1e-6)
  for name in ('embedding', 'attention_to', 'attention_from', 'mlp'):
    with_saes = getattr(answered[0].by_token, name)
    np.testing.assert_allclose(getattr(response.by_token, name), with_saes, rtol=1e-4, atol=1e-6)


def test_the_answer_carries_its_request_and_tokens(answered):
  response, expected = answered
  assert [token.id for token in response.tokens] == expected.tokens
  assert [token.text for token in response.tokens] == subjects.PROMPT.split()
  assert schema.Response.model_validate_json(response.model_dump_json()) == response
  assert response.unedited is None
  assert response.traced_activation is None
