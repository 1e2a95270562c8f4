"""What the formats share on disk: JSON and safetensors with clear errors, tensors checked, writes all or nothing."""

import contextlib
import json
import pathlib
import reprlib
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

_FLOATS = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': jnp.bfloat16}
_SCALES = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 80, 80
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 20
_LONGEST = 500  # characters of what a file holds, or of what a parser says of it, in an error


@contextlib.contextmanager
def reading(path: str | pathlib.Path, fault: str = 'is damaged', advice: str = 'fetch it again') -> Iterator[None]:
  """Makes whatever the block raises a ValueError that names the file.

  The block is to parse, with the file opened before it. By bytes that nobody meant for them, the parsers of zip, npy,
  JSON and pickles raise nearly anything: RecursionError, MemoryError, NotImplementedError, TokenError and others.

  Args:
    path: of the file.
    fault: what is then said of it, and
    advice: what to do.
  """
  try:
    yield
  except Exception as e:
    raise ValueError(f'{path} {fault}: {str(e)[:_LONGEST] or type(e).__name__}; {advice}') from e


def shown(value) -> str:
  """Returns what a file holds as errors print it: cut short, since the whole of it may be endless."""
  return _REPR.repr(value)[:_LONGEST]


def zip_entries(path: str | pathlib.Path) -> list[str]:
  """Returns the names in a zip file; none where there is no file, or it is no zip file.

  Raises:
    ValueError: it is a damaged one.
  """
  if not pathlib.Path(path).is_file():
    return []
  with open(path, 'rb') as file, reading(path, 'is no whole zip file'):
    if not zipfile.is_zipfile(file):
      return []
    with zipfile.ZipFile(file) as archive:
      return archive.namelist()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the settings of a JSON file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged or holds no settings.
  """
  data = path.read_bytes()
  with reading(path):
    found = json.loads(data.decode('utf-8'))
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds {type(found).__name__} and no settings; fetch it again')
  return found


def field(path: pathlib.Path, settings: Mapping[str, Any], name: str, kind: type, default=None):
  """Returns a setting of a file.

  Raises:
    ValueError: it is absent and has no default, or is of another type.
  """
  value = settings.get(name, default)
  if type(value) is not kind:  # not isinstance, for which True is an int
    raise ValueError(f'{path}: {name} is {shown(value)}, not of type {kind.__name__}; complete the file')
  return value


def active(path: pathlib.Path, settings: Mapping[str, Any], n_latents: int) -> int:
  """Returns how many latents stay on, the setting k of a file.

  Raises:
    ValueError: it is absent, or not within 1 and n_latents.
  """
  k = field(path, settings, 'k', int)
  if not 1 <= k <= n_latents:
    raise ValueError(f'{path}: k is {shown(k)}, not within 1 and the {n_latents} latents of the weights; correct it')
  return k


def scale(path: pathlib.Path, settings: Mapping[str, Any], name: str) -> float:
  """Returns a setting of a file that numbers are multiplied by.

  Raises:
    ValueError: it is absent, or not a positive number of float32.
  """
  value = settings.get(name)
  if type(value) not in (int, float) or not _SCALES[0] <= value <= _SCALES[1]:
    raise ValueError(f'{path}: {name} is {shown(value)}, not a positive number of float32; complete the file')
  return float(value)


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file, of float64, float32, float16 or bfloat16.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged or has a tensor of another type.
  """
  data = path.read_bytes()
  with reading(path):
    found = dict(safetensors.deserialize(data))
  for name, tensor in found.items():
    if tensor['dtype'] not in _FLOATS:
      raise ValueError(f'{path}: {name} is of type {tensor["dtype"]}; supported: {", ".join(_FLOATS)}')
  with reading(path):
    return {
      name: np.frombuffer(tensor['data'], _FLOATS[tensor['dtype']]).reshape(tensor['shape'])
      for name, tensor in found.items()
    }


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]):
  """Writes arrays, which may be views, in float32."""
  # Not save_file: on a full disk it raises an error of its own, which is no OSError.
  contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
  path.write_bytes(safetensors_numpy.save(contiguous))


def checked(
  path: pathlib.Path, tensors: Mapping[str, Any], dims: Mapping[str, str], ignored: Collection[str] = ()
) -> dict[str, np.ndarray]:
  """Returns the tensors that a format wants, in float32.

  Args:
    path: of the file, for errors.
    tensors: what is in it.
    dims: the dimensions of every tensor that must be there, a letter each: the same letter is the same size.
    ignored: names of tensors that may be there too.

  Raises:
    ValueError: a tensor is missing, is not known, is not of numbers with a point, or its shape does not fit.
  """
  if wrong := sorted((dims.keys() - tensors.keys()) | (tensors.keys() - dims.keys() - set(ignored)), key=str):
    raise ValueError(
      f'{path} has the tensors {shown(sorted(tensors, key=str))}, but the format has {sorted(dims)}; look at '
      f'{shown(wrong)}, or name another format'
    )
  sizes: dict[str, int] = {}
  for name, letters in dims.items():
    array = tensors[name]
    if not isinstance(array, np.ndarray) or not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f'{path}: {name} is of type {getattr(array, "dtype", type(array).__name__)}, not floating point')
    fits = array.ndim == len(letters) and all(array.shape)
    if not fits or any(sizes.setdefault(dim, n) != n for dim, n in zip(letters, array.shape, strict=True)):
      known = ', '.join(f'{dim}={n}' for dim, n in sizes.items())
      raise ValueError(f'{path}: {name} has the shape {list(array.shape)}, not [{", ".join(letters)}] with {known}')
  return {name: tensors[name].astype(np.float32, copy=False) for name in dims}


@contextlib.contextmanager
def new(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path beside this one to write a file or folder at, which takes this path's place when the block ends well.

  Raises:
    FileExistsError: there is something at this path.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise FileExistsError(f'{path} is there already; choose another path, or delete it first')
  partial = path.with_name(f'{path.name}.partial')
  _remove(partial)
  partial.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield partial
    partial.rename(path)
  finally:
    _remove(partial)


def _remove(path: pathlib.Path):
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
