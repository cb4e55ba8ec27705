"""Faults on purpose: runs that are killed, starved of disk, given damaged files or each other's
company must end as if nothing had been. The whole campaign: `make test-faults`."""

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from forks import (
    EPOCH,
    KILLED,
    OPTIONS,
    Place,
    at_call,
    die,
    fill,
    jump,
    nobody,
    outcome,
    small_files,
    until,
)

from mculora.basics.dialogues import DataError, fingerprint
from mculora.basics.masking import load_mask
from mculora.experiments.results import beside, read_result
from mculora.experiments.runs import RunConfig, finished, load_method, prepare, run
from mculora.basics.files import load_sealed
from mculora.data.sources import example, load_dialogues, write_layout
from mculora.training.trainer import earlier, load_checkpoint


# --- what a place holds ---


def all_whole(place):
    "No file under its final name is half a file."
    for p in place.path.rglob('*'):
        if p.name.startswith('.') or not p.is_file():
            continue
        if p.name == 'result.json':
            read_result(p)
        elif p.name == 'curves.parquet':
            pd.read_parquet(p)
        elif 'checkpoint' in p.name or p.parent.name in ('stages', 'cache'):
            load_sealed(p)
        elif p.suffix == '.safetensors':
            from safetensors.torch import load_file

            load_file(p)


def ends_well(campaign, place, whole, injected=1, **options):
    "Start again without any fault, compare with the run that had none, and count."
    code, text = place.go(**options)
    there = (
        [
            p
            for p in place.results
            if read_result(p).config['options']['rank'] == (OPTIONS | options)['rank']
        ]
        if code == 0
        else []
    )
    right = len(there) == 1 and outcome(there[0].parent) == whole
    campaign.update(
        {
            'faults injected': injected,
            'survived': injected * right,
            'results lost': int(not there),
            'wrong results accepted': int(bool(there) and not right),
        }
    )
    assert there, text
    assert right
    return text


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp('data')
    write_layout(to, example('iemocap', lengths=(3, 5, 2, 7, 4) * 3))
    return to


@pytest.fixture(scope='session')
def alone(data, tmp_path_factory):
    """The run that nothing happens to: its place, how many seconds it took, and each flush and
    rename."""
    place, calls = Place(tmp_path_factory.mktemp('whole') / 'place', data), data / 'calls'
    start = time.monotonic()
    code, text = place.go((at_call, (0, '', 0, calls)))
    place.seconds = time.monotonic() - start
    assert code == 0 and len(EPOCH.findall(text)) == 8, text
    place.calls = calls.read_text().splitlines()
    place.whole = outcome(place.results[0].parent)
    return place


@pytest.fixture
def place(alone, data, tmp_path):
    return Place(tmp_path / 'place', data)


# --- killed ---

KINDS = {
    'the first look at the folder': '/.writable',
    'the data cache': '/cache',
    'a checkpoint': 'checkpoint.safetensors',
    'a shared stage': '/stages',
    'a mask': '/masks',
    'the curves': '/curves.parquet',
    'the model': '/model.safetensors',
    'the result': '/result.json',
}


def kind(call):
    what = call.split(' ', 1)[1]
    what = re.sub(r'/\.(?=[^/]+\.[0-9a-f]{32}$)', '/', what)  # a temporary name
    return next((k for k, part in KINDS.items() if part in what), 'a folder')


def test_a_new_name_is_flushed_with_its_folder(alone):
    "Else a power cut may lose the newest result."
    renamed = [(c, then) for c, then in pairwise(alone.calls) if c.startswith('replace ')]
    assert renamed
    for call, then in renamed:
        if not then.startswith('replace '):
            assert then == f'fsync {Path(call.removeprefix("replace ")).parent}'


def killed(place, *before, **more):
    code, text = place.go(*before, **more)
    assert code == KILLED, text
    all_whole(place)
    return text


def moments(calls, n, seed):
    """n flushes and renames with a way to die at each; every kind of file comes up before one
    comes twice."""
    at, by = random.Random(seed), {}
    for i, call in enumerate(calls):
        by.setdefault(kind(call), []).append(i)
    assert set(KINDS) <= set(by)
    turns = [
        (k, at.choice(by[k]), at.choice(['before', 'half', 'after']))
        for _ in range(n // len(by) + 1)
        for k in sorted(by)
    ]
    return turns[:n]


@pytest.mark.parametrize(
    'what, how',
    [
        ('a checkpoint', 'half'),
        ('a shared stage', 'after'),
        pytest.param('the result', 'half', marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_it_writes_ends_with_the_same_bits(campaign, place, alone, what, how):
    at = [i for i, c in enumerate(alone.calls) if kind(c) == what and c.startswith('fsync')][-1]
    killed(place, (at_call, (at, how)))
    ends_well(campaign, place, alone.whole)
    kept = 'curves.parquet', 'model.safetensors', 'outcomes.parquet', 'result.json', 'where.json'
    assert not [p for p in place.results[0].parent.iterdir() if p.name not in kept]


@pytest.mark.faults
@pytest.mark.parametrize('part', range(5))
def test_killed_at_a_flush_or_a_rename(campaign, tmp_path, data, alone, part):
    "25 kills, of every kind of file."
    for n, (_, at, how) in enumerate(moments(alone.calls, 25, seed=7)[part::5]):
        place = Place(tmp_path / f'{n}', data)
        killed(place, (at_call, (at, how, n)))
        ends_well(campaign, place, alone.whole)


@pytest.mark.faults
@pytest.mark.parametrize('part', range(5))
def test_killed_at_any_time(campaign, tmp_path, data, alone, part):
    """25 kills by the clock, somewhere from the first line of code to the last; two of five are
    killed a second time."""
    at, done = random.Random(part), 0
    while done < 5:
        place, wait = Place(tmp_path / f'{part}-{at.random()}', data), at.uniform(0, alone.seconds)
        for _ in range(1 + (done < 2)):
            p = place.start()
            p.join(wait)
            p.kill()
            p.join()
            # it was faster: no fault, another try
            if p.exitcode != KILLED:
                break
            all_whole(place)
        else:
            ends_well(campaign, place, alone.whole)
            done += 1


# --- no room, no permission, no folder, no clock ---


def fails(place, message, *before, **more):
    code, text = place.go(*before, **more)
    assert code == 1 and re.search(message, text), text
    all_whole(place)
    assert not place.results
    return text


@pytest.mark.faults
@pytest.mark.parametrize('limit', [2_000, 8_000, 20_000, 30_000, 45_000, 60_000])
def test_files_that_cannot_grow(campaign, place, alone, limit):
    fails(place, 'cannot write', (small_files, (limit,)))
    ends_well(campaign, place, alone.whole)


@contextmanager
def disk(at, megabytes):
    at.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(at)], capture_output=True
    ).returncode:
        pytest.skip('a small disk cannot be mounted here')
    try:
        yield at
    finally:
        subprocess.run(['umount', '-l', str(at)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize('epochs', [1, 4, 8])
def test_a_disk_that_is_full(campaign, tmp_path, data, alone, epochs):
    with disk(tmp_path / 'disk', 40) as at:
        place = Place(at / 'place', data, tmp_path)
        fails(place, 'cannot write .* start the same run again', during=[(epochs, fill, (at,))])
        (at / 'filler').unlink()
        text = ends_well(campaign, place, alone.whole)
        assert len(EPOCH.findall(text)) <= 8 - epochs + 1  # it went on


@pytest.mark.faults
def test_a_disk_without_room_is_refused_before_anything_is_computed(
    campaign, tmp_path, data, alone
):
    with disk(tmp_path / 'disk', 40) as at:
        place = Place(at / 'place', data, tmp_path)
        place.path.mkdir()
        fill(at)
        assert not EPOCH.findall(fails(place, 'MB free at .*nothing was started|cannot write'))
        (at / 'filler').unlink()
        ends_well(campaign, place, alone.whole)


@pytest.mark.faults
def test_a_folder_that_is_read_only_or_becomes_so(campaign, alone):
    with tempfile.TemporaryDirectory() as t:
        Path(t).chmod(0o777)
        write_layout(Path(t) / 'data', example('iemocap', lengths=(3, 5, 2, 7, 4) * 3))
        place = Place(Path(t) / 'place', Path(t) / 'data')
        for p in (place.path, place.path / 'runs', place.path / 'cache'):
            p.mkdir(mode=0o777, parents=True)
            p.chmod(0o777)
        (place.path / 'runs').chmod(0o555)
        assert not EPOCH.findall(
            fails(place, 'cannot write to .*nothing was started', (nobody, ()))
        )
        (place.path / 'runs').chmod(0o777)
        ours = place.path / 'runs' / 'iemocap' / 'mculora' / alone.results[0].parent.name
        fails(
            place,
            f'cannot write {ours}.*Permission denied',
            (nobody, ()),
            during=[(3, os.chmod, (ours, 0o555))],
        )
        for p in (place.path / 'runs').rglob('*'):
            p.chmod(0o777)
        assert len(EPOCH.findall(ends_well(campaign, place, alone.whole, 2))) <= 6
        for p in ours.iterdir():
            p.chmod(0o644)
        # a finished run is looked up where nothing can be written
        ours.chmod(0o555)
        code, text = place.go((nobody, ()))
        ours.chmod(0o777)
        assert code == 0 and not EPOCH.findall(text), text


@pytest.mark.faults
def test_data_that_vanish(campaign, tmp_path, alone):
    data, away = tmp_path / 'data', tmp_path / 'away'
    write_layout(data, example('iemocap', lengths=(3, 5, 2, 7, 4) * 3))
    place = Place(tmp_path / 'during', data)
    ends = place.go(
        during=[(2, os.rename, (data, away)), (3, shutil.rmtree, (place.path / 'cache',))]
    )
    # what has been read is not read again
    assert ends[0] == 0, ends[1]
    away.rename(data)
    ends_well(campaign, place, alone.whole, 2)
    place = Place(tmp_path / 'between', data)
    killed(place, during=[(5, die, ())])
    data.rename(away)
    assert not EPOCH.findall(fails(place, f'{data}.*found no such folder'))
    # and half of them are not the data either
    (data / 'IEMOCAP').mkdir(parents=True)
    fails(place, 'DataError')
    shutil.rmtree(data)
    away.rename(data)
    assert len(EPOCH.findall(ends_well(campaign, place, alone.whole, 3))) <= 4


@pytest.mark.faults
@pytest.mark.parametrize('what', ['', 'runs', 'runs/iemocap/mculora/stages'])
def test_output_that_vanishes(campaign, place, alone, what):
    code, text = place.go(during=[(5, shutil.rmtree, (place.path / what,))])
    assert code == 0 if 'stages' in what else code == 1 and 'cannot write' in text, text
    ends_well(campaign, place, alone.whole)


@pytest.mark.faults
@pytest.mark.parametrize('seconds', [1e9, -1e9, 3600.0, -3600.0])
def test_clocks_that_jump(campaign, tmp_path, data, alone, seconds):
    place = Place(tmp_path / 'whole', data)
    assert place.go(during=[(2, jump, (seconds,)), (6, jump, (-2 * seconds,))])[0] == 0
    ends_well(campaign, place, alone.whole, 2)
    place = Place(tmp_path / 'killed', data)
    killed(place, during=[(2, jump, (seconds,)), (6, die, ())])
    ends_well(campaign, place, alone.whole, 2)


# --- damaged files ---


def replace(path, content):
    "A new file: the old one may still be mapped."
    path.unlink()
    path.write_bytes(content)


def damages(whole, n, seed):
    "One bit flipped, or cut short, n times; the first and the last byte among them."
    at = random.Random(seed)
    for k in range(n):
        if k % 4 == 3:
            yield whole[: at.randrange(len(whole))]
        else:
            b = bytearray(whole)
            b[(0, -1)[k] if k < 2 else at.randrange(min(len(b), 400) if k % 2 else len(b))] ^= (
                1 << at.randrange(8)
            )
            yield bytes(b)


def spoil(path):
    replace(path, next(damages(path.read_bytes()[::-1], 1, 0))[::-1])


def reading(place, data):
    "For each kind of file: where one is, and what a reader sees in it."
    key = read_result(folder := place.results[0].parent).config_hash
    test = prepare(RunConfig(data_root=str(data), device='cpu'))[0].test

    def load(p):
        tensors, about = load_sealed(p)
        return {k: v.tolist() for k, v in tensors.items()}, about

    def model(p):
        m, stats = load_method(p.parent)
        weights = {k: v.tolist() for k, v in m.state_dict().items()}
        return weights, {k: [x.tolist() for x in v] for k, v in stats.items()}

    return {
        'stage': (place.one('*pretrain*.safetensors'), load),
        'cache': (next((place.path / 'cache').iterdir()), lambda p: fingerprint(load_dialogues(p))),
        'mask': (place.one('*rate0.5*.safetensors'), lambda p: load_mask(p, test).tolist()),
        'model': (folder / 'model.safetensors', model),
        'curves': (folder / 'curves.parquet', lambda p: beside(p).read_bytes()),
        'result': (folder / 'result.json', read_result),
        'finished': (folder / 'model.safetensors', lambda p: finished(p.parent, key)),
    }


@pytest.mark.faults
@pytest.mark.filterwarnings('ignore:.*the run is made again')
@pytest.mark.parametrize(
    'what', ['stage', 'cache', 'mask', 'model', 'curves', 'result', 'finished', 'checkpoint']
)
def test_a_damaged_file_is_refused_or_says_the_same(
    campaign, tmp_path, data, alone, monkeypatch, what
):
    "60 times: bits flipped in the header and in the values, and files cut short."
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'cache'))
    place = Place(tmp_path / 'place', data)
    if what == 'checkpoint':
        killed(place, during=[(6, die, ())])
        path, read = (
            place.one('checkpoint.safetensors'),
            lambda p: (lambda f: f and ({k: v.tolist() for k, v in f[0].items()}, f[1]))(
                load_checkpoint(p)
            ),
        )
    else:
        shutil.copytree(alone.path, place.path)
        path, read = reading(place, data)[what]
    whole, said, refused = path.read_bytes(), read(path), 0
    assert said
    for broken in damages(whole, 60, seed=len(whole)):
        replace(path, broken)
        try:
            found = read(path)
        except DataError as e:
            assert path.name in str(e)
            found = None
        refused += found is None
        right = found is None or found == said
        campaign.update(
            {'faults injected': 1, 'survived': int(right), 'wrong results accepted': int(not right)}
        )
        assert right
    assert refused > 50


@pytest.mark.faults
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(campaign, place, alone):
    killed(place, during=[(6, die, ())])
    last = place.one('checkpoint.safetensors')
    # of the second stage, and of the first
    assert [load_checkpoint(p)[1]['at']['epoch'] for p in (last, earlier(last))] == [1, 4]
    spoil(last)
    text = ends_well(campaign, place, alone.whole)
    assert f'{last}: found a damaged file' in text and EPOCH.findall(text)[0] == 'finetune 1'


@pytest.mark.faults
@pytest.mark.parametrize('stage_too', [False, True])
def test_two_damaged_checkpoints_are_a_start_from_the_beginning(campaign, place, alone, stage_too):
    killed(place, during=[(6, die, ())])
    last = place.one('checkpoint.safetensors')
    for p in [last, earlier(last)] + [place.one('*pretrain*.safetensors')] * stage_too:
        spoil(p)
    text = ends_well(campaign, place, alone.whole, 2 + stage_too)
    # the shared stage is whole, and spares the first
    assert EPOCH.findall(text)[0] == ('pretrain 1' if stage_too else 'finetune 1')
    assert len(re.findall('it is not used$', text, re.M)) == 2 + stage_too


@pytest.mark.faults
@pytest.mark.parametrize('name', ['result.json', 'model.safetensors', 'curves.parquet'])
@pytest.mark.parametrize('gone', [False, True])
def test_a_result_without_its_files_is_made_again(campaign, place, alone, name, gone):
    shutil.copytree(alone.path, place.path)
    at = place.results[0].parent / name
    at.unlink() if gone else spoil(at)
    text = ends_well(campaign, place, alone.whole)
    assert EPOCH.findall(text) and (
        (gone and name == 'result.json') or 'the run is made again' in text
    )


@pytest.mark.faults
def test_a_damaged_mask_is_named_and_drawn_again_once_it_is_gone(campaign, place, alone):
    killed(
        place,
        (
            at_call,
            (next(i for i, c in enumerate(alone.calls) if kind(c) == 'the curves'), 'before'),
        ),
    )
    mask = place.one('*rate0.5*.safetensors')
    spoil(mask)
    fails(place, f'mask file {mask}: found')
    mask.unlink()
    ends_well(campaign, place, alone.whole)


@pytest.mark.faults
def test_a_damaged_cache_is_read_again(campaign, place, alone):
    killed(place, during=[(2, die, ())])
    spoil(next((place.path / 'cache').iterdir()))
    ends_well(campaign, place, alone.whole, 2)


# --- two at once ---


def test_two_processes_do_a_run_once(campaign, place, alone):
    """The second waits, says for whom, and looks up the result. So it is too when Snakemake is
    killed, its children live on, and a second pass is started beside them."""
    one = place.start(during=[(3, until, (place.log(1), 'waiting for it'))])
    until(one.log, '^pretrain 3$', one)
    two = place.start()
    until(
        two.log,
        rf'another process at work on this run \(host .+, process {one.pid}\): waiting for it',
        two,
    )
    for p in (one, two):
        p.join(120)
    assert (one.exitcode, two.exitcode) == (0, 0)
    assert len(EPOCH.findall(one.log.read_text())) == 8 and not EPOCH.findall(two.log.read_text())
    ends_well(campaign, place, alone.whole)


@pytest.mark.faults
def test_who_waits_goes_on_where_the_other_was_killed(campaign, place, alone):
    one = place.start(during=[(5, time.sleep, (300,))])
    until(one.log, '^finetune 1$', one)
    two = place.start()
    until(two.log, 'waiting for it', two)
    one.kill()
    two.join(120)
    assert two.exitcode == 0 and 3 <= len(EPOCH.findall(two.log.read_text())) <= 4
    ends_well(campaign, place, alone.whole)


@pytest.mark.faults
def test_three_at_once_from_nothing(campaign, place, alone):
    three = [place.start() for _ in range(3)]
    for p in three:
        p.join(240)
    assert [p.exitcode for p in three] == [0] * 3
    assert sum(len(EPOCH.findall(p.log.read_text())) for p in three) == 8
    ends_well(campaign, place, alone.whole, 2)


@pytest.mark.faults
def test_different_runs_at_once_share_cache_masks_and_stages(campaign, tmp_path, data, alone):
    other = Place(tmp_path / 'alone', data)
    assert other.go(rank=3)[0] == 0
    both = Place(tmp_path / 'both', data)
    two = [both.start(rank=r) for r in (2, 3)]
    for p in two:
        p.join(120)
    assert [p.exitcode for p in two] == [0, 0]
    ends_well(campaign, both, alone.whole, rank=2)
    ends_well(campaign, both, outcome(other.results[0].parent), rank=3)


# --- numbers that are not finite ---


def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    campaign, tmp_path, data, monkeypatch
):
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'cache'))
    size = 4
    c = RunConfig(
        data_root=str(data),
        out_dir=str(tmp_path / 'runs'),
        device='cpu',
        schedule='paper',
        options=OPTIONS | dict(batch_size=size),
        check=False,  # it takes steps, too
    )
    from mculora.model.mculora import MCULoRA

    real, steps = MCULoRA.loss, count()

    def loss(self, b, stage):
        total, parts = real(self, b, stage)
        return (total * float('inf') if next(steps) == bad else total), parts

    monkeypatch.setattr(MCULoRA, 'loss', loss)
    train, stage = prepare(c)[0].train, 'pretrain'
    per_epoch = -(-len(train) // size)
    # the second step of the third epoch
    bad = 2 * per_epoch + 1
    with pytest.raises(
        FloatingPointError,
        match=(
            f'{stage}, epoch 3, step 2 of {per_epoch}: found loss inf.*; expected finite '
            'numbers; the last checkpoint is kept: .*checkpoint.safetensors'
        ),
    ) as e:
        run(c, progress=False, every=-1.0)
    ids = re.search('in the batch of (.*?);', str(e.value))[1].split(', ')
    kept = load_checkpoint(next((tmp_path / 'runs').rglob('checkpoint.safetensors')))
    right = (
        kept[1]['at']['epoch'] == 2
        and all(v.isfinite().all() for v in kept[0].values())
        and set(ids) <= set(train.ids)
        and len(ids) == size
        and not list((tmp_path / 'runs').rglob('result.json'))
    )
    campaign.update(
        {
            'faults injected': 1,
            'survived': int(right),
            'wrong results accepted': len(list((tmp_path / 'runs').rglob('result.json'))),
        }
    )
    assert right


# --- the same seed ---


# with one thread, runs that went on after a kill have the bits of one that did not
@pytest.mark.parametrize('threads', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_seed_gives_the_same_bits(tmp_path, data, threads):
    """On a CPU, for each number of threads by itself, in processes of their own; between numbers
    of threads nothing is promised."""
    places = [Place(tmp_path / f'{k}', data) for k in range(2)]
    for p in places:
        assert p.go((torch.set_num_threads, (threads,)), width=32, epochs=1)[0] == 0
    one, two = (outcome(p.results[0].parent) for p in places)
    assert one == two
    assert read_result(places[0].results[0]).environment['threads'] == threads


@pytest.mark.parametrize(
    'device',
    [
        'cpu',
        pytest.param(
            'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
        ),
    ],
)
def test_what_is_promised_on_a_gpu_holds_on_each_device(tmp_path, data, monkeypatch, device):
    """The same seed gives the same orders, combinations, masks and first weights on every device;
    sums may be rounded differently there, so the numbers of two runs agree to rounding. Bits are
    promised on a CPU alone."""
    monkeypatch.setenv('MCULORA_CACHE', str(tmp_path / 'cache'))
    runs = [
        run(
            RunConfig(
                data_root=str(data),
                out_dir=str(tmp_path / str(k)),
                device=where,
                schedule='paper',
                options=OPTIONS | dict(epochs=1),
                check=False,
            ),
            progress=False,
        )
        for k, where in enumerate([device, device] + ['cpu'] * (device != 'cpu'))
    ]
    curves = [pd.read_parquet(folder / 'curves.parquet') for _, folder in runs]
    for c in curves[1:]:
        assert (c['train/loss'] - curves[0]['train/loss']).abs().max() < 1e-3
    assert all(r.masks == runs[0][0].masks for r, _ in runs)
    if device == 'cpu':
        assert runs[0][0].scores == runs[1][0].scores and curves[0]['train/loss'].equals(
            curves[1]['train/loss']
        )
