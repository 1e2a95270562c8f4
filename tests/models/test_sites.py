import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sae, sharding, sites
from tests.models import families

SITE = 'h.1.mlp.post_act'
TOKENS = np.random.default_rng(0).integers(53, size=(4, 12)).astype(np.int32)


@pytest.fixture(params=['gpt2', 'odd_llama'])
def model(mesh, request):
  return families.build(request.param)


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
  d = model.config.d_model
  ones = jnp.ones(d)
  edits = [
    sites.steer('resid.post_emb', ones),
    sites.ablate('resid.post_emb', True),
    sites.steer('resid.post_emb', 2 * ones),
  ]
  probes = {'resid.post_emb': jnp.full((4, 12, d), 0.5)}
  _, acts = sites.forward(model, TOKENS, edits, probes, ('resid.post_emb',))
  np.testing.assert_array_equal(acts['resid.post_emb'], np.full((4, 12, d), 2.5))


def dictionary(model):
  """Returns a TopK SAE of the model's residual stream; untrained, so that its error is large."""
  d = model.config.d_model
  return sae.init_sae(jax.random.key(1), jax.random.normal(jax.random.key(2), (64, d)), 64, 4, 'layer_norm_std')


def test_an_sae_spliced_in_changes_no_logit_and_adds_its_sites(model):
  site = 'h.1.resid.post_mlp'
  clean_btv, _ = sites.forward(model, TOKENS)
  edits = [sites.splice(site, dictionary(model))]
  _, acts, grads = sites.acts_and_grads(model, TOKENS, _loss, (f'{site}.latents', f'{site}.error', 'logits'), edits)
  np.testing.assert_allclose(acts['logits'], clean_btv, atol=1e-5, rtol=1e-5)
  assert acts[f'{site}.latents'].shape == (4, 12, 64)
  assert float(jnp.abs(acts[f'{site}.error']).max()) > 0.1
  assert float(jnp.abs(grads[f'{site}.latents']).max()) > 0


def test_a_transcoder_is_not_spliced_in_where_it_reads(model):
  sample_bd = np.random.default_rng(0).normal(size=(64, model.config.d_model)).astype(np.float32)
  plain = sae.init_sae(jax.random.key(1), sample_bd, 64, 4)
  transcoder = sae.as_transcoder(jax.random.key(3), plain, sample_bd)
  with pytest.raises(ValueError, match=r'a transcoder writes another site than h.1.resid.post_attn'):
    sites.splice('h.1.resid.post_attn', transcoder)


@pytest.mark.parametrize('changed', [False, True])
def test_gradients_of_latents_are_those_of_what_they_write_whether_edits_change_them_or_not(model, changed):
  site, mask = 'h.1.resid.post_mlp', np.arange(64) % 2 == 0
  edits = [sites.splice(site, dictionary(model), hold_error=False)]
  edits += [sites.ablate(f'{site}.latents', mask)] if changed else []
  _, acts, grads = sites.acts_and_grads(model, TOKENS, _loss, (site, f'{site}.input', f'{site}.latents'), edits)
  scale = dictionary(model).normalize(acts[f'{site}.input'])[1].scale
  written_btl = np.asarray(grads[site] * scale, np.float64) @ np.asarray(dictionary(model).decoder[...].T, np.float64)
  np.testing.assert_allclose(grads[f'{site}.latents'], written_btl, atol=1e-5 * np.abs(written_btl).max())
  if not changed:  # upstream, gradients are those without the SAE
    np.testing.assert_allclose(grads[f'{site}.input'], grads[site], atol=1e-5)


def test_a_latent_is_ablated_and_patched_where_the_mask_says(model):
  # Far from the logits the effect of a latent is its write vector, undone by the SAE's input normalisation.
  site, spliced = 'h.1.resid.post_mlp', sites.splice('h.1.resid.post_mlp', dictionary(model))
  latents = sites.forward(model, TOKENS, [spliced], capture=(f'{site}.latents',))[1][f'{site}.latents']
  clean_btd = sites.forward(model, TOKENS, capture=(site,))[1][site]
  b, t, latent = np.argwhere(np.asarray(latents) > 0)[5]
  mask = np.zeros((4, 12, 64), bool)
  mask[b, t, latent] = True
  scale = dictionary(model).normalize(clean_btd)[1].scale
  write_d = scale[b, t] * dictionary(model).decoder[...][latent]
  for edit, delta in [
    (sites.ablate(f'{site}.latents', mask), -latents[b, t, latent]),
    (sites.patch(f'{site}.latents', 3.0, mask), 3.0 - latents[b, t, latent]),
  ]:
    changed_btd = sites.forward(model, TOKENS, [spliced, edit], capture=(site,))[1][site]
    expected_btd = np.array(clean_btd)
    expected_btd[b, t] += delta * write_d
    np.testing.assert_allclose(changed_btd, expected_btd, atol=1e-4)


def test_masks_choose_tokens_heads_and_neurons(model):
  rng, config = np.random.default_rng(3), model.config
  names = ('h.0.resid.post_mlp', 'h.1.attn.v_out', 'h.1.mlp.post_act', 'h.2.attn.qk_probs')
  tokens, heads, neurons, pairs = names
  shapes = (12, 1), (4, 12, config.n_head, 1), (4, 12, config.n_neurons), (config.n_head, 12, 12)
  mask = {site: rng.random(shape) < 0.5 for site, shape in zip(names, shapes, strict=True)}
  clean = sites.forward(model, TOKENS, capture=names)[1]
  value = rng.normal(size=(4, 12, config.n_neurons)).astype(np.float32)
  for site, edits, expected in [
    (tokens, [sites.steer(tokens, value[..., :1], mask[tokens])], clean[tokens] + value[..., :1]),
    (heads, [sites.ablate(heads, mask[heads])], 0),
    (neurons, [sites.patch(neurons, value, mask[neurons])], value),
    (pairs, [sites.stop(pairs, mask[pairs])], clean[pairs]),
  ]:
    found = sites.forward(model, TOKENS, edits, capture=(site,))[1][site]
    np.testing.assert_allclose(found, np.where(mask[site], expected, clean[site]), atol=1e-5)


def test_an_sae_is_spliced_in_where_the_mask_says(model):
  site, mask = 'h.1.resid.post_mlp', np.random.default_rng(3).random((4, 12, 1)) < 0.5
  edits = lambda mask: [sites.splice(site, dictionary(model), mask), sites.ablate(f'{site}.latents', True)]
  none, half, all_ = (
    sites.forward(model, TOKENS, edits(m), capture=(site,))[1][site] for m in (mask & False, mask, mask | True)
  )
  np.testing.assert_allclose(none, sites.forward(model, TOKENS, capture=(site,))[1][site], atol=1e-5)
  np.testing.assert_array_equal(half, np.where(mask, all_, none))
  assert float(jnp.abs(all_ - none).max()) > 0.1


def test_stop_with_a_mask_cuts_the_paths_of_those_nodes_alone(model):
  # Upstream of a site that is stopped where the mask says, the gradient is that of the other nodes' paths.
  site, source = 'h.1.mlp.post_act', 'h.0.resid.post_mlp'
  mask = np.random.default_rng(4).random((4, 12, model.config.n_neurons)) < 0.5
  held = [sites.stop(f'h.{i}.{name}') for i in (1, 2) for name in ('attn_ln.scale', 'attn.qk_probs', 'mlp_ln.scale')]
  only = lambda mask: sites.acts_and_grads(
    model, TOKENS, _loss, (source,), [*held, sites.stop('h.2.mlp.post_act'), sites.stop(site, mask)]
  )[2][source]
  none, everything = only(np.zeros_like(mask)), only(np.ones_like(mask))
  assert float(jnp.abs(none - everything).max()) > 1e-3
  np.testing.assert_allclose(only(mask) + only(~mask), none + everything, atol=1e-4)


def test_new_values_do_not_retrace(model):
  mask = np.zeros((4, 12, model.config.n_neurons), bool)
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


@pytest.mark.parametrize('name', list(families.CONFIGS))
def test_sharded_equals_one_device(name):
  def run(data, model_axis):
    with jax.set_mesh(sharding.make_mesh(data, model_axis)):
      model = families.build(name)
      edits = [sites.steer('h.0.attn.v_out', jnp.ones(1), np.arange(model.config.n_head)[:, None] == 1)]
      found = sites.acts_and_grads(model, TOKENS, _loss, ('h.*.attn.v_out', SITE, 'logits'), edits)
      return jax.device_get(found)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(1, 1), run(2, 2))


@pytest.mark.parametrize('first', [0, 2])
@pytest.mark.parametrize(('name', 'mesh'), [('odd_gpt2', (1, 1)), ('llama', (1, 1)), ('odd_llama', (2, 2))])
def test_pairs_of_rows_and_tokens_are_what_whole_rows_are(name, mesh, first):
  """Rows of one text from some token on, in any order, behind keys and values of another row; with edits by token."""
  with jax.set_mesh(sharding.make_mesh(*mesh)):
    _assert_pairs_are_rows(families.build(name), np.random.default_rng(7), first)


def _assert_pairs_are_rows(model, rng, first):
  tokens_rt = rng.integers(53, size=(4, 9)).astype(np.int32)
  firsts_r, rows = [first, 6, 3, 8], range(4)
  for row in rows:
    tokens_rt[row, : firsts_r[row]] = tokens_rt[0, : firsts_r[row]]
  mask_t1 = np.arange(9)[:, None] % 3 == 0
  config = model.config
  edits = [
    sites.patch('*mlp.post_act', 0.3, mask_t1 & (np.arange(config.n_neurons) < 5)),
    sites.patch('*attn.v_out', 0.2, mask_t1[..., None] & (np.arange(config.n_head) == 1)[:, None]),
    sites.steer('*attn.k', rng.normal(size=(9, 1, 1)).astype('f'), np.ones((9, 1, 1), bool)),
    sites.ablate('*attn.qk_probs', mask_t1 & (np.arange(9) == 2)),
  ]
  capture = ('h.*.attn.k', 'h.*.attn.v', 'h.*.attn.qk_probs', 'h.*.mlp.post_act', 'h.*.resid.post_mlp')
  _, acts = sites.forward(model, tokens_rt, edits, capture=(*capture, 'resid.post_emb'))
  found = [(row, token) for row in rows for token in range(firsts_r[row], 9)]
  row_p, token_p = np.array([*rng.permutation(found), (4, 5)], np.int32).T  # the last is padding
  edits = [dataclasses.replace(edit, site=edit.site.removeprefix('*')) for edit in edits]

  @jax.jit
  def block(block, x_bpd, known):
    past = sites.Pairs(known, row_p, token_p, jnp.int32(first), 4, 9 - first, 9)
    tap = sites.Tap(edits, capture=tuple(site.removeprefix('h.*.') for site in capture), past=past)
    return block(x_bpd, tap), tap.acts

  x_bpd = acts['resid.post_emb'][jnp.minimum(row_p, 3), token_p][None]
  for i, layer in enumerate(model.h):
    known = {f'attn.{name}': acts[f'h.{i}.attn.{name}'][0] for name in 'kv'}
    x_bpd, mine = block(layer, x_bpd, known)
    for name in ('mlp.post_act', 'resid.post_mlp'):
      expected = acts[f'h.{i}.{name}'][row_p[:-1], token_p[:-1]]
      np.testing.assert_allclose(mine[name][0, :-1], expected, rtol=1e-4, atol=2e-5)
    probs = np.asarray(mine['attn.qk_probs'])[row_p[:-1], :, token_p[:-1] - first]
    expected = np.asarray(acts[f'h.{i}.attn.qk_probs'])[row_p[:-1], :, token_p[:-1]]
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (
      sites.ablate(SITE, np.ones((5, 4, 12, 1), bool)),
      r'has an array of shape \(5, 4, 12, 1\), which does not broadcast',
    ),
    (sites.steer(SITE, np.ones(7)), rf'an edit at {SITE} has an array of shape \(7,\), which does not broadcast'),
    (sites.patch(SITE, 0.0, np.ones((8, 1, 1), bool)), r"of shape \(8, 1, 1\), .* \{'batch': 4, 'token': 12, 'neuron'"),
    (sites.Edit(SITE, lambda x, tap: x[:1]), r'an edit at h\.1\.mlp\.post_act makes \(1, 12, .* an activation keeps'),
  ],
)
def test_an_edit_that_does_not_fit_its_site_raises(mesh, edit, message):
  with pytest.raises(ValueError, match=message):
    sites.forward(families.build('gpt2'), TOKENS, [edit])


def test_latents_without_a_splice_say_what_is_missing(mesh):
  with pytest.raises(KeyError, match='it is there where `splice` is among the edits'):
    sites.forward(families.build('gpt2'), TOKENS, capture=('h.1.resid.post_mlp.latents',))


@pytest.mark.parametrize('tokens', [TOKENS[0], TOKENS[:0], TOKENS[:, :0], TOKENS.astype(np.float32), [[]]])
def test_what_is_no_batch_of_tokens_raises(mesh, tokens):
  with pytest.raises(ValueError, match=r'are no integers \[batch, token\]'):
    sites.forward(families.build('gpt2'), tokens)


def test_tokens_may_be_a_list_and_capture_no_string(mesh):
  model = families.build('gpt2')
  np.testing.assert_array_equal(sites.forward(model, TOKENS.tolist())[0], sites.forward(model, TOKENS)[0])
  with pytest.raises(TypeError, match='give a tuple of names or globs'):
    sites.forward(model, TOKENS, capture='h.1.resid.post_mlp')


@pytest.mark.parametrize('token', [-1, 53])
def test_a_token_outside_the_vocabulary_raises(model, token):
  tokens_bt = TOKENS.copy()
  tokens_bt[2, 7] = token
  with pytest.raises(ValueError, match=rf'token {token} at row 2, position 7 is outside the vocabulary of 53'):
    sites.forward(model, tokens_bt)
