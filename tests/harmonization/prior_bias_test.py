"""The bias of a last layer that starts at the prior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm as ghm

pytestmark = pytest.mark.device


def test_the_prior_bias_is_where_the_sigmoid_is_the_prior():
  prior = np.float32([1e-30, 1e-6, 0.01, 0.5, 0.999])
  bias = jax.jit(ghm.prior_bias)
  expected = np.log(prior.astype(float)) - np.log1p(-prior.astype(float))
  np.testing.assert_allclose(bias(prior), expected, rtol=1e-6, atol=1e-7)
  ends = bias(np.float32([0, 1, -2, 3, np.inf]))
  assert np.isfinite(ends).all() and (np.sign(ends) == [-1, 1, -1, 1, 1]).all()
  assert bias(jnp.bfloat16(0.25)).dtype == np.float32
  assert ghm.prior_bias(0.01).dtype == np.float32
  for wrong in (0, 1.0, -0.1, float('nan')):
    with pytest.raises(ValueError, match=r'probability must be in \(0, 1\)'):
      ghm.prior_bias(wrong)
