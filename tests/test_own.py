"""Data of one's own: any table is read or refused by name, real gaps are used as they are, nothing
changes where there are none."""

import hashlib
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from notebooks import papermill
from small import known

from mculora.use.artefact import from_run, load, save
from mculora.basics.dialogues import DataError, batch, fingerprint, keep, random_dialogues, split
from mculora.model.dpft import update_probabilities
from mculora.training.evaluation import evaluate, evaluate_random, predictions
from mculora.basics.masking import protocol_masks, random_mask, sample
from mculora.basics.method import create, methods
from mculora.basics.modalities import combination_index, labels, members, supports
from mculora.data.own import is_own, load_own, read_own
from mculora.data.tables import Columns, as_table, pool, read_mmsa, read_table
from mculora.experiments.results import addresses, config_hash, read_result
from mculora.experiments.runs import RunConfig, have, prepare, ready, run
from mculora.data.sources import describe, fit_scale, scale
from mculora.training.trainer import fit, plan_epoch

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(width=8, depth=1, rank=1, epochs=2, lr=1e-2, batch_size=4)
FOUR = {'text': 4, 'audio': 3, 'vision': 2, 'turns': 2}
TWO = {'text': 4, 'audio': 3}


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "Copies of tables go here, not to the user's cache."
    with patch.dict(os.environ, MCULORA_CACHE=str(tmp_path_factory.mktemp('cache'))):
        yield


def gappy(kinds, n=24, widths=None, n_classes=3, seed=0):
    "Dialogues of three utterances; `kinds` is what they have, one dialogue after the other."
    d = random_dialogues(
        [3] * n,
        widths or {'a': 3, 't': 4, 'v': 2},
        n_classes,
        parts=('train',) * 4 + ('val', 'test'),
        seed=seed,
    )
    has = torch.tensor(kinds, dtype=torch.bool)[
        torch.arange(3 * n) // 3 // 6 % len(kinds)
        if len(kinds) <= n // 6
        else torch.arange(3 * n) // 3 % len(kinds)
    ]
    return replace(
        d,
        present=has,
        features={m: x * has[:, k : k + 1] for k, (m, x) in enumerate(d.features.items())},
    )


# --- training draws what there is ---


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 4),
    st.sampled_from(['dialogue', 'batch', 'utterance']),
    st.floats(0.1, 0.7),
    st.integers(0, 99),
)
def test_what_is_drawn_can_be_had(M, per, missing, seed):
    """Of the dialogue, by one of its utterances; of the batch, by one of its dialogues; of an
    utterance that has anything, by itself."""
    d = random_dialogues(
        (3, 5, 2, 4, 1), {f'm{k}': 1 for k in range(M)}, missing=missing, seed=seed
    )
    stage = replace(create('mculora', d.task, d.widths, SMALL).stages()[0], sampling=per)
    for rows, mask, _ in plan_epoch(d, stage, torch.full((2**M - 1,), 1 / (2**M - 1)), seed):
        own = [supports(d.present[d.offset[k] : d.offset[k + 1]]) for k in rows]
        index = combination_index(mask)
        if per == 'utterance':
            assert all(o[torch.arange(len(o)), i[: len(o)]].all() for o, i in zip(own, index))
        elif per == 'dialogue':
            assert all(o[:, i].any() for o, i in zip(own, index))
        else:
            assert torch.cat(own)[:, index[0]].any() and (index == index[0]).all()


@pytest.mark.parametrize('per', ['dialogue', 'batch', 'utterance'])
def test_complete_data_draw_as_ever(per):
    d = random_dialogues((3, 5, 2, 4))
    q = torch.full((7,), 1 / 7)
    n = dict(dialogue=4, batch=1, utterance=20)[per]
    one, other = (torch.Generator().manual_seed(4) for _ in range(2))
    drawn = sample(q, (4, 5), per, one)
    assert torch.equal(drawn, sample(q, (4, 5), per, other, torch.ones(n, 7, dtype=torch.bool)))
    assert d.can is None


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 15), st.integers(0, 999))
def test_dpft_on_some_combinations_is_dpft_on_these_alone(N, seed):
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(N, generator=g) > 0.5
    on[seed % N] = True
    q, change = on / on.sum(), torch.randn(N, generator=g)
    new = update_probabilities(q, change)
    assert not new[~on].any() and abs(new.sum().item() - 1) < 1e-5
    torch.testing.assert_close(
        new[on], update_probabilities(torch.full((int(on.sum()),), 1 / int(on.sum())), change[on])
    )


@pytest.mark.parametrize(
    'kinds, never',
    [
        ([[1, 1, 0], [0, 1, 1]], ['av', 'atv']),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], ['at', 'av', 'tv', 'atv']),
        ([[0, 1, 1], [1, 1, 1]], []),
    ],
)
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(adapter_place='linear'),
        pytest.param(dict(sampling='utterance'), marks=pytest.mark.slow),
        pytest.param(dict(dpft='modality'), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_private_parts_of_what_never_occurs_stay_and_the_common_part_answers(kinds, never, options):
    d = gappy(kinds)
    torch.manual_seed(0)
    m = create('mculora', d.task, d.widths, SMALL | dict(epochs=1) | options)
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    fit(m, split(d), progress=False)
    names = labels('atv')
    assert (
        [c for c, ok in zip(names, m.occurs.tolist()) if not ok] == never
        and not m.q[~m.occurs].any()
        and (m.q[m.occurs] > 0).all()
    )
    for n, p in m.named_parameters():
        if n.startswith('adapters.private') or '.private.' in n:
            assert torch.equal(p[~m.occurs], before[n][~m.occurs]), n
    everything = batch(random_dialogues((3, 2), widths=d.widths), [0, 1])
    for c, row in zip(names, members(3)):
        o = m.parts(keep(everything, row))
        assert torch.equal(o['y_last'], o['y_com']) == (c in never)
        assert o['y_last'][everything.valid].isfinite().all()


@pytest.mark.parametrize('method', [m for m in methods() if m not in ('imder',)])
def test_every_method_trains_where_nobody_is_complete(method):
    d = gappy([[1, 1, 0], [0, 1, 1]])
    torch.manual_seed(0)
    m = create(method, d.task, d.widths, known(method, SMALL | dict(epochs=1)))
    history = fit(m, split(d), progress=False)
    y = predictions(m, split(d).test)
    assert y.isfinite().all() and all(
        np.isfinite(v) for r in history for k, v in r.items() if k.startswith('train/')
    )
    scores = evaluate(m, split(d).test)
    assert (
        all(
            np.isnan(scores[c]['WA']) == (n == 0)
            for c, n in zip(labels('atv'), split(d).test.can.sum(0).tolist())
        )
        and 0 <= scores['all']['WA'] <= 1
    )


def test_gaps_teach_what_they_can():
    """The label is in text for half of the dialogues and in audio for the other half, which never
    meet: each alone is learnt."""
    d = gappy([[1, 0], [0, 1]], n=60, widths={'a': 3, 't': 4}, n_classes=2)
    x = {
        m: (f + 3.0 * (2 * d.label[:, None] - 1)) * d.present[:, k : k + 1]
        for k, (m, f) in enumerate(d.features.items())
    }
    d = replace(d, features=x)
    torch.manual_seed(0)
    m = create('mculora', d.task, d.widths, dict(SMALL, epochs=8, width=16, dropout=0.1))
    fit(m, split(d), progress=False)
    s = evaluate(m, split(d).test)
    assert s['a']['WA'] > 0.9 and s['t']['WA'] > 0.9 and np.isnan(s['at']['WA'])
    both = keep(
        batch(
            replace(
                d,
                features={
                    k: f + 3.0 * (2 * d.label[:, None] - 1)
                    for k, f in random_dialogues([3] * 60, d.widths).features.items()
                },
                present=torch.ones_like(d.present),
            ),
            range(60),
        ),
        torch.tensor([True, True]),
    )
    # never seen together
    assert (m.predict(both).argmax(-1) == both.label)[both.valid].float().mean() > 0.9


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9), st.floats(0, 0.7), st.integers(2, 4), st.integers(0, 99))
def test_the_random_protocol_leaves_everybody_something(missing, rate, M, seed):
    d = random_dialogues([60], {f'm{k}': 1 for k in range(M)}, missing=missing, seed=seed)
    assert (random_mask(60, M, rate, seed, d.present) & d.present).any(-1).all()


def test_masks_are_of_the_gaps_they_were_drawn_for(tmp_path):
    d = gappy([[1, 1, 0], [0, 1, 1]])
    whole = random_dialogues([3] * 24, d.widths)
    for x in (d, whole):
        protocol_masks(x, tmp_path, 'test')
    assert len(list(tmp_path.iterdir())) == 16  # other gaps, other files
    scores = evaluate_random(
        create('majority', d.task, d.widths), d, protocol_masks(d, tmp_path, 'test')
    )
    assert all(0 <= v['WA'] <= 1 for v in scores.values())


# --- tables ---


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    missing=st.sampled_from([0.0, 0.5]),
    n_classes=st.sampled_from([0, 3]),
    shuffle=st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_a_table_is_read_back_in_any_order(lengths, missing, n_classes, shuffle, seed):
    d = random_dialogues(lengths, FOUR, n_classes, missing, parts=('train', 'test'), seed=seed)
    try:
        back, bad = read_table(
            as_table(d).sample(frac=1, random_state=shuffle), name='noise-simulated'
        )
    except DataError:
        assert not d.present.any(0).all()
        return  # a modality that nobody has
    if set(back.features) != set(FOUR):
        assert not d.present.any(0).all()
        return
    assert (
        not bad
        and back.ids == d.ids
        and back.utterances == d.utterances
        and torch.equal(back.present, d.present)
        and torch.equal(back.offset, d.offset)
    )
    for m in FOUR:
        assert torch.equal(back.features[m], d.features[m])
    if n_classes:
        assert [back.task.classes[y] for y in back.label] == [d.task.classes[y] for y in d.label]
    else:
        torch.testing.assert_close(back.label, d.label, rtol=0, atol=0)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.floats(), max_size=3),
    st.lists(st.lists(st.floats(), max_size=2), max_size=2),
    st.just('no/such.npy'),
    st.just([[1.0], [1.0, 2.0]]),
    st.just({}),
    st.just(b'x'),
)


@settings(max_examples=70, deadline=None)
@given(
    column=st.sampled_from(
        ['dialogue', 'position', 'utterance', 'speaker', 'label', 'split', 'text', 'audio']
    ),
    row=st.integers(0, 9),
    value=junk,
    rule=st.sampled_from(['entry', 'modality', 'refuse']),
)
def test_a_damaged_cell_is_read_or_named(column, row, value, rule):
    t = as_table(
        random_dialogues((3, 4, 3), {'text': 2, 'audio': 2}, parts=('train', 'train', 'test'))
    ).astype(object)
    t.at[row, column] = value
    try:
        d, bad = read_table(t, Columns(nonfinite=rule))
    except DataError as e:
        assert 'found' in str(e)
        return
    if bad:
        assert all('found' in p or 'no utterance' in p for p in bad)
    else:
        assert not any(x.isinf().any() for x in d.features.values()) and (
            rule == 'entry' or not any(x.isnan().any() for x in d.features.values())
        )
        assert all(x.isfinite().all() for x in scale(d, fit_scale(d)).features.values())


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(label='mood'), "no column 'mood' for label"),
        (dict(speaker='who'), "no column 'who' for speaker"),
        (dict(task='score'), 'expected numbers'),
        (
            dict(classes=('class 0', 'class 1')),
            "found 'class [23]', expected one of class 0, class 1",
        ),
    ],
)
def test_settings_that_do_not_fit_the_table(change, says):
    t = as_table(random_dialogues((9, 9, 9), FOUR, parts=('train', 'train', 'test')))
    with pytest.raises(DataError, match=says):
        _, bad = read_table(t, Columns(**change))
        if bad:
            raise DataError('; '.join(bad))


@pytest.mark.parametrize(
    'name, data',
    [
        ('x.parquet', b'no parquet'),
        ('x.csv', b''),
        ('x.csv', b'\xff\xfe\x00'),
        ('x.jsonl', b'{'),
        ('x.jsonl', b''),
        ('x.jsonl', b'[1]'),
        ('x.jsonl', b'\xff'),
        ('x.pkl', b''),
        ('x.pkl', pickle.dumps([1])),
        ('x.pkl', pickle.dumps({'train': {'id': []}})),
        ('mosi.csv', b'label,text\n1,a.npy\n'),
    ],
)
def test_a_file_that_is_no_table(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=re.escape(name)):
        read_own(tmp_path / name)


def test_a_file_of_an_utterance_is_named(tmp_path):
    t = pd.DataFrame(
        dict(
            dialogue=['a', 'a', 'b', 'b'],
            position=[0, 1, 0, 1],
            label=['x', 'y'] * 2,
            split=['train'] * 2 + ['test'] * 2,
            text=['t0.npy', 't1.npy', 't2.npy', None],
        )
    )
    for k in range(3):
        np.save(tmp_path / f't{k}.npy', np.arange(3.0) + k)
    (tmp_path / 't1.npy').write_bytes(b'')
    (tmp_path / 't2.npy').unlink()
    t.to_csv(tmp_path / 'own.csv', index=False)
    _, bad = read_own(tmp_path / 'own.csv')
    t.to_json(tmp_path / 'own.jsonl', orient='records', lines=True)
    assert (
        bad
        == read_own(tmp_path / 'own.jsonl')[1]
        == [
            (
                "column 'text', row 1 (dialogue 'a', position 1): t1.npy: found an empty file, "
                'expected a .npy array'
            ),
            (
                "column 'text', row 2 (dialogue 'b', position 0): t2.npy: found no such file, "
                'expected a .npy array'
            ),
        ]
    )


def test_words_in_brackets_are_no_vectors_and_broken_lists_are_named(tmp_path):
    rows = 'dialogue,label,said,text\na,x,[laughs] oh,"[1, 2]"\nb,y,no,"[3, 4"\n'
    (tmp_path / 'own.csv').write_text(rows)
    d, bad = read_own(tmp_path / 'own.csv')
    assert d.modalities == ('text',) and bad == [
        (
            "column 'text', row 1 (dialogue 'b'): found the text '[3, 4', expected numbers, a "
            'list of them as JSON, or the name of a .npy file'
        )
    ]
    # an array that was printed, in the first row
    (tmp_path / 'own.csv').write_text(rows.replace('[1, 2]', '[1. 2.]'))
    assert len(read_own(tmp_path / 'own.csv')[1]) > 1 and read_own(tmp_path / 'own.csv')[
        0
    ].modalities == ('text',)


def test_infinite_values_do_not_reach_the_scale():
    d = random_dialogues((6, 6, 6), {'text': 3}, parts=('train', 'train', 'test'))
    t = as_table(d)
    for i in (0, 1, 2):
        t.at[i, 'text'] = [np.inf, np.nan, 1.0][: i + 1] + t.text[i][i + 1 :]
    got, bad = read_table(t)
    assert (
        not bad
        and int(got.features['text'].isnan().sum()) == 5
        and not got.features['text'].isinf().any()
    )
    train = split(got).train
    mean, std = fit_scale(train)['text']
    for j in range(3):
        y = train.features['text'][:, j]
        y = y[~y.isnan()].double()
        assert abs(mean[j] - y.mean()) < 1e-12 and abs(std[j] - y.std(correction=0)) < 1e-12
    z = scale(train, fit_scale(train)).features['text']
    assert (z[train.features['text'].isnan()] == 0).all()


def talks(**more):  # three dialogues of two utterances, in three parts
    return pd.DataFrame(
        dict(
            dialogue=['a', 'a', 'b', 'b', 'c', 'c'],
            position=[0, 1] * 3,
            label=[-2.0, 0.5, 1.0, -0.1, 1.5, -1.0],
            split=['train'] * 4 + ['test'] * 2,
            text=[[float(k), 1.0] for k in range(6)],
        )
        | more
    )


def test_other_score_settings_are_another_run(tmp_path):
    talks().to_parquet(tmp_path / 'own.parquet')
    ways = [
        {},
        dict(middle=0.0),
        dict(low=-9.0, high=9.0),
        dict(low=-3.0, high=3.0, middle=0.0),
        dict(low=-3.0, high=3.0),
    ]
    jobs = [
        ready(
            RunConfig(
                dataset=str(tmp_path / 'own.parquet'),
                device='cpu',
                out_dir=str(tmp_path / 'runs'),
                method='majority',
                table=Columns(task='score', **w),
            )
        )
        for w in ways
    ]
    assert len({j.key for j in jobs}) == len({j.folder for j in jobs}) == len(ways)


@pytest.mark.parametrize('ends', [(-3.0, 3.0), (-2.5, 2.0)])
def test_what_the_labels_say_themselves_is_hashed_once(ends):
    """The hashes of releases, [-3, 3] about 0, and of tables whose range is as it comes are those
    without the range; no two ranges of one set of labels share one."""
    d = random_dialogues(n_classes=0)
    seen = {
        (low, high, m): fingerprint(
            replace(
                d,
                label=torch.linspace(*ends, 21),
                task=replace(d.task, low=low, high=high, middle=m),
            )
        )
        for low, high, m in [
            (*ends, None),
            (-3.0, 3.0, None),
            (-3.0, 3.0, 0.0),
            (-9.0, 9.0, 0.0),
            (*ends, 1.0),
        ]
    }
    h = hashlib.sha256(
        json.dumps([d.task.name, d.task.classes, d.modalities, d.ids, d.part]).encode()
    )
    for x in [*d.features.values(), d.present, d.speaker, torch.linspace(*ends, 21), d.offset]:
        h.update(x.numpy().tobytes())
    assert (
        len(set(seen.values())) == len(seen)
        and seen[(*ends, 0.0 if ends == (-3.0, 3.0) else None)] == h.hexdigest()[:16]
    )


@pytest.mark.parametrize(
    'parts', [['train', 'train', 'dev'], ['train', 'valid', 'more'], ['validation'] * 3]
)
def test_validation_is_never_the_test(parts):
    _, bad = read_table(talks(split=np.repeat(parts, 2)))
    assert "column 'split': found no test, expected train, val and test, or names of folds" in bad


def test_a_changed_file_of_a_vector_is_read_again(tmp_path):
    for k in range(6):
        np.save(tmp_path / f'{k}.npy', np.array([float(k), 1.0]))
    talks(text=[f'{k}.npy' for k in range(6)]).to_parquet(tmp_path / 'own.parquet')
    talks().to_parquet(tmp_path / 'lists.parquet')

    def one(name='own'):
        return load_own(tmp_path / f'{name}.parquet', cache_dir=tmp_path / 'cache')

    before = fingerprint(one())
    np.save(tmp_path / '0.npy', np.array([9.0, 1.0]))
    assert (
        fingerprint(one()) != before
        and one().features['text'][0, 0] == 9
        and not (tmp_path / 'cache').exists()
    )
    assert (
        fingerprint(one('lists')) == fingerprint(one('lists'))
        and len(list((tmp_path / 'cache').iterdir())) == 1
    )


def test_names_in_csv_are_as_they_are_written(tmp_path):
    t = talks(
        talk=['1', '1', '01', '01', '000', '000'],
        who=['NA', '07', '7', '7', '7', '7'],
        label=['None', 'happy', 'None', 'null', 'happy', 'None'],
    ).drop(columns='dialogue')
    t.assign(text=t.text.map(json.dumps), audio=['[1]', 'NA', 'nan', '', '[1]', '[2]']).to_csv(
        tmp_path / 'own.csv', index=False
    )
    d, bad = read_own(tmp_path / 'own.csv', Columns(dialogue='talk', speaker='who'))
    assert (
        not bad
        and d.ids == ('000', '01', '1')
        and d.task.classes == ('None', 'happy', 'null')
        and d.speaker.tolist() == [0, 0, 0, 0, 0, 1]
    )
    assert d.present[:, 1].tolist() == [True, True, False, False, True, False]
    # of numbers it is a hole
    (tmp_path / 'own.csv').write_text('label,text\n0.5,[1]\nNA,[2]\n,[3]\n1,[4]\n')
    d, bad = read_own(tmp_path / 'own.csv')
    assert not d.task.classes and [p for p in bad if 'no label' in p] == [
        f"column 'label', row {k}: found no label, expected one, or unlabelled=context"
        for k in (1, 2)
    ]


def test_utterances_far_into_a_dialogue_have_names_of_their_own():
    d, bad = read_table(talks(position=[1000000, 1000001, 0.5, 1e-7, 0, 1]))
    assert not bad and d.utterances == ('a_1000000', 'a_1000001', 'b_1e-07', 'b_0.5', 'c_0', 'c_1')


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_a_score_at_a_cut_is_not_above_it(dtype):
    d, bad = read_table(
        talks(label=np.array([0.1, 0.7, 0.3, 0.8, 0.05, 0.1], dtype)), Columns(cuts=(0.1, 0.7))
    )
    assert not bad and d.label.tolist() == [0, 1, 1, 2, 0, 0]


def test_frames_in_a_file_are_frames_in_a_cell(tmp_path):
    frames = np.array([[1.0, np.nan, np.inf], [3.0, 4.0, np.nan]])
    np.save(tmp_path / 'f.npy', frames)
    inside, named = (
        read_table(talks(text=[x] + [[1.0, 2.0, 3.0]] * 5), base=tmp_path)[0].features['text'][0]
        for x in (frames.tolist(), 'f.npy')
    )
    assert named.nan_to_num(9.0).tolist() == inside.nan_to_num(9.0).tolist() == [2.0, 4.0, 9.0]


@pytest.mark.parametrize('dtype', ['boolean', 'bool'])
def test_yes_and_no_are_classes(dtype):
    d, bad = read_table(talks(label=pd.Series([True, False] * 3, dtype=dtype)))
    assert not bad and d.task.classes == ('False', 'True') and d.label.tolist() == [1, 0] * 3


# --- utterances without a label ---


@settings(max_examples=12, deadline=None)
@given(st.sets(st.integers(0, 15), min_size=1, max_size=9), st.sampled_from([0, 3]))
def test_rows_without_a_label_are_named_or_context(rows, n_classes):
    whole = random_dialogues([4] * 6, FOUR, n_classes, parts=('train',) * 4 + ('val', 'test'))
    t = as_table(whole).astype(dict(label=object))
    t.loc[list(rows), 'label'] = None
    t = t.astype(dict(label=str if n_classes else float)).mask(t.isna())
    _, bad = read_table(t)
    assert len(bad) == len(rows) and 'no label, expected one, or unlabelled=context' in bad[0]
    d, bad = read_table(t, Columns(unlabelled='context', classes=whole.task.classes))
    assert not bad and (~d.labelled).nonzero()[:, 0].tolist() == sorted(rows)
    assert torch.equal(d.label[d.labelled], whole.label[d.labelled])
    assert all(torch.equal(x, whole.features[m]) for m, x in d.features.items())
    assert f'{len(rows)} utterance' in describe(d) and 'without, as context' in describe(d)
    same, _ = read_table(as_table(d), Columns(unlabelled='context', classes=d.task.classes))
    assert fingerprint(same) == fingerprint(replace(d, task=same.task)) != fingerprint(whole)
    # they are in one part or another, and neither train nor test anything
    s = split(d)
    assert have(s.train)['text'] + have(s.val)['text'] + have(s.test)['text'] == 24 - len(rows)


@pytest.mark.parametrize('n_classes', [0, 3])
def test_a_run_counts_its_context(tmp_path, n_classes):
    d = random_dialogues([4] * 12, TWO, n_classes, parts=('train',) * 4 + ('val', 'test'))
    t = as_table(d)
    t.loc[t.position == 1, 'label'] = None
    path = tmp_path / 'talks.parquet'

    def done(t, **table):
        t.to_parquet(path)
        at = dict(dataset=str(path), device='cpu', out_dir=str(tmp_path / 'runs'))
        return run(RunConfig(**at, options=SMALL, table=Columns(**table)), progress=False)[0]

    with pytest.raises(DataError, match=r'talks.parquet: .* or unlabelled=context'):
        done(t)
    r = done(t, unlabelled='context')
    assert r.data['context'] == dict(train=8, val=2, test=2)
    assert r.data['utterances'] == dict(train=32, val=8, test=8)
    assert set(r.data['conditions']['test'].values()) == {6}
    assert all(np.isfinite(x.value) for x in r.scores)
    t.loc[t.split == 'test', 'label'] = None
    with pytest.raises(DataError, match='test part of test: found no utterance with a label'):
        done(t, unlabelled='context')
    _, bad = read_table(t.assign(label=np.nan), Columns(unlabelled='context', task='score'))
    assert bad == ['label: found none of 48 utterances with one, expected some']


# --- the pickles of MMSA ---


def mmsa(seed=0, T=4):
    g = np.random.default_rng(seed)

    def part(n, videos):
        x = {
            m: g.normal(size=(n, T, w)).astype(np.float32)
            for m, w in (('text', 5), ('audio', 3), ('vision', 2))
        }
        length = g.integers(1, T + 1, n)
        for m in ('audio', 'vision'):
            x[m][np.arange(T) >= length[:, None]] = 0
        return {
            **x,
            'audio_lengths': length.tolist(),
            'vision_lengths': length,
            'raw_text': np.array(['so'] * n),
            'id': np.array([f'{videos}{k % 3}$_${k}' for k in range(n)]),
            'regression_labels': g.uniform(-3, 3, n).astype(np.float32),
            'classification_labels': g.integers(0, 3, n),
            'annotations': ['Negative'] * (n - 1) + ['Positive'],
        }

    # train and test share videos, as in CH-SIMS
    return {'train': part(12, 'a'), 'valid': part(5, 'b'), 'test': part(6, 'a')}


def test_pooling_by_hand():
    x = np.array(
        [
            [[1.0, 2.0], [0.0, 0.0], [3.0, 6.0], [9.0, 9.0]],
            [[0.0, 0.0]] * 4,
            [[1.0, np.inf], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]],
        ]
    )
    one, none, third = pool(x, [3, 4, 2])
    assert one.tolist() == [2.0, 4.0] and none is None and third.tolist() == [1.5, 4.0]


def test_videos_in_several_parts_are_dialogues_of_their_own(tmp_path):
    (tmp_path / 'sims.pkl').write_bytes(pickle.dumps(mmsa(), 4))
    d, bad = read_mmsa(tmp_path / 'sims.pkl')
    assert (
        not bad
        and len(d) == 9
        and {i.split()[0] for i in d.ids if 'train' in i} == {'a0', 'a1', 'a2'}
        and set(d.part) == {'train', 'val', 'test'}
    )
    # by number
    assert [u for u in d.utterances if u.startswith('a0_') and 'train' in u] == [
        'a0_0 train',
        'a0_3 train',
        'a0_6 train',
        'a0_9 train',
    ]


@settings(max_examples=200)
@given(
    part=st.sampled_from(['train', 'test']),
    field=st.sampled_from(['text', 'audio', 'vision_lengths', 'id', 'regression_labels']),
    value=st.sampled_from(
        [
            None,
            3,
            'x',
            [],
            np.zeros(2),
            np.zeros((12, 4)),
            np.zeros((12, 4, 5)),
            np.array(['a'] * 12),
            [1] * 12,
        ]
    ),
)
def test_a_damaged_field_is_read_or_named(tmp_path_factory, part, field, value):
    parts = mmsa()
    parts[part][field] = value
    file = tmp_path_factory.getbasetemp() / 'damaged.pkl'
    file.write_bytes(pickle.dumps(parts))
    try:
        read_mmsa(file)
    except DataError as e:
        assert 'damaged.pkl' in str(e) and 'found' in str(e)


# --- the harness ---


@pytest.mark.parametrize(
    'name, own',
    [
        ('iemocap', False),
        ('x.parquet', True),
        ('/a/b.csv', True),
        ('b.JSONL', True),
        ('unaligned_50.pkl', True),
        ('x.npy', False),
    ],
)
def test_what_a_file_of_ones_own_is(name, own):
    assert is_own(name) == own


def test_hashes_of_earlier_runs_stand(tmp_path):
    """What is hashed of a run on a release has the same names and values as in the committed
    results."""
    now = ready(RunConfig(size='tiny', device='cpu', out_dir=str(tmp_path), method='majority')).full
    then = read_result(
        next(p for p in addresses(ROOT / 'results' / 'mosi') if p.parent.name == 'mculora')
    )
    assert (
        set(now) == set(then.config)
        and now['dataset'] == 'iemocap'
        and then.config_hash == config_hash(then.config)
    )


def test_the_kind_of_a_file_changes_nothing(tmp_path):
    "Parquet and pickle, here and in another folder: the same data, the same run."
    d = random_dialogues([3] * 12, FOUR, parts=('train',) * 4 + ('val', 'test'), missing=0.2)
    hashes = set()
    for folder in ('one', 'two'):
        (tmp_path / folder).mkdir()
        as_table(d).to_parquet(tmp_path / folder / 'noise-simulated.parquet')
        hashes.add(
            ready(
                RunConfig(
                    dataset='noise-simulated.parquet',
                    data_root=str(tmp_path / folder),
                    device='cpu',
                    out_dir=str(tmp_path / 'runs'),
                    method='majority',
                )
            ).key
        )
    assert len(hashes) == 1


def test_a_model_of_a_table_is_exported_from_the_file_itself(tmp_path, monkeypatch):
    "Without the copy that training kept; and the model knows what the columns were called."
    d = random_dialogues([3] * 12, TWO, parts=('train',) * 4 + ('val', 'test'), missing=0.2)
    as_table(d).drop(columns=['utterance', 'speaker']).rename(columns=dict(label='joy')).to_parquet(
        tmp_path / 'noise-simulated.parquet'
    )
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'one'))
    at = dict(
        dataset=str(tmp_path / 'noise-simulated.parquet'),
        device='cpu',
        out_dir=str(tmp_path / 'runs'),
    )
    _, folder = run(RunConfig(**at, table=Columns(label='joy'), options=SMALL), progress=False)
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'two'))
    # where it was is known on this machine, and nowhere else
    assert from_run(folder).calibration.utterances
    assert str(tmp_path) not in (folder / 'result.json').read_text()
    (folder / 'where.json').write_text('{"dataset": [')
    with pytest.raises(
        DataError,
        match=(
            'found a run on your own file, noise-simulated, expected that file: name it '
            '.--dataset FILE., or .* .--no-temperatures.'
        ),
    ):
        from_run(folder)
    assert from_run(folder, calibrated=False).table == Columns(label='joy')
    # it lies where it lay, and its name is known
    assert from_run(folder, data_root=tmp_path).calibration.utterances
    a = load(save(from_run(folder, dataset=at['dataset']), tmp_path / 'model'))
    assert a.table == Columns(label='joy') and a.table.model_fields_set == {'label'}
    # who may read the folder may read all of it
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / 'model').iterdir()} == {0o666 & ~umask()}
    said = json.loads((tmp_path / 'model' / 'config.json').read_text())
    said['trained']['data']['table'] = dict(lable='joy')
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(said))
    with pytest.raises(DataError, match='config.json: found no description of columns'):
        load(tmp_path / 'model')


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_modality_that_training_lacks_is_refused(tmp_path):
    d = gappy([[1, 1, 1]])
    # vision in val and test only
    has = d.present & ~(
        (torch.arange(72) // 3 % 6 < 4)[:, None] & torch.tensor([False, False, True])
    )
    as_table(replace(d, present=has)).to_parquet(tmp_path / 'noise-simulated.parquet')
    with pytest.raises(
        DataError, match='train part of test: found no utterance with v, expected some'
    ):
        prepare(RunConfig(dataset=str(tmp_path / 'noise-simulated.parquet'), device='cpu'))


@pytest.mark.slow
def test_the_training_notebook_takes_a_table_with_gaps(tmp_path):
    d = gappy([[1, 1, 0, 1], [0, 1, 1, 0]], n=36, widths=FOUR, n_classes=0)
    as_table(replace(d, task=replace(d.task, middle=None))).rename(
        columns=dict(label='joy')
    ).to_parquet(tmp_path / 'noise-simulated.parquet')
    done = papermill(
        tmp_path / 'out.ipynb',
        dataset=str(tmp_path / 'noise-simulated.parquet'),
        out_dir=str(tmp_path / 'runs'),
        table=dict(label='joy'),
        options=SMALL | dict(batch_size=8),
        device='cpu',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    r = read_result(next((tmp_path / 'runs').rglob('result.json')))
    assert r.scores[0].metric == 'r' and {
        s.condition for s in r.scores if s.protocol == 'fixed'
    } == {k for k, n in r.data['conditions']['test'].items() if n} | {'incomplete', 'all'}
    text = (tmp_path / 'out.ipynb').read_text()
    assert (
        'utterances that have all of it' in text
        and len(list(next((tmp_path / 'runs').rglob('result.json')).parent.glob('*.png'))) == 6
    )
