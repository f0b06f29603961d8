"""Flax NNX faces: modules that keep their state themselves."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from optax_ghm import (
  backward as _backward,
  density as _density,
  flow as _flow,
  harmonizing as _harmonizing,
  norms as _norms,
  reversal as _reversal,
)


class OverwriteWithGradient(nnx.Variable):
  """A variable that its gradient replaces: state of the backward pass."""


class Harmonize(nnx.Module):
  """:func:`optax_ghm.harmonize` as a module that keeps its own state.

  Differentiate with respect to :data:`trained`, and let
  :func:`apply_gradients` optimise the parameters and overwrite the state.
  Evaluation changes nothing.

  Args:
    density: see :func:`optax_ghm.harmonize`, as are all the following.
    axis: axes that make up one example.
    scale: what the cotangent is multiplied by before its norm is taken.
    axis_name: mapped axis over which the batch is split.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    ...   ghm_nnx.Harmonize(density=optax_ghm.WindowedDensity(high=2**0.5)),
    ... )
    >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    >>> x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    >>> def loss(model):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     model(x), labels
    ...   ).mean()
    >>> grads = nnx.grad(loss, argnums=ghm_nnx.trained)(model)
    >>> ghm_nnx.apply_gradients(optimizer, model, grads)
    >>> float(model.layers[1].state.get_value().histogram.sum())
    4.0
  """

  def __init__(
    self,
    density: _density.DensityEstimator = _density.DEFAULT_DENSITY,
    axis: int | tuple[int, ...] | None = None,
    scale: float | None = None,
    axis_name: _norms.AxisName = None,
  ):
    self.density = density
    self.axis = axis
    self.scale = scale
    self.axis_name = axis_name
    self.state = OverwriteWithGradient(density.init())

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    enabled: bool = True,
  ) -> jax.Array:
    """Returns ``x``; its cotangent is harmonised.

    Args:
      x: activations, examples along the leading axes.
      mask: broadcastable to the examples: which of them count.
      enabled: False is the plain identity.

    Returns:
      ``x``.
    """
    return _harmonizing.harmonize(
      x,
      self.state.get_value(),
      density=self.density,
      axis=self.axis,
      scale=self.scale,
      mask=mask,
      axis_name=self.axis_name,
      enabled=enabled,
    )


class GradientReversal(nnx.Module):
  """:func:`optax_ghm.reverse_gradient` as a module, without state.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import GradientReversal
    >>> class DomainClassifier(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.reverse = GradientReversal()
    ...     self.dense = nnx.Linear(2, 1, rngs=rngs)
    ...
    ...   def __call__(self, features, scale):
    ...     return self.dense(self.reverse(features, scale))
    >>> model = DomainClassifier(nnx.Rngs(0))
    >>> grad = nnx.grad(lambda f, s: model(f, s).sum())
    >>> features = jnp.ones((4, 2))
    >>> bool(jnp.all(grad(features, 0.5) == -0.5 * grad(features, -1.0)))
    True
  """

  def __call__(self, x: Any, scale: ArrayLike = 1.0) -> Any:
    """Returns ``x``; its cotangent is multiplied by minus ``scale``.

    Args:
      x: array or pytree of arrays.
      scale: λ, such as a schedule's value at this step; one number, or one per
        example.

    Returns:
      ``x``.
    """
    return _reversal.reverse_gradient(x, scale)


class InBackward(nnx.Module):
  """:func:`optax_ghm.in_backward` as a module that keeps the state.

  :class:`Harmonize` says how to train with it.

  Args:
    tx: any Optax transformation.
    x: an example of what will pass, or a ``jax.ShapeDtypeStruct`` of it; only
      a transformation that keeps a state needs it.

  Examples:
    >>> from flax import nnx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm.nnx as ghm_nnx
    >>> clip = ghm_nnx.InBackward(optax.clip_by_global_norm(1.0))
    >>> clip(jnp.ones((4, 2))).shape
    (4, 2)
    >>> momentum = ghm_nnx.InBackward(optax.trace(0.9), jnp.ones((4, 2)))
    >>> momentum.state.get_value().carried.trace.shape
    (4, 2)
  """

  def __init__(self, tx: optax.GradientTransformation, x: Any = None):
    self.mounted = _backward.in_backward(tx)
    self.knows_x = x is not None
    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    self.state = OverwriteWithGradient(self.mounted.init(x))

  def __call__(self, x: Any, enabled: bool = True) -> Any:
    """Returns ``x``; its cotangent is what ``tx`` makes of it.

    Args:
      x: array or pytree of arrays.
      enabled: False is the plain identity.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``tx`` keeps a state and the constructor was given no x.
    """
    if enabled and not self.knows_x and self.mounted.keeps_state(x):
      raise ValueError(
        'tx keeps a state: give InBackward(tx, x) an example of what passes.'
      )
    return self.mounted(x, self.state.get_value(), enabled=enabled)


trained = nnx.DiffState(0, nnx.Any(nnx.Param, OverwriteWithGradient))
"""For ``nnx.grad(..., argnums=trained)``: parameters and backward states."""


def apply_gradients(
  optimizer: nnx.Optimizer,
  model: nnx.Module,
  gradients: nnx.State,
  **extra_args,
) -> None:
  """Optimises the parameters and overwrites the states, in place.

  Args:
    optimizer: an ``nnx.Optimizer`` of ``model`` with ``wrt=nnx.Param``.
    model: the model.
    gradients: with respect to :data:`trained`.
    **extra_args: passed to the optimizer's ``update``.

  Raises:
    ValueError: if the gradients of the states are missing.

  Examples:
    See :class:`Harmonize`.
  """
  states, params = nnx.split_state(gradients, OverwriteWithGradient, ...)
  old = nnx.state(model, OverwriteWithGradient)
  if jax.tree.structure(old) != jax.tree.structure(states):
    raise ValueError(
      'gradients must be those of the parameters and of the states of the'
      ' backward pass: take them with nnx.grad(..., argnums=trained).'
    )
  optimizer.update(model, params, **extra_args)
  nnx.update(
    model,
    _backward.overwrite_with_gradient(nnx.as_pure(old), nnx.as_pure(states)),
  )


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
  ) -> _flow.Taps:
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

    _flow.trace(run, jax.eval_shape(lambda state: state, state), args, kwargs)
    stats, layers = {}, []
    for name in dict.fromkeys([*stacks, *modules]):
      module = modules[name]
      if self.where is not None and not self.where(name, module):
        continue
      stack, around = stacks.get(name, ()), name
      while stack is None:  # nothing to tell by: as the module around it
        around = around.rpartition('/')[0]
        stack = stacks.get(around) if around else ()
      stats[name] = _flow.sink(
        histogram=self.histogram, examples=self.examples, stack=stack
      )
      own = [v for v in vars(module).values() if isinstance(v, nnx.Param)]
      ranks = [getattr(v.get_value(), 'ndim', 0) - len(stack) for v in own]
      has_kernel = any(rank > 1 for rank in ranks)
      layers.append(_flow.Layer(name, type(module).__name__, has_kernel))
    if not layers:
      raise ValueError('there is no module that could be tapped.')
    known = {name: stack or () for name, stack in stacks.items()}
    return _flow.Taps(stats, _flow.with_loops(layers, known))

  def apply(
    self,
    model: nnx.Module,
    *args: Any,
    taps: _flow.Taps | None = None,
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
  return _flow.leading_axes(
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
        object.__setattr__(module, '__class__', _watched_class(type(module)))
        setattr(module, _HELD, what)
    yield
  finally:
    for module, kind in held:
      if hasattr(module, _HELD):
        delattr(module, _HELD)
      object.__setattr__(module, '__class__', kind)


@functools.cache
def _watched_class(kind):
  """A subclass whose calls go through what the module holds."""

  def __call__(self, *args, **kwargs):
    output = kind.__call__(self, *args, **kwargs)
    held = getattr(self, _HELD)
    if isinstance(held, _Sink):
      return _flow.tap(output, held.get_value())
    if any(map(_norms.is_inexact, jax.tree.leaves(output))):
      held.found(held.name, self)
    return output

  names = ('__module__', '__qualname__', '__doc__')
  namespace = {name: getattr(kind, name) for name in names}
  return type(kind)(
    kind.__name__,
    (kind,),
    {**namespace, '__call__': functools.wraps(kind.__call__)(__call__)},
    pytree=kind._pytree__is_pytree,
  )
