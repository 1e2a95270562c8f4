"""GPT-2 small, layer 8, 32,768 latents, 32 of them active: the setting of Gao et al. 2024, for one accelerator.

The embedded text is a start; give a corpus of your own with --config.text.source=corpus.jsonl, or one of the hub with
--config.text.source=HuggingFaceFW/fineweb:sample-10BT --config.text.max_tokens=50_000_000.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.sae_name = ''  # or one of sae.sweep
  config.mesh = {'data': 1, 'model': 1}
  config.last_stage = 'report'  # train.pipeline ends behind it: lm, capture, sae, evaluate, records, explain, report
  config.model = {
    'source': 'openai-community/gpt2',  # a hub id[@REVISION], or a folder
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
  config.capture = {
    'sites': ('h.8.resid.post_mlp',),
    'n_tokens': 2_000_000,
    'dtype': 'bfloat16',
    'batch_size': 32,
    'shard_examples': 1024,
    'store': '',  # workdir/activations, or a folder, gs://bucket/prefix, s3://bucket/prefix
  }
  config.sae = {
    'site': 'h.8.resid.post_mlp',
    'target_site': '',
    'sweep': (),
    'source': 'store',  # or 'live': captured while training, stored nowhere
    'recipe': 'topk',  # or 'multi_topk'
    'n_latents': 32_768,
    'k': 32,
    'normalization': 'layer_norm_std',  # or 'unit_norm', 'none'
    'auxk': 512,
    'auxk_coef': 1 / 32,
    'dead_tokens': 10_000_000,
    'tokens': 50_000_000,
    'batch_size': 8192,
    'buffer_examples': 4096,
    'learning_rate': 1.4e-4,
    'warmup_steps': 500,
    'adam_eps': 6.25e-10,
    'clip': 0.0,
    'ema': 0.999,
    'steps_per_dispatch': 4,
    'checkpoint_every': 500,
    'log_every': 10,
    'checkpoints': 2,
    'spike_factor': 5.0,
    'log_to': '',
  }
  config.evaluate = {'n_tokens': 65_536, 'batch_size': 16}
  config.records = {
    'n_windows': 8192,
    'n_top': 20,
    'n_random': 15,
    'n_quantile': 5,
    'neurons_layer': 8,
    'batch_size': 16,
  }
  config.explain = {
    'n_components': 64,  # latents, explained by every method that needs no language model
    'n_llm': 64,  # of them also by the language model
    'n_shown': 5,  # excerpts it is shown of each
    'n_llm_scored': 5,  # top excerpts it simulates of each, and as many random ones
  }
  config.llm = {
    'backend': 'auto',  # 'openai' where there is a key, else 'local', else 'none'
    'model': '',  # of the hosted server
    'gguf': '',  # file of the local model, SmolLM2-135M by default
    'concurrency': 8,
    'temperature': 0.0,
    'budget_usd': 5.0,
    'usd_per_million_prompt': ml_collections.config_dict.placeholder(float),  # where the price is not known
    'usd_per_million_completion': ml_collections.config_dict.placeholder(float),
  }
  config.report = {'n_components': 100}  # of each kind, beside those that are explained
  return config
