import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests import golden

BINNED = optax_ghm.BinnedDensity(bins=10)
SHAPES = st.sampled_from([(0,), (1,), (6,), (3, 4)])
LOGITS = st.floats(width=32)


@functools.partial(jax.jit, static_argnames=('loss', 'density', 'mu'))
def loss_and_grad(loss, x, targets, state, mask, density, **kwargs):
  """Sum of the losses over the number that count, its gradient, the state."""

  def total(x):
    losses, new_state = loss(
      x, targets, state, mask=mask, density=density, **kwargs
    )
    count = jnp.maximum(mask.sum(dtype=jnp.float32), 1)
    return losses.sum() / count, new_state

  (value, state), grad = jax.value_and_grad(total, has_aux=True)(x)
  return value, grad, state


@pytest.mark.parametrize('case', golden.CASES)
def test_golden_numbers_of_the_reference(case):
  data = golden.load(case)
  density = golden.density(data)
  loss, kwargs = optax_ghm.sigmoid_ghm_loss_with_state, {}
  if case.startswith('ghmr'):
    loss, kwargs = (
      optax_ghm.smooth_l1_ghm_loss_with_state,
      {'mu': float(data['mu'])},
    )
  state = density.init()
  for step in range(len(data['loss'])):
    value, grad, state = loss_and_grad(
      loss,
      data['pred'][step],
      data['target'][step],
      state,
      data['label_weight'][step] > 0,
      density,
      **kwargs,
    )
    scale = float(data['loss_weight'])
    np.testing.assert_allclose(
      scale * value, data['loss'][step], rtol=1e-5, atol=1e-12
    )
    np.testing.assert_allclose(
      scale * grad, data['grad'][step], rtol=1e-5, atol=1e-9
    )
    np.testing.assert_allclose(
      state.histogram, data['acc_sum'][step], rtol=1e-5
    )


def test_sigmoid_loss_is_the_weighted_cross_entropy(rng):
  x = jnp.asarray(rng.normal(size=(40, 3)) * 4, jnp.float32)
  y = jnp.asarray(rng.uniform(size=(40, 3)), jnp.float32)
  losses = optax_ghm.sigmoid_ghm_loss(x, y)
  weights, _ = optax_ghm.harmony_weights(jnp.abs(jax.nn.sigmoid(x) - y))
  np.testing.assert_allclose(
    losses, weights * optax.sigmoid_binary_cross_entropy(x, y), rtol=1e-4
  )
  grad = jax.grad(lambda x: optax_ghm.sigmoid_ghm_loss(x, y).sum())(x)
  np.testing.assert_allclose(
    grad, weights * (jax.nn.sigmoid(x) - y), rtol=1e-4, atol=1e-6
  )


def test_labels_have_a_gradient_and_second_derivatives_are_right():
  x, y = jnp.array([0.0, -2.0, 3.0]), jnp.array([0.2, 0.0, 1.0])
  weights, _ = optax_ghm.harmony_weights(jnp.abs(jax.nn.sigmoid(x) - y))

  def loss(x, y):
    return optax_ghm.sigmoid_ghm_loss(x, y).sum()

  np.testing.assert_allclose(jax.grad(loss, 1)(x, y), -weights * x, rtol=1e-5)
  p = jax.nn.sigmoid(x)
  np.testing.assert_allclose(
    jax.hessian(loss)(x, y), np.diag(weights * p * (1 - p)), rtol=1e-5
  )
  _, tangent = jax.jvp(lambda x: loss(x, y), (x,), (jnp.ones(3),))
  np.testing.assert_allclose(tangent, (weights * (p - y)).sum(), rtol=1e-5)


def test_integer_labels_have_a_background():
  logits = jnp.array([[2.0, -1.0], [0.5, 0.5], [-3.0, 1.0]])
  labels = jnp.array([1, 2, -1])
  expected = jnp.array([[0, 1], [0, 0], [0, 0]])
  chex.assert_trees_all_equal(
    optax_ghm.sigmoid_ghm_loss_with_integer_labels(logits, labels),
    optax_ghm.sigmoid_ghm_loss(logits, expected),
  )
  chex.assert_trees_all_equal(
    optax_ghm.sigmoid_ghm_loss_with_integer_labels(
      logits, labels, mask=jnp.array([True, False, True])
    ),
    optax_ghm.sigmoid_ghm_loss(
      logits, expected, mask=jnp.array([[True], [False], [True]])
    ),
  )


def test_two_softmax_classes_are_the_binary_loss(rng):
  x = jnp.asarray(rng.normal(size=50) * 3, jnp.float32)
  y = jnp.asarray(rng.integers(0, 2, size=50))
  start = optax_ghm.WindowedDensity().init()
  binary, state = optax_ghm.sigmoid_ghm_loss_with_state(x, y, start)
  multi, multi_state = (
    optax_ghm.softmax_ghm_loss_with_integer_labels_with_state(
      jnp.stack([jnp.zeros_like(x), x], -1), y, start
    )
  )
  np.testing.assert_allclose(multi, binary, rtol=1e-4, atol=1e-6)
  # The norms agree to rounding: at most a few fall in a neighboring cell.
  assert jnp.abs(multi_state.histogram - state.histogram).sum() <= 4


def test_softmax_gradient_is_the_weighted_one(rng):
  x = jnp.asarray(rng.normal(size=(30, 7)) * 3, jnp.float32)
  y = jnp.asarray(rng.integers(0, 7, size=30))
  error = jax.nn.softmax(x) - jax.nn.one_hot(y, 7)
  weights, _ = optax_ghm.harmony_weights(
    jnp.abs(error).sum(-1) / 2,
    density=BINNED,
  )

  def loss(x):
    return optax_ghm.softmax_ghm_loss_with_integer_labels(x, y, density=BINNED)

  np.testing.assert_allclose(
    jax.grad(lambda x: loss(x).sum())(x),
    weights[:, None] * error,
    rtol=1e-4,
    atol=1e-6,
  )
  plain = optax.softmax_cross_entropy_with_integer_labels(x, y)
  np.testing.assert_allclose(loss(x), weights * plain, rtol=1e-4, atol=1e-6)


def test_softmax_norm_is_the_probability_in_the_wrong_place():
  logits = jnp.array([[0.0] * 4, [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 50.0]])
  _, state = optax_ghm.softmax_ghm_loss_with_integer_labels_with_state(
    logits, jnp.zeros(3, jnp.int32), BINNED.init(), density=BINNED
  )
  np.testing.assert_array_equal(state.histogram, [1, 0, 0, 0, 0, 0, 0, 1, 0, 1])


def test_asl1_keeps_its_precision_near_zero():
  d = jnp.array([1e-6, 1e-5, 1e-4])
  losses = optax_ghm.smooth_l1_ghm_loss(d, jnp.zeros(3), density=BINNED)
  exact = np.sqrt(np.float64(d) ** 2 + 4e-4) - 0.02
  np.testing.assert_allclose(losses, exact, rtol=1e-4)


def test_asl1_has_its_formula_and_no_overflow():
  d = jnp.array([0.0, 0.03, -1e3, 1e30, -3e38])
  losses = optax_ghm.smooth_l1_ghm_loss(d, jnp.zeros(5), density=BINNED)
  g = np.abs(d) / np.hypot(np.float64(0.02), d)
  weights, _ = optax_ghm.harmony_weights(
    jnp.asarray(g, jnp.float32), density=BINNED
  )
  np.testing.assert_allclose(
    losses, weights * (np.hypot(np.float64(0.02), d) - 0.02), rtol=1e-5
  )
  grad = jax.grad(
    lambda d: optax_ghm.smooth_l1_ghm_loss(
      d, jnp.zeros(5), density=BINNED
    ).sum()
  )(d)
  np.testing.assert_allclose(grad, weights * np.sign(d) * g, rtol=1e-5)


@given(x=hnp.arrays(np.float32, SHAPES, elements=LOGITS), data=st.data())
def test_any_logits_have_a_defined_result(x, data):
  y = data.draw(
    hnp.arrays(np.float32, x.shape, elements=st.sampled_from([0.0, 0.3, 1.0]))
  )
  mask = data.draw(hnp.arrays(bool, x.shape, elements=st.booleans()))
  _, grad, state = loss_and_grad(
    optax_ghm.sigmoid_ghm_loss_with_state,
    x,
    y,
    BINNED.init(),
    mask,
    BINNED,
  )
  bad = np.isnan(x) & mask
  assert float(state.non_finite) == bad.sum()
  np.testing.assert_array_equal(np.isfinite(grad), ~bad)
  np.testing.assert_array_equal(grad[~mask], 0)


def test_nan_and_inf_logits_harm_no_other(rng):
  x = rng.normal(size=20).astype(np.float32)
  y = (rng.uniform(size=20) < 0.5).astype(np.float32)
  x[3], x[7], y[7] = np.nan, np.inf, 1.0
  keep = np.arange(20) != 3
  losses, state = optax_ghm.sigmoid_ghm_loss_with_state(
    x, y, optax_ghm.WindowedDensity().init()
  )
  expected = optax_ghm.sigmoid_ghm_loss(x[keep], y[keep])
  np.testing.assert_allclose(losses[keep], expected, rtol=1e-6)
  assert losses[7] == 0
  assert np.isnan(losses[3]) and state.non_finite == 1


def test_infinite_logits_are_as_good_as_the_largest_number():
  x = jnp.array([-jnp.inf, jnp.inf, -jnp.inf, jnp.inf])
  y = jnp.array([0.0, 1.0, 1.0, 0.0])
  losses, state = optax_ghm.sigmoid_ghm_loss_with_state(
    x, y, BINNED.init(), density=BINNED
  )
  assert np.isfinite(losses).all() and state.non_finite == 0
  np.testing.assert_array_equal(losses[:2], [0, 0])
  _, grad, _ = loss_and_grad(
    optax_ghm.sigmoid_ghm_loss_with_state,
    x,
    y,
    BINNED.init(),
    jnp.ones(4, bool),
    BINNED,
  )
  np.testing.assert_allclose(4 * grad, [0, 0, -1, 1])


def test_softmax_labels_out_of_range_are_nan_unless_masked(rng):
  x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
  with_state = optax_ghm.softmax_ghm_loss_with_integer_labels_with_state
  start = BINNED.init()
  loss = functools.partial(with_state, state=start, density=BINNED)
  for bad in (-1, 3, 7):
    losses, state = loss(x, jnp.array([0, 1, bad, 2]))
    np.testing.assert_array_equal(np.isnan(losses), [0, 0, 1, 0])
    assert state.non_finite == 1
    mask = jnp.array([True, True, False, True])
    losses, state = loss(x, jnp.array([0, 1, bad, 2]), mask=mask)
    expected, _ = loss(x[np.array([0, 1, 3])], jnp.array([0, 1, 2]))
    np.testing.assert_allclose(losses[np.array([0, 1, 3])], expected)
    assert losses[2] == 0 and state.non_finite == 0


def test_masked_nan_is_nowhere(rng):
  y = jnp.array([0, 1, 2])
  x = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32).at[1].set(jnp.nan)
  mask = jnp.array([True, False, True])
  for loss in (
    optax_ghm.softmax_ghm_loss_with_integer_labels,
    optax_ghm.sigmoid_ghm_loss_with_integer_labels,
  ):
    grad = jax.grad(lambda x, loss=loss: loss(x, y, mask=mask).sum())(x)
    assert np.isfinite(grad).all() and (grad[1] == 0).all()
  grad = jax.grad(
    lambda x: optax_ghm.smooth_l1_ghm_loss(x[:, 0], y, mask=mask).sum()
  )(x)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize('sign', [-1.0, 1.0])
def test_saturated_logits_are_finite(sign):
  x = sign * jnp.array([300.0, -300.0, 300.0, 1e30])
  y = jnp.array([1.0, 1.0, 0.0, 0.0])
  losses, grad, _ = loss_and_grad(
    optax_ghm.sigmoid_ghm_loss_with_state,
    x,
    y,
    BINNED.init(),
    jnp.ones(4, bool),
    BINNED,
  )
  assert np.isfinite(losses) and np.isfinite(grad).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_computed_in_float32(dtype, rng):
  x = jnp.asarray(rng.normal(size=(64, 5)), dtype)
  y = jnp.asarray(rng.integers(0, 5, size=64))
  for loss in (
    optax_ghm.softmax_ghm_loss_with_integer_labels,
    optax_ghm.sigmoid_ghm_loss_with_integer_labels,
  ):
    losses = loss(x, y)
    expected = loss(x.astype(jnp.float32), y)
    assert losses.dtype == jnp.float32
    chex.assert_trees_all_equal(losses, expected)


def test_float16_gradients_are_not_flushed_to_zero():
  """Computed in float32, and rounded once, at the logits."""
  x = jnp.linspace(-4, 4, 60_000, dtype=jnp.float16)
  y = jnp.zeros(60_000)

  def mean(x):
    return optax_ghm.sigmoid_ghm_loss(x, y).mean()

  half = jax.grad(mean)(x)
  full = jax.grad(mean)(x.astype(jnp.float32))
  assert half.dtype == jnp.float16
  chex.assert_trees_all_equal(half, full.astype(jnp.float16))
  assert (half != 0).all()


def test_evaluation_never_touches_the_state(rng):
  density = optax_ghm.WindowedDensity(momentum=0.9)
  x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 4, size=16))
  loss = functools.partial(
    optax_ghm.softmax_ghm_loss_with_integer_labels_with_state, density=density
  )
  _, state = loss(x, y, density.init())
  losses, after = loss(x, y, state, train=False)
  chex.assert_trees_all_equal(after, state)
  alone, _ = loss(x[:1], y[:1], state, train=False)
  np.testing.assert_allclose(alone[0], losses[0], rtol=1e-6)


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    x = jnp.array([1e-9, 1.0], jnp.float64)
    losses, state = optax_ghm.sigmoid_ghm_loss_with_state(
      x, jnp.zeros(2), optax_ghm.WindowedDensity().init()
    )
    assert losses.dtype == jnp.float64
    assert state.histogram.dtype == jnp.float32
    weights, _ = optax_ghm.harmony_weights(jax.nn.sigmoid(x))
    np.testing.assert_allclose(
      losses,
      np.asarray(weights, np.float64) * np.log1p(np.exp(x)),
      rtol=1e-12,
    )


def test_wrong_arguments_are_named():
  x = jnp.ones((4, 3))
  with pytest.raises(TypeError, match='logits must be floating.*int32'):
    optax_ghm.sigmoid_ghm_loss(jnp.ones(3, jnp.int32), jnp.ones(3))
  with pytest.raises(ValueError, match=r'labels of shape \(5,\).*\(4, 3\)'):
    optax_ghm.sigmoid_ghm_loss(x, jnp.ones(5))
  with pytest.raises(ValueError, match=r'mask of shape \(5,\)'):
    optax_ghm.sigmoid_ghm_loss(x, x, mask=jnp.ones(5, bool))
  with pytest.raises(TypeError, match='mask must be bool.*as weights'):
    optax_ghm.sigmoid_ghm_loss(x, x, mask=jnp.ones(3))
  for loss in (
    optax_ghm.softmax_ghm_loss_with_integer_labels,
    optax_ghm.sigmoid_ghm_loss_with_integer_labels,
  ):
    with pytest.raises(TypeError, match='labels must be integers.*float32'):
      loss(x, jnp.ones(4))
    with pytest.raises(ValueError, match=r'labels of shape \(3,\).*\(4,\)'):
      loss(x, jnp.ones(3, jnp.int32))
  for mu in (0.0, np.float32(-1)):
    with pytest.raises(ValueError, match='mu'):
      optax_ghm.smooth_l1_ghm_loss(x, x, mu=mu)
  with pytest.raises(TypeError, match='predictions'):
    optax_ghm.smooth_l1_ghm_loss(jnp.ones(3, jnp.int32), jnp.ones(3))


LOSSES = {
  'sigmoid': (optax_ghm.sigmoid_ghm_loss, (4, 4), jnp.float32),
  'one_vs_rest': (
    optax_ghm.sigmoid_ghm_loss_with_integer_labels,
    (4,),
    jnp.int32,
  ),
  'softmax': (
    optax_ghm.softmax_ghm_loss_with_integer_labels,
    (4,),
    jnp.int32,
  ),
  'smooth_l1': (optax_ghm.smooth_l1_ghm_loss, (4, 4), jnp.float32),
}


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_is_that_with_a_fresh_state(name, rng):
  loss, shape, dtype = LOSSES[name]
  with_state = getattr(optax_ghm, f'{loss.__name__}_with_state')
  x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
  y = jnp.ones(shape, dtype)
  losses, _ = jax.jit(with_state)(x, y, optax_ghm.WindowedDensity().init())
  chex.assert_trees_all_close(jax.jit(loss)(x, y), losses, rtol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_a_momentum_needs_the_form_with_state(name):
  loss, shape, dtype = LOSSES[name]
  density = optax_ghm.WindowedDensity(momentum=0.9)
  with pytest.raises(ValueError, match='momentum=0.9.*_with_state'):
    loss(jnp.ones((4, 4)), jnp.ones(shape, dtype), density=density)


@pytest.mark.parametrize('name', LOSSES)
def test_weights_are_copies_of_examples(name, rng):
  """A weight of 2 has the loss and the density of the example given twice."""
  loss, shape, dtype = LOSSES[name]
  x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 2, size=shape), dtype)
  mask = jnp.array([True, True, True, False])
  weights = jnp.array([1.0, 2.0, 0.0, 5.0])
  if len(shape) > 1:
    mask, weights = mask[:, None], weights[:, None]

  @jax.jit
  def total(x):
    x = x.at[2:].set(jnp.nan)
    return loss(x, y, mask=mask, weights=weights).sum()

  twice = np.array([0, 1, 1])
  value, grad = jax.value_and_grad(total)(x)
  expected = jax.jit(lambda x, y: loss(x, y).sum())(x[twice], y[twice])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert (grad[2:] == 0).all()


def test_a_mask_that_could_mean_rows_or_columns_is_named():
  x, mask = jnp.ones((4, 4)), jnp.ones(4, bool)
  match = r'could mean.*mask\[:, None\] or mask\[None, :\]'
  for loss in (optax_ghm.sigmoid_ghm_loss, optax_ghm.smooth_l1_ghm_loss):
    with pytest.raises(ValueError, match=match):
      loss(x, x, mask=mask)
  # With integer labels a mask of their shape is one of examples.
  labels = jnp.arange(4)
  rows = optax_ghm.sigmoid_ghm_loss_with_integer_labels(
    x, labels, mask=mask.at[0].set(False)
  )
  assert (rows[0] == 0).all() and (rows[1:] > 0).all()
