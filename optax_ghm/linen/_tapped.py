"""Linen models whose layers are tapped."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
from flax import linen as nn

from optax_ghm._core import arrays
from optax_ghm.flow import _tap, _taps


@dataclasses.dataclass(frozen=True)
class Tapped:
  """A model whose layers are tapped, itself unchanged.

  ``Tapped(model).apply`` is ``model.apply`` with one more argument, ``taps``:
  the gradient with respect to it is the statistics of the cotangents at the
  outputs of all modules (:func:`optax_ghm.flow.tap`). Works for modules in
  ``nn.scan`` (the statistics of every step of a scanned stack; all together
  where the steps share their parameters), ``nn.remat``, ``nn.vmap``,
  ``nn.jit`` and ``nn.cond``. While ``apply`` runs, the sinks stand among the
  parameters, which such modules lift as they lift kernels: along axis 0 of a
  stack. ``nn.map_variables`` over parameters would map them too. Nothing is
  patched, and what had been jitted untapped is traced anew.

  Attributes:
    model: the module.
    where: which modules to tap: called with the path (names joined by slashes,
      empty for the model itself) and the module; None is all of them.
    histogram: see :func:`optax_ghm.flow.sink`.
    examples: the same. Every tapped module must then have the examples along
      the first axis of what it returns.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import Tapped
    >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    >>> x = jnp.ones((4, 2))
    >>> variables = model.init(jax.random.key(0), x)
    >>> tapped = Tapped(model)
    >>> sinks = tapped.init(variables, x)
    >>> def loss(variables, taps):
    ...   return jnp.mean(jnp.square(tapped.apply(variables, x, taps=taps)))
    >>> grads, taps = jax.grad(loss, argnums=(0, 1))(variables, sinks)
    >>> list(taps)
    ['layers_0', 'layers_2', '']
    >>> int(taps['layers_0'].elements)
    32
  """

  model: nn.Module
  where: Callable[[str, nn.Module], bool] | None = None
  histogram: bool = False
  examples: int | None = None

  def init(self, variables: Any, *args: Any, **kwargs: Any) -> _taps.Taps:
    """The sinks of all modules that such a call calls.

    Args:
      variables: of the model, or their shapes, as are all arrays that follow.
      *args: as for ``model.apply``.
      **kwargs: the same.

    Returns:
      The sinks, in the order in which the modules return.

    Raises:
      ValueError: if no module is called that ``where`` takes.
    """
    outside = nn.meta.unbox(dict(variables)).get('params', {})
    layers: list[_taps.Layer] = []
    stacks: dict[str, tuple[int, ...]] = {}

    def discover(module, output):
      name = '/'.join(module.path)
      if name in stacks:
        return output
      taken = self.where is None or self.where(name, module)
      stacks[name] = _stack(module, outside, strict=taken)
      if not taken:
        return output
      own = nn.meta.unbox(module.variables.get('params', {}))
      layers.append(
        _taps.Layer(
          name=name,
          kind=type(module).__name__,
          has_kernel=any(getattr(p, 'ndim', 0) > 1 for p in own.values()),
        )
      )
      return output

    with nn.intercept_methods(_at_outputs(discover)):
      _taps.trace(
        lambda variables, args, kwargs: self.model.apply(
          variables, *args, **kwargs
        ),
        variables,
        args,
        kwargs,
      )
    if not layers:
      raise ValueError('no module was called that could be tapped.')
    return _taps.Taps(
      {
        layer.name: _tap.sink(
          histogram=self.histogram,
          examples=self.examples,
          stack=stacks[layer.name],
        )
        for layer in layers
      },
      _taps.with_loops(layers, stacks),
    )

  def apply(
    self,
    variables: Any,
    *args: Any,
    taps: _taps.Taps | None = None,
    **kwargs: Any,
  ) -> Any:
    """What ``model.apply`` returns.

    Args:
      variables: of the model.
      *args: as for ``model.apply``.
      taps: the sinks from :meth:`init`; None is ``model.apply`` itself.
      **kwargs: as for ``model.apply``.

    Returns:
      The same as ``model.apply``.
    """
    if taps is None:
      return self.model.apply(variables, *args, **kwargs)

    def pass_tap(module, output):
      if not module.has_variable('params', _SINK):
        return output
      return _tap.tap(output, module.get_variable('params', _SINK))

    params = variables.get('params', {})
    for name, sink in taps.items():
      params = _with_sink(params, name.split('/') if name else [], sink)
    with nn.intercept_methods(_at_outputs(pass_tap)):
      result = self.model.apply(
        {**variables, 'params': params}, *args, **kwargs
      )
    if kwargs.get('mutable', False) is False:
      return result
    output, updated = result
    if 'params' in updated:
      params = _without_sinks(updated['params'])
      updated = flax.core.copy(updated, {'params': params})
    return output, updated


_SINK = '_flow_sink'


def _at_outputs(f):
  """An interceptor that makes ``f(module, output)`` the output of modules."""

  def intercept(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if context.method_name != '__call__' or not any(
      map(arrays.is_inexact, jax.tree.leaves(output))
    ):
      return output
    return f(context.module, output)

  return intercept


def _stack(module, outside, strict):
  """The leading axes that the parameters of a module have lost on the way in.

  Those of the next module around it that has any, if it has none itself.
  """
  while isinstance(module, nn.Module):
    inside = nn.meta.unbox(module.variables.get('params', {}))
    of_module = outside
    for key in module.path:
      of_module = of_module.get(key, {})
    if jax.tree.leaves(inside):
      return _taps.leading_axes(inside, of_module, strict=strict)
    module = module.parent
  return ()


def _with_sink(params, path, sink):
  if not path:
    return {**params, _SINK: sink}
  key, *rest = path
  return {**params, key: _with_sink(params.get(key, {}), rest, sink)}


def _without_sinks(params):
  """The parameters that were there before, without folders for sinks only."""
  inner = {
    key: _without_sinks(value) if isinstance(value, Mapping) else value
    for key, value in params.items()
    if key != _SINK
  }
  return {
    key: value
    for key, value in inner.items()
    if not isinstance(value, Mapping) or value
  }
