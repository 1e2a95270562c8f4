"""Evaluates the SAE on held-out text: how well it reconstructs, and what its reconstruction does to the subject model.

Leaves workdir/evaluation/metrics.json, {name: number or list}; `jax_interp.evals` says what each name means.
"""

import numpy as np

from jax_interp import activations, store, text
from jax_interp.evals import downstream, reconstruction
from train import command, windows
from train import sae as train_sae


def _last(sums, number, step, windows_et, batch_size):
  """Returns the last of the sums, with a progress line that shows a number of the sums so far."""
  with command.progress(None, windows_et.size, f'train.evaluate, {step} of 2', 'tokens') as bar:
    for so_far in sums:
      bar.set_postfix(number(so_far), refresh=False)
      bar.update(batch_size * windows_et.shape[1])
      if command.stopping():
        raise command.Stopped('nothing is saved: the evaluation is short; run the same command again')
  return so_far


def evaluate(model, sae, site, windows_et, special_ids, batch_size):
  """Yields (name, value) of every metric.

  Args:
    model: the subject model, on the ambient mesh.
    sae: of the site, on the ambient mesh.
    site: its name.
    windows_et: held-out tokens [example, token], a multiple of batch_size of them.
    special_ids: of tokens that, as padding, are neither reconstructed nor counted, such as the end of a document.
    batch_size: windows a batch.
  """
  tokens_nbt = windows_et.reshape(-1, batch_size, windows_et.shape[1])
  keep_nbt = text.kept(tokens_nbt, special_ids)
  captured = (acts[site] for _, acts in activations.stream(model, windows_et, (site,), batch_size))
  sums = reconstruction.measure(sae, zip(captured, keep_nbt, strict=True))
  sums = _last(sums, lambda sums: {'l0': f'{sums["fired_l"].sum() / sums["tokens"]:.1f}'}, 1, windows_et, batch_size)
  yield from reconstruction.metrics(sums)
  mean_d = sums['x_d'] / sums['tokens']
  sums = downstream.measure(model, sae, site, mean_d, zip(np.maximum(tokens_nbt, 0), keep_nbt, strict=True))
  increase = lambda sums: (sums['loss_spliced'] - sums['loss_clean']) / sums['predictions']
  sums = _last(sums, lambda sums: {'loss_increase': f'{increase(sums):.4f}'}, 2, windows_et, batch_size)
  yield from downstream.metrics(sums)


def run(config, workdir):
  """Evaluates workdir/sae/final, or returns when that is done.

  Raises:
    FileNotFoundError: there is no SAE.
    ValueError: it or the evaluation was made with another config, it is a transcoder, or the held-out text is too
      short.
  """
  settings, folder, site = config.evaluate, workdir / 'evaluation', config.sae.site
  if target := config.sae.get('target_site'):
    raise ValueError(
      f'a transcoder gives back {target} and not {site} that it reads, so it is not evaluated; its errors are in '
      f'{workdir}/sae/metrics.jsonl'
    )
  if command.claim(folder, {'evaluate': settings, **train_sae.made_with(config, workdir)}):
    return
  subject = command.subject(config, workdir)
  sae = train_sae.load(config, workdir)
  windows_et = windows.prepared(config, workdir, subject.tokenizer, 'held_out')
  n_batches = min(settings.n_tokens, windows_et.size) // (settings.batch_size * config.text.window)
  if not n_batches:
    raise ValueError(
      f'one batch is evaluate.batch_size {settings.batch_size} x text.window {config.text.window} tokens, more than '
      f'evaluate.n_tokens {settings.n_tokens} or the {windows_et.size} of the held-out text; shrink the batch'
    )
  windows_et = windows_et[: n_batches * settings.batch_size]
  found = evaluate(subject.model, sae, site, windows_et, text.special_ids(subject.tokenizer), settings.batch_size)
  numbers = dict(found)
  store.write_json(folder / 'metrics.json', numbers)
  for name, value in numbers.items():
    if isinstance(value, float):
      print(f'{name:28} {value:10.4f}')
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
