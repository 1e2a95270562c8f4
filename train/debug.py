"""One question over many prompts of a template: which nodes matter on average, and a circuit, checked by ablation.

Takes config.debug and a model; prints tables, and leaves workdir/debug/answer.json, every answer with its request, and
heads.png, what each attention head really does: the objective without its ablation minus with it.
"""

import dataclasses
import string

import numpy as np
from matplotlib import figure

from jax_interp import store
from jax_interp.debugger import circuits, compare, engine, interventions, schema, subject
from train import command

KINDS = 'head_token', 'neuron', 'layer'  # that are printed
N_PRINTED = 8


def prompts(settings, tokenizer, rng: np.random.Generator) -> list[dict[str, str]]:
  """Returns `settings.n_prompts` times {'prompt', 'counterfactual', 'target', 'distractor'}, all of one length.

  Raises:
    ValueError: a field of the template has no values, or too few of one token; or there are too few prompts, or they
      differ in length.
  """
  if settings.n_prompts < 2:
    raise ValueError(f'debug.n_prompts is {settings.n_prompts}; give 2 or more, that there is an interval of a mean')
  texts = {name: settings[name] for name in ('template', 'counterfactual', 'target', 'distractor')}
  used = {field for text in texts.values() for _, field, _, _ in string.Formatter().parse(text) if field}
  n_tokens = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
  values = {}
  for group in settings.fields:
    names = tuple(group['names'])
    values[names] = [value for value in group['values'] if n_tokens(value) == 1]
    if len(values[names]) < len(names):
      raise ValueError(f'fields {", ".join(names)} have {len(values[names])} values of one token; give more')
  if missing := used - {name for names in values for name in names}:
    raise ValueError(f'the templates use {sorted(missing)}, of which debug.fields has no values')
  found = []
  for _ in range(settings.n_prompts):
    drawn = {}
    for names, of_one_token in values.items():
      drawn |= dict(zip(names, rng.permutation(of_one_token)[: len(names)].tolist(), strict=True))
    filled = {name: text.format(**drawn) for name, text in texts.items()}
    found.append({'prompt': filled.pop('template'), **filled})
  lengths = {n_tokens(one[name]) for one in found for name in ('prompt', 'counterfactual')}
  if len(lengths) > 1:
    raise ValueError(f'prompts and counterfactuals have {sorted(lengths)} tokens; they must all have as many')
  return found


def _requests(found, k):
  return [
    schema.Request(
      prompt=one['prompt'],
      objective=schema.LogitDifference(targets=[one['target']], distractors=[one['distractor']]),
      k=k,
      n_tokens=0,
    )
    for one in found
  ]


def _stop_if_asked():
  if command.stopping():
    raise command.Stopped('nothing is saved: run the same command again')


def _shown_by(bar) -> engine.Progress:
  """Returns progress that a bar of 100 shows."""

  def progress(share, what):
    _stop_if_asked()
    bar.update(int(100 * share) - bar.n)

  return progress


def measured_heads(debugged: subject.Subject, requests, found) -> np.ndarray:
  """Returns [layer, head]: the mean over prompts of the objective minus that with the head as in the counterfactual."""
  config = debugged.model.config
  effects_lh = np.zeros((config.n_layer, config.n_head))
  with command.progress(None, len(requests) * effects_lh.size, 'train.debug: heads', 'ablations') as bar:
    for request, one in zip(requests, found, strict=True):
      prepared = engine.prepare(debugged, request)
      clean = engine.value(debugged, prepared)
      to, saes = schema.OtherPrompt(prompt=one['counterfactual']), prepared.saes
      other = engine.other_acts(debugged, saes, to, prepared.n_tokens)
      for layer, head in np.ndindex(effects_lh.shape):
        _stop_if_asked()
        ablation = schema.Ablation(kind='head', layer=layer, index=head, to=to)
        held = interventions.held(
          debugged, [*request.ablations, ablation], prepared.n_tokens, tuple(saes), {to: other}.__getitem__
        )
        lost = clean - engine.value(debugged, dataclasses.replace(prepared, held=held))
        effects_lh[layer, head] += lost / len(requests)
        bar.update()
  return effects_lh


def _draw(effects_lh, path):
  size = np.abs(effects_lh).max()
  canvas = figure.Figure(figsize=(1.5 + 0.45 * effects_lh.shape[1], 1.2 + 0.3 * len(effects_lh)), layout='constrained')
  axes = canvas.subplots()
  image = axes.imshow(effects_lh, cmap='RdBu', vmin=-size, vmax=size, aspect='auto')
  axes.set(xlabel='head', ylabel='layer', title='objective lost with the head as in the counterfactual')
  canvas.colorbar(image, ax=axes)
  canvas.savefig(path, dpi=150)


def _print(template: schema.TemplateResponse):
  for kind in KINDS:
    rows = [i for i, node in enumerate(template.nodes) if node.kind == kind]
    rows = sorted(rows, key=lambda i: -abs(template.total_effect[i]))[:N_PRINTED]
    print(f'\n{kind:24} {"direct":>8}   {"total":>8}   (95 % interval)')
    for i in rows:
      interval = f'({template.total_low[i]:.2f} to {template.total_high[i]:.2f})'
      print(
        f'{template.nodes[i].label:24} {template.direct_effect[i]:8.2f}   {template.total_effect[i]:8.2f}   {interval}'
      )


def run(config, workdir):
  """Asks, or returns when that is done.

  Raises:
    ValueError: as `prompts`; there is no config.debug, or the workdir was made with another config.
  """
  if 'debug' not in config:
    raise ValueError('config.debug is missing: it says what is asked; copy it from configs/brackets.py')
  settings, folder = config.debug, workdir / 'debug'
  loaded = command.subject(config, workdir)
  made_with = {'model': config.model, 'fingerprint': loaded.fingerprint, 'debug': settings, 'seed': config.seed}
  found = prompts(settings, loaded.tokenizer, np.random.default_rng(config.seed))
  requests = _requests(found, settings.k)
  asked = schema.CircuitRequest(
    request=requests[0],
    counterfactual=schema.OtherPrompt(prompt=found[0]['counterfactual']),
    n_edges=settings.n_edges,
    steps=settings.steps,
  )
  if command.claim(folder, made_with):
    return
  debugged = subject.Subject(loaded.model, loaded.tokenizer, name=loaded.source)
  print(f'{found[0]["prompt"]!r} -> {found[0]["target"]!r} and not {found[0]["distractor"]!r}')

  with command.progress(None, 100, 'train.debug: nodes', '%') as bar:
    template = compare.template(debugged, schema.TemplateRequest(requests=requests), _shown_by(bar))
  objective = np.array(template.objective)
  print(f'logit difference {objective.mean():.3f}, above 0 in {(objective > 0).sum()} of {len(objective)}')
  _print(template)
  effects_lh = measured_heads(debugged, requests, found)
  order = np.argsort(-np.abs(effects_lh), axis=None)[:N_PRINTED]
  print('\nheads as in the counterfactual, what is lost of the logit difference')
  for layer, head in zip(*np.unravel_index(order, effects_lh.shape), strict=True):
    print(f'h.{layer}.attn.{head:<16} {effects_lh[layer, head]:8.2f}')

  with command.progress(None, 100, 'train.debug: circuit', '%') as bar:
    circuit = circuits.find(debugged, asked, _shown_by(bar))
  share = lambda x: 'undefined' if x is None else f'{x:.3f}'  # where cutting all edges changes nothing
  print(
    f'\na circuit of {len(circuit.edges)} of {circuit.n_possible} edges on the first prompt: faithfulness '
    f'{share(circuit.faithfulness)}, completeness {share(circuit.completeness)}'
  )
  for edge in circuit.edges[:N_PRINTED]:
    lost = '' if edge.measured is None else f'   lost without it {edge.measured:8.2f}'
    print(f'{edge.writer:14} -> {edge.reader:14} {edge.score:8.2f}{lost}')
  answers = {'template': template, 'circuit': circuit}
  answers = {name: answer.model_dump(mode='json') for name, answer in answers.items()}
  _draw(effects_lh, folder / 'heads.png')
  store.write_json(folder / 'answer.json', answers | {'measured_heads': effects_lh.tolist()})
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
