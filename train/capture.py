"""Captures the subject model's activations on the training text into a store.

Leaves the store in workdir/activations, or at config.capture.store (a folder, gs://..., s3://...), and beside it
capture.json: what the store is of, and how fast it was captured. Stopped, it keeps the finished shards; run again, it
captures those that are missing or damaged. Several processes capture together, each its own shards, and leave the same
files as one: see the flags of `train.command`.
"""

import contextlib
import hashlib
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jax_interp import activations, store, text
from models import sharding, sites
from train import command, processes, throughput, windows

REPORT = 'capture.json'
CAUSES = ('text', 'device', 'disk')  # what is waited for


def made_with(config, workdir) -> dict:
  """Returns all that the activations depend on."""
  return {'capture': config.capture, **command.made_from(config, workdir)}


def open_store(config, workdir) -> store.ActivationStore:
  """Opens what this stage left.

  Raises:
    FileNotFoundError: it is not finished.
    ValueError: it was made with another config or of another model, or has lost shards since.
  """
  command.require(workdir / 'activations', made_with(config, workdir), 'train.capture')
  saved = _open(config, workdir)
  if missing := saved.missing():
    raise ValueError(
      f'{len(missing)} of {saved.n_shards} shards in {saved.where} are missing or damaged, {missing[0]} for one; run '
      'train.capture again: it captures those anew'
    )
  return saved


def _where(config, workdir):
  return config.capture.store or workdir / 'activations'


def _open(config, workdir) -> store.ActivationStore:
  report = json.loads((workdir / 'activations' / REPORT).read_text('utf-8'))
  return store.ActivationStore.open(_where(config, workdir), **report['store'])


def _is_done(config, workdir, made) -> bool:
  if not command.claim(workdir / 'activations', made):
    return False
  try:
    return not _open(config, workdir).missing()
  except FileNotFoundError:  # somebody has deleted the store
    return False


def _check_sizes(settings):
  if settings.shard_examples % settings.batch_size:
    raise ValueError(
      f'capture.shard_examples {settings.shard_examples} is not divisible by capture.batch_size {settings.batch_size}; '
      'choose a multiple'
    )
  sharding.check_divides('capture.batch_size', settings.batch_size, 'data')
  processes.part()  # tells where a process has none of the mesh
  activations.local_batch(settings.batch_size)


def _digest(content) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _site_shapes(model, names, batch_size, n_tokens):
  tokens_bt = jax.ShapeDtypeStruct((batch_size, n_tokens), jnp.int32)
  shapes = {site: x.shape for site, x in sites.site_shapes(model, tokens_bt, names).items()}
  for site, shape in shapes.items():
    if shape[:2] != (batch_size, n_tokens):
      raise ValueError(
        f'{site} has the shape {shape}, not [batch, token, ...], and cannot be stored; choose other sites'
      )
  return {site: shape[2:] for site, shape in shapes.items()}


def _create(config, workdir, subject, windows_et, shapes) -> store.ActivationStore:
  return store.ActivationStore.create(
    _where(config, workdir),
    shapes,
    len(windows_et),
    windows_et.shape[1],
    config.capture.shard_examples,
    config.capture.dtype,
    text.special_ids(subject.tokenizer),
    model=subject.fingerprint,
    tokenizer=_digest(json.dumps(sorted(subject.tokenizer.get_vocab().items())).encode()),
    dataset=_digest(windows_et),
  )


def _report(meter, n_tokens, peak) -> dict:
  """Returns how fast `n_tokens` were captured; what was waited for is the mean of all processes."""
  seconds, waits = meter.seconds, np.array([meter.waiting[cause] for cause in CAUSES], np.float32)
  shares = multihost_utils.process_allgather(waits).mean(0) / seconds
  return {
    'tokens': n_tokens,
    'seconds': seconds,
    'tokens_per_s': n_tokens / seconds,
    'mfu': meter.flops * meter.batches / seconds / peak[0],
    'waiting': dict(zip(CAUSES, shares.tolist(), strict=True)),
    'flops_per_batch': meter.flops,
    'peak_flops': peak[0],
    'peak_is': peak[1],
    'devices': jax.sharding.get_mesh().size,
    'processes': jax.process_count(),
  }


def _status(meter, peak) -> str:
  seconds = meter.seconds or math.nan
  shares = ', '.join(f'{cause} {meter.waiting[cause] / seconds:.0%}' for cause in CAUSES)
  return f'MFU {meter.flops * meter.batches / seconds / peak[0]:.0%}, waiting for {shares}'


def _line(report) -> str:
  waiting = ', '.join(f'{cause} {share:.0%}' for cause, share in report['waiting'].items())
  return (
    f'{report["tokens"]:,} tokens in {report["seconds"]:.1f} s: {report["tokens_per_s"]:,.0f} tokens/s, MFU '
    f'{report["mfu"]:.0%} (peak {report["peak_flops"] / 1e12:.4g} TFLOP/s, {report["peak_is"]}), waiting for {waiting}'
  )


def _firsts(saved, shards, n_local) -> list[int]:
  """Returns where each batch begins of a process that captures these shards."""
  return [first for shard in shards for first in range(saved.shard(shard).start, saved.shard(shard).stop, n_local)]


def _capture(model, windows_et, saved, names, batch_size, missing) -> dict:
  """Captures the missing shards, dealt to the processes, and reports how fast.

  What is finished stays, whatever happens to the rest. All processes take as many steps, and all stop at the same one.
  """
  n_local, n_processes = activations.local_batch(batch_size), jax.process_count()
  dealt = [_firsts(saved, missing[process::n_processes], n_local) for process in range(n_processes)]
  # Each step: where the batches of all processes begin, past the end where there is nothing left to do.
  steps = list(itertools.zip_longest(*dealt, fillvalue=len(windows_et)))
  n_examples = lambda firsts: sum(len(windows_et[first : first + n_local]) for first in firsts)
  meter, problem, question = activations.Meter(), None, None
  mine = [firsts[jax.process_index()] for firsts in steps]
  batches = activations.stream(model, windows_et, names, batch_size, mine, saved.manifest['dtype'], meter)
  peak = throughput.peak(max(jax.tree.leaves(model), key=lambda leaf: leaf.size).dtype.name)
  n_tokens = sum(map(n_examples, steps)) * saved.n_tokens
  bar = command.progress(None, windows_et.size, 'train.capture', 'tokens', windows_et.size - n_tokens)
  with bar, processes.together(), store.Writer(saved, meter) as writer:
    for firsts in steps:
      if question is not None and processes.answer(question):
        break
      question = processes.ask(problem)
      if problem is None:
        try:
          if command.stopping():
            raise command.Stopped(f'finished shards are kept in {saved.where}; run the same command to go on')
          first, acts = next(batches)
          writer.add(first, windows_et[first : first + n_local], acts)
        except processes.PROBLEMS as e:
          problem = e
      bar.set_postfix_str(_status(meter, peak), refresh=False)
      bar.update(n_examples(firsts) * saved.n_tokens)
    if problem:
      raise problem
  return _report(meter, n_tokens, peak)


def run(config, workdir):
  """Captures what is missing of the store; says so and returns when nothing is.

  Raises:
    KeyError: a site is misspelt.
    ValueError: another store is there, or is being written; sizes do not divide; a token is outside the vocabulary; an
      activation is not finite.
    OSError: no space is left.
  """
  settings, folder, where = config.capture, workdir / 'activations', _where(config, workdir)
  processes.agree()  # all are here; the first time they meet, they may not keep each other waiting long
  with processes.together():
    _check_sizes(settings)
    made = made_with(config, workdir)
  same = json.dumps([made, config.mesh], default=lambda settings: settings.to_dict(), sort_keys=True)
  processes.check_same('config or model', _digest(same.encode()))
  with contextlib.ExitStack() as held:
    places = {pathlib.Path(place).resolve() for place in (folder, where) if '://' not in str(place)}
    processes.on_first(lambda: [held.enter_context(processes.locked(place)) for place in sorted(places)])
    if processes.on_first(lambda: _is_done(config, workdir, made)):
      return
    subject, names = command.subject(config, workdir), tuple(settings.sites)
    with processes.together():
      shapes = _site_shapes(subject.model, names, settings.batch_size, config.text.window)
      windows_et = windows.prepared(config, workdir, subject.tokenizer, 'train')
      windows_et = windows_et[: settings.n_tokens // config.text.window]
      if not len(windows_et):
        raise ValueError(
          f'capture.n_tokens {settings.n_tokens} is less than one window of {config.text.window}; raise it'
        )
    manifest = processes.on_first(lambda: _create(config, workdir, subject, windows_et, shapes).manifest)
    with processes.together():
      saved = _open_shared(where, manifest)
    missing, report = processes.on_first(saved.missing), None
    if missing:
      size = windows_et.size * sum(map(math.prod, shapes.values())) * jnp.dtype(settings.dtype).itemsize
      _say(f'{where}: {size / 1e9:.2f} GB at {", ".join(shapes)}; {len(missing)} of {saved.n_shards} shards to capture')
      report = _capture(subject.model, windows_et, saved, names, settings.batch_size, missing)
      _say(_line(report))
    processes.on_first(lambda: _finish(folder, saved, report))


def _open_shared(where, manifest) -> store.ActivationStore:
  try:
    return store.ActivationStore.open(where, **manifest)
  except (FileNotFoundError, ValueError) as e:
    raise ValueError(
      f'{where} is not here what it is for process 0 ({e}); choose a --workdir or capture.store '
      'that all processes share'
    ) from e


def _finish(folder, saved, report):
  if lost := saved.missing():
    raise ValueError(
      f'{len(lost)} of {saved.n_shards} shards, {lost[0]} for one, are not in {saved.where} as process 0 sees it; '
      'choose a --workdir or capture.store that all processes share'
    )
  store.write_json(folder / REPORT, {'store': saved.manifest, 'run': report})
  command.finish(folder)


def _say(message):
  if jax.process_index() == 0:
    print(message)


if __name__ == '__main__':
  command.main(run, several_processes=True)
