"""Lines of the library, each with a mistake that the tests must notice.

A mutant is one line that is subtly wrong: a sign, a bound, a sum over devices
that is missing, a mask that is dropped. Every mutant changes something that a
user could see: a number, a dtype, a verdict. ``python -m tests.mutants`` puts
them into the library one by one and runs the tests, which should fail.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
  """One mistake.

  Attributes:
    name: the place, and what goes wrong there.
    file: the path of the file within ``optax_ghm``.
    old: text that occurs exactly once in the file.
    new: what stands in its place.
  """

  name: str
  file: str
  old: str
  new: str


_CORE = [
  Mutant(
    'arrays: the divisor has no safe upper limit',
    '_core/arrays.py',
    '2.0**-120, 2.0**120',
    '2.0**-120, 2.0**127',
  ),
  Mutant(
    'arrays: a real factor leaves the imaginary part',
    '_core/arrays.py',
    'x.imag * factor',
    'x.imag',
  ),
  Mutant(
    'counters: a count overflows',
    '_core/counters.py',
    'optax.safe_increment(count)',
    'count + 1',
  ),
  Mutant(
    'identity: a gradient of the gradient loses the rule',
    '_core/identity.py',
    'return primitive(static, x, *residuals), residuals',
    'return x, residuals',
  ),
  Mutant(
    'masks: a weight that is NaN passes',
    '_core/masks.py',
    'jnp.where(weights > 0, weights, 0), shape',
    'jnp.where(weights < 0, 0, weights), shape',
  ),
  Mutant(
    'masks: a mask that fits the first and the last axis passes',
    '_core/masks.py',
    'missing > 0 and',
    'missing > 1 and',
  ),
  Mutant(
    'norms: tiny squares are not rescaled',
    '_core/norms.py',
    'total > 1e-30',
    'total >= 0',
  ),
  Mutant(
    'norms: the root has an infinite derivative at 0',
    '_core/norms.py',
    'positive = jnp.where(x == 0, 1, x)',
    'positive = x',
  ),
  Mutant(
    'norms: devices add squares of different units',
    '_core/norms.py',
    'total * jnp.square(here / unit)',
    'total',
  ),
  Mutant(
    'per_example: NaN of weight 0 is summed',
    '_core/per_example.py',
    'jnp.where(counts, update, 0)',
    'jnp.where(counts, update, update)',
  ),
  Mutant(
    'scopes: values of attention have no fan-in of their own',
    '_core/scopes.py',
    "('query', 'key', 'value')",
    "('query', 'key')",
  ),
  Mutant(
    'scopes: sizes are those of one device',
    '_core/scopes.py',
    'arrays.psum(jnp.asarray(sizes), axis_name)',
    'jnp.asarray(sizes)',
  ),
  Mutant(
    'scopes: a factor of 0 lets NaN through',
    '_core/scopes.py',
    'jnp.where(own > 0, scaled, 0)',
    'scaled',
  ),
  Mutant(
    'softmax: the label -1 is the last class',
    '_core/softmax_cross_entropy.py',
    'labels < 0,',
    'labels < -1,',
  ),
  Mutant(
    'update_where: an update that is also state keeps its old value',
    '_core/update_where.py',
    'jaxpr.outvars.count(var) == 1',
    'jaxpr.outvars.count(var) > 0',
  ),
]

_BACKWARD = [
  Mutant(
    'float_state: the mean of integers loses its high word',
    'backward/_float_state.py',
    'remainder * 2**16 + low',
    'low',
  ),
  Mutant(
    'in_backward: states of several calls are not averaged',
    'backward/_in_backward.py',
    'jnp.where(state.calls > 0, state.calls, 1)',
    'jnp.ones_like(state.calls)',
  ),
  Mutant(
    'in_backward: the transformation gets the cotangent for the input',
    'backward/_in_backward.py',
    'self.unpack(state, floats), floats',
    'self.unpack(state, floats), cotangent',
  ),
  Mutant(
    'overwrite: a state that was not used becomes 0',
    'backward/_overwrite.py',
    'gradient.calls > 0',
    'gradient.calls >= 0',
  ),
  Mutant(
    'overwrite: apply_gradients drops the additional arguments',
    'backward/_overwrite.py',
    "variables['params'], **extra_args",
    "variables['params']",
  ),
]

_HARMONIZATION = [
  Mutant(
    'adjust_logits: a class without an example counts as the rarest other',
    'harmonization/_adjust_logits.py',
    'jnp.min(_or(counts, 1), initial=1) / 2',
    'jnp.min(_or(counts, 1), initial=1)',
  ),
  Mutant(
    'aggregate: examples without harmony are in the average',
    'harmonization/_aggregate.py',
    'jnp.where(harmony > 0, amount, 0)',
    'jnp.where(harmony >= 0, amount, 0)',
  ),
  Mutant(
    'binned: a norm at an edge is in the bin below',
    'harmonization/_binned.py',
    'norms >= _density',
    'norms > _density',
  ),
  Mutant(
    'class_counts: every batch counts the same, however large',
    'harmonization/_class_counts.py',
    'rate = examples / jnp.where(seen, total, 1)',
    'rate = 1 / (1 + jnp.sign(self.examples) * decay)',
  ),
  Mutant(
    'class_counts: examples of no class do not count',
    'harmonization/_class_counts.py',
    'jnp.sum(cells[: classes + 1])',
    'jnp.sum(cells[:classes])',
  ),
  Mutant(
    'density: norms at the end of the range are counted as above it',
    'harmonization/_density.py',
    'state.above_range + cells[last + 2]',
    'state.above_range + cells[last + 1]',
  ),
  Mutant(
    'density: an empty batch makes the memory fade',
    'harmonization/_density.py',
    'jnp.where(total > 0, self.momentum, 1.0)',
    'jnp.where(total >= 0, self.momentum, 1.0)',
  ),
  Mutant(
    'density: regions never seen have density 0 in evaluation',
    'harmonization/_density.py',
    'jnp.where(seen, density, least)',
    'density',
  ),
  Mutant(
    'density: the memory is that of a batch of another size',
    'harmonization/_density.py',
    'total / nonzero(jnp.sum(running))',
    'jnp.sign(total)',
  ),
  Mutant(
    'exact: windows at the low end reach down to 0',
    'harmonization/_exact.py',
    'jnp.minimum(half, g - self.low)',
    'jnp.minimum(half, g)',
  ),
  Mutant(
    'exact: norms up to half a window above count as above the range',
    'harmonization/_exact.py',
    'norm - half > self.high',
    'norm > self.high',
  ),
  Mutant(
    'harmonize: the mean is over one device',
    'harmonization/_harmonize.py',
    "arrays.psum(count, axis_name) if reduction == 'mean'",
    "count if reduction == 'mean'",
  ),
  Mutant(
    'harmonize: a cotangent that is masked out can be NaN',
    'harmonization/_harmonize.py',
    'jnp.where(counts, weighed, jnp.zeros_like(weighed))',
    'jnp.where(counts, weighed, weighed)',
  ),
  Mutant(
    'loss_per_positive: the average starts at 0',
    'harmonization/_loss_per_positive.py',
    'self.positives / _density.nonzero(self.evidence)',
    'self.positives',
  ),
  Mutant(
    'losses: 16-bit logits are computed with as they are',
    'harmonization/_losses.py',
    'return x.astype(arrays.at_least_float32(x.dtype))',
    'return x',
  ),
  Mutant(
    'mmdetection: empty bins fade',
    'harmonization/_mmdetection.py',
    'jnp.where(occupied, decayed, state.histogram)',
    'decayed',
  ),
  Mutant(
    'prior_bias: a share of 1 has an infinite bias',
    'harmonization/_prior_bias.py',
    'limits.tiny, 1 - limits.epsneg',
    'limits.tiny, 1',
  ),
  Mutant(
    'sigmoid: the derivative by the label at infinity is NaN',
    'harmonization/_sigmoid_loss.py',
    '_losses.finite(logits) * d_labels',
    'logits * d_labels',
  ),
  Mutant(
    'sigmoid: the second derivative is wrong',
    'harmonization/_sigmoid_loss.py',
    'p * (1 - p) * d_logits',
    'p * p * d_logits',
  ),
  Mutant(
    'asl1: the derivative by mu lacks a factor',
    'harmonization/_authentic_smooth_l1_loss.py',
    '-slope * (t / (root + 1))',
    '-slope * t',
  ),
  Mutant(
    'asl1: the second derivative of large errors is that of the bound',
    'harmonization/_authentic_smooth_l1_loss.py',
    '1 / jnp.maximum(root, jnp.abs(difference / mu))',
    '1 / root',
  ),
  Mutant(
    'softmax: logits that are masked out can be NaN',
    'harmonization/_softmax_loss.py',
    '_losses.keep(logits, amounts), _losses',
    'logits, _losses',
  ),
  Mutant(
    'weights: gradients flow through the harmony',
    'harmonization/_weights.py',
    'lax.stop_gradient((norms, amounts, state))',
    '(norms, amounts, state)',
  ),
  Mutant(
    'windowed: windows at the ends have the full length',
    'harmonization/_windowed.py',
    'np.maximum(center - half, 0)',
    '(center - half)',
  ),
  Mutant(
    'windowed: a window has no parts of cells',
    'harmonization/_windowed.py',
    '(inner + part * outer)',
    'inner',
  ),
]

_CONFLICT = [
  Mutant(
    'gh: both branches have the same share of the angle',
    'conflict/_gh.py',
    'jnp.sin((excess - first) / 2)',
    'jnp.sin(first / 2)',
  ),
  Mutant(
    'gh: opposite gradients are at twice the angle',
    'conflict/_gh.py',
    'excess, math.pi / 2)',
    'excess, math.pi)',
  ),
  Mutant(
    'gramian: the products are those of one device',
    'conflict/_gramian.py',
    'return arrays.psum(total, axis_name)',
    'return total',
  ),
  Mutant(
    'gramian: a bad gradient has a share of the mean',
    'conflict/_gramian.py',
    'count = self.finite.astype(self.norms.dtype)',
    'count = jnp.ones_like(self.norms)',
  ),
  Mutant(
    'minimum: what is at the boundary stays a little inside',
    'conflict/_minimum.py',
    'inside = (x > 0).astype(x.dtype)',
    'inside = jnp.ones_like(x)',
  ),
  Mutant(
    'upgrad: gains go to the wrong gradients',
    'conflict/_upgrad.py',
    'gains.T',
    'gains',
  ),
  Mutant(
    'dualproj: a gain is not in units of the longest',
    'conflict/_dualproj.py',
    'unit * gains',
    'gains',
  ),
  Mutant(
    'cagrad: the circle is as large as the longest gradient',
    'conflict/_cagrad.py',
    'c * unit * size',
    'c * unit',
  ),
  Mutant(
    'mgda: a gradient of 0 does not end the descent',
    'conflict/_mgda.py',
    'jnp.any(vanished > 0)',
    'jnp.any(vanished > 1)',
  ),
  Mutant(
    'pcgrad: the others have dodged before',
    'conflict/_pcgrad.py',
    'of.cosines[others]',
    'of.cosines[others[::-1]]',
  ),
  Mutant(
    'config: as long as the longest gradient',
    'conflict/_config.py',
    'jnp.sum(of.norms * reached)',
    'jnp.max(of.norms * reached)',
  ),
  Mutant(
    'aggregate: the average begins at 0',
    'conflict/_aggregate.py',
    'moved = jnp.where(jnp.outer(begun, begun), moved, gramian)',
    'moved = moved',
  ),
  Mutant(
    'aggregate: a conflict of the average counts',
    'conflict/_aggregate.py',
    'jnp.any(now.cosines < 0)',
    'jnp.any(_gramian.directions(average).cosines < -0.5)',
  ),
  Mutant(
    'fork: a branch that is not used has a gradient',
    'conflict/_fork.py',
    'jnp.zeros_like(used)',
    'jnp.ones_like(used)',
  ),
  Mutant(
    'scalarizers: the weights of FAMO have a gradient',
    'conflict/_scalarizers.py',
    'jax.lax.stop_gradient(z / jnp.sum(z / losses))',
    'z / jnp.sum(z / losses)',
  ),
]

_REVERSAL = [
  Mutant(
    'conditioning: both projections are of one key',
    'reversal/_conditioning.py',
    'jax.random.normal(two,',
    'jax.random.normal(one,',
  ),
  Mutant(
    'conditioning: gradients flow through the entropy',
    'reversal/_conditioning.py',
    'jax.lax.stop_gradient(logits)',
    'logits',
  ),
  Mutant(
    'conditioning: a class that is ruled out makes the weight 0',
    'reversal/_conditioning.py',
    'jnp.where(p == 0, 0, p * log_p)',
    'p * log_p',
  ),
  Mutant(
    'domain_loss: the first domain that does not exist counts',
    'reversal/_domain_loss.py',
    'domains < count',
    'domains <= count',
  ),
  Mutant(
    'domain_loss: a domain without weight is divided by 0',
    'reversal/_domain_loss.py',
    'jnp.where(total == 0, 1, total)',
    'total',
  ),
  Mutant(
    'reverse_gradient: the scale is over the last axes',
    'reversal/_reverse_gradient.py',
    'range(factor.ndim, leaf.ndim)',
    'range(leaf.ndim - factor.ndim)',
  ),
  Mutant(
    'schedules: the rise ignores where it begins',
    'reversal/_schedules.py',
    '(peak_value - init_value) * rise',
    'peak_value * rise',
  ),
  Mutant(
    'schedules: steps beyond 2**24 are rounded',
    'reversal/_schedules.py',
    'count = count.astype(jnp.int32)',
    'count = count.astype(jnp.float32)',
  ),
  Mutant(
    'predictions: what the mask hides is summed',
    'reversal/_predictions.py',
    'jnp.sum(x, 0, where=jnp.expand_dims(mask, range(1, x.ndim)))',
    'jnp.sum(x, 0)',
  ),
  Mutant(
    'predictions: a broken model looks sure',
    'reversal/_predictions.py',
    'jnp.where(finite, logits, 0).astype',
    'jnp.where(finite, logits, jnp.arange(logits.shape[1]) * 99.0).astype',
  ),
  Mutant(
    'soft neighborhood density: an example is its own neighbor',
    'reversal/_soft_neighborhood_density.py',
    ' & (index != i)',
    '',
  ),
  Mutant(
    'importance weighting: no control variate',
    'reversal/_importance_weighting.py',
    'risk = mean + eta * (jnp.mean(ratios) * largest - 1)',
    'risk = mean',
  ),
  Mutant(
    'importance weighting: the bias is penalized',
    'reversal/_importance_weighting.py',
    '.at[-1].set(0)',
    '',
  ),
  Mutant(
    'mixval: both kinds of mixtures are one',
    'reversal/_mixval.py',
    'jnp.stack([mixed.same_class, ~mixed.same_class])',
    'jnp.ones((2, *mixed.same_class.shape), bool)',
  ),
]

_CALIBRATION = [
  Mutant(
    'calibrated: one good group is enough for a step',
    'calibration/_calibrated.py',
    'jnp.all(clip_state.factor > 0)',
    'jnp.any(clip_state.factor > 0)',
  ),
  Mutant(
    'clip: resets one outlier too late',
    'calibration/_clip.py',
    'outliers_in_a_row >= RESET_AFTER',
    'outliers_in_a_row > RESET_AFTER',
  ),
  Mutant(
    'clip: an infinite norm is an outlier in a row',
    'calibration/_clip.py',
    'outlier &= finite',
    'outlier &= True',
  ),
  Mutant(
    'clip: statistics learn from outliers',
    'calibration/_clip.py',
    '(norm > 0) & ~outlier',
    '(norm > 0)',
  ),
  Mutant(
    'fixed_clips: epsilon is added to the norm of the parameters',
    'calibration/_fixed_clips.py',
    'jnp.maximum(norm, jnp.asarray(eps, jnp.float32))',
    'norm + jnp.asarray(eps, jnp.float32)',
  ),
  Mutant(
    'noise_scale: one gradient has a variance',
    'calibration/_noise_scale.py',
    'count > 1)',
    'count > 0)',
  ),
  Mutant(
    'noise_scale: squares are those of one device',
    'calibration/_noise_scale.py',
    'arrays.psum(jnp.sum(shares * squares), axis_name)',
    'jnp.sum(shares * squares)',
  ),
  Mutant(
    'noise_scale: the average forgets the first steps too slowly',
    'calibration/_noise_scale.py',
    'jnp.maximum(plain, 1 - ',
    'jnp.minimum(plain, 1 - ',
  ),
  Mutant(
    'norm_ema: the average begins at the last norm, not the least',
    'calibration/_norm_ema.py',
    'jnp.minimum(average, clipped)',
    'clipped',
  ),
  Mutant(
    'norm_ema: the least norm so far is the reference at first',
    'calibration/_norm_ema.py',
    'jnp.maximum(average, first)',
    'average',
  ),
  Mutant(
    'normalize: the rounding of the mean is left',
    'calibration/_normalize.py',
    'range(2)',
    'range(1)',
  ),
  Mutant(
    'normalize: the mean is that of one device',
    'calibration/_normalize.py',
    'jax.lax.pmean(mean, axis_name)',
    'mean',
  ),
  Mutant(
    'percentile: the norm of this step is in the reference',
    'calibration/_percentile.py',
    '_at(statistics.ranked,',
    '_at(new.ranked,',
  ),
  Mutant(
    'percentile: a norm at the estimate counts as above',
    'calibration/_percentile.py',
    'norm <= threshold',
    'norm < threshold',
  ),
  Mutant(
    'attention: hidden and negative logits count by their size',
    'calibration/_attention.py',
    'max_logits = jnp.max(measured, others)',
    'max_logits = jnp.max(jnp.abs(measured), others)',
  ),
  Mutant(
    'attention: the largest logits are those of one device',
    'calibration/_attention.py',
    'jax.lax.pmax(max_logits, axis_name)',
    'max_logits',
  ),
  Mutant(
    'qk_clip: the head of a key follows the last of its group',
    'calibration/_qk_clip.py',
    'jnp.min(gamma.reshape(*stack, kv_heads, -1), -1)',
    'gamma.reshape(*stack, kv_heads, -1)[..., -1]',
  ),
  Mutant(
    'qk_clip: the step itself is not scaled',
    'calibration/_qk_clip.py',
    'new = old + arrays.widen(before[path]).astype(old.dtype)',
    'new = arrays.widen(before[path]).astype(old.dtype)',
  ),
  Mutant(
    'range_test: a rise above the lowest loss is a divergence',
    'calibration/_range_test.py',
    'curve[0] + 3 * error',
    'curve[lowest] + 3 * error',
  ),
  Mutant(
    'skip_spikes: the deviation is divided by the count',
    'calibration/_skip_spikes.py',
    'jnp.maximum(count - 1, 1)',
    'jnp.maximum(count, 1)',
  ),
  Mutant(
    'skip_spikes: steps that are not finite count in a row',
    'calibration/_skip_spikes.py',
    'counters.count_if(finite, state.skipped_in_a_row)',
    'counters.count_if(True, state.skipped_in_a_row)',
  ),
  Mutant(
    'skip_spikes: norms of 0 enter the window',
    'calibration/_skip_spikes.py',
    'taken & (norm > 0), reset',
    'taken, reset',
  ),
  Mutant(
    "zscore: the first steps do not follow Welford's rule",
    'calibration/_zscore.py',
    'jnp.where(warm, jnp.abs(clipped - mean), to_new)',
    'to_new',
  ),
]

_BATCH_NORMALIZATION = [
  Mutant(
    'batch_norm: epsilon is a lower limit in inference',
    'batch_normalization/_batch_norm.py',
    'jax.lax.rsqrt(var + epsilon)',
    'jax.lax.rsqrt(jnp.maximum(var, epsilon))',
  ),
  Mutant(
    'fold: the bias has not the dtype of the kernel',
    'batch_normalization/_fold.py',
    'shift.astype(kernel.dtype)',
    'shift',
  ),
  Mutant(
    'ghost: moments are those of one device',
    'batch_normalization/_ghost.py',
    'pool(axis=0, axis_name=axis_name)',
    'pool(axis=0)',
  ),
  Mutant(
    'moments: two empty batches merge to NaN',
    'batch_normalization/_moments.py',
    'other.count / jnp.maximum(count, 1)',
    'other.count / count',
  ),
  Mutant(
    'normalize: the gradient forgets the rounding of the mean',
    'batch_normalization/_normalize.py',
    'sum_dy_x - mean_error * sum_dy',
    'sum_dy_x',
  ),
  Mutant(
    'normalize: NaN that is masked out reaches the gradient',
    'batch_normalization/_normalize.py',
    'None if mask is None else mask | (dy != 0)',
    'None',
  ),
  Mutant(
    'normalize: the gradient of the scale lacks the shift',
    'batch_normalization/_normalize.py',
    'r * rstd * sum_dy_x + d * sum_dy',
    'r * rstd * sum_dy_x',
  ),
  Mutant(
    'normalize: renormalization has no lower limit',
    'batch_normalization/_normalize.py',
    'jnp.clip(r, 1 / renorm.r_max, renorm.r_max)',
    'jnp.minimum(r, renorm.r_max)',
  ),
  Mutant(
    'pool: NaN of one domain reaches the others',
    'batch_normalization/_pool.py',
    'lambda: together, apart',
    'lambda: together, lambda: together',
  ),
  Mutant(
    'pool: the variance has the rounding of the mean in it',
    'batch_normalization/_pool.py',
    'squares / divisor - jnp.square(error)',
    'squares / divisor',
  ),
  Mutant(
    'pool: the domain -1 is a domain',
    'batch_normalization/_pool.py',
    '(self.members >= 0) & (self.members < self.groups)',
    'self.members < self.groups',
  ),
  Mutant(
    'recalibrate: the mask is dropped',
    'batch_normalization/_recalibrate.py',
    'norm.axis_name, mask, *domains',
    'norm.axis_name, None, *domains',
  ),
  Mutant(
    'renorm: the shift widens until too late',
    'batch_normalization/_renorm.py',
    'max(d_end - start, 1)',
    'max(d_end, 1)',
  ),
  Mutant(
    'running_moments: features without a count are averaged',
    'batch_normalization/_running_moments.py',
    '(moments.count > 0) & ',
    '',
  ),
  Mutant(
    'running_moments: gradients flow through the averages',
    'batch_normalization/_running_moments.py',
    'jax.lax.stop_gradient((moments.mean, moments.variance(unbiased)))',
    '(moments.mean, moments.variance(unbiased))',
  ),
  Mutant(
    'running_moments: a batch that is left out adds weight',
    'batch_normalization/_running_moments.py',
    'jnp.where(seen, weight, old.weight)',
    'weight',
  ),
  Mutant(
    'stats: a ratio below 1 / r_max is not clipped',
    'batch_normalization/_stats.py',
    'jnp.abs(log_r) > jnp',
    'log_r > jnp',
  ),
  Mutant(
    'step: the schedules stand still',
    'batch_normalization/_step.py',
    "optax.safe_increment(state['steps'])",
    "state['steps']",
  ),
]

_FLOW = [
  Mutant(
    'diagnose: no gradient is also small updates',
    'flow/_diagnose.py',
    "if 'no gradient' in kinds:",
    "if 'disconnected' in kinds:",
  ),
  Mutant(
    'markdown: a bar in a name begins a column',
    'flow/_markdown.py',
    '*<|',
    '*<',
  ),
  Mutant(
    'rules_loss: a dead network has recovered',
    'flow/_rules_loss.py',
    'rise >= MAX_RISE and lasting >= FELL_BACK',
    'rise >= MAX_RISE and lasting >= MAX_RISE',
  ),
  Mutant(
    'tap: of the arrays of one call, the last one counts',
    'flow/_tap.py',
    'functools.reduce(_merge, used)',
    'used[-1]',
  ),
  Mutant(
    'page: the name of a record is read as HTML',
    'flow/_page.py',
    '{html.escape(name)}</h2>',
    '{name}</h2>',
  ),
  Mutant(
    'record: the first bad step can be thinned away',
    'flow/_record.py',
    's is first_bad or s.index',
    's.index',
  ),
  Mutant(
    'record: a step can be added twice',
    'flow/_record.py',
    'step <= last[0].number',
    'step < last[0].number',
  ),
  Mutant(
    'record_file: pickles are read',
    'flow/_record_file.py',
    'allow_pickle=False',
    'allow_pickle=True',
  ),
  Mutant(
    'rules_batch_norm: the deviation may drift',
    'flow/_rules_batch_norm.py',
    'for median in medians.values()], axis=0)',
    'for median in list(medians.values())[:1]], axis=0)',
  ),
  Mutant(
    'rules_conflict: a few steps make a conflict',
    'flow/_rules_conflict.py',
    'MIN_SHARE = 0.75',
    'MIN_SHARE = 0.5',
  ),
  Mutant(
    'accepts: other losses can follow',
    'flow/_accepts.py',
    'losses not in (0, len(state.weights))',
    'losses < 0',
  ),
  Mutant(
    'rules_depth: a trend need not be a line',
    'flow/_rules_depth.py',
    ' or r2 < MIN_R2',
    '',
  ),
  Mutant(
    'rules_finite: blames the first bad layer, not the last',
    'flow/_rules_finite.py',
    'np.flatnonzero(bad)[-1]',
    'np.flatnonzero(bad)[0]',
  ),
  Mutant(
    'rules_finite: a layer of a stack explains the whole parameter',
    'flow/_rules_finite.py',
    "'[' not in layer.name and ",
    '',
  ),
  Mutant(
    'rules_updates: half of the units may be dead',
    'flow/_rules_updates.py',
    'share >= MAX_DEAD_SHARE',
    'share > MAX_DEAD_SHARE',
  ),
  Mutant(
    'rules_updates: norms that vary much have spikes',
    'flow/_rules_updates.py',
    'SPIKE_SIGMAS * sigma',
    '0 * sigma',
  ),
  Mutant(
    'tap: two arrays of one call are two calls',
    'flow/_tap.py',
    "total.numbers.at[COLUMNS.index('calls')].set(1)",
    'total.numbers',
  ),
  Mutant(
    'tap: squares of large numbers overflow',
    'flow/_tap.py',
    'largest > 2.0**40',
    'largest > 2.0**100',
  ),
  Mutant(
    'tap: infinity is in the histogram',
    'flow/_tap.py',
    'magnitude < jnp.inf',
    'magnitude <= jnp.inf',
  ),
  Mutant(
    'taps: a stack within a stack comes first',
    'flow/_taps.py',
    'min(around, key=len',
    'max(around, key=len',
  ),
  Mutant(
    'watch: a unit is dead one step too late',
    'flow/_units.py',
    '>= DEAD_AFTER',
    '> DEAD_AFTER',
  ),
  Mutant(
    'watch: steps without a gradient need not be in a row',
    'flow/_units.py',
    'zero_steps + 1, 0',
    'zero_steps + 1, zero_steps',
  ),
  Mutant(
    'watch: units of a transposed kernel are taken for a stack',
    'flow/_units.py',
    'is_kernel and stack + len(axes) == leaf.ndim',
    'False',
  ),
  Mutant(
    'watch: complex products are not conjugated',
    'flow/_watch.py',
    'x.astype(dtype).conj()',
    'x.astype(dtype)',
  ),
]

_LINEN = [
  Mutant(
    'linen batch_norm: init changes the running averages',
    'linen/_batch_norm.py',
    'update and not initializing',
    'update',
  ),
  Mutant(
    'linen batch_norm: features are in the order of axis',
    'linen/_batch_norm.py',
    'sorted(a % x.ndim for a in axes)',
    'tuple(a % x.ndim for a in axes)',
  ),
  Mutant(
    'linen harmonize: drops the mask',
    'linen/_harmonize.py',
    'mask=mask,',
    'mask=None,',
  ),
  Mutant(
    'linen in_backward: cannot be disabled with a state',
    'linen/_in_backward.py',
    'state.value, enabled=enabled',
    'state.value',
  ),
  Mutant(
    'linen recalibrate: the last batch is the whole data set',
    'linen/_recalibrate.py',
    'before.merge(moments)',
    'moments',
  ),
  Mutant(
    'linen tapped: a bias is a kernel',
    'linen/_tapped.py',
    "getattr(p, 'ndim', 0) > 1",
    "getattr(p, 'ndim', 0) > 0",
  ),
]

_NNX = [
  Mutant(
    'nnx batch_norm: always updates the running averages',
    'nnx/_batch_norm.py',
    'update=update,',
    'update=True,',
  ),
  Mutant(
    'nnx harmonize: drops the weights',
    'nnx/_harmonize.py',
    'weights=weights,',
    'weights=None,',
  ),
  Mutant(
    'nnx overwrite: apply_gradients drops the additional arguments',
    'nnx/_overwrite.py',
    'params, **extra_args',
    'params',
  ),
  Mutant(
    'nnx value_and_grad: differentiates by the parameters alone',
    'nnx/_value_and_grad.py',
    'nnx.split(args[i], wrt, ...)',
    'nnx.split(args[i], nnx.Param, ...)',
  ),
  Mutant(
    'nnx recalibrate: every batch has the same dropout',
    'nnx/_recalibrate.py',
    'nnx.Any(_Moments, nnx.RngState)',
    '_Moments',
  ),
  Mutant(
    'weights: robustness mutes what is easy',
    'harmonization/_weights.py',
    '_power(1 - share, robust)',
    '_power(share, robust)',
  ),
  Mutant(
    'weights: nothing is left at the end of the range',
    'harmonization/_weights.py',
    'LEAST_SHARE, 1 - LEAST_SHARE)',
    '0.0, 1.0)',
  ),
  Mutant(
    'density: a region that is left decays until it overflows',
    'harmonization/_density.py',
    'least = 1e-12 *',
    'least = 0 *',
  ),
  Mutant(
    'skip_spikes: every device decides by its own loss',
    'calibration/_skip_spikes.py',
    'return jax.lax.pmean(value, axis_name)',
    'return value',
  ),
  Mutant(
    'update_where: NaN of float16 is not looked for',
    '_core/update_where.py',
    '== jnp.float16',
    '== jnp.float64',
  ),
  Mutant(
    'rules_updates: a warm-up is too small',
    'flow/_rules_updates.py',
    'WARM_UP_POWER = 0.5',
    'WARM_UP_POWER = 50.0',
  ),
  Mutant(
    'rules_finite: a start at zero is an illness',
    'flow/_rules_finite.py',
    'ENOUGH_ZEROS = 5',
    'ENOUGH_ZEROS = 1',
  ),
  Mutant(
    'nnx tapped: a stack of biases is a kernel',
    'nnx/_tapped.py',
    ' - len(stack) for',
    ' for',
  ),
]

MUTANTS = [
  *_CORE,
  *_BACKWARD,
  *_HARMONIZATION,
  *_CONFLICT,
  *_REVERSAL,
  *_CALIBRATION,
  *_BATCH_NORMALIZATION,
  *_FLOW,
  *_LINEN,
  *_NNX,
]
