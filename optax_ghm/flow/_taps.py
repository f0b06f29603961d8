"""Taps by name, and the layers that they belong to."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm.flow import _tap


class Layer(NamedTuple):
  """The module that a tap belongs to.

  Attributes:
    name: path of the module, joined by slashes; empty for the whole model.
    kind: name of its class, or empty.
    has_kernel: whether it has a weight matrix of its own and so counts as one
      layer of depth.
    loop: name of the outermost module around it that a loop over layers calls,
      empty if there is none, or None if only the names can tell.
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
class Taps(Mapping[str, _tap.TapStats]):
  """The taps of several layers: a mapping from names to their statistics.

  Taps are empty before the backward pass. The gradient with respect to empty
  taps is the filled taps.

  Attributes:
    stats: a :class:`TapStats` for every layer.
    layers: a :class:`Layer` for every layer, in the order of the forward pass.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(3)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = jnp.tanh(flow.tap(2 * x, taps[name]))
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.empty(names))
    >>> print([round(float(stats.norm), 2) for stats in taps.values()])
    [0.0, 0.03, 0.17]
  """

  stats: dict[str, _tap.TapStats]
  layers: tuple[Layer, ...]

  @classmethod
  def empty(
    cls,
    names: Sequence[str],
    *,
    histogram: bool = False,
    examples: int | None = None,
  ) -> 'Taps':
    """An empty tap for each name.

    Args:
      names: of the layers, in the order of the forward pass.
      histogram: whether to count the magnitudes in a histogram.
      examples: the number of examples, if the norm of each is wanted.

    Returns:
      The empty taps, of layers that no loop calls.
    """
    make = functools.partial(
      _tap.empty_tap, histogram=histogram, examples=examples
    )
    layers = tuple(Layer(name, loop='') for name in names)
    return cls({name: make() for name in names}, layers)

  def __getitem__(self, name: str) -> _tap.TapStats:
    return self.stats[name]

  def __iter__(self) -> Iterator[str]:
    return (layer.name for layer in self.layers)

  def __len__(self) -> int:
    return len(self.layers)


def trace(f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
  """Traces ``f``; shapes among its arguments stand for arrays.

  Outside of a mapped function, an axis that ``f`` names is bound to a size of
  1, after a first attempt has said its name.
  """
  leaves, structure = jax.tree.flatten((args, kwargs))
  is_shape = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

  def run(arrays):
    given = iter(arrays)
    args, kwargs = structure.unflatten(
      next(given) if abstract else leaf
      for leaf, abstract in zip(leaves, is_shape, strict=True)
    )
    f(*args, **kwargs)

  shapes = [u for u, x in zip(leaves, is_shape, strict=True) if x]
  bound = set()
  while True:
    try:
      return jax.eval_shape(run, shapes)
    except NameError as error:
      name = re.search(r'unbound axis name: (\w+)', str(error))
      if name is None or name[1] in bound:
        raise
      bound.add(name[1])
      run = jax.vmap(run, None, None, axis_name=name[1], axis_size=1)


def with_loops(
  layers: Sequence[Layer], stacks: Mapping[str, tuple[int, ...]]
) -> tuple[Layer, ...]:
  """Fills in the loop that every layer is in.

  Args:
    layers: the layers that are tapped.
    stacks: for every module, tapped or not, the leading axes of its taps.

  Returns:
    The layers with ``loop`` filled in.
  """

  def loop(name):
    parts = name.split('/')
    around = ['/'.join(parts[: i + 1]) for i in range(len(parts))]
    return next((each for each in around if stacks.get(each)), '')

  return tuple(layer._replace(loop=loop(layer.name)) for layer in layers)


def leading_axes(
  inside: Any, outside: Any, strict: bool = True
) -> tuple[int, ...]:
  """The axes that parameters lose on their way into a loop over layers.

  Args:
    inside: the parameters of a module while it is called.
    outside: the same parameters as they are given to the model.
    strict: whether to raise.

  Returns:
    The sizes of the leading axes that only ``outside`` has.

  Raises:
    ValueError: if axes other than the leading ones are lost.
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


Order = tuple[tuple[str, tuple[int, ...]], ...]
"""For every row of a record, the name of its tap and its place in the stack."""


@functools.lru_cache(maxsize=16)
def depth_order(
  layers: tuple[Layer, ...], stacks: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Layer, ...], Order]:
  """The layers by depth, with a row for every layer of a stack.

  Stacked layers that one loop calls alternate, step by step of the loop.

  Args:
    layers: the layers.
    stacks: the leading axes of the taps of each.

  Returns:
    The layer of every row, and where the row comes from.
  """
  stacked = [layer.name for layer, u in zip(layers, stacks, strict=True) if u]
  order = []

  def loop(layer):
    if layer.loop is not None:
      return layer.loop
    around = [u for u in stacked if f'{layer.name}/'.startswith(f'{u}/')]
    return min(around, key=len, default='')

  def place(members, at):
    for (size, _), group in itertools.groupby(
      members,
      lambda member: (member[1][:1], None if at else loop(member[0])),
    ):
      inner = [(layer, stack[1:]) for layer, stack in group]
      if size:
        for i in range(*size):
          place(inner, (*at, i))
      else:
        order.extend((layer, at) for layer, _ in inner)

  place(zip(layers, stacks, strict=True), ())
  rows = tuple(
    layer._replace(name=layer.name + ''.join(f'[{i}]' for i in at))
    for layer, at in order
  )
  return rows, tuple((layer.name, at) for layer, at in order)


@functools.partial(jax.jit, static_argnames='order')
def gather(
  stats: dict[str, _tap.TapStats], order: Order
) -> tuple[jax.Array, jax.Array | None]:
  """The numbers of all rows as one array, and their histograms if all have."""
  numbers = [stats[name].numbers[at] for name, at in order]
  histograms = [
    histogram[at]
    for name, at in order
    if (histogram := stats[name].histogram) is not None
  ]
  complete = len(histograms) == len(numbers)
  return jnp.stack(numbers), jnp.stack(histograms) if complete else None
