"""``update_where`` of whatever an update may give back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from optax_ghm._core.update_where import update_where
from tests.support.oracles_core import where_at_the_end
from tests.support.strategies_trees import types

OLD = {
  'a': np.float32([1.0, 2.0]),
  'b': np.float32([3.0, 4.0]),
  'n': np.int32(5),
}
GRADS = {'w': np.float32([0.5, -0.5])}


def unchanged(updates, state, params):
  return updates, dict(state)


def swapped(updates, state, params):
  return updates, {'a': state['b'], 'b': state['a'], 'n': state['n'] + 1}


def twice(updates, state, params):
  new = state['a'] + updates['w']
  return {'w': 2 * new}, {'a': new, 'b': new, 'n': state['n'] + 1}


def also_the_update(updates, state, params):
  new = 0.9 * state['a'] + updates['w']
  return {'w': new}, state | {'a': new}


def one_from_the_other(updates, state, params):
  a = state['a'] + updates['w']
  b = state['b'] * a
  return {'w': jnp.exp(a) + b}, {'a': a, 'b': b, 'n': state['n'] + 1}


def the_gradient(updates, state, params):
  return updates, state | {'a': updates['w'], 'b': updates['w']}


def the_params(updates, state, params):
  return params, state | {'a': params['w']}


def literal(updates, state, params):
  return updates, state | {'n': 0}


def constants(updates, state, params):
  return {'w': np.ones(2, np.float32)}, {
    'a': np.zeros(2, np.float32),
    'b': np.full(2, 7.0, np.float32),
    'n': np.int32(3),
  }


def jitted(updates, state, params):
  return jax.jit(one_from_the_other)(updates, state, params)


def looped(updates, state, params):
  a, n = jax.lax.fori_loop(
    0, 3, lambda i, c: (c[0] + updates['w'], c[1] + 1), (state['a'], state['n'])
  )
  return {'w': a}, state | {'a': a, 'n': n}


def with_a_derivative(updates, state, params):
  a = jax.grad(lambda x: optax.safe_norm(x, 0.1))(state['a'])
  return {'w': a}, state | {'a': a}


def without_a_result(updates, state, params):
  """One result of the equation is not used."""
  top, _ = jax.lax.top_k(updates['w'], 2)
  return {'w': top}, state | {'b': top}


GIVEN_BACK = [
  unchanged,
  swapped,
  twice,
  also_the_update,
  one_from_the_other,
  the_gradient,
  the_params,
  literal,
  constants,
  jitted,
  looped,
  with_a_derivative,
  without_a_result,
]


NEITHER = jax.tree.map(np.zeros_like, GRADS), OLD


def test_whatever_an_update_gives_back():
  @jax.jit
  def selected(condition, *args):
    found = {}
    for update in GIVEN_BACK:
      pair = [
        select(condition, update, *args)
        for select in (update_where, where_at_the_end)
      ]
      assert types(pair[0][1]) == types(args[1])
      found[update.__name__] = pair
    return found

  args = GRADS, OLD, {'w': np.float32([7.0, 8.0])}
  for condition in (True, False):
    for actual, expected in selected(condition, *args).values():
      chex.assert_trees_all_close(actual, expected, rtol=1e-6)
      if not condition:
        chex.assert_trees_all_equal(actual, NEITHER)


@pytest.mark.parametrize('condition', [True, False])
def test_a_condition_of_python_or_numpy_and_without_jit(condition):
  expected = where_at_the_end(condition, twice, GRADS, OLD, None)
  for own in (condition, np.bool_(condition), np.array(condition)):
    actual = update_where(own, twice, GRADS, OLD, None)
    chex.assert_trees_all_equal(actual, expected)
    assert types(actual) == types(expected)


OTHERS = {
  'float0': np.zeros(2, jax.dtypes.float0),
  'masked': optax.MaskedNode(),
  'none': None,
  'no elements': np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize('prefix', ['a ', 'x '])
def test_updates_that_are_no_numbers_pass(prefix):
  """They may stand before or after the leaves that are numbers."""
  others = {prefix + name: leaf for name, leaf in OTHERS.items()}

  def update(updates, state, params):
    new, state = one_from_the_other({'w': updates['w']}, state, params)
    return updates | new, state

  @jax.jit
  def both(condition):
    actual, state = update_where(condition, update, GRADS | others, OLD)
    assert actual.keys() == (GRADS | others).keys()
    float0 = actual.pop(prefix + 'float0')
    assert float0.dtype == jax.dtypes.float0 and float0.shape == (2,)
    assert actual.pop(prefix + 'none') is None
    assert actual.pop(prefix + 'masked') == optax.MaskedNode()
    assert actual.pop(prefix + 'no elements').shape == (0, 3)
    expected = where_at_the_end(condition, one_from_the_other, GRADS, OLD)
    return (actual, state), expected

  for condition in (True, False):
    chex.assert_trees_all_equal(*both(condition))


def test_a_step_left_out_moves_no_integer_and_lets_nothing_bad_through():
  """Integers become 0, too, since ``optax.apply_updates`` adds them.

  The updates are zeros, and not 0 times NaN.
  """
  updates = {'w': np.float32([np.nan, np.inf])}
  updates |= {str(t): np.ones(3, t) for t in (np.int32, bool)}

  @jax.jit
  def selected(condition, updates):
    return update_where(condition, lambda u, s, p: (u, s), updates, OLD)

  for condition in (True, False):
    actual, state = jax.device_get(selected(condition, updates))
    expected = updates if condition else jax.tree.map(np.zeros_like, updates)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_trees_all_equal_dtypes(actual, updates)
    chex.assert_trees_all_equal(state, OLD)


X = np.ones(2, np.float32)


@pytest.mark.parametrize(
  'state',
  [{'a': X}, {'a': X, 'b': X, 'c': X}, {'a': X, 'c': X}, [X, X], None],
  ids=['fewer leaves', 'more leaves', 'other names', 'a list', 'none'],
)
def test_a_state_of_another_structure_is_an_error(state):
  """No update is mistaken for a leaf of the state."""

  def update(updates, old, params):
    return updates, jax.tree.map(lambda x: x + old['a'], state)

  with pytest.raises(ValueError):
    update_where(np.array(False), update, GRADS, {'a': X, 'b': X})


def test_a_state_of_other_shapes_is_an_error():
  def update(updates, old, params):
    return updates, {'a': old['a'][None]}

  with pytest.raises(ValueError, match='shapes that it took'):
    update_where(np.array(False), update, GRADS, {'a': X})


LEAVES = [
  (shape, dtype)
  for shape in [(), (3,), (2, 3), (0, 2)]
  for dtype in [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, np.int32]
]


@jax.jit
def selected_both(condition, grads, state):
  def update(updates, state, params=None):
    new = [(s + s).astype(s.dtype) for s in state]
    moved = [
      u + s.real.astype(u.dtype) for u, s in zip(updates, new, strict=True)
    ]
    return moved, new

  actual, expected = (
    select(condition, update, grads, state)
    for select in (update_where, where_at_the_end)
  )
  assert types(actual) == types(expected)
  return actual, expected


@given(condition=st.booleans(), seed=st.integers(0, 99))
def test_states_of_all_types(condition, seed):
  """The states hold special numbers, and each is made of the last one."""
  rng = np.random.default_rng(seed)
  special = np.float32([0.0, -0.0, 1.5, -3.0, np.inf, np.nan, 1e30])

  def leaf(shape, dtype):
    if dtype == np.int32:
      return rng.integers(-9, 9, shape).astype(np.int32)
    with np.errstate(over='ignore'):
      return rng.choice(special, shape).astype(dtype)

  state = [leaf(*each) for each in LEAVES]
  grads = [leaf(shape, np.float32) for shape, _ in LEAVES]
  chex.assert_trees_all_equal(*selected_both(condition, grads, state))
