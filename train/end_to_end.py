"""Trains workdir/sae/final on, end to end: by what the subject model says with the reconstruction in its place.

Leaves workdir/end_to_end/final, which `models.sae.load_sae` reads, and metrics.jsonl. A batch is a function of the seed
and the step, so the state, which is checkpointed, holds the position in the text: killed at any moment and run again,
it ends with the same numbers. The loss is that of `end_to_end.EndToEnd`, of which AuxK is no part: of config.sae, auxk
and auxk_coef mean nothing here.
"""

import dataclasses

import numpy as np

from jax_interp import activations, store, text
from jax_interp.sae import end_to_end, optimizer, train_step
from models import sae as sae_lib
from models import sharding
from train import command, processes, windows
from train import sae as train_sae


def order(n_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
  """Returns the windows [batch_size] of a step: every epoch in another order, the last of it too few for a batch."""
  per_epoch = n_windows // batch_size
  epoch, number = divmod(step, per_epoch)
  shuffled = np.random.default_rng((seed, epoch)).permutation(n_windows)
  return shuffled[number * batch_size : (number + 1) * batch_size]


def run(config, workdir):
  """Trains, or resumes; says so and returns when it is there.

  Raises:
    ValueError: the workdir was made with another config; there is too little text for a batch; the SAE cannot be
      trained so, see `end_to_end.EndToEnd`; or the loss is not finite.
    FileNotFoundError: train.sae is not finished.
  """
  if 'end_to_end' not in config:
    raise ValueError('config.end_to_end is missing: it says how to train; copy it from configs/tiny.py')
  settings, folder, site = config.end_to_end, workdir / 'end_to_end', config.sae.site
  objective = end_to_end.EndToEnd(
    site, settings.divergence, settings.mse_coef, settings.l1_coef, config.sae.get('dead_tokens', 10_000_000)
  )
  sharding.check_divides('end_to_end.batch_size', settings.batch_size, 'data')
  if command.claim(folder, {'end_to_end': settings, **train_sae.made_with(config, workdir)}):
    return
  started_from, subject = train_sae.load(config, workdir), command.subject(config, workdir)
  objective = dataclasses.replace(objective, unit_norm=sae_lib.has_unit_rows(started_from))
  windows_et = windows.prepared(config, workdir, subject.tokenizer, 'train')
  keep_et = text.kept(windows_et, text.special_ids(subject.tokenizer))
  if len(windows_et) < settings.batch_size:
    raise ValueError(f'end_to_end.batch_size {settings.batch_size} is more than the {len(windows_et)} windows of text')
  chosen = order(len(windows_et), settings.batch_size, config.seed, 0)
  ((_, acts),) = activations.stream(subject.model, windows_et[chosen], (site,), settings.batch_size)
  sample_bd = np.asarray(acts[site], np.float32)[keep_et[chosen]]
  tx = optimizer.adam(settings.learning_rate, settings.warmup_steps, clip=settings.clip)
  state = train_step.init_state(started_from, sample_bd, tx)
  with processes.locked(folder), store.Checkpoints(folder / 'checkpoints') as checkpoints:
    if checkpoints.steps():
      state = checkpoints.restore(state)
    state = _train(config, subject.model, windows_et, keep_et, state, tx, objective, checkpoints, folder)
  sae_lib.save(folder / 'final', state.sae)
  command.finish(folder)


def _train(config, model, windows_et, keep_et, state, tx, objective, checkpoints, folder):
  settings, first = config.end_to_end, int(state.step)
  log = command.MetricsLog(folder / 'metrics.jsonl', first)
  tokens = settings.batch_size * windows_et.shape[1]
  with command.progress(None, settings.steps * tokens, 'train.end_to_end', 'tokens', first * tokens) as bar:
    for step in range(first, settings.steps):
      chosen = order(len(windows_et), settings.batch_size, config.seed, step)
      tokens_bt = sharding.place(np.maximum(windows_et[chosen], 0), 'batch token')
      keep_bt = sharding.place(keep_et[chosen], 'batch token')
      state, metrics = end_to_end.train(state, model, tokens_bt, keep_bt, tx, objective)
      numbers = {name: value.item() for name, value in metrics.items()}
      # A loss tells of the weights before the step, the gradients' norm of those after it.
      if not np.isfinite([numbers['loss'], numbers['grad_norm']]).all():
        last = checkpoints.steps()
        kept = f'the last checkpoint is {folder / "checkpoints" / str(last[-1])}' if last else 'there is no checkpoint'
        raise ValueError(f'the loss is not finite at step {step + 1}; {kept}. Lower end_to_end.learning_rate')
      log.write({'step': step + 1, **numbers})
      bar.set_postfix(kl=f'{numbers["kl"]:.4f}', fvu=f'{numbers["normalized_mse"]:.4f}', refresh=False)
      bar.update(tokens)
      stopping = command.stopping()  # asked once: what is said to be saved is saved
      if stopping or (step + 1) % settings.checkpoint_every == 0:
        checkpoints.save(step + 1, state)
      if stopping and step + 1 < settings.steps:
        checkpoints.wait()
        raise command.Stopped(
          f'step {step + 1} of {settings.steps} is saved in {folder}; run the same command to go on'
        )
  return state


if __name__ == '__main__':
  command.main(run)
