"The workflow: every notebook of a table or figure is in it, the committed output is what it makes, and a missing run is named."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SNAKEFILE = (ROOT/'workflow'/'Snakefile').read_text()
CONFIG = yaml.safe_load((ROOT/'workflow'/'config.yaml').read_text())
WRITES = re.findall(r'"(\w+)": "md tex csv', SNAKEFILE)
PAPER = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb') if not p.name[0].isdigit() and p.stem not in ('train', 'speed'))
COMMITTED = [(nb, name) for name, said in CONFIG['committed'].items() for nb in said.get('only', WRITES) if nb not in said.get('without', [])]


def papermill(notebook, name, figures, results='results', tmp=None):
    said = CONFIG['committed'][name]
    said = said | said.get('but', {}).get(notebook, {})
    done = subprocess.run([BIN/'papermill', '--kernel', 'python3', '--no-progress-bar', '--log-level', 'WARNING', '-p', 'data', name, '-p', 'results', str(results), '-p', 'figures', str(figures),
                           '-y', f'{{folds: {said["folds"]}, seeds: {said["seeds"]}}}', ROOT/'nbs'/f'{notebook}.ipynb', figures/'out.ipynb'], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return sorted(p for p in figures.iterdir() if p.name != 'out.ipynb')


def test_every_notebook_of_the_paper_is_in_the_workflow(): assert sorted(WRITES) == PAPER


@pytest.mark.parametrize('notebook, name', COMMITTED, ids=lambda x: x)
def test_committed_tables_and_figures_are_what_the_results_give(notebook, name, tmp_path):
    made = papermill(notebook, name, tmp_path)
    there = sorted(p.name for p in (ROOT/'figures').glob(f'{notebook}-*') if re.fullmatch(rf'{notebook}(-(weight|tsne))?-{name}\.\w+', p.name))
    assert [p.name for p in made] == there
    assert not [p.name for p in made if p.read_bytes() != (ROOT/'figures'/p.name).read_bytes()]


def test_a_missing_run_is_named_and_not_averaged_over(tmp_path):
    results, figures = tmp_path/'results', tmp_path/'figures'
    figures.mkdir()
    shutil.copytree(ROOT/'results'/'iemocap', results/'iemocap')
    import json
    full = [p for p in sorted((results/'iemocap'/'mculora').rglob('result.json')) for c in [json.loads(p.read_text())['config']]
            if (c['options']['rank'], c['fold'], c['seed']) == (3, 2, 67) and c['options']['adapter_place'] == 'output' and c['options']['private'] and c['options']['dpft'] == 'combination' and c['options']['second_stage'] and c['options']['beta']]
    one, = full
    one.unlink()
    papermill('fig3_rank', 'iemocap', figures, results)
    text = (figures/'fig3_rank-iemocap.md').read_text()
    assert 'rank 3, fold 2, seed 67' in text
    rows = {line.split('|')[1].strip(): line for line in text.splitlines() if line.startswith('| ')}
    assert rows['rank 3'].count('1 missing') == 9 and '±' not in rows['rank 3'] and '±' in rows['rank 2']


def test_the_tiny_pass_makes_every_kind_of_output():
    done = subprocess.run([BIN/'snakemake', '--snakefile', 'workflow/Snakefile', '--cores', '1', '--nolock', '--dry-run', '--forceall', '--quiet', 'host', 'reason', '--config', 'size=tiny'],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    for nb in set(WRITES) - set(CONFIG['tiny']['without']):
        for name in CONFIG['tiny']['data']: assert f'figures/{nb}-{name}.md' in text
    for nb, name in COMMITTED: assert f'figures/{nb}-{name}.md' in text


@pytest.mark.parametrize('path', sorted((ROOT/'figures').glob('*-simulated*.*')), ids=lambda p: p.name)
def test_simulated_output_says_so(path):
    if path.suffix in ('.md', '.tex', '.csv'): assert 'simulated' in path.read_text()
    assert 'simulated' in path.name
