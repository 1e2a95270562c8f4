"""Tokens per second of capturing one residual site: ours beside Hugging Face and TransformerLens, in one run.

GPT-2 small with the same random weights for everybody, float32 unless said, the residual stream after 8 of 12 layers.
Every variant is a process of its own, so that each has its own threads and memory; they take rounds in turn, and the
medians over the rounds are compared. `--cost` prints what more of something costs ours instead: sites, tokens, devices.

Every peer runs twice: as shipped, and tuned, with torch.set_float32_matmul_precision('medium'), which lets torch
multiply float32 matrices in lower precision or with other kernels. Ours multiplies as JAX does by default, which on a
CPU is float32 throughout. What ours captured is compared with what each variant of Hugging Face did.

  pip install torch==2.13.0 && pip install --no-deps 'transformer-lens>=2.16.1,<4' && pip install accelerate beartype \
    better-abc einops fancy-einsum jaxtyping rich sentencepiece transformers-stream-generator 'typeguard<5' wandb
  python benchmarks/capture.py [--rounds=5] [--shapes=16x64,8x256] [--cost]

On an accelerator the peers run there too, and --shapes=64x1024 --dtype=bfloat16 gives the MFU that pods see.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

LAYERS, SITE = 8, 'h.7.resid.post_mlp'  # the residual stream after 8 layers
SECONDS = 2.0  # of a round, at least
ERROR_LINES = 20  # printed of a variant that ends early
OURS = ('ours',)
PEERS = {
  'Hugging Face eager, 12 layers': ('hf', 'eager', 12),
  'Hugging Face sdpa, 12 layers': ('hf', 'sdpa', 12),
  'Hugging Face eager, cut to 8': ('hf', 'eager', 8),
  'Hugging Face sdpa, cut to 8': ('hf', 'sdpa', 8),
  'TransformerLens, stop_at_layer=8': ('lens',),
}


# One variant: each builder returns a function that captures one batch and waits for it, one that returns what it
# captured, and how long a batch would take at the device's peak; None for what there is not.


def _ours(folder, tokens_bt, dtype, sites=(SITE,)):
  import jax

  from jax_interp import activations
  from models import pretrained, sharding
  from train import throughput

  jax.set_mesh(sharding.make_mesh(data=jax.device_count()))
  model = pretrained.load_model(folder, dtype)
  placed_bt = sharding.place(tokens_bt, 'batch token')
  run = lambda: jax.block_until_ready(activations.capture(model, placed_bt, tuple(sites), dtype)[0])
  compiled = activations.capture.lower(model, placed_bt, tuple(sites), dtype).compile()
  flops = compiled.cost_analysis().get('flops', float('nan')) * jax.device_count()
  return run, lambda: run()[sites[0]], flops / throughput.peak(dtype)[0]


def _hugging_face(folder, tokens_bt, dtype, attention, n_layers):
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.GPT2Model.from_pretrained(folder, attn_implementation=attention, dtype=getattr(torch, dtype))
  model.h = model.h[:n_layers]
  model = model.eval().to(device)
  tokens_bt = torch.asarray(tokens_bt, dtype=torch.long, device=device)
  kept = {}
  model.h[LAYERS - 1].register_forward_hook(lambda _, __, out: kept.update(x=out[0] if isinstance(out, tuple) else out))

  def run():
    with torch.no_grad():
      model(tokens_bt, use_cache=False)
    if device == 'cuda':
      torch.cuda.synchronize()
    return kept['x']

  return run, run, None


def _transformer_lens(folder, tokens_bt, dtype):
  import torch
  import transformer_lens

  config = transformer_lens.HookedTransformerConfig(
    n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_vocab=50257, act_fn='gelu_new', seed=0
  )
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformer_lens.HookedTransformer(config).eval().to(getattr(torch, dtype)).to(device)
  tokens_bt = torch.asarray(tokens_bt, dtype=torch.long, device=device)
  site = f'blocks.{LAYERS - 1}.hook_resid_post'

  def run():
    with torch.no_grad():
      _, cache = model.run_with_cache(tokens_bt, stop_at_layer=LAYERS, names_filter=site)
    if device == 'cuda':
      torch.cuda.synchronize()
    return cache[site]

  return run, None, None  # weights of its own: nothing to compare


def _worker(job):
  """Takes rounds: for every line on stdin, writes the tokens per second of one."""
  import numpy as np

  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # what libraries print is no answer
  kind, *rest = job['variant']
  if job['tuned']:
    import torch

    torch.set_float32_matmul_precision('medium')
  tokens_bt = np.random.default_rng(0).integers(50257, size=job['shape']).astype(np.int32)
  build = {'ours': _ours, 'hf': _hugging_face, 'lens': _transformer_lens}[kind]
  run, captured, seconds_at_peak = build(job['folder'], tokens_bt, job['dtype'], *rest)
  run()
  if captured:
    np.save(job['captured'], np.asarray(captured().tolist() if job['dtype'] != 'float32' else captured(), np.float32))
  print(json.dumps({'seconds_at_peak': seconds_at_peak}), file=answers)
  for _ in sys.stdin:
    n, began = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - began < SECONDS:
      run()
      n += 1
    print(json.dumps(n * tokens_bt.size / (time.perf_counter() - began)), file=answers)


class _Variant:
  """A worker process, and what it measured."""

  def __init__(self, name, variant, shape, dtype, folder, tuned=False, devices=1):
    self.name, self.captured, self.tokens_per_s = name, f'{folder}/{abs(hash((name, tuned)))}.npy', []
    job = {
      'variant': variant, 'shape': shape, 'dtype': dtype, 'folder': folder, 'tuned': tuned, 'captured': self.captured,
    }  # fmt: skip
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    self._printed = pathlib.Path(self.captured).with_suffix('.txt')  # by libraries; the traceback if something fails
    with open(self._printed, 'w') as printed:
      self._process = subprocess.Popen(
        [sys.executable, __file__, f'--worker={json.dumps(job)}'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        text=True,
        env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])},
      )
    self.seconds_at_peak = self._answer()['seconds_at_peak']

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      status = self._process.wait()
      last = self._printed.read_text(errors='replace').splitlines()[-ERROR_LINES:]
      raise RuntimeError('\n  '.join([f'{self.name} ended with {status}; the last lines that it printed:', *last]))
    return json.loads(line)

  def round(self):
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    self.tokens_per_s.append(self._answer())

  def close(self):
    self._process.communicate()

  @property
  def median(self):
    return statistics.median(self.tokens_per_s)


def _measure(variants, rounds):
  for _ in range(rounds):
    for variant in variants:
      variant.round()
  for variant in variants:
    variant.close()


def _compare(shape, dtype, folder, rounds):
  import numpy as np

  ours = _Variant('ours', OURS, shape, dtype, folder)
  peers = [
    _Variant(name + (', tuned' if tuned else ''), variant, shape, dtype, folder, tuned)
    for name, variant in PEERS.items()
    for tuned in (False, True)
  ]
  _measure([ours, *peers], rounds)
  print(f'\n{shape[0]} x {shape[1]} tokens, {dtype}, {SITE}: tokens/s (median of {rounds} rounds), ours / theirs')
  mfu = ours.seconds_at_peak * ours.median / (shape[0] * shape[1])
  print(f'  {"ours":42} {ours.median:10,.0f}          MFU {mfu:.0%}')
  for peer in peers:
    print(f'  {peer.name:42} {peer.median:10,.0f}  {ours.median / peer.median:5.2f}')
  kinds = (('as shipped', peers[::2]), ('tuned', peers[1::2]))
  for kind, chosen in kinds:
    fastest = max(chosen, key=lambda peer: peer.median)
    print(f'  ours / fastest {kind}: {ours.median / fastest.median:.2f} ({fastest.name})')
  ours_btd = np.load(ours.captured)
  for kind, chosen in kinds:
    same_weights = [peer for peer in chosen if pathlib.Path(peer.captured).exists()]
    differences = {peer.name: np.abs(ours_btd - np.load(peer.captured)).max() for peer in same_weights}
    name = max(differences, key=differences.get)
    print(f'  largest difference to what Hugging Face captured, {kind}: {differences[name]:.1e} ({name})')


def _cost(dtype, folder, rounds):
  all_sites = [f'h.{i}.resid.{name}' for i in range(LAYERS) for name in ('post_attn', 'post_mlp')]
  variants = {
    'one site, 16 x 64': _Variant('one', OURS, (16, 64), dtype, folder),
    'all 16 residual sites of the 8 layers, 16 x 64': _Variant('all', (*OURS, all_sites), (16, 64), dtype, folder),
    'one site, 1 x 1024': _Variant('long', OURS, (1, 1024), dtype, folder),
    **{
      f'one site, 16 x 64, {n} pretend devices': _Variant(str(n), OURS, (16, 64), dtype, folder, devices=n)
      for n in (2, 4, 8)
    },
  }
  _measure(list(variants.values()), rounds)
  first = next(iter(variants.values())).median
  print(f'\nWhat more costs, {dtype}: tokens/s (median of {rounds} rounds), and of the first')
  for name, variant in variants.items():
    print(f'  {name:50} {variant.median:10,.0f}  {variant.median / first:5.2f}')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--shapes', default='16x64,8x256')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--cost', action='store_true')
  parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    _worker(args.worker)
    return
  import torch
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    transformers.GPT2Model(transformers.GPT2Config()).save_pretrained(folder)
    if args.cost:
      _cost(args.dtype, folder, args.rounds)
    for shape in [] if args.cost else args.shapes.split(','):
      _compare(tuple(map(int, shape.split('x'))), args.dtype, folder, args.rounds)


if __name__ == '__main__':
  main()
