"""Leaving whole steps out where the loss or the gradient norm spikes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, norms, stateful, trees
from optax_ghm._core.update_where import update_is_finite, update_where
from optax_ghm.calibration import _clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeWindow:
  """How many steps back :func:`skip_spikes` looks.

  A few steps say little about a deviation, so a short window leaves out calm
  steps. Of 4,000 runs of 300 steps with nothing but noise in the norm, whose
  logarithm was normal with deviation 0.1 and 0.2, this part lost at least one:

  ====== === ===
  length 0.1 0.2
  ====== === ===
  8      30% 45%
  16     13% 20%
  32     2%  7%
  64     0%  3%
  128    0%  2%
  ====== === ===

  With the loss as ``value``, which was as noisy, it was up to twice as many.

  Attributes:
    length: number of good steps to keep. No step is a spike before the window
      holds an eighth of them, and at least two.

  Raises:
    ValueError: if ``length`` is less than 2.

  Examples:
    >>> import optax
    >>> import optax_ghm
    >>> window = optax_ghm.SpikeWindow(length=64)
    >>> tx = optax_ghm.skip_spikes(optax.adamw(1e-3), window=window)
  """

  length: int = 128

  def __post_init__(self) -> None:
    if self.length < 2:
      raise ValueError(f'length must be at least 2, got {self.length}.')


DEFAULT_WINDOW = SpikeWindow()


class RecentSteps(NamedTuple):
  """The last values of one signal.

  Attributes:
    values: the newest value is in the place of the oldest; 0 in places that are
      still empty.
    recorded: int32, number of values so far.
  """

  values: jax.Array
  recorded: jax.Array


class SkipState(NamedTuple):
  """State of :func:`~optax_ghm.skip_spikes`.

  Attributes:
    norm: norm of the last finite gradient, even if its step was left out.
    norm_threshold: threshold of the norm in the last step; the largest float32
      while none is known.
    value_threshold: threshold of the loss in the last step; the largest float32
      while none is known.
    skipped: int32, number of steps that were left out.
    nan_steps: int32, number of these steps whose norm or loss was NaN.
    inf_steps: int32, number of these steps whose norm or loss was infinite, and
      neither NaN.
    norm_spikes: int32, number of these steps whose norm was a spike.
    value_spikes: int32, number of these steps whose loss was a spike; a step
      can be both.
    skipped_in_a_row: int32, number of finite steps that were left out since the
      last step was taken.
    recent_norms: a :class:`RecentSteps` of the norms.
    recent_values: a :class:`RecentSteps` of the losses.
    optimizer: the state of the wrapped optimizer.
  """

  norm: jax.Array
  norm_threshold: jax.Array
  value_threshold: jax.Array
  skipped: jax.Array
  nan_steps: jax.Array
  inf_steps: jax.Array
  norm_spikes: jax.Array
  value_spikes: jax.Array
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
) -> stateful.StatefulTransformation[SkipState]:
  r"""Leaves out steps whose loss or gradient norm is far above the last ones.

  .. math::
    x_t > \mu + k \sigma, \qquad
    \mu, \sigma \text{ of } x_{t - n}, \dots, x_{t - 1}

  Here x is the gradient norm and, if it is given, the loss. The rule is that
  of the OLMo language models, which wait for half a window; here an eighth is
  enough. A step is also left out if either number is NaN or inf, if the norm is
  more than 10,000 times the mean or, with float16, if the optimizer makes NaN
  or inf of it. Its update is 0 and the state of the optimizer does not change:
  moments, counts and schedules do not know of it.

  A step that is left out does not enter the window (in OLMo it does). If the
  level of the norms or losses changes for good, the window is reset after
  ``max_consecutive`` finite steps in a row were left out, and the next step is
  taken.

  ``optax.MultiSteps(skip_spikes(...))`` is given the losses one by one, and
  passes on that of the last micro-batch alone. Give it the mean of the losses
  since the last step as ``value``, or none. Gradients of frozen leaves count in
  the norm: see :func:`~optax_ghm.calibrated`.

  Args:
    optimizer: any Optax optimizer.
    sigmas: k, the number of standard deviations above the mean.
    window: n, the number of steps to compare with.
    max_consecutive: how many finite steps in a row may be left out.
    axis_name: mapped axis, or axes, over which the gradients are split or the
      loss is that of a part of the batch. All devices then decide together, by
      the mean of their losses. (Gradients that are whole on n devices have a
      norm √n times as large, which changes no decision.)

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.SkipState`. Its ``update`` takes the loss as
    the extra argument ``value``, a scalar, and passes it on to the optimizer:
    with ``axis_name``, the mean of the devices. Without it, under ``pmap`` or
    ``shard_map``, the loss must be the same on all devices, or some of them
    leave out a step that others take.

  Raises:
    TypeError: if ``optimizer`` is no transformation, or ``window`` is not a
      :class:`~optax_ghm.SpikeWindow`.
    ValueError: if ``sigmas`` or ``max_consecutive`` is negative; on update, if
      ``value`` is not a scalar, or is known to differ over a mapped axis over
      which the gradients do not.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax_ghm.skip_spikes(
    ...   optax.sgd(1.0), window=optax_ghm.SpikeWindow(length=64)
    ... )
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for loss in (2.0, 2.1, 1.9, 2.0, 2.2, 2.1, 1.8, 2.0, 8.0):
    ...   updates, state = tx.update(jnp.ones(1), state, params, value=loss)
    >>> print(updates, state.skipped)
    [0.] 1

  References:
    OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2025
  """
  counters.check_type('optimizer', optimizer, counters.GradientTransformation)
  counters.check_type('window', window, SpikeWindow)
  counters.check_range('sigmas', sigmas, 0, np.inf)
  counters.check_range('max_consecutive', max_consecutive, 0, np.inf)
  inner = optax.with_extra_args_support(optimizer)
  slots = np.arange(window.length, dtype=np.int32)

  def init_fn(params):
    def none():
      return jnp.zeros([], jnp.int32)

    def recent():
      return RecentSteps(jnp.zeros([window.length], jnp.float32), none())

    return SkipState(
      norm=jnp.zeros([], jnp.float32),
      norm_threshold=jnp.full([], arrays.LARGEST, jnp.float32),
      value_threshold=jnp.full([], arrays.LARGEST, jnp.float32),
      skipped=none(),
      nan_steps=none(),
      inf_steps=none(),
      norm_spikes=none(),
      value_spikes=none(),
      skipped_in_a_row=none(),
      recent_norms=recent(),
      recent_values=recent(),
      optimizer=inner.init(params),
    )

  def mean_and_threshold(recent):
    """Both are larger than every norm while they are not known."""
    values, recorded = recent
    count = jnp.minimum(recorded, window.length).astype(jnp.float32)
    # Divided before they are summed, so that no sum overflows.
    mean = jnp.sum(values / jnp.maximum(count, 1))
    distance = jnp.where(slots < recorded, values - mean, 0)
    deviation = norms.norm(distance) / jnp.sqrt(jnp.maximum(count - 1, 1))
    # Equal values differ by rounding, which is no deviation.
    deviation = jnp.maximum(deviation, 1e-6 * jnp.abs(mean))
    threshold = mean + jnp.asarray(sigmas, jnp.float32) * deviation
    enough = recorded >= max(window.length // 8, 2)
    return (
      jnp.where(recorded > 0, mean, jnp.inf),
      jnp.where(enough, threshold, arrays.LARGEST),
    )

  def record(recent, x, enters, reset):
    """Adds a value to the window, after a reset if there is one."""
    recorded = jnp.where(reset, 0, recent.recorded)
    values = jnp.where(reset, 0, recent.values)
    slot = recorded % window.length
    return RecentSteps(
      jnp.where(enters & (slots == slot), x, values),
      counters.count_if(enters, recorded),
    )

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    if value is not None:
      value = _common(value, updates, axis_name)
      extra_args['value'] = value
    norm = norms.global_norm(updates, axis_name).astype(jnp.float32)
    mean_norm, norm_threshold = mean_and_threshold(state.recent_norms)
    _, value_threshold = mean_and_threshold(state.recent_values)
    loss = jnp.asarray(0 if value is None else value, jnp.float32)
    step = inner.update, updates, state.optimizer, params
    nan = jnp.isnan(norm) | jnp.isnan(loss)
    sound = jnp.isfinite(norm) & jnp.isfinite(loss)
    finite = sound & update_is_finite(*step, **extra_args)
    norm_spike = norm > norm_threshold
    norm_spike |= norm > _clip.OUTLIER_RATIO * mean_norm
    value_spike = (value is not None) & (loss > value_threshold)
    spike = norm_spike | value_spike
    in_a_row = state.skipped_in_a_row.astype(jnp.float32)
    reset = in_a_row >= jnp.asarray(max_consecutive, jnp.float32)
    reset &= finite & spike
    taken = finite & (~spike | reset)
    new_updates, inner_state = update_where(taken, *step, **extra_args)
    return new_updates, SkipState(
      norm=jnp.where(jnp.isfinite(norm), norm, state.norm),
      norm_threshold=norm_threshold,
      value_threshold=value_threshold,
      skipped=counters.count_if(~taken, state.skipped),
      nan_steps=counters.count_if(nan, state.nan_steps),
      inf_steps=counters.count_if(~sound & ~nan, state.inf_steps),
      norm_spikes=counters.count_if(
        sound & ~taken & norm_spike, state.norm_spikes
      ),
      value_spikes=counters.count_if(
        sound & ~taken & value_spike, state.value_spikes
      ),
      skipped_in_a_row=jnp.where(
        taken, 0, counters.count_if(finite, state.skipped_in_a_row)
      ),
      recent_norms=record(state.recent_norms, norm, taken & (norm > 0), reset),
      recent_values=record(
        state.recent_values, loss, taken & (value is not None), reset
      ),
      optimizer=inner_state,
    )

  return stateful.StatefulTransformation(init_fn, update_fn)


def _common(value, updates, axis_name):
  """The loss that all devices decide by."""
  if jnp.shape(value) != ():
    raise ValueError(f'value must be a scalar, got {jnp.shape(value)}.')
  if axis_name is not None:
    return jax.lax.pmean(value, axis_name)
  own = arrays.varying_axes(value).difference(
    *map(arrays.varying_axes, trees.counted(updates))
  )
  if own:
    raise ValueError(
      f'value differs over the mapped axes {sorted(own)}, and the gradients do'
      ' not: give skip_spikes their names as axis_name, so that all devices'
      ' take or leave out the same steps.'
    )
  return value
