import math

import numpy as np
import pytest

from jax_interp.explain import scores

RAGGED = [[1.0, -2.0, 3.0], [0.5, 4.0]], [[0.5, 0.0, 2.0], [1.0, 3.0]]


def test_scores_are_pooled_and_follow_their_formulas():
  true, simulated = RAGGED
  y, s = np.array([1, -2, 3, 0.5, 4]), np.array([0.5, 0, 2, 1, 3])
  covariance = np.mean((y - y.mean()) * (s - s.mean()))
  result = scores.score(true, simulated)
  assert result['ev_correlation'] == pytest.approx(covariance / (y.std() * s.std()))
  assert result['rsquared'] == pytest.approx(1 - np.sum((y - s) ** 2) / np.sum(y**2))
  assert result['absolute_dev_explained'] == pytest.approx(1 - np.abs(y - s).sum() / np.abs(y).sum())


def test_perfect_prediction_scores_one():
  assert list(scores.score(RAGGED[0], RAGGED[0]).values()) == pytest.approx([1, 1, 1])


def test_constant_prediction_has_no_correlation_but_the_other_scores():
  result = scores.constant_null([[0.0, 2.0], [4.0, 2.0]], 2.0)
  assert math.isnan(result['ev_correlation'])
  assert result['rsquared'] == pytest.approx(1 - 8 / 24)
  assert result['absolute_dev_explained'] == pytest.approx(1 - 4 / 8)


def test_silent_truth_has_no_score():
  assert all(map(math.isnan, scores.score([[0.0, 0.0]], [[1.0, 2.0]]).values()))


@pytest.mark.parametrize('simulated', [[[1.0]], [[1.0, 2.0], []], []])
def test_unequal_shapes_are_refused(simulated):
  with pytest.raises(ValueError, match='as long as the true'):
    scores.score([[1.0, 2.0]], simulated)


def test_normalization_keeps_the_float_edges():
  activations = [i / 10 * 3.3 for i in range(11)]
  assert scores.normalize(activations, 3.3).tolist() == [0, 1, 2, 2, 4, 5, 5, 6, 8, 9, 10]


def test_normalization_clips_and_survives_a_silent_block():
  assert scores.normalize([-1.0, 0.5, 7.0], 2.0).tolist() == [0, 2, 10]
  assert scores.normalize([-1.0, 0.0], scores.maximum([[-1.0, 0.0]])).tolist() == [0, 0]


def test_maximum_is_over_all_excerpts_shown():
  assert scores.maximum([[1.0, -5.0], [3.0]]) == 3.0
  assert scores.maximum([[-1.0]]) == 0.0
  assert scores.maximum([]) == 0.0


def test_intervals_of_arrays_are_those_of_each_place():
  values = np.random.default_rng(2).normal(size=(20, 2, 3))
  together = np.array(scores.interval(values))
  for place in np.ndindex(2, 3):
    np.testing.assert_allclose(together[:, *place], scores.interval(values[:, *place]), rtol=1e-12)


def test_interval_is_the_mean_and_covers_it():
  values = np.random.default_rng(1).normal(0.4, 0.2, 50)
  mean, low, high = scores.interval(values)
  assert mean == pytest.approx(values.mean())
  half = 1.96 * values.std() / 50**0.5  # the normal approximation, good to a tenth for 50 values
  assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)
