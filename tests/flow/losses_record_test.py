"""What a record keeps of losses that are reconciled, and what it says of it."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from optax_ghm import conflict, flow
from tests.support.hand_made import KERNEL, losses, record_of, watched


def state_of(gramian, weights, non_finite):
  square = np.float32(gramian)
  norms = np.sqrt(np.diagonal(square))
  return conflict.ReconciledAggregateState(
    gramian=square,
    weights=np.float32(weights),
    cosines=square / norms / norms[:, None],
    steps=np.int32(3),
    conflicts=np.int32(2),
    non_finite=np.int32(non_finite),
  )


STATE = state_of([[4, -1], [-1, 1]], [0.5, 2], [0, 7])
OTHER = state_of(np.eye(3), [1, 1, 1], [0, 0, 0])


def assert_recorded(record):
  stats = record.loss_stats
  assert stats['weight'].tolist() == [[0.5, 2]]
  assert stats['norm'].tolist() == [[2, 1]]
  assert stats['non_finite'].tolist() == [[0, 7]]
  assert stats['cosine'].tolist() == [[[1, -0.5], [-0.5, 1]]]
  assert stats['lowest_cosine'].tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize(
  'around',
  [
    lambda state: state,
    lambda state: ((), {'a': [state, np.ones(3)]}),
    lambda state: watched({})._replace(inner_state=(state, ())),
    lambda state: (state, watched({})),
  ],
  ids=['alone', 'nested', 'inside watch', 'before watch'],
)
def test_losses_are_kept_with_or_without_a_watched_optimizer(around):
  opt_state = around(STATE)
  has_watch = 'WatchState' in repr(opt_state)
  record = flow.Record(KERNEL)
  record.add(0, opt_state=opt_state, loss=1.0)
  assert_recorded(record)
  assert len(record.having('losses')) == 1
  assert len(record.having('watched')) == has_watch
  assert record.leaf_stats['gradient_norm'].tolist() == [
    [1.0 if has_watch else pytest.approx(np.nan, nan_ok=True)]
  ]


def test_states_are_found_inside_the_wrappers_of_optax():
  aggregate = conflict.reconciled_aggregate(2)

  @jax.jit
  def states(params):
    return [
      tx.init(params)
      for tx in (
        optax.MultiSteps(optax.chain(aggregate, optax.sgd(0.1)), 2),
        optax.inject_hyperparams(
          lambda learning_rate: optax.chain(aggregate, optax.sgd(learning_rate))
        )(0.1),
        optax.masked(aggregate, {'w': True}),
        optax.chain(aggregate, flow.watch(optax.adam(0.1))),
      )
    ]

  record = flow.Record(KERNEL)
  for step, state in enumerate(states(KERNEL)):
    record.add(step, opt_state=state)
  assert record.loss_stats['weight'].tolist() == [[0, 0]] * 4
  assert len(record.having('watched')) == 1


def test_a_state_that_the_next_step_has_donated_is_kept():
  state = jax.device_put(STATE)
  record = flow.Record()
  record.add(0, opt_state=state)
  for leaf in state:
    leaf.delete()
  assert_recorded(record)


def test_what_does_not_fit_is_refused():
  record = flow.Record()
  record.add(0, opt_state=STATE)
  several = jax.tree.map(lambda u: np.stack([u, u]), STATE)
  for state, said in (
    (OTHER, 'number of losses differs from that of the steps before: 3 and 2'),
    ((STATE, STATE), 'found 0 and 2'),
    ((watched({}), watched({}), STATE), 'found 2 and 1'),
    (several, r'leading axes \(2,\): it is of replicas'),
    (optax.EmptyState(), 'conflict.reconciled_aggregate, .* found 0 and 0'),
  ):
    with pytest.raises(ValueError, match=said):
      record.add(1, opt_state=state)
  assert_recorded(record)


def test_a_saved_record_has_its_losses_and_the_number_of_them(tmp_path):
  steps = [{'loss': i} for i in range(600)]
  for i in range(5, 600, 25):
    steps[i]['losses'] = losses(-0.1 * (i % 3), non_finite=[i, 0])
  record = record_of(*steps, capacity=100)
  assert record.having('losses').steps.tolist() == list(range(5, 600, 25))
  record.save(tmp_path / 'r')
  loaded = flow.Record.load(tmp_path / 'r')
  for name, values in record.loss_stats.items():
    np.testing.assert_array_equal(loaded.loss_stats[name], values)
  assert len(loaded.having('losses')) == len(record.having('losses'))
  with pytest.raises(ValueError, match='number of losses differs'):
    loaded.add(600, opt_state=OTHER)
  loaded.add(600, opt_state=STATE)
  again = loaded.until(600)
  np.testing.assert_array_equal(
    again.loss_stats['cosine'], record.loss_stats['cosine']
  )


def test_a_file_from_before_there_were_losses_is_read(tmp_path):
  record_of({'loss': 1.0}, {'loss': 0.5}).save(tmp_path / 'new')
  with np.load(tmp_path / 'new') as file:
    kept = {k: file[k] for k in file.files if k != 'has_losses'}
  about = str(kept['about'])
  kept['about'] = np.array(about.replace('"losses": 0, ', ''))
  assert kept['about'] != about
  with open(tmp_path / 'old', 'wb') as file:
    np.savez(file, **kept)
  record = flow.Record.load(tmp_path / 'old')
  assert record.scalars['loss'].tolist() == [1, 0.5]
  assert record.loss_stats['weight'].shape == (2, 0)
  assert record.loss_stats['cosine'].shape == (2, 0, 0)


def test_writers_get_the_numbers_of_every_loss():
  written = []
  record = flow.Record(writers=[lambda step, named: written.append(named)])
  record.add(0, opt_state=STATE, loss=1.0)
  assert len(record) == 1
  expected = {'loss': 1.0}
  for name, (first, second) in {
    'weight': (0.5, 2),
    'norm': (2, 1),
    'non_finite': (0, 7),
    'lowest_cosine': (-0.5, -0.5),
  }.items():
    expected |= {f'losses/{name}/0': first, f'losses/{name}/1': second}
  assert written == [expected]
  assert all(type(x) is float for x in written[0].values())


def test_losses_are_a_table():
  console = rich.console.Console(file=io.StringIO(), width=120)
  step = {'losses': losses(-0.5, [0.5, 2], [4, 3], [0, 7])}
  flow.print_report(record_of(step, {'loss': 1.0}), console)
  text = console.file.getvalue()
  rows = [
    [cell.strip() for cell in line.strip('│').split('│')]
    for line in text.splitlines()
    if line.startswith('│')
  ]
  assert rows == [['0', '0.5', '4', '-0.5', '0'], ['1', '2', '3', '-0.5', '7']]
  assert '1 with several losses' in text


def test_what_a_jitted_step_leaves_is_what_is_read():
  tx = optax.chain(
    conflict.reconciled_aggregate(2, conflict.mean_weights), optax.sgd(0.1)
  )

  @jax.jit
  def step(rows):
    _, state = tx.update(rows, tx.init({'w': jnp.zeros(2)}))
    return state

  record = flow.Record()
  record.add(0, opt_state=step({'w': np.float32([[3, 4], [-3, 4]])}))
  stats = record.loss_stats
  np.testing.assert_allclose(stats['norm'], [[5, 5]], rtol=1e-6)
  np.testing.assert_allclose(stats['lowest_cosine'], [[0.28, 0.28]], rtol=1e-6)
  assert stats['weight'].tolist() == [[0.5, 0.5]]
