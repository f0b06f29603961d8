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


def printed(code):
  """The lines that a fresh process prints."""
  return subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout.splitlines()


def test_import_loads_nothing_else():
  code = (
    'import importlib, sys, typing\n'
    'before = set(sys.modules)\n'
    'import optax_ghm\n'
    'print(*set(sys.modules) - before)\n'
  )
  assert printed(code) == ['optax_ghm']


def test_use_loads_neither_flax_nor_plots():
  code = (
    'import sys, optax\n'
    'before = set(sys.modules)\n'
    'from optax_ghm import *\n'
    'new = set(sys.modules) - before\n'
    'print(len([m for m in new if not m.startswith("optax_ghm")]))\n'
    'print(*{m.split(".")[0] for m in new})\n'
  )
  count, names = printed(code)
  assert int(count) <= 2
  loaded = {'flax', 'matplotlib', 'rich', 'sklearn', 'chex'} & {*names.split()}
  assert not loaded


def test_python_can_say_which_name_was_meant():
  with pytest.raises(AttributeError, match="no attribute 'harmonze'") as error:
    getattr(optax_ghm, 'harmonze')  # noqa: B009
  assert (error.value.name, error.value.obj) == ('harmonze', optax_ghm)
  assert 'harmonize' in dir(optax_ghm)
  assert not hasattr(optax_ghm, 'ClipState')  # it is in its package only


def test_a_package_may_be_loaded_while_jax_traces():
  """Its modules make no arrays: these would be of the trace, and leak."""
  code = (
    'import jax, optax_ghm\n'
    'def first_use():\n'
    '  for name in dir(optax_ghm):\n'
    '    getattr(optax_ghm, name)\n'
    'print(jax.make_jaxpr(first_use)().eqns)\n'
  )
  assert printed(code) == ['[]']


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
  assert len(optax_ghm.__all__) <= 60
  for name in optax_ghm.__all__:
    assert name == 'GHM' or not name.isupper()
    assert not name.endswith('State')


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
