"""The house: who may import whom, and how long a file may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2] / 'optax_ghm'
FILES = sorted(ROOT.rglob('*.py'))
IDEAS = {
  'harmonization',
  'conflict',
  'reversal',
  'calibration',
  'batch_normalization',
}
BELOW = {'_core': set(), 'backward': {'_core'}}
BELOW |= {idea: {'_core', 'backward'} for idea in IDEAS}
BELOW['flow'] = {'_core', 'backward'} | IDEAS
BELOW |= {face: BELOW['flow'] | {'flow'} for face in ('linen', 'nnx')}


@pytest.mark.parametrize(
  'path', FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_imports_only_what_stands_below_it(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 400
  package = path.relative_to(ROOT).parts[0]
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.Import | ast.ImportFrom):
      continue
    assert not any((name.asname or '').startswith('_') for name in node.names)
    modules = [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
      assert not node.level, 'a relative import'
      modules = [f'{node.module}.{name}' for name in modules]
    for module in modules:
      root, *parts = module.split('.')
      if root == 'optax_ghm' and package != '__init__.py':
        assert parts and parts[0] in BELOW[package] | {package}, module
