import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm.backward import OVERWRITE_WITH_GRADIENT, InBackwardState


def test_apply_gradients_optimizes_and_overwrites():
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  tx = optax.sgd(0.1, momentum=0.9)
  variables = {
    'params': {'w': jnp.ones(3)},
    OVERWRITE_WITH_GRADIENT: {'a': density.init(), 'b': [density.init()]},
  }

  def loss(variables):
    x = optax_ghm.harmonize(
      variables['params']['w'],
      variables[OVERWRITE_WITH_GRADIENT]['a'],
      density=density,
    )
    return jnp.mean(jnp.square(x))

  grads = jax.grad(loss)(variables)
  opt_state = tx.init(variables['params'])
  after, after_opt = optax_ghm.apply_gradients(tx, grads, opt_state, variables)
  updates, expected_opt = tx.update(
    grads['params'], opt_state, variables['params']
  )
  chex.assert_trees_all_equal(
    after['params'], optax.apply_updates(variables['params'], updates)
  )
  chex.assert_trees_all_equal(after_opt, expected_opt)
  states = after[OVERWRITE_WITH_GRADIENT]
  chex.assert_trees_all_equal(states['a'], grads[OVERWRITE_WITH_GRADIENT]['a'])
  chex.assert_trees_all_equal(states['b'], [density.init()])  # not reached


def test_apply_gradients_passes_extra_arguments():
  tx = optax.GradientTransformationExtraArgs(
    lambda params: (),
    lambda updates, state, params=None, *, factor, **_: (
      jax.tree.map(lambda u: factor * u, updates),
      state,
    ),
  )
  variables, _ = optax_ghm.apply_gradients(
    tx, {'params': jnp.ones(())}, (), {'params': jnp.ones(())}, factor=3.0
  )
  assert variables['params'] == 4


def test_unknown_collections_are_named():
  tx, params = optax.sgd(0.1), {'params': {}}
  for variables, gradients in (
    (params | {'batch_stats': {}}, params | {'batch_stats': {}}),
    (params, {}),
    ({}, {}),
    (params | {OVERWRITE_WITH_GRADIENT: {}}, params),
  ):
    with pytest.raises(ValueError, match='variables and gradients must') as e:
      optax_ghm.apply_gradients(tx, gradients, tx.init({}), variables)
    assert f'{sorted(variables)} and {sorted(gradients)}' in str(e.value)


def test_states_of_others_are_their_gradient():
  assert optax_ghm.overwrite_with_gradient({'scale': 1.0}, {'scale': 2.0}) == {
    'scale': 2.0
  }


def test_stacked_states_are_chosen_one_by_one():
  """As layers of a scan, or examples of a vmap, have them."""
  states = InBackwardState(floats={'m': jnp.zeros((3, 2))}, calls=jnp.zeros(3))
  gradients = InBackwardState(
    floats={'m': jnp.ones((3, 2))}, calls=jnp.array([1.0, 0.0, 2.0])
  )
  next_states = optax_ghm.overwrite_with_gradient(states, gradients)
  np.testing.assert_array_equal(
    next_states.floats['m'], [[1, 1], [0, 0], [1, 1]]
  )
  np.testing.assert_array_equal(next_states.calls, [1, 0, 2])


# in_backward: a cotangent is an update.

X = jnp.array([[3.0, -4.0], [0.5, 1.0]])
COTANGENT = jnp.array([[2.0, -1.0], [30.0, 4.0]])


def pull(identity, x=X, cotangent=COTANGENT):
  y, vjp = jax.vjp(identity, x)
  chex.assert_trees_all_equal(y, x)
  return vjp(cotangent)[0]


def updated(tx, x=X, cotangent=COTANGENT):
  return tx.update(cotangent, tx.init(x), x)[0]


STATELESS = {
  'clip': optax.clip_by_global_norm(1.0),
  'chain': optax.chain(optax.clip(3.0), optax.scale(-0.5)),
  'of the activations': optax.add_decayed_weights(0.1),
  'nothing': optax.set_to_zero(),
  'identity': optax.identity(),
}


@pytest.mark.parametrize('tx', STATELESS.values(), ids=STATELESS)
def test_law_the_cotangent_behind_is_the_update(tx):
  identity = optax_ghm.in_backward(tx)
  expected = updated(tx)
  np.testing.assert_allclose(pull(identity), expected, rtol=1e-6)
  np.testing.assert_allclose(pull(jax.jit(identity)), expected, rtol=1e-6)
  np.testing.assert_allclose(
    pull(jax.checkpoint(identity)), expected, rtol=1e-6
  )


STATEFUL = {
  'momentum': optax.trace(0.9),
  'adam': optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
  'injected': optax.inject_hyperparams(optax.trace)(decay=0.5),
  'scheduled': optax.scale_by_schedule(lambda count: 1.0 + 0.5 * count),
  'noise, with a key': optax.add_noise(0.1, 0.55, jax.random.key(7)),
  'noise, with an old key': optax.add_noise(0.1, 0.55, 7),
  'guard': optax.apply_if_finite(optax.trace(0.9), 3),
}


@pytest.mark.parametrize('tx', STATEFUL.values(), ids=STATEFUL)
def test_the_gradient_of_the_state_is_the_next_state(tx):
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes ints and floats
    identity = optax_ghm.in_backward(tx)
    state, expected_state = identity.init(X), tx.init(X)
    assert_same_states(identity.unpack(state, X), expected_state)

    @jax.jit
    def grad(state, cotangent):
      _, vjp = jax.vjp(identity, X, state)
      return vjp(cotangent)

    for step in range(1, 4):
      cotangent = step * COTANGENT
      actual, gradient = grad(state, cotangent)
      expected, expected_state = tx.update(cotangent, expected_state, X)
      np.testing.assert_allclose(actual, expected, rtol=2e-6)
      state = optax_ghm.overwrite_with_gradient(state, gradient)
      assert_same_states(identity.unpack(state, X), expected_state)


def assert_same_states(actual, expected):
  """Structure, dtypes and integers the same, floats to rounding."""

  def data(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key_data(leaf)
    return leaf

  actual, expected = (jax.tree.map(data, t) for t in (actual, expected))
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=2e-6)


INTEGERS = [
  (np.int32, [0, 1, -1, 2**16, -(2**16) - 1, 2**24 + 1, 2**31 - 1, -(2**31)]),
  (np.uint32, [0, 1, 2**16 - 1, 2**31, 2**32 - 1]),
  (np.int8, [-128, -1, 0, 127]),
  (np.uint16, [0, 65535]),
  (np.bool_, [False, True]),
]


@pytest.mark.parametrize('calls', [1, 3, 512])
@pytest.mark.parametrize('dtype, values', INTEGERS)
def test_integers_survive_bit_for_bit(dtype, values, calls):
  """Also where one state serves many calls, whose next states add up."""
  values = jnp.array(values, dtype)
  tx = optax.GradientTransformation(
    lambda params: {'n': values}, lambda u, state, params=None: (u, state)
  )
  identity = optax_ghm.in_backward(tx)
  _, vjp = jax.vjp(lambda s: identity(X, s), identity.init(X))
  (state,) = vjp(COTANGENT)
  summed = jax.tree.map(lambda leaf: calls * leaf, state)
  actual = identity.unpack(summed, X)['n']
  assert actual.dtype == values.dtype
  np.testing.assert_array_equal(actual, values)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9))
def test_integers_that_differ_are_averaged(counts):
  def identity_with(count):
    return optax_ghm.in_backward(
      optax.GradientTransformation(
        lambda params: jnp.int32(count), lambda u, s, params=None: (u, s)
      )
    )

  states = [identity_with(count).init(X) for count in counts]
  summed = InBackwardState(
    floats=sum(state.floats for state in states),
    calls=jnp.float32(len(counts)),
  )
  actual = identity_with(0).unpack(summed, X)
  error = abs(int(actual) - sum(counts) / len(counts))
  assert error <= 1 + max(map(abs, counts)) * 2**-22  # float32's rounding


@pytest.mark.parametrize('n', [1, 2, 3, 7, 10, 100])
def test_integers_survive_the_averaging_of_micro_batches(n):
  """Gradients summed over n micro-batches and divided by n."""
  values = jnp.array([2**24 + 1, 2**31 - 1, -(2**31), 3582090, -1])
  tx = optax.GradientTransformation(
    lambda params: values, lambda u, state, params=None: (u, state)
  )
  identity = optax_ghm.in_backward(tx)
  _, vjp = jax.vjp(lambda s: identity(X, s), identity.init(X))
  (state,) = vjp(COTANGENT)
  mean = state
  for _ in range(n - 1):
    mean = jax.tree.map(jnp.add, mean, state)
  mean = jax.tree.map(lambda leaf: leaf / n, mean)
  np.testing.assert_array_equal(identity.unpack(mean, X), values)


def test_64_bit_integers():
  with jax.enable_x64(True):
    values = jnp.array([0, -1, 2**40 + 5, -(2**63), 2**63 - 1], jnp.int64)
    tx = optax.GradientTransformation(
      lambda params: values, lambda u, state, params=None: (u, state)
    )
    identity = optax_ghm.in_backward(tx)
    np.testing.assert_array_equal(identity.unpack(identity.init(X), X), values)


def test_micro_batches_and_shared_modules_have_the_mean():
  identity = optax_ghm.in_backward(optax.trace(0.5))
  state = identity.init(X)
  first = jax.grad(lambda s: jnp.sum(identity(X, s)))(state)
  second = jax.grad(lambda s: jnp.sum(3 * identity(X, s)))(state)
  summed = jax.tree.map(jnp.add, first, second)
  both = jax.grad(lambda s: jnp.sum(identity(X, s) + 3 * identity(X, s)))(state)
  for state in (summed, both):
    assert state.calls == 2
    np.testing.assert_array_equal(
      identity.unpack(state, X).trace, jnp.full_like(X, 2.0)
    )
  # and go on from there
  grad = jax.grad(lambda x, s: jnp.sum(identity(x, s)))(X, both)
  np.testing.assert_array_equal(grad, jnp.full_like(X, 1 + 0.5 * 2))


def test_evaluation_and_a_step_without_gradient_keep_the_state():
  identity = optax_ghm.in_backward(optax.trace(0.5))
  state = jax.grad(lambda s: jnp.sum(identity(X, s)))(identity.init(X))
  gradient = jax.grad(lambda s: jnp.sum(X) + 0 * s.calls)(state)
  chex.assert_trees_all_equal(
    optax_ghm.overwrite_with_gradient(state, gradient), state
  )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_cotangents_keep_their_dtype(dtype):
  """Also where Optax promotes: a float32 factor times bfloat16."""
  x = X.astype(dtype)
  tx = optax.GradientTransformation(
    lambda params: (),
    lambda u, s, params=None: (
      (
        jax.tree.map(lambda v: v.astype(jnp.complex64) * 2, u),
        s,
      )
      if dtype == jnp.complex64
      else (jax.tree.map(lambda v: v.astype(jnp.float32) * 2, u), s)
    ),
  )
  actual = pull(optax_ghm.in_backward(tx), x, COTANGENT.astype(dtype))
  assert actual.dtype == dtype
  np.testing.assert_array_equal(actual, COTANGENT.astype(dtype) * 2)


def test_leaves_of_every_kind():
  x = {
    'empty': jnp.zeros((0, 2)),
    'float': jnp.array([3.0, 4.0]),
    'half': jnp.array([0.0], jnp.bfloat16),
    'integer': jnp.arange(3),
    'key': jax.random.key(0),
    'none': None,
    'nested': [jnp.array(True), (jnp.array(12.0),)],
  }
  identity = optax_ghm.in_backward(optax.clip_by_global_norm(1.3))
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes them in its norm
    y, vjp = jax.vjp(identity, x)
  assert jax.tree.structure(y) == jax.tree.structure(x)
  assert y['key'] is x['key']
  with jax.numpy_dtype_promotion('standard'):
    (cotangent,) = jax.jit(vjp)(
      jax.tree.map(
        lambda leaf: (
          leaf
          if jnp.issubdtype(leaf.dtype, jnp.inexact)
          else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        x,
      )
    )
  np.testing.assert_allclose(cotangent['float'], [0.3, 0.4], rtol=1e-6)
  np.testing.assert_allclose(cotangent['nested'][1][0], 1.2, rtol=1e-6)
  assert cotangent['integer'].dtype == jax.dtypes.float0


def test_a_tree_without_floats_is_left_alone():
  x = {'n': jnp.arange(3)}
  assert optax_ghm.in_backward(optax.clip_by_global_norm(1.0))(x) == x


def test_vmap_is_per_example():
  clip = optax_ghm.in_backward(optax.clip_by_global_norm(1.0))
  actual = pull(jax.vmap(clip))
  expected = jnp.stack(
    [
      updated(optax.clip_by_global_norm(1.0), x, c)
      for x, c in zip(X, COTANGENT, strict=True)
    ]
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  identity = optax_ghm.in_backward(optax.trace(0.9))
  states = jax.vmap(identity.init)(X)
  _, vjp = jax.vjp(jax.vmap(identity), X, states)
  _, states = vjp(COTANGENT)
  np.testing.assert_array_equal(
    jax.vmap(identity.unpack)(states, X).trace, COTANGENT
  )


@pytest.mark.parametrize('loop', [jax.vmap, None])
def test_examples_that_share_a_state_have_the_mean(loop):
  """Also what does not depend on the example: the count, and calls."""
  tx = optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda n: 1.0 + n))
  with jax.numpy_dtype_promotion('standard'):
    identity = optax_ghm.in_backward(tx)
    rows = jnp.arange(12.0).reshape(4, 3)
    each = lambda x, state: jnp.sum(jnp.square(identity(x, state)))  # noqa: E731

    def loss(rows, state):
      if loop is None:
        return sum(each(row, state) for row in rows)
      return jnp.sum(loop(each, (0, None))(rows, state))

    state = identity.init(rows[0])
    for step in range(1, 4):
      state = jax.grad(loss, argnums=1)(rows, state)
      assert state.calls == 4
      trace, schedule = identity.unpack(state, rows[0])
      assert schedule.count == step
      np.testing.assert_allclose(
        trace.trace, 2 * rows.mean(0) * (2 - 0.5 ** (step - 1)), rtol=1e-6
      )


def test_scan_over_layers_with_a_state_each():
  identity = optax_ghm.in_backward(
    optax.chain(optax.scale(0.5), optax.trace(0.9))
  )
  states = jax.vmap(identity.init)(jnp.ones((3, 2)))

  @jax.jit
  def loss(x, states):
    def body(x, state):
      return identity(x, state), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, states)[0])

  x_grad, states = jax.grad(loss, argnums=(0, 1))(jnp.ones(2), states)
  np.testing.assert_array_equal(x_grad, [0.125] * 2)
  np.testing.assert_array_equal(states.calls, [1, 1, 1])
  np.testing.assert_array_equal(
    states.floats[1].trace, [[0.125] * 2, [0.25] * 2, [0.5] * 2]
  )
  summed = states._replace(
    floats=jax.tree.map(
      lambda leaf: leaf * jnp.array([[1.0], [2.0], [4.0]]), states.floats
    ),
    calls=jnp.array([1.0, 2.0, 4.0]),
  )
  np.testing.assert_array_equal(
    identity.unpack(summed, jnp.ones(2))[1].trace, states.floats[1].trace
  )


def test_cond():
  clip = optax_ghm.in_backward(optax.clip(0.1))

  @jax.jit
  def loss(x, on):
    return jnp.sum(jax.lax.cond(on, clip, lambda x: x, x) ** 2)

  np.testing.assert_allclose(
    jax.grad(loss)(X, True), jnp.clip(2 * X, -0.1, 0.1), rtol=1e-6
  )
  np.testing.assert_allclose(jax.grad(loss)(X, False), 2 * X, rtol=1e-6)


def test_a_transformation_may_close_over_traced_numbers():
  """Of the jit, the scan, and the gradient around it."""

  @jax.jit
  def loss(x, factor):
    def body(carry, step):
      x, factor = carry
      tx = optax.scale(factor + step)
      return (optax_ghm.in_backward(tx)(x), factor), None

    (x, _), _ = jax.lax.scan(body, (x, factor), jnp.array([0.0, 1.0]))
    return jnp.sum(x * factor)

  x_grad, factor_grad = jax.grad(loss, argnums=(0, 1))(X, 3.0)
  np.testing.assert_allclose(x_grad, jnp.full_like(X, 3.0 * 3 * 4), rtol=1e-6)
  np.testing.assert_allclose(factor_grad, X.sum(), rtol=1e-6)


def conditional(i):
  return optax.stateless(lambda u, p: jnp.where(i > 1, 10 * u, u))


CLOSURES = {
  'jit': lambda x: jax.jit(
    lambda x, i: optax_ghm.in_backward(conditional(i))(x)
  )(x, 2),
  'scan': lambda x: jax.lax.scan(
    lambda x, i: (optax_ghm.in_backward(conditional(i))(x), None),
    x,
    jnp.arange(3),
  )[0],
  'remat': lambda x: jax.checkpoint(
    lambda x, i: optax_ghm.in_backward(conditional(i))(x)
  )(x, 2),
  'vmap': lambda x: jax.vmap(
    lambda row, s: optax_ghm.in_backward(optax.scale(s))(row)
  )(x, jnp.array([10.0, 10.0])),
  'key': lambda x: jax.jit(
    lambda x, key: optax_ghm.in_backward(
      optax.scale(jnp.where(jax.random.bernoulli(key, 1.0), 10.0, 0.0))
    )(x)
  )(x, jax.random.key(0)),
}


@pytest.mark.parametrize('f', CLOSURES.values(), ids=CLOSURES)
@pytest.mark.parametrize('jit', [False, True])
def test_it_may_close_over_anything_that_is_traced(f, jit):
  grad = jax.grad(lambda x: jnp.sum(f(x)))
  grad = jax.jit(grad) if jit else grad
  np.testing.assert_array_equal(grad(X), jnp.full_like(X, 10.0))


def test_a_gradient_of_a_gradient_keeps_the_rule():
  halve = optax_ghm.in_backward(optax.scale(0.5))
  once = jax.grad(lambda x: jnp.sum(halve(x) ** 3))
  np.testing.assert_allclose(once(X), 0.5 * 3 * X**2, rtol=1e-6)
  twice = jax.grad(lambda x: jnp.sum(once(x)))
  np.testing.assert_allclose(twice(X), 0.5 * 0.5 * 6 * X, rtol=1e-6)


def test_forward_mode_needs_it_switched_off():
  clip = optax_ghm.in_backward(optax.clip(1.0))
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(clip, (X,), (X,))
  _, tangent = jax.jvp(lambda x: clip(x, enabled=False), (X,), (X,))
  np.testing.assert_array_equal(tangent, X)


def test_a_missing_or_foreign_state_is_named():
  identity = optax_ghm.in_backward(optax.trace(0.9))
  state = identity.init(X)
  for foreign in (
    None,
    optax.trace(0.9).init(X),
    identity.init(X[:1]),
    jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state),
  ):
    with pytest.raises(ValueError, match='state must be one from'):
      identity(X, foreign)
  np.testing.assert_array_equal(identity(X[:1], state, enabled=False), X[:1])
  with pytest.raises(TypeError, match='tx must be'):
    optax_ghm.in_backward(optax.clip)


def test_a_transformation_that_reshapes_is_named():
  tx = optax.GradientTransformation(
    lambda params: (), lambda u, state, params=None: (u.sum(), state)
  )
  with pytest.raises(ValueError, match='shapes of its updates'):
    optax_ghm.in_backward(tx)(X)
  tx = optax.GradientTransformation(
    lambda params: jnp.zeros(2), lambda u, s, params=None: (u, jnp.zeros(3))
  )
  identity = optax_ghm.in_backward(tx)
  with pytest.raises(ValueError, match='shapes of its state'):
    identity(X, identity.init(X))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit_is_the_whole_batch(kind):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
  identity = optax_ghm.in_backward(tx)
  x = jnp.arange(32.0).reshape(16, 2)

  @jax.jit
  def grads(x, state):
    return jax.grad(
      lambda x, s: jnp.sum(jnp.square(identity(x, s))), argnums=(0, 1)
    )(x, state)

  expected = grads(x, identity.init(x))
  with jax.set_mesh(mesh):
    replicated = jax.device_put(identity.init(x), NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P('batch')))
    for state in (identity.init(x), replicated):
      actual = grads(x, state)
      chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=1e-5
      )


def test_shard_map_with_a_state_per_shard():
  """A count that every shard advances comes back as one count."""
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  tx = optax.scale_by_schedule(lambda count: 1.0 + count)
  identity = optax_ghm.in_backward(tx)
  x = jnp.arange(32.0).reshape(16, 2)

  def local(x, state):
    state = jax.lax.pcast(state, 'batch', to='varying')
    return jax.lax.psum(jnp.sum(jnp.square(identity(x, state))), 'batch')

  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(P('batch'), P()), out_specs=P()
  )
  step = jax.jit(jax.grad(mapped, argnums=(0, 1)))
  with jax.numpy_dtype_promotion('standard'):
    state = identity.init(x)
    for count in range(3):
      x_grad, state = step(x, state)
      np.testing.assert_array_equal(x_grad, (1.0 + count) * 2 * x)
      assert identity.unpack(state, x) == optax.ScaleByScheduleState(count + 1)


def test_no_work_is_added_to_that_of_the_update():
  """The compiled backward pass has the operations of ``tx.update``."""
  tx = optax.clip_by_global_norm(1.0)
  identity = optax_ghm.in_backward(tx)
  behind = jax.jit(lambda x, c: jax.vjp(identity, x)[1](c)[0])
  alone = jax.jit(lambda x, c: tx.update(c, tx.init(x), x)[0])
  flops = [
    f.lower(X, COTANGENT).compile().cost_analysis()['flops']
    for f in (behind, alone)
  ]
  assert flops[0] == flops[1]


@pytest.mark.parametrize(
  'tx', [optax.scale(2.0), optax.trace(0.5)], ids=['scale', 'trace']
)
def test_an_output_that_is_not_used_has_no_gradient(tx):
  """Zeros in its place would be NaN behind the root at 0."""
  identity = optax_ghm.in_backward(tx)
  x = jnp.zeros(2)
  state = identity.init((x, x))

  @jax.jit
  def grads(x, state):
    def loss(x, state):
      used, _ = identity((x, jnp.sqrt(x)), state)
      return jnp.sum(used)

    return jax.grad(loss, argnums=(0, 1))(x, state)

  grad, state_grad = grads(x, state)
  expected, expected_state = tx.update(
    (jnp.ones(2), jnp.zeros(2)), tx.init((x, x)), (x, x)
  )
  np.testing.assert_array_equal(grad, expected[0])
  assert_same_states(identity.unpack(state_grad, (x, x)), expected_state)
