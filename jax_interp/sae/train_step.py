"""One jitted call: a training state and a few batches of activations in, the next state and its metrics out.

The order within a step: loss and gradients with a decoder of exactly unit norm; the decoder's gradient loses its
component along each row; clip and Adam; the decoder's rows return to unit norm; the average takes up the new weights.
OpenAI's trainer renormalises before Adam and averages the old weights, so that its decoder is one Adam step off unit
norm; here it never is, unless a recipe asks for parity.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jax_interp.sae.losses import partition_specs, variance
from jax_interp.sae.micro_batches import rows_spec
from models.sae import SparseAutoencoder, unit_rows

THRESHOLD_DECAY = 0.99  # of the average of a recipe's threshold, which follows the weights: they change for long


class Recipe(Protocol):
  """What is minimised, and how: a frozen dataclass, static to `train_steps`; `losses.TopK` is one.

  Attributes:
    unit_norm: the decoder's rows are kept at norm 1, and its gradient loses its component along each row.
    scales_rows: where it has that and it is true, `loss_and_grads` takes the factors that bring the decoder's rows to
      norm 1, so that they need not be multiplied out, and does the projection; see `losses.TopK`.
    parity: where it has that and it is true, the order within a step is that of OpenAI's trainer.
  """

  unit_norm: bool

  def loss_and_grads(
    self,
    sae: SparseAutoencoder,
    x_bd: jax.Array,
    target_bd: jax.Array,
    tokens_since_fired_l: jax.Array,
    mse_scale: jax.Array,
    step: jax.Array,
    n_parts: int = 1,
  ) -> tuple[dict[str, jax.Array], jax.Array, SparseAutoencoder]:
    """Returns metrics (scalars: loss, normalized_mse, l0, dead and more), the dead clock, and the gradients.

    A metric called 'threshold' is averaged over the steps into `TrainState.threshold`.

    Args:
      sae: parameters.
      x_bd: normalised activations.
      target_bd: what is reconstructed: x_bd, or a transcoder's targets times its output_scale.
      tokens_since_fired_l: int32, tokens since each latent last fired.
      mse_scale: 1 / the variance of a sample of targets, frozen.
      step: steps made before this one.
      n_parts: micro-batches; see `micro_batches.MicroBatched`.
    """


class TrainState(NamedTuple):
  """Everything that training needs to go on, a pytree on the mesh; `step` is also the position in the data."""

  sae: SparseAutoencoder
  opt: optax.OptState
  ema: SparseAutoencoder | None  # not corrected for its start at zero
  tokens_since_fired_l: jax.Array
  mse_scale: jax.Array
  step: jax.Array
  threshold: jax.Array  # the average of the recipe's, 0 where it has none


def init_state(
  sae: SparseAutoencoder,
  sample_bd: jax.Array,
  tx: optax.GradientTransformation,
  ema: float = 0,
  target_sample_bd: jax.Array | None = None,
) -> TrainState:
  """Returns the state at step 0; the sample fixes mse_scale = 1 / its variance, in the SAE's normalisation.

  A transcoder's is that of its targets, times its output_scale.
  """

  @jax.jit
  def init(sae, sample_bd, target_sample_bd):
    _, sample_target_bd = _normalized(sae, sample_bd, target_sample_bd)
    return _constrain(
      TrainState(
        sae=sae,
        opt=tx.init(sae),
        ema=jax.tree.map(jnp.zeros_like, sae) if ema else None,
        tokens_since_fired_l=jnp.zeros(sae.n_latents, jnp.int32),
        mse_scale=1 / variance(sample_target_bd),
        step=jnp.zeros((), jnp.int32),
        threshold=jnp.zeros(()),
      )
    )

  return init(sae, sample_bd, target_sample_bd)


def _normalized(sae, acts_bd, targets_bd):
  x_bd, _ = sae.normalize(acts_bd)
  return x_bd, x_bd if targets_bd is None else targets_bd.astype(jnp.float32) * sae.output_scale


def _constrain(state):
  specs = partition_specs(state)._replace(tokens_since_fired_l=P('model'))
  return jax.tree.map(lambda spec, x: jax.lax.with_sharding_constraint(x, spec), specs, state)


@functools.partial(jax.jit, static_argnames=('tx', 'objective', 'ema'), donate_argnames='state')
def train_steps(
  state: TrainState,
  acts_sbd: jax.Array,
  tx: optax.GradientTransformation,
  objective: Recipe,
  ema: float = 0,
  targets_sbd: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one step on each batch of acts_sbd [step, batch, d], and the metrics of every step.

  To the recipe's metrics it adds grad_norm, the global norm of the gradients before any clip. Several steps in one call
  save the allocation of every intermediate array: on a CPU up to twice as fast as one.
  Runs are bit-identical on a CPU or TPU; a GPU adds to the gradients' rows in any order unless
  XLA_FLAGS=--xla_gpu_deterministic_ops=true.

  Args:
    state: donated.
    acts_sbd: raw activations, the batch divisible by the `data` axis. Best each row is on one device: 'row' of
      `models.sharding`.
    tx: from `optimizer.adam`.
    objective: what is minimised.
    ema: the decay of the average of the weights, 0 for none; as given to `init_state`.
    targets_sbd: what is reconstructed instead of acts_sbd, by a transcoder.
  """
  fed = lambda x_bd: x_bd if x_bd is None else jax.lax.with_sharding_constraint(x_bd, rows_spec(len(x_bd)))
  lazy = getattr(objective, 'scales_rows', False) and not objective.parity  # those that scale rows have a parity

  def step(carry, batch):
    state, row_scale_l = carry
    acts_bd, targets_bd = batch
    x_bd, target_bd = _normalized(state.sae, fed(acts_bd), fed(targets_bd))
    found = objective.loss_and_grads(
      state.sae,
      x_bd,
      target_bd,
      state.tokens_since_fired_l,
      state.mse_scale,
      state.step,
      *([row_scale_l] if lazy else []),
    )
    state, row_scale_l, metrics = _updated(state, row_scale_l, *found, tx, objective, ema)
    return (state, row_scale_l), metrics

  row_scale_l = _row_scale(state.sae) if lazy else None
  (state, row_scale_l), metrics = jax.lax.scan(step, (state, row_scale_l), (acts_sbd, targets_sbd))
  return state._replace(sae=_scaled(state.sae, row_scale_l)), metrics


def update(
  state: TrainState,
  metrics: dict[str, jax.Array],
  tokens_since_fired_l: jax.Array,
  grads: SparseAutoencoder,
  tx: optax.GradientTransformation,
  objective,
  ema: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after a step with these gradients, and the metrics with grad_norm; inside `jax.jit`.

  Args:
    state: before the step.
    metrics: of the step; and the next two, as `Recipe.loss_and_grads` returns them.
    tokens_since_fired_l: the dead clock.
    grads: of the loss.
    tx: the optimizer.
    objective: has `unit_norm`, as `Recipe`.
    ema: as for `train_steps`.
  """
  state, _, metrics = _updated(state, None, metrics, tokens_since_fired_l, grads, tx, objective, ema)
  return state, metrics


def _updated(state, row_scale_l, metrics, tokens_since_fired_l, grads, tx, objective, ema):
  """As `update`; with the scale of the decoder's rows, they are only multiplied by it, and the next scale returned."""
  sae, unit_norm, parity = state.sae, objective.unit_norm, getattr(objective, 'parity', False)
  lazy = row_scale_l is not None
  if lazy:
    sae.decoder[...] *= row_scale_l[:, None]
  elif unit_norm:
    if parity:
      sae.decoder[...] = unit_rows(sae.decoder[...])
    along_l1 = jnp.sum(grads.decoder[...] * sae.decoder[...], axis=1, keepdims=True)
    grads.decoder[...] -= along_l1 * sae.decoder[...]
  metrics.setdefault('grad_norm', optax.tree.norm(grads))
  updates, opt = tx.update(grads, state.opt, sae)
  new_sae = optax.apply_updates(sae, updates)
  if lazy:
    row_scale_l = _row_scale(new_sae)
  elif unit_norm and not parity:
    new_sae.decoder[...] = unit_rows(new_sae.decoder[...])
  average = state.ema
  if average is not None:
    taken = sae if parity else _scaled(new_sae, row_scale_l)
    average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, average, taken)
  threshold = state.threshold
  if 'threshold' in metrics:
    threshold += (metrics['threshold'] - threshold) * jnp.maximum(1 - THRESHOLD_DECAY, 1 / (state.step + 1))
  state = TrainState(new_sae, opt, average, tokens_since_fired_l, state.mse_scale, state.step + 1, threshold)
  return _constrain(state), row_scale_l, metrics


def _row_scale(sae):
  return jax.lax.with_sharding_constraint(1 / jnp.linalg.norm(sae.decoder[...], axis=1), P('model'))


def _scaled(sae, row_scale_l):
  """Returns the SAE with its decoder's rows multiplied."""
  sae = jax.tree.map(lambda x: x, sae)  # not to change the caller's
  if row_scale_l is not None:
    sae.decoder[...] *= row_scale_l[:, None]
  return sae


def trained_sae(state: TrainState, ema: float = 0, unit_norm: bool = True) -> SparseAutoencoder:
  """Returns the SAE to keep: the weights, or their average, corrected for its start and, if asked, at unit norm."""
  if not ema or not state.step:  # before the first step there is nothing to average
    return state.sae
  sae = jax.tree.map(lambda x: x / (1 - ema**state.step), state.ema)
  if unit_norm:
    sae.decoder[...] = unit_rows(sae.decoder[...])
  return sae
