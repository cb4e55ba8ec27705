"""The list of faults keeps pace with the code: each can still be put in. That they are noticed:
`make test-mutants`."""

import ast
import json

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


@pytest.mark.parametrize('module', sorted({m.module for m in LIST}))
def test_each_fault_can_be_put_into_module_and_notebook(module):
    faults = [m for m in LIST if m.module == module]
    text = (mutants.ROOT / faults[0].path).read_text()
    notebook = (mutants.ROOT / faults[0].notebook).read_text()
    before = ast.dump(ast.parse(text))
    for m in faults:
        assert ast.dump(ast.parse(m.changed(text, m.path))) != before, f'{m.fault}: changes nothing'
        nb = json.loads(notebook)
        assert m.in_cell(nb) != json.loads(notebook)


def test_a_fragment_that_stands_twice_or_nowhere_is_refused():
    one = LIST[0]
    for old in ('import', 'no such line'):
        with pytest.raises(ValueError, match='expected once'):
            mutants.Mutant(one.module, 'x', old, 'y', ()).module_source(mutants.ROOT)
