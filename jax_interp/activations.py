"""Tokens to activations: captured at any set of sites in one pass, and shuffled for training.

Takes a model and token windows [example, token]; gives {site: [batch, token, ...]} batch by batch, or an endless stream
of shuffled rows [batch_size, d] that reads from a store and from the live model alike. `e` in a name is an example.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding, sites

BLOCK = 4  # examples that are read together, and a store's chunk: 0.8 MB for GPT-2 small in bfloat16


@functools.partial(jax.jit, static_argnames=('names', 'dtype'))
def capture(model, tokens_bt: jax.Array, names: tuple[str, ...], dtype: str = 'float32') -> dict[str, jax.Array]:
  """Returns {site: activation [batch, token, ...]} in `dtype`; layers after the last of the sites are not computed.

  Raises:
    KeyError: a name or glob matches no site.
  """
  acts = sites.forward(model, tokens_bt, capture=names)[1]
  return {site: x.astype(jnp.dtype(dtype)) for site, x in acts.items()}


def stream(
  model, windows_et: np.ndarray, names: tuple[str, ...], batch_size: int, start: int = 0, dtype: str = 'float32'
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields (index of the first example, {site: activation [b, token, ...]}) over the windows in order.

  The device computes the next batch while the host copies and uses this one.

  Args:
    model: as for `sites.forward`, on the ambient mesh.
    windows_et: int32 token ids.
    names: site names or globs.
    batch_size: examples a batch, cut over the data axis; the last batch is padded on the device only.
    start: example to begin with.
    dtype: 'float32' or 'bfloat16'.

  Raises:
    ValueError: the data axis does not divide batch_size.
    KeyError: a name matches no site.
  """
  sharding.check_divides('batch_size', batch_size, 'data')

  def fetch(first, n, acts):
    return first, {site: np.asarray(x)[:n] for site, x in acts.items()}

  dispatched = None
  for first in range(start, len(windows_et), batch_size):
    tokens_bt = windows_et[first : first + batch_size]
    padded_bt = np.pad(tokens_bt, ((0, batch_size - len(tokens_bt)), (0, 0)))
    acts = capture(model, sharding.place(padded_bt, 'batch token'), names, dtype)
    for x in acts.values():
      x.copy_to_host_async()
    if dispatched:
      yield fetch(*dispatched)
    dispatched = first, len(tokens_bt), acts
  if dispatched:
    yield fetch(*dispatched)


def width(site: str, shape: Sequence[int]) -> int:
  """Returns d of activations [example, token, d], the only ones that an SAE reads.

  Raises:
    ValueError: the site's shape is another one.
  """
  if len(shape) != 3:
    raise ValueError(
      f'{site} has the shape {list(shape)}, and an SAE reads [example, token, d]; choose a resid or mlp site'
    )
  return shape[2]


def live_reader(
  model, windows_et: np.ndarray, site: str, batch_size: int = 32, dtype: str = 'float32'
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns `read(examples)`: int [n] -> activations [n, token, d] of one site, computed anew each time.

  Raises:
    ValueError: the site's activations are not [example, token, d]: see `width`.
  """
  tokens_et = jax.ShapeDtypeStruct(windows_et.shape, jnp.int32)
  width(site, sites.site_shapes(model, tokens_et, (site,))[site].shape)

  def read(examples):
    batches = stream(model, windows_et[examples], (site,), batch_size, dtype=dtype)
    return np.concatenate([acts[site] for _, acts in batches])

  return read


def shuffled_batches(
  read: Callable[[np.ndarray], np.ndarray],
  n_examples: int,
  n_tokens: int,
  batch_size: int,
  buffer_examples: int,
  seed: int,
  start_step: int = 0,
) -> Iterator[np.ndarray]:
  """Yields shuffled activations [batch_size, d] without end; every token's row comes exactly once an epoch.

  Each epoch permutes blocks of BLOCK neighbouring examples, fills a buffer with the next of them and permutes its rows.
  A batch is a function of the seed and its number: a checkpoint need keep no more than the step, and resuming rereads
  one buffer.

  Args:
    read: int [n], ascending -> activations [n, n_tokens, d]; `ActivationStore.reader(site)` or `live_reader`.
    n_examples: examples an epoch.
    n_tokens: tokens an example.
    batch_size: rows a batch; a batch may end one epoch and begin the next.
    buffer_examples: examples that are in memory, and mixed, at a time.
    seed: of both permutations.
    start_step: the first batch to yield.
  """
  fills = -(-n_examples // buffer_examples)
  epochs_done, row = divmod(start_step * batch_size, n_examples * n_tokens)
  fills_done, row = divmod(row, buffer_examples * n_tokens)
  pieces, wanted = [], batch_size
  for i in itertools.count(epochs_done * fills + fills_done):
    epoch, fill = divmod(i, fills)
    order = _block_order(n_examples, np.random.default_rng((seed, epoch, 0)))
    examples = np.sort(order[fill * buffer_examples : (fill + 1) * buffer_examples])
    acts_etd = read(examples)
    rows = acts_etd.reshape(-1, *acts_etd.shape[2:])
    order = np.random.default_rng((seed, epoch, 1 + fill)).permutation(len(rows))
    while row < len(rows):
      pieces.append(rows[order[row : row + wanted]])
      row += wanted
      wanted -= len(pieces[-1])
      if not wanted:
        yield np.concatenate(pieces)
        pieces, wanted = [], batch_size
    row = 0


def _block_order(n_examples, rng):
  firsts = BLOCK * rng.permutation(-(-n_examples // BLOCK))
  order = (firsts[:, None] + np.arange(BLOCK)).ravel()
  return order[order < n_examples]
