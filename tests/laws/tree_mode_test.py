"""What is of NNX passes its tests in the mode that Flax plans, too."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PAGES = (
  'tests/readme_test.py',
  'tests/docs_test.py::test_python_blocks_run_and_print_what_the_page_says'
  '[recipes.md]',
)
TREE_MODE = {'NNX_GRAPH_MODE': 'false', 'NNX_GRAPH_UPDATES': 'false'}
OTHERS = {'package', 'import_rules', 'tree_mode', 'docs', 'record_accepts'}
"""Test files that name NNX, and do nothing with it."""


def test_nnx_in_tree_mode():
  """The flags are read when a function is decorated: a process of its own."""
  files = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / 'tests').rglob('*_test.py'))
    if 'nnx' in path.read_text()
    and path.name.removesuffix('_test.py') not in OTHERS
  ]
  command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
  run = subprocess.run(
    [
      *command,
      *('-k', 'nnx or test_python_blocks_run'),
      *('optax_ghm/nnx', *PAGES, *files),
    ],
    cwd=ROOT,
    env={**os.environ, **TREE_MODE},
    check=False,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stdout[-5000:] + run.stderr
  passed = re.search(r'(\d+) passed', run.stdout)
  assert passed and int(passed[1]) > 150
