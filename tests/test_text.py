import itertools
import json

import numpy as np
import pytest

from jax_interp import text
from models import pretrained

DOCUMENTS = [
  f'The {number} quick brown foxes jump over {number} lazy dogs.\nAnd number {number} ends.' for number in range(300)
]


@pytest.fixture
def jsonl(tmp_path):
  path = tmp_path / 'corpus.jsonl'
  path.write_text('\n'.join(json.dumps({'text': document}) for document in DOCUMENTS))
  return str(path)


def test_splits_are_disjoint_whole_and_about_a_tenth_held_out(jsonl):
  train, held_out = text.documents(jsonl).values()
  assert sorted(train + held_out) == sorted(DOCUMENTS)
  assert 10 <= len(held_out) <= 50


def test_the_split_of_a_document_does_not_depend_on_the_others(jsonl, tmp_path):
  path = tmp_path / 'other.jsonl'
  path.write_text('\n'.join(json.dumps({'text': document}) for document in reversed(DOCUMENTS[:50])))
  assert set(text.documents(str(path))['held_out']) == set(text.documents(jsonl)['held_out']) & set(DOCUMENTS[:50])


def test_documents_that_mostly_repeat_are_dropped():
  lines = [f'this is a long enough line, number {number}' for number in range(4)]
  first, half_new, mostly_old = (
    '\n'.join(lines),
    '\n'.join([*lines[:2], 'x' * 30, 'y' * 30]),
    '\n'.join([*lines[:3], 'z' * 30]),
  )
  assert list(text.deduplicate([first, first + '\n', half_new, mostly_old])) == [first, half_new]


def test_windows_hold_the_documents_in_order_with_an_end_behind_each():
  tokenizer = pretrained.load_tokenizer('embedded')
  windows_et = text.windows(DOCUMENTS[:20], tokenizer, 16)
  expected = [
    token for document in DOCUMENTS[:20] for token in [*tokenizer(document)['input_ids'], tokenizer.eos_token_id]
  ]
  assert windows_et.dtype == np.int32
  assert windows_et.ravel().tolist() == expected[: windows_et.size]
  assert len(expected) - windows_et.size < 16


def test_a_jsonl_file_is_cut_at_line_feeds_alone(tmp_path):
  documents = [f'{document}\u2028and\x85so on' for document in DOCUMENTS]
  path = tmp_path / 'corpus.jsonl'
  path.write_text('\n'.join(json.dumps({'text': document}, ensure_ascii=False) for document in documents), 'utf-8')
  assert sorted(itertools.chain(*text.documents(str(path)).values())) == sorted(documents)


def test_a_txt_file_is_cut_at_blank_lines(tmp_path):
  path = tmp_path / 'corpus.txt'
  path.write_text('\n\n'.join(f'paragraph {number} ' + chr(97 + number % 26) * 500 for number in range(200)))
  found = [document for split in text.documents(str(path)).values() for document in split]
  assert len(found) > 20
  assert all(document.startswith('paragraph') for document in found)


def test_the_embedded_text_is_english_and_code_in_megabytes():
  held_out = text.documents(text.EMBEDDED)['held_out']
  assert sum(map(len, held_out)) > 500_000
  assert sum('Returns' in document for document in held_out) > 50


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('corpus.txt', 'caf\xe9 '.encode('latin-1') * 100, r'corpus\.txt is not UTF-8 \(byte 3\); convert it'),
    ('corpus.txt', b'', "holds no text for the split 'train'"),
    (
      'corpus.jsonl',
      b'{"text": "good"}\n{"words": "bad"}',
      r'line 2: expected a JSON object with a string as its field "text"',
    ),
    ('corpus.jsonl', b'{"text": null}', r'line 1: expected a JSON object with a string as its field "text"'),
    ('corpus.jsonl', b'["text"]', r'line 1: expected a JSON object with a string as its field "text"'),
    ('corpus.pdf', b'%PDF', r'neither \.txt nor \.jsonl'),
  ],
)
def test_bad_text_raises_one_clear_sentence(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    text.documents(str(tmp_path / name))


def test_missing_and_short_text_raise():
  with pytest.raises(FileNotFoundError, match=r"no text at 'nowhere\.txt'"):
    text.documents('nowhere.txt')
  with pytest.raises(ValueError, match='fewer than one window of 64'):
    text.windows(['short'], pretrained.load_tokenizer('embedded'), 64)


def test_padding_and_special_tokens_are_not_kept():
  tokenizer = pretrained.load_tokenizer('embedded')
  ids = text.special_ids(tokenizer)
  assert tokenizer.eos_token_id in ids
  tokens_et = np.array([[5, tokenizer.eos_token_id, 7], [9, text.PAD, text.PAD]], np.int32)
  np.testing.assert_array_equal(text.kept(tokens_et, ids), [[True, False, True], [True, False, False]])
