"""Sampling from a subject model with a cache of keys and values, under edits or without.

Takes prompts, gives new tokens. It is the forward pass of `models.sites` twice: over the prompts, then over one new
token a row at a time with a `Past`; edits act on new tokens as they would in one pass over the whole text.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import layers, sharding, sites


class Generated(NamedTuple):
  """New tokens, int32 [batch, n_new], and the log-probability of each under the model (at temperature 1), in nats.

  Behind an end token come only end tokens, with log-probability 0.
  """

  tokens_bt: jax.Array
  log_probs_bt: jax.Array


def nucleus(logits_bv: jax.Array, top_p) -> jax.Array:
  """Returns the logits with all but the nucleus at -inf.

  The nucleus is the smallest set of most likely tokens whose probabilities sum to at least top_p (Holtzman et al. 2020,
  section 3.1); of equally likely tokens the one of lowest index comes first.
  """
  order_bv = jnp.argsort(-logits_bv, axis=-1, stable=True)
  probs_bv = jnp.take_along_axis(jax.nn.softmax(logits_bv), order_bv, axis=-1)
  before_bv = jnp.cumsum(probs_bv, axis=-1) - probs_bv
  kept_bv = (before_bv < top_p).at[:, 0].set(True)
  rows = jnp.arange(len(logits_bv))[:, None]
  return jnp.where(jnp.zeros_like(kept_bv).at[rows, order_bv].set(kept_bv), logits_bv, -jnp.inf)


def sample(key: jax.Array, logits_bv: jax.Array, temperature, top_p) -> jax.Array:
  """Returns a token of each row [batch], drawn from the nucleus of softmax(logits / temperature); at 0 the likeliest.

  Args:
    key: a random key.
    logits_bv: float32.
    temperature: 0 or more.
    top_p: above 0, at most 1.
  """

  def drawn():
    scaled_bv = logits_bv / temperature
    scaled_bv = jax.lax.cond(top_p < 1, lambda: nucleus(scaled_bv, top_p), lambda: scaled_bv)
    return jax.random.categorical(key, scaled_bv)

  return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits_bv, axis=-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames='n_new')
def _generate(model, tokens_bt, n_tokens_b, key, edits, temperature, top_p, end_token, n_new):
  b, n_prompt = tokens_bt.shape
  n_slots = n_prompt + n_new

  def read(tokens_bt, past):
    """Returns the logits, and the past with these tokens in it."""
    tap = sites.Tap(edits, past=past)
    logits_btv = sites.run(model, tokens_bt, tap)
    return logits_btv, sites.Past(tap.keys_and_values, past.n_read_b + tokens_bt.shape[1], n_slots)

  def draw(i, logits_bv, done_b):
    token_b = jnp.where(done_b, end_token, sample(jax.random.fold_in(key, i), logits_bv, temperature, top_p))
    log_probs_bv = jax.nn.log_softmax(logits_bv)
    log_prob_b = jnp.take_along_axis(log_probs_bv, token_b[:, None], axis=-1, mode='clip')[:, 0]
    return token_b, jnp.where(done_b, 0.0, log_prob_b), done_b | (token_b == end_token)

  def step(carry):
    i, token_b, done_b, past, generated = carry
    logits_btv, past = read(token_b[:, None], past)
    token_b, log_prob_b, done_b = draw(i, logits_btv[:, 0], done_b)
    return i + 1, token_b, done_b, past, _write(generated, i, token_b, log_prob_b)

  logits_btv, past = read(tokens_bt, sites.Past({}, jnp.zeros(b, jnp.int32), n_slots))
  # Rows shorter than the longest go on behind their own end; what the padding left in later slots is overwritten
  # before it is attended to.
  past = sites.Past(past.keys_and_values, n_tokens_b, n_slots)
  last_bv = jnp.take_along_axis(logits_btv, (n_tokens_b - 1)[:, None, None], axis=1)[:, 0]
  token_b, log_prob_b, done_b = draw(0, last_bv, jnp.zeros(b, bool))
  empty = Generated(jnp.full((b, n_new), end_token, jnp.int32), jnp.zeros((b, n_new)))
  carry = jnp.int32(1), token_b, done_b, past, _write(empty, 0, token_b, log_prob_b)
  going_on = lambda carry: (carry[0] < n_new) & ~carry[2].all()
  return jax.lax.while_loop(going_on, step, carry)[-1]


def _write(generated, i, token_b, log_prob_b):
  return Generated(generated.tokens_bt.at[:, i].set(token_b), generated.log_probs_bt.at[:, i].set(log_prob_b))


def generate(
  model,
  tokens_bt: np.ndarray,
  key: jax.Array,
  n_new: int,
  edits: Sequence[sites.Edit] = (),
  temperature: float = 1.0,
  top_p: float = 1.0,
  end_token: int | None = None,
  n_tokens_b: np.ndarray | None = None,
) -> Generated:
  """Returns tokens that the model continues the prompts with, on the ambient mesh.

  Token i of the new ones is drawn with `jax.random.fold_in(key, i)`: the same key and prompts give the same tokens as
  drawing each from a forward pass over the whole text. A new n_new, prompt length or set of edits compiles; other
  values do not.

  Args:
    model: as for `sites.forward`.
    tokens_bt: int32 prompts on the host, of one token or more; the shorter ones padded on the right with any token.
    key: a random key.
    n_new: how many tokens to append to each.
    edits: as for `sites.forward`; an array that varies over tokens spans all tokens_bt.shape[1] + n_new of them.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draws from the nucleus of this probability, see `nucleus`.
    end_token: ends a row; by default none does.
    n_tokens_b: length of each prompt, where they are padded.

  Raises:
    ValueError: prompt and new tokens are longer than the context, a setting is out of range, a token is outside the
      vocabulary, or an edit's array spans another number of tokens.
    KeyError: an edit names no site.
  """
  sites.check_tokens(model, tokens_bt)
  tokens_bt = np.asarray(tokens_bt, np.int32)
  n_prompt = tokens_bt.shape[1]
  n_tokens_b = np.full(len(tokens_bt), n_prompt, np.int32) if n_tokens_b is None else np.asarray(n_tokens_b, np.int32)
  if not temperature >= 0 or not 0 < top_p <= 1 or n_new < 1:
    raise ValueError(
      f'temperature {temperature} must be 0 or more, top_p {top_p} above 0 and at most 1, n_new {n_new} at least 1'
    )
  if n_tokens_b.shape != tokens_bt.shape[:1] or ((n_tokens_b < 1) | (n_tokens_b > n_prompt)).any():
    raise ValueError(f'n_tokens_b {n_tokens_b.tolist()} must give each of {len(tokens_bt)} rows 1 to {n_prompt} tokens')
  layers.check_length(n_prompt + n_new, model.config.n_ctx)
  tokens_bt, n_tokens_b = sharding.place(tokens_bt, 'batch token'), sharding.place(n_tokens_b, 'batch')
  end_token = np.int32(-1 if end_token is None else end_token)
  return _generate(
    model, tokens_bt, n_tokens_b, key, tuple(edits), np.float32(temperature), np.float32(top_p), end_token, n_new
  )
