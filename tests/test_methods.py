"What must hold for every method that is registered: a new one is tested by being there."

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings, strategies as st
from small import known

from mculora.basics.dialogues import DataError, batch, keep, random_dialogues, select, split
from mculora.training.check import findings, training_batch
from mculora.training.evaluation import evaluate, evaluate_random, metrics, predictions
from mculora.training.evaluation import predictions_of
from mculora.basics.masking import drop, random_mask, sample
from mculora.basics.method import create, methods
from mculora.basics.modalities import labels, members
from mculora.model.encoders import ENCODERS
from mculora.training.replicas import Together, side_by_side
from mculora.training.trainer import encoded, fit, thaw, train_mode

SMALL = dict(
    width=16,
    depth=1,
    rank=2,
    epochs=1,
    lr=1e-2,
    batch_size=8,
    C=0.01,
    blocks=2,
    couplings=2,
    steps=4,
)
# fewer neighbours to look at; all additions that every task can have
MORE = {
    'knn-imputation': dict(anchors=30),
    'mculora-plus': dict(
        speakers=True,
        level=True,
        nested=True,
        scales=True,
        every=True,
        distil=0.5,
        tie=0.1,
        context=1,
        average=0.8,
        lr_fine=2e-2,
    ),
}
PARTS = ('train',) * 4 + ('val', 'test')
FOUR = dict(widths={'text': 3, 'audio': 4, 'vision': 5, 'turns': 2}, n_classes=2)
DATA = {
    'three modalities': dict(),
    'scores': dict(n_classes=0),
    'two modalities': dict(widths={'a': 4, 't': 6}),
    'four modalities': FOUR,
    'gaps in the data': dict(missing=0.3),
    'gaps in four modalities': dict(FOUR, missing=0.3),
    'dialogues without a modality': dict(absent=0.4),
}


def data(name, lengths=(5, 9, 3, 12, 7, 4, 6, 8, 10, 5, 3, 7)):
    return random_dialogues(lengths, parts=PARTS, **DATA[name])


@torch.enable_grad()
def trained(method, name, seed=1, stream=None, **options):
    "Trained; `stream`: seed of PyTorch's own stream when training starts."
    d = data(name)
    s = split(d)
    torch.manual_seed(seed)
    m = create(method, d.task, d.widths, known(method, SMALL | MORE.get(method, {}) | options))
    if stream is not None:
        torch.manual_seed(stream)
    history = fit(m, s, seed, progress=False)
    return m, s, history


@pytest.fixture(scope='module')
def models():
    "Each method trained once on each kind of data."
    made = {}

    def get(method, name):
        if (method, name) not in made:
            made[method, name] = trained(method, name)
        return made[method, name]

    return get


@cache
def stages_of(method):
    d = random_dialogues()
    return create(method, d.task, d.widths, known(method, SMALL)).stages()


def usual(method, name):
    """Every kind of data for the paper's method and for the one built least like it; for all others
    gaps, in as many modalities as they have time for."""
    if method in ('mculora', 'gcnet'):
        return True
    # a network for each condition
    if len(stages_of(method)) > 2:
        return name == 'two modalities'
    # many steps for each prediction, or many parts
    if method in ('imder', 'dicmor', 'mculora-plus'):
        return name == 'gaps in the data'
    return name == 'gaps in four modalities'


def pairs(names):
    rare = pytest.mark.slow
    return pytest.mark.parametrize(
        'method, name',
        [
            pytest.param(method, name, marks=[] if usual(method, name) else [rare])
            for method in names
            for name in DATA
        ],
    )


METHODS = sorted(methods())
# the others are fitted in `prepare`
IN_STAGES = [method for method in METHODS if stages_of(method)]
every = pytest.mark.parametrize('method', METHODS)
each = pairs(METHODS)


@pytest.mark.slow
@each
def test_what_is_looked_at_before_a_run_holds_after_it_too(models, method, name):
    "Missing values, padding, neighbours, order, encodings, labels: `training.check`."
    m, _, _ = models(method, name)
    assert not any(findings(m, select(data(name), range(7))).values())


@every
@pytest.mark.parametrize('n_classes', [3, 0])
def test_nothing_is_learnt_from_what_has_no_label(method, n_classes):
    """Beside context, L_task of labelled dialogues is what it is without. The second dialogue has
    no label at all, the others lack one each."""
    d = random_dialogues((4, 6, 5), n_classes=n_classes, parts=('train',))
    unknown = torch.tensor([0, *range(4, 10), 12])
    d = replace(d, label=d.label.index_fill(0, unknown, -1 if n_classes else float('nan')))
    torch.manual_seed(0)
    options = known(method, SMALL | dict(score_loss='mae'))
    m = create(method, d.task, d.widths, options).eval()
    m.prepare(d)
    assert predictions(m, d).isfinite().all()
    # of one model per condition, two
    for stage in m.stages()[:2]:
        thaw(m, stage)
        every = encoded(m, d) if stage.encoded else d
        loss, task = {}, {}
        for name, part in dict(whole=every, alone=select(every, [0, 2])).items():
            whole = torch.ones(len(d.modalities), dtype=torch.bool)
            b = keep(batch(part, range(len(part))), whole, targets=True)
            loss[name], parts = m.loss(b, stage.name)
            task[name] = parts.get('task', torch.zeros(()))
        assert loss['whole'].isfinite()
        torch.testing.assert_close(task['whole'], task['alone'])


# what is fitted in one go, what trains, and what makes classes of scores
UNITS = {'majority', 'logistic', 'mculora', 'mran-reading', 'dicmor'}


@pytest.mark.parametrize(
    'method', [m if m in UNITS else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_the_units_of_scores_do_not_matter(method):
    """Scores of 4 to 16 are learned as those of -3 to 3, and what is predicted is turned back. The
    noise of rounding is all that differs."""
    d = data('scores')
    scale = dict(low=4.0, high=16.0, middle=10.0, shift=10.0, unit=2.0)
    other = replace(d, task=replace(d.task, **scale), label=2 * d.label + 10)
    found = {}
    for name, x in dict(usual=d, other=other).items():
        torch.manual_seed(0)
        m = create(method, x.task, x.widths, known(method, SMALL | MORE.get(method, {})))
        fit(m, split(x), 1, progress=False)
        found[name] = m, predictions(m, x)
    (m, y), (_, z) = found.values()
    torch.testing.assert_close((z - 10) / 2, y, rtol=0, atol=5e-3)
    # scored in their own units
    before, after = evaluate(m, d)['all'], evaluate(found['other'][0], other)['all']
    assert after['MAE'] == pytest.approx(2 * before['MAE'], abs=2e-3)
    assert after['r'] == pytest.approx(before['r'], abs=2e-3)


@pytest.mark.parametrize('n_classes', [3, 0])
def test_context_is_read_and_not_scored(n_classes):
    d = random_dialogues((4, 6, 5), n_classes=n_classes, parts=('train', 'train', 'test'))
    none = -1 if n_classes else float('nan')
    heard = replace(d, label=d.label.index_fill(0, torch.tensor([1, 5, 12]), none))
    m = create('mculora', d.task, d.widths, known('mculora', SMALL))
    out, has = predictions(m, heard), heard.labelled
    assert torch.equal(out, predictions(m, d))
    found = evaluate(m, heard)
    for name, scores in zip(labels(d.modalities), metrics(d.task, out[:, has], d.label[has])):
        assert found[name] == pytest.approx(scores, nan_ok=True)
    mask = {'0.0': torch.ones_like(d.present)}
    assert evaluate_random(m, heard, mask)['0.0'] == pytest.approx(found['atv'], nan_ok=True)
    # and it is read: without it, the others are answered differently
    cut = drop(heard, has[:, None].expand_as(d.present))
    assert not torch.allclose(predictions(m, cut)[:, has], out[:, has])


@each
def test_random_protocol_equals_a_mask_per_utterance(method, name):
    m, train = shaken(method, name)
    m.eval().prepare(train)
    test = split(data(name)).test
    M = len(test.features)
    mask = random_mask(len(test.utterances), M, 0.5, seed=3)
    gone = drop(test, mask)
    y = predictions(m, gone, members(M)[-1:])[0]
    b = batch(test, range(len(test)))
    per_utterance = torch.ones(*b.shape, M, dtype=torch.bool)
    per_utterance[b.valid] = mask
    with torch.no_grad():
        torch.testing.assert_close(m.predict(keep(b, per_utterance))[b.valid], y, rtol=0, atol=1e-4)


@pytest.mark.slow  # tests/test_golden.py runs every method once more, too
@every
def test_same_seed_same_bits(method):
    epochs = 2 if len(stages_of(method)) < 3 else 1
    (one, _, h1), (two, _, h2) = (
        trained(method, 'three modalities', seed=5, epochs=epochs, stream=k) for k in range(2)
    )
    for (k, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items()):
        assert torch.equal(a, b), k
    assert [{k: v for k, v in r.items() if 'seconds' not in k} for r in h1] == [
        {k: v for k, v in r.items() if 'seconds' not in k} for r in h2
    ]


def singly(names):
    "Of one model per condition, seven models in one are what one is: rarely."
    return [pytest.param(m, marks=[pytest.mark.slow] * m.endswith('-per-condition')) for m in names]


# it is one, by definition
@pytest.mark.parametrize('method', singly(m for m in METHODS if m != 'majority'))
def test_one_modality_is_not_a_constant(models, method):
    m, s, _ = models(method, 'gaps in the data')
    assert (predictions(m, s.test)[:3].std(1).max(-1).values > 1e-4).all()


@every
@pytest.mark.parametrize(
    'parts, labels',
    [(('train', 'val', 'test'), 'one class'), (PARTS, 'a class only in the test part')],
)
def test_degenerate_labels(method, parts, labels):
    d = random_dialogues((5, 4, 6, 3, 5, 4), parts=parts, **DATA['two modalities'])
    label = torch.zeros_like(d.label) if labels == 'one class' else d.label.clamp(max=2)
    if labels != 'one class':
        label[d.offset[5] :] = 3
    d = replace(d, label=label)
    m = create(method, d.task, d.widths, known(method, SMALL | MORE.get(method, {})))
    if method.startswith('logistic') and labels == 'one class':
        with pytest.raises(DataError, match='found one class'):
            fit(m, split(d), progress=False)
        return
    fit(m, split(d), progress=False)
    assert all(0 <= v <= 1 for row in evaluate(m, split(d).test).values() for v in row.values())


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=6, max_size=8),
    missing=st.sampled_from([0.0, 0.4]),
    absent=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    n_classes=st.sampled_from([0, 3]),
    seed=st.integers(0, 99),
)
def test_mculora_trains_on_anything_well_formed(lengths, missing, absent, scale, n_classes, seed):
    d = random_dialogues(
        lengths,
        parts=('train', 'train', 'train', 'val', 'test'),
        missing=missing,
        absent=absent,
        n_classes=n_classes,
        seed=seed,
    )
    d = replace(
        d,
        features={
            m: (x * scale).masked_fill(~d.present[:, k : k + 1], 0)
            for k, (m, x) in enumerate(d.features.items())
        },
    )
    m = create('mculora', d.task, d.widths, dict(width=8, depth=1, rank=1, epochs=1, batch_size=4))
    history = fit(m, split(d), seed, progress=False)
    assert [r['stage'] for r in history] == ['pretrain', 'finetune'] and predictions(
        m, split(d).test
    ).isfinite().all()


def shaken(method, name, seed=0):
    "An untrained model whose every parameter has moved, and its training part."
    d = data(name)
    torch.manual_seed(seed)
    m = create(method, d.task, d.widths, known(method, SMALL | MORE.get(method, {})))
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * 0.1) for p in m.parameters()]
    return m.train(), split(d, seed=seed).train


@pytest.mark.parametrize('method', METHODS)
def test_every_trained_parameter_gets_a_gradient(method):
    "In each stage, from a batch with every combination: nothing that is trained lies idle."
    m, train = shaken(method, 'three modalities')
    m.prepare(train)
    for stage in m.stages():
        m.begin(stage.name)
        trained = thaw(m, stage)
        loss, _ = m.loss(training_batch(m, stage, train), stage.name)
        loss.backward()
        assert trained and not [n for n, p in trained.items() if p.grad is None]
        m.zero_grad()


def step(team, b, stage, keys):
    loss, _ = team(lambda m, b: m.loss(b, stage.name), b, keys)
    team.backward(loss, [True] * len(team.methods))
    return loss.detach(), [
        {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        for m in team.methods
    ]


# of gradients: single precision loses more in the steps of IMDer's sampler (in double precision,
# which not every method can, 1e-13 is left)
ATOL = {'imder': 1e-4}


def agree(a, b, atol=1e-5):
    for n in a.keys() | b.keys():
        one, two = (x.get(n) for x in (a, b))
        if one is None or two is None:
            assert not (two if one is None else one).any(), n
        else:
            torch.testing.assert_close(
                one,
                two,
                rtol=1e-3,
                atol=atol * (1 + one.abs().max().item()),
                msg=lambda m: f'{n}: {m}',
            )


@pairs(IN_STAGES)
@pytest.mark.parametrize('per', ['dialogue', pytest.param('utterance', marks=pytest.mark.slow)])
@torch.enable_grad()
def test_a_step_does_not_depend_on_packing_padding_or_other_replicas(method, name, per):
    solo, trains = zip(*(shaken(method, name, seed) for seed in (0, 1)))
    # encoded dialogues cannot lose a modality in single utterances: `keep` refuses
    stages = [stage for stage in solo[0].stages() if per == 'dialogue' or not stage.encoded]
    assert stages
    # of one model per condition, two
    for stage in stages[:2]:
        if stage.encoded:
            trains = [encoded(m, t) for m, t in zip(solo, trains)]
        rows, g = [torch.tensor([0, 2, 3]), torch.tensor([1, 4])], torch.Generator().manual_seed(5)
        masks = [
            sample(m.q, (len(r), int(t.lengths[r].max())), per, g)
            for m, t, r in zip(solo, trains, rows)
        ]
        for m in solo:
            thaw(m, stage)
            train_mode(m, stage.noisy)
        alone = [
            step(Together([m]), side_by_side([t], [r], [x]), stage, [key])
            for m, t, r, x, key in zip(solo, trains, rows, masks, (3, 4))
        ]
        x, l = masks[0], masks[0].shape[1]
        wide = keep(
            batch(trains[0], rows[0], (5, 15)),
            torch.nn.functional.pad(
                x, (0, 0, 0, 15 - l, 0, 2) if per == 'utterance' else (0, 0, 0, 2), value=True
            ),
            targets=True,
        )
        for b in (wide, replace(wide, pack=False, complete=replace(wide.complete, pack=False))):
            loss, grads = step(Together([solo[0]]), b, stage, [3])
            torch.testing.assert_close(loss, alone[0][0], rtol=1e-4, atol=1e-5)
            agree(grads[0], alone[0][1][0], ATOL.get(method, 1e-5))
        loss, grads = step(Together(list(solo)), side_by_side(trains, rows, masks), stage, [3, 4])
        torch.testing.assert_close(loss, torch.cat([l for l, _ in alone]), rtol=1e-4, atol=1e-5)
        for a, (_, b) in zip(grads, alone):
            agree(a, b[0], ATOL.get(method, 1e-5))


@every
def test_replicas_predict_as_each_alone(method):
    solo, trains = zip(*(shaken(method, 'gaps in the data', seed) for seed in (0, 1)))
    for m, t in zip(solo, trains):
        if not m.stages():
            m.prepare(t)
    some = members(3)[::3]
    alone = [predictions(m, t, some) for m, t in zip(solo, trains)]
    together = predictions_of(Together(list(solo)), trains, some, max_utterances=20)
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.slow  # three of them in the notebook
@every
def test_a_step_that_is_played_back_is_the_usual_one(method):
    "On a CPU nothing is recorded: this tells whether a method works on tensors of fixed shapes."
    d = random_dialogues(lengths=[3, 9, 2, 7, 4, 5] * 3, parts=('train', 'train', 'val', 'test'))
    fields = methods()[method].Settings.model_fields
    few = {k: v for k, v in dict(width=16, epochs=1, batch_size=4).items() if k in fields}

    def losses(graphs):
        torch.manual_seed(0)
        history = fit(
            create(method, d.task, d.widths, few), split(d), progress=False, graphs=graphs
        )
        return [v for row in history for k, v in row.items() if k.startswith('train/')]

    assert losses(True) == pytest.approx(losses(False), abs=1e-4)


@pytest.mark.slow
@every
def test_within_a_stage_weights_and_buffers_stay_where_they_are(method):
    "What is recorded reads them at the addresses that they had."
    d = random_dialogues(lengths=[3, 9, 2, 7, 4, 5] * 3, parts=('train', 'train', 'val', 'test'))
    fields = methods()[method].Settings.model_fields
    few = {k: v for k, v in dict(width=16, epochs=3, batch_size=4).items() if k in fields}
    m, at = create(method, d.task, d.widths, few), {}

    def note(row):
        where = {n: x.data_ptr() for n, x in m.state_dict().items()}
        assert at.setdefault(row['stage'], where) == where

    fit(m, split(d), progress=False, on_epoch=note)
    assert at or not m.stages()


# what changes a prediction: an utterance's own features, a neighbour's, who shares a speaker, and
# which number that one has
READS = {
    'nothing': [False, False, False, False],
    'utterance': [True, False, False, False],
    'utterance, numbered speakers': [True, False, True, True],
    'dialogue': [True, True, False, False],
    'dialogue, speakers': [True, True, True, False],
    'dialogue, numbered speakers': [True, True, True, True],
}
# methods that can be told who shares a speaker
SPEAKING = sorted(m for m, cls in methods().items() if 'speakers' in cls.Settings.model_fields)


@pytest.mark.parametrize(
    'method, options',
    [(method, {}) for method in METHODS]
    + [(method, dict(speakers=on)) for method in SPEAKING for on in (True, False)]
    + [('mculora-plus', dict(speakers=False, level=False, context=0))],
)
@torch.no_grad()
def test_a_method_reads_what_it_says(method, options, monkeypatch):
    "Table 1 prints `reads`: it is found out by changing the input."
    monkeypatch.setitem(MORE, method, MORE.get(method, {}) | options)
    m, train = shaken(method, 'three modalities')
    m.eval().prepare(train)
    b = batch(train.unlabelled, range(len(train)))
    y, first = m.predict(b), torch.zeros_like(b.valid)
    first[:, 0] = True

    def moved(other, at):
        gap = (m.predict(other) - y).abs().amax(-1)[at & b.valid].max().item()
        assert gap > 1e-4 or gap < 1e-5
        return gap > 1e-4

    wild = replace(b, features={n: x + 3 * first[..., None] for n, x in b.features.items()})
    found = [moved(wild, first), moved(wild, ~first)]
    # one speaker only; the same two under each other's number
    found += [moved(replace(b, speaker=s), b.valid) for s in (0 * b.speaker, 1 - b.speaker)]
    assert found == READS[m.reads()]
    # nothing goes from one dialogue to another
    speaker = b.speaker.clone()
    speaker[0] = 1 - speaker[0]
    speaker[0, 0] = 5
    elsewhere = torch.ones_like(b.valid)
    elsewhere[0] = False
    assert not moved(replace(b, speaker=speaker), elsewhere)


@pytest.mark.parametrize('method', singly(SPEAKING))
def test_heads_by_speaker_keep_what_every_method_keeps(method, monkeypatch):
    "Missing inputs, padding, neighbours, packing, replicas: with the setting on."
    monkeypatch.setitem(MORE, method, dict(speakers=True))
    m, train = shaken(method, 'gaps in the data')
    assert not any(findings(m, select(train, range(3))).values())
    test_a_step_does_not_depend_on_packing_padding_or_other_replicas(
        method, 'gaps in the data', 'dialogue'
    )
    test_replicas_predict_as_each_alone(method)


# one of each kind of block; the others alone
ENCODERS_TRIED = [{'a': 'lstm-graph', 't': 'relative', 'v': 'lstm-speakers'}, *list(ENCODERS)[1:]]


@pytest.mark.parametrize('place', ['linear', pytest.param('output', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'encoder',
    [pytest.param(e, marks=[pytest.mark.slow] * isinstance(e, str)) for e in ENCODERS_TRIED],
    ids=str,
)
def test_mculora_keeps_what_every_method_keeps_with_other_encoders(encoder, place, monkeypatch):
    "Missing inputs, padding, neighbours, packing, replicas, what is read."
    options = dict(encoder=encoder, adapter_place=place, depth=2)
    monkeypatch.setitem(MORE, 'mculora', options)
    name = 'gaps in the data'
    m, train = shaken('mculora', name)
    assert not any(findings(m, select(train, range(3))).values())
    test_a_step_does_not_depend_on_packing_padding_or_other_replicas('mculora', name, 'dialogue')
    test_replicas_predict_as_each_alone('mculora')
    test_a_method_reads_what_it_says('mculora', options, monkeypatch)


@pytest.mark.slow
def test_a_run_with_other_encoders_gives_the_same_bits(monkeypatch):
    monkeypatch.setitem(MORE, 'mculora', dict(encoder=ENCODERS_TRIED[0], depth=2))
    test_same_seed_same_bits('mculora')
