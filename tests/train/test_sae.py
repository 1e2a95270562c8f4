"""train.sae: from a store or the live model, stopped and resumed to the same numbers, and what it says to bad input."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from jax_interp import store
from models import pretrained, sharding
from models import sae as sae_lib
from train import capture, command
from train import sae as train_sae

ROOT = pathlib.Path(__file__).parents[2]
SITE, D, N_EXAMPLES, N_TOKENS = 'h.1.resid.post_mlp', 24, 40, 16
N_STEPS, BATCH = 12, 32


def config_of(tmp_path, **changes):
  settings = {
    'site': SITE,
    'source': 'store',
    'recipe': 'topk',
    'n_latents': 128,
    'k': 4,
    'normalization': 'layer_norm_std',
    'auxk': 16,
    'auxk_coef': 1 / 32,
    'dead_tokens': 4 * BATCH,
    'learning_rate': 1e-2,
    'warmup_steps': 2,
    'adam_eps': 6.25e-10,
    'clip': 0.0,
    'ema': 0.9,
    'batch_size': BATCH,
    'tokens': N_STEPS * BATCH - 5,
    'buffer_examples': 8,
    'steps_per_dispatch': 2,
    'checkpoint_every': 4,
    'log_every': 2,
  }
  capture_settings = {
    'sites': (SITE,),
    'store': str(tmp_path / 'store'),
    'n_tokens': N_EXAMPLES * N_TOKENS,
    'shard_examples': 8,
    'batch_size': 8,
    'dtype': 'float32',
  }
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'mesh': {'data': 1, 'model': 1},
      'model': {'source': 'embedded'},
      'text': {'source': str(tmp_path / 'corpus.jsonl'), 'window': N_TOKENS},
      'capture': capture_settings,
      'sae': settings | changes,
    }
  )


@pytest.fixture
def one_device():
  with jax.set_mesh(sharding.make_mesh()):
    yield


@pytest.fixture
def activations(tmp_path):
  """A store of activations that are sums of a few of 40 directions, captured by this folder and two below it."""
  rng = np.random.default_rng(0)
  saved = store.ActivationStore.create(
    tmp_path / 'store',
    {SITE: (D,)},
    N_EXAMPLES,
    N_TOKENS,
    shard_examples=8,
    dtype='float32',
    model=pretrained.fingerprint('embedded'),
    tokenizer='',
    dataset='',
  )
  directions = rng.normal(size=(40, D))
  for shard in saved.missing():
    sources = (rng.random((8, N_TOKENS, 40)) < 0.1) * rng.exponential(size=(8, N_TOKENS, 40))
    acts = (sources @ directions + 0.1 * rng.normal(size=(8, N_TOKENS, D))).astype(np.float32)
    saved.write(shard, np.zeros((8, N_TOKENS), np.int32), {SITE: acts})
  for workdir in (tmp_path, tmp_path / 'whole', tmp_path / 'stopped'):
    command.claim(workdir / 'activations', capture.made_with(config_of(tmp_path), workdir))
    store.write_json(workdir / 'activations' / capture.REPORT, {'store': saved.manifest, 'run': None})
    command.finish(workdir / 'activations')
  return tmp_path


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'sae' / 'metrics.jsonl').read_text().splitlines()]


def numbers(workdir):
  return [{name: value for name, value in line.items() if name != 'tokens_per_s'} for line in metrics(workdir)]


def weights(workdir):
  return (workdir / 'sae' / 'final' / 'sae.safetensors').read_bytes()


def test_training_leaves_an_sae_and_its_curve_and_is_not_repeated(mesh, activations, capsys):
  config = config_of(activations, tokens=40 * BATCH)
  train_sae.run(config, activations)
  lines = metrics(activations)
  assert [line['step'] for line in lines] == list(range(2, 41, 2))
  assert set(lines[0]) == {'step', 'loss', 'auxk', 'normalized_mse', 'l0', 'dead', 'grad_norm', 'tokens_per_s'}
  assert lines[-1]['normalized_mse'] < 0.8 * lines[0]['normalized_mse']
  assert lines[-1]['l0'] == 4
  assert max(line['dead'] for line in lines) > 0
  found = sae_lib.load_sae(activations / 'sae' / 'final')
  assert (found.k, found.normalization, found.n_latents) == (4, 'layer_norm_std', 128)
  np.testing.assert_allclose(np.linalg.norm(found.decoder[...], axis=1), 1, rtol=1e-6)
  before = weights(activations)
  train_sae.run(config, activations)
  assert 'done already' in capsys.readouterr().out
  assert weights(activations) == before


def test_a_stopped_run_resumes_to_bit_identical_weights(mesh, activations, monkeypatch):
  config = config_of(activations, recipe='multi_topk', clip=1.0)
  train_sae.run(config, activations / 'whole')
  asked = iter([False] * 2 + [True] * 9)  # stops after the third dispatch, at step 6, between two checkpoints
  monkeypatch.setattr(command, 'stopping', lambda: next(asked))
  with pytest.raises(command.Stopped, match='step 6 of 12 is saved'):
    train_sae.run(config, activations / 'stopped')
  monkeypatch.setattr(command, 'stopping', lambda: False)
  # A line of a step after the checkpoint, as a run that is killed leaves behind.
  with open(activations / 'stopped' / 'sae' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 8, "loss": 0}\n')
  train_sae.run(config, activations / 'stopped')
  assert weights(activations / 'stopped') == weights(activations / 'whole')
  assert numbers(activations / 'stopped') == numbers(activations / 'whole')


def test_sigterm_saves_and_the_same_command_ends_with_the_same_weights(activations):
  """The signal comes while the third line of the curve is written."""
  config = config_of(activations, tokens=40 * BATCH, steps_per_dispatch=4, checkpoint_every=100)
  (activations / 'config.py').write_text(
    f'import ml_collections\ndef get_config(): return ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  code = """
import itertools, os, signal
from train import command, sae
write, numbers = command.MetricsLog.write, itertools.count(1)
def writing(*args):
  if next(numbers) == 3:
    os.kill(os.getpid(), signal.SIGTERM)
  write(*args)
command.MetricsLog.write = writing
command.main(sae.run)
"""
  workdir = activations / 'stopped'
  flags = [f'--config={activations / "config.py"}', f'--workdir={workdir}']
  run = lambda *program: subprocess.run(
    [sys.executable, *program, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=600, check=True
  )
  assert 'stopped: step 8 of 40 is saved' in run('-c', code).stderr
  assert not (workdir / 'sae' / 'final').exists()
  run('-m', 'train.sae')
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config, activations / 'whole')
  assert weights(workdir) == weights(activations / 'whole')
  assert numbers(workdir) == numbers(activations / 'whole')


def test_the_live_model_gives_what_its_store_gives(one_device, tmp_path):
  words = ['array', 'of', 'the', 'returns', 'shape', 'value', 'if', 'none', 'is', 'given', 'float', 'matrix']
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(words, 60)) for _ in range(30)]
  (tmp_path / 'corpus.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  config = config_of(tmp_path)
  capture.run(config, tmp_path / 'captured')
  for source, name in (('store', 'captured'), ('live', 'live')):
    config.sae.source = source
    train_sae.run(config, tmp_path / name)
  for stored, live in zip(numbers(tmp_path / 'captured'), numbers(tmp_path / 'live'), strict=True):
    assert stored == pytest.approx(live, rel=1e-4)  # batches of another composition round otherwise


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'k': 129}, 'k 129 is not within 1 and n_latents 128'),
    ({'recipe': 'relu'}, "sae.recipe 'relu' is unknown; choose one of topk, multi_topk"),
    ({'source': 'disk'}, "sae.source 'disk' is unknown; choose one of store, live"),
    ({'site': 'h.9.resid.post_mlp'}, "are of h.1.resid.post_mlp, not 'h.9.resid.post_mlp'"),
    ({'learning_rate': float('nan')}, 'the loss is not finite at step 2; there is no checkpoint yet'),
  ],
)
def test_bad_settings_raise_one_clear_sentence(one_device, activations, changes, message):
  with pytest.raises(ValueError, match=message):
    train_sae.run(config_of(activations, **changes), activations)


def test_a_checkpoint_of_another_config_raises_and_stays(one_device, activations, monkeypatch):
  monkeypatch.setattr(command, 'stopping', lambda: True)
  with pytest.raises(command.Stopped):
    train_sae.run(config_of(activations), activations)
  monkeypatch.setattr(command, 'stopping', lambda: False)
  with pytest.raises(ValueError, match=r'another config: sae\.k is 4 there and 8 now; choose another --workdir'):
    train_sae.run(config_of(activations, k=8), activations)
  assert store.latest_step(activations / 'sae' / 'checkpoints') == 2


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(one_device, activations, monkeypatch):
  config = config_of(activations, steps_per_dispatch=1)
  train_steps = train_sae.train_step.train_steps

  def poisoned(state, acts_sbd, *args):
    return train_steps(state, acts_sbd * np.nan if state.step == 6 else acts_sbd, *args)

  monkeypatch.setattr(train_sae.train_step, 'train_steps', poisoned)
  with pytest.raises(ValueError, match=r'not finite at step 7; the last good checkpoint is .*/sae/checkpoints/4'):
    train_sae.run(config, activations)
