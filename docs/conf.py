"""How Sphinx builds the site: ``make docs``, where a warning is an error."""

import importlib.util
import inspect
import logging
import os
import pathlib
import re
import sys

import chex
import jax
import jax.typing
import optax
from docutils import nodes
from flax import nnx
from sphinx.ext import intersphinx
from sphinx.util import inspect as sphinx_inspect
from sphinx.util.logging import getLogger
from sphinx.util.typing import stringify_annotation

import optax_ghm

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import inventories  # noqa: E402

from tests.support.public import public_names  # noqa: E402

project = 'optax_ghm'
release = version = optax_ghm.__version__
copyright = 'the authors of optax_ghm, Apache-2.0'
html_title = f'optax_ghm {release}'
html_theme = 'furo'
html_copy_source = False
html_css_files = ['site.css']
pygments_dark_style = 'github-dark'
templates_path = ['templates']
exclude_patterns = ['_build', 'notebooks', 'templates']

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.intersphinx',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_design',
]
myst_enable_extensions = ['attrs_inline', 'colon_fence', 'dollarmath']
myst_heading_anchors = 3

# The guides run, each in a process of its own, on eight devices as the tests.
# What they run is this checkout, whose changes a cache would not notice.
nb_execution_mode = 'force'
nb_execution_in_temp = True  # where they write files
nb_execution_timeout = 120  # seconds, of a cell
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = 'warn'
logging.getLogger('traitlets').setLevel(logging.WARNING)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # compiles faster
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

# One file without fonts or parts to fetch: the site asks nothing of a network.
MATHJAX = importlib.util.find_spec('sphinx-mathjax-offline')
MATHJAX = MATHJAX.submodule_search_locations[0] + '/static/mathjax/tex-svg.js'
html_static_path = ['static', MATHJAX]
mathjax_path = 'tex-svg.js'

intersphinx_mapping = inventories.mapping(DOCS / '_build' / 'inventories')

napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
add_module_names = False
python_maximum_signature_line_length = 68


# A class is shown, and linked to, where it is public, not where it is written.
PUBLIC = public_names()
WRITTEN_IN = {}
for name, value in PUBLIC.items():
  if inspect.isclass(value) and value.__module__.startswith('optax_ghm'):
    WRITTEN_IN[name] = value.__module__
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
  # the type of one that says which state it keeps
  'optax_ghm._core.stateful.StatefulTransformation': (
    'optax.GradientTransformationExtraArgs'
  ),
}


def shorten(app, kind, name, value, options, signature, returned):
  """Signatures as the source has them: aliases, and no addresses."""
  if inspect.isclass(value):
    if issubclass(value, tuple | nnx.Variable) or value in PROTOCOLS:
      return '', None  # nobody calls these
    if issubclass(value, nnx.Module):  # whose metaclass hides it
      signature = sphinx_inspect.signature(value.__init__, bound_method=True)
      parameters = signature.parameters.values()
      signature = sphinx_inspect.stringify_signature(
        signature.replace(
          parameters=[
            p.replace(annotation=getattr(p.annotation, 'type', p.annotation))
            for p in parameters  # without InitVar
          ]
        ),
        unqualified_typehints=True,
        show_return_annotation=False,
      )

  def short(text):
    for long, alias in ALIASES.items():
      text = text.replace(long, alias)
    text = re.sub(r"<(?:function|class) '?([\w.]+)'?>", r'\1', text)
    text = re.sub(r'(, )?parent: .*name: str \| None = None\)', ')', text)
    text = re.sub(r'\b_\w+\.', '', text)  # modules, privately imported
    return text.replace('optax._src.base.', 'optax.')

  return tuple(text and short(text) for text in (signature, returned))


CONSTANTS = {
  'optax_ghm.GHM': 'The weighting as published: the inverse of the gradient '
  'density, a :class:`~optax_ghm.HarmonyWeighting`.',
  'optax_ghm.harmonization.PARAMETER_DENSITY': 'Windows of half a decade over '
  'sixteen decades, for norms of unknown scale, a '
  ':class:`~optax_ghm.WindowedDensity`.',
  'optax_ghm.conflict.Weights': 'A method: a function from the Gramian of the '
  "losses' gradients, (m, m), to the losses' weights, (m,).",
  'optax_ghm.backward.OVERWRITE_WITH_GRADIENT': "The name of Flax's collection "
  'of variables that their gradient replaces, '
  "``'_overwrite_with_gradient'``.",
}
autosummary_context = {'constants': CONSTANTS}


def describe_constants(app, kind, name, value, options, lines):
  """Says what a constant is, which has no docstring of its own."""
  if name in CONSTANTS:
    lines[:] = [CONSTANTS[name]]


def skip_fields(app, kind, name, value, skip, options):
  """The fields of a named tuple are in its docstring."""
  return skip or type(value).__name__ == '_tuplegetter'


ABBREVIATIONS = {
  'ghm.': 'optax_ghm.',
  'flow.': 'optax_ghm.flow.',
  'conflict.': 'optax_ghm.conflict.',
  'nnx.': 'flax.nnx.',
  'nn.': 'flax.linen.',
}


def link_literals(app, doctree, docname):
  """Links ``optax.adam`` to where it is described, here or in an inventory."""
  external = intersphinx.InventoryAdapter(app.env).main_inventory
  pages = {
    name: item.uri
    for role in ('py:class', 'py:function', 'py:module')
    for name, item in external.get(role, {}).items()
    if '.' in name
  }
  documented = app.env.get_domain('py').objects
  for name in filter(documented.__contains__, PUBLIC):
    page = app.builder.get_relative_uri(docname, documented[name].docname)
    pages[name] = f'{page}#{name}'
  for literal in list(doctree.findall(nodes.literal)):
    if isinstance(literal.parent, nodes.reference | nodes.title):
      continue
    name = literal.astext().removesuffix('()')
    for short, long in ABBREVIATIONS.items():
      if name.startswith(short):
        name = long + name.removeprefix(short)
    if name in pages and docname != f'api/generated/{name}':
      link = nodes.reference('', '', internal=False, refuri=pages[name])
      literal.replace_self(link)
      link += literal


def source_of(app, module, name):
  """The module of a public class, for the link to its source."""
  return WRITTEN_IN.get(f'{module}.{name.split(".")[0]}')


def check_that_all_is_there(app, env):
  """A public name that the reference leaves out is a warning, so an error."""
  documented = env.get_domain('py').objects
  for name in PUBLIC:
    if name not in documented:
      getLogger(__name__).warning('%s is not in docs/api.', name)


def setup(app):
  """Connects what is above to the build."""
  app.connect('autodoc-process-signature', shorten)
  app.connect('autodoc-process-docstring', describe_constants)
  app.connect('autodoc-skip-member', skip_fields)
  app.connect('viewcode-follow-imported', source_of)
  app.connect('doctree-resolved', link_literals)
  app.connect('env-check-consistency', check_that_all_is_there)
