"""The mean activation of every vocabulary token -> an explanation that needs no language model, and its simulation.

The token lookup table of Bills et al. 2023: a component is described by the tokens on which it is most active on
average, and simulated by each token's average, whatever the context. Any explanation should beat this baseline.
Names end in the letters of `records`, and v for a token's id.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp import records

N_SHOWN = 20  # tokens named in an explanation at most
MIN_SHARE = 0.1  # of the largest mean: a token below that says little of the component


@functools.partial(jax.jit, donate_argnums=0)
def _add(sum_vc, tokens_bt, acts_btc, keep_bt, keep_bc):
  kept_btc = jnp.where(keep_bt[..., None] & keep_bc[:, None], acts_btc, 0)
  return sum_vc.at[tokens_bt].add(kept_btc)  # padding, -1, adds its 0 to the last token


def means(
  batches: records.Batches, windows_wt: np.ndarray, keep_wt: np.ndarray, excluded_cx: np.ndarray, n_vocab: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean activation of each token and the tokens' counts, both [v, c], over the kept tokens.

  Args:
    batches: (first window's number, acts_btc), over all windows.
    windows_wt: the tokens.
    keep_wt: bool, the tokens that count, see `text.kept`; none of padding may.
    excluded_cx: the numbers of the windows that must have no influence on each component's table, -1 for none.
    n_vocab: how many token ids there are; the sums take float32 [n_vocab, c] on the device.

  Returns:
    The means, float32, and counts, int64. The mean of a token that is never seen is the component's over all tokens,
    and of one that is seen but never kept 0, as in the records.
  """
  n_components = len(excluded_cx)
  sum_vc = jnp.zeros((n_vocab, n_components))
  for start, acts_btc in batches:
    rows = start + np.arange(len(acts_btc))
    keep_bc = (rows[:, None, None] != excluded_cx).all(-1)
    sum_vc = _add(sum_vc, windows_wt[rows], acts_btc, keep_wt[rows], keep_bc)
  sum_vc = np.asarray(sum_vc)
  count_v = np.bincount(windows_wt[keep_wt], minlength=n_vocab)
  masked_v = (count_v == 0) & np.isin(np.arange(n_vocab), windows_wt[~keep_wt])
  count_vc = np.repeat(count_v[:, None], n_components, 1)
  for count_v, excluded_x in zip(count_vc.T, excluded_cx, strict=True):
    excluded = np.unique(excluded_x[(excluded_x >= 0) & (excluded_x < len(windows_wt))])
    count_v -= np.bincount(windows_wt[excluded][keep_wt[excluded]], minlength=n_vocab)
  overall_c = sum_vc.sum(0) / np.maximum(count_vc.sum(0), 1)
  unseen_vc = np.where(masked_v[:, None], 0, overall_c)
  return np.where(count_vc, sum_vc / np.maximum(count_vc, 1), unseen_vc).astype(np.float32), count_vc


def explain(
  batches: records.Batches,
  windows_wt: np.ndarray,
  keep_wt: np.ndarray,
  excluded_cx: np.ndarray,
  token_strings: Sequence[str],
) -> Iterator[tuple[str, Callable]]:
  """Yields (text, simulate) for every component, in the order of the batches' channels.

  Args:
    batches: as for `means`; see `records.batches`.
    windows_wt: the tokens.
    keep_wt: as for `means`; see `text.kept`.
    excluded_cx: as for `means`; see `records.scoring_windows`.
    token_strings: the text of every token id.

  Yields:
    text: at most 20 tokens of largest mean, none below a tenth of the largest, as "'the', ' of'".
    simulate: tokens_t -> float32 activations_t.
  """
  mean_vc, count_vc = means(batches, windows_wt, keep_wt, excluded_cx, len(token_strings))
  for mean_v, count_v in zip(mean_vc.T, count_vc.T, strict=True):
    seen = np.flatnonzero((mean_v > 0) & (count_v > 0))
    top = seen[np.argsort(-mean_v[seen], kind='stable')[:N_SHOWN]]
    top = top[mean_v[top] >= MIN_SHARE * mean_v[top].max(initial=0)]
    yield ', '.join(repr(token_strings[i]) for i in top), functools.partial(_look_up, mean_v)


def _look_up(mean_v, tokens_t):
  return mean_v[np.asarray(tokens_t)]
