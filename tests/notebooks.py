"""Notebooks for the tests, each in a fork of one process that has imported what they need: a fork
costs milliseconds, a new interpreter with torch, IPython, pandas and matplotlib five seconds.

That process has imported nothing of `mculora`, since a notebook that exports a module defines it
anew. For notebooks that only use the package it forks another, which has imported it and read
the committed results: some thirty notebooks ask for them. A notebook sees nothing of the one
before it."""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
# the last word of a notebook that ran to its end, as nbdev_test says it
SUCCESS = 'Success.\n'
PRELOAD = (
    'nbdev.test',
    'papermill.iorw',
    'papermill.parameterize',
    'torch._dynamo',
    'torch.utils.flop_counter',
    'safetensors.torch',
    'pandas',
    'pyarrow.parquet',
    'scipy.optimize',
    'scipy.signal',
    'scipy.stats',
    'sklearn.impute',
    'sklearn.linear_model',
    'sklearn.manifold',
    'sklearn.metrics',
    'sklearn.model_selection',
    'statsmodels.stats.multitest',
    'matplotlib.pyplot',
    'matplotlib.backends.backend_pdf',
    'matplotlib.backends.backend_svg',
    'seaborn',
    'jinja2',
    'tabulate',
    'pydantic',
    'psutil',
    'platformdirs',
    'tqdm',
    'typer.testing',
)


class Ran(NamedTuple):
    "What came of a notebook."

    notebook: str
    code: int  # of the process: 0, or minus the signal that ended it
    text: str  # what was printed; at the end the cell that failed and its traceback

    @property
    def whole(self):
        return self.code == 0 and self.text.endswith(SUCCESS)


# --- in the test's process ---


class Server:
    "The process that forks."

    def __init__(self):
        said = {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'NO_COLOR': '1'}
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | said
        self.process = subprocess.Popen(
            [sys.executable, '-P', __file__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.pids = set()
        atexit.register(self.stop)
        self.count(self.process.pid)

    def count(self, pid):
        "What it spends from now on, and its forks, is the tests'."
        import conftest

        if pid not in self.pids:
            conftest.SERVERS.append(psutil.Process(pid))
        self.pids.add(pid)

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what) + '\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, 'the process that runs notebooks has died'
        said = json.loads(line)
        self.count(said.pop('server'))
        return said

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


@cache
def server():
    return Server()


def run(notebook, parameters=None, flags='', timeout=900):
    """Run a notebook, named from the repository's root: as `nbdev_test` does, with cells of these
    `flags` too; or with parameters as papermill does."""
    package = '#| default_exp' not in (ROOT / notebook).read_text(encoding='utf-8')
    return Ran(
        str(notebook),
        **server().ask(
            package=package,
            notebook=str(notebook),
            parameters=parameters,
            flags=flags,
            timeout=timeout,
        ),
    )


def passes(notebook, parameters=None, **how):
    "Fail the test if the notebook fails."
    ran = run(notebook, parameters, **how)
    if not ran.whole:
        pytest.fail(f'{notebook}: exit code {ran.code}\n{ran.text}', pytrace=False)
    return ran


def papermill(out, **parameters):
    "The training notebook, by the command that README.md gives."
    given = []
    for name, value in parameters.items():
        text = isinstance(value, str)
        given += ['-p', name, value] if text else ['-y', json.dumps({name: value})]
    command = [sys.executable, '-m', 'papermill', 'nbs/train.ipynb', str(out)]
    outside = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return subprocess.run(
        [*command, '-k', 'python3', '--no-progress-bar', *given],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=400,
        env=outside | {'OMP_NUM_THREADS': '1', 'JUPYTER_PREFER_ENV_PATH': '1'},
    )


# --- in the process that forks ---


def serve():
    for name in PRELOAD:
        importlib.import_module(name)
    # the collector of a fork would touch, and so copy, all of this memory
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    other = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.pop('package'):
            other = other or with_package()
            print(json.dumps(asked), file=other[0], flush=True)
            print(other[1].readline(), end='', flush=True)
        else:
            print(json.dumps(answer(asked)), flush=True)


def answer(asked):
    "Run one notebook in a fork."
    with tempfile.TemporaryFile('w+', errors='replace') as log:
        pid = os.fork()
        if not pid:
            child(log, **asked)
        try:
            _, status = os.waitpid(pid, 0)
        finally:
            # what it left running
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        log.seek(0)
        return dict(code=os.waitstatus_to_exitcode(status), text=log.read(), server=os.getpid())


def with_package():
    "The other process: where to write what it is asked, and where to read what it answers."
    (asks, asked), (answers, answered) = os.pipe(), os.pipe()
    if os.fork():
        for fd in (asks, answered):
            os.close(fd)
        return open(asked, 'w'), open(answers)
    for fd in (asked, answers):
        os.close(fd)
    sys.path.insert(0, str(ROOT))
    for path in sorted((ROOT / 'mculora').rglob('[a-z]*.py')):
        importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    from mculora.experiments.results import collect

    collect(ROOT / 'results')
    gc.freeze()
    with open(asks) as questions, open(answered, 'w') as replies:
        for line in questions:
            print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
    os._exit(0)


def child(log, notebook, parameters, flags, timeout):
    "Never returns."
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for to, fd in enumerate((nothing, log.fileno(), log.fileno())):
            os.dup2(fd, to)
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
        faulthandler.dump_traceback_later(timeout, exit=True)
        n = (
            as_tested(notebook, flags)
            if parameters is None
            else with_parameters(notebook, parameters)
        )
        assert n, 'no cell was run'
        code = 0
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()  # temporary folders
        if code == 0:
            sys.stdout.write(SUCCESS)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def count_cells():
    "A list that grows with each cell that is run."
    from execnb.shell import CaptureShell

    cells, real = [], CaptureShell.run

    def run(self, code, **how):
        cells.append(code)
        return real(self, code, **how)

    CaptureShell.run = run
    return cells


def as_tested(notebook, flags=''):
    """The number of cells that were run; those with a flag of settings.ini are left out, but for
    `flags`, and the working folder is the notebook's."""
    from nbdev.config import get_config
    from nbdev.test import test_nb

    cells, config = count_cells(), get_config()
    passed, _ = test_nb(
        ROOT / notebook,
        skip_flags=[f for f in config.tst_flags.split() if f not in flags.split()],
        basepath=config.config_path,
    )
    if not passed:
        sys.exit(1)
    return len(cells)


def with_parameters(notebook, parameters):
    """The same with papermill's parameters: every cell, in the repository's root, without IN_TEST;
    what cells print is kept."""
    import matplotlib.pyplot as plt
    from execnb.nbio import dict2nb
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    cells, nb = count_cells(), load_notebook_node(str(ROOT / notebook))
    nb = dict2nb(parameterize_notebook(nb, parameters, kernel_name='python3', language='python'))
    sys.path.insert(0, '')
    shell = CaptureShell()
    # after the shell, which would draw every picture once more, to show it
    plt.switch_backend('agg')
    plt.ioff()
    try:
        shell.run_all(nb, exc_stop=True, verbose=True)
    except BaseException:
        sys.stderr.write(shell.prettytb(fname=notebook) + '\n')
        sys.exit(1)
    return len(cells) - 1  # but the one with the parameters


if __name__ == '__main__':
    serve()
