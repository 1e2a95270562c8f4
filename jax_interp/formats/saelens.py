"""The folders of SAELens 6 (cfg.json, sae_weights.safetensors), and those of its earlier versions to read.

SAEs: standard, topk, jumprelu and gated; its BatchTopK and Matryoshka SAEs are jumprelu once exported. Transcoders: of
ReLU and JumpReLU, with and without a skip.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from jax_interp.formats import files, plain
from models import sae as sae_lib

_WEIGHTS, _CONFIG, _SCALER = 'sae_weights.safetensors', 'cfg.json', 'activation_scaler.json'
_OWN = {  # what an architecture has beside W_enc, W_dec and b_dec
  'standard': ('b_enc',),
  'topk': ('b_enc',),
  'jumprelu': ('b_enc', 'threshold'),
  'gated': ('b_gate', 'b_mag', 'r_mag'),
  'transcoder': ('b_enc',),
  'skip_transcoder': ('b_enc', 'W_skip'),
  'jumprelu_transcoder': ('b_enc', 'threshold'),
  'jumprelu_skip_transcoder': ('b_enc', 'threshold', 'W_skip'),
}
_ACTIVATIONS = {'standard': 'relu', 'topk': 'topk', 'jumprelu': 'jumprelu', 'gated': 'gated'}
_MAY_BE_NULL = ('metadata', 'activation_fn_kwargs')
_VERSION = '6.0.0'  # the first whose settings are named as we write them
_EPS = 1e-5  # added to the standard deviation when it divides


class _Folder(NamedTuple):
  """What a folder holds: float32 tensors by their names, and settings as SAELens 6 names them.

  `scale` is what inputs are multiplied by before the SAE sees them, and reconstructions divided by.
  """

  tensors: dict[str, np.ndarray]
  architecture: str
  k: int | None
  subtracts: bool
  normalization: str
  rescales: bool
  scale: float

  @property
  def is_transcoder(self) -> bool:
    return self.architecture.endswith('transcoder')


def detect(path: str | pathlib.Path) -> bool:
  """Returns whether there is a folder with the weights of an SAE."""
  return (pathlib.Path(path) / _WEIGHTS).is_file()


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
  """Returns what `models.sae.build` takes.

  Where b_dec is not subtracted from inputs, the bias becomes b_enc + W_enc b_dec. The norms by which a TopK SAE
  rescales its latents are folded into its matrices. Of expected_average_only_in, the factor is read from the file
  activation_scaler.json that a checkpoint of SAELens has.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: it is damaged, or computes what our SAE does not.
  """
  folder = _load(pathlib.Path(path))
  tensors = folder.tensors
  encoder_ld, decoder_ld, b_dec_d = tensors['W_enc'].T, tensors['W_dec'], tensors['b_dec']
  bias_l = tensors['b_gate' if folder.architecture == 'gated' else 'b_enc']
  if folder.rescales:
    norm_l = np.linalg.norm(decoder_ld.astype(np.float64), axis=1)
    encoder_ld, decoder_ld = plain.times(encoder_ld, norm_l[:, None]), plain.times(decoder_ld, 1 / norm_l[:, None])
    bias_l = plain.times(bias_l, norm_l)
  arrays = {'encoder': encoder_ld, 'decoder': decoder_ld, 'latent_bias': bias_l, 'pre_bias': b_dec_d}
  arrays |= {name: tensors[name] for name in ('threshold', 'r_mag') if name in tensors}
  if folder.architecture == 'gated':
    arrays['mag_bias'] = tensors['b_mag']
  if folder.is_transcoder:
    arrays |= {'pre_bias': np.zeros(encoder_ld.shape[1], np.float32), 'out_bias': b_dec_d}
    if 'W_skip' in tensors:
      arrays['skip'] = tensors['W_skip']
    return arrays, {
      'activation': 'jumprelu' if 'threshold' in tensors else 'relu',
      'normalization': 'none',
    }
  if not folder.subtracts:
    arrays['latent_bias'] = plain.bias_with_subtraction(bias_l, encoder_ld, b_dec_d)
    if 'r_mag' in arrays:
      scale_l = np.exp(arrays['r_mag'].astype(np.float64))
      arrays['mag_bias'] = plain.bias_with_subtraction(arrays['mag_bias'], encoder_ld, b_dec_d, scale_l)
  settings = {'activation': _ACTIVATIONS[folder.architecture], 'normalization': folder.normalization}
  if folder.k is not None:
    settings['k'] = folder.k
  if folder.normalization == 'constant':
    settings['input_scale'] = folder.scale
  return arrays, settings


def _load(path: pathlib.Path) -> _Folder:
  config_path = path / _CONFIG
  config = _current(config_path, files.read_json(config_path))
  architecture = files.field(config_path, config, 'architecture', str, 'standard')
  if architecture not in _OWN:
    raise ValueError(
      f'{path}: its architecture is {files.shown(architecture)}; supported: {", ".join(_OWN)}. A training '
      'checkpoint of batchtopk or matryoshka_batchtopk becomes jumprelu by save_inference_model of SAELens'
    )
  if config.get('reshape_activations', 'none') != 'none':
    raise ValueError(
      f'{path}: it takes {files.shown(config["reshape_activations"])} apart by heads, and ours takes vectors; set '
      "reshape_activations to 'none' in cfg.json, and give it the heads' channels one after another"
    )
  normalization, scale = _normalization(path, config)
  tensors = _tensors(path, architecture)
  if architecture.endswith('transcoder') and normalization != 'none':
    raise ValueError(
      f'{path}: a transcoder that normalises its input ({normalization}) and not its skip is none of ours; fold the '
      "normalisation into the weights, and set normalize_activations to 'none'"
    )
  is_topk = architecture == 'topk'
  return _Folder(
    tensors,
    architecture,
    files.active(config_path, config, len(tensors['b_enc'])) if is_topk else None,
    files.field(config_path, config, 'apply_b_dec_to_input', bool, True),
    normalization,
    is_topk and files.field(config_path, config, 'rescale_acts_by_decoder_norm', bool, False),
    scale,
  )


def _current(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
  """Returns the settings as SAELens 6 names them."""
  config = {name: value for name, value in config.items() if value is not None or name not in _MAY_BE_NULL}
  metadata = files.field(path, config, 'metadata', dict, {})
  version = str(config.get('sae_lens_version') or metadata.get('sae_lens_version'))
  if re.match(r'[6-9]|[1-9]\d', version):
    return config
  activation = config.get('activation_fn_str', config.get('activation_fn', 'relu'))
  if activation == 'topk':
    arguments = files.field(path, config, 'activation_fn_kwargs', dict, {})
    config |= {'architecture': 'topk', 'k': arguments.get('k', config.get('k'))}
  elif activation != 'relu':
    raise ValueError(f'{path}: its activation_fn is {files.shown(activation)}; ours are relu and topk')
  normalize = config.get('normalize_activations') or 'none'  # earlier still, whether to
  config['normalize_activations'] = 'expected_average_only_in' if normalize is True else normalize
  if 'hook_z' in str(config.get('hook_name', config.get('hook_point', ''))):
    config.setdefault('reshape_activations', 'hook_z')
  return config


def _normalization(path: pathlib.Path, config: dict[str, Any]) -> tuple[str, float]:
  theirs = config.get('normalize_activations', 'none')
  if theirs in ('none', 'layer_norm'):
    return {'none': 'none', 'layer_norm': 'layer_norm_std'}[theirs], 1.0
  if theirs != 'expected_average_only_in':
    raise ValueError(
      f'{path}: normalize_activations is {files.shown(theirs)}, which ours has not (none, layer_norm and '
      'expected_average_only_in are known); covariance_whitening can be folded into the weights by '
      'fold_activation_whitening of SAELens, and '
      "for constant_norm_rescale, set it to 'none' and give the SAE inputs of norm sqrt(d_in)"
    )
  if not (path / _SCALER).is_file():
    raise ValueError(
      f'{path}: it was trained on inputs times a factor (expected_average_only_in) that the folder does not tell; add '
      f'{_SCALER} with {{"scaling_factor": NUMBER}}, or fold it by fold_activation_norm_scaling_factor of SAELens'
    )
  return 'constant', files.scale(path / _SCALER, files.read_json(path / _SCALER), 'scaling_factor')


def _tensors(path: pathlib.Path, architecture: str) -> dict[str, np.ndarray]:
  found = files.read_safetensors(path / _WEIGHTS)
  for name in ('scaling_factor', 'finetuning_scaling_factor'):
    if name in found and not np.all(found.pop(name) == 1):
      raise ValueError(f'{path}: {name} is not 1; multiply the rows of W_dec by it, and leave it out')
  out = 'o' if architecture.endswith('transcoder') else 'd'
  dims = {'W_enc': 'dl', 'W_dec': f'l{out}', 'b_dec': out, 'W_skip': f'{out}d'}
  return files.checked(
    path / _WEIGHTS, found, {name: dims.get(name, 'l') for name in ('W_enc', 'W_dec', 'b_dec', *_OWN[architecture])}
  )


def write(path: str | pathlib.Path, sae: sae_lib.SparseAutoencoder):
  """Writes a folder that `SAE.load_from_disk` of SAELens 6 takes.

  A ProLU SAE is written as the JumpReLU SAE that computes the same, and so is a gated transcoder.

  Raises:
    FileExistsError: there is something at the path.
    ValueError: the normalisation is unit_norm, or it is a TopK transcoder.
  """
  arrays, settings = plain.of(sae)
  transcoder = 'out_bias' in arrays
  if settings['normalization'] == 'unit_norm' or (transcoder and settings['activation'] == 'topk'):
    raise ValueError(
      'the format saelens holds SAEs without normalization or of layer_norm_std, and transcoders of ReLU and JumpReLU; '
      f'this is {plain.describe(arrays, settings)}. Write sparsify (TopK transcoders) or ours instead'
    )
  if settings['activation'] == 'prolu' or (transcoder and settings['activation'] == 'gated'):
    arrays, settings = plain.as_jumprelu(arrays, settings)
  activation = settings['activation']
  tensors = {'W_enc': arrays['encoder'].T, 'W_dec': arrays['decoder'], 'b_dec': arrays['pre_bias']}
  config = {'d_in': arrays['encoder'].shape[1], 'd_sae': len(arrays['encoder']), 'dtype': 'float32', 'device': 'cpu'}
  if transcoder:
    architecture = f'{"jumprelu_" * (activation == "jumprelu")}{"skip_" * ("skip" in arrays)}transcoder'
    tensors |= {
      'b_enc': plain.bias_without_subtraction(arrays),
      'b_dec': plain.out_bias_without_subtraction(arrays),
    }
    config['d_out'] = arrays['decoder'].shape[1]
  else:
    (architecture,) = (theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation)
    tensors['b_gate' if activation == 'gated' else 'b_enc'] = arrays['latent_bias']
  theirs = {'threshold': 'threshold', 'r_mag': 'r_mag', 'mag_bias': 'b_mag', 'skip': 'W_skip'}
  tensors |= {theirs[name]: arrays[name] for name in theirs.keys() & arrays.keys()}
  config |= {
    'architecture': architecture,
    'apply_b_dec_to_input': not transcoder,
    'normalize_activations': {'none': 'none', 'layer_norm_std': 'layer_norm'}[settings['normalization']],
    'reshape_activations': 'none',
    'metadata': {'sae_lens_version': _VERSION},
  }
  if activation == 'topk':
    config |= {'k': settings['k'], 'rescale_acts_by_decoder_norm': False}
  with files.new(path) as partial:
    partial.mkdir()
    files.write_safetensors(partial / _WEIGHTS, tensors)
    (partial / _CONFIG).write_text(json.dumps(config, indent=2))


def outputs(path: str | pathlib.Path, x_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the latents [b, l] and reconstructions [b, d_out] of raw x_bd by SAELens's formulas, in float64.

  With x' = x - b_dec where apply_b_dec_to_input: latents = f(x' W_enc + b_enc); recons = latents W_dec + b_dec, of
  layer_norm times std (not + 1e-5) plus the mean. f is relu, relu of the k largest, or relu where above the threshold;
  gated, it is relu(x' (W_enc exp(r_mag)) + b_mag) where x' W_enc + b_gate > 0. Of a skip, x W_skip^T is added.

  Raises:
    As `read`.
  """
  folder = _load(pathlib.Path(path))
  tensors, x_bd = folder.tensors, x_bd.astype(np.float64)
  normed_bd, mean_b, std_b = x_bd * folder.scale, 0.0, 1 / folder.scale
  if folder.normalization == 'layer_norm_std':
    mean_b, std_b = x_bd.mean(1, keepdims=True), x_bd.std(1, ddof=1, keepdims=True)
    normed_bd = (x_bd - mean_b) / (std_b + _EPS)
  if folder.subtracts and not folder.is_transcoder:
    normed_bd = normed_bd - tensors['b_dec']
  linear_bl = plain.products(normed_bd, tensors['W_enc'].T)
  norm_l = np.linalg.norm(tensors['W_dec'].astype(np.float64), axis=1) if folder.rescales else 1.0
  if folder.architecture == 'gated':
    magnitude_bl = np.maximum(linear_bl * np.exp(tensors['r_mag'].astype(np.float64)) + tensors['b_mag'], 0)
    latents_bl = magnitude_bl * (linear_bl + tensors['b_gate'] > 0)
  elif folder.architecture == 'topk':
    latents_bl = plain.topk((linear_bl + tensors['b_enc']) * norm_l, folder.k)
  else:
    latents_bl = plain.jumprelu(linear_bl + tensors['b_enc'], tensors.get('threshold', 0))
  recons_bd = (plain.products(latents_bl / norm_l, tensors['W_dec'].T) + tensors['b_dec']) * std_b + mean_b
  if 'W_skip' in tensors:
    recons_bd = recons_bd + plain.products(x_bd, tensors['W_skip'])
  return latents_bl, recons_bd
