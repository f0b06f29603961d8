"""Norms are those of float64, without overflow or underflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm._core import norms

pytestmark = pytest.mark.device

SHAPES = st.sampled_from([(5,), (0,), (3, 4), (2, 0, 3)])
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def of_shapes(*shapes):
  return st.tuples(
    *[hnp.arrays(np.float32, shape, elements=FLOATS) for shape in shapes]
  )


def full(value):
  return np.full((5,), value, np.float32)


@jax.jit
def whole_and_last(x):
  return norms.norm(x), norms.norm(x, -1)


@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
@example(full(1e-30))
@example(full(1e-20))
@example(full(1e20))
@example(full(3e37))
def test_a_norm_is_that_of_float64(x):
  exact = x.astype(np.float64)
  whole, last = whole_and_last(x)
  for found, expected in (
    (whole, np.linalg.norm(exact.ravel())),
    (last, np.linalg.norm(exact, axis=-1)),
  ):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-37)


@jax.jit
def global_norm(tree):
  return norms.global_norm(tree)


@given(
  st.sampled_from([(), ((3,),), ((2, 3), (0,), (), (5,))]).flatmap(
    lambda shapes: of_shapes(*shapes)
  )
)
def test_the_global_norm_is_that_of_float64(leaves):
  flat = np.concatenate([u.astype(np.float64).ravel() for u in leaves] or [[]])
  np.testing.assert_allclose(
    global_norm(leaves), np.linalg.norm(flat), rtol=1e-6, atol=1e-37
  )


def test_numbers_of_every_dtype(rng):
  """They are cast before they are squared; NaN and infinity show."""
  bf16 = rng.normal(size=(1000, 512)).astype(jnp.bfloat16)
  f16 = np.full(9, 300, np.float16)
  z = np.array([3 + 4j, 0, 12j], np.complex64)
  bad = np.float32([[1, np.nan], [np.inf, 1], [np.inf, np.nan], [0, 0]])
  signed = np.float32([-2.0, 3.0])

  @jax.jit
  def found(bf16, f16, z, bad, signed):
    return (
      (norms.norm(bf16), norms.global_norm(bf16)),
      (norms.norm(f16), norms.norm(z), norms.norm(bad, -1)),
      norms.norm(signed, ()),
    )

  of_bf16, of_others, magnitudes = found(bf16, f16, z, bad, signed)
  exact = np.linalg.norm(bf16.astype(np.float64))
  np.testing.assert_allclose(of_bf16, [exact, exact], rtol=1e-5)
  for norm, expected in zip(
    of_others, (900, 13, [np.nan, np.inf, np.nan, 0]), strict=True
  ):
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
  np.testing.assert_array_equal(magnitudes, [2, 3])


def test_float64_stays_float64():
  with jax.enable_x64(True):
    found = global_norm(np.ones(3)), whole_and_last(np.ones((1, 3)))[0]
    assert all(norm.dtype == np.float64 for norm in found)


@functools.partial(jax.jit, static_argnames='groupings')
def all_group_norms(leaves, groupings):
  return [
    norms.group_norms(leaves, np.array(groups), count)
    for groups, count in groupings
  ]


@pytest.mark.parametrize('many', [False, True])
def test_norms_of_groups(many, rng):
  """Few leaves stay as they are, and many small ones are joined."""
  sizes = rng.integers(1, 50, 100 if many else 7)
  leaves = [rng.normal(size=n) for n in sizes]
  groups = rng.integers(0, 3, len(leaves))
  groupings = (
    (tuple(range(len(leaves))), len(leaves)),
    (tuple(groups.tolist()), 4),
    ((0,) * len(leaves), 1),
  )
  each = np.array([np.linalg.norm(u) for u in leaves])
  of_groups = [np.linalg.norm(each[groups == g]) for g in range(4)]
  all_expected = each, np.array(of_groups), np.linalg.norm(each)[None]
  for scale in (1e-30, 1.0, 1e30):
    found = all_group_norms(
      [(scale * u).astype(np.float32) for u in leaves], groupings
    )
    for actual, expected in zip(found, all_expected, strict=True):
      np.testing.assert_allclose(actual, scale * expected, rtol=1e-5)


def test_norms_of_groups_of_bad_numbers():
  leaves = [np.float32(u) for u in ([np.nan], [np.inf, 1.0], [3e38])]
  (found,) = all_group_norms(leaves, (((0, 1, 2), 3),))
  np.testing.assert_array_equal(found, np.float32([np.nan, np.inf, 3e38]))


@pytest.mark.device
def test_the_gradient_is_the_direction_and_0_at_0():
  @jax.jit
  def slopes(x):
    of_one = jax.grad(norms.norm)
    return [of_one(x), jax.grad(norms.global_norm)([x])[0], of_one(of_one(x))]

  x = np.array([3, 4], np.float32)
  for size in (1e-30, 1e-25, 1e-3, 1, 1e25, 1e30):
    for slope in slopes(x * np.float32(size)):
      np.testing.assert_allclose(slope, x / 5, rtol=1e-5)
  for slope in slopes(0 * x):
    np.testing.assert_array_equal(slope, 0 * x)
