import json
import os
import re

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

from models import gpt2, pretrained, sharding
from train import command, lm


def _config(tmp_path, **changes):
  path = tmp_path / 'corpus.jsonl'
  if not path.exists():
    rng = np.random.default_rng(0)
    words = [''.join(chr(97 + c) for c in rng.integers(26, size=rng.integers(3, 8))) for _ in range(200)]
    # Each word decides the next, so that a model of bigrams or better beats one of single tokens.
    texts = [' '.join(words[(start + 7 * i) % 200] for i in range(60)) for start in range(200)]
    path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  sizes = {'n_layer': 1, 'n_head': 2, 'd_model': 16, 'n_ctx': 16, 'n_vocab': 300, 'batch_size': 8, 'warmup_steps': 2}
  schedule = {'steps': 12, 'steps_per_dispatch': 2, 'learning_rate': 1e-2, 'weight_decay': 0.1, 'checkpoint_every': 4}
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': {'source': command.TRAINED},
      'text': {'source': str(path), 'window': 16},
      'lm': sizes | schedule | changes,
    }
  )


def _weights(workdir):
  return (workdir / 'lm' / 'model' / 'model.safetensors').read_bytes()


def _steps(workdir):
  return [json.loads(line)['step'] for line in (workdir / 'lm' / 'metrics.jsonl').read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_a_model_that_loads(mesh, tmp_path):
  lm.run(_config(tmp_path), tmp_path)
  losses = [json.loads(line)['loss'] for line in (tmp_path / 'lm' / 'metrics.jsonl').read_text().splitlines()]
  assert len(losses) == 6
  assert losses[-1] < losses[0] - 0.3
  model = pretrained.load_model(str(tmp_path / 'lm' / 'model'))
  assert model.config.n_vocab == len(pretrained.load_tokenizer(str(tmp_path / 'lm' / 'model'))) == 300
  numbers = json.loads((tmp_path / 'lm' / 'evaluation.json').read_text())
  assert numbers['held_out_loss'] < np.log(300)


def test_a_stopped_run_resumes_to_the_same_weights(mesh, tmp_path, monkeypatch):
  lm.run(_config(tmp_path), tmp_path / 'whole')
  asked = iter([False] * 2 + [True])
  monkeypatch.setattr(command, 'stopping', lambda: next(asked))
  with pytest.raises(command.Stopped, match='step 6 of 12 is saved'):
    lm.run(_config(tmp_path), tmp_path / 'stopped')
  monkeypatch.setattr(command, 'stopping', lambda: False)
  lm.run(_config(tmp_path), tmp_path / 'stopped')
  assert _weights(tmp_path / 'stopped') == _weights(tmp_path / 'whole')
  assert _steps(tmp_path / 'stopped') == [2, 4, 6, 8, 10, 12]


def test_an_epoch_reads_every_window_once():
  tokens_et = np.arange(41 * 8).reshape(41, 8)
  epoch = np.concatenate([lm.batch(tokens_et, seed=0, step=step, batch_size=5) for step in range(8, 16)])
  flat = np.sort(epoch.ravel())
  np.testing.assert_array_equal(flat, np.arange(flat[0], flat[0] + 40 * 8))
  other = np.concatenate([lm.batch(tokens_et, seed=0, step=step, batch_size=5) for step in range(8)])
  assert not np.array_equal(epoch, other)


def test_the_bigram_baseline_equals_a_count_by_hand():
  train_et, held_out_et = np.array([[0, 1, 0, 1, 2]]), np.array([[0, 1, 1]])
  unigram = np.array([3, 3, 2]) / 8
  expected = -np.mean([np.log((2 + unigram[1]) / 3), np.log((0 + unigram[1]) / 3)])
  np.testing.assert_allclose(lm.bigram_loss(train_et, held_out_et, 3), expected)


def test_losses_are_those_of_the_next_token(mesh):
  model = pretrained.load_model('embedded')
  tokens_bt = np.random.default_rng(0).integers(4096, size=(2, 12)).astype(np.int32)
  logits_btv = np.asarray(
    jax.jit(lambda model, tokens: lm.sites.forward(model, tokens)[0])(model, tokens_bt), np.float64
  )
  log_z_bt = np.log(np.exp(logits_btv).sum(-1))
  expected = (log_z_bt[..., None] - logits_btv)[:, :-1]
  expected = np.take_along_axis(expected, tokens_bt[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(lm.next_token_losses(model, tokens_bt), expected, rtol=1e-4)


def test_a_config_without_training_trains_nothing(tmp_path, capsys):
  config = _config(tmp_path)
  config.model.source = 'embedded'
  lm.run(config, tmp_path)
  assert not (tmp_path / 'lm').exists()
  assert 'nothing to train' in capsys.readouterr().out


def test_too_little_text_for_a_batch_raises(mesh, tmp_path):
  config = _config(tmp_path, batch_size=100000)
  message = r'the text has (\d+) windows, not more than lm\.batch_size'
  with pytest.raises(ValueError, match=message) as error:
    lm.run(config, tmp_path / 'far')
  n_windows = int(re.search(message, str(error.value))[1])
  with pytest.raises(ValueError, match=message):
    lm.run(_config(tmp_path, batch_size=n_windows), tmp_path / 'equal')


def test_a_config_without_lm_raises(tmp_path):
  config = _config(tmp_path)
  del config.lm
  with pytest.raises(ValueError, match=r'config\.lm is missing'):
    lm.run(config, tmp_path)


def test_a_run_killed_while_it_writes_the_tokenizer_leaves_none(mesh, tmp_path, monkeypatch):
  replace = os.replace

  def replace_or_die(partial, path):
    if path.name == 'tokenizer.json':
      raise KeyboardInterrupt
    replace(partial, path)

  monkeypatch.setattr(os, 'replace', replace_or_die)
  with pytest.raises(KeyboardInterrupt):
    lm.run(_config(tmp_path), tmp_path)
  assert not (tmp_path / 'lm' / 'model' / 'tokenizer.json').exists()


def test_the_metrics_of_a_step_are_written_before_its_checkpoint(tmp_path, monkeypatch):
  def die(folder, step, state):
    raise KeyboardInterrupt

  monkeypatch.setattr(lm.store, 'save_checkpoint', die)
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(KeyboardInterrupt):
    lm.run(_config(tmp_path), tmp_path)
  assert _steps(tmp_path) == [2, 4]


@pytest.mark.parametrize('shape', [(1, 1), (3, 1)])
def test_any_number_of_windows_is_evaluated_on_any_mesh(shape):
  config = gpt2.GPT2Config(n_layer=1, n_head=2, d_model=16, n_ctx=8, n_vocab=4096)
  tokens_et = np.random.default_rng(0).integers(4096, size=(100, 8)).astype(np.int32)
  with jax.set_mesh(sharding.make_mesh(*shape)):
    model = jax.jit(lambda: gpt2.GPT2(config, nnx.Rngs(0)))()
    losses_et = lm.next_token_losses(model, tokens_et)
    for n_windows in (1, 31, 100):
      held_out_et = tokens_et[:n_windows]
      np.testing.assert_allclose(lm.window_losses(model, held_out_et), losses_et[:n_windows], rtol=1e-5)
      numbers = lm.evaluate(model, pretrained.load_tokenizer('embedded'), tokens_et, held_out_et)
      np.testing.assert_allclose(numbers['held_out_loss'], losses_et[:n_windows].mean(), rtol=1e-5)


def test_bytes_are_counted_exactly_also_within_a_character_and_not_for_the_end_of_a_text():
  tokenizer = pretrained.load_tokenizer('embedded')
  words = 'naïve “quotes” 東京 \U0001f600\n\tand code()'
  ids = tokenizer(words)['input_ids']
  bytes_v = lm.token_bytes(tokenizer)
  assert any('\ufffd' in tokenizer.decode([i]) for i in ids)
  assert bytes_v[ids].sum() == len(words.encode())
  assert bytes_v[[*ids, tokenizer.eos_token_id]].sum() == len(words.encode())
