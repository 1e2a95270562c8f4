"""Our files in the libraries whose format they are of, where these are installed, and theirs in ours."""

import jax
import numpy as np
import pytest

from jax_interp.formats import dictionary_learning, openai, saelens, sparsify
from models import sae as sae_lib
from models import sharding
from tests.formats import saes

torch = pytest.importorskip('torch', reason='the libraries to compare with need torch')

LN = {'normalization': 'layer_norm_std'}
SCALED = {'normalization': 'constant', 'input_scale': 0.3}
TRANSCODER = {'transcoder': True, **SCALED, 'output_scale': 1.7}
# Between float32 and float64 of latents up to 30 and sums of 10 of them.
CLOSE = {'rtol': 1e-5, 'atol': 3e-5}
# Theirs undoes a division by std + 1e-5 by std alone, ours by both.
CLOSE_NORMALISED = {'rtol': 1e-5, 'atol': 1e-4}


@pytest.fixture(autouse=True)
def _one_device():
  with jax.set_mesh(sharding.make_mesh()), torch.no_grad():
    yield


def _agree(sae, form, path, theirs, **reading):
  """Checks latents and reconstructions of their module against their formulas as we have them, and against our SAE."""
  x_bd = saes.inputs()
  for x in form.outputs(path, x_bd, **reading), saes.forward(sae, x_bd):
    close = CLOSE_NORMALISED if sae.normalization == 'layer_norm_std' else CLOSE
    for ours_is, theirs_is in zip(x, theirs(torch.from_numpy(x_bd)), strict=True):
      np.testing.assert_allclose(ours_is, theirs_is.numpy(), **close)


class _OpenAI(torch.nn.Module):
  """Has the parameters and buffers of OpenAI's Autoencoder, and computes what its paper and code say."""

  def __init__(self, n_latents, d):
    super().__init__()
    self.pre_bias = torch.nn.Parameter(torch.zeros(d))
    self.latent_bias = torch.nn.Parameter(torch.zeros(n_latents))
    self.encoder = torch.nn.Linear(d, n_latents, bias=False)
    self.decoder = torch.nn.Linear(n_latents, d, bias=False)
    for name in ('stats_last_nonzero', 'latents_activation_frequency', 'latents_mean_square'):
      dtype = torch.long if name == 'stats_last_nonzero' else torch.float
      self.register_buffer(name, torch.zeros(n_latents, dtype=dtype))

  def forward(self, x, k):
    mean, std = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if k else (0, 1)
    x = (x - mean) / (std + 1e-5) if k else x
    latents = torch.relu(self.encoder(x - self.pre_bias) + self.latent_bias)
    if k:
      values, indices = latents.topk(k)
      latents = torch.zeros_like(latents).scatter(-1, indices, values)
    return latents, (self.decoder(latents) + self.pre_bias) * std + mean


@pytest.mark.parametrize(('activation', 'kind'), [('topk', LN), ('relu', {})], ids=['topk', 'relu'])
def test_openai(tmp_path, activation, kind):
  sae = saes.sae(activation, **kind)
  openai.write(tmp_path / 'sae.pt', sae)
  state = torch.load(tmp_path / 'sae.pt', weights_only=True)
  assert state.pop('activation') == {'topk': 'TopK', 'relu': 'ReLU'}[activation]
  k = state.pop('activation_state_dict').get('k')
  module = _OpenAI(saes.N_LATENTS, saes.D)
  module.load_state_dict(state, strict=True)
  _agree(sae, openai, tmp_path / 'sae.pt', lambda x: module(x, k))
  # And what torch itself writes of such a module.
  theirs = {**module.state_dict(), 'activation': 'TopK' if k else 'ReLU', 'activation_state_dict': {'k': k}}
  torch.save(theirs, tmp_path / 'theirs.pt')
  for name, array in openai.read(tmp_path / 'theirs.pt')[0].items():
    np.testing.assert_array_equal(array, openai.read(tmp_path / 'sae.pt')[0][name])


@pytest.mark.parametrize(
  ('activation', 'kind'),
  [
    *((activation, kind) for activation in saes.ACTIVATIONS for kind in ({}, LN, SCALED)),
    *((activation, {**TRANSCODER, 'skip': skip}) for activation in ('relu', 'jumprelu') for skip in (False, True)),
  ],
  ids=lambda value: '-'.join(value) or 'plain' if isinstance(value, dict) else value,
)
def test_saelens_loads_ours(tmp_path, activation, kind):
  sae_lens = pytest.importorskip('sae_lens', reason='compares with SAELens 6')
  sae = saes.sae(activation, **kind)
  saelens.write(tmp_path / 'sae', sae)
  theirs = sae_lens.SAE.load_from_disk(tmp_path / 'sae')

  def outputs(x):
    latents = theirs.encode(x)
    return latents, theirs.forward(x)  # not decode, which has no skip

  _agree(sae, saelens, tmp_path / 'sae', outputs)


@pytest.mark.parametrize('subtracts', [False, True])
@pytest.mark.parametrize('architecture', ['standard', 'topk', 'jumprelu', 'gated', 'batchtopk'])
def test_ours_loads_saelens(tmp_path, architecture, subtracts):
  sae_lens = pytest.importorskip('sae_lens', reason='compares with SAELens 6')
  names = {'standard': 'Standard', 'topk': 'TopK', 'jumprelu': 'JumpReLU', 'gated': 'Gated', 'batchtopk': 'BatchTopK'}
  kind = f'{names[architecture]}Training' if architecture == 'batchtopk' else names[architecture]
  settings = {'d_in': saes.D, 'd_sae': saes.N_LATENTS, 'apply_b_dec_to_input': subtracts}
  settings |= {'topk': {'k': 3, 'rescale_acts_by_decoder_norm': True}, 'batchtopk': {'k': 2}}.get(architecture, {})
  if architecture != 'batchtopk':
    settings['normalize_activations'] = 'layer_norm'
  theirs = getattr(sae_lens, f'{kind}SAE')(getattr(sae_lens, f'{kind}SAEConfig')(**settings))
  torch.manual_seed(0)
  for param in theirs.parameters():
    param.copy_(torch.randn_like(param))
  if architecture == 'batchtopk':
    theirs.topk_threshold.fill_(1.5)
    theirs.save_inference_model(tmp_path / 'sae')  # as a JumpReLU SAE
    theirs = sae_lens.SAE.load_from_disk(tmp_path / 'sae')
  else:
    theirs.save_model(tmp_path / 'sae')
  sae = sae_lib.build(*saelens.read(tmp_path / 'sae'))
  _agree(sae, saelens, tmp_path / 'sae', lambda x: (theirs.encode(x), theirs.forward(x)))


@pytest.mark.parametrize(
  'kind', [{}, SCALED, {**TRANSCODER, 'd_out': saes.D}, {**TRANSCODER, 'd_out': saes.D, 'skip': True}], ids='-'.join
)
def test_sparsify(tmp_path, kind):
  library = pytest.importorskip('sparsify', reason='compares with eai-sparsify')
  sae = saes.sae('topk', **kind)
  sparsify.write(tmp_path / 'layers.3', sae)
  theirs = library.SparseCoder.load_from_disk(tmp_path / 'layers.3')

  def outputs(x):
    found = theirs(x)
    dense = torch.zeros(len(x), saes.N_LATENTS).scatter(-1, found.latent_indices, found.latent_acts)
    return dense, found.sae_out

  _agree(sae, sparsify, tmp_path / 'layers.3', outputs)
  # And back, through what they write.
  theirs.save_to_disk(tmp_path / 'theirs')
  _agree(sae_lib.build(*sparsify.read(tmp_path / 'theirs')), sparsify, tmp_path / 'theirs', outputs)


@pytest.mark.parametrize('activation', saes.ACTIVATIONS)
@pytest.mark.parametrize('kind', [{}, SCALED], ids='-'.join)
def test_dictionary_learning_loads_ours(tmp_path, activation, kind):
  utils = pytest.importorskip('dictionary_learning.utils', reason='compares with dictionary_learning')
  sae = saes.sae(activation, **kind)
  dictionary_learning.write(tmp_path / 'trainer_0', sae)
  if activation == 'relu':  # what it loads it brings to unit rows, which changes latents
    from dictionary_learning.dictionary import AutoEncoder

    theirs = AutoEncoder.from_pretrained(tmp_path / 'trainer_0' / 'ae.pt', normalize_decoder=False)
  else:
    theirs, _ = utils.load_dictionary(str(tmp_path / 'trainer_0'), 'cpu')
  outputs = lambda x: (theirs.encode(x), theirs.forward(x))
  _agree(sae, dictionary_learning, tmp_path / 'trainer_0', outputs)


@pytest.mark.parametrize('kind', ['BatchTopKSAE', 'MatryoshkaBatchTopKSAE', 'AutoEncoderTopK', 'AutoEncoderNew'])
def test_ours_loads_dictionary_learning(tmp_path, kind):
  utils = pytest.importorskip('dictionary_learning.utils', reason='compares with dictionary_learning')
  sizes = {'activation_dim': saes.D, 'dict_size': saes.N_LATENTS}
  more = {'MatryoshkaBatchTopKSAE': {'k': saes.K, 'group_sizes': [4, 6]}, 'AutoEncoderNew': {}}
  theirs = getattr(utils, kind)(**sizes, **more.get(kind, {'k': saes.K}))
  torch.manual_seed(0)
  for param in theirs.parameters():
    param.copy_(torch.randn_like(param))
  if kind != 'AutoEncoderNew':
    theirs.threshold.fill_(0.9)
  path = tmp_path / 'trainer_0'
  path.mkdir()
  torch.save(theirs.state_dict(), path / 'ae.pt')
  k = f', "k": {saes.K}' if kind != 'AutoEncoderNew' else ''
  (path / 'config.json').write_text(f'{{"trainer": {{"dict_class": "{kind}"{k}}}, "buffer": {{}}}}')
  ways = {'AutoEncoderNew': (None,)}.get(kind, (None, False, True))
  for use_threshold in ways:
    sae = sae_lib.build(*dictionary_learning.read(path, use_threshold))

    def outputs(x, use_threshold=use_threshold):
      # A batch of one token, of which the largest of the batch are the token's.
      options = {} if use_threshold is None else {'use_threshold': use_threshold}
      latents = torch.cat([theirs.encode(row[None], **options) for row in x])
      return latents, theirs.decode(latents)

    _agree(sae, dictionary_learning, path, outputs, use_threshold=use_threshold)
