"""Activations equal the forward pass on every mesh; shuffling is exact and resumes anywhere."""

import functools
import itertools
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_interp import activations, text
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
  batches = list(activations.stream(model, windows, SITES, 4, range(start, 11, 4)))
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
    meter = activations.Meter()
    list(activations.stream(model, windows[:4], (site,), 4, meter=meter))
    return meter.flops

  assert flops('h.0.resid.post_mlp') < 0.6 * flops('h.1.resid.post_mlp') < 0.6 * flops('logits')


def test_batches_that_the_mesh_does_not_divide_are_refused(model, windows):
  if jax.sharding.get_mesh().shape['data'] > 1:
    with pytest.raises(ValueError, match='batch_size 3 is not divisible by the data axis 2'):
      next(activations.stream(model, windows, SITES, 3))


@pytest.mark.parametrize('bad', [31, -2])
def test_a_token_outside_the_vocabulary_is_named(model, windows, bad):
  windows[6, 3] = bad
  batches = activations.stream(model, windows, SITES, 4)
  with pytest.raises(
    ValueError,
    match=f'the batch from example 4 on, token {bad} at row 2, position 3 is outside the vocabulary of 31',
  ):
    list(batches)


def test_padding_is_computed_as_token_zero_and_changes_nothing_before_it(model, windows):
  padded = windows.copy()
  padded[2, 4:] = text.PAD
  zeroed = np.maximum(padded, 0)
  for (_, ours), (_, theirs), (_, whole) in zip(
    *(activations.stream(model, x, SITES, 4) for x in (padded, zeroed, windows)), strict=True
  ):
    for site, x in ours.items():
      np.testing.assert_array_equal(x, theirs[site])
      np.testing.assert_allclose(x[:, :4], whole[site][:, :4], rtol=1e-6, atol=1e-7)  # sums of another length


def test_activations_that_are_not_finite_stop_it_and_are_named(model, windows):
  broken = jax.tree.map(lambda x: x, model)
  broken.wte.embedding[...] = broken.wte.embedding[...].at[30, 2].set(np.nan)
  windows[:] = np.minimum(windows, 29)
  windows[7, 6] = 30  # and, by 0 * NaN, every token of its window
  batches = activations.stream(broken, windows, ('h.0.resid.post_mlp',), 4)
  assert next(batches)[0] == 0
  with pytest.raises(
    ValueError, match=r'h.0.resid.post_mlp has 84 activations .* the batch from example 4 on, first in example 7'
  ):
    next(batches)


@pytest.mark.usefixtures('mesh')
def test_flops_are_those_of_the_products():
  """XLA's count against one by hand, of GPT-2's 12 layers made narrow: 24 d^2 a token, attention 4 t d."""
  config = gpt2.GPT2Config(n_layer=12, n_head=4, d_model=256, n_ctx=64, n_vocab=99)
  model, t = jax.jit(lambda: gpt2.GPT2(config, nnx.Rngs(0)))(), 64
  meter = activations.Meter()
  list(activations.stream(model, np.zeros((4, t), np.int32), ('h.7.resid.post_mlp',), 4, meter=meter))
  by_hand = 4 * t * 8 * (24 * 256**2 + 4 * t * 256)
  assert meter.batches == 1
  assert meter.flops == pytest.approx(by_hand, rel=0.05)


def test_a_misspelt_site_is_refused(model, windows):
  with pytest.raises(KeyError, match=r'h.0.resid.post_mlp'):
    next(activations.stream(model, windows, ('h.0.resid.postmlp',), 4))


def test_the_live_reader_gives_the_examples_asked_for(model, windows):
  read = activations.live_readers(model, windows, ('h.1.resid.post_mlp',), batch_size=2)['h.1.resid.post_mlp']
  expected = whole_pass(model, windows)['h.1.resid.post_mlp']
  np.testing.assert_allclose(read(np.array([9, 2, 2])), expected[[9, 2, 2]], rtol=1e-5, atol=1e-6)


def test_live_readers_of_several_sites_share_one_pass_and_may_differ(model, windows, monkeypatch):
  stream, passes = activations.stream, []
  monkeypatch.setattr(activations, 'stream', lambda *args, **kwargs: passes.append(args) or stream(*args, **kwargs))
  names = 'h.1.resid.post_mlp', 'h.0.mlp.post_act'
  reads, expected = activations.live_readers(model, windows, names, batch_size=2), whole_pass(model, windows)
  asked = [(0, [9, 2]), (0, [3, 4]), (1, [9, 2]), (1, [3, 4]), (1, [5]), (0, [6]), (1, [6]), (1, [6])]
  for which, examples in asked:
    found = reads[names[which]](np.array(examples))
    np.testing.assert_allclose(found, expected[names[which]][examples], rtol=1e-5, atol=1e-6)
  assert len(passes) == 5  # [9, 2], [3, 4], [5], [6], and [6] again


@pytest.mark.parametrize('site', ['h.0.attn.v_out', 'h.0.attn.qk_probs'])
def test_a_site_without_one_vector_a_token_is_refused(model, windows, site):
  with pytest.raises(
    ValueError, match=rf'{site} has the shape \[11, .*\], and an SAE reads \[example, token, d\]; choose'
  ):
    activations.live_readers(model, windows, (site,))


def test_the_width_of_a_site_is_its_last_dimension():
  assert activations.width('h.0.mlp.post_act', (11, 7, 48)) == 48


N_EXAMPLES, N_TOKENS = 11, 7
ALL = np.ones((N_EXAMPLES, N_TOKENS), bool)
SOME = np.random.default_rng(0).random((N_EXAMPLES, N_TOKENS)) < 0.7
SOME[4:8] = False  # of a whole block nothing is kept


def read(examples, out=None, to=None):
  """Two channels: the example and the token."""
  tokens = np.broadcast_to(np.arange(N_TOKENS), (len(examples), N_TOKENS))
  x = np.stack([np.broadcast_to(examples[:, None], tokens.shape), tokens], -1)
  out = np.empty((to.max() + 1, 2), int) if out is None else out
  out[to[to >= 0]] = x[to >= 0]
  return out


def batches(n, seed=3, keep=ALL, **changed):
  sizes = {'batch_size': 10, 'buffer_examples': 4, **changed}
  return list(itertools.islice(activations.shuffled_batches(read, keep, seed=seed, **sizes), n))


@pytest.mark.parametrize('keep', [ALL, SOME], ids=['all', 'some'])
@pytest.mark.parametrize(
  'sizes', [{}, {'batch_size': 77}, {'batch_size': 100}, {'buffer_examples': 20}, {'buffer_examples': 3}]
)
def test_every_kept_row_comes_exactly_once_an_epoch(sizes, keep):
  rows, n = np.concatenate(batches(40, keep=keep, **sizes)), keep.sum()
  epochs = rows[: len(rows) // n * n].reshape(-1, n, 2)
  for epoch in epochs:
    assert sorted(map(tuple, epoch)) == list(zip(*keep.nonzero(), strict=True))
  assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize('keep', [ALL, SOME], ids=['all', 'some'])
def test_batches_are_a_function_of_seed_and_step(keep):
  whole = batches(30, keep=keep)
  for start_step in range(1, 25):
    np.testing.assert_array_equal(batches(30 - start_step, start_step=start_step, keep=keep), whole[start_step:])
  assert not np.array_equal(batches(30, seed=4, keep=keep), whole)


@pytest.mark.parametrize('keep', [ALL, SOME], ids=['all', 'some'])
@pytest.mark.parametrize(
  ('n_parts', 'unit', 'sizes'),
  [
    (2, 1, {}),
    (5, 1, {}),
    (10, 1, {'batch_size': 100, 'buffer_examples': 1}),
    (2, 5, {'buffer_examples': 1}),
    (3, 1, {'batch_size': 96}),
    (3, 4, {'batch_size': 96}),
    (3, 16, {'batch_size': 96, 'buffer_examples': 1}),
    (1, 5, {}),
  ],
)
def test_the_parts_of_a_batch_are_its_rows(keep, n_parts, unit, sizes):
  """And with a unit, every so many-th row of all parts together is a set that does not depend on their number."""
  tuples = lambda rows: sorted(map(tuple, rows))
  for start_step in range(12):
    read_from = functools.partial(batches, 8, keep=keep, start_step=start_step, **sizes)
    whole, ordered = read_from(), read_from(unit=2 * unit if n_parts == 1 else unit)
    parts = [read_from(part=(i, n_parts), unit=unit) for i in range(n_parts)]
    for batch, of_one, *shares in zip(whole, ordered, *parts, strict=True):
      assert {len(share) for share in shares} == {len(batch) / n_parts}
      assert tuples(np.concatenate(shares)) == tuples(batch)
      for i in range(unit if unit > 1 else 0):
        assert tuples(np.concatenate([share[i::unit] for share in shares])) == tuples(of_one[i::unit])


def test_a_part_reads_little_more_than_its_share():
  asked = [0, 0]

  def counted(i, examples, out, to):
    asked[i] += len(examples)
    return np.zeros((to.max() + 1, 2))

  for i in range(2):
    counting = functools.partial(counted, i)
    found = activations.shuffled_batches(counting, np.ones((2000, 16), bool), 2000, 500, 0, part=(i, 2))
    list(itertools.islice(found, 11))  # of 16 an epoch: three buffers, and the fourth is read meanwhile
    found.close()
  assert 0.4 * 2000 < min(asked) <= max(asked) < 0.6 * 2000


def test_parts_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(ValueError, match='batch_size 10 is not divisible by 3 parts'):
    batches(1, part=(0, 3))
  with pytest.raises(ValueError, match='batch_size 10 is not divisible by 2 parts of 2 rows'):
    batches(1, part=(0, 2), unit=2)


def test_a_batch_that_is_kept_stays_as_it_was_and_memory_is_used_again():
  used, found = set(), activations.shuffled_batches(read, ALL, 10, 4, 3)
  whole = batches(60)
  kept = [next(found), next(found)]
  for i in range(2, 60):
    batch = next(found)
    np.testing.assert_array_equal(batch, whole[i])
    used.add(id(batch.base))
  np.testing.assert_array_equal(kept, whole[:2])
  assert len([x for x in used if x != id(None)]) < 10  # of 24 buffers that were filled


def test_text_of_nothing_but_padding_is_refused():
  with pytest.raises(ValueError, match='all 77 tokens are padding or special'):
    batches(1, keep=~ALL)


def test_the_next_buffer_is_read_while_this_one_is_used():
  reading, second = threading.Event(), threading.Event()
  calls = []

  def slow(examples, *args):
    calls.append(len(examples))
    if len(calls) == 2:
      reading.set()
      assert second.wait(600)
    return read(examples, *args)

  found = activations.shuffled_batches(slow, ALL, 10, 4, 3)
  next(found)
  assert reading.wait(600)  # and it does not come back until the first buffer's batches have been given
  next(found)
  second.set()
  next(found)
  found.close()


def test_an_error_of_the_reader_reaches_who_takes_the_batches():
  def broken(examples, *args):
    raise ValueError('shard 3 is damaged')

  with pytest.raises(ValueError, match='shard 3 is damaged'):
    next(activations.shuffled_batches(broken, ALL, 10, 4, 3))


def test_a_buffer_mixes_examples():
  first = batches(1)[0]
  assert len(set(first[:, 0])) > 2
