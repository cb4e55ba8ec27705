"""The committed results: whole and labelled, and what the pages say of them in words is so. The
numbers of the pages are in test_pages."""

import json
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import yaml
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mculora.basics.dialogues import DataError
from mculora.data.sources import described
from mculora.baselines.recipe import GRID, Presets
from mculora.basics.method import create, methods, read_settings, settings_of
from mculora.experiments.results import (
    STORE,
    addresses,
    against,
    beside,
    collect,
    compare,
    config_hash,
    interval,
    line_of,
    lines_of,
    read_result,
    run_name,
    said_by,
    store_of,
    summarise,
    write_result,
)
from mculora.experiments.reports import FLOOR, Report, read_runs, tables_of_runs
from mculora.experiments.store import add
from mculora.experiments.studies import (
    ABLATION,
    PLUS,
    RANKS,
    ROWS,
    SPEAKERS,
    Sweep,
    Variant,
    find,
    grid_of,
    studies,
    validation_of,
)
from mculora.experiments.tuning import FINAL, chosen, trials_of
from mculora.data.twins import bayes_limit
from mculora.training.trainer import scheduled

ROOT = Path(__file__).resolve().parent.parent
RUNS = addresses(ROOT / 'results')


@cache
def collected(protocol='fixed'):
    "All committed results, collected once; nobody changes the table."
    return collect(ROOT / 'results', protocol)


@cache
def collected_of(data, protocol='fixed'):
    "Those of one dataset."
    t = collected(protocol)
    return t[t.dataset == data].reset_index(drop=True)


@cache
def read(path):
    return read_result(path)


def methods_on(data, protocol='fixed', seeds=None, names=None):
    """The committed results of the rows of Table 1 (all methods with their default settings, and
    heads by speaker) whose runs (on the seeds of the tables) are all there."""
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed'][data]
    own = said.get('parameters', {}).get('table1_fixed', {})
    found, missing = find(
        collected_of(data, protocol),
        Sweep(data=data, folds=said['folds'], seeds=seeds or said['seeds'], **own),
        [v for v in [*studies()['methods'], SPEAKERS] if v.name in (names or [v.name])],
    )
    return found[~found.variant.isin(missing)].assign(method=lambda t: t.variant)


def wrong(path):
    "What is not as it should be in a result, in words."
    r, place = read(path), path.relative_to(ROOT / 'results')
    checks = {
        'it is not complete': r.status == 'complete',
        'its hash is of another configuration': r.config_hash == config_hash(r.config),
        'its address is of another run': place.parts
        == (r.data['name'], r.config['method'], run_name(r.data['fold'], r.config, r.config_hash)),
        'made by code that is not in the history': r.environment['commit']
        and r.environment['changed'] is False,
        'its address does not say whether it is simulated': r.data['simulated']
        == ('simulated' in str(place)),
        'its configuration is of other data': r.config['data'] == r.data['hash'],
        'it has another schedule': r.config['schedule'] in ('paper', 'quick'),
    }
    return [f'{place}: {said}' for said, right in checks.items() if not right]


@pytest.mark.parametrize('name', sorted({p.parts[-3] for p in RUNS}))
def test_results_are_whole_and_named(name):
    assert not [said for p in RUNS if p.parts[-3] == name for said in wrong(p)]


def test_the_store_holds_runs_in_order_and_nothing_else():
    "A file's lines are sorted by run, and a dataset's folder has no other files."
    files = sorted((ROOT / 'results').rglob(f'*{STORE}'))
    assert {store_of(p) for p in RUNS} == set(files)
    assert not [f.name for f in files if list(lines_of(f)) != sorted(lines_of(f))]
    places = {f.parent for f in files}
    assert sorted(p for at in places for p in at.iterdir()) == files
    assert places == {ROOT / 'results' / p.parts[-3] for p in RUNS}


def test_what_is_kept_beside_results_is_whole():
    "Each file in results/observed is one that its result names, with its hash."
    files = [p for p in (ROOT / 'results' / 'observed').rglob('*') if p.is_file()]
    for p in files:
        run = ROOT / 'results' / p.parent.relative_to(ROOT / 'results' / 'observed')
        assert beside(run / p.name) == p
    assert len(files) > 30


ONE = next(p for p in RUNS if p.parent.name == 'majority' and said_by(p)['format'] == 2)


def test_folders_of_earlier_versions_are_read_and_added(tmp_path):
    """One pretty-printed `result.json` a run, as results/ had them up to 0.4: the same table, and
    the same lines once they are added."""
    some = [p for p in RUNS if p.parent == ONE.parent]
    for p in some:
        folder = tmp_path / 'old' / p.relative_to(ROOT / 'results')
        folder.mkdir(parents=True)
        text = json.dumps(said_by(p), indent=1, ensure_ascii=False) + '\n'
        (folder / 'result.json').write_text(text, encoding='utf-8')
        assert read_result(folder) == read_result(folder / 'result.json') == read(p)
    every, new = add(tmp_path / 'old', tmp_path / 'new')
    assert new == every == addresses(tmp_path / 'new')
    assert store_of(new[0]).read_bytes() == store_of(ONE).read_bytes()
    old, new = (collect(tmp_path / name).drop(columns='file') for name in ('old', 'new'))
    assert old.equals(new) and len(old)


def store_with(tmp_path, *lines):
    file = tmp_path / 'store' / ONE.parts[-3] / f'majority{STORE}'
    file.parent.mkdir(parents=True)
    file.write_bytes(b''.join(lines))
    return file


LINE = lines_of(store_of(ONE))[ONE.name][1] + b'\n'
VALUE = re.search(rb'"WA": (0\.\d+)', LINE)[1]


@pytest.mark.parametrize(
    'lines, says',
    [
        ([LINE, LINE], 'lines 1 and 2: found two runs called'),
        ([LINE, b'\n'], "line 2: found b'', expected a run as `mculora results add` writes it"),
        ([b'<<<<<<< HEAD\n', LINE], "line 1: found b'<<<<<<< HEAD'"),
        ([LINE[:2000]], 'line 1: found no whole result file'),
        ([LINE.replace(VALUE, b'0.5')], 'line 1: .*does not fit its checksum'),
        ([LINE.replace(b'"checksum"', b'"checksun"')], 'line 1: found no whole result file'),
        ([LINE.replace(b'"run": "S', b'"run": "T')], 'line 1: .*it is called T'),
        (
            [LINE.replace(b'"scores": {', b'"scores": [{').replace(b'}, "masks"', b'}], "masks"')],
            'line 1',
        ),
        ([b'{"run": "x", "scores": 1}\n'], 'line 1: found no whole result file'),
        ([b'{"run": "x", ' + b'[' * 100_000], 'line 1: found no whole result file'),
        ([b'{"run": "\xff", "a": 1}\n'], 'line 1: found no whole result file'),
    ],
    ids=lambda x: re.sub(r'\W+', ' ', x) if isinstance(x, str) else '',
)
def test_a_damaged_line_is_refused_by_file_and_number(lines, says, tmp_path):
    file = store_with(tmp_path, *lines)
    for read_it in (lambda: collect(tmp_path), lambda: add(tmp_path / 'store', tmp_path / 'new')):
        with pytest.raises(DataError, match=f'{re.escape(str(file))}, {says}'):
            read_it()
    assert not list((tmp_path / 'new').rglob('*.jsonl'))


def test_a_run_in_a_folder_and_in_a_line_is_refused(tmp_path):
    file = store_with(tmp_path, LINE)
    folder = file.parent / 'majority' / ONE.name
    folder.mkdir(parents=True)
    write_result(folder, read(ONE))
    with pytest.raises(DataError, match=f'{re.escape(str(file))}, line 1, too'):
        collect(tmp_path)
    folder.joinpath('result.json').unlink()
    assert len(collect(tmp_path))


def test_adding_sorts_a_file_that_git_merged(tmp_path):
    lines = [line + b'\n' for _, line in lines_of(store_of(ONE)).values()]
    file = store_with(tmp_path, *reversed(lines))
    _, new = add(tmp_path / 'store', tmp_path / 'store')
    assert not new and file.read_bytes() == store_of(ONE).read_bytes()


def test_scores_that_a_line_cannot_hold_are_refused():
    said = said_by(ONE)
    with pytest.raises(DataError, match='scores'):
        line_of(said | {'scores': said['scores'] + said['scores'][:1]})


def test_bfloat16_is_not_told_from_float32():
    "Paired by seed, the interval of the difference contains 0: leading metric, real CMU-MOSI."
    t = collected_of('mosi')
    default = json.dumps(
        settings_of('mculora', described('mosi'))[1].model_dump(mode='json'), sort_keys=True
    )
    t = t[
        (t.options == default)
        & (t.missing == '0.0')
        & (t.hold == 'dialogues')
        & (t.schedule == 'quick')
        & (t.selection == 'validation')
        & (t.metric == 'ACC')
    ]
    # two versions ran it, with the same scores
    t = t.drop_duplicates(['fold', 'seed', 'precision', 'condition', 'value'])
    for condition in ('at', 'incomplete', 'all'):
        w = t[t.condition == condition].pivot(
            index=['fold', 'seed'], columns='precision', values='value'
        )
        assert len(w) >= 5 and not w.isna().any(axis=None)
        r = interval((w['bf16'] - w['float32']).rename('value').reset_index())
        assert abs(r['mean']) <= r['half'] < 0.02, (condition, r)


def grid_scores(data, name):
    "(choice, learning rate) -> score on validation, of the committed runs; that of the row."
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed'][data]
    sweep = Sweep(data=data, folds=said['folds'][:1], seeds=said['seeds'][:1])
    variants = grid_of(name)
    found, _ = find(
        collected_of(data), sweep, [*variants.values(), Variant(name=name, method=name)]
    )
    score = validation_of(found)
    tried = {key: score[v.name] for key, v in variants.items() if v.name in score}
    return tried, score.get(name)


@pytest.mark.parametrize(
    'name', [name for name, cls in methods().items() if cls.grid and issubclass(cls, Presets)]
)
@pytest.mark.parametrize('data', ['iemocap'])
def test_the_learning_rate_in_use_is_the_best_of_the_grid(data, name):
    "On the validation dialogues of the committed runs; of equals the first."
    grid, (tried, _) = methods()[name].grid, grid_scores(data, name)
    score = {lr: tried[choice, lr] for choice, lr in tried if not choice}
    # not run yet, or not all of it: nothing may claim to be chosen by it
    if set(score) != set(grid):
        assert not methods()[name].tuned.get(data)
        return
    best = max(grid, key=lambda lr: score[lr])
    assert settings_of(name, described(data))[1].lr == best, score
    assert best < max(grid), 'the best may lie beyond the grid'


@pytest.mark.parametrize('name', [name for name in ROWS if methods()[name].grid])
def test_no_row_is_two_points_below_the_best_of_its_own_grid(name):
    "MCULoRA's too: whatever a method chooses from, its row is made with about the best."
    tried, in_use = grid_scores('iemocap', name)
    assert tried and max(tried.values()) - in_use <= 0.02, tried


def tried_on_hazumi(name):
    "Learning rate -> validation score of fold 1, seed 66; and the rate of the tables."
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed']
    own, scores = said['hazumi_online']['parameters']['table1_fixed'], {}
    for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        rate, options = {name: {'lr': lr}}, own['options']
        sweep = Sweep(data='hazumi_online', folds=[1], seeds=[66], options=options, by_method=rate)
        names = dict.fromkeys([name, 'mculora'])  # mculora has all the settings
        both = [Variant(name=n, method=n) for n in names]
        found, missing = find(collected_of('hazumi_online'), sweep, both)
        if name not in missing:
            scores[lr] = validation_of(found[found.variant == name])[name]
    return scores, (own['options'] | own['by_method'].get(name, {}))['lr']


@pytest.mark.parametrize(
    'name',
    [name for name in ROWS if (ROOT / f'results/hazumi_online/{name}{STORE}').is_file()],
)
def test_the_learning_rates_on_hazumi_are_the_best_tried(name):
    "MCULoRA's, too; and none lies at the edge of what was tried."
    if 'lr' not in methods()[name].Settings.model_fields:
        pytest.skip('fitted without a learning rate')
    scores, in_use = tried_on_hazumi(name)
    assert 3 <= len(scores) <= 5 and max(scores, key=scores.get) == in_use, scores
    assert min(scores) < in_use < max(scores), scores


def test_under_quick_mculora_chooses_from_the_rates_of_the_baselines():
    "Its rate is multiplied there, and theirs are not: what is trained with is the same."
    task = described('iemocap')

    def trained_with(name, lr):
        method = create(name, task, {'a': 4, 't': 4, 'v': 4}, {'lr': lr})
        return [scheduled(s, 'quick', 81).lr for s in method.stages()]

    ours = [trained_with('mculora', lr) for lr in methods()['mculora'].grid]
    theirs = [trained_with('momke', lr) for lr in (2e-3, *GRID)]
    assert ours == [pytest.approx(lrs) for lrs in theirs]
    # what derives from it, and is in a table beside it, has its rate
    assert not any(methods()[name].grid for name in ('mculora-plus', 'mculora-projected'))


def test_claims_who_leads_and_who_is_told_from_whom():
    """One utterance at a time or the dialogue, and who is told from whom, on the mean of the
    incomplete conditions."""
    t = methods_on('iemocap')
    t = t[(t.metric == 'WA') & (t.selection == 'validation') & (t.condition == 'incomplete')]
    means, with_dialogue = (
        t.groupby('method').value.mean(),
        [
            'mctn',
            'mctn-per-condition',
            'late-fusion',
            'dropout-transformer',
            'dropout-transformer-per-condition',
            'momke',
            'momke-complete',
            'momke-per-condition',
            'gcnet',
            'dicmor',
            'imder',
            'mculora-released',
            'mculora-plus',
            SPEAKERS.name,
        ],
    )
    without = means.drop([*with_dialogue, 'mculora'])
    assert (
        without.idxmax() == 'zero-fill'
        and without.max() < means[with_dialogue].min()
        and len(without) == 10
        and list(means.nlargest(3).index) == [SPEAKERS.name, 'mculora-plus', 'momke-per-condition']
        and list(means[~means.index.str.endswith('-per-condition')].nlargest(4).index)
        == [SPEAKERS.name, 'mculora-plus', 'gcnet', 'mculora']
    )
    for other in with_dialogue:
        r = compare(t, 'mculora', other)
        assert abs(r['mean']) < r['half'], (other, r)
    t = methods_on('iemocap', 'random')
    t = t[(t.metric == 'WA') & (t.selection == 'validation')]
    for other in ('gcnet', 'mctn'):
        ahead = {float(rate): compare(at, other, 'mculora') for rate, at in t.groupby('condition')}
        assert {rate for rate, r in ahead.items() if r['mean'] > r['half']} == {
            0.4,
            0.5,
            0.6,
            0.7,
        }, (other, ahead)
        assert sorted(ahead, key=lambda rate: ahead[rate]['mean']) == sorted(ahead)
    ahead = {float(rate): compare(at, 'imder', 'mculora') for rate, at in t.groupby('condition')}
    assert all(r['mean'] > 0 for r in ahead.values()) and {
        rate for rate, r in ahead.items() if r['mean'] > r['half']
    } == {0.4}
    t = methods_on('mosi')
    # monologues: MCULoRA
    t = t[(t.metric == 'ACC') & (t.selection == 'validation') & (t.method != SPEAKERS.name)]
    single, both = t[t.condition == 'incomplete'], t[t.condition == 'at']
    assert (
        single.groupby('method').value.mean().idxmax() == 'knn-imputation'
        and (r := compare(single, 'knn-imputation', 'mculora'))['mean'] > r['half']
    )
    assert (
        both[~both.method.str.endswith('-per-condition')].groupby('method').value.mean().idxmax()
        == 'mculora'
        and (r := compare(both, 'mculora', 'knn-imputation'))['mean'] > r['half']
    )
    t = methods_on('iemocap-simulated')
    t = t[(t.metric == 'WA') & (t.selection == 'validation') & (t.condition == 'incomplete')]
    means = t.groupby('method').value.mean()

    def told(one, other):
        r = compare(t, one, other)
        return r['mean'] > r['half']

    best, second = means.nlargest(2).index
    assert (
        (best, second) == (SPEAKERS.name, 'dropout-transformer-per-condition')
        and means[means.index.isin(without.index)].idxmax() == 'mean-imputation'
        and all(told(best, m) and not told(second, m) for m in ('mean-imputation', 'mculora'))
    )
    limit = (
        Report(data='iemocap-simulated', folds=[1], seeds=[66], schedule='quick')
        .limit()['WA']['incomplete']
        .mean
        / 100
    )
    assert (
        means.max() + 0.05 < limit
        and 0.05 < (means[best] - means['mculora']) / (limit - means['mculora']) < 0.15
    )


def test_claims_what_gaps_in_training_cost():
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed']['mosi'][
        'parameters'
    ]['table7_incomplete']
    rows, parts = [v for v in studies()['methods'] if v.name in said['rows']], {}
    for share in [*said['shares'], *said['imbalances']]:
        found, missing = find(
            collected_of('mosi'),
            Sweep(data='mosi', folds=[1], seeds=said['seeds'], missing=share),
            rows,
        )
        assert not missing
        parts[json.dumps(share)] = found[
            (found.metric == 'ACC') & (found.selection == 'validation')
        ].assign(gaps=json.dumps(share))
    t = pd.concat(parts.values())

    def change(condition, share):
        here = t[(t.condition == condition) & t.gaps.isin(['0.0', share])]
        return {
            v.name: compare(here[here.variant == v.name], share, '0.0', by='gaps') for v in rows
        }

    half = {n: r['mean'] for n, r in change('all', '0.5').items()}
    assert (
        max(half.values()) < 0
        and min(half, key=half.get) == 'mmin'
        and round(100 * half['mculora']) == -1
        and len(parts) == 5
        and len(rows) == 7
    )
    for condition in ('incomplete', 'all'):
        for share in list(parts)[1:]:
            assert abs((r := change(condition, share)['mculora'])['mean']) < r['half']


def test_claims_where_mculora_plus_and_heads_by_speaker_lead():
    """Where its mean is the highest, and from whom it is told: IEMOCAP under both protocols,
    CMU-MOSI."""
    new, told = 'mculora-plus', lambda r: r['mean'] > r['half']
    t = methods_on('iemocap')
    t = t[(t.metric == 'WA') & (t.selection == 'validation')]
    for condition in ('incomplete', 'all', 'atv'):
        at = t[t.condition == condition]
        assert list(at.groupby('method').value.mean().nlargest(2).index) == [SPEAKERS.name, new]
        d = against(at, SPEAKERS.name, sorted(set(at.method) - {SPEAKERS.name}))
        if condition == 'incomplete':
            assert (
                len(d) == 24
                and set(d.index[d['mean'] <= d.half]) == {'gcnet', 'mculora', new}
                and (d.corrected > 0.05).all()
            )
    assert told(compare(t[t.condition == 'atv'], SPEAKERS.name, 'mculora')) and told(
        compare(t[t.condition == 'atv'], new, 'mculora')
    )
    both = t[(t.condition == 'all') & t.method.isin([new, 'mculora'])]
    assert not told(compare(both, new, 'mculora')) and told(
        compare(
            both.assign(value=[read(f).stages[-1]['validation'] for f in both.file]), new, 'mculora'
        )
    )
    assert not any(
        told(compare(t[t.condition == 'incomplete'], new, m))
        for m in ('mculora', 'gcnet', 'momke-per-condition')
    )
    t = methods_on(
        'iemocap',
        seeds=[66, 67, 68, 69, 70],
        names=[SPEAKERS.name]
        + [
            v.name
            for v in studies()['methods']
            if v.name not in ('dicmor', 'imder')
            and (v.name == 'logistic-per-condition' or not v.name.endswith('-per-condition'))
        ],
    )
    t = t[(t.metric == 'WA') & (t.selection == 'validation')]
    for condition in ('incomplete', 'all', 'atv'):
        assert list(
            t[t.condition == condition].groupby('method').value.mean().nlargest(2).index
        ) == [SPEAKERS.name, new]
    ahead = {
        one: against(t[t.condition == 'incomplete'], one, sorted(set(t.method) - {one}))
        for one in (SPEAKERS.name, new)
    }
    d = ahead[SPEAKERS.name]
    assert (
        len(d) == 19
        and set(d.index[d['mean'] <= d.half]) == {'gcnet', 'mculora'}
        and set(d.index[d.corrected < 0.05]) == {'momke', 'dropout-transformer'}
    )
    # the session that had no part in choosing
    first = t[(t.condition == 'incomplete') & (t.fold == 1)]
    assert first.groupby('method').value.mean().idxmax() == SPEAKERS.name and all(
        0 < (r := compare(first, SPEAKERS.name, m))['mean'] < min(r['half'], 0.01)
        for m in ('mculora', 'gcnet')
    )
    d = ahead[new]
    assert (
        (d['mean'] > d.half)[['momke', 'dropout-transformer']].all()
        and not (d['mean'] > d.half)[['mculora', 'gcnet']].any()
        and (d.corrected > 0.05).all()
    )
    t = methods_on('iemocap', 'random')
    rates = {
        float(rate): at
        for rate, at in t[(t.metric == 'WA') & (t.selection == 'validation')].groupby('condition')
    }
    ahead = {rate: compare(at, new, 'mculora') for rate, at in rates.items()}
    assert all(r['mean'] > 0 for r in ahead.values()) and {
        rate for rate, r in ahead.items() if not told(r)
    } == {0.3}
    assert {
        rate for rate, at in rates.items() if at.groupby('method').value.mean().idxmax() == new
    } == {0.1, 0.2, 0.3, 0.4, 0.5} and all(
        told(compare(rates[0.7], 'gcnet', m)) for m in (new, SPEAKERS.name)
    )
    t = methods_on('mosi')
    m = t[t.condition != 'all'].pivot_table(
        index=['seed', 'selection', 'metric', 'condition'], columns='method', values='value'
    )
    # monologues; of what both recorded
    both = m[[SPEAKERS.name, 'mculora']].dropna()
    assert len(both) > 100 and (both[SPEAKERS.name] == both['mculora']).all()
    assert told(
        compare(
            t[(t.metric == 'ACC') & (t.selection == 'validation') & (t.condition == 'all')],
            'mculora',
            new,
        )
    )


@pytest.mark.parametrize(
    'path',
    sorted((ROOT / 'results' / 'tuning').rglob('study.json')),
    ids=lambda p: str(p.parent.relative_to(ROOT / 'results')),
)
def test_a_tuning_study_is_whole(path):
    """Trial 0 is the method as it is, the scores are the means of its runs, the seeds are no
    reported run's, and the journal beside it says the same."""
    about, trials = json.loads(path.read_text()), pd.read_csv(path.with_name('trials.csv'))
    assert len(trials) == about['trials'] and not set(about['seeds']) & set(FINAL)
    own = settings_of(about['method'], described(about['data']))[1].model_dump(mode='json')
    assert all(trials[k][0] == own[k] for k in about['space'])
    for r in trials[trials.state == 'complete'].itertuples():
        assert len(runs := json.loads(r.runs)) == len(about['folds']) * len(about['seeds']) and sum(
            runs
        ) / len(runs) == pytest.approx(r.validation)
    log = JournalStorage(JournalFileBackend(str(path.with_name('journal.log'))))
    assert trials_of(load_study(study_name=about['method'], storage=log)).head(
        about['trials']
    ).validation.tolist() == pytest.approx(trials.validation.tolist(), nan_ok=True)


def page(data):
    """Of one dataset, every question of Table 2: question -> mean on the incomplete conditions, and
    where its interval has no zero."""
    (text,) = [
        t
        for t in re.split(
            r'\n(?=\*\*)', (ROOT / 'figures' / data / f'table2_ablation-{data}.md').read_text()
        )
        if 'every question on one page' in t
    ]
    rows = [
        [x.strip() for x in line.strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('| ')
    ][1:]
    return {r[0].split(' (')[0]: (float(r[1].split(' ')[0]), r[5]) for r in rows}


PARTS = [
    'second stage',
    'adapters',
    'second stage with adapters',
    'private adapters',
    'L_ort',
    'DPFT',
]


@pytest.mark.parametrize('data, additions', [('iemocap', 'complete'), ('mosi', 'all, complete')])
def test_claims_what_is_told_from_zero_on_real_data(data, additions):
    rows = page(data)
    assert all(
        rows[k][1] == 'none'
        for k in [
            *PARTS,
            'MCULoRA+: adapters and DPFT',
            'MCULoRA+: adapters and DPFT beside these',
            next(k for k in rows if k.startswith('rank ')),
        ]
    )
    mean, told = rows['epoch chosen on the test set']
    assert told.startswith('incomplete, all') and all(mean > abs(rows[k][0]) for k in PARTS)
    assert rows['MCULoRA+: additions'][1] == additions and (rows['MCULoRA+: additions'][0] > 0) == (
        data == 'iemocap'
    )
    # by the paper's schedule: the same steps, and the choice of the epoch
    in_full = {k: x for k, x in rows.items() if k.startswith("the paper's schedule: ")}
    ran = data in ('mosi', 'iemocap')
    assert len(rows) - len(in_full) == 12 and len(in_full) == (7 if ran else 0)
    stage = 'incomplete, all' if data == 'iemocap' else 'none'
    for k, (_, told) in in_full.items():
        assert 'epoch' in k or told == (stage if 'second stage' in k else 'none')


def test_claims_what_is_told_from_zero_on_the_twin():
    rows = page('iemocap-simulated')
    assert (
        not any('incomplete' in rows[k][1] for k in [*PARTS, 'MCULoRA+: additions'])
        and 'incomplete' in rows['MCULoRA+: heads by speaker alone'][1]
    )
    assert all(9.5 < rows[k][0] < 10.5 for k in ('to the limit', 'MCULoRA+: to the limit'))
    assert (
        rows['second stage'][1] == rows['MCULoRA+: adapters and DPFT beside these'][1] == 'complete'
        and rows['second stage'][0] > 0 > rows['MCULoRA+: adapters and DPFT beside these'][0]
    )


def test_claims_what_is_told_from_zero_on_single_videos():
    """mosei_video: MCLA against pre-training alone, adapters, those beside heads by speaker, and
    in MCULoRA+ with the other sign, exclude zero on incomplete conditions. There one seed loses
    more than three times what any other does, and the others lose by their mean."""
    rows, some = page('mosei_video'), 'incomplete, all'
    told = {k: words for k, (_, words) in rows.items() if words != 'none'}
    assert told == {
        'adapters': some,
        'second stage with adapters': some,
        'MCULoRA+: adapters and DPFT beside these': some,
        'MCULoRA+: adapters and DPFT': f'{some}, complete',
        'rank 3, the furthest from rank 4': 'complete',
        'epoch chosen on the test set': f'{some}, complete',
    }
    assert len(rows) == 12
    assert {k for k in told if rows[k][0] < 0} == {'MCULoRA+: adapters and DPFT'}
    assert rows['epoch chosen on the test set'][0] > max(rows[k][0] for k in PARTS)
    # what one seed does to MCULoRA+
    found, missing = videos(PLUS)
    t = found[found.condition == 'incomplete']
    by_seed = t.pivot(index='seed', columns='variant', values='value')
    fall = (by_seed['MCULoRA+, no adapter'] - by_seed['MCULoRA+']).sort_values()
    assert not missing and fall.iloc[-1] > 3 * fall.iloc[-2] and fall.iloc[:-1].mean() > 0


def videos(variants, **options):
    "Scores of some variants on mosei_video, and those that are missing."
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed']
    own = said['mosei_video']
    sweep = Sweep(
        data='mosei_video',
        folds=own['folds'],
        seeds=own['seeds'],
        options=own['parameters']['fig3_rank']['options'] | options,
    )
    found, missing = find(collected_of('mosei_video'), sweep, variants)
    return found[(found.metric == 'r') & (found.selection == 'validation')], missing


def without_zero(t, one, other):
    "The conditions on which the interval of a difference excludes zero."
    return [
        c
        for c in ('incomplete', 'all', 'text+audio+vision')
        for r in [compare(t[t.condition == c], one, other, by='variant')]
        if abs(r['mean']) > r['half']
    ]


def test_claims_ranks_and_learning_rates_on_single_videos():
    """mosei_video: all ranks above the control by their means, and none told from the default one
    on the incomplete conditions; adapters told from the control at one learning rate alone, which
    is not the one that validation prefers."""
    pair = [v for v in ABLATION if v.name in ('control', 'MCLA')]
    t, missing = videos([*pair, *RANKS])
    assert not missing
    means = t[t.condition == 'incomplete'].groupby('variant').value.mean()
    for v in RANKS:
        assert means[v.name] > means['control']
        assert v.name == 'rank 4' or 'incomplete' not in without_zero(t, v.name, 'rank 4')
    told, best = {}, {}
    for lr in (5e-4, 1e-3, 2e-3, 4e-3):
        t, missing = videos(pair, lr=lr)
        assert not missing
        told[lr], best[lr] = without_zero(t, 'MCLA', 'control'), validation_of(t)
    assert all(max(best, key=lambda lr: best[lr][row]) == 4e-3 for row in ('control', 'MCLA'))
    assert told.pop(1e-3) == ['incomplete', 'all'] and not any(told.values())


TWINS = [p for p in RUNS if 'simulated' in str(p) and 'majority' not in str(p)]


@cache
def floors():
    "Of the most frequent class: by data, fold and the hash of the data; the same for every seed."
    some = [read(p) for p in RUNS if p.parent.name == 'majority' and 'simulated' in str(p)]
    return {(r.data['name'], r.config['fold'], r.data['hash']): r.scores for r in some}


def outside(path):
    """The conditions of a twin's run that are not between the most frequent class and the Bayes
    limit, with the numbers."""
    r = read(path)
    lead = r.scores[0].metric
    scores = floors()[r.data['name'], r.config['fold'], r.data['hash']]
    floor = {s.condition: s.value for s in scores if s.metric == lead}
    got = {
        s.condition: s.value for s in r.scores if s.selection == 'validation' and s.metric == lead
    }
    out = []
    for c, limit in bayes_limit(r.config['dataset'], r.config['size'], 500).items():
        value, se = limit[lead]
        # twice the binomial variance: utterances of a dialogue are not independent
        half = 1.96 * (se**2 + 2 * value * (1 - value) / r.data['utterances']['test']) ** 0.5
        least = floor[c] if r.config['method'] == 'mculora' else 0
        if not least < got[c] <= value + half:
            out.append((str(path.relative_to(ROOT / 'results')), c, least, got[c], value, half))
    return out


def test_twins_are_learnt_within_their_limit():
    """No condition above its Bayes limit by more than its interval; MCULoRA above the most
    frequent class in each (a linear model of zero-filled input need not be)."""
    assert not [x for p in TWINS for x in outside(p)]


def test_there_is_a_twin():
    assert TWINS


@pytest.mark.parametrize('other', ['logistic', 'logistic-per-condition'])
def test_mculora_beats_the_simplest_methods_on_real_data(other):
    t = methods_on('iemocap')
    t = t[(t.metric == 'WA') & (t.selection == 'validation') & (t.condition == 'incomplete')]
    r = compare(t, 'mculora', other)
    assert r['mean'] - r['half'] > 0, r


def test_the_papers_printed_averages_are_one_of_the_two_or_flagged():
    "results/paper.csv: the numbers that the paper prints, with what is odd about them."
    p = pd.read_csv(ROOT / 'results' / 'paper.csv', dtype={'value': str}, keep_default_na=False)
    assert list(p) == [
        'source',
        'dataset',
        'method',
        'setting',
        'condition',
        'metric',
        'value',
        'flag',
    ]
    assert not p.duplicated(['source', 'dataset', 'method', 'setting', 'condition', 'metric']).any()
    assert set(p.dataset) == {'iemocap', 'mosei'} and p.value.str.fullmatch(r'\d+\.\d+').all()
    seen = 0
    for key, rows in p[p.source.isin(['Table 1', 'Table 2']) & (p.setting != 'delta SOTA')].groupby(
        ['source', 'dataset', 'method', 'setting', 'metric']
    ):
        v = rows.set_index('condition').value.astype(float)
        six = [c for c in ('a', 't', 'v', 'at', 'av', 'tv') if c in v]
        if 'average' not in v or len(six) < 6:
            continue
        means = [v[six].mean(), *([v[[*six, 'atv']].mean()] if 'atv' in v else [])]
        seen += 1
        assert (
            min(abs(m - v['average']) for m in means) < 0.0055
            or rows.flag[rows.condition == 'average'].item()
        ), key
    assert seen == 44


def test_claims_what_tuning_gives():
    "CMU-MOSI: what the best trial gives on validation, and then on test."
    studied = {
        json.loads(p.read_text())['method']: pd.read_csv(p.with_name('trials.csv'))
        for p in (ROOT / 'results' / 'tuning' / 'mosi').glob('*/study.json')
    }
    assert studied.keys() == {'mculora', 'mculora-plus', 'zero-fill'} and all(
        len(t) == 10 and t.validation.max() > t.validation[0] for t in studied.values()
    )
    rows = [
        v
        for m, t in studied.items()
        for v in (
            Variant(name=m, method=m),
            Variant(name=f'{m}, tuned', method=m, options=chosen(t)),
        )
    ]
    found, missing = find(
        collected_of('mosi'), Sweep(data='mosi', folds=[1], seeds=list(FINAL)), rows
    )
    t = found[
        (found.metric == 'ACC') & (found.selection == 'validation') & (found.condition == 'all')
    ]
    gain = {m: compare(t, f'{m}, tuned', m, by='variant') for m in studied}
    assert (
        not missing
        and gain['mculora-plus']['mean'] > gain['mculora-plus']['half']
        and gain['mculora']['mean'] < 0
        and all(abs(gain[m]['mean']) < gain[m]['half'] for m in ('mculora', 'zero-fill'))
    )
    r = compare(t, 'mculora-plus, tuned', 'mculora', by='variant')
    assert abs(r['mean']) < r['half'] and r['mean'] < 0


# of MCULoRA+, as Table 8 calls it
RECIPE = 'speakers, level, context, a draw per utterance, averaged weights'


def test_claims_what_was_tried_and_what_it_gave():
    said = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed']['iemocap'][
        'parameters'
    ]['table8_choices']
    gains, control = {}, 'no adapter'
    for study in ('readings', 'tries'):
        found, missing = find(
            collected_of('iemocap'), Sweep(data='iemocap', **said), studies()[study]
        )
        t = found[
            (found.metric == 'WA')
            & (found.selection == 'validation')
            & ~found.variant.isin(missing)
        ]
        assert list(missing) == (['in every linear map, alpha 16'] if study == 'readings' else [])
        val = t[t.condition == 'all'].assign(
            value=lambda x: [read(f).stages[-1]['validation'] for f in x.file]
        )
        others = [n for n in dict.fromkeys(t.variant) if n != control]
        incomplete = t[t.condition == 'incomplete']
        # other minus control
        gains[study], d = (
            against(x.assign(value=-x.value), control, others, by='variant')
            for x in (val, incomplete)
        )
        assert (d['mean'].abs() < d.half).all()
    assert gains['readings']['mean'].abs().max() < 0.01
    d = gains['tries']
    assert (
        len(d) == 20
        and abs(d['mean']['projected gradients']) < d.half['projected gradients']
        and list(d.index[d['mean'] > d.half]) == ['speakers'] == [d['mean'].idxmax()]
        and (d.corrected > 0.05).all()
        and 0 < d['mean'][RECIPE] < d.half[RECIPE]
    )


def test_a_table_that_is_made_elsewhere_says_at_once_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(data='iemocap', folds=[1], seeds=[66])
    with pytest.raises(ValueError, match='results: found .results., expected the folder with the'):
        read_settings(Report, given | dict(results='results'), 'parameters')
    assert read_settings(Report, given | dict(results=str(ROOT / 'results')), 'parameters')


# --- the table of what ran ---


def ran(*names):
    return read_runs([ROOT / 'results' / f'{name}.runs.jsonl' for name in names])


def test_the_report_has_every_metric_of_what_ran_and_a_floor():
    tables = tables_of_runs(ran('mosi/majority', 'mosi/late-fusion'))
    whole = {t.title.split(' ')[0].strip(','): t for t in tables if 'missing' not in t.title}
    assert list(whole) == ['ACC', 'F1', 'r', 'MAE']
    assert all(next(iter(t.rows)) == FLOOR and t.columns[-1] == 'all' for t in whole.values())
    floor = {m: t.rows[FLOOR]['all'].mean for m, t in whole.items()}
    assert floor['r'] == 0 and floor['MAE'] > whole['MAE'].rows['late-fusion']['all'].mean > 0
    # the training mean is on the smaller side of the middle
    assert f'has {100 - floor["ACC"]:.1f}' in ' '.join(whole['ACC'].notes) and floor['ACC'] < 50
    assert 'validation' in whole['ACC'].columns and 'validation' not in whole['F1'].columns
    assert all('Not simulated; folds 1; seeds' in t.notes[0] for t in tables)


def test_the_report_has_all_folds_and_each_and_says_who_lacks_some():
    runs = ran('iemocap/majority', 'iemocap/gcnet')
    # without the grid of learning rates
    plain = runs.groupby('method').options.transform(lambda o: o.value_counts().index[0])
    runs = runs[
        (runs.options == plain)
        & ~((runs.method == 'gcnet') & ((runs.fold == 4) | (runs.seed != 66)))
    ]
    together, each, *_ = tables_of_runs(runs)
    assert len(each.rows) == 4 + 3 and 'by fold' in each.title
    assert each.rows['gcnet, fold 1']['all'].say().endswith('(1 run)')
    at = runs[(runs.method == 'gcnet') & (runs.metric == 'WA') & (runs.condition == 'all')]
    at = at[at.selection == 'validation']
    assert together.rows['gcnet']['all'].mean == pytest.approx(100 * at.value.mean())
    assert any('not to be compared: gcnet (3 of' in n for n in together.notes)


def test_two_versions_of_a_dataset_are_refused():
    runs = ran('mosi/majority')
    runs.loc[runs.seed == 67, 'data_hash'] = 'other'
    for f in (tables_of_runs, lambda t: summarise(t, ('method',))):
        with pytest.raises(DataError, match='mosi: found results on different data'):
            f(runs)


def test_a_place_without_runs_is_refused(tmp_path):
    for place, says in (
        (tmp_path / 'nowhere', 'found no such folder'),
        (tmp_path, 'found no finished run'),
    ):
        with pytest.raises(DataError, match=says):
            read_runs([ROOT / 'results' / 'mosi', place])


def test_runs_on_features_as_they_are_have_a_table_of_their_own(tmp_path):
    "Two runs that differ in a shared setting are no two seeds of one row."
    t = read_runs([ROOT / 'results' / 'mosi' / 'majority.runs.jsonl'])
    raw = t.assign(standardise='false', value=0.25)
    titles = [x.title for x in tables_of_runs(pd.concat([t, raw]))]
    marked = [x for x in titles if x.endswith('features as they are')]
    assert len(titles) == 2 * len(marked) > 0
