"""Writes tests/golden/llama, llama_tied: Llamas of random weights as `transformers` saves them, and what they compute.

The first has grouped heads, an unembedding of its own and an odd vocabulary; the second the scaled rotary frequencies
of Llama 3 and a tied embedding. Needs torch: `pip install torch==2.13.0 && python tests/golden/make_llama.py`.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
COMMON = {
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 3,
  'vocab_size': 101,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,  # so large that it matters
}
MODELS = {
  'llama': {
    'num_attention_heads': 6,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'tie_word_embeddings': False,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
  },
  'llama_tied': {
    'num_attention_heads': 3,
    'num_key_value_heads': 1,
    'head_dim': 16,
    'tie_word_embeddings': True,
    'max_position_embeddings': 64,
    # With this original context, one of the 8 frequencies is kept, one interpolated, and the others are divided by 8.
    'rope_parameters': {
      'rope_type': 'llama3',
      'rope_theta': 50000.0,
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32,
    },
  },
}


def random_llama(**sizes) -> transformers.LlamaForCausalLM:
  """Returns a LlamaForCausalLM in which every parameter, norms too, is random and of consequence."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | sizes)).eval()
  for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, mean='norm' in name, std=0.2)
  return model


def outputs(model: transformers.LlamaForCausalLM, tokens_bt: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the logits and every hidden state, under the names of our sites."""
  with torch.no_grad():
    out = model(torch.asarray(tokens_bt), output_hidden_states=True)
  n_layer = model.config.num_hidden_layers
  sites = ['resid.post_emb', *(f'h.{i}.resid.post_mlp' for i in range(n_layer - 1)), 'resid.post_ln_f']
  hidden = {site: x.numpy() for site, x in zip(sites, out.hidden_states, strict=True)}
  return {**hidden, 'logits': out.logits.numpy()}


if __name__ == '__main__':
  for name, sizes in MODELS.items():
    model = random_llama(**sizes)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / 'generation_config.json').unlink()
    tokens_bt = np.random.default_rng(0).integers(model.config.vocab_size, size=(3, 14))
    np.savez_compressed(FOLDER / name / 'expected.npz', tokens=tokens_bt, **outputs(model, tokens_bt))
