"C1: every schedule in every context at every granularity ends at the exact count, seen in the weights."
from functools import partial
import pytest, torch
from torch import nn
from fastai.callback.schedule import sched_cos, sched_lin
from fasterprune.all import *
from fasterprune.contexts import lamp
from fasterprune.selection import select, select_on_device
from conftest import conv_net, fit

schedules = dict(oneshot=sched_oneshot, oneshot40=sched_between(sched_oneshot, .4), iterative=sched_iterative, agp=sched_agp, onecycle=sched_onecycle,
                 onecycle6=partial(sched_onecycle, beta=6.), linear=sched_lin, cosine=sched_cos, cosine70=sched_between(sched_cos, 0, .7), own=lambda start, end, pos: start+(end-start)*pos**.5)

def blocks(learn, granularity):
    return [(r[4], r[5]) for r in measured_sparsity(learn.model, granularity='weight' if ':' in granularity else granularity, exclude='0' if granularity == '2:4' else ()).rows]

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', '2:4'])
@pytest.mark.parametrize('context', ['local', 'erk', 'global', 'lamp'])
@pytest.mark.parametrize('schedule', schedules)
def test_exact(learner, schedule, context, granularity):
    sparsity = .5 if granularity == '2:4' else .8
    make = lambda: SparsifyCallback(sparsity, granularity, context, schedule=schedules[schedule], exclude='0' if granularity == '2:4' else ())
    learn = learner()
    if granularity == '2:4' and context in ('erk', 'lamp'):
        with pytest.raises(ValueError, match="the pattern '2:4' fixes the same for each"): fit(learn, cbs=make())
        return
    fit(learn, cbs=make())
    got = blocks(learn, granularity)
    n,dead = zip(*got)
    if context == 'local': assert list(dead) == [round(sparsity*i) for i in n]
    assert sum(dead) == (sum(round(sparsity*i) for i in n) if context == 'local' else round(sparsity*sum(n)))
    assert all(d < i for i,d in got)
    if granularity == '2:4':
        for m in (learn.model[3], learn.model[6]):
            assert ((m.weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()

@pytest.mark.parametrize('criteria', [magnitude, small_final, squared, large_init, small_init, large_init_large_final, small_init_small_final, magnitude_increase, movement,
    movement_magnitude, updating_magnitude_increase, updating_movement, updating_movement_magnitude, gradient_magnitude, taylor, wanda, random_score, partial(random_score, seed=3)])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_every_criterion(learner, criteria, context):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.7, 'weight', context, criteria))
    got = blocks(learn, 'weight')
    assert sum(d for _,d in got) == (sum(round(.7*n) for n,_ in got) if context == 'local' else round(.7*sum(n for n,_ in got)))

def test_a_type_of_ones_own_knows_the_names_of_its_kind():
    class Mine(nn.ConvTranspose1d): pass
    assert granularities(Mine) == granularities(nn.Conv1d) == granularities(Mine(2, 2, 3))

@pytest.mark.parametrize('name', granularities(nn.Conv2d))
def test_every_granularity_of_conv2d(learner, name):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.6, name, 'local'))
    for n,d in blocks(learn, name): assert d == min(round(.6*n), n-1)

@pytest.mark.parametrize('cls,x', [(nn.Conv1d, (2, 4, 9)), (nn.Conv3d, (2, 4, 5, 5, 5)), (nn.ConvTranspose1d, (2, 4, 9)), (nn.ConvTranspose2d, (2, 4, 5, 5)), (nn.ConvTranspose3d, (2, 4, 5, 5, 5)), (nn.Linear, (2, 4))])
def test_every_layer_type(cls, x):
    for groups in ([1] if cls is nn.Linear else [1, 2, 4]):
        for name in [*granularities(cls), '2:4']:
            torch.manual_seed(0)
            m = nn.Sequential(cls(4, 8) if cls is nn.Linear else cls(4, 8, 3, groups=groups))
            s = .5 if name == '2:4' else .6
            if name == '2:4' and groups > 1:
                with pytest.raises(ValueError, match='needs input channels in multiples of 4'): Sparsifier(m, name, layers=cls)
                continue
            with pytest.warns() if Granularity(m[0], name).n_blocks == 1 else _nothing(): Sparsifier(m, name, layers=cls).sparsify(s)
            got = measured_sparsity(m, cls, granularity='weight' if name == '2:4' else name).rows[0]
            assert got[5] == min(round(s*got[4]), got[4]-1)
            if name == 'filter':
                silent = m(torch.randn(*x)).transpose(0, 1 if cls is not nn.Linear else -1).flatten(1).abs().amax(1) == 0
                assert silent.sum() == got[5]

from contextlib import nullcontext as _nothing

def test_dense_sparse_dense_grows_back(learner):
    learn = learner()
    fit(learn, n=4, cbs=SparsifyCallback(.8, schedule=sched_dsd, regrow=True, min_change=0))
    measured = [m for _,m in learn.recorder.sparsity_measured]
    assert max(measured) > .75 and measured[-1] < .02 # the last blocks given back have not been trained yet

def test_an_expensive_but_plain_schedule_that_never_reaches_its_end(learner):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.8, context='local', schedule=lambda start, end, pos: start + (end-start)*pos/2))
    for n,d in blocks(learn, 'weight'): assert d == round(.4*n)

def test_one_weight_and_tiny_layers():
    m = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 4, 3))
    with pytest.warns(UserWarning, match='too few blocks'): r = Sparsifier(m).sparsify(.999)
    assert [x[3] for x in r.rows] == [0, 8, 35]

def test_a_shared_module_counts_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    m = nn.Sequential(conv, nn.ReLU(), conv)
    r = Sparsifier(m).sparsify(.5)
    assert (len(r.rows), r.zeros) == (1, 72)
    a,b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    assert len(Sparsifier(nn.Sequential(a, b), layers=nn.Linear).sparsify(.5).rows) == 1

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', 'row'])
@pytest.mark.parametrize('context', ['local', 'erk', 'global', 'lamp'])
def test_the_way_of_a_gpu_selects_the_same(context, granularity, monkeypatch):
    "Run on the CPU; tests/test_cuda.py does it on a GPU."
    def masks(way):
        torch.manual_seed(0)
        model = conv_net(16)
        def dense(scores): return [s if isinstance(s, torch.Tensor) else torch.from_numpy(s[:]) for s in scores]
        monkeypatch.setattr('fasterprune.sparsifier.select_groups', lambda groups, allow_inf, context: [way(dense(s), k, m, allow_inf, context) for s,k,m in groups])
        sp = Sparsifier(model, granularity, context, sample=torch.randn(2, 4, 6, 6))
        for s in (.1, .4, .8, .97): sp.sparsify(s)
        return [g.mask for g in sp.groups], [g.n_pruned for g in sp.groups], [int((~g.mask).sum()) for g in sp.groups]
    (a, dead, counted), (b, dead_b, counted_b) = masks(select), masks(select_on_device)
    assert dead == counted == dead_b == counted_b
    assert all(torch.equal(x, y) for x,y in zip(a, b))
