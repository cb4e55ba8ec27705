"""Feature files on disk: every fault is said by name, no pickle runs code, the cache is the fresh
read."""

from dataclasses import replace
import builtins, collections, io, os, pickle, struct, subprocess
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner
from mculora.basics import files
from mculora.data import sources
from mculora.use.cli import app
from mculora.basics.dialogues import DataError, fingerprint, select
from mculora.data.pickles import read_pickle
from mculora.data.sources import (
    LAYOUTS,
    describe,
    example,
    feature_folders,
    find,
    find_all,
    fit_scale,
    load_dialogues,
    load_layout,
    read_labels,
    read_layout,
    read_npy,
    save_dialogues,
    scale,
    write_layout,
)


def written(path, data):
    path.write_bytes(data)
    return path


def tables_of(folder, dataset):
    return folder / LAYOUTS[dataset].labels


# change the tables of a label pickle in place, return its problems
def edit(folder, dataset, change):
    file = tables_of(folder, dataset)
    tables = pickle.loads(file.read_bytes())
    tables = change(tables) or tables
    file.write_bytes(pickle.dumps(tables))
    return '\n'.join(read_labels(folder, dataset)[1])


@pytest.fixture
def iemocap(tmp_path):
    return write_layout(tmp_path, example('iemocap', no_face=0.3))


@pytest.fixture
def mosi(tmp_path):
    return write_layout(tmp_path, example('mosi'))


# --- pickles ---


class Calls:  # pickles as a call of any function
    def __init__(self, f, *args):
        self.call = f, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize(
    'f, args',
    [
        (os.system, ('touch harm',)),
        (builtins.eval, ("open('harm', 'w')",)),
        (builtins.exec, ('1',)),
        (subprocess.Popen, (['touch', 'harm'],)),
        (np.load, ('harm',)),
        (getattr, ('', 'join')),
        (__import__, ('os',)),
        (open, ('harm', 'w')),
        (np.fromfile, ('harm',)),
        (bytearray, (10,)),
        (collections.Counter, ()),
    ],
)
def test_no_pickle_runs_code(tmp_path, monkeypatch, f, args, protocol):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / 'evil.pkl', pickle.dumps([1, Calls(f, *args)], protocol))
    with pytest.raises(
        DataError, match=r'evil.pkl: names .*expected only containers and NumPy arrays'
    ):
        read_pickle(file)
    assert not (tmp_path / 'harm').exists()


@pytest.mark.parametrize(
    'name',
    [
        b'cnumpy\nndarray.tofile',
        b'cnumpy.core.multiarray\nfromfile',
        b'cnumpy\nmemmap',
        b'cbuiltins\nbytes.fromhex',
        b'c__main__\nx',
        b'ccopyreg\n_reconstructor',
        b'iposix\nsystem',
    ],
)
def test_no_other_name_is_known(tmp_path, name):
    with pytest.raises(DataError):
        read_pickle(
            written(tmp_path / 'x.pkl', (b'(' if name[:1] == b'i' else b'') + name + b'\n.')
        )


def test_claims_of_a_terabyte_allocate_nothing(tmp_path):
    huge, dtype = (10**12,), np.dtype('f8')
    for x in (
        Calls(np.ndarray, huge),
        Calls(np.ndarray, huge, dtype),
        Calls(np.zeros(1).__reduce__()[0], np.ndarray, huge, b'b'),
    ):
        assert read_pickle(written(tmp_path / 'x.pkl', pickle.dumps(x))).nbytes == 0

    class State:
        def __init__(self, shape, data, dtype=dtype):
            self.state = (1, shape, dtype, False, data)

        def __reduce__(self):
            return (*np.zeros(1).__reduce__()[:2], self.state)

    for state in (
        State(huge, b'abcdefgh'),
        State((-1, -1), b'abcdefgh'),
        State((2,), [1.0], np.dtype('O')),
        State((10**12,), b'', np.dtype('S0')),
        State((2**62, 4), b''),
    ):
        with pytest.raises(DataError, match='claims shape'):
            read_pickle(written(tmp_path / 'x.pkl', pickle.dumps(state)))
    with pytest.raises(DataError, match='record type|NumPy type'):
        read_pickle(written(tmp_path / 'x.pkl', pickle.dumps(np.zeros(2, [('a', 'f8')]))))


def test_a_list_copied_again_and_again_is_refused(tmp_path):
    big = b'\x80\x03(]q\x01(' + b''.join(b'J' + struct.pack('<i', i) for i in range(2000)) + b'e'
    with pytest.raises(DataError, match='asks for far more'):
        read_pickle(
            written(tmp_path / 'x.pkl', big + b'c__builtin__\nset\nh\x01\x85R' * 200 + b'l.')
        )


@pytest.mark.parametrize('index', [2**31 - 1, 2**32 - 1])
def test_a_huge_memo_index_costs_nothing(tmp_path, index):
    assert (
        read_pickle(written(tmp_path / 'x.pkl', b'\x80\x02]r' + struct.pack('<I', index) + b'.'))
        == []
    )


def test_only_arrays_have_a_state_and_byte_arrays_are_as_long_as_the_file(tmp_path):
    with pytest.raises(DataError, match='sets the state of a OrderedDict'):
        read_pickle(
            written(
                tmp_path / 'x.pkl',
                b'\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x01sb.',
            )
        )
    with pytest.raises(DataError):
        read_pickle(
            written(tmp_path / 'x.pkl', b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'abc')
        )
    assert read_pickle(written(tmp_path / 'x.pkl', pickle.dumps(bytearray(b'abc'), 5))) == b'abc'


@pytest.mark.parametrize(
    'data',
    [
        b']' * 200_000 + b'a' * 199_999 + b'.',
        b'\x80\x02})' + b'\x85' * 200_000 + b'K\x01s.',
        b'(' * 200_000 + b't' * 200_000 + b'.',
    ],
)
def test_deep_nesting_does_not_crash(tmp_path, data):
    try:
        read_pickle(written(tmp_path / 'x.pkl', data))
    except DataError:
        pass


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'.',
        b'\x80',
        b'\x80\x09.',
        b'hello',
        b'PK\x03\x04',
        pickle.dumps({'a': np.arange(9)})[:-4],
        pickle.dumps(['x' * 100])[:40],
        b'\x80\x02K\x01',
        b'Pid\n.',
        b'\x80\x05\x97.',
        b'\x82\x01.',
        b'\x80\x05\x96' + struct.pack('<Q', 2**62) + b'.',
        b'\x80\x04\x8d' + struct.pack('<Q', 2**63) + b'.',
        b'\x80\x04\x95' + struct.pack('<Q', 2**40) + b']',
    ],
)
def test_what_is_no_whole_pickle_is_named(tmp_path, data):
    with pytest.raises(DataError, match='x.pkl: '):
        read_pickle(written(tmp_path / 'x.pkl', data))


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(DataError, match='none.pkl: found no such file'):
        read_pickle(tmp_path / 'none.pkl')
    with pytest.raises(DataError, match='found no such file'):
        read_pickle(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 500), st.integers(0, 255))
def test_damage_gives_a_value_or_a_data_error(tmp_path_factory, noise, at, byte):
    whole = bytearray(pickle.dumps([{'d': ['u', 'v']}, {'d': np.array([1.0, 2.0])}, {'d'}], 2))
    whole[at % len(whole)] = byte
    for data in (bytes(whole), noise):
        try:
            read_pickle(written(tmp_path_factory.getbasetemp() / 'fuzz.pkl', data))
        except DataError:
            pass


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda x: (
        st.lists(x)
        | st.dictionaries(st.text(), x)
        | st.sets(st.text())
        | st.frozensets(st.integers(-(2**63) + 1, 2**63 - 1))
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(values, st.integers(0, 5))
def test_containers_come_back(tmp_path_factory, x, protocol):
    assert (
        read_pickle(written(tmp_path_factory.getbasetemp() / 'c.pkl', pickle.dumps(x, protocol)))
        == x
    )


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(['<f4', '>f8', 'i2', '?', 'U3', 'S4']),
        hnp.array_shapes(min_side=0, max_dims=3, max_side=4),
    ),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_arrays_of_numpy_1_and_2_come_back(tmp_path_factory, x, protocol, fortran, old):
    x = np.asfortranarray(x) if fortran else x
    data = pickle.dumps([x, x.T], protocol)
    # from protocol 4 on, names carry their length
    if old and protocol < 4:
        data = data.replace(b'numpy._core.', b'numpy.core.')
    y, t = read_pickle(written(tmp_path_factory.getbasetemp() / 'a.pkl', data))
    assert y.dtype.newbyteorder('=') == x.dtype.newbyteorder('=')
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(t, x.T)


@pytest.mark.parametrize('protocol', range(6))
def test_scalars_object_arrays_and_ordered_dicts_come_back(tmp_path, protocol):
    x = [
        np.float32(1.5),
        np.int64(-2),
        np.bool_(True),
        np.str_('ä'),
        collections.OrderedDict(b=1, a=2),
    ]
    assert read_pickle(written(tmp_path / 'x.pkl', pickle.dumps(x, protocol))) == x
    y = read_pickle(
        written(
            tmp_path / 'x.pkl', pickle.dumps(np.array([['a', 'bc'], ['', None]], object), protocol)
        )
    )
    assert y.tolist() == [['a', 'bc'], ['', None]]


def test_a_pickle_of_python_2_comes_back(tmp_path):
    floats = np.array([0.5, -2.0])
    head = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS"
    )
    data = b"'" + ''.join(f'\\x{b:02x}' for b in floats.tobytes()).encode() + b"'\ntb."
    np.testing.assert_array_equal(read_pickle(written(tmp_path / 'x.pkl', head + data)), floats)
    assert read_pickle(written(tmp_path / 'x.pkl', b"(lp0\nS'caf\\xe9'\na.")) == ['café']


# --- labels ---

D, U = 'Ses02F_impro01', 'Ses02F_impro01_001'


def put(table, key, value):  # set one entry of one table
    def change(tables):
        tables[table][key] = value

    return change


def put_at(table, key, at, value):
    def change(tables):
        tables[table][key][at] = value

    return change


@pytest.mark.parametrize(
    'change, message',
    [
        (
            put_at(1, D, 1, 4),
            f"dialogue {D}, utterance '{U}': found label 4, expected a whole number from 0 to 3",
        ),
        (put_at(1, D, 1, -1), 'found label -1'),
        (put_at(1, D, 1, 1.5), 'found label 1.5'),
        (put_at(1, D, 1, float('nan')), 'found label nan'),
        (put_at(1, D, 1, None), 'found label None'),
        (put_at(1, D, 1, 'sad'), "found label 'sad'"),
        (put_at(1, D, 1, [1]), 'found label a list'),
        (put_at(1, D, 1, 10**5000), 'found label a int'),
        (
            lambda t: t[1][D].pop() and None,
            (
                f'dialogue {D}: found 4 labels for 5 utterances, expected one each (the first '
                f"without is '{D}_004')"
            ),
        ),
        (lambda t: t[1].pop(D) and None, f'dialogue {D}: found 0 labels for 5 utterances'),
        (lambda t: t[1][D].append(1), 'found 6 labels for 5 utterances'),
        (lambda t: t[2][D].append('F'), 'found 6 speakers for 5 utterances'),
        (put_at(2, D, 1, 'X'), f"utterance '{U}': found speaker 'X', expected F or M"),
        (put_at(2, D, 1, ''), "found speaker ''"),
        (put_at(2, D, 1, 'FM'), "found speaker 'FM'"),
        (put(0, D, []), f'dialogue {D}: found length 0'),
        (put(0, D, 7), f'dialogue {D}: found 7, expected a list'),
        (
            put_at(0, D, 1, '../secret'),
            f"dialogue {D}, utterance '../secret': found a name that is not a plain file name",
        ),
        (put_at(0, D, 1, '/etc/passwd'), 'plain file name'),
        (put_at(0, D, 1, 'a\\b'), 'plain file name'),
        (put_at(0, D, 1, 'x\0'), 'plain file name'),
        (put_at(0, D, 1, '..'), 'plain file name'),
        (put_at(0, D, 1, ''), 'plain file name'),
        (put_at(0, D, 1, 5), 'utterance 5'),
        (put_at(0, D, 1, '\ud800'), 'plain file name'),
        (put_at(0, D, 1, 'u' * 300), 'plain file name'),
        (
            put_at(0, D, 1, D + '_000'),
            f'dialogue {D}, utterance {D}_000: found the same name twice',
        ),
        (put_at(0, 'Ses03F_impro02', 0, U), f'utterance {U}: found the same name twice'),
        (
            lambda t: [{**x, '../Ses01': x[D]} if i < 4 else x for i, x in enumerate(t)],
            "dialogue '../Ses01': found a name that is not a plain file name",
        ),
        (
            lambda t: [{**x, 5: x[D]} if i < 4 else x for i, x in enumerate(t)],
            'dialogue 5: found a name',
        ),
        (
            lambda t: [
                {**x, 'Ses0XF': [v + 'x' if i == 0 else v for v in x[D]]} if i < 4 else x
                for i, x in enumerate(t)
            ],
            "dialogue Ses0XF: found 'X' as its fifth character, expected the session",
        ),
        (
            lambda t: [
                {**x, 'Ses': [v + 'x' if i == 0 else v for v in x[D]]} if i < 4 else x
                for i, x in enumerate(t)
            ],
            "dialogue Ses: found ''",
        ),
        (lambda t: [{}, {}, {}, {}, set(), set()], 'found no dialogue'),
    ],
)
def test_every_label_fault_is_named(iemocap, change, message):
    assert message in edit(iemocap, 'iemocap', change)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            put_at(1, 'video001', 0, 3.2),
            (
                "dialogue video001, utterance 'video001_000': found label 3.2, expected a "
                'number from -3 to 3'
            ),
        ),
        (put_at(1, 'video001', 0, float('inf')), 'found label inf'),
        (put(1, 'video001', np.full(5, np.nan)), 'found label np.float64(nan)'),
        (
            lambda t: t[4].discard('video001'),
            'dialogue video001: found in no part, expected in one of train, val and test',
        ),
        (lambda t: t[6].add('video001'), 'dialogue video001: found in train and test'),
    ],
)
def test_every_score_fault_is_named(mosi, change, message):
    assert message in edit(mosi, 'mosi', change)


@pytest.mark.parametrize(
    'tables, message',
    [
        ([{}] * 5, 'found a list of 5, expected a list of 6'),
        ([{}] * 7, 'found a list of 7'),
        ({'a': 1}, 'found a dict, expected a list of 6'),
        (None, 'found a NoneType'),
        ([[], {}, {}, {}, set(), set()], 'entry 1: found a list, expected a dict'),
        ([{}, {}, {}, {}, set(), 3], 'entry 6: found a int, expected a set'),
    ],
)
def test_a_label_file_of_another_structure_is_refused(iemocap, tables, message):
    tables_of(iemocap, 'iemocap').write_bytes(pickle.dumps(tables))
    with pytest.raises(DataError, match=message):
        read_labels(iemocap, 'iemocap')


def test_dialogues_with_a_fault_are_left_out_and_the_rest_is_described(iemocap):
    edit(iemocap, 'iemocap', put_at(1, D, 1, 9))
    d, bad = read_layout(iemocap, 'iemocap')
    assert len(d) == 4 and D not in d.ids and len(bad) == 1 and '  1 problem:' in describe(d, bad)


def test_a_label_file_with_nothing_sound_gives_no_dialogues(iemocap):
    edit(iemocap, 'iemocap', lambda t: [t[0], {}, *t[2:]])
    d, bad = read_layout(iemocap, 'iemocap')
    assert d is None and len(bad) == 5 and '5 problems' in describe(d, bad)


def test_the_order_of_dialogues_and_sets_does_not_matter(mosi):
    before = fingerprint(read_layout(mosi, 'mosi')[0])
    edit(
        mosi,
        'mosi',
        lambda t: [dict(reversed(x.items())) if i < 4 else sorted(x) for i, x in enumerate(t)],
    )
    assert fingerprint(read_layout(mosi, 'mosi')[0]) == before


# --- feature files ---


def problem(folder, dataset='mosi'):  # the one problem there is
    d, bad = read_layout(folder, dataset)
    assert len(bad) == 1, bad
    return d, bad[0]


V = 'video001_002'


def array(x, **kw):
    f = io.BytesIO()
    np.save(f, x, **kw)
    return f.getvalue()


def claim(shape):  # a header that claims `shape`, and 16 bytes of data
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        f, {'descr': '<f8', 'fortran_order': False, 'shape': shape}
    )
    return f.getvalue() + bytes(16)


def zipped():
    f = io.BytesIO()
    np.savez(f, np.ones(6))
    return f.getvalue()


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'found an empty file'),
        (array(np.ones(6))[:-1], 'found 47 of 48 bytes'),
        (array(np.ones(6))[:20], 'no readable .npy'),
        (b'garbage', 'no readable .npy'),
        (zipped(), 'no readable .npy'),
        (
            array(np.array(['x'], object), allow_pickle=True),
            'found values of type object, expected numbers',
        ),
        (array(np.array(['x'])), 'found values of type <U1'),
        (array(np.ones(6, complex)), 'found values of type complex128'),
        (array(np.zeros(2, [('a', 'f4')])), 'found values of type'),
        (array(np.float32(1)), r'found shape (), expected (width,) or (frames, width)'),
        (array(np.ones((2, 3, 6))), 'found shape (2, 3, 6)'),
        (array(np.ones((0, 6))), 'found shape (0, 6)'),
        (array(np.ones(0)), 'found shape (0,)'),
        (claim((10**12,)), 'found 16 of 8000000000000 bytes'),
        (claim((-2,)), 'found shape (-2,)'),
        (array(np.ones(5)), 'found width 5, expected 6 as in most files'),
        (array(np.array([1, 2, np.nan, 4, 5, 6])), 'found NaN or infinity'),
        (array(np.array([[1.0] * 6, [np.inf] * 6])), 'found NaN or infinity'),
        (array(np.full(6, 1e300)), 'found NaN or infinity'),
    ],
)
def test_every_file_fault_is_named(mosi, data, message):
    written(mosi / 'features' / 'deberta-UTT' / f'{V}.npy', data)
    d, said = problem(mosi)
    assert message in said and said.startswith(f'deberta-UTT/{V}'), said
    i = d.utterances.index(V)
    assert not d.present[i, 1] and d.present.sum() == d.present.numel() - 1


def test_a_missing_file_is_a_problem_and_a_missing_face_is_not(mosi, iemocap):
    (mosi / 'features' / 'manet_UTT' / f'{V}.npy').unlink()
    assert problem(mosi)[1] == f'manet_UTT/{V}.npy: found no such file, expected one per utterance'
    d, bad = read_layout(iemocap, 'iemocap')
    faces = d.present[:, 2]
    assert not bad and not faces.all() and faces.any() and d.features['v'][~faces].abs().sum() == 0
    u = d.utterances[int(faces.nonzero()[0])]
    # an empty folder is an absent face, too
    for f in (iemocap / 'features' / 'manet_UTT' / u).iterdir():
        f.unlink()
    assert not read_layout(iemocap, 'iemocap')[0].present[int(faces.nonzero()[0]), 2]


def test_a_link_to_nowhere_and_a_folder_in_the_place_of_a_file_are_problems(mosi):
    file = mosi / 'features' / 'manet_UTT' / f'{V}.npy'
    file.unlink()
    file.symlink_to('/nowhere/at/all')
    assert 'found a link that leads out of' in problem(mosi)[1]
    file.unlink()
    file.symlink_to('nothing.npy')
    assert 'no readable .npy' in problem(mosi)[1]
    file.unlink()
    file.mkdir()
    assert 'found a folder, expected a file' in problem(mosi)[1]


def test_folders_may_be_links_and_files_to_their_own_folder(iemocap, tmp_path):
    fresh = fingerprint(read_layout(iemocap, 'iemocap')[0])
    away = tmp_path / 'another disk'
    away.mkdir()
    for folder in (iemocap / 'features' / 'wav2vec-UTT', iemocap / 'features', iemocap):
        folder.rename(away / folder.name)
        folder.symlink_to(away / folder.name)
    (tmp_path / 'root').symlink_to(tmp_path)
    f = next((iemocap / 'features' / 'deberta-UTT').iterdir())
    f.rename(f.with_name('kept'))
    f.symlink_to('kept')
    assert (
        fingerprint(load_layout(tmp_path / 'root', 'iemocap', cache_dir=tmp_path / 'cache'))
        == fresh
    )


def test_a_modality_of_which_nothing_can_be_read_is_a_problem(mosi):
    for f in (mosi / 'features' / 'manet_UTT').iterdir():
        f.unlink()
    d, bad = read_layout(mosi, 'mosi')
    assert len(bad) == len(d.utterances) + 1 and "features 'v': no utterance has them" in bad[-1]
    with pytest.raises(DataError, match='mosi: 22 problems: .*; ...'):
        load_layout(mosi.parent, 'mosi')
    assert 'and 2 more' in describe(d, bad)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(
            [np.float16, np.float32, np.float64, np.int16, np.uint8, np.bool_, np.dtype('>f8')]
        ),
        hnp.array_shapes(max_dims=2, max_side=6),
    ).filter(
        lambda x: (
            np.isfinite(x.astype(np.float64)).all() and np.abs(x.astype(np.float64)).max() < 1e38
        )
    ),
    st.booleans(),
)
def test_a_file_is_the_mean_of_its_frames(tmp_path_factory, x, fortran):
    file = tmp_path_factory.getbasetemp() / 'mean.npy'
    np.save(file, np.asfortranarray(x) if fortran else x)
    got = read_npy(file)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(
        got,
        x.astype(np.float64).mean(0).astype(np.float32) if x.ndim == 2 else x.astype(np.float32),
    )


# the first utterance of a speaker whose face is there: number, folder
def faces_of(folder, speaker):
    d, _ = read_layout(folder, 'iemocap')
    i = int((d.present[:, 2] & (d.speaker == speaker)).nonzero()[0])
    return i, folder / 'features' / 'manet_UTT' / d.utterances[i]


@pytest.mark.parametrize('speaker, own, other', [(0, 'F', 'M'), (1, 'M', 'F')])
def test_the_face_of_the_speaker_counts(iemocap, speaker, own, other):
    i, face = faces_of(iemocap, speaker)

    def read(**files):
        for f in face.iterdir():
            f.unlink()
        for name, x in files.items():
            np.save(face / f'{name}.npy', np.asarray(x, float))
        d, bad = read_layout(iemocap, 'iemocap')
        return bad or (d.features['v'][i].tolist() if d.present[i, 2] else None)

    assert read(**{f'compress_{own}': [1.0] * 5, f'compress_{other}': [9.0] * 5}) == [1.0] * 5
    # frames are averaged, files too
    assert (
        read(
            **{
                f'{own}_001': [1.0] * 5,
                f'{own}_002': [[2.0] * 5, [4.0] * 5],
                f'{other}_001': [9.0] * 5,
            }
        )
        == [2.0] * 5
    )
    assert read(**{f'compress_{other}': [9.0] * 5}) is None
    assert 'found neither letter F nor M in its name' in read(compress=[1.0] * 5)[0]
    assert 'found both letters F and M in its name' in read(F_M=[1.0] * 5)[0]
    assert (
        'found width 4, expected 5' in read(**{f'{own}_001': [1.0] * 5, f'{own}_002': [1.0] * 4})[0]
    )
    assert 'found NaN' in read(**{f'{own}_001': [1.0] * 5, f'{own}_002': [np.nan] * 5})[0]
    (face / 'notes.txt').write_text('not a feature')
    # the NaN is still there, the note is none of our business
    assert read_layout(iemocap, 'iemocap')[1] != []


def test_without_speakers_all_frame_files_are_averaged(tmp_path):
    d = example('mosi', no_face=0.3)
    folder = write_layout(tmp_path, d)
    i = int(d.present[:, 2].nonzero()[0])
    face = folder / 'features' / 'manet_UTT' / d.utterances[i]
    np.save(face / 'compress_.npy', np.zeros(5))
    np.save(face / 'second.npy', np.full(5, 2.0))
    back, bad = read_layout(folder, 'mosi')
    assert not bad and torch.equal(back.features['v'][i], torch.ones(5))


# --- which folder is which modality, and what is missing ---


def test_folders_are_recognised_or_chosen(tmp_path):
    top = tmp_path / 'features'
    for f in ('HuBERT-large', 'roberta_4', 'spectrogram_UTT'):
        (top / f).mkdir(parents=True)
    assert feature_folders(tmp_path) == {
        'a': 'HuBERT-large',
        't': 'roberta_4',
        'v': 'spectrogram_UTT',
    }
    assert list(feature_folders(tmp_path, {'gaze': 'spectrogram_UTT', 'a': 'roberta_4'})) == [
        'gaze',
        'a',
    ]
    (top / 'mine').mkdir()
    with pytest.warns(UserWarning, match='mine left out'):
        feature_folders(tmp_path)
    (top / 'wavlm').mkdir()
    with pytest.raises(
        DataError,
        match=r"features 'a': found 2 candidates \(HuBERT-large, wavlm\).*choose with features=",
    ):
        feature_folders(tmp_path)
    for f in ('nope', '..', '../features/mine', str(top / 'mine')):
        with pytest.raises(
            DataError,
            match='found no folder .*HuBERT-large, mine, roberta_4, spectrogram_UTT, wavlm',
        ):
            feature_folders(tmp_path, {'a': f})
    with pytest.raises(DataError, match='found no modality'):
        feature_folders(tmp_path, {})


def test_folders_that_nobody_knows_are_a_question(tmp_path):
    (tmp_path / 'features' / 'mine').mkdir(parents=True)
    with pytest.raises(
        DataError, match='no folder is named for a known extractor; choose with .* has mine'
    ):
        feature_folders(tmp_path)


def test_what_is_missing_is_said_with_what_is_there(mosi):
    root = mosi.parent
    with pytest.raises(DataError, match='nowhere: found no such folder'):
        load_layout(root / 'nowhere', 'mosi')
    with pytest.raises(DataError, match='CMUMOSEI: found no such folder.* has CMUMOSI'):
        load_layout(root, 'mosei')
    with pytest.raises(
        DataError, match="found 'moshi', expected one of iemocap, iemocap6, mosi, mosei"
    ):
        find('moshi', root)
    assert (
        find('mosei', root) is None
        and find('mosi', root) == mosi
        and find_all(root) == find_all(mosi) == [('mosi', mosi)]
        and find_all(root / 'nowhere') == []
    )
    (mosi / 'features').rename(mosi / 'feature')
    with pytest.raises(
        DataError, match='features: found no such folder.*CMUMOSI_features_raw_2way.pkl, feature'
    ):
        load_layout(root, 'mosi')
    (mosi / 'feature').rename(mosi / 'features')
    tables_of(mosi, 'mosi').unlink()
    with pytest.raises(
        DataError,
        match=(
            'raw_2way.pkl: found no such file, expected the label pickle of mosi; .* has features'
        ),
    ):
        load_layout(root, 'mosi')


@pytest.mark.parametrize('dataset', list(LAYOUTS))
@pytest.mark.parametrize(
    'widths', [{'a': 3, 't': 4, 'v': 2}, {'a': 3, 't': 4}, {'eeg': 2, 'a': 3, 't': 4, 'v': 5}]
)
def test_what_is_written_is_read_back(tmp_path, dataset, widths):
    d = example(dataset, lengths=(1, 4, 2, 3, 2, 1), widths=widths, no_face=0.3, seed=3)
    folder = write_layout(tmp_path, d)
    names = {'a': 'wav2vec-UTT', 't': 'deberta-UTT', 'v': 'manet_UTT'}
    back, bad = read_layout(folder, dataset, {m: names.get(m, m) for m in widths})
    assert (
        not bad
        and fingerprint(back) == fingerprint(d)
        and back.utterances == d.utterances
        and back.task.views == {m: names.get(m, m) for m in widths}
    )


def test_nothing_is_written_outside_the_folder(tmp_path):
    d = example('mosi')
    with pytest.raises(DataError, match='plain file name'):
        write_layout(tmp_path, replace(d, utterances=('../x', *d.utterances[1:])))


def test_a_picture_of_the_sound_is_not_called_a_face(tmp_path):
    folder = write_layout(
        tmp_path,
        example('iemocap'),
        {'a': 'egemaps-UTT', 't': 'minilm-UTT', 'v': 'spectrogram_UTT'},
    )
    assert 'a picture of the sound, not a face' in describe(*read_layout(folder, 'iemocap'))


# --- cache ---


@pytest.fixture
def counted(monkeypatch):  # how often the sources were read
    reads, read = [], sources.read_layout
    monkeypatch.setattr(sources, 'read_layout', lambda *args: reads.append(1) or read(*args))
    return reads


def test_the_cache_is_the_fresh_read(iemocap, tmp_path, counted):
    fresh = read_layout(iemocap, 'iemocap')[0]
    for _ in range(3):
        d = load_layout(tmp_path, 'iemocap', cache_dir=tmp_path / 'cache')
        assert fingerprint(d) == fingerprint(fresh) and (
            d.task,
            d.utterances,
            d.part,
            d.modalities,
        ) == (fresh.task, fresh.utterances, fresh.part, fresh.modalities)
    assert len(counted) == 1 and len(list((tmp_path / 'cache').iterdir())) == 1


def test_the_cache_is_left_when_any_source_changes(mosi, tmp_path, counted):
    def load(features=None):
        return load_layout(tmp_path, 'mosi', features, cache_dir=tmp_path / 'cache')

    load()
    file = mosi / 'features' / 'manet_UTT' / f'{V}.npy'
    # same size, other content
    np.save(file, np.arange(5, dtype=np.float32))
    d = load()
    assert (
        torch.equal(d.features['v'][d.utterances.index(V)], torch.arange(5.0)) and len(counted) == 2
    )
    edit(mosi, 'mosi', put_at(1, 'video001', 0, 2.5))
    d = load()
    assert d.label[d.utterances.index('video001_000')] == 2.5 and len(counted) == 3
    assert (
        load({'a': 'wav2vec-UTT'}).modalities == ('a',)
        and load({'x': 'wav2vec-UTT'}).modalities == ('x',)
        and load().modalities == ('a', 't', 'v')
    )
    file.unlink()
    with pytest.raises(DataError, match='found no such file'):
        load()


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[:-7],
        lambda b: b[:5],
        lambda b: b'',
        lambda b: b'\xff' * len(b),
        lambda b: b.replace(b'"offset"', b'"offsex"'),
        lambda b: b.replace(b'\\"part\\"', b'\\"pxrt\\"'),
    ],
)
def test_a_damaged_cache_is_read_again(mosi, tmp_path, counted, damage):
    d = load_layout(tmp_path, 'mosi', cache_dir=tmp_path / 'cache')
    (file,) = (tmp_path / 'cache').iterdir()
    whole = file.read_bytes()
    # a new file: the old one is still mapped
    file.unlink()
    file.write_bytes(damage(whole))
    with pytest.raises(DataError):
        load_dialogues(file)
    assert fingerprint(load_layout(tmp_path, 'mosi', cache_dir=tmp_path / 'cache')) == fingerprint(
        d
    )
    assert len(counted) == 2 and fingerprint(load_dialogues(file)) == fingerprint(d)


def test_a_cache_that_cannot_be_written_is_a_warning(mosi, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.warns(UserWarning, match='cannot keep a copy'):
        load_layout(tmp_path, 'mosi', cache_dir=tmp_path / 'file')

    def full(*args, **kw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files, 'save_file', full)
    with pytest.warns(UserWarning, match='No space left'):
        load_layout(tmp_path, 'mosi', cache_dir=tmp_path / 'cache')
    # nothing half-written stays
    assert list((tmp_path / 'cache').iterdir()) == []


def test_the_environment_says_where_the_cache_is(mosi, tmp_path, monkeypatch):
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'elsewhere'))
    load_layout(tmp_path, 'mosi')
    assert len(list((tmp_path / 'elsewhere').iterdir())) == 1


def test_saved_dialogues_need_not_be_contiguous_or_apart(tmp_path):
    d = example('iemocap6', widths={'a': 3, 'v': 3})
    both = torch.cat(list(d.features.values()), -1)
    d = replace(d, features={'v': both[:, :3], 'a': both[:, 3:]}, encoded=True)
    back = load_dialogues(save_dialogues(d, tmp_path / 'sub' / 'x.safetensors'))
    assert (
        fingerprint(back) == fingerprint(d)
        and back.encoded
        and back.modalities == ('v', 'a')
        and back.task == d.task
    )


# --- scale ---


def test_the_scale_comes_from_the_training_part_only():
    d = example('mosi', no_face=0.3)
    train, rest = select(d, [0, 1, 2]), select(d, [3, 4])
    stats = fit_scale(train)
    before = scale(train, stats)
    for x in rest.features.values():
        x.mul_(1e6)
    after = fit_scale(train)
    assert all(torch.equal(a, b) for m in stats for a, b in zip(stats[m], after[m]))
    for k, m in enumerate(d.modalities):
        here = before.features[m][before.present[:, k]].double()
        torch.testing.assert_close(here.mean(0), torch.zeros_like(here[0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(here.std(0, correction=0), torch.ones_like(here[0]))
        assert not before.features[m][~before.present[:, k]].any()
        back = (before.features[m].double() * stats[m][1] + stats[m][0])[train.present[:, k]]
        torch.testing.assert_close(back.float(), train.features[m][train.present[:, k]])
    with pytest.raises(DataError, match='expected a, t, v as in training'):
        scale(replace(d, features={'a': d.features['a']}), stats)


def test_constant_and_absent_features_keep_their_unit():
    d = example('mosi', widths={'a': 2, 'v': 2})
    constant = replace(d, features={**d.features, 'a': torch.full_like(d.features['a'], 0.1)})
    _, std = fit_scale(constant)['a']
    assert (
        torch.equal(std, torch.ones(2, dtype=torch.float64))
        and scale(constant, fit_scale(constant)).features['a'].abs().max() < 1e-7
    )
    absent = replace(
        d,
        present=d.present & torch.tensor([True, False]),
        features={**d.features, 'v': torch.zeros_like(d.features['v'])},
    )
    assert [x.tolist() for x in fit_scale(absent)['v']] == [[0, 0], [1, 1]] and torch.isfinite(
        scale(absent, fit_scale(absent)).features['v']
    ).all()


# --- report and command line ---


def test_the_report_counts_what_is_odd(tmp_path):
    d = example('iemocap')
    d.features['a'][3] = 0
    d.features['t'][:, 2] = 7.0
    text = describe(*read_layout(write_layout(tmp_path, d), 'iemocap'))
    for part in (
        'iemocap: 5 dialogues, 21 utterances',
        'a: wav2vec-UTT, width 4, present 100.0%, 1 all-zero vector, 0 constant columns',
        '0 all-zero vectors, 1 constant column',
        'labels: happy',
        'dialogue length: min 2, median 4, mean 4.2, max 7',
        'Session2: 1 dialogue, 5 utterances',
        '5 folds, tested on Session1',
        'no problems',
    ):
        assert part in text
    assert 'negative' in describe(example('mosei')) and 'train: 3 dialogues' in describe(
        example('mosei')
    )


def test_the_exit_code_says_sound_problems_or_nothing(tmp_path, mosi, iemocap):
    def check(*args):
        return CliRunner().invoke(app, ['data', 'check', *map(str, args)])

    sound = check(tmp_path)
    assert sound.exit_code == 0 and 'iemocap: ' in sound.output and 'mosi: ' in sound.output
    (mosi / 'features' / 'deberta-UTT' / f'{V}.npy').unlink()
    assert check(tmp_path).exit_code == check(mosi).exit_code == 1 and check(iemocap).exit_code == 0
    assert f'deberta-UTT/{V}.npy: found no such file' in check(mosi).output
    assert (
        check(mosi, '--features', 'a=wav2vec-UTT').exit_code == 0
        and check(mosi, '--features', 'a=nope').exit_code == 1
    )
    tables_of(iemocap, 'iemocap').write_bytes(pickle.dumps(Calls(os.system, 'true')))
    assert (
        check(iemocap).exit_code == 1
        and 'system, expected only containers' in check(iemocap).output
    )
    (tmp_path / 'empty').mkdir()
    for path, found in [('empty', 'no dataset'), ('nowhere', 'no such file or folder')]:
        nothing = check(tmp_path / path)
        assert (
            nothing.exit_code == 2
            and f'found {found}' in nothing.output
            and 'Traceback' not in nothing.output
        )
    assert check(mosi, '--features', 'a').exit_code == 2
