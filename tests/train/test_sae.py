"""train.sae: from a store or the live model, one or many, stopped or killed and resumed to the same numbers."""

import concurrent.futures
import errno
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import ml_collections
import numpy as np
import pytest

from jax_interp import store
from models import sae as sae_lib
from models import sharding
from tests.train import runs
from train import capture, command, sweep
from train import sae as train_sae

ROOT = pathlib.Path(__file__).parents[2]
SITE, D, N_EXAMPLES, N_TOKENS = 'h.1.resid.post_mlp', runs.D_SUMS, 40, 16
OTHER_SITE, D_OTHER = 'h.2.resid.post_mlp', 20  # whose activations are the other's, times 2, plus 1
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
    'kernels': 'sparse',
    'compute_dtype': 'float32',
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
  config = ml_collections.ConfigDict(
    {
      'seed': 0,
      'mesh': {'data': 1, 'model': 1},
      'model': {'source': 'embedded'},
      'text': {'source': str(tmp_path / 'corpus.jsonl'), 'window': N_TOKENS},
      'capture': capture_settings,
      'sae': settings | changes,
    }
  )
  return config.lock()  # as commands have it


@pytest.fixture(autouse=True)
def _peak_and_questions(monkeypatch):
  """Measuring what the processor could do takes seconds; tests that count questions count those after a dispatch."""
  monkeypatch.setattr(train_sae.throughput, 'peak', lambda dtype: (1e12, 'made up'))
  monkeypatch.setattr(train_sae, '_stopping_alone', lambda: False)


@pytest.fixture
def one_device():
  with jax.set_mesh(sharding.make_mesh()):
    yield


@pytest.fixture
def activations(tmp_path):
  """A store of activations that are sums of a few of 40 directions, captured by this folder and two below it."""
  workdirs = tmp_path, *(tmp_path / name for name in ('whole', 'stopped', 'alone'))
  others = {OTHER_SITE: lambda x_etd: 2 * x_etd[..., :D_OTHER] + 1}
  runs.capture_sums(config_of(tmp_path), workdirs, 40, 0.1, others)
  return tmp_path


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'sae' / 'metrics.jsonl').read_text().splitlines()]


def numbers(workdir):
  return [{name: value for name, value in line.items() if name not in train_sae.TIMES} for line in metrics(workdir)]


def weights(workdir):
  return (workdir / 'sae' / 'final' / 'sae.safetensors').read_bytes()


def test_training_leaves_an_sae_and_its_curve_and_is_not_repeated(mesh, activations, capsys):
  config = config_of(activations, tokens=40 * BATCH)
  train_sae.run(config, activations)
  lines = metrics(activations)
  assert [line['step'] for line in lines] == list(range(2, 41, 2))
  of_recipe = {'loss', 'auxk', 'normalized_mse', 'l0', 'dead', 'grad_norm'}
  assert set(lines[0]) == {'step', *of_recipe, 'explained_variance', 'tokens_per_s', 'mfu', 'waiting_for_data'}
  assert lines[0]['explained_variance'] == 1 - lines[0]['normalized_mse']
  assert all(line['mfu'] > 0 and 0 <= line['waiting_for_data'] < 1 for line in lines)
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


def start(folder, config, workdir, *program, **environment):
  (folder / 'config.py').write_text(
    f'import ml_collections\ndef get_config(): return ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  flags = [f'--config={folder / "config.py"}', f'--workdir={workdir}']
  return subprocess.Popen(
    [sys.executable, *(program or ('-m', 'train.sae')), *flags],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | environment,
  )


def finish(process):
  stderr = process.communicate(timeout=600)[1]
  assert process.returncode == 0, stderr
  return stderr


def assert_same(workdir, whole):
  assert weights(workdir) == weights(whole)
  assert numbers(workdir) == numbers(whole)


def test_sigterm_saves_and_the_same_command_ends_with_the_same_weights(activations):
  """The signal comes while the third line of the curve is written."""
  config = config_of(activations, tokens=40 * BATCH, steps_per_dispatch=4, checkpoint_every=100)
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
  assert 'stopped: step 8 of 40 is saved' in finish(start(activations, config, workdir, '-c', code))
  assert not (workdir / 'sae' / 'final').exists()
  finish(start(activations, config, workdir))
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config, activations / 'whole')
  assert_same(workdir, activations / 'whole')


def test_killed_at_any_moment_it_ends_with_the_same_weights(activations):
  """First while a checkpoint is written but not yet under its name, then at random moments, then not."""
  config = config_of(activations, tokens=400 * BATCH, steps_per_dispatch=1, checkpoint_every=3, log_every=1)
  code = """
import os, signal, time
from train import command, sae
rename, write, at = os.rename, command.MetricsLog.write, int(os.environ['KILL_AT'])
def renaming(source, target, *args, **kwargs):
  if str(target).endswith(f'/checkpoints/{at}'):
    os.kill(os.getpid(), signal.SIGKILL)
  rename(source, target, *args, **kwargs)
def writing(*args):
  time.sleep(0.003)  # no run gets to the end before it is killed
  write(*args)
os.rename, command.MetricsLog.write = renaming, writing
command.main(sae.run)
"""
  workdir, rng = activations / 'stopped', random.Random(0)
  log = workdir / 'sae' / 'metrics.jsonl'
  lines = lambda: len(log.read_text().splitlines()) if log.exists() else 0
  killed = start(activations, config, workdir, '-c', code, KILL_AT='30')
  assert killed.wait(600) == -signal.SIGKILL
  assert [path.name for path in (workdir / 'sae' / 'checkpoints').iterdir() if path.name.startswith('30.')]
  found = []
  for _ in range(4):
    before = lines()
    running = start(activations, config, workdir, '-c', code, KILL_AT='0')
    wanted = before + rng.randint(1, 40)
    while lines() < wanted and running.poll() is None:
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    running.kill()
    assert running.wait(600) == -signal.SIGKILL, running.stderr.read()
    found.append(lines())
  assert found[-1] < 400
  finish(start(activations, config, workdir))
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config, activations / 'whole')
  assert_same(workdir, activations / 'whole')


def test_a_run_goes_on_on_another_mesh(activations, monkeypatch):
  config = config_of(activations)
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    train_sae.run(config, activations / 'whole')
  for shape, stop_after in (((2, 2), 2), ((1, 4), 3), ((1, 1), 99)):
    asked = itertools.count(1)
    monkeypatch.setattr(command, 'stopping', lambda: next(asked) >= stop_after)  # noqa: B023
    with jax.set_mesh(sharding.make_mesh(*shape)):
      if stop_after == 99:
        train_sae.run(config, activations / 'stopped')
      else:
        with pytest.raises(command.Stopped):
          train_sae.run(config, activations / 'stopped')
  for ours, theirs in zip(numbers(activations / 'stopped'), numbers(activations / 'whole'), strict=True):
    assert ours == pytest.approx(theirs, rel=2e-3)  # sums are rounded otherwise, and Adam with a tiny eps enlarges that


SWEEP = (
  {'name': 'wide', 'n_latents': 256},
  {'recipe': 'multi_topk', 'learning_rate': 3e-3},
  {'site': OTHER_SITE},
  {'name': 'relu', 'recipe': 'relu', 'l1_coef': 0.1},
  {
    'name': 'transcoder',
    'site': OTHER_SITE,
    'target_site': SITE,
    'skip': True,
    'normalization': 'expected_average',
    'recipe': 'gated',
    'l1_coef': 0.1,
  },
)
NAMES = ['wide', 'recipe=multi_topk,learning_rate=0.003', f'site={OTHER_SITE}', 'relu', 'transcoder']


def alone(config, name):
  with config.unlocked():
    config.sae_name = name
  return sweep.chosen(config, pathlib.Path('elsewhere'))


def test_saes_on_one_stream_are_those_trained_alone(mesh, activations):
  config = config_of(activations, sweep=SWEEP)
  train_sae.run(config, activations)
  assert sorted(path.name for path in (activations / 'sweep').iterdir()) == sorted(NAMES)
  for name in NAMES:
    own, place = alone(config, name), activations / 'sweep' / name
    train_sae.run(own, activations / 'alone')
    assert_same(place, activations / 'alone')
    found = train_sae.load(own, place)
    assert np.isfinite(found.encoder[...]).all()
    (activations / 'alone' / 'sae').rename(activations / f'trained {name}')
  assert train_sae.load(alone(config, 'wide'), activations / 'sweep' / 'wide').n_latents == 256
  assert capture.open_store(alone(config, 'wide'), activations / 'sweep' / 'wide').width(SITE) == D
  transcoder = train_sae.load(alone(config, 'transcoder'), activations / 'sweep' / 'transcoder')
  assert (transcoder.encoder.shape[1], transcoder.decoder.shape[1]) == (D_OTHER, D)
  with pytest.raises(ValueError, match=r"is of the whole sweep; for sae_name 'transcoder' give --workdir=.*transcoder"):
    sweep.chosen(config, activations)
  with pytest.raises(ValueError, match=r'sae.sweep trains wide, .*; choose one with --config.sae_name=wide --workdir='):
    train_sae.load(config, activations)


def test_micro_batches_of_one_sae_of_a_sweep_change_only_the_order_of_the_others_rows(one_device, activations):
  config = config_of(activations, sweep=({'name': 'parts', 'micro_batches': 4}, {'name': 'whole'}))
  train_sae.run(config, activations)
  for name, at_most in (('parts', 0), ('whole', 1e-4)):
    train_sae.run(alone(config, name), activations / 'alone')
    both = numbers(activations / 'sweep' / name), numbers(activations / 'alone')
    for found, expected in zip(*both, strict=True):
      assert found == pytest.approx(expected, rel=at_most, abs=0)
    (activations / 'alone' / 'sae').rename(activations / f'trained {name}')


def test_a_stopped_sweep_resumes_to_bit_identical_weights(mesh, activations, monkeypatch, capsys):
  config = config_of(activations, sweep=SWEEP)
  train_sae.run(config, activations / 'whole')
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) >= 3)
  with pytest.raises(command.Stopped, match='step 6 of 12 is saved'):
    train_sae.run(config, activations / 'stopped')
  monkeypatch.setattr(command, 'stopping', lambda: False)
  train_sae.run(config, activations / 'stopped')
  for name in NAMES:
    assert_same(activations / 'stopped' / 'sweep' / name, activations / 'whole' / 'sweep' / name)
  train_sae.run(config, activations / 'stopped')
  assert 'is done already' in capsys.readouterr().out


def test_rows_of_several_sites_are_of_the_same_tokens(one_device, activations):
  streams = train_sae.streams(config_of(activations), activations, [SITE, OTHER_SITE])
  for part in ((0, 1), (1, 2)):
    for batch in itertools.islice(streams.batches(3, part), 50):
      np.testing.assert_allclose(batch[OTHER_SITE], 2 * batch[SITE][:, :D_OTHER] + 1, rtol=1e-5)


@pytest.fixture
def corpus(tmp_path):
  words = ['array', 'of', 'the', 'returns', 'shape', 'value', 'if', 'none', 'is', 'given', 'float', 'matrix']
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(words, 60)) for _ in range(30)]
  (tmp_path / 'corpus.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  return tmp_path


def test_the_live_model_gives_what_its_store_gives(mesh, corpus):
  config = config_of(corpus, sweep=({}, {'name': 'other', 'site': OTHER_SITE}))
  config.capture.sites = (SITE, OTHER_SITE)
  capture.run(config, corpus / 'captured')
  for source, name in (('store', 'captured'), ('live', 'live')):
    config.sae.source = source
    train_sae.run(config, corpus / name)
  for name in ('base', 'other'):
    both = (numbers(corpus / source / 'sweep' / name) for source in ('captured', 'live'))
    for stored, live in zip(*both, strict=True):
      assert stored == pytest.approx(live, rel=1e-4)  # batches of another composition round otherwise


def test_a_stopped_run_of_the_live_model_resumes_to_bit_identical_weights(one_device, corpus, monkeypatch):
  config = config_of(corpus, source='live', clip=1.0)
  train_sae.run(config, corpus / 'whole')
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 3)
  with pytest.raises(command.Stopped, match='step 6 of 12 is saved'):
    train_sae.run(config, corpus / 'stopped')
  train_sae.run(config, corpus / 'stopped')
  assert_same(corpus / 'stopped', corpus / 'whole')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'k': 129}, 'k 129 is not within 1 and n_latents 128'),
    ({'recipe': 'top'}, "sae.recipe 'top' is unknown; choose one of topk, multi_topk"),
    ({'source': 'disk'}, "sae.source 'disk' is unknown; choose one of store, live"),
    ({'site': 'h.9.resid.post_mlp'}, "are of h.1.resid.post_mlp, h.2.resid.post_mlp, not 'h.9.resid.post_mlp'"),
    ({'checkpoints': 1}, 'sae.checkpoints 1 is less than 2'),
    ({'log_every': 0}, 'sae.log_every 0 is less than 1'),
    ({'checkpoint_every': 0}, 'sae.checkpoint_every 0 is less than 1'),
    ({'ema': 1.0}, 'sae.ema 1.0 is no average'),
    ({'clip': -1.0}, 'sae.clip -1.0 is not 0 or above'),
    ({'tokens': 0}, 'sae.tokens 0 is less than 1, so there is nothing to train'),
    ({'spike_factor': -1.0}, 'sae.spike_factor -1.0 is not 0 or above'),
    ({'parity': True, 'recipe': 'multi_topk'}, 'sae.parity is of the recipe topk'),
    ({'log_to': 'paper'}, "sae.log_to 'paper' is unknown; choose one of tensorboard, wandb, or leave it empty"),
    ({'sweep': ({'batch_size': 64},)}, 'sae.sweep overrides batch_size, which all SAEs of a stream share'),
    ({'sweep': ({'n_latens': 64},)}, "overrides 'n_latens', which is no field of sae; the nearest are n_latents"),
    ({'sweep': ({'k': 2}, {'k': 2})}, "sae.sweep has 'k=2' twice"),
    ({'sweep': ({}, {'k': 300})}, 'k 300 is not within 1 and n_latents 128'),
    ({'learning_rate': float('nan')}, 'sae.learning_rate nan is not 0 or above'),
    ({'learning_rate': 1e38, 'warmup_steps': 0}, r'the loss is not finite at step \d; there is no checkpoint yet'),
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


def poison(monkeypatch, step, k=4):
  """Has activations be NaN in the calls of SAEs of this k that begin behind a step."""
  train_steps = train_sae.train_step.train_steps

  def poisoned(state, acts_sbd, tx, recipe, *args):
    poisons = recipe.levels[0][0] == k and state.step >= step
    return train_steps(state, acts_sbd * np.nan if poisons else acts_sbd, tx, recipe, *args)

  monkeypatch.setattr(train_sae.train_step, 'train_steps', poisoned)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(one_device, activations, monkeypatch):
  config = config_of(activations, steps_per_dispatch=1)
  poison(monkeypatch, 6)
  with pytest.raises(ValueError, match=r'not finite at step 7; the last good checkpoint is .*/sae/checkpoints/4'):
    train_sae.run(config, activations)


def test_a_checkpoint_is_not_good_before_the_step_after_it(one_device, activations, monkeypatch):
  """The loss of step 5 is of the weights that step 4 left, which are then saved no longer."""
  config = config_of(activations, steps_per_dispatch=1, checkpoint_every=2)
  poison(monkeypatch, 4)
  with pytest.raises(ValueError, match=r'not finite at step 5; the last good checkpoint is .*/sae/checkpoints/2\.'):
    train_sae.run(config, activations)
  assert store.latest_step(activations / 'sae' / 'checkpoints') == 2
  assert [line['step'] for line in metrics(activations)] == [2, 4]


def test_weights_that_are_not_finite_are_not_saved(one_device, activations, monkeypatch):
  config = config_of(activations, checkpoint_every=2)
  train_steps = train_sae.train_step.train_steps

  def poisoned(state, *args):
    state, found = train_steps(state, *args)
    return state._replace(mse_scale=state.mse_scale / (state.step != 6)), found

  monkeypatch.setattr(train_sae.train_step, 'train_steps', poisoned)
  with pytest.raises(ValueError, match=r'the weights are not finite at step 6; the last good checkpoint is .*/4\.'):
    train_sae.run(config, activations)


def test_an_sae_of_a_sweep_that_diverges_leaves_the_others_as_they_are(one_device, activations, monkeypatch, capsys):
  config = config_of(activations, sweep=({'name': 'good'}, {'name': 'bad', 'k': 8}), checkpoint_every=2)
  poison(monkeypatch, 6, k=8)
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 5)  # and goes on without it
  with pytest.raises(command.Stopped, match='step 10 of 12'):
    train_sae.run(config, activations)
  train_sae.run(config, activations)
  said = r'bad: the loss is not finite at step 7\. Lower sae.learning_rate or set sae.clip, in another --workdir'
  assert re.search(said, capsys.readouterr().err)
  assert [line['step'] for line in metrics(activations / 'sweep' / 'bad')] == [2, 4, 6]
  assert not (activations / 'sweep' / 'bad' / 'sae' / 'final').exists()
  for stage in (train_sae.load, train_sae.run):
    with pytest.raises(ValueError, match=said):
      stage(alone(config, 'bad'), activations / 'sweep' / 'bad')
  train_sae.run(alone(config, 'good'), activations / 'alone')
  assert_same(activations / 'sweep' / 'good', activations / 'alone')
  train_sae.run(config, activations)
  assert 'is done already' in capsys.readouterr().out


def test_a_sweep_of_which_none_is_left_ends(one_device, activations, monkeypatch):
  config = config_of(activations, sweep=({'name': 'one'}, {'name': 'other'}), steps_per_dispatch=1)
  poison(monkeypatch, 6)
  message = r'one: the loss is not finite; other: the loss is not finite at step 7; the last good checkpoint is .*/4\.'
  with pytest.raises(ValueError, match=message):
    train_sae.run(config, activations)


@pytest.mark.parametrize('deleted', [False, True])
def test_a_sweep_that_begins_anew_tries_all_of_it_again(one_device, activations, monkeypatch, deleted):
  """Killed behind the divergence and before a checkpoint, or with its folder deleted."""
  config = config_of(activations, sweep=({'name': 'good'}, {'name': 'bad', 'k': 8}), log_every=1, checkpoint_every=100)
  with monkeypatch.context() as patched:
    poison(patched, 6, k=8)
    if deleted:
      train_sae.run(config, activations)
      shutil.rmtree(activations / 'sae')
    else:
      patched.setattr(train_sae, '_status', lambda found, times: 1 / (len(found) - 1) and {})
      with pytest.raises(ZeroDivisionError):
        train_sae.run(config, activations)
  assert (activations / 'sweep' / 'bad' / 'sae' / 'diverged.json').exists()
  train_sae.run(config, activations)
  assert not (activations / 'sweep' / 'bad' / 'sae' / 'diverged.json').exists()
  assert [line['step'] for line in metrics(activations / 'sweep' / 'bad')] == list(range(1, N_STEPS + 1))
  assert train_sae.load(alone(config, 'bad'), activations / 'sweep' / 'bad').k == 8


def test_the_curve_of_an_sae_that_diverged_stays_when_the_others_go_on(one_device, activations, monkeypatch):
  config = config_of(activations, sweep=({'name': 'good'}, {'name': 'bad', 'k': 8}), log_every=1, checkpoint_every=4)
  poison(monkeypatch, 6, k=8)
  with monkeypatch.context() as patched:
    patched.setattr(train_sae, '_status', lambda found, times: 1 / (len(found) - 1) and {})  # ends it, as a kill does
    with pytest.raises(ZeroDivisionError):
      train_sae.run(config, activations)
  train_sae.run(config, activations)  # from step 4
  assert [line['step'] for line in metrics(activations / 'sweep' / 'bad')] == list(range(1, 7))
  assert [line['step'] for line in metrics(activations / 'sweep' / 'good')] == list(range(1, N_STEPS + 1))


def test_a_sweep_counts_the_tokens_of_its_stream_once(one_device, activations, monkeypatch):
  counted, add = [], train_sae._Clock.add
  monkeypatch.setattr(train_sae._Clock, 'add', lambda clock, n, flops: counted.append(n) or add(clock, n, flops))
  train_sae.run(config_of(activations, sweep=({'name': 'one'}, {'name': 'other', 'k': 8})), activations)
  assert sum(counted) == N_STEPS * BATCH


def test_going_on_reads_no_sample_and_keeps_its_scales(one_device, activations, monkeypatch):
  config = config_of(activations, normalization='expected_average')
  train_sae.run(config, activations / 'whole')
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 3)
  with pytest.raises(command.Stopped):
    train_sae.run(config, activations / 'stopped')
  monkeypatch.setattr(train_sae, 'first_tokens', None)
  train_sae.run(config, activations / 'stopped')
  assert_same(activations / 'stopped', activations / 'whole')
  found = sae_lib.load_sae(activations / 'stopped' / 'sae' / 'final')
  assert found.input_scale == sae_lib.load_sae(activations / 'whole' / 'sae' / 'final').input_scale != 1


@pytest.mark.parametrize('n_before', [0, 3])
def test_asked_to_stop_while_it_waits_for_data_it_saves_at_once(one_device, activations, monkeypatch, n_before):
  config, come = config_of(activations, steps_per_dispatch=1, checkpoint_every=100), threading.Event()
  streams, wait = train_sae.streams, concurrent.futures.wait

  def slow(*args):
    found = streams(*args)

    def batches(step, *part):
      for number, batch in enumerate(found.batches(step, *part)):
        if part and number == n_before:
          come.wait(600)
        yield batch

    return found._replace(batches=batches)

  def waiting(futures, timeout):
    done = wait(futures, timeout if futures[0].done() else 0.1)
    monkeypatch.setattr(train_sae, '_stopping_alone', lambda: not done.done)
    return done

  waited = store.Checkpoints.wait
  with monkeypatch.context() as patched:
    patched.setattr(train_sae, 'streams', slow)
    patched.setattr(train_sae.concurrent.futures, 'wait', waiting)
    patched.setattr(store.Checkpoints, 'wait', lambda to: waited(to) or (to._manager.all_steps() and come.set()))
    with pytest.raises(command.Stopped, match=f'step {n_before} of 12 is saved'):
      train_sae.run(config, activations / 'stopped')
  monkeypatch.setattr(train_sae, '_stopping_alone', lambda: False)
  for name in ('stopped', 'whole'):
    train_sae.run(config, activations / name)
  assert_same(activations / 'stopped', activations / 'whole')


def test_it_is_done_when_the_last_checkpoint_is_on_the_disk(one_device, activations, monkeypatch):
  save, wait, saved = store.Checkpoints.save, store.Checkpoints.wait, []

  def full(checkpoints):
    if N_STEPS in saved:
      raise OSError(errno.ENOSPC, 'No space left on device', 'checkpoints')
    wait(checkpoints)

  with monkeypatch.context() as patched:
    patched.setattr(store.Checkpoints, 'save', lambda to, step, *args: saved.append(step) or save(to, step, *args))
    patched.setattr(store.Checkpoints, 'wait', full)
    with pytest.raises(OSError, match='No space left'):
      train_sae.run(config_of(activations), activations)
  assert not (activations / 'sae' / 'DONE').exists()
  train_sae.run(config_of(activations), activations)
  assert (activations / 'sae' / 'DONE').exists()


@pytest.mark.parametrize(('factor', 'resumed'), [(5.0, False), (5.0, True), (0.0, False)])
def test_a_loss_that_spikes_stops_the_run(one_device, activations, monkeypatch, factor, resumed):
  """After a resumption too: what is usual is read from the log."""
  monkeypatch.setattr(train_sae, 'SPIKE_LEAST', 8)
  config = config_of(activations, tokens=40 * BATCH, log_every=1, spike_factor=factor, normalization='none')
  train_steps = train_sae.train_step.train_steps
  monkeypatch.setattr(
    train_sae.train_step,
    'train_steps',
    lambda state, acts_sbd, *args: train_steps(state, acts_sbd * (10 if state.step == 20 else 1), *args),
  )
  if resumed:
    asked = itertools.count(1)
    monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 9)
    with pytest.raises(command.Stopped, match='step 18'):
      train_sae.run(config, activations)
  if not factor:
    train_sae.run(config, activations)
    return
  message = (
    r'loss is more than 5 times .*, the median of the last \d+ logged at step 21; .*checkpoints/1[68]\. .*'
    'in another --workdir, or raise sae.spike_factor to go on'
  )
  with pytest.raises(ValueError, match=message):
    train_sae.run(config, activations)
  assert store.latest_step(activations / 'sae' / 'checkpoints') == 20  # which going on with another factor begins at


def test_watching_may_change_when_a_run_goes_on(one_device, activations, monkeypatch):
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 3)
  with pytest.raises(command.Stopped):
    train_sae.run(config_of(activations), activations)
  train_sae.run(config_of(activations, checkpoints=3, spike_factor=0.0, checkpoint_every=4), activations)
  with store.Checkpoints(activations / 'sae' / 'checkpoints', 3, scored=True) as checkpoints:
    assert checkpoints.steps()[-3:] == [6, 8, 12]


class FakeTensorBoard(types.SimpleNamespace):
  """tensorboardX, which keeps what it is given."""

  def __init__(self):
    super().__init__(opened=[], scalars=[], closed=0)

  def SummaryWriter(self, folder, purge_step):
    self.opened.append((folder, purge_step))
    return self

  def add_scalar(self, name, value, step):
    self.scalars.append((name, value, step))

  def flush(self):
    pass

  def close(self):
    self.closed += 1


class FakeWandb(types.SimpleNamespace):
  """wandb, which keeps what it is given."""

  def __init__(self):
    super().__init__(runs=[], scalars=[], closed=0)

  def init(self, **settings):
    self.runs.append(settings)
    return self

  def log(self, numbers, step):
    self.scalars += [(name, value, step) for name, value in numbers.items()]

  def finish(self):
    self.closed += 1


@pytest.mark.parametrize('log_to', ['tensorboard', 'wandb'])
def test_a_dashboard_is_shown_what_is_logged(one_device, activations, monkeypatch, log_to):
  fake = FakeTensorBoard() if log_to == 'tensorboard' else FakeWandb()
  monkeypatch.setitem(sys.modules, train_sae.dashboards.MODULES[log_to], fake)
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 3)
  with pytest.raises(command.Stopped):
    train_sae.run(config_of(activations, log_to=log_to), activations)
  train_sae.run(config_of(activations, log_to=log_to), activations)
  expected = [
    (name, value, line['step']) for line in metrics(activations) for name, value in line.items() if name != 'step'
  ]
  assert sorted(fake.scalars) == sorted(expected)
  assert fake.closed == 2
  if log_to == 'tensorboard':
    assert fake.opened == [(str(activations / 'sae' / 'tensorboard'), step) for step in (1, 7)]
  else:
    assert fake.runs[0]['id'] == fake.runs[1]['id']
    assert fake.runs[0]['config']['k'] == 4


@pytest.mark.parametrize(('log_to', 'module'), train_sae.dashboards.MODULES.items())
def test_a_dashboard_that_is_not_installed_is_named(one_device, activations, monkeypatch, log_to, module):
  monkeypatch.setitem(sys.modules, module, None)  # importing it raises
  with pytest.raises(
    ImportError, match=rf"needs {module}, which is not installed; pip install 'jax-interp\[{log_to}\]'"
  ):
    train_sae.run(config_of(activations, log_to=log_to), activations)


def test_flops_of_a_token_are_those_of_its_products():
  rng = np.random.default_rng(0)
  place = lambda *shape: rng.normal(size=shape)
  with jax.set_mesh(sharding.make_mesh()):
    found = sae_lib.SparseAutoencoder(place(64, 8), place(64, 8), place(8), place(64), sae_lib.TopK(4))
  # Encoding 64 latents of 8; of 4 of them three products with the decoder's rows and one with the encoder's.
  assert train_sae.flops(found, 4) == 2 * 64 * 8 + 4 * 4 * 2 * 8


@pytest.mark.parametrize(('own_dtype', 'dtype'), [('auto', 'bfloat16'), ('float32', 'float32')])
def test_what_is_fastest_is_kept_for_runs_that_go_on(one_device, activations, monkeypatch, own_dtype, dtype):
  asked = itertools.count(1)
  chosen = iter(['dense', 'sparse'])
  config = config_of(activations, kernels='auto', compute_dtype=own_dtype)

  def fastest(n_latents, d, k, n_shards, n_tokens):
    assert n_tokens == config.sae.batch_size
    return next(chosen)

  monkeypatch.setattr(train_sae.kernels, 'fastest', fastest)
  monkeypatch.setattr(train_sae.kernels, 'fastest_dtype', lambda n_latents, d, k: 'bfloat16')
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) == 3)
  used, train_steps = set(), train_sae.train_step.train_steps

  def train(state, acts_sbd, tx, recipe, *args):
    used.add((recipe.kernels, recipe.dtype))
    return train_steps(state, acts_sbd, tx, recipe, *args)

  monkeypatch.setattr(train_sae.train_step, 'train_steps', train)
  with pytest.raises(command.Stopped):
    train_sae.run(config, activations)
  train_sae.run(config, activations)
  assert used == {('dense', dtype)}
  assert next(chosen) == 'sparse'


def test_kernels_that_do_not_work_on_this_machine_are_refused(one_device, activations, monkeypatch):
  def check(name, n_latents, d, k):
    raise ValueError(f"kernels '{name}' fail on this machine: no such card")

  monkeypatch.setattr(train_sae.kernels, 'check', check)
  train_sae.run(config_of(activations, kernels='pallas'), activations)  # on a CPU they are 'sorted'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(ValueError, match=r"no such card; set sae.kernels to 'sorted', in another --workdir"):
    train_sae.run(config_of(activations, kernels='pallas'), activations / 'alone')
  assert not (activations / 'alone' / 'sae' / 'fastest.json').exists()
  monkeypatch.setattr(train_sae.kernels, 'fastest', lambda n_latents, d, k, n_shards, n_tokens: 'pallas')
  with pytest.raises(ValueError, match=r'no such card; delete .*stopped/sae/fastest.json, to measure anew'):
    train_sae.run(config_of(activations, kernels='auto'), activations / 'stopped')
  (activations / 'stopped' / 'sae' / 'fastest.json').unlink()
  monkeypatch.setattr(train_sae.kernels, 'fastest', lambda n_latents, d, k, n_shards, n_tokens: 'sparse')
  train_sae.run(config_of(activations, kernels='auto'), activations / 'stopped')
