"""train.evaluate on a random model: the whole flow, once."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import nnx

from models import gpt2, pretrained, sharding
from models import sae as sae_lib
from models.activation_functions import TopK
from train import command, evaluate
from train import sae as train_sae

D, L = 8, 16


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A folder with a random model, its tokenizer, a text, and an SAE that gives back every activation."""
  folder = tmp_path_factory.mktemp('run')
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
    identity = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    command.claim(folder / 'sae', train_sae.made_with(make_config(folder), folder))
    sae_lib.save(
      folder / 'sae' / 'final', sae_lib.SparseAutoencoder(identity, identity, jnp.zeros(D), jnp.zeros(L), TopK(L))
    )
    command.finish(folder / 'sae')
  return folder


def make_config(workdir, **changed):
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': str(workdir / 'model')},
      'text': {'source': str(workdir / 'text.jsonl'), 'window': 16},
      'capture': {},
      'sae': {'site': 'h.0.resid.post_mlp'},
      'evaluate': {'n_tokens': 200, 'batch_size': 4, **changed},
    }
  )


@pytest.mark.usefixtures('mesh')
def test_metrics_are_written_once(workdir, tmp_path, capsys):
  for name in ('sae', 'text'):
    if (workdir / name).exists():
      (tmp_path / name).symlink_to(workdir / name)
  config = make_config(workdir)
  evaluate.run(config, tmp_path)
  path = tmp_path / 'evaluation' / 'metrics.json'
  numbers = json.loads(path.read_text())
  np.testing.assert_allclose(numbers['explained_variance'], 1, atol=1e-5)
  np.testing.assert_allclose(numbers['kl_spliced'], 0, atol=1e-5)
  assert 'explained_variance ' in capsys.readouterr().out
  written = path.stat().st_mtime_ns
  evaluate.run(config, tmp_path)
  assert path.stat().st_mtime_ns == written
  config.evaluate.n_tokens = 300
  with pytest.raises(ValueError, match=r'evaluate.n_tokens is 200 there and 300 now'):
    evaluate.run(config, tmp_path)


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'evaluate.n_tokens': 60}, ValueError, 'shrink the batch'),
    ({'sae.site': 'h.0.mlp.post_act'}, ValueError, "another config: sae.site is 'h.0.resid.post_mlp' there"),
  ],
)
def test_bad_settings_are_told(workdir, tmp_path, change, error, message):
  (tmp_path / 'sae').symlink_to(workdir / 'sae')
  config = make_config(workdir)
  config.update_from_flattened_dict(change)
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(error, match=message):
    evaluate.run(config, tmp_path)


def test_stopped_it_says_how_to_go_on(workdir, tmp_path, monkeypatch):
  (tmp_path / 'sae').symlink_to(workdir / 'sae')
  monkeypatch.setattr(command, 'stopping', lambda: True)
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(command.Stopped, match='run the same command again'):
    evaluate.run(make_config(workdir), tmp_path)
  assert not (tmp_path / 'evaluation' / 'metrics.json').exists()
