"""Evaluates every SAE of a sweep on held-out text and sets them side by side: one table, one plot.

Leaves workdir/comparison/metrics.json, table.md and frontier.png: normalized MSE against L0 of every recipe, of the
activations as the model has them, since SAEs may normalise their inputs differently. A TopK SAE is also decoded with
other numbers of latents than it was trained for (progressive recovery, section 5.1 of Gao et al. 2024).
"""

import itertools

import numpy as np
from matplotlib import figure

from jax_interp import activations, store, text
from jax_interp.evals import reconstruction
from models import sae as sae_lib
from models.activation_functions import TopK
from train import command, sweep, windows
from train import sae as train_sae

OTHER_KS = (1 / 4, 1 / 2, 1, 2, 4)  # of the k that a TopK SAE was trained for
COLUMNS = ('normalized_mse', 'l0', 'dead_latent_fraction', 'l2_ratio')
MARKERS = 'osD^vP*Xph<>'


def measure(sae: sae_lib.SparseAutoencoder, x_nbtd: np.ndarray, keep_nbt: np.ndarray) -> dict[str, float]:
  """Returns the metrics of `evals.reconstruction` that are numbers, over batches of activations [n, b, t, d].

  The normalized MSE is 1 - explained_variance, whatever the SAE's normalisation.
  """
  *_, sums = reconstruction.measure(sae, zip(x_nbtd, keep_nbt, strict=True))
  numbers = {name: value for name, value in reconstruction.metrics(sums) if isinstance(value, float)}
  return numbers | {'normalized_mse': 1 - numbers['explained_variance']}


def at_other_ks(sae: sae_lib.SparseAutoencoder, x_nbtd: np.ndarray, keep_nbt: np.ndarray) -> dict[int, float]:
  """Returns {k: normalized MSE} of a TopK SAE decoding with fewer and more latents than its own k; {} of others."""
  if sae.k is None:
    return {}
  ks = dict.fromkeys(min(max(1, round(ratio * sae.k)), sae.n_latents) for ratio in OTHER_KS)
  with_k = lambda k: sae_lib.with_activation(sae, TopK(k))
  return {k: measure(with_k(k), x_nbtd, keep_nbt)['normalized_mse'] for k in ks}


def table(results: dict[str, dict]) -> str:
  """Returns the results in Markdown, sorted by recipe, latents and L0."""
  order = sorted(results, key=lambda name: [results[name][key] for key in ('recipe', 'n_latents', 'l0')])
  lines = ['| recipe | latents | ' + ' | '.join(COLUMNS) + ' | normalized MSE with k latents |']
  lines.append('|---' * (len(COLUMNS) + 3) + '|')
  for name in order:
    row = results[name]
    others = ', '.join(f'{k}: {value:.3f}' for k, value in row['at_other_ks'].items())
    numbers = ' | '.join(f'{row[column]:.3f}' for column in COLUMNS)
    lines.append(f'| {row["recipe"]} | {row["n_latents"]} | {numbers} | {others} |')
  return '\n'.join(lines)


def draw(results: dict[str, dict], path):
  """Draws normalized MSE against L0, a line for each recipe and number of latents."""
  canvas = figure.Figure(figsize=(7, 4.5), layout='constrained')
  axes = canvas.subplots()
  kind = lambda row: (row['recipe'], row['n_latents'])
  rows = sorted(results.values(), key=lambda row: (*kind(row), row['l0']))
  for marker, (label, line) in zip(itertools.cycle(MARKERS), itertools.groupby(rows, kind), strict=False):
    points = [(row['l0'], row['normalized_mse']) for row in line]
    axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=f'{label[0]}, {label[1]:,} latents')
  axes.set(xscale='log', yscale='log', xlabel='L0: latents that are on at a token', ylabel='normalized MSE, held out')
  axes.grid(which='both', alpha=0.3)
  axes.legend(fontsize=8)
  canvas.savefig(path, dpi=150)


def run(config, workdir):
  """Compares the SAEs of config.sae.sweep that have not diverged, or returns when that is done.

  Raises:
    ValueError: there is no sweep, SAEs of it are transcoders, or the workdir was made with another config.
    FileNotFoundError: train.sae is not finished.
  """
  members, folder = sweep.members(config), workdir / 'comparison'
  if list(members) == ['']:
    raise ValueError('config.sae.sweep is empty, so there is nothing to compare; configs/recipes_sweep.py has one')
  if others := [name for name, settings in members.items() if settings.get('target_site')]:
    raise ValueError(f'{others[0]} is a transcoder, which has no reconstruction of its own site to compare')
  if config.evaluate.n_tokens < config.evaluate.batch_size * config.text.window:
    raise ValueError(
      f'evaluate.n_tokens {config.evaluate.n_tokens} is less than a batch, evaluate.batch_size '
      f'{config.evaluate.batch_size} x text.window {config.text.window}; give more'
    )
  if command.claim(folder, {'evaluate': config.evaluate, **train_sae.made_with(config, workdir)}):
    return
  command.require(workdir / 'sae', train_sae.made_with(config, workdir), 'train.sae')
  subject = command.subject(config, workdir)
  windows_et = windows.prepared(config, workdir, subject.tokenizer, 'held_out')
  n_batches = min(config.evaluate.n_tokens, windows_et.size) // (config.evaluate.batch_size * windows_et.shape[1])
  windows_et = windows_et[: n_batches * config.evaluate.batch_size]
  keep_nbt = text.kept(windows_et, text.special_ids(subject.tokenizer)).reshape(n_batches, -1, windows_et.shape[1])
  diverged = {name: why for name in members if (why := train_sae.diverged(workdir, name))}
  members = {name: settings for name, settings in members.items() if name not in diverged}
  sites = tuple(dict.fromkeys(settings.site for settings in members.values()))
  captured = activations.stream(subject.model, windows_et, sites, config.evaluate.batch_size)
  acts = {site: [] for site in sites}
  for _, found in captured:
    for site, x_btd in found.items():
      acts[site].append(x_btd)
  results = {}
  with command.progress(members.items(), len(members), 'train.compare', 'SAEs') as bar:
    for name, settings in bar:
      sae = sae_lib.load_sae(sweep.folder(workdir, name) / 'sae' / 'final')
      numbers = measure(sae, acts[settings.site], keep_nbt)
      bar.set_postfix(fvu=f'{numbers["normalized_mse"]:.4f}', l0=f'{numbers["l0"]:.1f}', refresh=False)
      others = at_other_ks(sae, acts[settings.site], keep_nbt)
      results[name] = {'recipe': settings.recipe, 'n_latents': sae.n_latents, **numbers, 'at_other_ks': others}
      if command.stopping():
        raise command.Stopped('nothing is saved: comparing is short; run the same command again')
  lines = [table(results), *(f'\n{name} has no SAE: {why}' for name, why in diverged.items())]
  print('\n'.join(lines))
  draw(results, folder / 'frontier.png')
  store.write_lines(folder / 'table.md', lines)
  store.write_json(folder / 'metrics.json', results)
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
