"""train.evaluate on a random model: the whole flow, once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sae as sae_lib
from models import sharding
from models.activation_functions import TopK
from tests.train import runs
from train import command, evaluate

D, L = runs.D, 16


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run whose SAE gives back every activation."""
  with jax.set_mesh(sharding.make_mesh()):
    identity = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    exact = sae_lib.SparseAutoencoder(identity, identity, jnp.zeros(D), jnp.zeros(L), TopK(L))
  return runs.build(tmp_path_factory.mktemp('run'), exact)


def make_config(workdir, **changed):
  return runs.make_config(workdir, evaluate={'n_tokens': 200, 'batch_size': 4, **changed})


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
    ({'sae.target_site': 'h.0.resid.delta_mlp'}, ValueError, 'a transcoder gives back h.0.resid.delta_mlp and not'),
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
