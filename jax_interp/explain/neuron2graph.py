"""Documents where a component is active -> a trie of token patterns, as text and as a predictor of its activations.

Neuron2Graph (Foote et al. 2023) by the rules that Gao et al. 2024 scored SAE latents with. Each document is cut after
its strongest token and then from the front, to the shortest suffix that keeps half of the activation; tokens whose
replacement leaves more than half of that are wildcards. Only the subject model is run, on many suffixes at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding, sites

THRESHOLD = 0.5  # the share of an activation that a suffix keeps, and that an important token takes away
SHORTEST = 8  # tokens in the narrowest padded batch; wider ones double, so that few shapes are compiled
BATCH_TOKENS = 8192
GROUP = 16  # components that share forward batches
WILDCARD, START = -1, -2  # edges of the trie beside token ids: any token, and the start of the sequence

Documents = Sequence[tuple[Sequence[int], Sequence[float]]]  # tokens_t and the component's activations_t


# The trie


@dataclasses.dataclass
class Node:
  """A trie over reversed tokens: the root's edges are the strongest token, the next ones the tokens before it."""

  children: dict[int, 'Node'] = dataclasses.field(default_factory=dict)
  value: float | None = None  # the activation, where a pattern ends

  def insert(self, edges: Sequence[int], value: float):
    """Adds a pattern, last token first; of equal patterns the strongest counts."""
    node = self
    for edge in edges:
      node = node.children.setdefault(edge, Node())
    node.value = max(value, node.value or 0.0)

  def patterns(self) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yields every (pattern, value), in reading order: the strongest token last."""
    if self.value is not None:
      yield (), self.value
    for edge, child in self.children.items():
      for pattern, value in child.patterns():
        yield (*pattern, edge), value

  def predict(self, tokens_t: Sequence[int]) -> np.ndarray:
    """Returns the predicted activations_t: at each token the value of the first pattern that ends there, 0 for none.

    Walking backwards, a token's own edge is preferred to the wildcard, and there is no way back: a known miss of the
    method, kept, as is that a short pattern hides the longer ones that end with it.
    """
    tokens = [START, *map(int, tokens_t)]
    return np.array([self._value_before(tokens, end) for end in range(2, len(tokens) + 1)], np.float32)

  def _value_before(self, tokens, end) -> float:
    node = self
    for token in reversed(tokens[:end]):
      node = node.children.get(token) or (node.children.get(WILDCARD) if token != START else None)
      if node is None:
        return 0.0
      if node.value is not None:
        return node.value
    return 0.0


def render(trie: Node, token_strings: Sequence[str]) -> str:
  """Returns the patterns as text, strongest first, such as "' the' * ' of' (3.2); ^ 'import' (1.5)".

  `*` is any token, `^` the start of the sequence, and the number the activation on the last token.
  """
  symbols = {WILDCARD: '*', START: '^'}
  patterns = sorted(trie.patterns(), key=lambda pattern: -pattern[1])
  words = lambda pattern: ' '.join(symbols.get(edge) or repr(token_strings[edge]) for edge in pattern)
  return '; '.join(f'{words(pattern)} ({value:.2g})' for pattern, value in patterns)


# The subject model


@functools.partial(jax.jit, static_argnames='site')
def _last_activations(model, tokens_bt, last_b, component_b, site, sae):
  rows = jnp.arange(len(tokens_bt))
  acts_bd = sites.forward(model, tokens_bt, capture=(site,))[1][site][rows, last_b].astype(jnp.float32)
  if sae is not None:
    acts_bd, _ = sae.encode(acts_bd)
  return acts_bd[rows, component_b]


def reader(model, site: str, sae=None) -> Callable:
  """Returns activation_fn(tokens_bt, last_b, component_b) -> acts_b: each row's component at the row's position last_b.

  Rows are of different components, and padded on the right, which the model, being causal, does not see.
  """

  def activation_fn(tokens_bt, last_b, component_b):
    tokens_bt = sharding.place(tokens_bt, 'batch token')
    return np.asarray(_last_activations(model, tokens_bt, last_b, component_b, site, sae))

  return activation_fn


def padding_token(tokenizer) -> int:
  """Returns the neutral token that replaces others: ' _', as for GPT-2, or, where that is none, the document's end."""
  ids = tokenizer.encode(' _', add_special_tokens=False)
  return ids[0] if len(ids) == 1 else tokenizer.eos_token_id


def _widths(widest):
  """Returns 8, 16, 32, ... and, as the last, the widest."""
  doubling = itertools.takewhile(lambda width: width < widest, (SHORTEST * 2**i for i in itertools.count()))
  return [*doubling, widest]


def _activations(activation_fn, rows: Sequence[tuple[int, np.ndarray]], widths) -> np.ndarray:
  """Returns the activation of each (component, tokens_t) at its last token, in batches of a few fixed shapes."""
  lengths = np.array([len(tokens) for _, tokens in rows], int)
  acts = np.zeros(len(rows))
  n_shards = jax.sharding.get_abstract_mesh().shape.get('data', 1)
  for i, width in enumerate(widths):
    size = max(1, BATCH_TOKENS // (SHORTEST * 2**i))
    size += -size % n_shards
    members = np.flatnonzero(np.searchsorted(widths, lengths) == i)
    for batch in (members[j : j + size] for j in range(0, len(members), size)):
      tokens_bt, last_b, component_b = (np.zeros(shape, np.int32) for shape in ((size, width), size, size))
      for b, row in enumerate(batch):
        component_b[b], tokens = rows[row]
        tokens_bt[b, : len(tokens)], last_b[b] = tokens, len(tokens) - 1
      acts[batch] = activation_fn(tokens_bt, last_b, component_b)[: len(batch)]
  return acts


# The algorithm


@dataclasses.dataclass
class _Document:
  component: int
  tokens: np.ndarray  # the last ones up to and with the strongest
  recorded: float  # its activation there
  suffix: np.ndarray | None = None
  activation: float = 0.0  # of the suffix


def _cut_after_strongest(component, tokens_t, acts_t, n_tokens) -> _Document:
  strongest = int(np.argmax(acts_t))
  tokens = np.asarray(tokens_t[max(0, strongest + 1 - n_tokens) : strongest + 1], np.int32)
  return _Document(component, tokens, float(acts_t[strongest]))


def _find_suffixes(documents: Sequence[_Document], activation_fn, widths):
  """Sets every document's shortest suffix that keeps THRESHOLD of the recorded activation, or else the whole document.

  Suffixes are tried a width at a time, the shorter ones first, because most are short.
  """
  for low, high in itertools.pairwise([0, *widths]):
    pending = [d for d in documents if d.suffix is None and len(d.tokens) > low]
    tried = [(d, d.tokens[-n:]) for d in pending for n in range(low + 1, min(high, len(d.tokens)) + 1)]
    acts = _activations(activation_fn, [(d.component, suffix) for d, suffix in tried], widths)
    for (d, suffix), act in zip(tried, acts, strict=True):
      if d.suffix is None and (act / d.recorded >= THRESHOLD or len(suffix) == len(d.tokens)):
        d.suffix, d.activation = suffix, float(act)


def _pattern(d: _Document, activation_after_padding: float, activations_without: np.ndarray) -> list[int]:
  saliency_t = 1 - activations_without / d.activation
  edges = [int(token) if s >= THRESHOLD else WILDCARD for token, s in zip(d.suffix, saliency_t, strict=True)][::-1]
  can_pad_start = activation_after_padding / d.recorded >= THRESHOLD
  return edges if can_pad_start else [*edges, START]


def tries(documents: Mapping[int, Documents], activation_fn: Callable, pad_token: int, widest: int) -> dict[int, Node]:
  """Returns a trie for each component, all of them in the same forward batches.

  Args:
    documents: {component: its documents}; a document where it is never active adds nothing.
    activation_fn: see `reader`.
    pad_token: see `padding_token`.
    widest: tokens in the widest forward pass. A document that is as long up to its strongest token loses its oldest
      one, so that the padding token fits before it.
  """
  widths = _widths(widest)
  cut = [_cut_after_strongest(c, *document, widest - 1) for c, part in documents.items() for document in part]
  cut = [d for d in cut if d.recorded > 0]
  _find_suffixes(cut, activation_fn, widths)
  cut = [d for d in cut if d.activation > 0]
  probes = []
  for d in cut:
    replaced = np.where(np.eye(len(d.suffix), dtype=bool), pad_token, d.suffix)
    probes += [(d.component, tokens) for tokens in ([pad_token, *d.suffix], *replaced)]
  acts = iter(_activations(activation_fn, probes, widths))
  roots = {component: Node() for component in documents}
  for d in cut:
    padded, *replaced = itertools.islice(acts, len(d.suffix) + 1)
    roots[d.component].insert(_pattern(d, padded, np.array(replaced)), d.activation)
  return roots


def explain(
  documents: Mapping[int, Documents], activation_fn: Callable, pad_token: int, token_strings: Sequence[str]
) -> Iterator[tuple[str, Callable]]:
  """Yields (text, simulate) for every component, in order; see `render` and `Node.predict`.

  The work between two yields is that of GROUP components. No forward pass is longer than the longest document.

  Args:
    documents: {component: [(tokens_t, activations_t), ...]}, of the excerpts that may be fitted on (the train split).
    activation_fn: see `reader`.
    pad_token: see `padding_token`.
    token_strings: the text of every token id.
  """
  widest = max((len(tokens) for part in documents.values() for tokens, _ in part), default=0)
  components = list(documents)
  for i in range(0, len(components), GROUP):
    part = {component: documents[component] for component in components[i : i + GROUP]}
    for trie in tries(part, activation_fn, pad_token, widest).values():
      yield render(trie, token_strings), trie.predict
