"""Generation equals, token by token, drawing from a forward pass over the whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generation, sae, sharding, sites
from tests.models import families

PROMPTS = np.random.default_rng(0).integers(53, size=(4, 5)).astype(np.int32)
N_NEW, N_SLOTS = 7, 12
KEY = jax.random.key(3)


@pytest.fixture(params=[('odd_gpt2', 1, 1), ('llama', 2, 2)], ids=['odd_gpt2-1x1', 'llama-2x2'])
def model(request):
  name, data, model = request.param
  with jax.set_mesh(sharding.make_mesh(data, model)):
    yield families.build(name)


def recompute(model, edits, temperature, top_p, lengths=(5, 5, 5, 5)):
  """Draws each token from a forward pass over the whole text; the reference. What is not drawn yet, is padding."""
  rows, lengths = np.arange(4), np.array(lengths)
  text_bt = np.zeros((4, N_SLOTS), np.int32)
  text_bt[:, :5] = PROMPTS
  for i in range(N_NEW):
    logits_btv, _ = sites.forward(model, text_bt, edits)
    text_bt[rows, lengths + i] = generation.sample(
      jax.random.fold_in(KEY, i), logits_btv[rows, lengths + i - 1], temperature, top_p
    )
  return np.stack([text_bt[row, n : n + N_NEW] for row, n in zip(rows, lengths, strict=True)])


def edits_of(model, kind):
  rng = np.random.default_rng(1)
  d, h = model.config.d_model, model.config.n_head
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  if kind == 'none':
    return []
  if kind == 'steer':
    return [sites.steer('h.1.resid.post_mlp', 2 * normal(d))]
  if kind == 'tokens':  # other edits at other tokens and rows, of the prompt and of what is new
    return [
      sites.steer('h.0.resid.post_attn', normal(4, N_SLOTS, d), jnp.asarray(rng.random((N_SLOTS, 1)) < 0.5)),
      sites.ablate('h.2.attn.v_out', jnp.asarray(rng.random((4, N_SLOTS, h, 1)) < 0.5)),
    ]
  if kind == 'pattern':  # a row of attention weights for each query and source
    return [
      sites.patch('h.1.attn.qk_probs', jnp.asarray(rng.random((h, N_SLOTS, N_SLOTS)) * np.tri(N_SLOTS), jnp.float32)),
      sites.ablate('h.2.attn.qk_probs', jnp.asarray(rng.random((N_SLOTS, N_SLOTS)) < 0.3)),
    ]
  dictionary = sae.init_sae(jax.random.key(0), normal(64, d), 64, 4)
  latents = 'h.1.resid.post_mlp.latents'
  return [sites.splice('h.1.resid.post_mlp', dictionary), sites.ablate(latents, jnp.asarray(rng.random(64) < 0.5))]


@pytest.mark.parametrize('kind', ['none', 'steer', 'tokens', 'pattern', 'latents'])
def test_tokens_are_those_of_recomputing_the_whole_text(model, kind):
  edits = edits_of(model, kind)
  for temperature, top_p in [(0.0, 1.0), (0.8, 0.9)]:
    found = generation.generate(model, PROMPTS, KEY, N_NEW, edits, temperature, top_p)
    np.testing.assert_array_equal(found.tokens_bt, recompute(model, edits, temperature, top_p))
  if edits:
    assert not np.array_equal(found.tokens_bt, generation.generate(model, PROMPTS, KEY, N_NEW, [], 0.8, 0.9).tokens_bt)


def test_tokens_are_those_of_recomputing_in_bfloat16_too(model):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
  edits = edits_of(model, 'steer')
  found = generation.generate(half, PROMPTS, KEY, N_NEW, edits, 0.8, 0.9)
  np.testing.assert_array_equal(found.tokens_bt, recompute(half, edits, 0.8, 0.9))


def test_prompts_of_several_lengths_are_continued_as_if_alone(model):
  lengths = [5, 1, 3, 4]
  found = generation.generate(model, PROMPTS, KEY, N_NEW, temperature=0.8, n_tokens_b=np.array(lengths))
  np.testing.assert_array_equal(found.tokens_bt, recompute(model, [], 0.8, 1.0, lengths=lengths))


def test_log_probabilities_are_the_model_s(model):
  found = generation.generate(model, PROMPTS, KEY, N_NEW, temperature=0.5, top_p=0.8)
  text_bt = np.concatenate([PROMPTS, found.tokens_bt], 1)
  log_probs_btv = jax.nn.log_softmax(sites.forward(model, text_bt)[0])
  expected = np.take_along_axis(np.asarray(log_probs_btv[:, 4:-1]), text_bt[:, 5:, None], -1)[..., 0]
  np.testing.assert_allclose(found.log_probs_bt, expected, atol=1e-4)


def test_nothing_follows_an_end_token(model):
  whole = generation.generate(model, PROMPTS, KEY, N_NEW, temperature=0.0)
  end = int(whole.tokens_bt[0, 2])
  found = generation.generate(model, PROMPTS, KEY, N_NEW, temperature=0.0, end_token=end)
  for row, log_probs, expected in zip(
    found.tokens_bt.tolist(), found.log_probs_bt, whole.tokens_bt.tolist(), strict=True
  ):
    n = expected.index(end) + 1 if end in expected else N_NEW
    assert row == expected[:n] + [end] * (N_NEW - n)
    assert not np.any(log_probs[n:])


def test_new_values_do_not_retrace(model):
  vector = np.ones(model.config.d_model, np.float32)
  generate = functools.partial(generation.generate, model, n_new=3)
  generate(PROMPTS, jax.random.key(3), edits=[sites.steer('h.1.resid.post_mlp', vector)])
  before = generation._generate._cache_size()
  generate(
    PROMPTS + 1, jax.random.key(9), edits=[sites.steer('h.1.resid.post_mlp', 2 * vector)], temperature=0.3, top_p=0.5
  )
  assert generation._generate._cache_size() == before


@pytest.mark.parametrize('top_p', [0.05, 0.5, 0.9, 1.0])
def test_the_nucleus_is_the_smallest_set_of_that_probability(top_p):
  logits_bv = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
  kept_bv = np.isfinite(generation.nucleus(jnp.asarray(logits_bv), top_p))
  for logits_v, kept_v in zip(logits_bv.astype(np.float64), kept_bv, strict=True):
    probs_v = np.exp(logits_v) / np.exp(logits_v).sum()
    order = np.argsort(-probs_v)
    n = 1
    while n < 40 and probs_v[order[:n]].sum() < top_p - 1e-6:
      n += 1
    assert set(np.flatnonzero(kept_v)) == set(order[:n])


def test_of_equal_tokens_the_first_are_in_the_nucleus():
  np.testing.assert_array_equal(generation.nucleus(jnp.zeros((1, 4)), 0.5), [[0, 0, -np.inf, -np.inf]])


def test_tokens_are_drawn_with_their_probabilities():
  logits_v, n = np.array([2.0, 1.0, 0.0, -1.0]), 40_000
  drawn = generation.sample(KEY, jnp.broadcast_to(jnp.asarray(logits_v, jnp.float32), (n, 4)), 0.7, 0.95)
  probs_v = np.exp(logits_v / 0.7)
  assert probs_v[:2].sum() < 0.95 * probs_v.sum() < probs_v[:3].sum()
  probs_v[3] = 0  # so the fourth is outside the nucleus
  probs_v /= probs_v.sum()
  found_v = np.bincount(drawn, minlength=4) / n
  np.testing.assert_allclose(found_v, probs_v, atol=4 * 0.5 / n**0.5)  # four standard errors


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'n_new': 12}, '17 tokens are longer than the context of 16'),
    ({'n_new': 0}, 'n_new 0 at least 1'),
    ({'temperature': -1.0}, 'temperature -1.0 must be 0 or more'),
    ({'temperature': float('nan')}, 'temperature nan must be 0 or more'),
    ({'tokens_bt': PROMPTS[0]}, r'are no integers \[batch, token\]'),
    ({'top_p': 0.0}, 'top_p 0.0 above 0'),
    ({'n_tokens_b': np.array([5, 6, 1, 1])}, r'n_tokens_b \[5, 6, 1, 1\] must give each of 4 rows 1 to 5 tokens'),
    ({'tokens_bt': PROMPTS + 48}, 'is outside the vocabulary of 53'),
    ({'edits': [sites.steer('h.1.resid.post_mlp', np.ones((5, 32), np.float32))]}, 'an array of 5 tokens; .* all 8'),
  ],
)
def test_bad_settings_are_told(mesh, changed, message):
  arguments = {'tokens_bt': PROMPTS, 'key': KEY, 'n_new': 3, **changed}
  with pytest.raises(ValueError, match=message):
    generation.generate(families.build('gpt2'), **arguments)


def test_a_misspelt_site_raises(mesh):
  with pytest.raises(KeyError, match=r'the nearest are h\.1\.mlp\.post_act'):
    generation.generate(families.build('gpt2'), PROMPTS, KEY, 3, [sites.stop('h.1.mlp.post_acts')])
