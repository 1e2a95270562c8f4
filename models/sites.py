"""Sites, edits, probes and captures: how everything else reads and changes a forward pass.

A model passes every named activation (a site) through a `Tap`, which shards it, applies the edits that match, adds the
probe that is differentiated, and captures it, always in that order. Because the probe comes after the edits, `stop` at
a site lets the site's own gradient through while it cuts every path that enters the site from upstream.
"""

import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from models import sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=['args'], meta_fields=['site', 'fn'])
@dataclasses.dataclass(frozen=True)
class Edit:
  """Replaces the activation x at every site that matches a glob by `fn(x, tap, *args)`.

  `site` and `fn` are static, only `args` are traced: new values never recompile, a new function does, so define edit
  functions at module level.
  """

  site: str
  fn: Callable
  args: tuple = ()


def _where(x, tap, mask, value):
  return jnp.where(mask, value, x)


def _add(x, tap, vector):
  return x + vector


def _stop(x, tap):
  return jax.lax.stop_gradient(x)


def _splice(x, tap, sae):
  latents, norm = sae.encode(x)
  error = tap('error', jax.lax.stop_gradient(x - sae.decode(latents, norm)), 'batch token d_model')
  return sae.decode(tap('latents', latents, 'batch token latent'), norm) + error


def ablate(site: str, mask) -> Edit:
  """Returns an edit that sets the activation to zero where the mask (broadcast to the site's shape) is true."""
  return Edit(site, _where, (mask, 0.0))


def patch(site: str, value, mask=True) -> Edit:
  """Returns an edit that holds the activation at a value, such as another run's, where the mask is true."""
  return Edit(site, _where, (mask, value))


def steer(site: str, vector) -> Edit:
  """Returns an edit that adds a vector (broadcast to the site's shape)."""
  return Edit(site, _add, (vector,))


def splice(site: str, sae) -> Edit:
  """Returns an edit that reads and writes the site through an SAE's latents, its error kept as a constant.

  It changes no logit; it adds the sites `<site>.latents` and `<site>.error`. The SAE has
  `encode(x_btd) -> latents_btl, norm` and `decode(latents_btl, norm) -> x_btd`.
  """
  return Edit(site, _splice, (sae,))


def stop(site: str) -> Edit:
  """Returns an edit that makes the activation a constant to gradients: frozen norms, attention patterns or nodes."""
  return Edit(site, _stop)


@dataclasses.dataclass
class Tap:
  """Visits every named site of one forward pass, always in this order: shard, edit, probe, capture."""

  edits: Sequence[Edit] = ()
  probes: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  capture: Sequence[str] = ()
  prefix: str = ''
  acts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  seen: list[str] = dataclasses.field(default_factory=list)

  def at(self, name: str) -> 'Tap':
    """Returns the same tap one level deeper in the namespace; it shares what is captured."""
    return dataclasses.replace(self, prefix=f'{self.prefix}{name}.')

  def __call__(self, name: str, x: jax.Array, dims: str) -> jax.Array:
    site = self.prefix + name
    self.seen.append(site)
    x = sharding.constrain(x, dims)
    for edit in self.edits:
      if fnmatch.fnmatchcase(site, edit.site):
        x = edit.fn(x, self.at(name), *edit.args)
    if site in self.probes:
      x = x + self.probes[site]
    if any(fnmatch.fnmatchcase(site, pattern) for pattern in self.capture):
      self.acts[site] = x
    return x


def _check_sites(patterns: Sequence[str], seen: Sequence[str]):
  unseen = [pattern for pattern in patterns if not fnmatch.filter(seen, pattern)]
  if unseen:
    nearest = difflib.get_close_matches(unseen[0], seen, n=4, cutoff=0.3)
    raise KeyError(f'no site matches {unseen[0]!r}; the nearest are {", ".join(nearest) or ", ".join(seen)}')


@functools.partial(jax.jit, static_argnames='capture')
def forward(
  model, tokens_bt: jax.Array, edits: Sequence[Edit] = (), probes: Mapping = {}, capture: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns logits_btv and {site: activation}, on the ambient mesh; a new set of sites recompiles, new values do not.

  Args:
    model: a callable `(tokens_bt, tap) -> logits_btv` that taps its sites.
    tokens_bt: int32 token ids.
    edits: applied in this order at each site they match.
    probes: {site: zeros of its shape}, added after the edits; differentiate with respect to them.
    capture: site names or globs.

  Raises:
    KeyError: an edit, probe or capture names no site; the message gives the nearest names.
  """
  tap = Tap(edits, probes, capture)
  logits_btv = model(tokens_bt, tap)
  _check_sites([*(edit.site for edit in edits), *probes, *capture], tap.seen)
  return logits_btv, tap.acts


def site_shapes(
  model, tokens_bt, sites: tuple[str, ...], edits: Sequence[Edit] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns {site: shape and dtype} of the sites that match, without computing anything; raises as `forward` does."""
  return jax.eval_shape(functools.partial(forward, capture=tuple(sites)), model, tokens_bt, edits)[1]


def acts_and_grads(
  model, tokens_bt: jax.Array, objective: Callable, sites: tuple[str, ...], edits: Sequence[Edit] = ()
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns objective(logits_btv, acts), the activations and its gradients at the sites.

  It takes one forward and one backward pass; `grads[site]` is taken after the edits at that site. The estimated total
  effect of a node is acts[site] * grads[site], summed over its channels; the same with `stop` edits on all later nodes
  is its direct effect.
  """

  def run(probes):
    logits_btv, acts = forward(model, tokens_bt, edits, probes, sites)
    return objective(logits_btv, acts), acts

  probes = {site: jnp.zeros(x.shape, x.dtype) for site, x in site_shapes(model, tokens_bt, sites, edits).items()}
  (value, acts), grads = jax.value_and_grad(run, has_aux=True)(probes)
  return value, acts, grads
