"""The plan of a small training against NumPy, against the training itself, and as a command."""

import functools
import math
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt4_16m, recipes
from jax_interp.sae import cost, train_step
from models import sharding
from train import plan
from train import recipes as plans

pytestmark = pytest.mark.usefixtures('usual_programs')
ROOT = pathlib.Path(__file__).parents[2]
D, N, K, B, STEPS = 48, 640, 5, 96, 3
F32, BF16 = 4, 2


def _config(recipe='topk', **fields):
  config = recipes.get_config(recipe)
  config.sae.update({'n_latents': N, 'batch_size': B, 'steps_per_dispatch': STEPS, 'tokens': 40 * B, 'warmup_steps': 5})
  if 'k' in config.sae:
    config.sae.update({'k': K, 'auxk': 16})
  with config.unlocked():
    config.sae.update(fields)
  return config


@pytest.fixture(params=[(1, 1), (2, 2), (1, 8)], ids=['1x1', '2x2', '1x8'])
def mesh(request):
  mesh = sharding.make_mesh(*request.param)
  with jax.set_mesh(mesh):
    yield mesh


@functools.cache
def _planned(data, model):
  """Returns the plan of TopK with the sizes above, and the bytes that the compiled program takes."""
  arguments = []

  def memory(state, batch, compiled, of=cost.memory):
    arguments.append(compiled.memory_analysis().argument_size_in_bytes)
    return of(state, batch, compiled)

  with mock.patch.object(cost, 'memory', memory):
    return _on(data, model, _config(clip=1.0)), arguments[0]


def _on(data, model, config, widths=(D,)):
  with jax.set_mesh(sharding.make_mesh(data, model)):
    return plan.plan(config, widths)


def test_bytes_and_flops_are_those_of_the_program(mesh):
  data, model = mesh.shape['data'], mesh.shape['model']
  found, argument_bytes = _planned(data, model)
  weights = F32 * (2 * N * D // model + N // model + D)
  memory = found.memory
  assert memory.weights == memory.average == memory.gradients == weights
  assert memory.moments == 2 * weights + 2 * F32  # and two counts of steps
  assert memory.counters == F32 * (N // model + 3)
  assert memory.batch == memory.next_batch == STEPS * B // (data * model) * D * BF16
  assert memory.state + memory.batch == argument_bytes
  assert memory.temporaries >= memory.gradients
  parts = memory.state, memory.batch, memory.next_batch, memory.results, memory.temporaries
  assert memory.total == sum(parts)

  needed = B * (2 * N * D + K * (6 * D + 2 * D)) / (data * model)
  assert found.needed_flops == pytest.approx(needed)
  # Of matrix products, when no latent is dead: the encoder; <error, row> of k rows a token, on every shard, and the sum
  # of these rows where the error needs no other; and the gradient of pre_bias.
  n_reads = 1 if model == 1 else 2
  least = 2 * (B / data) * (N / model) * D + (3 - n_reads) * 2 * (B / data) * K * D + 2 * N / model * D
  assert found.program.least.flops == pytest.approx(STEPS * least, rel=0.001)
  assert found.program.most.flops > found.program.least.flops
  # Rows read for the decoder and for <error, row>, once where the error needs no other shard, and added to two
  # gradients; and beside them candidates.
  rows = STEPS * B // data * K * D * F32
  assert n_reads * rows <= found.program.least.gathered_bytes <= (n_reads + 1) * rows
  assert 2 * rows <= found.program.least.scattered_bytes <= 3 * rows
  assert not found.program.unknown_loops


@pytest.mark.parametrize('n_micro', [1, 3])
def test_collectives_are_those_of_the_design(mesh, n_micro):
  data, model = mesh.shape['data'], mesh.shape['model']
  found = _on(data, model, _config(micro_batches=n_micro))
  always = [c for c in found.program.collectives if not c.branch]
  assert {c.axis for c in found.program.collectives} == {axis for axis in ('data', 'model') if mesh.shape[axis] > 1}
  of = lambda axis: sum(c.times * c.n_bytes for c in always if c.axis == axis and c.op == 'all-reduce')
  if data > 1:  # gradients, for each step, whatever the batch and however many parts it has
    gradients = F32 * 2 * N // model * D
    assert STEPS * gradients <= of('data') <= 1.1 * STEPS * gradients
  if model > 1:  # the reconstruction, whatever the latents; but for candidates, it is all
    recons = F32 * B // data * D
    assert STEPS * recons <= of('model') <= 1.5 * STEPS * recons
    # Activations, each on one device before, are gathered once; so are at most K candidates of every shard.
    gathered = sum(c.times * c.n_bytes for c in always if c.axis == 'model' and c.op == 'all-gather')
    candidates = F32 * B // data * K * model
    assert STEPS * recons <= gathered <= STEPS * (recons + candidates)


def test_the_state_is_the_one_that_training_has(mesh):
  config = _config()
  planned = plans.plan(config.sae, 40)
  rng = np.random.default_rng(0)
  sample_bd = jnp.asarray(rng.normal(size=(256, D)), jnp.float32)
  fresh = planned.init(jax.random.key(0), sample_bd)
  real = train_step.init_state(fresh, sample_bd, planned.tx, planned.ema)
  abstract = plan.abstract_state(planned, (D,))
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert a.addressable_shards[0].data.nbytes == cost.device_bytes(b)


@pytest.mark.parametrize(
  ('recipe', 'fields', 'n_products'),
  [('matryoshka', {'prefixes': (64, N), 'auxk': 0}, None), ('relu_april', {}, 5), ('gated', {}, 7)],
)
def test_dense_recipes_multiply_by_all_latents(recipe, fields, n_products):
  found = _on(2, 2, _config(recipe, **fields))
  one = STEPS * 2 * (B / 2) * (N / 2) * D
  if n_products:
    assert found.program.most.flops == pytest.approx(n_products * one, rel=0.02)
  else:
    assert found.program.most.flops > 5 * one
  assert plan.table(found)


def test_a_transcoder_has_two_widths():
  d_out = 24
  config = _config(target_site='h.3.resid.post_mlp', normalization='none', skip=True)
  found = _on(1, 2, config, (D, d_out))
  assert found.memory.weights == F32 * (N // 2 * (D + d_out) + N // 2 + D + d_out + d_out * D)
  assert found.memory.batch == STEPS * B // 2 * (D + d_out) * BF16
  with pytest.raises(ValueError, match='1 widths'):
    _on(1, 2, config)


def test_latents_that_the_mesh_does_not_divide_are_refused():
  with pytest.raises(ValueError, match='n_latents 640 is not divisible by the model axis 3'):
    _on(1, 3, _config())
  with pytest.raises(ValueError, match=r'sae.batch_size 96 is not divisible by the data axis 5'):
    _on(5, 1, _config())
  with pytest.raises(ValueError, match=r'sae.batch_size / sae.micro_batches = 6 is not divisible by 4, the axes data'):
    _on(2, 2, _config(micro_batches=16))


def _memories(monkeypatch, **bytes_of):
  for name, (kind, _, *rest) in list(plan.ACCELERATORS.items()):
    monkeypatch.setitem(plan.ACCELERATORS, name, (kind, bytes_of.get(name, 1), *rest))


def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
  config = _config(kernels='dense', auxk=0)
  plan_on = functools.cache(lambda data, model: _on(data, model, config))
  with_axis = lambda shape: plan_on(**shape)
  found, cut = plan_on(1, 4), plan_on(1, 8)

  _memories(monkeypatch, v5p=found.memory.total, H100=found.memory.total - 1)
  plan.refuse(found, None, with_axis)
  plan.refuse(found, 'v5p', with_axis)
  with pytest.raises(ValueError, match=r'do not fit H100 .*; they fit v5p'):
    plan.refuse(found, 'H100', with_axis)

  _memories(monkeypatch, v5p=cut.memory.total * 1.1, v5e=10)
  with pytest.raises(ValueError, match=r'do not fit any of .*; by arithmetic, a model axis of 8 would fit v5p') as e:
    plan.refuse(found, None, with_axis)
  assert 'v5e' not in str(e.value).split(';')[1]

  _memories(monkeypatch)
  with pytest.raises(ValueError, match='no mesh would do'):
    plan.refuse(found, None, with_axis)


def test_the_table_says_everything():
  found, _ = _planned(2, 2)
  text = plan.table(found)
  assert text.startswith('topk (sparse, float32): ')  # of 'auto', what is planned
  for said in (
    'width 48, n_latents 640, k 5',
    'mesh data 2 x model 2',
    'Adam moments',
    'all-reduce',
    'data',
    'tokens/s',
  ):
    assert said in text
  assert all(line == line.rstrip() and len(line) <= 120 for line in text.splitlines())
  for name, (least, most) in plan.estimates(found).items():
    assert name in text
    assert 0 < least.overlapped <= least.one_by_one <= most.one_by_one


def test_the_largest_published_sae_has_the_sizes_of_the_paper():
  config = gpt4_16m.get_config()
  assert config.sae.n_latents == 2**24
  assert config.mesh.model * config.mesh.data == 512
  assert plans.plan(config.sae, 10).settings['learning_rate'] == 0
  assert math.log2(config.sae.auxk).is_integer()


def _command(*flags):
  env = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  return subprocess.run(
    [sys.executable, '-m', 'train.plan', *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
  )


def test_as_a_command_the_width_is_that_of_the_subject_model():
  done = _command('--config=configs/tiny.py', '--mesh=1x16')
  assert done.returncode == 0, done.stderr
  assert 'width 192, n_latents 2,048' in done.stdout
  assert 'mesh data 1 x model 16' in done.stdout
  assert 'all-reduce' in done.stdout


def test_as_a_command_16_million_latents_are_planned_without_being_allocated():
  done = _command('--config=configs/gpt4_16m.py', '--mesh=1x512')
  assert done.returncode == 0, done.stderr  # it fits
  assert 'n_latents 16,777,216' in done.stdout
  weights = F32 * (2 * 2**24 * 12_288 / 512 + 2**24 / 512 + 12_288)
  (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith('weights')]
  assert line.split()[1] == f'{weights / 1e9:.3f}'


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--mesh=4'], 'must be DATAxMODEL'),
    (['--mesh=1x3'], 'n_latents 2048 is not divisible by the model axis 3'),
    (['--mesh=64x64'], 'more than the 2048 that can be pretended'),
    (['--accelerator=v4'], 'must be one of v5e, v5p, v6e, H100'),
  ],
)
def test_bad_flags_are_one_sentence(flags, says):
  done = _command('--config=configs/tiny.py', *flags)
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert says in done.stderr
  assert len(done.stderr.splitlines()) == 1
