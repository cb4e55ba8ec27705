"""Runs in processes of their own, and what is done to them there. Each process is a fork of one
that has imported everything: 20 ms and not 5 s."""

import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import signal
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

import conftest
import pandas as pd
import psutil
import torch

from mculora.experiments.results import beside, file_hash, read_result
from mculora.experiments.runs import RunConfig, run

ROOT = Path(__file__).resolve().parent.parent
# two stages of four epochs
OPTIONS = dict(width=8, depth=1, rank=2, epochs=4, batch_size=8)
EPOCH = re.compile(r'^(?:pretrain|finetune) \d+$', re.M)
KILLED = -signal.SIGKILL
SERVER = multiprocessing.get_context('forkserver')
BASELINES = [
    f'mculora.baselines.{p.stem}' for p in (ROOT / 'mculora' / 'baselines').glob('[a-z]*.py')
]


# --- in the process ---


def child(path, log, settings, before, during):
    "Set up what will go wrong, then run; `during`: (epochs done so far, function, arguments)."
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1) for fd in (1, 2))
    os.chdir(ROOT)
    os.environ['MCULORA_CACHE'] = str(path / 'cache')
    torch.set_num_threads(1)
    for f, args in before:
        f(*args)
    done = count(1)

    def on_epoch(row):
        print(row['stage'], row['epoch'])
        n = next(done)
        for at, f, args in during:
            if at == n:
                f(*args)

    # half a second in each process; what is broken here are files, not the method
    run(
        RunConfig(out_dir=str(path / 'runs'), device='cpu', check=False, **settings),
        progress=False,
        every=0.0,
        on_epoch=on_epoch,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds):
    """At once, but after so much more work: on the clock of the process, which a busy machine does
    not change."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def at_call(n, how, seed=0, note=None):
    """Die at the n-th flush or rename: before it, after it, or with the file cut short as when the
    kernel had written only a part. With `note` only write down what each call was about."""
    calls, real, at = (
        count(),
        {name: getattr(os, name) for name in ('fsync', 'replace')},
        random.Random(seed),
    )

    def wrapped(name):
        def call(*args):
            now = next(calls)
            if note:
                what = os.readlink(f'/proc/self/fd/{args[0]}') if name == 'fsync' else str(args[1])
                with open(note, 'a') as f:
                    f.write(f'{name} {what}\n')
            if now == n and not note:
                if how == 'half' and name == 'fsync':
                    with suppress(OSError):
                        os.ftruncate(args[0], at.randrange(os.fstat(args[0]).st_size))
                if how == 'after':
                    real[name](*args)
                die()
            return real[name](*args)

        return call

    for name in real:
        setattr(os, name, wrapped(name))


def small_files(limit):
    "No file may grow beyond `limit` bytes: writing fails as on a full disk."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill(folder):
    "Until not a byte is free."
    with suppress(OSError), open(Path(folder) / 'filler', 'wb', buffering=0) as f:
        for size in (2**16, 1):
            with suppress(OSError):
                while True:
                    f.write(bytes(size))


def jump(seconds):
    "All clocks, at once."
    for name in ('time', 'monotonic', 'perf_counter'):
        setattr(time, name, lambda real=getattr(time, name): real() + seconds)


def nobody():
    "A user whom permissions mean something to."
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def until(log, what, p=None):
    "Wait until a process has printed something."
    for _ in range(30_000):
        if log.exists() and re.search(what, log.read_text(), re.M):
            return
        assert p is None or p.exitcode is None, log.read_text()
        time.sleep(0.01)
    raise AssertionError(log.read_text())


# --- outside ---


@functools.cache
def server():
    "Starts the process that all others are forks of."
    said = {
        'OMP_NUM_THREADS': '1',
        'OMP_WAIT_POLICY': 'PASSIVE',
        'PYTHONPATH': f'{ROOT / "tests"}{os.pathsep}{ROOT}',
    }
    # Adam imports the last but one
    ours = 'mculora.model.mculora', *BASELINES, 'pyarrow.parquet'
    SERVER.set_forkserver_preload([*ours, 'torch._dynamo', 'forks'])
    with patch.dict(os.environ, said):
        multiprocessing.forkserver.ensure_running()
    conftest.SERVERS.append(psutil.Process(multiprocessing.forkserver._forkserver._forkserver_pid))


class Place:
    "A folder for runs, with a cache of its own; the data are shared. `settings`: of the runs."

    def __init__(self, path, data=None, logs=None, schedule='paper', **settings):
        self.path, self.data, self.logs, self.n = (
            Path(path),
            data,
            logs or Path(path).parent,
            count(),
        )
        self.settings = dict(data_root=data and str(data), schedule=schedule, **settings)

    def start(self, *before, during=(), **options):
        server()
        self.path.mkdir(exist_ok=True, parents=True)
        log = self.log(next(self.n))
        p = SERVER.Process(
            target=child,
            args=(self.path, log, dict(self.settings, options=OPTIONS | options), before, during),
        )
        p.start()
        p.log = log
        return p

    def log(self, n):
        return self.logs / f'{self.path.name}-{n}.log'

    def go(self, *before, during=(), **options):
        "Exit code, and what was printed."
        p = self.start(*before, during=during, **options)
        p.join(300)
        assert p.exitcode is not None, 'five minutes were not enough'
        return p.exitcode, p.log.read_text() if p.log.exists() else ''

    @property
    def results(self):
        return sorted(self.path.rglob('result.json'))

    def one(self, name):
        return next(p for p in sorted(self.path.rglob(name)) if not p.name.startswith('.'))


def outcome(folder):
    """All that must be equal to the bit: scores, masks, weights, curves without the clock and
    without who trained a shared stage."""
    r = read_result(folder)
    curves = pd.read_parquet(beside(folder / 'curves.parquet'))
    return (
        [s.model_dump() for s in r.scores],
        r.masks,
        r.config_hash,
        file_hash(beside(folder / 'model.safetensors')),
        curves[[c for c in curves if not c.startswith('seconds') and c != 'borrowed']].to_csv(
            index=False
        ),
    )


# imported last: the collector of a fork would touch, and so copy, all that is there by now
gc.freeze()
