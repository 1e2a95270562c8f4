"""How fast a store of activations is read, beside reading its files without looking at them, in one run.

GPT-2 small's residual stream in bfloat16, 64 tokens a window. Every variant reads all of it; they take rounds in turn
and the medians are compared: from the page cache, and, with --cold, from the disk (the files' pages are dropped before
each reading). `readinto` fills one buffer again and again, which is as fast as reading gets; `fromfile` returns fresh
memory, as a program without a store would.

  python benchmarks/store.py [--gigabytes=0.8] [--rounds=5] [--cold] [--folder=/tmp]
"""

import argparse
import itertools
import os
import pathlib
import resource
import statistics
import tempfile
import threading
import time

import ml_dtypes
import numpy as np

from jax_interp import activations, store

N_TOKENS, D, SHARD, BATCH, BUFFER = 64, 768, 1024, 4096, 2048
SITE = 'h.5.resid.post_mlp'


def make(folder, n_examples):
  """Returns a store of random numbers."""
  rng = np.random.default_rng(0)
  saved = store.ActivationStore.create(
    folder, {SITE: (D,)}, n_examples, N_TOKENS, SHARD, 'bfloat16', model='', tokenizer='', dataset=''
  )
  for shard in saved.missing():
    numbers = rng.integers(0, 0x4000, (SHARD, N_TOKENS, D), np.uint16).view(ml_dtypes.bfloat16)
    saved.write(shard, np.zeros((SHARD, N_TOKENS), np.int32), {SITE: numbers})
  return saved


def variants(saved, files):
  """Returns {name: function that reads everything once}; the plain ones first."""
  buffer, rng = bytearray(max(map(os.path.getsize, files))), np.random.default_rng(0)
  order, every = rng.permutation(saved.n_examples * saved.n_tokens), np.arange(saved.n_examples)
  keep, read, rows = saved.keep(), saved.reader(SITE), saved.rows(SITE)

  def readinto():
    for path in files:
      with open(path, 'rb', buffering=0) as file:
        file.readinto(buffer)

  def fromfile():
    for path in files:
      np.fromfile(path, np.uint8)

  out = np.empty((BUFFER, N_TOKENS, D), ml_dtypes.bfloat16)  # not zeros, for which NumPy asks for no huge pages
  out[:] = 0

  def in_order():
    for start in range(0, len(every), BUFFER):
      read(every[start : start + BUFFER], out[: len(every) - start])

  n_read = threading.Semaphore(0)

  def counted(*args):
    found = read(*args)
    n_read.release()
    return found

  batches = activations.shuffled_batches(counted, keep, BATCH, BUFFER, 0)
  next(batches)
  for _ in range(2):  # the first buffer, and the one that is read meanwhile
    n_read.acquire()

  def shuffled():  # goes on where the last round ended, as training does
    for _ in itertools.islice(batches, keep.size // BATCH):
      pass
    for _ in range(saved.n_examples // BUFFER):  # what is read ahead is waited for: it is as much as was read before
      n_read.acquire()

  def random_rows():  # the tokens of as many examples as a buffer holds, in any order
    for start in range(0, len(every), BUFFER):
      among = np.arange(start * N_TOKENS, min(start + BUFFER, len(every)) * N_TOKENS)
      rows(rng.permutation(among), out.reshape(-1, D)[: len(among)])

  def some_rows(n=4096):  # of the whole store: every one in a chunk of its own
    return rows(order[:n])

  return {
    'readinto': readinto,
    'fromfile': fromfile,
    'reader, in order': in_order,
    'shuffled_batches': shuffled,
    'rows, of a buffer': random_rows,
  }, some_rows


def drop(files):
  """Drops the files from the page cache."""
  for path in files:
    with open(path, 'rb') as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--gigabytes', type=float, default=0.8)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--cold', action='store_true')
  parser.add_argument('--folder', default=None)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    n_buffers = max(2, round(args.gigabytes * 1e9 / (BUFFER * N_TOKENS * D * 2)))
    saved = make(folder, n_buffers * BUFFER)
    files = sorted(path for path in (pathlib.Path(folder) / SITE / 'c').rglob('*') if path.is_file())
    os.sync()
    functions, some_rows = variants(saved, files)
    gigabytes = sum(map(os.path.getsize, files)) / 1e9
    seconds, cpu = {name: [] for name in functions}, {name: [] for name in functions}
    for _ in range(args.rounds + 1):
      for name, function in functions.items():
        if args.cold:
          drop(files)
        began, used = time.perf_counter(), _cpu()
        function()
        seconds[name].append(time.perf_counter() - began)
        cpu[name].append(_cpu() - used)
    rates = {name: gigabytes / statistics.median(found[1:]) for name, found in seconds.items()}  # the first warms up
    print(f'{gigabytes:.2f} GB, {"cold" if args.cold else "page cache"}, {os.cpu_count()} processors')
    print(f'{"":20} {"GB/s":>6} {"of readinto":>12} {"of fromfile":>12} {"CPU s/GB":>9}')
    for name, rate in rates.items():
      used = statistics.median(cpu[name][1:]) / gigabytes
      print(f'{name:20} {rate:6.2f} {rate / rates["readinto"]:12.0%} {rate / rates["fromfile"]:12.0%} {used:9.2f}')
    began = time.perf_counter()
    n = len(some_rows())
    print(f'rows, {n} of the whole store: {n / (time.perf_counter() - began):,.0f} tokens/s')


def _cpu() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


if __name__ == '__main__':
  main()
