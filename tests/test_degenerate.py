"""Data as it comes: of any length, constant, huge, broken, of one class. Every dataset is refused
in words before work starts, or gives finite numbers."""

from collections import Counter
from dataclasses import replace
import math, tempfile
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from small import small
from mculora.basics.dialogues import (
    DataError,
    Splits,
    batch,
    batches,
    fingerprint,
    folds,
    problems,
    random_dialogues,
    select,
    split,
)
from mculora.training.evaluation import evaluate, evaluate_random
from mculora.basics.masking import random_mask
from mculora.basics.method import create, methods
from mculora.basics.modalities import labels
from mculora.experiments.runs import RunConfig, new_method, prepare
from mculora.data.sources import example, fit_scale, read_layout, scale, write_layout
from mculora.training.trainer import fit


def examples(n):
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --- any dataset ---

VALUES = {  # what a column of features may be like
    'noise': lambda x: x,
    'constant': lambda x: torch.full_like(x, 7.0),
    'zero': torch.zeros_like,
    'huge': lambda x: x * 1e30,
    'nearly too huge': lambda x: x.clamp(-1, 1) * 3.4e38,
    'denormal': lambda x: x * 1e-40,
    'one outlier': lambda x: torch.cat([x[:1] * 1e12, x[1:]]),
    'a constant and a hair': lambda x: torch.cat(
        [torch.full_like(x[:1], 1 + 1e-7), torch.ones_like(x[1:])]
    ),
    'NaN': lambda x: x.masked_fill(x > 1, float('nan')),
    'infinity': lambda x: x.masked_fill(x > 1, float('inf')),
}
LABELS = {
    'any': lambda y, g: y,
    'one': lambda y, g: torch.full_like(y, y[0].item()),
    'zero': lambda y, g: torch.zeros_like(y),
    'two': lambda y, g: y.clamp(y[0].item(), y[0].item() + 1),
    'out of range': lambda y, g: y + 40,
    'below': lambda y, g: y - 9,
    'NaN': lambda y, g: y * float('nan') if y.is_floating_point() else y,
    'one for each dialogue': lambda y, g: y[g],
}


@st.composite
def datasets(draw, most=260):
    "(dialogues, what was done to them)."
    name = draw(st.sampled_from(['iemocap', 'iemocap6', 'mosi', 'mosei']))
    lengths = draw(
        st.lists(
            st.sampled_from([1, 1, 2, 3, 7, 20, 200]),
            min_size=draw(st.sampled_from([1, 4, 6, 6])),
            max_size=12,
        ).filter(lambda x: sum(x) <= most)
    )
    widths = {
        m: draw(st.integers(1, 6))
        for m in draw(st.permutations(['a', 't', 'v', 'gaze', 'text2']))[: draw(st.integers(1, 5))]
    }
    d = example(name, lengths, widths, draw(st.sampled_from([0.0, 0.4])), draw(st.integers(0, 99)))
    values = {
        m: draw(
            st.sampled_from(
                list(VALUES) if draw(st.integers(0, 3)) == 0 else ['noise', 'constant', 'huge']
            )
        )
        for m in widths
    }
    labels, speakers, rest = (
        draw(st.sampled_from(['any'] * 6 + list(LABELS))),
        draw(st.sampled_from(['any', 'one', 'many'])),
        draw(
            st.sampled_from(
                ['nothing'] * 6
                + [
                    'the first modality is gone',
                    'a dialogue has nothing',
                    'the same dialogue twice',
                    'the same utterance twice',
                    'one part only',
                    'no test part',
                ]
            )
        ),
    )
    first = d.offset[:-1].repeat_interleave(d.lengths)
    present = d.present.clone()
    if rest == 'the first modality is gone':
        present[:, 0] = False
    if rest == 'a dialogue has nothing':
        present[: d.offset[1]] = False
    if rest == 'the same dialogue twice':
        d = replace(d, ids=(d.ids[-1], *d.ids[1:]))
    if rest == 'the same utterance twice':
        d = replace(d, utterances=(d.utterances[-1], *d.utterances[1:]))
    if rest == 'one part only':
        d = replace(d, part=d.part[:1] * len(d))
    if rest == 'no test part':
        d = replace(d, part=tuple('train' if p == 'test' else p for p in d.part))
    d = replace(
        d,
        present=present,
        label=LABELS[labels](d.label, first),
        features={
            m: VALUES[values[m]](x).masked_fill(~present[:, k : k + 1], 0.0)
            for k, (m, x) in enumerate(d.features.items())
        },
        speaker={
            'any': d.speaker,
            'one': torch.zeros_like(d.speaker),
            'many': torch.arange(len(d.label)) % 9,
        }[speakers],
    )
    return d, dict(values=values, labels=labels, speakers=speakers, rest=rest)


def in_words(problem):
    return problem.isprintable() and ('found' in problem or 'no utterance has them' in problem)


def written_and_read(d, about):
    "The dataset through the layout on disk: the same, or problems in words."
    names = {m: f'{m}-folder' for m in d.modalities}
    with tempfile.TemporaryDirectory() as top:
        try:
            back, bad = read_layout(write_layout(top, d, names), d.task.name, names, progress=False)
        except DataError as e:
            back, bad = None, [str(e)]
    assert all(in_words(p) for p in bad), bad
    speakers_fit = (
        about['speakers'] != 'many' if d.task.name.startswith('iemocap') else not d.speaker.any()
    )
    if (
        not problems(d)
        and speakers_fit
        and about['rest'] != 'the same utterance twice'
        and not (
            about['rest'] in ('one part only', 'no test part') and d.task.name.startswith('iemocap')
        )
    ):
        assert (
            not bad and fingerprint(back) == fingerprint(d) and back.utterances == d.utterances
        ), bad
    return bad


def trained(d, method, seed=1):
    """One epoch of a method, as `run` does it: refused before the first epoch, in words that only
    data are refused with, or finite."""
    try:
        if problems(d):
            raise DataError('; '.join(problems(d)))
        c = RunConfig(
            dataset='mosi',
            method=method,
            fold=1 + seed % len(folds(d)),
            seed=seed,
            options=small(method, epochs=1),
            device='cpu',
        )
        s, *_ = prepare(c, lambda *_: d)
        m = new_method(c, s)
    except DataError as e:
        assert in_words(str(e)), e
        return 'refused'
    for rows in batches(s.train.lengths, 4):
        assert batch(s.train, rows).features.keys() == s.train.features.keys()
    try:
        history = fit(m, s, seed, progress=False)
    except DataError as e:
        assert method.startswith('logistic') and 'found one class' in str(e)
        return 'refused'
    finite(m, s, history)
    return 'trained'


def defined(part):
    """Conditions that some utterance of a part can be in, and the averages that have one of them:
    the metrics of all others are NaN, for there is nothing to measure."""
    names = labels(part.modalities)
    there = [
        c
        for c, ok in zip(
            names, [True] * len(names) if part.can is None else part.can.any(0).tolist()
        )
        if ok
    ]
    return {
        *there,
        *['all'] * bool(there),
        *['incomplete'] * bool(set(there) & set(names[:-1] or names)),
        *['0.5'] * bool(there),
    }


def finite(m, s, history):
    "All losses, weights and metrics are numbers, apart from those of conditions that do not occur."
    ours = {'val': defined(s.val), 'test': defined(s.test)}
    wrong = [
        (k, v)
        for r in history
        for k, v in r.items()
        if isinstance(v, float)
        and not math.isfinite(v)
        and not ((at := k.split('/'))[0] in ours and at[1] not in ours[at[0]] and math.isnan(v))
    ]
    for name, part in (('val', s.val), ('test', s.test)):
        found = {
            **evaluate(m, part),
            **evaluate_random(
                m, part, {'0.5': random_mask(len(part.utterances), len(part.modalities), 0.5)}
            ),
        }
        wrong += [
            (c, k)
            for c, r in found.items()
            for k, v in r.items()
            if not math.isfinite(v) and c in ours[name]
        ]
    wrong += [k for k, v in m.state_dict().items() if v.isnan().any()]
    assert not wrong, wrong[:5]


@examples(60)
@given(datasets(most=40))
def test_any_dataset_comes_back_from_disk_or_its_problems_are_said(x):
    written_and_read(*x)


def drawn(n, names, most_seed):
    "How many of n datasets were trained on, and how many refused."
    ended = Counter()

    @examples(n)
    @given(datasets(), st.sampled_from(names), st.integers(0, most_seed))
    def draw(x, method, seed):
        ended[trained(x[0], method, seed)] += 1

    draw()
    assert ended.total() >= n
    return ended


def test_any_dataset_trains_or_is_refused():
    ended = drawn(20, ['majority', 'logistic', 'zero-fill', 'mculora'], 5)
    assert ended['trained'] >= 6 and ended['refused'] >= 6


@pytest.mark.faults
@examples(400)
@given(datasets())
def test_many_datasets_come_back_from_disk_or_their_problems_are_said(x):
    written_and_read(*x)


@pytest.mark.faults
def test_many_datasets_train_or_are_refused():
    ended = drawn(
        300,
        [
            'majority',
            'logistic',
            'logistic-per-condition',
            'zero-fill',
            'mean-imputation',
            'late-fusion',
            'mculora',
        ],
        99,
    )
    assert ended['trained'] >= 90 and ended['refused'] >= 90


def test_broken_datasets_are_counted(campaign):
    "What hypothesis may or may not draw, once each: every one is refused before work starts."
    d = example('mosi', (3, 5, 2, 7, 4))
    bad = [
        replace(d, features={**d.features, 'a': VALUES[v](d.features['a'])})
        for v in ('NaN', 'infinity')
    ] + [
        replace(d, label=LABELS[y](d.label, None)) for y in ('out of range', 'below', 'NaN', 'zero')
    ]
    bad += [
        replace(d, ids=(d.ids[1], *d.ids[1:])),
        replace(d, part=('train',) * 5),
        replace(d, part=('test',) * 5),
        select(d, [0]),
        replace(
            d,
            present=d.present & torch.tensor([True, False, True]),
            features={**d.features, 't': torch.zeros_like(d.features['t'])},
        ),
        replace(d, present=d.present[:-1]),
        replace(d, offset=d.offset.flip(0)),
        select(d, []),
    ]
    for x in bad:
        campaign['bad inputs tried'] += 1
        assert trained(x, 'zero-fill') == 'refused'


# --- a few epochs on degenerate data ---

PARTS = ('train',) * 4 + ('val', 'test')


def absent(d, where):  # the second modality is gone where `where` holds
    present = d.present.clone()
    present[where, 1] = False
    return replace(
        d,
        present=present,
        features={
            m: x.masked_fill(~present[:, k : k + 1], 0.0)
            for k, (m, x) in enumerate(d.features.items())
        },
    )


def valued(d, *how):
    return replace(
        d,
        features={
            m: VALUES[h](x) if isinstance(h, str) else x * h
            for (m, x), h in zip(d.features.items(), how)
        },
    )


KINDS = {
    'constant features': lambda d: valued(d, *['constant'] * 3),
    'scale 1e6': lambda d: valued(d, *[1e6] * 3),
    'zero features': lambda d: valued(d, *['zero'] * 3),
    'one label': lambda d: replace(d, label=torch.full_like(d.label, 1)),
    'never a second modality': lambda d: absent(d, slice(None)),
    'no second modality in training': lambda d: absent(
        d, torch.tensor([p == 'train' for p in d.part]).repeat_interleave(d.lengths)
    ),
    'dialogues of one utterance': lambda d: random_dialogues(
        (1,) * 12, n_classes=len(d.task.classes), parts=PARTS
    ),
    'all at once': lambda d: absent(
        valued(replace(d, label=torch.full_like(d.label, 1)), 'constant', 'noise', 1e6), slice(None)
    ),
}


def degenerate(method, kind, n_classes, standardise=True):
    d = KINDS[kind](
        random_dialogues((5, 1, 3, 12, 1, 4, 6, 8, 1, 5, 3, 7), n_classes=n_classes, parts=PARTS)
    )
    s = split(d)
    if standardise:
        stats = fit_scale(s.train)
        s = Splits(*(scale(p, stats) for p in (s.train, s.val, s.test)), s.name)
    torch.manual_seed(0)
    m = create(method, d.task, d.widths, small(method, epochs=1))
    if method.startswith('logistic') and n_classes and kind in ('one label', 'all at once'):
        with pytest.raises(DataError, match='found one class'):
            fit(m, s, 1, progress=False)
        return
    finite(m, s, fit(m, s, 1, progress=False))


scores = pytest.mark.parametrize('n_classes', [4, 0], ids=['classes', 'scores'])


@scores
@pytest.mark.parametrize('kind', KINDS)
def test_mculora_on_degenerate_data_ends_in_numbers(kind, n_classes):
    degenerate('mculora', kind, n_classes)


@pytest.mark.parametrize('method', sorted(set(methods()) - {'mculora'}))
def test_every_method_on_degenerate_data_ends_in_numbers(method):
    degenerate(method, 'all at once', 0)


@pytest.mark.parametrize('kind', ['constant features', 'scale 1e6'])
def test_features_as_they_are_do_no_harm(kind):
    degenerate('mculora', kind, 4, standardise=False)


@pytest.mark.faults
@scores
@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'all at once'])
@pytest.mark.parametrize('method', sorted(set(methods()) - {'mculora'}))
def test_every_method_on_every_kind_of_degenerate_data_ends_in_numbers(method, kind, n_classes):
    degenerate(method, kind, n_classes)
