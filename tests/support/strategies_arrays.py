"""Arrays of any dtype, value and layout, and how they are compared."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
LAYOUTS = ('jax', 'numpy', 'column-major', 'strided', 'reversed')


def x64(dtype):
  """The context in which arrays of this dtype exist."""
  return jax.enable_x64(jnp.finfo(dtype).bits == 64)


def extremes(dtype):
  """Finite numbers at the ends of a dtype, and those that are not finite."""
  info = jnp.finfo(dtype)
  huge, tiny = (1e30, 1e-30) if info.bits > 16 else (1e4, 1e-4)
  ends = [float(u) for u in (info.max, info.tiny, info.smallest_subnormal)]
  return [huge, -huge, tiny, *ends, -ends[0], np.nan, np.inf, -np.inf]


def numbers(dtype, low=-4, high=4):
  """Mostly ordinary numbers, in between those of :func:`extremes`."""
  ordinary = st.integers(16 * low, 16 * high).map(lambda n: n / 16)
  return ordinary | st.sampled_from([0.0, *extremes(dtype)])


def arrays(dtype, shape, elements):
  """NumPy arrays; of what float64 holds too, if this is one of JAX's own."""
  drawn = hnp.arrays(np.float64, shape, elements=elements)
  return drawn.map(lambda x: cast(x, dtype))


def cast(x, dtype):
  with np.errstate(over='ignore'):
    return np.asarray(x).astype(dtype)


def laid_out(x, layout):
  """The same numbers, otherwise in memory."""
  if layout == 'jax':
    return jnp.asarray(x)
  if layout == 'column-major':
    return np.array(x, order='F')
  if layout == 'strided':
    return np.repeat(x, 2, -1)[..., ::2] if x.ndim else x
  if layout == 'reversed':
    return np.array(np.flip(x))[(np.s_[::-1],) * x.ndim]
  return x


def assert_close(actual, expected, rtol, atol=0.0):
  """Equal to rounding; beyond its dtype, a number is infinite or almost so.

  ``expected`` is of float64; what the dtype flushes to 0 may be 0.
  """
  actual = np.asarray(actual)
  info = jnp.finfo(actual.dtype)
  limit = float(info.max) * (1 - 1e-2)
  expected = np.clip(expected, -limit, limit)
  found = np.clip(actual.astype(np.float64), -limit, limit)
  atol = atol + 2 * float(info.tiny)
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def rounding(dtype):
  """A few units in the last place of what a computation in it comes to."""
  return 8 * float(jnp.finfo(dtype).eps)
