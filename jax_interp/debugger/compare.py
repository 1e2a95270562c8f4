"""Two runs over one list of nodes, and one question over many prompts."""

import time

from jax_interp.debugger import effects, engine, objectives, schema
from jax_interp.debugger.subject import Subject
from jax_interp.explain import scores


def compare(
  subject: Subject,
  request: schema.CompareRequest,
  progress: engine.Progress = engine.silent,
  other: Subject | None = None,
) -> schema.CompareResponse:
  """Returns two runs, both over the nodes of either, and their difference.

  Args:
    subject: the model, of the left run and, unless the request says otherwise, of the right one.
    request: without a right request, the left one is asked of the other model, or else without its ablations.
    progress: told how far it is.
    other: a second model of the same sizes, such as another checkpoint.

  Raises:
    ValueError: the prompts have different numbers of tokens, or there is no such second model; and as `engine.debug`.
  """
  began, left, right = time.monotonic(), request.left, request.right
  if right is None and request.right_model == 'other':
    right = left
  elif right is None:
    right = left.model_copy(update={'ablations': [], 'edge_ablations': []})
    if not (left.ablations or left.edge_ablations):
      raise ValueError('both sides are the same; give a right request, the other model, or ablations on the left')
  theirs = subject if request.right_model == 'main' else _other(subject, other)
  sides = [(subject, left, engine.analyse(subject, left))]
  progress(0.3, 'right side')
  sides.append((theirs, right, engine.analyse(theirs, right)))
  lengths = [analysis.prepared.n_tokens for *_, analysis in sides]
  if lengths[0] != lengths[1]:
    raise ValueError(f'the prompts have {lengths[0]} and {lengths[1]} tokens; nodes are compared token by token')
  if sides[0][2].prepared.saes.keys() != sides[1][2].prepared.saes.keys():
    raise ValueError('the two sides splice in SAEs at different sites; name the same `saes`')
  progress(0.6, 'reading nodes')
  nodes = list(dict.fromkeys([*sides[0][2].nodes, *sides[1][2].nodes]))
  answers = [engine.answer(*side, nodes, began) for side in sides]
  tables = [answer.table for answer in answers]
  minus = lambda a, b: None if a is None or b is None else a - b
  difference = {
    name: [minus(a, b) for a, b in zip(*(getattr(table, name) for table in tables), strict=True)]
    for name in engine.COLUMNS
  }
  return schema.CompareResponse(
    request=request, left=answers[0], right=answers[1], difference=schema.Table(nodes=nodes, **difference)
  )


def _other(subject, other) -> Subject:
  if other is None:
    raise ValueError('there is no second model; give one to compare with (--other_model)')
  sizes = lambda model: {name: getattr(model.config, name) for name in ('n_layer', 'n_head', 'd_model', 'n_neurons')}
  if sizes(subject.model) != sizes(other.model):
    raise ValueError(f'the models have different sizes, {sizes(subject.model)} and {sizes(other.model)}')
  return other


def template(
  subject: Subject, request: schema.TemplateRequest, progress: engine.Progress = engine.silent
) -> schema.TemplateResponse:
  """Returns the nodes of many prompts of one length, their effects averaged, with 95 % bootstrap intervals.

  A node is a component at a position. The intervals are percentiles of the means of prompts drawn with replacement.

  Raises:
    ValueError: the prompts have different numbers of tokens, different SAEs, or are asked different questions; and as
      `engine.debug`.
  """
  analyses = []
  for i, one in enumerate(request.requests):
    progress(0.8 * i / len(request.requests), f'prompt {i + 1} of {len(request.requests)}')
    analyses.append(engine.analyse(subject, one))
    first, last = analyses[0].prepared, analyses[-1].prepared
    if (first.n_tokens, first.saes.keys()) != (last.n_tokens, last.saes.keys()):
      raise ValueError(
        f'prompt {i} has {last.n_tokens} tokens and the first {first.n_tokens}; nodes are matched by position, with '
        'the same SAEs'
      )
    if _asked(first.question) != _asked(last.question):
      raise ValueError(f'prompt {i} is asked about another node, token or kind of objective than the first')
  nodes = list(dict.fromkeys(node for analysis in analyses for node in analysis.nodes))
  progress(0.8, 'averaging')
  columns = [effects.describe(subject.model, analysis.prepared.saes, analysis.run, nodes) for analysis in analyses]
  found = {}
  for name in ('direct', 'total'):
    interval = scores.interval([getattr(column, f'{name}_effect') for column in columns])
    found |= dict(zip((f'{name}_effect', f'{name}_low', f'{name}_high'), interval, strict=True))
  return schema.TemplateResponse(
    request=request, objective=[float(analysis.run.objective) for analysis in analyses], nodes=nodes, **found
  )


def _asked(question: objectives.Question) -> tuple:
  """Returns what is the same in a question about other tokens of the vocabulary."""
  names = ('kind', 'stream', 'layer', 'token', 'source', 'index')
  return *(int(getattr(question, name)) for name in names), *question.through.tolist()
