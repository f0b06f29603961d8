"""States of the backward pass, which their gradients replace."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm.backward import OVERWRITE_WITH_GRADIENT, InBackwardState
from tests.support.strategies_trees import STRUCTURES, trees, types


@jax.jit
def overwritten(states, gradients):
  return optax_ghm.overwrite_with_gradient(states, gradients)


@pytest.mark.device
@given(
  calls=hnp.arrays(np.float32, 3, elements=st.sampled_from([0, 1, 2])),
  values=st.tuples(
    *[hnp.arrays(np.float32, (3, 2), elements=st.floats(-8, 8, width=16))] * 2
  ),
)
def test_stacked_states_are_replaced_one_by_one_where_a_gradient_came(
  calls, values
):
  """As layers of a scan have them. States of others are their gradient."""
  old, new = values
  state = InBackwardState({'m': old}, np.zeros(3, np.float32))
  gradient = InBackwardState({'m': new}, calls)
  after = overwritten(
    {'state': state, 'plain': old}, {'state': gradient, 'plain': new}
  )
  np.testing.assert_array_equal(after['plain'], new)
  expected = np.where(calls[:, None] > 0, new, old)
  np.testing.assert_array_equal(after['state'].floats['m'], expected)
  np.testing.assert_array_equal(after['state'].calls, calls)


TX = optax.sgd(0.5)


@jax.jit
def applied(gradients, variables):
  opt_state = TX.init(variables['params'])
  return optax_ghm.apply_gradients(TX, gradients, opt_state, variables)


NESTED = STRUCTURES['nested']


@pytest.mark.device
@given(
  params=trees(NESTED, (0,)),
  gradients=trees(NESTED, (0,)),
  with_states=st.booleans(),
)
def test_apply_gradients(params, gradients, with_states):
  variables, of_variables = {'params': params}, {'params': gradients}
  if with_states:
    name = OVERWRITE_WITH_GRADIENT
    density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
    zeros = jax.tree.map(
      lambda u: np.zeros(u.shape, u.dtype), jax.eval_shape(density.init)
    )
    ones = jax.tree.map(np.ones_like, zeros)
    variables[name] = {'a': zeros, 'b': [zeros], 'scale': np.zeros(2, 'f')}
    of_variables[name] = {
      'a': ones,
      'b': [ones._replace(calls=np.float32(0))],  # not reached
      'scale': np.ones(2, 'f'),
    }
  after, state = applied(of_variables, variables)
  assert set(after) == set(variables)
  expected = jax.tree.map(lambda p, g: p - g / 2, params, gradients)
  chex.assert_trees_all_close(after['params'], expected, rtol=1e-6)
  assert types(after['params']) == types(params)
  assert types(state) == types(TX.init(params))
  if with_states:
    expected = {'a': ones, 'b': [zeros], 'scale': np.ones(2, 'f')}
    chex.assert_trees_all_equal(after[name], expected)


def test_apply_gradients_passes_extra_arguments():
  tx = optax.GradientTransformationExtraArgs(
    lambda params: (),
    lambda updates, state, params=None, *, factor, **_: (
      jax.tree.map(lambda u: factor * u, updates),
      state,
    ),
  )
  one = {'params': jnp.float32(1)}
  variables, _ = optax_ghm.apply_gradients(tx, one, (), one, factor=3.0)
  assert float(variables['params']) == 4


@pytest.mark.parametrize('gradients', [np.ones(2), None, ()])
def test_gradients_of_another_structure_are_named(gradients):
  state = optax_ghm.WindowedDensity().init()
  with pytest.raises(ValueError, match='gradients must have the structure'):
    optax_ghm.overwrite_with_gradient(state, gradients)


def test_a_function_is_no_optimizer():
  one = {'params': np.ones(1)}
  with pytest.raises(TypeError, match='tx must be a .*<function adam.*Call'):
    optax_ghm.apply_gradients(optax.adam, one, (), one)


def test_unknown_collections_are_named():
  tx, params = optax.sgd(0.1), {'params': {}}
  for variables, gradients in (
    (params | {'batch_stats': {}}, params | {'batch_stats': {}}),
    (params, {}),
    ({}, {}),
    (params | {OVERWRITE_WITH_GRADIENT: {}}, params),
  ):
    with pytest.raises(ValueError, match='variables and gradients must') as e:
      optax_ghm.apply_gradients(tx, gradients, tx.init({}), variables)
    assert f'{sorted(variables)} and {sorted(gradients)}' in str(e.value)
