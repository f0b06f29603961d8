"""``update_where`` is ``jnp.where`` of everything, and costs no copy of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm._core.update_where import update_where


def where_at_the_end(condition, update, updates, state, params=None, **kwargs):
  """Selects as the docstring of ``update_where`` says."""
  new_updates, new_state = update(updates, state, params, **kwargs)
  return (
    jax.tree.map(
      lambda u: jnp.where(condition, u, jnp.zeros_like(u)), new_updates
    ),
    jax.tree.map(
      lambda new, old: jnp.where(condition, new, old), new_state, state
    ),
  )


def types(tree):
  leaves, structure = jax.tree.flatten(tree)
  return structure, [jax.typeof(leaf) for leaf in leaves]


def plain(tree):
  """Replaces random keys by the numbers that they hold."""

  def leaf(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)

  return jax.tree.map(leaf, tree)


def noisy(key):
  return optax.chain(optax.add_noise(0.1, 0.5, key=key), optax.sgd(0.1, 0.9))


OPTIMIZERS = {
  'adamw': lambda: optax.adamw(0.1, weight_decay=0.1),
  'adam with a bfloat16 moment': lambda: optax.adam(0.1, mu_dtype='bfloat16'),
  'adafactor': lambda: optax.adafactor(
    0.1, min_dim_size_to_factor=2, momentum=0.9
  ),
  'lion': lambda: optax.lion(0.1),
  'momentum': lambda: optax.sgd(0.1, 0.9, nesterov=True),
  'nadam': lambda: optax.nadam(0.1),
  'rmsprop': lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
  'lamb': lambda: optax.lamb(0.1),
  'lbfgs': lambda: optax.scale_by_lbfgs(2),
  'muon': lambda: optax.contrib.muon(0.1),
  'schedule free': lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
  'prodigy': lambda: optax.contrib.prodigy(0.1),
  'multi steps': lambda: optax.MultiSteps(optax.adam(0.1), 2),
  'inject hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(
    optax.linear_schedule(1.0, 0.1, 3)
  ),
  'noise by a seed': lambda: noisy(7),
  'noise by a key': lambda: noisy(jax.random.key(7)),
  'apply if finite': lambda: optax.apply_if_finite(optax.adam(0.1), 2),
  'partition': lambda: optax.partition(
    {'a': optax.adam(0.1), 'b': optax.sgd(0.1, 0.9)},
    {'kernel': 'a', 'bias': 'b', 'none': None},
  ),
  'plateau': lambda: optax.chain(
    optax.sgd(0.1, 0.9), optax.contrib.reduce_on_plateau(patience=1)
  ),
}
CONDITIONS = np.array([True, False, True, False, False, True])


def make_params():
  rng = np.random.default_rng(0)
  return {
    'kernel': jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=2), jnp.float32),
    'none': None,
  }


def make_steps():
  """Returns the gradients and losses of all steps."""
  rng = np.random.default_rng(1)
  n = len(CONDITIONS)
  grads = {
    'kernel': jnp.asarray(rng.normal(size=(n, 3, 2)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=(n, 2)), jnp.float32),
    'none': None,
  }
  return grads, jnp.asarray(rng.lognormal(size=n), jnp.float32)


@functools.cache
def optimizer(name):
  tx = OPTIMIZERS[name]()
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  tx = optax.with_extra_args_support(tx)

  def update(*args, **kwargs):
    # Optax mixes dtypes; the selection itself does not.
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(*args, **kwargs)

  with jax.numpy_dtype_promotion('standard'):
    return update, tx.init(make_params())


def step_by(select, name, params):
  update, _ = optimizer(name)

  def step(state, of_step):
    condition, grads, value = of_step
    updates, state = select(
      condition, update, grads, state, params, value=value
    )
    return state, (updates, state)

  return step


@functools.cache
def stepped(name):
  """Returns updates and states, by ``jnp.where`` at the end of each step."""
  step = jax.jit(step_by(where_at_the_end, name, make_params()))
  _, state = optimizer(name)
  results = []
  for i, condition in enumerate(CONDITIONS):
    of_step = jax.tree.map(lambda x, i=i: x[i], make_steps())
    state, result = step(state, (condition, *of_step))
    results.append(result)
  return results


def assert_equal(actual, expected):
  """Programs that are compiled apart are equal to rounding."""
  chex.assert_trees_all_close(
    plain(actual), plain(expected), rtol=2e-6, atol=1e-7
  )


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_equals_where_of_everything_in_a_scan(name):
  params = make_params()
  _, init = optimizer(name)

  @jax.jit
  def run(state):
    step = step_by(update_where, name, params)
    return jax.lax.scan(step, state, (CONDITIONS, *make_steps()))

  last, (updates, states) = run(init)
  assert types(last) == types(jax.jit(lambda s: s)(init))
  before = plain(init)
  for i, (condition, expected) in enumerate(
    zip(CONDITIONS, stepped(name), strict=True)
  ):
    update, state = jax.tree.map(lambda x, i=i: x[i], (updates, states))
    assert_equal((update, state), expected)
    if not condition:
      chex.assert_trees_all_equal(plain(state), before)
      assert not any(leaf.any() for leaf in jax.tree.leaves(update))
    before = plain(state)
  assert any(leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize('name', ['adamw', 'noise by a key', 'multi steps'])
def test_equals_where_of_everything_eagerly(name):
  update, init = optimizer(name)
  grads, values = make_steps()
  state = expected_state = init
  for i in (0, 1, 2):
    args = jax.tree.map(lambda x, i=i: x[i], grads), values[i]
    (updates, state), (expected, expected_state) = (
      select(
        jnp.asarray(CONDITIONS[i]),
        update,
        args[0],
        old,
        make_params(),
        value=args[1],
      )
      for select, old in (
        (update_where, state),
        (where_at_the_end, expected_state),
      )
    )
    assert types((updates, state)) == types((expected, expected_state))
    assert_equal((updates, state), (expected, expected_state))


@pytest.mark.parametrize(
  'name', ['adamw', 'adafactor', 'noise by a key', 'multi steps', 'muon']
)
def test_under_vmap_every_condition_is_its_own(name):
  update, init = optimizer(name)
  grads, value = jax.tree.map(lambda x: x[0], make_steps())

  @jax.jit
  @jax.vmap
  def each(condition):
    return update_where(
      condition, update, grads, init, make_params(), value=value
    )

  updates, state = each(jnp.array([False, True]))
  of_false, of_true = (
    jax.tree.map(lambda x, i=i: x[i], (updates, state)) for i in (0, 1)
  )
  assert_equal(of_true, stepped(name)[0])
  chex.assert_trees_all_equal(plain(of_false[1]), plain(init))
  assert not any(leaf.any() for leaf in jax.tree.leaves(of_false[0]))


@pytest.mark.parametrize('name', ['adamw', 'momentum', 'adafactor'])
def test_under_shard_map_devices_may_differ(name):
  """Every second device takes the step; the others do not."""
  update, _ = optimizer(name)
  tx = OPTIMIZERS[name]()
  rng = np.random.default_rng(0)
  params, grads = (
    jnp.asarray(rng.normal(size=(8, 3, 2)), jnp.float32) for _ in range(2)
  )
  conditions = jnp.arange(8) % 2 == 0
  with jax.numpy_dtype_promotion('standard'):
    state = jax.jit(jax.vmap(tx.init))(params)

  def local(select):
    return lambda *args: select(args[0], update, *args[1:])

  one = local(update_where)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
  args = conditions, grads, state, params

  @jax.jit
  def mapped(*args):
    def on_device(*args):
      results = one(*jax.tree.map(lambda x: x[0], args))
      return jax.tree.map(lambda x: x[None], results)

    return jax.shard_map(
      on_device, mesh=mesh, in_specs=P('d'), out_specs=P('d')
    )(*args)

  actual = mapped(*args)
  expected = jax.jit(jax.vmap(local(where_at_the_end)))(*args)
  assert_equal(actual, expected)
  assert not actual[0][1::2].any() and actual[0][::2].all()
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda x: x[1::2], s) for s in (actual[1], state))
  )


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit(kind):
  """Moments stay where they are: nothing is sent between devices."""
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  update, _ = optimizer('adamw')
  params = {'w': jnp.arange(16.0).reshape(8, 2)}
  grads = {'w': jnp.sin(params['w'])}
  tx = OPTIMIZERS['adamw']()
  state = tx.init(params)
  step = jax.jit(functools.partial(update_where, update=update))
  with jax.set_mesh(mesh):
    args = jax.device_put((grads, state, params), NamedSharding(mesh, P()))
    sharded = jax.tree.map(
      lambda x: (
        jax.device_put(x, NamedSharding(mesh, P('d' if x.ndim else None)))
        if x.ndim
        else x
      ),
      args,
    )
    updates, new = [], []
    for condition in (True, False):
      compiled = step.lower(
        jnp.array(condition),
        updates=sharded[0],
        state=sharded[1],
        params=sharded[2],
      ).compile()
      update_, state_ = compiled(
        jnp.array(condition),
        updates=sharded[0],
        state=sharded[1],
        params=sharded[2],
      )
      updates.append(update_)
      new.append(state_)
    assert 'all-' not in compiled.as_text()
    assert updates[0]['w'].sharding.is_equivalent_to(
      sharded[0]['w'].sharding, 2
    )
  expected = jax.jit(update)(grads, state, params)
  assert_equal(jax.device_get((updates[0], new[0])), expected)
  chex.assert_trees_all_equal(jax.device_get(new[1]), jax.device_get(state))
  assert not jax.device_get(updates[1]['w']).any()


# What an update may give back.

OLD = {
  'a': jnp.array([1.0, 2.0]),
  'b': jnp.array([3.0, 4.0]),
  'n': jnp.array(5, jnp.int32),
}
GRADS = {'w': jnp.array([0.5, -0.5])}


def unchanged(updates, state, params):
  return updates, dict(state)


def swapped(updates, state, params):
  return updates, {'a': state['b'], 'b': state['a'], 'n': state['n'] + 1}


def twice(updates, state, params):
  new = state['a'] + updates['w']
  return {'w': 2 * new}, {'a': new, 'b': new, 'n': state['n'] + 1}


def also_the_update(updates, state, params):
  new = 0.9 * state['a'] + updates['w']
  return {'w': new}, state | {'a': new}


def one_from_the_other(updates, state, params):
  a = state['a'] + updates['w']
  b = state['b'] * a
  return {'w': jnp.exp(a) + b}, {'a': a, 'b': b, 'n': state['n'] + 1}


def the_gradient(updates, state, params):
  return updates, state | {'a': updates['w'], 'b': updates['w']}


def the_params(updates, state, params):
  return params, state | {'a': params['w']}


def literal(updates, state, params):
  return updates, state | {'n': 0}


def constants(updates, state, params):
  return {'w': np.ones(2, np.float32)}, {
    'a': np.zeros(2, np.float32),
    'b': jnp.full(2, 7.0),
    'n': np.int32(3),
  }


def jitted(updates, state, params):
  return jax.jit(one_from_the_other)(updates, state, params)


def looped(updates, state, params):
  a, n = jax.lax.fori_loop(
    0, 3, lambda i, c: (c[0] + updates['w'], c[1] + 1), (state['a'], state['n'])
  )
  return {'w': a}, state | {'a': a, 'n': n}


def with_a_derivative(updates, state, params):
  a = jax.grad(lambda x: optax.safe_norm(x, 0.1))(state['a'])
  return {'w': a}, state | {'a': a}


def without_a_result(updates, state, params):
  """One result of the equation is not used."""
  top, _ = jax.lax.top_k(updates['w'], 2)
  return {'w': top}, state | {'b': top}


GIVEN_BACK = [
  unchanged,
  swapped,
  twice,
  also_the_update,
  one_from_the_other,
  the_gradient,
  the_params,
  literal,
  constants,
  jitted,
  looped,
  with_a_derivative,
  without_a_result,
]


@pytest.mark.parametrize('update', GIVEN_BACK, ids=lambda f: f.__name__)
@pytest.mark.parametrize('condition', [True, False])
def test_whatever_an_update_gives_back(update, condition):
  args = update, GRADS, OLD, {'w': jnp.array([7.0, 8.0])}
  expected = where_at_the_end(condition, *args)
  for select in (
    update_where,
    jax.jit(update_where, static_argnums=1),
    lambda c, update, *args: jax.jit(lambda c: update_where(c, update, *args))(
      c
    ),
  ):
    actual = select(jnp.array(condition), *args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    assert types(actual[1]) == types(OLD)
    if not condition:
      chex.assert_trees_all_equal(actual, (optax.tree.zeros_like(GRADS), OLD))


@pytest.mark.parametrize('condition', [True, False])
def test_a_condition_of_python_or_numpy(condition):
  expected = where_at_the_end(condition, twice, GRADS, OLD, None)
  for own in (condition, np.bool_(condition), np.array(condition)):
    actual = update_where(own, twice, GRADS, OLD, None)
    chex.assert_trees_all_equal(actual, expected)


OTHERS = {
  'float0': np.zeros(2, jax.dtypes.float0),
  'masked': optax.MaskedNode(),
  'none': None,
  'no elements': jnp.zeros((0, 3)),
}


@pytest.mark.parametrize('condition', [True, False])
@pytest.mark.parametrize('after', [False, True])
def test_updates_that_are_no_numbers_pass(condition, after):
  """They may stand before or after the leaves that are numbers."""
  prefix = 'x ' if after else 'a '
  others = {prefix + name: leaf for name, leaf in OTHERS.items()}

  def update(updates, state, params):
    new, state = one_from_the_other({'w': updates['w']}, state, params)
    return updates | new, state

  actual, state = update_where(
    jnp.array(condition), update, GRADS | others, OLD
  )
  expected = where_at_the_end(condition, one_from_the_other, GRADS, OLD)
  assert actual.keys() == (GRADS | others).keys()
  float0 = actual.pop(prefix + 'float0')
  assert float0.dtype == jax.dtypes.float0 and float0.shape == (2,)
  assert actual.pop(prefix + 'none') is None
  assert actual.pop(prefix + 'masked') == optax.MaskedNode()
  assert actual.pop(prefix + 'no elements').shape == (0, 3)
  chex.assert_trees_all_equal((actual, state), expected)


@pytest.mark.parametrize('dtype', [jnp.int32, bool])
def test_a_step_left_out_moves_no_integer_either(dtype):
  """Integers become 0, too, since ``optax.apply_updates`` adds them."""
  updates = {'w': jnp.ones(2), 'i': jnp.ones(3, dtype)}
  for condition in (True, False):
    actual, _ = update_where(
      jnp.array(condition), lambda u, s, p: (u, s), updates, OLD
    )
    assert types(actual) == types(updates)
    np.testing.assert_array_equal(actual['i'], np.full(3, condition, dtype))


X = jnp.ones(2)


@pytest.mark.parametrize(
  'state',
  [{'a': X}, {'a': X, 'b': X, 'c': X}, {'a': X, 'c': X}, [X, X], None],
  ids=['fewer leaves', 'more leaves', 'other names', 'a list', 'none'],
)
def test_a_state_of_another_structure_is_an_error(state):
  """No update is mistaken for a leaf of the state."""

  def update(updates, old, params):
    return updates, jax.tree.map(lambda x: x + old['a'], state)

  with pytest.raises(ValueError):
    update_where(jnp.array(False), update, GRADS, {'a': X, 'b': X})


def test_nothing_of_a_bad_step_comes_through():
  """The updates are zeros, and not 0 times NaN."""
  bad = {'w': jnp.array([jnp.nan, jnp.inf])}
  updates, state = jax.jit(
    lambda g: update_where(
      jnp.isfinite(g['w']).all(), one_from_the_other, g, OLD
    )
  )(bad)
  np.testing.assert_array_equal(updates['w'], [0, 0])
  chex.assert_trees_all_equal(state, OLD)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.int32]
SHAPES = [(), (1,), (3,), (2, 3), (0, 2)]


@settings(max_examples=25)
@given(
  st.lists(
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=4,
  ),
  st.booleans(),
  st.integers(0, 99),
)
def test_states_of_all_types(of_leaves, condition, seed):
  """The states hold special numbers, and each is made of the last one."""
  rng = np.random.default_rng(seed)
  special = np.array([0.0, -0.0, 1.5, -3.0, np.inf, np.nan, 1e30])

  def leaf(shape, dtype):
    if dtype == jnp.int32:
      return jnp.asarray(rng.integers(-9, 9, shape), dtype)
    return jnp.asarray(rng.choice(special, shape).astype(np.float32)).astype(
      dtype
    )

  state = [leaf(*each) for each in of_leaves]
  grads = [leaf(shape, jnp.float32) for shape, _ in of_leaves]

  def update(updates, state, params=None):
    new = [(s + s).astype(s.dtype) for s in state]
    moved = [
      u + s.real.astype(u.dtype) for u, s in zip(updates, new, strict=True)
    ]
    return moved, new

  actual = jax.jit(
    lambda condition, *args: update_where(condition, update, *args)
  )(condition, grads, state)
  expected = where_at_the_end(condition, update, grads, state)
  assert types(actual) == types(expected)
  chex.assert_trees_all_equal(actual, expected)


# What it is for.

N_LEAVES, ROWS = 4, 256
PARAMS = {
  f'w{i}': jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32)
  for i in range(N_LEAVES)
}
PARAM_BYTES = 4 * N_LEAVES * ROWS**2


def temporary_bytes(make, select):
  """Returns the temporary memory of one donated training step."""
  tx = optax.with_extra_args_support(make(1e-3))

  def step(params, state, grads, condition):
    with jax.numpy_dtype_promotion('standard'):
      updates, state = select(condition, tx.update, grads, state, params)
      return optax.apply_updates(params, updates), state

  condition = jax.ShapeDtypeStruct((), bool)
  with jax.numpy_dtype_promotion('standard'):
    state = jax.eval_shape(tx.init, PARAMS)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
    PARAMS, state, PARAMS, condition
  )
  analysis = lowered.compile().memory_analysis()
  if analysis is None:
    pytest.skip('no memory analysis')
  assert analysis.alias_size_in_bytes >= PARAM_BYTES  # it is donated
  return analysis.temp_size_in_bytes


def always(condition, update, *args):
  del condition
  return update(*args)


def test_a_donated_state_is_written_in_place():
  assert temporary_bytes(optax.adamw, update_where) < 0.1 * PARAM_BYTES
  assert temporary_bytes(optax.adamw, where_at_the_end) > 0.1 * PARAM_BYTES


def momentum(learning_rate):
  return optax.sgd(learning_rate, 0.9)


@pytest.mark.parametrize('make', [momentum, optax.nadam, optax.lion])
def test_it_takes_no_more_memory_than_the_optimizer_alone(make):
  """Some optimizers need a copy of the momentum themselves."""
  alone = temporary_bytes(make, always)
  selected = temporary_bytes(make, update_where)
  assert selected < alone + 0.1 * PARAM_BYTES


@pytest.mark.parametrize('wrap', [optax_ghm.skip_spikes, optax_ghm.calibrated])
@pytest.mark.parametrize('make', [optax.adamw, momentum])
def test_the_wrappers_copy_no_moments(wrap, make):
  """The wrapped step also computes the norm and the statistics."""
  wrapped = temporary_bytes(lambda rate: wrap(make(rate)), always)
  assert wrapped < 0.1 * PARAM_BYTES
