"""The companion as HTML (`make html`): Sphinx over a copy of README.md, CHANGELOG.md, figures/ and
nbs/ beside the pages of docs/; nothing is run."""

import configparser
import json
import re
from pathlib import Path

settings = configparser.ConfigParser()
settings.read(Path(__file__).parent.parent / 'settings.ini')
settings = settings['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
html_title = project
language = 'en'

extensions = ['myst_nb']
exclude_patterns = [
    'README.md',  # is included in index.md
    'figures/*-tiny/**',
    '**/.ipynb_checkpoints',
    '**/Untitled*',
]
nb_execution_mode = 'off'  # what is stored in the notebooks is shown
myst_enable_extensions = ['dollarmath']  # $...$ and $$...$$
myst_dmath_double_inline = True  # $$...$$ within a paragraph, too
myst_heading_anchors = 3  # page.md#a-heading

html_theme = 'furo'
html_copy_source = False  # the notebooks are in the repository
# the bar of a collapsed cell
quiet = {
    'color-admonition-title': 'var(--color-background-border)',
    'color-admonition-title-background': 'var(--color-background-secondary)',
}
# else light in the dark theme
boxes = {
    f'mystnb-{part}-{kind}-color': f'var(--color-{colour})'
    for part in ('source', 'stdout')
    for kind, colour in (('bg', 'code-background'), ('border', 'background-border'))
}
html_theme_options = {'light_css_variables': quiet, 'dark_css_variables': quiet | boxes}
# furo's column has room for 95 characters of code; where the window is wide, for 125
WIDE = """<style>@media (min-width: 97em) {
body .content { width: min(60em, 100vw - 37em) }
body .sidebar-drawer { width: calc(50% - 33em) } }</style>"""


def prepare(app, docname, text):
    "Notebooks without nbdev's directives; tables with a title."
    path = app.env.doc2path(docname)
    if path.suffix == '.ipynb':
        text[0] = readable(text[0])
    elif path.parent == app.srcdir:
        link_pages(app, path, docname, text)
    # figures/README.md leads to them; the figure that belongs to a table has its name
    if path.parent.parent.name == 'figures':
        figure = f'![]({path.stem}.svg)' if path.with_suffix('.svg').exists() else ''
        text[0] = f'---\norphan: true\n---\n# {path.stem}\n\n{figure}\n\n{text[0]}'


def readable(text):
    """A notebook without the lines `#| ...` and cells that are nothing else, cells marked `#|
    hide` collapsed."""
    nb = json.loads(text)
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            if re.search(r'^#\| *hide\b', source, flags=re.M):
                cell['metadata'].setdefault('tags', []).append('hide-cell')
            source = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
        else:
            # Sphinx puts math that has a \\ into `split`, where MathJax allows no \tag; \cr means
            # the same
            source = re.sub(
                r'\$\$.+?\$\$', lambda m: m[0].replace(r'\\', r'\cr '), source, flags=re.S
            )
        cell['source'] = source
    nb['cells'] = [c for c in nb['cells'] if c['cell_type'] != 'code' or c['source'].strip()]
    return json.dumps(nb)


def link_pages(app, path, docname, text):
    """README.md and docs/ are one folder here, and README.md is the first page: their links are
    changed accordingly. What they call `nbs/x.ipynb` leads to its page, and a link to a file that
    is not part of the site is words."""

    def is_here(target):
        return '://' in target or (app.srcdir / target.split('#')[0]).exists()

    def moved(link):
        target = link[2].removeprefix('../').removeprefix('docs/')
        target = re.sub(r'^README\.md', 'index.md', target)
        return f'[{link[1]}]({target})' if is_here(target) else link[1]

    def page(name):
        return f'[{name[0]}]({name[1]})' if is_here(name[1]) else name[0]

    said = re.sub(r'\[([^\]\n]*)\]\(([^)\s]+)\)', moved, text[0])
    text[0] = re.sub(r'(?<!\[)`(nbs/[\w/-]+\.ipynb)`', page, said)


def widen(app, pagename, templatename, context, doctree):
    context['metatags'] = context.get('metatags', '') + WIDE


def setup(app):
    app.connect('source-read', prepare)
    app.connect('include-read', link_pages)
    app.connect('html-page-context', widen)
