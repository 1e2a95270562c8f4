"""Endpoints, records and a language model -> an ASGI application; its OpenAPI page needs no network.

What computes on the model is a job of `jobs.Worker`, answered when it is done or, as a stream of events, from the
moment it is queued. Everything else is answered at once, whatever the worker does.
"""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any

import fastapi
import fastapi_offline
import pydantic
from fastapi import Path, Query, exceptions, security, sse
from fastapi.responses import RedirectResponse, Response
from starlette import authentication
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from jax_interp.debugger.schema import Index, Site, Token
from jax_interp.server import catalog, errors, jobs, schema, scoring

LOCAL_HOSTS = ('localhost', '127.0.0.1', '[::1]')
LOOK_SECONDS = 0.2  # between two looks at whether the client is still there, and at what the job says
PING_SECONDS = 15  # between two signs of life in a stream, so that what stands in between does not close it
RETRY_SECONDS = 5  # that a client is asked to wait when the queue is full
EVENTS = 'text/event-stream'
_EVENT = {  # each of a stream, as OpenAPI describes them
  'type': 'object',
  'properties': {
    'event': {'enum': ['queued', 'progress', 'result', 'error']},
    'data': {
      'type': 'string',
      'contentMediaType': 'application/json',
      'description': 'JSON of Queued, Progressed, the response, or ErrorResponse.',
    },
  },
  'required': ['event', 'data'],
}
ABOUT = (
  'Why this token and not that one: nodes of a prompt, their effects, and what is known of them. Every error has the '
  'form of ErrorResponse. What computes on the model waits in a queue; with ?stream=true or Accept: text/event-stream '
  'it is answered by events: queued (Queued), progress (Progressed), then result (the answer) or error '
  '(ErrorResponse). A client that leaves cancels its job.'
)


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """POST /api/{path}: a job that takes a request, and tells its progress, and returns a response.

  Of the function, a ValueError or KeyError says what is wrong with the request, in one sentence.
  """

  path: str
  request: type[pydantic.BaseModel]
  response: type[pydantic.BaseModel]
  function: Callable[[Any, jobs.Progress], pydantic.BaseModel]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """How prompts are cut: `encode(text)` returns ids, and `strings` holds the text of each; any thread may call it."""

  encode: Callable[[str], list[int]]
  strings: Sequence[str]


def create(
  endpoints: Sequence[Endpoint],
  worker: jobs.Worker,
  model: schema.ModelInfo,
  tokenizer: Tokenizer,
  records: catalog.Catalog,
  scorer: scoring.Scorer | None = None,
  scoring_worker: jobs.Worker | None = None,
  *,
  token: str | None = None,
  hosts: Sequence[str] = (),
  allow_origins: Sequence[str] = (),
) -> fastapi.FastAPI:
  """Returns the application.

  Args:
    endpoints: what can be computed.
    worker: computes it.
    model: what is served; its limits hold.
    tokenizer: of the model.
    records: of the model's components.
    scorer: of explanations that users type, with a worker of its own; None: that is refused.
    scoring_worker: given with a scorer.
    token: without which nothing under /api/ is answered, if any.
    hosts: names by which this server is reached, beside `LOCAL_HOSTS`; [..] around IPv6 addresses.
    allow_origins: of foreign pages that may ask, such as https://example.org.
  """
  middleware = [
    Middleware(errors.OneForm),
    Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, *hosts], www_redirect=False),
    Middleware(_KnownOrigins, allow_origins),
  ]
  if allow_origins:
    cors = {'allow_methods': ('GET', 'POST'), 'allow_headers': ('Authorization', 'Content-Type')}
    shown = ('X-Job-Id', 'Retry-After')
    middleware.append(Middleware(CORSMiddleware, allow_origins=allow_origins, expose_headers=shown, **cors))
  if token:
    middleware.append(Middleware(AuthenticationMiddleware, backend=_Bearer(token), on_error=_unauthorized))
  middleware.append(Middleware(RequestBodyLimitMiddleware, max_body_size=model.limits.body_bytes))
  app = fastapi_offline.FastAPIOffline(
    title='jax_interp',
    description=ABOUT,
    version='1',
    redoc_url=None,
    separate_input_output_schemas=False,
    middleware=middleware,
  )
  app.add_exception_handler(errors.Failed, errors.on_failed)
  app.add_exception_handler(HTTPException, errors.on_http)
  app.add_exception_handler(exceptions.RequestValidationError, errors.on_invalid)
  # It is the middleware that asks for the token, before anything is read; this tells the OpenAPI page.
  says_so = [fastapi.Security(security.HTTPBearer(auto_error=False))] if token else []
  statuses = (400, 403, 405, 500, *((401,) if token else ()))
  api = fastapi.APIRouter(prefix='/api', dependencies=says_so, responses=_may_fail(*statuses))
  for endpoint in endpoints:
    _add_job(api, _limited(endpoint, tokenizer, model.limits.prompt_tokens), worker, tag='debugger')
  _add_records(api, model, tokenizer, records)
  _add_scoring(api, scorer, scoring_worker)
  app.include_router(api)

  @app.get('/', include_in_schema=False)
  def root() -> Response:
    return RedirectResponse('/docs')

  return app


def _may_fail(*statuses: int) -> dict:
  return {status: {'model': errors.ErrorResponse, 'description': errors.CODES[status]} for status in statuses}


# What is answered at once


def _add_records(api: fastapi.APIRouter, model: schema.ModelInfo, tokenizer: Tokenizer, records: catalog.Catalog):
  # Plain functions, which FastAPI runs on threads, so that a long text or file holds up nobody.

  @api.get('/model', tags=['model'])
  def describe_model() -> schema.ModelInfo:
    """What is served, and what may be asked of it."""
    return model

  @api.post('/tokenize', tags=['model'], responses=_may_fail(413, 422))
  def tokenize(request: schema.TokenizeRequest) -> schema.TokenizeResponse:
    """Cuts a text into tokens, as prompts are cut."""
    ids = tokenizer.encode(request.text)
    tokens = [Token(id=i, text=tokenizer.strings[i]) for i in ids]
    return schema.TokenizeResponse(request=request, tokens=tokens)

  @api.get('/components/{kind}/{site}/{index}', tags=['components'], responses=_may_fail(404, 422, 503))
  def component(
    kind: schema.Kind,
    site: Annotated[Site, Path(description='Where its activations are read, such as h.2.resid.post_mlp.')],
    index: Annotated[Index, Path(description='Its number at the site.')],
  ) -> schema.Component:
    """A latent or neuron: its records, explanations and their scores."""
    return records.component(kind, site, index)

  @api.get('/search', tags=['components'], responses=_may_fail(422))
  def search(
    q: Annotated[
      str, Query(max_length=200, description='Words, all of which are wanted; the last may be a beginning.')
    ],
    limit: Annotated[int, Query(ge=1, le=200, description='How many are returned at most.')] = 20,
  ) -> schema.SearchResponse:
    """Searches the explanations for words."""
    return records.search(q, limit)


def _add_scoring(api: fastapi.APIRouter, scorer: scoring.Scorer | None, worker: jobs.Worker | None):
  def require():
    if scorer is None:
      raise errors.Failed(409, 'there is no language model to score with; start the server with --llm_backend')

  @api.post('/score/estimate', tags=['scoring'], responses=_may_fail(404, 409, 413, 422, 503))
  def estimate(request: schema.EstimateRequest) -> schema.Estimate:
    """What it would take to score an explanation; asks the language model nothing."""
    require()
    return scorer.estimate(request)

  score = lambda request, progress: scorer.score(request, progress)
  endpoint = Endpoint('score', schema.ScoreRequest, schema.ScoreResponse, score)
  _add_job(api, endpoint, worker, tag='scoring', statuses=(404, 409, 502), require=require)


# What is a job


def _add_job(
  api: fastapi.APIRouter,
  endpoint: Endpoint,
  worker: jobs.Worker | None,
  tag: str,
  statuses: Sequence[int] = (),
  require: Callable[[], None] = lambda: None,
):
  """Adds an endpoint that may also fail by `statuses`; `require` raises where the worker need not be asked."""

  async def answer(
    request: fastapi.Request,
    body: endpoint.request,
    stream: Annotated[bool, Query(description='Whether events are sent, from the moment the job is queued.')] = False,
  ) -> Response:
    require()
    job = _submit(worker, lambda progress: endpoint.function(body, progress).model_dump_json())
    if stream or EVENTS in request.headers.get('accept', ''):
      return sse.EventSourceResponse(_events(job, worker, request), headers={'Cache-Control': 'no-cache'})
    try:
      async for _ in _looks(job, worker, request):
        pass
      return Response(_result(job), media_type='application/json', headers={'X-Job-Id': job.id})
    finally:
      job.cancel()

  api.add_api_route(
    f'/{endpoint.path}',
    answer,
    methods=['POST'],
    name=endpoint.path,
    operation_id=endpoint.path.replace('/', '_'),
    description=endpoint.request.__doc__,
    tags=[tag],
    response_model=endpoint.response,
    responses={
      200: {'description': endpoint.response.__doc__, 'content': {EVENTS: {'itemSchema': _EVENT}}},
      **_may_fail(413, 422, 503, 504, *statuses),
    },
  )


def _submit(worker: jobs.Worker, function: Callable[[jobs.Progress], str]) -> jobs.Job:
  try:
    return worker.submit(function)
  except jobs.Full:
    after = {'Retry-After': str(RETRY_SECONDS)}
    raise errors.Failed(503, 'too many requests wait; try again later', headers=after) from None
  except jobs.Stopping:
    raise _stopping() from None


def _stopping() -> errors.Failed:
  return errors.Failed(503, 'the server is stopping; ask again when it is back')


async def _looks(job: jobs.Job, worker: jobs.Worker, request: fastapi.Request) -> AsyncIterator[None]:
  """Yields now and then until the job is done. Raises `Failed` when it takes too long, or need not go on."""
  future = asyncio.wrap_future(job.future)
  future.add_done_callback(lambda f: f.cancelled() or f.exception())  # else asyncio complains of one nobody looks at
  while not (await asyncio.wait([future], timeout=LOOK_SECONDS))[0]:
    if worker.stopping:
      raise _stopping()
    if job.runs_longer_than(worker.seconds):
      raise errors.Failed(504, f'this takes longer than {worker.seconds:g} s; ask for less, or raise --seconds')
    if await request.is_disconnected():
      raise errors.Failed(400, 'the client has left')
    yield


def _result(job: jobs.Job) -> str:
  """Returns the JSON that a finished job made, or raises what may be said of its failure."""
  try:
    return job.future.result()
  except errors.Failed:
    raise
  except (concurrent.futures.CancelledError, jobs.Cancelled):
    raise _stopping() from None
  except pydantic.ValidationError as e:  # a ValueError too, but of an answer: the request was validated before
    raise errors.internal(e) from e
  except (ValueError, KeyError) as e:
    raise errors.bad_request(e) from e
  except Exception as e:
    raise errors.internal(e) from e


async def _events(job: jobs.Job, worker: jobs.Worker, request: fastapi.Request) -> AsyncIterator[bytes]:
  said, said_at = schema.Queued(id=job.id, position=worker.position(job)), time.monotonic()
  try:
    yield sse.format_sse_event(event='queued', data_str=said.model_dump_json())
    async for _ in _looks(job, worker, request):
      if job.started is None:
        event, body = 'queued', schema.Queued(id=job.id, position=worker.position(job))
      else:
        event, body = 'progress', schema.Progressed(id=job.id, fraction=job.fraction, what=job.what)
      if body != said:
        said, said_at = body, time.monotonic()
        yield sse.format_sse_event(event=event, data_str=body.model_dump_json())
      elif time.monotonic() - said_at > PING_SECONDS:
        said_at = time.monotonic()
        yield sse.KEEPALIVE_COMMENT
    yield sse.format_sse_event(event='result', data_str=_result(job))
  except errors.Failed as e:
    yield sse.format_sse_event(event='error', data_str=e.json())
  finally:
    job.cancel()


def _limited(endpoint: Endpoint, tokenizer: Tokenizer, n_tokens: int) -> Endpoint:
  """Returns the endpoint with a limit on the tokens of each prompt."""

  def function(request, progress):
    for prompt in _prompts(request):
      if (n := len(tokenizer.encode(prompt))) > n_tokens:
        raise ValueError(f'the prompt has {n} tokens, and may have {n_tokens}; shorten it')
    return endpoint.function(request, progress)

  return dataclasses.replace(endpoint, function=function)


def _prompts(value) -> Iterator[str]:
  """Yields every field called prompt, at any depth."""
  if isinstance(value, pydantic.BaseModel):
    for name in type(value).model_fields:
      inner = getattr(value, name)
      if name == 'prompt' and isinstance(inner, str):
        yield inner
      else:
        yield from _prompts(inner)
  elif isinstance(value, list):
    for inner in value:
      yield from _prompts(inner)


# Who may ask


class _KnownOrigins:
  """ASGI middleware that refuses what a page from elsewhere sends: CORS alone hides answers, but lets questions by."""

  def __init__(self, app, allow_origins: Sequence[str]):
    self._app, self._allowed = app, allow_origins

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'http':
      headers = Headers(scope=scope)
      origin = headers.get('origin')
      if origin and origin not in self._allowed and origin.partition('://')[2] != headers.get('host'):
        failed = errors.Failed(403, 'pages of another origin may not ask; start the server with --allow_origin')
        await failed.response()(scope, receive, send)
        return
    await self._app(scope, receive, send)


class _Bearer(authentication.AuthenticationBackend):
  """Wants the header `Authorization: Bearer <token>` for all under /api/."""

  def __init__(self, token: str):
    self._token = token.encode()

  async def authenticate(self, conn):
    scheme, _, given = conn.headers.get('authorization', '').partition(' ')
    is_right = hmac.compare_digest(given.strip().encode(), self._token) and scheme.lower() == 'bearer'
    if conn.scope['path'].startswith('/api/') and not is_right:
      raise authentication.AuthenticationError
    return None


def _unauthorized(conn, e) -> Response:
  asks = {'WWW-Authenticate': 'Bearer'}
  return errors.Failed(401, 'this server wants the header Authorization: Bearer TOKEN', headers=asks).response()
