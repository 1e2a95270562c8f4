"""End-to-end loss: an SAE judged by what the subject model says with its reconstruction in place.

The gradient comes through the rest of the model, so that latents serve what the model computes and not how its
activations vary (Braun et al. 2024). The model itself does not change.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jax_interp.sae import train_step
from models import sites
from models.sae import SparseAutoencoder

DIVERGENCES = ('kl', 'cross_entropy')
DIFFERENTIABLE = ('topk', 'relu', 'gated')  # the others' gradients are estimates, which belong to their own recipes


def _reconstruct(x, tap, sae, mask):
  recons = sae.decode(*sae.encode(x.astype(jnp.float32)))
  return jnp.where(tap.here(mask), recons, x).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class EndToEnd:
  """A loss over tokens: divergence of the model with the reconstruction, + mse_coef MSE + l1_coef E sum_l latents_l.

  The divergence is KL(clean || spliced) of the next token's distributions ('kl'), or the cross-entropy of the text
  ('cross_entropy'), in nats; the mean over the predictions at kept tokens. The MSE is the normalized one, of the site.
  AuxK is no part of the loss.

  Attributes:
    site: where the reconstruction stands, [batch, token, d].
    divergence: one of DIVERGENCES.
    mse_coef: keeps reconstructions near the activations; 0 leaves them free.
    l1_coef: for activations that are not sparse by themselves.
    dead_tokens: a latent is dead when it was zero on more than this many tokens in a row.
    unit_norm: whether the decoder's rows are kept at norm 1, where they are.

  Raises:
    ValueError: the divergence is unknown.
  """

  site: str
  divergence: str = 'kl'
  mse_coef: float = 0.0
  l1_coef: float = 0.0
  dead_tokens: int = 10_000_000
  unit_norm: bool = True

  def __post_init__(self):
    if self.divergence not in DIVERGENCES:
      raise ValueError(f'divergence {self.divergence!r} is unknown; choose one of {", ".join(DIVERGENCES)}')

  def loss_and_grads(
    self,
    sae: SparseAutoencoder,
    model,
    tokens_bt: jax.Array,
    keep_bt: jax.Array,
    tokens_since_fired_l: jax.Array,
    mse_scale: jax.Array,
  ) -> tuple[dict[str, jax.Array], jax.Array, SparseAutoencoder]:
    """Returns metrics, the dead clock and the gradients, as `train_step.Recipe.loss_and_grads`.

    Args:
      sae: at the site.
      model: the subject model, as for `sites.forward`.
      tokens_bt: token ids, padding replaced by any token.
      keep_bt: false at what is not text; there the activation stays and nothing is counted.
      tokens_since_fired_l: the dead clock.
      mse_scale: 1 / the variance of a sample.

    Raises:
      ValueError: the SAE is a transcoder, or its activation has no gradient of its own.
    """
    if sae.is_transcoder or sae.activation.name not in DIFFERENTIABLE:
      what = 'a transcoder' if sae.is_transcoder else f'activation {sae.activation.name!r}'
      raise ValueError(f'{what} cannot be trained end to end; choose an SAE of {", ".join(DIFFERENTIABLE)}')
    clean_btv, acts = sites.forward(model, tokens_bt, capture=(self.site,))
    x_btd = jax.lax.stop_gradient(acts[self.site].astype(jnp.float32))
    counted_bt = keep_bt[:, :-1] & keep_bt[:, 1:]
    mean = lambda x_bt, where_bt: jnp.sum(jnp.where(where_bt, x_bt, 0)) / jnp.maximum(where_bt.sum(), 1)

    def loss(sae):
      edit = sites.Edit(self.site, _reconstruct, (sae, keep_bt[..., None]))
      spliced_btv, _ = sites.forward(model, tokens_bt, [edit])
      clean, spliced = (jax.nn.log_softmax(x[:, :-1].astype(jnp.float32)) for x in (clean_btv, spliced_btv))
      kl = mean(jnp.sum(jnp.exp(clean) * (clean - spliced), -1), counted_bt)
      text_bt = optax.softmax_cross_entropy_with_integer_labels(spliced, tokens_bt[:, 1:])
      cross_entropy = mean(text_bt, counted_bt)
      latents_btl, norm = sae.encode(x_btd)
      error_btd = (sae.decode(latents_btl, norm) - x_btd) / norm.scale  # in the SAE's normalisation
      mse = mse_scale * mean(jnp.mean(error_btd**2, -1), keep_bt)
      parts = {'divergence': kl if self.divergence == 'kl' else cross_entropy}
      if self.mse_coef:
        parts['mse'] = self.mse_coef * mse
      if self.l1_coef:
        parts['sparsity'] = self.l1_coef * mean(latents_btl.sum(-1), keep_bt)
      total = sum(parts.values())
      metrics = {'loss': total, 'normalized_mse': mse, 'kl': kl, 'cross_entropy': cross_entropy} | parts
      return total, (metrics, latents_btl > 0)

    (_, (metrics, active_btl)), grads = jax.value_and_grad(loss, has_aux=True)(sae)
    active_btl &= keep_bt[..., None]
    fired_l = active_btl.any((0, 1))
    # The clock stops long before int32 overflows.
    tokens_since_fired_l = jnp.where(fired_l, 0, jnp.minimum(tokens_since_fired_l, 2**30) + keep_bt.sum())
    metrics['l0'] = mean(active_btl.sum(-1), keep_bt)
    metrics['dead'] = (tokens_since_fired_l > self.dead_tokens).sum()
    return metrics, tokens_since_fired_l, grads


@functools.partial(jax.jit, static_argnames=('tx', 'objective', 'ema'), donate_argnames='state')
def train(
  state: train_step.TrainState,
  model,
  tokens_bt: jax.Array,
  keep_bt: jax.Array,
  tx: optax.GradientTransformation,
  objective: EndToEnd,
  ema: float = 0,
) -> tuple[train_step.TrainState, dict[str, jax.Array]]:
  """Returns the state after one step on a batch of text, and its metrics.

  Args:
    state: of `train_step.init_state`; donated.
    model: the subject model.
    tokens_bt: token ids, padding replaced by any token.
    keep_bt: false at what is not text.
    tx: from `optimizer.adam`.
    objective: what is minimised.
    ema: the decay of the average of the weights, 0 for none; as given to `init_state`.
  """
  clock_l = state.tokens_since_fired_l
  found = objective.loss_and_grads(state.sae, model, tokens_bt, keep_bt, clock_l, state.mse_scale)
  return train_step.update(state, *found, tx, objective, ema)
