import math
import socket

import pytest

from jax_interp.llm import client, cost
from tests.llm import fake_server

MESSAGES = [{'role': 'user', 'content': 'Say something.'}]
QUOTA = (429, {'error': {'message': 'no credit', 'code': 'insufficient_quota'}})
BAD_KEY = (401, {'error': {'message': 'Incorrect API key provided', 'code': 'invalid_api_key'}})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
  monkeypatch.setattr(client, 'MAX_RETRIES', 1)


@pytest.mark.parametrize(
  ('completions', 'splits_ten', 'expected'),
  [
    ('echo', False, ('echo', 10)),
    ('llama', False, ('prompts', 10)),
    ('llama', True, ('prompts', 9)),
    ('junk', False, (None, 10)),
    (None, False, (None, 10)),
  ],
)
def test_what_a_server_can_do_is_found_by_trying(tmp_path, completions, splits_ten, expected):
  with fake_server.running(completions=completions, splits_ten=splits_ten) as server:
    llm = client.connect(server.url, 'key', tmp_path)
  assert (llm.slots, llm.top_level) == expected
  assert (llm.model, llm.n_context) == ('fake-model', 8192)


def test_both_ways_to_slot_logprobs_agree(tmp_path):
  text = 'Looks for: x\n<start>\na\tunknown\nbbb\tunknown\ncc\tunknown\n'
  slots = [i + 1 for i, c in enumerate(text) if c == '\t']
  answers = []
  for completions in ('echo', 'llama'):
    with fake_server.running(completions=completions) as server:
      llm = client.connect(server.url, 'key', tmp_path / completions)
      answers.append(llm.slot_logprobs(text, slots[1:], ['0', '1', '2', '3']))
  assert answers[0] == answers[1]
  assert answers[0].status == 'ok'
  assert [max(slot, key=slot.get) for slot in answers[0].content] == ['3', '2']


def test_nothing_is_asked_twice_and_failures_are_not_kept(tmp_path):
  with fake_server.running(error=(500, {'error': {'message': 'broken'}}), failing=lambda p: 'chat' in p) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    first = llm.complete(MESSAGES, 10)
    assert (first.status, 'broken' in first.detail) == ('failed', True)
    server.error = None
    second = llm.complete(MESSAGES, 10)
    asked = len(server.requests)
    again = client.connect(server.url, 'key', tmp_path)
    probed = len(server.requests)
    assert again.complete(MESSAGES, 10) == second
    assert second.status == 'ok'
    assert len(server.requests) == probed > asked
    assert again.usage == client.Usage(remembered=1)
    assert again.complete(MESSAGES, 11) == second
    assert len(server.requests) == probed + 1
  assert llm.usage.prompt_tokens == 100


def test_an_answer_without_usage_is_an_answer(tmp_path):
  with fake_server.running(usage=None) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    assert llm.complete(MESSAGES, 10).status == 'ok'
    assert llm.slot_logprobs('a\tunknown\n', [2], ['1']).status == 'ok'
  assert llm.usage == client.Usage(requests=2)


def test_answers_are_remembered_by_host_or_by_the_file_served(tmp_path):
  with fake_server.running() as server, fake_server.running() as other:
    of = lambda server, **settings: client.connect(server.url, 'key', tmp_path, **settings)
    for llm, n_asked in (
      (of(server), 1),
      (of(other), 1),
      (client.connect(server.url.replace('127.0.0.1', 'localhost'), 'key', tmp_path), 2),
      (of(server, origin='a.gguf'), 3),
      (of(other, origin='a.gguf'), 3),
      (of(server, origin='b.gguf'), 4),
    ):
      llm.complete(MESSAGES, 10)
      assert sum('chat' in path for path in server.paths() + other.paths()) == n_asked


@pytest.mark.parametrize('completions', ['echo', 'llama'])
def test_what_is_impossible_is_left_out_and_stays_so_on_disk(tmp_path, monkeypatch, completions):
  with fake_server.running(completions=completions) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    monkeypatch.setattr(fake_server, '_top', lambda server, text: {'3': -0.5, '0': -math.inf, '1': None})
    answers = [llm.slot_logprobs('a\tunknown\n', [2], ['0', '1', '3']) for _ in range(2)]
  assert answers[0] == answers[1] == client.Answer('ok', [{'3': -0.5}])
  assert llm.usage.remembered == 1


@pytest.mark.parametrize(
  ('finish_reason', 'status'), [('length', 'truncated'), ('content_filter', 'refused'), ('stop', 'ok')]
)
def test_an_unfinished_answer_has_its_status(tmp_path, finish_reason, status):
  with fake_server.running(finish_reason=finish_reason) as server:
    assert client.connect(server.url, 'key', tmp_path).complete(MESSAGES, 10).status == status


def test_a_page_instead_of_an_answer_is_a_failure(tmp_path):
  with fake_server.running(error=(200, b'<html>hello</html>'), failing=lambda p: 'chat' in p) as server:
    answer = client.connect(server.url, 'key', tmp_path).complete(MESSAGES, 10)
  assert answer.status == 'failed'
  assert 'OpenAI API' in answer.detail


def test_no_server_is_one_sentence(tmp_path):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))  # bound but not listening: nothing answers, and nobody else takes the port
    url = f'http://127.0.0.1:{taken.getsockname()[1]}/v1'
    with pytest.raises(ConnectionError, match=f'no language model answers at {url}.*OPENAI_BASE_URL'):
      client.connect(url, 'key', tmp_path)


@pytest.mark.parametrize(('error', 'sentence'), [(BAD_KEY, 'refuses the key'), (QUOTA, 'quota .* used up')])
@pytest.mark.parametrize('failing', ['models', 'completions', 'chat'])
def test_a_refused_key_or_an_empty_account_stops_at_once(tmp_path, monkeypatch, error, sentence, failing):
  monkeypatch.setattr(client, 'MAX_RETRIES', 9)  # minutes, if it were retried
  with fake_server.running(error=error, failing=lambda path: failing in path) as server:
    with pytest.raises(PermissionError, match=sentence):
      client.connect(server.url, 'key', tmp_path).complete(MESSAGES, 10)
    assert sum(failing in path for path in server.paths()) <= 1


def test_an_unknown_model_is_named(tmp_path):
  error = (404, {'error': {'message': 'the model does not exist'}})
  with fake_server.running(error=error, failing=lambda path: 'chat' in path) as server:
    llm = client.connect(server.url, 'key', tmp_path, 'gpt-0')
    with pytest.raises(ValueError, match=r"no model 'gpt-0' .*llm\.model"):
      llm.complete(MESSAGES, 10)


@pytest.mark.parametrize('completions', ['echo', 'llama'])
def test_a_meter_counts_what_is_not_on_disk_and_asks_nothing(tmp_path, completions):
  text = 'a\tunknown\nb\tunknown\n'
  with fake_server.running(completions=completions) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    llm.complete(MESSAGES, 10)
    asked, meter = len(server.requests), cost.Meter(llm)
    meter.complete(MESSAGES, 10)
    assert meter.usage == client.Usage(remembered=1)
    assert meter.complete(MESSAGES, 20).content
    assert len(meter.slot_logprobs(text, [2, 12], ['0']).content) == 2
    assert len(server.requests) == asked
  sent = [text] if completions == 'echo' else [text[:2], text[:12]]
  tokens = sum(map(client.estimate_tokens, [MESSAGES[0]['content'], *sent]))
  assert (meter.usage.prompt_tokens, meter.usage.completion_tokens) == (tokens, 20 + len(sent))
  assert llm.usage.requests == 1


def test_cost_is_checked_against_the_budget():
  usage = client.Usage(prompt_tokens=1_000_000, completion_tokens=500_000)
  assert '$1.20 of a budget of $2.00' in cost.check(usage, 'm', (0.4, 1.6), 2)
  assert 'price is not known' in cost.check(usage, 'm', None, 2)
  with pytest.raises(ValueError, match=r'\$1\.20, is more than llm\.budget_usd \$1\.00'):
    cost.check(usage, 'm', (0.4, 1.6), 1)
