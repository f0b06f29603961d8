"""The HTML page: complete, closed in itself, and safe."""

import base64
import html.parser
import re
import shutil
import struct
import subprocess
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from optax_ghm import flow
from optax_ghm.flow import _svg as svg
from tests.support.hand_made import taps, watched

HOSTILE = '<script>alert(1)</script>"\'&\t</svg>\n-->'
VOID = {'meta', 'br', 'link', 'img', 'hr', 'input'}
HEAD = ('html', 'head', 'title')
# What stands closed in itself in SVG.
CLOSED = {'line', 'image', 'circle', 'path', 'rect'}


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

  def tables(self):
    """The cells behind every heat map, as its script reads them."""
    return [
      [row.split('\t') for row in attrs['data-cells'].split('\n')]
      for attrs in self.all('svg')
      if 'data-cells' in attrs
    ]


def page_of(records, tmp_path, **kwargs):
  path = tmp_path / 'flow.html'
  flow.write_page(path, records, **kwargs)
  text = path.read_text(encoding='utf-8')
  page = Page(text)
  assert text.startswith('<!doctype html>')
  check_it_is_closed(page, text)
  return page


def check_it_is_closed(page, text):
  """Nothing on it asks for anything elsewhere."""
  for _, attrs in page.elements:
    for name, value in attrs.items():
      assert not name.startswith('on'), name
      if name in ('src', 'href', 'xlink:href', 'action', 'data', 'srcset'):
        assert value.startswith('data:image/png;base64,')
  assert not page.all('link') and not page.all('iframe')
  (style,) = [data for tags, data in page.texts if 'style' in tags]
  assert '@import' not in style and 'url(' not in style
  assert len(page.all('script')) == 1 and page.all('script') == [{}]
  assert not re.search(r'(src|href|action)\s*=\s*["\']?\s*(https?:)?//', text)
  (policy,) = [
    attrs['content'] for attrs in page.all('meta') if 'http-equiv' in attrs
  ]
  assert "default-src 'none'" in policy


def pixels_of(uri):
  """The (rows, columns, 3) of an image."""
  data = base64.b64decode(uri.removeprefix('data:image/png;base64,'))
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  chunks, at = {}, 8
  while at < len(data):
    (size,) = struct.unpack('>I', data[at : at + 4])
    kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
    (crc,) = struct.unpack('>I', data[at + 8 + size : at + 12 + size])
    assert crc == zlib.crc32(kind + body)
    chunks[kind] = body
    at += 12 + size
  width, height, depth, color = struct.unpack('>IIBB', chunks[b'IHDR'][:10])
  assert (depth, color) == (8, 2) and b'IEND' in chunks
  rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8)
  rows = rows.reshape(height, 1 + 3 * width)
  assert not rows[:, 0].any()  # no filter
  return rows[:, 1:].reshape(height, width, 3)


PARAMS = {'one': {'bias': jnp.ones(2), 'kernel': jnp.ones((2, 2))}}


def full_record(steps=5):
  record = flow.Record(PARAMS)
  for i in range(steps):
    record.add(
      10 * i,
      taps=taps(
        [10.0**i, None, np.nan if i == 2 else 1.0, 5.0],
        ['first', 'cut off', 'third', ''],
        histogram=jnp.maximum(jnp.arange(64.0) - 40, 0),
      ),
      opt_state=watched({}, {'update_norm': 1e-3 * (i + 1)}),
      loss=1.0 / (i + 1),
    )
  return record


def test_it_shows_the_verdicts_and_every_picture(tmp_path):
  record = full_record()
  page = page_of(record, tmp_path, title='My run')
  text = page.text()
  assert page.title() == page.text('h1') == 'My run'
  verdicts = flow.diagnose(record)
  assert {v.kind for v in verdicts} >= {'not finite', 'disconnected'}
  for verdict in verdicts:
    assert f'{verdict.kind} since step {verdict.since}' in text
    for part in (verdict.evidence, verdict.suggestion, verdict.source):
      assert part in text
  assert 'Nothing is wrong' not in text
  assert '5 recorded steps, 0 to 40' in text
  for heading in (
    'Loss',
    'Gradient norm at the layers, from the input (top) to the loss',
    'Over depth',
    'Magnitudes at first',
    'Update norm over parameter norm',
  ):
    assert heading in [data for tags, data in page.texts if 'h3' in tags]
  assert len(page.all('svg')) >= 5
  lines = [data for tags, data in page.texts if tags[-2:] == ('path', 'title')]
  assert lines == ['loss', 'step 0', 'step 20', 'step 40', 'one/kernel']
  assert len(page.all('output')) == len(page.tables())


def test_where_nothing_is_wrong_it_says_so(tmp_path):
  record = flow.Record()
  record.add(0, taps=taps([1.0]))
  text = page_of(record, tmp_path).text()
  assert 'Nothing is wrong by 1 recorded steps (1 steps with taps).' in text


def test_the_cells_are_the_norms_and_their_colors_tell_what_is_wrong(tmp_path):
  page = page_of(full_record(), tmp_path)
  table = page.tables()[0]
  assert table == [
    ['', '0', '10', '20', '30', '40'],
    ['first', '0', '1', '2', '3', '4'],
    ['cut off', *['–'] * 5],
    ['third', '0', '0', 'nan', '0', '0'],
    ['(the model)', *['0.699'] * 5],
  ]
  pixels = pixels_of(page.all('image')[0]['href'])
  assert pixels.shape == (4, 5, 3)
  assert (pixels[1] == svg.NOTHING).all()
  bad = (pixels == svg.BAD).all(-1)
  assert np.argwhere(bad).tolist() == [[2, 2]]
  brightness = pixels[0].astype(int).sum(-1)
  assert (np.diff(brightness) > 0).all()
  assert pixels[0, 0].tolist() == [68, 1, 84]  # the least: the dark end
  assert pixels[0, 4].tolist() == [253, 231, 37]
  assert (pixels[3] == pixels[3, 0]).all()
  keys = page.text('p')
  assert 'not finite' in keys and 'no gradient' in keys
  assert '{:02x}{:02x}{:02x}'.format(*svg.BAD) in str(page.all('i'))


def test_cells_of_magnitudes_are_shares_of_the_numbers(tmp_path):
  counts = np.zeros(64, np.float32)
  counts[[48, 49]] = [3, 1]
  record = flow.Record()
  for i in range(2):
    record.add(i, taps=taps([1.0], ['x'], histogram=jnp.asarray(counts)))
  _, table = page_of(record, tmp_path).tables()
  assert table == [
    ['', '0', '1'],
    ['4e+00 and up', '0.25', '0.25'],
    ['1e+00 and up', '0.75', '0.75'],
  ]


def test_magnitudes_are_shown_of_the_first_a_middle_and_the_last_layer(
  tmp_path,
):
  record = flow.Record()
  record.add(
    0,
    taps=taps(
      [1.0] * 6,
      list('abcdef'),
      [False, True, True, True, True, False],
      histogram=jnp.ones(64),
    ),
  )
  page = page_of(record, tmp_path)
  headings = [data for tags, data in page.texts if 'h3' in tags]
  assert [h for h in headings if 'Magnitudes' in h] == [
    'Magnitudes at b',
    'Magnitudes at d',
    'Magnitudes at e',
  ]


def test_the_lines_go_through_their_values(tmp_path):
  """By the axis that is drawn beside them."""
  record = flow.Record()
  values = [0.0, 4.0, 2.0, 1.0]
  for i, loss in enumerate(values):
    record.add(i, loss=loss)
  page = page_of(record, tmp_path)
  (path,) = page.all('path')
  points = np.array(re.findall(r'[ML]([\d.]+) ([\d.]+)', path['d']), float)
  assert path['d'].count('M') == 1 and len(points) == 4
  x, y = points.T
  np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.2)
  slope = (y[1] - y[0]) / 4.0
  assert slope < 0  # up is more
  np.testing.assert_allclose(y, y[0] + slope * np.array(values), atol=0.2)
  grid = [attrs for attrs in page.all('line') if attrs['class'] == 'grid']
  labels = [
    float(data)
    for tags, data in page.texts
    if tags[-1:] == ('text',) and re.fullmatch(r'-?[\d.]+', data)
  ][: len(grid)]
  np.testing.assert_allclose(
    [float(attrs['y1']) for attrs in grid],
    y[0] + slope * np.array(labels),
    atol=0.2,
  )
  assert len(grid) >= 4


def test_the_usual_ratio_is_a_dashed_line(tmp_path):
  record = flow.Record(PARAMS)
  for i in range(3):
    record.add(i, opt_state=watched({}, {'update_norm': 1e-3}))
  page = page_of(record, tmp_path)
  (guide,) = [a for a in page.all('line') if a['class'] == 'guide']
  (path,) = page.all('path')
  for y in re.findall(r'[ML][\d.]+ ([\d.]+)', path['d']):
    assert abs(float(y) - float(guide['y1'])) < 0.2
  assert 'dasharray' in page.text('style')


def test_a_line_breaks_where_it_is_not_finite_and_a_mark_stands_there(tmp_path):
  record = flow.Record()
  for i, loss in enumerate([1.0, 2.0, np.nan, 3.0, np.inf, -np.inf, 1.0]):
    record.add(i, loss=loss)
  page = page_of(record, tmp_path)
  (path,) = page.all('path')
  assert re.sub(r'[\d. ]', '', path['d']) == 'MLMM'
  nan, inf, minus = page.all('circle')
  assert nan['cy'] == inf['cy'] and float(minus['cy']) > float(nan['cy'])
  assert {c['fill'] for c in (nan, inf, minus)} == {'#ff2b80'}
  assert 'nan' in page.text('circle') and '-inf' in page.text('circle')


def test_a_loss_at_some_steps_is_drawn_at_these(tmp_path):
  record = flow.Record()
  for i in range(6):
    record.add(i, **({'loss': float(i)} if i % 2 else {}))
  page = page_of(record, tmp_path)
  (path,) = page.all('path')
  assert re.sub(r'[\d. ]', '', path['d']) == 'MLL'
  assert not page.all('circle')


def test_names_of_lines_stand_below_if_they_are_few(tmp_path):
  for count, shown in ((1, 0), (2, 2), (16, 16), (17, 0)):
    params = {f'w{i:02}': jnp.ones((2, 2)) for i in range(count)}
    record = flow.Record(params)
    for i in range(2):
      record.add(i, opt_state=watched(*[{}] * count))
    page = page_of(record, tmp_path)
    keys = [data for tags, data in page.texts if 'span' in tags]
    assert len([k for k in keys if k.startswith('w')]) == shown
    assert len(page.all('path')) == count


def test_several_records_have_a_section_each(tmp_path):
  healthy = flow.Record()
  healthy.add(0, taps=taps([1.0]))
  page = page_of({'good': healthy, HOSTILE: full_record()}, tmp_path)
  assert page.text('h2') == f'good{HOSTILE}'
  assert len(page.all('section')) == 2
  alone = page_of(healthy, tmp_path)
  assert not alone.all('h2') and len(alone.all('section')) == 1


# Names that would like to be something else.


def hostile_record():
  record = flow.Record(
    {
      HOSTILE: {'kernel': jnp.ones((2, 2))},
      'b': {HOSTILE: {'kernel': jnp.ones((2, 2))}},
    }
  )
  for i in range(12):
    record.add(
      i,
      taps=taps(
        [np.nan, None, 0.0, 1.0],
        [HOSTILE, f'{HOSTILE}2', 'x\ty\nz', 'a"b'],
        histogram=jnp.ones(64),
      ),
      opt_state=watched({'update_norm': 1e-9}, {'dead_units': 9}),
      loss=1.0,
      **{HOSTILE: np.nan},
    )
  return record


def test_hostile_names_are_text_everywhere(tmp_path):
  page = page_of({HOSTILE: hostile_record()}, tmp_path, title=HOSTILE)
  assert page.title() == page.text('h1') == page.text('h2')
  assert page.text('h1').split() == HOSTILE.split()
  assert len(page.all('script')) == 1
  assert 'alert' not in page.text('script')
  assert page.text('section').count('alert(1)') > 8  # in many places


def test_tabs_and_newlines_of_names_do_not_shift_the_cells(tmp_path):
  for table in page_of(hostile_record(), tmp_path).tables():
    assert len({len(row) for row in table}) == 1
  layers = page_of(hostile_record(), tmp_path).tables()[0]
  assert len(layers) == 1 + 4
  assert [row[0][:7] for row in layers[1:3]] == ['<script'] * 2
  assert layers[4] == ['a"b', *['0'] * 12]


# Any record.


def _of(*steps, params=None):
  record = flow.Record(params)
  for i, step in enumerate(steps):
    record.add(i, **step)
  return record


RECORDS = {
  'one step': lambda: full_record(1),
  'one layer': lambda: _of(*[{'taps': taps([1.0])}] * 3),
  'taps only': lambda: _of(*[{'taps': taps([1.0] * 6)}] * 3),
  'watch only': lambda: _of(
    *[{'opt_state': watched({}, {})}] * 3, params=PARAMS
  ),
  'a loss only': lambda: _of({'loss': 1.0}, {'loss': 2.0}),
  'a loss at one step': lambda: _of({'loss': 1.0}, {}, {}),
  'nothing at all': lambda: _of({}),
  'no kernels': lambda: _of(
    *[
      {
        'taps': taps([1.0, 2.0], kernels=[False] * 2, histogram=jnp.ones(64)),
        'opt_state': watched({}),
      }
    ]
    * 2,
    params={'bias': jnp.ones(2)},
  ),
  'no gradient': lambda: _of(
    *[{'taps': taps([None, 0.0], histogram=jnp.zeros(64))}] * 2
  ),
  'nothing finite': lambda: _of(
    *[
      {
        'taps': taps([np.nan, np.inf]),
        'opt_state': watched({}, {'update_norm': np.nan}),
        'loss': np.nan,
      }
    ]
    * 2,
    params=PARAMS,
  ),
  'tiny and huge': lambda: _of(
    *[{'taps': taps([1e-38, 1e38]), 'loss': x} for x in (3e38, -3e38)]
  ),
  'ratios of 0 and inf': lambda: _of(
    *[
      {'opt_state': watched({}, {'update_norm': 0.0, 'parameter_norm': i})}
      for i in range(3)
    ],
    params=PARAMS,
  ),
  'histograms at some steps': lambda: _of(
    {'taps': taps([1.0])}, {'taps': taps([1.0], histogram=jnp.ones(64))}
  ),
  'taps at some steps': lambda: _of(
    {'loss': 1.0},
    {'taps': taps([1.0, 2.0])},
    {'opt_state': watched({}, {})},
    params=PARAMS,
  ),
  'constant': lambda: _of(*[{'taps': taps([1.0] * 3), 'loss': 0.0}] * 3),
}


@pytest.mark.parametrize('name', RECORDS)
def test_any_record_has_a_page(name, tmp_path):
  record = RECORDS[name]()
  page = page_of(record, tmp_path)
  for attrs in page.all('svg'):
    assert attrs['aria-label'] and attrs['viewbox']
  for tag, attrs in page.elements:
    for key in ('x', 'y', 'x1', 'x2', 'y1', 'y2', 'cx', 'cy'):
      if tag != 'svg' and key in attrs:
        assert np.isfinite(float(attrs[key])), (tag, attrs)
    assert 'nan' not in attrs.get('d', '') and 'inf' not in attrs.get('d', '')
  if len(record.layers) and not np.isnan(record.layer_stats['calls']).all():
    pixels = pixels_of(page.all('image')[0]['href'])
    norms = record.layer_stats['norm']
    norms = norms[~np.isnan(record.layer_stats['calls']).all(1)]
    bad = (pixels == svg.BAD).all(-1)
    np.testing.assert_array_equal(bad, ~np.isfinite(norms).T)
    nothing = (pixels == svg.NOTHING).all(-1)
    np.testing.assert_array_equal(nothing, (norms == 0).T)


def test_a_long_record_of_a_deep_network_stays_small(tmp_path):
  names = [f'backbone/block_{i}/Dense_0/with_a_long_name' for i in range(300)]
  record = flow.Record(
    {name: jnp.ones((2, 2)) for name in names}, capacity=2000
  )
  rng = np.random.default_rng(0)
  step = taps([1.0] * 300, names, histogram=jnp.ones(64))
  state = watched(*[{}] * 300)
  record.add(0, taps=step, opt_state=state, loss=1.0)
  one = record._steps[0] if record.steps.size else None
  for i in range(1, 2000):  # without the device: 2000 steps take long
    record._steps.append(
      one._replace(
        number=i,
        tapped=one.tapped * rng.uniform(0.1, 1, one.tapped.shape).astype('f4'),
        watched=one.watched
        * rng.uniform(0.1, 1, one.watched.shape).astype('f4'),
        scalars={'loss': np.float32(rng.uniform())},
      )
    )
  bad = record._steps[777].tapped.copy()
  bad[5, 4] = np.nan
  record._steps[777] = record._steps[777]._replace(tapped=bad)
  page = page_of(record, tmp_path)
  assert (tmp_path / 'flow.html').stat().st_size < 3e6
  table = page.tables()[0]
  assert len(table) == 301 and len(table[0]) == 121
  # Of the steps that share a column, the worst is shown.
  assert sum('nan' in row for row in table) == 1
  (column,) = [j for j, cell in enumerate(table[6]) if cell == 'nan']
  assert int(table[0][column - 1]) < 777 <= int(table[0][column])
  assert table[0][-1] == '1999'


def test_it_needs_a_record_with_a_step(tmp_path):
  path = tmp_path / 'x.html'
  with pytest.raises(ValueError, match='no record'):
    flow.write_page(path, {})
  with pytest.raises(ValueError, match='nothing is recorded.$'):
    flow.write_page(path, flow.Record())
  with pytest.raises(ValueError, match='nothing is recorded in b'):
    flow.write_page(path, {'a': full_record(), 'b': flow.Record()})
  assert not path.exists()


def test_it_follows_a_light_and_a_dark_theme(tmp_path):
  style = page_of(full_record(), tmp_path).text('style')
  light, dark = style.split('@media (prefers-color-scheme: dark)')
  assert 'color-scheme: light dark' in light

  def colors(rules):
    return dict(re.findall(r'(--\w+): (#\w+)', rules.split('}')[0]))

  light, dark = colors(light), colors(dark)
  assert light.keys() == dark.keys() and len(light) >= 6
  for name in light:
    assert light[name] != dark[name]

  def luminance(color):
    color = color.lstrip('#')
    size = len(color) // 3
    parts = [color[i * size : (i + 1) * size] * (3 - size) for i in range(3)]
    linear = [(int(part, 16) / 255) ** 2.2 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

  for theme in (light, dark):
    for name in ('--text', '--quiet', '--bad'):
      pair = sorted([luminance(theme[name]), luminance(theme['--back'])])
      assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5, name


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-0.2, 4.2, [0, 1, 2, 3, 4]),
    (0, 1999, [0, 500, 1000, 1500]),
    (-3.1, -2.9, [-3.1, -3.05, -3, -2.95, -2.9]),
    (5, 5, [5]),
  ],
)
def test_ticks_are_round_numbers_between(low, high, expected):
  assert svg.ticks(low, high) == pytest.approx(expected)


# A browser.

BROWSER = next(
  filter(
    None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
  ),
  None,
)

POINT = """
<script>
for (const svg of document.querySelectorAll('svg[data-cells]')) {
  const box = svg.getBoundingClientRect();
  const scale = box.width / svg.viewBox.baseVal.width;
  const [left, top, width, height] = svg.dataset.box.split(' ').map(Number);
  svg.dispatchEvent(new PointerEvent('pointermove', {
    clientX: box.left + (left + 0.5 * width) * scale,
    clientY: box.top + (top + 0.1 * height) * scale,
  }));
}
</script>
"""


def opened(path, tmp_path):
  """The DOM, and what the console says."""
  done = subprocess.run(
    [
      BROWSER,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      f'--user-data-dir={tmp_path / "profile"}',
      '--enable-logging=stderr',
      '--dump-dom',
      path.as_uri(),
    ],
    check=True,
    capture_output=True,
    text=True,
    timeout=120,
  )
  console = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
  return done.stdout, console


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='there is no Chromium here.')
def test_a_browser_opens_it_from_disk_without_complaint(tmp_path):
  path = tmp_path / 'flow page é.html'
  records = {'a': full_record(), HOSTILE: hostile_record()}
  flow.write_page(path, records, HOSTILE)
  text = path.read_text(encoding='utf-8')
  path.write_text(text.replace('</body>', f'{POINT}</body>'), encoding='utf-8')
  dom, console = opened(path, tmp_path)
  assert console == []
  page = Page(text)
  assert dom.count('<svg') == len(page.all('svg')) > 6
  # The script has answered the pointer.
  outputs = re.findall(r'<output>(.*?)</output>', dom)
  assert outputs[0] == 'first at 20: 2'
  assert len(outputs) == len(page.tables())
  assert all(outputs)
