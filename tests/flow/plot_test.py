"""The figure."""

import io
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import same_color

from optax_ghm import flow
from tests.support.hand_made import silent, taps, watched

PARAMS = {'one': {'bias': jnp.ones(2), 'kernel': jnp.ones((2, 2))}}


def drawn(record):
  """The figure, of which nothing fails when it is drawn."""
  figure = flow.figure(record)
  figure.savefig(io.BytesIO(), dpi=20)
  heat, depth, ratios, histogram, *_ = figure.axes
  return heat, depth, ratios, histogram


def full_record():
  record = flow.Record(PARAMS)
  for i in range(5):
    record.add(
      10 * i,
      taps=taps(
        [1.0 + i, 1e-3, 0.0, 2.0],
        ['a', 'b', 'c', ''],
        [True, True, True, False],
        jnp.arange(64.0) + i,
      ),
      opt_state=watched({'update_norm': 0.5}, {'update_norm': 1e-3 * (i + 1)}),
      loss=1.0,
    )
  return record


def test_the_heat_map_shows_the_norms_of_all_layers_and_steps():
  heat, *_ = drawn(full_record())
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


def test_profiles_are_those_of_the_first_the_middle_and_the_last_step():
  record = full_record()
  _, depth, *_ = drawn(record)
  labels = [line.get_label() for line in depth.get_lines()]
  assert labels == ['step 0', 'step 20', 'step 40']
  profile = flow.depth_profile(record)
  for line, t in zip(depth.get_lines(), (0, 2, 4), strict=True):
    np.testing.assert_allclose(line.get_ydata(), profile.log_norms[t])


def test_ratios_are_those_of_the_kernels_beside_the_usual():
  _, _, ratios, _ = drawn(full_record())
  kernel, guide = ratios.get_lines()
  assert kernel.get_label() == 'one/kernel'
  np.testing.assert_allclose(
    kernel.get_ydata(), 1e-3 * np.arange(1, 6), rtol=1e-5
  )
  assert kernel.get_xdata().tolist() == [0, 10, 20, 30, 40]
  assert set(guide.get_ydata()) == {1e-3}
  assert ratios.get_yscale() == 'log'


def test_magnitudes_are_those_at_the_first_layer_with_a_kernel():
  *_, histogram = drawn(full_record())
  assert 'at a' in histogram.get_title()
  (mesh,) = histogram.collections
  counts = np.arange(64)[:, None] + np.arange(5)
  np.testing.assert_allclose(mesh.get_array(), np.log1p(counts), rtol=1e-6)


def test_what_is_not_finite_is_red_and_what_is_missing_is_not():
  record = flow.Record()
  record.add(0, taps=taps([1.0, np.nan]))
  record.add(1, loss=1.0)
  record.add(2, taps=taps([np.inf, 1.0]))
  heat, *_ = drawn(record)
  assert [t.get_text() for t in heat.get_xticklabels()] == ['0', '2']
  (marks,) = heat.get_lines()
  assert list(zip(*marks.get_data(), strict=True)) == [(1, 0), (0, 1)]
  assert same_color(marks.get_color(), 'red')


def _of(*steps, params=None):
  record = flow.Record(params)
  for i, step in enumerate(steps):
    record.add(i, **step)
  return record


RECORDS = {
  'one step': lambda: _of({'taps': taps([1.0, 2.0])}),
  'one layer': lambda: _of(*[{'taps': taps([1.0])}] * 3),
  'taps only': lambda: _of(*[{'taps': taps([1.0] * 6)}] * 3),
  'watch only': lambda: _of(
    *[{'opt_state': watched({}, {})}] * 3, params=PARAMS
  ),
  'a loss only': lambda: _of({'loss': 1.0}, {'loss': 2.0}),
  'no kernels': lambda: _of(
    {
      'taps': taps([1.0, 2.0], kernels=[False] * 2, histogram=jnp.ones(64)),
      'opt_state': watched({}),
    },
    params={'bias': jnp.ones(2)},
  ),
  'no gradient': lambda: _of({'taps': taps([silent(), 0.0])}),
  'nothing finite': lambda: _of(
    *[{'taps': taps([np.nan, np.inf]), 'opt_state': watched({}, {})}] * 2,
    params=PARAMS,
  ),
  'tiny and huge': lambda: _of(*[{'taps': taps([1e-38, 1e38])}] * 2),
  'ratios of 0 and inf': lambda: _of(
    *[
      {
        'opt_state': watched(
          {}, {'update_norm': 0.0} if i else {'parameter_norm': 0.0}
        )
      }
      for i in range(2)
    ],
    params=PARAMS,
  ),
  'many layers': lambda: _of(*[{'taps': taps([1.0] * 60)}] * 30),
  'hostile names': lambda: _of(
    *[
      {
        'taps': taps(
          [1.0, 2.0], ['$\\frac{$', '_x\n<b>'], histogram=jnp.ones(64)
        ),
        'opt_state': watched({}, {}),
      }
    ]
    * 2,
    params={'$\\bad{$': jnp.ones((2, 2)), '_hidden': jnp.ones((2, 2))},
  ),
}


@pytest.mark.parametrize('name', RECORDS)
def test_any_record_can_be_drawn(name):
  axes = drawn(RECORDS[name]())
  assert len(axes) == 4


def test_names_that_begin_with_an_underscore_are_in_the_legend():
  _, _, ratios, _ = drawn(RECORDS['hostile names']())
  labels = [text.get_text() for text in ratios.get_legend().get_texts()]
  assert len(labels) == 2 and '_hidden' in labels[1]


def test_an_empty_record_raises():
  with pytest.raises(ValueError, match='nothing is recorded'):
    flow.figure(flow.Record())


def test_the_figure_is_not_registered_with_pyplot():
  code = (
    'from optax_ghm import flow\n'
    'record = flow.Record()\nrecord.add(0, loss=1.0)\nflow.figure(record)\n'
    "import sys; assert 'matplotlib.pyplot' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_without_matplotlib_it_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(ImportError, match=r"pip install 'optax_ghm\[plot\]'"):
    flow.figure(full_record())
