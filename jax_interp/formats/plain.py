"""An SAE as host arrays, put into the conventions of other formats, and the formulas that formats share, in float64."""

from collections.abc import Mapping

import jax
import numpy as np

from models import sae as sae_lib

Arrays = Mapping[str, np.ndarray]
_ELEMENTS_AT_ONCE = 2**24  # of a matrix in float64, 128 MB: weights are not held in float64 as a whole


def of(sae: sae_lib.SparseAutoencoder) -> tuple[dict[str, np.ndarray], dict]:
  """Returns the parameters as float32 host arrays and the settings, with constant scales folded into the parameters.

  The latents stay the same, for s the input's and o the output's scale (s too, of an SAE): encoder s, pre_bias / s,
  decoder / o, out_bias / o and skip s / o with raw inputs are what encoder, ... are with scaled ones.
  """
  arrays = {
    name: np.asarray(jax.device_get(param[...]), np.float32) for name, param in sae_lib.named_parameters(sae).items()
  }
  settings = sae_lib.settings_of(sae)
  into, out = settings.pop('input_scale', 1.0), settings.pop('output_scale', 1.0)
  if settings['normalization'] == 'constant':
    settings['normalization'] = 'none'
  else:
    into = 1.0
  out = out if 'out_bias' in arrays else into
  factors = {'encoder': into, 'pre_bias': 1 / into, 'decoder': 1 / out, 'out_bias': 1 / out, 'skip': into / out}
  scaled = {
    name: array if (factor := factors.get(name, 1)) == 1 else times(array, factor) for name, array in arrays.items()
  }
  return scaled, settings


def times(array: np.ndarray, factor) -> np.ndarray:
  """Returns the product, rounded once to float32."""
  return np.multiply(array, factor, dtype=np.float64).astype(np.float32)


def describe(arrays: Arrays, settings: Mapping) -> str:
  """Returns what an SAE is, in words, for errors."""
  kind = 'SAE' if 'out_bias' not in arrays else 'transcoder with a skip' if 'skip' in arrays else 'transcoder'
  return f'a {settings["activation"]} {kind} of normalization {settings["normalization"]!r}'


def as_jumprelu(arrays: Arrays, settings: Mapping) -> tuple[dict[str, np.ndarray], dict]:
  """Returns the JumpReLU SAE that computes the same; of TopK there is none, so it comes back as it is.

  relu(z) is above the threshold 0. linear where linear > 0 and linear + b > 0 (ProLU) is linear above max(0, -b). A
  gated latent is z = exp(r_mag) linear + mag_bias where linear + b > 0, which is where z > mag_bias - exp(r_mag) b.
  """
  arrays, activation = dict(arrays), settings['activation']
  bias_l = arrays['latent_bias']
  if activation == 'relu':
    arrays['threshold'] = np.zeros_like(bias_l)
  elif activation == 'prolu':
    arrays |= {'threshold': np.maximum(-bias_l, 0), 'latent_bias': np.zeros_like(bias_l)}
  elif activation == 'gated':
    scale_l, mag_bias_l = np.exp(arrays.pop('r_mag').astype(np.float64)), arrays.pop('mag_bias')
    arrays['encoder'] = times(arrays['encoder'], scale_l[:, None])
    arrays |= {'latent_bias': mag_bias_l, 'threshold': (mag_bias_l - scale_l * bias_l).astype(np.float32)}
  else:
    return arrays, dict(settings)
  return arrays, {**settings, 'activation': 'jumprelu'}


def bias_without_subtraction(arrays: Arrays) -> np.ndarray:
  """Returns the latent bias [l] that goes with encoder x in place of encoder (x - pre_bias), folded in float64."""
  return (arrays['latent_bias'] - products(arrays['pre_bias'], arrays['encoder'])).astype(np.float32)


def bias_with_subtraction(bias_l: np.ndarray, encoder_ld: np.ndarray, pre_bias_d: np.ndarray, scale=1.0) -> np.ndarray:
  """Returns the bias [l] with encoder (x - pre_bias) in place of encoder x, folded in float64.

  Args:
    bias_l: of encoder x, where the encoder's products are taken times `scale`.
    encoder_ld: the encoder.
    pre_bias_d: what is to be subtracted.
    scale: a number or [l].
  """
  return (bias_l + scale * products(pre_bias_d, encoder_ld)).astype(np.float32)


def out_bias_without_subtraction(arrays: Arrays) -> np.ndarray:
  """Returns the out_bias [d_out] of the same transcoder with skip x in place of skip (x - pre_bias)."""
  if 'skip' not in arrays:
    return arrays['out_bias']
  return (arrays['out_bias'] - products(arrays['pre_bias'], arrays['skip'])).astype(np.float32)


# Formulas in float64, from float32 parameters.


def products(x: np.ndarray, w: np.ndarray) -> np.ndarray:
  """Returns x w^T in float64: [..., rows] of x [..., columns] and w [rows, columns]."""
  x, n = x.astype(np.float64), max(1, _ELEMENTS_AT_ONCE // w.shape[1])
  return np.concatenate([x @ w[start : start + n].astype(np.float64).T for start in range(0, len(w), n)], axis=-1)


def topk(z_bl: np.ndarray, k: int) -> np.ndarray:
  """Returns relu of the k largest of each row, ties by lowest index, and 0 elsewhere."""
  indices_bk = np.argsort(-z_bl, axis=1, kind='stable')[:, :k]
  out_bl = np.zeros_like(z_bl)
  np.put_along_axis(out_bl, indices_bk, np.maximum(np.take_along_axis(z_bl, indices_bk, 1), 0), 1)
  return out_bl


def jumprelu(z_bl: np.ndarray, threshold) -> np.ndarray:
  """Returns relu(z) where z is above the threshold, a number or [l], and 0 elsewhere."""
  return np.where(z_bl > threshold, np.maximum(z_bl, 0), 0)
