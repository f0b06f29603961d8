"""Running averages: by their formula, and finite whatever comes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import Moments, RunningMoments
from tests.support import oracles_batch_norm as oracle

same = np.testing.assert_array_equal
update = jax.jit(RunningMoments.update, static_argnames='unbiased')


def start(debias, features=3):
  weight = np.full(features, not debias, np.float32)
  return RunningMoments(0 * weight, 0 * weight + 1, weight)


def batches(n, rng, shape=(5, 3)):
  """Moments of batches that are not alike."""
  for i in range(n):
    x = rng.normal(size=shape) * (1 + i) + i
    yield Moments(*map(np.float32, oracle.moments_of(x)))


@pytest.mark.device
def test_init():
  init = jax.jit(RunningMoments.init, static_argnums=(0, 1))
  for debias, weight in ((False, 1), (True, 0)):
    for u, value in zip(init((2, 3), debias), (0, 1, weight), strict=True):
      assert u.dtype == np.float32
      same(u, np.full((2, 3), value))


@pytest.mark.device
@pytest.mark.parametrize('unbiased', [False, True])
def test_averages_of_flax_of_pytorch_and_of_adam(unbiased, rng):
  """PyTorch's momentum is 1 minus ours; Adam divides by 1 - momentum ** k."""
  momentum, divisor = 0.9, 4 if unbiased else 5
  plain, debiased = start(False), start(True)
  flax = torch = np.stack([np.zeros(3), np.ones(3)])
  adam = np.zeros((2, 3))
  for k, moments in enumerate(batches(6, rng), 1):
    plain, debiased = (
      update(u, moments, momentum=momentum, unbiased=unbiased)
      for u in (plain, debiased)
    )
    new = np.stack([moments.mean, moments.m2 / divisor]).astype(np.float64)
    flax = momentum * flax + (1 - momentum) * new
    torch = (1 - 0.1) * torch + 0.1 * new
    adam = momentum * adam + (1 - momentum) * new
    weight = 1 - momentum**k
    np.testing.assert_allclose(plain[:2], flax, rtol=1e-5)
    np.testing.assert_allclose(plain[:2], torch, rtol=1e-5)
    same(plain.weight, np.ones(3))
    np.testing.assert_allclose(debiased[:2], adam / weight, rtol=2e-5)
    if k == 1:  # the first batch, exactly
      same(debiased[:2], [moments.mean, moments.m2 / np.float32(divisor)])
    np.testing.assert_allclose(debiased.weight, np.full(3, weight), rtol=1e-5)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.device
@given(
  momentum=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
  unbiased=st.booleans(),
  debias=st.booleans(),
  data=st.data(),
)
def test_running_moments_are_their_formula(momentum, unbiased, debias, data):
  """A feature that is not finite, or never counted, stays as it is."""
  running = start(debias)
  mean, var, weight = (u.astype(float) for u in running)
  for _ in range(3):
    count = data.draw(hnp.arrays(float, 3, elements=st.integers(0, 3)))
    batch_mean, m2 = (
      data.draw(hnp.arrays(float, 3, elements=elements))
      for elements in (
        st.integers(-9, 9) | st.sampled_from(BAD),
        st.integers(0, 9) | st.sampled_from(BAD[:2]),
      )
    )
    found = Moments(*map(np.float32, (count, batch_mean, m2)))
    before = running
    running = update(running, found, momentum=momentum, unbiased=unbiased)
    seen = (count > 0) & np.isfinite(batch_mean) & np.isfinite(m2)
    for new, old in zip(running, before, strict=True):
      same(new[~seen], old[~seen])
    batch_var = m2 / np.maximum(count - unbiased, 1)
    after = momentum * weight + 1 - momentum
    rate = (1 - momentum) / np.where(after == 0, 1, after)
    with np.errstate(invalid='ignore'):
      mean = np.where(seen, mean + rate * (batch_mean - mean), mean)
      var = np.where(seen, var + rate * (batch_var - var), var)
    weight = np.where(seen, after, weight)
  for u, wanted in zip(running, (mean, var, weight), strict=True):
    assert u.dtype == np.float32
    np.testing.assert_allclose(u, wanted, rtol=1e-5, atol=1e-5)


NUMBERS = st.floats(width=32)


@pytest.mark.device
@given(
  stream=st.lists(
    st.tuples(st.floats(0, 4, width=32), NUMBERS, NUMBERS), min_size=1
  ),
  momentum=st.sampled_from([0.5, 0.9, 0.99]),
  debias=st.booleans(),
)
@example(stream=[(0.0, 1.0, 1.0)], momentum=0.9, debias=True)
def test_stays_finite_whatever_comes(stream, momentum, debias):
  running = start(debias, 1)
  for numbers in stream[:8]:
    moments = Moments(*(np.array([u], np.float32) for u in numbers))
    running = update(running, moments, momentum=momentum)
    assert running.mean.dtype == running.weight.dtype == np.float32
    for u in running:
      assert np.isfinite(u).all()
    assert 0 <= running.weight[0] <= 1.000001


@pytest.mark.device
def test_no_gradient_flows_through_and_micro_batches_merged_are_one(rng):
  x = (3 + rng.normal(size=(12, 3))).astype(np.float32)

  def loss(x):
    running = RunningMoments.init((3,)).update(Moments.of(x))
    return sum(jnp.sum(u) for u in running)

  @jax.jit
  def program(x):
    running = RunningMoments.init((3,))
    parts = [Moments.of(x[i : i + 4]) for i in (0, 4, 8)]
    merged = running.update(functools.reduce(Moments.merge, parts))
    return jax.grad(loss)(x), merged, running.update(Moments.of(x))

  gradient, merged, once = program(x)
  assert not np.any(gradient)
  for a, b in zip(merged, once, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(once.mean, 0.01 * x.mean(0), rtol=1e-5)


@pytest.mark.device
def test_the_limits_of_momentum_are_exact(rng):
  (moments,) = batches(1, rng)
  for debias in (False, True):
    running = start(debias)
    jax.tree.map(same, update(running, moments, momentum=1.0), running)
    new = update(running, moments, momentum=0.0)
    same(new.mean, moments.mean)
    same(new.var, moments.m2 / 5)
    same(new.weight, np.ones(3))


def test_other_shapes_are_refused():
  moments = Moments(*np.zeros((3, 2), np.float32))
  with pytest.raises(ValueError, match=r'moments, of shape \(2,\)'):
    start(False, 1).update(moments)


def test_a_momentum_out_of_range_is_named():
  moments = Moments(*np.ones((3, 3), np.float32))
  with pytest.raises(ValueError, match='momentum must be from 0 to 1, got 1.5'):
    start(False).update(moments, momentum=1.5)


@pytest.mark.device
@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
@pytest.mark.parametrize('debias', [False, True])
def test_averages_that_were_cast_to_16_bits_reach_what_they_average(
  dtype, debias
):
  """Many elements overflow, and a small step rounds to none, in 16 bits.

  As pytorch#70901 and PyTorch's pull request 126525 have it.
  """
  moments = Moments(*(np.full(3, u, np.float32) for u in (7e4, 2, 9 * 7e4)))
  running = jax.tree.map(lambda u: u.astype(dtype), start(debias))
  for _ in range(90):
    running = update(running, moments, momentum=0.9)
  assert {u.dtype for u in running} == {np.dtype(np.float32)}
  np.testing.assert_allclose(running.mean, 2, rtol=1e-3)
  np.testing.assert_allclose(running.var, 9, rtol=1e-3)
