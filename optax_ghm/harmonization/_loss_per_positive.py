"""The loss of dense prediction, per positive of an average batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters
from optax_ghm.harmonization import _density, _losses


class RunningPositives(NamedTuple):
  """How many positives a batch has on average; all leaves float32.

  Attributes:
    positives: shape (), the decayed sum of the batches' positives.
    evidence: shape (), the decayed sum of 1 per batch. The average has no bias
      towards its start at zero.

  Examples:
    >>> import optax_ghm
    >>> optax_ghm.RunningPositives.init().average
    Array(0., dtype=float32)
  """

  positives: jax.Array
  evidence: jax.Array

  @classmethod
  def init(cls) -> 'RunningPositives':
    """Returns the state before the first batch."""
    return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

  @property
  def average(self) -> jax.Array:
    """The positives of an average batch; 0 before the first."""
    return self.positives / _density.nonzero(self.evidence)


def loss_per_positive(
  losses: ArrayLike,
  positives: ArrayLike,
  state: RunningPositives,
  *,
  momentum: ArrayLike = 0.9,
  floor: ArrayLike = 1.0,
  axis_name: arrays.AxisName = None,
) -> tuple[jax.Array, RunningPositives]:
  r"""The sum of the losses over the positives of an average batch.

  .. math::
    L = \frac{\sum_i \ell_i}{\max(\bar P, P_0)}, \qquad
    \bar P = \frac{\sum_{k \ge 0} m^k P_{t - k}}{\sum_{k \ge 0} m^k}

  with the momentum m, the floor :math:`P_0` and the positives
  :math:`P_{t - k}` of this batch and those before. Detectors divide the losses
  of all anchors or pixels by the number of positives, since a mean over mostly
  background drowns what is rare. By the positives of its own batch alone, one
  batch without any has a loss as large as thousands of others together.

  Args:
    losses: ℓ, floating of any shape, weighted as they are to count. They are 0
      where nothing is to be learned, such as in padding.
    positives: which losses are of positives, bool; or as how many positives
      each counts, real numbers. Any shape: only their sum matters, and the sum
      may be given. Negative numbers, NaN and infinity count as 0.
    state: from :meth:`optax_ghm.RunningPositives.init` or the last call.
    momentum: m, the share of the average that is kept, in [0, 1). With 0 the
      batch stands alone.
    floor: the least number to divide by, above 0. It bounds the loss of a first
      batch without positives; to bound it well, give the number of images.
    axis_name: mapped axis, or axes, over which the batch is split. The loss and
      the state are then those of all of it, the same on every device.

  Returns:
    The loss, shape (), float32 at least, and the next state. No gradient flows
    to the positives or the state. A batch without positives counts in the
    average, as 0; one without elements has the loss 0, too. A loss of NaN makes
    the sum NaN, and leaves the state right.

  Raises:
    TypeError: if ``losses`` are not floating, or ``positives`` not real.
    ValueError: if ``momentum`` is not in [0, 1), or ``floor`` not above 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> state = optax_ghm.RunningPositives.init()
    >>> losses = jnp.array([0.5, 0.25, 0.25, 7.0])
    >>> loss, state = optax_ghm.loss_per_positive(losses, losses > 0.3, state)
    >>> loss
    Array(4., dtype=float32)
    >>> loss, state = optax_ghm.loss_per_positive(losses, losses > 9, state)
    >>> round(float(state.average), 2)  # of 2 and 0 positives
    0.95
    >>> loss  # the floor is 1
    Array(8., dtype=float32)

  References:
    Lin et al., `Focal Loss for Dense Object Detection
    <https://arxiv.org/abs/1708.02002>`_, 2017, section 4.1, divides by the
    positives of the batch
  """
  if isinstance(momentum, int | float) and not 0 <= momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
  if isinstance(floor, int | float) and not floor > 0:
    raise ValueError(f'floor must be above 0, got {floor}.')
  counters.check_type('state', state, RunningPositives)
  losses = _losses.floats('losses', losses)
  total, found = arrays.psum((jnp.sum(losses), _sum(positives)), axis_name)
  found = lax.stop_gradient(found.astype(jnp.float32))
  found = jnp.minimum(found, arrays.LARGEST)
  keep = jnp.asarray(momentum, jnp.float32)
  state = lax.stop_gradient(
    RunningPositives(
      keep * state.positives + (1 - keep) * found,
      keep * state.evidence + (1 - keep),
    )
  )
  divisor = jnp.maximum(state.average, jnp.asarray(floor, jnp.float32))
  return total / divisor.astype(total.dtype), state


def _sum(positives):
  """Integers, if these are bool: float32 would not count on from 2²⁴."""
  positives = jnp.asarray(positives)
  if jnp.iscomplexobj(positives):
    raise TypeError(f'positives must be real, got dtype {positives.dtype}.')
  if positives.dtype == bool:
    return jnp.sum(positives, dtype=jnp.int32)
  positives = positives.astype(jnp.float32)
  counts = (positives > 0) & jnp.isfinite(positives)
  return jnp.sum(jnp.where(counts, positives, 0))
