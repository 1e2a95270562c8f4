"""The folders of sparsify 1.3, one a hookpoint: cfg.json and sae.safetensors of TopK SAEs and transcoders."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from jax_interp.formats import files, plain
from models import sae as sae_lib

_WEIGHTS, _CONFIG = 'sae.safetensors', 'cfg.json'
_DIMS = {'encoder.weight': 'ld', 'encoder.bias': 'l', 'W_dec': 'ld', 'b_dec': 'd'}


class _Folder(NamedTuple):
  """What a folder holds: float32 tensors by their names, k, and whether b_dec is not subtracted from inputs."""

  tensors: dict[str, np.ndarray]
  k: int
  transcodes: bool


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a folder of one hookpoint."""
  return all((pathlib.Path(path) / name).is_file() for name in (_WEIGHTS, _CONFIG))


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes, of the folder of one hookpoint.

  An SAE with a skip connection becomes a transcoder that computes the same.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: it is damaged, or its activation is not topk.
  """
  tensors, k, transcodes = _load(pathlib.Path(path))
  arrays = {
    'encoder': tensors['encoder.weight'],
    'decoder': tensors['W_dec'],
    'pre_bias': np.zeros_like(tensors['b_dec']) if transcodes else tensors['b_dec'],
    'latent_bias': tensors['encoder.bias'],
  }
  if transcodes or 'W_skip' in tensors:
    arrays['out_bias'] = tensors['b_dec']
  if 'W_skip' in tensors:
    arrays['skip'] = tensors['W_skip']
    # Theirs is of x, ours of x - pre_bias.
    arrays['out_bias'] = plain.bias_with_subtraction(tensors['b_dec'], tensors['W_skip'], arrays['pre_bias'])
  return arrays, {'activation': 'topk', 'k': k, 'normalization': 'none'}


def _load(path: pathlib.Path) -> _Folder:
  config_path = path / _CONFIG
  config = files.read_json(config_path)
  activation = files.field(config_path, config, 'activation', str, 'topk')
  signed, skips, transcodes = (
    files.field(config_path, config, name, bool, False) for name in ('signed', 'skip_connection', 'transcode')
  )
  if activation != 'topk' or signed:
    raise ValueError(
      f'{path}: its activation is {"signed " * signed}{activation}; ours has topk of what is positive alone, and no '
      'other of theirs can be read'
    )
  dims = {**_DIMS, 'W_skip': 'dd'} if skips else _DIMS
  tensors = files.checked(path / _WEIGHTS, files.read_safetensors(path / _WEIGHTS), dims)
  return _Folder(tensors, files.active(config_path, config, len(tensors['encoder.bias'])), transcodes)


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes the folder of a hookpoint that `SparseCoder.load_from_disk` takes; sparsify wants it named after the module.

  Raises:
    FileExistsError: there is something at the path.
    ValueError: it is not of TopK, normalises inputs token by token, or is a transcoder between sites of two widths.
  """
  arrays, settings = plain.of(sae)
  n_latents, d = arrays['encoder'].shape
  transcoder = 'out_bias' in arrays
  if settings['activation'] != 'topk' or settings['normalization'] != 'none' or arrays['decoder'].shape[1] != d:
    raise ValueError(
      'the format sparsify holds TopK SAEs and transcoders between sites of one width, without normalization; this is '
      f'{plain.describe(arrays, settings)} from {d} to {arrays["decoder"].shape[1]}. Write saelens or ours instead'
    )
  tensors = {
    'encoder.weight': arrays['encoder'],
    'encoder.bias': plain.bias_without_subtraction(arrays) if transcoder else arrays['latent_bias'],
    'W_dec': arrays['decoder'],
    'b_dec': plain.out_bias_without_subtraction(arrays) if transcoder else arrays['pre_bias'],
  }
  if 'skip' in arrays:
    tensors['W_skip'] = arrays['skip']
  config = {
    'activation': 'topk',
    'expansion_factor': max(1, n_latents // d),
    'normalize_decoder': False,  # of further training; SAELens takes it for "b_dec is subtracted from inputs", inverted
    'num_latents': n_latents,
    'k': settings['k'],
    'multi_topk': False,
    'skip_connection': 'skip' in arrays,
    'transcode': transcoder,
    'd_in': d,
  }
  with files.new(path) as partial:
    partial.mkdir()
    files.write_safetensors(partial / _WEIGHTS, tensors)
    (partial / _CONFIG).write_text(json.dumps(config))


def outputs(path: str | pathlib.Path, x_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d] of x_bd by sparsify's formulas, in float64.

  With x' = x - b_dec, or x of a transcoder: the k largest of relu(encoder x' + bias), times W_dec, plus b_dec, plus
  x W_skip^T where there is a skip.

  Raises:
    As `read`.
  """
  tensors, k, transcodes = _load(pathlib.Path(path))
  x_bd = x_bd.astype(np.float64)
  centred_bd = x_bd if transcodes else x_bd - tensors['b_dec']
  z_bl = plain.products(centred_bd, tensors['encoder.weight']) + tensors['encoder.bias']
  latents_bl = plain.topk(np.maximum(z_bl, 0), k)
  recons_bd = plain.products(latents_bl, tensors['W_dec'].T) + tensors['b_dec']
  if 'W_skip' in tensors:
    recons_bd = recons_bd + plain.products(x_bd, tensors['W_skip'])
  return latents_bl, recons_bd
