"""Every transformation does under those of JAX what it does alone."""

import warnings

import chex
import jax
import pytest
from jax import export

from tests.support.trial import (
  assert_close,
  assert_same,
  every,
  make_gradients,
  make_params,
  make_steps,
  run,
  stack,
  types,
)


@every
def test_jitted_init(entry):
  assert_same(
    jax.jit(entry.tx.init)(make_params()), entry.tx.init(make_params())
  )


@every
def test_eval_shape(entry):
  params = make_params()
  abstract = jax.eval_shape(entry.tx.init, params)
  for gradients in make_steps(entry):
    updates, abstract = jax.eval_shape(
      entry.tx.update, gradients, abstract, params
    )
  every_update, state = run(entry.tx, make_steps(entry))
  assert types((updates, abstract)) == types((every_update[-1], state))


@every
def test_is_traced_once(entry):
  chex.clear_trace_counter()
  update = jax.jit(chex.assert_max_traces(entry.tx.update, n=1))
  params, state = make_params(), entry.tx.init(make_params())
  for gradients in make_steps(entry):
    update.trace(gradients, state, params)
    _, state = jax.jit(entry.tx.update)(gradients, state, params)


@every
def test_scan(entry):
  expected, expected_state = run(entry.tx, make_steps(entry))
  params = make_params()

  @jax.jit
  def scan(state, steps):
    def body(state, gradients):
      return entry.tx.update(gradients, state, params)[::-1]

    return jax.lax.scan(body, state, steps)

  state, updates = scan(entry.tx.init(params), stack(make_steps(entry)))
  assert_close(updates, stack(expected))
  assert_close(state, expected_state)


@every
def test_vmap_over_states(entry):
  params = make_params()
  runs = [make_steps(entry), make_steps(entry)[::-1]]
  expected = stack([run(entry.tx, steps) for steps in runs])
  update = jax.jit(jax.vmap(entry.tx.update, (0, 0, None)))
  state = stack([entry.tx.init(params)] * len(runs))
  updates = []
  for gradients in zip(*runs, strict=True):
    update_, state = update(stack(gradients), state, params)
    updates.append(update_)
  assert_close((updates, state), expected)


@every
def test_donation_of_the_state(entry):
  expected, expected_state = run(entry.tx, make_steps(entry))
  params, state = make_params(), entry.tx.init(make_params())
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
  assert_same((updates, state), (expected, expected_state))


@every
def test_export(entry):
  pytest.importorskip('flatbuffers')  # what serialize() writes with
  (expected,), expected_state = run(entry.tx, [make_gradients(entry)])
  args = make_gradients(entry), entry.tx.init(make_params()), make_params()
  leaves, structure = jax.tree.flatten(args)

  # States would have to be registered with jax.export; leaves need not.
  @jax.jit
  def update(leaves):
    updates, state = entry.tx.update(*structure.unflatten(leaves))
    return updates, jax.tree.leaves(state)

  serialized = export.export(update)(leaves).serialize()
  updates, state = export.deserialize(serialized).call(leaves)
  assert_close((updates, state), (expected, jax.tree.leaves(expected_state)))
