"""What an SAE's reconstruction does to the subject model: its loss and KL with the site replaced, beside ablations.

One compiled forward pass serves all runs: the same `patch` edit holds the site at other values.
"""

from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_interp.evals import reconstruction
from models import sharding, sites
from models.sae import SparseAutoencoder

RUNS = ('clean', 'spliced', 'zero_ablated', 'mean_ablated')


@jax.jit
def _losses(logits_btv, tokens_bt):
  """Returns the cross-entropy of predicting every token but the first, in nats, [b, t - 1]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1].astype(jnp.float32), tokens_bt[:, 1:])


@jax.jit
def _kl(clean_btv, logits_btv):
  """Returns KL(clean || run) of the same predictions, in nats, [b, t - 1]."""
  clean_btv, logits_btv = (jax.nn.log_softmax(x[:, :-1].astype(jnp.float32)) for x in (clean_btv, logits_btv))
  return jnp.sum(jnp.exp(clean_btv) * (clean_btv - logits_btv), -1)


def measure(
  model, sae: SparseAutoencoder, site: str, mean_d: np.ndarray, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
  """Yields, after each batch, the sums so far over the predictions that count; the last are the result.

  They are 'predictions', 'loss_<run>' for each of RUNS, and 'kl_spliced'.
  The site is replaced at kept tokens; a prediction counts where the token it is made at and the one predicted are kept.

  Args:
    model: the subject model, as for `sites.forward`.
    sae: reconstructs the site, [batch, token, d].
    site: its name.
    mean_d: mean activation of the site, for mean ablation.
    batches: pairs of tokens_bt and keep_bt, false at what is not text, such as the end of a document; all of one shape.
  """

  def run(tokens_bt, value_btd, mask_bt1):
    edits = [sites.patch(site, value_btd, mask_bt1)]
    logits_btv, acts = sites.forward(model, tokens_bt, edits, capture=(site,))
    return logits_btv, acts[site]

  totals = {}
  for tokens_bt, keep_bt in batches:
    tokens_bt = sharding.place(tokens_bt, 'batch token')
    mask_bt1 = sharding.place(keep_bt[..., None], 'batch token one')
    zeros_btd = sharding.place(np.zeros((*keep_bt.shape, len(mean_d)), np.float32), 'batch token d_model')
    clean_btv, x_btd = run(tokens_bt, zeros_btd, jnp.zeros_like(mask_bt1))
    values = {
      'spliced': reconstruction.reconstruct(sae, x_btd)[0],
      'zero_ablated': zeros_btd,
      'mean_ablated': zeros_btd + jnp.asarray(mean_d, jnp.float32),
    }
    kept_bt = keep_bt[:, 1:] & keep_bt[:, :-1]
    found = {'loss_clean': _losses(clean_btv, tokens_bt)}
    for name, value_btd in values.items():
      logits_btv, _ = run(tokens_bt, value_btd, mask_bt1)
      found[f'loss_{name}'] = _losses(logits_btv, tokens_bt)
      if name == 'spliced':
        found['kl_spliced'] = _kl(clean_btv, logits_btv)
    sums = {name: np.asarray(x_bt, np.float64)[kept_bt].sum() for name, x_bt in found.items()}
    totals = {name: totals.get(name, 0) + value for name, value in {'predictions': kept_bt.sum(), **sums}.items()}
    yield totals


def metrics(sums: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
  """Yields each metric from what `measure` summed, in nats a prediction.

  cross_entropy_clean, _spliced, _zero_ablated, _mean_ablated; cross_entropy_increase: spliced minus clean.
  kl_spliced: KL(clean || spliced) of the next-token distributions.
  loss_recovered_zero, loss_recovered_mean: (ablated - spliced) / (ablated - clean), 1 where the reconstruction is as
    good as the activation and 0 where it is no better than none.
  """
  loss = {run: float(sums[f'loss_{run}'] / sums['predictions']) for run in RUNS}
  for run in RUNS:
    yield f'cross_entropy_{run}', loss[run]
  yield 'cross_entropy_increase', loss['spliced'] - loss['clean']
  yield 'kl_spliced', float(sums['kl_spliced'] / sums['predictions'])
  for ablation in ('zero', 'mean'):
    ablated = loss[f'{ablation}_ablated']
    yield f'loss_recovered_{ablation}', (ablated - loss['spliced']) / (ablated - loss['clean'])
