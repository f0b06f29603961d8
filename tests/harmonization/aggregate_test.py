"""Per-example gradients, averaged by their harmony."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from optax_ghm import harmonization
from tests.support.oracles_harmonization import published

TX = optax_ghm.harmonized_aggregate(published())


@jax.jit
def _aggregate(grads, options):
  return TX.update(grads, TX.init({}), **options)


def aggregate(grads, **options):
  updates, state = jax.device_get(_aggregate(grads, options))
  return updates, state.density


@pytest.fixture
def grads(rng):
  return {
    'w': rng.normal(size=(12, 3, 2)).astype(np.float32),
    'b': rng.normal(size=12).astype(jnp.bfloat16),
  }


def test_it_is_the_weighted_mean(grads):
  w, b = (np.asarray(grads[k], np.float64) for k in ('w', 'b'))
  norms = np.sqrt(np.square(w).sum((1, 2)) + np.square(b))
  weights, expected_state = jax.jit(
    lambda norms: optax_ghm.harmony_weights(
      norms, weighting=published(harmonization.PARAMETER_DENSITY)
    )
  )(norms.astype(np.float32))
  updates, state = aggregate(grads)
  weights = np.asarray(weights, np.float64)
  np.testing.assert_allclose(
    updates['w'], np.einsum('b,bij->ij', weights, w) / 12, rtol=1e-5
  )
  assert updates['b'].dtype == jnp.bfloat16 and updates['b'].shape == ()
  np.testing.assert_allclose(
    np.float32(updates['b']), weights @ b / 12, rtol=1e-2
  )
  chex.assert_trees_all_close(state, jax.device_get(expected_state))


@pytest.mark.device
def test_it_does_not_depend_on_the_scale(rng):
  grads = rng.normal(size=(64, 5)).astype(np.float32)
  one, _ = aggregate(grads)
  for factor in np.float32([1e-3, 1e3, 1e6]):
    scaled, _ = aggregate(factor * grads)
    np.testing.assert_allclose(scaled / factor, one, rtol=2e-2)


@pytest.mark.device
def test_it_lifts_the_rare_and_mutes_the_crowd():
  grads = np.zeros((64, 5), np.float32)
  grads[:61, 0], grads[61:, 1] = 0.01, 1.0
  updates, _ = aggregate(grads)
  np.testing.assert_allclose(updates[1], 0.5, rtol=1e-2)  # two, half each


def test_bad_examples_are_left_out_and_counted(grads):
  bad = {**grads, 'w': grads['w'].copy()}
  bad['w'][3, 0, 0] = np.nan
  updates, state = aggregate(bad, mask=np.ones(12, bool))
  without, _ = aggregate(grads, mask=np.arange(12) != 3)
  chex.assert_trees_all_close(updates, without, rtol=1e-5)
  assert state.non_finite == 1
  bad = jax.tree.map(lambda g: np.full_like(g, np.nan), grads)
  for leaf in jax.tree.leaves(aggregate(bad)[0]):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_masks_and_weights_say_how_much_an_example_counts(grads):
  mask = np.arange(12) < 8
  first, _ = aggregate(jax.tree.map(lambda g: g[:8], grads))
  masked, _ = aggregate(grads, mask=mask)
  halved, _ = aggregate(grads, weights=np.float32(0.5 * mask))
  for updates in (masked, halved):
    chex.assert_trees_all_close(updates, first, rtol=1e-5)
  twice = np.r_[np.arange(8), np.arange(4)]
  repeated, _ = aggregate(jax.tree.map(lambda g: g[twice], grads))
  weights = np.repeat(np.float32([2.0, 1.0, 3.0]), 4)
  weighed, _ = aggregate(grads, mask=mask, weights=weights)
  chex.assert_trees_all_close(weighed, repeated, rtol=1e-2, atol=1e-5)


def test_wrong_updates_are_named():
  def ones(*shape):
    return np.ones(shape, np.float32)

  state, averaged = TX.init({}), {'w': ones(8, 2)}
  with pytest.raises(ValueError, match=r'batch axis.*\(8, 2\) for \(8, 2\)'):
    TX.update(averaged, state, averaged)
  with pytest.raises(ValueError, match=r'updates.*\(4, 2\).*\(3,\)'):
    TX.update({'a': ones(4, 2), 'b': ones(3)}, state)
  with pytest.raises(ValueError, match='updates'):
    TX.update({'a': ones()}, state)
