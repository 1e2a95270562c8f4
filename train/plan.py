"""Plans training before there are devices for it: what they hold, compute and send, and how fast that should be.

    python -m train.plan --config=configs/gpt4_16m.py --mesh=1x512

compiles the training step itself for a mesh of pretend devices, from abstract arrays: nothing is allocated, whatever
the sizes. It prints bytes per device by kind, floating-point operations, bytes through each collective and an estimate
of tokens/s on each of `ACCELERATORS`, and ends with an error where the mesh does not fit. docs/planning.md says what is
counted and what is estimated.
"""

import dataclasses
import math
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_interp.sae import cost, hlo, losses, train_step
from models import pretrained, sae, sharding, sites
from train import command, recipes, throughput
from train import sae as train_sae

_MESH = flags.DEFINE_string('mesh', None, 'DATAxMODEL, such as 4x8; by default that of the config.')
_WIDTH = flags.DEFINE_list(
  'width', None, "Of the activations, and of a transcoder's targets; by default of config.plan or the subject model."
)
_ACCELERATOR = flags.DEFINE_string('accelerator', None, 'The one that has to fit; by default, any.')

GBIT = 1e9 / 8
# Name: device_kind of `throughput.PEAKS`, memory, bandwidth, networks (see `cost.Accelerator`). Of the TPUs from Google
# Cloud's pages of TPU v5e, v5p and v6e (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e): capacity and bandwidth of HBM;
# half of the "bidirectional inter-chip interconnect bandwidth (per chip)", among the chips of a pod or, of v5p, of the
# largest job; beyond it, the data center network's bandwidth, of a chip (v5p) or of a pod over its 256 chips (v5e 6.4
# Tbit/s, v6e 25.6). Of the H100 from NVIDIA's data sheets of the H100 SXM (memory; half of NVLink's 900 GB/s, which
# joins 8) and of the DGX H100 (an adapter of 400 Gbit/s for each GPU).
ACCELERATORS = {
  'v5e': ('TPU v5 lite', 16e9, 819e9, ((256, 200e9), (math.inf, 25 * GBIT))),
  'v5p': ('TPU v5p', 95e9, 2765e9, ((6144, 600e9), (math.inf, 50 * GBIT))),
  'v6e': ('TPU v6e', 32e9, 1640e9, ((256, 400e9), (math.inf, 100 * GBIT))),
  'H100': ('NVIDIA H100 80GB HBM3', 80e9, 3350e9, ((8, 450e9), (math.inf, 400 * GBIT))),
}
MOST_DEVICES = 2048  # that XLA:CPU compiles for in one process
N_ARRAYS = 6  # of the largest, that are listed


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one device has to do.

  Attributes:
    settings: of the recipe, all fields.
    widths: of the activations and, of a transcoder, its targets.
    mesh_shape: {axis: devices}.
    batch_size: tokens of a step, on all devices.
    n_steps: of one call.
    memory: bytes.
    program: of a call.
    needed_flops: of a step, without which there is no training, whatever the program.
    xla_flops: of a call, by XLA's cost analysis.
  """

  settings: dict
  widths: tuple[int, ...]
  mesh_shape: dict[str, int]
  batch_size: int
  n_steps: int
  memory: cost.Memory
  program: hlo.Program
  needed_flops: float
  xla_flops: float


def accelerator(name: str) -> cost.Accelerator:
  """Returns one of `ACCELERATORS`, with the peaks of `throughput.PEAKS`."""
  kind, memory, bandwidth, networks = ACCELERATORS[name]
  return cost.Accelerator(memory, *throughput.PEAKS[kind], bandwidth, networks)


def site_widths(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[int, ...]:
  """Returns the width of the activations and, for a transcoder, that of its targets: config.plan's or the model's.

  Raises:
    FileNotFoundError: there is no subject model to ask.
  """
  if 'plan' in config:
    return tuple(config.plan.widths)
  names = [name for name in (config.sae.site, config.sae.get('target_site')) if name]
  try:
    with jax.set_mesh(sharding.make_mesh()):
      model = pretrained.load_model(command.subject_source(config, workdir))
  except FileNotFoundError as e:
    raise FileNotFoundError(f'{e}; or say how wide the activations are, with --width') from e
  shapes = sites.site_shapes(model, jnp.zeros((1, 1), jnp.int32), tuple(names))
  return tuple(shapes[name].shape[-1] for name in names)


def abstract_state(planned: recipes.Plan, widths: tuple[int, ...]) -> train_step.TrainState:
  """Returns the state at step 0 as abstract arrays with their shardings on the ambient mesh."""
  if planned.settings['normalization'] == recipes.EXPECTED_AVERAGE:  # a constant, but of data that there is none of
    planned = dataclasses.replace(planned, settings={**planned.settings, 'normalization': 'constant'})

  def fresh(sample_bd, *target_sample_bd):
    made = planned.init(jax.random.key(0), sample_bd)
    if target_sample_bd:  # as `models.sae.as_transcoder`, which looks at the data
      (d_out,) = widths[1:]
      made = sae.SparseAutoencoder(
        made.encoder[...],
        jnp.zeros((made.n_latents, d_out)),
        made.pre_bias[...],
        made.latent_bias[...],
        made.activation,
        made.normalization,
        made.input_scale,
        jnp.zeros(d_out),
        jnp.zeros((d_out, widths[0])) if planned.settings['skip'] else None,
      )
    return train_step.init_state(made, sample_bd, planned.tx, planned.ema, *target_sample_bd)

  samples = [jax.ShapeDtypeStruct((train_sae.SAMPLE_TOKENS, width), jnp.float32) for width in widths]
  state = jax.eval_shape(fresh, *samples)
  specs = losses.partition_specs(state)._replace(tokens_since_fired_l=P('model'))
  place = lambda spec, tree: jax.tree.map(lambda x: _abstract(x.shape, x.dtype, spec), tree)
  return jax.tree.map(place, specs, state, is_leaf=lambda x: isinstance(x, P))


def _abstract(shape, dtype, spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), spec))


def lower(config: ml_collections.ConfigDict, widths: tuple[int, ...]) -> tuple:
  """Returns the lowered call of train.sae with this config on the ambient mesh, its state and batch, and the recipe.

  Args:
    config: of which sae and capture.dtype are read.
    widths: of the activations and, for a transcoder, of its targets.

  Returns:
    lowered, to compile; state and batch as abstract arrays; the `recipes.Plan`.

  Raises:
    ValueError: the mesh does not divide the latents or a micro-batch, there are more or fewer widths than sites, or
      there is a sweep; and as `recipes.plan`.
  """
  settings = config.sae.copy_and_resolve_references()
  if settings.get('sweep'):
    raise ValueError('sae.sweep trains several SAEs; choose one with --config.sae_name')
  n_sites = 2 if settings.get('target_site') else 1
  if len(widths) != n_sites:
    raise ValueError(f'there are {len(widths)} widths, {widths}, and {n_sites} sites; give --width=N, or N,N_OUT')
  n_all_steps = math.ceil(settings.tokens / settings.batch_size)
  planned = recipes.plan(settings, n_all_steps, len(widths) == 2)
  state, n_steps = abstract_state(planned, widths), min(settings.steps_per_dispatch, n_all_steps)
  train_sae.check_batch(settings.batch_size, planned.settings['micro_batches'])
  by_token = sharding.spec('step row d_model')
  batch = [_abstract((n_steps, settings.batch_size, width), config.capture.dtype, by_token) for width in widths]
  acts_sbd, *targets = batch
  lowered = train_step.train_steps.lower(state, acts_sbd, planned.tx, planned.recipe, planned.ema, *targets)
  return lowered, state, batch, planned


def plan(config: ml_collections.ConfigDict, widths: tuple[int, ...]) -> Plan:
  """Returns what a device of the ambient mesh has to do in a step of train.sae; takes and raises what `lower` does."""
  lowered, state, batch, planned = lower(config, widths)
  compiled = lowered.compile()
  mesh_shape = dict(jax.sharding.get_mesh().shape)
  n_steps, batch_size, _ = batch[0].shape
  l0 = planned.settings.get('k') or planned.settings.get('target_l0') or 0
  return Plan(
    settings=recipes.until_measured(planned.settings),
    widths=widths,
    mesh_shape=mesh_shape,
    batch_size=batch_size,
    n_steps=n_steps,
    memory=cost.memory(state, batch, compiled),
    program=hlo.read(compiled.as_text(), mesh_shape),
    needed_flops=train_sae.flops(state.sae, l0) * batch_size / math.prod(mesh_shape.values()),
    xla_flops=compiled.cost_analysis()['flops'],
  )


def _columns(rows: list[tuple], right: str) -> str:
  """Returns rows as lines with aligned columns; `right` has an r for each column that is aligned to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  line = lambda row: '  '.join(
    cell.rjust(n) if way == 'r' else cell.ljust(n) for cell, n, way in zip(row, widths, right, strict=True)
  )
  return '\n'.join('  ' + line(row).rstrip() for row in rows)


def _number(x: float) -> str:
  """Returns three digits, without an exponent."""
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}' if x >= 0.001 or not x else f'{x:.0e}'


def _gb(n_bytes: float) -> str:
  return f'{n_bytes / 1e9:,.3f}'


def table(found: Plan) -> str:
  """Returns the plan as text."""
  s, shape = found.settings, found.mesh_shape
  own = ', '.join(f'{name} {s[name]:,}' for name in ('n_latents', 'k', 'auxk') if s.get(name))
  how = ', '.join(s[name] for name in ('kernels', 'compute_dtype') if name in s)
  mesh = ' x '.join(f'{axis} {size}' for axis, size in shape.items())
  head = [
    f'{s["recipe"]}{f" ({how})" * bool(how)}: width {" to ".join(map(str, found.widths))}, {own}',
    f'{found.batch_size:,} tokens a step, {found.n_steps} step{"s" * (found.n_steps > 1)} a call, mesh {mesh}',
  ]
  parts = [
    '\n'.join(head),
    'Bytes on each device (GB of 10^9)\n' + _memory_table(found),
    f'Largest arrays that the program makes, not all at once (temporaries are {_gb(found.memory.temporaries)} GB)\n'
    + _arrays_table(found.program.arrays),
    'Work of each device in a step (a range: cheapest to dearest branches)\n' + _work_table(found),
    'Collectives of each device in a step\n' + _collectives_table(found),
    _estimates(found),
  ]
  if found.program.unknown_loops:
    parts.append(f'{found.program.unknown_loops} loops of unknown length were counted as one round.')
  return '\n\n'.join(parts)


def _memory_table(found):
  memory = found.memory
  rows = [
    ('weights', memory.weights),
    ('Adam moments', memory.moments),
    ('EMA', memory.average),
    ('dead clock, scalars', memory.counters),
    ('activations of a call', memory.batch),
    ('those of the next call', memory.next_batch),
    ('results beside the state', memory.results),
    ('temporaries (XLA:CPU)', memory.temporaries),
    ('  of which gradients', memory.gradients),
    ('  of which pre-activations', preacts_bytes(found)),
    ('total', memory.total),
  ]
  return _columns([(name, _gb(n)) for name, n in rows], 'lr')


def preacts_bytes(found: Plan) -> int:
  """Returns the bytes of the largest array [..., token, latent of a device]: pre-activations, or latents of AuxK."""
  n_local = found.settings['n_latents'] // found.mesh_shape['model']
  by_latent = lambda array: re.search(rf',{n_local}\]$', array.shape)
  return max((array.n_bytes for array in found.program.arrays if by_latent(array)), default=0)


def _arrays_table(arrays):
  return _columns([(_gb(array.n_bytes), array.shape, f'made {array.n_made}x') for array in arrays[:N_ARRAYS]], 'rll')


def _range(low, high):
  low, high = _number(low / 1e9), _number(high / 1e9)
  return low if low == high else f'{low} to {high}'


def _work_table(found):
  least, most, n = found.program.least, found.program.most, found.n_steps
  rows = [
    ('GFLOP needed by any program', _number(found.needed_flops / 1e9)),
    ('GFLOP of matrix products in this one', _range(least.flops / n, most.flops / n)),
    ("GFLOP by XLA's analysis, of a call (a loop's body once, dearest branches)", _number(found.xla_flops / 1e9)),
    ('GB of rows read by index', _range(least.gathered_bytes / n, most.gathered_bytes / n)),
    ('GB of rows added to by index', _range(least.scattered_bytes / n, most.scattered_bytes / n)),
  ]
  return _columns(rows, 'lr')


def _dearest(program):
  return hlo.in_dearest_branches(program.collectives, lambda collective: collective.wire_bytes)


def _collectives_table(found):
  merged = {}
  for each in _dearest(found.program):
    key = (each.op, each.axis, re.sub(r'\{[^}]*\}|/\*.*?\*/', '', each.shape), bool(each.branch))
    times, wire_bytes = merged.get(key, (0, 0))
    merged[key] = times + each.times, wire_bytes + each.wire_bytes
  if not merged:
    return '  none'
  rows = [('', 'over', 'shape', 'times', 'GB sent', '')]
  for (op, axis, shape, in_branch), (times, wire_bytes) in sorted(merged.items(), key=lambda item: -item[1][1]):
    shape = shape if len(shape) <= 40 else shape[:37] + '...'
    sent, when = wire_bytes / found.n_steps / 1e9, 'in the dearest branch' if in_branch else ''
    rows.append((op, axis, shape, _number(times / found.n_steps), f'{sent:.6f}', when))
  always = sum(each.wire_bytes for each in found.program.collectives if not each.branch) / found.n_steps
  most = sum(each.wire_bytes for each in _dearest(found.program)) / found.n_steps
  total = f'Sent in all: {_gb(always)} GB' + (f', to {_gb(most)} GB in the dearest branches' if most > always else '')
  return _columns(rows, 'lllrrl') + f'\n  {total}'


def estimates(found: Plan) -> dict[str, tuple[cost.Seconds, cost.Seconds]]:
  """Returns {accelerator: seconds of a step with the cheapest branches, and with the dearest}."""
  always = [each for each in found.program.collectives if not each.branch]

  def seconds(name):
    common = accelerator(name), found.memory, found.mesh_shape, found.n_steps
    return (
      cost.estimate(found.program.least, always, *common),
      cost.estimate(found.program.most, _dearest(found.program), *common),
    )

  return {name: seconds(name) for name in ACCELERATORS}


def _estimates(found):
  fitting = fits(found)
  head = ('', 'products', 'rows', 'streams', 'collectives', 'ms a step', 'tokens/s', 'MFU', 'overlapped', 'memory')
  parts = [
    f'Estimates: products at {cost.PRODUCTS_REACH:.0%} of the peak, rows by index at {cost.ROWS_REACH:.0%} of the '
    "memory's bandwidth,\nstreams (state, gradients, results of products) and collectives at the whole of it; ms, one "
    'after the other'
  ]
  for i, title in enumerate(('with the cheapest branches (no latent is dead)', 'with the dearest branches')):
    rows = [head]
    for name, seconds in estimates(found).items():
      each, peak = seconds[i], accelerator(name).flops
      ms = [_number(1e3 * x) for x in (*dataclasses.astuple(each), each.one_by_one)]
      rate = [_number(found.batch_size / x) for x in (each.one_by_one, each.overlapped)]
      mfu = f'{found.needed_flops / each.one_by_one / peak:.1%}'
      rows.append((name, *ms, rate[0], mfu, rate[1], 'fits' if name in fitting else 'does not fit'))
    if i == 0 or found.program.least != found.program.most:
      parts.append(f'  {title}\n{_columns(rows, "lrrrrrrrrl")}')
  return '\n'.join(parts)


def fits(found: Plan) -> list[str]:
  """Returns the accelerators whose memory is enough."""
  return [name for name in ACCELERATORS if found.memory.total <= accelerator(name).memory]


def refuse(found: Plan, wanted: str | None, with_axis) -> None:
  """Raises where the plan does not fit, with what would.

  Args:
    found: the plan.
    wanted: the accelerator that has to fit, or None: any.
    with_axis: ({axis: devices}) -> plan, to see what an axis cuts.

  Raises:
    ValueError: it does not fit the one that is wanted, or none.
  """
  fitting = fits(found)
  if wanted in fitting or (wanted is None and fitting):
    return
  needs = f'{_gb(found.memory.total)} GB on each device'
  if fitting:
    raise ValueError(
      f'{needs} do not fit {wanted} ({_gb(accelerator(wanted).memory)} GB); they fit {", ".join(fitting)}'
    )
  names = [wanted] if wanted else list(ACCELERATORS)
  ways = [way for axis in ('model', 'data') if (way := _way_out(found, axis, names, with_axis))]
  hint = f'by arithmetic, {" or ".join(ways)}' if ways else 'no mesh would do; choose a smaller batch or fewer latents'
  raise ValueError(f'{needs} do not fit any of {", ".join(ACCELERATORS)}; {hint}')


def _way_out(found, axis, names, with_axis):
  """Returns the smallest size of an axis for which something of `names` would fit, as text, or None."""
  size = found.mesh_shape[axis]
  other = size // 2 if size % 2 == 0 else 2 * size
  # The devices, and so both axes together, divide a micro-batch; `model` also the latents.
  micro_batch = found.batch_size // found.settings['micro_batches']
  total = micro_batch // (math.prod(found.mesh_shape.values()) // size)
  if axis == 'model':
    total = math.gcd(total, found.settings['n_latents'])
  mesh_shape = found.mesh_shape | {axis: other}
  if total % other or math.prod(mesh_shape.values()) > jax.device_count():
    return None
  there = with_axis(mesh_shape)
  room = {name: accelerator(name).memory for name in names}
  sizes = {
    name: cost.axis_that_fits(found.memory.total, (other, there.memory.total), size, bytes_, total)
    for name, bytes_ in room.items()
  }
  sizes = {name: n for name, n in sizes.items() if n}
  if not sizes:
    return None
  name = min(sizes, key=lambda name: (sizes[name], -room[name]))
  return f'a {axis} axis of {sizes[name]} would fit {name}'


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path):
  """Prints the plan.

  Raises:
    ValueError: it does not fit; and as `plan`.
    FileNotFoundError: as `site_widths`.
  """
  widths = tuple(map(int, _WIDTH.value)) if _WIDTH.value else site_widths(config, workdir)
  found = plan(config, widths)
  print(table(found), flush=True)

  def with_axis(mesh_shape):
    with jax.set_mesh(sharding.make_mesh(**mesh_shape)):
      return plan(config, widths)

  refuse(found, _ACCELERATOR.value, with_axis)


def _mesh_of(text):
  return {axis: int(size) for axis, size in zip(('data', 'model'), text.split('x'), strict=True)}


def _pretend():
  """Sets the mesh, and makes this process pretend to have its devices, before JAX looks for any."""
  config = flags.FLAGS.config
  if _MESH.value:
    config.mesh = _mesh_of(_MESH.value)
  n_devices = config.mesh.data * config.mesh.model
  if n_devices > MOST_DEVICES:
    sys.exit(
      f'error: a mesh of {n_devices} devices is more than the {MOST_DEVICES} that can be pretended; choose a smaller '
      'data axis and as much smaller a batch_size: on each device that is the same but for the sum of the gradients'
    )
  # Twice as many, for a mesh of another size that tells what an axis cuts. Nothing is run: it need not be optimised.
  n_pretended = min(2 * n_devices, MOST_DEVICES)
  pretend = f'--xla_force_host_platform_device_count={n_pretended} --xla_backend_optimization_level=0'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {pretend}'
  jax.config.update('jax_platforms', 'cpu')


def main():
  flags.register_validator(
    'mesh', lambda mesh: mesh is None or bool(re.fullmatch(r'[1-9]\d*x[1-9]\d*', mesh)), 'must be DATAxMODEL, as 4x8'
  )
  flags.register_validator(
    'width',
    lambda widths: widths is None or all(width.isdecimal() and int(width) for width in widths),
    'must be a number, or two',
  )
  flags.register_validator(
    'accelerator',
    lambda name: name is None or name in ACCELERATORS,
    f'must be one of {", ".join(ACCELERATORS)}',
  )
  app.call_after_init(_pretend)
  command.main(run)


if __name__ == '__main__':
  main()
