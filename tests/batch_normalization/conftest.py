import numpy as np
import pytest


@pytest.fixture
def x(rng):
  """Six examples of three features."""
  return rng.normal([1, -2, 0], [1, 3, 0.5], size=(6, 3)).astype(np.float32)


@pytest.fixture
def batches(rng):
  """Two of six examples, which are far from 0 and differ."""
  return [
    rng.normal([9 + i, -3, 0], [1, 2 + i, 0.5], size=(6, 3)).astype(np.float32)
    for i in (0, 2)
  ]
