"""A cotangent is an update: transformations of Optax in the backward pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm
from tests.support.strategies_trees import types

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
