"""The minimum of a quadratic function where no element is negative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from optax_ghm._core import arrays, trees

ITERATIONS = 20
"""Twelve reach rounding for most matrices, and twenty for all that were tried:
up to 64 losses, with norms that span six decades."""

TO_BOUNDARY = 0.99
"""The part of the way to the boundary that an iteration may go."""

REGULARIZATION = 1e-6
"""Of the Hessian, relative to its trace: it slows directions in which the
function is flat, and does not move the minimum."""

SMALLEST = 1e-12
"""What an element is at least, so that none is stuck at the boundary."""

UNROLLED = 3
"""Up to so many unknowns, calls of LAPACK would cost more than the work."""


def quadratic(
  matrix: jax.Array,
  vector: jax.Array,
  normal: jax.Array | None = None,
) -> jax.Array:
  r"""The minimum of :math:`f = x^T M x / 2 + v^T x` over :math:`x \ge 0`.

  With a normal n, it is the minimum where also :math:`n \cdot x = 1`. Its
  conditions, with multipliers s and t, are

  .. math::
    M x + v - t n = s, \qquad x_i s_i = 0, \qquad x, s \ge 0 .

  Every iteration is a step of Newton's method towards :math:`x_i s_i = \mu`,
  once to predict how small μ can be, and once with a correction (Mehrotra 1992;
  Nocedal & Wright, Numerical Optimization, 2006, algorithm 16.4; Colombo &
  Gondzio 2008 for the length of the correction). Their number is fixed, so that
  it can be compiled and batched.

  Args:
    matrix: (m, m), M, positive semidefinite, with elements of about 1.
    vector: (m,), v, of about 1.
    normal: (m,), n, not negative; None for x of any size.

  Returns:
    x, with exact zeros on the boundary, differentiable as :func:`at_minimum`.
  """

  def slope(x, matrix, vector):
    return arrays.contract(matrix, x) + vector, matrix

  fixed = jax.lax.stop_gradient((matrix, vector, normal))
  return at_minimum(slope, (matrix, vector), _solved(*fixed), normal)


def at_minimum(
  slope: Callable[..., tuple[jax.Array, jax.Array]],
  arguments: tuple[Any, ...],
  x: jax.Array,
  normal: jax.Array | None,
) -> jax.Array:
  """A minimum x, with the derivatives that a step of Newton's method has.

  Args:
    slope: from x and the arguments to the gradient and the Hessian of the
      function at x.
    arguments: those of the function, by which x is differentiable.
    x: (m,), where the function is least, with zeros on the boundary.
    normal: (m,), with which x has the product 1; None for x of any size.

  Returns:
    x.
  """
  x = jax.lax.stop_gradient(x)
  inside = (x > 0).astype(x.dtype)
  gradient, hessian = slope(x, *arguments)
  hessian = jax.lax.stop_gradient(hessian) * jnp.outer(inside, inside)
  t = jax.lax.stop_gradient(jnp.sum(x * gradient))
  if normal is not None:
    normal *= inside
  dx, _ = _newton(x, hessian, 1 - inside, normal)(-inside * gradient, t)
  dx = jnp.where(jnp.isfinite(dx), dx, 0)
  return x + dx - jax.lax.stop_gradient(dx)


def _solved(matrix, vector, normal):
  def iterate(carry, _):
    x, s, t = carry
    gradient = arrays.contract(matrix, x) + vector
    newton = _newton(x, matrix, s / x, normal)

    def direction(products):
      dx, dt = newton(products / x - gradient + s, t)
      return dx, (products - s * dx) / x, dt

    dx, ds, _ = direction(-x * s)
    length = jnp.minimum(1, _length(x, dx, s, ds))
    now = jnp.mean(x * s)
    reached = jnp.mean((x + length * dx) * (s + length * ds))
    target = jnp.clip(reached, 0, now)
    # The correction is as long as the step that was found possible.
    dx, ds, dt = direction(target - x * s - length**2 * dx * ds)
    length = jnp.minimum(1, TO_BOUNDARY * _length(x, dx, s, ds))
    new = (
      jnp.maximum(x + length * dx, SMALLEST),
      jnp.maximum(s + length * ds, SMALLEST),
      t + length * dt,
    )
    # Where gradients cancel, rounding may leave a matrix without a root.
    fine = jnp.all(jnp.isfinite(new[0]))
    return trees.select(fine, new, carry), None

  ones = jnp.ones_like(vector)
  start = ones if normal is None else ones / jnp.sum(normal)
  carry = start, ones, jnp.zeros_like(ones[0])
  (x, s, _), _ = jax.lax.scan(iterate, carry, length=ITERATIONS)
  return jnp.where(x > s, x, 0)


def _newton(x, hessian, diagonal, normal):
  """The step to solve H dx = right + (t + dt) n, with n (x + dx) = 1."""
  if normal is not None:  # n n' is no change where n dx is what it must be
    hessian += jnp.outer(normal, normal)
  diagonal += REGULARIZATION * jnp.trace(hessian)
  solve = _solver(hessian + jnp.diag(diagonal))

  def step(right, t):
    if normal is None:
      return solve(right), jnp.zeros_like(t)
    dx, along = solve(right + t * normal), solve(normal)
    missing = 1 - jnp.sum(normal * x)
    size = jnp.sum(normal * along)
    multiple = missing - jnp.sum(normal * dx)
    multiple /= jnp.where(size > 0, size, 1)
    return dx + multiple * along, multiple - missing

  return step


def _solver(matrix):
  """Solves linear equations, with the matrix scaled to a diagonal of 1."""
  scale = jax.lax.rsqrt(jnp.diagonal(matrix))
  matrix *= jnp.outer(scale, scale)
  if len(matrix) <= UNROLLED:
    solve = _unrolled_solver(matrix)
  else:
    factor = jnp.linalg.cholesky(matrix)
    solve = functools.partial(cho_solve, (factor, True))
  return lambda right: scale * solve(scale * right)


def _unrolled_solver(matrix):
  """By Cholesky's factors, number by number, so that XLA makes one loop."""
  m = len(matrix)
  lower, inverse = [[] for _ in range(m)], []

  def without(number, ones, others):
    return number - sum(a * b for a, b in zip(ones, others, strict=True))

  for j in range(m):
    inverse.append(jax.lax.rsqrt(without(matrix[j, j], lower[j], lower[j])))
    for i in range(j + 1, m):
      rest = without(matrix[i, j], lower[i], lower[j])
      lower[i].append(rest * inverse[j])

  def solve(right):
    y, x = [], []
    for i in range(m):
      y.append(without(right[i], lower[i], y) * inverse[i])
    for i in reversed(range(m)):
      column = [lower[k][i] for k in reversed(range(i + 1, m))]
      x.append(without(y[i], column, x) * inverse[i])
    return jnp.stack(x[::-1])

  return solve


def _length(x, dx, s, ds):
  """How many steps it is to the boundary."""
  now, change = jnp.concatenate([x, s]), jnp.concatenate([dx, ds])
  falls = change < 0
  lengths = -now / jnp.where(falls, change, -1)
  return jnp.min(jnp.where(falls, lengths, jnp.inf))
