"""The device mesh and where every dimension of an array lives on it.

There is always a mesh, 1x1 on a laptop, with two axes: the batch is cut over `data`; heads, MLP neurons and SAE latents
are cut over `model`; all other dimensions stay whole, and so do heads that `model` does not divide (25 in GPT-2 XL, 9
in SmolLM2): their kernels are then cut along the heads' channels. Rows of activations that wait for an SAE's training
step are cut over both: each is on one device, until the devices of its batch gather them. The mesh is ambient: commands
call `jax.set_mesh(make_mesh(...))` once.
"""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXES = {'batch': 'data', 'row': ('data', 'model'), 'head': 'model', 'neuron': 'model', 'latent': 'model'}


def make_mesh(data: int = 1, model: int = 1) -> jax.sharding.Mesh:
  """Returns a mesh of data x model devices.

  The axis types are Auto: under JAX's default, Explicit, gather, top_k, sort and scatter raise on sharded inputs.

  Raises:
    ValueError: there are fewer devices than data * model.
  """
  if data < 1 or model < 1 or data * model > jax.device_count():
    raise ValueError(
      f'a mesh of {data}x{model} needs {data * model} devices and there are {jax.device_count()}; choose a smaller '
      'mesh (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N pretends to have N devices)'
    )
  devices = jax.devices()[: data * model]
  return jax.make_mesh((data, model), ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2, devices=devices)


def own_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of those devices of the ambient one that this process holds: with one process, the same devices.

  What runs on it waits for no other process, so that processes need not run such programs in the same order.

  Raises:
    ValueError: this process holds none, or more of one row of the data axis than of another.
  """
  devices = jax.sharding.get_mesh().devices
  rows = [[device for device in row if device.process_index == jax.process_index()] for row in devices]
  rows = [row for row in rows if row]
  if len({len(row) for row in rows}) != 1:
    raise ValueError(
      f'of a mesh of {"x".join(map(str, devices.shape))} process {jax.process_index()} holds no rectangle; choose '
      'mesh.data x mesh.model as all devices, and mesh.model a divisor or a multiple of those of a process'
    )
  return jax.sharding.Mesh(np.array(rows), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def spec(dims: str) -> PartitionSpec:
  """Returns the PartitionSpec of an array with these dimensions, for example 'batch token latent'."""
  return PartitionSpec(*(AXES.get(dim) for dim in dims.split()))


def n_parts(axes: str | tuple[str, ...]) -> int:
  """Returns into how many parts an axis of the ambient mesh cuts, or several together."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def divides(axes: str | tuple[str, ...], size: int) -> bool:
  """Returns whether the ambient mesh's axis, or axes together, cut the size into equal parts."""
  return size % n_parts(axes) == 0


def is_cut(axis: str) -> bool:
  """Returns whether the ambient mesh has several devices along an axis."""
  return n_parts(axis) > 1


def fitting(dims: str, shape: tuple[int, ...]) -> PartitionSpec:
  """Returns the PartitionSpec of an array of these dimensions and sizes; what its axis does not divide stays whole."""
  axes = zip(spec(dims), shape, strict=True)
  return PartitionSpec(*(axis if axis and divides(axis, size) else None for axis, size in axes))


def constrain(x: jax.Array, dims: str) -> jax.Array:
  """Fixes the sharding of x by its dimensions, as `fitting`; only inside `jax.jit`, on the ambient mesh."""
  return jax.lax.with_sharding_constraint(x, fitting(dims, x.shape))


def head_axes(n_head: int, d_head: int) -> tuple[str | None, str | None]:
  """Returns the mesh axes of a kernel's [head, channel]: heads over `model`, else channels, else whole."""
  if divides('model', n_head):
    return 'model', None
  return None, 'model' if divides('model', d_head) else None


def place(x, dims: str) -> jax.Array:
  """Puts a host array onto the ambient mesh by its dimensions, as `fitting`."""
  return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), fitting(dims, x.shape)))


def check_divides(name: str, size: int, axes: str | tuple[str, ...]):
  """Raises unless the mesh axis, or axes together, divide the size.

  Raises:
    ValueError: they do not.
  """
  if not divides(axes, size):
    cut = [axes] if isinstance(axes, str) else list(filter(is_cut, axes))
    what = f'the {cut[0]} axis {n_parts(axes)}' if len(cut) == 1 else f'{n_parts(axes)}, the axes {" and ".join(cut)}'
    raise ValueError(f'{name} {size} is not divisible by {what}; choose a multiple or shrink the axis')
