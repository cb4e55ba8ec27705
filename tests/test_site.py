"""The site of `make html`: no equation is left as LaTeX, nothing comes from another host, every
link leads somewhere; and in a browser, with the network off, nothing is wider than the page, code
does not scroll in a window of 1300 pixels, no word in a table is broken, every picture shows, and
the search finds."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from browser import browse, browser

ROOT = Path(__file__).resolve().parent.parent

# built once, which takes a minute
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "As `make html` builds it; the environment is the one that runs the tests."
    to = tmp_path_factory.mktemp('site') / 'html'
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')}
    done = subprocess.run(
        ['make', 'html', f'VENV={sys.prefix}', f'--old-file={sys.prefix}/.stamp', f'SITE={to}'],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return to


class Page(HTMLParser):
    "What a page asks for when it opens, where its links lead, its words, and its anchors."

    def __init__(self, path):
        super().__init__()
        self.asks, self.links, self.words, self.anchors, self.inside = [], [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors.add(a.get('id'))
        if tag == 'a' and 'href' in a:
            self.links.append(a['href'])
        elif tag in ('link', 'image', 'use') and a.get('rel') not in (
            'next',
            'prev',
            'index',
            'search',
        ):
            self.asks.append(a.get('href', ''))
        self.asks += [a['src']] if a.get('src') else []
        if tag in ('pre', 'code', 'script', 'style', 'title'):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, text):
        if not self.inside:
            self.words.append(text)


@pytest.fixture(scope='module')
def pages(site):
    return {p.relative_to(site): Page(p) for p in site.rglob('*.html')}


def test_every_notebook_and_page_is_there(pages):
    for path in [*(ROOT / 'nbs').rglob('*.ipynb'), *(ROOT / 'docs').glob('*.md')]:
        name = path.relative_to(ROOT).with_suffix('.html')
        assert name in pages or path.name == 'index.md' or '.ipynb_checkpoints' in path.parts, name
    parts = {p.parent.name for p in (ROOT / 'nbs').glob('*/*.ipynb')} - {'.ipynb_checkpoints'}
    assert parts == {p.parent.name for p in pages if p.match('nbs/*/index.html')}


def test_no_equation_and_no_table_is_left_as_text(pages):
    raw = re.compile(r'\\\(|\\\[|\$\$|\\[a-z]{3,}\S*|\|:?---')
    left = {str(path): raw.findall(' '.join(page.words)) for path, page in pages.items()}
    assert not {path: found for path, found in left.items() if found}


SIZES = dict.fromkeys(('msup', 'msub', 'mfrac', 'munder', 'mover', 'mroot'), 2) | dict.fromkeys(
    ('msubsup', 'munderover'), 3
)


def test_equations():
    "Of the right form, with their number; what the converter does not know is refused."
    mathml = runpy.run_path(str(ROOT / 'docs' / 'conf.py'))['mathml']
    for latex in (r'\cos^2(x)', r'\frac{\ln x}{2}', r'R^m_{prt^i}', r'\sum_{i\in[D]}\hat y'):
        for e in ElementTree.fromstring(mathml(latex, 'block')[0]).iter():
            assert len(e) == SIZES.get(e.tag.split('}')[1], len(e)), latex
    assert mathml(r'a = b \tag{4a}', 'block')[1] == '4a'
    with pytest.raises(ValueError, match='found .*nothing.*expected known commands'):
        mathml(r'\nothing x', 'inline')


def test_nothing_comes_from_another_host(site, pages):
    asked = {ask for page in pages.values() for ask in page.asks}
    styles = '\n'.join(p.read_text() for p in site.rglob('*.css'))
    asked |= set(re.findall(r'url\([\'"]?([^\'")]+)', styles) + re.findall(r'@import[^;]*', styles))
    assert len(asked) > 10 and not {a for a in asked if urlsplit(a).netloc}


def test_every_link_leads_somewhere(site, pages):
    dead = set()
    for path, page in pages.items():
        for link in {*page.links, *page.asks}:
            to = urlsplit(link)
            if to.scheme or to.netloc or not link:
                continue
            file = (path.parent / unquote(to.path)) if to.path else path
            target = Path(os.path.normpath(file))
            if not (site / target).exists():
                dead.add((str(path), link))
            elif (
                to.fragment
                and target in pages
                and unquote(to.fragment) not in pages[target].anchors
            ):
                dead.add((str(path), link))
    assert not dead


def test_links_to_the_readme_lead_to_the_first_page(pages):
    assert '../index.html#methods' in pages[Path('docs/options.html')].links


def test_a_picture_leads_to_itself_alone(pages):
    "On a phone it is small."
    shown = pages[Path('figures/README.html')]
    pictures = [src for src in shown.asks if src.startswith('../_images/')]
    assert len(pictures) > 20 and set(pictures) <= set(shown.links)


def test_the_api_page_has_every_public_name(site, pages):
    import mculora

    assert {f'mculora.{name}' for name in mculora.__all__} <= pages[Path('api.html')].anchors
    assert 'a release by name' in ' '.join(pages[Path('api.html')].words)  # of a signature


# Opens every page in a frame of every width, one after the other, and tells what is wrong there.
DRIVER = """<!doctype html><meta charset="utf-8"><body><script>
const scrolls = e => { for (; e; e = e.parentElement) {
  if (e.className == 'content') return false  // the page itself
  if (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX)) return true } }
const shown = e => e.getClientRects().length && getComputedStyle(e).position != 'fixed'
const name = e => e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 60)
function look(w, width) {
  const d = w.document, said = []
  if (d.documentElement.scrollWidth > width) said.push('page of ' + d.documentElement.scrollWidth)
  for (const e of d.querySelectorAll('article *'))
    if (shown(e) && e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
      said.push('wide: ' + name(e))
  if (width >= 1300) for (const e of d.querySelectorAll('.cell_input pre'))
    if (e.scrollWidth > e.clientWidth + 1) said.push('code scrolls: ' + name(e))
  // a line may end between words only
  for (const e of d.querySelectorAll('table code'))
    if (e.getClientRects().length > e.textContent.split(/\\W+/).length)
      said.push('word broken: ' + name(e))
  for (const e of d.images) if (!e.naturalWidth) said.push('no picture: ' + e.src)
  for (const e of d.querySelectorAll('pre, code')) e.remove()
  const text = d.querySelector('article').innerText
  for (const m of text.match(/\\\\\\(|\\\\\\[|\\$\\$/g) || []) said.push('raw: ' + m)
  for (const r of w.performance.getEntriesByType('resource'))
    if (!r.name.startsWith(location.origin)) said.push('asks ' + r.name)
  return said
}
const load = (page, width) => new Promise(done => {
  const f = document.createElement('iframe')
  f.style.cssText = `width:${width}px;height:900px;border:0`
  f.onload = () => setTimeout(() => done(f), 50)
  f.src = page
  document.body.append(f)
})
async function all() {
  const said = {}
  for (const page of PAGES) for (const width of WIDTHS) {
    const f = await load(page, width)
    said[page + ' ' + width] = look(f.contentWindow, width)
    f.remove()
  }
  const f = await load('search.html?q=keeping+private+apart', 1300)
  for (let k = 0; k < 100 && !f.contentDocument.querySelector('ul.search li'); k++)
    await new Promise(go => setTimeout(go, 50))
  said.found = [...f.contentDocument.querySelectorAll('ul.search li a')].map(a => a.textContent)
  document.body.textContent = JSON.stringify(said)
}
all().catch(e => document.body.textContent = e.stack)
</script>"""
# equations, results, pictures, tables, the page of a part, long lines of code
OPENED = (
    'index.html',
    'nbs/00_start.html',
    'nbs/model/05_dpft.html',
    'nbs/model/06_mculora.html',
    'nbs/model/index.html',
    'nbs/experiments/table1_fixed.html',
    'nbs/experiments/fig6_dpft.html',
    'nbs/experiments/audit.html',
    'figures/README.html',
    'docs/protocols.html',
    'api.html',
)


@browser
def test_in_a_browser(site, tmp_path):
    driver = DRIVER.replace('PAGES', json.dumps(OPENED)).replace('WIDTHS', '[1300, 390]')
    (site / 'driver.html').write_text(driver)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *said):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        seen = browse(
            f'http://127.0.0.1:{server.server_port}/driver.html',
            tmp_path / 'profile',
            '--window-size=1400,1000',
            '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
            '--virtual-time-budget=600000',
            '--dump-dom',
            timeout=600,
        )
        server.shutdown()
    (site / 'driver.html').unlink()
    said = json.loads(re.search(r'<body>(\{.*\})</body>', seen, re.S)[1])
    found = said.pop('found')
    assert len(said) == 2 * len(OPENED) and not {k: v for k, v in said.items() if v}
    assert any('Keeping private and common apart' in f for f in found), found
