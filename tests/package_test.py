"""The package as a whole: what it imports, what it names, what it shows."""

import inspect
import pathlib
import re
import subprocess
import sys
import typing

import pytest

import optax_ghm
from tests.support.public import public_names

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


TOUR = ''.join(
  path.read_text()
  for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))
)
TOURED = ('', 'flow', 'linen', 'nnx')
"""Names of other packages, most of them types of states, need no tour."""
PUBLIC = pytest.mark.parametrize(
  ('path', 'value'), public_names().items(), ids=public_names()
)


def test_the_top_level_is_short_and_holds_no_state_types():
  assert len(optax_ghm.__all__) <= 55
  for name in optax_ghm.__all__:
    assert not name.isupper() and not name.endswith('State')


@PUBLIC
def test_every_public_name_has_a_docstring_and_is_explained(path, value):
  if callable(value) and not typing.get_origin(value):
    assert value.__doc__
  package, _, name = path.rpartition('.')
  if package.removeprefix('optax_ghm').strip('.') in TOURED:
    assert re.search(rf'\b{name}\b', TOUR)


RETURNED = {
  'optax_ghm.backward.InBackward',
  'optax_ghm.calibration.RangeTest',
  'optax_ghm.flow.Verdict',
  'optax_ghm.nnx.BatchNormStats',
}
"""Classes that users do not call; the functions that return them do."""


@PUBLIC
def test_what_users_call_has_an_example(path, value):
  is_record = inspect.isclass(value) and issubclass(value, tuple)
  is_type = getattr(value, '_is_protocol', False) or typing.get_origin(value)
  if callable(value) and not (is_record or is_type or path in RETURNED):
    assert '>>> ' in value.__doc__
