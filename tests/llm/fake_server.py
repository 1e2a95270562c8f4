"""A server that speaks the OpenAI API and answers by simple rules, always the same: for tests without a network."""

import contextlib
import dataclasses
import http.server
import json
import math
import re
import threading
import zlib
from collections.abc import Callable


@dataclasses.dataclass
class Server:
  """What it does and what it was asked.

  completions: 'echo' (vLLM), 'llama' (ignores echo, logprobs in the chat shape), 'junk' (logprobs that mean nothing),
  or None. error: (HTTP status, JSON body) in the place of every answer, or of those for which `failing` holds. reply:
  chat messages -> text, in the place of the rule.
  """

  url: str = ''
  completions: str | None = 'llama'
  splits_ten: bool = False
  error: tuple[int, dict] | None = None
  failing: Callable[[str], bool] = lambda path: True
  reply: Callable[[list], str] | None = None
  finish_reason: str = 'stop'
  usage: dict | None = dataclasses.field(default_factory=lambda: {'prompt_tokens': 100, 'completion_tokens': 5})
  requests: list = dataclasses.field(default_factory=list)

  def paths(self) -> list[str]:
    return [path for path, _ in self.requests]


def _level(text: str) -> int:
  """Returns a level for the end of a text.

  Copied where a list shows only one value, 9 where the explanation names the token, else the length of the token.
  """
  values = re.findall(r'\t(\d+)\n', text)
  if 'Looks for' not in text and len(set(values)) == 1:
    return int(values[0])
  token, explanation = text.rsplit('\n', 1)[-1].split('\t')[0], text.rsplit('Looks for: ', 1)[-1].split('\n')[0]
  return 9 if token.strip() in explanation else min(9, len(token))


def _top(server: Server, text: str) -> dict[str, float]:
  value = str(_level(text))
  value = value[0] if server.splits_ten else value
  if server.completions == 'junk':
    value = '3'
  return {value: math.log(0.6), 'unknown': math.log(0.3), '0': math.log(0.1)} if value != '0' else {'0': math.log(0.7)}


def _complete(server: Server, body: dict) -> list[dict]:
  prompts = [body['prompt']] if isinstance(body['prompt'], str) else body['prompt']
  if body.get('echo') and server.completions == 'echo':
    tokens = re.findall(r'\t|\n|[^\t\n]+', prompts[0])
    starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    tops = [_top(server, prompts[0][:start]) if start else None for start in starts]
    return [{'index': 0, 'text': prompts[0], 'logprobs': {'tokens': tokens, 'top_logprobs': tops}}]
  choices = []
  for i, prompt in enumerate(prompts):
    top = _top(server, prompt)
    entries = [{'token': token, 'logprob': p} for token, p in top.items()]
    logprobs = {'content': [{**entries[0], 'top_logprobs': entries}]} if server.completions != 'echo' else None
    choices.append({'index': i, 'text': entries[0]['token'], 'logprobs': logprobs})
  return choices[::-1]  # the order is not promised


def _chat(server: Server, messages: list) -> str:
  last = messages[-1]['content']
  if server.reply:
    return server.reply(messages)
  if 'JSON' in messages[0]['content']:
    tokens = json.loads(last)['tokens']
    return json.dumps({'activations': [[token, min(9, len(token))] for token in tokens]})
  strongest = re.findall(r'(.*)\t10\n', last)
  return f'This neuron fires on {" and ".join(strongest)}, {zlib.crc32(last.encode())}.'


def _handler(server: Server):
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self._send_unless_failing({'data': [{'id': 'fake-model', 'object': 'model', 'max_model_len': 8192}]})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      server.requests.append((self.path, body))
      if self.path.endswith('/chat/completions'):
        message = {'role': 'assistant', 'content': _chat(server, body['messages'])}
        self._answer([{'index': 0, 'message': message, 'finish_reason': server.finish_reason}])
      elif server.completions:
        self._answer(_complete(server, body))
      else:
        self._send(404, {'error': {'message': 'this is a chat model', 'code': None}})

    def _answer(self, choices):
      self._send_unless_failing({'choices': choices} | ({'usage': server.usage} if server.usage else {}))

    def _send_unless_failing(self, body):
      if server.error and server.failing(self.path):
        self._send(*server.error)
      else:
        self._send(200, body)

    def _send(self, status, body):
      content = body if isinstance(body, bytes) else json.dumps(body).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'text/html' if isinstance(body, bytes) else 'application/json')
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *args):
      pass

  return Handler


@contextlib.contextmanager
def running(**settings):
  """Yields a `Server` that answers on a free port of this machine."""
  server = Server(**settings)
  http_server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _handler(server))
  server.url = f'http://127.0.0.1:{http_server.server_port}/v1'
  thread = threading.Thread(target=http_server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    http_server.shutdown()
    http_server.server_close()
    thread.join()
