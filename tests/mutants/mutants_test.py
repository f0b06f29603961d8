"""Every mutant can be put into the library, and the docs know how many."""

import pathlib

from tests.mutants.mutants import MUTANTS

ROOT = pathlib.Path(__file__).parents[2]


def test_the_line_of_every_mutant_is_there_once():
  for mutant in MUTANTS:
    text = (ROOT / 'optax_ghm' / mutant.file).read_text()
    assert text.count(mutant.old) == 1, mutant.name


def test_the_docs_say_how_many_there_are():
  for page in ('docs/measured.md', 'CONTRIBUTING.md'):
    assert f'puts {len(MUTANTS)} wrong lines' in (ROOT / page).read_text()
