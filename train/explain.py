"""Explains sampled latents by every method, and scores the explanations on excerpts that no method has seen.

Takes the records and the SAE under the workdir; leaves workdir/explanations/<method>.jsonl, a line a latent, and
summary.json. A finished latent is a file in explanations/units, and an answer of a language model one in llm_answers:
so nothing is done, or paid, twice.
"""

import concurrent.futures
import json
import pathlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jax_interp import records, store, text
from jax_interp.explain import neuron2graph, results, simulate, token_activation, token_lookup
from jax_interp.llm import backends, client, cost
from train import command
from train import records as train_records
from train import sae as train_sae

LLM_METHOD = 'token_activation'

Job = tuple[results.Target, results.Target]  # a latent to explain, and the one for which its explanation is the null

# What a method yields for a job: the target, and its unit {explanation, status, detail, own, other}, where `own` and
# `other` hold {status, detail, simulated: activations or None} for each excerpt that the latent, and that the other,
# is scored on.
Results = Iterator[tuple[results.Target, dict]]


def _check_stopping():
  if command.stopping():
    raise command.Stopped('the finished explanations are kept; run the same command to go on')


def _stoppable(units: Iterable) -> Iterator:
  for unit in units:
    _check_stopping()
    yield unit


def _without_llm(explanations: Iterable[tuple[str, Callable]], jobs: Sequence[Job], windows: np.ndarray) -> Results:
  """Turns what a method yields for each job, a text and a function that simulates, into results."""
  for (target, other), (explanation, simulate_tokens) in zip(jobs, explanations, strict=True):
    own = _predict(simulate_tokens, target, windows)
    others = _predict(simulate_tokens, other, windows, other.maximum / target.maximum)
    yield target, {'explanation': explanation, 'status': 'ok', 'detail': '', 'own': own, 'other': others}
    _check_stopping()


def _predict(simulate_tokens: Callable, target: results.Target, windows: np.ndarray, scale: float = 1) -> list[dict]:
  """Simulates a latent's excerpts; `scale` turns the unit of the explained latent into this one's."""
  acts = [scale * simulate_tokens(_tokens(windows, e)) for e in target.scored]
  return [{'status': 'ok', 'detail': '', 'simulated': acts_t.tolist()} for acts_t in acts]


def _tokens(windows: np.ndarray, excerpt: results.Excerpt) -> np.ndarray:
  """Returns the tokens of an excerpt, without the padding behind them."""
  return windows[excerpt.window][: len(excerpt.activations)]


def _ask(llm: client.LLM, job: Job, n_shown: int, temperature: float, seed: int) -> dict:
  """Returns the unit of a job, asked of a language model that is shown `n_shown` excerpts."""
  target, other = job
  shown = [(e.tokens, e.activations) for e in target.shown[:n_shown]]
  answer = token_activation.explain(llm, shown, temperature, seed)
  unit = {'explanation': answer.content, 'status': answer.status, 'detail': answer.detail, 'own': [], 'other': []}
  if answer.status == 'ok':
    simulated = lambda t: list(_stoppable(simulate.simulate_excerpts(llm, answer.content, t)))
    unit |= {'own': simulated(target), 'other': simulated(other)}
  return unit


def _with_llm(llms: Sequence[client.LLM], jobs: Sequence[Job], **settings) -> Results:
  """Yields results as they come, of one job at a time from each of the models."""
  free = queue.SimpleQueue()
  for llm in llms:
    free.put(llm)

  def work(job):
    llm = free.get()
    try:
      return job[0], _ask(llm, job, **settings)
    finally:
      free.put(llm)

  with concurrent.futures.ThreadPoolExecutor(len(llms)) as pool:
    futures = [pool.submit(work, job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    finally:  # when one was stopped, or met what concerns all, the others need not begin
      pool.shutdown(cancel_futures=True)


def _run_method(
  folder: pathlib.Path, method: str, component: dict, targets, by: dict, explain: Callable[[list[Job]], Results]
) -> dict:
  """Explains the targets that are not done yet, writes their lines, and returns the summary.

  Args:
    folder: workdir/explanations.
    method: names the file of lines, and the folder in units.
    component: kind and site of the targets.
    targets: in order.
    by: the `llm` that was chosen, its `model`, and the `simulator`. A unit by another is made anew, and so is one with
      a request that failed.
    explain: yields a result for each job.
  """
  path = lambda target: folder / 'units' / method / f'{target.index}.json'
  done = {t.index: json.loads(path(t).read_text('utf-8')) for t in targets if path(t).exists()}
  done = {index: unit for index, unit in done.items() if unit['by'] == by and not results.unanswered(unit)}
  jobs = [job for job in _jobs(targets) if job[0].index not in done]
  found = [results.score(list(zip(t.scored, done[t.index]['own'], strict=False))) for t in targets if t.index in done]
  with command.progress(None, len(targets), f'train.explain: {method}', 'latents', initial=len(done)) as bar:
    for target, unit in explain(jobs) if jobs else ():
      done[target.index] = unit | {'by': by}
      store.write_json(path(target), done[target.index])
      found.append(results.score(list(zip(target.scored, unit['own'], strict=False))))
      correlations = [s['ev_correlation'] for s in found if s and s['ev_correlation'] is not None]
      bar.update()
      bar.set_postfix(mean_score=f'{np.mean(correlations):.3f}' if correlations else 'none yet')
  null_of = {other.index: done[target.index]['other'] for target, other in _jobs(targets) if target is not other}
  about = {'method': method, 'model': by['model'], 'simulator': by['simulator']}
  lines = [
    {'component': component | {'index': t.index}} | about | results.line(t, done[t.index], null_of.get(t.index, []))
    for t in targets
  ]
  store.write_lines(folder / f'{method}.jsonl', map(json.dumps, lines))
  return results.summarize(lines) | by | {'unanswered': sum(map(results.unanswered, done.values()))}


def _explained_by(folder: pathlib.Path) -> str | None:
  """Returns the name of the language model that finished explanations are by."""
  return json.loads((folder / 'summary.json').read_text('utf-8')).get(LLM_METHOD, {}).get('llm')


def _jobs(targets: Sequence[results.Target]) -> list[Job]:
  """Pairs each target with the one half of them away, which differs in density."""
  half = len(targets) // 2
  return list(zip(targets, [*targets[half:], *targets[:half]], strict=True))


def run(config, workdir):
  """Explains by every method, or what is missing.

  Raises:
    ValueError: the records are of other settings; no latent can be explained; the cost is above the budget.
    OSError: there are no records; the language model is not there, refuses the key, or its memory cannot be written.
  """
  folder, settings, site = workdir / 'explanations', config.explain, config.sae.site
  recorded = train_records.made_with(config, workdir)
  command.require(workdir / 'records', recorded, 'train.records')
  made_with = recorded | {'explain': settings, 'llm': {name: config.llm[name] for name in ('gguf', 'temperature')}}
  choice = backends.choose(config.llm.backend if settings.n_llm else 'none', config.llm.model, config.llm.gguf)
  if folder.exists() and command.claim(folder, made_with):
    if choice.name in (None, _explained_by(folder)):
      return
    print(f'except by {choice.name}')
  record_lines, arrays = records.read(workdir / 'records', 'latents')
  top, random = arrays['top_windows'], arrays['random_windows']
  alive = (top >= 0).all(1) & (random >= 0).all(1)
  indices = results.sample(arrays['density'], alive, settings.n_components, config.seed)
  if not len(indices):
    raise ValueError('no latent is active in enough windows to be explained and scored; record more windows')
  targets = [results.target(i, record_lines[i], top[i], random[i]) for i in indices.tolist()]
  n_llm = min(settings.n_llm, len(targets))
  few = [results.fewer(targets[i * len(targets) // n_llm], settings.n_llm_scored) for i in range(n_llm)]
  asking = {'n_shown': settings.n_shown, 'temperature': config.llm.temperature, 'seed': config.seed}

  with backends.language_models(choice, workdir / 'llm_answers', config.llm.concurrency) as llms:
    if llms:
      _announce(llms[0], few, asking, config.llm)
    for outdated in ('DONE', 'summary.json', f'{LLM_METHOD}.jsonl'):
      (folder / outdated).unlink(missing_ok=True)
    command.claim(folder, made_with)  # now that nothing speaks against these settings
    subject, sae = command.subject(config, workdir), train_sae.load(config, workdir)
    strings = records.token_strings(subject.tokenizer)
    batch_size = config.records.batch_size
    windows = np.load(workdir / 'records' / 'windows.npy', mmap_mode='r')

    def token_lookups(jobs):
      components = np.array([target.index for target, _ in jobs])
      keep_wt = text.kept(windows, text.special_ids(subject.tokenizer))
      batches = _stoppable(records.batches(subject.model, windows, site, sae, components, batch_size))
      excluded = records.scoring_windows(top[components], random[components], n=None)
      return _without_llm(token_lookup.explain(batches, windows, keep_wt, excluded, strings), jobs, windows)

    def graphs(jobs):
      documents = {t.index: [(_tokens(windows, e), np.array(e.activations)) for e in t.shown] for t, _ in jobs}
      reader, padding = neuron2graph.reader(subject.model, site, sae), neuron2graph.padding_token(subject.tokenizer)
      return _without_llm(neuron2graph.explain(documents, reader, padding, strings), jobs, windows)

    component = {'kind': 'latent', 'site': site}
    summary = {}
    for method, explain in (('token_lookup', token_lookups), ('neuron2graph', graphs)):
      by = {'llm': None, 'model': None, 'simulator': method}
      summary[method] = _run_method(folder, method, component, targets, by, explain)
    if llms:
      by = {'llm': choice.name, 'model': llms[0].model, 'simulator': simulate.simulator(llms[0])}
      ask = lambda jobs: _with_llm(llms, jobs, **asking)
      summary[LLM_METHOD] = _run_method(folder, LLM_METHOD, component, few, by, ask)
  store.write_json(folder / 'summary.json', summary)
  for method, found in summary.items():
    print(f'{method}: {dict(found["status"])}, {found["scores"].get("ev_correlation")}')
  if unanswered := sum(found['unanswered'] for found in summary.values()):
    print(f'requests failed for {unanswered} of the {len(few)} latents; the same command asks for those again')
  else:
    command.finish(folder)


def _announce(llm: client.LLM, targets: Sequence[results.Target], asking: dict, settings):
  """Prints who explains, and what that will use and cost at most. ValueError if that is above the budget."""
  print(f'{llm.model} explains, and simulates {simulate.simulator(llm)}')
  price = cost.price(llm, (settings.usd_per_million_prompt, settings.usd_per_million_completion))
  if price is None and llm.client.base_url.host in ('127.0.0.1', 'localhost'):
    return
  meter = cost.Meter(llm)
  for job in _jobs(targets):
    _ask(meter, job, **asking)
  print(cost.check(meter.usage, llm.model, price, settings.budget_usd))


if __name__ == '__main__':
  command.main(run)
