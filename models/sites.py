"""Sites, edits, probes and captures: how everything else reads and changes a forward pass.

A model passes every named activation (a site) through a `Tap`, which shards it, applies the edits that match, adds the
probe that is differentiated, and captures it, always in that order. Because the probe comes after the edits, `stop` at
a site lets the site's own gradient through while it cuts every path that enters the site from upstream.

The same pass reads a whole prompt at once or, with a `Past`, only the tokens that are new (see `models.generation`),
or, with `Pairs`, some tokens of each of several rows that share the others (see `jax_interp.debugger.audit`).
"""

import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding

SPLICED = ('.input', '.latents', '.error')  # what a splice adds to a site's name


@functools.partial(jax.tree_util.register_dataclass, data_fields=['args'], meta_fields=['site', 'fn'])
@dataclasses.dataclass(frozen=True)
class Edit:
  """Replaces the activation x at every site that matches a glob by `fn(x, tap, *args)`.

  `site` and `fn` are static, only `args` are traced: new values never recompile, a new function does, so define edit
  functions at module level. An argument with a token axis goes through `tap.here`, so that the edit is right where
  only new tokens are read.
  """

  site: str
  fn: Callable
  args: tuple = ()


def _where(x, tap, mask, value):
  return jnp.where(tap.here(mask), tap.here(value), x).astype(x.dtype)


def _add(x, tap, vector, mask):
  return jnp.where(tap.here(mask), x + tap.here(vector), x).astype(x.dtype)


def _stop(x, tap, mask):
  return jnp.where(tap.here(mask), jax.lax.stop_gradient(x), x)


def _splice(x, tap, sae, mask):
  return _through_latents(x, tap, sae, mask, jax.lax.stop_gradient)


def _splice_live(x, tap, sae, mask):
  return _through_latents(x, tap, sae, mask, lambda x: x)


def _through_latents(x, tap, sae, mask, held):
  """Returns what the edited latents and error add up to; `held` is what gradients see of the error's own inputs.

  It is x, and what the edits changed: an SAE without edits changes nothing, to the last bit.
  """
  flat = tap('input', x.reshape(*x.shape[:2], -1), 'batch token d_model')
  latents, norm = sae.encode(flat)
  error = jax.lax.stop_gradient(flat - sae.decode(latents, norm))
  change = sae.write(tap('latents', latents, 'batch token latent') - held(latents), norm)
  change += tap('error', error, 'batch token d_model') - error
  spliced = held(flat) + change
  return jnp.where(tap.here(mask), spliced.reshape(x.shape), x).astype(x.dtype)


def ablate(site: str, mask=True) -> Edit:
  """Returns an edit that sets the activation to zero where the mask (broadcast to the site's shape) is true."""
  return Edit(site, _where, (mask, 0.0))


def patch(site: str, value, mask=True) -> Edit:
  """Returns an edit that holds the activation at a value, such as another run's, where the mask is true."""
  return Edit(site, _where, (mask, value))


def steer(site: str, vector, mask=True) -> Edit:
  """Returns an edit that adds a vector (broadcast to the site's shape) where the mask is true."""
  return Edit(site, _add, (vector, mask))


def splice(site: str, sae, mask=True, hold_error: bool = True) -> Edit:
  """Returns an edit that reads and writes the site through an SAE's latents, with its error added.

  It changes no logit; it adds the sites `<site>.latents` and `<site>.error`, which edits may change in turn, and
  `<site>.input`, the activation before it. Where the mask (broadcast to the site's shape) is false, the latents are
  read and what they write is dropped. Latents that edits change leave the error as it was.

  Args:
    site: a site or glob; where it has axes behind the token, the SAE reads them as one.
    sae: has `encode(x_btd) -> latents_btl, norm`, `decode(latents_btl, norm) -> x_btd`, and `write(latents_btl, norm)`,
      the part of `decode` that is linear in the latents.
    mask: where latents write.
    hold_error: whether the error is a constant to gradients, which then pass through latents alone; else gradients
      upstream of the site are those without the SAE.

  Raises:
    ValueError: it is a transcoder.
  """
  if getattr(sae, 'is_transcoder', False):
    raise ValueError(f'a transcoder writes another site than {site}, which it reads; splice in an SAE of the site')
  return Edit(site, _splice if hold_error else _splice_live, (sae, mask))


def stop(site: str, mask=True) -> Edit:
  """Returns an edit that makes the activation a constant to gradients where the mask (broadcast to its shape) is true.

  So norms, attention patterns or nodes are frozen.
  """
  return Edit(site, _stop, (mask,))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['keys_and_values', 'n_read_b'], meta_fields=['n_slots']
)
@dataclasses.dataclass(frozen=True)
class Past:
  """What attention needs of the tokens read before.

  Attributes:
    keys_and_values: {site: [batch, slot, g, channel]}, after their edits; empty before the first token.
    n_read_b: tokens read of each row, which is the slot of its next one.
    n_slots: how many tokens a row can have.
  """

  keys_and_values: dict[str, jax.Array]
  n_read_b: jax.Array
  n_slots: int

  def positions(self, n_tokens: int) -> jax.Array:
    """Returns where in its text [batch, n_tokens] each token of the pass is."""
    return self.n_read_b[:, None] + jnp.arange(n_tokens)

  def slots(self, site: str, x_btgc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys or values known so far [batch, slot, g, channel], and the row [batch, 1] of each new one."""
    b, _, *shape = x_btgc.shape
    empty = jnp.zeros((b, self.n_slots, *shape), x_btgc.dtype)
    return self.keys_and_values.get(site, empty), jnp.arange(b)[:, None]

  def to_rows(self, x_bthc: jax.Array) -> tuple['Past', jax.Array]:
    """Returns the past of attention, and queries [row, token, head, channel] for it."""
    return self, x_bthc

  def from_rows(self, x_rthc: jax.Array) -> jax.Array:
    """Returns what attention gives [row, token, ...] as the rest of the pass has it."""
    return x_rthc

  def at_tokens(self, value: jax.Array, axis: int, n_tokens: int) -> jax.Array:
    """Returns what a value of all tokens, [batch or 1, ...] with these on an axis, is at this pass's."""
    value = jnp.broadcast_to(value, (self.n_read_b.size, *value.shape[1:]))
    take = lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, n_tokens, axis - 1)
    return jax.vmap(take)(value, self.n_read_b)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['keys_and_values', 'row_p', 'token_p', 'first'],
  meta_fields=['n_rows', 'n_tokens', 'n_slots'],
)
@dataclasses.dataclass(frozen=True)
class Pairs:
  """A pass over some tokens of each of several rows, of which all else is known: one batch [1, pair] of them all.

  A site is [1, pair, ...] where tokens do not meet, and [row, token, ...] from attention's patterns to what heads give,
  with the tokens from `first` on; rows there are of no meaning where no pair is.

  Attributes:
    keys_and_values: {site: [slot, g, channel]}, after their edits: of every row, where it has no pair.
    row_p: int32 [pair]: its row; n_rows, and the pair is padding.
    token_p: int32 [pair]: its token.
    first: of the tokens in attention.
    n_rows, n_tokens: of attention.
    n_slots: how many tokens a row can have.
  """

  keys_and_values: dict[str, jax.Array]
  row_p: jax.Array
  token_p: jax.Array
  first: jax.Array
  n_rows: int
  n_tokens: int
  n_slots: int

  def positions(self, n_tokens: int) -> jax.Array:
    """As of `Past`, and so are all methods."""
    return self.token_p[None]

  def slots(self, site: str, x_btgc: jax.Array) -> tuple[jax.Array, jax.Array]:
    known = self.keys_and_values[site]
    return jnp.broadcast_to(known, (self.n_rows, *known.shape)), self.row_p[None]

  def to_rows(self, x_bthc: jax.Array) -> tuple[Past, jax.Array]:
    empty = jnp.zeros((self.n_rows, self.n_tokens, *x_bthc.shape[2:]), x_bthc.dtype)
    x_rthc = empty.at[self.row_p, self.token_p - self.first].set(x_bthc[0], mode='drop')
    return Past({}, jnp.full(self.n_rows, self.first), self.n_slots), x_rthc

  def from_rows(self, x_rthc: jax.Array) -> jax.Array:
    return x_rthc[self.row_p, self.token_p - self.first][None]

  def at_tokens(self, value: jax.Array, axis: int, n_tokens: int) -> jax.Array:
    return jnp.take(value, self.token_p, axis)


@dataclasses.dataclass
class Tap:
  """Visits every named site of one forward pass, always in this order: shard, edit, probe, capture."""

  edits: Sequence[Edit] = ()
  probes: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  capture: Sequence[str] = ()
  past: Past | Pairs | None = None
  prefix: str = ''
  shape: dict[str, int] = dataclasses.field(default_factory=dict)  # of the site that is being edited, by dimension
  acts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  seen: list[str] = dataclasses.field(default_factory=list)
  keys_and_values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def at(self, name: str) -> 'Tap':
    """Returns the same tap one level deeper in the namespace; it shares what is captured."""
    return dataclasses.replace(self, prefix=f'{self.prefix}{name}.')

  def __call__(self, name: str, x: jax.Array, dims: str) -> jax.Array:
    site = self.prefix + name
    self.seen.append(site)
    x = sharding.constrain(x, dims)
    inner = dataclasses.replace(self.at(name), shape=dict(zip(dims.split(), x.shape, strict=True)))
    for edit in self.edits:
      if fnmatch.fnmatchcase(site, edit.site):
        x, shape = edit.fn(x, inner, *edit.args), x.shape
        if x.shape != shape:
          raise ValueError(f'an edit at {site} makes {x.shape} of {shape}; an activation keeps its shape')
    if site in self.probes:
      x = x + self.probes[site]
    if any(fnmatch.fnmatchcase(site, pattern) for pattern in self.capture):
      self.acts[site] = x
    return x

  def positions(self, n_tokens: int) -> jax.Array:
    """Returns the positions [batch or 1, n_tokens] of this pass's tokens in their texts."""
    return jnp.arange(n_tokens)[None] if self.past is None else self.past.positions(n_tokens)

  def extend(self, name: str, x_btgc: jax.Array) -> jax.Array:
    """Returns keys or values of all tokens so far, [batch, slot, g, channel]: without a past, x itself."""
    if self.past is None:
      return x_btgc
    site = self.prefix + name
    known, rows_bt = self.past.slots(site, x_btgc)
    extended = known.at[rows_bt, self.positions(x_btgc.shape[1])].set(x_btgc, mode='drop')
    self.keys_and_values[site] = sharding.constrain(extended, 'batch token head channel')
    return self.keys_and_values[site]

  def to_rows(self, x_bthc: jax.Array) -> tuple['Tap', jax.Array]:
    """Returns the tap of attention, and queries [row, token, head, channel] for it: without pairs, what is given."""
    if self.past is None:
      return self, x_bthc
    past, x_rthc = self.past.to_rows(x_bthc)
    return dataclasses.replace(self, past=past), x_rthc

  def from_rows(self, x_rthc: jax.Array) -> jax.Array:
    """Returns what attention gives [row, token, ...] for this pass's pairs: without pairs, what is given."""
    return x_rthc if self.past is None else self.past.from_rows(x_rthc)

  def here(self, value) -> jax.Array:
    """Returns what an edit's argument, broadcast to the whole text, is at this pass's tokens.

    Raises:
      ValueError: it does not broadcast to the site; or, while only new tokens are read, its token axis is neither 1
        nor all that the text can have.
    """
    value, dims, shape = jnp.asarray(value), list(self.shape), tuple(self.shape.values())
    axis = dims.index('token')
    if self.past is not None:
      value = value.reshape((1,) * (len(dims) - value.ndim) + value.shape)
    if self.past is not None and value.shape[axis] != 1:
      if value.shape[axis] != self.past.n_slots:
        raise ValueError(
          f'an edit at {self.prefix[:-1]} has an array of {value.shape[axis]} tokens; where not all are read, it must '
          f'have 1 or all {self.past.n_slots}, of those read before and the new ones'
        )
      value = self.past.at_tokens(value, axis, self.shape['token'])
    sizes = zip(value.shape[::-1], shape[::-1], strict=False)
    if value.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
      raise ValueError(
        f'an edit at {self.prefix[:-1]} has an array of shape {value.shape}, which does not broadcast to the site: '
        f'{self.shape}'
      )
    return value


def _check_sites(patterns: Sequence[str], seen: Sequence[str]):
  unseen = [pattern for pattern in patterns if not fnmatch.filter(seen, pattern)]
  if unseen:
    if unseen[0].endswith(SPLICED):
      raise KeyError(f'no site matches {unseen[0]!r}: it is there where `splice` is among the edits')
    nearest = difflib.get_close_matches(unseen[0], seen, n=4, cutoff=0.3)
    raise KeyError(f'no site matches {unseen[0]!r}; the nearest are {", ".join(nearest) or ", ".join(seen)}')


def check_tokens(model, tokens_bt):
  """Raises unless these are tokens of the model: on a device, a wrong one would read another's embedding.

  Args:
    model: has a `config.n_vocab`.
    tokens_bt: on the host.

  Raises:
    ValueError: they are not integers [batch, token], there are none, or one is outside the vocabulary.
  """
  tokens_bt, n_vocab = np.asarray(tokens_bt), model.config.n_vocab
  if tokens_bt.ndim != 2 or not tokens_bt.size or not np.issubdtype(tokens_bt.dtype, np.integer):
    raise ValueError(
      f'tokens of shape {tokens_bt.shape} and type {tokens_bt.dtype} are no integers [batch, token]; give one row a '
      'prompt, of one token or more'
    )
  if not 0 <= tokens_bt.min() <= tokens_bt.max() < n_vocab:
    row, token = np.argwhere((tokens_bt < 0) | (tokens_bt >= n_vocab))[0]
    raise ValueError(
      f'token {tokens_bt[row, token]} at row {row}, position {token} is outside the vocabulary of {n_vocab}; encode '
      'the text with the tokenizer of this model, and give padding any token of it'
    )


def run(model, tokens_bt: jax.Array, tap: Tap) -> jax.Array:
  """Returns logits_btv of one pass of a tap; for callers inside `jax.jit`, such as `forward`.

  Raises:
    KeyError: an edit, probe or capture names no site; the message gives the nearest names.
  """
  logits_btv = model(tokens_bt, tap)
  _check_sites([*(edit.site for edit in tap.edits), *tap.probes, *tap.capture], tap.seen)
  return logits_btv


@functools.partial(jax.jit, static_argnames='capture')
def _forward(model, tokens_bt, edits, probes, capture):
  tap = Tap(edits, probes, capture)
  logits_btv = run(model, tokens_bt, tap)
  return logits_btv, tap.acts


def forward(
  model, tokens_bt, edits: Sequence[Edit] = (), probes: Mapping = {}, capture: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns logits_btv and {site: activation}, on the ambient mesh; a new set of sites recompiles, new values do not.

  Args:
    model: a callable `(tokens_bt, tap) -> logits_btv` that taps its sites.
    tokens_bt: int32 token ids. On the host they are checked, see `check_tokens`; arrays on a device are not.
    edits: applied in this order at each site they match.
    probes: {site: zeros of its shape}, added after the edits; differentiate with respect to them.
    capture: site names or globs.

  Raises:
    KeyError: an edit, probe or capture names no site; the message gives the nearest names.
    ValueError: a token is outside the vocabulary, the tokens are longer than the context, or an edit's array does not
      broadcast to its site.
    TypeError: capture is one string.
  """
  if isinstance(capture, str):
    raise TypeError(f'capture {capture!r} is one string; give a tuple of names or globs')
  if not isinstance(tokens_bt, jax.Array | jax.ShapeDtypeStruct):
    tokens_bt = np.asarray(tokens_bt)
    check_tokens(model, tokens_bt)
  return _forward(model, tokens_bt, tuple(edits), probes, tuple(capture))


def site_shapes(
  model, tokens_bt, sites: tuple[str, ...], edits: Sequence[Edit] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns {site: shape and dtype} of the sites that match, without computing anything; raises as `forward` does."""
  return jax.eval_shape(functools.partial(forward, capture=tuple(sites)), model, tokens_bt, edits)[1]


def acts_and_grads(
  model, tokens_bt: jax.Array, objective: Callable, sites: tuple[str, ...], edits: Sequence[Edit] = ()
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns objective(logits_btv, acts), the activations and its gradients at the sites.

  It takes one forward and one backward pass; `grads[site]` is taken after the edits at that site. The estimated total
  effect of a node is acts[site] * grads[site], summed over its channels; the same with `stop` edits on all later nodes
  is its direct effect.
  """

  def run(probes):
    logits_btv, acts = forward(model, tokens_bt, edits, probes, sites)
    return objective(logits_btv, acts), acts

  probes = {site: jnp.zeros(x.shape, x.dtype) for site, x in site_shapes(model, tokens_bt, sites, edits).items()}
  (value, acts), grads = jax.value_and_grad(run, has_aux=True)(probes)
  return value, acts, grads
