"""Text to token windows.

Takes the embedded corpus (documentation of the Python standard library, NumPy, SciPy and JAX as installed), files
(.txt, .jsonl, .parquet) or Hugging Face datasets (streamed from the hub, or saved in a folder); gives windows of tokens
of one split, one after another, from a position that can be stored at any moment and gone on from. Only the embedded
corpus is ever in memory as a whole. Whether a document is for training or held out depends on its content alone, so
the split is the same everywhere.
"""

import ast
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import pathlib
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

EMBEDDED = 'embedded'
EMBEDDED_PACKAGES = ('numpy', 'scipy', 'jax')
HELD_OUT_PERCENT = 10
SPLITS = ('train', 'held_out')
BOUNDARIES = ('packed', 'padded')
SEPARATORS = ('eos', 'bos', 'none')
PAD = -1  # stands behind the last token of a padded window; no token id
MIN_DOCUMENT = 200  # characters; shorter docstrings are mostly signatures repeated
MIN_LINE = 20  # characters; shorter lines ('Returns', '-------') stand in every document and say nothing of duplicates
TXT_DOCUMENT = 4000  # characters gathered into one document of a plain .txt file, so that there is something to split
TXT_LONGEST = 2**20  # bytes after which a paragraph ends at any line and a line at any character: memory is bounded
PARQUET_ROWS = 256  # read at once
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2**20  # tokenised at once: so many documents, fewer if they are long
SHUFFLE_BLOCK = 8192  # windows that are permuted among themselves; to resume, up to so many are cut again
HUB_ID = re.compile(r'(?P<path>[\w.-]+/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?')

Found = Iterator[tuple[str, dict]]  # documents, each with the position behind it


def _docstrings(path: pathlib.Path) -> Iterator[str]:
  """Yields the docstrings of a Python source file, and strings that are passed to calls (so NumPy documents C)."""
  try:
    tree = ast.parse(path.read_bytes())
  except SyntaxError:  # templates and deliberately broken test files
    return
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      yield ast.get_docstring(node) or ''
    elif isinstance(node, ast.Call):
      for value in itertools.chain(node.args, *(arg.elts for arg in node.args if isinstance(arg, ast.Tuple))):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
          yield value.value


def _embedded_documents() -> Iterator[str]:
  specs = [importlib.util.find_spec(package) for package in EMBEDDED_PACKAGES]
  folders = [sysconfig.get_paths()['stdlib'], *(spec.submodule_search_locations[0] for spec in specs)]
  for folder in map(pathlib.Path, folders):
    for path in sorted(folder.rglob('*.py')):
      if not {'site-packages', 'test', 'tests', 'lib2to3'} & set(path.relative_to(folder).parts):
        yield from _docstrings(path)
  yield from pydoc_data.topics.topics.values()


def deduplicate(documents: Iterable[str]) -> Iterator[str]:
  """Yields the documents of which at most half of the long lines stand in documents yielded before.

  So up to half of a document's long lines may stand in earlier ones, also of the other split: near copies can remain.
  """
  seen = set()
  for document in documents:
    lines = [line.strip() for line in document.splitlines()]
    lines = {hash(line) for line in lines if len(line) >= MIN_LINE} or {hash(document.strip())}
    if 2 * len(lines & seen) <= len(lines):
      seen |= lines
      yield document


def _digest(document: str) -> bytes:
  return hashlib.sha256(document.encode('utf-8', 'surrogatepass')).digest()


def split_of(document: str) -> str:
  """Returns 'train' or 'held_out' from a hash of the content: the same on every machine and for every corpus."""
  return SPLITS[int.from_bytes(_digest(document)[:4], 'big') % 100 < HELD_OUT_PERCENT]


@functools.cache
def _embedded() -> tuple[str, ...]:
  """Returns the de-duplicated embedded documents in the order of their content's hash."""
  found = (document for document in _embedded_documents() if len(document) >= MIN_DOCUMENT)
  return tuple(sorted((document for document in deduplicate(found) if document.strip()), key=_digest))


def _decode(path: pathlib.Path, content: bytes, start: int) -> str:
  """Returns the text of what stands at byte `start` of a file, without a byte order mark or carriage returns."""
  try:
    found = content.decode('utf-8' if start else 'utf-8-sig')
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{path} is not UTF-8 (byte {start + e.start}); convert it, for example with iconv -t UTF-8'
    ) from e
  return found.replace('\r\n', '\n')


def _lines(file) -> Iterator[bytes]:
  """Yields the lines of a file, a line of more than TXT_LONGEST bytes in pieces that end with a whole character."""
  while line := file.readline(TXT_LONGEST):
    while len(line) >= TXT_LONGEST and (byte := file.peek(1)[:1]) and byte[0] & 0xC0 == 0x80:  # within a character
      line += file.read(1)
    yield line


def _txt(path: pathlib.Path, field: str, start: dict) -> Found:
  """Paragraphs, which blank lines end, gathered to documents of TXT_DOCUMENT characters or more."""
  with open(path, 'rb') as file:
    byte = start.get('byte', 0)
    file.seek(byte)
    document, lines, size = '', [], 0  # the lines and bytes of a paragraph that has not ended
    for line in _lines(file):
      ends = bool(lines) and not line.strip(b'\r\n')
      lines.append(line)
      size += len(line)
      if ends or size >= TXT_LONGEST:
        document += _decode(path, b''.join(lines), byte)
        byte, lines, size = byte + size, [], 0
        if len(document) >= TXT_DOCUMENT:
          yield document, {'byte': byte}
          document = ''
    if document or lines:
      yield document + _decode(path, b''.join(lines), byte), {'byte': byte + size}


def _jsonl(path: pathlib.Path, field: str, start: dict) -> Found:
  with open(path, 'rb') as file:
    byte = start.get('byte', 0)
    file.seek(byte)
    for number, line in enumerate(file, start.get('line', 0) + 1):  # cut at line feeds alone, not at U+2028 or U+0085
      try:
        row = json.loads(_decode(path, line, byte))
      except json.JSONDecodeError:
        row = None
      if not isinstance(row, dict) or not isinstance(row.get(field), str):
        there = f'; its fields are {", ".join(row)}' if isinstance(row, dict) and field not in row else ''
        raise ValueError(f'{path}, line {number}: expected a JSON object with a string as its field "{field}"{there}')
      byte += len(line)
      document = row[field].encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # "\ud800" is no character
      yield document, {'byte': byte, 'line': number}


def _parquet(path: pathlib.Path, field: str, start: dict) -> Found:
  parquet = _import('pyarrow.parquet', path)
  try:
    file = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # else a row group is in memory as a whole
  except ValueError as e:
    raise ValueError(f'{path} is no whole parquet file ({e}); fetch it again') from e
  with file:
    _check_field(path, field, file.schema_arrow.names)
    first, skipped = start.get('group', 0), start.get('row', 0)
    for group in range(first, file.num_row_groups):
      row = 0
      for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
        skip = max(skipped - row, 0) if group == first else 0
        for document in batch.column(0)[skip:].to_pylist():
          skip += 1
          behind = {'group': group, 'row': row + skip}
          yield _checked(document, field, f'{path}, row group {group}, row {row + skip}'), behind
        row += len(batch)


READERS = {'.txt': _txt, '.jsonl': _jsonl, '.parquet': _parquet}


def _import(module: str, source):
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise ImportError(f"{source} needs the package datasets: pip install 'jax-interp[text]'") from e


def _check_field(source, field: str, there: Iterable[str]):
  if field not in there:
    raise ValueError(f'{source} has no field "{field}"; its fields are {", ".join(there)}')


def _checked(document, field: str, where: str) -> str:
  if not isinstance(document, str):
    raise ValueError(f'{where}: expected a string as the field "{field}", not {type(document).__name__}')
  return document


def _files(source: str) -> list[pathlib.Path]:
  """Returns the files that a path, a folder or a glob names, sorted; none when there is nothing of that name."""
  path = pathlib.Path(source)
  if path.is_file():
    found = [path]
  elif path.is_dir():
    found = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith('.'))
  else:
    found = [pathlib.Path(name) for name in sorted(glob.glob(source, recursive=True)) if pathlib.Path(name).is_file()]
  kinds = sorted({file.suffix for file in found})
  if wrong := [file for file in found if file.suffix not in READERS]:
    raise ValueError(f'{wrong[0]} is neither .txt nor .jsonl nor .parquet; convert it to one of them')
  if len(kinds) > 1:
    raise ValueError(f'{source} holds {" and ".join(kinds)} files; give a glob of one kind, such as *{kinds[0]}')
  if path.is_dir() and not found:
    raise FileNotFoundError(f'{source} holds neither .txt nor .jsonl nor .parquet files; give their folder or a glob')
  return found


def _from_files(paths: Sequence[pathlib.Path], field: str, start: dict) -> Found:
  first = start.get('file', 0)
  for number, path in enumerate(paths[first:], first):
    inner = {key: value for key, value in start.items() if key != 'file'} if number == first else {}
    for document, behind in READERS[path.suffix](path, field, inner):
      yield document, {'file': number, **behind}


def _from_list(documents: Sequence[str], start: dict) -> Found:
  for number in range(start.get('row', 0), len(documents)):
    yield documents[number], {'row': number + 1}


def _from_disk(source: str, field: str, start: dict) -> Found:
  dataset = _saved(source, field)
  first = start.get('row', 0)
  for row, example in enumerate(dataset.select(range(first, len(dataset))), first + 1):
    yield _checked(example[field], field, f'{source}, row {row}'), {'row': row}


def _saved(source: str, field: str):
  """Returns a dataset that `save_to_disk` left in a folder, memory-mapped."""
  dataset = _import('datasets', source).load_from_disk(source)
  if isinstance(dataset, dict):
    first, *_ = dataset
    raise ValueError(f'{source} holds the splits {", ".join(dataset)}; give the folder of one: {source}/{first}')
  _check_field(source, field, dataset.column_names)
  return dataset.select_columns([field])


def _from_hub(source: str, field: str, start: dict) -> Found:
  datasets, parts = _import('datasets', source), HUB_ID.fullmatch(source).groupdict()
  try:
    dataset = datasets.load_dataset(**parts, split='train', streaming=True)
  except OSError as e:
    raise FileNotFoundError(f'no text at {source!r}: no file or folder, and as a dataset of the hub: {e}') from e
  if dataset.column_names:  # some are known only from the rows
    _check_field(source, field, dataset.column_names)
    dataset = dataset.select_columns([field])
  if start:
    dataset.load_state_dict(start)
  for example in dataset:
    _check_field(source, field, example)
    yield _checked(example[field], field, source), dataset.state_dict()


def _open(source: str, field: str) -> tuple[str, Callable[[dict], Found]]:
  """Returns what tells the source's content from another's as far as that is cheap, and its reader.

  The reader takes a position, {} for the beginning, and yields (document, position behind it), blank documents too.
  """
  if source == EMBEDDED:
    digest = hashlib.sha256(b''.join(map(_digest, _embedded()))).hexdigest()
    return digest, functools.partial(_from_list, _embedded())
  if any((pathlib.Path(source) / name).is_file() for name in ('state.json', 'dataset_dict.json')):
    return f'{source} of {len(_saved(source, field))} rows', functools.partial(_from_disk, source, field)
  if paths := _files(source):
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return json.dumps(sizes), functools.partial(_from_files, paths, field)
  if HUB_ID.fullmatch(source) and pathlib.Path(source).suffix not in READERS:
    return source, functools.partial(_from_hub, source, field)
  raise FileNotFoundError(
    f'no text at {source!r}; give "{EMBEDDED}", a .txt, .jsonl or .parquet file, a folder or glob of such files, or a '
    'dataset of the hub as owner/name:config@revision'
  )


def documents(source: str, split: str = 'train', field: str = 'text') -> Iterator[str]:
  """Yields the documents of a split, in the order of the source, blank ones left out.

  Args:
    source: what `Windows` takes.
    split: 'train' or 'held_out'.
    field: that holds the text, of sources that have fields.

  Raises:
    FileNotFoundError, ValueError: there is no such source, or what it holds is no text, or none of the split.
  """
  _, read = _open(source, field)
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
    identity, read = _open(source, field)
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
  """Returns the ids of the tokenizer's special tokens (end, beginning, padding, unknown, ...), int32, ascending."""
  return np.array(sorted(tokenizer.all_special_ids), np.int32)


def kept(tokens_et: np.ndarray, special_ids: np.ndarray) -> np.ndarray:
  """Returns the mask, bool and shaped like the tokens, of what stands for text: neither `PAD` nor a special token."""
  return (tokens_et != PAD) & ~np.isin(tokens_et, special_ids)
