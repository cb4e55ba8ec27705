"The twins: the posterior is exact, the limits behave like limits, and a twin keeps its bits."

from dataclasses import replace
from itertools import product
import numpy as np
import pytest
import torch
from mculora.data import sources
from mculora.basics.dialogues import DataError, fingerprint, random_dialogues, split
from mculora.basics.modalities import labels, members
from mculora.data.twins import (
    SHAPES,
    SPECS,
    Shape,
    Spec,
    bayes_limit,
    chance,
    columns,
    draw_latents,
    draw_lengths,
    draw_turns,
    features,
    frame,
    limits,
    log_likelihood,
    measure,
    moments,
    open_dataset,
    oracle,
    posterior,
    repo_root,
    simulate,
    states,
    twin,
)

NAMES = tuple(SPECS)
FOUR = Spec(
    prior=(2, 1, 1),
    classes=('x', 'y', 'z'),
    common={'a': 1.0, 't': 1.5, 'v': 0.6, 'brain': 0.8},
    unique={'brain': 0.7},
    synergy={('a', 'brain'): 0.5, ('t', 'v'): 0.3},
    pair_width=2,
)
TWO = Spec(
    prior=(0.3, 0.2, 0.5),
    scores=(-1.0, 0.0, 1.0),
    common={'text': 1.2, 'face': 0.5},
    synergy={('text', 'face'): 0.6},
    rho=0.2,
)
ONE = Spec(prior=(0.5, 0.5), classes=('no', 'yes'), common={'x': 1.0}, rho=0.0)


def metric(s):
    return 'WA' if s.classes else 'ACC'


@pytest.fixture(scope='module')
def full():
    return {n: twin(n) for n in NAMES}


def enumerated(s, ll, speaker):
    "Marginals from the sum over every sequence of labels of one dialogue."
    C, p, out = len(s.prior), s.pi.numpy(), np.zeros(ll.shape)
    T, lik = s.rho * np.eye(C) + (1 - s.rho) * p, ll.exp().numpy()
    for seq in product(range(C), repeat=len(ll)):
        w, last = 1.0, {}
        for n, (c, k) in enumerate(zip(seq, speaker.tolist())):
            w, last[k] = w * (T[last[k], c] if k in last else p[c]) * lik[n, c], c
        out[np.arange(len(seq)), seq] += w
    return torch.from_numpy(out / out.sum(1, keepdims=True))


@pytest.mark.parametrize(
    's',
    [SPECS['iemocap'], FOUR, TWO, ONE, replace(FOUR, rho=1.0)],
    ids=['iemocap', 'four', 'two', 'one', 'never changes'],
)
def test_posterior_is_the_sum_over_all_label_sequences(s):
    rng, speaker, M = np.random.default_rng(0), torch.tensor([0, 1, 0, 0]), len(s.common)
    z = draw_latents(s, torch.from_numpy(rng.integers(len(s.prior), size=4)), rng)
    # each utterance has its own modalities, or none
    mixed = torch.from_numpy(rng.random((4, M)) < 0.5)
    mixed[2] = False
    for present in [*(row.expand(4, M) for row in members(M)), mixed]:
        p = posterior(s, z, torch.tensor([0, 4]), speaker, present)
        assert (p - enumerated(s, log_likelihood(s, z, present), speaker)).abs().max() < 1e-10
        torch.testing.assert_close(p.sum(-1), torch.ones(4).double())


def test_log_likelihood_is_that_of_scipy():
    from scipy.stats import multivariate_normal

    (mu, Sigma), cols, rng = moments(FOUR), columns(FOUR), np.random.default_rng(0)
    z = draw_latents(FOUR, torch.tensor([0, 1, 2, 0]), rng)
    for row in members(4):
        S = torch.cat([c for c, here in zip(cols.values(), row.tolist()) if here])
        want = torch.tensor(
            np.array(
                [
                    multivariate_normal(mu[c, S].numpy(), Sigma[c][S][:, S].numpy()).logpdf(
                        z[:, S].numpy()
                    )
                    for c in range(3)
                ]
            )
        ).T
        got = log_likelihood(FOUR, z, row.expand(4, 4))
        # the constant is the same for every label
        torch.testing.assert_close(got - got[:, :1], want - want[:, :1])


def test_absent_modalities_are_not_looked_at():
    s, rng = SPECS['mosi'], np.random.default_rng(0)
    z = draw_latents(s, torch.arange(7), rng)
    present = torch.tensor([True, False, True]).expand(7, 3)
    other = z.clone()
    other[:, columns(s)['t']] = float('nan')
    assert torch.equal(log_likelihood(s, z, present), log_likelihood(s, other, present))


@pytest.mark.parametrize('s', [*SPECS.values(), FOUR, TWO], ids=[*NAMES, 'four', 'two'])
def test_a_pair_knows_what_neither_of_its_modalities_knows(s):
    only = replace(s, common=dict.fromkeys(s.common, 0.0), unique={})
    (mu, Sigma), cols = moments(only), columns(only)
    for c in cols.values():
        for y in range(len(s.prior)):
            assert torch.equal(Sigma[y][c][:, c], torch.eye(len(c)).double())
    assert not mu.any() and (torch.linalg.eigvalsh(Sigma) > 0).all()
    z = draw_latents(only, torch.arange(300) % len(s.prior), np.random.default_rng(0))
    for row in members(len(cols)):
        ll = log_likelihood(only, z, row.expand(300, -1))
        pair = any(set(p) <= {m for m, here in zip(cols, row.tolist()) if here} for p in s.synergy)
        # flat over the labels unless a pair is complete
        assert (ll.std(-1).max() > 0.1) == pair


@pytest.mark.parametrize('s', [SPECS['iemocap'], FOUR, TWO], ids=['iemocap', 'four', 'two'])
def test_posterior_from_features_is_that_from_latents(s):
    rng, M = np.random.default_rng(0), len(s.common)
    offset, speaker = draw_turns(Shape((('train', 20, 160),), {}, speakers=2), rng)
    z = draw_latents(s, torch.from_numpy(rng.integers(len(s.prior), size=160)), rng)
    w = dict(zip(s.common, (40, 300, 64, 33)))
    d = random_dialogues(lengths=(offset[1:] - offset[:-1]).tolist(), widths=w)
    d = replace(d, features={m: features(s, m, z, w[m], rng) for m in w}, speaker=speaker)
    for row in members(M):
        torch.testing.assert_close(
            oracle(d, row, s),
            posterior(s, z, offset, speaker, row.expand(160, M)),
            atol=1e-3,
            rtol=0,
        )


def test_what_is_not_latent_knows_nothing():
    """The complement of Q in the features has the same distribution under every label, and is
    uncorrelated with the latents."""
    s, y, rng = SPECS['iemocap'], torch.arange(8000) % 4, np.random.default_rng(0)
    z = draw_latents(s, y, rng)
    x, (Q, c), k = features(s, 'a', z, 64, rng).double(), frame(s, 'a', 64), len(columns(s)['a'])
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1]).double())
    rest = x / c - (x / c) @ Q[:, :k] @ Q[:, :k].T
    assert max((rest[y == i].mean(0).abs().max()) for i in range(4)) < 0.1
    assert ((rest.T @ (z - z.mean(0))) / len(y)).abs().max() < 0.06


def test_frames_do_not_depend_on_the_seed_of_the_data():
    a, b = twin('mosi', 'tiny'), twin('mosi', 'tiny', seed=3)
    assert (
        oracle(a).argmax(-1).eq(states(a)).double().mean() > 0.35
        and oracle(b).argmax(-1).eq(states(b)).double().mean() > 0.35
    )
    assert fingerprint(a) != fingerprint(b)


COUNTS = {
    'iemocap': {
        'Session1': (28, 1085),
        'Session2': (30, 1023),
        'Session3': (32, 1151),
        'Session4': (30, 1031),
        'Session5': (31, 1241),
    },
    'mosi': {'train': (52, 1284), 'val': (10, 229), 'test': (31, 686)},
    'mosei': {'train': (2249, 16326), 'val': (300, 1871), 'test': (679, 4659)},
}


@pytest.mark.parametrize('name', NAMES)
def test_a_full_twin_has_the_shape_of_its_dataset(name, full):
    d, s, shape = full[name], SPECS[name], SHAPES[name, 'full']
    for part, (n, u) in COUNTS[name].items():
        rows = [k for k, p in enumerate(d.part) if p == part]
        assert (len(rows), int(d.lengths[rows].sum())) == (n, u)
    assert d.widths == {'a': 512, 't': 1024, 'v': 1024} and d.present.all() and d.task.simulated
    assert d.task.name == f'{name}-simulated' and d.task.views == dict.fromkeys('atv', 'simulated')
    assert (
        shape.low <= d.lengths.min()
        and d.lengths.max() <= shape.high
        and int(d.speaker.max()) == (name == 'iemocap')
    )
    share = states(d).bincount(minlength=len(s.prior)) / len(d.label)
    assert (share - s.pi).abs().max() < 0.05
    for x in d.features.values():
        assert abs(x.square().mean() - 1) < 0.05 and torch.equal((x * 2**16).round(), x * 2**16)
    if s.scores:
        assert d.label.is_floating_point() and set(d.label.tolist()) == set(range(-3, 4))
    else:
        assert (
            tuple(d.task.classes) == ('happy', 'sad', 'neutral', 'angry')
            and abs(d.lengths.median() - 37) < 6
        )


def test_two_speakers_take_turns(full):
    d = full['iemocap']
    same = torch.cat([x[1:] == x[:-1] for x in d.speaker.split(d.lengths.tolist())]).double().mean()
    assert abs(same - 0.4) < 0.03 and abs(d.speaker.double().mean() - 0.5) < 0.03


BITS = {'iemocap': '7f9969dc07f4bfc1', 'mosi': '7d72ac9743bd3d85', 'mosei': '256bf90dd1ba0ed1'}


@pytest.mark.parametrize('name', NAMES)
def test_a_twin_keeps_its_bits(name):
    state, again = torch.random.get_rng_state(), torch.get_num_threads()
    d = twin(name, 'tiny')
    # no global random state is used
    assert torch.equal(state, torch.random.get_rng_state())
    assert fingerprint(d) == BITS[name], (
        'the tiny twin has changed: results from before are for other data'
    )
    torch.set_num_threads(1)
    try:
        assert fingerprint(twin(name, 'tiny')) == fingerprint(d)
    finally:
        torch.set_num_threads(again)
    assert (
        d.task.name == f'{name}-simulated-tiny' and 4 <= d.lengths.min() and d.lengths.max() <= 14
    )
    assert split(d).train.label.unique().numel() == len(SPECS[name].prior)


@pytest.mark.parametrize('name', NAMES)
def test_one_more_modality_never_lowers_the_limit(name):
    lim, s, rows = bayes_limit(name, 'full', 800), SPECS[name], members(3)
    for k in next(iter(lim.values())):
        better = -1 if k == 'MAE' else 1
        for i, c in enumerate(labels('atv')):
            for j, more in enumerate(labels('atv')):
                if i != j and (rows[j] | ~rows[i]).all():
                    assert better * (lim[more][k][0] - lim[c][k][0]) > -2 * max(
                        lim[c][k][1], lim[more][k][1]
                    ), (k, c, more)
    for c, v in lim.items():
        assert v[metric(s)][0] > chance(s) and 0 < v[metric(s)][1] < 0.02, c


@pytest.mark.parametrize(
    'name, want',
    [
        ('iemocap', dict(a=72, t=80, v=60, av=77, at=87, tv=84, atv=90)),
        ('mosi', dict(a=62, t=86, v=60, atv=88)),
        ('mosei', dict(a=72, t=88, v=70, av=75, at=89.5, tv=89.5, atv=91)),
    ],
)
def test_limits_have_the_pattern_of_table_1(name, want):
    lim, k = bayes_limit(name, 'full', 800), metric(SPECS[name])
    for c, v in want.items():
        assert abs(100 * lim[c][k][0] - v) < 2 + 300 * lim[c][k][1], c


def test_the_stated_error_is_that_between_seeds():
    runs = [
        limits(TWO, Shape((('train', 80, 720),), {}), 160, seed)['text']['ACC']
        for seed in range(12)
    ]
    between, stated = np.std([v for v, _ in runs], ddof=1), np.mean([e for _, e in runs])
    assert 0.5 < between / stated < 2


def test_each_decision_is_the_best_for_its_metric():
    "No other rule of the same posterior does better (tested against the tempting ones)."
    s, rng = SPECS['iemocap'], np.random.default_rng(0)
    offset, speaker = draw_turns(Shape((('x', 800, 8000),), {}, low=4, high=20, speakers=2), rng)
    state = torch.from_numpy(rng.choice(4, 8000, p=s.pi.numpy()))
    iid = replace(s, rho=0.0)
    p = posterior(
        iid,
        draw_latents(iid, state, rng),
        offset,
        speaker,
        torch.tensor([False, False, True]).expand(8000, 3),
    )
    m, ua = (
        measure(iid, p, state),
        lambda hit: float(np.mean([hit[state == c].double().mean() for c in range(4)])),
    )
    assert m['WA'] >= ((p / s.pi).argmax(-1) == state).double().mean() and m['UA'] >= ua(
        p.argmax(-1) == state
    )


def test_measure_agrees_with_sklearn_and_scipy():
    from scipy.stats import pearsonr
    from sklearn.metrics import f1_score

    s, g = SPECS['mosei'], torch.Generator().manual_seed(0)
    state = torch.randint(7, (500,), generator=g)
    p = (
        torch.randn(500, 7, generator=g).double() + 2 * torch.nn.functional.one_hot(state, 7)
    ).softmax(-1)
    y, score, m = (
        torch.tensor(s.scores)[state],
        torch.tensor(s.scores).double(),
        measure(s, p, state),
    )
    use, says = y != 0, p[:, 4:].sum(-1) > p[:, :3].sum(-1)
    assert m['ACC'] == pytest.approx(float((says == (y > 0))[use].double().mean()))
    assert m['F1'] == pytest.approx(f1_score((y > 0)[use], says[use], average='weighted'))
    assert m['r'] == pytest.approx(pearsonr(p @ score, y)[0])
    # expected error of each possible answer
    every = [(p * (v - score).abs()).sum(-1) for v in score]
    median = score[torch.stack(every).argmin(0)]
    assert m['MAE'] == pytest.approx(float((y - median).abs().mean()))


@pytest.mark.parametrize('s', [FOUR, TWO, ONE], ids=['four', 'two', 'one'])
def test_any_number_of_modalities(s):
    shape = Shape(
        (('train', 30, 240), ('val', 10, 80), ('test', 10, 80)),
        dict.fromkeys(s.common, 30),
        speakers=3,
    )
    d = simulate('mine-simulated', s, shape, seed=1)
    lim = limits(s, shape, 400)
    assert (
        d.modalities == s.modalities
        and set(lim) == set(labels(s.modalities))
        and d.task.n_outputs == (len(s.classes) or 1)
    )
    got, (want, _) = (
        measure(s, oracle(d, s=s), states(d, s))[metric(s)],
        lim[labels(s.modalities)[-1]][metric(s)],
    )
    assert abs(got - want) < 0.12
    with pytest.raises(DataError, match='expected a simulated twin'):
        oracle(d)


def test_the_oracle_knows_only_what_is_there(full):
    d = full['mosi']
    part = split(d).test
    torch.testing.assert_close(oracle(part, 'tv'), oracle(d, 'tv')[-len(part.utterances) :])
    mask = torch.rand(len(part.label), 3, generator=torch.Generator().manual_seed(0)) < 0.5
    gone = replace(
        part,
        features={m: x * mask[:, k : k + 1] for k, (m, x) in enumerate(part.features.items())},
        present=mask,
    )
    assert torch.equal(oracle(gone), oracle(part, mask))
    torch.testing.assert_close(
        oracle(part, torch.zeros(3, dtype=torch.bool)), SPECS['mosi'].pi.expand(len(part.label), 7)
    )
    with pytest.raises(DataError, match='encoded'):
        oracle(replace(part, encoded=True))
    with pytest.raises(DataError, match='found modalities a, v'):
        oracle(
            replace(part, features={m: part.features[m] for m in 'av'}, present=part.present[:, :2])
        )
    with pytest.raises(ValueError, match='expected one of'):
        oracle(part, 'x')


def test_impossible_requests_say_what_is_possible():
    with pytest.raises(DataError, match='expected 40 to 140'):
        draw_lengths(10, 200, Shape((), {}), np.random.default_rng(0))
    with pytest.raises(DataError, match="width of 't'"):
        simulate(
            'x-simulated',
            SPECS['iemocap'],
            replace(SHAPES['iemocap', 'tiny'], widths={'a': 24, 't': 20, 'v': 28}),
        )
    with pytest.raises(DataError, match='says "simulated"'):
        simulate('iemocap', SPECS['iemocap'], SHAPES['iemocap', 'tiny'])
    with pytest.raises(DataError, match='a class or a score per state'):
        Spec(prior=(0.5, 0.5), common={'a': 1.0})
    with pytest.raises(DataError, match='at least 40'):
        limits(ONE, SHAPES['mosi', 'tiny'], 10)
    for f in (twin, bayes_limit):
        with pytest.raises(
            DataError, match='no simulated twin; expected one of iemocap, mosi, mosei'
        ):
            f('iemocap6')
        with pytest.raises(DataError, match='expected full or tiny'):
            f('mosi', 'small')


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "A repository without data."
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    monkeypatch.delenv('MCULORA_DATA', raising=False)
    return tmp_path


@pytest.fixture
def release(monkeypatch):
    "Stands in for the reader of releases: says where it was asked to read."

    def load(root, dataset, features=None, cache_dir=None):
        return 'release', str(root), dataset, features, cache_dir

    monkeypatch.setattr(sources, 'load_layout', load)


def test_repo_root_is_the_nearest_settings(nowhere, tmp_path_factory, monkeypatch):
    assert repo_root() == nowhere
    other = tmp_path_factory.mktemp('elsewhere')
    monkeypatch.chdir(other)
    assert repo_root() == other


def test_only_the_default_folder_may_lack_the_release(nowhere, monkeypatch):
    assert open_dataset('mosi').task.name == 'mosi-simulated'
    # papermill's empty parameter
    assert open_dataset('mosi', data_root='').task.simulated
    with pytest.raises(DataError):
        open_dataset('mosi', data_root=nowhere / 'data')
    with pytest.raises(DataError):
        open_dataset('mosi', data_root=nowhere / 'not there')
    monkeypatch.setenv('MCULORA_DATA', str(nowhere / 'data'))
    with pytest.raises(DataError):
        open_dataset('mosi')
    # these are always the twins
    assert open_dataset('mosi', size='tiny').task.name == 'mosi-simulated-tiny'
    assert open_dataset('mosi', size='twin').task.name == 'mosi-simulated'


def test_the_folder_that_was_asked_for_comes_first(nowhere, release, monkeypatch):
    (nowhere / 'data' / 'CMUMOSI').mkdir()
    assert open_dataset('mosi')[1] == str(nowhere / 'data')
    assert open_dataset('mosi', nowhere / 'data', size='twin').task.simulated
    monkeypatch.setenv('MCULORA_DATA', str(nowhere / 'env'))
    assert open_dataset('mosi')[1] == str(nowhere / 'env')
    assert open_dataset('mosi', nowhere / 'given', 'full', {'a': 'x'}, 'c') == (
        'release',
        str(nowhere / 'given'),
        'mosi',
        {'a': 'x'},
        'c',
    )


def test_what_is_unknown_is_refused(nowhere):
    with pytest.raises(DataError, match='expected one of iemocap, iemocap6, mosi, mosei'):
        open_dataset('meld')
    with pytest.raises(DataError, match='expected full, twin or tiny'):
        open_dataset('mosi', size='medium')
    with pytest.raises(DataError, match='no simulated twin'):
        open_dataset('iemocap6')
    with pytest.raises(DataError, match='no simulated twin'):
        open_dataset('iemocap6', size='tiny')
    with pytest.raises(DataError, match='a simulated twin has none'):
        open_dataset('mosi', features={'a': 'wav2vec'})
