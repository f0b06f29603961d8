"""Names of any parameters and taps."""

import jax
import numpy as np
from hypothesis import given, strategies as st

from optax_ghm import flow

LEAVES = {
  'float': np.ones(2, 'f'),
  'half': np.ones((1, 2), np.float16),
  'complex': np.ones((), np.complex64),
  'integer': np.arange(2),
  'number': 2.0,
  'none': None,
  'empty': np.ones((0, 2), 'f'),
}
TREES = st.recursive(
  st.sampled_from(list(LEAVES)),
  lambda u: (
    st.lists(u, max_size=3)
    | st.lists(u, max_size=2).map(tuple)
    | st.dictionaries(st.sampled_from('abc'), u, max_size=3)
  ),
  max_leaves=6,
)


def paths(tree, path=()):
  """Norms of the leaves that have a gradient, in order."""
  if isinstance(tree, str):
    return ['/'.join(path)] if tree in ('float', 'half', 'complex') else []
  items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
  return [p for key, u in items for p in paths(u, (*path, str(key)))]


@given(tree=TREES)
def test_leaf_names_are_the_paths_of_what_has_a_gradient(tree):
  params = jax.tree.map(LEAVES.get, tree)
  assert flow.leaf_names(params) == paths(tree)


@given(names=st.lists(st.text(max_size=5), unique=True, max_size=4))
def test_taps_are_a_pytree_under_any_names(names):
  taps = flow.Taps.empty(names)
  leaves, structure = jax.tree.flatten(taps)
  again = structure.unflatten(leaves)
  assert list(again) == names and len(again) == len(names)
  assert again.layers == taps.layers
