"""Every recipe at several sparsities, all trained on one pass over the activations of the embedded model.

Then `train.compare` sets them side by side. TopK is also trained with other numbers of latents. Penalties span L0s from
some 8 to 32, as k does.
"""

from configs import recipes

KS = (8, 16, 32)
PENALTIES = {  # the field that makes a recipe sparser, and its values
  'relu': ('l1_coef', (1.0, 2.0, 4.0)),
  'relu_april': ('l1_coef', (2.0, 4.0, 8.0)),
  'prolu': ('l1_coef', (1.0, 2.0, 4.0)),
  'gated': ('l1_coef', (3.0, 6.0, 12.0)),
  'jumprelu': ('target_l0', (8.0, 16.0, 32.0)),
}


def get_config():
  config = recipes.get_config('topk')
  config.sae.tokens = 1_000_000
  sweep = [{'recipe': 'topk', 'n_latents': n, 'k': 16} for n in (512, 1024, 4096)]
  for recipe in ('topk', 'multi_topk', 'batch_topk', 'matryoshka'):
    sweep += [{'recipe': recipe, **recipes.OWN[recipe], 'k': k} for k in KS]
  for recipe, (field, values) in PENALTIES.items():
    own = recipes.SHARED.get(recipe, {}) | recipes.OWN[recipe]
    sweep += [{'recipe': recipe, **own, field: value} for value in values]
  config.sae.sweep = tuple({'name': _name(override), **override} for override in sweep)
  return config


def _name(override):
  field = PENALTIES.get(override['recipe'], ('k',))[0]
  return f'{override["recipe"]},{field}={override[field]:g},n={override.get("n_latents", 2048)}'
