"""A transformation does under those of JAX what it does alone."""

import warnings

import chex
import jax
import pytest
from jax import export

from tests.support.trial import (
  assert_close,
  at,
  every,
  jitted,
  make_gradients,
  make_params,
  make_steps,
  run,
  stack,
  typical,
)


@every
def test_is_traced_once(entry):
  chex.clear_trace_counter()
  update = jax.jit(chex.assert_max_traces(entry.tx.update, n=1))
  params = make_params()
  state = jax.eval_shape(entry.tx.init, params)
  for gradients in make_steps(entry):
    update.trace(gradients, state, params)
    _, state = jax.eval_shape(entry.tx.update, gradients, state, params)


@typical
def test_jit_one_by_one_and_donation_of_the_state(entry):
  """Which is what is compared with: a scan."""
  expected, expected_state = run(entry.tx, make_steps(entry))
  params, state = make_params(), jitted(entry.tx)[0](make_params())
  update = jax.jit(entry.tx.update, donate_argnums=1)
  updates = []
  for gradients in make_steps(entry):
    donated = state
    with warnings.catch_warnings():
      warnings.simplefilter('error')  # a state that changes is not donated
      update_, state = update(gradients, donated, params)
    updates.append(update_)
    leaves = jax.tree.leaves(donated)
    assert not leaves or any(leaf.is_deleted() for leaf in leaves)
  assert_close((updates, state), (expected, expected_state))


@typical
def test_vmap_over_states(entry):
  params = make_params()
  runs = [make_steps(entry), make_steps(entry)[::-1]]
  expected = [run(entry.tx, steps) for steps in runs]

  @jax.jit
  @jax.vmap
  def updated(steps):
    state, updates = entry.tx.init(params), []
    for gradients in steps:
      update, state = entry.tx.update(gradients, state, params)
      updates.append(update)
    return updates, state

  actual = updated(stack(runs))
  for i, one in enumerate(expected):
    assert_close(at(actual, i), one)


@typical
def test_export(entry):
  pytest.importorskip('flatbuffers')  # what serialize() writes with
  init, update = jitted(entry.tx)
  args = make_gradients(entry), init(make_params()), make_params()
  leaves, structure = jax.tree.flatten(args)

  # States would have to be registered with jax.export; leaves need not.
  @jax.jit
  def exported(leaves):
    return jax.tree.leaves(entry.tx.update(*structure.unflatten(leaves)))

  serialized = export.export(exported)(leaves).serialize()
  actual = export.deserialize(serialized).call(leaves)
  assert_close(actual, jax.tree.leaves(update(*args)))
