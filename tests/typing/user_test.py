"""What type checkers accept also runs."""

import pytest

from tests.typing import user_ok

PROGRAMS = 500  # not under jit


@pytest.mark.usefixtures('as_users_run_jax')
def test_the_script_of_a_user_runs():
  assert user_ok.train() == []
