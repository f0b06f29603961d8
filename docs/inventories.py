"""Inventories of other projects' sites, of the names that this site refers to.

``inventories/*.txt`` have the address of a site, then a line for each name: its
role, itself, and its page. Sphinx wants them compressed (``objects.inv``).
"""

import pathlib
import zlib

HERE = pathlib.Path(__file__).parent / 'inventories'


def mapping(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
  """Writes the inventories, and says where they are and what they are of."""
  folder.mkdir(parents=True, exist_ok=True)
  found = {}
  for path in sorted(HERE.glob('*.txt')):
    address, *lines = path.read_text().splitlines()
    entries = ''
    for role, name, page in map(str.split, filter(None, lines)):
      entries += f'{name} {role} 1 {page} -\n'
    header = '# Sphinx inventory version 2\n'
    header += f'# Project: {path.stem}\n# Version: \n'
    header += '# The remainder of this file is compressed using zlib.\n'
    written = folder / f'{path.stem}.inv'
    written.write_bytes(header.encode() + zlib.compress(entries.encode()))
    found[path.stem] = address, str(written)
  return found
