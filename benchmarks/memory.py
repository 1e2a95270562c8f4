"""Peak memory of loading GPT-2 XL shapes (1.56 billion parameters) and capturing with them, beside the weights' size.

  python benchmarks/memory.py [--size=gpt2-xl] [--stored=float32] [--dtype=float32] [--site=h.24.resid.post_mlp]

Random weights are written to a temporary folder first (6.2 GB for XL in float32), by another process, so that its
memory is not counted. Captured is, by default, the residual stream after the layer in the middle. The peak is the
kernel's VmHWM, pages of the mapped file included.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from models import gpt2

_SEED = 0


def _status(field):
  """Returns a field of /proc/self/status in GB."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def _shapes(config):
  """Returns the shapes of the tensors by the names that the released checkpoints have."""
  d, n = config.d_model, config.n_neurons
  norm = lambda name: {f'{name}.weight': (d,), f'{name}.bias': (d,)}
  linear = lambda name, n_in, n_out: {f'{name}.weight': (n_in, n_out), f'{name}.bias': (n_out,)}
  shapes = {'wte.weight': (config.n_vocab, d), 'wpe.weight': (config.n_ctx, d), **norm('ln_f')}
  for i in range(config.n_layer):
    shapes |= norm(f'h.{i}.ln_1') | norm(f'h.{i}.ln_2')
    shapes |= linear(f'h.{i}.attn.c_attn', d, 3 * d) | linear(f'h.{i}.attn.c_proj', d, d)
    shapes |= linear(f'h.{i}.mlp.c_fc', d, n) | linear(f'h.{i}.mlp.c_proj', n, d)
  return shapes


def _write(folder, size, stored):
  """Writes random weights in the layout of the released checkpoints: one file, which this process holds once."""
  import json

  import ml_dtypes
  import numpy as np
  from safetensors import numpy as safetensors

  config, rng = gpt2.SIZES[size], np.random.default_rng(_SEED)
  dtype = np.dtype(getattr(ml_dtypes, stored, stored))
  random = lambda shape: (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)
  tensors = {name: random(shape) for name, shape in _shapes(config).items()}
  safetensors.save_file(tensors, f'{folder}/model.safetensors')
  fields = {
    'model_type': 'gpt2',
    'n_layer': config.n_layer,
    'n_head': config.n_head,
    'n_embd': config.d_model,
    'n_positions': config.n_ctx,
    'vocab_size': config.n_vocab,
  }
  pathlib.Path(folder, 'config.json').write_text(json.dumps(fields))


def _load_and_capture(folder, size, dtype, site):
  import jax
  import numpy as np

  from jax_interp import activations
  from models import pretrained, sharding

  jax.set_mesh(sharding.make_mesh())
  before = _status('VmRSS')
  began = time.perf_counter()
  model = pretrained.load_model(folder, dtype)
  jax.block_until_ready(jax.tree.leaves(model))
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e9
  print(f'{size}: {weights:.2f} GB of weights in {dtype}, loaded in {time.perf_counter() - began:.0f} s')
  print(f'  before {before:.2f} GB, now {_status("VmRSS"):.2f} GB, peak {_status("VmHWM"):.2f} GB')
  windows_et = np.random.default_rng(1).integers(50257, size=(8, 64)).astype(np.int32)
  began = time.perf_counter()
  for _, acts in activations.stream(model, windows_et, (site,), 4, dtype='bfloat16'):
    x = acts[site]
  peak = _status('VmHWM')
  print(f'  captured {site} {x.shape} in {time.perf_counter() - began:.0f} s, compiled within')
  print(f'  peak {peak:.2f} GB, {(peak - before) / weights:.2f} times the weights')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='gpt2-xl', choices=gpt2.SIZES)
  parser.add_argument('--stored', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--site', help='by default h.{i}.resid.post_mlp of the layer in the middle')
  parser.add_argument('--write', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.write:
    _write(args.write, args.size, args.stored)
    return
  site = args.site or f'h.{gpt2.SIZES[args.size].n_layer // 2}.resid.post_mlp'
  with tempfile.TemporaryDirectory(dir=os.environ.get('TMPDIR')) as folder:
    subprocess.run(
      [sys.executable, __file__, f'--write={folder}', f'--size={args.size}', f'--stored={args.stored}'], check=True
    )
    _load_and_capture(folder, args.size, args.dtype, site)


if __name__ == '__main__':
  main()
