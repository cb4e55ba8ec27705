"""Whole runs: killed and resumed, on files in the field's layout, with a disk that fails, through
papermill."""

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import ClassVar

import matplotlib.image as mpimg
import nbformat
import pandas as pd
import psutil
import pytest
import torch
from forks import EPOCH, SERVER, Place, die_after, outcome, server, small_files, until
from notebooks import papermill, passes
from notebooks import run as run_notebook
from safetensors.torch import load_file
from small import known
from typer import Typer
from typer.testing import CliRunner

import mculora
from mculora.__main__ import main
from mculora.use.cli import app
from mculora.basics.dialogues import DataError, Task, random_dialogues, split
from mculora.training import graphs
from mculora.training.evaluation import metric_names
from mculora.training.graphs import Tape
from mculora.basics.method import create, methods, read_settings
from mculora.basics.modalities import labels
from mculora.experiments.results import addresses, collect, read_result
from mculora.data.own import open_data
from mculora.data.tables import as_table
from mculora.experiments import runs
from mculora.experiments.runs import (
    OutputError,
    RunConfig,
    _full,
    incomplete,
    load_method,
    locked,
    n_processes,
    prepare,
    ready,
    run,
    run_all,
    size_of,
)
from mculora.data.sources import example, write_layout
from mculora.experiments.store import rerun
from mculora.experiments.studies import Sweep, Variant, find
from mculora.data.twins import bayes_limit

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(width=16, depth=1, rank=2, epochs=6, batch_size=4)
TINY = dict(size='tiny', schedule='quick')
# two stages; the quick schedule stops the first early
FEW = dict(epochs=3, batch_size=16)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp('whole') / 'place', **TINY)
    code, text = place.go(**FEW)
    assert code == 0, text
    place.whole, place.epochs = outcome(place.results[0].parent), len(EPOCH.findall(text))
    return place


# in the first stage (test_faults kills there, too) and in the second
@pytest.mark.parametrize(
    'after, seconds',
    [*(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 0.03), (2, 0.05))), (5, 0.01)],
)
def test_killed_at_any_moment_ends_with_the_same_bits(tmp_path, uninterrupted, after, seconds):
    "Somewhere in an epoch, or in writing the checkpoint."
    place = Place(tmp_path / 'place', **TINY)
    code, text = place.go(during=[(after, die_after, (seconds,))], **FEW)
    assert code == -signal.SIGPROF and len(EPOCH.findall(text)) >= after and not place.results, text
    code, text = place.go(**FEW)
    # it went on, it did not start over
    assert code == 0 and len(EPOCH.findall(text)) <= uninterrupted.epochs - after + 1, text
    assert outcome(place.results[0].parent) == uninterrupted.whole


def test_a_disk_that_fails_loses_nothing(tmp_path, uninterrupted):
    "Files may not grow beyond a limit: every write of the weights fails, as on a full disk."
    place = Place(tmp_path / 'place', **TINY)
    code, text = place.go((small_files, (10_000,)), **FEW)
    assert (
        code == 1
        and 'cannot write' in text
        and 'start the same run again' in text
        and not place.results
    ), text
    code, text = place.go(**FEW)
    assert code == 0 and outcome(place.results[0].parent) == uninterrupted.whole, text


def test_finished_runs_are_not_repeated_and_settings_make_new_ones(tmp_path):
    c = RunConfig(size='tiny', method='logistic', out_dir=str(tmp_path), device='cpu', check=False)
    first, folder = run(c, progress=False)
    stamp = (folder / 'result.json').stat().st_mtime_ns
    assert (
        run(c, progress=False)[1] == folder and (folder / 'result.json').stat().st_mtime_ns == stamp
    )
    assert run(c.model_copy(update=dict(options={'C': 1.5})), progress=False)[1] != folder
    assert run(c.model_copy(update=dict(seed=1)), progress=False)[1] != folder
    # half a file is not a result
    (folder / 'result.json').write_text('{"status": "complete"')
    with pytest.warns(UserWarning, match='found no whole result file.*the run is made again'):
        again, same = run(c, progress=False)
    assert same == folder and again.scores == first.scores
    assert len(collect(tmp_path).config_hash.unique()) == 3


@pytest.mark.parametrize(
    'method, dataset',
    [('mculora', 'iemocap'), ('mculora', 'mosei'), ('logistic', 'iemocap6'), ('logistic', 'mosi')],
)
def test_from_files_in_the_fields_layout(tmp_path, monkeypatch, dataset, method):
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'cache'))
    write_layout(tmp_path, example(dataset))
    r, folder = run(
        RunConfig(
            dataset=dataset,
            data_root=str(tmp_path),
            method=method,
            out_dir=str(tmp_path / 'runs'),
            device='cpu',
            schedule='quick',
            options={**SMALL, 'epochs': 1} if method == 'mculora' else {},
        ),
        progress=False,
    )
    assert (
        r.data['simulated'] is False
        and r.data['name'] == dataset
        and 'simulated' not in str(folder.relative_to(tmp_path))
    )
    task = prepare(RunConfig(dataset=dataset, data_root=str(tmp_path), device='cpu'))[0].train.task
    assert {s.metric for s in r.scores} == {
        *metric_names(task),
        *(('ECE', 'ECE, temperature') if task.classes else ()),
    }
    assert {s.condition for s in r.scores} >= {'a', 't', 'at', 'incomplete', 'all'}
    assert {s.selection for s in r.scores} == (
        {'validation', 'test'} if method == 'mculora' else {'validation'}
    )


def test_result_says_what_it_is(tmp_path):
    r, folder = run(
        RunConfig(
            size='tiny',
            out_dir=str(tmp_path),
            device='cpu',
            options=dict(epochs=1, batch_size=16),
        ),
        progress=False,
    )
    assert r.data['simulated'] and 'simulated' in r.data['name'] and 'simulated' in str(folder)
    assert (
        r.config['schedule'] == 'quick'
        and 'quick' in folder.name
        and r.config['options']['rank'] == 4
    )
    assert (
        {'commit', 'torch', 'processor', 'threads'} <= r.environment.keys()
        and r.seconds > 0
        and r.peak_mb > 0
    )
    assert [s['name'] for s in r.stages] == ['pretrain', 'finetune']
    weights = load_file(folder / 'model.safetensors')
    assert {'scale.a.mean', 'scale.a.std', 'model.q'} <= weights.keys()
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-5])
    with pytest.raises(DataError, match='model.safetensors: found other contents'):
        load_method(folder)
    (folder / 'result.json').unlink()
    with pytest.raises(DataError, match='no whole model file'):
        load_method(folder)


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='cannot write to .*nothing was started'):
        run(RunConfig(size='tiny', method='majority', out_dir=str(tmp_path / 'file'), device='cpu'))


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(dataset='meld'), "dataset: found 'meld', expected 'iemocap'"),
        (dict(method='gcn'), "method: found 'gcn', expected one of .*mculora"),
        (dict(fold=7), 'fold: found 7, expected 1 to 5'),
        (dict(device='cuda:99'), "device: found 'cuda:99'"),
        (dict(seed='66'), "seed: found '66', expected a valid integer"),
        (dict(standardise='true'), "standardise: found 'true'"),
        (dict(options='[1,2]'), 'options: found'),
        (dict(options={'lr': '1e-4'}), "lr: found '1e-4', expected a valid number"),
        (dict(options={'rank': 0}), 'rank: found 0'),
        (dict(schedule='slow'), "schedule: found 'slow'"),
        (dict(size='huge'), "size: found 'huge'"),
        (dict(datset='mosei'), 'datset: found'),
        (dict(missing=1.0), 'missing: found 1.0, expected a share'),
        (dict(missing='0.3'), "missing: found '0.3'"),
        (dict(missing=True), 'missing: found True'),
        (dict(missing={'v': -1.0}), "missing: found {'v': -1.0}, expected a share"),
        (dict(data_root='no/such/folder', size='full'), 'no/such/folder'),
        (dict(features={'a': 'x'}, size='full'), 'features'),
    ],
)
def test_bad_parameters_are_refused_before_any_work(tmp_path, bad, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(
            read_settings(
                RunConfig, {'size': 'tiny', 'out_dir': str(tmp_path / 'out'), **bad}, 'parameters'
            ),
            progress=False,
        )
    assert not (tmp_path / 'out').exists()


# of all entries; of single modalities
GAPS = (0.6, {'v': 0.8, 't': 0.3})
LESS = dict(
    width=8, depth=1, rank=2, epochs=1, batch_size=16, steps=2, heads=1, blocks=1, couplings=1
)


def learns_from_what_is_left(tmp_path, method, missing, options):
    c = RunConfig(
        size='tiny',
        method=method,
        missing=missing,
        out_dir=str(tmp_path),
        device='cpu',
        options=known(method, options),
        check=False,
    )
    r, _ = run(c, progress=False)
    s, *_ = prepare(c)
    counts = r.data['conditions']
    assert (
        set(counts['test'].values()) == {r.data['utterances']['test']}
        and counts['train']['atv'] < 0.4 * r.data['utterances']['train']
    )
    assert (
        r.config['missing'] == missing
        and set(r.data['missing']) == {'train', 'val'}
        and s.train.present.any(-1).all()
    )
    assert {x.condition for x in r.scores if x.protocol == 'fixed' and x.metric == 'WA'} == {
        *labels('atv'),
        'incomplete',
        'all',
    }
    assert all(x.value == x.value for x in r.scores)


# all others are trained where nobody is complete by test_own, and with gaps by `make test-all`
OF_EACH_KIND = (
    'gcnet',
    'knn-imputation',
    'logistic-per-condition',
    'mculora',
    'momke',
)


@pytest.mark.parametrize('method', OF_EACH_KIND)
def test_training_with_gaps(tmp_path, method):
    """A method learns from what is left, is measured under every condition on all of the test
    part, and says what was gone."""
    for missing in GAPS[: 1 + (method == 'mculora')]:
        learns_from_what_is_left(tmp_path, method, missing, LESS)


@pytest.mark.slow
@pytest.mark.parametrize('missing', GAPS, ids=str)
@pytest.mark.parametrize('method', sorted(methods().keys() - {'majority'}))
def test_longer_training_with_gaps(tmp_path, method, missing):
    learns_from_what_is_left(tmp_path, method, missing, {**SMALL, 'epochs': 2, 'steps': 2})


def test_what_is_gone_is_gone(tmp_path):
    """Other values in entries that training lacks give the same parts, to the bit: the scale, too,
    has not seen them."""
    c = RunConfig(
        size='tiny',
        missing=0.5,
        out_dir=str(tmp_path),
        device='cpu',
        options={**SMALL, 'epochs': 2},
    )

    # the same data, but for the entries of training and validation that this run lacks
    def other(*args):
        d = open_data(*args)
        s = prepare(c)[0]
        gone = {u: ~p for part in (s.train, s.val) for u, p in zip(part.utterances, part.present)}
        out = torch.stack([gone.get(u, torch.zeros(3, dtype=torch.bool)) for u in d.utterances])
        return replace(
            d,
            features={
                m: torch.where(out[:, k : k + 1], 7.0, x)
                for k, (m, x) in enumerate(d.features.items())
            },
        )

    plain, changed = prepare(c), prepare(c, other)
    for part in ('train', 'val', 'test'):
        for m, x in getattr(plain[0], part).features.items():
            assert torch.equal(x, getattr(changed[0], part).features[m]), (part, m)


def test_gaps_are_part_of_what_a_run_is(tmp_path):
    at = dict(size='tiny', method='logistic', out_dir=str(tmp_path), device='cpu', check=False)
    jobs = [
        ready(RunConfig(**at, **w))
        for w in (
            {},
            dict(missing=0.0),
            dict(missing=0.3),
            dict(missing={'v': 0.3}),
            dict(missing=0.3, seed=67),
        )
    ]
    # complete: as before there was such a setting
    assert (
        jobs[0].key == jobs[1].key
        and len({j.key for j in jobs}) == 4
        and 'missing' not in jobs[0].full
    )
    for j in jobs[1:4]:
        run(j.config, progress=False)
    sweep = Sweep(data='iemocap-simulated-tiny', folds=[1], seeds=[66])
    one = [Variant(name='logistic', method='logistic')]
    scores = {
        str(m): find(collect(tmp_path), sweep.model_copy(update=dict(missing=m)), one)[
            0
        ].value.tolist()
        for m in (0.0, 0.3, {'v': 0.3})
    }
    # each found by itself
    assert len({tuple(v) for v in scores.values()}) == 3
    with pytest.raises(
        ValueError, match='missing: found speech, expected modalities of iemocap.*a, t, v'
    ):
        prepare(RunConfig(**at, missing={'speech': 0.3}))
    with pytest.raises(
        ValueError, match='missing: rate: found .*expected 3 shares with a sum of at most 2'
    ):
        prepare(RunConfig(**at, missing={'a': 0.9, 't': 0.9, 'v': 0.9}))
    said = CliRunner().invoke(
        app,
        [
            'train',
            '--size',
            'tiny',
            '--method',
            'logistic',
            '--fold',
            '1',
            '--missing',
            '{"v": 0.5}',
            '--out-dir',
            str(tmp_path / 'cli'),
            '--device',
            'cpu',
        ],
    )
    assert said.exit_code == 0 and read_result(
        next((tmp_path / 'cli').rglob('result.json'))
    ).config['missing'] == {'v': 0.5}


def trained_notebook(folder, printed):
    "What the training notebook has left, of three epochs on the tiny twin of CMU-MOSEI."
    (r,) = folder.rglob('result.json')
    c = read_result(r).config
    assert (
        c['options']['epochs'] == 3
        and c['dataset'] == 'mosei'
        and c['schedule'] == ('paper' if c['device'] == 'cuda' else 'quick')
    )
    pictures = [p.name for p in r.parent.glob('*.png')]
    assert sorted(p.rsplit('-', 1)[1] for p in pictures) == [
        'adapters.png',
        'conditions.png',
        'curves.png',
        'dpft.png',
        'errors.png',
        'weight.png',
    ]
    assert all('simulated' in p and c['schedule'] in p for p in pictures)
    assert 'SIMULATED twin' in printed and 'selected on test' in printed and 'incomplete' in printed


# the notebook itself runs in test_notebooks, and with papermill's parameters in the third below
@pytest.mark.slow
def test_train_notebook_with_parameters(tmp_path):
    given = dict(
        size='tiny', dataset='mosei', out_dir=str(tmp_path / 'runs'), options=dict(epochs=3)
    )
    trained_notebook(tmp_path / 'runs', passes('nbs/train.ipynb', given).text)


@pytest.mark.slow
def test_train_notebook_by_papermill(tmp_path):
    done = papermill(
        tmp_path / 'out.ipynb',
        size='tiny',
        dataset='mosei',
        out_dir=str(tmp_path / 'runs'),
        options=dict(epochs=3),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained_notebook(tmp_path / 'runs', (tmp_path / 'out.ipynb').read_text())


@pytest.mark.slow
def test_train_notebook_with_a_model_per_condition(tmp_path):
    done = papermill(
        tmp_path / 'out.ipynb',
        size='tiny',
        dataset='mosi',
        method='mctn-per-condition',
        out_dir=str(tmp_path / 'runs'),
        options=dict(epochs=2),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (r,) = (tmp_path / 'runs').rglob('result.json')
    assert [s['selected_on'] for s in read_result(r).stages] == list(labels('atv')) and [
        p.name for p in r.parent.glob('*-curves.png')
    ]


def test_the_training_notebook_refuses_parameters_as_papermill_puts_them(tmp_path):
    given = dict(out_dir=str(tmp_path / 'runs'), datset='mosei')
    ran = run_notebook('nbs/train.ipynb', given)
    assert ran.code and "datset: found 'mosei'" in ran.text
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_papermill_refuses(tmp_path):
    done = papermill(tmp_path / 'out.ipynb', out_dir=str(tmp_path / 'runs'), datset='mosei')
    assert done.returncode != 0 and 'datset: found' in re.sub(r'\x1b\[[0-9;]*m', '', done.stderr)
    assert not (tmp_path / 'runs').exists()


def opened(monkeypatch, **given):
    """The first cells of the training notebook, in this process: its parameters, `given` after
    them as papermill puts it, and what checks them and reads the data."""
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setenv('MCULORA_CACHE', given['out_dir'] + '-cache')
    monkeypatch.setattr('seaborn.set_theme', lambda **how: None)  # of the whole process
    first, *more = [
        c
        for c in json.loads((ROOT / 'nbs' / 'train.ipynb').read_text())['cells']
        if c['cell_type'] == 'code' and c['source'][0] != '#| include: false\n'
    ][:3]
    space = {}
    exec(''.join(first['source']), space)
    space.update(given)
    for cell in more:
        exec(''.join(cell['source']), space)
    return space


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(datset='mosei'), 'datset: found'),
        (dict(seed='66'), 'seed: found'),
        (dict(size='tiny', standardise='true'), 'standardise: found'),
        (dict(size='tiny', fold=9), 'fold: found 9'),
    ],
)
def test_the_cells_that_check_parameters_refuse(tmp_path, monkeypatch, given, message):
    with pytest.raises(ValueError, match=message):
        opened(monkeypatch, out_dir=str(tmp_path / 'runs'), **given)
    assert not (tmp_path / 'runs').exists()


def test_the_training_notebook_says_what_it_will_train_on(tmp_path, monkeypatch, capsys):
    opened(
        monkeypatch,
        size='tiny',
        dataset='mosi',
        method='mctn-per-condition',
        device='cpu',
        out_dir=str(tmp_path / 'runs'),
    )
    assert 'SIMULATED twin' in capsys.readouterr().out
    talks = random_dialogues(
        [3] * 12, {'text': 4, 'audio': 3}, 0, 0.3, parts=('train',) * 4 + ('val', 'test')
    )
    as_table(talks).rename(columns=dict(label='joy')).to_parquet(
        tmp_path / 'mine-simulated.parquet'
    )
    space = opened(
        monkeypatch,
        dataset=str(tmp_path / 'mine-simulated.parquet'),
        table=dict(label='joy'),
        device='cpu',
        out_dir=str(tmp_path / 'runs'),
    )
    assert 'utterances that have all of it' in capsys.readouterr().out and space[
        's'
    ].train.modalities == ('text', 'audio')


@pytest.mark.slow
def test_tiny_twin_is_learnt_within_its_limit(tmp_path):
    """Every condition above chance and none above the Bayes limit by more than its interval:
    pooled over the five folds of the tiny twin, for the linear models (MCULoRA on the full twin:
    results/)."""
    rows = []
    for fold in range(1, 6):
        for method in ('logistic-per-condition', 'majority'):
            r, _ = run(
                RunConfig(
                    size='tiny', method=method, fold=fold, out_dir=str(tmp_path), device='cpu'
                ),
                progress=False,
            )
            rows += [
                dict(
                    method=method,
                    n=r.data['utterances']['test'],
                    condition=s.condition,
                    value=s.value,
                )
                for s in r.scores
                if s.metric == 'WA'
            ]
    t = pd.DataFrame(rows)
    share = t.assign(right=t.value * t.n).groupby(['method', 'condition'])[['right', 'n']].sum()
    wa = share.right / share.n
    for c, m in bayes_limit('iemocap', 'tiny').items():
        n = share.loc['logistic-per-condition', c].n
        assert (
            wa['majority', c] < wa['logistic-per-condition', c] < m['WA'][0] + 4 * (0.25 / n) ** 0.5
        )


def typed(log, *arguments):
    "In a fork: the command line, as a shell starts it."
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1) for fd in (1, 2))
    # a shell's background job ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ['mculora', *arguments]
    main()


def test_ctrl_c_says_what_to_type_and_the_same_command_goes_on(tmp_path):
    "A moment after its first epoch, and exit code 130 as shells have it."
    server()
    command = f'train --size tiny --fold 1 --device cpu --no-check --out-dir {tmp_path}'.split()
    command += ['--options', '{"epochs": 3000, "width": 8, "depth": 1}']
    logs = [tmp_path / 'stopped.log', tmp_path / 'goes on.log']
    stopped, goes_on = (SERVER.Process(target=typed, args=(log, *command)) for log in logs)
    stopped.start()
    while stopped.exitcode is None and not list(tmp_path.rglob('checkpoint.safetensors')):
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGINT)
    stopped.join(120)
    said = logs[0].read_text()
    assert stopped.exitcode == 130 and 'Traceback' not in said, said
    kept = re.search(r'stopped; the same command goes on after pretrain, epoch (\d+)', said)[1]
    goes_on.start()
    until(logs[1], f'going on from the checkpoint: stage 1, epoch {kept}', goes_on)
    goes_on.kill()
    goes_on.join()


def test_a_twin_that_is_asked_for_is_the_run_that_it_is_without():
    "Its configuration, and so its hash and its folder, are the same; the data tell it from others."
    cpu, about, full = torch.device('cpu'), dict(hash='0' * 16), []
    method = create('majority', Task('iemocap', ('x', 'y')), {'a': 3})
    for size in ('full', 'twin', 'tiny'):
        full.append(_full(RunConfig(method='majority', size=size), method, 'quick', cpu, about))
    assert full[0] == full[1] != full[2] and full[0]['size'] == 'full'
    kinds = (True, 'full'), (True, 'tiny'), (False, 'full')
    twins = [size_of(dict(size=size), dict(simulated=twin)) for twin, size in kinds]
    assert twins == ['twin', 'tiny', 'full']
    assert size_of(dict(size='full'), dict(simulated=True, table={})) == 'full'


def test_a_method_that_was_not_exported_is_named_with_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(mculora, '__file__', str(tmp_path / 'mculora' / '__init__.py'))
    (tmp_path / 'nbs' / 'baselines').mkdir(parents=True)
    code = "#| export\n@register('votes')\nclass Votes(Method): ..."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(nb, tmp_path / 'nbs' / 'baselines' / '13_votes.ipynb')
    with pytest.raises(ValueError, match=r'; nbs/baselines/13_votes.ipynb .*: run nbdev_export$'):
        prepare(RunConfig(method='votes', size='tiny', device='cpu'))
    with pytest.raises(ValueError, match=r"found 'mculor', .*; did you mean 'mculora'\?$"):
        prepare(RunConfig(method='mculor', size='tiny', device='cpu'))


# --- played back ---


class Counted(Tape):
    made: ClassVar[list] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)


def test_a_run_that_was_played_back_says_so_and_is_played_back_again(tmp_path, monkeypatch):
    """On a CPU nothing is recorded, but batches are padded as for a recording: the same curves but
    for rounding, and a rerun has its bits."""
    monkeypatch.setattr(graphs, 'Tape', Counted)
    Counted.made.clear()
    (c,) = several(tmp_path / 'usual', 1e-3)
    usual, at = run(c, progress=False)
    played, there = run(c.model_copy(update=dict(out_dir=str(tmp_path))), False, graphs=True)
    # of each stage, steps and evaluations
    assert [bool(t.tapes) for t in Counted.made] == [True] * 4
    assert 'graphs' not in usual.environment and played.environment['graphs'] is True
    a, b = (pd.read_parquet(x / 'curves.parquet')['train/loss'] for x in (at, there))
    assert a.to_numpy() == pytest.approx(b.to_numpy(), abs=1e-4)
    again = rerun(there, tmp_path / 'again')
    assert read_result(again).environment['graphs'] is True and outcome(again) == outcome(there)


def measured(tmp_path, *args):
    "What the script for a GPU prints and writes, on a CPU."
    said = spec_from_file_location('gpu', ROOT / 'workflow' / 'gpu.py')
    code = module_from_spec(said)
    said.loader.exec_module(code)
    at = ['--size', 'tiny', '--device', 'cpu', '--seeds', '1', '--out', str(tmp_path / 'gpu')]
    gpu = Typer()
    gpu.command()(code.main)
    result = CliRunner().invoke(gpu, [*at, *args])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / 'gpu' / 'gpu.json').read_text())
    assert '\n'.join(found['lines']) + '\n' == result.output
    return found


def test_the_script_for_a_gpu_compares_recorded_with_eager_steps(tmp_path):
    found = measured(tmp_path, '--part', 'epochs')
    for stage in ('pretrain', 'finetune'):
        said = found['epochs'][stage]
        assert 0 <= said['apart'] < 1e-4
        for x in (said['an epoch'], said['its evaluation']):
            assert x['ratio'] == pytest.approx(x['eager'] / x['recorded'])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end(tmp_path):
    parts = ('quiet', 'bench', 'paper', 'methods')
    found = measured(tmp_path, *(x for p in parts for x in ('--part', p)), '--methods', 'gcnet')
    assert found['quiet'] == dict(eager=None, recorded=None)  # a CPU cannot tell
    assert len(found['bench']) > 5
    for part, method in (('paper', 'mculora'), ('methods', 'gcnet')):
        assert found[part][method]['runs'] == 2 and found[part][method]['failed'] == []


# --- side by side, in processes ---


@pytest.fixture
def forked(monkeypatch):
    "Workers are forks of a server that has imported everything: 20 ms and not 10 s."
    server()
    monkeypatch.setattr(runs, '_START', 'forkserver')


def several(out, *rates, **options):
    few = dict(width=8, depth=1, rank=2, epochs=2, batch_size=16) | options
    at = dict(TINY, device='cpu', check=False, out_dir=str(out))
    return [RunConfig(**at, seed=66 + k, options=few | dict(lr=lr)) for k, lr in enumerate(rates)]


OTHER = dict(options=dict(beta=1.0)), dict(precision='bf16'), dict(observe=True)


@pytest.mark.parametrize('other', [*OTHER, dict(schedule='paper')])
def test_only_runs_that_differ_in_fold_and_seed_are_one_program(tmp_path, other):
    "As one program all are trained by the settings of the first."
    (c,) = several(tmp_path, 1e-3)
    if 'options' in other:
        other = dict(options=c.options | other['options'])
    one, two, seed = (runs._alike(ready(c.model_copy(update=u))) for u in ({}, other, dict(seed=7)))
    assert one == seed != two


def test_a_run_has_the_precision_that_its_record_names(tmp_path, monkeypatch):
    "In training and in evaluation."
    used, true = [], runs.precisely
    monkeypatch.setattr(runs, 'precisely', lambda p, d: used.append(p) or true(p, d))
    losses = []
    for precision in ('float32', 'bf16'):
        (c,) = several(tmp_path, 1e-3)
        used.clear()
        _, folder = run(c.model_copy(update=dict(precision=precision)), progress=False)
        losses.append(pd.read_parquet(folder / 'curves.parquet')['train/loss'].iloc[0])
        assert set(used) == {precision}
    assert losses[0] != losses[1]


def test_gaps_that_are_added_leave_an_utterance_something_that_it_has():
    d = random_dialogues([6] * 12, missing=0.4, parts=('train',) * 4 + ('val', 'test'))
    s = split(d)
    with_gaps, _ = incomplete(s, 0.4, 1)
    for part in ('train', 'val'):
        before, after = (getattr(x, part).present for x in (s, with_gaps))
        assert torch.equal(before.any(-1), after.any(-1)) and (after < before).any()


def by_two(configs, **more):
    return run_all(configs, progress=False, every=0.0, processes=2, **more)


def worker_at(folder):
    return int(re.search(r'process (\d+)', (folder / '.lock').read_text())[1])


def test_processes_give_the_bits_of_runs_in_turn(tmp_path, forked, monkeypatch):
    "In their order, with every epoch told here; one that fails does not stop the others."
    told = {}
    for place, n in (('turn', 1), ('side', 2)):
        configs = several(tmp_path / place, 1e-3, 1e9, 1e-3, epochs=1, batch_size=16)
        rows = told[place] = []

        def note(k, row, rows=rows):
            rows.append((k, row['stage'], row['epoch'], os.getpid()))

        told[f'{place} out'] = run_all([*configs, configs[0]], False, note, processes=n)
    assert sorted(told['turn']) == sorted(told['side']) and told['turn']
    for (one, here), (other, there) in zip(told['turn out'], told['side out'], strict=True):
        assert here.name == there.name and type(one) is type(other)
        if isinstance(one, Exception):
            assert isinstance(one, FloatingPointError) and str(one) == str(other)
        else:
            assert outcome(here) == outcome(there) and other.environment['threads'] == 1
    kinds = [isinstance(r, Exception) for r, _ in told['side out']]
    assert kinds == [False, True, False, False]
    # what is finished is looked up: nobody starts a process for it
    monkeypatch.setattr(runs, '_Worker', None)
    again = by_two(configs[::2])
    assert [r for r, _ in again] == [told['side out'][k][0] for k in (0, 2)]


@pytest.mark.slow
def test_a_killed_process_is_the_failure_of_its_run_alone(tmp_path, forked):
    configs = several(tmp_path, 1e-3, 1e-3, 1e-3)
    folders = [ready(c).folder for c in configs]

    def kill(n, row):
        if (n, row['stage'], row['epoch']) == (0, 'pretrain', 2):
            os.kill(worker_at(folders[0]), signal.SIGKILL)

    # as many more epochs as it takes to die before the end
    configs[0] = configs[0].model_copy(update=dict(options=configs[0].options | dict(epochs=200)))
    folders[0] = ready(configs[0]).folder
    (killed, at), *others = by_two(configs, on_epoch=kill)
    assert isinstance(killed, ChildProcessError) and 'ended from outside' in str(killed)
    assert at == folders[0] and (at / 'checkpoint.safetensors').exists()
    assert [r.status for r, _ in others] == ['complete'] * 2


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_the_same_call_goes_on(tmp_path, forked):
    configs, whole = several(tmp_path / 'a', 1e-3, 1e-3), several(tmp_path / 'b', 1e-3, 1e-3)
    folders, at_work = [ready(c).folder for c in configs], set()

    def stop(n, row):
        at_work.add(worker_at(folders[n]))
        if row['stage'] == 'finetune':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match='stopped; of 2 runs . had ended; the same command'):
        by_two(configs, on_epoch=stop)
    assert at_work and not any(psutil.pid_exists(pid) for pid in at_work)
    assert (folders[0] / 'checkpoint.safetensors').exists()
    fresh = []
    for (_, there), (_, here) in zip(
        by_two(configs, on_epoch=lambda *row: fresh.append(row)), run_all(whole, progress=False)
    ):
        assert outcome(there) == outcome(here)
    assert len(fresh) < 8  # it went on, it did not start over


@pytest.mark.slow
def test_a_run_that_another_process_is_at_comes_last(tmp_path, forked):
    configs, seen = several(tmp_path, 1e-3, 1e-3, 1e-3), []
    with ExitStack() as lock:
        lock.enter_context(locked(ready(configs[0]).folder))

        def note(n, row):
            seen.append(n)
            if n == 2:
                lock.close()

        out = by_two(configs, on_epoch=note)
    assert [r.status for r, _ in out] == ['complete'] * 3
    assert seen.index(0) > seen.index(2)


@pytest.mark.slow
def test_runs_that_share_pre_training_do_it_once(tmp_path, forked):
    "One makes it, while the other waits: each ends as it would have in turn."
    configs = several(tmp_path, 1e-3) * 2
    configs[1] = configs[1].model_copy(update=dict(options=configs[1].options | dict(rank=1)))
    out = by_two(configs)
    assert [r.stages[0]['borrowed'] for r, _ in out] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_process_behind(tmp_path, how):
    "Ctrl-C, which a terminal sends to every process, or a kill; workers as they are for people."
    server()
    command = 'train --size tiny --fold 1 --seed 1 --seed 2 --device cpu --no-check --processes 2'
    command = [*command.split(), '--out-dir', str(tmp_path)]
    command += ['--options', '{"epochs": 3000, "width": 8, "depth": 1}']
    log = tmp_path / 'log'
    p = SERVER.Process(target=typed, args=(log, *command))
    p.start()
    while p.exitcode is None and len(list(tmp_path.rglob('checkpoint.safetensors'))) < 2:
        time.sleep(0.1)
    workers = psutil.Process(p.pid).children(recursive=True)
    at_work = {worker_at(f.parent) for f in tmp_path.rglob('checkpoint.safetensors')}
    assert len(at_work) == 2 and at_work <= {w.pid for w in workers}, log.read_text()
    for pid in [p.pid, *at_work] if how == signal.SIGINT else [p.pid]:
        os.kill(pid, how)
    p.join(60)
    said = log.read_text()
    assert not psutil.wait_procs(workers, 60)[1]
    assert 'Traceback' not in said and 'leaked' not in log.read_text(), said
    if how == signal.SIGINT:
        assert p.exitcode == 130 and 'stopped; of 2 runs 0 had ended; the same command' in said, (
            said
        )


def test_how_many_processes(monkeypatch):
    "As many as there are threads, runs that have nothing to wait for, and gigabytes for two each."
    a, b, c = map(Path, 'abc')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: Namespace(total=64 * 2**30))
    assert [n_processes(f) for f in ([a], [a, b], [a, b, c])] == [1, 2, 2]
    # variants of one method share its pre-training; what trains nothing is done in a moment
    assert n_processes([a, a, a]) == 1 and n_processes([None, None, a]) == 1
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 16)
    assert n_processes([a, b, c]) == 3
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: Namespace(total=5 * 2**30))
    assert n_processes([a, b, c]) == 2
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: Namespace(total=2**30))
    assert n_processes([a, b, c]) == 1


def test_processes_are_for_runs_on_a_cpu_that_are_not_one_program(tmp_path):
    with pytest.raises(ValueError, match='^processes: found 2 beside together 3'):
        run_all(several(tmp_path, 1e-3, 1e-3), together=3, processes=2)
    with pytest.raises(ValueError, match='^processes: found 2, expected 1 on a GPU'):
        runs._refuse_processes(2, None, False)


# --- pictures beside a result ---


def trained_by_command(tmp_path, *args):
    where = ['--size', 'tiny', '--device', 'cpu', '--fold', '1', '--out-dir', str(tmp_path)]
    done = CliRunner().invoke(app, ['train', *where, *args])
    assert done.exit_code == 0 and 'incomplete' in done.stdout, done.output
    (record,) = addresses(tmp_path)
    return done, {p.name for p in record.iterdir()}


def test_train_draws_what_it_recorded(tmp_path):
    "Curves where there are epochs, and every condition; each is a picture with something on it."
    few = ['--no-check', '--options', '{"width": 8, "depth": 1, "epochs": 2, "batch_size": 16}']
    _, files = trained_by_command(tmp_path / 'a', *few)
    assert {'curves.png', 'conditions.png'} <= files
    for path in (tmp_path / 'a').rglob('*.png'):
        pixels = mpimg.imread(path)
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05
    _, files = trained_by_command(tmp_path / 'b', '--method', 'majority')
    assert 'conditions.png' in files and 'curves.png' not in files


@pytest.mark.parametrize(
    'error, says',
    [
        (ImportError('matplotlib: found no such module'), 'no pictures: matplotlib: found no such'),
        (RuntimeError('no room for the legend'), 'no pictures (RuntimeError: no room'),
    ],
)
def test_a_run_does_not_depend_on_its_pictures(tmp_path, monkeypatch, error, says):
    def fails(folder):
        raise error

    monkeypatch.setattr('mculora.experiments.reports.pictures', fails)
    done, files = trained_by_command(tmp_path, '--method', 'majority')
    assert says in done.stderr and 'result.json' in files
    assert not any(name.endswith('.png') for name in files)
