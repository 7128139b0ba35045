"The tables in results/ are those of the rows beside them."
import importlib.util, shutil
from pathlib import Path
from fasterprune.experiments import Results

root = Path(__file__).parent.parent

def test_the_tables_are_made_from_the_rows(tmp_path):
    shutil.copytree(root/'results', tmp_path/'results')
    spec = importlib.util.spec_from_file_location('make_results', tmp_path/'results'/'make.py')
    make = importlib.util.module_from_spec(spec); spec.loader.exec_module(make)
    make.quick(); make.params(); make.paper(); make.others(); make.readme()
    tables = sorted((root/'results').rglob('*.md'))
    assert len(tables) >= 5
    for t in tables: assert t.read_text() == (tmp_path/'results'/t.relative_to(root/'results')).read_text(), t

def test_every_row_was_counted_and_says_how_it_came_about():
    rows = [r for f in (root/'results').rglob('results.jsonl') for r in Results(f.parent).rows()]
    assert len(rows) >= 60
    for r in rows:
        assert abs(r['measured'] - r['sparsity']) < 2e-3 or r['schedule'] == 'dense' and r['measured'] < 1e-3
        assert {'seed', 'lr', 'epochs', 'bs', 'data', 'arch', 'versions', 'device', 'date'} <= r.keys() and '/' not in str(r.get('path', ''))

def test_a_tie_is_told():
    from fasterprune.experiments.summary import paired
    def row(schedule, accuracy): return dict(schedule=schedule, sparsity=.9 if schedule != 'dense' else 0., seed=0, accuracy=accuracy, seconds=1., measured=.9)
    rows = [row('dense', .9), row('agp', .8), row('onecycle', .8), row('oneshot', .7)]
    assert 'onecycle is number 1 of 3 by mean accuracy, a tie.' in str(paired(rows, 'onecycle'))
    assert 'oneshot is number 3 of 3 by mean accuracy.' in str(paired(rows, 'oneshot'))
