"""Trains a small GPT-2 on the config's text: its own byte-level BPE, AdamW, a cosine schedule.

Leaves workdir/lm/model (a folder that `models.pretrained` and `transformers` load) and workdir/lm/evaluation.json: the
held-out loss beside a bigram baseline's, and how much better repeated text is predicted the second time. The config's
other stages use it when config.model.source is 'trained'.
"""

import functools
import json
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

from jax_interp import store, text
from models import gpt2, pretrained, sharding, sites
from train import command, windows

BIGRAM_ADDED = 1.0  # pseudo-counts spread over the vocabulary by the unigram distribution
EVAL_BATCH = 32  # windows a shard of the data axis
EVAL_EXAMPLES = 256  # for the held-out loss during training
TOKENIZER_CHARACTERS = 10**8  # of text that a tokenizer is trained on at most: more hardly changes it


class TrainState(NamedTuple):
  """What a checkpoint holds: the model, AdamW's moments and schedule, and how many steps were taken."""

  model: gpt2.GPT2
  opt: optax.OptState
  step: jax.Array


def train_tokenizer(texts, n_vocab: int) -> tokenizers.Tokenizer:
  """Returns a byte-level BPE of n_vocab tokens, the end-of-text token among them, trained on the texts."""
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(texts, n_vocab, min_frequency=2, special_tokens=[pretrained.END_OF_TEXT], show_progress=False)
  return bpe._tokenizer


def _first_characters(documents: Iterable[str]) -> Iterator[str]:
  """Yields documents until they are TOKENIZER_CHARACTERS or more."""
  n_characters = 0
  for document in documents:
    yield document
    n_characters += len(document)
    if n_characters >= TOKENIZER_CHARACTERS:
      return


def next_token_losses(model: gpt2.GPT2, tokens_bt: jax.Array) -> jax.Array:
  """Returns the cross-entropy in nats of every token but the first, [batch, token - 1]."""
  logits_btv, _ = sites.forward(model, tokens_bt)
  return optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1].astype(jnp.float32), tokens_bt[:, 1:])


_losses = jax.jit(next_token_losses)


def optimizer(learning_rate, warmup_steps, steps, weight_decay) -> optax.GradientTransformation:
  """Returns AdamW with warm-up and a cosine to a tenth; only matrices decay."""
  schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, warmup_steps, steps, learning_rate / 10)
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule, b2=0.95, weight_decay=weight_decay, mask=lambda model: jax.tree.map(lambda x: x.ndim > 1, model)
    ),
  )


@functools.partial(jax.jit, donate_argnums=0, static_argnames='tx')
def train_steps(state: TrainState, tokens_sbt: jax.Array, tx) -> tuple[TrainState, jax.Array]:
  """Takes one step on each of several batches in one dispatch; returns the new state and the loss of each, in nats."""

  def step(state, tokens_bt):
    loss, grads = jax.value_and_grad(lambda model: next_token_losses(model, tokens_bt).mean())(state.model)
    updates, opt = tx.update(grads, state.opt, state.model)
    return TrainState(optax.apply_updates(state.model, updates), opt, state.step + 1), loss

  return jax.lax.scan(step, state, tokens_sbt)


def batch(tokens_et: np.ndarray, seed: int, step: int, batch_size: int) -> np.ndarray:
  """Returns the tokens_bt of a step, a pure function of seed and step.

  An epoch goes through the text once, cut into windows at an offset of its own and in an order of its own.
  """
  n_examples, n_tokens = tokens_et.shape
  epoch, index = divmod(step, (n_examples - 1) // batch_size)
  rng = np.random.default_rng([seed, epoch])
  offset, order = rng.integers(n_tokens), rng.permutation(n_examples - 1)
  starts = np.sort(order[index * batch_size :][:batch_size]) * n_tokens + offset
  return tokens_et.reshape(-1)[starts[:, None] + np.arange(n_tokens)]


def bigram_loss(train_et: np.ndarray, held_out_et: np.ndarray, n_vocab: int) -> float:
  """Returns the held-out cross-entropy in nats a token of an add-lambda bigram model that backs off to unigrams."""
  unigram_v = np.bincount(train_et.ravel(), minlength=n_vocab) + 1.0
  unigram_v /= unigram_v.sum()
  pairs = np.bincount((train_et[:, :-1].astype(np.int64) * n_vocab + train_et[:, 1:]).ravel(), minlength=n_vocab**2)
  counts_vv = pairs.reshape(n_vocab, n_vocab)
  previous, following = held_out_et[:, :-1].ravel(), held_out_et[:, 1:].ravel()
  probs = (counts_vv[previous, following] + BIGRAM_ADDED * unigram_v[following]) / (
    counts_vv.sum(1)[previous] + BIGRAM_ADDED
  )
  return float(-np.log(probs).mean())


def window_losses(model: gpt2.GPT2, tokens_et: np.ndarray) -> np.ndarray:
  """Returns `next_token_losses` of any number of windows [example, token], as [example, token - 1] on the host."""
  size = EVAL_BATCH * jax.sharding.get_mesh().shape['data']
  losses = []
  for start in range(0, len(tokens_et), size):
    tokens_bt = np.asarray(tokens_et[start : start + size])
    full_bt = np.resize(tokens_bt, (size, tokens_bt.shape[1]))  # repeats its rows, so that every batch has one shape
    losses.append(_losses(model, sharding.place(full_bt, 'batch token'))[: len(tokens_bt)])
  return np.concatenate(losses)


def token_bytes(tokenizer) -> np.ndarray:
  """Returns how many bytes of text each token stands for, int [vocab]; the end of a text stands for none.

  A byte-level BPE spells every byte as one character (Radford et al. 2019), whether or not the bytes are valid UTF-8.
  """
  bytes_v = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
  bytes_v[tokenizer.eos_token_id] = 0
  return bytes_v


def evaluate(model: gpt2.GPT2, tokenizer, train_et: np.ndarray, held_out_et: np.ndarray) -> dict[str, float]:
  """Returns the numbers that say whether this is a language model worth explaining, on held-out windows.

  `repeated_first` and `repeated_second` are the losses in nats a token on half a window and on the same half straight
  after it; their difference is what the model gains from having read the text once (induction; Olsson et al. 2022).
  """
  half_et = held_out_et[:, : held_out_et.shape[1] // 2]
  twice_et = window_losses(model, np.tile(half_et, 2))
  n_bytes = token_bytes(tokenizer)[held_out_et[:, 1:]].sum()
  bits_per_byte = held_out_et[:, 1:].size / n_bytes / np.log(2)  # a nat a token in bits a byte
  loss = float(window_losses(model, held_out_et).mean())
  bigram = bigram_loss(train_et, held_out_et, model.config.n_vocab)
  return {
    'held_out_loss': loss,
    'held_out_bits_per_byte': loss * bits_per_byte,
    'bigram_loss': bigram,
    'bigram_bits_per_byte': bigram * bits_per_byte,
    'repeated_first': float(twice_et[:, : half_et.shape[1] - 1].mean()),
    'repeated_second': float(twice_et[:, half_et.shape[1] :].mean()),
  }


def run(config, workdir):
  """Trains the model, or resumes; says so and returns when it is there, or when the config takes another model.

  Raises:
    ValueError: the config has no `lm`, the model there was made with another config, sizes do not fit, or the text is
      too short.
    FileNotFoundError: there is no text.
  """
  if config.model.source != command.TRAINED:
    print(f'the subject model is {config.model.source!r}: nothing to train')
    return
  if 'lm' not in config:
    raise ValueError(
      f'config.lm is missing: it says how the model of model.source {command.TRAINED!r} is trained; copy it from '
      'configs/tiny.py, or choose another model.source'
    )
  folder = workdir / 'lm'
  source, field = config.text.source, config.text.get('field', 'text')
  settings = {'lm': config.lm, 'text': source, 'field': field, 'max_tokens': config.text.get('max_tokens', 0)}
  if command.claim(folder, settings | {'seed': config.seed}):
    return
  lm = config.lm
  model_config = gpt2.GPT2Config(lm.n_layer, lm.n_head, lm.d_model, lm.n_ctx, lm.n_vocab)
  if not (folder / 'model' / 'tokenizer.json').exists():
    bpe = train_tokenizer(_first_characters(text.documents(source, 'train', field)), lm.n_vocab)
    store.write_lines(folder / 'model' / 'tokenizer.json', [bpe.to_str(pretty=True)])
  tokenizer = pretrained.load_tokenizer(str(folder / 'model'))
  train_et, held_out_et = (windows.prepared(config, workdir, tokenizer, split, lm.n_ctx) for split in text.SPLITS)
  if len(train_et) <= lm.batch_size:
    raise ValueError(
      f'the text has {len(train_et)} windows, not more than lm.batch_size {lm.batch_size}; shrink the batch'
    )
  sharding.check_divides('lm.batch_size', lm.batch_size, 'data')
  tx = optimizer(lm.learning_rate, lm.warmup_steps, lm.steps, lm.weight_decay)

  def init() -> TrainState:
    model = gpt2.GPT2(model_config, nnx.Rngs(config.seed))
    return TrainState(model, tx.init(model), jnp.zeros((), jnp.int32))

  state = jax.jit(init)()
  if store.latest_step(folder / 'checkpoints') is not None:
    state = store.restore_checkpoint(folder / 'checkpoints', state)
  metrics = command.MetricsLog(folder / 'metrics.jsonl', int(state.step))
  bar = command.progress(None, lm.steps, 'train.lm', 'steps', initial=int(state.step))
  started, first_step = time.time(), int(state.step)
  for step in range(first_step, lm.steps, lm.steps_per_dispatch):
    steps = range(step, min(step + lm.steps_per_dispatch, lm.steps))
    tokens_sbt = np.stack([batch(train_et, config.seed, s, lm.batch_size) for s in steps])
    state, losses = train_steps(state, sharding.place(tokens_sbt, 'step batch token'), tx)
    done = steps[-1] + 1
    numbers = {'step': done, 'loss': float(losses.mean())}  # waits for the steps
    numbers['tokens_per_s'] = (done - first_step) * lm.batch_size * lm.n_ctx / (time.time() - started)
    stopping = command.stopping()  # asked once: what is said to be saved must be
    save = stopping or done // lm.checkpoint_every > step // lm.checkpoint_every
    if save:
      numbers['held_out_loss'] = float(window_losses(state.model, held_out_et[:EVAL_EXAMPLES]).mean())
    metrics.write(numbers)  # before the checkpoint: a resumed run drops the lines behind its step, and lacks none
    if save:
      store.save_checkpoint(folder / 'checkpoints', done, state)
    bar.update(len(steps))
    bar.set_postfix(loss=f'{numbers["loss"]:.3f}', tokens_per_s=f'{numbers["tokens_per_s"]:.0f}')
    if stopping and done < lm.steps:
      raise command.Stopped(f'step {done} of {lm.steps} is saved in {folder}; run the same command to go on')
  bar.close()
  pretrained.save_model(folder / 'model', state.model, jnp.bfloat16)
  stored = pretrained.load_model(str(folder / 'model'))  # what is evaluated is what others will load
  numbers = evaluate(stored, tokenizer, train_et, held_out_et)
  store.write_json(folder / 'evaluation.json', numbers)
  print(json.dumps(numbers, indent=2))
  command.finish(folder)


if __name__ == '__main__':
  command.main(run)
