"""The whole pipeline on a laptop CPU in minutes: the embedded model on the embedded text."""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.mesh = {'data': 1, 'model': 1}
  config.model = {'source': 'embedded'}  # or 'trained' (what train.lm left), a folder, a hub id
  config.text = {'source': 'embedded', 'window': 64}
  config.lm = {
    'n_layer': 4,
    'n_head': 6,
    'd_model': 192,
    'n_ctx': 128,
    'n_vocab': 4096,
    'batch_size': 32,
    'steps': 6000,
    'steps_per_dispatch': 10,
    'learning_rate': 3e-3,
    'warmup_steps': 200,
    'weight_decay': 0.2,
    'checkpoint_every': 500,
  }
  return config
