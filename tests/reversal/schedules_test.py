"""The schedules of domain-adversarial training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm


@pytest.mark.parametrize('gamma', [1.0, 10.0, 40.0])
def test_reversal_schedule_is_the_formula(gamma):
  schedule = optax_ghm.dann_reversal_schedule(
    200, 0.7, gamma=gamma, init_value=0.1, transition_begin=50
  )
  for step in (0, 49, 50, 51, 100, 249, 250, 251, 10_000):
    p = min(max((step - 50) / 200, 0), 1)
    expected = 0.1 + 0.6 * (2 / (1 + np.exp(-gamma * p)) - 1)
    np.testing.assert_allclose(schedule(step), expected, rtol=2e-6)


def test_learning_rate_schedule_is_the_formula():
  schedule = optax_ghm.dann_learning_rate_schedule(200)
  steps = jnp.arange(0, 300, 7)
  p = np.minimum(np.asarray(steps) / 200, 1)
  np.testing.assert_allclose(
    schedule(steps), 0.01 / (1 + 10 * p) ** 0.75, rtol=2e-6
  )


def test_reversal_is_exactly_off_before_it_begins():
  schedule = optax_ghm.dann_reversal_schedule(10, transition_begin=5)
  np.testing.assert_array_equal(schedule(jnp.arange(6)), jnp.zeros(6))
  assert schedule(6) > 0


def test_schedules_are_precise_where_floats_are_coarse():
  late = 2**24
  schedule = optax_ghm.dann_reversal_schedule(4, transition_begin=late)
  np.testing.assert_allclose(
    schedule(jnp.int32(late + 1)), np.tanh(1.25), rtol=1e-6
  )
  early = optax_ghm.dann_reversal_schedule(10**9)
  np.testing.assert_allclose(early(1), 5e-9, rtol=1e-6)  # no cancellation


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.uint32, np.int32])
def test_steps_of_every_dtype_do_not_wrap(dtype):
  schedule = optax_ghm.dann_reversal_schedule(1000, transition_begin=200)
  assert schedule(dtype(50)) == 0
  assert schedule(np.asarray(100, dtype)).dtype == jnp.float32


@pytest.mark.parametrize('steps', [0, -1, float('nan')])
@pytest.mark.parametrize(
  'schedule',
  [
    optax_ghm.dann_reversal_schedule,
    optax_ghm.dann_learning_rate_schedule,
  ],
)
def test_schedules_need_steps(schedule, steps):
  with pytest.raises(ValueError, match='transition_steps'):
    schedule(steps)


def test_schedules_drive_optimizers_of_optax():
  ramp = optax_ghm.dann_reversal_schedule(10)
  tx = optax.chain(
    optax.scale_by_schedule(lambda step: -ramp(step)),
    optax.sgd(optax_ghm.dann_learning_rate_schedule(10), momentum=0.9),
  )
  params = jnp.ones(2)
  run = jax.jit(tx.update)
  state = tx.init(params)
  updates, state = run(params, state, params)
  np.testing.assert_array_equal(updates, jnp.zeros(2))
  updates, state = run(params, state, params)
  assert (updates > 0).all()


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
