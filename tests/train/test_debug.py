"""train.debug on the embedded model: the story of the closing brackets, as docs/debugger.md tells it."""

import json

import jax
import numpy as np
import pytest

from configs import brackets
from models import pretrained, sharding
from train import debug


def config():
  found = brackets.get_config()
  found.debug.n_prompts, found.debug.k = 2, 3
  return found


@pytest.fixture(scope='module')
def answer(tmp_path_factory):
  """What the command leaves, of two prompts."""
  workdir = tmp_path_factory.mktemp('run')
  with jax.set_mesh(sharding.make_mesh()):
    debug.run(config(), workdir)
    assert (workdir / 'debug' / 'heads.png').stat().st_size > 1000
    debug.run(config(), workdir)  # done already
  return json.loads((workdir / 'debug' / 'answer.json').read_text())


def test_two_heads_carry_which_bracket_was_opened(answer):
  effects_lh = np.array(answer['measured_heads'])
  order = np.argsort(-np.abs(effects_lh), axis=None)
  layers, heads = np.unravel_index(order, effects_lh.shape)
  assert {(int(layer), int(head)) for layer, head in zip(layers[:2], heads[:2], strict=True)} == {(1, 4), (2, 2)}
  assert np.abs(effects_lh[layers[1], heads[1]]) > 2 * np.abs(effects_lh[layers[2], heads[2]])


def test_a_circuit_of_twenty_edges_does_what_the_model_does(answer):
  circuit = answer['circuit']
  assert (len(circuit['edges']), circuit['full'] > 2, circuit['empty'] < -2) == (20, True, True)
  assert 0.9 < circuit['faithfulness'] < 1.1
  assert circuit['completeness'] > 0.9
  edges = {(edge['writer'], edge['reader']) for edge in circuit['edges']}
  assert {('h.0.mlp', 'h.2.attn.2.v'), ('h.0.mlp', 'h.1.attn.4.v'), ('h.2.attn.2', 'logits')} <= edges


def test_every_answer_carries_its_request(answer):
  requests = answer['template']['request']['requests']
  assert len(requests) == len(answer['template']['objective']) == 2
  assert requests[0] == answer['circuit']['request']['request']
  nodes = answer['template']['nodes']
  assert len(nodes) == len(answer['template']['total_effect']) == len(answer['template']['direct_low'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'target': '{nobody}'}, 'nobody'),
    ({'n_prompts': 1}, 'debug.n_prompts is 1; give 2 or more'),
    ({'counterfactual': '>>> np.{function}({a}'}, 'must all have as many'),
    ({'fields': [{'names': ('function', 'a', 'b', 'c'), 'values': ('array', 'scaled_dot_product')}]}, 'give more'),
  ],
)
def test_bad_templates_are_told(change, message):
  settings = config().debug
  settings.update(change)
  with pytest.raises(ValueError, match=message):
    debug.prompts(settings, pretrained.load_tokenizer('embedded'), np.random.default_rng(0))


def test_prompts_are_drawn_by_the_seed_and_differ():
  settings, tokenizer = config().debug, pretrained.load_tokenizer('embedded')
  settings.n_prompts = 12
  draw = lambda seed: debug.prompts(settings, tokenizer, np.random.default_rng(seed))
  assert draw(0) == draw(0) != draw(1)
  assert len({one['prompt'] for one in draw(0)}) > 6
