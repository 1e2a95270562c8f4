"""Serves the debugger, records and explanations over HTTP: see `jax_interp.server.app`, and /docs where it runs.

  python -m train.serve --model=embedded --sae=runs/tiny/sae/final --records=runs/tiny --port=8000

It prints one line, with the URL, when it is ready. SIGTERM and Ctrl-C end it when all that was asked is answered, or
--grace seconds later. It takes no --config.
"""

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import json
import os
import pathlib
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

import jax
import numpy as np
import tokenizers
import uvicorn
from absl import app as absl_app
from absl import flags, logging

from jax_interp import records, text
from jax_interp.debugger import audit, circuits, compare, edges, engine, generate, lens, subject
from jax_interp.debugger import schema as debugger
from jax_interp.llm import backends
from jax_interp.server import app, catalog, jobs, schema, scoring
from models import pretrained, sae, sharding, sites
from train import command

_MODEL = flags.DEFINE_string('model', 'embedded', "'embedded', 'smollm2', a folder, a .gguf file, a hub id[@REVISION].")
_DTYPE = flags.DEFINE_enum('dtype', 'float32', pretrained.DTYPES, 'Of parameters and activations.')
_SAE = flags.DEFINE_list('sae', [], 'Folders of SAEs, WORKDIR/sae/final or SITE=FOLDER, with commas in between.')
_RECORDS = flags.DEFINE_list('records', [], 'Workdirs of which records and explanations are shown.')
_OTHER_MODEL = flags.DEFINE_string('other_model', None, 'A second model, of the same sizes and tokenizer.')
_SAMPLE = flags.DEFINE_string('sample', 'embedded', 'Text that means and resamples are of, as config.text.source.')
_WARM = flags.DEFINE_list('warm', ['16', '32'], 'Lengths of prompts that are answered without compiling first.')

_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Where to listen; beyond this machine only with a token.')
_PORT = flags.DEFINE_integer('port', 8000, 'Where to listen; 0: a free one.', lower_bound=0, upper_bound=65535)
_TOKEN = flags.DEFINE_string('token', None, 'Clients say `Authorization: Bearer TOKEN`; best in a file.')
_TOKEN_FILE = flags.DEFINE_string('token_file', None, 'A file that holds the token; or set JAX_INTERP_TOKEN.')
_ALLOW_HOST = flags.DEFINE_list('allow_host', [], 'Names by which clients reach this server, beside --host.')
_ALLOW_ORIGIN = flags.DEFINE_list('allow_origin', [], 'Of foreign pages that may ask, such as https://example.org.')

_QUEUE = flags.DEFINE_integer('queue', 32, 'Requests that wait behind the one that runs.', lower_bound=0)
_SECONDS = flags.DEFINE_float('seconds', 300, 'How long a request may run.', lower_bound=0)
_GRACE = flags.DEFINE_float('grace', 30, 'Seconds that requests have to end, once asked to stop.', lower_bound=0)
_BODY_BYTES = flags.DEFINE_integer('body_bytes', 2_000_000, 'Of a request, at most.', lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer('prompt_tokens', 1024, 'Of a prompt, at most.', lower_bound=1)

_LLM_BACKEND = flags.DEFINE_enum('llm_backend', 'none', backends.CHOICES, 'Scores what users type; see config.llm.')
_LLM_MODEL = flags.DEFINE_string('llm_model', '', 'Of the hosted server.')
_LLM_GGUF = flags.DEFINE_string('llm_gguf', '', 'File of the local model.')
_LLM_BUDGET = flags.DEFINE_float('llm_budget_usd', 1.0, 'In all, as long as this runs.', lower_bound=0)
_LLM_PROMPT = flags.DEFINE_float('llm_usd_per_million_prompt', None, 'Where the price is not known.')
_LLM_COMPLETION = flags.DEFINE_float('llm_usd_per_million_completion', None, 'Where the price is not known.')

SAMPLE_WINDOWS, SAMPLE_TOKENS = 64, 512  # of the sample of text; the latter at most
SECONDS_TO_END = 2  # for what runs to notice that nobody waits for it
TOKEN_VARIABLE = 'JAX_INTERP_TOKEN'


def endpoints(main: subject.Subject, other: subject.Subject | None) -> list[app.Endpoint]:
  """Returns what can be computed on the models."""
  table = (
    ('debug', debugger.Request, debugger.Response, engine.debug),
    ('acts', debugger.ActsRequest, debugger.ActsResponse, engine.acts),
    ('compare', debugger.CompareRequest, debugger.CompareResponse, functools.partial(compare.compare, other=other)),
    ('template', debugger.TemplateRequest, debugger.TemplateResponse, compare.template),
    ('audit', debugger.AuditRequest, debugger.AuditResponse, audit.audit),
    ('edges', debugger.EdgesRequest, debugger.EdgesResponse, edges.edges),
    ('qk', debugger.QKRequest, debugger.QKResponse, edges.qk),
    ('circuit', debugger.CircuitRequest, debugger.CircuitResponse, circuits.find),
    ('generate', debugger.GenerateRequest, debugger.GenerateResponse, generate.generate),
    ('lens', debugger.LensRequest, debugger.LensResponse, lens.lens),
  )
  return [
    app.Endpoint(path, request, response, lambda request, progress, f=function: f(main, request, progress))
    for path, request, response, function in table
  ]


# Who may ask, and where


def _token() -> str | None:
  given = [_TOKEN.value, _TOKEN_FILE.value and pathlib.Path(_TOKEN_FILE.value).read_text('utf-8').strip()]
  given.append(os.environ.get(TOKEN_VARIABLE))
  token = next((x for x in given if x is not None), None)
  if token == '' or (token and not token.isascii()):
    raise ValueError('the token is empty or not ASCII; give another')
  return token


def _is_local(host: str) -> bool:
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == 'localhost'


def _check_names():
  for origin in _ALLOW_ORIGIN.value:
    scheme, _, rest = origin.partition('://')
    if scheme not in ('http', 'https') or not rest or set(rest) & set('/*'):
      raise ValueError(f'--allow_origin={origin} is no origin; give one such as https://example.org')
  for host in _ALLOW_HOST.value:
    if not host or set(host) & set('*/'):
      raise ValueError(f'--allow_host={host} is no name of a host; give one without port and wildcard')


def _in_url(host: str) -> str:
  return f'[{host}]' if ':' in host else host


def _bind() -> socket.socket:
  """Returns a socket that has the port, and does not listen yet."""
  family = socket.AF_INET6 if ':' in _HOST.value else socket.AF_INET
  bound = socket.socket(family)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((_HOST.value, _PORT.value))
  except OSError as e:
    raise ValueError(
      f'port {_PORT.value} of {_HOST.value} cannot be had ({e.strerror}); choose another by --port or --host'
    ) from e
  return bound


# What is served


def _made_with(folder: pathlib.Path, way_out: str) -> dict:
  """Returns the settings that a stage was run with. ValueError if it does not say, or ran on another model."""
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder} has no config.json; {way_out}')
  settings = json.loads((folder / 'config.json').read_text('utf-8'))
  if 'fingerprint' not in settings:
    raise ValueError(f'{folder}/config.json is not of a stage; {way_out}')
  if settings['fingerprint'] != pretrained.fingerprint(_MODEL.value):
    raise ValueError(f'{folder} was made with another model than {_MODEL.value}; give that one by --model')
  return settings


def _load_saes() -> dict[str, sae.SparseAutoencoder]:
  saes = {}
  for item in _SAE.value:
    site, is_named, folder = item.partition('=')
    if not is_named:
      folder = item
      way_out = 'give the folder that train.sae left, WORKDIR/sae/final, or SITE=FOLDER'
      site = _made_with(pathlib.Path(item).absolute().parent, way_out)['sae']['site']
    if site in saes:
      raise ValueError(f'--sae gives two SAEs of {site}; give one of them')
    if not pathlib.Path(folder).is_dir():
      raise ValueError(f'--sae={item}: there is no folder {folder}; give one with an SAE')
    saes[site] = sae.load_sae(folder)
  return saes


def _record_sets() -> list[catalog.RecordSet]:
  found = []
  for workdir in map(pathlib.Path, _RECORDS.value):
    settings = _made_with(workdir / 'records', 'give a --workdir in which train.records has finished')
    found.append(catalog.RecordSet(workdir, 'latent', settings['sae']['site']))
    found.append(catalog.RecordSet(workdir, 'neuron', f'h.{settings["records"]["neurons_layer"]}.mlp.post_act'))
  return found


def _load_subject() -> subject.Subject:
  tokenizer = pretrained.load_tokenizer(_MODEL.value)
  model = pretrained.load_model(_MODEL.value, _DTYPE.value)
  sample_wt = None
  if _SAMPLE.value:
    windows = text.Windows(_SAMPLE.value, tokenizer, window=min(model.config.n_ctx, SAMPLE_TOKENS))
    sample_wt = np.stack(list(itertools.islice(windows, SAMPLE_WINDOWS)))
  return subject.Subject(model, tokenizer, _load_saes(), sample_wt, _MODEL.value)


def _load_other(main: subject.Subject) -> subject.Subject | None:
  if not _OTHER_MODEL.value:
    return None
  if pretrained.load_tokenizer(_OTHER_MODEL.value).get_vocab() != main.tokenizer.get_vocab():
    raise ValueError(f'{_OTHER_MODEL.value} has another tokenizer than {_MODEL.value}; give a model with the same')
  model = pretrained.load_model(_OTHER_MODEL.value, _DTYPE.value)
  return subject.Subject(model, main.tokenizer, main.saes, main.sample_wt, _OTHER_MODEL.value)


def _tokenizer(main: subject.Subject) -> app.Tokenizer:
  """Returns a copy that nobody else changes: a `tokenizers.Tokenizer` may be read by many threads."""
  own = tokenizers.Tokenizer.from_str(main.tokenizer.backend_tokenizer.to_str())
  encode = lambda prompt: own.encode(prompt, add_special_tokens=False).ids
  return app.Tokenizer(encode, records.token_strings(main.tokenizer))


def _site_names(model) -> list[str]:
  tap = sites.Tap()
  jax.eval_shape(lambda model: model(np.zeros((1, 2), np.int32), tap), model)
  return tap.seen


def _info(
  main: subject.Subject, found: catalog.Catalog, scorer: scoring.Scorer | None, limits: schema.Limits
) -> schema.ModelInfo:
  config = main.model.config
  return schema.ModelInfo(
    name=main.name,
    family=type(main.model).__module__.rpartition('.')[2],
    **{name: getattr(config, name) for name in ('n_layer', 'n_head', 'd_model', 'n_neurons', 'n_ctx', 'n_vocab')},
    sites=_site_names(main.model),
    saes=[
      schema.SAEInfo(site=site, n_latents=x.n_latents, k=x.k, normalization=x.normalization)
      for site, x in main.saes.items()
    ],
    other_model=_OTHER_MODEL.value or None,
    has_sample=main.sample_wt is not None,
    records=found.info(),
    language_model=scorer.model if scorer else None,
    limits=limits,
  )


def _scorer(stack: contextlib.ExitStack, choice: backends.Choice, found: catalog.Catalog) -> scoring.Scorer | None:
  if not choice.name:
    return None
  memory = pathlib.Path(_RECORDS.value[0]) / 'llm_answers'
  llms = stack.enter_context(backends.language_models(choice, memory))
  prices = _LLM_PROMPT.value, _LLM_COMPLETION.value
  return scoring.Scorer(llms[0], found, _LLM_BUDGET.value, prices) if llms else None


# Serving


class _Server(uvicorn.Server):
  """Says when it is ready; asked to stop, it lets requests end for a while, and then answers them by 503."""

  def __init__(self, config: uvicorn.Config, url: str, workers: Sequence[jobs.Worker], grace: float):
    super().__init__(config)
    self._url, self._workers, self._grace = url, workers, grace

  async def startup(self, sockets=None):
    await super().startup(sockets)
    print(f'ready at {self._url}', flush=True)

  async def shutdown(self, sockets=None):
    stop = lambda: [worker.stop() for worker in self._workers]
    asyncio.get_running_loop().call_later(self._grace, stop)
    await super().shutdown(sockets)


def _serve(stack: contextlib.ExitStack, workers: list[jobs.Worker]):
  """Serves until it is asked to stop. Bad input is told before anything is loaded, where it can be.

  Args:
    stack: of what is to be closed then.
    workers: to which it adds those that it starts.
  """
  token = _token()
  if token is None and not _is_local(_HOST.value):
    raise ValueError(
      f'--host={_HOST.value} lets other machines ask: give a token by --token_file or {TOKEN_VARIABLE}, or leave '
      '--host out'
    )
  _check_names()
  if wrong := [n for n in _WARM.value if not n.isdecimal() or int(n) < 1]:
    raise ValueError(f'--warm={wrong[0]} is no number of tokens; give some such as 16,32')
  bound = stack.enter_context(_bind())
  choice = backends.choose(_LLM_BACKEND.value, _LLM_MODEL.value, _LLM_GGUF.value)
  if choice.name and not _RECORDS.value:
    raise ValueError('--llm_backend scores explanations of recorded components; give their workdir by --records')
  mesh = sharding.make_mesh()
  jax.set_mesh(mesh)
  record_sets = _record_sets()
  main = _load_subject()
  other, tokenizer = _load_other(main), _tokenizer(main)
  found = catalog.Catalog(record_sets, tokenizer.strings)
  scorer = _scorer(stack, choice, found)
  limits = schema.Limits(
    body_bytes=_BODY_BYTES.value,
    prompt_tokens=min(_PROMPT_TOKENS.value, main.model.config.n_ctx),
    waiting=_QUEUE.value,
    seconds=_SECONDS.value,
  )
  worker = jobs.Worker(limits.waiting, limits.seconds, lambda: jax.set_mesh(mesh))
  workers += worker, jobs.Worker(limits.waiting, limits.seconds)
  worker.submit(lambda progress: engine.warm(main, [int(n) for n in _WARM.value])).future.result()
  application = app.create(
    endpoints(main, other),
    worker,
    _info(main, found, scorer, limits),
    tokenizer,
    found,
    scorer,
    workers[1],
    token=token,
    hosts=[_in_url(host) for host in (_HOST.value, *_ALLOW_HOST.value)],
    allow_origins=_ALLOW_ORIGIN.value,
  )
  config = uvicorn.Config(
    application,
    lifespan='off',
    log_config=None,
    log_level='warning',
    access_log=False,
    timeout_graceful_shutdown=int(_GRACE.value) + 5,
  )
  url = f'http://{_in_url(_HOST.value)}:{bound.getsockname()[1]}'
  _Server(config, url, workers, _GRACE.value).run([bound])


def _stop(number, frame):
  signal.signal(number, signal.SIG_DFL)  # asked twice, it ends at once
  raise command.Stopped('as it was asked to')


def _refuse_flags_of_stages():
  of_stages = {flag.name for flag in flags.FLAGS.flags_by_module_dict()['train.command']} - {'traceback'}
  given = [name for name in sorted(of_stages) if flags.FLAGS[name].present]
  if given:
    raise ValueError(f'--{given[0]} is for the stages; serving takes --model, --sae and --records, see --help')


def _parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    sys.exit(f'error: {command.sentence(e)}')


def main(argv: Sequence[str]):
  """Serves; exits 0 when asked to stop, 1 on bad input, which it names."""
  logging.set_verbosity(logging.WARNING)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _stop)
  code, workers = 0, []
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected arguments {argv[1:]}; all that it takes are flags, see --help')
    _refuse_flags_of_stages()
    with contextlib.ExitStack() as stack:
      _serve(stack, workers)
  except command.Stopped as e:
    print(f'stopped: {e}', file=sys.stderr)
  except (ValueError, KeyError, OSError, ImportError) as e:
    if flags.FLAGS.traceback:
      traceback.print_exc()
    print(f'error: {command.sentence(e)}', file=sys.stderr)
    code = 1
  if not all(worker.stop(wait=SECONDS_TO_END) for worker in workers):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python would wait for a computation that cannot be interrupted
  sys.exit(code)


if __name__ == '__main__':
  absl_app.run(main, flags_parser=_parse_flags)
