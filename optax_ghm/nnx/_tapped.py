"""NNX models whose layers are tapped."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from optax_ghm._core import arrays
from optax_ghm.flow import _tap, _taps
from optax_ghm.nnx import _subclass


@dataclasses.dataclass(frozen=True)
class Tapped:
  """Calls models with their layers tapped, the models themselves unchanged.

  ``Tapped().apply(model, x, taps=taps)`` is ``model(x)``: the gradient with
  respect to ``taps`` is the statistics of the cotangents at the outputs of all
  modules (:func:`optax_ghm.flow.tap`). Works for modules in ``nnx.scan`` (the
  statistics of every step of a scanned stack, along leading axes; all together
  where the steps share a module), ``nnx.remat``, ``nnx.vmap``, ``nnx.jit`` and
  ``nnx.cond``. While ``apply`` runs, the modules of this model are of a
  subclass and hold a sink each, a ``nnx.Param``, so that it goes where
  parameters go, and what had been jitted untapped is traced anew. Therefore the
  model has to come in as an argument of what is differentiated: one that the
  loss closes over may not be changed there.

  Attributes:
    where: which modules to tap: called with the path (names joined by slashes,
      empty for the model itself) and the module; None is all of them.
    histogram: see :func:`optax_ghm.flow.sink`.
    examples: the same. Every tapped module must then have the examples along
      the first axis of what it returns.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax_ghm.nnx as ghm_nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs)
    ... )
    >>> x = jnp.ones((4, 2))
    >>> tapped = ghm_nnx.Tapped()
    >>> sinks = tapped.init(model, x)
    >>> def loss(model, taps):
    ...   return jnp.mean(jnp.square(tapped.apply(model, x, taps=taps)))
    >>> grads, taps = nnx.grad(loss, argnums=(0, 1))(model, sinks)
    >>> list(taps)
    ['layers/0', 'layers/2', '']
    >>> int(taps['layers/0'].elements)
    32
  """

  where: Callable[[str, nnx.Module], bool] | None = None
  histogram: bool = False
  examples: int | None = None

  def init(
    self,
    model: nnx.Module,
    *args: Any,
    method: str | Callable[..., Any] = '__call__',
    **kwargs: Any,
  ) -> _taps.Taps:
    """The sinks of all modules that have a ``__call__``.

    Args:
      model: the model; nothing of it changes.
      *args: as for the model; shapes are enough for arrays.
      method: see :meth:`apply`.
      **kwargs: as for the model.

    Returns:
      The sinks, in the order in which the modules return; last those that are
      not called, whose statistics will say that no gradient arrives.

    Raises:
      ValueError: if there is no module that ``where`` takes.
    """
    graph, state = nnx.split(model)
    modules = {
      '/'.join(map(str, path)): module
      for path, module in nnx.iter_modules(model)
      if callable(module)
    }
    stacks: dict[str, tuple[int, ...] | None] = {}  # in the order of returns

    def found(name, module):
      taken = self.where is None or self.where(name, modules[name])
      stacks.setdefault(name, _stack(module, modules[name], strict=taken))

    def run(state, args, kwargs):
      copy = nnx.merge(graph, state)
      with _watched(copy, {name: _Discovery(name, found) for name in modules}):
        _method(copy, method)(*args, **kwargs)

    _taps.trace(run, jax.eval_shape(lambda state: state, state), args, kwargs)
    stats, layers = {}, []
    for name in dict.fromkeys([*stacks, *modules]):
      module = modules[name]
      if self.where is not None and not self.where(name, module):
        continue
      stack, around = stacks.get(name, ()), name
      while stack is None:  # nothing to tell by: as the module around it
        around = around.rpartition('/')[0]
        stack = stacks.get(around) if around else ()
      stats[name] = _tap.sink(
        histogram=self.histogram, examples=self.examples, stack=stack
      )
      own = [v for v in vars(module).values() if isinstance(v, nnx.Param)]
      ranks = [getattr(v.get_value(), 'ndim', 0) - len(stack) for v in own]
      has_kernel = any(rank > 1 for rank in ranks)
      layers.append(_taps.Layer(name, type(module).__name__, has_kernel))
    if not layers:
      raise ValueError('there is no module that could be tapped.')
    known = {name: stack or () for name, stack in stacks.items()}
    return _taps.Taps(stats, _taps.with_loops(layers, known))

  def apply(
    self,
    model: nnx.Module,
    *args: Any,
    taps: _taps.Taps | None = None,
    method: str | Callable[..., Any] = '__call__',
    **kwargs: Any,
  ) -> Any:
    """What the model returns.

    Args:
      model: the model.
      *args: as for the model.
      taps: the sinks from :meth:`init`; None is the model itself.
      method: the name of the method to call, or a function of the model and
        ``args``.
      **kwargs: as for the model.

    Returns:
      The same as the model.
    """
    if taps is None:
      return _method(model, method)(*args, **kwargs)
    with _watched(model, {name: _Sink(taps[name]) for name in taps}):
      return _method(model, method)(*args, **kwargs)


_HELD = '_flow'


class _Sink(nnx.Param):
  """A sink, sliced and carried by transformations as parameters are."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Discovery:
  """Stands where a sink will be, and tells which module is called, and how."""

  name: str
  found: Callable[..., Any]


def _method(model, method):
  if isinstance(method, str):
    return getattr(model, method)
  return functools.partial(method, model)


def _stack(inside, outside, strict):
  """The leading axes that the variables of a module have lost on the way in.

  None if it has no variables.
  """
  kind = nnx.Param if nnx.state(outside, nnx.Param) else nnx.Variable
  inside, outside = (
    dict(nnx.to_flat_state(nnx.state(m, kind))) for m in (inside, outside)
  )
  both = [path for path in outside if path in inside]
  if not both:
    return None
  return _taps.leading_axes(
    *([tree[path].get_value() for path in both] for tree in (inside, outside)),
    strict=strict,
  )


@contextlib.contextmanager
def _watched(model, by_name):
  """For a while, the modules of these names hold these, and heed them."""
  held = []
  try:
    for path, module in list(nnx.iter_modules(model)):
      what = by_name.get('/'.join(map(str, path)))
      if what is not None:
        held.append((module, type(module)))
        object.__setattr__(
          module, '__class__', _subclass.subclass(type(module), _watch)
        )
        setattr(module, _HELD, what)
    yield
  finally:
    for module, kind in held:
      if hasattr(module, _HELD):
        delattr(module, _HELD)
      object.__setattr__(module, '__class__', kind)


def _watch(call, module, args, kwargs):
  output = call(module, *args, **kwargs)
  held = getattr(module, _HELD)
  if isinstance(held, _Sink):
    return _tap.tap(output, held.get_value())
  if any(map(arrays.is_inexact, jax.tree.leaves(output))):
    held.found(held.name, module)
  return output
