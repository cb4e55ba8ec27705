"Every notebook runs from top to bottom, the way `nbdev_test` runs it."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBDEV_TEST = Path(sys.executable).parent/'nbdev_test'   # this environment's, whatever is first on PATH
NOTEBOOKS = sorted(str(p.relative_to(ROOT)) for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '_.' for part in p.relative_to(ROOT).parts))   # nbdev's own rule


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook_runs(notebook):
    # its own process: nbdev sets IN_TEST and changes directory, and notebooks must not see each other
    run = subprocess.run([NBDEV_TEST, '--path', notebook], cwd=ROOT, text=True, timeout=900,
                         env={**os.environ, 'MPLBACKEND': 'agg', 'NO_COLOR': '1', 'OMP_NUM_THREADS': '1'}, capture_output=True)
    # "Success." too: with nothing eligible nbdev_test says so and exits 0
    if run.returncode != 0 or 'Success.' not in run.stdout: pytest.fail(f'{notebook}\n{run.stdout}\n{run.stderr}', pytrace=False)
