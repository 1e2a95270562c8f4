"""Writes workdir/report.html: the run as one page that opens in any browser, without a network.

It takes whatever the other commands left: sae/ and lm/metrics.jsonl, evaluation/metrics.json, records/, explanations/.
What is not there, the page says, with the command that makes it. Made again only when one of these has changed.
"""

import hashlib
import importlib.resources
import json
import shlex
import sys
import time

import ml_collections
import numpy as np

from jax_interp import records, store
from jax_interp.report import components, page
from models import pretrained
from train import command

KINDS = {'latent': 'latents', 'neuron': 'neurons'}
EMBEDDED_MODEL = 'the small GPT-2 that comes with jax_interp'
EMBEDDED_TEXT = 'docstrings of the Python standard library, NumPy, SciPy and JAX'
MAX_BYTES = 8_000_000  # of embedded components: what a browser opens from disk in about a second


def _as_made(config, workdir) -> ml_collections.ConfigDict:
  """Returns the config with the settings that the artefacts were made with, so that the page describes those."""
  settings = config.to_dict()
  for stage, names in (('lm', ('lm',)), ('sae', ('sae', 'model', 'text')), ('records', ('records',))):
    recorded = _read_json(workdir / stage / 'config.json')
    settings |= {name: recorded[name] for name in names if name in recorded}
  return ml_collections.ConfigDict(settings)


def _training(config, workdir):
  """Returns the logs that are there, by name, with the tokens that were seen at every step."""
  batch = {'sae': config.sae.batch_size}
  if 'lm' in config:
    batch['lm'] = config.lm.batch_size * config.lm.n_ctx
  logs = {name: _read_jsonl(workdir / name / 'metrics.jsonl') for name in batch}
  return {name: [row | {'tokens': row['step'] * batch[name]} for row in rows] for name, rows in logs.items() if rows}


def _read_jsonl(path):
  """Returns the values of the lines, without a last one that is torn: the run may still be writing, or was killed."""
  if not path.is_file():
    return []
  with open(path, encoding='utf-8') as file:
    return [json.loads(line) for line in file if line.endswith('\n')]


def _read_json(path):
  return json.loads(path.read_text('utf-8')) if path.is_file() else {}


def _made_from(config, paths) -> str:
  """Returns a hash that changes when an input, the page's code or the settings do."""
  code = [path for path in importlib.resources.files('jax_interp.report').iterdir() if path.is_file()]
  stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted([*paths, *code])]
  return hashlib.sha256(json.dumps([stats, config.to_json()]).encode()).hexdigest()[:16]


def _chosen(explained, density_c, n_more, rng):
  """Returns the numbers of the explained components, and of n_more others that are active."""
  others = np.setdiff1d(np.flatnonzero(density_c > 0), explained)
  return explained, sorted(rng.choice(others, min(n_more, len(others)), replace=False).tolist())


def _components(config, folder, strings, explanations):
  """Returns the components to show, the most wanted first, lazily, and how many there are of each kind."""
  sites = {'latent': config.sae.site, 'neuron': f'h.{config.records.neurons_layer}.mlp.post_act'}
  wanted, totals, read = ([], []), {}, {}
  rng = np.random.default_rng(config.seed)
  for kind, plural in KINDS.items():
    read[kind] = lines, arrays = records.read(folder, plural)
    totals[kind] = len(lines)
    explained = sorted({e['component']['index'] for e in explanations if e['component']['kind'] == kind})
    for part, indices in zip(
      wanted, _chosen(explained, arrays['density'], config.report.n_components, rng), strict=True
    ):
      part.extend((kind, index) for index in indices)

  def described():
    for kind, index in [*wanted[0], *wanted[1]]:
      lines, arrays = read[kind]
      own = [e for e in explanations if e['component']['kind'] == kind and e['component']['index'] == index]
      yield components.describe(kind, sites[kind], index, lines[index], arrays, strings, own)

  return described(), totals


def _facts(config, source, sae_rows, windows_et):
  facts = {
    'Subject model': EMBEDDED_MODEL if source == 'embedded' else source,
    'Text': EMBEDDED_TEXT if config.text.source == 'embedded' else config.text.source,
    'SAE reads': config.sae.site,
    'Latents': f'{config.sae.n_latents:,}',
  }
  if 'k' in config.sae:
    facts['Latents'] += f', of which {config.sae.k} are active on a token'
  if config.sae.get('target_site'):
    facts['SAE reconstructs'] = config.sae.target_site
  if sae_rows:
    facts['SAE trained on'] = f'{sae_rows[-1]["tokens"]:,} tokens'
  if windows_et is not None:
    facts['Excerpts chosen from'] = '{:,} windows of {} tokens of training text'.format(*windows_et.shape)
  return facts


def run(config, workdir):
  """Writes the page, or returns when nothing that it shows has changed."""
  path = workdir / 'report.html'
  folders = [workdir / name for name in ('lm', 'sae', 'evaluation', 'records', 'explanations')]
  inputs = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file()]
  made_from = _made_from(config, inputs)
  if path.is_file() and f'content="{made_from}"' in path.read_text('utf-8')[:2000]:
    print(f'{path} is up to date')
    return
  config = _as_made(config, workdir)
  training = _training(config, workdir)
  numbers = _read_json(workdir / 'evaluation' / 'metrics.json')
  counts, edges = (numbers.pop(f'log10_density_{name}', None) for name in ('counts', 'edges'))
  summary = _read_json(workdir / 'explanations' / 'summary.json')
  explanations = [line for name in summary for line in _read_jsonl(workdir / 'explanations' / f'{name}.jsonl')]
  source = command.subject_source(config, workdir)
  described, totals, windows_et = (), {}, None
  if has_records := all((workdir / 'records' / f'{plural}.npz').is_file() for plural in KINDS.values()):
    windows_et = np.load(workdir / 'records' / 'windows.npy', mmap_mode='r')
    strings = records.token_strings(pretrained.load_tokenizer(source))
    described, totals = _components(config, workdir / 'records', strings, explanations)
  found = {
    'the training of the SAE': ('sae' in training, 'train.sae'),
    'the evaluation': (numbers, 'train.evaluate'),
    'the latents and neurons': (has_records, 'train.records'),
    'the explanations': (summary, 'train.explain'),
  }
  html = page.render(
    title=f'Latents of {config.sae.site}',
    facts=_facts(config, source, training.get('sae'), windows_et),
    made=time.strftime('%d %B %Y, %H:%M'),
    command=shlex.join(['python', *sys.orig_argv[1:]]),
    missing=[(what, f'python -m {module}') for what, (there, module) in found.items() if not there],
    training=training,
    numbers=numbers,
    density=counts and (counts, edges),
    summary=summary,
    components=components.embed(described, MAX_BYTES),
    totals=totals,
    made_from=made_from,
  )
  store.write_lines(path, [html])
  print(f'{path} is ready: {len(html.encode()) / 1e6:.1f} MB')


if __name__ == '__main__':
  command.main(run)
