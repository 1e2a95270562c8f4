"""Trains sparse autoencoders on activations, from the store or from the live model: one, or a sweep on one stream.

Leaves workdir/sae/final (`models.sae.load_sae` reads it) and workdir/sae/metrics.jsonl; of a sweep, the same under
workdir/sweep/<name>, which later stages take as a workdir: see `train.sweep`. The states of all SAEs are checkpointed
together in workdir/sae/checkpoints, written while training goes on. Batches and random keys are functions of the seed
and the step, so the step is also the position in the data, and no buffer need be saved: killed at any moment and run
again, training ends with the same numbers, to the last bit on the same mesh, and up to rounding on another mesh or with
another number of processes (but for what is resampled of a live model, whose activations round otherwise there).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from jax_interp import activations, store, text
from jax_interp.sae import kernels, train_step
from models import sae, sharding, sites
from train import capture, command, dashboards, processes, recipes, sweep, throughput, windows

SAMPLE_TOKENS = 32_768  # for pre_bias and mse_scale, as OpenAI's trainer takes
SCALES = 'scales.json'  # what inputs and targets of every SAE are multiplied by, which no checkpoint holds
DIVERGED = 'diverged.json'  # of one SAE of a sweep, which trains on without it
WAY_OUT = 'Lower sae.learning_rate or set sae.clip'
_STOPPED = object()  # instead of activations, where one process was asked to stop while it waited for them
WAIT = 0.5  # seconds between looks at whether the command was asked to stop, while data is awaited
SOURCES = ('store', 'live')
# What changes how training is watched, and not the SAE: a run may go on with others.
WATCHING = {'checkpoints': 2, 'spike_factor': 5.0, 'log_to': ''}
SPIKE_LINES, SPIKE_LEAST = 100, 20  # logged losses whose median a loss is compared with, and how many there must be
TIMES = ('tokens_per_s', 'mfu', 'waiting_for_data')  # metrics that are not the same in every run


@dataclasses.dataclass
class _Member:
  """One of the SAEs that are trained."""

  name: str
  settings: ml_collections.ConfigDict
  plan: recipes.Plan
  folder: pathlib.Path
  log: command.MetricsLog = None
  show: Callable = None  # writes to a dashboard
  logged: collections.deque = None  # the last losses
  diverged: dict = None  # what DIVERGED holds of it: the step, and why

  @property
  def target_site(self) -> str | None:
    return self.settings.get('target_site') or None

  @property
  def sites(self) -> tuple[str, ...]:
    return (self.settings.site, self.target_site) if self.target_site else (self.settings.site,)


def diverged(workdir: pathlib.Path, name: str = '') -> str:
  """Returns what was wrong with an SAE of a sweep, so that it was trained no further; '' if nothing was."""
  path = sweep.folder(workdir, name) / 'sae' / DIVERGED
  return json.loads(path.read_text('utf-8'))['why'] if path.exists() else ''


def made_with(config, workdir) -> dict:
  """Returns all that the SAE, or the sweep, depends on."""
  settings = {field: value for field, value in config.sae.items() if field not in WATCHING}
  if not settings.get('sweep'):
    settings.pop('sweep', None)
  if not settings.get('target_site'):
    settings.pop('target_site', None)
  return {'sae': settings, 'seed': config.seed, **capture.made_with(config, workdir)}


def load(config, workdir) -> sae.SparseAutoencoder:
  """Returns what this stage left, on the ambient mesh.

  Raises:
    FileNotFoundError: it is not finished.
    ValueError: it was made with another config, diverged, or is one of a sweep, which config.sae_name has to name.
  """
  if config.sae.get('sweep'):
    name, *_ = names = list(sweep.members(config))
    raise ValueError(
      f'sae.sweep trains {", ".join(names)}; choose one with --config.sae_name={name} '
      f'--workdir={sweep.folder(workdir, name)}'
    )
  if why := diverged(workdir):
    raise ValueError(f'{workdir} has no SAE: {why}')
  command.require(workdir / 'sae', made_with(config, workdir), 'train.sae')
  return sae.load_sae(workdir / 'sae' / 'final')


class Streams(NamedTuple):
  """Activations at several sites, of the same tokens.

  Attributes:
    batches: (step, part, unit) to an iterator of {site: activations [b, d]}, as `activations.shuffled_batches`.
    widths: {site: d}.
  """

  batches: Callable[..., Iterator[dict[str, np.ndarray]]]
  widths: dict[str, int]


def streams(config, workdir, names) -> Streams:
  """Returns the activations at the sites of these names that config.sae.source has."""
  settings = config.sae
  if settings.source == 'store':
    saved = capture.open_store(config, workdir)
    widths = {site: saved.width(site) for site in names}
    readers, keep_et = {site: saved.reader(site) for site in names}, saved.keep()
  else:
    # Every process runs the model on its own devices: processes capture at different times, and wait for none.
    n_processes = processes.part()[1]
    with jax.set_mesh(sharding.own_mesh()):
      n_rows = n_processes * sharding.n_parts('data')
      if config.capture.batch_size % n_rows:
        raise ValueError(
          f'capture.batch_size {config.capture.batch_size} is not divisible by {n_rows}, what {n_processes} processes '
          'have of the data axis, each on its own devices; choose a multiple'
        )
      n_examples = config.capture.batch_size // n_processes
      subject = command.subject(config, workdir)
      windows_et = windows.prepared(config, workdir, subject.tokenizer, 'train')
      windows_et = windows_et[: config.capture.n_tokens // windows_et.shape[1]]
      readers = activations.live_readers(subject.model, windows_et, names, n_examples, config.capture.dtype)
      shapes = sites.site_shapes(subject.model, jnp.zeros((1, 1), jnp.int32), tuple(names))
      widths = {site: shapes[site].shape[-1] for site in names}
    keep_et = text.kept(windows_et, text.special_ids(subject.tokenizer))

  def batches(step, part=(0, 1), unit=1):
    found = [
      activations.shuffled_batches(
        read, keep_et, settings.batch_size, settings.buffer_examples, config.seed, step, part, unit
      )
      for read in readers.values()
    ]
    for rows in zip(*found, strict=True):
      yield dict(zip(readers, rows, strict=True))

  return Streams(batches, widths)


def _members(config, workdir) -> list[_Member]:
  settings = config.sae
  if settings.source not in SOURCES:
    raise ValueError(f'sae.source {settings.source!r} is unknown; choose one of {", ".join(SOURCES)}')
  for field in ('batch_size', 'buffer_examples', 'steps_per_dispatch', 'checkpoint_every', 'log_every'):
    if settings[field] < 1:
      raise ValueError(f'sae.{field} {settings[field]} is less than 1; choose more')
  if not _watching(settings, 'spike_factor') >= 0:
    raise ValueError(f'sae.spike_factor {settings.spike_factor} is not 0 or above; 0 lets losses spike')
  if _watching(settings, 'checkpoints') < 2:
    raise ValueError(
      f'sae.checkpoints {settings.checkpoints} is less than 2: only the step after it tells that the last one is good'
    )
  n_steps = math.ceil(settings.tokens / settings.batch_size)
  found = []
  for name, own in sweep.members(config).items():
    plan = recipes.plan(own, n_steps, bool(own.get('target_site')))
    check_batch(settings.batch_size, plan.settings['micro_batches'])
    found.append(_Member(name, own, plan, sweep.folder(workdir, name) / 'sae'))
  return found


def check_batch(batch_size: int, n_micro: int):
  """Raises unless the devices of the mesh divide a micro-batch.

  Raises:
    ValueError: they do not.
  """
  name = 'sae.batch_size' if n_micro == 1 else 'sae.batch_size / sae.micro_batches ='
  sharding.check_divides(name, batch_size // n_micro, sharding.AXES['row'])


def _settle_kernels(settings, members, widths, path):
  """Replaces 'auto' by what is fastest here for a device's latents, once for a folder: sums differ in their order.

  Args:
    settings: config.sae.
    members: whose plans are replaced.
    widths: {site: d}.
    path: of the file that keeps the choice for runs that go on.

  Raises:
    ValueError: kernels that are not XLA's do not work on the first device.
  """
  mesh = jax.sharding.get_mesh().shape
  n_shards, n_tokens = mesh['model'], settings.batch_size // mesh['data']
  own = [member for member in members if recipes.AUTO in member.plan.settings.values()]
  sizes = lambda member: (
    member.settings.n_latents // n_shards,
    widths[member.settings.site],
    recipes.most_chosen(member.plan.settings),
  )

  def on_first_device(run):
    with jax.set_mesh(sharding.make_mesh()):
      return run()

  def try_out(of, way_out):
    if jax.default_backend() != 'gpu':  # elsewhere all are XLA's
      return
    for member in of:
      if member.plan.settings.get('kernels') == 'pallas':
        try:
          kernels.check('pallas', *sizes(member))
        except ValueError as e:
          raise ValueError(f'{e}; {way_out}') from e

  def measure(member):
    measured = {
      'kernels': lambda *sizes: kernels.fastest(*sizes, n_shards, n_tokens // member.plan.settings['micro_batches']),
      'compute_dtype': kernels.fastest_dtype,
    }
    return {
      field: run(*sizes(member)) for field, run in measured.items() if member.plan.settings[field] == recipes.AUTO
    }

  def choose():
    try_out(members, "set sae.kernels to 'sorted', in another --workdir")
    if own and not path.exists():
      store.write_json(path, {member.name: measure(member) for member in own})
    return json.loads(path.read_text('utf-8')) if own else {}

  chosen = processes.on_first(lambda: on_first_device(choose))
  n_steps = math.ceil(settings.tokens / settings.batch_size)
  for member in own:
    settled = {**member.settings.to_dict(), **chosen[member.name]}
    member.plan = recipes.plan(settled, n_steps, member.target_site is not None)
  way_out = f'delete {path}, to measure anew; sums then differ in their order'
  processes.on_first(lambda: on_first_device(lambda: try_out(own, way_out)))


def _watching(settings, field):
  return settings.get(field, WATCHING[field])


def run(config, workdir):
  """Trains the SAE, or all of a sweep, or resumes; says so and returns when they are there.

  Raises:
    ValueError: the SAE there was made with another config, or another command is making it; the activations are of
      another model or site; sizes do not fit; a loss spikes or is not finite.
    FileNotFoundError: there are no activations.
    ImportError: the dashboard is not installed.
  """
  processes.agree()  # all are here
  with processes.together():
    members, made = _members(config, workdir), made_with(config, workdir)
    part = processes.part()
  same = json.dumps([made, config.mesh], default=lambda settings: settings.to_dict(), sort_keys=True)
  processes.check_same('config or model', hashlib.sha256(same.encode()).hexdigest())
  with contextlib.ExitStack() as held:
    processes.on_first(lambda: held.enter_context(processes.locked(workdir / 'sae')) and None)
    if processes.on_first(lambda: _claim(config, workdir, members, made)):
      return
    if config.sae.tokens < 1:
      raise ValueError(f'sae.tokens {config.sae.tokens} is less than 1, so there is nothing to train; choose more')
    with processes.together():
      stream = streams(config, workdir, list(dict.fromkeys(site for member in members for site in member.sites)))
    _settle_kernels(config.sae, members, stream.widths, workdir / 'sae' / 'fastest.json')
    checkpoints = held.enter_context(
      store.Checkpoints(workdir / 'sae' / 'checkpoints', _watching(config.sae, 'checkpoints'), scored=True)
    )
    key, saved = jax.random.key(config.seed), checkpoints.steps()
    first = max(saved, default=0)
    states = _fresh(config.sae, members, stream, key, workdir / 'sae' / SCALES, bool(saved))
    if saved:
      # Not to hold both in memory.
      states = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
      with processes.together():
        states = checkpoints.restore(states)
    gone = processes.on_first(lambda: _diverged(members, bool(saved)))
    with processes.together():
      for member in members:
        logged_to = first
        if member.name in gone:
          member.diverged = gone[member.name]
          logged_to = member.diverged['step']
          logging.warning('%s; the others train on', member.diverged['why'])
        member.log = command.MetricsLog(member.folder / 'metrics.jsonl', logged_to)
        member.logged = collections.deque((line['loss'] for line in member.log.before), SPIKE_LINES)
        log_to = _watching(config.sae, 'log_to') if jax.process_index() == 0 else ''
        name = member.name or workdir.name
        shown = dashboards.writer(log_to, member.folder / log_to, name, member.settings.to_dict(), first)
        member.show = held.enter_context(shown)
    # Every process has as many tokens of each micro-batch: which it is goes by their place in the batch.
    unit = math.lcm(*(member.plan.settings['micro_batches'] for member in members))
    dispatches = _dispatches(config.sae, first, stream.batches(first, part, unit))
    states = _train(config.sae, members, states, checkpoints, dispatches, key, first)
    with processes.together():
      checkpoints.wait()
    _finish(config.sae, [member for member in members if not member.diverged], states, stream)
    processes.on_first(lambda: command.finish(workdir / 'sae'))
    for member in members:
      if member.diverged and jax.process_index() == 0:
        print(f'{member.folder} has no SAE: {member.diverged["why"]}', file=sys.stderr)


def _claim(config, workdir, members, made) -> bool:
  """Makes the folders; returns whether all is done."""
  if (workdir / 'sae' / command.GROWING).exists():
    raise ValueError(
      f'train.grow has begun in {workdir / "sae"} and not finished; run it again, or delete that folder to train from '
      'the start'
    )
  if not config.sae.get('sweep') and (why := diverged(workdir)):
    raise ValueError(f'{workdir} has no SAE: {why}')
  if command.claim(workdir / 'sae', made) and all(
    diverged(workdir, member.name) or (member.folder / 'final').exists() for member in members
  ):
    return True
  for member in members:
    if not member.name:
      continue
    place = sweep.folder(workdir, member.name)
    named = config.copy_and_resolve_references()
    with named.unlocked():
      named.sae_name = member.name
    command.claim(place / 'sae', made_with(sweep.chosen(named, place), workdir))
    for shared in ('lm', 'activations', 'text'):  # what later stages look for in a workdir
      if (workdir / shared).exists() and not (place / shared).exists():
        os.symlink(os.path.relpath(workdir / shared, place), place / shared)
  return False


def _diverged(members, goes_on) -> dict[str, dict]:
  """Returns {name: what DIVERGED holds} of SAEs that are trained no further; a run that begins anew tries all again."""
  paths = {member.name: member.folder / DIVERGED for member in members}
  if not goes_on:
    for path in paths.values():
      path.unlink(missing_ok=True)
  return {name: json.loads(path.read_text('utf-8')) for name, path in paths.items() if path.exists()}


def first_tokens(stream: Streams, settings, n_tokens: int = SAMPLE_TOKENS) -> dict[str, jax.Array]:
  """Returns {site: the first n_tokens of the stream [n_tokens, d]}, whole on every device, in every process."""
  found = list(itertools.islice(stream.batches(0), math.ceil(n_tokens / settings.batch_size)))
  return {site: _whole(np.concatenate([batch[site] for batch in found])[:n_tokens]) for site in found[0]}


def _whole(x):
  """Returns what every process has, on every device."""
  return jax.make_array_from_process_local_data(NamedSharding(jax.sharding.get_mesh(), PartitionSpec()), x)


def _fresh(settings, members, stream, key, path, goes_on) -> dict[str, train_step.TrainState]:
  """Returns the states that training begins with, or such as a checkpoint has.

  Args:
    settings: config.sae.
    members: whose states they are.
    stream: of activations; where training begins, its first tokens fix scales, pre-biases and mse_scale.
    key: of the weights.
    path: of the file of scales, which are parts of no checkpoint: written, or read where training goes on.
    goes_on: whether there is a checkpoint, so that only scales, shapes and shardings matter.
  """
  scales = processes.on_first(lambda: json.loads(path.read_text('utf-8')) if goes_on and path.exists() else {})
  with processes.together():
    if scales:
      rng = np.random.default_rng(0)
      sample = {site: _whole(rng.normal(size=(2, d)).astype(np.float32)) for site, d in stream.widths.items()}
    else:
      sample = first_tokens(stream, settings)
  states, found = {}, {}
  for member in members:
    plan, samples = member.plan, [sample[site] for site in member.sites]
    fresh = plan.init(key, *samples)
    if scales:
      fresh.input_scale, fresh.output_scale = scales[member.name]
    found[member.name] = float(fresh.input_scale), float(fresh.output_scale)
    states[member.name] = train_step.init_state(fresh, samples[0], plan.tx, plan.ema, *samples[1:])
  if not scales:
    processes.on_first(lambda: store.write_json(path, found))
  return states


def _stopping_alone() -> bool:
  """Whether the only process was asked to stop; several ask each other, after a dispatch."""
  return jax.process_count() == 1 and command.stopping()


def _dispatches(settings, first, batches) -> Iterator[tuple[range, dict[str, jax.Array]]]:
  """Yields the numbers of the steps that are dispatched together and {site: activations [step, batch, d]} on the mesh.

  Another thread makes the next ones meanwhile. One process that is asked to stop while it waits yields _STOPPED.
  """
  n_steps, n_each = math.ceil(settings.tokens / settings.batch_size), settings.steps_per_dispatch
  by_token = NamedSharding(jax.sharding.get_mesh(), sharding.spec('step row d_model'))

  def place(rows):
    acts_sbd = np.stack(rows)
    shape = len(rows), settings.batch_size, acts_sbd.shape[-1]
    return jax.make_array_from_process_local_data(by_token, acts_sbd, shape)

  def make(step):
    if step >= n_steps:
      return None
    steps, found = range(step + 1, min(step + n_each, n_steps) + 1), []
    for batch in itertools.islice(batches, len(steps)):
      if _stopping_alone():
        return _STOPPED
      found.append(batch)
    return steps, {site: place([batch[site] for batch in found]) for site in found[0]}

  with contextlib.closing(batches), concurrent.futures.ThreadPoolExecutor(1) as thread:
    made = thread.submit(make, first)
    for step in itertools.count(first + n_each, n_each):
      while not concurrent.futures.wait([made], WAIT).done:
        if _stopping_alone():
          yield _STOPPED
      if (item := made.result()) is None:
        return
      made = thread.submit(make, step)
      yield item


class _Clock:
  """Measures between two lines of the log: tokens a second, MFU, and the share of time that was waiting for data."""

  def __init__(self, peak: float):
    self._peak, self._tokens, self._flops, self._waited = peak, 0, 0.0, 0.0
    self._began = time.perf_counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  def add(self, tokens: int, flops: float):
    self._tokens, self._flops = self._tokens + tokens, self._flops + flops

  def read(self, anew: bool) -> dict[str, float]:
    """Returns the numbers since it began, and begins anew if asked."""
    seconds = time.perf_counter() - self._began
    found = self._tokens / seconds, self._flops / seconds / self._peak, self._waited / seconds
    if anew:
      self.__init__(self._peak)
    return dict(zip(TIMES, found, strict=True))


def flops(trained: sae.SparseAutoencoder, l0: float) -> float:
  """Returns the floating-point operations that training on a token cannot do without, whatever the recipe.

  Every latent's pre-activation is computed, 2 d each. Of the latents that are on, the decoder's row is added,
  multiplied with the error and given a gradient, 2 d_out each time, and the encoder's row is given one, 2 d. AuxK,
  pre-activations computed twice and products with zeros do not count: MFU says how far from the ideal a run is.

  Args:
    trained: the SAE.
    l0: latents that are on, on average.
  """
  (n_latents, d), d_out = trained.encoder.shape, trained.decoder.shape[1]
  skip = 0 if trained.skip is None else 4 * d * d_out
  return 2 * n_latents * d + l0 * (6 * d_out + 2 * d) + skip


def _train(settings, members, states, checkpoints, dispatches, key, first) -> dict[str, train_step.TrainState]:
  n_steps = math.ceil(settings.tokens / settings.batch_size)
  clock, done, score = _Clock(throughput.peak('float32')[0]), first, math.inf
  members = [member for member in members if not member.diverged]
  total, initial = (steps * settings.batch_size for steps in (n_steps, first))
  with contextlib.closing(dispatches), command.progress(None, total, 'train.sae', 'tokens', initial) as bar:
    while True:
      with clock.waiting(), processes.together():
        item = next(dispatches, None)
      if item is None:
        return states
      if item is _STOPPED:
        checkpoints.save(done, states, score)
        _stop(checkpoints, done, n_steps)
      (steps, acts), before, found = item, done, {}
      done = steps[-1]
      with activations.DISPATCHING:
        for member in members:
          plan, (acts_sbd, *targets) = member.plan, [acts[site] for site in member.sites]
          states[member.name], found[member.name] = train_step.train_steps(
            states[member.name], acts_sbd, plan.tx, plan.recipe, plan.ema, *targets
          )
      found = jax.device_get(found)  # waits for the steps
      faults = {name: _not_finite(steps, metrics['loss']) for name, metrics in found.items()}
      members = _without_diverged(members, faults, checkpoints)
      found = {member.name: found[member.name] for member in members}
      for member in members:
        _check_spikes(settings, member, steps, found[member.name]['loss'], checkpoints)
        plan, name = member.plan, member.name
        with activations.DISPATCHING:
          states[name] = plan.between(states[name], before, acts[member.settings.site], key)
      n_tokens = len(steps) * settings.batch_size
      score = np.mean([metrics['normalized_mse'].mean() for metrics in found.values()]).item()
      clock.add(n_tokens, n_tokens * sum(_flops(states, found, name) for name in found))
      lines = [i for i, step in enumerate(steps) if step % settings.log_every == 0 or step == n_steps]
      times = clock.read(anew=bool(lines))
      if lines:
        with processes.together():  # a disk may be full
          for member, i in itertools.product(members, lines):
            _log(member, steps[i], found[member.name], i, times)
      bar.set_postfix(_status(found, times), refresh=False)
      bar.update(len(steps) * settings.batch_size)
      # Asked once: what is said to be saved is saved.
      stopping = processes.any_of(command.stopping())
      if stopping or done == n_steps or done // settings.checkpoint_every > before // settings.checkpoint_every:
        fault = _Fault('the weights are not finite', done, before)
        faults = {name: None if _finite(states[name]) else fault for name in found}
        members = _without_diverged(members, faults, checkpoints)
        checkpoints.save(done, states, score)
      if stopping and done < n_steps:
        _stop(checkpoints, done, n_steps)


def _stop(checkpoints, step, n_steps):
  checkpoints.wait()
  raise command.Stopped(
    f'step {step} of {n_steps} is saved in {checkpoints.folder.parent}; run the same command to go on'
  )


def _flops(states, found, name):
  return flops(states[name].sae, float(found[name]['l0'].mean()))


def _log(member, step, metrics, i, times):
  numbers = {'explained_variance': 1 - metrics['normalized_mse'][i].item()}
  numbers |= {name: values[i].item() for name, values in metrics.items()}
  member.logged.append(numbers['loss'])
  member.log.write({'step': step, **numbers, **times})
  member.show(step, numbers | times)


def _status(found, times) -> dict[str, str]:
  """Returns what the progress line says: of several SAEs, the numbers of the one that reconstructs worst."""
  name, metrics = max(found.items(), key=lambda item: item[1]['normalized_mse'][-1])
  numbers = {
    'loss': f'{metrics["loss"][-1]:.4f}',
    'fvu': f'{metrics["normalized_mse"][-1]:.4f}',
    'l0': f'{metrics["l0"][-1]:.1f}',
    'dead': metrics['dead'][-1],
    'MFU': f'{times["mfu"]:.1%}',
    'waiting': f'{times["waiting_for_data"]:.0%}',
  }
  return {'worst': name, **numbers} if len(found) > 1 else numbers


@jax.jit
def _all_finite(states):
  floats = [x for x in jax.tree.leaves(states) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))


def _finite(state) -> bool:
  with activations.DISPATCHING:
    found = _all_finite(state)
  return bool(found)


class _Fault(NamedTuple):
  """What is wrong with an SAE: since which step, and the last one before it whose weights were good."""

  what: str
  step: int
  good: int


def _not_finite(steps, loss_s) -> _Fault | None:
  bad_s = ~np.isfinite(loss_s)
  if not bad_s.any():
    return None
  step = steps[bad_s.argmax()]
  return _Fault('the loss is not finite', step, step - 2)  # it tells of the weights before the step


def _without_diverged(members, faults, checkpoints) -> list[_Member]:
  """Returns the SAEs that have no fault; of others a file says so, and their folder gets no final SAE.

  Args:
    members: the SAEs.
    faults: {name: `_Fault` or None}.
    checkpoints: where no SAE is left, those that may not be finite go.

  Raises:
    ValueError: none is left.
  """
  left = [member for member in members if not faults[member.name]]
  if not left:
    what = '; '.join(_of(member, faults[member.name].what) for member in members)
    _forget_after(checkpoints, min(fault.good for fault in faults.values()))
    step = min(fault.step for fault in faults.values())
    raise ValueError(f'{_bad(what, step, checkpoints.steps(), checkpoints)}, in another --workdir')
  for member in members:
    if fault := faults[member.name]:
      why = f'{_of(member, fault.what)} at step {fault.step}. {WAY_OUT}, in another --workdir'
      member.diverged = {'step': fault.step, 'why': why}
      processes.on_first(lambda: store.write_json(member.folder / DIVERGED, member.diverged))  # noqa: B023
      logging.warning('%s; the others train on', why)
  return left


def _check_spikes(settings, member, steps, loss_s, checkpoints):
  """Raises if a loss spikes. All checkpoints stay: with another sae.spike_factor the run goes on."""
  factor = _watching(settings, 'spike_factor')
  if not factor or len(member.logged) < SPIKE_LEAST:
    return
  usual = statistics.median(member.logged)
  bad_s = (loss_s > factor * usual) & (np.array(steps) > member.settings.get('warmup_steps', 0))
  if bad_s.any():
    step = steps[bad_s.argmax()]
    what = f'the loss is more than {factor:g} times {usual:.4g}, the median of the last {len(member.logged)} logged'
    saved = [saved for saved in checkpoints.steps() if saved <= step - 2]
    raise ValueError(
      f'{_bad(_of(member, what), step, saved, checkpoints)}, in another --workdir, or raise sae.spike_factor to go on'
    )


def _of(member, what):
  return f'{member.name}: {what}' if member.name else what


def _forget_after(checkpoints, step):
  for saved in checkpoints.steps():
    if saved > max(step, 0):  # what training began with stays
      checkpoints.delete(saved)


def _bad(what, step, good, checkpoints) -> str:
  kept = f'the last good checkpoint is {checkpoints.folder / str(max(good))}' if good else 'there is no checkpoint yet'
  return f'{what} at step {step}; {kept}. {WAY_OUT}'


def _finish(settings, members, states, stream):
  sample = {}
  if any(member.plan.calibrates for member in members):
    with processes.together():
      sample = first_tokens(stream, settings, recipes.CALIBRATION_TOKENS)
  for member in members:
    kept = member.plan.finish(states[member.name], sample.get(member.settings.site))
    if jax.process_count() > 1:  # process 0 writes all of it
      kept = jax.jit(lambda x: x, out_shardings=NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))(kept)
    processes.on_first(lambda: sae.save(member.folder / 'final', kept))  # noqa: B023
    processes.on_first(lambda: command.finish(member.folder))  # noqa: B023


if __name__ == '__main__':
  command.main(run, several_processes=True)
