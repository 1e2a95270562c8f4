"""What the command reads and leaves, on a workdir with everything, with little, and with nothing."""

import json

import ml_collections
import numpy as np
import pytest

from jax_interp import records, store
from jax_interp.explain import results
from models import pretrained
from train import report

N_TOKENS, N_WINDOWS = 8, 30


@pytest.fixture
def config():
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': 'embedded'},
      'text': {'source': 'embedded', 'window': N_TOKENS},
      'sae': {'site': 'h.2.resid.post_mlp', 'n_latents': 6, 'k': 2, 'batch_size': 1000},
      'lm': {'batch_size': 4, 'n_ctx': 16},
      'records': {'neurons_layer': 2, 'n_windows': 10 * N_WINDOWS},  # more than there is text
      'report': {'n_components': 2},
    }
  )


def write_records(folder, kind, n):
  rng = np.random.default_rng(n)
  tokens_wt = rng.integers(300, 400, (N_WINDOWS, N_TOKENS))
  acts_wtc = np.maximum(rng.normal(size=(N_WINDOWS, N_TOKENS, n)), 0).astype(np.float32)
  acts_wtc[..., 0] = 0  # a dead component
  batches = [(0, acts_wtc)]
  survey = records.survey(batches, N_WINDOWS)
  selection = records.select(survey.maxima_wc, 4, 3, 1, seed=0)
  max_c = survey.maxima_wc.max(0)
  acts, histogram = records.excerpts(batches, selection, N_TOKENS, max_c)
  strings = records.token_strings(pretrained.load_tokenizer('embedded'))
  lines = records.neuron_records(2, selection, acts, survey.moments, tokens_wt, strings)
  arrays = {'density': survey.density_c, 'max': max_c, 'histogram': histogram}
  arrays['edges'] = np.linspace(0, max_c, records.N_BINS + 1, axis=1)
  arrays['promoted_tokens'] = arrays['suppressed_tokens'] = rng.integers(300, 400, (n, 10))
  records.write(folder, kind, lines, arrays)
  np.save(folder / 'windows.npy', tokens_wt)


def explanation(index, status):
  line = {'component': {'kind': 'latent', 'site': 'h.2.resid.post_mlp', 'index': index}, 'method': 'token_lookup'}
  score = {'ev_correlation': 0.5, 'rsquared': 0.25, 'absolute_dev_explained': None}
  sequence = {'split': 'top', 'window': 3, 'tokens': ['a', 'b'], 'true': [0.0, 2.0], 'simulated': [0.5, 1.0]}
  nulls = {'constant': score, 'other_explanation': None}
  of_status = {
    'ok': {'scores': score | {'random_only': None}, 'nulls': nulls, 'sequences': [sequence]},
    'failed': {'scores': None, 'nulls': dict.fromkeys(nulls), 'sequences': []},
  }[status]
  return {**line, 'explanation': 'letters', 'status': status, 'detail': '', 'excerpts': {status: 1}, **of_status}


def carried(workdir):
  data = (workdir / 'report.html').read_text('utf-8').split('id="data">')[1].split('</script>')[0]
  return {(c['kind'], c['index']): c for c in json.loads(data)['components']}


def test_nothing_there_is_a_page_that_says_how_to_make_it(config, tmp_path):
  report.run(config, tmp_path)
  source = (tmp_path / 'report.html').read_text('utf-8')
  for stage in ('sae', 'evaluate', 'records', 'explain'):
    assert f'python -m train.{stage}' in source
  assert not carried(tmp_path)


def test_explained_components_come_first_then_active_ones(config, tmp_path):
  write_records(tmp_path / 'records', 'latents', 6)
  write_records(tmp_path / 'records', 'neurons', 5)
  lines = [explanation(4, 'ok'), explanation(0, 'failed')]
  store.write_lines(tmp_path / 'explanations' / 'token_lookup.jsonl', map(json.dumps, lines))
  summary = {'token_lookup': results.summarize(lines) | {'model': None}}
  store.write_json(tmp_path / 'explanations' / 'summary.json', summary)
  (tmp_path / 'sae').mkdir()
  (tmp_path / 'sae' / 'metrics.jsonl').write_text('{"step": 2, "loss": 0.5}\n{"step": 4, "loss": 0.4}\n{"step": 6, "lo')
  report.run(config, tmp_path)
  found = carried(tmp_path)
  latents = [index for kind, index in found if kind == 'latent']
  neurons = [index for kind, index in found if kind == 'neuron']
  assert latents[:2] == [0, 4]
  assert len(latents) == 4
  assert len(neurons) == 2
  assert 0 not in neurons
  assert found['latent', 4]['explanations'][0]['sequences'][0]['true'] == [[1], [2.0]]
  assert found['latent', 0]['explanations'][0]['status'] == 'failed'
  assert found['latent', 0]['top'] == []
  source = (tmp_path / 'report.html').read_text('utf-8')
  assert '4,000 tokens' in source, 'the last line, torn, does not count'
  assert f'{N_WINDOWS} windows of {N_TOKENS} tokens' in source
  assert 'python -m train.explain' not in source
  assert 'python -m train.evaluate' in source


def test_the_page_describes_what_is_there_whatever_the_config_says(config, tmp_path):
  there = config.sae.to_dict() | {'k': 32, 'n_latents': 1234}
  store.write_json(tmp_path / 'sae' / 'config.json', {'sae': there, 'seed': 0})
  report.run(config, tmp_path)
  assert '1,234, of which 32 are active' in (tmp_path / 'report.html').read_text('utf-8')


def test_a_recipe_without_k_does_not_say_how_many_latents_are_active(config, tmp_path):
  del config.sae['k']
  config.sae.target_site = 'h.2.resid.delta_mlp'
  report.run(config, tmp_path)
  source = (tmp_path / 'report.html').read_text('utf-8')
  assert 'are active on a token' not in source
  assert 'h.2.resid.delta_mlp' in source


def test_it_is_made_again_only_when_something_changed(config, tmp_path, capsys):
  report.run(config, tmp_path)
  path = tmp_path / 'report.html'
  made = path.stat().st_mtime_ns
  report.run(config, tmp_path)
  assert path.stat().st_mtime_ns == made
  assert 'up to date' in capsys.readouterr().out
  numbers = {'l0': 2.0, 'log10_density_counts': [1, 4], 'log10_density_edges': [-2, -1, 0]}
  store.write_json(tmp_path / 'evaluation' / 'metrics.json', numbers)
  report.run(config, tmp_path)
  assert path.stat().st_mtime_ns > made
  assert 'How often latents are active' in path.read_text('utf-8')
