"""``python -m optax_ghm.flow``."""

import os
import runpy
import subprocess
import sys

import pytest

from optax_ghm import flow
from optax_ghm.flow import __main__ as command_line
from tests.support.hand_made import record_of, tapped


@pytest.fixture
def saved(tmp_path):
  def save(name, *norms, names=('encoder', 'head')):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    step = tapped(*(norms or [None, 1.0]), names=names)
    record_of(step, start=3).save(path)
    return path

  return save


def test_the_page_is_written_beside_the_record(saved, capsys):
  path = saved('run.npz')
  assert command_line.main(['report', str(path)]) == 0
  page = path.with_suffix('.html')
  assert {p.name for p in path.parent.iterdir()} == {'run.npz', 'run.html'}
  text = page.read_text(encoding='utf-8')
  assert '<title>Gradient flow</title>' in text
  assert 'disconnected' in text and '<h2>run</h2>' in text
  out, err = capsys.readouterr()
  assert 'disconnected' in out and 'encoder' in out
  assert f'written: {page}' in out
  assert err == ''


@pytest.mark.parametrize('option', ['-o', '--output'])
def test_output_and_title_are_options(saved, tmp_path, option):
  page = tmp_path / 'other.htm'
  arguments = [str(saved('run.npz')), option, str(page), '--title', 'A <b>']
  assert command_line.main(['report', *arguments]) == 0
  assert '<title>A &lt;b&gt;</title>' in page.read_text()
  assert not (tmp_path / 'run.html').exists()


def test_an_output_that_ends_in_md_is_markdown(saved, tmp_path):
  path = tmp_path / 'report.md'
  records = str(saved('one.npz')), str(saved('two.npz'))
  assert command_line.main(['report', *records, '-o', str(path)]) == 0
  text = path.read_text(encoding='utf-8')
  assert text.startswith('# Gradient flow\n\n## one\n')
  assert '\n## two\n' in text and '**disconnected**' in text


def test_several_records_are_compared_on_one_page(saved, capsys):
  one, two = saved('one.npz'), saved('two.npz', 1.0, 1.0)
  assert command_line.main(['report', str(one), str(two)]) == 0
  text = one.with_suffix('.html').read_text()
  assert text.index('<h2>one</h2>') < text.index('<h2>two</h2>')
  assert not two.with_suffix('.html').exists()
  assert 'two: nothing was found' in capsys.readouterr().out


def test_records_of_one_name_in_two_folders_are_both_shown(saved):
  one, two = saved('a/flow.npz'), saved('b/flow.npz', 1.0, 1.0)
  assert command_line.main(['report', str(one), str(two)]) == 0
  text = one.with_suffix('.html').read_text()
  assert text.count('<section>') == 2
  assert 'disconnected' in text and 'Nothing was found' in text


@pytest.mark.filterwarnings('ignore::ResourceWarning')
@pytest.mark.parametrize(
  ('name', 'told'),
  [
    ('folder', 'directory'),
    ('text', 'not a zip file'),
    ('two\nlines\x1b[2J', 'not a zip file'),  # truncated
    ('without steps', 'nothing is recorded'),
    ('missing', 'No such file'),
  ],
)
def test_a_bad_file_is_status_1_and_a_line(saved, tmp_path, capsys, name, told):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'text').write_text('no record')
  flow.Record().save(tmp_path / 'without steps')
  truncated = saved('two\nlines\x1b[2J')
  truncated.write_bytes(truncated.read_bytes()[:-100])
  path = tmp_path / name
  assert command_line.main(['report', str(path)]) == 1
  out, err = capsys.readouterr()
  assert out == '' and err.endswith('\n') and err[:-1].isprintable()
  assert told in err and name.split('\n')[0] in err
  assert not path.with_suffix('.html').exists()


def test_a_record_is_not_written_over_by_its_page(saved, capsys):
  one, two = saved('one.html'), saved('two.npz')
  before = one.read_bytes()
  for arguments in ([one], [one, two], [two, '-o', two]):
    assert command_line.main(['report', *map(str, arguments)]) == 1
    assert 'is a record' in capsys.readouterr().err
  assert one.read_bytes() == two.read_bytes() == before


def test_a_page_that_cannot_be_written_is_status_1(saved, tmp_path, capsys):
  page = tmp_path / 'no folder' / 'x.html'
  assert command_line.main(['report', str(saved('r')), '-o', str(page)]) == 1
  assert 'no folder' in capsys.readouterr().err


def test_without_rich_the_page_is_written_all_the_same(
  saved, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'rich.console', None)
  path = saved('run.npz')
  assert command_line.main(['report', str(path)]) == 0
  assert path.with_suffix('.html').exists()
  out, err = capsys.readouterr()
  assert 'rich is not installed' in err and 'written' in out


@pytest.mark.parametrize('arguments', [[], ['report'], ['other', 'x']])
def test_a_wrong_call_says_how_to_call_it(arguments, capsys):
  with pytest.raises(SystemExit) as error:
    command_line.main(arguments)
  assert error.value.code == 2
  assert 'usage: python -m optax_ghm.flow' in capsys.readouterr().err


def test_it_runs_as_a_module_where_the_terminal_lacks_letters(saved):
  path = saved('run.npz', names=('größe \ud800', 'x'))
  done = subprocess.run(
    [sys.executable, '-m', 'optax_ghm.flow', 'report', str(path)],
    check=False,
    capture_output=True,
    env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'COLUMNS': '200'},
  )
  assert done.returncode == 0, done.stderr
  assert rb'gr\xf6\xdfe \ud800' in done.stdout and done.stderr == b''
  assert path.with_suffix('.html').exists()


def test_run_as_a_module_it_exits_with_the_status(
  tmp_path, monkeypatch, capsys
):
  path = str(tmp_path / 'missing')
  monkeypatch.setattr(sys, 'argv', ['optax_ghm.flow', 'report', path])
  with pytest.raises(SystemExit) as error:
    runpy.run_path(command_line.__file__, run_name='__main__')
  assert error.value.code == 1
  assert 'missing' in capsys.readouterr().err
