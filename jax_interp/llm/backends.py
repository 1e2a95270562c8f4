"""Which language model to use -> it, ready: the hosted one, one served on this machine, or none.

`choose` says which it is without asking anybody, so that a run knows whether its explanations are by that one already;
`language_models` reaches it.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

from jax_interp.llm import client, local_server

CHOICES = ('auto', 'openai', 'local', 'none')


@dataclasses.dataclass(frozen=True)
class Choice:
  """A hosted model at a URL, a model file to serve, or, with neither, none; `name` tells it from others, if any."""

  name: str | None = None
  url: str = ''
  model: str = ''
  gguf: pathlib.Path | None = None
  optional: bool = False  # when the file cannot be served, go on without


def choose(backend: str, model: str = '', gguf: str = '') -> Choice:
  """Returns the language model of a back end.

  Args:
    backend: one of `CHOICES`; 'auto' takes what the environment offers (OPENAI_API_KEY, OPENAI_BASE_URL), else a small
      model on this machine, else none, and says so.
    model: name of the hosted model; see `client.connect`.
    gguf: file of the local model; see `local_server.model_file`.

  Raises:
    ValueError: no such back end; or 'openai', and the environment does not say where that is.
    FileNotFoundError: 'local', and there is no model or no server.
  """
  if backend not in CHOICES:
    raise ValueError(f'llm.backend is {backend!r}; choose one of {", ".join(CHOICES)}')
  url, key = os.environ.get('OPENAI_BASE_URL', ''), os.environ.get('OPENAI_API_KEY', '')
  if backend == 'openai' and not (url or key):
    raise ValueError('llm.backend is openai: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server that needs no key')
  if backend == 'none':
    return Choice()
  if (url or key) and backend != 'local':
    url = url or client.HOSTED_URL
    model = model or client.default_model(url)
    return Choice(f'{model or "the first model listed"} at {url}', url, model)
  try:
    path = local_server.model_file(gguf)
  except FileNotFoundError as e:
    if backend == 'local':
      raise
    print(f'going on without a language model: {e}')
    return Choice()
  return Choice(path.name, gguf=path, optional=backend == 'auto')


@contextlib.contextmanager
def language_models(choice: Choice, memory: pathlib.Path, concurrency: int = 1) -> Iterator[list[client.LLM]]:
  """Yields a language model for each request in flight, or an empty list.

  Args:
    choice: what `choose` returned.
    memory: folder of answers.
    concurrency: requests in flight; of the local model, one server process with one thread for each.

  Raises:
    OSError: see `client.connect` and `local_server.serve`.
    ValueError: see `client.connect`.
  """
  with contextlib.ExitStack() as stack:
    if choice.url:
      key = os.environ.get('OPENAI_API_KEY') or 'none'
      yield [client.connect(choice.url, key, memory, choice.model)] * concurrency
    elif choice.gguf:
      try:
        urls = [stack.enter_context(local_server.serve(choice.gguf)) for _ in range(concurrency)]
      except OSError as e:
        if not choice.optional:
          raise
        print(f'going on without a language model: {e}')
        urls = []
      yield [client.connect(url, 'none', memory, origin=choice.gguf.name) for url in urls]
    else:
      yield []
