"""What the harmonized losses share: checks of arguments, and the weighting.

Each loss comes in two forms. The plain form returns one loss per example,
unreduced, as ``optax.losses`` do. The form with state is for densities with a
momentum: it takes the state of the density and returns the next one, too.
"""

import jax.numpy as jnp

from optax_ghm._core import arrays, counters
from optax_ghm.harmonization import _weighting, _weights, _windowed


def harmonize(
  losses, norms, amounts, weighting, axis_name, state=None, train=True
):
  """The losses times the harmony weights of their norms; the next state."""
  counters.check_type('weighting', weighting, _weighting.HarmonyWeighting)
  weighting = weighting.with_density(_windowed.DEFAULT)
  if state is None:
    state = _weights.init_without_momentum(weighting)
  weights, state = _weights.weigh(
    norms, amounts, state, weighting, axis_name, train
  )
  return weights.astype(losses.dtype) * losses, state


def keep(x, amounts):
  """0 for examples left out, so that no value or gradient is NaN there.

  The last axes of ``x`` that ``amounts`` lacks lie within an example.
  """
  if amounts is None:
    return x
  counts = jnp.expand_dims(amounts.astype(bool), range(amounts.ndim, x.ndim))
  counts = arrays.laid_out_as(jnp.broadcast_to(counts, x.shape), x)
  return jnp.where(counts, x, jnp.zeros_like(x))


def finite(x):
  """``x`` with the largest number in place of infinity."""
  limits = jnp.finfo(x.dtype)
  return jnp.clip(x, limits.min, limits.max)


def floats(name, x):
  """``x`` in the dtype to compute in, float32 at least."""
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'{name} must be floating, got dtype {x.dtype}.')
  return x.astype(arrays.at_least_float32(x.dtype))


def broadcast(name, x, like):
  """``x`` with the shape, dtype and layout of ``like``."""
  x = jnp.asarray(x)
  if jnp.iscomplexobj(x):
    raise TypeError(f'{name} must be real, got dtype {x.dtype}.')
  try:
    x = jnp.broadcast_to(x, like.shape).astype(like.dtype)
  except ValueError:
    raise ValueError(
      f'{name} of shape {x.shape} do not broadcast to shape {like.shape}.'
    ) from None
  return arrays.laid_out_as(x, like)


def with_integer_labels(logits, labels):
  """Logits in the dtype to compute in, and labels that can hold any class."""
  logits, labels = floats('logits', logits), jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'labels must be integers, got dtype {labels.dtype}.')
  if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
    raise ValueError(
      f'labels of shape {labels.shape} do not fit logits of shape'
      f' {logits.shape}: expected {logits.shape[:-1]}.'
    )
  if labels.dtype.itemsize < 4:
    labels = labels.astype(jnp.int32)
  return logits, labels
