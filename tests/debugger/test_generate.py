"""Continuations under edits against tokens chosen one by one from whole forward passes with the edits made by hand."""

import jax
import numpy as np
import pytest

from jax_interp.debugger import engine, generate, schema
from models import generation, sites
from tests.debugger import subjects

SITES = ('h.0.mlp.post_act', 'h.1.resid.post_mlp')
N_NEW, N = 9, 16  # new tokens, and all: the context, so that masks by hand are over as many tokens
DIRECTION = 5 * np.random.default_rng(8).normal(size=32).astype(np.float32)
IDS = [int(word) for word in subjects.PROMPT.split()]


@pytest.fixture(scope='module', params=['gpt2', 'llama'])
def subject(request):
  return subjects.build(request.param, SITES)


def generated(subject, **changes) -> schema.GenerateResponse:
  return generate.generate(subject, schema.GenerateRequest(**{'prompt': subjects.PROMPT, 'n_new': N_NEW} | changes))


def ids(tokens) -> list[int]:
  return [token.id for token in tokens]


def greedy(subject, edits) -> list[int]:
  """Returns the likeliest tokens, each from a forward pass over the whole text."""
  tokens = list(IDS)
  while len(tokens) < N:
    padded = np.array([tokens + [0] * (N - len(tokens))], np.int32)
    logits_btv, _ = sites.forward(subject.model, padded, edits)
    tokens.append(int(np.argmax(logits_btv[0, len(tokens) - 1])))
  return tokens[len(IDS) :]


def only(n, index):
  return np.arange(n) == index


def tokens_in(first, last):
  return (np.arange(N) >= first) & (np.arange(N) <= last)


def test_the_baseline_is_plain_generation(subject):
  for settings in ({}, {'temperature': 1.5, 'top_p': 0.9, 'seed': 3}):
    found = generated(subject, **settings)
    key = jax.random.key(settings.get('seed', 0))
    rest = {'temperature': settings.get('temperature', 0.0), 'top_p': settings.get('top_p', 1.0)}
    plain = generation.generate(subject.model, np.array([IDS], np.int32), key, N_NEW, **rest)
    assert ids(found.baseline) == plain.tokens_bt[0].tolist()
    assert found.edited == found.baseline
    assert ids(found.prompt) == IDS
  assert ids(generated(subject).baseline) == greedy(subject, [])


def test_steering_is_added_to_every_token(subject):
  site, node = 'h.1.resid.post_attn', schema.Node(kind='neuron', layer=0, index=7)
  kernel_nd = np.asarray(subject.model.h[0].mlp.c_proj.kernel[...])
  along = lambda c: schema.Steering(site=site, direction=DIRECTION.tolist(), coefficient=c)
  steered = generated(subject, steering=[along(3.0), schema.Steering(site=site, node=node, coefficient=-40)])
  by_hand = greedy(subject, [sites.steer(site, 3 * DIRECTION - 40 * kernel_nd[7])])
  assert ids(steered.edited) == by_hand
  assert steered.edited != steered.baseline
  nothing = generated(subject, steering=[along(0.0), schema.Steering(site=site, node=node, coefficient=0)])
  assert nothing.edited == nothing.baseline == steered.baseline


def test_a_latent_is_steered_along_what_it_writes(subject):
  for site, kernel in ((SITES[0], subject.model.h[0].mlp.c_proj.kernel[...]), (SITES[1], np.eye(32))):
    node = schema.Node(kind='latent', site=site, index=4)
    steering = generate._steering(subject, schema.Steering(site='resid.post_emb', node=node, coefficient=2.5))
    vector_d = np.asarray(subject.saes[site].decoder[...][4] @ kernel)
    np.testing.assert_allclose(steering.args[0], 2.5 * vector_d, rtol=1e-5, atol=1e-6)


def test_ablations_hold_over_new_tokens_if_their_last_is_the_end(subject):
  n_head, n_neurons = subject.model.config.n_head, subject.model.config.n_neurons
  means = engine.means(subject, ())
  held, to = schema.Ablation, schema.Value
  ablations = [
    held(kind='neuron', layer=0, index=5, to=to(value=4.0)),
    held(kind='neuron', layer=2, index=3, first=1, last=-2, to=to(value=-3.0)),
    held(kind='head', layer=1, index=2, to=to(value=0.4)),
    held(kind='head', layer=1, index=0),
    held(kind='head', layer=2, index=1, first=3, to=schema.Mean()),
    held(kind='latent', site=SITES[0], index=4, to=to(value=3.0)),
    held(kind='latent', site=SITES[1], first=2),
    held(kind='attn', layer=0, first=2, last=4),
    held(kind='embedding', first=2, last=2),
  ]
  n_prompt = len(IDS)
  all_t = tokens_in(0, N)
  tri = np.tri(N, dtype=bool)
  by_hand = [
    sites.patch('h.0.mlp.post_act', 4.0, all_t[:, None] & only(n_neurons, 5)),
    sites.patch('h.2.mlp.post_act', -3.0, tokens_in(1, n_prompt - 2)[:, None] & only(n_neurons, 3)),
    sites.patch('h.1.attn.qk_probs', 0.4, tri & only(n_head, 2)[:, None, None]),
    sites.patch('h.1.attn.qk_probs', 0.0, only(n_head, 0)[:, None, None]),
    sites.patch('h.2.attn.v_out', means['h.2.attn.v_out'], tokens_in(3, N)[:, None, None] & only(n_head, 1)[:, None]),
    sites.patch(f'{SITES[0]}.latents', 3.0, only(44, 4)),
    sites.patch(f'{SITES[1]}.latents', 0.0, tokens_in(2, N)[:, None]),
    sites.patch('h.0.resid.delta_attn', 0.0, tokens_in(2, 4)[:, None]),
    sites.patch('resid.post_emb', 0.0, tokens_in(2, 2)[:, None]),
    *(sites.splice(site, subject.saes[site]) for site in SITES),
  ]
  found = generated(subject, ablations=ablations)
  assert ids(found.edited) == greedy(subject, by_hand)
  assert found.edited != found.baseline
  # Tokens are few bits: the logits under the edits are compared too.
  edits = [generate._ablation(subject, ablation, n_prompt, N) for ablation in ablations]
  edits += [sites.splice(site, subject.saes[site]) for site in SITES]
  tokens_bt = np.array([IDS + ids(found.edited)], np.int32)
  of = lambda edits: sites.forward(subject.model, tokens_bt, edits)[0]
  np.testing.assert_allclose(of(edits), of(by_hand), atol=1e-5)
  # And over a prompt alone they are what they are in `debug`.
  request = subjects.request(prompt=' '.join(map(str, tokens_bt[0])), ablations=[a for a in ablations if a.last == -1])
  edits = [generate._ablation(subject, ablation, N, N) for ablation in request.ablations]
  edits += [sites.splice(site, subject.saes[site]) for site in SITES]
  logits_v = of(edits)[0, -1]
  value = engine.value(subject, engine.prepare(subject, request))
  assert value == pytest.approx(float((logits_v[8] + logits_v[21]) / 2 - logits_v[30]), abs=1e-4)


def test_an_ablation_to_what_is_there_anyway_changes_nothing(subject):
  site = SITES[0]
  text = np.array([IDS + ids(generated(subject).baseline)], np.int32)
  edits = [sites.splice(site, subject.saes[site])]
  latents_tl = sites.forward(subject.model, text, edits, capture=(f'{site}.latents',))[1][f'{site}.latents'][0]
  off = np.flatnonzero(~np.asarray(latents_tl[:-1] > 0).any(0))
  assert len(off)
  ablations = [schema.Ablation(kind='latent', site=site, index=int(off[0]))]
  found = generated(subject, ablations=ablations)
  assert found.edited == found.baseline


def test_a_text_stops_behind_the_end_token(subject):
  baseline = ids(generated(subject).baseline)
  end = next(token for token in baseline[2:] if token not in baseline[:2])
  subject.tokenizer.eos_token_id = end
  try:
    found = generated(subject)
  finally:
    del subject.tokenizer.eos_token_id
  assert ids(found.baseline) == baseline[: baseline.index(end) + 1]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'n_new': 10}, '7 tokens and 10 new ones are more than the context of 16'),
    ({'ablations': [{'kind': 'mlp', 'layer': 3}]}, 'layer 3 is not there'),
    ({'ablations': [{'kind': 'mlp', 'layer': 1, 'first': 7}]}, 'first 7 is not in a prompt of 7 tokens'),
    ({'ablations': [{'kind': 'head', 'layer': 1, 'index': 1, 'source': 2}]}, 'one token pair cannot be ablated'),
    (
      {'ablations': [{'kind': 'mlp', 'layer': 1, 'to': {'kind': 'prompt', 'prompt': '3'}}]},
      "'prompt' is of another run",
    ),
    ({'ablations': [{'kind': 'mlp', 'layer': 1, 'to': {'kind': 'resample'}}]}, "'resample' is of another run"),
    ({'ablations': [{'kind': 'mlp', 'layer': 1, 'first': 4, 'last': 2}]}, 'from token 4 to 2 is of none'),
    ({'steering': [{'site': 'logits', 'direction': [1.0] * 32, 'coefficient': 1}]}, "'logits' is no residual stream"),
    (
      {'steering': [{'site': 'resid.post_emb', 'direction': [1.0], 'coefficient': 1}]},
      'has 1 numbers; the stream has 32',
    ),
    ({'steering': [{'site': 'resid.post_emb', 'coefficient': 1}]}, 'give one of them'),
    (
      {'steering': [{'site': 'resid.post_emb', 'node': {'kind': 'embedding'}, 'coefficient': 1}]},
      'must be one of neuron, latent',
    ),
  ],
)
def test_what_cannot_be_done_is_refused(subject, changes, message):
  with pytest.raises(ValueError, match=message):
    generated(subject, **changes)
