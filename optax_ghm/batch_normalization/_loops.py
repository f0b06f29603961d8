"""Operands of their own for every loop of a compiled batch norm."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays

_INSERTED_AXES = {
  'sum': (),
  'squares': (0,),
  'deviations': (1,),
  'products': (0, 1),
  'output': (0, 2),
  'gradient': (1, 2),
}


def distinct_producers(
  loop: str, f: Callable[..., jax.Array], *operands: jax.Array | None
) -> jax.Array:
  """Returns ``f(*operands)``, computed in at least float32.

  XLA's CPU backend computes an intermediate array that several loops need only
  once, and writes it to memory: the input as float32, or its deviations from
  the mean. Reading the input again is faster. Here every loop sees its operands
  with axes of size 1 in places that no other loop uses. An optimization barrier
  keeps the compiler from simplifying these axes away, so that no two loops have
  an intermediate array in common. Other backends get the operands as they are.

  Args:
    loop: the name of the loop, one of those in ``_INSERTED_AXES``.
    f: an elementwise function of the operands.
    *operands: arrays of one rank; None stays None.
  """
  inserted = _INSERTED_AXES[loop] if jax.default_backend() == 'cpu' else ()

  def own(u):
    if u is None:
      return None
    if inserted:
      u = jax.lax.optimization_barrier(jnp.expand_dims(u, inserted))
    if not arrays.is_inexact(u):
      return u
    return u.astype(arrays.at_least_float32(u.dtype))

  return jnp.squeeze(f(*map(own, operands)), inserted)
