"""Scoring what a user types: nothing is asked of the language model before an estimate was given and sent back."""

import contextlib
import time

import httpx
import pytest

from jax_interp.explain import results, scores, simulate
from jax_interp.llm import client as llm_client
from jax_interp.server import catalog, jobs, scoring
from tests.llm import fake_server
from tests.server import stubs

KEY = 'sk-very-secret'
ASKED = {'kind': 'latent', 'site': stubs.LATENTS, 'index': 1, 'explanation': 'b2 and b3'}


@contextlib.contextmanager
def _serving(folder, memory, budget_usd=1.0, prices=(None, None), **settings):
  """Yields a client, the fake language model's server, its requests so far gone, and what was made to ask it."""
  with fake_server.running(**settings) as server:
    llm = llm_client.connect(server.url, KEY, memory)
    records = catalog.Catalog(stubs.record_sets(folder), stubs.TOKENIZER.strings)
    scorer = scoring.Scorer(llm, records, budget_usd, prices)
    workers = jobs.Worker(5, 10), jobs.Worker(5, 10)
    server.requests.clear()
    application = stubs.create(folder, workers[0], scorer=scorer, scoring_worker=workers[1])
    with stubs.running(application) as url, httpx.Client(base_url=url, timeout=30) as client:
      yield client, server, llm
    for worker in workers:
      worker.stop()


def _estimate(client, **changes) -> dict:
  response = client.post('/api/score/estimate', json=ASKED | changes)
  assert response.status_code == 200, response.text
  return response.json()


@pytest.mark.parametrize('completions', ['llama', None])
def test_an_estimate_asks_nothing_and_its_id_scores_once(folder, tmp_path, completions):
  with _serving(folder, tmp_path, prices=(1.0, 2.0), completions=completions) as (client, server, llm):
    estimate = _estimate(client)
    assert not server.requests
    assert estimate['request'] == ASKED
    assert (estimate['excerpts'], estimate['requests']) == (4, 4)  # two top and two random ones: all the split has
    expected = (estimate['prompt_tokens'] + 2 * estimate['completion_tokens']) / 1e6
    assert estimate['usd'] == pytest.approx(expected)
    answer = client.post('/api/score', json={'id': estimate['id']})
    assert answer.status_code == 200
    assert len(server.requests) == 4
    again = client.post('/api/score', json={'id': estimate['id']})
    assert (again.status_code, len(server.requests)) == (404, 4)
    remembered = _estimate(client)
    assert (remembered['requests'], remembered['usd']) == (0, 0)
    assert remembered['usd_left'] == pytest.approx(estimate['usd_left'] - estimate['usd'])

  found = answer.json()
  record = catalog.RecordSet(folder, 'latent', stubs.LATENTS).record(1)
  target = results.target(1, record, range(8), range(8, 14))
  simulated = [simulate.simulate(llm, ASKED['explanation'], e.tokens).expected_t for e in target.scored]
  unit = target.maximum / 10
  expected = scores.score([e.activations for e in target.scored], [unit * s_t for s_t in simulated])
  assert {name: found['scores'][name] for name in expected} == pytest.approx(expected)
  assert found['statuses'] == {'ok': 4}
  assert [len(s['simulated']) for s in found['sequences']] == [stubs.N_TOKENS] * 4


@pytest.mark.parametrize(
  ('changes', 'status', 'message'),
  [
    ({'index': 9}, 404, 'numbered from 0'),
    ({'index': 3}, 422, 'too seldom'),
    ({'site': 'nowhere'}, 404, 'no records of latents'),
    ({'explanation': ''}, 422, 'at least 1 character'),
  ],
)
def test_what_cannot_be_scored_is_said_before_any_cost(folder, tmp_path, changes, status, message):
  with _serving(folder, tmp_path) as (client, server, _):
    response = client.post('/api/score/estimate', json=ASKED | changes)
    assert not server.requests
  assert response.status_code == status
  assert message in response.json()['error']['message']


def test_the_budget_is_for_all_that_is_asked(folder, tmp_path):
  with _serving(folder, tmp_path / 'free', prices=(1.0, 1.0)) as (client, *_):
    usd = _estimate(client)['usd']
  with _serving(folder, tmp_path / 'paid', 1.5 * usd, (1.0, 1.0)) as (client, server, _):
    first, second = _estimate(client), _estimate(client, index=0)
    assert client.post('/api/score', json={'id': first['id']}).status_code == 200
    n_asked = len(server.requests)
    late = client.post('/api/score', json={'id': second['id']})
    assert (late.status_code, len(server.requests)) == (422, n_asked)
    refused = client.post('/api/score/estimate', json=ASKED | {'index': 0})
    assert refused.status_code == 422
    assert '--llm_budget_usd' in refused.json()['error']['message']


def test_an_estimate_expires_and_a_guess_is_none(folder, tmp_path, monkeypatch):
  with _serving(folder, tmp_path) as (client, server, _):
    id = _estimate(client)['id']
    assert client.post('/api/score', json={'id': id[:-1]}).status_code == 404
    monkeypatch.setattr(time, 'monotonic', lambda now=time.monotonic: now() + scoring.SECONDS + 1)
    assert client.post('/api/score', json={'id': id}).status_code == 404
    assert not server.requests


@pytest.mark.parametrize(
  ('error', 'status'),
  [
    ((401, {'error': {'message': f'Incorrect API key {KEY}', 'code': 'invalid_api_key'}}), 502),
    ((500, {'error': {'message': f'broken {KEY}'}}), 200),
  ],
)
@pytest.mark.parametrize('stream', ['', '?stream=true'])
def test_the_key_is_never_said(folder, tmp_path, monkeypatch, error, status, stream):
  monkeypatch.setattr(llm_client, 'MAX_RETRIES', 0)
  with _serving(folder, tmp_path, completions=None) as (client, server, llm):
    llm.client.max_retries = 0
    id = _estimate(client)['id']
    server.error = error
    response = client.post(f'/api/score{stream}', json={'id': id})
    said = response.text + client.get('/api/model').text + client.get('/openapi.json').text
    assert server.requests
  assert KEY not in said
  if not stream:
    assert response.status_code == status
  if status == 200:
    assert '"failed":4' in response.text
  else:
    assert 'language_model_failed' in response.text
