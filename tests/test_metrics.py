"""The field's metrics, by its definitions and on its scales; scores of a labelled file; and the way
out of a run on a table with a space in its name."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, recall_score
from small import reported
from typer.testing import CliRunner

from mculora.basics.dialogues import DataError, Task, random_dialogues
from mculora.basics.masking import at_random
from mculora.basics.modalities import labels
from mculora.data.clips import RATE, buzz, read_manifest, read_wav
from mculora.data.own import read_own
from mculora.data.tables import Columns, as_table, read_table
from mculora.experiments.runs import place_of
from mculora.training.evaluation import metric_names, metrics, undefined, why_not
from mculora.use.cli import app
from mculora.use.prediction import scored


def by_the_field(y, p):
    "As the collection MMSA computes them, on NumPy alone."
    some = y != 0

    def steps(x, most):
        return np.round(np.clip(x, -most, most))

    return {
        'ACC': accuracy_score(y[some] > 0, p[some] > 0),
        'F1': f1_score(y[some] > 0, p[some] > 0, average='weighted'),
        'ACC has0': accuracy_score(y >= 0, p >= 0),
        'F1 has0': f1_score(y >= 0, p >= 0, average='weighted'),
        'ACC-5': (steps(y, 2) == steps(p, 2)).mean(),
        'ACC-7': (steps(y, 3) == steps(p, 3)).mean(),
        'MAE': abs(y - p).mean(),
        'r': pearsonr(y, p)[0],
        'CCC': 2 * np.cov(y, p, bias=True)[0, 1] / (y.var() + p.var() + (y.mean() - p.mean()) ** 2),
    }


@pytest.mark.parametrize('seed', range(8))
def test_scores_are_read_as_the_field_reads_them(seed):
    g = np.random.default_rng(seed)
    # thirds, halves and zeros, as raters give them; predictions beyond the range and on its edges
    y = g.integers(-9, 10, 60) / g.choice([2, 3], 60)
    y = np.clip(y, -3, 3)
    p = np.where(g.random(60) < 0.3, g.integers(-8, 9, 60) / 2, g.normal(0, 2.5, 60))
    found = metrics(Task('s'), torch.tensor(p).view(1, -1, 1), torch.tensor(y))[0]
    want = by_the_field(y, p)
    assert list(found) == list(want)
    assert found == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    'low, high, middle, five, seven',
    [
        (-3, 3, 0.0, True, True),
        (1, 7, 4.0, True, True),
        (1, 5, 3.0, True, False),
        (-2, 2, 0.0, True, False),
        (-1, 1, 0.0, False, False),
        (0, 100, 50.0, False, False),
        (-3, 2.6, 0.0, False, False),
        (1, 7, None, False, False),
    ],
)
def test_what_a_scale_does_not_define_is_left_out_and_named(low, high, middle, five, seven):
    task = Task('s', low=low, high=high, middle=middle)
    names = metric_names(task)
    assert (('ACC-5' in names), ('ACC-7' in names)) == (five, seven)
    assert ('ACC has0' in names) == (middle is not None) and {'MAE', 'r', 'CCC'} <= set(names)
    assert set(names) & set(undefined(task)) == set()
    said = ' '.join(why_not(task))
    assert all(m in said for m in undefined(task)) and (seven or 'ACC-7' in said)
    y = torch.linspace(low, high, 7)
    assert list(metrics(task, y.view(1, -1, 1), y)[0]) == names


def test_integer_scores_as_scores():
    path = reported('21_integer_scores.parquet')
    d, _ = read_own(path, Columns(task='score', low=-3, high=3, middle=0))
    assert 'ACC-7' in metric_names(d.task) and not why_not(d.task)
    perfect = metrics(d.task, d.label.view(1, -1, 1), d.label)[0]
    assert perfect['ACC-7'] == perfect['ACC'] == perfect['ACC has0'] == 1 and perfect['MAE'] == 0


# --- a rate for each modality at test ---


@pytest.mark.parametrize('seed', range(6))
def test_rates_belong_to_their_modalities_and_nobody_loses_everything(seed):
    g = np.random.default_rng(seed)
    names = list(g.permutation(['voice', 'words', 'face', 'turns'])[: g.integers(2, 5)])
    d = random_dialogues([2000], dict.fromkeys(names, 1))
    rates = dict(zip(names, g.dirichlet([1] * len(names)) * (len(names) - 1) * g.random()))
    rates = {m: min(x, 0.95) for m, x in rates.items()}
    asked = dict(sorted(rates.items()))  # in another order than the data's
    stays = at_random(d, asked, seed)
    assert stays.any(-1).all()
    gone = (~stays).float().mean(0)
    assert gone.tolist() == pytest.approx([rates[m] for m in names], abs=0.05)
    assert torch.equal(stays, at_random(d, dict(reversed(asked.items())), seed))
    with pytest.raises(ValueError, match=f'sum of at most {len(names) - 1}'):
        at_random(d, dict.fromkeys(names, 0.99), seed)


# --- a labelled file ---


@pytest.mark.parametrize('seed', range(4))
def test_a_labelled_file_is_scored_by_what_its_rows_have(seed):
    g, classes = np.random.default_rng(seed), ('x', 'y', 'z')
    combinations = [*labels('at'), '']
    rows = [
        dict(
            truth=g.choice(['x', 'y', 'z', 'other', None]),
            combination=str(g.choice(combinations)),
            **dict(zip(('p_x', 'p_y', 'p_z'), g.dirichlet([1, 1, 1]))),
        )
        for _ in range(80)
    ]
    found, notes = scored(Task('t', classes), rows)
    known = [r for r in rows if r['truth'] in classes and r['combination']]
    assert found['all']['utterances'] == len(known) and f'{80 - len(known)} of 80 rows' in notes[0]
    assert "such as 'other', expected x, y, z" in notes[0]
    for c, row in found.items():
        some = [r for r in known if c in ('all', r['combination'])]
        y = [r['truth'] for r in some]
        p = [max(classes, key=lambda k, r=r: r[f'p_{k}']) for r in some]
        assert row['utterances'] == len(some)
        assert row['WA'] == pytest.approx(accuracy_score(y, p))
        recall = recall_score(y, p, average='macro', labels=sorted(set(y)))
        assert row['UA'] == pytest.approx(recall)


def test_a_file_without_a_label_that_the_model_knows_is_not_scored():
    rows = [dict(truth=t, combination='a', p_x=1.0, p_y=0.0) for t in ('1', '2')]
    found, notes = scored(Task('t', ('x', 'y')), rows)
    assert found == {'all': dict(utterances=0)} and '2 of 2 rows' in notes[0]
    # of scores, the written number is scored, with what is defined
    rows = [dict(truth=y, combination='a', score=y / 2) for y in (1.0, 5.0, float('nan'))]
    found, notes = scored(Task('s', low=0, high=10, middle=None), rows)
    assert found['all'] == pytest.approx(
        dict(utterances=2, r=1.0, MAE=1.5, CCC=found['all']['CCC'])
    )
    assert '1 of 3 rows' in notes[0] and 'the scores have no middle' in notes[1]


# --- from a table to a prediction without an option that the record knows ---


def said(*args):
    r = CliRunner().invoke(app, [*map(str, args)])
    assert r.exit_code == 0, r.output
    return r


def test_a_table_with_a_space_in_its_name_is_trained_exported_and_scored(tmp_path):
    top = tmp_path / 'a folder'
    top.mkdir()
    d = random_dialogues([3] * 16, dict(sound=4, words=5), parts=('train',) * 6 + ('val', 'test'))
    t = as_table(d).rename(columns=dict(sound='audio vec', words='text vec', label='mood'))
    t.assign(other=[[1.0]] * len(t)).to_parquet(top / 'my talks.parquet')
    train = ['train', '--dataset', top / 'my talks.parquet', '--method', 'majority']
    train += ['--features', 'sound=audio vec', '--features', 'words=text vec']
    train += ['--table', '{"label": "mood"}', '--out-dir', tmp_path / 'my runs', '--device', 'cpu']
    out = said(*train).output
    assert 'my_talks, majority' in out and '  mean of all conditions: WA ' in out
    (run,) = (p.parent for p in (tmp_path / 'my runs').rglob('result.json'))
    assert place_of(run) == dict(dataset=str(top / 'my talks.parquet'))
    said('export', run, tmp_path / 'my model')
    told = tmp_path / 'what it says.csv'
    r = said('predict', tmp_path / 'my model', top / 'my talks.parquet', '--output', told)
    assert 'utterances by what they have: sound+words 48' in r.stderr
    answers = pd.read_csv(told)
    # dialogues as they first appear, utterances by position: those of the table
    assert answers.truth.tolist() == t.mood.tolist()
    right = 100 * (answers.truth == answers.label).mean()
    assert f'scored, all (48): WA {right:.1f} %, UA ' in r.stderr
    # a file without labels, and without one of the modalities
    t.drop(columns=['mood', 'text vec']).to_parquet(top / 'new talks.parquet')
    r = said('predict', tmp_path / 'my model', top / 'new talks.parquet')
    assert 'sound 48; none has words' in r.stderr and 'scored' not in r.stderr
    assert 'truth' not in json.loads(r.stdout.splitlines()[0])


@pytest.mark.parametrize('name', ['my talks', 'talks (2)', 'räume & more', 'a\tb'])
def test_any_file_name_makes_a_name_of_results(tmp_path, name):
    path = tmp_path / f'{name}.csv'
    path.write_text('label,x,split\n1,"[1.0]",train\n2,"[2.0]",test\n')
    d, bad = read_table(path)
    assert not bad and ' ' not in d.task.name and Path(d.task.name).name == d.task.name


# --- clips ---


def program(folder, text):
    folder.mkdir()
    path = folder / 'ffmpeg'
    path.write_text(f'#!{sys.executable}\n{text}')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(folder)


def test_the_sound_of_a_video_comes_from_ffmpeg(tmp_path, monkeypatch):
    sf = pytest.importorskip('soundfile')
    video = tmp_path / 'my clip.mp4'
    video.write_bytes(b'a video')
    sound = tmp_path / 'sound.wav'
    sf.write(sound, buzz(seconds=0.2), RATE, subtype='FLOAT')
    copies = f"""import shutil, sys
assert 'file:{video}' in sys.argv, sys.argv
shutil.copy({str(sound)!r}, sys.argv[-1])
"""
    monkeypatch.setenv('PATH', program(tmp_path / 'works', copies))
    assert np.array_equal(read_wav(video), read_wav(sound))
    fails = "import sys\nprint('no stream', file=sys.stderr)\nsys.exit(1)\n"
    monkeypatch.setenv('PATH', program(tmp_path / 'fails', fails))
    with pytest.raises(DataError, match='my clip.mp4: found no sound to decode .no stream.'):
        read_wav(video)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(DataError, match='sound needs ffmpeg, expected that program: install it'):
        read_wav(video)


@pytest.mark.skipif(not shutil.which('ffmpeg'), reason='no ffmpeg')
def test_ffmpeg_itself(tmp_path):
    video = tmp_path / '-my clip.mp4'
    tone = 'sine=frequency=440:duration=1:sample_rate=44100'
    assert (
        os.spawnlp(
            os.P_WAIT, 'ffmpeg', 'ffmpeg', '-v', 'error', '-f', 'lavfi', '-i', tone, str(video)
        )
        == 0
    )
    x = read_wav(video)
    assert abs(len(x) - RATE) < 100 and np.argmax(abs(np.fft.rfft(x[:RATE]))) == 440


@pytest.mark.parametrize('seed', range(3))
def test_any_further_columns_of_a_clip_list_are_ignored_and_listed(tmp_path, seed):
    g = np.random.default_rng(seed)
    more = [f'{w} {k}' for k, w in enumerate(g.choice(['arousal', 'age', 'notes', 'rater'], 4))]
    t = pd.DataFrame(dict(utterance=['u1', 'u2'], dialogue='d', transcript=['one', 'two']))
    for name in more:
        t.insert(int(g.integers(t.shape[1] + 1)), name, ['x', ''])
    t.to_csv(tmp_path / 'my clips.csv', index=False)
    lines = []
    clips = read_manifest(tmp_path / 'my clips.csv', lines.append)
    assert [c.transcript for c in clips] == ['one', 'two']
    assert len(lines) == 1 and all(name in lines[0] for name in more)
