"""What a record was given is what it says later, in bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ghm import flow
from optax_ghm.flow import _record
from tests.support import hand_made
from tests.support.hand_made import MEASURED, ONES, taps, watched

PARAMS = {'a': np.ones((2, 3), 'f'), 'é\n"b"': {'bias': np.ones(3, 'f')}}
NAMES = ['encoder/Dense_0', 'größe "x"\t<b>']


def assert_same_records(actual, expected):
  """Compares everything that can be read."""
  assert actual.layers == expected.layers
  assert actual.leaves == expected.leaves
  np.testing.assert_array_equal(actual.steps, expected.steps)
  stats = 'layer_stats', 'leaf_stats', 'loss_stats', 'batch_norm_stats'
  for name in ('scalars', *stats):
    one, other = getattr(actual, name), getattr(expected, name)
    assert list(one) == list(other)
    for key, values in one.items():
      np.testing.assert_array_equal(values, other[key], err_msg=key)
  for name in expected.scalars:
    np.testing.assert_array_equal(
      actual.has_scalar(name), expected.has_scalar(name)
    )
  assert (actual.histograms is None) == (expected.histograms is None)
  if expected.histograms is not None:
    np.testing.assert_array_equal(actual.histograms, expected.histograms)


def full_record(add=hand_made.add, **options):
  """All that a step can have, and nothing."""
  record = flow.Record(PARAMS, **options)
  of_layers = functools.partial(taps, names=NAMES, kernels=[True, False])
  for i, loss in enumerate([1.0, np.nan, np.inf, -np.inf]):
    add(
      record,
      7 * i,
      taps=of_layers([1.0 + i, np.nan if i == 2 else 1e-20]),
      opt_state=watched({'gradient_norm': np.inf}, {'cosine': 0.25}),
      loss=loss,
    )
  add(
    record, 30, taps=of_layers([1.0, 2.0], histogram=np.arange(64, dtype='f'))
  )
  add(record, 31, **{'größe': 2.0})
  add(record, 32)
  add(record, 33, opt_state=watched({}, {}))
  return record


def test_a_record_made_by_hand_is_what_add_makes():
  assert_same_records(full_record(), full_record(flow.Record.add))


# What is read.


def test_what_is_read_is_what_the_statistics_say():
  @jax.jit
  def measure(cotangents):
    def loss(empty_taps):
      return sum(
        jnp.vdot(flow.tap(jnp.zeros_like(c), empty_taps[name]), c)
        for name, c in cotangents.items()
      )

    return jax.grad(loss)(flow.Taps.empty(['one', 'other'], histogram=True))

  record = flow.Record()
  every = [
    {
      'one': np.arange(6, dtype='f') * np.float32(10**i),
      'other': np.array([1e-20, 1e20, -1], 'f') * np.float32(i),
    }
    for i in range(3)
  ]
  for i, cotangents in enumerate(every):
    record.add(10 * i, taps=measure(cotangents))
  assert record.steps.tolist() == [0, 10, 20]
  assert [layer.name for layer in record.layers] == ['one', 'other']
  expected = {
    'calls': lambda u: 1,
    'elements': np.size,
    'sum': np.sum,
    'norm': np.linalg.norm,
    'rms': lambda u: np.sqrt(np.mean(u**2)),
    'largest': lambda u: np.max(np.abs(u)),
    'zeros': lambda u: np.sum(u == 0),
    'non_finite': lambda u: 0,
  }
  assert record.layer_stats.keys() == expected.keys()
  for name, values in record.layer_stats.items():
    numbers = [[u.astype(float) for u in pair.values()] for pair in every]
    numbers = [[expected[name](u) for u in pair] for pair in numbers]
    np.testing.assert_allclose(values, numbers, rtol=1e-6, err_msg=name)
  counted = record.layer_stats['elements'] - record.layer_stats['zeros']
  np.testing.assert_array_equal(record.histograms.sum(2), counted)


def test_every_column_of_a_watched_optimizer_is_read_by_its_name():
  record = flow.Record(PARAMS)
  rows = [
    {name: 10.0 * i + j for j, name in enumerate(MEASURED)} for i in (1, 2)
  ]
  state = ('of another', {'inner': watched(*rows)}, [np.ones(2)])
  record.add(3, opt_state=state)
  for name in MEASURED:
    assert record.leaf_stats[name].tolist() == [[rows[0][name], rows[1][name]]]
  ratios = record.leaf_stats['update_ratio']
  np.testing.assert_allclose(ratios, [[11 / 12, 21 / 22]])
  assert set(record.leaf_stats) == {*MEASURED, 'update_ratio'}
  assert record.leaves == (flow.Leaf('a', 2), flow.Leaf('é\n"b"/bias', 1))


def test_what_a_step_does_not_have_is_nan():
  record = hand_made.record_of(
    {'loss': 1.0},
    {'taps': taps([2.0])},
    {'opt_state': watched({'gradient_norm': 3.0}), 'loss': 2},
    params={'a': np.ones(2, 'f')},
  )
  norms = record.layer_stats['norm'][:, 0]
  np.testing.assert_array_equal(norms, [np.nan, 2, np.nan])
  np.testing.assert_array_equal(
    record.leaf_stats['gradient_norm'][:, 0], [np.nan, np.nan, 3]
  )
  np.testing.assert_array_equal(record.scalars['loss'], [1, np.nan, 2])
  assert record.has_scalar('loss').tolist() == [True, False, True]
  assert record.has_scalar('accuracy').tolist() == [False, False, False]
  assert record.histograms is None
  hand_made.add(record, 3, taps=taps([1.0], histogram=ONES))
  assert record.histograms.shape == (4, 1, 64)
  assert np.isnan(record.histograms[:3]).all()
  np.testing.assert_array_equal(record.histograms[3, 0], ONES)


def test_an_empty_record_can_be_read():
  record = flow.Record()
  assert len(record) == 0 and record.steps.shape == (0,)
  assert record.scalars == {} and record.histograms is None
  assert record.layer_stats['norm'].shape == (0, 0)
  assert record.leaf_stats['cosine'].shape == (0, 0)
  assert record.batch_norm_stats['clipped'].shape == (0, 0)


def test_scalars_of_any_kind_are_kept():
  of_python = [0.5, 3, True, np.nan, -np.inf, 3_000_000_000]
  of_numpy = [np.float32(0.5), np.float64(0.5), np.int64(3_000_000_000)]
  of_jax = [jnp.asarray(u) for u in (np.float32(0.5), np.int32(7))]
  of_jax.append(jnp.asarray(np.asarray(0.5, jnp.bfloat16)))
  values = [*of_python, *of_numpy, *of_jax]
  record = flow.Record()
  record.add(0, **{f'value {i}': value for i, value in enumerate(values)})
  for i, value in enumerate(values):
    found = record.scalars[f'value {i}']
    np.testing.assert_allclose(found, [float(value)], rtol=1e-6)


# Not waiting.


def test_a_state_that_the_next_step_has_donated_is_kept():
  tx = flow.watch(optax.sgd(0.1, momentum=0.9))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    def loss(params, taps):
      hidden = flow.tap(params['w'] * 2, taps['hidden'])
      return jnp.sum(jnp.square(hidden))

    value, (grads, taps) = jax.value_and_grad(loss, argnums=(0, 1))(
      params, flow.Taps.empty(['hidden'])
    )
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, taps, value

  params = {'w': np.ones(3, 'f')}
  params, state = jax.jit(lambda: (params, tx.init(params)))()
  record, norms = flow.Record(params), []
  for i in range(5):
    before = state
    params, state, found, value = step(params, state)
    norms.append(np.array(state.gradient_norm)[0])
    record.add(i, taps=found, opt_state=state, loss=value)
    assert before.zero_steps.is_deleted()  # it was donated
    measured = np.array(state.measured)
    for leaf in (*jax.tree.leaves(found), value, state.measured):
      leaf.delete()  # as if donated too
    state = state._replace(measured=jax.device_put(measured))
  read = record.leaf_stats['gradient_norm'][:, 0]
  np.testing.assert_allclose(read, norms, rtol=1e-6)
  read = record.layer_stats['norm'][:, 0]  # dL/dw is twice that at the tap
  np.testing.assert_allclose(read, np.array(norms) / 2, rtol=1e-6)


class OnItsWay:
  """A result that says when it is asked for."""

  def __init__(self, value, arrived, log):
    self.value, self.arrived, self.log = value, arrived, log

  def copy_to_host_async(self):
    self.log.append('copy')

  def is_ready(self):
    return self.value in self.arrived

  def __array__(self, dtype=None, copy=None):
    self.log.append(('read', self.value))
    return np.array(self.value)

  def block_until_ready(self):
    raise AssertionError('this waits.')


@pytest.fixture
def on_their_way(monkeypatch):
  arrived, log = set(), []
  monkeypatch.setattr(
    _record,
    '_copy',
    lambda tree: jax.tree.map(lambda x: OnItsWay(float(x), arrived, log), tree),
  )
  return arrived, log


def losses(count):
  return [jnp.asarray(np.float32(i)) for i in range(count)]


def test_adding_reads_nothing_that_has_not_arrived(on_their_way):
  arrived, log = on_their_way
  written = []
  record = flow.Record(writers=[lambda step, numbers: written.append(step)])
  *first, last = losses(6)
  for i, loss in enumerate(first):
    record.add(i, loss=loss)
  assert log == ['copy'] * 5 and not written
  arrived.update([0, 1, 3])
  record.add(5, loss=last)
  assert written == [0, 1]  # in order: 3 waits for 2
  assert [x for x in log if x != 'copy'] == [('read', 0), ('read', 1)]
  assert record.scalars['loss'].tolist() == [0, 1, 2, 3, 4, 5]  # this waits
  assert written == [0, 1, 2, 3, 4, 5]


def test_no_more_than_so_many_steps_are_on_their_way(on_their_way):
  _, log = on_their_way
  record, most = flow.Record(), _record.MOST_PENDING
  for i, loss in enumerate(losses(most + 2)):
    record.add(i, loss=loss)
    if i == most - 1:
      assert log == ['copy'] * most
  assert log[most:] == ['copy', ('read', 0), 'copy', ('read', 1)]


@pytest.mark.parametrize(
  'read',
  [
    len,
    lambda r: len(r.steps),
    lambda r: len(r.scalars['loss']),
    lambda r: len(r.layer_stats['norm']),
    lambda r: len(r.leaf_stats['cosine']),
    lambda r: len(r.has_scalar('loss')),
  ],
)
def test_whoever_reads_waits_for_all_steps(on_their_way, read):
  record = flow.Record()
  for i, loss in enumerate(losses(3)):
    record.add(i, loss=loss)
  assert read(record) == 3


# Bounded.


@pytest.mark.parametrize('capacity', [4, 5, 6, 16])
def test_the_history_is_bounded_and_keeps_the_first_and_the_last(capacity):
  record = flow.Record(capacity=capacity)
  for i in range(100):
    hand_made.add(record, i, loss=i)
    steps = record.steps
    assert len(steps) <= capacity
    assert steps[0] == 0 and steps[-1] == i
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(record.scalars['loss'], steps)
  assert len(steps) >= capacity // 2
  with pytest.raises(ValueError, match='at least 4, got 3'):
    flow.Record(capacity=3)


def test_what_is_recent_is_dense():
  record = flow.Record(capacity=32)
  for i in range(500):
    hand_made.add(record, i)
    if i < 32:
      assert len(record) == i + 1  # nothing is dropped before it is full
  gaps = np.diff(record.steps)
  assert (np.diff(gaps[:-1]) <= 0).all()  # the last step is always kept
  assert gaps[0] > 8 * gaps[-2:].max()


@pytest.mark.parametrize('offset', [0, 5, 24])
def test_thinning_keeps_measurements_of_all_times(offset):
  measured = {'loss': 1.0, 'taps': taps([1.0])}
  steps = [measured if i % 25 == offset else {'loss': 1.0} for i in range(600)]
  record = hand_made.record_of(*steps, capacity=100)
  assert len(record) <= 100
  kept = record.having('tapped').steps
  assert kept.tolist() == list(range(offset, 600, 25))


@pytest.mark.parametrize(
  'bad',
  [
    {'loss': np.nan},
    {'taps': taps([np.inf])},
    {'opt_state': watched({'gradient_norm': np.nan})},
  ],
)
@pytest.mark.parametrize('at', [0, 3, 10, 51])
def test_the_first_step_that_is_not_finite_is_never_dropped(bad, at):
  good = {'loss': 1.0, 'taps': taps([1.0]), 'opt_state': watched({})}
  record = flow.Record({'a': np.ones(2, 'f')}, capacity=8)
  for i in range(100):
    hand_made.add(record, i, **(bad if i in (at, 70, 71, 72) else good))
    assert len(record) <= 8
    assert (np.diff(record.steps) > 0).all()
    assert i < at or at in record.steps
    assert record.steps[-1] == i and record.steps[0] == 0


# What cannot be added.


def test_steps_must_increase_also_while_they_are_on_their_way(on_their_way):
  record = flow.Record()
  record.add(3)
  for step in (3, 2, -1):
    with pytest.raises(ValueError, match=f'step {step} comes after step 3'):
      record.add(step, loss=1.0)
  record.add(5, loss=losses(1)[0])
  with pytest.raises(ValueError, match='step 4 comes after step 5'):
    record.add(4)
  assert record.steps.tolist() == [3, 5]
  with pytest.raises(ValueError, match='step 5 comes after step 5'):
    record.add(5)


def test_layers_must_stay_the_same():
  record = flow.Record()
  record.add(0, taps=taps([1.0, 2.0], ['a', 'b']))
  for names in (['b', 'a'], ['a', 'c'], ['a']):
    with pytest.raises(ValueError, match='layers differ'):
      record.add(1, taps=taps([1.0, 2.0][: len(names)], names))
  record.add(1, taps=taps([3.0, 4.0], ['a', 'b']))
  assert record.layer_stats['norm'].tolist() == [[1, 2], [3, 4]]


def test_the_state_must_be_watched_once_and_be_that_of_the_parameters():
  record = flow.Record({'a': np.ones(2, 'f')})
  for state in ((), optax.EmptyState(), (watched({}), watched({}))):
    with pytest.raises(ValueError, match=f'found {2 * (len(state) > 0)}'):
      record.add(0, opt_state=state)
  assert len(record) == 0
  for params, count in ((None, 0), (PARAMS, 2)):
    with pytest.raises(ValueError, match=f'watches 1 leaves.*of {count}'):
      flow.Record(params).add(0, opt_state=watched({}))


def test_a_watched_optimizer_of_parameters_without_gradient_is_recorded():
  params = {'count': np.arange(3)}
  record = flow.Record(params)
  state = jax.jit(flow.watch(optax.identity()).init)(params)
  record.add(0, opt_state=state, loss=1.0)
  assert record.leaf_stats['gradient_norm'].shape == (1, 0)
