"""Padding, meshes and compilations change no answer and are not paid for twice; bad requests are refused."""

import jax
import numpy as np
import pytest

from jax_interp.debugger import effects, engine, lens, schema, subject
from models import activation_functions, sharding
from models import sae as sae_lib
from tests.debugger import reference, subjects

SITES = ('h.0.mlp.post_act', 'h.1.resid.delta_mlp')
Node, Ablation = schema.Node, schema.Ablation
HEAD = Node(kind='head', layer=1, index=2, token=5, source=2)


def _assert_same(one: schema.Response, other: schema.Response):
  """Asserts that answers are equal but for rounding and time."""
  assert set(one.table.nodes) == set(other.table.nodes)
  place = {node: i for i, node in enumerate(other.table.nodes)}
  order = [place[node] for node in one.table.nodes]
  for name in reference.COLUMNS:
    expected = reference.column(other.table, name)[order]
    np.testing.assert_allclose(reference.column(one.table, name), expected, rtol=1e-4, atol=2e-6, err_msg=name)
  for name, value in one.by_token.model_dump().items():
    np.testing.assert_allclose(value, getattr(other.by_token, name), rtol=1e-4, atol=1e-5, err_msg=name)
  numbers = lambda response: [*response.completeness.model_dump(exclude={'exact'}).values(), response.unedited or 0]
  np.testing.assert_allclose(numbers(one), numbers(other), atol=5e-6)
  assert one.candidates.ranks == other.candidates.ranks
  np.testing.assert_allclose(one.candidates.logits, other.candidates.logits, atol=1e-5)


@pytest.fixture(scope='module')
def small():
  return subjects.build('gpt2', SITES)


REQUESTS = {
  'objective': {},
  'trace': {'trace': schema.Trace(node=Node(kind='latent', site=SITES[1], index=3, token=4))},
  'ablation': {'ablations': [Ablation(kind='head', layer=0, index=3, first=2), Ablation(kind='mlp', layer=1, last=3)]},
}


def test_padding_changes_nothing(small, monkeypatch):
  # All other tests compare padded runs with references that are not padded.
  plain = subjects.build('gpt2')
  requests = [subjects.request(k=5, **REQUESTS[name]) for name in ('objective', 'ablation')]
  padded = [engine.debug(plain, request) for request in requests]
  monkeypatch.setattr(subject, 'LENGTHS', (subjects.N_TOKENS,))
  bare = [engine.debug(plain, request) for request in requests]
  assert plain.pad(list(range(subjects.N_TOKENS))).shape == (1, subjects.N_TOKENS)
  for one, other in zip(padded, bare, strict=True):
    _assert_same(one, other)


def test_a_mesh_of_four_devices_answers_as_one_does(small):
  expected = [engine.debug(small, subjects.request(k=5, **changes)) for changes in REQUESTS.values()]
  with jax.set_mesh(sharding.make_mesh(2, 2)):
    sharded = subjects.build('gpt2', SITES)
    found = [engine.debug(sharded, subjects.request(k=5, **changes)) for changes in REQUESTS.values()]
  for one, other in zip(found, expected, strict=True):
    _assert_same(one, other)


def test_requests_that_change_values_compile_nothing(small):
  plain = subjects.build('gpt2')
  ask = lambda objective=None, of=plain, **changes: engine.debug(of, subjects.request(objective, **{'k': 5} | changes))
  rng = np.random.default_rng(0)
  text = lambda n: ' '.join(str(i) for i in rng.integers(53, size=n))
  off = [Ablation(kind='mlp', layer=0)]
  # Objectives read the whole distribution at no token, one, or several: each is compiled once, with its value alone.
  ask(n_tokens=3, ablations=off)
  ask(schema.KL(), ablations=off)
  ask(schema.Continuation(text='5'), ablations=off)
  ask(of=small, ablations=off)
  counts = lambda: [
    function._cache_size()
    for function in (effects.run, effects._find_in_layer, effects._find_in_sae, engine._value, lens._promoted)
  ]
  before, compiled = counts(), []
  # Small tables of other lengths may still compile what describes them, in a few sizes: those are counted apart.
  listener = lambda name, *_, **__: compiled.append(name) if name.endswith('backend_compile_duration') else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    ask(schema.LogitDifference(targets=['3'], distractors=['5', '6'], token=2), prompt=text(12), n_tokens=3)
    ask(schema.Entropy(token=1), prompt=text(3), k=8)
    ask(schema.LogProbability(targets=['1', '2', '3']), prompt=text(16))
    ask(schema.Continuation(text='8 9 10'), prompt=text(9))
    ask(schema.Projection(site='h.1.resid.post_attn', direction=[1.0] * 32))
    ask(schema.KL(token=3), ablations=[Ablation(kind='head', layer=1, index=3, to=schema.Value(value=2))])
    ask(of=small, ablations=[Ablation(kind='latent', site=SITES[1], index=4)])
    ask(ablations=[Ablation(kind='neuron', layer=2, index=n, first=n) for n in range(6)], n_tokens=7)
    for through in ('q', 'k', 'qk', 'v', 'all'):
      ask(trace=schema.Trace(node=HEAD, through=through), objective=schema.Entropy(token=5))
    ask(trace=schema.Trace(node=Node(kind='neuron', layer=2, index=1, token=3)))
    other = schema.OtherPrompt(prompt=subjects.request().prompt)
    for ablation in ({'kind': 'neuron', 'index': 3}, {'kind': 'head', 'index': 1}, {'kind': 'mlp'}):
      ask(ablations=[Ablation(layer=1, to=other, **ablation)])
    cut = schema.EdgeAblation(node=Node(kind='embedding', token=4), layer=1, head=1, into='k')
    ask(edge_ablations=[cut])
    ask(of=small, trace=schema.Trace(node=Node(kind='latent', site=SITES[0], index=1, token=3)))
    ask(of=small, trace=schema.Trace(node=Node(kind='latent', site=SITES[1], index=2, token=5)), prompt=text(11))
  finally:
    jax.monitoring.clear_event_listeners()
  assert counts() == before
  assert len(compiled) <= 8


def test_progress_is_told_and_may_stop(small):
  told = []
  engine.debug(small, subjects.request(k=5), lambda share, what: told.append((share, what)))
  shares = [share for share, _ in told]
  assert shares == sorted(shares)
  assert len(shares) > 1
  assert 0 <= shares[0] < shares[-1] <= 1
  assert all(what for _, what in told)

  def stop(share, what):
    raise InterruptedError(what)

  with pytest.raises(InterruptedError):
    engine.debug(small, subjects.request(k=5), stop)


LATENT = Node(kind='latent', site=SITES[0], index=3, token=4)
trace = lambda node, through=None, downstream=None: {
  'trace': schema.Trace(node=node, through=through, downstream=downstream)
}
ablate = lambda **changes: {'ablations': [Ablation(**changes)]}
projection = lambda **changes: {'objective': schema.Projection(**({'direction': [1.0] * 32} | changes))}
BAD = {
  'the prompt has 17 tokens': {'prompt': ' '.join(['3'] * 17)},
  'the prompt has 0 tokens': {'prompt': ' '},
  "'3 17' is 2 tokens, \\['3', '17'\\]": {'objective': schema.LogitDifference(targets=['3 17'])},
  'token 7 is not in a prompt of 7 tokens': {'objective': schema.Entropy(token=7)},
  'token -8 is not in a prompt of 7 tokens': {'objective': schema.KL(token=-8)},
  'the continuation has 0 tokens': {'objective': schema.Continuation(text=' ')},
  'prompt and continuation have 20 tokens': {'objective': schema.Continuation(text=' '.join(['3'] * 13))},
  "'h.1.mlp.post_act' is no residual stream": projection(site='h.1.mlp.post_act'),
  'the direction has 3 numbers; the stream has 32': projection(site='resid.post_emb', direction=[1.0] * 3),
  'layer 3 is not there; there are 3': trace(Node(kind='neuron', layer=3, index=0, token=0)),
  'neuron 128 is not there; there are 128': trace(Node(kind='neuron', layer=0, index=128, token=0)),
  'head 4 is not there; there are 4': trace(HEAD.model_copy(update={'index': 4}), 'q'),
  'latent 44 is not there; there are 44': trace(LATENT.model_copy(update={'index': 44})),
  "no SAE is spliced in at 'h.2.resid.post_mlp'": trace(LATENT.model_copy(update={'site': 'h.2.resid.post_mlp'})),
  "there is no SAE at 'h.2.attn.v_out'": {'saes': ['h.2.attn.v_out']},
  'h.1.mlp.2 has no token': trace(Node(kind='neuron', layer=1, index=2)),
  'has no source; say which': trace(Node(kind='head', layer=1, index=2, token=3), 'q'),
  'source 6 is behind token 5; attention looks back': trace(HEAD.model_copy(update={'source': 6}), 'q'),
  'embedding 3 cannot be traced': trace(Node(kind='embedding', token=3)),
  'h.1.attn.2 5<-2 is a head; trace through': trace(HEAD),
  'is traced as a whole; leave out through': trace(LATENT, 'q'),
  'downstream is for a trace through v or all': trace(HEAD, 'q', schema.Trace(node=LATENT)),
  'a head cannot write for what another head writes': trace(HEAD, 'v', schema.Trace(node=HEAD, through='v')),
  'h.1.attn.2 5<-2 is not upstream of what it is to write for': trace(HEAD, 'v', schema.Trace(node=LATENT)),
  'neuron 200 is not there; there are 128': ablate(kind='neuron', layer=0, index=200),
  'the number of the layer is missing; give one from 0 to 2': ablate(kind='attn'),
  'the number of the neuron is missing; give one from 0 to 127': trace(Node(kind='neuron', layer=0, token=0)),
  'the site of an SAE is missing; there is one at': trace(Node(kind='latent', index=0, token=0)),
  'the number of the head is missing; give one from 0 to 3': {'nodes': [Node(kind='head_total', layer=0)]},
  "the site of a node of kind bias is missing; give 'attn' or 'mlp'": {'nodes': [Node(kind='bias', layer=0, token=0)]},
  'an ablation from token 5 to 2 is of none': ablate(kind='mlp', layer=0, first=5, last=2),
  'last 9 is not in a prompt of 7 tokens': ablate(kind='mlp', layer=0, last=9),
  'source 6 is behind token 3': ablate(kind='head', layer=0, index=1, last=3, source=6),
  'the other prompt has 2 tokens and this one 7': ablate(kind='mlp', layer=0, to=schema.OtherPrompt(prompt='3 4')),
  'there is no mean of attention at one token pair': ablate(
    kind='head', layer=0, index=1, source=2, to=schema.Mean()
  ),
  'the windows of the sample have 12 tokens and the prompt 13': {
    'prompt': ' '.join(['3'] * 13)
  } | ablate(kind='mlp', layer=0, to=schema.Resample()),
  'head 9 is not there; there are 4': {'nodes': [Node(kind='head_total', layer=0, index=9)]},
  "the site of a node of kind layer 'resid' is not there; give 'attn' or 'mlp'": {
    'nodes': [Node(kind='layer', layer=0, site='resid', token=0)]
  },
  'h.0.attn.bias has no token': {'nodes': [Node(kind='bias', layer=0, site='attn')]},
  "no SAE is spliced in at 'h.2.attn.v_out'; there is one at": {
    'nodes': [Node(kind='error', site='h.2.attn.v_out', token=0)]
  },
}  # fmt: skip


@pytest.mark.parametrize('sentence', list(BAD))
def test_what_is_not_there_is_refused_with_what_there_is(small, sentence):
  with pytest.raises(ValueError, match=sentence):
    engine.debug(small, subjects.request(**({'k': 5} | BAD[sentence])))


@pytest.mark.parametrize(
  ('place', 'name'),
  [
    ({'kind': 'neuron', 'layer': 0, 'index': 2, 'source': 1}, 'source'),
    ({'kind': 'neuron', 'layer': 0, 'index': 2, 'site': 'h.0.mlp.post_act'}, 'site'),
    ({'kind': 'latent', 'site': 'h.0.mlp.post_act', 'layer': 0}, 'layer'),
    ({'kind': 'mlp', 'layer': 0, 'index': 2}, 'index'),
  ],
)
def test_an_ablation_with_a_place_of_another_kind_is_refused(place, name):
  with pytest.raises(ValueError, match=f'{name} is no part of where a node of kind {place["kind"]} is'):
    schema.Ablation(**place)


def test_means_and_resamples_need_a_sample(small):
  without = subjects.build('gpt2', SITES, sample=False)
  for to in (schema.Mean(), schema.Resample()):
    with pytest.raises(ValueError, match='there is no sample of text to take means or resamples of'):
      engine.debug(without, subjects.request(k=5, **ablate(kind='mlp', layer=0, to=to)))


def test_saes_that_cannot_be_debugged_are_refused(small):
  sae = small.saes[SITES[1]]
  gate_l = np.zeros(sae.n_latents, np.float32)
  gated = sae_lib.with_activation(sae, activation_functions.Gated(gate_l, gate_l))
  key, acts_bd = jax.random.key(0), np.ones((8, 32), np.float32)
  transcoder = sae_lib.as_transcoder(key, sae_lib.init_sae(key, acts_bd, 64, 4), acts_bd)
  for saes, sentence in [
    ({SITES[1]: gated}, 'is gated; the debugger reads SAEs of topk, relu, jumprelu'),
    ({SITES[1]: transcoder}, 'is a transcoder, which writes another site'),
    ({'h.1.mlp.pre_act': sae}, "an SAE at 'h.1.mlp.pre_act' cannot be debugged"),
    ({'h.3.resid.post_mlp': sae}, 'h.0 to h.2'),
    ({'h.1.mlp.post_act': sae}, 'reads 32 numbers and the site has 128'),
  ]:
    with pytest.raises(ValueError, match=sentence):
      subject.Subject(small.model, small.tokenizer, saes)
