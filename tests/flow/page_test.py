"""The HTML page is complete, self-contained and safe."""

import html.parser
import re
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from optax_ghm import flow
from optax_ghm.flow import _plot
from tests.support.hand_made import (
  ONES,
  add,
  kernel,
  record_of,
  tapped,
  watched,
)

HOSTILE = '<script>alert(1)</script>"\'&\t</svg>\n-->'
VOID = {'meta', 'br', 'link', 'img', 'hr', 'input'}
HEAD = ('html', 'head', 'title')
CLOSED = {'g', 'image', 'path', 'rect', 'use'}  # in themselves, in SVG


class Page(html.parser.HTMLParser):
  """What is on a page; fails where tags do not match."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    assert len(dict(attrs)) == len(attrs), f'an attribute twice in {tag}'
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    assert tag in CLOSED
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag

  def handle_data(self, data):
    self.texts.append((tuple(self.open), data))

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]

  def text(self, within=None):
    return ''.join(
      data for tags, data in self.texts if within is None or within in tags
    )

  def title(self):
    return ''.join(data for tags, data in self.texts if tags == HEAD)

  def headings(self):
    return [data for tags, data in self.texts if 'h3' in tags]

  def drawn(self):
    """The texts in the pictures."""
    return [data for tags, data in self.texts if tags[-1:] == ('text',)]


def page_of(records, tmp_path, **kwargs):
  path = tmp_path / 'flow.html'
  flow.write_page(path, records, **kwargs)
  text = path.read_text(encoding='utf-8')
  page = Page(text)
  assert text.startswith('<!doctype html>')
  check_it_is_closed(page, text)
  return page


def check_it_is_closed(page, text):
  """Nothing on it asks for anything elsewhere, or runs."""
  for tag, attrs in page.elements:
    for name, value in attrs.items():
      assert not name.startswith('on'), name
      if name in ('src', 'href', 'xlink:href', 'action', 'data', 'srcset'):
        own = '#' if tag == 'use' else 'data:image/png;base64,'
        assert value.startswith(own)
      assert not re.search(r'url\((?!#)', value)
  assert not {'link', 'iframe', 'script'} & {tag for tag, _ in page.elements}
  (style,) = [data for tags, data in page.texts if 'style' in tags]
  assert '@import' not in style and 'url(' not in style
  assert not re.search(r'(src|href|action)\s*=\s*["\']?\s*(https?:)?//', text)
  (policy,) = [
    attrs['content'] for attrs in page.all('meta') if 'http-equiv' in attrs
  ]
  assert "default-src 'none'" in policy and 'script' not in policy


PARAMS = {'one': {'bias': kernel(2), 'kernel': kernel()}}
HISTOGRAM = np.maximum(np.arange(64, dtype='f') - 40, 0)


def full_record(steps=5):
  record = flow.Record(PARAMS)
  for i in range(steps):
    add(
      record,
      10 * i,
      **tapped(
        *[10.0**i, None, np.nan if i == 2 else 1.0, 5.0],
        names=['first', 'cut off', 'third', ''],
        histogram=HISTOGRAM,
      ),
      opt_state=watched({}, {'update_norm': 1e-3 * (i + 1)}),
      loss=1.0 / (i + 1),
    )
  return record


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """The text of two records on a page."""
  path = tmp_path_factory.mktemp('page') / 'page.html'
  flow.write_page(path, {'one': full_record(), HOSTILE: full_record()})
  return path.read_text(encoding='utf-8')


def test_it_shows_the_verdicts_and_every_picture(tmp_path):
  record = full_record()
  page = page_of(record, tmp_path, title='My run')
  text = page.text()
  assert page.title() == page.text('h1') == 'My run'
  assert not page.all('h2') and len(page.all('section')) == 1
  verdicts = flow.diagnose(record)
  assert {v.kind for v in verdicts} >= {'not finite', 'disconnected'}
  for verdict in verdicts:
    found = f'{verdict.kind} ({verdict.severity:.2f}) since step'
    assert f'{found} {verdict.since}' in text
    for part in (verdict.evidence, verdict.suggestion, verdict.source):
      assert part in text
  assert 'Nothing was found' not in text
  assert '5 recorded steps, 0 to 40' in text
  assert page.headings() == [
    'Loss',
    'Gradient norm at the layers',
    'Over depth',
    'Magnitudes at first',
    'Magnitudes at third',
    'Magnitudes at (the model)',
    'Update norm over parameter norm',
  ]
  labels = [attrs['aria-label'] for attrs in page.all('svg')]
  assert labels == page.headings()
  assert {'first', 'cut off', 'third', '(the model)'} <= set(page.drawn())
  assert {'step 0', 'step 20', 'step 40', 'one/kernel'} <= set(page.drawn())


def test_the_pictures_are_those_of_the_figure(drawn):
  """They take the colors of the page, and their ids do not clash."""
  assert 'currentColor' in drawn and '#010203' not in drawn
  defined, page = {}, Page(drawn)
  for tag, attrs in page.elements:
    if 'id' in attrs:
      same = defined.setdefault(attrs['id'], (tag, attrs))
      assert same == (tag, attrs)
  assert defined.keys() <= set(re.findall(r'#(\w+)', drawn))  # others have none
  titles = [ax.get_title() for ax in flow.figure(full_record()).axes[:4]]
  headings = [h.lower() for h in page.headings()]
  assert {title.lower() for title in titles} <= set(headings)
  assert page.text('h2') == f'one{HOSTILE}' and len(page.all('section')) == 2


def test_it_is_the_same_each_time_and_in_any_style(drawn, tmp_path):
  """No dates, no random names; the style of the caller is not changed."""
  style = {'lines.linewidth': 7.0, 'text.color': 'red', 'font.size': 30}
  with matplotlib.rc_context(style):
    before = dict(matplotlib.rcParams)
    flow.write_page(
      tmp_path / 'b', {'one': full_record(), HOSTILE: full_record()}
    )
    assert dict(matplotlib.rcParams) == before
  assert (tmp_path / 'b').read_text(encoding='utf-8') == drawn


def test_where_nothing_is_wrong_it_says_so(tmp_path):
  text = page_of(record_of(tapped(1.0)), tmp_path).text()
  assert 'Nothing was found in 1 recorded step (1 with taps).' in text


def test_magnitudes_are_shown_of_the_first_a_middle_and_the_last_layer():
  kernels = [False, True, True, True, True, False]
  step = tapped(*[1.0] * 6, names='abcdef', kernels=kernels, histogram=ONES)
  found = _plot.pictures(record_of(step))
  assert [title for title in found if 'magnitudes' in title] == [
    'magnitudes at b',
    'magnitudes at d',
    'magnitudes at e',
  ]


@pytest.mark.parametrize(
  ('losses', 'marks'),
  [
    ([1.0, 2.0, 3.0], 0),
    ([1.0, np.nan, 3.0, np.inf, -np.inf, 1.0], 3),
  ],
)
def test_what_is_not_finite_is_marked_red(losses, marks, tmp_path):
  page = page_of(record_of(*[{'loss': loss} for loss in losses]), tmp_path)
  styles = [attrs['style'] for attrs in page.all('use')]
  assert sum('#ff0000' in style for style in styles) == marks


@pytest.mark.parametrize(('count', 'shown'), [(20, 20), (21, 0)])
def test_names_of_lines_are_shown_if_they_are_few(count, shown, tmp_path):
  params = {f'w{i:02}': kernel() for i in range(count)}
  step = {'opt_state': watched(*[{}] * count)}
  page = page_of(record_of(step, step, params=params), tmp_path)
  assert len([name for name in page.drawn() if name[:1] == 'w']) == shown


def test_a_long_record_of_a_deep_network_stays_small(tmp_path):
  names = [f'backbone/block_{i}/Dense_0/with_a_long_name' for i in range(300)]
  params = {name: kernel() for name in sorted(names)}
  record = flow.Record(params, capacity=2000)
  rng = np.random.default_rng(0)
  step = tapped(*[1.0] * 300, names=names, histogram=ONES)
  add(record, 0, **step, opt_state=watched(*[{}] * 300), loss=1.0)
  (one,) = record._steps
  for i in range(1, 600):  # taps take long
    numbers = [
      u * rng.uniform(0.1, 1, u.shape).astype('f')
      for u in (one.tapped, one.watched)
    ]
    numbers[0][5, 4] *= np.nan if i == 777 else 1
    step = one._replace(number=i, tapped=numbers[0], watched=numbers[1])
    record._append(record._steps, step._replace(scalars={'loss': 1.0 / i}))
  page = page_of(record, tmp_path)
  assert (tmp_path / 'flow.html').stat().st_size < 2e6
  assert names[0][-40:] in page.drawn()


def test_it_needs_a_record_with_a_step(tmp_path):
  path = tmp_path / 'x.html'
  with pytest.raises(ValueError, match='no record'):
    flow.write_page(path, {})
  with pytest.raises(ValueError, match='nothing is recorded.$'):
    flow.write_page(path, flow.Record())
  with pytest.raises(ValueError, match='nothing is recorded in b'):
    flow.write_page(path, {'a': record_of({}), 'b': flow.Record()})
  assert not path.exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(ImportError, match=r"pip install 'optax_ghm\[plot\]'"):
    flow.write_page(tmp_path / 'x.html', full_record())
  assert not (tmp_path / 'x.html').exists()


def test_it_follows_a_light_and_a_dark_theme(drawn):
  style = Page(drawn).text('style')
  light, dark = style.split('@media (prefers-color-scheme: dark)')
  assert 'color-scheme: light dark' in light

  def colors(rules):
    return dict(re.findall(r'(--\w+): (#\w+)', rules.split('}')[0]))

  light, dark = colors(light), colors(dark)
  assert light.keys() == dark.keys() and len(light) >= 5
  for name in light:
    assert light[name] != dark[name]

  def luminance(color):
    color = color.lstrip('#')
    size = len(color) // 3
    parts = [color[i * size : (i + 1) * size] * (3 - size) for i in range(3)]
    linear = [(int(part, 16) / 255) ** 2.2 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

  for theme in (light, dark):
    for name in ('--text', '--dim', '--bad'):
      pair = sorted([luminance(theme[name]), luminance(theme['--back'])])
      assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5, name


# A browser.

BROWSERS = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
BROWSER = next(filter(None, BROWSERS), None)
OFFLINE = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
  --disable-background-networking --disable-component-update --disable-sync
  --enable-logging=stderr --dump-dom"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='there is no Chromium here.')
def test_a_browser_opens_it_from_disk_without_complaint(tmp_path):
  path = tmp_path / 'flow page é.html'
  records = {'a': full_record(), HOSTILE: full_record()}
  flow.write_page(path, records, HOSTILE)
  profile = f'--user-data-dir={tmp_path / "profile"}'
  done = subprocess.run(
    [BROWSER, *OFFLINE.split(), profile, path.as_uri()],
    check=True,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert 'CONSOLE' not in done.stderr
  assert (
    done.stdout.count('<svg')
    == len(Page(path.read_text('utf-8')).all('svg'))
    > 6
  )
