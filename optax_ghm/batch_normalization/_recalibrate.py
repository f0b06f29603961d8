"""What recalibration has in common for modules of Linen and of NNX."""

import inspect
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _moments, _pool, _step


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
  by_average = given.get('use_running_average')
  if norm.use_running_average if by_average is None else by_average:
    return None
  x, mask = jnp.asarray(given['x']), given.get('mask')
  if mask is not None:
    mask = jnp.asarray(mask, bool)
  domains = given.get('domain'), getattr(norm, 'num_domains', 0)
  pool = _pool.Pool.of(x, norm.axis, norm.axis_name, mask, *domains)
  return _moments.of_pool(pool, x)


def check_measured(found: Iterable[_moments.Moments]) -> None:
  """Raises an error if nothing counted in any batch norm."""
  if not any(float(jnp.sum(moments.count)) for moments in found):
    raise ValueError(
      'no batch norm normalized by its batch: batches must hold at least one'
      ' batch, and apply must run the model in training mode'
      ' (use_running_average=False).'
    )


@jax.jit
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
  new = _step.running_moments(averages).update(moments, momentum=0)._asdict()
  return {
    name: new.get(name, u).astype(u.dtype) for name, u in averages.items()
  }
