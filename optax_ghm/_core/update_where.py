"""Updates that happen or not: an optimizer's step, left out as a whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def update_where(
  condition: jax.Array,
  update: Callable[..., tuple[Any, Any]],
  updates: Any,
  state: Any,
  params: Any = None,
  **extra_args: Any,
) -> tuple[Any, Any]:
  """``update(...)`` where the condition holds; else 0 and the same state.

  As ``jnp.where`` of all that ``update`` gives, and with its numbers. But the
  new state is selected where it is *made*, so that what ``update`` goes on to
  compute from it reads what was selected. Only so can XLA write a donated state
  in place: with a selection at the end it needs the old one and the new one at
  once, copies both moments of Adam, and takes more than twice the time.

  Args:
    condition: bool, a scalar.
    update: that of a ``GradientTransformationExtraArgs``.
    updates: its arguments.
    state: the same.
    params: the same.
    **extra_args: the same.

  Returns:
    Updates and state, as ``update`` gives them.

  Raises:
    ValueError: if ``update`` changes the structure or the shapes of the state.
  """
  structure: Any = None
  aside: dict[int, Any] = {}  # float0 is no type for a trace

  def traced():
    nonlocal structure
    result = update(updates, state, params, **extra_args)
    if jax.tree.structure(result[1]) != jax.tree.structure(state):
      raise ValueError(
        'update must return a state of the structure that it took, got'
        f' {jax.tree.structure(result[1])} for {jax.tree.structure(state)}.'
      )
    for new, old in zip(*map(jax.tree.leaves, (result[1], state)), strict=True):
      if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
          'update must return a state of the shapes that it took, got'
          f' {jnp.shape(new)} for {jnp.shape(old)}.'
        )
    leaves, structure = jax.tree.flatten(result)
    aside.update((i, leaf) for i, leaf in enumerate(leaves) if _is_float0(leaf))
    return [leaf for i, leaf in enumerate(leaves) if i not in aside]

  closed = jax.make_jaxpr(traced)()
  jaxpr, old = closed.jaxpr, jax.tree.leaves(state)
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  begin = len(jaxpr.outvars) - len(old)  # of the state among the outputs
  # But at the end, what is no result, or the new value of more than one leaf.
  selected = {
    var: leaf
    for var, leaf in zip(jaxpr.outvars[begin:], old, strict=True)
    if not _is_literal(var)
    and var not in values
    and jaxpr.outvars.count(var) == 1
  }

  def read(var):
    return var.val if _is_literal(var) else values[var]

  for equation in jaxpr.eqns:
    inputs = dict.fromkeys(v for v in equation.invars if not _is_literal(v))
    alone = jaxpr.replace(
      constvars=[],
      invars=list(inputs),
      outvars=equation.outvars,
      eqns=[equation],
    )
    results = jax.core.eval_jaxpr(alone, [], *map(read, inputs))
    for var, result in zip(equation.outvars, results, strict=True):
      old_leaf = selected.get(var)
      values[var] = (
        result if old_leaf is None else jnp.where(condition, result, old_leaf)
      )

  leaves = [read(var) for var in jaxpr.outvars]
  for i, var in enumerate(jaxpr.outvars):
    if i >= begin and (_is_literal(var) or var not in selected):
      leaves[i] = jnp.where(condition, leaves[i], old[i - begin])
    elif i < begin:
      leaves[i] = jnp.where(condition, leaves[i], jnp.zeros_like(leaves[i]))
  for i in sorted(aside):
    leaves.insert(i, aside[i])
  return structure.unflatten(leaves)


def _is_literal(atom):
  return hasattr(atom, 'val')


def _is_float0(leaf):
  return getattr(leaf, 'dtype', None) == jax.dtypes.float0
