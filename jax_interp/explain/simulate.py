"""An explanation and tokens -> the activations, 0 to 10, that a language model expects of the component.

Where the server gives log-probabilities, all tokens are simulated at once (Bills et al. 2023): the list is shown with
every value unknown, and the distribution over the levels is read at each of those places. Elsewhere the model fills in
a JSON list. What cannot be read is a status, and never counts as a prediction of 0.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jax_interp.explain import results, scores, token_activation
from jax_interp.llm import client

ALL_AT_ONCE, AS_JSON = 'all_at_once', 'json'
# Values hidden at the start of each worked excerpt, so that a number may follow an unknown anywhere.
_N_UNKNOWN = (8, 3, 0, 4)

SYSTEM = (
  'A neuron in a language model reads a document token by token and fires where it finds the one thing it looks for. '
  'Given what it looks for, say how strongly it fires on each token, from 0 to {top}. Most tokens are 0.'
)


@dataclasses.dataclass(frozen=True)
class Simulation:
  """`expected_t` float [token], 0 to 10, where `status` is 'ok'; else None, and `detail` says why (`client.Answer`)."""

  status: str
  expected_t: np.ndarray | None = None
  detail: str = ''


def simulator(llm: client.LLM) -> str:
  """Returns which simulator this model allows: 'all_at_once' or 'json'."""
  return ALL_AT_ONCE if llm.slots else AS_JSON


def simulate(llm: client.LLM, explanation: str, tokens: Sequence[str]) -> Simulation:
  """Returns the activations the model expects on each token of an excerpt of a component with this explanation."""
  return all_at_once(llm, explanation, tokens) if llm.slots else as_json(llm, explanation, tokens)


def simulate_excerpts(llm: client.LLM, explanation: str, target: results.Target) -> Iterator[dict]:
  """Yields {'status', 'detail', 'simulated'} of each excerpt a component is scored on, as it is asked for.

  `simulated` holds activations in the component's own unit: level 10 is the most it does on the excerpts that it is
  explained from; None where the status is not 'ok'.
  """
  unit = target.maximum / scores.LEVELS
  for excerpt in target.scored:
    simulation = simulate(llm, explanation, excerpt.tokens)
    acts = (simulation.expected_t * unit).tolist() if simulation.status == 'ok' else None
    yield {'status': simulation.status, 'detail': simulation.detail, 'simulated': acts}


def expected_value(logprobs: Mapping[str, float], top_level: int) -> float | None:
  """Returns sum_v v p(v) over the levels '0' to `top_level`, with p renormalised over those given; None where none is.

  The scale of the result is 0 to 10 always.
  """
  kept = {int(token): math.exp(p) for token, p in logprobs.items() if token in levels(top_level)}
  if not kept:
    return None
  return scores.LEVELS / top_level * sum(v * p for v, p in kept.items()) / sum(kept.values())


def levels(top_level: int) -> list[str]:
  """Returns the tokens that stand for levels: '0' to '10', or to '9' for tokenizers that split '10'."""
  return [str(level) for level in range(top_level + 1)]


def all_at_once_prompt(explanation: str, tokens: Sequence[str], top_level: int) -> tuple[str, list[int]]:
  """Returns the text to score, and the offsets in it of the places where the tokens' values stand unknown."""
  text, hidden = f'{SYSTEM.format(top=top_level)} An unknown value was not recorded.\n', iter(_N_UNKNOWN)
  for known, excerpts in token_activation.worked_examples():
    text += f'\nLooks for: {known}\n'
    for shown, activations in excerpts:
      values = [v * top_level // scores.LEVELS for v in activations]
      n = next(hidden)
      text += token_activation.block(token_activation.rows(shown, [client.HOLE] * n + values[n:]))
  text += f'\nLooks for: {explanation}\n<start>\n'
  slots = []
  for token in tokens:
    slots.append(len(text) + len(token_activation.row_text(token)) + 1)
    text += token_activation.rows([token], [client.HOLE])
  return text, slots


def all_at_once(llm: client.LLM, explanation: str, tokens: Sequence[str]) -> Simulation:
  """Simulates all tokens from one text; 'parse_failed' if at some token no level is among the likeliest values."""
  text, slots = all_at_once_prompt(explanation, tokens, llm.top_level)
  answer = llm.slot_logprobs(text, slots, levels(llm.top_level))
  if answer.status != 'ok':
    return Simulation(answer.status, detail=answer.detail)
  expected = [expected_value(slot, llm.top_level) for slot in answer.content]
  if missing := [i for i, value in enumerate(expected) if value is None]:
    return Simulation(
      'parse_failed', detail=f'no level among the likeliest values of {len(missing)} of {len(tokens)} tokens'
    )
  return Simulation('ok', np.array(expected))


def _as_json(tokens: Sequence[str], values: Sequence[int]) -> str:
  pairs = [[token_activation.row_text(t), int(v)] for t, v in zip(tokens, values, strict=True)]
  return json.dumps({'activations': pairs}, ensure_ascii=False)


def _question(explanation: str, tokens: Sequence[str]) -> str:
  return json.dumps({'looks_for': explanation, 'tokens': [*map(token_activation.row_text, tokens)]}, ensure_ascii=False)


def as_json(llm: client.LLM, explanation: str, tokens: Sequence[str]) -> Simulation:
  """Simulates by having the model repeat the tokens with integers, as JSON; 'parse_failed' unless it does just that."""
  form = 'Answer with JSON only: {"activations": [[token, integer], ...]}, all tokens in order.'
  system = f'{SYSTEM.format(top=scores.LEVELS)} {form}'
  chat = [{'role': 'system', 'content': system}]
  for known, excerpts in token_activation.worked_examples():
    chat.append({'role': 'user', 'content': _question(known, excerpts[0][0])})
    chat.append({'role': 'assistant', 'content': _as_json(*excerpts[0])})
  chat.append({'role': 'user', 'content': _question(explanation, tokens)})
  # A token with its brackets, quotes and number takes about 8 tokens; twice that leaves room for white space.
  answer = llm.complete(chat, 50 + 16 * len(tokens))
  if answer.status != 'ok':
    return Simulation(answer.status, detail=answer.detail)
  try:
    return Simulation('ok', parse_json(answer.content, tokens))
  except ValueError as e:
    return Simulation('parse_failed', detail=str(e))


def parse_json(text: str, tokens: Sequence[str]) -> np.ndarray:
  """Reads the activations of the tokens out of a JSON answer, which may stand within other text, such as a code fence.

  Raises:
    ValueError: it is not JSON of the form asked for, the tokens are not ours, or a value is no integer from 0 to 10.
  """
  try:
    pairs = json.loads(text[text.index('{') : text.rindex('}') + 1])['activations']
    found = [(str(token), value) for token, value in pairs]
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'the answer is not the JSON asked for ({e!r})') from e
  if len(found) != len(tokens):
    raise ValueError(f'{len(tokens)} tokens were asked for and {len(found)} came back')
  for i, ((token, value), ours) in enumerate(zip(found, tokens, strict=True)):
    if token.strip() != token_activation.row_text(ours).strip():
      raise ValueError(f'token {i} is {ours!r} and came back as {token!r}')
    if type(value) is not int or not 0 <= value <= scores.LEVELS:
      raise ValueError(f'the value of token {i} is {value!r}, not an integer from 0 to {scores.LEVELS}')
  return np.array([value for _, value in found], float)
