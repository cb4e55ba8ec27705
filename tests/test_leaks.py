"""What a run may depend on.

Nothing but the test scores may depend on the test part: not the weights, the scale, the masks,
the epoch that is kept, the probabilities of DPFT or the temperatures. And a stage may be shared
by runs only if they agree in all that its weights depend on."""

from dataclasses import replace
from typing import Literal, get_args, get_origin

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import small
from torch import nn

import mculora.experiments.runs
from mculora.training.calibration import Calibration, calibrate, calibration_report
from mculora.training.evaluation import evaluate_random, predictions
from mculora.training.recording import observe
from mculora.basics.dialogues import Inputs, Unlabelled, random_dialogues, split
from mculora.basics.method import Method, Settings, Stage, create, methods
from mculora.basics.modalities import labels
from mculora.model.losses import task_loss
from mculora.use.artefact import Artefact
from mculora.use.explorer import explore
from mculora.use.prediction import Predictor
from mculora.data.own import open_data
from mculora.experiments.runs import RunConfig, load_method, prepare, run
from mculora.training.trainer import fit

PARTS = ('train',) * 5 + ('val', 'test', 'test')
# two modalities, not three: half the work
TWO = {'a': 5, 't': 7}
METHODS = sorted(methods())


def another(d):
    "The same dialogues with other labels and other features."
    g = torch.Generator().manual_seed(7)
    label = d.label.flip(0)
    features = {
        m: (torch.randn(x.shape, generator=g) * 5 + 2).masked_fill(~d.present[:, k : k + 1], 0)
        for k, (m, x) in enumerate(d.features.items())
    }
    return replace(d, label=label, features=features)


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


# --- no method learns from the test part ---


def seen(history):
    "All of a history but what was measured on the test part, and the clock."
    return [
        {k: v for k, v in row.items() if not k.startswith(('test/', 'seconds'))} for row in history
    ]


@pytest.mark.parametrize('name', METHODS)
def test_training_never_sees_the_test_part(name):
    s = split(random_dialogues((5, 9, 3, 7, 4, 6, 8, 5), TWO, parts=PARTS, missing=0.2))
    ends = []
    for parts in (s, replace(s, test=another(s.test))):
        torch.manual_seed(1)
        method = create(
            name,
            s.train.task,
            s.train.widths,
            small(name, rank=2, epochs=1 + (name in ('mculora', 'mculora-plus'))),
        )
        history = fit(method, parts, 1, progress=False)
        ends.append((method.state_dict(), history))
    (weights, one), (others, two) = ends
    same(weights, others)
    assert seen(one) == seen(two)
    if one:
        assert one != two, 'the test part was not measured at all'


# --- nor does anything else of a run ---


def altered(*args):
    "The tiny twin with another test part (Session1)."
    d = open_data(*args)
    there = torch.tensor([p == 'Session1' for p in d.part]).repeat_interleave(d.lengths)
    assert there.any() and not there.all()
    other = another(d)
    return replace(
        d,
        label=torch.where(there, other.label, d.label),
        features={
            m: torch.where(there[:, None], other.features[m], x) for m, x in d.features.items()
        },
    )


@pytest.fixture(scope='module', params=['mculora', 'logistic'])
def pair(request, tmp_path_factory):
    """A run, and the same run on data whose test part is another: (result, folder, temperatures)
    of each."""
    with pytest.MonkeyPatch.context() as patch:
        fitted = []
        patch.setattr(
            mculora.experiments.runs,
            'calibrate',
            lambda *a: fitted.append(calibrate(*a)) or fitted[-1],
        )
        out = []
        for opened in (open_data, altered):
            patch.setattr(mculora.experiments.runs, 'open_data', opened)
            c = RunConfig(
                size='tiny',
                method=request.param,
                device='cpu',
                missing=0.2,
                out_dir=str(tmp_path_factory.mktemp('run')),
                options=small(request.param, rank=2),
            )
            result, folder = run(c, progress=False)
            out.append((result, folder, fitted.pop().temperature))
    return out


def test_the_two_runs_were_tested_on_different_data(pair):
    (one, _, _), (two, _, _) = pair
    assert one.data['hash'] != two.data['hash'] and one.scores != two.scores


def test_weights_and_scale_are_the_same(pair):
    same(*(load_file(folder / 'model.safetensors') for _, folder, _ in pair))


def test_masks_epochs_and_curves_are_the_same(pair):
    (one, _, _), (two, _, _) = pair
    assert one.masks == two.masks and one.data['missing'] == two.data['missing']
    kept = [
        [(s['name'], s['epochs'], s['kept'], s['validation']) for s in r.stages] for r in (one, two)
    ]
    assert kept[0] == kept[1]
    a, b = (pd.read_parquet(folder / 'curves.parquet') for _, folder, _ in pair)
    ours = [c for c in a if not c.startswith(('test/', 'seconds'))]
    pd.testing.assert_frame_equal(a[ours], b[ours])


def test_temperatures_are_those_of_validation(pair):
    (_, _, temperatures), (_, _, others) = pair
    assert temperatures == others


def test_the_calibration_error_is_that_of_validation_temperatures(tmp_path):
    c = RunConfig(size='tiny', method='logistic', device='cpu', out_dir=str(tmp_path))
    result, folder = run(c, progress=False)
    method, _ = load_method(folder)
    s, *_ = prepare(c)
    by_hand = calibration_report(method, calibrate(method, s.val), s.test)
    for condition, row in by_hand.items():
        at = {
            x.metric: x.value
            for x in result.scores
            if (x.protocol, x.condition) == ('fixed', condition)
        }
        assert at['ECE, temperature'] == pytest.approx(row['ece_after'])
        assert at['ECE'] == pytest.approx(row['ece_before'])


def test_scores_are_of_the_epoch_that_their_column_names(pair):
    "'Selected on test' is the best epoch of the test curve, 'validation' the one that is kept."
    for r, folder, _ in pair:
        at = {
            s.selection: s.value
            for s in r.scores
            if (s.protocol, s.condition, s.metric) == ('fixed', 'all', 'WA')
        }
        if not r.stages:
            continue
        curves = pd.read_parquet(folder / 'curves.parquet')
        last = curves[curves.stage == r.stages[-1]['name']]
        assert at['test'] == pytest.approx(last['test/all/WA'].max())
        kept = last[last.epoch == r.stages[-1]['kept']]
        assert at['validation'] == pytest.approx(kept['test/all/WA'].item())


def test_what_training_lacks_follows_the_seed_alone():
    "CMU-MOSI has official parts: the dialogues are the same, and what is gone differs."

    def gaps(seed):
        s, _, about, _ = prepare(
            RunConfig(dataset='mosi', size='tiny', missing=0.3, seed=seed, device='cpu')
        )
        return s.train.ids, about['missing']

    (ids, one), (same_ids, again), (others, two) = map(gaps, (66, 66, 67))
    assert ids == same_ids == others
    assert one == again and one['train'] != two['train']


# --- nor does a method see labels, or what is missing, outside its loss ---


class Looks(Method):
    "Keeps all that it is shown but for its loss, which alone learns."

    name = 'looks'

    def __init__(self, task, widths, settings=Settings()):
        super().__init__(task, widths, settings)
        self.heads = nn.ModuleDict({m: nn.Linear(w, task.n_outputs) for m, w in widths.items()})
        self.shown = {}

    def look(self, where, x):
        self.shown.setdefault(where, []).append(x)

    def stages(self):
        return [Stage('first', 1), Stage('second', 1, encoded=True)]

    def end_epoch(self, stage, val):
        self.look('end_epoch', val)

    def encode(self, batch):
        self.look('encode', batch)
        return dict(batch.features)

    def inspect(self, batch):
        self.look('inspect', batch)
        return {}

    def predict(self, batch, stage=None):
        self.look('predict', batch)
        return sum(self.heads[m](x) for m, x in batch.features.items())

    def loss(self, batch, stage):
        y = sum(self.heads[m](x) for m, x in batch.features.items())
        task = task_loss(y, batch.label, batch.valid)
        return task, dict(task=task)


def trained_looks(d):
    s, method = split(d), Looks(d.task, d.widths)
    fit(method, s, progress=False)
    return method, s


def asked(method, s):
    "All that is asked of a trained model, anywhere."
    predictions(method, s.test)
    evaluate_random(method, s.test, {'0.5': torch.rand_like(s.test.present.float()) > 0.5})
    calibrate(method, s.val)
    observe(method, s.test)
    model = Artefact(method, {}, Calibration(dict.fromkeys(labels(s.test.modalities), 1.0)))
    explore(Predictor(model), s.test)


def test_outside_its_loss_a_method_is_shown_no_label_and_nothing_that_is_missing():
    d = random_dialogues((5, 9, 3, 7, 4, 6, 8, 5), parts=PARTS, missing=0.3)
    # values where nothing is present: no source gives them
    method, s = trained_looks(replace(d, features={m: x + 9.0 for m, x in d.features.items()}))
    for training in (True, False):
        if not training:
            method.shown.clear()
            asked(method, s)
        expected = {'encode', 'predict', 'end_epoch' if training else 'inspect'}
        assert method.shown.keys() == expected
        for where, shown in method.shown.items():
            for x in shown:
                assert type(x) in (Inputs, Unlabelled), where
                assert not {'label', 'complete'} & {*dir(x)}, where
                for k, v in enumerate(x.features.values()):
                    if isinstance(x, Inputs):
                        assert not v[~x.present[..., k]].any(), where


# --- a shared stage depends on its key alone ---


def others(field):
    "Other values that a setting might have."
    value, options = field.default, get_args(field.annotation)
    if get_origin(field.annotation) is Literal:
        return [x for x in options if x != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1]
    if isinstance(value, float):
        return [x for x in (value * 2, value / 2, value + 0.25, value + 1) if x != value]
    if isinstance(value, tuple):
        return [(0.4, 0.6)]
    if value is None:
        return [2, 0.5]
    if isinstance(value, str):
        return ['a', 'v', 'relative']  # a modality, an encoder
    raise AssertionError(f'no other value is known for {field}')


# with speakers, which its recipe has; MCULoRA itself takes any encoder
REFUSED = [('mculora-plus', 'encoder')]


def first_stage(name, options, s):
    "The first stage of an untrained method, its key, and a function that trains it: its weights."
    torch.manual_seed(1)
    method = create(name, s.train.task, s.train.widths, options)
    stage = method.stages()[0]
    method.stages = lambda: [stage]

    def weights():
        fit(method, s, 1, progress=False)
        own = [(n, p) for n, p in method.named_parameters() if n.startswith(stage.trainable)]
        own += [(n, x) for n, x in method.named_buffers() if '.' not in n]
        return dict(own)

    return method.depends(stage.name), weights


@pytest.mark.parametrize('name', [m for m in METHODS if methods()[m].depends is not Method.depends])
def test_what_a_stage_does_not_depend_on_changes_no_bit_of_it(name):
    s = split(random_dialogues((5, 9, 3, 7, 4, 6, 8, 5), TWO, parts=PARTS, missing=0.2))
    base = small(name, rank=2, dropout=0.2)
    key, weights = first_stage(name, base, s)
    # settings that are changed together, as many as go with each other
    expected, free = weights(), [{}]
    for setting, field in methods()[name].Settings.model_fields.items():
        if setting in base:
            field = type(field)(annotation=field.annotation, default=base[setting])
        for value in others(field):
            try:
                changed, _ = first_stage(name, base | {setting: value}, s)
            except ValueError:
                continue  # refused, alone or beside the others
            break
        else:
            assert (name, setting) in REFUSED, f'{setting}: every other value was refused'
            continue
        if changed != key:
            continue
        try:
            first_stage(name, base | free[-1] | {setting: value}, s)
        except ValueError:
            free.append({})
        free[-1][setting] = value
    assert free[0], 'every setting changes the key: nothing would be shared'
    for together in free:
        changed, weights = first_stage(name, base | together, s)
        found = weights()
        assert changed == key
        for n, w in expected.items():
            assert torch.equal(w, found[n]), f'one of {", ".join(together)} changes {n}'
