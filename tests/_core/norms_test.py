import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm._core import norms

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


@given(st.lists(hnp.arrays(np.float32, SHAPES, elements=FLOATS), max_size=5))
def test_the_global_norm_is_that_of_float64(leaves):
  flat = np.concatenate([u.astype(np.float64).ravel() for u in leaves] or [[]])
  actual = norms.global_norm([jnp.asarray(u) for u in leaves])
  np.testing.assert_allclose(
    actual, np.linalg.norm(flat), rtol=1e-6, atol=1e-37
  )


def test_bfloat16_is_squared_in_float32(rng):
  x = jnp.asarray(rng.normal(size=(1000, 512)), jnp.bfloat16)
  exact = np.linalg.norm(np.asarray(x, np.float64))
  np.testing.assert_allclose(norms.global_norm(x), exact, rtol=1e-6)


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
@pytest.mark.parametrize('many', [False, True])
def test_group_norms(scale, many, rng):
  """Few leaves stay as they are, and many small ones are joined."""
  sizes = rng.integers(1, 50, 100 if many else 7)
  arrays = [np.float32(scale) * rng.normal(size=n) for n in sizes]
  leaves = [jnp.asarray(u, jnp.float32) for u in arrays]
  each = np.array([np.linalg.norm(u) for u in arrays])
  groups = rng.integers(0, 3, len(leaves))
  of_groups = [np.linalg.norm(each[groups == g]) for g in range(4)]
  for of_leaf, count, expected in (
    (np.arange(len(leaves)), len(leaves), each),
    (groups, 4, of_groups),
    (np.zeros(len(leaves), int), 1, [np.linalg.norm(each)]),
  ):
    actual = norms.group_norms(leaves, of_leaf, count)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_group_norms_of_bad_numbers():
  leaves = [jnp.array([jnp.nan]), jnp.array([jnp.inf, 1.0]), jnp.array([3e38])]
  actual = norms.group_norms(leaves, np.arange(3), 3)
  np.testing.assert_array_equal(actual, np.float32([np.nan, np.inf, 3e38]))
