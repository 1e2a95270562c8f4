"""The end-to-end loss: nothing is lost where the SAE is exact, gradients are finite differences, training lowers it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import end_to_end, optimizer, train_step
from models import sae, sharding, sites
from models.activation_functions import JumpReLU, ReLU, TopK
from tests.models import families

SITE, D, L, K = 'h.1.resid.post_mlp', 32, 64, 6
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(53, size=(8, 12)).astype(np.int32)
KEEP = RNG.random((8, 12)) < 0.8
CLOCK = np.zeros(L, np.int32)


def acts_of(model):
  return sites.forward(model, TOKENS, capture=(SITE,))[1][SITE]


def dictionary(model, normalization='layer_norm_std'):
  return sae.init_sae(jax.random.key(0), np.asarray(acts_of(model)).reshape(-1, D), L, K, normalization)


def run(objective, dictionary, model, keep=KEEP):
  return jax.jit(objective.loss_and_grads)(dictionary, model, TOKENS, keep, CLOCK, 0.5)


def test_an_exact_sae_loses_nothing(mesh):
  model = families.build('gpt2')
  identity = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
  exact = sae.SparseAutoencoder(identity, identity, jnp.zeros(D), jnp.zeros(L), ReLU())
  metrics, _, _ = run(end_to_end.EndToEnd(SITE), exact, model)
  np.testing.assert_allclose([metrics['kl'], metrics['normalized_mse']], 0, atol=1e-6)
  logits, _ = sites.forward(model, TOKENS)
  counted = KEEP[:, 1:] & KEEP[:, :-1]
  log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  text = -np.take_along_axis(log_probs[:, :-1], TOKENS[:, 1:, None], 2)[..., 0][counted].mean()
  np.testing.assert_allclose(metrics['cross_entropy'], text, rtol=1e-5)


@pytest.mark.parametrize('divergence', end_to_end.DIVERGENCES)
def test_the_loss_is_that_of_the_clean_and_the_spliced_logits_in_float64(divergence):
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    model = families.build('gpt2')
    made = dictionary(model)
    made.decoder[...] *= 4  # far off, so that KL(spliced || clean) is another
    metrics, _, _ = run(end_to_end.EndToEnd(SITE, divergence, mse_coef=0.3, l1_coef=0.01), made, model)
    latents_btl, norm = made.encode(acts_of(model))
    recons_btd = made.decode(latents_btl, norm)
    error_btd = np.asarray((recons_btd - acts_of(model)) / norm.scale, np.float64)
    splice = sites.patch(SITE, recons_btd, KEEP[..., None])
    logits = [np.asarray(sites.forward(model, TOKENS, edits)[0], np.float64)[:, :-1] for edits in ([], [splice])]
  clean, spliced = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
  counted = KEEP[:, 1:] & KEEP[:, :-1]
  kl_of = lambda p, q: (np.exp(p) * (p - q)).sum(-1)[counted].mean()
  kl = kl_of(clean, spliced)
  text = -np.take_along_axis(spliced, TOKENS[:, 1:, None], 2)[..., 0][counted].mean()
  assert abs(kl_of(spliced, clean) / kl - 1) > 0.01
  np.testing.assert_allclose([metrics['kl'], metrics['cross_entropy']], [kl, text], rtol=1e-5)
  mse, l1 = 0.5 * np.mean(error_btd[KEEP] ** 2), np.asarray(latents_btl, np.float64)[KEEP].sum(1).mean()
  expected = (kl if divergence == 'kl' else text) + 0.3 * mse + 0.01 * l1
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)


@pytest.mark.parametrize('divergence', end_to_end.DIVERGENCES)
@pytest.mark.parametrize('kind', [TopK(K), ReLU()], ids=['topk', 'relu'])
def test_gradients_are_finite_differences(mesh, divergence, kind):
  model = families.build('gpt2')
  made = sae.with_activation(dictionary(model), kind)
  objective = end_to_end.EndToEnd(SITE, divergence, mse_coef=0.3, l1_coef=0.01)
  _, _, grads = run(objective, made, model)
  loss = lambda made: float(run(objective, made, model)[0]['loss'])
  rng = np.random.default_rng(1)
  # A TopK loss jumps where two latents swap, which no step of the decoder does.
  for name in ['decoder'] if isinstance(kind, TopK) else sae.PARAMETERS:
    value, grad = getattr(made, name)[...], np.asarray(getattr(grads, name)[...])
    direction = grad / np.linalg.norm(grad) + 0.3 * rng.normal(size=grad.shape) / grad.size**0.5
    step, losses = 2e-4, []
    for sign in (1, -1):
      moved = jax.tree.map(lambda x: x, made)
      getattr(moved, name)[...] = value + sign * step * direction.astype(np.float32)
      losses.append(loss(moved))
    # Rounding is some percent of so short a step; a longer one meets kinks, where latents switch on.
    slope = (losses[0] - losses[1]) / (2 * step)
    np.testing.assert_allclose(slope, np.sum(grad * direction), rtol=0.06, err_msg=name)


def test_only_kept_tokens_are_replaced_and_counted(mesh):
  model = families.build('gpt2')
  nothing = np.zeros_like(KEEP)
  metrics, clock, grads = run(end_to_end.EndToEnd(SITE, mse_coef=1.0), dictionary(model), model, nothing)
  assert metrics['loss'] == 0
  assert metrics['l0'] == 0
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
  np.testing.assert_array_equal(clock, CLOCK)
  metrics, clock, _ = run(end_to_end.EndToEnd(SITE, dead_tokens=5), dictionary(model), model)
  latents = np.asarray(dictionary(model).encode(acts_of(model))[0])[KEEP]
  fired = (latents > 0).any(0)
  np.testing.assert_array_equal(clock, np.where(fired, 0, KEEP.sum()))
  assert metrics['dead'] == (~fired).sum()
  np.testing.assert_allclose(metrics['l0'], (latents > 0).sum(1).mean(), rtol=1e-6)


def test_training_lowers_the_divergence_alike_on_every_mesh():
  curves = []
  for shape in [(1, 1), (2, 2)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      model, tx, objective = families.build('gpt2'), optimizer.adam(3e-3), end_to_end.EndToEnd(SITE)
      sample_bd = np.asarray(acts_of(model)).reshape(-1, D)
      state = train_step.init_state(dictionary(model), sample_bd, tx, 0.9)
      curve = []
      for _ in range(30):
        state, metrics = end_to_end.train(state, model, TOKENS, KEEP, tx, objective, 0.9)
        curve.append(float(metrics['kl']))
      np.testing.assert_allclose(np.linalg.norm(state.sae.decoder[...], axis=1), 1, rtol=1e-5)
      curves.append(curve)
  assert curves[0][-1] < 0.6 * curves[0][0]
  np.testing.assert_allclose(curves[0][:5], curves[1][:5], rtol=1e-3)


def test_what_has_no_gradient_of_its_own_raises(mesh):
  model = families.build('gpt2')
  jump = sae.with_activation(dictionary(model), JumpReLU(jnp.zeros(L)))
  with pytest.raises(
    ValueError, match="activation 'jumprelu' cannot be trained end to end; choose an SAE of topk, relu"
  ):
    run(end_to_end.EndToEnd(SITE), jump, model)
  with pytest.raises(ValueError, match="divergence 'l2' is unknown; choose one of kl, cross_entropy"):
    end_to_end.EndToEnd(SITE, 'l2')
