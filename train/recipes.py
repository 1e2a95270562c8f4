"""config.sae -> what training needs of it: the recipe, the optimizer, a fresh SAE, and what is kept of a trained one.

Every recipe has its own fields besides those that all share. A field of another recipe is refused: that l1_coef means
nothing to TopK should be said, not ignored.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_interp.sae import (
  batch_topk,
  gated,
  jumprelu,
  kernels,
  losses,
  micro_batches,
  optimizer,
  prolu,
  relu_l1,
  resample,
  train_step,
)
from models import activation_functions, sae, topk

MULTI_TOPK_RATIO, MULTI_TOPK_WEIGHT = 4, 1 / 8  # L(k) + L(4k) / 8 (Gao et al. 2024)
EXPECTED_AVERAGE = 'expected_average'
NORMALIZATIONS = ('none', 'layer_norm_std', 'unit_norm', EXPECTED_AVERAGE)
REQUIRED = object()
NOT_NEGATIVE = {
  'learning_rate', 'warmup_steps', 'adam_eps', 'clip', 'dead_tokens', 'auxk', 'auxk_coef', 'l1_coef', 'l1_warmup_steps',
  'resample_every', 'resample_until', 'resample_exponent', 'coef', 'coef_warmup_steps', 'initial_threshold',
}  # fmt: skip
AUTO = 'auto'  # of UNTIL_MEASURED: train.sae replaces it by what is fastest on the machine
UNTIL_MEASURED = {'kernels': 'sparse', 'compute_dtype': 'float32'}
CALIBRATION_TOKENS = 4096
# Fields that any recipe may have, with what they are when left out. The rest of config.sae is train.sae's own.
SHARED = {
  'n_latents': REQUIRED,
  'normalization': 'none',
  'learning_rate': REQUIRED,  # or 0: 2e-4 / sqrt(n_latents / 2^14)
  'warmup_steps': 0,
  'decay': 'constant',
  'decay_fraction': 0.2,  # of all steps, the last ones
  'adam_eps': 6.25e-10,
  'adam_b1': 0.9,
  'adam_b2': 0.999,
  'clip': 0.0,
  'ema': 0.0,
  'dead_tokens': 10_000_000,
  'skip': False,  # of a transcoder
  'micro_batches': 1,  # parts of a batch whose gradients are summed, for memory
}
AUXK = {'auxk': 0, 'auxk_coef': 1 / 32}
TOPK = {'k': REQUIRED, **AUXK, 'compute_dtype': AUTO, 'kernels': AUTO, 'parity': False}
DENSE = {'compute_dtype': 'float32'}
RESAMPLE = {'resample_every': 0, 'resample_until': 0, 'resample_exponent': 2.0}  # in steps; 0: never


def _topk(s):
  return losses.TopK(((s['k'], 1.0),), **_of_topk(s))


def _multi_topk(s):
  return losses.TopK(((s['k'], 1.0), (most_chosen(s), MULTI_TOPK_WEIGHT)), **_of_topk(s))


def most_chosen(s: Mapping) -> int:
  """Returns how many latents of a token are chosen, of a TopK recipe's settings: its k, or 4k of Multi-TopK."""
  return min(MULTI_TOPK_RATIO * s['k'], s['n_latents']) if s['recipe'] == 'multi_topk' else s['k']


def until_measured(s: Mapping) -> dict:
  """Returns settings with what 'auto' stands for where nothing is measured."""
  return {field: UNTIL_MEASURED[field] if x == AUTO else x for field, x in s.items()}


def _of_topk(s):
  s = until_measured(s)
  return {
    'auxk': s['auxk'],
    'auxk_coef': s['auxk_coef'],
    'dead_tokens': s['dead_tokens'],
    'dtype': s['compute_dtype'],
    'kernels': s['kernels'],
    'parity': s['parity'],
  }


def _batch_topk(s):
  return batch_topk.BatchTopK(
    s['k'], s['auxk'], s['auxk_coef'], s['dead_tokens'], tuple(s.get('prefixes', ())), s['compute_dtype']
  )


def _relu(s):
  return relu_l1.ReLUL1(s['l1_coef'], False, s['l1_warmup_steps'], s['dead_tokens'], s['compute_dtype'])


def _relu_april(s):
  return relu_l1.ReLUL1(s['l1_coef'], True, s['l1_warmup_steps'], s['dead_tokens'], s['compute_dtype'])


def _jumprelu(s):
  return jumprelu.JumpReLU(
    s['coef'],
    s['sparsity'],
    s['bandwidth'],
    s['coef_warmup_steps'],
    s['target_l0'],
    dead_tokens=s['dead_tokens'],
    dtype=s['compute_dtype'],
  )


def _zeros(s):
  return jnp.zeros(s['n_latents'])


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A recipe's own fields with their defaults; how it and a fresh SAE are made of them."""

  fields: Mapping[str, Any]
  recipe: Callable[[Mapping], train_step.Recipe]
  init: Callable[[jax.Array, np.ndarray, Mapping, str, float], sae.SparseAutoencoder]


def _init_topk(key, sample_bd, s, normalization, scale):
  return sae.init_sae(key, sample_bd, s['n_latents'], s['k'], normalization, scale)


def _init_tied(activation, **options):
  return lambda key, sample_bd, s, *norm: sae.init_tied(key, sample_bd, s['n_latents'], activation(s), *norm, **options)


def _init_jumprelu(key, sample_bd, s, *norm):
  # As ReLU first: the unit vectors by which an encoder is scaled may all be below the threshold.
  fresh = sae.init_tied(key, sample_bd, s['n_latents'], activation_functions.ReLU(), *norm)
  threshold_l = jnp.full_like(fresh.latent_bias[...], s['initial_threshold'])
  return sae.with_activation(fresh, activation_functions.JumpReLU(threshold_l))


RECIPES = {
  'topk': _Kind(TOPK, _topk, _init_topk),
  'multi_topk': _Kind(TOPK, _multi_topk, _init_topk),
  'batch_topk': _Kind({'k': REQUIRED, **AUXK, **DENSE}, _batch_topk, _init_topk),
  'matryoshka': _Kind({'k': REQUIRED, **AUXK, **DENSE, 'prefixes': REQUIRED}, _batch_topk, _init_topk),
  'relu': _Kind(
    {'l1_coef': REQUIRED, 'l1_warmup_steps': 0, **RESAMPLE, **DENSE},
    _relu,
    _init_tied(lambda s: activation_functions.ReLU()),
  ),
  'relu_april': _Kind(
    {'l1_coef': REQUIRED, 'l1_warmup_steps': 0, **DENSE},
    _relu_april,
    _init_tied(lambda s: activation_functions.ReLU(), row_norm=0.1, median=False),
  ),
  'prolu': _Kind(
    {'l1_coef': REQUIRED, 'gradient': 'ste', **DENSE},
    lambda s: prolu.ProLU(s['l1_coef'], s['gradient'], s['dead_tokens'], s['compute_dtype']),
    _init_tied(lambda s: activation_functions.ProLU()),
  ),
  'gated': _Kind(
    {'l1_coef': REQUIRED, **RESAMPLE, **DENSE},
    lambda s: gated.Gated(s['l1_coef'], s['dead_tokens'], s['compute_dtype']),
    _init_tied(lambda s: activation_functions.Gated(_zeros(s), _zeros(s))),
  ),
  'jumprelu': _Kind(
    {
      'coef': REQUIRED,
      'sparsity': 'l0',
      'bandwidth': 1e-3,
      'coef_warmup_steps': 0,
      'target_l0': 0.0,
      'initial_threshold': 1e-3,
      'threshold_rate': 1.0,
      **DENSE,
    },
    _jumprelu,
    _init_jumprelu,
  ),
}
OWN = {name for kind in RECIPES.values() for name in kind.fields}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How one SAE is trained.

  Attributes:
    recipe: static to `train_step.train_steps`, as tx and ema are.
    tx: the optimizer.
    ema: decay of the average of the weights, 0 for none.
    settings: all fields, with their defaults.
  """

  recipe: train_step.Recipe
  tx: optax.GradientTransformation
  ema: float
  settings: Mapping[str, Any]

  @property
  def calibrates(self) -> bool:
    """Whether `finish` wants activations."""
    return self.settings['recipe'] in ('batch_topk', 'matryoshka')

  def init(self, key, sample_bd: np.ndarray, target_sample_bd: np.ndarray | None = None) -> sae.SparseAutoencoder:
    """Returns a fresh SAE on the ambient mesh, a transcoder where there are targets.

    Raises:
      ValueError: sizes or normalisations do not fit; see `models.sae.SparseAutoencoder`.
    """
    s = self.settings
    normalization, scale = s['normalization'], 1.0
    if normalization == EXPECTED_AVERAGE:
      normalization, scale = 'constant', sae.expected_average_scale(sample_bd)
    fresh = RECIPES[s['recipe']].init(key, sample_bd, s, normalization, scale)
    if target_sample_bd is None:
      return fresh
    return sae.as_transcoder(jax.random.fold_in(key, 1), fresh, target_sample_bd, s['skip'])

  def between(self, state: train_step.TrainState, before: int, acts_sbd: jax.Array, key) -> train_step.TrainState:
    """Returns the state with dead latents resampled, where a step from `before` on to the state's was one for that.

    Args:
      state: donated.
      before: steps made before the last call of `train_steps`.
      acts_sbd: the activations of that call.
      key: folded with the step, so that a resumed run draws the same.
    """
    every, until = self.settings.get('resample_every', 0), self.settings.get('resample_until', 0)
    step = int(state.step)
    if not every or before // every == step // every or (until and step // every * every > until):
      return state
    acts_bd = acts_sbd.swapaxes(0, 1).reshape(-1, acts_sbd.shape[-1])  # each device keeps its rows
    changed = resample.resample(
      state.sae,
      state.opt,
      state.tokens_since_fired_l,
      acts_bd,
      jax.random.fold_in(key, step),
      self.settings['dead_tokens'],
      self.settings['resample_exponent'],
    )
    return state._replace(sae=changed[0], opt=changed[1], tokens_since_fired_l=changed[2])

  def finish(self, state: train_step.TrainState, acts_bd: jax.Array | None = None) -> sae.SparseAutoencoder:
    """Returns the SAE to keep: averaged where that was asked for, and with a threshold after BatchTopK.

    The threshold keeps k latents a token of the first CALIBRATION_TOKENS of acts_bd, raw activations; without any it is
    the one that training has averaged, which lags behind the weights.
    """
    kept = train_step.trained_sae(state, self.ema, self.recipe.unit_norm)
    if not self.calibrates:
      return kept
    threshold = state.threshold
    if acts_bd is not None:
      preacts_bl = kept.preacts(kept.normalize(jnp.asarray(acts_bd[:CALIBRATION_TOKENS]))[0])
      # Below 0 there are fewer than k positive pre-activations a token, and all of them are kept.
      threshold = jnp.maximum(topk.threshold_for(preacts_bl, self.settings['k'] * len(preacts_bl)), 0)
    return batch_topk.with_threshold(kept, threshold)


def plan(settings: Mapping[str, Any], n_steps: int, target: bool = False) -> Plan:
  """Returns how to train the SAE of these settings, config.sae or a part of a sweep.

  Args:
    settings: the fields; those that are train.sae's own (site, batch_size, ...) are not looked at.
    n_steps: of the whole training.
    target: whether it is a transcoder.

  Raises:
    ValueError: the recipe is unknown, a field of it is missing, belongs to another recipe, or means nothing with
      another.
  """
  name = settings['recipe']
  if name not in RECIPES:
    raise ValueError(f'sae.recipe {name!r} is unknown; choose one of {", ".join(RECIPES)}')
  own = RECIPES[name].fields
  for field in sorted(OWN & set(settings)):
    if field not in own:
      readers = ', '.join(recipe for recipe, kind in RECIPES.items() if field in kind.fields)
      raise ValueError(
        f'sae.{field} means nothing to the recipe {name!r}; leave it out (configs/recipes.py:{name} has what belongs '
        f'to it), or choose one of {readers}'
      )
  known = SHARED | own
  s = {'recipe': name} | {field: settings.get(field, default) for field, default in known.items()}
  if missing := [field for field, value in s.items() if value is REQUIRED]:
    raise ValueError(f'sae.{missing[0]} is missing, which the recipe {name!r} needs; configs/recipes.py:{name} has it')
  _check(s, target, settings.get('batch_size', 0))
  rate = s['learning_rate'] or optimizer.scaled_rate(s['n_latents'])
  # Where nothing is trained no rate falls, and no step would do for it.
  decay = 'constant' if not n_steps and s['decay'] in optimizer.DECAYS else s['decay']
  decay_steps = 0 if decay == 'constant' else math.ceil(s['decay_fraction'] * n_steps)
  tx = optimizer.adam(
    rate,
    s['warmup_steps'],
    s['adam_eps'],
    s['clip'],
    s['adam_b1'],
    s['adam_b2'],
    decay,
    decay_steps,
    n_steps if decay_steps else 0,
    s.get('threshold_rate', 1),
  )
  recipe = RECIPES[name].recipe(s)
  if s['micro_batches'] > 1:
    recipe = micro_batches.MicroBatched(recipe, s['micro_batches'])
  return Plan(recipe, tx, s['ema'], s)


def _check(s, target, batch_size):
  choices = {
    'normalization': NORMALIZATIONS,
    'compute_dtype': (*([AUTO] if 'kernels' in s else []), *kernels.DTYPES),
    'kernels': (AUTO, *kernels.KERNELS),
  }
  for field, known in choices.items():
    if field in s and s[field] not in known:
      raise ValueError(f'sae.{field} {s[field]!r} is unknown; choose one of {", ".join(known)}')
  sae.check_settings(s['n_latents'], s.get('k'), 'none')
  for field in ('ema', 'adam_b1', 'adam_b2'):
    if not 0 <= s[field] < 1:
      raise ValueError(f'sae.{field} {s[field]} is no average; choose a number from 0 on, below 1')
  for field in NOT_NEGATIVE & set(s):
    if not s[field] >= 0:  # nor is NaN
      raise ValueError(f'sae.{field} {s[field]} is not 0 or above; choose a number that is')
  if s.get('parity') and (s['recipe'] != 'topk' or target):
    raise ValueError(
      'sae.parity is of the recipe topk and no transcoder, as the trainer it compares with; set it to False'
    )
  if not s.get('threshold_rate', 1) > 0:
    raise ValueError(f'sae.threshold_rate {s["threshold_rate"]} is not above 0; 1 is the rate of the weights')
  if not s.get('bandwidth', 1) > 0:
    raise ValueError(f'sae.bandwidth {s["bandwidth"]} is not above 0; thresholds would have no gradient')
  if 'prefixes' in s:
    batch_topk.check_prefixes(tuple(s['prefixes']), s['n_latents'])
  if s['micro_batches'] < 1 or batch_size % s['micro_batches']:
    raise ValueError(f'sae.micro_batches {s["micro_batches"]} does not divide sae.batch_size {batch_size}')
  if s['skip'] and not target:
    raise ValueError('sae.skip is of a transcoder, past its latents; set sae.target_site too, or leave it out')
  if target and s['normalization'] in ('layer_norm_std', 'unit_norm'):
    raise ValueError(
      f'sae.normalization {s["normalization"]!r} cannot be undone on the target of a transcoder; choose none or '
      f'{EXPECTED_AVERAGE}'
    )
  if target and s.get('resample_every'):
    raise ValueError('sae.resample_every sets decoder rows to inputs, which a transcoder does not write; set it to 0')
  if s.get('resample_every') and s['ema']:
    raise ValueError('sae.ema would average weights from before and after a resampling; set one of the two to 0')
