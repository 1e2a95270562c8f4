"""Memory of a training step as a TPU's own compiler lays it out, without a TPU: beside what train.plan has of XLA:CPU.

    pip install libtpu
    python benchmarks/tpu_memory.py --config=configs/gpt4_16m.py --topology=v5p:8x8x8

Takes two minutes where train.plan takes seconds. The config says how wide activations are (config.plan.widths) and what
the mesh is; topologies are named as in `jax.experimental.topologies`.
"""

import math
import os

import jax
from absl import app, flags
from jax.experimental import topologies

from train import plan

_TOPOLOGY = flags.DEFINE_string('topology', None, 'Of as many devices as the mesh, such as v5p:8x8x8 or v5e:16x16.')
flags.mark_flag_as_required('topology')  # and --config, of train.command


def main(_):
  config = flags.FLAGS.config
  shape = config.mesh.data, config.mesh.model
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is none to ask what TPU this is
  devices = topologies.get_topology_desc(platform='tpu', topology_name=_TOPOLOGY.value).devices
  if len(devices) != math.prod(shape):
    raise app.UsageError(
      f'{_TOPOLOGY.value} has {len(devices)} devices and the mesh {shape[0]}x{shape[1]} has {math.prod(shape)}; choose '
      'a topology of as many, or set --config.mesh.data and --config.mesh.model'
    )
  mesh = jax.make_mesh(shape, ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2, devices=devices)
  with jax.set_mesh(mesh):
    lowered, *_ = plan.lower(config, tuple(config.plan.widths))
    memory = lowered.compile().memory_analysis()
  for name, n_bytes in (('arguments', memory.argument_size_in_bytes), ('temporaries', memory.temp_size_in_bytes)):
    print(f'{name:12} {n_bytes / 1e9:7.3f} GB of 10^9 on each device')


if __name__ == '__main__':
  app.run(main)
