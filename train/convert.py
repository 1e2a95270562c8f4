"""Converts a sparse autoencoder from one format to another: --from=PATH --to=PATH --format=NAME, and no --config.

What is written is read again by the formulas of its own format, compared with those of the format that it comes from,
and takes its place only when both give the same.
"""

import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from jax_interp.formats import dictionary_learning, files, gemma_scope, openai, ours, saelens, sparsify
from models import sae as sae_lib
from models import sharding
from train import command

FORMATS = {
  'ours': ours,
  'openai': openai,
  'saelens': saelens,
  'sparsify': sparsify,
  'dictionary_learning': dictionary_learning,
  'gemma_scope': gemma_scope,
}
# Relative. A bias that is folded is rounded to float32; SAELens and OpenAI undo a division by std + 1e-5 by std alone.
TOLERANCE = 1e-4
N_INPUTS, SCALES = 32, (1.0, 100.0)  # Gaussian inputs, of standard deviations from and to
MOST_AT_EDGE = N_INPUTS // 8  # inputs with a latent so near its threshold that rounding switches it

_FROM = flags.DEFINE_string('from', None, 'File or folder of the SAE; .pt and .npz files, else folders.')
_TO = flags.DEFINE_string('to', None, 'File or folder to write, where there is nothing yet.')
_FORMAT = flags.DEFINE_enum('format', None, sorted(FORMATS), 'Of --to.')
_FROM_FORMAT = flags.DEFINE_enum('from_format', None, sorted(FORMATS), 'Of --from; found out when not given.')
_USE_THRESHOLD = flags.DEFINE_bool(
  'use_threshold', None, 'Whether a TopK, BatchTopK or Matryoshka SAE of dictionary_learning is read as JumpReLU.'
)
_TRANSCODER = flags.DEFINE_bool('transcoder', False, 'That a gemma_scope file is a transcoder.')


class Differences(NamedTuple):
  """How the outputs of two SAEs differ.

  Attributes:
    latents: the largest difference, absolute.
    relative_latents: relative to the largest latent of the input.
    recons: the largest difference of reconstructions, absolute.
    relative_recons: relative to the largest number in the input's reconstruction.
    at_edge: how many inputs are left out, since a latent is on in one and off in the other.
    l0: mean number of latents that are on.
  """

  latents: float
  relative_latents: float
  recons: float
  relative_recons: float
  at_edge: int
  l0: float


def compare(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> Differences:
  """Returns how two pairs of latents [b, l] and reconstructions [b, d] differ.

  Raises:
    ValueError: the shapes differ, or there is a number that is not finite.
  """
  for old, new in zip(before, after, strict=True):
    if old.shape != new.shape or not (np.isfinite(old).all() and np.isfinite(new).all()):
      raise ValueError(f'outputs of shape {old.shape} became {new.shape}, or are not finite; look at the weights')
  same_b = ((before[0] > 0) == (after[0] > 0)).all(1)
  found = []
  for old, new in zip(before, after, strict=True):
    difference_b = np.where(same_b, np.abs(old - new).max(1), 0)
    largest_b = np.abs(old).max(1)
    floor = max(1e-3 * largest_b.max(), np.finfo(np.float32).tiny)  # an input that hardly wakes a latent counts less
    found += [float(difference_b.max()), float((difference_b / np.maximum(largest_b, floor)).max())]
  return Differences(*found, at_edge=int((~same_b).sum()), l0=float((before[0] > 0).sum(1).mean()))


def detect(path: pathlib.Path) -> str:
  """Returns the name of the format of what lies at a path.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: it is of no format that we know.
  """
  if not path.exists():
    raise FileNotFoundError(f'there is no {path}; --from is the file or folder of an SAE')
  for name, module in FORMATS.items():
    if module.detect(path):
      return name
  raise ValueError(f'{path} is of none of the formats {", ".join(FORMATS)}; see docs/formats.md for the files of each')


def convert(
  source: pathlib.Path, target: pathlib.Path, format: str, from_format: str | None = None, **reading
) -> Differences:
  """Writes an SAE in another format, and returns how its outputs on random inputs differ.

  Args:
    source: of the SAE.
    target: where there is nothing yet.
    format: of the target, one of FORMATS.
    from_format: of the source, or None to find it out.
    reading: what the source's `read` takes beside the path.

  Raises:
    FileNotFoundError: there is no source.
    FileExistsError: there is something at the target.
    ValueError: the source cannot be read, the format cannot hold it, or the outputs differ by more than TOLERANCE;
      nothing is then written.
  """
  from_format = from_format or detect(source)
  arrays, settings = FORMATS[from_format].read(source, **reading)
  options = {name: value for name, value in reading.items() if name == 'use_threshold'}
  sae, d = sae_lib.build(arrays, settings), arrays['encoder'].shape[1]
  x_bd = np.random.default_rng(0).normal(size=(N_INPUTS, d)) * np.geomspace(*SCALES, N_INPUTS)[:, None]
  with files.new(target) as unchecked:
    FORMATS[format].write(unchecked, sae)
    found = compare(FORMATS[from_format].outputs(source, x_bd, **options), FORMATS[format].outputs(unchecked, x_bd))
    if max(found.relative_latents, found.relative_recons) > TOLERANCE or found.at_edge > MOST_AT_EDGE:
      raise ValueError(
        f'{target} would not compute what {source} does: on {N_INPUTS} random inputs latents differ by '
        f'{found.relative_latents:.1e} and reconstructions by {found.relative_recons:.1e} of their largest (at most '
        f'{TOLERANCE:.0e}), and other latents are on in {found.at_edge} (at most {MOST_AT_EDGE}); nothing is written'
      )
  return found


def _run(argv):
  if len(argv) > 1:
    raise ValueError(f'unexpected arguments {argv[1:]}; flags are --from, --to, --format and --from_format')
  if None in (_FROM.value, _TO.value, _FORMAT.value):
    raise ValueError(f'give --from, --to and --format, one of {", ".join(FORMATS)}')
  source, target = pathlib.Path(_FROM.value), pathlib.Path(_TO.value)
  from_format = _FROM_FORMAT.value or detect(source)
  given = {'use_threshold': (_USE_THRESHOLD, 'dictionary_learning'), 'transcoder': (_TRANSCODER, 'gemma_scope')}
  reading = {}
  for name, (flag, of) in given.items():
    if flag.value != flag.default and from_format != of:
      raise ValueError(f'--{name} is of the format {of}, and {source} is of {from_format}; leave it out')
    if from_format == of:
      reading[name] = flag.value
  found = convert(source, target, _FORMAT.value, from_format, **reading)
  print(f'{source} ({from_format}) -> {target} ({_FORMAT.value})')
  print(f'{N_INPUTS} random inputs, {found.l0:.1f} latents on; the largest differences, and relative to the largest:')
  print(f'  latents         {found.latents:.1e}  {found.relative_latents:.1e}')
  print(f'  reconstructions {found.recons:.1e}  {found.relative_recons:.1e}  (at most {TOLERANCE:.0e})')
  if found.at_edge:
    print(f'  {found.at_edge} inputs are left out: rounding switches a latent that is at its threshold')
  if not found.l0:
    print('  no latent is on, so this says nothing of them')


def main(argv) -> int:
  """Runs the command; returns 0, or 1 on bad input, which it names."""
  logging.set_verbosity(logging.WARNING)
  jax.set_mesh(sharding.make_mesh())
  try:
    _run(argv)
  except (ValueError, OSError) as e:
    print(f'error: {command.sentence(e)}', file=sys.stderr)
    return 1
  return 0


def _parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    sys.exit(f'error: {command.sentence(e)}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
