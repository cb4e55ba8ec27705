"""The list of faults keeps pace with the code: each can still be put in. That they are noticed:
`make test-mutants`."""

import ast
import json
from itertools import pairwise

import mutants
import pytest

LIST = mutants.read()
CORE = {
    'model.mculora',
    'training.trainer',
    'basics.masking',
    'training.evaluation',
    'experiments.runs',
    'experiments.results',
    'experiments.reports',
}


def test_the_list_covers_the_core():
    modules = {m.module for m in LIST}
    assert len(LIST) >= 200 and modules >= CORE and any(m.startswith('baselines.') for m in modules)
    assert sum(m.review for m in LIST) == 35
    names = [(m.module, m.fault) for m in LIST]
    assert len(set(names)) == len(names)


def pieces(text):
    "The source of each statement of a module, with what stands before it."
    lines, ends = text.splitlines(), [0, *(s.end_lineno for s in ast.parse(text).body)]
    return ['\n'.join(lines[a:b]) for a, b in pairwise(ends)]


def changes(mutant, text, parts):
    "Whether Python reads another module with the fault in it: by the statement that it is in."
    mutant.changed(text, mutant.path)  # stands there once
    part = next((p for p in parts if mutant.old in p), text)
    old, new = (ast.dump(ast.parse(p)) for p in (part, mutant.changed(part, mutant.path)))
    return old != new


@pytest.mark.parametrize('module', sorted({m.module for m in LIST}))
def test_each_fault_can_be_put_into_module_and_notebook(module):
    faults = [m for m in LIST if m.module == module]
    text = (mutants.ROOT / faults[0].path).read_text()
    notebook = (mutants.ROOT / faults[0].notebook).read_text()
    parts = pieces(text)
    for m in faults:
        assert changes(m, text, parts), f'{m.fault}: changes nothing'
        nb = json.loads(notebook)
        assert m.in_cell(nb) != json.loads(notebook)


def test_a_fault_that_changes_nothing_is_noticed():
    text = 'import a\n\n\n@b\ndef f():\n    return 1\n\n\nx = 3\n'
    for old, new, changed in (
        ('return 1', 'return (1)  # one', False),
        ('return 1', 'return 2', True),
        ('@b', '@c', True),
        ('1\n\n\nx', '1\n\nx', False),
        ('1\n\n\nx', '1\n\ny', True),
    ):
        fault = mutants.Mutant(LIST[0].module, 'x', old, new, ())
        assert changes(fault, text, pieces(text)) == changed


def test_a_fragment_that_stands_twice_or_nowhere_is_refused():
    one = LIST[0]
    for old in ('import', 'no such line'):
        with pytest.raises(ValueError, match='expected once'):
            mutants.Mutant(one.module, 'x', old, 'y', ()).module_source(mutants.ROOT)
