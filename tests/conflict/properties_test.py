"""Conflict weights and the fork, as formulas in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from optax_ghm import conflict
from tests.support import strategies_arrays as arrays_of
from tests.support.strategies_trees import (
  STRUCTURES,
  is_inexact,
  trees,
  wide,
)


@functools.cache
def weights_of(rule):
  return jax.jit(
    functools.partial(conflict.conflict_weights, rule=rule, harmonic_range=0.25)
  )


def reals(x):
  """The real numbers that an array holds, in a row."""
  x = np.asarray(x)
  wide = np.complex128 if np.iscomplexobj(x) else np.float64
  return x.astype(wide).ravel().view(np.float64)


def flat(tree):
  """The real numbers of a tree in a row, float64."""
  return np.concatenate([np.zeros(1), *map(reals, wide(tree))])


def weights_by_hand(rule, g1, g2):
  lengths = np.linalg.norm(g1), np.linalg.norm(g2)
  if not (np.isfinite(lengths).all() and min(lengths) > 0):
    return 1.0, 1.0
  cosine = np.clip((g1 / lengths[0]) @ (g2 / lengths[1]), -1, 1)
  if cosine >= 0:
    return 1.0, 1.0
  if rule == 'gh':
    ratio = lengths[1] / lengths[0]
    return 1 - cosine * ratio, 1 - cosine / ratio
  excess = np.arccos(cosine) - np.pi / 2
  beta = 0.25 * excess
  return 1 + 2 * np.sin(beta / 2), 1 - 2 * np.sin((excess - beta) / 2)


@pytest.mark.parametrize('rule', ['gh', 'gh++'])
@given(
  pair=st.sampled_from(['nested', 'mixed', 'nothing']).flatmap(
    lambda name: st.tuples(*[trees(STRUCTURES[name])] * 2)
  ),
  opposed=st.booleans(),
)
def test_conflict_weights(rule, pair, opposed):
  first, second = pair
  if opposed:  # chance alone makes a clear conflict too seldom
    second = jax.tree.map(
      lambda x, y: y - x / 2 if is_inexact(x) else y, first, first
    )
    second = jax.tree.map(
      lambda x, y: -y if is_inexact(x) else y, first, second
    )
  g1, g2 = flat(first), flat(second)
  lengths = np.linalg.norm(g1), np.linalg.norm(g2)
  cosine = (g1 / (lengths[0] or 1)) @ (g2 / (lengths[1] or 1))
  assume(abs(cosine) > 1e-5 or cosine == 0)
  expected = weights_by_hand(rule, g1, g2)
  largest = float(np.finfo(np.float32).max)
  actual = weights_of(rule)(first, second)
  # The angle of opposite gradients is known to the root of rounding.
  np.testing.assert_allclose(
    actual, np.minimum(expected, largest), rtol=1e-3, atol=1e-3
  )


@jax.jit(static_argnames='rule')
def forked(x, dy, rule):
  fork = functools.partial(conflict.fork, rule=rule, harmonic_range=0.25)
  y, vjp = jax.vjp(fork, x)
  return y, vjp(dy)[0]


TREE = {
  'a': (jnp.float32, (2, 1, 2)),
  'b': (jnp.bfloat16, (3,)),
  'c': (jnp.complex64, (1, 2)),
  'e': (jnp.float32, (0, 2)),
  's': (jnp.float32, ()),
}


@given(
  rule=st.sampled_from(['gh', 'gh++']),
  scale=st.sampled_from([1e-18, 1.0, 1e18]),
  bad=st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf]),
  against=st.sampled_from([0.0, 1.0, 4.0]),
  data=st.data(),
)
def test_forked_gradients_are_harmonized(rule, scale, bad, against, data):
  ordinary = st.integers(-64, 64).map(lambda n: n / 16)

  def draw(name):
    dtype, shape = TREE[name]
    u = data.draw(arrays_of.arrays(np.float32, shape, ordinary))
    return u * np.complex64(0.6 + 0.8j) if dtype == jnp.complex64 else u

  g1, g2 = {}, {}
  for name, (dtype, _) in TREE.items():
    first, other = draw(name), draw(name)
    second = other - first * np.float32(against)
    g1[name] = np.asarray(first * np.float32(scale)).astype(dtype)
    g2[name] = np.asarray(second * np.float32(1 / scale)).astype(dtype)
  g1['s'] = (g1['s'] + np.float32(bad)).astype(np.float32)
  n, none = np.arange(3), np.zeros(3, jax.dtypes.float0)
  x = {**g1, 'n': n}
  y, dx = forked(x, ({**g1, 'n': none}, {**g2, 'n': none}), rule)
  for branch in y:
    jax.tree.map(np.testing.assert_array_equal, branch, x)
  assert dx.pop('n').dtype == jax.dtypes.float0
  one, two = weights_by_hand(
    rule, *(np.concatenate([reals(u) for u in g.values()]) for g in (g1, g2))
  )
  for name, found in dx.items():
    # The angle of almost opposite gradients has half of the digits.
    rtol = max(4 * arrays_of.rounding(found.dtype), 1e-3)
    assert found.dtype == g1[name].dtype and found.shape == g1[name].shape
    parts = one * reals(g1[name]), two * reals(g2[name])
    size = sum(np.nan_to_num(abs(u)).max(initial=0) for u in parts)
    size = size if np.isfinite(bad) else 0
    np.testing.assert_allclose(
      reals(found), sum(parts), rtol=rtol, atol=rtol * size
    )
