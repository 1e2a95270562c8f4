"""The TopK sparse autoencoder (Gao et al. 2024): activations to k active latents and back, and its folder on disk.

A plain pytree of float32 parameters on the ambient mesh, both matrices stored [latent, d] with latents over `model`.
Inputs are normalised on the way in and the normalisation is undone on the way out, so callers see only activations as
the model has them.
"""

import json
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from models import sharding
from models.topk import topk_mask

NORMALIZATIONS = ('none', 'layer_norm_std', 'unit_norm')
NORM_EPS = 1e-5
MEDIAN_STEPS, MEDIAN_EPS = 100, 1e-8  # the latter, in the units of x, lets the iteration pass through a data point
PARAMETERS = ('encoder', 'decoder', 'pre_bias', 'latent_bias')


class InputNorm(NamedTuple):
  """What `encode` took away from an input and `decode` gives back: x = normed * scale + mean."""

  mean: jax.Array
  scale: jax.Array


class SparseAutoencoder(nnx.Module):
  """latents = relu(top_k(encoder (x - pre_bias) + latent_bias)); recons = latents decoder + pre_bias, for normalised x.

  Args:
    encoder: [l, d].
    decoder: [l, d], rows of unit norm.
    pre_bias: [d].
    latent_bias: [l].
    k: latents that stay on; exactly k are selected, fewer are positive where pre-activations are not.
    normalization: 'none'; 'layer_norm_std': minus the mean over d, divided by the standard deviation (of d - 1 degrees
      of freedom) + 1e-5, as for OpenAI's released GPT-2 SAEs; 'unit_norm': minus the mean over d, scaled to norm 1, as
      in the paper.

  Raises:
    ValueError: k is not within 1 and n_latents, the mesh does not divide n_latents, or the normalisation is unknown.
  """

  def __init__(self, encoder, decoder, pre_bias, latent_bias, k: int, normalization: str = 'none'):
    check_settings(encoder.shape[0], k, normalization)
    self.k, self.normalization = k, normalization
    self.encoder = nnx.Param(encoder, out_sharding=('model', None))
    self.decoder = nnx.Param(decoder, out_sharding=('model', None))
    self.pre_bias = nnx.Param(pre_bias, out_sharding=(None,))
    self.latent_bias = nnx.Param(latent_bias, out_sharding=('model',))

  @property
  def n_latents(self) -> int:
    return self.encoder.shape[0]

  def normalize(self, x: jax.Array) -> tuple[jax.Array, InputNorm]:
    """Returns the normalised x [..., d] in float32, and what undoes it."""
    return normalize(x, self.normalization)

  def preacts(self, normed: jax.Array) -> jax.Array:
    """Returns the pre-activations [..., l] of a normalised input [..., d]."""
    return jnp.einsum('...d,ld->...l', normed - self.pre_bias[...], self.encoder[...]) + self.latent_bias[...]

  def encode(self, x: jax.Array) -> tuple[jax.Array, InputNorm]:
    """Returns the latents [..., l], at most k of them positive and the rest 0, and the input's normalisation."""
    normed, norm = self.normalize(x)
    preacts = self.preacts(normed)
    return jnp.where(topk_mask(preacts, self.k), jax.nn.relu(preacts), 0), norm

  def decode(self, latents: jax.Array, norm: InputNorm) -> jax.Array:
    """Returns the reconstruction [..., d] of dense latents [..., l], in the scale of the original input."""
    return self.write(latents, norm) + self.constant(norm)

  def write(self, latents: jax.Array, norm: InputNorm) -> jax.Array:
    """Returns what dense latents [..., l] add to the reconstruction [..., d], in the scale of the original input."""
    return jnp.einsum('...l,ld->...d', latents, self.decoder[...]) * norm.scale

  def constant(self, norm: InputNorm) -> jax.Array:
    """Returns the reconstruction [..., d] without any latent: the pre-bias, in the scale of the original input."""
    return self.pre_bias[...] * norm.scale + norm.mean


def check_settings(n_latents: int, k: int, normalization: str):
  """Raises unless there can be such an SAE on the ambient mesh.

  Raises:
    ValueError: as `SparseAutoencoder`.
  """
  if not 1 <= k <= n_latents:
    raise ValueError(f'k {k} is not within 1 and n_latents {n_latents}; choose a smaller k or more latents')
  if normalization not in NORMALIZATIONS:
    raise ValueError(f'normalization {normalization!r} is unknown; choose one of {", ".join(NORMALIZATIONS)}')
  sharding.check_divides('n_latents', n_latents, 'model')


def normalize(x: jax.Array, normalization: str) -> tuple[jax.Array, InputNorm]:
  """Returns x [..., d] normalised in float32 (see `SparseAutoencoder`), and what undoes it."""
  x = x.astype(jnp.float32)
  if normalization == 'none':
    return x, InputNorm(jnp.zeros(()), jnp.ones(()))
  mean = x.mean(-1, keepdims=True)
  norm = jnp.linalg.norm(x - mean, axis=-1, keepdims=True)
  scale = NORM_EPS + (norm if normalization == 'unit_norm' else norm / (x.shape[-1] - 1) ** 0.5)
  return (x - mean) / scale, InputNorm(mean, scale)


def unit_rows(w_ld: jax.Array) -> jax.Array:
  """Returns the rows scaled to norm 1."""
  return w_ld / jnp.linalg.norm(w_ld, axis=1, keepdims=True)


def geometric_median(x_bd: jax.Array) -> jax.Array:
  """Returns the point [d] with the least sum of distances to x_bd, by Weiszfeld's algorithm, in float32.

  Each iteration averages the rows weighted by 1 / (distance + eps), beginning at the mean.
  """

  def step(_, median_d):
    weight_b = 1 / (jnp.linalg.norm(x_bd - median_d, axis=1) + MEDIAN_EPS)
    return weight_b @ x_bd / weight_b.sum()

  x_bd = x_bd.astype(jnp.float32)
  return jax.lax.fori_loop(0, MEDIAN_STEPS, step, x_bd.mean(0))


def init_sae(
  key: jax.Array, sample_bd: jax.Array, n_latents: int, k: int, normalization: str = 'none'
) -> SparseAutoencoder:
  """Returns a freshly initialised SAE on the ambient mesh, by the rules of OpenAI's released trainer.

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
    pre_bias_d = geometric_median(normalize(sample_bd, normalization)[0])
    return SparseAutoencoder(
      sharding.constrain(encoder_ld, 'latent d_model'),
      sharding.constrain(unit_rows(encoder_ld), 'latent d_model'),
      sharding.constrain(pre_bias_d, 'd_model'),
      sharding.constrain(jnp.zeros(n_latents), 'latent'),
      k,
      normalization,
    )

  @jax.jit
  def rescaled_encoder(sae):
    probes_bd = unit_rows(jax.random.normal(probe_key, (256, d))) + sae.pre_bias[...]
    preacts_bl = sae.preacts(probes_bd)
    latents_bl = jnp.where(topk_mask(preacts_bl, k), jax.nn.relu(preacts_bl), 0)
    return sae.encoder[...] / jnp.linalg.norm(latents_bl @ sae.decoder[...], axis=1).mean()

  sae = init(jnp.asarray(sample_bd))
  sae.encoder[...] = rescaled_encoder(sae)
  return sae


def save(folder: str | pathlib.Path, sae: SparseAutoencoder):
  """Writes sae.safetensors (float32) and config.json to the folder, all or nothing; what was there is replaced.

  Raises:
    OSError: they cannot be written, for example because the disk is full; what was there stays.
  """
  folder = pathlib.Path(folder)
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  arrays = {name: np.asarray(jax.device_get(getattr(sae, name)[...]), np.float32) for name in PARAMETERS}
  # Not save_file: on a full disk it raises an error of its own, which is no OSError.
  (partial / 'sae.safetensors').write_bytes(safetensors.save(arrays))
  (partial / 'config.json').write_text(json.dumps({'k': sae.k, 'normalization': sae.normalization}))
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
    config = json.loads((folder / 'config.json').read_text())
    arrays = safetensors.load_file(folder / 'sae.safetensors')
  except (json.JSONDecodeError, SafetensorError) as e:
    raise ValueError(f'the SAE in {folder} is damaged ({e}); delete that folder and run train.sae again') from e
  check_settings(len(arrays['latent_bias']), **config)
  dims = ('latent d_model', 'latent d_model', 'd_model', 'latent')
  placed = {name: sharding.place(arrays[name], dim) for name, dim in zip(PARAMETERS, dims, strict=True)}
  return SparseAutoencoder(**placed, **config)
