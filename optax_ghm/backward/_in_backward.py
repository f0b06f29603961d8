"""Optax transformations inside the backward pass, and state that rides it.

A ``jax.custom_vjp`` that learns from cotangents takes its state as an argument
and returns the next state as that argument's gradient. Flax calls this
overwrite-with-gradient and keeps such variables in a collection of that name,
which ``flax.training.train_state.TrainState`` overwrites instead of optimising.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays
from optax_ghm._core.identity import identity
from optax_ghm.backward import _float_state, _overwrite


class InBackwardState(NamedTuple):
  """An Optax state that rides the backward pass, through :func:`in_backward`.

  Attributes:
    carried: the state of the transformation, its integers (step counts, keys)
      as pairs of float32 along a last axis, since only floating numbers have a
      gradient. Summed over ``calls``. :meth:`InBackward.unpack` reads it.
      Keep them float32: no cast of all variables to 16 bits may touch them.
    calls: float32, how many backward passes were added up in ``carried``; 0 in
      a state that has seen none.
  """

  carried: Any
  calls: jax.Array


@dataclasses.dataclass(frozen=True)
class InBackward:
  """An Optax transformation mounted in the backward pass.

  What :func:`in_backward` returns, and explains.

  Attributes:
    tx: the transformation.
  """

  tx: optax.GradientTransformationExtraArgs

  def init(self, x: Any) -> InBackwardState:
    """The state to begin with, ``tx.init(x)`` made fit to be differentiated.

    Args:
      x: the activations that will pass, or arrays of their shapes and dtypes.

    Returns:
      The state.
    """
    state = jax.tree.map(_float_state.to_floats, self.tx.init(_inexact_part(x)))
    return InBackwardState(carried=state, calls=jnp.zeros([], jnp.float32))

  def keeps_state(self, x: Any) -> bool:
    """Whether ``tx`` keeps a state for such activations."""
    expected = jax.eval_shape(self.init, _inexact_part(x))
    return bool(jax.tree.leaves(expected.carried))

  def unpack(self, state: InBackwardState, x: Any) -> optax.OptState:
    """The state of ``tx`` itself, integers and all.

    Args:
      state: from :meth:`init`, or a gradient with respect to it; or several,
        stacked along first axes.
      x: as for :meth:`init`.

    Returns:
      What ``tx.update`` would have returned; the mean, where ``state.calls``
      backward passes were added up.
    """
    like = jax.eval_shape(self.tx.init, _inexact_part(x))
    calls = jnp.where(state.calls > 0, state.calls, 1)
    return jax.tree.map(
      lambda shape, leaf: _float_state.from_floats(leaf, shape, calls),
      like,
      state.carried,
    )

  def __call__(
    self, x: Any, state: InBackwardState | None = None, *, enabled: bool = True
  ) -> Any:
    """Identity; backward, ``tx.update(cotangent, state, x)``.

    Args:
      x: array or pytree of arrays.
      state: from :meth:`init` of an ``x`` of the same shapes and dtypes; may be
        left out if ``tx`` keeps none.
      enabled: False is the plain identity, for forward mode, and for evaluating
        batches of another size than the state was made for.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``tx`` keeps a state and none is given, or one that does
        not fit ``x``.
      ValueError: if ``tx`` changes the structure or the shapes of what it
        updates, or of its state.
    """
    if not enabled:
      return x
    leaves, structure = jax.tree.flatten(x)
    floats = _inexact_part(x)
    expected = jax.eval_shape(self.init, floats)
    if state is None:
      if self.keeps_state(x):
        raise ValueError(
          'tx keeps a state: give in_backward(tx)(x, state) one from'
          ' in_backward(tx).init(x), and take its gradient as the next one.'
        )
      state = self.init(floats)
    elif _types(state) != _types(expected):
      raise ValueError(
        'state must be one from in_backward(tx).init(x), of the structure,'
        f' shapes and dtypes {_types(expected)}, got {_types(state)}. For x of'
        ' another size in evaluation, pass enabled=False.'
      )

    def update(cotangent, state, floats):
      updates, next_state = self.tx.update(
        cotangent, self.unpack(state, floats), floats
      )
      next_state = InBackwardState(
        carried=jax.tree.map(_float_state.to_floats, next_state),
        calls=jnp.ones_like(state.calls),
      )
      return (
        _cast_like(updates, cotangent, 'updates'),
        _cast_like(_overwrite.ride(next_state, cotangent), state, 'state'),
      )

    update, closed_over = _open(update, floats, state, floats)
    passed = iter(
      jax.tree.leaves(_in_backward(update, floats, floats, state, closed_over))
    )
    return structure.unflatten(
      next(passed) if arrays.is_inexact(leaf) else leaf for leaf in leaves
    )


def in_backward(tx: optax.GradientTransformation) -> InBackward:
  r"""Mounts an Optax transformation in the backward pass, at any activation.

  .. math::
    y = x, \qquad (\bar x, s') = \text{tx.update}(\bar y, s, x)

  A cotangent is an update: whatever reshapes the gradients of parameters can
  reshape those of activations. ``in_backward(tx)(x)`` is ``x``, and its law is
  that the cotangent behind it is what ``tx.update`` makes of the one before it,
  cast back to its dtype. The activations stand where an optimizer has its
  parameters: ``optax.add_decayed_weights`` then decays activations.

  With a state, ``in_backward(tx)(x, state)``, the gradient with respect to the
  state is the next state, to be passed on by :func:`overwrite_with_gradient`.
  Where one state serves several calls in a step, or micro-batches whose
  gradients are summed, the mean of their next states is carried on.

  The transformation sees the cotangent of the whole array: under ``jax.vmap``
  that of one example (with a state each, or one for all), under ``jit`` of a
  sharded array that of all shards, under ``shard_map`` that of a shard alone,
  unless ``tx`` itself joins them over the mapped axis. There, a state that
  every shard changes on its own must vary too: ``jax.lax.pcast(state,
  axis_name, to='varying')``; the shards' next states are then averaged.

  The rule need not be linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises: switch it off there with ``enabled=False``.

  Args:
    tx: any ``optax.GradientTransformation`` that keeps the shapes of what it
      updates and needs no extra argument (a loss is not known here): a chain,
      ``inject_hyperparams``, one that closes over traced numbers.

  Returns:
    An :class:`InBackward`: a function of ``(x, state=None)`` with ``init`` and
    ``unpack``. ``x`` is an array or a pytree; ``tx`` sees None in the place of
    leaves that are not floating or complex arrays.

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

    With one:

    >>> mounted = optax_ghm.in_backward(optax.trace(0.9))
    >>> x = jnp.ones(2)
    >>> state = mounted.init(x)
    >>> def loss(x, state):
    ...   return jnp.sum(mounted(x, state))
    >>> for _ in range(2):
    ...   grad, state_grad = jax.grad(loss, argnums=(0, 1))(x, state)
    ...   state = optax_ghm.overwrite_with_gradient(state, state_grad)
    >>> grad
    Array([1.9, 1.9], dtype=float32)
    >>> mounted.unpack(state, x).trace
    Array([1.9, 1.9], dtype=float32)
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f'tx must be an optax.GradientTransformation, got {tx!r}.')
  return InBackward(optax.with_extra_args_support(tx))


@identity
def _in_backward(update, cotangent, x, state, closed_over):
  updates, next_state = update(cotangent, state, x, closed_over)
  return updates, None, next_state, None


def _inexact_part(x):
  """None in the place of leaves that have no gradient."""
  return jax.tree.map(lambda leaf: leaf if arrays.is_inexact(leaf) else None, x)


def _types(tree):
  """Structure, shapes and dtypes, to compare and to print."""
  return jax.tree.map(lambda u: f'{u.dtype}{list(u.shape)}', tree)


def _open(f, *args):
  """``f`` as a function of what it closes over too, and that.

  A traced value of the loop, say, that a transformation closes over would be
  gone when the backward pass runs: it has to come in as an argument.
  """
  closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
  structure = jax.tree.structure(shape)

  def opened(*args_and_consts):
    *args, consts = args_and_consts
    leaves = jax.tree.leaves(args)
    return structure.unflatten(
      jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)
    )

  return opened, list(closed.consts)


def _cast_like(tree, like, name):
  """Casts and reshards to ``like``, which must have the same shapes."""
  shapes = [jax.tree.map(jnp.shape, t) for t in (tree, like)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'tx must keep the structure and shapes of its {name}: got {shapes[0]}'
      f' for {shapes[1]}.'
    )

  def cast(leaf, old):
    leaf = jnp.asarray(leaf).astype(old.dtype)
    sharding = jax.typeof(old).sharding
    if jax.typeof(leaf).sharding == sharding:
      return leaf
    return jax.sharding.reshard(leaf, sharding)

  return jax.tree.map(cast, tree, like)
