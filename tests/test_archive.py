"""The archive of everything that is committed: described, whole, and with what was made from
what. A small one is packed, damaged and verified in nbs/experiments/12_archive.ipynb."""

import hashlib
import json
import zipfile
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from mculora.experiments.archive import METADATA, verify
from mculora.experiments.reports import SIDECAR
from mculora.use.cli import app

ROOT = Path(__file__).resolve().parent.parent


def ask(*words):
    done = CliRunner().invoke(app, ['results', *map(str, words)])
    return done.exit_code, done.output


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "As `make dist` packs it; and what it says, by name."
    file = tmp_path_factory.mktemp('archive') / 'results.zip'
    code, said = ask('pack', '--out', file)
    assert code == 0, said
    with zipfile.ZipFile(file) as z:
        return file, {x['@id']: x for x in json.loads(z.read(METADATA))['@graph']}


def ids(named):
    return [x['@id'] for x in (named if isinstance(named, list) else [named])]


def test_the_archive_of_everything_is_whole(packed):
    assert ask('verify', packed[0]) == (0, f'{packed[0]}: whole\n')


def test_every_table_and_figure_is_made_by_an_action(packed):
    "By its notebook, with its command, from stores of runs; and so is every store, from data."
    _, said = packed
    actions = [x for x in said.values() if x['@type'] == 'CreateAction']
    made_by = {file: a for a in actions for file in ids(a['result'])}
    tables = sorted((ROOT / 'figures').rglob(f'*{SIDECAR}'))
    for sidecar in tables:
        name = sidecar.relative_to(ROOT).as_posix()
        action, made = made_by[name], json.loads(sidecar.read_text())['made']
        assert action['instrument'] == {'@id': made['notebook']}
        assert action['description'] == made['command']
        values = [said[x]['value'] for x in ids(action['object']) if x.startswith('#')]
        assert values == [made['hash']]
        from_files = [x for x in ids(action['object']) if x.startswith('results/')]
        assert bool(from_files) == bool(made['results'])
    stores = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'results').rglob('*.runs.jsonl')}
    assert {unquote(x) for x in made_by} >= stores and len(actions) == len(stores) + len(tables)
    iemocap = made_by['results/iemocap/mculora.runs.jsonl']
    (data,) = {said[x]['name'] for x in ids(iemocap['object'])}
    assert data == 'iemocap' and {said[x]['name'] for x in ids(iemocap['instrument'])} == {
        'mculora',
        'torch',
        'python',
    }


def test_it_says_who_made_it_and_conforms(packed):
    "What RO-Crate 1.1 and the profile for runs ask of the root."
    _, said = packed
    root, descriptor = said['./'], said[METADATA]
    assert descriptor['about'] == {'@id': './'}
    assert descriptor['conformsTo']['@id'] == 'https://w3id.org/ro/crate/1.1'
    assert root['conformsTo']['@id'].startswith('https://w3id.org/ro/wfrun/process/')
    zenodo = json.loads((ROOT / '.zenodo.json').read_text())
    assert (root['version'], root['datePublished']) == (
        zenodo['version'],
        zenodo['publication_date'],
    )
    for part in ('author', 'license', 'citation', 'conformsTo', 'hasPart', 'mentions'):
        assert ids(root[part]) and set(ids(root[part])) <= set(said)
    assert 'ACM Multimedia 2025' in said[root['citation']['@id']]['name']
    files = {k for k, x in said.items() if 'File' in x['@type']}
    assert files == set(ids(root['hasPart'])) and len(files) > 700


def test_a_damaged_file_is_named(packed, tmp_path):
    "One changed byte of one file of hundreds; and an action that names what is not there."
    name, changed = 'figures/iemocap/audit-iemocap.csv', tmp_path / 'changed.zip'
    with zipfile.ZipFile(packed[0]) as old, zipfile.ZipFile(changed, 'w') as new:
        for n in old.namelist():
            content = old.read(n)
            if n == name:
                content = b'?' + content[1:]
            if n == METADATA:
                graph = json.loads(content)
                (action,) = [x for x in graph['@graph'] if x['@id'] == '#audit-iemocap']
                action['instrument'] = {'@id': 'nbs/nowhere.ipynb'}
                content = json.dumps(graph).encode()
            new.writestr(n, content)
    digest = hashlib.sha256(b'?' + (ROOT / name).read_bytes()[1:]).hexdigest()
    damaged, dangling = verify(changed)
    assert damaged.startswith(f'{name}: found sha256 {digest}, expected ')
    assert dangling == (
        '#audit-iemocap: found instrument nbs/nowhere.ipynb, which is not described'
    )
    assert ask('verify', changed)[0] == 1
