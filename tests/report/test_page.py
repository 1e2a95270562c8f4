"""The page on made-up components, some of them hostile, as a browser shows it."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from jax_interp.explain import results
from jax_interp.report import components, page

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
browser = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium')
HOSTILE = ['<b>', '</b>', '&amp;', '\n', '  two', '\t', '🙂', '\ufffd', '</script>', '<!--', '\u2028', '\'"', '日本']
WORDS = [
  ' the',
  ' of',
  ' a',
  'Returns',
  ' array',
  '.',
  ',',
  ' if',
  '(',
  ')',
  ' shape',
  ' float',
  '\n',
  '    ',
  *HOSTILE,
]
STRINGS = [f' tok{i}' for i in range(40)] + WORDS
N_TOKENS, N_BINS = 64, 20


def excerpt(rng, scale, dense):
  acts = rng.normal(0, 0.1, N_TOKENS) if dense else np.zeros(N_TOKENS)
  peaks = rng.choice(N_TOKENS, 4, replace=False)
  acts[peaks] = scale * rng.uniform(0.2, 1, 4)
  return {'tokens': rng.choice(WORDS, N_TOKENS).tolist(), 'activations': acts.tolist()}


def explanation(rng, component, method, status='ok', model=None):
  line = {'component': component, 'method': method, 'explanation': None, 'status': status, 'detail': '', 'model': model}
  if status != 'ok':
    unscored = {'scores': None, 'nulls': dict.fromkeys(('other_explanation', 'constant')), 'sequences': []}
    return {**line, 'detail': 'no list of numbers in the answer', 'excerpts': {'parse_failed': 10}, **unscored}
  score = lambda mean: dict(zip(results.SCORES, (mean + rng.normal(0, 0.1, 3)).tolist(), strict=True))
  sequences = []
  for split in ['top'] * 5 + ['random'] * 5:
    e = excerpt(rng, 3, False)
    simulated = np.maximum(e['activations'] + rng.normal(0, 0.3, N_TOKENS), 0)
    sequences.append({'split': split, 'tokens': e['tokens'], 'true': e['activations'], 'simulated': simulated.tolist()})
  return {
    **line,
    'explanation': f'<i>tokens</i> like {str(rng.choice(WORDS))!r} after a list & so on',
    'scores': {**score(0.5), 'random_only': score(0.2)},
    'nulls': {'other_explanation': score(0.05), 'constant': {**score(-0.1), 'ev_correlation': None}},
    'excerpts': {'ok': 9, 'failed': 1},
    'sequences': sequences,
  }


def component(rng, kind, index, n_explanations=3):
  scale = float(rng.uniform(1, 8))
  many = lambda n: [excerpt(rng, scale, kind == 'neuron') for _ in range(n)]
  record = {
    'mean': 0.01,
    'quantile_boundaries': [0, 0.5, 0.9, 0.99, 0.999],
    'most_positive_activation_records': sorted(many(20), key=lambda e: -max(e['activations'])),
    'random_sample': many(15),
    'random_sample_by_quantile': [many(5) for _ in range(4)],
  }
  arrays = {
    'density': np.float32(10 ** rng.uniform(-4, -1)),
    'max': np.float32(scale),
    'histogram': np.round(1e4 * np.exp(-0.5 * np.arange(N_BINS))).astype(int),
    'edges': np.linspace(0, scale, N_BINS + 1),
    'promoted_tokens': rng.choice(len(STRINGS), 10),
    'suppressed_tokens': rng.choice(len(STRINGS), 10),
  }
  arrays = {name: np.broadcast_to(x, (index + 1, *np.shape(x))) for name, x in arrays.items()}
  site = {'latent': 'h.2.resid.post_mlp', 'neuron': 'h.2.mlp.post_act'}[kind]
  of = {'kind': kind, 'site': site, 'index': index}
  made = [
    explanation(rng, of, 'token_lookup'),
    explanation(rng, of, 'neuron2graph'),
    explanation(rng, of, 'token_activation', 'parse_failed' if index % 3 else 'ok', 'SmolLM2-135M-Instruct'),
  ][:n_explanations]
  return components.describe(kind, site, index, record, arrays, STRINGS, made), made


def summary_of(lines):
  """As train.explain writes it, of latents."""
  latents = [line for line in lines if line['component']['kind'] == 'latent']
  of = {method: [line for line in latents if line['method'] == method] for method in page.METHODS}
  return {method: results.summarize(found) | {'model': found[0]['model']} for method, found in of.items()}


def arguments(n=6):
  rng = np.random.default_rng(0)
  made = [component(rng, 'latent', 3 + 4 * i, 3 if i < 4 else 0) for i in range(n)]
  made += [component(rng, 'neuron', 10 + i, 2 if i < 1 else 0) for i in range(n // 2)]
  steps = np.arange(1, 101)
  return {
    'title': 'Latents of h.2.resid.post_mlp',
    'facts': {'Subject model': 'embedded', 'Latents': '3,072, of which 16 are active on a token'},
    'made': '1 January 2030',
    'command': 'python -m train.report --config=configs/tiny.py',
    'missing': [],
    'training': {
      'sae': [
        {
          'tokens': int(s) * 40_000,
          'loss': 1 / s**0.4,
          'normalized_mse': 0.9 / s**0.4,
          'l0': 16.0,
          'dead': int(3e3 / s),
        }
        for s in steps
      ],
      'lm': [
        {'tokens': int(s) * 10, 'loss': 2 + 5 / s, **({'held_out_loss': 2.2} if s % 50 == 0 else {})} for s in steps
      ],
    },
    'numbers': {
      'normalized_mse': 0.12,
      'l0': 16.0,
      'loss_recovered_mean': 0.93,
      'dead_latent_fraction': 0.01,
      'of_no_known_name': None,
    },
    'density': (np.round(300 * np.exp(-(np.linspace(-3, 3, 30) ** 2))).tolist(), np.linspace(-5, -0.5, 31).tolist()),
    'summary': summary_of([line for _, lines in made for line in lines]),
    'components': components.embed([c for c, _ in made], 8_000_000),
    'totals': {'latent': 3072, 'neuron': 768},
  }


def embedded(html_text):
  return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html_text, re.DOTALL)[1])


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'report.html'
  path.write_text(page.render(**arguments()), 'utf-8')
  return path


def dom(path: pathlib.Path, tmp_path: pathlib.Path, fragment: str = '', *flags: str) -> str:
  """Returns the document after its scripts ran, in a browser that can resolve no name."""
  arguments = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync']
  arguments += ['--disable-background-networking', '--disable-component-update', '--virtual-time-budget=3000']
  arguments += ['--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={tmp_path / "profile"}', *flags]
  url = f'{path.as_uri()}{fragment}'
  done = subprocess.run([CHROMIUM, *arguments, '--dump-dom', url], capture_output=True, timeout=120, check=True)
  return done.stdout.decode()


def text(fragment: str) -> str:
  return html.unescape(re.sub('<[^>]*>', '', fragment))


# Without a browser


def test_the_page_refers_to_nothing_outside(written):
  source = written.read_text('utf-8')
  assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|@import|fetch\(|import ', source)
  assert set(re.findall(r'https?://[^\s"\'<]+', source)) <= {
    'http://www.w3.org/2000/svg',
    'http://www.w3.org/1999/xlink',
  }


def test_data_cannot_leave_its_element_and_comes_back_whole(written):
  data = embedded(written.read_text('utf-8'))
  assert set(HOSTILE) <= set(data['tokens'])
  first = data['components'][0]
  assert len(first['top']) == 20
  assert len(data['texts'][first['top'][0]['text']]) == N_TOKENS


def test_activations_keep_their_place_and_what_is_not_known_is_null():
  described, _ = component(np.random.default_rng(0), 'latent', 3, 0)
  described['top'] = [{'tokens': ['a', 'b', 'a', 'c'], 'activations': [0.0, 1.23456, float('nan'), 0.0]}]
  data = components.embed([described], 10**6)
  top = data['components'][0]['top'][0]
  assert [data['tokens'][i] for i in data['texts'][top['text']]] == ['a', 'b', 'a', 'c']
  assert top['values'] == [[1, 2], [1.23, None]]


def test_what_does_not_fit_is_left_out_from_the_end():
  made = [component(np.random.default_rng(i), 'latent', i, 0)[0] for i in range(4)]
  whole = components.embed(made, 10**9)
  limit = len(components.dumps(whole)) * 5 // 8
  part = components.embed(made, limit)
  assert [c['index'] for c in part['components']] == [0, 1]
  assert part['texts'] == whole['texts'][: len(part['texts'])]
  assert max(c['text'] for c in part['components'][1]['random']) < len(part['texts'])


def test_scores_stand_beside_their_nulls_and_failures_are_counted(written):
  overview = text(written.read_text('utf-8').split('<script type="application/json"')[0])
  rows = text(written.read_text('utf-8').split('<table>')[1].split('</table>')[0])
  assert [rows.index(label) for label in page.METHODS.values()] == sorted(map(rows.index, page.METHODS.values()))
  assert all(rows.count(label) == len(page.METHODS) for label in ('Explanation of another', 'A constant'))
  mean = arguments()['summary']['token_lookup']['scores']['ev_correlation']
  assert f'{mean["mean"]:.2f}\n          {mean["low"]:.2f} to {mean["high"]:.2f}' in rows
  assert 'are weak: it is a tiny model' in overview
  assert '2 of 4 attempts did not end well' in overview


def test_a_run_without_anything_says_what_is_missing(tmp_path):
  empty = {
    **arguments(),
    'missing': [('the latents and neurons', 'python -m train.records')],
    'training': {},
    'numbers': {},
    'density': None,
    'summary': {},
    'components': components.embed([], 1000),
    'totals': {},
  }
  source = page.render(**empty)
  assert 'Missing: the latents and neurons.' in source
  assert 'python -m train.records' in source
  for heading in ('id="scores"', 'id="numbers"', 'id="featured"', 'Training of'):
    assert heading not in source


# In a browser


@browser
def test_colours_are_monotone_clamped_neutral_at_zero_and_hatched_when_not_known(tmp_path):
  functions = pathlib.Path(page.__file__).with_name('heat.js').read_text('utf-8')
  values = '[-9, -2, -1, -0.5, 0, 0.5, 1, 2, 9]'
  probe = tmp_path / 'probe.html'
  probe.write_text(
    f'<pre></pre><script type="module">{functions}\n'
    f'const heats = {values}.map((v) => heat(v, 2)), unknown = [null, undefined, NaN].map((v) => paint(heat(v, 2)));'
    'document.querySelector("pre").textContent = JSON.stringify({heats, paints: heats.map(paint), unknown,'
    'silent: heat(0, 0)});</script>',
    'utf-8',
  )
  result = json.loads(text(re.search('<pre>(.*)</pre>', dom(probe, tmp_path))[1]))
  assert result['heats'] == [-1, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1]
  assert result['paints'][4] == 'none'
  assert all('--cold' in x for x in result['paints'][:4])
  assert all('--hot' in x for x in result['paints'][5:])
  assert result['unknown'] == ['var(--hatch)'] * 3
  assert result['silent'] == 0


@browser
def test_a_link_opens_its_latent_and_hostile_tokens_are_text(written, tmp_path):
  shown = dom(written, tmp_path, '#latent/7')
  detail = re.search(r'<article id="detail".*?</article>', shown, re.DOTALL)[0]
  assert '<h2>Latent 7</h2>' in detail
  assert re.search(r'<main id="overview"[^>]*hidden', shown)
  data = embedded(written.read_text('utf-8'))
  latent = next(c for c in data['components'] if (c['kind'], c['index']) == ('latent', 7))
  tokens = [data['tokens'][i] for i in data['texts'][latent['top'][0]['text']]]
  first = re.search(r'<p class="tokens">(.*?)</p>', detail, re.DOTALL)[1]
  spans = re.findall(r'<span[^>]*>(.*?)</span>', first, re.DOTALL)
  assert [html.unescape(s) for s in spans] == [t.replace('\n', '↵').replace('\t', '⇥') for t in tokens]
  assert '&lt;i&gt;tokens&lt;/i&gt; like' in detail  # an explanation is text too
  assert 'parse failed' in detail
  assert 'No score. no list of numbers in the answer' in detail
  assert '<b>' not in detail


@browser
@pytest.mark.parametrize(
  ('fragment', 'said'),
  [
    ('#latent/4', 'This file does not carry latent 4'),
    ('#neuron/10', 'Neuron 10'),
    ('#neuron/', 'Neuron 10'),  # the tab opens the first of the list
    ('#latent/19', 'None yet: it is not among the components'),
  ],
)
def test_other_links(written, tmp_path, fragment, said):
  assert said in text(re.search(r'<article id="detail".*?</article>', dom(written, tmp_path, fragment), re.DOTALL)[0])


@browser
def test_back_undoes_one_navigation_and_search_finds(written, tmp_path):
  """The steps run in a page that frames the report; same-origin access needs a flag for files."""
  driver = tmp_path / 'driver.html'
  driver.write_text(
    f"""<iframe src="{written.as_uri()}#latent/3" width=1200 height=900></iframe><pre></pre><script>
    const frame = document.querySelector('iframe'), log = {{}};
    const wait = () => new Promise((done) => setTimeout(done, 100));
    frame.onload = async () => {{
      const doc = frame.contentDocument, before = history.length;
      const title = () => doc.querySelector('#detail h2').textContent;
      await wait(); log.opened = title();
      const inOrder = [...doc.querySelectorAll('#list a b')].map((b) => b.textContent);
      const current = inOrder.indexOf('3');
      const by = current === 0 ? ['j', 1] : ['k', -1];
      doc.body.dispatchEvent(new frame.contentWindow.KeyboardEvent('keydown', {{key: by[0], bubbles: true}}));
      await wait(); log.moved = title() === 'Latent ' + inOrder[current + by[1]]; log.entries = history.length - before;
      history.back(); await wait(); log.back = title();
      const search = doc.querySelector('#search');
      search.value = '15'; search.dispatchEvent(new frame.contentWindow.Event('input'));
      log.first = doc.querySelector('#list a b').textContent;
      search.value = 'NOWHERE'; search.dispatchEvent(new frame.contentWindow.Event('input'));
      log.none = doc.querySelector('#count').textContent;
      document.querySelector('pre').textContent = JSON.stringify(log);
    }};</script>""",
    'utf-8',
  )
  shown = dom(driver, tmp_path, '', '--allow-file-access-from-files')
  log = json.loads(text(re.search('<pre>(.*)</pre>', shown)[1]))
  assert log == {
    'opened': 'Latent 3',
    'moved': True,
    'entries': 1,
    'back': 'Latent 3',
    'first': '15',
    'none': '0 of 6 latents',
  }
