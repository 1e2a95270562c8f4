"""Activations of an SAE's latents or a layer's neurons -> records: the excerpts and moments that describe each one.

Two passes over the windows [example, token]. The first keeps the maximum of every window for every component (a float32
host array [n_windows, n_components], the largest thing here) and the moments; windows are then chosen on the host; the
second pass fetches only the chosen windows' activations, and the histograms. Both take the mask of the tokens that
count (`text.kept`): padding and special tokens have no part in maxima, moments, densities and histograms, and in
excerpts special tokens stand with activation 0. Records are JSON lines with the fields of OpenAI's NeuronRecord, beside
them an .npz with what those fields cannot hold. In names, w is a window, c a component and x an excerpt: one of the
windows that describe a component.
"""

import collections.abc
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp import store, text
from models import sharding, sites

QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999)  # of the window maximum; the top excerpts stand for the rest
N_BINS = 20  # of the histogram of active tokens
N_DIGITS = 4  # significant digits of an activation in JSON
N_PROMOTED = 10  # tokens listed by the logit lens
FETCH = 1024  # excerpts that leave the device together: a fixed shape, so that it compiles once

Batches = Iterable[tuple[int, jax.Array]]  # (window number of the first row, acts_btc)


# Activations


@functools.partial(jax.jit, static_argnames='site')
def _activations(model, tokens_bt, site, sae, components):
  acts_btc = sites.forward(model, tokens_bt, capture=(site,))[1][site].astype(jnp.float32)
  if sae is not None:
    acts_btc, _ = sae.encode(acts_btc)
  return acts_btc if components is None else acts_btc[..., components]


def batches(model, windows_wt: np.ndarray, site: str, sae=None, components=None, batch_size: int = 16) -> Iterator:
  """Yields (first window's number, float32 acts_btc on the device) over all windows, in order.

  Args:
    model: the subject model.
    windows_wt: int32 tokens. At padding the activations mean nothing; what reads the batches masks it.
    site: where to read, for example 'h.3.mlp.post_act'.
    sae: reads its latents there; None reads the site's own channels.
    components: int array, the latents or channels wanted, in this order; None means all.
    batch_size: windows per forward pass.

  Raises:
    ValueError: the data axis does not divide batch_size, or the windows are not a whole number of batches (a shorter
      last one would recompile, and may not shard).
  """
  sharding.check_divides('records.batch_size', batch_size, 'data')
  if not len(windows_wt) or len(windows_wt) % batch_size:
    raise ValueError(
      f'{len(windows_wt)} windows are no whole number of batches of {batch_size}; cut them to a multiple'
    )
  for start in range(0, len(windows_wt), batch_size):
    unpadded_bt = np.maximum(windows_wt[start : start + batch_size], 0)  # what no token before it sees
    yield start, _activations(model, sharding.place(unpadded_bt, 'batch token'), site, sae, components)


# First pass


@dataclasses.dataclass(frozen=True)
class Moments:
  """The count of tokens and, for every component in float64, the mean and the sums of (x - mean)^2, ^3 and ^4."""

  n: int
  mean: np.ndarray
  m2: np.ndarray
  m3: np.ndarray
  m4: np.ndarray

  def __add__(self, other: 'Moments') -> 'Moments':
    """Returns the moments of both sets of tokens together (Pébay 2008): nothing large is cancelled."""
    a, b, n = self.n, other.n, self.n + other.n
    d = other.mean - self.mean
    return Moments(
      n=n,
      mean=self.mean + d * b / n,
      m2=self.m2 + other.m2 + d**2 * a * b / n,
      m3=self.m3 + other.m3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * other.m2 - b * self.m2) / n,
      m4=self.m4
      + other.m4
      + d**4 * a * b * (a * a - a * b + b * b) / n**3
      + 6 * d**2 * (a * a * other.m2 + b * b * self.m2) / n**2
      + 4 * d * (a * other.m3 - b * self.m3) / n,
    )

  def standardized(self) -> dict[str, np.ndarray]:
    """Returns mean, (population) variance, skewness and kurtosis (3 for a normal); the last two NaN for a constant."""
    with np.errstate(divide='ignore', invalid='ignore'):
      skewness, kurtosis = self.n**0.5 * self.m3 / self.m2**1.5, self.n * self.m4 / self.m2**2
    return {'mean': self.mean, 'variance': self.m2 / self.n, 'skewness': skewness, 'kurtosis': kurtosis}


@dataclasses.dataclass(frozen=True)
class Survey:
  """What the first pass finds: window maxima [n_windows, c], moments, the fraction of tokens that are active [c]."""

  maxima_wc: np.ndarray
  moments: Moments
  density_c: np.ndarray


@jax.jit
def _describe(acts_btc, keep_bt):
  keep_bt1 = keep_bt[..., None]
  kept = lambda x_btc, otherwise: jnp.where(keep_bt1, x_btc, otherwise)
  total = lambda x_btc: kept(x_btc, 0).sum(1).sum(0)  # by token, then by example: on CPU 20 times as fast as at once
  maxima_bc, minima_bc = kept(acts_btc, -jnp.inf).max(1), kept(acts_btc, jnp.inf).min(1)
  # Clipped, because rounding could move the mean of a constant off it, and so give the constant a variance.
  mean_c = jnp.clip(total(acts_btc) / keep_bt.sum(), minima_bc.min(0), maxima_bc.max(0))
  deviation = acts_btc - mean_c
  square = deviation * deviation
  central = total(square), total(square * deviation), total(square * square)
  maxima_bc = jnp.where(keep_bt1.any(1), maxima_bc, 0)
  return maxima_bc, total((acts_btc > 0).astype(jnp.float32)), (mean_c, *central)


def survey(batches: Batches, n_windows: int, keep_wt: np.ndarray | None = None) -> Survey:
  """Returns the window maxima, moments and densities of all components, after one pass over the batches.

  The sums of a batch are taken in float32 on the device, and added up in float64.

  Args:
    batches: in order; see `batches`.
    n_windows: windows in all.
    keep_wt: bool, the tokens that count, see `text.kept`; all by default. The maximum of a window without any is 0.

  Raises:
    ValueError: an activation is not finite, or no token is kept.
  """
  maxima_wc, moments, active_c = None, None, 0
  for start, acts_btc in batches:
    keep_bt = _keep(keep_wt, start, acts_btc)
    maxima_bc, active, central = jax.device_get(_describe(acts_btc, keep_bt))
    if maxima_wc is None:
      maxima_wc = np.zeros((n_windows, maxima_bc.shape[1]), np.float32)
    if not keep_bt.any():
      continue
    if not np.isfinite(central).all():
      raise ValueError(
        f'activations in windows {start} to {start + len(acts_btc) - 1} are not finite; check the weights'
      )
    batch = Moments(int(keep_bt.sum()), *(x.astype(np.float64) for x in central))
    moments = batch if moments is None else moments + batch
    maxima_wc[start : start + len(maxima_bc)] = maxima_bc
    active_c = active_c + active.astype(np.float64)
  if moments is None:
    raise ValueError(f'none of the tokens of {n_windows} windows is to be kept; give other text')
  return Survey(maxima_wc, moments, active_c / moments.n)


def _keep(keep_wt, start, acts_btc) -> np.ndarray:
  return np.ones(acts_btc.shape[:2], bool) if keep_wt is None else keep_wt[start : start + len(acts_btc)]


# Choice of windows


@dataclasses.dataclass(frozen=True)
class Selection:
  """The windows of every component, by number; -1 where there are too few, always at the end.

  Attributes:
    top: [c, n_top], largest maximum first (ties: lowest number); only windows where the component is active.
    random: [c, n_random], drawn for each component on its own, never one of its top windows: no excerpt that a score is
      taken on can be one that was explained.
    quantile: [c, 4, n_quantile], drawn from each range of QUANTILES of the window maximum.
  """

  top: np.ndarray
  random: np.ndarray
  quantile: np.ndarray


def select(maxima_wc: np.ndarray, n_top: int, n_random: int, n_quantile: int, seed: int) -> Selection:
  """Returns the windows that describe each component; a pure function of its arguments.

  Raises:
    ValueError: there are fewer windows than n_top + n_random.
  """
  n_windows, n_components = maxima_wc.shape
  if n_windows < n_top + n_random:
    raise ValueError(f'{n_windows} windows are too few for {n_top} top and {n_random} random excerpts; read more text')
  shapes = (n_components, n_top), (n_components, n_random), (n_components, len(QUANTILES) - 1, n_quantile)
  selection = Selection(*(np.full(shape, -1, np.int32) for shape in shapes))
  bounds = [int(q * n_windows) for q in QUANTILES]
  for c in range(n_components):
    rng, maxima_w = np.random.default_rng((seed, c)), maxima_wc[:, c]
    order = np.argsort(-maxima_w, kind='stable')
    n_active = min(n_top, np.count_nonzero(maxima_w > 0))
    selection.top[c, :n_active] = order[:n_active]
    selection.random[c] = rng.choice(order[n_active:], n_random, replace=False)
    ascending = order[::-1]
    for q, (low, high) in enumerate(itertools.pairwise(bounds)):
      n = min(n_quantile, high - low)
      selection.quantile[c, q, :n] = rng.choice(ascending[low:high], n, replace=False)
  return selection


# Second pass


@jax.jit
def _fetch(acts_btc, keep_bt, rows_p, components_p):
  return jnp.where(keep_bt[rows_p], acts_btc[rows_p, :, components_p], 0)


@jax.jit
def _count(acts_btc, keep_bt, max_c):
  part_btc = jnp.ceil(acts_btc * (N_BINS / max_c)).astype(jnp.int32) - 1
  counts_btc = (acts_btc > 0) & keep_bt[..., None]
  bin_btc = jnp.where(counts_btc, jnp.clip(part_btc, 0, N_BINS - 1), N_BINS)  # the last is no bin: dropped
  components = jnp.arange(len(max_c))
  return jnp.zeros((N_BINS, len(max_c)), jnp.int32).at[bin_btc, components].add(1, mode='drop')


def excerpts(
  batches: Batches, selection: Selection, n_tokens: int, max_c: np.ndarray, keep_wt: np.ndarray | None = None
) -> tuple[Selection, np.ndarray]:
  """Returns the selected windows' activations and the histograms, after one more pass over the batches.

  Args:
    batches: the same as for `survey`.
    selection: the windows wanted.
    n_tokens: tokens per window.
    max_c: the largest activation of each component.
    keep_wt: as for `survey`. Of the other tokens, excerpts have 0 and histograms nothing.

  Returns:
    The activations, shaped as the selection with one more axis, token (float32, zero where there is no window), and
    histogram [c, N_BINS]: how many tokens are active in each of N_BINS equal parts of (0, max].
  """
  windows_cx = np.concatenate([selection.top, selection.random, selection.quantile.reshape(len(max_c), -1)], 1)
  acts_cxt = np.zeros((*windows_cx.shape, n_tokens), np.float32)
  components, slots = np.nonzero(windows_cx >= 0)
  order = np.argsort(windows_cx[components, slots], kind='stable')
  components, slots = components[order], slots[order]
  windows = windows_cx[components, slots]
  histogram = 0
  for start, acts_btc in batches:
    keep_bt = _keep(keep_wt, start, acts_btc)
    histogram = histogram + jax.device_get(_count(acts_btc, keep_bt, max_c)).T.astype(np.int64)
    first, last = np.searchsorted(windows, (start, start + len(acts_btc)))
    for low in range(first, last, FETCH):
      part = slice(low, min(low + FETCH, last))
      n = part.stop - part.start
      rows, columns = (np.pad(x, (0, FETCH - n)) for x in (windows[part] - start, components[part]))
      acts_cxt[components[part], slots[part]] = jax.device_get(_fetch(acts_btc, keep_bt, rows, columns))[:n]
  n_top, n_random = selection.top.shape[1], selection.random.shape[1]
  top, random, quantile = np.split(acts_cxt, [n_top, n_top + n_random], axis=1)
  return Selection(top, random, quantile.reshape(*selection.quantile.shape, n_tokens)), histogram


# Files


def promoted_tokens(model, write_cd) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids of the tokens whose logits a write vector raises and lowers most, each int32 [c, N_PROMOTED]."""

  @jax.jit
  def extremes(model, write_cd):
    logits_cv = model.promoted_logits(write_cd)
    return jax.lax.top_k(logits_cv, N_PROMOTED)[1], jax.lax.top_k(-logits_cv, N_PROMOTED)[1]

  parts = [jax.device_get(extremes(model, write_cd[i : i + 1024])) for i in range(0, len(write_cd), 1024)]
  return tuple(np.concatenate(ids) for ids in zip(*parts, strict=True))


def token_strings(tokenizer) -> list[str]:
  """Returns the text of every token id, alone; a token that is part of a character reads as U+FFFD."""
  return tokenizer.batch_decode([[i] for i in range(len(tokenizer))])


def _rounded(x: np.ndarray) -> np.ndarray:
  """Rounds to N_DIGITS significant digits, and large numbers to integers, so that their JSON is short."""
  x = x.astype(np.float64)
  exponent = np.floor(np.log10(np.abs(x), out=np.zeros_like(x), where=x != 0))
  power = 10.0 ** np.maximum(N_DIGITS - 1 - exponent, 0)
  return np.round(x * power) / power


def _excerpt_records(windows_x, acts_xt, tokens_wt, strings) -> list[dict]:
  found = []
  for window, acts in zip(windows_x, _rounded(acts_xt).tolist(), strict=True):
    if window >= 0:
      tokens = [strings[i] for i in tokens_wt[window] if i != text.PAD]  # which stands behind the rest
      found.append({'dataclass_name': 'ActivationRecord', 'tokens': tokens, 'activations': acts[: len(tokens)]})
  return found


def neuron_records(
  layer: int | str,
  selection: Selection,
  acts: Selection,
  moments: Moments,
  tokens_wt: np.ndarray,
  strings: Sequence[str],
) -> Iterator[dict]:
  """Yields every component's NeuronRecord, in order.

  Args:
    layer: written as `layer_index`.
    selection: window numbers.
    acts: what `excerpts` returned for them.
    moments: written as mean, variance, skewness and kurtosis; a moment that is not defined is null.
    tokens_wt: all windows.
    strings: the text of every token id.
  """
  moments = moments.standardized()
  for c in range(len(selection.top)):
    part = lambda windows_x, acts_xt: _excerpt_records(windows_x, acts_xt, tokens_wt, strings)
    yield {
      'dataclass_name': 'NeuronRecord',
      'neuron_id': {'dataclass_name': 'NeuronId', 'layer_index': layer, 'neuron_index': c},
      'random_sample': part(selection.random[c], acts.random[c]),
      'random_sample_by_quantile': [part(*x) for x in zip(selection.quantile[c], acts.quantile[c], strict=True)],
      'quantile_boundaries': list(QUANTILES),
      **{name: float(value[c]) if np.isfinite(value[c]) else None for name, value in moments.items()},
      'most_positive_activation_records': part(selection.top[c], acts.top[c]),
    }


def write(folder: pathlib.Path, kind: str, records: Iterable[dict], arrays: dict[str, np.ndarray]):
  """Writes <kind>.jsonl and then, with the lines' offsets, <kind>.npz; each appears whole or not at all."""
  offsets = [0]

  def lines():
    for record in records:
      line = json.dumps(record)  # ASCII
      offsets.append(offsets[-1] + len(line) + 1)
      yield line

  store.write_lines(folder / f'{kind}.jsonl', lines())
  partial = folder / f'{kind}.partial.npz'
  np.savez(partial, offsets=np.array(offsets[:-1]), **arrays)
  os.replace(partial, folder / f'{kind}.npz')


class Lines(collections.abc.Sequence):
  """The records of a file, read one at a time."""

  def __init__(self, path: pathlib.Path, offsets: np.ndarray):
    self._path, self._offsets = path, offsets

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index: int) -> dict:
    with open(self._path, 'rb') as f:
      f.seek(self._offsets[index])
      return json.loads(f.readline())


def read(folder: pathlib.Path, kind: str) -> tuple[Lines, dict[str, np.ndarray]]:
  """Returns the records of 'latents' or 'neurons' by index, each read when asked for, and their arrays.

  The arrays: top_windows [c, n_top], random_windows [c, n_random] and quantile_windows [c, 4, n_quantile] (numbers of
  the excerpts' windows, in their order, -1 for none), density [c] (the fraction of tokens where the component is
  active), max [c], histogram [c, N_BINS] of active tokens with its edges [c, N_BINS + 1], promoted_tokens and
  suppressed_tokens [c, N_PROMOTED].

  Raises:
    ValueError: there are no such records.
  """
  path = folder / f'{kind}.npz'
  if not path.is_file():
    raise ValueError(f'{folder} has no records of {kind}; run train.records')
  with np.load(path) as arrays:
    arrays = dict(arrays)
  return Lines(folder / f'{kind}.jsonl', arrays.pop('offsets')), arrays


# Splits

TOP_SPLITS = ('train', 'calibration', 'valid', 'test')
RANDOM_SPLITS = TOP_SPLITS[1:]


def splits(top: Sequence, random: Sequence, n: int | None = 5) -> dict[str, list]:
  """Returns train (top only), calibration, valid and test (top, then random): interleaved, as OpenAI's explainer does.

  Split k of the top excerpts holds k, k + 4, k + 8, ...; split k of the random ones k, k + 3, ...; n of each. Works on
  excerpts and on their window numbers alike.

  Args:
    top: best first.
    random: any order.
    n: excerpts of each sort in each split; None takes all there are: a quarter of the top, a third of the random.

  Raises:
    ValueError: there are too few excerpts.
  """
  result = {name: [] for name in TOP_SPLITS}
  for sort, excerpts, names in (('top', top, TOP_SPLITS), ('random', random, RANDOM_SPLITS)):
    size = len(excerpts) // len(names) if n is None else n
    if size < 1 or len(excerpts) < size * len(names):
      raise ValueError(
        f'{len(excerpts)} {sort} excerpts are too few for {len(names)} splits of {max(size, 1)}; choose a component '
        'that is active more often, smaller splits, or record more excerpts'
      )
    for k, name in enumerate(names):
      result[name] += excerpts[k : size * len(names) : len(names)]
  return result


def scoring_windows(top_cx: np.ndarray, random_cx: np.ndarray, n: int | None = 5) -> np.ndarray:
  """Returns windows_cx: those of calibration, valid and test of each component, on which nothing may be fitted."""
  parts = [splits(list(top), list(random), n) for top, random in zip(top_cx, random_cx, strict=True)]
  return np.array([part['calibration'] + part['valid'] + part['test'] for part in parts], np.int32)
