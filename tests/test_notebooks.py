"Every notebook runs from top to bottom, the way `nbdev_test` runs it."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import ROOT, SUCCESS, passes, run
from test_paper import PAPER

# this environment's, whatever is first on PATH
NBDEV_TEST = Path(sys.executable).parent / 'nbdev_test'
NOTEBOOKS = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    # nbdev's own rule
    if not any(part[0] in '_.' for part in p.relative_to(ROOT).parts)
)
# test_paper runs them all, with parameters; one with its own, under IN_TEST, speaks for the others
ONE_OF_PAPER = 'fig6_dpft'
RUN_HERE = [n for n in NOTEBOOKS if Path(n).stem not in PAPER]


def nbdev_test(path, *options):
    "The real command, in a process of its own."
    return subprocess.run(
        [NBDEV_TEST, '--path', path, *options],
        cwd=ROOT,
        text=True,
        timeout=900,
        capture_output=True,
        env={**os.environ, 'MPLBACKEND': 'agg', 'NO_COLOR': '1', 'OMP_NUM_THREADS': '1'},
    )


def test_there_are_notebooks():
    assert (
        len(RUN_HERE) > 40
        and len(NOTEBOOKS) == len(RUN_HERE) + len(PAPER)
        and ONE_OF_PAPER in PAPER
    )


# measures at tiny size what experiments/05_bench tests
SLOW = 'nbs/experiments/speed.ipynb'


@pytest.mark.parametrize(
    'notebook', [pytest.param(n, marks=[pytest.mark.slow] * (n == SLOW)) for n in RUN_HERE]
)
def test_notebook_runs(notebook):
    passes(notebook)


@pytest.mark.slow
def test_own_data_runs_from_any_folder(tmp_path):
    "The committed results are not there; the two tables that are made of them are left out."
    nb = nbformat.read(ROOT / 'nbs' / 'own_data.ipynb', 4)
    first = f'import os\nos.chdir({str(tmp_path)!r})\nos.environ["IN_TEST"] = "1"'
    nb.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbformat.write(nb, tmp_path / 'own_data.ipynb')
    said = passes(tmp_path / 'own_data.ipynb', {}).text
    assert '/results is not there: the two real tables at the end are left out' in said


@pytest.mark.slow
@pytest.mark.parametrize('notebook', [n for n in RUN_HERE if '"#| slow' in (ROOT / n).read_text()])
def test_slow_cells_run(notebook):
    passes(notebook, flags='slow')


def test_a_notebook_of_the_paper_runs_as_it_is_and_leaves_the_committed_files_alone():
    files = sorted((ROOT / 'figures').rglob(f'{ONE_OF_PAPER}-*'))
    before = [p.stat().st_mtime_ns for p in files]
    passes(f'nbs/experiments/{ONE_OF_PAPER}.ipynb')
    assert files and [p.stat().st_mtime_ns for p in files] == before


@pytest.mark.slow
def test_a_notebook_does_not_mind_what_ran_before_it_in_its_process():
    """`nbdev_test` takes a process again. The first of these imports what the second defines and
    registers anew; the third uses both."""
    those = '01_conflict|06_mculora|00_merge'
    ran = nbdev_test('nbs', '--file_re', those, '--n_workers', '0', '--do_print')
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall(f'Starting .*({those})', ran.stdout) == those.split('|')


# --- the commands themselves, and what stands in for them ---


def write(path, *cells, tags=()):
    "A notebook; `tags` are the first cell's."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    if tags:
        nb.cells[0].metadata.tags = tags
    nbformat.write(nb, path)
    return path


def test_nbdev_test_itself():
    done = nbdev_test('nbs/basics/00_modalities.ipynb')
    assert done.returncode == 0 and SUCCESS in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize('parameters', [None, {}], ids=['tested', 'with parameters'])
@pytest.mark.parametrize(
    'cells, said',
    [
        (['x = 1', '1/0'], 'ZeroDivisionError'),
        (['raise SystemExit(0)'], 'SystemExit'),
        (['import os', 'os._exit(0)'], 'exit code 0'),
        (['import os', 'os.kill(os.getpid(), 9)'], 'exit code -9'),
        (['import time', 'time.sleep(60)'], 'Timeout'),
        ([], 'no cell was run'),
    ],
    ids=['an error', 'an exit', 'an end without a word', 'a kill', 'too slow', 'empty'],
)
def test_what_does_not_run_to_its_end_fails(tmp_path, cells, said, parameters):
    notebook = write(tmp_path / 'broken.ipynb', *cells)
    with pytest.raises(pytest.fail.Exception, match=said) as e:
        passes(notebook, parameters, timeout=2 if said == 'Timeout' else 900)
    assert 'broken.ipynb' in str(e.value)
    if said.endswith('Error'):
        assert f'Cell #{len(cells) + (parameters is not None)}' in str(
            e.value
        ) and 'Traceback' in str(e.value)


def test_flags_are_heeded_in_tests_and_not_with_parameters(tmp_path):
    notebook = write(
        tmp_path / 'flags.ipynb',
        'print(1)',
        *(f'#| {flag}\n1/0' for flag in ('notest', 'slow', 'gpu')),
    )
    passes(notebook)
    assert not run(notebook, {}).whole
    assert 'no cell was run' in run(write(tmp_path / 'flags.ipynb', '#| notest\n1/0')).text


def test_a_notebook_sees_nothing_of_another(tmp_path):
    one = write(
        tmp_path / 'one.ipynb',
        (
            'import json, os, sys; json.seen = os.environ["SEEN"] = "1"; seen = 1; '
            'sys.path.append("seen"); os.chdir("/")'
        ),
    )
    other = write(
        tmp_path / 'other.ipynb',
        '#| default_exp other',
        (
            'import json, os, sys; assert not hasattr(json, "seen") and "SEEN" not in '
            'os.environ and "seen" not in [*globals(), *sys.path]'
        ),
        (
            'assert not [m for m in sys.modules if m.startswith("mculora")]; import torch; '
            'assert torch.get_num_threads() == 1'
        ),
    )
    for notebook in (one, other, one):
        passes(notebook)


@pytest.mark.parametrize('parameters', [None, {'x': 2}], ids=['tested', 'with parameters'])
def test_the_folder_and_the_environment_are_those_of_the_command(tmp_path, parameters):
    """Those of nbdev_test: the notebook's folder, and IN_TEST. Those of papermill: the folder it
    was called in."""
    cells = (
        'x = 1',
        f'import json, os, pathlib; said = pathlib.Path({str(tmp_path / "said")!r})',
        'said.write_text(json.dumps([x, "IN_TEST" in os.environ, os.getcwd()]))',
    )
    notebook = write(tmp_path / 'where.ipynb', *cells, tags=['parameters'])
    passes(notebook, parameters)
    expected = [1, True, str(tmp_path)] if parameters is None else [2, False, str(ROOT)]
    assert json.loads((tmp_path / 'said').read_text()) == expected
