"""Type checkers on what users write: ``python -m tests.typing``.

Pyright and mypy must accept ``user_ok.py`` and find every mistake of
``user_wrong.py``, and pyright must know the types of all public names.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
FILES = ('user_ok.py', 'user_wrong.py')
CHECKERS = {
  'pyright': ['pyright'],
  # Optax has types, and no py.typed that says so.
  'mypy': [
    'mypy',
    '--follow-untyped-imports',
    f'--cache-dir={ROOT}/.mypy_cache',
  ],
}
ERROR = re.compile(r'(user_\w+\.py):(\d+)(?::\d+ -|:) error')
UNTYPED = 'StatefulTransformation'
"""The class whose base is Optax's; pyright calls that base unknown."""


def output_of(command, folder):
  """What a checker of this environment prints; no checker is an error."""
  bin_first = f'{pathlib.Path(sys.executable).parent}{os.pathsep}'
  run = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=folder,
    env={**os.environ, 'PATH': bin_first + os.environ['PATH']},
    capture_output=True,
    text=True,
    check=False,
  )
  if run.returncode not in (0, 1):
    sys.exit(f'{command[0]} failed:\n{run.stdout}{run.stderr}')
  return run.stdout


def check(name):
  """Returns whether a checker is right about every line, and prints it."""
  lines = {
    (file, i): line
    for file in FILES
    for i, line in enumerate((HERE / file).read_text().splitlines(), start=1)
  }
  mistakes = {at for at, line in lines.items() if '# mistake: ' in line}
  with tempfile.TemporaryDirectory() as folder:  # as far away as a user's own
    for file in FILES:
      (pathlib.Path(folder) / file).write_text((HERE / file).read_text())
    output = output_of([*CHECKERS[name], *FILES], folder)
  found = {(file, int(i)) for file, i in ERROR.findall(output)}
  print(f'{name}: {len(found & mistakes)} of {len(mistakes)} mistakes found.')
  for at in sorted(mistakes ^ found):
    print('  missed:' if at in mistakes else '  no mistake:', lines[at].strip())
  return mistakes == found


def check_names():
  """Returns whether 98 % of the public names have a type, and prints it."""
  command = ['pyright', '--verifytypes', 'optax_ghm', '--ignoreexternal']
  output = json.loads(output_of([*command, '--outputjson'], ROOT))
  names = [
    symbol
    for symbol in output['typeCompleteness']['symbols']
    if symbol['isExported']
  ]
  unknown = [name for name in names if not name['isTypeKnown']]
  of_optax = [name for name in unknown if UNTYPED in str(name['diagnostics'])]
  print(
    f'pyright: {len(names) - len(unknown)} of {len(names)} public names have a'
    f' type, and {len(of_optax)} a base class of Optax.'
  )
  for name in unknown:
    if name not in of_optax:
      print('  no type:', name['name'])
  return len(unknown) - len(of_optax) <= 0.02 * len(names)


if __name__ == '__main__':
  right = [*map(check, CHECKERS), check_names()]
  sys.exit(not all(right))
