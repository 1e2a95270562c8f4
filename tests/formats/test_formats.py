"""Every SAE through every format that can hold it, and every file of theirs, against the class and their formulas."""

import json
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_interp.formats import dictionary_learning, gemma_scope, openai, ours, plain, saelens, sparsify, torch_files
from models import sae as sae_lib
from models import sharding
from tests.formats import saes

FORMATS = (ours, openai, saelens, sparsify, dictionary_learning, gemma_scope)
LN = {'normalization': 'layer_norm_std'}
SCALED = {'normalization': 'constant', 'input_scale': 0.3}
TRANSCODER = {'transcoder': True, **SCALED, 'output_scale': 1.7}
SQUARE = {**TRANSCODER, 'd_out': saes.D}
# What a format holds: the SAE, and the activation that it is of when it comes back.
HELD = [
  *((ours, activation, kind, activation) for activation in saes.ACTIVATIONS for kind in ({}, LN, SCALED)),
  *((ours, activation, {**TRANSCODER, 'skip': True}, activation) for activation in saes.ACTIVATIONS),
  (ours, 'topk', {'normalization': 'unit_norm'}, 'topk'),
  (openai, 'topk', LN, 'topk'),
  (openai, 'relu', {}, 'relu'),
  (openai, 'relu', SCALED, 'relu'),
  *(
    (saelens, activation, kind, 'jumprelu' if activation == 'prolu' else activation)
    for activation in saes.ACTIVATIONS
    for kind in ({}, LN, SCALED)
  ),
  *(
    (saelens, activation, {**TRANSCODER, 'skip': skip}, 'relu' if activation == 'relu' else 'jumprelu')
    for activation in ('relu', 'jumprelu', 'prolu', 'gated')
    for skip in (False, True)
  ),
  *((sparsify, 'topk', kind, 'topk') for kind in ({}, SCALED, SQUARE, {**SQUARE, 'skip': True})),
  *(
    (dictionary_learning, activation, kind, 'jumprelu' if activation == 'prolu' else activation)
    for activation in saes.ACTIVATIONS
    for kind in ({}, SCALED)
  ),
  *(
    (gemma_scope, activation, kind, 'jumprelu')
    for activation in ('relu', 'jumprelu', 'prolu', 'gated')
    for kind in ({}, SCALED, TRANSCODER)
  ),
]


@pytest.fixture(autouse=True)
def _one_device():
  with jax.set_mesh(sharding.make_mesh()):
    yield


def _id(value):
  return (
    getattr(value, '__name__', str(value)).split('.')[-1] if not isinstance(value, dict) else '-'.join(value) or 'plain'
  )


# Latents of up to 30 and sums of 10 of them, in float32; OpenAI and SAELens undo a division by std + 1e-5 by std alone.
CLOSE = {'rtol': 2e-5, 'atol': 1e-4}


@pytest.mark.parametrize(('form', 'activation', 'kind', 'comes_back'), HELD, ids=_id)
def test_a_written_sae_computes_the_same(tmp_path, form, activation, kind, comes_back):
  sae, x_bd = saes.sae(activation, **kind), saes.inputs()
  path = tmp_path / 'sae'
  form.write(path, sae)
  assert [other for other in FORMATS if other.detect(path)] == [form]
  arrays, settings = form.read(path)
  assert settings['activation'] == comes_back
  assert all(array.dtype == np.float32 for array in arrays.values())
  back = sae_lib.build(arrays, settings)
  expected = saes.forward(sae, x_bd)
  assert 0 < (expected[0] > 0).mean() < 1
  for found in (saes.forward(back, x_bd), form.outputs(path, x_bd)):
    for ours_is, theirs_is in zip(expected, found, strict=True):
      np.testing.assert_allclose(theirs_is, ours_is, **CLOSE)
  # What comes back is written as the same numbers: nothing is folded twice.
  again = tmp_path / 'again'
  form.write(again, back)
  for first, second in zip(form.outputs(path, x_bd), form.outputs(again, x_bd), strict=True):
    np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-5)
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ['again', 'sae']


@pytest.mark.parametrize(
  ('form', 'activation', 'kind'),
  [
    *((form, activation, {}) for form in (ours, saelens) for activation in ('topk', 'relu', 'jumprelu', 'gated')),
    (openai, 'topk', LN),
    (openai, 'relu', {}),
    (saelens, 'topk', LN),
    (sparsify, 'topk', {}),
    *((dictionary_learning, activation, {}) for activation in ('topk', 'relu', 'gated')),
  ],
  ids=_id,
)
def test_numbers_that_need_no_folding_come_back_as_they_were(tmp_path, form, activation, kind):
  sae = saes.sae(activation, **kind)
  form.write(tmp_path / 'sae', sae)
  arrays, settings = form.read(tmp_path / 'sae')
  assert settings == sae_lib.settings_of(sae)
  expected = sae_lib.named_parameters(sae)
  assert arrays.keys() == expected.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, np.asarray(expected[name][...]))


def test_what_comes_back_of_a_transcoder_is_one(tmp_path):
  for form, activation in ((saelens, 'relu'), (sparsify, 'topk'), (gemma_scope, 'jumprelu')):
    path = tmp_path / form.__name__
    form.write(path, saes.sae(activation, **SQUARE))
    arrays, _ = form.read(path, **({'transcoder': True} if form is gemma_scope else {}))
    assert 'out_bias' in arrays
    assert not arrays['pre_bias'].any()
  assert 'out_bias' not in gemma_scope.read(path)[0]  # an SAE that computes the same


@pytest.mark.parametrize(
  ('form', 'activation', 'kind', 'message'),
  [
    (openai, 'topk', {}, r"a topk SAE of normalization 'none'\. Write saelens, sparsify"),
    (openai, 'relu', LN, "a relu SAE of normalization 'layer_norm_std'"),
    (openai, 'jumprelu', {}, 'holds TopK SAEs of normalization layer_norm_std and ReLU SAEs without one'),
    (openai, 'relu', TRANSCODER, "a relu transcoder of normalization 'none'"),
    (saelens, 'topk', {'normalization': 'unit_norm'}, "a topk SAE of normalization 'unit_norm'"),
    (saelens, 'topk', {**TRANSCODER, 'skip': True}, r'a topk transcoder with a skip .*Write sparsify'),
    (sparsify, 'relu', {}, 'holds TopK SAEs and transcoders'),
    (sparsify, 'topk', LN, "a topk SAE of normalization 'layer_norm_std'"),
    (sparsify, 'topk', TRANSCODER, 'from 6 to 7'),
    (dictionary_learning, 'topk', LN, 'holds SAEs without normalization'),
    (dictionary_learning, 'relu', TRANSCODER, 'a relu transcoder'),
    (gemma_scope, 'topk', {}, 'holds JumpReLU SAEs'),
    (gemma_scope, 'jumprelu', LN, "a jumprelu SAE of normalization 'layer_norm_std'"),
    (gemma_scope, 'jumprelu', {**TRANSCODER, 'skip': True}, 'without a skip'),
  ],
  ids=_id,
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, form, activation, kind, message):
  with pytest.raises(ValueError, match=message):
    form.write(tmp_path / 'sae', saes.sae(activation, **kind))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('form', FORMATS, ids=_id)
def test_nothing_is_overwritten(tmp_path, form):
  path = tmp_path / 'sae'
  path.write_text('precious')
  sae = saes.sae('topk', **LN) if form is openai else saes.sae('topk' if form is sparsify else 'relu')
  with pytest.raises(FileExistsError, match='choose another path, or delete it first'):
    form.write(path, sae)
  assert path.read_text() == 'precious'
  assert [entry.name for entry in tmp_path.iterdir()] == ['sae']


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(torch_files, 'write', full)
  for form in (openai, dictionary_learning):
    with pytest.raises(OSError, match='No space'):
      form.write(tmp_path / 'sae', saes.sae('relu'))
  assert not list(tmp_path.iterdir())


def test_jumprelu_is_the_same_on_the_edge():
  """Pre-activations of exactly the threshold, and biases of either sign and 0."""
  linear_bl = np.array([[-1, 0, 0.5, 1, 2, 3]], np.float32)
  for bias in (-1.0, 0.0, 0.5):
    arrays = {'encoder': np.eye(6, dtype=np.float32), 'latent_bias': np.full(6, bias, np.float32)}
    as_jump, settings = plain.as_jumprelu(arrays, {'activation': 'prolu'})
    found_bl = plain.jumprelu(linear_bl + as_jump['latent_bias'], as_jump['threshold'])
    np.testing.assert_array_equal(found_bl, np.where((linear_bl > 0) & (linear_bl + bias > 0), linear_bl, 0))
    assert settings == {'activation': 'jumprelu'}


def test_products_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
  rng = np.random.default_rng(0)
  x_bd, w_ld = rng.normal(size=(4, 5)), rng.normal(size=(11, 5)).astype(np.float32)
  monkeypatch.setattr(plain, '_ELEMENTS_AT_ONCE', 15)
  np.testing.assert_allclose(plain.products(x_bd, w_ld), x_bd @ w_ld.T.astype(np.float64), rtol=1e-13)
  assert plain.products(x_bd[0], w_ld).shape == (11,)


# OpenAI


def _openai(path, **changes):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  values = {
    'pre_bias': normal(saes.D),
    'latent_bias': normal(saes.N_LATENTS),
    'stats_last_nonzero': np.zeros(saes.N_LATENTS, np.int64),
    'encoder.weight': normal(saes.N_LATENTS, saes.D),
    'decoder.weight': normal(saes.D, saes.N_LATENTS),
    'activation': 'TopK',
    'activation_state_dict': {'k': saes.K, 'postact_fn': 'ReLU'},
  } | changes
  torch_files.write(path, {name: value for name, value in values.items() if value is not None})
  return path


def test_openai_normalises_topk_alone(tmp_path):
  _, settings = openai.read(_openai(tmp_path / 'topk.pt'))
  assert settings == {'activation': 'topk', 'k': saes.K, 'normalization': 'layer_norm_std'}
  state = {'activation.k': saes.K, 'activation.postact_fn': 'ReLU'}  # what their state_dict has too many
  assert openai.read(_openai(tmp_path / 'more.pt', **state))[1] == settings
  path = _openai(tmp_path / 'relu.pt', activation='ReLU', activation_state_dict={})
  assert openai.read(path)[1] == {'activation': 'relu', 'normalization': 'none'}
  assert openai.read(_openai(tmp_path / 'none.pt', activation=None))[1] == openai.read(path)[1]


def test_openai_tied_weights(tmp_path):
  for more in ({}, {'decoder.linear.weight': np.zeros((saes.N_LATENTS, saes.D), np.float32)}):
    arrays, _ = openai.read(_openai(tmp_path / f'{len(more)}.pt', **{'decoder.weight': None, **more}))
    np.testing.assert_array_equal(arrays['decoder'], arrays['encoder'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'activation': 'Identity'}, "its activation is 'Identity'"),
    ({'activation': 'Swish'}, "its activation is 'Swish'"),
    ({'activation_state_dict': {'k': 3, 'postact_fn': 'Identity'}}, 'has the postact_fn ReLU alone'),
    ({'activation_state_dict': {}}, 'k is None, not of type int'),
    ({'activation_state_dict': {'k': 'three'}}, "k is 'three', not of type int"),
    ({'pre_bias': None}, r"look at \['pre_bias'\]"),
    ({'W_enc': np.zeros(3, np.float32)}, r"look at \['W_enc'\]"),
    ({'pre_bias': np.zeros(7, np.float32)}, r'pre_bias has the shape \[7\], not \[d\] with l=10, d=6'),
    ({'latent_bias': np.zeros((10, 1), np.float32)}, r'latent_bias has the shape \[10, 1\], not \[l\]'),
    ({'decoder.weight': np.zeros((10, 6), np.float32)}, r'decoder.weight has the shape \[10, 6\], not \[d, l\]'),
    ({'encoder.weight': np.zeros((10, 6), np.int32)}, 'encoder.weight is of type int32, not floating point'),
    ({'encoder.weight': 'none'}, 'encoder.weight is of type str, not floating point'),
  ],
)
def test_openai_files_that_are_not_sound_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    openai.read(_openai(tmp_path / 'a.pt', **changes))


def _error(function, *arguments) -> str | None:
  """Returns what a ValueError says that the function raises, if it does."""
  try:
    function(*arguments)
  except ValueError as e:
    return str(e)
  return None


@pytest.mark.parametrize('form', [openai, gemma_scope], ids=_id)
def test_any_damage_of_an_archive_is_an_error_that_names_it(tmp_path, form):
  path = tmp_path / 'sae'
  form.write(path, saes.sae('relu'))
  whole = path.read_bytes()
  directory = whole.index(b'PK\1\2')
  # Its signature, the version that it wants, flags (encrypted, patched, strongly encrypted), its compression.
  damages = [(0, 0), (6, 255), (8, 1), (8, 0x20), (8, 0x40), (10, 99)]
  rng = np.random.default_rng(0)
  damages += [(rng.integers(len(whole) - directory), rng.integers(256)) for _ in range(300)]
  for i, (at, value) in enumerate(damages):
    damaged = bytearray(whole)
    damaged[directory + at] = value
    path.write_bytes(damaged)
    for function in (form.detect, form.read):
      error = _error(function, path)
      assert error.startswith(f'{path} ') if error else function is form.detect or i >= 6


# SAELens


def _saelens(path, config={}, tensors={}, architecture='standard'):
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  found = {'W_enc': normal(saes.D, saes.N_LATENTS), 'W_dec': normal(saes.N_LATENTS, saes.D), 'b_dec': normal(saes.D)}
  own = {'gated': ('b_gate', 'b_mag', 'r_mag'), 'jumprelu': ('b_enc', 'threshold')}.get(architecture, ('b_enc',))
  found |= {name: normal(saes.N_LATENTS) for name in own} | tensors
  path.mkdir()
  (path / 'sae_weights.safetensors').write_bytes(safetensors.numpy.save(found))
  settings = {'architecture': architecture, 'apply_b_dec_to_input': True, 'metadata': {'sae_lens_version': '6.1.0'}}
  settings |= {'k': saes.K} if architecture == 'topk' else {}
  (path / 'cfg.json').write_text(json.dumps(settings | config))
  return path


def _agrees(form, path, **reading):
  x_bd = saes.inputs()
  found = saes.forward(sae_lib.build(*form.read(path, **reading)), x_bd)
  assert found[0].any()
  for ours_is, theirs_is in zip(found, form.outputs(path, x_bd, **reading), strict=True):
    np.testing.assert_allclose(ours_is, theirs_is, **CLOSE)


@pytest.mark.parametrize('architecture', ['standard', 'topk', 'jumprelu', 'gated'])
def test_saelens_without_subtraction_is_folded(tmp_path, architecture):
  path = _saelens(tmp_path / 'sae', {'apply_b_dec_to_input': False}, architecture=architecture)
  _agrees(saelens, path)
  tensors = safetensors.numpy.load_file(path / 'sae_weights.safetensors')
  bias_l = tensors['b_gate' if architecture == 'gated' else 'b_enc']
  folded_l = bias_l + tensors['W_enc'].astype(np.float64).T @ tensors['b_dec']
  np.testing.assert_array_equal(saelens.read(path)[0]['latent_bias'], folded_l.astype(np.float32))


def test_saelens_scales_and_norms_are_folded(tmp_path):
  _agrees(saelens, _saelens(tmp_path / 'norms', {'rescale_acts_by_decoder_norm': True}, architecture='topk'))
  _agrees(saelens, _saelens(tmp_path / 'layer', {'normalize_activations': 'layer_norm'}, architecture='jumprelu'))
  path = _saelens(tmp_path / 'average', {'normalize_activations': 'expected_average_only_in'})
  with pytest.raises(ValueError, match=r'add activation_scaler\.json with'):
    saelens.read(path)
  for wrong in ('null', '0', '-2.0', '"x"', 'NaN', 'true'):
    (path / 'activation_scaler.json').write_text(f'{{"scaling_factor": {wrong}}}')
    with pytest.raises(ValueError, match=r'activation_scaler\.json: scaling_factor is'):
      saelens.read(path)
  (path / 'activation_scaler.json').write_text('{"scaling_factor": 0.25, "has_whitening": false}')
  assert saelens.read(path)[1] == {'activation': 'relu', 'normalization': 'constant', 'input_scale': 0.25}
  _agrees(saelens, path)


def test_saelens_of_bfloat16(tmp_path):
  path = _saelens(tmp_path / 'sae', tensors={'b_dec': np.arange(saes.D).astype(ml_dtypes.bfloat16)})
  np.testing.assert_array_equal(saelens.read(path)[0]['pre_bias'], np.arange(saes.D, dtype=np.float32))


def test_saelens_before_version_6(tmp_path):
  old = {'architecture': 'standard', 'metadata': None, 'normalize_activations': None}
  topk = {'activation_fn_str': 'topk', 'activation_fn_kwargs': {'k': 4}}
  assert saelens.read(_saelens(tmp_path / 'a', old))[1] == {'activation': 'relu', 'normalization': 'none'}
  assert saelens.read(_saelens(tmp_path / 'b', old | topk))[1] == {
    'activation': 'topk',
    'normalization': 'none',
    'k': 4,
  }
  for i, (change, message) in enumerate([
    ({'activation_fn': 'tanh-relu'}, "its activation_fn is 'tanh-relu'"),
    ({'hook_point': 'blocks.3.attn.hook_z'}, "set reshape_activations to 'none'"),
    ({'normalize_activations': True}, 'add activation_scaler.json'),
    (topk | {'activation_fn_kwargs': None}, 'k is None, not of type int'),
  ]):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      saelens.read(_saelens(tmp_path / str(i), old | change))


@pytest.mark.parametrize(
  ('config', 'tensors', 'message'),
  [
    ({'architecture': 'batchtopk'}, {}, 'becomes jumprelu by save_inference_model'),
    ({'architecture': 'temporal'}, {}, "its architecture is 'temporal'; supported: standard, topk"),
    ({'reshape_activations': 'hook_z'}, {}, "set reshape_activations to 'none'"),
    ({'normalize_activations': 'constant_norm_rescale'}, {}, 'which ours has not'),
    ({'normalize_activations': 'covariance_whitening'}, {}, 'folded into the weights by fold_activation_whitening'),
    ({}, {'scaling_factor': np.full(10, 2, np.float32)}, 'multiply the rows of W_dec by it'),
    ({}, {'b_mag': np.zeros(10, np.float32)}, r"look at \['b_mag'\]"),
    ({}, {'b_dec': np.zeros(5, np.float32)}, r'b_dec has the shape \[5\], not \[d\] with d=6, l=10'),
    ({}, {'b_enc': np.zeros(10, np.int32)}, 'b_enc is of type I32; supported: F64, F32, F16, BF16'),
    ({'architecture': 'topk'}, {}, 'k is None, not of type int'),
  ],
)
def test_saelens_folders_that_ours_cannot_compute_are_refused(tmp_path, config, tensors, message):
  with pytest.raises(ValueError, match=message):
    saelens.read(_saelens(tmp_path / 'sae', config, tensors))


def test_saelens_transcoders_do_not_normalise(tmp_path):
  path = tmp_path / 'sae'
  saelens.write(path, saes.sae('relu', **TRANSCODER))
  config = json.loads((path / 'cfg.json').read_text())
  (path / 'cfg.json').write_text(json.dumps(config | {'normalize_activations': 'layer_norm'}))
  with pytest.raises(ValueError, match="set normalize_activations to 'none'"):
    saelens.read(path)


def test_damaged_folders_say_which_file(tmp_path):
  path = _saelens(tmp_path / 'sae')
  weights = path / 'sae_weights.safetensors'
  weights.write_bytes(weights.read_bytes()[:-3])
  with pytest.raises(ValueError, match=r'sae_weights\.safetensors is damaged'):
    saelens.read(path)
  header = json.dumps({'W_enc': {'dtype': 'F32', 'shape': [1] * 90, 'data_offsets': [0, 4]}}).encode()
  weights.write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
  with pytest.raises(ValueError, match=r'sae_weights\.safetensors is damaged: maximum supported dimension'):
    saelens.read(path)
  for damage in ('{"a', '[]', ''):
    (path / 'cfg.json').write_text(damage)
    with pytest.raises(ValueError, match=r'cfg\.json (is damaged|holds list)'):
      saelens.read(path)
  with pytest.raises(FileNotFoundError):
    saelens.read(tmp_path / 'absent')


def _others(settings):
  """Yields these settings with one more, and with any of them, of its parts too, absent or of another value or type."""
  yield settings | {'surplus': 1}
  for name, value in settings.items():
    yield {other: settings[other] for other in settings if other != name}
    for wrong in (None, True, -1, 0, 1.5, 1e-60, 10**400, 'x', '3', [], ['x'], {}, {'k': [3]}):
      yield settings | {name: wrong}
    if isinstance(value, dict):
      yield from (settings | {name: other} for other in _others(value))


@pytest.mark.parametrize('kind', ['ours', 'saelens', 'saelens before 6', 'saelens scaler', 'sparsify', 'topk', 'batch'])
def test_whatever_settings_say_is_read_or_named_with_its_file(tmp_path, kind):
  path, name = tmp_path / 'sae', 'cfg.json'
  if kind == 'ours':
    form, name = ours, 'config.json'
    ours.write(path, saes.sae('topk', **SQUARE))
  elif kind in ('topk', 'batch'):
    form, name = dictionary_learning, 'config.json'
    _dictionary(path, {'topk': 'AutoEncoderTopK', 'batch': 'BatchTopKSAE'}[kind], changes={'k': None})
  elif kind == 'sparsify':
    form = sparsify
    _sparsify(path, {'transcode': False, 'activation': 'topk', 'signed': False})
  else:
    form = saelens
    old = {'metadata': None, 'activation_fn_str': 'topk', 'activation_fn_kwargs': {'k': 3}, 'hook_name': 'x'}
    kept = {'normalize_activations': 'none', 'rescale_acts_by_decoder_norm': True, 'reshape_activations': 'none'}
    _saelens(path, old if 'before' in kind else kept, architecture='topk')
    if 'scaler' in kind:
      _saelens(path.with_name('scaled'), {'normalize_activations': 'expected_average_only_in'}).rename(path / 'more')
      path, name = path / 'more', 'activation_scaler.json'
      (path / name).write_text('{"scaling_factor": 0.25}')
  settings = json.loads((path / name).read_text())
  assert form.outputs(path, saes.inputs())[0].any()
  n_refused = 0
  for other in _others(settings):
    (path / name).write_text(json.dumps(other))
    error = _error(lambda: (sae_lib.build(*form.read(path)), form.outputs(path, saes.inputs())))
    n_refused += error is not None
    assert error is None or (str(path) in error and len(error) < 2000), (other, error)
  assert n_refused > 10
  for document in (b'[' * 100_000, b'{"k": ' * 100_000, b'null', b'3', b'"x"', b'\xff\xfe', b''):
    (path / name).write_bytes(document)
    with pytest.raises(ValueError, match=rf'{name} (is damaged|holds \w+ and no settings)'):
      form.read(path)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'surplus': 1}, r"config\.json: a topk SAE has no settings \['surplus'\]; leave them out"),
    ({'k': '3'}, "k is '3', not of type int"),
    ({'k': 11}, 'k is 11, not within 1 and the 10 latents of the weights'),
    ({'activation': 'swish'}, "its activation is 'swish'; supported: topk, relu"),
    ({'activation': 'relu'}, r"a relu SAE has no settings \['k'\]"),
    ({'normalization': 'whiten'}, "sae cannot be built: normalization 'whiten' is unknown"),
    ({'input_scale': 0}, 'input_scale is 0, not a positive number'),
    ({'input_scale': 'x'}, "input_scale is 'x', not a positive number"),
  ],
)
def test_folders_of_ours_that_are_not_sound_are_refused(tmp_path, settings, message):
  path = tmp_path / 'sae'
  ours.write(path, saes.sae('topk'))
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(config | settings))
  with pytest.raises(ValueError, match=message):
    ours.read(path)


@pytest.mark.parametrize(
  ('name', 'array', 'message'),
  [
    ('encoder', np.zeros(6, np.float32), r'encoder has the shape \[6\], not \[l, d\]'),
    ('decoder', np.zeros((10, 7), np.float32), r'decoder has the shape \[10, 7\], not \[l, d\] with l=10, d=6'),
    ('decoder', np.zeros((), np.float32), r'decoder has the shape \[\]'),
    ('latent_bias', np.zeros(10, np.int32), 'latent_bias is of type I32'),
    ('threshold', np.zeros(10, np.float32), r"look at \['threshold'\]"),
    ('skip', np.zeros((6, 6), np.float32), 'a skip connection is of a transcoder'),
  ],
)
def test_weights_of_ours_that_are_not_sound_are_refused(tmp_path, name, array, message):
  path = tmp_path / 'sae'
  ours.write(path, saes.sae('topk'))
  tensors = safetensors.numpy.load_file(path / 'sae.safetensors')
  (path / 'sae.safetensors').write_bytes(safetensors.numpy.save(tensors | {name: array}))
  with pytest.raises(ValueError, match=message) as e:
    ours.read(path)
  assert str(path) in str(e.value)


# sparsify


def _sparsify(path, config={}, skip=False):
  rng = np.random.default_rng(2)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {'encoder.weight': normal(saes.N_LATENTS, saes.D), 'encoder.bias': normal(saes.N_LATENTS)}
  tensors |= {'W_dec': normal(saes.N_LATENTS, saes.D), 'b_dec': normal(saes.D)}
  tensors |= {'W_skip': normal(saes.D, saes.D)} if skip else {}
  path.mkdir()
  (path / 'sae.safetensors').write_bytes(safetensors.numpy.save(tensors))
  settings = {'k': saes.K, 'num_latents': 0, 'expansion_factor': 2, 'd_in': saes.D, 'skip_connection': skip}
  (path / 'cfg.json').write_text(json.dumps(settings | config))
  return path


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('transcode', [False, True])
def test_sparsify_folders_are_read(tmp_path, skip, transcode):
  path = _sparsify(tmp_path / 'sae', {'transcode': transcode}, skip)
  _agrees(sparsify, path)
  assert ('out_bias' in sparsify.read(path)[0]) == (skip or transcode)


def test_sparsify_says_how_many_latents_there_are(tmp_path):
  sparsify.write(tmp_path / 'sae', saes.sae('topk'))
  config = json.loads((tmp_path / 'sae' / 'cfg.json').read_text())
  assert config['num_latents'] == saes.N_LATENTS


def test_sparsify_folders_that_ours_cannot_compute_are_refused(tmp_path):
  for i, (change, message) in enumerate([
    ({'activation': 'groupmax'}, 'its activation is groupmax'),
    ({'signed': True}, 'signed topk'),
    ({'skip_connection': True}, r"look at \['W_skip'\]"),
    ({'k': None}, 'k is None'),
  ]):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      sparsify.read(_sparsify(tmp_path / str(i), change))


# dictionary_learning


def _dictionary(path, kind, config={}, changes={}):
  rng = np.random.default_rng(3)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  n_latents, d = saes.N_LATENTS, saes.D
  if kind in ('JumpReluAutoEncoder', 'MatryoshkaBatchTopKSAE'):
    tensors = {'W_enc': normal(d, n_latents), 'W_dec': normal(n_latents, d), 'b_enc': normal(n_latents)}
  else:
    tensors = {'encoder.weight': normal(n_latents, d), 'decoder.weight': normal(d, n_latents)}
    tensors |= {'encoder.bias': normal(n_latents)} if kind != 'GatedAutoEncoder' else {}
  own = {
    'AutoEncoder': {'bias': normal(d)},
    'AutoEncoderNew': {'decoder.bias': normal(d)},
    'GatedAutoEncoder': {'decoder_bias': normal(d)}
    | {name: normal(n_latents) for name in ('r_mag', 'gate_bias', 'mag_bias')},
    'JumpReluAutoEncoder': {'b_dec': normal(d), 'threshold': np.abs(normal(n_latents))},
  }
  topk = {'b_dec': normal(d), 'k': np.asarray(saes.K, np.int32), 'threshold': np.asarray(0.8, np.float32)}
  tensors |= own.get(kind, topk) | changes
  if kind == 'MatryoshkaBatchTopKSAE':
    tensors['group_sizes'] = np.array([4, 6])
  path.mkdir()
  torch_files.write(path / 'ae.pt', {name: value for name, value in tensors.items() if value is not None})
  settings = {'trainer': {'dict_class': kind, **({'k': saes.K} if kind not in own else {}), **config}}
  (path / 'config.json').write_text(json.dumps(settings))
  return path


@pytest.mark.parametrize(
  ('kind', 'use_threshold', 'activation'),
  [
    ('AutoEncoder', None, 'relu'),
    ('AutoEncoderNew', None, 'relu'),
    ('GatedAutoEncoder', None, 'gated'),
    ('JumpReluAutoEncoder', None, 'jumprelu'),
    ('AutoEncoderTopK', None, 'topk'),
    ('AutoEncoderTopK', True, 'jumprelu'),
    ('BatchTopKSAE', None, 'jumprelu'),
    ('BatchTopKSAE', False, 'topk'),
    ('MatryoshkaBatchTopKSAE', None, 'jumprelu'),
    ('MatryoshkaBatchTopKSAE', False, 'topk'),
  ],
)
def test_dictionary_learning_folders_are_read(tmp_path, kind, use_threshold, activation):
  path = _dictionary(tmp_path / 'trainer_0', kind)
  _agrees(dictionary_learning, path, use_threshold=use_threshold)
  assert dictionary_learning.read(path, use_threshold)[1]['activation'] == activation


def test_dictionary_learning_before_it_had_buffers(tmp_path):
  path = _dictionary(tmp_path / 'trainer_0', 'AutoEncoderTopK', changes={'k': None, 'threshold': None})
  _agrees(dictionary_learning, path)


@pytest.mark.parametrize(
  ('kind', 'config', 'changes', 'use_threshold', 'message'),
  [
    ('CrossCoder', {}, {}, None, "its dict_class is 'CrossCoder'; supported: AutoEncoder,"),
    ('BatchTopKSAE', {}, {'threshold': np.asarray(-1, np.float32)}, None, 'so none was measured; read it as TopK'),
    ('AutoEncoderTopK', {'k': 4}, {}, None, 'k is 3 in ae.pt and 4 in config.json'),
    ('AutoEncoderTopK', {'k': None}, {'k': None}, None, 'k is None in ae.pt'),
    ('AutoEncoder', {}, {}, True, 'AutoEncoder encodes in one way'),
    ('AutoEncoder', {}, {'bias': np.zeros(7, np.float32)}, None, r'bias has the shape \[7\]'),
    ('BatchTopKSAE', {}, {'threshold': np.zeros(10, np.float32)}, None, r'threshold has the shape \[10\], not \[\]'),
  ],
)
def test_dictionary_learning_folders_that_are_not_sound_are_refused(
  tmp_path, kind, config, changes, use_threshold, message
):
  with pytest.raises(ValueError, match=message):
    dictionary_learning.read(_dictionary(tmp_path / 'trainer_0', kind, config, changes), use_threshold)


def test_dictionary_learning_weights_are_not_run(tmp_path):
  path = _dictionary(tmp_path / 'trainer_0', 'AutoEncoder')
  (path / 'ae.pt').write_bytes(pickle.dumps(eval))
  with pytest.raises(ValueError, match=r'is damaged or not to be trusted: File is not a zip file'):
    dictionary_learning.read(path)


# Gemma Scope


def _gemma(path, **changes):
  rng = np.random.default_rng(4)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {'W_enc': normal(saes.D, saes.N_LATENTS), 'W_dec': normal(saes.N_LATENTS, saes.D), 'b_dec': normal(saes.D)}
  tensors |= {'b_enc': normal(saes.N_LATENTS), 'threshold': np.abs(normal(saes.N_LATENTS))} | changes
  with open(path, 'wb') as file:
    np.savez_compressed(file, **tensors)
  return path


def test_gemma_scope_files_are_read(tmp_path):
  _agrees(gemma_scope, _gemma(tmp_path / 'params.npz', scaling_factor=np.ones(10, np.float32)))
  wide = np.random.default_rng(5).normal(size=(saes.N_LATENTS, saes.D_OUT)).astype(np.float32)
  _agrees(gemma_scope, _gemma(tmp_path / 'transcoder.npz', W_dec=wide, b_dec=wide[0]))


class _Touch:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def test_gemma_scope_files_that_are_not_sound_are_refused(tmp_path):
  marker, path = tmp_path / 'was_run', tmp_path / 'params.npz'
  evil = np.empty(1, object)
  evil[0] = _Touch(marker)
  for changes, message in (
    ({'b_enc': evil}, 'no whole .npz file of arrays'),
    ({'threshold': np.zeros(9, np.float32)}, r'threshold has the shape \[9\]'),
    ({'scaling_factor': np.zeros(10, np.float32)}, 'multiply the rows of W_dec by it'),
    ({'W_skip': np.zeros((6, 6), np.float32)}, r"look at \['W_skip'\]"),
  ):
    with pytest.raises(ValueError, match=message):
      gemma_scope.read(_gemma(path, **changes))
  data = _gemma(path).read_bytes()
  for n in range(0, len(data), 37):
    path.write_bytes(data[:n])
    with pytest.raises(ValueError, match=r'params\.npz'):
      gemma_scope.read(path)
  for content in (pickle.dumps(_Touch(marker)), b'\x93NUMPY'):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'params\.npz'):
      gemma_scope.read(path)
  structured = np.zeros(3, [('a', np.float32)])
  with pytest.raises(ValueError, match=r'params\.npz'):
    gemma_scope.read(_gemma(path, scaling_factor=structured))
  with pytest.raises(ValueError, match='would unpack to 40001184 bytes'):
    gemma_scope.read(_gemma(path, b_enc=np.zeros(10**7, np.float32)))
  np.save(path.open('wb'), np.zeros(3))
  with pytest.raises(ValueError, match=r'params\.npz'):
    gemma_scope.read(path)
  assert not marker.exists()


@pytest.mark.parametrize(
  'header',
  [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1180591620717411303424,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
    "{'descr': 3, 'fortran_order': False, 'shape': (4,)}",
    '1' + '+1' * 4000,
    '-' * 9000 + '1',
    '(' * 3000,
  ],
  ids=['vast', 'overflow', 'bool', 'type', 'sum', 'minus', 'brackets'],
)
def test_headers_of_arrays_that_are_not_sound_are_refused(tmp_path, header):
  path, text = tmp_path / 'params.npz', header.encode() + b'\n'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('W_enc.npy', b'\x93NUMPY\x02\x00' + struct.pack('<I', len(text)) + text + bytes(16))
  with pytest.raises(ValueError, match=r'params\.npz is no whole \.npz file of arrays: .+; fetch it again'):
    gemma_scope.read(path)
