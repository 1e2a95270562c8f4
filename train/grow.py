"""Makes of a trained SAE the one that config.sae describes: wider, smaller, of another k, or JumpReLU instead of TopK.

--start is the workdir that holds it, finished or stopped in its training, or an SAE's folder. What differs is changed
in this order: sae.k, if it is smaller; dead latents go, as far as --prune or a smaller sae.n_latents asks for it; new
ones come, until there are sae.n_latents; sae.k, if it is larger; a threshold for an L0 of sae.target_l0 or, without
that, of k. See `jax_interp.sae.growth`. What inputs, and a transcoder's targets, are multiplied by stays.

Leaves workdir/sae/checkpoints/0, from which train.sae trains on with the same config and --workdir, at step 0 of that
config; and workdir/sae/grown.json. With --config.sae.tokens=0 it leaves workdir/sae/final instead, for the stages
behind train.sae; of a BatchTopK SAE with its threshold. Of a training that was stopped, Adam's moments and the dead
clocks stay too. Until it has ended, workdir/sae/growing keeps train.sae from training there from the start.
"""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from jax_interp import store
from jax_interp.sae import growth, train_step
from models import sae as sae_lib
from train import command, processes, recipes
from train import sae as train_sae

_START = flags.DEFINE_string('start', None, 'Workdir or folder of the SAE that grows.')
_PRUNE = flags.DEFINE_bool('prune', False, 'Whether all dead latents go, also where new ones then take their places.')

REPORT = 'grown.json'
SHARED = ('lm', 'activations', 'text')  # what of a workdir the new one has in common with it


def _plan(settings) -> recipes.Plan:
  return recipes.plan(
    settings, math.ceil(settings['tokens'] / settings['batch_size']), bool(settings.get('target_site'))
  )


def _stopped(folder: pathlib.Path, key, samples) -> train_step.TrainState:
  """Returns the last state of the training in the folder, which is of one SAE."""
  settings = json.loads((folder / 'config.json').read_text('utf-8'))['sae']
  if settings.get('sweep'):
    raise ValueError(
      f'{folder} is of a sweep that is not finished; end it, and give --start={folder.parent}/sweep/NAME'
    )
  plan = _plan(settings)
  fresh = plan.init(key, *samples)
  if (folder / train_sae.SCALES).exists():  # the samples may be others than those that it began with
    fresh.input_scale, fresh.output_scale = json.loads((folder / train_sae.SCALES).read_text('utf-8'))['']
  state = train_step.init_state(fresh, samples[0], plan.tx, plan.ema, *samples[1:])
  with processes.locked(folder), store.Checkpoints(folder / 'checkpoints', scored=True) as checkpoints:
    return checkpoints.restore({'': state})['']._replace(ema=None)  # the training to come begins its own


def _read(start: pathlib.Path, key, samples) -> sae_lib.SparseAutoencoder | train_step.TrainState:
  """Returns what is to grow: an SAE, or the state of a training that is not finished."""
  for folder in (start, start / 'sae' / 'final'):
    if (folder / 'sae.safetensors').exists():
      return sae_lib.load_sae(folder)
  if not (start / 'sae' / 'checkpoints').exists():
    raise FileNotFoundError(
      f'{start} holds neither sae/final nor sae/checkpoints, nor is it the folder of an SAE; give another --start'
    )
  return _stopped(start / 'sae', key, samples)


def grown(
  of: sae_lib.SparseAutoencoder | train_step.TrainState, plan: recipes.Plan, prune: bool, key, samples
) -> sae_lib.SparseAutoencoder | train_step.TrainState:
  """Returns an SAE, or the state of a training, changed to what the plan trains.

  Args:
    of: the SAE or state. An SAE's dead latents are those that are never on in the sample, a state's have a clock beyond
      the plan's dead_tokens.
    plan: of the training to come.
    prune: whether all dead latents go; else only as many as the plan has fewer.
    key: of the new latents' draws.
    samples: raw activations [b, d], and targets of a transcoder.

  Raises:
    ValueError: latents that are not dead would have to go, or the plan is of another kind of SAE.
  """
  settings, wanted = plan.settings, plan.init(key, *samples)
  n_latents, before = settings['n_latents'], growth.sae_of(of)
  _check(before, wanted, plan)
  if before.k and (most := wanted.k or n_latents) < before.k:  # first, as there may be fewer latents than the old k
    of = growth.change_k(of, most)
  if prune or n_latents < before.n_latents:
    if isinstance(of, sae_lib.SparseAutoencoder):
      idle_l, limit = -growth.fit(before, *samples).fired_l, -1
    else:
      idle_l, limit = jax.device_get(of.tokens_since_fired_l), settings['dead_tokens']
    of = growth.prune(of, idle_l, limit, 1 if prune else n_latents)
    if (n_kept := growth.sae_of(of).n_latents) > n_latents:
      raise ValueError(f'sae.n_latents {n_latents} is less than the {n_kept} latents to keep; choose as many or more')
  if n_latents > growth.sae_of(of).n_latents:
    of = growth.widen(of, samples[0], n_latents, key, targets_bd=samples[1] if len(samples) > 1 else None)
  if wanted.k is not None and wanted.k != growth.sae_of(of).k:
    of = growth.change_k(of, wanted.k)
  if wanted.activation.name == 'jumprelu' and before.activation.name != 'jumprelu':
    if not (l0 := settings['target_l0'] or before.k):
      raise ValueError('sae.target_l0 is 0, and the SAE has no k to take its place; give the L0 wanted')
    of = growth.to_jumprelu(of, samples[0], l0)
  return of


def _check(before, wanted, plan):
  """Raises where the SAE is of another kind than the plan's in a way that growing does not change."""
  own, asked = before.activation.name, wanted.activation.name
  if own != asked and not (asked in ('topk', 'jumprelu') and own in growth.OF_PREACTS):
    raise ValueError(f'a {own!r} SAE cannot become the {asked!r} one of sae.recipe {plan.settings["recipe"]!r}')
  for name in ('normalization', 'is_transcoder'):
    if (ours := getattr(before, name)) != (theirs := getattr(wanted, name)):
      raise ValueError(f'{name} of the SAE is {ours!r}, and of config.sae {theirs!r}; give a config that says the same')
  widths = [(x.encoder.shape[1], x.decoder.shape[1]) for x in (before, wanted)]
  if widths[0] != widths[1]:
    raise ValueError(
      f'the SAE is of widths {widths[0]}, and sae.site of {widths[1]}; choose the site it was trained on'
    )
  if plan.recipe.unit_norm and not sae_lib.has_unit_rows(before):
    norms_l = jnp.linalg.norm(before.decoder[...], axis=1)
    raise ValueError(
      f'sae.recipe {plan.settings["recipe"]!r} keeps decoder rows at norm 1, and those of the SAE are from '
      f'{norms_l.min():.3g} to {norms_l.max():.3g}; choose a recipe that leaves them free'
    )


def _numbers(sae, samples) -> dict:
  found = growth.fit(sae, *samples)
  return {
    'activation': sae.activation.name,
    'n_latents': sae.n_latents,
    'k': sae.k,
    'l0': found.l0,
    'dead': int((found.fired_l == 0).sum()),
    'normalized_mse': found.normalized_mse,
  }


def _print(before, after, n_tokens):
  print(f'{f"on {n_tokens:,} tokens":16} {"before":>12} {"after":>12}')
  for name in before:
    row = [f'{x:.4f}' if isinstance(x, float) else str(x) for x in (before[name], after[name])]
    print(f'{name:16} {row[0]:>12} {row[1]:>12}')


def _share(start, workdir):
  """Links what the new workdir has in common with that of the SAE, so that nothing is captured twice."""
  for name in SHARED:
    if (start / name).exists() and not (workdir / name).exists():
      workdir.mkdir(parents=True, exist_ok=True)
      os.symlink(os.path.relpath(start / name, workdir), workdir / name)


def _has_checkpoints(folder) -> bool:
  if not (folder / 'checkpoints').exists():
    return False
  with store.Checkpoints(folder / 'checkpoints', scored=True) as checkpoints:
    return bool(checkpoints.steps())


def grow(config: ml_collections.ConfigDict, workdir: pathlib.Path, start: pathlib.Path, prune: bool = False):
  """Leaves in the workdir what the SAE, or the stopped training, at `start` becomes; returns when that is there.

  Raises:
    FileNotFoundError: there is nothing to start from, or there are no activations.
    ValueError: the workdir is the same one or has another training, config.sae is of a sweep, or another kind of SAE;
      and as `grown`.
  """
  if config.sae.get('sweep'):
    raise ValueError('sae.sweep is of several SAEs, and one grows; leave it out')
  if start.resolve() in (workdir.resolve(), workdir.resolve() / 'sae' / 'final'):
    raise ValueError(f'{workdir} is the workdir of the SAE itself; give another --workdir')
  settings, folder = config.sae, workdir / 'sae'
  marker = folder / command.GROWING
  plan = _plan(settings)
  _share(start, workdir)
  with processes.locked(folder):
    if command.claim(folder, train_sae.made_with(config, workdir)):
      marker.unlink(missing_ok=True)
      return
    if _has_checkpoints(folder):
      if not (folder / REPORT).exists():
        raise ValueError(f'{folder} is of a training that did not begin with a grown SAE; give another --workdir')
      marker.unlink(missing_ok=True)
      print(f'{folder} is grown already; run train.sae to train on')
      return
    command.write(marker, b'')
    sites = list(filter(None, (settings.site, settings.get('target_site'))))
    sample = train_sae.first_tokens(train_sae.streams(config, workdir, sites), settings)
    samples, key = [sample[site] for site in sites], jax.random.key(config.seed)
    of = _read(start, key, samples)
    before = _numbers(growth.sae_of(of), samples)
    of = grown(of, plan, prune, key, samples)
    if growth.sae_of(of) is of:
      of = train_step.init_state(of, samples[0], plan.tx, plan.ema, *samples[1:])
    of = growth.restart(of, plan.ema)
    kept = of.sae if settings.tokens else plan.finish(of, samples[0])
    after = _numbers(kept, samples)
    _print(before, after, len(samples[0]))
    store.write_json(folder / REPORT, {'start': str(start), 'before': before, 'after': after})
    if not settings.tokens:
      sae_lib.save(folder / 'final', kept)
      command.finish(folder)
      marker.unlink()
      print(f'{folder}/final is ready')
      return
    # A checkpoint has only arrays: train.sae takes the scales from there.
    store.write_json(folder / train_sae.SCALES, {'': [kept.input_scale, kept.output_scale]})
    with store.Checkpoints(folder / 'checkpoints', scored=True) as checkpoints:
      checkpoints.save(0, {'': of}, after['normalized_mse'])
    marker.unlink()
  print(f'{folder}/checkpoints/0 is ready; run train.sae with the same --config and --workdir to train on')


def run(config, workdir):
  """Grows the SAE at --start.

  Raises:
    ValueError: there is no --start; and as `grow`.
  """
  if not _START.value:
    raise ValueError('no SAE to grow; give its workdir or folder as --start')
  grow(config, workdir, pathlib.Path(_START.value), _PRUNE.value)


if __name__ == '__main__':
  command.main(run)
