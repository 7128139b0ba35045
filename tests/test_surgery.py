"Coupled filters are pruned together, and zero channels are cut out: with the same outputs."
import copy, os, subprocess, sys, warnings
import pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.basics import Adam, OptimWrapper, SGD, set_seed
from fastai.optimizer import RMSProp
from fasterprune.all import *
from conftest import conv_net, fit, same, state

slow = pytest.mark.skipif(not os.environ.get('FASTERPRUNE_FULL'), reason='slow: FASTERPRUNE_FULL=1 runs it')
both = (nn.Conv2d, nn.Linear)

def zoo(name):
    def make():
        if name.startswith('xresnet'): import fastai.vision.models.xresnet as x; return getattr(x, name)(n_out=5)
        if name == 'vision_learner head':
            from fastai.vision.all import create_vision_model
            return create_vision_model(torchvision.models.resnet18, 5, pretrained=False)
        return torchvision.models.get_model(name, weights=None, num_classes=5)
    torch.manual_seed(0); m = make().eval()
    for b in m.modules(): # as if trained: nothing is zero, or one, by initialisation
        if isinstance(b, nn.modules.batchnorm._BatchNorm): nn.init.uniform_(b.weight, .5, 1.5); nn.init.normal_(b.bias, 0, .1); nn.init.normal_(b.running_mean, 0, .1); nn.init.uniform_(b.running_var, .5, 1.5)
    return m

def params(m): return sum(p.numel() for p in m.parameters())
def outputs(m, x):
    with torch.no_grad(): return m.eval()(x)
def close(a, b, tol=1e-4): return a.shape == b.shape and (a-b).abs().max() <= tol*a.abs().max()

quick = ['resnet18', 'mobilenet_v2', 'mobilenet_v3_small', 'xresnet18', 'vision_learner head', 'squeezenet1_1']
long = ['resnet34', 'resnet50', 'vgg16', 'vgg16_bn', 'mobilenet_v3_large', 'densenet121', 'efficientnet_b0', 'xresnet50']

@pytest.mark.model
@pytest.mark.parametrize('name', quick + [pytest.param(n, marks=slow) for n in long])
def test_the_small_network_says_the_same(name):
    m,x = zoo(name),torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); r = Sparsifier(m, 'filter', sample=x, layers=both, coupled=True).sparsify(.5)
    for row in r.rows: assert row[5] == round(.5*row[4]), row[0] # in a group as in each of its layers
    before = copy.deepcopy(m.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error'); small = shrink(m, x) # no zero filter was left in
    assert same(before, m.state_dict()) and not m.training and not small.training
    for i in (torch.randn(3, 3, 64, 64), torch.rand(1, 3, 96, 96)*5-2): assert close(outputs(m, i), outputs(small, i))
    assert params(small) < .3*params(m) and float(measured_sparsity(small, granularity='filter')) == 0
    for (n,a),b in zip(m.named_modules(), small.modules()):
        if isinstance(a, nn.Conv2d) and a.groups == 1 and '.fc' not in n and n != 'classifier.1': assert b.out_channels == round(a.out_channels/2 + 1e-9) or b.out_channels == a.out_channels - round(a.out_channels/2), n
        assert a.training == b.training
    assert not any('fasterprune' in type(b).__module__ or b._forward_hooks or b._forward_pre_hooks for b in small.modules())

@pytest.mark.model
@pytest.mark.parametrize('name', [pytest.param(n, marks=slow) for n in ['convnext_tiny', 'vit_b_16']])
def test_what_cannot_be_cut_is_left_in_and_named(name):
    m,x = zoo(name),torch.randn(1, 3, 224, 224)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        Sparsifier(m, 'filter', sample=x, layers=both, exclude=[n for n,l in m.named_modules() if isinstance(l, nn.MultiheadAttention)]).sparsify(.5)
        small = shrink(m, x)
    assert any('were left in' in str(o.message) and ('features.0.0' in str(o.message) or 'conv_proj' in str(o.message)) for o in w) # LayerNorm looks at all channels
    assert params(small) < .9*params(m) and close(outputs(m, x), outputs(small, x)) # but the hidden channels of each MLP go

@pytest.mark.model
def test_grouped_convolutions_are_left_in():
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)),torch.randn(2, 3, 12, 12)
    Sparsifier(m, 'filter', exclude='6').sparsify(.5)
    with pytest.warns(UserWarning, match=r'left in.*0 \(4 of 8\).*grouped convolution'): small = shrink(m, x)
    assert [l.out_channels for l in small if isinstance(l, nn.Conv2d)] == [8, 8, 4, 2] and close(outputs(m, x), outputs(small, x))

def test_a_constant_that_is_not_zero_is_never_cut():
    for act,cut in [(nn.ReLU(), 4), (nn.Hardswish(), 4), (nn.GELU(), 4), (nn.Tanh(), 4), (nn.PReLU(), 4), (nn.Sigmoid(), 8), (nn.Softplus(), 8), (nn.Hardsigmoid(), 8)]:
        torch.manual_seed(0); m,x = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 2, 1)),torch.randn(2, 3, 9, 9)
        Sparsifier(m, 'filter', exclude='2').sparsify(.5)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore'); small = shrink(m, x)
        assert (small[0].out_channels == cut or isinstance(act, nn.PReLU)) and close(outputs(m, x), outputs(small, x)), act

def test_what_is_zero_only_on_the_sample_stays():
    torch.manual_seed(0); m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        m[0].weight[0] = 0.; m[0].bias[0] = 0.     # a zero filter
        m[0].weight[1] = -m[0].weight[1].abs(); m[0].bias[1] = 0.  # zero if the images are positive
    x = torch.rand(2, 3, 9, 9)
    small = shrink(m, x)
    assert small[0].out_channels == 7 and close(outputs(m, -x), outputs(small, -x))
    assert shrink(m, torch.zeros(2, 3, 9, 9))[0].out_channels == 7 # and a sample of zeros says nothing about the network

def test_round_to():
    torch.manual_seed(0); m,x = zoo('resnet18'),torch.randn(1, 3, 64, 64)
    Sparsifier(m, 'filter', sample=x, coupled=True).sparsify(.7)
    small = shrink(m, x, round_to=8)
    widths = {l.out_channels for l in small.modules() if isinstance(l, nn.Conv2d)}
    assert widths == {24, 40, 80, 160} and close(outputs(m, x), outputs(small, x)) # 64·0.3 = 19 → 24 and so on
    for bad in (0, -8, 1.5, True, '8'):
        with pytest.raises(ValueError, match='round_to got'): shrink(m, x, bad)

def test_a_layer_that_is_zero_altogether_keeps_one_channel():
    m = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad(): m[0].weight.zero_()
    x = torch.randn(1, 3, 9, 9); small = shrink(m, x)
    assert small[0].out_channels == 1 and close(outputs(m, x), outputs(small, x))

@pytest.mark.bad_input
def test_errors_name_what_is_wrong_and_change_nothing():
    m,x = conv_net(),torch.randn(2, 4, 8, 8); before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match='no filter of this model is zero'): shrink(m, x)
    Sparsifier(m).sparsify(.5)
    with pytest.raises(ValueError, match="granularity 'filter'"): shrink(m, x)
    m.load_state_dict(before)
    with pytest.raises(ValueError, match='sample is a batch of inputs'): shrink(m, torch.randn(2, 3, 8, 8))
    class Mixes(nn.Module): # the mean over channels is not zero where a channel is, and no autograd node tells
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(3, 8, 3),nn.Conv2d(8, 8, 1),nn.Conv2d(8, 2, 1)
        def forward(self, x): x = self.a(x).relu(); return self.c(self.b(x * x.detach().mean(1, keepdim=True)).relu())
    m = Mixes(); Sparsifier(m, 'filter', exclude='c').sparsify(.5); before = copy.deepcopy(m.state_dict())
    x = torch.randn(2, 3, 9, 9)
    with pytest.warns(UserWarning, match='left in'): small = shrink(m, x)
    assert same(before, m.state_dict()) and small.a.out_channels == 8 and close(outputs(m, x), outputs(small, x))

def test_frozen_layers_modes_and_types_are_as_before():
    torch.manual_seed(0); m = conv_net(); x = torch.randn(2, 4, 8, 8)
    m[0].weight.requires_grad_(False); m.train(); m[1].eval()
    Sparsifier(m, 'filter', sample=x, exclude='3').sparsify(.5)
    rng = torch.get_rng_state()
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); small = shrink(m, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in m.parameters()] and [l.training for l in small.modules()] == [l.training for l in m.modules()]
    half = conv_net().to(torch.bfloat16)
    Sparsifier(half, 'filter', sample=x.bfloat16()).sparsify(.5)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); small = shrink(half, x.bfloat16())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and list(small.state_dict()) == list(half.state_dict())

@pytest.mark.parametrize('share', ['bias', 'norm'])
@pytest.mark.parametrize('sparsity', [.5, {'a': .5, 'b': .25}])
def test_tensors_that_two_layers_share_stay(share, sparsity):
    class Shares(nn.Module):
        def __init__(self):
            super().__init__(); self.a,self.n,self.b,self.k,self.c = nn.Conv2d(3, 8, 3),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3),nn.BatchNorm2d(8),nn.Conv2d(8, 2, 1)
            if share == 'bias': self.b.bias = self.a.bias
            else: self.k.weight,self.k.bias = self.n.weight,self.n.bias
        def forward(self, x): return self.c(self.k(self.b(self.n(self.a(x)).relu())).relu())
    for seed in range(4):
        torch.manual_seed(seed); m,x = Shares(),torch.randn(2, 3, 9, 9)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore'); Sparsifier(m, 'filter', sample=x, exclude='c').sparsify(sparsity)
        with pytest.warns(UserWarning, match=rf'left in.*shares its {"bias" if share == "bias" else "weight"}'): small = shrink(m, x)
        assert [l.out_channels for l in (small.a, small.b)] == [8, 8] and close(outputs(m, x), outputs(small, x))

def test_in_inference_mode_too():
    "The tensors of the small network can be trained, and those of a network that is cut by loading"
    import io
    def make(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    m,x,again,file = make(),torch.randn(2, 3, 9, 9),make(),io.BytesIO()
    Sparsifier(m, 'filter', sample=x, exclude='5').sparsify(.5)
    with torch.inference_mode():
        small = shrink(m, x); save_sparse(small, file); file.seek(0); load_sparse(file, again)
        assert torch.is_inference_mode_enabled()
    for net in (small, again):
        assert [l.out_channels for l in net if isinstance(l, nn.Conv2d)] == [4, 4, 2] and close(outputs(m, x), outputs(net, x))
        net.train()(x).sum().backward(); torch.optim.SGD(net.parameters(), .1).step()

@pytest.mark.bad_input
def test_a_network_without_values_says_so():
    with pytest.raises(ValueError, match='has no values yet'): shrink(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)).to('meta'), torch.randn(2, 3, 9, 9))

# coupled filters

class Res(nn.Module):
    "A residual stream with a depthwise layer in the branch, a concatenation with a norm of its own, and a head"
    def __init__(self, w=8):
        super().__init__()
        self.stem,self.n0 = nn.Conv2d(4, w, 3, padding=1),nn.BatchNorm2d(w)
        self.up,self.dw,self.down,self.n1 = nn.Conv2d(w, 2*w, 1),nn.Conv2d(2*w, 2*w, 3, padding=1, groups=2*w),nn.Conv2d(2*w, w, 1),nn.BatchNorm2d(w)
        self.grow,self.n2 = nn.Conv2d(w, 6, 3, padding=1),nn.BatchNorm2d(w+6)
        self.head = nn.Linear(w+6, 3)
    def forward(self, x):
        x = self.n0(self.stem(x)).relu()
        x = x + self.n1(self.down(self.dw(self.up(x).relu()).relu()))
        x = self.n2(torch.cat([x, self.grow(x)], 1)).relu()
        return self.head(x.mean((2, 3)))

coupled_layers = [{'stem', 'down'}, {'up', 'dw'}, {'grow'}]

def res(seed=0):
    torch.manual_seed(seed); m = Res()
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.normal_(b.bias)
    return m

@settings(max_examples=40, deadline=None)
@given(st.floats(0, .9), st.sampled_from(['local', 'erk', 'global', 'lamp']), st.sampled_from([magnitude, squared, random_score, movement, taylor]), st.integers(0, 99), st.booleans())
def test_coupled_filters_are_pruned_together_in_exact_numbers(sparsity, context, criteria, seed, twice):
    m,x = res(seed),torch.randn(2, 4, 8, 8)
    m(x).square().mean().backward()
    sp = Sparsifier(m, 'filter', context, criteria, sample=x, coupled=True)
    assert [{l.name for l in g.layers} for g in sp.groups] == coupled_layers
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if twice: sp.update(sparsity/2); first = [None if g.mask is None else g.mask.clone() for g in sp.groups]
        sp.sparsify(sparsity)
    for g in sp.groups:
        for l in g.layers: assert torch.equal((l.weight != 0).flatten(1).any(1), (g.weight != 0).flatten(1).any(1)) and g.n_pruned == int((l.weight == 0).flatten(1).all(1).sum())
    n,pruned = [g.n for g in sp.groups],[g.n_pruned for g in sp.groups]
    if context == 'local': assert pruned == [min(round(sparsity*k), k-1) for k in n]
    else: assert sum(pruned) == min(round(sparsity*sum(n)), sum(n)-len(n))
    if twice: assert not any((g.mask & ~f).any() for g,f in zip(sp.groups, first) if f is not None)
    if sum(pruned): # every norm on the way is zero, that behind the concatenation too
        for norm,of in [(m.n0, sp.groups[:1]), (m.n1, sp.groups[:1]), (m.n2, [sp.groups[0], sp.groups[2]])]:
            keep = torch.cat([torch.ones(g.n, dtype=torch.bool) if g.mask is None else g.mask for g in of])
            assert (norm.weight[~keep] == 0).all() and (norm.bias[~keep] == 0).all() and (norm.weight[keep] != 0).all()
        with warnings.catch_warnings():
            warnings.simplefilter('error'); small = shrink(m, x)
        assert [small.stem.out_channels, small.up.out_channels, small.dw.groups, small.grow.out_channels] == [n[0]-pruned[0], n[1]-pruned[1], n[1]-pruned[1], n[2]-pruned[2]]
        assert close(outputs(m, x), outputs(small, x))

def test_gradients_of_coupled_filters_and_their_norms_do_not_count():
    model,x = res(), torch.randn(2, 4, 8, 8)
    sp = Sparsifier(model, 'filter', coupled=True, sample=x)
    sp.sparsify(.5)
    model(x).square().sum().backward()
    sp.apply_grad()
    for l in sp.layers:
        pruned = ~sp.masks[l.name].flatten(1).any(1)
        assert pruned.any() and (l.module.weight.grad[pruned] == 0).all() and (l.module.weight.grad[~pruned] != 0).any()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(((m.weight == 0) <= (m.weight.grad == 0)).all() and ((m.weight == 0) <= (m.bias.grad == 0)).all() for m in norms)

def test_the_score_of_a_group_is_the_mean_over_all_its_weights():
    m,x = res(),torch.randn(2, 4, 8, 8)
    w = torch.cat([m.stem.weight.flatten(1), m.down.weight.flatten(1)], 1).abs().mean(1)
    sp = Sparsifier(m, 'filter', sample=x, coupled=True); sp.update(.5)
    assert set((~sp.groups[0].mask).nonzero().flatten().tolist()) == set(w.argsort()[:4].tolist())

def test_coupled_in_training_resuming_and_keeping(learner):
    learn = learner(model=res(), opt_func=Adam)
    fit(learn, 3, cbs=SparsifyCallback(.5, 'filter', 'local', coupled=True))
    r = measured_sparsity(learn.model, granularity='filter')
    assert [row[5] for row in r.rows] == [4, 8, 8, 4, 3]
    pruned = learn.model.n2.weight == 0
    assert pruned.sum() == 4+3
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = shrink(learn.model, learn.dls.one_batch()[0])
    before = state(learn)
    fit(learn, 1, cbs=KeepSparsity(coupled=True)) # the norm behind the concatenation stays zero
    assert torch.equal(learn.model.n2.weight == 0, pruned) and torch.equal(learn.model.n2.bias == 0, pruned) and [row[5] for row in measured_sparsity(learn.model, granularity='filter').rows] == [4, 8, 8, 4, 3]
    assert not same(before, state(learn))
    fit(learn, 2, cbs=SparsifyCallback(.75, 'filter', 'local', coupled=True)) # goes on from what is pruned
    assert [row[5] for row in measured_sparsity(learn.model, granularity='filter').rows] == [6, 12, 12, 6, round(.75*6)] and (learn.model.n2.weight[pruned] == 0).all()

def test_what_was_zero_in_one_layer_alone_stays_zero():
    m,x = res(),torch.randn(2, 4, 8, 8)
    with torch.no_grad(): m.down.weight[5] = 0.
    sp = Sparsifier(m, 'filter', sample=x, coupled=True); sp.update(.25)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1)
    sp.apply()
    assert (m.down.weight[5] == 0).all() and sp.groups[0].n_pruned == 2

def test_coupled_layers_out_of_scope_or_frozen(learner):
    m,x = res(),torch.randn(2, 4, 8, 8)
    sp = Sparsifier(m, 'filter', sample=x, coupled=True, exclude='down'); sp.update(.5)
    assert (m.n1.weight != 0).all() and (m.n0.weight == 0).sum() == 4 # the norm of the layer that stays live
    learn = learner(model=res()); learn.model.down.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match='2 of 5 layers to prune are frozen .or coupled to one that is.'): fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', 'local', coupled=True))
    assert [row[5] for row in measured_sparsity(learn.model, granularity='filter').rows] == [0, 8, 8, 0, 3]

def test_the_networks_output_is_not_pruned_if_coupled():
    m,x = res(),torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match='output of the network: head'): Sparsifier(m, 'filter', layers=both, sample=x, coupled=True).sparsify(.5)
    assert (m.head.weight != 0).flatten(1).any(1).all()
    with pytest.raises(ValueError, match='leaves no layer to prune'): Sparsifier(m, 'filter', layers='head', sample=x, coupled=True)

def test_regrowing_coupled_filters():
    m,x = res(),torch.randn(2, 4, 8, 8)
    sp = Sparsifier(m, 'filter', sample=x, coupled=True, regrow=True)
    sp.update(.5); sp.update(.25); assert [g.n_pruned for g in sp.groups] == [2, 4, round(.25*6)] and [int((~m).flatten(1).all(1).sum()) for m in sp.masks.values()] == [2, 4, 4, 2, 2]
    sp.update(0.); assert [g.n_pruned for g in sp.groups] == [0, 0, 0] and all(m.all() for m in sp.masks.values())

def test_a_sparsity_for_each_group(learner):
    learn = learner(model=res())
    fit(learn, 2, cbs=SparsifyCallback({'stem': .5, 'down': .5, 'grow': .5}, 'filter', coupled=True))
    assert [row[5] for row in measured_sparsity(learn.model, granularity='filter').rows] == [4, 0, 0, 4, 3]
    learn = learner(model=res())
    with pytest.raises(ValueError, match='stem, down are coupled, so they need the same sparsity'): fit(learn, 2, cbs=SparsifyCallback({'stem': .5, 'down': .25}, 'filter', coupled=True))

@pytest.mark.bad_input
def test_bad_use_of_coupled():
    with pytest.raises(ValueError, match="pass granularity='filter'"): SparsifyCallback(.5, coupled=True)
    with pytest.raises(ValueError, match='pass sample='): Sparsifier(res(), 'filter', coupled=True)
    with pytest.raises(ValueError, match='is for whole filters'): Sparsifier(res(), 'kernel', coupled=True, sample=torch.randn(2, 4, 8, 8))
    with pytest.raises(TypeError, match='coupled got'): SparsifyCallback(.5, 'filter', coupled=[['a', 'b']])

# in a Learner

optimizers = {'sgd': SGD, 'momentum': lambda p, lr: SGD(p, lr, mom=.9), 'adam': Adam, 'rmsprop': RMSProp, 'torch adamw': lambda p, lr: OptimWrapper(p, torch.optim.AdamW, lr=lr)}

@pytest.mark.situation
@pytest.mark.parametrize('name', optimizers)
def test_the_learner_trains_on_with_its_optimizer(learner, name):
    "A step of the small network is the step of the large one, momentum and all"
    learn = learner(model=res(), opt_func=optimizers[name])
    fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', coupled=True))
    large,x = copy.deepcopy(learn.model),torch.randn(8, 4, 8, 8)
    opt_large = copy.deepcopy((learn.model, learn.opt)); n_state = len((learn.opt.opt if name == 'torch adamw' else learn.opt).state)
    learn.shrink(x)
    assert params(learn.model) < params(large) and close(outputs(large, x), outputs(learn.model, x))
    inner = learn.opt.opt if name == 'torch adamw' else learn.opt
    assert len(inner.state) == n_state
    for p,s in inner.state.items():
        for v in s.values():
            if isinstance(v, torch.Tensor) and v.ndim: assert v.shape == p.shape
    for m,opt in (opt_large, (learn.model, learn.opt)):
        m.eval(); opt.set_hypers(wd=0.) if name != 'torch adamw' else None # pruned weights of the large network must not move by themselves
        m(x).square().sum().backward(); opt.step(); opt.zero_grad()
    sp = Sparsifier(large, 'filter', sample=x, coupled=True)
    big = opt_large[0]
    sp.apply_to(big) # without the channels that were zero before the step
    assert close(outputs(big, x), outputs(learn.model, x), 1e-3)
    before = state(learn); fit(learn, 1); assert not same(before, state(learn))

@pytest.mark.fault
def test_an_error_while_the_optimizer_is_cut_changes_nothing_in_a_wrapped_network(learner, monkeypatch):
    learn = learner(model=nn.DataParallel(res()))
    fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', coupled=True))
    before,net,shapes = learn.model,learn.model.module,[p.shape for p in learn.model.parameters()]
    def fails(*args): raise RuntimeError('in between')
    monkeypatch.setattr('fasterprune.learner.cut_optimizer', fails)
    with pytest.raises(RuntimeError, match='in between'): learn.shrink()
    assert learn.model is before and before.module is net and [p.shape for p in learn.model.parameters()] == shapes

@pytest.mark.situation
def test_shrink_takes_a_batch_of_its_own_and_saves_and_loads(learner):
    learn = learner(model=nn.DataParallel(res()))
    fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', coupled=True))
    before = learn.validate()
    learn.shrink(round_to=2)
    assert isinstance(learn.model, nn.DataParallel) and list(learn.validate()) == pytest.approx(list(before), abs=1e-5)
    file = learn.save_sparse('a'); kept = state(learn)
    assert file == learn.path/'models/a.safetensors.zst'
    fit(learn, 1); assert learn.load_sparse('a') is learn and same(kept, state(learn))
    learn.save('b'); learn.load('b'); assert same(kept, state(learn))

@pytest.mark.situation
@pytest.mark.parametrize('opt', [Adam, OptimWrapper])
def test_a_cut_network_that_is_loaded_into_a_learner_trains_on(learner, tmp_path, opt):
    "By the function as by the method: what the optimizer remembers is of other shapes"
    from functools import partial
    how = partial(OptimWrapper, opt=torch.optim.AdamW) if opt is OptimWrapper else opt
    learn,x = learner(opt_func=how),torch.randn(2, 4, 6, 6); fit(learn, 1)
    small = copy.deepcopy(learn.model); Sparsifier(small, 'filter', exclude=['0', '3']).sparsify(.5)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); small = shrink(small, x)
    save_sparse(small, tmp_path/'f'); assert load_sparse(tmp_path/'f', learn) is learn
    assert params(learn.model) == params(small) and same(small.state_dict(), learn.model.state_dict())
    fit(learn, 1); assert not torch.equal(small[6].weight, learn.model[6].weight)

@pytest.mark.situation
def test_frozen_and_unfrozen_after_the_cut(learner):
    learn = learner(model=res(), splitter=lambda m: [[*m.stem.parameters(), *m.n0.parameters()], [p for n,p in m.named_parameters() if not n.startswith(('stem', 'n0'))]])
    fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', coupled=True)); learn.shrink(); learn.freeze()
    assert not learn.model.stem.weight.requires_grad and learn.model.up.weight.requires_grad
    w = learn.model.stem.weight.clone(); fit(learn, 1); assert torch.equal(w, learn.model.stem.weight)
    learn.unfreeze(); fit(learn, 1, lr=slice(1e-3, 1e-2)); assert not torch.equal(w, learn.model.stem.weight)

def test_an_error_leaves_the_learner_as_it_was(learner):
    learn = learner(model=res()); fit(learn, 1); model,opt,before = learn.model,learn.opt,state(learn)
    with pytest.raises(ValueError, match='no filter of this model is zero'): learn.shrink()
    assert learn.model is model and learn.opt is opt and same(before, state(learn))

# 2:4 and export

def test_two_of_four_is_what_torch_wants():
    "What torch.sparse.to_sparse_semi_structured asks for: at most two of every four along the rows, and sizes that fit; the conversion itself needs a GPU"
    torch.manual_seed(0); m = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).half()
    Sparsifier(m, '2:4', layers=nn.Linear).sparsify(.5)
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass
    for l in (m[0], m[2]):
        assert (l.weight.unflatten(1, (-1, 4)) != 0).sum(2).unique().tolist() == [2]
        values,meta = sparse_semi_structured_from_dense_cutlass(l.weight.detach()) # raises unless the pattern is there
        assert values.shape == (l.out_features, l.in_features//2) and torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), l.weight)

def test_exports_of_the_sparse_and_the_small_network(tmp_path):
    import onnxruntime
    m,x = res().eval(),torch.randn(2, 4, 8, 8)
    Sparsifier(m, 'filter', sample=x, coupled=True).sparsify(.5)
    for net in (m, shrink(m, x)):
        assert close(outputs(m, x), torch.jit.trace(net, x)(x)) and close(outputs(m, x), torch.export.export(net, (x,)).module()(x))
        torch.onnx.export(net, (x,), tmp_path/'m.onnx', dynamo=True, external_data=False, verbose=False)
        s = onnxruntime.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
        assert close(outputs(m, x), torch.from_numpy(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]))
