import itertools
import json
import sys
import tracemalloc

import numpy as np
import pytest
import tokenizers

from jax_interp import text, text_sources
from models import pretrained

DOCUMENTS = [
  f'The {number} quick brown foxes jump over {number} lazy dogs.\nAnd number {number} ends.' for number in range(300)
]
DOCUMENTS[40] = ' '.join(DOCUMENTS[200:230])  # longer than a window and than a batch's share
DOCUMENTS[7] = DOCUMENTS[150] = '\n \n'
SPLIT = {split: [d for d in DOCUMENTS if d.strip() and text.split_of(d) == split] for split in text.SPLITS}
FILES = ('jsonl', 'folder', 'parquet', 'glob')
SOURCES = (*FILES, 'saved', 'hub')


def _write(path, documents):
  if path.suffix == '.jsonl':
    path.write_text('\n'.join(json.dumps({'id': 0, 'text': document}) for document in documents))
  else:
    pyarrow = pytest.importorskip('pyarrow')
    table = pyarrow.table({'id': list(range(len(documents))), 'text': documents})
    pytest.importorskip('pyarrow.parquet').write_table(table, path, row_group_size=60)
  return path


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Returns a function that writes DOCUMENTS as a kind of source and returns its name."""

  def write(kind):
    if kind in ('jsonl', 'parquet'):
      return str(_write(tmp_path / f'corpus.{kind}', DOCUMENTS))
    if kind == 'saved':
      datasets = pytest.importorskip('datasets')
      datasets.Dataset.from_dict({'text': DOCUMENTS, 'id': DOCUMENTS}).save_to_disk(tmp_path / 'saved')
      return str(tmp_path / 'saved')
    suffix = 'jsonl' if kind == 'folder' else 'parquet'
    for number, part in enumerate((DOCUMENTS[:100], DOCUMENTS[100:180], DOCUMENTS[180:])):
      _write(tmp_path / f'part-{number}.{suffix}', part)
    (tmp_path / 'README.md').write_text('not text to read')
    if kind == 'hub':
      return _hub(monkeypatch, str(tmp_path / 'part-*.parquet'))
    return str(tmp_path if kind == 'folder' else tmp_path / 'part-*.parquet')

  return write


def _hub(monkeypatch, files):
  datasets = pytest.importorskip('datasets')
  load_dataset = datasets.load_dataset

  def load(path, name, revision, split, streaming):
    assert (path, name, revision, split, streaming) == ('owner/corpus', 'small-1B', 'v1.0', 'train', True)
    return load_dataset('parquet', data_files=files, split=split, streaming=True)

  monkeypatch.setattr(datasets, 'load_dataset', load)
  return 'owner/corpus:small-1B@v1.0'


@pytest.fixture
def small(monkeypatch):
  """Batches and blocks so small that a few hundred documents cross many of their borders."""
  monkeypatch.setattr(text, 'BATCH_DOCUMENTS', 7)
  monkeypatch.setattr(text_sources, 'PARQUET_ROWS', 11)
  monkeypatch.setattr(text, 'SHUFFLE_BLOCK', 32)


@pytest.fixture(scope='module')
def tokenizer():
  tokenizer = pretrained.load_tokenizer('embedded')
  tokenizer.bos_token = 'Ā'  # the byte 0, which no text here holds
  return tokenizer


def _stream(documents, tokenizer, *end):
  return [token for document in documents for token in [*tokenizer(document)['input_ids'], *end]]


# Documents


@pytest.mark.parametrize('kind', SOURCES)
def test_every_source_gives_its_documents_in_order(make, kind):
  source = make(kind)
  for split in text.SPLITS:
    assert list(text.documents(source, split)) == SPLIT[split]
  assert 10 <= len(SPLIT['held_out']) <= 50


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
  source = str(_write(tmp_path / 'other.jsonl', DOCUMENTS[49::-1]))
  assert set(text.documents(source, 'held_out')) == set(SPLIT['held_out']) & set(DOCUMENTS[:50])


def test_documents_that_mostly_repeat_are_dropped():
  lines = [f'this is a long enough line, number {number}' for number in range(4)]
  first, half_new, mostly_old = (
    '\n'.join(lines),
    '\n'.join([*lines[:2], 'x' * 30, 'y' * 30]),
    '\n'.join([*lines[:3], 'z' * 30]),
  )
  assert list(text_sources.deduplicate([first, first + '\n', half_new, mostly_old])) == [first, half_new]


def test_a_jsonl_file_is_cut_at_line_feeds_alone(tmp_path):
  documents = [f'{document}\u2028and\x85so on' for document in DOCUMENTS]
  path = tmp_path / 'corpus.jsonl'
  path.write_bytes('\r\n'.join(json.dumps({'text': x}, ensure_ascii=False) for x in documents).encode('utf-8-sig'))
  found = [document for split in text.SPLITS for document in text.documents(str(path), split)]
  assert sorted(found) == sorted(documents)


def test_blank_lines_of_a_jsonl_file_are_skipped(tmp_path):
  path = tmp_path / 'corpus.jsonl'
  blank = [b'', b' \t\r\n', b'\n\n', b'  \n']
  lines = [json.dumps({'text': document}).encode() + b'\n' for document in DOCUMENTS[:4]]
  path.write_bytes(
    b'\xef\xbb\xbf\n' + b''.join(part for pair in zip(blank, lines, strict=True) for part in pair) + b'\n \n'
  )
  _, read = text_sources.open_source(str(path), 'text')
  found = list(read({}))
  assert [document for document, _ in found] == DOCUMENTS[:4]
  assert [position['line'] for _, position in found] == [2, 4, 7, 9]
  for number, (_, position) in enumerate(found, 1):
    assert list(read(position)) == found[number:]
  path.write_bytes(path.read_bytes() + b'bad')
  with pytest.raises(ValueError, match='line 12: expected a JSON object'):
    list(read(found[2][1]))


def test_half_a_surrogate_pair_in_json_is_a_replacement_character(tmp_path, tokenizer):
  path = tmp_path / 'corpus.jsonl'
  path.write_text('\n'.join(f'{{"text": "{n} \\ud83d\\ude00 and \\ud800 end"}}' for n in range(300)))
  assert next(text.documents(str(path))).endswith(' \U0001f600 and \ufffd end')
  assert '\ufffd' in tokenizer.decode(next(text.Windows(str(path), tokenizer)))


def test_a_txt_file_is_cut_at_blank_lines(tmp_path):
  path = tmp_path / 'corpus.txt'
  content = '\n\n'.join(f'paragraph {number}\n' + chr(97 + number % 26) * 500 for number in range(200)) + '\n\n\n\nend'
  path.write_bytes(content.replace('\n', '\r\n').encode())
  read = text_sources._txt(path, '', {})
  documents = [document for document, _ in read]
  assert ''.join(documents) == content
  assert all(document.startswith('paragraph') for document in documents[:-1])
  assert all(
    text_sources.TXT_DOCUMENT <= len(document) < text_sources.TXT_DOCUMENT + 1000 for document in documents[:-1]
  )


def test_a_txt_file_without_blank_lines_or_lines_is_cut_all_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(text_sources, 'TXT_LONGEST', 6000)
  path = tmp_path / 'corpus.txt'
  for content in ('a line of text\n' * 3000, '\u20ac' * 40_000):
    path.write_text(content, 'utf-8')
    found = list(text_sources._txt(path, '', {}))
    assert ''.join(document for document, _ in found) == content
    assert max(len(document.encode()) for document, _ in found) <= 12_000  # paragraphs of 6000
    _, position = found[2]
    assert list(text_sources._txt(path, '', position)) == found[3:]


def test_the_embedded_text_is_english_and_code_in_megabytes_ordered_by_content():
  held_out = list(text.documents(text_sources.EMBEDDED, 'held_out'))
  assert sum(map(len, held_out)) > 500_000
  assert sum('Returns' in document for document in held_out) > 50
  assert held_out == sorted(held_out, key=text_sources.digest)


# Windows


def test_packed_windows_hold_the_documents_in_order_with_an_end_behind_each(make, tokenizer):
  windows_et = np.stack(list(text.Windows(make('jsonl'), tokenizer, window=16)))
  expected = _stream(SPLIT['train'], tokenizer, tokenizer.eos_token_id)
  assert windows_et.dtype == np.int32
  assert windows_et.ravel().tolist() == expected[: windows_et.size]
  assert len(expected) - windows_et.size < 16


@pytest.mark.parametrize(('separator', 'prepend_bos'), [('bos', False), ('none', True), ('none', False), ('eos', True)])
def test_separators_and_bos_stand_where_they_are_asked_for(make, tokenizer, separator, prepend_bos):
  windows_et = np.stack(
    list(text.Windows(make('jsonl'), tokenizer, window=16, separator=separator, prepend_bos=prepend_bos))
  )
  if prepend_bos:
    assert (windows_et[:, 0] == tokenizer.bos_token_id).all()
    windows_et = windows_et[:, 1:]
  end = {'bos': [tokenizer.bos_token_id], 'none': [], 'eos': [tokenizer.eos_token_id]}[separator]
  assert windows_et.ravel().tolist() == _stream(SPLIT['train'], tokenizer, *end)[: windows_et.size]


@pytest.mark.parametrize('prepend_bos', [False, True])
def test_a_padded_window_holds_one_document(make, tokenizer, prepend_bos):
  found = text.Windows(make('jsonl'), tokenizer, window=16, boundaries='padded', prepend_bos=prepend_bos)
  windows_et = np.stack(list(found))[:, prepend_bos:]
  expected = []
  for document in SPLIT['train']:
    ids = _stream([document], tokenizer, tokenizer.eos_token_id)
    size = windows_et.shape[1]
    for start in range(0, len(ids), size):
      part = ids[start : start + size]
      expected.append(part + [text.PAD] * (size - len(part)))
  assert windows_et.tolist() == expected
  assert (windows_et == text.PAD).any()
  assert not (windows_et[:, 0] == text.PAD).any()


def test_shuffling_permutes_windows_within_blocks_as_the_seed_says(make, tokenizer, small):
  source = make('jsonl')
  windows = lambda shuffle: [w.tolist() for w in text.Windows(source, tokenizer, window=16, shuffle=shuffle)]
  plain, first, again, second = windows(None), windows(0), windows(0), windows(1)
  assert len(plain) > 3 * 32
  assert len(plain) % 32
  for start in range(0, len(plain), 32):
    block = slice(start, start + 32)
    assert sorted(first[block]) == sorted(second[block]) == sorted(plain[block])
    assert first[block] != plain[block]
  assert first == again != second


def test_hosts_share_the_documents_and_each_packs_its_own(make, tokenizer):
  source = make('folder')
  for host in range(3):
    windows_et = np.stack(list(text.Windows(source, tokenizer, window=16, host=host, n_hosts=3)))
    expected = _stream(SPLIT['train'][host::3], tokenizer, tokenizer.eos_token_id)
    assert windows_et.ravel().tolist() == expected[: windows_et.size]


def test_max_tokens_and_max_documents_end_the_stream(make, tokenizer, small):
  source = make('jsonl')
  whole = [w.tolist() for w in text.Windows(source, tokenizer, window=16)]
  found = text.Windows(source, tokenizer, window=16, max_tokens=16 * 40 + 15)
  assert [w.tolist() for w in found] == whole[:40]
  shuffled = text.Windows(source, tokenizer, window=16, max_tokens=16 * 40, shuffle=3)
  assert sorted(w.tolist() for w in shuffled) == sorted(whole[:40])
  assert shuffled.position() | {'of': 0} == found.position() | {'of': 0}
  n_documents = found.position()['documents'] + 1  # the 40th window ends in the last of them
  chosen = [document for document in DOCUMENTS[:n_documents] if document in SPLIT['train']]
  stream = _stream(chosen, tokenizer, tokenizer.eos_token_id)
  assert len(stream) >= 640 > len(stream) - len(_stream(chosen[-1:], tokenizer, tokenizer.eos_token_id))
  until = text.Windows(source, tokenizer, window=16, max_documents=n_documents)
  assert [w.tolist() for w in until] == whole[: len(stream) // 16]


SETTINGS = {
  'packed': {},
  'shuffled': {'shuffle': 5, 'prepend_bos': True},
  'padded': {'boundaries': 'padded', 'shuffle': 5, 'host': 1, 'n_hosts': 2},
  'limited': {'separator': 'none', 'shuffle': 2, 'max_tokens': 16 * 75},
}


@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize('kind', SOURCES)
def test_the_stream_goes_on_exactly_from_every_position(make, tokenizer, small, kind, settings):
  source = make(kind)
  stream = text.Windows(source, tokenizer, window=16, **settings)
  positions, windows = [json.dumps(stream.position())], []
  for window_t in stream:
    windows.append(window_t.tolist())
    positions.append(json.dumps(stream.position()))
  assert len(windows) > 64
  for number, position in enumerate(positions):
    if number % (12 if kind == 'hub' else 3) == 0 or number > len(positions) - 3:
      resumed = text.Windows(source, tokenizer, window=16, position=json.loads(position), **settings)
      assert json.dumps(resumed.position()) == position
      n = 8 if number % 12 else 1000  # windows compared
      assert [window_t.tolist() for window_t in itertools.islice(resumed, n)] == windows[number:][:n]


def test_txt_and_embedded_text_go_on_exactly(tmp_path, tokenizer, small):
  path = tmp_path / 'corpus.txt'
  path.write_text('\n\n'.join(DOCUMENTS * 5))
  for source in (str(path), text_sources.EMBEDDED):
    stream = text.Windows(source, tokenizer, window=32, shuffle=1, max_tokens=32 * 100)
    states = [(json.dumps(stream.position()), window_t.tolist()) for window_t in stream]
    windows = [window for _, window in states]
    states = []
    stream = text.Windows(source, tokenizer, window=32, shuffle=1, max_tokens=32 * 100)
    for number in range(100):
      position = json.loads(json.dumps(stream.position()))
      assert next(stream).tolist() == windows[number]
      if number % 9 == 0:
        resumed = text.Windows(source, tokenizer, window=32, shuffle=1, max_tokens=32 * 100, position=position)
        assert [window_t.tolist() for window_t in resumed] == windows[number:]


def test_a_position_of_another_text_or_of_other_settings_raises(make, tmp_path, tokenizer):
  source = make('jsonl')
  stream = text.Windows(source, tokenizer, window=16)
  next(stream)
  with pytest.raises(ValueError, match='the position belongs to another source, or to other settings'):
    text.Windows(source, tokenizer, window=32, position=stream.position())
  _write(tmp_path / 'corpus.jsonl', DOCUMENTS[:200])
  with pytest.raises(ValueError, match='the position belongs to another source'):
    text.Windows(source, tokenizer, window=16, position=stream.position())


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
  monkeypatch.setattr(text, 'BATCH_DOCUMENTS', 32)
  path = tmp_path / 'corpus.jsonl'
  line = json.dumps({'text': 'word ' * 400})
  with open(path, 'w') as file:
    for number in range(20_000):
      file.write(line.replace('word', f'w{number % 97}', 3) + '\n')
  assert path.stat().st_size > 38e6
  size = lambda windows: [tracemalloc.start(), sum(1 for _ in windows), tracemalloc.get_traced_memory()[1]]
  try:
    _, n_windows, peak = size(text.Windows(str(path), tokenizer, shuffle=0, max_tokens=3_000_000))
    tracemalloc.stop()
    _, n_documents, peak_reading = size(text.documents(str(path)))
  finally:
    tracemalloc.stop()
  assert n_windows == 3_000_000 // 64
  assert n_documents > 15_000
  assert peak_reading < 2e6
  assert peak < 12e6  # a batch and a block


def test_a_parquet_row_group_is_not_read_as_a_whole(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  rng = np.random.default_rng(0)
  documents = [rng.bytes(500).hex() for _ in range(32_000)]  # 32 MB that compress badly
  table = pyarrow.table({'text': documents})
  pytest.importorskip('pyarrow.parquet').write_table(table, tmp_path / 'corpus.parquet', row_group_size=100_000)
  del table
  before, most = pyarrow.total_allocated_bytes(), 0
  for _ in text.documents(str(tmp_path / 'corpus.parquet')):
    most = max(most, pyarrow.total_allocated_bytes() - before)
  assert 0 < most < 12e6


# Errors


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('corpus.txt', 'caf\xe9 '.encode('latin-1') * 100, r'corpus\.txt is not UTF-8 \(byte 3\); convert it'),
    ('corpus.txt', b'', "holds no text for the split 'train'"),
    (
      'corpus.jsonl',
      b'{"text": "good"}\n{"words": "bad"}',
      r'line 2: expected a JSON object with a string as its field "text"; its fields are words',
    ),
    ('corpus.jsonl', b'{"text": null}', r'line 1: expected a JSON object with a string as its field "text"'),
    ('corpus.jsonl', b'["text"]', r'line 1: expected a JSON object with a string as its field "text"'),
    ('corpus.jsonl', b'{"text": "good"}\n{"text": "\xff"}', r'corpus\.jsonl is not UTF-8 \(byte 27\)'),
    ('corpus.pdf', b'%PDF', r'neither \.txt nor \.jsonl nor \.parquet'),
    ('corpus.parquet', b'PAR1', r'corpus\.parquet is no whole parquet file .*; fetch it again'),
  ],
)
def test_bad_text_raises_one_clear_sentence(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(text.documents(str(tmp_path / name)))


@pytest.mark.parametrize('kind', SOURCES)
def test_a_field_that_is_not_there_is_told_with_those_that_are(make, kind):
  with pytest.raises(ValueError, match=r'field "body"; its fields are (id, text|text, id)'):
    list(text.documents(make(kind), field='body'))


def test_a_field_that_is_no_string_is_told(make):
  with pytest.raises(
    ValueError, match=r'corpus\.parquet, row group 0, row 1: expected a string as the field "id", not int'
  ):
    list(text.documents(make('parquet'), field='id'))


def test_missing_sources_and_folders_of_several_kinds_raise(tmp_path, monkeypatch, make):
  with pytest.raises(FileNotFoundError, match=r"no text at 'nowhere\.txt'"):
    next(text.documents('nowhere.txt'))
  with pytest.raises(FileNotFoundError, match=r"no text at 'no/where/\*\.jsonl'"):
    list(text.documents('no/where/*.jsonl'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match=r'empty holds neither \.txt nor'):
    list(text.documents(str(tmp_path / 'empty')))
  make('folder')
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(ValueError, match=r'holds \.jsonl and \.txt files; give a glob of one kind, such as \*\.jsonl'):
    list(text.documents(str(tmp_path)))

  datasets = pytest.importorskip('datasets')
  datasets.DatasetDict({'train': datasets.Dataset.from_dict({'text': DOCUMENTS})}).save_to_disk(tmp_path / 'splits')
  with pytest.raises(ValueError, match=r'splits holds the splits train; give the folder of one: .*splits/train'):
    list(text.documents(str(tmp_path / 'splits')))

  def unknown(*args, **kwargs):
    raise datasets.exceptions.DatasetNotFoundError('there is no such dataset')

  monkeypatch.setattr(datasets, 'load_dataset', unknown)
  with pytest.raises(FileNotFoundError, match=r"'owner/name': no file or folder, and as a dataset of the hub:"):
    list(text.documents('owner/name'))


def test_a_missing_package_names_the_extra(make, monkeypatch):
  source = make('parquet')
  monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
  with pytest.raises(ImportError, match=r"needs the package datasets: pip install 'jax-interp\[text\]'"):
    list(text.documents(source))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'boundaries': 'strict'}, "boundaries 'strict' is none of packed, padded"),
    ({'separator': 'newline'}, "separator 'newline' is none of eos, bos, none"),
    ({'split': 'test'}, "split 'test' is none of train, held_out"),
    ({'separator': 'bos'}, 'the tokenizer has no bos token'),
    ({'prepend_bos': True}, 'the tokenizer has no bos token'),
    ({'window': 0}, 'window 0 holds no text; give 1 tokens or more'),
    ({'window': 1, 'prepend_bos': True}, 'window 1 holds no text; give 2 tokens or more'),
    ({'host': 2, 'n_hosts': 2}, 'host 2 is not one of 2; hosts are numbered from 0'),
    ({'max_tokens': 63}, 'max_tokens 63 is less than one window of 64'),
  ],
)
def test_arguments_are_checked_before_anything_is_read(settings, message):
  with pytest.raises(ValueError, match=message):
    text.Windows('nowhere.txt', pretrained.load_tokenizer('embedded'), **settings)


def test_too_little_text_for_a_window_raises(tmp_path, tokenizer):
  source = str(_write(tmp_path / 'corpus.jsonl', DOCUMENTS[:1]))
  (split,) = (split for split in text.SPLITS if DOCUMENTS[0] in SPLIT[split])
  with pytest.raises(ValueError, match=rf'the {split} text has \d+ tokens, fewer than one window of 64; give a longer'):
    next(text.Windows(source, tokenizer, split))
  (other,) = {*text.SPLITS} - {split}
  with pytest.raises(ValueError, match=f"holds no text for the split '{other}'"):
    next(text.Windows(source, tokenizer, other))


# Masks


def test_padding_and_special_tokens_are_not_kept():
  tokenizer = pretrained.load_tokenizer('embedded')
  ids = text.special_ids(tokenizer)
  assert tokenizer.eos_token_id in ids
  tokens_et = np.array([[5, tokenizer.eos_token_id, 7], [9, text.PAD, text.PAD]], np.int32)
  np.testing.assert_array_equal(text.kept(tokens_et, ids), [[True, False, True], [True, False, False]])


def test_special_tokens_are_those_with_a_role_and_those_without_text():
  tokenizer = pretrained.load_tokenizer('embedded')
  assert text.special_ids(tokenizer).tolist() == [tokenizer.eos_token_id]
  tokenizer.add_tokens([tokenizers.AddedToken('<file>', special=True), tokenizers.AddedToken('plain')])
  file, plain = tokenizer.convert_tokens_to_ids(['<file>', 'plain'])
  assert text.special_ids(tokenizer).tolist() == [tokenizer.eos_token_id, file]
  mask_et = text.kept(np.array([[5, file, plain, text.PAD]]), text.special_ids(tokenizer))
  assert mask_et.tolist() == [[True, False, True, False]]
