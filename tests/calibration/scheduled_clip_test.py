"""A clip whose limit is a schedule, as Optax's learning rates may be."""

import jax
import numpy as np
import optax
import pytest

import optax_ghm

GRADIENTS = np.array([3.0, 4.0], np.float32)
FALLING = optax.linear_schedule(4.0, 1.0, 3)


@pytest.mark.device
@pytest.mark.parametrize(
  ('clip', 'size'),
  [(optax_ghm.clip_by_norm, 5), (optax_ghm.clip_by_rms, 5 / np.sqrt(2))],
)
def test_the_limit_follows_the_schedule_and_every_step_counts(clip, size):
  tx = clip(FALLING, scope='global')
  state, update = tx.init(GRADIENTS), jax.jit(tx.update)
  for limit, bad in ((4.0, False), (3.0, False), (2.0, True), (1.0, False)):
    gradients = GRADIENTS * (np.nan if bad else 1)
    updates, state = update(gradients.astype(np.float32), state)
    expected = 0 * GRADIENTS if bad else GRADIENTS * min(limit / size, 1)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
  assert state.statistics == 4
  assert state.skipped == 1


@pytest.mark.parametrize('scope', ['global', 'leaf', 'unit'])
def test_every_scope_and_calibrated_take_a_schedule(scope):
  clips = [
    optax_ghm.calibrated(optax.sgd(1.0), optax_ghm.clip_by_norm(c, scope=scope))
    for c in (FALLING, 4.0)
  ]
  tree = {'kernel': np.ones((3, 2), np.float32), 'bias': GRADIENTS}

  @jax.jit
  def first(tree):
    return [tx.update(tree, tx.init(tree))[0] for tx in clips]

  scheduled, constant = first(tree)
  jax.tree.map(np.testing.assert_array_equal, scheduled, constant)
