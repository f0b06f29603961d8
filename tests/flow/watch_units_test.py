"""Dead units, moments, and steps that a watched optimizer does not measure."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm as ghm
from optax_ghm import flow
from tests.support.oracles_flow import assert_columns, moments
from tests.support.watched import ONES, at, make_params, random, run, train

device = pytest.mark.device

# Dead units.


DEAD_AFTER = 10
UNITS = {  # shape, what is silent, units, how many of them
  'bias': ((3,), [0], 3, 1),
  'kernel': ((2, 3), [np.s_[:]], 0, 0),  # its units are those of its bias
  'a/kernel': ((4, 3), [np.s_[:, 1]], 3, 1),
  'b/kernel': ((3, 3, 2, 5), [np.s_[..., :2]], 5, 2),
  'c/bias': ((4,), [np.s_[1:]], 4, 3),
  'c/kernel': ((2, 4), [np.s_[:]], 0, 0),
  'd/scale': ((4,), [0], 4, 1),
  'e/query/kernel': ((6, 2, 3), [np.s_[:, 1, :]], 6, 3),
  'f/scalar': ((), [...], 1, 1),
  'g/embedding': ((7, 3), [np.s_[:]], 0, 0),
  'h/kernel': ((2, 3, 4), [np.s_[0, :, :2], np.s_[1, :, 1:]], 4, 3),  # a stack
  'nan/kernel': ((2, 2), [], 2, 0),
  'reset/kernel': ((4, 3), [np.s_[:, :2]], 3, 2),
}


@device
def test_a_unit_is_dead_after_exactly_ten_steps_without_gradient(rng):
  gradients = {}
  for name, (shape, silent, _, _) in UNITS.items():
    gradients[name] = np.array(random(rng, shape))
    for where in silent:
      gradients[name][where] = 0
  gradients['nan/kernel'][:] = [np.nan, np.inf]  # which is a gradient
  params = jax.tree.map(np.ones_like, gradients)
  steps = {k: np.stack([u] * 23) for k, u in gradients.items()}
  steps['reset/kernel'][12, 2, 0] = 1e-30  # one gradient, of one unit
  nested = functools.partial(traverse_util.unflatten_dict, sep='/')
  _, state = run(flow.watch(optax.sgd(0.0)), *map(nested, (steps, params)))
  names = flow.leaf_names(nested(params))
  assert sorted(names) == sorted(UNITS)
  for i, name in enumerate(names):
    _, _, units, dead = UNITS[name]
    assert state.units[0, i] == units
    assert state.zeros[0, i] == np.sum(gradients[name] == 0)
    found = state.dead_units[:, i].tolist()
    after = [1] * 10 + [2] if name == 'reset/kernel' else [dead] * 11
    assert found == [0] * (DEAD_AFTER - 1) + [dead] * 3 + after


STACKS = {  # shape, axes of a unit, what is silent, units, how many of them
  'a/kernel': ((4, 3, 8), (1,), np.s_[2, :, :6], 8, 6),  # layers, in, out
  'b/kernel': ((4, 2, 3, 5), (-3, -2), np.s_[1, 0], 5, 0),  # of convolutions
  'c/kernel': ((2, 3, 4, 3), (1,), np.s_[0, :, :2], 12, 6),  # heads
  'd/kernel': ((6, 3), (1,), np.s_[2:], 6, 4),  # transposed: out, in
  'e/kernel': ((4, 6, 3), (2,), np.s_[1, 1:], 6, 5),  # a stack of these
  'f/kernel': ((2, 3), (0, 1), np.s_[:], 1, 1),
  'g/kernel': ((2, 3), (), np.s_[0], 6, 3),
  'h/bias': ((3, 5), (1,), np.s_[1, :4], 5, 4),  # layers, features
  'h/kernel': ((3, 2, 5), (1,), np.s_[1, :, :4], 0, 0),
  'i/bias': ((3, 5), (), np.s_[1, :4], 15, 4),
  'j/scale': ((3, 5), (0, 1), np.s_[1:], 15, 10),
}


def test_units_say_which_axes_are_those_of_a_stack(rng):
  """The layer counts that has most dead ones."""
  params = {name: random(rng, shape) for name, (shape, *_) in STACKS.items()}
  gradients = {name: np.ones_like(u) for name, u in params.items()}
  for name, (_, _, silent, _, _) in STACKS.items():
    gradients[name][silent] = 0
  nested = functools.partial(traverse_util.unflatten_dict, sep='/')

  def axes(path, leaf):
    name = '/'.join(key.key for key in path)
    assert leaf.shape == STACKS[name][0]
    return STACKS[name][1]

  tx = flow.watch(optax.sgd(0.0), units=ghm.Units(axes))
  steps = jax.tree.map(lambda g: np.stack([g] * 10), gradients)
  _, state = run(tx, *map(nested, (steps, params)))
  names = flow.leaf_names(nested(params))
  for i, name in enumerate(names):
    _, _, _, units, dead = STACKS[name]
    assert (state.units[-1, i], state.dead_units[-1, i]) == (units, dead), name
  assert not state.dead_units[:-1].any()


GUESSED = {  # shape, what is silent, units, how many of them
  'a/kernel': ((4, 3, 8), np.s_[2, :, :6], 8, 6),
  'b/kernel': ((4, 3, 8), np.s_[2], 8, 0),  # the edge of a kernel
  'c/kernel': ((4, 3, 8), np.s_[:, :, :5], 8, 5),
  'd/kernel': ((4, 3, 3, 2, 8), np.s_[1, ..., :6], 8, 6),
  'e/kernel': ((3, 3, 2, 8), np.s_[0, 0, :, :6], 8, 0),
  'f/bias': ((4, 8), np.s_[1, :6], 8, 6),
  'f/kernel': ((4, 3, 8), np.s_[1, :, :6], 0, 0),
  'query/kernel': ((4, 2, 3), np.s_[1, :, :2], 6, 0),
}


def test_stacks_are_guessed_by_their_axes(rng):
  """As nn.scan makes them: 6 of 8 units of one layer are dead."""
  params = {name: random(rng, shape) for name, (shape, *_) in GUESSED.items()}
  gradients = {name: np.ones_like(u) for name, u in params.items()}
  for name, (_, silent, _, _) in GUESSED.items():
    gradients[name][silent] = 0
  nested = functools.partial(traverse_util.unflatten_dict, sep='/')
  tx = flow.watch(optax.sgd(0.0))
  steps = jax.tree.map(lambda g: np.stack([g] * 10), gradients)
  _, state = run(tx, *map(nested, (steps, params)))
  for i, name in enumerate(flow.leaf_names(nested(params))):
    _, _, units, dead = GUESSED[name]
    assert (state.units[-1, i], state.dead_units[-1, i]) == (units, dead), name


def test_units_are_no_bare_function():
  with pytest.raises(TypeError, match='units must be a Units'):
    flow.watch(optax.sgd(0.1), units=lambda path, leaf: ())


# measure.


def test_an_unmeasured_step_is_a_step_and_leaves_the_measurements():
  steps, params = make_params((2,)), make_params()
  steps['dense']['bias'][:] = 0
  sgd = optax.sgd(0.1, momentum=0.9)

  @jax.jit
  def program(steps, params):
    tx, plain = flow.watch(sgd), sgd.init(params)
    state, found = tx.init(params), []
    for i, count in ((0, 9), (1, 5), (0, 1)):

      def step(states, _, i=i):
        state, plain = states
        gradients, options = at(steps, i), {'measure': False} if i else {}
        updates, state = tx.update(gradients, state, params, **options)
        expected, plain = sgd.update(gradients, plain, params)
        return (state, plain), (updates, expected)

      (state, plain), updates = jax.lax.scan(step, (state, plain), length=count)
      found.append((state, plain, *updates))
    return found

  before, unmeasured, last = program(steps, params)
  for state, plain, updates, expected in (before, unmeasured, last):
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(state.inner_state, plain)
  chex.assert_trees_all_equal(unmeasured[0][:2], before[0][:2])
  assert unmeasured[0].dead_units.tolist() == [0, 0, 0]
  assert last[0].dead_units.tolist() == [3, 0, 0]


def test_an_unmeasured_step_costs_what_the_optimizer_does():
  params = {'kernel': np.ones((32, 16), np.float32)}
  plain, tx = optax.adam(1e-3), flow.watch(optax.adam(1e-3))
  state = jax.jit(tx.init)(params)

  def unmeasured(g, state, params):
    updates, new = tx.update(g, state, params, measure=False)
    return updates, new.inner_state

  def cost(f, state):
    lowered = jax.jit(f).lower(params, state, params)
    return lowered.compile().cost_analysis()

  with jax.numpy_dtype_promotion('standard'):
    expected = cost(plain.update, state.inner_state)
    actual, more = cost(unmeasured, state), cost(tx.update, state)
  assert actual['flops'] == expected['flops']
  assert actual['bytes accessed'] == expected['bytes accessed']
  assert more['flops'] > expected['flops'] + 32 * 16  # measuring does cost


@pytest.mark.parametrize('measure', [np.bool_(True), np.array(False), 1, None])
def test_measure_that_is_no_python_bool_raises(measure):
  tx = flow.watch(optax.sgd(0.1))
  state = tx.init(ONES)
  with pytest.raises(TypeError, match='Python bool'):
    tx.update(ONES, state, ONES, measure=measure)
  with pytest.raises(TypeError, match='Python bool'):
    jax.jit(lambda traced: tx.update(ONES, state, ONES, measure=traced))(True)


def test_params_must_be_given():
  tx = flow.watch(optax.sgd(0.1))
  state = tx.init(ONES)
  for args, options in (((), {}), ((None,), {'measure': False})):
    with pytest.raises(ValueError, match='params'):
      tx.update(ONES, state, *args, **options)


# Moments.


def assert_moments(state, steps, b1, b2, rtol=1e-4):
  """Of the last step, for every leaf."""
  found = state.signal_to_noise[-1], state.cosine[-1]
  expected = [moments(leaf, b1, b2) for leaf in jax.tree.leaves(steps)]
  for actual, column in zip(found, zip(*expected, strict=True), strict=True):
    np.testing.assert_allclose(actual, column, rtol=rtol, atol=1e-6)


@jax.jit
def watched_adam(steps, params):
  adam = optax.adam(1e-3, b1=0.8, b2=0.9)
  inject = optax.inject_hyperparams(optax.adam)(0.0, b1=0.8, b2=0.9)
  chain = optax.chain(optax.identity(), adam, optax.scale(0.0))
  return [
    train(flow.watch(tx, moments=True), steps, params)
    for tx in (adam, inject, chain)
  ]


@device
@pytest.mark.parametrize('scale', [1.0, 1e4, 1e-4, 1e-12, 1e-8, 1e8, 1e12])
def test_moments_against_numpy_wherever_adam_is(rng, scale):
  """And the cosine does not depend on the size of the gradient."""
  params = {'a': random(rng, (4, 3)), 'b': random(rng, (5,))}
  steps = {
    'a': random(rng, (7, 4, 3), scale=scale),
    'b': random(rng, (7, 5)) + np.float32(1),
  }
  found = jax.device_get(watched_adam(steps, params))
  for _, state in found:
    assert_moments(state, steps, 0.8, 0.9)
  updates, state = found[0]
  last = [jax.tree.leaves(at(u, -1)) for u in (steps, updates)]
  before = jax.tree.map(lambda p, u: p + u[:-1].sum(0), params, updates)
  assert_columns(at(state, -1), *last, jax.tree.leaves(before))


@device
def test_moments_of_a_constant_and_of_pure_noise():
  ones = np.ones((100, 1), np.float32)
  rng = np.random.default_rng(3)
  constant = {
    'w': ones * np.arange(6, dtype=np.float32)[None],
    'z': ones * np.zeros((1, 2), np.float32),
  }
  noise = random(rng, (60, 20_000))
  tx = flow.watch(optax.adam(1e-3, b2=0.9), moments=True)
  _, state = run(tx, constant, at(constant, 0))
  np.testing.assert_allclose(state.signal_to_noise[-1], [1, 0], rtol=1e-3)
  np.testing.assert_allclose(state.cosine[-1], [1, 0], rtol=1e-5)  # not NaN
  _, state = run(tx, noise, np.ones(20_000, np.float32))
  np.testing.assert_allclose(state.signal_to_noise[-1], [0.05], atol=0.005)
  np.testing.assert_allclose(state.cosine[-1], [0.44], atol=0.03)


@device
def test_moments_of_complex_and_of_16_bit_gradients(rng):
  tx = flow.watch(optax.adam(1e-3, b2=0.9, mu_dtype=None), moments=True)
  for dtype, rtol in ((jnp.complex64, 1e-4), (jnp.bfloat16, 3e-2)):
    steps = random(rng, (4, 4), dtype)
    _, state = run(tx, steps, random(rng, (4,), dtype))
    assert_moments(state, steps, 0.9, 0.9, rtol)


@pytest.mark.parametrize(
  ('tx', 'found'),
  [
    (optax.sgd(0.1), '0 and 0'),
    (optax.scale_by_rms(), '0 and 1'),
    (optax.chain(optax.adam(0.1), optax.adam(0.1)), '2 and 2'),
    (
      optax.partition(
        {'x': optax.adam(0.1), 'y': optax.set_to_zero()},
        {'a': 'x', 'b': 'y'},
      ),
      '1 and 1',
    ),
  ],
  ids=['none', 'nu alone', 'two', 'of other parameters'],
)
def test_moments_need_one_mu_and_one_nu(tx, found):
  with pytest.raises(ValueError, match=f'found {found}'):
    flow.watch(tx, moments=True).init({'a': ONES, 'b': ONES})


# Over devices.


@pytest.mark.parametrize(
  'kind', [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
def test_sharded_parameters_give_the_same_numbers(rng, kind):
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind, kind))
  shapes = {'bias': (8,), 'kernel': (16, 8), 'embedding': (8, 4)}
  specs = {'bias': P('y'), 'kernel': P('x', 'y'), 'embedding': P('x')}
  params, gradients = (
    {name: random(rng, shape) for name, shape in shapes.items()}
    for _ in range(2)
  )
  gradients['kernel'][:, 5] = 0
  gradients['bias'][2], gradients['bias'][6] = np.inf, 0
  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  tx = flow.watch(optax.adam(1e-3), moments=True)

  def steps(params, gradients):
    def step(state, _):
      updates, state = tx.update(gradients, state, params)
      return state, updates

    return jax.lax.scan(step, tx.init(params), length=10)

  with jax.numpy_dtype_promotion('standard'):
    expected, expected_updates = jax.jit(steps)(params, gradients)
    with jax.set_mesh(mesh):
      placed = [
        jax.tree.map(jax.device_put, tree, shardings)
        for tree in (params, gradients)
      ]
      state, updates = jax.jit(steps)(*placed)
  np.testing.assert_allclose(
    state.measured, expected.measured, rtol=1e-5, equal_nan=True
  )
  np.testing.assert_array_equal(state.zero_steps, expected.zero_steps)
  assert expected.dead_units.tolist() == [1, 0, 0]
  assert expected.non_finite.tolist() == [1, 0, 0]
  for name, spec in specs.items():
    whole = NamedSharding(mesh, P(None, *spec))
    assert updates[name].sharding.is_equivalent_to(whole, updates[name].ndim)
    np.testing.assert_allclose(updates[name], expected_updates[name], rtol=1e-5)
