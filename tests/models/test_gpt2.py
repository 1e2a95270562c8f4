import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import gpt2, pretrained, sharding, sites

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'gpt2'
HIDDEN = ('resid.post_emb', 'h.*.resid.post_mlp', 'resid.post_ln_f', 'logits')


def test_logits_and_hidden_states_equal_those_of_transformers(mesh):
  expected = dict(np.load(GOLDEN / 'expected.npz'))
  tokens_bt = sharding.place(expected.pop('tokens').astype(np.int32), 'batch token')
  logits_btv, acts = sites.forward(pretrained.load_model(str(GOLDEN)), tokens_bt, capture=HIDDEN)
  assert set(acts) == {*expected, 'h.2.resid.post_mlp'}  # transformers gives the last block's output after the norm
  for site, x in expected.items():
    np.testing.assert_allclose(acts[site], x, atol=1e-4, rtol=1e-4, err_msg=site)  # float32 sums in another order
  np.testing.assert_array_equal(logits_btv, acts['logits'])


@pytest.mark.parametrize('prefix', ['transformer.', ''])
def test_live_parity_with_transformers_where_torch_is_there(mesh, tmp_path, prefix):
  pytest.importorskip('torch', reason='torch is not installed; the golden files stand for it')
  import safetensors.torch

  from tests.golden import make_gpt2

  theirs = make_gpt2.random_gpt2(n_layer=2, n_head=6, n_embd=48, n_positions=32, vocab_size=307)
  theirs.config.save_pretrained(tmp_path)
  safetensors.torch.save_file(
    {prefix + name: x.contiguous() for name, x in theirs.transformer.state_dict().items()},
    tmp_path / 'model.safetensors',
  )
  tokens_bt = np.random.default_rng(1).integers(307, size=(4, 32))
  expected = make_gpt2.outputs(theirs, tokens_bt)
  _, acts = sites.forward(pretrained.load_model(str(tmp_path)), tokens_bt, capture=tuple(expected))
  for site, x in expected.items():
    np.testing.assert_allclose(acts[site], x, atol=1e-4, rtol=1e-4, err_msg=site)


def test_every_site_of_the_design_is_tapped_once_with_its_shape(mesh):
  config = gpt2.GPT2Config(n_layer=2, n_head=4, d_model=32, n_ctx=16, n_vocab=53)
  model = gpt2.GPT2(config, nnx.Rngs(0))
  b, t, h, c, d, n = 2, 7, 4, 8, 32, 128
  layer = {
    'attn_ln.scale': (b, t, 1),
    **{f'attn.{name}': (b, t, h, c) for name in ('q', 'k', 'v', 'v_out')},
    **{f'attn.{name}': (b, h, t, t) for name in ('qk_logits', 'qk_probs')},
    **{f'resid.{name}': (b, t, d) for name in ('delta_attn', 'post_attn', 'delta_mlp', 'post_mlp')},
    'mlp_ln.scale': (b, t, 1),
    'mlp.pre_act': (b, t, n),
    'mlp.post_act': (b, t, n),
  }
  expected = {'resid.post_emb': (b, t, d), 'ln_f.scale': (b, t, 1), 'resid.post_ln_f': (b, t, d), 'logits': (b, t, 53)}
  expected |= {f'h.{i}.{name}': shape for i in range(2) for name, shape in layer.items()}
  shapes = sites.site_shapes(model, np.zeros((b, t), np.int32), ('*',))
  assert {site: x.shape for site, x in shapes.items()} == expected


def test_a_kernel_is_sharded_over_the_model_axis(mesh):
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=4, d_model=32, n_vocab=53), nnx.Rngs(0))
  shard = model.h[0].mlp.c_fc.kernel[...].addressable_shards[0].data
  assert shard.shape == (32, 128 // mesh.shape['model'])


def test_an_early_capture_drops_the_later_layers(mesh):
  config = gpt2.GPT2Config(n_layer=8, n_head=4, d_model=32, n_ctx=16, n_vocab=53)
  model = gpt2.GPT2(config, nnx.Rngs(0))
  tokens_bt = np.zeros((2, 16), np.int32)

  def flops(site):
    compiled = jax.jit(lambda model, tokens_bt: sites.forward(model, tokens_bt, capture=(site,))[1])
    return compiled.lower(model, tokens_bt).compile().cost_analysis()['flops']

  assert flops('h.1.resid.post_mlp') < 0.4 * flops('h.7.resid.post_mlp')


@pytest.mark.parametrize(
  ('name', 'n_parameters'),
  [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168), ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)],
)
def test_every_size_has_as_many_parameters_as_the_released_checkpoint(name, n_parameters):
  with jax.set_mesh(sharding.make_mesh()):
    model = jax.eval_shape(lambda: gpt2.GPT2(gpt2.SIZES[name], nnx.Rngs(0)))  # allocates nothing
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == n_parameters


def test_promoted_logits_are_what_a_write_adds_to_the_logits_at_a_frozen_norm(mesh):
  model = pretrained.load_model(str(GOLDEN))
  rng = np.random.default_rng(0)
  tokens_bt = sharding.place(rng.integers(101, size=(2, 5)).astype(np.int32), 'batch token')
  write_nd = rng.normal(1, 1, size=(3, 32)).astype(np.float32)  # of a mean that the norm takes away

  def run(write_d):
    edits = [sites.steer('h.2.resid.post_mlp', write_d), sites.stop('ln_f.scale')]
    return sites.forward(model, tokens_bt, edits, capture=('ln_f.scale',))

  for write_d, promoted_v in zip(write_nd, model.promoted_logits(write_nd), strict=True):
    (_, acts), (added_btv, _) = jax.jvp(run, (jnp.zeros(32),), (write_d,))
    expected_btv = np.broadcast_to(promoted_v, added_btv.shape)
    np.testing.assert_allclose(added_btv * acts['ln_f.scale'], expected_btv, atol=1e-4)  # float32 sums of 32 terms


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (gpt2.GPT2Config(n_layer=1, n_head=3, d_model=32), 'd_model 32 is not divisible by n_head 3'),
    (gpt2.GPT2Config(n_layer=1, n_head=5, d_model=5), 'n_neurons 20 is not divisible by the model axis 8'),
  ],
)
def test_sizes_that_do_not_divide_raise(config, message):
  with jax.set_mesh(sharding.make_mesh(1, 8)), pytest.raises(ValueError, match=message):
    gpt2.GPT2(config, nnx.Rngs(0))


def test_a_window_longer_than_the_context_raises(mesh):
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=4, d_model=32, n_ctx=8, n_vocab=53), nnx.Rngs(0))
  with pytest.raises(ValueError, match='9 tokens are longer than the context of 8'):
    sites.forward(model, np.zeros((2, 9), np.int32))


def test_a_mesh_larger_than_the_machine_raises():
  with pytest.raises(ValueError, match='a mesh of 16x4 needs 64 devices'):
    sharding.make_mesh(16, 4)
