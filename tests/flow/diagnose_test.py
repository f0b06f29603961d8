"""Verdicts: right about known illnesses, and none about what is healthy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ghm import flow
from optax_ghm.linen import Tapped
from tests.support import networks
from tests.support.hand_made import stats, taps, watched

SEEDS = range(5)
KINDS = (
  'not finite',
  'disconnected',
  'no gradient',
  'vanishing',
  'exploding',
  'dead units',
  'small updates',
  'large updates',
  'spikes',
  'conflict',
)


def kinds(record):
  return [verdict.kind for verdict in flow.diagnose(record)]


def only(record, kind):
  """The one verdict, which is of this kind."""
  (verdict,) = flow.diagnose(record)
  assert verdict.kind == kind
  assert verdict.evidence and verdict.suggestion and verdict.source
  return verdict


def verdict_of(record, kind):
  (verdict,) = [v for v in flow.diagnose(record) if v.kind == kind]
  return verdict


@pytest.fixture(scope='module')
def quickly_compiled():
  """Optax and Flax mix dtypes; half of the time goes into compiling."""
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


def train(case, seed, **kwargs):
  return networks.train(case, seed, **kwargs)


@pytest.mark.usefixtures('quickly_compiled')
@pytest.mark.parametrize('name', networks.HEALTHY)
def test_nothing_is_said_about_a_healthy_network(name):
  for seed in SEEDS:
    record = train(networks.HEALTHY[name], seed)
    assert len(record) == 30
    assert kinds(networks.first_steps(record, 1)) == [], seed
    assert kinds(record) == [], seed
    assert record.layer_stats['calls'].all()


@pytest.mark.usefixtures('quickly_compiled')
@pytest.mark.parametrize('name', networks.ILL)
def test_what_is_wrong_is_said(name):
  case = networks.ILL[name]
  for seed in SEEDS:
    record = train(case, seed)
    at_start = kinds(networks.first_steps(record, 1))
    assert case.at_start <= set(at_start), seed
    assert case.at_end <= set(kinds(record)), seed
    assert set(at_start) <= case.at_start, seed  # and nothing else at first
    for verdict in flow.diagnose(record):
      assert verdict.kind in KINDS
      CHECKS.get((name, verdict.kind), lambda *_: None)(record, verdict)


def _slope(record):
  """Decades per layer after the first step, as the evidence says it."""
  (verdict,) = flow.diagnose(networks.first_steps(record, 1))
  found = re.search(r'by ([\d.]+) decades per layer', verdict.evidence)
  return float(found[1])


def _near(decades, tolerance):
  def check(record, verdict):
    assert _slope(record) == pytest.approx(decades, abs=tolerance)
    assert verdict.since == 0
    assert 'Dense_0' in verdict.layers or verdict.kind == 'exploding'

  return check


def _stop_gradient(record, verdict):
  assert verdict.layers == ('encoder',) and verdict.since == 0


def _root(record, verdict):
  # The root of 0 is in a layer without parameters, whose output is finite.
  assert verdict.layers == ('distances', 'second')
  assert 'between the two' in verdict.evidence
  assert verdict.since == 0


def _dead(record, verdict):
  assert 'Dense_0' in verdict.layers
  # ReLU lives at every fifth unit of the first layer at most: 51 are dead.
  dead = record.leaf_stats['dead_units'][-1]
  at = [leaf.name for leaf in record.leaves].index('Dense_0/bias')
  assert dead[at] == 51
  assert verdict.since == 9


def _spike(record, verdict):
  assert verdict.since == 25
  assert 'at 1 of 30 recorded steps' in verdict.evidence


def _since_start(record, verdict):
  assert verdict.since == 0


CHECKS = {
  # The gradient shrinks by gain / sqrt(2) per layer of ReLU, in decades:
  ('gain 1.0, 30 layers', 'vanishing'): _near(-np.log10(0.5**0.5), 0.04),
  ('gain 0.5, 30 layers', 'vanishing'): _near(-np.log10(0.125**0.5), 0.06),
  ('gain 2.0, 30 layers', 'exploding'): _near(np.log10(2**0.5), 0.04),
  # The sigmoid's slope is a quarter at most.
  ('sigmoid, 20 layers', 'vanishing'): _near(0.63, 0.06),
  ('stop_gradient', 'disconnected'): _stop_gradient,
  ('root of zero', 'not finite'): _root,
  ('dead units', 'dead units'): _dead,
  ('learning rate 1e-7', 'small updates'): _since_start,
  ('learning rate 0.3 of the norm', 'large updates'): _since_start,
  ('one bad batch', 'spikes'): _spike,
}


@pytest.mark.usefixtures('quickly_compiled')
def test_since_is_the_step_at_which_it_became_so():
  """The weights of all layers are halved in the middle of a training."""
  case = networks.Case(networks.Plain(14), frozenset(), frozenset())
  x, labels = networks.data(0)
  init, tx, step = networks.compiled(
    case.model, networks.ILL['gain 1.0, 30 layers'].optimizer, 128
  )
  params = init(
    {'params': jax.random.key(0), 'dropout': jax.random.key(1)}, x[:128]
  )['params']
  state, record = tx.init(params), flow.Record(params)
  for i in range(40):
    if i == 17:
      params = jax.tree.map(lambda p: p / 2, params)
      assert kinds(record) == []
    params, _, state, _, found = step(params, {}, state, x[:128], labels[:128])
    record.add(3 * i, taps=found, opt_state=state)
  assert verdict_of(record, 'vanishing').since == 3 * 17


# Numbers made by hand. Records of nothing.


def steps_of(*steps, params=None, start=0):
  """A record of dictionaries of what to add."""
  record = flow.Record(params)
  for i, step in enumerate(steps):
    record.add(start + i, **step)
  return record


@pytest.mark.parametrize(
  'record',
  [
    flow.Record(),
    flow.Record({'w': jnp.ones((2, 2))}),
    steps_of({}),
    steps_of({'loss': 1.0}, {}, {'accuracy': 0.5}),
    steps_of(*[{'taps': taps([1.0])}] * 3),
    steps_of(
      *[{'opt_state': watched({})}] * 30, params={'w': jnp.ones((2, 2))}
    ),
    steps_of(*[{'taps': taps([1.0, 1.2, 0.9, 1.0, 1.1, 1.0])}] * 30),
  ],
  ids=[
    'no step',
    'no step of params',
    'nothing at a step',
    'a loss at some steps',
    'one layer',
    'watch only',
    'taps only',
  ],
)
def test_nothing_is_said_of_what_shows_nothing(record):
  assert flow.diagnose(record) == []


# Depth.


def falling(count, decades, **kwargs):
  """Norms that fall towards the input by so many decades per layer."""
  return taps([10.0 ** (decades * (i - count)) for i in range(count)], **kwargs)


@pytest.mark.parametrize('decades', [0.3, -0.3, 0.0, 2.5])
def test_the_profile_is_the_line_of_least_squares(rng, decades):
  norms = 10.0 ** (decades * np.arange(9) + rng.normal(size=9) / 3)
  profile = flow.depth_profile(steps_of({'taps': taps(norms)}))
  slope, _ = np.polyfit(np.arange(9), np.log10(norms), 1)
  r2 = np.corrcoef(np.arange(9), np.log10(norms))[0, 1] ** 2
  np.testing.assert_allclose(profile.slope, [slope], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(profile.decades, [slope * 8], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(profile.r2, [r2], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(profile.log_norms, [np.log10(norms)], atol=1e-5)
  assert profile.layers.tolist() == list(range(9))


def test_the_profile_is_of_layers_with_a_kernel_that_were_reached():
  profile = flow.depth_profile(
    steps_of(
      {
        'taps': taps(
          [None, 1.0, 5.0, 10.0, 100.0],
          kernels=[True, True, False, True, True],
        )
      }
    )
  )
  assert profile.layers.tolist() == [1, 3, 4]
  np.testing.assert_allclose(profile.slope, [1], rtol=1e-6)


def test_the_profile_of_a_record_without_taps_is_empty():
  for record in (flow.Record(), steps_of({'loss': 1.0}, {'loss': 2.0})):
    profile = flow.depth_profile(record)
    assert profile.layers.size == 0
    assert profile.log_norms.shape == (len(record), 0)
    assert profile.slope.shape == (len(record),)


def test_a_gradient_that_is_zero_counts_as_the_least_float32():
  profile = flow.depth_profile(steps_of({'taps': taps([0.0, 1.0])}))
  np.testing.assert_allclose(
    profile.log_norms, [[-149 * np.log10(2), 0]], rtol=1e-6
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_the_line_is_not_finite_where_a_norm_is_not(bad):
  profile = flow.depth_profile(
    steps_of({'taps': taps([1.0, bad, 1.0])}, {'taps': taps([1.0, 2.0, 4.0])})
  )
  assert not np.isfinite(profile.slope[0]) and np.isfinite(profile.slope[1])


def test_vanishing_needs_five_layers_with_kernels():
  assert kinds(steps_of({'taps': falling(4, 2.0)})) == []
  assert kinds(steps_of({'taps': falling(5, 2.0)})) == ['vanishing']
  four = falling(8, 2.0, kernels=[True] * 4 + [False] * 4)
  assert kinds(steps_of({'taps': four})) == []


@pytest.mark.parametrize(
  ('count', 'decades', 'expected'),
  [
    (30, 0.10, []),  # 2.9 in all, but few per layer
    (30, 0.12, ['vanishing']),
    (17, 0.12, []),  # 1.9 in all
    (18, 0.12, ['vanishing']),  # 2.04
    (30, -0.10, []),
    (30, -0.12, ['exploding']),
    (17, -0.12, []),
    (18, -0.12, ['exploding']),
  ],
)
def test_a_trend_is_enough_per_layer_and_in_all(count, decades, expected):
  assert kinds(steps_of({'taps': falling(count, decades)})) == expected


def test_a_trend_must_explain_the_norms():
  """One layer that stands out is none."""
  norms = np.ones(9)
  norms[0] = 1e-12
  assert kinds(steps_of({'taps': taps(norms)})) == []
  profile = flow.depth_profile(steps_of({'taps': taps(norms)}))
  assert profile.slope[0] > 0.11 and profile.decades[0] > 2


def test_the_figures_of_vanishing_are_those_of_the_norms():
  verdict = only(steps_of({'taps': falling(10, 0.52)}, start=7), 'vanishing')
  assert verdict.evidence == (
    'the norm falls by 0.52 decades per layer towards the input, 4.7 over 10'
    ' layers (R² 1.00): 0.3 at layer 9, 6.3e-06 at layer 0'
  )
  assert verdict.layers == ('layer 0', 'layer 1', 'layer 2', 'layer 3')
  assert verdict.since == 7


def test_the_figures_of_exploding_are_those_of_the_norms():
  verdict = only(steps_of({'taps': falling(10, -0.52)}), 'exploding')
  assert verdict.evidence == (
    'the norm grows by 0.52 decades per layer towards the input, 4.7 over 10'
    ' layers (R² 1.00): 3.3 at layer 9, 1.6e+05 at layer 0'
  )
  assert verdict.layers == ('layer 0', 'layer 1', 'layer 2', 'layer 3')


def test_a_slight_trend_names_the_layer_next_to_the_input():
  for sign, kind in ((1, 'vanishing'), (-1, 'exploding')):
    record = steps_of({'taps': falling(10, sign * 0.3)})
    assert only(record, kind).layers == ('layer 0',)


def test_since_is_the_start_of_the_last_unbroken_row():
  good, bad = {'taps': falling(9, 0.0)}, {'taps': falling(9, 0.5)}
  half = {'taps': falling(9, 0.13)}  # more than half of what a verdict needs
  for steps, since in (
    ([bad] * 5, 0),
    ([good, bad, bad, bad], 1),
    ([bad, good, bad, bad, bad], 2),
    ([good, half, bad, bad], 1),
    ([good, bad, {}, bad, bad], 1),  # what is not known breaks nothing
    ([good] * 20 + [bad] * 15, 20),
  ):
    assert only(steps_of(*steps), 'vanishing').since == since


def test_a_verdict_on_depth_is_about_the_last_twenty_steps():
  good, bad = {'taps': falling(9, 0.0)}, {'taps': falling(9, 0.5)}
  assert kinds(steps_of(*[bad] * 50, *[good] * 11)) == []
  assert kinds(steps_of(*[good] * 50, *[bad] * 11)) == ['vanishing']
  assert kinds(steps_of(*[good] * 50, *[bad] * 9)) == []
  assert kinds(steps_of(*[bad] * 20, *[{}] * 30)) == ['vanishing']


# What is not finite.


def test_where_it_was_made_is_between_the_last_finite_and_the_next():
  norms = [np.nan, np.nan, np.inf, 1.0, 1.0, None]
  record = steps_of({'taps': taps([1.0] * 6)}, {'taps': taps(norms)}, start=5)
  verdict = only(record, 'not finite')
  assert verdict.layers == ('layer 3', 'layer 2')
  assert verdict.since == 6
  assert verdict.evidence == (
    'at 1 of 2 recorded steps, first at step 6: 1 of 100 numbers of the'
    ' gradient at the output of layer 2; at the output of layer 3, where the'
    ' backward pass came from, all were finite: it was made in the backward'
    ' pass between the two, by layer 3 or what stands before it'
  )


def test_layers_that_no_gradient_reached_are_passed_over():
  record = steps_of({'taps': taps([np.nan, None, None, 1.0])})
  verdict = verdict_of(record, 'not finite')
  assert verdict.layers == ('layer 3', 'layer 0')


def test_at_the_last_layer_it_came_from_the_loss():
  verdict = only(steps_of({'taps': taps([np.nan, np.nan])}), 'not finite')
  assert verdict.layers == ('layer 1',)
  assert 'it came from the loss' in verdict.evidence


def test_an_overflow_of_finite_numbers_is_seen_in_the_norm():
  one = stats(1.0, large_squares=np.inf)
  record = steps_of({'taps': taps([one, 1.0])})
  assert only(record, 'not finite').layers == ('layer 1', 'layer 0')
  record = steps_of(
    {'opt_state': watched({'gradient_norm': np.inf})},
    params={'w': jnp.ones((2, 2))},
  )
  assert only(record, 'not finite').layers == ('w',)


def test_parameters_are_named_where_the_layers_show_nothing():
  params = {'a': jnp.ones((2, 2)), 'b': jnp.ones((2, 2))}
  bad = watched({}, {'gradient_norm': np.nan, 'non_finite': 3})
  alone = steps_of({'opt_state': bad}, params=params)
  assert only(alone, 'not finite').layers == ('b',)
  assert 'at the outputs' not in only(alone, 'not finite').evidence
  both = steps_of({'opt_state': bad, 'taps': taps([1.0])}, params=params)
  verdict = verdict_of(both, 'not finite')
  assert verdict.layers == ('b',)
  assert 'finite at the outputs of all layers' in verdict.evidence


def test_a_loss_that_is_not_finite_is_named_alone():
  record = steps_of(
    *[{'loss': 1.0, 'taps': taps([1.0])}] * 3,
    {'loss': np.nan, 'taps': taps([1.0]), 'accuracy': 1.0},
    {'loss': 1.0, 'taps': taps([1.0])},
  )
  verdict = only(record, 'not finite')
  assert verdict.layers == ('loss',) and verdict.since == 3
  assert verdict.evidence == (
    'at 1 of 5 recorded steps, first at step 3: loss; the gradients are finite'
  )


def test_the_first_step_that_is_not_finite_is_told_for_ever():
  good, bad = {'taps': taps([1.0, 1.0])}, {'taps': taps([np.inf, 1.0])}
  record = steps_of(*[good] * 3, bad, *[good] * 40, bad)
  verdict = only(record, 'not finite')
  assert verdict.since == 3
  assert verdict.evidence.startswith('at 2 of 45 recorded steps')


# What no gradient reaches.


def test_neighbours_without_gradient_are_one_verdict():
  norms = [None, None, 1.0, None, 1.0]
  verdicts = flow.diagnose(steps_of({'taps': taps(norms)}))
  assert [(v.kind, v.layers) for v in verdicts] == [
    ('disconnected', ('layer 0', 'layer 1')),
    ('disconnected', ('layer 3',)),
  ]


def test_disconnected_since():
  on, off = {'taps': taps([1.0, 1.0])}, {'taps': taps([None, 1.0])}
  assert kinds(steps_of(*[off] * 5, on)) == []
  assert kinds(steps_of(on, *[off] * 19)) == []
  record = steps_of(*[on] * 3, *[off] * 20)
  assert only(record, 'disconnected').since == 3


def test_a_layer_whose_gradient_is_zero_at_all_of_the_last_steps():
  on, off = {'taps': taps([1.0, 1.0])}, {'taps': taps([0.0, 1.0])}
  verdict = only(steps_of(*[off] * 3), 'no gradient')
  assert verdict.layers == ('layer 0',) and verdict.since == 0
  assert verdict.evidence == (
    'the gradient at the output of layer 0 is exactly 0; at layer 1, after'
    ' it, there is one'
  )
  assert kinds(steps_of(on, *[off] * 19)) == []
  assert only(steps_of(on, *[off] * 20), 'no gradient').since == 1
  assert kinds(steps_of(*[off] * 20, on)) == []
  almost = {'taps': taps([stats(1e-30, zeros=99), 1.0])}
  assert kinds(steps_of(*[almost] * 3)) == []


def test_steps_without_taps_do_not_interrupt_what_is_zero():
  off = {'taps': taps([0.0, 1.0])}
  assert only(steps_of(off, {'loss': 1.0}, off), 'no gradient')
  assert only(steps_of({'taps': taps([None, 1.0])}, {}), 'disconnected')


def test_an_empty_output_is_not_a_gradient_of_zero():
  empty = stats(0.0, elements=0, zeros=0)
  assert kinds(steps_of({'taps': taps([empty, 1.0])})) == []


# Parameters.

KERNEL = {'w': jnp.ones((2, 2))}


def watching(*rows, params=KERNEL):
  return steps_of(*[{'opt_state': watched(row)} for row in rows], params=params)


@pytest.mark.parametrize(
  ('ratio', 'expected'),
  [
    (0.9e-5, ['small updates']),
    (1.1e-5, []),
    (1e-3, []),
    (0.09, []),
    (0.11, ['large updates']),
    (0.0, []),  # a learning rate of 0 is meant
  ],
)
def test_updates_are_small_or_large_beside_the_parameters(ratio, expected):
  row = {'update_norm': 2 * ratio, 'parameter_norm': 2.0}
  assert kinds(watching(*[row] * 10)) == expected
  assert kinds(watching(*[row] * 9)) == []  # too few steps


def test_updates_of_vectors_are_not_judged():
  row = {'update_norm': 1.0}
  assert kinds(watching(*[row] * 10, params={'bias': jnp.ones(2)})) == []
  assert kinds(watching(*[row] * 10, params={'w': jnp.ones((1, 2, 3))}))


def test_parameters_that_are_all_zero_have_no_ratio():
  assert kinds(watching(*[{'parameter_norm': 0.0}] * 20)) == []


def test_the_median_of_the_last_twenty_steps_decides():
  small, good = {'update_norm': 1e-7}, {}
  assert kinds(watching(*[small] * 40, *[good] * 11)) == []
  record = watching(*[good] * 40, *[small] * 11)
  verdict = only(record, 'small updates')
  assert verdict.since == 40 and verdict.layers == ('w',)
  assert 'changes w by 1.0e-07 of its norm' in verdict.evidence
  assert 'median of 20 recorded steps' in verdict.evidence
  assert kinds(watching(*[good] * 40, *[small] * 9)) == []


def test_the_most_extreme_ratio_is_told():
  params = {'a': jnp.ones((2, 2)), 'b': jnp.ones((2, 2)), 'c': jnp.ones((2, 2))}
  for sizes, kind, told in (
    ((1e-7, 1e-6, 1e-3), 'small updates', '1.0e-07'),
    ((0.2, 0.4, 1e-3), 'large updates', '4.0e-01'),
  ):
    step = {'opt_state': watched(*[{'update_norm': u} for u in sizes])}
    verdict = only(steps_of(*[step] * 10, params=params), kind)
    assert verdict.layers == ('a', 'b')
    assert f'changes a, b by {told}' in verdict.evidence


def test_half_of_the_units_dead_is_a_verdict():
  assert kinds(watching({'dead_units': 4})) == []
  verdict = only(watching({}, {'dead_units': 5}), 'dead units')
  assert verdict.layers == ('w',) and verdict.since == 1
  assert '5 of 10 by w' in verdict.evidence
  assert kinds(watching({'dead_units': 5}, {'dead_units': 4})) == []


def test_a_leaf_without_units_or_without_any_gradient_is_not_dead():
  assert kinds(watching({'dead_units': 0, 'units': 0})) == []
  dead = {'dead_units': 10, 'gradient_norm': 0.0}
  assert 'dead units' not in kinds(watching(dead))


def test_dead_units_are_told_by_the_layer():
  params = {
    'one': {'bias': jnp.ones(2), 'scale': jnp.ones(2)},
    'two': {'bias': jnp.ones(2)},
    'three': {'kernel': jnp.ones((2, 2))},
  }
  rows = [{'dead_units': n} for n in (6, 7, 9, 4)]  # one, one, three, two
  record = steps_of({'opt_state': watched(*rows)}, params=params)
  verdict = only(record, 'dead units')
  assert verdict.layers == ('one', 'three')
  assert '9 of 10 by three/kernel' in verdict.evidence


def test_dead_units_are_told_also_if_the_last_step_was_not_watched():
  record = steps_of(
    {'opt_state': watched({'dead_units': 9})}, {'loss': 1.0}, params=KERNEL
  )
  assert kinds(record) == ['dead units']


# Spikes.


def norms_of_gradient(*norms):
  return watching(*[{'gradient_norm': n} for n in norms])


def test_a_spike_is_many_times_the_usual_norm():
  calm = [1.0, 1.1, 0.9, 1.0, 1.05] * 4
  verdict = only(norms_of_gradient(*calm, 11.0, 1.0), 'spikes')
  assert verdict.since == 20 and verdict.layers == ()
  assert 'up to 11 times' in verdict.evidence
  assert 'the last time at step 20' in verdict.evidence
  assert kinds(norms_of_gradient(*calm, 9.9)) == []


def test_a_spike_needs_ten_steps_before_it():
  assert kinds(norms_of_gradient(*[1.0] * 9, 100.0, 1.0)) == []
  assert kinds(norms_of_gradient(*[1.0] * 10, 100.0)) == ['spikes']


def test_norms_that_always_jump_have_no_spikes():
  calm = [1.0, 3.0, 10.0, 30.0] * 6
  assert kinds(norms_of_gradient(*calm, 300.0)) == []


def test_norms_that_take_turns_have_no_spikes():
  """As of two losses in turn."""
  assert kinds(norms_of_gradient(*[1.0, 30.0] * 12)) == []


def test_the_first_and_the_last_of_several_spikes_are_told():
  calm = [1.0] * 12
  record = norms_of_gradient(*calm, 50.0, *calm, 20.0, *calm)
  verdict = only(record, 'spikes')
  assert verdict.since == 12
  assert 'at 2 of 38 recorded steps' in verdict.evidence
  assert 'up to 50 times, the last time at step 25' in verdict.evidence


def test_all_parameters_together_have_the_norm():
  params = {'a': jnp.ones((2, 2)), 'b': jnp.ones((2, 2))}

  def step(a, b):
    return {'opt_state': watched({'gradient_norm': a}, {'gradient_norm': b})}

  # b is five times its calm norm, and hardly shows in the norm of both.
  calm = [step(3.0, 0.4)] * 12
  assert kinds(steps_of(*calm, step(3.0, 20.0), params=params)) == []
  record = steps_of(*calm, step(40.0, 30.0), params=params)
  assert 'up to 17 times' in only(record, 'spikes').evidence  # 50 / 3.03


def test_with_taps_alone_the_last_layer_shows_spikes():
  calm = [{'taps': taps([1.0, 1.0])}] * 12
  record = steps_of(*calm, {'taps': taps([1.0, 70.0])})
  assert 'at the last layer' in only(record, 'spikes').evidence
  assert kinds(steps_of(*calm, {'taps': taps([70.0, 1.0])})) == []


def test_what_is_not_finite_or_not_known_is_no_spike():
  record = norms_of_gradient(*[1.0] * 12, np.inf, np.nan, 1.0)
  assert kinds(record) == ['not finite']
  zeros = norms_of_gradient(*[0.0] * 12, 1.0)
  assert 'spikes' not in kinds(zeros)


# Conflicts.

LAYERS = {
  'one': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
  'two': {'kernel': jnp.ones((2, 2))},
}  # rows: one/bias, one/kernel, two/kernel


def step_of(one, two, *gradients):
  return {
    'taps': taps([one, two], ['one', 'two']),
    'opt_state': watched(*[{'gradient_norm': g} for g in gradients]),
  }


@pytest.mark.parametrize('outside', [LAYERS, {'params': LAYERS}])
def test_a_parameter_that_gets_nothing_of_what_arrives_is_a_conflict(outside):
  step = step_of(1.0, 1.0, 1.0, 0.0, 1.0)
  verdict = only(steps_of({}, *[step] * 3, params=outside), 'conflict')
  (name,) = verdict.layers
  assert name.endswith('one/kernel') and verdict.since == 1
  assert 'arrives at the layer of' in verdict.evidence
  assert kinds(steps_of(step, step_of(1.0, 1.0, 1, 1, 1), params=LAYERS)) == []


def test_a_parameter_that_gets_what_does_not_arrive_is_a_conflict():
  step = step_of(1.0, None, 1.0, 1.0, 0.5)
  verdicts = flow.diagnose(steps_of(*[step] * 3, params=LAYERS))
  assert [v.kind for v in verdicts] == ['disconnected', 'conflict']
  assert verdicts[1].layers == ('two/kernel',)
  assert 'although none arrives' in verdicts[1].evidence
  cut_off = step_of(1.0, None, 1.0, 1.0, 0.0)
  assert kinds(steps_of(*[cut_off] * 3, params=LAYERS)) == ['disconnected']


def test_a_conflict_is_not_told_where_it_is_explained():
  off = step_of(0.0, 1.0, 0.0, 0.0, 0.0)
  assert 'conflict' not in kinds(steps_of(off, params=LAYERS))
  bad = step_of(1.0, np.nan, 0.0, 0.0, 0.0)
  assert kinds(steps_of(bad, params=LAYERS)) == ['not finite']


def test_a_conflict_needs_taps_and_a_watched_optimizer_at_one_step():
  step = step_of(1.0, 1.0, 1.0, 0.0, 1.0)
  apart = [{name: value} for name, value in step.items()]
  assert kinds(steps_of(*apart, *apart, params=LAYERS)) == []
  assert kinds(steps_of(*apart, step, params=LAYERS)) == ['conflict']


def test_a_stack_with_one_layer_that_is_cut_off_is_no_conflict():
  """Its parameters are one array, which gets the gradient of the others."""
  step = {
    'taps': taps([None, 1.0], ['one[0]', 'one[1]']),
    'opt_state': watched({}, {}, {}),
  }
  assert kinds(steps_of(step, params=LAYERS)) == ['disconnected']


def test_many_names_are_told_shortly():
  names = [f'layer {i}' for i in range(6)]
  verdict = only(
    steps_of({'taps': taps([None] * 5 + [1.0], names)}), 'disconnected'
  )
  assert verdict.layers == tuple(names[:5])
  assert 'layer 0, layer 1, … layer 4 (5 in all)' in verdict.evidence
  verdict = only(
    steps_of({'taps': taps([None] * 4 + [1.0, 1.0], names)}), 'disconnected'
  )
  assert 'of layer 0, layer 1, layer 2, layer 3' in verdict.evidence


def test_the_whole_model_is_called_so():
  record = steps_of({'taps': taps([1.0, np.nan], ['a', ''])})
  assert only(record, 'not finite').layers == ('the model',)


def test_the_gravest_comes_first():
  params = {f'layer {i}': {'kernel': jnp.ones((2, 2))} for i in range(8)}
  row = {'update_norm': 1e-8, 'dead_units': 5}
  norms = [None, *(10.0 ** (i - 6) for i in range(6)), 0.0]
  step = {'taps': taps(norms), 'opt_state': watched(*[row] * 8)}
  spike = {
    'taps': taps(norms),
    'opt_state': watched(*[{**row, 'gradient_norm': 1e3}] * 8),
  }
  found = kinds(steps_of(*[step] * 12, spike, params=params))
  order = [KINDS.index(kind) for kind in found]
  assert order == sorted(order)
  assert set(found) >= {'disconnected', 'no gradient', 'dead units', 'spikes'}
  nan = {'loss': np.nan, **step}
  assert kinds(steps_of(*[step] * 12, nan, params=params))[0] == 'not finite'


# Networks that are wired wrongly.


class Frozen(networks.nn.Module):
  @networks.nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', networks.gain(1.0), (32, 16))
    bias = self.param('bias', networks.nn.initializers.zeros, (16,))
    return x @ jax.lax.stop_gradient(kernel) + bias


class WithFrozen(networks.nn.Module):
  @networks.nn.compact
  def __call__(self, x):
    x = networks.nn.tanh(Frozen(name='frozen')(x))
    return networks.nn.Dense(4, name='head')(x)


class WithUnused(networks.nn.Module):
  @networks.nn.compact
  def __call__(self, x):
    networks.nn.Dense(4, name='unused')(x)
    return networks.nn.Dense(4, name='head')(x)


def trained_with(model, penalty=0.0):
  x, labels = networks.data(0)
  tapped, tx = Tapped(model), flow.watch(optax.sgd(0.01))
  with jax.numpy_rank_promotion('allow'):
    variables = model.init(jax.random.key(0), x)
    empty_taps = tapped.init(variables, x)

    def loss(variables, empty_taps):
      logits = tapped.apply(variables, x, taps=empty_taps)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      squares = [jnp.sum(jnp.square(p)) for p in jax.tree.leaves(variables)]
      return losses.mean() + penalty * sum(squares)

    @jax.jit
    def step(variables, state):
      grads, found = jax.grad(loss, argnums=(0, 1))(variables, empty_taps)
      updates, state = tx.update(grads, state, variables)
      return optax.apply_updates(variables, updates), state, found

    state, record = tx.init(variables), flow.Record(variables)
    for i in range(3):
      variables, state, found = step(variables, state)
      record.add(i, taps=found, opt_state=state)
  return record


def test_a_frozen_kernel_is_a_conflict():
  verdict = only(trained_with(WithFrozen()), 'conflict')
  assert verdict.layers == ('params/frozen/kernel',)
  assert 'its own is exactly 0' in verdict.evidence


def test_a_penalty_on_an_unused_layer_is_a_conflict():
  verdicts = flow.diagnose(trained_with(WithUnused(), penalty=1e-3))
  assert [(v.kind, v.layers) for v in verdicts] == [
    ('disconnected', ('unused',)),
    ('conflict', ('params/unused/kernel',)),
  ]
  alone = trained_with(WithUnused())
  assert only(alone, 'disconnected').layers == ('unused',)
