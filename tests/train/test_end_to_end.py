"""train.end_to_end: an SAE trained on by what the model says, stopped and resumed to the same numbers."""

import json

import jax
import numpy as np
import pytest

from models import activation_functions, sharding
from models import sae as sae_lib
from tests.train import runs
from train import command, end_to_end, evaluate

L, N_STEPS = 32, 12


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run whose SAE is untrained."""
  with jax.set_mesh(sharding.make_mesh()):
    fresh = sae_lib.init_sae(jax.random.key(0), np.random.default_rng(0).normal(size=(64, runs.D)), L, 2)
  return runs.build(tmp_path_factory.mktemp('run'), fresh)


@pytest.fixture
def workdirs(run, tmp_path):
  """Two workdirs of that run."""
  for name in ('whole', 'stopped'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'sae').symlink_to(run / 'sae')
  return tmp_path / 'whole', tmp_path / 'stopped'


def make_config(run, **changes):
  settings = {
    'divergence': 'kl',
    'mse_coef': 0.1,
    'l1_coef': 0.0,
    'batch_size': 4,
    'steps': N_STEPS,
    'learning_rate': 1e-2,
    'warmup_steps': 2,
    'clip': 1.0,
    'checkpoint_every': 5,
  }
  evaluation = {'n_tokens': 200, 'batch_size': 4}
  return runs.make_config(run, end_to_end=settings | changes, evaluate=evaluation)


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'end_to_end' / 'metrics.jsonl').read_text().splitlines()]


def weights(workdir):
  return (workdir / 'end_to_end' / 'final' / 'sae.safetensors').read_bytes()


@pytest.mark.usefixtures('mesh')
def test_stopped_and_run_again_it_ends_with_the_same_numbers(run, workdirs, monkeypatch, capsys):
  whole, stopped = workdirs
  config = make_config(run)
  end_to_end.run(config, whole)
  asked = iter([False] * 6 + [True])
  monkeypatch.setattr(command, 'stopping', lambda: next(asked))
  with pytest.raises(command.Stopped, match='step 7 of 12 is saved'):
    end_to_end.run(config, stopped)
  monkeypatch.setattr(command, 'stopping', lambda: False)
  end_to_end.run(config, stopped)
  assert weights(stopped) == weights(whole)
  assert metrics(stopped) == metrics(whole)
  assert [line['step'] for line in metrics(whole)] == list(range(1, N_STEPS + 1))
  end_to_end.run(config, whole)
  assert 'done already' in capsys.readouterr().out


def test_the_model_says_more_of_what_it_said(run, workdirs):
  with jax.set_mesh(sharding.make_mesh()):
    end_to_end.run(make_config(run, steps=150), workdirs[0])
    lines = metrics(workdirs[0])
    assert np.mean([line['kl'] for line in lines[-10:]]) < 0.7 * np.mean([line['kl'] for line in lines[:10]])
    evaluate.run(make_config(run), workdirs[0])  # of the SAE that it began with: that is still there
  assert json.loads((workdirs[0] / 'evaluation' / 'metrics.json').read_text())['kl_spliced'] > 0


def test_every_epoch_has_every_window_once_in_another_order():
  epochs = [np.concatenate([end_to_end.order(22, 4, 0, step) for step in range(first, first + 5)]) for first in (0, 5)]
  assert all(len(set(epoch)) == 20 for epoch in epochs)
  assert not np.array_equal(*epochs)
  np.testing.assert_array_equal(end_to_end.order(22, 4, 0, 7), epochs[1][8:12])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'divergence': 'mse'}, "divergence 'mse' is unknown; choose one of kl, cross_entropy"),
    ({'batch_size': 10_000}, r'end_to_end.batch_size 10000 is more than the \d+ windows of text'),
    ({'learning_rate': float('nan')}, 'the loss is not finite at step 2; there is no checkpoint'),
  ],
)
def test_bad_settings_are_told(run, workdirs, changes, message):
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(ValueError, match=message):
    end_to_end.run(make_config(run, **changes), workdirs[0])


def test_a_config_without_the_block_says_where_it_is(run, workdirs):
  config = make_config(run)
  del config.end_to_end
  with pytest.raises(ValueError, match=r'config.end_to_end is missing: .* copy it from configs/tiny.py'):
    end_to_end.run(config, workdirs[0])


@pytest.mark.usefixtures('mesh')
def test_decoder_rows_that_are_not_of_norm_1_stay_free(tmp_path):
  with jax.set_mesh(sharding.make_mesh()):
    sample_bd = np.random.default_rng(0).normal(size=(64, runs.D))
    free = sae_lib.init_tied(jax.random.key(0), sample_bd, L, activation_functions.ReLU(), row_norm=0.1)
  end_to_end.run(make_config(runs.build(tmp_path, free), steps=2, learning_rate=1e-4), tmp_path)
  found = sae_lib.load_sae(tmp_path / 'end_to_end' / 'final')
  np.testing.assert_allclose(np.linalg.norm(found.decoder[...], axis=1), 0.1, rtol=0.05)
