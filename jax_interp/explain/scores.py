"""True and simulated activations -> how well an explanation predicts a component, beside two nulls.

The three scores are pooled over all tokens of all excerpts, never averaged over excerpts (Bills et al. 2023, and its
released code). A score that is not defined is NaN, written as null, never a silent 0.
"""

from collections.abc import Iterable, Sequence

import numpy as np

N_BOOTSTRAP = 2000
LEVELS = 10  # explanations and simulators speak of activations as the integers 0 to 10


def score(true: Sequence[Sequence[float]], simulated: Sequence[Sequence[float]]) -> dict[str, float]:
  """Returns the scores of simulated against true activations, pooled over all tokens.

  With y true (raw, negatives kept) and s simulated:
    ev_correlation = Pearson(y, s); NaN where y or s is constant.
    rsquared = 1 - mean((y - s)^2) / mean(y^2), uncentred; NaN where y is zero everywhere.
    absolute_dev_explained = 1 - mean|y - s| / mean|y|; NaN where y is zero everywhere.

  Args:
    true: activations of each excerpt; the excerpts may differ in length.
    simulated: the same shape.

  Raises:
    ValueError: the two do not have the same lengths, or there are no tokens.
  """
  lengths = [len(y) for y in true], [len(s) for s in simulated]
  if lengths[0] != lengths[1] or not sum(lengths[0]):
    raise ValueError(f'simulated excerpts must be as long as the true ones, {lengths[0]} tokens; got {lengths[1]}')
  y, s = (np.concatenate([np.asarray(x, np.float64) for x in xs]) for xs in (true, simulated))
  error, nan = y - s, float('nan')
  correlation = nan if np.ptp(y) == 0 or np.ptp(s) == 0 else float(np.corrcoef(y, s)[0, 1])
  return {
    'ev_correlation': correlation,
    'rsquared': 1 - float(np.mean(error**2) / np.mean(y**2)) if y.any() else nan,
    'absolute_dev_explained': 1 - float(np.mean(abs(error)) / np.mean(abs(y))) if y.any() else nan,
  }


def constant_null(true: Sequence[Sequence[float]], value: float) -> dict[str, float]:
  """Returns the scores of predicting one value everywhere, such as the mean over the calibration split.

  Its correlation is not defined (NaN); rsquared and absolute_dev_explained are.
  """
  return score(true, [np.full(len(y), value) for y in true])


def maximum(activations: Iterable[Sequence[float]]) -> float:
  """Returns the largest activation of the excerpts shown together, at least 0: the top of their 0 to 10 scale."""
  return max((max(0.0, *map(float, x)) for x in activations), default=0.0)


def normalize(activations: Sequence[float], maximum: float) -> np.ndarray:
  """Returns activations as integers 0 to 10: min(10, floor(10 max(x, 0) / maximum)), or 0 where maximum <= 0.

  In float64 and in this order of operations, which decides where the float edges fall (explanations depend on them).
  """
  x = np.maximum(np.asarray(activations, np.float64), 0)
  if maximum <= 0:
    return np.zeros(x.shape, int)
  return np.minimum(LEVELS, np.floor(LEVELS * x / maximum)).astype(int)


def interval(values: Sequence) -> list:
  """Returns the mean of values and its 95 % percentile-bootstrap interval, resampling the values (a fixed seed).

  Args:
    values: numbers, or arrays of one shape, of which it is done for each place.

  Returns:
    mean, lower and upper end; numbers, or nested lists.
  """
  values = np.asarray(values, np.float64)
  resamples = np.random.default_rng(0).integers(len(values), size=(N_BOOTSTRAP, len(values)))
  counts = np.apply_along_axis(np.bincount, 1, resamples, minlength=len(values))
  low, high = np.quantile(np.tensordot(counts, values, 1) / len(values), (0.025, 0.975), axis=0)
  return [x.tolist() for x in (values.mean(0), low, high)]
