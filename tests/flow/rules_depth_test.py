"""Verdicts on the trend of the gradient over depth."""

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from optax_ghm import flow
from tests.support.hand_made import (
  kinds,
  only,
  record_of,
  tapped,
)


def falling(count, decades, **kwargs):
  """Norms that fall towards the input by so many decades per layer."""
  norms = 10.0 ** (decades * (np.arange(count) - count))
  return tapped(*norms, **kwargs)


SIZES = st.sampled_from(
  [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1.5, 30.0, 1e20, 3e38]
  + [np.nan, np.inf]
)


@given(
  norms=st.lists(
    st.lists(SIZES | st.floats(1e-9, 1e9), min_size=7, max_size=7),
    min_size=1,
    max_size=3,
  )
)
@example(norms=[[0.0, 1.0, *[1.0] * 5], [1.0, np.nan, *[1.0] * 5]])
def test_the_depth_profile_is_the_line_of_least_squares(norms):
  record = record_of(*[tapped(*each) for each in norms])
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


def test_the_profile_is_of_layers_with_a_kernel_that_were_reached():
  kernels = [True, True, False, True, True]
  norms = [None, 1.0, 5.0, 10.0, 100.0]
  profile = flow.depth_profile(record_of(tapped(*norms, kernels=kernels)))
  assert profile.layers.tolist() == [1, 3, 4]
  np.testing.assert_allclose(profile.slope, [1], rtol=1e-6)
  for record in (flow.Record(), record_of({'loss': 1.0}, {'loss': 2.0})):
    profile = flow.depth_profile(record)
    assert profile.layers.size == 0
    assert profile.log_norms.shape == (len(record), 0)
    assert profile.slope.shape == (len(record),)


@pytest.mark.parametrize(
  ('step', 'expected'),
  [
    (falling(4, 2.0), []),  # too few layers
    (falling(5, 2.0), ['vanishing']),
    (falling(8, 2.0, kernels=[True] * 4 + [False] * 4), []),
    (falling(50, 0.055), []),  # 2.7 in all, but few per layer
    (falling(50, 0.065), ['vanishing']),
    (falling(17, 0.12), []),  # 1.9 in all
    (falling(18, 0.12), ['vanishing']),  # 2.04
    (falling(30, -0.10), []),
    (falling(30, -0.12), ['exploding']),
    (falling(17, -0.12), []),
    (falling(18, -0.12), ['exploding']),
    (tapped(1e-12, *[1.0] * 8), []),  # steep, but no line
  ],
)
def test_a_trend_is_enough_per_layer_and_in_all_and_a_line(step, expected):
  assert kinds(record_of(step)) == expected


def test_side_branches_do_not_hide_the_trend_of_the_trunk():
  """As queries and keys of a transformer, two of six layers of a block."""
  trunk = 10.0 ** (0.2 * (np.arange(24) - 24))
  branches = np.isin(np.arange(24) % 6, (0, 1))
  norms = np.where(branches, 1e-4 * trunk, trunk)
  assert flow.depth_profile(record_of(tapped(*norms))).r2 < 0.7
  verdict = only(record_of(tapped(*norms)), 'vanishing')
  assert '0.20 decades per layer' in verdict.evidence
  flat = np.where(branches, 1e-4 * trunk, 1.0)
  assert kinds(record_of(tapped(*flat))) == []


@pytest.mark.parametrize(
  ('sign', 'kind', 'evidence'),
  [
    (
      1,
      'vanishing',
      'the norm falls by 0.52 decades per layer towards the input, 4.7 over 10'
      ' layers (R² 1.00): 0.3 at layer 9, 6.3e-06 at layer 0',
    ),
    (
      -1,
      'exploding',
      'the norm grows by 0.52 decades per layer towards the input, 4.7 over 10'
      ' layers (R² 1.00): 3.3 at layer 9, 1.6e+05 at layer 0',
    ),
  ],
)
def test_the_figures_of_a_trend_are_those_of_the_norms(sign, kind, evidence):
  verdict = only(record_of(falling(10, sign * 0.52), start=7), kind)
  assert verdict.evidence == evidence
  assert verdict.layers == ('layer 0', 'layer 1', 'layer 2', 'layer 3')
  assert verdict.since == 7
  # A slight one names the layer next to the input.
  assert only(record_of(falling(10, sign * 0.3)), kind).layers == ('layer 0',)


GOOD, BAD = falling(17, 0.0), falling(17, 0.5)
HALF = falling(17, 0.07)  # more than half of what a verdict needs


@pytest.mark.parametrize(
  ('steps', 'since'),
  [
    ([BAD] * 5, 0),
    ([GOOD, BAD, BAD, BAD], 1),
    ([BAD, GOOD, BAD, BAD, BAD], 2),
    ([GOOD, HALF, BAD, BAD], 1),
    ([GOOD, BAD, {}, BAD, BAD], 1),  # what is not known breaks nothing
    ([GOOD] * 20 + [BAD] * 15, 20),
    # It is about the last twenty steps.
    ([GOOD] * 50 + [BAD] * 11, 50),
    ([BAD] * 20 + [{}] * 30, 0),
    ([BAD] * 50 + [GOOD] * 11, None),
    ([GOOD] * 50 + [BAD] * 9, None),
  ],
)
def test_since_is_the_start_of_the_last_unbroken_row(steps, since):
  record = record_of(*steps)
  if since is None:
    assert kinds(record) == []
  else:
    assert only(record, 'vanishing').since == since
