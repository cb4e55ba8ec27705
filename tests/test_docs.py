"""What the documents say is so: every block of Python runs, every command is one, every name that
can be imported can be.

Commands are not all run: some take hours, open a server or a browser, or change the environment.
Each of these is checked as far as that goes without running it, and `CHECKED` says how and why."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import typer
import typer.exceptions
import yaml
from fastcore.script import anno_parser
from markdown_it import MarkdownIt
from notebooks import passes
from test_ci import schema_errors

from mculora.use.cli import app
from mculora.experiments.results import Result, Score, Shared
from mculora.experiments.results import addresses, read_result, said_by, write_result
from mculora.experiments.runs import RunConfig

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'results/README.md')] + sorted(
    (ROOT / 'docs').glob('*.md')
)
BLOCKS = [
    (p, kind, text)
    for p in PAGES
    for kind, text in re.findall(
        r'^```(\w+|\{[\w-]+\}[^\n]*)?\n(.*?)^```', p.read_text(), flags=re.S | re.M
    )
]


def of(kind):
    return [(p, text) for p, k, text in BLOCKS if k == kind]


def named(item):
    return str(item.relative_to(ROOT)) if isinstance(item, Path) else None


def test_every_block_is_of_a_known_kind():
    "A block that nobody checks has no language: the layout of folders in README.md, for example."
    assert {k for _, k, _ in BLOCKS if not k.startswith('{')} <= {'', 'sh', 'python'}
    for p, k, text in BLOCKS:
        if k == '':
            assert not re.search(
                r'^\s*(\$ |make |mculora |pip |python |papermill |import |from )', text, flags=re.M
            ), f'{p.name}: a command or code in a block without a language'


# --- Python ---

# what the commands before the block leave behind, of a smaller model
BEFORE = {
    'docs/prediction.md': """
from mculora.use.artefact import from_run, save
from mculora.experiments.runs import RunConfig, run
config = RunConfig(size='tiny', device='cpu', options=dict(width=16, depth=1, epochs=2))
save(from_run(run(config, progress=False)[1]), 'model')
""",
    'docs/own-data.md': """
import numpy as np, pandas as pd
np.save('train.npy', np.zeros((5, 2)))
np.savetxt('train.lengths', [2, 3], fmt='%d')
rows = pd.DataFrame(dict(dialogue='d1', position=[0, 1, 2], truth=['calm', 'calm', 'merry']))
rows.assign(label='calm', combination=['a', 'at', 'a']).to_csv('probabilities.csv')
""",
}


@pytest.mark.parametrize('page', sorted({p for p, _ in of('python')}), ids=named)
def test_python_blocks_run_in_order(page, tmp_path):
    """As a notebook in a process of its own; what they write goes to a temporary folder, what they
    read is the repository's."""
    for name in ('results', 'figures', 'nbs', 'workflow'):
        (tmp_path / name).symlink_to(ROOT / name)
    start = (
        'import os, sys, mculora.experiments.runs; from pathlib import Path; '
        f'os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r}); '
        f'mculora.experiments.runs.repo_root = lambda: Path({str(tmp_path)!r})'
    )
    cells = [start, BEFORE.get(named(page), ''), *(text for p, text in of('python') if p == page)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, tmp_path / f'{page.stem}.ipynb')
    printed = passes(tmp_path / f'{page.stem}.ipynb', {}, timeout=300).text
    if page.name == 'new-method.md':
        row = next(line for line in printed.splitlines() if line.startswith('| `votes`'))
        floor = next(line for line in printed.splitlines() if line.startswith('| `majority`'))
        mean, least = (float(line.split('|')[-3].split()[0]) for line in (row, floor))
        assert mean > least + 5, 'a method that learns nothing'


# --- commands ---


def lines(text):
    """The commands of a block, without remarks and settings before them; a line that ends with a
    backslash goes on."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
            words = words[1:]
        if words:
            yield words


COMMANDS = [(p, words) for p, text in of('sh') for words in lines(text)]


MAKEFILE = (ROOT / 'Makefile').read_text()


def check_make(words):
    "`make --dry-run` knows the target, and the Makefile its variables."
    for w in words[1:]:
        if '=' in w:
            assert re.search(rf'^{w.split("=")[0]}\s*[?:]?=', MAKEFILE, flags=re.M), w
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')}
    done = subprocess.run(
        ['make', '--dry-run', f'PYTHON={sys.executable}', *words[1:]],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr


def parsed(words):
    "The command and its arguments, as the command line itself reads them; nothing is run."
    cmd, args, context = typer.main.get_command(app), words[1:], None
    while hasattr(cmd, 'resolve_command'):
        context = cmd.make_context(cmd.name, list(args), parent=context, resilient_parsing=True)
        name, cmd, args = cmd.resolve_command(context, list(args))
        assert cmd, f'no command of that name in {words}'
    if '--help' not in args:
        cmd.make_context(name, list(args), parent=context)
    return name


def check_mculora(words):
    assert parsed(words)


def check_papermill(words):
    "The notebook is there, and every parameter is one of a run, or of the notebook's own."
    assert (ROOT / words[1]).is_file() and words[2].endswith('.ipynb')
    cells = nbformat.read(ROOT / words[1], 4).cells
    own = [c.source for c in cells if 'parameters' in c.metadata.get('tags', [])]
    known = set(re.findall(r'^(\w+) =', own[0], flags=re.M)) | set(RunConfig.model_fields)
    rest = words[3:]
    while rest:
        flag, rest = rest[0], rest[1:]
        assert flag in ('-p', '-r', '-y'), flag
        names, rest = (
            (list(yaml.safe_load(rest[0])), rest[1:]) if flag == '-y' else ([rest[0]], rest[2:])
        )
        assert set(names) <= known, names


def check_installed(words):
    assert (BIN / words[0]).is_file(), words[0]


def check_nbdev(words):
    "The command is nbdev's, and its own parser reads the arguments; nothing is run."
    check_installed(words)
    (command,) = entry_points(group='console_scripts', name=words[0])
    try:
        anno_parser(inspect.unwrap(command.load())).parse_args(words[1:])
    except SystemExit as e:
        raise AssertionError(f'{words}: {e}') from None


def check_git(words):
    "The same driver as `make hooks` sets, apart from the path."
    assert words[1] == 'config' and words[-1].split(' ', 1)[1] in MAKEFILE


def check_pip(words):
    "The files are there, and an extra is one of this package."
    for flag, name in zip(words, words[1:]):
        if flag in ('-r', '-c'):
            assert (ROOT / name).is_file()
    for extra in re.findall(r'\[([\w,-]+)\]', ' '.join(words)):
        assert all(f'\n{e} = [' in (ROOT / 'pyproject.toml').read_text() for e in extra.split(','))


def check_docker(words):
    "The image is the one that is built, and what runs in it is a target of make."
    if words[1] == 'build':
        assert words[-1] == '.' and (ROOT / 'Dockerfile').is_file()
        return
    command = words[words.index('mculora') + 1 :]
    if command:
        check_make(command)


CHECKED = {  # how; why it is not run here
    # sets up an environment, trains for minutes or hours, opens JupyterLab; what lies behind each
    # target has tests of its own
    'make': check_make,
    # trains or waits; every command is run by test_runs, test_sources, test_clips and others
    'mculora': check_mculora,
    # trains for minutes; test_runs runs the notebook at tiny size
    'papermill': check_papermill,
    'nbdev_test': check_nbdev,  # is what test_notebooks runs, minutes long
    # would write into this checkout; test_toolchain runs it on a copy
    'nbdev_export': check_nbdev,
    'nbdev_clean': check_nbdev,  # the same
    # would change this clone's configuration; test_toolchain reads what it says
    'git': check_git,
    'pip': check_pip,  # would change this environment
    'docker': check_docker,  # needs Docker, and the network
    'python': lambda words: (ROOT / words[1]).is_file() or pytest.fail(words[1]),
    # of a shell; there is nothing more to it
    'source': lambda words: words[1:] == ['.venv/bin/activate'] or pytest.fail(words[1]),
}


@pytest.mark.parametrize(
    'page, words', COMMANDS, ids=[f'{p.name}-{" ".join(w)[:60]}' for p, w in COMMANDS]
)
def test_commands_are_commands(page, words):
    assert words[0] in CHECKED, f'{page.name}: {words[0]!r} is neither run nor checked by this test'
    CHECKED[words[0]](words)


def test_a_wrong_command_is_noticed():
    for words in (
        'make trian',
        'make train DATASTE=mosei',
        'mculora trian',
        'mculora train --sede 1',
        'mculora data check',
        'mculora train --seed x',
        'papermill nbs/train.ipynb out.ipynb -p datset mosei',
        'nbdev_tset',
        'nbdev_test --pth nbs',
        'nbdev_clean --fname',
        'nbdev_export nbs',
        'pip install mculora[clip]',
    ):
        words = shlex.split(words)
        with pytest.raises((AssertionError, typer.exceptions.TyperException)):
            CHECKED.get(words[0], check_installed)(words)


WITHOUT_MAKE = re.findall(
    r'^\| `make ([\w= ]+)` \| (.*) \|$',
    (ROOT / 'docs' / 'where-it-runs.md').read_text(),
    flags=re.M,
)


@pytest.mark.parametrize('target, instead', WITHOUT_MAKE, ids=[t for t, _ in WITHOUT_MAKE])
def test_what_stands_for_a_target_where_there_is_no_make(target, instead):
    check_make(['make', *target.split()])
    for command in re.findall(r'`([^`]+)`', instead):
        words = shlex.split(command, posix=False)
        if words[:3] == ['python', '-m', 'mculora']:
            check_mculora(words[2:])
        elif words[0] == 'pip':
            check_pip(words)
        elif words[:3] == ['python', '-m', 'pytest']:
            assert command.endswith(re.search(r"-m '(.* not pinned)'", MAKEFILE)[1] + '"')
        else:
            tool = Path(words[0].replace('\\', '/')).name
            assert tool in ('py', 'activate') or (BIN / tool).is_file(), command


PUBLIC = dict(re.findall(r'^(user|repo) = (\S+)$', (ROOT / 'settings.ini').read_text(), flags=re.M))
OPENS = {
    r'https://mybinder\.org/v2/gh/': '{user}/{repo}/main?labpath=',
    r'https://colab\.research\.google\.com/github/': '{user}/{repo}/blob/main/',
}


@pytest.mark.parametrize('host', OPENS, ids=['Binder', 'Colab'])
def test_links_open_notebooks_of_this_repository(host):
    page = (ROOT / 'docs' / 'where-it-runs.md').read_text()
    where = OPENS[host].format(**PUBLIC)
    opened = [unquote(link.removeprefix(where)) for link in re.findall(rf'{host}([^)]*)', page)]
    assert opened == ['nbs/00_start.ipynb', 'nbs/own_data.ipynb', 'nbs/train.ipynb']


@pytest.mark.parametrize('name', ['00_start', 'own_data', 'train'])
def test_in_colab_the_first_cell_installs_this_repository(name):
    "And nothing elsewhere. tests/test_installed.py runs it."
    cells = nbformat.read(ROOT / 'nbs' / f'{name}.ipynb', 4).cells
    first = next(c.source for c in cells if c.cell_type == 'code')
    said = [line for line in first.splitlines() if line and not line.startswith('#')]
    address = 'https://github.com/{user}/{repo}'.format(**PUBLIC)
    assert said == [
        'import os',
        "if 'COLAB_RELEASE_TAG' in os.environ:",
        f'    %pip install --quiet git+{address}',
    ]


def test_make_lists_its_targets():
    "`make` alone is run for real."
    said = subprocess.run(
        ['make', f'PYTHON={sys.executable}'],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')},
    )
    assert said.returncode == 0 and 'make train' in said.stdout


# --- names ---


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_what_can_be_imported_can_be(page):
    for name in set(re.findall(r'`(mculora(?:\.\w+)+)`', page.read_text())):
        parts, found = name.split('.'), None
        for k in range(len(parts), 0, -1):
            try:
                found = importlib.import_module('.'.join(parts[:k]))
                break
            except ModuleNotFoundError:
                continue
        for p in parts[k:]:
            found = getattr(found, p)


# --- links ---

PARSER = MarkdownIt('commonmark').enable('table')
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
LINKING = [*PAGES, ROOT / 'figures' / 'README.md', *NOTEBOOKS]


def prose(path):
    "The Markdown of a page or of a notebook's cells."
    if path.suffix != '.ipynb':
        return path.read_text()
    cells = nbformat.read(path, 4).cells
    return '\n\n'.join(c.source for c in cells if c.cell_type == 'markdown')


@cache
def parsed_page(path):
    "Targets of links and pictures, words in code font, and anchors of headings as GitHub has them."
    links, codes, anchors = [], [], []
    tokens = PARSER.parse(prose(path))
    for before, token in zip([None, *tokens], tokens):
        for t in token.children or []:
            links += [v for k, v in t.attrs.items() if k in ('href', 'src')]
            codes += [t.content] * (t.type == 'code_inline')
        if before is not None and before.type == 'heading_open':
            text = ''.join(t.content for t in token.children)
            slug = re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
            again = [a for a in anchors if re.fullmatch(rf'{re.escape(slug)}(-\d+)?', a)]
            anchors.append(f'{slug}-{len(again)}' if again else slug)
    return links, codes, anchors


def dead(path, link):
    "Does a link lead nowhere? Other hosts are not asked."
    if re.match(r'[a-z]+:', link):
        return False
    name, _, anchor = unquote(link).partition('#')
    target = (path.parent / name).resolve() if name else path
    if not target.exists() or not target.is_relative_to(ROOT):
        return True
    return bool(anchor) and (target.suffix == '.md') and anchor not in parsed_page(target)[2]


@pytest.mark.parametrize('page', LINKING, ids=named)
def test_no_link_is_dead(page):
    links, codes, _ = parsed_page(page)
    assert not [link for link in links if dead(page, link)]
    files = {
        c for c in codes if re.fullmatch(r'(nbs|tests|results|workflow|figures|docs)/[\w./-]+', c)
    }
    # results/DATA/METHOD/RUN stands for many
    assert not [f for f in files if not re.search('/[A-Z]+/', f) and not (ROOT / f).exists()]
    places = page.parent, ROOT, ROOT / 'nbs'
    notebooks = {c for c in codes if re.fullmatch(r'[\w./-]+\.ipynb', c)}
    assert not [n for n in notebooks if not any((at / n).exists() for at in places)]


def test_a_dead_link_is_noticed():
    page = ROOT / 'README.md'
    for link in ('docs/nowhere.md', 'docs/findings.md#nowhere', '#nowhere', '../README.md'):
        assert dead(page, link), link
    for link in ('docs/findings.md', '#methods', 'https://example.org/x', 'nbs/00_start.ipynb'):
        assert not dead(page, link), link


def test_the_first_page_stays_short_and_leads_to_every_other():
    readme = ROOT / 'README.md'
    assert len(readme.read_text().splitlines()) <= 200
    linked = {(ROOT / link.split('#')[0]).resolve() for link in parsed_page(readme)[0]}
    assert set((ROOT / 'docs').glob('*.md')) - linked == {ROOT / 'docs' / 'index.md'}


def test_every_page_is_in_the_index():
    index = (ROOT / 'docs' / 'index.md').read_text()
    assert not [
        p.stem
        for p in (ROOT / 'docs').glob('*.md')
        if p.stem != 'index' and not re.search(rf'^docs/{p.stem}$', index, flags=re.M)
    ]
    assert 'docs/*.md' in (ROOT / 'Makefile').read_text()


# --- how to read a result file ---


@cache
def described(section):
    """First cells of a section's table in docs/results.md: the fields it explains, and what it
    says of each."""
    text = (
        (ROOT / 'docs' / 'results.md').read_text().split(f'\n## `{section}`\n')[1].split('\n## ')[0]
    )
    rows = [line.strip('|').split('|', 1) for line in text.splitlines() if line.startswith('| `')]
    return {name: row[1].strip() for row in rows for name in re.findall(r'`([\w-]+)`', row[0])}


def test_every_field_of_the_file_is_described(tmp_path):
    known = {m: described(m.__name__) for m in (Result, Score)}
    assert set(known[Score]) == set(Score.model_fields) and all(
        v for k in known.values() for v in k.values()
    )
    r = read_result(committed()[0]).model_copy(
        update=dict(format=Result.model_fields['format'].default)
    )
    write_result(tmp_path, r)
    on_disk = json.loads((tmp_path / 'result.json').read_text())
    assert set(on_disk) == set(known[Result]) and known[Result]['format'].startswith(
        f'{on_disk["format"]};'
    )


@cache
def committed():
    "One committed result for each version and dataset."
    out = {}
    for p in addresses(ROOT / 'results'):
        out.setdefault((said_by(p)['config']['version'], p.parts[-3]), p)
    return list(out.values())


def fields_of(path):
    "Of a result: the names that are found in each of its sections."
    r = read_result(path)
    return [
        ('Result', said_by(path)),
        ('config', r.config),
        ('data', r.data),
        ('environment', r.environment),
        *(('stages', s) for s in r.stages),
    ]


def test_what_results_hold_is_described():
    for path, section, found in ((p, *fields) for p in committed() for fields in fields_of(p)):
        known = described(section)
        if section == 'config':
            known = dict.fromkeys(Shared.model_fields, 'missing in files') | known
        always = {
            k
            for k, v in known.items()
            if not re.search(
                r'missing in files|own data only|with gaps only|speakers only|session only'
                r'|switched off only|uneven test only|trained on only',
                v,
            )
        }
        assert always <= set(found) <= set(known), (path, section)


def test_what_a_result_leaves_out_is_said():
    left_out = re.search(
        r'^(`data_root`.*) are parameters of a run',
        (ROOT / 'docs' / 'results.md').read_text(),
        flags=re.M,
    )[1]
    own = set(RunConfig.model_fields) - set(Shared.model_fields) - {'check', 'test_missing'}
    for path in committed():
        assert set(re.findall(r'`(\w+)`', left_out)) == own - set(read_result(path).config), path


# --- citation, changelog ---

VERSION = re.search(r'^version = (\S+)$', (ROOT / 'settings.ini').read_text(), flags=re.M)[1]
RELEASED = dict(
    re.findall(r'^## (\S+) \((\d{4}-\d\d-\d\d)\)$', (ROOT / 'CHANGELOG.md').read_text(), flags=re.M)
)


def test_the_citation_is_valid_and_a_wrong_one_is_noticed(tmp_path):
    "By the format's own schema, which check-jsonschema brings."
    text = (ROOT / 'CITATION.cff').read_text()
    (tmp_path / 'CITATION.cff').write_text(text.replace('family-names: Zhao', 'family-name: Zhao'))
    files = (at / 'CITATION.cff' for at in (ROOT, tmp_path))
    assert [schema_errors('citation-file-format', file) for file in files] == [0, 1]


# the fields of a deposit, by Zenodo's documentation, with what they may hold
ZENODO = {
    'title': str,
    'upload_type': ('software', 'dataset', 'publication'),
    'description': str,
    'creators': list,
    'version': str,
    'publication_date': r'\d{4}-\d\d-\d\d',
    'license': r'[\w.-]+',
    'access_right': ('open',),
    'language': r'[a-z]{3}',
    'keywords': list,
    'references': list,
    'related_identifiers': list,
}


def test_what_zenodo_reads_is_what_it_takes():
    z = json.loads((ROOT / '.zenodo.json').read_text())
    assert set(z) == set(ZENODO)
    for field, may in ZENODO.items():
        if isinstance(may, type):
            assert isinstance(z[field], may) and z[field]
        else:
            assert z[field] in may if isinstance(may, tuple) else re.fullmatch(may, z[field])
    assert all(isinstance(x, str) for k in ('keywords', 'references') for x in z[k])
    assert all(set(x) == {'name'} for x in z['creators'])
    for x in z['related_identifiers']:
        assert set(x) == {'identifier', 'relation', 'resource_type'}
        assert (x['relation'], x['resource_type']) == ('references', 'software')
        assert x['identifier'].startswith('https://')


def test_citation_is_of_this_version_and_names_the_paper():
    c = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert c['cff-version'] == '1.2.0' and {
        'message',
        'title',
        'authors',
        'version',
        'license',
    } <= set(c)
    assert (
        c['version'] == VERSION
        and c['license'] == 'Apache-2.0'
        and 'license = "Apache-2.0"' in (ROOT / 'pyproject.toml').read_text()
    )
    paper = c['preferred-citation']
    assert (
        'unimodal decoupled dynamic low-rank adaptation' in paper['title']
        and len(paper['authors']) == 9
        and all({'family-names', 'given-names'} == set(a) for a in paper['authors'])
    )


def test_an_archive_is_described_as_the_citation_says():
    c = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    z = json.loads((ROOT / '.zenodo.json').read_text())
    for key in ('title', 'version', 'license', 'keywords'):
        assert z[key] == c[key]
    assert [x['name'] for x in z['creators']] == [x['name'] for x in c['authors']]
    assert z['publication_date'] == c['date-released'].isoformat() == RELEASED[VERSION]
    paper = c['preferred-citation']
    (said,) = z['references']
    assert paper['title'] in said
    assert said.count(',') >= len(paper['authors'])
    assert all(x['family-names'] in said for x in paper['authors'])


def test_changelog_knows_every_version():
    found = re.findall(
        r'^## (\S+)(?: \((\d{4}-\d\d-\d\d)\))?$', (ROOT / 'CHANGELOG.md').read_text(), flags=re.M
    )
    versions = [v for v, _ in found if v != 'Unreleased']
    assert VERSION in versions and versions == sorted(
        versions, key=lambda v: [*map(int, v.split('.'))], reverse=True
    )
    assert all(bool(date) == (v != 'Unreleased') for v, date in found)
    runs = {said_by(p)['config']['version'] for p in committed()}
    assert runs <= set(versions), 'results of a version that the changelog does not know'


# --- the way through the notebooks ---

FOOT = re.compile(
    r'^(?:\[← (.+?)\]\((\S+)\) · )?\[all notebooks\]\(\S+\)(?: · \[(.+?) →\]\((\S+)\))?$'
)


def test_the_foot_of_every_notebook_leads_on():
    """Previous and next, by title, from the start to the last one. A notebook that has no foot yet,
    such as a new method's, is passed by."""
    feet, titles = {}, {}
    for path in sorted((ROOT / 'nbs').rglob('[!.]*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        titles[path] = ''.join(cells[0]['source']).split('\n')[0].removeprefix('# ')
        if found := FOOT.match(''.join(cells[-1]['source'])):
            feet[path] = found.groups()
    at, seen, before = ROOT / 'nbs' / '00_start.ipynb', [], None
    while at is not None:
        back, back_to, on, on_to = feet[at]
        assert back == (before and titles[before]), at
        assert before is None or (at.parent / back_to).resolve() == before, at
        seen.append(at)
        before, at = at, on_to and (at.parent / on_to).resolve()
        assert on == (at and titles[at]), before
    assert len(seen) == len(set(seen)) > 60 and set(seen) == set(feet)
