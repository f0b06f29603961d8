import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import norms

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
def test_equals_the_float64_norm(x):
  for axis in (None, -1):
    expected = np.linalg.norm(
      x.astype(np.float64).ravel() if axis is None else x.astype(np.float64),
      axis=axis,
    )
    actual = np.asarray(norms.norm(jnp.asarray(x), axis))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize('value', [1e-30, 1e-20, 1e20, 3e37])
def test_neither_overflows_nor_vanishes(value):
  actual = norms.norm(jnp.full((4,), value, jnp.float32), 0)
  np.testing.assert_allclose(actual, 2 * value, rtol=1e-6)


def test_casts_before_squaring(rng):
  x = rng.normal(size=(1000, 512)).astype(np.float32)
  bf16 = jnp.asarray(x, jnp.bfloat16)
  expected = np.linalg.norm(np.asarray(bf16, np.float64))
  np.testing.assert_allclose(norms.norm(bf16), expected, rtol=1e-5)
  assert norms.norm(jnp.full((9,), 300, jnp.float16)) == 900


def test_complex_is_the_norm_of_the_magnitudes():
  z = jnp.array([3 + 4j, 0, 12j], jnp.complex64)
  np.testing.assert_allclose(norms.norm(z), 13, rtol=1e-6)


def test_bad_numbers_show_and_an_empty_norm_is_zero():
  x = jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0], [jnp.inf, jnp.nan], [0, 0]])
  np.testing.assert_array_equal(
    norms.norm(x, -1), [np.nan, np.inf, np.nan, 0.0]
  )
  chex.assert_trees_all_equal(norms.norm(jnp.zeros((2, 0)), -1), jnp.zeros(2))


def test_no_axis_is_the_magnitude():
  x = jnp.array([-2.0, 3.0])
  chex.assert_trees_all_equal(norms.norm(x, ()), jnp.abs(x))


def test_float64_stays_float64():
  with jax.enable_x64(True):
    assert norms.norm(jnp.ones(3, jnp.float64)).dtype == jnp.float64
