"""The learning rate range test: how large a step the loss bears."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import norms


@dataclasses.dataclass(frozen=True)
class RangeTest:
  """What :func:`learning_rate_range_test` saw.

  Attributes:
    learning_rates: of every step, float64 (steps,).
    losses: before every step, on its batch; NaN or inf where it diverged.
    smoothed: those, smoothed; NaN after it diverged.
    gradient_norms: of every step.
    suggestion: a learning rate; None where nothing speaks for one.
    reason: why this one, or why none, in a sentence or two.
  """

  learning_rates: np.ndarray
  losses: np.ndarray
  smoothed: np.ndarray
  gradient_norms: np.ndarray
  suggestion: float | None
  reason: str

  def plot(self, ax: Any = None) -> Any:
    """Draws losses and suggestion; needs matplotlib.

    Args:
      ax: axes to draw on; new ones by default.

    Returns:
      The axes.
    """
    if ax is None:
      import matplotlib.pyplot as plt  # noqa: PLC0415

      _, ax = plt.subplots(figsize=(6, 4), layout='constrained')
    ax.semilogx(self.learning_rates, self.losses, '.', color='0.75', ms=3)
    ax.semilogx(self.learning_rates, self.smoothed, color='C0')
    there = self.smoothed[np.isfinite(self.smoothed)]
    if there.size:
      margin = 0.1 * (np.ptp(there) or 1)
      ax.set_ylim(there.min() - margin, there.max() + margin)
    if self.suggestion is not None:
      ax.axvline(
        self.suggestion, color='C3', ls='--', label=f'{self.suggestion:.1e}'
      )
      ax.legend(title='suggestion')
    ax.set(xlabel='learning rate', ylabel='loss')
    return ax


def learning_rate_range_test(
  loss: Callable[[Any, Any], jax.Array],
  params: Any,
  batches: Any,
  optimizer: Callable[..., optax.GradientTransformation] = optax.sgd,
  *,
  low: float = 1e-6,
  high: float = 10.0,
  steps: int = 200,
) -> RangeTest:
  r"""Trains while the learning rate grows, and suggests one from the loss.

  .. math:: \eta_t = \eta_\text{low}
    (\eta_\text{high} / \eta_\text{low})^{t / (T - 1)}

  All steps are one compiled scan; ``params`` stay as they are. (Smith lets it
  grow linearly, and reads the bounds of a cycle off the curve by eye.)

  The losses are smoothed over a tenth of a decade or two steps, without the lag
  of a moving average. The suggestion is a third of the learning rate at their
  minimum; none if they never fall clearly, by six standard errors.
  (On 20 pairs of a small task and an optimizer, 400 steps with a third of it
  ended at 1.8 times the loss of the best of 25 rates, in the median; with a
  tenth of it at 4.6, and with the rate at the steepest fall at 5.7 times.)

  Args:
    loss: from parameters and one batch to a scalar. For a model with batch
      statistics, the loss in training mode that drops the new ones; what else
      changes from step to step, such as keys for dropout, goes into the batch.
    params: to start from.
    batches: pytree of arrays with an additional first axis, the batches, which
      the steps go through again and again. Give several: a few examples, seen
      often, bear larger steps than the data do.
    optimizer: of the learning rate, a schedule: such as ``optax.adam``, or
      ``lambda rate: optax.chain(ghm.clip_by_zscore(), optax.adamw(rate))``.
    low: the first learning rate.
    high: the last.
    steps: how many, T.

  Returns:
    A :class:`RangeTest`: the curve, the suggestion and its reason.

  Raises:
    ValueError: if not 0 < low < high, if there are less than 20 steps, or if
      the leaves of ``batches`` differ in their first axis.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jax.random.normal(jax.random.key(0), (10, 32, 4))
    >>> y = x @ jnp.array([1.0, -2.0, 3.0, 0.0]) + jnp.sin(9 * x[..., 0])
    >>> loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    >>> test = optax_ghm.learning_rate_range_test(loss, jnp.zeros(4), (x, y))
    >>> 0.01 < test.suggestion < 0.5
    True
    >>> print(test.reason.split()[:3])
    ['A', 'third', 'of']

  References:
    Smith, `Cyclical Learning Rates for Training Neural Networks
    <https://arxiv.org/abs/1506.01186>`_, 2015
  """
  if not 0 < low < high:
    raise ValueError(f'low and high must be 0 < low < high, got {low}, {high}.')
  if steps < 20:
    raise ValueError(f'steps must be at least 20, got {steps}.')
  counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
  if len(counts) != 1 or counts in ({()}, {(0,)}):
    raise ValueError(
      'batches must have one additional first axis, got shapes'
      f' {[jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]}.'
    )
  ((count,),) = counts
  learning_rates = np.geomspace(low, high, steps)
  rates = jnp.asarray(learning_rates, jnp.float32)
  tx = optax.with_extra_args_support(optimizer(lambda step: rates[step]))

  @jax.jit
  def run(params, batches):
    def step(carry, t):
      params, state = carry
      batch = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(
          jnp.asarray(leaf), t % count, keepdims=False
        ),
        batches,
      )
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, state = tx.update(grads, state, params, value=value)
      params = optax.apply_updates(params, updates)
      return (params, state), (value, norms.global_norm(grads))

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, jnp.arange(steps))[1]

  losses, gradient_norms = (
    np.asarray(each, np.float64) for each in run(params, batches)
  )
  smoothed, error = _smoothed(losses, learning_rates)
  suggestion, reason = _suggestion(learning_rates, losses, smoothed, error)
  return RangeTest(
    learning_rates, losses, smoothed, gradient_norms, suggestion, reason
  )


def _smoothed(losses, learning_rates):
  """The losses under a Gaussian, and its standard error of a unit scatter.

  Its deviation is a tenth of a decade, or two steps if that is more. NaN once
  the loss is not finite. Losses far above the first count as if they were less,
  so that a divergence is not seen long before it begins.
  """
  bad = ~np.isfinite(losses)
  last = int(np.argmax(bad)) if bad.any() else len(losses)
  decade = np.log10(learning_rates[1] / learning_rates[0])
  width = max(0.1 / decade, 2)  # in steps
  reach = min(int(np.ceil(9 * width)), max(last - 1, 0))  # 3e-18 of the middle
  kernel = np.exp(-((np.arange(-reach, reach + 1) / width) ** 2) / 2)

  def weighted(values, kernel):
    return np.convolve(values, kernel)[reach : reach + last]

  smoothed, error = np.full(len(losses), np.nan), 0.0
  if last:
    first = np.median(losses[: max(last // 10, 1)])
    most = first + max(first - losses[:last].min(), 0)
    total = weighted(np.ones(last), kernel)
    smoothed[:last] = weighted(np.minimum(losses[:last], most), kernel) / total
    squares = weighted(np.ones(last), kernel**2) / total**2
    error = float(np.sqrt(squares.mean()))
  return smoothed, error


def _suggestion(learning_rates, losses, smoothed, error):
  """A third of where the loss is lowest, and the reason."""
  last = int(np.isfinite(smoothed).sum())
  if last < len(smoothed) // 10:
    return None, (
      'The loss is not finite from almost the first step on: no suggestion.'
      ' Look at the data and the initial parameters, or begin lower.'
    )
  curve = smoothed[:last]
  lowest = int(np.argmin(curve))
  # The median's deviation, for the losses before a divergence are the many.
  error *= np.median(np.abs(losses[:last] - curve)) / 0.6745
  fall = curve[: lowest + 1].max() - curve[lowest]
  if fall <= 6 * error or lowest < 2:
    return None, (
      f'The loss fell by {fall:.2g} at most with a standard error of'
      f' {error:.2g}: no suggestion. Take larger batches, more steps or another'
      ' range.'
    )
  suggestion = float(learning_rates[lowest]) / 3
  reason = f'A third of {learning_rates[lowest]:.1e}, where the loss is lowest'
  above = curve[lowest:] > curve[0] + 3 * error
  if above.any():
    diverged = learning_rates[lowest + int(np.argmax(above))]
    reason += f'; from {diverged:.1e} on it is above where it began.'
  elif last < len(smoothed):
    reason += f'; from {learning_rates[last]:.1e} on it is not finite.'
  else:
    reason += '; it does not diverge: a higher range may show more.'
  return suggestion, reason
