import numpy as np
import pytest

from jax_interp import text as token_text
from jax_interp.explain import token_lookup
from models import sharding

pytestmark = pytest.mark.usefixtures('mesh')

N_VOCAB, BATCH = 7, 2
WINDOWS = np.random.default_rng(0).integers(0, N_VOCAB - 1, (6, 5), np.int32)  # the last token is never seen
ACTS = np.random.default_rng(1).gamma(1.0, 1.0, (6, 5, 4)).astype(np.float32)
EXCLUDED = np.array([[0, 3], [-1, -1], [5, 5], [2, 99]])  # -1 is none, and 99 lies beyond these windows
KEEP = np.ones(WINDOWS.shape, bool)
STRINGS = [f' t{i}' for i in range(N_VOCAB)]


def in_batches(acts):
  for start in range(0, len(acts), BATCH):
    yield start, sharding.place(acts[start : start + BATCH], 'batch token latent')


def test_means_are_those_of_the_kept_windows():
  mean_vc, count_vc = token_lookup.means(in_batches(ACTS), WINDOWS, KEEP, EXCLUDED, N_VOCAB)
  for c in range(4):
    kept = [w for w in range(6) if w not in EXCLUDED[c]]
    tokens, acts = WINDOWS[kept], ACTS[kept, :, c]
    for v in range(N_VOCAB):
      assert count_vc[v, c] == (tokens == v).sum()
      expected = acts[tokens == v].mean() if (tokens == v).any() else acts.mean()
      assert mean_vc[v, c] == pytest.approx(expected, rel=1e-5)


def test_excluded_windows_have_no_influence_at_all():
  changed = ACTS.copy()
  for c, excluded in enumerate(EXCLUDED):
    changed[[w for w in excluded if 0 <= w < 6], :, c] = 1e6
  before, _ = token_lookup.means(in_batches(ACTS), WINDOWS, KEEP, EXCLUDED, N_VOCAB)
  after, _ = token_lookup.means(in_batches(changed), WINDOWS, KEEP, EXCLUDED, N_VOCAB)
  np.testing.assert_array_equal(before, after)


def test_masked_tokens_count_nowhere_and_are_simulated_as_silent():
  special, last = 2, N_VOCAB - 2
  windows = np.where(np.arange(5) < [[5], [3], [5], [4], [5], [1]], WINDOWS, token_text.PAD)
  windows[:, 0] = special
  keep_wt = token_text.kept(windows, [special])
  wild = np.where(keep_wt[..., None], ACTS, 1e6).astype(np.float32)  # also where the last token's row would take it
  mean_vc, count_vc = token_lookup.means(in_batches(wild), windows, keep_wt, EXCLUDED, last + 1)
  for c in range(4):
    rows = [w for w in range(6) if w not in EXCLUDED[c]]
    tokens, acts = windows[rows][keep_wt[rows]], ACTS[rows, :, c][keep_wt[rows]]
    for v in range(last + 1):
      assert count_vc[v, c] == (tokens == v).sum()
      expected = acts[tokens == v].mean() if (tokens == v).any() else 0 if v == special else acts.mean()
      assert mean_vc[v, c] == pytest.approx(expected, rel=1e-5)


def test_text_names_the_tokens_of_large_mean_in_order_and_simulation_looks_them_up():
  acts = ACTS.copy()
  acts[..., 1] = np.array([5.0, 0.3, 0, 4.0, 0, 0.6])[WINDOWS]  # one mean for each token
  explanations = list(token_lookup.explain(in_batches(acts), WINDOWS, KEEP, EXCLUDED, STRINGS))
  assert len(explanations) == 4
  text, simulate = explanations[1]
  assert text == "' t0', ' t3', ' t5'"  # ' t1' is below a tenth of the largest
  np.testing.assert_allclose(simulate([0, 1, 2, 3]), [5, 0.3, 0, 4], rtol=1e-6)


def test_silent_component_names_no_tokens():
  text, simulate = next(token_lookup.explain(in_batches(0 * ACTS), WINDOWS, KEEP, EXCLUDED, STRINGS))
  assert text == ''
  assert not simulate(WINDOWS[0]).any()
