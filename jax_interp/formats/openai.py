"""The files of OpenAI's released GPT-2 SAEs (github.com/openai/sparse_autoencoder): `torch.save` of a flat dict.

Their code normalises the input of TopK, and of nothing else.
"""

import pathlib

import numpy as np

from jax_interp.formats import files, plain, torch_files
from models import sae as sae_lib

_DIMS = {'encoder.weight': 'ld', 'decoder.weight': 'dl', 'latent_bias': 'l', 'pre_bias': 'd'}
_STATISTICS = ('stats_last_nonzero', 'latents_activation_frequency', 'latents_mean_square')  # of training
_ACTIVATION = {'activation', 'activation_state_dict'}
_TIED = 'decoder.linear.weight'  # the encoder again, where both are one matrix
_EPS = 1e-5  # added to the standard deviation when it divides


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a file of torch.save."""
  return any(name.endswith('/data.pkl') for name in files.zip_entries(path))


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes; nothing in the file is run (see `torch_files`).

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, not to be trusted, of another format, or of the activation Identity, whose latents may
      be negative.
  """
  tensors, activation, k = _load(path)
  arrays = {
    'encoder': tensors['encoder.weight'],
    'decoder': tensors['decoder.weight'].T,
    'pre_bias': tensors['pre_bias'],
    'latent_bias': tensors['latent_bias'],
  }
  if activation == 'TopK':
    return arrays, {'activation': 'topk', 'k': k, 'normalization': 'layer_norm_std'}
  return arrays, {'activation': 'relu', 'normalization': 'none'}


def _load(path):
  path = pathlib.Path(path)
  found = torch_files.read(path)
  activation = files.field(path, found, 'activation', str, 'ReLU')
  tensors = {name: found[name] for name in found.keys() - _ACTIVATION if not name.startswith('activation.')}
  if 'decoder.weight' not in tensors and isinstance(tensors.get('encoder.weight'), np.ndarray):
    tensors['decoder.weight'] = tensors['encoder.weight'].T
  tensors = files.checked(path, tensors, _DIMS, (*_STATISTICS, _TIED))
  if activation not in ('TopK', 'ReLU'):
    raise ValueError(
      f'{path}: its activation is {files.shown(activation)}; ours has TopK and ReLU, whose latents are never '
      'negative, and no other of theirs can be read'
    )
  if activation == 'ReLU':
    return tensors, activation, None
  state = files.field(path, found, 'activation_state_dict', dict, {})
  if files.field(path, state, 'postact_fn', str, 'ReLU') != 'ReLU':
    raise ValueError(f'{path}: the state of its TopK is {files.shown(state)}; ours has the postact_fn ReLU alone')
  return tensors, activation, files.active(path, state, len(tensors['latent_bias']))


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes a file that OpenAI's `Autoencoder.from_state_dict` takes, and `torch.load` with weights_only.

  The statistics of training are written as those of a new SAE.

  Raises:
    FileExistsError: there is something at the path.
    ValueError: it is no TopK SAE of normalization layer_norm_std, and no ReLU SAE without normalization.
  """
  arrays, settings = plain.of(sae)
  held = {('topk', 'layer_norm_std'): 'TopK', ('relu', 'none'): 'ReLU'}
  kind = held.get((settings['activation'], settings['normalization']))
  if kind is None or 'out_bias' in arrays:
    raise ValueError(
      'the format openai holds TopK SAEs of normalization layer_norm_std and ReLU SAEs without one, because its code '
      f'decides by the activation whether to normalise; this is {plain.describe(arrays, settings)}. Write saelens, '
      'sparsify (TopK without normalization) or ours instead'
    )
  n_latents = len(arrays['encoder'])
  values = {
    'pre_bias': arrays['pre_bias'],
    'latent_bias': arrays['latent_bias'],
    'stats_last_nonzero': np.zeros(n_latents, np.int64),
    'latents_activation_frequency': np.ones(n_latents, np.float32),
    'latents_mean_square': np.zeros(n_latents, np.float32),
    'encoder.weight': arrays['encoder'],
    'decoder.weight': arrays['decoder'].T,
    'activation': kind,
    'activation_state_dict': {'k': settings['k'], 'postact_fn': 'ReLU'} if kind == 'TopK' else {},
  }
  with files.new(path) as partial:
    torch_files.write(partial, values)


def outputs(path: str | pathlib.Path, x_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d] of raw x_bd by OpenAI's formulas, in float64.

  latents = activation(encoder (x - pre_bias) + latent_bias); recons = decoder latents + pre_bias. Of TopK, x is first
  reduced by its mean and divided by std + 1e-5, and recons come back times std (not + 1e-5) plus the mean.

  Raises:
    As `read`.
  """
  tensors, activation, k = _load(path)
  x_bd, mean_b, std_b = x_bd.astype(np.float64), 0.0, 1.0
  if activation == 'TopK':
    mean_b, std_b = x_bd.mean(1, keepdims=True), x_bd.std(1, ddof=1, keepdims=True)
    x_bd = (x_bd - mean_b) / (std_b + _EPS)
  z_bl = plain.products(x_bd - tensors['pre_bias'], tensors['encoder.weight']) + tensors['latent_bias']
  latents_bl = plain.topk(z_bl, k) if activation == 'TopK' else np.maximum(z_bl, 0)
  recons_bd = plain.products(latents_bl, tensors['decoder.weight']) + tensors['pre_bias']
  return latents_bl, recons_bd * std_b + mean_b
