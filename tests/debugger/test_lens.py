"""Tokens that nodes promote, that excite them and that latents come from, against float64 NumPy."""

import numpy as np
import pytest

from jax_interp.debugger import engine, schema
from tests.debugger import reference, subjects

N = 6
SUBJECTS = {'gpt2': ('gpt2', tuple(subjects.SAES)), 'llama': ('llama', ('h.0.mlp.post_act', 'h.1.attn.v_out'))}
OF_MLP, OF_ATTENTION = ('post_act', 'delta_mlp'), ('v_out', 'delta_attn')


@pytest.fixture(scope='module', params=list(SUBJECTS))
def answered(request):
  subject = subjects.build(*SUBJECTS[request.param])
  expected = reference.answer(subject, subjects.request())
  request = subjects.request(k=3, n_tokens=N, nodes=[node for on in (True, False) for node in _latents(expected, on)])
  return engine.debug(subject, request), expected


def _latents(expected, on: bool):
  """Returns a latent of each SAE that is on, or off, at a token."""
  for site in expected.saes:
    token, index = np.argwhere((expected.base[f'{site}.latents'][0] > 0) == on)[-1]
    yield schema.Node(kind='latent', site=site, token=int(token), index=int(index))


def _weights(x):
  return np.asarray(x, np.float64)


def _assert_ends(top, bottom, scores_v, scale=1.0):
  """Asserts that these are the largest and smallest scores, in order."""
  order = np.argsort(scores_v, kind='stable')
  for found, wanted in ((top, order[::-1][:N]), (bottom, order[:N])):
    np.testing.assert_allclose(found.values, scores_v[wanted], rtol=1e-4, atol=1e-5 * scale)
    ids = [token.id for token in found.tokens]
    np.testing.assert_allclose(found.values, scores_v[ids], rtol=1e-4, atol=1e-5 * scale)
    assert all(token.text == str(token.id) for token in found.tokens)


def test_promoted_tokens_are_the_write_through_gain_and_unembedding_minus_the_mean(answered):
  response, expected = answered
  model = expected.model
  gain_d, unembedding_vd = _weights(model.ln_f.gain[...]), _weights(model.unembedding)
  assert [row.node for row in response.node_tokens] == list(range(len(response.table.nodes)))
  for row in response.node_tokens:
    scores_v = (expected.write(response.table.nodes[row.node]).sum(0) * gain_d) @ unembedding_vd.T
    _assert_ends(row.promoted, row.suppressed, scores_v - scores_v.mean(), max(1, np.abs(scores_v).max()))


def test_tokens_excite_what_reads_an_mlp_by_its_gradient_with_the_norm_held(answered):
  response, expected = answered
  embedding_vd, d = _weights(expected.model.wte.embedding[...]), expected.model.config.d_model
  seen = set()
  for row in response.node_tokens:
    node = response.table.nodes[row.node]
    name = 'neuron' if node.kind == 'neuron' else node.site.split('.')[-1] if node.kind == 'latent' else None
    if name not in ('neuron', *OF_MLP):
      assert row.excited_by is None
      assert row.inhibited_by is None
      continue
    seen.add(name)
    layer = node.layer if name == 'neuron' else int(node.site.split('.')[1])
    traced = reference.answer(expected.subject, subjects.request(trace=schema.Trace(node=node)))
    unit = np.zeros((d, subjects.N_TOKENS, d))
    unit[:, node.token] = np.eye(d)
    _assert_ends(row.excited_by, row.inhibited_by, embedding_vd @ traced.slope(f'h.{layer}.resid.post_attn', unit), 10)
  of_mlp = {site.split('.')[-1] for site in expected.saes} & set(OF_MLP)
  assert seen == {'neuron'} | of_mlp


def test_attention_latents_come_from_the_tokens_whose_values_they_read(answered):
  response, expected = answered
  model, seen = expected.model, set()
  for row in response.node_tokens:
    node = response.table.nodes[row.node]
    if node.kind != 'latent' or node.site.split('.')[-1] not in OF_ATTENTION:
      assert row.attributed_to is None
      continue
    layer = int(node.site.split('.')[1])
    probs_hs, v_sgc = (expected.base[f'h.{layer}.attn.{name}'][0] for name in ('qk_probs', 'v'))
    probs_hs = probs_hs[:, node.token]
    read_shc = probs_hs.T[:, :, None] * np.repeat(v_sgc, len(probs_hs) // v_sgc.shape[1], axis=1)
    given = read_shc.reshape(subjects.N_TOKENS, -1)
    if node.site.endswith('delta_attn'):
      kernel_hcd = _weights(model.h[layer].attn.c_proj.kernel[...])
      given = given @ kernel_hcd.reshape(-1, kernel_hcd.shape[-1])
    traced = reference.answer(expected.subject, subjects.request(trace=schema.Trace(node=node)))
    deltas = np.zeros((subjects.N_TOKENS, *expected.base[f'{node.site}.input'].shape[1:]))
    deltas[:, node.token] = given
    is_on = bool(expected.part(node)[1].any())
    parts_s = traced.slope(f'{node.site}.input', deltas) * is_on
    seen.add((node.site, is_on))
    order = np.argsort(-parts_s, kind='stable')[:3]
    assert row.attributed_to == order.tolist()
    np.testing.assert_allclose(row.attributions, parts_s[order], rtol=1e-4, atol=1e-5)
  of_attention = [site for site in expected.saes if site.split('.')[-1] in OF_ATTENTION]
  assert seen == {(site, on) for site in of_attention for on in (True, False)}


def test_no_lists_are_made_where_none_are_asked_for(answered):
  _, expected = answered
  assert engine.debug(expected.subject, subjects.request(k=3)).node_tokens == []
