"""Indirect objects (Wang et al. 2022): `Then, Mary and John went to the store. John gave a book to` -> ` Mary`.

The counterfactual names a third person in the second sentence, so that nothing tells which of the two is meant. Runs on
SmolLM2, a Llama that comes in a package; on GPT-2 small where the hub can be reached:
--config.model.source=openai-community/gpt2
"""

import ml_collections

NAMES = ' Mary', ' John', ' Tom', ' James', ' Dan', ' Martin', ' Amy', ' Paul', ' Anna', ' Kate', ' Mark', ' Alex'


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.mesh = {'data': 1, 'model': 1}
  config.model = {
    'source': 'smollm2',  # or any other GPT-2 or Llama, see configs/tiny.py
    'dtype': 'float32',
  }
  config.debug = {
    # Fields in braces are drawn, the values of one list all different; those of several tokens are left out.
    'template': '<|endoftext|>Then,{a} and{b} went to the{place}.{b} gave a{thing} to',
    'counterfactual': '<|endoftext|>Then,{a} and{b} went to the{place}.{c} gave a{thing} to',
    'target': '{a}',
    'distractor': '{b}',
    'fields': [
      {'names': ('a', 'b', 'c'), 'values': NAMES},
      {'names': ('place',), 'values': (' store', ' garden', ' school', ' station', ' office')},
      {'names': ('thing',), 'values': (' book', ' ring', ' drink', ' letter', ' ball')},
    ],
    'n_prompts': 8,
    'k': 10,  # nodes of each kind that are listed
    'n_edges': 100,  # of the circuit
    'steps': 5,  # of integrated gradients
  }
  return config
