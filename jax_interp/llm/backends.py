"""Which language model to use -> it, ready: the hosted one, one served on this machine, or none.

The choice 'auto' takes what the environment offers (OPENAI_API_KEY, OPENAI_BASE_URL), else serves a small model
itself, else goes on without, and says so.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from jax_interp.llm import client, local_server

CHOICES = ('auto', 'openai', 'local', 'none')


@contextlib.contextmanager
def language_models(
  backend: str, memory: pathlib.Path, model: str = '', gguf: str = '', concurrency: int = 1
) -> Iterator[list[client.LLM]]:
  """Yields a language model for each request in flight, or an empty list.

  Args:
    backend: one of `CHOICES`.
    memory: folder of answers.
    model: name of the hosted model; see `client.connect`.
    gguf: file of the local model; see `local_server.model_file`.
    concurrency: requests in flight; of the local model, one server process with one thread for each.

  Raises:
    ValueError: no such back end; or 'openai', and the environment does not say where that is.
    OSError: see `client.connect`; for 'local', `local_server.model_file` and `local_server.serve`.
  """
  if backend not in CHOICES:
    raise ValueError(f'llm.backend is {backend!r}; choose one of {", ".join(CHOICES)}')
  url, key = os.environ.get('OPENAI_BASE_URL', ''), os.environ.get('OPENAI_API_KEY', '')
  if backend == 'openai' and not (url or key):
    raise ValueError('llm.backend is openai: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server that needs no key')
  with contextlib.ExitStack() as stack:
    if backend == 'none':
      yield []
    elif (url or key) and backend != 'local':
      yield [client.connect(url or client.HOSTED_URL, key or 'none', memory, model)] * concurrency
    else:
      try:
        path = local_server.model_file(gguf)
        urls = [stack.enter_context(local_server.serve(path)) for _ in range(concurrency)]
      except OSError as e:
        if backend == 'local':
          raise
        print(f'going on without a language model: {e}')
        urls = []
      yield [client.connect(url, 'none', memory) for url in urls]
