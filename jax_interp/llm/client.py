"""One door to language models: anything that speaks the OpenAI API -> answers with a status, remembered on disk.

Two operations: `LLM.complete` samples a chat answer; `LLM.slot_logprobs` gives the distributions at marked places of a
text, which a simulator reads. Servers differ only in how the second works, and some accept the request and send
nothing, or nonsense: `connect` sets a task with a known answer and goes by what comes back. What a user must act on
(no server, a refused key, no money, an unknown model) raises one sentence at once; what concerns one request is a
status, never a number.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import threading
from collections.abc import Callable, Collection, Sequence

import openai

from jax_interp import store

HOSTED_URL = 'https://api.openai.com/v1'
HOSTED_MODEL = 'gpt-4.1-mini'  # does not reason before it answers, so that 60 tokens hold an explanation
MAX_RETRIES = 4  # by the openai package, which waits as Retry-After says, else 0.5, 1, 2, 4 s
TIMEOUT_S = 120
DEFAULT_CONTEXT = 8192  # tokens, where the server does not say how many it can read
TOP_LOGPROBS = {'echo': 20, 'prompts': 100}  # the most that vLLM gives by default; llama.cpp has no limit
HOLE = 'unknown'  # stands in a text where `slot_logprobs` looks
BYTES_PER_TOKEN = (
  1.5  # of lists of a token and a number a line; prose has about 4, so that estimates err on the safe side
)
# What reading an answer may raise: the openai package does not check its form.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Answer:
  """What became of a request: `content` is text, or one {token: log-probability} a slot.

  Statuses: ok; refused (by the model or a filter); truncated (`content` is cut off); parse_failed (an answer, but not
  of the form asked for); failed (the server reported an error, or does not speak the OpenAI API).
  """

  status: str
  content: str | list[dict[str, float]] = ''
  detail: str = ''


@dataclasses.dataclass
class Usage:
  """Requests and tokens sent and received; `remembered` requests were answered from disk."""

  requests: int = 0
  remembered: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0


@dataclasses.dataclass
class LLM:
  """A model at a server, made by `connect`; safe to use from several threads.

  Attributes:
    client: of the openai package.
    model: its name.
    origin: what tells it from others of that name: the host of the server, or the file of a model that we serve.
    n_context: how many tokens it can read.
    slots: how slot log-probabilities are had: 'echo' (the server scores the text it is given: vLLM), 'prompts' (a
      prompt ends at each slot and one token is generated; llama.cpp, which caches prefixes, reads the text once all the
      same, in 0.6 of the time it takes when a grammar forces it to write the text), or None.
    top_level: 10, or 9 where the tokenizer splits '10', so that no single slot can hold it.
    memory: folder of answers.
    usage: a running count.
  """

  client: openai.OpenAI
  model: str
  origin: str
  n_context: int
  slots: str | None
  top_level: int
  memory: pathlib.Path
  usage: Usage = dataclasses.field(default_factory=Usage)

  def complete(self, messages: Sequence[dict], max_tokens: int, temperature: float = 0, seed: int = 0) -> Answer:
    """Returns the model's text for chat messages [{'role', 'content'}]."""
    params = {'messages': messages, 'max_completion_tokens': max_tokens, 'temperature': temperature, 'seed': seed}

    def ask():
      reply = self.client.chat.completions.create(model=self.model, **params)
      choice = reply.choices[0]
      self._count(reply.usage)
      text = choice.message.content or ''
      if choice.message.refusal or choice.finish_reason == 'content_filter':
        return Answer('refused', text, choice.message.refusal or 'content filter')
      if choice.finish_reason == 'length':
        return Answer('truncated', text, f'the answer is longer than {max_tokens} tokens')
      return Answer('ok', text)

    return self._remember({'chat': params}, ask)

  def slot_logprobs(self, text: str, slots: Sequence[int], allowed: Collection[str]) -> Answer:
    """Returns, for each slot, the log-probability of every allowed token among the `TOP_LOGPROBS` likeliest there.

    Args:
      text: holds tab, `HOLE`, newline at every slot. A distribution is given all text before its slot, holes included.
      slots: offsets in `text` of the last holes, in order.
      allowed: the tokens wanted, such as '0' to '10'.
    """

    def ask():
      tops, usage = _top_logprobs(self.client, self.model, self.slots, text, slots)
      self._count(usage)
      return Answer('ok', [{token: top[token] for token in allowed if token in top} for top in tops])

    return self._remember({self.slots: {'text': text, 'slots': slots, 'allowed': allowed}}, ask)

  def _count(self, usage):
    """Adds the tokens of an answer, as far as the server says how many they are."""
    with _lock:
      self.usage.requests += 1
      self.usage.prompt_tokens += getattr(usage, 'prompt_tokens', None) or 0
      self.usage.completion_tokens += getattr(usage, 'completion_tokens', None) or 0

  def _path(self, request: dict) -> pathlib.Path:
    digest = hashlib.sha256(json.dumps([self.origin, self.model, request], sort_keys=True).encode()).hexdigest()
    return self.memory / digest[:2] / f'{digest}.json'

  def _recall(self, path: pathlib.Path) -> Answer | None:
    if not path.exists():
      return None
    with _lock:
      self.usage.remembered += 1
    return Answer(**json.loads(path.read_text('utf-8')))

  def _remember(self, request: dict, ask: Callable[[], Answer]) -> Answer:
    """Returns the answer on disk, or asks and keeps it there; a failure is not kept, so that a later run asks again."""
    path = self._path(request)
    if answer := self._recall(path):
      return answer
    try:
      answer = ask()
    except openai.APIError as e:
      if error := _to_act_on(e, self.client.base_url, self.model):
        raise error from e
      return Answer('failed', detail=f'the server answers: {e.message}')
    except MALFORMED as e:
      return Answer('failed', detail=f'the server does not answer in the form of the OpenAI API ({e!r})')
    with _lock:  # two threads may have asked the same
      store.write_json(path, dataclasses.asdict(answer))
    return answer


def estimate_tokens(text: str) -> int:
  """Returns about how many tokens a prompt has, rather too many than too few."""
  return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def default_model(base_url: str) -> str:
  """Returns the model to use where none is named: `HOSTED_MODEL` at OpenAI, elsewhere '', the first one listed."""
  return HOSTED_MODEL if base_url.rstrip('/') == HOSTED_URL else ''


def connect(base_url: str, api_key: str, memory: pathlib.Path, model: str = '', origin: str = '') -> LLM:
  """Reaches a server and finds out what it can do.

  Args:
    base_url: such as https://api.openai.com/v1.
    api_key: any text where the server asks for none.
    memory: folder of answers; what is there is never asked, or paid, again.
    model: by default `default_model`.
    origin: see `LLM`; by default the host in `base_url`.

  Raises:
    ConnectionError: nothing answers at the URL.
    PermissionError: the key is refused, or its quota is used up.
    ValueError: no model is named nor listed.
  """
  client = openai.OpenAI(
    base_url=base_url,
    api_key=api_key,
    max_retries=MAX_RETRIES,
    timeout=TIMEOUT_S,
    http_client=openai.DefaultHttpxClient(event_hooks={'response': [_do_not_retry_without_quota]}),
  )
  listed = _if_offered(client, lambda: {entry.id: entry.model_dump() for entry in client.models.list().data}) or {}
  if not model:
    model = default_model(base_url) or next(iter(listed), '')
  if not model:
    raise ValueError(f'{base_url} lists no model; name one by --config.llm.model')
  entry = listed.get(model, {})
  origin = origin or client.base_url.host
  n_context = entry.get('max_model_len') or (entry.get('meta') or {}).get('n_ctx') or DEFAULT_CONTEXT
  for how in TOP_LOGPROBS:
    if top_level := _if_offered(client, lambda how=how: _top_level(client, model, how)):
      return LLM(client, model, origin, n_context, how, top_level, memory)
  return LLM(client, model, origin, n_context, None, 10, memory)


def _top_level(client: openai.OpenAI, model: str, how: str) -> int | None:
  """Returns 10 or 9, see `LLM.top_level`, or None when the distributions of a copying task do not show the copy."""
  likeliest = {}
  for value in ('7', '10'):
    text = ''.join(f'{name}\t{value}\n' for name in 'abc') + 'd\t'
    (top,), _ = _top_logprobs(client, model, how, f'{text}{HOLE}\n', [len(text)])
    likeliest[value] = max(top, key=top.get)
  return {('7', '10'): 10, ('7', '1'): 9}.get(tuple(likeliest.values()))


def _top_logprobs(
  client: openai.OpenAI, model: str, how: str, text: str, slots: Sequence[int]
) -> tuple[list[dict[str, float]], openai.types.CompletionUsage | None]:
  """Returns {token: log-probability} at each slot, and the usage; `MALFORMED` if the server sends less.

  Tokens of probability 0 are left out: JSON has no infinity to remember them by.
  """
  echo = how == 'echo'
  reply = client.completions.create(
    model=model,
    prompt=text if echo else [text[:slot] for slot in slots],
    max_tokens=1,  # vLLM refuses 0
    temperature=0,
    logprobs=TOP_LOGPROBS[how],
    echo=echo,
  )
  logprobs = [choice.logprobs.model_dump() for choice in sorted(reply.choices, key=lambda choice: choice.index)]
  if echo:
    tokens = logprobs[0]['tokens']
    holes = [i for i, token in enumerate(tokens) if i and token == HOLE and tokens[i - 1].endswith('\t')]
    if len(holes) != text.count(f'\t{HOLE}\n'):
      raise ValueError(f'{text.count(HOLE)} slots were sent and {len(holes)} came back as tokens of their own')
    tops = [logprobs[0]['top_logprobs'][i] for i in holes[-len(slots) :]]
  else:
    tops = [_first_top(entry) for entry in logprobs]
  tops = [{token: p for token, p in top.items() if p is not None and math.isfinite(p)} for top in tops]
  if len(tops) != len(slots) or not all(tops):
    raise ValueError(f'{len(slots)} distributions were asked for and {sum(map(bool, tops))} came')
  return tops, reply.usage


def _first_top(logprobs: dict) -> dict[str, float]:
  """Returns {token: log-probability} of the first generated token; llama.cpp sends the shape of chat completions."""
  if logprobs.get('content'):
    return {entry['token']: entry['logprob'] for entry in logprobs['content'][0]['top_logprobs']}
  return logprobs['top_logprobs'][0]


def _if_offered(client: openai.OpenAI, ask: Callable):
  """Returns what `ask` returns, or None where the server does not offer it."""
  try:
    return ask()
  except (openai.NotFoundError, openai.PermissionDeniedError, *MALFORMED):
    return None
  except openai.APIError as e:
    if error := _to_act_on(e, client.base_url, ''):
      raise error from e
    return None


def _to_act_on(e: openai.APIError, url, model: str) -> OSError | ValueError | None:
  """Returns one sentence for what stops every request and a user can mend, or None."""
  match e:
    case openai.AuthenticationError() | openai.PermissionDeniedError():
      return PermissionError(f'{url} refuses the key ({e.message}); set OPENAI_API_KEY to one that it accepts')
    case openai.RateLimitError(code='insufficient_quota'):
      return PermissionError(f'the quota of the key at {url} is used up; add credit, or set OPENAI_API_KEY to another')
    case openai.RateLimitError():
      return ConnectionError(
        f'{url} still limits the rate after {MAX_RETRIES} retries; run the same command again later'
      )
    case openai.NotFoundError():
      return ValueError(f'{url} has no model {model!r} ({e.message}); name another by --config.llm.model')
    case openai.APIConnectionError():
      return ConnectionError(
        f'no language model answers at {url} ({e.message}); start it, set OPENAI_BASE_URL to where it is, or go '
        'without by --config.llm.backend=none'
      )
  return None


def _do_not_retry_without_quota(response):
  """Tells the openai package, which retries every 429, that this one will not pass."""
  if response.status_code == 429 and b'insufficient_quota' in response.read():
    response.headers['x-should-retry'] = 'false'
