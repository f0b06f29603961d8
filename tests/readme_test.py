"""Every Python block of the README runs, in order, as one session."""

import pathlib
import re

import jax
import numpy as np

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()


def test_newcomer_reaches_working_code_within_30_lines():
  first = README.split('```python')[1].split('```')[0]
  assert README[: README.index(first) + len(first)].count('\n') < 30


def test_python_blocks_run():
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len(blocks) >= 5
  session = {}
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    for block in blocks:
      exec(block, session)
  positives = session['x'][:10] @ session['params'] > 0
  assert np.mean(positives) > 0.8  # the rare class is found
