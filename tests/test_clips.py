"""From raw clips to the layout on disk: files of every kind, models with all and with some of their
weights, interrupted extraction, the whole way to a probability."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mculora.data import clips as C
from mculora.use.cli import app
from mculora.data.clips import (
    RATE,
    Clip,
    Extractor,
    extract,
    read_frames,
    read_manifest,
    read_wav,
    to_layout,
    to_table,
    write_clips,
)
from mculora.basics.dialogues import DataError
from mculora.data.sources import read_layout

ROOT = Path(__file__).resolve().parent.parent


def tone(rate, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * 300 * np.arange(int(rate * seconds)) / rate)


# --- sound ---


@pytest.mark.parametrize('rate', [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize(
    'kind, eps',
    [('PCM_U8', 0.02), ('PCM_16', 0.003), ('PCM_24', 0.003), ('FLOAT', 0.003), ('DOUBLE', 0.003)],
)
def test_every_rate_and_width_is_the_same_tone(tmp_path, rate, kind, eps):
    sf.write(tmp_path / 'x.wav', np.stack([tone(rate)] * 3, 1), rate, subtype=kind)
    x = read_wav(tmp_path / 'x.wav')
    assert x.dtype == np.float32 and x.ndim == 1 and abs(len(x) - RATE // 2) <= 1
    inner = slice(400, RATE // 2 - 400)
    assert np.abs(x[inner] - tone(RATE)[inner]).max() < eps


def test_channels_are_averaged_and_flac_is_read(tmp_path):
    sf.write(tmp_path / 'x.flac', np.stack([tone(RATE), np.zeros(RATE // 2)], 1), RATE)
    assert np.abs(read_wav(tmp_path / 'x.flac') - tone(RATE) / 2).max() < 1e-3


def header(claim):
    "A wave file of 10 samples that says it has `claim` bytes."
    return (
        b'RIFF'
        + (claim + 36).to_bytes(4, 'little')
        + b'WAVEfmt '
        + (16).to_bytes(4, 'little')
        + bytes([1, 0, 1, 0])
        + RATE.to_bytes(4, 'little')
        + (2 * RATE).to_bytes(4, 'little')
        + bytes([2, 0, 16, 0])
        + b'data'
        + claim.to_bytes(4, 'little')
        + bytes(20)
    )


@pytest.mark.parametrize(
    'content, said',
    [
        (b'', 'an empty file'),
        (b'RIFF', 'no sound file'),
        (random.Random(0).randbytes(3000), 'no sound file'),
        (header(0)[:-20], 'no samples'),
        (pickle.dumps(print), 'no sound file'),
    ],
)
def test_what_is_no_sound_is_refused(tmp_path, content, said):
    (tmp_path / 'x.wav').write_bytes(content)
    with pytest.raises(DataError, match=f'x.wav: found {said}'):
        read_wav(tmp_path / 'x.wav')


@pytest.mark.parametrize(
    'values, said', [([0, np.nan], 'NaN or infinity'), ([np.inf, 0], 'NaN or infinity')]
)
def test_samples_are_numbers(tmp_path, values, said):
    sf.write(tmp_path / 'x.wav', np.array(values), RATE, subtype='DOUBLE')
    with pytest.raises(DataError, match=said):
        read_wav(tmp_path / 'x.wav')


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path):
    (tmp_path / 'x.wav').write_bytes(header(2**31))
    try:
        assert len(read_wav(tmp_path / 'x.wav')) <= 10  # what is there ...
    except DataError as e:
        assert 'at most 3600 s' in str(e) or 'no sound file' in str(e)  # ... or nothing


def test_an_hour_is_no_utterance(tmp_path):
    sf.write(tmp_path / 'x.wav', np.zeros(1000 * 3601, np.int16), 1000)
    with pytest.raises(DataError, match='found 3601 s, expected one utterance'):
        read_wav(tmp_path / 'x.wav')


def test_too_short_a_sound_for_functionals_is_named(tmp_path):
    sf.write(tmp_path / 'x.wav', tone(RATE, 0.005), RATE)
    with pytest.warns(UserWarning, match='short'):
        bad = extract(
            [Clip('u', 'd', wav=tmp_path / 'x.wav')],
            {'a': C.Egemaps()},
            tmp_path / 'o',
            progress=False,
        )
    assert 'utterance u: ' in bad[0] and 'NaN or infinity in its features' in bad[0]


# --- pictures ---


def test_frames_of_a_video(tmp_path):
    out = cv2.VideoWriter(str(tmp_path / 'x.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 25, (64, 48))
    for k in range(40):
        out.write(np.full((48, 64, 3), 6 * k, np.uint8))
    out.release()
    found = [float(x.mean()) for x in read_frames(tmp_path / 'x.avi', 4)]
    assert np.abs(np.array(found) - [6 * k for k in C.spread(40, 4)]).max() < 4
    (tmp_path / 'none.avi').write_bytes(b'')
    with pytest.raises(DataError, match='none.avi: found an empty file'):
        read_frames(tmp_path / 'none.avi')


def test_the_largest_face_counts_and_colours_are_in_order():
    scene = np.zeros((400, 800, 3), np.uint8)
    scene[..., 2] = 40
    small, large = C.sketch(size=160), C.sketch(size=360)
    large[..., 0] = (large[..., 0] * 0.6).astype(np.uint8)  # less red
    scene[20:180, 20:180], scene[20:380, 400:760] = small, large
    face = C.find_face(scene, 64)
    assert face[..., 0].mean() < 0.8 * face[..., 1].mean()
    assert C.find_face(np.zeros((50, 50, 3), np.uint8)) is None


# --- models of transformers, tiny and random, loaded as the real ones are ---


@pytest.fixture(scope='module')
def deberta(tmp_path_factory):
    "A tiny DeBERTa with a byte-level BPE tokenizer, as the hub has it."
    from tokenizers import ByteLevelBPETokenizer
    from transformers import DebertaConfig, DebertaModel, DebertaTokenizerFast

    top = tmp_path_factory.mktemp('deberta-tiny')
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(
        ['the quick brown fox jumps over the lazy dog', 'well really happiness'],
        vocab_size=300,
        special_tokens=['[CLS]', '[SEP]', '[PAD]', '[UNK]', '[MASK]'],
    )
    bpe.save_model(str(top))
    cut = DebertaTokenizerFast.from_pretrained(str(top), add_prefix_space=True)
    cut.save_pretrained(top)
    torch.manual_seed(0)
    DebertaModel(
        DebertaConfig(
            vocab_size=len(cut),
            hidden_size=16,
            num_hidden_layers=5,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            relative_attention=True,
            pos_att_type=['c2p', 'p2c'],
            max_relative_positions=8,
            type_vocab_size=0,
        )
    ).save_pretrained(top)
    return top


def test_deberta_is_the_sum_of_four_layers_over_words(deberta):
    from transformers import AutoTokenizer, DebertaModel

    x = C.Text(deberta, name='deberta-tiny-4-UTT')
    model, cut = (
        DebertaModel.from_pretrained(deberta).eval(),
        AutoTokenizer.from_pretrained(deberta, add_prefix_space=True),
    )
    words = []
    # slowly: word by word, by hand
    for s in (['well', ',', 'the', 'fox'], ['happiness', 'xyzzy']):
        pieces = [cut.encode(f' {w}', add_special_tokens=False) for w in s]
        with torch.no_grad():
            h = model(
                torch.tensor(
                    [[cut.cls_token_id, *(i for p in pieces for i in p), cut.sep_token_id]]
                ),
                output_hidden_states=True,
            ).hidden_states
        h, at = (h[-1] + h[-2] + h[-3] + h[-4])[0], 1
        for p in pieces:
            words.append(h[at : at + len(p)].mean(0))
            at += len(p)
    # some word has several pieces
    assert max(map(len, pieces)) > 1
    assert (
        np.abs(x('Well, the FOX. Happiness xyzzy!') - torch.stack(words).mean(0).numpy()).max()
        < 1e-5
    )
    assert x(' ... ') is None and x.name == 'deberta-tiny-4-UTT'


def test_folders_are_named_as_the_field_names_them(deberta):
    assert (
        C.Text(deberta).name == f'{deberta.name}-4-UTT'
        and C._named('microsoft/deberta-large', (-4, -3, -2, -1)) == 'deberta-large-4-UTT'
    )


def test_a_long_transcript_is_cut_not_refused(deberta):
    assert np.isfinite(C.Text(deberta)('the quick fox ' * 200)).all()


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    top = tmp_path_factory.mktemp('vit-tiny')
    torch.manual_seed(0)
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
        ),
        add_pooling_layer=False,
    ).save_pretrained(top)
    (top / 'preprocessor_config.json').write_text(
        json.dumps(
            dict(
                size={'height': 32, 'width': 32},
                image_mean=[0.5, 0.4, 0.3],
                image_std=[0.2, 0.3, 0.4],
                image_processor_type='ViTImageProcessor',
            )
        )
    )
    return top


def test_an_image_model_sees_faces_on_its_own_scale(vit, tmp_path):
    from transformers import ViTModel

    for k in range(2):
        cv2.imwrite(str(tmp_path / f'{k}.png'), C.sketch(open=k))
    # no face: not counted
    cv2.imwrite(str(tmp_path / '2.png'), np.full((99, 99, 3), 7, np.uint8))
    faces = (
        torch.from_numpy(np.stack([C.find_face(x, 32) for x in read_frames(tmp_path)[:2]]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    values = (faces - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    with torch.no_grad():
        want = (
            ViTModel.from_pretrained(vit, add_pooling_layer=False)
            .eval()(values)
            .last_hidden_state.mean((0, 1))
        )
    assert np.abs(C.Faces.of(vit)(tmp_path) - want.numpy()).max() < 1e-5


def test_what_cannot_extract_is_said_before_it_starts(vit, deberta, tmp_path):
    with pytest.raises(
        DataError,
        match=re.escape(f'{deberta}: found no preprocessor_config.json of an image model'),
    ):
        C.Faces.of(deberta)
    said = json.loads((vit / 'preprocessor_config.json').read_text())
    sound = copied(vit, tmp_path / 'sound')
    for wrong in (
        dict(feature_size=1, sampling_rate=RATE),
        said | dict(image_mean=None),
        said | dict(image_std=['x']),
        said | dict(size={}),
    ):
        (sound / 'preprocessor_config.json').write_text(json.dumps(wrong))
        with pytest.raises(
            DataError, match='of an image model .*expected size, mean and deviation of the pictures'
        ):
            C.extractors('none', 'none', str(sound))
    for device in ('banana', 'cuda:9'):
        for face in (str(vit), 'light'):
            with pytest.raises(
                ValueError, match=f"device: found '{device}', expected auto or one of cpu"
            ):
                C.extractors('none', 'none', face, device)
    assert C.extractors('none', 'none', str(vit), 'cpu')['v'].name == f'{vit.name}-face_UTT'


def copied(top, to, change=lambda w: w):
    to.mkdir()
    for p in top.iterdir():
        if p.suffix != '.safetensors':
            (to / p.name).write_bytes(p.read_bytes())
    save_file(
        change(load_file(top / 'model.safetensors')),
        to / 'model.safetensors',
        metadata={'format': 'pt'},
    )
    return to


def test_a_checkpoint_with_gaps_is_refused(deberta, vit, tmp_path):
    for top, lost in ((deberta, 'encoder.layer.1.output.dense.weight'), (vit, 'layernorm.bias')):
        folder = copied(
            top,
            tmp_path / f'{top.name}-gap',
            lambda w, lost=lost: {k: v for k, v in w.items() if not k.endswith(lost)},
        )
        with pytest.raises(
            DataError, match=re.escape('found no weights for') + f'.*{re.escape(lost)}'
        ):
            C.load_model(folder)


def test_a_checkpoint_of_another_shape_is_refused(vit, tmp_path):
    with pytest.raises(DataError):
        C.load_model(
            copied(
                vit,
                tmp_path / 'x',
                lambda w: {k: v[:1] if k.endswith('layernorm.bias') else v for k, v in w.items()},
            )
        )


def test_pickles_are_not_loaded_and_no_code_is_run(vit, tmp_path):
    folder = copied(vit, tmp_path / 'x')

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/harm',)

    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match='expected config.json and model.safetensors'):
        C.load_model(folder)
    config = json.loads((folder / 'config.json').read_text()) | dict(
        model_type='unheard-of', auto_map={'AutoConfig': 'code.Config', 'AutoModel': 'code.Model'}
    )
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'code.py').write_text(f'open("{tmp_path}/harm", "w")')
    with pytest.raises(DataError):
        C.load_model(folder)
    assert not (tmp_path / 'harm').exists()


def test_a_name_on_the_hub_needs_a_revision():
    with pytest.raises(DataError, match='expected the commit of the weights'):
        C.Text('microsoft/deberta-large')


def test_other_weights_are_another_key(deberta, tmp_path):
    other = copied(
        deberta,
        tmp_path / deberta.name,
        lambda w: {k: v + 1e-3 * (k == min(w)) for k, v in w.items()},
    )
    assert C.Text(deberta).key == C.Text(deberta).key != C.Text(other).key
    assert C.Text(deberta).key != C.Text(deberta, layers=(-1,), name=f'{deberta.name}-4-UTT').key


def test_minilm_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(C, 'MINILM', '0' * 64)
    with pytest.raises(DataError, match='these are not the published weights'):
        C.minilm()


# --- the manifest ---


def table(tmp_path, rows, name='clips.csv'):
    t = pd.DataFrame(rows)
    t.to_csv(tmp_path / name, index=False) if name.endswith('.csv') else t.to_parquet(
        tmp_path / name
    )
    return tmp_path / name


GOOD = dict(utterance='u1', dialogue='d', transcript='hello')


@pytest.mark.parametrize(
    'rows, said',
    [
        ([dict(dialogue='d', wav='')], "found no column 'utterance'"),
        ([dict(utterance='u', dialogue='d')], 'found none of the columns wav, transcript, frames'),
        ([GOOD | dict(labels='x')], "found the column 'labels', expected 'label' or one of"),
        ([GOOD, GOOD], "row 2, utterance 'u1': found the same utterance in row 1"),
        ([GOOD | dict(utterance='../u')], "found utterance '../u', expected a plain file name"),
        ([GOOD | dict(utterance='')], "found utterance '', expected a plain file name"),
        ([GOOD | dict(dialogue='a/b')], "found dialogue 'a/b'"),
        ([GOOD | dict(wav='gone.wav')], 'found no wav at '),
        ([GOOD | dict(frames='gone')], 'expected a file or folder'),
    ],
)
def test_a_bad_manifest_is_refused_before_work_starts(tmp_path, rows, said):
    with pytest.raises(DataError, match=re.escape(said)):
        read_manifest(table(tmp_path, rows))


@pytest.mark.parametrize('content', [b'', b'\xff\xfe\x00', b'utterance,dialogue\n"u'])
def test_what_is_no_table_is_refused(tmp_path, content):
    for name in ('x.csv', 'x.parquet'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f'{name}: found no'):
            read_manifest(tmp_path / name)
    with pytest.raises(DataError, match='found no such file'):
        read_manifest(tmp_path / 'gone.csv')
    with pytest.raises(DataError, match='found no rows'):
        read_manifest(table(tmp_path, {k: [] for k in GOOD}))


def test_csv_and_parquet_say_the_same(tmp_path):
    rows = [
        GOOD | dict(label=1.5),
        dict(utterance='007', dialogue='d', transcript=None, label=-2.0),
    ]
    a, b = (
        read_manifest(table(tmp_path, rows)),
        read_manifest(table(tmp_path, rows, 'clips.parquet')),
    )
    assert a == b and a[1].utterance == '007' and a[1].transcript == '' and float(a[0].label) == 1.5


# --- extraction ---


class Count(Extractor):
    "Counts its calls, and stops at the third where told to."

    column, name = 'transcript', 'count-UTT'

    def __init__(self, key='one', stop=False):
        self.key, self.stop, self.calls = json.dumps(key), stop, []

    def __call__(self, source):
        if self.stop and len(self.calls) == 2:
            raise KeyboardInterrupt
        self.calls.append(source)
        if source == 'broken':
            raise DataError('found a broken one')
        return None if source == 'nothing' else np.full(3, len(source), np.float32)


CLIPS = [Clip(f'u{k}', 'd', transcript=t) for k, t in enumerate(['a', 'bb', 'nothing', '', 'ccc'])]


def stored(top):
    return {
        p.name: np.load(p).tolist() if p.is_file() else None
        for p in sorted((top / 'features' / 'count-UTT').iterdir())
        if p.name != 'journal.jsonl'
    }


WANT = {'u0.npy': [1.0] * 3, 'u1.npy': [2.0] * 3, 'u2': None, 'u3': None, 'u4.npy': [3.0] * 3}


def test_interrupted_extraction_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract(CLIPS, {'t': Count(stop=True)}, tmp_path, progress=False)
    journal = tmp_path / 'features' / 'count-UTT' / 'journal.jsonl'
    # killed while it wrote the second line
    journal.write_text(journal.read_text().rstrip()[:-5])
    x = Count()
    assert extract(CLIPS, {'t': x}, tmp_path, progress=False) == []
    assert x.calls == ['bb', 'nothing', 'ccc'] and stored(tmp_path) == WANT
    again = Count()
    extract(CLIPS, {'t': again}, tmp_path, progress=False)
    assert again.calls == [] and stored(tmp_path) == WANT


def test_only_what_changed_is_made_again(tmp_path):
    extract(CLIPS, {'t': Count()}, tmp_path, progress=False)
    changed = [
        CLIPS[0],
        Clip('u1', 'd', transcript='nothing'),
        Clip('u2', 'd', transcript='dddd'),
        *CLIPS[3:],
    ]
    x = Count()
    extract(changed, {'t': x}, tmp_path, progress=False)
    assert x.calls == ['nothing', 'dddd'] and stored(tmp_path) == {
        'u0.npy': [1.0] * 3,
        'u1': None,
        'u2.npy': [4.0] * 3,
        'u3': None,
        'u4.npy': [3.0] * 3,
    }
    other = Count('two')
    extract(changed, {'t': other}, tmp_path, progress=False)
    assert len(other.calls) == 4


def test_a_broken_clip_leaves_no_old_features(tmp_path):
    extract(CLIPS, {'t': Count()}, tmp_path, progress=False)
    bad = extract(
        [Clip('u0', 'd', transcript='broken'), *CLIPS[1:]], {'t': Count()}, tmp_path, progress=False
    )
    assert bad == ['utterance u0: found a broken one'] and 'u0.npy' not in stored(tmp_path)
    extract(CLIPS, {'t': Count()}, tmp_path, progress=False)
    assert stored(tmp_path) == WANT


def test_features_of_others_are_not_written_over(tmp_path):
    top = tmp_path / 'features' / 'count-UTT'
    top.mkdir(parents=True)
    np.save(top / 'u0.npy', np.ones(3))
    with pytest.raises(
        DataError, match='count-UTT: found features or labels that were not extracted here'
    ):
        extract(CLIPS, {'t': Count()}, tmp_path, progress=False)
    assert np.load(top / 'u0.npy').tolist() == [1.0] * 3


LABELLED = [
    Clip(
        f'Ses0{s}_{k}',
        f'Ses0{s}',
        transcript='x' * (k + 1),
        label='sad' if k else '0',
        speaker='FM'[k],
    )
    for s in (1, 2)
    for k in (0, 1)
]


def test_labels_are_checked_first_and_written_last(tmp_path):
    for change, said in [
        (
            dict(label='glad'),
            "found label 'glad', expected happy, sad, neutral, angry or its number",
        ),
        (dict(label=''), 'found no label'),
        (dict(label='1.5'), 'found label 1.5, expected a whole number'),
        (dict(label='7'), 'found label 7'),
        (dict(speaker='X'), "found speaker 'X', expected F or M"),
        (dict(dialogue='Tes'), 'expected the session, 1 to 5'),
        (dict(split='val'), 'expected one'),
    ]:
        x = Count()
        with pytest.raises(DataError, match=re.escape(said)):
            to_layout(
                [Clip(**{**vars(LABELLED[0]), **change}), *LABELLED[1:]],
                {'t': x},
                tmp_path,
                'iemocap',
                progress=False,
            )
        assert x.calls == []
    broken = [Clip(**{**vars(LABELLED[0]), 'transcript': 'broken'}), *LABELLED[1:]]
    label = tmp_path / 'IEMOCAP' / 'IEMOCAP_features_raw_4way.pkl'
    with pytest.raises(DataError, match='1 problem: utterance Ses01_0: found a broken one'):
        to_layout(broken, {'t': Count()}, tmp_path, 'iemocap', progress=False)
    assert not label.exists()
    folder, bad = to_layout(broken, {'t': Count()}, tmp_path, 'iemocap', skip=True, progress=False)
    d, problems = read_layout(folder, 'iemocap', {'t': 'count-UTT'}, progress=False)
    assert (
        bad
        and problems == []
        and d.present[:, 0].tolist() == [False, True, True, True]
        and d.label.tolist() == [0, 1, 0, 1]
        and d.speaker.tolist() == [0, 1, 0, 1]
    )
    assert label.exists() and not list(folder.glob('.labels*')) and (folder / 'clips.json').exists()


def test_scores_with_parts_are_a_dataset_too(tmp_path):
    scored = [
        Clip(
            f'u{k}',
            f'd{k // 2}',
            transcript='abc'[: k + 1],
            label=str(k / 2 - 1),
            split=('train', 'val', 'test')[k // 2],
        )
        for k in range(6)
    ]
    folder, _ = to_layout(scored, {'t': C.minilm()}, tmp_path, 'mosi', progress=False)
    d, problems = read_layout(folder, 'mosi', progress=False)
    assert (
        problems == []
        and d.part == ('train', 'val', 'test')
        and d.label.tolist() == [-1, -0.5, 0, 0.5, 1, 1.5]
    )


def test_a_table_has_the_columns_that_clips_have(tmp_path):
    path, bad = to_table(
        [*CLIPS, Clip('u9', 'e', transcript='broken')],
        {'t': Count()},
        tmp_path,
        skip=True,
        progress=False,
    )
    t = pd.read_csv(path, keep_default_na=False)
    assert list(t.columns) == ['utterance', 'dialogue', 'position', 't'] and t.t.tolist() == [
        'features/count-UTT/u0.npy',
        'features/count-UTT/u1.npy',
        '',
        '',
        'features/count-UTT/u4.npy',
        '',
    ]
    assert bad == ['utterance u9: found a broken one'] and t.position.tolist() == [0, 1, 2, 3, 4, 0]
    path, _ = to_table(LABELLED, {'t': Count()}, tmp_path / 'x', progress=False)
    assert list(pd.read_csv(path, dtype=str).columns) == [
        'utterance',
        'dialogue',
        'position',
        'speaker',
        'label',
        't',
    ]
    with pytest.raises(DataError, match='1 problem'):
        to_table(
            [Clip('u9', 'e', transcript='broken')], {'t': Count()}, tmp_path / 'y', progress=False
        )
    assert not (tmp_path / 'y' / 'features.csv').exists()


def test_a_release_is_not_written_over(tmp_path):
    (tmp_path / 'IEMOCAP').mkdir()
    (tmp_path / 'IEMOCAP' / 'IEMOCAP_features_raw_4way.pkl').write_bytes(b'theirs')
    with pytest.raises(DataError, match='that were not extracted here'):
        to_layout(LABELLED, {'t': C.minilm()}, tmp_path, 'iemocap', progress=False)
    assert (tmp_path / 'IEMOCAP' / 'IEMOCAP_features_raw_4way.pkl').read_bytes() == b'theirs'


# --- clips in the wild ---


@pytest.fixture(scope='module')
def sound_copies(tmp_path_factory):
    "One clip of every kind that can be cut: 1 s of sound, 40 frames, a picture."
    top = tmp_path_factory.mktemp('sound')
    for kind in ('wav', 'aiff', 'flac', 'ogg', 'mp3'):
        sf.write(top / f'x.{kind}', tone(RATE, 1.0), RATE)
    for kind in ('avi', 'mkv'):
        out = cv2.VideoWriter(str(top / f'x.{kind}'), cv2.VideoWriter_fourcc(*'MJPG'), 25, (64, 48))
        for k in range(40):
            out.write(np.full((48, 64, 3), 6 * k, np.uint8))
        out.release()
    picture = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    for kind in ('jpg', 'png', 'bmp'):
        (top / kind).mkdir()
        cv2.imwrite(str(top / kind / f'x.{kind}'), picture)
    return top


KINDS = ('wav', 'aiff', 'flac', 'ogg', 'mp3', 'avi', 'mkv', 'jpg', 'png', 'bmp')


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=6, deadline=None)
@given(share=st.floats(0, 0.85))
def test_a_cut_copy_is_refused_wherever_it_is_cut(tmp_path_factory, sound_copies, kind, share):
    # a tenth of the samples of a short mp3 is in the last fifth of its bytes
    share *= 0.9 if kind == 'mp3' else 1
    whole = next(sound_copies.rglob(f'x.{kind}'))
    cut = tmp_path_factory.getbasetemp() / 'cut' / f'cut.{kind}'
    cut.parent.mkdir(exist_ok=True)
    for old in cut.parent.iterdir():
        old.unlink()
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    read, what = (read_wav, cut) if kind in KINDS[:5] else (read_frames, cut)
    if kind in KINDS[7:]:
        what = cut.parent  # a folder of frames
    with pytest.raises(DataError, match=re.escape(f'{cut}: found')):
        read(what)


def test_what_is_cut_is_said_with_how_much_is_there(tmp_path, sound_copies):
    for kind, said in {
        'wav': '16000 of the 32000 bytes that its header claims, expected all of them: the file is '
        'cut, copy it again',
        'mkv': '20 of the 40 frames that its header claims',
        'jpg': 'a cut picture, expected all of it: copy it again',
    }.items():
        whole = next(sound_copies.rglob(f'x.{kind}')).read_bytes()
        half = 44 + 16000 if kind == 'wav' else len(whole) // 2
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f'x.{kind}').write_bytes(whole[:half])
        with pytest.raises(DataError, match=re.escape(f'x.{kind}: found {said}')):
            where = tmp_path / kind / f'x.{kind}'
            read_wav(where) if kind == 'wav' else read_frames(
                where.parent if kind == 'jpg' else where
            )


@pytest.mark.parametrize('claim', [2**32 - 1, 2**31 - 1, 2**31 - 4096])
def test_a_header_written_before_the_length_was_known_claims_nothing(tmp_path, sound_copies, claim):
    raw = bytearray((sound_copies / 'x.wav').read_bytes())
    raw[40:44] = claim.to_bytes(4, 'little')
    (tmp_path / 'x.wav').write_bytes(raw)
    assert np.array_equal(read_wav(tmp_path / 'x.wav'), read_wav(sound_copies / 'x.wav'))


@pytest.mark.parametrize('said', [b'', b'stream 1, offset 0x16e1a: partial file\n'])
def test_a_cut_video_has_no_sound_although_ffmpeg_goes_on(tmp_path, monkeypatch, said):
    def ffmpeg(args, **_):  # decodes what is there
        sf.write(args[-1], tone(RATE), RATE, subtype='FLOAT')
        return subprocess.CompletedProcess(args, 0, b'', said)

    (tmp_path / 'a b.mp4').write_bytes(b'x')
    monkeypatch.setattr(C.shutil, 'which', lambda _: 'ffmpeg')
    monkeypatch.setattr(C.subprocess, 'run', ffmpeg)
    if said:
        with pytest.raises(
            DataError, match='a b.mp4: found a file that ends early, expected all of it'
        ):
            read_wav(tmp_path / 'a b.mp4')
    else:
        assert len(read_wav(tmp_path / 'a b.mp4')) == RATE // 2


def test_a_video_that_does_not_say_its_length_is_counted(tmp_path):
    pictures = [np.full((48, 64, 3), 6 * k, np.uint8) for k in range(40)]
    raw = b''.join(cv2.imencode('.jpg', x)[1].tobytes() for x in pictures)
    (tmp_path / 'x.mjpeg').write_bytes(raw)
    found = [float(x.mean()) for x in read_frames(tmp_path / 'x.mjpeg', 4)]
    assert np.abs(np.array(found) - [6 * k for k in C.spread(40, 4)]).max() < 4


class Loud(Extractor):
    "Mean and largest value of a sound."

    column, name, key, none = 'wav', 'loud-UTT', '"loud"', 'nothing loud'

    def __call__(self, source):
        x = np.abs(read_wav(source))
        if len(x) == 1234:
            raise RuntimeError('an odd number of samples')
        return None if x.max() < 0.01 else np.array([x.mean(), x.max()], np.float32)


class Light(Extractor):
    "Mean of the frames; a black clip has nobody."

    column, name, key, none = 'frames', 'light-UTT', '"light"', C.NO_FACE

    def __call__(self, source):
        x = np.stack(read_frames(source, 4)).mean((0, 1, 2)).astype(np.float32)
        return x if x.any() else None


def clip_folder(top, faults):
    "Clips u0, u1, ... with sound and frames, each with a fault or None; the table that lists them."
    top.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, fault in enumerate(faults):
        x = np.zeros(1234) if fault == 'odd' else tone(4000, 61 if fault == 'long' else 0.3)
        sf.write(top / f'u{k}.wav', x * (fault != 'quiet'), 4000 if fault != 'odd' else RATE)
        (top / f'f{k}').mkdir()
        level = 0 if fault == 'faceless' else 200
        cv2.imwrite(str(top / f'f{k}' / '0.png'), np.full((40, 40, 3), level, np.uint8))
        for p in (top / f'u{k}.wav', top / f'f{k}' / '0.png'):
            if fault in ('empty', 'cut', 'absent'):
                raw = p.read_bytes()
                p.write_bytes(raw[: len(raw) // 2 if fault == 'cut' else 0])
            if fault == 'absent':
                p.unlink()
        if fault == 'absent':
            (top / f'f{k}').rmdir()
        if fault != 'unlisted':
            rows.append(dict(utterance=f'u{k}', dialogue='d', wav=f'u{k}.wav', frames=f'f{k}'))
    return table(top, rows)


FAULTS = (None, 'absent', 'empty', 'cut', 'long', 'faceless', 'unlisted', 'quiet', 'odd')


@settings(max_examples=8, deadline=None)
@example([*FAULTS, *FAULTS])
@given(st.lists(st.sampled_from(FAULTS), min_size=1, max_size=9).filter(lambda f: None in f))
def test_of_any_faulty_clips_each_is_said_once_and_the_rest_extracted(tmp_path_factory, faults):
    top, said = tmp_path_factory.mktemp('wild'), []
    manifest = clip_folder(top / 'clips', faults)
    of = {f: [k for k, g in enumerate(faults) if g == f] for f in FAULTS}
    if of['absent']:
        with pytest.raises(DataError, match=f'{2 * len(of["absent"])} problems: row'):
            read_manifest(manifest, said.append)
    said.clear()
    clips = read_manifest(manifest, said.append, skip=True)
    by = {'a': Loud(), 'v': Light()}
    _, bad = to_table(clips, by, top / 'out', True, False, said.append)
    lost = sorted(of['absent'] + of['empty'] + of['cut'])
    assert [b.split(':')[0] for b in bad] == [
        f'utterance u{k}'
        for group in (of['absent'], sorted({*lost, *of['odd']} - {*of['absent']}))
        for k in group
    ] + [
        f'utterance u{k}'
        for group in (of['absent'], sorted({*lost} - {*of['absent']}))
        for k in group
    ]
    t = pd.read_csv(top / 'out' / 'features.csv', keep_default_na=False)
    listed = {f'u{k}' for k, f in enumerate(faults) if f != 'unlisted'}
    assert set(t.utterance) == listed
    deaf, blind = (
        {f'u{k}' for f in names for k in of[f]}
        for names in (
            ('absent', 'empty', 'cut', 'odd', 'quiet'),
            ('absent', 'empty', 'cut', 'faceless'),
        )
    )
    assert set(t.utterance[t.get('a', '') != '']) == listed - deaf
    assert set(t.utterance[t.get('v', '') != '']) == listed - blind
    counts = dict(long='longer than 60 s', faceless='with no face', unlisted='no row names')
    for fault, words in counts.items():
        lines = [s for s in said if words in s]
        n = len(of[fault]) * (2 if fault == 'unlisted' else 1)
        assert len(lines) == bool(n) and all(re.search(rf'\b{n} (of|files)', s) for s in lines)


def test_what_was_extracted_from_a_clip_that_is_gone_is_kept(tmp_path):
    manifest = clip_folder(tmp_path / 'clips', [None, None])
    first = {'a': Loud()}
    to_table(read_manifest(manifest), first, tmp_path / 'out', progress=False)
    kept = tmp_path / 'out' / 'features' / 'loud-UTT' / 'u0.npy'
    before = kept.read_bytes()
    (tmp_path / 'clips' / 'u0.wav').unlink()
    clips = read_manifest(manifest, skip=True)
    path, bad = to_table(clips, first, tmp_path / 'out', skip=True, progress=False)
    assert re.search(r'^utterance u0: found no wav at \S+u0.wav .*; what was .* is kept$', bad[0])
    assert len(bad) == 1 and kept.read_bytes() == before and all(pd.read_csv(path).a)
    with pytest.raises(DataError, match=r'1 problem: .* is kept\. Mend these, or skip .*--skip'):
        to_table(clips, first, tmp_path / 'out', progress=False)


def test_a_long_clip_is_named_before_the_work_begins(tmp_path):
    said = []

    class Never(Loud):
        def __call__(self, source):
            assert 'longer than 60 s, such as u1 (61 s)' in said[0]
            raise KeyboardInterrupt

    clips = read_manifest(clip_folder(tmp_path / 'clips', [None, 'long']))
    with pytest.raises(KeyboardInterrupt):
        extract(clips, {'a': Never()}, tmp_path / 'out', progress=False, say=said.append)
    assert said[0].startswith('loud-UTT: 1 of 2 clips')


def test_only_clips_of_the_kind_that_rows_name_are_missed(tmp_path):
    said = []
    manifest = clip_folder(tmp_path, [None])
    (tmp_path / 'notes.txt').write_text('x')
    (tmp_path / 'other.mp4').write_bytes(b'x')
    (tmp_path / 'features').mkdir()
    read_manifest(manifest, said.append)
    assert said == []
    (tmp_path / 'take 2.WAV').write_bytes(b'x')
    read_manifest(manifest, said.append)
    assert said == [
        f"{manifest}: no row names 1 file or folder beside the clips, such as 'take 2.WAV': add "
        'rows if they belong here'
    ]


# --- without the optional packages ---


def test_the_module_imports_nothing_heavy_and_says_what_is_missing():
    code = """
import sys
sys.modules['soundfile'] = None                      # as if it were not installed
import mculora.data.clips as c
assert not {'transformers', 'cv2', 'opensmile', 'pandas'} & set(sys.modules)
try: c.read_wav('x.wav')
except ImportError as e: print(e)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert 'pip install "mculora[clips]"' in done.stdout, done.stderr


# --- the whole way ---


@pytest.mark.slow
def test_from_clips_to_a_probability_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'cache'))
    manifest = write_clips(tmp_path / 'clips', lengths=(3,) * 8)

    def here(*args, rc=0):
        done = CliRunner().invoke(app, list(map(str, args)))
        assert done.exit_code == rc, done.output
        return done.output

    here('data', 'extract', manifest, tmp_path / 'data', '--dataset', 'iemocap')
    assert 'no problems' in here('data', 'check', tmp_path / 'data')
    options = json.dumps(dict(width=16, depth=1, rank=2, epochs=10, lr=3e-3, batch_size=4))
    said = here(
        'train',
        '--data-root',
        tmp_path / 'data',
        '--out-dir',
        tmp_path / 'runs',
        '--fold',
        1,
        '--options',
        options,
    )
    assert 'iemocap, mculora, Session1' in said
    # clips without labels, one of them without any modality, to probabilities
    rows = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    rows = rows[rows.dialogue.str.startswith('Ses01')]
    rows.to_csv(tmp_path / 'clips' / 'few.csv', index=False)
    pd.concat(
        [
            rows.drop(columns='label'),
            pd.DataFrame([dict(utterance='x', dialogue='Ses01_x', speaker='F')]),
        ]
    ).to_csv(tmp_path / 'clips' / 'new.csv', index=False)
    assert f'{len(rows) + 1} clips' in here(
        'data', 'extract', tmp_path / 'clips' / 'new.csv', tmp_path / 'new'
    )
    here(
        'export',
        next((tmp_path / 'runs').rglob('result.json')).parent,
        tmp_path / 'model',
        '--data-root',
        tmp_path / 'data',
    )
    here(
        'predict',
        tmp_path / 'model',
        tmp_path / 'new' / 'features.csv',
        '--output',
        tmp_path / 'said.csv',
    )
    told = pd.read_csv(tmp_path / 'said.csv')
    assert (
        len(told) == len(rows) + 1
        and told.dialogue.iloc[-1] == 'Ses01_x'
        and told.label.isna().tolist() == [False] * len(rows) + [True]
    )
    assert np.allclose(told.filter(like='p_').sum(axis=1)[:-1], 1) and set(
        told.combination.dropna()
    ) > {'atv'}
    # made to be easy; the most frequent class has a quarter
    assert np.mean(told.label[:-1].to_numpy() == rows.label.to_numpy()) > 0.5
    assert f'{len(rows)} clips' in here(
        'data', 'extract', tmp_path / 'clips' / 'few.csv', tmp_path / 'table', '--audio', 'none'
    )
    assert list(pd.read_csv(tmp_path / 'table' / 'features.csv').columns) == [
        'utterance',
        'dialogue',
        'position',
        'speaker',
        'label',
        't',
        'v',
    ]
    # what is wrong is said in one line
    (tmp_path / 'clips' / 'bad.csv').write_text('utterance,dialogue,wav\nu,d,gone.wav\n')
    assert re.search(
        r'^Error: .*bad.csv: 1 problem: row 1, utterance .u.: found no wav',
        here('data', 'extract', tmp_path / 'clips' / 'bad.csv', tmp_path / 'other', rc=2),
    )
    assert 'expected one of iemocap' in here(
        'data', 'extract', manifest, tmp_path / 'other', '--dataset', 'x', rc=2
    )
    assert 'expected the commit' in here(
        'data',
        'extract',
        manifest,
        tmp_path / 'other',
        '--text',
        'microsoft/deberta-large',
        '--audio',
        'none',
        '--face',
        'none',
        rc=2,
    )
    assert re.search(
        "^Error: device: found 'banana'",
        here('data', 'extract', manifest, tmp_path / 'other', '--device', 'banana', rc=2),
    )
    assert not (tmp_path / 'other').exists()
    next((tmp_path / 'clips').glob('*.wav')).write_bytes(b'')
    only = ('--dataset', 'iemocap', '--text', 'none', '--face', 'none')
    assert 'what could be extracted is kept' in here(
        'data', 'extract', manifest, tmp_path / 'data', *only, rc=2
    )
    assert 'left out: utterance' in here(
        'data', 'extract', manifest, tmp_path / 'data', '--skip', *only, rc=1
    )


def test_other_columns_of_a_manifest_are_named_and_left_alone(tmp_path):
    said, rows = [], [GOOD | dict(emotion='x', label='sad', rater='me')]
    pd.DataFrame(rows).to_csv(tmp_path / 'clips.csv', index=False)
    (clip,) = read_manifest(tmp_path / 'clips.csv', said.append)
    assert clip.label == 'sad'
    assert [s.split(': ', 1)[1] for s in said] == ["unused columns: 'emotion', 'rater'"]
