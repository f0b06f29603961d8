"""The package as a whole: what it imports, what it names, what it shows."""

import pathlib
import re
import subprocess
import sys

import pytest

import optax_ghm
from optax_ghm import flow, linen, nnx

ROOT = pathlib.Path(__file__).parent.parent


def test_import_loads_neither_flax_nor_plots():
  code = (
    'import sys, optax\n'
    'before = set(sys.modules)\n'
    'import optax_ghm\n'
    'new = {m.split(".")[0] for m in set(sys.modules) - before}\n'
    'print(sorted(new & {"flax", "matplotlib", "rich", "sklearn", "chex"}))\n'
    'print(len([m for m in set(sys.modules) - before\n'
    '           if not m.startswith("optax_ghm")]))\n'
  )
  output = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout.split('\n')
  assert output[0] == '[]'
  assert int(output[1]) <= 2


EXPLAINED = ''.join(
  path.read_text()
  for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))
)
PUBLIC = [
  pytest.param(module, name, id=f'{module.__name__}.{name}')
  for module in (optax_ghm, flow, linen, nnx)
  for name in module.__all__
]


@pytest.mark.parametrize(('module', 'name'), PUBLIC)
def test_every_public_name_has_a_docstring_and_is_explained(module, name):
  value = getattr(module, name)
  if callable(value):
    assert value.__doc__
  assert re.search(rf'\b{name}\b', EXPLAINED)


@pytest.mark.parametrize(('module', 'name'), PUBLIC)
def test_public_functions_have_an_example(module, name):
  value = getattr(module, name)
  plain_records = {
    'BatchNormStats',
    'CalibratedState',
    'DepthProfile',
    'Layer',
    'Leaf',
    'Verdict',
    'ClipState',
    'Crowd',
    'DensityState',
    'HarmonizedAggregateState',
    'DensityEstimator',
    'GradientNoise',
    'InBackward',
    'InBackwardState',
    'Moments',
    'NoiseScaleState',
    'NormalizeState',
    'PercentileEstimator',
    'RangeTest',
    'ReverseState',
    'RunningMoments',
    'SecondMomentState',
    'SkipState',
  }
  if callable(value) and name not in plain_records:
    assert '>>> ' in value.__doc__
