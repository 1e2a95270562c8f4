"""Components on a prompt and in the vocabulary; what is warm after start; prompts of a thousand tokens."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx

from jax_interp.debugger import effects, engine, lens, schema, subject
from models import gpt2
from tests.debugger import reference, subjects

WARM_SITES = ('h.0.mlp.post_act', 'h.1.attn.v_out')  # no other test has GPT-2 with these alone


@contextlib.contextmanager
def compiling(n_at_most: float, n_at_least: int = 0):
  """Fails where another number of programs is compiled."""
  compiled = []
  listener = lambda name, *_, **__: compiled.append(name) if name.endswith('backend_compile_duration') else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield
  finally:
    jax.monitoring.clear_event_listeners()
  assert n_at_least <= len(compiled) <= n_at_most


@pytest.fixture(scope='module', params=list(subjects.SUBJECTS))
def studied(request):
  return subjects.build(*subjects.SUBJECTS[request.param])


# Activations


def acts(studied, **component) -> schema.ActsResponse:
  return engine.acts(studied, schema.ActsRequest(prompt=subjects.PROMPT, **component))


def test_activations_of_components_are_those_of_a_plain_run(studied):
  base = reference.forward(studied.model, [int(word) for word in subjects.PROMPT.split()], studied.saes)
  for layer, index in ((0, 3), (2, 17)):
    found = acts(studied, kind='neuron', layer=layer, index=index)
    np.testing.assert_allclose(found.values, base[f'h.{layer}.mlp.post_act'][0, :, index], rtol=1e-4, atol=1e-6)
    assert [token.text for token in found.tokens] == subjects.PROMPT.split()
  for site, sae in list(studied.saes.items())[:2]:
    latents_tl = base[f'{site}.latents'][0]
    index = int(np.argmax(latents_tl.sum(0)))
    found = acts(studied, kind='latent', site=site, index=index)
    assert max(found.values) > 0
    np.testing.assert_allclose(found.values, latents_tl[:, index], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=f'latent {sae.n_latents} is not there'):
      acts(studied, kind='latent', site=site, index=sae.n_latents)


def test_a_head_is_what_it_attends_to_times_the_size_of_what_it_writes(studied):
  base = reference.forward(studied.model, [int(word) for word in subjects.PROMPT.split()])
  n_head = studied.model.config.n_head
  for layer, head in ((0, 0), (2, n_head - 1)):
    v_sc = base[f'h.{layer}.attn.v'][0, :, head * base[f'h.{layer}.attn.v'].shape[2] // n_head]
    written_sd = v_sc @ np.asarray(studied.model.h[layer].attn.c_proj.kernel[...], np.float64)[head]
    values_ts = base[f'h.{layer}.attn.qk_probs'][0, head] * np.linalg.norm(written_sd, axis=1)
    found = acts(studied, kind='head', layer=layer, index=head)
    np.testing.assert_allclose(found.values, values_ts, rtol=1e-4, atol=1e-6)
    assert not np.triu(found.values, 1).any()
  with pytest.raises(ValueError, match=f'head {n_head} is not there; there are {n_head}, from 0'):
    acts(studied, kind='head', layer=0, index=n_head)


# The lens


def float64(parameter):
  return np.asarray(parameter[...], np.float64)


def normed(layer, x_vd):
  if hasattr(layer, 'bias'):
    x_vd = x_vd - x_vd.mean(1, keepdims=True)
  eps = layer.eps if hasattr(layer, 'eps') else gpt2.LAYER_NORM_EPS
  shift = float64(layer.bias) if hasattr(layer, 'bias') else 0
  return x_vd / np.sqrt((x_vd**2).mean(1, keepdims=True) + eps) * float64(layer.gain) + shift


def mlp(layer, x_vd):
  """Returns pre-activations, activations and output of an MLP."""
  bias = lambda linear: 0 if linear.bias is None else float64(linear.bias)
  p_vn = x_vd @ float64(layer.c_fc.kernel) + bias(layer.c_fc)
  if hasattr(layer, 'c_up'):
    m_vn = p_vn / (1 + np.exp(-p_vn)) * (x_vd @ float64(layer.c_up.kernel))
  else:
    m_vn = p_vn / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (p_vn + 0.044715 * p_vn**3)))
  return p_vn, m_vn, m_vn @ float64(layer.c_proj.kernel) + bias(layer.c_proj)


def assert_lists(largest: schema.Tokens, smallest: schema.Tokens, scores_v, n):
  """Asserts that these are both ends of the scores, whose gaps are larger than the rounding of float32."""
  order = np.argsort(scores_v)
  for found, ids in ((largest, order[::-1][:n]), (smallest, order[:n])):
    assert [token.id for token in found.tokens] == ids.tolist()
    np.testing.assert_allclose(found.values, scores_v[ids], rtol=1e-4, atol=1e-5)


def test_the_lens_is_brute_force_over_the_vocabulary(studied):
  model = studied.model
  components = [
    {'kind': 'neuron', 'layer': 1, 'index': 9},
    *({'kind': 'latent', 'site': s, 'index': 5} for s in studied.saes),
  ]
  read = 0
  for component in components:
    site = component.get('site', 'h.1.mlp.post_act')
    layer, name = (0, site) if site == 'resid.post_emb' else (int(site.split('.')[1]), site.split('.')[-1])
    block, sae = model.h[layer], studied.saes.get(component.get('site'))
    kernel = {'post_act': block.mlp.c_proj.kernel, 'v_out': block.attn.c_proj.kernel}.get(name)
    write = np.eye(model.config.n_neurons)[9] if sae is None else float64(sae.decoder)[5]
    write_d = write if kernel is None else write @ float64(kernel).reshape(-1, model.config.d_model)
    scores_v = (write_d * float64(model.ln_f.gain)) @ np.asarray(model.unembedding, np.float64).T
    found = lens.lens(studied, schema.LensRequest(n=7, **component))
    assert_lists(found.promoted, found.suppressed, scores_v - scores_v.mean(), 7)
    if name not in ('post_act', 'delta_mlp'):
      assert found.excited_by is None
      assert found.inhibited_by is None
      continue
    read += 1
    p_vn, m_vn, out_vd = mlp(block.mlp, normed(block.mlp_ln, float64(model.wte.embedding)))
    read_vx = m_vn if name == 'post_act' else out_vd
    dictionary = sae and reference.Dictionary(sae)
    scores_v = p_vn[:, 9] if sae is None else dictionary.read(dictionary.normed(read_vx)[0])[:, 5]
    assert_lists(found.excited_by, found.inhibited_by, scores_v, 7)
  assert read == 2


def test_the_lens_has_at_most_the_vocabulary(studied):
  found = lens.lens(studied, schema.LensRequest(kind='neuron', layer=0, index=0, n=100))
  assert len(found.promoted.tokens) == len(found.inhibited_by.tokens) == studied.model.config.n_vocab
  with pytest.raises(ValueError, match='there is one at'):
    lens.lens(studied, schema.LensRequest(kind='latent', site='h.2.attn.v_out', index=0))


# Warm


@pytest.fixture(scope='module')
def warmed():
  studied = subjects.build('gpt2', WARM_SITES)
  with compiling(np.inf, n_at_least=10):
    engine.warm(studied)
  return studied


def test_a_plain_request_behind_the_start_compiles_nothing(warmed):
  ablation = schema.Ablation(kind='neuron', layer=1, index=3)
  trace = schema.Trace(node=schema.Node(kind='head', layer=2, token=-1, source=3, index=1), through='all')
  held = [ablation.model_copy(update={'to': to}) for to in (schema.Mean(), schema.Resample(seed=1))]
  held.append(schema.Ablation(kind='latent', site=WARM_SITES[0], to=schema.OtherPrompt(prompt='9 8 7 6 5 4 3')))
  cut = schema.EdgeAblation(node=schema.Node(kind='embedding', token=2), layer=2, head=1, into='k')
  changed = [{'ablations': [one]} for one in (ablation, *held)] + [{'edge_ablations': [cut]}, {'trace': trace}]
  both = [held[1], held[1].model_copy(update={'layer': 2})]  # another run's values in two layers
  for changes in (
    {},
    *changed,
    {'ablations': held[1:]},
    {'ablations': both},
    {'objective': schema.KL(), 'prompt': '4 5 6'},
  ):
    with compiling(0):
      found = engine.debug(warmed, subjects.request(n_tokens=10, **changes))
    assert len(found.node_tokens) == len(found.table.nodes) > 30


def draw_request(rng) -> schema.Request:
  """Returns a random request of 3 to 16 tokens: any objective, trace, and up to 4 ablations to numbers."""
  n = int(rng.integers(3, 14))
  integer = lambda end: int(rng.integers(end))
  words = lambda n: ' '.join(map(str, rng.integers(53, size=n)))

  def node(kind):
    token = integer(n)
    if kind == 'head':
      return schema.Node(kind=kind, layer=integer(3), index=integer(4), token=token, source=integer(token + 1))
    if kind == 'neuron':
      return schema.Node(kind=kind, layer=integer(3), index=integer(128), token=token)
    return schema.Node(kind=kind, site=WARM_SITES[integer(2)], index=integer(26), token=token)

  objectives = [
    lambda: schema.LogitDifference(targets=words(3).split(), distractors=words(integer(3)).split(), token=integer(n)),
    lambda: schema.LogProbability(targets=words(1).split(), token=integer(n)),
    lambda: schema.Continuation(text=words(1 + integer(3))),
    lambda: schema.KL(token=integer(n)),
    lambda: schema.Entropy(token=integer(n)),
    lambda: schema.Projection(site='h.1.resid.post_attn', token=integer(n), direction=rng.normal(size=32).tolist()),
    lambda: schema.PreActivation(node=node(('neuron', 'latent')[integer(2)])),
    lambda: schema.AttentionLogit(node=node('head'), through=('q', 'k', 'qk')[integer(3)]),
    lambda: schema.HeadWrite(
      node=node('head').model_copy(update={'layer': 0}), of=schema.LogProbability(targets=['3'])
    ),
  ]
  traces = [
    lambda: schema.Trace(node=node(('neuron', 'latent')[integer(2)])),
    lambda: schema.Trace(node=node('head'), through=('q', 'k', 'qk')[integer(3)]),
    lambda: None,
    lambda: None,
  ]
  components = [
    lambda: {'kind': 'head', 'layer': integer(3), 'index': integer(4)},
    lambda: {'kind': 'neuron', 'layer': integer(3), 'index': integer(128)},
    lambda: {'kind': 'mlp', 'layer': integer(3)},
    lambda: {'kind': 'latent', 'site': WARM_SITES[integer(2)], 'index': integer(26)},
    lambda: {'kind': 'embedding'},
  ]
  ablations = [
    schema.Ablation(**components[integer(5)](), first=integer(n), to=schema.Value(value=float(rng.normal())))
    for _ in range(integer(5))
  ]
  return schema.Request(
    prompt=words(n),
    objective=objectives[integer(len(objectives))](),
    trace=traces[integer(len(traces))](),
    ablations=ablations,
    k=1 + integer(30),
    n_tokens=integer(31),
    nodes=[node(kind) for kind in ('head', 'neuron', 'latent')[: integer(4)]],
  )


def test_a_hundred_random_requests_compile_nothing(warmed):
  # More than ten a list, more nodes and continuations are other programs: once each.
  nodes = [schema.Node(kind='neuron', layer=0, token=2, index=index) for index in range(100)]
  for k, n_tokens in ((30, 10), (10, 30)):
    engine.debug(warmed, subjects.request(k=k, n_tokens=n_tokens, nodes=nodes))
  engine.debug(warmed, subjects.request(schema.Continuation(text='3'), ablations=[schema.Ablation(kind='embedding')]))
  rng = np.random.default_rng(0)
  with compiling(0):
    for _ in range(100):
      found = engine.debug(warmed, draw_request(rng))
      assert np.isfinite(found.objective)
      assert found.completeness.residual == pytest.approx(0, abs=1e-4) or not found.completeness.exact


# A thousand tokens


def test_a_prompt_of_a_thousand_tokens_is_answered_as_its_beginning_is():
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer=2, n_head=4, d_model=32, n_ctx=1024, n_vocab=53), nnx.Rngs(0))
  rng = np.random.default_rng(0)
  model = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model)
  studied = subject.Subject(model, subjects.Tokenizer(53))
  words = rng.integers(53, size=1000).astype(str)
  of = lambda n, token: engine.debug(
    studied,
    subjects.request(
      schema.LogitDifference(targets=['8'], distractors=['30'], token=token), prompt=' '.join(words[:n])
    ),
  )
  short, whole = of(12, 11), of(1000, 11)
  assert whole.objective == pytest.approx(short.objective, abs=1e-5)
  # All that pushes the objective is in the beginning; sizes of what is written are of all of the prompt.
  rows = [dict(zip(one.table.nodes, one.table.total_effect, strict=True)) for one in (short, whole)]
  both = [node for node in rows[0] if node in rows[1] and node.kind != 'head_total']
  assert len(both) > 60
  np.testing.assert_allclose([rows[1][node] for node in both], [rows[0][node] for node in both], rtol=1e-3, atol=2e-6)
  np.testing.assert_allclose(whole.by_token.mlp[:12], short.by_token.mlp, rtol=1e-3, atol=1e-5)
  assert not any(whole.by_token.mlp[12:])
  last = of(1000, -1)
  assert abs(last.completeness.residual) < 1e-4
  assert max(node.token or 0 for node in last.table.nodes) == 999


def test_what_is_in_memory_beside_a_run_is_of_one_layer(monkeypatch):
  n_layer, n_head, t = 4, 4, 1024
  model = gpt2.GPT2(gpt2.GPT2Config(n_layer, n_head, d_model=32, n_ctx=t, n_vocab=53), nnx.Rngs(0))
  studied = subject.Subject(model, subjects.Tokenizer(53))
  asked = engine.prepare(studied, subjects.request(prompt=' '.join(['3'] * 1000)))
  pattern = n_head * t * t * 4  # bytes of a layer's attention
  args = model, asked.saes, asked.tokens_bt, asked.held, asked.shifts, asked.question, np.int32(1000)
  of_run = effects.run.lower(*args).compile().memory_analysis()
  assert of_run.output_size_in_bytes < 2.5 * n_layer * pattern  # attention and its gradients are kept
  assert of_run.temp_size_in_bytes < (2 * n_layer + 4) * pattern
  found = engine.run(studied, asked)
  find, seen = effects._find_in_layer, []
  monkeypatch.setattr(effects, '_find_in_layer', lambda *args: seen.append(args) or find(*args))
  effects.find(studied, asked.saes, found, 10, True)
  of_layer = find.lower(*seen[-1]).compile().memory_analysis()
  assert len(seen) == n_layer
  assert of_layer.temp_size_in_bytes < 6 * pattern
  assert of_layer.output_size_in_bytes < pattern / 10
