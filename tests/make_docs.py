"""_docs: the notebooks for the site, code that is exported folded away, and a reference of every name of `fasterprune.all`.

    python tests/make_docs.py && mkdocs build"""
import inspect, json, re, shutil
from datetime import date
from pathlib import Path
from nbdev.showdoc import DocmentTbl
import fasterprune, fasterprune.all

root = Path(__file__).parent.parent
site = root/'_docs'

def rooms():
    "From room to the users' names in it, in the order of `fasterprune.all`"
    res = {}
    for name in fasterprune.all.__all__:
        o = getattr(fasterprune.all, name)
        home = getattr(o, '__module__', '') or ''
        if callable(o) and home.startswith('fasterprune.'): res.setdefault(home.removeprefix('fasterprune.'), []).append((name, o))
    return res

def parameters(o):
    "A table of parameters in Markdown; nothing where there are none"
    try: return DocmentTbl(o)._repr_markdown_() or ''
    except (TypeError, ValueError): return ''

def signature(name, o):
    "One line, without the annotations, which are in the table"
    try: sig = inspect.signature(o)
    except (TypeError, ValueError): return name
    bare = [p.replace(annotation=p.empty) for p in sig.parameters.values()]
    return name + re.sub(r'<function (\w+) at [^>]+>', r'\1', str(sig.replace(parameters=bare, return_annotation=sig.empty))).replace("<class 'torch.nn.modules.conv.Conv2d'>", 'nn.Conv2d')

def entry(name, o): return f'### {name}\n\n```python\n{signature(name, o)}\n```\n\n{inspect.getdoc(o) or ""}\n\n{parameters(o)}\n'

def reference() -> str:
    "The page"
    head = f'# Reference\n\nVersion {fasterprune.__version__}, {date.today()}; made from the code by `python tests/make_docs.py`.\n'
    text = '\n'.join([head, *(f'## {room}\n\n' + '\n'.join(entry(*e) for e in entries) for room,entries in sorted(rooms().items()))])
    return re.sub(r'<function (\w+) at [^>]+>', r'\1', text)

def tag(cell):
    "Tags by which mkdocs-jupyter leaves out code: what is exported, and what nbdev hides"
    source = ''.join(cell['source'])
    if re.search(r'^#\| *(exports?i?|default_exp)\b', source, re.M): return ['no_input']
    return ['no_cell'] if re.search(r'^#\| *hide\b', source, re.M) else []

def copy_notebook(path):
    nb = json.loads(path.read_text())
    for c in nb['cells']: c.setdefault('metadata', {})['tags'] = tag(c)
    to = site/path.relative_to(root/'nbs')
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(nb))

def notebooks(): return [p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]

if __name__ == '__main__':
    shutil.rmtree(site, ignore_errors=True)
    for p in notebooks(): copy_notebook(p)
    shutil.copytree(root/'nbs/images', site/'images')
    shutil.copy(root/'nbs/llms.txt', site)
    (site/'reference.md').write_text(reference())
