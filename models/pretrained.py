"""Pretrained weights and tokenizers to modules on the mesh, and back.

Takes 'embedded' (the small model that ships with us), a folder, or a hub id such as openai-community/gpt2; reads
safetensors tensor by tensor onto its shards. Files have the layout of `transformers`, which reads what `save_model`
writes.
"""

import hashlib
import json
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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

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


def _folder(source: str, patterns: list[str]) -> pathlib.Path:
  if source == EMBEDDED:
    return EMBEDDED_FOLDER
  if os.path.isdir(source):
    return pathlib.Path(source)
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
  except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
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


def load_model(source: str) -> gpt2.GPT2:
  """Returns the model in float32 on the ambient mesh, one tensor on the host at a time.

  Args:
    source: 'embedded', a folder with config.json and *.safetensors (Conv1D layout, with or without the prefix
      `transformer.`), or a hub id.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: another family of models, or a file that is truncated or lacks a tensor or has one of another shape.
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
            if tensor.size != leaf.size:
              raise ValueError(f'{path}: {name} has shape {tensor.shape}, config.json asks for {leaf.shape}')
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
    # Their Conv1D matrices are [in, out]; our attention keeps q, k, v and the heads as axes of their own.
    n_in = {'attn.c_attn.weight': 1, 'attn.c_proj.weight': 2}.get('.'.join(name.split('.')[-3:]), 1)
    shape = (np.prod(leaf.shape[:n_in]), -1) if leaf.ndim > 1 and name.endswith('weight') else (-1,)
    tensors[name] = jnp.asarray(leaf, dtype).reshape(shape)
  safetensors.flax.save_file(tensors, folder / 'model.safetensors.partial', {'format': 'pt'})
  os.replace(folder / 'model.safetensors.partial', folder / 'model.safetensors')
  (folder / 'config.json.partial').write_text(json.dumps(fields, indent=2), 'utf-8')
  os.replace(folder / 'config.json.partial', folder / 'config.json')


def load_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
  """Returns the tokenizer of 'embedded', a folder (tokenizer.json, or vocab.json and merges.txt) or a hub id.

  Raises:
    FileNotFoundError: there is none.
  """
  folder = _folder(source, TOKENIZER_FILES)
  if (folder / 'tokenizer.json').is_file():
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), eos_token=END_OF_TEXT)
  if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
    # transformers 5's GPT2TokenizerFast(vocab_file=...) silently builds an empty tokenizer, so the BPE is built here.
    bpe = tokenizers.ByteLevelBPETokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)
  raise FileNotFoundError(f'{folder} has neither tokenizer.json nor vocab.json with merges.txt')


def fingerprint(source: str) -> str:
  """Returns a hash of the model's configuration and weights, by which artefacts know which model they are of."""
  folder = _folder(source, MODEL_FILES)
  digest = hashlib.sha256()
  for path in [folder / 'config.json', *_weight_files(folder)]:
    with open(path, 'rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:16]
