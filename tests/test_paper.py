"""The workflow: every notebook of a table or figure is in it, the committed output is what it
makes, and a missing run is named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from notebooks import passes

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SNAKEFILE = (ROOT / 'workflow' / 'Snakefile').read_text()
CONFIG = yaml.safe_load((ROOT / 'workflow' / 'config.yaml').read_text())
WRITES = re.findall(r'"(\w+)": "md tex csv', SNAKEFILE)
EXPERIMENTS = ROOT / 'nbs' / 'experiments'
PAPER = sorted(p.stem for p in EXPERIMENTS.glob('[a-z]*.ipynb') if p.stem != 'speed')
COMMITTED = [
    (nb, name)
    for name, said in CONFIG['committed'].items()
    for nb in said.get('only', WRITES)
    if nb not in said.get('without', [])
]
# of a notebook with several data, what it is run with by default; with the others by `make
# test-all`
MADE_FROM = {
    'table1_fixed': 'iemocap',
    'table2_ablation': 'mosei_video',
    'table3_random': 'iemocap-simulated',
    'fig3_rank': 'mosi',
    'table8_choices': 'iemocap',
}
LONG = ('table4_cost',)  # counts the operations of every method: by `make test-all`
DEFAULT = [
    (nb, name) for nb, name in COMMITTED if MADE_FROM.get(nb, name) == name and nb not in LONG
]
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow, id='-'.join(case))
    for case in COMMITTED
]


def parameters(notebook, name, figures, results='results'):
    said = CONFIG['committed'][name]
    own = said.get('parameters', {}).get(notebook, {})
    return (
        dict(
            data=name,
            results=str(results),
            figures=str(figures),
            folds=said['folds'],
            seeds=said['seeds'],
        )
        | own
    )


def make(notebook, name, figures, results='results'):
    "Run a notebook of the paper; the files that it writes."
    passes(f'nbs/experiments/{notebook}.ipynb', parameters(notebook, name, figures, results))
    return sorted(figures.iterdir())


def same_as_committed(notebook, name, made):
    there = sorted(
        p.name
        for p in (ROOT / 'figures').glob(f'{notebook}-*')
        if re.fullmatch(rf'{notebook}(-(weight|tsne))?-{name}\.\w+', p.name)
    )
    assert [p.name for p in made] == there
    # t-SNE: another layout on another processor
    assert not [
        p.name
        for p in made
        if '-tsne-' not in p.name and p.read_bytes() != (ROOT / 'figures' / p.name).read_bytes()
    ]


def test_every_notebook_of_the_paper_is_in_the_workflow():
    assert sorted(WRITES) == PAPER


def test_by_default_every_notebook_and_all_data_are_met():
    notebooks, data = ({case[k] for case in DEFAULT} for k in (0, 1))
    assert notebooks == set(WRITES) - set(LONG) and data == {name for _, name in COMMITTED}
    assert len(DEFAULT) == len(notebooks)


@pytest.mark.pinned
@pytest.mark.parametrize('notebook, name', CASES)
def test_committed_tables_and_figures_are_what_the_results_give(notebook, name, tmp_path):
    same_as_committed(notebook, name, make(notebook, name, tmp_path))


@pytest.mark.slow
@pytest.mark.pinned
def test_papermill_itself_makes_a_committed_table(tmp_path):
    "The command that the workflow calls, with a kernel of its own."
    notebook, name, figures = 'table8_choices', 'mosi', tmp_path / 'figures'
    said = yaml.safe_dump(parameters(notebook, name, figures))
    done = subprocess.run(
        [
            BIN / 'papermill',
            '--kernel',
            'python3',
            '--no-progress-bar',
            '--log-level',
            'WARNING',
            '-y',
            said,
            EXPERIMENTS / f'{notebook}.ipynb',
            tmp_path / 'out.ipynb',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    same_as_committed(notebook, name, sorted(figures.iterdir()))


def without_one(to, rank, fold, seed):
    """The committed results of IEMOCAP without those of one run of the whole model; `to` refers to
    them."""
    for p in (ROOT / 'results' / 'iemocap').rglob('*'):
        if p.is_dir():
            continue
        at = to / p.relative_to(ROOT / 'results')
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(p)
    (one,) = [
        p
        for p in sorted((to / 'iemocap' / 'mculora').rglob('result.json'))
        for c in [json.loads(p.read_text())['config']]
        if (c['options']['rank'], c['fold'], c['seed']) == (rank, fold, seed)
        and c['options']['adapter_place'] == 'output'
        and c['options']['private']
        and c['options']['dpft'] == 'combination'
        and c['options']['second_stage']
        and c['options']['beta']
    ]
    one.unlink()


def rows_of(path):
    return {
        line.split('|')[1].strip(): line
        for line in path.read_text().splitlines()
        if line.startswith('| ')
    }


def test_a_missing_run_is_named_and_not_averaged_over(tmp_path):
    figures = tmp_path / 'figures'
    figures.mkdir()
    without_one(tmp_path / 'results', 3, 2, 67)
    make('fig3_rank', 'iemocap', figures, tmp_path / 'results')
    assert 'rank 3, fold 2, seed 67' in (figures / 'fig3_rank-iemocap.md').read_text()
    rows = rows_of(figures / 'fig3_rank-iemocap.md')
    assert (
        rows['rank 3'].count('1 missing') == 9
        and '±' not in rows['rank 3']
        and '±' in rows['rank 2']
    )


@pytest.mark.parametrize(
    'notebook, row, others',
    [
        ('fig1_conflict', 'MCLA + DPFT', ['control', 'joint (pre-training)']),
        ('fig4_convergence', 'mculora', ['control']),
        ('fig6_dpft', None, []),
    ],
)
def test_a_missing_run_is_named_and_its_curve_not_averaged_over(notebook, row, others, tmp_path):
    figures = tmp_path / 'figures'
    figures.mkdir()
    without_one(tmp_path / 'results', 4, 2, 66)
    make(notebook, 'iemocap', figures, tmp_path / 'results')
    text, rows = (
        (figures / f'{notebook}-iemocap.md').read_text(),
        rows_of(figures / f'{notebook}-iemocap.md'),
    )
    assert 'fold 2, seed 66' in text
    if row:
        assert '1 missing' in rows[row] and '±' not in rows[row]
    else:
        assert '±' not in text

    def of(name, path):
        return next(
            line.split('|', 2)[2]
            for line in path.read_text().splitlines()
            if line.startswith(f'| {name} ')
        )

    for name in others:
        assert (
            of(name, figures / f'{notebook}-iemocap.md').split()
            == of(name, ROOT / 'figures' / f'{notebook}-iemocap.md').split()
        )


def test_the_tiny_pass_makes_every_kind_of_output():
    done = subprocess.run(
        [
            BIN / 'snakemake',
            '--snakefile',
            'workflow/Snakefile',
            '--cores',
            '1',
            '--nolock',
            '--dry-run',
            '--forceall',
            '--quiet',
            'host',
            'reason',
            '--config',
            'size=tiny',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    for nb in set(WRITES) - set(CONFIG['tiny']['without']):
        for name in CONFIG['tiny']['data']:
            assert f'figures/{nb}-{name}.md' in text
    for nb, name in COMMITTED:
        assert f'figures/{nb}-{name}.md' in text


@pytest.mark.parametrize(
    'path',
    sorted(
        p for p in (ROOT / 'figures').glob('*-simulated*.*') if p.suffix not in ('.pdf', '.png')
    ),
    ids=lambda p: p.name,
)
def test_simulated_output_says_so(path):
    text = path.read_text()
    # words are drawn, and stand beside in comments
    if path.suffix == '.svg':
        text = ' '.join(re.findall(r'<!-- (.*?) -->', text))
    assert 'simulated' in text
