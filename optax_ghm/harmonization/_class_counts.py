"""How many examples each class has, counted while training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks
from optax_ghm.harmonization import _density


class ClassCounts(NamedTuple):
  """The share of each class among the examples so far; all leaves float32.

  Shares and a total stay right where counts in float32 would not: beyond
  16,777,216 they take no single example any more. The shares are those of any
  number of examples, in up to that many batches; from then on each batch moves
  them a little more than it should.

  Attributes:
    frequencies: shape (classes,), the share of the examples that each class
      has; all 0 before the first batch. Their sum is less than 1 if there are
      examples of no class.
    examples: shape (), how many examples these are shares of, those of no class
      included. An example counts as its weight, and as less and less if there
      is a decay.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> state = optax_ghm.ClassCounts.init(3)
    >>> state = state.update(jnp.array([0, 0, 0, 1]))
    >>> state.counts
    Array([3., 1., 0.], dtype=float32)
    >>> adjusted = optax_ghm.adjust_logits(jnp.zeros((4, 3)), state.counts)
    >>> [round(float(z), 2) for z in adjusted[0]]
    [-0.41, -1.5, -2.2]
  """

  frequencies: jax.Array
  examples: jax.Array

  @classmethod
  def init(cls, num_classes: int) -> 'ClassCounts':
    """Returns the state before the first batch.

    Args:
      num_classes: how many classes there are.

    Raises:
      ValueError: if this is not a positive int.
    """
    _density.check_positive_int('num_classes', num_classes)
    return cls(
      jnp.zeros((num_classes,), jnp.float32), jnp.zeros((), jnp.float32)
    )

  @property
  def counts(self) -> jax.Array:
    """How many examples each class has; float32 of shape (classes,)."""
    return self.examples * self.frequencies

  def update(
    self,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    decay: ArrayLike = 1.0,
    axis_name: arrays.AxisName = None,
  ) -> 'ClassCounts':
    r"""Returns the state after one more batch.

    .. math::
      N' = d\, N + N_B, \qquad
      f' = f + \frac{N_B}{N'} \left(\frac{n_B}{N_B} - f\right)

    with the decay d, and :math:`n_B` of the :math:`N_B` examples of this batch
    in a class: the counts :math:`n = N f` become :math:`d\, n + n_B`. Without a
    decay they do not depend on how the examples are split over batches. With
    one, where a step has several micro-batches, only the first of them is to
    decay the counts: give the others ``decay=1.0``.

    A batch in which nothing counts leaves the state as it is. So does one whose
    weights have no finite sum. No gradient flows through the state.

    Args:
      labels: integers of any shape, one for each example; or floating or bool
        of shape (..., classes), such as one-hot, soft or multi-label targets,
        where negative numbers, NaN and infinity count as 0. An integer outside
        of ``[0, classes)`` counts for no class, but as an example, as it does
        in :func:`optax_ghm.sigmoid_ghm_loss_with_integer_labels`. Mask labels
        that mean an example to be ignored.
      mask: bool, broadcastable to the shape of the examples: which of them
        count.
      weights: real numbers, likewise broadcastable: as how many examples each
        example counts. They are added up in float32: a million of them in one
        class count to 1 %.
      decay: d, the share of the old counts that is kept, from 0 to 1. With 1
        all examples count the same. Less forgets, for streams that drift: what
        is left of N tends to :math:`N_B / (1 - d)`.
      axis_name: mapped axis, or axes, over which the batch is split; the price
        is one all-reduce of the counts.

    Raises:
      TypeError: if ``labels`` are complex, ``mask`` is not bool or ``weights``
        are not real.
      ValueError: if ``labels`` that are not integers have another last axis
        than the state, ``mask`` or ``weights`` do not broadcast, or ``decay``
        is not from 0 to 1.
    """
    counters.check_range('decay', decay, 0, 1)
    labels = jnp.asarray(labels)
    count = _count if jnp.issubdtype(labels.dtype, jnp.integer) else _add_up
    batch, examples = lax.stop_gradient(
      count(labels, mask, weights, self.frequencies.size, axis_name)
    )
    total = jnp.asarray(decay, jnp.float32) * self.examples + examples
    seen = (examples > 0) & jnp.isfinite(total)
    share = batch / jnp.where(seen, examples, 1)
    rate = examples / jnp.where(seen, total, 1)
    moved = self.frequencies + rate * (share - self.frequencies)
    return ClassCounts(
      jnp.where(seen, moved, self.frequencies),
      jnp.where(seen, total, self.examples),
    )


def _count(labels, mask, weights, classes, axis_name):
  """How many integers are of each class, and how many there are."""
  amounts = masks.amounts(mask, weights, labels.shape)
  if labels.dtype.itemsize < 4:
    labels = labels.astype(jnp.int32)
  known = (labels >= 0) & (labels < classes)
  # Behind the classes are two more cells: no class, and examples left out.
  cell = jnp.where(known, labels, classes).astype(jnp.int32)
  if amounts is not None:
    cell = jnp.where(amounts.astype(bool), cell, classes + 1)
  cells = _density._count(cell, amounts, classes + 2)
  cells = arrays.psum(cells, axis_name).astype(jnp.float32)
  return cells[:classes], jnp.sum(cells[: classes + 1])


def _add_up(labels, mask, weights, classes, axis_name):
  """The sums of labels per class, and how many examples there are."""
  if jnp.iscomplexobj(labels):
    raise TypeError(f'labels must be real, got dtype {labels.dtype}.')
  if labels.shape[-1:] != (classes,):
    raise ValueError(
      f'labels of shape {labels.shape} and dtype {labels.dtype} must be'
      f' integers, or have {classes} classes along the last axis.'
    )
  shape = labels.shape[:-1]
  amounts = masks.amounts(mask, weights, shape)
  amounts = jnp.asarray(1 if amounts is None else amounts, jnp.float32)
  amounts = jnp.broadcast_to(amounts, shape)
  labels = labels.astype(jnp.float32)
  labels = jnp.where((labels > 0) & jnp.isfinite(labels), labels, 0)
  sums = jnp.sum(labels * amounts[..., None], range(len(shape)))
  sums = arrays.replicated(sums)  # if the classes are split over devices
  return arrays.psum((sums, jnp.sum(amounts)), axis_name)
