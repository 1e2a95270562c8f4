"""Records every latent of the SAE and every MLP neuron of one layer, on the training text.

Leaves workdir/records/{latents,neurons}.{jsonl,npz}, see `jax_interp.records`, and the windows they number,
windows.npy. Padding and special tokens are not recorded. Stopped, it keeps the kind that is finished and begins the
other anew.
"""

import re

import jax
import numpy as np

from jax_interp import records, text
from models import sites
from train import command, windows
from train import sae as train_sae


def made_with(config, workdir) -> dict:
  """Returns all that the records depend on."""
  return {'records': config.records, **train_sae.made_with(config, workdir)}


def _windows(config, workdir, tokenizer) -> np.ndarray:
  """Returns the windows [example, token] to record: of the training text, no two alike, in whole batches.

  Were a window to come twice, an explanation could be scored on what it was made from.
  """
  settings, windows_et = config.records, windows.prepared(config, workdir, tokenizer, 'train')
  windows_et = windows_et[np.sort(np.unique(windows_et, axis=0, return_index=True)[1])]
  n_windows = min(settings.n_windows, len(windows_et)) // settings.batch_size * settings.batch_size
  if not n_windows:
    raise ValueError(
      f'records.n_windows {settings.n_windows} or the {len(windows_et)} windows of text are fewer than '
      f'records.batch_size {settings.batch_size}; shrink the batch'
    )
  return windows_et[:n_windows]


def _write_vectors(model, site, sae) -> jax.Array:
  """Returns what each component adds to the residual stream, [c, d]; `site` is where neurons are, or latents write."""
  layer = re.fullmatch(r'h\.(\d+)\.mlp\.post_act', site)
  c_proj_nd = model.h[int(layer[1])].mlp.c_proj.kernel[...] if layer else None
  if sae is None:
    return c_proj_nd
  return sae.decoder[...] @ c_proj_nd if layer else sae.decoder[...]


def _record_kind(folder, kind, subject, windows_et, site, written, sae, settings, seed):
  def batches(step):
    found = records.batches(subject.model, windows_et, site, sae, batch_size=settings.batch_size)
    n_batches, scale = len(windows_et) // settings.batch_size, settings.batch_size
    for batch in command.progress(found, n_batches, f'train.records: {kind}, pass {step} of 2', 'windows', scale=scale):
      if command.stopping():
        raise command.Stopped(f'{folder} keeps the kinds that are finished; the same command begins {kind} anew')
      yield batch

  keep_et = text.kept(windows_et, text.special_ids(subject.tokenizer))
  survey = records.survey(batches(1), len(windows_et), keep_et)
  selection = records.select(survey.maxima_wc, settings.n_top, settings.n_random, settings.n_quantile, seed)
  max_c = survey.maxima_wc.max(0)
  acts, histogram = records.excerpts(batches(2), selection, windows_et.shape[1], max_c, keep_et)
  promoted, suppressed = records.promoted_tokens(subject.model, _write_vectors(subject.model, written, sae))
  layer = re.match(r'h\.(\d+)\.', site)
  lines = records.neuron_records(
    int(layer[1]) if layer else site,
    selection,
    acts,
    survey.moments,
    windows_et,
    records.token_strings(subject.tokenizer),
  )
  arrays = {
    'top_windows': selection.top,
    'random_windows': selection.random,
    'quantile_windows': selection.quantile,
    'density': survey.density_c,
    'max': max_c,
    'histogram': histogram,
    'edges': np.linspace(0, np.maximum(max_c, 0), records.N_BINS + 1, axis=1),
    'promoted_tokens': promoted,
    'suppressed_tokens': suppressed,
  }
  records.write(folder, kind, command.progress(lines, len(max_c), f'train.records: {kind}, writing', kind), arrays)


def run(config, workdir):
  """Records both kinds, or what is missing of them.

  Raises:
    ValueError: the records there were made with another config, or the text is too short.
    KeyError: there is no such site or layer.
  """
  folder, settings = workdir / 'records', config.records
  if command.claim(folder, made_with(config, workdir)):
    return
  subject = command.subject(config, workdir)
  windows_et = _windows(config, workdir, subject.tokenizer)
  neurons = f'h.{settings.neurons_layer}.mlp.post_act'
  kinds = {  # where they are, where they write, and the SAE
    'latents': (config.sae.site, config.sae.get('target_site') or config.sae.site, train_sae.load(config, workdir)),
    'neurons': (neurons, neurons, None),
  }
  sites.site_shapes(subject.model, windows_et[: settings.batch_size], tuple(site for site, *_ in kinds.values()))
  # Only now that nothing speaks against the settings; the same in every run, so a torn one is mended by the next.
  np.save(folder / 'windows.npy', windows_et)
  for kind, (site, written, sae) in kinds.items():
    if not (folder / f'{kind}.npz').exists():
      _record_kind(folder, kind, subject, windows_et, site, written, sae, settings, config.seed)
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
