"""What is published: the wheel, the source distribution, and their metadata."""

import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml
from packaging.metadata import Metadata

import optax_ghm
from tests.readme_test import BLOCKS

ROOT = pathlib.Path(__file__).parent.parent
VERSION = optax_ghm.__version__
SITE = 'https://optax-ghm.readthedocs.io/en/stable/'
HOME = 'https://github.com/optax-ghm/optax_ghm'
RAW = 'https://raw.githubusercontent.com/optax-ghm/optax_ghm/main/'
README = (ROOT / 'README.md').read_text()


def run(*command, **kwargs):
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, **kwargs
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The source distribution, and the wheel that is built from it."""
  folder = tmp_path_factory.mktemp('dist')
  run(sys.executable, '-m', 'build', '--no-isolation', '-o', folder, ROOT)
  (wheel,) = folder.glob('*.whl')
  (source,) = folder.glob('*.tar.gz')
  return wheel, source


INSTALLED = """
import pathlib, sys
import optax_ghm
home, checkout = map(pathlib.Path, sys.argv[1:])
assert home in pathlib.Path(optax_ghm.__file__).parents
assert not any(checkout == pathlib.Path(path) for path in sys.path)
"""


@pytest.mark.slow
def test_the_wheel_runs_its_readme_without_the_checkout(built, tmp_path):
  env = tmp_path / 'env'
  venv.create(env, symlinks=True)
  python = env / 'bin' / 'python'
  run(sys.executable, '-m', 'pip', '--python', python, 'install',
      '--no-index', '--no-deps', built[0])  # fmt: skip
  (packages,) = env.glob('lib/python*/site-packages')
  # The dependencies; a path in a .pth file has no .pth files of its own, so
  # that an editable installation beside them is not seen.
  (packages / 'rest.pth').write_text(sysconfig.get_path('purelib'))
  code = '\n'.join([INSTALLED, *BLOCKS])
  run(python, '-I', '-c', code, env, ROOT, cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
  with zipfile.ZipFile(built[0]) as wheel:
    names = set(wheel.namelist())
    (path,) = (name for name in names if name.endswith('/METADATA'))
    metadata = Metadata.from_email(wheel.read(path), validate=True)
  info = f'optax_ghm-{VERSION}.dist-info'
  assert names == {
    *(
      str(path.relative_to(ROOT))
      for path in (ROOT / 'optax_ghm').rglob('*')
      if path.suffix != '.pyc' and path.is_file()
    ),
    *(f'{info}/{name}' for name in ('METADATA', 'RECORD', 'WHEEL')),
    f'{info}/licenses/LICENSE',
  }
  assert 'optax_ghm/py.typed' in names
  assert metadata.description == README
  assert str(metadata.version) == VERSION
  needed = {
    str(need.name) for need in metadata.requires_dist if not need.marker
  }
  assert needed == {'flax', 'jax', 'jaxlib', 'optax'}


@pytest.mark.slow
def test_the_source_distribution_is_what_git_has(built):
  with tarfile.open(built[1]) as source:
    names = {name.partition('/')[2] for name in source.getnames()}
  folders = {'tests', 'docs', 'examples', 'benchmarks', 'optax_ghm'}
  assert folders <= {name.partition('/')[0] for name in names}
  if (ROOT / '.git').exists():
    kept, new = (
      subprocess.check_output(['git', 'ls-files', *of], cwd=ROOT, text=True)
      for of in ((), ('--others', '--exclude-standard'))
    )
    assert not {*kept.splitlines()} - names
    assert names - {*kept.splitlines(), *new.splitlines()} == {'PKG-INFO'}


def test_every_place_names_the_same_version():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  changes = re.search(
    r'^## (\S+) - (\S+)$', (ROOT / 'CHANGELOG.md').read_text(), re.M
  )
  date = str(citation['date-released'])
  assert (VERSION, date) == changes.groups()
  assert citation['version'] == VERSION


def links():
  """Every address of the README and of the metadata."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  yield from project['urls'].values()
  yield from re.findall(r'\]\(([^)\s]+)\)', README)
  yield from re.findall(r'^\[[^\]]+\]: (\S+)$', README, re.M)
  yield from re.findall(r'(?:src|href)="([^"]+)"', README)


@pytest.mark.parametrize('link', sorted(set(links())))
def test_a_link_is_absolute_and_leads_to_what_there_is(link):
  """A package index has neither the pages nor the pictures of the checkout."""
  assert link.startswith('https://')
  path = link.partition('#')[0]
  if path.startswith(SITE):
    page = path.removeprefix(SITE).removesuffix('.html') or 'index'
    assert [*(ROOT / 'docs').glob(f'{page}.*')]
  for start in (f'{HOME}/blob/main/', RAW):
    if path.startswith(start):
      assert (ROOT / path.removeprefix(start)).is_file()
  workflow = re.search(r'actions/workflows/(\w+\.yml)', path)
  if workflow:
    assert (ROOT / '.github/workflows' / workflow[1]).is_file()
