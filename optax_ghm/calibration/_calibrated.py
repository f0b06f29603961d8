"""One safe default: any optimizer, with a guard, a clip and measurements."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core.update_where import update_where
from optax_ghm.calibration import _clip, _zscore


class CalibratedState(NamedTuple):
  """State of :func:`calibrated`.

  Attributes:
    clip: a :class:`ClipState`, with the measurements.
    optimizer: the state of the optimizer.
  """

  clip: Any
  optimizer: optax.OptState


def calibrated(
  optimizer: optax.GradientTransformation,
  clip: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer that survives spikes and bad steps, and says so.

  Clips adaptively before the optimizer, and leaves the whole update out, the
  optimizer's state untouched, where a gradient holds NaN or inf: one norm pass
  for the guard, the clip and the measurements.

  In ``optax.MultiSteps`` a bad micro-batch would be in the accumulated gradient
  before this sees it, and cost the whole step: give that
  ``should_skip_update_fn=optax.skip_not_finite``.

  Args:
    optimizer: any Optax optimizer.
    clip: one that keeps a :class:`ClipState`; by default
      :func:`clip_by_zscore`, with the paper's settings.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`CalibratedState`.

  Raises:
    TypeError: on init, if the clip keeps another state.

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
  inner = optax.with_extra_args_support(optimizer)
  before = optax.with_extra_args_support(
    _zscore.clip_by_zscore() if clip is None else clip
  )

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
    sound = jnp.all(clip_state.factor > 0)
    stepped, inner_state = update_where(
      sound, inner.update, clipped, state.optimizer, params, **extra_args
    )
    # One bad leaf leaves out the step of all: then no other learns from it.
    statistics = jax.tree.map(
      lambda new, old: jnp.where(sound, new, old),
      clip_state.statistics,
      state.clip.statistics,
    )
    return stepped, CalibratedState(
      clip_state._replace(statistics=statistics), inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
