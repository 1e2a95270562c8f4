"""Every recipe at three sparsities and three sizes, all trained on one pass over the activations of the embedded model.

Then `train.compare` sets them side by side. Sizes vary at the middle sparsity, sparsities at the middle size.
"""

from configs import recipes

KS = (8, 16, 32)
PENALTIES = {  # the field that makes a recipe sparser, and its values
  'relu': ('l1_coef', (2.0, 4.0, 8.0)),
  'relu_april': ('l1_coef', (2.0, 4.0, 8.0)),
  'prolu': ('l1_coef', (3.0, 4.0, 5.0)),
  'gated': ('l1_coef', (6.0, 8.0, 10.0)),
  'jumprelu': ('target_l0', (8.0, 16.0, 32.0)),
}
SIZES = (1024, 2048, 4096)


def get_config():
  config = recipes.get_config('topk')
  config.sae.tokens = 1_000_000
  sweep = []
  for recipe, own in recipes.OWN.items():
    field, values = PENALTIES.get(recipe, ('k', KS))
    common = {'recipe': recipe, **recipes.SHARED.get(recipe, {}), **own}
    pairs = [(SIZES[1], value) for value in values] + [(n, values[1]) for n in (SIZES[0], SIZES[2])]
    for n, value in pairs:
      override = {'name': f'{recipe},{field}={value:g},n={n}', **common, 'n_latents': n, field: value}
      if 'prefixes' in own:
        override['prefixes'] = (*own['prefixes'][:-1], n)
      sweep.append(override)
  config.sae.sweep = tuple(sweep)
  return config
