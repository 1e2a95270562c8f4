import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from jax_interp import near_copies, text
from models import pretrained
from train import command, windows

ROOT = pathlib.Path(__file__).parents[2]


def _corpus(folder, **settings):
  """Writes a text of some 4,600 tokens and returns the config that reads it."""
  (folder / 'corpus.jsonl').write_text(
    '\n'.join(json.dumps({'text': f'document number {i} of many ' * 6}) for i in range(100))
  )
  return ml_collections.ConfigDict({'text': {'source': str(folder / 'corpus.jsonl'), 'window': 16, **settings}})


def _left(workdir):
  return {path.name: path.read_bytes() for path in (workdir / 'text').iterdir()}


@pytest.fixture(scope='module')
def tokenizer():
  return pretrained.load_tokenizer('embedded')


def test_windows_are_written_once_and_stay(tmp_path, tokenizer):
  config = _corpus(tmp_path)
  train_et = np.array(windows.prepared(config, tmp_path, tokenizer, 'train'))
  held_out_et = np.array(windows.prepared(config, tmp_path, tokenizer, 'held_out'))
  (tmp_path / 'corpus.jsonl').unlink()
  np.testing.assert_array_equal(windows.prepared(config, tmp_path, tokenizer, 'train'), train_et)
  assert train_et.shape[1] == 16
  assert 0 < len(held_out_et) < len(train_et)


def test_windows_are_those_of_the_stream_in_a_file_as_numpy_saves_it(tmp_path, tokenizer):
  settings = {'shuffle': 3, 'boundaries': 'padded'}
  config = _corpus(tmp_path, **settings)
  for split in text.SPLITS:
    windows_et = windows.prepared(config, tmp_path, tokenizer, split)
    expected_et = np.stack(list(text.Windows(config.text.source, tokenizer, split, window=16, **settings)))
    np.testing.assert_array_equal(windows_et, expected_et)
    np.save(tmp_path / 'expected.npy', expected_et)
    assert pathlib.Path(windows_et.filename).read_bytes() == (tmp_path / 'expected.npy').read_bytes()
  assert len(_left(tmp_path)) == 2


def test_windows_to_train_a_language_model_on_are_packed_in_order(tmp_path, tokenizer):
  plain, other = _corpus(tmp_path), _corpus(tmp_path, shuffle=0, boundaries='padded', near_duplicates=0.5)
  expected_et = np.array(windows.prepared(plain, tmp_path / 'a', tokenizer, 'train', 32))
  np.testing.assert_array_equal(windows.prepared(other, tmp_path / 'b', tokenizer, 'train', 32), expected_et)


def test_max_tokens_ends_both_splits_at_one_document(tmp_path, tokenizer):
  config = _corpus(tmp_path, max_tokens=16 * 100, boundaries='padded')
  train_et, held_out_et = (windows.prepared(config, tmp_path, tokenizer, split) for split in text.SPLITS)
  assert len(train_et) == 100
  last = lambda windows_et: max(int(n) for n in re.findall(r'number (\d+) of', ' '.join(map(_text, windows_et))))
  _text = lambda window_t: tokenizer.decode(window_t[window_t != text.PAD])
  documents = list(text.documents(config.text.source, 'held_out'))
  numbers = [int(document.split()[2]) for document in documents]
  assert last(held_out_et) == max(n for n in numbers if n <= last(train_et)) < max(numbers)


def test_no_held_out_window_is_a_near_copy_of_a_train_window(tmp_path, tokenizer):
  config = _corpus(tmp_path, boundaries='padded', near_duplicates=0.8)
  train_et, held_out_et = (windows.prepared(config, tmp_path / 'kept', tokenizer, split) for split in text.SPLITS)
  config.text.near_duplicates = 0.0
  all_et = [windows.prepared(config, tmp_path / 'all', tokenizer, split) for split in text.SPLITS]
  keep = near_copies.distinct(all_et, 0.8)
  np.testing.assert_array_equal(train_et, all_et[0][keep[0]])
  np.testing.assert_array_equal(held_out_et, all_et[1][keep[1]])
  assert 0 < len(train_et) < len(all_et[0])
  assert len(_left(tmp_path / 'kept')) == 2
  config.text.near_duplicates = 1.5
  with pytest.raises(ValueError, match=r'near_duplicates 1\.5 is no similarity; give one from 0'):
    windows.prepared(config, tmp_path, tokenizer, 'train')


@pytest.mark.parametrize('settings', [{}, {'shuffle': 1, 'max_tokens': 16 * 250, 'near_duplicates': 0.9}])
def test_stopped_again_and_again_the_windows_are_the_same(tmp_path, tokenizer, monkeypatch, settings):
  config = _corpus(tmp_path, **settings)
  windows.prepared(config, tmp_path / 'whole', tokenizer, 'train')
  monkeypatch.setattr(windows, 'TOKENS_AT_ONCE', 16 * 32)
  monkeypatch.setattr(text, 'BATCH_DOCUMENTS', 8)
  asked = itertools.count(1)
  monkeypatch.setattr(command, 'stopping', lambda: next(asked) % 3 == 0)
  n_stops = 0
  while True:
    try:
      windows.prepared(config, tmp_path / 'stopped', tokenizer, 'train')
      break
    except command.Stopped:
      n_stops += 1
  assert n_stops >= 2
  assert _left(tmp_path / 'stopped') == _left(tmp_path / 'whole')


def test_killed_while_windows_are_written_or_renamed_it_goes_on_to_the_same(tmp_path, tokenizer):
  config = _corpus(tmp_path)
  windows.prepared(config, tmp_path / 'whole', tokenizer, 'train')
  code = """
import os, pathlib, signal, sys
import ml_collections
from jax_interp import text
from models import pretrained
from train import windows
windows.TOKENS_AT_ONCE, windows.SAVE_SECONDS, text.BATCH_DOCUMENTS = 16 * 16, 0, 4
left = int(sys.argv[3])
def counting(act):
  def acted(*args):
    global left
    left -= 1
    if left < 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return act(*args)
  return acted
os.fsync, os.replace = counting(os.fsync), counting(os.replace)
config = ml_collections.ConfigDict({'text': {'source': sys.argv[1], 'window': 16}})
windows.prepared(config, pathlib.Path(sys.argv[2]), pretrained.load_tokenizer('embedded'), 'train')
"""
  codes = []
  for n_writes in (5, 8, 1000):  # the killed runs end within the train file; the last one finishes
    run = [sys.executable, '-c', code, config.text.source, str(tmp_path / 'killed'), str(n_writes)]
    codes.append(subprocess.run(run, cwd=ROOT, capture_output=True, check=False).returncode)
  assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
  assert _left(tmp_path / 'killed') == _left(tmp_path / 'whole')


def test_of_two_processes_the_first_writes_the_windows_or_each_its_own_or_both_raise(tmp_path, tokenizer):
  config = _corpus(tmp_path)
  expected_et = np.array(windows.prepared(config, tmp_path / 'whole', tokenizer, 'train'))
  code = """
import pathlib, sys, time
import jax, ml_collections
from models import pretrained
from train import windows
address, process, folder, source = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(address, 2, process)
tokenizer = pretrained.load_tokenizer('embedded')
make, made = windows._make_windows, []
def making(*args, **kwargs):
  made.append(process)
  time.sleep(1)
  make(*args, **kwargs)
windows._make_windows = making
def total(workdir, source):
  config = ml_collections.ConfigDict({'text': {'source': source, 'window': 16}})
  return int(windows.prepared(config, workdir, tokenizer, 'train').sum())
found = [total(folder / 'shared', source), total(folder / f'own_{process}', source)]
try:
  total(folder / 'none', 'nowhere.txt')
except (ValueError, OSError) as e:
  found.append(str(e)[:28])
print(*found, made, sep='|')
"""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = {**os.environ, 'XLA_FLAGS': ''}
  run = lambda process: subprocess.Popen(
    [sys.executable, '-c', code, address, str(process), str(tmp_path), config.text.source],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  first, second = [process.communicate(timeout=600)[0].splitlines()[-1] for process in [run(0), run(1)]]
  total = expected_et.sum()
  assert first == f"{total}|{total}|no text at 'nowhere.txt'; gi|[0, 0, 0]"
  assert second == f'{total}|{total}|process 0 could not write th|[1]'  # its own, of the folders that are not shared


@pytest.mark.parametrize('near_duplicates', [0.0, 0.9])
def test_an_error_at_any_write_or_rename_loses_nothing(tmp_path, tokenizer, monkeypatch, near_duplicates):
  config = _corpus(tmp_path, near_duplicates=near_duplicates)
  windows.prepared(config, tmp_path / 'whole', tokenizer, 'train')
  monkeypatch.setattr(windows, 'TOKENS_AT_ONCE', 16 * 64)
  monkeypatch.setattr(windows, 'SAVE_SECONDS', 0)
  replace = os.replace
  for n_before in itertools.count():
    left = iter(range(n_before))

    def failing(*paths, left=left):
      if next(left, None) is None:
        raise OSError('no more renames')
      replace(*paths)

    workdir = tmp_path / str(n_before)
    monkeypatch.setattr(os, 'replace', failing)
    try:
      windows.prepared(config, workdir, tokenizer, 'train')
      break
    except OSError:
      monkeypatch.setattr(os, 'replace', replace)
      windows.prepared(config, workdir, tokenizer, 'train')
    assert _left(workdir) == _left(tmp_path / 'whole')
  assert n_before > 6


def test_a_text_that_changed_in_between_or_a_damaged_file_is_read_anew(tmp_path, tokenizer, monkeypatch, capsys):
  monkeypatch.setattr(windows, 'TOKENS_AT_ONCE', 16 * 32)
  monkeypatch.setattr(command, 'stopping', lambda: True)
  config = _corpus(tmp_path)
  for workdir in (tmp_path / 'changed', tmp_path / 'damaged'):
    with pytest.raises(command.Stopped):
      windows.prepared(config, workdir, tokenizer, 'train')
  monkeypatch.setattr(command, 'stopping', lambda: False)
  (partial,) = (tmp_path / 'damaged' / 'text').glob('*.partial')
  os.truncate(partial, partial.stat().st_size - 1)
  windows.prepared(config, tmp_path / 'damaged', tokenizer, 'train')
  assert 'is of another text or damaged; it is written anew' in capsys.readouterr().out
  windows.prepared(config, tmp_path / 'whole', tokenizer, 'train')
  assert _left(tmp_path / 'damaged') == _left(tmp_path / 'whole')
  with open(config.text.source, 'a') as file:
    file.write('\n' + json.dumps({'text': 'one more document ' * 20}))
  windows.prepared(config, tmp_path / 'changed', tokenizer, 'train')
  assert 'it is written anew' in capsys.readouterr().out
  windows.prepared(config, tmp_path / 'anew', tokenizer, 'train')
  assert _left(tmp_path / 'changed') == _left(tmp_path / 'anew')


def test_text_without_held_out_documents_is_told_before_the_train_windows_are_written(tmp_path, tokenizer):
  config = _corpus(tmp_path)
  train = [{'text': document} for document in text.documents(config.text.source)]
  pathlib.Path(config.text.source).write_text('\n'.join(map(json.dumps, train)))
  with pytest.raises(ValueError, match="holds no text for the split 'held_out'"):
    windows.prepared(config, tmp_path, tokenizer, 'train')
  assert not (tmp_path / 'text').exists()
