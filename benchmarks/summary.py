"""README's table, from the results of a run.

python benchmarks/summary.py [NAME]
"""

import json
import pathlib
import sys

RESULTS = pathlib.Path(__file__).parent / 'results'
ROWS = (
  ('losses: sigmoid, examples = 1,000,000', 'sigmoid_ghm_loss, windowed'),
  (
    'losses: sigmoid, examples = 1,000,000',
    'harmonize before optax cross-entropy',
  ),
  (
    'losses: softmax, 10,000 examples, classes = 100',
    'softmax_ghm_loss_with_integer_labels',
  ),
  ('losses: regression, 1,000,000 numbers', 'smooth_l1_ghm_loss'),
  (
    'per_example: AdamW on per-example gradients, batch = 64',
    'harmonized_aggregate',
    'optax.differentially_private_aggregate',
  ),
  ('backward: reversal in a training step', 'reverse_gradient'),
  (
    'backward: in_backward(scale_by_adam), numbers = 10,000,000',
    'in_backward(optax.*)',
  ),
  ('domains: two branches, six layers of 512, batch 512', 'harmonized_fork'),
  ('clipping: transformer, 196 leaves', 'clip_by_zscore'),
  ('clipping: transformer, 196 leaves', 'clip_by_parameter_norm'),
  (
    'clipping: transformer, 196 leaves',
    'calibrated',
    'optax.apply_if_finite',
  ),
  ('clipping: transformer, 196 leaves', 'skip_spikes', 'optax.apply_if_finite'),
  ('batch_norm: float32 (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
  ('batch_norm: bfloat16 (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
  ('flow: transformer, 6 x 256, 16 sequences of 64', 'taps'),
  ('flow: transformer, 6 x 256, 16 sequences of 64', 'watch'),
  ('torch: losses, examples = 1,000,000', 'sigmoid_ghm_loss, windowed'),
  ('torch: transformer, 196 leaves', 'calibrated, AdamW'),
  ('torch: batch norm, (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
)


def table(report):
  """Ratios to what is named as the peer, or to the case's first program."""
  lines = [
    '| | against | time | to the limit | memory |',
    '|---|---|---|---|---|',
  ]
  for case, program, *peer in ROWS:
    rows = report['cases'][case]
    name = peer[0] if peer else next(iter(rows))
    row, other = rows[program], rows[name]
    limit = f'{row["limit_ratio"]:.2f}' if 'limit_ratio' in row else ''
    memory = (
      f'{row["peak_bytes"] / other["peak_bytes"]:.2f}'
      if 'peak_bytes' in other
      else ''
    )
    lines.append(
      f'| {case.split(": ")[1]}: {program} | {name}'
      f' | {row["ratio"] / other["ratio"]:.2f} | {limit} | {memory} |'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  saved = RESULTS / f'{"".join(sys.argv[1:]) or "reference"}.json'
  print(table(json.loads(saved.read_text())))
