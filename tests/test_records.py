import json

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from jax_interp import records
from models import gpt2, sharding

N_WINDOWS, N_TOKENS, N_COMPONENTS, BATCH = 24, 6, 5, 8
DEAD, CONSTANT = 3, 4


@pytest.fixture(scope='module')
def acts_wtc():
  rng = np.random.default_rng(0)
  acts = rng.gamma(0.3, 2.0, (N_WINDOWS, N_TOKENS, N_COMPONENTS)) - 0.2
  acts[..., 1] += 50  # far from zero: raw moments would cancel
  acts[..., DEAD] = np.minimum(acts[..., DEAD], 0)
  acts[..., CONSTANT] = 0.3
  return acts.astype(np.float32)


def in_batches(acts_wtc):
  return ((start, jax.numpy.asarray(acts_wtc[start : start + BATCH])) for start in range(0, N_WINDOWS, BATCH))


@pytest.fixture(scope='module')
def survey(acts_wtc):
  return records.survey(in_batches(acts_wtc), N_WINDOWS)


@pytest.fixture(scope='module')
def selection(survey):
  return records.select(survey.maxima_wc, n_top=4, n_random=6, n_quantile=3, seed=1)


@pytest.fixture(scope='module')
def excerpts(acts_wtc, selection):
  return records.excerpts(in_batches(acts_wtc), selection, N_TOKENS, acts_wtc.max((0, 1)))


def test_survey_equals_numpy_in_float64(survey, acts_wtc):
  np.testing.assert_array_equal(survey.maxima_wc, acts_wtc.max(1))
  np.testing.assert_allclose(survey.density_c, (acts_wtc > 0).mean((0, 1)))
  flat = acts_wtc.reshape(-1, N_COMPONENTS)[:, :CONSTANT].astype(np.float64)
  expected = {
    'mean': flat.mean(0),
    'variance': flat.var(0),
    'skewness': scipy.stats.skew(flat),
    'kurtosis': scipy.stats.kurtosis(flat, fisher=False),
  }
  result = survey.moments.standardized()
  for name, value in expected.items():  # float32 sums over a batch
    np.testing.assert_allclose(result[name][:CONSTANT], value, rtol=2e-5, err_msg=name)
  assert result['variance'][CONSTANT] == 0
  assert np.isnan(result['skewness'][CONSTANT])
  assert np.isnan(result['kurtosis'][CONSTANT])


def test_masked_tokens_count_nowhere(acts_wtc, selection):
  """As NumPy over the kept tokens alone; a window and a batch of which nothing is kept are among them."""
  keep_wt = np.random.default_rng(0).random(acts_wtc.shape[:2]) < 0.6
  keep_wt[:BATCH] = False
  wild = np.where(keep_wt[..., None], acts_wtc, 1e6).astype(np.float32)
  found = records.survey(in_batches(wild), N_WINDOWS, keep_wt)
  kept_nc = acts_wtc[keep_wt].astype(np.float64)
  maxima_wc = np.where(keep_wt[..., None], acts_wtc, -np.inf).max(1)
  np.testing.assert_array_equal(found.maxima_wc, np.where(keep_wt.any(1)[:, None], maxima_wc, 0))
  np.testing.assert_allclose(found.density_c, (kept_nc > 0).mean(0))
  result = found.moments.standardized()
  np.testing.assert_allclose(result['mean'], kept_nc.mean(0), rtol=2e-5)  # float32 sums over a batch
  np.testing.assert_allclose(result['variance'][:CONSTANT], kept_nc.var(0)[:CONSTANT], rtol=2e-5)
  acts, histogram = records.excerpts(in_batches(wild), selection, N_TOKENS, found.maxima_wc.max(0), keep_wt)
  np.testing.assert_array_equal(histogram.sum(1), (kept_nc > 0).sum(0))
  silent_wtc = np.where(keep_wt[..., None], acts_wtc, 0)
  for windows, values in zip(vars(selection).values(), vars(acts).values(), strict=True):
    for index in zip(*np.nonzero(windows >= 0), strict=True):
      np.testing.assert_array_equal(values[index], silent_wtc[windows[index], :, index[0]])
  with pytest.raises(ValueError, match='none of the tokens of 24 windows is to be kept'):
    records.survey(in_batches(wild), N_WINDOWS, np.zeros_like(keep_wt))


def test_padding_is_left_out_of_excerpts(survey, selection, excerpts):
  tokens_wt = np.full((N_WINDOWS, N_TOKENS), 3)
  tokens_wt[:, 4:] = -1
  lines = records.neuron_records(0, selection, excerpts[0], survey.moments, tokens_wt, [*'abcde'])
  excerpt = next(lines)['random_sample'][0]
  assert excerpt['tokens'] == ['d'] * 4
  assert len(excerpt['activations']) == 4


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(acts_wtc, value):
  damaged = acts_wtc.copy()
  damaged[BATCH + 1, 2, 3] = value
  with pytest.raises(ValueError, match='windows 8 to 15 are not finite'):
    records.survey(in_batches(damaged), N_WINDOWS)


def test_top_windows_are_the_largest_maxima_in_order(selection, survey):
  for c in set(range(N_COMPONENTS)) - {DEAD}:
    maxima = survey.maxima_wc[:, c]
    np.testing.assert_array_equal(maxima[selection.top[c]], np.sort(maxima)[::-1][:4])
  np.testing.assert_array_equal(selection.top[CONSTANT], range(4))


def test_dead_component_has_no_top_windows_but_the_others(selection):
  assert (selection.top[DEAD] == -1).all()
  assert (selection.random[DEAD] >= 0).all()


def test_random_windows_are_apart_from_the_top_and_independent(selection):
  for c in range(N_COMPONENTS):
    assert len(set(selection.random[c])) == 6
    assert not set(selection.random[c]) & set(selection.top[c])
  assert len({tuple(sorted(row)) for row in selection.random.tolist()}) == N_COMPONENTS


def test_quantile_windows_lie_between_the_quantiles(selection, survey):
  # 24 windows: ranks 0-11, 12-20, 21-22 and, for [.99, .999], rank 23 excluded: none.
  bounds = [(0, 12), (12, 21), (21, 23), (23, 23)]
  for c in (0, 1, 2):
    ordered = np.sort(survey.maxima_wc[:, c])
    for q, (low, high) in enumerate(bounds):
      chosen = selection.quantile[c, q]
      n = min(3, high - low)
      assert (chosen[n:] == -1).all()
      assert set(survey.maxima_wc[chosen[:n], c]) <= set(ordered[low:high])


def test_selection_is_a_function_of_the_seed(survey, selection):
  again = records.select(survey.maxima_wc, 4, 6, 3, seed=1)
  other = records.select(survey.maxima_wc, 4, 6, 3, seed=2)
  np.testing.assert_array_equal(again.random, selection.random)
  assert (other.random != selection.random).any()


def test_too_few_windows_are_refused(survey):
  with pytest.raises(ValueError, match='24 windows are too few for 20 top and 15 random'):
    records.select(survey.maxima_wc, 20, 15, 5, seed=0)


def test_excerpts_hold_the_activations_of_their_windows(excerpts, selection, acts_wtc, monkeypatch):
  acts, _ = excerpts
  for windows, values in zip(vars(selection).values(), vars(acts).values(), strict=True):
    for index in np.ndindex(windows.shape):
      expected = acts_wtc[windows[index], :, index[0]] if windows[index] >= 0 else np.zeros(N_TOKENS)
      np.testing.assert_array_equal(values[index], expected)
  monkeypatch.setattr(records, 'FETCH', 4)  # several fetches a batch
  again, _ = records.excerpts(in_batches(acts_wtc), selection, N_TOKENS, acts_wtc.max((0, 1)))
  np.testing.assert_array_equal(again.quantile, acts.quantile)


def test_histogram_counts_the_active_tokens(excerpts, acts_wtc):
  _, histogram = excerpts
  assert histogram.shape == (N_COMPONENTS, records.N_BINS)
  np.testing.assert_array_equal(histogram.sum(1), (acts_wtc > 0).sum((0, 1)))
  x = acts_wtc[..., 0]
  np.testing.assert_array_equal(histogram[0], np.histogram(x[x > 0], records.N_BINS, (0, x.max()))[0])
  assert histogram[CONSTANT, -1] == N_WINDOWS * N_TOKENS


@pytest.fixture(scope='module')
def folder(tmp_path_factory, survey, selection, excerpts):
  folder = tmp_path_factory.mktemp('records')
  tokens_wt = np.arange(N_WINDOWS * N_TOKENS).reshape(N_WINDOWS, N_TOKENS)
  strings = [f'é{i}' for i in range(tokens_wt.size)]
  lines = records.neuron_records(2, selection, excerpts[0], survey.moments, tokens_wt, strings)
  records.write(folder, 'neurons', lines, {'top_windows': selection.top})
  return folder


def test_records_have_the_fields_of_openai(folder, selection, acts_wtc):
  lines = [json.loads(line) for line in (folder / 'neurons.jsonl').read_text().splitlines()]
  assert [line['neuron_id']['neuron_index'] for line in lines] == list(range(N_COMPONENTS))
  record = lines[0]
  assert set(record) == {
    *('dataclass_name', 'neuron_id', 'random_sample', 'random_sample_by_quantile', 'quantile_boundaries', 'mean'),
    *('variance', 'skewness', 'kurtosis', 'most_positive_activation_records'),
  }
  assert record['dataclass_name'] == 'NeuronRecord'
  assert record['neuron_id'] == {'dataclass_name': 'NeuronId', 'layer_index': 2, 'neuron_index': 0}
  assert record['quantile_boundaries'] == [0, 0.5, 0.9, 0.99, 0.999]
  assert [len(part) for part in record['random_sample_by_quantile']] == [3, 3, 2, 0]
  best = record['most_positive_activation_records'][0]
  window = selection.top[0, 0]
  assert best['dataclass_name'] == 'ActivationRecord'
  assert best['tokens'] == [f'é{i}' for i in range(window * N_TOKENS, (window + 1) * N_TOKENS)]
  assert best['activations'] == [float(f'{x:.4g}') for x in acts_wtc[window, :, 0]]
  assert lines[DEAD]['most_positive_activation_records'] == []
  assert lines[CONSTANT]['skewness'] is None
  assert lines[CONSTANT]['kurtosis'] is None


def test_records_are_read_one_by_one(folder, selection):
  lines, arrays = records.read(folder, 'neurons')
  assert len(lines) == N_COMPONENTS
  assert lines[3]['neuron_id']['neuron_index'] == 3
  assert lines[-1] == list(lines)[4]
  np.testing.assert_array_equal(arrays['top_windows'], selection.top)
  with pytest.raises(IndexError):
    lines[N_COMPONENTS]


def test_missing_records_name_the_command(folder):
  with pytest.raises(ValueError, match='no records of latents; run'):
    records.read(folder, 'latents')


def test_splits_are_interleaved():
  result = records.splits(list(range(23)), list(range(100, 117)), n=5)
  assert result['train'] == [0, 4, 8, 12, 16]
  assert result['calibration'] == [1, 5, 9, 13, 17, 100, 103, 106, 109, 112]
  assert result['valid'] == [2, 6, 10, 14, 18, 101, 104, 107, 110, 113]
  assert result['test'] == [3, 7, 11, 15, 19, 102, 105, 108, 111, 114]


def test_splits_without_a_size_take_all_that_divide():
  result = records.splits(list(range(9)), list(range(100, 110)), n=None)
  assert result['train'] == [0, 4]
  assert result['test'] == [3, 7, 102, 105, 108]


@pytest.mark.parametrize(
  ('n_top', 'n_random', 'message'), [(19, 15, '19 top excerpts are too few for 4'), (20, 14, '14 random')]
)
def test_too_few_excerpts_are_refused(n_top, n_random, message):
  with pytest.raises(ValueError, match=message):
    records.splits([0] * n_top, [0] * n_random)


def test_scoring_windows_are_all_but_train():
  top, random = np.arange(8).reshape(2, 4), np.arange(10, 16).reshape(2, 3)
  np.testing.assert_array_equal(
    records.scoring_windows(top, random, n=1), [[1, 10, 2, 11, 3, 12], [5, 13, 6, 14, 7, 15]]
  )


class DoublingSAE(nnx.Module):
  """Latents that are the inputs, doubled, in reverse order."""

  def encode(self, x):
    return 2 * x[..., ::-1], None


@pytest.mark.usefixtures('mesh')
def test_batches_read_neurons_and_latents_on_any_mesh():
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, d_model=8, n_ctx=7, n_vocab=11), nnx.Rngs(0))
  windows = np.random.default_rng(0).integers(0, 11, (8, 7), np.int32)
  site = 'h.0.mlp.post_act'
  starts, neurons = zip(*records.batches(model, windows, site, batch_size=4), strict=True)
  assert starts == (0, 4)
  assert neurons[0].shape == (4, 7, 32)
  chosen = next(records.batches(model, windows, site, DoublingSAE(), np.array([30, 2]), batch_size=4))[1]
  np.testing.assert_allclose(chosen, 2 * np.asarray(neurons[0])[..., [1, 29]], atol=1e-6)
  found = records.survey(records.batches(model, windows, site, batch_size=4), len(windows))
  np.testing.assert_allclose(found.maxima_wc, np.concatenate(neurons).max(1), atol=1e-6)
  with pytest.raises(ValueError, match='8 windows are no whole number of batches of 6'):
    next(records.batches(model, windows, site, batch_size=6))


def test_batches_that_the_mesh_does_not_divide_are_refused():
  with (
    jax.set_mesh(sharding.make_mesh(3, 1)),
    pytest.raises(ValueError, match=r'records.batch_size 4 is not divisible by the data axis 3'),
  ):
    next(records.batches(None, np.zeros((8, 7), np.int32), 'h.0.mlp.post_act', batch_size=4))


@pytest.mark.usefixtures('mesh')
def test_promoted_tokens_are_the_extremes_of_the_logit_lens():
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, d_model=8, n_ctx=7, n_vocab=31), nnx.Rngs(0))
  write_cd = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  promoted, suppressed = records.promoted_tokens(model, write_cd)
  logits = (write_cd - write_cd.mean(1, keepdims=True)) @ np.asarray(model.wte.embedding[...]).T
  np.testing.assert_array_equal(promoted, np.argsort(-logits, 1)[:, : records.N_PROMOTED])
  np.testing.assert_array_equal(suppressed, np.argsort(logits, 1)[:, : records.N_PROMOTED])
