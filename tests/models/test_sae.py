"""The sparse autoencoder: encoding, both normalisations, initialisation, and its folder."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sae, sharding

B, T, D, L, K = 4, 6, 32, 256, 5


def activations(seed=0):
  return np.random.default_rng(seed).normal(3, 2, size=(B, T, D)).astype(np.float32)


def example(normalization='none'):
  return sae.init_sae(jax.random.key(0), activations(1).reshape(-1, D), L, K, normalization)


@pytest.mark.parametrize('normalization', sae.NORMALIZATIONS)
def test_encode_and_decode_are_the_formulas_in_float64(mesh, normalization):
  model, x = example(normalization), activations()
  latents, norm = jax.jit(lambda m, x: m.encode(x))(model, x)
  encoder, decoder, pre_bias = (np.asarray(p[...], np.float64) for p in (model.encoder, model.decoder, model.pre_bias))
  x = x.astype(np.float64)
  mean = x.mean(-1, keepdims=True)
  scale = {
    'none': np.ones_like(mean),
    'layer_norm_std': x.std(-1, ddof=1, keepdims=True) + 1e-5,
    'unit_norm': np.linalg.norm(x - mean, axis=-1, keepdims=True) + 1e-5,
  }[normalization]
  mean = np.zeros_like(mean) if normalization == 'none' else mean
  preacts = ((x - mean) / scale - pre_bias) @ encoder.T
  expected = np.where(preacts >= np.sort(preacts)[..., -K, None], np.maximum(preacts, 0), 0)
  np.testing.assert_allclose(latents, expected, atol=1e-5)  # sums of 32 float32 products of size about 1
  assert (np.count_nonzero(latents, axis=-1) == K).all()
  expected_recons = (expected @ decoder + pre_bias) * scale + mean
  np.testing.assert_allclose(model.decode(latents, norm), expected_recons, rtol=1e-4, atol=1e-4)


def test_initialisation_is_tied_and_does_not_depend_on_the_mesh(mesh):
  model = example('layer_norm_std')
  encoder = np.asarray(model.encoder[...])
  np.testing.assert_allclose(np.linalg.norm(model.decoder[...], axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(
    model.decoder[...] * np.linalg.norm(encoder, axis=1, keepdims=True), encoder, rtol=1e-5, atol=1e-7
  )
  assert not np.any(model.latent_bias[...])
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    np.testing.assert_allclose(encoder, example('layer_norm_std').encoder[...], rtol=1e-6)  # a mean over 256 norms


def test_the_encoder_returns_unit_vectors_with_norm_one(mesh):
  model = example()
  probes = np.random.default_rng(0).normal(size=(1024, D)).astype(np.float32)
  probes = probes / np.linalg.norm(probes, axis=1, keepdims=True) + model.pre_bias[...]
  recons = model.decode(*jax.jit(lambda m, x: m.encode(x))(model, probes))
  mean_norm = np.linalg.norm(recons - model.pre_bias[...], axis=1).mean()
  np.testing.assert_allclose(mean_norm, 1, rtol=0.03)  # other probes than those it was scaled by


def test_geometric_median_resists_outliers_and_minimises_the_distances():
  rng = np.random.default_rng(0)
  x_bd = rng.normal(size=(200, 3))
  x_bd[:20] += 100
  median_d = np.asarray(sae.geometric_median(jnp.asarray(x_bd)), np.float64)
  total = lambda point_d: np.linalg.norm(x_bd - point_d, axis=1).sum()
  assert np.linalg.norm(median_d) < 0.5
  assert np.linalg.norm(x_bd.mean(0)) > 10
  for nudge_d in 0.01 * np.concatenate([np.eye(3), -np.eye(3)]):
    assert total(median_d) < total(median_d + nudge_d)


def test_median_of_points_on_a_line_passes_through_a_data_point():
  x_bd = np.array([[0.0, 0], [1, 0], [2, 0], [3, 0], [100, 0]])  # its mean is no data point, its median is
  np.testing.assert_allclose(sae.geometric_median(jnp.asarray(x_bd)), [2, 0], atol=1e-3)


@pytest.mark.parametrize(
  ('n_latents', 'k', 'normalization', 'message'),
  [
    (L, L + 1, 'none', r'k 257 is not within 1 and n_latents 256; choose a smaller k'),
    (L, 0, 'none', r'k 0 is not within'),
    (L, K, 'batch_norm', r"'batch_norm' is unknown; choose one of none, layer_norm_std, unit_norm"),
  ],
)
def test_bad_sizes_raise_and_name_the_way_out(mesh, n_latents, k, normalization, message):
  with pytest.raises(ValueError, match=message):
    sae.init_sae(jax.random.key(0), np.zeros((8, D), np.float32), n_latents, k, normalization)


def test_latents_that_the_mesh_does_not_divide_raise():
  message = 'n_latents 100 is not divisible by the model axis 3; choose a multiple or shrink the axis'
  with jax.set_mesh(sharding.make_mesh(1, 3)), pytest.raises(ValueError, match=message):
    sae.init_sae(jax.random.key(0), np.zeros((8, D), np.float32), 100, 4)


def test_a_saved_sae_loads_as_it_was_on_any_mesh(tmp_path, mesh):
  model = example('unit_norm')
  for _ in range(2):  # the second replaces the first
    sae.save(tmp_path / 'final', model)
  assert sorted(path.name for path in tmp_path.rglob('*.*')) == ['config.json', 'sae.safetensors']
  assert json.loads((tmp_path / 'final/config.json').read_text()) == {'k': K, 'normalization': 'unit_norm'}
  for shape in [(1, 1), (1, 4)]:
    with jax.set_mesh(sharding.make_mesh(*shape)):
      loaded = sae.load_sae(tmp_path / 'final')
      assert (loaded.k, loaded.normalization, loaded.n_latents) == (K, 'unit_norm', L)
      assert loaded.encoder[...].sharding.shard_shape((L, D)) == (L // shape[1], D)
      for name in sae.PARAMETERS:
        np.testing.assert_array_equal(getattr(loaded, name)[...], getattr(model, name)[...])


@pytest.mark.usefixtures('mesh')
@pytest.mark.parametrize('name', ['sae.safetensors', 'config.json'])
@pytest.mark.parametrize('kept', [0, 0.5, 0.99], ids=str)
def test_a_damaged_sae_says_what_to_do(tmp_path, name, kept):
  sae.save(tmp_path / 'final', example())
  content = (tmp_path / 'final' / name).read_bytes()
  (tmp_path / 'final' / name).write_bytes(content[: int(kept * len(content))])
  with pytest.raises(ValueError, match=r'the SAE in .*final is damaged \(.*delete that folder and run train.sae again'):
    sae.load_sae(tmp_path / 'final')


@pytest.mark.usefixtures('mesh')
def test_an_sae_that_cannot_be_written_is_an_os_error_and_the_one_before_stays(tmp_path):
  sae.save(tmp_path / 'final', example())
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes of a file: what a full disk is to the caller
  try:
    with pytest.raises(OSError):
      sae.save(tmp_path / 'final', example())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert sae.load_sae(tmp_path / 'final').k == K
