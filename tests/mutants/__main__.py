"""Measures how many of the mutants the tests kill.

Run ``python -m tests.mutants`` in the checkout. Every mutant is put into a
scratch copy, where the tests run until one of them fails: first those whose
file is named like the mutated file and its doctests, then those of its package,
then ``tests/laws``, then all others, which ``--no-rest`` leaves out.

``--only`` takes the mutants with a text in their name or file. ``--tree`` is
another checkout, whose library and tests are meant. ``--save`` writes a JSON
file after every mutant, from its name to the test that killed it, or null; what
is killed there is not run again. ``--before`` is such a file of an earlier run,
whose tests come first. The exit status is 1 if a mutant survived, or if a test
that killed one fails without any mutant, too.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutants.mutants import MUTANTS

HERE = pathlib.Path(__file__).parents[2]
TIMEOUT = 1800  # seconds for one stage
FACES = 'faces|tapped|nnx|linen|recalibrate'
HOMES = dict.fromkeys(
  ('linen', 'nnx'), ('flow', 'batch_normalization', 'backward', 'reversal')
)
HOMES['_core'] = ('_core', 'conflict', 'harmonization', 'calibration')


def run(tree, *arguments, **options):
  """Runs Python in the scratch copy, which hides an installed library."""
  env = {**os.environ, 'PYTHONPATH': str(tree)}
  command = [sys.executable, *arguments]
  return subprocess.run(command, cwd=tree, env=env, check=False, **options)


def failures(tree, files, *options):
  """The tests that fail, or else what happened instead."""
  command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', *options, *files]
  with tempfile.TemporaryFile('w+', errors='replace') as out:
    try:
      status = run(tree, *command, stdout=out, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
      return ['timeout']
    out.seek(0)
    found = re.findall(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', out.read(), re.M)
  # 4 and 5: there is no such test, or none.
  return [] if status in (0, 4, 5) else found or [f'exit status {status}']


def stages(tree, file, rest):
  """Lists of test files, from the nearest to the mutated file to the others."""
  package, stem = file.split('/')[0], pathlib.Path(file).stem.strip('_')
  tests = sorted(p.relative_to(tree) for p in tree.glob('tests/**/*_test.py'))
  is_face = package in ('linen', 'nnx')
  homes = HOMES.get(package, (package,))
  own = [p for home in homes for p in tests if p.parts[1] == home]
  own.sort(
    key=lambda p: (
      stem not in p.name,
      package not in str(p),
      'properties' in p.name,  # which take long
    )
  )
  near = [p for p in own if re.search(FACES if is_face else stem, p.name)]
  laws = [p for p in tests if p.parts[1] == 'laws']
  modules = [p.relative_to(tree) for p in tree.glob('optax_ghm/**/*.py')]
  others = [*tests, *sorted(modules)] if rest else []
  done = set()
  for files in ([*near, pathlib.Path('optax_ghm', file)], own, laws, others):
    yield [str(p) for p in files if p not in done]
    done.update(files)


def killer(tree, mutant, before, rest):
  """The first test that fails with the mutant; None if all pass."""
  path = tree / 'optax_ghm' / mutant.file
  text = path.read_text(encoding='utf-8')
  path.write_text(text.replace(mutant.old, mutant.new), encoding='utf-8')
  try:
    nearest = [before] if before else []
    for files in filter(None, [nearest, *stages(tree, mutant.file, rest)]):
      if found := failures(tree, files, '-x'):
        return found[0]
  finally:
    path.write_text(text, encoding='utf-8')


def check(tree):
  """Raises unless every mutant fits its file and the copy is imported."""
  for mutant in MUTANTS:
    text = (tree / 'optax_ghm' / mutant.file).read_text(encoding='utf-8')
    if (count := text.count(mutant.old)) != 1:
      raise ValueError(f'{mutant.name}: {mutant.old!r} occurs {count} times.')
  code = 'import optax_ghm; print(optax_ghm.__file__)'
  imported = run(tree, '-c', code, capture_output=True, text=True).stdout
  if not imported.startswith(f'{tree}{os.sep}'):
    raise RuntimeError(f'imported {imported!r} instead of the scratch copy.')


def main():
  """Prints a line for every mutant, then how many each package has killed."""
  parser = argparse.ArgumentParser(prog='python -m tests.mutants')
  parser.add_argument('--only', default='')
  parser.add_argument('--save', type=pathlib.Path)
  parser.add_argument('--before', type=pathlib.Path)
  parser.add_argument('--tree', type=pathlib.Path, default=HERE)
  parser.add_argument('--no-rest', action='store_true')
  args = parser.parse_args()
  mutants = [m for m in MUTANTS if args.only in m.name or args.only in m.file]
  saved, before = (
    json.loads(path.read_text(encoding='utf-8'))
    if path and path.exists()
    else {}
    for path in (args.save, args.before)
  )
  with tempfile.TemporaryDirectory() as scratch:
    tree = pathlib.Path(scratch).resolve() / 'tree'
    shutil.copytree(args.tree, tree, ignore=shutil.ignore_patterns('.*'))
    (cache := args.tree.resolve() / '.jax_cache').mkdir(exist_ok=True)
    (tree / '.jax_cache').symlink_to(cache)
    check(tree)
    for mutant in mutants:
      start = time.time()
      if saved.get(mutant.name) is None:
        test, rest = before.get(mutant.name), not args.no_rest
        saved[mutant.name] = killer(tree, mutant, test, rest)
        if args.save:
          args.save.write_text(json.dumps(saved, indent=1), encoding='utf-8')
      test, seconds = saved[mutant.name], time.time() - start
      verdict = f'killed by {test}' if test else 'SURVIVED'
      print(f'{mutant.name}: {verdict}, {seconds:.0f} s', flush=True)
    killers = {saved[m.name] for m in mutants}
    tests = sorted(test for test in killers if test and '::' in test)
    invalid = failures(tree, tests) if tests else []
  for package in [*dict.fromkeys(m.file.split('/')[0] for m in mutants), '']:
    of = [saved[m.name] for m in mutants if m.file.startswith(package)]
    print(f'{package or "all":20} {len(of) - of.count(None):3} of {len(of):3}')
  for test in invalid:
    print(f'fails without a mutant, too: {test}')
  return int(bool(invalid) or None in killers)


if __name__ == '__main__':
  sys.exit(main())
