// The list of components: what the URL says is what is shown, and only that component is in the document.
// Whatever comes from data reaches the document as a text node, never as markup. The page puts heat.js before this file.

const data = JSON.parse(document.getElementById('data').textContent);
const byId = (id) => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';
const FIRST = 5; // excerpts shown of a list before one asks for the rest
const SCORES = { ev_correlation: 'correlation', rsquared: 'R²', absolute_dev_explained: 'absolute deviation' };
const PREDICTIONS = { self: 'This explanation', other_explanation: 'Explanation of another', constant: 'A constant' };
const state = { kind: null, component: null, listed: [], keepLines: false };

// Values and tokens

function dense([positions, values], length) {
  const all = new Array(length).fill(0);
  positions.forEach((position, i) => { all[position] = values[i]; });
  return all;
}

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);
const number = (value, digits = 3) => (Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : 'not known');
const peakOf = (values) => values.indexOf(Math.max(...values.map((value) => value ?? -Infinity)));
const tokensOf = (text) => data.texts[text].map((token) => data.tokens[token]);
const visible = (token) => token.replace(/\r/g, '␍').replace(/\t/g, '⇥').replace(/\n/g, state.keepLines ? '↵\n' : '↵');

// Pieces of the document

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function heatMap(tokens, values, scale, simulated = null, simulatedScale = 0) {
  const row = element('p', { class: simulated ? 'tokens both' : 'tokens' });
  const peak = simulated ? -1 : peakOf(values);
  tokens.forEach((token, i) => {
    const span = element('span', { 'data-value': values[i] === null ? 'not known' : number(values[i]) }, visible(token));
    const images = [paint(heat(values[i], scale))];
    if (simulated) {
      images.push(paint(heat(simulated[i], simulatedScale)));
      span.dataset.simulated = simulated[i] === null ? 'not known' : number(simulated[i]);
    }
    if (images.some((image) => image !== 'none')) span.style.backgroundImage = images.join();
    if (i === peak && values[i] > 0) span.className = 'peak';
    span.token = token;
    row.append(span);
  });
  return row;
}

const values = (excerpt) => dense(excerpt.values, data.texts[excerpt.text].length);

function excerptList(excerpts, scale) {
  const item = (excerpt) => {
    const row = values(excerpt);
    return element('li', {}, element('span', { class: 'value', title: 'largest activation' }, number(row[peakOf(row)])), heatMap(tokensOf(excerpt.text), row, scale));
  };
  const list = element('ol', { class: 'excerpts' }, ...excerpts.slice(0, FIRST).map(item));
  if (excerpts.length <= FIRST) return list;
  const more = element('button', { type: 'button', click: () => {
    list.append(...excerpts.slice(FIRST).map(item));
    more.remove();
  } }, `Show all ${excerpts.length}`);
  return element('div', {}, list, more);
}

function legend(low, scale) {
  const ramp = (...heats) => heats.map((heat) => `rgb(var(--${heat < 0 ? 'cold' : 'hot'}) / ${Math.abs(heat)})`).join();
  const bar = element('i', { style: `background: linear-gradient(90deg, ${low < 0 ? ramp(-1, -0.0001) + ',' : ''} ${ramp(0, 1)})` });
  return element('span', { class: 'legend' }, low < 0 ? `−${number(scale)}` : '0', bar, number(scale), ' ', element('i', { class: 'unknown' }), 'not known');
}

function svg(tag, attributes, text = '') {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function histogram({ counts, edges }) {
  const [width, height, left, bottom] = [360, 130, 44, 20];
  const top = Math.max(1, Math.ceil(Math.log10(Math.max(...counts, 1))));
  const bottomLog = Math.log10(0.5); // not 0: a single token must be seen
  const x = (bin) => left + ((width - left - 8) * bin) / counts.length;
  const y = (log) => 8 + ((height - bottom - 8) * (top - log)) / (top - bottomLog);
  const label = `How many tokens are active, by activation, from ${number(edges[0])} to ${number(edges.at(-1))}; log scale`;
  const plot = svg('svg', { viewBox: `0 0 ${width} ${height}`, class: 'histogram', role: 'img', 'aria-label': label });
  for (let log = 0; log <= top; log += Math.ceil(top / 3)) {
    plot.append(svg('line', { x1: left, x2: width - 8, y1: y(log), y2: y(log) }));
    plot.append(svg('text', { x: left - 6, y: y(log) + 4, 'text-anchor': 'end' }, (10 ** log).toLocaleString('en')));
  }
  counts.forEach((count, bin) => {
    const from = y(count ? Math.log10(count) : bottomLog);
    const bar = svg('rect', { x: x(bin) + 0.5, width: x(1) - x(0) - 1, y: from, height: y(bottomLog) - from });
    bar.append(svg('title', {}, `${number(edges[bin])} to ${number(edges[bin + 1])}: ${count.toLocaleString('en')} tokens`));
    plot.append(bar);
  });
  plot.append(svg('text', { x: left, y: height - 4 }, number(edges[0])));
  plot.append(svg('text', { x: width - 8, y: height - 4, 'text-anchor': 'end' }, number(edges.at(-1))));
  return plot;
}

const chips = (tokens) => element('ul', { class: 'chips' }, ...tokens.map((token) => element('li', { class: 'chip' }, visible(token))));
const section = (heading, ...children) => element('section', {}, element('h3', {}, heading), ...children);

// Explanations

const scoreOf = (component, method) => component.explanations.find((e) => e.method === method)?.scores?.ev_correlation ?? null;

function scoreTable(explanation) {
  const predictions = { self: explanation.scores, ...explanation.nulls };
  const rows = Object.entries(PREDICTIONS).filter(([key]) => predictions[key]).map(([key, label]) =>
    element('tr', { class: key === 'self' ? 'self' : 'null' }, element('th', { scope: 'row' }, label), ...Object.keys(SCORES).map((score) => {
      const value = predictions[key][score];
      const known = Number.isFinite(value);
      const bar = known && score === 'ev_correlation'
        ? element('span', { class: 'meter' }, element('i', { style: `width: ${100 * Math.max(0, Math.min(1, value))}%` })) : null;
      return element('td', {}, bar, known ? value.toFixed(2) : 'not defined');
    })));
  const head = element('tr', {}, element('td'), ...Object.values(SCORES).map((label) => element('th', { scope: 'col' }, label)));
  return element('div', { class: 'scroll' }, element('table', {}, element('thead', {}, head), element('tbody', {}, ...rows)));
}

function realAndSimulated(sequences) {
  const rows = sequences.map(({ split, text, true: real, simulated }) => {
    const length = data.texts[text].length;
    return { split, text, real: dense(real, length), simulated: dense(simulated, length) };
  });
  const realScale = largest(rows.flatMap((row) => row.real));
  const simulatedScale = largest(rows.flatMap((row) => row.simulated));
  const details = element('details', {}, element('summary', {}, `Real and simulated activations on the ${rows.length} excerpts of the score`));
  details.addEventListener('toggle', () => details.append(
    element('p', { class: 'tools' }, `Behind the text: real, up to ${number(realScale)}. Strip below: simulated, up to ${number(simulatedScale)}.`),
    element('ol', { class: 'excerpts' }, ...rows.map((row) =>
      element('li', {}, element('span', { class: 'value' }, row.split), heatMap(tokensOf(row.text), row.real, realScale, row.simulated, simulatedScale))))), { once: true });
  return details;
}

function explanationCard(explanation) {
  const ok = explanation.status === 'ok';
  return element('div', { class: 'explanation' },
    element('h4', {}, data.methods[explanation.method] ?? explanation.method, explanation.model ? ` (${explanation.model})` : '', ' ',
      ok ? null : element('span', { class: 'status' }, explanation.status.replace('_', ' '))),
    explanation.explanation ? element('p', { class: 'text' }, explanation.explanation) : null,
    element('p', {}, [explanation.scores ? '' : 'No score.', explanation.detail].filter(Boolean).join(' ')),
    explanation.scores ? scoreTable(explanation) : null,
    explanation.sequences.length ? realAndSimulated(explanation.sequences) : null);
}

// One component

const name = ({ kind, index }) => `${kind === 'latent' ? 'Latent' : 'Neuron'} ${index}`;
const link = ({ kind, index }) => `#${kind}/${index}`;

function detail(component) {
  const excerpts = [...component.top, ...component.random, ...component.quantiles.flat()];
  const all = excerpts.flatMap(values);
  const scale = largest(all);
  const often = component.density > 0
    ? `active on ${number(100 * component.density)} % of tokens, 1 in ${Math.round(1 / component.density).toLocaleString('en')}`
    : 'never active in the text that was read';
  const lines = element('input', { type: 'checkbox', change: () => { state.keepLines = lines.checked; show(); } });
  lines.checked = state.keepLines;
  const percent = (x) => `${number(100 * x)} %`;
  const bounds = component.quantile_boundaries ?? [];
  return [
    element('div', { class: 'title' }, element('h2', {}, name(component)), element('small', {}, component.site),
      element('nav', { id: 'neighbours', 'aria-label': 'Neighbours' })),
    element('p', {}, `${often}; largest activation ${number(component.max)}; mean ${number(component.mean)}`),
    section('Explanations', ...(component.explanations.length ? component.explanations.map(explanationCard)
      : [element('p', {}, 'None yet: it is not among the components that train.explain was asked for.')])),
    element('section', { class: 'pair-of-panels' },
      section('Activations of active tokens', component.max > 0 ? histogram(component.histogram) : element('p', {}, 'None is active.')),
      element('div', {}, element('h3', {}, 'Tokens it promotes'), chips(component.promoted),
        element('h3', {}, 'Tokens it suppresses'), chips(component.suppressed))),
    section('Strongest excerpts',
      element('p', { class: 'tools' }, legend(Math.min(0, ...all), scale), element('span', {}, 'one scale for all excerpts below'),
        element('label', {}, lines, ' keep line breaks')),
      component.top.length ? excerptList(component.top, scale) : element('p', {}, 'None: it is never active in the text that was read.')),
    section('Random excerpts', excerptList(component.random, scale)),
    ...component.quantiles.map((part, i) =>
      section(`Excerpts whose maximum is between the ${percent(bounds[i])} and ${percent(bounds[i + 1])} quantiles`, excerptList(part, scale))).reverse(),
  ];
}

// The list

const SORTS = {
  ...Object.fromEntries(Object.entries(data.methods).map(([method, label]) => [`score:${method}`, [`score: ${label}`, (c) => scoreOf(c, method), -1]])),
  max: ['largest activation', (c) => c.max, -1],
  density: ['density', (c) => c.density, -1],
  index: ['number', (c) => c.index, 1],
};

function haystack(component) {
  const peaks = component.top.map((excerpt) => tokensOf(excerpt.text)[peakOf(values(excerpt))]);
  return [component.index, ...component.explanations.map((e) => e.explanation), ...component.promoted, ...peaks].join('\n').toLowerCase();
}
const haystacks = new Map();

function matches(component, query) {
  if (!haystacks.has(component)) haystacks.set(component, haystack(component));
  return haystacks.get(component).includes(query);
}

function explanationText(component, method) {
  const explained = component.explanations.filter((e) => e.explanation);
  return (explained.find((e) => e.method === method) ?? explained[0])?.explanation;
}

function list() {
  const key = byId('sort').value;
  const [, value, direction] = SORTS[key];
  const sign = byId('reverse').checked ? -direction : direction;
  const query = byId('search').value.trim().toLowerCase();
  const own = data.components.filter((c) => c.kind === state.kind);
  state.listed = own.filter((c) => !query || matches(c, query)).sort((a, b) => {
    if (String(a.index) === query || String(b.index) === query) return String(a.index) === query ? -1 : 1;
    const [x, y] = [value(a), value(b)]; // what has no value comes last, whichever way the rest is sorted
    return (x === null) - (y === null) || sign * (x - y) || b.max - a.max;
  });
  const rows = state.listed.map((component) => element('li', {}, element('a', { href: link(component) },
    element('b', {}, String(component.index)),
    element('span', {}, visible(explanationText(component, key.split(':')[1]) ?? `promotes ${component.promoted.join(' ')}`)),
    element('span', { class: 'value' }, key === 'index' || value(component) === null ? '' : number(value(component), 2)))));
  byId('list').replaceChildren(...rows);
  byId('count').textContent = `${state.listed.length} of ${own.length} ${state.kind}s`;
  mark();
}

const neighbour = (by) => state.listed.includes(state.component) ? state.listed[state.listed.indexOf(state.component) + by] : undefined;

/** Marks the component that is shown in the list, and links it to those before and after it there. */
function mark() {
  for (const a of byId('list').querySelectorAll('a')) {
    const current = state.component !== null && a.getAttribute('href') === link(state.component);
    setCurrent(a, current);
    if (current && innerWidth > 800) a.scrollIntoView({ block: 'nearest' });
  }
  const steps = [[-1, 'prev', '← previous'], [1, 'next', 'next →']].filter(([by]) => neighbour(by));
  byId('neighbours')?.replaceChildren(...steps.map(([by, rel, label]) => element('a', { href: link(neighbour(by)), rel }, label)));
}

function setCurrent(link, current) {
  if (current) link.setAttribute('aria-current', 'true');
  else link.removeAttribute('aria-current');
}

// What the URL says

function show() {
  const match = location.hash.match(/^#(latent|neuron)\/(\d*)$/);
  byId('overview').hidden = match !== null;
  byId('explorer').hidden = match === null;
  for (const tab of document.querySelectorAll('[data-view]')) {
    setCurrent(tab, tab.dataset.view === (match?.[1] ?? 'overview'));
  }
  if (match === null) {
    byId(location.hash.slice(1))?.scrollIntoView();
    return;
  }
  const [, kind, index] = match;
  if (kind !== state.kind) {
    state.kind = kind;
    list();
  }
  const component = index === '' ? state.listed[0] : data.components.find((c) => c.kind === kind && c.index === Number(index));
  const moved = component !== state.component;
  state.component = component ?? null;
  const absent = element('p', { class: 'notice' }, `This file does not carry ${kind} ${index}. Make it with more: --config.report.n_components.`);
  byId('detail').replaceChildren(...(component ? detail(component) : [absent]));
  mark();
  if (moved) scrollTo(0, 0);
}

function featured() {
  if (!byId('featured')) return;
  const best = (c) => c.explanations.reduce((a, b) => ((b.scores?.ev_correlation ?? -1) > (a?.scores?.ev_correlation ?? -1) ? b : a), null);
  const score = (c) => best(c)?.scores?.ev_correlation ?? -1;
  const chosen = data.components.filter((c) => c.kind === 'latent' && c.top.length).sort((a, b) => score(b) - score(a) || b.max - a.max).slice(0, 6);
  byId('featured').replaceChildren(...chosen.map((component) => {
    const row = values(component.top[0]);
    const around = [Math.max(0, peakOf(row) - 16), peakOf(row) + 9];
    return element('a', { class: 'card', href: link(component) }, element('h3', {}, name(component)),
      best(component) && element('p', { class: 'clamped' }, best(component).explanation),
      best(component) && element('small', {}, `${data.methods[best(component).method]}, correlation ${number(score(component), 2)}`),
      heatMap(tokensOf(component.top[0].text).slice(...around), row.slice(...around), largest(row)));
  }));
}

function tip(event) {
  const span = event.target.closest?.('.tokens span');
  const box = byId('tip');
  box.hidden = !span;
  if (!span) return;
  const simulated = span.dataset.simulated === undefined ? '' : `, simulated ${span.dataset.simulated}`;
  box.textContent = `${JSON.stringify(span.token)}  ${span.dataset.value}${simulated}`;
  const place = span.getClientRects()[0];
  box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 4))}px`;
  box.style.top = `${place.top > box.offsetHeight + 8 ? place.top - box.offsetHeight - 4 : place.bottom + 4}px`;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input:not([type=checkbox]), select')) return;
  if (event.key === '/' && state.kind) {
    event.preventDefault();
    byId('search').focus();
  }
  const by = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const to = by && !byId('explorer').hidden && neighbour(by);
  if (to) location.hash = link(to);
}

byId('sort').append(...Object.entries(SORTS).map(([key, [label]]) => element('option', { value: key }, label)));
for (const id of ['search', 'sort', 'reverse']) byId(id).addEventListener('input', list);
document.querySelector('form').addEventListener('submit', (event) => event.preventDefault());
for (const event of ['mouseover', 'click', 'scroll']) document.addEventListener(event, tip, { passive: true });
document.addEventListener('keydown', keys);
addEventListener('hashchange', show);
featured();
show();
