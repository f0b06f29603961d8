"""The type of transformations whose state users read."""

from typing import Any, Generic, Protocol, TypeVar

import optax

State_co = TypeVar('State_co', covariant=True)


class Init(Protocol[State_co]):
  """``init`` that returns such a state."""

  def __call__(self, params: optax.Params) -> State_co:
    """The state before the first step."""
    ...


class Update(Protocol[State_co]):
  """``update`` that returns such a state."""

  def __call__(
    self,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, State_co]:
    """The updates and the next state."""
    ...


class StatefulTransformation(
  optax.GradientTransformationExtraArgs, Generic[State_co]
):
  """A ``GradientTransformationExtraArgs`` that says which state it keeps.

  Type checkers then know the fields of the state, which Optax types as any
  tree of arrays.
  """

  # As Optax does with the type of ``update`` in the base class.
  init: Init[State_co]  # pyrefly: ignore[bad-override]
  update: Update[State_co]  # pyrefly: ignore[bad-override]
