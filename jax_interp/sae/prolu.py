"""ProLU: an activation whose bias only decides whether a latent is on, trained with a made-up gradient (Taggart 2024).

The true gradient of the bias is zero almost everywhere. In its place stands that of a ReLU, or a straight-through
estimate.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_interp.sae import dense

GRADIENTS = ('relu', 'ste')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def prolu(linear: jax.Array, bias: jax.Array, gradient: str) -> jax.Array:
  """Returns linear where both it and linear + bias are positive, else 0.

  Where it is on its derivatives are 1 and 1 with gradient 'relu', those of relu(linear + bias); and 1 + linear and
  linear with 'ste', as if the step that multiplies linear had the derivative 1 there. Elsewhere they are 0.
  """
  return jnp.where((linear > 0) & (linear + bias > 0), linear, 0)


@prolu.defjvp
def _prolu_jvp(gradient, primals, tangents):
  linear, bias = primals
  linear_dot, bias_dot = tangents
  latents = prolu(linear, bias, gradient)
  by_bias = (latents > 0).astype(latents.dtype) if gradient == 'relu' else latents
  by_linear = by_bias if gradient == 'relu' else (latents > 0) + latents
  return latents, by_linear * linear_dot + by_bias * bias_dot


@dataclasses.dataclass(frozen=True)
class ProLU:
  """A recipe: E|x - recons|^2 + l1_coef E sum_l latents_l, with the decoder's rows at unit norm.

  Attributes:
    l1_coef: in the units of x, as normalised.
    gradient: of the latent bias, one of GRADIENTS.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    dtype: of products with the weights, as `dense.product`; weights, gradients and moments are float32.

  Raises:
    ValueError: the gradient is unknown.
  """

  l1_coef: float
  gradient: str = 'relu'
  dead_tokens: int = 10_000_000
  dtype: str = 'float32'
  unit_norm = True

  def __post_init__(self):
    if self.gradient not in GRADIENTS:
      raise ValueError(f'gradient {self.gradient!r} of ProLU is unknown; choose one of {", ".join(GRADIENTS)}')

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step, n_parts=1):
    """See `train_step.Recipe`."""

    def terms(sae, x_bd, target_bd, tokens_since_fired_l):
      latents_bl = prolu(dense.linear(sae, x_bd, self.dtype), sae.latent_bias[...], self.gradient)
      recons_bd = dense.reconstruct(sae, latents_bl, x_bd, self.dtype)
      parts = {
        'squared_error': dense.squared_error(target_bd - recons_bd),
        'sparsity': self.l1_coef * dense.batch_mean(dense.sum_over_latents(latents_bl)),
      }
      return dense.Terms(latents_bl, recons_bd, parts)

    batch = x_bd, target_bd, tokens_since_fired_l
    return dense.loss_and_grads(terms, sae, *batch, mse_scale, self.dead_tokens, n_parts)
