import json

import ml_collections
import pytest

from train import command, pipeline

CONFIG = ml_collections.ConfigDict({'sae': {'source': 'store'}})


class _Stage:
  """A stage that notes that it ran, and leaves what the summary reads."""

  def __init__(self, name, ran, stops=False):
    self.__name__, self._ran, self._stops = name, ran, stops

  def run(self, config, workdir):
    self._ran.append(self.__name__)
    if self._stops:
      raise command.Stopped('half of it is saved')
    (workdir / 'evaluation').mkdir(exist_ok=True)
    (workdir / 'evaluation' / 'metrics.json').write_text(
      json.dumps(dict.fromkeys(pipeline.HEADLINES, 0.25) | {'l0': None})
    )
    null = {'ev_correlation': {'mean': 0.01, 'low': -0.1, 'high': 0.1, 'n': 5}}
    scores = {'ev_correlation': {'mean': 0.5, 'low': 0.4, 'high': 0.6, 'n': 6}}
    methods = {'token_lookup': {'scores': scores, 'nulls': {'other_explanation': null}}}
    methods['neuron2graph'] = {'scores': {}, 'nulls': {'other_explanation': {}}}
    (workdir / 'explanations').mkdir(exist_ok=True)
    (workdir / 'explanations' / 'summary.json').write_text(json.dumps(methods))


def test_stages_run_in_order_and_the_summary_tells_what_came_out(tmp_path, monkeypatch, capsys):
  ran = []
  monkeypatch.setattr(pipeline, 'STAGES', [_Stage(name, ran) for name in 'abc'])
  pipeline.run(CONFIG, tmp_path)
  assert ran == ['a', 'b', 'c']
  out = capsys.readouterr().out
  assert 'normalized MSE                             0.2500' in out
  assert '0.500 (0.400 to 0.600, n = 6); 0.010 (-0.100 to 0.100, n = 5)' in out
  assert 'not defined; not defined' in out
  assert str(tmp_path / 'report.html') in out


def test_it_ends_behind_the_last_stage_that_is_asked_for(tmp_path, monkeypatch, capsys):
  ran = []
  monkeypatch.setattr(pipeline, 'STAGES', [_Stage(name, ran) for name in 'abc'])
  pipeline.run(ml_collections.ConfigDict({**CONFIG, 'last_stage': 'b'}), tmp_path)
  assert ran == ['a', 'b']
  assert 'report.html' not in capsys.readouterr().out
  with pytest.raises(ValueError, match="last_stage 'd' is unknown; choose one of a, b, c"):
    pipeline.run(ml_collections.ConfigDict({**CONFIG, 'last_stage': 'd'}), tmp_path)


def test_a_stage_that_stops_stops_the_pipeline(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(pipeline, 'STAGES', [_Stage('a', ran), _Stage('b', ran, stops=True), _Stage('c', ran)])
  with pytest.raises(command.Stopped):
    pipeline.run(CONFIG, tmp_path)
  assert ran == ['a', 'b']


def test_every_command_is_a_stage_in_the_order_of_the_flow():
  names = [stage.__name__.removeprefix('train.') for stage in pipeline.STAGES]
  assert names == ['lm', 'capture', 'sae', 'evaluate', 'records', 'explain', 'report']
