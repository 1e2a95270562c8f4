"""Many clients of `train.serve` at once: answers a second, how long clients wait, and whether any answer is wrong.

The embedded model is served. Every client asks questions about prompts at random, one after another, and compares the
answers with those that a single client got before. A client that is told that the queue is full waits as long as it is
told to. Further clients ask and leave without waiting. At the end, in the midst of it all, the server gets a SIGTERM:
every request must be answered rightly, or be refused as busy, and the server must end with 0.

  pip install '.[server]'
  python benchmarks/server.py [--clients=50] [--seconds=60] [--leaving=2] [-- --sae=runs/tiny/sae/final ...]

What follows `--` is given to `train.serve`.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import threading
import time

import httpx

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ['def', 'return', 'the', 'value', 'import', 'class', 'of', 'if', 'in', 'list', 'name', '(x, y):', 'for', 'none']
N_QUESTIONS = 40
TIMEOUT = 300.0  # seconds, of a client


def _questions() -> list[tuple[str, dict]]:
  """Returns paths and bodies: tables of different objectives, with ablations and traces, and generated text."""
  rng = random.Random(0)
  neuron = lambda: {'kind': 'neuron', 'layer': rng.randrange(4), 'index': rng.randrange(700)}
  found = []
  for number in range(N_QUESTIONS):
    prompt = ' '.join(rng.choice(WORDS) for _ in range(rng.randint(3, 7)))
    objective = [{'kind': 'entropy'}, {'kind': 'kl'}, {'kind': 'logit_difference', 'targets': ['(']}][number % 3]
    request = {'prompt': prompt, 'objective': objective, 'k': 5, 'n_tokens': 5}
    match number % 4:
      case 1:
        request['ablations'] = [neuron()]
      case 2:
        request['trace'] = {'node': neuron() | {'token': -1}}
      case 3:
        found.append(('generate', {'prompt': prompt, 'n_new': 4, 'seed': number}))
        continue
    found.append(('debug', request))
  return found


class _Clients:
  """Clients that ask until they are told to stop, and what became of their questions."""

  def __init__(self, url, questions, answers):
    self.url, self.questions, self.answers = url, questions, answers
    self.done = threading.Event()
    self.seconds, self.wrong, self.n_full, self.n_busy, self.n_left = [], [], 0, 0, 0
    self._lock = threading.Lock()

  def ask(self, seed):
    """Asks one question after another, and compares the answers."""
    rng = random.Random(seed)
    with httpx.Client(base_url=self.url, timeout=TIMEOUT) as client:
      while not self.done.is_set():
        number = rng.randrange(len(self.questions))
        path, body = self.questions[number]
        began = time.monotonic()
        try:
          answer = client.post(f'/api/{path}', json=body)
        except httpx.TransportError as error:
          if not (self.done.is_set() and isinstance(error, httpx.ConnectError)):  # else the server has ended already
            self._count(wrong=f'{path}: {error!r}')
          return
        if answer.status_code == 200:
          said = answer.json() | {'seconds': 0}
          wrong = None if said == self.answers[number] else f'{path}: {said}'
          self._count(seconds=time.monotonic() - began, wrong=wrong)
        elif answer.status_code == 503 and self.done.is_set():
          self._count(busy=1)
        elif answer.status_code == 503:
          self._count(full=1)
          self.done.wait(float(answer.headers.get('retry-after', 1)))
        else:
          self._count(wrong=f'{path}: {answer.status_code} {answer.text}')

  def leave(self, seed):
    """Asks and does not wait."""
    rng = random.Random(seed)
    while not self.done.is_set():
      path, body = rng.choice(self.questions)
      try:
        httpx.post(f'{self.url}/api/{path}', json=body, timeout=rng.uniform(0.01, 0.3))
      except httpx.TransportError:
        self._count(left=1)
      self.done.wait(0.2)

  def _count(self, seconds=None, wrong=None, full=0, busy=0, left=0):
    with self._lock:
      self.seconds += [] if seconds is None else [seconds]
      self.wrong += [] if wrong is None else [wrong]
      self.n_full, self.n_busy, self.n_left = self.n_full + full, self.n_busy + busy, self.n_left + left


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--clients', type=int, default=50)
  parser.add_argument('--seconds', type=float, default=60.0)
  parser.add_argument('--leaving', type=int, default=2)
  parser.add_argument('args', nargs='*', help='of train.serve')
  args = parser.parse_args()
  server = subprocess.Popen(
    [sys.executable, '-m', 'train.serve', '--port=0', '--sample=', '--warm=16', *args.args],
    cwd=ROOT,
    env=os.environ,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    line = server.stdout.readline()
    if not line.startswith('ready at '):
      raise RuntimeError(f'the server did not start: {line}')
    url, questions = line.split()[-1], _questions()
    with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
      ask = lambda path, body: client.post(f'/api/{path}', json=body).raise_for_status().json() | {'seconds': 0}
      answers = [ask(*question) for question in questions]
      began = time.monotonic()
      repeated = [ask(*question) for question in questions]
      alone = (time.monotonic() - began) / len(questions)
      if repeated != answers:
        raise RuntimeError('one client gets different answers to the same question')
    clients = _Clients(url, questions, answers)
    threads = [threading.Thread(target=clients.ask, args=(seed,)) for seed in range(args.clients)]
    threads += [threading.Thread(target=clients.leave, args=(seed,)) for seed in range(args.leaving)]
    for thread in threads:
      thread.start()
    time.sleep(args.seconds)
    n_answers, seconds = len(clients.seconds), sorted(clients.seconds)
    clients.done.set()
    server.send_signal(signal.SIGTERM)
    for thread in threads:
      thread.join()
    code = server.wait(60)
  finally:
    server.kill()
  if not seconds:
    raise RuntimeError(f'no client was answered: {clients.wrong[:3]}')
  print(
    f'{args.clients} clients, {args.seconds:.0f} s: {n_answers} answers, {n_answers / args.seconds:.1f} a second (one '
    f'client alone: {1 / alone:.1f}); a client waits {statistics.median(seconds):.2f} s, of 100 one '
    f'{seconds[int(0.99 * len(seconds))]:.2f} s; told that the queue is full: {clients.n_full}; left: {clients.n_left}'
  )
  print(
    f'after SIGTERM: {len(clients.seconds) - n_answers} answers, {clients.n_busy} refused as busy, exit code {code}; '
    f'wrong or lost answers in all: {len(clients.wrong)}'
  )
  if clients.wrong or code:
    print(json.dumps(clients.wrong[:3], indent=1))
    sys.exit(1)


if __name__ == '__main__':
  main()
