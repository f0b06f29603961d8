import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ghm
from optax_ghm import OVERWRITE_WITH_GRADIENT


def test_apply_gradients_optimises_and_overwrites():
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  tx = optax.sgd(0.1, momentum=0.9)
  variables = {
    'params': {'w': jnp.ones(3)},
    OVERWRITE_WITH_GRADIENT: {'a': density.init(), 'b': [density.init()]},
  }

  def loss(variables):
    x = optax_ghm.harmonize(
      variables['params']['w'],
      variables[OVERWRITE_WITH_GRADIENT]['a'],
      density=density,
    )
    return jnp.mean(jnp.square(x))

  grads = jax.grad(loss)(variables)
  opt_state = tx.init(variables['params'])
  after, after_opt = optax_ghm.apply_gradients(tx, variables, grads, opt_state)
  updates, expected_opt = tx.update(
    grads['params'], opt_state, variables['params']
  )
  chex.assert_trees_all_equal(
    after['params'], optax.apply_updates(variables['params'], updates)
  )
  chex.assert_trees_all_equal(after_opt, expected_opt)
  states = after[OVERWRITE_WITH_GRADIENT]
  chex.assert_trees_all_equal(states['a'], grads[OVERWRITE_WITH_GRADIENT]['a'])
  chex.assert_trees_all_equal(states['b'], [density.init()])  # not reached


def test_apply_gradients_passes_extra_arguments():
  tx = optax.GradientTransformationExtraArgs(
    lambda params: (),
    lambda updates, state, params=None, *, factor, **_: (
      jax.tree.map(lambda u: factor * u, updates),
      state,
    ),
  )
  variables, _ = optax_ghm.apply_gradients(
    tx, {'params': jnp.ones(())}, {'params': jnp.ones(())}, (), factor=3.0
  )
  assert variables['params'] == 4


def test_unknown_collections_are_named():
  tx = optax.sgd(0.1)
  with pytest.raises(ValueError, match='variables.*batch_stats'):
    optax_ghm.apply_gradients(
      tx, {'params': {}, 'batch_stats': {}}, {'params': {}}, tx.init({})
    )
  with pytest.raises(ValueError, match='gradients'):
    optax_ghm.apply_gradients(tx, {'params': {}}, {}, tx.init({}))


def test_states_of_others_are_their_gradient():
  assert optax_ghm.overwrite_with_gradient({'scale': 1.0}, {'scale': 2.0}) == {
    'scale': 2.0
  }
