"""Many small leaves as a few rows, which compile quickly."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core.arrays import is_split

SMALL, MANY, TOGETHER = 2**14, 32, 64
"""Leaves of up to so many elements are joined where there are so many, and so
many at a time: XLA compiles a few dozen operands per concatenation soonest."""


def rows(
  leaves: list[jax.Array], groups: np.ndarray
) -> tuple[list[jax.Array], np.ndarray]:
  """The leaves, each in a row of an array with a new first axis.

  Small leaves of one group share a row, if there is but one group; if there are
  several, each has a row to itself, filled up with zeros.

  Args:
    leaves: as :func:`counted` gives them.
    groups: the group of every leaf.

  Returns:
    The arrays, and the group of every row of them.
  """
  small = [
    i
    for i, leaf in enumerate(leaves)
    if leaf.size <= SMALL and not is_split(leaf)
  ]
  if len(small) < MANY:
    small = []
  one_group = len(set(groups[small])) == 1
  arrays, of_rows, classes = [], [], {}
  for i in small:
    size = 0 if one_group else 1 << (leaves[i].size - 1).bit_length()
    classes.setdefault((leaves[i].dtype, size), []).append(i)
  for (dtype, size), members in classes.items():
    for start in range(0, len(members), TOGETHER):
      some = members[start : start + TOGETHER]
      # One flat concatenation, which XLA copies piece by piece.
      pieces = []
      for i in some:
        pieces.append(leaves[i].ravel())
        if leaves[i].size < size:
          pieces.append(jnp.zeros(size - leaves[i].size, dtype))
      joined = jnp.concatenate(pieces)
      arrays.append(joined.reshape(-1, size or joined.size))
      of_rows += [groups[i] for i in (some[:1] if one_group else some)]
  for i in sorted(set(range(len(leaves))) - set(small)):
    arrays.append(leaves[i][None])
    of_rows.append(groups[i])
  return arrays, np.array(of_rows)
