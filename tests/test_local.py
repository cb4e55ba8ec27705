"""A change is local: a metric, a missing protocol, a layout, a setting of runs, an extractor and an
encoder are each added in one place, here from outside, and everything that shows them follows."""

import json
import wave
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from pydantic import ConfigDict
from small import small
from torch import nn
from typer.testing import CliRunner

from mculora.basics import method as registry
from mculora.basics.masking import PROTOCOLS, RATES
from mculora.basics.method import register
from mculora.data.clips import EXTRACTORS, Extractor
from mculora.data.sources import LAYOUTS, Layout, described, example, write_layout
from mculora.experiments.results import Shared, collect
from mculora.experiments.runs import RunConfig, load_method, prepare, ready, run
from mculora.experiments.store import told
from mculora.experiments.studies import Sweep, Variant, find
from mculora.experiments.tuning import Tuning
from mculora.model.encoders import plain
from mculora.model.mculora import MCULoRA
from mculora.training.evaluation import OF_CLASSES, Metric, shown
from mculora.use import cli

ROOT = Path(__file__).resolve().parent.parent


def tiny(where, **more):
    at = dict(size='tiny', method='majority', device='cpu', out_dir=str(where))
    return RunConfig(**(at | more))


def options_of(command):
    (found,) = [c for c in cli.app.registered_commands if c.callback.__name__ == command]
    return typer.utils.get_params_from_function(found.callback)


# --- a metric ---


def worst_recall(n):
    "The recall of the class that is found least often; n: [K, C, C] counts, label by prediction."
    return (n.diagonal(dim1=-2, dim2=-1) / n.sum(-1).clamp(min=1)).min(-1).values


def test_a_metric_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(OF_CLASSES, 'worst', Metric(worst_recall))
    r, _ = run(tiny(tmp_path), progress=False)
    got = {(s.protocol, s.condition): s.value for s in r.scores if s.metric == 'worst'}
    assert got['fixed', 'atv'] == 0 and {'fixed', 'random'} <= {p for p, _ in got}
    assert 'worst' in told(r) and shown('worst', 0.5) == '50.0 %'


# --- a missing protocol ---


def onset(d, rate, seed):
    "One modality of every dialogue is lost from its beginning on, for a share of its utterances."
    mask = torch.ones_like(d.present)
    g = torch.Generator().manual_seed(seed)
    for start, n in zip(d.offset.tolist(), d.lengths.tolist()):
        lost = int(torch.randint(mask.shape[1], (1,), generator=g))
        mask[start : start + round(rate * n), lost] = False
    return mask


def test_a_protocol_is_a_line(tmp_path, monkeypatch):
    before, _ = run(tiny(tmp_path / 'before'), progress=False)
    monkeypatch.setitem(PROTOCOLS, 'onset', onset)
    r, _ = run(tiny(tmp_path / 'after'), progress=False)
    assert [s for s in r.scores if s.protocol != 'onset'] == before.scores
    # the random protocol's masks keep their names
    assert before.masks.items() <= r.masks.items() and 'onset 0.3' in r.masks
    table = collect(tmp_path / 'after', 'onset')
    assert (
        list(table.condition.unique()) == [str(rate) for rate in RATES]
        and table.value.notna().all()
    )
    assert 'onset missing protocol' in told(r)


# --- a layout ---


def test_a_layout_is_a_line(tmp_path, monkeypatch):
    moods = 'glad', 'glum', 'cross'
    monkeypatch.setitem(LAYOUTS, 'chat', Layout('CHAT', 'CHAT_raw.pkl', moods, title='Chat'))
    write_layout(tmp_path, example('chat', lengths=[4] * 10))
    said = CliRunner().invoke(cli.app, ['data', 'check', str(tmp_path)])
    assert said.exit_code == 0 and 'glad' in said.output and 'no problems' in said.output
    c = tiny(tmp_path / 'runs', dataset='chat', data_root=str(tmp_path), size='full')
    r, _ = run(c, progress=False)
    assert r.data['name'] == 'chat' and not r.data['simulated']
    assert described('chat').classes == moods and described('chat').release == 'chat'


def test_what_data_are_is_not_read_from_a_name(tmp_path):
    "A file may be called as it likes: only its description says that it is simulated."
    rows = [dict(dialogue=k, label='xy'[k % 2], a=[float(k), 1.0]) for k in range(9)]
    for name in ('mosei-simulated-tiny', 'plain'):
        pd.DataFrame(rows).to_parquet(tmp_path / f'{name}.parquet')
        for simulated in (False, True):
            at = dict(dataset=str(tmp_path / f'{name}.parquet'), table=dict(simulated=simulated))
            task = prepare(RunConfig(**at, method='majority', device='cpu'))[0].train.task
            assert (task.simulated, task.release, task.tiny) == (simulated, None, False)


# --- a setting of runs ---


SEVERAL = {'together', 'processes', 'graphs'}  # how runs are carried out


def test_a_command_takes_every_setting_of_a_run():
    assert set(options_of('train')) == set(RunConfig.model_fields) | SEVERAL
    for command, cls in (('study', Sweep), ('tune_', Tuning)):
        assert set(Shared.model_fields) <= set(options_of(command)) & set(cls.model_fields)
    # what stands below a field is what a command says of it
    for f in RunConfig.model_fields.values():
        assert f.description and f.description.endswith(('.', '...'))


def test_the_training_notebook_has_every_setting_of_a_run():
    nb = json.loads((ROOT / 'nbs' / 'train.ipynb').read_text())
    (cell,) = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    found: dict = {}
    exec(''.join(cell['source']), {}, found)
    assert list(found) == list(RunConfig.model_fields)
    assert RunConfig(**found) == RunConfig()


class Later(RunConfig):
    "A run, with settings that the package does not know yet."

    model_config = ConfigDict(use_attribute_docstrings=True)
    less: float = 1.0
    'Share of the training dialogues that are used.'
    order: dict[str, int] = {}
    'Which place a modality has, as JSON.'


def test_a_later_setting_leaves_old_hashes_alone(tmp_path):
    c = tiny(tmp_path).model_dump()
    old, same = ready(RunConfig(**c)), ready(Later(**c))
    assert (same.key, same.full) == (old.key, old.full)
    other = ready(Later(**c, less=0.5))
    assert other.key != old.key and other.full == old.full | dict(less=0.5)


def test_a_later_setting_is_an_option():
    app, got = typer.Typer(), {}

    @app.command()
    @cli._with_settings(Later, 'less', 'order', 'features')
    def command(**settings):
        got.update(cli._values(Later, settings))

    args = ['--less', '0.5', '--order', '{"a": 2}', '--features', 'a=x', '--features', 'b=y']
    assert CliRunner().invoke(app, args).exit_code == 0
    assert got == dict(less=0.5, order=dict(a=2), features=dict(a='x', b='y'))
    assert CliRunner().invoke(app, []).exit_code == 0
    assert got == dict(less=1.0, order={}, features=None)
    assert 'Share of the training' in CliRunner().invoke(app, ['--help']).output


OTHER = dict(
    precision='bf16',
    missing=0.3,
    hold='session',
    standardise=False,
    speaker_noise=0.1,
    train_groups=2,
)


def test_a_table_has_runs_of_one_setting_only(tmp_path):
    sweep = Sweep(data='iemocap-simulated-tiny', folds=[1], seeds=[66])
    some = [Variant(name='majority', method='majority')]
    (c,) = sweep.configs(some, out_dir=str(tmp_path), device='cpu')
    run(c, progress=False)
    runs = collect(tmp_path)
    found, missing = find(runs, sweep, some)
    assert len(found) and not missing
    for name, value in OTHER.items():
        unlike = sweep.model_copy(update={name: value})
        assert list(find(runs, unlike, some)[1]) == ['majority'], name
        assert getattr(unlike.configs(some)[0], name) == value


# --- a frozen encoder of raw clips ---


class Loudness(Extractor):
    "The loudness of a clip, and how much it changes."

    column, name, key = 'wav', 'loudness-UTT', '{"name": "loudness"}'

    def __call__(self, source):
        with wave.open(str(source)) as w:
            x = np.frombuffer(w.readframes(w.getnframes()), '<i2') / 2**15
        return np.array([np.abs(x).mean(), x.std()], np.float32)


def test_an_extractor_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(EXTRACTORS['a'], 'loudness', Loudness)
    for k in range(2):
        with wave.open(str(tmp_path / f'u{k}.wav'), 'wb') as w:
            w.setparams((1, 2, 16000, 0, 'NONE', ''))
            w.writeframes(np.full(1600, 2**14 * k, '<i2').tobytes())
    lines = ['utterance,dialogue,wav', 'u0,d0,u0.wav', 'u1,d1,u1.wav']
    (tmp_path / 'clips.csv').write_text('\n'.join(lines))
    args = ['data', 'extract', tmp_path / 'clips.csv', tmp_path / 'out', '--audio', 'loudness']
    said = CliRunner().invoke(cli.app, [*map(str, args), '--text', 'none', '--face', 'none'])
    assert said.exit_code == 0, said.output
    names = pd.read_csv(tmp_path / 'out' / 'features.csv').a
    got = [np.load(tmp_path / 'out' / n).tolist() for n in names]
    assert got == [[0.0, 0.0], [0.5, 0.0]]


# --- an encoder of the model ---


class Alone(nn.Module):
    "Every utterance by itself."

    def __init__(self, features, width):
        super().__init__()
        self.input = nn.Linear(features, width)

    def forward(self, x, present, adapt=plain, place=None, pack=False, among=None, speaker=None):
        return adapt('input', self.input, x).tanh() * present[..., None]


@pytest.mark.parametrize('place', [pytest.param('output', marks=pytest.mark.slow), 'linear'])
def test_an_encoder_is_a_method_of_its_own(tmp_path, monkeypatch, place):
    monkeypatch.setattr(registry, '_methods', {**registry.methods()})

    @register('mculora-alone', listed=False)
    class WithAlone(MCULoRA):
        "Voices are read utterance by utterance, all else as in MCULoRA."

        def encoder(self, modality, features):
            if modality == 'a':
                return Alone(features, self.settings.width)
            return super().encoder(modality, features)

    options = small('mculora-alone', adapter_place=place)
    c = tiny(tmp_path, method='mculora-alone', options=options)
    r, folder = run(c, progress=False)
    net, _ = load_method(folder)
    assert isinstance(net.encoders['a'], Alone) and not isinstance(net.encoders['t'], Alone)
    assert all(np.isfinite(s.value) for s in r.scores if s.selection == 'validation')
