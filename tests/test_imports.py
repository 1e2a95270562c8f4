"""The import order of the design: an arrow of the flow points one way."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('models', 'jax_interp', 'train', 'configs')
STAGES = (
  'text_sources',
  'text',
  'near_copies',
  'activations',
  'store',
  'sae',
  'records',
  'formats',
  'llm',
  'explain',
  'evals',
  'debugger',
  'report',
  'server',
)
ARRAYS = {'jax', 'flax', 'numpy'}  # all that models/ needs of others
ON_DISK = {'safetensors', 'gguf', 'transformers', 'tokenizers', 'huggingface_hub'}  # and what reads and writes weights
READ_WEIGHTS = ('pretrained', 'gguf_files', 'sae')
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob('*.py'))]


def _imported(path: pathlib.Path) -> set[str]:
  """Returns the dotted names that a file imports, `from a import b` as a.b, `from .a import b` as .a.b."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names}
  return names


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_design(path):
  package, *rest = path.relative_to(ROOT).with_suffix('').parts
  imported = _imported(path)
  ours = {name for name in imported if name.split('.')[0] in PACKAGES}
  assert not {name for name in imported if name.startswith('.')}  # relative imports would escape this test
  if package == 'models':
    assert all(name.startswith('models.') for name in ours)
    theirs = {name.split('.')[0] for name in imported - ours} - sys.stdlib_module_names
    assert theirs <= (ARRAYS | ON_DISK if rest[0] in READ_WEIGHTS else ARRAYS)
  elif package == 'configs':
    assert all(name == 'ml_collections' or name.startswith('configs.') for name in imported)
  elif package == 'jax_interp':
    assert not {name for name in ours if name.startswith(('train', 'configs'))}
    stages = {name.split('.')[1] for name in ours if name.startswith('jax_interp.')}
    assert stages <= set(STAGES)
    if rest[0] in STAGES:
      assert all(STAGES.index(stage) <= STAGES.index(rest[0]) for stage in stages)
  else:
    assert not {name for name in ours if name.startswith('configs')}


def test_every_stage_is_known_to_this_test():
  folder = ROOT / 'jax_interp'
  found = {path.relative_to(folder).parts[0].removesuffix('.py') for path in FILES if folder in path.parents}
  assert found - {'__init__'} <= set(STAGES)
