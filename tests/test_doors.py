"""Files as people have them: what can be read has the right value, what cannot is named. Each kind
of fault by hand once, and by a property that makes more of its kind."""

import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from small import reported, small
from typer.testing import CliRunner

from mculora.basics.dialogues import DataError, fingerprint, folds, random_dialogues, split
from mculora.basics.method import create, methods
from mculora.basics.columns import file_name, is_own
from mculora.data.own import open_data, read_own, table_of
from mculora.data.sources import fit_scale, scale
from mculora.data.tables import Columns, as_table, matching, pool, read_mmsa, read_table
from mculora.data.traps import Seen, parts_of, unmeasured_entries
from mculora.experiments.runs import RunConfig, run
from mculora.model.encoders import ENCODERS
from mculora.training.evaluation import predictions
from mculora.training.trainer import fit
from mculora.use.artefact import from_run, load, save
from mculora.use.cli import app
from mculora.use.prediction import Predictor, read_input

ROOT = Path(__file__).resolve().parent.parent
FEW = settings(max_examples=8, deadline=None)
WIDE = {'audio': '*_sma*', 'video': 'AU*,pose_*', 'text': 'bert#*'}
NAMES = {
    'audio': ['rms_sma[0]_max', 'F0_sma_mean'],
    'video': ['AU01_r', 'pose_Rx', 'AU12_r'],
    'text': ['bert#0000', 'bert#0001'],
}


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    with patch.dict(os.environ, MCULORA_CACHE=str(tmp_path_factory.mktemp('cache'))):
        yield


def wide(n=4, seed=0, **more):
    "A table with a column for each number."
    g = np.random.default_rng(seed)
    columns = {x: g.normal(size=n) for names in NAMES.values() for x in names}
    return pd.DataFrame(columns | {'UI1': g.integers(1, 7, n), 'UI2': g.integers(1, 7, n)} | more)


def refused(call, *said):
    with pytest.raises(DataError) as e:
        call()
    assert str(e.value).isprintable() and not [x for x in said if x not in str(e.value)], e.value


# --- a column for each number ---


@FEW
@given(st.permutations([x for names in NAMES.values() for x in names]), st.integers(0, 99))
def test_a_modality_is_its_columns_in_the_order_of_the_file(order, seed):
    t = wide(seed=seed)
    t = t[['UI1', *order, 'UI2']].assign(note='x')
    d, bad = read_table(t, Columns(label='UI#', features=WIDE))
    assert not bad and d.modalities == tuple(WIDE) and d.task.high is not None
    for m, names in NAMES.items():
        own = [x for x in order if x in names]
        at = [int(i) for i in d.ids]
        assert np.allclose(d.features[m], t[own].to_numpy()[at].astype(np.float32))
        assert f'({len(own)} numbers: {own[0]} to {own[-1]}, names' in d.task.views[m]
    assert d.label.tolist() == ((t.UI1 + t.UI2) / 2).tolist()


def test_what_a_pattern_stands_for():
    names = ['f[0]', 'f[1]', 'f', 'f10', 'g#1', 'a,b', ' c']
    for said, found in {
        'f[1]': ['f[1]'],  # a name as it is written
        'f[[]*': ['f[0]', 'f[1]'],
        'f#': ['f10'],
        'g#*': ['g#1'],
        'f, g##': ['f', 'g#1'],
        'a,b': ['a,b'],
        '?10': ['f10'],
        'F': [],
    }.items():
        assert matching(names, said) == found, said


def test_a_mean_of_raters_is_a_score_and_gaps_in_it_do_not_count():
    t = wide(UI3=[1.0, np.nan, 3.0, np.nan])
    d, bad = read_table(t.assign(UI1=2, UI2=4), Columns(label='UI*', features=WIDE))
    assert not bad and not d.task.classes and np.allclose(d.label, [7 / 3, 3, 3, 3])
    cut, _ = read_table(t.assign(UI1=2, UI2=4), Columns(label='UI1,UI2', features=WIDE, cuts=(3,)))
    assert cut.task.classes == ('up to 3', 'above 3')
    refused(
        lambda: read_table(t.assign(UI1=list('abcd')), Columns(label='UI*', features=WIDE)),
        "label: found 'a' in column 'UI1', row 0",
    )


@pytest.mark.parametrize(
    'features, said',
    [
        ({'audio': '*smaa*'}, "features 'audio': found no column '*smaa*'; the table has rms_sma"),
        ({'video': 'AU*,pos_*'}, "features 'video': found no column 'pos_*'"),
        ({'audio': '*_sma*', 'all': '*_*'}, "columns of '*_*', expected it in features 'audio'"),
        ({'audio': '*'}, "found 'UI1' among the 11 columns of '*', expected it in the label alone"),
        ({'audio': '*_sma*,note'}, "found 'so' in column 'note', row 2, and 0 more"),
        ({'audio': 'man*'}, "found '0,5' in column 'many', row 0, and 3 more"),
        ({'audio': 'whe*'}, "found Timestamp('2020-01-01 00:00:00') in column 'when'"),
        ({}, 'a column for each number? Say which: --table \'{"features"'),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_columns_there_are(features, said):
    note = ['1', None, 'so', '2']
    t = wide(note=note, many=['0,5'] * 4, when=pd.Timestamp('2020'))
    t = t[[*t.columns[:9], 'note', 'many'] + ['when'] * ('whe*' in features.values())]
    refused(lambda: read_table(t, Columns(label='UI1,UI2'), features or None), said)


@FEW
@given(
    st.sampled_from(NAMES['audio']), st.integers(0, 3), st.sampled_from(['x', '1 2', '--', '1,5'])
)
def test_a_word_among_numbers_is_named_with_its_column_and_row(column, row, word):
    t = wide().astype({column: object})
    t.loc[row, column] = word
    c = Columns(label='UI1,UI2', features=WIDE)
    refused(lambda: read_table(t, c), f'found {word!r} in column {column!r}, row {row}')


def test_a_row_without_numbers_lacks_the_modality():
    t = wide()
    t.loc[1, NAMES['video']] = np.nan
    t.loc[2, 'AU01_r'] = np.inf
    d, bad = read_table(t, Columns(label='UI1,UI2', features=WIDE))
    assert not bad and d.present[:, 1].tolist() == [True, False, True, True]
    assert d.features['video'][2].isnan().tolist() == [True, False, False]


# --- folders and several files ---


@FEW
@given(
    lengths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    names=st.permutations(['a b', 'ü', 'x.y', '10']),
    kind=st.sampled_from(['csv', 'parquet', 'jsonl']),
)
def test_a_folder_of_dialogues_is_one_table(tmp_path_factory, lengths, names, kind):
    folder = tmp_path_factory.mktemp('my talks')
    rows = []
    for k, (n, name) in enumerate(zip(lengths, names)):
        t = wide(n, seed=k)
        path = folder / f'{name}.{kind}'
        if kind == 'csv':
            t.to_csv(path, index=False)
        elif kind == 'parquet':
            t.to_parquet(path)
        else:
            t.to_json(path, orient='records', lines=True, double_precision=15)
        rows.append(t.assign(dialogue=name, position=range(n)))
    (folder / 'readme.txt').write_text('no table')
    c = Columns(label='UI1,UI2', features=WIDE)
    d, bad = read_own(folder, c)
    whole, _ = read_table(pd.concat(rows), c, name=folder.name)
    assert (
        not bad and d.ids == tuple(sorted(names[: len(lengths)])) and d.task.name[:8] == 'my_talks'
    )
    assert torch.equal(d.label, whole.label) and d.part == whole.part
    for m in WIDE:
        torch.testing.assert_close(d.features[m], whole.features[m])
    assert fingerprint(open_data(f'{folder}/', columns=c)) == fingerprint(d)


def test_what_is_wrong_in_a_folder_is_named_with_its_file(tmp_path):
    folder = tmp_path / 'talks'
    folder.mkdir()
    c = Columns(label='UI1,UI2', features=WIDE)
    refused(lambda: read_own(folder, c), 'talks: found no files, expected tables')
    wide().to_csv(folder / 'a.csv', index=False)
    wide().rename(columns=dict(AU01_r='AU1_r')).to_csv(folder / 'b.csv', index=False)
    refused(
        lambda: read_own(folder, c),
        "b.csv: found no column 'AU01_r' and 1 more differences, expected the columns of a.csv",
    )
    wide(0).to_csv(folder / 'b.csv', index=False)
    refused(lambda: read_own(folder, c), 'b.csv: found no rows')
    (folder / 'b.csv').unlink()
    wide().to_csv(tmp_path / 'c.csv', index=False)
    (folder / 'c.csv').symlink_to(tmp_path / 'c.csv')
    refused(lambda: read_own(folder, c), 'c.csv, a link that leads out')


@FEW
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.permutations(range(3)))
def test_files_of_frames_are_utterances_joined_with_their_labels(tmp_path_factory, frames, order):
    top = tmp_path_factory.mktemp('join')
    (top / 'face').mkdir()
    (top / 'wav').mkdir()
    names, g = ['d1_0', 'd1_1', 'd 2_0'], np.random.default_rng(0)
    x = [g.normal(size=(n, 2)) for n in frames]
    x[0][0, 1] = np.nan
    for u, frame in zip(names, x):
        t = pd.DataFrame(frame, columns=['AU01', 'AU02']).assign(file='v.mp4', frame=1)
        t.to_csv(top / 'face' / f'{u}.csv', index=False)
        np.save(top / 'wav' / f'{u}.npy', frame[:, :1].astype(np.float16))
    labels = pd.DataFrame(dict(utterance=names, label=list('xyx'), frame=7)).iloc[list(order)]
    labels.to_csv(top / 'labels.csv', index=False)
    c = Columns(
        join=('face', 'wav/'),
        files='utterances',
        names='{dialogue}_{position}',
        features={'face': 'AU#', 'voice': 'wav'},
    )
    d, bad = read_own(top / 'labels.csv', c)
    at = [names.index(u) for u in d.utterances]
    assert not bad and d.ids == ('d 2', 'd1') and d.utterances == ('d 2_0', 'd1_0', 'd1_1')
    assert [d.task.classes[y] for y in d.label] == ['xyx'[i] for i in at]
    for i, row in zip(at, d.features['face']):
        some = pool(x[i][None])[0]
        assert np.allclose(row, some, equal_nan=True)
    voice = [x[i][:, 0].astype(np.float16).mean(dtype=np.float64) for i in at]
    assert np.allclose(d.features['voice'][:, 0], voice, atol=1e-6)
    frame = table_of(top / 'labels.csv', c).frame
    assert set(frame['frame']) == {7} and set(frame['face.frame']) == {1.0}


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    rows = [dict(utterance=f'u{k}', label='ab'[k % 2], text=[1.0 * k]) for k in range(4)]
    pd.DataFrame(rows).to_parquet(tmp_path / 'own.parquet')
    other = pd.DataFrame(dict(utterance=['u1', 'u1'], x=[1.0, 2.0]))

    def read(t, **said):
        t.to_csv(tmp_path / 'more.csv', index=False)
        c = Columns(join=('more.csv',), features={'text': 'text', 'x': 'x'}, **said)
        return read_own(tmp_path / 'own.parquet', c)

    refused(lambda: read(other), "more.csv: found 'u1' several times")
    refused(lambda: read(other.assign(utterance=['v', 'w'])), "names such as 'v'", "as 'u0'")
    refused(lambda: read(other.drop(columns='utterance')), "no column 'utterance' among x")
    with pytest.warns(UserWarning, match="1 of 2 rows are left out, such as 'w'"):
        d, bad = read(other.assign(utterance=['u2', 'w']))
    assert not bad and d.present[:, 1].tolist() == [False, False, True, False]
    one = other.iloc[:1]
    refused(lambda: read(one, names='{dialogue}-{position}'), "names: found 4 such as 'u0'")
    refused(lambda: read(one, names='{who}'), "names: found {who} in '{who}', expected one of dial")
    d, _ = read(one, names='{dialogue}{position}')
    assert d.ids == ('u',) and len(d.utterances) == 4


# --- text ---

TEXTS = st.sampled_from(['Zoë', 'Übel', 'ñandú'])


@FEW
@given(
    words=st.lists(TEXTS, min_size=4, max_size=4),
    encoding=st.sampled_from(['latin-1', 'cp1252', 'utf-16']),
    separator=st.sampled_from([';', '\t', '|']),
    decimal=st.sampled_from(['.', ',']),
)
def test_encodings_and_separators_are_settings_and_named(
    tmp_path_factory, words, encoding, separator, decimal
):
    path = tmp_path_factory.getbasetemp() / 'text.csv'
    t = wide(speaker=words, label=['x', 'y'] * 2)
    t.to_csv(path, index=False, encoding=encoding, sep=separator, decimal=decimal)
    said = dict(features=WIDE, encoding=encoding, separator=separator, decimal=decimal)
    d, bad = read_own(path, Columns(**said))
    plain, _ = read_table(t, Columns(features=WIDE), name='text')
    assert not bad and fingerprint(d) == fingerprint(plain)
    setting = f'--table \'{{"separator": "{separator}"}}\''.replace('\t', '\\t')
    refused(lambda: read_own(path, Columns(**said | dict(separator=','))), setting)
    utf = Columns(**said | dict(encoding='utf-8'))
    refused(lambda: read_own(path, utf), 'bytes that are not utf-8', '--table \'{"encoding"')
    if decimal == ',':
        refused(lambda: read_own(path, Columns(**said | dict(decimal='.'))), '{"decimal": ","}')


def test_settings_of_text_are_checked(tmp_path):
    for said in (dict(encoding='utf-88'), dict(separator=''), dict(decimal='..')):
        with pytest.raises(ValueError, match=next(iter(said))):
            Columns(**said)
    # OpenFace writes a space before every name; a row that is longer than the first is no table
    (tmp_path / 'x.csv').write_text('label, AU1, AU2\nx, 1, 2\ny, 3, 4\n')
    d, bad = read_own(tmp_path / 'x.csv', Columns(features={'v': 'AU*'}))
    assert not bad and d.features['v'].tolist() == [[1, 2], [3, 4]]
    (tmp_path / 'x.csv').write_text('label,AU1,AU2\nx,1,2,9\ny,3,4,9\n')
    refused(lambda: read_own(tmp_path / 'x.csv'), 'x.csv: found no readable table (ParserWarning')


# --- MMSA ---


def mmsa(lengths, seed=0):
    g, parts = np.random.default_rng(seed), {}
    for part in ('train', 'valid', 'test'):
        n = len(lengths)
        parts[part] = dict(
            id=[f'v{k}$_$0' for k in range(n)],
            regression_labels=g.normal(size=n).clip(-3, 3),
            text=g.normal(size=(n, 4, 2)).astype(np.float16),
            audio=[g.normal(size=(T, 3)) for T in lengths],
            audio_lengths=[7] * n,
        )
    return parts


def written(folder, parts):
    (folder / 'ragged.pkl').write_bytes(pickle.dumps(parts))
    return folder / 'ragged.pkl'


@FEW
@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), st.booleans(), st.integers(0, 9))
def test_frames_of_several_lengths_are_pooled_one_by_one(tmp_path_factory, lengths, array, seed):
    lengths[0] = 3
    parts = mmsa(lengths, seed)
    if array:  # as NumPy keeps them
        ragged = np.empty(len(lengths), object)
        ragged[:] = parts['test']['audio']
        parts['test']['audio'] = ragged
    d, bad = read_mmsa(written(tmp_path_factory.getbasetemp(), parts))
    assert not bad
    for k in range(len(d)):
        part = {'val': 'valid'}.get(d.part[k], d.part[k])
        x = parts[part]['audio'][int(d.ids[k][1])]
        assert d.present[k, 1] == (len(x) > 0)
        assert not len(x) or np.allclose(d.features['audio'][k], x.mean(0), atol=1e-6)


@FEW
@given(
    st.sampled_from(['train', 'valid', 'test']),
    st.integers(0, 2),
    st.sampled_from(['x', 3.0, [[1, 2], [3]], np.zeros((2, 2, 2)), np.array(['a'])]),
)
def test_what_cannot_be_pooled_is_named_by_part_field_and_utterance(tmp_path_factory, part, k, x):
    parts = mmsa([2, 3, 4])
    parts[part]['audio'][k] = x
    path = written(tmp_path_factory.getbasetemp(), parts)
    refused(lambda: read_mmsa(path), f"ragged.pkl, part {part!r}, audio, utterance 'v{k}$_$0': fo")
    parts[part]['audio'] = [np.zeros((2, 3))]
    path = written(tmp_path_factory.getbasetemp(), parts)
    refused(lambda: read_mmsa(path), f'part {part!r}, audio: found 1 arrays, expected 3, one per')


def test_token_ids_are_no_vectors(tmp_path):
    parts = mmsa([2, 3])
    for p in parts.values():
        p['text_bert'] = np.ones((2, 3, 5), np.float32)
    assert read_mmsa(written(tmp_path, parts))[0].modalities == ('text', 'audio')
    for p in parts.values():
        del p['text']
    with pytest.warns(UserWarning, match=r'token ids alone .text_bert.*last_hidden_state'):
        assert read_mmsa(written(tmp_path, parts))[0].modalities == ('audio',)
    refused(
        lambda: read_mmsa(tmp_path / 'ragged.pkl', features={'text': 'text_bert'}),
        'token ids alone',
    )


# --- MERBench, npz, HDF5 ---


def merbench(top, n=3, widths=(4, 6), parts=('train', 'val', 'test'), **more):
    "Labels and features as MERBench keeps them; frames in the first folder, vectors in the second."
    labels, g = {}, np.random.default_rng(0)
    for part in parts:
        own = {f'{part}_dia{k}_utt{j}': dict(emo=j, val=-10) for k in (0, 1) for j in range(n)}
        labels[f'{part}_corpus'] = np.array({u: said | more for u, said in own.items()})
        for name, shape in {'hubert-UTT': (3, widths[0]), 'roberta-UTT': widths[1:]}.items():
            (top / 'features' / name).mkdir(parents=True, exist_ok=True)
            for u in own:
                np.save(top / 'features' / name / f'{u}.npy', g.normal(size=shape).astype('f4'))
    np.savez(top / 'label.npz', **labels)
    return top


def test_the_layout_of_merbench(tmp_path):
    top = merbench(tmp_path)
    for path in (top, top / 'label.npz'):
        d, bad = read_own(path)
        assert not bad and d.task.classes == ('0', '1', '2') and d.modalities == ('a', 't')
        assert sorted(set(d.part)) == ['test', 'train', 'val'] and d.lengths.tolist() == [3] * 6
        assert d.ids[0] == 'test_dia0' and d.label.tolist() == [0, 1, 2] * 6
        frames = np.load(top / 'features' / 'hubert-UTT' / 'test_dia0_utt1.npy')
        assert np.allclose(d.features['a'][1], frames.mean(0), atol=1e-6) and d.widths['t'] == 6
    assert read_own(top, features={'sound': 'hubert-UTT'})[0].modalities == ('sound',)
    (top / 'features' / 'hubert-UTT' / 'test_dia0_utt1.npy').unlink()
    _, bad = read_own(top)
    assert len(bad) == 1 and 'features/hubert-UTT/test_dia0_utt1.npy: found no such file' in bad[0]


def test_scores_of_merbench_where_emotions_say_nothing(tmp_path):
    top = merbench(tmp_path, emo=0)
    tree = {
        part: {
            f'{part}{k}': dict(emo=0, val=v)
            for k, v in enumerate([0.5, -10, 1.0] if part == 'test_corpus' else [1.5, -2.0, 0.0])
        }
        for part in ('train_corpus', 'test_corpus')
    }
    for folder in ('hubert-UTT', 'roberta-UTT'):
        for u in (u for p in tree.values() for u in p):
            np.save(top / 'features' / folder / f'{u}.npy', np.ones(2))
    np.savez(top / 'label.npz', **{k: np.array(p) for k, p in tree.items()})
    d, bad = read_own(top)
    assert not d.task.classes and d.task.high == 1.5 and len(d) == 6  # no dialogue in the names
    assert [p for p in bad if 'no label' in p] and len(bad) == 1


@FEW
@given(st.integers(2, 3), st.integers(1, 3))
def test_several_test_parts_are_folds_that_train_on_the_same(tmp_path_factory, tests, fold):
    "MER2023 has test1, test2 and test3; none of them is trained on, or held out for validation."
    fold = min(fold, tests)
    names = [f'test{k}' for k in range(1, tests + 1)]
    top = merbench(tmp_path_factory.mktemp('mer'), parts=('train', *names))
    d, bad = read_own(top)
    assert not bad and folds(d) == names
    s = split(d, fold)
    assert s.name == names[fold - 1] and set(s.test.part) == {s.name}
    assert len(s.test) == 2 and {*s.train.part, *s.val.part} == {'train'}
    assert sorted(s.train.ids + s.val.ids) == ['train_dia0', 'train_dia1']
    said = CliRunner().invoke(app, ['data', 'check', str(top)])
    assert f'{tests} folds by split, tested on {", ".join(names)}' in said.output
    (_, part) = parts_of(d)[fold - 1]
    assert (part['train'].sum(), part['test'].sum(), part['val'].sum()) == (6, 6, 0)


def test_the_record_says_which_test_part(tmp_path):
    top = merbench(tmp_path / 'mer', parts=('train', 'test1', 'test2'))
    said = dict(dataset='mer/', data_root=str(tmp_path), out_dir=str(tmp_path / 'runs'))
    r, folder = run(RunConfig(**said, method='majority', fold=2, device='cpu'), progress=False)
    assert r.data['fold'] == 'test2' and folder.name.startswith('test2-') and top.is_dir()
    assert r.data['dialogues'] == dict(train=1, val=1, test=2)
    # a part that is spelt otherwise, and one that does not belong
    t = pd.DataFrame(dict(label=list('xyxyxy'), text=[[1.0 * k] for k in range(6)]))
    t['split'] = ['train', 'train', 'Test-1', 'Test-1', 'test_2', 'test_2']
    d, bad = read_table(t)
    assert not bad and folds(d) == ['test1', 'test2']
    _, bad = read_table(t.assign(split=['train', 'train', 'test1', 'test1', 'rest', 'rest']))
    assert bad == [
        "column 'split': found rest beside test1, expected train, val and test, or names of folds"
    ]
    _, bad = read_table(t.assign(split=['val', 'val', 'test1', 'test1', 'test2', 'test2']))
    assert len(bad) == 1 and 'found no train' in bad[0]
    # folds may have such names, too
    assert folds(read_table(t.assign(split=[f'test{k}' for k in range(6)]))[0])[0] == 'test0'


def trees(seed=0):
    "The same dialogues as columns, and as parts of columns."
    d = random_dialogues(
        (3, 2, 4), {'text': 4, 'audio': 2}, parts=('train', 'val', 'test'), seed=seed
    )
    t = as_table(d)
    names = ('dialogue', 'utterance', 'label', 'split')
    flat = {k: t[k].to_numpy(str) for k in names} | {'position': t.position.to_numpy()}
    flat |= {m: np.stack(t[m]) for m in d.modalities}
    parts = {
        part: {k: x[flat['split'] == part] for k, x in flat.items() if k != 'split'}
        for part in ('train', 'val', 'test')
    }
    return d, flat, parts


def into_hdf5(h5py, path, tree):
    with h5py.File(path, 'w') as f:

        def put(at, said):
            for k, x in said.items():
                if isinstance(x, dict):
                    put(at.create_group(k), x)
                elif x.dtype.kind == 'U':
                    at.create_dataset(k, data=x.astype(object), dtype=h5py.string_dtype())
                else:
                    at.create_dataset(k, data=x, compression='gzip')

        put(f, tree)


@pytest.mark.parametrize('kind', ['npz', 'h5', 'pkl'])
def test_arrays_with_names_are_columns(tmp_path, kind):
    d, flat, parts = trees()
    for tree in (flat, parts):
        path = tmp_path / f'own.{kind}'
        if kind == 'npz':
            inside = {f'{p}/{k}': x for p, own in parts.items() for k, x in own.items()}
            np.savez_compressed(path, **(flat if tree is flat else inside))
        elif kind == 'pkl':
            path.write_bytes(pickle.dumps(tree))
        else:
            into_hdf5(pytest.importorskip('h5py'), path, tree)
        back, bad = read_own(path)
        assert not bad and (back.ids, back.part, back.utterances) == (d.ids, d.part, d.utterances)
        for m in d.modalities:
            assert torch.equal(back.features[m], d.features[m])


@pytest.mark.parametrize('kind', ['npz', 'h5'])
def test_a_layout_that_cannot_be_told_comes_with_the_lines_that_convert_it(
    tmp_path, kind, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, x = tmp_path / f'words.{kind}', np.random.default_rng(0).normal(size=(4, 5, 3))
    if kind == 'npz':
        np.savez(path, d1=x)
    else:
        into_hdf5(pytest.importorskip('h5py'), path, dict(d1=x))
    with pytest.raises(DataError, match=r'found d1 \(4, 5, 3\), expected arrays with an') as e:
        read_own(path)
    lines = re.search(r'import .*', str(e.value))[0].replace('label=...', 'label="ab"[j % 2]')
    exec(lines, {})
    d, bad = read_own(tmp_path / 'words.parquet')
    assert not bad and np.allclose(d.features['words'], x.mean(1), atol=1e-6)


class Evil:
    def __reduce__(self):
        return os.system, ('touch harm',)


def test_no_archive_runs_code_or_unpacks_without_bounds(tmp_path):
    x = np.empty(1, object)
    x[0] = Evil()
    np.savez(tmp_path / 'evil.npz', label=x)
    refused(lambda: read_own(tmp_path / 'evil.npz'), 'evil.npz: names', 'system')
    with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w') as z:  # claims more than it holds
        head = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        z.writestr(
            'label.npy', b'\x93NUMPY\x01\x00' + bytes([len(head) + 1, 0]) + head.encode() + b'\n'
        )
    refused(
        lambda: read_own(tmp_path / 'bomb.npz'), 'bomb.npz: array: found 0 of 8000000000000 byt'
    )
    np.savez(tmp_path / 'kinds.npz', label=np.zeros(3, 'c8'))
    refused(lambda: read_own(tmp_path / 'kinds.npz'), 'values of type complex64, expected numbers')


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory, at, byte, cut):
    path = tmp_path_factory.getbasetemp() / 'sound.npz'
    if not path.exists():
        np.savez_compressed(path, **trees()[1])
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = byte
    bad = path.with_name('bad.npz')
    bad.write_bytes(raw[: at % len(raw)] if cut else raw)
    try:
        read_own(bad)
    except DataError as e:
        assert 'bad.npz' in str(e)


def test_of_hdf5_only_numbers_and_texts_of_the_file_itself_are_read(tmp_path):
    h5py = pytest.importorskip('h5py')
    into_hdf5(h5py, tmp_path / 'other.h5', dict(label=np.zeros(3)))

    def reference(f):
        f.create_dataset('x', (1,), dtype=h5py.ref_dtype)

    def lists(f):
        f.create_dataset('x', (1,), dtype=h5py.vlen_dtype(np.int32))

    def record(f):
        f['x'] = np.zeros(2, [('a', 'f8'), ('b', 'i4')])

    def outside(f):
        f['x'] = h5py.ExternalLink('other.h5', '/label')

    def soft(f):
        f['x'] = h5py.SoftLink('/label')

    def loop(f):
        f.create_group('a')['b'] = f['/']

    def virtual(f):
        layout = h5py.VirtualLayout((3,), 'f8')
        layout[:] = h5py.VirtualSource(str(tmp_path / 'other.h5'), 'label', (3,))
        f.create_virtual_dataset('x', layout)

    def external(f):
        f.create_dataset('x', (3,), 'f8', external=[(str(tmp_path / 'raw'), 0, 24)])

    def claim(f):
        f.create_dataset('x', (10**12,), 'f8', chunks=(10**6,))

    for put, said in {
        reference: 'values of type object, expected numbers or texts',
        lists: 'values of type object, expected numbers or texts',
        record: 'expected numbers or texts',
        outside: "'x': found a link to elsewhere",
        soft: "'x': found a link to elsewhere",
        loop: 'a group that is elsewhere too',
        virtual: 'its values elsewhere',
        external: 'its values elsewhere',
        claim: 'found 8000000000000 bytes, expected no more than the file can hold',
    }.items():
        with h5py.File(tmp_path / 'x.h5', 'w') as f:
            put(f)
        refused(lambda: read_own(tmp_path / 'x.h5'), 'x.h5: ', said)
    (tmp_path / 'x.h5').write_bytes(b'no HDF5')
    refused(lambda: read_own(tmp_path / 'x.h5'), 'x.h5: found no readable file (OSError')


def test_hdf5_without_h5py_says_what_to_install(tmp_path):
    (tmp_path / 'x.h5').write_bytes(b'')
    with patch.dict('sys.modules', h5py=None):
        refused(
            lambda: read_own(tmp_path / 'x.h5'),
            'h5py: found no such module, expected the optional packages for hdf',
        )


# --- numbers of half precision, and thirty speakers ---


@FEW
@given(
    st.integers(0, 5), st.sampled_from([np.inf, -np.inf, np.nan]), st.sampled_from(['npy', 'cell'])
)
def test_half_precision_with_an_infinity_is_read_by_the_rule(tmp_path_factory, row, odd, kind):
    top = tmp_path_factory.mktemp('half')
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float16) * 1e4
    x[row, 1] = odd
    for k in range(6):
        np.save(top / f'{k}.npy', x[k])
    cells = [f'{k}.npy' for k in range(6)] if kind == 'npy' else list(x)
    t = pd.DataFrame(dict(dialogue=list('abcdef'), label=list('xyxyxy'), text=cells))
    t['split'] = ['train'] * 4 + ['val', 'test']
    d, bad = read_table(t, base=top)
    assert not bad and d.features['text'][row].isnan().tolist() == [False, True]
    kept = np.where(np.isfinite(x), x, np.nan).astype(np.float32)
    assert np.allclose(d.features['text'], kept, equal_nan=True)
    assert scale(d, fit_scale(split(d).train)).features['text'].isfinite().all()
    _, bad = read_table(t, Columns(nonfinite='refuse'), base=top)
    assert len(bad) == 1 and 'found NaN or infinity in 1 of 2 entries' in bad[0]
    (named,) = unmeasured_entries(Seen(d, t))
    found = 'text: 1 entry in 1 column NaN or infinite, such as in '
    assert named.said == f'{found}{d.utterances[row]!r}'


def crowd(n, parts=('train', 'train', 'val', 'test')):
    "Dialogues of n people each, who speak twice."
    d = random_dialogues([2 * n] * len(parts), {'a': 3, 't': 2}, 2, parts=parts)
    who = [f'p{k % n:02}' for _ in parts for k in range(2 * n)]
    return as_table(d).assign(speaker=who)


def hears(method):  # its ways to read who speaks
    of = methods()[method].Settings.model_fields
    if method in ('gcnet', 'mculora-plus'):  # by default
        return [{}]
    hearing = {k: len(e.kinds) for k, e in ENCODERS.items() if e.hears and 'encoder' in of}
    encoders = [{'encoder': k, 'depth': kinds} for k, kinds in hearing.items()]
    return encoders + [{'speakers': True}] * ('speakers' in of)


RARE = pytest.mark.slow
WAYS = [(m, x) for m in methods() if m != 'imder' for x in hears(m) or [{}]]
QUICK = ('mculora', 'mculora-plus', 'gcnet')


@pytest.mark.parametrize(
    'method, options',
    [pytest.param(m, x, marks=[] if m in QUICK else [RARE]) for m, x in WAYS],
    ids=str,
)
def test_thirty_speakers_train_and_a_thirty_first_is_predicted(method, options):
    d, bad = read_table(crowd(30))
    assert not bad and d.speaker.max() == 29
    torch.manual_seed(0)
    m = create(method, d.task, d.widths, small(method, epochs=1) | options)
    fit(m, split(d), progress=False)
    more, bad = read_table(crowd(31, ('test',)), task=d.task, widths=d.widths)
    assert not bad and more.speaker.max() == 30
    assert predictions(m, more).isfinite().all()


# --- from a folder to a prediction ---


def commands():
    "The four lines of the README for a folder of wide files."
    blocks = re.findall(r'```sh\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    (block,) = [b for b in blocks if 'mculora data check talks/' in b]
    assert len(block.splitlines()) == 4
    return block


def own_folder(top):
    "Twenty dialogues to train on, and two to predict, which nobody has labelled."
    for name, n in {'talks': 20, 'new_talks': 2}.items():
        (top / name).mkdir()
        for k in range(n):
            t = wide(6, seed=k).drop(columns=['UI1', 'UI2'] * (name == 'new_talks'))
            t.drop(columns=NAMES['text']).to_csv(top / name / f'M{k:03}.csv', index=False)


def scores_told(top):
    t = pd.read_csv(top / 'scores.csv')
    assert t.dialogue.tolist() == ['M000'] * 6 + ['M001'] * 6 and t.score.between(1, 6).all()
    assert set(t.combination) == {'audio+video'}


def test_the_four_commands_of_the_readme_with_a_fast_method(tmp_path, monkeypatch):
    own_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = commands().replace('runs/talks/mculora/', 'runs/talks/logistic/').splitlines()
    lines[1] += ' --method logistic --device cpu'
    for line in lines:
        words = [
            sorted(map(str, tmp_path.glob(w)))[0] if '*' in w[-3:] else w for w in shlex.split(line)
        ]
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    scores_told(tmp_path)


@pytest.mark.slow
def test_the_four_commands_of_the_readme(tmp_path):
    own_folder(tmp_path)
    own = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    script = f'set -e\nmculora() {{ {sys.executable} -W error::UserWarning -m mculora "$@"; }}\n'
    done = subprocess.run(
        ['bash', '-c', script + commands()],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert '0 problems, 0 warnings' in done.stdout and 'Warning' not in done.stderr
    scores_told(tmp_path)


def test_from_a_folder_of_wide_files_to_a_prediction(tmp_path):
    for name, n in {'my talks': 6, 'new talks': 2}.items():
        (tmp_path / name).mkdir()
        for k in range(n):
            t = wide(5, seed=k).drop(columns=['UI1', 'UI2'] * (name == 'new talks'))
            t.to_csv(tmp_path / name / f'M{k:03}.csv', index=False)
    c = Columns(label='UI1,UI2', features=WIDE)
    options = small('logistic')
    said = RunConfig(
        dataset='my talks/',
        data_root=str(tmp_path),
        out_dir=str(tmp_path / 'runs'),
        device='cpu',
        method='logistic',
        options=options,
        table=c,
    )
    r, folder = run(said, progress=False)
    assert r.data['file'] == 'my talks/' and r.data['name'] == 'my_talks'
    assert '(2 numbers: rms_sma[0]_max to F0_sma_mean, names' in r.data['views']['audio']
    # it lies where it lay, and its name is known
    a = load(save(from_run(folder, data_root=tmp_path), tmp_path / 'model'))
    assert a.table == c
    d, where = read_input(a, tmp_path / 'new talks')
    told = Predictor(a).predict(d)
    assert len(told) == 10 and all(p.combination == 'audio+video+text' for p in told)
    assert [w['dialogue'] for w in where] == ['M000'] * 5 + ['M001'] * 5
    # a file alone is a dialogue, as in training
    one, _ = read_input(a, tmp_path / 'new talks' / 'M001.csv')
    assert one.ids == ('M001',)
    t = pd.read_csv(tmp_path / 'new talks' / 'M001.csv')
    t.drop(columns=NAMES['video']).to_csv(tmp_path / 'x.csv', index=False)
    assert Predictor(a).predict(read_input(a, tmp_path / 'x.csv')[0])[0].combination == 'audio+text'
    # other columns, or the same ones in another order, are not taken for those of training
    t[list(t.columns[::-1])].to_csv(tmp_path / 'x.csv', index=False)
    refused(
        lambda: read_input(a, tmp_path / 'x.csv'), 'expected those of training in the same order'
    )


def test_check_takes_a_folder(tmp_path):
    (tmp_path / 'talks').mkdir()
    for k in range(3):
        wide(start=range(4)).to_csv(tmp_path / 'talks' / f'{k}.csv', index=False)
    table = Columns(label='UI1,UI2', features=WIDE).model_dump_json(exclude_defaults=True)
    said = CliRunner().invoke(app, ['data', 'check', str(tmp_path / 'talks'), '--table', table])
    assert said.exit_code == 0 and 'talks: 3 dialogues, 12 utterances' in said.output
    assert 'unused columns: start' in said.output
    said = CliRunner().invoke(app, ['data', 'check', str(tmp_path / 'talks')])
    assert said.exit_code == 1 and "found no column 'label'" in said.output
    assert is_own('talks/') and not is_own('talks') and file_name('/a/talks/') == 'talks/'
    assert file_name(Path('/a/b.csv')) == 'b.csv'


@pytest.mark.filterwarnings('default')
def test_commands_speak_to_people(tmp_path):
    "The name of a setting leads; a warning is a sentence, without the line of code it comes from."

    def said(*args):
        return CliRunner().invoke(app, [*map(str, args)])

    r = said('data', 'check', tmp_path / 'nowhere')
    assert r.exit_code == 2
    assert r.stderr.startswith(f'{tmp_path}/nowhere: found no such file or folder, expected one of')
    r = said('train', '--dataset', 'iemocp')
    assert r.exit_code == 2
    assert r.stderr.startswith("Error: dataset: found 'iemocp', expected 'iemocap' or ")
    r = said('train', '--size', 'tiny', '--device', 'mps')
    assert r.exit_code == 2 and 'one of cpu' in r.stderr
    assert r.stderr.endswith('; Apple GPUs lack float64, which metrics and fits need\n')
    parts = mmsa([2, 3])
    for p in parts.values():
        p['text_bert'] = p.pop('text')
    path, at = written(tmp_path, parts), ('--out-dir', tmp_path / 'runs', '--device', 'cpu')
    r = said('train', '--dataset', path, '--method', 'majority', *at)
    assert r.exit_code == 0 and 'Warn' not in r.stderr.replace('Warning: ', '')
    assert f'\nWarning: {path}: text is there as token ids alone' in f'\n{r.stderr}'


# --- the inputs that were reported, where they are at hand ---


def test_the_reported_files_are_read_or_named(tmp_path):
    d, bad = read_own(reported('38_mmsa_ragged_list.pkl'))
    assert not bad and len(d.utterances) == 24 and d.present.all() and d.widths['audio'] == 3
    with pytest.warns(UserWarning, match='token ids alone'):
        d, _ = read_own(reported('39_mmsa_text_bert_only.pkl'))
    assert d.modalities == ('audio', 'vision')
    d, bad = read_own(reported('merbench'))
    assert not bad and d.widths == {'a': 4, 't': 6} and d.lengths.tolist() == [3] * 6
    folder = tmp_path / 'talks'
    folder.mkdir()
    for k in range(4):
        (folder / f'M{k}.csv').write_bytes(reported(f'wide_M00{k}.csv').read_bytes())
    d, bad = read_own(folder, Columns(label='UI#', features=WIDE))
    assert not bad and d.widths == {'audio': 4, 'video': 3, 'text': 5} and len(d) == 4
    assert d.label[:6].tolist() == [5, 4, 4.5, 6, 7, 3.5]
    pytest.importorskip('h5py')
    refused(lambda: read_own(reported('words.h5')), 'found d1 (4, 5, 3)', 'these three lines')
