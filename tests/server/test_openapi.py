"""Requests that are generated from the OpenAPI schema, right ones and wrong ones, never break the server.

2,000 requests by default; JAX_INTERP_API_CASES=20000 asks for more.
"""

import collections
import os

import hypothesis
import requests
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from jax_interp.server import jobs
from tests.server import stubs

N_CASES = int(os.environ.get('JAX_INTERP_API_CASES', '2000'))
CHECKS = [
  not_a_server_error,
  checks.status_code_conformance,
  checks.content_type_conformance,
  checks.response_schema_conformance,
]


def test_no_request_breaks_the_server(tmp_path):
  stubs.write_records(tmp_path)
  worker, seen = jobs.Worker(8, 10), collections.defaultdict(collections.Counter)
  with stubs.running(stubs.create(tmp_path, worker)) as url, requests.Session() as session:
    api = schemathesis.openapi.from_url(f'{url}/openapi.json')
    operations = [found.ok() for found in api.get_all_operations()]
    for operation in operations:

      @hypothesis.seed(0)
      @hypothesis.settings(
        max_examples=-(-N_CASES // (len(operations) - 1)),  # one of them takes nothing
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
      )
      @hypothesis.given(case=strategies.one_of(*(operation.as_strategy(mode) for mode in schemathesis.GenerationMode)))
      def check(case):
        response = case.call_and_validate(session=session, checks=CHECKS)
        seen[case.operation.path][response.status_code] += 1

      check()
  worker.stop()
  assert sum(counts.total() for counts in seen.values()) >= N_CASES
  answered = {path for path, counts in seen.items() if 200 in counts}
  unanswered = {'/api/components/{kind}/{site}/{index}', '/api/score', '/api/score/estimate'}  # no luck, and no LLM
  assert answered == {operation.path for operation in operations} - unanswered
  assert all(422 in seen[f'/api/{path}'] for path in stubs.TABLE)
