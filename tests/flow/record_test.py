"""What a record was given is what it says, later and from disk."""

import functools
import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ghm import flow
from optax_ghm.flow import _record, _record_file, _tap, _watch
from optax_ghm.linen import Tapped
from tests.support.hand_made import MEASURED, NUMBERS, stats, taps, watched

PARAMS = {'a': jnp.ones((2, 3)), 'é\n"b"': {'bias': jnp.ones(3)}}
NAMES = ['encoder/Dense_0', 'größe "x"\t<b>']
LAYER_STATS = (
  'calls',
  'elements',
  'sum',
  'norm',
  'rms',
  'largest',
  'zeros',
  'non_finite',
)


def assert_same_records(actual, expected):
  """Compares everything that can be read."""
  assert actual.layers == expected.layers
  assert actual.leaves == expected.leaves
  np.testing.assert_array_equal(actual.steps, expected.steps)
  for name in ('scalars', 'layer_stats', 'leaf_stats'):
    one, other = getattr(actual, name), getattr(expected, name)
    assert list(one) == list(other)
    for key, values in one.items():
      np.testing.assert_array_equal(values, other[key], err_msg=key)
  for name in expected.scalars:
    np.testing.assert_array_equal(
      actual.has_scalar(name), expected.has_scalar(name)
    )
  if expected.histograms is None:
    assert actual.histograms is None
  else:
    np.testing.assert_array_equal(actual.histograms, expected.histograms)


# What is read.


def test_what_is_read_is_what_the_statistics_say():
  empty_tap = flow.empty_tap(histogram=True)

  def cotangents(i):
    return [jnp.arange(6.0) * 10.0**i, jnp.array([1e-20, 1e20, -1.0]) * i]

  def measure(i):
    def loss(empty_taps):
      return sum(
        jnp.vdot(flow.tap(jnp.zeros_like(c), s), c)
        for c, s in zip(cotangents(i), empty_taps, strict=True)
      )

    return jax.grad(loss)([empty_tap, empty_tap])

  record = flow.Record()
  every = [measure(i) for i in range(3)]
  for i, (one, other) in enumerate(every):
    record.add(
      10 * i,
      taps=flow.Taps(
        {'one': one, 'other': other}, (flow.Layer('one'), flow.Layer('other'))
      ),
    )
  assert record.steps.tolist() == [0, 10, 20]
  assert [layer.name for layer in record.layers] == ['one', 'other']
  assert set(record.layer_stats) == set(LAYER_STATS)
  for name in LAYER_STATS:
    np.testing.assert_allclose(
      record.layer_stats[name],
      [[float(getattr(s, name)) for s in pair] for pair in every],
      rtol=1e-6,
      err_msg=name,
    )
  np.testing.assert_array_equal(
    record.histograms, [[s.histogram for s in pair] for pair in every]
  )


def test_the_largest_of_several_calls_is_at_most_the_norm():
  record = flow.Record()
  record.add(0, taps=taps([stats(5.0, calls=2, largest=8.0), stats(5.0)]))
  record.add(1, taps=taps([stats(5.0, calls=2, largest=4.0), 3.0]))
  assert record.layer_stats['largest'].tolist() == [[5, 5], [4, 3]]
  np.testing.assert_allclose(
    record.layer_stats['rms'], [[0.5, 0.5], [0.5, 0.3]], rtol=1e-6
  )


def test_every_column_of_a_watched_optimizer_is_read_by_its_name():
  record = flow.Record(PARAMS)
  rows = [
    {name: 10.0 * i + j for j, name in enumerate(MEASURED)} for i in (1, 2)
  ]
  record.add(
    3, opt_state=('of another', {'inner': watched(*rows)}, [jnp.ones(2)])
  )
  for name in MEASURED:
    assert record.leaf_stats[name].tolist() == [[rows[0][name], rows[1][name]]]
  np.testing.assert_allclose(
    record.leaf_stats['update_ratio'], [[11 / 12, 21 / 22]]
  )
  assert set(record.leaf_stats) == {*MEASURED, 'update_ratio'}
  assert record.leaves == (flow.Leaf('a', 2), flow.Leaf('é\n"b"/bias', 1))


def test_a_ratio_to_a_parameter_of_zeros_is_infinite_and_warns_of_nothing():
  record = flow.Record({'a': jnp.ones(2), 'b': jnp.ones(2)})
  record.add(
    0,
    opt_state=watched(
      {'parameter_norm': 0.0}, {'parameter_norm': 0.0, 'update_norm': 0.0}
    ),
  )
  ((one, other),) = record.leaf_stats['update_ratio']
  assert one == np.inf and np.isnan(other)


def test_steps_without_taps_or_state_are_nan():
  record = flow.Record({'a': jnp.ones(2)})
  record.add(0, loss=1.0)
  record.add(1, taps=taps([2.0]))
  record.add(2, opt_state=watched({'gradient_norm': 3.0}), loss=2)
  norms = record.layer_stats['norm'][:, 0]
  np.testing.assert_array_equal(norms, [np.nan, 2, np.nan])
  np.testing.assert_array_equal(
    record.leaf_stats['gradient_norm'][:, 0], [np.nan, np.nan, 3]
  )
  np.testing.assert_array_equal(record.scalars['loss'], [1, np.nan, 2])
  assert record.has_scalar('loss').tolist() == [True, False, True]
  assert record.has_scalar('accuracy').tolist() == [False, False, False]
  assert record.histograms is None


def test_histograms_may_come_at_some_steps():
  record, counts = flow.Record(), jnp.arange(64.0)
  record.add(0, taps=taps([1.0]))
  record.add(1, taps=taps([1.0], histogram=counts))
  assert record.histograms.shape == (2, 1, 64)
  assert np.isnan(record.histograms[0]).all()
  np.testing.assert_array_equal(record.histograms[1, 0], counts)


def test_an_empty_record_can_be_read():
  record = flow.Record()
  assert len(record) == 0 and record.steps.shape == (0,)
  assert record.scalars == {} and record.histograms is None
  assert record.layer_stats['norm'].shape == (0, 0)
  assert record.leaf_stats['cosine'].shape == (0, 0)


@pytest.mark.parametrize(
  'value',
  [
    0.5,
    3,
    True,
    np.float32(0.5),
    np.float64(0.5),
    np.int64(7),
    jnp.float32(0.5),
    jnp.bfloat16(0.5),
    jnp.int32(7),
    jnp.array([[]]).size,
    np.nan,
    -np.inf,
  ],
  ids=repr,
)
def test_a_scalar_of_any_kind_is_kept(value):
  record = flow.Record()
  record.add(0, value=value)
  np.testing.assert_array_equal(record.scalars['value'], [float(value)])


@pytest.mark.parametrize(
  'tokens', [3_000_000_000, np.int64(3_000_000_000)], ids=['int', 'int64']
)
def test_a_large_count_is_kept(tokens):
  record = flow.Record()
  record.add(0, tokens=tokens)
  np.testing.assert_allclose(record.scalars['tokens'], [3e9], rtol=1e-6)


# Not waiting.


def _trained_steps(record, count=5):
  """Donates the state; returns the norms that the record should hold."""
  tx = flow.watch(optax.sgd(0.1, momentum=0.9))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, taps):
    def loss(params, taps):
      hidden = flow.tap(params['w'] * 2, taps['hidden'])
      return jnp.sum(jnp.square(hidden))

    value, (grads, taps) = jax.value_and_grad(loss, argnums=(0, 1))(
      params, taps
    )
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, taps, value

  params = {'w': jnp.ones(3)}
  state, norms = tx.init(params), []
  for i in range(count):
    before = state
    params, state, found, value = step(
      params, state, flow.Taps.empty(['hidden'])
    )
    norms.append(np.array(state.gradient_norm)[0])
    record.add(i, taps=found, opt_state=state, loss=value)
    assert before.zero_steps.is_deleted()  # it was donated
    copy = jnp.array(state.measured, copy=True)
    for leaf in (*jax.tree.leaves(found), value, state.measured):
      leaf.delete()  # as if donated too
    state = state._replace(measured=copy)
  return norms


def test_a_state_that_the_next_step_has_donated_is_kept():
  record = flow.Record({'w': jnp.ones(3)})
  norms = _trained_steps(record)
  np.testing.assert_allclose(
    record.leaf_stats['gradient_norm'][:, 0], norms, rtol=1e-6
  )
  np.testing.assert_allclose(  # dL/dw is twice that at the tap
    record.layer_stats['norm'][:, 0], np.array(norms) / 2, rtol=1e-6
  )


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


def test_adding_reads_nothing_that_has_not_arrived(on_their_way):
  arrived, log = on_their_way
  written = []
  record = flow.Record(writers=[lambda step, numbers: written.append(step)])
  for i in range(5):
    record.add(i, loss=jnp.float32(i))
  assert log == ['copy'] * 5 and not written
  arrived.update([0, 1, 3])
  record.add(5, loss=jnp.float32(5))
  assert written == [0, 1]  # in order: 3 waits for 2
  assert [x for x in log if x != 'copy'] == [('read', 0), ('read', 1)]
  assert record.scalars['loss'].tolist() == [0, 1, 2, 3, 4, 5]  # this waits
  assert written == [0, 1, 2, 3, 4, 5]


def test_no_more_than_so_many_steps_are_on_their_way(on_their_way):
  _, log = on_their_way
  record, most = flow.Record(), _record.MOST_PENDING
  for i in range(most):
    record.add(i, loss=jnp.float32(i))
  assert log == ['copy'] * most
  record.add(most, loss=jnp.float32(most))
  assert log[most:] == ['copy', ('read', 0)]
  record.add(most + 1, loss=jnp.float32(most + 1))
  assert log[most + 2 :] == ['copy', ('read', 1)]


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
  for i in range(3):
    record.add(i, loss=jnp.float32(i))
  assert read(record) == 3


# Bounded.


@pytest.mark.parametrize('capacity', [4, 5, 6, 16])
def test_the_history_is_bounded_and_keeps_the_first_and_the_last(capacity):
  record = flow.Record(capacity=capacity)
  for i in range(100):
    record.add(i, loss=i)
    steps = record.steps
    assert len(steps) <= capacity
    assert steps[0] == 0 and steps[-1] == i
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(record.scalars['loss'], steps)
  assert len(steps) >= capacity // 2


def test_what_is_recent_is_dense():
  record = flow.Record(capacity=32)
  for i in range(500):
    record.add(i)
    if i < 32:
      assert len(record) == i + 1  # nothing is dropped before it is full
  gaps = np.diff(record.steps)
  assert (np.diff(gaps[:-1]) <= 0).all()  # the last step is always kept
  assert gaps[0] > 8 * gaps[-2:].max()


def _bad_scalar(record, i):
  record.add(i, loss=np.nan)


def _bad_layer(record, i):
  record.add(i, taps=taps([np.inf]))


def _bad_leaf(record, i):
  record.add(i, opt_state=watched({'gradient_norm': np.nan}))


@pytest.mark.parametrize('bad', [_bad_scalar, _bad_layer, _bad_leaf])
@pytest.mark.parametrize('at', [0, 3, 10, 51])
def test_the_first_step_that_is_not_finite_is_never_dropped(bad, at):
  record = flow.Record({'a': jnp.ones(2)}, capacity=8)
  for i in range(100):
    if i == at or i in (70, 71, 72):
      bad(record, i)
    else:
      record.add(i, loss=1.0, taps=taps([1.0]), opt_state=watched({}))
    assert len(record) <= 8
    assert (np.diff(record.steps) > 0).all()
    assert i < at or at in record.steps
    assert record.steps[-1] == i and record.steps[0] == 0


def test_a_capacity_below_four_raises():
  with pytest.raises(ValueError, match='at least 4, got 3'):
    flow.Record(capacity=3)


# What cannot be added.


def test_steps_must_increase_also_while_they_are_on_their_way(on_their_way):
  record = flow.Record()
  record.add(3)
  for step in (3, 2, -1):
    with pytest.raises(ValueError, match=f'step {step} comes after step 3'):
      record.add(step, loss=1.0)
  record.add(5, loss=1.0)
  with pytest.raises(ValueError, match='step 4 comes after step 5'):
    record.add(4)
  assert record.steps.tolist() == [3, 5]
  with pytest.raises(ValueError, match='step 5 comes after step 5'):
    record.add(5)


def test_layers_must_stay_the_same():
  record = flow.Record()
  record.add(0, taps=taps([1.0, 2.0], ['a', 'b']))
  for names in (['b', 'a'], ['a', 'c']):
    with pytest.raises(ValueError, match='layers differ'):
      record.add(1, taps=taps([1.0, 2.0], names))
  with pytest.raises(ValueError, match='layers differ'):
    record.add(1, taps=taps([1.0], ['a']))
  record.add(1, taps=taps([3.0, 4.0], ['a', 'b']))
  assert record.layer_stats['norm'].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
  'state', [(), optax.EmptyState(), (watched({}), watched({}))]
)
def test_the_state_must_be_watched_once(state):
  record = flow.Record({'a': jnp.ones(2)})
  count = 2 if len(state) else 0
  with pytest.raises(ValueError, match=f'found {count}'):
    record.add(0, opt_state=state)
  assert len(record) == 0


def test_the_state_must_be_that_of_the_parameters():
  for params, count in ((None, 0), (PARAMS, 2)):
    record = flow.Record(params)
    with pytest.raises(ValueError, match=f'watches 1 leaves.*of {count}'):
      record.add(0, opt_state=watched({}))


def test_a_watched_optimizer_of_parameters_without_gradient_is_recorded():
  params = {'count': jnp.arange(3)}
  record = flow.Record(params)
  record.add(0, opt_state=flow.watch(optax.identity()).init(params), loss=1.0)
  assert record.leaf_stats['gradient_norm'].shape == (1, 0)


# Stacked layers.


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Dense(3, name='a')(x)
    return jnp.tanh(nn.Dense(3, name='b')(x)), None


def scanned(block, length, name):
  layers = nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=length,
  )
  return layers(name=name)


class TwoStacks(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, name='first')(x)
    x, _ = scanned(Block, 3, 'one')(x, None)
    x = nn.Dense(3, name='between')(x)
    x, _ = scanned(Block, 2, 'two')(x, None)
    return nn.Dense(2, name='head')(x)


class Outer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Dense(3, name='before')(x)
    x, _ = scanned(Block, 2, 'inner')(x, None)
    return nn.Dense(3, name='after')(x), None


class TwoLevels(nn.Module):
  @nn.compact
  def __call__(self, x):
    x, _ = scanned(Outer, 2, 'outer')(x, None)
    return nn.Dense(2, name='head')(x)


def recorded(model, where=None):
  """A record of one step; and the model's taps."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
  tapped = Tapped(model, where=where)
  with jax.numpy_rank_promotion('allow'):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    empty_taps = tapped.init(variables, x)

    @jax.jit
    def measure(variables, empty_taps):
      return jax.grad(
        lambda taps: jnp.sum(jnp.sin(tapped.apply(variables, x, taps=taps)))
      )(empty_taps)

    found = measure(variables, empty_taps)
  record = flow.Record()
  record.add(0, taps=found)
  return record, found


def of_dense_layers(record):
  return [layer.name for layer in record.layers if layer.kind == 'Dense']


def test_stacks_come_in_the_order_of_depth_one_after_the_other():
  record, found = recorded(TwoStacks())
  assert of_dense_layers(record) == [
    'first',
    *(f'one/{name}[{i}]' for i in range(3) for name in 'ab'),
    'between',
    *(f'two/{name}[{i}]' for i in range(2) for name in 'ab'),
    'head',
  ]
  for i, layer in enumerate(record.layers):
    name, _, at = layer.name.partition('[')
    norm = found[name].norm
    norm = norm[int(at.rstrip(']'))] if at else norm
    np.testing.assert_allclose(
      record.layer_stats['norm'][0, i], norm, rtol=1e-6
    )
  assert len(set(record.layer_stats['norm'][0])) > 10


def test_stacks_of_two_levels_come_in_the_order_of_depth():
  record, found = recorded(TwoLevels())
  assert of_dense_layers(record) == [
    *(
      name
      for i in range(2)
      for name in (
        f'outer/before[{i}]',
        *(f'outer/inner/{k}[{i}][{j}]' for j in range(2) for k in 'ab'),
        f'outer/after[{i}]',
      )
    ),
    'head',
  ]


def test_the_numbers_of_stacks_of_two_levels_are_those_of_their_names():
  record, found = recorded(TwoLevels())
  for i, layer in enumerate(record.layers):
    name, *at = layer.name.replace(']', '').split('[')
    np.testing.assert_allclose(
      record.layer_stats['norm'][0, i],
      found[name].norm[tuple(map(int, at))],
      rtol=1e-6,
    )
  assert len(set(record.layer_stats['norm'][0])) > 10


def test_a_stack_whose_own_module_is_not_tapped_comes_in_the_order_of_depth():
  record, _ = recorded(
    TwoStacks(), where=lambda name, module: isinstance(module, nn.Dense)
  )
  assert [layer.name for layer in record.layers] == [
    'first',
    *(f'one/{name}[{i}]' for i in range(3) for name in 'ab'),
    'between',
    *(f'two/{name}[{i}]' for i in range(2) for name in 'ab'),
    'head',
  ]


def test_names_that_begin_alike_are_different_stacks():
  block = flow.empty_tap(stack=(2,))
  layers = [flow.Layer(n) for n in ('lay', 'layer', 'layer/x', 'layers')]
  record = flow.Record()
  record.add(
    0, taps=flow.Taps({layer.name: block for layer in layers}, tuple(layers))
  )
  assert [layer.name for layer in record.layers] == [
    'lay[0]',
    'lay[1]',
    'layer[0]',
    'layer/x[0]',
    'layer[1]',
    'layer/x[1]',
    'layers[0]',
    'layers[1]',
  ]


# Writers.


def test_writers_get_every_step_in_order_by_the_documented_names():
  written, other = [], []
  record = flow.Record(
    {'dense': {'kernel': jnp.ones((2, 2))}},
    capacity=4,
    writers=[
      lambda step, numbers: written.append((step, numbers)),
      lambda step, numbers: other.append(step),
    ],
  )
  for i in range(20):
    record.add(
      2 * i,
      taps=taps([i + 1.0, stats(2.0, non_finite=3)], ['dense', '']),
      opt_state=watched(
        {'gradient_norm': i, 'update_norm': 4, 'parameter_norm': 8}
      ),
      loss=i,
    )
  assert len(record) <= 4
  assert [step for step, _ in written] == other == list(range(0, 40, 2))
  for i, (_, numbers) in enumerate(written):
    assert numbers == {
      'loss': i,
      'flow/norm/dense': i + 1.0,
      'flow/non_finite/dense': 0,
      'flow/norm/output': 2,
      'flow/non_finite/output': 3,
      'parameters/gradient_norm/dense/kernel': i,
      'parameters/update_ratio/dense/kernel': 0.5,
      'parameters/non_finite/dense/kernel': 0,
    }
    assert all(type(x) is float for x in numbers.values())


def test_writers_get_only_what_was_added():
  written = []
  record = flow.Record(writers=[lambda step, numbers: written.append(numbers)])
  record.add(0)
  record.add(1, taps=taps([2.0], ['x']))
  assert len(record) == 2
  assert written == [{}, {'flow/norm/x': 2, 'flow/non_finite/x': 0}]


# On disk.


def full_record(capacity=1000):
  record = flow.Record(PARAMS, capacity=capacity)
  histogram = jnp.arange(64.0)
  for i in range(4):
    record.add(
      7 * i,
      taps=taps([1.0 + i, np.nan if i == 2 else 1e-20], NAMES, [True, False]),
      opt_state=watched({'gradient_norm': np.inf}, {'cosine': 0.25}),
      loss=[1.0, np.nan, np.inf, -np.inf][i],
    )
  record.add(30, taps=taps([1.0, 2.0], NAMES, [True, False], histogram))
  record.add(31, **{'größe': 2.0})
  record.add(32)
  record.add(33, opt_state=watched({}, {}))
  return record


RECORDS = {
  'everything': full_record,
  'nothing': flow.Record,
  'leaves but no steps': lambda: flow.Record(PARAMS),
}


def _of(add, params=None):
  def make():
    record = flow.Record(params)
    for i in range(3):
      add(record, i)
    return record

  return make


RECORDS |= {
  'taps': _of(lambda r, i: r.add(i, taps=taps([1.0, None], NAMES))),
  'watched': _of(lambda r, i: r.add(i, opt_state=watched({}, {})), PARAMS),
  'scalars': _of(lambda r, i: r.add(i, loss=i, accuracy=-i)),
  'a scalar at some steps': _of(
    lambda r, i: r.add(i, **({'accuracy': 0.5} if i == 1 else {}))
  ),
}


@pytest.mark.parametrize('name', RECORDS)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
  record = RECORDS[name]()
  record.save(tmp_path / 'ä.record')
  loaded = flow.Record.load(tmp_path / 'ä.record')
  assert_same_records(loaded, record)
  assert flow.diagnose(loaded) == flow.diagnose(record)
  assert [p.name for p in tmp_path.iterdir()] == ['ä.record']


def test_steps_can_be_added_to_a_loaded_record(tmp_path):
  record = full_record(capacity=9)
  record.save(str(tmp_path / 'r.npz'))
  loaded = flow.Record.load(str(tmp_path / 'r.npz'))
  with pytest.raises(ValueError, match='comes after step 33'):
    loaded.add(33)
  with pytest.raises(ValueError, match='layers differ'):
    loaded.add(34, taps=taps([1.0]))
  for i in range(34, 60):
    for r in (record, loaded):
      r.add(
        i,
        taps=taps([1.0, 2.0], NAMES, [True, False]),
        opt_state=watched({}, {}),
        loss=float(i),
      )
    assert_same_records(loaded, record)
  assert len(loaded) <= 9  # the capacity is kept too


def test_a_saved_record_holds_no_pickle(tmp_path):
  full_record().save(tmp_path / 'r')
  with np.load(tmp_path / 'r', allow_pickle=False) as file:
    for name in file.files:
      assert file[name].dtype != object


def _npz(path, **arrays):
  with open(path, 'wb') as file:
    np.savez(file, **arrays)


def _npy(path):
  with open(path, 'wb') as file:
    np.save(file, np.ones(3))


def _truncated(path):
  full_record().save(path)
  path.write_bytes(path.read_bytes()[:-200])


def _without_steps(path):
  full_record().save(path)
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files if name != 'steps'}
  _npz(path, **arrays)


BAD_FILES = {
  'empty': lambda path: path.write_bytes(b''),
  'text': lambda path: path.write_text('step,loss\n0,1.0\n'),
  'garbage': lambda path: path.write_bytes(bytes(range(256)) * 8),
  'pickle': lambda path: path.write_bytes(pickle.dumps({'steps': [1]})),
  'pickled array': lambda path: np.save(
    open(path, 'wb'), np.array([{}], object), allow_pickle=True
  ),
  'npy': _npy,
  'another npz': lambda path: _npz(path, weights=np.ones(3)),
  'objects in it': lambda path: _npz(path, about=np.array({}, object)),
  'about is no JSON': lambda path: _npz(path, about=np.array('{')),
  'about is a list': lambda path: _npz(path, about=np.array('[1]')),
  'nothing but the format': lambda path: _npz(
    path, about=np.array(json.dumps({'format': _record_file.FORMAT}))
  ),
  'no steps': _without_steps,
  'begins as a zip': lambda path: path.write_bytes(b'PK\x03\x04' + b'x' * 99),
  'truncated': _truncated,
}


@pytest.mark.parametrize('name', BAD_FILES)
@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_a_file_that_is_no_record_raises_a_value_error(name, tmp_path):
  path = tmp_path / 'file'
  BAD_FILES[name](path)
  with pytest.raises(ValueError, match='file.* is not a record'):
    flow.Record.load(path)


def test_a_record_of_a_format_to_come_says_so(tmp_path):
  about = {'format': 'optax_ghm.flow 2'}
  _npz(tmp_path / 'r', about=np.array(json.dumps(about)))
  with pytest.raises(ValueError, match="'optax_ghm.flow 2'.*flow 1"):
    flow.Record.load(tmp_path / 'r')


def test_a_missing_file_raises_file_not_found(tmp_path):
  with pytest.raises(FileNotFoundError):
    flow.Record.load(tmp_path / 'missing')


def test_the_columns_on_disk_are_those_of_the_format():
  """What is renamed or moved needs another format."""
  assert _record_file.FORMAT == 'optax_ghm.flow 1'
  assert NUMBERS == _tap.COLUMNS
  assert MEASURED == _watch.COLUMNS
