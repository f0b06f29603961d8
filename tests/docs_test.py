"""The pages' code runs, its output is what they say, and no name is missing.

The guides are notebooks, which ``make docs`` runs.
"""

import contextlib
import io
import pathlib
import re

import jax
import pytest

from tests.support.public import public_names

PROGRAMS = 1250  # as a reader would run them, not under jit

DOCS = pathlib.Path(__file__).parent.parent / 'docs'
PAGES = {
  str(path.relative_to(DOCS)): path.read_text()
  for path in sorted(DOCS.glob('**/*.md'))
  if not {'_build', 'guides'} & set(path.parts)
}
BLOCK = re.compile(
  r'^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```\n)?',
  re.DOTALL | re.MULTILINE,
)


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile():
  """Most of the time would be LLVM's; nobody else gets what is made so."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
  jax.clear_caches()


def of_code(page):
  return BLOCK.findall(PAGES[page])


@pytest.mark.usefixtures('as_users_run_jax')
@pytest.mark.parametrize('page', list(filter(of_code, PAGES)))
def test_python_blocks_run_and_print_what_the_page_says(
  page, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # where pages write files
  session = {}
  for code, output in of_code(page):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(code, session)
    if output:
      assert printed.getvalue() == output


def test_every_block_of_python_is_found():
  marks = sum(text.count('```python') for text in PAGES.values())
  assert marks == sum(len(of_code(page)) for page in PAGES) > 20


def test_every_public_name_is_in_the_reference_once():
  documented = []
  for page in (text for name, text in PAGES.items() if name.startswith('api')):
    for module, block in re.findall(
      r'currentmodule:: (\S+)\n(.*?)^```', page, re.DOTALL | re.MULTILINE
    ):
      names = re.findall(r'^   ([\w.]+)$', block, re.MULTILINE)
      documented += [f'{module}.{name}' for name in names]
  assert sorted(documented) == sorted(public_names())


def test_notebooks_for_colab_are_the_guides():
  pytest.importorskip('jupytext')
  from docs import notebooks

  paths = {notebooks.path(guide): guide for guide in notebooks.GUIDES}
  assert sorted(paths) == sorted((DOCS / 'notebooks').iterdir())
  for path, guide in paths.items():
    assert path.read_text() == notebooks.text(guide), 'make notebooks'
