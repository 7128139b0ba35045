"C13: errors are early, say what is allowed, and leave the model untouched."
import re
from pathlib import Path
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fasterprune import names
from fasterprune.all import *
from conftest import conv_net, fit, state

nan = float('nan')
at_construction = [
    (dict(sparsity=90), "pass 0.9"), (dict(sparsity=-.1), r"a number in \[0, 1\)"), (dict(sparsity=1.), r"a number in \[0, 1\)"), (dict(sparsity=nan), r"a number in \[0, 1\)"),
    (dict(sparsity='abc'), r"a number in \[0, 1\)"), (dict(sparsity=True), r"a number in \[0, 1\)"), (dict(sparsity=None), r"a number in \[0, 1\)"), (dict(sparsity={}), "empty dict"),
    (dict(sparsity={'0': 2}), r"a number in \[0, 1\)"),
    (dict(granularity='block'), "known are weight"), (dict(granularity=3), "known are weight"), (dict(granularity='5:4'), "0 < n < m"), (dict(granularity='2:4'), "a sparsity of 0.5"),
    (dict(context='each'), "local, erk, global, lamp"), (dict(context=3), "local, erk, global, lamp"),
    (dict(criteria='magnitude'), "a criterion is a function"), (dict(criteria=lambda x, y: x), "wants x, y"), (dict(criteria=lambda: 1), "wants nothing"), (dict(criteria=nn.ReLU), "a criterion is a function"),
    (dict(schedule='cos'), "a schedule is a function"), (dict(schedule=lambda pos: pos), r"cannot be called as \(start, end, pos\)"), (dict(schedule=lambda s, e, p: 'x'), "a sparsity is a number"),
    (dict(schedule=lambda s, e, p: 2*p), "a sparsity is a number"), (dict(schedule=sched_dsd), "regrow=True"),
    (dict(sparsity={'0': .5}, context='global'), "context='local'"), (dict(sparsity={'0': .5, '3': .5}, exclude='3'), "leave out layers= and exclude="),
    (dict(sparsity={'0': .5}, layers=nn.Linear), "leave out layers= and exclude="),
    (dict(start_epoch=3, end_epoch=2), "start_epoch < end_epoch"), (dict(start_epoch=-1), "0 <= start_epoch"), (dict(min_change=2), "min_change"),
]
@pytest.mark.bad_input
@pytest.mark.parametrize('kw,text', at_construction)
def test_at_construction(kw, text):
    with pytest.raises((ValueError, TypeError), match=text): SparsifyCallback(**{'sparsity': .9, **kw})

def nan_net():
    net = conv_net()
    with torch.no_grad(): net[3].weight[0, 0, 0, 0] = nan
    return net

@pytest.mark.bad_input
@pytest.mark.parametrize('kw,text', [(dict(layer_type=nn.Linear), "use layers instead of layer_type"), (dict(lth=True), "use find_ticket"), (dict(amount=.9), "a fraction of all"),
                                     (dict(tied=True), "use coupled instead of tied"), (dict(colour=1), r"its arguments are sparsity, granularity, .*coming_from")])
def test_a_name_from_elsewhere(kw, text):
    with pytest.raises(TypeError, match=f'SparsifyCallback got {list(kw)[0]}') as told: SparsifyCallback(.9, **kw)
    assert re.search(text, str(told.value), re.I)
    with pytest.raises(TypeError, match='Sparsifier got') as told: Sparsifier(conv_net(), **kw)

def test_the_page_has_all_names_from_elsewhere():
    page = (Path(__file__).parent.parent/'nbs/tutorials/coming_from.ipynb').read_text()
    assert [n for n in names._elsewhere if not re.search(rf'\b{n}\b', page)] == []

at_the_start = [
    (dict(layers=nn.Conv3d), {}, "no layer to prune"), (dict(layers='body'), {}, "names 'body', which is not in the model"), (dict(exclude=['body']), {}, "exclude names 'body'"),
    (dict(layers=nn.Embedding), {}, "layers that can be pruned are"), (dict(layers=3), {}, "give a module type"), (dict(layers=[]), {}, "give a module type"), (dict(layers=lambda name, m: False), {}, "no layer to prune"),
    (dict(sparsity={'nope': .5}), {}, "its prunable layers are 0, 3, 6, 10"), (dict(sparsity={'1': .5}), {}, "no layer to prune"),
    (dict(schedule=lambda s, e, p: nan if abs(p - 7/12) < 1e-9 else e*p), {}, "gave nan at pos=0.583"), (dict(start_epoch=.5, schedule=lambda s, e, p: nan if abs(p - 4/9) < 1e-9 else e*p), {}, "gave nan at pos=0.444"), (dict(), dict(model=nan_net), "layer 3 has weights that are not finite"), (dict(granularity='kernel', layers=(nn.Conv2d, nn.Linear)), {}, "unknown for Linear"),
    (dict(start_epoch=2), {}, "does not fit into a training of 2 epochs"), (dict(end_epoch=3), {}, "does not fit into a training of 2 epochs"),
    (dict(sparsity=.75, granularity='1:4'), dict(model=lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())), r"multiples of 4; layer 1 has 6.*exclude=\['1'\]"),
    (dict(criteria=lambda weight: weight), {}, "scores must be finite and at least 0"), (dict(criteria=lambda weight: weight.sum()), {}, "in the shape of the weight"),
    (dict(context=lambda s, shapes, sizes: [s]), {}, "one sparsity in"),
    (dict(), dict(model=lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())), "remove the reparametrisation"),
]
@pytest.mark.bad_input
@pytest.mark.parametrize('kw,net,text', at_the_start)
def test_at_the_start(learner, kw, net, text):
    learn = learner(model=net['model']() if net else None)
    before,steps = state(learn),[]
    class Steps(Callback):
        def before_step(self): steps.append(1)
    with pytest.raises((ValueError, TypeError), match=text): fit(learn, cbs=[SparsifyCallback(**{'sparsity': .9, **kw}), Steps()])
    assert not steps
    after = state(learn)
    assert all(torch.equal(before[k].nan_to_num(7.), after[k].nan_to_num(7.)) for k in before)

@pytest.mark.bad_input
def test_nan_during_the_training_names_the_layer(learner):
    class Blow(Callback):
        order = 80
        def after_step(self):
            if self.train_iter == 4: self.model[6].weight.data[0] = nan
    with pytest.raises(ValueError, match='layer 6 has weights that are not finite'): fit(learner(), cbs=[SparsifyCallback(.9), Blow()])

@pytest.mark.bad_input
def test_an_error_in_one_layer_leaves_all_others_alone():
    torch.manual_seed(0); m = conv_net()
    bad = lambda weight, name: weight.abs() * (float('nan') if name == '6' else 1)
    before = {k: v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(ValueError, match='layer 6'): Sparsifier(m, criteria=bad).sparsify(.5)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

@pytest.mark.bad_input
def test_filters_without_a_sample_on_a_model_that_cannot_be_traced():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net = conv_net()
        def forward(self, x): return self.net(x) if x.sum() > 0 else -self.net(x)
    with pytest.raises(ValueError, match='pass sample='): Sparsifier(Odd(), 'filter')
    Sparsifier(Odd(), 'filter', sample=torch.randn(2, 4, 6, 6)).sparsify(.5)

@pytest.mark.bad_input
def test_meta_and_lazy_and_complex():
    with pytest.raises(ValueError, match='has no values yet'): Sparsifier(nn.Sequential(nn.Conv2d(1, 1, 1, device='meta')))
    with pytest.raises(ValueError, match='has no values yet'): Sparsifier(nn.Sequential(nn.LazyConv2d(1, 1)))
    with pytest.raises(ValueError, match='only real floating point'): Sparsifier(nn.Sequential(nn.Conv2d(1, 1, 1, dtype=torch.complex64)))

@pytest.mark.bad_input
def test_an_all_zero_layer_is_not_taken_as_pruned_and_its_neighbours_are_exact():
    m = conv_net(); nn.init.zeros_(m[3].weight)
    r = Sparsifier(m).sparsify(.5)
    assert [x[3] for x in r.rows] == [144, 576, 128] and r.layers['3'] == 1.

@pytest.mark.bad_input
def test_a_criterion_that_fails_in_the_middle_of_a_training_loses_nothing(learner):
    calls = []
    def flaky(weight):
        calls.append(1)
        if len(calls) > 15: raise RuntimeError('no more')
        return weight.abs()
    learn = learner()
    keys = list(learn.model.state_dict())
    with pytest.raises(RuntimeError, match='no more'): fit(learn, cbs=SparsifyCallback(.9, criteria=flaky, min_change=0.))
    assert list(learn.model.state_dict()) == keys
    fit(learn, cbs=SparsifyCallback(.9))
    assert float(measured_sparsity(learn.model)) == pytest.approx(.9, abs=.005)

@pytest.mark.bad_input
@pytest.mark.parametrize('kwargs,error,text', [(dict(min_change=None), ValueError, 'min_change got None'), (dict(start_epoch='1'), ValueError, "start_epoch got '1'"),
                                               (dict(end_epoch='2'), ValueError, "end_epoch '2'"), (dict(regrow='no'), TypeError, "regrow got 'no'")])
def test_arguments_of_another_type(kwargs, error, text):
    with pytest.raises(error, match=text): SparsifyCallback(.5, **kwargs)

@pytest.mark.bad_input
@pytest.mark.parametrize('exclude', [nn.Linear, None, [nn.Linear], 3])
def test_what_to_leave_out_is_named(exclude):
    with pytest.raises(TypeError, match='exclude got .*name of a layer'): Sparsifier(conv_net(), exclude=exclude)
    assert len(Sparsifier(conv_net(), exclude=iter(['0'])).layers) == 2
