"""Text to token windows.

Takes the embedded corpus (documentation of the Python standard library, NumPy, SciPy and JAX as installed), or a local
.txt or .jsonl file; gives windows [example, token] of one split. Whether a document is for training or held out
depends on its content alone, so the split is the same everywhere.
"""

import ast
import hashlib
import importlib.util
import io
import itertools
import json
import pathlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator

import numpy as np

EMBEDDED = 'embedded'
EMBEDDED_PACKAGES = ('numpy', 'scipy', 'jax')
HELD_OUT_PERCENT = 10
SPLITS = ('train', 'held_out')
PAD = -1  # stands behind the last token of a padded window; no token id
MIN_DOCUMENT = 200  # characters; shorter docstrings are mostly signatures repeated
MIN_LINE = 20  # characters; shorter lines ('Returns', '-------') stand in every document and say nothing of duplicates
TXT_DOCUMENT = 4000  # characters gathered into one document of a plain .txt file, so that there is something to split


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


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as e:
    raise ValueError(f'{path} is not UTF-8 (byte {e.start}); convert it, for example with iconv -t UTF-8') from e


def _txt_documents(path: pathlib.Path) -> Iterator[str]:
  gathered = ''
  for paragraph in _read(path).split('\n\n'):
    gathered += paragraph + '\n\n'
    if len(gathered) >= TXT_DOCUMENT:
      yield gathered
      gathered = ''
  yield gathered


def _jsonl_documents(path: pathlib.Path) -> Iterator[str]:
  for number, line in enumerate(io.StringIO(_read(path)), 1):  # not splitlines, which cuts at U+2028 and U+0085 too
    try:
      document = json.loads(line)['text']
    except (json.JSONDecodeError, KeyError, TypeError):
      document = None
    if not isinstance(document, str):
      raise ValueError(f'{path}, line {number}: expected a JSON object with a string as its field "text"')
    yield document


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


def documents(source: str) -> dict[str, list[str]]:
  """Returns the de-duplicated documents of each split, train and held_out, in the order of their content's hash.

  Args:
    source: 'embedded', or the path of a UTF-8 .txt or .jsonl file (objects with a field "text").

  Raises:
    FileNotFoundError, ValueError: there is no such file, it is of another kind, not UTF-8, or holds no text for the
    split.
  """
  path = pathlib.Path(source)
  if source == EMBEDDED:
    found = (text for text in _embedded_documents() if len(text) >= MIN_DOCUMENT)
  elif not path.is_file():
    raise FileNotFoundError(f'no text at {source!r}; give "{EMBEDDED}" or the path of a .txt or .jsonl file')
  elif path.suffix in ('.txt', '.jsonl'):
    found = _txt_documents(path) if path.suffix == '.txt' else _jsonl_documents(path)
  else:
    raise ValueError(f'{source} is neither .txt nor .jsonl; convert it to one of them')
  splits = {split: [] for split in SPLITS}
  for document in deduplicate(found):
    if document.strip():
      splits[split_of(document)].append(document)
  for split, chosen in splits.items():
    if not chosen:
      raise ValueError(f'{source} holds no text for the split {split!r}; give a longer text')
  return {split: sorted(chosen, key=_digest) for split, chosen in splits.items()}


def windows(texts: Iterable[str], tokenizer, n_tokens: int) -> np.ndarray:
  """Returns int32 [example, token]: the documents, each with an end-of-text token behind it, cut into windows.

  Args:
    texts: documents, in order.
    tokenizer: a `transformers` tokenizer with an `eos_token_id`.
    n_tokens: the length of a window; what is left over at the end is dropped.

  Raises:
    ValueError: the documents do not fill one window.
  """
  stream = []
  for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)['input_ids']:
    stream.append(np.array([*ids, tokenizer.eos_token_id], np.int32))
  tokens = np.concatenate([np.zeros(0, np.int32), *stream])
  if len(tokens) < n_tokens:
    raise ValueError(f'the text has {len(tokens)} tokens, fewer than one window of {n_tokens}; give a longer text')
  return tokens[: len(tokens) // n_tokens * n_tokens].reshape(-1, n_tokens)


def special_ids(tokenizer) -> np.ndarray:
  """Returns the ids of the tokenizer's special tokens (end, beginning, padding, unknown, ...), int32, ascending."""
  return np.array(sorted(tokenizer.all_special_ids), np.int32)


def kept(tokens_et: np.ndarray, special_ids: np.ndarray) -> np.ndarray:
  """Returns the mask, bool and shaped like the tokens, of what stands for text: neither `PAD` nor a special token."""
  return (tokens_et != PAD) & ~np.isin(tokens_et, special_ids)
