"""Every recipe for sparse autoencoders on the tiny pipeline: --config=configs/recipes.py:gated, and so on.

What differs from configs/tiny.py is config.sae, which has the fields of that recipe and no others. The penalties are
for the embedded model at h.2.resid.post_mlp and as few steps; docs/recipes.md has the L0s that they and others lead to.
"""

from configs import tiny

OWN = {
  'topk': {'k': 16, 'auxk': 64, 'auxk_coef': 1 / 32},  # Gao et al. 2024
  'multi_topk': {'k': 16, 'auxk': 64, 'auxk_coef': 1 / 32},  # L(k) + L(4k) / 8, of the same
  'batch_topk': {'k': 16, 'auxk': 64, 'auxk_coef': 1 / 32},  # Bussmann et al. 2024
  'matryoshka': {'k': 16, 'auxk': 64, 'auxk_coef': 1 / 32, 'prefixes': (128, 512, 2048)},  # Bussmann et al. 2025
  'relu': {  # Bricken et al. 2023
    'l1_coef': 4.0,
    'l1_warmup_steps': 50,
    'resample_every': 200,  # steps
    'resample_until': 500,
    'resample_exponent': 2.0,  # of the loss, in the probability of an input
  },
  'relu_april': {'l1_coef': 4.0, 'l1_warmup_steps': 40},  # Anthropic's update of April 2024
  'prolu': {'l1_coef': 4.0, 'gradient': 'ste'},  # Taggart 2024; or 'relu'
  'gated': {'l1_coef': 4.0, 'resample_every': 0, 'resample_until': 0, 'resample_exponent': 2.0},  # Rajamanoharan 2024a
  'jumprelu': {  # Rajamanoharan et al. 2024b
    'coef': 100.0,
    'sparsity': 'target',  # or 'l0'; 'tanh' as Anthropic in January 2025
    'bandwidth': 0.2,
    'coef_warmup_steps': 50,
    'target_l0': 16.0,
    'initial_threshold': 0.3,
    'threshold_rate': 30.0,  # times the learning rate, by about which Adam moves a weight a step
  },
}


SHARED = {  # of the fields that all recipes have, where a recipe wants another value than configs/tiny.py
  'relu': {'ema': 0.0},  # would average weights from before and after a resampling
  'relu_april': {
    'ema': 0.0,
    'normalization': 'expected_average',
    'clip': 1.0,
    'decay': 'linear',
    'decay_fraction': 0.2,
  },
}


def get_config(recipe='topk'):
  config = tiny.get_config()
  for field in OWN['topk']:
    del config.sae[field]
  config.sae.recipe = recipe
  config.sae.update(SHARED.get(recipe, {}))
  config.sae.update(OWN[recipe])
  return config
