"""A prompt continued under edits beside the plain continuation, with the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_interp.debugger import engine, interventions, lens, objectives, schema
from jax_interp.debugger.subject import Subject
from models import generation, sites


def generate(
  subject: Subject, request: schema.GenerateRequest, progress: engine.Progress = engine.silent
) -> schema.GenerateResponse:
  """Returns both continuations.

  Ablations hold over the prompt from their `first` token to their `last`, and over new tokens too where last is -1;
  steering adds to every token.

  Raises:
    ValueError: a component is not there, the text becomes longer than the context, or an ablation takes its value of
      another run (here it can be a number or the mean).
  """
  tokens = subject.encode(request.prompt)
  n_prompt = len(tokens)
  config = subject.model.config
  if n_prompt + request.n_new > config.n_ctx:
    raise ValueError(f'{n_prompt} tokens and {request.n_new} new ones are more than the context of {config.n_ctx}')
  edits = [_ablation(subject, ablation, n_prompt, n_prompt + request.n_new) for ablation in request.ablations]
  edits += [_steering(subject, steering) for steering in request.steering]
  saes = {ablation.site: subject.saes[ablation.site] for ablation in request.ablations if ablation.kind == 'latent'}
  edits += [sites.splice(site, sae) for site, sae in sorted(saes.items())]
  end = subject.tokenizer.eos_token_id if hasattr(subject.tokenizer, 'eos_token_id') else None

  def run(edits):
    found = generation.generate(
      subject.model,
      np.array([tokens], np.int32),
      jax.random.key(request.seed),
      request.n_new,
      edits,
      temperature=request.temperature,
      top_p=request.top_p,
      end_token=end,
    )
    new = np.asarray(found.tokens_bt[0]).tolist()
    return subject.tokens(new[: new.index(end) + 1] if end in new else new)

  baseline = run([])
  progress(0.5, 'the edited text')
  return schema.GenerateResponse(
    request=request, prompt=subject.tokens(tokens), edited=run(edits) if edits else baseline, baseline=baseline
  )


def _ablation(subject, ablation, n_prompt, n_slots) -> sites.Edit:
  """Returns an ablation as an edit over all tokens that there will be."""
  interventions.check(subject, ablation, tuple(subject.saes))
  first = subject.position(ablation.first, n_prompt, 'first')
  end = n_slots if ablation.last == -1 else subject.position(ablation.last, n_prompt, 'last') + 1
  if first >= end:
    raise ValueError(f'an ablation from token {first} to {end - 1} is of none; give first and last in order')
  chosen_t = (np.arange(n_slots) >= first) & (np.arange(n_slots) < end)
  if ablation.source is not None:
    raise ValueError('one token pair cannot be ablated while generating; leave out the source')
  mean = isinstance(ablation.to, schema.Mean)
  if not mean and not isinstance(ablation.to, schema.Value):
    raise ValueError(f'a value of kind {ablation.to.kind!r} is of another run; while generating give a number or mean')
  only = lambda n: np.ones(n, bool) if ablation.index is None else np.arange(n) == ablation.index
  config = subject.model.config
  match ablation.kind:
    case 'head':
      site, mask = f'h.{ablation.layer}.attn.v_out', chosen_t[:, None, None] & only(config.n_head)[:, None]
      if not mean and ablation.to.value:
        behind_ts = np.tri(n_slots, dtype=bool)  # what is attended to stays behind
        mask = chosen_t[:, None] & only(config.n_head)[:, None, None] & behind_ts
        site = f'h.{ablation.layer}.attn.qk_probs'
    case 'neuron':
      site, mask = f'h.{ablation.layer}.mlp.post_act', chosen_t[:, None] & only(config.n_neurons)
    case 'latent':
      site = f'{ablation.site}.latents'
      mask = chosen_t[:, None] & only(subject.saes[ablation.site].n_latents)
    case 'embedding':
      site, mask = 'resid.post_emb', chosen_t[:, None]
    case _:
      site, mask = f'h.{ablation.layer}.resid.delta_{ablation.kind}', chosen_t[:, None]
  if mean:
    saes = (ablation.site,) if ablation.kind == 'latent' else ()
    return sites.patch(site, engine.means(subject, saes)[site], mask)
  return sites.patch(site, ablation.to.value, mask)


def _steering(subject, steering) -> sites.Edit:
  """Returns steering as an edit.

  Raises:
    ValueError: the site is no residual stream, or there is not one of node and direction.
  """
  model, config = subject.model, subject.model.config
  streams = [objectives.stream_site(i) for i in range(2 * config.n_layer + 1)]
  if steering.site not in streams:
    raise ValueError(f'{steering.site!r} is no residual stream; those are {streams[0]}, {streams[1]} to {streams[-1]}')
  if (steering.node is None) == (steering.direction is None):
    raise ValueError('steering is along a node or along a direction; give one of them')
  if steering.direction is not None:
    if len(steering.direction) != config.d_model:
      raise ValueError(f'the direction has {len(steering.direction)} numbers; the stream has {config.d_model}')
    direction_d = np.array(steering.direction, np.float32)
  else:
    node = steering.node.model_copy(update={'token': 0})
    node = objectives.check_node(subject, node, 1, tuple(subject.saes), ('neuron', 'latent'))
    sae = subject.saes.get(node.site)
    site = f'h.{node.layer}.mlp.post_act' if sae is None else node.site
    direction_d = lens.unit_write(model, sae, site, np.int32(node.index))[0]
  return sites.steer(steering.site, jnp.asarray(steering.coefficient * direction_d, jnp.float32))
