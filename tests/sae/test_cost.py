"""Programs whose work is known, read from their compiled text; seconds and sizes against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_interp.sae import cost, hlo
from models import sharding

pytestmark = pytest.mark.usefixtures('usual_programs')
F32 = 4


def _read(f, *args):
  mesh_shape = dict(jax.sharding.get_abstract_mesh().shape)
  return hlo.read(jax.jit(f).lower(*args).compile().as_text(), mesh_shape)


@pytest.fixture
def mesh_2x4():
  mesh = sharding.make_mesh(2, 4)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def one_device():
  with jax.set_mesh(sharding.make_mesh()):
    yield


def _array(shape, spec=None, dtype=jnp.float32):
  sharding_ = NamedSharding(jax.sharding.get_mesh(), spec or P())
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_)


def test_collectives_are_found_with_axis_bytes_and_how_often(mesh_2x4):
  def local(x_ab):  # [2, 12] of [4, 48]
    def step(total, _):
      return jax.lax.psum(jnp.sin(total), 'model') / 3, None

    total, _ = jax.lax.scan(step, x_ab, length=5)
    total = jax.lax.pcast(total, 'model', to='varying')
    gathered = jax.lax.all_gather(total * 2, 'data', axis=0, tiled=True)  # [4, 12]
    scattered = jax.lax.psum_scatter(total, 'model', scatter_dimension=1, tiled=True)  # [2, 3]
    moved = jax.lax.ppermute(scattered, 'data', [(0, 1), (1, 0)])
    everywhere = jax.lax.psum(jnp.sum(gathered) + jnp.sum(moved), ('data', 'model'))
    return total + everywhere

  f = jax.shard_map(local, in_specs=P('data', 'model'), out_specs=P('data', 'model'), check_vma=False)
  program = _read(f, _array((4, 48), P('data', 'model')))
  found = {(c.op, c.axis, c.n_devices, c.n_bytes, c.times): c.wire_bytes for c in program.collectives}
  assert found == {
    ('all-reduce', 'model', 4, 2 * 12 * F32, 5): 5 * 2 * 3 / 4 * 2 * 12 * F32,
    ('all-gather', 'data', 2, 4 * 12 * F32, 1): 1 / 2 * 4 * 12 * F32,
    ('reduce-scatter', 'model', 4, 2 * 12 * F32, 1): 3 / 4 * 2 * 12 * F32,
    ('collective-permute', 'data', 2, 2 * 3 * F32, 1): 2 * 3 * F32,
    ('all-reduce', 'data+model', 8, F32, 1): 2 * 7 / 8 * F32,
  }
  assert not any(collective.branch for collective in program.collectives)


def test_a_collective_over_one_device_is_none():
  with jax.set_mesh(sharding.make_mesh(1, 4)):
    f = jax.shard_map(
      lambda x: jax.lax.psum(x, ('data', 'model')) + jax.lax.psum(x, 'data'), in_specs=P(), out_specs=P()
    )
    program = _read(f, _array((3,)))
  assert {c.axis for c in program.collectives} == {'model'}


def test_the_dearest_branch_counts(mesh_2x4):
  def local(x_ab, which):
    branches = [
      lambda x: x,
      lambda x: jax.lax.psum(x, 'model') + 0 * x,
      lambda x: jax.lax.psum(x, 'model') + jax.lax.psum(x[:1], 'data') + 0 * x,
    ]
    return jax.lax.switch(which, branches, jax.lax.psum(jnp.sum(x_ab), 'data') + x_ab)

  f = jax.shard_map(local, in_specs=(P('data', 'model'), P()), out_specs=P('data', 'model'), check_vma=False)
  program = _read(f, _array((4, 48), P('data', 'model')), _array((), dtype=jnp.int32))
  dearest = hlo.in_dearest_branches(program.collectives, lambda c: c.wire_bytes)
  assert sorted((c.axis, c.n_bytes, bool(c.branch)) for c in dearest) == [
    ('data', F32, False),
    ('data', 12 * F32, True),
    ('model', 2 * 12 * F32, True),
  ]


@pytest.mark.parametrize(
  ('written', 'groups'),
  [
    ('replica_groups={{0,1},{2,3}}, x=1', [[0, 1], [2, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('replica_groups=[2,2]<=[4], x=1', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x=1', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1", [[0, 1], [2, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
  ],
)
def test_groups_of_devices_are_read_however_they_are_written(written, groups):
  assert hlo._groups(f', channel_id=1, {written}', 4) == groups


def test_unreadable_groups_and_text_raise():
  with pytest.raises(ValueError, match='not understood'):
    hlo._groups("replica_groups=mesh['a'=4] {'a':(1)2}", 4)
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.read('def f(): pass', {'data': 1, 'model': 1})


def test_a_loop_counts_as_often_as_it_runs(one_device):
  def f(x_rij, w_jk, y_bd, w_ld):
    products = jax.lax.map(lambda x_ij: x_ij @ w_jk, x_rij)  # 7 rounds
    return products, jnp.einsum('bd,ld->bl', y_bd, w_ld, preferred_element_type=jnp.float32)

  half = [_array((n, 80), dtype=jnp.bfloat16) for n in (16, 32)]
  program = _read(f, _array((7, 64, 96)), _array((96, 128)), *half)
  assert program.least == program.most
  assert program.least.bf16_flops == 2 * 16 * 80 * 32
  assert program.least.flops == 7 * 2 * 64 * 96 * 128 + 2 * 16 * 80 * 32
  assert program.least.product_bytes == F32 * (7 * 64 * 128 + 16 * 32)
  assert not program.unknown_loops


def test_a_loop_of_unknown_length_is_said(one_device):
  program = _read(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), _array((64, 64)), _array((), dtype=int))
  assert program.unknown_loops == 1
  assert program.least.flops == 2 * 64**3


def test_rows_and_branches(one_device):
  def f(w_ld, x_bd, indices_b, which):
    rows_bd = w_ld.at[indices_b].get(mode='promise_in_bounds') * x_bd
    dense = lambda: w_ld @ rows_bd.T @ rows_bd
    sparse = lambda: w_ld.at[indices_b].add(jnp.sin(rows_bd), mode='promise_in_bounds')
    return jax.lax.cond(which, dense, sparse), rows_bd

  program = _read(f, _array((40, 24)), _array((16, 24)), _array((16,), dtype=jnp.int32), _array((), dtype=bool))
  assert (program.least.flops, program.most.flops) == (0, 2 * (2 * 40 * 24 * 16))
  assert program.least.gathered_bytes == program.most.gathered_bytes == 16 * 24 * F32
  assert (program.least.scattered_bytes, program.most.scattered_bytes) == (0, 16 * 24 * F32)


def test_arrays_are_listed_from_the_largest(one_device):
  program = _read(lambda x: jnp.sort(x @ x.T, axis=0), _array((96, 32)))
  assert program.arrays[0].shape == 'f32[96,96]'
  assert program.arrays[0].n_bytes == 96 * 96 * F32
  assert [a.n_bytes for a in program.arrays] == sorted((a.n_bytes for a in program.arrays), reverse=True)


@pytest.mark.parametrize(
  ('shape', 'n_bytes'),
  [
    ('f32[]', 4),
    ('pred[3,5]{1,0}', 15),
    ('(bf16[2,3]{1,0:T(8,128)}, /*index=1*/s64[2])', 28),
    ('s4[6]', 3),
    ('token[]', 0),
  ],
)
def test_bytes_of_shapes(shape, n_bytes):
  assert hlo.n_bytes(shape) == n_bytes


def test_bytes_on_a_device_follow_the_sharding(mesh_2x4):
  tree = {'both': _array((4, 8), P('data', 'model')), 'model': _array((8, 3), P('model')), 'none': _array((5,), P())}
  assert cost.device_bytes(tree) == F32 * (4 * 8 // 8 + 8 * 3 // 4 + 5)
  assert cost.device_bytes(None) == 0


ACCELERATOR = cost.Accelerator(100.0, 2000.0, 1000.0, 10.0, ((4, 40.0), (math.inf, 5.0)))


def _collective(**of):
  return hlo.Collective(
    **{'op': 'all-reduce', 'axis': 'model', 'shape': '', 'n_bytes': 80, 'n_devices': 4, 'times': 1} | of
  )


@pytest.mark.parametrize(
  ('collective', 'mesh_shape', 'seconds'),
  [
    # Within the fast network of 4: 2 * 3 / 4 * 80 bytes at 40 a second.
    (_collective(), {'data': 2, 'model': 4}, 120 / 40),
    (_collective(op='all-gather', times=3), {'data': 2, 'model': 4}, 3 * 60 / 40),
    # Eight: within each 4, then each with a quarter of the bytes to its counterpart on the slow one.
    (_collective(n_devices=8), {'data': 1, 'model': 8}, 120 / 40 + 2 * 1 / 2 * 20 / 5),
    # Those along data are 4 apart: no two share a fast network.
    (_collective(axis='data', n_devices=2), {'data': 2, 'model': 4}, 2 * 1 / 2 * 80 / 5),
    # Two apart: pairs share one.
    (_collective(axis='data', n_devices=4), {'data': 4, 'model': 2}, 2 * 1 / 2 * 80 / 40 + 2 * 1 / 2 * 40 / 5),
    (_collective(axis='data+model', n_devices=8), {'data': 2, 'model': 4}, 120 / 40 + 2 * 1 / 2 * 20 / 5),
  ],
)
def test_collectives_take_their_time_on_every_level_of_the_network(collective, mesh_shape, seconds):
  assert cost.link_seconds(collective, ACCELERATOR, mesh_shape) == pytest.approx(seconds)


def test_seconds_of_a_step():
  memory = cost.Memory(10, 20, 10, 1, 2, 2, 3, 50, 10)
  work = hlo.Work(flops=3000, bf16_flops=1000, product_bytes=6, gathered_bytes=14, scattered_bytes=7)
  seconds = cost.estimate(work, [_collective()], ACCELERATOR, memory, {'data': 1, 'model': 4}, n_steps=2)
  assert seconds.products == pytest.approx((2000 / 1000 + 1000 / 2000) / 2 / 0.6)
  assert seconds.rows == pytest.approx((14 + 2 * 7) / 2 / (0.35 * 10))
  assert seconds.streams == pytest.approx((2 * 40 + 10 + 2 * 6 / 2) / 10)
  assert seconds.collectives == pytest.approx(3 / 2)
  assert seconds.one_by_one == pytest.approx(sum(seconds.__dict__.values()))
  assert seconds.overlapped == pytest.approx(9.6)
  assert memory.total == 10 + 20 + 10 + 1 + 2 + 2 + 3 + 50


@pytest.mark.parametrize(
  ('room', 'n'),
  [(150, 2), (120, 3), (70, 6), (52, 12), (31, 240), (30.5, None), (30, None), (10, None)],
)
def test_the_axis_that_fits(room, n):
  bytes_with = lambda size: 30 + 240 / size
  found = cost.axis_that_fits(bytes_with(4), (2, bytes_with(2)), 4, room, 240)
  assert found == n
  if n:
    assert bytes_with(n) <= room
    assert all(bytes_with(size) > room for size in range(1, n) if 240 % size == 0)


def test_the_dimension_that_is_not_cut_fits_nowhere():
  assert cost.axis_that_fits(100, (2, 100), 4, 50, 64) is None


def test_of_bytes_that_shrink_by_more_than_what_is_cut_nothing_stays():
  assert cost.axis_that_fits(100, (2, 300), 4, 50, 64) == 8
