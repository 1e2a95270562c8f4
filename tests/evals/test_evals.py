"""Metrics equal a float64 NumPy account of the same model and SAE, and obey their identities, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_interp.evals import downstream, reconstruction
from models import gpt2, sae, sharding, sites
from models.activation_functions import TopK

SITE = 'h.0.resid.post_mlp'
B, T, D, L, K, V, END = 4, 7, 12, 32, 5, 31, 30


@functools.cache
def build(mesh):
  config = gpt2.GPT2Config(n_layer=2, n_head=2, d_model=D, n_ctx=16, n_vocab=V)
  model = jax.jit(lambda: gpt2.GPT2(config, nnx.Rngs(0)))()
  model.wte.embedding[...] *= 30  # random weights predict nearly nothing; these do
  return model


@pytest.fixture
def model(mesh):
  return build(jax.sharding.get_mesh())


def random_sae(normalization):
  rng = np.random.default_rng(1)
  parts = [rng.normal(size=shape).astype(np.float32) for shape in ((L, D), (L, D), (D,), (L,))]
  parts[1] /= np.linalg.norm(parts[1], axis=1, keepdims=True)
  dims = ('latent d_model', 'latent d_model', 'd_model', 'latent')
  placed = [sharding.place(part, dim) for part, dim in zip(parts, dims, strict=True)]
  return sae.SparseAutoencoder(*placed, TopK(K), normalization)


def identity_sae():
  """2 d latents, the positive and the negative part of each channel."""
  eye = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
  return sae.SparseAutoencoder(eye, eye, jnp.zeros(D), jnp.zeros(2 * D), TopK(2 * D))


def acts(n_batches=3, offset=5.0):
  rng = np.random.default_rng(2)
  x = offset + rng.normal(size=(n_batches, B, T, D)) * rng.uniform(0.5, 2, (n_batches, B, T, 1))
  return x.astype(np.float32), rng.uniform(size=(n_batches, B, T)) < 0.8


def tokens(n_batches=2):
  tokens = np.random.default_rng(3).integers(0, END, (n_batches, B, T)).astype(np.int32)
  tokens[0, 1, 2] = tokens[1, 0, 0] = tokens[1, 3, T - 1] = END
  return tokens


def last(sums):
  *_, found = sums
  return found


def numpy_sae(model, x):
  """Returns recons, normed, scale and latents of rows x in float64."""
  encoder, decoder, pre_bias, latent_bias = (np.asarray(getattr(model, n)[...], np.float64) for n in sae.PARAMETERS)
  mean, scale = np.zeros((len(x), 1)), np.ones((len(x), 1))
  if model.normalization == 'layer_norm_std':
    mean, scale = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True) + 1e-5
  normed = (x - mean) / scale
  preacts = (normed - pre_bias) @ encoder.T + latent_bias
  cut = np.sort(preacts, axis=1)[:, -model.k, None]
  latents = np.where(preacts >= cut, np.maximum(preacts, 0), 0)
  return (latents @ decoder + pre_bias) * scale + mean, normed, scale, latents


@pytest.mark.usefixtures('mesh')
@pytest.mark.parametrize('normalization', ['none', 'layer_norm_std'])
def test_reconstruction_metrics_equal_numpy(normalization):
  model = random_sae(normalization)
  x_sbtd, keep_sbt = acts()
  found = dict(reconstruction.metrics(last(reconstruction.measure(model, zip(x_sbtd, keep_sbt, strict=True)))))
  x = x_sbtd[keep_sbt].astype(np.float64)
  recons, normed, scale, latents = numpy_sae(model, x)
  error2, normed_error2 = ((x - recons) ** 2).sum(1), (((x - recons) / scale) ** 2).sum(1)
  x_norm, recons_norm = np.linalg.norm(x, axis=1), np.linalg.norm(recons, axis=1)
  density = (latents > 0).mean(0)
  expected = {
    'normalized_mse': normed_error2.mean() / ((normed - normed.mean(0)) ** 2).sum(1).mean(),
    'normalized_mse_per_token': (error2 / x_norm**2).mean(),
    'explained_variance': 1 - error2.sum() / ((x - x.mean(0)) ** 2).sum(),
    'l0': (latents > 0).sum(1).mean(),
    'dead_latent_fraction': (density == 0).mean(),
    'cosine': ((x * recons).sum(1) / (x_norm * recons_norm)).mean(),
    'l2_ratio': (recons_norm / x_norm).mean(),
    'relative_bias': (recons_norm**2).mean() / (x * recons).sum(1).mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)  # the SAE itself runs in float32
  edges = np.array(found['log10_density_edges'])
  assert edges[0] < np.log10(1 / len(x)) < edges[0] + 1
  assert edges[-1] == 0
  counts = np.histogram(np.log10(density[density > 0]), edges)[0]
  assert found['log10_density_counts'] == counts.tolist()
  assert sum(counts) == (density > 0).sum()


@pytest.mark.usefixtures('mesh')
def test_the_mean_and_a_perfect_reconstruction_score_0_and_1():
  x_sbtd, keep_sbt = acts()
  mean_d = x_sbtd[keep_sbt].mean(0)
  zeros = jnp.zeros((L, D))
  constant = sae.SparseAutoencoder(zeros, zeros, jnp.asarray(mean_d), jnp.zeros(L), TopK(K))
  for model, value, l0 in ((constant, 0.0, 0.0), (identity_sae(), 1.0, D)):
    found = dict(reconstruction.metrics(last(reconstruction.measure(model, zip(x_sbtd, keep_sbt, strict=True)))))
    np.testing.assert_allclose(found['explained_variance'], value, atol=1e-6)
    np.testing.assert_allclose(found['normalized_mse'], 1 - value, atol=1e-6)
    assert found['l0'] == l0


def test_a_transcoder_has_no_reconstruction_of_what_it_reads():
  with jax.set_mesh(sharding.make_mesh()):
    x_sbtd, keep_sbt = acts()
    transcoder = sae.as_transcoder(jax.random.key(0), random_sae('none'), x_sbtd[0, 0])
    with pytest.raises(ValueError, match='a transcoder gives back another site than it reads'):
      last(reconstruction.measure(transcoder, zip(x_sbtd, keep_sbt, strict=True)))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_downstream_metrics_equal_numpy(model):
  """The second layer is run by the model; replacing, masking and averaging are redone in NumPy."""
  spliced_sae, mean_d, tokens_sbt = random_sae('layer_norm_std'), np.linspace(-1, 1, D), tokens()
  batches = [(tokens_bt, tokens_bt != END) for tokens_bt in tokens_sbt]
  sums = last(downstream.measure(model, spliced_sae, SITE, mean_d, batches))
  found = dict(downstream.metrics(sums))
  losses, kls = {run: [] for run in downstream.RUNS}, []
  for tokens_bt, keep_bt in batches:
    clean_btv, captured = sites.forward(model, sharding.place(tokens_bt, 'batch token'), capture=(SITE,))
    x_btd = np.asarray(captured[SITE], np.float64)
    replaced = {
      'clean': x_btd,
      'spliced': numpy_sae(spliced_sae, x_btd.reshape(-1, D))[0].reshape(x_btd.shape),
      'zero_ablated': np.zeros_like(x_btd),
      'mean_ablated': np.broadcast_to(mean_d, x_btd.shape),
    }
    for run, value_btd in replaced.items():
      value_btd = np.where(keep_bt[..., None], value_btd, x_btd).astype(np.float32)
      edits = [sites.patch(SITE, sharding.place(value_btd, 'batch token d_model'))]
      logits_btv, _ = sites.forward(model, sharding.place(tokens_bt, 'batch token'), edits)
      log_probs = log_softmax(np.asarray(logits_btv, np.float64))
      for b, t in np.argwhere(keep_bt[:, 1:] & keep_bt[:, :-1]):
        losses[run].append(-log_probs[b, t, tokens_bt[b, t + 1]])
        if run == 'spliced':
          clean = log_softmax(np.asarray(clean_btv, np.float64)[b, t])
          kls.append(np.sum(np.exp(clean) * (clean - log_probs[b, t])))
  loss = {run: np.mean(values) for run, values in losses.items()}
  assert sums['predictions'] == len(kls) == 2 * B * (T - 1) - 4
  for run, value in loss.items():
    np.testing.assert_allclose(found[f'cross_entropy_{run}'], value, rtol=1e-5)
  np.testing.assert_allclose(found['kl_spliced'], np.mean(kls), rtol=1e-4)
  np.testing.assert_allclose(found['cross_entropy_increase'], loss['spliced'] - loss['clean'], rtol=1e-4)
  for ablation in ('zero', 'mean'):
    ablated = loss[f'{ablation}_ablated']
    expected = (ablated - loss['spliced']) / (ablated - loss['clean'])
    np.testing.assert_allclose(found[f'loss_recovered_{ablation}'], expected, rtol=1e-3)


def test_a_perfect_reconstruction_recovers_all_the_loss(model):
  batches = [(tokens_bt, tokens_bt != END) for tokens_bt in tokens()]
  found = dict(downstream.metrics(last(downstream.measure(model, identity_sae(), SITE, np.zeros(D), batches))))
  assert abs(found['cross_entropy_zero_ablated'] - found['cross_entropy_clean']) > 0.01
  assert found['cross_entropy_zero_ablated'] == found['cross_entropy_mean_ablated']
  np.testing.assert_allclose(found['loss_recovered_zero'], 1, atol=1e-5)
  np.testing.assert_allclose(found['kl_spliced'], 0, atol=1e-6)


def test_no_reconstruction_recovers_nothing(model):
  batches = [(tokens_bt, tokens_bt != END) for tokens_bt in tokens()]
  zeros = jnp.zeros((L, D))
  nothing = sae.SparseAutoencoder(zeros, zeros, jnp.zeros(D), jnp.zeros(L), TopK(K))
  found = dict(downstream.metrics(last(downstream.measure(model, nothing, SITE, np.zeros(D), batches))))
  np.testing.assert_allclose(found['loss_recovered_zero'], 0, atol=1e-6)
