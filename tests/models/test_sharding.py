"""Meshes: what one process holds of them. Several processes are in tests/train/test_distributed.py."""

import types

import jax
import numpy as np
import pytest

from models import sharding


def test_one_process_holds_the_whole_mesh_in_its_order():
  mesh = sharding.make_mesh(2, 4)
  with jax.set_mesh(mesh):
    own = sharding.own_mesh()
  np.testing.assert_array_equal(own.devices, mesh.devices)
  assert own.axis_names == mesh.axis_names


@pytest.mark.parametrize('process', [0, 1, 2])
def test_a_process_that_holds_no_rectangle_of_the_mesh_is_told(monkeypatch, process):
  # Process 0 holds three devices, 1 one and 2 none.
  devices = np.array([[types.SimpleNamespace(process_index=p) for p in row] for row in [(0, 0), (0, 1)]])
  monkeypatch.setattr(jax.sharding, 'get_mesh', lambda: types.SimpleNamespace(devices=devices))
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  if process == 1:  # a rectangle of one
    monkeypatch.setattr(jax.sharding, 'Mesh', lambda held, *_, **__: held)
    np.testing.assert_array_equal(sharding.own_mesh(), devices[1:, 1:])
  else:
    with pytest.raises(ValueError, match=f'of a mesh of 2x2 process {process} holds no rectangle'):
      sharding.own_mesh()
