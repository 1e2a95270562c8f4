"""train.grow: a finished SAE or a stopped training becomes what config.sae says, and train.sae trains on from it."""

import json
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from jax_interp import store
from models import sae as sae_lib
from models import sharding
from tests.train import runs
from train import command, grow
from train import sae as train_sae

SITE, D, N_EXAMPLES, N_TOKENS, BATCH, N_STEPS = 'h.1.resid.post_mlp', runs.D_SUMS, 40, 16, 32, 12
OTHER_SITE, D_OTHER = 'h.2.resid.post_mlp', 20
SETTINGS = {
  'site': SITE,
  'source': 'store',
  'recipe': 'topk',
  'n_latents': 64,
  'k': 4,
  'normalization': 'layer_norm_std',
  'auxk': 16,
  'kernels': 'sparse',
  'compute_dtype': 'float32',
  'dead_tokens': 4 * BATCH,
  'learning_rate': 1e-2,
  'warmup_steps': 2,
  'ema': 0.9,
  'batch_size': BATCH,
  'tokens': N_STEPS * BATCH,
  'buffer_examples': 8,
  'steps_per_dispatch': 2,
  'checkpoint_every': 4,
  'log_every': 2,
}
JUMPRELU = {'recipe': 'jumprelu', 'coef': 1.0, 'sparsity': 'target', 'bandwidth': 0.1, 'target_l0': 3.0}
RELU_APRIL = {'recipe': 'relu_april', 'l1_coef': 1.0, 'decay': 'linear', 'ema': 0.0}
TRANSCODER = {'normalization': 'expected_average', 'target_site': OTHER_SITE}


def config_of(folder, **changes):
  settings = SETTINGS | changes
  if settings['recipe'] in ('jumprelu', 'relu_april'):
    settings = {name: x for name, x in settings.items() if name not in ('k', 'auxk', 'kernels', 'compute_dtype')}
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'mesh': {'data': 1, 'model': 1},
      'model': {'source': 'embedded'},
      'text': {'source': str(folder / 'corpus.jsonl'), 'window': N_TOKENS},
      'capture': {
        'sites': (SITE,),
        'store': str(folder / 'store'),
        'n_tokens': N_EXAMPLES * N_TOKENS,
        'shard_examples': 8,
        'batch_size': 8,
        'dtype': 'float32',
      },
      'sae': settings,
    }
  )


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  """Measuring what the processor could do takes seconds, as does a sample of many tokens."""
  monkeypatch.setattr(train_sae.throughput, 'peak', lambda dtype: (1e12, 'made up'))
  first = train_sae.first_tokens
  monkeypatch.setattr(train_sae, 'first_tokens', lambda stream, settings, n_tokens=0: first(stream, settings, 1024))


@pytest.fixture
def folder(tmp_path):
  """A store of activations that are sums of a few of 96 directions, captured by the workdir `old`."""
  others = {OTHER_SITE: lambda x_etd: 2 * x_etd[..., :D_OTHER] + 1}
  runs.capture_sums(config_of(tmp_path), [tmp_path / 'old'], 96, 0.05, others)
  return tmp_path


@pytest.fixture
def stop_at_6(monkeypatch):
  asked = iter([False, False, True])
  monkeypatch.setattr(command, 'stopping', lambda: next(asked, False))
  monkeypatch.setattr(train_sae, '_stopping_alone', lambda: False)  # asked after dispatches only


def report(workdir):
  return json.loads((workdir / 'sae' / grow.REPORT).read_text())


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'sae' / 'metrics.jsonl').read_text().splitlines()]


def test_a_finished_sae_is_widened_and_trained_on(mesh, folder, capsys):
  train_sae.run(config_of(folder), folder / 'old')
  config = config_of(folder, n_latents=96, k=6)
  grow.grow(config, folder / 'new', folder / 'old')
  assert 'normalized_mse' in capsys.readouterr().out
  before, after = (report(folder / 'new')[name] for name in ('before', 'after'))
  assert (before['n_latents'], before['k'], after['n_latents'], after['k']) == (64, 4, 96, 6)
  assert after['l0'] == 6
  assert after['normalized_mse'] < before['normalized_mse']
  with pytest.raises(FileNotFoundError, match='is not finished; run train'):
    train_sae.load(config, folder / 'new')
  grow.grow(config, folder / 'new', folder / 'old')
  assert 'is grown already' in capsys.readouterr().out
  train_sae.run(config, folder / 'new')
  lines = metrics(folder / 'new')
  assert [line['step'] for line in lines] == list(range(2, N_STEPS + 1, 2))
  assert lines[-1]['normalized_mse'] < metrics(folder / 'old')[-1]['normalized_mse']
  assert train_sae.load(config, folder / 'new').n_latents == 96


def test_a_stopped_training_keeps_its_state(mesh, folder, stop_at_6):
  with pytest.raises(command.Stopped):
    train_sae.run(config_of(folder), folder / 'old')
  config = config_of(folder, n_latents=96)
  grow.grow(config, folder / 'new', folder / 'old')
  state, wide = (
    store.restore_checkpoint(folder / name / 'sae' / 'checkpoints', {'': abstract})['']
    for name, abstract in (('old', fresh(config_of(folder))), ('new', fresh(config)))
  )
  for old, new in zip(jax.tree.leaves(state.opt[1][0]), jax.tree.leaves(wide.opt[1][0]), strict=True):
    np.testing.assert_array_equal(new[: len(old)] if old.ndim else new, old)
  np.testing.assert_array_equal(wide.tokens_since_fired_l[:64], state.tokens_since_fired_l)
  assert (int(wide.step), int(state.step)) == (0, 6)
  train_sae.run(config, folder / 'new')


def test_a_training_that_began_by_itself_does_not_pass_for_a_grown_one(folder, stop_at_6):
  grow._share(folder / 'old', folder / 'new')
  with jax.set_mesh(sharding.make_mesh()):
    with pytest.raises(command.Stopped):
      train_sae.run(config_of(folder), folder / 'new')
    with pytest.raises(ValueError, match='is of a training that did not begin with a grown SAE; give another'):
      grow.grow(config_of(folder), folder / 'new', folder / 'old')


def fresh(config):
  plan, sample = grow._plan(config.sae), np.random.default_rng(0).normal(size=(64, D)).astype(np.float32)
  return grow.train_step.init_state(plan.init(jax.random.key(0), sample), sample, plan.tx, plan.ema)


def test_a_threshold_for_an_l0_and_nothing_to_train_leave_what_other_stages_read(mesh, folder):
  train_sae.run(config_of(folder), folder / 'old')
  config = config_of(folder, **JUMPRELU, tokens=0)
  grow.grow(config, folder / 'jumprelu', folder / 'old')
  found = report(folder / 'jumprelu')
  assert abs(found['after']['l0'] - 3) < 1e-3
  assert found['after']['activation'] == 'jumprelu'
  command.require(folder / 'jumprelu' / 'sae', train_sae.made_with(config, folder / 'jumprelu'), 'train.sae')
  old, new = sae_lib.load_sae(folder / 'old' / 'sae' / 'final'), train_sae.load(config, folder / 'jumprelu')
  np.testing.assert_array_equal(new.decoder[...], old.decoder[...])


def test_batch_topk_with_nothing_to_train_has_its_threshold(mesh, folder):
  train_sae.run(config_of(folder), folder / 'old')
  config = config_of(folder, recipe='batch_topk', n_latents=96, tokens=0)
  with config.unlocked():
    del config.sae.kernels, config.sae.compute_dtype
  grow.grow(config, folder / 'new', folder / 'old')
  found = train_sae.load(config, folder / 'new')
  assert (found.activation.name, found.n_latents) == ('jumprelu', 96)
  assert abs(report_of(config, found, folder)['l0'] - 4) < 0.1
  assert report(folder / 'new')['after'] == report_of(config, found, folder)


def test_where_growing_failed_nothing_else_is_trained(folder):
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config_of(folder, tokens=2 * BATCH), folder / 'old')
    with pytest.raises(ValueError, match='normalization of the SAE'):
      grow.grow(config_of(folder, normalization='none'), folder / 'new', folder / 'old')
    with pytest.raises(ValueError, match=r'train.grow has begun in .*new/sae and not finished'):
      train_sae.run(config_of(folder, normalization='none'), folder / 'new')
    config = config_of(folder, n_latents=96)
    grow.grow(config, folder / 'new', folder / 'old')
    train_sae.run(config, folder / 'new')
    assert train_sae.load(config, folder / 'new').n_latents == 96


def test_killed_at_the_very_end_it_is_done_when_run_again(folder, capsys):
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config_of(folder, tokens=2 * BATCH), folder / 'old')
    config = config_of(folder, n_latents=96, tokens=0)
    grow.grow(config, folder / 'new', folder / 'old')
    command.write(folder / 'new' / 'sae' / command.GROWING, b'')
    grow.grow(config, folder / 'new', folder / 'old')
    assert 'is done already' in capsys.readouterr().out
    assert not (folder / 'new' / 'sae' / command.GROWING).exists()


def test_dead_latents_go_and_new_ones_take_their_places(mesh, folder):
  train_sae.run(config_of(folder), folder / 'old')
  final = folder / 'old' / 'sae' / 'final'
  model = sae_lib.load_sae(final)
  model.latent_bias[...] = model.latent_bias[...].at[10:30].add(-100)
  sae_lib.save(final, model)
  n_alive = 64 - report_of(config_of(folder), model, folder)['dead']
  even = n_alive + n_alive % 2
  grow.grow(config_of(folder, n_latents=even, tokens=0), folder / 'less', folder / 'old')
  assert report(folder / 'less')['after']['n_latents'] == even
  assert (
    abs(report(folder / 'less')['after']['normalized_mse'] - report(folder / 'less')['before']['normalized_mse']) < 1e-6
  )
  grow.grow(config_of(folder, tokens=0), folder / 'same', folder / 'old', prune=True)
  assert report(folder / 'same')['after']['normalized_mse'] < report(folder / 'same')['before']['normalized_mse']
  with pytest.raises(
    ValueError, match=f'sae.n_latents 32 is less than the {even if mesh.size > 1 else n_alive} latents'
  ):
    grow.grow(config_of(folder, n_latents=32, tokens=0), folder / 'too_few', folder / 'old')


@pytest.mark.parametrize('changes', [{'k': 1, 'auxk': 0}, {**JUMPRELU, 'target_l0': 0.5}], ids=['topk', 'jumprelu'])
def test_there_may_be_fewer_latents_than_the_old_k(mesh, folder, changes):
  train_sae.run(config_of(folder), folder / 'old')
  final = folder / 'old' / 'sae' / 'final'
  model = sae_lib.load_sae(final)
  model.latent_bias[...] = model.latent_bias[...].at[2:].add(-100)
  sae_lib.save(final, model)
  grow.grow(config_of(folder, n_latents=2, tokens=0, **changes), folder / 'new', folder / 'old')
  after = report(folder / 'new')['after']
  assert (after['n_latents'], after['k']) == (2, changes.get('k'))
  assert 0 < after['l0'] <= 1


def test_a_rate_that_is_to_fall_is_no_matter_where_nothing_is_trained(mesh, folder):
  train_sae.run(config_of(folder, **RELU_APRIL), folder / 'old')
  grow.grow(config_of(folder, **RELU_APRIL, n_latents=96, tokens=0), folder / 'new', folder / 'old')
  assert sae_lib.load_sae(folder / 'new' / 'sae' / 'final').n_latents == 96
  with pytest.raises(ValueError, match="decay 'step' is unknown"):
    grow.grow(config_of(folder, **RELU_APRIL | {'decay': 'step'}, tokens=0), folder / 'other', folder / 'old')


def scales_of(folder):
  model = sae_lib.load_sae(folder)
  return [model.input_scale, model.output_scale]


def of_another_seed(folder, **changes):
  """Returns a config with other activations in its sample, whose mean norm is another."""
  config = config_of(folder, **changes)
  config.seed = 1
  return config


@pytest.mark.parametrize('changes', [{'normalization': 'expected_average'}, TRANSCODER], ids=['sae', 'transcoder'])
def test_the_scales_are_those_of_the_start_to_the_end(mesh, folder, changes):
  train_sae.run(config_of(folder, **changes), folder / 'old')
  old = scales_of(folder / 'old' / 'sae' / 'final')
  config = of_another_seed(folder, **changes, n_latents=96)
  grow.grow(config, folder / 'new', folder / 'old')
  assert json.loads((folder / 'new' / 'sae' / train_sae.SCALES).read_text()) == {'': old}
  train_sae.run(config, folder / 'new')
  assert scales_of(folder / 'new' / 'sae' / 'final') == old
  alone = of_another_seed(folder, **changes, tokens=BATCH)
  grow._share(folder / 'old', folder / 'alone')
  train_sae.run(alone, folder / 'alone')
  assert scales_of(folder / 'alone' / 'sae' / 'final') != old  # else this would show nothing


def test_the_scales_of_a_folder_and_of_a_stopped_training_go_on(mesh, folder, stop_at_6):
  changes = {'normalization': 'expected_average'}
  with pytest.raises(command.Stopped):
    train_sae.run(config_of(folder, **changes), folder / 'old')
  store.write_json(folder / 'old' / 'sae' / train_sae.SCALES, {'': [0.25, 1.0]})
  grow.grow(config_of(folder, **changes, n_latents=96), folder / 'wide', folder / 'old')
  assert json.loads((folder / 'wide' / 'sae' / train_sae.SCALES).read_text()) == {'': [0.25, 1.0]}
  grow.grow(config_of(folder, **changes, tokens=0), folder / 'new', folder / 'old')
  grow._share(folder / 'old', folder / 'again')
  grow.grow(config_of(folder, **changes, k=6, tokens=0), folder / 'again', folder / 'new' / 'sae' / 'final')
  for name in ('new', 'again'):
    assert scales_of(folder / name / 'sae' / 'final') == [0.25, 1.0]


def report_of(config, model, folder):
  streams = train_sae.streams(config, folder / 'old', [SITE])
  return grow._numbers(model, [train_sae.first_tokens(streams, config.sae)[SITE]])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'normalization': 'none'}, "normalization of the SAE is 'layer_norm_std', and of config.sae 'none'"),
    ({'recipe': 'gated'}, "a 'topk' SAE cannot become the 'gated' one of sae.recipe 'gated'"),
    ({'sweep': ({'k': 2},)}, 'sae.sweep is of several SAEs, and one grows'),
  ],
)
def test_another_kind_of_sae_is_refused(folder, changes, message):
  if changes.get('recipe') == 'gated':
    config = config_of(folder, recipe='gated', l1_coef=1.0)
    for name in ('k', 'auxk', 'kernels', 'compute_dtype'):
      del config.sae[name]
  else:
    config = config_of(folder, **changes)
  with jax.set_mesh(sharding.make_mesh()):
    train_sae.run(config_of(folder, tokens=2 * BATCH), folder / 'old')
    with pytest.raises(ValueError, match=message):
      grow.grow(config, folder / 'new', folder / 'old')
    with pytest.raises(ValueError, match='is the workdir of the SAE itself'):
      grow.grow(config_of(folder), folder / 'old', folder / 'old')


def test_without_an_sae_the_command_says_so(folder):
  (folder / 'config.py').write_text(
    f'import ml_collections\ndef get_config(): return ml_collections.ConfigDict({config_of(folder).to_dict()!r})\n'
  )
  flags = [f'--config={folder / "config.py"}', f'--workdir={folder / "new"}']
  run = lambda *more: subprocess.run(
    [sys.executable, '-m', 'train.grow', *flags, *more], stderr=subprocess.PIPE, text=True, check=False
  )
  assert 'error: no SAE to grow; give its workdir or folder as --start' in run().stderr
  result = run(f'--start={folder / "old"}')
  assert result.returncode == 1
  assert 'holds neither sae/final nor sae/checkpoints' in result.stderr
