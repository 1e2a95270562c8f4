"""Captures the subject model's activations on the training text into a store.

Leaves the store in workdir/activations, or at config.capture.store (a folder, gs://..., s3://...). Stopped, it keeps
the finished shards; run again, it captures those that are missing or damaged.
"""

import hashlib
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp import activations, store
from models import sharding, sites
from train import command


def made_with(config, workdir) -> dict:
  """Returns all that the activations depend on."""
  return {'capture': config.capture, **command.made_from(config, workdir)}


def open_store(config, workdir) -> store.ActivationStore:
  """Opens what this stage left.

  Raises:
    FileNotFoundError: it is not finished.
    ValueError: it was made with another config or of another model, or has lost shards since.
  """
  settings = made_with(config, workdir)
  command.require(workdir / 'activations', settings, 'train.capture')
  saved = store.ActivationStore.open(_where(config, workdir), model=settings['fingerprint'])
  if missing := saved.missing():
    raise ValueError(
      f'{len(missing)} of {saved.n_shards} shards in {saved.where} are missing or damaged, {missing[0]} for one; run '
      'train.capture again: it captures those anew'
    )
  return saved


def _where(config, workdir):
  return config.capture.store or workdir / 'activations'


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


def _runs(shards):
  """Yields (first, last + 1) of each run of consecutive shards."""
  for _, run in itertools.groupby(enumerate(shards), lambda pair: pair[1] - pair[0]):
    _, members = zip(*run, strict=True)
    yield members[0], members[-1] + 1


def _capture(model, windows_et, saved, names, batch_size, missing):
  """Captures the missing shards; what is finished stays, whatever happens to the rest."""
  n_missing = sum(len(windows_et[saved.shard(i)]) for i in missing)
  total = windows_et.size
  with command.progress(None, total, 'train.capture', 'tokens', total - n_missing * saved.n_tokens) as bar:
    for begin, end in _runs(missing):
      start, stop = saved.shard(begin).start, saved.shard(end - 1).stop
      parts = []
      for first, acts in activations.stream(
        model, windows_et[:stop], names, batch_size, start, saved.manifest['dtype']
      ):
        if command.stopping():
          raise command.Stopped(f'finished shards are kept in {saved.where}; run the same command to go on')
        parts.append(acts)
        shard = first // saved.shard_examples
        examples = saved.shard(shard)
        bar.update(min(batch_size, stop - first) * saved.n_tokens)
        if first + batch_size >= examples.stop:
          saved.write(
            shard, windows_et[examples], {site: np.concatenate([part[site] for part in parts]) for site in acts}
          )
          bar.set_postfix(shard=f'{shard + 1}/{saved.n_shards}', refresh=False)
          parts = []


def run(config, workdir):
  """Captures what is missing of the store; says so and returns when nothing is.

  Raises:
    KeyError: a site is misspelt.
    ValueError: another store is there, sizes do not divide, or an activation is not finite.
    OSError: no space is left.
  """
  settings, folder = config.capture, workdir / 'activations'
  if settings.shard_examples % settings.batch_size:
    raise ValueError(
      f'capture.shard_examples {settings.shard_examples} is not divisible by capture.batch_size {settings.batch_size}; '
      'choose a multiple'
    )
  sharding.check_divides('capture.batch_size', settings.batch_size, 'data')
  made = made_with(config, workdir)
  done = command.claim(folder, made)
  if done and not store.ActivationStore.open(_where(config, workdir), model=made['fingerprint']).missing():
    return
  subject = command.subject(config, workdir)
  names, n_tokens = tuple(settings.sites), config.text.window
  shapes = _site_shapes(subject.model, names, settings.batch_size, n_tokens)
  windows_et = command.windows(config, workdir, subject.tokenizer, 'train')
  n_examples = min(len(windows_et), settings.n_tokens // n_tokens)
  if not n_examples:
    raise ValueError(f'capture.n_tokens {settings.n_tokens} is less than one window of {n_tokens}; raise it')
  windows_et = windows_et[:n_examples]
  saved = store.ActivationStore.create(
    _where(config, workdir),
    shapes,
    n_examples,
    n_tokens,
    settings.shard_examples,
    settings.dtype,
    model=subject.fingerprint,
    tokenizer=_digest(json.dumps(sorted(subject.tokenizer.get_vocab().items())).encode()),
    dataset=_digest(windows_et),
  )
  missing = saved.missing()
  size = windows_et.size * sum(map(math.prod, shapes.values())) * jnp.dtype(settings.dtype).itemsize
  print(
    f'{saved.where}: {size / 1e9:.2f} GB at {", ".join(shapes)}; {len(missing)} of {saved.n_shards} shards to capture'
  )
  _capture(subject.model, windows_et, saved, names, settings.batch_size, missing)
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
