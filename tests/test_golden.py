"""What a few epochs on a simulated twin gave when the code was last known to be right.

A test by hand says what one function does; this one notices when a run as a whole no longer does
what it did: order of batches, draws, dropout, first weights, decay, masks. Where a change is
meant, `python tests/test_golden.py` writes the numbers anew; say in the commit why they moved."""

import json
from pathlib import Path

import pytest
import torch
from small import known

from mculora.basics.dialogues import Splits, split
from mculora.training.evaluation import predictions
from mculora.basics.masking import mask_hash, random_mask
from mculora.basics.method import create, methods
from mculora.data.sources import fit_scale, scale
from mculora.training.trainer import fit, plan_epoch
from mculora.data.twins import twin

FILE = Path(__file__).with_name('golden-simulated.json')
# not those of small.py: the numbers in the file hang on these, and change when they do
PINNED = dict(
    width=16,
    depth=2,
    rank=2,
    epochs=2,
    lr=1e-3,
    batch_size=4,
    dropout=0.2,
    weight_decay=0.01,
    steps=2,
    blocks=1,
    couplings=1,
    amplitude=0.3,
    beta=0.1,
    bounds=(0.4, 0.6),
)
RUNS = {
    'mculora': ('mculora', {}),
    'literal, squared, per modality': (
        'mculora',
        dict(adapter_form='literal', orthogonality='squared', dpft='modality'),
    ),
    'in every linear map': ('mculora', dict(adapter_place='linear', depth=1)),
    'a draw per utterance': ('mculora', dict(sampling='utterance', alpha=2.0)),
    'complete, then adapters alone, with every other reading': (
        'mculora',
        dict(
            pretrain='complete',
            finetune='adapters',
            encoder_dropout=True,
            lr_B=4.0,
            reduction='sum',
            dpft='modality',
            bounds=(0.05, 0.95),
        ),
    ),
    'on LSTMs': ('mculora', dict(encoder='lstm', depth=1)),
    'on LSTMs by speaker': ('mculora', dict(encoder='lstm-speakers', depth=1)),
    'momke-per-condition': ('momke-per-condition', dict(depth=1, epochs=1)),
    'dicmor': ('dicmor', dict(depth=1, epochs=1)),
    'imder': ('imder', dict(depth=1, epochs=1)),
}
RUNS |= {
    name: (name, {})
    for name in methods()
    if name not in RUNS and not name.endswith('-per-condition')
}
# other processors and versions round differently: by 1e-7 here
CLOSE = dict(rel=1e-5, abs=1e-5)


def parts():
    s = split(twin('iemocap', 'tiny'), seed=1)
    stats = fit_scale(s.train)
    return Splits(*(scale(p, stats) for p in (s.train, s.val, s.test)), s.name)


def numbers(run, s):
    "All losses of all epochs, and how large the final predictions are under each condition."
    name, options = RUNS[run]
    torch.manual_seed(1)
    method = create(name, s.train.task, s.train.widths, known(name, PINNED | options))
    history = fit(method, s, 1, progress=False)
    losses = [{k: v for k, v in row.items() if k.startswith('train/')} for row in history]
    said = predictions(method, s.test).clamp(min=-1e3).abs().mean((1, 2)).tolist()
    return dict(losses=losses, predictions=said, q=method.q.tolist())


def drawn(s):
    "What a seed decides: who validates, who sits in which batch, what is dropped."
    method = create('mculora', s.train.task, s.train.widths, known('mculora', PINNED))
    steps = plan_epoch(s.train, method.stages()[0], method.q, 3)
    return dict(
        val=list(s.val.ids),
        batches=[rows.tolist() for rows, _, _ in steps],
        dropped=[mask_hash(mask) for _, mask, _ in steps],
        protocol=mask_hash(random_mask(50, 3, 0.5, 66)),
    )


def nearly(x):
    "The same structure, its numbers with a tolerance."
    if isinstance(x, dict):
        return {k: nearly(v) for k, v in x.items()}
    if isinstance(x, list):
        return [nearly(v) for v in x]
    return pytest.approx(x, **CLOSE)


@pytest.fixture(scope='module')
def s():
    return parts()


GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize('run', RUNS)
def test_a_run_gives_the_numbers_that_it_gave(s, run):
    assert numbers(run, s) == nearly(GOLDEN['runs'][run])


def test_a_seed_draws_what_it_drew(s):
    assert drawn(s) == GOLDEN['drawn']


def test_every_pinned_run_is_there():
    assert set(GOLDEN['runs']) == set(RUNS)


if __name__ == '__main__':
    torch.set_num_threads(1)
    s = parts()
    found = dict(
        data=s.train.task.name, drawn=drawn(s), runs={run: numbers(run, s) for run in RUNS}
    )
    FILE.write_text(json.dumps(found, indent=1) + '\n')
    print(f'wrote {FILE.name}')
