"""What a method may do wrong, and what is said of it before it trains.

The properties of all registered methods, on trained models and every kind of data, are in
test_methods.py."""

import json
from collections import Counter
from itertools import chain

import pytest
import torch
from small import small
from torch import nn
from typer.testing import CliRunner

import mculora.basics.method
from mculora.basics.dialogues import Task
from mculora.basics.method import Method, Settings, Stage, create, methods
from mculora.experiments.results import addresses, read_result
from mculora.experiments.runs import RunConfig, run
from mculora.experiments.studies import presets, studies
from mculora.model.encoders import ENCODERS
from mculora.model.losses import task_loss
from mculora.training.check import (
    PROPERTIES,
    Case,
    MethodError,
    examined,
    given_up,
    moved_copy,
    noise,
    refuse,
    version,
)
from mculora.use.cli import app

WIDTHS = {'a': 5, 't': 6, 'v': 4}
TASKS = {
    'classes': Task('noise-simulated', ('w', 'x', 'y', 'z'), simulated=True, tiny=True),
    'scores': Task('noise-simulated', simulated=True, tiny=True),
}


class Votes(Method):
    "One linear model per modality; the mean of those that are there. It is sound."

    name = 'votes'

    def __init__(self, task, widths, settings=Settings()):
        super().__init__(task, widths, settings)
        self.heads = nn.ModuleDict({m: nn.Linear(w, task.n_outputs) for m, w in widths.items()})

    def stages(self):
        return [Stage('train', 1, batch_size=4)]

    def encode(self, batch):
        return {m: self.heads[m](x) for m, x in batch.features.items()}

    def predict(self, batch, stage=None):
        each = batch.features if batch.encoded else self.encode(batch)
        here = batch.present[..., None]
        return (torch.stack([*each.values()], -2) * here).sum(-2) / here.sum(-2).clamp(min=1)

    def loss(self, batch, stage):
        task = task_loss(self.predict(batch), batch.label, batch.valid)
        return task, dict(task=task)


# --- the faults that a new user met, each with what is said of it ---


class ReadsLabels(Votes):
    "output, found that `label` is read outside `loss`, expected what is there alone"

    def predict(self, batch, stage=None):
        return nn.functional.one_hot(batch.label, self.task.n_outputs).float()


class SaysNaN(Votes):
    "output, condition a: found NaN or infinity for 19 of 19 utterances, expected numbers"

    def predict(self, batch, stage=None):
        return super().predict(batch, stage) * torch.nan


class OneLogit(Votes):
    "output, condition a: found the shape [7, 5, 1] from `predict`, expected [7, 5, 4]"

    def predict(self, batch, stage=None):
        return super().predict(batch, stage)[..., :1]


class OneClassTooMany(Votes):
    "output, condition a: found the shape [7, 5, 5] from `predict`, expected [7, 5, 4]"

    def predict(self, batch, stage=None):
        return nn.functional.pad(super().predict(batch, stage), (0, 1))


class OneForADialogue(Votes):
    "output, condition a: found the shape [7, 4] from `predict`, expected [7, 5, 4]"

    def predict(self, batch, stage=None):
        return super().predict(batch, stage).mean(1)


class MixesModalities(Votes):
    "each modality alone, condition a: found encodings of a that differ by"

    def encode(self, batch):
        R = super().encode(batch)
        there = [r * batch.present[..., k : k + 1] for k, r in enumerate(R.values())]
        return {m: r + sum(there) for m, r in R.items()}


class IgnoresPresent(Votes):
    "missing values, condition a: found predictions that differ by"

    def predict(self, batch, stage=None):
        return sum((batch.features if batch.encoded else self.encode(batch)).values())


class Remembers(Votes):
    "order of conditions, condition a: found predictions that differ by"

    most = 0  # modalities that it has seen: with fewer, it says what it said then

    def predict(self, batch, stage=None):
        y, n = super().predict(batch, stage), int(batch.present.sum())
        if n >= self.most:
            self.most, self.best = n, y
        return self.best if self.best.shape == y.shape else y


class LooksAtNeighbours(Votes):
    "neighbours, condition a combination for each dialogue: found predictions that differ by"

    def predict(self, batch, stage=None):
        y = super().predict(batch, stage)
        return y - y[batch.valid].mean(0)


class ThrowsDice(Votes):
    "twice the same, condition a combination for each utterance: found predictions that differ by"

    def predict(self, batch, stage=None):
        y = super().predict(batch, stage)
        return y + torch.rand_like(y)


class NoTuple(Votes):
    "loss, stage train: found Tensor from `loss`, expected a pair"

    def loss(self, batch, stage):
        return super().loss(batch, stage)[0]


class WrongPrefix(Votes):
    "trained parameters, stage train: found 'haeds' in `trainable`, expected the beginning of"

    def stages(self):
        return [Stage('train', 1, trainable=('haeds',))]


class EndlessLoss(Votes):
    "loss, stage train: found nan of the loss, expected a finite number"

    def loss(self, batch, stage):
        total, parts = super().loss(batch, stage)
        return total * torch.nan, parts


FAULTS = [x for x in Votes.__subclasses__()]


@pytest.mark.parametrize('cls', FAULTS, ids=lambda c: c.__name__)
def test_a_faulty_method_is_refused_before_anything_is_trained(cls, tmp_path, monkeypatch):
    monkeypatch.setitem(mculora.basics.method._methods, 'votes', cls)
    c = RunConfig(method='votes', size='tiny', device='cpu', out_dir=str(tmp_path))
    with pytest.raises(MethodError) as e:
        run(c, progress=False, on_epoch=lambda row: pytest.fail('it was trained'))
    assert str(e.value).startswith(f'votes: {cls.__doc__}'), e.value
    assert not [*tmp_path.rglob('*')]


def test_the_sound_one_among_them_is_trained_and_the_check_changes_no_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(mculora.basics.method._methods, 'votes', Votes)
    c = RunConfig(method='votes', size='tiny', device='cpu', out_dir=str(tmp_path))
    before = torch.get_rng_state()
    checked, _ = run(c, progress=False)
    without, _ = run(c.model_copy(update=dict(check=False)), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert checked.scores == without.scores
    assert without.config == checked.config | dict(check=False)


class Rate(Settings):
    lr: float = 1e-2


class Tunable(LooksAtNeighbours):
    "A fault, and a setting to tune."

    Settings, listed, space = Rate, True, dict(lr=[1e-2])


@pytest.mark.parametrize(
    'command',
    [
        'train --dataset iemocap --size tiny --fold 1',
        'study iemocap-simulated-tiny --study new',
        'tune iemocap-simulated-tiny --trials 1 --seed 1',
    ],
)
def test_every_command_that_trains_can_do_without_the_check(command, tmp_path, monkeypatch):
    monkeypatch.setitem(mculora.basics.method._methods, 'votes', Tunable)
    words = [*command.split(), '--method', 'votes', '--device', 'cpu', '--out-dir', str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and 'votes: neighbours, condition' in refused.output
    assert not addresses(tmp_path)
    done = CliRunner().invoke(app, [*words, '--no-check'])
    assert done.exit_code == 0, done.output
    (record,) = addresses(tmp_path)
    assert read_result(record).config['check'] is False
    assert '--no-check' in read_result(record).command


# --- other faults ---


class SpoilsItsWeights(Votes):
    "asking changes nothing, found other values of heads.a.bias after a prediction"

    def inspect(self, batch):
        self.heads['a'].bias.data += 1.0
        return {}


class ShowsADialogue(Votes):
    "asking changes nothing, found the shape [7, 3] of y from `inspect`, expected [7, 5] and more"

    def inspect(self, batch):
        return dict(y=batch.present.float().mean(1))


class CountsPadding(Votes):
    "padding, condition a combination for each dialogue: found predictions that differ by"

    def predict(self, batch, stage=None):
        return super().predict(batch, stage) + 0.1 * max(0, batch.shape[1] - 5)


class ThawsAll(Votes):
    "loss, stage train: found a gradient of heads.t.weight, expected one of what"

    def stages(self):
        return [Stage('train', 1, trainable=('heads.a',))]

    def loss(self, batch, stage):
        self.requires_grad_(True)
        return super().loss(batch, stage)


class StepsByItself(Votes):
    "loss, stage train: found another value of heads.a.bias after `loss`, expected it to be left"

    def loss(self, batch, stage):
        out = super().loss(batch, stage)
        self.heads['a'].bias.data += 1.0
        return out


class LearnsNothing(Votes):
    "loss, stage train: found a loss on which no trained parameter has a bearing"

    def loss(self, batch, stage):
        total, parts = super().loss(batch, stage)
        return total.detach(), parts


class LearnsByHeart(Votes):
    "labels, condition a: found predictions that differ by"

    def loss(self, batch, stage):
        self.heart = torch.zeros(99)
        self.heart[batch.place[batch.valid]] = batch.label[batch.valid].float()
        return super().loss(batch, stage)

    def predict(self, batch, stage=None):
        y = super().predict(batch, stage)
        return y + self.heart[batch.place][..., None] if hasattr(self, 'heart') else y


class KeepsTheMean(Votes):
    "labels, condition a: found predictions that differ by"

    def loss(self, batch, stage):
        self.mean = batch.label[batch.valid].float().mean()
        return super().loss(batch, stage)

    def predict(self, batch, stage=None):
        return super().predict(batch, stage) + getattr(self, 'mean', 0.0)


class ReadsPacking(Votes):
    "padding, condition a combination for each dialogue: found predictions that differ by 1"

    def predict(self, batch, stage=None):
        return super().predict(batch, stage) + (not batch.pack)


class Crashes(Votes):
    "output, found KeyError ('heads'; test_check.py, line"

    def predict(self, batch, stage=None):
        return {}['heads']


class CannotPrepare(Votes):
    "prepare, found ZeroDivisionError (division by zero; test_check.py, line"

    def prepare(self, train):
        return 1 / 0


@pytest.mark.parametrize(
    'cls', [x for x in Votes.__subclasses__() if x not in FAULTS], ids=lambda c: c.__name__
)
def test_what_else_is_refused(cls):
    with pytest.raises(MethodError) as e:
        refuse(cls(TASKS['classes'], WIDTHS))
    assert str(e.value).startswith(f'votes: {cls.__doc__}'), e.value


def test_another_version_of_the_code_is_looked_at_again(monkeypatch):
    method = Votes(TASKS['classes'], WIDTHS)
    refuse(method)
    one = version(method)
    assert one == version(Votes(TASKS['classes'], WIDTHS))
    assert one != version(Votes(TASKS['scores'], WIDTHS))
    assert one != version(Votes(TASKS['classes'], WIDTHS | dict(a=9)))
    monkeypatch.setattr(Votes, 'predict', SaysNaN.predict)
    assert one != version(method)


# --- the methods that are registered ---


# for classes all, and for scores those that are built least alike: with `make test-all` all
LEAST_ALIKE = ('mculora', 'momke', 'gcnet', 'imder', 'logistic-per-condition')


@pytest.mark.parametrize(
    'name, task',
    [
        pytest.param(
            name,
            task,
            marks=[pytest.mark.slow] * (task == 'scores' and name not in LEAST_ALIKE),
        )
        for name in sorted(methods())
        for task in TASKS
    ],
)
def test_every_registered_method_is_sound(name, task):
    found = examined(create(name, TASKS[task], WIDTHS, small(name)))
    assert not any(found.values()) and list(found) == list(PROPERTIES)


READINGS = [
    dict(pretrain='complete'),
    dict(finetune='adapters', reduction='sum', lr_B=16.0),
    dict(finetune='adapters', encoder_dropout=True, adapter_place='none'),
    dict(pretrain='complete', finetune='adapters', encoder_dropout=True, adapter_place='linear'),
]


@pytest.mark.parametrize('name', ['mculora', 'mculora-plus'])
@pytest.mark.parametrize('options', READINGS, ids=lambda options: ', '.join(options))
def test_every_reading_is_sound(name, options):
    "What the stages of MCULoRA may train, see and drop."
    found = examined(create(name, TASKS['classes'], WIDTHS, small(name) | options))
    assert not any(found.values()), found


PRESETS = [
    (name, preset)
    for name, cls in sorted(methods().items())
    for preset in presets(cls)
    if preset != 'fair'
]


def as_preset(name, preset):
    return create(name, TASKS['classes'], WIDTHS, small(name) | dict(preset=preset))


@pytest.mark.parametrize(
    'name, preset',
    [
        pytest.param(*p, marks=[] if as_preset(*p).gives_up() else [pytest.mark.slow])
        for p in PRESETS
    ],
)
def test_a_preset_lacks_what_it_gives_up_and_nothing_else(name, preset):
    "Some weights hide what a sum over a batch does to a loss: so up to three times, with others."
    lost = set()
    for seed in range(3):
        torch.manual_seed(seed)
        method = as_preset(name, preset)
        lost |= {name for name, said in examined(method).items() if said}
        if lost >= set(given_up(method)):
            break
    assert lost == set(given_up(method))
    refuse(method)


def test_the_fair_recipe_gives_nothing_up():
    for name in methods():
        assert not create(name, TASKS['classes'], WIDTHS, small(name)).gives_up(), name


@pytest.mark.parametrize('name', ['neighbours', 'padding'])
def test_only_what_is_given_up_is_let_pass(name, monkeypatch):
    monkeypatch.setattr(LooksAtNeighbours, 'gives_up', lambda self: {name: 'on purpose'})
    method = LooksAtNeighbours(TASKS['classes'], WIDTHS)
    if name == 'neighbours':
        return refuse(method, code=name)
    with pytest.raises(MethodError, match='votes: neighbours, condition'):
        refuse(method, code=name)


def test_what_is_given_up_is_said(monkeypatch):
    def said(method, **options):
        done = CliRunner().invoke(app, ['check', method, '--options', json.dumps(options)])
        return done.exit_code, done.output

    code, text = said('euar', preset='as-published')
    why = 'as published, the gate is normalised over the batch'
    assert code == 0 and f'neighbours: given up: {why}' in text and 'padding: holds' in text
    # given up without need
    monkeypatch.setattr(methods()['euar'], 'gives_up', lambda self: {'padding': 'too long'})
    code, text = said('euar')
    assert code == 0 and 'padding: holds here, but is given up: too long' in text
    # and another one than that which is given up
    code, text = said('euar', batch_gate=True)
    assert code == 1 and 'neighbours: condition' in text
    monkeypatch.setattr(methods()['euar'], 'gives_up', lambda self: {'neighbors': 'misspelt'})
    code, text = said('euar')
    assert code == 2 and "euar: gives_up, found 'neighbors', expected one of twice the same" in text


def test_every_variant_trains_parameters_that_it_has():
    "With settings that leave a part out, no stage names it. The learning rate trains the same."
    d, seen = noise(TASKS['classes'], WIDTHS), set()
    for v in chain(*studies().values()):
        kinds = ENCODERS[v.options.get('encoder', 'transformer')].kinds
        options = small(v.method) | {k: x for k, x in v.options.items() if k != 'lr'}
        options |= dict(depth=2) if len(kinds) > 1 else {}
        if (key := (v.method, json.dumps(options, sort_keys=True))) not in seen:
            method = create(v.method, TASKS['classes'], WIDTHS, options)
            found = list(PROPERTIES['trained parameters'](Case(method, d)))
            assert not found, (v.name, found)
            seen.add(key)
    assert len(seen) > 80


def test_a_sound_method_is_not_asked_more_than_need_be(monkeypatch):
    """Each question costs the slowest method (`imder`) a twentieth of a second: with these it takes
    one and a half, where two are allowed. Only of a faulty method each thing is tried alone."""
    method = create('imder', TASKS['classes'], WIDTHS, small('imder'))
    asked = Counter()

    def counted(name):
        f = getattr(type(method), name)

        def call(*args, **kwargs):
            asked[name] += 1
            return f(*args, **kwargs)

        monkeypatch.setattr(type(method), name, call)

    counted('predict')
    counted('loss')
    assert not any(examined(method).values())
    assert asked['predict'] <= 34 and asked['loss'] <= 4 * len(method.stages())


def test_what_begins_at_zero_has_moved_in_the_copy():
    "An adapter's B, which would hide what the adapter does; the method itself is as it was."
    method = create('mculora', TASKS['classes'], WIDTHS, small('mculora'))
    zeros = [n for n, p in method.named_parameters() if not p.any()]
    copy = moved_copy(method, noise(method.task, method.widths))
    assert zeros and all(dict(copy.named_parameters())[n].any() for n in zeros)
    assert [n for n, p in method.named_parameters() if not p.any()] == zeros
