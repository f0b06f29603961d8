"""Optax transformations inside the backward pass.

A ``jax.custom_vjp`` that learns from cotangents takes its state as an argument,
and the gradient with respect to that argument is the next state. Flax calls
this overwrite-with-gradient. It keeps such variables in a collection of that
name, which ``flax.training.train_state.TrainState`` overwrites.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays, counters
from optax_ghm._core.identity import identity, inexact_part
from optax_ghm.backward import _float_state, _overwrite


class InBackwardState(NamedTuple):
  """State of a transformation inside the backward pass.

  All of its leaves are floating numbers, since only these have gradients.
  :meth:`InBackward.unpack` makes it the state of the transformation again. A
  cast of a model to 16 bits must leave it as it is.

  Attributes:
    floats: the state of the transformation, summed over ``calls``. An integer,
      such as a step count or a part of a PRNG key, is a pair of float32 along
      the last axis.
    calls: float32, how many backward passes were added up; 0 at the start.
  """

  floats: Any
  calls: jax.Array


@dataclasses.dataclass(frozen=True)
class InBackward:
  """A transformation of the cotangent, from :func:`~optax_ghm.in_backward`.

  Attributes:
    tx: the transformation.
  """

  tx: optax.GradientTransformationExtraArgs

  def init(self, x: Any) -> InBackwardState:
    """Returns the state of ``tx`` before the first backward pass.

    Args:
      x: the activations, or arrays of their shapes and dtypes.
    """
    state = jax.tree.map(_float_state.to_floats, self.tx.init(inexact_part(x)))
    return InBackwardState(floats=state, calls=jnp.zeros([], jnp.float32))

  def keeps_state(self, x: Any) -> bool:
    """Returns whether ``tx`` keeps a state for such activations."""
    return bool(jax.tree.leaves(jax.eval_shape(self.init, x).floats))

  def _reads_state(self, x):
    """Whether the updates depend on the state."""
    state = jax.eval_shape(self.tx.init, x)
    first = len(jax.tree.leaves(x))
    jaxpr, (updates, _) = jax.make_jaxpr(self.tx.update, return_shape=True)(
      x, state, x
    )
    last = first + len(jax.tree.leaves(state))
    dependent = {id(v) for v in jaxpr.jaxpr.invars[first:last]}
    for equation in jaxpr.jaxpr.eqns:
      if dependent.intersection(map(id, equation.invars)):
        dependent.update(map(id, equation.outvars))
    of_updates = jaxpr.jaxpr.outvars[: len(jax.tree.leaves(updates))]
    return bool(dependent.intersection(map(id, of_updates)))

  def unpack(self, state: InBackwardState, x: Any) -> optax.OptState:
    """Returns the state as ``tx.update`` would have returned it.

    Args:
      state: from :meth:`init`, or a gradient with respect to such a state. Its
        leaves may have additional leading axes, where states are stacked.
      x: the activations, or arrays of their shapes and dtypes.

    Returns:
      The state of ``tx``; the mean, if several backward passes were added up.
    """
    like = jax.eval_shape(self.tx.init, inexact_part(x))
    calls = jnp.where(state.calls > 0, state.calls, 1)
    return jax.tree.map(
      lambda shape, leaf: _float_state.from_floats(leaf, shape, calls),
      like,
      state.floats,
    )

  def __call__(
    self, x: Any, state: InBackwardState | None = None, *, enabled: bool = True
  ) -> Any:
    """Returns ``x``; its cotangent becomes ``tx.update(cotangent, state, x)``.

    Args:
      x: array or pytree of arrays.
      state: from :meth:`init` for an ``x`` of the same shapes and dtypes; None
        if ``tx`` keeps no state, or one that its updates do not depend on, as
        :func:`~optax_ghm.clip_by_norm` does.
      enabled: False makes this the plain identity, for forward mode, and for
        evaluation with a batch size that the state was not made for.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``state`` is None and the updates depend on it, if it does
        not fit ``x``, or if ``tx`` changes the structure or the shapes of its
        updates or of its state.
    """
    if not enabled:
      return x
    floats = inexact_part(x)
    expected = _types(jax.eval_shape(self.init, floats))
    if state is None and not self._reads_state(floats):
      state = self.init(floats)
    if _types(state) != expected:
      raise ValueError(
        'state must be one from in_backward(tx).init(x), of the structure,'
        f' shapes and dtypes {expected}, got {_types(state)}. For x of another'
        ' size in evaluation, pass enabled=False.'
      )

    def update(cotangent, state, floats):
      updates, next_state = self.tx.update(
        cotangent, self.unpack(state, floats), floats
      )
      next_state = InBackwardState(
        floats=jax.tree.map(_float_state.to_floats, next_state),
        calls=jnp.ones_like(state.calls),
      )
      next_state = _overwrite.tie_to_cotangent(next_state, cotangent)
      return (
        _cast_like(updates, cotangent, 'updates'),
        _cast_like(next_state, state, 'state'),
      )

    update, values = _with_closed_over_values(update, floats, state, floats)
    return _in_backward(update, x, floats, state, values)


def in_backward(tx: optax.GradientTransformation) -> InBackward:
  r"""Puts an Optax transformation in the backward pass, at any activation.

  .. math::
    y = x, \qquad (\bar x, s') = \text{tx.update}(\bar y, s, x)

  Whatever reshapes the gradients of parameters can reshape the cotangents of
  activations. ``in_backward(tx)(x)`` is ``x``, and the cotangent behind it is
  what ``tx.update`` makes of the cotangent before it, in the same dtype. The
  activations take the place of the parameters: ``optax.add_decayed_weights``
  decays activations.

  ``in_backward(tx)(x, state)`` is for a transformation with a state. The
  gradient with respect to ``state`` is the next state, which
  :func:`overwrite_with_gradient` passes on. Where one state serves several
  calls in a step, or micro-batches whose gradients are summed, the mean of
  their next states is passed on.

  Under ``jax.vmap`` the transformation sees the cotangent of one example, with
  a state for each or one for all. Under ``jit`` of a sharded array it sees the
  cotangent of the whole array. Under ``shard_map`` it sees the cotangent of one
  shard, unless ``tx`` itself sums over the mapped axis. A state that every
  shard changes on its own has to vary, by ``jax.lax.pcast(state, axis_name,
  to='varying')``, and the next states of the shards are averaged.

  Where the loss does not use a leaf of a pytree ``x``, the transformation sees
  zeros, and no gradient goes on from that leaf.

  The rule need not be linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises: switch the rule off there by ``enabled=False``.

  Args:
    tx: a transformation that keeps the shapes of its updates and needs no extra
      argument such as the loss, which is not known in the backward pass. It may
      close over traced numbers.

  Returns:
    An :class:`optax_ghm.backward.InBackward`, which is a function of
    ``(x, state=None)`` with the methods ``init`` and ``unpack``. ``x`` is an
    array or a pytree; ``tx`` sees None in the place of leaves that are not
    floating or complex arrays.

  Raises:
    TypeError: if ``tx`` is not a ``GradientTransformation``.

  Examples:
    Without a state:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> clip = optax_ghm.in_backward(optax.clip_by_global_norm(1.0))
    >>> jax.grad(lambda x: jnp.sum(clip(x) ** 2))(jnp.array([3.0, 4.0]))
    Array([0.6, 0.8], dtype=float32)

    With a state:

    >>> momentum = optax_ghm.in_backward(optax.trace(0.9))
    >>> x = jnp.ones(2)
    >>> state = momentum.init(x)
    >>> def loss(x, state):
    ...   return jnp.sum(momentum(x, state))
    >>> for _ in range(2):
    ...   grad, state_grad = jax.grad(loss, argnums=(0, 1))(x, state)
    ...   state = optax_ghm.overwrite_with_gradient(state, state_grad)
    >>> grad
    Array([1.9, 1.9], dtype=float32)
    >>> momentum.unpack(state, x).trace
    Array([1.9, 1.9], dtype=float32)
  """
  counters.check_type('tx', tx, counters.GradientTransformation)
  return InBackward(optax.with_extra_args_support(tx))


@identity
def _in_backward(update, cotangent, x, state, values):
  seen = jax.tree.map(
    lambda leaf, c: jnp.zeros_like(leaf) if c is None else c, x, cotangent
  )
  updates, next_state = update(seen, state, x, values)
  updates = jax.tree.map(
    lambda u, c: None if c is None else u, updates, cotangent
  )
  return updates, None, next_state, None


def _types(tree):
  """Structure, shapes and dtypes, to compare and to print."""
  return jax.tree.map(lambda u: f'{u.dtype}{list(u.shape)}', tree)


def _with_closed_over_values(f, *args):
  """Returns ``f`` with one more argument, and the value of that argument.

  The argument is the list of all traced values that ``f`` closes over. When the
  backward pass runs, the trace that they belong to may have ended (that of a
  ``scan`` around the call, for example), so they have to be residuals.
  """
  closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
  structure = jax.tree.structure(shape)

  def with_values(*args_and_values):
    *args, values = args_and_values
    leaves = jax.tree.leaves(args)
    return structure.unflatten(
      jax.core.eval_jaxpr(closed.jaxpr, values, *leaves)
    )

  return with_values, list(closed.consts)


def _cast_like(tree, like, name):
  """Casts and reshards to ``like``, which must have the same shapes."""
  shapes = [jax.tree.map(jnp.shape, t) for t in (tree, like)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'tx must keep the structure and shapes of its {name}, got {shapes[0]}'
      f' for {shapes[1]}.'
    )

  def cast(leaf, old):
    return arrays.laid_out_as(jnp.asarray(leaf).astype(old.dtype), old)

  return jax.tree.map(cast, tree, like)
