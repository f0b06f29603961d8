"""The examples do what they say, in a small edition."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PROGRAMS = 300  # not under jit
pytestmark = pytest.mark.usefixtures('as_users_run_jax')
EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'


def load(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_logit_adjustment_finds_the_rare_digits():
  example = load('rare_classes')
  splits = example.stack('rare classes', 0.05, range(2))
  splits = splits._replace(batches=splits.batches[:, :120])
  worst = {}
  for name in ('cross-entropy', 'default, adjusted'):
    scores, _ = example.run_method('rare classes', name, splits, (5e-3,), {})
    worst[name] = scores[0, :, 1]
  gain = worst['default, adjusted'] - worst['cross-entropy']
  assert gain.min() > 0.2


@pytest.mark.slow
def test_adversarial_training_finds_the_other_domain_and_is_chosen():
  example = load('domain_adaptation')
  task = example.load_digits(0)
  methods = {n: example.OF_IMAGES[n] for n in ('source only', 'CDAN+E')}
  trained = example.run(task, methods, seed=0, steps=120)
  accuracy = {network.name: network.accuracy for network in trained}
  best = accuracy['CDAN+E, 120 steps']
  assert best > accuracy['source only, 120 steps'] + 20
  assert example.by_score(trained, 'mutual information')[0].accuracy == best


@pytest.mark.slow
def test_target_labels_are_never_seen():
  """Other target labels give the same features and the same scores."""
  example = load('domain_adaptation')
  task = example.load_digits(0)
  wrong = task._replace(y_test=(task.y_test + 1) % 10)
  methods = {'CDAN+E': example.CDAN_E}
  results = [example.run(t, methods, seed=0, steps=3) for t in (task, wrong)]
  for one, other in zip(*results, strict=True):
    assert one.scores == other.scores
    for a, b in zip(one.features, other.features, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_an_adaptive_clip_saves_a_training_from_bad_batches():
  example = load('spikes')
  text = example.make_text(22_000)
  texts = jnp.asarray(text[:20_000]), jnp.asarray(text[20_000:])
  losses = {
    name: example.train(example.methods(0.01)[name], 250, 0.05, texts, [0])[0]
    for name in ('no clip', 'calibrated (clip_by_zscore)')
  }
  assert losses['calibrated (clip_by_zscore)'] < losses['no clip'] - 0.5


@pytest.mark.slow
def test_qk_clip_holds_the_logits(monkeypatch):
  monkeypatch.syspath_prepend(EXAMPLES)  # for the text of spikes
  example = load('attention_logits')
  text = example.make_text(22_000)
  texts = jnp.asarray(text[:20_000]), jnp.asarray(text[20_000:])
  largest = {}
  for name in ('AdamW', 'qk_clip'):
    method = example.METHODS[name]
    number = method.choices[0]
    _, (_, logits) = example.train(method, number, 60, texts, [0])
    largest[name] = logits[0, -1]
  assert largest['AdamW'] > 20 * largest['qk_clip']


@pytest.mark.slow
def test_the_suggested_learning_rate_is_near_the_best_of_a_grid():
  example = load('learning_rate')
  data, held_out = example.load()
  starts = example.starts_of(data, 100, 32, jnp.arange(1))
  method = example.METHODS['adam']
  rates = np.logspace(-5, 0, 11)[None]
  best = example.train(method, rates, starts, held_out).min()
  found, _ = example.suggested(method, starts, probe_steps=200)
  assert example.train(method, found[:, None], starts, held_out) < 1.5 * best
  sizes, scale = example.batch_sizes(data, (16, 64), jnp.arange(1))
  steps, examples = np.array(sizes).T[2:]
  assert steps[0] > steps[1] and examples[0] < examples[1]
  assert 5 < scale < 200


@pytest.mark.slow
def test_the_report_tells_why_a_deep_network_does_not_learn(tmp_path):
  example = load('gradient_flow')
  data, records = example.load(0), {}
  for name in ('plain', 'skip connections'):
    accuracy, records[name] = example.train(
      example.METHODS[name], data, depth=20, steps=60, seed=0
    )
    kinds = {verdict.kind for verdict in example.flow.diagnose(records[name])}
    if name == 'plain':
      assert accuracy < 0.2
      assert 'vanishing' in kinds
    else:
      assert accuracy > 0.5
      assert not kinds
  example.plot(records, tmp_path / 'depth.png')
  example.flow.write_page(tmp_path / 'page.html', records)


@pytest.mark.slow
def test_batch_norm_trains_sooner_and_adapts_to_other_images():
  example = load('batch_norm')
  data = example.load('digits')
  labels = data.labels_test

  def trained(norm):
    small = example.nn.initializers.normal(0.1)
    model = example.Network(norm, example.nn.sigmoid, small)
    variables, _ = example.train(
      model, data, example.Batches(60), steps=200, rate=0.3, seeds=1
    )
    return model, variables

  def score(model, variables, x):
    return float(example.accuracies(model, variables, x, labels)[0])

  assert score(*trained(None), data.x_test) < 0.5
  model, variables = trained(
    functools.partial(example.BatchNorm, momentum=0.9, debias=True)
  )
  clean = score(model, variables, data.x_test)
  assert clean > 0.9
  dim = example.shifts()['contrast 0.2'](data.x_test)
  assert score(model, variables, dim) < clean - 0.2
  adapted = example.recalibrate(
    example.in_training(model), variables, dim[None]
  )
  assert score(model, adapted, dim) > clean - 0.05


@pytest.mark.slow
def test_a_detector_learns_with_the_default_weighting():
  example = load('detection')
  boxes = np.array([[[0, 0, 10, 10], [20, 20, 40, 40]]], np.float32)
  truth = example.Scenes(np.zeros((1, 64, 64)), boxes, np.array([[3, 3]]))
  near, far = [1, 0, 11, 10], [0, 20, 20, 40]
  found = np.array([[far, near, [0, 0, 10, 10], [20, 20, 40, 40], near]])
  scores = np.array([[5.0, 4.0, 3.0, 2.0, -np.inf]])
  labels = np.array([[3, 3, 3, 3, 3]])
  precision = example.average_precision((scores, found, labels), truth)
  assert precision == pytest.approx((1 / 2 + 2 / 4) / 2)
  labels = np.array([[3, 3, 3, 4, 3]])  # the second object has another's label
  precision = example.average_precision((scores, found, labels), truth)
  assert precision == pytest.approx(1 / 2 / 2)

  train = example.make_scenes('train', 400, 0)
  test = example.make_scenes('test', 50, 0)

  def score(model):
    found = jax.device_get(example.detect(model, test.images))
    return example.average_precision(found, test)

  method = example.METHODS['default weighting']
  trained = example.train(method, train, 120, seed=0)
  assert score(example.Network(example.nnx.Rngs(0))) < 0.02
  assert score(trained) > 0.25


@pytest.mark.slow
def test_a_badly_scaled_loss_does_not_starve_the_other():
  example = load('many_losses')
  unit = 'UPGrad of units'
  few = {name: example.METHODS['reconciled'][name] for name in ('UPGrad', unit)}
  example.METHODS['reconciled'] = few  # the others take long to compile
  problems = example.stack(example.DIGITS, 'test', range(2))
  problems = problems._replace(batches=problems.batches[:, :200])

  def worst(name, weights=(1.0, 1.0)):
    scores = example.run_method(
      example.SCALED, name, problems, (0.01,), weights
    )
    return scores[0, :, -1]

  balanced = worst('plain sum', (1.0, 0.01))
  assert balanced.min() > 60
  assert worst(unit).min() > 60
  # Reconciling protects from conflicts, and not from the scale of a loss.
  for name in ('plain sum', 'UPGrad'):
    assert worst(name).max() < balanced.min() - 20
