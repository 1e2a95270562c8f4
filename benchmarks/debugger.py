"""Milliseconds a question of the debugger takes, beside plain torch autograd that answers it by hooks, in one run.

GPT-2 small with the same random weights for both, float32, one prompt. A table is four columns (write norm, direct
effect, activation x gradient, activation) of all attention heads by token pair and all MLP neurons, and the top and
bottom 10 of each; both compute only the logits that the objective needs. Each side is a process of its own, they take
rounds in turn, and medians are compared. What both say of a prompt is compared too: the objective, and the largest
effects.

  pip install torch==2.13.0
  python benchmarks/debugger.py [--rounds=5] [--lengths=16,128]

  table       of a logit difference at the last token
  sae         the same with a TopK autoencoder of 32,768 latents (k=32) spliced into the MLP output of layer 5, its
              latents in place of that layer's neurons
  ablation    the table with one neuron held at zero
  trace       the table of what makes a neuron of layer 8 fire
  audit       50 nodes really ablated: by torch one at a time, and in one batch, whichever is faster
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

TASKS = ('table', 'sae', 'ablation', 'trace', 'audit')
K, N_AUDITED = 10, 50
SAE_LAYER, N_LATENTS, SAE_K = 5, 32768, 32
ABLATED, TRACED = (6, 100), (8, 200)  # layer and neuron, at the last token
TARGET, DISTRACTOR = 5, 7
SECONDS = 2.0  # of a round, at least


def _prompt(length):
  import numpy as np

  return np.random.default_rng(length).integers(50257, size=length)


def _sae_arrays():
  import numpy as np

  rng = np.random.default_rng(0)
  decoder_ld = rng.normal(size=(N_LATENTS, 768)).astype(np.float32)
  decoder_ld /= np.linalg.norm(decoder_ld, axis=1, keepdims=True)
  return decoder_ld


# Both sides: a function that returns {task: function}, which answers with the objective and the largest effects.


def _ours(folder, length):
  import jax
  import numpy as np

  from jax_interp.debugger import audit, engine, schema, subject
  from models import activation_functions, pretrained, sae, sharding

  class Ids:
    """Texts are numbers of tokens."""

    def encode(self, text, add_special_tokens=False):
      return [int(word) for word in text.split()]

    def decode(self, ids):
      return ' '.join(map(str, ids))

  jax.set_mesh(sharding.make_mesh())
  model, decoder_ld = pretrained.load_model(folder), _sae_arrays()
  zeros = np.zeros
  dictionary = sae.SparseAutoencoder(
    decoder_ld, decoder_ld, zeros(768, 'f'), zeros(N_LATENTS, 'f'), activation_functions.TopK(SAE_K)
  )
  subjects = {
    name: subject.Subject(model, Ids(), saes)
    for name, saes in {'plain': {}, 'sae': {f'h.{SAE_LAYER}.resid.delta_mlp': dictionary}}.items()
  }
  node = lambda cell: schema.Node(kind='neuron', layer=cell[0], index=cell[1], token=-1)
  plain = schema.Request(
    prompt=' '.join(map(str, _prompt(length))),
    objective=schema.LogitDifference(targets=[str(TARGET)], distractors=[str(DISTRACTOR)]),
    k=K,
    n_tokens=0,
  )
  layer, index = ABLATED
  ablation = schema.Ablation(kind='neuron', layer=layer, index=index, first=-1)
  ablated = plain.model_copy(update={'ablations': [ablation]})
  traced = plain.model_copy(update={'trace': schema.Trace(node=node(TRACED))})

  def table(subject, request):
    analysis = engine.analyse(subject, request)
    columns = engine.tabulate(analysis.nodes, engine.describe(subject, analysis, analysis.nodes))
    totals = [
      effect
      for node, effect in zip(columns.nodes, columns.total_effect, strict=True)
      if node.kind in ('head', 'neuron', 'latent')
    ]
    return float(analysis.run.objective), sorted(totals)[-K:]

  prepared = engine.prepare(subjects['plain'], plain)
  run = engine.run(subjects['plain'], prepared)
  nodes = [schema.Node(kind='neuron', layer=n, index=i, token=t) for n, i, t in _audited(length)]

  def audits():
    objective, found_n, _ = audit.measure(subjects['plain'], prepared, run, nodes, np.zeros(len(nodes)))
    return objective, sorted((objective - found_n).tolist())[-K:]

  return {
    'table': lambda: table(subjects['plain'], plain),
    'sae': lambda: table(subjects['sae'], plain),
    'ablation': lambda: table(subjects['plain'], ablated),
    'trace': lambda: table(subjects['plain'], traced),
    'audit': audits,
  }


def _audited(length):
  """Returns (layer, neuron, token) of the audited nodes, spread over layers, neurons and tokens."""
  import numpy as np

  rng = np.random.default_rng(1)
  return [(int(n), int(rng.integers(3072)), int(rng.integers(length))) for n in rng.integers(12, size=N_AUDITED)]


def _torch(folder, length):
  import torch
  import transformers

  model = transformers.GPT2Model.from_pretrained(folder, attn_implementation='eager').eval()
  model.requires_grad_(False)
  tokens_bt = torch.as_tensor(_prompt(length))[None]
  direction_d = model.wte.weight[TARGET] - model.wte.weight[DISTRACTOR]
  final, model.ln_f = model.ln_f, torch.nn.Identity()
  n_head, last = 12, length - 1
  decoder_ld = torch.as_tensor(_sae_arrays())
  causal_ts = torch.ones(length, length, dtype=torch.bool).tril()

  def read(x_td, hold=True):
    """The logit difference at the last token, the scale of the last norm held."""
    centred = x_td[..., last, :] - x_td[..., last, :].mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return (centred / (scale.detach() if hold else scale) * final.weight + final.bias) @ direction_d

  def hook(found, spliced):
    def keep(name, tensor):
      if tensor.requires_grad:
        tensor.retain_grad()
      found[name] = tensor

    def dictionary(_, __, x):
      preacts = x.detach() @ decoder_ld.T
      values, indices = preacts.topk(SAE_K)
      encoded = torch.zeros_like(preacts).scatter(-1, indices, values.relu())
      latents = encoded.detach().requires_grad_()
      found['latents'] = latents
      return x + (latents - encoded) @ decoder_ld

    handles = [model.wte.register_forward_hook(lambda _, __, out: out.requires_grad_())]
    for n, block in enumerate(model.h):
      handles += [
        block.attn.c_attn.register_forward_hook(lambda _, __, out, n=n: keep(('v', n), out)),
        block.attn.register_forward_hook(lambda _, __, out, n=n: keep(('probs', n), out[1])),
        block.mlp.act.register_forward_hook(lambda _, __, out, n=n: keep(('acts', n), out)),
        block.mlp.c_fc.register_forward_hook(lambda _, __, out, n=n: found.update({('pre', n): out})),
        block.mlp.register_forward_hook(lambda _, inputs, out, n=n: found.update({('normed', n): inputs[0]})),
        block.ln_2.register_forward_hook(lambda _, inputs, out, n=n: keep(('mid', n), inputs[0])),
      ]
      if spliced and n == SAE_LAYER:
        handles.append(block.mlp.register_forward_hook(dictionary))
    return handles

  def table(task):
    found = {}
    handles = hook(found, task == 'sae')
    if task == 'ablation':
      layer, index = ABLATED

      def zero(_, __, out):
        out = out.clone()
        out[:, last, index] = 0
        return out

      handles.insert(0, model.h[layer].mlp.act.register_forward_hook(zero, prepend=True))
    stream_td = model(tokens_bt, use_cache=False, output_attentions=True).last_hidden_state
    if task == 'trace':
      layer, index = TRACED
      mid_td = found['mid', layer][0]
      centred = mid_td[last] - mid_td[last].mean()
      norm = model.h[layer].ln_2
      normed = centred / (centred.pow(2).mean() + 1e-5).sqrt().detach() * norm.weight + norm.bias
      objective = normed @ model.h[layer].mlp.c_fc.weight[:, index] + model.h[layer].mlp.c_fc.bias[index]
      source, n_layers = found['mid', layer], layer
    else:
      stream_td.retain_grad()
      objective, source, n_layers = read(stream_td[0]), stream_td, 12
    objective.backward()
    grad_td = source.grad[0]
    heads, neurons, latents = ([[], [], [], []] for _ in range(3))
    for n, block in enumerate(model.h):
      probs = found['probs', n]
      v_shc = found['v', n][0, :, 1536:].view(length, n_head, 64)
      written_shd = torch.einsum('shc,hcd->shd', v_shc, block.attn.c_proj.weight.view(n_head, 64, 768))
      zero = torch.zeros(())
      probs_hts = probs[0]
      on = float(n < n_layers or (task == 'trace' and n == n_layers))
      columns = (
        probs_hts * written_shd.norm(dim=-1).T[:, None],
        probs_hts * (probs.grad[0] if probs.grad is not None else zero),
        probs_hts * torch.einsum('td,shd->hts', grad_td, written_shd) * on,
        probs_hts,
      )
      for column, x in zip(heads, columns, strict=True):
        column.append(x.masked_fill(~causal_ts, 0))
      acts = found['acts', n]
      weight = block.mlp.c_proj.weight
      if task == 'sae' and n == SAE_LAYER:
        latents_tl = found['latents'][0]
        columns = (latents_tl, latents_tl * found['latents'].grad[0], latents_tl * (grad_td @ decoder_ld.T), latents_tl)
        for column, x in zip(latents, columns, strict=True):
          column.append(x)
        continue
      columns = (
        acts[0] * weight.norm(dim=1),
        acts[0] * (acts.grad[0] if acts.grad is not None else zero),
        acts[0] * (grad_td @ weight.T) * float(n < n_layers),
        acts[0],
      )
      for column, x in zip(neurons, columns, strict=True):
        column.append(x)
    totals = []
    for kind in (heads, neurons, latents):
      if not kind[0]:
        continue
      stacked = [torch.stack(column).reshape(-1).detach() for column in kind]
      listed = [stacked[c].topk(K, largest=largest).indices for c in range(4) for largest in (True, False)]
      listed = torch.cat(listed).unique()
      rows = [column[listed].tolist() for column in stacked]
      totals += rows[1]
    for handle in handles:
      handle.remove()
    return float(objective), sorted(totals)[-K:]

  def audit_one_by_one():
    found = []
    with torch.no_grad():
      clean = float(read(model(tokens_bt, use_cache=False).last_hidden_state[0], hold=False))
      for layer, index, token in _audited(length):

        def zero(_, __, out, index=index, token=token):
          out[:, token, index] = 0
          return out

        handle = model.h[layer].mlp.act.register_forward_hook(zero)
        found.append(float(read(model(tokens_bt, use_cache=False).last_hidden_state[0], hold=False)))
        handle.remove()
    return clean, sorted(clean - x for x in found)[-K:]

  def audit_in_one_batch():
    audited = _audited(length)
    handles = []
    for n, block in enumerate(model.h):
      mine = [(row, token, index) for row, (layer, index, token) in enumerate(audited) if layer == n]
      if mine:
        cells = tuple(torch.as_tensor(x) for x in zip(*mine, strict=True))

        def zero(_, __, out, cells=cells):
          out[cells] = 0
          return out

        handles.append(block.mlp.act.register_forward_hook(zero))
    with torch.no_grad():
      rows_bt = tokens_bt.expand(N_AUDITED + 1, -1)
      found = read(model(rows_bt, use_cache=False).last_hidden_state, hold=False).tolist()
    for handle in handles:
      handle.remove()
    return found[-1], sorted(found[-1] - x for x in found[:-1])[-K:]

  tables = {task: (lambda task=task: table(task)) for task in ('table', 'sae', 'ablation', 'trace')}
  return tables | {'audit, one by one': audit_one_by_one, 'audit, one batch': audit_in_one_batch}


def _worker(job):
  """Takes rounds: for every task named on stdin, writes the milliseconds of one answer, and the answer."""
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # what libraries print is no answer
  tasks = {'ours': _ours, 'torch': _torch}[job['side']](job['folder'], job['length'])
  print(json.dumps(list(tasks)), file=answers)
  for line in sys.stdin:
    run = tasks[line.strip()]
    answer = run()  # compiles, or warms caches
    times = []
    while len(times) < 3 or sum(times) < SECONDS:
      began = time.perf_counter()
      run()
      times.append(time.perf_counter() - began)
    print(json.dumps([1000 * statistics.median(times), answer]), file=answers)


class _Side:
  """A worker process, and what it measured by task."""

  def __init__(self, side, folder, length):
    job = {'side': side, 'folder': folder, 'length': length}
    self._process = subprocess.Popen(
      [sys.executable, __file__, f'--worker={json.dumps(job)}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])},
    )
    self.milliseconds = {task: [] for task in self._answer()}
    self.answers = {}

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'a side ended with {self._process.wait()}')
    return json.loads(line)

  def round(self, task):
    self._process.stdin.write(f'{task}\n')
    self._process.stdin.flush()
    milliseconds, self.answers[task] = self._answer()
    self.milliseconds[task].append(milliseconds)

  def median(self, task):
    return statistics.median(self.milliseconds[task])

  def close(self):
    self._process.communicate()


def _compare(folder, length, rounds, tasks):
  import numpy as np

  ours, theirs = _Side('ours', folder, length), _Side('torch', folder, length)
  for _ in range(rounds):
    for task in tasks:
      ours.round(task)
      for peer in theirs.milliseconds:
        if peer.split(',')[0] == task:
          theirs.round(peer)
  print(f'\n{length} tokens: ms (median of {rounds} rounds), torch / ours, largest difference of what both say')
  for task in tasks:
    peers = [peer for peer in theirs.answers if peer.split(',')[0] == task]
    fastest = min(peers, key=theirs.median)
    (value, totals), (their_value, their_totals) = ours.answers[task], theirs.answers[fastest]
    difference = np.abs(np.array([value, *totals]) - np.array([their_value, *their_totals])).max()
    print(
      f'  {task:10} ours {ours.median(task):8.1f}   torch {theirs.median(fastest):8.1f} {fastest:18} '
      f'{theirs.median(fastest) / ours.median(task):5.2f}   {difference:.0e}'
    )
  ours.close()
  theirs.close()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--lengths', default='16,128')
  parser.add_argument('--tasks', default=','.join(TASKS))
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
    for length in map(int, args.lengths.split(',')):
      _compare(folder, length, args.rounds, args.tasks.split(','))


if __name__ == '__main__':
  main()
