import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import gpt2, sharding, sites

CONFIG = gpt2.GPT2Config(n_layer=3, n_head=4, d_model=32, n_ctx=16, n_vocab=53)
SITE = 'h.1.mlp.post_act'
TOKENS = np.random.default_rng(0).integers(53, size=(4, 12)).astype(np.int32)


@pytest.fixture
def model(mesh):
  model = gpt2.GPT2(CONFIG, nnx.Rngs(0))
  # Larger weights than at initialisation, so that no effect drowns in rounding.
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model)


def _loss(logits_btv, acts):
  return logits_btv[:, -1, 3].sum() - logits_btv[:, -1, 5].sum()


def test_gradients_equal_finite_differences(model):
  value, acts, grads = sites.acts_and_grads(model, TOKENS, _loss, (SITE,))
  at, step = (2, 5, 17), 1e-2

  def shifted(delta):
    patched = acts[SITE].at[at].add(delta)
    return _loss(sites.forward(model, TOKENS, [sites.patch(SITE, patched)])[0], None)

  np.testing.assert_allclose((shifted(step) - shifted(-step)) / (2 * step), grads[SITE][at], rtol=2e-2, atol=1e-3)
  np.testing.assert_allclose(shifted(0.0), value, rtol=1e-5)


def test_the_direct_effect_is_the_write_vector_on_the_final_gradient(model):
  final = 'h.2.resid.post_mlp'
  held = [sites.stop('h.*.attn.v_out'), sites.stop('h.*.mlp.post_act')]
  _, acts, grads = sites.acts_and_grads(model, TOKENS, _loss, (SITE, final), held)
  write_btnd = acts[SITE][..., None] * model.h[1].mlp.c_proj.kernel[...]
  expected_btn = jnp.einsum('btnd,btd->btn', write_btnd, grads[final])
  np.testing.assert_allclose(acts[SITE] * grads[SITE], expected_btn, rtol=1e-3, atol=1e-5)


def test_an_edge_with_frozen_norms_and_patterns_equals_the_measured_intervention(model):
  # With attention patterns, norm scales and other neurons held, a later pre-activation is linear in an earlier neuron.
  source, target, later = 'h.0.mlp.post_act', 'h.2.mlp.pre_act', (1, 9, 20)
  frozen = [sites.stop(site) for site in ('h.*.attn.qk_probs', 'h.*_ln.scale', 'h.*.mlp.post_act')]
  _, acts, grads = sites.acts_and_grads(
    model, TOKENS, lambda logits_btv, acts: acts[target][later], (source, target), frozen
  )
  names = [f'h.{i}.{name}' for i in range(3) for name in ('attn.qk_probs', 'attn_ln.scale', 'mlp_ln.scale')]
  held = sites.forward(model, TOKENS, capture=(*names, 'h.1.mlp.post_act'))[1]
  edits = [sites.patch(site, x) for site, x in held.items()]
  node = (1, 6, 11)
  mask = jnp.zeros(acts[source].shape, bool).at[node].set(True)
  ablated = sites.forward(model, TOKENS, [*edits, sites.ablate(source, mask)], capture=(target,))[1]
  expected = acts[target][later] - ablated[target][later]
  np.testing.assert_allclose(acts[source][node] * grads[source][node], expected, rtol=1e-3, atol=1e-6)


def test_edits_at_one_site_apply_in_order_and_before_the_probe(model):
  ones = jnp.ones(32)
  edits = [
    sites.steer('resid.post_emb', ones),
    sites.ablate('resid.post_emb', True),
    sites.steer('resid.post_emb', 2 * ones),
  ]
  probes = {'resid.post_emb': jnp.full((4, 12, 32), 0.5)}
  _, acts = sites.forward(model, TOKENS, edits, probes, ('resid.post_emb',))
  np.testing.assert_array_equal(acts['resid.post_emb'], np.full((4, 12, 32), 2.5))


class _Dictionary(nnx.Module):
  """The least an SAE is to `splice`: an encoder and a decoder that do not invert each other."""

  def __init__(self):
    self.encoder_ld = nnx.Param(jax.random.normal(jax.random.key(1), (64, 32)))

  def encode(self, x):
    return jax.nn.relu(x @ self.encoder_ld[...].T), x.mean(-1, keepdims=True)

  def decode(self, latents, norm):
    return latents @ self.encoder_ld[...] * 0.01 + norm


def test_an_sae_spliced_in_changes_no_logit_and_adds_its_sites(model):
  site = 'h.1.resid.post_mlp'
  clean_btv, _ = sites.forward(model, TOKENS)
  edits = [sites.splice(site, _Dictionary())]
  _, acts, grads = sites.acts_and_grads(model, TOKENS, _loss, (f'{site}.latents', f'{site}.error', 'logits'), edits)
  np.testing.assert_allclose(acts['logits'], clean_btv, atol=1e-5, rtol=1e-5)
  assert acts[f'{site}.latents'].shape == (4, 12, 64)
  assert float(jnp.abs(grads[f'{site}.latents']).max()) > 0


def test_new_values_do_not_retrace(model):
  mask = np.zeros((4, 12, 128), bool)
  sites.forward(model, TOKENS, [sites.ablate(SITE, mask)])
  before = sites._forward._cache_size()
  sites.forward(model, (TOKENS + 1) % 53, [sites.ablate(SITE, ~mask)])
  assert sites._forward._cache_size() == before


@pytest.mark.parametrize(
  'misspelt', [{'capture': ('h.1.mlp.post_acts',)}, {'edits': [sites.stop('h.1.mlp.post_acts')]}]
)
def test_a_misspelt_site_raises_with_the_nearest_names(model, misspelt):
  with pytest.raises(KeyError, match=r'no site matches .*post_acts.*; the nearest are h\.1\.mlp\.post_act'):
    sites.forward(model, TOKENS, **misspelt)


def test_sharded_equals_one_device():
  def run(data, model_axis):
    with jax.set_mesh(sharding.make_mesh(data, model_axis)):
      model = gpt2.GPT2(CONFIG, nnx.Rngs(0))
      return jax.device_get(sites.acts_and_grads(model, TOKENS, _loss, ('h.*.attn.v_out', SITE)))

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), run(1, 1), run(2, 2))
