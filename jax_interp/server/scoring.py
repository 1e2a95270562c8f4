"""An explanation that a user types -> what scoring it would cost; and that estimate -> the score."""

import collections
import dataclasses
import logging
import secrets
import threading
import time

from jax_interp.explain import results, simulate
from jax_interp.llm import client, cost
from jax_interp.server import catalog, errors, jobs, schema

SECONDS = 600  # for which an estimate is valid
MAX_ESTIMATES = 1000  # that are remembered; then the oldest go
N_SCORED = 3  # top excerpts that are simulated, and as many random ones: as many as configs/tiny.py scores
_LOCAL = ('127.0.0.1', 'localhost')
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Pending:
  request: schema.EstimateRequest
  usd: float
  expires: float


class Scorer:
  """A language model that scores explanations, with a budget for as long as the server runs."""

  def __init__(
    self,
    llm: client.LLM,
    records: catalog.Catalog,
    budget_usd: float,
    usd_per_million: tuple[float | None, float | None] = (None, None),
  ):
    """Asks nothing yet.

    Args:
      llm: the language model.
      records: of the components that may be scored.
      budget_usd: in all.
      usd_per_million: prompt and completion tokens, where the price is not known; see `cost.price`.
    """
    self._llm, self._records = llm, records
    self._price = cost.price(llm, usd_per_million)
    if self._price is None and llm.client.base_url.host in _LOCAL:
      self._price = 0.0, 0.0
    self._left, self._pending = budget_usd, collections.OrderedDict()
    self._lock = threading.Lock()

  @property
  def model(self) -> str:
    return self._llm.model

  def _target(self, request) -> results.Target:
    found = self._records.find(request.kind, request.site)
    record, windows = found.record(request.index), {}
    for sort in ('top', 'random'):
      windows[sort] = found.arrays[f'{sort}_windows'][request.index].tolist()
      if min(windows[sort]) < 0:
        raise errors.Failed(422, f'{request.kind} {request.index} is active too seldom to be scored; choose another')
    try:
      return results.fewer(results.target(request.index, record, windows['top'], windows['random']), N_SCORED)
    except ValueError as e:
      raise errors.bad_request(e) from e

  def estimate(self, request: schema.EstimateRequest) -> schema.Estimate:
    """Returns what scoring takes, with an id that `score` wants.

    Raises:
      Failed: 404, there is no such component; 422, it cannot be scored, or that costs more than is left of the budget.
    """
    target, meter = self._target(request), cost.Meter(self._llm)
    for _ in simulate.simulate_excerpts(meter, request.explanation, target):
      pass
    used, usd = meter.usage, None
    if self._price is not None:
      usd = (used.prompt_tokens * self._price[0] + used.completion_tokens * self._price[1]) / 1e6
    if (usd or 0) > self._left:
      raise errors.Failed(
        422, f'this could cost ${usd:.4f}, more than the ${self._left:.4f} left of --llm_budget_usd; raise that'
      )
    id = secrets.token_urlsafe(16)
    with self._lock:
      self._pending[id] = _Pending(request, usd or 0, time.monotonic() + SECONDS)
      while len(self._pending) > MAX_ESTIMATES:
        self._pending.popitem(last=False)
    return schema.Estimate(
      request=request,
      id=id,
      expires_in=SECONDS,
      model=self._llm.model,
      simulator=simulate.simulator(self._llm),
      excerpts=len(target.scored),
      requests=used.requests,
      prompt_tokens=used.prompt_tokens,
      completion_tokens=used.completion_tokens,
      usd=usd,
      usd_left=self._left,
    )

  def _redeem(self, id: str) -> schema.EstimateRequest:
    with self._lock:
      pending = self._pending.pop(id, None)
      if pending is None or pending.expires < time.monotonic():
        raise errors.Failed(404, 'there is no such estimate, or it was used or has expired; ask for another')
      if pending.usd > self._left:
        raise errors.Failed(422, 'others have used up the budget since this was estimated; raise --llm_budget_usd')
      self._left -= pending.usd
    return pending.request

  def score(self, request: schema.ScoreRequest, progress: jobs.Progress) -> schema.ScoreResponse:
    """Returns the scores of what was estimated; the id is then used up.

    Raises:
      Failed: 404, there is no such estimate; 422, the budget is used up; 502, the language model cannot be asked.
    """
    asked = self._redeem(request.id)
    target, found = self._target(asked), []
    progress(0.0, 'simulating')
    try:
      for simulation in simulate.simulate_excerpts(self._llm, asked.explanation, target):
        found.append(simulation)
        progress(len(found) / len(target.scored), 'simulating')
    except (OSError, ValueError) as e:  # what they say may quote the server, and so the key
      _log.error('the language model cannot be asked', exc_info=e)
      raise errors.Failed(502, 'the language model cannot be asked; the log of the server says why') from e
    pairs = list(zip(target.scored, found, strict=True))
    own = results.score(pairs)
    return schema.ScoreResponse(
      request=asked,
      model=self._llm.model,
      simulator=simulate.simulator(self._llm),
      scores=own and own | {'random_only': results.score([(e, s) for e, s in pairs if e.sort == 'random'])},
      statuses=collections.Counter(s['status'] for s in found),
      sequences=[
        schema.Simulated(split=e.sort, tokens=e.tokens, true=e.activations, simulated=s['simulated'])
        for e, s in pairs
        if s['status'] == 'ok'
      ],
    )
