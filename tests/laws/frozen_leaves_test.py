"""Frozen leaves are gaps among the updates, beside all of the parameters."""

import jax
import numpy as np
import optax
import pytest

import optax_ghm as ghm
from optax_ghm import flow
from tests.support.trial import (
  assert_same,
  make_gradients,
  make_params,
  own,
  types,
)

GAPS = {'a frozen one': None, 'a masked one': optax.MaskedNode()}
FROZEN = dict.fromkeys(GAPS, np.full((7, 3), 1e3, np.float32))


def check(tx, gradients):
  """The gaps change nothing, as equinox#908 has it."""
  update = jax.jit(lambda g, p: tx.update(g, tx.init(g), p))
  params = make_params()
  updates, state = update(GAPS | gradients, FROZEN | params)
  expected, expected_state = update(gradients, params)
  assert types({name: updates.pop(name) for name in GAPS}) == types(GAPS)
  assert_same(updates, expected)
  assert_same(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@own
def test_gaps_beside_full_params_change_nothing(entry):
  check(entry.tx, make_gradients(entry))


def test_gaps_beside_full_params_change_no_wrapper():
  gradients = make_params()
  clip = ghm.clip_by_parameter_norm(0.1)
  check(ghm.calibrated(optax.sgd(0.1), clip), gradients)
  check(flow.watch(optax.sgd(0.1)), gradients)
  check(ghm.skip_spikes(optax.sgd(0.1)), gradients)


def test_frozen_gradients_do_not_count_where_the_guides_put_the_clip():
  gradients = {'a': np.float32([3.0, 4.0]), 'frozen': np.float32([1e3, 1e3])}
  clip = ghm.calibrated(optax.sgd(1.0), ghm.clip_by_norm(1.0))
  frozen = {'a': False, 'frozen': True}
  inside = optax.partition(
    {False: clip, True: optax.set_to_zero()}, param_labels=frozen
  )
  behind = optax.chain(optax.masked(optax.set_to_zero(), frozen), clip)
  for tx in (inside, behind):
    updates, _ = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g), g))(
      gradients
    )
    np.testing.assert_allclose(updates['a'], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates['frozen'], [0, 0])


def of_own_group(tree):
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree)


@pytest.mark.parametrize(
  ('tx', 'made', 'got'),
  [
    (ghm.clip_by_zscore(scope='leaf'), '4 leaves', '2'),
    (ghm.clip_by_parameter_norm(), '9 leaves, units', '3'),
    (ghm.clip_by_norm(1.0, scope=ghm.Groups(of_own_group)), '4 leaves', '2'),
    (ghm.normalize_by_norm(scope='unit'), '9 leaves, units', '3'),
    (ghm.standardize(), '4 leaves', '2'),
    (flow.watch(optax.sgd(0.1)), '4 leaves with 2 units', '2 with 2'),
  ],
)
def test_gaps_that_init_has_not_seen_raise(tx, made, got):
  params = FROZEN | make_params()
  state = jax.eval_shape(tx.init, params)
  with pytest.raises(ValueError, match=f'made for {made}.* have {got}: init'):
    jax.eval_shape(tx.update, GAPS | make_params(), state, params)
