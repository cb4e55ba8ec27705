"""Records that can be run again: each has a command, a commit of this history and the code that
made it; other code runs anew; and what is made again is compared."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from mculora.basics import method as registry
from mculora.basics.dialogues import DataError
from mculora.basics.method import as_made, methods, settings_of
from mculora.data.sources import described
from mculora.data.own import is_own
from mculora.data.tables import Columns
from mculora.experiments import results
from mculora.experiments.results import addresses, read_result, said_by, write_result
from mculora.experiments.runs import RunConfig, code_of, command_of, run
from mculora.experiments.store import compared, rerun, samples
from mculora.use import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(size='tiny', schedule='quick', device='cpu')


@cache
def committed():
    "What every committed record says, by its address."
    return {p: said_by(p) for p in addresses(ROOT / 'results')}


# --- commands ---


@cache
def command_line():
    "Made once: it takes longer than what it reads."
    return get_command(cli.app)


def typed(command, monkeypatch):
    "The configurations that a command line asks for; nothing is run."
    asked = []
    words = shlex.split(command.replace('${MCULORA_DATA:-data}', 'data'))
    words = words[words.index('mculora') + 1 :]
    with monkeypatch.context() as m:
        m.setattr(
            'mculora.experiments.runs.run_all', lambda configs, **_: asked.extend(configs) or []
        )
        assert not command_line().main(words, standalone_mode=False)
    return asked


def test_a_study_leaves_out_what_its_data_have_no_room_for(monkeypatch, capsys):
    "A tiny model has one block, and an encoder of two kinds needs two; the other encoders run."
    asked = typed('mculora study mosei-simulated-tiny --study bases', monkeypatch)
    said = capsys.readouterr().err
    assert len(asked) == 10 and all(c.options.get('encoder') != 'lstm-graph' for c in asked)
    assert said.count('left out: LSTM and graph') == 2
    assert 'depth: found 1, expected 2 or more' in said


def test_every_committed_record_has_a_command_that_sets_what_it_says(monkeypatch):
    """The command line itself reads it, once for each dataset, method and settings: it gives the
    record's configuration, option for option, and names nobody's folder."""
    seen = set()
    for path, r in committed().items():
        config, data = r['config'], r['data']
        command = command_of(config, data)
        assert '/' not in command and config['method'] in command, path
        kind = {k: v for k, v in config.items() if k not in ('seed', 'fold', 'version', 'data')}
        kind = json.dumps([data['name'], kind], sort_keys=True)
        if kind in seen:
            continue
        seen.add(kind)
        (c,) = typed(command, monkeypatch)
        task = described(data['name'])
        options = settings_of(c.method, task, c.options)[1].model_dump(mode='json')
        name = Path(c.dataset).stem if is_own(c.dataset) else c.dataset
        now = c.model_dump(mode='json') | dict(dataset=name, options=options)
        now['size'] = 'full' if c.size == 'twin' else c.size  # as a record has it
        same = [k for k in config if k not in ('data', 'version')]
        # with the settings that came later
        then = config | dict(options=as_made(c.method, config['options']))
        assert {k: now[k] for k in same} == {k: then[k] for k in same}, path
        assert 'table' not in data or c.table == Columns.written(data['table']), path
        real = not data['simulated']
        assert (c.data_root == 'data') == real and (c.size != 'full') != real, path
    assert len(seen) > 100


def test_a_command_names_what_differs_from_its_preset(monkeypatch):
    "A setting that a run has put back to its usual value is not the preset's."
    kind = 'as-published'
    r = next(r for r in committed().values() if r['config']['options'].get('preset') == kind)
    config, task = r['config'], described(r['data']['name'])

    def settings(options):
        return settings_of(config['method'], task, options)[1].model_dump(mode='json')

    usual, preset = settings({}), settings({'preset': kind})
    name = next(k for k in usual if k != 'preset' and usual[k] != preset[k])
    changed = preset | {name: usual[name]}
    (c,) = typed(command_of(config | dict(options=changed), r['data']), monkeypatch)
    assert settings(c.options) == changed


def test_a_new_record_holds_its_command_and_its_code(tmp_path, monkeypatch):
    given = dict(TINY, seed=3, fold=2, standardise=False, missing={'a': 0.5}, out_dir=str(tmp_path))
    r, folder = run(RunConfig(method='logistic', options={'C': 0.5}, **given), progress=False)
    assert r.command == command_of(r.config, r.data) and r.code == code_of(methods()['logistic'])
    assert str(tmp_path) not in r.command
    (c,) = typed(r.command, monkeypatch)
    again, same = run(c.model_copy(update=dict(out_dir=str(tmp_path))), progress=False)
    assert same == folder and again == r


# --- commits ---


def git(*args, **kwargs):
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, **kwargs)


@cache
def history():
    "The commits behind HEAD. Skips where they cannot be asked for."
    try:
        shallow = git('rev-parse', '--is-shallow-repository')
    except OSError:
        pytest.skip('there is no git to ask')
    if shallow.returncode or shallow.stdout.strip() != 'false':
        pytest.skip('not a whole clone of the repository: its history cannot be asked')
    return set(git('rev-list', 'HEAD', check=True).stdout.split())


def test_every_committed_record_was_made_by_a_commit_of_this_history():
    here = history()
    foreign = {str(p) for p, r in committed().items() if r['environment']['commit'] not in here}
    assert not foreign


def test_every_committed_measurement_was_made_by_a_commit_of_this_history():
    "Table 4's seconds and those of docs/speed.md: `results/*.json`, which are no records of runs."
    files = sorted((ROOT / 'results').glob('*.json'))
    said = {f.name: set(re.findall(r'"commit": "?(\w+)', f.read_text())) for f in files}
    assert {'cost.json', 'speed.json'} <= set(said) and all(said.values())
    foreign = {name for name, commits in said.items() if not commits <= history()}
    assert not foreign


# --- code ---


def sources(cls, monkeypatch):
    "The modules whose source the code of a method is made of."
    asked = set()
    found = results._source_of

    def noted(module):
        path = found(module)
        asked.update({module} if path.is_file() else ())
        return path

    monkeypatch.setattr(results, '_source_of', noted)
    code_of(cls)
    monkeypatch.undo()
    return {m.removeprefix('mculora.') for m in asked}


def test_the_code_of_a_method_is_what_makes_its_numbers(monkeypatch):
    mculora, gcnet = (sources(methods()[m], monkeypatch) for m in ('mculora', 'gcnet'))
    assert mculora >= {
        'experiments.runs',
        'training.trainer',
        'training.evaluation',
        'data.twins',
        'basics.masking',
        'model.mculora',
        'model.mcla',
        'model.dpft',
    }
    assert 'baselines.gcnet' in gcnet and 'model.mculora' not in gcnet
    for found in (mculora, gcnet):
        assert not found & {'baselines.mmin', 'experiments.reports', 'experiments.store', 'use.cli'}
    assert 'baselines.gcnet' not in mculora
    codes = {m: code_of(cls) for m, cls in methods().items()}
    assert codes['gcnet'] != codes['mculora'] != codes['mculora-plus'] and all(codes.values())


VOTES = """
from mculora.basics.method import Majority, register


@register('votes', listed=False)
class Votes(Majority):
    def predict(self, batch, stage=None):
        return super().predict(batch, stage).roll({by}, -1)
"""


@pytest.fixture
def votes(tmp_path, monkeypatch):
    "A method in a file of its own; called with a number, it is loaded anew with that in its code."
    monkeypatch.setattr(registry, '_methods', dict(methods()))
    file = tmp_path / 'votes.py'

    def load(by):
        file.write_text(VOTES.format(by=by))
        spec = importlib.util.spec_from_file_location('votes', file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, 'votes', module)
        exec(compile(file.read_text(), str(file), 'exec'), module.__dict__)

    return load


def test_a_changed_method_does_not_return_its_old_number(tmp_path, votes, capsys):
    "It says so, runs again, and keeps the old result beside the new one."
    c = RunConfig(method='votes', out_dir=str(tmp_path / 'runs'), **TINY)
    votes(0)
    old, folder = run(c)
    assert run(c)[0] == old and f'by the same code ({old.code})' in capsys.readouterr().out
    votes(1)
    with pytest.warns(UserWarning, match=f'made by other code .then {old.code}, now .*made again'):
        new, same = run(c)
    assert same == folder and new.code != old.code and new.scores != old.scores
    assert read_result(folder) == new and addresses(tmp_path / 'runs') == [folder]
    kept = json.loads((folder / f'result-{old.code}.json').read_text())
    assert kept['scores'] == [s.model_dump() for s in old.scores]
    # the new one is looked up; and so is one that does not say, with a word on it
    assert run(c)[0] == new
    write_result(folder, new.model_copy(update=dict(code=None, command=None)))
    assert run(c)[0].code is None and 'by which code it does not say' in capsys.readouterr().out


def test_a_checkpoint_of_other_code_is_not_gone_on_from(tmp_path, monkeypatch, capsys):
    options = dict(width=8, depth=1, epochs=1, batch_size=16)
    c = RunConfig(out_dir=str(tmp_path), options=options, check=False, **TINY)

    def stop(row):
        if row['stage'] == 'finetune':
            raise KeyboardInterrupt

    for code, says in (('one', 'going on from the checkpoint'), ('other', 'from the beginning')):
        monkeypatch.setattr('mculora.experiments.runs.code_of', lambda cls: 'one')
        with pytest.raises(KeyboardInterrupt):
            run(c, on_epoch=stop, every=0)
        capsys.readouterr()
        monkeypatch.setattr('mculora.experiments.runs.code_of', lambda cls, code=code: code)
        with pytest.raises(KeyboardInterrupt):
            run(c, on_epoch=stop, every=0)
        assert says in capsys.readouterr().out


# --- made again ---


def test_a_committed_record_is_made_again_with_its_threads(tmp_path, monkeypatch):
    "The shortest: shares of classes on the full twin. A named folder of real data changes nothing."
    monkeypatch.setenv('MCULORA_DATA', str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    then = samples(ROOT / 'results')['majority']
    now = rerun(then, tmp_path, data_root=tmp_path)
    c = compared(then, now)
    said = [x for x in c.where if 'version' in x or 'mculora' in x]
    older = read_result(then).config['version'] != read_result(now).config['version']
    assert c.verdict == 'equal to the bit' and bool(said) == older
    assert read_result(now).environment['threads'] == read_result(then).environment['threads'] == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_every_method_has_a_record_to_make_again():
    assert set(samples(ROOT / 'results')) == {m for m, cls in methods().items() if cls.listed} | {
        'mculora-projected'
    }


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    c = RunConfig(
        out_dir=str(tmp_path_factory.mktemp('runs')),
        options=dict(width=8, depth=1, epochs=2, batch_size=16),
        check=False,
        **TINY,
    )
    return run(c, progress=False)


def test_a_difference_is_named_by_score_and_epoch(tmp_path, small):
    r, then = small
    now = rerun(then, tmp_path)
    assert compared(then, now).verdict == 'equal to the bit'
    curves = pd.read_parquet(now / 'curves.parquet')
    curves.loc[1, 'val/all/WA'] += 1e-7
    curves.to_parquet(now / 'curves.parquet')
    c = compared(then, now)
    assert c.verdict == 'equal within rounding'
    assert c.where[0] == f'first epoch that differs: 2 of {curves.stage[1]} (val/all/WA)'
    scores = [r.scores[0].model_copy(update=dict(value=r.scores[0].value + 0.5)), *r.scores[2:]]
    write_result(now, r.model_copy(update=dict(scores=scores)))
    c = compared(then, now)
    assert c.verdict == 'different' and c.where[0].startswith('2 of ')
    s = r.scores[0]
    assert any(f'{s.selection}, {s.protocol} {s.condition}, {s.metric}: ' in x for x in c.where)


def test_other_data_and_a_folder_in_use_are_refused(tmp_path, small):
    r, then = small
    with pytest.raises(DataError, match='found this run already, expected an empty folder'):
        rerun(then, then.parent.parent.parent)
    write_result(tmp_path, r.model_copy(update=dict(data=r.data | dict(hash='0' * 16))))
    with pytest.raises(DataError, match='expected iemocap-simulated-tiny with 0000'):
        rerun(tmp_path, tmp_path / 'again')


def test_reproduce_fails_where_a_number_is_another(tmp_path):
    r, _ = run(RunConfig(method='majority', out_dir=str(tmp_path / 'runs'), **TINY), progress=False)
    scores = [s.model_copy(update=dict(value=s.value / 2)) for s in r.scores]
    at = str(tmp_path / 'kept')
    (tmp_path / 'kept').mkdir()
    write_result(at, r.model_copy(update=dict(scores=scores)))
    for command in (['reproduce', '--results', at], ['rerun', at]):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 1 and 'different (largest' in done.output
