"""The page of all results, as `mculora results explore` writes it, in a browser without a network:
its numbers are those of the tables, its choices say what they show, and it can be read on a phone,
with a keyboard and with a screen reader."""

import json
import re
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from browser import browse, browser
from typer.testing import CliRunner

from mculora.use.cli import app

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / 'figures'

# the whole store is read once, which takes a minute
pytestmark = [pytest.mark.slow, browser]


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The page of the committed results."
    to = tmp_path_factory.mktemp('page') / 'results.html'
    said = CliRunner().invoke(app, ['results', 'explore', '--out', str(to)])
    assert said.exit_code == 0, said.output
    return to


# What a reader does, one step after the other; after each, what the page then shows.
DRIVER = """<script type="module">
const seen = [], $ = id => document.getElementById(id);
const cells = id => [...$(id).querySelectorAll('tbody tr')].map(
  tr => [...tr.children].map(c => c.textContent));
const pick = (id, words) => {
  const o = [...$(id).options].find(o => o.textContent.startsWith(words));
  $(id).value = o.value;
  $(id).dispatchEvent(new Event('change'));
};
const ready = () => new Promise(go => setTimeout(go, 300));
async function look() {
  await ready();
  seen.push({
    address: location.hash, said: $('said').textContent, difference: $('difference').textContent,
    heads: [...$('table').querySelectorAll('thead th')].map(x => x.textContent),
    table: cells('table'), caption: $('table').caption.textContent,
    folds: cells('folds'), front: $('cost-said').textContent,
    rates: $('rates').hidden ? '' : $('rates-said').textContent, speakers: cells('speakers'),
    records: cells('records'), links: [...$('records').querySelectorAll('a')].map(a => a.href),
    warned: ['simulated', 'test'].filter(id => !$(id).hidden),
    charts: [...document.querySelectorAll('.chart svg')].map(
      s => s.closest('[aria-label]')?.getAttribute('aria-label')),
    marks: document.querySelectorAll('#cost-chart svg [aria-roledescription=point]').length,
    width: document.documentElement.scrollWidth, window: innerWidth,
    asked: performance.getEntriesByType('resource').map(r => r.name),
    nameless: [...document.querySelectorAll('select, button')].filter(
      e => !e.labels?.length && !e.textContent.trim()).map(e => e.outerHTML),
    headless: [...document.querySelectorAll('th')].filter(e => !e.scope).length,
    captions: [...document.querySelectorAll('table')].filter(t => !t.caption).length,
    live: [...document.querySelectorAll('[aria-live=polite]')].map(e => e.id),
    focus: document.activeElement.textContent,
  });
}
STEPS
document.body.textContent = JSON.stringify(seen);
</script>"""


def see(page, folder, steps, where='', *options):
    "What the page shows after each `await look()` of the steps."
    body, _, end = page.read_text().rpartition('</body>')  # Vega's code has one, too
    (folder / 'page.html').write_text(body + DRIVER.replace('STEPS', steps) + end)
    address = (folder / 'page.html').as_uri() + where
    offline = ('--host-resolver-rules=MAP * ~NOTFOUND', '--virtual-time-budget=60000', '--dump-dom')
    dom = browse(address, folder / 'profile', *offline, *options, timeout=300)
    return json.loads(unescape(re.search(r'<body>(\[.*\])</body>', dom, re.S)[1]))


def printed(data, table, title):
    "Row -> the cells of a committed table, as printed."
    text = (FIGURES / data / f'{table}-{data}.md').read_text()
    lines = text.split(f'**{title}')[1].split('\n\n')[1].splitlines()
    rows = [[x.strip().strip('*') for x in line.strip('|').split('|')] for line in lines]
    return {r[0]: r[1:] for r in rows[2:]}


def test_numbers_are_those_of_the_tables(page, tmp_path):
    "Tables 1 and 3 of IEMOCAP, all rows and columns, and a difference of Table 1 on more seeds."
    steps = """await look();
pick('protocol', 'random'); await look();
pick('protocol', 'fixed'); pick('set', 'folds 1 to 4; seeds 66 to 70'); await look();
pick('other', 'gcnet'); await look();
pick('other', 'mculora-plus'); await look()"""
    fixed, random, more, gcnet, plus = see(page, tmp_path, steps)
    for view, table, title in (
        (fixed, 'table1_fixed', 'Table 1, WA (%), fixed'),
        (random, 'table3_random', 'Table 3, WA (%), random'),
    ):
        wanted = printed('iemocap', table, title)
        shown = {r[0].replace(' (mculora-plus)', ''): r[1:-2] for r in view['table']}
        assert {k: shown[k] for k in wanted} == wanted and len(wanted) > 20
    cells = pd.read_csv(FIGURES / 'iemocap' / 'table1_fixed-iemocap.csv')
    lead = cells[cells.table.str.startswith('Table 1, WA: mculora minus each of the others')]
    lead = lead[lead.column == 'incomplete'].set_index('method')
    for view, other in ((more, 'momke'), (gcnet, 'gcnet'), (plus, 'mculora-plus')):
        wanted = f'{lead["mean"][other]:.2f} ± {lead.half[other]:.2f} points'
        assert wanted in view['difference'] and len(view['folds']) == 4
    assert 'Fixed in advance (ahead of MoMKE)' in more['difference']
    assert 'Fixed in advance (ahead of GCNet)' in gcnet['difference']
    assert 'Exploratory' in plus['difference']


def test_choices_say_what_they_show(page, tmp_path):
    """Simulated data, and epochs chosen on test, say so in words, in captions and in columns; a
    choice narrows the rows; a row leads to its records; the front is drawn; the address leads
    back."""
    steps = """pick('reads', 'utterance'); await look();
pick('data', 'SIMULATED: simulated twin of IEMOCAP'); pick('selection', 'test'); await look();
pick('data', 'IEMOCAP'); pick('selection', 'validation'); pick('set', 'folds 1; seeds 66');
pick('one', 'euar, biased gates, lr 0.0001'); await look()"""
    reads, twin, people = see(page, tmp_path, steps)
    assert {r[-2] for r in reads['table']} == {'utterance'} and not reads['warned']
    assert twin['warned'] == ['simulated', 'test'] and 'simulated' in twin['caption']
    assert 'chosen on test' in twin['caption'] and all('test' in h for h in twin['heads'][1:-2])
    assert 'simulated' in twin['difference'] and 'simulated' in twin['front']
    assert 'simulated' in twin['charts'][0] and not twin['rates']
    assert {tuple(s[1:4]) for s in people['speakers'] if 'euar' in s[0]} == {
        ('1', '0', '1'),
        ('1', '1', '1'),
    }
    address = people['records'][0][3]
    assert address.startswith('results/iemocap/euar/') and people['links'][0].endswith(
        'results/iemocap/euar.runs.jsonl'
    )
    assert people['records'][0][4] == f'mculora rerun {address}'
    assert len(people['charts']) == 3 and all(people['charts'])
    assert people['marks'] == len(people['table']) > 5
    (back,) = see(page, tmp_path, 'await look()', people['address'])
    assert {k: back[k] for k in ('table', 'difference', 'records')} == {
        k: people[k] for k in ('table', 'difference', 'records')
    }


def test_phone_keyboard_and_screen_reader(page, tmp_path):
    """Nothing is wider than a window of 390 pixels; every control and table has a name; a change is
    said; sorting keeps the focus; and the page asks for nothing."""
    steps = """await look();
const b = [...document.querySelectorAll('#table th button')].find(b => b.textContent === 'tv');
b.focus(); b.click(); await look()"""
    first, then = see(page, tmp_path, steps, '', '--window-size=390,800')
    assert first['width'] <= first['window']
    for key in ('nameless', 'headless', 'captions'):
        assert not first[key], key
    assert not [a for a in first['asked'] if not a.startswith('file:')]
    assert first['live'] == ['said', 'difference'] and 'sorted by tv' in then['said']
    assert then['focus'] == 'tv'
    column = [float(r[then['heads'].index('tv')].split()[0]) for r in then['table']]
    assert column == sorted(column, reverse=True)


def test_size(page):
    assert page.stat().st_size < 3_000_000
