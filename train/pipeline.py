"""The whole flow, from text to a report: every stage in order; what is done is skipped, what was stopped goes on."""

import json

from train import capture, command, evaluate, explain, lm, records, report, sae

STAGES = (lm, capture, sae, evaluate, records, explain, report)


def run(config, workdir):
  """Runs every stage that is not done, and prints what came out."""
  for stage in STAGES:
    print(f'{stage.__name__}: ', end='', flush=True)
    stage.run(config, workdir)
  _print_summary(workdir)


def _print_summary(workdir):
  metrics = json.loads((workdir / 'evaluation' / 'metrics.json').read_text('utf-8'))
  summary = json.loads((workdir / 'explanations' / 'summary.json').read_text('utf-8'))
  print(metrics, summary)


if __name__ == '__main__':
  command.main(run)
