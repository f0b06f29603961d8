"""Long runs: nothing drifts, wraps, grows or forgets to forget."""

import functools
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm
from optax_ghm import RunningMoments, flow, harmonization
from tests.support.registry import ENTRIES

MANY, STEPS, RECENT = 1_000_000, 300_000, 20_000
DECAY = 0.9999
TOP = np.iinfo(np.int32).max
PARAMS = {
  'bias': np.ones((), np.float32),
  'kernel': np.ones((1, 2), np.float32),
}

pytestmark = [pytest.mark.slow, pytest.mark.device]
PROGRAMS = 160


def uniform(t):
  """Numbers in [0, 1) from those of the steps: the finalizer of MurmurHash3."""
  bits = jnp.asarray(t).astype(jnp.uint32) * np.uint32(0x9E3779B9)
  for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
    bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
  bits ^= bits >> np.uint32(16)
  return (bits >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)


def norm_at(t):
  """Uniform in [0.5, 1.5): of mean 1 and variance 1 / 12."""
  return 0.5 + uniform(t)


def of_norm(norm):
  """Gradients of ``PARAMS`` with this norm, or one for each example."""
  kernel = jnp.stack([jnp.float32(0.64) * norm, jnp.float32(-0.48) * norm], -1)
  return {'bias': jnp.float32(0.6) * norm, 'kernel': kernel[..., None, :]}


def gradients_at(t, per_example=False):
  """Every thousandth is NaN."""
  norm = norm_at(2 * t + jnp.arange(2)) if per_example else norm_at(t)
  return of_norm(jnp.where(t % 1000 == 500, jnp.nan, norm))


@functools.partial(jax.jit, static_argnums=0)
def loop(step, state, start, stop):
  """The state after ``state = step(state, t)`` for all t."""
  return jax.lax.fori_loop(start, stop, lambda t, s: step(s, t), state)


@functools.cache
def step_of_entry(entry):
  """One and the same for all tests, so that they share the loop."""
  gradients = functools.partial(gradients_at, per_example=entry.per_example)
  return steps_of(entry.tx, gradients), jax.jit(entry.tx.init)(PARAMS)


def steps_of(tx, gradients=lambda t: of_norm(norm_at(t))):
  """``update`` as a step of :func:`loop`."""
  return lambda state, t: tx.update(gradients(t), state, PARAMS)[1]


@functools.cache
def norms_of(steps=STEPS):
  """What :func:`norm_at` gives, in float64."""
  return np.asarray(jax.jit(norm_at)(np.arange(steps)), np.float64)


def average(values, decay=DECAY):
  """Their moving average in float64, corrected for its start."""
  lag = np.arange(len(values))[::-1]
  weights = np.where(lag * (1 - decay) < 60, np.float64(decay) ** lag, 0)
  return weights @ values / weights.sum()


def short_of_1(decay):
  """Where float32 stops on its way to 1: a step is half of its last digit."""
  return 2 * 2.0**-25 / (1 - decay)


def named(state):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


# Of the averages after two histories, where they are not the same to rounding:
# a z-score of 0.5 narrows down to the least norm, slowly; a quantile goes on
# moving; a window of four steps that are often left out starts over by chance.
TOLERANCES = {
  'clip_by_zscore': 0.01,
  'calibrated': 0.01,
  'clip_by_quantile_of_leaves': 0.5,
}


@pytest.mark.parametrize('entry', ENTRIES, ids=lambda entry: entry.name)
def test_where_it_is_depends_on_the_recent_steps_alone(entry):
  """But for the counts, which are of all steps."""
  step, init = step_of_entry(entry)
  of_all = loop(step, init, 0, STEPS)
  of_recent = loop(step, init, STEPS - RECENT, STEPS)
  chex.assert_trees_all_equal_shapes_and_dtypes(of_all, init)
  recent = named(of_recent)
  for name, one in named(of_all).items():
    assert np.isfinite(one).all(), name
    rtol, times = TOLERANCES.get(entry.name, 1e-4), 1.0
    if one.dtype == np.int32 or 'non_finite' in name:
      if 'recent' in name:
        continue
      times = 1 if 'in_a_row' in name else STEPS / RECENT
      by_chance = 'clipped' in name or entry.name == 'skip_spikes'
      rtol = 0.1 if by_chance else 0
    power = 2 if name.endswith('.deviation') else 1  # averaged as a variance
    np.testing.assert_allclose(
      one**power,
      times * recent[name] ** power,
      rtol=rtol,
      atol=1e-9,
      err_msg=name,
    )


AVERAGES = {
  'zscore': (
    optax_ghm.clip_by_zscore(9.0, decay=DECAY),
    lambda state: (state.statistics.mean, state.statistics.deviation**2),
    lambda r: (average(r), average(np.square(r - average(r)))),
  ),
  'norm_ema': (
    optax_ghm.clip_by_norm_ema(9.0, decay=DECAY, max_norm=9.0, scope='global'),
    lambda state: state.statistics[:1],
    lambda r: (average(r),),
  ),
}


@pytest.mark.parametrize('name', AVERAGES)
def test_averages_are_those_of_float64(name):
  tx, read, expected = AVERAGES[name]
  state = loop(steps_of(tx), jax.jit(tx.init)(PARAMS), 0, STEPS)
  # The variance is about a mean that has moved: less by the mean's own. Without
  # a fused multiplication and addition, AdaGC's average rounds twice in a step.
  rtols = (1e-5, 1e-3) if name == 'zscore' else (3e-5,)
  for actual, desired, rtol in zip(
    read(state), expected(norms_of()), rtols, strict=True
  ):
    np.testing.assert_allclose(actual, desired, rtol=rtol)


def test_signal_and_variance_are_those_of_float64():
  tx = optax_ghm.noise_scale_aggregate(decay=DECAY)
  step = steps_of(tx, lambda t: of_norm(norm_at(2 * t + jnp.arange(2))))
  state = loop(step, jax.jit(tx.init)(PARAMS), 0, STEPS)
  one, other = norms_of(2 * STEPS).reshape(-1, 2).T
  np.testing.assert_allclose(
    state.noise,
    [average(one * other), average(np.square(one - other) / 2)],
    rtol=1e-5,
  )
  assert state.recorded == STEPS


@pytest.mark.parametrize('debias', [False, True])
@pytest.mark.parametrize('decay', [0.99, 0.999, DECAY])
def test_running_moments_are_those_of_float64(debias, decay):
  def step(running, t):
    mean = norm_at(t)[None]
    moments = optax_ghm.Moments(jnp.ones(1), mean, jnp.square(mean))
    return running.update(moments, momentum=decay)

  running = loop(step, RunningMoments.init((1,), debias), 0, STEPS)
  mean, var = average(norms_of(), decay), average(norms_of() ** 2, decay)
  np.testing.assert_allclose(running.mean, [mean], rtol=1e-5)
  np.testing.assert_allclose(running.var, [var], rtol=1e-5)
  np.testing.assert_allclose(running.weight, [1.0], rtol=short_of_1(decay))


@pytest.mark.parametrize('kind', ['BinnedDensity', 'MMDetectionDensity'])
def test_a_running_histogram_is_that_of_float64(kind):
  density = getattr(harmonization, kind)(bins=4, momentum=0.999)

  def step(state, t):
    g = jnp.where(t % 1000 == 500, jnp.nan, uniform(3 * t + jnp.arange(3)))
    return density.update(g, state)[1]

  state = loop(step, density.init(), 0, STEPS)
  g = np.asarray(jax.jit(uniform)(np.arange(3 * STEPS))).reshape(STEPS, 3)
  g = np.delete(g, np.s_[500::1000], axis=0)
  counts = (np.floor(4 * g)[..., None] == np.arange(4)).sum(1)
  expected = average(counts, 0.999)
  if kind == 'MMDetectionDensity':  # a bin moves when it is not empty
    expected = [average(n[n > 0], 0.999) for n in counts.T]
  np.testing.assert_allclose(
    state.histogram / state.evidence, expected, rtol=short_of_1(0.999)
  )
  np.testing.assert_allclose(state.evidence, 1.0, rtol=short_of_1(0.999))
  assert state.non_finite == 3 * STEPS / 1000


@pytest.mark.parametrize('percentile', [10.0, 97.5])
def test_a_window_holds_the_last_norms_and_its_percentile(percentile):
  estimator = optax_ghm.WindowPercentile(length=64)
  tx = optax_ghm.clip_by_percentile(percentile, estimator=estimator)
  state = loop(steps_of(tx), jax.jit(tx.init)(PARAMS), 0, STEPS)
  last = norms_of()[-64:]
  np.testing.assert_allclose(state.statistics.ranked, np.sort(last), rtol=1e-6)
  np.testing.assert_allclose(
    state.threshold, np.percentile(last, percentile), rtol=1e-6
  )
  share = 1 - state.clipped / STEPS
  np.testing.assert_allclose(share, percentile / 100, atol=0.02)


@pytest.mark.parametrize('percentile', [10.0, 50.0, 97.5])
def test_a_quantile_has_its_share_of_the_norms_below(percentile):
  """Exactly so in the long run: else the logarithm would run away."""
  tx = optax_ghm.clip_by_percentile(
    percentile, estimator=optax_ghm.GeometricQuantile(learning_rate=0.01)
  )
  state = loop(steps_of(tx), jax.jit(tx.init)(PARAMS), 0, MANY)
  np.testing.assert_allclose(state.threshold, 0.5 + percentile / 100, rtol=0.1)
  share = 1 - state.clipped / MANY
  np.testing.assert_allclose(share, percentile / 100, atol=2e-4)


def test_a_window_of_losses_and_norms_is_the_last_one():
  tx = optax_ghm.skip_spikes(optax.sgd(0.1))

  def step(state, t):
    value = norm_at(t)
    return tx.update(of_norm(value), state, PARAMS, value=value)[1]

  state = loop(step, jax.jit(tx.init)(PARAMS), 0, STEPS)
  before = norms_of()[-129:-1]  # what the last step was compared with
  limit = before.mean() + 6 * before.std(ddof=1)
  for threshold, recent in (
    (state.norm_threshold, state.recent_norms),
    (state.value_threshold, state.recent_values),
  ):
    np.testing.assert_allclose(threshold, limit, rtol=1e-5)
    assert recent.recorded == STEPS
  assert state.skipped == 0


def test_a_state_of_the_backward_pass_is_the_plain_one():
  """Its integers, as pairs of floats, are exact."""
  tx = optax_ghm.clip_by_zscore(1.0)
  identity = optax_ghm.in_backward(tx)

  def step(state, t):
    def loss(state):
      x = identity(jnp.ones(()), state)
      return x * norm_at(t)

    return optax_ghm.overwrite_with_gradient(state, jax.grad(loss)(state))

  x = np.ones((), np.float32)
  state = loop(step, jax.jit(identity.init)(x), 0, STEPS)
  plain = loop(
    lambda state, t: tx.update(norm_at(t), state)[1],
    jax.jit(tx.init)(x),
    0,
    STEPS,
  )
  unpacked = jax.jit(identity.unpack)(state, x)
  chex.assert_trees_all_close(unpacked, plain, rtol=1e-5)
  assert plain.statistics.recorded == STEPS


def test_renormalization_settles_on_what_evaluation_sees():
  r_max, d_max = optax_ghm.renorm_schedules()
  x_at = lambda t: norm_at(8 * t + jnp.arange(8))[:, None]  # noqa: E731

  def normalize(running, t):
    return optax_ghm.batch_renorm(
      x_at(t), running, r_max=r_max(t), d_max=d_max(t)
    )

  def step(running, t):
    _, moments = normalize(running, t)
    return running.update(moments, unbiased=True)

  init = jax.jit(lambda: RunningMoments.init((1,)))()
  running = loop(step, init, 0, STEPS)
  np.testing.assert_allclose(running.mean, [1.0], rtol=0.05)
  np.testing.assert_allclose(running.var, [1 / 12], rtol=0.15)

  @jax.jit
  def both(running):
    evaluated = optax_ghm.batch_norm_inference(x_at(STEPS), running)
    return normalize(running, STEPS)[0], evaluated

  trained, evaluated = both(running)
  np.testing.assert_allclose(trained, evaluated, rtol=1e-4, atol=1e-5)


# The end of what counters hold.


def is_counter(name, leaf):
  """Whether it only grows."""
  restarts = 'in_a_row' in name or 'heads_clipped' in name
  return leaf.dtype == np.int32 and not restarts


def raised(state):
  """With counters one before the largest integer."""

  def raise_(path, leaf):
    if not is_counter(jax.tree_util.keystr(path), leaf):
      return leaf
    return np.full_like(leaf, TOP - 1)

  return jax.tree_util.tree_map_with_path(raise_, state)


@pytest.mark.parametrize('entry', ENTRIES, ids=lambda entry: entry.name)
def test_counters_stop_at_the_largest_integer(entry):
  step, init = step_of_entry(entry)
  before = raised(loop(step, init, 0, 100))
  after = named(loop(step, before, 490, 510))  # with a step that is NaN
  for name, one in after.items():
    assert np.isfinite(one).all(), name
    if is_counter(name, one):
      assert (one >= (0 if 'notfinite' in name else TOP - 1)).all(), name
    if name.endswith(('recorded', 'reversals', 'skipped', 'bad_steps')):
      assert (one == TOP).any() or 'recent_values' in name, name


def test_a_riding_counter_stops_at_the_largest_integer():
  tx, x = optax_ghm.clip_by_norm(1.0), np.ones((), np.float32)
  full = jax.jit(tx.init)(x)._replace(clipped=np.int32(TOP - 1))
  identity = optax_ghm.in_backward(tx)
  # To begin there: what init makes of the state of this transformation.
  at_the_end = optax_ghm.in_backward(
    optax.GradientTransformation(lambda params: full, tx.update)
  )

  def step(state, t):
    gradient = jax.grad(lambda state: (9.0 + 0 * t) * identity(x, state))(state)
    return optax_ghm.overwrite_with_gradient(state, gradient)

  unpack = jax.jit(identity.unpack)
  state = jax.jit(at_the_end.init)(x)
  assert unpack(state, x).clipped == TOP - 1
  for stop, expected in ((1, TOP), (3, TOP)):
    state = loop(step, state, 0, stop)
    assert unpack(state, x).clipped == expected


def test_units_stay_dead_where_float32_counts_no_further():
  tx = flow.watch(optax.sgd(0.1))
  step = steps_of(tx, lambda t: of_norm(jnp.maximum(t, 3.0) - 3))
  state = tx.init(PARAMS)
  state = state._replace(zero_steps=jnp.full_like(state.zero_steps, 2.0**24))
  state = loop(step, state, 0, 3)
  np.testing.assert_array_equal(state.dead_units, state.units)
  state = loop(step, state, 4, 5)
  np.testing.assert_array_equal(state.dead_units, jnp.zeros(2))


SCHEDULES = {
  'dann_reversal': (optax_ghm.dann_reversal_schedule(STEPS, 0.5), 0.5),
  'dann_learning_rate': (
    optax_ghm.dann_learning_rate_schedule(STEPS, 1.0),
    11**-0.75,
  ),
  'renorm_r': (optax_ghm.renorm_schedules(3.0, r_end=STEPS)[0], 3.0),
  'renorm_d': (optax_ghm.renorm_schedules(d_max=5.0, d_end=STEPS)[1], 5.0),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_go_one_way_and_stay_where_they_end(name):
  schedule, end = SCHEDULES[name]
  of_each = jax.jit(jax.vmap(schedule))
  each = np.asarray(of_each(np.arange(STEPS + 10)), np.float64)
  moves = np.diff(each) * np.sign(each[-1] - each[0])
  assert moves.min() > -1e-6 and moves.max() < 1e-4
  np.testing.assert_allclose(each[-10:], np.full(10, end), rtol=1e-4)
  for count in (2**24 + 1, TOP - 1, TOP):
    last = of_each(np.full(STEPS + 10, count, np.int32))
    np.testing.assert_array_equal(last[0], np.float32(each[-1]))


# What is kept on the host.


def test_a_record_of_many_steps_keeps_what_fits():
  record = flow.Record(capacity=16)
  for t in range(20_000):
    record.add(t, loss=float(t))
  assert len(record) <= 16 and record.steps[-1] == 19_999
  np.testing.assert_array_equal(record.scalars['loss'], record.steps)


def test_a_range_test_of_many_steps_keeps_no_square_of_them():
  tracemalloc.start()
  optax_ghm.learning_rate_range_test(
    lambda x, shift: jnp.square(x - shift),
    jnp.ones(()),
    jnp.zeros(1),
    steps=10_000,
  )
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1e4**2  # bytes
