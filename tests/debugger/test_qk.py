"""Attention logits as sums over pairs of nodes, against NumPy and float64 without either or both of a pair."""

import numpy as np
import pytest

from jax_interp.debugger import edges, schema
from tests.debugger import reference, subjects

CELLS = [(0, 2, 5, 1), (1, 3, 6, 4), (2, 0, 4, 4), (2, 3, 6, 2)]  # layer, head, token, source
SAES = [None, []]  # as asked for: all, none


@pytest.fixture(scope='module', params=list(subjects.SUBJECTS))
def subject(request):
  return subjects.build(*subjects.SUBJECTS[request.param])


def split(subject, cell, n=1000, **changes) -> schema.QKResponse:
  names = dict(zip(('layer', 'head', 'token', 'source'), cell, strict=True))
  return edges.qk(subject, schema.QKRequest(request=subjects.request(**changes), n=n, **names))


def is_shift(node, cell, side) -> bool:
  return (node.kind, node.layer, node.index, node.site) == ('bias', cell[0], cell[1], side)


@pytest.mark.parametrize('saes', SAES, ids=['SAEs', 'no SAEs'])
@pytest.mark.parametrize('cell', CELLS)
def test_all_pairs_sum_to_the_logit_and_the_sides_to_it_too(subject, cell, saes):
  found = split(subject, cell, saes=saes)
  layer, head, token, source = cell
  expected = reference.answer(subject, found.request.request)
  q_c = expected.base[f'h.{layer}.attn.q'][0, token, head]
  group = head * expected.base[f'h.{layer}.attn.k'].shape[2] // subject.model.config.n_head
  logit = q_c @ expected.base[f'h.{layer}.attn.k'][0, source, group] / np.sqrt(len(q_c))
  assert found.logit == pytest.approx(logit, abs=1e-5)
  assert found.probability == pytest.approx(expected.base[f'h.{layer}.attn.qk_probs'][0, head, token, source], abs=1e-6)
  assert len(found.effects) == len(found.query.nodes) * len(found.key.nodes)
  largest = np.abs(found.effects).max()
  assert abs(found.residual) < 1e-4 * abs(logit)
  for total in (sum(found.effects), sum(found.query.effects), sum(found.key.effects)):
    assert total == pytest.approx(logit, abs=1e-5 * largest * len(found.effects) ** 0.5 + 1e-6)
  sums = {}
  for q, k, effect in zip(found.query_nodes, found.key_nodes, found.effects, strict=True):
    sums['query', q] = sums.get(('query', q), 0) + effect
    sums['key', k] = sums.get(('key', k), 0) + effect
  for name, side in (('query', found.query), ('key', found.key)):
    np.testing.assert_allclose([sums[name, node] for node in side.nodes], side.effects, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('cell', CELLS)
def test_a_pair_is_what_the_logit_loses_by_both_beyond_by_each(subject, cell):
  """q k - (q - u) k - q (k - v) + (q - u) (k - v): each write really taken out, the scale of the norm held."""
  found = split(subject, cell)
  layer, head, token, source = cell
  expected = reference.answer(subject, found.request.request)
  stream, scales = expected._before(layer, 'attn')
  inputs = {}
  for side, nodes, place in (('q', found.query.nodes, (token, head)), ('k', found.key.nodes, (source, head))):
    site = f'h.{layer}.attn.{side}'
    group = head * expected.base[site].shape[2] // subject.model.config.n_head
    whole_c = expected.base[site][0, place[0], group]
    writers = [node for node in nodes if not is_shift(node, cell, side)]
    assert len(writers) == len(nodes) - 1
    assert {node.token for node in nodes} == {place[0]}
    writes = np.stack([expected.write(node) for node in writers])
    nudged = {stream: lambda x, writes=writes: x - writes}
    acts = reference.forward(expected.model, expected.tokens, expected.saes, expected._frozen(scales), nudged)
    without_nc = acts[site][:, place[0], group]
    inputs[side] = whole_c, dict(zip(writers, without_nc, strict=True))
  (q_c, without_q), (k_c, without_k) = inputs['q'], inputs['k']
  rows = zip(found.query_nodes, found.key_nodes, found.effects, strict=True)
  rows = [(q, k, effect) for q, k, effect in rows if q in without_q and k in without_k]
  assert len(rows) == len(without_q) * len(without_k)
  hand = [
    (q_c @ k_c - without_q[q] @ k_c - q_c @ without_k[k] + without_q[q] @ without_k[k]) / np.sqrt(len(q_c))
    for q, k, _ in rows
  ]
  effects = [effect for *_, effect in rows]
  assert np.abs(effects).max() > 1e-2
  np.testing.assert_allclose(effects, hand, rtol=1e-4, atol=1e-6)


def test_saes_stand_for_what_they_read(subject):
  found = split(subject, (2, 3, 6, 2))
  kinds = {node.kind for node in found.query.nodes}
  sites = {node.site for node in found.query.nodes if node.kind == 'latent'}
  last = {'gpt2': 'h.1.resid.post_mlp', 'llama': 'h.1.resid.post_attn'}[subject.name]
  assert kinds == {'latent', 'error', 'bias'}
  assert sites == {'gpt2': {last}, 'llama': {last, 'h.1.resid.delta_mlp'}}[subject.name]
  expected = reference.answer(subject, found.request.request)
  for site in sites:
    on = np.flatnonzero(expected.base[f'{site}.latents'][0, 6])
    assert {node.index for node in found.query.nodes if node.kind == 'latent' and node.site == site} == set(on)
  plain = split(subject, (2, 3, 6, 2), saes=[])
  heads = [node for node in plain.query.nodes if node.kind == 'head_token']
  assert len(heads) == 2 * subject.model.config.n_head
  assert {node.kind for node in plain.query.nodes} == {'embedding', 'head_token', 'layer', 'bias'}


def test_the_largest_pairs_come_first_and_only_as_many_as_asked_for(subject):
  whole, some = split(subject, CELLS[1]), split(subject, CELLS[1], n=7)
  sizes = np.abs(whole.effects)
  assert (np.diff(sizes) <= 0).all()
  assert (some.query_nodes, some.key_nodes, some.effects) == (
    whole.query_nodes[:7],
    whole.key_nodes[:7],
    whole.effects[:7],
  )
  assert some.residual == whole.residual


def test_an_ablated_run_is_split_as_it_is(subject):
  site = min(site for site in subject.saes if site.startswith('h.1'))
  ablations = [schema.Ablation(kind='latent', site=site), schema.Ablation(kind='embedding', first=4, last=4)]
  found, plain = split(subject, CELLS[3], ablations=ablations), split(subject, CELLS[3])
  assert abs(found.logit - plain.logit) > 1e-3
  assert abs(found.residual) < 1e-4 * abs(found.logit)


@pytest.mark.parametrize(
  ('cell', 'message'),
  [
    ((3, 0, 5, 1), 'layer 3 is not there; there are 3, from 0'),
    ((1, 9, 5, 1), 'head 9 is not there'),
    ((1, 0, 2, 5), 'source 5 is behind token 2'),
    ((1, 0, 7, 5), 'token 7 is not in a prompt of 7 tokens'),
  ],
)
def test_what_is_no_logit_is_refused(cell, message):
  with pytest.raises(ValueError, match=message):
    split(subjects.build(*subjects.SUBJECTS['gpt2']), cell)


def test_a_logit_whose_own_queries_or_keys_are_cut_is_refused():
  subject = subjects.build(*subjects.SUBJECTS['llama'])  # heads 0 to 2 share keys
  cut = lambda layer, head, into: [
    schema.EdgeAblation(node=schema.Node(kind='embedding', token=5), layer=layer, head=head, into=into)
  ]
  for ablations in (cut(1, 2, 'q'), cut(1, 2, 'k'), cut(1, 0, 'k')):
    with pytest.raises(ValueError, match='an edge into the queries or keys of this head is cut'):
      split(subject, (1, 2, 5, 1), saes=[], edge_ablations=ablations)
  for ablations in (cut(1, 2, 'v'), cut(1, 5, 'k'), cut(2, 2, 'q'), cut(1, 0, 'q')):
    found = split(subject, (1, 2, 5, 1), saes=[], edge_ablations=ablations)
    assert abs(found.residual) < 1e-4 * abs(found.logit)
