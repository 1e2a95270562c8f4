import itertools
import json

import jax
import ml_collections
import numpy as np
import pytest

from jax_interp import records
from models import pretrained, sae, sites
from train import command, windows
from train import records as train_records
from train import sae as train_sae

SITE, N_LATENTS, N_NEURONS, N_WINDOWS, WINDOW = 'h.1.resid.post_mlp', 256, 768, 24, 16


@pytest.fixture
def config(tmp_path):
  rng = np.random.default_rng(0)
  words = ['array', 'of', 'the', 'returns', 'shape', 'value', 'if', 'none', 'is', 'given', 'float', 'matrix']
  texts = [' '.join(rng.choice(words, 60)) for _ in range(30)]
  (tmp_path / 'corpus.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  sizes = {'n_windows': N_WINDOWS + 5, 'n_top': 4, 'n_random': 3, 'n_quantile': 2, 'batch_size': 8}
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': 'embedded'},
      'text': {'source': str(tmp_path / 'corpus.jsonl'), 'window': WINDOW},
      'capture': {},
      'sae': {'site': SITE},
      'records': {**sizes, 'neurons_layer': 2},
    }
  )


@pytest.fixture
def workdir(mesh, config, tmp_path):
  """A workdir where the SAE is trained already."""
  sample_bd = np.random.default_rng(1).normal(size=(64, 192)).astype(np.float32)
  found = sae.init_sae(jax.random.key(0), sample_bd, N_LATENTS, k=8, normalization='layer_norm_std')
  command.claim(tmp_path / 'sae', train_sae.made_with(config, tmp_path))
  sae.save(tmp_path / 'sae' / 'final', found)
  command.finish(tmp_path / 'sae')
  return tmp_path


def test_records_hold_what_the_model_computes(workdir, config):
  train_records.run(config, workdir)
  model = pretrained.load_model('embedded')
  tokenizer = pretrained.load_tokenizer('embedded')
  windows_et = windows.prepared(config, workdir, tokenizer, 'train')[:N_WINDOWS]
  _, acts = sites.forward(model, windows_et, capture=(SITE, 'h.2.mlp.post_act'))
  true = {'latents': sae.load_sae(workdir / 'sae' / 'final').encode(acts[SITE])[0], 'neurons': acts['h.2.mlp.post_act']}
  for kind, n, layer in (('latents', N_LATENTS, 1), ('neurons', N_NEURONS, 2)):
    lines, arrays = records.read(workdir / 'records', kind)
    acts_wtc, keep_wt = np.asarray(true[kind]), windows_et != tokenizer.eos_token_id
    kept_nc = acts_wtc[keep_wt]
    assert len(kept_nc) < N_WINDOWS * WINDOW
    assert not keep_wt[arrays['random_windows']].all()
    assert len(lines) == n
    np.testing.assert_allclose(arrays['max'], kept_nc.max(0), atol=1e-5)
    np.testing.assert_allclose(arrays['density'], (kept_nc > 0).mean(0), atol=3e-3)  # rounding at the k-th
    np.testing.assert_allclose(arrays['histogram'].sum(1), arrays['density'] * len(kept_nc))
    assert arrays['edges'].shape == (n, records.N_BINS + 1)
    assert arrays['promoted_tokens'].shape == arrays['suppressed_tokens'].shape == (n, records.N_PROMOTED)
    for index in (0, n - 1, int(np.argmax(arrays['max']))):
      record = lines[index]
      assert record['neuron_id']['layer_index'] == layer
      np.testing.assert_allclose(record['mean'], kept_nc[:, index].mean(), atol=1e-4)
      for excerpt, window in zip(record['random_sample'], arrays['random_windows'][index], strict=True):
        assert excerpt['tokens'] == [tokenizer.decode([i]) for i in windows_et[window]]
        silent_t = np.where(keep_wt[window], acts_wtc[window, :, index], 0)
        np.testing.assert_allclose(excerpt['activations'], silent_t, rtol=1e-3, atol=1e-5)


def test_tokens_of_a_transcoders_latents_are_those_of_the_site_that_it_writes(mesh, config, tmp_path):
  rng = np.random.default_rng(1)
  read_bd, written_bd = (rng.normal(size=(64, d)).astype(np.float32) for d in (N_NEURONS, 192))
  found = sae.as_transcoder(jax.random.key(1), sae.init_sae(jax.random.key(0), read_bd, N_LATENTS, k=8), written_bd)
  config.sae.update({'site': 'h.1.mlp.post_act', 'target_site': SITE})
  command.claim(tmp_path / 'sae', train_sae.made_with(config, tmp_path))
  sae.save(tmp_path / 'sae' / 'final', found)
  command.finish(tmp_path / 'sae')
  train_records.run(config, tmp_path)
  _, arrays = records.read(tmp_path / 'records', 'latents')
  promoted, _ = records.promoted_tokens(pretrained.load_model('embedded'), found.decoder[...])
  np.testing.assert_array_equal(arrays['promoted_tokens'], promoted)


def test_what_is_done_is_not_done_again_and_another_config_is_refused(workdir, config, capsys):
  train_records.run(config, workdir)
  written = (workdir / 'records' / 'latents.jsonl').stat().st_mtime_ns
  train_records.run(config, workdir)
  assert 'done already' in capsys.readouterr().out
  assert (workdir / 'records' / 'latents.jsonl').stat().st_mtime_ns == written
  config.records.n_top = 5
  with pytest.raises(ValueError, match=r'records\.n_top is 4 there and 5 now'):
    train_records.run(config, workdir)


def test_a_stopped_run_keeps_the_finished_kind_and_ends_the_same(workdir, config, tmp_path, monkeypatch):
  asked = itertools.chain([False] * 7, itertools.repeat(True))  # 2 passes of 3 batches, and one batch of the neurons
  monkeypatch.setattr(command, 'stopping', lambda: next(asked))
  with pytest.raises(command.Stopped, match='begins neurons anew'):
    train_records.run(config, workdir)
  folder = workdir / 'records'
  latents = (folder / 'latents.jsonl').read_bytes()
  assert not (folder / 'DONE').exists()
  assert not (folder / 'neurons.jsonl').exists()
  monkeypatch.setattr(command, 'stopping', lambda: False)
  train_records.run(config, workdir)
  assert (folder / 'latents.jsonl').read_bytes() == latents
  assert len(records.read(folder, 'neurons')[0]) == N_NEURONS


def test_a_layer_that_is_not_there_is_named(workdir, config):
  config.records.neurons_layer = 9
  with pytest.raises(KeyError, match=r"no site matches 'h\.9\.mlp\.post_act'"):
    train_records.run(config, workdir)


def test_too_little_text_is_refused(workdir, config):
  config.records.n_windows = 7
  with pytest.raises(ValueError, match=r'records\.n_windows 7 .* fewer than records\.batch_size 8'):
    train_records.run(config, workdir)


def test_a_layer_that_is_not_there_is_told_before_any_work_and_claims_nothing(workdir, config):
  config.records.neurons_layer = 4
  with pytest.raises(KeyError, match=r'no site matches .*h\.4\.mlp\.post_act.*; the nearest are h\..\.mlp\.post_act'):
    train_records.run(config, workdir)
  assert [path.name for path in (workdir / 'records').iterdir()] == ['config.json']
  config.records.neurons_layer = 3
  train_records.run(config, workdir)
  assert (workdir / 'records' / 'DONE').exists()
