"""Seconds per training step of a TopK SAE: ours beside sparsify, dictionary_learning and SAELens, in one run.

The same synthetic activations (d 768, sums of a few of 2,048 directions), Adam at the same constant rate, float32
unless said. Every variant is a process of its own, so that each has its own threads and memory; they take rounds of
--steps steps in turn, and the median over the rounds of the ratio within a round is what is compared: times drift, by
half, with whatever else the machine does. Everybody trains for equally long, and the loss at the end stands beside.
Batches come from the host: ours are placed while the device computes, as train.sae does.

Sparsify runs twice: as shipped, where its Trainer asks for set_float32_matmul_precision('high'), and tuned, with
'medium', which lets torch multiply float32 with other kernels (on AMD faster and as exact; on Intel with AMX it rounds
to bfloat16), and Adam(fused=True).
Plain torch is a step that anybody would write: torch.topk, an embedding bag, autograd, the tuned settings. On a GPU
sparsify multiplies in bfloat16, whatever is asked; --dtype=bfloat16 lets plain torch do so too. Ours chooses
latents in bfloat16 where that is measured to be faster, which are those of float32, and computes in float32.

  pip install torch==2.13.0 && pip install --no-deps eai-sparsify dictionary-learning sae-lens nnsight \
    'transformer-lens>=2.16.1,<4' && pip install accelerate beartype better-abc datasets docstring-parser einops \
    fancy-einsum greenlet jaxtyping natsort nltk pandas plotly plotly-express python-dotenv rich schedulefree \
    sentencepiece simple-parsing tenacity transformers-stream-generator 'typeguard<5' wandb zstandard
  python benchmarks/sae_step.py [--n=8192,24576,32768] [--batch=1024,4096] [--rounds=5] [--peers=sparsify,torch]
  python benchmarks/sae_step.py --auxk    # a tenth of the latents dead, and AuxK on
  python benchmarks/sae_step.py --sweep   # what more of something costs ours: latents, k, batch, AuxK, devices

A peer that is not installed is left out. On a GPU: --n=32768,131072 --batch=16384 --dtype=bfloat16.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

D, N_DIRECTIONS, N_ACTIVE = 768, 2048, 20
POOL = 8  # batches, trained on again and again
DEAD_SHARE, DEAD_TOKENS = 0.1, 10_000_000
ERROR_LINES = 20  # printed of a variant that ends early
PEERS = {  # name: kind, tuned, module that must be there
  'sparsify, as shipped': ('sparsify', False, 'sparsify'),
  'sparsify, tuned': ('sparsify', True, 'sparsify'),
  'plain torch, tuned': ('torch', True, 'torch'),
  'dictionary_learning': ('dictionary_learning', False, 'dictionary_learning'),
  'SAELens': ('sae_lens', False, 'sae_lens'),
}


def _pool(batch):
  """Returns POOL batches of activations [step, batch, d], the same for everybody."""
  import numpy as np

  rng = np.random.default_rng(0)
  directions = rng.normal(size=(N_DIRECTIONS, D)).astype(np.float32) / D**0.5
  pool = np.zeros((POOL * batch, D), np.float32)
  for _ in range(N_ACTIVE):
    chosen, sizes = rng.integers(N_DIRECTIONS, size=len(pool)), rng.exponential(size=(len(pool), 1))
    pool += directions[chosen] * sizes.astype(np.float32)
  return (pool + 0.02 * rng.normal(size=pool.shape)).astype(np.float32).reshape(POOL, batch, D)


def _start(job, pool):
  """Returns an encoder and a decoder of unit rows [latent, d] and a pre-bias, the same for everybody."""
  import numpy as np

  rng = np.random.default_rng(1)
  encoder = rng.uniform(-(D**-0.5), D**-0.5, size=(job['n'], D)).astype(np.float32)
  return encoder, encoder / np.linalg.norm(encoder, axis=1, keepdims=True), pool[0].mean(0)


# One variant: each builder returns run(n_steps), which trains and waits, and gives the normalized MSE of its last step;
# and peak(), the most memory of a device in bytes, or None where that is the host's.


def _ours(job, pool):
  import itertools

  import jax
  import numpy as np

  from jax_interp.sae import kernels, losses, optimizer, train_step
  from models import activation_functions, sae, sharding

  mesh = job.get('mesh', (1, 1))
  jax.set_mesh(sharding.make_mesh(*mesh))
  k = job['k']
  encoder, decoder, pre_bias = _start(job, pool)
  latents = 'latent d_model'
  fresh = sae.SparseAutoencoder(
    sharding.place(encoder, latents),
    sharding.place(decoder, latents),
    sharding.place(pre_bias, 'd_model'),
    sharding.place(np.zeros(job['n'], np.float32), 'latent'),
    activation_functions.TopK(k),
  )
  levels = ((k, 1.0), (4 * k, 1 / 8)) if job.get('multi') else ((k, 1.0),)
  sizes = job['n'] // mesh[1], D, max(of for of, _ in levels)
  how = {
    'kernels': job.get('kernels') or kernels.fastest(*sizes, mesh[1], job['batch'] // mesh[0]),
    'dtype': job.get('choose_in') or kernels.fastest_dtype(*sizes),
  }
  objective = losses.TopK(levels, D // 2 if job['auxk'] else 0, dead_tokens=DEAD_TOKENS, **how)
  tx = optimizer.adam(job['learning_rate'], eps=1e-8)  # torch's
  state = train_step.init_state(fresh, pool[0], tx)
  if job['auxk']:
    n_dead = int(DEAD_SHARE * job['n'])
    dead_l = np.arange(job['n']) < n_dead
    state.sae.latent_bias[...] = sharding.place(np.where(dead_l, -1e3, 0).astype(np.float32), 'latent')
    clock_l = sharding.place(np.where(dead_l, 2 * DEAD_TOKENS, 0).astype(np.int32), 'latent')
    state = state._replace(tokens_since_fired_l=clock_l)
  del fresh, encoder, decoder
  batches, number = itertools.cycle(pool), 0
  variances = [float(x.var(0).mean()) for x in pool]

  def place_next():
    return sharding.place(np.stack(list(itertools.islice(batches, job['steps_per_call']))), 'step row d_model')

  acts_sbd = place_next()

  def run(n_steps):
    nonlocal state, number, acts_sbd
    for _ in range(n_steps // job['steps_per_call']):
      state, metrics = train_step.train_steps(state, acts_sbd, tx, objective)
      acts_sbd = place_next()  # while the device computes, as train.sae does
      metrics = jax.device_get(metrics)
    number += n_steps
    # Ours is in the variance of the first batch, theirs in that of each.
    return float(metrics['normalized_mse'][-1]) * variances[0] / variances[(number - 1) % POOL]

  def peak():
    stats = jax.devices()[0].memory_stats()
    return stats and stats.get('peak_bytes_in_use')

  return run, peak


def _torch_setup(job, precision):
  import torch

  torch.set_float32_matmul_precision(precision)
  torch.manual_seed(0)
  cuda = torch.cuda.is_available()
  peak = lambda: torch.cuda.max_memory_allocated() if cuda else None
  return torch, 'cuda' if cuda else 'cpu', peak


def _looped(step, pool, torch, device):
  """Returns run(n_steps) of a step that takes a batch on the device and returns its normalized MSE, a tensor."""
  number = 0

  def run(n_steps):
    nonlocal number
    for _ in range(n_steps):
      loss = step(number, torch.as_tensor(pool[number % POOL]).to(device))
      number += 1
    return float(loss)  # waits for the device

  return run


def _sparsify(job, pool):
  torch, device, peak = _torch_setup(job, 'medium' if job['tuned'] else 'high')
  import sparsify

  sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=job['n'], k=job['k']), device=device)
  for param, value in zip((sae.encoder.weight, sae.W_dec, sae.b_dec), _start(job, pool), strict=True):
    param.data.copy_(torch.as_tensor(value))
  # As sparsify.Trainer: Adam of 8 bits only where bitsandbytes is installed.
  options = {'fused': True} if job['tuned'] else {}
  optimizer = torch.optim.Adam(sae.parameters(), lr=job['learning_rate'], **options)
  since_fired = torch.zeros(job['n'], dtype=torch.long, device=device)
  did_fire = torch.zeros(job['n'], dtype=torch.bool, device=device)
  if job['auxk']:
    n_dead = int(DEAD_SHARE * job['n'])
    sae.encoder.bias.data[:n_dead] = -1e3
    since_fired[:n_dead] = 2 * DEAD_TOKENS

  def step(_, x):
    sae.set_decoder_norm_to_unit_norm()
    dead_mask = since_fired > DEAD_TOKENS if job['auxk'] else None
    total_variance = (x - x.mean(0)).pow(2).sum()
    out = sae(x=x, y=x, dead_mask=dead_mask, total_variance=total_variance)
    did_fire[out.latent_indices.flatten()] = True
    (out.fvu + out.auxk_loss / 32).backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
      since_fired.add_(len(x))
      since_fired[did_fire] = 0
      did_fire.zero_()
    return out.fvu.detach()

  return _looped(step, pool, torch, device), peak


def _plain_torch(job, pool):
  torch, device, peak = _torch_setup(job, 'medium')
  functional = torch.nn.functional
  encoder, decoder, pre_bias = (torch.tensor(value, device=device) for value in _start(job, pool))
  latent_bias = torch.zeros(job['n'], device=device)
  params = [p.requires_grad_() for p in (encoder, decoder, pre_bias, latent_bias)]
  optimizer = torch.optim.Adam(params, lr=job['learning_rate'], fused=True)
  since_fired = torch.zeros(job['n'], dtype=torch.long, device=device)

  def step(_, x):
    with torch.autocast(device, torch.bfloat16, enabled=job['dtype'] == 'bfloat16'):
      preacts = functional.linear(x - pre_bias, encoder, latent_bias)
      values, indices = preacts.topk(job['k'], sorted=False)
      values = values.relu().float()
      error = x - functional.embedding_bag(indices, decoder, per_sample_weights=values, mode='sum') - pre_bias
    fvu = error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    fvu.backward()
    with torch.no_grad():
      decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
      optimizer.step()
      optimizer.zero_grad()
      decoder.copy_(functional.normalize(decoder, dim=1))
      since_fired.add_(len(x))
      since_fired[indices.flatten()] = 0
    return fvu.detach()

  return _looped(step, pool, torch, device), peak


def _dictionary_learning(job, pool):
  torch, device, peak = _torch_setup(job, 'highest')
  from dictionary_learning.trainers.top_k import TopKTrainer

  trainer = TopKTrainer(
    steps=10**9, activation_dim=D, dict_size=job['n'], k=job['k'], layer=0, lm_name='', lr=job['learning_rate'],
    auxk_alpha=1 / 32 if job['auxk'] else 0, warmup_steps=0, device=device, seed=0,
  )  # fmt: skip
  encoder, decoder, _ = _start(job, pool)  # the pre-bias is a median, at the first step
  trainer.ae.encoder.weight.data.copy_(torch.as_tensor(encoder))
  trainer.ae.decoder.weight.data.copy_(torch.as_tensor(decoder.T))
  variances = [float(((x - x.mean(0)) ** 2).sum(1).mean()) for x in pool]
  if job['auxk']:
    n_dead = int(DEAD_SHARE * job['n'])
    trainer.ae.encoder.bias.data[:n_dead] = -1e3
    trainer.num_tokens_since_fired[:n_dead] = 2 * DEAD_TOKENS
  step = lambda number, x: trainer.update(number, x) / variances[number % POOL]
  return _looped(step, pool, torch, device), peak


def _sae_lens(job, pool):
  torch, device, peak = _torch_setup(job, 'highest')
  from sae_lens import config
  from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
  from sae_lens.training import sae_trainer

  sae = TopKTrainingSAE(
    TopKTrainingSAEConfig(d_in=D, d_sae=job['n'], k=job['k'], device=device, aux_loss_coefficient=float(job['auxk']))
  )
  encoder, decoder, pre_bias = _start(job, pool)
  for param, value in zip((sae.W_enc, sae.W_dec, sae.b_dec), (encoder.T, decoder, pre_bias), strict=True):
    param.data.copy_(torch.as_tensor(value))
  batch = pool.shape[1]
  settings = config.SAETrainerConfig(
    total_training_samples=10**6 * batch,
    train_batch_size_samples=batch,
    lr=job['learning_rate'],
    lr_end=job['learning_rate'],
    device=device,
  )
  trainer = sae_trainer.SAETrainer(settings, sae, iter(()))
  variances = [float(((x - x.mean(0)) ** 2).sum(1).mean()) for x in pool]
  if job['auxk']:
    n_dead = int(DEAD_SHARE * job['n'])
    sae.b_enc.data[:n_dead] = -1e3
    trainer.n_forward_passes_since_fired[:n_dead] = 10**6

  def step(number, x):
    out = trainer._train_step(sae=sae, sae_in=x)
    trainer.n_training_steps += 1
    return out.losses['mse_loss'].detach() / variances[number % POOL]

  return _looped(step, pool, torch, device), peak


BUILDERS = {
  'ours': _ours,
  'sparsify': _sparsify,
  'torch': _plain_torch,
  'dictionary_learning': _dictionary_learning,
  'sae_lens': _sae_lens,
}


def _peak_resident():
  (line,) = (line for line in pathlib.Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
  return int(line.split()[1]) * 1024


def _worker(job):
  """Takes rounds: for every line on stdin, writes the seconds per step of one, its last loss and the peak memory."""
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # what libraries print is no answer
  run, peak = BUILDERS[job['kind']](job, _pool(job['batch']))
  run(job['steps'])
  # The peak is that of the rounds: what importing and compiling left free in the heap is given back.
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)
  if os.access('/proc/self/clear_refs', os.W_OK):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  print(json.dumps('ready'), file=answers)
  for _ in sys.stdin:
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    began = time.perf_counter()
    loss = run(job['steps'])
    seconds = (time.perf_counter() - began) / job['steps']
    cpu = (sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu) / job['steps']
    memory = peak() or _peak_resident()
    print(json.dumps({'seconds': seconds, 'cpu': cpu, 'loss': loss, 'memory': memory}), file=answers)


class _Variant:
  """A worker process, and what it measured."""

  def __init__(self, name, **job):
    self.name, self.rounds = name, []
    devices = job.get('mesh', (1, 1))
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices[0] * devices[1]}'
    self._printed = tempfile.NamedTemporaryFile('w+', suffix='.txt', errors='replace')  # noqa: SIM115 - closed below
    self._process = subprocess.Popen(
      [sys.executable, __file__, f'--worker={json.dumps(job)}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._printed,
      text=True,
      env={
        **os.environ,
        'XLA_FLAGS': flags,
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # the others need memory of the same device
        'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
      },
    )
    self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      status = self._process.wait()
      last = pathlib.Path(self._printed.name).read_text(errors='replace').splitlines()[-ERROR_LINES:]
      raise RuntimeError('\n  '.join([f'{self.name} ended with {status}; the last lines that it printed:', *last]))
    return json.loads(line)

  def round(self):
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    self.rounds.append(self._answer())

  def close(self):
    self._process.communicate()
    self._printed.close()

  def median(self, what):
    return statistics.median(round[what] for round in self.rounds)

  def ratio(self, other, what='seconds'):
    """Returns the median over the rounds of other's / this one's."""
    pairs = zip(other.rounds, self.rounds, strict=True)
    return statistics.median(theirs[what] / ours[what] for theirs, ours in pairs)

  def row(self, first):
    ms, cpu, loss, memory = (self.median(what) for what in ('seconds', 'cpu', 'loss', 'memory'))
    loss = self.rounds[-1]['loss']
    print(
      f'  {self.name:44} {1e3 * ms:8.1f} {first.ratio(self):6.2f} {1e3 * cpu:9.0f} {loss:8.4f} {memory / 2**30:7.2f}'
    )


def _measure(title, variants, rounds):
  try:
    for _ in range(rounds):
      for variant in variants:
        variant.round()
  finally:
    for variant in variants:
      variant.close()
  print(f'\n{title} (medians of {rounds} rounds)')
  print(f'  {"":28}  ms/step  ratio    CPU ms  ratio     loss  GiB peak')
  for variant in variants:
    variant.row(variants[0])
  sys.stdout.flush()


def _compare(job, peers, rounds):
  variants = [
    _Variant('ours', kind='ours', **job),
    _Variant('ours, chosen in float32', kind='ours', choose_in='float32', **job),
  ]
  for name, (kind, tuned, module) in PEERS.items():
    if kind not in peers or (kind == 'torch' and job['auxk']):  # it has no AuxK
      continue
    if importlib.util.find_spec(module) is None:
      print(f'{name}: not installed')
      continue
    variants.append(_Variant(name, kind=kind, tuned=tuned, **job))
  auxk = f', {DEAD_SHARE:.0%} dead and AuxK' if job['auxk'] else ''
  title = f'n {job["n"]}, batch {job["batch"]}, k {job["k"]}, {job["dtype"]}{auxk}: ratio is time / ours'
  _measure(title, variants, rounds)


def _sweep(job, rounds, meshes):
  base = {**job, 'kind': 'ours'}
  groups = {
    'latents': {f'n {n}': {'n': n} for n in (4096, 8192, 16384, 24576, 32768)},
    'active latents': {f'k {k}': {'k': k} for k in (16, 32, 64, 128)},
    'tokens a batch': {f'batch {batch}': {'batch': batch} for batch in (1024, 2048, 4096, 8192)},
    'AuxK, Multi-TopK, steps a call': {
      'TopK': {},
      f'AuxK, {DEAD_SHARE:.0%} dead': {'auxk': True},
      'Multi-TopK': {'multi': True},
      'one step a call': {'steps_per_call': 1},
      'dense kernels': {'kernels': 'dense'},
      'sorted kernels': {'kernels': 'sorted'},
      'sparse kernels': {'kernels': 'sparse'},
      'grouped kernels': {'kernels': 'grouped'},
      'Pallas kernels (on CUDA; else sorted)': {'kernels': 'pallas'},
      'chosen in float32': {'choose_in': 'float32'},
      'chosen in bfloat16': {'choose_in': 'bfloat16'},
    },
    'pretend devices, data x model': {f'{a}x{b}': {'mesh': (a, b)} for a, b in meshes},
  }
  for title, group in groups.items():
    variants = [_Variant(name, **{**base, **change}) for name, change in group.items()]
    _measure(
      f'{title}; else n {job["n"]}, batch {job["batch"]}, k {job["k"]}: ratio is time / the first', variants, rounds
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  numbers = lambda text: [int(number) for number in text.split(',')]
  parser.add_argument('--n', type=numbers, default=[8192, 24576, 32768])
  parser.add_argument('--batch', type=numbers, default=[1024, 4096])
  parser.add_argument('--k', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=8, help='of a round')
  parser.add_argument('--steps_per_call', type=int, default=8, help='of ours')
  parser.add_argument('--peers', default='sparsify,torch,dictionary_learning,sae_lens')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--auxk', action='store_true')
  parser.add_argument('--sweep', action='store_true')
  parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    _worker(args.worker)
    return
  if args.steps % args.steps_per_call:
    parser.error(f'--steps {args.steps} is not a multiple of --steps_per_call {args.steps_per_call}')
  for n in args.n:
    for batch in args.batch:
      job = {
        'n': n, 'batch': batch, 'k': args.k, 'dtype': args.dtype, 'auxk': args.auxk, 'steps': args.steps,
        'steps_per_call': args.steps_per_call, 'learning_rate': 2e-4 / (n / 2**14) ** 0.5, 'tuned': False,
      }  # fmt: skip
      if args.sweep:
        _sweep(job, args.rounds, [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
        return
      job.pop('tuned')
      _compare(job, args.peers.split(','), args.rounds)


if __name__ == '__main__':
  main()
