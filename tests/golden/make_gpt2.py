"""Writes tests/golden/gpt2: a GPT-2 of random weights as `transformers` saves it, and what it computes.

Needs torch: `pip install torch==2.13.0 && python tests/golden/make_gpt2.py`.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / 'gpt2'


def random_gpt2(**sizes) -> transformers.GPT2LMHeadModel:
  """Returns a GPT2LMHeadModel in which every parameter, biases and norms too, is random and of consequence."""
  torch.manual_seed(0)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
  for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, mean='ln_' in name and name.endswith('weight'), std=0.2)
  return model


def outputs(model: transformers.GPT2LMHeadModel, tokens_bt: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the logits and every hidden state, under the names of our sites."""
  with torch.no_grad():
    out = model(torch.asarray(tokens_bt), output_hidden_states=True)
  n_layer = model.config.n_layer
  sites = ['resid.post_emb', *(f'h.{i}.resid.post_mlp' for i in range(n_layer - 1)), 'resid.post_ln_f']
  hidden = {site: x.numpy() for site, x in zip(sites, out.hidden_states, strict=True)}
  return {**hidden, 'logits': out.logits.numpy()}


if __name__ == '__main__':
  model = random_gpt2(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101)
  model.save_pretrained(FOLDER)
  (FOLDER / 'generation_config.json').unlink()
  tokens_bt = np.random.default_rng(0).integers(101, size=(6, 20))
  np.savez_compressed(FOLDER / 'expected.npz', tokens=tokens_bt, **outputs(model, tokens_bt))
