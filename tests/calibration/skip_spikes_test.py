"""Spikes are skipped by the rule, and leave nothing behind."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support.oracles_calibration import spikes

pytestmark = pytest.mark.device

LENGTH, SIGMAS, ROW, STEPS = 64, 6.0, 5, 156
NONE = np.finfo(np.float32).max
DIRECTION = np.array([[0.6, -0.8], [0.0, 0.0]], np.float32)
PARAMS = {'w': np.ones((2, 2), np.float32), 'none': None}


def skipping(optimizer, length=LENGTH, row=ROW):
  return optax_ghm.skip_spikes(
    optimizer,
    sigmas=SIGMAS,
    window=optax_ghm.SpikeWindow(length=length),
    max_consecutive=row,
  )


OPTIMIZERS = {
  'sgd': optax.sgd(0.5),
  'adamw': optax.adamw(0.1, weight_decay=0.1),
  'adamw of a schedule': optax.adamw(optax.linear_schedule(0.1, 0.01, 50)),
  'adafactor': optax.adafactor(0.1, min_dim_size_to_factor=2),
}


@functools.cache
def scanned(name, length=LENGTH, row=ROW):
  """Compiles a scan over the steps of a stream of norms and losses."""
  tx = skipping(OPTIMIZERS[name], length, row)

  @jax.jit
  def run(norms, values):
    def step(state, of_step):
      norm, value = of_step
      grads = {'w': norm * DIRECTION, 'none': None}
      updates, state = tx.update(grads, state, PARAMS, value=value)
      return state, (updates['w'], state)

    return jax.lax.scan(step, tx.init(PARAMS), (norms, values))[1]

  return run


def run(name, norms, values=None, **kwargs):
  """The updates, and the state after each step; of streams of one length."""
  count, steps = len(norms), max(len(norms), STEPS) if not kwargs else None

  def padded(x):
    x = np.asarray(x, np.float32)
    return np.append(x, np.ones((steps or count) - count, np.float32))

  with jax.numpy_dtype_promotion('standard'):  # Optax mixes ints and floats
    results = scanned(name, **kwargs)(
      padded(norms), None if values is None else padded(values)
    )
  return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], results)


by_hand = functools.partial(spikes, length=LENGTH, row=ROW)


def calm(seed=0, steps=150):
  rng = np.random.default_rng(seed)
  norms = rng.lognormal(0.0, 0.1, steps).astype(np.float32)
  values = (2 + 0.1 * rng.normal(size=steps)).astype(np.float32)
  return norms, values


# The rule.


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('with_value', [False, True])
def test_steps_are_left_out_as_the_rule_says(seed, with_value):
  norms, values = calm(seed)
  norms[[20, 60, 61, 120]] *= [10, 100, 1e6, 3]
  values[[30, 60, 90]] += [5, 50, 1e4]
  norms[40], values[50], norms[70] = np.nan, np.inf, 0
  values[71] = np.nan
  norms[130:] *= 30  # for good
  values = values if with_value else None
  taken, in_a_row, *limits = by_hand(norms, values)
  updates, states = run('sgd', norms, values)

  np.testing.assert_array_equal(states.skipped, np.cumsum(~taken))
  np.testing.assert_array_equal(states.skipped_in_a_row, in_a_row)
  np.testing.assert_allclose(
    updates,
    np.where(taken & (norms > 0), -0.5 * norms, 0)[:, None, None] * DIRECTION,
    rtol=1e-6,
  )
  for actual, expected in zip(
    (states.norm_threshold, states.value_threshold), limits, strict=True
  ):
    np.testing.assert_allclose(
      np.where(actual == NONE, np.inf, actual), expected, rtol=1e-4
    )
  # The events that the stream is made for do happen.
  assert not taken[[20, 40, 60, 61]].any() and taken[70]
  assert taken[30] == (not with_value)
  assert not taken[130:135].any() and taken[135:].all()
  assert np.isinf(limits[0][:8]).all() and np.isfinite(limits[0][8:135]).all()


NUMBERS = [0.0, 1e-30, 0.5, 1.0, 1.0, 1.1, 1.2, 2.0, 40.0, 1e5, 1e30]
NUMBERS += [np.nan, np.inf]


@given(
  st.lists(st.sampled_from(NUMBERS), min_size=24, max_size=24),
  st.lists(st.sampled_from([*NUMBERS, -1.0, -30.0]), min_size=24, max_size=24),
)
def test_any_stream_at_all(norms, values):
  """With a window of four and two skips in a row, everything happens soon."""
  taken, in_a_row, *limits = spikes(norms, values, length=4, row=2)
  with np.errstate(invalid='ignore', divide='ignore'):
    for x, own in zip((norms, values), limits, strict=True):
      assume(not (np.abs(np.array(x) / own - 1) < 3e-6).any())
  before = np.append(0, in_a_row[:-1])
  # The window of norms does not see a step of zeros.
  assume((np.array(norms)[taken & (before == 2)] > 0).all())
  updates, states = run('sgd', norms, values, length=4, row=2)
  np.testing.assert_array_equal(states.skipped, np.cumsum(~taken))
  np.testing.assert_array_equal(states.skipped_in_a_row, in_a_row)
  both = np.add(norms, values)
  # An infinite norm is that of a gradient of inf and 0 · inf.
  nan = np.isnan(both) | np.isinf(norms)
  np.testing.assert_array_equal(states.nan_steps, np.cumsum(nan))
  np.testing.assert_array_equal(
    states.inf_steps, np.cumsum(np.isinf(both) & ~nan)
  )
  finite = states.norm_spikes + states.value_spikes
  assert (finite >= np.cumsum(~taken & np.isfinite(both))).all()
  chex.assert_tree_all_finite((updates, states))
  assert not updates[~taken].any()


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_the_scale_of_the_gradients_is_no_matter(scale):
  norms, values = calm()
  norms[[50, 51, 100]] *= [30, 1e5, 2.5]
  _, expected = run('sgd', norms, values)
  _, actual = run('sgd', norms * np.float32(scale), values)
  np.testing.assert_array_equal(actual.skipped, expected.skipped)
  assert actual.skipped[-1] == 3
  known = expected.norm_threshold < NONE
  np.testing.assert_allclose(
    actual.norm_threshold[known],
    expected.norm_threshold[known] * np.float32(scale),
    rtol=1e-4,
  )


@functools.cache
def of_identity():
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
  state, scaled = (of_identity()(np.ldexp(norms, p)) for p in (0, power))
  assert int(state.skipped) == int(scaled.skipped)
  np.testing.assert_allclose(
    scaled.norm_threshold,
    np.ldexp(np.float64(state.norm_threshold), power),
    rtol=1e-5,
  )


@pytest.mark.parametrize('level', [2.5, -2.5, 0.1])
def test_equal_numbers_differ_by_rounding_only(level):
  """A change of the last bit of a constant is not a spike."""
  values = np.full(150, level, np.float32)
  values[90] += 2 * np.spacing(np.abs(values[90]))
  values[110] -= 2 * np.spacing(np.abs(values[110]))  # above if negative
  _, states = run('sgd', np.abs(values), values)
  assert states.skipped[-1] == 0
  values[100] += np.float32(1e-3)
  _, states = run('sgd', np.abs(values), values)
  assert states.skipped[-1] == 1


# What a skipped step leaves behind.


def without(tree, at):
  return jax.tree.map(lambda leaf: np.delete(leaf, at, 0), tree)


@pytest.mark.parametrize('name', ['adamw', 'adamw of a schedule', 'adafactor'])
def test_the_optimizer_does_not_know_of_spikes(name):
  """Moments, counts and schedules are bit for bit those without spikes."""
  norms, values = calm()
  expected, expected_states = run(name, norms, values)
  assert expected_states.skipped[-1] == 0
  at = np.array([15, 16, 60, 61, 62, 140])
  spikes = np.array([np.nan, 20, 1, 1e30, 1, np.inf])
  losses = np.array([2, 2, 9, 2, np.nan, 1e30])
  places = at - np.arange(len(at))
  updates, states = run(
    name, np.insert(norms, places, spikes), np.insert(values, places, losses)
  )
  assert states.skipped[-1] == len(at)
  assert not updates[at].any()
  np.testing.assert_array_equal(without(updates, at), expected)
  chex.assert_trees_all_equal(
    without(states.optimizer, at), expected_states.optimizer
  )
  for i in at:
    chex.assert_trees_all_equal(
      *(
        jax.tree.map(lambda leaf, j=j: leaf[j], states.optimizer)
        for j in (i, i - 1)
      )
    )


@pytest.mark.parametrize('at', [10, 100])
@pytest.mark.parametrize('bad', [np.nan, -np.inf, 3e38])
@pytest.mark.parametrize('of', ['norm', 'value', 'both'])
def test_a_bad_step_leaves_no_trace(of, bad, at):
  norms, values = calm()
  if of != 'value':
    bad_norm = abs(bad)
  else:
    bad_norm = norms[at]
  bad_value = bad if of != 'norm' else values[at]
  expected, expected_states = run('adamw', norms, values)
  updates, states = run(
    'adamw', np.insert(norms, at, bad_norm), np.insert(values, at, bad_value)
  )
  assert not updates[at].any()
  np.testing.assert_array_equal(without(updates, at), expected)
  last, expected_last = (
    jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, expected_states)
  )
  # An infinite norm is that of a gradient of inf and 0 · inf.
  is_nan = np.isnan(bad) or (np.isinf(bad) and of != 'value')
  kinds = {
    'nan_steps': is_nan,
    'inf_steps': np.isinf(bad) and not is_nan,
    'norm_spikes': 1 < bad < np.inf and of != 'value',
    'value_spikes': 1 < bad < np.inf and of != 'norm',
  }
  assert last.skipped == 1
  for kind, happened in kinds.items():
    assert getattr(last, kind) == happened, kind
  none = dict.fromkeys(['skipped', *kinds], 0)
  chex.assert_trees_all_equal(last._replace(**none), expected_last)
  chex.assert_tree_all_finite(states)


@pytest.mark.parametrize('at', [10, 100])
def test_a_step_of_zeros_is_no_norm(at):
  """The optimizer takes the step; the window of norms does not see it."""
  norms, _ = calm()
  expected, expected_states = run('sgd', norms)
  updates, states = run('sgd', np.insert(norms, at, 0.0))
  np.testing.assert_array_equal(without(updates, at), expected)
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, expected_states))
  )
  assert states.skipped[-1] == 0 and states.norm[at] == 0
  assert states.recent_norms.recorded[at] == at


def test_a_lasting_level_is_learned():
  """Training goes on after so many skipped steps in a row."""
  norms, values = calm()
  norms[100:] *= 100
  updates, states = run('adamw', norms, values)
  moved = updates.any((1, 2))
  assert moved[:100].all() and not moved[100 : 100 + ROW].any()
  assert moved[100 + ROW :].all()
  assert states.skipped[-1] == ROW
  # Both windows are reset by the step that is taken.
  np.testing.assert_array_equal(
    states.recent_norms.recorded[99 + ROW : 102 + ROW], [100, 1, 2]
  )
  np.testing.assert_array_equal(
    states.recent_values.recorded[99 + ROW : 102 + ROW], [100, 1, 2]
  )
  np.testing.assert_array_equal(
    states.recent_norms.values[100 + ROW],
    np.where(np.arange(LENGTH) == 0, norms[100 + ROW], 0),
  )
  # A spike on the new level is skipped again.
  norms[140] *= 100
  _, states = run('adamw', norms, values)
  assert states.skipped[-1] == ROW + 1


def test_both_windows_are_reset_also_by_a_step_of_zeros():
  """A lasting level of the loss is taken in a step of zeros."""
  norms, values = calm()
  values[50:] += 30
  norms[50 + ROW] = 0
  norms[51 + ROW] *= 50  # with nothing to compare it with
  taken, *_ = by_hand(norms, values)
  assert taken[50 + ROW :].all()
  _, states = run('sgd', norms, values)
  np.testing.assert_array_equal(
    states.recent_values.recorded[49 + ROW : 52 + ROW], [50, 1, 2]
  )
  np.testing.assert_array_equal(
    states.recent_norms.recorded[49 + ROW : 52 + ROW], [50, 0, 1]
  )
  assert states.skipped[-1] == ROW


def test_bad_numbers_in_between_do_not_count_as_a_level():
  norms, values = calm()
  norms[100:] *= 100
  norms[100:150:2] = np.nan
  _, states = run('adamw', norms, values)
  np.testing.assert_array_equal(
    states.skipped_in_a_row[100:112], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0]
  )


def test_no_number_of_nans_is_taken():
  norms, values = calm()
  norms[20:] = np.nan
  updates, states = run('adamw', norms, values)
  assert not updates[20:].any()
  np.testing.assert_array_equal(states.norm[20:], norms[19])
  assert states.skipped[-1] == len(norms) - 20


def test_spikes_are_still_seen_where_the_counts_end():
  top, update = np.iinfo(np.int32).max, jax.jit(skipping(optax.sgd(0.5)).update)
  state = jax.tree.map(
    lambda s: np.full_like(s[-1], top) if s.dtype == np.int32 else s[-1],
    run('sgd', *calm())[1],
  )._replace(skipped_in_a_row=np.int32(0))
  for norm, skipped in ((1.0, False), (30.0, True), (1.0, False)):
    grads = {'w': np.float32(norm) * DIRECTION, 'none': None}
    updates, state = update(grads, state, PARAMS, value=2.0)
    assert np.any(updates['w']) != skipped
    assert state.skipped == state.recent_norms.recorded == top


def test_the_window_goes_around():
  """The window ends with the last good steps, whatever came between."""
  norms, values = calm()
  norms[[70, 149]] = np.nan, 1e30
  _, states = run('sgd', norms, values)
  good = np.delete(norms, [70, 149])
  np.testing.assert_allclose(
    np.sort(states.recent_norms.values[-1]), np.sort(good[-LENGTH:]), rtol=1e-6
  )
  np.testing.assert_array_equal(
    np.sort(states.recent_values.values[-1]),
    np.sort(np.delete(values, [70, 149])[-LENGTH:]),
  )


# The loss.


@pytest.mark.parametrize(
  'as_given', [float, np.float32, jnp.bfloat16, int], ids=str
)
def test_a_loss_of_any_kind(as_given):
  tx = skipping(optax.sgd(0.5), 16)
  grads, state = {'w': DIRECTION, 'none': None}, jax.jit(tx.init)(PARAMS)
  update = jax.jit(tx.update)
  for loss in np.float32([2, 3, 2, 3, 64]):
    updates, state = update(grads, state, PARAMS, value=as_given(loss))
  assert state.skipped == 1 and not np.any(updates['w'])
  np.testing.assert_allclose(state.value_threshold, 2.5 + 6 / 3**0.5, rtol=1e-6)
  np.testing.assert_array_equal(
    np.asarray(state.recent_values.values)[:5], [2, 3, 2, 3, 0]
  )


@chex.dataclass
class Heard:
  values: jax.Array
  others: jax.Array


def listening():
  """Returns a transformation that sums its extra arguments."""

  def update(updates, state, params=None, *, value, other):
    return updates, Heard(
      values=state.values + value, others=state.others + other
    )

  return optax.GradientTransformationExtraArgs(
    lambda params: Heard(values=jnp.zeros([]), others=jnp.zeros([])), update
  )


def test_the_optimizer_hears_the_loss_too():
  tx = skipping(listening(), 16)
  state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
  grads = {'w': DIRECTION, 'none': None}
  for loss in (2.0, 3.0, 2.0, 64.0, np.nan, 3.0):
    _, state = update(grads, state, PARAMS, value=loss, other=1.0)
  assert state.skipped == 2
  assert state.optimizer.values == 10 and state.optimizer.others == 4


def test_reduce_on_plateau_inside_sees_the_steps_that_are_taken():
  plateau = optax.chain(
    optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=3, cooldown=1)
  )
  tx, losses = skipping(plateau, 16), [2.0, 3.0, 2.0, 3.0, 2.0, 2.0, 3.0, 3.0]

  grads = {'w': DIRECTION, 'none': None}

  def run(tx, losses):
    def step(state, loss):
      updates, state = tx.update(grads, state, PARAMS, value=loss)
      return state, updates

    state, updates = jax.lax.scan(step, tx.init(PARAMS), jnp.float32(losses))
    return jax.tree.map(lambda u: u[-1], updates), state

  with jax.numpy_dtype_promotion('standard'):
    expected, expected_state = jax.jit(lambda: run(plateau, losses))()
    spiky = [*losses[:4], 90.0, 1e30, *losses[4:]]
    updates, state = jax.jit(lambda: run(tx, spiky))()
  assert state.skipped == 2
  chex.assert_trees_all_close(
    (updates, state.optimizer), (expected, expected_state), rtol=1e-6
  )
  assert expected_state[1].scale < 1


def test_without_a_loss_the_window_of_losses_stays_empty():
  norms, _ = calm()
  _, states = run('sgd', norms)
  assert (states.value_threshold == NONE).all()
  assert states.recent_values.recorded[-1] == 0
  assert states.recent_norms.recorded[-1] == len(norms)


@pytest.mark.parametrize('length', [1, 0, -3])
def test_a_window_is_of_two_or_more(length):
  with pytest.raises(ValueError, match=str(length)):
    optax_ghm.SpikeWindow(length=length)


def test_a_loss_that_is_not_a_scalar_is_named():
  tx = skipping(optax.sgd(0.5))
  with pytest.raises(ValueError, match='value'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=np.ones(2))


def test_windows_are_equal_by_value_and_named():
  assert optax_ghm.SpikeWindow(length=9) == optax_ghm.SpikeWindow(length=9)
  assert hash(optax_ghm.SpikeWindow()) == hash(
    optax_ghm.SpikeWindow(length=128)
  )
  with pytest.raises(TypeError):
    optax_ghm.SpikeWindow(9)


def test_the_smallest_window():
  """The third step is compared with the two before."""
  norms = [1.0, 1.5, 1.25 + 7 / 8**0.5, 1.2]
  taken, *_ = spikes(norms, None, length=2, row=ROW)
  _, states = run('sgd', norms, length=2)
  np.testing.assert_array_equal(states.skipped, np.cumsum(~taken))
  assert taken.tolist() == [True, True, False, True]
