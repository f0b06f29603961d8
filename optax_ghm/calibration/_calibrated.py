"""One safe default: any optimizer, with a guard, a clip and measurements."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optax_ghm._core import counters, stateful, trees
from optax_ghm._core.update_where import update_is_finite, update_where
from optax_ghm.calibration import _clip, _zscore


class CalibratedState(NamedTuple):
  """State of :func:`~optax_ghm.calibrated`.

  Attributes:
    clip: a :class:`ClipState`, with the measurements.
    optimizer: the state of the optimizer.
  """

  clip: _clip.ClipState
  optimizer: optax.OptState


def calibrated(
  optimizer: optax.GradientTransformation,
  clip: optax.GradientTransformation | None = None,
) -> stateful.StatefulTransformation[CalibratedState]:
  """Wraps an optimizer, so that it survives spikes and bad steps.

  Gradients are clipped adaptively before the optimizer sees them. Where a
  gradient holds NaN or inf, the whole update is left out: it is 0, and the
  state of the optimizer does not change. One pass over the gradients serves the
  guard, the clip and the measurements in the state.

  The optimizer itself can make NaN of a gradient that is finite. With float16
  gradients, parameters or moments it often does, because Adam's eps of 1e-8 is
  0 there: such a step is left out and counted as skipped, too. In wider floats
  it takes an eps of 0, or a learning rate that is not finite. To look for it
  would cost more than the rest of the step:
  :func:`~optax_ghm.flow.diagnose` names it.

  All gradients that come in count in the norm, those of frozen leaves, too.
  With ``optax.partition`` the clip belongs inside,
  ``optax.partition({'trained': calibrated(optimizer), 'frozen':
  optax.set_to_zero()}, labels)``. For several trained groups and one clip, put
  ``optax.masked(optax.set_to_zero(), frozen)`` before ``calibrated``.

  In ``optax.MultiSteps``, a bad micro-batch enters the accumulated gradient
  before this wrapper sees it, and costs the whole step. Give ``MultiSteps``
  the argument ``should_skip_update_fn=optax.skip_not_finite``.

  Args:
    optimizer: any Optax optimizer.
    clip: a clip that keeps a :class:`~optax_ghm.calibration.ClipState`. By
      default it is :func:`clip_by_zscore` with the settings of its paper.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.CalibratedState`.

  Raises:
    TypeError: if the optimizer or the clip is no transformation; on init, if
      the clip keeps another state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax_ghm.calibrated(optax.sgd(0.1, momentum=0.9))
    >>> params = {'w': jnp.ones(2)}
    >>> state = tx.init(params)
    >>> bad = {'w': jnp.array([jnp.nan, 1.0])}
    >>> updates, state = tx.update(bad, state, params)
    >>> print(updates['w'], state.clip.skipped, state.optimizer[0].trace['w'])
    [0. 0.] 1 [0. 0.]
  """
  clip = _zscore.clip_by_zscore() if clip is None else clip
  for name, tx in (('optimizer', optimizer), ('clip', clip)):
    counters.check_type(name, tx, counters.GradientTransformation)
  inner = optax.with_extra_args_support(optimizer)
  before = optax.with_extra_args_support(clip)

  def init_fn(params):
    clip_state = before.init(params)
    if not isinstance(clip_state, _clip.ClipState):
      raise TypeError(
        'clip must be one that keeps a ClipState, such as clip_by_zscore(); the'
        f' state of this one is a {type(clip_state).__name__}.'
      )
    return CalibratedState(clip_state, inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    clipping: Any = before.update(updates, state.clip, params, **extra_args)
    clipped, clip_state = clipping
    step = inner.update, clipped, state.optimizer, params
    made = update_is_finite(*step, **extra_args)
    sound = jnp.all(clip_state.factor > 0) & made
    new_updates, inner_state = update_where(sound, *step, **extra_args)
    # One bad leaf leaves out the step of all leaves, so none learns from it.
    clip_state = clip_state._replace(
      factor=jnp.where(made, clip_state.factor, 0),
      skipped=counters.count_if(
        ~made & (clip_state.factor > 0), clip_state.skipped
      ),
      statistics=trees.select(
        sound, clip_state.statistics, state.clip.statistics
      ),
    )
    return new_updates, CalibratedState(clip_state, inner_state)

  return stateful.StatefulTransformation(init_fn, update_fn)
