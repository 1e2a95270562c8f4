import pytest

from jax_interp.explain import token_activation
from jax_interp.llm import client
from tests.llm import fake_server

EXCERPTS = [(['a', ' cat', '\n', 'sat'], [0.0, 2.0, 0.0, 0.0]), ([' two', ' cats', ' ran', '.'], [-1.0, 4.0, 0.0, 0.0])]


def test_lists_hold_a_token_and_a_level_a_line():
  assert token_activation.rows(['a\n', '\tb'], [0, 10]) == 'a\\n\t0\n\\tb\t10\n'
  assert token_activation.row_text('<|endoftext|>') == '< |endoftext|>'
  user = token_activation.messages(EXCERPTS, 8192)[-1]['content']
  assert '<start>\na\t0\n cat\t5\n\\n\t0\nsat\t0\n<end>\n<start>\n two\t0\n cats\t10\n' in user
  assert 'Fired on' not in user


def test_few_non_zero_tokens_are_named_again():
  sparse = [(tokens * 3, activations + [0.0] * 8) for tokens, activations in EXCERPTS]
  assert 'Fired on:  cat 5,  cats 10\n' in token_activation.messages(sparse, 8192)[-1]['content']


def test_worked_examples_have_a_level_for_each_token():
  for explanation, excerpts in token_activation.worked_examples():
    assert explanation
    for tokens, levels in excerpts:
      assert len(tokens) == len(levels)
      assert 0 < max(levels) <= 10
      assert '{' not in ''.join(tokens)


def test_a_prompt_shrinks_to_the_context_and_then_says_that_it_cannot():
  def size(chat):
    return sum(client.estimate_tokens(message['content']) for message in chat) + token_activation.MAX_TOKENS

  whole = token_activation.messages(EXCERPTS, 10**6)
  seen = set()
  for n_context in range(size(whole) + 5, 250, -10):
    try:
      chat = token_activation.messages(EXCERPTS, n_context)
    except ValueError:
      break
    assert size(chat) <= n_context
    assert chat[0] == whole[0]
    assert ' cat\t' in chat[-1]['content']
    seen.add((len(chat), chat[-1]['content'].count('<start>')))
  with pytest.raises(ValueError, match=f'a context of {n_context} tokens is too small.* larger context'):
    token_activation.messages(EXCERPTS, n_context)
  assert seen >= {(6, 2), (4, 2), (2, 2), (2, 1)}


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('This neuron fires on units of time.', 'units of time'),
    (' the main thing this neuron does is find: "numbers". ', 'numbers'),
    ('\n- The neuron seems to respond to words in quotes\nIt is so because', 'words in quotes'),
    ('Neuron activity.', 'Neuron activity'),
    ('references to neurons that fire on cue', 'references to neurons that fire on cue'),
    ('It seems that this neuron mainly activates for commas, e.g. in lists', 'commas, e.g. in lists'),
    (' .\n', ''),
    ('', ''),
  ],
)
def test_explanations_are_freed_of_what_models_put_around_them(text, expected):
  assert token_activation.clean(text) == expected


@pytest.mark.parametrize(
  ('text', 'finish_reason', 'status', 'explanation'),
  [
    ('This neuron fires on cats.', 'stop', 'ok', 'cats'),
    ('This neuron fires on.', 'stop', 'parse_failed', ''),
    ('cats and', 'length', 'truncated', 'cats and'),
    ('I cannot', 'content_filter', 'refused', 'I cannot'),
  ],
)
def test_an_explanation_has_a_status(tmp_path, text, finish_reason, status, explanation):
  with fake_server.running(reply=lambda messages: text, finish_reason=finish_reason) as server:
    answer = token_activation.explain(client.connect(server.url, 'key', tmp_path), EXCERPTS)
  assert (answer.status, answer.content) == (status, explanation)
