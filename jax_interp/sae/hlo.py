"""The text of a compiled program -> what one device does in it: matrix products, rows moved, collectives.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, which the compiler has
written beside it; of a conditional, whose branch is not known, the cheapest and the dearest branch are both given.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16}  # of other types, the number in their name
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The attribute with what an instruction runs; the elementwise functions of reductions and the like do not count.
_CALLED = {
  'fusion': r'\bcalls=%?([\w.\-]+)',
  'async-start': r'\bcalls=%?([\w.\-]+)',
  'call': r'\bto_apply=%?([\w.\-]+)',
  'while': r'\bbody=%?([\w.\-]+)',
}
_BRANCHES = re.compile(
  r'(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+).*false_computation=%?([\w.\-]+))'
)
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Instructions whose result is no array of its own.
_NO_ARRAY = ('parameter', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'opt-barrier')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program.

  Attributes:
    op: such as 'all-reduce'.
    axis: the mesh axes whose devices talk to each other: 'data', 'model' or 'data+model'.
    shape: of the result on a device, as XLA writes it.
    n_bytes: of the result; of a reduce-scatter, of what goes in.
    n_devices: that talk to each other.
    times: how often it runs.
    branch: () where it always runs, or the names of a conditional and of the branch that it is in, the innermost.
  """

  op: str
  axis: str
  shape: str
  n_bytes: int
  n_devices: int
  times: int
  branch: tuple[str, ...] = ()

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends, all times together, by the ring algorithm; it receives as many."""
    return self.times * ring_bytes(self.op, self.n_bytes, self.n_devices)


def ring_bytes(op: str, n_bytes: float, n_devices: int) -> float:
  """Returns the bytes that each of n devices in a ring sends for a collective.

  An all-gather passes on all parts of its result but one, (n - 1) / n of it; a reduce-scatter likewise of what goes in;
  an all-reduce is the one after the other.
  """
  if op == 'collective-permute':
    return n_bytes
  return n_bytes * (n_devices - 1) / n_devices * (2 if op == 'all-reduce' else 1)


def in_dearest_branches(collectives: Iterable[Collective], cost: Callable[[Collective], float]) -> list[Collective]:
  """Returns the collectives that always run and, of every conditional, those of the branch of the highest cost."""
  by_conditional = {}
  for collective in collectives:
    if collective.branch:
      conditional, branch = collective.branch
      by_conditional.setdefault(conditional, {}).setdefault(branch, []).append(collective)
  dearest = [max(branches.values(), key=lambda of: sum(map(cost, of))) for branches in by_conditional.values()]
  return [*(collective for collective in collectives if not collective.branch), *itertools.chain(*dearest)]


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in a program, or in a part of it.

  Attributes:
    flops: of matrix products, 2 for each pair of numbers that is multiplied and added; of these
    bf16_flops: with both operands in bfloat16.
    product_bytes: of their results.
    gathered_bytes: of rows that are read from where an index says.
    scattered_bytes: of rows that are added to where an index says.
  """

  flops: float = 0
  bf16_flops: float = 0
  product_bytes: float = 0
  gathered_bytes: float = 0
  scattered_bytes: float = 0

  def _with(self, function, *others):
    columns = zip(*(dataclasses.astuple(work) for work in (self, *others)), strict=True)
    return Work(*map(function, columns))

  def __add__(self, other: 'Work') -> 'Work':
    return self._with(sum, other)

  def __mul__(self, factor: float) -> 'Work':
    return self._with(lambda column: column[0] * factor)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array that a program makes; all of one shape are counted together.

  Attributes:
    shape: as XLA writes it.
    n_bytes: of one.
    n_made: how many instructions make one, which share memory where they are not needed at the same time.
  """

  shape: str
  n_bytes: int
  n_made: int


@dataclasses.dataclass(frozen=True)
class Program:
  """What one device does.

  Attributes:
    least: with the cheapest branch of every conditional, field by field.
    most: with the dearest.
    collectives: all of them, also those of branches.
    arrays: that it makes, the largest first.
    unknown_loops: loops whose number of rounds the compiler does not know, each counted as one round.
  """

  least: Work
  most: Work
  collectives: tuple[Collective, ...]
  arrays: tuple[Array, ...]
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  attributes: str


def _bits(dtype):
  if dtype in BITS:
    return BITS[dtype]
  number = re.search(r'\d+', dtype)
  return int(number.group()) if number else 0  # a token has no size


def n_bytes(shape: str) -> int:
  """Returns the bytes of a shape such as 'f32[2,3]{1,0}', or of a tuple of them."""
  sizes = (
    _bits(dtype) * math.prod(map(int, dims.split(','))) if dims else _bits(dtype) for dtype, dims in _shapes(shape)
  )
  return sum(sizes) // 8


def _shapes(text):
  return _SHAPE.findall(re.sub(r'\{[^}]*\}|/\*.*?\*/', '', text))  # without layouts and comments


def _dims(shape):
  ((_, dims),) = _shapes(shape)
  return [int(n) for n in dims.split(',')] if dims else []


def _until_closed(text):
  """Returns what is within the bracket that the text begins with, and what follows it."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return text[1:i], text[i + 1 :]
  raise ValueError(f'a bracket is not closed in {text[:80]!r}; is this the text of a compiled program?')


def _parse(line):
  name, rest = _INSTRUCTION.match(line).groups()
  if rest.startswith('('):
    kind, rest = _until_closed(rest)
  else:
    kind, rest = rest.split(' ', 1)
  op, rest = rest.strip().split('(', 1)
  operands, attributes = _until_closed('(' + rest)
  return _Instruction(name, kind, op, tuple(re.findall(r'%([\w.\-]+)', operands)), attributes)


def _computations(text) -> tuple[str, dict[str, list[_Instruction]]]:
  """Returns the name of the entry, and {name of a computation: its instructions}."""
  entry, found, current = None, {}, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and _INSTRUCTION.match(line):
      current.append(_parse(line))
  if entry is None:
    raise ValueError('there is no ENTRY computation; give the text of a compiled program, compiled.as_text()')
  return entry, found


def _groups(attributes: str, n_devices: int) -> list[list[int]]:
  """Returns the groups of devices that talk to each other, in any of the ways XLA writes them."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return [list(map(int, pair.split(','))) for pair in re.findall(r'\{(\d+,\d+)', pairs[0])]
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\S+)', attributes):
    return _numbered(iota[3]).reshape(int(iota[1]), int(iota[2])).tolist()
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}', attributes
  )
  if mesh and ':' not in mesh[3]:
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    numbered = _numbered(mesh[2] or f'[{n_devices}]').reshape(*sizes.values())
    axes = [list(sizes).index(axis) for axis in re.findall(r"'([^']*)'", mesh[3])]
    return (
      np.moveaxis(numbered, axes, range(-len(axes), 0)).reshape(-1, math.prod(numbered.shape[i] for i in axes)).tolist()
    )
  groups = re.search(r'replica_groups=\{(\{.*?\})?\}', attributes)
  if not groups:
    raise ValueError(f'the groups of a collective are not understood: {attributes[:120]!r}')
  found = re.findall(r'\{([\d,]+)\}', groups[0])
  return [list(map(int, group.split(','))) for group in found] or [list(range(n_devices))]


def _numbered(iota: str) -> np.ndarray:
  """Returns the devices in the order of '[4,2]T(1,0)': numbered in this shape, which is then transposed."""
  dims, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', iota).groups()
  dims = [int(n) for n in dims.split(',')]
  return np.arange(math.prod(dims)).reshape(dims).transpose([int(n) for n in order.split(',')] if order else None)


def _axes(group: list[int], mesh_shape: dict[str, int]) -> str:
  """Returns the axes along which the devices of a group differ; devices are numbered along the last axis first."""
  found, stride = [], 1
  for axis, size in reversed(mesh_shape.items()):
    if len({device // stride % size for device in group}) > 1:
      found.append(axis)
    stride *= size
  return '+'.join(reversed(found))


def read(text: str, mesh_shape: dict[str, int]) -> Program:
  """Returns what one device does in a program.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: {axis: devices}, in the order of the mesh.

  Raises:
    ValueError: the text is not understood.
  """
  reader = _Reader(text, mesh_shape)
  least, most = reader.work(reader.entry)
  return Program(least, most, tuple(reader.collectives(reader.entry)), tuple(reader.arrays()), reader.unknown_loops)


class _Reader:
  def __init__(self, text, mesh_shape):
    self.entry, self._computations = _computations(text)
    self._shape_of = {i.name: i.type for instructions in self._computations.values() for i in instructions}
    self._mesh_shape, self._n_devices = mesh_shape, math.prod(mesh_shape.values())
    self._works = {}
    self.unknown_loops = 0

  def work(self, computation) -> tuple[Work, Work]:
    """Returns the least and the most work of a computation."""
    if computation not in self._works:
      least = most = Work()
      for instruction in self._computations[computation]:
        own = self._own_work(instruction)
        least, most = least + own, most + own
        for branches, times in self._runs(instruction):
          works = [self.work(branch) for branch in branches]
          least += _bound(min, [low for low, _ in works]) * times
          most += _bound(max, [high for _, high in works]) * times
        if instruction.op == 'while' and not _TRIPS.search(instruction.attributes):
          self.unknown_loops += 1
      self._works[computation] = least, most
    return self._works[computation]

  def _runs(self, instruction) -> Iterator[tuple[list[str], int]]:
    """Yields the computations of which an instruction runs one, and how often it does."""
    if instruction.op == 'conditional':
      listed, *two = _BRANCHES.search(instruction.attributes).groups()
      yield re.findall(r'[\w.\-]+', listed) if listed else two, 1
    elif pattern := _CALLED.get(instruction.op):
      trips = _TRIPS.search(instruction.attributes)
      yield re.findall(pattern, instruction.attributes), int(trips[1]) if trips else 1

  def _own_work(self, instruction) -> Work:
    op, shape = instruction.op, instruction.type
    if op == 'dot':
      operands = [self._shape_of[name] for name in instruction.operands]
      lhs = _dims(operands[0])
      (contracted,) = re.findall(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
      depth = math.prod(lhs[int(i)] for i in contracted.split(',') if i)
      flops = 2 * depth * math.prod(_dims(shape))
      is_bf16 = all(operand.startswith('bf16') for operand in operands)
      return Work(flops, flops * is_bf16, n_bytes(shape))
    if op == 'gather':
      return Work(gathered_bytes=n_bytes(shape))
    if op == 'scatter':
      updates = instruction.operands[1 + len(instruction.operands) // 2 :]  # behind the operands and the indices
      return Work(scattered_bytes=sum(n_bytes(self._shape_of[name]) for name in updates))
    return Work()

  def collectives(self, computation, times=1, branch=()) -> Iterator[Collective]:
    for instruction in self._computations[computation]:
      if collective := self._collective(instruction, times, branch):
        yield collective
      for branches, trips in self._runs(instruction):
        for name in branches:
          inner = (instruction.name, name) if len(branches) > 1 else branch
          yield from self.collectives(name, times * trips, inner)

  def _collective(self, instruction, times, branch) -> Collective | None:
    """Returns what the instruction is, if it is a collective of more than one device."""
    op, shape = instruction.op.removesuffix('-start'), instruction.type
    if op not in COLLECTIVES:
      return None
    group = max(_groups(instruction.attributes, self._n_devices), key=len)
    if len(set(group)) < 2:
      return None
    if instruction.op != op and op != 'all-reduce':
      shape = ', '.join(f'{dtype}[{dims}]' for dtype, dims in _shapes(shape)[1:2])  # begun with (operand, result)
    size = n_bytes(shape) * (len(group) if op == 'reduce-scatter' else 1)
    return Collective(op, _axes(group, self._mesh_shape), shape, size, len(group), times, branch)

  def arrays(self) -> list[Array]:
    """Returns what is made outside of fusions, which make only their result."""
    counts, seen, left = {}, {self.entry}, [self.entry]
    while left:
      for instruction in self._computations[left.pop()]:
        if instruction.op not in _NO_ARRAY:
          for dtype, dims in _shapes(instruction.type):
            shape = f'{dtype}[{dims}]'
            counts[shape] = counts.get(shape, 0) + 1
        if instruction.op != 'fusion':
          called = {name for names, _ in self._runs(instruction) for name in names} - seen
          seen |= called
          left += called
    return sorted(
      (Array(shape, n_bytes(shape), n) for shape, n in counts.items()), key=lambda array: (-array.n_bytes, array.shape)
    )


def _bound(choose, works):
  return works[0]._with(choose, *works[1:]) if works else Work()
