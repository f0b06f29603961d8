"""``update_where`` is ``jnp.where`` of everything, and costs no copy of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm._core.update_where import update_where
from tests.support.oracles_core import where_at_the_end
from tests.support.strategies_trees import types


def plain(tree):
  """Replaces random keys by the numbers that they hold."""

  def leaf(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x

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
_rng = np.random.default_rng(0)
PARAMS = {
  'kernel': _rng.normal(size=(3, 2)).astype(np.float32),
  'bias': _rng.normal(size=2).astype(np.float32),
  'none': None,
}
STEPS = jax.tree.map(  # gradients
  lambda x: _rng.normal(size=(len(CONDITIONS), *x.shape)).astype(x.dtype),
  PARAMS,
)
LOSSES = _rng.lognormal(size=len(CONDITIONS)).astype(np.float32)


def optimizer(name):
  """Its init and update. Optax mixes dtypes; the selection itself does not."""
  tx = OPTIMIZERS[name]()
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  tx = optax.with_extra_args_support(tx)

  def mixing(f):
    def call(*args, **kwargs):
      with jax.numpy_dtype_promotion('standard'):
        return f(*args, **kwargs)

    return call

  return mixing(tx.init), mixing(tx.update)


@functools.cache
def scanned(name):
  """The first state, and updates and states by both ways of selecting."""
  init, update = optimizer(name)

  @jax.jit
  def run():
    start = init(PARAMS)

    def by(select):
      def step(state, of_step):
        condition, grads, value = of_step
        updates, state = select(
          condition, update, grads, state, PARAMS, value=value
        )
        return state, (updates, plain(state))

      of_steps = CONDITIONS, STEPS, LOSSES
      last, results = jax.lax.scan(step, start, of_steps)
      assert types(last) == types(start)
      return results

    return plain(start), by(update_where), by(where_at_the_end)

  return jax.device_get(run())


def at(tree, *index):
  return jax.tree.map(lambda x: x[index], tree)


def assert_equal(actual, expected):
  """Apart from how XLA rounds when it compiles them together."""
  chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_equals_where_of_everything_in_a_scan(name):
  before, results, expected = scanned(name)
  assert_equal(results, expected)
  for i, condition in enumerate(CONDITIONS):
    update, state = at(results, i)
    if not condition:
      chex.assert_trees_all_equal(state, before)
      assert not any(leaf.any() for leaf in jax.tree.leaves(update))
    before = state
  assert any(leaf.any() for leaf in jax.tree.leaves(results[0]))


@pytest.mark.parametrize(
  'name', ['adamw', 'adafactor', 'noise by a key', 'multi steps', 'muon']
)
def test_under_vmap_every_condition_is_its_own(name):
  init, update = optimizer(name)

  @jax.jit
  def each(conditions):
    def one(condition):
      updates, state = update_where(
        condition, update, at(STEPS, 0), start, PARAMS, value=LOSSES[0]
      )
      return updates, plain(state)

    start = init(PARAMS)
    return jax.vmap(one)(conditions)

  both = jax.device_get(each(np.array([False, True])))
  of_false, of_true = at(both, 0), at(both, 1)
  start, _, expected = scanned(name)
  assert_equal(of_true, at(expected, 0))
  chex.assert_trees_all_equal(of_false[1], start)
  assert not any(leaf.any() for leaf in jax.tree.leaves(of_false[0]))


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_under_shard_map_devices_may_differ(name, rng):
  """Every second device takes the step; the others do not."""
  init, update = optimizer(name)
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
  params, grads = rng.normal(size=(2, 8, 3, 2)).astype(np.float32)

  @jax.jit
  def both(*args):
    state = jax.vmap(init)(args[-1])

    def local(select, condition, grads, params, state):
      return select(condition, update, grads, state, params)

    def on_device(*args):
      return at(local(update_where, *at(args, 0)), None)

    sharded = jax.shard_map(
      on_device, mesh=mesh, in_specs=P('d'), out_specs=P('d')
    )
    mapped = jax.vmap(functools.partial(local, where_at_the_end))
    return state, sharded(*args, state), mapped(*args, state)

  args = np.arange(8) % 2 == 0, grads, params
  state, actual, expected = jax.device_get(both(*args))
  assert_equal(actual, expected)
  assert not actual[0][1::2].any() and actual[0][::2].all()
  odd = slice(1, None, 2)
  chex.assert_trees_all_equal(at(actual[1], odd), at(state, odd))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit(kind):
  """Moments stay where they are: nothing is sent between devices."""
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  init, update = optimizer('adamw')
  params = {'w': np.arange(16, dtype=np.float32).reshape(8, 2)}
  grads = {'w': np.sin(params['w'])}
  state, *expected = jax.jit(
    lambda: (init(params), *update(grads, init(params), params))
  )()
  args = jax.device_get((grads, state, params))
  with jax.set_mesh(mesh):
    by_axis = [NamedSharding(mesh, P(*axis)) for axis in ((), ('d',))]
    sharded = jax.device_put(
      args, jax.tree.map(lambda x: by_axis[x.ndim > 0], args)
    )

    def step(condition, *args):
      return update_where(condition, update, *args)

    compiled = jax.jit(step).lower(np.array(True), *sharded).compile()
    taken, left_out = (
      compiled(np.array(condition), *sharded) for condition in (True, False)
    )
  assert 'all-' not in compiled.as_text()
  assert taken[0]['w'].sharding.is_equivalent_to(sharded[0]['w'].sharding, 2)
  assert_equal(jax.device_get(taken), jax.device_get(tuple(expected)))
  chex.assert_trees_all_equal(jax.device_get(left_out[1]), args[1])
  assert not jax.device_get(left_out[0]['w']).any()


# What it is for: a state in place.

N_LEAVES, ROWS = 4, 256
LARGE = {
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
    state = jax.eval_shape(tx.init, LARGE)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
    LARGE, state, LARGE, condition
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


@pytest.mark.parametrize('make', [momentum, optax.nadam])
def test_it_takes_no_more_memory_than_the_optimizer_alone(make):
  """Some optimizers need a copy of the momentum themselves."""
  alone = temporary_bytes(make, always)
  selected = temporary_bytes(make, update_where)
  assert selected < alone + 0.1 * PARAM_BYTES


@pytest.mark.parametrize(
  ('wrap', 'make'),
  [(optax_ghm.skip_spikes, optax.adamw), (optax_ghm.calibrated, momentum)],
)
def test_the_wrappers_copy_no_moments(wrap, make):
  """The wrapped step also computes the norm and the statistics."""
  wrapped = temporary_bytes(lambda rate: wrap(make(rate)), always)
  assert wrapped < 0.1 * PARAM_BYTES
