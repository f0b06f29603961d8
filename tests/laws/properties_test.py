"""What every transformation owes whatever gradients come."""

import functools
import operator

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import flow, harmonization
from tests.support.registry import ENTRIES
from tests.support.strategies_trees import (
  BEYOND,
  FLOAT64,
  MIXED,
  NOT_SMALL,
  RANGE,
  STRUCTURES,
  batched,
  is_inexact,
  trees,
  types,
  wide,
)

PASS_BAD_NUMBERS = {
  'reference_trace',
  'standardize',
  'centralize',
  'watch',
}
"""Their docstrings say that bad numbers pass."""

DISTINCT = {
  'clip_by_norm_of_groups',
  'noise_scale_aggregate',
  'normalize_by_norm_of_units',
  'skip_spikes',
  'standardize',
  'watch',
}
"""Together these have all the code that looks at leaves and their numbers."""
UNJITTED = {
  'clip_by_norm_of_groups',
  'normalize_by_norm_of_units',
  'standardize',
  'watch',
}
"""A few, since every operation is compiled by itself."""

parametrize = functools.partial(
  pytest.mark.parametrize, ids=operator.attrgetter('name')
)
every = parametrize('entry', ENTRIES[1:])  # the first is Optax's own
EXAMPLES = hypothesis.settings().max_examples
distinct = parametrize('entry', [e for e in ENTRIES if e.name in DISTINCT])
few = hypothesis.settings(max_examples=max(EXAMPLES // 5, 3))
fewest = hypothesis.settings(max_examples=max(EXAMPLES // 25, 2))


@functools.cache
def jitted(entry):
  return jax.jit(entry.tx.update)


@st.composite
def runs(draw, entry, structure, exponents=BEYOND, bad=False, steps=3):
  """Parameters, and the gradients of a few steps."""
  of_gradients = batched(structure) if entry.per_example else structure
  gradients = [
    draw(trees(of_gradients, exponents, bad=bad)) for _ in range(steps)
  ]
  return draw(trees(structure, exponents)), gradients


def run(entry, params, gradients, update=None):
  """The updates of every step, and the state at the end."""
  update = jitted(entry) if update is None else update
  state, every_update = entry.tx.init(params), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    every_update.append(updates)
  return every_update, state


def assert_finite(tree):
  for leaf in jax.tree.leaves(tree):
    if is_inexact(leaf):
      assert np.isfinite(np.asarray(leaf, np.complex128)).all(), tree


def assert_no_nan(tree):
  """Infinite is what is not known yet, and what float32 does not hold."""
  for leaf in jax.tree.leaves(tree):
    assert not np.isnan(np.asarray(leaf, np.complex128)).any(), tree


def assert_same_types(entry, params, gradients, updates, state):
  """Those of the parameters; what has no gradient passes as it came."""
  expected = jax.tree.map(
    lambda p, g: p if is_inexact(p) else g, params, gradients
  )
  assert types(updates) == types(expected)
  assert types(state) == types(entry.tx.init(params))


@every
def test_finite_gradients(entry):
  @few
  @given(runs(entry, MIXED))
  def law(of_run):
    params, gradients = of_run
    updates, state = run(entry, params, gradients)
    assert_finite(updates)
    assert_no_nan(state)
    assert_same_types(entry, params, gradients[-1], updates[-1], state)

  law()


@parametrize('entry', [e for e in ENTRIES if e.name not in PASS_BAD_NUMBERS])
def test_bad_numbers(entry):
  @few
  @given(runs(entry, MIXED, bad=True))
  def law(of_run):
    updates, state = run(entry, *of_run)
    assert_finite(updates)
    assert_no_nan(state)

  law()


@parametrize('entry', [e for e in ENTRIES if e.name in UNJITTED])
def test_numpy_arrays_without_jit(entry):
  @fewest
  @given(runs(entry, MIXED, (0,), steps=1))
  def law(of_run):
    params, gradients = of_run
    updates, state = run(entry, params, gradients, entry.tx.update)
    expected, expected_state = run(entry, params, gradients)
    assert_same_types(entry, params, gradients[0], updates[0], state)
    chex.assert_trees_all_close(
      *(wide(tree) for tree in (updates, expected)), rtol=1e-2, atol=1e-6
    )
    chex.assert_trees_all_close(
      *(wide(tree) for tree in (state, expected_state)), rtol=1e-4, atol=1e-4
    )

  law()


@distinct
def test_float64(entry):
  @few
  @given(runs(entry, FLOAT64))
  def law(of_run):
    params, gradients = of_run
    with jax.enable_x64(True):
      updates, state = run(entry, params, gradients)
      assert_finite(updates)
      assert_no_nan(state)
      assert_same_types(entry, params, gradients[-1], updates[-1], state)

  law()


# The noise of gradients, and averages of them.


def squares_of_examples(tree):
  """Of the norm of every example."""
  return sum(
    np.sum(np.abs(x) ** 2, tuple(range(1, x.ndim))) for x in wide(tree)
  )


def noise_by_hand(squares, square_of_mean, batch_size):
  k = len(squares)
  signal = (k * square_of_mean - squares.mean()) / (k - 1)
  variance = batch_size * k / (k - 1) * (squares.mean() - square_of_mean)
  return signal, variance


@given(
  norms=hnp.arrays(
    np.float32, st.integers(2, 5), elements=st.floats(0, 8, width=16)
  ),
  of_mean=st.floats(0, 8, width=16),
  batch_size=st.sampled_from([1, 64]),
  power=st.sampled_from([0, 50, -50]),
)
def test_gradient_noise(norms, of_mean, batch_size, power):
  """Signal and variance are squares of the scale, and their ratio has none."""
  norms, of_mean = np.ldexp(norms, power), np.ldexp(np.float32(of_mean), power)
  noise = optax_ghm.calibration.gradient_noise(norms, of_mean, batch_size)
  signal, variance = noise_by_hand(
    np.float64(norms) ** 2, np.float64(of_mean) ** 2, batch_size
  )
  largest = float(max(norms.max(), of_mean, 1e-15)) ** 2
  options = {'rtol': 1e-5, 'atol': 1e-5 * largest}
  np.testing.assert_allclose(noise.signal, signal, **options)
  options['atol'] *= batch_size
  np.testing.assert_allclose(noise.variance, variance, **options)
  if signal > 1e-3 * largest:
    ratio = variance / signal
    np.testing.assert_allclose(
      noise.noise_scale, ratio, rtol=0.1, atol=0.1 * batch_size
    )
  elif signal < -1e-3 * largest:
    assert noise.noise_scale == np.inf


NESTED = STRUCTURES['nested']
PER_EXAMPLE = batched(NESTED, 4)


@functools.cache
def aggregated(name):
  tx = {
    'noise': optax_ghm.noise_scale_aggregate(2, decay=0.5),
    'harmony': optax_ghm.harmonized_aggregate(),
  }[name]
  return jax.jit(
    lambda tree, mask: tx.update(tree, tx.init(None), None, mask=mask)
  )


MASKS = hnp.arrays(bool, 4)


@given(tree=trees(PER_EXAMPLE, (0, 0.3, -0.3), bad=True), mask=MASKS)
def test_noise_scale_aggregate(tree, mask):
  updates, state = aggregated('noise')(tree, mask)
  good = mask & np.isfinite(squares_of_examples(tree))
  kept = [x[good] for x in wide(tree)]
  count = max(good.sum(), 1)
  for u, x in zip(wide(updates), kept, strict=True):
    size = np.abs(x).max(initial=0)
    np.testing.assert_allclose(
      u, x.sum(0) / count, rtol=1e-5, atol=1e-6 * size + 1e-37
    )
  assert int(state.recorded) == (good.sum() > 1)
  if good.sum() > 1:
    squares = squares_of_examples(kept)
    of_mean = sum(np.sum(np.square(x.mean(0))) for x in kept)
    expected = noise_by_hand(squares, of_mean, 2)
    np.testing.assert_allclose(
      state.noise, expected, rtol=1e-4, atol=1e-5 * squares.max() + 1e-37
    )


@functools.cache
def weighed():
  density = harmonization.PARAMETER_DENSITY
  return jax.jit(
    lambda norms, mask: optax_ghm.harmony_weights(
      norms, density.init(), density=density, mask=mask
    )[0]
  )


@given(tree=trees(PER_EXAMPLE, (0, 0.1, -0.1), bad=True), mask=MASKS)
def test_harmonized_aggregate(tree, mask):
  """The mean of the examples, each times the harmony of its norm."""
  updates, _ = aggregated('harmony')(tree, mask)
  norms = np.sqrt(squares_of_examples(tree)).astype(np.float32)
  weights = np.float64(weighed()(norms, mask))
  good = mask & np.isfinite(norms)
  for u, x in zip(wide(updates), wide(tree), strict=True):
    each = np.where(good, weights, 0).reshape(-1, *[1] * (x.ndim - 1))
    x = np.where(each > 0, x, 0)  # noqa: PLW2901
    expected = (each * x).sum(0) / max(good.sum(), 1)
    size = np.abs(each * x).max(initial=0)
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-5 * size)


# What wraps an optimizer.


@functools.cache
def watched():
  tx = flow.watch(optax.identity())
  return jax.jit(lambda g, p: tx.update(g, tx.init(p), p))


@given(trees(STRUCTURES['mixed'], bad=True), trees(STRUCTURES['mixed'], RANGE))
@example(
  jax.tree.map(
    lambda x: np.full(x.shape, 1e-39).astype(x.dtype), STRUCTURES['mixed']
  ),
  jax.tree.map(
    lambda x: np.full(x.shape, 1e-39).astype(x.dtype), STRUCTURES['mixed']
  ),
)
def test_watch(gradients, params):
  updates, state = watched()(gradients, params)
  for i, (g, u, p) in enumerate(
    zip(wide(gradients), wide(updates), wide(params), strict=True)
  ):
    tiny = float(np.finfo(np.float32).tiny)
    options = {'rtol': 1e-5, 'atol': 2 * tiny * np.sqrt(g.size)}
    with np.errstate(invalid='ignore'):
      norms = [np.sqrt(np.sum(np.abs(x) ** 2)) for x in (g, u, p)]
    expected = norms[0]
    if np.isinf(np.abs(g)).any() and not np.isnan(g).any():
      expected = np.inf
    np.testing.assert_allclose(state.gradient_norm[i], expected, **options)
    np.testing.assert_allclose(state.parameter_norm[i], norms[2], **options)
    if 1e-18 < norms[1] < 1e18:  # whose squares float32 holds
      np.testing.assert_allclose(state.update_norm[i], norms[1], rtol=1e-5)
    assert float(state.elements[i]) == g.size
    # Subnormal numbers are 0, or not.
    zeros = float(state.zeros[i])
    assert np.sum(g == 0) <= zeros <= np.sum(np.abs(g) < tiny)
    assert float(state.non_finite[i]) == np.sum(~np.isfinite(g))


@functools.cache
def stepping(name):
  inner = optax.sgd(1.0, momentum=0.5)
  clip = optax_ghm.clip_by_norm(1.0)
  tx = {
    'calibrated': optax_ghm.calibrated(inner, clip),
    'chain': optax.chain(clip, inner),
    'skip_spikes': optax_ghm.skip_spikes(
      inner, sigmas=1e30, window=optax_ghm.SpikeWindow(length=3)
    ),
    'plain': inner,
  }[name]
  return tx, jax.jit(tx.update)


@pytest.mark.parametrize(
  ('guarded', 'plain'), [('calibrated', 'chain'), ('skip_spikes', 'plain')]
)
@given(
  st.lists(
    st.tuples(trees(NESTED, (0,), mantissas=NOT_SMALL), st.booleans()),
    min_size=3,
    max_size=4,
  )
)
def test_bad_steps_are_left_out_whole(guarded, plain, steps):
  """The optimizer sees the good steps and no other."""
  (tx, step), (other, other_step) = stepping(guarded), stepping(plain)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), NESTED)
  state, other_state = tx.init(zeros), other.init(zeros)
  for gradients, bad in steps:
    given_ = gradients
    if bad:
      given_ = jax.tree.map(lambda x: np.full_like(x, np.nan), gradients)
    updates, state = step(given_, state, zeros)
    expected = zeros
    if not bad:
      expected, other_state = other_step(gradients, other_state, zeros)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


@functools.cache
def skipping():
  tx = optax_ghm.skip_spikes(
    optax.identity(), sigmas=8.0, window=optax_ghm.SpikeWindow(length=16)
  )

  @jax.jit
  def run(norms):
    def step(state, norm):
      return tx.update(norm, state)[1], None

    return jax.lax.scan(step, tx.init(norms[0]), norms)[0]

  return run


@given(
  norms=hnp.arrays(np.float32, 18, elements=st.floats(1, 2, width=16)),
  spike=st.sampled_from([1.0, 4.0]),
  power=st.integers(-100, 124),
)
@example(norms=np.linspace(1, 1.5, 18, dtype='f'), spike=4.0, power=124)
def test_skip_spikes_at_any_scale(norms, spike, power):
  norms[-1] *= spike
  state, scaled = (skipping()(np.ldexp(norms, p)) for p in (0, power))
  assert int(state.skipped) == int(scaled.skipped)
  np.testing.assert_allclose(
    scaled.norm_threshold,
    np.ldexp(np.float64(state.norm_threshold), power),
    rtol=1e-5,
  )


FEW = hypothesis.settings(max_examples=max(EXAMPLES // 8, 3))


@FEW
@given(
  curvature=st.sampled_from([0.25, 1.0, 8.0]),
  low=st.sampled_from([1e-6, 1e-3]),
  start=st.floats(0.5, 4, width=16),
)
def test_range_test_of_a_parabola(curvature, low, start):
  """Gradient descent by hand: w times (1 - rate times curvature)."""
  batches = np.full((3, 1), curvature, np.float32)
  test = optax_ghm.learning_rate_range_test(
    lambda w, c: jnp.sum(c * w**2) / 2,
    np.full(1, start, np.float32),
    batches,
    low=low,
    high=1.0,
    steps=20,
  )
  np.testing.assert_allclose(test.learning_rates, np.geomspace(low, 1.0, 20))
  rates = test.learning_rates
  w = start * np.cumprod(np.append(1, 1 - rates[:-1] * curvature))
  np.testing.assert_allclose(test.losses, curvature * w**2 / 2, rtol=1e-3)
  np.testing.assert_allclose(
    test.gradient_norms, curvature * np.abs(w), rtol=1e-3
  )
  assert np.isfinite(test.smoothed).all()
  assert test.suggestion is None or low / 3 <= test.suggestion <= 1 / 3
