"""What recalibration does alike for modules of Linen and of NNX."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _domain, _moments


def moments_of_call(
  norm: Any, call: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> _moments.Moments | None:
  """The moments of what a module for batch norm is called with.

  Args:
    norm: of Flax, or of ours.
    call: its ``__call__``, with the module itself as first argument.
    args: of the call, but for the module.
    kwargs: of the call.

  Returns:
    The moments, per domain if the module has any; None if the module
    normalises by its running averages.
  """
  given = inspect.signature(call).bind(norm, *args, **kwargs).arguments
  use_running_average = given.get('use_running_average')
  if use_running_average is None:
    use_running_average = norm.use_running_average
  if use_running_average:
    return None
  options = {
    'axis': norm.axis,
    'mask': given.get('mask'),
    'axis_name': norm.axis_name,
  }
  if 'domain' not in given:
    return _moments.batch_moments(given['x'], **options)
  return _domain.domain_batch_norm(
    given['x'], given['domain'], num_domains=norm.num_domains, **options
  )[1]


def hashable(apply: Callable[..., Any]) -> Callable[..., Any]:
  """The function, wrapped if it could not be a static argument."""
  try:
    hash(apply)
  except TypeError:
    return functools.partial(apply)  # which goes by its identity
  return apply


def nothing_measured(mean: jax.Array) -> _moments.Moments:
  """Moments of nothing, for averages of this shape."""
  return _moments.Moments.init(mean.shape, arrays.at_least_float32(mean.dtype))


def settle(
  moments: _moments.Moments, averages: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """The averages ``mean``, ``var`` and, if there is one, ``weight``, replaced.

  Where nothing counted, or what counted was not finite, they stay.
  """
  variance = moments.variance()
  known = (
    (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(variance)
  )
  new = {
    'mean': moments.mean,
    'var': variance,
    'weight': jnp.ones_like(variance),
  }
  return {
    name: jnp.where(
      known, new[name].astype(averages[name].dtype), averages[name]
    )
    for name in new
    if name in averages
  }
