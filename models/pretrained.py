"""Pretrained weights and tokenizers to modules on the mesh, and back.

Takes 'embedded' (the small model that ships with us), a folder, or a hub id such as openai-community/gpt2; reads
safetensors tensor by tensor onto its shards. Files have the layout of `transformers`, which reads what `save_model`
writes.
"""

import errno
import hashlib
import json
import math
import os
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import tokenizers
from flax import nnx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from models import gpt2

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # it warns at import that there is no torch
import transformers

EMBEDDED = 'embedded'
END_OF_TEXT = '<|endoftext|>'
EMBEDDED_FOLDER = pathlib.Path(__file__).parent.parent / 'jax_interp' / 'assets' / 'tiny_gpt2'
MODEL_FILES = ['config.json', '*.safetensors', '*.safetensors.index.json']
TOKENIZER_FILES = ['tokenizer*.json', 'vocab.json', 'merges.txt', 'special_tokens_map.json']
_THEIR_NAMES = {  # ours -> theirs, where they differ
  'attn_ln.': 'ln_1.',
  'mlp_ln.': 'ln_2.',
  '.kernel': '.weight',
  '.embedding': '.weight',
  '.gain': '.weight',
}
_FIXED = {  # what our GPT-2 computes; reorder_and_upcast_attn is absent: it changes rounding in half precision alone
  'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),  # two names of one function
  'layer_norm_epsilon': (gpt2.LAYER_NORM_EPS,),
  'scale_attn_weights': (True,),
  'scale_attn_by_inverse_layer_idx': (False,),
  'tie_word_embeddings': (True,),
}


def _folder(source: str, patterns: list[str]) -> pathlib.Path:
  if source == EMBEDDED:
    return EMBEDDED_FOLDER
  if os.path.isdir(source):
    return pathlib.Path(source)
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
  except (HfHubHTTPError, HFValidationError, OSError) as e:
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
      raise
    raise FileNotFoundError(
      f'no model at {source!r}: it is no folder, and the hub did not give it ({type(e).__name__}); give a folder with '
      'config.json and *.safetensors, or a hub id while online'
    ) from e


def _read_config(folder: pathlib.Path) -> gpt2.GPT2Config:
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{folder} has no config.json; give a folder that `transformers` could load')
  config = json.loads(path.read_text('utf-8'))
  if config.get('model_type') != 'gpt2':
    raise ValueError(f'{path} is of model_type {config.get("model_type")!r}; supported: gpt2')
  for field, known in _FIXED.items():
    if config.get(field, known[0]) not in known:
      raise ValueError(f'{path}: {field} is {config[field]!r}; our GPT-2 computes with {known[0]!r} only')
  if config.get('n_inner') not in (None, 4 * config['n_embd']):
    raise ValueError(f'{path}: n_inner is {config["n_inner"]}; our GPT-2 has 4 * n_embd neurons')
  return gpt2.GPT2Config(
    n_layer=config['n_layer'],
    n_head=config['n_head'],
    d_model=config['n_embd'],
    n_ctx=config['n_positions'],
    n_vocab=config['vocab_size'],
  )


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  files = sorted(folder.glob('*.safetensors'))
  if not files:
    raise FileNotFoundError(f'{folder} has no *.safetensors; convert the weights to safetensors')
  return files


def _parameters(config: gpt2.GPT2Config):
  """Returns the parameters' names in the files, their shapes with shardings, and the tree's structure."""
  abstract = jax.eval_shape(lambda: gpt2.GPT2(config, nnx.Rngs(0)))
  shardings = jax.tree.leaves(nnx.get_named_sharding(abstract, jax.sharding.get_mesh()))
  paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  names = []
  for path, _ in paths_and_leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
    for ours, theirs in _THEIR_NAMES.items():
      name = name.replace(ours, theirs)
    names.append(name)
  leaves = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    for (_, leaf), sharding in zip(paths_and_leaves, shardings, strict=True)
  ]
  return names, leaves, structure


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a parameter's shape in the files.

  Their matrices are Conv1D's, [in, out]; our attention keeps q, k, v and the heads as axes of their own.
  """
  if len(shape) == 1 or name.endswith('.bias'):
    return (math.prod(shape),)
  n_in = 2 if name.endswith('attn.c_proj.weight') else 1
  return math.prod(shape[:n_in]), math.prod(shape[n_in:])


def load_model(source: str) -> gpt2.GPT2:
  """Returns the model in float32 on the ambient mesh, one tensor on the host at a time.

  Args:
    source: 'embedded', a folder with config.json and *.safetensors (Conv1D layout, with or without the prefix
      `transformer.`), or a hub id.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: another family of models, a GPT-2 with settings that ours does not have, or a file that is truncated or
      lacks a tensor or has one of another shape.
  """
  folder = _folder(source, MODEL_FILES)
  names, leaves, structure = _parameters(_read_config(folder))
  arrays = {}
  for path in _weight_files(folder):
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        stored = {name.removeprefix('transformer.'): name for name in file.keys()}  # noqa: SIM118
        for name, leaf in zip(names, leaves, strict=True):
          if name in stored:
            tensor = file.get_tensor(stored[name])
            expected = _stored_shape(name, leaf.shape)
            if tensor.shape != expected:
              raise ValueError(f'{path}: {name} has shape {tensor.shape}, config.json asks for {expected}')
            arrays[name] = jax.device_put(np.asarray(tensor, np.float32).reshape(leaf.shape), leaf.sharding)
    except safetensors.SafetensorError as e:
      raise ValueError(f'{path} is damaged ({e}); fetch it again') from e
  if missing := [name for name in names if name not in arrays]:
    raise ValueError(f'{folder} lacks {len(missing)} tensors, {missing[0]} for one; it is not a whole GPT-2')
  return jax.tree.unflatten(structure, [arrays[name] for name in names])


def save_model(folder: str | pathlib.Path, model: gpt2.GPT2, dtype=jnp.float32):
  """Writes config.json and model.safetensors in the layout of `transformers`, each atomically.

  Args:
    folder: made where it is not there.
    dtype: of the stored weights, for example jnp.bfloat16.

  Raises:
    OSError: they cannot be written, for example because the disk is full.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = model.config
  fields = {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'n_layer': config.n_layer,
    'n_head': config.n_head,
    'n_embd': config.d_model,
    'n_positions': config.n_ctx,
    'vocab_size': config.n_vocab,
  }
  tensors = {}
  for name, leaf in zip(_parameters(config)[0], jax.tree.leaves(model), strict=True):
    tensors[name] = jnp.asarray(leaf, dtype).reshape(_stored_shape(name, leaf.shape))
  # Not save_file: on a full disk it raises an error of its own, which is no OSError.
  (folder / 'model.safetensors.partial').write_bytes(safetensors.flax.save(tensors, {'format': 'pt'}))
  os.replace(folder / 'model.safetensors.partial', folder / 'model.safetensors')
  (folder / 'config.json.partial').write_text(json.dumps(fields, indent=2), 'utf-8')
  os.replace(folder / 'config.json.partial', folder / 'config.json')


def load_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
  """Returns the tokenizer of 'embedded', a folder (tokenizer.json, or vocab.json and merges.txt) or a hub id.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it has no <|endoftext|>.
  """
  folder = _folder(source, TOKENIZER_FILES)
  if (folder / 'tokenizer.json').is_file():
    bpe = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  elif (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
    # transformers 5's GPT2TokenizerFast(vocab_file=...) silently builds an empty tokenizer, so the BPE is built here.
    bpe = tokenizers.ByteLevelBPETokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'))._tokenizer
  else:
    raise FileNotFoundError(f'{folder} has neither tokenizer.json nor vocab.json with merges.txt')
  if bpe.token_to_id(END_OF_TEXT) is None:  # transformers would add it behind the last token that the model knows
    raise ValueError(f'the tokenizer in {folder} has no {END_OF_TEXT!r}; give the tokenizer that the GPT-2 came with')
  return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


def fingerprint(source: str) -> str:
  """Returns a hash of the model's configuration and weights, by which artefacts know which model they are of."""
  folder = _folder(source, MODEL_FILES)
  digest = hashlib.sha256()
  for path in [folder / 'config.json', *_weight_files(folder)]:
    with open(path, 'rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:16]
