"""GGUF files (the format of llama.cpp) of Llama models -> sizes, tensors as `transformers` lays them out, a tokenizer.

Tensors stay in the file, which is mapped into memory, until one is asked for: it alone is dequantised, to float32.
Needs the package `gguf`, the extra of that name.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # it warns at import that there is no torch
import transformers

TENSOR_TYPES = ('F32', 'F16', 'Q8_0', 'Q4_0', 'Q4_1')
_ROWS_AT_ONCE = 4096  # the package holds what it dequantises twice, so it is given a part of a tensor at a time
_THEIR_NAMES = {  # in the file -> in the layout of `transformers`
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'blk.{i}.attn_norm': 'model.layers.{i}.input_layernorm',
  'blk.{i}.attn_q': 'model.layers.{i}.self_attn.q_proj',
  'blk.{i}.attn_k': 'model.layers.{i}.self_attn.k_proj',
  'blk.{i}.attn_v': 'model.layers.{i}.self_attn.v_proj',
  'blk.{i}.attn_output': 'model.layers.{i}.self_attn.o_proj',
  'blk.{i}.ffn_norm': 'model.layers.{i}.post_attention_layernorm',
  'blk.{i}.ffn_gate': 'model.layers.{i}.mlp.gate_proj',
  'blk.{i}.ffn_up': 'model.layers.{i}.mlp.up_proj',
  'blk.{i}.ffn_down': 'model.layers.{i}.mlp.down_proj',
}
_ROPE_FACTORS = 'rope_freqs.weight'
_SIZES = {  # of the file -> ours
  'block_count': 'n_layer',
  'attention.head_count': 'n_head',
  'embedding_length': 'd_model',
  'feed_forward_length': 'n_neurons',
  'context_length': 'n_ctx',
}
_OTHER_SETTINGS = (  # that are read, or that say nothing of what is computed
  'attention.head_count_kv',
  'attention.key_length',
  'attention.value_length',
  'attention.layer_norm_rms_epsilon',
  'attention.layer_norm_epsilon',
  'rope.freq_base',
  'rope.dimension_count',
  'rope.scaling.type',
  'rope.scaling.factor',
  'rope.scaling.original_context_length',
  'rope.scaling.finetuned',
  'tensor_data_layout',
  'vocab_size',
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {  # tokenizer.ggml.pre -> the patterns by which llama.cpp cuts text before it merges bytes, one after another
  'gpt-2': (_GPT2_WORDS,),
  'smollm': (r'\p{N}', _GPT2_WORDS),
  'llama-bpe': (_LLAMA3_WORDS,),
  'default': (r'[\p{P}$+<=>^~|]+', _GPT2_WORDS, r'\p{N}+', r'[0-9][0-9][0-9]'),
}
_STRING, _ARRAY = 8, 9  # kinds of a value in the metadata
_NUMBERS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}
_NAMED_TOKENS = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}  # of transformers -> in the file
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where a tensor lies: its type as the file numbers it, its shape, and its bytes row by row in the mapped file."""

  type_id: int
  shape: tuple[int, ...]
  rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """An open file; its tensors are read only when asked for, and under the names that they have in the file.

  Attributes:
    path: where it lies.
    metadata: every key and its value as plain Python: numbers, strings, lists of them.
  """

  path: pathlib.Path
  metadata: dict[str, Any] = dataclasses.field(repr=False)
  _tensors: dict[str, _Tensor] = dataclasses.field(repr=False)

  @property
  def names(self) -> list[str]:
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, rows first: [out, in] of a matrix."""
    return self._tensors[name].shape

  def check_type(self, name: str):
    """Raises ValueError unless the tensor is of one of TENSOR_TYPES."""
    found = _gguf().GGMLQuantizationType(self._tensors[name].type_id).name
    if found not in TENSOR_TYPES:
      raise ValueError(f'{self.path}: {name} is of type {found}; supported: {", ".join(TENSOR_TYPES)}')

  def tensor(self, name: str) -> np.ndarray:
    """Returns a tensor in float32, dequantised.

    Raises:
      ValueError: it is of another type than TENSOR_TYPES.
    """
    self.check_type(name)
    stored = self._tensors[name]
    out = np.empty(stored.shape, np.float32)
    out_rows = out.reshape(len(stored.rows), -1)
    for start in range(0, len(out_rows), _ROWS_AT_ONCE):
      some = slice(start, start + _ROWS_AT_ONCE)
      out_rows[some] = _gguf().quants.dequantize(stored.rows[some], stored.type_id)
    return out


def _gguf():
  """Returns the package, which is optional."""
  try:
    import gguf
  except ImportError as e:
    raise ImportError("GGUF files need the package gguf: pip install 'jax-interp[gguf]'") from e
  return gguf


# The package has a reader of its own, which takes 2 s for a vocabulary of 49152 and says of a cut file only that an
# index is out of bounds; of the package, we use the dequantisation.


def _take(mapped: mmap.mmap, n_bytes: int) -> bytes:
  data = mapped.read(min(n_bytes, len(mapped)))
  if len(data) < n_bytes:
    raise ValueError(f'its metadata go on behind its {len(mapped)} bytes')
  return data


def _numbers(mapped: mmap.mmap, code: str, n: int) -> list:
  dtype = np.dtype(code)
  return np.frombuffer(_take(mapped, n * dtype.itemsize), dtype).tolist()


def _string(mapped: mmap.mmap) -> str:
  return _take(mapped, *_numbers(mapped, '<u8', 1)).decode('utf-8')


def _value(mapped: mmap.mmap, kind: int):
  if kind == _STRING:
    return _string(mapped)
  if kind == _ARRAY:
    (kind,), (n,) = _numbers(mapped, '<u4', 1), _numbers(mapped, '<u8', 1)
    return _numbers(mapped, _NUMBERS[kind], n) if kind in _NUMBERS else [_value(mapped, kind) for _ in range(n)]
  if kind not in _NUMBERS:
    raise ValueError(f'it has a value of the unknown kind {kind}')
  return _numbers(mapped, _NUMBERS[kind], 1)[0]


def _read(mapped: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Tensor]]:
  """Returns the metadata and the tensors of a file from its counts on."""
  metadata, places = {}, {}
  n_tensors, n_values = _numbers(mapped, '<u8', 2)
  for _ in range(n_values):
    key = _string(mapped)
    metadata[key] = _value(mapped, *_numbers(mapped, '<u4', 1))
  for _ in range(n_tensors):
    name = _string(mapped)
    if name in places:
      raise ValueError(f'it has two tensors {name}')
    dims = _numbers(mapped, '<u8', *_numbers(mapped, '<u4', 1))
    places[name] = tuple(dims[::-1]), *_numbers(mapped, '<u4', 1), *_numbers(mapped, '<u8', 1)

  sizes = _gguf().GGML_QUANT_SIZES
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'its alignment is {alignment!r}')
  data_start = -(-mapped.tell() // alignment) * alignment
  tensors = {}
  for name, (shape, type_id, offset) in places.items():
    if type_id not in sizes:
      raise ValueError(f'{name} is of a type {type_id} that the package gguf does not know; update it')
    n_in_block, n_bytes_of_block = sizes[type_id]
    start, n_bytes = data_start + offset, math.prod(shape) // n_in_block * n_bytes_of_block
    if not shape or not n_bytes or shape[-1] % n_in_block:
      raise ValueError(f'{name} has shape {shape}, which is not rows of whole blocks of {n_in_block}')
    if start + n_bytes > len(mapped):
      raise ValueError(f'{name} goes to byte {start + n_bytes}, the file to {len(mapped)}')
    rows = np.frombuffer(mapped, np.uint8, n_bytes, start).reshape(math.prod(shape[:-1]), -1)
    tensors[name] = _Tensor(type_id, shape, rows)
  return metadata, tensors


def open_file(path: str | pathlib.Path) -> GGUFFile:
  """Returns the file, mapped into memory; every tensor lies wholly within it.

  Raises:
    FileNotFoundError: there is none.
    ImportError: the package `gguf` is not installed.
    ValueError: it is no GGUF file, of another version or byte order, cut short or damaged.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}; give the path of a .gguf file')
  with open(path, 'rb') as file:
    magic, version_bytes = file.read(4), file.read(4)
    version = int.from_bytes(version_bytes, 'little')
    if magic != b'GGUF':
      raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    if version and not version & 0xFFFF:
      raise ValueError(f'{path} is a big-endian GGUF file; convert it to little-endian, as most are')
    if len(version_bytes) == 4 and version not in (2, 3):
      raise ValueError(f'{path} is of GGUF version {version}; supported: 2, 3; convert it anew')
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  mapped.read(8)
  try:
    return GGUFFile(path, *_read(mapped))
  except ValueError as e:  # that of a string which is not UTF-8 too
    raise ValueError(f'{path} is cut short or damaged: {e}; fetch it again') from e


def _setting(file: GGUFFile, key: str, default=None, kinds=int):
  """Returns the number `llama.<key>`, which must be there unless there is a default."""
  value = file.metadata.get(f'llama.{key}', default)
  if value is None:
    raise ValueError(f'{file.path} lacks llama.{key}; it is not a whole Llama')
  if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
    expected = 'a whole number' if kinds is int else 'a number'
    raise ValueError(f'{file.path}: llama.{key} is {value!r}; our Llama needs {expected} above 0, one for all layers')
  return value


def _rope_factors(file: GGUFFile, d_head: int) -> np.ndarray | None:
  scaling = file.metadata.get('llama.rope.scaling.type', 'none')
  if scaling not in ('none', 'linear'):
    raise ValueError(f'{file.path}: llama.rope.scaling.type is {scaling!r}; supported: none, linear')
  factors = np.ones(d_head // 2, np.float32)
  if scaling == 'linear':
    factors *= _setting(file, 'rope.scaling.factor', kinds=(int, float))
  if _ROPE_FACTORS in file.names:
    if file.shape(_ROPE_FACTORS) != factors.shape:
      raise ValueError(
        f'{file.path}: {_ROPE_FACTORS} has shape {file.shape(_ROPE_FACTORS)}, its metadata ask for {factors.shape}'
      )
    factors *= file.tensor(_ROPE_FACTORS)
  return None if (factors == 1).all() else factors


def _their_names(file: GGUFFile) -> dict[str, str]:
  """Returns the tensors that a Llama has: name as `transformers` has it -> name in the file."""
  n_layer, tied = _setting(file, 'block_count'), 'output.weight' not in file.names
  if n_layer > len(file.names):  # before so many names are made
    raise ValueError(f'{file.path} has {len(file.names)} tensors for {n_layer} layers; it is not a whole Llama')
  names = {}
  for ours, theirs in _THEIR_NAMES.items():
    for i in range(n_layer) if '{i}' in ours else range(1):
      if not (tied and ours == 'output'):
        names[f'{theirs.format(i=i)}.weight'] = f'{ours.format(i=i)}.weight'
  return names


def _shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns a tensor's shape by the last part but one of its name in the file."""
  d, n, v = fields['d_model'], fields['n_neurons'], fields['n_vocab']
  q, kv = fields['n_head'] * fields['d_head'], fields['n_kv_head'] * fields['d_head']
  return {
    **dict.fromkeys(('token_embd', 'output'), (v, d)),
    **dict.fromkeys(('output_norm', 'attn_norm', 'ffn_norm'), (d,)),
    **dict.fromkeys(('ffn_gate', 'ffn_up'), (n, d)),
    **dict.fromkeys(('attn_k', 'attn_v'), (kv, d)),
    'attn_q': (q, d),
    'attn_output': (d, q),
    'ffn_down': (d, n),
  }


def llama_fields(file: GGUFFile) -> dict[str, Any]:
  """Returns what a Llama of this file is made with, after a check of everything in the file but the numbers.

  Returns:
    n_layer, n_head, n_kv_head, d_model, d_head, n_neurons (of the MLP), n_ctx, n_vocab: ints.
    rope_theta, norm_eps: floats.
    tied: whether the unembedding is the embedding.
    rope_factors: float32 [d_head / 2], by which the rotary frequencies rope_theta**(-2i / d_head) are divided (linear
      scaling, or the tensor rope_freqs that Llama 3 files carry), or None.

  Raises:
    ValueError: another architecture than llama, a mixture of experts, a setting or tensor that our Llama does not
      have (biases are such), or a tensor that is missing, of another shape or of another type.
  """
  architecture = file.metadata.get('general.architecture')
  if architecture != 'llama':
    raise ValueError(f'{file.path} is of architecture {architecture!r}; supported: llama')
  if experts := file.metadata.get('llama.expert_count'):
    raise ValueError(f'{file.path} is a mixture of {experts} experts; our Llama has one MLP a layer')
  for key, value in file.metadata.items():
    setting = key.removeprefix('llama.')
    known = setting in _SIZES or setting in _OTHER_SETTINGS or value == 0  # some files have an expert_count of 0
    if key.startswith('llama.') and (not known or value is False):
      raise ValueError(f'{file.path}: {key} is {value!r}, a setting that our Llama does not have')
  if 'token_embd.weight' not in file.names:
    raise ValueError(f'{file.path} lacks token_embd.weight; it is not a whole Llama')

  fields = {ours: _setting(file, key) for key, ours in _SIZES.items()}
  fields['n_vocab'] = file.shape('token_embd.weight')[0]
  n_head, d_model = fields['n_head'], fields['d_model']
  fields['n_kv_head'] = _setting(file, 'attention.head_count_kv', n_head)
  fields['d_head'] = d_head = _setting(file, 'attention.key_length', d_model // n_head)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if _setting(file, key, d_head) != d_head:
      raise ValueError(f'{file.path}: llama.{key} is {_setting(file, key)}; our Llama has {d_head} channels a head')
  if n_head % fields['n_kv_head'] or d_head % 2:
    raise ValueError(
      f'{file.path}: n_head {n_head} must be a multiple of n_kv_head {fields["n_kv_head"]}, d_head {d_head} even'
    )
  fields['rope_theta'] = float(_setting(file, 'rope.freq_base', 10000.0, (int, float)))
  fields['norm_eps'] = float(_setting(file, 'attention.layer_norm_rms_epsilon', kinds=(int, float)))
  fields['tied'] = 'output.weight' not in file.names

  expected = list(_their_names(file).values())
  if unknown := sorted(set(file.names) - {*expected, _ROPE_FACTORS}):
    raise ValueError(f'{file.path} has {len(unknown)} tensors that our Llama does not have, {unknown[0]} for one')
  if missing := [name for name in expected if name not in file.names]:
    raise ValueError(f'{file.path} lacks {len(missing)} tensors, {missing[0]} for one; it is not a whole Llama')
  shapes = _shapes(fields)
  for name in expected:
    file.check_type(name)
    if file.shape(name) != (shape := shapes[name.split('.')[-2]]):
      raise ValueError(f'{file.path}: {name} has shape {file.shape(name)}, its metadata ask for {shape}')
  fields['rope_factors'] = _rope_factors(file, d_head)
  return fields


def llama_names(file: GGUFFile) -> list[str]:
  """Returns the names of a Llama's tensors as `transformers` has them, `model.layers.3.mlp.up_proj.weight` for one."""
  return list(_their_names(file))


def llama_tensor(file: GGUFFile, name: str) -> np.ndarray:
  """Returns a tensor by its name in `transformers` and in the layout that it has there: float32, matrices [out, in].

  In the file, the two channels of a rotary pair are neighbours; in `transformers` they are d_head / 2 apart. The rows
  of q and k are put in that order.

  Raises:
    KeyError: the name is none of llama_names.
    ValueError: its type is not supported.
  """
  tensor = file.tensor(_their_names(file)[name])
  if not re.search(r'self_attn\.[qk]_proj', name):
    return tensor
  n_head = _setting(file, 'attention.head_count')
  if '.k_proj' in name:
    n_head = _setting(file, 'attention.head_count_kv', n_head)
  n_rows, d_model = tensor.shape
  return tensor.reshape(n_head, n_rows // n_head // 2, 2, d_model).swapaxes(1, 2).reshape(n_rows, d_model)


def tokenizer(file: GGUFFile) -> transformers.PreTrainedTokenizerFast:
  """Returns the file's byte-level BPE, which cuts text into the tokens into which llama.cpp cuts it.

  Control tokens are special tokens, and text that spells one becomes it. The beginning-of-sequence token stands in
  front where the file wants it and the caller asks for special tokens. A byte that has no token is left out.

  Raises:
    ValueError: the file has no tokenizer, or one of another model or with another way to cut text into words.
  """
  way_out = f"put the model's tokenizer.json beside {file.path.name}, which is then read instead"
  values = {key.removeprefix('tokenizer.ggml.'): value for key, value in file.metadata.items()}
  if not values.get('tokens'):
    raise ValueError(f'{file.path} has no tokenizer; {way_out}')
  if values.get('model') != 'gpt2':
    raise ValueError(
      f'{file.path}: tokenizer.ggml.model is {values.get("model")!r}; supported: gpt2 (byte-level BPE); {way_out}'
    )
  pre = values.get('pre', 'default')
  if pre not in _SPLITS:
    raise ValueError(f'{file.path}: tokenizer.ggml.pre is {pre!r}; supported: {", ".join(_SPLITS)}; {way_out}')
  tokens = values['tokens']
  ids = {token: i for i, token in enumerate(tokens)}
  pairs = [tuple(merge.split(' ', 1)) for merge in values.get('merges', [])]
  kinds = values.get('token_type', [1] * len(tokens))
  if len(ids) != len(tokens) or len(kinds) != len(tokens):
    raise ValueError(f'{file.path}: its {len(tokens)} tokens are not distinct, or not each of a type; {way_out}')
  named = {}
  for ours, theirs in _NAMED_TOKENS.items():
    if (i := values.get(f'{theirs}_token_id')) is not None:
      if i >= len(tokens):
        raise ValueError(f'{file.path}: {theirs}_token_id is {i}, of {len(tokens)} tokens; {way_out}')
      named[f'{ours}_token'] = tokens[i]
  if not all(len(pair) == 2 and {*pair, ''.join(pair)} <= ids.keys() for pair in pairs):
    raise ValueError(f'{file.path}: its merges are not of its tokens; {way_out}')

  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=pairs, ignore_merges=pre == 'llama-bpe'))
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated') for pattern in _SPLITS[pre]]
  # A byte without a token (SmolLM2 lacks a few control characters) gives none, nor do its neighbours merge across it.
  absent = ''.join(re.escape(byte) for byte in byte_level.alphabet() if byte not in ids)
  keep_apart = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(f'[{absent}]'), 'isolated')] if absent else []
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, byte_level, *keep_apart])
  bpe.decoder = tokenizers.decoders.ByteLevel()
  for token, kind in zip(tokens, kinds, strict=True):
    if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
      added = tokenizers.AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
      (bpe.add_tokens if kind == _USER_DEFINED else bpe.add_special_tokens)([added])

  if values.get('add_bos_token', pre == 'llama-bpe') and 'bos_token' in named:
    bos = named['bos_token']
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
      single=[bos, '$A'], pair=[bos, '$A', bos, '$B'], special_tokens=[(bos, ids[bos])]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    chat_template=file.metadata.get('tokenizer.chat_template'),
    clean_up_tokenization_spaces=False,
    **named,
  )
