"""The schedules of domain-adversarial training, by formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm

pytestmark = pytest.mark.device
BOTH = optax_ghm.dann_reversal_schedule, optax_ghm.dann_learning_rate_schedule
SETTINGS = {  # few: each is compiled
  'default': (BOTH[0], (2000,), {}),
  'gentle': (
    BOTH[0],
    (200, 0.7),
    {'gamma': 1.0, 'init_value': 0.1, 'transition_begin': 50},
  ),
  'falling': (
    BOTH[0],
    (1, -0.5),
    {'gamma': 100.0, 'init_value': 2.0, 'transition_begin': 1000},
  ),
  'learning rate': (BOTH[1], (200,), {}),
  'slow learning rate': (BOTH[1], (2000, 2.0), {'alpha': 3.0, 'beta': 2.0}),
}
STEPS = st.one_of(
  st.integers(-1000, 2**31 - 1).map(np.int32),
  st.integers(0, 127).map(np.int8),
  st.integers(0, 2**31 - 1).map(np.uint32),
  hnp.arrays(np.int32, (2, 3), elements=st.integers(0, 2000)),
)


@functools.cache
def schedule(name):
  make, args, kwargs = SETTINGS[name]
  return jax.jit(make(*args, **kwargs))


@pytest.mark.parametrize('name', SETTINGS)
@given(STEPS)
@example(np.int32([[0, 49, 50], [51, 249, 250]]))
@example(np.int32([[999, 1000, 1001], [1002, 10_000, 2000]]))
def test_schedules_are_their_formulas(name, count):
  """Also of small integers, which do not wrap."""
  actual = schedule(name)(count)
  assert actual.dtype == jnp.float32 and actual.shape == np.shape(count)
  make, (steps, *peak), kwargs = SETTINGS[name]
  begin = kwargs.get('transition_begin', 0)
  p = np.clip((np.float64(count) - begin) / steps, 0, 1)
  if make is optax_ghm.dann_reversal_schedule:
    low, high = kwargs.get('init_value', 0), (*peak, 1)[0]
    rise = 2 / (1 + np.exp(-kwargs.get('gamma', 10) * p)) - 1
    expected = low + (high - low) * rise
    # It is off, exactly, before it begins.
    assert np.all((p > 0) | (np.asarray(actual) == np.float32(low)))
  else:
    slope, power = kwargs.get('alpha', 10), kwargs.get('beta', 0.75)
    expected = (*peak, 0.01)[0] / (1 + slope * p) ** power
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def test_schedules_are_precise_where_floats_are_coarse():
  make, late = optax_ghm.dann_reversal_schedule, 2**24
  values = jax.jit(
    lambda count: (make(4, transition_begin=late)(count), make(10**9)(1))
  )(np.int32(late + 1))
  # The second shows no cancellation.
  np.testing.assert_allclose(values, [np.tanh(1.25), 5e-9], rtol=1e-6)


@pytest.mark.parametrize('make', BOTH)
def test_schedules_need_steps(make):
  for steps in (0, -1, float('nan')):
    with pytest.raises(ValueError, match='transition_steps'):
      make(steps)
  with pytest.raises(ValueError, match='transition_begin must .*got -1'):
    BOTH[0](10, transition_begin=-1)
  half = jax.jit(lambda steps: make(steps)(5) - make(10)(5))
  np.testing.assert_allclose(half(10), 0, atol=1e-6)  # traced steps pass


def test_schedules_drive_optimizers_of_optax():
  ramp, rate = (make(10) for make in BOTH)
  tx = optax.chain(
    optax.scale_by_schedule(lambda step: -ramp(step)),
    optax.sgd(rate, momentum=0.9),
  )

  @jax.jit
  def two_steps(params):
    first, state = tx.update(params, tx.init(params), params)
    return first, tx.update(params, state, params)[0]

  first, second = two_steps(np.ones(2, np.float32))
  np.testing.assert_array_equal(first, np.zeros(2))
  assert (np.asarray(second) > 0).all()
