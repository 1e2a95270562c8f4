"""Activations equal the forward pass on every mesh; shuffling is exact and resumes anywhere."""

import functools
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_interp import activations
from models import gpt2, sharding, sites

SITES = ('h.0.mlp.post_act', 'h.*.resid.post_mlp')


@functools.cache
def build(mesh):
  config = gpt2.GPT2Config(n_layer=2, n_head=2, d_model=12, n_ctx=16, n_vocab=31)
  return jax.jit(lambda: gpt2.GPT2(config, nnx.Rngs(0)))()


@pytest.fixture
def model(mesh):
  return build(jax.sharding.get_mesh())


@pytest.fixture
def windows():
  return np.random.default_rng(0).integers(0, 31, (11, 7)).astype(np.int32)


def whole_pass(model, windows):
  padded = np.pad(windows, ((0, 1), (0, 0)))
  acts = sites.forward(model, sharding.place(padded, 'batch token'), capture=SITES)[1]
  return {site: np.asarray(x)[:-1] for site, x in acts.items()}


@pytest.mark.parametrize('start', [0, 8])
def test_stream_equals_one_forward_pass(model, windows, start):
  expected = whole_pass(model, windows)
  batches = list(activations.stream(model, windows, SITES, 4, start))
  assert [first for first, _ in batches] == list(range(start, 11, 4))
  assert set(expected) == {'h.0.mlp.post_act', 'h.0.resid.post_mlp', 'h.1.resid.post_mlp'}
  for site, x in expected.items():
    streamed = np.concatenate([acts[site] for _, acts in batches])
    np.testing.assert_allclose(
      streamed, x[start:], rtol=1e-5, atol=1e-6
    )  # batches of another size sum in another order


def test_bfloat16_is_the_float32_activation_cast_once(model, windows):
  full = dict(activations.stream(model, windows, SITES, 4))
  for first, acts in activations.stream(model, windows, SITES, 4, dtype='bfloat16'):
    for site, x in acts.items():
      assert x.dtype == ml_dtypes.bfloat16
      np.testing.assert_array_equal(x, full[first][site].astype(ml_dtypes.bfloat16))


def test_later_layers_are_not_computed(model, windows):
  def flops(site):
    compiled = activations.capture.lower(model, windows[:4], (site,)).compile()
    return compiled.cost_analysis()['flops']

  assert flops('h.0.resid.post_mlp') < 0.6 * flops('h.1.resid.post_mlp') < 0.6 * flops('logits')


def test_batches_that_the_mesh_does_not_divide_are_refused(model, windows):
  if jax.sharding.get_mesh().shape['data'] > 1:
    with pytest.raises(ValueError, match='batch_size 3 is not divisible by the data axis 2'):
      next(activations.stream(model, windows, SITES, 3))


def test_a_misspelt_site_is_refused(model, windows):
  with pytest.raises(KeyError, match=r'h.0.resid.post_mlp'):
    next(activations.stream(model, windows, ('h.0.resid.postmlp',), 4))


def test_the_live_reader_gives_the_examples_asked_for(model, windows):
  read = activations.live_reader(model, windows, 'h.1.resid.post_mlp', batch_size=2)
  expected = whole_pass(model, windows)['h.1.resid.post_mlp']
  np.testing.assert_allclose(read(np.array([9, 2, 2])), expected[[9, 2, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('site', ['h.0.attn.v_out', 'h.0.attn.qk_probs'])
def test_a_site_without_one_vector_a_token_is_refused(model, windows, site):
  with pytest.raises(
    ValueError, match=rf'{site} has the shape \[11, .*\], and an SAE reads \[example, token, d\]; choose'
  ):
    activations.live_reader(model, windows, site)


def test_the_width_of_a_site_is_its_last_dimension():
  assert activations.width('h.0.mlp.post_act', (11, 7, 48)) == 48


N_EXAMPLES, N_TOKENS = 11, 7


def read(examples):
  """Two channels: the example and the token."""
  tokens = np.broadcast_to(np.arange(N_TOKENS), (len(examples), N_TOKENS))
  return np.stack([np.broadcast_to(examples[:, None], tokens.shape), tokens], -1)


def batches(n, seed=3, **changed):
  sizes = {'batch_size': 10, 'buffer_examples': 4, **changed}
  return list(itertools.islice(activations.shuffled_batches(read, N_EXAMPLES, N_TOKENS, seed=seed, **sizes), n))


@pytest.mark.parametrize(
  'sizes', [{}, {'batch_size': 77}, {'batch_size': 100}, {'buffer_examples': 20}, {'buffer_examples': 3}]
)
def test_every_row_comes_exactly_once_an_epoch(sizes):
  rows = np.concatenate(batches(40, **sizes))
  epochs = rows[: len(rows) // 77 * 77].reshape(-1, 77, 2)
  everything = [(example, token) for example in range(N_EXAMPLES) for token in range(N_TOKENS)]
  for epoch in epochs:
    assert sorted(map(tuple, epoch)) == everything
  assert not np.array_equal(epochs[0], epochs[1])


def test_batches_are_a_function_of_seed_and_step():
  whole = batches(30)
  for start_step in (1, 7, 8, 16, 23):
    np.testing.assert_array_equal(batches(30 - start_step, start_step=start_step), whole[start_step:])
  assert not np.array_equal(batches(30, seed=4), whole)


def test_a_buffer_mixes_examples():
  first = batches(1)[0]
  assert len(set(first[:, 0])) > 2
