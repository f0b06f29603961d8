"""The figure."""

import io
import sys

import numpy as np
import pytest
from matplotlib.colors import same_color

from optax_ghm import flow
from tests.support.hand_made import add, kernel, record_of, tapped, watched

PARAMS = {'one': {'bias': kernel(2), 'kernel': kernel()}}


def drawn(record):
  """The figure, of which nothing fails when it is drawn."""
  figure = flow.figure(record)
  figure.savefig(io.BytesIO(), dpi=20)
  heat, depth, ratios, histogram, *_ = figure.axes
  return heat, depth, ratios, histogram


@pytest.fixture(scope='module')
def record():
  record = flow.Record(PARAMS)
  for i in range(5):
    step = tapped(
      *[1.0 + i, 1e-3, 0.0, 2.0],
      names=['a', 'b', 'c', ''],
      kernels=[True, True, True, False],
      histogram=np.arange(64, dtype='f') + i,
    )
    rows = {'update_norm': 0.5}, {'update_norm': 1e-3 * (i + 1)}
    add(record, 10 * i, **step, opt_state=watched(*rows), loss=1.0)
  return record


@pytest.fixture(scope='module')
def axes(record):
  return drawn(record)


def test_the_heat_map_shows_the_norms_of_all_layers_and_steps(axes):
  heat, *_ = axes
  (mesh,) = heat.collections
  shown = mesh.get_array()
  assert shown.shape == (4, 5)
  np.testing.assert_allclose(shown[0].data, [1, 2, 3, 4, 5])
  np.testing.assert_allclose(shown[3].data, 2)
  assert shown.mask[2].all() and not shown.mask[[0, 1, 3]].any()
  assert [t.get_text() for t in heat.get_yticklabels()] == [
    'a',
    'b',
    'c',
    '(the model)',
  ]
  assert '40' in [t.get_text() for t in heat.get_xticklabels()]
  assert heat.yaxis_inverted()  # the input is on top


def test_profiles_are_those_of_the_first_the_middle_and_the_last_step(
  record, axes
):
  _, depth, *_ = axes
  labels = [line.get_label() for line in depth.get_lines()]
  assert labels == ['step 0', 'step 20', 'step 40']
  profile = flow.depth_profile(record)
  for line, t in zip(depth.get_lines(), (0, 2, 4), strict=True):
    np.testing.assert_allclose(line.get_ydata(), profile.log_norms[t])


def test_ratios_are_those_of_the_kernels_beside_the_usual(axes):
  _, _, ratios, _ = axes
  kernel, guide = ratios.get_lines()
  assert kernel.get_label() == 'one/kernel'
  np.testing.assert_allclose(
    kernel.get_ydata(), 1e-3 * np.arange(1, 6), rtol=1e-5
  )
  assert kernel.get_xdata().tolist() == [0, 10, 20, 30, 40]
  assert set(guide.get_ydata()) == {1e-3}
  assert ratios.get_yscale() == 'log'


def test_magnitudes_are_those_at_the_first_layer_with_a_kernel(axes):
  *_, histogram = axes
  assert 'at a' in histogram.get_title()
  (mesh,) = histogram.collections
  counts = np.arange(64)[:, None] + np.arange(5)
  np.testing.assert_allclose(mesh.get_array(), np.log1p(counts), rtol=1e-6)


def test_what_is_not_finite_is_red_and_what_is_missing_is_not():
  steps = tapped(1.0, np.nan), {'loss': 1.0}, tapped(np.inf, 1.0)
  heat, *_ = drawn(record_of(*steps))
  assert [t.get_text() for t in heat.get_xticklabels()] == ['0', '2']
  (marks,) = heat.get_lines()
  assert list(zip(*marks.get_data(), strict=True)) == [(1, 0), (0, 1)]
  assert same_color(marks.get_color(), 'red')


def test_names_that_begin_with_an_underscore_are_in_the_legend():
  step = {'opt_state': watched({}, {})}
  params = {'$\\bad{$': kernel(), '_hidden': kernel()}
  *_, ratios, _ = drawn(record_of(step, step, params=params))
  labels = [text.get_text() for text in ratios.get_legend().get_texts()]
  assert len(labels) == 2 and '_hidden' in labels[1]


def test_an_empty_record_raises():
  with pytest.raises(ValueError, match='nothing is recorded'):
    flow.figure(flow.Record())


def test_without_matplotlib_it_raises(record, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(ImportError, match=r"pip install 'optax_ghm\[plot\]'"):
    flow.figure(record)
