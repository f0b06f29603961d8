"""Checkpoints of a calibrator, which Orbax reads."""

import subprocess
import sys

REFUSED = """
import pathlib, sys
import jax, numpy as np, optax, orbax.checkpoint as ocp
import optax_ghm

path, params = pathlib.Path(sys.argv[1]), {'w': np.ones(3, 'f')}
init = lambda tx: jax.jit(tx.init)(params)
window = optax_ghm.WindowPercentile(length=8)
written = init(optax_ghm.clip_by_percentile(estimator=window))
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(path, written)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(path, written)
  print(type(restored) is type(written))
  for other in (
    optax_ghm.clip_by_zscore(),
    optax_ghm.clip_by_percentile(estimator=window, scope='leaf'),
    optax_ghm.clip_by_percentile(),
    optax.chain(optax_ghm.clip_by_percentile(estimator=window)),
  ):
    try:
      checkpointer.restore(path, init(other))
      print('read')
    except (ValueError, KeyError):
      print('refused')
  largest = max(path.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-20])
  try:
    checkpointer.restore(path, written)
    print('read')
  except Exception:
    print('refused')
"""


def test_a_checkpoint_of_another_structure_or_truncated_is_refused(tmp_path):
  """It runs in a process of its own, because Orbax leaves work behind."""
  done = subprocess.run(
    [sys.executable, '-c', REFUSED, tmp_path / 'state'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ['True'] + 5 * ['refused']
