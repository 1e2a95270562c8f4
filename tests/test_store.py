"""Activation stores and checkpoints: what is read equals what was written, and damage is told."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from jax_interp import store
from models import sharding

N_EXAMPLES, N_TOKENS, SHARD = 22, 5, 8  # three shards, the last one shorter
SITES = {'h.1.resid.post_mlp': (6,), 'h.0.attn.v_out': (2, 3)}
MADE_FROM = {'model': 'm', 'tokenizer': 't', 'dataset': 'd'}


def create(where, **changed):
  fields = {
    'sites': SITES,
    'n_examples': N_EXAMPLES,
    'n_tokens': N_TOKENS,
    'shard_examples': SHARD,
    'dtype': 'bfloat16',
  }
  return store.ActivationStore.create(where, **{**fields, **MADE_FROM, **changed})


def contents(dtype=ml_dtypes.bfloat16):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 50, (N_EXAMPLES, N_TOKENS)).astype(np.int32)
  acts = {site: rng.normal(size=(N_EXAMPLES, N_TOKENS, *shape)).astype(dtype) for site, shape in SITES.items()}
  acts['h.1.resid.post_mlp'][8:16] = 0  # equal to zarr's usual fill value
  return tokens, acts


def fill(activations, shards, dtype=ml_dtypes.bfloat16):
  tokens, acts = contents(dtype)
  for shard in shards:
    part = activations.shard(shard)
    activations.write(shard, tokens[part], {site: x[part] for site, x in acts.items()})


def shard_file(folder, shard, site='h.1.resid.post_mlp'):
  return next((folder / site / 'c' / str(shard)).rglob('0/0'))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('place', ['folder', 'memory'])
def test_random_reads_equal_what_was_written(tmp_path, dtype, place):
  where = tmp_path / 'a b%20' if place == 'folder' else f'memory://{tmp_path.name}/{dtype}'
  numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  fill(create(where, dtype=dtype), range(3), numpy_dtype)
  tokens, acts = contents(numpy_dtype)
  again = store.ActivationStore.open(where, **MADE_FROM)
  examples = np.array([21, 3, 8, 3, 0])
  for site, x in {**acts, store.TOKENS: tokens}.items():
    read = again.reader(site)(examples)
    assert read.dtype == x.dtype
    np.testing.assert_array_equal(read, x[examples])
    out = np.empty_like(x)
    assert again.reader(site)(np.arange(N_EXAMPLES), out) is out
    np.testing.assert_array_equal(out, x)
    by_token = x.reshape(-1, *x.shape[2:])
    for tokens in (np.array([109, 3, 57, 3, 0]), np.random.default_rng(0).permutation(N_EXAMPLES * N_TOKENS)):
      out = np.empty_like(by_token[tokens])
      np.testing.assert_array_equal(again.rows(site)(tokens), by_token[tokens])
      assert again.rows(site)(tokens, out) is out
      np.testing.assert_array_equal(out, by_token[tokens])


@pytest.mark.parametrize('place', ['folder', 'memory'])
@pytest.mark.parametrize('kept', [1, 0.6], ids=['all', 'some'])
@pytest.mark.parametrize('examples', [[4, 5, 6, 7], [7, 5, 6, 4], [4, 4, 5, 6], [21, 3, 8, 3, 0]], ids=str)
def test_rows_go_to_their_place(tmp_path, place, kept, examples):
  activations, rng = create(tmp_path if place == 'folder' else f'memory://{tmp_path.name}/to'), np.random.default_rng(0)
  fill(activations, range(3))
  keep = rng.random((len(examples), N_TOKENS)) < kept
  to = np.full(keep.shape, -1)
  to[keep] = rng.permutation(keep.sum())
  expected = contents()[1]['h.1.resid.post_mlp'][examples][keep][np.argsort(to[keep])]
  np.testing.assert_array_equal(activations.reader('h.1.resid.post_mlp')(np.array(examples), None, to), expected)


def test_examples_and_tokens_that_are_not_there_are_told(tmp_path):
  activations = create(tmp_path)
  fill(activations, range(3))
  with pytest.raises(IndexError, match='examples -1 to 3 are wanted of 22'):
    activations.reader(store.TOKENS)(np.array([3, -1]))
  with pytest.raises(IndexError, match='examples 22 to 22 are wanted of 22'):
    activations.rows(store.TOKENS)(np.array([N_EXAMPLES * N_TOKENS]))


def test_rows_are_many_threads_work_and_one_answer(tmp_path, monkeypatch):
  """More groups than threads."""
  monkeypatch.setattr(store, '_RUN', 3)
  activations = create(tmp_path)
  fill(activations, range(3))
  x = contents()[1]['h.1.resid.post_mlp']
  tokens = np.random.default_rng(0).integers(0, N_EXAMPLES * N_TOKENS, 300)
  np.testing.assert_array_equal(activations.rows('h.1.resid.post_mlp')(tokens), x.reshape(-1, 6)[tokens])


def test_the_width_that_an_sae_reads(tmp_path):
  assert create(tmp_path).width('h.1.resid.post_mlp') == 6
  with pytest.raises(ValueError, match=r'h.0.attn.v_out has the shape \[22, 5, 2, 3\], and an SAE reads'):
    create(tmp_path).width('h.0.attn.v_out')
  with pytest.raises(ValueError, match="not 'nothing'"):
    create(tmp_path).width('nothing')


def test_a_shard_is_one_file_of_small_chunks(tmp_path):
  fill(create(tmp_path), range(3))
  assert sum(path.is_file() for path in (tmp_path / 'h.0.attn.v_out' / 'c').rglob('*')) == 3
  metadata = json.loads((tmp_path / 'h.0.attn.v_out' / 'zarr.json').read_text())
  assert metadata['codecs'][0]['configuration']['chunk_shape'] == [4, N_TOKENS, 2, 3]


def test_what_stands_behind_the_last_example_is_always_the_same(tmp_path):
  """A chunk that is not full would else be filled up with whatever the memory held."""
  activations = create(tmp_path)
  fill(activations, range(3))
  for array in activations._arrays.values():
    behind = array[N_EXAMPLES:].read().result()
    assert len(behind) == 2
    assert not behind.any()


def test_going_on_with_a_store_keeps_finished_shards(tmp_path):
  fill(create(tmp_path), [0, 2])
  before = shard_file(tmp_path, 0).stat().st_mtime_ns
  again = create(tmp_path)
  assert again.missing() == [1]
  fill(again, again.missing())
  assert again.missing() == []
  assert sorted(path.name for path in (tmp_path / 'commits').iterdir()) == ['0', '1', '2']
  assert shard_file(tmp_path, 0).stat().st_mtime_ns == before


def test_what_is_kept_is_neither_padding_nor_special(tmp_path):
  tokens, acts = contents()
  tokens[3, 2:] = -1
  activations = create(tmp_path, special_tokens=np.array([tokens[1, 1], tokens[7, 4]]))
  for shard in range(3):
    part = activations.shard(shard)
    activations.write(shard, tokens[part], {site: x[part] for site, x in acts.items()})
  expected = (tokens != -1) & (tokens != tokens[1, 1]) & (tokens != tokens[7, 4])
  np.testing.assert_array_equal(activations.keep(), expected)
  np.testing.assert_array_equal(activations.keep([9, 3]), expected[[9, 3]])
  with pytest.raises(ValueError, match='of another special_tokens'):
    create(tmp_path, special_tokens=[0])


class Meter:
  def __init__(self):
    self.waits = []

  @contextlib.contextmanager
  def wait(self, cause):
    yield
    self.waits.append(cause)


def test_batches_become_whole_shards_and_a_part_of_one_is_dropped(tmp_path):
  activations, meter = create(tmp_path), Meter()
  tokens, acts = contents()
  with store.Writer(activations, meter) as writer:
    # The second shard, the third, nothing, half of the first.
    for first in (*range(16, 22, 4), *range(8, 16, 4), N_EXAMPLES, 0):
      part = slice(first, min(first + 4, N_EXAMPLES))
      writer.add(first, tokens[part], {site: x[part] for site, x in acts.items()})
  assert activations.missing() == [0]
  for site, x in acts.items():
    np.testing.assert_array_equal(activations.reader(site)(np.arange(8, 22)), x[8:])
  assert meter.waits == ['disk'] * 3  # twice for the shard before, once at the end


def test_an_error_of_the_writer_comes_out_when_it_is_left(tmp_path):
  activations = create(tmp_path)
  tokens, acts = contents()
  acts['h.0.attn.v_out'][9] = np.nan
  with (
    pytest.raises(ValueError, match='activations in shard 1 that are not finite'),
    store.Writer(activations, Meter()) as writer,
  ):
    writer.add(8, tokens[8:16], {site: x[8:16] for site, x in acts.items()})
  assert activations.missing() == [0, 1, 2]


def test_two_writers_lose_no_commit(tmp_path):
  first, second = create(tmp_path), create(tmp_path)
  fill(first, [0])
  fill(second, [1])
  fill(first, [2])
  assert create(tmp_path).missing() == []


def remove(file):
  file.unlink()


def truncate(file):
  file.write_bytes(file.read_bytes()[:-7])


def empty(file):
  file.write_bytes(b'')


@pytest.mark.parametrize('damage', [remove, truncate, empty])
def test_a_missing_or_truncated_shard_is_named_and_captured_anew(tmp_path, damage):
  fill(create(tmp_path), range(3))
  damage(shard_file(tmp_path, 1))
  damaged = store.ActivationStore.open(tmp_path)
  read = damaged.reader('h.1.resid.post_mlp')
  with pytest.raises(ValueError, match=r'shard 1 of h.1.resid.post_mlp in .* train.capture again'):
    read(np.array([3, 12]))
  np.testing.assert_array_equal(read(np.array([3, 20])), contents()[1]['h.1.resid.post_mlp'][[3, 20]])
  assert damaged.missing() == [1]
  fill(damaged, [1])
  assert read(np.arange(N_EXAMPLES)).shape == (N_EXAMPLES, N_TOKENS, 6)
  assert damaged.missing() == []


def test_an_altered_byte_is_found_when_it_is_read(tmp_path):
  fill(create(tmp_path), range(3))
  file = shard_file(tmp_path, 2)
  content = bytearray(file.read_bytes())
  content[20] ^= 1
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r'shard 2 .* delete h.1.resid.post_mlp/c/2/0/0 there'):
    store.ActivationStore.open(tmp_path).reader('h.1.resid.post_mlp')(np.array([1, 17]))


@pytest.mark.parametrize(
  'changed',
  [
    {'model': 'other'},
    {'tokenizer': 'other'},
    {'dataset': 'other'},
    {'dtype': 'float32'},
    {'sites': {'h.0.mlp.post_act': (6,)}},
    {'n_examples': 23},
  ],
)
def test_a_store_of_something_else_is_refused(tmp_path, changed):
  fill(create(tmp_path), [0])
  with pytest.raises(ValueError, match=f'of another {next(iter(changed))}'):
    create(tmp_path, **changed)


def test_unknown_names_and_dtypes_and_stores_are_told(tmp_path):
  with pytest.raises(FileNotFoundError, match='no activations at'):
    store.ActivationStore.open(tmp_path / 'nothing')
  with pytest.raises(ValueError, match='float16'):
    create(tmp_path, dtype='float16')
  with pytest.raises(ValueError, match="not 'nothing'"):
    create(tmp_path).reader('nothing')


@pytest.mark.parametrize(
  ('where', 'expected'),
  [
    ('runs/a', {'driver': 'file', 'path': f'{os.getcwd()}/runs/a/'}),
    ('gs://bucket/runs/a', {'driver': 'gcs', 'bucket': 'bucket', 'path': 'runs/a/'}),
    ('s3://bucket/runs/a/', {'driver': 's3', 'bucket': 'bucket', 'path': 'runs/a/'}),
  ],
)
def test_folders_and_buckets_are_opened_by_the_same_code(where, expected):
  assert store._open_kvstore(where).spec().to_json() == expected


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_activations_that_are_not_finite_are_not_stored(tmp_path, value):
  activations = create(tmp_path)
  fill(activations, [0])
  tokens, acts = contents()
  acts['h.0.attn.v_out'][9, 1] = value
  part = activations.shard(1)
  with pytest.raises(ValueError, match=r'h.0.attn.v_out has 6 activations in shard 1'):
    activations.write(1, tokens[part], {site: x[part] for site, x in acts.items()})
  assert create(tmp_path).missing() == [1, 2]


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (lambda tokens, acts: acts.pop('h.0.attn.v_out'), 'shard 1 holds .* give all of them'),
    (
      lambda tokens, acts: acts.update({'h.0.attn.v_out': acts['h.0.attn.v_out'][:, :, :1]}),
      r'h.0.attn.v_out has the shape \(8, 5, 1, 3\) in bfloat16, and the one of .* \(8, 5, 2, 3\) in bfloat16',
    ),
    (
      lambda tokens, acts: acts.update({'h.0.attn.v_out': acts['h.0.attn.v_out'][:7]}),
      r'h.0.attn.v_out has the shape \(7, 5, 2, 3\)',
    ),
    (
      lambda tokens, acts: acts.update({'h.0.attn.v_out': acts['h.0.attn.v_out'].astype(np.float32)}),
      'in float32, and the one of .* in bfloat16',
    ),
    (
      lambda tokens, acts: tokens.__setitem__((3, 0), -1),
      'example 11 begins with padding; put padding behind the text',
    ),
  ],
)
def test_a_shard_that_is_not_as_the_store_has_it_is_refused(tmp_path, changed, message):
  activations = create(tmp_path)
  fill(activations, [0])
  tokens, acts = contents()
  part = activations.shard(1)
  tokens, acts = tokens[part], {site: x[part] for site, x in acts.items()}
  changed(tokens, acts)
  with pytest.raises(ValueError, match=message):
    activations.write(1, tokens, acts)
  assert create(tmp_path).missing() == [1, 2]


@pytest.mark.parametrize('place', ['folder', 'memory'])
@pytest.mark.parametrize(
  ('out', 'message'),
  [
    (
      np.empty((4, N_TOKENS, 6), np.float32),
      r'\(4, 5, 6\) in float32; give contiguous memory of \(4, 5, 6\) in bfloat16',
    ),
    (np.empty((3, N_TOKENS, 6), ml_dtypes.bfloat16), r'out has the shape \(3, 5, 6\)'),
    (np.empty((4, N_TOKENS, 7), ml_dtypes.bfloat16), r'out has the shape \(4, 5, 7\)'),
    (np.empty((4, 2 * N_TOKENS, 6), ml_dtypes.bfloat16)[:, ::2], 'in bfloat16, not contiguous; give'),
  ],
)
def test_memory_that_does_not_fit_is_refused(tmp_path, place, out, message):
  activations = create(tmp_path if place == 'folder' else f'memory://{tmp_path.name}/out')
  fill(activations, range(3))
  with pytest.raises(ValueError, match=message):
    activations.reader('h.1.resid.post_mlp')(np.arange(4), out)


@pytest.fixture
def full_disk(tmp_path):
  """A file system of 150 kB, where the tests may mount one."""
  folder = tmp_path / 'small'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=150k', 'tmpfs', str(folder)]
  if os.name != 'posix' or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('mounting a small file system needs root')
  yield folder
  subprocess.run(['umount', str(folder)], check=True)


def test_no_disk_space_keeps_finished_shards(full_disk):
  activations = create(full_disk, sites={'h.1.x': (512,)}, dtype='float32')
  x = np.ones((SHARD, N_TOKENS, 512), np.float32)  # 82 kB
  tokens = np.zeros((SHARD, N_TOKENS), np.int32)
  activations.write(0, tokens, {'h.1.x': x})
  with pytest.raises(OSError) as e:
    activations.write(1, tokens, {'h.1.x': x})
  assert e.value.errno == errno.ENOSPC
  assert e.value.filename == str(full_disk)
  again = store.ActivationStore.open(full_disk)
  assert again.missing() == [1, 2]
  np.testing.assert_array_equal(again.reader('h.1.x')(np.arange(SHARD)), x)


def test_no_disk_space_for_a_checkpoint_keeps_the_one_before(full_disk):
  store.save_checkpoint(full_disk, 1, {'w': jnp.arange(10)})
  with pytest.raises(OSError) as e:
    store.save_checkpoint(full_disk, 2, {'w': jax.random.normal(jax.random.key(0), (100_000,))})
  assert e.value.errno == errno.ENOSPC
  assert store.latest_step(full_disk) == 1


class Module(nnx.Module):
  def __init__(self, rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 6)), out_sharding=('model', None))
    self.layers = nnx.List([nnx.Linear(6, 4, rngs=rngs) for _ in range(2)])
    self.k = 3


class State(NamedTuple):
  module: Module
  opt: Any
  step: jax.Array
  key: jax.Array
  ema: Any = None


def init_state(key):
  module = Module(nnx.Rngs(params=key))
  return State(module, optax.adam(1e-3).init(module), jnp.int32(7), jax.random.key(3))


def raw(leaf):
  return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


@pytest.mark.usefixtures('mesh')
def test_a_checkpoint_gives_back_the_sharded_state(tmp_path):
  abstract = jax.eval_shape(init_state, jax.random.key(0))
  shardings = nnx.get_named_sharding(abstract, jax.sharding.get_mesh())
  state = jax.jit(init_state, out_shardings=shardings)(jax.random.key(0))
  for step in (10, 20, 30):
    store.save_checkpoint(tmp_path, step, state)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['20', '30']
  assert store.latest_step(tmp_path) == 30
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
  restored = store.restore_checkpoint(tmp_path, abstract)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert sharding.spec('latent d') in [leaf.sharding.spec for leaf in jax.tree.leaves(restored.module)]
  for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    np.testing.assert_array_equal(raw(ours), raw(theirs))


def test_a_checkpoint_is_restored_on_another_mesh(tmp_path):
  with jax.set_mesh(sharding.make_mesh(1, 4)):
    w = sharding.place(np.arange(48.0).reshape(8, 6), 'latent d')
    store.save_checkpoint(tmp_path, 1, {'w': w})
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    target = jax.ShapeDtypeStruct((8, 6), w.dtype, sharding=sharding.place(w, 'latent d').sharding)
    np.testing.assert_array_equal(store.restore_checkpoint(tmp_path, {'w': target})['w'], w)


@pytest.mark.usefixtures('mesh')
def test_a_state_that_is_donated_while_it_is_written_is_saved_as_it_was(tmp_path):
  step = jax.jit(lambda w_ld: w_ld + 1, donate_argnums=0)
  w_ld = sharding.place(np.zeros((512, 2000), np.float32), 'latent d')
  with store.Checkpoints(tmp_path, keep=5) as checkpoints:
    for i in range(1, 21):
      w_ld = step(w_ld)
      if i % 5 == 0:
        checkpoints.save(i, {'w': w_ld})
    assert checkpoints.steps() == [5, 10, 15, 20]
    for i in (5, 10, 15, 20):
      np.testing.assert_array_equal(checkpoints.restore({'w': w_ld}, i)['w'], i)
    np.testing.assert_array_equal(checkpoints.restore({'w': w_ld})['w'], 20)


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
  may_write, rename = threading.Event(), os.rename
  monkeypatch.setattr(os, 'rename', lambda *args, **kwargs: may_write.wait(600) and rename(*args, **kwargs))
  with store.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'w': jnp.zeros(3)})
    assert not (tmp_path / '1').exists()
    may_write.set()
    assert checkpoints.steps() == [1]
  assert (tmp_path / '1').exists()


def test_the_last_few_checkpoints_and_the_best_stay(tmp_path):
  scores = {10: 0.5, 20: 0.2, 30: 0.4, 40: 0.3, 50: 0.6}
  with store.Checkpoints(tmp_path, keep=2, scored=True) as checkpoints:
    assert checkpoints.best() is None
    for step, score in scores.items():
      checkpoints.save(step, {'w': jnp.full(3, score)}, score)
    assert checkpoints.steps() == [20, 40, 50]
  with store.Checkpoints(tmp_path, keep=2, scored=True) as checkpoints:
    assert checkpoints.best() == 20
    np.testing.assert_array_equal(checkpoints.restore({'w': jnp.zeros(3)}, checkpoints.best())['w'], jnp.full(3, 0.2))
    checkpoints.save(60, {'w': jnp.zeros(3)}, 0.1)
    assert checkpoints.steps() == [50, 60]
    checkpoints.delete(60)
    checkpoints.save(60, {'w': jnp.ones(3)}, 0.7)
    assert checkpoints.best() == 50
    np.testing.assert_array_equal(checkpoints.restore({'w': jnp.zeros(3)})['w'], jnp.ones(3))


def test_what_a_killed_writer_left_half_written_is_no_checkpoint_and_goes(tmp_path):
  """Killed when all is written but not yet under its name."""
  code = f"""
import os, signal
import jax.numpy as jnp
from jax_interp import store
rename = os.rename
def killed(source, target, *args, **kwargs):
  if str(target).endswith('/2'):
    os.kill(os.getpid(), signal.SIGKILL)
  rename(source, target, *args, **kwargs)
os.rename = os.replace = killed
with store.Checkpoints({str(tmp_path)!r}) as checkpoints:
  for step in (1, 2):
    checkpoints.save(step, {{'w': jnp.full(3, step)}})
"""
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
  ended = subprocess.run([sys.executable, '-c', code], env=environment, check=False)
  assert ended.returncode == -signal.SIGKILL
  assert len(list(tmp_path.iterdir())) == 2  # one of them half-written
  with store.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.save(2, {'w': jnp.full(3, 5)})
    assert checkpoints.steps() == [1, 2]
    np.testing.assert_array_equal(checkpoints.restore({'w': jnp.zeros(3, int)})['w'], jnp.full(3, 5))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='no checkpoint'):
    store.restore_checkpoint(tmp_path / 'nothing', {'w': jnp.zeros(3)})
  assert store.latest_step(tmp_path / 'nothing') is None
  store.save_checkpoint(tmp_path, 1, {'w': jnp.zeros(3)})
  for other in ({'w': jnp.zeros(4)}, {'w': jnp.zeros(3), 'b': jnp.zeros(3)}):
    with pytest.raises(ValueError):
      store.restore_checkpoint(tmp_path, other)


def test_a_failed_write_leaves_the_text_file_as_it_was(tmp_path):
  path = tmp_path / 'folder' / 'metrics.json'
  store.write_json(path, {'l0': 32.0, 'density': [1, float('nan')]})
  assert json.loads(path.read_text()) == {'l0': 32.0, 'density': [1, None]}

  def lines():
    yield 'é'
    raise RuntimeError

  with pytest.raises(RuntimeError):
    store.write_lines(path, lines())
  assert json.loads(path.read_text())['l0'] == 32.0
  store.write_lines(path, ['é', 'b'])
  assert path.read_text('utf-8').splitlines() == ['é', 'b']
  assert [p.name for p in pathlib.Path(path.parent).iterdir() if p.suffix != '.partial'] == ['metrics.json']
