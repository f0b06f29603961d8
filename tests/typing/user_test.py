"""What type checkers accept also runs."""

import jax

from tests.typing import user_ok

PROGRAMS = 500  # as users run JAX


def test_the_script_of_a_user_runs():
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    assert user_ok.train() == []
