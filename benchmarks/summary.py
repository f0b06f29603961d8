"""README's table, from the results of a run.

python benchmarks/summary.py [NAME]
"""

import json
import pathlib
import sys

RESULTS = pathlib.Path(__file__).parent / 'results'
ROWS = (
  ('`sigmoid_ghm_loss`, 1e6 logits', 'losses: sigmoid, examples = 1,000,000', 'sigmoid_ghm_loss, windowed'),
  ('`harmonize` before it, 1e6 logits', 'losses: sigmoid, examples = 1,000,000', 'harmonize before optax cross-entropy'),
  ('`softmax_ghm_loss…`, 100 classes', 'losses: softmax, 10,000 examples, classes = 100', 'softmax_ghm_loss_with_integer_labels'),
  ('`smooth_l1_ghm_loss`, 1e6 numbers', 'losses: regression, 1,000,000 numbers', 'smooth_l1_ghm_loss'),
  ('`harmonized_aggregate`, 64 per-example gradients', 'per_example: AdamW on per-example gradients, batch = 64', 'harmonized_aggregate'),
  ('`reverse_gradient`, training step', 'backward: reversal in a training step', 'reverse_gradient'),
  ('`in_backward(optax.scale_by_adam())`, 1e7 numbers', 'backward: in_backward(scale_by_adam), numbers = 10,000,000', 'in_backward(optax.*)'),
  ('`conflict.fork`, training step', 'domains: two branches, six layers of 512, batch 512', 'conflict.fork'),
  ('`clip_by_zscore`, AdamW, 50M parameters', 'clipping: transformer, 196 leaves', 'clip_by_zscore'),
  ('`clip_by_parameter_norm`, the same', 'clipping: transformer, 196 leaves', 'clip_by_parameter_norm'),
  ('`calibrated`, the same', 'clipping: transformer, 196 leaves', 'calibrated'),
  ('`skip_spikes`, the same', 'clipping: transformer, 196 leaves', 'skip_spikes'),
  ('`batch_norm`, float32', 'batch_norm: float32 (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
  ('`batch_norm`, bfloat16', 'batch_norm: bfloat16 (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
  ('taps at all modules of a transformer', 'flow: transformer, 6 x 256, 16 sequences of 64', 'taps'),
  ('`flow.watch`, the same', 'flow: transformer, 6 x 256, 16 sequences of 64', 'watch'),
  ('`sigmoid_ghm_loss`, 1e6 logits', 'torch: losses, examples = 1,000,000', 'sigmoid_ghm_loss, windowed'),
  ('`calibrated`, AdamW, 50M parameters', 'torch: transformer, 196 leaves', 'calibrated, AdamW'),
  ('`batch_norm`, float32', 'torch: batch norm, (128, 32, 32, 64)', 'optax_ghm.batch_norm'),
)  # fmt: skip


def table(report):
  """Ratios to the first program of the case, and of time to the limit."""
  lines = [
    '| | against | time, × that | time, × the limit | memory, × that |',
    '|---|---|---|---|---|',
  ]
  for label, case, program in ROWS:
    rows = report['cases'][case]
    row, peer = rows[program], next(iter(rows))
    figures = [
      f'{row[key]:.2f}' if key in row else ''
      for key in ('ratio', 'limit_ratio', 'memory_ratio')
    ]
    lines.append(f'| {label} | {peer} | {" | ".join(figures)} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  saved = RESULTS / f'{"".join(sys.argv[1:]) or "reference"}.json'
  print(table(json.loads(saved.read_text())))
