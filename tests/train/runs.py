"""A small run for commands that take a trained SAE: a random model with its tokenizer, a text, and an SAE."""

import json

import jax
import ml_collections
import numpy as np
import tokenizers
from flax import nnx

from models import gpt2, pretrained, sharding
from models import sae as sae_lib
from train import command
from train import sae as train_sae

D, SITE = 8, 'h.0.resid.post_mlp'


def make_config(workdir, **blocks):
  """Returns a config of the run, with more blocks."""
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': str(workdir / 'model')},
      'text': {'source': str(workdir / 'text.jsonl'), 'window': 16},
      'capture': {},
      'sae': {'site': SITE},
      **blocks,
    }
  )


def build(folder, sae):
  """Makes the run in a folder, with an SAE of D numbers on one device, and returns the folder."""
  rng = np.random.default_rng(0)
  documents = [' '.join(rng.choice(['the', 'cat', 'sat', 'on', 'a', 'mat'], 60)) for _ in range(60)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': document}) for document in documents))
  (folder / 'model').mkdir()
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(documents, 280, special_tokens=[pretrained.END_OF_TEXT], show_progress=False)
  bpe._tokenizer.save(str(folder / 'model' / 'tokenizer.json'))
  config = gpt2.GPT2Config(n_layer=1, n_head=2, d_model=D, n_ctx=16, n_vocab=bpe.get_vocab_size())
  with jax.set_mesh(sharding.make_mesh()):
    pretrained.save_model(folder / 'model', jax.jit(lambda: gpt2.GPT2(config, nnx.Rngs(0)))())
    command.claim(folder / 'sae', train_sae.made_with(make_config(folder), folder))
    sae_lib.save(folder / 'sae' / 'final', sae)
    command.finish(folder / 'sae')
  return folder
