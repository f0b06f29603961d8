"""Every clip with statistics follows its paper's rule, on streams of norms."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from hypothesis import assume, example, given, strategies as st

import optax_ghm
from tests.support import oracles_calibration as by_hand

pytestmark = pytest.mark.device

DIRECTION = np.array([0.6, -0.8], np.float32)
CLIPS = {
  'norm': optax_ghm.clip_by_norm(1.5),
  'percentile': optax_ghm.clip_by_percentile(
    90.0, estimator=optax_ghm.WindowPercentile(length=50)
  ),
  'quantile': optax_ghm.clip_by_percentile(
    90.0, estimator=optax_ghm.GeometricQuantile()
  ),
  'zscore': optax_ghm.clip_by_zscore(),
  'norm_ema': optax_ghm.clip_by_norm_ema(max_norm=9.0, warmup_steps=20),
}
EXPECTED = {
  'norm': functools.partial(by_hand.constant, max_norm=1.5),
  'percentile': functools.partial(by_hand.percentile, q=90, length=50),
  'quantile': functools.partial(by_hand.quantile, q=90),
  'zscore': by_hand.zscore,
  'norm_ema': functools.partial(by_hand.norm_ema, max_norm=9.0, warmup=20),
}
every_clip = pytest.mark.parametrize('name', CLIPS)
STEPS = 200


@functools.cache
def scanned(make):
  """Compiles a scan over the steps of a stream of norms."""

  @jax.jit
  def run(norms, *args):
    tx = CLIPS[make] if isinstance(make, str) else make(*args)

    def step(state, norm):
      update, state = tx.update(norm * DIRECTION, state)
      return state, (update, state)

    return jax.lax.scan(step, tx.init(DIRECTION), norms)[1]

  return run


def run(make, norms, *args):
  """The updates, and the states after each step; at least 200 steps."""
  args = [np.float32(arg) for arg in args]
  norms = np.float32(norms)
  steps = len(norms) if args else STEPS + 1  # one program for all streams
  padded = np.append(norms, np.ones(steps - len(norms), np.float32))
  updates, states = scanned(make)(padded, *args)
  states = jax.tree.map(lambda leaf: np.asarray(leaf)[: len(norms)], states)
  if states.norm.ndim == 2:  # one leaf
    states = jax.tree.map(lambda leaf: leaf[:, 0], states)
  updates = np.asarray(updates)[: len(norms)]
  return np.linalg.norm(np.float64(updates), axis=-1), states, updates


def stream(spikes=()):
  norms = np.random.default_rng(0).lognormal(0.0, 0.1, STEPS)
  for step, factor in spikes:
    norms[step] *= factor
  return norms


@every_clip
@pytest.mark.parametrize('factor', [10, 100])
def test_spikes_are_clipped_as_the_paper_says(name, factor):
  norms = stream([(60, factor), (61, factor), (150, factor)])
  clipped, states, _ = run(name, norms)
  expected, _ = EXPECTED[name](norms)
  np.testing.assert_allclose(clipped, expected, rtol=2e-4)
  assert expected[60] < norms[60] / 2
  np.testing.assert_allclose(states.norm, norms, rtol=1e-6)
  happened = expected < norms * (1 - 1e-4)
  assert abs(int(states.clipped[-1]) - happened.sum()) <= 1
  assert states.skipped[-1] == 0


def median_of_past():
  return optax_ghm.clip_by_percentile(50.0)


@pytest.mark.parametrize('make', ['zscore', 'norm_ema', median_of_past])
@pytest.mark.parametrize('factor', [10, 100])
def test_twenty_spikes_do_not_become_the_baseline(make, factor):
  calm, spiky = stream(), stream([(t, factor) for t in range(100, 120)])
  ratio = np.divide(
    *(run(make, norms)[1].threshold[101:] for norms in (spiky, calm))
  )
  assert 0.9 < ratio.min() and ratio.max() < 1.1


@every_clip
@pytest.mark.parametrize('bad', [np.nan, 1e30, 3e38, 0.0])
@pytest.mark.parametrize('at', [10, 100])
def test_an_outlier_leaves_no_trace(name, bad, at):
  if name == 'norm' and bad > 1:
    pytest.skip('A constant clip has no statistics, and so no reference norm.')
  calm = stream()
  clipped, states, _ = run(name, np.insert(calm, at, bad))
  expected, expected_states, _ = run(name, calm)
  np.testing.assert_array_equal(np.delete(clipped, at), expected)
  assert np.isfinite(clipped).all()
  assert clipped[at] == 0 or bad > 1
  last, expected_last = (
    jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, expected_states)
  )
  kinds = {
    'nan_steps': np.isnan(bad),
    'inf_steps': False,  # 3e38 fits
    'outliers': bad > 1,
  }
  assert last.skipped == 1
  for kind, happened in kinds.items():
    assert getattr(last, kind) == happened, kind
  none = dict.fromkeys(['skipped', *kinds], 0)
  chex.assert_trees_all_equal(last._replace(**none), expected_last)


@pytest.mark.parametrize('name', [name for name in CLIPS if name != 'quantile'])
def test_a_calm_stream_passes_bit_for_bit(name):
  """The geometric quantile is left out, since it never stops moving."""
  signs = np.random.default_rng(0).choice([-1.0, 1.0], STEPS)
  norms = np.full(STEPS, 1.25, np.float32) * np.float32(signs)
  _, states, updates = run(name, norms)
  np.testing.assert_array_equal(updates, norms[:, None] * DIRECTION)
  assert states.clipped[-1] == 0
  assert (states.factor == 1).all()


@pytest.mark.parametrize('name', [name for name in CLIPS if name != 'norm'])
def test_a_tiny_first_step_is_forgotten(name):
  """After twenty outliers in a row, the statistics are reset."""
  norms = np.concatenate([[1e-7], np.ones(79)])
  clipped, states, _ = run(name, norms)
  np.testing.assert_allclose(clipped[-10:], 1, rtol=0.1)
  assert (states.outliers_in_a_row[-10:] == 0).all()
  assert states.outliers_in_a_row.max() == 19
  # The least of a few norms says little about what is too large.
  assert name != 'norm_ema' or states.skipped[19] == 0


@every_clip
def test_bad_numbers_are_no_outliers_in_a_row(name):
  """Infinite norms, however many, do not reset the statistics."""
  clipped, states, _ = run(name, np.insert(stream()[:100], 50, [np.inf] * 30))
  assert states.inf_steps[-1] == states.skipped[-1] == 30
  assert (states.outliers_in_a_row == 0).all()
  expected, *_ = run(name, stream()[:100])
  np.testing.assert_array_equal(np.delete(clipped, np.s_[50:80]), expected)


# With any numbers.

NORMS = st.one_of(
  st.floats(0.0625, 16, width=32), st.sampled_from([1.0, 1.0, 0.0])
)
STREAMS = st.tuples(
  st.lists(NORMS, min_size=12, max_size=12),
  st.sampled_from([0, 0, 60, -60, 110, -110]),
).map(lambda drawn: np.ldexp(np.float32(drawn[0]), drawn[1]))
"""Within a factor of 256, at any scale: no norm in them is an outlier."""


def of_window(percentile):
  return optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.WindowPercentile(length=5)
  )


def of_quantile(percentile):
  return optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.GeometricQuantile(learning_rate=0.5)
  )


def of_zscore(z_threshold, decay, warmup_steps):
  return optax_ghm.clip_by_zscore(
    z_threshold, decay=decay, warmup_steps=warmup_steps
  )


def of_ema(ratio, decay, max_norm, warmup_steps):
  return optax_ghm.clip_by_norm_ema(
    ratio, decay=decay, max_norm=max_norm, warmup_steps=warmup_steps
  )


def check_stream(norms, make, args, expected, thresholds, rtol):
  clipped, states, _ = run(make, norms, *args)
  np.testing.assert_allclose(clipped[norms > 0], expected, rtol=rtol)
  np.testing.assert_allclose(states.threshold[norms > 0], thresholds, rtol=rtol)
  np.testing.assert_array_equal(states.skipped, np.cumsum(norms == 0))


@given(norms=STREAMS, percentile=st.integers(0, 100))
def test_clip_by_window_percentile(norms, percentile):
  expected = by_hand.percentile(np.float64(norms[norms > 0]), percentile, 5)
  check_stream(norms, of_window, [percentile], *expected, 1e-5)


@given(norms=STREAMS, percentile=st.integers(0, 100))
def test_clip_by_geometric_quantile(norms, percentile):
  good = np.float64(norms[norms > 0])
  expected = by_hand.quantile(good, percentile, 0.5)
  # Rounding decides where a norm is at its threshold.
  assume((np.abs(good / expected[1] - 1) > 1e-4)[1:].all())
  check_stream(norms, of_quantile, [percentile], *expected, 1e-4)


@given(
  norms=STREAMS,
  z_threshold=st.sampled_from([0.5, 1.0, 2.5]),
  decay=st.sampled_from([0.0, 0.5, 0.97]),
  warmup=st.integers(1, 4),
)
@example(np.float32([1e30, 2e30, 3e30, 9e30] * 3), 1.0, 0.5, 3)
@example(np.float32([1e-30, 2e-30, 3e-30, 9e-30] * 3), 1.0, 0.5, 3)
def test_clip_by_zscore(norms, z_threshold, decay, warmup):
  good = np.float64(norms[norms > 0])
  expected = by_hand.zscore(good, z_threshold, decay, warmup)
  # And where a deviation is tiny.
  assume((np.abs(good / expected[1] - 1) > 1e-3).all())
  assume(len(good) <= warmup or np.std(good[:warmup]) > 0.01 * good.max())
  check_stream(norms, of_zscore, [z_threshold, decay, warmup], *expected, 1e-3)


@given(
  norms=STREAMS,
  ratio=st.sampled_from([1.05, 2.0]),
  decay=st.sampled_from([0.0, 0.5, 0.98]),
  warmup=st.integers(1, 4),
)
def test_clip_by_norm_ema(norms, ratio, decay, warmup):
  good = np.float64(norms[norms > 0])
  assume(good.size)
  args = [ratio, decay, np.median(good), warmup]
  clipped, _, _ = run(of_ema, norms, *args)
  expected, _ = by_hand.norm_ema(good, *args)
  np.testing.assert_allclose(clipped[norms > 0], expected, rtol=1e-4)


def slow_quantile(percentile):
  return optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.GeometricQuantile(learning_rate=0.01)
  )


def test_the_quantile_comes_to_rest_at_the_percentile():
  norms = np.random.default_rng(0).uniform(1.0, 2.0, 4000)
  _, states, _ = run(slow_quantile, norms, 30.0)
  np.testing.assert_allclose(states.threshold[2000:].mean(), 1.3, atol=0.02)


def test_a_clip_without_warm_up_starts_with_the_first_norm():
  clipped, _, _ = run(of_zscore, [1.0, 3.0], 2.5, 0.97, 0)
  np.testing.assert_allclose(clipped, [1, 1], rtol=1e-5)


@pytest.mark.parametrize(
  'make, word',
  [
    (lambda: optax_ghm.clip_by_percentile(150.0), 'percentile'),
    (lambda: optax_ghm.WindowPercentile(length=0), 'length'),
    (lambda: optax_ghm.clip_by_norm(-1.0), 'max_norm'),
    (lambda: optax_ghm.clip_by_zscore(decay=1.5), 'decay'),
    (lambda: optax_ghm.clip_by_norm_ema(decay=-0.1), 'decay'),
    (lambda: optax_ghm.clip_by_zscore(-2.5), 'z_threshold must .*got -2.5'),
    (lambda: optax_ghm.clip_by_zscore(warmup_steps=-1), 'warmup_steps'),
    (lambda: optax_ghm.clip_by_norm_ema(-1.0), 'ratio'),
    (lambda: optax_ghm.clip_by_norm_ema(max_norm=-1.0), 'max_norm'),
    (lambda: optax_ghm.clip_by_norm_ema(warmup_steps=-1), 'warmup_steps'),
    (lambda: optax_ghm.clip_by_parameter_norm(-1.0), 'ratio'),
    (lambda: optax_ghm.clip_by_parameter_norm(eps=-1.0), 'eps'),
    (lambda: optax_ghm.clip_by_rms(-1.0), 'max_rms'),
    (lambda: optax_ghm.noise_scale_aggregate(-1), 'batch_size'),
    (lambda: optax_ghm.noise_scale_aggregate(decay=1.5), 'decay'),
    (
      lambda: optax_ghm.skip_spikes(optax.sgd(1.0), sigmas=-6.0),
      'sigmas must .*got -6.0',
    ),
    (
      lambda: optax_ghm.skip_spikes(optax.sgd(1.0), max_consecutive=-1),
      'max_consecutive',
    ),
  ],
)
def test_numbers_out_of_range_are_named(make, word):
  with pytest.raises(ValueError, match=word):
    make()


@pytest.mark.parametrize(
  'make, word',
  [
    (
      lambda: optax_ghm.calibrated(optax.adam),
      'optimizer must be a GradientTransformation, got <function adam.*Call',
    ),
    (
      lambda: optax_ghm.calibrated(optax.sgd(1.0), optax_ghm.clip_by_norm),
      'clip must be a GradientTransformation, got <function clip_by_norm',
    ),
    (lambda: optax_ghm.skip_spikes(optax.MultiSteps), 'optimizer must be'),
    (
      lambda: optax_ghm.skip_spikes(optax.sgd(1.0), window=64),
      'window must be a SpikeWindow, got 64',
    ),
    (
      lambda: optax_ghm.clip_by_percentile(estimator=100),
      'estimator must be a PercentileEstimator, got 100',
    ),
    (
      lambda: optax_ghm.learning_rate_range_test(None, None, (), optax.sgd(1)),
      'optimizer must be a function',
    ),
  ],
)
def test_what_is_of_another_kind_is_named(make, word):
  with pytest.raises(TypeError, match=word):
    make()
