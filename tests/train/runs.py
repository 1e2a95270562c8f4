"""Small runs: for commands that take activations, a store of them; for those that take a trained SAE, all it needs."""

import json

import jax
import ml_collections
import numpy as np
import tokenizers
from flax import nnx

from jax_interp import store
from models import gpt2, pretrained, sharding
from models import sae as sae_lib
from train import capture, command
from train import sae as train_sae

D, SITE = 8, 'h.0.resid.post_mlp'
D_SUMS = 24


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


def capture_sums(config, workdirs, n_directions, share, others=()):
  """Writes config.capture.store, whose activations are sums of a share of some directions, as captured by workdirs.

  Args:
    config: its sae.site has activations of D_SUMS numbers, in float32.
    workdirs: folders that have captured it.
    n_directions: how many there are.
    share: of them at a token.
    others: of {site: function of the first one's activations [e, t, d]} pairs.
  """
  rng, settings, window = np.random.default_rng(0), config.capture, config.text.window
  derive = {config.sae.site: lambda x_etd: x_etd, **dict(others)}
  widths = {site: of(np.zeros((1, 1, D_SUMS))).shape[2:] for site, of in derive.items()}
  saved = store.ActivationStore.create(
    settings.store,
    widths,
    settings.n_tokens // window,
    window,
    shard_examples=settings.shard_examples,
    dtype='float32',
    model=pretrained.fingerprint('embedded'),
    tokenizer='',
    dataset='',
  )
  directions = rng.normal(size=(n_directions, D_SUMS))
  for shard in saved.missing():
    shape = settings.shard_examples, window
    sources = (rng.random((*shape, n_directions)) < share) * rng.exponential(size=(*shape, n_directions))
    x_etd = (sources @ directions + 0.1 * rng.normal(size=(*shape, D_SUMS))).astype(np.float32)
    saved.write(shard, np.zeros(shape, np.int32), {site: of(x_etd) for site, of in derive.items()})
  for workdir in workdirs:
    command.claim(workdir / 'activations', capture.made_with(config, workdir))
    store.write_json(workdir / 'activations' / capture.REPORT, {'store': saved.manifest, 'run': None})
    command.finish(workdir / 'activations')
