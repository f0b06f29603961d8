"""The package as a whole: what it imports, what it names, what it shows."""

import pathlib
import subprocess
import sys

import pytest

import optax_ghm
from optax_ghm import flow

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


def public(module):
  return [pytest.param(module, name, id=name) for name in module.__all__]


@pytest.mark.parametrize(('module', 'name'), public(optax_ghm) + public(flow))
def test_every_public_name_has_a_docstring_and_is_in_the_readme(module, name):
  value = getattr(module, name)
  if callable(value):
    assert value.__doc__
  assert name in (ROOT / 'README.md').read_text()


@pytest.mark.parametrize(('module', 'name'), public(optax_ghm) + public(flow))
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
