"""A dictionary that is known: sparse sums of random unit vectors. TopK finds them; AuxK is what keeps latents alive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_interp.sae import losses, optimizer, train_step
from models import sae, sharding

D, N_ATOMS, N_ACTIVE, B, N_STEPS, STEPS_A_CALL = 64, 128, 4, 512, 3000, 50
DEAD_TOKENS = 20_000


def trained(auxk):
  """Returns the atoms, the trained decoder and the fraction of dead latents."""
  atoms_md = np.random.default_rng(0).normal(size=(N_ATOMS, D)).astype(np.float32)
  atoms_md = jnp.asarray(atoms_md / np.linalg.norm(atoms_md, axis=1, keepdims=True))

  @jax.jit
  def batches(key):
    which_key, size_key = jax.random.split(key)
    _, chosen = jax.lax.top_k(jax.random.uniform(which_key, (STEPS_A_CALL, B, N_ATOMS)), N_ACTIVE)
    sizes = jax.random.uniform(size_key, chosen.shape, minval=0.5, maxval=1.5)
    return jnp.einsum('sbk,sbkd->sbd', sizes, atoms_md[chosen])

  keys = jax.random.split(jax.random.key(1), N_STEPS // STEPS_A_CALL)
  sample_bd = batches(keys[0])[0]
  tx, recipe = optimizer.adam(3e-3), losses.TopK(((N_ACTIVE, 1.0),), auxk, dead_tokens=DEAD_TOKENS)
  fresh = sae.init_sae(jax.random.key(2), sample_bd, N_ATOMS, N_ACTIVE)
  state = train_step.init_state(fresh, sample_bd, tx)
  for key in keys:
    state, metrics = train_step.train_steps(state, batches(key), tx, recipe)
  return np.asarray(atoms_md), np.asarray(state.sae.decoder[...]), metrics['dead'][-1] / N_ATOMS


@pytest.fixture(scope='module')
def results():
  with jax.set_mesh(sharding.make_mesh()):
    return {auxk: trained(auxk) for auxk in (32, 0)}


def test_topk_recovers_the_atoms(results):
  atoms_md, decoder_ld, _ = results[32]
  cosines_m = (atoms_md @ decoder_ld.T).max(1)
  assert np.mean(cosines_m > 0.95) >= 0.95


def test_auxk_keeps_latents_alive(results):
  assert results[32][2] < 0.05
  assert results[0][2] > 0.05
  assert results[0][2] > 3 * results[32][2]
