"""The safe default: the optimizer, without its bad steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm

TREE = {
  'a': jnp.array([3.0, 4.0]),
  'b': {'c': jnp.array([6.0, 8.0]), 'd': None},
}


def test_calibrated_is_the_optimizer_where_nothing_is_wrong():
  tx, plain = optax_ghm.calibrated(optax.sgd(0.1, 0.9)), optax.sgd(0.1, 0.9)
  params, state, plain_state = TREE, None, plain.init(TREE)
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update(TREE, state, params)
    expected, plain_state = plain.update(TREE, plain_state, params)
    chex.assert_trees_all_equal(updates, expected)
  chex.assert_trees_all_equal(state.optimizer, plain_state)
  np.testing.assert_allclose(state.clip.norm, 125**0.5, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('scope', ['global', 'leaf'])
def test_calibrated_leaves_a_bad_step_out_altogether(bad, scope):
  """Moments and counts behind the clip do not change."""
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes ints and floats
    tx = optax_ghm.calibrated(
      optax.adamw(0.1), optax_ghm.clip_by_norm(1.0, scope=scope)
    )
    calm = [jax.tree.map(lambda u, k=k: k * u, TREE) for k in (1.0, 2.0, 3.0)]
    broken = TREE | {'a': jnp.array([bad, 1.0])}
    results = []
    for steps in (calm, [*calm[:2], broken, calm[2]]):
      state, updates = tx.init(TREE), []
      for grads in steps:
        update, state = jax.jit(tx.update)(grads, state, TREE)
        updates.append(update)
      results.append((updates, state))
  (calm_updates, calm_state), (updates, state) = results
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[2]))
  chex.assert_trees_all_equal(updates[3], calm_updates[2])
  chex.assert_trees_all_equal(state.optimizer, calm_state.optimizer)


def test_calibrated_learns_nothing_from_a_step_that_one_leaf_spoils():
  tx = optax_ghm.calibrated(
    optax.sgd(1.0), optax_ghm.clip_by_zscore(scope='leaf')
  )
  bad = TREE | {'a': jnp.array([jnp.nan, 1.0])}
  _, state = tx.update(bad, tx.init(TREE), TREE)
  np.testing.assert_array_equal(state.clip.statistics.recorded, [0, 0])
  np.testing.assert_array_equal(state.clip.skipped, [1, 0])


def test_calibrated_names_a_clip_that_keeps_no_clip_state():
  with pytest.raises(TypeError, match='clip'):
    optax_ghm.calibrated(optax.sgd(1.0), optax.clip(1.0)).init(TREE)
