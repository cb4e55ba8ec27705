"""Whatever is there is predicted; whatever cannot be is refused, by name and with an exit code,
also in a fresh process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from typer.testing import CliRunner
from small import known

from mculora.use.artefact import Artefact, save
from mculora.training.calibration import Calibration, ece, fit_temperature, nll, reliability
from mculora.use.cli import app
from mculora.basics.dialogues import DataError, random_dialogues, select
from mculora.basics.method import create, methods
from mculora.basics.modalities import labels
from mculora.model.mculora import MCULoRA
from mculora.data.tables import Columns, as_table, read_table
from mculora.use.prediction import Predictor, as_rows, read_input
from mculora.data.sources import example, fit_scale, read_layout, scale, write_layout

WIDTHS = {'a': 4, 't': 6, 'v': 5}
SMALL = dict(width=16, depth=1, rank=2, epochs=1, lr=1e-2, batch_size=4, C=0.01)
D = random_dialogues((5, 3, 7, 4), WIDTHS, parts=('train', 'train', 'train', 'test'))


def artefact(method='mculora', d=D):
    torch.manual_seed(0)
    m, stats = (
        create(method, d.task, d.widths, known(method, SMALL)),
        fit_scale(d),
    )
    m.prepare(scale(d, stats))
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * 0.1) for p in m.parameters()]
    return Artefact(
        m.eval().requires_grad_(False),
        stats,
        Calibration({c: 1 + 0.2 * k for k, c in enumerate(labels(d.modalities))}),
    )


A = artefact()
ASK = Predictor(A)


def numbers(p):
    return torch.tensor([*p.probability.values()])


def utterances(d, k):
    return [
        {m: x[i].numpy() for m, x in d.features.items()}
        for i in range(int(d.offset[k]), int(d.offset[k + 1]))
    ]


@pytest.mark.parametrize('method', sorted(methods()))
def test_what_is_said_of_a_dialogue_does_not_depend_on_others_and_a_stream_is_the_prefix(method):
    ask = Predictor(artefact(method))
    together = ask.predict(D)
    for k in (0, 3):
        alone, at = (
            ask(utterances(D, k), D.speaker[D.offset[k] : D.offset[k + 1]].tolist()),
            int(D.offset[k]),
        )
        for j, p in enumerate(alone):
            torch.testing.assert_close(numbers(p), numbers(together[at + j]), rtol=0, atol=1e-4)
    s, said = ask.stream(), utterances(D, 1)
    live = [s.add(u) for u in said]
    for n, p in enumerate(live):
        torch.testing.assert_close(numbers(p), numbers(ask(said[: n + 1])[n]), rtol=0, atol=1e-5)
    assert (live[0].private is not None) == issubclass(methods()[method], MCULoRA)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    has=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_subset_of_modalities_per_utterance(has, seed):
    g = np.random.default_rng(seed)
    dialogue = [
        {m: g.normal(size=w) if h else None for (m, w), h in zip(WIDTHS.items(), row)}
        for row in has
    ]
    for row, p in zip(has, ASK(dialogue), strict=True):
        names = ''.join(m for m, h in zip(WIDTHS, row) if h)
        assert p.combination == names
        if not names:
            assert p.label is None and p.private is None and not p.probability
            continue
        assert (
            abs(sum(p.probability.values()) - 1) < 1e-5
            and p.probability[p.label] == max(p.probability.values())
            and 0 < p.private < 1
        )


def test_hundreds_of_dialogues_are_those_of_one_at_a_time():
    d = replace(random_dialogues((3, 2, 6) * 60, WIDTHS, missing=0.3), task=D.task)
    together = ASK.predict(d)
    for k in range(0, 180, 37):
        for one, other in zip(ASK.predict(select(d, [k])), together[int(d.offset[k]) :]):
            torch.testing.assert_close(numbers(one), numbers(other), rtol=0, atol=1e-5)


# --- bad tables ---

GOOD = [dict(dialogue='x', position=j, a=[0.1] * 4, t=[0.2] * 6, v=None) for j in range(3)]


def without(*names):
    return [{k: v for k, v in r.items() if k not in names} for r in GOOD]


def table(change):
    rows = [dict(r) for r in GOOD]
    return change(rows) or rows


BAD = {
    'unknown modality': (
        lambda r: r[0].update(smell=[1.0, 2.0]),
        "found vectors in the column 'smell', expected none but a, t, v",
    ),
    'wrong width': (
        lambda r: r[1].update(a=[1.0] * 3),
        "column 'a', row 1 (dialogue 'x', position 1): found width 3, expected 4",
    ),
    'wrong width everywhere': (
        lambda r: [x | dict(a=[1.0] * 3) for x in r],
        (
            "column 'a', row 0 (dialogue 'x', position 0): found width 3, expected 4; column "
            "'a', row 1"
        ),
    ),
    'NaN': (
        lambda r: r[2].update(t=[float('nan')] * 6),
        "column 't', row 2 (dialogue 'x', position 2): found NaN or infinity in 6 of 6 entries",
    ),
    'infinity': (lambda r: r[2].update(t=[1e39] + [0.0] * 5), 'found NaN or infinity in 1 of 6'),
    'a tensor too deep': (
        lambda r: r[0].update(a=[[[1.0] * 4]]),
        (
            "column 'a', row 0 (dialogue 'x', position 0): found shape (1, 1, 4), expected "
            '(width,) or (frames, width)'
        ),
    ),
    'text': (
        lambda r: r[0].update(a='hello'),
        "column 'a', row 0 (dialogue 'x', position 0): found the text 'hello'",
    ),
    'an object': (
        lambda r: r[0].update(a={'x': 1}),
        "column 'a', row 0 (dialogue 'x', position 0): found {'x': 1}, expected a list of numbers",
    ),
    'ragged': (
        lambda r: r[0].update(a=[[1.0], [1.0, 2.0]]),
        "column 'a', row 0 (dialogue 'x', position 0): found [[1.0], [1.0, 2.0]]",
    ),
    'no such file': (
        lambda r: r[0].update(a='none.npy'),
        "column 'a', row 0 (dialogue 'x', position 0): none.npy: found no such file",
    ),
    'many': (lambda r: [x | dict(a=[1.0], t='so') for x in r], '; and 3 more'),
    'no modality': (
        lambda r: without('a', 't', 'v'),
        'found no column of a modality, expected one or more of a, t, v',
    ),
    'nothing there': (
        lambda r: [x | dict(a=None, t=None) for x in r],
        'found no value in a, t, v, expected at least one modality',
    ),
    'no rows': (lambda r: r.clear() or [], 'found no rows'),
    'position twice': (
        lambda r: r[1].update(position=0),
        (
            "row 1 (dialogue 'x', position 0): found the same dialogue and position as row 0, "
            'expected different ones'
        ),
    ),
    'position in words': (
        lambda r: r[1].update(position='first'),
        "column 'position', row 1: found 'first', expected a number",
    ),
    'no dialogue': (
        lambda r: r[1].update(dialogue=None),
        "column 'dialogue', row 1: found nothing",
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_tables_are_refused_with_the_place(tmp_path, name):
    change, message = BAD[name]
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps(r) for r in table(change)))
    with pytest.raises(DataError) as e:
        read_input(A, tmp_path / 'in.jsonl', Columns(nonfinite='refuse'))
    assert (
        str(e.value).startswith('in.jsonl: ')
        and message in str(e.value)
        and str(e.value).count(';') < 4
    )


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('in.jsonl', b'{"dialogue": ', 'found no readable table'),
        ('in.parquet', b'PAR1', 'found no readable table'),
        ('in.csv', b'', 'found no readable table'),
        ('in.xlsx', b'x', "found a file with the ending '.xlsx'"),
        ('in.jsonl', b'[1, 2]', 'in.jsonl'),
        (
            'in.csv',
            b'dialogue,a\nx,"[1, 2"\n',
            "column 'a', row 0 (dialogue 'x'): found the text '[1, 2'",
        ),
        ('in.jsonl', b'{"a": [1]}\n3', 'a line with 3, expected an object'),
        ('in.csv', b'dialogue,a,t\nx,,"[1, 2"\ny,"[1, 2, 3, 4]",\n', "column 't', row 0"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        read_input(A, tmp_path / name)
    assert message in str(e.value) and name in str(e.value)


def test_columns_that_are_not_vectors_are_left_alone_and_rows_come_in_order(tmp_path):
    f = pd.DataFrame(
        [
            r | dict(text=f'words {j}', label='sad', split='test', speaker=s)
            for j, (r, s) in enumerate(zip(GOOD, 'MFM'))
        ]
    )
    f.iloc[[2, 0, 1]].to_parquet(tmp_path / 'in.parquet')
    d, where = read_input(A, tmp_path / 'in.parquet')
    assert (
        [w['position'] for w in where] == [0, 1, 2]
        and d.speaker.tolist() == [0, 1, 0]
        and d.present.tolist() == [[True, True, False]] * 3
    )


def test_entries_that_were_not_measured_take_the_mean(tmp_path):
    rows = table(lambda r: r[0].update(a=[float('nan'), 1.0, 2.0, float('inf')]))
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps(r) for r in rows))
    d, _ = read_input(A, tmp_path / 'in.jsonl')
    ready = scale(d, A.scale)
    assert (
        ready.features['a'][0, [0, 3]].abs().max() == 0
        and ready.features['a'][0, [1, 2]].abs().min() > 0.1
    )
    # without a scale: 0 as it is
    for ask in (ASK, Predictor(replace(A, scale={}))):
        mean = [float(m) for m in ask.a.scale['a'][0]] if ask.a.scale else [0.0] * 4
        filled = [
            dict(a=[mean[0], 1.0, 2.0, mean[3]], t=[0.2] * 6),
            *({k: r[k] for k in 'at'} for r in GOOD[1:]),
        ]
        for one, other in zip(ask.predict(d), ask(filled), strict=True):
            torch.testing.assert_close(numbers(one), numbers(other), rtol=0, atol=1e-5)
    d, _ = read_input(A, tmp_path / 'in.jsonl', Columns(nonfinite='modality'))
    assert d.present.int().tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 0]]


def test_without_a_dialogue_column_every_row_is_one(tmp_path):
    (tmp_path / 'in.jsonl').write_text(
        '\n'.join(json.dumps(r) for r in without('dialogue', 'position'))
    )
    d, where = read_input(A, tmp_path / 'in.jsonl')
    assert len(d) == 3 and where == [dict(dialogue=str(k), position=0) for k in range(3)]
    for one, r in zip(ASK.predict(d), GOOD):
        torch.testing.assert_close(
            numbers(one), numbers(ASK([{k: r[k] for k in 'at'}])[0]), rtol=0, atol=1e-5
        )


def test_dialogues_come_as_they_appear_with_the_positions_of_the_table(tmp_path):
    pd.DataFrame(
        [
            GOOD[0] | dict(dialogue=k, position=p)
            for k, p in (('z', 7), ('b', 2.5), ('z', 3), ('a', 1), ('b', -1))
        ]
    ).to_parquet(tmp_path / 'in.parquet')
    d, where = read_input(A, tmp_path / 'in.parquet')
    assert [(w['dialogue'], w['position']) for w in where] == [
        ('z', 3),
        ('z', 7),
        ('b', -1),
        ('b', 2.5),
        ('a', 1),
    ] and d.ids == ('z', 'b', 'a')
    assert json.loads(json.dumps(where)) == where


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'jsonl'])
def test_the_table_of_training_is_one_to_ask_about(tmp_path, kind):
    """As it is: its own names, labels, parts, gaps, holes and frames; and the answers are those
    for the dialogues that training saw."""
    d = replace(
        random_dialogues(
            (5, 3, 7, 4), WIDTHS, missing=0.3, parts=('train', 'train', 'val', 'test')
        ),
        task=D.task,
    )
    t = (
        as_table(d)
        .rename(columns=dict(dialogue='talk', label='mood', a='sound'))
        .drop(columns='speaker')
    )
    i = t.index[t.t.notna()][0]
    t.at[i, 't'] = [[float('nan'), *t.t[i][1:]], [float('inf'), *t.t[i][1:]]]
    path, columns, features = (
        tmp_path / f'noise-simulated.{kind}',
        Columns(dialogue='talk', label='mood'),
        dict(a='sound', t='t', v='v'),
    )
    if kind == 'parquet':
        t.map(
            lambda x: (
                [[float(v) for v in r] for r in x]
                if isinstance(x, list) and isinstance(x[0], list)
                else x
            )
        ).assign(
            t=[None if x is None else x if isinstance(x[0], list) else [x] for x in t.t]
        ).to_parquet(path)
    if kind == 'csv':
        t.map(lambda x: json.dumps(x) if isinstance(x, list) else x).to_csv(path, index=False)
    if kind == 'jsonl':
        path.write_text('\n'.join(map(json.dumps, t.to_dict('records'))))
    trained, bad = read_table(path, columns, features)
    asked, where = read_input(
        replace(A, trained=dict(data=dict(table=columns.model_dump(mode='json')))),
        path,
        features=features,
    )
    assert (
        not bad
        and trained.features['t'].isnan().sum() == 1
        and asked.ids == trained.ids
        and torch.equal(asked.present, trained.present)
        and [w['dialogue'] for w in where] == [u.rpartition('_')[0] for u in d.utterances]
    )
    for m in WIDTHS:
        assert torch.equal(asked.features[m].nan_to_num(9.0), trained.features[m].nan_to_num(9.0))
    for one, other in zip(ASK.predict(asked), ASK.predict(trained), strict=True):
        assert one.combination == other.combination and torch.equal(numbers(one), numbers(other))


def test_other_feature_folders_than_those_of_training_are_named(tmp_path):
    d = example('iemocap', widths=WIDTHS)
    write_layout(tmp_path, d, {'a': 'wav2vec-UTT', 't': 'deberta-UTT', 'v': 'manet_UTT'})
    views = read_layout(tmp_path / 'IEMOCAP', 'iemocap')[0].task.views

    def trained(**other):
        m = create('majority', replace(d.task, views=views | other), WIDTHS)
        return replace(A, method=m, scale={})

    same = read_input(trained(), tmp_path)[0]
    with pytest.raises(DataError) as e:
        read_input(trained(t='roberta'), tmp_path)
    assert f"found {views['t']!r} for t, expected 'roberta' as in training" in str(
        e.value
    ) and 'for a' not in str(e.value)
    # who names it, means it
    named = read_input(trained(t='roberta'), tmp_path, features={'t': 'deberta-UTT'})[0]
    assert named.modalities == ('t',) and torch.equal(named.features['t'], same.features['t'])
    with pytest.raises(DataError, match="features 't': found no folder 'bert'"):
        read_input(trained(), tmp_path, features={'t': 'bert'})


@pytest.mark.parametrize('who', ['F', 1.5, None, -1, 2**40])
def test_speakers_are_numbers(who):
    with pytest.raises(DataError, match='speakers: found .*, expected whole numbers from 0'):
        ASK(utterances(D, 1), [0, who, 1])
    assert ASK(utterances(D, 1), [0, np.int64(1), torch.tensor(1)]) == ASK(
        utterances(D, 1), [0, 1, 1]
    )


# --- a fresh process, as anyone would call it ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A model and a table, in the working folder."
    save(A, tmp_path / 'model')
    (tmp_path / 'in.jsonl').write_text('\n'.join(json.dumps(r) for r in GOOD))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_in_a_fresh_process(folder):
    done = subprocess.run(
        [Path(sys.executable).parent / 'mculora', 'predict', 'model', 'in.jsonl'],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    want = as_rows(
        A,
        [dict(dialogue='x', position=j) for j in range(3)],
        ASK([{k: r[k] for k in 'atv'} for r in GOOD]),
    )
    for line, row in zip(done.stdout.splitlines(), want, strict=True):
        got = json.loads(line)
        assert (
            got.keys() == row.keys()
            and got['label'] == row['label']
            and got['model'] == 'mculora trained on noise-simulated'
        )
        assert all(abs(got[k] - row[k]) < 1e-5 for k in row if k.startswith('p_') or k == 'private')


def test_the_command_refuses_in_one_line(folder):
    (folder / 'bad.jsonl').write_text(json.dumps(GOOD[0] | dict(a=[1.0])))
    done = CliRunner().invoke(app, ['predict', 'model', 'bad.jsonl', '--output', 'out.csv'])
    assert (
        done.exit_code == 2
        and not done.stdout
        and done.stderr.startswith("Error: bad.jsonl: column 'a', row 0")
        and done.stderr.count('\n') == 1
        and not (folder / 'out.csv').exists()
    )
    (folder / 'model' / 'config.json').write_text('{}')
    done = CliRunner().invoke(app, ['predict', 'model', 'in.jsonl'])
    assert (
        done.exit_code == 2
        and 'config.json: version' in done.stderr
        and done.stderr.startswith('Error: ')
    )


# --- calibration ---


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), c=st.integers(2, 6), bins=st.integers(1, 20), seed=st.integers(0, 999))
def test_ece_is_the_slow_sum(n, c, bins, seed):
    g = torch.Generator().manual_seed(seed)
    p, y = (
        (torch.randn(n, c, generator=g, dtype=torch.double) * 3).softmax(-1),
        torch.randint(c, (n,), generator=g),
    )
    total = 0.0
    for b in range(bins):
        own = [i for i in range(n) if b / bins < p[i].max().item() <= (b + 1) / bins]
        if own:
            total += (
                abs(
                    sum(p[i].max().item() for i in own)
                    - sum(p[i].argmax().item() == y[i].item() for i in own)
                )
                / n
            )
    assert abs(ece(p, y, bins) - total) < 1e-9 and reliability(p, y, bins)[0].sum() == n


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    c=st.integers(2, 6),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_no_temperature_is_better_than_the_fitted_one(n, c, size, seed):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(n, c, generator=g) * size, torch.randint(c, (n,), generator=g)
    T = fit_temperature(z, y)
    assert 0.049 < T < 20.1
    for other in torch.logspace(-1.3, 1.3, 40).tolist():
        assert nll(z, y, T) <= nll(z, y, min(max(other, 0.05), 20.0)) + 1e-4
