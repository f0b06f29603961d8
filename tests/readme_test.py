"""Every Python block of the README runs, in order, as one session."""

import pathlib
import re

import jax

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def run(blocks):
  session = {}
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    for block in blocks:
      exec(block, session)
  return session


def test_newcomer_reaches_working_code_within_30_lines():
  first = BLOCKS[0]
  assert README[: README.index(first) + len(first)].count('\n') < 30


def test_python_blocks_run():
  session = run(BLOCKS)
  assert session['record'].steps.tolist() == [0]


def test_first_example_finds_what_cross_entropy_does_not():
  def positives(block):
    found = run([block])['found']
    return int(found[:20].sum()), int(found[20:].sum())

  plain = BLOCKS[0].replace(
    'losses, _ = optax_ghm.sigmoid_ghm_loss',
    'losses = optax.sigmoid_binary_cross_entropy',
  )
  assert plain != BLOCKS[0]
  found, false = positives(BLOCKS[0])
  assert found >= positives(plain)[0] + 4 and false <= 4
