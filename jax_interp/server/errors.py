"""Whatever goes wrong -> one form of answer, `ErrorResponse`, by whichever layer it is noticed."""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence

import pydantic
from fastapi import exceptions
from fastapi.responses import Response
from pydantic import Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

CODES = {
  400: 'malformed',
  401: 'unauthorized',
  403: 'foreign_origin',
  404: 'not_found',
  405: 'method_not_allowed',
  409: 'no_language_model',
  413: 'too_large',
  422: 'invalid',
  500: 'internal',
  502: 'language_model_failed',
  503: 'busy',
  504: 'time_limit',
}
# What Starlette says in a few words, in a sentence that names the way out.
_SENTENCES = {
  'Not Found': 'there is nothing at this path; /docs lists what there is',
  'Method Not Allowed': 'this path is asked by the method that the header Allow names; see /docs',
  'Invalid host header': 'the Host header names a host that this server does not go by; use 127.0.0.1 or localhost, '
  'or start it with --allow_host',
  'Content Too Large': 'the body is larger than this server takes; GET /api/model tells its limits',
}
# What pydantic says of these kinds of errors names neither what it found nor the way out.
_FIELD_SENTENCES = {
  'extra_forbidden': 'there is no such field; /docs lists those that there are',
  'json_invalid': 'the body is no JSON from this character on: {error}',
  'union_tag_not_found': 'the field {discriminator} is missing, which says what this is; /docs lists its values',
}
_log = logging.getLogger(__name__)


class InvalidField(pydantic.BaseModel):
  """What is wrong with one field of a request."""

  field: str = Field(description="Where it is, such as 'body.objective.targets'.")
  message: str = Field(description='What it should be.')


class Error(pydantic.BaseModel):
  """What went wrong."""

  code: str = Field(description='One word for each status: ' + ', '.join(f'{s} {c}' for s, c in CODES.items()) + '.')
  message: str = Field(description='A sentence for people.')
  id: str | None = Field(None, description="500 only: what stands beside the trace in the server's log.")
  fields: list[InvalidField] | None = Field(None, description='422 only, where single fields are wrong.')


class ErrorResponse(pydantic.BaseModel):
  """Every answer of a status from 400 on."""

  error: Error = Field(description='What went wrong.')


class Failed(Exception):
  """Ends a request with a status of `CODES` and a sentence."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    id: str | None = None,
    fields: Sequence[InvalidField] | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.headers = status, headers
    self.body = ErrorResponse(error=Error(code=CODES.get(status, 'error'), message=message, id=id, fields=fields))

  def json(self) -> str:
    """Returns the body. ASCII, because names of fields may hold what no encoding can."""
    return json.dumps(self.body.model_dump(exclude_none=True))

  def response(self) -> Response:
    return Response(self.json(), self.status, self.headers, 'application/json')


def internal(e: BaseException) -> Failed:
  """Logs the trace of what should not have happened, and returns what may be said of it."""
  id = uuid.uuid4().hex[:12]
  _log.error('internal error %s', id, exc_info=e)
  return Failed(500, f'this should not have happened; the log of the server has it as {id}', id=id)


def bad_request(e: ValueError | KeyError) -> Failed:
  """Returns a 422 that says what the error says."""
  text = e.args[0] if isinstance(e, KeyError) and e.args else e  # the str() of a KeyError is a repr
  return Failed(422, ' '.join(str(text).split()))


async def on_failed(request, e: Failed) -> Response:
  return e.response()


async def on_http(request, e: HTTPException) -> Response:
  return Failed(e.status_code, _SENTENCES.get(e.detail, e.detail), headers=e.headers).response()


def _field(error: Mapping) -> InvalidField:
  sentence = _FIELD_SENTENCES.get(error['type'])
  message = error['msg'] if sentence is None else sentence.format_map(error.get('ctx', {}))
  return InvalidField(field='.'.join(map(str, error['loc'])), message=message.removeprefix('Value error, '))


async def on_invalid(request, e: exceptions.RequestValidationError) -> Response:
  fields = [_field(x) for x in e.errors()[:20]]
  first = fields[0]
  return Failed(422, f'{first.field}: {first.message}', fields=fields).response()


class OneForm:
  """ASGI middleware, the outermost: gives this form to errors in plain text, and to exceptions that nobody caught."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    started, held, text = False, None, b''

    async def answer(message):
      nonlocal started, held, text
      if message['type'] == 'http.response.start':
        started = True
        if message['status'] >= 400 and Headers(scope=message).get('content-type', '').startswith('text/plain'):
          held = message
      if held is None:
        await send(message)
      elif message['type'] == 'http.response.body':
        text += message.get('body', b'')
        if not message.get('more_body'):
          said = text.decode()
          kept = {k: v for k, v in Headers(scope=held).items() if not k.startswith('content-')}
          failed = Failed(held['status'], _SENTENCES.get(said, said), headers=kept)
          await failed.response()(scope, receive, send)

    try:
      await self._app(scope, receive, answer)
    except Exception as e:
      failed = internal(e)
      if not started:
        await failed.response()(scope, receive, send)
