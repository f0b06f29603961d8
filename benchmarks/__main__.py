"""What costs something against what one would use instead, in one table.

  python benchmarks [--quick] [--only NAME] [--save NAME]

The quick run is of a case or two per suite. All figures are ratios of programs
that ran in turn in one process (see harness.py); the columns are

  ms       median time of a call
  × first  of its time to that of the first program, median over rounds
  spread   the quartiles of that ratio
  × CPU    of the processors' time to that of the first
  × limit  of its time to what can be attained at best
  instr.   instructions of the compiled program, loops and branches as one
  temp     bytes of temporary memory per element of the data
  × mem    of the peak of memory to that of the first program
  compile  seconds to trace and compile

Written to benchmarks/results as NAME.json and NAME.png. PyTorch's programs take
part where PyTorch and TorchJD are installed.
"""

import importlib.util
import os

import attention
import backward
import batch_norm
import clipping
import conflict
import domains
import flow
import losses
import norms
import per_example
import run

SUITES = {
  'losses': losses.CASES,
  'per_example': per_example.CASES,
  'backward': backward.CASES,
  'domains': domains.CASES,
  'conflict': conflict.CASES,
  'clipping': clipping.CASES,
  'attention': attention.CASES,
  'norms': norms.CASES,
  'batch_norm': batch_norm.CASES,
  'flow': flow.CASES,
}
if all(map(importlib.util.find_spec, ('torch', 'torchjd'))):
  # or its threads wait actively, and slow what runs after them
  os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
  import torch_peers

  SUITES['torch'] = torch_peers.CASES

if __name__ == '__main__':
  run.main(SUITES, __doc__, 'latest')
