"""A transformation inside the wrappers of Optax does what it does alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.trial import (
  BATCH,
  LEARNING_RATE,
  assert_close,
  assert_same,
  make_gradients,
  make_params,
  make_steps,
  per_example,
  run,
  scale,
  scheduled,
  types,
  typical,
  typical_whole,
)

pytestmark = pytest.mark.device
PROGRAMS = 100


@pytest.fixture(autouse=True)
def _mixing():
  """Optax itself adds floats and integers of several types."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@typical
def test_chains_masks_and_partitions(entry):
  def with_others(tree):
    return tree | {'other': tree['bias'], 'masked': tree['bias']}

  labels = {'bias': 'under_test', 'kernel': 'under_test', 'other': 'sgd'}
  chain = optax.named_chain(
    ('under_test', optax.chain(optax.identity(), entry.tx)),
    ('sgd', optax.sgd(LEARNING_RATE)),
  )
  tx = optax.masked(
    optax.partition(
      {'under_test': chain, 'sgd': optax.sgd(LEARNING_RATE)},
      labels | {'masked': optax.MaskedNode()},
    ),
    dict.fromkeys(labels, True) | {'masked': False},
  )
  steps = [with_others(gradients) for gradients in make_steps(entry)]
  updates, state = run(tx, steps, with_others(make_params()), not_ours=1.0)
  for update, gradients in zip(updates, steps, strict=True):
    assert_same(update.pop('masked'), gradients['masked'])
    assert_same(update.pop('other'), scale(gradients['other'], -LEARNING_RATE))
  expected, expected_state = run(entry.tx, make_steps(entry))
  assert_close(updates, scale(expected, -LEARNING_RATE))
  assert_close(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@scheduled
def test_inject_hyperparams_of_schedules(entry):
  """Each halves after the first step."""
  steps = make_steps(entry)[::2]
  extra = {'mask': np.arange(BATCH) > 1} if entry.per_example else {}
  halving = {
    name: lambda step, value=value: jnp.where(step < 1, value, value / 2)
    for name, value in entry.keywords.items()
  }
  tx = optax.inject_hyperparams(entry.factory)(**halving)
  updates, state = run(tx, steps, **extra, not_ours=1.0)
  assert state.hyperparams.keys() == entry.keywords.keys()
  halved = entry.factory(**{k: v / 2 for k, v in entry.keywords.items()})

  @jax.jit
  def by_hand(one, other, params, extra):
    state = entry.tx.init(params)
    first, state = entry.tx.update(one, state, params, **extra)
    second, state = halved.update(other, state, params, **extra)
    return [first, second], state

  expected = by_hand(*steps, make_params(), extra)
  assert_close((updates, state.inner_state), expected)


@scheduled
def test_inject_hyperparams_on_mixed_leaves(entry):
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
  state = jax.eval_shape(tx.init, mixed)
  updates, after = jax.eval_shape(tx.update, steps[0], state, mixed)
  assert types(updates) == types(mixed)
  assert types(after) == types(state)
  if entry.typical:
    rounded = {
      name: float(jnp.bfloat16(value)) for name, value in entry.keywords.items()
    }
    updates, _ = run(tx, steps, mixed)
    expected, _ = run(entry.factory(**rounded), steps, mixed)
    assert_close(updates, expected, rtol=0.02)


@typical_whole
def test_multi_steps_and_a_bad_micro_batch(entry):
  """Optax can skip it; else its own accumulator would stay NaN for good."""
  first, second = make_steps(entry)[:2]
  mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
  (expected, *_), expected_state = run(entry.tx, [mean])
  tx = optax.MultiSteps(
    entry.tx, 2, should_skip_update_fn=optax.skip_not_finite
  ).gradient_transformation()
  updates, state = run(tx, [first, scale(second, np.nan), second])
  assert_same(updates[0], scale(make_params(), 0))
  assert_close(updates[2], expected)
  assert_close(state.inner_opt_state, expected_state)


@typical_whole
def test_inside_apply_if_finite(entry):
  first, second, third = make_steps(entry)
  expected, expected_state = run(entry.tx, [first, third])
  tx = optax.apply_if_finite(
    optax.chain(entry.tx, optax.sgd(LEARNING_RATE)), max_consecutive_errors=1
  )
  updates, state = run(tx, [first, scale(second, np.nan), third])
  assert_close([updates[0], updates[2]], scale(expected, -LEARNING_RATE))
  assert_same(updates[1], scale(make_params(), 0))
  assert_close(state.inner_state[0], expected_state)


@per_example
def test_before_multi_steps_and_apply_if_finite(entry):
  first, second = make_steps(entry)[:2]
  second['bias'][1, 0] = np.nan
  (one, two), expected_state = run(entry.tx, [first, second])
  guard = optax.apply_if_finite(
    optax.MultiSteps(optax.sgd(LEARNING_RATE), 2).gradient_transformation(),
    max_consecutive_errors=1,
  )
  updates, state = run(optax.chain(entry.tx, guard), [first, second])
  assert_same(updates[0], scale(make_params(), 0))
  mean = jax.tree.map(lambda x, y: (x + y) / 2, one, two)
  assert_close(updates[1], scale(mean, -LEARNING_RATE))
  assert_close(state[0], expected_state)
  assert state[1].total_notfinite == 0
