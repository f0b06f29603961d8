"""Integers in the state of a transformation, of which JAX adds up floats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm.backward import InBackwardState

pytestmark = pytest.mark.device


def remembering(values):
  """A transformation whose state is what it was made with."""
  return optax_ghm.in_backward(
    optax.GradientTransformation(
      lambda params: {'n': values}, lambda u, state, params=None: (u, state)
    )
  )


INTEGERS = {
  np.int32: [0, 1, -1, 2**16, -(2**16) - 1, 2**24 + 1, 2**31 - 1, -(2**31)],
  np.uint32: [0, 1, 2**16 - 1, 2**31, 2**32 - 1],
  np.int8: [-128, -1, 0, 127],
  np.uint16: [0, 65535],
  np.bool_: [False, True],
}
MEANS = [2**24 + 1, 2**31 - 1, -(2**31), 3582090, -1]


@jax.jit
def unpacked(values, calls):
  """After as many calls, summed up; and summed up and divided by as many."""
  x = jnp.ones(2)
  identity = remembering(values)
  _, vjp = jax.vjp(lambda s: identity(x, s), identity.init(x))
  (state,) = vjp(x)
  summed = jax.tree.map(lambda leaf: calls * leaf, state)
  added = jax.lax.fori_loop(
    1, calls.astype(int), lambda _, s: jax.tree.map(jnp.add, s, state), state
  )
  mean = jax.tree.map(lambda leaf: leaf / calls, added)
  return [identity.unpack(s, x)['n'] for s in (summed, mean)]


@pytest.mark.parametrize('dtype', INTEGERS)
def test_integers_survive_bit_for_bit(dtype):
  """Where one state serves many calls, and of micro-batches, averaged."""
  values = np.array(INTEGERS[dtype], dtype)
  for calls in (1, 2, 3, 7, 10, 100, 512):
    summed, mean = unpacked(values, np.float32(calls))
    assert summed.dtype == mean.dtype == dtype
    np.testing.assert_array_equal(summed, values)
    if calls <= 100:
      np.testing.assert_array_equal(mean, values)


@jax.jit
def mean_of(values, there):
  x = jnp.ones(2)
  states = jax.vmap(lambda value: remembering(value).init(x).floats)(values)
  summed = jax.tree.map(lambda u: jnp.sum(u * there[:, None], 0), states)
  state = InBackwardState(summed, jnp.sum(there))
  return remembering(jnp.int32(0)).unpack(state, x)['n']


@given(
  counts=hnp.arrays(np.int32, 9, elements=st.integers(-(2**31), 2**31 - 1)),
  size=st.integers(1, 9),
)
@example(counts=np.int32(MEANS + MEANS[:4]), size=5)
def test_integers_that_differ_are_averaged(counts, size):
  actual = mean_of(counts, np.float32(np.arange(9) < size))
  counts = counts[:size].astype(float)
  error = abs(int(actual) - counts.mean())
  assert error <= 1 + np.abs(counts).max() * 2**-22  # float32's rounding


def test_64_bit_integers():
  with jax.enable_x64(True):
    values = np.array([0, -1, 2**40 + 5, -(2**63), 2**63 - 1])

    @jax.jit
    def back(values):
      identity, x = remembering(values), jnp.ones(2)
      return identity.unpack(identity.init(x), x)['n']

    np.testing.assert_array_equal(back(values), values)
