"""NNX models whose layers are tapped."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from optax_ghm._core import arrays
from optax_ghm.flow import _tap, _taps
from optax_ghm.nnx import _overwrite, _subclass, _value_and_grad


@dataclasses.dataclass(frozen=True)
class Tapped:
  """Taps the layers of models, which themselves stay unchanged.

  A tap at the output of every module measures the cotangent there
  (:func:`optax_ghm.flow.tap`). :meth:`value_and_grad` takes a loss as it is;
  :meth:`init` and :meth:`apply` are its two steps.

  Modules in ``nnx.scan``, ``nnx.remat``, ``nnx.vmap``, ``nnx.jit`` and
  ``nnx.cond`` are tapped as well. A scanned stack has statistics for every
  step, along leading axes, or for all steps together if they share a module.
  During the call, the modules of the model are of a subclass and hold their
  taps in a ``nnx.Param``, which goes where parameters go. For JAX they are
  other types, so functions that were compiled without taps are traced again.

  Attributes:
    where: which modules to tap, as a function of their path (names joined by
      slashes, empty for the model itself) and the module; None taps all.
    histogram: whether to count the magnitudes in a histogram.
    examples: the number of examples, if the norm of each is wanted. Every
      tapped module must then have the examples along the first axis of its
      output.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax_ghm.nnx as ghm_nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs)
    ... )
    >>> def loss_fn(model, x):
    ...   return jnp.mean(jnp.square(model(x)))
    >>> step = nnx.jit(ghm_nnx.Tapped().value_and_grad(loss_fn))
    >>> value, grads, taps = step(model, jnp.ones((4, 2)))
    >>> list(taps)
    ['layers/0', 'layers/2', '']
    >>> int(taps['layers/0'].elements)
    32
  """

  where: Callable[[str, nnx.Module], bool] | None = None
  histogram: bool = False
  examples: int | None = None

  def __post_init__(self) -> None:
    if isinstance(self.where, nnx.Module) or not (
      self.where is None or callable(self.where)
    ):
      raise TypeError(
        'where must be a function of a path and a module, got'
        f' {type(self.where).__name__}. A model is for the methods, not for'
        ' Tapped: Tapped().value_and_grad(loss_fn)(model, x).'
      )

  def value_and_grad(
    self,
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    wrt: Any = _overwrite.differentiable,
  ) -> Callable[..., tuple[Any, Any, _taps.Taps]]:
    """A function that returns the value, the gradients and the taps of a loss.

    The loss calls the model as it would without taps. Several calls add up. The
    loss is traced twice, the first time to find its layers.

    Args:
      loss_fn: the loss. The model is its first argument.
      argnums: the position, or positions, of what to differentiate by.
      has_aux: whether the loss returns a pair (loss, auxiliary data).
      wrt: filter of the variables by which models are differentiated.

    Returns:
      A function of the arguments of ``loss_fn`` that returns (value, gradients,
      filled taps). With ``has_aux`` the value is (loss, auxiliary data). Value
      and gradients are those of :func:`optax_ghm.nnx.value_and_grad`. The
      function raises ``ValueError`` if there is no module to tap.
    """
    several = isinstance(argnums, Sequence)
    numbers = tuple(argnums) if several else (argnums,)

    def with_taps(*args):
      *args, taps = args
      return self.apply(*args, taps=taps, method=loss_fn)

    def value_and_grad(*args, **kwargs):
      # By position, so that the taps are the last.
      bound = inspect.signature(loss_fn).bind(*args, **kwargs)
      if bound.kwargs:
        raise TypeError(
          f'arguments of the loss must not be keyword-only: {bound.kwargs}'
        )
      args = bound.args
      if not args:
        raise TypeError('the model must be the first argument of the loss.')
      empty = self.init(*args, method=loss_fn)
      value, (*grads, taps) = _value_and_grad.value_and_grad(
        with_taps, argnums=(*numbers, len(args)), wrt=wrt, has_aux=has_aux
      )(*args, empty)
      return value, tuple(grads) if several else grads[0], taps

    return value_and_grad

  def init(
    self,
    model: nnx.Module,
    *args: Any,
    method: str | Callable[..., Any] = '__call__',
    **kwargs: Any,
  ) -> _taps.Taps:
    """Makes the empty taps of all modules that have a ``__call__``.

    The call may be outside of the mapped axes that the model names, such as the
    ``axis_name`` of a batch norm.

    Args:
      model: the model, which does not change.
      *args: arguments of the model. Shapes are enough for arrays.
      method: the name of the method to call, or a function of the model and the
        other arguments.
      **kwargs: keyword arguments of the model.

    Returns:
      The empty taps, in the order in which the modules return. Modules that are
      not called are last. Their statistics will say that no gradient arrives.

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

    def discover(name, module):
      taken = self.where is None or self.where(name, modules[name])
      stacks.setdefault(name, _stack(module, modules[name], strict=taken))

    def run(state, args, kwargs):
      stacks.clear()
      copy = nnx.merge(graph, state)
      with _holding(
        copy, {name: _Discovery(name, discover) for name in modules}
      ):
        _method(copy, method)(*args, **kwargs)

    _taps.trace(run, jax.eval_shape(lambda state: state, state), args, kwargs)
    stats, layers = {}, []
    for name in dict.fromkeys([*stacks, *modules]):
      module = modules[name]
      if self.where is not None and not self.where(name, module):
        continue
      stack, around = stacks.get(name, ()), name
      while stack is None:  # without variables: as the module around it
        around = around.rpartition('/')[0]
        stack = stacks.get(around) if around else ()
      stats[name] = _tap.empty_tap(
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
    """Calls the model; the gradient of ``taps`` is the filled taps.

    Args:
      model: the model, an argument of the function that is differentiated: one
        that the function closes over may not change in it.
      *args: arguments of the model.
      taps: empty taps from :meth:`init`, or None for a call without taps.
      method: the name of the method to call, or a function of the model and the
        other arguments.
      **kwargs: keyword arguments of the model.

    Returns:
      What the model returns.
    """
    if taps is None:
      return _method(model, method)(*args, **kwargs)
    with _holding(model, {name: _Tap(taps[name]) for name in taps}):
      return _method(model, method)(*args, **kwargs)


_HELD = '_flow'


class _Tap(nnx.Param):
  """A tap, which transformations slice as they slice parameters."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Discovery:
  """Stands in for a tap, to be told which module is called, and how."""

  name: str
  discover: Callable[..., Any]


def _method(model, method):
  if isinstance(method, str):
    return getattr(model, method)
  return functools.partial(method, model)


def _stack(inside, outside, strict):
  """The leading axes that the variables of a module have lost on the way in.

  None for a module without variables.
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
def _holding(model, by_name):
  """Makes the modules of these names hold something that their calls use."""
  changed = []
  try:
    for path, module in list(nnx.iter_modules(model)):
      held = by_name.get('/'.join(map(str, path)))
      if held is not None:
        changed.append((module, type(module)))
        object.__setattr__(
          module, '__class__', _subclass.subclass(type(module), _call)
        )
        setattr(module, _HELD, held)
    yield
  finally:
    for module, kind in changed:
      if hasattr(module, _HELD):
        delattr(module, _HELD)
      object.__setattr__(module, '__class__', kind)


def _call(call, module, args, kwargs):
  output = call(module, *args, **kwargs)
  held = getattr(module, _HELD)
  if isinstance(held, _Tap):
    return _tap.tap(output, held.get_value())
  if any(map(arrays.is_inexact, jax.tree.leaves(output))):
    held.discover(held.name, module)
  return output
