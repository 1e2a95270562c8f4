"""train.compare: the SAEs of a sweep in one table, exact ones exact, and what it refuses."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recipes_sweep
from jax_interp import store
from models import sae as sae_lib
from models import sharding
from models.activation_functions import ReLU, TopK
from tests.train import runs
from train import command, compare, recipes, sweep
from train import sae as train_sae

D = runs.D
SWEEP = ({'name': 'exact', 'recipe': 'relu', 'l1_coef': 0.0}, {'name': 'rough', 'k': 4}, {'name': 'gone', 'k': 3})


def make_config(workdir, **changes):
  config = runs.make_config(workdir, evaluate={'n_tokens': 200, 'batch_size': 4})
  config.sae.update({'recipe': 'topk', 'k': 2, 'sweep': SWEEP} | changes)
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run with two SAEs of a sweep: one that gives back every activation, one that keeps 4 of its 16 latents."""
  with jax.set_mesh(sharding.make_mesh()):
    identity = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    make = lambda kind: sae_lib.SparseAutoencoder(identity, identity, jnp.zeros(D), jnp.zeros(2 * D), kind)
    folder = runs.build(tmp_path_factory.mktemp('run'), make(ReLU()))
    shutil.rmtree(folder / 'sae')
    command.claim(folder / 'sae', train_sae.made_with(make_config(folder), folder))
    command.finish(folder / 'sae')
    for name, kind in (('exact', ReLU()), ('rough', TopK(4))):
      sae_lib.save(sweep.folder(folder, name) / 'sae' / 'final', make(kind))
    diverged = {'step': 3, 'why': 'gone: the loss is not finite at step 3'}
    store.write_json(sweep.folder(folder, 'gone') / 'sae' / train_sae.DIVERGED, diverged)
  return folder


@pytest.mark.usefixtures('mesh')
def test_every_sae_has_a_row_and_other_ks_are_decoded(workdir, capsys):
  shutil.rmtree(workdir / 'comparison', ignore_errors=True)
  compare.run(make_config(workdir), workdir)
  results = json.loads((workdir / 'comparison' / 'metrics.json').read_text())
  assert abs(results['exact']['normalized_mse']) < 1e-5
  assert results['rough']['normalized_mse'] > 0.01
  assert results['rough']['l0'] == 4
  mses = list(results['rough']['at_other_ks'].values())
  assert list(results['rough']['at_other_ks']) == ['1', '2', '4', '8', '16']
  np.testing.assert_allclose(mses[2], results['rough']['normalized_mse'], rtol=1e-6)
  # Of unit vectors and their opposites, the k largest are the k largest coordinates: 8 give all back.
  assert np.all(np.diff(mses[:4]) < 0)
  np.testing.assert_allclose(mses[3:], 0, atol=1e-5)
  lines = (workdir / 'comparison' / 'table.md').read_text().splitlines()
  assert [line.split()[1] for line in lines[2:4]] == ['relu', 'topk']
  assert lines[4:] == ['', 'gone has no SAE: gone: the loss is not finite at step 3']
  assert (workdir / 'comparison' / 'frontier.png').stat().st_size > 1000
  compare.run(make_config(workdir), workdir)
  assert 'done already' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'n_tokens', 'message'),
  [
    ({'sweep': ()}, 200, 'config.sae.sweep is empty, so there is nothing to compare'),
    ({'sweep': ({'name': 'a', 'target_site': 'resid.post_emb'},)}, 200, 'a is a transcoder'),
    ({}, 60, 'evaluate.n_tokens 60 is less than a batch'),
  ],
)
def test_what_cannot_be_compared_is_told(workdir, tmp_path, changes, n_tokens, message):
  config = make_config(workdir, **changes)
  config.evaluate.n_tokens = n_tokens
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(ValueError, match=message):
    compare.run(config, tmp_path)


def test_the_sweep_over_recipes_is_one_that_trains():
  members = sweep.members(recipes_sweep.get_config())
  with jax.set_mesh(sharding.make_mesh()):
    plans = {name: recipes.plan(settings, 300) for name, settings in members.items()}
  assert {plan.settings['recipe'] for plan in plans.values()} == set(recipes.RECIPES)
