"""Closing brackets, on the embedded model: `>>> np.zeros(1, 2` -> `)`, and `])` where the bracket is `([`."""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.mesh = {'data': 1, 'model': 1}
  config.model = {'source': 'embedded', 'dtype': 'float32'}
  config.debug = {
    # Fields in braces are drawn, the values of one list all different; those of several tokens are left out.
    'template': '>>> np.{function}({a},{b},{c}',
    'counterfactual': '>>> np.{function}([{a},{b},{c}',
    'target': ')',
    'distractor': '])',
    'fields': [
      {'names': ('function',), 'values': ('array', 'zeros', 'ones', 'sum', 'max', 'mean')},
      {'names': ('a',), 'values': ('0', '1', '2', '3', '4', '5')},
      {'names': ('b', 'c'), 'values': (' 0', ' 1', ' 2', ' 3', ' 4', ' 5')},
    ],
    'n_prompts': 16,
    'k': 10,  # nodes of each kind that are listed
    'n_edges': 20,  # of the circuit
    'steps': 5,  # of integrated gradients
  }
  return config
