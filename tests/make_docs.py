"""The site: every notebook as a page on which exported code is folded away under what it documents, and a list of all public names.

    python tests/make_docs.py   # writes _docs, and from it the site, if mkdocs-material is installed: pip install mkdocs-material"""
import ast, base64, importlib, inspect, json, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
from fastcore.docments import docments
import fasterprune

root = Path(__file__).parent.parent
docs = root/'_docs'
home = 'https://github.com/fasterprune/fasterprune/blob/main'
flag = re.compile(r'^#\| *(\w+) *(.*)\n?', re.M)

# What a public name documents

def type_name(a):
    "An annotation, as short as in the code"
    if a is inspect.Parameter.empty: return ''
    return a if isinstance(a, str) else getattr(a, '__name__', str(a))

def value_name(v):
    "A default, as it is written in the code"
    if v is inspect.Parameter.empty: return ''
    return v.__name__ if callable(v) and hasattr(v, '__name__') else repr(v)

def parameters(o):
    "As `inspect` finds them; none for a built-in"
    try: return inspect.signature(o).parameters
    except (TypeError, ValueError): return {}

def described(o):
    "Name, type, default and details of each parameter, and of what is returned if that is documented"
    found,written = docments(o, full=True),parameters(o)
    def anno(n, d): return '' if n in written and written[n].annotation is inspect.Parameter.empty else type_name(d.anno)
    rows = [(n, anno(n, d), value_name(d.default), d.docment or '') for n,d in found.items()]
    return [r for r in rows if r[0] not in ('self', 'cls') and (r[0] != 'return' or r[3])]

def in_cell(text):
    "Text in a cell of a table; a bar separates cells, unless it is code"
    parts = text.replace('\n', ' ').split('`')
    return '`'.join(p if i % 2 else p.replace('|', r'\|') for i,p in enumerate(parts))

def as_code(text): return f'`{text}`' if text else ''

def table(rows):
    "A Markdown table of parameters"
    if not rows: return ''
    lines = [f"| {as_code(n) if n != 'return' else '**returns**'} | {as_code(t)} | {as_code(d)} | {in_cell(text)} |" for n,t,d,text in rows]
    return '\n'.join(['| parameter | type | default | details |', '|---|---|---|---|', *lines])

def signature(name, o):
    "One line; the types are in the table"
    given = [p for p in parameters(o).values() if p.name not in ('self', 'cls')]
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    def one(p): return stars.get(p.kind, '') + p.name + (f'={value_name(p.default)}' if value_name(p.default) else '')
    return f"{name}({', '.join(map(one, given))})"

def docstring(o):
    "As it was written, without the parameters that `help` adds"
    return inspect.cleandoc(str(o.__doc__ or ''))

def first_line(o): return docstring(o).split('\n')[0]

def source_link(o):
    code = inspect.unwrap(o.fget if isinstance(o, property) else getattr(o, '__func__', o))
    file = Path(inspect.getsourcefile(code)).relative_to(Path(fasterprune.__file__).parent.parent)
    return f'{home}/{file}#L{inspect.getsourcelines(code)[1]}'

def card(name, o):
    "Everything about one name"
    is_call = not isinstance(o, property)
    parts = ['<div class="doc" markdown>', f'#### `{name}` {{ #{name} }}', f'```{{.python .signature}}\n{signature(name, o)}\n```' if is_call else '',
             docstring(o), table(described(o)) if is_call else '', f'[source]({source_link(o)})', '</div>']
    return '\n\n'.join(filter(None, parts))

# The public names that a cell defines

def patched_class(node):
    "Which class a `@patch` function goes to"
    if not any(getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) == 'patch' for d in node.decorator_list): return None
    a = node.args.args[0].annotation
    return (a.elts[0] if isinstance(a, (ast.Tuple, ast.List)) else a).id

def methods(cls, node):
    for n in node.body:
        if not isinstance(n, ast.FunctionDef) or n.name.startswith('_') or not ast.get_docstring(n): continue
        yield f'{cls.__name__}.{n.name}', inspect.getattr_static(cls, n.name)

def named(source, module):
    "Public functions, classes and methods that a cell exports"
    for n in ast.parse(source).body:
        if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith('_'): continue
        cls = isinstance(n, ast.FunctionDef) and patched_class(n)
        if cls: yield f'{cls}.{n.name}', inspect.getattr_static(getattr(module, cls), n.name)
        elif n.name in module.__all__:
            o = getattr(module, n.name)
            yield n.name, o
            if isinstance(n, ast.ClassDef): yield from methods(o, n)

# Cells

def folded(source, title):
    code = '\n'.join('    '+l for l in source.strip('\n').splitlines())
    return f'??? quote "{title}"\n\n    ```python\n{code}\n    ```'

def exported(source):
    "Imports alone are left out"
    return '' if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body) else folded(source, 'Source')

def visible(source):
    "What the reader types; long helpers are folded"
    return f'```python\n{source}\n```' if source.count('\n') < 20 else folded(source, 'Code')

def alt_text(text):
    "What a picture shows: the first sentence of the paragraph above it"
    prose = re.sub(r'\]\([^)]*\)|[#*`\[\]"]', '', text.strip().split('\n\n')[-1]).replace('\n', ' ')
    return re.split(r'(?<=[.:])\s', prose.strip())[0].rstrip(':') or 'Plot'

def shown(output, to, alt):
    "One output of a cell"
    data = {k: ''.join(v) for k,v in output.get('data', {}).items()}
    if 'image/png' in data:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(base64.b64decode(data['image/png']))
        return f'![{alt}]({to.name})'
    html = re.sub(r'<style.*?</style>', '', data.get('text/html', ''), flags=re.S).strip()
    if re.sub(r'<[^>]*>', '', html).strip(): return f'<div class="output">\n{html}\n</div>'
    if 'text/markdown' in data: return data['text/markdown']
    text = ''.join(output.get('text', '')) or data.get('text/plain', '')
    if not text.strip() or 'text/html' in data: return ''
    prose = ' .prose' if max(map(len, text.splitlines())) > 110 else ''
    return f'```{{.text .output{prose}}}\n{text.rstrip()}\n```'

def code_cell(cell, page, module, i, alt):
    source = ''.join(cell['source'])
    flags,source = {m[1] for m in flag.finditer(source)},flag.sub('', source).strip('\n')
    if flags & {'hide', 'default_exp'}: return []
    if flags & {'export', 'exports', 'exporti'}: return [*(card(*e) for e in named(source, module)), exported(source)]
    outputs = [shown(o, page.with_name(f'{page.stem}_{i}_{j}.png'), alt) for j,o in enumerate(cell['outputs'])]
    return [visible(source), *outputs]

def on_the_site(text, path):
    "Links to notebooks become links to pages, and links out of the notebooks' folder lead to the repository"
    def link(m):
        url,anchor = m[1],m[2] or ''
        to = (path.parent/url).resolve()
        if to.is_relative_to(root/'nbs'): return f"]({re.sub(r'[.]ipynb$', '.md', url)}{anchor})"
        if to == root/'CHANGELOG.md': return f"]({'../'*(len(path.relative_to(root/'nbs').parts)-1)}changelog.md{anchor})"
        return f']({home}/{to.relative_to(root)}{anchor})'
    return re.sub(r'\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)', link, text)

def module_of(cells):
    name = [m[2].strip() for c in cells for m in flag.finditer(''.join(c['source'])) if m[1] == 'default_exp']
    return importlib.import_module(f'fasterprune.{name[0]}') if name else None

def page(path):
    "A notebook as Markdown; its pictures are written beside it"
    cells = json.loads(path.read_text())['cells']
    module,to,parts,alt = module_of(cells),docs/path.relative_to(root/'nbs').with_suffix('.md'),[],''
    for i,c in enumerate(cells):
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown': parts.append(on_the_site(text, path))
        elif c['cell_type'] == 'code': parts += code_cell(c, to, module, i, alt)
        if c['cell_type'] == 'markdown': alt = alt_text(text)
    return to, '\n\n'.join(p for p in parts if p)+'\n'

# The whole

def notebooks(): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def entries(path):
    "All that a notebook documents"
    cells = json.loads(path.read_text())['cells']
    module = module_of(cells)
    for c in cells if module else []:
        source = ''.join(c['source'])
        if c['cell_type'] == 'code' and re.search(r'^#\| *exports?i?\b', source, re.M): yield from named(flag.sub('', source), module)

def title(path): return re.search(r'^# (.+)$', page_text(path), re.M)[1]
def page_text(path): return '\n\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')

def reference():
    "Every public name, room by room, with a link to its place"
    parts = ['# Reference', f'Every public function, class and method of fasterprune {fasterprune.__version__}, with a link to its signature, '
             'its parameters and the page that explains it. `from fasterprune.all import *` brings the names that users need.']
    for path in notebooks():
        at = path.relative_to(root/'nbs').with_suffix('.md')
        rows = [f'| [`{n}`]({at}#{n}) | {in_cell(first_line(o))} |' for n,o in entries(path)]
        if rows: parts += [f'## {title(path)}', '<div class="names" markdown>', '| name | what it does |\n|---|---|\n' + '\n'.join(rows), '</div>']
    return '\n\n'.join(parts)+'\n'

def api_list():
    "The same as plain text, for programs that read"
    parts = [f'# API of fasterprune {fasterprune.__version__}']
    for path in notebooks():
        lines = [f'- `{n if isinstance(o, property) else signature(n, o)}`: {first_line(o)}' for n,o in entries(path)]
        if lines: parts += [f'## {title(path)}', '\n'.join(lines)]
    return '\n\n'.join(parts)+'\n'

def write(to, text):
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text)

def make_docs():
    shutil.rmtree(docs, ignore_errors=True)
    for p in notebooks(): write(*page(p))
    shutil.copytree(root/'nbs/images', docs/'images')
    shutil.copy(root/'nbs/llms.txt', docs)
    shutil.copy(root/'nbs/site.css', docs)
    write(docs/'reference.md', reference())
    write(docs/'apilist.txt', api_list())
    write(docs/'changelog.md', re.sub(r'\]\(nbs/([\w/]+)\.ipynb\)', r'](\1.md)', (root/'CHANGELOG.md').read_text()))

def make_site(to='site'):
    "A warning, of a dead link or anchor for instance, is an error"
    make_docs()
    subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(to)], cwd=root, check=True)

if __name__ == '__main__': make_site() if find_spec('mkdocs') else make_docs()
