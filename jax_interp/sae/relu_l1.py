"""ReLU and an L1 penalty: the recipe of Bricken et al. 2023, whose dead latents are resampled, and that of April 2024.

The first keeps the decoder's rows at unit norm, else the penalty would be evaded by small latents and large rows; the
second weights each latent by its row's norm and constrains nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_interp.sae import dense


def l1_warmup(step: jax.Array, warmup_steps: int) -> jax.Array:
  """Returns the factor that raises a sparsity penalty linearly from 0 to 1 over the first steps."""
  return jnp.minimum(1, step / max(warmup_steps, 1)) if warmup_steps else jnp.ones(())


@dataclasses.dataclass(frozen=True)
class ReLUL1:
  """A recipe: E|x - recons|^2 + l1_coef E sum_l latents_l, each times |decoder_l| where `weighted`.

  Attributes:
    l1_coef: in the units of x, as normalised.
    weighted: by the decoder's norms, which are free then (Anthropic, April 2024 update); else they are 1 (Bricken et
      al. 2023).
    l1_warmup_steps: over which the penalty rises from 0.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    dtype: of products with the weights, as `dense.product`; weights, gradients and moments are float32.
  """

  l1_coef: float
  weighted: bool = False
  l1_warmup_steps: int = 0
  dead_tokens: int = 10_000_000
  dtype: str = 'float32'

  @property
  def unit_norm(self) -> bool:
    return not self.weighted

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step, n_parts=1):
    """See `train_step.Recipe`."""
    coef = self.l1_coef * l1_warmup(step, self.l1_warmup_steps)

    def terms(sae, x_bd, target_bd, tokens_since_fired_l):
      latents_bl = jax.nn.relu(dense.linear(sae, x_bd, self.dtype) + sae.latent_bias[...])
      recons_bd = dense.reconstruct(sae, latents_bl, x_bd, self.dtype)
      sizes_bl = latents_bl * dense.decoder_norms(sae) if self.weighted else latents_bl
      parts = {
        'squared_error': dense.squared_error(target_bd - recons_bd),
        'sparsity': coef * dense.batch_mean(dense.sum_over_latents(sizes_bl)),
      }
      return dense.Terms(latents_bl, recons_bd, parts)

    batch = x_bd, target_bd, tokens_since_fired_l
    return dense.loss_and_grads(terms, sae, *batch, mse_scale, self.dead_tokens, n_parts)
