import json
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import flow
from tests.support import hand_made, strategies_arrays as arrays_of

TREE = {
  'half': (jnp.float16, (3, 2)),
  'brain': (jnp.bfloat16, (3, 1, 1, 2, 1, 1)),
  'single': (jnp.float32, (3,)),
  'complex': (jnp.complex64, (3, 1)),
  'empty': (jnp.float32, (3, 0, 2)),
}


@jax.jit
def tapped(x, dy, empty_tap):
  y, vjp = jax.vjp(flow.tap, x, empty_tap)
  return y, *vjp(dy)


@given(
  layout=st.sampled_from(arrays_of.LAYOUTS),
  bad=st.sampled_from([0.0, 0.0, np.nan, np.inf, -np.inf]),
  data=st.data(),
)
def test_statistics_are_those_of_all_cotangents(layout, bad, data):
  some = st.integers(-32, 32).map(lambda n: n / 16)
  dy = {}
  for name, (dtype, shape) in TREE.items():
    u = data.draw(arrays_of.arrays(np.float32, shape, some))
    u = u * np.complex64(1 + 2j) if dtype == jnp.complex64 else u
    dy[name] = arrays_of.laid_out(u.astype(dtype), layout)
  dy['single'] = dy['single'] + np.float32(bad)
  x = jax.tree.map(lambda u: np.ones(u.shape, u.dtype), dy)
  steps, none = np.arange(3), np.zeros(3, jax.dtypes.float0)
  empty_tap = flow.empty_tap(histogram=True, examples=3)
  y, dx, stats = tapped({**x, 'n': steps}, {**dy, 'n': none}, empty_tap)
  jax.tree.map(np.testing.assert_array_equal, y, {**x, 'n': steps})
  assert dx.pop('n').dtype == jax.dtypes.float0
  for name, u in dx.items():
    assert u.dtype == dy[name].dtype
    np.testing.assert_array_equal(u, dy[name])
  rows = np.concatenate(
    [np.asarray(u, np.complex128).reshape(3, -1) for u in dx.values()], 1
  )
  reals = np.concatenate(
    [
      np.asarray(u)
      .astype(np.complex128)
      .reshape(3, -1)
      .view(float)[:, :: 1 if np.iscomplexobj(u) else 2]
      for u in dx.values()
    ],
    1,
  )
  with np.errstate(invalid='ignore'):
    norms = np.sqrt((np.abs(rows) ** 2).sum(1))
    np.testing.assert_allclose(stats.example_norms, norms, rtol=1e-5)
    np.testing.assert_allclose(stats.norm, np.sqrt((norms**2).sum()), rtol=1e-5)
    np.testing.assert_allclose(stats.sum, reals.sum(), rtol=1e-5, atol=1e-4)
  counts = stats.calls, stats.elements, stats.zeros, stats.non_finite
  finite = np.isfinite(reals)
  expected = 1, reals.size, (reals == 0).sum(), (~finite).sum()
  np.testing.assert_array_equal(counts, expected)
  np.testing.assert_array_equal(stats.largest, np.abs(reals).max())
  assert stats.histogram.sum() == float((finite & (reals != 0)).sum())


SIZES = st.sampled_from(
  [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1.5, 30.0, 1e20, 3e38]
  + [np.nan, np.inf]
)
VALUES = SIZES | SIZES.map(lambda u: -u) | st.floats()
PARAMS = {'a': {'kernel': jnp.ones((2, 2))}, 'bias': jnp.ones(2)}
ROWS = st.fixed_dictionaries(
  {
    'gradient_norm': SIZES,
    'update_norm': SIZES,
    'parameter_norm': SIZES,
    'non_finite': st.integers(0, 3),
    'zeros': st.integers(0, 100),
    'dead_units': st.integers(0, 10),
    'units': st.sampled_from([0, 10]),
    'signal_to_noise': SIZES,
    'cosine': SIZES,
  }
)


@st.composite
def steps(draw):
  """What is added at a step: any part of it, any numbers."""
  step = {}
  if draw(st.booleans()):
    step['taps'] = hand_made.taps(
      draw(st.lists(SIZES | st.none(), min_size=6, max_size=6)),
      histogram=jnp.ones(64) if draw(st.booleans()) else None,
    )
  if draw(st.booleans()):
    step['opt_state'] = hand_made.watched(draw(ROWS), draw(ROWS))
  if draw(st.booleans()):
    numbers = draw(hnp.arrays(np.float32, 5, elements=SIZES))
    step['batch_norm'] = {'a': flow.BatchNormStats(jnp.asarray(numbers))}
  if draw(st.booleans()):
    step['loss'] = draw(VALUES)
  return step


@st.composite
def records(draw):
  """A few steps, some of them many times."""
  record, number = flow.Record(PARAMS, capacity=40), 0
  for _ in range(draw(st.integers(1, 4))):
    step = draw(steps())
    for _ in range(draw(st.sampled_from([1, 12]))):
      record.add(number, **step)
      number += draw(st.sampled_from([1, 1, 1000]))
  return record


def assert_same(one, other):
  np.testing.assert_array_equal(one.steps, other.steps)
  for found, expected in (
    (one.layer_stats, other.layer_stats),
    (one.leaf_stats, other.leaf_stats),
    (one.batch_norm_stats, other.batch_norm_stats),
    (one.scalars, other.scalars),
  ):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
      np.testing.assert_array_equal(found[name], values)
  np.testing.assert_array_equal(one.histograms, other.histograms)


def of(*steps):
  record = flow.Record(PARAMS)
  for i, step in enumerate(steps):
    record.add(i, **step)
  return record


@given(record=records())
@example(record=of({'loss': 1.7e308}, {'loss': -1.7e308}))
@example(record=of({'loss': -np.inf}, {}))
def test_bad_numbers_break_no_view_of_a_record(record):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'record.npz'
    record.save(path)
    loaded = flow.Record.load(path)
    assert_same(loaded, record)
    verdicts = flow.diagnose(record)
    assert flow.diagnose(loaded) == verdicts
    for verdict in verdicts:
      assert verdict.since in record.steps
      assert verdict.layers or verdict.kind == 'spikes'
    page = pathlib.Path(folder) / 'page.html'
    flow.write_page(page, record)
    text = page.read_text()
  assert not re.search(r'(?:[xyd]|[xy][12]|c[xy])="[^"]*(?:nan|inf)', text)


@given(record=records())
def test_bad_numbers_break_no_figure(record):
  pytest.importorskip('matplotlib')
  flow.figure(record).canvas.draw()


@given(
  norms=st.lists(
    st.lists(SIZES | st.floats(1e-9, 1e9), min_size=7, max_size=7),
    min_size=1,
    max_size=3,
  )
)
def test_the_depth_profile_is_the_line_of_least_squares(norms):
  record = flow.Record()
  for i, each in enumerate(norms):
    record.add(i, taps=hand_made.taps(each))
  profile = flow.depth_profile(record)
  np.testing.assert_array_equal(profile.layers, np.arange(7))
  for t, each in enumerate(record.layer_stats['norm']):
    if not np.isfinite(each).all():
      assert not np.isfinite(profile.slope[t])
      continue
    y = np.log10(np.maximum(each, 2.0**-149))
    np.testing.assert_allclose(profile.log_norms[t], y)
    slope, at_0 = np.polyfit(np.arange(7), y, 1)
    np.testing.assert_allclose(profile.slope[t], slope, atol=1e-9)
    np.testing.assert_allclose(profile.decades[t], 6 * slope, atol=1e-9)
    total = ((y - y.mean()) ** 2).sum()
    if total > 1e-9:
      residual = ((y - at_0 - slope * np.arange(7)) ** 2).sum()
      np.testing.assert_allclose(profile.r2[t], 1 - residual / total, atol=1e-6)


@given(
  values=st.lists(
    st.dictionaries(st.text(min_size=1, max_size=5), VALUES, max_size=3),
    max_size=4,
  )
)
@example(values=[{'a': -np.inf, 'b': np.inf, 'c': np.nan}])
def test_json_lines_say_what_was_added(values):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'lines'
    path.touch()
    record = flow.Record(writers=[flow.json_lines_writer(path)])
    for i, each in enumerate(values):
      record.add(i, **{f'_{name}': x for name, x in each.items()})
    assert len(record) == len(values)
    lines = path.read_text(encoding='utf-8').split('\n')[:-1]
  assert len(lines) == len(values)
  for i, (line, each) in enumerate(zip(lines, values, strict=True)):
    found = json.loads(line, parse_constant=pytest.fail)
    assert found.pop('step') == i
    found = {name[1:]: float(x) for name, x in found.items()}
    np.testing.assert_equal(found, each)


LEAVES = {
  'float': jnp.ones(2),
  'half': np.ones((1, 2), np.float16),
  'complex': jnp.ones((), jnp.complex64),
  'integer': jnp.arange(2),
  'number': 2.0,
  'none': None,
  'empty': jnp.ones((0, 2)),
}
TREES = st.recursive(
  st.sampled_from(list(LEAVES)),
  lambda u: (
    st.lists(u, max_size=3)
    | st.lists(u, max_size=2).map(tuple)
    | st.dictionaries(st.sampled_from('abc'), u, max_size=3)
  ),
  max_leaves=6,
)


def paths(tree, path=()):
  """Norms of the leaves that have a gradient, in order."""
  if isinstance(tree, str):
    return ['/'.join(path)] if tree in ('float', 'half', 'complex') else []
  items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
  return [p for key, u in items for p in paths(u, (*path, str(key)))]


@given(tree=TREES)
def test_leaf_names_are_the_paths_of_what_has_a_gradient(tree):
  params = jax.tree.map(LEAVES.get, tree)
  assert flow.leaf_names(params) == paths(tree)


@given(names=st.lists(st.text(max_size=5), unique=True, max_size=4))
def test_taps_are_a_pytree_under_any_names(names):
  taps = flow.Taps.empty(names)
  leaves, structure = jax.tree.flatten(taps)
  again = structure.unflatten(leaves)
  assert list(again) == names and len(again) == len(names)
  assert again.layers == taps.layers
