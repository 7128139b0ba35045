"The experiments: data in all its forms, networks, recipes, baselines, many workers, paired differences."
import os, pickle, re, signal, subprocess, sys
import numpy as np, pytest, torch, torchvision
from fastai.distributed import DistributedDL
from PIL import Image
from torch import nn
from dataclasses import replace
from functools import partial
from fasterprune.experiments import batches, cli, data as data_room, results as results_room, study
from fasterprune.experiments.baselines import baselines, find_schedule, lr_cycles, onecycle_params, restarts, rivals, schedules
from fasterprune.experiments.batches import tensor_dls
from fasterprune.experiments.cli import fasterprune_compare, fasterprune_find_params
from fasterprune.experiments.data import KnownSet, find_images, load_data
from fasterprune.experiments.models import make_model
from fasterprune.experiments.pictures import markdown, plot_params, write_report
from fasterprune.experiments.plan import recipes
from fasterprune.experiments.results import Results
from fasterprune.experiments.run import Settings, run_one
from fasterprune.experiments.study import compare
from fasterprune.experiments.summary import paired, summarize

def images(folder, n, size=(20, 30), kind='png'):
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder/f'{i}.{kind}')

# ---- data

def cifar_files(root, data, n=6):
    "Original batch files, made small; what torchvision expects, but for the checksums"
    x = np.random.default_rng(0).integers(0, 255, (n, 3072), dtype=np.uint8)
    if data == 'cifar10':
        folder = root/'cifar-10-batches-py'; folder.mkdir()
        files = {f'data_batch_{i}': dict(data=x, labels=list(range(n))) for i in range(1, 6)} | dict(test_batch=dict(data=x[:2], labels=[0, 9]), **{'batches.meta': dict(label_names=[str(i) for i in range(10)])})
    else:
        folder = root/'cifar-100-python'; folder.mkdir()
        files = dict(train=dict(data=x, fine_labels=[99]*n, coarse_labels=[0]*n), test=dict(data=x[:2], fine_labels=[0, 99], coarse_labels=[0, 0]), meta=dict(fine_label_names=[str(i) for i in range(100)]))
    for name,d in files.items(): (folder/name).write_bytes(pickle.dumps(d))
    return folder, torch.tensor(x).view(n, 3, 32, 32)

@pytest.mark.parametrize('data,n_train,c', [('cifar10', 30, 10), ('cifar100', 6, 100)])
@pytest.mark.parametrize('inside', [False, True])
def test_cifars_original_files(tmp_path, monkeypatch, data, n_train, c, inside):
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda path, md5=None: True)
    folder,x = cifar_files(tmp_path, data)
    dls = load_data(data, folder if inside else tmp_path, bs=4)
    assert (len(dls.train.x), len(dls.valid.x), dls.train.x.shape[1:]) == (n_train, 2, (3, 32, 32))
    assert dls.c == c and dls.valid.y.tolist() == [0, c-1] and torch.equal(dls.valid.x, x[:2]) # fine labels, in the files' order

@pytest.mark.bad_input
def test_original_files_that_are_not_complete(tmp_path):
    folder,_ = cifar_files(tmp_path, 'cifar10')
    with pytest.raises(ValueError, match='not complete'): load_data('cifar10', tmp_path)

@pytest.fixture
def tiny_sets(monkeypatch):
    "The named sets, as small as those of the tests"
    for name,has,c in (('caltech101', 'ant beaver', 3), ('imagenette', 'n01 n02', 2), ('cifar10', 'airplane bird cat', 3), ('cifar100', 'apple worm', 2)):
        monkeypatch.setitem(data_room.known_sets, name, KnownSet('X', has, (c, c), (1, 40)))

def test_caltech_with_its_folder_inside_is_split_the_same_way_each_time(tmp_path, tiny_sets):
    for c in ('BACKGROUND_Google', 'ant', 'beaver'): images(tmp_path/'101_ObjectCategories'/c, 5, kind='jpg')
    (tmp_path/'Annotations').mkdir()
    one,two = (load_data('caltech101', tmp_path, size=16, bs=4) for _ in range(2))
    assert one.c == 3 and len(one.valid.x) == 3 and torch.equal(one.valid.x, two.valid.x) and torch.equal(one.valid.y, two.valid.y)

def test_imagenette_with_its_own_split(tmp_path, tiny_sets):
    for split,n in (('train', 3), ('val', 2)):
        for c in ('n01', 'n02'): images(tmp_path/split/c, n)
    dls = load_data('imagenette', tmp_path, size=24, bs=2)
    assert (len(dls.train.x), len(dls.valid.x), dls.train.x.shape[1:]) == (6, 4, (3, 24, 24))

def test_cifar100s_classes_may_lie_in_folders_of_superclasses(tmp_path, tiny_sets):
    for split in ('train', 'test'):
        for c in ('fruit/apple', 'invertebrates/worm'): images(tmp_path/split/c, 2)
    found = find_images('cifar100', tmp_path)
    assert found.classes == ['apple', 'worm'] and [i for _,i in found.train] == [0, 0, 1, 1]

@pytest.mark.bad_input
def test_a_folder_that_is_not_the_named_set_is_refused(tmp_path):
    for c in 'ab': images(tmp_path/c, 3)
    for data in ('cifar10', 'cifar100', 'caltech101', 'imagenette'):
        with pytest.raises(ValueError, match=f'is not {data}: it has 2 classes'): load_data(data, tmp_path)
    with pytest.raises(SystemExit, match='--path .* is not cifar10.*--data folder'): fasterprune_compare(data='cifar10', path=str(tmp_path), out=str(tmp_path/'out'))

def test_the_fingerprint_is_of_the_images_not_of_the_folder(tmp_path):
    for c in 'ab': images(tmp_path/'one'/'x'/c, 3); images(tmp_path/'two'/'x'/c, 3)
    def is_(folder): return find_images('folder', folder).fingerprint()
    one = is_(tmp_path/'one'/'x')
    assert one == is_(tmp_path/'two'/'x') # the same images in another place
    (tmp_path/'two'/'x'/'a'/'0.png').write_bytes((tmp_path/'two'/'x'/'a'/'1.png').read_bytes())
    assert one != is_(tmp_path/'two'/'x') # another image under the same name
    Image.new('RGB', (8, 8)).save(tmp_path/'one'/'x'/'a'/'new.png')
    assert one != is_(tmp_path/'one'/'x') # one more
    (tmp_path/'one'/'x'/'a'/'new.png').unlink()
    assert one == is_(tmp_path/'one'/'x')

def test_a_subset_is_always_the_same_and_small_images_are_made_small_once(tmp_path):
    for c in 'ab': images(tmp_path/c, 10, (40, 40))
    a,b = (load_data('folder', tmp_path, size=16, bs=4, images=6) for _ in range(2))
    assert len(a.train.x) == 6 and torch.equal(a.train.x, b.train.x) and len(a.valid.x) == 4
    assert a.train.x.shape[1:] == (3, 16, 16) and a.train.x.dtype == torch.uint8

def test_sizes_above_the_images_own_are_reached_in_the_batch():
    dls = load_data('digits', size=12, bs=8)
    assert dls.train.x.shape[-1] == 8 and dls.one_batch()[0].shape == (8, 1, 12, 12) and next(iter(dls.valid))[0].shape[-1] == 12
    small = load_data('digits', size=4, bs=8)
    assert small.train.x.shape[-1] == 4 and small.one_batch()[0].shape == (8, 1, 4, 4)

def test_making_images_smaller_is_pillows_way():
    x = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    want = np.array(Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.BILINEAR)).astype(int)
    got = batches.smaller(x, 16)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got-want).max() <= 1

@pytest.mark.parametrize('augment,changes', [('shift', True), ('fastai', True), ('none', False)])
def test_augmentation_is_for_training_and_from_the_seed(augment, changes):
    dls = load_data('digits', bs=32, augment=augment)
    idxs = torch.arange(32)
    def batch(dl, seed): torch.manual_seed(seed); __import__('random').seed(seed); return dl.batch(idxs)[0]
    assert torch.equal(batch(dls.train, 0), batch(dls.train, 0)) and torch.equal(batch(dls.train, 0), batch(dls.train, 1)) != changes
    assert torch.equal(batch(dls.valid, 0), batch(dls.valid, 1)) and type(batch(dls.train, 0)) is torch.Tensor
    assert batch(dls.train, 0).shape == (32, 1, 8, 8) and batch(dls.train, 0).isfinite().all()

def test_pretrained_networks_see_images_as_imagenet_was_normalised(tmp_path):
    for c in 'ab': images(tmp_path/c, 4)
    dls = load_data('folder', tmp_path, size=16, bs=2, pretrained=True)
    assert dls.train.mean.flatten().tolist() == pytest.approx([.485, .456, .406]) and dls.valid.std.flatten().tolist() == pytest.approx([.229, .224, .225])

def test_ranks_share_the_images_among_them(monkeypatch):
    "fastai's DistributedDL over images in memory, without its broadcast"
    dls = load_data('digits', bs=16)
    dls.valid.x[:, 0, 0, 0] = torch.arange(450) % 256; dls.valid.x[:, 0, 0, 1] = torch.arange(450)//256
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    seen = []
    for rank in (0, 1):
        dl = DistributedDL(dls.valid, rank=rank, world_size=2)
        xs = torch.cat([x for x,_ in dl])*dls.valid.std.cpu()*255 + dls.valid.mean.cpu()*255
        seen += (xs[:, 0, 0, 0] + 256*xs[:, 0, 0, 1]).round().int().tolist()
    assert sorted(seen) == list(range(450))

# ---- networks

@pytest.mark.model
@pytest.mark.parametrize('arch', ['resnet18', 'resnet18_32', 'vgg16_32', 'vgg16_bn_32'])
def test_the_papers_networks(arch):
    m = make_model(arch, 3, 7).eval()
    with torch.no_grad(): assert m(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    convs = [x for x in m.modules() if isinstance(x, nn.Conv2d)]
    assert len(convs) == (20 if 'resnet' in arch else 13)
    assert any(isinstance(x, nn.BatchNorm2d) for x in m.modules()) == (arch != 'vgg16_32')
    if arch == 'resnet18_32':
        shapes = []
        convs[-1].register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]))
        with torch.no_grad(): m(torch.randn(1, 3, 32, 32))
        assert shapes == [4] # 32 pixels shrink to 4, not to 1
        assert sum(p.numel() for p in m.parameters()) == 11_172_423 # 11,173,962 for 10 classes is the figure known for CIFAR's ResNet-18; 3 classes of 513 less
    if arch.startswith('vgg'): assert m.classifier.weight.shape == (7, 512)

@pytest.mark.parametrize('name', ['resnet18', 'vgg16', 'mobilenet_v3_small'])
def test_pretrained_gets_a_new_last_layer(monkeypatch, name):
    real = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, 'get_model', lambda name, weights=None, **kw: real(name, weights=None, **kw) if weights == 'DEFAULT' else pytest.fail('not pretrained'))
    assert [m for m in make_model(name, 3, 5, pretrained=True).modules() if isinstance(m, nn.Linear)][-1].out_features == 5

@pytest.mark.bad_input
def test_networks_that_are_not(monkeypatch):
    with pytest.raises(ValueError, match='ResNets and VGGs have a form for small images'): make_model('mobilenet_v3_small_32', 3, 5)
    with pytest.raises(ValueError, match='goes with architectures of torchvision'): make_model('small', 3, 5, pretrained=True)
    with pytest.raises(ValueError, match='resnet18_32'): make_model('resnet19_32', 3, 5)
    def offline(*args, **kwargs): raise OSError('no route')
    monkeypatch.setattr(torchvision.models, 'get_model', offline)
    with pytest.raises(ValueError, match='is there an internet connection'): make_model('resnet18', 3, 5, pretrained=True)

# ---- baselines

def test_the_learning_rate_starts_anew_where_the_stages_do():
    from fastai.callback.schedule import combined_cos
    one = combined_cos(.25, 1/25, 1., 1e-5)
    lr = lr_cycles(2., restarts['oneshot_restart'])['lr']
    for p in (0., .1, .3, .39): assert lr(p) == pytest.approx(2*one(p/.4), rel=1e-4)
    for p in (.41, .55, .8, 1.): assert lr(p) == pytest.approx(2*one((p-.4)/.6), rel=1e-3, abs=1e-4)
    assert lr_cycles(1.)['mom'](.25) == pytest.approx(.85)
    for cycles in restarts.values(): assert sum(p for p,_ in cycles) == 1

def test_three_stages_prune_in_the_second_alone():
    s = find_schedule('three_stage')
    assert s(0, .9, .499) == 0 and 0 < s(0, .9, .6) < .9 and s(0, .9, .75) == pytest.approx(.9) == s(0, .9, 1.)

@pytest.mark.parametrize('name', list(baselines))
def test_every_contestant_reaches_the_target_in_the_same_number_of_steps(name):
    dls = load_data('digits', bs=64, images=128)
    if name == 'fasterai': pytest.importorskip('fasterai')
    r = run_one(Settings(schedule=name, sparsity=.8, epochs=2, **{k: v for k,v in baselines[name].settings.items() if k != 'criteria'}), dls)
    assert r['steps'] == 4 and r['measured'] == pytest.approx(.8, abs=1e-3) and 0 <= r['accuracy'] <= 1

def test_a_cut_at_the_end_of_an_epoch_is_counted_there():
    "One-shot at 40 % of five epochs falls between the second and the third"
    r = run_one(Settings(schedule='oneshot', sparsity=.8, epochs=5), load_data('digits', bs=64, images=256))
    assert r['steps'] == 20 and min(step for step,s in r['curve'] if s > .7) == 8

def test_alpha_and_beta_by_name():
    assert [onecycle_params(n) for n in ('onecycle', 'onecycle6', 'onecycle_14_5.5', 'onecycle_7_-1', 'agp', 'onecycle_a_b')] == [(14, 5), (14, 6), (14, 5.5), (7, -1), None, None]
    assert find_schedule('onecycle_14_5')(0., .9, .5) == pytest.approx(.881*.9, abs=1e-3)

# ---- recipes

def planned(**options):
    "The trainings that a command would do"
    return study._plan({k: v for k,v in options.items() if k not in ('recipe', 'seeds')}, options.get('seeds'), 0, options['recipe'], Settings)[0]

def test_the_papers_recipe_is_the_papers():
    "Whatever the defaults of this package are, and options overrule"
    todo = planned(recipe='paper', data='cifar100', epochs=1)
    s = [s for s in todo if s.schedule == 'onecycle']
    assert {x.sparsity for x in s} == {.8, .9, .95} and {x.seed for x in s} == {0, 1, 2} and recipes['paper']['epochs'] == 25
    assert {(x.arch, x.lr, x.bs, x.size, x.augment, x.granularity, x.context, x.criteria) for x in s} == {('resnet18', 1e-3, 32, 224, 'fastai', 'weight', 'local', 'magnitude')}
    assert {(x.data, x.epochs) for x in todo} == {('cifar100', 1)}

def test_quick_compares_everything():
    assert list(dict.fromkeys(s.schedule for s in planned(recipe='quick'))) == ['dense', *schedules]

def test_a_piece_of_the_papers_recipe_runs(tmp_path):
    for c in 'ab': images(tmp_path/'data'/c, 4)
    fasterprune_compare(recipe='paper', data='folder', path=str(tmp_path/'data'), size=32, bs=2, epochs=1, seeds=1, sparsities='0.9', schedules='onecycle', images=4, out=str(tmp_path/'out'), device='cpu')
    rows = Results(tmp_path/'out').rows()
    assert [r['schedule'] for r in rows] == ['dense', 'onecycle'] and rows[1]['augment'] == 'fastai' and rows[1]['measured'] == pytest.approx(.9, abs=1e-4)

@pytest.mark.bad_input
@pytest.mark.parametrize('args,text', [
    (dict(recipe='slow'), 'it is one of digits, quick, paper'), (dict(augment='all'), 'shift, fastai, none'), (dict(images=3), 'at least one batch'), (dict(workers=0), 'at least 1'),
    (dict(pretrained=True), 'goes with architectures of torchvision'), (dict(schedules='onecycle_14'), 'onecycle_ALPHA_BETA'), (dict(arch='densenet121_32'), 'ResNets and VGGs'),
    (dict(dask='tcp://127.0.0.1:9'), 'no scheduler answers there'), (dict(dask='nonsense://'), '--dask nonsense')])
def test_mistakes_are_one_clear_line(tmp_path, args, text, monkeypatch):
    import distributed
    real = distributed.Client
    monkeypatch.setattr(distributed, 'Client', lambda address, timeout: real(address, timeout='1s'))
    with pytest.raises(SystemExit) as e: fasterprune_compare(out=str(tmp_path/'out'), **args)
    assert text in str(e.value) and '\n' not in str(e.value)

@pytest.mark.bad_input
@pytest.mark.parametrize('module,args,install', [
    ('distributed', dict(dask='tcp://127.0.0.1:8786'), "'fasterprune[dask]'"), ('fasterai', dict(schedules='onecycle,fasterai'), "'fasterprune[rivals]'"),
    ('wandb', dict(log='csv,wandb'), 'wandb'), ('tensorboard', dict(log='tensorboard'), 'tensorboard')])
def test_a_package_that_is_not_installed_is_told_before_images_are_read(tmp_path, monkeypatch, module, args, install):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr('fasterprune.experiments.study.find_images', lambda *a: pytest.fail('images were read'))
    with pytest.raises(SystemExit, match=f'{module}.*not installed.*pip install '+re.escape(install)): fasterprune_compare(out=str(tmp_path), **args)

@pytest.mark.bad_input
def test_processes_that_average_need_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.setattr('fasterprune.experiments.study.num_distrib', lambda: 2)
    with pytest.raises(ValueError, match=re.escape("pip install 'fasterprune[distributed]'")): compare(schedules='onecycle', **config)

# ---- the key, resuming, many workers

config = dict(data='digits', arch='small', context='local', epochs=1, lr=1e-2, bs=64)
quick_one = dict(schedules='onecycle', sparsities=[.9], seeds=2, device='cpu')
timing = ('seconds', 'date', 'threads')
def stripped(rows): return [{k: v for k,v in r.items() if k not in timing} for r in rows]
def quiet(s): pass

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('alone')
    return out, compare(out, **quick_one, say=quiet, **config)

def test_two_workers_give_the_rows_of_one(alone, tmp_path):
    rows = compare(tmp_path, **quick_one, say=quiet, workers=2, **config)
    assert stripped(rows) == stripped(alone[1]) and all(r['threads'] == 1 for r in rows)

def test_two_dask_workers_give_the_table_of_one_process(alone, tmp_path):
    "And go on with what one process began, without a shared disk for the results"
    from distributed import LocalCluster
    (tmp_path/'results.jsonl').write_text((alone[0]/'results.jsonl').read_text().splitlines()[0] + '\n')
    said = []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        rows = compare(tmp_path, **quick_one, say=said.append, dask=cluster.scheduler_address, **config)
    assert stripped(rows) == stripped(alone[1]) and said[0].startswith('1 of 4 trainings') and len(said) == 4
    def table(rows): return summarize(rows, times=False)._table()
    assert table(rows) == table(alone[1])

@pytest.mark.fault
def test_ctrl_c_with_two_workers_and_go_on(alone, tmp_path):
    code = f"from fasterprune.experiments import fasterprune_compare; fasterprune_compare(schedules='onecycle', sparsities='0.9', context='local', epochs=1, seeds=2, device='cpu', workers=2, out={str(tmp_path)!r})"
    deaf_no_more = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # what a shell starts in the background does not hear Ctrl-C
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=deaf_no_more)
    for line in p.stdout:
        if line.startswith('['): break
    os.killpg(p.pid, signal.SIGINT) # as a terminal does: to all of them
    text,err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'goes on from there' in text, err
    assert 1 <= len(Results(tmp_path).rows()) < 4
    assert stripped(compare(tmp_path, **quick_one, say=quiet, **config)) == stripped(alone[1])

def own_study(power=2.):
    "A schedule and a criterion of one's own, one of them with a value that it closes over"
    def early(start, end, pos): return start + (end-start)*min(1., pos/.5)
    def mine(weight): return weight.abs()**power
    return dict(schedules={'early': early}, criteria={'mine': mine}, sparsities=.9, seeds=2, device='cpu', say=quiet, **config)

def test_own_functions_with_workers_and_dask_give_the_rows_of_one_process(tmp_path):
    from distributed import LocalCluster
    one = compare(tmp_path/'one', **own_study())
    assert stripped(one) == stripped(compare(tmp_path/'two', workers=2, **own_study()))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert stripped(one) == stripped(compare(tmp_path/'dask', dask=cluster.scheduler_address, **own_study()))
    assert {r['schedule'] for r in one} == {'dense', 'early'} and 'def early' in one[1]['source']['schedule']

def test_own_functions_are_known_by_what_they_are(tmp_path):
    "An old name with another function, or with another value inside, is another training"
    one = compare(tmp_path, **own_study())
    again = compare(tmp_path, **own_study())
    other = compare(tmp_path, **own_study(power=3.))
    assert [r['key'] for r in one] == [r['key'] for r in again]
    assert [a['key'] == b['key'] for a,b in zip(one, other)] == [True, False]*2 # the dense networks are shared

@pytest.mark.bad_input
def test_what_cannot_be_described_is_refused_with_a_folder_and_runs_without(tmp_path):
    class Odd:
        def __init__(self): self.lock = __import__('threading').Lock()
        def __call__(self, start, end, pos): return end
    with pytest.raises(ValueError, match="schedule 'odd' holds a lock.*Make it a plain function"): compare(tmp_path, schedules={'odd': Odd()}, seeds=1, device='cpu', say=quiet, **config)
    assert len(compare(schedules={'odd': Odd()}, sparsities=.9, seeds=1, device='cpu', say=quiet, **config)) == 2

def test_one_more_picture_is_another_training(tmp_path):
    for c in 'ab': images(tmp_path/'data'/c, 6)
    how = dict(data='folder', path=str(tmp_path/'data'), schedules='onecycle', sparsities=.8, seeds=1, epochs=1, bs=2, size=16, device='cpu')
    said = []
    one = compare(tmp_path/'out', say=said.append, **how)
    assert said[0] == 'chosen for these images: arch=small, lr=0.01' and one[0]['folder'] == 'data' and one[0]['train_images'] == 10
    Image.new('RGB', (9, 9)).save(tmp_path/'data'/'a'/'one_more.png')
    two = compare(tmp_path/'out', say=quiet, **how)
    assert {r['key'] for r in one}.isdisjoint(r['key'] for r in two)

def test_another_place_of_the_same_pictures_is_the_same_training(tmp_path):
    for c in 'ab': images(tmp_path/'data'/c, 6)
    how = dict(data='folder', schedules='dense', seeds=1, epochs=1, bs=2, size=16, device='cpu', say=quiet)
    one = compare(tmp_path/'out', path=str(tmp_path/'data'), **how)
    assert [r['key'] for r in compare(tmp_path/'out', path=str((tmp_path/'data').rename(tmp_path/'moved')), **how)] == [r['key'] for r in one]

def test_curves_are_logged_by_fastais_callbacks(tmp_path):
    compare(tmp_path, schedules='onecycle', sparsities=.8, seeds=1, device='cpu', log='csv,tensorboard', say=quiet, **config)
    logs = list((tmp_path/'logs').iterdir())
    csv = [f.read_text() for f in logs if f.suffix == '.csv']
    assert len(logs) == 4 and any('sparsity' in text for text in csv)

def test_bfloat16_trains_and_prunes_exactly():
    r = run_one(Settings(schedule='onecycle', sparsity=.9, epochs=2, precision='bf16'), load_data(bs=64))
    assert r['measured'] == pytest.approx(.9, abs=1e-3) and r['accuracy'] > .1

def test_whatever_the_callback_takes_can_vary(tmp_path):
    c = compare(schedules='onecycle', sparsities=.5, granularity=['weight', 'filter'], exclude={'none': '', 'first': '0.0'}, min_change=[0., .02], seeds=1, device='cpu', say=quiet, **config)
    assert len(c) == 1+8 and len({(r['granularity'], r['exclude'], r['min_change']) for r in c[1:]}) == 8

@pytest.mark.bad_input
def test_dask_workers_with_several_threads_are_refused(tmp_path):
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(ValueError, match='start the workers with --nthreads 1'):
            compare(tmp_path, **quick_one, say=quiet, dask=cluster.scheduler_address, **config)

def test_the_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'rank_distrib', lambda: 1)
    monkeypatch.setattr(study, 'num_distrib', lambda: 2)
    assert len(compare(tmp_path, schedules='dense', seeds=1, device='cpu', say=quiet, **config)) == 0 and (tmp_path/'results.jsonl').read_text() == ''

# ---- tables

def made(accs): return [dict(schedule=n, sparsity=.9 if n != 'dense' else 0., seed=i, accuracy=a, measured=.9, seconds=1., curve=[[0, .1]], steps=10) for n,v in accs.items() for i,a in enumerate(v)]

def test_paired_differences_use_common_seeds_only():
    rows = made(dict(onecycle=(.5, .6, .7), agp=(.4, .52)))
    text = markdown(paired(rows))
    assert 'number 1 of 2' in text and '| 0.9 | agp | +9.00 ± 1.41 | -3.71 to 21.71 | 2 | within noise |' in text # t(0.975, 1) = 12.706
    assert len(paired(made(dict(agp=(.4, .5))))) == 0 == len(paired([])) and 'one seed says nothing' in markdown(paired(made(dict(onecycle=(.5,), agp=(.4,)))))

def test_contexts_are_contestants_of_their_own_and_are_paired():
    rows = made(dict(dense=(.9, .9), onecycle=(.5, .6)))
    rows = [dict(r, context='local') for r in rows] + [dict(r, context='global', accuracy=r['accuracy']+.1) for r in rows if r['schedule'] == 'onecycle']
    text = markdown(summarize(rows))
    assert '| 0.9 | onecycle global | 65.00' in text and '| 0.9 | onecycle local | 55.00' in text and '| onecycle global | -10.00' in markdown(paired(rows))

def test_one_context_alone_is_not_in_the_name_so_that_pairs_are_found():
    rows = [dict(r, context='lamp') for r in made(dict(onecycle=(.5, .6), agp=(.4, .5)))]
    assert len(paired(rows)) == 1

def test_a_gap_is_to_the_dense_network_of_the_same_budget():
    rows = [dict(r, lr=lr, accuracy=r['accuracy']+extra) for lr,extra in ((.01, 0.), (.03, .05)) for r in made(dict(dense=(.9, .8), onecycle=(.6, .5)))]
    lines = {l[1]: l for l in summarize(rows)._table()}
    assert lines['onecycle lr 0.03'][3] == lines['onecycle lr 0.01'][3] == '-30.00 ± 0.00' and lines['dense lr 0.03'][2] == '90.00 ± 7.07'

def test_times_of_different_days_are_not_compared():
    rows = [dict(r, date='2026-01-01') for r in made(dict(dense=(.9,), onecycle=(.5,)))]
    assert summarize(rows)._table()[2][5] == '1.00'
    rows[1]['date'] = '2026-01-02'
    assert summarize(rows)._table()[2][5] == ''

def test_a_report_without_pruned_rows(tmp_path):
    assert '| 0 | dense |' in write_report(made(dict(dense=(.9,))), tmp_path) and [f.name for f in tmp_path.iterdir()] == ['table.md']

def test_find_params_draws_its_map_and_goes_on(tmp_path, capsys):
    args = dict(alphas='14', betas='3,5', epochs=1, out=str(tmp_path), device='cpu')
    fasterprune_find_params(**args)
    before = (tmp_path/'results.jsonl').read_text()
    assert {f.name for f in tmp_path.iterdir()} == {'results.jsonl', 'table.md', 'params.png'} and before.count('\n') == 3 and 'onecycle_14_3' in capsys.readouterr().out
    fasterprune_find_params(**args)
    assert (tmp_path/'results.jsonl').read_text() == before and '3 of 3 trainings are in' in capsys.readouterr().out
    from matplotlib.figure import Figure
    ax = plot_params(Results(tmp_path).rows(), Figure().subplots())
    assert len(ax.texts) == 2 and [t.get_text() for t in ax.get_xticklabels()] == ['3', '5']

@pytest.mark.bad_input
def test_find_params_mistakes(tmp_path):
    with pytest.raises(SystemExit, match='--alphas got'): fasterprune_find_params(alphas='a', out=str(tmp_path))
    with pytest.raises(SystemExit, match='pass 0.9'): fasterprune_find_params(sparsity=90, out=str(tmp_path))
