"""Norms of one, deviations of one, means of zero: against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optax_ghm
from tests.calibration.fixed_clips_test import assert_leaves_close
from tests.support import oracles_calibration as by_hand
from tests.support.oracles_calibration import SCOPES, counted_with_path
from tests.support.strategies_trees import STRUCTURES, trees, wide

pytestmark = pytest.mark.device

STANDARDIZE, CENTRALIZE = optax_ghm.standardize(), optax_ghm.centralize()
BY_NORM = {
  name: optax_ghm.normalize_by_norm(scope=scope)
  for name, scope in SCOPES.items()
}
bad_number = pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
gradients = st.sampled_from(['many', 'mixed']).flatmap(
  lambda name: trees(STRUCTURES[name])
)


@functools.cache
def two_steps(tx):
  """The second may be the first again."""

  @jax.jit
  def run(first, second):
    updates, state = tx.update(first, tx.init(first))
    return updates, state, tx.update(second, state)[1]

  return lambda *trees: jax.device_get(run(*trees))


def one_step(tx, tree):
  return two_steps(tx)(tree, tree)[:2]


# Norms.


@pytest.mark.parametrize('scope', SCOPES)
@given(tree=trees(STRUCTURES['mixed']))
def test_normalize_by_norm(scope, tree):
  updates, state = one_step(BY_NORM[scope], tree)
  norms = by_hand.norms(scope, tree)
  expected = [
    x / np.where(n > 0, n, np.inf)
    for x, n in zip(wide(tree), norms, strict=True)
  ]
  assert_leaves_close(updates, expected, tree)
  if scope in ('global', 'leaf', 'unit'):
    of = norms[:1] if scope == 'global' else norms
    flat = np.concatenate([np.ravel(n) for n in of])
    np.testing.assert_array_equal(state.skipped.ravel(), flat == 0)
    np.testing.assert_allclose(
      state.divisor.ravel()[flat > 0], flat[flat > 0], rtol=1e-5
    )


@pytest.mark.parametrize('name', ['global', 'leaf', 'unit'])
@pytest.mark.parametrize('size', [1e38, 3e38])
def test_the_largest_norms_are_bad_steps(name, size):
  """Their reciprocal is less than the least normal float32."""
  tree = {'kernel': np.float32([[0.6], [-0.8]]) * np.float32(size)}
  updates, state = one_step(BY_NORM[name], tree)
  assert not updates['kernel'].any()
  assert state.skipped.all()


def test_what_has_no_direction_becomes_zero_and_is_counted():
  nan, inf = np.nan, np.inf
  first = np.float32([[3.0, 0.0, nan, 1.0], [4.0, 0.0, 1.0, inf]])
  second = np.float32([[nan, 6.0, 0.0, 0.0], [1.0, 8.0, 0.0, 5.0]])
  updates, one, other = two_steps(BY_NORM['unit'])(
    {'kernel': first}, {'kernel': second}
  )
  np.testing.assert_allclose(
    updates['kernel'], [[0.6, 0, 0, 0], [0.8, 0, 0, 0]], rtol=1e-6
  )
  np.testing.assert_array_equal(one.skipped, [0, 1, 1, 1])
  np.testing.assert_array_equal(one.divisor, [5, 1, 1, 1])
  np.testing.assert_array_equal(other.skipped, [1, 1, 2, 1])
  np.testing.assert_array_equal(other.divisor, [5, 10, 1, 5])


@bad_number
def test_one_bad_number_is_the_affair_of_its_scope(bad):
  tree = {
    'conv': {'kernel': np.ones((2, 2, 3, 4), 'f'), 'bias': np.ones(4, 'f')},
    'dense': {'kernel': np.ones((5, 3), 'f'), 'bias': np.ones(3, 'f')},
  }
  tree['conv']['kernel'][1, 0, 2, 3] = bad
  expected = {
    'global': (1, 0, 0),
    'leaf': (4, 3, 4 + 15 + 3),
    'unit': (9, 8, 36 + 4 + 15 + 3),
  }
  for name, (norms, good, size) in expected.items():
    updates, state = one_step(BY_NORM[name], tree)
    leaves = jax.tree.leaves(updates)
    assert all(np.isfinite(u).all() for u in leaves)
    assert state.skipped.size == norms and state.skipped.sum() == norms - good
    assert sum(np.count_nonzero(u) for u in leaves) == size


# The deviation.


def standardized(x):
  """The standardized array and the deviation, in float64."""
  x = np.float64(x)
  return (x - x.mean()) / np.std(x), np.std(x)


@given(tree=gradients)
def test_standardize(tree):
  updates, state = one_step(STANDARDIZE, tree)
  leaves = [leaf for _, leaf in counted_with_path(tree)]
  for i, (u, x) in enumerate(zip(wide(updates), wide(tree), strict=True)):
    deviation, largest = np.std(x), np.abs(x).max()
    if x.ndim < 2:
      np.testing.assert_array_equal(u, x)
      assert state.divisor[i] == 1
    elif deviation > 1e-4 * largest:
      expected = (x - np.mean(x)) / deviation
      atol = max(12 * float(jnp.finfo(leaves[i].dtype).eps), 1e-5)
      np.testing.assert_allclose(u, expected, rtol=0, atol=atol)
      np.testing.assert_allclose(state.divisor[i], deviation, rtol=1e-5)
    elif deviation < 1e-8 * largest or largest == 0:
      assert not u.any()


@pytest.mark.parametrize('offset', [0.5, 10.0, -1e3, 1e5])
def test_standardize_far_from_zero(offset, rng):
  """The result is right to what float32 holds of the deviations."""
  x = (rng.normal(size=(30, 40)) + offset).astype(np.float32)
  update, state = one_step(STANDARDIZE, x)
  expected, deviation = standardized(x)
  # The sum of 1,200 numbers is of float32.
  tolerance = max(1e-6 * abs(offset), 1e-5)
  np.testing.assert_allclose(update, expected, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(state.divisor, [deviation], rtol=tolerance)
  assert state.skipped == 0
  assert abs(np.float64(update).mean()) < 1e-5  # no rounding is left
  x[3, 4] = -1e30
  update, _ = one_step(STANDARDIZE, x)
  np.testing.assert_allclose(update, standardized(x)[0], rtol=1e-4)


@pytest.mark.parametrize('shape', [(1, 1), (3, 4), (1000, 700)], ids=str)
@pytest.mark.parametrize('value', [0.1, -1 / 3, 1e-30, -1e30, 0.0])
def test_equal_numbers_have_no_deviation(shape, value):
  """Rounding does not make a deviation."""
  update, state = one_step(STANDARDIZE, np.full(shape, value, np.float32))
  assert not update.any()
  assert state.skipped == 1 and state.divisor == 1


@bad_number
def test_a_bad_leaf_becomes_zero_and_is_counted(bad, rng):
  good = rng.normal(size=(2, 3)).astype(np.float32)
  spoilt = good.copy()
  spoilt[1, 2] = bad
  tree = {'bad': spoilt, 'good': good, 'vector': spoilt[1]}
  updates, one, other = two_steps(STANDARDIZE)(tree, tree | {'good': spoilt})
  expected, deviation = standardized(good)
  assert not updates['bad'].any()
  np.testing.assert_array_equal(updates['vector'], tree['vector'])
  np.testing.assert_allclose(updates['good'], expected, rtol=1e-4)
  np.testing.assert_array_equal(one.skipped, [1, 0, 0])
  np.testing.assert_array_equal(other.skipped, [2, 1, 0])
  for state in (one, other):  # the deviation of the last good step stays
    np.testing.assert_allclose(state.divisor, [1, deviation, 1], rtol=1e-5)


# The mean.

LAYOUTS = {
  'unit': CENTRALIZE,
  'units': optax_ghm.centralize(units=SCOPES['units']),
}


@pytest.mark.parametrize('units', LAYOUTS)
@given(tree=gradients)
def test_centralize(units, tree):
  updates, state = one_step(LAYOUTS[units], tree)
  assert state == optax.EmptyState()
  for u, x, axes, (path, leaf) in zip(
    wide(updates),
    wide(tree),
    by_hand.fan_ins(units, tree),
    counted_with_path(tree),
    strict=True,
  ):
    named_bias = path[-1:] == (jax.tree_util.GetAttrKey('bias'),)
    if x.ndim < 2 or named_bias:
      np.testing.assert_array_equal(u, x)
      continue
    expected = x - np.mean(x, axes, keepdims=True)
    info = jnp.finfo(leaf.dtype)
    error = 4 * max(float(info.eps), 1e-7) * np.abs(x).max()
    np.testing.assert_allclose(u, expected, rtol=0, atol=error + info.tiny)


def test_on_kernels_the_other_way_round_it_is_that_of_optax(rng):
  """The units of Optax's kernels come first."""
  kernels = [
    rng.normal(size=shape).astype(np.float32)
    for shape in ((6, 4), (3, 4, 5), (2, 3, 4, 5))
  ]
  out_first = optax_ghm.centralize(
    units=optax_ghm.Units(lambda path, leaf: tuple(range(1, leaf.ndim)))
  )

  @jax.jit
  def each(kernels, turned):
    return [
      tx.update(tree, tx.init(tree))[0]
      for tx, tree in (
        (CENTRALIZE, kernels),
        (out_first, turned),
        (optax.centralize(), turned),
      )
    ]

  turned = [np.moveaxis(kernel, -1, 0) for kernel in kernels]
  ours, turned, theirs = jax.device_get(each(kernels, turned))
  for one, two, expected in zip(ours, turned, theirs, strict=True):
    for kernel in (np.moveaxis(one, -1, 0), two):
      np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


@bad_number
def test_a_bad_number_stays_in_its_unit_and_shows(bad, rng):
  kernel = rng.normal(size=(3, 4)).astype(np.float32)
  expected = kernel - kernel.mean(0)
  kernel[1, 2] = bad
  updates, _ = one_step(CENTRALIZE, {'kernel': kernel})
  good = np.arange(4) != 2
  np.testing.assert_allclose(
    updates['kernel'][:, good], expected[:, good], rtol=1e-5, atol=1e-6
  )
  assert np.isnan(updates['kernel'][1, 2])
  assert not np.isfinite(updates['kernel'][:, 2]).any()


def test_the_layout_of_layers_in_a_row_leaves_their_biases_alone(rng):
  """A bias is not centralized over its only axis."""
  stacked = optax_ghm.Units(lambda path, leaf: tuple(range(1, leaf.ndim - 1)))
  grads = {
    'kernel': rng.normal(size=(3, 6, 4)).astype(np.float32),
    'bias': rng.normal(size=(3, 4)).astype(np.float32),
  }
  updates, _ = one_step(optax_ghm.centralize(units=stacked), grads)
  kernel = grads['kernel'] - grads['kernel'].mean(1, keepdims=True)
  np.testing.assert_allclose(updates['kernel'], kernel, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(updates['bias'], grads['bias'])
