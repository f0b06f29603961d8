"""Harmonizing the cotangents of any activation."""

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
from tests.support import (
  oracles_harmonization as oracles,
  strategies_arrays as arrays_of,
)
from tests.support.oracles_harmonization import Smooth, published

BINNED = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
RUNNING = optax_ghm.WindowedDensity(width=0.1, momentum=0.9)
CLASSIFICATION = [  # with one program each
  'ghmc_allignored',
  'ghmc_b10_m75_frac_s0',
  'ghmc_b30_m75_mask_s0',
  'ghmc_saturated',
]
cross_entropies = optax.softmax_cross_entropy_with_integer_labels


@functools.partial(jax.jit, static_argnames='density')
def golden_step(x, state, y, weight, density):
  valid = weight > 0

  def loss(x, state):
    x = optax_ghm.harmonize(
      x, state, weighting=published(density), axis=(), mask=valid
    )
    losses = optax.sigmoid_binary_cross_entropy(x, y)
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1)
    return jnp.where(valid, losses, 0.0).sum() / count

  state = density.init() if state is None else state
  grad, gradient_of_state = jax.grad(loss, argnums=(0, 1))(x, state)
  return grad, optax_ghm.overwrite_with_gradient(state, gradient_of_state)


@pytest.mark.device
@pytest.mark.parametrize('case', CLASSIFICATION)
def test_golden_numbers_before_a_plain_cross_entropy(case):
  data = golden.load(case)
  state = None
  for step in range(len(data['loss'])):
    grad, state = jax.device_get(
      golden_step(
        data['pred'][step],
        state,
        data['target'][step],
        data['label_weight'][step],
        golden.density(data),
      )
    )
    np.testing.assert_allclose(
      grad * float(data['loss_weight']),
      data['grad'][step],
      rtol=1e-5,
      # optax's own p - y, by log_sigmoid, is off by this much near 0 and 1
      atol=3e-7,
    )
    np.testing.assert_allclose(
      state.histogram, data['acc_sum'][step], rtol=1e-5
    )


@jax.jit(static_argnames=('axis', 'reduction'))
def harmonized(x, dy, mask, axis, reduction):
  def harmonize(x, state):
    return optax_ghm.harmonize(
      x,
      state,
      weighting=published(Smooth(high=1e30)),
      axis=axis,
      reduction=reduction,
      mask=mask,
    )

  y, vjp = jax.vjp(harmonize, x, Smooth().init())
  return y, *vjp(dy)


@pytest.mark.device
@given(
  case=st.sampled_from(
    [
      (jnp.float16, (3, 2), None, 'mean'),
      (jnp.bfloat16, (), (), 0.5),
      (jnp.float32, (2, 1, 3, 1, 2, 1), (0, -1), 'mean'),
      (jnp.complex64, (4, 2), 1, 2.0),
      (jnp.float32, (0, 3), None, 'mean'),
      (jnp.float64, (3, 2), (), 'mean'),
    ]
  ),
  data=st.data(),
)
def test_cotangents_are_weighed_by_their_norms(case, data):
  dtype, shape, axis, reduction = case
  real = jnp.finfo(dtype).dtype
  axes = range(1, len(shape)) if axis is None else np.atleast_1d(axis)
  axes = tuple(int(a) % max(len(shape), 1) for a in axes)
  examples = tuple(n for a, n in enumerate(shape) if a not in axes)
  ordinary = st.integers(-64, 64).map(lambda n: n / 16)
  bad = st.sampled_from([np.nan, np.inf, 0.0])
  dy = data.draw(arrays_of.arrays(real, shape, ordinary | bad)).astype(dtype)
  if dtype == jnp.complex64:
    dy = dy * np.complex64(0.6 + 0.8j)
  mask = data.draw(hnp.arrays(bool, examples))
  with arrays_of.x64(real):
    x = np.ones(shape, dtype)
    y, dx, state = jax.device_get(harmonized(x, dy, mask, axis, reduction))
  np.testing.assert_array_equal(y, x)
  assert dx.dtype == dtype
  wide = np.asarray(dy, np.complex128)
  with np.errstate(invalid='ignore'):
    norms = np.sqrt((np.abs(wide) ** 2).sum(axes))
  g = np.where(mask, norms, 0) * (
    mask.sum() if reduction == 'mean' else reduction
  )
  valid = mask & np.isfinite(g)
  weights = np.expand_dims(oracles.harmony_of(g, 1.0 * mask), axes)
  valid, mask = (np.expand_dims(u, axes) for u in (valid, mask))
  sound = np.broadcast_to(valid | ~mask, shape)
  expected = weights * np.where(valid, wide, 0)
  dx = np.asarray(dx, np.complex128)
  rtol = max(arrays_of.rounding(real), arrays_of.rounding(jnp.float32))
  np.testing.assert_allclose(dx[sound], expected[sound], rtol=rtol, atol=rtol)
  assert np.isnan(dx[~sound & ~np.isfinite(wide)]).all()  # it shows
  assert float(state.non_finite) == (mask & ~valid).sum()


@pytest.mark.device
def test_law_the_gradient_is_that_of_the_loss(rng):
  """However the loss is reduced, if ``reduction`` says so."""
  x = 2 * rng.normal(size=(50, 4)).astype(np.float32)
  y = rng.uniform(size=(50, 4)).astype(np.float32)
  mask = np.arange(50)[:, None] < 30

  @jax.jit
  def grads(x, seven):
    def before(reduction, divisor):
      def loss(x):
        x = optax_ghm.harmonize(
          x,
          weighting=published(Smooth()),
          axis=(),
          reduction=reduction,
          mask=mask,
        )
        losses = optax.sigmoid_binary_cross_entropy(x, y)
        return jnp.where(mask, losses, 0).sum() / divisor

      return divisor * jax.grad(loss)(x)

    def ghm(x):
      losses = optax_ghm.sigmoid_ghm_loss(
        x, y, weighting=published(Smooth()), mask=mask
      )
      return losses.sum()

    reductions = before('mean', 120), before('sum', 1), before(seven, seven)
    return jax.grad(ghm)(x), *reductions

  expected, *found = grads(x, np.float32(7))
  for grad in found:
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_forward_is_bit_for_bit_the_input(dtype):
  x = np.array([-0.0, np.inf, -np.inf, np.nan, 1e-7, 3.0]).astype(dtype)

  @jax.jit
  def both(x):
    harmonize = functools.partial(optax_ghm.harmonize, reduction='sum')
    return harmonize(x), jax.grad(lambda x: harmonize(x).sum())(x)

  y, grad = jax.device_get(both(x))
  assert y.dtype == grad.dtype == dtype
  assert y.tobytes() == x.tobytes()


def step(x, state, y, axis_name=None, wrap=lambda f: f):
  def loss(x, state):
    x = wrap(
      lambda x, state: optax_ghm.harmonize(
        x, state, weighting=published(RUNNING), axis=(), axis_name=axis_name
      )
    )(x, state)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(x, y)) / 24

  return jax.grad(loss, argnums=(0, 1))(x, state)


def test_under_the_transformations_of_jax(rng):
  """Scan and vmap see batch after batch; a named vmap is one batch."""

  @jax.jit
  def transformed(x, y):
    state, after = RUNNING.init(), RUNNING.init()
    one_by_one = []
    for i in range(3):
      grad, after = step(x[i], after, y[i])
      one_by_one.append((grad, after))

    def scanned(state, batch):
      grad, state = step(batch[0], state, batch[1])
      return state, (grad, state)

    def mapped(x, y, axis_name=None):
      own = functools.partial(step, state=state, axis_name=axis_name)
      return jax.vmap(lambda x, y: own(x, y=y), axis_name='i')(x, y)

    grads, states = mapped(x[0].reshape(3, 8), y[0].reshape(3, 8), 'i')
    first = one_by_one[0]
    return {
      'remat': (step(x[0], state, y[0], wrap=jax.checkpoint), first),
      'vmap': (jax.tree.map(lambda u: u[0], mapped(x, y)), first),
      'named vmap': (
        (grads.ravel(), jax.tree.map(lambda u: u[0], states)),
        first,
      ),
      'scan': (
        jax.lax.scan(scanned, state, (x, y))[1],
        jax.tree.map(lambda *u: jnp.stack(u), *one_by_one),
      ),
    }

  x = rng.normal(size=(3, 24)).astype(np.float32)
  y = (rng.uniform(size=(3, 24)) < 0.3).astype(np.float32)
  for found, expected in jax.device_get(transformed(x, y)).values():
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_a_gradient_keeps_the_rule():
  @jax.jit
  def both(x):
    def penalty(x, enabled):
      def inner(x):
        x = optax_ghm.harmonize(x, axis=(), reduction='sum', enabled=enabled)
        return jnp.sum(x**2 / 4)

      return jnp.sum(jax.grad(inner)(x) ** 2)

    return jax.grad(penalty)(x, True), jax.grad(penalty)(x, False)

  x = np.float32([0.3, 0.3, 0.3, -2.0])
  harmonized, plain = both(x)
  np.testing.assert_allclose(plain, x / 2, rtol=1e-6)
  assert not np.allclose(harmonized, plain)


def test_forward_mode_needs_it_disabled():
  x = np.ones(3, np.float32)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(optax_ghm.harmonize, (x,), (x,))
  disabled = functools.partial(optax_ghm.harmonize, enabled=False)
  _, tangent = jax.jvp(disabled, (x,), (2 * x,))
  np.testing.assert_array_equal(tangent, 2 * x)


def test_a_state_used_twice_averages_and_one_unused_stays():
  @jax.jit
  def states(*cotangents):
    def gradient(state, *cotangents):
      def loss(state):
        used = [
          jnp.sum(
            c
            * optax_ghm.harmonize(
              jnp.ones(3),
              state,
              weighting=published(BINNED),
              axis=(),
              reduction='sum',
            )
          )
          for c in cotangents
        ]
        return sum(used, 0.0 * jnp.sum(state.calls))

      return jax.grad(loss)(state)

    start = BINNED.init()
    both = gradient(start, *cotangents)
    after = optax_ghm.overwrite_with_gradient(start, both)
    unused = gradient(after)
    kept = optax_ghm.overwrite_with_gradient(after, unused)
    return both, unused, (after, kept), BINNED.update(jnp.zeros(0), after)[1]

  both, unused, (after, kept), read = jax.device_get(
    states(np.float32([0.1, 0.1, 0.6]), np.float32([0.9, 0.9, 0.9]))
  )
  assert both.calls == 2 and unused.calls == 0
  np.testing.assert_allclose(read.histogram / read.evidence, [1, 0, 0.5, 1.5])
  chex.assert_trees_all_equal(kept, after)


def test_examples_that_share_a_state_under_vmap_carry_the_mean():
  def each(row, state):
    x = optax_ghm.harmonize(
      row, state, weighting=published(BINNED), reduction='sum'
    )
    return jnp.sum(jnp.square(x)) / 8

  @jax.jit
  def steps(rows):
    def loop(rows, state):
      return sum(each(row, state) for row in rows)

    def mapped(rows, state):
      return jnp.sum(jax.vmap(each, (0, None))(rows, state))

    found = []
    for loss in (loop, mapped):
      states = [BINNED.init()]
      for _ in range(3):
        states.append(jax.grad(loss, argnums=1)(rows, states[-1]))
      found.append(states)
    return found

  rows = np.linspace(0.1, 2.0, 12, dtype=np.float32).reshape(4, 3)
  chex.assert_trees_all_close(*steps(rows), rtol=1e-6)


def test_wrong_arguments_are_named():
  x = np.ones((4, 3), np.float32)
  mask = np.ones(3, bool)
  other = jax.eval_shape(BINNED.init)
  for error, match, given_, options in (
    (TypeError, 'x must be floating.*int32', np.ones(3, np.int32), {}),
    (ValueError, r'mask of shape \(3,\).*\(4,\)', x, {'mask': mask}),
    (ValueError, 'axis', x, {'axis': 2}),
    (
      ValueError,
      "'mean', 'sum' or a number, got 'none'",
      x,
      {'reduction': 'none'},
    ),
    (ValueError, 'reduction must be above 0, got 0', x, {'reduction': 0}),
    (ValueError, 'momentum=0.9.*state', x, {'weighting': published(RUNNING)}),
  ):
    with pytest.raises(error, match=match):
      optax_ghm.harmonize(given_, **options)
  with pytest.raises(ValueError, match='state must come'):
    jax.eval_shape(
      jax.grad(lambda x, state: optax_ghm.harmonize(x, state).sum()), x, other
    )


# Before the logits of a softmax, by default.


@pytest.mark.device
def test_traps_norms_of_softmax_reach_beyond_one():
  """Hard and harder examples, whose norms of p - y are 1.1 and 1.38.

  With norms in [0, 1] only, both would share the last region. A summed loss
  that is taken for a mean shows in the next state.
  """
  margins = np.float32([1.25] * 90 + [3.7] * 10)

  @jax.jit
  def cotangents(margins):
    x = jnp.stack([jnp.zeros_like(margins), margins], -1)
    state = optax_ghm.WindowedDensity().init()
    labels = jnp.zeros(len(margins), jnp.int32)

    def loss(x, state, reduction, reduce):
      x = optax_ghm.harmonize(
        x, state, weighting=published(), reduction=reduction
      )
      return reduce(cross_entropies(x, labels))

    grad = jax.grad(loss, (0, 1))
    return [
      grad(x, state, reduction, reduce)
      for reduction, reduce in (
        ('mean', jnp.mean),
        ('sum', jnp.sum),
        ('mean', jnp.sum),
      )
    ]

  mean, total, wrong = jax.device_get(cotangents(margins))
  p = 1 / (1 + np.exp(margins))
  for (grad, state), count in ((mean, 100), (total, 1)):
    weights = count * grad[:, 0] / (p - 1)
    assert weights[-1] > 5 * weights[0] > 0 and state.above_range == 0
  assert wrong[1].above_range == 100


@pytest.mark.device
def test_two_softmax_classes_are_harmonized_as_one_sigmoid(rng):
  y = rng.integers(0, 2, size=50)

  @jax.jit
  def grads(x):
    def binary(x):
      x = optax_ghm.harmonize(x)
      return optax.sigmoid_binary_cross_entropy(x, np.float32(y)).mean()

    def multi(x):
      x = optax_ghm.harmonize(jnp.stack([jnp.zeros_like(x), x], -1))
      return cross_entropies(x, y).mean()

    return jax.grad(multi)(x), jax.grad(binary)(x)

  multi, binary = grads(3 * rng.normal(size=50).astype(np.float32))
  np.testing.assert_allclose(multi, binary, rtol=1e-2, atol=1e-6)


@pytest.mark.device
def test_weights_multiply_the_cotangent_and_count_in_the_density(rng):
  x = rng.normal(size=(6, 3)).astype(np.float32)
  y = rng.integers(0, 3, size=6)
  weights = np.float32([1.0, 2.0, 0.0, 1.0, 3.0, 0.5])
  _, error, _ = oracles.softmax(x.astype(float), y)

  @jax.jit
  def grads(x, norms):
    def loss(x, weights):
      x = optax_ghm.harmonize(x, weighting=published(), weights=weights)
      return cross_entropies(x, y).mean()

    density = optax_ghm.WindowedDensity(high=2**0.5, width=0.1 * 2**0.5)
    return [
      (
        jax.grad(loss)(x, w),
        optax_ghm.harmony_weights(
          norms, weighting=published(density), weights=w
        )[0],
      )
      for w in (None, weights)
    ]

  norms = np.linalg.norm(error, axis=-1).astype(np.float32)
  for grad, harmony in grads(x, norms):
    expected = np.asarray(harmony)[:, None] * error / 6
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)
