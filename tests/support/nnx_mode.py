"""Which mode of Flax NNX this process is in: that of today, or tree mode."""

import pytest
from flax import nnx

TREE = not nnx.set_graph_mode.current_value()
graph_mode = pytest.mark.skipif(
  TREE, reason='tree mode wants trees without prefix filters'
)
