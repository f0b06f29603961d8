"""The range test on problems whose largest learning rate is known."""

import dataclasses
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import optax_ghm

RNG = np.random.default_rng(0)


def quadratic(w, batch):
  """Gradient descent diverges beyond 2 / 4, by the largest curvature."""
  return 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * jnp.square(w - batch))


CENTERS = RNG.normal(3.0, 0.3, (16, 2)).astype(np.float32)
START = np.zeros(2, np.float32)


def test_suggests_less_than_what_diverges_and_not_little():
  test = optax_ghm.learning_rate_range_test(quadratic, START, CENTERS)
  assert 0.02 < test.suggestion < 0.5
  lowest = test.learning_rates[np.nanargmin(test.smoothed)]
  assert f'a third of {lowest:.1e}' in test.reason
  diverged = float(test.reason.split('from ')[1].split()[0])
  assert 0.4 < diverged < 2.0


def test_the_suggestion_is_the_best_of_probes_whose_neighbors_are_worse():
  test = optax_ghm.learning_rate_range_test(
    quadratic, START, CENTERS, probe_steps=50
  )
  best = int(np.argmin(test.probe_losses))
  assert 0 < best < len(test.probe_rates) - 1
  assert test.suggestion == test.probe_rates[best]
  lowest = test.learning_rates[np.nanargmin(test.smoothed)]
  exponents = np.log2(test.probe_rates / (lowest / 3))
  np.testing.assert_allclose(exponents, np.round(exponents), atol=1e-6)
  np.testing.assert_allclose(np.diff(exponents), 1, rtol=1e-6)
  assert f'The best of {len(exponents)} probes of 50 steps' in test.reason
  curvature = np.array([4.0, 1.0])
  for rate, end in zip(test.probe_rates, test.probe_losses, strict=True):
    w, losses = np.zeros(2), []
    for t in range(50):
      error = w - np.float64(CENTERS[t % 16])
      losses.append(0.5 * np.sum(curvature * np.square(error)))
      w -= rate * curvature * error
    np.testing.assert_allclose(end, np.mean(losses[-10:]), rtol=1e-3)


def test_without_probes_it_is_a_third_of_the_lowest():
  test = optax_ghm.learning_rate_range_test(
    quadratic, START, CENTERS, probe_steps=0
  )
  lowest = test.learning_rates[np.nanargmin(test.smoothed)]
  np.testing.assert_allclose(test.suggestion, lowest / 3)
  assert not test.probe_rates.size and not test.probe_losses.size


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.floats(1e-2, 1e4))
def test_of_gradient_descent_it_is_the_inverse_curvature(curvature):
  """There, one step is enough; rates are doubled, so that x is near 1 / 1.5."""
  test = optax_ghm.learning_rate_range_test(
    lambda w, batch: 0.5 * batch * w**2,
    np.ones([], np.float32),
    np.full(4, curvature, np.float32),
    high=1e3,
    probe_steps=20,
  )
  assert 0.66 < test.suggestion * curvature < 1.34


def test_a_longer_training_wants_a_smaller_learning_rate():
  """Noise leaves a floor that rises with the learning rate."""
  noise = RNG.normal(size=(200, 2)).astype(np.float32)
  short, long = (
    optax_ghm.learning_rate_range_test(
      quadratic, np.full(2, 30.0, np.float32), noise, probe_steps=steps
    )
    for steps in (10, 200)
  )
  assert long.suggestion < short.suggestion


def test_the_curve_is_that_of_the_optimizer_under_the_schedule():
  rates = np.geomspace(1e-3, 1.0, 30)
  test = optax_ghm.learning_rate_range_test(
    quadratic,
    START,
    CENTERS,
    lambda rate: optax.sgd(rate, momentum=0.9),
    low=1e-3,
    high=1.0,
    steps=30,
  )
  np.testing.assert_allclose(test.learning_rates, rates)
  w, trace, curvature = np.zeros(2), np.zeros(2), np.array([4.0, 1.0])
  for t, rate in enumerate(rates):
    center = np.float64(CENTERS[t % 16])
    gradient = curvature * (w - center)
    loss = 0.5 * np.sum(curvature * np.square(w - center))
    np.testing.assert_allclose(test.losses[t], loss, rtol=1e-3)
    np.testing.assert_allclose(
      test.gradient_norms[t], np.linalg.norm(gradient), rtol=1e-3
    )
    trace = 0.9 * trace + gradient
    w -= rate * trace


def test_smoothing_has_no_lag():
  """A line in the logarithm of the learning rate stays that line inside."""
  test = optax_ghm.learning_rate_range_test(
    lambda w, batch: batch + 0.0 * w,
    np.zeros([], np.float32),
    np.arange(100, 0, -1, np.float32),
    steps=100,
  )
  np.testing.assert_allclose(
    test.smoothed[20:80], test.losses[20:80], rtol=1e-5
  )


def of_given_losses(last, **keywords):
  """The range test of losses that the parameters do not change."""
  losses = np.interp(np.arange(100), [0, 50, 80, 100], [10, 1, 5, 5])
  losses[90:] = last
  return optax_ghm.learning_rate_range_test(
    lambda w, batch: batch + 0.0 * w,
    np.zeros([], np.float32),
    losses.astype(np.float32),
    steps=100,
    **keywords,
  )


@pytest.mark.parametrize(
  'last, words', [(5, 'does not diverge'), (np.inf, 'on it is not finite')]
)
def test_a_rise_that_stays_below_the_first_loss_is_no_divergence(last, words):
  test = of_given_losses(last, probe_steps=0)
  assert test.suggestion is not None
  assert words in test.reason


def test_no_suggestion_if_no_probe_ends_in_finite_losses():
  test = of_given_losses(np.inf)
  assert test.suggestion is None
  assert 'probes' in test.reason and 'no suggestion' in test.reason
  assert np.isposinf(test.probe_losses).all()


def test_parameters_and_batches_may_be_any_trees():
  params = {'w': np.zeros((2, 1), np.float32), 'b': np.zeros([], np.float32)}
  x = RNG.normal(size=(8, 16, 2)).astype(np.float32)
  batches = {
    'x': x,
    'y': x.sum(-1),
    'seed': np.arange(8),
  }

  def loss(params, batch):
    key = jax.random.key(batch['seed'])
    noise = 0.1 * jax.random.normal(key, batch['y'].shape)
    predicted = (batch['x'] @ params['w'])[:, 0] + params['b']
    return jnp.mean(jnp.square(predicted + noise - batch['y']))

  before = jax.tree.map(np.array, params)
  test = optax_ghm.learning_rate_range_test(loss, params, batches)
  assert test.suggestion is not None
  jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
  'loss, word',
  [
    (lambda w, batch: jnp.nan * w.sum(), 'not finite'),
    (lambda w, batch: 0.0 * w.sum(), 'fell by'),
    (lambda w, batch: batch[0] + 0.0 * w.sum(), 'fell by'),  # noise alone
  ],
)
def test_no_suggestion_without_a_reason(loss, word):
  test = optax_ghm.learning_rate_range_test(loss, START, CENTERS)
  assert test.suggestion is None
  assert word in test.reason and 'no suggestion' in test.reason


@pytest.mark.parametrize('scale', [1e-20, 1e15])
def test_losses_of_any_scale(scale):
  with jax.numpy_dtype_promotion('standard'):  # Optax's Adam mixes types
    test, plain = (
      optax_ghm.learning_rate_range_test(
        lambda w, batch, factor=factor: factor * quadratic(w, batch),
        START,
        CENTERS,
        optax.adam,
        low=1e-4,
      )
      for factor in (scale, 1.0)
    )
  if scale > 1:
    np.testing.assert_allclose(test.suggestion, plain.suggestion, rtol=0.2)
  else:  # Adam's ε holds it still
    assert test.suggestion is None


def test_a_range_that_is_too_low_says_so():
  test = optax_ghm.learning_rate_range_test(
    quadratic, START, CENTERS, low=1e-4, high=1e-2
  )
  assert 'higher range' in test.reason


def test_the_clips_bear_more():
  """The loss is passed on as the extra argument of ``skip_spikes``."""
  test = optax_ghm.learning_rate_range_test(
    quadratic,
    START,
    CENTERS,
    lambda rate: optax_ghm.skip_spikes(optax.sgd(rate)),
  )
  assert test.suggestion is not None


def test_plot():
  matplotlib = pytest.importorskip('matplotlib')
  matplotlib.use('Agg')
  test = optax_ghm.learning_rate_range_test(quadratic, START, CENTERS)
  axes = test.plot()
  assert axes.get_xscale() == 'log'
  assert axes.get_xlabel() == 'learning rate'
  assert f'{test.suggestion:.1e}' in axes.get_legend().texts[0].get_text()
  assert test.plot(axes) is axes
  nothing = dataclasses.replace(
    test, smoothed=test.smoothed * np.nan, suggestion=None
  )
  assert nothing.plot().get_legend() is None


def test_a_plot_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
  test = optax_ghm.calibration.RangeTest(*[np.ones(20)] * 6, None, '')
  with pytest.raises(ImportError, match=r"install 'optax_ghm\[plot\]'"):
    test.plot()


@pytest.mark.parametrize(
  'keywords, word',
  [
    ({'low': 0.0}, 'low'),
    ({'low': 1.0, 'high': 0.1}, 'high'),
    ({'steps': 5}, 'steps'),
    ({'probe_steps': -1}, 'probe_steps'),
    ({'batches': np.zeros([])}, 'batches'),
    ({'batches': np.zeros([0, 2])}, 'batches'),
    ({'batches': (np.zeros([3, 2]), np.zeros([4]))}, 'batches'),
  ],
)
def test_errors_name_the_argument(keywords, word):
  arguments = {'loss': quadratic, 'params': START, 'batches': CENTERS}
  with pytest.raises(ValueError, match=word):
    optax_ghm.learning_rate_range_test(**arguments | keywords)
