"""What the benchmarks measure."""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def of_benchmarks(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')


def test_a_case_is_measured():
  harness = importlib.import_module('harness')
  case = harness.Case(
    {
      'twice': lambda x: 2 * x,
      'sorted': lambda x: (jnp.sort(2 * x), x + 1),
      'eager': harness.Eager(lambda x: x.sum),
    },
    lambda: (jnp.ones(1000, jnp.float32),),
    elements=1000,
  )
  rows = harness.measure(case, seconds=0)
  assert list(rows) == ['twice', 'sorted', 'eager', harness.COPY]
  assert all(row['rounds'] == harness.FEWEST_ROUNDS for row in rows.values())
  assert rows['twice']['ratio'] == 1 == rows[harness.COPY]['limit_ratio']
  assert rows['twice']['instructions'] == 1 < rows['sorted']['instructions']
  assert rows['twice']['peak_bytes'] == 2 * 4000
  assert rows['sorted']['memory_ratio'] > 1.5
  assert 'instructions' not in rows['eager'] and rows['eager']['ms'] > 0


def test_a_step_is_carried_on():
  harness = importlib.import_module('harness')
  case = harness.Case(
    {'step': lambda carried, x: carried + x},
    lambda: (jnp.ones(8, jnp.float32),),
    elements=8,
    limit='step',
    init=lambda name, data: jnp.zeros(8, jnp.float32),
  )
  rows = harness.measure(case, seconds=0)
  assert rows['step']['limit_ratio'] == 1
  assert rows['step']['peak_bytes'] == 2 * 32  # one is donated


def test_exponents_are_those_of_a_power():
  harness = importlib.import_module('harness')
  sizes = [10, 100, 1000]
  rows = [
    {'f': {'ms': 3 * n**1.5, 'peak_bytes': 8 * n, 'compile_s': 2.0}}
    for n in sizes
  ]
  found = harness.exponents(sizes, rows)['f']
  assert found['ms'] == pytest.approx(1.5)
  assert found['peak_bytes'] == pytest.approx(1)
  assert found['compile_s'] == pytest.approx(0, abs=1e-9)
  assert 'instructions' not in found


def test_the_table_of_readme_is_that_of_the_reference_run():
  summary = importlib.import_module('summary')
  saved = (ROOT / 'benchmarks/results/reference.json').read_text()

  def no_number(name):
    raise ValueError(f'JSON has no {name}.')

  report = json.loads(saved, parse_constant=no_number)
  assert summary.table(report) in (ROOT / 'README.md').read_text()


def test_the_command_for_accelerators_runs_here(tmp_path):
  """Its laws and one case; of all others, it is enough that they are traced."""
  for only, kinds in (('laws', {'laws'}), ('count: crowded', {'cases'})):
    subprocess.run(
      [
        *(sys.executable, ROOT / 'benchmarks' / 'device.py', '--quick'),
        *('--only', only, '--save', tmp_path / 'device'),
      ],
      check=True,
      capture_output=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    report = json.loads((tmp_path / 'device.json').read_text())
    assert {kind for kind in ('laws', 'cases') if report.get(kind)} == kinds
    for row in report.get('laws', {}).values():
      assert row['holds'], row
    for rows in report['cases'].values():
      assert all(row['peak_bytes'] > 0 for row in rows.values())


@pytest.mark.usefixtures('as_users_run_jax')
def test_all_programs_for_accelerators_can_be_traced():
  device = importlib.import_module('device')
  harness = importlib.import_module('harness')
  cases = []
  for suite in device.SUITES.values():
    for case in suite.values():
      growth = isinstance(case, harness.Growth)
      cases += case.cases.values() if growth else [case]
  for case in filter(lambda case: case.quick, cases):
    data = jax.eval_shape(case.data)
    for name, program in case.programs.items():
      if case.init:
        carried = jax.eval_shape(functools.partial(case.init, name), data)
        jax.eval_shape(program, carried, *data)
      elif not isinstance(program, harness.Eager):
        jax.eval_shape(program, *data)
