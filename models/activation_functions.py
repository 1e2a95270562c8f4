"""From an encoder's products to latents: what makes a sparse autoencoder TopK, ReLU, JumpReLU, ProLU or gated.

Each is a small pytree that holds the parameters it has beyond the SAE's own. Called with linear [..., l] = encoder
(x - pre_bias) and latent_bias [l], it returns latents [..., l], none of them negative, on any mesh.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.topk import topk_mask


class TopK(nnx.Module):
  """relu of the k largest pre-activations of every token, ties by lowest index (eq. 1 of Gao et al. 2024)."""

  name, parameters = 'topk', ()

  def __init__(self, k: int):
    self.k = k

  def __call__(self, linear: jax.Array, latent_bias: jax.Array) -> jax.Array:
    preacts = linear + latent_bias
    return jnp.where(topk_mask(preacts, self.k), jax.nn.relu(preacts), 0)


class ReLU(nnx.Module):
  """relu(pre-activations)."""

  name, parameters = 'relu', ()

  def __call__(self, linear: jax.Array, latent_bias: jax.Array) -> jax.Array:
    return jax.nn.relu(linear + latent_bias)


class JumpReLU(nnx.Module):
  """Pre-activations where they are above a threshold [l], else 0 (Rajamanoharan et al. 2024b).

  A threshold below 0 counts as 0. It has no gradient here: the straight-through estimates belong to training.
  """

  name, parameters = 'jumprelu', ('threshold',)

  def __init__(self, threshold):
    self.threshold = nnx.Param(threshold, out_sharding=('model',))

  def __call__(self, linear: jax.Array, latent_bias: jax.Array) -> jax.Array:
    preacts = linear + latent_bias
    return jnp.where(preacts > jnp.maximum(self.threshold[...], 0), preacts, 0)


class ProLU(nnx.Module):
  """linear where both it and linear + latent_bias are positive, else 0 (Taggart 2024)."""

  name, parameters = 'prolu', ()

  def __call__(self, linear: jax.Array, latent_bias: jax.Array) -> jax.Array:
    return jnp.where((linear > 0) & (linear + latent_bias > 0), linear, 0)


class Gated(nnx.Module):
  """relu(exp(r_mag) linear + mag_bias) where the gate linear + latent_bias is positive (Rajamanoharan et al. 2024a)."""

  name, parameters = 'gated', ('r_mag', 'mag_bias')

  def __init__(self, r_mag, mag_bias):
    self.r_mag = nnx.Param(r_mag, out_sharding=('model',))
    self.mag_bias = nnx.Param(mag_bias, out_sharding=('model',))

  def __call__(self, linear: jax.Array, latent_bias: jax.Array) -> jax.Array:
    magnitude = jax.nn.relu(jnp.exp(self.r_mag[...]) * linear + self.mag_bias[...])
    return jnp.where(linear + latent_bias > 0, magnitude, 0)


BY_NAME = {kind.name: kind for kind in (TopK, ReLU, JumpReLU, ProLU, Gated)}
