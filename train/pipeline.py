"""The whole flow, from text to a report: every stage in order; what is done is skipped, what was stopped goes on.

--config.last_stage=capture, or another, ends it behind that stage.
"""

import json

from train import capture, command, evaluate, explain, lm, records, report, sae

STAGES = (lm, capture, sae, evaluate, records, explain, report)
HEADLINES = {
  'normalized_mse': 'normalized MSE',
  'explained_variance': 'explained variance',
  'l0': 'L0',
  'dead_latent_fraction': 'dead latents',
  'loss_recovered_zero': 'loss recovered (against zero ablation)',
  'loss_recovered_mean': 'loss recovered (against mean ablation)',
}


def _stages(config) -> list:
  """Returns the stages up to config.last_stage; a live SAE needs no stored activations."""
  names = [stage.__name__.removeprefix('train.') for stage in STAGES]
  last = config.get('last_stage', names[-1])
  if last not in names:
    raise ValueError(f'last_stage {last!r} is unknown; choose one of {", ".join(names)}')
  stages = STAGES[: names.index(last) + 1]
  return [stage for stage in stages if stage is not capture or config.sae.source == 'store' or last == 'capture']


def run(config, workdir):
  """Runs every stage that is not done, and prints what came out.

  Raises:
    ValueError: there is no such last stage; and as the stages.
  """
  stages = _stages(config)
  for number, stage in enumerate(stages, 1):
    print(f'[{number}/{len(stages)}] {stage.__name__}', flush=True)
    stage.run(config, workdir)
  if stages[-1] is STAGES[-1]:
    _print_summary(workdir)


def _print_summary(workdir):
  metrics = json.loads((workdir / 'evaluation' / 'metrics.json').read_text('utf-8'))
  summary = json.loads((workdir / 'explanations' / 'summary.json').read_text('utf-8'))
  print('\nThe autoencoder, on held-out text:')
  for name, words in HEADLINES.items():
    if metrics[name] is not None:
      print(f'  {words:40} {metrics[name]:8.4f}')
  print("Explanations, correlation of simulated with true activations (95 % interval; another latent's explanation):")
  for method, found in summary.items():
    null = found['nulls']['other_explanation'].get('ev_correlation')
    print(f'  {method:40} {_interval(found["scores"].get("ev_correlation"))}; {_interval(null)}')
  print(f"""
Look at it: open {workdir / 'report.html'} in a browser.
The same on GPT-2 small, explained by a hosted language model (needs a network, a key, and better an accelerator):
  OPENAI_API_KEY=... .venv/bin/python -m train.pipeline --config=configs/gpt2_small.py --workdir=runs/gpt2_small""")


def _interval(score: dict | None) -> str:
  return '{mean:.3f} ({low:.3f} to {high:.3f}, n = {n})'.format(**score) if score else 'not defined'


if __name__ == '__main__':
  command.main(run)
