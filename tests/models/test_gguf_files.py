import importlib.util
import json
import pathlib
import sys
import urllib.request

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jax_interp.llm import local_server
from models import gguf_files, pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
TYPE = gguf.GGMLQuantizationType
N_HEAD, N_KV_HEAD, D_HEAD, D_MODEL, N_NEURONS, N_VOCAB, N_LAYER = 6, 2, 16, 64, 96, 53, 2  # rows are whole blocks of 32
SHAPES = {
  'token_embd.weight': (N_VOCAB, D_MODEL),
  'output_norm.weight': (D_MODEL,),
  'output.weight': (N_VOCAB, D_MODEL),
}
for i in range(N_LAYER):
  SHAPES |= {
    f'blk.{i}.attn_norm.weight': (D_MODEL,),
    f'blk.{i}.attn_q.weight': (N_HEAD * D_HEAD, D_MODEL),
    f'blk.{i}.attn_k.weight': (N_KV_HEAD * D_HEAD, D_MODEL),
    f'blk.{i}.attn_v.weight': (N_KV_HEAD * D_HEAD, D_MODEL),
    f'blk.{i}.attn_output.weight': (D_MODEL, N_HEAD * D_HEAD),
    f'blk.{i}.ffn_norm.weight': (D_MODEL,),
    f'blk.{i}.ffn_gate.weight': (N_NEURONS, D_MODEL),
    f'blk.{i}.ffn_up.weight': (N_NEURONS, D_MODEL),
    f'blk.{i}.ffn_down.weight': (D_MODEL, N_NEURONS),
  }
SETTINGS = {
  'llama.block_count': N_LAYER,
  'llama.context_length': 40,
  'llama.embedding_length': D_MODEL,
  'llama.feed_forward_length': N_NEURONS,
  'llama.attention.head_count': N_HEAD,
  'llama.attention.head_count_kv': N_KV_HEAD,
  'llama.attention.key_length': D_HEAD,
  'llama.attention.value_length': D_HEAD,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'llama.rope.dimension_count': D_HEAD,
  'llama.rope.freq_base': 5000.0,
  'llama.vocab_size': N_VOCAB,
}


def _tensors(shapes=SHAPES) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _write(path, settings=SETTINGS, tensors=None, types={}, architecture='llama', tokenizer={}) -> pathlib.Path:
  """Writes a file; None as a setting leaves it out, `types` quantises a tensor that is not F32 (or packs its bytes)."""
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in settings.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif value is not None:
      writer.add_array(key, value)
  for key, value in tokenizer.items():
    getattr(writer, f'add_{key}')(value)
  for name, tensor in (_tensors() if tensors is None else tensors).items():
    kind = types.get(name, TYPE.F32)
    data = tensor if tensor.dtype == np.uint8 else gguf.quants.quantize(tensor, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _dequantised(rows: np.ndarray, kind) -> np.ndarray:
  """Returns float64 of rows of uint8, from the definition of the blocks, one number at a time.

  A block of 32 numbers is a float16 scale d, for Q4_1 a float16 minimum m, then the numbers q: Q8_0 has 32 int8 and
  means d q; Q4_0 has 16 bytes and means d (q - 8), Q4_1 means d q + m, where byte j holds number j in its low half and
  number j + 16 in its high half.
  """
  out = []
  for row in rows:
    if kind in (TYPE.F32, TYPE.F16):
      out.append(np.frombuffer(row.tobytes(), '<f4' if kind == TYPE.F32 else '<f2').astype(np.float64))
      continue
    numbers = []
    n_bytes = {TYPE.Q8_0: 34, TYPE.Q4_0: 18, TYPE.Q4_1: 20}[kind]
    for start in range(0, len(row), n_bytes):
      block = row[start : start + n_bytes].tobytes()
      d, m = np.frombuffer(block[:4], '<f2').astype(np.float64)
      if kind == TYPE.Q8_0:
        numbers += [d * (byte - 256 * (byte > 127)) for byte in block[2:]]
      elif kind == TYPE.Q4_0:
        numbers += [d * (q - 8) for q in [byte % 16 for byte in block[2:]] + [byte // 16 for byte in block[2:]]]
      else:
        numbers += [d * q + m for q in [byte % 16 for byte in block[4:]] + [byte // 16 for byte in block[4:]]]
    out.append(numbers)
  return np.array(out)


@pytest.mark.parametrize('kind', [TYPE.F32, TYPE.F16, TYPE.Q8_0, TYPE.Q4_0, TYPE.Q4_1], ids=lambda kind: kind.name)
def test_a_tensor_is_dequantised_as_its_format_says(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(gguf_files, '_ROWS_AT_ONCE', 20)  # 53 rows are then three parts
  tensors = _tensors()
  packed = gguf.quants.quantize(tensors['token_embd.weight'], kind).view(np.uint8)
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', types={'token_embd.weight': kind}))
  found = file.tensor('token_embd.weight')
  assert found.dtype == np.float32
  assert found.shape == file.shape('token_embd.weight') == (N_VOCAB, D_MODEL)
  np.testing.assert_allclose(found, _dequantised(packed, kind), rtol=1e-6, atol=1e-7)  # d q + m is rounded twice
  spread = {TYPE.F32: 1e-9, TYPE.F16: 2e-3, TYPE.Q8_0: 0.02, TYPE.Q4_0: 0.3, TYPE.Q4_1: 0.2}[kind]
  np.testing.assert_allclose(found, tensors['token_embd.weight'], atol=spread)  # about half a step


def test_blocks_of_any_bytes_are_dequantised(tmp_path):
  rng = np.random.default_rng(0)
  for kind, n_bytes in ((TYPE.Q8_0, 34), (TYPE.Q4_0, 18), (TYPE.Q4_1, 20)):
    blocks = rng.integers(256, size=(N_VOCAB, 2, n_bytes), dtype=np.uint8)
    blocks[..., :4].view(np.float16)[...] = rng.normal(size=(N_VOCAB, 2, 2))  # any bytes could be a scale that is NaN
    packed = blocks.reshape(N_VOCAB, -1)
    tensors = _tensors() | {'token_embd.weight': packed}
    path = _write(tmp_path / f'{kind.name}.gguf', tensors=tensors, types={'token_embd.weight': kind})
    found = gguf_files.open_file(path).tensor('token_embd.weight')
    np.testing.assert_allclose(found, _dequantised(packed, kind), rtol=1e-6, atol=1e-6)


def test_metadata_are_plain_values(tmp_path):
  values = {
    'a.list': ['x', 'é', ''],
    'a.flags': [True, False],
    'a.numbers': [-3, 5],
    'a.negative': -2.5,
    'a.flag': True,
  }
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', SETTINGS | values))
  assert {key: file.metadata[key] for key in values} == values
  assert file.metadata['general.architecture'] == 'llama'
  assert file.metadata['llama.rope.freq_base'] == 5000.0
  assert file.names == list(SHAPES)
  assert file.path == tmp_path / 'a.gguf'


def test_the_fields_of_a_llama(tmp_path):
  fields = gguf_files.llama_fields(gguf_files.open_file(_write(tmp_path / 'a.gguf')))
  assert fields == {
    'n_layer': 2,
    'n_head': 6,
    'n_kv_head': 2,
    'd_model': 64,
    'd_head': 16,
    'n_neurons': 96,
    'n_ctx': 40,
    'n_vocab': 53,
    'rope_theta': 5000.0,
    'norm_eps': float(np.float32(1e-5)),
    'tied': False,
    'rope_factors': None,
  }


def test_what_a_file_leaves_out_is_as_in_llama_cpp(tmp_path):
  absent = ['attention.head_count_kv', 'attention.key_length', 'attention.value_length']
  absent += ['rope.dimension_count', 'rope.freq_base', 'vocab_size']
  settings = SETTINGS | {f'llama.{key}': None for key in absent} | {'llama.attention.head_count': 4}
  settings |= {'llama.expert_count': 0}  # stands in files of Llamas without experts
  shapes = {name: shape for name, shape in SHAPES.items() if name != 'output.weight'}
  for name in shapes:
    if 'attn_' in name and 'norm' not in name:
      shapes[name] = (D_MODEL, D_MODEL)
  fields = gguf_files.llama_fields(gguf_files.open_file(_write(tmp_path / 'a.gguf', settings, _tensors(shapes))))
  assert (fields['n_head'], fields['n_kv_head'], fields['d_head']) == (4, 4, 16)
  assert fields['rope_theta'] == 10000
  assert fields['tied']


def test_rotary_frequencies_are_divided_by_both_scalings(tmp_path):
  settings = SETTINGS | {'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0}
  factors = np.linspace(1, 8, D_HEAD // 2, dtype=np.float32)
  for name, changed, tensors, expected in (
    ('linear', settings, {}, np.full(D_HEAD // 2, 4)),
    ('none', SETTINGS | {'llama.rope.scaling.type': 'none'}, {}, None),
    ('llama 3', SETTINGS, {'rope_freqs.weight': factors}, factors),
    ('both', settings, {'rope_freqs.weight': factors}, 4 * factors),
  ):
    file = gguf_files.open_file(_write(tmp_path / f'{name}.gguf', changed, _tensors() | tensors))
    found = gguf_files.llama_fields(file)['rope_factors']
    assert found is None if expected is None else (found == expected).all()
    assert not any('rope' in name for name in gguf_files.llama_names(file))


def test_tensors_come_in_the_layout_of_transformers(tmp_path):
  # The weights of a Llama of transformers, written as llama.cpp's converter does: the rows of q and k of each head, of
  # which transformers turns row c with row c + d_head / 2, are laid out pair after pair.
  theirs = safetensors.numpy.load_file(GOLDEN / 'llama' / 'model.safetensors')
  pair_after_pair = [c + half for c in range(4) for half in (0, 4)]
  tensors = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight'}
  tensors = {name: theirs[their_name] for name, their_name in tensors.items()}
  tensors['output.weight'] = theirs['lm_head.weight']
  for i in range(3):
    layer = {name.removeprefix(f'model.layers.{i}.'): x for name, x in theirs.items() if f'layers.{i}.' in name}
    for name, their_name in (
      ('attn_norm', 'input_layernorm'),
      ('attn_v', 'self_attn.v_proj'),
      ('attn_output', 'self_attn.o_proj'),
      ('ffn_norm', 'post_attention_layernorm'),
      ('ffn_gate', 'mlp.gate_proj'),
      ('ffn_up', 'mlp.up_proj'),
      ('ffn_down', 'mlp.down_proj'),
    ):
      tensors[f'blk.{i}.{name}.weight'] = layer[f'{their_name}.weight']
    for name, n_head in (('q', 6), ('k', 2)):
      heads = layer[f'self_attn.{name}_proj.weight'].reshape(n_head, 8, 48)
      tensors[f'blk.{i}.attn_{name}.weight'] = heads[:, pair_after_pair].reshape(n_head * 8, 48)
  settings = SETTINGS | {
    'llama.block_count': 3,
    'llama.embedding_length': 48,
    'llama.feed_forward_length': 80,
    'llama.attention.key_length': 8,
    'llama.attention.value_length': 8,
    'llama.rope.dimension_count': 8,
  }
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', settings, tensors))
  assert gguf_files.llama_fields(file)['n_vocab'] == 101
  assert set(gguf_files.llama_names(file)) == set(theirs)
  for name in gguf_files.llama_names(file):
    np.testing.assert_array_equal(gguf_files.llama_tensor(file, name), theirs[name], err_msg=name)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'llama.expert_count': 8}, 'mixture of 8 experts; our Llama has one MLP a layer'),
    ({'llama.rope.scaling.type': 'yarn'}, "scaling.type is 'yarn'; supported: none, linear"),
    ({'llama.rope.scaling.type': 'linear'}, r'lacks llama\.rope\.scaling\.factor'),
    (
      {'llama.attention.sliding_window': 8},
      r'llama\.attention\.sliding_window is 8, a setting that our Llama',
    ),
    ({'llama.attention.causal': False}, r'llama\.attention\.causal is False'),
    ({'llama.block_count': None}, r'lacks llama\.block_count'),
    ({'llama.feed_forward_length': [96, 64]}, r'feed_forward_length is \[96, 64\]; our Llama needs a whole number'),
    ({'llama.attention.head_count': 0}, r'head_count is 0; our Llama needs a whole number above 0'),
    ({'llama.attention.head_count_kv': 4}, 'n_head 6 must be a multiple of n_kv_head 4'),
    ({'llama.attention.head_count': 6.5}, r'head_count is 6\.5; our Llama needs a whole number'),
    ({'llama.rope.freq_base': float('nan')}, 'freq_base is nan; our Llama needs a number above 0'),
    ({'llama.block_count': 10**9}, 'has 21 tensors for 1000000000 layers'),
    ({'llama.rope.dimension_count': 8}, 'dimension_count is 8; our Llama has 16 channels a head'),
    ({'llama.feed_forward_length': 128}, r'blk\.0\.ffn_gate\.weight has shape \(96, 64\), its metadata .* \(128, 64\)'),
    ({'llama.block_count': 3}, r'lacks 9 tensors, blk\.2\.attn_norm\.weight for one'),
    ({'llama.block_count': 1}, r'has 9 tensors that our Llama does not have, blk\.1\.attn_k\.weight for one'),
  ],
)
def test_settings_that_our_llama_does_not_have_raise(tmp_path, settings, message):
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', SETTINGS | settings))
  with pytest.raises(ValueError, match=message):
    gguf_files.llama_fields(file)


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('blk.1.attn_q.bias', (96,), r'has 1 tensors that our Llama does not have, blk\.1\.attn_q\.bias for one'),
    ('blk.0.attn_q_norm.weight', (16,), r'does not have, blk\.0\.attn_q_norm\.weight'),
    ('blk.7.ffn_up.weight', (96, 64), r'does not have, blk\.7\.ffn_up\.weight'),
    ('rope_freqs.weight', (16,), r'rope_freqs\.weight has shape \(16,\), its metadata ask for \(8,\)'),
  ],
)
def test_tensors_that_our_llama_does_not_have_raise(tmp_path, name, shape, message):
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', tensors=_tensors(SHAPES | {name: shape})))
  with pytest.raises(ValueError, match=message):
    gguf_files.llama_fields(file)


def test_another_architecture_raises(tmp_path):
  file = gguf_files.open_file(_write(tmp_path / 'a.gguf', architecture='qwen2'))
  with pytest.raises(ValueError, match="is of architecture 'qwen2'; supported: llama"):
    gguf_files.llama_fields(file)


def test_another_quantisation_raises(tmp_path):
  packed = np.zeros((3, 210), np.uint8)  # blocks of 256 numbers
  path = _write(tmp_path / 'a.gguf', tensors={'token_embd.weight': packed}, types={'token_embd.weight': TYPE.Q6_K})
  file = gguf_files.open_file(path)
  assert file.shape('token_embd.weight') == (3, 256)
  message = r'token_embd\.weight is of type Q6_K; supported: F32, F16, Q8_0, Q4_0, Q4_1'
  with pytest.raises(ValueError, match=message):
    file.tensor('token_embd.weight')
  types = {'blk.1.ffn_up.weight': TYPE.Q5_0}
  with pytest.raises(ValueError, match=r'blk\.1\.ffn_up\.weight is of type Q5_0'):  # before any tensor is read
    gguf_files.llama_fields(gguf_files.open_file(_write(tmp_path / 'b.gguf', types=types)))


def test_a_file_that_is_cut_anywhere_raises(tmp_path):
  whole = _write(tmp_path / 'a.gguf').read_bytes()
  path = tmp_path / 'cut.gguf'
  end = len(whole) - N_NEURONS * D_MODEL * 4  # of the last tensor's metadata and all others, it begins here
  lengths = [4, 6, 8, 12, 24, 25, *range(30, 4000, 97), end, end + 1, len(whole) - 1]
  for length in lengths:
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r'cut\.gguf is cut short or damaged: .*; fetch it again'):
      gguf_files.open_file(path)
  with pytest.raises(ValueError, match=rf'ffn_down\.weight goes to byte {len(whole)}, the file to {len(whole) - 1}'):
    gguf_files.open_file(path)
  path.write_bytes(whole)
  gguf_files.open_file(path)


def test_damaged_metadata_raise_one_error(tmp_path):
  whole = bytearray(_write(tmp_path / 'a.gguf').read_bytes())
  n_metadata = whole.index(b'blk.1.ffn_down.weight') + 60
  rng = np.random.default_rng(0)
  messages = []
  for _ in range(300):
    damaged = whole.copy()
    damaged[rng.integers(8, n_metadata)] = rng.integers(256)
    (tmp_path / 'b.gguf').write_bytes(damaged)
    try:
      gguf_files.llama_fields(gguf_files.open_file(tmp_path / 'b.gguf'))
    except ValueError as e:
      messages.append(str(e))
  assert len(messages) > 200
  assert all('b.gguf' in message for message in messages)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', r"it begins with b'', expected b'GGUF'"),
    (b'{"model_type": "llama"}', r"is not a GGUF file: it begins with b'\{\"mo'"),
    (b'GGUF' + (1).to_bytes(4, 'little') + bytes(40), 'is of GGUF version 1; supported: 2, 3'),
    (b'GGUF' + (3).to_bytes(4, 'big') + bytes(40), 'is a big-endian GGUF file'),
  ],
)
def test_what_is_not_a_gguf_file_raises(tmp_path, content, message):
  (tmp_path / 'a.gguf').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    gguf_files.open_file(tmp_path / 'a.gguf')


def test_a_file_or_package_that_is_missing_is_named(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match=r'no file .*nowhere\.gguf'):
    gguf_files.open_file(tmp_path / 'nowhere.gguf')
  path = _write(tmp_path / 'a.gguf')
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match=r"pip install 'jax-interp\[gguf\]'"):
    gguf_files.open_file(path)


# Tokenizers

TEXTS = json.loads((GOLDEN / 'smollm2' / 'tokenization.json').read_text())
SPECIAL, ADDED = '<|end|>', '<added>'
SPLITS = {  # the same cuts, by the pre-tokenizers with which models of transformers come
  'gpt-2': tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
  'smollm': tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  ),
}


def _trained() -> tuple[list[str], list[str]]:
  """Returns tokens and merges of a BPE that was trained on uncut texts, so that what cuts them matters."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=900, special_tokens=[SPECIAL, ADDED], initial_alphabet=alphabet, show_progress=False
  )
  bpe.train_from_iterator([text for text in TEXTS for _ in range(2)], trainer)
  model = json.loads(bpe.to_str())['model']
  return sorted(model['vocab'], key=model['vocab'].get), [' '.join(pair) for pair in model['merges']]


def _tokenizer_file(path, pre, **changes) -> pathlib.Path:
  """Writes a whole small model, which llama.cpp loads too."""
  tokens, merges = _trained()
  tokenizer = {
    'tokenizer_model': 'gpt2',
    'tokenizer_pre': pre,
    'token_list': tokens,
    'token_types': [3, 4] + [1] * (len(tokens) - 2),
    'token_merges': merges,
    'bos_token_id': 0,
    'eos_token_id': 0,
    'add_bos_token': False,
  } | changes
  shapes = SHAPES | dict.fromkeys(('token_embd.weight', 'output.weight'), (len(tokens), D_MODEL))
  settings = SETTINGS | {'llama.vocab_size': len(tokens)}
  tokenizer = {key: value for key, value in tokenizer.items() if value is not None}
  return _write(path, settings, _tensors(shapes), tokenizer=tokenizer)


def _ids(tokenizer, text: str) -> list[int]:
  return tokenizer(text, add_special_tokens=False)['input_ids']


@pytest.mark.parametrize('pre', SPLITS)
def test_a_tokenizer_is_that_of_transformers(tmp_path, pre):
  found = gguf_files.tokenizer(gguf_files.open_file(_tokenizer_file(tmp_path / 'a.gguf', pre)))
  tokens, merges = _trained()
  vocabulary = {token: i for i, token in enumerate(tokens)}
  expected = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(merge.split(' ')) for merge in merges]))
  expected.pre_tokenizer = SPLITS[pre]
  expected.add_special_tokens([SPECIAL])
  expected.add_tokens([ADDED])
  for text in [*TEXTS, f'a{SPECIAL} b{ADDED}{ADDED}c 12', '   1']:
    assert _ids(found, text) == expected.encode(text, add_special_tokens=False).ids, text
    assert found.decode(_ids(found, text)) == text
  assert len(found) == len(tokens)
  assert found.all_special_tokens == [SPECIAL]
  assert found.decode(_ids(found, f'a{SPECIAL}{ADDED}'), skip_special_tokens=True) == f'a{ADDED}'
  assert found.eos_token == found.bos_token == SPECIAL
  assert found.pad_token is None


def test_llama_3_takes_whole_words_and_a_beginning(tmp_path):
  tokens, merges = _trained()
  tokens, merges = [*tokens, 'zqz'], merges  # a token that no merges lead to
  kinds = [3, 4] + [1] * (len(tokens) - 2)
  whole = {'token_list': tokens, 'token_types': kinds, 'add_bos_token': None, 'chat_template': '{{ messages }}'}
  found = gguf_files.tokenizer(gguf_files.open_file(_tokenizer_file(tmp_path / 'a.gguf', 'llama-bpe', **whole)))
  assert _ids(found, 'zqz') == [len(tokens) - 1]
  assert found('zqz')['input_ids'] == [0, len(tokens) - 1]
  assert found('zqz', 'zqz')['input_ids'] == [0, len(tokens) - 1] * 2
  assert found.chat_template == '{{ messages }}'
  other = gguf_files.tokenizer(gguf_files.open_file(_tokenizer_file(tmp_path / 'b.gguf', 'gpt-2', **whole)))
  assert len(other('zqz')['input_ids']) == 3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'tokenizer_model': 'llama'},
      r"model is 'llama'; supported: gpt2 \(byte-level BPE\); put the model's",
    ),
    ({'tokenizer_pre': 'qwen2'}, r"pre is 'qwen2'; supported: gpt-2, smollm, llama-bpe, default; put the model's"),
    ({'token_list': None}, r'has no tokenizer; put the model'),
    ({'token_types': [3, 4]}, r'its \d+ tokens are not distinct, or not each of a type'),
    ({'eos_token_id': 5000}, r'eos_token_id is 5000, of \d+ tokens'),
    ({'token_merges': ['zz']}, 'its merges are not of its tokens'),
    ({'token_merges': ['zz zz']}, 'its merges are not of its tokens'),
    ({'token_list': ['a', 'a'], 'token_types': [1, 1]}, 'its 2 tokens are not distinct'),
  ],
)
def test_a_tokenizer_that_is_not_known_raises(tmp_path, changes, message):
  file = gguf_files.open_file(_tokenizer_file(tmp_path / 'a.gguf', **{'pre': 'gpt-2'} | changes))
  with pytest.raises(ValueError, match=message):
    gguf_files.tokenizer(file)


def _smollm2() -> gguf_files.GGUFFile:
  try:
    return gguf_files.open_file(pretrained.smollm2_file())
  except FileNotFoundError as e:
    pytest.skip(str(e))


def test_smollm2_is_tokenized_as_by_llama_cpp_and_back():
  tokenizer = gguf_files.tokenizer(_smollm2())
  for text, ids in TEXTS.items():
    assert _ids(tokenizer, text) == ids, text
    without_token = '\x04\x06\x13\x1d'  # of which the vocabulary has no bytes
    assert tokenizer.decode(ids) == text.translate(dict.fromkeys(map(ord, without_token))), text
  assert len(tokenizer) == 49152
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
    1,
    2,
    0,
    2,
  )
  chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False, add_generation_prompt=True)
  assert chat.endswith('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'default'])
def test_a_tokenizer_cuts_text_as_llama_cpp_does(tmp_path, pre):
  if not importlib.util.find_spec('xllamacpp'):
    pytest.skip('xllamacpp, with which text is cut to compare, is not installed')
  path = _tokenizer_file(tmp_path / 'a.gguf', pre)
  tokenizer = gguf_files.tokenizer(gguf_files.open_file(path))
  rng = np.random.default_rng(0)
  pieces = [*TEXTS, *'0123 \t\n.,\'"$<=|', '2019', "'s", "'LL", 'é', '世', '🙂', '\u00a0', '\u2028', SPECIAL, ADDED]
  mixed = [''.join(rng.choice(pieces, rng.integers(2, 9))) for _ in range(200)]
  with local_server.serve(path) as url:
    for text in [*TEXTS, *mixed]:
      body = json.dumps({'content': text, 'add_special': False}).encode()
      request = urllib.request.Request(
        f'{url.removesuffix("/v1")}/tokenize', body, {'Content-Type': 'application/json'}
      )
      with urllib.request.urlopen(request) as response:
        assert _ids(tokenizer, text) == json.load(response)['tokens'], text
