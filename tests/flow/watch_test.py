"""What a watched optimizer measures, against NumPy, and what it leaves be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

from optax_ghm import flow
from optax_ghm.flow import _watch
from tests.support.oracles_flow import assert_columns, norm
from tests.support.watched import (
  ONES,
  at,
  make_params,
  once,
  random,
  run,
  train,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
device = pytest.mark.device


# What it leaves be.


OPTIMIZERS = {
  'sgd': optax.sgd(0.1, momentum=0.9),
  'adam': optax.adam(1e-2),
  'adamw of a schedule': optax.adamw(optax.linear_schedule(0.1, 0.0, 5)),
  'chain': optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
  'inject_hyperparams': optax.inject_hyperparams(optax.adam)(1e-2),
  'MultiSteps': optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_and_state_are_those_of_the_optimizer_bit_for_bit(name):
  tx = OPTIMIZERS[name]

  @jax.jit
  def program(*args):
    return train(tx, *args), train(flow.watch(tx), *args)

  (expected, inner), (actual, state) = program(make_params((4,)), make_params())
  chex.assert_trees_all_equal(actual, expected)
  chex.assert_trees_all_equal(state.inner_state, inner)
  assert state.gradient_norm.all()


def states(state):
  """The state of the watched optimizer in that of another."""
  is_watched = lambda s: isinstance(s, flow.WatchState)  # noqa: E731
  found = filter(is_watched, jax.tree.leaves(state, is_leaf=is_watched))
  (watched,) = found
  return watched


def test_inside_others_it_measures_what_reaches_it():
  params, steps = make_params(), make_params((4,))
  sgd, watched = optax.sgd(0.1), flow.watch(optax.sgd(0.1))
  masked = optax.masked(watched, {'dense': False, 'norm': True})
  labels = {'dense': 'other', 'norm': 'mine'}
  parts = optax.partition({'mine': watched, 'other': sgd}, labels)
  multi = optax.MultiSteps(watched, 2).gradient_transformation()
  *own, (_, all_steps) = (
    run(optax.named_chain(('masked', masked), ('parts', parts)), steps, params),
    run(multi, steps, params),
  )
  ((_, state),) = own
  for name in ('masked', 'parts'):
    found = states(state[name]).gradient_norm
    np.testing.assert_allclose(
      found[-1] / (1 if name == 'masked' else 0.1),
      [norm(steps['norm']['scale'][-1])],
      rtol=1e-5,
    )
  mean = jax.tree.map(lambda u: (u[2] + u[3]) / 2, steps)
  np.testing.assert_allclose(
    states(all_steps).gradient_norm[-1],
    list(map(norm, jax.tree.leaves(mean))),
    rtol=1e-5,
  )


def test_extra_arguments_reach_the_optimizer():
  def update(updates, state, params=None, *, factor, **extra_args):
    assert 'measure' not in extra_args
    return jax.tree.map(lambda u: factor * u, updates), state

  scaled = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  steps = np.array([[3, 4]], np.float32)
  tx = flow.watch(scaled)
  updates, state = run(tx, steps, ONES, factor=2.0, measure=True)
  np.testing.assert_array_equal(updates, [[6, 8]])
  assert state.gradient_norm == [[5]] and state.update_norm == [[10]]


# Columns.


@device
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_column_against_numpy(rng, dtype):
  params = {
    'bias': random(rng, (5,), dtype),
    'kernel': random(rng, (4, 5), dtype, 3),
    'scalar': random(rng, (), dtype),
    'zero': np.zeros(3, dtype),
  }
  gradients = jax.tree.map(lambda p: random(rng, p.shape, dtype, 2), params)
  gradients['kernel'][1:, 2] = 0
  gradients['bias'][1] = 0
  updates, state = once(flow.watch(optax.scale(-0.25)), gradients, params)
  assert_columns(state, *map(jax.tree.leaves, (gradients, updates, params)))
  assert state.zeros.tolist() == [1, 3, 0, 0]
  assert state.units.tolist() == [5, 0, 1, 3]  # a kernel with a bias has none
  assert not (state.dead_units.any() or state.signal_to_noise.any())
  with np.errstate(divide='ignore'):
    ratio = state.update_ratio
  lengths = [
    norm(updates[name]) / norm(params[name])
    for name in params
    if name != 'zero'
  ]
  np.testing.assert_allclose(ratio, [*lengths, np.inf], rtol=1e-5)


def test_columns_have_the_names_of_the_properties():
  state = flow.WatchState(np.arange(20.0).reshape(2, 10), None, None)
  for i, name in enumerate(_watch.COLUMNS):
    assert getattr(state, name).tolist() == [i, 10 + i]
  assert at(state, (None, None)).update_norm.shape == (1, 1, 2)


@device
def test_norms_neither_overflow_nor_vanish(rng):
  params, gradients = (
    {
      'a': random(rng, (4, 3)),
      'b': random(rng, (5,)),
      'c': random(rng, (130, 130)),
    }
    for _ in range(2)
  )
  large = [np.full(size, 3e38, np.float32) for size in (400, 20_000)]

  @jax.jit
  def program(gradients, params):
    tx = flow.watch(optax.scale(0.0))
    return tx.update(gradients, tx.init(params), params)[1]

  for scale in (np.float32(1e30), np.float32(1e-30)):
    g = gradients | {k: gradients[k] * scale for k in 'ac'}
    w = params | {k: params[k] * scale for k in 'bc'}
    zeros = [np.zeros(1)] * 3
    assert_columns(program(g, w), list(g.values()), zeros, list(w.values()))
  state = program(large, large)
  assert np.isinf(state.gradient_norm).all()  # and yet
  assert state.non_finite.tolist() == [0, 0]


@device
def test_many_small_leaves_are_measured_each_by_itself(rng):
  sizes = [1 + i % 5 for i in range(40)]  # so many are joined, by their sizes
  params, gradients = (
    [random(rng, (size,)) for size in sizes] for _ in range(2)
  )
  for i in range(0, 40, 3):
    gradients[i][0] = np.nan if i % 2 else 0
  updates, state = once(flow.watch(optax.scale(2.0)), gradients, params)
  assert_columns(state, gradients, updates, params)


@device
def test_update_norms_are_right_where_their_squares_are():
  tx, size = flow.watch(optax.scale(1.0)), np.array([1e30, 1e-30, 1e15])
  gradients = size[:, None] * np.array([[3, 4]])
  _, state = run(tx, gradients.astype(np.float32), np.zeros(2, np.float32))
  expected = [[np.inf], [0], [5e15]]
  np.testing.assert_allclose(state.update_norm, expected, rtol=1e-6)


@device
def test_what_is_not_finite_is_counted_in_its_leaf_alone():
  tx, shapes = flow.watch(optax.scale(1.0)), {'a': (4, 3), 'b': (5,)}
  shapes |= {
    'c': (1030, 1030),
    'd': (1030, 1030),
  }
  params = {k: np.ones(s, np.float32) for k, s in shapes.items()}
  params['z'] = np.ones(4, np.complex64)
  z = [complex(np.inf, 1), complex(0, np.nan), 1j, 0]

  @jax.jit
  def step(gradients):
    return tx.update(gradients, tx.init(params), gradients)[1]

  for bad in (np.nan, np.inf, -np.inf):
    gradients = {k: u.copy() for k, u in params.items()}
    gradients['a'][1:3, 0] = gradients['c'][1:6, 0] = bad
    gradients['z'][:] = z
    state, leaves = step(gradients), list(gradients.values())
    assert_columns(state, leaves, leaves, leaves)
    assert state.non_finite.tolist() == [2, 0, 5, 0, 2]
    assert state.zeros[-1] == 1
    found = np.isfinite(state.gradient_norm)
    assert found.tolist() == [False, True, False, True, False]


def test_only_what_has_a_gradient_has_a_row_by_the_name_of_its_path(rng):
  params = {
    'z': (random(rng, (2,)), random(rng, (2,), jnp.bfloat16)),
    'count': np.arange(3),
    'empty': np.zeros((0, 4), np.float32),
    'key': jax.random.key(0),
    'a': [{'kernel': random(rng, (2, 3)), 'bias': random(rng, (3,))}],
    'masked': optax.MaskedNode(),
    'none': None,
    'é/x': random(rng, (1,)),
  }
  gradients = {
    **params,
    'count': np.zeros(3, jax.dtypes.float0),
    'key': np.zeros((), jax.dtypes.float0),
    'z': (random(rng, (2,)), random(rng, (2,), jnp.bfloat16)),
  }
  tx = flow.watch(optax.identity())
  structures = []

  @jax.jit
  def step(counted, params):
    updates, state = tx.update(gradients | counted, tx.init(params), params)
    structures.append(jax.tree.structure(updates))
    return state

  with_values = {
    k: u for k, u in gradients.items() if k not in ('count', 'key')
  }
  state = step(with_values, params)
  assert structures == [jax.tree.structure(gradients)]
  counted = [
    [*p['a'][0].values()][::-1] + [*p['z'], p['é/x']]
    for p in (gradients, gradients, params)
  ]
  assert_columns(state, *counted)
  names = ['a/0/bias', 'a/0/kernel', 'z/0', 'z/1', 'é/x']
  assert flow.leaf_names(params) == names
  for params in ({}, {'count': np.arange(3), 'none': None}):
    state = tx.init(params)
    same, new = tx.update(params, state, params)
    assert same is params
    chex.assert_trees_all_equal(new, state)
    assert not new.measured.any()
  unitless = {'embedding': ONES[None]}
  assert once(tx, unitless, unitless)[1].units.tolist() == [0]


def test_a_single_array_has_an_empty_name_and_value_is_one():
  assert flow.leaf_names(ONES) == ['']
  assert flow.leaf_names({}) == []
  assert flow.leaf_names({'head': {'value': ONES}}) == ['head/value']


class Model(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(2, 3, rngs=rngs)
    self.out = nnx.Linear(3, 1, rngs=rngs)


def test_names_of_flax_are_those_of_the_modules():
  params = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
  names = ['hidden/bias', 'hidden/kernel', 'out/bias', 'out/kernel']
  assert flow.leaf_names(params) == names
  zeros = jax.tree.map(lambda u: np.zeros(u.shape, u.dtype), params)
  _, state = once(flow.watch(optax.sgd(0.1)), zeros, zeros)
  assert state.units.tolist() == [3, 0, 1, 0]
  kernel_init = nn.with_partitioning(nn.initializers.ones, ('x', 'y'))
  model = nn.Dense(3, kernel_init=kernel_init)
  key, x = jax.random.key(0), np.ones((1, 2), np.float32)
  variables = jax.eval_shape(model.init, key, x)
  assert isinstance(variables['params']['kernel'], nn.Partitioned)  # a box
  assert flow.leaf_names(variables) == ['params/bias', 'params/kernel']
