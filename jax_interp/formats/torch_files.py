"""Files of `torch.save`, read and written without torch, and without running what a pickle asks for.

Such a file is a zip of the bytes of every tensor and of a pickle that puts them together. A pickle is a program, which
may call any function; this reader knows the few instructions that a dict of tensors, numbers and strings needs, builds
plain dicts and arrays by them, and raises at any other.
"""

import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_interp.formats import files

_TENSOR, _PARAMETER = 'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_parameter'
_DICT = 'collections OrderedDict'
_STORAGES = {
  'torch DoubleStorage': '<f8',
  'torch FloatStorage': '<f4',
  'torch HalfStorage': '<f2',
  'torch BFloat16Storage': jnp.bfloat16,
  'torch LongStorage': '<i8',
  'torch IntStorage': '<i4',
  'torch ShortStorage': '<i2',
  'torch CharStorage': 'i1',
  'torch ByteStorage': 'u1',
  'torch BoolStorage': '?',
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_VALUES = ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE')
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_MOST_BYTES = 2**20  # of a pickle: enough for 5000 tensors, and so few that its steps and values stay few
_MOST_DIMENSIONS, _MOST_ARGUMENTS = 32, 7  # of a tensor, and of the function that puts it together
_ALIGNMENT = 64  # of tensors in the file, so that torch can map it into memory
_ZIP_HEADER, _ZIP64_FIELD = 30, 20  # bytes before an entry's name, and of the field that large entries have


class _Name(NamedTuple):
  """A function or class that a pickle names, one of those above; it stands for itself and is never looked up."""

  name: str


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the dict that was saved: dicts, lists, tuples, numbers, strings, None, and NumPy arrays for tensors.

  Attributes of ordered dicts (the versions of a state_dict) are left out.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, is of torch before 1.6, is no dict, or asks for anything but what is named above;
      nothing of it has then been run.
  """
  advice = (
    'fetch it again or, if it holds more than tensors or is of torch before 1.6, save its state_dict alone with a '
    'newer torch; nothing of it was run'
  )
  reading = files.reading(path, 'is damaged or not to be trusted', advice)
  with open(path, 'rb') as file, reading, zipfile.ZipFile(file) as archive:
    if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
      raise ValueError('its entries are larger than the file, so they are compressed or overlap')
    found = _read(archive)
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds {type(found).__name__} and not a dict of tensors; save the state_dict alone')
  return found


def _read(archive: zipfile.ZipFile):
  pickles = [name for name in archive.namelist() if name.endswith('/data.pkl') and name.count('/') == 1]
  if len(pickles) != 1:
    raise ValueError(f'it has {len(pickles)} entries data.pkl, where torch.save writes one')
  root = pickles[0].removesuffix('data.pkl')
  if f'{root}byteorder' in archive.namelist() and _bytes(archive, f'{root}byteorder') != b'little':
    raise ValueError('it is not of little-endian numbers')

  def storage(kind: str, key: str, n: int) -> np.ndarray:
    data, dtype = _bytes(archive, f'{root}data/{key}'), np.dtype(_STORAGES[kind])
    if len(data) != n * dtype.itemsize:
      raise ValueError(f'its storage {key} is of {len(data)} bytes, not {n} x {dtype.itemsize}')
    return np.frombuffer(data, dtype)

  if (n_bytes := archive.getinfo(pickles[0]).file_size) > _MOST_BYTES:
    raise ValueError(f'its pickle is of {n_bytes} bytes, more than a dict of tensors needs (at most {_MOST_BYTES})')
  return _run(_bytes(archive, pickles[0]), storage)


def _bytes(archive: zipfile.ZipFile, name: str) -> bytes:
  entry = archive.getinfo(name)
  if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:  # torch does neither; what unpacks could be vast
    raise ValueError(f'its entry {name} is compressed or encrypted')
  return archive.read(entry)


def _run(pickled: bytes, storage: Callable[[str, str, int], np.ndarray]):
  """Returns what a pickle builds, of the instructions that plain data need; see the module.

  What it builds may be nested without end, or hold itself many times over: only what is a string or a number is
  hashed, compared or printed as a whole.
  """
  stack: list = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  storages: dict[tuple, np.ndarray] = {}

  def since_mark() -> list:
    start = marks.pop()
    values = stack[start:]
    del stack[start:]
    return values

  def name(found: str) -> _Name:
    if found not in (_TENSOR, _PARAMETER, _DICT, *_STORAGES):
      raise ValueError(f'its pickle names {found!r}, which is no part of a dict of tensors')
    return _Name(found)

  for opcode, argument, _ in pickletools.genops(pickled):
    match opcode.name:
      case 'PROTO' | 'FRAME':
        pass
      case 'STOP':
        (result,) = stack
        return result
      case 'MARK':
        marks.append(len(stack))
      case 'EMPTY_DICT':
        stack.append({})
      case 'EMPTY_LIST':
        stack.append([])
      case 'EMPTY_TUPLE':
        stack.append(())
      case constant if constant in _CONSTANTS:
        stack.append(_CONSTANTS[constant])
      case value if value in _VALUES:
        stack.append(argument)
      case 'TUPLE':
        stack.append(tuple(since_mark()))
      case several if several in _TUPLES:
        start = len(stack) - _TUPLES[several]
        stack[start:] = [tuple(stack[start:])]
      case 'BINPUT' | 'LONG_BINPUT':
        memo[argument] = stack[-1]
      case 'MEMOIZE':
        memo[len(memo)] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(memo[argument])
      case 'SETITEM' | 'SETITEMS':
        pairs = since_mark() if opcode.name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
        keys = [_of_type(key, str) for key in pairs[::2]]
        _of_type(stack[-1], dict).update(zip(keys, pairs[1::2], strict=True))
      case 'APPEND' | 'APPENDS':
        values = since_mark() if opcode.name == 'APPENDS' else [stack.pop()]
        _of_type(stack[-1], list).extend(values)
      case 'GLOBAL':
        stack.append(name(argument))
      case 'STACK_GLOBAL':
        module, attribute = _of_type(stack.pop(-2), str), _of_type(stack.pop(), str)
        stack.append(name(f'{module} {attribute}'))
      case 'BINPERSID':
        tag, kind, key, _, n = _of_type(stack.pop(), tuple)
        if _of_type(tag, str) != 'storage' or _of_type(kind, _Name).name not in _STORAGES:
          raise ValueError(f'its pickle refers to {tag!r} {kind.name!r}, which is no storage of a tensor')
        if (kind, _of_type(key, str)) not in storages:
          storages[kind, key] = storage(kind.name, key, _of_type(n, int))
        stack.append(storages[kind, key])
      case 'REDUCE':
        arguments = _of_type(stack.pop(), tuple)
        stack.append(_rebuilt(stack.pop(), arguments))
      case 'BUILD':
        stack.pop()
        _of_type(stack[-1], dict)
      case _:
        raise ValueError(f'its pickle has the instruction {opcode.name}, which no dict of tensors needs')
  raise ValueError('its pickle has no end')


def _of_type(value, kind: type):
  if type(value) is not kind:
    raise ValueError(f'its pickle has {type(value).__name__} where {kind.__name__} belongs')
  return value


def _rebuilt(function, arguments: tuple):
  """Returns what one of the three functions that such a pickle calls gives."""
  called = _of_type(function, _Name).name
  if called == _DICT and not arguments:
    return {}
  if called == _PARAMETER:
    tensor, _, _ = arguments
    return _of_type(tensor, np.ndarray)
  if called != _TENSOR or len(arguments) > _MOST_ARGUMENTS:
    raise ValueError(f'its pickle calls {called} with {len(arguments)} arguments')
  storage, offset, shape, strides, *_ = arguments
  _of_type(storage, np.ndarray)
  n_dimensions, n_strides = len(_of_type(shape, tuple)), len(_of_type(strides, tuple))
  numbers = (offset, *shape, *strides)
  if n_dimensions != n_strides or n_dimensions > _MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
    raise ValueError(f'it has a tensor of {files.shown({"offset": offset, "shape": shape, "strides": strides})}')
  n = math.prod(shape)
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if n else 0
  if n > storage.size or last >= storage.size > 0:
    raise ValueError(f'it has a tensor of shape {shape} that goes past its storage of {storage.size} numbers')
  in_bytes = [stride * storage.itemsize for stride in strides]
  return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)


def write(path: str | pathlib.Path, values: Mapping[str, Any]):
  """Writes a dict that `torch.load(path, weights_only=True)` gives back.

  Args:
    path: of a file that is not there yet.
    values: arrays of the types above, bools, ints, strings, and dicts of them.

  Raises:
    ValueError: a value is of another type.
  """
  tensors: list[np.ndarray] = []
  pickled = b''.join([pickle.PROTO, b'\x02', _pickled(dict(values), tensors), pickle.STOP])
  with open(path, 'xb') as file, zipfile.ZipFile(file, 'w') as archive:

    def add(name: str, data):
      entry = zipfile.ZipInfo(f'archive/{name}')
      entry.file_size = len(data)
      large = len(data) > 2**30
      n_before = file.tell() + _ZIP_HEADER + len(entry.filename) + 4 + large * _ZIP64_FIELD
      entry.extra = struct.pack('<2sH', b'FB', -n_before % _ALIGNMENT) + bytes(-n_before % _ALIGNMENT)
      with archive.open(entry, 'w', force_zip64=large) as out:
        out.write(data)

    add('data.pkl', pickled)
    add('byteorder', b'little')
    for key, tensor in enumerate(tensors):
      add(f'data/{key}', memoryview(tensor).cast('B'))
    add('version', b'3\n')


def _pickled(value, tensors: list[np.ndarray]) -> bytes:
  """Returns the instructions that put a value onto the stack; arrays are appended to the tensors."""
  if isinstance(value, np.ndarray):
    return _pickled_tensor(value, tensors)
  if type(value) is dict:
    items = [_pickled(part, tensors) for item in value.items() for part in item]
    return b''.join([pickle.EMPTY_DICT, pickle.MARK, *items, pickle.SETITEMS])
  if type(value) is tuple:
    return b''.join([pickle.MARK, *(_pickled(item, tensors) for item in value), pickle.TUPLE])
  if type(value) is str:
    data = value.encode('utf-8')
    return pickle.BINUNICODE + struct.pack('<I', len(data)) + data
  if type(value) is bool:
    return pickle.NEWTRUE if value else pickle.NEWFALSE
  if type(value) is int:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data
  raise ValueError(f'a value of type {type(value).__name__} cannot be written; give arrays, numbers and strings')


def _pickled_tensor(array: np.ndarray, tensors: list[np.ndarray]) -> bytes:
  kinds = {np.dtype(dtype): kind for kind, dtype in _STORAGES.items()}
  if array.dtype not in kinds:
    raise ValueError(f'an array of type {array.dtype} cannot be written; cast it to one of {sorted(map(str, kinds))}')
  transposed = array.ndim == 2 and array.flags.f_contiguous  # then its rows are written as they lie in memory
  stored = np.asarray(array.T if transposed else array, order='C')
  strides = tuple(stride // array.itemsize for stride in (stored.T if transposed else stored).strides)
  key = str(len(tensors))
  tensors.append(stored.reshape(-1).view(np.uint8))
  named = lambda name: pickle.GLOBAL + name.replace(' ', '\n').encode() + b'\n'
  plain = lambda value: _pickled(value, tensors)
  storage = [pickle.MARK, plain('storage'), named(kinds[array.dtype]), plain(key), plain('cpu'), plain(array.size)]
  hooks = [named(_DICT), pickle.EMPTY_TUPLE, pickle.REDUCE]
  arguments = [
    *(*storage, pickle.TUPLE, pickle.BINPERSID),
    *(plain(0), plain(array.shape), plain(strides), plain(False), *hooks),
  ]
  return b''.join([named(_TENSOR), pickle.MARK, *arguments, pickle.TUPLE, pickle.REDUCE])
