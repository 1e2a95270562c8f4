"""Fifty steps, and in parity mode those of OpenAI's released trainer, are what NumPy makes of them in float64."""

import jax
import numpy as np
import pytest

from jax_interp.sae import losses, optimizer, train_step
from models import sae, sharding
from models.activation_functions import TopK

S, B, D, L, K, AUXK = 50, 48, 16, 128, 4, 8
LEARNING_RATE, EPS, EMA, CLIP = 3e-3, 6.25e-10, 0.9, 12.0
DEAD = 3 * B + 5  # tokens: a latent is dead when it has not fired for more than three steps
COEF = 1 / 4
NAMES = ('encoder', 'decoder', 'pre_bias', 'latent_bias')


def activations():
  rng = np.random.default_rng(0)
  sources = (rng.random((S, B, 40)) < 0.1) * rng.exponential(size=(S, B, 40))
  return (0.3 + sources @ rng.normal(size=(40, D)) + 0.1 * rng.normal(size=(S, B, D))).astype(np.float32)


def unit_rows(w_ld):
  return w_ld / np.linalg.norm(w_ld, axis=1, keepdims=True)


def start():
  rng = np.random.default_rng(1)
  encoder = rng.normal(size=(L, D))
  latent_bias = np.where(np.arange(L) < 30, -100, 0)  # some that never win
  params = dict(zip(NAMES, (encoder, unit_rows(encoder), rng.normal(size=D), latent_bias), strict=True))
  # As float32, so that both begin alike.
  return {name: value.astype(np.float32).astype(np.float64) for name, value in params.items()}


def topk_relu(z_bl, k):
  kept = np.zeros_like(z_bl)
  indices = np.argsort(-z_bl, axis=1, kind='stable')[:, :k]
  np.put_along_axis(kept, indices, np.maximum(np.take_along_axis(z_bl, indices, 1), 0), 1)
  return kept


def one_pass(params, clock_l, x_bd, mse_scale, parity):
  """One forward and backward pass: the loss, what fired, the gradients by hand; in parity mode as train.py does."""
  encoder, decoder, pre_bias, latent_bias = (params[name] for name in NAMES)
  centred = x_bd - pre_bias
  preacts = centred @ encoder.T + latent_bias
  latents = topk_relu(preacts, K)
  recons = latents @ decoder + pre_bias
  error = x_bd - recons
  loss = mse_scale * np.mean(error**2)
  grad_recons = -2 * mse_scale * error / error.size

  clock_l = (
    np.where((latents > 1e-3).any(0), 0, clock_l) + 1 if parity else np.where((latents > 0).any(0), 0, clock_l + 1)
  )
  dead_l = clock_l > DEAD // B
  masked = preacts * dead_l  # times 0, not -inf
  aux_latents = topk_relu(masked, AUXK)
  aux_recons = aux_latents @ decoder + pre_bias
  target = error + pre_bias
  scale = COEF / np.mean((target.mean(0) - target) ** 2) if parity or dead_l.any() else 0
  loss += scale * np.mean((aux_recons - target) ** 2)
  grad_aux = 2 * scale * (aux_recons - target) / target.size

  grad_preacts = (grad_recons @ decoder.T) * (latents > 0) + (grad_aux @ decoder.T) * (aux_latents > 0)
  grads = {
    'encoder': grad_preacts.T @ centred,
    'decoder': latents.T @ grad_recons + aux_latents.T @ grad_aux,
    'latent_bias': grad_preacts.sum(0),
    'pre_bias': (grad_recons + grad_aux).sum(0) - grad_preacts.sum(0) @ encoder,
  }
  return loss, clock_l, grads


def steps(params, acts_sbd, mse_scale, parity):
  """The order within a step: gradients, projection, clip, Adam, decoder to unit norm, average of the new weights.

  In parity mode the decoder comes to unit norm before the projection, and the average is of the old weights.
  """
  clock_l, ema = np.zeros(L, int), dict.fromkeys(NAMES, 0)
  mu, nu = ({name: np.zeros_like(params[name]) for name in NAMES} for _ in range(2))
  curve, n_dead = [], []
  for t, x_bd in enumerate(acts_sbd.astype(np.float64), start=1):
    loss, clock_l, grads = one_pass(params, clock_l, x_bd, mse_scale, parity)
    if parity:
      params['decoder'] = unit_rows(params['decoder'])
    old, decoder = dict(params), params['decoder']
    grads['decoder'] -= np.sum(grads['decoder'] * decoder, axis=1, keepdims=True) * decoder
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    grads = {name: g * min(1, CLIP / norm) for name, g in grads.items()}
    for name in NAMES:
      mu[name] = 0.9 * mu[name] + 0.1 * grads[name]
      nu[name] = 0.999 * nu[name] + 0.001 * grads[name] ** 2
      update = mu[name] / (1 - 0.9**t) / (np.sqrt(nu[name] / (1 - 0.999**t)) + EPS)
      params[name] = params[name] - LEARNING_RATE * update
    if not parity:
      params['decoder'] = unit_rows(params['decoder'])
    for name in NAMES:
      ema[name] = EMA * ema[name] + (1 - EMA) * (old if parity else params)[name]
    curve.append((loss, norm))
    n_dead.append((clock_l > DEAD // B).sum())
  return params, ema, np.array(curve), n_dead


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize('parity', [False, True], ids=['ours', 'parity'])
def test_fifty_steps_are_those_of_numpy(shape, parity):
  acts_sbd = activations()
  params = start()
  recipe = losses.TopK(((K, 1.0),), AUXK, COEF, DEAD, parity=parity)
  tx = optimizer.adam(LEARNING_RATE, eps=EPS, clip=CLIP)
  with jax.enable_x64(True), jax.set_mesh(sharding.make_mesh(*shape)):
    dims = ('latent d', 'latent d', 'd', 'latent')
    placed = {name: sharding.place(params[name], dim) for name, dim in zip(NAMES, dims, strict=True)}
    model = sae.SparseAutoencoder(**placed, activation=TopK(K))
    state = train_step.init_state(model, acts_sbd[0], tx, EMA)
    mse_scale = float(state.mse_scale)
    state, metrics = train_step.train_steps(state, acts_sbd, tx, recipe, EMA)
    trained = train_step.trained_sae(state, EMA)
    ours, average, kept = (
      {name: np.asarray(getattr(found, name)[...]) for name in NAMES} for found in (state.sae, state.ema, trained)
    )
  sample_bd = acts_sbd[0].astype(np.float64)
  np.testing.assert_allclose(1 / mse_scale, np.mean((sample_bd - sample_bd.mean(0)) ** 2), rtol=1e-6)
  expected, expected_average, curve, n_dead = steps(params, acts_sbd, mse_scale, parity)
  assert n_dead[0] == 0  # where in parity mode AuxK still moves pre_bias
  assert min(n_dead[10:]) >= 30
  assert (curve[:, 1] > CLIP).any()
  assert (curve[:, 1] < CLIP).any()
  np.testing.assert_array_equal(metrics['dead'], n_dead)
  # Optax corrects the moments with float32 powers of the decay.
  np.testing.assert_allclose(metrics['loss'], curve[:, 0], rtol=1e-6)
  np.testing.assert_allclose(metrics['grad_norm'], curve[:, 1], rtol=1e-6)
  for name in NAMES:
    np.testing.assert_allclose(ours[name], expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(average[name], expected_average[name], rtol=1e-6, atol=1e-7, err_msg=name)
    corrected = expected_average[name] / (1 - EMA**S)
    corrected = unit_rows(corrected) if name == 'decoder' else corrected
    np.testing.assert_allclose(kept[name], corrected, rtol=1e-6, atol=1e-7, err_msg=name)
