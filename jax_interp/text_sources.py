"""Documents of text, from wherever they lie.

Takes the name of a source: the embedded corpus (documentation of the Python standard library, NumPy, SciPy and JAX as
installed), files (.txt, .jsonl, .parquet) or Hugging Face datasets (streamed from the hub, or saved in a folder); gives
its documents one after another, each with the position behind it, from which reading goes on. Only the embedded corpus
is ever in memory as a whole.
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

EMBEDDED = 'embedded'
EMBEDDED_PACKAGES = ('numpy', 'scipy', 'jax')
MIN_DOCUMENT = 200  # characters; shorter docstrings are mostly signatures repeated
MIN_LINE = 20  # characters; shorter lines ('Returns', '-------') stand in every document and say nothing of duplicates
TXT_DOCUMENT = 4000  # characters gathered into one document of a plain .txt file, so that there is something to split
TXT_LONGEST = 2**20  # bytes after which a paragraph ends at any line and a line at any character: memory is bounded
PARQUET_ROWS = 256  # read at once
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


def digest(document: str) -> bytes:
  """Returns the SHA-256 of a document's content, by which documents are ordered and split."""
  return hashlib.sha256(document.encode('utf-8', 'surrogatepass')).digest()


@functools.cache
def _embedded() -> tuple[str, ...]:
  """Returns the de-duplicated embedded documents in the order of their content's hash."""
  found = (document for document in _embedded_documents() if len(document) >= MIN_DOCUMENT)
  return tuple(sorted((document for document in deduplicate(found) if document.strip()), key=digest))


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
      content = _decode(path, line, byte)
      byte += len(line)
      if not content.strip():  # common at the end of a file
        continue
      try:
        row = json.loads(content)
      except json.JSONDecodeError:
        row = None
      if not isinstance(row, dict) or not isinstance(row.get(field), str):
        there = f'; its fields are {", ".join(row)}' if isinstance(row, dict) and field not in row else ''
        raise ValueError(f'{path}, line {number}: expected a JSON object with a string as its field "{field}"{there}')
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


def open_source(source: str, field: str) -> tuple[str, Callable[[dict], Found]]:
  """Returns what tells the source's content from another's as far as that is cheap, and its reader.

  The reader takes a position, {} for the beginning, and yields (document, position behind it), blank documents too. A
  position is a dict that JSON can hold, and means something to the same source alone.

  Args:
    source: 'embedded'; a UTF-8 .txt, .jsonl or .parquet file; a folder or glob of such files of one kind; a folder that
      `datasets` saved; or a dataset of the Hugging Face hub, 'owner/name:config@revision', as `text.Windows` says.
    field: that holds the text, of sources that have fields.

  Raises:
    FileNotFoundError, ValueError, ImportError: there is no such source, it has no such field, or a package is missing;
      or, while reading, what it holds is no text.
  """
  if source == EMBEDDED:
    whole = hashlib.sha256(b''.join(map(digest, _embedded()))).hexdigest()
    return whole, functools.partial(_from_list, _embedded())
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
