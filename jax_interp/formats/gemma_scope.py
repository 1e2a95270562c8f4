"""The files of Gemma Scope (`params.npz`): JumpReLU SAEs and transcoders that do not subtract b_dec from inputs."""

import os
import pathlib

import numpy as np

from jax_interp.formats import files, plain
from models import sae as sae_lib

_UNPACKED = 100  # times the file's size are its arrays at most: weights hardly shrink, what is to fill memory by 1000
_DIMS = {'W_enc': 'dl', 'W_dec': 'lo', 'b_enc': 'l', 'b_dec': 'o', 'threshold': 'l'}


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is an .npz file with an encoder."""
  return 'W_enc.npy' in files.zip_entries(path)


def read(path: str | pathlib.Path, transcoder: bool = False) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes.

  Args:
    path: of params.npz.
    transcoder: whether it is one, which the file does not tell where its two sites are of one width. As an SAE, whose
      latent_bias is then b_enc + W_enc b_dec, it computes the same.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged or of another format.
  """
  tensors = _load(path)
  encoder_ld, b_dec = tensors['W_enc'].T, tensors['b_dec']
  arrays = {'encoder': encoder_ld, 'decoder': tensors['W_dec'], 'threshold': tensors['threshold']}
  if transcoder or encoder_ld.shape[1] != len(b_dec):
    zeros_d = np.zeros(encoder_ld.shape[1], np.float32)
    arrays |= {'pre_bias': zeros_d, 'latent_bias': tensors['b_enc'], 'out_bias': b_dec}
  else:
    bias_l = plain.bias_with_subtraction(tensors['b_enc'], encoder_ld, b_dec)
    arrays |= {'pre_bias': b_dec, 'latent_bias': bias_l}
  return arrays, {'activation': 'jumprelu', 'normalization': 'none'}


def _load(path):
  path = pathlib.Path(path)
  with open(path, 'rb') as file, files.reading(path, 'is no whole .npz file of arrays'):
    with np.load(file, allow_pickle=False) as archive:  # of a .npy file, an array, which has no such end
      n_bytes = sum(entry.file_size for entry in archive.zip.infolist())
      if n_bytes > _UNPACKED * os.fstat(file.fileno()).st_size:
        raise ValueError(f'it would unpack to {n_bytes} bytes')
      found = dict(archive)
    unscaled = np.all(found.pop('scaling_factor', 1) == 1)
  if not unscaled:
    raise ValueError(f'{path}: scaling_factor is not 1; multiply the rows of W_dec by it, and leave it out')
  return files.checked(path, found, _DIMS)


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes params.npz; ReLU, ProLU and gated SAEs as the JumpReLU SAE that computes the same.

  Raises:
    FileExistsError: there is something at the path.
    ValueError: it is of TopK, normalises inputs token by token, or has a skip.
  """
  arrays, settings = plain.of(sae)
  if settings['activation'] == 'topk' or settings['normalization'] != 'none' or 'skip' in arrays:
    raise ValueError(
      'the format gemma_scope holds JumpReLU SAEs and transcoders, without normalization and without a skip; this is '
      f'{plain.describe(arrays, settings)}. Write saelens, sparsify (TopK) or ours instead'
    )
  arrays, _ = plain.as_jumprelu(arrays, settings)
  tensors = {
    'W_enc': np.ascontiguousarray(arrays['encoder'].T),
    'W_dec': arrays['decoder'],
    'b_enc': plain.bias_without_subtraction(arrays),
    'b_dec': arrays.get('out_bias', arrays['pre_bias']),
    'threshold': arrays['threshold'],
  }
  with files.new(path) as partial, open(partial, 'xb') as file:
    np.savez(file, **tensors)


def outputs(path: str | pathlib.Path, x_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d_out] of x_bd by Gemma Scope's formulas, in float64.

  z = x W_enc + b_enc; latents = relu(z) where z > threshold; recons = latents W_dec + b_dec.

  Raises:
    As `read`.
  """
  tensors = _load(path)
  z_bl = plain.products(x_bd, tensors['W_enc'].T) + tensors['b_enc']
  latents_bl = plain.jumprelu(z_bl, tensors['threshold'])
  return latents_bl, plain.products(latents_bl, tensors['W_dec'].T) + tensors['b_dec']
