import collections
import itertools
import json
import shutil
import signal
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jax_interp import text
from jax_interp.explain import results
from jax_interp.llm import client, local_server
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
      'mesh': {'data': 1, 'model': 1},
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
  command.claim(folder / 'sae', train_sae.made_with(_config(folder), folder))
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


def _assert_same(workdir, whole):
  for name in ('summary.json', *(f'{method}.jsonl' for method in METHODS)):
    assert (workdir / 'explanations' / name).read_bytes() == (whole / 'explanations' / name).read_bytes()


def _command(config, workdir) -> subprocess.Popen:
  path = workdir / 'config_of_test.py'
  path.write_text(
    f'import json\nimport ml_collections\n\n'
    f'def get_config():\n  return ml_collections.ConfigDict(json.loads({config.to_json()!r}))\n'
  )
  arguments = [sys.executable, '-m', 'train.explain', f'--config={path}', f'--workdir={workdir}']
  return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _lines(workdir, method):
  return [json.loads(line) for line in (workdir / 'explanations' / f'{method}.jsonl').read_text().splitlines()]


def test_padding_and_special_tokens_are_neither_recorded_nor_explained(recorded, tmp_path):
  (tmp_path / 'subject').mkdir()
  for path in (recorded / 'subject').iterdir():
    shutil.copy(path, tmp_path / 'subject')
  end = pretrained.END_OF_TEXT
  (tmp_path / 'subject' / 'tokenizer_config.json').write_text(json.dumps({'bos_token': end, 'eos_token': end}))
  shutil.copy(recorded / 'text.jsonl', tmp_path)
  config = _config(tmp_path)
  config.text = {**config.text, 'boundaries': 'padded', 'prepend_bos': True}
  config.llm.backend = 'none'
  shutil.copytree(recorded / 'sae', tmp_path / 'sae')
  (tmp_path / 'sae' / 'config.json').unlink()
  (tmp_path / 'sae' / 'DONE').unlink()
  (tmp_path / 'sae' / 'config.json').write_text(json.dumps(command._plain(train_sae.made_with(config, tmp_path))))
  command.finish(tmp_path / 'sae')
  train_records.run(config, tmp_path)
  lengths = set()
  for kind in ('latents', 'neurons'):
    for line in (tmp_path / 'records' / f'{kind}.jsonl').read_text().splitlines():
      record = json.loads(line)
      for excerpt in [*record['most_positive_activation_records'], *record['random_sample']]:
        lengths.add(len(excerpt['tokens']))
        assert excerpt['tokens'][0] == end
        for token, activation in zip(excerpt['tokens'], excerpt['activations'], strict=True):
          assert token != end or activation == 0
  assert max(lengths) == 12 > min(lengths)
  explain.run(config, tmp_path)
  summary = json.loads((tmp_path / 'explanations' / 'summary.json').read_text())
  assert summary['token_lookup']['scores']['ev_correlation']['n'] == 5
  assert all(end not in line['explanation'] for line in _lines(tmp_path, 'token_lookup'))
  for line in _lines(tmp_path, 'token_lookup'):
    for sequence in line['sequences']:
      assert sequence['simulated'][0] == sequence['true'][0] == 0
  patterns = '; '.join(line['explanation'] for line in _lines(tmp_path, 'neuron2graph'))
  assert patterns
  assert f'{end!r} (' not in patterns  # it may be context, but never what is fired on


def test_excerpts_of_unequal_length_are_averaged_by_token_and_simulated_without_their_padding():
  lengths = [3, 1, 2, 3, 2, 3, 1]  # of 4 top and 3 random excerpts, each a split; the second and fifth calibrate
  windows = np.where(np.arange(3) < np.array(lengths)[:, None], 5 + np.arange(21).reshape(7, 3), text.PAD)
  found = [{'tokens': ['a'] * n, 'activations': [float(w)] * n} for w, n in enumerate(lengths)]
  record = {'most_positive_activation_records': found[:4], 'random_sample': found[4:]}
  target = results.target(0, record, range(4), range(4, 7))
  assert target.constant == pytest.approx((1 * 1 + 4 * 2) / 3)
  assert [e.window for e in target.scored] == [2, 5]
  simulated = [simulation['simulated'] for simulation in explain._predict(np.array, target, windows)]
  assert simulated == [[11, 12], [20, 21, 22]]


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
  explanations = ' '.join(line['explanation'] for line in _lines(workdir, 'token_activation'))
  assert set(explanations.replace(',', ' ').split()) & {*WORDS}
  assert 'fake-model explains' in capsys.readouterr().out
  asked = len(server.requests)
  explain.run(config, workdir)
  assert 'done already' in capsys.readouterr().out
  assert len(server.requests) == asked


def test_an_explanation_of_another_predicts_in_the_unit_of_the_latent_it_is_scored_on():
  windows = np.array([[5, 6, 7], [8, 9, 10]])
  excerpts = [results.Excerpt('top', w, ['a', 'b', 'c'], [0.0, unit, 0.0]) for w, unit in enumerate((2.0, 6.0))]
  weak, strong = (results.Target(i, [e], [e], 0.0) for i, e in enumerate(excerpts))
  explanations = [('all', lambda tokens_t: np.array(tokens_t, np.float32))] * 2
  units = [unit for _, unit in explain._without_llm(explanations, [(weak, strong), (strong, weak)], windows)]
  found = [unit['own'][0]['simulated'] + unit['other'][0]['simulated'] for unit in units]
  np.testing.assert_allclose(found, [[5, 6, 7, 24, 27, 30], [8, 9, 10, 5 / 3, 2, 7 / 3]], rtol=1e-6)


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
  _assert_same(workdir, whole)
  asked = collections.Counter(json.dumps(body) for _, body in server.requests if 'fires on' in json.dumps(body))
  assert set(asked.values()) == {2}, 'once for each of the two runs, however often one was stopped'


@pytest.mark.parametrize('part', ['chat', 'excerpts'])
def test_what_failed_on_its_way_is_asked_again(workdir, config, server, tmp_path, monkeypatch, capsys, part):
  whole = shutil.copytree(workdir, tmp_path / 'whole')
  explain.run(config, whole)
  monkeypatch.setattr(client, 'MAX_RETRIES', 0)
  asked = itertools.count()  # the first four are those by which `client.connect` tries the server
  failing = {'chat': lambda path: 'chat' in path, 'excerpts': lambda path: 'chat' not in path and next(asked) >= 4}
  server.error, server.failing = (500, {'error': {'message': 'busy'}}), failing[part]
  explain.run(config, workdir)
  assert 'requests failed for 3 of the 3 latents; the same command asks for those again' in capsys.readouterr().out
  summary = json.loads((workdir / 'explanations' / 'summary.json').read_text())
  assert (summary['token_activation']['status'], summary['token_activation']['unanswered']) == ({'failed': 3}, 3)
  assert not (workdir / 'explanations' / 'DONE').exists()
  server.error = None
  explain.run(config, workdir)
  _assert_same(workdir, whole)
  assert (workdir / 'explanations' / 'DONE').exists()


def test_another_language_model_explains_anew_and_going_back_costs_nothing(
  workdir, config, server, monkeypatch, capsys
):
  monkeypatch.delenv('OPENAI_BASE_URL')
  monkeypatch.setattr(local_server, 'SERVER', 'no_such_package')
  explain.run(config, workdir)
  kept = (workdir / 'explanations' / 'units' / 'token_lookup').stat().st_mtime_ns
  explain.run(config, workdir)
  assert 'done already' in capsys.readouterr().out
  monkeypatch.setenv('OPENAI_BASE_URL', server.url)
  explain.run(config, workdir)
  assert [line['model'] for line in _lines(workdir, 'token_activation')] == ['fake-model'] * 3
  assert (workdir / 'explanations' / 'units' / 'token_lookup').stat().st_mtime_ns == kept
  first, n_asked = (workdir / 'explanations' / 'token_activation.jsonl').read_bytes(), len(server.requests)
  config.llm.model = 'another'
  explain.run(config, workdir)
  assert [line['model'] for line in _lines(workdir, 'token_activation')] == ['another'] * 3
  assert len(server.requests) > n_asked
  config.llm.model = ''
  monkeypatch.setattr(server, 'requests', [])
  explain.run(config, workdir)
  assert (workdir / 'explanations' / 'token_activation.jsonl').read_bytes() == first
  assert not any('chat' in path for path in server.paths())
  capsys.readouterr()
  for config.llm.backend in ('auto', 'none'):
    explain.run(config, workdir)
    assert 'except by' not in capsys.readouterr().out, 'without a language model, what one explained stays'


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


def test_the_command_stopped_by_sigterm_and_run_again_equals_uninterrupted(
  workdir, config, server, tmp_path, monkeypatch
):
  whole = shutil.copytree(workdir, tmp_path / 'whole')
  explain.run(config, whole)
  process, answer, asked = _command(config, workdir), fake_server._chat, itertools.count(1)

  def stop_then_answer(server, messages):
    if next(asked) == 1:  # before the last explanation is begun; once: asked twice, a command ends at once
      process.send_signal(signal.SIGTERM)
    return answer(server, messages)

  monkeypatch.setattr(fake_server, '_chat', stop_then_answer)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0
  assert 'stopped: the finished explanations are kept' in errors
  assert not (workdir / 'explanations' / 'DONE').exists()
  monkeypatch.setattr(fake_server, '_chat', answer)
  again = _command(config, workdir)
  _, errors = again.communicate(timeout=600)
  assert again.returncode == 0, errors
  _assert_same(workdir, whole)


@pytest.mark.parametrize(
  ('key_is_refused', 'sentence'), [(False, 'no language model answers'), (True, 'refuses the key')]
)
def test_the_command_without_a_usable_server_says_so_and_fails(
  workdir, config, server, monkeypatch, key_is_refused, sentence
):
  if key_is_refused:
    server.error = (401, {'error': {'message': 'wrong key'}})
  else:
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9/v1')  # nobody listens at that port
  process = _command(config, workdir)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 1
  assert len([line for line in errors.splitlines() if line.startswith('error: ')]) == 1
  assert sentence in errors
  assert 'Traceback' not in errors


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
