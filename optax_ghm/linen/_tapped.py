"""Linen models whose layers are tapped."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from optax_ghm._core import arrays
from optax_ghm.flow import _tap, _taps


@dataclasses.dataclass(frozen=True)
class Tapped:
  """Taps the layers of a model, which itself stays unchanged.

  A tap at the output of every module measures the cotangent there
  (:func:`optax_ghm.flow.tap`). :meth:`value_and_grad` takes a loss as it is;
  :meth:`init` and :meth:`apply` are its two steps.

  Modules in ``nn.scan``, ``nn.remat``, ``nn.vmap``, ``nn.jit`` and ``nn.cond``
  are tapped as well. A scanned stack has statistics for every step, or for all
  steps together if they share their parameters. During the call, the taps stand
  among the parameters, which such transformations lift: along axis 0 of a
  stack.

  Attributes:
    model: the module.
    where: which modules to tap, as a function of their path (names joined by
      slashes, empty for the model itself) and the module; None taps all.
    histogram: whether to count the magnitudes in a histogram.
    examples: the number of examples, if the norm of each is wanted. Every
      tapped module must then have the examples along the first axis of its
      output.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import Tapped
    >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    >>> x = jnp.ones((4, 2))
    >>> variables = model.init(jax.random.key(0), x)
    >>> def loss_fn(variables, x):
    ...   return jnp.mean(jnp.square(model.apply(variables, x)))
    >>> step = jax.jit(Tapped(model).value_and_grad(loss_fn))
    >>> value, grads, taps = step(variables, x)
    >>> list(taps)
    ['layers_0', 'layers_2', '']
    >>> int(taps['layers_0'].elements)
    32
  """

  model: nn.Module
  where: Callable[[str, nn.Module], bool] | None = None
  histogram: bool = False
  examples: int | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.model, nn.Module):
      raise TypeError(f'model must be a linen.Module, got {self.model!r}.')

  def value_and_grad(
    self,
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
  ) -> Callable[..., tuple[Any, Any, _taps.Taps]]:
    """A function that returns the value, the gradients and the taps of a loss.

    The loss calls ``model.apply`` as it would without taps. Several calls add
    up. The loss is traced twice, the first time to find its layers.

    Args:
      loss_fn: the loss. Neither the loss nor its calls of the model may be
        under ``jax.jit`` or ``jax.checkpoint``, which would not trace them
        twice.
      argnums: which arguments to differentiate, as in ``jax.value_and_grad``.
      has_aux: whether the loss returns a pair (loss, auxiliary data).

    Returns:
      A function of the arguments of ``loss_fn`` that returns (value, gradients,
      filled taps). With ``has_aux`` the value is (loss, auxiliary data). Value
      and gradients are those of ``jax.value_and_grad``. The function raises
      ``ValueError`` if the loss calls no module to tap.
    """
    several = not isinstance(argnums, int)
    numbers = tuple(argnums) if several else (argnums,)

    def value_and_grad(*args, **kwargs):
      discovery = self._discover(self._intercepted, loss_fn, *args, **kwargs)
      empty = discovery.taps()

      def with_taps(*args, **kwargs):
        *args, taps = args
        filling = _Filling(taps)
        value = self._intercepted(filling, loss_fn, *args, **kwargs)
        if filling.calls != discovery.calls:
          raise ValueError(
            'a call of the model was not traced again, and so not tapped: take'
            ' jax.jit and jax.checkpoint off the loss and what it calls.'
          )
        return value

      value, (*grads, taps) = jax.value_and_grad(
        with_taps, (*(n % len(args) for n in numbers), len(args)), has_aux
      )(*args, empty, **kwargs)
      return value, tuple(grads) if several else grads[0], taps

    return value_and_grad

  def init(self, variables: Any, *args: Any, **kwargs: Any) -> _taps.Taps:
    """Makes the empty taps of all modules that ``model.apply`` calls.

    The call may be outside of the mapped axes that the model names, such as the
    ``axis_name`` of a batch norm.

    Args:
      variables: the variables of the model. Shapes are enough, here and for all
        other arrays.
      *args: arguments of ``model.apply``.
      **kwargs: keyword arguments of ``model.apply``.

    Returns:
      The empty taps, in the order in which the modules return.

    Raises:
      ValueError: if no module is called that ``where`` takes.
    """
    return self._discover(self._apply, variables, *args, **kwargs).taps()

  def apply(
    self,
    variables: Any,
    *args: Any,
    taps: _taps.Taps | None = None,
    **kwargs: Any,
  ) -> Any:
    """Calls ``model.apply``; the gradient of ``taps`` is the filled taps.

    Args:
      variables: the variables of the model.
      *args: arguments of ``model.apply``.
      taps: empty taps from :meth:`init`, or None for a call without taps.
      **kwargs: keyword arguments of ``model.apply``.

    Returns:
      What ``model.apply`` returns.
    """
    if taps is None:
      return self.model.apply(variables, *args, **kwargs)
    return self._apply(_Filling(taps), variables, *args, **kwargs)

  def _discover(self, visited, *args, **kwargs):
    """What is found in the last attempt to trace a function of a visitor."""
    attempts = []

    def attempt(*args, **kwargs):
      attempts.append(_Discovery(self))
      visited(attempts[-1], *args, **kwargs)

    _taps.trace(attempt, *args, **kwargs)
    return attempts[-1]

  def _apply(self, visitor, variables, *args, method='__call__', **kwargs):
    """``model.apply``, with the visitor at the call and at all outputs."""

    def visited(module, *args, **kwargs):
      return visitor.at_call(module, method or '__call__', *args, **kwargs)

    with nn.intercept_methods(_at_outputs(visitor.at_output)):
      return self.model.apply(variables, *args, method=visited, **kwargs)

  def _intercepted(self, visitor, f, *args, **kwargs):
    """``f``, with the visitor at its calls of the model and at all outputs."""
    inside = False
    at_outputs = _at_outputs(visitor.at_output)

    def intercept(next_fun, args, kwargs, context):
      nonlocal inside
      if inside:
        return at_outputs(next_fun, args, kwargs, context)
      is_model = _is_same(_root(context.module), self.model)
      if context.method_name == 'setup' or not is_model:
        return next_fun(*args, **kwargs)
      inside = True
      try:
        return visitor.at_call(
          context.module, context.method_name, *args, **kwargs
        )
      finally:
        inside = False

    with nn.intercept_methods(intercept):
      return f(*args, **kwargs)


class _Discovery:
  """Finds the modules that calls of a model call."""

  def __init__(self, tapped: Tapped):
    self.calls = 0
    self._tapped = tapped
    self._params = {}
    self._layers: list[_taps.Layer] = []
    self._stacks: dict[str, tuple[int, ...]] = {}

  def at_call(self, module, method, *args, **kwargs):
    variables = _root(module).variables
    self._params = nn.meta.unbox(variables.get('params', {}))
    self.calls += 1
    return _method(module, method)(*args, **kwargs)

  def at_output(self, module, output):
    name = '/'.join(module.path)
    if name in self._stacks:
      return output
    where = self._tapped.where
    taken = where is None or where(name, module)
    self._stacks[name] = _stack(module, self._params, strict=taken)
    if taken:
      own = nn.meta.unbox(module.variables.get('params', {}))
      has_kernel = any(getattr(p, 'ndim', 0) > 1 for p in own.values())
      layer = _taps.Layer(name, type(module).__name__, has_kernel)
      self._layers.append(layer)
    return output

  def taps(self):
    """The empty taps."""
    if not self._layers:
      raise ValueError(
        'no module was called that could be tapped. A loss that JAX has traced'
        ' before (jax.jit, jax.checkpoint) cannot be tapped by value_and_grad,'
        ' and neither can a model whose own class is made by nn.scan and the'
        ' like: use init and apply.'
      )
    stats = {
      layer.name: _tap.empty_tap(
        histogram=self._tapped.histogram,
        examples=self._tapped.examples,
        stack=self._stacks[layer.name],
      )
      for layer in self._layers
    }
    return _taps.Taps(stats, _taps.with_loops(self._layers, self._stacks))


class _Filling:
  """Taps the modules that calls of a model call."""

  def __init__(self, taps: _taps.Taps):
    self.calls = 0
    self._taps = taps

  def at_call(self, module, method, *args, **kwargs):
    self.calls += 1
    start = module.path

    def add_taps(collections):
      params = collections.get('params', {})
      for name, stats in self._taps.items():
        path = tuple(name.split('/')) if name else ()
        if path[: len(start)] == start:
          params = _with_tap(params, path[len(start) :], stats)
      return {'params': params}

    def call(module, *args, **kwargs):
      return _method(module, method)(*args, **kwargs)

    tapped = nn.map_variables(call, 'params', add_taps)
    return tapped(module, *args, **kwargs)

  def at_output(self, module, output):
    if not module.has_variable('params', _TAP):
      return output
    return _tap.tap(output, module.get_variable('params', _TAP))


def _at_outputs(at_output):
  """An interceptor that changes the outputs of modules."""

  def intercept(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if context.method_name != '__call__' or not any(
      map(arrays.is_inexact, jax.tree.leaves(output))
    ):
      return output
    return at_output(context.module, output)

  return intercept


def _root(module):
  while isinstance(module.parent, nn.Module):
    module = module.parent
  return module


def _method(module, method):
  if isinstance(method, str):
    return getattr(module, method)
  return functools.partial(method, module)


_TAP = '_flow_tap'


def _is_same(bound, model):
  """Whether a bound module, or an attribute of one, is that of the model."""
  if isinstance(model, nn.Module):
    return type(bound) is type(model) and all(
      _is_same(getattr(bound, field.name), getattr(model, field.name))
      for field in dataclasses.fields(model)
      if field.name not in ('parent', 'name')
    )
  # Flax freezes the lists and dictionaries of bound modules.
  is_module = lambda node: isinstance(node, nn.Module)  # noqa: E731
  ours, theirs = (jax.tree.leaves(u, is_leaf=is_module) for u in (bound, model))
  return len(ours) == len(theirs) and all(
    _is_same(u, v) if is_module(v) else u is v or bool(u == v)
    for u, v in zip(ours, theirs, strict=True)
  )


def _stack(module, outside, strict):
  """The leading axes that the parameters of a module have lost on the way in.

  A module without parameters has the axes of the module around it.
  """
  while isinstance(module, nn.Module):
    inside = nn.meta.unbox(module.variables.get('params', {}))
    if jax.tree.leaves(inside):
      own = outside
      for key in module.path:
        own = own[key]
      return _taps.leading_axes(inside, own, strict=strict)
    module = module.parent
  return ()


def _with_tap(params, path, stats):
  if not path:
    return {**params, _TAP: stats}
  key, *inner = path
  return {**params, key: _with_tap(params.get(key, {}), inner, stats)}
