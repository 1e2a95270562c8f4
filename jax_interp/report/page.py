"""What a run left, as plain data -> one HTML file without a single outside reference, for people to read.

The overview (facts, scores, numbers, training curves) is made here and reads without JavaScript; the components are
JSON inside the page (see `components.embed`), and its script shows one of them at a time.
"""

import collections
import importlib.resources
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

from jax_interp.report import components as components_lib
from jax_interp.report import meanings, plots

METHODS = {
  'token_lookup': 'Token lookup table',
  'neuron2graph': 'Neuron2Graph',
  'token_activation': 'Language model',
}
SCORES = {'ev_correlation': 'Correlation', 'rsquared': 'R²', 'absolute_dev_explained': 'Absolute deviation explained'}
# Whose activations were simulated, and by what -> where `results.summarize` has its scores.
PREDICTIONS = {
  'This explanation': lambda found: found['scores'],
  'This explanation, random excerpts only': lambda found: found['random_only'],
  'Explanation of another': lambda found: found['nulls']['other_explanation'],
  'A constant': lambda found: found['nulls']['constant'],
}
STATUSES = ('ok', 'parse_failed', 'truncated', 'refused', 'failed')
WEAK_MODEL = 'smollm'  # the model of 135 million parameters that stands in where there is no other
DENSITY_AXES = 'log10 of the fraction of tokens on which a latent is active', 'latents'

TRAINED = {'sae': 'the sparse autoencoder', 'lm': 'the language model'}
# Training log -> one plot a line: title, {field: label}.
CURVES = {
  'sae': (
    ('Loss', {'loss': 'loss'}),
    ('Normalized MSE', {'normalized_mse': 'normalized MSE'}),
    ('Dead latents', {'dead': 'dead latents'}),
    ('L0, active latents a token', {'l0': 'L0'}),
  ),
  'lm': (('Loss, nats a token', {'loss': 'train', 'held_out_loss': 'held out'}),),
}


def render(
  *,
  title: str,
  facts: Mapping[str, str],
  made: str,
  command: str,
  missing: Sequence[tuple[str, str]],
  training: Mapping[str, Sequence[Mapping]],
  numbers: Mapping[str, float | None],
  density: tuple[Sequence[float], Sequence[float]] | None,
  summary: Mapping[str, Mapping],
  components: Mapping,
  totals: Mapping[str, int],
  made_from: str = '',
) -> str:
  """Returns the page.

  Args:
    title: its heading.
    facts: what was studied, by name.
    made: when, in words.
    command: the command line that made it.
    missing: (what is not there, the command that makes it).
    training: the logs of 'sae' and 'lm', where there are any: rows with `tokens` and fields of CURVES.
    numbers: what train.evaluate measured, by the names in `meanings.NUMBERS`; others are shown by name.
    density: counts and edges, in log10 of the fraction of tokens, of how often the latents are active.
    summary: explanations/summary.json, by the methods in METHODS; others are shown by name.
    components: as `components.embed` returns them.
    totals: how many 'latent's and 'neuron's there are in all.
    made_from: a hash of what the page was made from, kept in its head.
  """
  files = importlib.resources.files('jax_interp.report')
  text = lambda name: markupsafe.Markup(files.joinpath(name).read_text('utf-8'))
  template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  methods = _methods(summary)
  labels = {name: METHODS.get(name, name) for name in summary}
  shown = collections.Counter(component['kind'] for component in components['components'])
  return template.from_string(text('template.html')).render(
    title=title,
    facts=facts,
    made=made,
    made_from=made_from,
    command=command,
    missing=missing,
    shown={kind: shown[kind] for kind in totals},
    totals=totals,
    methods=methods,
    score_labels=SCORES,
    statuses=[s for s in STATUSES if any(method['statuses'][s] for method in methods)],
    notices=_notices(methods),
    scores_plot=_scores_plot(methods),
    numbers=_number_cards(numbers),
    density_plot=density and markupsafe.Markup(plots.bars(*density, 'How often latents are active', *DENSITY_AXES)),
    training=[{'name': TRAINED[name], 'plots': _curves(name, rows)} for name, rows in training.items()],
    data=markupsafe.Markup(components_lib.dumps({**components, 'methods': labels})),
    css=text('report.css'),
    js=text('heat.js') + text('report.js'),
  )


def _methods(summary):
  """Returns what the tables show of each method: a row for each prediction, a cell for each of SCORES."""
  order = {name: i for i, name in enumerate(METHODS)}
  return [
    {
      'label': METHODS.get(name, name),
      'model': found['model'],
      'statuses': collections.Counter(found['status']),
      'excerpts': collections.Counter(found['excerpts']),
      'rows': [{'label': label, **_row(of(found))} for label, of in PREDICTIONS.items() if of(found)],
    }
    for name, found in sorted(summary.items(), key=lambda item: order.get(item[0], len(order)))
  ]


def _row(means):
  return {'n': max(mean['n'] for mean in means.values()), 'cells': [means.get(score) for score in SCORES]}


def _notices(methods):
  notices = []
  weak = sorted({m['model'] for m in methods if m['model'] and WEAK_MODEL in m['model'].lower()})
  if weak:
    notices.append(
      f'The explanations by {", ".join(weak)} are weak: it is a tiny model that runs anywhere and shows that the whole '
      'path works, not what a language model can explain. Give train.explain a capable one to see that.'
    )
  for method in methods:
    n, ok = sum(method['statuses'].values()), method['statuses']['ok']
    if ok < n:
      notices.append(f'{method["label"]}: {n - ok} of {n} attempts did not end well; means are of what has a score.')
    defined = next((row['cells'][0]['n'] for row in method['rows'][:1] if row['cells'][0]), 0)
    if defined < ok:
      notices.append(
        f'{method["label"]}: for {ok - defined} of {ok} the simulation is the same everywhere, so that there is no '
        'correlation, and the mean correlation is of the others.'
      )
  return notices


def _scores_plot(methods):
  groups = {}
  for method in methods:
    cells = {row['label']: row['cells'][0] for row in method['rows'] if row['cells'][0]}
    correlations = {label: (cell['mean'], cell['low'], cell['high']) for label, cell in cells.items()}
    if correlations:
      groups[method['label']] = correlations
  return groups and markupsafe.Markup(plots.intervals(groups, 'Correlation of simulated with real activations'))


def _number_cards(numbers):
  cards, order = [], {name: i for i, name in enumerate(meanings.NUMBERS)}
  for name in sorted(numbers, key=lambda name: order.get(name, len(order))):
    label, form, meaning = meanings.NUMBERS.get(name, (name.replace('_', ' '), '{:.4g}', ''))
    value = 'not defined' if numbers[name] is None else form.format(numbers[name])
    cards.append({'label': label, 'value': value, 'meaning': meaning})
  return cards


def _curves(name, rows):
  return [
    markupsafe.Markup(plots.curve(rows, 'tokens', fields, title))
    for title, fields in CURVES[name]
    if any(row.get(field) is not None for row in rows for field in fields)
  ]
