"The repository is in order: versions, notebooks, modules and README agree."
import configparser, importlib, json, re, subprocess, sys
from pathlib import Path
import fasterprune

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def test_version_is_the_same_everywhere():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    assert cfg['DEFAULT']['version'] == fasterprune.__version__
    assert f"## {fasterprune.__version__}" in (root/'CHANGELOG.md').read_text()

def test_each_module_has_its_notebook():
    exported = {m[1] for p in notebooks if (m := re.search(r'#\| default_exp (\S+?)[\\"]', p.read_text()))}
    modules = {p.stem for p in (root/'fasterprune').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == exported

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

def test_only_the_rooms_that_may_import_fastai_do():
    code = "import sys; import fasterprune.sparsifier, fasterprune.schedules, fasterprune.storage, fasterprune.shrink, fasterprune.channels, fasterprune.report; print(any(m == 'fastai' or m.startswith(('fastai.', 'nbdev', 'sklearn', 'torch_pruning', 'onnx')) for m in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'
    code = "import sys; import fasterprune.all; print(any(m.startswith(('nbdev', 'fastai.vision', 'torchvision')) for m in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'

def test_every_public_name_says_what_it_is():
    for name in ('schedules', 'criteria', 'granularity', 'channels', 'sparsifier', 'callback', 'report', 'find', 'storage', 'shrink', 'learner', 'experiments'):
        module = importlib.import_module(f'fasterprune.{name}')
        for n in module.__all__:
            o = getattr(module, n)
            if callable(o): assert o.__doc__, f'{name}.{n} has no docstring'
