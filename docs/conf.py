"The companion as HTML (`make html`): Sphinx over a copy of README.md, figures/ and nbs/ beside index.md; nothing is run."
import configparser
import json
import re
from pathlib import Path

settings = configparser.ConfigParser()
settings.read(Path(__file__).parent.parent/'settings.ini')
settings = settings['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
html_title = project
language = 'en'

extensions = ['myst_nb']
exclude_patterns = ['README.md', '**.ipynb_checkpoints', '**/Untitled*']   # README.md is included in index.md
nb_execution_mode = 'off'                     # what is stored in the notebooks is shown
myst_enable_extensions = ['dollarmath']       # $...$ and $$...$$

html_theme = 'furo'
html_copy_source = False                      # the notebooks are in the repository
html_theme_options = {'dark_css_variables': {   # else myst-nb's boxes stay light in the dark theme
    f'mystnb-{part}-{kind}-color': f'var(--color-{colour})' for part in ('source', 'stdout')
    for kind, colour in (('bg', 'code-background'), ('border', 'background-border'))}}


def without_directives(app, docname, text):
    "Drop nbdev's lines `#| ...` and the cells that are nothing else; collapse the cells marked `#| hide`."
    if app.env.doc2path(docname).suffix != '.ipynb': return
    nb = json.loads(text[0])
    for cell in nb['cells']:
        code = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            cell['source'] = re.sub(r'^#\|.*\n?', '', code, flags=re.M)
            if re.search(r'^#\| *hide\b', code, flags=re.M): cell['metadata'].setdefault('tags', []).append('hide-cell')
    nb['cells'] = [c for c in nb['cells'] if c['cell_type'] != 'code' or c['source'].strip()]
    text[0] = json.dumps(nb)


def setup(app):
    app.connect('source-read', without_directives)
