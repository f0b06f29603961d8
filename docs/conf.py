"""How Sphinx builds the site: ``make docs``, where a warning is an error."""

import importlib
import inspect
import re

import chex
import jax
import jax.typing
import optax
from flax import nnx
from sphinx.util import inspect as sphinx_inspect, logging
from sphinx.util.typing import stringify_annotation

import optax_ghm

PUBLIC = ('optax_ghm', 'optax_ghm.flow', 'optax_ghm.linen', 'optax_ghm.nnx')

project = 'optax_ghm'
release = version = optax_ghm.__version__
copyright = 'the authors of optax_ghm, Apache-2.0'
html_title = f'optax_ghm {release}'
html_theme = 'furo'
html_copy_source = False
exclude_patterns = ['_build']

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.mathjax',
]
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
add_module_names = False
python_maximum_signature_line_length = 68

# No other project's inventory is at hand: their types are named, not linked.
nitpick_ignore_regex = [
  (r'py:class', r'(collections|os|typing)\..*|(jax|numpy|optax|chex|flax)\..*'),
  (r'py:class', r'ArrayTree|Figure|Console|Rngs|dataclasses\.InitVar'),
  # The type of a GradientTransformationExtraArgs, which the prose names.
  (r'py:class', r'optax_ghm\.stateful\.StatefulTransformation'),
]


def public_names():
  """Every public name, and what it stands for."""
  for module in map(importlib.import_module, PUBLIC):
    for name in module.__all__:
      yield f'{module.__name__}.{name}', getattr(module, name)


# A class is shown, and linked to, where it is public, not where it is written.
for name, value in public_names():
  if inspect.isclass(value) and value.__module__.startswith('optax_ghm'):
    value.__module__ = name.rpartition('.')[0]

PROTOCOLS = (
  optax_ghm.harmonization.DensityEstimator,
  optax_ghm.calibration.PercentileEstimator,
)
ALIASES = {
  stringify_annotation(value, 'smart'): name
  for name, value in (
    ('optax.ScalarOrSchedule', optax.ScalarOrSchedule),
    ('optax.Schedule', optax.Schedule),
    ('chex.ArrayTree', chex.ArrayTree),
    ('jax.typing.ArrayLike', jax.typing.ArrayLike),
    ('jax.Array', jax.Array),
  )
} | {
  '_windowed.DEFAULT': 'WindowedDensity()',
  'DEFAULT_PERCENTILE': 'WindowPercentile()',
  'DEFAULT_WINDOW': 'SpikeWindow()',
  'FLAX_UNITS': 'Units()',
}


def shorten(app, kind, name, value, options, signature, returned):
  """Signatures as the source has them: aliases, and no addresses."""
  if inspect.isclass(value):
    if issubclass(value, tuple | nnx.Variable) or value in PROTOCOLS:
      return '', None  # nobody calls these
    if issubclass(value, nnx.Module):  # whose metaclass hides it
      signature = sphinx_inspect.stringify_signature(
        sphinx_inspect.signature(value.__init__, bound_method=True),
        unqualified_typehints=True,
      )

  def short(text):
    for long, alias in ALIASES.items():
      text = text.replace(long, alias)
    text = re.sub(r"<(?:function|class) '?([\w.]+)'?>", r'\1', text)
    text = re.sub(r', parent: .*name: str \| None = None\)', ')', text)
    text = re.sub(r'\b_\w+\.', '', text)  # modules, privately imported
    return text.replace('optax._src.base.', 'optax.')

  return tuple(text and short(text) for text in (signature, returned))


def skip_fields(app, kind, name, value, skip, options):
  """The fields of a named tuple are in its docstring."""
  return skip or type(value).__name__ == '_tuplegetter'


def check_that_all_is_there(app, env):
  """A public name that the reference leaves out is a warning, so an error."""
  documented = env.get_domain('py').objects
  for name, _ in public_names():
    if name not in documented:
      logging.getLogger(__name__).warning('%s is not in docs/api.', name)


def setup(app):
  """Connects what is above to the build."""
  app.connect('autodoc-process-signature', shorten)
  app.connect('autodoc-skip-member', skip_fields)
  app.connect('env-check-consistency', check_that_all_is_there)
