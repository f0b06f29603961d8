"""Taps by name: the layers that they stand for."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optax_ghm.flow import _tap


class Layer(NamedTuple):
  """What a tap stands for.

  Attributes:
    name: path of the module, joined by slashes; empty for the whole model.
    kind: name of its class, or empty.
    has_kernel: whether it has a weight matrix of its own, so that it counts as
      one layer of depth.
    loop: name of the outermost module that a loop over layers calls and this
      one is in, empty if there is none; None if it is to be told by the names.
  """

  name: str
  kind: str = ''
  has_kernel: bool = True
  loop: str | None = None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['stats'],
  meta_fields=['layers'],
)
@dataclasses.dataclass(frozen=True)
class Taps(Mapping):
  """The sinks of several layers, or their statistics, by name.

  Attributes:
    stats: a :class:`TapStats` for every layer.
    layers: a :class:`Layer` for each, in the order of the forward pass.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   for i in range(3):
    ...     x = jnp.tanh(flow.tap(2 * x, taps[f'layer {i}']))
    ...   return jnp.sum(x)
    >>> sinks = flow.Taps.of([f'layer {i}' for i in range(3)])
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), sinks)
    >>> print([round(float(stats.norm), 2) for stats in taps.values()])
    [0.0, 0.03, 0.17]
  """

  stats: dict[str, _tap.TapStats]
  layers: tuple[Layer, ...]

  @classmethod
  def of(
    cls,
    names: Sequence[str],
    *,
    histogram: bool = False,
    examples: int | None = None,
  ) -> 'Taps':
    """A sink for each name, in the order of the forward pass.

    Args:
      names: of the layers.
      histogram: see :func:`sink`, as for the next.
      examples: how many there are.

    Returns:
      The sinks.
    """
    return cls(
      {
        name: _tap.sink(histogram=histogram, examples=examples)
        for name in names
      },
      tuple(Layer(name) for name in names),
    )

  def __getitem__(self, name: str) -> _tap.TapStats:
    return self.stats[name]

  def __iter__(self) -> Iterator[str]:
    return (layer.name for layer in self.layers)

  def __len__(self) -> int:
    return len(self.layers)


def trace(f: Callable[..., Any], *args: Any) -> None:
  """Runs ``f`` abstractly; shapes among its arguments stand for arrays."""
  leaves, structure = jax.tree.flatten(args)
  is_shape = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

  def run(arrays):
    given = iter(arrays)
    f(
      *structure.unflatten(
        next(given) if abstract else leaf
        for leaf, abstract in zip(leaves, is_shape, strict=True)
      )
    )

  jax.eval_shape(run, [u for u, x in zip(leaves, is_shape, strict=True) if x])


def with_loops(
  layers: Sequence[Layer], stacks: Mapping[str, tuple[int, ...]]
) -> tuple[Layer, ...]:
  """The layers, each with the loop that it is in.

  Args:
    layers: those that are tapped.
    stacks: of all modules, tapped or not, the leading axes of a sink.

  Returns:
    The same layers, ``loop`` set.
  """

  def loop(name):
    parts = name.split('/')
    around = ['/'.join(parts[: i + 1]) for i in range(len(parts))]
    return next((each for each in around if stacks.get(each)), '')

  return tuple(layer._replace(loop=loop(layer.name)) for layer in layers)


def leading_axes(
  inside: Any, outside: Any, strict: bool = True
) -> tuple[int, ...]:
  """The axes that arrays lost on their way into a loop over layers.

  Args:
    inside: the parameters that a module sees when it is called.
    outside: those that are given to the model.
    strict: whether to raise.

  Returns:
    The sizes of the leading axes of ``outside`` that ``inside`` has not.

  Raises:
    ValueError: if other axes than the leading ones were lost.
  """
  lost = set()
  for u, v in zip(
    jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True
  ):
    depth = v.ndim - u.ndim
    if strict and depth and v.shape[depth:] != u.shape:
      raise ValueError(
        f'a parameter of shape {v.shape} is {u.shape} where it is used: layers'
        ' can only be tapped if they are stacked along leading axes. Leave'
        ' their modules out by where.'
      )
    lost.add(v.shape[:depth])
  return lost.pop() if len(lost) == 1 else ()
