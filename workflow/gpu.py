"""What only a GPU can tell, measured in one go: `make gpu`. It is sized for some eight minutes,
and nobody has run it on a GPU yet. On a CPU, at tiny size, it shows that all of it runs:
`make gpu ARGS='--size tiny --device cpu'`."""

import json
import math
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mculora.basics.dialogues import Splits, split, to
from mculora.basics.method import create
from mculora.data.twins import open_dataset
from mculora.experiments.bench import bench, line
from mculora.experiments.results import environment
from mculora.experiments.runs import resolve_device, run_all
from mculora.experiments.studies import ROWS
from mculora.training.evaluation import predictions_of
from mculora.training.options import RunConfig
from mculora.training.replicas import Together
from mculora.training.trainer import (
    Options,
    fit,
    moments,
    recorded,
    recorded_evaluation,
    thaw,
    train_epoch,
)

SMALL = dict(width=16, depth=1, batch_size=8)  # a model to see that it runs
# what is timed -> its column of the history
TIMED = {'an epoch': 'seconds/train', 'its evaluation': 'seconds/evaluate'}


class Part(StrEnum):
    "What can be measured; the last is not among the usual ones."

    quiet = 'quiet'
    epochs = 'epochs'
    bench = 'bench'
    paper = 'paper'
    methods = 'methods'


def data(size: str, device: torch.device) -> Splits:
    "IEMOCAP, or its twin, on the device."
    return split(to(open_dataset('iemocap', None, size), device), fold=1)


def model(d: Splits, size: str, **options):
    torch.manual_seed(66)
    options |= SMALL if size == 'tiny' else {}
    return create('mculora', d.train.task, d.train.widths, options).to(d.train.present.device)


def quiet(size: str, device: torch.device, say: Callable) -> dict:
    """Where the host waits for the GPU after the first step of an epoch, or in predictions under
    all conditions, eager or recorded: what PyTorch says of it; '' is nowhere. None on a CPU, where
    nothing waits."""
    if device.type != 'cuda':
        say(f'does the host wait for the device? That is not to be told on {device}')
        return dict(eager=None, recorded=None)
    d, found = data(size, device), {}

    def strict(step, of):
        torch.cuda.set_sync_debug_mode('default' if step == of else 'error')

    for name in ('eager', 'recorded'):
        net = model(d, size)
        stage = net.stages()[0]
        ps = list(thaw(net, stage).values())
        optimiser = torch.optim.Adam(ps, lr=1e-4, fused=True, capturable=True)
        moments(optimiser)
        how = Options('float32', False, 0, None, None, graphs=name == 'recorded')
        team = Together([net])
        play, look = recorded(team, stage, optimiser, how), recorded_evaluation(team, stage, how)
        epoch = [team, [stage], [d.train], optimiser, [0], 'float32']
        looks = partial(predictions_of, team, [d.val], stage=stage.name, play=look)
        train_epoch(*epoch, play=play)  # all shapes are recorded
        looks()
        try:
            train_epoch(*epoch, strict, play)
            torch.cuda.set_sync_debug_mode('error')
            looks()
            found[name] = ''
        except RuntimeError as e:
            found[name] = str(e)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        say(f'does the host wait for {device}, {name}? {found[name] or "no"}')
    return found


def epochs(size: str, device: torch.device, say: Callable, n: int = 4) -> dict:
    """Seconds of an epoch of one model and of its evaluation, eager and recorded, and how far its
    losses are apart."""
    d, out = data(size, device), {}
    for graphs in (False, True):
        history = fit(model(d, size, epochs=n), d, schedule='paper', progress=False, graphs=graphs)
        out['recorded' if graphs else 'eager'] = [
            {k: row[k] for k in ('stage', 'epoch', 'train/loss', *TIMED.values())}
            for row in history
        ]
    for stage in dict.fromkeys(row['stage'] for row in out['eager']):
        eager, played = ([r for r in out[k] if r['stage'] == stage] for k in ('eager', 'recorded'))
        apart = max(abs(x['train/loss'] - y['train/loss']) for x, y in zip(eager, played))
        out[stage] = dict(apart=apart)
        for what, column in TIMED.items():
            a, b = (min(r[column] for r in rows[1:]) for rows in (eager, played))
            out[stage][what] = dict(eager=a, recorded=b, ratio=a / b)
            say(f'{stage}: {what} takes {a:.3f} s eager and {b:.3f} s recorded ({a / b:.1f}x)')
        say(f'{stage}: losses are {apart:.1g} apart')
    return out


def runs(methods, size: str, device: torch.device, out: Path, say: Callable, seeds: int) -> dict:
    "Seconds of all folds and seeds of each method, side by side, on the paper's schedule."
    done = {}
    for name in methods:
        start = time.perf_counter()
        configs = [
            RunConfig(
                method=name,
                fold=fold,
                seed=66 + k,
                schedule='paper' if size == 'full' else 'quick',
                size=size,
                device=str(device),
                out_dir=str(out),
                check=False,
            )
            for fold in (range(1, 6) if size == 'full' else (1, 2))
            for k in range(seeds)
        ]
        results = run_all(configs, progress=False, together=len(configs))
        failed = [str(r) for r, _ in results if isinstance(r, Exception)]
        seconds = time.perf_counter() - start
        done[name] = dict(runs=len(configs), seconds=seconds, failed=failed)
        say(f'{name}: {len(configs)} runs in {seconds:.0f} s' + ''.join(f'; {x}' for x in failed))
    return done


def main(
    part: Annotated[list[Part], typer.Option(help='Which parts.')] = list(Part)[:-1],
    size: Annotated[str, typer.Option(help="'full', or 'tiny' to see that it runs.")] = 'full',
    device: Annotated[str, typer.Option(help='Where: cuda, cuda:1, ...')] = 'cuda',
    seeds: Annotated[int, typer.Option(help="Of the paper's schedule.", min=1)] = 5,
    methods: Annotated[list[str] | None, typer.Option(help='Default: those of Table 1.')] = None,
    out: Annotated[Path, typer.Option(help='A folder that is new, for results.')] = Path(
        'runs/gpu'
    ),
):
    "Measure; every part is written as soon as it is there."
    where, said = resolve_device(device), []
    out.mkdir(parents=True, exist_ok=True)
    found = dict(size=size, environment=environment(where), lines=said)

    def say(text):
        said.append(text)
        typer.echo(text)

    at = dict(size=size, device=where, say=say)
    todo = dict(
        quiet=lambda: quiet(**at),
        epochs=lambda: epochs(**at),
        bench=lambda: bench(size, str(where), 1, say=lambda row: say(line(row))),
        paper=lambda: runs(['mculora'], **at, out=out, seeds=seeds),
        methods=lambda: runs(methods or ROWS, **at, out=out, seeds=seeds),
    )
    for name in part:
        start = time.perf_counter()
        found[name] = todo[name]()
        say(f'{name}: {time.perf_counter() - start:.0f} s in all')
        (out / 'gpu.json').write_text(json.dumps(found, indent=1, default=str) + '\n')
    failed = [
        x for p in ('paper', 'methods') for r in found.get(p, {}).values() for x in r['failed']
    ]
    apart = [v['apart'] for v in found.get('epochs', {}).values() if isinstance(v, dict)]
    waits = any(found.get('quiet', {}).values())
    bad = failed or waits or any(not math.isfinite(x) or x > 1e-2 for x in apart)
    raise typer.Exit(int(bool(bad)))


if __name__ == '__main__':
    typer.run(main)
