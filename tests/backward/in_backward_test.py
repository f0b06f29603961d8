"""A cotangent is an update: transformations of Optax in the backward pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from tests.support.strategies_trees import STRUCTURES, ones, trees, types

PROGRAMS = 76
X = np.float32([[3.0, -4.0], [0.5, 1.0]])
COTANGENT = np.float32([[2.0, -1.0], [30.0, 4.0]])


def pull(identity, x=X, cotangent=COTANGENT):
  y, vjp = jax.vjp(identity, x)
  assert y.dtype == x.dtype
  return vjp(cotangent)[0]


def updated(tx, x=X, cotangent=COTANGENT):
  return tx.update(cotangent, tx.init(x), x)[0]


def assert_same(actual, expected):
  """Structure, dtypes and integers the same, floats to rounding."""
  actual, expected = jax.device_get((actual, expected))
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=1e-30)


def data(tree):
  """The numbers in random keys."""
  return jax.tree.map(
    lambda leaf: (
      jax.random.key_data(leaf)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ),
    tree,
  )


STATELESS = {
  'clip': optax.clip_by_global_norm(1.0),
  'chain': optax.chain(optax.clip(3.0), optax.scale(-0.5)),
  'of the activations': optax.add_decayed_weights(0.1),
  'nothing': optax.set_to_zero(),
  'identity': optax.identity(),
}


@pytest.mark.device
def test_law_the_cotangent_behind_is_the_update():
  @jax.jit
  def all_of_them(x, cotangent):
    found = {}
    for name, tx in STATELESS.items():
      identity = optax_ghm.in_backward(tx)
      found[name] = (
        updated(tx, x, cotangent),
        [
          pull(f, x, cotangent)
          for f in (identity, jax.jit(identity), jax.checkpoint(identity))
        ],
      )
    return found

  for expected, found in all_of_them(X, COTANGENT).values():
    for actual in found:
      np.testing.assert_allclose(actual, expected, rtol=1e-6)


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
  identity = optax_ghm.in_backward(tx)

  @jax.jit
  def steps(cotangent):
    state, expected_state = identity.init(X), tx.init(X)
    pairs = [(identity.unpack(state, X), expected_state)]
    for step in range(1, 4):
      _, vjp = jax.vjp(identity, X, state)
      actual, gradient = vjp(step * cotangent)
      state = optax_ghm.overwrite_with_gradient(state, gradient)
      expected, expected_state = tx.update(step * cotangent, expected_state, X)
      pairs.append((actual, expected))
      pairs.append((identity.unpack(state, X), expected_state))
    assert all(types(a)[0] == types(b)[0] for a, b in pairs)
    return data(pairs)

  with jax.numpy_dtype_promotion('standard'):  # Optax mixes ints and floats
    pairs = steps(COTANGENT)
  for actual, expected in pairs:
    assert_same(actual, expected)


CLIPPING = optax_ghm.in_backward(
  optax.chain(optax_ghm.clip_by_zscore(0.5, warmup_steps=1), optax.trace(0.5))
)
NESTED = STRUCTURES['nested']


@jax.jit
def pulled(x, state, expected_state, cotangent):
  """Cotangents and next states, in the backward pass and alone."""
  _, vjp = jax.vjp(CLIPPING, x, state)
  x_bar, state_bar = vjp(cotangent)
  state = optax_ghm.overwrite_with_gradient(state, state_bar)
  expected, expected_state = CLIPPING.tx.update(cotangent, expected_state)
  pair = CLIPPING.unpack(state, x), expected_state
  assert types(pair[0]) == types(pair[1])
  return state, expected_state, (x_bar, expected), pair


@pytest.mark.device
@given(st.lists(trees(NESTED, (0, 0.1, -0.1)), min_size=2, max_size=3))
def test_a_tree_of_cotangents_is_updated_as_a_whole(cotangents):
  x = ones(NESTED)
  state, expected_state = jax.tree.map(
    lambda u: np.zeros(u.shape, u.dtype),
    jax.eval_shape(lambda x: (CLIPPING.init(x), CLIPPING.tx.init(x)), x),
  )
  for cotangent in cotangents:
    state, expected_state, *pairs = pulled(x, state, expected_state, cotangent)
    for actual, expected in pairs:
      chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.device
def test_micro_batches_and_shared_modules_have_the_mean():
  """Evaluation, and a step without a gradient, keep the state."""
  identity = optax_ghm.in_backward(optax.trace(0.5))

  @jax.jit
  def states(x):
    start = identity.init(x)

    def grad(f):
      return jax.grad(lambda s: jnp.sum(f(s)))(start)

    first = grad(lambda s: identity(x, s))
    second = grad(lambda s: 3 * identity(x, s))
    both = grad(lambda s: identity(x, s) + 3 * identity(x, s))
    summed = jax.tree.map(jnp.add, first, second)
    unused = grad(lambda s: x + 0 * s.calls)
    return (
      [(s.calls, identity.unpack(s, x).trace) for s in (summed, both)],
      jax.grad(lambda x, s: jnp.sum(identity(x, s)))(x, both),
      (first, optax_ghm.overwrite_with_gradient(first, unused)),
    )

  means, grad, (before, after) = states(X)
  for calls, trace in means:
    assert float(calls) == 2
    np.testing.assert_array_equal(trace, np.full_like(X, 2.0))
  # and go on from there
  np.testing.assert_array_equal(grad, np.full_like(X, 1 + 0.5 * 2))
  chex.assert_trees_all_equal(after, before)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_cotangents_keep_their_dtype(dtype):
  """Also where Optax promotes: a float32 factor times bfloat16."""
  wide = np.promote_types(dtype, np.float32)
  tx = optax.stateless(
    lambda u, params: jax.tree.map(lambda v: 2 * v.astype(wide), u)
  )
  run = jax.jit(functools.partial(pull, optax_ghm.in_backward(tx)))
  actual = run(X.astype(dtype), COTANGENT.astype(dtype))
  assert actual.dtype == dtype
  np.testing.assert_array_equal(actual, COTANGENT.astype(dtype) * 2)


def test_leaves_of_every_kind():
  x = {
    'empty': np.zeros((0, 2), np.float32),
    'float': np.float32([3.0, 4.0]),
    'half': np.array([0.0]).astype(jnp.bfloat16),
    'integer': np.arange(3),
    'key': jax.random.key(0),
    'none': None,
    'nested': [np.array(True), (np.float32(12.0),)],
  }
  clip = optax_ghm.in_backward(optax.clip_by_global_norm(1.3))

  @jax.jit
  def pull_all(x):
    y, vjp = jax.vjp(clip, x)
    assert jax.tree.structure(y) == jax.tree.structure(x)
    assert y['key'] is x['key']
    (cotangent,) = vjp(
      jax.tree.map(
        lambda leaf: (
          leaf
          if jnp.issubdtype(leaf.dtype, jnp.inexact)
          else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        x,
      )
    )
    assert cotangent['integer'].dtype == jax.dtypes.float0
    return cotangent['float'], cotangent['nested'][1][0]

  with jax.numpy_dtype_promotion('standard'):  # Optax mixes them in its norm
    pair, number = pull_all(x)
  np.testing.assert_allclose(pair, [0.3, 0.4], rtol=1e-6)
  np.testing.assert_allclose(number, 1.2, rtol=1e-6)
  without = {'n': np.arange(3)}
  assert clip(without) == without


@pytest.mark.parametrize(
  'tx', [optax.scale(2.0), optax.trace(0.5)], ids=['scale', 'trace']
)
def test_an_output_that_is_not_used_has_no_gradient(tx):
  """Zeros in its place would be NaN behind the root at 0."""
  identity = optax_ghm.in_backward(tx)

  @jax.jit
  def grads(x):
    def loss(x, state):
      used, _ = identity((x, jnp.sqrt(x)), state)
      return jnp.sum(used)

    pair = x, x
    grad, state = jax.grad(loss, (0, 1))(x, identity.init(pair))
    expected = tx.update((x + 1, x), tx.init(pair), pair)
    return (grad, identity.unpack(state, pair)), (expected[0][0], expected[1])

  assert_same(*grads(np.zeros(2, np.float32)))


def test_a_gradient_of_a_gradient_keeps_the_rule():
  halve = optax_ghm.in_backward(optax.scale(0.5))

  @jax.jit
  def both(x):
    once = jax.grad(lambda x: jnp.sum(halve(x) ** 3))
    return once(x), jax.grad(lambda x: jnp.sum(once(x)))(x)

  once, twice = both(X)
  np.testing.assert_allclose(once, 0.5 * 3 * X**2, rtol=1e-6)
  np.testing.assert_allclose(twice, 0.5 * 0.5 * 6 * X, rtol=1e-6)


def test_forward_mode_needs_it_switched_off():
  clip = optax_ghm.in_backward(optax.clip(1.0))
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(clip, (X,), (X,))
  _, tangent = jax.jvp(functools.partial(clip, enabled=False), (X,), (X,))
  np.testing.assert_array_equal(tangent, X)


def test_a_missing_or_foreign_state_is_named():
  identity = optax_ghm.in_backward(optax.trace(0.9))
  state = jax.eval_shape(identity.init, X)
  for foreign in (
    None,
    optax.TraceState(state.floats),
    jax.eval_shape(identity.init, X[:1]),
    jax.tree.map(lambda u: jax.ShapeDtypeStruct(u.shape, jnp.bfloat16), state),
  ):
    with pytest.raises(ValueError, match='state must be one from'):
      jax.eval_shape(identity, X, foreign)
  assert identity(X[:1], state, enabled=False).shape == (1, 2)
  with pytest.raises(TypeError, match='tx must be'):
    optax_ghm.in_backward(optax.clip)


def test_a_transformation_that_reshapes_is_named():
  tx = optax.stateless(lambda u, params: u.sum())
  with pytest.raises(ValueError, match='shapes of its updates'):
    jax.eval_shape(optax_ghm.in_backward(tx), X)
  tx = optax.GradientTransformation(
    lambda params: jnp.zeros(2), lambda u, s, params=None: (u, jnp.zeros(3))
  )
  identity = optax_ghm.in_backward(tx)
  with pytest.raises(ValueError, match='shapes of its state'):
    jax.eval_shape(identity, X, jax.eval_shape(identity.init, X))


def test_no_work_is_added_to_that_of_the_update():
  """The compiled backward pass has the operations of ``tx.update``."""
  tx = optax.clip_by_global_norm(1.0)
  identity = optax_ghm.in_backward(tx)
  flops = [
    jax.jit(f).lower(X, COTANGENT).compile().cost_analysis()['flops']
    for f in (
      lambda x, c: jax.vjp(identity, x)[1](c)[0],
      lambda x, c: tx.update(c, tx.init(x), x)[0],
    )
  ]
  assert flops[0] == flops[1]


# Under the transformations of JAX.


def test_vmap_is_per_example():
  clip = optax.clip_by_global_norm(1.0)
  trace = optax_ghm.in_backward(optax.trace(0.9))

  @jax.jit
  def mapped(x, cotangent):
    states = jax.vmap(trace.init)(x)
    _, states = jax.vjp(jax.vmap(trace), x, states)[1](cotangent)
    rows = zip(x, cotangent, strict=True)
    return (
      pull(jax.vmap(optax_ghm.in_backward(clip)), x, cotangent),
      jnp.stack([updated(clip, *row) for row in rows]),
      jax.vmap(trace.unpack)(states, x).trace,
    )

  clipped, expected, traced = mapped(X, COTANGENT)
  np.testing.assert_allclose(clipped, expected, rtol=1e-6)
  np.testing.assert_array_equal(traced, COTANGENT)


@pytest.mark.parametrize('loop', [jax.vmap, None])
def test_examples_that_share_a_state_have_the_mean(loop):
  """Also what does not depend on the example: the count, and calls."""
  tx = optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda n: 1.0 + n))
  identity = optax_ghm.in_backward(tx)
  rows = np.arange(12, dtype=np.float32).reshape(4, 3)

  def each(row, state):
    return jnp.sum(jnp.square(identity(row, state)))

  @jax.jit
  def steps(rows):
    def loss(state):
      if loop is None:
        return sum(each(row, state) for row in rows)
      return jnp.sum(loop(each, (0, None))(rows, state))

    state, found = identity.init(rows[0]), []
    for _ in range(3):
      state = jax.grad(loss)(state)
      found.append((state.calls, identity.unpack(state, rows[0])))
    return found

  with jax.numpy_dtype_promotion('standard'):
    found = steps(rows)
  for step, (calls, (trace, schedule)) in enumerate(found):
    assert float(calls) == 4 and int(schedule.count) == step + 1
    np.testing.assert_allclose(
      trace.trace, 2 * rows.mean(0) * (2 - 0.5**step), rtol=1e-6
    )


def test_scan_over_layers_with_a_state_each():
  tx = optax.chain(optax.scale(0.5), optax.trace(0.9))
  identity = optax_ghm.in_backward(tx)

  @jax.jit
  def grads(x):
    def loss(x, states):
      def body(x, state):
        return identity(x, state), None

      return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, states)[0])

    states = jax.vmap(identity.init)(jnp.ones((3, 2)))
    x_grad, states = jax.grad(loss, argnums=(0, 1))(x, states)
    calls = jnp.array([1.0, 2.0, 4.0])
    summed = states._replace(
      floats=jax.tree.map(lambda u: u * calls[:, None], states.floats),
      calls=calls,
    )
    return x_grad, states.calls, identity.unpack(summed, x)[1].trace

  x_grad, calls, trace = grads(np.ones(2, np.float32))
  np.testing.assert_array_equal(x_grad, [0.125] * 2)
  np.testing.assert_array_equal(calls, [1, 1, 1])
  np.testing.assert_array_equal(trace, [[0.125] * 2, [0.25] * 2, [0.5] * 2])


def test_cond():
  clip = optax_ghm.in_backward(optax.clip(0.1))

  @jax.jit
  @jax.grad
  def grad(x, on):
    return jnp.sum(jax.lax.cond(on, clip, lambda x: x, x) ** 2)

  clipped = np.clip(2 * X, -0.1, 0.1)
  np.testing.assert_allclose(grad(X, True), clipped, rtol=1e-6)
  np.testing.assert_allclose(grad(X, False), 2 * X, rtol=1e-6)


def test_it_may_close_over_numbers_that_are_differentiated():
  """Of the jit, the scan, and the gradient around it."""

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def grads(x, factor):
    def body(carry, step):
      x, factor = carry
      tx = optax.scale(factor + step)
      return (optax_ghm.in_backward(tx)(x), factor), None

    (x, _), _ = jax.lax.scan(body, (x, factor), jnp.array([0.0, 1.0]))
    return jnp.sum(x * factor)

  x_grad, factor_grad = grads(X, np.float32(3))
  np.testing.assert_allclose(x_grad, np.full_like(X, 3.0 * 3 * 4), rtol=1e-6)
  np.testing.assert_allclose(factor_grad, X.sum(), rtol=1e-6)


def tenfold(x, i):
  tx = optax.stateless(lambda u, p: jnp.where(i > 1, 10 * u, u))
  return optax_ghm.in_backward(tx)(x)


def by_key(x, key):
  factor = jnp.where(jax.random.bernoulli(key, 1.0), 10.0, 0.0)
  return optax_ghm.in_backward(optax.scale(factor))(x)


CLOSURES = {
  'jit': lambda x: jax.jit(tenfold)(x, 2),
  'scan': lambda x: jax.lax.scan(
    lambda x, i: (tenfold(x, i), None), x, np.arange(3)
  )[0],
  'remat': lambda x: jax.checkpoint(tenfold)(x, 2),
  'vmap': lambda x: jax.vmap(
    lambda row, s: optax_ghm.in_backward(optax.scale(s))(row)
  )(x, jnp.array([10.0, 10.0])),
  'key': lambda x: jax.jit(by_key)(x, jax.random.key(0)),
}


@pytest.mark.parametrize('jit', [False, True])
def test_it_may_close_over_anything_that_is_traced(jit):
  def grads(x):
    return {
      name: jax.grad(lambda x, f=f: jnp.sum(f(x)))(x)
      for name, f in CLOSURES.items()
    }

  grads = jax.jit(grads) if jit else grads
  for grad in grads(X).values():
    np.testing.assert_array_equal(grad, np.full_like(X, 10.0))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit_is_the_whole_batch(kind):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
  identity = optax_ghm.in_backward(tx)
  x = np.arange(32, dtype=np.float32).reshape(16, 2)

  @jax.jit
  def grads(x, state):
    return jax.grad(
      lambda x, s: jnp.sum(jnp.square(identity(x, s))), argnums=(0, 1)
    )(x, state)

  state = jax.tree.map(
    lambda u: np.zeros(u.shape, u.dtype), jax.eval_shape(identity.init, x)
  )
  expected = jax.device_get(grads(x, state))
  with jax.set_mesh(mesh):
    replicated = jax.device_put(state, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P('batch')))
    for start in (identity.init(x), replicated):
      actual = jax.device_get(grads(x, start))
      chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_shard_map_with_a_state_per_shard():
  """A count that every shard advances comes back as one count."""
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  tx = optax.scale_by_schedule(lambda count: 1.0 + count)
  identity = optax_ghm.in_backward(tx)
  x = np.arange(32, dtype=np.float32).reshape(16, 2)

  def local(x, state):
    state = jax.lax.pcast(state, 'batch', to='varying')
    return jax.lax.psum(jnp.sum(jnp.square(identity(x, state))), 'batch')

  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(P('batch'), P()), out_specs=P()
  )

  @jax.jit
  def steps(x):
    state, found = identity.init(x), []
    for _ in range(3):
      x_grad, state = jax.grad(mapped, argnums=(0, 1))(x, state)
      found.append((x_grad, identity.unpack(state, x).count))
    return found

  with jax.numpy_dtype_promotion('standard'):
    found = steps(x)
  for count, (x_grad, next_count) in enumerate(found):
    np.testing.assert_array_equal(x_grad, (1.0 + count) * 2 * x)
    assert int(next_count) == count + 1
