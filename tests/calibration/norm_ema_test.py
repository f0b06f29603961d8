"""AdaGC on several leaves, as its authors' program has it."""

import jax
import numpy as np

import optax_ghm
from tests.support import oracles_calibration as by_hand

STEPS, WARMUP, LEAVES = 80, 20, 3


def clipped_norms(norms, **options):
  """Of leaves with these norms, (steps, leaves)."""
  tx = optax_ghm.clip_by_norm_ema(warmup_steps=WARMUP, **options)
  direction = np.float32([0.6, -0.8])

  @jax.jit
  def run(norms):
    def step(state, norms):
      updates, state = tx.update([n * direction for n in norms], state)
      return state, updates

    return jax.lax.scan(step, tx.init([direction] * LEAVES), norms)[1]

  updates = run(np.float32(norms))
  return np.linalg.norm(np.stack(updates, 1).astype(np.float64), axis=-1)


def make_norms():
  rng = np.random.default_rng(0)
  norms = rng.lognormal(0, 0.2, (STEPS, LEAVES)) * [0.1, 1.0, 3.0]
  norms[[5, 40, 41], 1] *= 30
  norms[60] *= 100
  return norms


def test_leaves_are_clipped_as_by_the_authors():
  """Their constants are 1.04 and 0.99, those of the paper 1.05 and 0.98."""
  for ratio, decay in ((1.04, 0.99), (1.05, 0.98)):
    actual = clipped_norms(make_norms(), ratio=ratio, decay=decay)
    expected = by_hand.adagc(make_norms(), ratio, decay, 1.0, WARMUP)
    # They add 1e-6 to what they divide by.
    np.testing.assert_allclose(actual, expected, rtol=3e-5)


def test_a_leaf_without_a_gradient_at_first_is_not_held_at_zero():
  norms = make_norms()
  norms[3, 0] = 0
  expected = by_hand.adagc(norms, 1.05, 0.98, 1.0, WARMUP)
  assert not expected[WARMUP:, 0].any()
  others = clipped_norms(make_norms())
  np.testing.assert_allclose(
    clipped_norms(norms)[WARMUP + 1 :, 0], others[WARMUP + 1 :, 0], rtol=0.05
  )
