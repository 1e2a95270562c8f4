"""Excerpts with activations -> what a component looks for, in the words of a language model.

The token-activation explainer of Bills et al. 2023: the model sees lists of a token and an activation from 0 to 10 a
line, after worked examples of our own. `simulate` shows it the same examples and lists.
"""

import re
from collections.abc import Sequence

from jax_interp.explain import scores
from jax_interp.llm import client

Excerpt = tuple[Sequence[str], Sequence[float]]  # tokens and activations

QUESTION = 'What does this neuron fire on?'
MAX_TOKENS = 60
SPARSE = 0.2  # below this share of non-zero activations, those tokens are named once more, at the end

# Worked examples: (explanation, documents). A number in braces is the activation of the token before it; others are 0.
_EXAMPLES = [
  (
    'units of measurement, such as cups, grams and metres',
    [
      'Add two cups{10} of flour and 30 grams{9} of butter, then wait until the dough has risen.',
      'The bridge is 45 metres{10} long and carries 12 tons{8} a day',
    ],
  ),
  (
    'negations, such as not, nobody and without',
    ['We did not{10} expect rain, and nobody{7} had brought a coat.', 'It never{9} fails without{6} a reason.'],
  ),
]

SYSTEM = (
  'A neuron in a language model reads a document token by token and fires where it finds the one thing it looks for. '
  'You see documents as lists: a token, a tab, and how strongly the neuron fired on it, from 0 (it did not) to 10. Say '
  'in one short phrase what the neuron looks for: what the tokens or their surroundings have in common.'
)

_BOILERPLATE = re.compile(
  r"^(sure[,!:.]?\s*)?((it (seems|appears|looks like) )?(that )?((the )?main thing )?(this|the) neuron('s)?( \d+)?"
  r'( (mainly|mostly|primarily|strongly|also|seems to|appears to))*'
  r' (fires?|activates?|responds?|looks?|is looking|reacts?|detects?|finds?|does is find)( (on|for|to|when|at|in))?'
  r'\s*:?\s*)+',
  re.IGNORECASE,
)


def row_text(token: str) -> str:
  """Returns a token as it stands in a list: on one line, without tabs, and never read as a control token."""
  return token.replace('\n', '\\n').replace('\t', '\\t').replace('\r', '\\r').replace('<|', '< |')


def rows(tokens: Sequence[str], values: Sequence) -> str:
  """Returns the lines of a list, each a token, a tab, a value and a newline."""
  return ''.join(f'{row_text(token)}\t{value}\n' for token, value in zip(tokens, values, strict=True))


def block(lines: str) -> str:
  """Returns the lines of a list between its marks."""
  return f'<start>\n{lines}<end>\n'


def worked_examples() -> list[tuple[str, list[Excerpt]]]:
  """Returns neurons of our own invention: an explanation and its excerpts, with activations from 0 to 10."""
  found = []
  for explanation, documents in _EXAMPLES:
    parts = [re.findall(r'( ?\w+|[^\w{}])(?:\{(\d+)\})?', document) for document in documents]
    found.append((explanation, [([t for t, _ in part], [int(v or 0) for _, v in part]) for part in parts]))
  return found


def _shown(excerpts: Sequence[Excerpt]) -> str:
  """Returns the user's side of a turn: excerpts on one common scale, the non-zero tokens again if few, the question."""
  maximum = scores.maximum(activations for _, activations in excerpts)
  normalized = [(tokens, scores.normalize(activations, maximum)) for tokens, activations in excerpts]
  text = ''.join(block(rows(tokens, values)) for tokens, values in normalized)
  pairs = [(token, value) for tokens, values in normalized for token, value in zip(tokens, values, strict=True)]
  fired = [f'{row_text(token)} {value}' for token, value in pairs if value]
  if len(fired) < SPARSE * len(pairs):
    text += f'Fired on: {", ".join(fired)}\n'
  return text + QUESTION


def messages(excerpts: Sequence[Excerpt], n_context: int) -> list[dict[str, str]]:
  """Returns the chat that asks for an explanation, shrunk to fit the model.

  While it is too long, it loses last excerpts of the examples, then examples, then last excerpts of the component.

  Args:
    excerpts: of the component, best first; activations in any unit.
    n_context: how many tokens the model can read, its answer included.

  Raises:
    ValueError: one excerpt alone does not fit.
  """
  examples, excerpts = worked_examples(), list(excerpts)
  while True:
    chat = [{'role': 'system', 'content': SYSTEM}]
    for explanation, shown in examples:
      chat.append({'role': 'user', 'content': _shown(shown)})
      chat.append({'role': 'assistant', 'content': f'{explanation}.'})
    chat.append({'role': 'user', 'content': _shown(excerpts)})
    needed = sum(client.estimate_tokens(message['content']) for message in chat) + MAX_TOKENS
    if needed <= n_context:
      return chat
    if longer := [shown for _, shown in examples if len(shown) > 1]:
      longer[-1].pop()
    elif examples:
      examples.pop()
    elif len(excerpts) > 1:
      excerpts.pop()
    else:
      raise ValueError(
        f'a context of {n_context} tokens is too small: one excerpt of {len(excerpts[0][0])} tokens needs about '
        f'{needed}; serve the model with a larger context'
      )


def clean(text: str) -> str:
  """Returns an explanation without what models put around it: 'this neuron fires on', quotes, the final period."""
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  line = re.sub(r'^([-*•]|\d+[.)])\s+', '', lines[0]) if lines else ''
  return _BOILERPLATE.sub('', line.strip(' "\'`*')).strip(' "\'`*:.')


def explain(llm: client.LLM, excerpts: Sequence[Excerpt], temperature: float = 0, seed: int = 0) -> client.Answer:
  """Returns an answer whose content is the explanation; an empty one is 'parse_failed', one cut off 'truncated'.

  Args:
    llm: any.
    excerpts: of the component, best first; never those it is scored on.
    temperature: of sampling; 0 gives the likeliest answer.
    seed: of sampling.
  """
  answer = llm.complete(messages(excerpts, llm.n_context), MAX_TOKENS, temperature, seed)
  text = clean(answer.content)
  if answer.status == 'ok' and not text:
    return client.Answer('parse_failed', detail=f'the explanation is empty: {answer.content!r}')
  return client.Answer(answer.status, text, answer.detail)
