"""The range test of optimizers that skip or accumulate steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ghm


def loss(w, batch):
  x, y = batch
  return jnp.mean((x @ w - y) ** 2)


def batches(rng):
  x = rng.normal(size=(10, 32, 4)).astype(np.float32)
  y = x @ np.array([1, -2, 3, 0], np.float32) + np.sin(9 * x[..., 0])
  return x, y


def suggested(data, optimizer):
  test = optax_ghm.learning_rate_range_test(
    loss, np.zeros(4, np.float32), data, optimizer
  )
  return test.suggestion


def test_the_learning_rate_is_that_of_the_step_whatever_the_inner_count(rng):
  """As holocron#504 and lightning#1726 have it, where k = 2 suggested 333."""
  data = batches(rng)
  plain = suggested(data, optax.sgd)
  with jax.numpy_dtype_promotion('standard'):  # MultiSteps needs it
    twice = suggested(data, lambda rate: optax.MultiSteps(optax.sgd(rate), 2))
  assert 1 <= twice / plain < 4
  guarded = suggested(data, lambda r: optax.apply_if_finite(optax.sgd(r), 5))
  assert guarded == plain


def test_a_list_of_batches_is_their_stack(rng):
  x, y = batches(rng)
  listed = [{'x': a, 'y': b} for a, b in zip(x, y, strict=True)]
  stacked = {'x': x, 'y': y}
  found = [
    optax_ghm.learning_rate_range_test(
      lambda w, batch: loss(w, (batch['x'], batch['y'])),
      np.zeros(4, np.float32),
      data,
    )
    for data in (listed, stacked)
  ]
  np.testing.assert_array_equal(found[0].losses, found[1].losses)
