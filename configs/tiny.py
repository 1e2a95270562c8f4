"""The whole pipeline on a laptop CPU in minutes: the embedded model on the embedded text."""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.sae_name = ''  # or one of sae.sweep: --config.sae_name=NAME --workdir=WORKDIR/sweep/NAME
  config.mesh = {'data': 1, 'model': 1}
  config.last_stage = 'report'  # train.pipeline ends behind it: lm, capture, sae, evaluate, records, explain, report
  config.model = {
    'source': 'embedded',  # or 'trained' (what train.lm left), 'smollm2', a folder, a .gguf file, a hub id[@REVISION]
    'dtype': 'float32',  # or 'bfloat16', of parameters and activations
  }
  config.text = {
    'source': 'embedded',  # or .txt, .jsonl, .parquet files, their folder or glob, a Hugging Face dataset
    'field': 'text',
    'window': 64,
    'boundaries': 'packed',  # or 'padded': no window holds two documents
    'separator': 'eos',  # behind each document; or 'bos', 'none'
    'prepend_bos': False,  # to every window
    'shuffle': ml_collections.config_dict.placeholder(int),  # a seed
    'max_tokens': 0,  # of the train split; 0: all
    'near_duplicates': 0.0,  # or the similarity from which a window is left out, such as 0.8
  }
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
  config.capture = {
    'sites': ('h.2.resid.post_mlp',),
    'n_tokens': 1_000_000,
    'dtype': 'bfloat16',
    'batch_size': 32,
    'shard_examples': 1024,
    'store': '',  # workdir/activations, or a folder, gs://bucket/prefix, s3://bucket/prefix
  }
  config.sae = {
    'site': 'h.2.resid.post_mlp',
    'target_site': '',  # or a site that is reconstructed instead: a transcoder
    'sweep': (),  # or overrides, trained on one stream: ({'n_latents': 4096}, {'site': 'h.1.resid.post_mlp'})
    'source': 'store',  # or 'live': captured while training, stored nowhere
    'recipe': 'topk',  # or 'multi_topk'
    'n_latents': 2048,
    'k': 16,
    'normalization': 'layer_norm_std',  # or 'unit_norm', 'none'
    'auxk': 64,
    'auxk_coef': 1 / 32,
    'dead_tokens': 200_000,
    'tokens': 3_000_000,
    'batch_size': 4096,
    'buffer_examples': 2048,
    'learning_rate': 2e-3,
    'warmup_steps': 50,
    'adam_eps': 6.25e-10,
    'clip': 0.0,
    'ema': 0.99,
    'steps_per_dispatch': 4,
    'checkpoint_every': 250,
    'log_every': 10,
    'checkpoints': 2,  # the last ones that are kept, beside the one of the least normalized MSE
    'spike_factor': 5.0,  # stops at a loss so many times the median of the last 100 logged; 0: only if not finite
    'log_to': '',  # or 'tensorboard', 'wandb', beside metrics.jsonl
  }
  config.end_to_end = {  # of train.end_to_end, which goes on from the SAE
    'divergence': 'kl',  # or 'cross_entropy'
    'mse_coef': 0.1,
    'l1_coef': 0.0,
    'batch_size': 32,  # windows
    'steps': 500,
    'learning_rate': 1e-4,
    'warmup_steps': 20,
    'clip': 1.0,
    'checkpoint_every': 100,
  }
  config.evaluate = {'n_tokens': 65_536, 'batch_size': 16}
  config.records = {
    'n_windows': 8192,
    'n_top': 20,
    'n_random': 15,
    'n_quantile': 5,
    'neurons_layer': 2,
    'batch_size': 16,
  }
  config.explain = {
    'n_components': 64,  # latents, explained by every method that needs no language model
    'n_llm': 8,  # of them also by the language model
    'n_shown': 3,  # excerpts it is shown of each
    'n_llm_scored': 3,  # top excerpts it simulates of each, and as many random ones
  }
  config.llm = {
    'backend': 'auto',  # 'openai' where there is a key, else 'local', else 'none'
    'model': '',  # of the hosted server
    'gguf': '',  # file of the local model, SmolLM2-135M by default
    'concurrency': 2,
    'temperature': 0.0,
    'budget_usd': 1.0,
    'usd_per_million_prompt': ml_collections.config_dict.placeholder(float),  # where the price is not known
    'usd_per_million_completion': ml_collections.config_dict.placeholder(float),
  }
  config.report = {'n_components': 100}  # of each kind, beside those that are explained
  return config
