"""JumpReLU: a threshold for each latent, trained by straight-through estimates (Rajamanoharan et al. 2024b).

The loss is piecewise constant in the thresholds. Its expected derivative is estimated from the pre-activations within
half a bandwidth of them. Thresholds are trained as they are, not as logarithms: those hardly move under Adam. It moves
them by about the learning rate a step, which is little in few steps: hence the threshold_rate of `optimizer.adam`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_interp.sae import dense
from jax_interp.sae.relu_l1 import l1_warmup

SPARSITIES = ('l0', 'target', 'tanh')


def _near(preacts, threshold, bandwidth):
  """The rectangle kernel: 1 within half a bandwidth of the threshold."""
  return (jnp.abs(preacts - threshold) < bandwidth / 2).astype(preacts.dtype)


@jax.custom_jvp
def jumprelu(preacts: jax.Array, threshold: jax.Array, bandwidth) -> jax.Array:
  """Returns preacts above the threshold, else 0; by the threshold it has the derivative of eq. 11 of the paper.

  That is -threshold / bandwidth where a pre-activation is within half a bandwidth of the threshold, else 0. By preacts
  it is 1 above the threshold.
  """
  return jnp.where(preacts > threshold, preacts, 0)


@jumprelu.defjvp
def _jumprelu_jvp(primals, tangents):
  preacts, threshold, bandwidth = primals
  by_threshold = -threshold / bandwidth * _near(preacts, threshold, bandwidth)
  return jumprelu(*primals), jnp.where(preacts > threshold, tangents[0], 0) + by_threshold * tangents[1]


@jax.custom_jvp
def step(preacts: jax.Array, threshold: jax.Array, bandwidth) -> jax.Array:
  """Returns 1 above the threshold, else 0; by the threshold it has the derivative of eq. 12 of the paper.

  That is -1 / bandwidth where a pre-activation is within half a bandwidth of the threshold. By preacts it is 0.
  """
  return (preacts > threshold).astype(preacts.dtype)


@step.defjvp
def _step_jvp(primals, tangents):
  preacts, threshold, bandwidth = primals
  return step(*primals), -_near(preacts, threshold, bandwidth) / bandwidth * tangents[1]


@dataclasses.dataclass(frozen=True)
class JumpReLU:
  """A recipe: E|x - recons|^2 + coef * sparsity, where sparsity is one of three.

  'l0': E L0 (Rajamanoharan et al. 2024b). 'target': (E L0 / target_l0 - 1)^2, which draws L0 there in many
  steps. 'tanh': E sum_l tanh(tanh_scale |decoder_l| latents_l), and preact_coef E sum_l relu(threshold_l -
  preacts_l) |decoder_l|, which draws dead latents back (Anthropic, January 2025 update). Under 'l0' and 'target' the
  decoder's rows are at unit norm, under 'tanh' they are free.

  Attributes:
    coef: of the sparsity.
    sparsity: 'l0', 'target' or 'tanh'.
    bandwidth: of the estimates, in the units of pre-activations.
    warmup_steps: over which coef rises from 0.
    target_l0: of 'target'.
    tanh_scale: of 'tanh'.
    preact_coef: of 'tanh'.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    dtype: of products with the weights, as `dense.product`; weights, gradients and moments are float32.

  Raises:
    ValueError: the sparsity is unknown, has no target, or has one that it does not use.
  """

  coef: float
  sparsity: str = 'l0'
  bandwidth: float = 1e-3
  warmup_steps: int = 0
  target_l0: float = 0
  tanh_scale: float = 4
  preact_coef: float = 3e-6
  dead_tokens: int = 10_000_000
  dtype: str = 'float32'

  def __post_init__(self):
    if self.sparsity not in SPARSITIES:
      raise ValueError(f'sparsity {self.sparsity!r} of JumpReLU is unknown; choose one of {", ".join(SPARSITIES)}')
    if self.sparsity == 'target' and self.target_l0 <= 0:
      raise ValueError(f"target_l0 {self.target_l0} of sparsity 'target' is not above 0; give the L0 wanted")
    if self.sparsity != 'target' and self.target_l0:
      raise ValueError(f'target_l0 {self.target_l0} means nothing to sparsity {self.sparsity!r}; set it to 0')

  @property
  def unit_norm(self) -> bool:
    return self.sparsity != 'tanh'

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step_number, n_parts=1):
    """See `train_step.Recipe`."""
    warm = l1_warmup(step_number, self.warmup_steps)

    def terms(sae, x_bd, target_bd, tokens_since_fired_l):
      preacts_bl = dense.linear(sae, x_bd, self.dtype) + sae.latent_bias[...]
      # One below 0 counts as 0 and has the gradient of 0, or it would stay below for good.
      own_l = sae.activation.threshold[...]
      threshold_l = own_l + jax.lax.stop_gradient(jnp.maximum(own_l, 0) - own_l)
      latents_bl = jumprelu(preacts_bl, threshold_l, self.bandwidth)
      recons_bd = dense.reconstruct(sae, latents_bl, x_bd, self.dtype)
      parts = {'squared_error': dense.squared_error(target_bd - recons_bd)}
      if self.sparsity == 'tanh':
        norms_l = dense.decoder_norms(sae)
        sizes_b = dense.sum_over_latents(jnp.tanh(self.tanh_scale * norms_l * latents_bl))
        short_b = dense.sum_over_latents(jax.nn.relu(threshold_l - preacts_bl) * norms_l)
        parts['sparsity'] = warm * self.coef * dense.batch_mean(sizes_b)
        parts['preact'] = self.preact_coef * dense.batch_mean(short_b)
      else:
        l0 = dense.batch_mean(dense.sum_over_latents(step(preacts_bl, threshold_l, self.bandwidth)))
        penalty = l0 if self.sparsity == 'l0' else (l0 / self.target_l0 - 1) ** 2
        parts['sparsity'] = warm * self.coef * penalty
      return dense.Terms(latents_bl, recons_bd, parts)

    batch = x_bd, target_bd, tokens_since_fired_l
    return dense.loss_and_grads(terms, sae, *batch, mse_scale, self.dead_tokens, n_parts)
