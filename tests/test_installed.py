"""The package away from its repository: its wheel in a fresh environment, called from a folder
that has nothing of it; and the notebooks that Colab opens, each alone. No network: the packages
that the wheel needs are those of the environment that runs the tests."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

# each makes an environment, which takes seconds, and trains
pytestmark = pytest.mark.slow

ADDRESS = 'git+https://github.com/mculora-companion/mculora'
OUTSIDE = ('COLAB_RELEASE_TAG', 'IN_TEST', 'PYTHONPATH')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "As `make dist` builds it, of the files as they are now."
    to = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT / 'mculora', to / 'mculora', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, to)
    how = ['--quiet', '--wheel', '--no-build-isolation', '--python', sys.executable]
    subprocess.run([Path(sys.executable).parent / 'uv', 'build', *how, to], check=True)
    (built,) = to.glob('dist/*.whl')
    return built


class Environment:
    "A fresh one, without the package: what that needs is found where the tests find it."

    def __init__(self, folder):
        venv.create(folder)
        paths = dict(base=str(folder), platbase=str(folder))
        self.bin, site = (
            Path(sysconfig.get_path(k, 'venv', paths)) for k in ('scripts', 'purelib')
        )
        (site / 'others.pth').write_text(sysconfig.get_path('purelib'))

    def run(self, *command, cwd, code=0, **variables):
        "What a command of this environment prints."
        env = {k: v for k, v in os.environ.items() if k not in OUTSIDE}
        env |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', IPYTHONDIR=str(cwd), **variables)
        done = subprocess.run(
            [self.bin / command[0], *map(str, command[1:])],
            cwd=cwd,
            env=env,
            text=True,
            capture_output=True,
            timeout=600,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.mark.parametrize('name', ['00_start', 'own_data', 'train'])
def test_a_notebook_installs_the_package_in_colab_and_runs(name, wheel, tmp_path):
    "With the wheel in place of the public address. Elsewhere its first cell installs nothing."
    here = Environment(tmp_path / 'env')
    text = (ROOT / 'nbs' / f'{name}.ipynb').read_text()
    assert text.count(ADDRESS) == 1
    (tmp_path / 'notebook.ipynb').write_text(text.replace(ADDRESS, str(wheel)))
    notebook = nbformat.read(tmp_path / 'notebook.ipynb', 4)
    first = next(c.source for c in notebook.cells if c.cell_type == 'code')
    (tmp_path / 'first.ipy').write_text(first)
    here.run('python', '-m', 'IPython', 'first.ipy', cwd=tmp_path)
    assert 'No module named' in here.run('python', '-c', 'import mculora', cwd=tmp_path, code=1)
    colab = dict(COLAB_RELEASE_TAG='release-colab', IN_TEST='1')
    here.run('python', '-m', 'IPython', 'notebook.ipynb', cwd=tmp_path, **colab)
    where = 'import mculora; print(mculora.__file__)'
    assert str(here.bin.parent) in here.run('python', '-c', where, cwd=tmp_path)


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    here = Environment(tmp_path_factory.mktemp('installed') / 'env')
    pip = ['-m', 'pip', 'install', '--quiet', '--no-index', f'{wheel}[notebooks]']
    here.run('python', *pip, cwd=wheel.parent)
    return here


def test_the_wheel_trains_exports_predicts_and_explores(installed, tmp_path):
    "The tiny twin, then a table of your own, by the commands that README.md gives."

    def mculora(*words, code=0):
        return installed.run('mculora', *words, cwd=tmp_path, code=code)

    few = ['--options', '{"epochs": 2}', '--device', 'cpu']
    said = mculora('train', '--dataset', 'iemocap', '--size', 'tiny', '--fold', '1', *few)
    assert 'iemocap-simulated-tiny' in said and list(tmp_path.glob('runs/*/mculora/*/curves.png'))
    make = """
from mculora.basics.dialogues import random_dialogues
from mculora.data.tables import as_table
d = random_dialogues((6,) * 20, {'text': 6, 'audio': 4}, missing=0.2, seed=1)
as_table(d).to_parquet('talks.parquet')
"""
    installed.run('python', '-c', make, cwd=tmp_path)
    table = ['--table', '{"simulated": true}']
    mculora('data', 'check', 'talks.parquet', *table)
    mculora('train', '--dataset', 'talks.parquet', *table, '--fold', '1', *few)
    (result,) = tmp_path.glob('runs/talks*/mculora/*/result.json')
    mculora('export', result.parent, 'model')
    mculora('predict', 'model', 'talks.parquet', '--output', 'said.csv')
    assert len((tmp_path / 'said.csv').read_text().splitlines()) == 121
    mculora('explore', 'model', 'talks.parquet', 'page.html')
    assert 'trained on simulated data' in (tmp_path / 'page.html').read_text()


def test_the_wheel_explores_results_where_they_are_and_says_where_they_are_not(installed, tmp_path):
    said = installed.run('mculora', 'results', 'explore', cwd=tmp_path, code=2)
    assert 'results: found no such folder' in said and 'the archive of a release' in said
    (tmp_path / 'results' / 'mosi').mkdir(parents=True)
    (tmp_path / 'figures').symlink_to(ROOT / 'figures')
    for name in ('comparisons.toml', 'mosi/mculora.runs.jsonl', 'mosi/majority.runs.jsonl'):
        shutil.copy(ROOT / 'results' / name, tmp_path / 'results' / name)
    installed.run('mculora', 'results', 'explore', cwd=tmp_path)
    assert 'CMU-MOSI' in (tmp_path / 'results.html').read_text()
