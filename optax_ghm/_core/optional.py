"""Packages that only some functions need."""

import importlib
from typing import Any

PLOT_EXTRA = 'optax_ghm[plot]'


def load(module: str, install: str) -> Any:
  """Imports a module, or says how to install it.

  Args:
    module: name of the module.
    install: arguments of ``pip install``.

  Returns:
    The module.

  Raises:
    ImportError: if its package is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition('.')[0]
    raise ImportError(
      f"{package} is not installed: pip install '{install}'"
    ) from error
