"""Growth: a trained SAE becomes wider or smaller, keeps another k, or becomes a JumpReLU one.

Each transform takes an SAE, or the state of a training of which Adam's moments, the average and the dead clock change
along, and returns the same with other shapes; nothing is donated. Latents that stay keep all their numbers, to the last
bit. An SAE of which only the weights are left goes on from `train_step.init_state`, a state from `restart`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_interp.sae import dense, resample
from jax_interp.sae.train_step import TrainState
from models import activation_functions, sharding
from models import sae as sae_lib
from models.sae import SparseAutoencoder

CHUNK = 4096  # tokens of a sample that are encoded at a time
OF_PREACTS = ('topk', 'relu', 'jumprelu')  # whose latents are pre-activations or 0
GAINS = tuple(2 ** (-i / 2) for i in range(11))  # from 1 to 1/32


class Fit(NamedTuple):
  """How an SAE does on a sample.

  Attributes:
    normalized_mse: E|target - recons|^2 / E|target - mean target|^2, of targets as training has them.
    l0: latents that are on, per token.
    fired_l: on how many of the tokens each latent is on.
  """

  normalized_mse: float
  l0: float
  fired_l: np.ndarray


@jax.jit
def _forward(sae, acts_bd, targets_bd):
  x_bd, _ = sae.normalize(acts_bd)
  target_bd = x_bd if targets_bd is None else targets_bd.astype(jnp.float32) * sae.output_scale
  latents_bl = sae.activation(sae.linear(x_bd), sae.latent_bias[...])
  recons_bd = latents_bl @ sae.decoder[...] + dense.constant(sae, x_bd)
  return target_bd, target_bd - recons_bd, (latents_bl > 0).sum(0)


def _errors(sae, acts_bd, targets_bd):
  """Returns the targets [b, d] and their errors, as training has them, and how often each latent is on."""
  found = []
  for start in range(0, len(acts_bd), CHUNK):
    part = slice(start, start + CHUNK)
    found.append(_forward(sae, acts_bd[part], None if targets_bd is None else targets_bd[part]))
  targets, errors, fired = zip(*found, strict=True)
  return jnp.concatenate(targets), jnp.concatenate(errors), sum(fired)


def fit(sae: SparseAutoencoder, acts_bd: np.ndarray, targets_bd: np.ndarray | None = None) -> Fit:
  """Returns how the SAE does on raw activations, or a transcoder on them and its targets."""
  target_bd, error_bd, fired_l = _errors(sae, acts_bd, targets_bd)
  variation_bd = target_bd - target_bd.mean(0)
  fired_l = np.asarray(fired_l, np.int64)
  return Fit(float(jnp.sum(error_bd**2) / jnp.sum(variation_bd**2)), float(fired_l.sum() / len(acts_bd)), fired_l)


def sae_of(of: SparseAutoencoder | TrainState) -> SparseAutoencoder:
  """Returns the SAE itself, or that of the state."""
  return of if isinstance(of, SparseAutoencoder) else of.sae


def _changed(
  of: SparseAutoencoder | TrainState, weights: Callable, moments: Callable, average: Callable, clock: Callable
) -> SparseAutoencoder | TrainState:
  """Returns the SAE changed by `weights`; of a state also each of Adam's moments, the average and the dead clock."""
  is_sae = lambda x: isinstance(x, SparseAutoencoder)
  if is_sae(of):
    return weights(of)
  return of._replace(
    sae=weights(of.sae),
    opt=jax.tree.map(lambda x: moments(x) if is_sae(x) else x, of.opt, is_leaf=is_sae),
    ema=None if of.ema is None else average(of.ema),
    tokens_since_fired_l=clock(of.tokens_since_fired_l),
  )


def _start_of_average(of, ema):
  """Returns what a weight is multiplied by in an average that began at 0, so that its correction gives the weight."""
  if isinstance(of, SparseAutoencoder) or of.ema is None:
    return 0
  if not ema:
    raise ValueError('the state has an average of the weights; give its decay as ema')
  return 1 - ema**of.step


def _by_latent(sae) -> tuple[str, ...]:
  """Returns the names of the parameters that have a row for each latent."""
  return ('encoder', 'decoder', 'latent_bias', *sae.activation.parameters)


def _with_rows(sae, change):
  """Returns the SAE with `change(name, array)` for what has a row for each latent."""
  arrays = {name: param[...] for name, param in sae_lib.named_parameters(sae).items()}
  for name in _by_latent(sae):
    dims = 'latent d_model' if arrays[name].ndim == 2 else 'latent'
    arrays[name] = sharding.constrain(change(name, arrays[name]), dims)
  own = {name: arrays.pop(name) for name in sae.activation.parameters}
  activation = type(sae.activation)(**own) if sae.k is None else sae.activation
  settings = {name: value for name, value in sae_lib.settings_of(sae).items() if name not in ('activation', 'k')}
  return SparseAutoencoder(**arrays, activation=activation, **settings)


@jax.jit
def _append(sae, rows):
  return _with_rows(sae, lambda name, array: jnp.concatenate([array, rows[name]]))


@jax.jit
def _take(sae, kept_l):
  return _with_rows(sae, lambda name, array: array[kept_l])


@jax.jit
def _on_latents(x_l):
  return sharding.constrain(x_l, 'latent')


def widen(
  of: SparseAutoencoder | TrainState,
  acts_bd: np.ndarray,
  n_latents: int,
  key: jax.Array,
  ema: float = 0,
  targets_bd: np.ndarray | None = None,
) -> SparseAutoencoder | TrainState:
  """Returns it with new latents behind the old ones, in the directions of what it reconstructs worst.

  Each new latent draws a token of the sample, no two the same one, with a probability in proportion to its loss. Its
  decoder row is the direction of the token's error, target - recons, and so is its encoder row; a transcoder, whose
  inputs live in another space, has there the direction of the input minus pre_bias. Where fewer tokens have an error
  than there are new latents, the others have random directions. The decoder row's norm is the mean of the latents that
  are on in the sample; the encoder row's is theirs times a gain, one for all, the one of GAINS with which the sample
  has the least squared error. A small gain keeps new latents out of the top k, below a threshold, or near 0. If all do
  harm it is the smallest, which does the least. Biases are 0, as in a fresh SAE: biases that keep new latents off most
  tokens harm less at first, but Adam is slow to bring them up. A JumpReLU threshold is the mean of the others.

  An L0 that k does not fix rises at first: of a ReLU SAE, by nearly half of the new latents, at small values.

  The Adam moments and the dead clocks of new latents are 0; in the average they are as if they had always been there.

  Args:
    of: the SAE, or the state of its training.
    acts_bd: a sample of raw activations.
    n_latents: how many there are to be.
    key: of the draws, which do not depend on the mesh.
    ema: decay of the state's average, where it has one.
    targets_bd: of a transcoder.

  Raises:
    ValueError: there would not be more latents, the mesh does not divide them, the sample has fewer tokens than there
      are new ones, or the targets or the decay are missing.
  """
  sae = sae_of(of)
  n_new = n_latents - sae.n_latents
  if n_new < 1:
    raise ValueError(f'n_latents {n_latents} is not more than the {sae.n_latents} that there are; choose more')
  sae_lib.check_settings(n_latents, sae.k, sae.normalization)
  if n_new > len(acts_bd):
    raise ValueError(f'{n_new} new latents draw a token each from a sample of {len(acts_bd)}; give a larger one')
  if sae.is_transcoder != (targets_bd is not None):
    raise ValueError('targets are what a transcoder reconstructs; give them with one, and only then')
  corrected = _start_of_average(of, ema)
  rows = _new_rows(sae, acts_bd, targets_bd, n_new, key)
  zeros = jax.tree.map(jnp.zeros_like, rows)
  return _changed(
    of,
    weights=lambda sae: _append(sae, rows),
    moments=lambda moment: _append(moment, zeros),
    average=lambda average: _append(average, jax.tree.map(lambda x: corrected * x, rows)),
    clock=lambda clock_l: _on_latents(jnp.concatenate([clock_l, jnp.zeros(n_new, clock_l.dtype)])),
  )


def _new_rows(sae, acts_bd, targets_bd, n_new, key):
  """Returns {name: rows} of the new latents: see `widen`."""
  _, error_bd, fired_l = _errors(sae, acts_bd, targets_bd)
  rows = _directions(sae, jnp.asarray(acts_bd), error_bd, fired_l, key, n_new)
  candidates = [rows | {'encoder': gain * rows['encoder']} for gain in GAINS]
  # Not of `fit`: of a constant sample the normalized MSE is no number.
  loss = lambda sae: float(jnp.sum(_errors(sae, acts_bd, targets_bd)[1] ** 2))
  losses = [loss(_append(sae, rows)) for rows in candidates]
  best = int(np.argmin(losses))
  return candidates[best] if losses[best] <= loss(sae) else candidates[-1]


@functools.partial(jax.jit, static_argnames='n_new')
def _directions(sae, acts_bd, error_bd, fired_l, key, n_new):
  """Returns the rows of the new latents at gain 1."""
  tiny = jnp.finfo(jnp.float32).tiny
  log_odds_b = jnp.log(jnp.maximum(jnp.sum(error_bd**2, axis=1), tiny))
  # The largest of log odds plus Gumbel noise are draws without replacement.
  _, drawn_l = jax.lax.top_k(log_odds_b + jax.random.gumbel(key, log_odds_b.shape), n_new)
  x_bd = error_bd if not sae.is_transcoder else sae.normalize(acts_bd)[0] - sae.pre_bias[...]
  alive_l = (fired_l > 0) | ~jnp.any(fired_l > 0)
  mean = lambda x_l: jnp.sum(jnp.where(alive_l, x_l, 0)) / jnp.sum(alive_l)
  norm = lambda param: mean(jnp.linalg.norm(param[...], axis=1))
  # The same key: where the two are one, so are their random directions.
  random = jax.random.fold_in(key, 1)
  along = lambda x_bd: sharding.constrain(resample.directions(x_bd[drawn_l], random), 'latent d_model')
  rows = {'encoder': norm(sae.encoder) * along(x_bd), 'decoder': norm(sae.decoder) * along(error_bd)}
  rows |= {name: jnp.zeros(n_new) for name in _by_latent(sae) if name not in rows}
  if 'threshold' in rows:
    rows['threshold'] += mean(jnp.maximum(sae.activation.threshold[...], 0))
  return rows


def prune(
  of: SparseAutoencoder | TrainState, idle_l: np.ndarray, limit: float, least: int = 1
) -> SparseAutoencoder | TrainState:
  """Returns it without the latents that are idle beyond the limit; the others keep their order.

  Where no latent that went was on, the same latents are on as before, with the same values. As many of the least idle
  stay as the mesh needs for equal shards.

  Args:
    of: the SAE, or the state of its training.
    idle_l: how idle each latent is: a state's tokens_since_fired_l, with its dead_tokens as the limit; or a mask, with
      0.
    limit: a latent goes when it is idle by more.
    least: latents to keep at least, the least idle ones first.

  Raises:
    ValueError: there are not `least` latents, or fewer stay than k.
  """
  idle_l, n_shards = np.asarray(idle_l), jax.sharding.get_abstract_mesh().shape['model']
  n_kept = max(int((idle_l <= limit).sum()), least)
  n_kept = -(-n_kept // n_shards) * n_shards
  if n_kept > len(idle_l):
    raise ValueError(f'{n_kept} latents are to stay of {len(idle_l)}; choose fewer')
  kept_l = np.sort(np.argsort(idle_l, kind='stable')[:n_kept])
  take = lambda x: _take(x, kept_l)
  return _changed(of, take, take, take, lambda clock_l: _on_latents(clock_l[kept_l]))


def change_k(of: SparseAutoencoder | TrainState, k: int) -> SparseAutoencoder | TrainState:
  """Returns it with the k largest pre-activations of every token as its latents: a TopK SAE of that k.

  A ReLU or JumpReLU SAE becomes one too, without its thresholds: so what BatchTopK left can be trained on.

  Raises:
    ValueError: k is not within 1 and n_latents, or the latents are no pre-activations.
  """
  _check_preacts(sae_of(of), 'TopK')
  change = lambda x: sae_lib.with_activation(x, activation_functions.TopK(k))
  return _changed(of, change, change, change, lambda clock_l: clock_l)


def to_jumprelu(
  of: SparseAutoencoder | TrainState, acts_bd: np.ndarray, l0: float, ema: float = 0
) -> SparseAutoencoder | TrainState:
  """Returns it with one JumpReLU threshold for all latents, above which l0 of them are on a token of the sample.

  That is so in the mean and, where pre-activations tie, at least; the threshold lies halfway to the next smaller
  pre-activation. Each token is then encoded alone, and has as many latents as it needs. Moments of thresholds are 0.

  Args:
    of: the SAE, TopK, ReLU or JumpReLU, or the state of its training.
    acts_bd: a sample of raw activations; the host's memory grows with l0 * tokens.
    l0: as wanted.
    ema: decay of the state's average, where it has one.

  Raises:
    ValueError: the latents are no pre-activations, no threshold gives that L0, or the decay is missing.
  """
  sae = sae_of(of)
  _check_preacts(sae, 'JumpReLU')
  corrected, threshold = _start_of_average(of, ema), _threshold(sae, acts_bd, l0)

  @jax.jit
  def change(sae, threshold):
    threshold_l = jnp.full_like(sae.latent_bias[...], threshold)
    return sae_lib.with_activation(sae, activation_functions.JumpReLU(threshold_l))

  return _changed(
    of,
    weights=lambda sae: change(sae, threshold),
    moments=lambda moment: change(moment, 0),
    average=lambda average: change(average, corrected * threshold),
    clock=lambda clock_l: clock_l,
  )


def _check_preacts(sae, kind):
  if sae.activation.name not in OF_PREACTS:
    raise ValueError(
      f'the latents of a {sae.activation.name!r} SAE are no pre-activations, so it cannot become {kind}; choose one of '
      f'{", ".join(OF_PREACTS)}'
    )


@jax.jit
def _preacts(sae, acts_bd):
  return sharding.constrain(sae.preacts(sae.normalize(acts_bd)[0]), 'batch latent')


def _largest(sae, acts_bd, n):
  """Returns the n largest pre-activations of a sample, or all, descending, and how many of all are positive.

  They are on the host, so that no more of the others are in memory than those of CHUNK tokens.
  """
  largest, n_positive = np.empty(0, np.float32), 0
  for start in range(0, len(acts_bd), CHUNK):
    preacts = np.asarray(_preacts(sae, acts_bd[start : start + CHUNK])).ravel()
    n_positive += np.count_nonzero(preacts > 0)
    if len(largest) == n:
      preacts = preacts[preacts > largest.min()]
    largest = np.concatenate([largest, preacts])
    if len(largest) > n:
      largest = np.partition(largest, -n)[-n:].copy()
  return np.sort(largest)[::-1], n_positive


def _threshold(sae, acts_bd, l0):
  if not 0 < l0 <= sae.n_latents:
    raise ValueError(f'no threshold gives an L0 of {l0:g}; choose one above 0, up to n_latents {sae.n_latents}')
  n_kept = round(l0 * len(acts_bd))
  largest, n_positive = _largest(sae, acts_bd, n_kept + 1)
  if not 1 <= n_kept <= n_positive:
    raise ValueError(
      f'no threshold gives an L0 of {l0:g}: the sample of {len(acts_bd)} tokens has '
      f'{n_positive / len(acts_bd):.1f} positive pre-activations a token; choose an L0 below that, of '
      f'{1 / len(acts_bd):g} or above'
    )
  # Just below the last that is kept, and halfway to the next, if there is one: no pre-activation that is computed with
  # other roundings falls on the other side.
  return max(np.nextafter(largest[n_kept - 1 :], np.float32(-np.inf)).mean(), np.float32(0))


def restart(state: TrainState, ema: float = 0) -> TrainState:
  """Returns a state as the first of another training: at step 0, with the learning rate and the average begun anew.

  Weights, Adam's moments (and the count that corrects them), dead clocks and mse_scale stay.

  Args:
    state: with as many latents as its SAE.
    ema: decay of the new training's average, 0 for none.
  """
  is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
  anew = lambda x: jax.tree.map(jnp.zeros_like, x) if is_schedule(x) else x
  return state._replace(
    opt=jax.tree.map(anew, state.opt, is_leaf=is_schedule),
    ema=jax.tree.map(jnp.zeros_like, state.sae) if ema else None,
    step=jnp.zeros_like(state.step),
    threshold=jnp.zeros_like(state.threshold),
  )
