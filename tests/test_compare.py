"The comparison command: resumes, survives kills and concurrent commands, says clearly what is wrong."
import json, os, random, signal, subprocess, sys, time
import pytest
from fasterprune.experiments import data as data_room, study
from fasterprune.experiments.cli import fasterprune_compare
from fasterprune.experiments.data import KnownSet, load_data
from fasterprune.experiments.keys import run_key
from fasterprune.experiments.results import Results

command = [sys.executable, '-c', 'from fasterprune.experiments.cli import compare_main; compare_main()']
small = ['--schedules', 'oneshot,onecycle', '--epochs', '1', '--seeds', '2', '--device', 'cpu']
n_runs = 2*3
timing = ('seconds', 'date', 'threads')

def listen_to_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL) # what a shell starts in the background is deaf to it
def start(out, *args): return subprocess.Popen([*command, *small, '--out', out, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_ctrl_c)
def run(out, *args):
    p = start(out, *args)
    text,err = p.communicate(timeout=300)
    return p.returncode, text, err
def rows(out): return [json.loads(l) for l in (out/'results.jsonl').read_text().splitlines()]
def stripped(out): return sorted(({k: v for k,v in r.items() if k not in timing} for r in rows(out)), key=lambda r: r['key'])

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('compare')
    code,text,err = run(out)
    assert code == 0, err
    return out, text

def test_it_ends_with_the_table_and_writes_all_files(undisturbed):
    out,text = undisturbed
    assert text.count('accuracy') >= n_runs and '| 0 | dense |' in text and '| 0.95 | onecycle |' in text
    assert {f.name for f in out.iterdir()} == {'results.jsonl', 'table.md', 'accuracy.png', 'sparsity.png'}
    assert len(rows(out)) == n_runs
    for r in rows(out):
        if r['schedule'] != 'dense': assert r['measured'] == pytest.approx(.95, abs=1e-3)
        assert {'versions', 'device', 'seed', 'lr', 'epochs', 'bs', 'accuracy', 'seconds'} <= set(r)

def test_the_same_command_again_repeats_nothing(undisturbed):
    out,_ = undisturbed
    before = (out/'results.jsonl').read_bytes()
    code,text,_ = run(out)
    assert code == 0 and f'{n_runs} of {n_runs} trainings are in' in text
    assert (out/'results.jsonl').read_bytes() == before

@pytest.mark.fault
def test_ctrl_c_and_go_on(undisturbed, tmp_path):
    p = start(tmp_path)
    for line in p.stdout:
        if line.startswith('[1/'): break
    p.send_signal(signal.SIGINT)
    text,_ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'goes on from there' in text
    assert 1 <= len(rows(tmp_path)) < n_runs
    assert run(tmp_path)[0] == 0
    assert stripped(tmp_path) == stripped(undisturbed[0])

@pytest.mark.fault
def test_killed_at_ten_random_moments(undisturbed, tmp_path):
    rng,t = random.Random(0),time.time()
    reference = start(tmp_path/'time'); reference.communicate(); whole = time.time()-t
    for _ in range(10):
        p = start(tmp_path/'runs')
        time.sleep(rng.uniform(.5, 1.)*whole if rng.random() < .8 else rng.random())
        p.kill(); p.communicate()
    assert run(tmp_path/'runs')[0] == 0
    assert len(rows(tmp_path/'runs')) == n_runs # every line whole, every training once
    assert stripped(tmp_path/'runs') == stripped(undisturbed[0])

@pytest.mark.fault
def test_two_commands_on_one_folder(undisturbed, tmp_path):
    ps = [start(tmp_path), start(tmp_path)]
    texts = [p.communicate(timeout=600)[0] for p in ps]
    assert [p.returncode for p in ps] == [0, 0]
    assert len(rows(tmp_path)) == n_runs == sum(line.startswith('[') for text in texts for line in text.splitlines()) # nothing was trained twice
    assert all('| 0.95 | onecycle |' in text for text in texts) # and both have the whole table
    assert stripped(tmp_path) == stripped(undisturbed[0])

@pytest.mark.fault
def test_a_torn_line_is_dropped_and_done_again(tmp_path):
    res = Results(tmp_path)
    res.add(dict(key='a', x=1))
    with open(res.file, 'ab') as f: f.write(b'{"key": "b", "x"')
    assert [r['key'] for r in res.rows()] == ['a']
    assert res.add(dict(key='b', x=2)) and [r['x'] for r in Results(tmp_path).rows()] == [1, 2]
    assert len(rows(tmp_path)) == 2

@pytest.mark.bad_input
@pytest.mark.parametrize('args,text', [
    (dict(data='mnist'), 'it is one of digits, cifar10'), (dict(path='/no/such', data='cifar10'), '--path got /no/such, which is not a folder'), (dict(data='folder'), 'needs --path DIR'),
    (dict(arch='resnet19'), 'an architecture of torchvision such as resnet18'), (dict(schedules='fast'), 'they are oneshot, iterative'), (dict(sparsities='90'), 'pass 0.9'),
    (dict(sparsities='a,b'), 'commas between'), (dict(granularity='blocks'), 'known are weight'), (dict(context='layer'), 'local, erk, global, lamp'), (dict(seeds=0), 'must be at least 1'),
    (dict(device='gpu7'), '--device got'), (dict(exclude='nope'), "--exclude names 'nope'"), (dict(layers='nope'), "--layers names 'nope'"), (dict(granularity='2:4', sparsities='0.95'), 'a sparsity of 0.5'),
    (dict(lr='0'), '--lr got 0.0'), (dict(lr='high'), "--lr got 'high'; it is a number"), (dict(size='0'), '--size got 0'), (dict(epochs='0'), '--epochs got 0'), (dict(bs='1'), '--bs got 1'),
    (dict(schedules=','), '--schedule got'), (dict(sparsities=''), '--sparsity got'), (dict(criteria='size'), '--criteria got'), (dict(extra='eggs'), '--extra got'), (dict(precision='fp8'), '--precision got'),
    (dict(min_change='2'), '--min-change got 2'), (dict(log='paper'), '--log got'), (dict(reference='agp', schedules='onecycle'), '--reference got'), (dict(colour='red'), 'colour is not a setting'),
    (dict(schedules='dpf', granularity='filter'), "--granularity got 'filter', which dpf does not take"),
])
def test_mistakes_are_one_clear_line_before_the_first_training(tmp_path, args, text, monkeypatch):
    monkeypatch.setattr(study, '_train', lambda *args, **kwargs: pytest.fail('a training began'))
    with pytest.raises(SystemExit) as e: fasterprune_compare(out=str(tmp_path/'out'), **args)
    assert text in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'out'/'results.jsonl').exists() or not (tmp_path/'out'/'results.jsonl').read_text()

@pytest.mark.bad_input
def test_the_library_speaks_of_parameters(tmp_path):
    for how,text in ((dict(data='mnist'), 'data got'), (dict(data='folder'), 'data=folder needs path=DIR'), (dict(lr=0.), 'lr got'), (dict(exclude='nope'), 'exclude names')):
        with pytest.raises(ValueError) as e: study.compare(tmp_path, say=lambda s: None, **how)
        assert text in str(e.value) and '--' not in str(e.value)

def test_help_says_what_recipes_set_and_schedules_mean():
    p = subprocess.run([*command, '-h'], capture_output=True, text=True)
    for text in ('agp80           AGP from 20 % to 80 % of the training', 'quick   data cifar10, arch small', '--min-change', '--version'): assert text in p.stdout, p.stdout
    assert subprocess.run([*command, '--version'], capture_output=True, text=True).stdout.startswith('fasterprune 0.')

@pytest.mark.bad_input
def test_a_mistake_in_the_terminal(tmp_path):
    code,_,err = run(tmp_path/'out', '--arch', 'resnet19')
    assert code == 1 and 'fasterprune-compare: --arch got' in err and 'Traceback' not in err

@pytest.mark.bad_input
def test_no_internet_is_said(tmp_path):
    env = dict(os.environ, FASTAI_HOME=str(tmp_path), http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    p = subprocess.run([*command, *small, '--data', 'cifar10', '--out', tmp_path/'out'], capture_output=True, text=True, env=env)
    assert p.returncode == 1 and 'is there an internet connection?' in p.stderr and '--path DIR' in p.stderr and 'Traceback' not in p.stderr

@pytest.mark.bad_input
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    code,_,err = run(tmp_path/'file')
    assert code == 1 and 'cannot be written' in err and 'Traceback' not in err

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.fault
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    res = Results(tmp_path)
    res.add(dict(key='a', x=1))
    real = os.fsync
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ValueError, match='No space left on device; the trainings before this one are safe'): res.add(dict(key='b', x=2))
    monkeypatch.setattr(os, 'fsync', real)
    assert [r['key'] for r in res.rows()] == ['a']
    assert res.add(dict(key='b', x=2)) and len(rows(tmp_path)) == 2

@pytest.mark.fault
def test_a_file_at_its_limit_ends_in_the_promised_line(tmp_path):
    "A write that is torn by the system: a part of the line fits"
    code = f"""if 1:
        import resource
        from fasterprune.experiments.results import Results
        res = Results({str(tmp_path)!r})
        res.add(dict(key='a', x=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
        try: res.add(dict(key='b', x='y'*100))
        except ValueError as e: print(e)"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'the trainings before this one are safe' in p.stdout and 'Traceback' not in p.stderr, p.stderr
    assert [r['key'] for r in rows(tmp_path)] == ['a']

def test_the_key_is_about_what_decides_the_outcome():
    assert run_key(dict(a=1, b=2)) == run_key(dict(b=2, a=1)) != run_key(dict(a=1, b=3))

def test_images_in_memory_are_augmented_only_for_training():
    dls = load_data('digits', bs=32)
    a,b = dls.train.batch(dls.train.x.new_tensor(range(32)).long())[0], dls.train.batch(dls.train.x.new_tensor(range(32)).long())[0]
    assert (a != b).any()
    i = dls.valid.x.new_tensor(range(32)).long()
    assert (dls.valid.batch(i)[0] == dls.valid.batch(i)[0]).all()
    assert sum(len(y) for _,y in dls.valid) == len(dls.valid.x)
    assert abs(dls.valid.batch(i)[0].mean()) < .2

def test_cifar_as_the_png_folders_that_fastai_downloads(tmp_path, monkeypatch):
    monkeypatch.setitem(data_room.known_sets, 'cifar10', KnownSet('CIFAR', 'airplane bird cat', (3, 3), (18, 18)))
    from PIL import Image
    import numpy as np
    for split,n in (('train', 4), ('test', 2)):
        for c in ('airplane', 'bird', 'cat'):
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(np.full((32, 32, 3), 40*i, dtype=np.uint8)).save(tmp_path/split/c/f'{i}.png')
    dls = load_data('cifar10', tmp_path, bs=4)
    assert (len(dls.train.x), len(dls.valid.x), dls.c, dls.train.x.shape[1:]) == (12, 6, 3, (3, 32, 32))
    assert sorted(dls.valid.y.tolist()) == [0, 0, 1, 1, 2, 2]

def test_a_folder_without_a_split_is_split_the_same_way_each_time(tmp_path):
    from PIL import Image
    import numpy as np
    for c in ('a', 'b'):
        (tmp_path/c).mkdir()
        for i in range(10): Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path/c/f'{i}.jpg')
    one,two = (load_data('folder', tmp_path, size=16, bs=4) for _ in range(2))
    assert (one.valid.x == two.valid.x).all() and len(one.valid.x) == 4 and one.train.x.shape[1:] == (3, 16, 16)
