"""The losses: golden numbers, derivatives, and how their forms agree."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from tests import golden
from tests.support import oracles_harmonization as oracles
from tests.support.oracles_harmonization import published

BINNED = optax_ghm.BinnedDensity(bins=10)
LOSSES = {  # with the shape and the dtype of their targets for x of (4, 4)
  'sigmoid_ghm_loss': ((4, 4), np.float32),
  'smooth_l1_ghm_loss': ((4, 4), np.float32),
  'sigmoid_ghm_loss_with_integer_labels': ((4,), np.int32),
  'softmax_ghm_loss_with_integer_labels': ((4,), np.int32),
}


def loss_of(name, suffix=''):
  return getattr(optax_ghm, name + suffix)


def targets_of(name):
  shape, dtype = LOSSES[name]
  return np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 2


@functools.partial(jax.jit, static_argnames=('loss', 'density', 'mu'))
def loss_and_grad(loss, x, targets, state, mask, density, **kwargs):
  """Sum of the losses over the number that count, its gradient, the state."""

  def total(x):
    losses, new_state = loss(
      x, targets, state, mask=mask, weighting=published(density), **kwargs
    )
    count = jnp.maximum(mask.sum(dtype=jnp.float32), 1)
    return losses.sum() / count, new_state

  (value, state), grad = jax.value_and_grad(total, has_aux=True)(x)
  return value, grad, state


@pytest.mark.device
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
  state = jax.tree.map(
    lambda u: np.zeros(u.shape, u.dtype), jax.eval_shape(density.init)
  )
  scale = float(data['loss_weight'])
  for step in range(len(data['loss'])):
    value, grad, state = jax.device_get(
      loss_and_grad(
        loss,
        data['pred'][step],
        data['target'][step],
        state,
        data['label_weight'][step] > 0,
        density,
        **kwargs,
      )
    )
    for found, expected, atol in (
      (scale * value, data['loss'], 1e-12),
      (scale * grad, data['grad'], 1e-9),
      (state.histogram, data['acc_sum'], 0),
    ):
      np.testing.assert_allclose(found, expected[step], rtol=1e-5, atol=atol)


@pytest.mark.device
def test_labels_have_a_gradient_and_second_derivatives_are_right():
  x, y = np.float32([0.0, -2.0, 3.0]), np.float32([0.2, 0.0, 1.0])

  def loss(x, y):
    return optax_ghm.sigmoid_ghm_loss(
      x, y, weighting=published(oracles.Smooth())
    ).sum()

  @jax.jit
  def derivatives(x, y):
    _, tangent = jax.jvp(lambda x: loss(x, y), (x,), (jnp.ones(3),))
    infinite = jnp.where(y == 0.2, jnp.inf, x)
    return (
      jax.grad(loss, 1)(x, y),
      jax.hessian(loss)(x, y),
      tangent,
      jax.grad(loss, 1)(infinite, y),
    )

  of_labels, hessian, tangent, of_infinity = derivatives(x, y)
  _, error, g = oracles.sigmoid(x.astype(float), y.astype(float))
  p, weights = error + y, oracles.harmony_of(g, np.ones(3))
  np.testing.assert_allclose(of_labels, -weights * x, rtol=1e-5)
  np.testing.assert_allclose(
    hessian, np.diag(weights * p * (1 - p)), rtol=1e-5, atol=1e-9
  )
  np.testing.assert_allclose(tangent, (weights * error).sum(), rtol=1e-5)
  assert np.isfinite(of_infinity).all() and of_infinity[0] < -1e38


@pytest.mark.device
def test_integer_labels_have_a_background():
  logits = np.float32([[2.0, -1.0], [0.5, 0.5], [-3.0, 1.0]])
  labels, mask = np.int32([1, 2, -1]), np.array([True, False, True])

  @jax.jit
  def pairs(x):
    one_hot = np.float32([[0, 1], [0, 0], [0, 0]])
    by_labels = optax_ghm.sigmoid_ghm_loss_with_integer_labels
    return (
      (by_labels(x, labels), optax_ghm.sigmoid_ghm_loss(x, one_hot)),
      (
        by_labels(x, labels, mask=mask),
        optax_ghm.sigmoid_ghm_loss(x, one_hot, mask=mask[:, None]),
      ),
    )

  for found, expected in pairs(logits):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.device
def test_two_softmax_classes_are_the_binary_loss(rng):
  @jax.jit
  def both(x, y):
    start = optax_ghm.WindowedDensity().init()
    one, two = 'sigmoid_ghm_loss', 'softmax_ghm_loss_with_integer_labels'
    pair = jnp.stack([jnp.zeros_like(x), x], -1)
    return (
      loss_of(one, '_with_state')(x, y, start),
      loss_of(two, '_with_state')(pair, y, start),
    )

  x = 3 * rng.normal(size=50).astype(np.float32)
  found = both(x, rng.integers(0, 2, size=50))
  (binary, state), (multi, multi_state) = jax.device_get(found)
  np.testing.assert_allclose(multi, binary, rtol=1e-4, atol=1e-6)
  # The norms agree to rounding: at most a few fall in a neighboring cell.
  assert np.abs(multi_state.histogram - state.histogram).sum() <= 4


@pytest.mark.device
def test_smooth_l1_has_its_formula_by_default_and_no_overflow():
  """It is precise near 0, too."""
  d = np.float32([0.0, 1e-6, 1e-5, 1e-4, 0.03, -1e3, 1e30, -3e38])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def values(d):
    losses = optax_ghm.smooth_l1_ghm_loss(
      d, jnp.zeros_like(d), weighting=published(oracles.Smooth())
    )
    return losses.sum(), losses

  (_, losses), grad = values(d)
  loss, error, g = oracles.smooth_l1(d.astype(float), 0.0, mu=0.1)
  weights = oracles.harmony_of(g, np.ones(len(d)))
  np.testing.assert_allclose(losses, weights * loss, rtol=1e-5)
  np.testing.assert_allclose(grad, weights * error, rtol=1e-5)


def test_float16_gradients_are_not_flushed_to_zero():
  """Computed in float32, and rounded once, at the logits."""
  x = np.linspace(-4, 4, 60_000).astype(np.float16)

  @jax.jit
  def grads(x):
    def mean(x):
      return optax_ghm.sigmoid_ghm_loss(x, jnp.zeros(x.shape)).mean()

    return jax.grad(mean)(x), jax.grad(mean)(x.astype(jnp.float32))

  half, full = jax.device_get(grads(x))
  assert half.dtype == np.float16
  # The same numbers in another program: to the last place.
  np.testing.assert_allclose(half, full.astype(np.float16), rtol=1e-3)
  assert (half != 0).all()


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    x = np.array([1e-9, 1.0])

    @jax.jit
    def values(x):
      density = optax_ghm.WindowedDensity()
      return (
        optax_ghm.sigmoid_ghm_loss_with_state(x, jnp.zeros(2), density.init()),
        optax_ghm.harmony_weights(jax.nn.sigmoid(x))[0],
      )

    (losses, state), weights = values(x)
  assert losses.dtype == np.float64 and state.histogram.dtype == np.float32
  expected = np.asarray(weights, np.float64) * np.log1p(np.exp(x))
  np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.device
def test_every_loss_has_a_form_with_a_state(rng):
  """Of a fresh state, it is the plain loss; in evaluation, it keeps it."""
  density = optax_ghm.WindowedDensity(momentum=0.9)

  @jax.jit
  def all_forms(x):
    found = {}
    for name in LOSSES:
      y, with_state = targets_of(name), loss_of(name, '_with_state')
      fresh, _ = with_state(x, y, optax_ghm.WindowedDensity().init())
      _, state = with_state(x, y, density.init(), weighting=published(density))
      evaluate = functools.partial(
        with_state, state=state, weighting=published(density), train=False
      )
      (together, after), (alone, _) = evaluate(x, y), evaluate(x[:1], y[:1])
      found[name] = (
        (loss_of(name)(x, y), fresh),
        (after, state),
        (alone, together[:1]),
      )
    return found

  x = rng.normal(size=(4, 4)).astype(np.float32)
  for pairs in jax.device_get(all_forms(x)).values():
    for actual, expected in pairs:
      chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.device
def test_weights_are_copies_of_examples(rng):
  """A weight of 2 has the loss and the density of the example given twice."""
  mask = np.array([True, True, True, False])
  weights = np.float32([1.0, 2.0, 0.0, 5.0])

  @jax.jit
  def all_values(x):
    bad, twice = x.at[2:].set(jnp.nan), np.array([0, 1, 1])
    found = {}
    for name, (shape, _) in LOSSES.items():
      y = targets_of(name)
      who = [u[:, None] if len(shape) > 1 else u for u in (mask, weights)]

      def total(x, name=name, y=y, who=who):
        return loss_of(name)(x, y, mask=who[0], weights=who[1]).sum()

      expected = loss_of(name)(x[twice], y[twice]).sum()
      found[name] = *jax.value_and_grad(total)(bad), expected
    return found

  x = rng.normal(size=(4, 4)).astype(np.float32)
  for value, grad, expected in jax.device_get(all_values(x)).values():
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert (grad[2:] == 0).all() and (grad[:2] != 0).any()


@pytest.mark.parametrize('name', LOSSES)
def test_a_momentum_needs_the_form_with_state(name):
  density = optax_ghm.WindowedDensity(momentum=0.9)
  with pytest.raises(ValueError, match='momentum=0.9.*_with_state'):
    jax.eval_shape(
      lambda x: loss_of(name)(
        x, targets_of(name), weighting=published(density)
      ),
      np.ones((4, 4), np.float32),
    )


@pytest.mark.parametrize('name', LOSSES)
def test_a_density_is_no_weighting(name):
  x, state = np.ones((4, 4), np.float32), optax_ghm.WindowedDensity().init()
  with_state = functools.partial(loss_of(name, '_with_state'), state=state)
  for loss in (loss_of(name), with_state):
    with pytest.raises(TypeError, match='weighting must .*, got Binned'):
      jax.eval_shape(
        functools.partial(loss, weighting=optax_ghm.BinnedDensity()),
        x,
        targets_of(name),
      )


def test_wrong_arguments_are_named():
  x = np.ones((4, 3), np.float32)
  square, ones, mask = np.ones((4, 4), 'f'), np.ones(5, 'f'), np.ones(5, bool)
  integers = np.ones(3, np.int32)
  ambiguous = r'could mean.*mask\[:, None\] or mask\[None, :\]'
  sigmoid, smooth_l1, *by_labels = map(loss_of, LOSSES)
  for error, match, loss, args, options in (
    (TypeError, 'logits must be floating.*int32', sigmoid, [integers] * 2, {}),
    (ValueError, r'labels of shape \(5,\).*\(4, 3\)', sigmoid, (x, ones), {}),
    (ValueError, r'mask of shape \(5,\)', sigmoid, (x, x), {'mask': mask}),
    (TypeError, 'mask must be bool.*weights', sigmoid, (x, x), {'mask': ones}),
    (TypeError, 'predictions', smooth_l1, (integers, ones[:3]), {}),
    (ValueError, 'mu', smooth_l1, (x, x), {'mu': 0.0}),
    (ValueError, 'mu', smooth_l1, (x, x), {'mu': np.float32(-1)}),
    *(
      (ValueError, ambiguous, f, (square, square), {'mask': mask[:4]})
      for f in (sigmoid, smooth_l1)
    ),
    *(
      case
      for f in by_labels
      for case in (
        (TypeError, 'labels must be integers.*f', f, (x, ones[:4]), {}),
        (
          ValueError,
          r'labels of shape \(3,\).*\(4,\)',
          f,
          (x, integers),
          {},
        ),
        (
          ValueError,
          r'mask of shape \(3,\) does not .*examples of shape \(4,\)',
          f,
          (x, ones[:4].astype(int)),
          {'mask': mask[:3]},
        ),
      )
    ),
  ):
    with pytest.raises(error, match=match):
      jax.eval_shape(functools.partial(loss, *args, **options))


def test_with_integer_labels_a_mask_of_their_shape_is_one_of_examples():
  mask = np.array([False, True, True, True])
  rows = jax.jit(
    lambda x: optax_ghm.sigmoid_ghm_loss_with_integer_labels(
      x, np.arange(4), mask=mask
    )
  )(np.ones((4, 4), np.float32))
  np.testing.assert_array_equal(np.asarray(rows) > 0, [[m] * 4 for m in mask])
