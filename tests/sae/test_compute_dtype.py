"""Recipes whose latents are all computed, with products in bfloat16: near those in float32, whose weights they keep."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_interp.sae import batch_topk, dense, gated, jumprelu, optimizer, prolu, relu_l1, train_step
from models import activation_functions, sae, sharding

B, D, L, K = 64, 16, 128, 8
RECIPES = {
  'relu': (relu_l1.ReLUL1(0.1), activation_functions.ReLU),
  'relu_april': (relu_l1.ReLUL1(0.1, True), activation_functions.ReLU),
  'prolu': (prolu.ProLU(0.1, 'ste'), activation_functions.ProLU),
  'gated': (gated.Gated(0.1), lambda: activation_functions.Gated(jnp.zeros(L), jnp.zeros(L))),
  'jumprelu': (jumprelu.JumpReLU(0.1, bandwidth=0.5), lambda: activation_functions.JumpReLU(jnp.full(L, 0.1))),
  'batch_topk': (batch_topk.BatchTopK(K, 0), lambda: activation_functions.TopK(K)),
  'matryoshka': (batch_topk.BatchTopK(K, 0, prefixes=(32, L)), lambda: activation_functions.TopK(K)),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, D)).astype(np.float32)
ROWS = (RNG.normal(size=(L, D)) / D**0.5).astype(np.float32)


def example(activation):
  place = lambda x: sharding.place(x, 'latent d_model')
  rows = place(ROWS), place(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True))
  return sae.SparseAutoencoder(*rows, jnp.zeros(D), jnp.zeros(L), activation())


def measured(recipe, activation):
  run = jax.jit(lambda model: recipe.loss_and_grads(model, X, X, np.zeros(L, np.int32), 1.0, 0))
  model = example(activation)
  metrics, _, grads = run(model)
  return (
    metrics,
    {name: np.asarray(p[...]) for name, p in sae.named_parameters(grads).items()},
    run.lower(model).as_text(),
  )


def products(text):
  """Returns the types of the operands of products of matrices in a lowered program."""
  found = re.findall(r'dot_general .*: \(tensor<([\dx]*)x(\w+)>, tensor<([\dx]*)x(\w+)>\)', text)
  return {(left, right) for a, left, b, right in found if 'x' in a and 'x' in b}


def test_a_product_and_its_gradients_round_operands_and_not_sums():
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  with jax.set_mesh(sharding.make_mesh(1, 1)):
    run = jax.shard_map(lambda x, y: dense.product(x, y, 'bfloat16'), in_specs=(P(), P()), out_specs=P())
    found_bl, back = jax.vjp(jax.jit(run), X, ROWS.T)
    grads = back(jnp.asarray(found_bl) + 1)
  np.testing.assert_allclose(found_bl, rounded(X) @ rounded(ROWS.T), atol=1e-5)
  grad_bl = rounded(np.asarray(found_bl) + 1)
  for grad, expected in zip(grads, (grad_bl @ rounded(ROWS), rounded(X.T) @ grad_bl), strict=True):
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', RECIPES)
def test_losses_and_gradients_are_near_those_in_float32(mesh, name):
  recipe, activation = RECIPES[name]
  metrics, grads, _ = measured(recipe, activation)
  rounded_metrics, rounded_grads, text = measured(dataclasses.replace(recipe, dtype='bfloat16'), activation)
  assert products(text) == {('bf16', 'bf16')}
  np.testing.assert_allclose(rounded_metrics['loss'], metrics['loss'], rtol=1e-2)
  assert rounded_metrics['loss'] != metrics['loss']
  for param, grad in grads.items():
    assert rounded_grads[param].dtype == np.float32
    # A few latents on the edge may be on in one and off in the other.
    assert np.linalg.norm(rounded_grads[param] - grad) < 0.1 * np.linalg.norm(grad) + 1e-6, param


def test_training_in_bfloat16_keeps_weights_and_moments_in_float32(mesh):
  recipe, activation = RECIPES['relu']
  tx = optimizer.adam(1e-3)
  found = {}
  for dtype in ('float32', 'bfloat16'):
    state = train_step.init_state(example(activation), X, tx)
    state, metrics = train_step.train_steps(state, np.stack([X] * 50), tx, dataclasses.replace(recipe, dtype=dtype))
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    found[dtype] = metrics['loss']
  assert found['bfloat16'][-1] < 0.8 * found['bfloat16'][0]
  np.testing.assert_allclose(found['bfloat16'][-1], found['float32'][-1], rtol=2e-2)
