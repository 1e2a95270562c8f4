"""Activations of held-out text -> how well an SAE reconstructs them, and how its latents are used: (name, value) pairs.

`measure` adds up what the metrics need in one pass, in float64 on the host; `metrics` divides.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding
from models.sae import SparseAutoencoder

BINS_PER_DECADE = 4
_TINY = np.finfo(np.float64).tiny  # keeps 0 / 0 of an all-zero row at 0


@jax.jit
def reconstruct(sae: SparseAutoencoder, x_btd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns recons_btd in the scale of x, x as the SAE sees it, its scale_bt1, and which latents are on [b, t, l].

  Raises:
    ValueError: it is a transcoder.
  """
  if sae.is_transcoder:
    raise ValueError('a transcoder gives back another site than it reads, so x has no reconstruction; choose an SAE')
  latents_btl, norm = sae.encode(x_btd)
  scale_bt1 = jnp.broadcast_to(norm.scale, (*x_btd.shape[:2], 1))
  return sae.decode(latents_btl, norm), sae.normalize(x_btd)[0], scale_bt1, latents_btl > 0


@jax.jit
def _counts(active_btl, keep_bt):
  return (active_btl & keep_bt[..., None]).sum((0, 1))


def measure(
  sae: SparseAutoencoder, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
  """Yields, after each batch, the sums so far over all tokens that are kept, by name; the last are the result.

  Args:
    sae: on the ambient mesh.
    batches: pairs of activations x_btd and keep_bt, true where a token counts; all of one shape.
  """
  totals = {}
  for x_btd, keep_bt in batches:
    x_btd = sharding.place(x_btd, 'batch token d_model')
    *arrays, active_btl = reconstruct(sae, x_btd)
    fired_l = _counts(active_btl, sharding.place(keep_bt, 'batch token'))
    x_bd, recons_bd, normed_bd, scale_b1 = (np.asarray(a, np.float64)[keep_bt] for a in (x_btd, *arrays))
    error2_b, x2_b, recons2_b = (np.sum(a**2, 1) for a in (x_bd - recons_bd, x_bd, recons_bd))
    dot_b, norms_b = np.sum(x_bd * recons_bd, 1), np.sqrt(x2_b * recons2_b)
    sums = {
      'tokens': len(x_bd),
      'x_d': x_bd.sum(0),
      'x2': x2_b.sum(),
      'error2': error2_b.sum(),
      'recons2': recons2_b.sum(),
      'dot': dot_b.sum(),
      'normed_d': normed_bd.sum(0),
      'normed2': np.sum(normed_bd**2),
      'normed_error2': np.sum(error2_b / scale_b1[:, 0] ** 2),
      'error2_ratio': np.sum(error2_b / np.maximum(x2_b, _TINY)),
      'cosine': np.sum(dot_b / np.maximum(norms_b, _TINY)),
      'l2_ratio': np.sum(np.sqrt(recons2_b / np.maximum(x2_b, _TINY))),
      'fired_l': np.asarray(fired_l, np.int64),
    }
    totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    yield totals


def metrics(sums: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float | list]]:
  """Yields each metric from what `measure` summed.

  normalized_mse: E|x - recons|^2 / E|x - mean x|^2 with x as the SAE sees it, after its input normalisation, and the
    mean over tokens (Gao et al. 2024). With normalization 'none' it is 1 - explained_variance.
  normalized_mse_per_token: E(|x - recons|^2 / |x|^2) with x as the model has it, the ratio in OpenAI's released code.
  explained_variance: 1 - sum |x - recons|^2 / sum |x - mean x|^2, x as the model has it.
  l0: latents that are on at a token. dead_latent_fraction: of those that are never on in this text.
  cosine: mean of cos(x, recons). l2_ratio: mean of |recons| / |x|, below 1 where reconstructions shrink.
  relative_bias: E|recons|^2 / E<x, recons>, 1 where they do not.
  log10_density_counts, log10_density_edges: histogram over latents of log10(fraction of tokens on which one is on), the
    dead left out; four bins a decade.
  """
  n = sums['tokens']
  yield 'normalized_mse', float(sums['normed_error2'] / _variation(sums['normed2'], sums['normed_d'], n))
  yield 'normalized_mse_per_token', float(sums['error2_ratio'] / n)
  yield 'explained_variance', float(1 - sums['error2'] / _variation(sums['x2'], sums['x_d'], n))
  yield 'l0', float(sums['fired_l'].sum() / n)
  yield 'dead_latent_fraction', float(np.mean(sums['fired_l'] == 0))
  yield 'cosine', float(sums['cosine'] / n)
  yield 'l2_ratio', float(sums['l2_ratio'] / n)
  yield 'relative_bias', float(sums['recons2'] / sums['dot'])
  edges = np.arange(math.floor(-math.log10(n)) * BINS_PER_DECADE, 1) / BINS_PER_DECADE
  log_densities = np.log10(sums['fired_l'][sums['fired_l'] > 0] / n)
  yield 'log10_density_counts', np.histogram(log_densities, edges)[0].tolist()
  yield 'log10_density_edges', edges.tolist()


def _variation(sum_of_squares, sum_d, n):
  """Returns sum |x - mean x|^2 over n rows."""
  return sum_of_squares - np.sum(sum_d**2) / n
