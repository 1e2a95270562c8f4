"""One jitted call: a training state and a few batches of activations in, the next state and its metrics out.

The order within a step: loss and gradients with a decoder of exactly unit norm; the decoder's gradient loses its
component along each row; clip and Adam; the decoder's rows return to unit norm; the average takes up the new weights.
OpenAI's trainer renormalises before Adam and averages the old weights, so that its decoder is one Adam step off unit
norm; here it never is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jax_interp.sae.losses import Objective, loss_and_grads, partition_specs, variance
from models.sae import SparseAutoencoder, normalize, unit_rows


class TrainState(NamedTuple):
  """Everything that training needs to go on, a pytree on the mesh; `step` is also the position in the data."""

  sae: SparseAutoencoder
  opt: optax.OptState
  ema: SparseAutoencoder | None  # not corrected for its start at zero
  tokens_since_fired_l: jax.Array
  mse_scale: jax.Array
  step: jax.Array


@functools.cache  # it is static to `train_steps`: equal settings must be the same object, or that compiles again
def adam(
  learning_rate: float, warmup_steps: int, eps: float = 6.25e-10, clip: float = 0
) -> optax.GradientTransformation:
  """Returns Adam with a linear warm-up to a constant rate, after a clip of the global norm where `clip` is above 0."""
  schedule = lambda step: learning_rate * jnp.minimum(1, (step + 1) / max(warmup_steps, 1))
  return optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), optax.adam(schedule, eps=eps))


def init_state(
  sae: SparseAutoencoder, sample_bd: jax.Array, tx: optax.GradientTransformation, ema: float = 0
) -> TrainState:
  """Returns the state at step 0; the sample fixes mse_scale = 1 / its variance, in the SAE's normalisation."""

  @jax.jit
  def init(sae, sample_bd):
    return _constrain(
      TrainState(
        sae=sae,
        opt=tx.init(sae),
        ema=jax.tree.map(jnp.zeros_like, sae) if ema else None,
        tokens_since_fired_l=jnp.zeros(sae.n_latents, jnp.int32),
        mse_scale=1 / variance(normalize(sample_bd, sae.normalization)[0]),
        step=jnp.zeros((), jnp.int32),
      )
    )

  return init(sae, jnp.asarray(sample_bd))


def _constrain(state):
  specs = partition_specs(state)._replace(tokens_since_fired_l=P('model'))
  return jax.tree.map(lambda spec, x: jax.lax.with_sharding_constraint(x, spec), specs, state)


@functools.partial(jax.jit, static_argnames=('tx', 'objective', 'ema'), donate_argnames='state')
def train_steps(
  state: TrainState, acts_sbd: jax.Array, tx: optax.GradientTransformation, objective: Objective, ema: float = 0
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the state after one step on each batch of acts_sbd [step, batch, d], and the metrics of every step.

  Several steps in one call save the allocation of every intermediate array: on a CPU up to twice as fast as one.
  Runs are bit-identical on a CPU or TPU; a GPU adds to the gradients' rows in any order unless
  XLA_FLAGS=--xla_gpu_deterministic_ops=true.

  Args:
    state: donated.
    acts_sbd: raw activations, the batch divisible by the `data` axis.
    tx: from `adam`.
    objective: what is minimised.
    ema: the decay of the average of the weights, 0 for none; as given to `init_state`.
  """

  def step(state, acts_bd):
    x_bd, _ = state.sae.normalize(jax.lax.with_sharding_constraint(acts_bd, P('data', None)))
    metrics, tokens_since_fired_l, grads = loss_and_grads(
      state.sae, x_bd, state.tokens_since_fired_l, state.mse_scale, objective
    )
    decoder_ld = state.sae.decoder[...]
    along_l1 = jnp.sum(grads.decoder[...] * decoder_ld, axis=1, keepdims=True)
    grads.decoder[...] -= along_l1 * decoder_ld
    updates, opt = tx.update(grads, state.opt, state.sae)
    sae = optax.apply_updates(state.sae, updates)
    sae.decoder[...] = unit_rows(sae.decoder[...])
    average = state.ema and jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.ema, sae)
    return _constrain(TrainState(sae, opt, average, tokens_since_fired_l, state.mse_scale, state.step + 1)), metrics

  return jax.lax.scan(step, state, acts_sbd)


def trained_sae(state: TrainState, ema: float = 0) -> SparseAutoencoder:
  """Returns the SAE to keep: the weights, or their average, corrected for its start and its decoder at unit norm."""
  if not ema:
    return state.sae
  sae = jax.tree.map(lambda x: x / (1 - ema**state.step), state.ema)
  sae.decoder[...] = unit_rows(sae.decoder[...])
  return sae
