"""The folders of dictionary_learning (ae.pt, config.json): TopK, BatchTopK, Matryoshka, ReLU, gated, JumpReLU SAEs.

Its BatchTopK and Matryoshka SAEs have two ways to encode: by a threshold, as its own code does unless told otherwise,
and by the largest of a whole batch, which is TopK of a token when each token is a batch.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from jax_interp.formats import files, plain, torch_files
from models import sae as sae_lib

_WEIGHTS, _CONFIG = 'ae.pt', 'config.json'
_LINEAR = {'encoder.weight': 'ld', 'decoder.weight': 'dl'}
_MATRICES = {'W_enc': 'dl', 'W_dec': 'ld', 'b_enc': 'l', 'b_dec': 'd'}
_DIMS = {
  'AutoEncoder': {**_LINEAR, 'encoder.bias': 'l', 'bias': 'd'},
  'AutoEncoderNew': {**_LINEAR, 'encoder.bias': 'l', 'decoder.bias': 'd'},
  'GatedAutoEncoder': {**_LINEAR, 'decoder_bias': 'd', 'gate_bias': 'l', 'mag_bias': 'l', 'r_mag': 'l'},
  'JumpReluAutoEncoder': {**_MATRICES, 'threshold': 'l'},
  'AutoEncoderTopK': {**_LINEAR, 'encoder.bias': 'l', 'b_dec': 'd', 'threshold': ''},
  'BatchTopKSAE': {**_LINEAR, 'encoder.bias': 'l', 'b_dec': 'd', 'threshold': ''},
  'MatryoshkaBatchTopKSAE': {**_MATRICES, 'threshold': ''},
}
_TOPK = ('AutoEncoderTopK', 'BatchTopKSAE', 'MatryoshkaBatchTopKSAE')
_WITHOUT_SUBTRACTION = ('AutoEncoderNew', 'JumpReluAutoEncoder')
_UNSET = -1.0  # the threshold before training has measured one


class _Folder(NamedTuple):
  """What a folder holds: the class, float32 tensors by their names, and how a TopK class is to encode.

  `k` is None where it encodes by the threshold, or is of another class.
  """

  kind: str
  tensors: dict[str, np.ndarray]
  k: int | None

  @property
  def encoder_ld(self) -> np.ndarray:
    return self.tensors['W_enc'].T if 'W_enc' in self.tensors else self.tensors['encoder.weight']

  @property
  def decoder_ld(self) -> np.ndarray:
    return self.tensors['W_dec'] if 'W_dec' in self.tensors else self.tensors['decoder.weight'].T

  def _first(self, *names) -> np.ndarray:
    return next(self.tensors[name] for name in names if name in self.tensors)

  @property
  def bias_l(self) -> np.ndarray:
    return self._first('encoder.bias', 'b_enc', 'gate_bias')

  @property
  def b_dec(self) -> np.ndarray:
    return self._first('b_dec', 'bias', 'decoder_bias', 'decoder.bias')


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a folder with ae.pt."""
  return (pathlib.Path(path) / _WEIGHTS).is_file()


def read(path: str | pathlib.Path, use_threshold: bool | None = None) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes, of a folder such as trainer_0; nothing in ae.pt is run (see `torch_files`).

  Args:
    path: of the folder.
    use_threshold: of TopK, BatchTopK and Matryoshka SAEs, whether they become JumpReLU SAEs of their one threshold
      or, each token for itself, TopK; None is what their own code does: TopK of AutoEncoderTopK, else the threshold.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: it is damaged, not to be trusted, of another class than those above, or has no threshold to use.
  """
  folder = _load(pathlib.Path(path), use_threshold)
  tensors, encoder_ld, b_dec_d = folder.tensors, folder.encoder_ld, folder.b_dec
  arrays = {'encoder': encoder_ld, 'decoder': folder.decoder_ld, 'pre_bias': b_dec_d, 'latent_bias': folder.bias_l}
  if folder.kind in _WITHOUT_SUBTRACTION:
    arrays['latent_bias'] = plain.bias_with_subtraction(folder.bias_l, encoder_ld, b_dec_d)
  settings = {'activation': 'relu', 'normalization': 'none'}
  if folder.k is not None:
    settings |= {'activation': 'topk', 'k': folder.k}
  elif 'threshold' in tensors:
    settings['activation'] = 'jumprelu'
    arrays['threshold'] = np.broadcast_to(tensors['threshold'], folder.bias_l.shape)
  elif folder.kind == 'GatedAutoEncoder':
    settings['activation'] = 'gated'
    arrays |= {name: tensors[name] for name in ('r_mag', 'mag_bias')}
  return arrays, settings


def _load(path: pathlib.Path, use_threshold: bool | None) -> _Folder:
  config_path = path / _CONFIG
  config = files.field(config_path, files.read_json(config_path), 'trainer', dict)
  kind = files.field(config_path, config, 'dict_class', str)
  if kind not in _DIMS:
    raise ValueError(f'{path}: its dict_class is {files.shown(kind)}; supported: {", ".join(_DIMS)}')
  found = torch_files.read(path / _WEIGHTS)
  if kind not in _TOPK:
    if use_threshold is not None:
      raise ValueError(f'{path}: {kind} encodes in one way; use_threshold is of {", ".join(_TOPK)}')
    return _Folder(kind, files.checked(path / _WEIGHTS, found, _DIMS[kind]), None)
  k = found.pop('k', config.get('k'))
  if isinstance(k, np.ndarray) and k.shape == () and k.dtype.kind in 'iu':
    k = int(k)
  if type(k) is not int or config.get('k', k) != k:
    there = files.shown(config.get('k'))
    raise ValueError(f'{path}: k is {files.shown(k)} in {_WEIGHTS} and {there} in {_CONFIG}; make them one')
  found.setdefault('threshold', np.asarray(_UNSET, np.float32))  # earlier versions have none
  tensors = files.checked(path / _WEIGHTS, found, _DIMS[kind], ('group_sizes',))  # all groups are active
  if not (kind != 'AutoEncoderTopK' if use_threshold is None else use_threshold):
    folder = _Folder(kind, tensors, k)
    files.active(path, {'k': k}, len(folder.bias_l))
    return folder
  if tensors['threshold'] < 0:
    raise ValueError(
      f'{path}: its threshold is {float(tensors["threshold"])}, so none was measured; read it as TopK of each '
      'token, with use_threshold False'
    )
  return _Folder(kind, tensors, None)


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes a folder that `load_dictionary` of dictionary_learning takes.

  TopK is AutoEncoderTopK, ReLU AutoEncoder, gated GatedAutoEncoder, and JumpReLU JumpReluAutoEncoder, as which a ProLU
  SAE is written too, since that computes the same.

  Raises:
    FileExistsError: there is something at the path.
    ValueError: it is a transcoder, or normalises inputs token by token.
  """
  arrays, settings = plain.of(sae)
  if 'out_bias' in arrays or settings['normalization'] != 'none':
    raise ValueError(
      'the format dictionary_learning holds SAEs without normalization; this is '
      f'{plain.describe(arrays, settings)}. Write saelens or ours instead'
    )
  if settings['activation'] == 'prolu':
    arrays, settings = plain.as_jumprelu(arrays, settings)
  activation, (n_latents, d) = settings['activation'], arrays['encoder'].shape
  tensors = {'encoder.weight': arrays['encoder'], 'decoder.weight': arrays['decoder'].T}
  config = {'activation_dim': d, 'dict_size': n_latents}
  if activation == 'topk':
    kind, config['k'] = 'AutoEncoderTopK', settings['k']
    tensors |= {'encoder.bias': arrays['latent_bias'], 'b_dec': arrays['pre_bias']}
    tensors |= {'k': np.asarray(settings['k'], np.int32), 'threshold': np.asarray(_UNSET, np.float32)}
  elif activation == 'relu':
    kind = 'AutoEncoder'
    tensors |= {'encoder.bias': arrays['latent_bias'], 'bias': arrays['pre_bias']}
  elif activation == 'gated':
    kind = 'GatedAutoEncoder'
    tensors |= {'decoder_bias': arrays['pre_bias'], 'gate_bias': arrays['latent_bias']}
    tensors |= {name: arrays[name] for name in ('r_mag', 'mag_bias')}
  else:
    kind = 'JumpReluAutoEncoder'
    tensors = {
      'W_enc': arrays['encoder'].T,
      'b_enc': plain.bias_without_subtraction(arrays),
      'W_dec': arrays['decoder'],
      'b_dec': arrays['pre_bias'],
      'threshold': arrays['threshold'],
    }
  with files.new(path) as partial:
    partial.mkdir()
    torch_files.write(partial / _WEIGHTS, tensors)
    (partial / _CONFIG).write_text(json.dumps({'trainer': {'dict_class': kind, **config}, 'buffer': {}}, indent=2))


def outputs(
  path: str | pathlib.Path, x_bd: np.ndarray, use_threshold: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d] of x_bd by the formulas of the folder's class, in float64.

  With x' = x - b_dec, or x of AutoEncoderNew and JumpReluAutoEncoder, and z = encoder x' + bias: latents = relu(z), its
  k largest, or relu(z) where z > threshold; gated, relu(exp(r_mag) encoder x' + mag_bias) where encoder x' + gate_bias
  > 0. recons = decoder latents + b_dec.

  Raises:
    As `read`, whose use_threshold is the same.
  """
  folder = _load(pathlib.Path(path), use_threshold)
  x_bd = x_bd.astype(np.float64)
  if folder.kind not in _WITHOUT_SUBTRACTION:
    x_bd = x_bd - folder.b_dec
  linear_bl = plain.products(x_bd, folder.encoder_ld)
  z_bl = linear_bl + folder.bias_l
  if folder.kind == 'GatedAutoEncoder':
    scale_l = np.exp(folder.tensors['r_mag'].astype(np.float64))
    latents_bl = np.maximum(scale_l * linear_bl + folder.tensors['mag_bias'], 0) * (z_bl > 0)
  elif folder.k is not None:
    latents_bl = plain.topk(np.maximum(z_bl, 0), folder.k)
  else:
    latents_bl = plain.jumprelu(z_bl, folder.tensors.get('threshold', 0))
  return latents_bl, plain.products(latents_bl, folder.decoder_ld.T) + folder.b_dec
