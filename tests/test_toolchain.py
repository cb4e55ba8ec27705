"""The notebooks are the source of everything, they are clean, and the files that install and run
them agree with each other."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from functools import cache
from importlib.metadata import distribution, entry_points, packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODULES = sorted(p for p in (ROOT / 'mculora').rglob('*.py'))
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))


def run(*command, cwd=ROOT):
    """Run `command` without what the calling environment might say to nbdev; its output, or a
    failed test."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('IN_TEST', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')
    }
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def load(path):
    return json.loads(path.read_text(encoding='utf-8'))


@cache
def parsed(path):
    "The tree of a .py file, or of all Python of a notebook."
    return ast.parse(code(load(path)) if path.suffix == '.ipynb' else path.read_text())


def source(cell):
    return ''.join(cell['source'])


def without_magics(text):
    return re.sub(r'^(\s*)[%!].*$', r'\1pass', text, flags=re.M)


def parameter_cells(nb):
    return [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]


# --- the package is what the notebooks say ---


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks and nbdev's settings alone."
    to = tmp_path_factory.mktemp('copy')
    shutil.copy(ROOT / 'settings.ini', to)
    shutil.copytree(
        ROOT / 'nbs',
        to / 'nbs',
        ignore=shutil.ignore_patterns('.ipynb_checkpoints', '.last_checked'),
    )
    return to


def test_package_is_exactly_what_the_notebooks_export(copy):
    run(BIN / 'nbdev_export', cwd=copy)

    def texts(top):
        return {
            str(p.relative_to(top)): p.read_text()
            for p in (top / 'mculora').rglob('*.py')
            if p.name != '__main__.py'  # written by hand
        }

    fresh, here = texts(copy), texts(ROOT)
    assert sorted(here) == sorted(fresh), (
        'modules without a notebook, or notebooks that were not exported'
    )
    assert not [name for name in here if here[name] != fresh[name]], (
        'run nbdev_export (and edit nbs/, never mculora/)'
    )


def test_notebooks_are_clean(copy):
    run(BIN / 'nbdev_clean', cwd=copy)
    assert not [
        p.name for p in NOTEBOOKS if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()
    ], 'run nbdev_clean'


# --- each notebook ---


@each_notebook
def test_metadata(path):
    nb = load(path)
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    assert set(nb['metadata']) == {'kernelspec'}, (
        'widget state, papermill times or the paths of a machine'
    )
    assert (nb['nbformat'], nb['nbformat_minor']) == (4, 5)


@each_notebook
def test_a_cell_fits_on_a_screen(path):
    "Lines of code, comments and docstrings; `make lint` asks for 100 columns."
    sizes = [
        (len(source(c).splitlines()), k)
        for k, c in enumerate(load(path)['cells'])
        if c['cell_type'] == 'code'
    ]
    assert not [f'cell {k}: {n} lines' for n, k in sizes if n > 45]


@each_notebook
def test_parameters_cell(path):
    """Papermill injects at the top, with exit status 0, where the tag was lost; then every run is
    the default run."""
    nb = load(path)
    cells = parameter_cells(nb)
    # train, tables and figures have no number, and papermill runs them
    needs_one = not path.name[0].isdigit()
    assert len(cells) == 1 if needs_one else len(cells) <= 1
    for cell in cells:
        assert cell['cell_type'] == 'code'
        # papermill reads names at the beginning of a line: one assignment each, without a semicolon
        lines = source(cell).splitlines()
        for node in ast.parse(source(cell)).body:
            line = lines[node.lineno - 1]
            assert re.match(r'[a-z_]\w*\s*(:[^=;]+)?=[^;]*(#|$)', line), line


def outputs(nb):
    return [out for cell in nb['cells'] if cell['cell_type'] == 'code' for out in cell['outputs']]


@each_notebook
def test_outputs(path):
    for out in outputs(load(path)):
        assert out['output_type'] != 'error', out.get('ename')
        data = out.get('data', {})
        assert not [mime for mime in data if 'jupyter.widget' in mime]
        for mime, text in [*data.items(), ('text/stream', out.get('text', ''))]:
            if mime.startswith('image/') and mime != 'image/svg+xml':
                continue
            text = re.sub(
                r'base64,[^"\']*', '', ''.join(text) if isinstance(text, list) else str(text)
            )
            assert '\x1b[' not in text, 'terminal colours'
            assert not ABSOLUTE.findall(text), f'{mime}: an absolute path is of this machine only'


# what is in them may not happen when a cell runs
PERHAPS = (*FUNCTION, ast.ClassDef, ast.Lambda, ast.If, ast.Try)


def called(node):
    "Names of the functions that are called in `node` whatever happens."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, PERHAPS):
            continue
        if isinstance(child, ast.Call):
            yield getattr(child.func, 'attr', getattr(child.func, 'id', ''))
        yield from called(child)


def shows(text):
    "Whether a cell prints, draws or ends in rich text, and does not close what it drew."
    names = set(called(ast.parse(without_magics(text))))
    return bool(names & {'print', 'subplots', 'show', 'Markdown', 'SVG'}) and 'close' not in names


@pytest.mark.parametrize(
    'text, found',
    [
        ('print(1)', True),
        ('for x in y: print(x)', True),
        ('with a: fig, ax = plt.subplots()', True),
        ("Markdown('a')", True),
        ('def f(): print(1)', False),
        ('if bad: print(bad)', False),
        ('fig, ax = plt.subplots(); plt.close(fig)', False),
    ],
)
def test_what_shows_something(text, found):
    assert shows(text) == found


@each_notebook
def test_what_is_printed_or_drawn_is_kept(path):
    "Every cell that shows something was run before the notebook was committed."
    cells = [
        c
        for c in load(path)['cells']
        if c['cell_type'] == 'code' and not source(c).startswith('%%')
    ]
    assert not [source(c)[:100] for c in cells if shows(source(c)) and not c['outputs']]


# /a/b and C:\a, but not <b>/</b>, 1/2/3, text/html or https://a/b
ABSOLUTE = re.compile(r'(?<![\w/.:<>)\]}*+=-])(?:/[\w.+-]+){2,}|\b[A-Z]:\\\w+')


@pytest.mark.parametrize(
    'text, found',
    [
        ('at /tmp/x/y.py', True),
        ("'/home/me/a'", True),
        ('(/opt/x/.venv/bin/python)', True),
        ('C:\\Users\\me', True),
        ('1/2/3', False),
        ('runs/a/b.json', False),
        ('../nbs/a/b', False),
        ('https://a.org/b/c', False),
        ('<td>a</td><td>/</td>', False),
        ('a /b c', False),
        ('and / or / not', False),
    ],
)
def test_what_an_absolute_path_is(text, found):
    assert bool(ABSOLUTE.search(text)) == found


# --- the order in which they are read ---

NOTEBOOK_OF = {}  # module name -> path of its notebook in nbs/
for module in MODULES:
    if m := re.search(r'File to edit: (?:\.\./)+nbs/(\S+\.ipynb)', module.read_text()):
        NOTEBOOK_OF['.'.join(module.relative_to(ROOT).with_suffix('').parts)] = m[1]
# what `import mculora` gives; it imports nothing, so it has no place in the order
FACE = NOTEBOOK_OF.pop('mculora.__init__')


def imported(tree, package=''):
    "Absolute names of all modules that are imported in `tree`; `package` is where it lies."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = (
                '.'.join(package.split('.')[: len(package.split('.')) - node.level + 1])
                if node.level
                else ''
            )
            full = '.'.join(filter(None, [base, node.module]))
            yield full
            if full.split('.')[0] == 'mculora':
                yield from (f'{full}.{a.name}' for a in node.names)


def test_relative_imports_are_resolved():
    tree = ast.parse('from .a import b\nfrom ..c import d\nimport e.f\nfrom . import g')
    assert {'mculora.x.a', 'mculora.c', 'e.f', 'mculora.x.g'} <= set(imported(tree, 'mculora.x'))


# in this order
PARTS = ('basics', 'model', 'data', 'baselines', 'training', 'beyond', 'experiments', 'use')


def place(notebook):
    "By part, then by number."
    part, name = notebook.split('/')
    return PARTS.index(part), name


def test_a_notebooks_folder_is_its_modules_package():
    assert FACE == '00_start.ipynb'
    for name, notebook in NOTEBOOK_OF.items():
        part, file = notebook.removesuffix('.ipynb').split('/')
        assert name == f'mculora.{part}.{file.split("_", 1)[1]}' and re.match(
            r'\d\d[a-z]?_', file
        ), notebook
    assert {
        p.name for p in (ROOT / 'nbs').iterdir() if p.is_dir() and p.name[0] not in '._'
    } == set(PARTS)


def test_the_site_lists_the_parts_in_their_order():
    index = (ROOT / 'docs' / 'index.md').read_text()
    listed = re.findall(r' <nbs/(\w+)/index>$', index, flags=re.M)
    assert tuple(listed) == PARTS


def package_of(path):
    return '.'.join(path.relative_to(ROOT).parent.parts)


def test_no_module_imports_a_later_one():
    assert NOTEBOOK_OF
    later = []
    for name, notebook in NOTEBOOK_OF.items():
        path = (ROOT / name.replace('.', '/')).with_suffix('.py')
        wanted = {
            NOTEBOOK_OF[i] for i in imported(parsed(path), package_of(path)) if i in NOTEBOOK_OF
        }
        later += [(notebook, other) for other in wanted if place(other) > place(notebook)]
    assert not later


def test_numbers_are_unique():
    numbers = [(p.parent, p.name.split('_')[0]) for p in NOTEBOOKS if p.name[0].isdigit()]
    assert not [n for n in numbers if numbers.count(n) > 1]


# a notebook by its number, or a table or figure of the paper in backticks; what comes before its
# name is its folder
NAMED = re.compile(
    r'([\w./]*/)?(?<![\w.-])(\d\d[a-z]?_[a-z_]+)(?:\.ipynb)?\b|`([\w/]*?)((?:fig|table)\d_[a-z]+)`'
)


def prose(path):
    "What a file says; of a notebook its cells, without their outputs."
    if path.suffix != '.ipynb':
        return path.read_text()
    return '\n'.join(source(c) for c in load(path)['cells'])


NAMES = {str(p.relative_to(ROOT / 'nbs').with_suffix('')) for p in NOTEBOOKS}


def lost_notebooks(text):
    "Names of notebooks that do not say where they lie, or lie nowhere."
    # where a link leads is tests/test_docs.py's
    for a, b, c, d in NAMED.findall(re.sub(r'\]\(\S+?\)', ']', text)):
        name = f'{(a or c).rpartition("nbs/")[2]}{b or d}'
        if name not in NAMES:
            yield name


def test_notebooks_are_named_with_their_folder():
    assert (
        list(lost_notebooks('`model/01_mcla`, nbs/model/01_mcla.ipynb, nbs/00_start.ipynb')) == []
    )
    assert list(lost_notebooks('`01_mcla`, `data/01_mcla`')) == ['01_mcla', 'data/01_mcla']
    assert list(lost_notebooks('`fig3_rank` `experiments/fig3_rank`')) == ['fig3_rank']
    files = [*NOTEBOOKS, *(ROOT / 'docs').glob('*.md'), *MODULES]
    files += [ROOT / f for f in ('README.md', 'CONTRIBUTING.md', 'tests/mutants.yaml', 'Makefile')]
    assert not {(p.name, name) for p in files for name in lost_notebooks(prose(p))}


# --- the exported package ---


@cache
def classes():
    return {
        node.name: node
        for path in MODULES
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    }


def inherited(node):
    """Names of the methods that the package's own bases of class `node` have: they are described
    there."""
    known = classes()
    bases = [known[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in known]
    return {f.name for base in bases for f in base.body if isinstance(f, FUNCTION)}.union(
        *map(inherited, bases)
    )


def undocumented(body):
    """Public functions and classes of more than two lines, and new public methods of more than
    ten, that say nothing of themselves."""
    for node in body:
        if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name.startswith('_'):
            continue
        if not ast.get_docstring(node) and node.end_lineno - node.lineno >= 2:
            yield node.name
        if not isinstance(node, ast.ClassDef):
            continue
        for f in node.body:
            if (
                not isinstance(f, FUNCTION)
                or f.name.startswith('_')
                or f.name in inherited(node) | {'forward'}
            ):
                continue
            if not ast.get_docstring(f) and f.end_lineno - f.lineno >= 10:
                yield f'{node.name}.{f.name}'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings(path):
    assert not list(undocumented(parsed(path).body))


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_backslash_in_a_plain_docstring(path):
    # nbdev makes a plain string of the `>` line under a notebook's title: `\{` warns from Python
    # 3.12 on, `\beta` loses its b
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tree = compile(path.read_text(), str(path), 'exec', ast.PyCF_ONLY_AST)
    texts = [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert not [t for t in texts if set(t) & set('\a\b\f\v')]


HEAVY = {
    'nbdev',
    'IPython',
    'matplotlib',
    'fastcore',
    'execnb',
    'ipykernel',
    'papermill',
    'pandas',
    'seaborn',
    'sklearn',
    'statsmodels',
}


# what is imported, one after the other, and what must not be loaded then
STEPS = {
    'import mculora': HEAVY | {'torch', 'numpy', 'pydantic'},
    'from mculora.basics.method import methods\nmethods()\nimport mculora.training.trainer': HEAVY
    | {'scipy', 'pyarrow', 'psutil'},
    'from mculora.basics.dialogues import random_dialogues, split\n'
    'split(random_dialogues(lengths=(2,) * 20, parts=("Session1", "Session2")))': HEAVY | {'scipy'},
    'import pkgutil, importlib\n'
    'for m in pkgutil.walk_packages(mculora.__path__, "mculora."): '
    'importlib.import_module(m.name)': HEAVY,
}


def test_imports_are_light(tmp_path):
    steps = '\n'.join(f'{step}\nprint(*sys.modules)' for step in STEPS)
    start = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
    said = run(sys.executable, '-c', start + steps, cwd=tmp_path).splitlines()
    for loaded, unwanted in zip(said, STEPS.values(), strict=True):
        assert 'mculora' in loaded.split() and not unwanted & set(loaded.split())


# arguments of the command line -> exit code; none of them needs data, a method or a result
KNOWN_AT_ONCE = {
    (): 2,
    ('--help',): 0,
    ('train', '--help'): 0,
    ('data', 'check', '--help'): 0,
    ('results', 'list', '--help'): 0,
    ('study', '--help'): 0,
    ('trian',): 2,
    ('train', '--sed', '3'): 2,
    ('train', '--seed', 'x'): 2,
    ('data', 'check'): 2,
    ('headroom', 'iemocap', '--draws', 'many'): 2,
}
RUNNER = """
import sys
from mculora.__main__ import main

codes = []
for sys.argv[1:] in {arguments}:
    try:
        main()
    except SystemExit as e:
        codes.append(e.code)
print(*codes)
print(*sys.modules)
"""


def test_help_and_wrong_arguments_wait_for_nothing_that_computes():
    """Importing PyTorch takes seconds, which nobody should wait for to read that a name is
    misspelt. `mculora data extract --help` names what its registries hold, and does import it."""
    said = run(sys.executable, '-c', RUNNER.format(arguments=list(map(list, KNOWN_AT_ONCE))))
    *_, codes, loaded = said.splitlines()
    assert [*map(int, codes.split())] == [*KNOWN_AT_ONCE.values()]
    computes = {'torch', 'numpy', 'scipy', 'pyarrow', 'psutil', 'safetensors', 'tqdm'}
    assert 'mculora.use.cli' in loaded.split()
    assert not (HEAVY | computes) & set(loaded.split())


def test_types_are_handed_on():
    """Without the marker, and in the wheel, a type checker does not look at the annotations of a
    package."""
    assert (ROOT / 'mculora' / 'py.typed').is_file() and 'py.typed' in PYPROJECT['tool'][
        'setuptools'
    ]['package-data']['mculora']


def test_version_is_said_once():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / 'settings.ini')
    scope = {}
    exec((ROOT / 'mculora' / '__init__.py').read_text(), scope)
    assert (
        scope['__version__'] == settings['DEFAULT']['version']
        and 'version' in PYPROJECT['project']['dynamic']
    )


def test_help_names_what_registries_hold():
    said = ' '.join(run(sys.executable, '-m', 'mculora', 'data', 'extract', '--help').split())
    assert 'iemocap, iemocap6, mosi, mosei: write the layout' in said
    assert 'light, expression, none, or a folder or NAME@REVISION of an image model' in said


# the test above calls the first, as far as its help
@pytest.mark.slow
@pytest.mark.parametrize('module', ['mculora', 'mculora.use.cli'])
def test_a_module_is_the_command_line_too(module, tmp_path):
    said = run(
        sys.executable,
        '-m',
        module,
        'train',
        '--method',
        'majority',
        '--size',
        'tiny',
        '--fold',
        '1',
        '--device',
        'cpu',
        '--out-dir',
        str(tmp_path),
    )
    assert 'iemocap-simulated-tiny, majority' in said
    assert list(tmp_path.rglob('result.json'))


def test_entry_points_lead_somewhere():
    points = [
        *PYPROJECT['project'].get('scripts', {}).values(),
        *PYPROJECT['project']['entry-points']['nbdev'].values(),
    ]
    for module in (point.split(':')[0] for point in points):
        assert (ROOT / module.replace('.', '/')).with_suffix('.py').exists(), module


# --- pins ---


def pins(name):
    "name -> version of a file in which every line is an exact pin or a comment."
    lines = [line.split('#')[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = {}
    for line in filter(None, lines):
        m = re.fullmatch(r'([\w.-]+)==([\w.]+)', line)  # no +cpu, no path, no address
        assert m, f'{name}: {line}'
        assert canonicalize_name(m[1]) not in found, f'{name}: {m[1]} twice'
        found[canonicalize_name(m[1])] = m[2]
    return found


REQUIREMENTS, CONSTRAINTS = pins('requirements.txt'), pins('constraints.txt')
RUNTIME = [Requirement(r) for r in PYPROJECT['project']['dependencies']]
EXTRAS = {
    extra: [r for r in map(Requirement, listed) if r.name != 'mculora']  # another extra
    for extra, listed in PYPROJECT['project']['optional-dependencies'].items()
}


def test_constraints_repeat_the_requirements():
    assert {k: CONSTRAINTS.get(k) for k in REQUIREMENTS} == REQUIREMENTS


def test_lock_has_the_hashes_of_the_constraints():
    """requirements.lock: the versions of constraints.txt, each with the hashes of its files, and
    not a word on where they come from."""
    text = (ROOT / 'requirements.lock').read_text()
    blocks = [
        re.fullmatch(
            r'([\w.-]+)==([\w.]+)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n', b
        )
        for b in re.split(r'(?m)^(?=[^#\s])', text)[1:]
    ]
    assert all(blocks) and not re.search(r'://|index|@|--(?!hash)', text)
    assert {canonicalize_name(m[1]): m[2] for m in blocks} == CONSTRAINTS, 'make lock'


def needed(names):
    """name -> version of everything installed that these distributions need, whatever else is
    installed here."""
    found, todo = {}, [(canonicalize_name(n), '') for n in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        dist = distribution(name)
        found[name, extra] = dist.version.split('+')[0]
        for r in map(Requirement, dist.requires or []):
            if not r.marker or r.marker.evaluate({'extra': extra}):
                todo += [(canonicalize_name(r.name), e) for e in ('', *r.extras)]
    return {name: version for (name, _), version in found.items()}


@pytest.mark.pinned
def test_everything_that_an_install_brings_is_pinned():
    found = needed(REQUIREMENTS)
    assert len(found) > len(REQUIREMENTS)
    assert {
        n: (v, CONSTRAINTS.get(n)) for n, v in found.items() if CONSTRAINTS.get(n) != v
    } == {}, 'make lock, then make setup'


def test_requirements_satisfy_pyproject():
    ranges = {canonicalize_name(r.name): r.specifier for r in [*RUNTIME, *chain(*EXTRAS.values())]}
    assert set(ranges) == set(REQUIREMENTS)
    assert not [name for name, wanted in ranges.items() if REQUIREMENTS[name] not in wanted]


def test_environment_yml():
    env = yaml.safe_load((ROOT / 'environment.yml').read_text())
    conda = [d for d in env['dependencies'] if isinstance(d, str)]
    assert [d['pip'] for d in env['dependencies'] if isinstance(d, dict)] == [
        ['-r requirements.txt', '-c constraints.txt', '-e .']
    ]
    # all else is pinned in requirements.txt
    assert [re.split('[=<>]', d)[0] for d in conda] == ['python', 'pip']
    assert conda[0].split('=')[-1] in SpecifierSet(PYPROJECT['project']['requires-python'])


TESTS = {p.stem for p in (ROOT / 'tests').rglob('*.py')}
# of the top-level modules: it reads what every distribution says of itself
installed = cache(packages_distributions)


def third_party(names):
    """Distributions of the top-level modules in `names`, without the standard library, the project
    and the tests' neighbours."""
    own = {'mculora', 'conftest', *TESTS}
    tops = {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - own
    known = installed()
    return {canonicalize_name(known[t][0]) if t in known else t for t in tops}


def test_package_imports_only_its_dependencies():
    found = third_party(n for p in MODULES for n in imported(parsed(p), package_of(p)))
    assert found <= {canonicalize_name(r.name) for r in RUNTIME}


def code(nb):
    "All Python of a notebook; lines with magics become comments."
    cells = [
        source(c)
        for c in nb['cells']
        if c['cell_type'] == 'code' and not source(c).startswith('%%')
    ]
    return without_magics('\n'.join(cells))


def test_notebooks_and_tests_import_only_what_is_pinned():
    trees = [parsed(p) for p in NOTEBOOKS] + [
        parsed(p)
        for top in ('tests', 'docs', '.jupyter', 'workflow')
        for p in (ROOT / top).rglob('*.py')
    ]
    trees += [
        ast.parse(
            '\n'.join(
                re.findall(
                    r'^(?:import|from) .*',
                    (ROOT / 'workflow' / 'Snakefile').read_text(),
                    flags=re.M,
                )
            )
        )
    ]
    assert third_party(n for tree in trees for n in imported(tree)) <= set(CONSTRAINTS)


def brought(*extras):
    "What an install of the package with these extras brings by name."
    listed = [*RUNTIME, *chain(*(EXTRAS[e] for e in extras))]
    return {canonicalize_name(r.name) for r in listed}


# what Colab has of its own
COLAB = {'ipython', 'matplotlib', 'seaborn'}
# extras of what a notebook is about
BESIDE = {'04_clips.ipynb': ['clips'], '08_expression.ipynb': ['clips', 'hdf5']}


@each_notebook
def test_a_notebook_needs_only_what_its_extra_brings(path):
    """And the package is enough for those that open in Colab."""
    needs = third_party(imported(parsed(path)))
    if path.parent.name == 'nbs':
        assert needs <= brought() | COLAB
    assert needs <= brought('notebooks', *BESIDE.get(path.name, ()))


# --- the Makefile, and what the documents say of it ---

MAKEFILE = (ROOT / 'Makefile').read_text()
TARGETS = set(re.findall(r'^([a-z][a-z-]*):', MAKEFILE, flags=re.M))


def test_tools_that_make_calls_are_pinned():
    """Scripts of the environment and modules that are run; pip comes with Python, and brings all
    others."""
    scripts = set(re.findall(r'\$\(BIN\)\)?/([\w-]+)', MAKEFILE)) - {'python', 'mculora'} | {
        'pre-commit'
    }
    makers = {point.name: point.dist.name for point in entry_points(group='console_scripts')}
    modules = set(re.findall(r'\$\(BIN\)/python -m (\w+)', MAKEFILE)) - {'pip'}
    assert {'papermill', 'nbdev_clean'} <= scripts and 'pytest' in modules
    assert {canonicalize_name(makers.get(s, s)) for s in scripts} | third_party(modules) <= set(
        CONSTRAINTS
    )


def test_pre_commit_runs_what_make_runs():
    "Nothing is fetched, and there is no second list of checks."
    repos = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    assert {r['repo'] for r in repos} == {'local'}
    for hook in (h for r in repos for h in r['hooks']):
        words = hook['entry'].split()
        assert hook['language'] == 'system' and words[0] == 'make' and set(words[1:]) <= TARGETS


# to look for a Python takes a second
DRY_RUN = 'make', '--dry-run', f'PYTHON={sys.executable}'


def test_make_paper_hands_over_its_variables():
    said = run(*DRY_RUN, 'paper', 'SIZE=tiny', 'CORES=3')
    assert 'snakemake' in said and '--config size=tiny' in said and '--cores 3' in said


def test_make_train_hands_over_its_variables():
    said = run(
        *DRY_RUN,
        'train',
        'DATASET=mosei',
        'SIZE=tiny',
        'METHOD=mmin',
        'SEED=7',
        'FOLD=2',
        'SCHEDULE=quick',
    )
    for parameter in (
        "-r dataset 'mosei'",
        "-r size 'tiny'",
        "-r method 'mmin'",
        "-p seed '7'",
        "-p fold '2'",
        "-r schedule 'quick'",
    ):
        assert parameter in said
    assert 'data_root' not in said
    assert '-r data_root' in run(*DRY_RUN, 'train', 'DATA_ROOT=x')


GENERATED = ('runs/', 'data/', '.venv', '.git/', '_docs/', '_site/', 'dist/', '~')
FILE = re.compile(
    r'[\w.-]+(?:/[\w.-]+)+/?|[\w.-]+/|[\w-]+\.(?:md|py|ipynb|toml|txt|ini|yml)|Makefile|LICENSE'
)


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_documents_name_only_what_exists(name):
    text = (ROOT / name).read_text()
    blocks = re.findall(r'^```.*?^```', text, flags=re.S | re.M)
    prose = re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)
    spans = re.findall(r'`([^`\n]+)`', prose)
    files = {s for s in spans if FILE.fullmatch(s)}
    files |= {
        link
        for link in re.findall(r'\]\(([^)\s#]+)[^)]*\)', prose)
        + re.findall(r'src="([^"]+)"', prose)
        if '://' not in link
    }
    missing = [
        f
        for f in files
        if not f.startswith(GENERATED)
        and not (ROOT / f).exists()
        and not (ROOT / 'nbs' / f).exists()
    ]
    assert not missing
    makes = {
        m for s in spans + blocks for m in re.findall(r'(?:^|[\n;&]\s*|\$ )make ([a-z][a-z-]*)', s)
    }
    assert makes <= TARGETS


def test_text_files_name_their_encoding():
    "The machine's own is another one on Windows: a name such as colère would not come back."
    bare = []
    for path in sorted((ROOT / 'mculora').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                said = ast.unparse(node)
                of_text = node.func.attr in ('read_text', 'write_text')
                if of_text and "'utf-8'" not in said and '/proc/' not in said:
                    bare.append(f'{path.name}:{node.lineno}: {said}')
    assert not bare
