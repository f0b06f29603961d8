"""Gradient reversal of any leaves, by any scale."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support.strategies_trees import (
  STRUCTURES,
  is_inexact,
  trees,
  types,
)


@jax.jit
def pulled(floats, cotangents, scale):
  """The cotangent of the inexact leaves behind the reversal."""
  _, pull = jax.vjp(lambda x: optax_ghm.reverse_gradient(x, scale), floats)
  return pull(cotangents)[0]


@given(
  tree=st.sampled_from(['nested', 'mixed']).flatmap(
    lambda name: trees(STRUCTURES[name], bad=True)
  ),
  scale=st.sampled_from([0.0, -0.0, 0.5, -2.0, 2.0**10]),
)
def test_cotangents_are_multiplied_by_minus_the_scale(tree, scale):
  """Exactly, by powers of two, but for what is flushed."""
  floats = jax.tree.map(lambda x: x if is_inexact(x) else None, tree)

  def expected(x):
    factor = np.asarray(-scale, jnp.finfo(x.dtype).dtype)
    with np.errstate(all='ignore'):
      if np.iscomplexobj(x):
        parts = [(part * factor) for part in (x.real, x.imag)]
        return np.stack(parts, -1).view(x.dtype)[..., 0]
      return x * factor

  expect = jax.tree.map(expected, floats)
  actual = pulled(floats, floats, np.float32(scale))
  assert types(actual) == types(floats)
  for x, y in zip(*map(jax.tree.leaves, (actual, expect)), strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.complex128),
      np.asarray(y, np.complex128),
      rtol=0,
      atol=float(jnp.finfo(x.dtype).tiny),
    )


@given(
  shape=st.sampled_from([(), (3,), (3, 2), (3, 1)]),
  scale=hnp.arrays(np.float32, 3, elements=st.sampled_from([0, 1, -0.5])),
)
def test_a_scale_per_example(shape, scale):
  x = np.ones((3, 2, 2), np.float32)
  of_examples = np.resize(scale, shape).astype(np.float32)
  grads = jax.grad(
    lambda x: jnp.sum(optax_ghm.reverse_gradient(x, of_examples))
  )(x)
  axes = tuple(range(len(shape), 3))
  expected = -np.expand_dims(of_examples, axes) * x
  np.testing.assert_array_equal(grads, expected)
