"""The page, driven in a real browser: a reader takes modalities away, and the page then says what
the model says. Skipped where no browser is installed."""

import json
import re
from html import unescape

import pytest
import torch
from browser import browse, browser

from mculora.use.artefact import Artefact
from mculora.training.calibration import Calibration
from mculora.basics.dialogues import random_dialogues
from mculora.use.explorer import explore, page
from mculora.basics.masking import drop
from mculora.basics.method import create
from mculora.basics.modalities import labels
from mculora.use.prediction import Predictor

D = random_dialogues((4, 3), {'a': 4, 't': 6, 'v': 5}, missing=0.2, seed=3)


@pytest.fixture(scope='module')
def ask():
    torch.manual_seed(0)
    m = create('mculora', D.task, D.widths, dict(width=16, depth=1)).eval().requires_grad_(False)
    for p in m.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    return Predictor(Artefact(m, {}, Calibration(dict.fromkeys(labels(D.modalities), 1.0))))


def see(folder, html, *steps, where='', picture=None):
    "The page after each of these scripts, and at the end: the browser's own documents."
    look = "document.documentElement.dataset.seen += JSON.stringify(document.body.outerHTML) + ',';"
    then = "document.documentElement.dataset.seen = '';" + ''.join(x + look for x in steps)
    (folder / 'page.html').write_text(html.replace('</html>', f'<script>{then}</script></html>'))
    how = ['--dump-dom'] if not picture else [f'--screenshot={picture}', '--window-size=1000,860']
    dom = browse(f'{(folder / "page.html").as_uri()}{where}', folder / 'profile', *how)
    seen = re.search(' data-seen="([^"]*)"', dom)
    return [*(json.loads(f'[{unescape(seen[1])}null]')[:-1] if seen else ()), dom]


def inside(dom, name):
    return unescape(
        re.sub(
            '<[^>]*>',
            ' ',
            re.search(rf'<(\w+) id="{name}"[^>]*>(.*?)</\1>\s*(?:<h2|<p|</section|$)', dom, re.S)[
                2
            ],
        )
    )


def expected(ask, off, n):
    keeps = torch.tensor([m not in off for m in D.modalities])
    return ask.predict(drop(D, keeps.expand(len(D.utterances), -1)))[n]


def agrees(dom, ask, off, n):
    p = expected(ask, off, n)
    assert f'From {p.combination}' in inside(dom, 'what') and inside(dom, 'what').endswith(
        f': {p.label}'
    )
    found = [float(x) for x in re.findall(r'([\d.]+) %', inside(dom, 'told'))]
    assert found == pytest.approx([100 * q for q in p.probability.values()], abs=0.06)
    assert float(re.search(r'([\d.]+) %', inside(dom, 'private'))[1]) == pytest.approx(
        100 * p.private, abs=0.06
    )
    return inside(dom, 'told'), inside(dom, 'private'), inside(dom, 'near')


@browser
def test_taking_modalities_away_changes_what_the_page_says_to_what_the_model_says(ask, tmp_path):
    html = page(explore(ask, D))

    def click(m):
        return f"document.querySelector('[data-modality={m}]').click();"

    def pick(n):
        return f"document.getElementById('list').children[{n}].click();"

    n = next(i for i, row in enumerate(D.present.all(-1).tolist()) if row)
    lacks = next(i for i, row in enumerate(D.present.tolist()) if sum(row) == 2)
    steps = pick(n), click('v'), click('t'), click('v') + click('t')
    *seen, again, nothing, lacking, _ = see(
        tmp_path, html, *steps, ''.join(map(click, 'atv')), ''.join(map(click, 'atv')) + pick(lacks)
    )
    states = [agrees(dom, ask, off, n) for dom, off in zip(seen, ('', 'v', 'vt'))]
    for k in range(3):
        assert len({s[k] for s in states}) == 3, (
            'probabilities, private share and neighbours all change'
        )
    # put back, they change it back
    assert agrees(again, ask, '', n) == states[0]
    assert inside(nothing, 'what') == 'No modality is available: no prediction.'
    assert not inside(nothing, 'told').strip()
    agrees(lacking, ask, '', lacks)
    assert 'it lacks the rest of atv' in inside(lacking, 'what')
    # the address leads to the same
    (dom,) = see(tmp_path, html, where=f'#u={n}&off=v,t')
    assert agrees(dom, ask, 'vt', n) == states[2]
    assert 'The dialogues are simulated' in dom and 'trained on simulated data' in dom


@browser
def test_names_in_the_data_are_text(ask, tmp_path):
    name = '</script><img src=x onerror="document.title=1">'
    (dom,) = see(
        tmp_path, page(explore(ask, D, where=[dict(dialogue=name, position=j) for j in range(7)]))
    )
    assert '<img' not in dom.split('<script', 1)[0] and name in inside(dom, 'who')


@browser
def test_a_picture_can_be_taken(ask, tmp_path):
    picture = tmp_path / 'page.png'
    see(tmp_path, page(explore(ask, D)), where='#u=1&off=v', picture=picture)
    assert picture.read_bytes()[:4] == b'\x89PNG' and picture.stat().st_size > 10_000
