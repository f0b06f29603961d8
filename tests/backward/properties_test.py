"""Transformations and states of the backward pass, on drawn numbers."""

import functools

import chex
import jax
import numpy as np
import optax
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm.backward import OVERWRITE_WITH_GRADIENT, InBackwardState
from tests.support.strategies_trees import STRUCTURES, trees, types


@functools.cache
def clipping():
  return optax_ghm.in_backward(
    optax.chain(optax_ghm.clip_by_zscore(0.5, warmup_steps=1), optax.trace(0.5))
  )


@functools.cache
def pulled():
  @jax.jit
  def step(x, state, cotangent):
    y, vjp = jax.vjp(clipping(), x, state)
    x_bar, state_bar = vjp(cotangent)
    return x_bar, optax_ghm.overwrite_with_gradient(state, state_bar)

  return step


@functools.cache
def updated():
  return jax.jit(clipping().tx.update)


NESTED = STRUCTURES['nested']


@given(st.lists(trees(NESTED, (0, 0.1, -0.1)), min_size=2, max_size=3))
def test_in_backward_is_the_update_of_the_cotangent(cotangents):
  x = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), NESTED)
  state, expected_state = clipping().init(x), clipping().tx.init(x)
  for cotangent in cotangents:
    x_bar, state = pulled()(x, state, cotangent)
    expected, expected_state = updated()(cotangent, expected_state)
    chex.assert_trees_all_close(x_bar, expected, rtol=1e-5, atol=1e-30)
  unpacked = clipping().unpack(state, x)
  assert types(unpacked) == types(expected_state)
  chex.assert_trees_all_close(unpacked, expected_state, rtol=1e-5, atol=1e-30)


@given(
  calls=hnp.arrays(np.float32, 3, elements=st.sampled_from([0, 1, 2])),
  values=st.tuples(
    *[hnp.arrays(np.float32, (3, 2), elements=st.floats(-8, 8, width=16))] * 2
  ),
)
def test_overwrite_with_gradient_where_one_came(calls, values):
  old, new = values
  state = InBackwardState(old, np.zeros(3, np.float32))
  gradient = InBackwardState(new, calls)
  next_states = optax_ghm.overwrite_with_gradient(
    {'state': state, 'plain': old}, {'state': gradient, 'plain': new}
  )
  np.testing.assert_array_equal(next_states['plain'], new)
  expected = np.where(calls[:, None] > 0, new, old)
  np.testing.assert_array_equal(next_states['state'].floats, expected)


@given(
  params=trees(NESTED, (0,)),
  gradients=trees(NESTED, (0,)),
  overwritten=st.booleans(),
)
def test_apply_gradients(params, gradients, overwritten):
  tx = optax.sgd(0.5)
  variables, of_variables = {'params': params}, {'params': gradients}
  if overwritten:
    name = OVERWRITE_WITH_GRADIENT
    variables[name], of_variables[name] = np.zeros(2), np.ones(2)
  after, state = optax_ghm.apply_gradients(
    tx, of_variables, tx.init(params), variables
  )
  assert set(after) == set(variables)
  expected = jax.tree.map(lambda p, g: p - g / 2, params, gradients)
  chex.assert_trees_all_close(after['params'], expected, rtol=1e-6)
  assert types(after['params']) == types(params)
  assert types(state) == types(tx.init(params))
  if overwritten:
    np.testing.assert_array_equal(after[name], np.ones(2))
