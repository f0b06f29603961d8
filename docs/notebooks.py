"""Writes the guides as notebooks without outputs: ``make notebooks``.

They are for Colab. What only Sphinx understands becomes links to the site.
"""

import pathlib
import re

import jupytext

DOCS = pathlib.Path(__file__).parent
SITE = 'https://optax-ghm.readthedocs.io/en/latest'
PICTURES = 'https://raw.githubusercontent.com/optax-ghm/optax_ghm/main/docs'
GUIDES = sorted((DOCS / 'guides').glob('*.md'))


def path(guide: pathlib.Path) -> pathlib.Path:
  """Where the notebook of a guide lies."""
  return DOCS / 'notebooks' / f'{guide.stem}.ipynb'


def text(guide: pathlib.Path) -> str:
  """The notebook of a guide."""
  notebook = jupytext.reads(guide.read_text(), fmt='md:myst')
  for number, cell in enumerate(notebook.cells):
    cell.id = str(number)
    if cell.cell_type == 'markdown':
      cell.source = _without_roles(cell.source)
  return jupytext.writes(notebook, fmt='ipynb')


def _without_roles(source):
  source = re.sub(r'^\[Open in Colab\].*\n*', '', source, flags=re.MULTILINE)
  source = re.sub(r'\{\w+\}`([^`<>]+?)\s+<([\w.]+)>`', _link, source)
  source = re.sub(r'\{\w+\}`~?((?:\w+\.)*)(\w+)`', _short_link, source)
  source = re.sub(r'\]\(\.\./(\w+\.png)\)', rf']({PICTURES}/\1)', source)
  source = re.sub(r'\]\(\.\./(\w+)\.md', rf']({SITE}/\1.html', source)
  return re.sub(r'\]\((\w+)\.md', rf']({SITE}/guides/\1.html', source)


def _link(match):
  return f'[{match[1]}]({SITE}/api/generated/{match[2]}.html)'


def _short_link(match):
  return f'[`{match[2]}`]({SITE}/api/generated/{match[1]}{match[2]}.html)'


if __name__ == '__main__':
  for guide in GUIDES:
    path(guide).parent.mkdir(exist_ok=True)
    path(guide).write_text(text(guide))
