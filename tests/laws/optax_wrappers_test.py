"""Every transformation inside the wrappers of Optax does what it does alone."""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.support.trial import (
  BATCH,
  LEARNING_RATE,
  assert_close,
  assert_same,
  every,
  make_gradients,
  make_params,
  make_steps,
  per_example,
  run,
  scale,
  scheduled,
  types,
  whole,
)


@every
def test_chain_and_named_chain(entry):
  expected, expected_state = run(entry.tx, make_steps(entry))
  tx = optax.named_chain(
    ('under_test', optax.chain(optax.identity(), entry.tx)),
    ('sgd', optax.sgd(LEARNING_RATE)),
  )
  updates, state = run(tx, make_steps(entry), not_ours=1.0)
  assert_close(updates, scale(expected, -LEARNING_RATE))
  assert_close(state['under_test'][1], expected_state)


@every
def test_masked_and_partition(entry):
  def with_others(tree):
    return tree | {'other': tree['bias'], 'masked': tree['bias']}

  labels = {'bias': 'under_test', 'kernel': 'under_test', 'other': 'sgd'}
  tx = optax.masked(
    optax.partition(
      {'under_test': entry.tx, 'sgd': optax.sgd(LEARNING_RATE)},
      labels | {'masked': optax.MaskedNode()},
    ),
    dict.fromkeys(labels, True) | {'masked': False},
  )
  steps = [with_others(gradients) for gradients in make_steps(entry)]
  updates, state = run(tx, steps, with_others(make_params()))
  for update, gradients in zip(updates, steps, strict=True):
    assert_same(update.pop('masked'), gradients['masked'])
    assert_same(update.pop('other'), -LEARNING_RATE * gradients['other'])
  expected, expected_state = run(entry.tx, make_steps(entry))
  assert_close(updates, expected)
  assert_close(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@every
def test_inject_hyperparams(entry):
  steps = make_steps(entry)
  mask = {'mask': jnp.arange(BATCH) > 1} if entry.per_example else {}
  expected, expected_state = run(entry.tx, steps, **mask)
  tx = optax.inject_hyperparams(entry.factory)(**entry.keywords)
  updates, state = run(tx, steps, **mask, not_ours=1.0)
  assert state.hyperparams.keys() == entry.keywords.keys()
  assert_close(updates, expected)
  assert_close(state.inner_state, expected_state)


@scheduled
def test_inject_hyperparams_of_schedules(entry):
  first, *_, last = make_steps(entry)
  keywords = entry.keywords.items()
  halving = {
    name: lambda step, value=value: jnp.where(step < 1, value, value / 2)
    for name, value in keywords
  }
  (_, updates), _ = run(
    optax.inject_hyperparams(entry.factory)(**halving), [first, last]
  )
  _, state = run(entry.tx, [first])
  halved = entry.factory(**{name: value / 2 for name, value in keywords})
  assert_close(updates, halved.update(last, state, make_params())[0])


@scheduled
def test_inject_hyperparams_of_schedules_on_mixed_leaves(entry):
  """Optax casts hyperparameters to the first leaf's dtype, here bfloat16."""
  if entry.name == 'reference_trace':
    pytest.skip('There optax.trace makes float32 of bfloat16.')
  mixed = make_params() | {'bias': make_params(jnp.bfloat16)['bias']}
  steps = [make_gradients(entry, step, mixed) for step in range(2)]
  schedules = {
    name: optax.constant_schedule(value)
    for name, value in entry.keywords.items()
  }
  tx = optax.inject_hyperparams(entry.factory)(**schedules)
  rounded = {
    name: float(jnp.bfloat16(value)) for name, value in entry.keywords.items()
  }
  with jax.numpy_dtype_promotion('standard'):  # Optax itself mixes dtypes
    updates, state = run(tx, steps, mixed)
    assert types(state) == types(tx.init(mixed))
    expected, _ = run(entry.factory(**rounded), steps, mixed)
  assert types(updates[-1]) == types(mixed)
  assert_close(updates, expected, rtol=0.02)


def _multi_steps(tx):
  return optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()


@whole
def test_inside_multi_steps(entry):
  first, second = make_steps(entry)[:2]
  mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
  (expected,), expected_state = run(entry.tx, [mean])
  # MultiSteps itself divides floats by ints.
  with jax.numpy_dtype_promotion('standard'):
    updates, state = run(_multi_steps(entry.tx), [first, second])
  assert_same(updates[0], scale(make_params(), 0))
  assert_close(updates[1], expected)
  assert_close(state.inner_opt_state, expected_state)


@whole
def test_multi_steps_with_a_bad_micro_batch(entry):
  """Optax can skip it; else its own accumulator would stay NaN for good."""
  first, second = make_steps(entry)[:2]
  mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
  (expected,), expected_state = run(entry.tx, [mean])
  tx = optax.MultiSteps(
    entry.tx, 2, should_skip_update_fn=optax.skip_not_finite
  ).gradient_transformation()
  with jax.numpy_dtype_promotion('standard'):
    updates, state = run(tx, [first, scale(second, jnp.nan), second])
  assert_close(updates[2], expected)
  assert_close(state.inner_opt_state, expected_state)


@whole
def test_inside_apply_if_finite(entry):
  first, second, third = make_steps(entry)
  expected, expected_state = run(entry.tx, [first, third])
  tx = optax.apply_if_finite(
    optax.chain(entry.tx, optax.sgd(LEARNING_RATE)), max_consecutive_errors=1
  )
  updates, state = run(tx, [first, scale(second, jnp.nan), third])
  assert_close([updates[0], updates[2]], scale(expected, -LEARNING_RATE))
  assert_same(updates[1], scale(make_params(), 0))
  assert_close(state.inner_state[0], expected_state)


@per_example
def test_before_multi_steps_and_apply_if_finite(entry):
  first, second = make_steps(entry)[:2]
  second['bias'] = second['bias'].at[1, 0].set(jnp.nan)
  (one, two), expected_state = run(entry.tx, [first, second])
  with jax.numpy_dtype_promotion('standard'):
    guard = optax.apply_if_finite(
      _multi_steps(optax.sgd(LEARNING_RATE)), max_consecutive_errors=1
    )
    updates, state = run(optax.chain(entry.tx, guard), [first, second])
  assert_same(updates[0], scale(make_params(), 0))
  mean = jax.tree.map(lambda x, y: (x + y) / 2, one, two)
  assert_close(updates[1], scale(mean, -LEARNING_RATE))
  assert_close(state[0], expected_state)
  assert state[1].total_notfinite == 0
