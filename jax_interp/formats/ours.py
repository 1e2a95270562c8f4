"""Our own folders (`models.sae.save`), as a format beside the others'."""

import pathlib

import numpy as np

from jax_interp.formats import plain
from models import sae as sae_lib


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a folder of ours."""
  return all((pathlib.Path(path) / name).is_file() for name in ('sae.safetensors', 'config.json'))


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes.

  Raises:
    FileNotFoundError: there is no SAE in the folder.
    ValueError: a file is damaged.
  """
  sae = sae_lib.load_sae(path)
  arrays = {name: np.asarray(param[...]) for name, param in sae_lib.named_parameters(sae).items()}
  return arrays, sae_lib.settings_of(sae)


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
