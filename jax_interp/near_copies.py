"""Near copies among windows of tokens.

Takes arrays of windows, such as the training text and the text held out, which may be memory-mapped and of any length;
gives for each a mask of the windows to keep, the first of each cluster of near copies. Text from the web repeats itself
with small changes: held-out numbers would be measured on what was trained on, and excerpts would show one passage many
times.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from jax_interp import text

SHINGLE = 5  # tokens; near copies share most of their runs of so many
MAX_HASHES = 64  # of MinHash for a window; more would find a few more near copies
BAND_RECALL = 0.99  # of the near copies whose similarity is the least asked for; nearer ones are found more surely
PAIR_ROUNDS = 8  # windows that others in a bucket are compared with
CHUNK = 4096  # windows or pairs of windows hashed at once


def check_similarity(similarity: float):
  """Raises a ValueError unless `distinct` takes this similarity, or it is 0 for leaving all as it is."""
  if not 0 <= similarity <= 1:
    raise ValueError(f'near_duplicates {similarity} is no similarity; give one from 0 (nothing is left out) to 1')


def distinct(parts: Sequence[np.ndarray], similarity: float) -> list[np.ndarray]:
  """Returns for each of several arrays of windows the mask, bool [example], of the first of each cluster.

  Two windows are near copies if the Jaccard similarity of their sets of shingles (runs of SHINGLE tokens) is
  `similarity` or more. Near copies, and near copies of those, make a cluster, of which the first window is kept: of
  a, c, b in this order, where b is a near copy of both and c is none of a, a alone is kept.

  Candidates are found by locality-sensitive hashing of MinHash signatures (Broder 1997) and then compared exactly. So
  a window that is left out is of the cluster of an earlier one that is kept, for certain; but not all are found. Near
  copies at the similarity itself become candidates with probability BAND_RECALL, nearer ones with more. Of candidates
  that share a hash, those found near the first are compared with no others: of windows that are of a cluster only
  through others, as c is, more stay (of such c 3.5 % at 0.8), the same ones in every run.
  Memory: about 80 bytes a window, which may itself be memory-mapped.

  Args:
    parts: int32 [example, token] each, with as many tokens; runs that `text.PAD` stands in do not count.
    similarity: above 0, up to 1.
  """
  check_similarity(similarity)
  firsts = np.cumsum([0, *map(len, parts)])  # numbers of the parts' first windows
  root_e = np.arange(firsts[-1])  # the first window of each one's cluster, as far as clusters are known
  rng, n_rows = np.random.default_rng(0), _band_rows(similarity)
  for _ in range(MAX_HASHES // n_rows):
    factors_r = rng.integers(0, 2**63, n_rows, np.uint64) * 2 + 1
    chunks = (part[start : start + CHUNK] for part in parts for start in range(0, len(part), CHUNK))
    key_e = np.concatenate([_band_keys(_shingles(chunk_et), factors_r) for chunk_et in chunks])
    root_e = _join_buckets(root_e, key_e, parts, firsts, similarity)
  return np.split(root_e == np.arange(firsts[-1]), firsts[1:-1])


def _band_rows(similarity: float) -> int:
  """Returns r, the hashes of a band: a pair meets in one of b = MAX_HASHES // r bands with probability 1-(1-s^r)^b."""
  rows = np.arange(1, MAX_HASHES + 1)
  recall = 1 - (1 - similarity**rows) ** (MAX_HASHES // rows)
  return int(rows[recall >= BAND_RECALL].max(initial=1))


def _mixed(x: np.ndarray) -> np.ndarray:
  """Returns 64-bit hashes of uint64 numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB
  return x ^ (x >> 31)


def _shingles(windows_et: np.ndarray) -> np.ndarray:
  """Returns a hash of every run of SHINGLE tokens, uint64 [example, run]; the first one in place of those with PAD."""
  length = min(SHINGLE, windows_et.shape[1])
  n_runs = windows_et.shape[1] - length + 1
  hash_er = np.zeros((len(windows_et), n_runs), np.uint64)
  for offset in range(length):
    hash_er = hash_er * 0x9E3779B97F4A7C15 + windows_et[:, offset : offset + n_runs].astype(np.uint64)
  hash_er = _mixed(hash_er)
  return np.where(windows_et[:, length - 1 :] == text.PAD, hash_er[:, :1], hash_er)


def _band_keys(hash_er: np.ndarray, factors_r: np.ndarray) -> np.ndarray:
  """Returns one number for the smallest hash under each of several hash functions, uint64 [example]."""
  key_e = np.zeros(len(hash_er), np.uint64)
  for factor in factors_r:
    key_e = _mixed(key_e + (hash_er * factor).min(1))
  return key_e


def _join_buckets(root_e, key_e, parts, firsts, similarity) -> np.ndarray:
  """Returns the roots after windows of equal keys were compared with their first, and those unlike it with theirs."""
  order_p = np.argsort(key_e, kind='stable')
  key_p = key_e[order_p]
  for _ in range(PAIR_ROUNDS):
    new_p = np.diff(key_p, prepend=~key_p[:1]) != 0
    first_p = order_p[np.flatnonzero(new_p)[np.cumsum(new_p) - 1]]
    open_p = np.flatnonzero(root_e[order_p] != root_e[first_p])  # not known to be of one cluster
    near = np.zeros(len(open_p), bool)
    for start in range(0, len(open_p), CHUNK):
      part_p = open_p[start : start + CHUNK]
      near[start : start + CHUNK] = _near(
        _take(parts, firsts, first_p[part_p]), _take(parts, firsts, order_p[part_p]), similarity
      )
    root_e = _merge(root_e, first_p[open_p[near]], order_p[open_p[near]])
    order_p, key_p = order_p[open_p[~near]], key_p[open_p[~near]]
    if not len(order_p):
      break
  return root_e


def _take(parts, firsts, index_p) -> np.ndarray:
  """Returns windows by their numbers over all parts, int32 [p, token]."""
  windows_pt = np.empty((len(index_p), parts[0].shape[1]), np.int32)
  for part_et, first in zip(parts, firsts[:-1], strict=True):
    here = (index_p >= first) & (index_p < first + len(part_et))
    windows_pt[here] = part_et[index_p[here] - first]
  return windows_pt


def _near(a_pt: np.ndarray, b_pt: np.ndarray, similarity: float) -> np.ndarray:
  """Returns which pairs of windows have a Jaccard similarity of at least so much, bool [p]."""
  a_pr, b_pr = (np.sort(_shingles(windows_pt), 1) for windows_pt in (a_pt, b_pt))
  n_distinct = lambda x_pr: 1 + np.count_nonzero(np.diff(x_pr, axis=1), axis=1)
  union_p = n_distinct(np.sort(np.concatenate([a_pr, b_pr], 1), 1))
  return n_distinct(a_pr) + n_distinct(b_pr) - union_p >= similarity * union_p - 1e-9  # 0.8 has no exact float


def _merge(root_e: np.ndarray, a_p: np.ndarray, b_p: np.ndarray) -> np.ndarray:
  """Returns the roots after the clusters of each pair were joined."""
  roots, pairs = np.unique(np.stack([root_e[a_p], root_e[b_p]]), return_inverse=True)
  a_p, b_p = pairs.reshape(2, -1)
  graph = scipy.sparse.coo_array((np.ones(len(a_p), bool), (a_p, b_p)), (len(roots), len(roots)))
  _, cluster_r = scipy.sparse.csgraph.connected_components(graph, directed=False)
  _, first_r = np.unique(cluster_r, return_index=True)
  new_e = np.arange(len(root_e))
  new_e[roots] = roots[first_r[cluster_r]]
  return new_e[root_e]
