"""What a job would use and cost, before it is begun: it runs once with a `Meter` in the place of the language model."""

from jax_interp.llm import client

USD_PER_MILLION = {client.HOSTED_MODEL: (0.40, 1.60)}  # prompt and completion tokens: list prices of api.openai.com


class Meter(client.LLM):
  """Stands in for a language model: counts in `usage` what is not on disk yet, asks nothing, and answers anything."""

  def __init__(self, llm: client.LLM):
    super().__init__(**vars(llm) | {'usage': client.Usage()})

  def _remember(self, request, ask):
    answer = self._recall(self._path(request))
    if answer:
      return answer
    ((kind, params),) = request.items()
    if kind == 'chat':
      texts, max_tokens = [''.join(m['content'] for m in params['messages'])], params['max_completion_tokens']
      answer = client.Answer('ok', 'word ' * max_tokens)
    else:
      texts = [params['text']] if kind == 'echo' else [params['text'][:slot] for slot in params['slots']]
      max_tokens = len(texts)
      answer = client.Answer('ok', [dict.fromkeys(params['allowed'], 0.0)] * len(params['slots']))
    self._count(client.Usage(prompt_tokens=sum(map(client.estimate_tokens, texts)), completion_tokens=max_tokens))
    return answer


def price(llm: client.LLM, usd_per_million: tuple[float | None, float | None]) -> tuple[float, float] | None:
  """Returns USD for a million prompt and completion tokens: as given, else as listed; None where not known."""
  if None not in usd_per_million:
    return usd_per_million
  at_openai = str(llm.client.base_url).rstrip('/') == client.HOSTED_URL
  return USD_PER_MILLION.get(llm.model) if at_openai else None


def check(usage: client.Usage, model: str, usd_per_million: tuple[float, float] | None, budget_usd: float) -> str:
  """Returns a sentence on what a job will use at most and cost.

  Raises:
    ValueError: that is more than the budget.
  """
  tokens = f'{model}: about {usage.prompt_tokens:,} prompt and at most {usage.completion_tokens:,} completion tokens'
  if usd_per_million is None:
    return (
      f'{tokens}; their price is not known, so the budget is not checked (--config.llm.usd_per_million_prompt and '
      '--config.llm.usd_per_million_completion tell it)'
    )
  per_prompt, per_completion = usd_per_million
  usd = (usage.prompt_tokens * per_prompt + usage.completion_tokens * per_completion) / 1e6
  if usd > budget_usd:
    raise ValueError(
      f'{tokens}, ${usd:.2f}, is more than llm.budget_usd ${budget_usd:.2f}; raise it, or lower explain.n_llm'
    )
  return f'{tokens}, ${usd:.2f} of a budget of ${budget_usd:.2f}'
