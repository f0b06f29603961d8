"""One training step on one device, and on two processes that do not survive."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
CACHED = {  # what is restarted need not compile again
  'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}
EXAMPLE = ROOT / 'examples' / 'data_parallel.py'


def run(folder, *arguments):
  output = subprocess.run(
    [sys.executable, EXAMPLE, f'--folder={folder}', '--steps=8', *arguments],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | CACHED,
  ).stdout
  return json.loads((folder / 'result.json').read_text()), output


@pytest.mark.slow
def test_two_processes_with_a_crash_do_what_one_device_does(tmp_path):
  """Eight devices in a mesh of 4 x 2, restarted from a checkpoint."""
  alone, _ = run(tmp_path / 'alone')
  together, output = run(
    tmp_path / 'together',
    '--processes=2',
    '--devices=4',
    '--model=2',
    '--crash=6',
    f'--against={tmp_path / "alone"}',
  )
  assert 'process 1 was killed at step 6' in output
  assert (alone['first'], together['first']) == (0, 5)
  assert (alone['mesh'], together['mesh']) == ([1, 1], [4, 2])
  np.testing.assert_allclose(together['losses'], alone['losses'][5:], rtol=1e-5)
  # Sums in another order, and Adam after that: of all states and statistics.
  difference = float(output.split('difference: ')[1].split(' at')[0])
  assert difference < 1e-3
  assert len(together['numbers']) > 50
  # Nothing is sent but what training sends anyway, and statistics.
  assert alone['collectives'] == []
  largest = max(size for _, size, _ in together['collectives'])
  plain = max(size for _, size, _ in together['plain collectives'])
  assert largest <= plain + 1024
