"""What is answered, to whom, and in what form."""

import json
import re

import httpx
import pytest

from tests.server import stubs

ACTS = {'prompt': 'abc', 'kind': 'neuron', 'layer': 0, 'index': 1}
LATENT = f'/api/components/latent/{stubs.LATENTS}'


def _error(response: httpx.Response) -> dict:
  """Returns the error of an answer, which has the one form of all."""
  body = response.json()
  assert list(body) == ['error']
  assert set(body['error']) <= {'code', 'message', 'id', 'fields'}
  assert response.headers['Content-Type'] == 'application/json'
  return body['error']


# Records and the model


def test_tokens_come_with_their_texts(client):
  answer = client.post('/api/tokenize', json={'text': 'a<b'}).json()
  assert answer['tokens'] == [{'id': 97, 'text': 'a'}, {'id': 60, 'text': '<'}, {'id': 98, 'text': 'b'}]
  assert answer['request'] == {'text': 'a<b'}


def test_the_model_says_what_there_are_records_of_and_what_may_be_asked(client):
  answer = client.get('/api/model').json()
  found = [(x['kind'], x['site'], x['n'], x['n_explained']) for x in answer['records']]
  assert found == [('latent', stubs.LATENTS, 4, 3), ('neuron', stubs.NEURONS, 3, 0)]
  assert answer['limits'] == stubs.LIMITS.model_dump()


def test_a_component_has_its_records_and_explanations(client):
  answer = client.get(f'{LATENT}/1').json()
  assert (answer['kind'], answer['site'], answer['index']) == ('latent', stubs.LATENTS, 1)
  assert answer['top'][2] == {
    'tokens': [' b2', ' <b>', '&amp;', '\n', '  ', 'é'],
    'activations': [3.0, 0.5, 0.0, 0.0, 0.0, 1.0],
  }
  assert [len(answer[x]) for x in ('top', 'random', 'quantiles')] == [8, 6, 4]
  moments = [answer[x] for x in ('mean', 'variance', 'skewness', 'kurtosis')]
  assert moments == [0.25, 2.0, None, 3.5]
  assert len(answer['histogram']['edges']) == len(answer['histogram']['counts']) + 1
  assert len(answer['promoted']) == 3
  (explanation,) = answer['explanations']
  assert (explanation['method'], explanation['explanation']) == ('token_lookup', 'the running of dogs')
  assert explanation['scores']['ev_correlation'] == 0.6
  assert explanation['sequences'][0]['simulated'] == [0.5, 0.0]
  methods = {x['method'] for x in client.get(f'{LATENT}/0').json()['explanations']}
  assert methods == {'token_lookup', 'token_activation'}


@pytest.mark.parametrize(
  ('path', 'status'),
  [
    (f'{LATENT}/4', 404),
    (f'{LATENT}/99999999999', 422),
    (f'{LATENT}/-1', 422),
    (f'{LATENT}/1e0', 422),
    (f'/api/components/neuron/{stubs.LATENTS}/0', 404),
    (f'/api/components/head/{stubs.LATENTS}/0', 422),
    ('/api/components/latent/..%2f..%2frecords/0', 404),
    ('/api/components/latent/%2e%2e/0', 404),
    ('/api/components/latent/%2e%2e%5c%2e%2e/0', 404),
    ('/api/components/latent/%2fetc%2fpasswd/0', 404),
    ('/api/components/latent/h.2.resid.post_mlp%00/0', 404),
    ('/static-offline-docs/..%2f..%2f..%2fapp.py', 404),
    ('/static-offline-docs/%2e%2e/core.py', 404),
  ],
)
def test_what_is_not_there_is_no_path_to_anything(client, path, status):
  response = client.get(path)
  assert response.status_code == status
  _error(response)


@pytest.mark.parametrize(
  'change', [lambda text: text.replace('"neuron_index": 1', '"neuron_index": 2'), lambda text: 'x' + text]
)
def test_records_made_anew_are_not_mixed_with_old_ones(tmp_path, worker, change):
  stubs.write_records(tmp_path)
  path = tmp_path / 'records' / 'latents.jsonl'
  with stubs.running(stubs.create(tmp_path, worker)) as url:
    path.write_text(change(path.read_text()))
    response = httpx.get(f'{url}{LATENT}/1')
  assert response.status_code == 503
  assert 'start it again' in _error(response)['message']


@pytest.mark.parametrize(
  ('q', 'found'),
  [
    ('dogs', [0, 1]),  # the shorter is the better match
    ('dog', [0, 1]),
    ('RUNNING', [1]),
    ('runs do', [1]),
    ('dogs bracket', []),
    ('closing br', [0]),
    ('', []),
    ('"', []),
    ('dogs" OR "brackets', []),
    ('dogs AND NOT NEAR(', []),
    ('dogs*\x00', [0, 1]),
    ('explanation:dogs', []),
    ("'; DROP TABLE explanations --", []),
  ],
)
def test_search_finds_words_and_takes_nothing_for_its_own_syntax(client, q, found):
  answer = client.get('/api/search', params={'q': q}).json()
  assert [x['index'] for x in answer['found']] == found
  assert answer['n'] == len(found)


def test_search_says_how_many_there_are(client):
  answer = client.get('/api/search', params={'q': 'dogs', 'limit': 1}).json()
  assert (len(answer['found']), answer['n']) == (1, 2)
  assert answer['found'][0]['score'] == 0.5


# One form of errors


@pytest.mark.parametrize(
  ('request_', 'status', 'code'),
  [
    (('GET', '/nowhere', {}), 404, 'not_found'),
    (('GET', '/api/debug', {}), 405, 'method_not_allowed'),
    (('POST', '/api/acts', {'content': b'{'}), 422, 'invalid'),
    (('POST', '/api/acts', {'content': b'\xff'}), 400, 'malformed'),
    (('POST', '/api/acts', {'content': b'[' * 50_000}), 400, 'malformed'),
    (('POST', '/api/acts', {'content': b'{"index": ' + b'1' * 5000 + b'}'}), 400, 'malformed'),
    (
      ('POST', '/api/debug', {'content': b'{"trace": ' + b'{"downstream": ' * 500 + b'{}' + b'}' * 501}),
      422,
      'invalid',
    ),
    (('POST', '/api/acts', {'json': {}}), 422, 'invalid'),
    (('POST', '/api/acts', {'json': ACTS | {'surplus': 1}}), 422, 'invalid'),
    (('POST', '/api/acts', {'content': json.dumps(ACTS | {'\ud800': float('nan')})}), 422, 'invalid'),
    (('POST', '/api/acts', {'content': json.dumps(ACTS | {'prompt': '\ud800'})}), 422, 'invalid'),
    (('POST', '/api/acts', {'content': json.dumps(ACTS | {'index': float('inf')})}), 422, 'invalid'),
    (('POST', '/api/acts', {'content': json.dumps(ACTS), 'headers': {'Content-Type': 'text/plain'}}), 422, 'invalid'),
    (('POST', '/api/acts', {'json': ACTS | {'prompt': 'x' * 2001}}), 422, 'invalid'),
    (('POST', '/api/acts', {'json': ACTS | {'prompt': 'x' * 100_000}}), 413, 'too_large'),
    (('POST', '/api/acts', {'content': iter([b'{"prompt": "' + b'x' * 60_000, b'x' * 60_000])}), 413, 'too_large'),
    (('POST', '/api/score', {'json': {'id': 'x'}}), 409, 'no_language_model'),
    (('GET', '/api/model', {'headers': {'Host': 'evil.example'}}), 400, 'malformed'),
    (('GET', '/api/model', {'headers': {'Host': 'localhost.evil.example:80'}}), 400, 'malformed'),
    (('GET', '/docs', {'headers': {'Host': ''}}), 400, 'malformed'),
    (('POST', '/api/acts', {'json': ACTS, 'headers': {'Origin': 'https://evil.example'}}), 403, 'foreign_origin'),
    (('GET', '/api/model', {'headers': {'Origin': 'null'}}), 403, 'foreign_origin'),
    (('GET', '/api/model', {'headers': {'Origin': 'http://['}}), 403, 'foreign_origin'),
  ],
)
def test_errors_have_one_form(client, request_, status, code):
  method, path, arguments = request_
  headers = {'Content-Type': 'application/json'} | arguments.pop('headers', {})
  response = client.request(method, path, **arguments, headers=headers)
  assert response.status_code == status
  assert _error(response)['code'] == code


def test_wrong_fields_are_named(client):
  body = {'prompt': 'x', 'objective': {'kind': 'logit_difference', 'targets': []}, 'k': 0}
  error = _error(client.post('/api/debug', json=body))
  fields = {x['field'] for x in error['fields']}
  assert fields == {'body.objective.logit_difference.targets', 'body.k'}


@pytest.mark.parametrize(
  ('path', 'content', 'sentence'),
  [
    ('/api/acts', b'{', 'the body is no JSON'),
    ('/api/acts', json.dumps(ACTS | {'surplus': 1}).encode(), 'surplus: there is no such field'),
    ('/api/debug', b'{"prompt": "x", "objective": {"targets": ["x"]}}', "objective: the field 'kind' is missing"),
    ('/api/acts', json.dumps(ACTS | {'kind': 'neuron', 'site': 'x'}).encode(), 'site is no part of where a node'),
    ('/api/nowhere', b'{}', 'there is nothing at this path'),
  ],
)
def test_errors_name_the_way_out(client, path, content, sentence):
  response = client.post(path, content=content, headers={'Content-Type': 'application/json'})
  assert sentence in _error(response)['message']


def test_the_limit_of_tokens_holds_for_every_prompt_of_a_request(client):
  long = {'prompt': 'x' * 2001, 'objective': {'kind': 'entropy'}}
  short = long | {'prompt': 'x'}
  other = {'kind': 'neuron', 'to': {'kind': 'prompt', 'prompt': 'x' * 2001}}
  for path, body in (
    ('debug', long),
    ('debug', short | {'ablations': [other]}),
    ('compare', {'left': short, 'right': long}),
    ('template', {'requests': [short, long]}),
  ):
    response = client.post(f'/api/{path}', json=body)
    assert response.status_code == 422
    assert 'may have 2000' in _error(response)['message']
  assert client.post('/api/debug', json=short).status_code == 200


# Who may ask


def test_the_same_page_may_ask(client, url):
  response = client.post('/api/acts', json=ACTS, headers={'Origin': url})
  assert response.status_code == 200
  assert 'Access-Control-Allow-Origin' not in response.headers


def test_a_foreign_page_may_ask_only_if_it_is_named(folder, worker):
  friend, stranger = 'https://friend.example', 'https://stranger.example'
  with stubs.running(stubs.create(folder, worker, allow_origins=[friend], token='secret')) as url:
    ask = {'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,content-type'}
    allowed = httpx.options(f'{url}/api/acts', headers=ask | {'Origin': friend})
    assert (allowed.status_code, allowed.headers['Access-Control-Allow-Origin']) == (200, friend)
    assert httpx.options(f'{url}/api/acts', headers=ask | {'Origin': stranger}).status_code == 403
    bearer = {'Authorization': 'Bearer secret'}
    answered = httpx.post(f'{url}/api/acts', json=ACTS, headers=bearer | {'Origin': friend})
    assert (answered.status_code, answered.headers['Access-Control-Allow-Origin']) == (200, friend)
    refused = httpx.post(f'{url}/api/acts', json=ACTS, headers=bearer | {'Origin': stranger})
    assert (refused.status_code, refused.headers.get('Access-Control-Allow-Origin')) == (403, None)


@pytest.mark.parametrize(
  ('authorization', 'status'),
  [
    (None, 401),
    ('', 401),
    ('Bearer', 401),
    ('Bearer wrong', 401),
    ('Bearer secretsecret', 401),
    ('Basic secret', 401),
    ('Bearer sécret', 401),
    ('Bearer secret', 200),
    ('bearer secret', 200),
  ],
)
def test_a_token_is_wanted_before_anything_is_read(folder, worker, authorization, status):
  headers = {} if authorization is None else {'Authorization': authorization.encode('latin1')}
  with stubs.running(stubs.create(folder, worker, token='secret')) as url:
    response = httpx.get(f'{url}/api/model', headers=headers)
    large = httpx.post(f'{url}/api/acts', content=b'x' * 200_000, headers=headers)
    assert httpx.get(f'{url}/docs').status_code == 200  # which has a place to type the token
    schema = httpx.get(f'{url}/openapi.json').json()
  assert response.status_code == status
  assert large.status_code == (413 if status == 200 else 401)
  if status == 401:
    assert _error(response)['code'] == 'unauthorized'
    assert response.headers['WWW-Authenticate'] == 'Bearer'
  assert 'HTTPBearer' in schema['components']['securitySchemes']


@pytest.mark.parametrize('host', ['127.0.0.1:80', 'LOCALHOST', '[::1]:8000', 'lab.example:9'])
def test_the_server_goes_by_its_names(folder, worker, host):
  with stubs.running(stubs.create(folder, worker, hosts=['lab.example'])) as url:
    assert httpx.get(f'{url}/api/model', headers={'Host': host}).status_code == 200


# OpenAPI


def test_the_documentation_needs_no_network(client):
  page = client.get('/', follow_redirects=True).text
  assert 'SwaggerUIBundle' in page
  assert not re.findall(r'(?:https?:)?//[\w.]+', page)
  for path in re.findall(r'(?:href|src)="([^"]+)"', page):
    assert client.get(path).status_code == 200


def test_every_field_is_described(client):
  schemas = client.get('/openapi.json').json()['components']['schemas']
  bare = {
    f'{name}.{field}'
    for name, about in schemas.items()
    for field, said in about.get('properties', {}).items()
    if not {'description', '$ref'} & set(said) and field not in ('kind', 'request')
  }
  assert not bare
  assert all('description' in about for about in schemas.values())


def test_all_that_a_job_may_answer_is_documented(client):
  document = client.get('/openapi.json').json()
  for path in [*stubs.TABLE, 'acts', 'score']:
    responses = document['paths'][f'/api/{path}']['post']['responses']
    assert {'200', '400', '403', '405', '413', '422', '500', '503', '504'} <= set(responses)
    assert set(responses['200']['content']) == {'application/json', 'text/event-stream'}
    assert '$ref' in responses['200']['content']['application/json']['schema']


def test_two_sets_of_records_of_the_same_are_refused(folder):
  sets = stubs.record_sets(folder)
  with pytest.raises(ValueError, match='two sets of records of latents'):
    stubs.catalog.Catalog([*sets, sets[0]])
