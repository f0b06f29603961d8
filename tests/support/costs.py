"""What the suite costs: programs compiled, by module, and memory, by worker.

A plugin of pytest. Compiling is most of the time: a test whose body is not
under ``jax.jit`` compiles every operation as a program of its own. Each worker
of pytest-xdist counts for itself; the process that started them adds up and
prints the modules that cost most.
"""

import collections
import resource
import sys
import time

import jax
import pytest

_COMPILED = '/jax/core/compile/backend_compile_duration'
_CACHED = '/jax/compilation_cache/cache_hits'  # counted as compiled, too
_SHOWN = 10
PROGRAMS = 60  # that a module of tests may compile, if it does not say

_own = {
  'programs': collections.Counter(),
  'cached': collections.Counter(),
  'compiling': collections.Counter(),
  'seconds': collections.Counter(),
}
_of_workers = {}
_module = ['collection']


def programs(module: str) -> int:
  """How many programs this process has compiled in tests of the module."""
  return _own['programs'][module]


def module_of(item) -> str:
  return item.nodeid.split('::')[0]


@jax.monitoring.register_event_duration_secs_listener
def _count(event, duration, **_):
  if event == _COMPILED:
    _own['programs'][_module[0]] += 1
    _own['compiling'][_module[0]] += duration


@jax.monitoring.register_event_listener
def _count_cached(event, **_):
  if event == _CACHED:
    _own['cached'][_module[0]] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  _module[0] = module_of(item)
  start = time.perf_counter()
  try:
    return (yield)
  finally:
    _own['seconds'][_module[0]] += time.perf_counter() - start


def _cost():
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  peak *= 1 if sys.platform == 'darwin' else 1024
  return {name: dict(counter) for name, counter in _own.items()} | {
    'gigabytes': peak / 1e9
  }


def pytest_sessionfinish(session):
  if hasattr(session.config, 'workeroutput'):
    session.config.workeroutput['cost'] = _cost()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  if 'cost' in getattr(node, 'workeroutput', {}):
    _of_workers[node.gateway.id] = node.workeroutput['cost']


def pytest_terminal_summary(terminalreporter):
  costs = _of_workers or {'main': _cost()}
  total = {name: collections.Counter() for name in _own}
  for cost in costs.values():
    for name, counter in total.items():
      counter.update(cost[name])
  line = terminalreporter.line
  terminalreporter.section('costs')
  peaks = ', '.join(f'{k} {v["gigabytes"]:.1f} GB' for k, v in costs.items())
  programs, cached = total['programs'].total(), total['cached'].total()
  line(f'{programs} programs, {programs - cached} compiled; at most {peaks}')
  line('programs  compiling  seconds  module')
  for module, count in total['programs'].most_common(_SHOWN):
    line(
      f'{count:8} {total["compiling"][module]:8.0f} s '
      f'{total["seconds"][module]:6.0f} s  {module}'
    )
