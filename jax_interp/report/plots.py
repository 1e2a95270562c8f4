"""Numbers -> inline SVG that takes its colours from the page, so that it is right in light and in dark mode."""

import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import ticker

# Colours as matplotlib writes them -> what the page is to read instead.
INK, GRID, *SERIES = '#000001', '#000002', '#000003', '#000004', '#000005', '#000006'
CSS = {INK: 'currentColor', GRID: 'var(--line)', **{c: f'var(--series-{i})' for i, c in enumerate(SERIES)}}
STYLE = {
  'svg.fonttype': 'none',  # text stays text: the page's font, selectable
  'svg.hashsalt': 'report',  # the same numbers give the same file
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.titlelocation': 'left',
  'axes.titlesize': 10,
  'grid.color': GRID,
  'grid.linewidth': 0.6,
  'legend.frameon': False,
  **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), INK),
}


def curve(rows: Sequence[Mapping], x: str, fields: Mapping[str, str], title: str) -> str:
  """Returns a line plot of some fields of a metrics log.

  Args:
    rows: one dict per logged step; a row without a field, or with null, is passed over.
    x: the field of the horizontal axis.
    fields: {field: label}; one label alone needs no legend.
    title: above the plot.
  """

  def draw(axes):
    for colour, (field, label) in zip(SERIES, fields.items(), strict=False):
      points = [(row[x], row[field]) for row in rows if row.get(field) is not None]
      axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
    axes.set(title=title, xlabel=x)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    if len(fields) > 1:
      axes.legend()

  return _svg(draw, (4.2, 2.6), f'{title} against {x}')


def bars(counts: Sequence[float], edges: Sequence[float], title: str, xlabel: str, ylabel: str) -> str:
  """Returns a histogram of counts [bin] between edges [bin + 1]."""

  def draw(axes):
    axes.stairs(counts, edges, fill=True, color=SERIES[0])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)

  return _svg(draw, (6.4, 2.6), title)


def intervals(groups: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> str:
  """Returns points with intervals on one axis: {row: {series: (value, low, high)}}; the first series is filled."""
  series = list(dict.fromkeys(name for group in groups.values() for name in group))

  def draw(axes):
    for i, name in enumerate(series):
      rows = [row for row, group in enumerate(groups.values()) if name in group]
      value, low, high = np.array([list(groups.values())[row][name] for row in rows]).T
      offset = np.array(rows) + 0.22 * (i - (len(series) - 1) / 2)
      axes.errorbar(
        value,
        offset,
        xerr=np.maximum([value - low, high - value], 0),  # rounding may put the mean outside by a hair
        fmt='o' if i == 0 else 's',
        markerfacecolor=SERIES[i] if i == 0 else 'none',
        color=SERIES[i],
        markersize=6,
        label=name,
      )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(title=title, yticks=range(len(groups)), yticklabels=list(groups), ylim=(len(groups) - 0.5, -0.5))
    axes.grid(axis='y', visible=False)
    axes.figure.legend(loc='outside lower center', ncols=len(series))

  return _svg(draw, (8, 1 + 0.6 * len(groups)), title)


def _svg(draw, size: tuple[float, float], label: str) -> str:
  with matplotlib.rc_context(STYLE):
    figure = mpl_figure.Figure(size, layout='constrained')
    draw(figure.add_subplot())
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None}, transparent=True)
  svg = file.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<(metadata|style)\b.*?</\1>', '', svg, flags=re.DOTALL)  # a style here would hold for the whole page
  svg = re.sub(
    r' id="[a-z0-9.]+_\d+"', '', svg
  )  # figure_1, axes_1, ...: the same in every plot, and nothing refers to them
  for colour, css in CSS.items():
    svg = svg.replace(colour, css)
  return svg.replace('<svg', f'<svg role="img" aria-label="{html.escape(label)}"', 1)
