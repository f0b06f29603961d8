"""The losses are their formulas, on drawn numbers of every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support import (
  oracles_harmonization as oracles,
  strategies_arrays as arrays_of,
)
from tests.support.oracles_harmonization import MU, Smooth, published

pytestmark = pytest.mark.device

CASES = [  # few: each is compiled
  (jnp.float16, (5,)),
  (jnp.bfloat16, ()),
  (jnp.float32, (1, 2, 1, 3, 1, 1)),
  (jnp.float32, (3, 0, 2)),
  (jnp.float64, (3, 2)),
]
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, -1.0, np.nan])


@functools.partial(jax.jit, static_argnames=('loss', 'density'))
def losses_and_grad(loss, x, y, weights, density):
  def total(x):
    losses, state = loss(
      x, y, density.init(), weighting=published(density), weights=weights
    )
    return losses.sum(), (losses, state)

  (_, aux), grad = jax.value_and_grad(total, has_aux=True)(x)
  return *aux, grad


def assert_defined(found, x, weights, defined, dtype):
  """The weighted loss and its gradient; nothing where the weight is 0."""
  losses, state, grad = jax.device_get(found)
  computed = np.promote_types(dtype, np.float32)
  assert losses.dtype == computed and grad.dtype == dtype
  plain, error, g = defined
  factors = oracles.harmony_of(g, weights)
  counts = weights > 0
  undefined = counts & np.isnan(g)
  np.testing.assert_array_equal(np.isnan(losses), undefined)
  assert float(state.non_finite) == weights[undefined].sum()
  # Weights are of float32, g of canceling probabilities.
  rtol, keep = arrays_of.rounding(jnp.float32), counts & ~undefined
  expected = np.where(keep, factors * np.where(keep, plain, 0), 0)
  arrays_of.assert_close(losses[~undefined], expected[~undefined], rtol, rtol)
  factors, keep, undefined = (
    u.reshape(u.shape + (1,) * (x.ndim - u.ndim))
    for u in (factors, keep, undefined)
  )
  expected = np.where(keep, factors * np.where(keep, error, 0), 0)
  sound = np.broadcast_to(~undefined, x.shape)
  rtol = max(rtol, arrays_of.rounding(dtype))
  atol = rtol * max(factors.max(initial=1), 1)
  arrays_of.assert_close(np.asarray(grad)[sound], expected[sound], rtol, atol)


ELEMENTWISE = {
  'sigmoid': (optax_ghm.sigmoid_ghm_loss_with_state, oracles.sigmoid, (0, 1)),
  'smooth_l1': (
    functools.partial(optax_ghm.smooth_l1_ghm_loss_with_state, mu=MU),
    oracles.smooth_l1,
    (-4, 4),
  ),
}


@pytest.mark.parametrize('name', ELEMENTWISE)
@given(
  case=st.sampled_from(CASES),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  data=st.data(),
)
def test_elementwise_losses_are_their_formula(name, case, layout, data):
  (dtype, shape), (loss, formula, (low, high)) = case, ELEMENTWISE[name]
  x = data.draw(arrays_of.arrays(dtype, shape, arrays_of.numbers(dtype)))
  bounded = st.integers(low * 8, high * 8).map(lambda n: n / 8)
  y = data.draw(arrays_of.arrays(dtype, shape, bounded))
  weights = data.draw(arrays_of.arrays(np.float32, shape, WEIGHTS))
  check_elementwise(loss, formula, x, y, weights, dtype, layout)


def check_elementwise(loss, formula, x, y, weights, dtype, layout='jax'):
  with arrays_of.x64(dtype):
    given_ = [arrays_of.laid_out(u, layout) for u in (x, y, weights)]
    found = losses_and_grad(loss, *given_, Smooth())
  x, y, weights = (np.asarray(u, np.float64) for u in (x, y, weights))
  largest = float(jnp.finfo(np.promote_types(dtype, np.float32)).max)
  defined = formula(x, y, largest)
  assert_defined(found, x, weights, defined, dtype)


@pytest.mark.parametrize(
  ('name', 'x', 'y'),
  [
    ('sigmoid', np.inf, 1.0),
    ('sigmoid', -3e38, 1.0),
    ('sigmoid', -np.inf, 0.0),
    ('smooth_l1', 3e38, -3e38),
    ('smooth_l1', -np.inf, 1.0),
    ('smooth_l1', 1e-42, 0.0),
  ],
)
def test_the_ends_of_float32(name, x, y):
  loss, formula, _ = ELEMENTWISE[name]
  x, y = np.float32([x, 0.5]), np.float32([y, 0.0])
  check_elementwise(loss, formula, x, y, np.ones(2), np.float32)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def of_mu(d, mu):
  return optax_ghm.smooth_l1_ghm_loss(
    d, jnp.zeros_like(d), mu=mu, weighting=published(Smooth())
  )


@given(mu=st.floats(1e-30, 1e30), d=st.sampled_from([0.0, 1.0, -1e30, 1e-30]))
@example(mu=1e-42, d=0.0)
def test_smooth_l1_of_any_mu(mu, d):
  mu = float(np.float32(mu))
  losses, slope = jax.device_get(of_mu(np.float32(d), mu))
  d = float(np.float32(d))
  expected = abs(d) * (abs(d) / (np.hypot(d, mu) + mu))
  arrays_of.assert_close(losses, expected, 1e-6)
  if mu > 1e-38:  # what float32 holds
    arrays_of.assert_close(slope, mu / np.hypot(d, mu) - 1, 1e-6, 1e-6)


def test_python_scalars_are_losses_of_one_example():
  scalars = [(x, y) for x in (-9.0, 0.3) for y in (0, 1, True, 0.25)]
  losses = (
    (optax_ghm.sigmoid_ghm_loss, oracles.sigmoid),
    (
      functools.partial(optax_ghm.smooth_l1_ghm_loss, mu=MU),
      oracles.smooth_l1,
    ),
  )
  found = jax.jit(
    lambda: [[f(*u, weighting=published()) for u in scalars] for f, _ in losses]
  )()
  for of_loss, (_, formula) in zip(found, losses, strict=True):
    for loss, (x, y) in zip(of_loss, scalars, strict=True):
      assert loss.shape == () and loss.dtype == jnp.float32
      expected, *_ = formula(float(x), float(y))
      arrays_of.assert_close(loss, expected, 2e-6, 1e-6)


@given(
  case=st.sampled_from(
    [
      (jnp.float16, (4,)),
      (jnp.bfloat16, (5, 1)),
      (jnp.float32, (2, 0, 3)),
      (jnp.float32, (1, 2, 1, 1, 2, 3)),
      (jnp.float64, (5, 3)),
    ]
  ),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  data=st.data(),
)
def test_softmax_losses_are_their_formula(case, layout, data):
  dtype, shape = case
  x = data.draw(arrays_of.arrays(dtype, shape, arrays_of.numbers(dtype)))
  x = np.where(x == np.inf, jnp.finfo(dtype).max, x)  # no class is certain
  labels = data.draw(
    hnp.arrays(np.int32, shape[:-1], elements=st.integers(-1, shape[-1]))
  )
  weights = data.draw(arrays_of.arrays(np.float32, shape[:-1], WEIGHTS))
  with arrays_of.x64(dtype):
    given_ = [arrays_of.laid_out(u, layout) for u in (x, labels, weights)]
    found = losses_and_grad(
      optax_ghm.softmax_ghm_loss_with_integer_labels_with_state,
      *given_,
      Smooth(),
    )
  x, weights = (np.asarray(u, np.float64) for u in (x, weights))
  defined = oracles.softmax(x, labels)
  assert_defined(found, x, weights, defined, dtype)


INTEGERS = [np.int8, np.uint8, np.uint32]


@jax.jit
def of_integer_labels(x, labels, weights):
  return [
    loss(x, labels, None, weighting=published(Smooth()), weights=weights)
    for loss in (
      optax_ghm.sigmoid_ghm_loss_with_integer_labels_with_state,
      optax_ghm.softmax_ghm_loss_with_integer_labels_with_state,
    )
  ]


@given(dtype=st.sampled_from(INTEGERS), data=st.data())
def test_labels_may_be_of_any_integers(dtype, data):
  info, classes = np.iinfo(dtype), 300
  some = st.integers(max(info.min, -400), min(info.max, 400))
  labels = data.draw(hnp.arrays(dtype, 4, elements=some))
  x = np.linspace(-3, 3, 4 * classes, dtype=np.float32).reshape(4, classes)
  weights = np.ones(4, np.float32)
  found = of_integer_labels(x, labels, weights)
  wide = of_integer_labels(x, labels.astype(np.int32), weights)
  jax.tree.map(np.testing.assert_array_equal, found, wide)


LOSSES = {
  'sigmoid': (optax_ghm.sigmoid_ghm_loss_with_state, np.float32),
  'one_hot': (
    optax_ghm.sigmoid_ghm_loss_with_integer_labels_with_state,
    np.int32,
  ),
  'softmax': (
    optax_ghm.softmax_ghm_loss_with_integer_labels_with_state,
    np.int32,
  ),
  'smooth_l1': (optax_ghm.smooth_l1_ghm_loss_with_state, np.float32),
}


@pytest.mark.parametrize('name', LOSSES)
@given(data=st.data())
def test_what_weighs_nothing_has_no_part_in_anything(name, data):
  loss, targets = LOSSES[name]
  integers = targets is np.int32
  x = data.draw(
    arrays_of.arrays(np.float32, (4, 3), arrays_of.numbers(np.float32))
  )
  shape = (4,) if integers else (4, 3)
  y = data.draw(hnp.arrays(targets, shape, elements=st.integers(0, 1)))
  weights = data.draw(arrays_of.arrays(np.float32, (4,), WEIGHTS))
  weights = weights if integers else weights[:, None]
  out = ~(weights > 0)
  other_x = np.where(out.reshape(4, 1), np.float32(7), x)
  other_y = np.where(out.reshape(-1, *[1] * (y.ndim - 1)), targets(9), y)
  density = optax_ghm.WindowedDensity(width=0.25, cells=8)
  found, other = (
    losses_and_grad(loss, *given_, weights, density)
    for given_ in ((x, y), (other_x, other_y))
  )
  jax.tree.map(np.testing.assert_array_equal, found, other)
  losses, _, grad = jax.device_get(found)
  assert (losses[out.reshape(4)] == 0).all()
  assert (grad[out.reshape(4)] == 0).all()
