"""A model as a folder: every method comes back as it was, nothing that does not fit is accepted,
one combination as a program gives the model's numbers."""

import json
import math
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import known
from typer.testing import CliRunner

from mculora.use.artefact import Artefact, Standalone, card, from_run, load, save, write_program
from mculora.training.calibration import Calibration, calibrate, calibration_report
from mculora.basics.dialogues import DataError, batch, keep, random_dialogues
from mculora.basics.masking import drop
from mculora.use.merge import merge, size
from mculora.basics.method import create, methods
from mculora.basics.modalities import labels, members
from mculora.use.prediction import Predictor
from mculora.experiments.results import addresses, read_result, write_result
from mculora.experiments.runs import RunConfig, run
from mculora.data.sources import fit_scale, scale
from mculora.use.cli import app

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(width=16, depth=1, rank=2, epochs=1, lr=1e-2, batch_size=4, C=0.01)
SHAPES = {
    'two': ({'text': 6, 'audio': 4}, 0),
    'three': ({'a': 4, 't': 6, 'v': 5}, 4),
    'four': ({'a': 2, 'b': 3, 'c': 4, 'd': 5}, 2),
}


def new(method, shape, train=None, **options):
    widths, classes = SHAPES[shape]
    d = random_dialogues((5, 3, 7, 4, 6), widths, classes, parts=('train',) * 4 + ('test',))
    torch.manual_seed(0)
    m = create(method, d.task, widths, known(method, SMALL | options))
    stats = fit_scale(d)
    m.prepare(scale(train or d, stats))
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * 0.1) for p in m.parameters()]
    return Artefact(
        m.eval().requires_grad_(False),
        stats,
        Calibration(
            {c: 1 + 0.1 * k for k, c in enumerate(labels(widths))},
            dict.fromkeys(labels(widths), 30),
        ),
    ), d


@pytest.mark.parametrize('shape', ['two', pytest.param('three', marks=pytest.mark.slow), 'four'])
@pytest.mark.parametrize('method', sorted(methods()))
def test_every_method_comes_back_and_predicts_the_same(tmp_path, method, shape):
    a, d = new(method, shape)
    again = load(save(a, tmp_path / 'model'))
    assert (again.method.name, again.method.settings, again.task, again.calibration) == (
        method,
        a.method.settings,
        a.task,
        a.calibration,
    )
    for (k, v), (n, w) in zip(
        a.method.state_dict().items(), again.method.state_dict().items(), strict=True
    ):
        assert k == n and torch.equal(v, w)
    for m in a.modalities:
        assert all(torch.equal(x, y) for x, y in zip(a.scale[m], again.scale[m]))
    for one, other in zip(Predictor(a).outputs(d), Predictor(again).outputs(d)):
        assert one is other is None or torch.equal(one, other)
    assert 'simulated' in card(again) and all(m in card(again) for m in a.modalities)


@pytest.mark.parametrize('place', ['output', 'linear', 'none'])
@pytest.mark.parametrize('shape', ['two', pytest.param('three', marks=pytest.mark.slow), 'four'])
def test_merged_equals_the_model_for_every_combination(shape, place):
    same_as_merged(*new('mculora', shape, adapter_place=place), smaller=place != 'linear')


def test_merged_equals_the_model_where_a_combination_never_occurred_in_training():
    d = random_dialogues((5, 3, 7, 4, 6), parts=('train',) * 4 + ('test',))
    apart = d.present.clone()
    # a and v are never there together
    apart[:12, 0], apart[12:, 2] = False, False
    a, _ = new('mculora', 'three', train=drop(d, apart))
    same_as_merged(a, d)


def same_as_merged(a, d, smaller=True):
    "The merged model against the model, under every combination."
    b = batch(scale(d, a.scale), range(len(d)))
    for row, label in zip(members(len(a.modalities)), labels(a.modalities)):
        one, small = keep(b, row), merge(a.method, label)
        # it is given nothing else
        y, w = small({m: one.features[m] for m in small.names}, one.valid)
        torch.testing.assert_close(y[b.valid], a.method.predict(one)[b.valid], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            w[b.valid], a.method.inspect(one)['weight'][b.valid], rtol=0, atol=1e-5
        )
        if row.sum() < len(row) and smaller:
            assert size(small) < size(a.method)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model with one program: to trace it takes seconds."
    a, _ = new('mculora', 'four')
    return save(a, tmp_path_factory.mktemp('whole') / 'model', compiled=('bd',))


@pytest.mark.parametrize(
    'shape, label',
    [
        pytest.param('two', 'text', marks=pytest.mark.slow),
        pytest.param('two', 'text+audio', marks=pytest.mark.slow),
        ('four', 'bd'),
    ],
)
def test_a_program_takes_any_number_of_dialogues_of_any_length(tmp_path, model, shape, label):
    a, d = new('mculora', shape)
    path = model / 'bd.pt2'
    if label != 'bd':
        write_program(a, label, path := tmp_path / 'one.pt2')
    extra = {'mculora.json': ''}
    program, module = (
        torch.export.load(str(path), extra_files=extra).module(),
        Standalone(a, label),
    )
    assert json.loads(extra['mculora.json'])['combination'] == label
    assert b'nbs' not in path.read_bytes()
    for rows in ([0], [1, 3], range(5)):
        b = batch(d, rows)
        x = {m: b.features[m] for m in module.merged.names}
        p, w = program(x, b.valid)
        for one, other in zip((p, w), module(x, b.valid)):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        # as the predictor says it, dialogue by dialogue
        for k, r in enumerate(rows):
            n = int(d.lengths[r])
            told = Predictor(a)([{m: v[k, j].numpy() for m, v in x.items()} for j in range(n)])
            want = [list(t.probability.values()) or [t.score] for t in told]
            torch.testing.assert_close(p[k, :n], torch.tensor(want), rtol=0, atol=1e-5)
    # what lies on padding is not looked at
    wild = {m: v.masked_fill(~b.valid[..., None], float('nan')) for m, v in x.items()}
    torch.testing.assert_close(program(wild, b.valid)[0][b.valid], p[b.valid], rtol=0, atol=1e-6)


def edit(folder, **new):
    (folder / 'config.json').write_text(
        json.dumps(json.loads((folder / 'config.json').read_text()) | new)
    )


def weights(folder, change):
    "Change the weights' file, and the checksum with it: what a person could do."
    import hashlib

    change(folder / 'model.safetensors')
    c = json.loads((folder / 'config.json').read_text())
    edit(
        folder,
        files=c['files']
        | {
            'model.safetensors': hashlib.sha256(
                (folder / 'model.safetensors').read_bytes()
            ).hexdigest()
        },
    )


def poison(path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), 'pt') as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    tensors['model.fusion.splice.bias'][0] = float('nan')
    save_file(tensors, str(path), metadata=meta)


def other(path):
    a, _ = new('mculora', 'three')
    save(a, path.parent / 'other')
    shutil.copy(path.parent / 'other' / 'model.safetensors', path)


def calibration(folder, **new):
    edit(folder, calibration=json.loads((folder / 'config.json').read_text())['calibration'] | new)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda f: (f / 'config.json').unlink(),
            'found no such file, expected the configuration of a model',
        ),
        (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe'), 'found no whole JSON file'),
        (lambda f: (f / 'config.json').write_text('[]'), 'config.json'),
        (lambda f: (f / 'model.safetensors').unlink(), 'model.safetensors: found no such file'),
        (
            lambda f: (f / 'model.safetensors').write_bytes(
                (f / 'model.safetensors').read_bytes()[:-7]
            ),
            'found contents with the checksum',
        ),
        (lambda f: (f / 'bd.pt2').write_bytes(b'PK'), 'bd.pt2: found contents with the checksum'),
        (lambda f: edit(f, format=9), 'found format 9, expected 1'),
        (lambda f: edit(f, library='other'), 'library'),
        (lambda f: edit(f, method='momke'), 'do not agree on method'),
        (lambda f: edit(f, files={}), 'found no checksum of model.safetensors'),
        (
            lambda f: edit(f, files={'../x': '0' * 64, 'model.safetensors': '0' * 64}),
            "found the file name '../x', expected a plain one",
        ),
        (
            lambda f: edit(f, standardised=False),
            'found a scale in model.safetensors, expected none',
        ),
        (
            lambda f: edit(
                f,
                task=json.loads((f / 'config.json').read_text())['task']
                | {'classes': ['x', 'b', 'c', 'd']},
            ),
            'do not agree on task',
        ),
        (lambda f: calibration(f, temperature={'a': 1.0}), 'found the temperatures'),
        (
            lambda f: calibration(
                f,
                temperature=json.loads((f / 'config.json').read_text())['calibration'][
                    'temperature'
                ]
                | {'a': -1.0},
            ),
            'found the temperatures',
        ),
        (lambda f: weights(f, poison), 'found NaN in fusion.splice.bias'),
        (lambda f: weights(f, other), 'do not agree on'),
        (
            lambda f: weights(f, lambda p: p.write_bytes(struct.pack('<Q', 2) + b'{}')),
            'found no whole model file',
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, model, change, message):
    folder = tmp_path / 'model'
    shutil.copytree(model, folder)
    assert load(folder).programs == ('bd',)
    change(folder)
    with pytest.raises(DataError) as e:
        load(folder)
    assert message in str(e.value) and str(folder) in str(e.value)


def test_a_card_says_which_numbers_are_not_defined(model):
    a = load(model)
    scores = [
        dict(condition=c, metric=m, value=0.5, mean=0.5, half=None, runs=1)
        for c, ms in (('a', ('ACC', 'F1', 'MAE', 'r')), ('t', ('MAE', 'r')))
        for m in ms
    ]
    n = dict(train=1, val=1, test=1)
    scored = replace(
        a,
        method=create('majority', replace(a.task, classes=(), middle=0.0), a.method.widths),
        trained=dict(
            data=dict(fold='test', utterances=n),
            config=dict(seed=1, schedule='quick', version='1'),
            environment=dict(commit='0', changed=False),
            scores=scores,
        ),
    )
    assert re.search(r'\| t \|( not defined \|){2}', card(scored)) and not re.search(
        r'\| a \|.*not defined', card(scored)
    )


def test_programs_of_other_methods_are_refused_before_anything_is_written(tmp_path):
    a, _ = new('zero-fill', 'three')
    with pytest.raises(ValueError, match="merge: found the method 'zero-fill'"):
        save(a, tmp_path / 'model', compiled=('t',))
    assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize('method', ['majority', 'logistic', 'logistic-per-condition'])
def test_calibration_is_not_decided_by_a_class_that_training_never_had(tmp_path, method):
    d = random_dialogues((60, 60))
    three = replace(d, label=d.label.clamp(max=2))
    m = create(method, d.task, d.widths)
    m.prepare(three)
    rest = torch.arange(120)[:, None].expand(-1, 3) > 0
    # one utterance of it; nothing else
    for label in (torch.where(rest[:, 0], three.label, 3), torch.full_like(d.label, 3)):
        val = replace(d, label=label)
        c = calibrate(m, val)
        assert c.temperature == pytest.approx(
            calibrate(m, drop(three, rest)).temperature
            if label[1] != 3
            else dict.fromkeys(labels(d.widths), 1.0),
            abs=1e-5,
        )
        again = load(
            save(
                Artefact(m.eval(), {}, c, calibration_report(m, c, val)),
                tmp_path / str(int(label[1])),
            )
        )
        assert again.calibration == c and all(
            math.isfinite(x) for r in again.report.values() for x in r.values()
        )


def test_a_run_is_exported_with_its_own_data_only(tmp_path):
    _, folder = run(
        RunConfig(
            dataset='mosei',
            size='tiny',
            out_dir=str(tmp_path),
            options=dict(epochs=1, width=16, depth=1),
            device='cpu',
        ),
        progress=False,
    )
    # scores: no temperatures
    a = from_run(folder)
    assert (
        set(a.calibration.temperature.values()) == {1.0}
        and a.report == {}
        and 'no probabilities' in card(a)
    )
    assert load(save(a, tmp_path / 'model')).trained['data']['name'] == 'mosei-simulated-tiny'
    r = read_result(folder)
    write_result(folder, r.model_copy(update=dict(data=r.data | dict(hash='0' * 16))))
    with pytest.raises(DataError, match='found data with the fingerprint'):
        from_run(folder)
    assert from_run(folder, calibrated=False).calibration.utterances == {}
    with open(folder / 'model.safetensors', 'ab') as f:
        f.write(b'x')
    with pytest.raises(DataError, match='differ from the checksum in result.json'):
        from_run(folder)


def test_whoever_mistypes_a_run_is_told_which_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f'Session{k}-seed{s}-quick-0123abcd' for k in (1, 2) for s in (66, 67)]
    for name in names:
        at = tmp_path / 'runs' / 'iemocap' / 'mculora' / name
        at.mkdir(parents=True)
        (at / 'result.json').touch()

    def said(run):
        done = CliRunner().invoke(app, ['export', str(run), 'my model'])
        assert done.exit_code == 2
        return done.stderr

    for wrong in ('runs/iemocap/mculora/Session2-seed67', 'runs/iemocap/Session2-seed67-quick'):
        lines = said(wrong).splitlines()
        assert lines[0] == f'Error: {wrong}: found no finished run, expected one, such as'
        assert lines[1] == f"  mculora export runs/iemocap/mculora/{names[3]} 'my model'"
        assert len(lines) == 5 and lines[4].startswith('  and 1 more below runs')
    # from elsewhere, and of the folder of several
    assert f'mculora export runs/iemocap/mculora/{names[0]} ' in said(tmp_path / 'runs')
    empty = tmp_path / 'empty'
    empty.mkdir()
    monkeypatch.setattr('mculora.use.cli.repo_root', lambda: empty)
    assert 'expected one that `mculora train` made; below' in said(empty / 'nothing')
    # what is kept in results/ has no weights
    kept = addresses(ROOT / 'results')[0]
    assert f'  mculora rerun {kept} --out-dir runs' in said(kept)


def test_a_program_takes_what_was_not_measured_for_the_mean():
    "As the model does with `nonfinite='entry'`; a NaN must not reach the answer."
    a, d = new('mculora', 'four')
    label = labels(a.modalities)[-1]
    x = {m: d.features[m][:3].clone() for m in a.modalities}
    for v in x.values():
        v[1, 0] = float('nan')
    rows = [{m: v[i].tolist() for m, v in x.items()} for i in range(3)]
    want = Predictor(a, nonfinite='entry')(rows)
    said, _ = Standalone(a, label)({m: v[None] for m, v in x.items()}, torch.ones(1, 3, dtype=bool))
    assert said.isfinite().all()
    for p, q in zip(want, said[0]):
        assert torch.tensor(list(p.probability.values())).allclose(q, atol=1e-5)
