import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx
import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from models import pretrained, sae, sharding
from tests.llm import fake_server
from tests.server import stubs
from train import serve

ROOT = pathlib.Path(__file__).parents[2]
# Serves plain functions in the place of the engine, whose jobs last as long as the prompt says.
STUBBED = """
from absl import app
from tests.llm import fake_server
from tests.server import stubs
from train import serve
serve.endpoints = lambda main, other: stubs.endpoints()
serve.engine.warm = lambda subject, lengths: None
app.run(serve.main, flags_parser=serve._parse_flags)
"""


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir as the stages leave it, with an SAE that was not trained."""
  workdir = tmp_path_factory.mktemp('run')
  stubs.write_records(workdir)
  fingerprint = pretrained.fingerprint('embedded')
  settings = {'fingerprint': fingerprint, 'sae': {'site': stubs.LATENTS}, 'records': {'neurons_layer': 1}}
  (workdir / 'sae').mkdir()
  for stage in ('sae', 'records'):
    (workdir / stage / 'config.json').write_text(json.dumps(settings))
  with jax.set_mesh(sharding.make_mesh()):
    made = sae.init_sae(jax.random.key(0), jax.random.normal(jax.random.key(1), (64, 192)), stubs.N_LATENTS * 64, 8)
    sae.save(workdir / 'sae' / 'final', made)
  return workdir


@contextlib.contextmanager
def _serving(*args, code=None, **env):
  """Yields the process, once it is ready, and its URL."""
  program = ['-c', code] if code else ['-m', 'train.serve']
  process = subprocess.Popen(
    [sys.executable, *program, '--port=0', '--sample=', *args],  # the embedded text takes a while to read
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': '', **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    line = process.stdout.readline()
    assert line.startswith('ready at http://127.0.0.1:'), line + process.stderr.read()
    yield process, line.split()[-1]
  finally:
    process.kill()
    process.communicate()


def _end(process) -> str:
  """Waits for a clean end, and returns what was said on the way."""
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0, err
  assert 'Traceback' not in err
  assert out == ''
  return err


@pytest.fixture
def _in_process(monkeypatch):
  """What `serve.main` changes in a process does not change that of the tests."""
  monkeypatch.setattr(signal, 'signal', lambda *args: None)
  with jax.set_mesh(sharding.make_mesh()):
    monkeypatch.setattr(jax, 'set_mesh', lambda mesh: None)
    flags.FLAGS.mark_as_parsed()
    yield
  flags.FLAGS.unparse_flags()


def _acts(prompt: str) -> dict:
  return {'prompt': prompt, 'kind': 'neuron', 'layer': 0, 'index': 1}


@pytest.mark.usefixtures('_in_process')
@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'host': '0.0.0.0'}, 'give a token by --token_file or JAX_INTERP_TOKEN'),
    ({'host': '192.0.2.1', 'token': 'x'}, 'port 0 of 192.0.2.1 cannot be had'),
    ({'token': ''}, 'the token is empty'),
    ({'token_file': 'nowhere'}, 'nowhere'),
    ({'allow_origin': '*'}, '--allow_origin=* is no origin'),
    ({'allow_origin': 'https://a.example/path'}, 'is no origin'),
    ({'allow_host': '*.example'}, '--allow_host=*.example is no name'),
    ({'warm': '16,long'}, '--warm=long is no number of tokens'),
    ({'config': 'configs/tiny.py'}, '--config is for the stages'),
    ({'workdir': 'runs/tiny'}, '--workdir is for the stages'),
    ({'records': 'nowhere'}, 'nowhere/records has no config.json'),
    ({'llm_backend': 'openai'}, 'set OPENAI_API_KEY'),
  ],
)
def test_bad_input_is_one_sentence_before_anything_is_loaded(capsys, monkeypatch, given, message):
  for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(serve, '_load_subject', lambda: pytest.fail('the model was loaded'))
  with flagsaver.as_parsed(**{'port': '0'} | given), pytest.raises(SystemExit) as ended:
    serve.main([''])
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert message in line


@pytest.mark.usefixtures('_in_process')
@pytest.mark.parametrize(
  ('given', 'change', 'message'),
  [
    ({'sae': '{}/sae/final'}, {'fingerprint': 'other'}, 'was made with another model than embedded'),
    ({'sae': '{0}/sae/final,{0}/sae/final'}, {}, 'two SAEs of h.2.resid.post_mlp'),
    ({'sae': '{0}/sae/final,h.9.resid.post_mlp={0}/sae/final'}, {}, "an SAE at 'h.9.resid.post_mlp' cannot be"),
    ({'sae': '{}'}, {}, 'has no config.json; give the folder that train.sae left'),
    ({'records': '{0},{0}'}, {}, 'two sets of records of latents'),
    ({'llm_backend': 'auto'}, {}, 'give their workdir by --records'),
  ],
)
def test_what_does_not_fit_together_is_said(workdir, tmp_path, capsys, monkeypatch, given, change, message):
  folder = tmp_path / 'run'
  subprocess.run(['cp', '-r', workdir, folder], check=True)
  path = folder / 'sae' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9/v1')
  given = {name: value.format(folder) for name, value in given.items()}
  with flagsaver.as_parsed(port='0', sample='', **given), pytest.raises(SystemExit) as ended:
    serve.main([''])
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_a_port_that_is_taken_is_said():
  with _serving(code=STUBBED) as (_, url):
    port = url.rsplit(':', 1)[1]
    second = [sys.executable, '-m', 'train.serve', f'--port={port}']
    result = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert f'error: port {port} of 127.0.0.1 cannot be had' in result.stderr
  assert 'Traceback' not in result.stderr


def test_asked_to_stop_it_answers_what_was_asked_and_ends(workdir):
  token = {'Authorization': 'Bearer secret'}
  with (
    _serving(f'--records={workdir}', code=STUBBED, JAX_INTERP_TOKEN='secret') as (process, url),
    httpx.Client(base_url=url, timeout=30, headers=token) as client,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    assert httpx.get(f'{url}/api/model').status_code == 401
    model = client.get('/api/model').json()
    assert (model['name'], model['family'], model['d_model'], model['saes']) == ('embedded', 'gpt2', 192, [])
    assert [x['n'] for x in model['records']] == [stubs.N_LATENTS, stubs.N_NEURONS]
    assert 'h.3.mlp.post_act' in model['sites']
    assert client.get(f'/api/components/latent/{stubs.LATENTS}/1').json()['density'] > 0
    text = 'def f():\n  return "é" <|endoftext|>'
    tokens = client.post('/api/tokenize', json={'text': text}).json()['tokens']
    assert [t['id'] for t in tokens] == pretrained.load_tokenizer('embedded').encode(text, add_special_tokens=False)
    slow = [pool.submit(client.post, '/api/acts', json=_acts(f'slow 0.{n}')) for n in range(5, 9)]
    streamed = pool.submit(client.post, '/api/acts?stream=true', json=_acts('slow 0.5'))
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    answers = [answer.result() for answer in slow]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.json()['request']['prompt'] for answer in answers] == [f'slow 0.{n}' for n in range(5, 9)]
    assert 'event: result' in streamed.result().text
    with pytest.raises(httpx.ConnectError):
      httpx.get(url)
    assert 'stopped: ' in _end(process)


@pytest.mark.parametrize('word', ['slow', 'deaf'])
def test_after_the_grace_period_what_still_runs_is_given_up(word):
  with (
    _serving('--grace=0.5', code=STUBBED) as (process, url),
    httpx.Client(base_url=url, timeout=30) as client,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    waiting = [pool.submit(client.post, '/api/acts', json=_acts(f'{word} 60')) for _ in range(3)]
    streamed = pool.submit(client.post, '/api/acts?stream=true', json=_acts(f'{word} 60'))
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert [answer.result().status_code for answer in waiting] == [503] * 3
    assert re.search('event: error\ndata: .*"busy"', streamed.result().text)
    _end(process)
    assert time.monotonic() - start < 10


def test_explanations_are_scored_by_the_language_model_that_is_named(workdir):
  key = 'sk-very-secret'
  with (
    fake_server.running() as llm,
    _serving(
      f'--records={workdir}', '--llm_backend=openai', code=STUBBED, OPENAI_BASE_URL=llm.url, OPENAI_API_KEY=key
    ) as (process, url),
    httpx.Client(base_url=url, timeout=30) as client,
  ):
    assert client.get('/api/model').json()['language_model'] == 'fake-model'
    llm.requests.clear()
    asked = {'kind': 'latent', 'site': stubs.LATENTS, 'index': 1, 'explanation': 'b2'}
    estimate = client.post('/api/score/estimate', json=asked).json()
    assert (estimate['usd'], estimate['usd_left']) == (0, 1)  # a server on this machine
    assert not llm.requests
    answer = client.post('/api/score', json={'id': estimate['id']})
    assert answer.json()['statuses'] == {'ok': 4}
    assert len(llm.requests) == estimate['requests']
    process.send_signal(signal.SIGTERM)
    assert key not in _end(process)


def test_asked_to_stop_while_it_loads_it_stops():
  loading = """
def load():
  print('loading', flush=True)
  for _ in range(6000):
    time.sleep(0.01)
serve._load_subject = load
app.run"""
  process = subprocess.Popen(
    [sys.executable, '-c', 'import time' + STUBBED.replace('\napp.run', loading), '--port=0'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'loading\n'
  process.send_signal(signal.SIGTERM)
  assert 'stopped: ' in _end(process)


def test_the_embedded_model_is_debugged_over_http(workdir):
  """The real engine, its SAE and records: every endpoint answers, and 20 clients get what a single one gets."""
  with (
    _serving(f'--sae={workdir}/sae/final', f'--records={workdir}', '--warm=16', XLA_FLAGS=os.environ['XLA_FLAGS']) as (
      process,
      url,
    ),
    httpx.Client(base_url=url, timeout=300) as client,
    concurrent.futures.ThreadPoolExecutor(20) as pool,
  ):
    assert client.get('/api/model').json()['saes'][0]['site'] == stubs.LATENTS
    prompts = ['def f(x, y):', 'Returns the sum of', 'import numpy as', 'The array is']
    asked = [{'prompt': prompt, 'objective': {'kind': 'entropy'}, 'k': 2, 'n_tokens': 2} for prompt in prompts]
    ask = lambda request: client.post('/api/debug', json=request).json() | {'seconds': 0}
    alone = [ask(request) for request in asked]
    assert [answer['request']['prompt'] for answer in alone] == prompts
    assert all(abs(answer['completeness']['residual']) < 1e-2 for answer in alone if answer['completeness']['exact'])
    assert list(pool.map(ask, asked * 5)) == alone * 5
    request, neuron = asked[0], {'kind': 'neuron', 'token': -1, 'layer': 2, 'index': 5}
    latent = {'kind': 'latent', 'site': stubs.LATENTS, 'index': 1}
    for path, body in {
      'acts': {'prompt': prompts[0], **latent},
      'lens': latent,
      'compare': {'left': request | {'ablations': [{'kind': 'mlp', 'layer': 1}]}},
      'audit': {'request': request, 'n': 3, 'steps': 2},
      'edges': {'request': request, 'to_node': neuron},
      'qk': {'request': request, 'layer': 2, 'head': 1, 'token': -1, 'source': 0, 'n': 5},
      'circuit': {'request': request, 'n_edges': 5, 'steps': 2, 'minimality': False},
      'template': {'requests': [request, request]},
      'generate': {'prompt': prompts[0], 'n_new': 4},
    }.items():
      answer = client.post(f'/api/{path}', json=body)
      assert answer.status_code == 200, (path, answer.text)
      sent = answer.json()['request']
      assert {name: sent[name] for name in body if not isinstance(body[name], dict | list)} == {
        name: value for name, value in body.items() if not isinstance(value, dict | list)
      }
    wrong = client.post('/api/debug', json=request | {'prompt': 'x ' * 200})
    assert (wrong.status_code, wrong.json()['error']['code']) == (422, 'invalid')
    process.send_signal(signal.SIGTERM)
    _end(process)
