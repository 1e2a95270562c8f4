"""Records and explanations of components -> the JSON that the page carries, small enough to sit inside it.

Token texts and whole excerpts are stored once and named by number; activations are three significant digits at the
positions where they are not zero.
"""

import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def describe(
  kind: str,
  site: str,
  index: int,
  record: Mapping,
  arrays: Mapping[str, np.ndarray],
  strings: Sequence[str],
  explanations: Sequence[Mapping],
) -> dict:
  """Returns all that the page shows of a component.

  Args:
    kind: 'latent' or 'neuron'.
    site: where its activations are read.
    index: its number at the site.
    record: its NeuronRecord.
    arrays: as `records.read` gives them, for all components of the kind.
    strings: the text of every token id.
    explanations: its lines of explanations/<method>.jsonl.
  """
  of = lambda name: arrays[name][index].tolist()
  return {
    'kind': kind,
    'site': site,
    'index': index,
    'density': of('density'),
    'max': of('max'),
    'mean': record['mean'],
    'histogram': {'counts': of('histogram'), 'edges': of('edges')},
    'promoted': [strings[i] for i in of('promoted_tokens')],
    'suppressed': [strings[i] for i in of('suppressed_tokens')],
    'quantile_boundaries': record['quantile_boundaries'],
    'top': record['most_positive_activation_records'],
    'random': record['random_sample'],
    'quantiles': record['random_sample_by_quantile'] or [],
    'explanations': [{k: v for k, v in e.items() if k != 'component'} for e in explanations],
  }


def embed(components: Iterable[Mapping], max_bytes: int) -> dict:
  """Returns {'tokens', 'texts', 'components'} as the page's script reads them: the first components that fit.

  `tokens` are texts of tokens, `texts` are excerpts as numbers of tokens, and an excerpt is {'text': its number,
  'values': [positions, values]}; a value that is not known is null.

  Args:
    components: what `describe` returns, the most wanted first.
    max_bytes: where to stop, as JSON.
  """
  tokens, texts = _numbering(), _numbering()
  kept, size, n_texts = [], 0, 0
  for component in components:
    small = _compact(component, lambda excerpt: texts[tuple(tokens[token] for token in excerpt)])
    size += len(dumps(small)) + sum(len(dumps(text)) for text in list(texts)[n_texts:])
    if size > max_bytes:
      break
    n_texts = len(texts)
    kept.append(small)
  return {'tokens': list(tokens), 'texts': list(texts)[:n_texts], 'components': kept}


def dumps(value) -> str:
  """Returns JSON that may stand inside a <script>: no `<` is left, so nothing in it closes or opens an element.

  Raises:
    ValueError: a number is not finite; say null.
  """
  return json.dumps(value, ensure_ascii=False, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')


def _numbering() -> collections.defaultdict:
  """Returns a dict that numbers its keys in the order in which they are first asked for."""
  numbers = collections.defaultdict()
  numbers.default_factory = numbers.__len__
  return numbers


def _compact(component: Mapping, text_number) -> dict:
  def excerpt(record):
    return {'text': text_number(record['tokens']), 'values': _sparse(record['activations'])}

  def sequence(scored):
    true, simulated = _sparse(scored['true']), _sparse(scored['simulated'])
    return {'split': scored['split'], 'text': text_number(scored['tokens']), 'true': true, 'simulated': simulated}

  small = {
    **component,
    'top': [excerpt(r) for r in component['top']],
    'random': [excerpt(r) for r in component['random']],
    'quantiles': [[excerpt(r) for r in part] for part in component['quantiles']],
    'explanations': [
      {**e, 'sequences': [sequence(s) for s in e.get('sequences') or []]} for e in component['explanations']
    ],
  }
  return _rounded(small)


def _sparse(values: Sequence[float | None]) -> list[list]:
  positions = [i for i, value in enumerate(values) if value != 0]
  return [positions, [values[i] for i in positions]]


def _rounded(value):
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  if isinstance(value, float):
    return float(f'{value:.3g}') if math.isfinite(value) else None
  return value
