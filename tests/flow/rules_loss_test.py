"""The verdict on a loss that diverges."""

import numpy as np
import pytest

from tests.support.hand_made import (
  KERNEL,
  kinds,
  record_of,
  verdict_of,
  watched,
)

STEADY, LARGE = 1e-3, 0.2


def trained(losses, ratios=(STEADY, LARGE)):
  """The last ratio is that of all later steps; the kernel has norm 1."""
  ratios = [*ratios, *[ratios[-1]] * (len(losses) - len(ratios))]
  return record_of(
    *[
      {'loss': loss, 'opt_state': watched({'update_norm': ratio})}
      for loss, ratio in zip(losses, ratios, strict=False)
    ],
    params=KERNEL,
  )


@pytest.mark.parametrize(
  ('losses', 'expected'),
  [
    ([2.0, 2.0, 21.0, 2.0, 2.0], True),  # a dead network
    ([2.0, 2.0, 21.0, 1.9, 1.9], True),
    ([2.0, 2.0, 21.0, 1.7, 1.7], False),  # it has recovered
    ([2.0, 2.0, 19.0, 2.0, 2.0], False),  # it was no divergence
    ([2.0, 2.0, 6.1, 6.1, 6.1], True),  # it stays above
    ([2.0, 2.0, 5.9, 5.9, 5.9], False),
    ([2.0, 2.0, 1e30, np.nan, np.nan], True),
    ([np.nan, np.nan, 1e30, 2.0], False),  # nothing is known about before
    ([-2.0, -2.0, 17.0, 17.0], True),
    ([-2.0, -2.0, 1.0, 1.0], False),
    ([0.0, 0.0, 0.0, 0.0], False),
  ],
)
def test_a_loss_diverges_after_a_large_update(losses, expected):
  assert ('diverging' in kinds(trained(losses))) == expected
  # It may rise for other reasons.
  assert 'diverging' not in kinds(trained(losses, [STEADY]))


def test_it_comes_first_and_says_what_happened():
  losses = [2.0, 2.0, 200.0, 5.0, np.nan]
  record = trained(losses, [STEADY, 0.2, STEADY, STEADY, STEADY])
  assert kinds(record)[:2] == ['diverging', 'not finite']
  verdict = verdict_of(record, 'diverging')
  assert verdict.layers == ('w',) and verdict.since == 2
  assert verdict.severity == pytest.approx(1 - 3 / (2 * 102.5 / 2))
  assert verdict.evidence == (
    'the loss was 2 until step 1 changed w by 2.0e-01 of its norm; it rose to'
    ' 200 and is 102 now (median of 2 recorded steps)'
  )
