"The campaign: what was broken on purpose in these tests, and what came of it, as one list at the end."
import json
from collections import Counter

import hypothesis
import pytest

hypothesis.settings.register_profile('suite', derandomize=True, deadline=None)   # the same examples each time, on any machine
hypothesis.settings.load_profile('suite')

KINDS = ('faults injected', 'survived', 'results lost', 'wrong results accepted', 'bad inputs tried', 'code executed')
TOTAL = Counter()


def pytest_configure(config): config.addinivalue_line('markers', 'faults: the whole campaign of faults, minutes long; run by `make test-faults` alone')


def pytest_collection_modifyitems(config, items):
    for item in items: # side by side: a file's tests in one process, which then shares what they prepare; notebooks share nothing
        if item.path.name not in ('test_notebooks.py', 'test_paper.py'): item.add_marker(pytest.mark.xdist_group(item.path.name))
    if 'faults' in (config.getoption('-m') or ''): return
    for item in items:
        if item.get_closest_marker('faults'): item.add_marker(pytest.mark.skip(reason='opt-in: make test-faults'))


@pytest.fixture
def campaign(record_property):
    "Counts of one test, by `KINDS`; they are added up over all tests and processes."
    own = Counter()
    yield own
    assert own.keys() <= set(KINDS)
    record_property('campaign', json.dumps(own))


def pytest_runtest_logreport(report):
    if report.when == 'teardown': TOTAL.update(*(json.loads(v) for k, v in report.user_properties if k == 'campaign'))


def pytest_terminal_summary(terminalreporter):
    if not TOTAL: return
    terminalreporter.section('faults on purpose')
    for kind in KINDS: terminalreporter.line(f'{kind:24}{TOTAL[kind]:8}')
