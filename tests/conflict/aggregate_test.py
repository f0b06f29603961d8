"""Gradients with the losses along the first axis, reconciled in a chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ghm import conflict
from tests.support import oracles_conflict as oracles

PARAMS = {'w': np.zeros((3, 2), np.float32), 'b': np.zeros(2, np.float32)}


def rows(seed, m=3):
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=(m, *leaf.shape)).astype(np.float32)
    for name, leaf in PARAMS.items()
  }


def flat(tree, axes=0):
  leaves = [np.float64(leaf) for leaf in jax.tree.leaves(tree)]
  return np.concatenate(
    [u.reshape(*u.shape[:axes], -1) for u in leaves], axis=axes
  )


def steps(tx, stream):
  """All updates and states."""
  update = jax.jit(tx.update)
  state = tx.init(PARAMS)
  for of_step in stream:
    updates, state = update(of_step, state, PARAMS)
    yield updates, state


def test_a_step_is_the_reconciled_gradient_behind_which_a_chain_goes_on():
  tx = optax.chain(conflict.reconciled_aggregate(3), optax.sgd(0.5))
  ((updates, (state, *_)),) = steps(tx, [rows(0)])
  wide = flat(rows(0), 1)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
  np.testing.assert_allclose(
    flat(updates), -0.5 * oracles.upgrad(wide), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(state.gramian, wide @ wide.T, rtol=1e-4)
  units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
  np.testing.assert_allclose(state.cosines, units @ units.T, atol=1e-5)
  np.testing.assert_allclose(
    np.float64(state.weights) @ wide, oracles.upgrad(wide), atol=1e-4
  )
  assert (state.steps, state.conflicts) == (1, 1)


def test_with_a_decay_the_average_gramian_decides():
  """A loss whose gradient is bad is left out, and its average is kept."""
  stream = [rows(seed) for seed in range(5)]
  stream[0]['w'][2] = np.nan
  stream[3]['b'][0, 1] = np.inf
  tx = conflict.reconciled_aggregate(3, conflict.mgda_weights, decay=0.75)
  average = np.zeros((3, 3))
  for i, (updates, state) in enumerate(steps(tx, stream)):
    wide = flat(stream[i], 1)
    good = np.isfinite(wide).all(1)
    known = np.outer(good, good)
    numbers = np.where(good[:, None], wide, 0)
    gramian = numbers @ numbers.T
    begun = np.outer(np.diag(average) > 0, np.diag(average) > 0)
    moved = np.where(begun, 0.75 * average + 0.25 * gramian, gramian)
    average = np.where(known, moved, average)
    np.testing.assert_allclose(state.gramian, average, rtol=1e-4, atol=1e-5)
    weights = np.float64(state.weights)
    assert (weights[~good] == 0).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    along = average[np.ix_(good, good)] @ weights[good]
    assert along.min() >= (1 - 1e-4) * weights[good] @ along  # the shortest
    np.testing.assert_allclose(
      flat(updates), weights[good] @ wide[good], rtol=1e-4, atol=1e-5
    )
  np.testing.assert_array_equal(state.non_finite, [1, 0, 1])
  assert state.steps == 5 and state.conflicts >= 1


def test_the_mean_only_measures():
  tx = conflict.reconciled_aggregate(3, conflict.mean_weights)
  agreeing = jax.tree.map(np.abs, rows(0))
  for updates, state in steps(tx, [agreeing]):
    np.testing.assert_allclose(
      flat(updates), flat(agreeing, 1).mean(0), rtol=1e-5
    )
    assert (state.steps, state.conflicts) == (1, 0)


def test_wrong_arguments_are_named():
  with pytest.raises(TypeError, match='losses must be a int'):
    conflict.reconciled_aggregate(conflict.upgrad_weights)
  with pytest.raises(ValueError, match='losses must be from 1'):
    conflict.reconciled_aggregate(0)
  with pytest.raises(ValueError, match='decay must be from 0 to 1'):
    conflict.reconciled_aggregate(2, decay=1.5)
  tx = conflict.reconciled_aggregate(2)
  with pytest.raises(ValueError, match='2 losses along their first.* got 3'):
    tx.update(rows(0), tx.init(PARAMS), PARAMS)
  with pytest.raises(ValueError, match='a loss axis before.*jacrev'):
    tx.update({'w': np.ones((2, 3), np.float32)}, tx.init(0), {'w': np.ones(2)})


def test_what_has_no_gradient_passes():
  tx = conflict.reconciled_aggregate(2)
  tree = {'n': np.arange(2), 'none': None}
  updates, state = tx.update(tree, tx.init(tree), tree)
  assert updates is tree and state.steps == 0
  found, _ = jax.jit(tx.update)({**tree, 'w': jnp.ones((2, 3))}, state)
  np.testing.assert_allclose(found['w'], 1)
  np.testing.assert_array_equal(found['n'], np.arange(2))
