"""A transformation in the training loops of Flax, and its state on disk."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx, serialization
from flax.training import train_state

from tests.support.trial import (
  LEARNING_RATE,
  assert_close,
  assert_same,
  jitted,
  make_params,
  make_steps,
  run,
  typical,
)


def _expected(entry):
  """Where a plain Optax loop takes parameters of 1, and its state."""
  updates, state = run(entry.tx, make_steps(entry))
  total = jax.tree.map(lambda *us: np.float32(sum(us)), *updates)
  params = jax.tree.map(
    lambda p, u: p - np.float32(LEARNING_RATE) * u, make_params(), total
  )
  return params, state


@typical
def test_train_state_of_linen_and_optimizer_of_nnx(entry):
  tx = optax.chain(entry.tx, optax.sgd(LEARNING_RATE))
  params = make_params()

  @jax.jit
  def with_linen(steps):
    train = train_state.TrainState.create(
      apply_fn=linen.Dense(2).apply, params=params, tx=tx
    )
    for gradients in steps:
      train = train.apply_gradients(grads=gradients)
    return train.params, train.opt_state[0]

  @jax.jit
  def with_nnx(steps):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for gradients in steps:
      state = nnx.state(model, nnx.Param)
      nnx.replace_by_pure_dict(state, gradients)
      optimizer.update(model, state)
    return nnx.as_pure((nnx.state(model, nnx.Param), optimizer.opt_state))

  expected = _expected(entry)
  if entry.name not in _OF_PARAMS:
    assert_close(with_linen(make_steps(entry)), expected)
  assert_close(
    jax.tree.leaves(with_nnx(make_steps(entry))),
    jax.tree.leaves(with_linen(make_steps(entry))),
  )


# Whose state depends on where the parameters are.
_OF_PARAMS = {'watch'}


@typical
def test_flax_serialization_and_orbax_checkpoint(entry, tmp_path):
  """The state is what it was, with all its types."""
  _, state = run(entry.tx, make_steps(entry))
  init, _ = jitted(entry.tx)
  restored = serialization.from_bytes(
    init(make_params()), serialization.to_bytes(state)
  )
  assert_same(restored, state)
  params = jax.tree.map(jax.numpy.asarray, make_params())
  abstract = jax.eval_shape(lambda: (params, entry.tx.init(params)))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'training', (params, state))
    checkpointer.wait_until_finished()
    _, restored = checkpointer.restore(tmp_path / 'training', abstract)
  assert_same(restored, state)
