"""Leaving whole steps out where the loss or the gradient spikes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, norms, scopes
from optax_ghm._core.update_where import update_where
from optax_ghm.calibration import _clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeWindow:
  """How many steps back :func:`skip_spikes` looks.

  Attributes:
    length: how many good steps are kept; nothing is called a spike before an
      eighth of them are there, two at least.

  Examples:
    >>> import optax
    >>> import optax_ghm
    >>> window = optax_ghm.SpikeWindow(length=64)
    >>> tx = optax_ghm.skip_spikes(optax.adamw(1e-3), window=window)
  """

  length: int = 128

  def __post_init__(self):
    if self.length < 2:
      raise ValueError(f'length must be at least 2, got {self.length}.')


DEFAULT_WINDOW = SpikeWindow()


_NONE = float(np.finfo(np.float32).max)


class RecentSteps(NamedTuple):
  """The last values of one signal.

  Attributes:
    values: one after the other around the window, 0 where there are none yet.
    recorded: int32, how many there were.
  """

  values: jax.Array
  recorded: jax.Array


class SkipState(NamedTuple):
  """State of :func:`skip_spikes`.

  Attributes:
    norm: of the last gradient, also if it was left out.
    norm_threshold: that it was compared with; the largest float32 while none is
      known.
    value_threshold: that of the loss.
    skipped: int32, how many steps were left out.
    skipped_in_a_row: int32, how many of them just now.
    recent_norms: those of the window.
    recent_values: the same of the loss.
    optimizer: the state of the wrapped optimizer.
  """

  norm: jax.Array
  norm_threshold: jax.Array
  value_threshold: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  recent_norms: RecentSteps
  recent_values: RecentSteps
  optimizer: optax.OptState


def skip_spikes(
  optimizer: optax.GradientTransformation,
  *,
  sigmas: ArrayLike = 6.0,
  window: SpikeWindow = DEFAULT_WINDOW,
  max_consecutive: ArrayLike = 20,
  axis_name: arrays.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Leaves a step out whose loss or gradient norm is far beyond the last ones.

  .. math::
    x_t > \mu + k \sigma, \qquad
    \mu, \sigma \text{ of } x_{t - n}, \dots, x_{t - 1}

  for x the gradient norm and, if it is given, the loss, as large language
  models are trained. (OLMo waits for half a window before it calls anything a
  spike; here an eighth is enough, as bad batches do not wait.) The update is
  then 0 and the optimizer's state what it was: moments, counts and schedules do
  not know of that step. So it is where either has NaN or inf, and where the
  norm is beyond 10,000 times the mean.

  What was left out does not enter the window (in OLMo's it does). Lest a
  lasting change of level stop the training for good, the window starts anew
  after ``max_consecutive`` finite steps in a row were left out: the next one is
  taken.

  Args:
    optimizer: any Optax optimizer.
    sigmas: k.
    window: n, and how many are needed.
    max_consecutive: how many finite steps in a row may be left out.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`SkipState`. Its
    ``update`` takes the loss as the extra argument ``value``, a scalar, the
    same on all devices, and gives it on to the optimizer.

  Raises:
    ValueError: on update, if ``value`` is no scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax_ghm.skip_spikes(
    ...   optax.sgd(1.0), window=optax_ghm.SpikeWindow(length=8)
    ... )
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for loss in (2.0, 2.1, 1.9, 2.0, 8.0):
    ...   updates, state = tx.update(jnp.ones(1), state, params, value=loss)
    >>> print(updates, state.skipped)
    [0.] 1

  References:
    OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2025
  """
  inner = optax.with_extra_args_support(optimizer)
  slots = np.arange(window.length, dtype=np.int32)

  def init_fn(params):
    def recent():
      return RecentSteps(
        jnp.zeros([window.length], jnp.float32), jnp.zeros([], jnp.int32)
      )

    return SkipState(
      norm=jnp.zeros([], jnp.float32),
      norm_threshold=jnp.full([], _NONE, jnp.float32),
      value_threshold=jnp.full([], _NONE, jnp.float32),
      skipped=jnp.zeros([], jnp.int32),
      skipped_in_a_row=jnp.zeros([], jnp.int32),
      recent_norms=recent(),
      recent_values=recent(),
      optimizer=inner.init(params),
    )

  def threshold(recent):
    """The mean and the limit; before they are known, more than any norm."""
    there = slots < recent.recorded
    count = jnp.minimum(recent.recorded, window.length).astype(jnp.float32)
    # Divided before they are summed, so that no sum overflows.
    mean = jnp.sum(recent.values / jnp.maximum(count, 1))
    distance = jnp.where(there, recent.values - mean, 0)
    deviation = norms.norm(distance) / jnp.sqrt(jnp.maximum(count - 1, 1))
    # Equal values differ by rounding: that is no deviation.
    deviation = jnp.maximum(deviation, 1e-6 * jnp.abs(mean))
    limit = mean + jnp.asarray(sigmas, jnp.float32) * deviation
    enough = recent.recorded >= max(window.length // 8, 2)
    return (
      jnp.where(recent.recorded > 0, mean, jnp.inf),
      jnp.where(enough, limit, _NONE),
    )

  def record(recent, x, enters, anew):
    """With one more value, or that alone."""
    recorded = jnp.where(anew, 0, recent.recorded)
    old = jnp.where(anew, 0, recent.values)
    values = jnp.where(slots == recorded % window.length, x, old)
    following = jnp.asarray(optax.safe_increment(recorded))
    return RecentSteps(
      jnp.where(enters, values, old), jnp.where(enters, following, recorded)
    )

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    if value is not None:
      if jnp.shape(value) != ():
        raise ValueError(f'value must be a scalar, got {jnp.shape(value)}.')
      extra_args['value'] = value
    norm = scopes.scoped('global', updates).norms(updates, axis_name)
    usual, norm_limit = threshold(state.recent_norms)
    _, value_limit = threshold(state.recent_values)
    # Without a loss, nothing is wrong with it.
    loss = -jnp.inf if value is None else jnp.asarray(value, jnp.float32)
    finite = jnp.isfinite(norm) & (jnp.isfinite(loss) | (value is None))
    spike = (norm > norm_limit) | (loss > value_limit)
    spike |= norm > _clip.ABSURD * usual
    limit = jnp.asarray(max_consecutive, jnp.float32)
    in_a_row = state.skipped_in_a_row.astype(jnp.float32)
    anew = finite & spike & (in_a_row >= limit)
    taken = finite & (~spike | anew)
    stepped, inner_state = update_where(
      taken, inner.update, updates, state.optimizer, params, **extra_args
    )
    return stepped, SkipState(
      norm=jnp.where(jnp.isfinite(norm), norm, state.norm),
      norm_threshold=norm_limit,
      value_threshold=value_limit,
      skipped=counters.count_if(~taken, state.skipped),
      skipped_in_a_row=jnp.where(
        taken,
        0,
        counters.count_if(finite, state.skipped_in_a_row),
      ),
      recent_norms=record(state.recent_norms, norm, taken & (norm > 0), anew),
      recent_values=record(
        state.recent_values, loss, taken & (value is not None), anew
      ),
      optimizer=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
