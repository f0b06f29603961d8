"""The density of a window around each norm: the definition of the GHM paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm.harmonization import _density


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedDensity(_density.Histogram):
  r"""The paper's own definition: a window of width ε centered on each norm.

  .. math::
    GD(g) = \frac{1}{l_\epsilon(g)} \sum_k
      \mathbb 1\left[g_k \in [g - \tfrac\epsilon2, g + \tfrac\epsilon2)\right],
    \quad
    l_\epsilon(g) = \min(g + \tfrac\epsilon2, high)
      - \max(g - \tfrac\epsilon2, low)

  The counts come from a fine histogram: a norm counts as the center of its
  cell, and a cell that a window cuts counts in proportion. There are no bin
  edges, and an example that moves a little changes the weights a little.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range; norms outside count in the outermost cell.
    log: whether windows have equal width in log10(norm), for norms without a
      known bound. ``width`` and the density are then in decades.
    momentum: share of the past in the moving average over batches, in [0, 1);
      with 0 every batch stands alone.
    width: ε, in norm or in decades, at most the length of the range.
    cells: number of cells of the histogram; the cost hardly depends on it.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.WindowedDensity(width=0.1)
    >>> regions, state = density.update(
    ...   jnp.array([0.41, 0.43, 0.93]), density.init()
    ... )
    >>> [round(float(x), 3) for x in regions.at_examples(regions.density)]
    [20.0, 20.0, 10.0]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, equations 4 and 5, 2019
  """

  width: float = 0.1
  cells: int = 4096

  def __post_init__(self) -> None:
    super().__post_init__()
    _density.check_positive_int('cells', self.cells)
    _density.check_width(self.width, self._length)

  @property
  def _regions(self):
    return self.cells

  def _density(self, count):
    cell_length = self._length / self.cells
    half = self.width / cell_length / 2
    center = np.arange(self.cells) + 0.5
    valid = np.minimum(center + half, self.cells) - np.maximum(center - half, 0)
    # On each side of its own cell a window covers whole cells and a part.
    whole = max(int(half - 0.5), 0)
    part = max(half - 0.5 - whole, 0.0)
    padded = jnp.pad(count, whole + 1)
    outer = padded[: self.cells] + padded[2 * whole + 2 :]
    inner = _sliding_sum(padded[1:-1], 2 * whole + 1)
    length = np.maximum(valid, 1.0) * cell_length
    return (inner + part * outer) / length.astype(np.float32)


@functools.partial(jax.jit, static_argnames='width')
def _sliding_sum(x, width):
  """Sums of ``width`` neighbors, by doubling: nothing cancels."""
  length = x.shape[0] - width + 1
  total, start, power = jnp.zeros((length,), x.dtype), 0, 1
  while power <= width:
    if width & power:
      total, start = total + x[start : start + length], start + power
    x, power = x[:-power] + x[power:], 2 * power
  return total


DEFAULT = WindowedDensity()
