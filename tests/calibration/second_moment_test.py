"""Clipping single numbers by their second moment, against the paper's rule."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

RATIO, DECAY = 500.0, 0.99  # the second step of a constant passes
TX = optax_ghm.clip_by_second_moment(RATIO, decay=DECAY)
SHAPE = (2, 3)


@jax.jit
def scanned(steps):
  """The updates and the states of all steps, from the start."""

  def step(state, grads):
    updates, state = TX.update(grads, state)
    return state, (updates, state)

  first = jax.tree.map(lambda g: g[0], steps)
  return jax.lax.scan(step, TX.init(first), steps)[1]


def run(steps):
  return jax.tree.map(np.asarray, scanned(steps))


def by_hand(steps, ratio=RATIO, decay=DECAY):
  """One leaf in float64: updates, second moments, and what was clipped."""
  v, updates, moments, clipped = np.zeros(steps.shape[1:]), [], [], []
  in_a_row = 0
  for g in steps:
    size, limit = np.abs(g), np.sqrt(ratio * v)
    above = (v != 0) & (size > limit)
    update = np.where(above, g / np.where(above, size, 1) * limit, g)
    finite = np.isfinite(g).all()
    absurd = finite and 0 < 1e4 * np.sqrt(v.sum()) < np.linalg.norm(g)
    if not finite:
      update = np.zeros_like(g)
    elif g.any() and not (absurd and in_a_row < 20):
      v = decay * v + (1 - decay) * np.abs(update) ** 2
    in_a_row = in_a_row + 1 if absurd else 0
    updates.append(update)
    moments.append(v)
    clipped.append(above)
  return np.array(updates), np.array(moments), np.array(clipped)


def calm(seed=0, steps=120):
  rng = np.random.default_rng(seed)
  sizes = 10 ** rng.uniform(-3, 3, SHAPE)
  return (rng.normal(size=(steps, *SHAPE)) * sizes).astype(np.float32)


SPIKES = {
  (15, 0, 1): 80.0,
  (40, 1, 2): 1e3,
  (41, 1, 2): 1e3,
  (41, 0, 0): 300.0,
  (60, 1, 0): 1e7,
  (90, 0, 2): 1e25,
}


def with_spikes(steps):
  steps = steps.copy()
  for at, factor in SPIKES.items():
    steps[at] *= factor
  return steps


# The rule.


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_numbers_are_clipped_as_the_paper_says(seed):
  steps = with_spikes(calm(seed))
  updates, states = run({'w': steps})
  expected, moments, clipped = by_hand(steps.astype(np.float64))
  np.testing.assert_allclose(updates['w'], expected, rtol=1e-4)
  np.testing.assert_allclose(states.second_moment['w'], moments, rtol=1e-4)
  np.testing.assert_allclose(
    states.elements_clipped, clipped.mean((1, 2)), rtol=1e-6
  )
  assert not states.bad_steps.any()
  for at in list(SPIKES)[1:]:
    assert clipped[at] and expected[at] != steps[at]


def test_the_defaults_are_those_of_the_paper():
  """From 5,000 times the second moment, of a decay of 0.999."""
  tx = optax_ghm.clip_by_second_moment()
  steps = with_spikes(calm())[:50]
  state, update = tx.init(jnp.zeros(SHAPE)), jax.jit(tx.update)
  expected, _, clipped = by_hand(steps.astype(np.float64), 5000.0, 0.999)
  for g, update_by_hand in zip(steps, expected, strict=True):
    u, state = update(g, state)
    np.testing.assert_allclose(u, update_by_hand, rtol=1e-4)
  assert 0 < clipped.sum() < 10


def test_without_spikes_everything_passes_bit_for_bit():
  """From the second step on: its moment is of one step alone."""
  steps = np.sign(calm()) * np.float32(3)
  updates, states = run({'w': steps})
  np.testing.assert_array_equal(updates['w'], steps)
  assert not states.elements_clipped.any()


SPECIAL = [0.0, -0.0, 1e-30, 1e-10, 1.0, -7.0, 1e4, -1e10, 1e30]
NUMBERS = st.sampled_from(SPECIAL) | st.floats(-100, 100, width=32)


@given(hnp.arrays(np.float32, (4, *SHAPE), elements=NUMBERS))
def test_no_number_grows_turns_or_passes_its_limit(steps):
  """Whatever they are; and what is not above it passes bit for bit."""
  updates, states = run({'w': steps})
  updates, moments = updates['w'], states.second_moment['w']
  chex.assert_tree_all_finite((updates, states))
  assert (np.abs(updates) <= np.abs(steps) * (1 + 1e-6)).all()
  assert (updates * np.sign(steps) >= 0).all()
  np.testing.assert_array_equal(updates[0], steps[0])  # nothing is known yet
  for t in range(1, len(steps)):
    limit = np.sqrt(RATIO) * np.sqrt(moments[t - 1].astype(np.float64))
    known = limit > 0
    assert (np.abs(updates[t])[known] <= limit[known] * (1 + 1e-5)).all()
    passes = ~known | (np.abs(steps[t]) < limit * (1 - 1e-5))
    np.testing.assert_array_equal(updates[t][passes], steps[t][passes])


def test_what_has_been_zero_so_far_passes():
  """Such as the rows of an embedding that were not looked up."""
  steps = calm()
  steps[:50, 0] = 0
  steps[50, 0] = [1e-3, 1.0, 1e30]
  updates, states = run({'w': steps})
  np.testing.assert_array_equal(updates['w'][:51, 0], steps[:51, 0])
  assert not states.second_moment['w'][49, 0].any()
  expected, *_ = by_hand(steps[:, 1:].astype(np.float64))
  np.testing.assert_allclose(updates['w'][:, 1:], expected, rtol=1e-4)


@pytest.mark.parametrize('factor', [1e2, 1e3, 1e5, 1e8])
def test_a_lasting_level_is_learned(factor):
  """As by the paper's rule, where v grows by what it lets through."""
  steps = np.sign(calm(steps=200))
  steps[100:] *= np.float32(factor)
  updates, states = run({'w': steps})
  assert states.elements_clipped[100] == 1
  np.testing.assert_array_equal(updates['w'][-1], steps[-1])


# What bad numbers leave behind.


def last(tree):
  return jax.tree.map(lambda leaf: leaf[-1], tree)


@pytest.mark.parametrize('at', [10, 100])
@pytest.mark.parametrize('bad', [1e30, -1e30, 3e38])
@pytest.mark.parametrize('where', [(1, 2), (1, 0)], ids=['large', 'small'])
def test_an_absurd_number_is_clipped_and_leaves_no_trace(bad, at, where):
  """Neither in itself nor in its neighbours."""
  steps = calm()
  spoilt = steps.copy()
  spoilt[at, *where] = bad
  updates, states = run({'w': spoilt})
  as_usual, _ = run({'w': steps})
  others = np.ones(SHAPE, bool)
  others[where] = False
  np.testing.assert_array_equal(
    updates['w'][:, others], as_usual['w'][:, others]
  )
  left_out, _ = run({'w': np.delete(steps, at, 0)})
  np.testing.assert_array_equal(
    np.delete(updates['w'][:, *where], at), left_out['w'][:, *where]
  )
  limit = np.sqrt(RATIO * np.float64(states.second_moment['w'][at - 1, *where]))
  np.testing.assert_allclose(
    updates['w'][at, *where], np.sign(bad) * limit, rtol=1e-5
  )
  assert states.elements_clipped[at] >= np.float32(1 / 6)
  chex.assert_tree_all_finite((updates, states))


@pytest.mark.parametrize('at', [10, 100])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_bad_leaf_becomes_zero_and_leaves_no_trace(bad, at):
  """The other leaf does not see it."""
  steps, other = calm(), calm(1)
  expected, expected_states = run({'w': steps})
  spoilt = np.insert(steps, at, steps[at], 0)
  spoilt[at, 0, 1] = bad
  longer = np.insert(other, at, other[at], 0)
  updates, states = run({'other': longer, 'w': spoilt})
  assert not updates['w'][at].any()
  np.testing.assert_array_equal(np.delete(updates['w'], at, 0), expected['w'])
  np.testing.assert_array_equal(
    states.second_moment['w'][-1], expected_states.second_moment['w'][-1]
  )
  alone, _ = run({'w': longer})
  np.testing.assert_array_equal(updates['other'], alone['w'])
  np.testing.assert_array_equal(states.bad_steps, np.arange(len(spoilt)) >= at)
  chex.assert_tree_all_finite((updates, states))


@pytest.mark.parametrize('at', [10, 100])
def test_a_step_of_zeros_leaves_no_trace(at):
  steps = calm()
  expected, expected_states = run({'w': steps})
  updates, states = run({'w': np.insert(steps, at, 0, 0)})
  assert not updates['w'][at].any()
  np.testing.assert_array_equal(np.delete(updates['w'], at, 0), expected['w'])
  chex.assert_trees_all_equal(last(states), last(expected_states))


def test_zeros_among_others_do_count():
  """They are what such a number usually is."""
  steps = calm()
  steps[20:, 0, 0] = 0
  _, states = run({'w': steps})
  _, moments, _ = by_hand(steps.astype(np.float64))
  np.testing.assert_allclose(states.second_moment['w'], moments, rtol=1e-4)


def test_a_leaf_that_is_left_out_has_no_clipped_numbers():
  """It is a bad step, and counted as that."""
  steps = np.sign(calm())
  steps[50, 0, 0] = np.nan
  _, states = run({'w': steps})
  assert states.bad_steps[50] == 1
  assert states.elements_clipped[50] == 0


def test_the_count_of_bad_steps_ends_with_int32():
  top = jnp.iinfo(jnp.int32).max
  state = TX.init(jnp.zeros(2))._replace(bad_steps=jnp.int32(top))
  _, state = TX.update(jnp.array([jnp.nan, 1.0]), state)
  assert state.bad_steps == top


# Dtypes.


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_16_bits_are_clipped_in_float32(dtype):
  """The moments are those of float32; the updates are rounded once."""
  steps = calm(steps=60) / 100  # far from the largest float16
  steps[40, 1, 2] *= 500
  rounded = jnp.asarray(steps, dtype)
  updates, states = run({'w': rounded})
  expected, moments, clipped = by_hand(np.asarray(rounded, np.float64))
  assert updates['w'].dtype == dtype and clipped[40, 1, 2]
  assert states.second_moment['w'].dtype == np.float32
  rtol = 2 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    updates['w'].astype(np.float64), expected, rtol=rtol, atol=1e-7
  )
  np.testing.assert_allclose(
    states.second_moment['w'], moments, rtol=2 * rtol, atol=1e-12
  )
  np.testing.assert_allclose(
    states.elements_clipped[40], clipped[40].mean(), rtol=1e-6
  )


def test_complex_numbers_keep_their_direction():
  """And are clipped in size, of which the moment is."""
  sizes = np.abs(with_spikes(calm()))
  angles = np.random.default_rng(2).uniform(0, 2 * np.pi, sizes.shape)
  steps = (sizes * np.exp(1j * angles)).astype(np.complex64)
  updates, states = run({'w': steps})
  expected, moments, clipped = by_hand(steps.astype(np.complex128))
  assert updates['w'].dtype == np.complex64
  assert states.second_moment['w'].dtype == np.float32
  np.testing.assert_allclose(updates['w'], expected, rtol=1e-4)
  np.testing.assert_allclose(states.second_moment['w'], moments, rtol=1e-4)
  assert clipped.sum() >= len(SPIKES) - 1
  ratio = updates['w'][clipped] / steps[clipped].astype(np.complex128)
  np.testing.assert_allclose(ratio.imag, 0, atol=1e-6)
  assert (ratio.real < 1).all()


def test_moments_only_where_there_are_gradients():
  params = {
    'bf16': jnp.ones(2, jnp.bfloat16),
    'complex': jnp.ones(3, jnp.complex64),
    'int': jnp.arange(3),
    'none': None,
    'empty': jnp.ones((0, 2)),
  }
  state = TX.init(params)
  moments = state.second_moment
  assert moments['bf16'].dtype == moments['complex'].dtype == jnp.float32
  assert moments['int'] == moments['empty'] == optax.MaskedNode()
  assert moments['none'] is None
  updates, state = TX.update(params, state)
  chex.assert_trees_all_equal(updates, params, strict=True)
  assert state.elements_clipped == 0
  # The share is of the numbers that have one.
  big = params | {'bf16': 40 * params['bf16']}
  _, state = TX.update(big, state)
  np.testing.assert_allclose(state.elements_clipped, 2 / 5, rtol=1e-6)


# Devices.


def sharded_steps():
  rng = np.random.default_rng(0)
  steps = {
    'w': rng.normal(size=(30, 16, 4)).astype(np.float32),
    'b': rng.normal(size=(30, 8)).astype(np.float32),
  }
  steps['w'][20, 3, 1] = 1e30
  steps['w'][25, ::5] *= 100
  steps['b'][15, 6] = np.nan
  return steps


def all_steps(tx, steps, state):
  def step(state, grads):
    updates, state = tx.update(grads, state)
    return state, (updates, state.elements_clipped)

  return jax.lax.scan(step, state, steps)


@functools.cache
def unsharded():
  steps = sharded_steps()
  state = TX.init(jax.tree.map(lambda leaf: leaf[0], steps))
  expected = jax.jit(functools.partial(all_steps, TX))(steps, state)
  assert expected[0].bad_steps == 1
  assert expected[1][1][25] > 0.1
  return state, expected


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit(kind):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(kind,))
  state, expected = unsharded()
  with jax.set_mesh(mesh):
    steps = jax.device_put(
      sharded_steps(), NamedSharding(mesh, P(None, 'model'))
    )
    moments = jax.device_put(
      state.second_moment, NamedSharding(mesh, P('model'))
    )
    args = steps, state._replace(second_moment=moments)
    compiled = jax.jit(functools.partial(all_steps, TX)).lower(*args).compile()
    actual = compiled(*args)
    moment = actual[0].second_moment['w']
    assert moment.sharding.is_equivalent_to(NamedSharding(mesh, P('model')), 2)
  assert 'all-gather' not in compiled.as_text()
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-5
  )


def test_shard_map():
  """A bad number on one device makes the leaf 0 on all of them."""
  mesh = jax.make_mesh((8,), ('model',), axis_types=(AxisType.Auto,))
  tx = optax_ghm.clip_by_second_moment(RATIO, decay=DECAY, axis_name='model')
  state, expected = unsharded()
  specs = jax.tree.map(lambda leaf: P(), state)._replace(
    second_moment={'w': P('model'), 'b': P('model')}
  )
  mapped = jax.jit(
    jax.shard_map(
      functools.partial(all_steps, tx),
      mesh=mesh,
      in_specs=(P(None, 'model'), specs),
      out_specs=(specs, (P(None, 'model'), P())),
    )
  )
  actual = mapped(sharded_steps(), state)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5)
  assert not actual[1][0]['b'][15].any()
