"""The picture of the model: the files that are committed, the outputs of the notebooks that show
it, and its layout, which a browser measures.

`python tests/test_picture.py` writes figures/model.svg and, with a browser, figures/model.png."""

import json
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from browser import BROWSER, browse, browser

from mculora.model.picture import HEIGHT, PARTS, SANS, SERIF, WIDTH, draw

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / 'figures' / 'model.svg'


def test_the_committed_picture_is_what_the_code_draws():
    assert FILE.read_text() == draw() + '\n', 'python tests/test_picture.py writes it'


SHOWN = {
    f'nbs/model/{k:02}_{name}.ipynb': name
    for k, name in enumerate(('encoders', 'mcla', 'orthogonality', 'fusion', 'losses', 'dpft'))
} | dict.fromkeys(
    ('nbs/00_start.ipynb', 'nbs/model/06_mculora.ipynb', 'nbs/model/07_picture.ipynb')
)


@pytest.mark.parametrize('notebook, part', SHOWN.items())
def test_a_notebook_shows_its_part(notebook, part):
    "What is stored in it is what the code draws today."
    outputs = [
        ''.join(out['data']['image/svg+xml'])
        for cell in json.loads((ROOT / notebook).read_text())['cells']
        for out in cell.get('outputs', [])
        if 'image/svg+xml' in out.get('data', {})
    ]
    assert [ElementTree.canonicalize(o) for o in outputs] == [ElementTree.canonicalize(draw(part))]


def test_every_part_is_shown():
    assert set(PARTS) == set(filter(None, SHOWN.values()))


def see(folder, page, *how):
    "What Chromium says of a page."
    (folder / 'page.html').write_text(f'<!doctype html><meta charset="utf-8">{page}')
    address = (folder / 'page.html').as_uri()
    return browse(address, folder / 'profile', '--hide-scrollbars', *how)


# Boxes [left, top, right, bottom] of all words, of all rectangles and of everything else.
MEASURE = """<script>
const at = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] }
const all = name => [...document.querySelectorAll(name)].map(at)
const named = [...document.querySelectorAll('text')].map(e => [e.textContent, at(e)])
// each straight piece of a line by itself
const pieces = [...document.querySelectorAll('path')].flatMap(e => {
  const p = e.getAttribute('d').slice(1).split('L').map(s => s.split(' ').map(Number))
  return p.slice(1).map((q, k) => [0, 1].map(i => Math.min(p[k][i], q[i]) - 1)
    .concat([0, 1].map(i => Math.max(p[k][i], q[i]) + 1)))
})
document.body.textContent = JSON.stringify(
  {words: named, boxes: all('rect'), lines: [...pieces, ...all('polygon'), ...all('circle')]})
</script>"""


def meet(a, b):
    "Do two boxes overlap, by more than a pixel in both directions?"
    return all(min(a[k + 2], b[k + 2]) - max(a[k], b[k]) > 1 for k in (0, 1))


def within(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@browser
@pytest.mark.parametrize('sans, serif', [(SANS, SERIF), ('DejaVu Sans', 'DejaVu Serif')])
def test_words_touch_nothing(sans, serif, tmp_path):
    "Neither each other nor a line; they are in a box or beside it. In wide fonts, too."
    picture = draw().replace(SANS, sans).replace(SERIF, serif)
    page = f'<body style="margin:0"><div style="width:{WIDTH}px">{picture}</div>{MEASURE}'
    seen = json.loads(
        see(tmp_path, page, '--dump-dom').split('<body style="margin:0">')[1].split('</body>')[0]
    )
    assert len(seen['words']) > 50 and len(seen['boxes']) > 40 and len(seen['lines']) > 40
    words = seen['words']
    assert not [(a, b) for k, (a, at) in enumerate(words) for b, to in words[:k] if meet(at, to)]
    assert not [a for a, at in words for line in seen['lines'] if meet(at, line)]
    assert not [a for a, at in words for b in seen['boxes'] if meet(at, b) and not within(at, b)]


def photograph(folder, to):
    see(
        folder,
        f'<body style="margin:0">{draw()}',
        '--force-device-scale-factor=1.5',
        f'--window-size={WIDTH},{HEIGHT}',
        f'--screenshot={to}',
    )
    # 256 colours are enough, and half the size
    Image.open(to).convert('RGB').quantize(256).save(to, optimize=True)


@browser
def test_the_committed_png_is_the_picture(tmp_path):
    "But for the fonts of the machine."
    import matplotlib.image  # half a second, for this test alone

    photograph(tmp_path, tmp_path / 'model.png')
    here, there = (
        matplotlib.image.imread(p)[..., :3]
        for p in (tmp_path / 'model.png', FILE.with_suffix('.png'))
    )
    assert here.shape == there.shape == (1.5 * HEIGHT, 1.5 * WIDTH, 3)
    assert abs(here - there).mean() < 0.03


if __name__ == '__main__':
    FILE.write_text(draw() + '\n')
    if BROWSER:
        with tempfile.TemporaryDirectory() as folder:
            photograph(Path(folder), FILE.with_suffix('.png'))
