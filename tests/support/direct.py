"""Statistics of cotangents, computed from the whole of them in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def is_inexact(x):
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)


def inexact_leaves(tree):
  return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def as_real(leaf):
  """The array in float64, with a last axis of two for complex numbers."""
  u = np.asarray(leaf)
  if np.iscomplexobj(u):
    u = np.stack([u.real, u.imag], axis=-1)
  return u.astype(np.float64)


def cells(numbers):
  """The number of magnitudes in each [4^(i - 48), 4^(i - 47))."""
  counted = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
  _, exponent = np.frexp(counted)  # in [2^(exponent - 1), 2^exponent)
  cell = np.clip(np.floor((exponent - 1) / 2) + 48, 0, 63).astype(int)
  return np.bincount(cell, minlength=64)


def norm(numbers, axis=None):
  if not numbers.size:
    return np.sum(numbers, axis)
  return np.sqrt(np.sum(np.square(numbers), axis))


def assert_statistics(stats, *calls, rtol=1e-5, atol=0.0):
  """Asserts that ``stats`` describe ``calls``, a pytree of cotangents each."""
  calls = [[as_real(u) for u in inexact_leaves(call)] for call in calls]
  leaves = [leaf for call in calls for leaf in call]
  numbers = np.concatenate([np.ravel(u) for u in leaves] or [np.zeros(0)])

  found = jax.device_get(_read(stats))

  def close(name, expected, atol=atol):
    assert found[name].dtype == np.float32
    np.testing.assert_allclose(
      found[name].astype(np.float64), expected, rtol=rtol, atol=atol
    )

  assert found['calls'] == len(calls)
  assert found['elements'] == numbers.size
  assert found['zeros'] == np.sum(numbers == 0)
  assert found['non_finite'] == np.sum(~np.isfinite(numbers))
  finite = np.abs(numbers[np.isfinite(numbers)])
  with np.errstate(invalid='ignore'):
    total = np.sum(numbers)
  close('sum', total, atol + rtol * np.sum(finite) + 1e-44)
  close('norm', norm(numbers))
  close('rms', norm(numbers) / np.sqrt(max(numbers.size, 1)))
  most = [np.max([np.max(np.abs(u), initial=0) for u in c]) for c in calls]
  if len(calls) <= 1:
    close('largest', np.max(most, initial=0))
  elif np.isfinite(most).all():
    assert found['largest'] >= np.max(most) * (1 - rtol) - atol
    close('largest', min(np.sum(most), norm(numbers)))
  if stats.histogram is not None:
    np.testing.assert_array_equal(found['histogram'], cells(numbers))
  if stats.example_squares is not None:
    by_example = np.concatenate(
      [u.reshape(len(u), u.size // max(len(u), 1)) for u in leaves], axis=1
    )
    close('example_norms', norm(by_example, 1))


@jax.jit
def _read(stats):
  found = {
    name: getattr(stats, name)
    for name in (
      *('calls', 'elements', 'sum', 'norm', 'rms', 'largest'),
      *('zeros', 'non_finite', 'histogram'),
    )
  }
  if stats.example_squares is not None:
    found['example_norms'] = stats.example_norms
  return found


def at(stats, *index):
  """The statistics of one layer of a stack."""
  return jax.tree.map(lambda u: u[index], stats)


def assert_bit_for_bit(actual, expected, rtol=0.0):
  """Asserts equality, or up to ``rtol`` where XLA sums in another order."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for u, v in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert jnp.asarray(u).dtype == jnp.asarray(v).dtype
    np.testing.assert_allclose(np.asarray(u), np.asarray(v), rtol=rtol)


def wavy(tree):
  """A loss of any outputs whose cotangents all differ."""
  total = jnp.zeros([], jnp.float32)
  for i, leaf in enumerate(inexact_leaves(tree)):
    total += jnp.sum(jnp.sin((2 + i) * leaf.astype(jnp.float32)))
  return total
