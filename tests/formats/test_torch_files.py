import contextlib
import io
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from jax_interp.formats import torch_files

ROOT = pathlib.Path(__file__).parents[2]
VALUES = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'transposed': np.arange(20, dtype=np.float64).reshape(4, 5).T,
  'steps': np.arange(3, dtype=np.int64),
  'k': np.asarray(3, np.int32),
  'nested': {'name': 'TopK é', 'n': 2**40, 'negative': -5, 'zero': 0, 'flag': True, 'empty': {}},
}


def _equal(found, expected):
  if isinstance(expected, dict):
    assert list(found) == list(expected)
    for name, value in expected.items():
      _equal(found[name], value)
  elif isinstance(expected, np.ndarray):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
  else:
    assert found == expected
    assert type(found) is type(expected)


def _zip(path, pickled: bytes, entries={}, compression=zipfile.ZIP_STORED, root='archive/'):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr(f'{root}data.pkl', pickled)
    for name, data in entries.items():
      archive.writestr(root + name, data)
  return path


def test_what_is_written_is_read(tmp_path):
  torch_files.write(tmp_path / 'a.pt', VALUES)
  _equal(torch_files.read(tmp_path / 'a.pt'), VALUES)


def test_tensors_lie_aligned_in_the_file(tmp_path):
  torch_files.write(tmp_path / 'a.pt', VALUES)
  data = (tmp_path / 'a.pt').read_bytes()
  for value in ('a', 'transposed', 'steps'):
    stored = VALUES[value].T if value == 'transposed' else VALUES[value]
    assert data.index(stored.tobytes()) % 64 == 0


def test_torch_reads_what_is_written(tmp_path):
  torch = pytest.importorskip('torch', reason='compares with torch.load')
  torch_files.write(tmp_path / 'a.pt', VALUES)
  for mmap in (False, True):
    found = torch.load(tmp_path / 'a.pt', weights_only=True, mmap=mmap)
    assert found.pop('nested') == VALUES['nested']
    assert found['transposed'].stride() == (1, 5)  # columns as they lay in memory
    _equal({name: tensor.numpy() for name, tensor in found.items()}, {n: v for n, v in VALUES.items() if n != 'nested'})


def test_what_torch_writes_is_read(tmp_path):
  torch = pytest.importorskip('torch', reason='compares with torch.save')
  linear = torch.nn.Linear(3, 5)
  base = torch.arange(24.0).reshape(4, 6)
  values = {
    'state': linear.state_dict(),  # an ordered dict with an attribute
    'parameter': linear.weight,
    'view': base[1:3, ::2],
    'same_storage': base.T,
    'half': base.half(),
    'bfloat16': base.bfloat16(),
    'bool': base > 3,
    'scalar': torch.tensor(-1.0),
    'empty': torch.zeros(0, 4),
    'list': [1, 2.5, None, (True, 'x')],
  }
  torch.save(values, tmp_path / 'a.pt')
  found = torch_files.read(tmp_path / 'a.pt')
  weight = linear.weight.detach().numpy()
  np.testing.assert_array_equal(found['state']['weight'], weight)
  np.testing.assert_array_equal(found['parameter'], weight)
  assert found['list'] == values['list']
  for name in ('view', 'same_storage', 'half', 'bool', 'scalar', 'empty'):
    _equal(found[name], values[name].numpy())
  np.testing.assert_array_equal(found['bfloat16'].astype(np.float32), base.numpy())


class _Calls:
  """Pickles as a call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', range(5))
@pytest.mark.parametrize('nested', [False, True], ids=['bare', 'nested'])
def test_calls_are_not_made(tmp_path, protocol, nested):
  marker = tmp_path / 'was_run'
  attacks = [
    _Calls(os.system, f'touch {marker}'),
    _Calls(eval, f'open({str(marker)!r}, "w")'),
    _Calls(exec, f'open({str(marker)!r}, "w")'),
    _Calls(getattr, _Calls(__import__, 'os'), 'system'),
    _Calls(_Calls(getattr, _Calls(__import__, 'os'), 'system'), f'touch {marker}'),
    _Calls(open, str(marker), 'w'),
    io.BytesIO(b'an object of a class'),
  ]
  for i, attack in enumerate(attacks):
    values = {'encoder.weight': [{'deep': (attack,)}]} if nested else attack
    try:
      pickled = pickle.dumps(values, protocol)
    except (pickle.PicklingError, TypeError):  # a call of what is no name cannot be written
      continue
    with pytest.raises(ValueError, match='nothing of it was run'):
      torch_files.read(_zip(tmp_path / f'{i}.pt', pickled))
  assert not marker.exists()


TENSOR, DICT = b'ctorch._utils\n_rebuild_tensor_v2\n', b'ccollections\nOrderedDict\n'
STORAGE = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ'
ATTACKS = {
  'a call written out': b'cposix\nsystem\n(X\x04\x00\x00\x00trueetR.',
  'the old instruction of a call': b'(X\x04\x00\x00\x00trueios\nsystem\n.',
  'an object': b'(cos\nsystem\nX\x04\x00\x00\x00trueo.',
  'a class': b'cbuiltins\nobject\n)\x81.',
  'an attribute of a known name': b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n.',
  'a name built from parts': b'\x8c\x02os\x8c\x06system\x93.',
  'a number for a module': b'K\x01\x8c\x06system\x93.',
  'an extension': b'\x82\x01.',
  'a change of a known function': TENSOR + b'}X\x08\x00\x00\x00__code__Nsb.',
  'a change of a known class': DICT + b'}X\x03\x00\x00\x00popNsb.',
  'arguments of a dict': DICT + b'(](K\x01K\x02eetR.',
  'a call of a dict': b'})R.',
  'a call of a storage': STORAGE + b')R.',
  'a call of a number': b'K\x01)R.',
  'a reference to no storage': b'(X\x06\x00\x00\x00moduleNNNNtQ.',
  'a reference that is a string': b'X\x06\x00\x00\x00moduleQ.',
  'a written reference': b'Pmodule\n.',
  'a storage that is not there': STORAGE.replace(b'\x000X', b'\x00zX') + b'.',
  'a storage elsewhere': STORAGE.replace(b'X\x01\x00\x00\x000', b'X\x0b\x00\x00\x00../data.pkl') + b'.',
  'a tensor of no storage': TENSOR + b'(}K\x00K\x02\x85K\x01\x85tR.',
  'a tensor past its storage': TENSOR + b'(' + STORAGE + b'K\x00K\x07\x85K\x01\x85tR.',
  'strides past the storage': TENSOR + b'(' + STORAGE + b'K\x00K\x02K\x03\x86K\x04K\x01\x86tR.',
  'an offset past the storage': TENSOR + b'(' + STORAGE + b'K\x05K\x02\x85K\x01\x85tR.',
  'a negative offset': TENSOR + b'(' + STORAGE + b'J\xff\xff\xff\xffK\x02\x85K\x01\x85tR.',
  'a negative stride': TENSOR + b'(' + STORAGE + b'K\x05K\x02\x85J\xff\xff\xff\xff\x85tR.',
  'a vast tensor of one number': TENSOR + b'(' + STORAGE + b'K\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85tR.',
  'sizes and strides of two lengths': TENSOR + b'(' + STORAGE + b'K\x00K\x02\x85K\x01K\x01\x86tR.',
  'a size that is no number': TENSOR + b'(' + STORAGE + b'K\x00N\x85K\x01\x85tR.',
  'a storage of another size': STORAGE.replace(b'K\x06', b'K\x07') + b'.',
  'too few arguments': TENSOR + b'(' + STORAGE + b'tR.',
  'a key that is a dict': b'}}K\x01s.',
  'an empty stack': b'.',
  'two values': b'}}.',
  'no end': b'}',
  'no mark': b'u.',
  'a memo that is not there': b'h\x05.',
  'no pickle': b'\xff\xff\xff',
  'a vast string': b'X\xff\xff\xff\x7fabc.',
}


@pytest.mark.parametrize('name', ATTACKS)
def test_what_no_dict_of_tensors_needs_is_refused(tmp_path, name):
  path = _zip(tmp_path / 'a.pt', b'\x80\x02' + ATTACKS[name], {'data/0': bytes(24)})
  with pytest.raises(ValueError, match=r'a\.pt is damaged or not to be trusted: .*nothing of it was run'):
    torch_files.read(path)


VALUES_WITHOUT_END = {
  'doubled': b')' + b'q\x00h\x00\x86' * 60,  # 2^60 empty tuples to whoever hashes or prints it
  'nested': b')' + b'\x85' * 150_000,  # whoever hashes it overflows the stack
}
PLACES = {  # of such a value, V
  'a key': b'}VK\x01s.',
  'keys': b'}(VK\x01K\x01K\x01u.',
  'a key of a storage': STORAGE.replace(b'X\x01\x00\x00\x000', b'V') + b'.',
  'a tag of a storage': STORAGE.replace(b'X\x07\x00\x00\x00storage', b'V') + b'.',
  'a kind of a storage': STORAGE.replace(b'ctorch\nFloatStorage\n', b'V') + b'.',
  'a size of a storage': STORAGE.replace(b'K\x06', b'V') + b'.',
  'a function': b'V)R.',
  'a module': b'V\x8c\x06system\x93.',
  'an offset': TENSOR + b'(' + STORAGE + b'VK\x02\x85K\x01\x85tR.',
  'a shape': TENSOR + b'(' + STORAGE + b'K\x00VK\x01\x85tR.',
  'a size': TENSOR + b'(' + STORAGE + b'K\x00V\x85K\x01\x85tR.',
}
VAST = {
  'many lists': b'(' + b']' * 2**22 + b't.',
  'a product of long numbers': (
    TENSOR + b'(' + STORAGE + b'K\x00(\x8a\xff' + b'\x7f' * 255 + b'q\x01' + b'h\x01' * 400_000 + b'tq\x02h\x02tR.'
  ),
  'long arguments, time and again': (
    b'(%bq\x01(%bK\x00K\x02\x85K\x01\x85' % (TENSOR, STORAGE)
    + b'N' * 400_000
    + b'tq\x02R'
    + b'h\x01h\x02R' * 100_000
    + b't.'
  ),
  'a long name': b'c' + b'x' * 10**6 + b'\nsystem\n.',
}


def test_what_would_take_for_ever_is_refused_at_once(tmp_path):
  """In another process: a reader that is too patient, or crashes, must not take the tests with it."""
  pickles = VAST | {
    f'{place}, {kind}': around.replace(b'V', value)
    for place, around in PLACES.items()
    for kind, value in VALUES_WITHOUT_END.items()
  }
  paths = [
    _zip(tmp_path / f'{name}.pt', b'\x80\x02' + pickled, {'data/0': bytes(24)}) for name, pickled in pickles.items()
  ]
  program = """if True:
    import sys
    from jax_interp.formats import torch_files
    for path in sys.argv[1:]:
      print(path, flush=True)
      try:
        torch_files.read(path)
      except ValueError as e:
        print(e, flush=True)
  """
  done = subprocess.run(
    [sys.executable, '-c', program, *paths], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
  )
  lines = done.stdout.splitlines()
  assert lines[::2] == [str(path) for path in paths]
  for path, error in zip(paths, lines[1::2], strict=True):
    assert error.startswith(f'{path} is damaged or not to be trusted: ')
    assert len(error) < 2000


def test_the_pieces_of_those_attacks_are_sound(tmp_path):
  pickled = b'\x80\x02' + TENSOR + b'(' + STORAGE + b'K\x00K\x02K\x03\x86K\x03K\x01\x86\x89' + DICT + b')RtR.'
  path = _zip(
    tmp_path / 'a.pt', b'\x80\x02}X\x01\x00\x00\x00x' + pickled[2:-1] + b's.', {'data/0': VALUES['a'].tobytes()}
  )
  _equal(torch_files.read(path), {'x': VALUES['a']})


def test_files_that_are_not_whole_are_refused(tmp_path):
  torch_files.write(tmp_path / 'whole.pt', VALUES)
  data = (tmp_path / 'whole.pt').read_bytes()
  path = tmp_path / 'cut.pt'
  for n in range(0, len(data), 13):
    path.write_bytes(data[:n])
    with pytest.raises(ValueError, match=r'cut\.pt'):
      torch_files.read(path)
  path.write_bytes(data.replace(VALUES['a'].tobytes(), bytes(24)))  # another checksum
  with pytest.raises(ValueError, match=r'cut\.pt is damaged or not to be trusted: Bad CRC'):
    torch_files.read(path)
  with pytest.raises(FileNotFoundError):
    torch_files.read(tmp_path / 'absent.pt')


def test_any_damage_of_a_pickle_is_a_value_error_or_another_dict(tmp_path):
  torch_files.write(tmp_path / 'whole.pt', VALUES)
  with zipfile.ZipFile(tmp_path / 'whole.pt') as archive:
    entries = {name.removeprefix('archive/'): archive.read(name) for name in archive.namelist()}
  pickled = bytearray(entries.pop('data.pkl'))
  rng = np.random.default_rng(0)
  for _ in range(400):
    damaged = bytearray(pickled)
    for at in rng.integers(len(pickled), size=rng.integers(1, 4)):
      damaged[at] = rng.integers(256)
    with contextlib.suppress(ValueError):
      assert isinstance(torch_files.read(_zip(tmp_path / 'a.pt', bytes(damaged), entries)), dict)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
  pickled = pickle.dumps({}, 2)
  assert torch_files.read(_zip(tmp_path / 'a.pt', pickled, {'byteorder': b'little'})) == {}
  path = tmp_path / 'b.pt'
  for kwargs, message in (
    ({'compression': zipfile.ZIP_DEFLATED}, 'compressed'),
    ({'compression': zipfile.ZIP_DEFLATED, 'entries': {'data/0': bytes(1000)}}, 'larger than the file'),
    ({'entries': {'byteorder': b'big'}}, 'little-endian'),
    ({'root': ''}, '0 entries data.pkl'),
    ({'root': 'deeper/archive/'}, '0 entries data.pkl'),
  ):
    with pytest.raises(ValueError, match=message):
      torch_files.read(_zip(path, pickled, **kwargs))
  with pytest.raises(ValueError, match='holds list and not a dict'):
    torch_files.read(_zip(path, pickle.dumps([], 2)))
  path.write_bytes(pickle.dumps({'an': 'old file'}, 2))
  with pytest.raises(ValueError, match=r'torch before 1\.6'):
    torch_files.read(path)


def test_values_of_other_types_are_not_written(tmp_path):
  with pytest.raises(ValueError, match='of type set'):
    torch_files.write(tmp_path / 'a.pt', {'a': {1}})
  with pytest.raises(ValueError, match='complex128'):
    torch_files.write(tmp_path / 'a.pt', {'a': np.zeros(2, complex)})
