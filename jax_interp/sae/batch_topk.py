"""BatchTopK: k latents a token on average, over the batch (Bussmann et al. 2024), and Matryoshka prefixes of it.

Tokens that need more latents take them from those that need fewer. After training a threshold, with which as
many are kept on average, makes the SAE a JumpReLU one, which encodes each token alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_interp.sae import dense, losses
from models.activation_functions import JumpReLU
from models.sae import SparseAutoencoder, with_activation
from models.topk import batch_wins


@dataclasses.dataclass(frozen=True)
class BatchTopK:
  """A recipe: the mean over prefixes of the normalized MSE of reconstructing with their latents, and auxk_coef * AuxK.

  With the one prefix of all latents this is BatchTopK. With several, the first m latents of each also reconstruct
  alone, so that general latents come first and are not absorbed by special ones (Matryoshka, Bussmann et al. 2025);
  AuxK is of all latents.

  Attributes:
    k: latents that are kept per token, on average over the batch.
    auxk: as `losses.TopK`, and the next two.
    auxk_coef: of AuxK.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    prefixes: sizes, rising, the last of them all latents; () stands for that alone.
    dtype: of products with the weights, as `dense.product`, but for AuxK; weights, gradients and moments are float32.
  """

  k: int
  auxk: int
  auxk_coef: float = 1 / 32
  dead_tokens: int = 10_000_000
  prefixes: tuple[int, ...] = ()
  dtype: str = 'float32'
  unit_norm = True
  parity = False

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step, n_parts=1):
    """See `train_step.Recipe`.

    Raises:
      ValueError: the prefixes do not rise to the number of latents.
    """
    prefixes = self.prefixes or (sae.n_latents,)
    check_prefixes(prefixes, sae.n_latents)

    def terms(sae, x_bd, target_bd, tokens_since_fired_l):
      preacts_bl = dense.linear(sae, x_bd, self.dtype) + sae.latent_bias[...]
      n_kept = self.k * len(x_bd) * jax.lax.axis_size('data')
      mask_bl, smallest = batch_wins(jax.lax.stop_gradient(preacts_bl), n_kept)
      latents_bl = jnp.where(mask_bl, jax.nn.relu(preacts_bl), 0)
      recons_bd, mses = dense.constant(sae, x_bd), []
      for part_bl, decoder_ld in _segments(latents_bl, sae.decoder[...], prefixes):
        recons_bd += jax.lax.psum(dense.product(part_bl, decoder_ld, self.dtype), 'model')
        mses.append(dense.batch_mean((target_bd - recons_bd) ** 2))
      parts = {'prefixes_mse' if self.prefixes else 'mse': mse_scale * sum(mses) / len(mses)}
      if self.auxk:
        dead_l = dense.clock_after(jax.lax.stop_gradient(latents_bl), tokens_since_fired_l) > self.dead_tokens
        error_bd = jax.lax.stop_gradient(target_bd - recons_bd)
        pre_bias_d, encoder_ld = sae.pre_bias[...], sae.encoder[...]
        held_d = jax.lax.stop_gradient(pre_bias_d)
        # 0, for the gradient of pre_bias: what the encoder reads is a constant there.
        moved_l = jax.lax.stop_gradient(encoder_ld) @ (pre_bias_d - held_d)
        params = encoder_ld, sae.decoder[...], sae.latent_bias[...] - moved_l, dense.bias(sae)
        parts['auxk'] = losses.auxk_loss(self, params, x_bd - held_d, error_bd, dead_l)
      return dense.Terms(latents_bl, recons_bd, parts, {'threshold': jnp.maximum(smallest, 0)})

    batch = x_bd, target_bd, tokens_since_fired_l
    return dense.loss_and_grads(terms, sae, *batch, mse_scale, self.dead_tokens, n_parts)


def check_prefixes(prefixes: tuple[int, ...], n_latents: int):
  """Raises unless prefixes are sizes that rise to the number of latents.

  Raises:
    ValueError: they do not.
  """
  if list(prefixes) != sorted(set(prefixes)) or not prefixes or prefixes[0] < 1 or prefixes[-1] != n_latents:
    raise ValueError(f'prefixes {prefixes} do not rise to n_latents {n_latents}; the last must be all latents')


def _segments(latents_bl, decoder_ld, prefixes):
  """Yields, for each prefix, this shard's latents and decoder rows that the one before has not."""
  n_local, starts = latents_bl.shape[1], (0, *prefixes[:-1])
  if jax.lax.axis_size('model') == 1:
    for start, stop in zip(starts, prefixes, strict=True):
      yield latents_bl[:, start:stop], decoder_ld[start:stop]
    return
  # A shard's rows are cut at other places than another's, and shapes must be the same: products with zeros instead.
  index_l = jax.lax.axis_index('model') * n_local + jnp.arange(n_local)
  for start, stop in zip(starts, prefixes, strict=True):
    yield jnp.where((start <= index_l) & (index_l < stop), latents_bl, 0), decoder_ld


def with_threshold(sae: SparseAutoencoder, threshold: jax.Array) -> SparseAutoencoder:
  """Returns the SAE with latents that are on above one threshold, whatever the batch: BatchTopK after training."""
  return with_activation(sae, JumpReLU(jnp.full_like(sae.latent_bias[...], threshold)))
