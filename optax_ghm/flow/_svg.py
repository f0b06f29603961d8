"""Charts as SVG text: what the HTML page is made of."""

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 640, 300


LEFT, RIGHT, TOP, BOTTOM = 130, 16, 12, 40


BAD, NOTHING = (255, 43, 128), (128, 128, 128)
"""Colors of what is not finite, and of no gradient at all."""


# Dark to bright in even steps of lightness, as matplotlib's viridis.
_RAMP = np.array(
  [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)],
  float,
)


# Of one lightness: lines stand out on a light and on a dark page.
_LINES = np.array([(48, 120, 214), (176, 92, 170), (222, 124, 36)], float)


def line_chart(
  lines: dict[str, tuple[np.ndarray, np.ndarray]],
  *,
  x_label: str,
  y_label: str,
  guide: float | None = None,
) -> str:
  """Lines over a common axis; y in powers of ten if ``y_label`` says log10.

  Args:
    lines: by name, x and y. Where y is not finite, a mark stands at the top
      (NaN, inf) or the bottom (-inf).
    x_label: below.
    y_label: above.
    guide: where to draw a dashed line across.

  Returns:
    The element.
  """
  lines = {name: (x, _in_range(y)) for name, (x, y) in lines.items()}
  ys = np.concatenate([y for _, y in lines.values()])
  xs = np.concatenate([x for x, _ in lines.values()])
  finite = ys[np.isfinite(ys)]
  if guide is not None:
    finite = np.append(finite, guide)
  low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
  margin = max(0.05 * (high - low), 1e-3 * max(abs(low), abs(high), 1e-30))
  low, high = low - margin, high + margin
  first, last = float(xs.min()), float(xs.max())
  left = 56

  def at_x(x):
    return left + (WIDTH - left - RIGHT) * (x - first) / max(last - first, 1e-9)

  def at_y(y):
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

  parts = [
    f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{at_y(t):.1f}"'
    f' y2="{at_y(t):.1f}"/>'
    f'<text x="{left - 6}" y="{at_y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
    for t in ticks(low, high)
  ]
  parts += [
    f'<text x="{at_x(t):.1f}" y="{HEIGHT - BOTTOM + 16}"'
    f' text-anchor="middle">{t:g}</text>'
    for t in ticks(first, last)
  ]
  if guide is not None:
    parts.append(
      f'<line class="guide" x1="{left}" x2="{WIDTH - RIGHT}"'
      f' y1="{at_y(guide):.1f}" y2="{at_y(guide):.1f}"/>'
    )
  for i, (name, (x, y)) in enumerate(lines.items()):
    color = _hex(_color(i / max(len(lines) - 1, 1), _LINES))
    pieces, pen = [], 'M'
    marks = []
    for u, v in zip(x, y, strict=True):
      if np.isfinite(v):
        pieces.append(f'{pen}{at_x(u):.1f} {at_y(v):.1f}')
        pen = 'L'
      else:
        pen = 'M'
        top = TOP if not v == -np.inf else HEIGHT - BOTTOM
        marks.append(
          f'<circle cx="{at_x(u):.1f}" cy="{top}" r="4"'
          f' fill="{_hex(BAD)}"><title>{v}</title></circle>'
        )
    parts.append(
      f'<path class="line" d="{"".join(pieces)}" stroke="{color}">'
      f'<title>{html.escape(name)}</title></path>' + ''.join(marks)
    )
  parts.append(_labels(x_label, y_label, left))
  keys = ''
  if 1 < len(lines) <= 16:
    keys = ''.join(
      '<span><i style="background:'
      f'{_hex(_color(i / (len(lines) - 1), _LINES))}"></i>'
      f'{html.escape(name)}</span>'
      for i, name in enumerate(lines)
    )
  return (
    _figure(''.join(parts), HEIGHT, y_label) + f'<p class="keys">{keys}</p>'
  )


def heat_map(
  values: np.ndarray,
  *,
  rows: Sequence[str],
  columns: Sequence[str],
  label: str,
  nothing: np.ndarray | None = None,
) -> str:
  """Colored cells, the first row on top.

  Args:
    values: (rows, columns); what is not finite has a color of its own.
    rows: their names.
    columns: their names.
    label: of the values, above.
    nothing: (rows, columns), which cells have no value at all.

  Returns:
    The element, with the values in it for whoever points at a cell.
  """
  values = _in_range(values)
  finite = np.isfinite(values)
  nothing = np.zeros(values.shape, bool) if nothing is None else nothing
  shown = values[finite & ~nothing]
  low, high = (shown.min(), shown.max()) if len(shown) else (0.0, 1.0)
  scaled = np.where(finite, values - low, 0) / max(high - low, 1e-9)
  pixels = _color(np.clip(scaled, 0, 1))
  pixels[~finite] = BAD
  pixels[nothing] = NOTHING
  height = float(np.clip(14 * len(rows), 120, 560))
  width = WIDTH - LEFT - RIGHT
  parts = [
    f'<image x="{LEFT}" y="{TOP}" width="{width}" height="{height:.0f}"'
    f' preserveAspectRatio="none" href="{_png(pixels)}"/>'
  ]
  step = math.ceil(len(rows) * 13 / height)
  parts += [
    f'<text x="{LEFT - 6}" y="{TOP + height * (i + 0.5) / len(rows) + 4:.1f}"'
    f' text-anchor="end">{html.escape(_short(rows[i]))}</text>'
    for i in range(0, len(rows), step)
  ]
  step = max(math.ceil(len(columns) / 8), 1)
  parts += [
    f'<text x="{LEFT + width * (i + 0.5) / len(columns):.1f}"'
    f' y="{TOP + height + 16:.0f}" text-anchor="middle">'
    f'{html.escape(columns[i])}</text>'
    for i in range(0, len(columns), step)
  ]
  texts = [
    ['–' if nothing[i, j] else f'{v:.3g}' for j, v in enumerate(row)]
    for i, row in enumerate(values)
  ]
  data = html.escape(
    '\n'.join(
      ['\t'.join(['', *columns])]
      + [
        '\t'.join([' '.join(name.split()), *row])
        for name, row in zip(rows, texts, strict=True)
      ]
    )
  )
  figure = _figure(
    ''.join(parts),
    height + TOP + BOTTOM,
    label,
    f' data-cells="{data}" data-box="{LEFT} {TOP} {width} {height:.0f}"',
  )
  scale = ''.join(
    f'<i style="background:{_hex(_color(t))}"></i>'
    for t in (0, 0.25, 0.5, 0.75, 1)
  )
  return (
    f'{figure}<p class="keys"><span>{html.escape(label)}: {low:.3g} {scale}'
    f' {high:.3g}</span>'
    f'<span><i style="background:{_hex(BAD)}"></i>not finite</span>'
    f'<span><i style="background:{_hex(NOTHING)}"></i>no gradient</span>'
    f'<output></output></p>'
  )


def ticks(low: float, high: float) -> list[float]:
  """About five round numbers between two."""
  span = high - low
  if not span > 0:
    return [low]
  step = 10.0 ** math.floor(math.log10(span / 5))
  step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
  first = math.ceil(low / step)
  return [
    round(k * step, 12) for k in range(first, math.floor(high / step) + 1)
  ]


def _in_range(values):
  """In float64, where the finite ones can be subtracted from one another."""
  values = np.asarray(values, np.float64)
  return np.where(np.isfinite(values), np.clip(values, -1e300, 1e300), values)


def _figure(content, height, label, attributes=''):
  return (
    '<div class="chart"><svg role="img" viewBox="0 0'
    f' {WIDTH} {height:.0f}" aria-label="{html.escape(label)}"{attributes}>'
    f'{content}</svg></div>'
  )


def _labels(x_label, y_label, left):
  return (
    f'<text x="{(left + WIDTH) / 2:.0f}" y="{HEIGHT - 6}"'
    f' text-anchor="middle">{html.escape(x_label)}</text>'
    f'<text x="{left}" y="10">{html.escape(y_label)}</text>'
  )


def _color(t, ramp=_RAMP):
  """The ramp at t in [0, 1]: (…, 3) integers."""
  t = np.asarray(t) * (len(ramp) - 1)
  i = np.minimum(t.astype(int), len(ramp) - 2)
  part = (t - i)[..., None]
  return np.rint(ramp[i] * (1 - part) + ramp[i + 1] * part).astype(np.uint8)


def _hex(color):
  return '#{:02x}{:02x}{:02x}'.format(*(int(c) for c in color))


def _short(name, most=19):
  return name if len(name) <= most else '…' + name[1 - most :]


def _png(pixels):
  """A PNG of 8-bit RGB pixels, one per cell, as a data URI."""

  def chunk(kind, data):
    body = kind + data
    return (
      struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))
    )

  rows = b''.join(b'\0' + row.tobytes() for row in pixels.astype(np.uint8))
  header = struct.pack(
    '>IIBBBBB', pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0
  )
  data = (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(rows, 9))
    + chunk(b'IEND', b'')
  )
  return 'data:image/png;base64,' + base64.b64encode(data).decode()
