"""The sparse autoencoder and transcoder: activations to a few active latents and back, and its folder on disk.

A plain pytree of float32 parameters on the ambient mesh, both matrices stored [latent, d] with latents over `model`.
Inputs are normalised on the way in and the normalisation is undone on the way out, so callers see only activations as
the model has them.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from models import activation_functions, products, sharding
from models.activation_functions import TopK

NORMALIZATIONS = ('none', 'layer_norm_std', 'unit_norm', 'constant')
NORM_EPS = 1e-5
UNIT_TOLERANCE = 1e-3
# The latter, relative to the mean distance to the mean, lets the iteration pass through a data point.
MEDIAN_STEPS, MEDIAN_EPS = 100, 1e-5
# Up to SPARSE_INPUTS inputs with up to N_ACTIVE active latents each have only the rows of these read of a decoder of
# MIN_LATENTS or more. With more of either, a product with the whole decoder is no slower on a CPU.
SPARSE_INPUTS, N_ACTIVE, MIN_LATENTS = 128, 128, 2048
PARAMETERS = ('encoder', 'decoder', 'pre_bias', 'latent_bias')


class InputNorm(NamedTuple):
  """What `encode` took away from an input and `decode` gives back: recons = normalised recons * scale + mean."""

  mean: jax.Array
  scale: jax.Array


class SparseAutoencoder(nnx.Module):
  """latents = activation(encoder (x - pre_bias), latent_bias); recons = latents decoder + pre_bias, for normalised x.

  With an `out_bias` it is a transcoder: what it reconstructs is another site's activation, of its own width and scale,
  as latents decoder + out_bias, plus skip (x - pre_bias) where there is a skip connection (Paulo et al. 2025).

  Args:
    encoder: [l, d].
    decoder: [l, d], or [l, d_out] of a transcoder.
    pre_bias: [d].
    latent_bias: [l].
    activation: of `models.activation_functions`; `TopK(k)` selects exactly k latents, of which fewer are positive where
      pre-activations are not.
    normalization: 'none'; 'layer_norm_std': minus the mean over d, divided by the standard deviation (of d - 1 degrees
      of freedom) + 1e-5, as for OpenAI's released GPT-2 SAEs; 'unit_norm': minus the mean over d, scaled to norm 1, as
      in the paper; 'constant': times input_scale.
    input_scale: what inputs are multiplied by under 'constant', such as `expected_average_scale`.
    out_bias: [d_out] of a transcoder.
    skip: [d_out, d] of a transcoder.
    output_scale: what a transcoder's target was multiplied by in training.

  Raises:
    ValueError: k is not within 1 and n_latents, the mesh does not divide n_latents, the normalisation is unknown or is
      one of each token's own in a transcoder, whose target it would not fit, or there is a skip without an out_bias.
  """

  def __init__(
    self,
    encoder,
    decoder,
    pre_bias,
    latent_bias,
    activation,
    normalization: str = 'none',
    input_scale: float = 1.0,
    out_bias=None,
    skip=None,
    output_scale: float = 1.0,
  ):
    check_settings(encoder.shape[0], getattr(activation, 'k', None), normalization)
    if out_bias is None and skip is not None:
      raise ValueError('a skip connection is of a transcoder, which has an out_bias; give both or neither')
    if out_bias is not None and normalization not in ('none', 'constant'):
      raise ValueError(
        f'normalization {normalization!r} of a transcoder is undone with statistics of its input, which are not those '
        "of its target; choose 'none' or 'constant'"
      )
    self.activation, self.normalization = activation, normalization
    self.input_scale, self.output_scale = input_scale, output_scale
    self.encoder = nnx.Param(encoder, out_sharding=('model', None))
    self.decoder = nnx.Param(decoder, out_sharding=('model', None))
    self.pre_bias = nnx.Param(pre_bias, out_sharding=(None,))
    self.latent_bias = nnx.Param(latent_bias, out_sharding=('model',))
    self.out_bias = None if out_bias is None else nnx.Param(out_bias, out_sharding=(None,))
    self.skip = None if skip is None else nnx.Param(skip, out_sharding=(None, None))

  @property
  def n_latents(self) -> int:
    return self.encoder.shape[0]

  @property
  def k(self) -> int | None:
    """Of TopK, else None."""
    return getattr(self.activation, 'k', None)

  @property
  def is_transcoder(self) -> bool:
    return self.out_bias is not None

  def normalize(self, x: jax.Array) -> tuple[jax.Array, InputNorm]:
    """Returns the normalised x [..., d] in float32, and what undoes it."""
    return normalize(x, self.normalization, self.input_scale)

  def linear(self, normed: jax.Array) -> jax.Array:
    """Returns the encoder's products [..., l] with a normalised input [..., d], without the latent bias."""
    return products.read(normed - self.pre_bias[...], self.encoder[...])

  def preacts(self, normed: jax.Array) -> jax.Array:
    """Returns the pre-activations [..., l] of a normalised input [..., d]."""
    return self.linear(normed) + self.latent_bias[...]

  def encode(self, x: jax.Array) -> tuple[jax.Array, InputNorm]:
    """Returns the latents [..., l], none negative, and what `decode` needs beside them."""
    normed, norm = self.normalize(x)
    latents = self.activation(self.linear(normed), self.latent_bias[...])
    if self.is_transcoder:
      skipped = jnp.zeros(()) if self.skip is None else (normed - self.pre_bias[...]) @ self.skip[...].T
      norm = InputNorm(skipped / self.output_scale, jnp.asarray(1 / self.output_scale))
    return latents, norm

  def decode(self, latents: jax.Array, norm: InputNorm) -> jax.Array:
    """Returns the reconstruction [..., d] of dense latents [..., l], in the scale of the original activations."""
    return self.write(latents, norm) + self.constant(norm)

  def write(self, latents: jax.Array, norm: InputNorm) -> jax.Array:
    """Returns what dense latents [..., l] add to the reconstruction [..., d], in the scale of the originals."""
    return _combine(latents, self.decoder[...]) * norm.scale

  def read(self, y: jax.Array, norm: InputNorm) -> jax.Array:
    """Returns what each latent [..., l] has, by unit, of a direction y [..., d] of the reconstruction."""
    return products.read(y * norm.scale, self.decoder[...])

  def written_along(self, latents_bl: jax.Array, norm: InputNorm, y_nbd: jax.Array) -> jax.Array:
    """Returns how much of each of n directions y [n, b, d] each latent writes, [n, b, l]: `latents_bl` times `read`."""

    def sparse(indices_bk):
      values_bk = jnp.take_along_axis(latents_bl, indices_bk, -1)
      found_nbk = jnp.einsum('nbd,bkd->nbk', y_nbd * norm.scale, self.decoder[...][indices_bk]) * values_bk
      nothing_nbl = jnp.zeros((len(y_nbd), *latents_bl.shape), found_nbk.dtype)
      return nothing_nbl.at[:, jnp.arange(len(latents_bl))[:, None], indices_bk].set(found_nbk)

    dense = lambda: jnp.stack([latents_bl * self.read(y_bd, norm) for y_bd in y_nbd])
    return _by_activity(latents_bl, jnp.zeros((len(y_nbd), *latents_bl.shape)), sparse, dense)

  def constant(self, norm: InputNorm) -> jax.Array:
    """Returns the reconstruction [..., d] without any latent: biases (and the skip), in the scale of the originals."""
    bias = self.out_bias if self.is_transcoder else self.pre_bias
    return bias[...] * norm.scale + norm.mean


def _by_activity(latents, nothing, sparse, dense):
  """Returns `nothing` without active latents [..., l], sparse(indices [..., N_ACTIVE]) with few, else dense()."""
  if math.prod(latents.shape[:-1]) > SPARSE_INPUTS or latents.shape[-1] < MIN_LATENTS or sharding.is_cut('model'):
    return jax.lax.cond((latents != 0).any(), dense, lambda: nothing)
  n_active = jnp.count_nonzero(latents, axis=-1).max(initial=0)
  few = lambda: sparse(jax.lax.top_k(jnp.abs(latents), N_ACTIVE)[1])
  branch = jnp.where(n_active == 0, 0, jnp.where(n_active <= N_ACTIVE, 1, 2))
  return jax.lax.switch(branch, [lambda: nothing, few, dense])


@jax.custom_jvp
def _combine(latents, decoder_ld):
  """Returns latents [..., l] times the decoder; what is not active has a gradient all the same."""
  shape = *latents.shape[:-1], decoder_ld.shape[1]

  def sparse(indices):
    values = jnp.take_along_axis(latents, indices, -1)
    return jnp.einsum('...k,...kd->...d', values, decoder_ld[indices])

  nothing = jnp.zeros(shape, jnp.result_type(latents, decoder_ld))
  return _by_activity(latents, nothing, sparse, lambda: jnp.einsum('...l,ld->...d', latents, decoder_ld))


@functools.partial(_combine.defjvp, symbolic_zeros=True)
def _combine_jvp(primals, tangents):
  """What does not change takes no part: its zeros would be multiplied all the same."""
  is_zero = [isinstance(tangent, jax.custom_derivatives.SymbolicZero) for tangent in tangents]
  terms = [] if is_zero[0] else [products.multiply(tangents[0], primals[1])]
  terms += [] if is_zero[1] else [products.multiply(primals[0], tangents[1])]
  return _combine(*primals), sum(terms)


def check_settings(n_latents: int, k: int | None, normalization: str):
  """Raises unless there can be such an SAE on the ambient mesh; k is None where the activation has none.

  Raises:
    ValueError: as `SparseAutoencoder`.
  """
  if k is not None and not 1 <= k <= n_latents:
    raise ValueError(f'k {k} is not within 1 and n_latents {n_latents}; choose a smaller k or more latents')
  if normalization not in NORMALIZATIONS:
    raise ValueError(f'normalization {normalization!r} is unknown; choose one of {", ".join(NORMALIZATIONS)}')
  sharding.check_divides('n_latents', n_latents, 'model')


def normalize(x: jax.Array, normalization: str, input_scale: float = 1.0) -> tuple[jax.Array, InputNorm]:
  """Returns x [..., d] normalised in float32 (see `SparseAutoencoder`), and what undoes it."""
  x = x.astype(jnp.float32)
  if normalization == 'none':
    return x, InputNorm(jnp.zeros(()), jnp.ones(()))
  if normalization == 'constant':
    return x * input_scale, InputNorm(jnp.zeros(()), jnp.asarray(1 / input_scale))
  mean = x.mean(-1, keepdims=True)
  norm = jnp.linalg.norm(x - mean, axis=-1, keepdims=True)
  scale = NORM_EPS + (norm if normalization == 'unit_norm' else norm / (x.shape[-1] - 1) ** 0.5)
  return (x - mean) / scale, InputNorm(mean, scale)


def expected_average_scale(sample_bd) -> float:
  """Returns the factor that brings the mean norm of the sample to sqrt(d) (Anthropic, April 2024 update).

  Raises:
    ValueError: the sample is all zeros.
  """
  mean_norm = float(jnp.linalg.norm(jnp.asarray(sample_bd, jnp.float32), axis=1).mean())
  if not mean_norm:
    raise ValueError('the sample of activations is all zeros, so it has no scale; look at the site')
  return sample_bd.shape[1] ** 0.5 / mean_norm


def unit_rows(w_ld: jax.Array) -> jax.Array:
  """Returns the rows scaled to norm 1."""
  return w_ld / jnp.linalg.norm(w_ld, axis=1, keepdims=True)


def has_unit_rows(sae: SparseAutoencoder) -> bool:
  """Returns whether the decoder's rows are at norm 1, as recipes that keep them there want them, but for rounding."""
  return bool(jnp.abs(jnp.linalg.norm(sae.decoder[...], axis=1) - 1).max() < UNIT_TOLERANCE)


def geometric_median(x_bd: jax.Array) -> jax.Array:
  """Returns the point [d] with the least sum of distances to x_bd, by Weiszfeld's algorithm, in float32.

  Each iteration averages the rows weighted by 1 / (distance + eps), beginning at the mean; eps is 1e-5 of the mean
  distance to it.
  """
  x_bd = x_bd.astype(jnp.float32)
  mean_d = x_bd.mean(0)
  distances = lambda point_d: jnp.linalg.norm(x_bd - point_d, axis=1)
  eps = MEDIAN_EPS * jnp.maximum(distances(mean_d).mean(), 1e-20)  # above 0 where all rows are one point

  def step(_, median_d):
    weight_b = 1 / (distances(median_d) + eps)
    return weight_b @ x_bd / weight_b.sum()

  return jax.lax.fori_loop(0, MEDIAN_STEPS, step, mean_d)


def init_sae(
  key: jax.Array, sample_bd: jax.Array, n_latents: int, k: int, normalization: str = 'none', input_scale: float = 1.0
) -> SparseAutoencoder:
  """Returns a freshly initialised TopK SAE on the ambient mesh, by the rules of OpenAI's released trainer.

  The encoder is uniform within 1/sqrt(d), the decoder its rows at unit norm, latent_bias 0, and pre_bias the geometric
  median of the normalised sample. The encoder is then divided by the mean norm of the reconstructions of 256 random
  unit vectors, so that they come back with about norm 1. The numbers do not depend on the mesh.

  Raises:
    ValueError: as `SparseAutoencoder`.
  """
  d = sample_bd.shape[1]
  encoder_key, probe_key = jax.random.split(key)

  @jax.jit
  def init(sample_bd):
    encoder_ld = jax.random.uniform(encoder_key, (n_latents, d), minval=-(d**-0.5), maxval=d**-0.5)
    pre_bias_d = geometric_median(normalize(sample_bd, normalization, input_scale)[0])
    return _placed(encoder_ld, unit_rows(encoder_ld), pre_bias_d, TopK(k), normalization, input_scale)

  return _rescaled(init(jnp.asarray(sample_bd)), probe_key)


@jax.jit
def _rescaled(sae, probe_key):
  """Divides the encoder by the mean norm of the reconstructions of 256 random unit vectors."""
  probes_bd = unit_rows(jax.random.normal(probe_key, (256, sae.encoder.shape[1]))) + sae.pre_bias[...]
  latents_bl = sae.activation(sae.linear(probes_bd), sae.latent_bias[...])
  sae.encoder[...] /= jnp.linalg.norm(latents_bl @ sae.decoder[...], axis=1).mean()
  return sae


def init_tied(
  key: jax.Array,
  sample_bd: jax.Array,
  n_latents: int,
  activation,
  normalization: str = 'none',
  input_scale: float = 1.0,
  row_norm: float | None = None,
  median: bool = True,
) -> SparseAutoencoder:
  """Returns a fresh SAE on the ambient mesh whose encoder and decoder have rows of the same random directions.

  Args:
    key: of the directions, which do not depend on the mesh.
    sample_bd: raw activations.
    n_latents: how many rows.
    activation: of `models.activation_functions`, with parameters of n_latents.
    normalization: as `SparseAutoencoder`.
    input_scale: as `SparseAutoencoder`.
    row_norm: of every row of both; by default the decoder's is 1, and the encoder's such that random unit vectors come
      back with about norm 1, as in `init_sae`: where half of many latents are on, tied unit rows would give back more.
    median: whether pre_bias is the geometric median of the normalised sample, or 0.

  Raises:
    ValueError: as `SparseAutoencoder`.
  """

  @jax.jit
  def init(sample_bd):
    rows_ld = (row_norm or 1) * unit_rows(jax.random.normal(key, (n_latents, sample_bd.shape[1])))
    normed_bd = normalize(sample_bd, normalization, input_scale)[0]
    pre_bias_d = geometric_median(normed_bd) if median else jnp.zeros(sample_bd.shape[1])
    return _placed(rows_ld, rows_ld, pre_bias_d, activation, normalization, input_scale)

  sae = init(jnp.asarray(sample_bd))
  return _rescaled(sae, jax.random.fold_in(key, 1)) if row_norm is None else sae


def _placed(encoder_ld, decoder_ld, pre_bias_d, activation, normalization, input_scale):
  return SparseAutoencoder(
    sharding.constrain(encoder_ld, 'latent d_model'),
    sharding.constrain(decoder_ld, 'latent d_model'),
    sharding.constrain(pre_bias_d, 'd_model'),
    sharding.constrain(jnp.zeros(len(encoder_ld)), 'latent'),
    activation,
    normalization,
    input_scale,
  )


def as_transcoder(key: jax.Array, sae: SparseAutoencoder, targets_bd: jax.Array, skip: bool = False):
  """Returns a fresh SAE as a transcoder: its decoder random unit rows of the target's width, its scale the target's.

  The targets are multiplied by `expected_average_scale` in training; out_bias is their geometric median, the skip
  connection 0.

  Raises:
    ValueError: as `SparseAutoencoder` and `expected_average_scale`.
  """
  output_scale, d_out = expected_average_scale(targets_bd), targets_bd.shape[1]

  @jax.jit
  def init(sae, targets_bd):
    decoder_ld = unit_rows(jax.random.normal(key, (sae.n_latents, d_out)))
    return SparseAutoencoder(
      sae.encoder[...],
      sharding.constrain(decoder_ld, 'latent d_model'),
      sae.pre_bias[...],
      sae.latent_bias[...],
      sae.activation,
      sae.normalization,
      sae.input_scale,
      sharding.constrain(geometric_median(targets_bd * output_scale), 'd_model'),
      sharding.constrain(jnp.zeros((d_out, sae.encoder.shape[1])), 'd_model d_model') if skip else None,
      output_scale,
    )

  return init(sae, jnp.asarray(targets_bd))


def with_activation(sae: SparseAutoencoder, activation) -> SparseAutoencoder:
  """Returns the SAE with another activation function, of `models.activation_functions`, and all else as it is."""
  kept = {name: param[...] for name, param in named_parameters(sae).items() if name not in sae.activation.parameters}
  settings = {name: value for name, value in settings_of(sae).items() if name not in ('activation', 'k')}
  return SparseAutoencoder(**kept, activation=activation, **settings)


def named_parameters(sae: SparseAutoencoder) -> dict[str, nnx.Param]:
  """Returns the parameters by name: those of every SAE, then what a transcoder and the activation have beside them."""
  found = {name: getattr(sae, name) for name in (*PARAMETERS, 'out_bias', 'skip')}
  found |= {name: getattr(sae.activation, name) for name in sae.activation.parameters}
  return {name: param for name, param in found.items() if param is not None}


def settings_of(sae: SparseAutoencoder) -> dict:
  """Returns what an SAE is beside its parameters, as plain values that `build` takes."""
  settings = {'activation': sae.activation.name, 'k': sae.k, 'normalization': sae.normalization}
  scales = {'input_scale': sae.input_scale, 'output_scale': sae.output_scale}
  return {name: value for name, value in settings.items() if value is not None} | {
    name: value for name, value in scales.items() if value != 1
  }


def build(arrays: Mapping[str, np.ndarray], settings: Mapping) -> SparseAutoencoder:
  """Returns an SAE on the ambient mesh from `named_parameters` as host arrays and `settings_of`.

  Raises:
    ValueError: the activation is unknown, an array is missing or one too many, or shapes do not fit; and as
      `SparseAutoencoder`.
  """
  settings = dict(settings)
  kind, k = settings.pop('activation', 'topk'), settings.pop('k', None)
  if kind not in activation_functions.BY_NAME:
    raise ValueError(f'activation {kind!r} is unknown; choose one of {", ".join(activation_functions.BY_NAME)}')
  activation = activation_functions.BY_NAME[kind]
  needed, known = {*PARAMETERS, *activation.parameters}, {*PARAMETERS, *activation.parameters, 'out_bias', 'skip'}
  if needed - arrays.keys() or arrays.keys() - known:
    raise ValueError(f'an SAE of activation {kind!r} has the arrays {sorted(needed)}, not {sorted(arrays)}')
  (n_latents, d), d_out = arrays['encoder'].shape, arrays['decoder'].shape[-1]
  check_settings(n_latents, k, settings.get('normalization', 'none'))
  shapes = {'encoder': (n_latents, d), 'decoder': (n_latents, d_out), 'pre_bias': (d,), 'out_bias': (d_out,)}
  shapes['skip'] = (d_out, d)
  placed = {}
  for name, array in arrays.items():
    shape = shapes.get(name, (n_latents,))
    if array.shape != shape:
      raise ValueError(f'{name} has the shape {list(array.shape)}, not {list(shape)} as the encoder wants it')
    dims = {1: 'latent', 2: 'latent d_model'} if shape[0] == n_latents and name in needed - {'pre_bias'} else {}
    placed[name] = sharding.place(array, dims.get(len(shape), ' '.join(['d_model'] * len(shape))))
  own = {name: placed.pop(name) for name in activation.parameters}
  return SparseAutoencoder(**placed, activation=activation(**own) if k is None else activation(k), **settings)


def save(folder: str | pathlib.Path, sae: SparseAutoencoder):
  """Writes sae.safetensors (float32) and config.json to the folder, all or nothing; what was there is replaced.

  Raises:
    OSError: they cannot be written, for example because the disk is full; what was there stays.
  """
  folder = pathlib.Path(folder)
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  arrays = {name: np.asarray(jax.device_get(param[...]), np.float32) for name, param in named_parameters(sae).items()}
  # Not save_file: on a full disk it raises an error of its own, which is no OSError.
  (partial / 'sae.safetensors').write_bytes(safetensors.save(arrays))
  (partial / 'config.json').write_text(json.dumps(settings_of(sae)))
  shutil.rmtree(folder, ignore_errors=True)
  os.rename(partial, folder)


def load_sae(folder: str | pathlib.Path) -> SparseAutoencoder:
  """Reads what `save` wrote, onto the ambient mesh.

  Raises:
    FileNotFoundError: there is no SAE in the folder.
    ValueError: a file is damaged; and as `SparseAutoencoder`.
  """
  folder = pathlib.Path(folder)
  try:
    settings = json.loads((folder / 'config.json').read_text())
    arrays = safetensors.load_file(folder / 'sae.safetensors')
  except (json.JSONDecodeError, SafetensorError) as e:
    raise ValueError(f'the SAE in {folder} is damaged ({e}); delete that folder and run train.sae again') from e
  return build(arrays, settings)
