"""Numbers from mmdetection 3.3.0's ghm_loss.py (torch 2.13.0, CPU, float32).

``ghm.npz`` holds ``<case>/<field>``; the leading axis of ``pred``, ``target``,
``label_weight``, ``loss``, ``grad`` and ``acc_sum`` is the step, the same loss
object being called several times in a row.
"""

import pathlib

import numpy as np

from optax_ghm import harmonization

_FILE = np.load(pathlib.Path(__file__).parent / 'ghm.npz')
CASES = sorted({name.split('/')[0] for name in _FILE})


def load(case):
  return {
    name.split('/')[1]: _FILE[name]
    for name in _FILE
    if name.startswith(case + '/')
  }


def density(data):
  return harmonization.MMDetectionDensity(
    bins=int(data['bins']), momentum=float(data['momentum'])
  )
