"""The companion as HTML (`make html`): Sphinx over a copy of docs/, figures/, nbs/ and the pages at
the top of the repository, laid out as they are here, so that links lead to the same places; nothing
is run. Two kinds of pages are written on the way: one for each part of nbs/, which lists its
notebooks, and one of what `import mculora` gives.

The site needs no network: equations are MathML, which browsers draw by themselves."""

import configparser
import inspect
import json
import os
import re
from html import escape
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert

import mculora

ROOT = Path(__file__).parent.parent
settings = configparser.ConfigParser()
settings.read(ROOT / 'settings.ini')
settings = settings['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
html_title = project
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.autodoc']
exclude_patterns = [
    'README.md',  # is included in index.md
    'figures/*-tiny/**',
    '**/.ipynb_checkpoints',
    '**/Untitled*',
]
nb_execution_mode = 'off'  # what is stored in the notebooks is shown
nb_render_markdown_format = 'myst'  # with tables and equations
suppress_warnings = ['myst.header']  # a ### below a #
myst_enable_extensions = ['dollarmath']  # $...$ and $$...$$
myst_dmath_double_inline = True  # $$...$$ within a paragraph, too
myst_heading_anchors = 3  # page.md#a-heading
html_math_renderer = 'mathml'
default_role = 'code'  # `x` in a docstring
autodoc_typehints = 'none'  # names and units say it; the types are in the notebook
autodoc_preserve_defaults = True  # as they are written
python_maximum_signature_line_length = 80

html_theme = 'furo'
html_copy_source = False  # the notebooks are in the repository
html_static_path = ['_static']
html_css_files = ['site.css']
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


def prepare(app, docname, text):
    "Notebooks without nbdev's directives; tables with a title; links between pages."
    path = app.env.doc2path(docname)
    if path.suffix == '.ipynb':
        text[0] = readable(text[0], lambda said: linked(app, docname, said))
    else:
        text[0] = unbroken(linked(app, docname, text[0]))
    # figures/README.md leads to them; the figure that belongs to a table has its name
    if path.parent.parent.name == 'figures':
        figure = f'![]({path.stem}.svg)' if path.with_suffix('.svg').exists() else ''
        text[0] = f'---\norphan: true\n---\n# {path.stem}\n\n{figure}\n\n{text[0]}'


def prepare_included(app, path, docname, text):
    text[0] = unbroken(linked(app, docname, text[0]))


def readable(text, edit):
    """A notebook without the lines `#| ...` and cells that are nothing else; cells marked `#|
    hide` are collapsed, of those marked `#| echo: false` the output is left, of those marked `#|
    include: false` nothing. Prose is edited."""
    nb = json.loads(text)
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        tags = cell['metadata'].setdefault('tags', [])
        if cell['cell_type'] == 'code':
            if re.search(r'^#\| *hide\b', source, flags=re.M):
                tags.append('hide-cell')
            if re.search(r'^#\| *echo: *false\b', source, flags=re.M):
                tags.append('remove-input')
            if re.search(r'^#\| *include: *false\b', source, flags=re.M):
                tags.append('remove-cell')
            source = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
            for data in (out.get('data', {}) for out in cell['outputs']):
                if 'text/markdown' in data:
                    data['text/markdown'] = unbroken(''.join(data['text/markdown']))
        else:
            source = edit(source)
        cell['source'] = source
    nb['cells'] = [c for c in nb['cells'] if c['cell_type'] != 'code' or c['source'].strip()]
    return json.dumps(nb)


def unbroken(text):
    "A mean and its interval stay on one line."
    return text.replace(' ± ', '\u00a0±\u00a0')


def linked(app, docname, text):
    """What a page calls `nbs/x.ipynb` or `docs/x.md` leads there, a link to the README to the first
    page, which includes it; a link to a file that is not part of the site is words."""
    folder = app.env.doc2path(docname).parent

    def there(target):
        return '://' in target or target[0] == '#' or (folder / target.split('#')[0]).exists()

    def kept(m):
        to, at, heading = m[2].partition('#')
        if not to:  # Jupyter keeps the capitals of a heading
            return f'[{m[1]}](#{heading.lower()})'
        if (folder / to).resolve() == (app.srcdir / 'README.md').resolve():
            return f'[{m[1]}]({os.path.relpath(app.srcdir / "index.md", folder)}{at}{heading})'
        return m[0] if there(m[2]) else m[1]

    def link(m):
        page = app.srcdir / m[1]
        return f'[{m[0]}]({os.path.relpath(page, folder)})' if page.is_file() else m[0]

    text = re.sub(r'(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)', kept, text)
    return re.sub(r'(?<!\[)`((?:nbs|docs|figures)/[\w/-]+\.(?:ipynb|md))`(?!\])', link, text)


# --- equations ---

MATH = '{http://www.w3.org/1998/Math/MathML}'
ElementTree.register_namespace('', MATH[1:-1])


def mathml(
    latex: str,  # may end in \tag{...}
    display: str,  # inline or block
) -> tuple[str, str]:  # MathML; what the tag says
    "Raises `ValueError` for a command that the converter does not know."
    tag = re.search(r'\\tag\{(.*?)\}', latex)
    drawn = convert(latex.replace(tag[0], '') if tag else latex, display=display)
    if unknown := re.search(r'\\\w+', drawn):
        raise ValueError(f'equation: found {unknown[0]} in {latex!r}, expected known commands')
    return spaced(drawn), tag[1] if tag else ''


def spaced(drawn):
    "A thin space between a function's name and what is not in brackets: ln x, but ln(x)."
    tree = ElementTree.fromstring(drawn)
    for row in tree.iter(MATH + 'mrow'):
        for name, after in pairwise(list(row)):
            if name.tag == MATH + 'mi' and len(name.text) > 1 and after.tag != MATH + 'mo':
                space = ElementTree.Element(MATH + 'mspace', width='0.17em')
                row.insert(list(row).index(after), space)
    return ElementTree.tostring(tree, encoding='unicode')


def inline_math(writer, node):
    writer.body.append(mathml(node.astext(), 'inline')[0])
    raise nodes.SkipNode


def block_math(writer, node):
    drawn, tag = mathml(node.astext(), 'block')
    number = f'<span class="eqno">({escape(tag)})</span>' if tag else ''
    writer.body.append(f'<div class="math">{drawn}{number}</div>')
    raise nodes.SkipNode


def with_big_pictures(app, pagename, templatename, context, doctree):
    "A picture leads to itself alone: on a phone it is small, and there it can be made larger."
    if 'body' in context:
        picture = r'<img\b[^>]*?\bsrc="([^"]+)"[^>]*>'
        context['body'] = re.sub(picture, r'<a href="\1">\g<0></a>', context['body'])


# --- pages that are written on the way ---


def write_pages(app):
    "A page for each part that docs/index.md lists, and the page of the public names."
    index = (app.srcdir / 'index.md').read_text()
    for title, part in re.findall(r'^(.+) <nbs/(\w+)/index>$', index, flags=re.M):
        folder = app.srcdir / 'nbs' / part
        (folder / 'index.md').write_text(part_page(title, sorted(folder.glob('*.ipynb'))))
    (app.srcdir / 'api.md').write_text(api_page(app.srcdir / 'nbs'))


def head(notebook):
    "Title of a notebook, and the sentence below it."
    text = ''.join(json.loads(notebook.read_text())['cells'][0]['source'])
    return re.fullmatch(r'# (.+?)\n+> (.+?)(\n.*)?', text, flags=re.S).groups()[:2]


def part_page(title, notebooks):
    rows = [f'- [{head(n)[0]}]({n.name}): {head(n)[1]}' for n in notebooks]
    tree = ['```{toctree}', ':hidden:', '', *(n.stem for n in notebooks), '```']
    return '\n'.join([f'# {title}', '', *rows, '', *tree, ''])


def api_page(nbs):
    "The public names by part, each with a link to the notebook that defines it."
    text = ['# API: what `import mculora` gives', '']
    parts = {}
    for name, place in mculora._PLACES.items():
        parts.setdefault(place.split('.')[0], []).append((name, place))
    for part, names in parts.items():
        text += [f'## `mculora.{part}`', '']
        for name, place in names:
            (notebook,) = nbs.glob('{}/*_{}.ipynb'.format(*place.split('.')))
            kind = 'class' if inspect.isclass(getattr(mculora, name)) else 'function'
            text += ['```{eval-rst}', f'.. auto{kind}:: mculora.{name}', '```', '']
            text += [f'Defined in [{head(notebook)[0]}]({notebook.relative_to(nbs.parent)}).', '']
    return '\n'.join(text)


def describe_parameters(app, what, name, obj, options, lines):
    "The comments of a signature, as fields."
    found = docments(obj) if inspect.isroutine(obj) else {}
    lines += ['', *(f':param {k}: {v}' for k, v in found.items() if v and k != 'return')]
    if found.get('return'):
        lines += [f':returns: {found["return"]}']


def setup(app):
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
    app.connect('builder-inited', write_pages)
    app.connect('source-read', prepare)
    app.connect('include-read', prepare_included)
    app.connect('html-page-context', with_big_pictures)
    app.connect('autodoc-process-docstring', describe_parameters)
