"""Text to token windows.

Takes the name of a source of documents (see `text_sources`) and a tokenizer; gives windows of tokens of one split, one
after another, from a position that can be stored at any moment and gone on from, and masks of the tokens that stand for
text. Whether a document is for training or held out depends on its content alone, so the split is the same everywhere.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jax_interp import text_sources

HELD_OUT_PERCENT = 10
SPLITS = ('train', 'held_out')
BOUNDARIES = ('packed', 'padded')
SEPARATORS = ('eos', 'bos', 'none')
PAD = -1  # stands behind the last token of a padded window; no token id
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2**20  # tokenised at once: so many documents, fewer if they are long
SHUFFLE_BLOCK = 8192  # windows that are permuted among themselves; to resume, up to so many are cut again


def split_of(document: str) -> str:
  """Returns 'train' or 'held_out' from a hash of the content: the same on every machine and for every corpus."""
  return SPLITS[int.from_bytes(text_sources.digest(document)[:4], 'big') % 100 < HELD_OUT_PERCENT]


def documents(source: str, split: str = 'train', field: str = 'text') -> Iterator[str]:
  """Yields the documents of a split, in the order of the source, blank ones left out.

  Args:
    source: what `Windows` takes.
    split: 'train' or 'held_out'.
    field: that holds the text, of sources that have fields.

  Raises:
    FileNotFoundError, ValueError: there is no such source, or what it holds is no text, or none of the split.
  """
  _, read = text_sources.open_source(source, field)
  n_found = 0
  for _, document in _deal(read, split, _START):
    n_found += 1
    yield document
  if not n_found:
    raise ValueError(_no_text(source, split))


def _no_text(source, split, way_out='give a longer text'):
  return f'{source} holds no text for the split {split!r}; {way_out}'


# Windows


class _Place(NamedTuple):
  """Where a token stands: the reader's position before its document, and the token's index in it.

  documents, dealt: how many documents of the source, and of the split, stand before it.
  """

  reader: dict
  documents: int
  dealt: int
  offset: int


_START = _Place({}, 0, 0, 0)


def _deal(read, split, start: _Place, host=0, n_hosts=1, max_documents=0) -> Iterator[tuple[_Place, str]]:
  """Yields a host's documents of a split, each with its place."""
  before, dealt = start.reader, start.dealt
  for number, (document, behind) in enumerate(read(start.reader), start.documents):
    if number >= max_documents > 0:
      return
    if document.strip() and split_of(document) == split:
      if dealt % n_hosts == host:
        yield _Place(before, number, dealt, 0), document
      dealt += 1
    before = behind


class Windows:
  """The windows of a split, an iterator over int32 [token], the same for the same arguments.

  It holds a batch of documents and, when shuffled, a block of windows: never the text. What `position` returns goes to
  the argument of that name, and the next window is the one that would have come.
  """

  def __init__(
    self,
    source: str,
    tokenizer,
    split: str = 'train',
    *,
    window: int = 64,
    field: str = 'text',
    boundaries: str = 'packed',
    separator: str = 'eos',
    prepend_bos: bool = False,
    shuffle: int | None = None,
    max_tokens: int = 0,
    max_documents: int = 0,
    host: int = 0,
    n_hosts: int = 1,
    position: dict | None = None,
  ):
    """Checks the arguments and opens the source.

    Args:
      source: 'embedded'; a UTF-8 .txt, .jsonl or .parquet file; a folder or glob of such files of one kind, read in the
        order of their names; a folder that `datasets` saved; or a dataset of the Hugging Face hub, 'owner/name',
        'owner/name:config', 'owner/name@revision' or both, of which the hub's split 'train' is streamed.
      tokenizer: a `transformers` tokenizer. It adds no tokens of its own.
      split: 'train' or 'held_out', see `split_of`.
      window: tokens of a window.
      field: that holds the text, of sources that have fields.
      boundaries: 'packed', documents follow one another and what does not fill the last window is dropped; or 'padded',
        a window holds one document, and a document's last window is filled with `PAD`.
      separator: what stands behind each document: the tokenizer's 'eos' or 'bos' token, or 'none'.
      prepend_bos: whether every window begins with the tokenizer's bos token.
      shuffle: a seed, or None for the order of the source. Windows are permuted within blocks of `SHUFFLE_BLOCK`.
      max_tokens: ends behind so many tokens (of this host, in whole windows; those of bos and padding count), 0: never.
      max_documents: ends behind so many documents of the source, those of the other split and other hosts included,
        0: never.
      host: number of this host of `n_hosts`, to whom the split's documents are dealt in turn.
      position: to go on from, with the same tokenizer.

    Raises:
      FileNotFoundError, ValueError, ImportError: an argument is none of the above; or, while reading, the source is no
      text, or too little for one window.
    """
    _check_choice('split', split, SPLITS)
    _check_choice('boundaries', boundaries, BOUNDARIES)
    _check_choice('separator', separator, SEPARATORS)
    if window < 1 + prepend_bos:
      raise ValueError(f'window {window} holds no text; give {1 + prepend_bos} tokens or more')
    if not 0 <= host < n_hosts:
      raise ValueError(f'host {host} is not one of {n_hosts}; hosts are numbered from 0')
    if max_tokens and max_tokens < window:
      raise ValueError(f'max_tokens {max_tokens} is less than one window of {window}; raise it, or give 0 for no end')
    wanted = {'eos': separator == 'eos', 'bos': separator == 'bos' or prepend_bos}
    special = {name: getattr(tokenizer, f'{name}_token_id') for name in wanted}
    for name in wanted:
      if wanted[name] and special[name] is None:
        raise ValueError(f'the tokenizer has no {name} token; choose another separator, or prepend_bos=False')
    identity, read = text_sources.open_source(source, field)
    settings = (split, window, field, boundaries, separator, prepend_bos, shuffle, max_tokens, max_documents)
    self._of = hashlib.sha256(repr((identity, settings, special, host, n_hosts)).encode()).hexdigest()[:16]
    self._n, self._place = 0, _START
    if position is not None:
      if position['of'] != self._of:
        raise ValueError('the position belongs to another source, or to other settings; begin without it')
      self._n, self._place = position['windows'], _Place(**{key: position[key] for key in _Place._fields})
    self._way_out = 'give a longer text'
    if max_documents:
      self._way_out = f'read more than {max_documents} documents of it, to a larger max_tokens'
    self._empty = _no_text(source, split, self._way_out)
    self.window, self.max_tokens = window, max_tokens
    self._split, self._tokenizer = split, tokenizer
    self._first = np.array([special['bos']] if prepend_bos else [], np.int32)
    self._last = [] if separator == 'none' else [special[separator]]
    self._documents = functools.partial(_deal, read, split, host=host, n_hosts=n_hosts, max_documents=max_documents)
    self._cut = self._packed if boundaries == 'packed' else self._padded
    self._max_windows = max_tokens // window or None
    self._n_tokens = 0
    self._found = self._in_order() if shuffle is None else self._shuffled(shuffle)

  def __iter__(self):
    return self

  def __next__(self) -> np.ndarray:
    try:
      window_t, self._place = next(self._found)
    except StopIteration:
      if self._n:
        raise
      few = f'the {self._split} text has {self._n_tokens} tokens, fewer than one window of {self.window}'
      raise ValueError(f'{few}; {self._way_out}' if self._n_tokens else self._empty) from None
    self._n += 1
    return window_t

  def position(self) -> dict:
    """Returns where the next window begins, as JSON can hold it.

    'windows' of it is how many there were before, 'documents' how many documents of the source stand before the one
    that is being read: after the last window, the one it ends in.
    """
    return {'of': self._of, 'windows': self._n, **self._place._asdict()}

  def _tokens(self, start: _Place) -> Iterator[tuple[_Place, np.ndarray]]:
    """Yields the documents' tokens, separators behind them, from a place on."""
    found = self._documents(start)
    while batch := _batch(found):
      texts = [document for _, document in batch]
      ids = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)['input_ids']
      for (place, _), document_t in zip(batch, ids, strict=True):
        tokens_t = np.array([*document_t, *self._last], np.int32)[start.offset :]
        self._n_tokens += len(tokens_t)
        yield place._replace(offset=start.offset), tokens_t
        start = _START

  def _packed(self, start: _Place) -> Iterator[tuple[np.ndarray, _Place]]:
    """Yields windows, each with the place behind it."""
    size = self.window - len(self._first)
    parts, missing = [], size
    for place, tokens_t in self._tokens(start):
      used = 0
      while len(tokens_t) - used >= missing:
        parts.append(tokens_t[used : used + missing])
        used += missing
        yield np.concatenate([self._first, *parts]), place._replace(offset=place.offset + used)
        parts, missing = [], size
      parts.append(tokens_t[used:])
      missing -= len(tokens_t) - used

  def _padded(self, start: _Place) -> Iterator[tuple[np.ndarray, _Place]]:
    size = self.window - len(self._first)
    for place, tokens_t in self._tokens(start):
      for used in range(0, len(tokens_t), size):
        window_t = np.full(self.window, PAD, np.int32)
        part_t = np.concatenate([self._first, tokens_t[used : used + size]])
        window_t[: len(part_t)] = part_t
        yield window_t, place._replace(offset=place.offset + min(used + size, len(tokens_t)))

  def _in_order(self):
    n_left = None if self._max_windows is None else self._max_windows - self._n
    return itertools.islice(self._cut(self._place), n_left)

  def _shuffled(self, seed: int) -> Iterator[tuple[np.ndarray, _Place]]:
    """Yields windows, each with the place where its block begins, the last of a block with the place behind."""
    number, done = divmod(self._n, SHUFFLE_BLOCK)
    n_left = None if self._max_windows is None else self._max_windows - number * SHUFFLE_BLOCK
    place, found = self._place, itertools.islice(self._cut(self._place), n_left)
    while block := list(itertools.islice(found, SHUFFLE_BLOCK)):
      order = np.random.default_rng([seed, number]).permutation(len(block))
      for index in order[done:-1]:
        yield block[index][0], place
      place = block[-1][1]
      if done < len(block):
        yield block[order[-1]][0], place
      number, done = number + 1, 0


def _check_choice(name: str, value: str, choices: Sequence[str]):
  if value not in choices:
    raise ValueError(f'{name} {value!r} is none of {", ".join(choices)}')


def _batch(found: Iterator[tuple[_Place, str]]) -> list[tuple[_Place, str]]:
  """Returns the next documents to be tokenised together, none at the end."""
  batch, size = [], 0
  for place, document in found:
    batch.append((place, document))
    size += len(document)
    if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
      break
  return batch


# Masks


def special_ids(tokenizer) -> np.ndarray:
  """Returns the ids of the tokenizer's special tokens, int32, ascending.

  They are those with a role (end, beginning, padding, unknown) and all others that stand for no text of their own.
  """
  others = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  return np.array(sorted({*tokenizer.all_special_ids, *others}), np.int32)


def kept(tokens_et: np.ndarray, special_ids: np.ndarray) -> np.ndarray:
  """Returns the mask, bool and shaped like the tokens, of what stands for text: neither `PAD` nor a special token."""
  return (tokens_et != PAD) & ~np.isin(tokens_et, special_ids)
