import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_interp.formats import gemma_scope, openai, ours, saelens
from models import sae as sae_lib
from models import sharding
from tests.formats import saes
from train import convert

ROOT = pathlib.Path(__file__).parents[2]
LN = {'normalization': 'layer_norm_std'}


@pytest.fixture(autouse=True)
def _one_device():
  with jax.set_mesh(sharding.make_mesh()):
    yield


def _command(*flags):
  program = [sys.executable, '-m', 'train.convert', *flags]
  return subprocess.run(
    program, cwd=ROOT, env={**os.environ, 'XLA_FLAGS': ''}, capture_output=True, text=True, check=False
  )


@pytest.mark.parametrize(
  ('activation', 'kind', 'formats', 'tolerance'),
  [
    ('topk', LN, ['openai', 'saelens', 'ours'], 5e-5),  # reconstructions: std + 1e-5 against std
    ('topk', {}, ['sparsify', 'dictionary_learning', 'saelens', 'ours'], 1e-12),  # the same numbers
    ('relu', {}, ['openai', 'dictionary_learning', 'saelens', 'gemma_scope', 'ours'], 1e-6),
    ('gated', {}, ['dictionary_learning', 'saelens', 'gemma_scope', 'saelens', 'ours'], 1e-6),
    ('prolu', {'normalization': 'constant', 'input_scale': 3.0}, ['saelens', 'dictionary_learning', 'ours'], 1e-6),
    ('topk', {'transcoder': True, 'd_out': saes.D, 'skip': True}, ['sparsify', 'ours'], 1e-6),
    ('jumprelu', {'transcoder': True, 'skip': True}, ['saelens', 'ours'], 1e-6),
    ('jumprelu', {'transcoder': True}, ['gemma_scope', 'saelens', 'ours'], 1e-6),
  ],
)
def test_a_chain_of_formats_computes_the_same(tmp_path, activation, kind, formats, tolerance):
  source = tmp_path / '0'
  sae_lib.save(source, saes.sae(activation, **kind))
  first = source
  for i, format in enumerate(formats, 1):
    target = tmp_path / str(i)
    found = convert.convert(source, target, format)
    assert max(found.relative_latents, found.relative_recons) <= tolerance
    assert found.at_edge == 0
    assert found.l0 > 0
    assert convert.detect(target) == format
    source = target
  x_bd = saes.inputs()
  for ours_is, theirs_is in zip(ours.outputs(first, x_bd), ours.outputs(source, x_bd), strict=True):
    np.testing.assert_allclose(theirs_is, ours_is, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['W_dec', 'b_enc', 'b_dec'])
def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch, name):
  write = saelens.write

  def wrong(path, sae):
    write(path, sae)
    weights = path / 'sae_weights.safetensors'
    tensors = safetensors.numpy.load_file(weights)
    weights.write_bytes(safetensors.numpy.save(tensors | {name: tensors[name] + 0.1}))

  monkeypatch.setattr(saelens, 'write', wrong)
  ours.write(tmp_path / 'sae', saes.sae('relu'))
  with pytest.raises(ValueError, match=r'would not compute what .* does: .* nothing is written'):
    convert.convert(tmp_path / 'sae', tmp_path / 'out', 'saelens')
  assert [path.name for path in tmp_path.iterdir()] == ['sae']


def test_inputs_at_an_edge_are_counted_and_left_out():
  latents_bl = np.eye(4) * [1, 2, 3, 400]
  recons_bd = np.ones((4, 3))
  moved_bl, moved_bd = latents_bl.copy(), recons_bd.copy()
  moved_bl[0], moved_bd[0] = [0, 1, 0, 0], 5  # another latent
  moved_bl[1, 1] += 1e-3
  moved_bl[3, 3] += 1e-3
  found = convert.compare((latents_bl, recons_bd), (moved_bl, moved_bd))
  np.testing.assert_allclose(found, [1e-3, 5e-4, 0, 0, 1, 1], rtol=1e-9)
  with pytest.raises(ValueError, match='are not finite'):
    convert.compare((latents_bl, recons_bd), (latents_bl, recons_bd * np.nan))
  with pytest.raises(ValueError, match=r'of shape \(4, 3\) became \(4, 2\)'):
    convert.compare((latents_bl, recons_bd), (latents_bl, recons_bd[:, :2]))


def test_the_command(tmp_path):
  ours.write(tmp_path / 'sae', saes.sae('topk', **LN))
  done = _command(f'--from={tmp_path}/sae', f'--to={tmp_path}/sae.pt', '--format=openai')
  assert done.returncode == 0, done.stderr
  assert f'{tmp_path}/sae (ours) -> {tmp_path}/sae.pt (openai)' in done.stdout
  assert '3.0 latents on' in done.stdout
  assert not done.stderr
  _, settings = saelens.read(_converted(tmp_path / 'sae.pt', tmp_path / 'lens', 'saelens'))
  assert settings == {'activation': 'topk', 'k': 3, **LN}


def _converted(source, target, format):
  convert.convert(source, target, format)
  return target


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give --from, --to and --format, one of ours, openai, saelens'),
    (['--from=nowhere', '--to={0}/out', '--format=ours'], 'there is no nowhere'),
    (['--from={0}/sae', '--to={0}/sae', '--format=saelens'], 'is there already; choose another path'),
    (['--from={0}', '--to={0}/out', '--format=ours'], 'is of none of the formats ours, openai'),
    (['--from={0}/sae', '--to={0}/out', '--format=sparsify'], 'Write saelens or ours instead'),
    (['--from={0}/sae', '--to={0}/out', '--format=gguf'], 'value should be one of'),
    (['--from={0}/sae', '--to={0}/out', '--format=ours', '--transcoder'], '--transcoder is of the format gemma_scope'),
    (['--from={0}/sae', '--to={0}/out', '--format=ours', '--from_format=saelens'], 'cfg.json'),
    (['surplus'], "unexpected arguments ['surplus']"),
  ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, flags, message):
  ours.write(tmp_path / 'sae', saes.sae('relu'))
  monkeypatch.setattr(jax, 'set_mesh', lambda mesh: None)  # the ambient mesh of the test stays
  argv = ['convert', *(flag.format(tmp_path) for flag in flags)]
  saved = convert.flags.FLAGS.flag_values_dict()
  try:
    code = convert.main(convert._parse_flags(argv))
  except SystemExit as e:
    code, printed = 1, str(e.code)
  else:
    printed = capsys.readouterr().err
  finally:
    for name in ('from', 'to', 'format', 'from_format', 'use_threshold', 'transcoder'):
      convert.flags.FLAGS[name].value = saved[name]
  assert code == 1
  assert printed.count('error: ') == 1
  assert message in printed
  assert [path.name for path in tmp_path.iterdir()] == ['sae']


def test_a_damaged_archive_is_named(tmp_path):
  path = tmp_path / '8.pt'
  openai.write(path, saes.sae('relu'))
  path.write_bytes(path.read_bytes().replace(b'PK\1\2', b'PK\0\0'))  # its directory; the end of it is as it was
  for from_format in (None, 'openai'):
    with pytest.raises(ValueError, match=r'8\.pt is .*Bad magic number'):
      convert.convert(path, tmp_path / 'out', 'ours', from_format)
  assert [found.name for found in tmp_path.iterdir()] == ['8.pt']


def test_options_of_reading_are_passed_on(tmp_path):
  gemma_scope.write(tmp_path / 'params.npz', saes.sae('jumprelu', transcoder=True, d_out=saes.D))
  convert.convert(tmp_path / 'params.npz', tmp_path / 'sae', 'ours')
  convert.convert(tmp_path / 'params.npz', tmp_path / 'transcoder', 'ours', transcoder=True)
  arrays = [ours.read(tmp_path / name)[0] for name in ('sae', 'transcoder')]
  assert ['out_bias' in found for found in arrays] == [False, True]
  sae_lib.save(tmp_path / 'topk', saes.sae('topk'))
  path = _converted(tmp_path / 'topk', tmp_path / 'trainer_0', 'dictionary_learning')
  assert json.loads((path / 'config.json').read_text())['trainer']['k'] == saes.K
  with pytest.raises(ValueError, match='none was measured'):
    convert.convert(path, tmp_path / 'out', 'ours', use_threshold=True)
