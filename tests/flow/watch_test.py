"""What a watched optimizer measures, against NumPy, and what it leaves be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx, serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_ghm import flow
from tests.support.trial import assert_same, types

COLUMNS = (
  'gradient_norm',
  'update_norm',
  'parameter_norm',
  'elements',
  'zeros',
  'non_finite',
  'units',
  'dead_units',
  'signal_to_noise',
  'cosine',
)
DEAD_AFTER = 10


def in_float64(leaf):
  u = np.asarray(leaf)
  return u.astype(np.complex128 if np.iscomplexobj(u) else np.float64)


def norm(leaf):
  return np.sqrt(np.sum(np.abs(in_float64(leaf)) ** 2))


def column(state, name):
  return np.asarray(getattr(state, name), np.float64)


def assert_columns(state, gradients, updates, params):
  """``gradients``, ``updates`` and ``params``: lists of the counted leaves."""
  for name, leaves in (
    ('gradient_norm', gradients),
    ('update_norm', updates),
    ('parameter_norm', params),
  ):
    np.testing.assert_allclose(
      column(state, name), [norm(leaf) for leaf in leaves], rtol=1e-5
    )
  for name, of in (
    ('elements', np.size),
    ('zeros', lambda g: np.sum(in_float64(g) == 0)),
    ('non_finite', lambda g: np.sum(~np.isfinite(in_float64(g)))),
  ):
    np.testing.assert_array_equal(
      column(state, name), [of(g) for g in gradients], err_msg=name
    )


def random(rng, shape, dtype=jnp.float32, scale=1.0):
  x = rng.normal(size=shape) * scale
  if dtype == jnp.complex64:
    x = x + 1j * rng.normal(size=shape) * scale
  return jnp.asarray(x, dtype)


def once(tx, gradients, params, state=None, **extra_args):
  """One compiled step; what goes in must be arrays."""
  update = jax.jit(functools.partial(tx.update, **extra_args))
  return update(gradients, tx.init(params) if state is None else state, params)


def make_params():
  rng = np.random.default_rng(7)
  return {
    'dense': {'kernel': random(rng, (4, 3)), 'bias': random(rng, (3,))},
    'norm': {'scale': random(rng, (3,))},
  }


def make_steps(params, count):
  rng = np.random.default_rng(8)
  return [
    jax.tree.map(lambda p: random(rng, p.shape, p.dtype), params)
    for _ in range(count)
  ]


def train(tx, gradients, params, **extra_args):
  """Updates of all steps and the last state, in one compiled step."""
  state, every = tx.init(params), []
  update = jax.jit(functools.partial(tx.update, **extra_args))
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes
    for g in gradients:
      updates, state = update(g, state, params)
      params = optax.apply_updates(params, updates)
      every.append(updates)
  return every, state


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
  params = make_params()
  steps = make_steps(params, 4)
  expected, inner = train(OPTIMIZERS[name], steps, params)
  actual, state = train(flow.watch(OPTIMIZERS[name]), steps, params)
  assert_same(actual, expected)
  assert_same(state.inner_state, inner)
  assert state.gradient_norm.all()


def test_inside_multi_steps_it_measures_the_mean_of_the_micro_batches():
  params = make_params()
  steps = make_steps(params, 4)

  def multi(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()

  expected, plain = train(multi(optax.sgd(0.1)), steps, params)
  actual, state = train(multi(flow.watch(optax.sgd(0.1))), steps, params)
  assert_same(actual, expected)
  assert_same(state.inner_opt_state.inner_state, plain.inner_opt_state)
  mean = jax.tree.map(lambda x, y: (x + y) / 2, *steps[2:])
  np.testing.assert_allclose(
    state.inner_opt_state.gradient_norm,
    [norm(leaf) for leaf in jax.tree.leaves(mean)],
    rtol=1e-5,
  )


def test_extra_arguments_reach_the_optimizer():
  def update(updates, state, params=None, *, factor, **extra_args):
    assert 'measure' not in extra_args
    return jax.tree.map(lambda u: factor * u, updates), state

  scaled = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  params, tx = jnp.ones(2), flow.watch(scaled)
  updates, state = tx.update(
    jnp.array([3.0, 4.0]), tx.init(params), params, factor=2.0, measure=True
  )
  np.testing.assert_array_equal(updates, [6, 8])
  assert state.gradient_norm[0] == 5 and state.update_norm[0] == 10


# Columns.


@pytest.mark.parametrize(
  'dtype', [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
)
def test_every_column_against_numpy(rng, dtype):
  params = {
    'bias': random(rng, (5,), dtype),
    'kernel': random(rng, (4, 5), dtype, 3),
    'scalar': random(rng, (), dtype),
  }
  gradients = jax.tree.map(lambda p: random(rng, p.shape, dtype, 2), params)
  gradients['kernel'] = gradients['kernel'].at[1:, 2].set(0)
  gradients['bias'] = gradients['bias'].at[1].set(0)
  tx = flow.watch(optax.scale(-0.25))
  updates, state = once(tx, gradients, params)
  assert_columns(state, *map(jax.tree.leaves, (gradients, updates, params)))
  assert state.zeros.tolist() == [1, 3, 0]
  assert state.units.tolist() == [5, 0, 1]  # a kernel with a bias has none
  assert not (state.dead_units.any() or state.signal_to_noise.any())
  np.testing.assert_allclose(
    column(state, 'update_ratio'),
    [norm(u) / norm(params[name]) for name, u in updates.items()],
    rtol=1e-5,
  )


def test_the_ratio_of_parameters_that_are_all_zero_is_infinite():
  tx = flow.watch(optax.sgd(0.1))
  params = jnp.zeros(3)
  _, state = once(tx, jnp.ones(3), params)
  assert state.update_ratio[0] == jnp.inf


def test_columns_have_the_names_of_the_properties():
  state = flow.WatchState(jnp.arange(20.0).reshape(2, 10), None, None)
  for i, name in enumerate(COLUMNS):
    assert getattr(state, name).tolist() == [i, 10 + i]
  stacked = jax.tree.map(lambda u: u[None, None], state)
  assert stacked.update_norm.shape == (1, 1, 2)


@pytest.mark.parametrize('scale', [1e30, 1e-30])
def test_norms_neither_overflow_nor_vanish(rng, scale):
  params = {
    'a': random(rng, (4, 3)),
    'b': random(rng, (5,), scale=scale),
    'large': random(rng, (130, 130), scale=scale),
  }
  gradients = {
    'a': random(rng, (4, 3), scale=scale),
    'b': random(rng, (5,)),
    'large': random(rng, (130, 130), scale=scale),
  }
  _, state = once(flow.watch(optax.scale(0.0)), gradients, params)
  zeros = [np.zeros(1)] * 3
  assert_columns(state, list(gradients.values()), zeros, list(params.values()))


@pytest.mark.parametrize(
  ('scale', 'expected'), [(1e30, np.inf), (1e-30, 0.0), (1e15, 5e15)]
)
def test_update_norms_are_right_where_their_squares_are(scale, expected):
  gradient = jnp.array([3.0, 4.0]) * scale
  _, state = once(flow.watch(optax.scale(1.0)), gradient, jnp.ones(2))
  np.testing.assert_allclose(state.update_norm, [expected], rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_in_its_leaf_alone(rng, bad):
  params = {
    'a': random(rng, (4, 3)),
    'b': random(rng, (5,)),
    'c': random(rng, (150, 150)),
    'd': random(rng, (150, 150)),
  }
  gradients = {
    'a': jnp.ones((4, 3)).at[1:3, 0].set(bad),
    'b': jnp.ones(5),
    'c': jnp.ones((150, 150)).at[1:6, 0].set(bad),
    'd': jnp.ones((150, 150)),
  }
  tx = flow.watch(optax.sgd(0.1))
  updates, state = once(tx, gradients, params)
  assert_columns(state, *map(jax.tree.leaves, (gradients, updates, params)))
  assert state.non_finite.tolist() == [2, 0, 5, 0]
  assert jnp.isfinite(state.gradient_norm).tolist() == [False, True] * 2


def test_a_bad_part_makes_a_complex_number_one_that_is_not_finite():
  gradient = jnp.array([complex(np.inf, 1), complex(0, np.nan), 1j, 0])
  tx, params = flow.watch(optax.sgd(0.1)), jnp.ones(4, jnp.complex64)
  _, state = once(tx, gradient, params)
  assert (state.non_finite[0], state.zeros[0]) == (2, 1)


@pytest.mark.parametrize('size', [400, 20_000])
def test_finite_numbers_whose_norm_overflows_count_as_finite(size):
  tx, params = flow.watch(optax.sgd(0.1)), jnp.ones(size)
  _, state = once(tx, jnp.full(size, 3e38), params)
  assert state.gradient_norm[0] == jnp.inf
  assert state.non_finite[0] == 0


def test_only_what_has_a_gradient_has_a_row(rng):
  params = {
    'count': jnp.arange(3),
    'empty': jnp.zeros((0, 4)),
    'key': jax.random.key(0),
    'kernel': random(rng, (2, 3)),
    'masked': optax.MaskedNode(),
    'none': None,
    'z': (random(rng, (2,)), random(rng, (2,), jnp.bfloat16)),
  }
  gradients = {
    **params,
    'count': np.zeros(3, jax.dtypes.float0),
    'key': np.zeros((), jax.dtypes.float0),
    'kernel': random(rng, (2, 3)),
  }
  tx = flow.watch(optax.identity())
  updates, state = once(tx, gradients, params)
  counted = [gradients['kernel'], *gradients['z']]
  assert_columns(state, counted, counted, [params['kernel'], *params['z']])
  assert flow.leaf_names(params) == ['kernel', 'z/0', 'z/1']
  assert jax.tree.structure(updates) == jax.tree.structure(gradients)


@pytest.mark.parametrize('params', [{}, {'count': jnp.arange(3), 'none': None}])
def test_a_tree_without_gradients_passes(params):
  tx = flow.watch(optax.identity())
  state = tx.init(params)
  updates, new = tx.update(params, state, params)
  assert_same(updates, params)
  assert types(new) == types(state)
  assert not new.measured.any()


def test_inside_masked_and_partition_it_measures_its_own_leaves(rng):
  params = {'a': random(rng, (3,)), 'b': random(rng, (2,))}
  gradients = {'a': random(rng, (3,)), 'b': random(rng, (2,))}
  for tx in (
    optax.masked(flow.watch(optax.sgd(0.1)), {'a': False, 'b': True}),
    optax.partition(
      {'mine': flow.watch(optax.sgd(0.1)), 'other': optax.sgd(0.1)},
      {'a': 'other', 'b': 'mine'},
    ),
  ):
    _, state = once(tx, gradients, params)
    (watched,) = [
      s
      for s in jax.tree.leaves(
        state, is_leaf=lambda s: isinstance(s, flow.WatchState)
      )
      if isinstance(s, flow.WatchState)
    ]
    np.testing.assert_allclose(
      watched.gradient_norm, [norm(gradients['b'])], rtol=1e-5
    )


# Dead units.


@functools.cache
def _runner():
  tx = flow.watch(optax.sgd(0.0))

  @functools.partial(jax.jit, static_argnames='measure')
  def step(gradients, state, params, measure=True):
    return tx.update(gradients, state, params, measure=measure)[1]

  return tx, step


def after(steps, params, measure=True):
  """The state after gradients, each with how often it came."""
  tx, step = _runner()
  state = tx.init(params)
  for gradients, count in steps:
    for _ in range(count):
      state = step(gradients, state, params, measure)
  return state


DEAD = {
  'kernel': ((4, 3), np.s_[:, 1], 3, 1),
  'convolution': ((3, 3, 2, 5), np.s_[..., :2], 5, 2),
  'bias': ((4,), np.s_[1:], 4, 3),
  'scale': ((4,), np.s_[0], 4, 1),
  'query/kernel': ((6, 2, 3), np.s_[:, 1, :], 6, 3),
  'scalar': ((), np.s_[...], 1, 1),
  'embedding': ((7, 3), np.s_[:], 0, 0),
}


def nested(name, leaf):
  for key in reversed(name.split('/')):
    leaf = {key: leaf}
  return leaf


@pytest.mark.parametrize('name', DEAD)
def test_a_unit_is_dead_after_exactly_ten_steps_without_gradient(rng, name):
  shape, silent, units, dead = DEAD[name]
  params = nested(name, random(rng, shape))
  gradients = nested(name, random(rng, shape).at[silent].set(0))
  almost = after([(gradients, DEAD_AFTER - 1)], params)
  assert almost.units.tolist() == [units]
  assert almost.dead_units.tolist() == [0]
  assert after([(gradients, DEAD_AFTER)], params).dead_units.tolist() == [dead]


def test_one_gradient_resets_a_unit_and_no_other(rng):
  params = {'kernel': jnp.ones((4, 3))}
  off = {'kernel': jnp.ones((4, 3)).at[:, :2].set(0)}
  once = {'kernel': off['kernel'].at[2, 0].set(1e-30)}
  assert after([(off, 12)], params).dead_units.tolist() == [2]
  steps = [(off, 12), (once, 1)]
  assert after(steps, params).dead_units.tolist() == [1]
  assert after([*steps, (off, 9)], params).dead_units.tolist() == [1]
  assert after([*steps, (off, 10)], params).dead_units.tolist() == [2]


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_one(bad):
  params = {'kernel': jnp.ones((2, 2))}
  state = after([({'kernel': jnp.full((2, 2), bad)}, 11)], params)
  assert state.dead_units.tolist() == [0]


def test_units_of_several_leaves_do_not_mix():
  params = {
    'a': {'bias': jnp.ones(2), 'kernel': jnp.ones((3, 2))},
    'b': {'embedding': jnp.ones((5, 2))},
    'c': {'kernel': jnp.ones((2, 4))},
    'd': {'bias': jnp.ones(3)},
  }
  gradients = jax.tree.map(jnp.ones_like, params)
  gradients['a']['bias'] = jnp.array([0.0, 1.0])
  gradients['b']['embedding'] = jnp.zeros((5, 2))
  gradients['c']['kernel'] = jnp.ones((2, 4)).at[:, 1:].set(0)
  gradients['d']['bias'] = jnp.array([0.0, 0.0, 1.0])
  state = after([(gradients, 10)], params)
  assert state.units.tolist() == [2, 0, 0, 4, 3]
  assert state.dead_units.tolist() == [1, 0, 0, 3, 2]
  assert state.zeros.tolist() == [1, 0, 10, 6, 2]


@pytest.mark.parametrize('outside', [lambda p: p, lambda p: {'layer': p}])
def test_a_kernel_with_a_bias_leaves_its_units_to_it(outside):
  params = outside({'bias': jnp.ones(3), 'kernel': jnp.ones((2, 3))})
  gradients = outside(
    {'bias': jnp.array([0.0, 1, 1]), 'kernel': jnp.zeros((2, 3))}
  )
  state = after([(gradients, 10)], params)
  assert state.units.tolist() == [3, 0]
  assert state.dead_units.tolist() == [1, 0]


def test_a_unit_of_stacked_layers_is_dead_if_it_is_in_all():
  params = {'kernel': jnp.ones((2, 3, 4))}
  gradient = jnp.ones((2, 3, 4)).at[0, :, :2].set(0).at[1, :, 1:].set(0)
  state = after([({'kernel': gradient}, 10)], params)
  assert state.units.tolist() == [4] and state.dead_units.tolist() == [1]


def test_steps_that_are_not_measured_do_not_count_for_dead_units():
  params = {'kernel': jnp.ones((2, 2))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  tx, step = _runner()
  state = after([(zeros, 9)], params)
  for _ in range(5):
    state = step(zeros, state, params, measure=False)
  assert state.dead_units.tolist() == [0]
  assert step(zeros, state, params).dead_units.tolist() == [2]


# measure.


def test_an_unmeasured_step_is_a_step_and_leaves_the_measurements():
  tx, params = flow.watch(optax.sgd(0.1, momentum=0.9)), make_params()
  first, second = make_steps(params, 2)
  _, state = once(tx, first, params)
  updates, new = once(tx, second, params, state, measure=False)
  plain = optax.sgd(0.1, momentum=0.9)
  _, expected = once(plain, first, params)
  expected_updates, expected = once(plain, second, params, expected)
  assert_same(updates, expected_updates)
  assert_same(new.inner_state, expected)
  assert_same(new[:2], state[:2])


def _flops(f, *args):
  return jax.jit(f).lower(*args).compile().cost_analysis()


def test_an_unmeasured_step_costs_what_the_optimizer_does():
  params = {'kernel': jnp.ones((32, 16))}
  plain, tx = optax.adam(1e-3), flow.watch(optax.adam(1e-3))
  state = tx.init(params)

  def updates_only(measure):
    def step(g, state, params):
      updates, new = tx.update(g, state, params, measure=measure)
      return updates, new.inner_state

    return step

  def measurements(g, state, params):
    return tx.update(g, state, params, measure=True)

  with jax.numpy_dtype_promotion('standard'):
    expected = _flops(plain.update, params, state.inner_state, params)
    actual = _flops(updates_only(False), params, state, params)
    more = _flops(measurements, params, state, params)
  assert actual['flops'] == expected['flops']
  assert actual['bytes accessed'] == expected['bytes accessed']
  assert more['flops'] > expected['flops'] + 32 * 16  # measuring does cost


@pytest.mark.parametrize(
  'measure', [jnp.array(True), np.bool_(True), np.array(False), 1, None]
)
def test_measure_that_is_no_python_bool_raises(measure):
  tx, params = flow.watch(optax.sgd(0.1)), jnp.ones(2)
  with pytest.raises(TypeError, match='Python bool'):
    tx.update(params, tx.init(params), params, measure=measure)


def test_a_traced_measure_raises():
  tx, params = flow.watch(optax.sgd(0.1)), jnp.ones(2)

  @jax.jit
  def step(measure):
    return tx.update(params, tx.init(params), params, measure=measure)

  with pytest.raises(TypeError, match='Python bool'):
    step(True)


def test_params_must_be_given():
  tx, params = flow.watch(optax.sgd(0.1)), jnp.ones(2)
  with pytest.raises(ValueError, match='params'):
    tx.update(params, tx.init(params))
  with pytest.raises(ValueError, match='params'):
    tx.update(params, tx.init(params), None, measure=False)


# Moments.


def by_hand_moments(gradients, b1, b2):
  """mu and nu in float64, without Adam's bias correction."""
  mu = nu = 0.0
  for g in map(in_float64, gradients):
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * np.abs(g) ** 2
  return mu, nu


@pytest.mark.parametrize('scale', [1.0, 1e4, 1e-4])
def test_moments_against_numpy(rng, scale):
  params = {'a': random(rng, (4, 3)), 'b': random(rng, (5,))}
  steps = [
    {'a': random(rng, (4, 3), scale=scale), 'b': random(rng, (5,)) + 1}
    for _ in range(7)
  ]
  _, state = train(
    flow.watch(optax.adam(1e-3, b1=0.8, b2=0.9), moments=True), steps, params
  )
  for i, name in enumerate('ab'):
    mu, nu = by_hand_moments([s[name] for s in steps], 0.8, 0.9)
    g = in_float64(steps[-1][name])
    np.testing.assert_allclose(
      state.signal_to_noise[i], np.sum(mu**2) / np.sum(nu), rtol=1e-4
    )
    np.testing.assert_allclose(
      state.cosine[i],
      np.sum(g * mu) / norm(g) / norm(mu),
      rtol=1e-4,
      atol=1e-6,
    )
  assert_columns(  # the other columns are measured too
    state,
    list(steps[-1].values()),
    list(_last_updates(steps, params).values()),
    list(_params_before_last(steps, params).values()),
  )


def _plain_adam():
  return optax.adam(1e-3, b1=0.8, b2=0.9)


def _last_updates(steps, params):
  return train(_plain_adam(), steps, params)[0][-1]


def _params_before_last(steps, params):
  for updates in train(_plain_adam(), steps[:-1], params)[0]:
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize('size', [1e-12, 1e-8, 1e8, 1e12])
def test_the_cosine_does_not_depend_on_the_size_of_the_gradient(rng, size):
  params = jnp.ones(4)
  steps = [random(rng, (4,), scale=size) for _ in range(3)]
  _, state = train(flow.watch(optax.adam(1e-3), moments=True), steps, params)
  mu, _ = by_hand_moments(steps, 0.9, 0.999)
  g = in_float64(steps[-1])
  np.testing.assert_allclose(
    state.cosine, [np.sum(g * mu) / norm(g) / norm(mu)], rtol=1e-4
  )


def test_moments_of_a_gradient_that_never_changes_are_one():
  params = {'w': jnp.ones((3, 2)), 'z': jnp.ones(2)}
  gradients = {'w': jnp.arange(6.0).reshape(3, 2), 'z': jnp.zeros(2)}
  tx = flow.watch(optax.adam(1e-3, b2=0.9), moments=True)
  _, state = train(tx, [gradients] * 100, params)
  np.testing.assert_allclose(state.signal_to_noise[0], 1, rtol=1e-3)
  np.testing.assert_allclose(state.cosine[0], 1, rtol=1e-5)
  assert (state.signal_to_noise[1], state.cosine[1]) == (0, 0)  # not NaN


def test_moments_of_pure_noise_are_those_of_the_documentation():
  params = jnp.ones(20_000)
  rng = np.random.default_rng(3)
  steps = [random(rng, (20_000,)) for _ in range(60)]
  tx = flow.watch(optax.adam(1e-3, b2=0.9), moments=True)
  _, state = train(tx, steps, params)
  np.testing.assert_allclose(state.signal_to_noise[0], 0.05, atol=0.005)
  np.testing.assert_allclose(state.cosine[0], 0.44, atol=0.03)


def test_moments_of_complex_and_of_16_bit_gradients(rng):
  params = {
    'c': random(rng, (4,), jnp.complex64),
    'h': random(rng, (4,), jnp.bfloat16),
  }
  steps = [
    jax.tree.map(lambda p: random(rng, p.shape, p.dtype), params)
    for _ in range(4)
  ]
  tx = flow.watch(optax.adam(1e-3, b2=0.9, mu_dtype=None), moments=True)
  _, state = train(tx, steps, params)
  for i, (name, rtol) in enumerate({'c': 1e-4, 'h': 3e-2}.items()):
    mu, nu = by_hand_moments([s[name] for s in steps], 0.9, 0.9)
    g = in_float64(steps[-1][name])
    np.testing.assert_allclose(
      state.signal_to_noise[i],
      np.sum(np.abs(mu) ** 2) / np.sum(nu),
      rtol=rtol,
    )
    np.testing.assert_allclose(
      state.cosine[i],
      np.sum((g.conj() * mu).real) / norm(g) / norm(mu),
      rtol=rtol,
    )


def test_moments_are_found_inside_other_optimizers(rng):
  params = make_params()
  steps = make_steps(params, 3)
  _, expected = train(
    flow.watch(optax.scale_by_adam(), moments=True), steps, params
  )
  for tx in (
    optax.chain(optax.identity(), optax.scale_by_adam(), optax.scale(0.0)),
    optax.inject_hyperparams(optax.adam)(0.0),
  ):
    _, state = train(flow.watch(tx, moments=True), steps, params)
    np.testing.assert_allclose(state.cosine, expected.cosine, rtol=1e-4)
    np.testing.assert_allclose(
      state.signal_to_noise, expected.signal_to_noise, rtol=1e-4
    )
  assert expected.cosine.all()


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
    flow.watch(tx, moments=True).init({'a': jnp.ones(2), 'b': jnp.ones(2)})


# The state.


@pytest.mark.parametrize('moments', [False, True])
def test_the_state_is_of_fixed_types_from_the_first_on(moments):
  params = {**make_params(), 'h': jnp.ones((2, 2), jnp.bfloat16), 'n': None}
  tx = flow.watch(optax.scale_by_adam(), moments=moments)
  state = tx.init(params)
  assert state.measured.shape == (4, len(COLUMNS))
  assert state.measured.dtype == jnp.float32
  assert not state.measured.any()
  with jax.numpy_dtype_promotion('standard'):
    for measure in (True, False):
      update = functools.partial(tx.update, measure=measure)
      _, shapes = jax.eval_shape(update, params, state, params)
      assert types(shapes) == types(state)


def test_it_can_be_scanned_and_its_buffers_donated():
  params = make_params()
  steps = make_steps(params, 5)
  tx = flow.watch(optax.sgd(0.1))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def run(params, state, steps):
    def step(carry, gradients):
      params, state = carry
      updates, state = tx.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), state.gradient_norm

    return jax.lax.scan(step, (params, state), steps)

  stacked = jax.tree.map(lambda *u: jnp.stack(u), *steps)
  (_, state), norms = run(params, tx.init(make_params()), stacked)
  assert all(u.is_deleted() for u in jax.tree.leaves(params))
  expected = [[norm(leaf) for leaf in jax.tree.leaves(s)] for s in steps]
  np.testing.assert_allclose(norms, expected, rtol=1e-5)
  np.testing.assert_allclose(state.gradient_norm, expected[-1], rtol=1e-5)


def test_it_goes_to_disk_and_back(tmp_path):
  params = make_params()
  tx = flow.watch(optax.sgd(0.1, momentum=0.9))
  _, state = train(tx, make_steps(params, 2), params)
  empty = tx.init(params)
  assert_same(
    serialization.from_bytes(empty, serialization.to_bytes(state)), state
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', empty)
  assert_same(restored, state)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_give_the_same_numbers(rng, kind):
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind, kind))
  params = {
    'bias': random(rng, (8,)),
    'kernel': random(rng, (16, 8)),
    'embedding': random(rng, (8, 4)),
  }
  gradients = jax.tree.map(lambda p: random(rng, p.shape), params)
  gradients['kernel'] = gradients['kernel'].at[:, 5].set(0)
  gradients['bias'] = gradients['bias'].at[2].set(np.inf).at[6].set(0)
  specs = {'bias': P('y'), 'kernel': P('x', 'y'), 'embedding': P('x')}
  tx = flow.watch(optax.adam(1e-3), moments=True)

  def run(params, gradients):
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(10):
      updates, state = step(gradients, state, params)
    return updates, state

  with jax.numpy_dtype_promotion('standard'):
    expected_updates, expected = run(params, gradients)
    with jax.set_mesh(mesh):
      placed = [
        {
          name: jax.device_put(u, NamedSharding(mesh, specs[name]))
          for name, u in tree.items()
        }
        for tree in (params, gradients)
      ]
      updates, state = run(*placed)
  np.testing.assert_allclose(
    state.measured, expected.measured, rtol=1e-5, equal_nan=True
  )
  np.testing.assert_array_equal(state.zero_steps, expected.zero_steps)
  assert expected.dead_units.tolist() == [1, 0, 0]
  assert expected.non_finite.tolist() == [1, 0, 0]
  for name, spec in specs.items():
    assert updates[name].sharding.is_equivalent_to(
      NamedSharding(mesh, spec), updates[name].ndim
    )
    np.testing.assert_allclose(updates[name], expected_updates[name], rtol=1e-5)


# Names.


def test_names_are_paths_in_the_order_of_the_rows(rng):
  params = {
    'z': {'kernel': random(rng, (2, 2)), 'bias': random(rng, (2,))},
    'a': [random(rng, (2,)), (jnp.arange(2), random(rng, (3,)))],
    'é/x': random(rng, (1,)),
  }
  assert flow.leaf_names(params) == [
    'a/0',
    'a/1/1',
    'z/bias',
    'z/kernel',
    'é/x',
  ]
  tx = flow.watch(optax.identity())
  _, state = once(tx, params, params)
  rows = [
    params['a'][0],
    params['a'][1][1],
    params['z']['bias'],
    params['z']['kernel'],
    params['é/x'],
  ]
  assert_columns(state, rows, rows, rows)


def test_a_single_array_has_an_empty_name():
  assert flow.leaf_names(jnp.ones(2)) == ['']
  assert flow.leaf_names({}) == []


class Model(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(2, 3, rngs=rngs)
    self.out = nnx.Linear(3, 1, rngs=rngs)


def test_names_of_nnx_are_those_of_the_modules():
  params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  assert flow.leaf_names(params) == [
    'hidden/bias',
    'hidden/kernel',
    'out/bias',
    'out/kernel',
  ]
  tx = flow.watch(optax.sgd(0.1))
  _, state = once(tx, params, params)
  assert state.units.tolist() == [3, 0, 1, 0]


def test_the_boxes_of_partitioned_parameters_have_no_name():
  model = nn.Dense(
    3, kernel_init=nn.with_partitioning(nn.initializers.ones, ('x', 'y'))
  )
  variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
  assert isinstance(variables['params']['kernel'], nn.Partitioned)
  assert flow.leaf_names(variables['params']) == ['bias', 'kernel']
  assert flow.leaf_names(variables) == ['params/bias', 'params/kernel']


def test_a_parameter_that_is_called_value_keeps_its_name():
  assert flow.leaf_names({'head': {'value': jnp.ones(2)}}) == ['head/value']
