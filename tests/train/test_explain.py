import collections
import itertools
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jax_interp.explain import results
from jax_interp.llm import client
from models import gpt2, pretrained, sae, sharding
from tests.llm import fake_server
from train import command, explain
from train import records as train_records
from train import sae as train_sae

SITE, N_LATENTS, METHODS = 'h.0.resid.post_mlp', 24, ('token_lookup', 'neuron2graph', 'token_activation')
WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'dog', 'ran', 'far']


@pytest.fixture(scope='module', autouse=True)
def _mesh():
  with jax.set_mesh(sharding.make_mesh()):
    yield


def _config(folder):
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': str(folder / 'subject')},
      'text': {'source': str(folder / 'text.jsonl'), 'window': 12},
      'capture': {},
      'sae': {'site': SITE},
      'records': {
        'n_windows': 64,
        'n_top': 12,
        'n_random': 9,
        'n_quantile': 2,
        'neurons_layer': 0,
        'batch_size': 8,
      },
      'explain': {'n_components': 5, 'n_llm': 3, 'n_shown': 2, 'n_llm_scored': 2},
      'llm': {
        'backend': 'auto',
        'model': '',
        'gguf': '',
        'concurrency': 2,
        'temperature': 0.0,
        'budget_usd': 1.0,
        'usd_per_million_prompt': None,
        'usd_per_million_completion': None,
      },
    }
  )


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  """A folder with a random model, a random SAE and its records."""
  folder = tmp_path_factory.mktemp('recorded')
  rng = np.random.default_rng(0)
  documents = [' '.join(rng.choice(WORDS, 60)) for _ in range(40)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': document}) for document in documents))
  (folder / 'subject').mkdir()
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(documents, 280, special_tokens=[pretrained.END_OF_TEXT], show_progress=False)
  bpe._tokenizer.save(str(folder / 'subject' / 'tokenizer.json'))
  model_config = gpt2.GPT2Config(n_layer=1, n_head=2, d_model=16, n_ctx=32, n_vocab=bpe.get_vocab_size())
  pretrained.save_model(folder / 'subject', jax.jit(lambda: gpt2.GPT2(model_config, nnx.Rngs(0)))())
  sample_bd = rng.normal(size=(64, 16)).astype(np.float32)
  command.claim(folder / 'sae', train_sae.made_with(_config(folder)))
  sae.save(folder / 'sae' / 'final', sae.init_sae(jax.random.key(0), sample_bd, N_LATENTS, 6, 'layer_norm_std'))
  command.finish(folder / 'sae')
  train_records.run(_config(folder), folder)
  return folder


@pytest.fixture
def workdir(recorded, tmp_path, monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
  monkeypatch.setattr(client, 'MAX_RETRIES', 1)
  return shutil.copytree(recorded, tmp_path / 'work')


@pytest.fixture
def config(recorded):
  return _config(recorded)


@pytest.fixture
def server(monkeypatch):
  with fake_server.running() as server:
    monkeypatch.setenv('OPENAI_BASE_URL', server.url)
    yield server


def _lines(workdir, method):
  return [json.loads(line) for line in (workdir / 'explanations' / f'{method}.jsonl').read_text().splitlines()]


def test_every_method_is_scored_on_what_it_did_not_see(workdir, config, server, capsys):
  explain.run(config, workdir)
  record_lines = [json.loads(line) for line in (workdir / 'records' / 'latents.jsonl').read_text().splitlines()]
  summary = json.loads((workdir / 'explanations' / 'summary.json').read_text())
  indices = {}
  for method, n, n_sequences in zip(METHODS, (5, 5, 3), (6, 6, 4), strict=True):
    lines = _lines(workdir, method)
    indices[method] = [line['component']['index'] for line in lines]
    assert len(set(indices[method])) == n
    assert summary[method]['status'] == {'ok': n}
    assert summary[method]['excerpts'] == {'ok': n * n_sequences}
    for line in lines:
      record = record_lines[line['component']['index']]
      assert line['component'] | {'index': 0} == {'kind': 'latent', 'site': SITE, 'index': 0}
      assert [s['split'] for s in line['sequences']] == ['top'] * (n_sequences // 2) + ['random'] * (n_sequences // 2)
      for sort, name in (('top', 'most_positive_activation_records'), ('random', 'random_sample')):
        n_splits = {'top': 4, 'random': 3}[sort]
        valid = record[name][n_splits - 2 :: n_splits][: n_sequences // 2]
        found = [s for s in line['sequences'] if s['split'] == sort]
        assert [(s['tokens'], s['true']) for s in found] == [(e['tokens'], e['activations']) for e in valid]
      true, simulated = (np.concatenate([s[key] for s in line['sequences']]) for key in ('true', 'simulated'))
      if line['scores']['ev_correlation'] is not None:
        assert line['scores']['ev_correlation'] == pytest.approx(np.corrcoef(true, simulated)[0, 1])
      assert line['scores']['rsquared'] == pytest.approx(1 - np.mean((true - simulated) ** 2) / np.mean(true**2))
      assert line['nulls']['constant']['ev_correlation'] is None
      assert line['nulls']['other_explanation']['rsquared'] != line['scores']['rsquared']
      assert set(line['scores']['random_only']) == set(results.SCORES)
  assert set(indices['token_activation']) < set(indices['token_lookup']) == set(indices['neuron2graph'])
  line = _lines(workdir, 'token_activation')[0]
  assert (line['model'], line['simulator']) == ('fake-model', 'all_at_once')
  assert set(line['explanation'].replace(',', ' ').split()) & {*WORDS}
  assert 'fake-model explains' in capsys.readouterr().out
  asked = len(server.requests)
  explain.run(config, workdir)
  assert 'done already' in capsys.readouterr().out
  assert len(server.requests) == asked


def test_without_a_language_model_the_others_are_there(workdir, config):
  config.llm.backend = 'none'
  explain.run(config, workdir)
  assert set(json.loads((workdir / 'explanations' / 'summary.json').read_text())) == set(METHODS[:2])


@pytest.mark.parametrize('n_checks', [0, 6, 13, 25, 31])
def test_stopped_and_resumed_equals_uninterrupted(workdir, config, server, tmp_path, monkeypatch, n_checks):
  whole = shutil.copytree(workdir, tmp_path / 'whole')
  explain.run(config, whole)
  checks = itertools.chain([False] * n_checks, itertools.repeat(True))
  monkeypatch.setattr(command, 'stopping', lambda: next(checks))
  with pytest.raises(command.Stopped, match='run the same command'):
    explain.run(config, workdir)
  assert not (workdir / 'explanations' / 'DONE').exists()
  monkeypatch.setattr(command, 'stopping', lambda: False)
  explain.run(config, workdir)
  for name in ('summary.json', *(f'{method}.jsonl' for method in METHODS)):
    assert (workdir / 'explanations' / name).read_bytes() == (whole / 'explanations' / name).read_bytes()
  asked = collections.Counter(json.dumps(body) for _, body in server.requests if 'fires on' in json.dumps(body))
  assert set(asked.values()) == {2}, 'once for each of the two runs, however often one was stopped'


def test_failures_are_counted_and_are_no_scores(workdir, config, server):
  server.completions = None
  server.reply = lambda messages: 'nonsense'
  explain.run(config, workdir)
  lines = _lines(workdir, 'token_activation')
  for line in lines:
    assert (line['explanation'], line['status'], line['scores']) == ('nonsense', 'parse_failed', None)
    assert '4 of 4 excerpts could not be simulated' in line['detail']
    assert line['nulls']['other_explanation'] is None
    assert line['sequences'] == []
  summary = json.loads((workdir / 'explanations' / 'summary.json').read_text())['token_activation']
  assert (summary['status'], summary['excerpts'], summary['scores']) == ({'parse_failed': 3}, {'parse_failed': 12}, {})


def test_what_cannot_go_on_is_told_before_any_work(workdir, config, monkeypatch, server):
  config.llm.usd_per_million_prompt = config.llm.usd_per_million_completion = 1e6
  with pytest.raises(ValueError, match=r'more than llm\.budget_usd \$1\.00'):
    explain.run(config, workdir)
  assert not any(path.endswith('chat/completions') for path in server.paths())
  server.error = (401, {'error': {'message': 'wrong key'}})
  with pytest.raises(PermissionError, match='refuses the key'):
    explain.run(config, workdir)
  monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9/v1')
  with pytest.raises(ConnectionError, match='no language model answers'):
    explain.run(config, workdir)
  assert not (workdir / 'explanations').exists(), 'other settings may be tried'


def test_a_sample_is_spread_over_the_densities_and_alive():
  rng = np.random.default_rng(0)
  density_c, alive_c = rng.random(40), rng.random(40) < 0.7
  found = results.sample(density_c, alive_c, 6, seed=1)
  assert len(set(found.tolist())) == 6
  assert alive_c[found].all()
  ranks = np.searchsorted(np.sort(density_c[alive_c]), density_c[found])
  assert np.array_equal(ranks * 6 // alive_c.sum(), np.arange(6))
  assert sorted(results.sample(density_c, alive_c, 99, seed=1)) == np.flatnonzero(alive_c).tolist()
  assert results.sample(density_c, np.zeros(40, bool), 6, seed=1).shape == (0,)
