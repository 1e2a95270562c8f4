"""Jobs over HTTP: each gets its own answer, in turn, and none takes another or the worker with it."""

import asyncio
import concurrent.futures
import json
import os
import time

import httpx
import pytest

from jax_interp.server import jobs
from tests.server import stubs

CLIENTS, SECONDS = 50, float(os.environ.get('JAX_INTERP_LOAD_SECONDS', '2'))


@pytest.fixture(autouse=True)
def _idle(worker):
  yield
  _wait_until(lambda: not worker._jobs)


def _acts(prompt: str, index: int = 0) -> dict:
  return {'json': {'prompt': prompt, 'kind': 'neuron', 'layer': 0, 'index': index}}


def _events(response: httpx.Response):
  """Yields (event, data) as they come."""
  event = None
  for line in response.iter_lines():
    name, _, value = line.partition(': ')
    if name == 'event':
      event = value
    elif name == 'data':
      yield event, json.loads(value)


def _wait_until(condition):
  deadline = time.monotonic() + 5
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_every_answer_carries_its_request_and_the_id_of_its_job(client):
  response = client.post('/api/acts', **_acts('abc', 7))
  assert response.status_code == 200
  assert response.json()['request']['prompt'] == 'abc'
  assert response.json()['values'] == [7.0, 3.0]
  assert len(response.headers['X-Job-Id']) == 32


@pytest.mark.parametrize('asked', [{'params': {'stream': True}}, {'headers': {'Accept': 'text/event-stream'}}])
def test_a_stream_tells_the_position_then_progress_then_the_answer(url, client, asked):
  with httpx.stream('POST', f'{url}/api/acts?stream=true', **_acts('slow 1.2')) as first:
    first_events = _events(first)
    next(first_events)
    with client.stream('POST', '/api/acts', **_acts('slow 0.7', 5), **asked) as response:
      assert response.headers['Content-Type'].startswith('text/event-stream')
      events = list(_events(response))
  names = [name for name, _ in events]
  assert names == sorted(names, key=['queued', 'progress', 'result'].index)
  assert events[0][1]['position'] == 1
  fractions = [data['fraction'] for name, data in events if name == 'progress']
  assert len(fractions) >= 2
  assert fractions == sorted(fractions)
  assert len({data['id'] for name, data in events if name != 'result'}) == 1
  assert events[-1][1]['values'] == [5.0, 8.0]


@pytest.mark.parametrize(
  ('word', 'status', 'message'),
  [
    ('refuse', 422, 'there is no such head; give another'),
    ('miss', 422, "'h.9' is no site"),
    ('crash', 500, 'the log of the server has it'),
    ('bad', 500, 'the log of the server has it'),
    ('deaf 3.5', 504, 'longer than 3 s'),
  ],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(client, caplog, word, status, message):
  response = client.post('/api/acts', **_acts(word))
  assert response.status_code == status
  error = response.json()['error']
  assert message in error['message']
  with client.stream('POST', '/api/acts?stream=true', **_acts(word)) as stream:
    *_, (name, data) = _events(stream)
  assert (name, data['error']['code']) == ('error', error['code'])
  assert client.post('/api/acts', **_acts('abc', 1)).json()['values'] == [1.0, 3.0]
  if status == 500:
    assert 'secret' not in response.text
    assert 'Traceback' not in response.text
    assert error['id'] in caplog.text
    assert ('secret' in caplog.text) == (word == 'crash')


def test_a_full_queue_says_when_to_come_again(folder):
  worker = jobs.Worker(1, 10)
  with stubs.running(stubs.create(folder, worker)) as url, httpx.Client(base_url=url) as client:
    with (
      client.stream('POST', '/api/acts?stream=true', **_acts('slow 5')),
      client.stream('POST', '/api/acts?stream=true', **_acts('slow 5')),
    ):
      refused = client.post('/api/acts', **_acts('abc'))
    assert refused.status_code == 503
    assert refused.json()['error']['code'] == 'busy'
    assert int(refused.headers['Retry-After']) > 0
    _wait_until(lambda: not worker._jobs)  # those two clients have left
    assert client.post('/api/acts', **_acts('abc')).status_code == 200
  worker.stop()


def _leave(client):
  with pytest.raises(httpx.TimeoutException):
    client.post('/api/acts', **_acts('slow 2.5'), timeout=0.5)


def _leave_stream(client):
  with client.stream('POST', '/api/acts?stream=true', **_acts('slow 2.5')) as response:
    events = _events(response)
    assert next(events)[0] == 'queued'
    time.sleep(0.5)


@pytest.mark.parametrize('leave', [_leave, _leave_stream])
@pytest.mark.parametrize('n_before', [1, 2])
def test_a_client_that_leaves_cancels_its_job_and_the_queue_goes_on(client, worker, leave, n_before):
  with concurrent.futures.ThreadPoolExecutor() as pool:
    start = time.monotonic()
    leaving = [pool.submit(leave, client) for _ in range(n_before)]
    _wait_until(lambda: len(worker._jobs) == n_before)
    assert client.post('/api/acts', **_acts('after', 3)).json()['values'] == [3.0, 5.0]
    assert time.monotonic() - start < 2  # less than one of the others takes
    for one in leaving:
      one.result()


def test_what_is_cheap_never_waits(folder):
  worker = jobs.Worker(1, 10)
  with (
    stubs.running(stubs.create(folder, worker)) as url,
    httpx.Client(base_url=url) as client,
    client.stream('POST', '/api/acts?stream=true', **_acts('slow 8')) as busy,
  ):
    events = _events(busy)
    next(events)
    for _ in range(10):
      assert client.get('/api/model').status_code == 200
      assert client.post('/api/tokenize', json={'text': 'abc'}).status_code == 200
      assert client.get(f'/api/components/latent/{stubs.LATENTS}/0').status_code == 200
      assert client.get('/api/search', params={'q': 'dogs'}).status_code == 200
    assert len(worker._jobs) == 1  # the slow one is not done: nothing waited for it


@pytest.mark.parametrize('word', ['slow', 'deaf'])
def test_a_worker_that_stops_answers_those_who_wait(folder, word):
  worker = jobs.Worker(9, 10)
  with stubs.running(stubs.create(folder, worker)) as url, httpx.Client(base_url=url, timeout=10) as client:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      answers = [pool.submit(client.post, '/api/acts', **_acts(f'{word} 2.5')) for _ in range(3)]
      _wait_until(lambda: len(worker._jobs) == 3)
      start = time.monotonic()
      assert worker.stop(wait=1) == (word == 'slow')
      assert [answer.result().status_code for answer in answers] == [503] * 3
      assert time.monotonic() - start < 2
    refused = client.post('/api/acts', **_acts('abc'))
  assert (refused.status_code, refused.json()['error']['code']) == (503, 'busy')


def test_fifty_clients_at_once_get_their_own_answers(folder):
  """JAX_INTERP_LOAD_SECONDS=60 keeps them at it for a minute."""
  worker = jobs.Worker(CLIENTS, 10)
  n_answered = 0

  async def one(client, number, until):
    nonlocal n_answered
    turn = 0
    while time.monotonic() < until:
      turn += 1
      prompt = 'x' * (1 + (number * 7 + turn) % 50)
      stream = turn % 3 == 0
      response = await client.post(f'/api/acts?stream={stream}', **_acts(prompt, 1000 * number + turn))
      assert response.status_code == 200
      body = response.text.rsplit('data: ', 1)[-1] if stream else response.text
      answer = json.loads(body)
      assert answer['values'] == [1000.0 * number + turn, float(len(prompt))]
      assert answer['request']['prompt'] == prompt
      n_answered += 1

  async def all_of_them(url):
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
      until = time.monotonic() + SECONDS
      await asyncio.gather(*(one(client, number, until) for number in range(CLIENTS)))

  with stubs.running(stubs.create(folder, worker)) as url:
    asyncio.run(all_of_them(url))
  worker.stop()
  assert n_answered >= CLIENTS, n_answered
