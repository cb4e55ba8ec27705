"""Every number of README.md and docs/ that a run gave stands in a block that code prints from the
result files. `python tests/test_pages.py` writes the blocks anew."""

import csv
import json
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_results import collected_of, methods_on, read

from mculora.experiments.bench import markdown as bench_table
from mculora.experiments.headroom import markdown as headroom_table
from mculora.experiments.headroom import read_found
from mculora.experiments.reports import Report
from mculora.experiments.results import addresses, against, report, said_by, summarise
from mculora.experiments.statistics import (
    Effect,
    fixed_effects,
    gains,
    together,
    words_of,
)
from mculora.experiments.studies import ABLATION, RANKS, Sweep, Variant, find

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'(<!-- made: (.+?) -->\n)(.*?)(<!-- end -->)', re.S)
CONFIG = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())['committed']


def rows(*cells):
    "A Markdown table: header, rule, rows."
    head, *body = [[str(c) for c in row] for row in cells]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in (head, ['---'] * len(head), *body))


def shown(r, k=100):
    return f'{k * r["mean"]:.1f} ± {k * r["half"]:.1f}'


def gap(r, k=100):
    mean = round(k * r['mean'], 2) + 0.0  # no minus zero
    return f'{mean:+.2f} ± {k * r["half"]:.2f}'


# --- how the methods compare ---


def means(data, metric):
    "Every method under every condition, the best on the incomplete ones last."
    return report(methods_on(data), data, metric).split('\n\n')[0]


def differences(data, metric):
    "What separates the best method, and MCULoRA, from each other one, in the order of `means`."
    t = methods_on(data)
    t = t[(t.metric == metric) & (t.selection == 'validation')]
    *_, complete = [c for c in t.condition.unique() if c not in ('incomplete', 'all')]
    parts = {c: t[t.condition == c] for c in ('incomplete', complete)}
    order = list(parts['incomplete'].groupby('method').value.mean().sort_values().index)
    found = {
        f'`{one}` minus it, {c}': against(at, one, [m for m in order if m != one])
        for one in (order[-1], 'mculora')
        for c, at in parts.items()
    }

    def cell(d, other):
        if other not in d.index:
            return ''
        return gap(d.loc[other]) + (' \\*' if d.corrected[other] < 0.05 else '')

    body = ([f'`{m}`', *(cell(d, m) for d in found.values())] for m in order)
    return rows(['method', *found], *body)


# --- does it reproduce? ---


def sweep(data):
    said = CONFIG[data]
    own = said.get('parameters', {}).get('table2_ablation', {})
    shared = {k: own.get(k, {}) for k in ('options', 'by_method')}
    return Sweep(data=data, folds=said['folds'], seeds=said['seeds'], **shared)


LEAD = {'iemocap': 'WA', 'mosi': 'ACC', 'mosei_video': 'r', 'hazumi_online': 'r'}
NAME = {
    'iemocap': 'IEMOCAP',
    'mosi': 'CMU-MOSI',
    'mosei_video': '`mosei_video`',
    'hazumi_online': '`hazumi_online`',
}
# the methods of the paper's Table 1 that are here
PRINTED = 'dicmor euar gcnet if-mmin imder mctn mmin momke mran-reading'.split()


MORE = (69, 70)  # further seeds, on which some rows ran and others did not


def on_shared_seeds(t):
    "The part of a table that all its rows have."
    return t[t.seed.isin(set.intersection(*t.groupby('variant').seed.agg(set)))]


@cache
def incomplete(data):
    """Scores on the mean of the incomplete conditions: a row per run of the whole model, its parts,
    its ranks and, where they ran, the other methods. What ran on further seeds has them, as in
    Table 2."""
    others = [Variant(name=m, method=m) for m in PRINTED]
    _, lost = find(collected_of(data), sweep(data), others)
    variants = [*ABLATION, *RANKS, *(v for v in others if v.name not in lost)]
    found, missing = find(collected_of(data), sweep(data), variants)
    runs = len(sweep(data).folds) * len(sweep(data).seeds)
    assert not missing and all(len(x) == runs for x in lost.values())  # all of a method, or nothing
    seeds = sorted({*sweep(data).seeds, *MORE})
    wide, lacking = find(
        collected_of(data), sweep(data).model_copy(update=dict(seeds=seeds)), variants
    )
    whole = [v.name for v in variants if v.name not in lacking]
    found = pd.concat([found[~found.variant.isin(whole)], wide[wide.variant.isin(whole)]])
    return found[
        (found.metric == LEAD[data])
        & (found.selection == 'validation')
        & (found.condition == 'incomplete')
    ]


@cache
def printed():
    "The paper's WA on IEMOCAP: (method, setting) -> mean of the six incomplete conditions."
    p = pd.read_csv(ROOT / 'results' / 'paper.csv').fillna('')
    p = p[(p.dataset == 'iemocap') & (p.metric == 'WA') & (p.setting != 'delta SOTA')]
    six = p[p.condition.isin(['a', 't', 'v', 'at', 'av', 'tv'])]
    return six.groupby(['method', 'setting']).value.mean()


def best_other(data):
    t = incomplete(data)
    if 'momke' not in set(t.variant):
        return None
    t = on_shared_seeds(t[t.variant.isin(PRINTED)])
    return t.groupby('variant').value.mean().idxmax()


WHOLE = 'MCLA + DPFT'


def asked(data):
    "What the paper claims of its parts, as a difference of two rows: claim -> (one, other)."
    return {
        'ahead': (WHOLE, best_other(data)),
        'MCLA': ('MCLA', 'pre-trained'),
        'private': ('MCLA', 'shared adapter only'),
        'DPFT': (WHOLE, 'MCLA'),
        'rank': ('rank 8', 'rank 1'),
    }


WITH_ADAPTERS = 'second stage with adapters ('
# rows that are fixed comparisons, by their names there
FIXED = {'private': 'private adapters', 'DPFT': 'DPFT'}


@cache
def fixed(data):
    "The fixed comparisons that ran on some data, and their p after Holm's correction over them."
    return fixed_effects(Report(**sweep(data).model_dump(), more=list(MORE)))


@cache
def effects():
    """(claim, dataset) -> mean, half and p of the paired difference, and the `Effect`; p after
    Holm's correction: of fixed comparisons over these, of MCLA as in Table 2, of the rest over one
    another."""
    out, known, printed_by = {}, {}, printed_gains()
    for data in LEAD:
        for claim, (one, other) in asked(data).items():
            if other:
                t = incomplete(data)
                # the best of several: on what all of them ran on
                rows = [one, *PRINTED] if claim == 'ahead' else [one, other]
                t = on_shared_seeds(t[t.variant.isin(rows)])
                of_paper = printed_by.get(claim) if data == 'iemocap' else None
                effect = Effect(gains(t, one, other), of_paper or float('nan'))
                r = against(t, one, [other], by='variant').iloc[0]
                out[claim, data] = r.to_dict() | {'effect': effect}
                if claim in FIXED:
                    known[claim, data] = fixed(data)[1][FIXED[claim]]
                if claim == 'MCLA':  # as in Table 2
                    (said,) = [r for q, r in sizes(data).items() if q.startswith(WITH_ADAPTERS)]
                    known[claim, data] = float(said['p, corrected'])
    p = together({k: r['p'] for k, r in out.items()}, known)
    return {k: r | {'corrected': p[k]} for k, r in out.items()}


SMALL, PRINTED_SMALLER = 'smaller than 0.5', 'smaller than printed'


def effect_of(claim):
    "In words: on which data it is told from zero, after the correction, and how small it is."
    own = {d: r for (c, d), r in effects().items() if c == claim}
    words = {d: words_of(r['effect'], r['corrected']) for d, r in own.items()}

    def where(word):
        *some, last = [NAME[d] for d, said in words.items() if word in said] or ['']
        return ' and '.join([', '.join(some), last] if some else [last])

    said = [f'on {where("above zero")}'] * bool(where('above zero'))
    said += [f'below zero on {where("below zero")}'] * bool(where('below zero'))
    said = said or ['not measurable']
    in_words = {
        SMALL: 'smaller than 0.5 points',
        PRINTED_SMALLER: PRINTED_SMALLER,
    }
    for word, said_so in in_words.items():
        said += [f'{said_so} on {where(word)}'] * bool(where(word))
    return '; '.join(said)


def printed_gains():
    "What the paper prints of these, in points."
    p = printed()
    others = p[p.index.get_level_values('method') != 'mculora']
    return {
        'ahead': p['mculora', ''] - others.max(),
        'MCLA': p['mculora', 'without DPFT'] - p['mculora', 'without MCLA and DPFT'],
        'DPFT': p['mculora', ''] - p['mculora', 'without DPFT'],
    }


def verdict():
    "Six claims of the paper, beside what the committed runs say."
    paper = printed_gains()
    said = {
        'ahead': ('ahead of the best other method of the paper', 'table1_fixed', 'methods'),
        'MCLA': ('MCLA, against pre-training alone', 'table2_ablation', 'ablation'),
        'private': ('private adapters, against shared only', 'table2_ablation', 'ablation'),
        'DPFT': ('DPFT, against uniform sampling', 'table2_ablation', 'ablation'),
        'rank': ('rank 8, against rank 1', 'fig3_rank', 'rank'),
    }

    def linked(text, data):
        return f'[{text}](results/{data}/mculora.runs.jsonl)'

    def row(claim, text, table, study):
        found = {d: r for (c, d), r in effects().items() if c == claim}
        cells = [linked(gap(found[d]), d) if d in found else '–' for d in LEAD]
        at_paper = f'{paper[claim]:+.2f}' if claim in paper else '–'
        where = f'[{text}](figures/iemocap/{table}-iemocap.md)'
        return [where, at_paper, *cells, effect_of(claim), f'`--study {study}`']

    # the seeds that every row of Table 1 has
    own = {d: t[t.seed.isin(sweep(d).seeds)] for d in LEAD for t in [incomplete(d)]}
    scores = {d: summarise(t, ('variant',)).loc[WHOLE] for d, t in own.items()}
    first = [
        '[the whole model: accuracy](figures/iemocap/table1_fixed-iemocap.md)',
        f'{printed()["mculora", ""]:.1f}',
        *(linked(shown(r), d) for d, r in scores.items()),
        'other features: not comparable',
        '`--study methods`',
    ]
    ours = (f'{NAME[d]}, {m}' for d, m in LEAD.items())
    head = ['', 'paper, IEMOCAP', *ours, 'gain here', '`mculora study iemocap`']
    return rows(head, first, *(row(c, *x) for c, x in said.items()))


# --- which runs there are, and what they took ---


@cache
def runs():
    "A row for each committed run."
    out = []
    for p in addresses(ROOT / 'results'):
        r = said_by(p)
        out.append(
            dict(
                data=r['data']['name'],
                simulated=r['data']['simulated'],
                method=r['config']['method'],
                schedule=r['config']['schedule'],
                fold=r['config']['fold'],
                seed=r['config']['seed'],
                utterances=sum(r['data']['utterances'].values()),
                modalities=len(r['data']['widths']),
                epochs=sum(s['epochs'] for s in r['stages']),
                seconds=r['seconds'],
                gb=(r['peak_mb'] or 0) / 1024,
                cpu=r['environment']['device'] == 'cpu',
                threads=r['environment']['threads'],
            )
        )
    return pd.DataFrame(out)


def kept():
    "How many runs of what there are, and by which schedule."
    t = runs()
    body = [
        [
            f'`{data}`',
            'simulated' if r.simulated.iloc[0] else 'real',
            len(r),
            r.method.nunique(),
            r.fold.nunique(),
            r.seed.nunique(),
            ', '.join(sorted(set(r.schedule))),
        ]
        for data, r in t.groupby('data')
    ]
    total = ['all', '', len(t), t.method.nunique(), '', '', ', '.join(sorted(set(t.schedule)))]
    return rows(['data', '', 'runs', 'methods', 'folds', 'seeds', 'schedule'], *body, total)


def seconds():
    "What a run takes on one thread of a CPU, by the size of the data."
    t = runs()
    t = t[t.cpu & (t.threads == 1) & (t.schedule == 'quick')]
    t = t[t.method.isin(['mculora', 'logistic-per-condition'])]
    by = t.groupby(['utterances', 'modalities', 'data', 'method'])
    m = by[['seconds', 'gb']].median().unstack()
    linear = 'logistic-per-condition'
    body = [
        [
            f'`{data}`',
            n,
            k,
            f'{r["seconds", "mculora"]:.0f} s',
            f'{r["gb", "mculora"]:.1f} GB',
            f'{r["seconds", linear]:.0f} s' if r['seconds', linear] >= 0 else '–',
        ]
        for (n, k, data), r in m.iterrows()
    ]
    head = ['data', 'utterances', 'modalities', '`mculora`', 'memory', '`logistic-per-condition`']
    return rows(head, *body)


def expected(data):
    "What one run of MCULoRA on the first fold and seed gave, and took."
    t = methods_on(data, seeds=[66], names=['mculora'])
    t = t[(t.fold == 1) & (t.metric == LEAD.get(data, 'WA')) & (t.selection == 'validation')]
    r = read(t.file.iloc[0])
    scores = dict(zip(t.condition, t.value))
    took = f'{r.seconds:.0f} s, {r.peak_mb / 1024:.1f} GB'
    return rows([*scores, 'took'], [*(f'{100 * v:.1f}' for v in scores.values()), took])


def side_by_side(names=('mculora', 'mculora-plus', 'momke', 'gcnet', 'mctn', 'zero-fill')):
    """Median seconds of a run with a method's own settings on IEMOCAP, by where it was made, and
    how many runs an hour that is: on the CPU, two at a time."""
    t = methods_on('iemocap', seeds=[66, 67, 68, 69, 70], names=names)
    t = t.drop_duplicates('file').assign(seconds=lambda x: [read(f).seconds for f in x.file])
    s = t.pivot_table(index='method', columns='machine', values='seconds', aggfunc='median')
    assert (
        all(read(f).environment['side_by_side'] == 8 for f in t.file[t.machine != 'CPU'])
        and len(t) == 20 * len(names)
        and (t.machine == 'CPU').mean() == 0.6
    )
    body = (
        [
            f'`{m}`',
            f'{cpu:.0f} s',
            f'{gpu:.0f} s',
            f'{cpu / gpu:.0f}x',
            f'{2 * 3600 / cpu:.0f}',
            f'{3600 / gpu:.0f}',
        ]
        for m, cpu, gpu in s.loc[list(names), ['CPU', 'NVIDIA H200']].itertuples()
    )
    head = ['', 'one after the other, CPU', 'side by side, NVIDIA H200', 'ratio']
    return rows([*head, 'runs an hour, two CPU cores', 'runs an hour, H200'], *body)


def bench(file):
    found = json.loads((ROOT / file).read_text())
    assert found['environment']['changed'] is False and found['config']['size'] == 'full'
    return bench_table(found, file)


def headroom():
    "What linear read-outs of one's own gain, one line a dataset."
    return headroom_table(sorted((ROOT / 'results' / 'headroom').glob('*.json')))


def table_of(file, title):
    "A table of figures/, without its title."
    tables = re.split(r'\n(?=\*\*|Made by )', (ROOT / file).read_text())
    (text,) = [t for t in tables if t.startswith(f'**{title}')]
    return text.split('\n', 2)[2].strip()


MAP = ROOT / 'figures' / 'premise-1.5-simulated' / 'fig8_map-premise-1.5-simulated.md'
MAPPED = (
    'private adapters, frozen',
    'private adapters, retrained',
    'shared adapter, frozen',
    'adapters for fusion',
)


def map_of_effects():
    "Figure 8's effects on the incomplete conditions; a row for each data set, by its headroom."
    block = r'\*\*Fig\. 8, effects \(([^)]*)\), (.*?)\*\*\n(.*?)\n([-\d.]+.*?) \1 to gain'
    found = []
    for unit, what, table, gain in re.findall(block, MAP.read_text(), flags=re.S):
        cells = [[x.strip() for x in line.strip('|').split('|')] for line in table.splitlines()]
        effect = {row[0]: row[1] for row in cells if len(row) == 5}
        what += '' if unit == 'points' else f' ({unit})'
        found.append([what, gain, *(effect[k] for k in MAPPED)])
    head = ['data', 'to gain', *MAPPED]
    return rows(head, *sorted(found, key=lambda r: float(r[1].split()[0])))


# --- the blocks ---

MADE = {f.__name__: f for f in (means, differences, verdict, kept, seconds, expected)}
MADE |= {f.__name__: f for f in (side_by_side, bench, headroom, table_of, map_of_effects)}


def made(call):
    "What `<!-- made: NAME | ARGUMENT | ... -->` asks for."
    name, *arguments = [x.strip() for x in call.split('|')]
    return MADE[name](*arguments)


def told(text):
    """What a block says, without how: the cells of its tables, headers apart, and of its sentences
    the numbers."""
    lines = text.splitlines()
    cells = [[x.strip() for x in a.strip('|').split('|')] for a in lines if a.startswith('|')]
    prose = ' '.join(a for a in lines if not a.startswith('|'))
    return cells[2:], re.findall(r'\d+(?:\.\d+)?', prose)


BLOCKS = [(p, call, text) for p in PAGES for _, call, text, _ in BLOCK.findall(p.read_text())]


@pytest.mark.parametrize(
    'page, call, text', BLOCKS, ids=[f'{p.name}-{call}' for p, call, _ in BLOCKS]
)
def test_a_block_says_what_the_results_say(page, call, text):
    assert told(text) == told(made(call)), 'write it anew: python tests/test_pages.py'


def test_every_kind_of_block_is_somewhere_and_no_marker_is_torn():
    assert {call.split('|')[0].strip() for _, call, _ in BLOCKS} == set(MADE)
    for p in PAGES:
        text = p.read_text()
        assert text.count('<!-- made: ') == text.count('<!-- end -->') == len(BLOCK.findall(text))


def test_a_wrong_number_in_a_block_is_noticed():
    text = means('mosi', 'ACC')
    wrong = re.sub(r'(\d)\.(\d)', lambda m: f'{m[1]}.{(int(m[2]) + 1) % 10}', text, count=1)
    assert told(wrong) != told(text) and told('of 3 runs') != told('of 4 runs')
    assert told(text.replace('method', 'Method')) == told(text)


def test_claims_of_the_verdict():
    """Three effects of all differ from zero after Holm's correction: on `hazumi_online` MCTN's lead
    and MCLA's gain, and MCLA's gain on `mosei_video`. On the former the second stage gains as much
    without adapters. Where the paper prints a
    gain, it lies outside the interval on IEMOCAP; MCULoRA ran by the paper's schedule on CMU-MOSI
    and IEMOCAP."""
    found = effects()
    sure = {k: r['mean'] > 0 for k, r in found.items() if r['corrected'] < 0.05}
    gain_on = {('MCLA', data): True for data in ('mosei_video', 'hazumi_online')}
    assert sure == {('ahead', 'hazumi_online'): False} | gain_on
    assert best_other('hazumi_online') == 'mctn'
    said = {k.split(' (')[0]: row for k, row in sizes('hazumi_online').items()}
    alone, gain = (said[k] for k in ('second stage', 'second stage with adapters'))
    assert alone['verdict'] == gain['verdict'] == 'above zero'
    mean, half = map(float, said['adapters']['difference'].split(' ± '))
    assert abs(mean) < half < float(alone['difference'].split(' ± ')[0]) / 5
    # and more than longer pre-training does
    longer, against = said['longer pre-training'], said['second stage, against longer pre-training']
    assert 'not distinguishable' in longer['verdict'] and against['verdict'] == 'above zero'
    small = [
        data
        for data in LEAD
        if SMALL in effect_of('private') and NAME[data] in effect_of('private')
    ]
    assert small == list(LEAD)
    gains = printed_gains()
    assert set(gains) == {'ahead', 'MCLA', 'DPFT'}
    for claim, gain in gains.items():
        r = found[claim, 'iemocap']
        assert r['mean'] + r['half'] < gain / 100
    own = runs().query('method == "mculora" and schedule == "paper"')
    assert set(own.data) == {'mosi', 'iemocap'}


def test_claims_of_the_schedule_of_the_paper():
    """On CMU-MOSI it keeps the first epochs of the second stage, so adapters, private ones, DPFT
    and L_ort change nothing; with epochs chosen on the test set nothing is measurable either."""
    title = "Table 2, the paper's schedule: differences in ACC"
    steps = cells_of('mosi', 'table2_ablation', title)
    kept = [row['updates, finetune'].split(' of ') for row in steps.values()]
    assert all(int(a) < int(b) / 50 for a, b in kept)
    for step in ('adapters', 'private adapters', 'L_ort', 'DPFT'):
        assert steps[step]['incomplete'] == '0.00 ± 0.00'
    on_test = cells_of('mosi', 'table2_ablation', 'Table 2, epochs chosen on the test set')
    for row in on_test.values():
        mean, half = map(float, row['schedule paper'].split(' ± '))
        assert abs(mean) <= half


def test_claims_of_the_schedule_of_the_paper_on_iemocap():
    """Adapters have hundreds of updates and no measurable effect, also over speakers; the second
    stage is above zero before the correction alone; DPFT is so over speakers alone. With epochs
    chosen on the test set nothing is measurable."""
    title = "Table 2, the paper's schedule: differences in WA"
    steps = cells_of('iemocap', 'table2_ablation', title)
    assert all(float(row['p, corrected']) > 0.05 for row in steps.values())
    above = [k for k, row in steps.items() if float(row['p, incomplete']) < 0.05]
    assert above == ['second stage', 'second stage with adapters']
    assert int(steps['adapters']['updates, finetune'].split()[0]) > 200
    title = 'Table 2, how small the effects are, WA'
    said = {
        k.removeprefix("the paper's schedule: ").split(' (')[0]: row
        for k, row in cells_of('iemocap', 'table2_ablation', title).items()
        if k.startswith("the paper's schedule: ")
    }
    for step, most in (('adapters', 0.35), ('private adapters', 0.1)):
        assert float(said[step]['would have been seen'].split()[0]) < most

    def interval_of(step, column):
        return [float(x) for x in said[step][column].split(' ± ')]

    mean, half = interval_of('adapters', 'over speakers')
    assert abs(mean) < half < interval_of('adapters', 'difference')[1]
    for column, without_zero in (('difference', False), ('over speakers', True)):
        mean, half = interval_of('DPFT', column)
        assert (mean > half) == without_zero and 0.15 < mean < 0.25
    for row in cells_of(
        'iemocap', 'table2_ablation', 'Table 2, epochs chosen on the test'
    ).values():
        mean, half = map(float, row['schedule paper'].split(' ± '))
        assert abs(mean) <= half


def starred(table, column):
    "Methods whose difference in a column of `differences` is marked."
    cells, _ = told(table)
    return {row[0].strip('`') for row in cells if '*' in row[column]}


def test_claims_of_the_comparison():
    """After Holm's correction: on IEMOCAP's incomplete conditions nothing is told from anything; on
    CMU-MOSI kNN imputation is ahead of MCULoRA on none, and behind it on the complete one."""
    iemocap, mosi = differences('iemocap', 'WA'), differences('mosi', 'ACC')
    assert not starred(iemocap, 1) | starred(iemocap, 3) and len(starred(iemocap, 2)) > 3
    assert 'mculora' not in starred(mosi, 1) and 'mculora' in starred(mosi, 2)
    assert 'knn-imputation' not in starred(mosi, 3) and 'knn-imputation' in starred(mosi, 4)


ALONE = {'majority', 'logistic', 'logistic-per-condition', 'mean-imputation', 'zero-fill'}
ALONE |= {'if-mmin', 'mmin', 'mran-reading', 'euar'}  # these read single utterances


def test_claims_of_the_comparison_on_conversations_with_a_system():
    """MCTN is ahead of MCULoRA on both, and of all but GCNet on the incomplete conditions; MCULoRA,
    second, of late fusion and of all that read single utterances, EUAR apart, and by its mean of
    GCNet where there are words, behind it elsewhere. Of MoMKE by its interval, uncorrected."""
    t = differences('hazumi_online', 'r')
    names = [row[0].strip('`') for row in told(t)[0]]
    assert names[-2:] == ['mculora', 'mctn'] and 'mculora' in starred(t, 2)
    assert starred(t, 1) == set(names) - {'mctn', 'gcnet'}
    assert starred(t, 3) == ALONE - {'euar'} | {'late-fusion', 'mctn'}
    found = methods_on('hazumi_online', names=['mculora', 'gcnet'])
    found = found[(found.metric == 'r') & (found.selection == 'validation')]
    mean = found.pivot_table(index='condition', columns='method', values='value')
    words = {c: 't' in c for c in ('t', 'a', 'v', 'ta', 'tv', 'av', 'tav')}
    assert {c: bool(mean.mculora[c] > mean.gcnet[c]) for c in words} == words
    said = {k.split(' (')[0]: row for k, row in sizes('hazumi_online').items()}
    momke, gcnet = said['ahead of MoMKE'], said['ahead of GCNet']
    mean, half = map(float, momke['difference'].split(' ± '))
    assert mean > half and mean > 1 and float(momke['p, corrected']) > 0.05
    assert abs(float(gcnet['difference'].split(' ± ')[0])) < 0.2


def cells_of(data, table, title):
    "Rows of a committed table, as dictionaries of text, by the first cell."
    text = table_of(f'figures/{data}/{table}-{data}.md', title).splitlines()
    head, _, *body = [[x.strip() for x in a.strip('|').split('|')] for a in text if a[:1] == '|']
    return {row[0]: dict(zip(head, row)) for row in body}


def sizes(data):
    return cells_of(data, 'table2_ablation', 'Table 2, how small the effects are')


def test_claims_of_the_random_protocol_on_hazumi_online():
    "MCULoRA has the highest mean, level with MCTN, and is ahead of GCNet by more and more."
    rows = cells_of('hazumi_online', 'table3_random', 'Table 3, minus MCULoRA')
    mean = {n: tuple(map(float, row['mean'].split(' ± '))) for n, row in rows.items()}
    assert all(m < 0 for m, _ in mean.values())
    assert abs(mean['mctn'][0]) < mean['mctn'][1]
    gcnet = rows['gcnet']
    assert float(gcnet['p, mean']) < 0.05
    assert float(gcnet['0.5'].split()[0]) < float(gcnet['0.1'].split()[0])


WITHOUT_SIGNAL = {'mmin', 'if-mmin', 'if-mmin, october 2022', 'mran-reading'}


def test_claims_of_their_own_recipes():
    """On CMU-MOSI four start almost without signal by their own recipe: they lose most, and this
    survives the correction; EUAR loses about three points, the others on several seeds less. On one
    seed GCNet gains more than four, MoMKE as seven models more than three, DiCMoR loses as much,
    the others change by less than two. IMDer is missing. On fold 1 of IEMOCAP the same four lose
    more than five, the others that ran change by less than three."""
    gain, missing = by_their_own_recipes('mosi')
    assert missing == {'imder'}
    assert {m for m, x in gain.items() if x < -5} == WITHOUT_SIGNAL
    assert gain['gcnet'] > 4 and gain['momke-per-condition'] > 3 and -5 < gain['dicmor'] < -3
    tested = cells_of('mosi', 'table5_recipes', 'Table 5, fair minus as published')
    assert {m for m, row in tested.items() if float(row['p, incomplete']) < 0.05} == WITHOUT_SIGNAL
    assert 2.5 < -gain['euar'] < 3.5 and {'mctn', 'momke', 'euar'} < tested.keys()
    for m in gain.keys() - WITHOUT_SIGNAL - {'euar', 'gcnet', 'momke-per-condition', 'dicmor'}:
        assert abs(gain[m]) < (3 if m in tested else 2)
    gain, missing = by_their_own_recipes('iemocap')
    assert {'gcnet', 'dicmor', 'imder', 'momke-per-condition'} <= missing
    assert {m for m, x in gain.items() if x < -5} == WITHOUT_SIGNAL
    assert all(abs(gain[m]) < 3 for m in gain.keys() - WITHOUT_SIGNAL)


def by_their_own_recipes(data):
    "Of Table 5: what each recipe gains over `fair` on the incomplete conditions; what is missing."
    means = {}
    path = ROOT / 'figures' / data / f'table5_recipes-{data}.csv'
    for x in csv.DictReader(path.read_text().splitlines()):
        if 'fair and as published' in x['table']:
            means[x['method'], x['column']] = x['mean'], x['runs']
    gain, missing = {}, set()
    for method in dict.fromkeys(m for m, _ in means):
        fair, own = (means[method, f'incomplete, {c}'] for c in ('fair', 'as published'))
        if own[0]:
            assert fair[1] == own[1]
            gain[method] = float(own[0]) - float(fair[0])
        else:
            missing.add(method)
    return gain, missing


def test_claims_of_the_swap():
    """With the fusion retrained another combination's adapters change nothing on the real data,
    where a tenth would have been seen, and cost points on the twin. Frozen, with alpha 16:
    adapters differ over all others on hazumi_online, and nowhere among trained ones; heads on both.
    Heads with the fusion retrained: on hazumi_online, among those with all modalities."""
    on = {d: cells_of(d, 'fig10_swap', 'Fig. 10') for d in (*SWAPPED, 'premise-1.5-simulated')}

    def differs(data, row, column='any other'):
        cells = on[data][row]
        mean = float(cells[column].split(' ± ')[0])
        return mean if float(cells[f'p, {column}']) < 0.05 else 0

    frozen, trained = 'fusion frozen, alpha 16', 'has all its modalities'
    for data in SWAPPED:
        kept = on[data]['adapters, fusion retrained']
        assert not differs(data, 'adapters, fusion retrained')
        assert float(kept['would have been seen']) < 0.1
        assert not differs(data, 'heads, fusion retrained')
        assert differs(data, f'heads, {frozen}') < 0
        assert not differs(data, f'adapters, {frozen}', trained)
    assert differs('hazumi_online', 'heads, fusion retrained', trained) < 0
    assert not differs('iemocap', 'heads, fusion retrained', trained)
    assert differs('premise-1.5-simulated', 'adapters, fusion retrained') < 0
    assert not differs('premise-1.5-simulated', f'adapters, {frozen}')
    assert not differs('premise-1.5-simulated', f'heads, {frozen}')
    assert -0.6 < differs('hazumi_online', f'adapters, {frozen}') < -0.4
    assert not differs('iemocap', f'adapters, {frozen}')
    assert "In the paper's second stage, reading a combination" in (ROOT / 'README.md').read_text()


SWAPPED = 'iemocap', 'hazumi_online'


def test_claims_of_the_map():
    """Private adapters on a frozen fusion gain on the two twins with most to gain; a retrained one
    leaves nothing measurable; adapters are ahead of a retrained fusion on the same two, by their
    interval on the third as well. On CMU-MOSI nothing is measurable; on hazumi_online nothing is
    either, and less than a third of what read-outs gain would have been."""
    lines = map_of_effects().splitlines()
    head, _, *body = [[x.strip() for x in line.strip('|').split('|')] for line in lines]
    by = {row[0].removesuffix(', stand-in features'): dict(zip(head, row)) for row in body}
    found = {}
    for data, row in by.items():
        means_ = {k: [float(x) for x in row[k].split(' ± ')] for k in MAPPED}
        name = data.split(', ')[-1 if data.startswith('simulated') else 0].removeprefix('k = ')
        found[name] = {k: (m - h > 0, m + h < 0) for k, (m, h) in means_.items()}
    sure = {k: {data for data, r in found.items() if r[k][0]} for k in MAPPED}
    assert sure['private adapters, frozen'] == {'1.5', '2.5'}
    assert not sure['private adapters, retrained']
    assert sure['adapters for fusion'] == {'0.8', '1.5', '2.5'}
    assert not any(any(x) for data in ('CMU-MOSI', 'hazumi_online') for x in found[data].values())
    (real,) = [row for data, row in by.items() if data.startswith('hazumi_online')]
    most = sum(map(float, real['private adapters, frozen'].split(' ± ')))
    read_outs = read_found(ROOT / 'results/headroom/hazumi_online.json').scores['r']['incomplete']
    assert 0 < most < 100 * read_outs['low'] / 3


def test_claims_of_what_is_small():
    """On IEMOCAP and CMU-MOSI: adapters, and private ones, below half a point, beside heads by
    speaker too; MCLA and DPFT below what is printed, which would have been seen. Not so the second
    stage, the rank, a method against another, or adapters within MCULoRA+."""
    for data in ('iemocap', 'mosi'):
        said = {k.split(' (')[0]: row for k, row in sizes(data).items()}
        verdicts = {k: row['verdict'] for k, row in said.items()}
        rank = next(k for k in said if k.startswith('rank'))
        small = ['adapters', 'private adapters', 'MCULoRA+: adapters and DPFT beside these']
        assert all(SMALL in verdicts[k] for k in [*small, 'L_ort'])
        others = ['second stage', 'ahead of MoMKE', 'ahead of GCNet', rank]
        assert not any(SMALL in verdicts[k] for k in [*others, 'MCULoRA+: adapters and DPFT'])
        for k in ('adapters', 'second stage with adapters', 'DPFT'):
            chance = float(said[k]['would have been seen'].rpartition(' ')[2])
            assert PRINTED_SMALLER in verdicts[k] and chance > 0.9
        seen = said['MCULoRA+: adapters and DPFT']['would have been seen']
        assert float(seen.split()[0]) > 1
        assert PRINTED_SMALLER in verdicts['ahead of MoMKE']


def test_claims_of_what_is_small_on_single_videos():
    """MCLA gains less than a point over pre-training alone, in its own table; its adapters less
    than half a point, private ones less than a tenth."""
    said = {k.split(' (')[0]: row for k, row in sizes('mosei_video').items()}
    whole, adapters = said['second stage with adapters'], said['adapters']
    mean, half = map(float, whole['difference'].split(' ± '))
    assert whole['verdict'] == 'above zero' and 0 < mean < 1 and half < mean
    assert all('not distinguishable' in said[k]['verdict'] for k in ('second stage', 'adapters'))
    within = adapters['P below / within / above ±0.5'].split(' / ')[1]
    assert float(within) > 0.99 and sum(map(float, adapters['over dialogues'].split(' ± '))) < 0.5
    private = said['private adapters']
    assert SMALL in private['verdict'] and float(private['would have been seen'].split()[0]) < 0.1


@pytest.mark.parametrize('data', [*LEAD, 'iemocap-simulated'])
def test_a_question_has_one_corrected_p(data):
    "In both tables of Table 2; and a verdict names a sign where it is below .05, and only there."
    small, lead = sizes(data), LEAD.get(data, 'WA')
    seen, families = 0, {'ablation': '', 'ablation of MCULoRA+': 'MCULoRA+: '}
    if data == 'hazumi_online':  # where the additions did not run, but longer pre-training did
        families = {'ablation': '', 'longer pre-training': ''}
    for family, before in families.items():
        steps = cells_of(data, 'table2_ablation', f'Table 2, {family}: differences in {lead} ')
        for step, row in steps.items():
            (name,) = [k for k in small if k.startswith(f'{before}{step} (')]
            assert small[name]['p, corrected'] == row['p, corrected'], (data, step)
            seen += 1
    assert seen == (8 if 'longer pre-training' in families else 10)
    for row in small.values():
        assert ('zero' in row['verdict']) and (row['test'] in ('fixed', 'exploratory'))
        assert (float(row['p, corrected']) < 0.05) == row['verdict'].startswith(('above', 'below'))
        # a null says what would have been seen
        assert re.match(r'\d+\.\d\d or more|not to be said', row['would have been seen'])


def test_the_fixed_comparisons_are_those_of_the_file_and_of_the_readme():
    for data in LEAD:
        found, p = fixed(data)
        rows = [k.split(' (')[0] for k, row in sizes(data).items() if row['test'] == 'fixed']
        rows = [k for k in rows if not k.startswith("the paper's schedule")]
        assert rows == list(found) and len(found) == (3 if data == 'mosei_video' else 5)
        for claim, name in FIXED.items():
            mine = effects()[claim, data]
            assert mine['corrected'] == p[name]
            assert mine['effect'].gains.equals(found[name].gains)
    assert {row['test'] for row in sizes('iemocap-simulated').values()} == {'exploratory'}
    assert all(q > 0.05 for data in LEAD for q in fixed(data)[1].values())


def test_claims_of_other_encoders():
    """LSTMs have the higher mean on all three; adapters gain on no encoder. On IEMOCAP validation
    chooses LSTMs by speaker in every fold, which is ahead of the Transformer, GCNet and MCTN. On
    `hazumi_online` graphs are better than the Transformer; there validation chooses three encoders,
    which together are not better: above GCNet without the correction, level with MCTN."""

    def part(data, name):
        rows = cells_of(data, 'table10_bases', f'Table 10, {name}')
        sure = {k for k, row in rows.items() if float(row['p, incomplete']) < 0.05}
        return {k: [*map(float, x['incomplete'].split(' ± '))] for k, x in rows.items()}, sure

    gains = {data: part(data, 'encoders') for data in ('iemocap', 'mosi', 'hazumi_online')}
    for data, (gain, sure) in gains.items():
        adapters, helped = part(data, 'adapters')
        assert not helped and set(adapters) == {
            f'adapters on {e}' for e in ('Transformer', *(k.split(' − ')[0] for k in gain))
        }
        mean, half = gain['LSTM − Transformer']
        assert mean > 0 and (mean > half) == (data != 'hazumi_online')
        best = {'iemocap': 'LSTM by speaker', 'mosi': 'LSTM', 'hazumi_online': 'graph'}[data]
        assert max(gain, key=lambda k: gain[k][0]) == f'{best} − Transformer'
        assert sure == (set() if data == 'mosi' else {f'{best} − Transformer'})
    assert gains['iemocap'][0]['graph − Transformer'][0] < -1
    both = 'LSTM and graph − Transformer'
    assert gains['iemocap'][0]['LSTM − Transformer'][0] - gains['iemocap'][0][both][0] < 0.5
    assert gains['mosi'][0]['LSTM − Transformer'][0] - gains['mosi'][0][both][0] > 1
    adapters, _ = part('hazumi_online', 'adapters')
    assert all(mean + half < 1 / 3 for mean, half in adapters.values())
    choice, ahead = part('iemocap', 'the choice')
    assert {k.split(' − ')[1] for k in ahead} == {'Transformer', 'gcnet', 'mctn'}
    assert all(choice[k][0] > 4 for k in ahead)
    chosen = cells_of('iemocap', 'table10_bases', 'Table 10, validation score')
    assert {row['chosen'] for row in chosen.values()} == {'LSTM by speaker'}
    choice, ahead = part('hazumi_online', 'the choice')
    above = {k.split(' − ')[1]: mean > half for k, (mean, half) in choice.items()}
    assert not ahead and above.pop('gcnet') and not any(above.values())
    assert abs(choice['nested choice − mctn'][0]) < 0.1
    chosen = cells_of('hazumi_online', 'table10_bases', 'Table 10, validation score')
    assert len({row['chosen'] for row in chosen.values()}) == 3
    given = cells_of('hazumi_online', 'table10_bases', 'Table 10, what each row was given')
    size = {k: int(row['parameters'].replace(',', '')) for k, row in given.items()}
    assert all(6 < size['gcnet'] / size[name] < 9 for name in ('Transformer', 'LSTM', 'graph'))


def test_claims_of_a_choice_without_what_was_devised_on_the_test_sessions():
    "On IEMOCAP its lead is small, and nothing of it survives the correction."
    title = 'Table 11, the choice without what was devised on IEMOCAP minus methods named'
    rows = cells_of('iemocap', 'table11_single', title)
    rows = {k.rpartition(' ')[2]: x for k, x in rows.items()}
    assert set(rows) == {'mculora', 'gcnet', 'mctn', 'momke'}
    assert all(float(row['p, incomplete']) >= 0.05 for row in rows.values())
    lead = {k: float(row['incomplete'].split(' ± ')[0]) for k, row in rows.items()}
    assert 0 < lead['gcnet'] < lead['mculora'] < 1.5


def test_claims_of_the_parts_of_gcnet():
    "Only without memory and neighbours together it is measurably worse."
    title = 'Table 12, what each part gives'
    rows = cells_of('hazumi_online', 'table12_gcnet', title)
    rows = {k.removeprefix('GCNet − '): x for k, x in rows.items()}
    assert {k for k, row in rows.items() if float(row['p, incomplete']) < 0.05} == {'neither'}
    gain = {
        k: {c: [*map(float, x.split(' ± '))] for c, x in row.items() if ' ± ' in x}
        for k, row in rows.items()
    }
    for part in ('GCNet, run again', 'no reconstruction', 'no neighbours', 'no memory'):
        assert gain['neither']['incomplete'][0] > 1.5 + gain[part]['incomplete'][0]
    whole = gain['the whole dialogue']
    assert max(whole, key=lambda c: whole[c][0]) == 'v' and whole['incomplete'][0] > 5
    mean, half = gain['a draw per utterance']['incomplete']
    assert mean > half


def test_claims_of_models_near_the_top():
    """MCULoRA on LSTMs by speaker: first on IEMOCAP, ahead of all named, chosen or not. On plain
    LSTMs: second on the others. Their parameters beside GCNet's."""
    plain, named = 'mculora, LSTM', ('gcnet', 'mculora', 'mctn', 'momke')
    for data, first in (
        ('iemocap', 'mculora, LSTM by speaker'),
        ('mosi', ''),
        ('hazumi_online', ''),
    ):
        rows = cells_of(data, 'table11_single', 'Table 11, every single model')
        order = [n for n in rows if n != 'validation chooses']
        assert order[0] == first if first else order[1] == plain, data
        size = {
            n: int(rows[n]['parameters'].replace(',', ''))
            for n in rows
            if n in (first, plain, 'gcnet')
        }
        assert size[plain] / size['gcnet'] < (1.25 if first else 1)
        assert not first or 1.1 < size[first] / size['gcnet'] < 1.12
        assert rows[plain]['reads'] == 'dialogue'
        minus = cells_of(data, 'table11_single', 'Table 11, mculora, LSTM minus')
        assert all(float(row['p, incomplete']) > 0.05 for row in minus.values())
        above = {}
        for name in ('gcnet', 'mculora'):
            mean, half = map(float, minus[f'{plain} − {name}']['incomplete'].split(' ± '))
            above[name] = mean > half
        assert above == dict(gcnet=data != 'iemocap', mculora=data == 'mosi')
    minus = cells_of('iemocap', 'table11_single', 'Table 11, mculora, LSTM by speaker minus')
    assert {k.split(' − ')[1] for k in minus} == set(named)
    assert all(float(row['p, incomplete']) < 0.05 for row in minus.values())
    assert all(float(row['incomplete'].split()[0]) > 4 for row in minus.values())
    minus = cells_of('hazumi_online', 'table11_single', 'Table 11, mculora, LSTM by speaker minus')
    assert all(abs(float(row['incomplete'].split()[0])) < 2 for row in minus.values())


def test_claims_of_a_choice_among_single_models():
    """Validation chooses LSTMs by speaker on IEMOCAP, DiCMoR on CMU-MOSI, MCULoRA on three other
    encoders on `hazumi_online`. That is ahead of all that were named on IEMOCAP, of MoMKE on
    `hazumi_online`, of GCNet and MCULoRA on CMU-MOSI, behind nothing that was named, and not
    measurably behind the best on the test."""

    def told(data, title):
        rows = cells_of(data, 'table11_single', f'Table 11, {title}')
        return {k.split(' − ')[1]: x for k, x in rows.items()}

    chosen, ahead = {}, {}
    for data in ('iemocap', 'mosi', 'hazumi_online'):
        rows = cells_of(data, 'table11_single', 'Table 11, validation score')
        chosen[data] = {n for n, row in rows.items() for x in row.values() if x[:2] == '**'}
        named = told(data, 'the choice minus methods named')
        sure = {n for n, row in named.items() if float(row['p, incomplete']) < 0.05}
        assert all(named[n]['incomplete'][0] != '-' for n in sure)
        ahead[data] = sure
        (best,) = [x for n, x in told(data, 'the choice minus other').items() if 'on test' in n]
        assert float(best['p, incomplete']) > 0.05
    assert chosen['iemocap'] == {'mculora, LSTM by speaker'} and chosen['mosi'] == {'dicmor'}
    assert len(chosen['hazumi_online']) == 3
    assert all(n.startswith('mculora, ') for n in chosen['hazumi_online'])
    every = {'gcnet', 'mculora', 'mctn', 'momke'}
    assert ahead == {'iemocap': every, 'mosi': {'gcnet', 'mculora'}, 'hazumi_online': {'momke'}}


def test_claims_of_more_people():
    "Each method gains from more people, none measurably more than MCULoRA; of readers GCNet most."
    gain, more = (
        cells_of('hazumi_online', 'fig9_curves', f'Fig. 9, what {what}')
        for what in ('more people give', 'they give more')
    )
    p = 'p, incomplete'
    assert all(float(row[p]) < 0.05 and row['incomplete'][0] != '-' for row in gain.values())
    assert len(more) == 4 and all(float(row[p]) > 0.05 for row in more.values())
    mean = {k: float(row['incomplete'].split(' ± ')[0]) for k, row in gain.items()}
    del mean['logistic-per-condition']
    assert max(mean, key=mean.get) == 'gcnet'


def test_claims_with_a_common_error():
    "Heads by speaker: ahead of ten of fourteen by the pooled error, else of none; MCULoRA: never."
    title = 'Table 1, WA: {} minus each other that reads the dialogue'
    lead = cells_of('iemocap', 'table1_fixed', title.format('Transformer, heads by speaker'))
    own = cells_of('iemocap', 'table1_fixed', title.format('mculora'))
    not_ahead = {n for n, row in lead.items() if float(row['incomplete, p, pooled']) >= 0.05}
    assert len(lead) == len(own) == 14
    assert not_ahead == {'gcnet', 'mculora', 'mculora-plus', 'momke-per-condition'}
    for rows, column in ((lead, 'paired'), (own, 'paired'), (own, 'pooled')):
        assert all(float(row[f'incomplete, p, {column}']) >= 0.05 for row in rows.values())
    paired, shared = (own['momke'][f'incomplete, {c}'].split(' ± ') for c in ('paired', 'pooled'))
    assert float(shared[1]) < float(paired[1]) / 2 and paired[0] == shared[0]
    assert float(shared[0]) + float(shared[1]) < printed_gains()['ahead']


if __name__ == '__main__':
    for page in PAGES:
        old = page.read_text()
        new = BLOCK.sub(lambda m: m[1] + made(m[2]) + '\n' + m[4], old)
        if new != old:
            page.write_text(new)
            print(f'wrote {page.relative_to(ROOT)}')
