"""The page, driven in a real browser: a reader takes modalities away, and the page then says what
the model says. Skipped where no browser is installed."""

import re
import subprocess
from html import unescape

import pytest
import torch
from browser import BROWSER, browser

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


def see(folder, html, where='', then='', picture=None):
    "The page as it stands after the script `then`: the browser's own document."
    (folder / 'page.html').write_text(html.replace('</html>', f'<script>{then}</script></html>'))
    how = ['--dump-dom'] if not picture else [f'--screenshot={picture}', '--window-size=1000,860']
    done = subprocess.run(
        [
            BROWSER,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--user-data-dir={folder}/profile',
            *how,
            f'{(folder / "page.html").as_uri()}{where}',
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    states = [
        agrees(see(tmp_path, html, then=pick(n) + ''.join(map(click, off))), ask, off, n)
        for off in ('', 'v', 'vt')
    ]
    for k in range(3):
        assert len({s[k] for s in states}) == 3, (
            'probabilities, private share and neighbours all change'
        )
    # the address leads to the same
    assert agrees(see(tmp_path, html, f'#u={n}&off=v,t'), ask, 'vt', n) == states[2]
    assert (
        agrees(see(tmp_path, html, then=pick(n) + click('v') + click('v')), ask, '', n) == states[0]
    )
    dom = see(tmp_path, html, then=''.join(map(click, 'atv')))
    assert (
        inside(dom, 'what') == 'No modality is available: no prediction.'
        and not inside(dom, 'told').strip()
    )
    lacks = next(i for i, row in enumerate(D.present.tolist()) if sum(row) == 2)
    dom = see(tmp_path, html, then=pick(lacks))
    agrees(dom, ask, '', lacks)
    assert 'it lacks the rest of atv' in inside(dom, 'what')
    assert 'The dialogues are simulated' in dom and 'trained on simulated data' in dom


@browser
def test_names_in_the_data_are_text(ask, tmp_path):
    name = '</script><img src=x onerror="document.title=1">'
    dom = see(
        tmp_path, page(explore(ask, D, where=[dict(dialogue=name, position=j) for j in range(7)]))
    )
    assert '<img' not in dom.split('<script', 1)[0] and name in inside(dom, 'who')


@browser
def test_a_picture_can_be_taken(ask, tmp_path):
    see(tmp_path, page(explore(ask, D)), '#u=1&off=v', picture=tmp_path / 'page.png')
    assert (tmp_path / 'page.png').read_bytes()[:4] == b'\x89PNG' and (
        tmp_path / 'page.png'
    ).stat().st_size > 10_000
