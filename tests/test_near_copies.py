import numpy as np
import pytest

from jax_interp import near_copies, text


def _jaccard(windows_et):
  """Returns the Jaccard similarity of every two windows, counted shingle by shingle."""
  size = near_copies.SHINGLE
  sets = [{tuple(t[i : i + size]) for i in range(len(t) - size + 1)} for t in windows_et.tolist()]
  number = {shingle: n for n, shingle in enumerate(set().union(*sets))}
  has_es = np.zeros((len(sets), len(number)), np.float32)
  for e, shingles in enumerate(sets):
    has_es[e, [number[shingle] for shingle in shingles]] = 1
  both_ee, size_e = has_es @ has_es.T, has_es.sum(1)
  return both_ee / (size_e[:, None] + size_e - both_ee)


@pytest.mark.parametrize('similarity', [0.5, 0.8, 1.0])
def test_near_copies_are_left_out_as_brute_force_says(similarity):
  rng = np.random.default_rng(0)
  windows_et = rng.integers(0, 50, (400, 64)).astype(np.int32)
  copies_et = windows_et[rng.integers(0, 400, 400)]
  for copy_t in copies_et:  # a changed token changes five shingles of sixty
    places = rng.choice(64, rng.integers(0, 6), replace=False)
    copy_t[places] = rng.integers(0, 50, len(places))
  windows_et = np.concatenate([windows_et, copies_et])
  windows_et = windows_et[rng.permutation(800)]
  linked = _jaccard(windows_et) >= similarity - 1e-6  # float32
  for middle in range(800):  # the clusters: near copies of near copies
    linked |= linked[:, middle : middle + 1] & linked[middle]
  expected_e = np.array([not linked[e, :e].any() for e in range(800)])
  train_e, held_out_e = near_copies.distinct([windows_et[:500], windows_et[500:]], similarity)
  kept_e = np.concatenate([train_e, held_out_e])
  assert (len(train_e), len(held_out_e)) == (500, 300)
  assert not (expected_e & ~kept_e).any()  # what is left out is a near copy for certain
  n_copies = (~expected_e).sum()
  assert n_copies > 50
  assert (kept_e & ~expected_e).sum() <= 0.01 * n_copies  # and nearly all of them are found


@pytest.mark.parametrize('similarity', [0.5, 0.8])
def test_of_near_copies_of_near_copies_the_first_is_kept(similarity):
  rng = np.random.default_rng(0)
  b_et = rng.integers(0, 50_000, (500, 64)).astype(np.int32)
  a_et, c_et = b_et.copy(), b_et.copy()
  changed = np.arange(5, 64, 7)[: {0.5: 3, 0.8: 1}[similarity]]  # each changes five shingles of sixty
  a_et[:, changed] = 50_000
  c_et[:, 63 - changed] = 50_000
  for a_t, b_t, c_t in zip(a_et, b_et, c_et, strict=True):
    similarity_ee = _jaccard(np.stack([a_t, b_t, c_t]))
    assert min(similarity_ee[0, 1], similarity_ee[1, 2]) > similarity > similarity_ee[0, 2]
  kept_a_e, kept_c_e, kept_b_e = near_copies.distinct([a_et, c_et, b_et], similarity)
  assert kept_a_e.all()
  assert kept_b_e.mean() <= 0.01
  assert kept_c_e.mean() <= 0.06  # 0.035 of 2,000 such chains at 0.8


def test_short_and_padded_windows_are_compared_by_their_tokens():
  pad = text.PAD
  windows_et = np.array([[1, 2, 3, pad, pad, pad], [1, 2, 4, pad, pad, pad], [1, 2, 3, pad, pad, pad]], np.int32)
  (kept_e,) = near_copies.distinct([windows_et], 0.9)
  assert kept_e.tolist() == [True, True, False]
  (kept_e,) = near_copies.distinct([windows_et[:, :3]], 0.9)
  assert kept_e.tolist() == [True, True, False]


def test_many_equal_windows_are_one():
  windows_et = np.repeat(np.arange(128, dtype=np.int32).reshape(2, 64), 5000, axis=0)
  (kept_e,) = near_copies.distinct([windows_et], 0.8)
  assert np.flatnonzero(kept_e).tolist() == [0, 5000]
