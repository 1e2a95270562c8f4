"""Excerpts and what a method simulated for them -> the lines of explanations/<method>.jsonl and their summary.

A target is a component with the excerpts its explanation is made from and, disjoint from them, those it is scored on.
They end where padding begins, and at special tokens the component counts as silent, as in the records.
Whatever did not end well (refused, failed, parse_failed, truncated) keeps its status, and is never scored as a 0.
The null 'other_explanation' of a latent is what another latent's explanation simulates on its excerpts, in its own unit
(`Target.maximum`), whatever the method, so that all three scores of nulls mean the same.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_interp import records
from jax_interp.explain import scores

SPLIT = 'valid'  # scored; 'train' is explained, and the mean of 'calibration' is the constant to compare with
SCORES = ('ev_correlation', 'rsquared', 'absolute_dev_explained')


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """A window of text with a latent's activations; `sort` is 'top' or 'random'."""

  sort: str
  window: int
  tokens: list[str]
  activations: list[float]


@dataclasses.dataclass(frozen=True)
class Target:
  """A latent, the excerpts its explanation is made from, and those it is scored on."""

  index: int
  shown: list[Excerpt]
  scored: list[Excerpt]
  constant: float  # mean activation over the calibration split

  @property
  def maximum(self) -> float:
    """The largest activation of the excerpts it is explained from: its unit."""
    return scores.maximum(e.activations for e in self.shown)


def sample(density_c: np.ndarray, alive_c: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Returns up to n alive components, one drawn from each of n groups of like density, the least dense first."""
  alive = np.flatnonzero(alive_c)
  by_density = alive[np.argsort(density_c[alive], kind='stable')]
  rng = np.random.default_rng(seed)
  return np.array([rng.choice(group) for group in np.array_split(by_density, n) if len(group)], int)


def target(index: int, record: dict, top_windows: Sequence[int], random_windows: Sequence[int]) -> Target:
  """Returns a component with its excerpts split by `records.splits`.

  Args:
    index: of the component.
    record: its NeuronRecord.
    top_windows: of its top excerpts, in order.
    random_windows: of its random excerpts, in order.
  """

  def excerpts(sort, windows, found):
    return [Excerpt(sort, int(w), e['tokens'], e['activations']) for w, e in zip(windows, found, strict=True)]

  top = excerpts('top', top_windows, record['most_positive_activation_records'])
  split = records.splits(top, excerpts('random', random_windows, record['random_sample']), n=None)
  return Target(
    index, split['train'], split[SPLIT], float(np.mean(np.concatenate([e.activations for e in split['calibration']])))
  )


def fewer(target: Target, n: int) -> Target:
  """Returns the target with n of the top and n of the random excerpts it is scored on."""
  kept = [e for sort in ('top', 'random') for e in [e for e in target.scored if e.sort == sort][:n]]
  return dataclasses.replace(target, scored=kept)


def score(pairs: Sequence[tuple[Excerpt, dict]]) -> dict | None:
  """Returns the scores, None where undefined, over the excerpts that could be simulated; None if there are none."""
  ok = [(excerpt.activations, simulation['simulated']) for excerpt, simulation in pairs if simulation['status'] == 'ok']
  return _nullable(scores.score(*zip(*ok, strict=True))) if ok else None


def _nullable(values: dict[str, float]) -> dict[str, float | None]:
  return {name: value if np.isfinite(value) else None for name, value in values.items()}


def unanswered(unit: dict) -> bool:
  """Returns whether a request of the unit failed on its way, so that it is worth asking again; a bad answer is not."""
  return 'failed' in (unit['status'], *(simulation['status'] for simulation in unit['own'] + unit['other']))


def line(target: Target, unit: dict, null_simulations: Sequence[dict]) -> dict:
  """Returns the part of a line of explanations/<method>.jsonl that depends on the latent alone.

  Args:
    target: the latent.
    unit: its result.
    null_simulations: of the target's excerpts, by the explanation of another; none if that failed.
  """
  pairs = list(zip(target.scored, unit['own'], strict=bool(unit['own'])))
  ok = [(e, s['simulated']) for e, s in pairs if s['status'] == 'ok']
  failed = [s for _, s in pairs if s['status'] != 'ok']
  status, detail = unit['status'], unit['detail']
  if failed:
    status = status if ok else failed[0]['status']
    detail = f'{len(failed)} of {len(pairs)} excerpts could not be simulated; the first: {failed[0]["detail"]}'
  own, constant = score(pairs), scores.constant_null([e.activations for e in target.scored], target.constant)
  return {
    'explanation': unit['explanation'],
    'status': status,
    'detail': detail,
    'excerpts': collections.Counter(s['status'] for _, s in pairs),
    'scores': own and own | {'random_only': score([(e, s) for e, s in pairs if e.sort == 'random'])},
    'nulls': {
      'other_explanation': score(list(zip(target.scored, null_simulations, strict=bool(null_simulations)))),
      'constant': _nullable(constant),
    },
    'sequences': [
      {'split': e.sort, 'window': e.window, 'tokens': e.tokens, 'true': e.activations, 'simulated': s} for e, s in ok
    ],
  }


def summarize(lines: Sequence[dict]) -> dict:
  """Counts the lines of each status, and gives each score's mean with a 95 % bootstrap interval over the latents."""

  def means(found):
    values = {name: [s[name] for s in found if s and s[name] is not None] for name in SCORES}
    return {
      name: dict(zip(('mean', 'low', 'high'), scores.interval(v), strict=True)) | {'n': len(v)}
      for name, v in values.items()
      if v
    }

  return {
    'status': collections.Counter(line['status'] for line in lines),
    'excerpts': sum((collections.Counter(line['excerpts']) for line in lines), collections.Counter()),
    'scores': means([line['scores'] for line in lines]),
    'random_only': means([line['scores'] and line['scores']['random_only'] for line in lines]),
    'nulls': {null: means([line['nulls'][null] for line in lines]) for null in ('other_explanation', 'constant')},
  }
