"""Traps in data: each input of the reports that they come from is named, more of its kind is named
with the right numbers, and sound data are not."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.neighbors import KNeighborsClassifier
from small import reported
from typer.testing import CliRunner

from mculora.basics.dialogues import DataError, folds, random_dialogues, split
from mculora.data.sources import fit_scale, scale
from mculora.data.tables import Columns, read_mmsa, read_table
from mculora.data.traps import Seen, examine, findings, shared_people
from mculora.experiments.runs import never_trained, people_in
from mculora.use import cli

few = settings(max_examples=4, deadline=None)
seeds = st.integers(0, 10**6)


def sound(seed, K=30, L=4, people=10, n_classes=3, parts=('train', 'train', 'val', 'test')):
    """A table without a fault: dialogues of one person each, whose parts keep people apart, a
    label that features tell a little, and nothing else."""
    g = np.random.default_rng(seed)
    rows = []
    for k in range(K):
        who = k % people
        for j in range(L):
            y = int(g.integers(n_classes)) if n_classes else float(g.normal())
            x = {m: (g.normal(size=4) + 0.3 * y).tolist() for m in ('text', 'audio')}
            label = 'abcdefgh'[y] if n_classes else y
            rows.append(dict(dialogue=f'd{k:03}', position=j, speaker=f's{who}', label=label) | x)
            if parts:
                rows[-1]['split'] = parts[who % len(parts)]
    return pd.DataFrame(rows)


def named(table, columns=Columns(), features=None):
    "What is named of a table, notes apart."
    d, bad = read_table(table, columns, features)
    assert not bad, bad
    found = findings(Seen(d, table.reset_index(drop=True), columns, features))
    return {f.trap: f for f in found if f.severity != 'note'}


# --- the inputs that were reported ---


def seen(name, **columns):
    "What is read of a reported file, and what is named of it, notes apart."
    d, found = examine(reported(name), name, Columns(**columns))
    return d, [f for f in found if f.severity != 'note']


@pytest.mark.parametrize(
    'name, trap, count, says',
    [
        ('07_class_only_in_test.parquet', 'lacking classes', 3, "class 'neutral', fold test"),
        ('09_same_speaker_all_splits.parquet', 'shared people', 1, '1 of 1 speaker is in'),
        ('16_label_in_features.parquet', 'telling entries', 1, 'v: 1 of 2 entries'),
        ('21_integer_scores.parquet', 'integer scores', 5, 'read as 5 classes'),
        ('39_mmsa_text_bert_only.pkl', 'reading', 1, 'token ids alone'),
        ('class_names_nearly_equal.parquet', 'alike classes', 3, "'NEG', 'neg', 'neg '"),
        ('modality_as_text.parquet', 'vectors as text', 72, "column 'audio': 72 texts look like"),
        ('modality_as_text.parquet', 'unused columns', 1, 'unused columns: audio'),
        ('one_outlier.parquet', 'far entries', 5, 'such as -1e+30'),
        ('position_gives_label.parquet', 'telling position', 72, 'alone gives 100%'),
    ],
)
def test_a_reported_trap_is_named(name, trap, count, says):
    _, found = seen(name)
    (f,) = [f for f in found if f.trap == trap and says in str(f)]
    assert f.count == count and f.severity == 'warning' and bool(f.do) == (trap != 'reading')


@pytest.mark.parametrize(
    'name, people',
    [('08_speaker_in_two_dialogues.parquet', 4), ('trait_of_speakers.parquet', 30)],
)
def test_reported_people_who_recur_are_kept_apart(name, people):
    d, found = seen(name)
    assert not found and d.by == 'speaker' and len(set(d.who)) == people
    for k in range(len(folds(d))):
        s = split(d, k + 1)
        assert not {*s.train.who} & {*s.test.who, *s.val.who}
    mixed, found = seen(name, group='dialogue')
    assert mixed.by == 'dialogue' and [f.trap for f in found] == ['shared people']


def test_a_nearest_neighbour_knows_the_person_until_people_are_kept_apart():
    "A trait of the speaker: every fold scores 100 % by dialogue, and all of them 34 to 50 % apart."
    for group, low, high in (('dialogue', 1, 1), (None, 0.34, 0.5)):
        d, _ = seen('trait_of_speakers.parquet', group=group)
        found = []
        for s in (split(d, k + 1) for k in range(len(folds(d)))):
            parts = [scale(part, fit_scale(s.train)) for part in (s.train, s.test)]
            x, z = (torch.cat([*part.features.values()], 1) for part in parts)
            found.append(KNeighborsClassifier(1).fit(x, s.train.label).score(z, s.test.label))
        assert len(found) == 5 and low <= np.mean(found) <= high


def test_a_class_that_only_test_has_is_in_the_record():
    d, _ = seen('07_class_only_in_test.parquet')
    assert never_trained(split(d)) == {'neutral': 3}
    d, _ = seen('09_same_speaker_all_splits.parquet')
    assert people_in(split(d))['seen'] == dict(val=1, test=1)


def test_hazumi_has_folds_by_speaker():
    "Real dialogues: 96 people, 29 of them in two; no fold has one of them in two parts."
    path = reported('hazumi_online.parquet', 'tables')
    f = pd.read_parquet(path, columns=['dialogue', 'position', 'speaker', 'label', 'split'])
    f['v'] = [[0.0, 1.0]] * len(f)
    d, bad = read_table(f, Columns(task='score', group='speaker'))
    assert not bad and len(d) == 125 and len(set(d.who)) == len(set(d.group)) == 96
    assert folds(d) == [f'fold{k}' for k in range(1, 6)]
    for k in range(5):
        s = split(d, k + 1)
        assert not {*s.train.who} & {*s.test.who, *s.val.who}
        assert 0.15 < len(s.test.label) / len(f) < 0.25
    # as its authors split it, nobody is in two parts either
    d = read_table(f, Columns(task='score'))[0]
    assert d.by == 'split' and not [*shared_people(Seen(d))]


# --- more of each kind ---


@few
@given(seeds, st.sampled_from([0, 2, 3]), st.booleans())
def test_nothing_is_named_of_sound_data(seed, n_classes, given_split):
    parts = ('train', 'train', 'val', 'test') if given_split else None
    assert not named(sound(seed, n_classes=n_classes, parts=parts))


@few
@given(seeds, st.sampled_from([0, 3]))
def test_nothing_is_named_of_context(seed, n_classes):
    t = sound(seed, n_classes=n_classes)
    t.loc[np.random.default_rng(seed).random(len(t)) < 0.3, 'label'] = None
    assert not named(t, Columns(unlabelled='context'))


@few
@given(seeds, st.integers(1, 5))
def test_people_in_several_parts(seed, n):
    t = sound(seed, people=30)
    test = sorted(t.dialogue[t.split == 'test'].unique())[:n]
    for k, d in enumerate(test):
        t.loc[t.dialogue == d, 'speaker'] = f's{4 * k}'  # of training
    f = named(t)['shared people']
    assert f.count == len(test) and f'{len(test)} of {30 - len(test)} speakers' in f.said
    assert '"group": "speaker"' in f.do and 'shared people' not in named(
        t, Columns(group='speaker')
    )


@few
@given(seeds, st.integers(1, 9))
def test_rows_that_are_there_twice(seed, n):
    t = sound(seed)
    train, test = (t.index[t.split == p][:n] for p in ('train', 'test'))
    for m in ('text', 'audio'):
        t.loc[test, m] = pd.Series(t.loc[train, m].tolist(), test)
    f = named(t)['shared rows']
    assert f.count == n and "'d000_0'" in f.said


@few
@given(seeds, st.integers(1, 9))
def test_utterances_that_are_there_twice(seed, n):
    t = sound(seed)
    t['utterance'] = [f'u{i} {p}' for i, p in enumerate(t.split)]
    train, test = (t.index[t.split == p][:n] for p in ('train', 'test'))
    t.loc[test, 'utterance'] = [f'u{i} test' for i in train]
    f = named(t)['shared utterances']
    assert f.count == n and "'u0'" in f.said


@few
@given(seeds, st.sampled_from(['column', 'names']))
def test_recordings_in_several_parts(seed, where):
    t = sound(seed, people=30)
    video = [f'v{int(d[1:]) // 4}' for d in t.dialogue]
    if where == 'column':
        t = t.assign(utterance=[f'u{i}' for i in range(len(t))], video=video)
    else:
        t = t.assign(utterance=[f'{v}_{i}' for i, v in enumerate(video)])
        t = t.drop(columns=['dialogue', 'position', 'speaker'])
    found = named(t)
    assert found['shared recordings'].count == 7 and "'v0'" in found['shared recordings'].said


@few
@given(seeds, st.sampled_from(['a', 'b']), st.booleans())
def test_a_class_that_training_lacks(seed, name, given_split):
    t = sound(seed, parts=('train', 'train', 'val', 'test') if given_split else None)
    t.loc[t.label == name, 'label'] = 'c'
    some = t.speaker == 's3'
    t.loc[some & (t.position == 1), 'label'] = name
    f = named(t)['lacking classes']
    assert f.count == 3 and repr(name) in f.said and 'UA counts' in f.do


@few
@given(seeds, st.sampled_from(['train', 'test', 'val']))
def test_a_modality_that_a_part_lacks(seed, part):
    t = sound(seed)
    t['audio'] = [None if p == part else x for p, x in zip(t.split, t.audio)]
    f = named(t)['lacking modalities']
    assert f.severity == ('problem' if part == 'train' else 'warning')
    assert f.said == f'audio, fold test: no utterance of the {part} part has it'


@few
@given(seeds, st.sampled_from([0, 2, 4]), st.integers(0, 3), st.sampled_from([-3.0, 0.5, 100.0]))
def test_an_entry_that_is_the_label(seed, n_classes, at, scale):
    t = sound(seed, n_classes=n_classes)
    y = [float(ord(y)) if n_classes else y for y in t.label]
    t['audio'] = [[*x[:at], scale * v, *x[at + 1 :]] for x, v in zip(t.audio, y)]
    f = named(t)['telling entries']
    assert (
        f.count == 1
        and f'audio: 1 of 4 entries predicts the label alone, such as number {at}' in f.said
    )


@few
@given(seeds)
def test_an_entry_that_tells_people_apart_is_not_the_label(seed):
    "Where each person has one label, every dialogue is one case."
    t = sound(seed, people=10, L=12, n_classes=2, parts=None)
    g = np.random.default_rng(seed)
    label = dict(zip(sorted(set(t.speaker)), g.permutation(list('ab') * 5)))
    pitch = dict(zip(sorted(set(t.speaker)), 10 * g.permutation(10)))
    t['label'] = t.speaker.map(label)
    t['audio'] = [[pitch[s] + 0.1 * v for v in x] for s, x in zip(t.speaker, t.audio)]
    assert 'telling entries' not in named(t)


@few
@given(seeds, st.sampled_from([0, 2]))
def test_features_of_a_network_that_has_seen_the_labels(seed, n_classes):
    "In training they tell the label, spread over entries; on test they tell nothing."
    t = sound(seed, K=120, people=120, n_classes=n_classes, parts=('train', 'train', 'test'))
    g = np.random.default_rng(seed)
    y = [2.0 * ord(y) if n_classes else y for y in t.label]
    told = [v if p == 'train' else g.normal() for v, p in zip(y, t.split)]
    t['audio'] = [[v + g.normal() for _ in range(9)] for v in told]
    f = named(t)['readout gaps']
    assert f.said.startswith('audio: ') and 'trained on these labels' in f.do


def test_overfitting_is_no_gap():
    "Of noise with more entries than utterances, a read-out fits training fully, and knows nothing."
    t = sound(0, K=60, people=60, n_classes=2)
    t['audio'] = np.random.default_rng(0).normal(size=(len(t), 300)).tolist()
    assert 'readout gaps' not in named(t)


@few
@given(seeds, st.integers(1, 4))
def test_labels_that_the_position_gives(seed, n_classes):
    t = sound(seed, L=5)
    t['label'] = ['wxyz'[j % n_classes] if n_classes > 1 else 9.5 - j for j in t.position]
    f = named(t)['telling position']
    assert 'gives 100%' in f.said and ('variance' in f.said) == (n_classes == 1)


@few
@given(seeds, st.sampled_from([' ', ', ', '; ', ',']), st.sampled_from(['()', '  ']))
def test_vectors_that_are_text(seed, between, around):
    t = sound(seed)
    t['audio'] = [around[0] + between.join(f'{v:.3g}' for v in x) + around[1] for x in t.audio]
    t = t.assign(note='so')
    found = named(t)
    assert found['vectors as text'].count == len(t) and found['unused columns'].count == 2
    assert 'audio, note' in found['unused columns'].said


@few
@given(seeds, st.integers(2000, 60000))
def test_ids_of_tokens(seed, words):
    t = sound(seed)
    g = np.random.default_rng(seed)
    t['text'] = [g.integers(0, words, 6).tolist() for _ in range(len(t))]
    t.at[0, 'text'] = [words, 0, 0, 0, 0, 0]
    f = named(t)['token ids']
    assert f.count == 6 * len(t) and f'up to {words}' in f.said


@pytest.mark.parametrize('n', [12, 30])
def test_text_that_is_ids_alone(tmp_path, n):
    "MMSA's `text_bert` without `text` is named, by check and before training."
    g = np.random.default_rng(n)
    parts = {
        p: dict(
            text_bert=g.integers(0, 30000, (n, 3, 5)),
            audio=g.normal(size=(n, 5, 3)),
            id=[f'{p}{k // 4}$_${k}' for k in range(n)],
            regression_labels=g.uniform(-3, 3, n),
        )
        for p in ('train', 'valid', 'test')
    }
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(parts))
    d, found = examine(tmp_path / 'x.pkl', 'x')
    (f,) = [f for f in found if f.severity != 'note']
    assert d.modalities == ('audio',) and 'token ids alone (text_bert)' in f.said
    with pytest.warns(UserWarning, match='token ids alone'):
        read_mmsa(tmp_path / 'x.pkl')


@few
@given(seeds, st.integers(3, 9), st.integers(-4, 2))
def test_whole_numbers_that_may_be_scores(seed, n, lowest):
    t = sound(seed)
    t['label'] = [lowest + i % n for i in np.random.default_rng(seed).permutation(len(t))]
    assert f'read as {n} classes' in named(t)['integer scores'].said
    assert all('integer scores' not in named(t, Columns(task=x)) for x in ('classes', 'score'))


@few
@given(seeds, st.sampled_from([str.upper, str.title, lambda x: f' {x}', lambda x: f'{x}. ']))
def test_names_that_nearly_agree(seed, change):
    t = sound(seed)
    t['label'] = t.label.map(dict(a='very sad', b='glad', c='calm'))
    some = t.label.eq('very sad') & (np.arange(len(t)) % 2 > 0)
    t.loc[some, 'label'] = change('very sad')
    t.loc[t.dialogue == 'd001', 'speaker'] = change('s1')
    found = named(t)
    assert repr(change('very sad')) in found['alike classes'].said
    # S1 and s1, not s1 and s11
    assert (found['two names'].count, 's11' in found['two names'].said) == (2, False)


@few
@given(seeds, st.integers(2, 4))
def test_one_person_under_two_names(seed, n):
    t = sound(seed, people=10)
    who = {f's{k}': f'P{max(k, n - 1)}' for k in range(10)}  # the first n are one
    t['person'] = t.speaker.map(who)
    t['gender'] = t.speaker.map({f's{k}': 'FM'[k % 2] for k in range(10)})
    t['age'] = t.speaker.map({f's{k}': 20 + k // 2 for k in range(10)})
    f = named(t)['two names']
    assert f.count == 1 and "column 'person': 1 of its values has several names" in f.said
    assert all(repr(f's{k}') in f.said for k in range(min(n, 3)))
    assert 'two names' not in named(t, Columns(group='person'))


@few
@given(seeds, st.integers(1, 5), st.sampled_from([-1e30, -9999999.0, 1e12]))
def test_entries_far_away(seed, n, value):
    t = sound(seed)
    for i in range(n):
        t.at[7 * i, 'text'] = [value, *t.text[7 * i][1:]]
    f = named(t)['far entries']
    assert f.count == n and f'{value:g}' in f.said


@few
@given(seeds, st.integers(1, 120))
def test_vectors_of_zeros(seed, n):
    t = sound(seed)
    rows = np.random.default_rng(seed).permutation(len(t))[:n].tolist()
    t['audio'] = [[0.0] * 4 if i in rows else x for i, x in enumerate(t.audio)]
    f = named(t)['zero vectors']
    assert f.count == n and f.said.startswith(f'audio: {n} of 120 vectors all zeros')


@few
@given(seeds, st.sampled_from([{}, {'cuts': (99.0,)}, {'task': 'score'}]))
def test_labels_that_do_not_differ_are_refused(seed, how):
    "They would be predicted without fault."
    t = sound(seed, n_classes=0)
    t['label'] = t.label if 'cuts' in how else 2.5 if how else 'happy'
    d, bad = read_table(t, Columns(**how))
    value = d.task.classes[0] if 'cuts' in how else '2.5' if how else 'happy'
    assert f"column 'label': found one value, {value!r}, in all 120 labels, expected at" in bad[0]


def test_a_fold_that_leaves_nothing_to_train_on_is_a_problem(tmp_path):
    "As training says it."
    t = sound(0, K=4)
    t['split'] = ['train'] * 4 + ['val'] * 4 + ['test'] * 8
    t.to_parquet(tmp_path / 'few.parquet')
    d, found = examine(tmp_path / 'few.parquet', 'few')
    said = [f.said for f in found if f.severity == 'problem']
    assert said == ["fold 'test': found 1 dialogue outside it, expected at least 2 to train on"]
    with pytest.raises(DataError, match='found 1 dialogue outside'):
        split(d)


@few
@given(seeds, st.integers(1, 5), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_entries_that_are_no_numbers(seed, n, value):
    t = sound(seed)
    for i in range(n):
        t.at[7 * i, 'text'] = [value, *t.text[7 * i][1:]]
    f = named(t)['unmeasured entries']
    assert f.count == n and 'in 1 column' in f.said


# --- the command ---


def check(*args):
    return CliRunner().invoke(cli.app, ['data', 'check', *map(str, args)])


def test_warnings_do_not_fail_and_problems_do(tmp_path):
    t = sound(0)
    t.assign(note='so').to_parquet(tmp_path / 'talks.parquet')
    r = check(tmp_path / 'talks.parquet')
    assert r.exit_code == 0 and r.output.endswith('\n0 problems, 1 warning\n')
    assert (
        'speakers: 10 names in 30 dialogues, 10 of them in several; 12 utterances each' in r.output
    )
    t.assign(audio=[None if p == 'train' else x for p, x in zip(t.split, t.audio)]).to_parquet(
        tmp_path / 'talks.parquet'
    )
    r = check(tmp_path / 'talks.parquet')
    assert r.exit_code == 1 and '1 problem, 0 warnings' in r.output
    r = check(tmp_path / 'talks.parquet', '--json')
    said = json.loads(r.stdout)
    assert r.exit_code == 1 and (said['problems'], said['warnings']) == (1, 0)
    (one,) = said['datasets']
    assert {f['trap'] for f in one['findings'] if f['severity'] == 'problem'} == {
        'lacking modalities'
    }
    assert set(one['findings'][0]) == {'trap', 'said', 'do', 'count', 'severity'}


def test_training_names_the_traps_first(tmp_path):
    "Not only `data check`, which one may never have run."
    words = ['--options', '{"width": 8, "epochs": 1}', '--out-dir', tmp_path, '--no-check']
    words = ['train', '--dataset', reported('modality_as_text.parquet'), '--fold', 1, *words]
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert "Warning: column 'audio': 72 texts look like vectors" in done.stderr


def test_a_table_with_problems_is_still_looked_at(tmp_path):
    t = sound(0).assign(note='so')
    t.at[0, 'text'] = [1.0]
    t.to_parquet(tmp_path / 'talks.parquet')
    r = check(tmp_path / 'talks.parquet')
    assert r.exit_code == 1 and 'unused columns: note' in r.output and 'found width 1' in r.output


def test_a_release_without_traps_has_none():
    d = random_dialogues([6] * 40, n_classes=3)
    assert all(f.severity == 'note' for f in findings(Seen(d)))
    assert not torch.equal(d.features['t'][0], d.features['t'][1])
