"""The sparse autoencoder: encoding, both normalisations, initialisation, and its folder."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import activation_functions, sae, sharding

B, T, D, L, K = 4, 6, 32, 256, 5


def activations(seed=0):
  return np.random.default_rng(seed).normal(3, 2, size=(B, T, D)).astype(np.float32)


def example(normalization='none'):
  sample_bd = activations(1).reshape(-1, D)
  scale = sae.expected_average_scale(sample_bd) if normalization == 'constant' else 1.0
  return sae.init_sae(jax.random.key(0), sample_bd, L, K, normalization, scale)


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
    'constant': np.full_like(mean, np.linalg.norm(activations(1).reshape(-1, D), axis=1).mean() / D**0.5),
  }[normalization]
  mean = np.zeros_like(mean) if normalization in ('none', 'constant') else mean
  preacts = ((x - mean) / scale - pre_bias) @ encoder.T
  expected = np.where(preacts >= np.sort(preacts)[..., -K, None], np.maximum(preacts, 0), 0)
  np.testing.assert_allclose(latents, expected, atol=1e-5)  # sums of 32 float32 products of size about 1
  assert (np.count_nonzero(latents, axis=-1) == K).all()
  expected_recons = (expected @ decoder + pre_bias) * scale + mean
  np.testing.assert_allclose(model.decode(latents, norm), expected_recons, rtol=1e-4, atol=1e-4)


def _with_active(n_active, n_latents, n_inputs=5):
  """Returns latents [input, latent] of both signs, n_active of the last input and fewer of the others."""
  rng, latents_bl = np.random.default_rng(n_active), np.zeros((n_inputs, n_latents), np.float32)
  for row, x_l in enumerate(latents_bl):
    n = n_active * (row + 1) // n_inputs
    x_l[rng.choice(n_latents, n, replace=False)] = rng.normal(size=n)
  return latents_bl


@pytest.fixture(params=[(1, 1), (2, 1), (2, 2)], ids=['1x1', '2x1', '2x2'])
def any_mesh(request):
  with jax.set_mesh(sharding.make_mesh(*request.param)):
    yield


@pytest.mark.usefixtures('any_mesh')
@pytest.mark.parametrize('normalization', ['constant', 'unit_norm'])
@pytest.mark.parametrize('n_active', [0, 7, sae.N_ACTIVE, sae.N_ACTIVE + 1])
def test_however_many_latents_are_active_writes_and_their_gradients_are_exact(normalization, n_active):
  n_latents, rng = 2 * sae.MIN_LATENTS, np.random.default_rng(0)
  model = sae.init_sae(jax.random.key(0), activations(1).reshape(-1, D), n_latents, K, normalization, 0.5)
  latents_bl, x_bd = _with_active(n_active, n_latents), activations().reshape(-1, D)[:5]
  norm = model.normalize(x_bd)[1]
  decoder_ld, scale_b1 = np.asarray(model.decoder[...], np.float64), np.asarray(norm.scale, np.float64)
  found_bd = jax.jit(lambda m, x: m.write(x, norm))(model, latents_bl)
  np.testing.assert_allclose(found_bd, latents_bl @ decoder_ld * scale_b1, rtol=1e-5, atol=1e-5)  # float32 sums
  y_nbd = rng.normal(size=(2, *x_bd.shape)).astype(np.float32)
  reads_nbl = (y_nbd * scale_b1) @ decoder_ld.T
  along_nbl = jax.jit(lambda m, x: m.written_along(x, norm, y_nbd))(model, latents_bl)
  np.testing.assert_allclose(along_nbl, latents_bl * reads_nbl, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(model.read(y_nbd[1], norm), reads_nbl[1], rtol=1e-4, atol=1e-4)
  product = lambda m, x: (m.write(x, norm) * y_nbd[0]).sum()
  of_model, of_latents_bl = jax.jit(jax.grad(product, argnums=(0, 1)))(model, latents_bl)
  np.testing.assert_allclose(of_latents_bl, reads_nbl[0], rtol=1e-4, atol=1e-4)  # also of those that are zero
  expected_ld = latents_bl.T @ (y_nbd[0] * scale_b1)
  np.testing.assert_allclose(of_model.decoder[...], expected_ld, rtol=1e-4, atol=1e-5)
  step_bl = rng.normal(size=latents_bl.shape).astype(np.float32)
  slope_bd = jax.jvp(lambda x: model.write(x, norm), (latents_bl,), (step_bl,))[1]
  np.testing.assert_allclose(slope_bd, step_bl @ decoder_ld * scale_b1, rtol=1e-4, atol=1e-3)  # sums of 4,096


def test_only_active_rows_of_the_decoder_are_read():
  """Not-a-numbers in all other rows do not reach what is written."""
  n_latents = sae.MIN_LATENTS
  latents_bl = _with_active(9, n_latents)
  off_l = (latents_bl == 0).all(0)
  with jax.set_mesh(sharding.make_mesh()):
    model = sae.init_sae(jax.random.key(0), activations(1).reshape(-1, D), n_latents, K, 'none')
    norm = model.normalize(activations().reshape(-1, D)[:5])[1]
    expected_bd = model.write(latents_bl, norm)
    off_l[: 2 * sae.N_ACTIVE] = False  # rows of the first latents that are off fill the places that are left
    model.decoder[...] = jnp.where(off_l[:, None], jnp.nan, model.decoder[...])
    np.testing.assert_array_equal(model.write(latents_bl, norm), expected_bd)


@pytest.mark.parametrize(
  ('n_latents', 'n_inputs'), [(8, 3), (sae.MIN_LATENTS, 3), (sae.MIN_LATENTS, sae.SPARSE_INPUTS + 1)]
)
def test_where_nothing_is_active_the_decoder_is_not_read(mesh, n_latents, n_inputs):
  model = sae.init_sae(jax.random.key(0), activations(1).reshape(-1, D), n_latents, K, 'none')
  norm = model.normalize(np.ones((n_inputs, D), np.float32))[1]
  model.decoder[...] *= jnp.nan
  nothing_bl = np.zeros((n_inputs, n_latents), np.float32)
  assert not np.any(jax.jit(lambda m, x: m.write(x, norm))(model, nothing_bl))
  assert not np.any(jax.jit(lambda m, x: m.written_along(x, norm, np.ones((2, n_inputs, D), 'f')))(model, nothing_bl))


def test_no_inputs_write_nothing(mesh):
  model = sae.init_sae(jax.random.key(0), activations(1).reshape(-1, D), sae.MIN_LATENTS, K, 'none')
  norm = model.normalize(np.ones((0, D), np.float32))[1]
  assert model.write(np.zeros((0, sae.MIN_LATENTS), np.float32), norm).shape == (0, D)


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


@pytest.mark.parametrize('offset', [0, 1000])
def test_median_leaves_a_data_point_that_it_begins_at(offset):
  x_b1 = np.array([[-5.0], [5], [6], [6], [13]]) + offset  # the mean is the second
  np.testing.assert_allclose(sae.geometric_median(jnp.asarray(x_b1)), [6 + offset], atol=1e-2)


@pytest.mark.parametrize(
  ('n_latents', 'k', 'normalization', 'message'),
  [
    (L, L + 1, 'none', r'k 257 is not within 1 and n_latents 256; choose a smaller k'),
    (L, 0, 'none', r'k 0 is not within'),
    (L, K, 'batch_norm', r"'batch_norm' is unknown; choose one of none, layer_norm_std, unit_norm, constant"),
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
  assert json.loads((tmp_path / 'final/config.json').read_text()) == {
    'activation': 'topk',
    'k': K,
    'normalization': 'unit_norm',
  }
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


def random_parameters(kind, d_out=None):
  """Host arrays of an SAE, or a transcoder to d_out, of an activation function."""
  rng = np.random.default_rng(3)
  arrays = {name: rng.normal(size=(L, D)) for name in ('encoder', 'decoder')}
  arrays |= {'pre_bias': rng.normal(size=D), 'latent_bias': rng.normal(size=L)}
  arrays |= {name: rng.normal(size=L) for name in activation_functions.BY_NAME[kind].parameters}
  if d_out:
    arrays |= {'decoder': rng.normal(size=(L, d_out)), 'out_bias': rng.normal(size=d_out)}
    arrays |= {'skip': rng.normal(size=(d_out, D))}
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def latents_in_float64(kind, linear, p):
  """Each activation function as its paper writes it, in NumPy."""
  preacts = linear + p['latent_bias']
  if kind == 'topk':
    return np.where(preacts >= np.sort(preacts)[..., -K, None], np.maximum(preacts, 0), 0)
  if kind == 'relu':
    return np.maximum(preacts, 0)
  if kind == 'jumprelu':
    return preacts * (preacts > 0) * (preacts > p['threshold'])
  if kind == 'prolu':
    return linear * (linear > 0) * (preacts > 0)
  return (preacts > 0) * np.maximum(np.exp(p['r_mag']) * linear + p['mag_bias'], 0)


@pytest.mark.parametrize('kind', activation_functions.BY_NAME)
@pytest.mark.parametrize('d_out', [None, 20], ids=['sae', 'transcoder'])
def test_every_activation_is_its_formula_in_float64_and_comes_back_from_disk(mesh, tmp_path, kind, d_out):
  arrays = random_parameters(kind, d_out)
  scales = {'normalization': 'constant', 'input_scale': 0.5} | ({'output_scale': 0.25} if d_out else {})
  settings = {'activation': kind, **scales} | ({'k': K} if kind == 'topk' else {})
  sae.save(tmp_path / 'sae', sae.build(arrays, settings))
  model = sae.load_sae(tmp_path / 'sae')
  assert sae.settings_of(model) == settings
  for name, param in sae.named_parameters(model).items():
    np.testing.assert_array_equal(param[...], arrays[name], err_msg=name)
  x = activations()
  latents, norm = jax.jit(lambda m, x: m.encode(x))(model, x)
  p = {name: array.astype(np.float64) for name, array in arrays.items()}
  centred = 0.5 * x - p['pre_bias']
  expected = latents_in_float64(kind, centred @ p['encoder'].T, p)
  np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-4)  # sums of 32 products of size about 3
  recons = expected @ p['decoder'] + (p['out_bias'] + centred @ p['skip'].T if d_out else p['pre_bias'])
  expected_recons = recons / (0.25 if d_out else 0.5)
  np.testing.assert_allclose(model.decode(latents, norm), expected_recons, atol=1e-5 * np.abs(expected_recons).max())


@pytest.mark.parametrize('row_norm', [1.0, 0.1, None])
def test_tied_rows_have_the_norm_asked_for_on_any_mesh(mesh, row_norm):
  sample_bd = activations(1).reshape(-1, D)
  relu = activation_functions.ReLU()
  model = sae.init_tied(jax.random.key(0), sample_bd, L, relu, row_norm=row_norm, median=False)
  if row_norm is None:
    probes_bd = np.random.default_rng(0).normal(size=(1024, D)).astype(np.float32)
    probes_bd /= np.linalg.norm(probes_bd, axis=1, keepdims=True)
    mean_norm = np.linalg.norm(model.decode(*model.encode(probes_bd)), axis=1).mean()
    np.testing.assert_allclose(mean_norm, 1, rtol=0.03)  # other probes than those it was scaled by
    model.encoder[...] /= jnp.linalg.norm(model.encoder[...], axis=1).mean()
    row_norm = 1
  np.testing.assert_allclose(model.encoder[...], model.decoder[...], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(np.linalg.norm(model.decoder[...], axis=1), row_norm, rtol=1e-6)
  assert not np.any(model.pre_bias[...])
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    other = sae.init_tied(jax.random.key(0), sample_bd, L, relu, row_norm=row_norm)
    np.testing.assert_allclose(other.encoder[...], model.encoder[...], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(other.pre_bias[...], sae.geometric_median(jnp.asarray(sample_bd)), rtol=1e-5)


def test_a_transcoder_starts_at_the_targets_median_in_their_scale(mesh):
  targets_bd = np.random.default_rng(5).normal(2, 3, size=(64, 20)).astype(np.float32)
  model = sae.as_transcoder(jax.random.key(0), example(), targets_bd, skip=True)
  scaled_bd = targets_bd * model.output_scale
  np.testing.assert_allclose(np.linalg.norm(scaled_bd, axis=1).mean(), 20**0.5, rtol=1e-5)
  np.testing.assert_allclose(model.out_bias[...], sae.geometric_median(jnp.asarray(scaled_bd)), rtol=1e-5)
  assert model.decoder[...].shape == (L, 20)
  assert model.skip[...].shape == (20, D)


@pytest.mark.usefixtures('mesh')
@pytest.mark.parametrize(
  ('settings', 'changes', 'message'),
  [
    ({'activation': 'step'}, {}, "activation 'step' is unknown; choose one of topk, relu, jumprelu, prolu, gated"),
    ({'activation': 'jumprelu'}, {}, r"activation 'jumprelu' has the arrays .*'threshold'\], not"),
    ({'activation': 'relu'}, {'pre_bias': np.zeros(3)}, r'pre_bias has the shape \[3\], not \[32\]'),
    ({'activation': 'relu'}, {'skip': np.zeros((D, D))}, 'a skip connection is of a transcoder'),
    ({'activation': 'relu', 'normalization': 'unit_norm'}, {'out_bias': np.zeros(D)}, 'not those of its target'),
  ],
)
def test_what_is_no_sae_raises(settings, changes, message):
  with pytest.raises(ValueError, match=message):
    sae.build(random_parameters('relu') | changes, settings)
