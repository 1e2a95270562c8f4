"""16,777,216 latents on activations 12,288 wide: the largest autoencoder of Gao et al. 2024, to plan for, not to run.

    python -m train.plan --config=configs/gpt4_16m.py --mesh=1x512

The subject model, GPT-4, is not public, and so neither is its width. From the paper: n_latents, TopK and AuxK with
coefficient 1/32, latents dead after 10M tokens, the batch of 131,072 tokens, an EMA of 0.999, clipping of gradients,
40 billion tokens, latents over 512 shards. Assumed: the width, that of GPT-3 175B; k, of which the paper has several;
auxk, by its rule a power of two near width / 2; the learning rate, by the rule 2e-4 / sqrt(n_latents / 2^14).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.mesh = {'data': 1, 'model': 512}
  config.plan = {'widths': (12_288,)}  # of the activations, as there is no subject model to ask
  config.capture = {'dtype': 'bfloat16'}
  config.sae = {
    'site': 'resid',
    'recipe': 'topk',
    'n_latents': 16_777_216,
    'k': 128,
    'normalization': 'unit_norm',
    'auxk': 4096,
    'auxk_coef': 1 / 32,
    'dead_tokens': 10_000_000,
    'compute_dtype': 'float32',  # or 'bfloat16', which chooses the same latents; 'auto' measures
    'kernels': 'sparse',  # of a token's 128 winners a shard has some 10 at most: 'dense' would multiply by all 32,768
    'tokens': 40_000_000_000,
    'batch_size': 131_072,
    'micro_batches': 16,  # an array of all tokens is 6.4 GB on a device
    'learning_rate': 0.0,  # by the rule
    'warmup_steps': 1000,
    'clip': 1.0,
    'ema': 0.999,
    'steps_per_dispatch': 1,
  }
  return config
