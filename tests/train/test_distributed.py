"""Two processes capture and train together what one does; killed or stopped at any moment, they go on to it."""

import contextlib
import filecmp
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from models import gpt2, pretrained, sharding
from train import capture, processes
from train import sae as train_sae

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'dog', 'ran', 'far']
N_EXAMPLES, WINDOW, N_SHARDS = 613, 16, 77  # shards of 8, the last of 5; an odd number, so that one process idles
N_KILLS = 10
GRACE = 2  # seconds after which a process that has lost the other is killed too
TIMEOUT = 600  # seconds, for what does not hang
CAPTURE = ('-m', 'train.capture')
INTERRUPTED = """
import itertools, os, signal, sys, threading
from jax_interp import store
from train import capture, command
what, at, numbers, write = sys.argv.pop(1), int(sys.argv.pop(1)), itertools.count(1), store.ActivationStore.write
def interrupted(self, shard, *args):
  if next(numbers) == at:
    if what == 'hold':
      threading.Event().wait()
    os.kill(os.getpid(), signal.SIGTERM)
  write(self, shard, *args)
store.ActivationStore.write = interrupted
command.main(capture.run, several_processes=True)
"""


def interrupted(what, at):
  """A capture that waits to be killed ('hold') or asks itself to stop ('stop') before it writes its n-th shard."""
  return '-c', INTERRUPTED, what, str(at)


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """A folder with a random model, a tokenizer, a text and a config on a mesh of 2 x 1."""
  folder = tmp_path_factory.mktemp('subject')
  rng = np.random.default_rng(0)
  documents = [' '.join(rng.choice(WORDS, 120)) for _ in range(100)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': document}) for document in documents))
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator(documents, 280, special_tokens=[pretrained.END_OF_TEXT], show_progress=False)
  bpe._tokenizer.save(str(folder / 'tokenizer.json'))
  model_config = gpt2.GPT2Config(n_layer=2, n_head=2, d_model=24, n_ctx=16, n_vocab=bpe.get_vocab_size())
  with jax.set_mesh(sharding.make_mesh()):
    pretrained.save_model(folder, jax.jit(lambda: gpt2.GPT2(model_config, nnx.Rngs(0)))())
  config = {
    'mesh': {'data': 2, 'model': 1},
    'capture': {
      'sites': ('h.*.resid.post_mlp', 'h.1.mlp.post_act'),
      'n_tokens': N_EXAMPLES * WINDOW,
      'dtype': 'bfloat16',
      'batch_size': 8,
      'shard_examples': 8,
      'store': '',
    },
    'model': {'source': str(folder)},
    'text': {'source': str(folder / 'text.jsonl'), 'window': WINDOW},
  }
  (folder / 'config.py').write_text(
    f'import ml_collections\nget_config = lambda: ml_collections.ConfigDict({config!r})\n'
  )
  return folder


def start(subject, workdir, *flags, n_devices=1, program=CAPTURE):
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={n_devices}',  # the last one counts
  }
  command = [sys.executable, *program, f'--config={subject / "config.py"}', f'--workdir={workdir}', *flags]
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


def start_two(subject, workdir, *flags, own_flags=((), ()), programs=(CAPTURE, CAPTURE), n_devices=1):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  shared = (f'--coordinator=localhost:{port}', '--n_processes=2', *flags)
  return [
    start(subject, workdir, *shared, f'--process={i}', *own_flags[i], n_devices=n_devices, program=programs[i])
    for i in range(2)
  ]


def finish(processes):
  """Returns the exit codes and outputs, in order; ends what does not end."""
  try:
    outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], outputs


def files(workdir):
  """The files of a store but for how long it took."""
  return sorted(
    str(path.relative_to(workdir)) for path in workdir.rglob('*') if path.is_file() and path.name != capture.REPORT
  )


def assert_same(a, b):
  a, b = a / 'activations', b / 'activations'
  names = files(a)
  assert len(names) == N_SHARDS * 5 + 8  # three sites, tokens and commits; four zarr.json, manifest, config, DONE, lock
  assert names == files(b)
  assert filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


@pytest.fixture(scope='module')
def whole(subject, tmp_path_factory):
  """What one process with two pretend devices leaves."""
  workdir = tmp_path_factory.mktemp('whole')
  codes, outputs = finish([start(subject, workdir, n_devices=2)])
  assert codes == [0], outputs
  return workdir


def test_two_processes_leave_the_files_of_one(subject, whole, tmp_path):
  codes, outputs = finish(start_two(subject, tmp_path))
  assert codes == [0, 0], outputs
  assert_same(whole, tmp_path)
  report = json.loads((tmp_path / 'activations' / capture.REPORT).read_text())['run']
  assert (report['processes'], report['devices'], report['tokens']) == (2, 2, N_EXAMPLES * WINDOW)
  codes, outputs = finish(start_two(subject, tmp_path))
  assert codes == [0, 0], outputs
  assert 'is done already' in outputs[0]


def test_two_processes_of_two_devices_leave_the_files_of_one_of_four(subject, tmp_path):
  """The model is cut over the devices of a process, the batch over the processes; sites are whole either way."""
  flags = '--config.mesh.model=2', '--config.capture.dtype=float32'
  codes, outputs = finish([start(subject, tmp_path / 'one', *flags, n_devices=4)])
  assert codes == [0], outputs
  codes, outputs = finish(start_two(subject, tmp_path / 'two', *flags, n_devices=2))
  assert codes == [0, 0], outputs
  assert_same(tmp_path / 'one', tmp_path / 'two')


def test_what_one_process_cannot_do_stops_both(subject, tmp_path):
  """A folder stands where process 1 would write the file of shard 3; finished shards stay."""
  blocked = tmp_path / 'store' / 'h.1.mlp.post_act' / 'c' / '3' / '0' / '0'
  (blocked / 'something').mkdir(parents=True)
  flags = f'--config.capture.store={tmp_path / "store"}'
  codes, outputs = finish(start_two(subject, tmp_path, flags))
  assert codes == [1, 1], outputs
  assert 'error: process 1: ' in outputs[0]
  for output in outputs:
    assert str(blocked) in output
  n_finished = len(list((tmp_path / 'store' / 'commits').iterdir()))
  assert 0 < n_finished < N_SHARDS / 2


def n_commits(workdir):
  return sum(path.name.isdigit() for path in (workdir / 'activations' / 'commits').glob('*'))


def wait_for(condition, running, seconds=TIMEOUT):
  """Waits until the condition holds, a process has ended or the time is over."""
  end = time.monotonic() + seconds
  while not condition() and all(process.poll() is None for process in running) and time.monotonic() < end:
    time.sleep(0.001)


def test_killed_at_ten_random_moments_the_store_comes_out_the_same(subject, whole, tmp_path):
  """Odd kills come at a random time from the start of a run; even ones, and odd ones that are late, among the shards.

  However fast the machine, a run adds no more than six shards before it is killed, so that the runs last for all the
  kills.
  """
  rng, killed_with = random.Random(0), []
  for kill in range(N_KILLS):
    running = start_two(subject, tmp_path, programs=[interrupted('hold', 4)] * 2)
    wanted = n_commits(tmp_path) + rng.randint(1, 5)
    wait_for(lambda: n_commits(tmp_path) >= wanted, running, rng.uniform(0, 8) if kill % 2 else TIMEOUT)  # noqa: B023
    time.sleep(rng.uniform(0, 0.01))
    victim = rng.randrange(2)
    running[victim].kill()
    killed_with.append(n_commits(tmp_path))
    with contextlib.suppress(subprocess.TimeoutExpired):
      running[1 - victim].wait(GRACE)
    running[1 - victim].kill()
    finish(running)
  assert 0 < killed_with[0] <= killed_with[-1] < N_SHARDS, killed_with
  codes, outputs = finish(start_two(subject, tmp_path))
  assert codes == [0, 0], outputs
  assert_same(whole, tmp_path)


def test_a_process_that_has_lost_the_other_ends_by_itself(subject, tmp_path):
  running = start_two(subject, tmp_path, '--heartbeat_timeout=10', programs=(CAPTURE, interrupted('hold', 2)))
  wait_for(lambda: n_commits(tmp_path) > 0, running)
  running[1].kill()
  codes, outputs = finish(running)
  assert (codes[0] != 0, codes[1]) == (True, -signal.SIGKILL), outputs


@pytest.mark.parametrize('asked', [(0, 1), (1,)], ids=['both', 'one'])
def test_sigterm_stops_all_and_the_same_command_goes_on(subject, whole, tmp_path, asked):
  programs = [interrupted('stop', 2) if i in asked else CAPTURE for i in range(2)]
  codes, outputs = finish(start_two(subject, tmp_path, programs=programs))
  assert codes == [0, 0], outputs
  for output in outputs:
    assert 'stopped: ' in output
    assert 'finished shards are kept' in output
  assert 0 < n_commits(tmp_path) < N_SHARDS
  codes, outputs = finish(start_two(subject, tmp_path))
  assert codes == [0, 0], outputs
  assert_same(whole, tmp_path)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.mesh.data=1'], 'a mesh of 1x1 does not give each of 2 processes as many devices'),
    (['--config.capture.sites=("h.0.resid.post_mpl",)'], 'the nearest are h.0.resid.post_mlp'),
  ],
)
def test_bad_settings_are_told_by_all_processes(subject, tmp_path, flags, message):
  codes, outputs = finish(start_two(subject, tmp_path, *flags))
  assert codes == [1, 1]
  for output in outputs:
    assert message in output


@pytest.mark.parametrize('rows', [[(0, 0), (1, 1)], [(0, 1)], [(0, 1), (1, 0)]], ids=str)
def test_processes_that_hold_as_many_devices_have_a_part_each(monkeypatch, rows):
  assert parts_of_mesh(monkeypatch, rows) == [(0, 2), (1, 2)]


@pytest.mark.parametrize('rows', [[(0, 0), (0, 1)], [(0, 0)]], ids=str)
def test_processes_that_hold_more_or_none_of_a_mesh_are_told(monkeypatch, rows):
  with pytest.raises(ValueError, match=f'a mesh of {len(rows)}x2 does not give each of 2 processes as many devices'):
    parts_of_mesh(monkeypatch, rows)


def parts_of_mesh(monkeypatch, rows):
  """Returns the part of each of two processes, on a mesh whose devices are these processes'."""
  devices = np.array([[types.SimpleNamespace(process_index=p) for p in row] for row in rows])
  monkeypatch.setattr(jax.sharding, 'get_mesh', lambda: types.SimpleNamespace(devices=devices))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  found = []
  for p in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda p=p: p)
    found.append(processes.part())
  return found


def test_processes_that_do_not_read_the_same_are_told(subject, tmp_path):
  running = start_two(subject, tmp_path, own_flags=((), ('--config.capture.dtype=float32',)))
  codes, outputs = finish(running)
  assert codes == [1, 1], outputs
  for output in outputs:
    assert 'process 1 has another config or model than process 0' in output


def test_processes_that_are_not_all_named_are_told(subject, tmp_path):
  codes, outputs = finish([start(subject, tmp_path, '--n_processes=2', '--process=2')])
  assert codes == [1]
  assert 'name no process of several; give all three' in outputs[0]


SAE = ('-m', 'train.sae')
N_STEPS = 16
STOPPED = """
import itertools, os, signal, sys
from train import command, sae
at, number, numbers, write = int(sys.argv.pop(1)), getattr(signal, sys.argv.pop(1)), itertools.count(1), None
write = command.MetricsLog.write
def writing(*args):
  if next(numbers) == at:
    os.kill(os.getpid(), number)
  write(*args)
command.MetricsLog.write = writing
command.main(sae.run, several_processes=True)
"""


def stopped(at, number='SIGTERM'):
  """Training that gets a signal while the n-th line of its curve is written, a line a step."""
  return '-c', STOPPED, str(at), number


@pytest.fixture(scope='module')
def captured(subject, tmp_path_factory):
  """A subject whose config trains an SAE, and what one process captured."""
  folder = tmp_path_factory.mktemp('captured')
  settings = {
    'site': 'h.1.resid.post_mlp',
    'source': 'store',
    'recipe': 'topk',
    'n_latents': 64,
    'k': 4,
    'normalization': 'layer_norm_std',
    'auxk': 8,
    'auxk_coef': 1 / 32,
    'kernels': 'sparse',
    'compute_dtype': 'float32',
    'dead_tokens': 256,
    'tokens': N_STEPS * 64,
    'batch_size': 64,
    'buffer_examples': 64,
    'learning_rate': 1e-3,
    'warmup_steps': 2,
    'adam_eps': 1e-8,
    'ema': 0.9,
    # Parts of a batch have to be of the same tokens, and resampling draw the same, however processes share them.
    'sweep': (
      {'name': 'first', 'micro_batches': 4},
      {
        'name': 'second',
        'site': 'h.0.resid.post_mlp',
        'recipe': 'relu',
        'l1_coef': 0.1,
        'micro_batches': 16,
        'resample_every': 8,
        'dead_tokens': 1,  # some latents are off for the last part of 4 tokens
        'ema': 0.0,
      },
    ),
    'steps_per_dispatch': 1,
    'checkpoint_every': 3,
    'log_every': 1,
  }
  content = (subject / 'config.py').read_text()
  (folder / 'config.py').write_text(
    f'{content}\nsubject = get_config\ndef get_config():\n  config = subject()\n'
    f'  config.seed, config.sae = 0, ml_collections.ConfigDict({settings!r})\n  return config\n'
  )
  codes, outputs = finish([start(folder, folder, n_devices=2)])
  assert codes == [0], outputs
  return folder


def trained(captured, workdir, n_processes, program=SAE, data=2, model=1, victims=(0, 1), flags=()):
  """Trains by one process of as many devices or by two, of which the victims run the program; codes and outputs."""
  if not (workdir / 'activations').exists():
    workdir.mkdir(exist_ok=True)
    (workdir / 'activations').symlink_to(captured / 'activations')
  flags = f'--config.mesh.data={data}', f'--config.mesh.model={model}', *flags
  if n_processes == 1:
    return finish([start(captured, workdir, *flags, n_devices=data * model, program=program)])
  programs = [program if i in victims else SAE for i in range(2)]
  running = start_two(captured, workdir, *flags, programs=programs, n_devices=data * model // 2)
  if 'SIGKILL' in program:
    running[victims[0]].wait(TIMEOUT)
    time.sleep(GRACE)
    running[1 - victims[0]].kill()
  return finish(running)


def curves(workdir):
  found = {}
  for name in ('first', 'second'):
    lines = (workdir / 'sweep' / name / 'sae' / 'metrics.jsonl').read_text().splitlines()
    found[name] = [{k: v for k, v in json.loads(line).items() if k not in train_sae.TIMES} for line in lines]
    assert len(lines) == N_STEPS
  return found


def saes(workdir):
  return [(workdir / 'sweep' / name / 'sae' / 'final' / 'sae.safetensors').read_bytes() for name in ('first', 'second')]


def assert_close(ours, theirs):
  for name, lines in curves(theirs).items():
    for a, b in zip(curves(ours)[name], lines, strict=True):
      assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.fixture(scope='module')
def trained_by_two(captured, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained')
  codes, outputs = trained(captured, workdir, 2)
  assert codes == [0, 0], outputs
  return workdir


def test_together_two_processes_train_what_one_does(captured, trained_by_two, tmp_path):
  codes, outputs = trained(captured, tmp_path / 'one', 1)
  assert codes == [0], outputs
  assert_close(tmp_path / 'one', trained_by_two)
  assert curves(trained_by_two)['second'][7]['dead'] > 0  # which are resampled
  codes, outputs = trained(captured, trained_by_two, 2)
  assert codes == [0, 0], outputs
  assert 'is done already' in outputs[0]


def test_sigterm_to_one_stops_both_and_they_go_on_to_the_same_bits(captured, trained_by_two, tmp_path):
  codes, outputs = trained(captured, tmp_path, 2, stopped(9), victims=(1,))  # two lines a step
  assert codes == [0, 0], outputs
  for output in outputs:
    assert f'stopped: step 5 of {N_STEPS} is saved' in output
  codes, outputs = trained(captured, tmp_path, 2)
  assert codes == [0, 0], outputs
  assert saes(tmp_path) == saes(trained_by_two)
  assert curves(tmp_path) == curves(trained_by_two)


def test_killed_one_of_two_they_go_on_to_the_same_bits(captured, trained_by_two, tmp_path):
  codes, outputs = trained(captured, tmp_path, 2, stopped(13, 'SIGKILL'), victims=(0,))  # while step 6 is written
  assert codes[0] == -signal.SIGKILL, outputs
  codes, outputs = trained(captured, tmp_path, 2)
  assert codes == [0, 0], outputs
  assert saes(tmp_path) == saes(trained_by_two)
  assert curves(tmp_path) == curves(trained_by_two)


def test_a_run_goes_on_with_other_numbers_of_processes_and_on_other_meshes(captured, trained_by_two, tmp_path):
  for n_processes, shape, program in [(2, (2, 1), stopped(9)), (1, (1, 1), stopped(7)), (2, (1, 4), SAE)]:
    codes, outputs = trained(captured, tmp_path, n_processes, program, *shape)
    assert codes == [0] * n_processes, outputs
    assert all('stopped: ' in output for output in outputs) == (program != SAE)
  assert_close(tmp_path, trained_by_two)


def test_from_the_live_model_two_processes_train_what_they_do_from_its_store(captured, trained_by_two, tmp_path):
  for shape, program in [((2, 1), stopped(9)), ((1, 2), SAE)]:
    codes, outputs = trained(captured, tmp_path, 2, program, *shape, victims=(1,), flags=('--config.sae.source=live',))
    assert codes == [0, 0], outputs
    assert all('stopped: ' in output for output in outputs) == (program != SAE)
  assert_close(tmp_path, trained_by_two)
