"""What every idea stands on: JAX, NumPy and Optax alone."""
