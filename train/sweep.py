"""config.sae.sweep -> the settings of every SAE that is trained on one stream, and the config of one of them.

A sweep is a tuple of overrides of config.sae, a dict for each SAE: ({'n_latents': 4096}, {'recipe': 'relu', 'l1_coef':
4.0}, {'site': 'h.3.resid.post_mlp'}). An override's 'name' is the SAE's; by default it is what is overridden. With
config.sae_name, later stages see a config of that SAE alone, and take workdir/sweep/<name> as their --workdir.
"""

import difflib
import pathlib

import ml_collections

from train import recipes

# What all SAEs of a stream share, beside the seed; an SAE trained alone with these is the same, bit by bit
# (up to rounding if others have other `micro_batches`).
STREAM = ('source', 'tokens', 'batch_size', 'buffer_examples', 'steps_per_dispatch', 'checkpoint_every', 'log_every')
SHARED = (*STREAM, 'checkpoints', 'spike_factor', 'log_to', 'sweep')


def members(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """Returns {name: settings}, as config.sae would have them for one SAE; without a sweep, one whose name is ''.

  An override of the recipe drops the fields that belong to the other recipe.

  Raises:
    ValueError: two have one name, an override is of a field that all share, or of none.
  """
  base = config.sae.copy_and_resolve_references()
  overrides = base.get('sweep', ())
  if 'sweep' in base:
    with base.unlocked():
      del base['sweep']
  if not overrides:
    return {'': base}
  found = {}
  for override in overrides:
    override = dict(override)
    name = override.pop('name', None) or ','.join(f'{key}={value}' for key, value in override.items()) or 'base'
    name = str(name).replace('/', '-')
    if name in ('.', '..'):
      raise ValueError(f'sae.sweep has the name {name!r}, which is no folder of its own; choose another')
    if name in found:
      raise ValueError(f'sae.sweep has {name!r} twice; give each SAE a name of its own, or leave one out')
    found[name] = _overridden(base, override)
  return found


def _overridden(base, override):
  known = {*base, *recipes.SHARED, *recipes.OWN, 'target_site'}
  for field in override:
    if field in SHARED:
      raise ValueError(
        f'sae.sweep overrides {field}, which all SAEs of a stream share; set sae.{field}, or train that SAE in another '
        '--workdir'
      )
    if field not in known:
      near = difflib.get_close_matches(field, known, 3, 0)
      raise ValueError(f'sae.sweep overrides {field!r}, which is no field of sae; the nearest are {", ".join(near)}')
  settings = base.copy_and_resolve_references()
  with settings.unlocked():
    if override.get('recipe', settings.recipe) in recipes.RECIPES:
      own = recipes.RECIPES[override.get('recipe', settings.recipe)].fields
      for field in (recipes.OWN - set(own)) & set(settings) if 'recipe' in override else ():
        del settings[field]
    for field, value in override.items():
      settings[field] = value
  return settings


def folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the workdir of an SAE: of one that is trained alone, the workdir itself."""
  return workdir / 'sweep' / name if name else workdir


def chosen(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config of the SAE that config.sae_name names, as if it were trained alone; without a name, the config.

  Raises:
    ValueError: the sweep has none of that name, or the workdir is that of the whole sweep.
  """
  name = config.get('sae_name', '')
  if not name:
    return config
  found = members(config)
  if name not in found:
    raise ValueError(f'sae_name {name!r} is not in sae.sweep; choose one of {", ".join(found) or "no sweep"}')
  if (place := folder(workdir, name)).exists():
    raise ValueError(f'{workdir} is of the whole sweep; for sae_name {name!r} give --workdir={place}')
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.sae, config.sae_name = found[name], ''
  return config
