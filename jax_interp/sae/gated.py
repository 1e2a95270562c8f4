"""Gated SAEs: which latents are on, and how strongly, are said by two sets of biases (Rajamanoharan et al. 2024a).

The penalty falls on the gate alone, so that magnitudes need not shrink; the gate learns from an auxiliary
reconstruction through a decoder that it does not change.
"""

import dataclasses

import jax

from jax_interp.sae import dense


@dataclasses.dataclass(frozen=True)
class Gated:
  """A recipe, eq. 8 of the paper: E|x - recons|^2 + l1_coef E sum_l relu(gate_l) + E|x - recons of relu(gate)|^2.

  The decoder's rows are at unit norm; in the last term it and the bias are constants.

  Attributes:
    l1_coef: in the units of x, as normalised.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    dtype: of products with the weights, as `dense.product`; weights, gradients and moments are float32.
  """

  l1_coef: float
  dead_tokens: int = 10_000_000
  dtype: str = 'float32'
  unit_norm = True

  def loss_and_grads(self, sae, x_bd, target_bd, tokens_since_fired_l, mse_scale, step, n_parts=1):
    """See `train_step.Recipe`."""

    def terms(sae, x_bd, target_bd, tokens_since_fired_l):
      linear_bl = dense.linear(sae, x_bd, self.dtype)
      latents_bl = sae.activation(linear_bl, sae.latent_bias[...])
      gate_bl = jax.nn.relu(linear_bl + sae.latent_bias[...])
      recons_bd = dense.reconstruct(sae, latents_bl, x_bd, self.dtype)
      held = jax.lax.stop_gradient(sae)
      through_gate_bd = dense.reconstruct(held, gate_bl, x_bd, self.dtype)
      parts = {
        'squared_error': dense.squared_error(target_bd - recons_bd),
        'sparsity': self.l1_coef * dense.batch_mean(dense.sum_over_latents(gate_bl)),
        'auxiliary': dense.squared_error(target_bd - through_gate_bd),
      }
      return dense.Terms(latents_bl, recons_bd, parts)

    batch = x_bd, target_bd, tokens_since_fired_l
    return dense.loss_and_grads(terms, sae, *batch, mse_scale, self.dead_tokens, n_parts)
