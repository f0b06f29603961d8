"""Every transformation in the training loops of Flax, and its state on disk."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx, serialization
from flax.training import train_state

from tests.support.trial import (
  LEARNING_RATE,
  assert_close,
  assert_same,
  every,
  make_gradients,
  make_params,
  make_steps,
  run,
  scale,
  types,
)


def _expected(entry, params):
  """Where a plain Optax loop takes the params, and its state."""
  update, state = jax.jit(entry.tx.update), entry.tx.init(params)
  for gradients in make_steps(entry):
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, scale(updates, -LEARNING_RATE))
  return params, state


@every
def test_linen_train_state(entry):
  model = linen.Dense(2)
  params = model.init(jax.random.key(0), jnp.ones((1, 3)))['params']
  train = train_state.TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=optax.chain(entry.tx, optax.sgd(LEARNING_RATE)),
  )
  apply = jax.jit(lambda train, grads: train.apply_gradients(grads=grads))
  for gradients in make_steps(entry):
    train = apply(train, gradients)
  assert_close((train.params, train.opt_state[0]), _expected(entry, params))


@every
def test_nnx_optimizer(entry):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  expected = _expected(entry, nnx.to_pure_dict(params))
  optimizer = nnx.Optimizer(
    model, optax.chain(entry.tx, optax.sgd(LEARNING_RATE)), wrt=nnx.Param
  )
  update = nnx.jit(lambda optimizer, *args: optimizer.update(*args))
  for gradients in make_steps(entry, params):
    update(optimizer, model, gradients)
  actual = nnx.state(model, nnx.Param), optimizer.opt_state
  assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected))


def _assert_restored(entry, restored, state):
  """The state is what it was, and what follows from it too."""
  assert_same(restored, state)
  assert types(restored) == types(state)
  update = jax.jit(entry.tx.update)
  gradients, params = make_gradients(entry), make_params()
  assert_same(
    update(gradients, restored, params), update(gradients, state, params)
  )


@every
def test_flax_serialization(entry):
  _, state = run(entry.tx, make_steps(entry))
  restored = serialization.from_bytes(
    entry.tx.init(make_params()), serialization.to_bytes(state)
  )
  _assert_restored(entry, restored, state)


@every
def test_orbax_checkpoint(entry, tmp_path):
  _, state = run(entry.tx, make_steps(entry))
  params = make_params()
  abstract = jax.eval_shape(lambda: (params, entry.tx.init(params)))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'training', (params, state))
    checkpointer.wait_until_finished()
    _, restored = checkpointer.restore(tmp_path / 'training', abstract)
  _assert_restored(entry, restored, state)
