"The repository is in order: versions, notebooks, modules and README agree."
import ast, configparser, importlib, inspect, json, pydoc, re, statistics, subprocess, sys
from pathlib import Path
import pytest
from fastcore.docments import docments
import fasterprune, fasterprune.all

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
package = root/'fasterprune'
modules = sorted(p for p in package.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
def name_of(path): return '.'.join(path.relative_to(package).with_suffix('').parts)
names = [name_of(p) for p in modules]

def test_version_is_the_same_everywhere():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    assert cfg['DEFAULT']['version'] == fasterprune.__version__
    assert f"## {fasterprune.__version__}" in (root/'CHANGELOG.md').read_text()
    cited,log = (root/'CITATION.cff').read_text(),(root/'CHANGELOG.md').read_text()
    assert f"version: {fasterprune.__version__}" in cited
    date = re.search(rf'^## {re.escape(fasterprune.__version__)}\n\n(\d{{4}}-\d\d-\d\d)', log, re.M)[1]
    assert f'date-released: {date}' in cited

def top_imports(path):
    "Packages that a module imports, wherever in it"
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.Import): yield from (a.name.split('.')[0] for a in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level: yield n.module.split('.')[0]

def test_every_import_is_declared():
    "In the requirements, or in an extra"
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    text = ' '.join(v for k,v in cfg['DEFAULT'].items() if k.endswith('requirements') and k != 'dev_requirements')
    declared = {re.match(r'[\w-]+', r)[0].lower() for r in text.split()}
    called = dict(sklearn='scikit-learn', PIL='pillow', distributed='dask') # where the import has another name than the package
    used = {n for p in modules for n in top_imports(p)} - set(sys.stdlib_module_names) - {'fasterprune', 'wandb'} # who asks for wandb has it
    assert sorted(n for n in used if called.get(n, n).lower() not in declared) == []

def test_each_module_has_its_notebook():
    exported = {m[1] for p in notebooks if (m := re.search(r'#\| default_exp (\S+?)[\\"]', p.read_text()))}
    assert set(names) == exported

def test_notebooks_keep_their_outputs_and_no_path_of_a_machine():
    home = re.compile(r'(/home/|/root/|/Users/|/tmp/|/work/|site-packages)')
    for p in notebooks:
        cells = json.loads(p.read_text())['cells']
        outputs = [o for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
        assert outputs, f'{p.name} has no outputs'
        for o in outputs:
            text = json.dumps({k: v for k,v in o.get('data', {}).items() if not k.startswith('image')}) + str(o.get('text', ''))
            assert not home.search(text), f'{p.name}: {text[:200]}'
            assert o['output_type'] != 'error', p.name

def test_readme_is_made_from_the_index():
    from make_readme import readme
    assert (root/'README.md').read_text() == readme()

def imported(code):
    "Which modules there are after running `code`"
    out = subprocess.run([sys.executable, '-c', f'{code}\nimport sys; print(*sys.modules)'], capture_output=True, text=True, check=True)
    return set(out.stdout.split())

def heavy(loaded, packages): return sorted(m for m in loaded if m.split('.')[0] in packages or m in packages)

on_fastai = {'callback', 'events', 'find', 'keep', 'learner', 'lottery', 'others', 'straight', 'trial', 'all'}

def test_only_the_rooms_that_may_import_fastai_do():
    plain = [n for n in names if n not in on_fastai and not n.startswith('experiments.')]
    assert heavy(imported('import ' + ', '.join(f'fasterprune.{n}' for n in plain)), {'fastai', 'nbdev', 'sklearn', 'torch_pruning', 'onnx'}) == []

def test_the_one_import_brings_no_vision():
    assert heavy(imported('import fasterprune.all'), {'nbdev', 'fastai.vision', 'torchvision'}) == []

@pytest.mark.parametrize('name', names)
def test_every_public_name_says_what_it_is(name):
    module = importlib.import_module(f'fasterprune.{name}')
    for n in module.__all__:
        o = getattr(module, n)
        if callable(o): assert o.__doc__, f'{name}.{n} has no docstring'

@pytest.mark.parametrize('name', [n for n in fasterprune.all.__all__ if inspect.isroutine(getattr(fasterprune.all, n)) or inspect.isclass(getattr(fasterprune.all, n))])
def test_help_shows_the_comment_of_every_parameter(name):
    o = getattr(fasterprune.all, name)
    text = pydoc.plain(pydoc.render_doc(o))
    for arg,comment in docments(o).items():
        if comment and arg not in ('self', 'return'): assert f'{arg}: {" ".join(comment.split())}' in text
    assert '\n' not in str(o.__doc__).strip() or not docments(o) # as it was written

def test_parameters_are_read_when_somebody_asks():
    "The import reads no source, patches of the Learner have their parameters, and the experiments' names too"
    code = """
import inspect, fasterprune.docs as docs
def fail(o): raise AssertionError(o)
read,docs.parameters_text = docs.parameters_text,fail
import fasterprune.all, fasterprune.experiments
from fastai.learner import Learner
compare = fasterprune.experiments.compare
docs.parameters_text = read
for o in (Learner.shrink, Learner.sparsity_find, compare): print('Parameters:' in inspect.getdoc(o))
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['True']*3

# One thought, one place

def exported_cells():
    "Where each exported cell is, and how many lines of code it has"
    for p in notebooks:
        for i,c in enumerate(json.loads(p.read_text())['cells']):
            lines = ''.join(c['source']).splitlines()
            if c['cell_type'] != 'code' or not any(re.match(r'#\| *exports?i?\s*$', l) for l in lines): continue
            yield f'{p.name}, cell {i}', sum(1 for l in lines if l.strip() and not l.startswith('#|'))

def test_exported_cells_are_short():
    lengths = dict(exported_cells())
    assert {where: n for where,n in lengths.items() if n > 40} == {}
    assert statistics.median(lengths.values()) <= 10

@pytest.mark.parametrize('path', modules, ids=names)
def test_modules_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert [i+1 for i,l in enumerate(lines) if len(l) > 140] == []

def imports(path):
    "Names that a module imports from others of this package"
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    return [a for n in nodes if n.level or (n.module or '').startswith('fasterprune') for a in n.names]

@pytest.mark.parametrize('path', modules, ids=names)
def test_what_is_private_stays_at_home(path):
    assert [a.name for a in imports(path) if a.name.startswith('_')] == []

def test_all_exports_what_it_lists():
    listed = {a.asname or a.name for a in imports(package/'all.py')}
    assert set(fasterprune.all.__all__) == listed
    assert not any(n.startswith('_') or n in names for n in listed - {'shrink'})
