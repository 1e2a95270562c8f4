import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_collections
import pytest

from models import pretrained, sharding
from train import command

ROOT = pathlib.Path(__file__).parents[2]
TINY = '--config=configs/tiny.py'


def _run(*args, code=None, **env):
  program = ['-c', code] if code else ['-m', *args]
  environment = {**os.environ, 'XLA_FLAGS': '', **env}
  return subprocess.run(
    [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([TINY, '--config.lm.n_layers=3'], 'unknown config field \'n_layers\' Did you mean "n_layer" instead'),
    ([TINY, '--config.sae.micro_batches=2'], 'add others there'),
    ([TINY, '--config.lm.n_layer=three'], '--config.lm.n_layer=three: invalid literal for int()'),
    ([], 'no config; give --config=configs/tiny.py'),
    (['--config=configs/nowhere.py'], 'configs/nowhere.py'),
    ([TINY, '--config.mesh.data=3'], 'a mesh of 3x1 needs 3 devices and there are 1; choose a smaller mesh'),
    ([TINY, 'surplus'], "unexpected arguments ['surplus']"),
    ([TINY, '--config.model.source=trained', '--config.text.source=nowhere.txt'], "no text at 'nowhere.txt'"),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(tmp_path, flags, message):
  result = _run('train.lm', f'--workdir={tmp_path}', *flags)
  assert result.returncode == 1
  (sentence,) = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
  assert message in sentence
  assert 'Traceback' not in result.stderr


def test_sigterm_lets_the_stage_save_and_exits_0(tmp_path):
  code = """
import time
from train import command
def run(config, workdir):
  print('started', flush=True)
  while not command.stopping():
    time.sleep(0.01)
  (workdir / 'saved').touch()
  raise command.Stopped('all is saved; run it again')
command.main(run)
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code, TINY, f'--workdir={tmp_path}'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'started\n'
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=600)
  assert process.returncode == 0
  assert 'stopped: all is saved; run it again' in stderr
  assert (tmp_path / 'saved').exists()


def test_a_folder_of_another_config_raises_and_names_the_field(tmp_path):
  settings = {'sae': ml_collections.ConfigDict({'k': 16, 'n_latents': 64}), 'seed': 0}
  folder = tmp_path / 'sae'
  assert not command.claim(folder, settings | {'seed': 1})  # nothing was made with it
  assert not command.claim(folder, settings)
  (folder / 'metrics.jsonl').touch()
  assert not command.claim(folder, settings)
  with pytest.raises(ValueError, match=r'was made with another config: sae\.k is 16 there and 8 now; choose another'):
    command.claim(folder, settings | {'sae': {'k': 8, 'n_latents': 64}})
  with pytest.raises(FileNotFoundError, match=r'sae is not finished; run train\.sae first'):
    command.require(folder, settings, 'train.sae')
  command.finish(folder)
  assert command.claim(folder, settings)
  command.require(folder, settings, 'train.sae')
  with pytest.raises(ValueError, match='seed is 0 there and 1 now'):
    command.require(folder, settings | {'seed': 1}, 'train.sae')


def test_the_metrics_log_forgets_steps_after_the_checkpoint_and_a_torn_line(tmp_path):
  log = command.MetricsLog(tmp_path / 'metrics.jsonl', 0)
  for step in (10, 20, 30):
    log.write({'step': step, 'loss': 1 / step})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4')
  command.MetricsLog(tmp_path / 'metrics.jsonl', 20).write({'step': 30, 'loss': 0.5})
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert lines == [{'step': 10, 'loss': 0.1}, {'step': 20, 'loss': 0.05}, {'step': 30, 'loss': 0.5}]


def test_a_tokenizer_of_another_model_and_an_odd_dtype_are_told(tmp_path):
  shutil.copytree(ROOT / 'tests' / 'golden' / 'gpt2', tmp_path / 'model')
  shutil.copy(pretrained.EMBEDDED_FOLDER / 'tokenizer.json', tmp_path / 'model')
  config = ml_collections.ConfigDict({'model': {'source': str(tmp_path / 'model'), 'dtype': 'float8'}})
  with pytest.raises(ValueError, match=r"model\.dtype 'float8' is unknown; choose one of float32, bfloat16"):
    command.subject(config, tmp_path)
  config.model.dtype = 'bfloat16'
  with jax.set_mesh(sharding.make_mesh()), pytest.raises(ValueError, match='has 4096 tokens, the model only 101'):
    command.subject(config, tmp_path)


def test_in_a_file_every_state_of_a_bar_is_a_line(capsys, monkeypatch):
  monkeypatch.setattr(command.tqdm.tqdm, 'monitor_interval', 0)
  with command.progress(None, 3, 'stage', 'tokens') as bar:
    for _ in range(3):
      bar.set_postfix(loss=0.5, refresh=False)
      bar.update(1)
      bar.refresh()
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) >= 4
  assert all(line.startswith('stage: ') for line in lines)
  assert '3.00/3.00' in lines[-1]
  assert 'loss=0.5' in lines[-1]
