"""However a platform counts examples in cells, the histogram is the same."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_ghm.harmonization import _density

CELLS = 70
WAYS = _density._add, _density._compare, _density._add_to_copies


def data(rng):
  cell = rng.integers(0, CELLS, (16, 50)).astype(np.int32)
  cell[:, :40] = 3  # crowded
  return cell, rng.random((16, 50)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def histograms(way, cell, amounts):
  one = np.ones((), np.int32)
  per_row = jax.vmap(lambda cell: way(cell, one, CELLS))
  return way(cell, one, CELLS), way(cell, amounts, CELLS), per_row(cell)


@pytest.mark.device
@pytest.mark.parametrize('way', WAYS)
def test_every_way_is_the_histogram(way, rng):
  cell, amounts = data(rng)
  count, total, rows = histograms(way, cell, amounts)
  assert count.dtype == np.int32
  np.testing.assert_array_equal(
    count, np.bincount(cell.ravel(), minlength=CELLS)
  )
  expected = np.bincount(cell.ravel(), amounts.ravel(), CELLS)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  for row, of_row in zip(rows, cell, strict=True):
    np.testing.assert_array_equal(row, np.bincount(of_row, minlength=CELLS))


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('way', WAYS)
def test_no_way_gathers_a_sharded_batch(way, kind, rng):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
  cell, _ = data(rng)
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  with jax.set_mesh(mesh):
    count = jax.jit(lambda cell: way(cell, np.ones((), np.int32), CELLS))
    sharded = jax.device_put(cell, sharding)
    compiled = count.lower(sharded).compile()
  assert 'all-gather' not in compiled.as_text()
  np.testing.assert_array_equal(
    compiled(sharded), np.bincount(cell.ravel(), minlength=CELLS)
  )
