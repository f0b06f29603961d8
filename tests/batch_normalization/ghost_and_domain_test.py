"""Parts of a batch that are normalized by themselves."""

import jax
import numpy as np
import pytest

import optax_ghm
from tests.support.oracles_batch_norm import (
  a_case,
  assert_same,
  by_slices,
  by_subsets,
  expected,
  found,
  with_rows,
)


@pytest.mark.device
@pytest.mark.parametrize(
  ('shape', 'axis', 'mask', 'size', 'second'),
  [
    ((8, 3), -1, None, 1, False),
    ((8, 3), -1, (8, 1), 2, False),
    ((8, 3), -1, (3,), 8, False),
    ((6, 2, 3), 1, (6, 2, 3), 3, True),
    ((6, 2, 3), (1, 2), (1, 2, 1), 2, False),
    ((4, 2, 2, 3), -1, (2, 2, 1), 2, False),
    ((0, 3), -1, None, 2, False),
    ((4, 0), -1, None, 2, False),
  ],
  ids=str,
)
def test_ghosts_are_a_loop_over_slices(shape, axis, mask, size, second):
  case = a_case(shape, axis, mask)
  case.x += np.arange(len(case.x)).reshape(-1, *[1] * (len(shape) - 1))
  actual = found(case, 'ghost_batch_norm', second, ghost_size=size)
  assert actual.moments.mean.shape == case.scale.shape
  assert_same(actual, expected(case, second, by_slices(size)))


DOMAIN = np.array([0, 2, 0, 0, 2, 1, 2, 0])


@pytest.mark.device
@pytest.mark.parametrize(
  ('shape', 'axis', 'mask', 'domain', 'rows', 'second'),
  [
    ((8, 3), -1, None, DOMAIN, False, False),
    ((8, 3), -1, (8, 1), DOMAIN, True, True),
    ((8, 3), -1, (8, 3), DOMAIN % 2, True, False),
    ((8, 3), -1, (3,), np.array(1), True, False),
    ((8, 2, 3), -1, (8, 2, 1), DOMAIN, True, False),
    ((8, 2, 3), (1, 2), (2, 1), np.uint8(DOMAIN), True, False),
    ((8, 3, 2), 1, None, np.int8(DOMAIN), False, False),
    ((0, 3), -1, None, np.zeros(0, int), True, False),
  ],
  ids=str,
)
def test_domains_are_a_loop_over_subsets(
  shape, axis, mask, domain, rows, second
):
  case = a_case(shape, axis, mask)
  at = np.broadcast_to(domain, shape[:1]).astype(np.float32)
  at = at.reshape(-1, *[1] * (len(shape) - 1))
  case.x += at
  if rows:
    case = with_rows(case)
  for away in (0, 1e4 * (at == 2)):  # one of them far from the others
    case.x += np.float32(away)
    traced = {'domain': domain}
    actual = found(case, 'domain_batch_norm', second, traced, num_domains=3)
    # The gradient of the gradient is of a few numbers each.
    norm = by_subsets(domain, rows)
    assert_same(actual, expected(case, second, norm), second=1e-3)


@pytest.mark.device
@pytest.mark.parametrize('nowhere', [-1, 3, 100])
def test_what_is_of_no_domain_is_0_whatever_it_is(nowhere):
  case = with_rows(a_case((8, 3), -1, (8, 1)))
  domain = np.where(np.arange(8) == 2, nowhere, DOMAIN)
  traced = {'domain': domain}
  wanted = expected(case, norm=by_subsets(domain, True))
  for bad in (0, np.nan, np.inf):
    case.x[2] += bad
    actual = found(case, 'domain_batch_norm', True, traced, num_domains=3)
    assert not actual.y[2].any()
    assert not actual.grads[0][2].any()
    assert_same(actual, wanted)


@pytest.mark.device
@pytest.mark.parametrize('count', [3, 20])
def test_all_that_is_wrong_in_one_domain_stays_there(count):
  """Few domains are compared one by one, and many are not."""
  case = with_rows(a_case((8, 3), -1, (8, 1)), count)
  case.mask[:] = True
  own = DOMAIN == 2

  def results():
    traced = {'domain': DOMAIN}
    return found(
      case, 'domain_batch_norm', count == 3, traced, num_domains=count
    )

  before = results()
  norm = by_subsets(DOMAIN, True, count)
  assert_same(before, expected(case, norm=norm))
  x, dy = case.x.copy(), case.dy.copy()
  for bad in (np.nan, np.inf, -np.inf, 1e30):
    case.x[4] = bad
    after = results()
    np.testing.assert_array_equal(after.y[~own], before.y[~own])
    np.testing.assert_array_equal(after.grads[0][~own], before.grads[0][~own])
    rows = [(*r.moments, *r.grads[1:]) for r in (after, before)]
    for a, b in zip(*rows, strict=True):
      np.testing.assert_array_equal(a[:2], b[:2])
    assert np.isnan(after.y[own]).all() == (bad != 1e30)
    case.x, case.dy = x.copy(), dy.copy()
  for bad in (np.nan, np.inf, -np.inf):
    case.dy[4, 2] = bad
    wanted = before.grads[2].copy()
    wanted[2, 2] = bad
    np.testing.assert_allclose(results().grads[2], wanted, rtol=1e-5)
    case.dy = dy.copy()


@pytest.mark.device
def test_small_integers_and_bool_name_domains():
  x = np.float32([[1], [3], [5], [70]])

  @jax.jit
  def program(x):
    return [
      optax_ghm.domain_batch_norm(
        x, np.array([0, 0, 1, 1], dtype), num_domains=257, epsilon=0.0
      )[0]
      for dtype in (bool, np.uint8, np.int8, np.int32)
    ]

  for y in program(x):
    np.testing.assert_allclose(y[:, 0], [-1, 1, -1, 1])
