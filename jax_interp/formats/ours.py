"""Our own folders (`models.sae.save`), as a format beside the others'."""

import pathlib

import numpy as np

from jax_interp.formats import files, plain
from models import activation_functions
from models import sae as sae_lib

_WEIGHTS, _CONFIG = 'sae.safetensors', 'config.json'
_SCALES = ('input_scale', 'output_scale')
_SETTINGS = {'activation', 'normalization', *_SCALES}  # and k of topk
_DIMS = {'pre_bias': 'd', 'out_bias': 'o', 'encoder': 'ld', 'skip': 'od'}  # the others' are 'l'
_TRANSCODER = ('out_bias', 'skip')


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a folder of ours."""
  return all((pathlib.Path(path) / name).is_file() for name in (_WEIGHTS, _CONFIG))


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes.

  Raises:
    FileNotFoundError: there is no SAE in the folder.
    ValueError: a file is damaged, or they are no SAE.
  """
  config_path, weights_path = (pathlib.Path(path) / name for name in (_CONFIG, _WEIGHTS))
  config = files.read_json(config_path)
  kind = files.field(config_path, config, 'activation', str, 'topk')
  if kind not in activation_functions.BY_NAME:
    known = ', '.join(activation_functions.BY_NAME)
    raise ValueError(f'{config_path}: its activation is {files.shown(kind)}; supported: {known}')
  if unknown := config.keys() - (_SETTINGS | {'k'} if kind == 'topk' else _SETTINGS):
    raise ValueError(f'{config_path}: a {kind} SAE has no settings {files.shown(sorted(unknown))}; leave them out')
  found = files.read_safetensors(weights_path)
  needed = (*sae_lib.PARAMETERS, *activation_functions.BY_NAME[kind].parameters)
  dims = {name: _DIMS.get(name, 'l') for name in (*needed, *(name for name in _TRANSCODER if name in found))}
  arrays = files.checked(weights_path, found, dims | {'decoder': 'lo' if 'out_bias' in found else 'ld'})
  settings = {'activation': kind, 'normalization': files.field(config_path, config, 'normalization', str, 'none')}
  if kind == 'topk':
    settings['k'] = files.active(config_path, config, len(arrays['encoder']))
  settings |= {name: files.scale(config_path, config, name) for name in _SCALES if name in config}
  with files.reading(path, 'cannot be built', f'look at its {_CONFIG}'):  # such as a skip without an out_bias
    return arrays, sae_lib.settings_of(sae_lib.build(arrays, settings))


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes a folder.

  Raises:
    FileExistsError: there is something at the path.
  """
  if pathlib.Path(path).exists():
    raise FileExistsError(f'{path} is there already; choose another path, or delete it first')
  sae_lib.save(path, sae)


def outputs(path: str | pathlib.Path, x_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d_out] of raw x_bd as `SparseAutoencoder`, in float64.

  Raises:
    As `read`.
  """
  arrays, settings = read(path)
  activation, normalization = settings['activation'], settings['normalization']
  normed_bd, mean, scale = _normalized(x_bd.astype(np.float64), normalization, settings.get('input_scale', 1.0))
  centred_bd = normed_bd - arrays['pre_bias']
  linear_bl, bias_l = plain.products(centred_bd, arrays['encoder']), arrays['latent_bias']
  z_bl = linear_bl + bias_l
  if activation == 'topk':
    latents_bl = plain.topk(z_bl, settings['k'])
  elif activation == 'relu':
    latents_bl = np.maximum(z_bl, 0)
  elif activation == 'jumprelu':
    latents_bl = plain.jumprelu(z_bl, arrays['threshold'])
  elif activation == 'prolu':
    latents_bl = linear_bl * ((linear_bl > 0) & (z_bl > 0))
  elif activation == 'gated':
    scale_l = np.exp(arrays['r_mag'].astype(np.float64))
    latents_bl = np.maximum(scale_l * linear_bl + arrays['mag_bias'], 0) * (z_bl > 0)
  else:
    raise ValueError(f'{path}: no formula is known of the activation {activation!r}; add it here')
  if 'out_bias' not in arrays:
    return latents_bl, (plain.products(latents_bl, arrays['decoder'].T) + arrays['pre_bias']) * scale + mean
  recons_bd = plain.products(latents_bl, arrays['decoder'].T) + arrays['out_bias']
  if 'skip' in arrays:
    recons_bd = recons_bd + plain.products(centred_bd, arrays['skip'])
  return latents_bl, recons_bd / settings.get('output_scale', 1.0)


def _normalized(x_bd, normalization, input_scale):
  if normalization in ('none', 'constant'):
    scale = input_scale if normalization == 'constant' else 1.0
    return x_bd * scale, 0.0, 1 / scale
  mean_b = x_bd.mean(1, keepdims=True)
  norm_b = np.linalg.norm(x_bd - mean_b, axis=1, keepdims=True)
  scale_b = sae_lib.NORM_EPS + (norm_b if normalization == 'unit_norm' else norm_b / (x_bd.shape[1] - 1) ** 0.5)
  return (x_bd - mean_b) / scale_b, mean_b, scale_b
