import json
import math

import numpy as np
import pytest

from jax_interp.explain import simulate
from jax_interp.llm import client
from tests.llm import fake_server

TOKENS = ['a', ' cat', '\n', ' of', 'unknown', '\t', '10']


def test_expected_value_renormalises_over_the_levels_given():
  logprobs = {'0': math.log(0.3), '4': math.log(0.1), 'unknown': math.log(0.5), ' 9': math.log(0.1)}
  assert simulate.expected_value(logprobs, 10) == pytest.approx((0 * 0.3 + 4 * 0.1) / 0.4)
  assert simulate.expected_value({'9': -1.0, '10': -1.0}, 10) == pytest.approx(9.5)
  assert simulate.expected_value({'9': -3.0, '10': -1.0}, 9) == pytest.approx(10)
  assert simulate.expected_value({'unknown': -0.1, '05': -3.0}, 10) is None


@pytest.mark.parametrize('top_level', [9, 10])
def test_slots_stand_after_each_row_of_the_excerpt(top_level):
  text, slots = simulate.all_at_once_prompt('cats', TOKENS, top_level)
  assert len(slots) == len(TOKENS)
  rows = text[text.rindex('<start>\n') + len('<start>\n') :].splitlines()
  assert [row.split('\t')[0] for row in rows] == ['a', ' cat', '\\n', ' of', 'unknown', '\\t', '10']
  for slot, row in zip(slots, rows, strict=True):
    assert text[:slot].endswith(f'\n{row.removesuffix(client.HOLE)}')
    assert text[slot:].startswith(f'{client.HOLE}\n')
  values = {line.split('\t')[1] for line in text.splitlines() if '\t' in line}
  assert values >= {'0', str(top_level), client.HOLE}
  assert ('10' in values) == (top_level == 10)


@pytest.mark.parametrize('completions', ['echo', 'llama'])
def test_all_at_once_reads_every_slot(tmp_path, completions):
  with fake_server.running(completions=completions) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    simulation = simulate.simulate(llm, 'long words', TOKENS)
  assert simulate.simulator(llm) == 'all_at_once'
  assert simulation.status == 'ok'
  lengths = np.array([1, 4, 2, 3, 7, 2, 2])  # of the row's text; the server says: the length, with 0.6, or 0, with 0.1
  np.testing.assert_allclose(simulation.expected_t, lengths * 6 / 7)


def test_levels_to_9_are_stretched_to_10(tmp_path):
  with fake_server.running(splits_ten=True) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    simulation = simulate.simulate(llm, 'long words', ['abc'])
  assert llm.top_level == 9
  np.testing.assert_allclose(simulation.expected_t, [3 * 10 / 9 * 6 / 7])


def test_a_slot_without_any_level_is_a_parse_failure(tmp_path, monkeypatch):
  with fake_server.running() as server:
    llm = client.connect(server.url, 'key', tmp_path)
    monkeypatch.setattr(fake_server, '_top', lambda server, text: {'unknown': -0.1})
    simulation = simulate.simulate(llm, 'cats', TOKENS)
  assert (simulation.status, simulation.expected_t) == ('parse_failed', None)
  assert '7 of 7 tokens' in simulation.detail


def test_the_json_simulator_serves_where_there_are_no_logprobs(tmp_path):
  with fake_server.running(completions=None) as server:
    llm = client.connect(server.url, 'key', tmp_path)
    simulation = simulate.simulate(llm, 'long words', TOKENS)
  assert simulate.simulator(llm) == 'json'
  assert simulation.status == 'ok'
  np.testing.assert_array_equal(simulation.expected_t, [1, 4, 2, 3, 7, 2, 2])


def _answer(pairs):
  return json.dumps({'activations': pairs})


GOOD = [['a', 0], ['cat', 10], ['\\n', 3]]


@pytest.mark.parametrize('text', [_answer(GOOD), f'Here you are:\n```json\n{_answer(GOOD)}\n```'])
def test_json_within_other_text_is_read(text):
  np.testing.assert_array_equal(simulate.parse_json(text, TOKENS[:3]), [0, 10, 3])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('nonsense', 'not the JSON asked for'),
    ('{"values": []}', 'not the JSON asked for'),
    ('{"activations": [1, 2, 3]}', 'not the JSON asked for'),
    (_answer(GOOD[:2]), '3 tokens were asked for and 2 came back'),
    (_answer([['a', 0], ['dog', 10], ['\\n', 3]]), "token 1 is ' cat' and came back as 'dog'"),
    (_answer([['a', 0], ['cat', 11], ['\\n', 3]]), 'the value of token 1 is 11'),
    (_answer([['a', 0], ['cat', '5'], ['\\n', 3]]), "the value of token 1 is '5'"),
    (_answer([['a', 0], ['cat', True], ['\\n', 3]]), 'the value of token 1 is True'),
    (_answer([['a', None], ['cat', 1], ['\\n', 3]]), 'the value of token 0 is None'),
  ],
)
def test_what_is_not_the_json_asked_for_is_a_parse_failure(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    simulate.parse_json(text, TOKENS[:3])
  with fake_server.running(completions=None, reply=lambda messages: text) as server:
    simulation = simulate.simulate(client.connect(server.url, 'key', tmp_path), 'cats', TOKENS[:3])
  assert (simulation.status, simulation.expected_t) == ('parse_failed', None)
  assert message in simulation.detail
