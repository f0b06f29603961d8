"""Strict JAX for every test: eight devices, no implicit promotion.

``JAX_PLATFORMS`` chooses another platform than the CPU; the tests that make
sense on one accelerator are marked: ``JAX_PLATFORMS=cuda pytest -m device``.
"""

import gc
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# LLVM need not try hard, which is most of compiling: XLA has optimized before.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + (
  ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  if os.environ['JAX_PLATFORMS'] == 'cpu'
  else ''
)

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

pytest_plugins = ['tests.support.costs']
CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'
RESIDENT = 1.2e9  # bytes, above which a worker forgets its programs

hypothesis.settings.register_profile(
  'default', max_examples=25, deadline=None, derandomize=True
)
hypothesis.settings.register_profile(
  'thorough', max_examples=1000, deadline=None, derandomize=False
)
hypothesis.settings.load_profile('default')


def pytest_configure(config):
  """What was compiled once is not again, by the other process or next time.

  Compiling is most of the time. The programs of a thorough run are too many.
  """
  if config.getoption('--hypothesis-profile') != 'thorough':
    jax.config.update('jax_compilation_cache_dir', str(CACHE))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(scope='module', autouse=True)
def few_programs(request):
  """A module compiles no more programs than it says, and forgets them.

  One that needs more than most sets ``PROGRAMS``, with room for those that it
  shares with others, which may be compiled before.
  """
  yield
  costs = request.config.pluginmanager.getplugin('tests.support.costs')
  compiled = costs.programs(request.node.nodeid)
  most = getattr(request.module, 'PROGRAMS', costs.PROGRAMS)
  if compiled > most:
    pytest.fail(f'{compiled} programs were compiled, more than {most}.')
  about = pathlib.Path('/proc/self/statm')
  if about.exists():
    pages = int(about.read_text().split()[1])
    if pages * os.sysconf('SC_PAGE_SIZE') > RESIDENT:
      jax.clear_caches()
      gc.collect()


@pytest.fixture
def as_users_run_jax():
  """Without the strictness: Flax and Optax mix dtypes, and Flax mixes ranks."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture
def rng():
  return np.random.default_rng(0)
