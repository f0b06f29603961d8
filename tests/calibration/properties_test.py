"""Clips and normalizations equal their formulas in float64, for any tree."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, strategies as st

import optax_ghm
from tests.support.strategies_trees import (
  STRUCTURES,
  is_inexact,
  trees,
  wide,
)

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
few = hypothesis.settings(
  max_examples=max(hypothesis.settings().max_examples // 5, 3)
)


def by_rank(tree):
  return jax.tree.map(lambda leaf: f'rank {np.ndim(leaf)}', tree)


SCOPES = {
  'global': 'global',
  'leaf': 'leaf',
  'unit': 'unit',
  'groups': optax_ghm.Groups(by_rank),
  'units': optax_ghm.Units(lambda path, leaf: tuple(range(leaf.ndim))[:1]),
}
NAMES = ('many', 'mixed')
gradients = st.sampled_from(NAMES).flatmap(lambda name: trees(STRUCTURES[name]))


def counted_with_path(tree):
  return [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if is_inexact(leaf) and leaf.size
  ]


def norms_by_hand(scope, tree):
  """Returns the norms of every leaf, broadcastable to it."""
  leaves = wide(tree)
  if scope in ('unit', 'units'):
    axes = [
      (optax_ghm.Units() if scope == 'unit' else SCOPES[scope]).axes(*each)
      for each in counted_with_path(tree)
    ]
    return [
      np.sqrt(np.sum(np.abs(x) ** 2, a, keepdims=True))
      for x, a in zip(leaves, axes, strict=True)
    ]
  labels = {
    'global': [0] * len(leaves),
    'leaf': range(len(leaves)),
    'groups': [x.ndim for x in leaves],
  }[scope]
  squares = {}
  for label, x in zip(labels, leaves, strict=True):
    squares[label] = squares.get(label, 0) + np.sum(np.abs(x) ** 2)
  return [np.sqrt(squares[label]) for label in labels]


def assert_leaves_close(actual, expected, tree, rtol=1e-5):
  """Compares to the rounding of each dtype; small numbers are flushed."""
  numbers = [u for _, u in counted_with_path(actual)]
  of_tree = [u for _, u in counted_with_path(tree)]
  for u, x, g in zip(numbers, expected, of_tree, strict=True):
    assert u.dtype == g.dtype and u.shape == g.shape
    info = jnp.finfo(u.dtype)
    error = np.abs(wide([u])[0] - x)
    bound = max(rtol, 2 * float(info.eps)) * np.abs(x) + 2 * float(info.tiny)
    assert (error <= bound).all(), (u, x)


@functools.cache
def clipped(scope):
  @jax.jit
  def update(tree, max_norm):
    tx = optax_ghm.clip_by_norm(max_norm, scope=SCOPES[scope])
    return tx.update(tree, tx.init(tree))

  return update


LIMITS = st.sampled_from([2.0**-100, 1e-3, 1.0, 7.0, 2.0**100])


@pytest.mark.parametrize('scope', ['global', 'unit', 'groups'])
@given(tree=gradients, max_norm=LIMITS)
def test_clip_by_norm(scope, tree, max_norm):
  updates, state = clipped(scope)(tree, np.float32(max_norm))
  norms = norms_by_hand(scope, tree)
  factors = [np.minimum(1, max_norm / np.maximum(n, 1e-45)) for n in norms]
  assume(all((np.abs(f / (1.01 * TINY) - 1) > 0.1).all() for f in factors))
  factors = [np.where(f > TINY, f, 0) for f in factors]  # as documented
  expected = [x * f for x, f in zip(wide(tree), factors, strict=True)]
  assert_leaves_close(updates, expected, tree)
  assert (np.asarray(state.factor) <= 1).all()


@functools.cache
def clipped_by_parameter_norm(scope):
  @jax.jit
  def update(tree, params, ratio, eps):
    tx = optax_ghm.clip_by_parameter_norm(ratio, eps=eps, scope=SCOPES[scope])
    return tx.update(tree, tx.init(tree), params)

  return update


MODERATE = (0, 0.1, -0.1)  # exponents for which few factors are 0


def pairs(name):
  return st.tuples(*[trees(STRUCTURES[name], MODERATE) for _ in range(2)])


@pytest.mark.parametrize('scope', ['unit', 'global'])
@given(
  pair=st.sampled_from(['nested', 'mixed']).flatmap(pairs),
  ratio=st.sampled_from([1e-3, 1.0, 8.0]),
  eps=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_clip_by_parameter_norm(scope, pair, ratio, eps):
  tree, params = pair
  updates, _ = clipped_by_parameter_norm(scope)(
    tree, params, np.float32(ratio), np.float32(eps)
  )
  expected = [
    x * np.minimum(1, ratio * np.maximum(w, eps) / np.maximum(g, 1e-45))
    for x, g, w in zip(
      wide(tree),
      norms_by_hand(scope, tree),
      norms_by_hand(scope, params),
      strict=True,
    )
  ]
  assert_leaves_close(updates, expected, tree)


@functools.cache
def clipped_by_rms(scope):
  @jax.jit
  def update(tree, max_rms):
    tx = optax_ghm.clip_by_rms(max_rms, scope=SCOPES[scope])
    return tx.update(tree, tx.init(tree))

  return update


@pytest.mark.parametrize('scope', ['leaf', 'groups'])
@given(
  tree=st.sampled_from(['nested', 'mixed']).flatmap(
    lambda name: trees(STRUCTURES[name], MODERATE)
  ),
  max_rms=st.sampled_from([1e-3, 1.0, 8.0]),
)
def test_clip_by_rms(scope, tree, max_rms):
  updates, _ = clipped_by_rms(scope)(tree, np.float32(max_rms))
  leaves = wide(tree)
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), tree)
  sizes = [n**2 for n in norms_by_hand(scope, ones)]
  rms = [
    n / np.sqrt(size)
    for n, size in zip(norms_by_hand(scope, tree), sizes, strict=True)
  ]
  expected = [
    x / np.maximum(1, r / max_rms) for x, r in zip(leaves, rms, strict=True)
  ]
  assert_leaves_close(updates, expected, tree)


@functools.cache
def normalized(scope):
  tx = optax_ghm.normalize_by_norm(scope=SCOPES[scope])
  return jax.jit(lambda tree: tx.update(tree, tx.init(tree)))


@pytest.mark.parametrize('scope', ['global', 'leaf', 'units'])
@given(tree=gradients)
def test_normalize_by_norm(scope, tree):
  updates, state = normalized(scope)(tree)
  norms = norms_by_hand(scope, tree)
  expected = [
    x / np.where(n > 0, n, np.inf)
    for x, n in zip(wide(tree), norms, strict=True)
  ]
  assert_leaves_close(updates, expected, tree)
  if scope == 'global':
    assert int(state.skipped) == (norms[0] == 0)
    if norms[0]:
      np.testing.assert_allclose(state.divisor, norms[0], rtol=1e-5)


@functools.cache
def standardized():
  tx = optax_ghm.standardize()
  return jax.jit(lambda tree: tx.update(tree, tx.init(tree)))


@given(tree=st.sampled_from(NAMES).flatmap(lambda n: trees(STRUCTURES[n])))
def test_standardize(tree):
  updates, state = standardized()(tree)
  for i, (u, x) in enumerate(zip(wide(updates), wide(tree), strict=True)):
    deviation, largest = np.std(x), np.abs(x).max()
    if x.ndim < 2:
      np.testing.assert_array_equal(u, x)
      assert state.divisor[i] == 1
    elif deviation > 1e-4 * largest:
      expected = (x - np.mean(x)) / deviation
      atol = 4 * float(jnp.finfo(counted_with_path(tree)[i][1].dtype).eps)
      np.testing.assert_allclose(u, expected, rtol=0, atol=max(3 * atol, 1e-5))
      np.testing.assert_allclose(state.divisor[i], deviation, rtol=1e-5)
    elif deviation < 1e-8 * largest or largest == 0:
      assert not u.any()


@functools.cache
def centralized(units):
  tx = optax_ghm.centralize(
    units=SCOPES[units] if units == 'units' else optax_ghm.Units()
  )
  return jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])


@pytest.mark.parametrize('units', ['unit', 'units'])
@given(tree=gradients)
def test_centralize(units, tree):
  updates = centralized(units)(tree)
  layout = optax_ghm.Units() if units == 'unit' else SCOPES[units]
  for u, x, (path, leaf) in zip(
    wide(updates), wide(tree), counted_with_path(tree), strict=True
  ):
    named_bias = path[-1:] == (jax.tree_util.GetAttrKey('bias'),)
    if x.ndim < 2 or named_bias:
      np.testing.assert_array_equal(u, x)
      continue
    expected = x - np.mean(x, layout.axes(path, leaf), keepdims=True)
    info = jnp.finfo(leaf.dtype)
    error = 4 * max(float(info.eps), 1e-7) * np.abs(x).max()
    np.testing.assert_allclose(u, expected, rtol=0, atol=error + info.tiny)


@given(
  tree=trees(STRUCTURES['nested'], (0,)),
  power=st.integers(-100, 100),
  max_norm=st.sampled_from([0.5, 1.0]),
)
def test_clip_by_norm_is_the_lesser_of_two_norms(tree, power, max_norm):
  """The norm of a clipped s·g is min(c, s|g|)."""
  scaled = jax.tree.map(lambda x: np.float32(2.0**power) * x, tree)
  updates, _ = clipped('global')(scaled, np.float32(max_norm))
  norm = norms_by_hand('global', scaled)[0]
  actual = norms_by_hand('global', updates)[0]
  np.testing.assert_allclose(actual, min(max_norm, norm), rtol=1e-5)


# Clips with statistics, on streams of norms.

DIRECTION = np.array([0.6, -0.8], np.float32)
NORMS = st.one_of(
  st.floats(0.0625, 16, width=32), st.sampled_from([1.0, 1.0, 0.0])
)
STREAMS = st.tuples(
  st.lists(NORMS, min_size=12, max_size=12),
  st.sampled_from([0, 0, 60, -60, 110, -110]),
).map(lambda drawn: np.ldexp(np.float32(drawn[0]), drawn[1]))
"""Within a factor of 256, at any scale: no norm in them is an outlier."""


@functools.cache
def scanned(make):
  @jax.jit
  def run(norms, *args):
    tx = make(*args)

    def step(state, norm):
      update, state = tx.update(norm * DIRECTION, state)
      return state, (update, state)

    return jax.lax.scan(step, tx.init(DIRECTION), norms)[1]

  return run


def run(make, norms, *args):
  args = [np.float32(arg) for arg in args]
  updates, states = scanned(make)(np.float32(norms), *args)
  return np.linalg.norm(np.float64(updates), axis=-1), states


def of_window(percentile):
  return optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.WindowPercentile(length=5)
  )


def of_quantile(percentile):
  return optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.GeometricQuantile(learning_rate=0.5)
  )


@given(norms=STREAMS, percentile=st.integers(0, 100))
def test_clip_by_window_percentile(norms, percentile):
  clipped, states = run(of_window, norms, percentile)
  good = [n for n in norms if n > 0]
  expected = [
    np.percentile(np.float64(good[max(t - 4, 0) : t + 1]), percentile)
    for t in range(len(good))
  ]
  np.testing.assert_allclose(states.threshold[norms > 0], expected, rtol=1e-5)
  np.testing.assert_allclose(
    clipped[norms > 0], np.minimum(good, expected), rtol=1e-5
  )
  np.testing.assert_array_equal(states.skipped, np.cumsum(norms == 0))


@given(norms=STREAMS, percentile=st.integers(0, 100))
def test_clip_by_geometric_quantile(norms, percentile):
  good = np.float64([n for n in norms if n > 0])
  estimate, expected = next(iter(good), np.inf), []
  for n in good:
    expected.append(estimate)
    assume(len(expected) == 1 or abs(n / estimate - 1) > 1e-4)
    estimate *= np.exp(-0.5 * ((n <= estimate) - percentile / 100))
  clipped, states = run(of_quantile, norms, percentile)
  np.testing.assert_allclose(states.threshold[norms > 0], expected, rtol=1e-4)
  np.testing.assert_allclose(
    clipped[norms > 0], np.minimum(good, expected), rtol=1e-4
  )


def of_zscore(z_threshold, decay, warmup_steps):
  return optax_ghm.clip_by_zscore(
    z_threshold, decay=decay, warmup_steps=warmup_steps
  )


def zscore_by_hand(norms, z_threshold, decay, warmup):
  """Returns the clipped norms and the thresholds."""
  clipped, thresholds = [], []
  for n in norms:
    new, seen = n, clipped[:warmup]
    threshold = np.inf
    if len(clipped) == warmup:
      mean, variance = np.mean(seen), np.var(seen)
    if len(clipped) >= warmup:
      deviation = max(np.sqrt(variance), 1e-6 * mean)
      threshold = mean + z_threshold * deviation
      if n > threshold:
        new = mean + (z_threshold * deviation) ** 2 / (n - mean)
      mean = decay * mean + (1 - decay) * new
      variance = decay * variance + (1 - decay) * (new - mean) ** 2
    clipped.append(new)
    thresholds.append(threshold)
  return np.array(clipped), np.array(thresholds)


@given(
  norms=STREAMS,
  z_threshold=st.sampled_from([0.5, 1.0, 2.5]),
  decay=st.sampled_from([0.0, 0.5, 0.97]),
  warmup=st.integers(1, 4),
)
@example(
  norms=np.float32([1e30, 2e30, 3e30, 9e30] * 3),
  z_threshold=1.0,
  decay=0.5,
  warmup=3,
)
@example(
  norms=np.float32([1e-30, 2e-30, 3e-30, 9e-30] * 3),
  z_threshold=1.0,
  decay=0.5,
  warmup=3,
)
def test_clip_by_zscore(norms, z_threshold, decay, warmup):
  good = np.float64(norms[norms > 0])
  expected, thresholds = zscore_by_hand(good, z_threshold, decay, warmup)
  # Rounding decides where a deviation is tiny or a norm is at its threshold.
  assume((np.abs(good / thresholds - 1) > 1e-3).all())
  assume(len(good) <= warmup or np.std(good[:warmup]) > 0.01 * good.max())
  clipped, states = run(of_zscore, norms, z_threshold, decay, warmup)
  np.testing.assert_allclose(clipped[norms > 0], expected, rtol=1e-3)
  np.testing.assert_allclose(states.threshold[norms > 0], thresholds, rtol=1e-3)


def of_ema(ratio, decay, max_norm, warmup_steps):
  return optax_ghm.clip_by_norm_ema(
    ratio, decay=decay, max_norm=max_norm, warmup_steps=warmup_steps
  )


@given(
  norms=STREAMS,
  ratio=st.sampled_from([1.05, 2.0]),
  decay=st.sampled_from([0.0, 0.5, 0.98]),
  warmup=st.integers(1, 4),
)
def test_clip_by_norm_ema(norms, ratio, decay, warmup):
  good = np.float64(norms[norms > 0])
  assume(good.size)
  max_norm = np.median(good)
  expected, average = [], np.inf
  for t, n in enumerate(good):
    if t < warmup:
      expected.append(min(n, max_norm))
      average = min(average, expected[-1])
    else:
      expected.append(min(n, ratio * average))
      average = decay * average + (1 - decay) * expected[-1]
  clipped, _ = run(of_ema, norms, ratio, decay, max_norm, warmup)
  np.testing.assert_allclose(clipped[norms > 0], expected, rtol=1e-4)
