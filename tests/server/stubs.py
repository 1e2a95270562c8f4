"""The real application over plain functions in the place of the engine, and over records that are written by hand.

What a function does is told by the prompt: see `acts`. Its answer holds numbers that only this request gives.
"""

import contextlib
import json
import socket
import threading
import time
import types
import typing

import numpy as np
import pydantic
import uvicorn

from jax_interp import records
from jax_interp.debugger import schema as debugger
from jax_interp.server import app, catalog, jobs, schema

N_LATENTS, N_NEURONS, N_TOKENS = 4, 3, 6
LATENTS, NEURONS = 'h.2.resid.post_mlp', 'h.1.mlp.post_act'
TABLE = {
  'debug': (debugger.Request, debugger.Response),
  'compare': (debugger.CompareRequest, debugger.CompareResponse),
  'audit': (debugger.AuditRequest, debugger.AuditResponse),
  'edges': (debugger.EdgesRequest, debugger.EdgesResponse),
  'qk': (debugger.QKRequest, debugger.QKResponse),
  'circuit': (debugger.CircuitRequest, debugger.CircuitResponse),
  'template': (debugger.TemplateRequest, debugger.TemplateResponse),
  'generate': (debugger.GenerateRequest, debugger.GenerateResponse),
  'lens': (debugger.LensRequest, debugger.LensResponse),
}
LIMITS = schema.Limits(body_bytes=100_000, prompt_tokens=2000, waiting=60, seconds=3)
TOKENIZER = app.Tokenizer(lambda text: [min(ord(c), 255) for c in text], [chr(i) for i in range(256)])


def minimal(cls: type[pydantic.BaseModel], **given) -> pydantic.BaseModel:
  """Returns an object of a class with the simplest values of its fields, but for those given."""
  fields = {name: field.annotation for name, field in cls.model_fields.items() if name not in given}
  return cls(**given, **{name: _simplest(annotation) for name, annotation in fields.items()})


def _simplest(annotation):
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return None if type(None) in args else _simplest(args[0])
  if origin is list:
    return []
  if issubclass(annotation, pydantic.BaseModel):
    if 'objective' in annotation.model_fields and 'prompt' in annotation.model_fields:
      return annotation(prompt='x', objective=debugger.Entropy())
    return minimal(annotation)
  return annotation()


def acts(request: debugger.ActsRequest, progress: jobs.Progress) -> debugger.ActsResponse:
  """Obeys the first word of a prompt: slow, deaf (slow without telling progress), refuse, miss, crash, bad."""
  word, *rest = request.prompt.split()
  seconds = float(rest[0]) if word in ('slow', 'deaf') else 0
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    time.sleep(0.01)
    if word == 'slow':
      progress(1 - (until - time.monotonic()) / seconds, 'sleeping')
  if word == 'refuse':
    raise ValueError('there is no such head;\n give another')
  if word == 'miss':
    raise KeyError("'h.9' is no site")
  if word == 'crash':
    raise RuntimeError('secret of the machine')
  if word == 'bad':
    debugger.Token(id='x', text=0)
  return debugger.ActsResponse(request=request, tokens=[], values=[float(request.index), float(len(request.prompt))])


def _answer(response):
  def function(request, progress):
    progress(0.5, 'answering')
    return minimal(response, request=request)

  return function


def endpoints() -> list[app.Endpoint]:
  found = [app.Endpoint(path, *classes, _answer(classes[1])) for path, classes in TABLE.items()]
  return [*found, app.Endpoint('acts', debugger.ActsRequest, debugger.ActsResponse, acts)]


def write_records(folder):
  """Writes records of latents and neurons, and explanations of latents 0 to 2; latent 3 has no top excerpts."""
  rng = np.random.default_rng(0)
  for kind, n in (('latents', N_LATENTS), ('neurons', N_NEURONS)):
    windows = {'top': np.tile(np.arange(8), (n, 1)), 'random': np.tile(np.arange(8, 14), (n, 1))}
    if kind == 'latents':
      windows['top'][3] = -1
    excerpt = lambda window, c: {
      'dataclass_name': 'ActivationRecord',
      'tokens': [f' {"abcd"[c]}{window}', ' <b>', '&amp;', '\n', '  ', 'é'],
      'activations': [float(c + window), 0.5, 0.0, 0.0, 0.0, 1.0],
    }
    lines = [
      {
        'dataclass_name': 'NeuronRecord',
        'neuron_id': {'dataclass_name': 'NeuronId', 'layer_index': 2, 'neuron_index': c},
        'random_sample': [excerpt(w, c) for w in windows['random'][c]],
        'random_sample_by_quantile': [[excerpt(0, c)], [excerpt(1, c)], [], []],
        'quantile_boundaries': list(records.QUANTILES),
        'mean': 0.25,
        'variance': 2.0,
        'skewness': None,
        'kurtosis': 3.5,
        'most_positive_activation_records': [excerpt(w, c) for w in windows['top'][c] if w >= 0],
      }
      for c in range(n)
    ]
    lines = json.loads(json.dumps(lines, default=int))
    (folder / 'records').mkdir(parents=True, exist_ok=True)
    arrays = {
      'top_windows': windows['top'],
      'random_windows': windows['random'],
      'density': rng.random(n),
      'max': np.full(n, 9.0, np.float32),
      'histogram': rng.integers(9, size=(n, records.N_BINS)),
      'edges': np.linspace(np.zeros(n), np.full(n, 9), records.N_BINS + 1, axis=1),
      'promoted_tokens': rng.integers(97, 100, size=(n, 3)),
      'suppressed_tokens': rng.integers(100, 120, size=(n, 3)),
    }
    records.write(folder / 'records', kind, lines, arrays)
  (folder / 'explanations').mkdir()
  said = {'token_lookup': ['dogs', 'the running of dogs', ''], 'token_activation': ['closing brackets', None, None]}
  for method, texts in said.items():
    found = [explanation(method, c, text) for c, text in enumerate(texts) if text is not None]
    (folder / 'explanations' / f'{method}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in found))


def explanation(method: str, index: int, text: str) -> dict:
  """Returns a line of explanations/<method>.jsonl."""
  values = {'ev_correlation': 0.5 + index / 10, 'rsquared': None, 'absolute_dev_explained': 0.1}
  sequence = {'split': 'top', 'window': 2, 'tokens': ['a', 'b'], 'true': [1.0, 0.0], 'simulated': [0.5, 0.0]}
  return {
    'component': {'kind': 'latent', 'site': LATENTS, 'index': index},
    'method': method,
    'model': None,
    'simulator': method,
    'explanation': text,
    'status': 'ok',
    'detail': '',
    'excerpts': {'ok': 1},
    'scores': values | {'random_only': None},
    'nulls': {'other_explanation': values, 'constant': values},
    'sequences': [sequence],
  }


def record_sets(folder) -> list[catalog.RecordSet]:
  return [catalog.RecordSet(folder, 'latent', LATENTS), catalog.RecordSet(folder, 'neuron', NEURONS)]


def create(folder, worker: jobs.Worker, **settings) -> app.fastapi.FastAPI:
  """Returns the application over records that `write_records` wrote to a folder."""
  records = catalog.Catalog(record_sets(folder), TOKENIZER.strings)
  info = minimal(schema.ModelInfo, name='stub', records=records.info(), limits=LIMITS)
  return app.create(endpoints(), worker, info, TOKENIZER, records, **settings)


@contextlib.contextmanager
def running(application):
  """Yields the URL at which an application is served, by a thread."""
  server = uvicorn.Server(uvicorn.Config(application, log_level='critical', lifespan='off'))
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
      time.sleep(0.01)
    try:
      yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    finally:
      server.should_exit = True
      thread.join()
