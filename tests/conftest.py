"""What all tests share: which of them run, who shares a process, and, at the end, where the time
went and what the faults did."""

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

# the same examples each time, on any machine
hypothesis.settings.register_profile('suite', derandomize=True, deadline=None)
hypothesis.settings.load_profile('suite')


# --- who shares a process ---

ALONE = ('test_notebooks.py', 'test_paper.py')  # notebooks share nothing
# both start processes from one that has imported everything, which takes ten seconds to make
FORK = ('test_faults.py', 'test_runs.py')


# they read /proc, and lean on limits that Linux keeps
LINUX = ('test_faults.py', 'test_hostile.py')


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LINUX and sys.platform != 'linux':
            item.add_marker(pytest.mark.skip(reason='on Linux only'))


class ByFile(LoadFileScheduling):
    """Side by side, the tests of a file run in one process, which then shares what they prepare.
    Files with many tests come first, notebooks last, one by one."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        if Path(file).name in FORK:
            return ' and '.join(FORK)
        return nodeid if Path(file).name in ALONE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue('dist') == 'loadfile':
        return ByFile(config, log)


def pytest_collection_finish():
    """torch, pandas and all others stay to the end: the collector need not look at them again, nor
    so often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# --- where the time goes: CPU seconds of a test and of the processes that it waited for, which a
# busy machine does not change ---

BEFORE = pytest.StashKey()
SPENT, TESTS = Counter(), Counter()
# psutil.Process: what tests/forks.py and tests/notebooks.py have started and not waited for
SERVERS = []


def spent():
    "Of this process and those it waited for, and of its servers with all their forks."
    return sum(os.times()[:4]) + sum(sum(s.cpu_times()[:4]) for s in SERVERS if s.is_running())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.stash[BEFORE] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == 'teardown':
        report.user_properties.append(('spent', spent() - item.stash[BEFORE]))
    return report


# --- the campaign: what was broken on purpose in these tests, and what came of it ---

KINDS = (
    'faults injected',
    'survived',
    'results lost',
    'wrong results accepted',
    'bad inputs tried',
    'code executed',
)
TOTAL = Counter()


@pytest.fixture
def campaign(record_property):
    "Counts of one test, by `KINDS`; they are added up over all tests and processes."
    own = Counter()
    yield own
    assert own.keys() <= set(KINDS)
    record_property('campaign', json.dumps(own))


# --- the end ---


def pytest_runtest_logreport(report):
    if report.when != 'teardown':
        return
    said = dict(report.user_properties)
    TOTAL.update(json.loads(said.get('campaign', '{}')))
    file = report.nodeid.partition('::')[0]
    SPENT[file] += said.get('spent', 0.0)
    TESTS[file] += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section('where the time went')
    for file, seconds in SPENT.most_common():
        terminalreporter.line(f'{file:32}{TESTS[file]:6} tests {seconds:8.1f} CPU seconds')
    terminalreporter.line(f'{"in all":32}{TESTS.total():6} tests {SPENT.total():8.1f} CPU seconds')
    if not TOTAL:
        return
    terminalreporter.section('faults on purpose')
    for kind in KINDS:
        terminalreporter.line(f'{kind:24}{TOTAL[kind]:8}')
