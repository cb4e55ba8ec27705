"""Small faults, put into the code one at a time: does a test notice?

    make test-mutants                        # all of mutants.yaml: 15 to 30 s a fault and core
    make test-mutants ARGS="--review"        # those that an earlier suite missed
    make test-mutants ARGS="--module dpft"   # those of one module
    make test-mutants ARGS="--fault WORDS"   # those whose name has these words
    make test-mutants ARGS="--sample 50"     # 50 of them by lot, always the same

Mutation tools change a module and run the tests. Here most tests are cells of the notebook that
the module is exported from, and such a cell runs the notebook's own copy of the code. So a fault
is put into both, the module and the exported cell, in a copy of the repository. First the
notebook runs, then the tests that `mutants.yaml` names, until one fails. All of them are part of
`make test`."""

import argparse
import ast
import contextlib
import gc
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix('.yaml')
# seconds; who needs more hangs, and a test that hangs has noticed
LONGEST = 600
HEAVY = [
    'torch',
    'torch._dynamo',
    'pandas',
    'pyarrow.parquet',
    'scipy.stats',
    'scipy.optimize',
    'sklearn.linear_model',
    'sklearn.metrics',
    'sklearn.model_selection',
    'matplotlib.pyplot',
    'statsmodels.stats.multitest',
    'pydantic',
    'pytest',
    'yaml',
    'typer',
    'optuna',
    'IPython.core.interactiveshell',
    'execnb.shell',
    'nbdev.test',
    'fastcore.test',
]


@dataclass(frozen=True)
class Mutant:
    "One fault: a fragment of a module, and what stands in its place."

    module: str  # dotted, below mculora
    fault: str  # in words
    old: str
    new: str
    tests: tuple[str, ...]  # files of tests/ that should notice, after the notebook
    review: bool = False  # missed by the suite of version 0.4
    why: str = ''  # of a survivor: why no test can, or should, notice

    @property
    def path(self) -> Path:
        return Path('mculora', *self.module.split('.')).with_suffix('.py')

    @property
    def notebook(self) -> Path:
        "Where the module is exported from."
        said = re.search(
            r'File to edit: (?:\.\./)+(nbs/\S+\.ipynb)', (ROOT / self.path).read_text()
        )
        return Path(said[1])

    def changed(self, text: str, where) -> str:
        """A source with the fault in it. Raises `ValueError` if the fragment does not stand there
        once."""
        if (n := text.count(self.old)) != 1:
            raise ValueError(
                f'{self.module}, {self.fault}: found {n} times in {where}, expected once'
            )
        return text.replace(self.old, self.new)

    def module_source(self, root) -> str:
        text = self.changed((root / self.path).read_text(), self.path)
        ast.parse(text)
        return text

    def in_cell(self, nb: dict) -> dict:
        """The notebook with the fault in the exported cell that has the fragment; it is changed in
        place."""
        cells = [c for c in nb['cells'] if ''.join(c['source']).startswith('#| export')]
        at = [c for c in cells if self.old in ''.join(c['source'])]
        if len(at) != 1:
            raise ValueError(
                f'{self.module}, {self.fault}: found in {len(at)} cells, expected once'
            )
        at[0]['source'] = self.changed(''.join(at[0]['source']), self.notebook).splitlines(
            keepends=True
        )
        return nb

    def notebook_source(self, root) -> str:
        nb = self.in_cell(json.loads((root / self.notebook).read_text()))
        return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def read(path=LIST) -> list[Mutant]:
    "The list, in its order."
    said = yaml.load(path.read_text(), yaml.CSafeLoader)  # a tenth of the time
    return [
        Mutant(module, tests=tuple(f.pop('tests', about['tests'])), **f)
        for module, about in said.items()
        for f in about['faults']
    ]


# --- one attempt, in a process of its own ---


def notebook_fails(path) -> str:
    "What its first failing cell says, as `nbdev_test` runs it; nothing if it passes."
    from nbdev.test import test_nb
    import io

    said = io.StringIO()
    os.environ['IN_TEST'] = '1'
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ok, _ = test_nb(path, skip_flags='notest slow gpu'.split(), basepath=Path.cwd())
    lines = [x for x in said.getvalue().splitlines() if x.strip()]
    return '' if ok else f'{path}: {lines[-1] if lines else "fails"}'


def attempt(copy, notebook, tests, out):
    "Write to `out` which test fails first; nothing if none does."
    log = os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ |= {'PYTHONPATH': str(copy), 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1'}
    import pytest
    import torch

    torch.set_num_threads(1)
    # the collector would touch, and so copy, all that the fork shares
    gc.freeze()
    # the notebook's process is not that of the tests
    pid = os.fork()
    if not pid:
        said = 'the notebook dies'
        try:
            said = notebook_fails(copy / notebook)
        finally:
            Path(out).write_text(said)
            os._exit(0)
    os.waitpid(pid, 0)
    said = Path(out).read_text().replace(f'{copy}/', '')
    if said:
        Path(out).write_text(said)
        return

    class First:
        failed = ''

        def pytest_runtest_logreport(self, report):
            self.failed = self.failed or report.nodeid * report.failed

        def pytest_collectreport(self, report):
            self.failed = self.failed or report.nodeid * report.failed

    for file in tests:
        first = First()
        code = pytest.main(
            ['-x', '-q', '-p', 'no:cacheprovider', *shlex.split(file)], plugins=[first]
        )
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise RuntimeError(f'{file}: found no test, expected some that may notice')
        if code:
            Path(out).write_text(first.failed or f'{file}: exit status {code}')
            return


def copy_of(root, to):
    "The repository without what is large and not changed: that is linked."
    to.mkdir()
    for path in root.iterdir():
        if path.name in ('.git', '.venv', 'runs', '.pytest_cache', '.hypothesis', '.snakemake'):
            continue
        if path.name in ('mculora', 'nbs', 'tests'):
            shutil.copytree(
                path,
                to / path.name,
                ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
            )
        else:
            (to / path.name).symlink_to(path)
    return to


SERVER = multiprocessing.get_context('forkserver')


def noticed(m: Mutant, copy, out, control=False) -> str:
    """The test that fails with the fault in this copy, or without it (`control`); nothing if none
    does. Raises `RuntimeError` if none was run."""
    sources = {m.path: m.module_source(copy), m.notebook: m.notebook_source(copy)}
    if control:
        sources = {}
    before = {p: (copy / p).read_text() for p in sources}
    for p, text in sources.items():
        (copy / p).write_text(text)
    try:
        child = SERVER.Process(
            target=attempt, args=(copy, m.notebook, [f'tests/{t}' for t in m.tests], out)
        )
        child.start()
        child.join(LONGEST)
        if child.is_alive():
            child.kill()
            return f'nothing ends within {LONGEST} s'
        if child.exitcode < 0:
            return f'the process dies of signal {-child.exitcode}'
        if child.exitcode:
            raise RuntimeError(f'no attempt was made: {Path(f"{out}.log").read_text()[-2000:]}')
        return out.read_text()
    finally:
        out.unlink(missing_ok=True)
        for p, text in before.items():
            (copy / p).write_text(text)
        for cache in copy.rglob('__pycache__'):
            shutil.rmtree(cache, ignore_errors=True)


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument(
        '--review', action='store_true', help='only those that an earlier suite missed'
    )
    ask.add_argument('--module', help='only those of this module, as it stands in mutants.yaml')
    ask.add_argument('--fault', help='only those whose name has these words')
    ask.add_argument('--sample', type=int, help='so many of them, by lot')
    ask.add_argument('--cores', type=int, default=os.cpu_count(), help='how many at once')
    said = ask.parse_args()
    wanted = [
        m
        for m in read()
        if (m.review or not said.review)
        and said.module in (None, m.module)
        and (said.fault or '') in m.fault
    ]
    if said.sample:
        wanted = random.Random(66).sample(wanted, min(said.sample, len(wanted)))
    # bytecode of before the fault would be taken for the fault's: same size, same second
    os.environ |= {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONDONTWRITEBYTECODE': '1'}
    SERVER.set_forkserver_preload(HEAVY)
    start, lived, copies = time.monotonic(), [], Queue()
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(said.cores) as pool:
        for k in range(said.cores):
            copies.put(copy_of(ROOT, Path(tmp) / f'copy{k}'))

        sound = noticed(wanted[0], copies.queue[0], Path(tmp) / 'control.txt', control=True)
        if sound:
            sys.exit(f'without any fault there is already a failure: {sound}')

        def one(m):
            copy = copies.get()
            try:
                return noticed(m, copy, Path(tmp) / f'{copy.name}.txt')
            finally:
                copies.put(copy)

        for k, (m, by) in enumerate(zip(wanted, pool.map(one, wanted)), 1):
            if not by:
                lived.append(m)
            print(
                (
                    f'{k:4} of {len(wanted)}  {m.module}: {m.fault}\n     -> '
                    f'{by or "SURVIVED " + m.why}'
                ),
                flush=True,
            )
    killed = len(wanted) - len(lived)
    print(
        f'\n{killed} of {len(wanted)} faults noticed ({100 * killed / max(len(wanted), 1):.1f} %), '
        f'{time.monotonic() - start:.0f} s on {said.cores} cores'
    )
    for m in lived:
        print(f'survived: {m.module}: {m.fault}' + (f' ({m.why})' if m.why else ''))
    return bool([m for m in lived if not m.why])


if __name__ == '__main__':
    sys.exit(main())
