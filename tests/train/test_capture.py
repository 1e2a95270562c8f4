"""train.capture: interrupted anywhere, its store is the same to the bit; bad input is told before any work."""

import filecmp
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jax_interp import activations, store
from models import gpt2, pretrained, sharding
from train import capture, command

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'dog', 'ran', 'far']


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """A folder with a random model, a tokenizer and a text of 100 documents."""
  folder = tmp_path_factory.mktemp('subject')
  rng = np.random.default_rng(0)
  documents = [' '.join(rng.choice(WORDS, 120)) for _ in range(100)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': document}) for document in documents))
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(documents, 280, special_tokens=[pretrained.END_OF_TEXT], show_progress=False)
  bpe._tokenizer.save(str(folder / 'tokenizer.json'))
  model_config = gpt2.GPT2Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, n_vocab=bpe.get_vocab_size())
  with jax.set_mesh(sharding.make_mesh()):
    pretrained.save_model(folder, jax.jit(lambda: gpt2.GPT2(model_config, nnx.Rngs(0)))())
  return folder


def make_config(subject, **changed):
  settings = {
    'sites': ('h.*.resid.post_mlp',),
    'n_tokens': 16 * 61,
    'dtype': 'bfloat16',
    'batch_size': 4,
    'shard_examples': 8,
    'store': '',
  }
  return ml_collections.ConfigDict(
    {
      'mesh': {'data': 1, 'model': 1},
      'capture': {**settings, **changed},
      'model': {'source': str(subject)},
      'text': {'source': str(subject / 'text.jsonl'), 'window': 16},
    }
  )


def same_files(a, b):
  names = sorted(str(path.relative_to(a)) for path in a.rglob('*') if path.is_file())
  assert names == sorted(str(path.relative_to(b)) for path in b.rglob('*') if path.is_file())
  return filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


def stop_after(monkeypatch, n_checks):
  answers = itertools.chain([False] * n_checks, itertools.repeat(True))
  monkeypatch.setattr(command, 'stopping', lambda: next(answers))


@pytest.mark.usefixtures('mesh')
def test_stopped_and_resumed_equals_uninterrupted(subject, tmp_path, monkeypatch):
  config = make_config(subject)
  capture.run(config, tmp_path / 'whole')
  saved = capture.open_store(config, tmp_path / 'whole')
  assert (saved.n_shards, saved.missing()) == (8, [])
  for n_checks in (0, 3, 6):
    stop_after(monkeypatch, n_checks)
    with pytest.raises(command.Stopped, match='run the same command to go on'):
      capture.run(config, tmp_path / 'stopped')
  assert 0 < len(store.ActivationStore.open(tmp_path / 'stopped' / 'activations').missing()) < 8
  with pytest.raises(FileNotFoundError, match=r'is not finished; run train\.capture first'):
    capture.open_store(config, tmp_path / 'stopped')
  monkeypatch.undo()
  capture.run(config, tmp_path / 'stopped')
  assert same_files(tmp_path / 'whole' / 'activations', tmp_path / 'stopped' / 'activations')

  windows = saved.reader(store.TOKENS)(np.arange(61))
  model = pretrained.load_model(str(subject))
  for first, acts in activations.stream(model, windows, ('h.*.resid.post_mlp',), 4, dtype='bfloat16'):
    for site, x in acts.items():
      np.testing.assert_array_equal(saved.reader(site)(np.arange(first, first + len(x))), x)


def test_a_finished_capture_is_not_done_again_and_a_damaged_shard_is(subject, tmp_path):
  config = make_config(subject)
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path / 'whole')
    capture.run(config, tmp_path / 'damaged')
    files = [tmp_path / 'damaged/activations/h.1.resid.post_mlp/c' / f'{shard}/0/0' for shard in range(8)]
    times = [file.stat().st_mtime_ns for file in files]
    capture.run(config, tmp_path / 'damaged')
    assert [file.stat().st_mtime_ns for file in files] == times
    files[2].write_bytes(files[2].read_bytes()[:100])
    files[5].unlink()
    with pytest.raises(ValueError, match=r'2 of 8 shards in .* are missing or damaged, 2 for one; run train\.capture'):
      capture.open_store(config, tmp_path / 'damaged')
    capture.run(config, tmp_path / 'damaged')
  assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)] == [
    shard not in (2, 5) for shard in range(8)
  ]
  assert same_files(tmp_path / 'whole' / 'activations', tmp_path / 'damaged' / 'activations')


@pytest.mark.parametrize(
  ('changed', 'error', 'message'),
  [
    ({'sites': ('h.0.resid.post_mpl',)}, KeyError, r'nearest are h.0.resid.post_mlp'),
    ({'sites': ('h.0.attn.qk_probs',)}, ValueError, 'cannot be stored; choose other sites'),
    ({'batch_size': 3}, ValueError, 'shard_examples 8 is not divisible by capture.batch_size 3'),
    ({'n_tokens': 15}, ValueError, 'less than one window of 16'),
    ({'dtype': 'float16'}, ValueError, "not 'float16'"),
  ],
)
def test_bad_settings_are_told(subject, tmp_path, changed, error, message):
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(error, match=message):
    capture.run(make_config(subject, **changed), tmp_path)
  assert not (tmp_path / 'activations' / 'manifest.json').exists()


def test_a_batch_that_the_mesh_does_not_divide_is_told_before_anything_is_claimed(subject, tmp_path):
  with (
    jax.set_mesh(sharding.make_mesh(3, 1)),
    pytest.raises(ValueError, match=r'capture\.batch_size 4 is not divisible by the data axis 3'),
  ):
    capture.run(make_config(subject, batch_size=4), tmp_path)
  assert not (tmp_path / 'activations').exists()


def test_activations_that_are_not_finite_stop_it(subject, tmp_path, monkeypatch):
  config = make_config(subject)

  def broken(*args, **kwargs):
    for first, acts in stream(*args, **kwargs):
      x = acts['h.1.resid.post_mlp'].copy()
      x[:, 3, 5] = np.nan if first >= 20 else x[:, 3, 5]
      yield first, {**acts, 'h.1.resid.post_mlp': x}

  stream = activations.stream
  monkeypatch.setattr(activations, 'stream', broken)
  with jax.set_mesh(sharding.make_mesh()):
    with pytest.raises(ValueError, match=r'h.1.resid.post_mlp has 4 activations in shard 2 that are not finite'):
      capture.run(config, tmp_path)
    assert store.ActivationStore.open(tmp_path / 'activations').missing() == [2, 3, 4, 5, 6, 7]


def test_activations_of_another_model_are_refused(subject, tmp_path):
  config = make_config(subject, store=str(tmp_path / 'store'))
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path / 'a')
    model = pretrained.load_model(str(subject))
    model.wte.embedding[...] *= 2
    pretrained.save_model(tmp_path / 'other', model)
    (tmp_path / 'other' / 'tokenizer.json').write_bytes((subject / 'tokenizer.json').read_bytes())
    config.model.source = str(tmp_path / 'other')
    with pytest.raises(ValueError, match='are of another model'):
      capture.run(config, tmp_path / 'b')
    with pytest.raises(ValueError, match='was made with another config: fingerprint is'):
      capture.open_store(config, tmp_path / 'a')


def test_sigterm_then_the_same_command_gives_the_same_store(subject, tmp_path):
  config = make_config(subject, n_tokens=10**6, shard_examples=4)
  (tmp_path / 'config.py').write_text(
    f'import ml_collections\nget_config = lambda: ml_collections.ConfigDict({config.to_dict()!r})\n'
  )

  def start(workdir):
    flags = [f'--config={tmp_path / "config.py"}', f'--workdir={workdir}']
    environment = {**os.environ, 'XLA_FLAGS': ''}
    return subprocess.Popen(
      [sys.executable, '-m', 'train.capture', *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )

  stopped = start(tmp_path / 'stopped')
  manifest = tmp_path / 'stopped/activations/manifest.json'
  while not (manifest.exists() and json.loads(manifest.read_text())['commits']):
    assert stopped.poll() is None
    time.sleep(0.01)
  stopped.send_signal(signal.SIGTERM)
  message = stopped.communicate(timeout=60)[1].decode()
  assert (stopped.returncode, 'stopped: finished shards are kept' in message) == (0, True)
  n_finished = len(json.loads(manifest.read_text())['commits'])
  for workdir in (tmp_path / 'stopped', tmp_path / 'whole'):
    assert start(workdir).wait(timeout=120) == 0
  assert n_finished < len(json.loads(manifest.read_text())['commits'])
  assert same_files(tmp_path / 'whole/activations', tmp_path / 'stopped/activations')
