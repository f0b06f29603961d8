"""The Gramian of pytrees of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from optax_ghm import conflict
from tests.support.strategies_trees import wide

DTYPES = {
  'w': (jnp.float32, (2, 1, 3)),
  'b': (jnp.bfloat16, (3,)),
  'c': (jnp.complex64, (2, 2)),
  's': (jnp.float32, ()),
  'e': (jnp.float32, (0, 2)),
}


@jax.jit
def gramian(rows):
  return conflict.gramian(rows)


def flat(rows):
  """(m, n), float64: the real numbers of every loss."""

  def reals(x):
    width = np.complex128 if np.iscomplexobj(x) else np.float64
    return x.astype(width).reshape(len(x), -1).view(np.float64)

  return np.concatenate([reals(x) for x in wide(rows)], axis=1)


@pytest.mark.device
@given(seed=st.integers(0, 999), decades=st.sampled_from([-15, 0, 15]))
def test_it_is_the_inner_products_of_all_numbers(seed, decades):
  rng = np.random.default_rng(seed)
  rows = {}
  for name, (dtype, shape) in DTYPES.items():
    x = rng.normal(size=(3, *shape)) * 10.0**decades
    x = x + 1j * x[::-1] if dtype == jnp.complex64 else x
    rows[name] = np.asarray(x).astype(dtype)
  expected = flat(rows) @ flat(rows).T
  found = gramian({**rows, 'n': np.arange(3), 'none': None})
  assert found.dtype == np.float32
  size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
  np.testing.assert_allclose(found / size, expected / size, atol=1e-5)


def test_of_64_bits_and_without_an_inexact_leaf():
  with jax.enable_x64(True):
    assert gramian(np.ones((2, 3))).dtype == np.float64
  with pytest.raises(ValueError, match='floating or complex leaf'):
    conflict.gramian({'n': np.arange(3)})
  with pytest.raises(ValueError, match=r'one leading loss axis.*\(2,\), \(3,'):
    conflict.gramian([np.ones(2, np.float32), np.ones((3, 2), np.float32)])
