"""Gradient trees: a short list of structures, so that programs are shared."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FLOAT0 = jax.dtypes.float0


class Layer(NamedTuple):
  kernel: Any
  bias: Any


def array(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


MIXED = {
  'bfloat16': Layer(array(2, 2, dtype=jnp.bfloat16), None),
  'bool': array(2, dtype=bool),
  'complex64': [array(2, dtype=np.complex64), (), {}],
  'empty': array(2, 0),
  'float16': array(2, dtype=np.float16),
  'float32': [array(), array(2, 1, 1, 1, 2, 1)],
  'int8': array(1, 2, dtype=np.int8),
}
STRUCTURES = {
  'scalar': array(),
  'nested': {
    'dense': Layer(array(3, 2), array(2)),
    'others': [None, (array(1), array(2, 1, 3)), ()],
    'empty': array(0, 3),
  },
  'many': [array(1 + i % 3) for i in range(40)],
  'mixed': MIXED,
  'nothing': {'empty': array(3, 0), 'int32': array(2, dtype=np.int32)},
}
FLOAT64 = {'wide': array(2, 2, dtype=np.float64), 'narrow': array(2)}
"""Its structure is for ``jax.enable_x64``."""

RANGE = (0, 0, 0.3, -0.3, 0.8, -0.8)
"""Exponents as a share of what the dtype holds: 2^±102 of float32, and 1."""

BEYOND = (*RANGE, 0.99, -0.98, -1.1)
"""And those of the largest numbers, the least, and of subnormal ones."""


def is_inexact(leaf):
  return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)


def real_dtype(dtype):
  return jnp.finfo(dtype).dtype


NOT_SMALL = st.one_of(
  st.floats(2.0**-9, 1, width=16), st.floats(-1, -(2.0**-9), width=16)
)
MANTISSAS = st.one_of(NOT_SMALL, st.sampled_from([0.0, -0.0, 1.0, -1.0]))
BAD = st.sampled_from([np.nan, np.inf, -np.inf])


@st.composite
def trees(draw, structure, exponents=RANGE, bad=False, mantissas=MANTISSAS):
  """A tree of NumPy arrays, every leaf with a scale of its own.

  Args:
    draw: of hypothesis.
    structure: a tree of shapes and dtypes.
    exponents: of the scales, as shares of the range of the dtype.
    bad: whether some of the numbers are NaN or infinite.
    mantissas: from -1 to 1, of the numbers.
  """
  leaves, treedef = jax.tree.flatten(structure)
  count = sum(
    math.prod(leaf.shape) * (1 + jnp.issubdtype(leaf.dtype, np.complexfloating))
    for leaf in leaves
    if is_inexact(leaf)
  )
  numbers = draw(hnp.arrays(np.float64, count, elements=mantissas))
  if bad and count:
    for at in draw(st.lists(st.integers(0, count - 1), max_size=2)):
      numbers[at] = draw(BAD)

  together = draw(st.sampled_from(exponents))
  apart = draw(st.booleans())

  def fill(leaf):
    nonlocal numbers
    if leaf.dtype == FLOAT0 or not is_inexact(leaf):
      return np.ones(leaf.shape, bool).astype(leaf.dtype)
    size = math.prod(leaf.shape)
    parts = 1 + jnp.issubdtype(leaf.dtype, np.complexfloating)
    own, numbers = numbers[: parts * size], numbers[parts * size :]
    share = draw(st.sampled_from(exponents)) if apart else together
    own = own * 2.0 ** int(share * jnp.finfo(leaf.dtype).maxexp)
    if parts == 2:  # not by 1j times what may be infinite
      own = own.reshape(size, 2).view(np.complex128)
    with np.errstate(under='ignore'):
      return own.reshape(leaf.shape).astype(leaf.dtype)

  return treedef.unflatten([fill(leaf) for leaf in leaves])


def batched(structure, size=3):
  """Of per-example gradients: with examples along a new first axis."""
  return jax.tree.map(
    lambda leaf: array(size, *leaf.shape, dtype=leaf.dtype), structure
  )


def ones(structure):
  """Parameters of the structure; integers where gradients are float0."""

  def fill(leaf):
    dtype = np.int32 if leaf.dtype == FLOAT0 else leaf.dtype
    return np.ones(leaf.shape, dtype)

  return jax.tree.map(fill, structure)


def wide(tree):
  """The leaves that count, in NumPy's longest floats."""
  return [
    np.asarray(
      leaf,
      np.complex128 if np.iscomplexobj(leaf) else np.float64,
    )
    for leaf in jax.tree.leaves(tree)
    if is_inexact(leaf) and leaf.size
  ]


def types(tree):
  """Structure, shapes, dtypes and weak types, to compare with ``==``."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [jax.typeof(leaf) for leaf in leaves]
