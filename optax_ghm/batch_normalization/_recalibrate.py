"""What recalibration has in common for modules of Linen and of NNX."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _domain, _moments


def init(mean: jax.Array) -> _moments.Moments:
  """Returns moments of no elements, for running averages like ``mean``."""
  return _moments.Moments.init(mean.shape, arrays.at_least_float32(mean.dtype))


def moments_of_call(norm, call, args, kwargs):
  """Returns the moments of the input of a batch norm module.

  Args:
    norm: a batch norm module of Flax or of this library.
    call: its ``__call__``, with the module itself as first argument.
    args: positional arguments of the call, but for the module.
    kwargs: keyword arguments of the call.

  Returns:
    The moments, for every domain if the module has domains; None if the module
    normalizes by its running averages.
  """
  given = inspect.signature(call).bind(norm, *args, **kwargs).arguments
  use_running_average = given.get('use_running_average')
  if use_running_average is None:
    use_running_average = norm.use_running_average
  if use_running_average:
    return None
  mask = given.get('mask')
  options: dict[str, Any] = {
    'axis': norm.axis,
    'mask': None if mask is None else jnp.asarray(mask, bool),
    'axis_name': norm.axis_name,
  }
  if 'domain' not in given:
    return _moments.Moments.of(given['x'], **options)
  return _domain.domain_batch_norm(
    given['x'], given['domain'], num_domains=norm.num_domains, **options
  )[1]


def check_measured(found: Iterable[_moments.Moments]) -> None:
  """Raises an error if nothing counted in any batch norm."""
  if not any(float(jnp.sum(moments.count)) for moments in found):
    raise ValueError(
      'no batch norm normalized by its batch: batches must hold at least one'
      ' batch, and apply must run the model in training mode'
      ' (use_running_average=False).'
    )


def replace(
  averages: Mapping[str, jax.Array], moments: _moments.Moments
) -> dict[str, jax.Array]:
  """Returns running averages with the moments in their place.

  Args:
    averages: ``mean``, ``var`` and other variables of a batch norm. A
      ``weight`` becomes 1, others stay.
    moments: of the data. Averages stay where nothing counted or where the
      statistics are not finite.
  """
  var = moments.var
  new = {'mean': moments.mean, 'var': var, 'weight': jnp.ones_like(var)}
  known = (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(var)
  measured = {
    name: jnp.where(known, u.astype(averages[name].dtype), averages[name])
    for name, u in new.items()
    if name in averages
  }
  return {**averages, **measured}
