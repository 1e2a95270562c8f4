"""train.capture: interrupted anywhere, its store is the same to the bit; bad input is told before any work."""

import errno
import filecmp
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jax_interp import activations, store, text
from models import gpt2, pretrained, sharding
from train import capture, command, processes, windows

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 600  # seconds, for what does not hang
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
  """Whether two stores are the same to the bit; how long they took may differ."""
  names, others = (
    sorted(str(path.relative_to(x)) for path in x.rglob('*') if path.is_file() and path.name != capture.REPORT)
    for x in (a, b)
  )
  assert names == others
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

  windows_et = saved.reader(store.TOKENS)(np.arange(61))
  model = pretrained.load_model(str(subject))
  for first, acts in activations.stream(model, windows_et, ('h.*.resid.post_mlp',), 4, dtype='bfloat16'):
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


def copy_of(subject, folder, change):
  """A folder with the subject model, changed."""
  model = pretrained.load_model(str(subject))
  change(model)
  pretrained.save_model(folder, model)
  (folder / 'tokenizer.json').write_bytes((subject / 'tokenizer.json').read_bytes())
  return str(folder)


def unused_token(monkeypatch, example, token):
  """Puts a token of the vocabulary that the text has not into the text."""
  prepared = windows.prepared

  def changed(*args):
    windows_et = np.array(prepared(*args))
    assert not (windows_et == token).any()
    windows_et[example, 5] = token
    return windows_et

  monkeypatch.setattr(windows, 'prepared', changed)


def test_activations_that_are_not_finite_stop_it_and_finished_shards_stay(subject, tmp_path, monkeypatch):
  with jax.set_mesh(sharding.make_mesh()):

    def change(model):
      model.wte.embedding[...] = model.wte.embedding[...].at[7, 2].set(np.nan)

    config = make_config(subject)
    config.model.source = copy_of(subject, tmp_path / 'broken', change)
    unused_token(monkeypatch, 22, 7)
    with pytest.raises(ValueError, match=r'h.0.resid.post_mlp has .* in the batch from example 20 on, first in .* 22'):
      capture.run(config, tmp_path)
    assert store.ActivationStore.open(tmp_path / 'activations').missing() == [2, 3, 4, 5, 6, 7]


def test_a_token_outside_the_vocabulary_stops_it(subject, tmp_path, monkeypatch):
  unused_token(monkeypatch, 22, 4000)
  with (
    jax.set_mesh(sharding.make_mesh()),
    pytest.raises(ValueError, match='from example 20 on, token 4000 at row 2, position 5 is outside the vocabulary'),
  ):
    capture.run(make_config(subject), tmp_path)


def test_padding_and_special_tokens_are_stored_and_not_kept(subject, tmp_path, monkeypatch):
  tokenizer = pretrained.load_tokenizer(str(subject))
  prepared = windows.prepared

  def padded(*args):
    windows_et = np.array(prepared(*args))
    windows_et[3, 9:] = text.PAD
    return windows_et

  monkeypatch.setattr(windows, 'prepared', padded)
  with jax.set_mesh(sharding.make_mesh()):
    config = make_config(subject)
    capture.run(config, tmp_path)
    saved = capture.open_store(config, tmp_path)
  tokens_et = saved.reader(store.TOKENS)(np.arange(61))
  np.testing.assert_array_equal(tokens_et[3, 9:], text.PAD)
  assert (tokens_et == tokenizer.eos_token_id).any()
  np.testing.assert_array_equal(saved.keep(), (tokens_et >= 0) & (tokens_et != tokenizer.eos_token_id))
  np.testing.assert_array_equal(saved.keep([3, 1]), saved.keep()[[3, 1]])
  found = activations.shuffled_batches(saved.reader('h.1.resid.post_mlp'), saved.keep(), saved.keep().sum(), 16, 0)
  every = saved.reader('h.1.resid.post_mlp')(np.arange(61))[saved.keep()]
  epoch = next(found)
  found.close()
  np.testing.assert_array_equal(*(np.unique(x.view(np.uint16), axis=0) for x in (epoch, every)))


def test_what_was_waited_for_is_reported(subject, tmp_path, capsys):
  config = make_config(subject)
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path)
  report = json.loads((tmp_path / 'activations' / capture.REPORT).read_text())
  run = report['run']
  assert (run['tokens'], run['processes'], run['peak_is']) == (61 * 16, 1, 'measured')
  assert run['tokens_per_s'] == pytest.approx(run['tokens'] / run['seconds'])
  assert run['mfu'] == pytest.approx(16 * run['flops_per_batch'] / run['seconds'] / run['peak_flops'])
  assert set(run['waiting']) == {'text', 'device', 'disk'}
  assert 0 < sum(run['waiting'].values()) < 1
  assert report['store'] == store.ActivationStore.open(tmp_path / 'activations').manifest
  assert re.search(
    r'976 tokens in .* tokens/s, MFU .* \(peak .*, measured\), waiting for text', capsys.readouterr().out
  )


def test_shards_are_written_while_the_next_is_computed(subject, tmp_path, monkeypatch):
  """The writer holds shard 0 until the batches of shard 1 have come from the device."""
  write, stream = store.ActivationStore.write, activations.stream
  writing, began, second_shard = [], threading.Event(), threading.Event()

  def slow(self, shard, *args):
    writing.append(shard)
    began.set()
    assert second_shard.wait(TIMEOUT)
    write(self, shard, *args)

  def watched(*args):
    for first, acts in stream(*args):
      if first >= 12:
        assert began.wait(TIMEOUT)
        assert writing == [0]
        second_shard.set()
      yield first, acts

  monkeypatch.setattr(store.ActivationStore, 'write', slow)
  monkeypatch.setattr(activations, 'stream', watched)
  config = make_config(subject, n_tokens=16 * 16)
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path)
    assert writing == [0, 1]


def test_a_full_disk_stops_it_soon_and_finished_shards_stay(subject, tmp_path, monkeypatch):
  write, n_batches, stream = store.ActivationStore.write, [], activations.stream

  def full(self, shard, *args):
    if shard == 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.where)
    write(self, shard, *args)

  def counted(*args):
    for batch in stream(*args):
      n_batches.append(batch[0])
      yield batch

  monkeypatch.setattr(store.ActivationStore, 'write', full)
  monkeypatch.setattr(activations, 'stream', counted)
  with jax.set_mesh(sharding.make_mesh()):
    with pytest.raises(OSError, match='No space left'):
      capture.run(make_config(subject), tmp_path)
    assert n_batches[-1] < 40  # two shards of 8 behind the one that failed
    monkeypatch.undo()
    assert store.ActivationStore.open(tmp_path / 'activations').missing() == [2, 3, 4, 5, 6, 7]
    capture.run(make_config(subject), tmp_path)


def test_activations_of_another_model_are_refused(subject, tmp_path):
  config = make_config(subject, store=str(tmp_path / 'store'))
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path / 'a')

    def change(model):
      model.wte.embedding[...] *= 2

    config.model.source = copy_of(subject, tmp_path / 'other', change)
    with pytest.raises(ValueError, match='are of another model'):
      capture.run(config, tmp_path / 'b')
    with pytest.raises(ValueError, match='was made with another config: fingerprint is'):
      capture.open_store(config, tmp_path / 'a')


@pytest.mark.parametrize(
  ('section', 'changed', 'field'),
  [
    ('text', {'window': 8}, 'n_examples'),
    ('text', {'boundaries': 'padded'}, 'dataset'),
    ('text', {'shuffle': 3}, 'dataset'),
    ('capture', {'sites': ('h.0.resid.post_mlp',)}, 'sites'),
    ('capture', {'dtype': 'float32'}, 'dtype'),
  ],
)
def test_another_capture_into_one_store_is_refused(subject, tmp_path, section, changed, field):
  config = make_config(subject, store=str(tmp_path / 'store'))
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path / 'a')
    with config.unlocked():
      config[section].update(changed)
    with pytest.raises(ValueError, match=f'are of another {field}.* choose another place, or delete them'):
      capture.run(config, tmp_path / 'b')


def test_a_store_that_was_replaced_by_another_is_told(subject, tmp_path):
  config = make_config(subject, store=str(tmp_path / 'store'))
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path / 'a')
    other = config.copy_and_resolve_references()
    with other.unlocked():
      other.text.shuffle = 3
    shutil.rmtree(tmp_path / 'store')
    with pytest.raises(FileNotFoundError, match='no activations at'):
      capture.open_store(config, tmp_path / 'a')
    capture.run(other, tmp_path / 'b')
    with pytest.raises(ValueError, match='are of another dataset'):
      capture.open_store(config, tmp_path / 'a')
    shutil.rmtree(tmp_path / 'store')
    capture.run(config, tmp_path / 'a')
    assert capture.open_store(config, tmp_path / 'a').missing() == []


@pytest.mark.parametrize('busy', ['activations', 'store'])
def test_two_captures_at_once_into_one_workdir_or_store_are_refused(subject, tmp_path, busy):
  config = make_config(subject, store=str(tmp_path / 'store'))
  with (
    jax.set_mesh(sharding.make_mesh()),
    processes.locked(tmp_path / busy),
    pytest.raises(ValueError, match=rf'another command is writing .*{busy} now; wait for it, or stop it'),
  ):
    capture.run(config, tmp_path)
  config.capture.store = str(tmp_path / 'activations')  # one place, named twice
  with jax.set_mesh(sharding.make_mesh()):
    capture.run(config, tmp_path)


def test_sigterm_then_the_same_command_gives_the_same_store(subject, tmp_path):
  """The signal comes while the third shard is written."""
  config = make_config(subject)
  (tmp_path / 'config.py').write_text(
    f'import ml_collections\nget_config = lambda: ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  code = """
import os, signal
from jax_interp import store
from train import capture, command
write = store.ActivationStore.write
def writing(self, shard, *args):
  if shard == 2:
    os.kill(os.getpid(), signal.SIGTERM)
  write(self, shard, *args)
store.ActivationStore.write = writing
command.main(capture.run, several_processes=True)
"""

  def run(workdir, *arguments):
    flags = [f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / workdir}']
    done = subprocess.run(
      [sys.executable, *arguments, *flags],
      cwd=ROOT, env={**os.environ, 'XLA_FLAGS': ''}, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr

  assert 'stopped: finished shards are kept' in run('stopped', '-c', code)
  assert 3 <= len(list((tmp_path / 'stopped/activations/commits').iterdir())) < 8
  for workdir in ('stopped', 'whole'):
    run(workdir, '-m', 'train.capture')
  assert same_files(tmp_path / 'whole/activations', tmp_path / 'stopped/activations')
