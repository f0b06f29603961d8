"""What a tap and a watched optimizer measure, computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np

TAP_PROPERTIES = (
  *('calls', 'elements', 'sum', 'norm', 'rms', 'largest'),
  *('zeros', 'non_finite', 'histogram'),
)


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
  return np.sqrt(np.sum(np.square(as_real(numbers)), axis))


# Taps.


def read(stats):
  """All that statistics tell; of NumPy if they are."""
  found = {name: getattr(stats, name) for name in TAP_PROPERTIES}
  if stats.example_squares is not None:
    found['example_norms'] = stats.example_norms
  return found


def assert_statistics(stats, *calls, rtol=1e-5, atol=0.0):
  """Asserts that they describe ``calls``, a pytree of cotangents each.

  ``stats`` may be what :func:`read` has found in them.
  """
  calls = [[as_real(u) for u in inexact_leaves(call)] for call in calls]
  leaves = [leaf for call in calls for leaf in call]
  numbers = np.concatenate([np.ravel(u) for u in leaves] or [np.zeros(0)])
  found = jax.device_get(stats)
  if not isinstance(found, dict):
    with np.errstate(all='ignore'):
      found = read(found)

  def close(name, expected, atol=atol):
    assert found[name].dtype == np.float32
    np.testing.assert_allclose(
      found[name].astype(np.float64), expected, rtol, atol, err_msg=name
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
  if found['histogram'] is not None:
    np.testing.assert_array_equal(found['histogram'], cells(numbers))
  if 'example_norms' in found:
    by_example = np.concatenate(
      [u.reshape(len(u), u.size // max(len(u), 1)) for u in leaves], axis=1
    )
    close('example_norms', norm(by_example, 1))


def at(stats, *index):
  """The statistics of one layer of a stack."""
  return jax.tree.map(lambda u: u[index], jax.device_get(stats))


def assert_bit_for_bit(actual, expected, rtol=0.0):
  """Asserts equality, or up to ``rtol`` where XLA sums in another order."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for u, v in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert np.asarray(u).dtype == np.asarray(v).dtype
    np.testing.assert_allclose(np.asarray(u), np.asarray(v), rtol=rtol)


def wavy(tree):
  """A loss of any outputs whose cotangents all differ."""
  total = jnp.zeros([], jnp.float32)
  for i, leaf in enumerate(inexact_leaves(tree)):
    total += jnp.sum(jnp.sin((2 + i) * leaf.astype(jnp.float32)))
  return total


# Watched optimizers.


def assert_columns(state, gradients, updates, params):
  """``gradients``, ``updates`` and ``params``: lists of the counted leaves."""
  for name, leaves in (
    ('gradient_norm', gradients),
    ('update_norm', updates),
    ('parameter_norm', params),
  ):
    np.testing.assert_allclose(
      getattr(state, name), list(map(norm, leaves)), 1e-5, err_msg=name
    )
  for name, count in (
    ('elements', np.size),
    ('zeros', lambda g: np.sum(g == 0)),
    ('non_finite', lambda g: np.sum(~np.isfinite(g))),
  ):
    found, leaves = getattr(state, name), map(np.asarray, gradients)
    np.testing.assert_array_equal(found, list(map(count, leaves)), name)


def moments(gradients, b1, b2):
  """(signal to noise, cosine) of one leaf with the moments of Adam."""
  mu = nu = 0.0
  for g in map(as_real, gradients):
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * np.square(g)
  lengths = norm(g) * norm(mu)
  return np.sum(mu**2) / np.sum(nu), np.sum(g * mu) / lengths
