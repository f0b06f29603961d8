"""Every public name, under the path by which the documentation calls it."""

import importlib

MODULES = (
  'optax_ghm',
  'optax_ghm.flow',
  'optax_ghm.linen',
  'optax_ghm.nnx',
  'optax_ghm.backward',
  'optax_ghm.batch_normalization',
  'optax_ghm.calibration',
  'optax_ghm.conflict',
  'optax_ghm.harmonization',
  'optax_ghm.reversal',
)


def public_names():
  """From paths to values; a value that two modules export is there once."""
  found, seen = {}, []
  for path in MODULES:
    module = importlib.import_module(path)
    for name in module.__all__:
      value = getattr(module, name)
      if not any(value is other for other in seen):
        found[f'{path}.{name}'] = value
        seen.append(value)
  return found
