"""Records and explanations of finished runs -> a component's page, and search over explanations.

Everything is looked up by kind, site and number among what was read at the start: nothing asked for becomes a path.
"""

import collections
import json
import pathlib
import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from jax_interp import records
from jax_interp.report import components
from jax_interp.server import errors, schema

PLURALS = {'latent': 'latents', 'neuron': 'neurons'}


class RecordSet:
  """The records and explanations of all components of one kind at one site.

  Attributes:
    arrays: see `records.read`.
    methods: {index: [(method, explanation, ev_correlation or None)]}.
  """

  def __init__(self, folder: pathlib.Path, kind: str, site: str):
    """Reads what train.records and, if there is any, train.explain left under a workdir.

    Args:
      folder: the workdir.
      kind: of `PLURALS`.
      site: where the activations were read.

    Raises:
      ValueError: there are no such records.
    """
    self.kind, self.site = kind, site
    self._records, self.arrays = records.read(folder / 'records', PLURALS[kind])
    self.methods, self._lines = collections.defaultdict(list), collections.defaultdict(list)
    for path in sorted((folder / 'explanations').glob('*.jsonl')):
      self._note_explanations(path)

  def _note_explanations(self, path):
    offsets, mine = [0], []
    with open(path, 'rb') as file:
      for i, content in enumerate(file):
        offsets.append(offsets[-1] + len(content))
        line = json.loads(content)
        component = line['component']
        if (component['kind'], component['site']) == (self.kind, self.site):
          score = (line['scores'] or {}).get('ev_correlation')
          self.methods[component['index']].append((line['method'], line['explanation'], score))
          mine.append((component['index'], i))
    lines = records.Lines(path, np.array(offsets[:-1]))  # with their excerpts, read when asked for
    for index, i in mine:
      self._lines[index].append((lines, i))

  def __len__(self) -> int:
    return len(self._records)

  def record(self, index: int) -> dict:
    """Returns a NeuronRecord.

    Raises:
      Failed: 404, there is no such component; 503, the file is not the one that was read at the start.
    """
    if index >= len(self):
      raise errors.Failed(404, f'{self.site} has records of {len(self)} {self.kind}s, numbered from 0; not of {index}')
    return _unchanged(self._records, index, lambda record: record['neuron_id']['neuron_index'] == index)

  def explanations(self, index: int) -> list[dict]:
    """Returns a component's lines of explanations/<method>.jsonl. Raises `Failed` as `record`."""
    mine = lambda line: line['component']['index'] == index
    return [_unchanged(lines, i, mine) for lines, i in self._lines.get(index, [])]


def _unchanged(lines, i, is_it) -> dict:
  try:
    found = lines[i]
    if is_it(found):
      return found
  except (json.JSONDecodeError, KeyError, OSError):
    pass
  raise errors.Failed(503, 'records or explanations were made anew since the server started; start it again')


class Catalog:
  """Sets of records, by kind and site, and an index of their explanations."""

  def __init__(self, record_sets: Iterable[RecordSet] = (), strings: Sequence[str] = ()):
    """Indexes the explanations, in memory.

    Args:
      record_sets: of different kinds or sites.
      strings: the text of every token id.

    Raises:
      ValueError: two are of the same kind and site.
    """
    self._sets, self._strings = {}, strings
    # The index is used by one thread at a time, whichever.
    self._index, self._lock = sqlite3.connect(':memory:', check_same_thread=False), threading.Lock()
    self._index.execute(
      'CREATE VIRTUAL TABLE explanations USING fts5(explanation, kind UNINDEXED, site UNINDEXED, number UNINDEXED, '
      "method UNINDEXED, score UNINDEXED, tokenize='porter unicode61')"
    )
    for one in record_sets:
      if (one.kind, one.site) in self._sets:
        raise ValueError(f'there are two sets of records of {one.kind}s at {one.site}; give one of them')
      self._sets[one.kind, one.site] = one
      rows = [
        (text, one.kind, one.site, index, method, score)
        for index, methods in one.methods.items()
        for method, text, score in methods
        if text
      ]
      self._index.executemany('INSERT INTO explanations VALUES (?, ?, ?, ?, ?, ?)', rows)

  def info(self) -> list[schema.RecordsInfo]:
    """Returns what there are records of."""
    sets = self._sets.values()
    return [schema.RecordsInfo(kind=s.kind, site=s.site, n=len(s), n_explained=len(s.methods)) for s in sets]

  def find(self, kind: str, site: str) -> RecordSet:
    """Returns the records of a kind at a site. Raises `Failed`: 404, there are none."""
    if (kind, site) not in self._sets:
      there = ', '.join(f'{kind}s of {site}' for kind, site in self._sets) or 'none'
      raise errors.Failed(404, f'there are no records of {kind}s of {site[:100]!r}; there are: {there}')
    return self._sets[kind, site]

  def component(self, kind: str, site: str, index: int) -> schema.Component:
    """Returns all that is known of a component. Raises `Failed` as `find` and `RecordSet.record`."""
    found = self.find(kind, site)
    record = found.record(index)
    lines = found.explanations(index)
    about = components.describe(kind, site, index, record, found.arrays, self._strings, lines)
    excerpt = lambda x: {'tokens': x['tokens'], 'activations': x['activations']}
    return schema.Component.model_validate(
      about
      | {name: record[name] for name in ('variance', 'skewness', 'kurtosis')}
      | {name: [excerpt(x) for x in about[name]] for name in ('top', 'random')}
      | {'quantiles': [[excerpt(x) for x in part] for part in about['quantiles']]}
      | {'explanations': [_explanation(line) for line in lines]}
    )

  def search(self, q: str, limit: int) -> schema.SearchResponse:
    """Returns the explanations that have all words of q, or their stems; the last word may be the beginning of one."""
    words = re.findall(r'\w+', q)
    if not words:
      return schema.SearchResponse(q=q, limit=limit, found=[], n=0)
    match = ' '.join(f'"{word}"' for word in words) + '*'
    with self._lock:
      rows = self._index.execute(
        'SELECT kind, site, number, method, explanation, score, count(*) OVER () FROM explanations '
        'WHERE explanations MATCH ? ORDER BY rank, rowid LIMIT ?',
        (match, limit),
      ).fetchall()
    found = [schema.Found(**dict(zip(schema.Found.model_fields, row, strict=False))) for row in rows]
    return schema.SearchResponse(q=q, limit=limit, found=found, n=rows[0][-1] if rows else 0)


def _explanation(line: dict) -> dict:
  simulated = [{name: s[name] for name in schema.Simulated.model_fields} for s in line['sequences']]
  return {name: line[name] for name in schema.Explanation.model_fields} | {'sequences': simulated}
