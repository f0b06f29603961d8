"""Reversal, transformations inside the backward pass, and DANN's schedules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support.strategies_trees import (
  STRUCTURES,
  is_inexact,
  trees,
  types,
)

SCALES = st.sampled_from([0.0, -0.0, 0.5, -2.0, 2.0**10])


@functools.cache
def pulled():
  """The cotangent of the inexact leaves behind the reversal."""

  @jax.jit
  def pull(floats, cotangents, scale):
    return jax.vjp(lambda x: optax_ghm.reverse_gradient(x, scale), floats)[1](
      cotangents
    )[0]

  return pull


@functools.cache
def mounted():
  @jax.jit
  def pull(floats, cotangents, scale):
    tx = optax_ghm.in_backward(optax_ghm.reverse(scale))
    return jax.vjp(tx, floats)[1](cotangents)[0]

  return pull


@functools.cache
def reversed_():
  @jax.jit
  def update(tree, scale):
    tx = optax_ghm.reverse(scale)
    return tx.update(tree, tx.init(tree))[0]

  return update


@given(
  tree=st.sampled_from(['nested', 'mixed']).flatmap(
    lambda name: trees(STRUCTURES[name], bad=True)
  ),
  scale=SCALES,
)
def test_reversals_multiply_by_minus_the_scale(tree, scale):
  """Powers of two: exact but for what is flushed; the same in all faces."""
  floats = jax.tree.map(lambda x: x if is_inexact(x) else None, tree)

  def expected(x):
    factor = np.asarray(-scale, jnp.finfo(x.dtype).dtype)
    with np.errstate(all='ignore'):
      if np.iscomplexobj(x):
        parts = [(part * factor) for part in (x.real, x.imag)]
        return np.stack(parts, -1).view(x.dtype)[..., 0]
      return x * factor

  expect = jax.tree.map(expected, floats)
  every = (
    reversed_()(tree, np.float32(scale)),
    pulled()(floats, floats, np.float32(scale)),
    mounted()(floats, floats, np.float32(scale)),
  )
  for actual in every:
    part = (
      jax.tree.map(lambda x, old: x if is_inexact(old) else None, actual, tree)
      if actual is every[0]
      else actual
    )
    assert types(part) == types(floats)
    for x, y in zip(*map(jax.tree.leaves, (part, expect)), strict=True):
      np.testing.assert_allclose(
        np.asarray(x, np.complex128),
        np.asarray(y, np.complex128),
        rtol=0,
        atol=float(jnp.finfo(x.dtype).tiny),
      )


@given(
  shape=st.sampled_from([(), (3,), (3, 2), (3, 1)]),
  scale=hnp.arrays(np.float32, 3, elements=st.sampled_from([0, 1, -0.5])),
)
def test_a_scale_per_example(shape, scale):
  x = np.ones((3, 2, 2), np.float32)
  of_examples = np.resize(scale, shape).astype(np.float32)
  grads = jax.grad(
    lambda x: jnp.sum(optax_ghm.reverse_gradient(x, of_examples))
  )(x)
  axes = tuple(range(len(shape), 3))
  expected = -np.expand_dims(of_examples, axes) * x
  np.testing.assert_array_equal(grads, expected)


STEPS = st.one_of(
  st.integers(-1000, 2**31 - 1).map(np.int32),
  st.integers(0, 255).map(np.uint8),
  st.integers(0, 2000),
  hnp.arrays(np.int32, (2, 3), elements=st.integers(0, 2000)),
)


def progress(count, steps, begin=0):
  done = (np.float64(count) - begin) / steps
  return np.clip(done, 0, 1)


@given(
  count=STEPS,
  steps=st.integers(1, 2000),
  begin=st.integers(0, 1000),
  ends=st.tuples(*[st.floats(-2, 2, width=16)] * 2),
  gamma=st.sampled_from([0.5, 10.0, 100.0]),
)
def test_dann_reversal_schedule(count, steps, begin, ends, gamma):
  low, high = ends
  actual = optax_ghm.dann_reversal_schedule(
    steps, high, gamma=gamma, init_value=low, transition_begin=begin
  )(count)
  rise = 2 / (1 + np.exp(-gamma * progress(count, steps, begin))) - 1
  assert actual.dtype == jnp.float32 and actual.shape == np.shape(count)
  np.testing.assert_allclose(
    actual, low + (high - low) * rise, rtol=1e-5, atol=2e-6
  )


@given(
  count=STEPS,
  steps=st.integers(1, 2000),
  first=st.floats(0, 2, width=16),
  alpha=st.sampled_from([0.0, 10.0]),
  beta=st.sampled_from([0.0, 0.75, 2.0]),
)
def test_dann_learning_rate_schedule(count, steps, first, alpha, beta):
  actual = optax_ghm.dann_learning_rate_schedule(
    steps, first, alpha=alpha, beta=beta
  )(count)
  expected = first / (1 + alpha * progress(count, steps)) ** beta
  assert actual.dtype == jnp.float32 and actual.shape == np.shape(count)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


# States that ride the backward pass.


@functools.cache
def of_clip():
  return optax_ghm.in_backward(
    optax.chain(optax_ghm.clip_by_zscore(0.5, warmup_steps=1), optax.trace(0.5))
  )


@functools.cache
def ridden():
  @jax.jit
  def step(x, state, cotangent):
    y, vjp = jax.vjp(of_clip(), x, state)
    x_bar, state_bar = vjp(cotangent)
    return x_bar, optax_ghm.overwrite_with_gradient(state, state_bar)

  return step


@functools.cache
def updated():
  return jax.jit(of_clip().tx.update)


NESTED = STRUCTURES['nested']


@given(st.lists(trees(NESTED, (0, 0.1, -0.1)), min_size=2, max_size=3))
def test_in_backward_is_the_update_of_the_cotangent(cotangents):
  x = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), NESTED)
  state, expected_state = of_clip().init(x), of_clip().tx.init(x)
  for cotangent in cotangents:
    x_bar, state = ridden()(x, state, cotangent)
    expected, expected_state = updated()(cotangent, expected_state)
    chex.assert_trees_all_close(x_bar, expected, rtol=1e-5, atol=1e-30)
  unpacked = of_clip().unpack(state, x)
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
  state = optax_ghm.InBackwardState(old, np.zeros(3, np.float32))
  gradient = optax_ghm.InBackwardState(new, calls)
  following = optax_ghm.overwrite_with_gradient(
    {'state': state, 'plain': old}, {'state': gradient, 'plain': new}
  )
  np.testing.assert_array_equal(following['plain'], new)
  expected = np.where(calls[:, None] > 0, new, old)
  np.testing.assert_array_equal(following['state'].carried, expected)


@given(
  params=trees(NESTED, (0,)),
  gradients=trees(NESTED, (0,)),
  overwritten=st.booleans(),
)
def test_apply_gradients(params, gradients, overwritten):
  tx = optax.sgd(0.5)
  variables, of_variables = {'params': params}, {'params': gradients}
  if overwritten:
    name = optax_ghm.OVERWRITE_WITH_GRADIENT
    variables[name], of_variables[name] = np.zeros(2), np.ones(2)
  following, state = optax_ghm.apply_gradients(
    tx, variables, of_variables, tx.init(params)
  )
  assert set(following) == set(variables)
  expected = jax.tree.map(lambda p, g: p - g / 2, params, gradients)
  chex.assert_trees_all_close(following['params'], expected, rtol=1e-6)
  assert types(following['params']) == types(params)
  assert types(state) == types(tx.init(params))
  if overwritten:
    np.testing.assert_array_equal(following[name], np.ones(2))
