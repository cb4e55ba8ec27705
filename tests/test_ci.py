"""The public CI: valid, pinned, with the least rights, and every step a command that anybody can
run here."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import check_jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
GITHUB = ROOT / '.github'
WORKFLOWS = sorted((GITHUB / 'workflows').glob('*.yml'))
TARGETS = set(re.findall(r'^([a-z][a-z-]*):', (ROOT / 'Makefile').read_text(), flags=re.M))
JOBS = [
    (p.stem, name, job)
    for p in WORKFLOWS
    for name, job in yaml.safe_load(p.read_text())['jobs'].items()
]
MADE = {
    (flow, m[1])
    for flow, _, job in JOBS
    for step in job['steps']
    if (m := re.fullmatch(r'make ([a-z-]+)', step.get('run', '')))
}

# flow -> the target of make that needs a token
PUBLISHING = {'site': 'publish', 'release': 'release'}

each_job = pytest.mark.parametrize('flow, name, job', JOBS, ids=[f'{f}-{n}' for f, n, _ in JOBS])


# --- tools that know GitHub ---


def schema_errors(schema, *paths):
    """The exit code of check-jsonschema, which prints what it finds. In this process: one of its
    own would import for four seconds."""
    with pytest.raises(SystemExit) as end:
        check_jsonschema.main(['--builtin-schema', f'vendor.{schema}', *map(str, paths)])
    return end.value.code


def test_workflows_fit_githubs_schema():
    assert WORKFLOWS and schema_errors('github-workflows', *WORKFLOWS) == 0


def test_dependabot_fits_its_schema():
    assert schema_errors('dependabot', GITHUB / 'dependabot.yml') == 0


def test_a_wrong_workflow_is_noticed(tmp_path):
    (tmp_path / 'ci.yml').write_text(WORKFLOWS[0].read_text().replace('runs-on:', 'runs_on:'))
    assert schema_errors('github-workflows', tmp_path / 'ci.yml') == 1


def zizmor(path):
    command = [BIN / 'zizmor', '--offline', '--no-progress', path]
    done = subprocess.run(command, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_zizmor_finds_nothing():
    code, said = zizmor(GITHUB)
    assert code == 0, said


@pytest.mark.parametrize(
    'good, bad',
    [
        ('pull_request:', 'pull_request_target:'),
        (r'@[0-9a-f]{40} # (v\d+)[\d.]*', r'@\1'),
        ('run: make lint', 'run: echo ${{ github.event.pull_request.title }}'),
    ],
)
def test_zizmor_finds_what_is_wrong(tmp_path, good, bad):
    text = (GITHUB / 'workflows' / 'ci.yml').read_text()
    changed, n = re.subn(good, bad, text)
    assert n
    (tmp_path / 'ci.yml').write_text(changed)
    assert zizmor(tmp_path / 'ci.yml')[0] != 0


# --- rules of this project ---


def test_actions_are_pinned_by_hash_with_their_version():
    used = re.findall(r'uses: (.*)', ''.join(p.read_text() for p in WORKFLOWS))
    assert used
    assert not [
        u for u in used if not re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+(\.\d+)*', u)
    ]


@each_job
def test_a_job_has_an_end_and_the_least_rights(flow, name, job):
    assert job['timeout-minutes'] <= 120
    # what is published is written
    rights = 'write' if flow in PUBLISHING else 'read'
    assert job['permissions'] == {'contents': rights}


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_has_no_rights_of_its_own(path):
    assert yaml.safe_load(path.read_text())['permissions'] == {}


@each_job
def test_every_step_is_a_target_of_make(flow, name, job):
    "After checkout and Python: what fails in CI can be run here as it stands."
    steps = job['steps']
    assert [s['uses'].partition('@')[0] for s in steps[:2]] == [
        'actions/checkout',
        'actions/setup-python',
    ]
    assert steps[2:]
    for step in steps[2:]:
        target = re.fullmatch(r'make ([a-z-]+)', step['run'])[1]
        assert target in TARGETS, step
        token = {'env'} if PUBLISHING.get(flow) == target else set()
        assert set(step) - {'name', 'run'} == token


def test_what_is_released_was_tested_and_comes_from_a_tag_and_the_site_from_main():
    flows = {p.stem: yaml.safe_load(p.read_text()) for p in WORKFLOWS}
    # YAML reads the word `on` as true
    assert flows['release'][True] == {'push': {'tags': ['v*']}}
    assert flows['site'][True]['push'] == {'branches': ['main']}
    made = [s['run'] for s in flows['release']['jobs']['release']['steps'][2:]]
    assert made == ['make setup-locked', 'make lint', 'make test', 'make release']


def test_what_must_run_runs():
    assert {m for flow, m in MADE if flow == 'ci'} >= {
        'lint',
        'test',
        'test-notebooks',
        'test-lowest',
    }
    assert {m for flow, m in MADE if flow == 'nightly'} >= {
        'test-all',
        'test-faults',
        'reproduce',
        'audit',
        'test-newest',
        'test-order',
        'try-readme',
    }


def test_nothing_but_what_says_so_may_fail():
    free = {(f, n) for f, n, job in JOBS if job.get('continue-on-error') or 'if' in job}
    assert free == {('ci', 'windows'), ('nightly', 'reproduce'), ('nightly', 'newest')}


def test_every_python_that_the_package_names_is_tested():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    named = set(re.findall(r'Python :: (3\.\d+)', ' '.join(project['classifiers'])))
    pythons = set()
    for flow, _, job in JOBS:
        version = job['steps'][1]['with']['python-version']
        several = job.get('strategy', {}).get('matrix', {}).get('python', [])
        if flow == 'ci':
            pythons |= set(several if 'matrix' in version else [version])
    assert min(pythons, key=lambda v: int(v.split('.')[1])) == project[
        'requires-python'
    ].removeprefix('>=')
    assert pythons == named


def test_three_systems_are_tested():
    systems = {re.match('[a-z]+', job['runs-on'])[0] for flow, _, job in JOBS if flow == 'ci'}
    assert systems == {'ubuntu', 'macos', 'windows'}


def test_forms_of_issues_can_be_filled_in():
    for path in sorted((GITHUB / 'ISSUE_TEMPLATE').glob('*.yml')):
        form = yaml.safe_load(path.read_text())
        if path.name == 'config.yml':
            continue
        assert {'name', 'description', 'body'} <= set(form)
        assert all(part['attributes']['label'] for part in form['body'])


@pytest.mark.slow
def test_what_is_released_has_the_same_bytes_every_time(tmp_path):
    "From two clones, whatever the rights of new files: the wheel, the pins and the results."
    sums = []
    for umask in (0o022, 0o077):
        clone = tmp_path / str(umask)
        subprocess.run(['git', 'clone', '--quiet', ROOT, clone], check=True)
        subprocess.run(
            ['make', f'--old-file={sys.prefix}/.stamp', f'VENV={sys.prefix}', 'dist'],
            cwd=clone,
            umask=umask,
            check=True,
            capture_output=True,
        )
        sums.append((clone / 'dist' / 'SHA256SUMS').read_text())
    assert sums[0] == sums[1]
    names = [line.split()[1] for line in sums[0].splitlines()]
    assert [n.rpartition('.')[2] for n in names] == ['whl', 'zip', 'lock']


# --- containers ---

DOCKERFILE = (ROOT / 'Dockerfile').read_text()
CONTAINERS = sorted((ROOT / '.devcontainer').rglob('devcontainer.json'))


def test_the_container_installs_as_make_does_on_the_lowest_python():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    base = re.search(r'^FROM python:([\d.]+)', DOCKERFILE, flags=re.M)[1]
    assert f'>={base}' == project['requires-python']
    assert set(re.findall(r'make ([a-z]+)', re.sub('#.*', '', DOCKERFILE))) - {'make'} == {'setup'}
    # Binder gives these two, and runs as that user
    assert {'NB_USER', 'NB_UID'} <= set(re.findall(r'^ARG (\w+)', DOCKERFILE, flags=re.M))
    assert DOCKERFILE.index('USER ${NB_USER}') < DOCKERFILE.index('COPY')


def test_data_runs_and_environments_stay_out_of_the_container():
    "And nothing that is committed: what stays out is what git ignores."
    left_out = (ROOT / '.dockerignore').read_text().split()
    ignored = {line.strip('/') for line in (ROOT / '.gitignore').read_text().split()}
    assert {'.git', '.venv', 'data', 'runs'} <= set(left_out)
    assert {name.removeprefix('**/') for name in left_out} - {'.git'} <= ignored


@pytest.mark.parametrize('path', CONTAINERS, ids=lambda p: p.parent.name)
def test_a_development_container_is_built_from_the_same_file(path):
    said = json.loads(path.read_text())
    assert (path.parent / said['build']['dockerfile']).resolve() == ROOT / 'Dockerfile'
    assert (path.parent / said['build']['context']).resolve() == ROOT
    assert said['postCreateCommand'].split()[1] in TARGETS
    assert ('--gpus' in said.get('runArgs', [])) == (path.parent.name == 'cuda')
