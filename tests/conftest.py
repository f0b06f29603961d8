"""Strict JAX for every test: eight devices, no implicit promotion."""

import gc
import os
import pathlib

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'

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
def few_programs():
  """Linux gives a process 65,530 mappings of memory; a program takes several.

  Whoever has no more crashes in the compiler.
  """
  yield
  mappings = pathlib.Path('/proc/self/maps')
  if mappings.exists() and mappings.read_text().count('\n') > 40_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng():
  return np.random.default_rng(0)
