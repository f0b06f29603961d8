"""The loss per positive: one batch without any is no reason to collapse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm as ghm

pytestmark = pytest.mark.device
STEPS, N = 6, 4


@jax.jit
def stream(losses, positives, momentum, floor):
  """The losses and averages of all steps, and the gradients."""

  def step(state, batch):
    def loss(*batch):
      return ghm.loss_per_positive(
        *batch, state, momentum=momentum, floor=floor
      )

    (value, state), gradients = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(*batch)
    return state, (value, state.average, *gradients)

  start = ghm.RunningPositives.init()
  return jax.lax.scan(step, start, (losses, positives))[1]


def test_a_calm_stream_has_the_loss_per_positive_from_the_first_batch_on():
  positives = np.tile(np.float32([1, 0, 0, 1]), (STEPS, 1))
  losses = np.arange(STEPS * N, dtype=np.float32).reshape(STEPS, N)
  found, *_ = stream(losses, positives, 0.9, 1.0)
  np.testing.assert_allclose(found, losses.sum(1) / 2, rtol=1e-6)


def test_a_batch_without_positives_weighs_about_as_much_as_others():
  positives = np.full((STEPS, N), 100.0, np.float32)
  positives[3] = 0
  losses = np.ones((STEPS, N), np.float32)
  found, *_ = stream(losses, positives, 0.9, 1.0)
  assert found[3] < 1.5 * found[2]
  alone, *_ = stream(losses, positives, 0.0, 1.0)
  assert alone[3] == 400 * alone[2]  # what it does by itself


@given(
  losses=hnp.arrays(
    np.float32, (STEPS, N), elements=st.sampled_from([0.0, 1.0, 0.01, 1e4])
  ),
  positives=hnp.arrays(
    np.float32,
    (STEPS, N),
    elements=st.sampled_from([0.0, 1.0, 0.5, 7.0, -1.0, np.nan, np.inf]),
  ),
  momentum=st.sampled_from([0.0, 0.5, 0.99]),
  floor=st.sampled_from([1.0, 1e-3, 5.0]),
)
def test_it_is_its_formula(losses, positives, momentum, floor):
  values, averages, of_losses, of_positives = jax.device_get(
    stream(losses, positives, momentum, floor)
  )
  known = (positives > 0) & np.isfinite(positives)
  found = np.where(known, positives, 0).sum(1).astype(float)
  for t in range(STEPS):
    decays = momentum ** np.arange(t, -1, -1.0)
    average = decays @ found[: t + 1] / decays.sum()
    divisor = max(average, floor)
    np.testing.assert_allclose(averages[t], average, 1e-5, atol=1e-30)
    np.testing.assert_allclose(values[t], losses[t].sum() / divisor, 1e-5)
    np.testing.assert_allclose(of_losses[t], np.full(N, 1 / divisor), 1e-5)
  np.testing.assert_array_equal(of_positives, np.zeros((STEPS, N)))


def test_a_bad_loss_leaves_the_state_and_an_empty_batch_has_none():
  state = ghm.RunningPositives.init()

  @jax.jit
  def both():
    bad = ghm.loss_per_positive(np.float32([1, np.nan]), np.int32(3), state)
    none = np.zeros((0, 2), np.float16)
    return bad, ghm.loss_per_positive(none, none > 0, state)

  (bad, after_bad), (empty, after_none) = both()
  assert np.isnan(bad) and after_bad.average == 3
  assert empty == 0 and empty.dtype == np.float32
  assert after_none.average == 0 and after_none.evidence > 0


def test_devices_have_the_loss_and_the_gradient_of_the_whole(rng):
  x = rng.random((8, 3)).astype(np.float32)

  def gradient(w, x, axis_name=None):
    def loss(w):
      return ghm.loss_per_positive(
        *(w * x, x > 0.5, ghm.RunningPositives.init()), axis_name=axis_name
      )

    return jax.value_and_grad(loss, has_aux=True)(w)

  @jax.jit
  def both(x):
    one = jnp.float32(1.0)
    (loss, state), grads = jax.vmap(
      functools.partial(gradient, axis_name='d'), (None, 0), axis_name='d'
    )(one, x)
    return ((loss, state), grads.mean()), gradient(one, x)

  found, expected = both(x)
  jax.tree.map(
    lambda u, v: np.testing.assert_allclose(
      u, np.broadcast_to(v, u.shape), rtol=1e-5
    ),
    *(found, expected),
  )


def test_what_it_does_not_take():
  state, one = ghm.RunningPositives.init(), np.ones(2, np.float32)
  for error, match, args, options in (
    (ValueError, r'momentum must be in \[0, 1\)', (one, one), {'momentum': 1}),
    (ValueError, 'floor must be above 0', (one, one), {'floor': 0.0}),
    (TypeError, 'losses must be floating', (one > 0, one), {}),
    (TypeError, 'positives must be real', (one, one * 1j), {}),
  ):
    with pytest.raises(error, match=match):
      ghm.loss_per_positive(*args, state, **options)
  with pytest.raises(TypeError, match='state must be a RunningPositives'):
    ghm.loss_per_positive(one, one, ())
