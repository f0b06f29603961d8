"""Transformations of Optax in the backward pass, under those of JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

X = np.float32([[3.0, -4.0], [0.5, 1.0]])
COTANGENT = np.float32([[2.0, -1.0], [30.0, 4.0]])


def test_vmap_is_per_example():
  clip = optax.clip_by_global_norm(1.0)
  trace = optax_ghm.in_backward(optax.trace(0.9))

  @jax.jit
  def mapped(x, cotangent):
    states = jax.vmap(trace.init)(x)
    _, states = jax.vjp(jax.vmap(trace), x, states)[1](cotangent)
    rows = zip(x, cotangent, strict=True)
    _, pull = jax.vjp(jax.vmap(optax_ghm.in_backward(clip)), x)
    return (
      *pull(cotangent),
      jnp.stack([clip.update(c, clip.init(u), u)[0] for u, c in rows]),
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
