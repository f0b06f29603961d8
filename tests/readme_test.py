"""Every block of the README runs, in order, as one session."""

import pathlib
import re

import pytest

PROGRAMS = 120  # as a reader would run them, not under jit
pytestmark = pytest.mark.usefixtures('as_users_run_jax')
README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
FENCED = re.findall(r'```(python|diff)\n(.*?)```', README, re.DOTALL)


def side(diff, sign):
  """What a diff says was there (-) or is there now (+)."""
  kept = [line for line in diff.splitlines() if line[:1] in ('', ' ', sign)]
  return '\n'.join(line[1:] for line in kept) + '\n'


BLOCKS = [side(code, '+') if kind == 'diff' else code for kind, code in FENCED]


def run(blocks):
  session = {}
  for block in blocks:
    exec(block, session)
  return session


def test_newcomer_reaches_working_code_within_30_lines():
  first = BLOCKS[0]
  assert README[: README.index(first) + len(first)].count('\n') < 30


def test_python_blocks_run():
  session = run(BLOCKS)
  assert session['record'].steps.tolist() == [0, 1, 2]


def test_the_plain_loop_that_the_diff_starts_from_runs():
  (diff,) = (code for kind, code in FENCED if kind == 'diff')
  session = run([BLOCKS[0], side(diff, '-')])
  assert 'record' not in session
  assert session['value'] > 0


LOGITS = '(x @ params[0] + params[1], y)'
HARMONIZED = f'ghm.sigmoid_ghm_loss{LOGITS}'
PLAIN = f'optax.sigmoid_binary_cross_entropy{LOGITS}'
WEIGHTED = f'(jnp.where(y == 1, 50, 50 / 99) * {PLAIN})'


@pytest.mark.parametrize(
  ('loss', 'found', 'false', 'words'),
  [
    (HARMONIZED, 12, 0, 'finds 12, without a false alarm'),
    (PLAIN, 8, 0, 'finds 8'),
    (WEIGHTED, 19, 25, 'they find 19 of 20, with 25 false alarms'),
  ],
)
def test_the_first_example_finds_what_is_said(loss, found, false, words):
  assert words in ' '.join(README.split())
  positive = run([BLOCKS[0].replace(HARMONIZED, loss)])['found']
  # Another processor's rounding may move what lies on the border.
  assert abs(int(positive[:20].sum()) - found) <= 1
  assert abs(int(positive[20:].sum()) - false) <= 2
