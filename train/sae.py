"""Trains a sparse autoencoder on a site's activations, from the store or from the live model.

Leaves workdir/sae/final (`models.sae.load_sae` reads it) and workdir/sae/metrics.jsonl. The state, in which the step is
also the position in the data, is checkpointed: stopped and run again, training ends with the same numbers.
"""

import itertools
import math
import time

import jax
import numpy as np

from jax_interp import activations, store, text
from jax_interp.sae import losses, train_step
from models import sae, sharding
from train import capture, command, windows

SAMPLE_TOKENS = 32_768  # for pre_bias and mse_scale, as OpenAI's trainer takes
MULTI_TOPK_RATIO, MULTI_TOPK_WEIGHT = 4, 1 / 8  # L(k) + L(4k) / 8 (Gao et al. 2024)
RECIPES = ('topk', 'multi_topk')
SOURCES = ('store', 'live')


def _objective(settings) -> losses.TopK:
  levels = ((settings.k, 1.0),)
  if settings.recipe == 'multi_topk':
    levels += ((min(MULTI_TOPK_RATIO * settings.k, settings.n_latents), MULTI_TOPK_WEIGHT),)
  return losses.TopK(levels, settings.auxk, settings.auxk_coef, settings.dead_tokens)


def _reader(config, workdir):
  """Returns `read(examples)`, and which tokens are trained on, bool [example, token]: neither padding nor special."""
  site = config.sae.site
  if config.sae.source == 'store':
    saved = capture.open_store(config, workdir)
    saved.width(site)
    return saved.reader(site), saved.keep()
  subject = command.subject(config, workdir)
  windows_et = windows.prepared(config, workdir, subject.tokenizer, 'train')
  windows_et = windows_et[: config.capture.n_tokens // windows_et.shape[1]]
  read = activations.live_reader(subject.model, windows_et, site, config.capture.batch_size, config.capture.dtype)
  return read, text.kept(windows_et, text.special_ids(subject.tokenizer))


def _check(settings):
  for field, known in (('recipe', RECIPES), ('source', SOURCES)):
    if settings[field] not in known:
      raise ValueError(f'sae.{field} {settings[field]!r} is unknown; choose one of {", ".join(known)}')
  sae.check_settings(settings.n_latents, settings.k, settings.normalization)
  sharding.check_divides('sae.batch_size', settings.batch_size, 'data')


def made_with(config, workdir) -> dict:
  """Returns all that the SAE depends on."""
  return {'sae': config.sae, 'seed': config.seed, **capture.made_with(config, workdir)}


def load(config, workdir) -> sae.SparseAutoencoder:
  """Returns what this stage left, on the ambient mesh.

  Raises:
    FileNotFoundError: it is not finished.
    ValueError: it was made with another config.
  """
  command.require(workdir / 'sae', made_with(config, workdir), 'train.sae')
  return sae.load_sae(workdir / 'sae' / 'final')


def run(config, workdir):
  """Trains the SAE, or resumes; says so and returns when it is there.

  Raises:
    ValueError: the SAE there was made with another config, the activations are of another model or site, sizes do not
      fit, or the loss is not finite.
    FileNotFoundError: there are no activations.
  """
  settings, folder = config.sae, workdir / 'sae'
  _check(settings)
  if command.claim(folder, made_with(config, workdir)) and (folder / 'final').exists():
    return
  read, keep_et = _reader(config, workdir)

  def batches(step):
    return activations.shuffled_batches(read, keep_et, settings.batch_size, settings.buffer_examples, config.seed, step)

  sample_bd = np.concatenate(list(itertools.islice(batches(0), math.ceil(SAMPLE_TOKENS / settings.batch_size))))
  key = jax.random.key(config.seed)
  fresh = sae.init_sae(key, sample_bd, settings.n_latents, settings.k, settings.normalization)
  tx = train_step.adam(settings.learning_rate, settings.warmup_steps, settings.adam_eps, settings.clip)
  state = train_step.init_state(fresh, sample_bd, tx, settings.ema)
  if store.latest_step(folder / 'checkpoints') is not None:
    state = store.restore_checkpoint(folder / 'checkpoints', state)
  state = _train(settings, folder, state, tx, batches(int(state.step)))
  sae.save(folder / 'final', train_step.trained_sae(state, settings.ema))
  command.finish(folder)


def _train(settings, folder, state, tx, batches) -> train_step.TrainState:
  objective, checkpoints = _objective(settings), folder / 'checkpoints'
  first, n_steps = int(state.step), math.ceil(settings.tokens / settings.batch_size)
  log = command.MetricsLog(folder / 'metrics.jsonl', first)
  total, initial = (steps * settings.batch_size for steps in (n_steps, first))
  bar, started = command.progress(None, total, 'train.sae', 'tokens', initial), time.time()
  for step in range(first, n_steps, settings.steps_per_dispatch):
    steps = range(step + 1, min(step + settings.steps_per_dispatch, n_steps) + 1)
    acts_sbd = sharding.place(np.stack(list(itertools.islice(batches, len(steps)))), 'step batch d_model')
    state, metrics = train_step.train_steps(state, acts_sbd, tx, objective, settings.ema)
    metrics = jax.device_get(metrics)  # waits for the steps
    if not np.isfinite(metrics['loss']).all():
      raise ValueError(_not_finite(steps[np.isfinite(metrics['loss']).argmin()], checkpoints))
    done = steps[-1]
    tokens_per_s = (done - first) * settings.batch_size / (time.time() - started)
    for i, number in enumerate(steps):
      if number % settings.log_every == 0 or number == n_steps:
        numbers = {name: values[i].item() for name, values in metrics.items()}
        log.write({'step': number, **numbers, 'tokens_per_s': tokens_per_s})
    bar.set_postfix(
      loss=f'{metrics["loss"][-1]:.4f}',
      fvu=f'{metrics["normalized_mse"][-1]:.4f}',
      l0=f'{metrics["l0"][-1]:.1f}',
      dead=metrics['dead'][-1],
      refresh=False,
    )
    bar.update(len(steps) * settings.batch_size)
    stopping = command.stopping()  # asked once: what is said to be saved is saved
    if stopping or done // settings.checkpoint_every > step // settings.checkpoint_every:
      store.save_checkpoint(checkpoints, done, state)
    if stopping and done < n_steps:
      raise command.Stopped(f'step {done} of {n_steps} is saved in {folder}; run the same command to go on')
  bar.close()
  return state


def _not_finite(step, checkpoints) -> str:
  last = store.latest_step(checkpoints)
  kept = 'there is no checkpoint yet' if last is None else f'the last good checkpoint is {checkpoints / str(last)}'
  return f'the loss is not finite at step {step}; {kept}. Lower sae.learning_rate or set sae.clip, in another --workdir'


if __name__ == '__main__':
  command.main(run)
