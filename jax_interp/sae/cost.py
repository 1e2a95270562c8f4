"""What a training step needs of a device, and how long it should take there: bytes, floating-point operations, seconds.

Takes a training state as abstract arrays with their shardings, the step compiled for them, and the figures of a data
sheet; allocates nothing. Bytes and operations are counted; seconds are an estimate, whose assumptions are the constants
here.
"""

import dataclasses
import math

import jax

from jax_interp.sae import hlo
from jax_interp.sae.train_step import TrainState

PRODUCTS_REACH = 0.6  # of the peak FLOP/s, by large matrix products
ROWS_REACH = 0.35  # of the memory's bandwidth, by rows that are read from, or added to, where an index says
PASSES = 2  # over the state: it is read and written


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Figures of one device.

  Attributes:
    memory: bytes.
    bf16_flops: a second, of matrix products with operands in bfloat16.
    flops: of others.
    bandwidth: of the memory, bytes a second.
    networks: pairs of how many devices a network joins and the bytes a second that each sends into it, from the fastest
      to the one that joins any number.
  """

  memory: float
  bf16_flops: float
  flops: float
  bandwidth: float
  networks: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device.

  Attributes:
    weights: of the SAE.
    moments: of Adam.
    average: of the weights (EMA).
    counters: the dead clock and scalars.
    batch: activations that one call takes.
    next_batch: those of the next call, which are put there meanwhile.
    results: that share no memory with the state that came in.
    temporaries: all that XLA needs meanwhile; `gradients` is within it.
    gradients: as large as the weights.
  """

  weights: int
  moments: int
  average: int
  counters: int
  batch: int
  next_batch: int
  results: int
  temporaries: int
  gradients: int

  @property
  def state(self) -> int:
    return self.weights + self.moments + self.average + self.counters

  @property
  def total(self) -> int:
    return self.state + self.batch + self.next_batch + self.results + self.temporaries


@dataclasses.dataclass(frozen=True)
class Seconds:
  """A step on one accelerator, by what it is spent on; see `estimate`."""

  products: float
  rows: float
  streams: float
  collectives: float

  @property
  def one_by_one(self) -> float:
    return sum(dataclasses.astuple(self))

  @property
  def overlapped(self) -> float:
    return max(dataclasses.astuple(self))


def device_bytes(tree) -> int:
  """Returns the bytes on one device of a pytree of arrays, abstract or not, with shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(state: TrainState, batch, compiled: jax.stages.Compiled) -> Memory:
  """Returns what the compiled step keeps on each device.

  Args:
    state: abstract arrays with shardings.
    batch: likewise, all that `train_steps` takes beside the state.
    compiled: `train_steps` for these.
  """
  sizes = compiled.memory_analysis()
  counters = state.tokens_since_fired_l, state.mse_scale, state.step, state.threshold
  return Memory(
    weights=device_bytes(state.sae),
    moments=device_bytes(state.opt),
    average=device_bytes(state.ema),
    counters=device_bytes(counters),
    batch=device_bytes(batch),
    next_batch=device_bytes(batch),
    results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    temporaries=sizes.temp_size_in_bytes,
    gradients=device_bytes(state.sae),
  )


def link_seconds(collective: hlo.Collective, accelerator: Accelerator, mesh_shape: dict[str, int]) -> float:
  """Returns how long a collective takes, all times together, by the ring algorithm on every level of the network.

  A level joins those of its devices that have not talked to each other on the level before, each with its share of the
  bytes. Neighbours are numbered along the last mesh axis first.
  """
  stride, seconds, n_bytes, left = 1, 0.0, collective.n_bytes, collective.n_devices
  for axis, size in reversed(mesh_shape.items()):
    if axis in collective.axis.split('+'):
      break
    stride *= size
  for n_joined, rate in accelerator.networks:
    n_here = left if left * stride <= n_joined else max(n_joined // stride, 1)
    seconds += hlo.ring_bytes(collective.op, n_bytes, n_here) / rate
    n_bytes, left, stride = n_bytes / n_here, math.ceil(left / n_here), stride * n_here
  return collective.times * seconds


def estimate(
  work: hlo.Work,
  collectives: list[hlo.Collective],
  accelerator: Accelerator,
  memory: Memory,
  mesh_shape: dict[str, int],
  n_steps: int = 1,
) -> Seconds:
  """Returns the seconds of one step: products at `PRODUCTS_REACH` of the peak, rows at `ROWS_REACH` of the bandwidth.

  At the whole bandwidth: weights, moments and average, read and written; gradients, read; results of products, written
  and read. A row that is added to is read and written. What else there is, such as sorting and the elementwise work on
  [batch, d], is not counted.

  Args:
    work: of the program, one device.
    collectives: of the program, that are to be counted.
    accelerator: the device.
    memory: what is on it.
    mesh_shape: {axis: devices}.
    n_steps: that the program makes.
  """
  product_seconds = (work.flops - work.bf16_flops) / accelerator.flops + work.bf16_flops / accelerator.bf16_flops
  state_bytes = PASSES * (memory.weights + memory.moments + memory.average) + memory.gradients
  return Seconds(
    products=product_seconds / n_steps / PRODUCTS_REACH,
    rows=(work.gathered_bytes + 2 * work.scattered_bytes) / n_steps / (ROWS_REACH * accelerator.bandwidth),
    streams=(state_bytes + 2 * work.product_bytes / n_steps) / accelerator.bandwidth,
    collectives=sum(link_seconds(each, accelerator, mesh_shape) for each in collectives) / n_steps,
  )


def axis_that_fits(here: float, other: tuple[int, float], size: int, room: float, divides: int) -> int | None:
  """Returns the smallest size of a mesh axis with which a device's bytes are within room, or None.

  What an axis cuts shrinks with 1 / size, the rest stays: the two are told apart by the bytes of two sizes.

  Args:
    here: bytes with this size.
    other: another size, and the bytes with it.
    size: of the axis.
    room: bytes.
    divides: the size must divide this number.
  """
  slope = (other[1] - here) / (1 / other[0] - 1 / size)
  rest = here - slope / size
  if rest < 0:  # XLA laid out one of them better than the other
    slope, rest = here * size, 0
  if rest >= room:
    return None
  least = max(math.ceil(slope / (room - rest)), 1)
  return next((n for n in range(least, divides + 1) if divides % n == 0), None)
