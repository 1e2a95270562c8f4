"""SAEs of every activation and shape, tiny, all dimensions distinct, and inputs for them."""

import numpy as np

from models import sae as sae_lib

B, D, D_OUT, N_LATENTS, K = 9, 6, 7, 10, 3
ACTIVATIONS = ('topk', 'relu', 'jumprelu', 'prolu', 'gated')


def inputs() -> np.ndarray:
  """Returns raw activations [b, d] away from the origin, of another scale each."""
  rng = np.random.default_rng(7)
  return (rng.normal(size=(B, D)) * np.linspace(1, 3, B)[:, None] + 0.5).astype(np.float32)


def sae(activation, normalization='none', transcoder=False, skip=False, d_out=D_OUT, input_scale=1.0, output_scale=1.0):
  """Returns an SAE of random parameters on the ambient mesh; its biases and thresholds all matter."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  arrays = {'encoder': normal(N_LATENTS, D), 'pre_bias': normal(D), 'latent_bias': normal(N_LATENTS)}
  arrays['decoder'] = normal(N_LATENTS, d_out if transcoder else D)
  own = {'threshold': np.abs(normal(N_LATENTS)), 'r_mag': normal(N_LATENTS), 'mag_bias': normal(N_LATENTS)}
  names = {'jumprelu': ('threshold',), 'gated': ('r_mag', 'mag_bias')}.get(activation, ())
  arrays |= {name: own[name] for name in names}
  if transcoder:
    arrays['out_bias'] = normal(d_out)
  if skip:
    arrays['skip'] = normal(d_out, D)
  settings = {'activation': activation, 'normalization': normalization}
  settings |= {'input_scale': input_scale, 'output_scale': output_scale}
  return sae_lib.build(arrays, settings | ({'k': K} if activation == 'topk' else {}))


def forward(sae, x_bd) -> tuple[np.ndarray, np.ndarray]:
  """Returns latents and reconstructions by the class itself, in float32."""
  latents_bl, norm = sae.encode(x_bd)
  return np.asarray(latents_bl), np.asarray(sae.decode(latents_bl, norm))
