"The engine: outputs equal to PyTorch's, the model untouched, a plan that says what runs how, errors that help"
import copy, io, json, math, os, pickle, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fasterprune import engine, kernels, saved
from fasterprune.allocation import by_multiplications, multiplications, uses
from fasterprune.batches import largest_error
from fasterprune.engine import fast_cpu
from fasterprune.planes import Chain, Conv, Planes, TapLayer
from fasterprune.saved import load_fast_cpu
from fasterprune.sparsifier import Sparsifier
from fasterprune.storage import save_sparse
from fasterprune.surgery import shrink

@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    "Results, not times: one round is enough"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    real = engine.race
    monkeypatch.setattr(engine, 'race', lambda *calls, seconds=1.: real(*calls, seconds=0))
    yield
    torch.set_num_threads(n)

def sparse(m, s=.8):
    for l in m.modules():
        if isinstance(l, (nn.Conv2d, nn.Linear)): l.weight.data[torch.rand_like(l.weight) < s] = 0
        if isinstance(l, nn.BatchNorm2d) and l.track_running_stats:
            for t in (l.weight, l.running_var): nn.init.uniform_(t, .5, 1.5)
            for t in (l.bias, l.running_mean): nn.init.normal_(t)
    return m.eval()

def all_sparse(m): return {n: 'sparse' for n,l in m.named_modules() if isinstance(l, (nn.Conv2d, nn.Linear))}

@torch.no_grad()
def check(m, x, plan='all'):
    "The program itself, whether it is faster or not"
    fast = fast_cpu(m, x, all_sparse(m) if plan == 'all' else plan)
    got,wanted = fast.first(x)[0],m(x)
    assert (got - wanted).abs().max() <= 1e-5*wanted.abs().max()
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
    return fast

def how(fast): return {name: how for name,how,*_ in fast.first.report}

class Residual(nn.Module):
    def __init__(self, ni, nf, stride=1):
        super().__init__()
        self.a,self.n,self.b,self.m = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf),nn.Conv2d(nf, nf, 3, 1, 1),nn.BatchNorm2d(nf)
        self.short = nn.Conv2d(ni, nf, 1, stride)
    def forward(self, x): return F.relu(self.m(self.b(F.relu_(self.n(self.a(x))))) + self.short(x))

class Mobile(nn.Module):
    "Inverted residual with squeeze-and-excite"
    def __init__(self, n, act):
        super().__init__()
        self.expand,self.norm = nn.Conv2d(n, 2*n, 1, bias=False),nn.BatchNorm2d(2*n)
        self.depth,self.act = nn.Conv2d(2*n, 2*n, 5, 1, 2, groups=2*n, bias=False),act
        self.down,self.up,self.project = nn.Conv2d(2*n, 4, 1),nn.Conv2d(4, 2*n, 1),nn.Conv2d(2*n, n, 1)
    def forward(self, x):
        y = self.act(self.depth(self.act(self.norm(self.expand(x)))))
        y = y*torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y)

class Dense(nn.Module):
    "Concatenations, a lone BatchNorm, pooling"
    def __init__(self, n):
        super().__init__()
        self.norm,self.conv,self.last = nn.BatchNorm2d(n),nn.Conv2d(n, 8, 3, padding=1),nn.Conv2d(n + 8, 8, 1)
    def forward(self, x):
        y = torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)
        return F.avg_pool2d(F.relu(self.last(F.max_pool2d(F.relu(y), 3, 2, 1))), 2)

def tail(n): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(n, 7)]

nets = dict(
    plain=lambda: nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU6(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 24, 3), nn.LeakyReLU(.1), *tail(24)),
    residual=lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), Residual(16, 16), Residual(16, 24, 2), *tail(24)),
    mobile=lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), Mobile(16, nn.SiLU()), Mobile(16, nn.ReLU6()), *tail(16)),
    dense=lambda: nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), Dense(12), nn.Conv2d(8, 8, 3, 1, 2, 2, groups=2), *tail(8)))

@pytest.mark.parametrize('name', nets)
def test_outputs_are_equal(name):
    fast = check(sparse(nets[name]()), torch.randn(2, 3, 21, 34))
    runs = how(fast)
    assert all(runs[n] == 'sparse' for n in runs if n in fast.plan), runs
    allowed = dict(plain=set(), residual=set(), mobile={'sigmoid', 'sigmoid_1'}, dense={'avg_pool2d'})[name]
    assert {n for n in runs if runs[n] == 'PyTorch'} <= allowed | {'adaptive_avg_pool2d', 'adaptive_avg_pool2d_1', 'adaptive_avg_pool2d_2', 'view', 'clone'}, runs # clone: torch 2.6

def test_dense_and_sparse_layers_mix():
    m = sparse(nets['residual']())
    names,x = list(all_sparse(m)),torch.randn(1, 3, 16, 16)
    for odd in (0, 1): check(m, x, {n: 'sparse' if i % 2 == odd else 'dense' for i,n in enumerate(names)})
    check(m, x, {n: 'dense' for n in names})

def test_measured_rule_leaves_no_layer_open():
    m = sparse(nets['residual']())
    fast = check(m, torch.randn(1, 3, 16, 16), None)
    assert set(fast.plan) == set(all_sparse(m)) and set(fast.plan.values()) <= {'sparse', 'dense'}

def test_model_is_untouched():
    m = sparse(nets['residual']()).train()
    m[2].eval()
    before,modes = copy.deepcopy(m.state_dict()),[l.training for l in m.modules()]
    x = torch.randn(2, 3, 16, 16)
    y,fast = x.clone(),fast_cpu(m, x)
    assert all(torch.equal(before[k], v) for k,v in m.state_dict().items()) and modes == [l.training for l in m.modules()] and torch.equal(x, y)
    out = fast(x).clone()
    with torch.no_grad(): [p.zero_() for p in m.parameters()]
    assert torch.equal(fast(x), out) # a copy: what happens to the model later does not matter

def test_batches_and_other_sizes():
    m = sparse(nets['residual']())
    fast = fast_cpu(m, torch.randn(1, 3, 16, 16), all_sparse(m))
    with torch.no_grad():
        for shape in ((5, 3, 16, 16), (1, 3, 17, 23), (3, 3, 8, 8), (1, 3, 16, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), m(x), rtol=1e-4, atol=1e-4)
    assert len(fast.programs) == 3

@pytest.fixture
def always_faster(monkeypatch): monkeypatch.setattr(engine, 'race', lambda *calls, seconds=1.: [1. + i for i in range(len(calls))])

class Less(nn.Module):
    "Something of the batch is taken off its items"
    def __init__(self, of):
        super().__init__()
        self.of = of
    def forward(self, x): return x - self.of(x)

dependent = dict(norm=lambda: nn.BatchNorm2d(8, track_running_stats=False), mean=lambda: Less(lambda x: x.mean(0)), first=lambda: Less(lambda x: x[:1]), largest=lambda: Less(lambda x: x.amax()/9),
    count=lambda: Less(lambda x: len(x)/9), place=lambda: Less(lambda x: torch.arange(len(x)).view(-1, 1, 1, 1)), roll=lambda: Less(lambda x: x.roll(1, 0)))

@pytest.mark.parametrize('name', dependent)
@pytest.mark.parametrize('sample', [torch.zeros, torch.ones, torch.randn, lambda *shape: torch.arange(float(math.prod(shape))).view(shape)])
def test_items_that_depend_on_each_other_are_not_divided(name, sample, always_faster):
    m = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), dependent[name](), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    fast,x = fast_cpu(m, sample(1, 3, 12, 12)),torch.randn(5, 3, 12, 12)*torch.arange(1, 6).view(5, 1, 1, 1)
    with torch.no_grad(): torch.testing.assert_close(fast(x), m(x), rtol=1e-4, atol=1e-4)
    assert fast.first.used and fast.items == 0 and set(how(fast).values()) >= {'sparse'} and 'program of its own' in repr(fast)

class Beside(nn.Module):
    "Two inputs, and what `end` makes of both"
    def __init__(self, end):
        super().__init__()
        self.conv,self.end,self.k = nn.Conv2d(3, 8, 3, padding=1),end,nn.Parameter(torch.randn(1, 5))
    def forward(self, x, t): return self.end(self.conv(x), t, self.k)

def per_image(t): return t.view(-1, 1, 1, 1)

@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('end,items', [(lambda y, t, k: y/t[0], 0), (lambda y, t, k: (y, k), 0), (lambda y, t, k: (y, y.sum()), 0), (lambda y, t, k: (y, None), 0),
    (lambda y, t, k: y/per_image(t), 1), (lambda y, t, k: dict(y=y/per_image(t), rows=y.flatten(0, 1)), 1)])
def test_inputs_and_outputs_that_are_not_of_items(n, end, items, always_faster):
    "One value for all, in or out, also if the sample has as many items as there are values"
    m,x,t = sparse(Beside(end)),torch.randn(5, 3, 8, 8),torch.rand(5) + 1
    fast = fast_cpu(m, (x[:n], t[:n]))
    assert fast.first.used and fast.items == n*items
    for i in ((x, t), (x[:4], t[:4]), (x[:1], t[:1])):
        with torch.no_grad(): torch.testing.assert_close(fast(*i), m(*i), rtol=1e-4, atol=1e-4)
    assert len(fast.programs) <= (n + 1 if items else 4)

few = [(lambda y, t, k: y/t[0], torch.arange(2, 7), 'a whole number'), (lambda y, t, k: y - t[0], torch.arange(5.), 'zero'),
       (lambda y, t, k: y*t.any(), torch.tensor([True, False, False, True, True]), 'a bool'), (lambda y, t, k: y - y.roll(2, 0), torch.rand(5), 'the one before the last'),
       (lambda y, t, k: (y - y.mean(0)).flatten(1).argmax(1), torch.rand(5), 'a class')]
@pytest.mark.parametrize('end,t', [f[:2] for f in few], ids=[f[2] for f in few])
@pytest.mark.parametrize('n', [1, 2])
def test_dependence_that_is_hard_to_see(n, end, t, always_faster):
    "Other items may look the same as the sample, or their outputs"
    m,x = sparse(Beside(end)),torch.randn(5, 3, 8, 8)
    fast = fast_cpu(m, (x[:n], t[:n]))
    with torch.no_grad(): torch.testing.assert_close(fast(x, t), m(x, t), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('value', [torch.tensor([2.]), torch.tensor(2.)])
def test_one_value_for_all_images(value, always_faster):
    "Images of the sample's number or of another, and a value that is not one of each"
    m,x = sparse(Beside(lambda y, t, k: y.mean((2, 3))/t)),torch.randn(5, 3, 8, 8)
    fast = fast_cpu(m, (x[:1], value))
    for y in (x, x[:1]):
        with torch.no_grad(): torch.testing.assert_close(fast(y, value), m(y, value), rtol=1e-4, atol=1e-5)

def test_integers_that_are_all_the_same_leave_it_open(always_faster):
    "Nothing shows then whether items depend on each other: they are not divided"
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words,self.lin = nn.Embedding(9, 8),nn.Linear(8, 16)
        def forward(self, i): return self.lin(self.words(i) - self.words(i).mean(0))
    m,i = sparse(Words()),torch.arange(6).view(2, 3)
    for sample in (i[:1], torch.ones(1, 3, dtype=torch.int64)):
        fast = fast_cpu(m, sample)
        with torch.no_grad(): torch.testing.assert_close(fast(i), m(i), rtol=1e-4, atol=1e-5)
        assert fast.first.used and fast.items == 0

def test_results_of_two_calls_do_not_share_memory():
    m = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    fast = fast_cpu(m, torch.randn(1, 3, 8, 8), all_sparse(m))
    x = torch.randn(1, 3, 8, 8)
    first = fast.first(x)[0]
    kept = first.clone()
    fast.first(torch.randn(1, 3, 8, 8))
    assert torch.equal(first, kept)

def test_plan_through_json():
    m,x = sparse(nets['residual']()),torch.randn(1, 3, 16, 16)
    fast = fast_cpu(m, x)
    again = fast_cpu(m, x, json.loads(json.dumps(fast.plan)))
    assert again.plan == fast.plan and how(again) == how(fast) and repr(again).count('given') == 2*len(fast.plan)
    with pytest.raises(ValueError, match="layers, which are 0, .*'0.conv'"): fast_cpu(m, x, {'0.conv': 'sparse'})
    with pytest.raises(ValueError, match="'sparse' or 'dense'.*'quick'"): fast_cpu(m, x, {'0': 'quick'})

def test_plan_says_what_runs_how():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.up = nn.Conv2d(3, 8, 3, padding=1),nn.ConvTranspose2d(8, 4, 2, 2)
        def forward(self, x): return self.up(F.softplus(self.conv(x))).cumsum(1)
    m = sparse(Odd())
    fast = check(m, torch.randn(2, 3, 9, 9))
    assert how(fast) == {'conv': 'sparse', 'softplus': 'PyTorch', 'conv_transpose2d': 'PyTorch', 'cumsum': 'PyTorch'}
    assert all(w in repr(fast) for w in ('2×3×9×9', 'conv ', 'softplus', 'PyTorch'))

@pytest.mark.parametrize('batch,h,w', [(1, 13, 22), (4, 9, 7), (5, 8, 8)])
def test_paddings_strides_and_transposes(batch, h, w):
    "Whatever a convolution pads with, and however it is cut up: the same outputs"
    kinds = [dict(padding='same', dilation=2), dict(padding=1, padding_mode='reflect'), dict(padding=2, padding_mode='circular'),
        dict(padding=(2, 0), stride=(1, 2)), dict(padding=1, stride=2, groups=8), dict(padding=1, padding_mode='replicate', groups=2)]
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, **k) for k in kinds), nn.ConvTranspose2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 1))
    runs = how(check(sparse(m), torch.randn(batch, 3, h, w), None))
    assert runs['conv_transpose2d'] == 'PyTorch'

def test_linear_layers_of_any_shape():
    "Sparse: a batch of vectors, of sequences, and of images with their channels last"
    m = sparse(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 9), nn.SiLU()))
    for shape in ((5, 12), (2, 7, 12), (2, 4, 3, 12)): assert how(check(m, torch.randn(shape)))['0'] == 'sparse'

def test_batchnorm_after_a_linear_layer_on_images():
    "The channels of the one are the second dimension, those of the other the last"
    runs = how(check(sparse(nn.Sequential(nn.Linear(24, 4), nn.BatchNorm2d(4), nn.ReLU())), torch.randn(2, 4, 4, 24)))
    assert runs['0'] == 'sparse' and len(runs) == 2

def test_nothing_is_done_with_nothing():
    "An empty batch, and an empty part of a batch that goes through layers of its own"
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3),nn.Linear(8, 5)
        def forward(self, x):
            y = self.a(x)
            return y,self.c(self.b(y[:0]).relu().mean((2, 3)))
    m = sparse(Part())
    fast = fast_cpu(m, torch.randn(2, 3, 8, 8), {'a': 'sparse'})
    assert how(fast)['a'] == 'sparse' and [o.shape for o in fast(torch.randn(0, 3, 8, 8))] == [(0, 8, 8, 8), (0, 5)]

@pytest.mark.parametrize('batch,shape', [(1, (1280,)), (3, (1280,)), (4, (600, 5, 5))])
def test_many_inputs_on_few_pixels(batch, shape):
    "The inputs are walked in blocks, and the sums that rest in a channel meanwhile are not the next channel's to overwrite"
    layer = nn.Linear(*shape, 40) if len(shape) == 1 else nn.Conv2d(shape[0], 40, 1)
    check(sparse(nn.Sequential(layer), .1), torch.randn(batch, *shape))

def test_saved_and_loaded(tmp_path):
    m,x = sparse(nets['mobile']()),torch.randn(1, 3, 16, 16)
    fast,before = fast_cpu(m, x, all_sparse(m)),nets['mobile']()
    kept = copy.deepcopy(before.state_dict())
    size = fast.save(tmp_path/'net')
    again = load_fast_cpu(tmp_path/'net', nn.DataParallel(before), x)
    assert again.plan == fast.plan and size == (tmp_path/'net').stat().st_size
    assert torch.equal(again.first(x)[0], fast.first(x)[0]) and all(torch.equal(kept[k], v) for k,v in before.state_dict().items())
    with pytest.raises(ValueError, match='of another model'): load_fast_cpu(tmp_path/'net', nets['plain'](), x)

def test_network_that_was_cut_is_saved_and_loaded():
    def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    m,x,file = net().eval(),torch.randn(1, 3, 8, 8),io.BytesIO()
    m[0].weight.data[:3] = m[0].bias.data[:3] = 0
    small = shrink(m, x)
    fast = fast_cpu(small, x)
    fast.save(file)
    file.seek(0)
    assert torch.equal(load_fast_cpu(file, net(), x)(x), fast(x)) and len(small[0].weight) == 5

@pytest.mark.parametrize('plan', [['0', 'sparse'], {'0': 'import os'}, {'0': ['sparse']}, {'1': 'sparse'}])
def test_a_file_can_say_nothing_but_how_layers_run(plan):
    m,x,file = nn.Sequential(nn.Conv2d(3, 8, 3)),torch.randn(1, 3, 8, 8),io.BytesIO()
    save_sparse(saved._Planned(m, plan), file)
    file.seek(0)
    with pytest.raises(ValueError, match='plan'): load_fast_cpu(file, m, x)

def test_wrappers_are_taken_off():
    m,x = sparse(nets['plain']()),torch.randn(1, 3, 16, 16)
    for wrapped in (nn.DataParallel(m), torch.compile(m), nn.DataParallel(torch.compile(m))):
        assert set(fast_cpu(wrapped, x).plan) == set(all_sparse(m))

def test_padding_of_a_maximum_over_negative_values():
    m = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3, 2, 1)))
    m[0].bias.data -= 100
    assert how(check(m, torch.randn(1, 3, 9, 9)))['max_pool2d'] == 'PyTorch'
    check(sparse(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 8, 3))), torch.randn(1, 3, 9, 9))

def test_in_place_operations_reach_later_users():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1)
        def forward(self, x):
            y = self.a(x)
            z = self.b(y.relu_())
            return z.add_(y) + y
    check(sparse(Net()), torch.randn(1, 3, 9, 9))

def test_structured_outputs_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
        def forward(self, x, y): return dict(sum=self.conv(x) + self.conv(y), both=(x, self.conv(y)))
    m,x = sparse(Two()),(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    fast = fast_cpu(m, x)
    fast.first.run = fast.first.output
    with torch.no_grad(): got,wanted = fast(*x),m(*x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

class Outputs(nn.Module):
    "A convolution, and beside it what `also` makes of its output"
    def __init__(self, also):
        super().__init__()
        self.conv,self.also = nn.Conv2d(3, 8, 3, padding=1),also
    def forward(self, x):
        y = self.conv(x)
        return y,self.also(y)

@pytest.mark.parametrize('also', [lambda y: y.mean((1, 2, 3)) > 0, lambda y: y[:0], lambda y: y.argmax(1), lambda y: torch.fft.rfft(y),
    lambda y: y.masked_fill(y > 0, -math.inf), lambda y: (y - y).log()*0, lambda y: y.double(), lambda y: None, lambda y: 3])
def test_outputs_of_all_kinds(also):
    m,x = sparse(Outputs(also)),torch.randn(2, 3, 8, 8)
    fast = fast_cpu(m, x, all_sparse(m))
    assert fast.first.error < 1e-5
    with torch.no_grad(): torch.testing.assert_close(fast.first.output(x), m(x), rtol=1e-4, atol=1e-5, equal_nan=True)

def test_every_kind_of_difference_counts():
    inf,nan,t = math.inf,math.nan,torch.tensor
    def error(a, b): return largest_error(t(a), t(b))
    assert error([1., 2.5], [1., 2.]) == .25 and error([1, 4], [1, 2]) == 1 and error([True, False], [True, True]) == 1
    for a in ([inf, nan, 1.], [-inf, nan, 0.], [0., nan, 1.]): assert (error(a, [inf, nan, 1.]) == 0) == (a == [inf, nan, 1.])
    for a,b in (([nan], [1.]), ([1.], [nan]), ([1.], [inf]), ([-inf], [inf]), ([1.], [1]), ([1.], [1., 1.])): assert error(a, b) == inf

def test_an_output_that_differs_is_found_beside_others(monkeypatch):
    "Also after one that agrees, and if it is infinite somewhere"
    m,x = sparse(Outputs(lambda y: y.masked_fill(y > 1, -math.inf))),torch.randn(2, 3, 8, 8)
    real = engine.Program.__call__
    monkeypatch.setattr(engine.Program, '__call__', lambda self, *i: [o + n for n,o in enumerate(real(self, *i))])
    fast = fast_cpu(m, x, all_sparse(m))
    assert fast.first.error > .1 and not fast.first.used and 'the outputs differ' in repr(fast)

@pytest.mark.parametrize('combine', [torch.mul, torch.add, lambda a, b: torch.cat([a, b], 1)])
def test_types_are_those_of_the_model(combine):
    "float64 where a constant is of float64"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.last = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1)
            self.register_buffer('k', torch.rand(1, 8, 8, 8, dtype=torch.float64))
        def forward(self, x): return combine(self.last(self.conv(x)), self.k)
    m,x = sparse(Scaled()),torch.randn(1, 3, 8, 8)
    fast = fast_cpu(m, x, all_sparse(m))
    assert fast.first.error < 1e-5 and fast.first.output(x).dtype == torch.float64

def test_inputs_of_all_kinds(always_faster):
    "Dicts, lists, numbers and None; another number is another program, and so is another order of names"
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
        def forward(self, d, l, k, e=None): return self.conv(d['x'] - d['y'])*k + l[0]
    m,(x,y,z) = sparse(Kinds()),torch.randn(3, 4, 3, 8, 8)
    l = [torch.randn(4, 8, 8, 8), None]
    fast = fast_cpu(m, (dict(x=x, y=y), l, 3, None), all_sparse(m))
    for i in ((dict(x=x, y=z), l, 3, None), (dict(x=x, y=y), l, 2.5, None), (dict(y=y, x=x), l, 3, None)):
        with torch.no_grad(): torch.testing.assert_close(fast(*i), m(*i), rtol=1e-4, atol=1e-5)
    assert len(fast.programs) == 3 and fast.first.used and '4×3×8×8 and 4×3×8×8 and 4×8×8×8' in repr(fast)
    with pytest.raises(ValueError, match='float32.*float64'): fast(dict(x=x.double(), y=y), l, 3, None)

def test_a_dict_is_divided_too(always_faster):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
        def forward(self, d): return dict(y=self.conv(d['x']))
    m,x = sparse(Named()),torch.randn(5, 3, 8, 8)
    fast = fast_cpu(m, dict(x=x[:1]))
    with torch.no_grad(): torch.testing.assert_close(fast(dict(x=x)), m(dict(x=x)), rtol=1e-4, atol=1e-5)
    assert len(fast.programs) == fast.items == 1

class Keeps(nn.Module):
    "A model that keeps an activation, as for a loss of its own; its input is a dict"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
    def forward(self, d):
        self.features = self.conv(d['x'])
        return self.features.relu().mean((2, 3))

keeps_activations = pytest.mark.skipif(torch.__version__ < (2, 7), reason='torch.export reads no such model')

@keeps_activations
def test_a_model_that_keeps_an_activation(tmp_path):
    m,d = sparse(Keeps()),dict(x=torch.randn(2, 3, 8, 8))
    m(d)
    fast = fast_cpu(m, d, all_sparse(m))
    fast.save(tmp_path/'net')
    again = load_fast_cpu(tmp_path/'net', m, d)
    with torch.no_grad(): torch.testing.assert_close((fast.first(d['x'])[0], again.first(d['x'])[0]), (m(d),)*2, rtol=1e-4, atol=1e-5)

@keeps_activations
def test_a_learner_whose_batches_are_dicts():
    from fasterprune.learner import Learner
    from fastai.data.core import DataLoaders
    class Images(torch.utils.data.Dataset):
        def __len__(self): return 6
        def __getitem__(self, i): return dict(x=torch.randn(3, 8, 8)),torch.tensor(0)
    m,dl = sparse(Keeps()),torch.utils.data.DataLoader(Images(), 3)
    m(dict(x=torch.randn(2, 3, 8, 8)))
    learn = Learner(DataLoaders(dl, dl), m, loss_func=nn.CrossEntropyLoss())
    d = dict(x=torch.randn(1, 3, 8, 8))
    fast = learn.fast_cpu()
    assert fast.shapes == [(1, 3, 8, 8)]
    with torch.no_grad(): torch.testing.assert_close(fast(d), m(d), rtol=1e-4, atol=1e-5)

def test_values_that_are_returned_are_kept():
    "An output that other layers read too, as in a feature pyramid: its memory is not used again"
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        def forward(self, x):
            outs = [self.layers[0](x)]
            for l in self.layers[1:]: outs.append(l(outs[-1]))
            return outs
    m,x = sparse(Pyramid()),torch.randn(1, 3, 9, 9)
    fast = fast_cpu(m, x, all_sparse(m))
    with torch.no_grad(): torch.testing.assert_close(list(fast.first(x)), m(x), rtol=1e-5, atol=1e-5)

def test_layer_without_weights_left_and_many_zero_channels():
    m = sparse(nets['residual']())
    m[2].a.weight.data.zero_()
    m[3].b.weight.data[5:] = 0
    check(m, torch.randn(1, 3, 16, 16))

@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('k,s,p,d,g', [(3, 1, 1, 1, 1), (5, 2, 2, 1, 8), (1, 1, 0, 1, 1), (7, 3, 2, 1, 2), (2, 2, 0, 1, 1), (3, 2, 2, 2, 1)])
def test_layers(k, s, p, d, g, threads):
    torch.set_num_threads(threads)
    x,w,b = torch.randn(2, 8, 15, 11),torch.randn(16, 8//g, k, k),torch.randn(16)
    w[torch.rand_like(w) < .7] = 0
    wanted,conv = F.conv2d(x, w, b, s, p, d, g).clamp(0, 6),Conv(w, b, (s, s), (p, p), (d, d), g, lo=0., hi=6.)
    pads = conv.padding_needed(x.shape, wanted.shape)
    if x.shape[2:] == wanted.shape[2:]: pads = (max(pads),)*2
    source,out = Planes(x.shape, pads[0]),Planes(wanted.shape, pads[1])
    source.view.copy_(x)
    Chain([TapLayer(conv, source, out)])()
    torch.testing.assert_close(out.view, wanted, rtol=1e-5, atol=1e-5)
    assert out.data.count_nonzero() == wanted.count_nonzero() # nothing between the rows

def layers_in_a_row(threads, n=6):
    "Convolutions and a pooling in one chain; the planes that it ends in, and what PyTorch says"
    torch.set_num_threads(threads)
    x = wanted = torch.randn(2, 8, 17, 13)
    planes = Planes(x.shape, 1)
    planes.view.copy_(x)
    layers = []
    for i in range(n):
        pool,stride = i == n-1,1 + (i == 2)
        w = torch.ones(8, 1, 3, 3) if pool else torch.randn(8, 8, 3, 3)*(torch.rand(8, 8, 3, 3) < .3)
        wanted = F.max_pool2d(wanted, 3, 1, 1) if pool else F.conv2d(wanted, w, None, stride, 1).relu()
        out = Planes(wanted.shape, 1)
        layers.append(TapLayer(Conv(w, None, (stride,)*2, (1, 1), groups=8 if pool else 1, lo=0., maximum=pool), planes, out))
        planes = out
    return Chain(layers),planes,wanted

@pytest.mark.parametrize('threads', [1, 2, 5, 11])
def test_a_chain_on_threads(threads):
    chain,out,wanted = layers_in_a_row(threads)
    for _ in range(20):
        out.view.zero_()
        chain()
        assert (out.view - wanted).abs().max() <= 1e-5*wanted.max()

def test_chains_of_several_networks_at_a_time():
    found = [layers_in_a_row(3) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda f: [f[0]() for _ in range(30)], found))
    for _,out,wanted in found: assert (out.view - wanted).abs().max() <= 1e-5*wanted.max()

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_chain_in_a_forked_process():
    chain,out,wanted = layers_in_a_row(2)
    chain()
    expected = out.data.numpy().copy()
    child = os.fork()
    if not child:
        out.data.numpy()[:] = 0
        chain()
        os._exit(0 if np.array_equal(out.data.numpy(), expected) else 1)
    for _ in range(600):
        done,status = os.waitpid(child, os.WNOHANG)
        if done: break
        time.sleep(.05)
    else: os.kill(child, 9)
    assert done and status == 0

def test_nan_is_not_hidden_by_a_relu():
    m = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), 0)
    x = torch.randn(1, 3, 8, 8)
    fast = fast_cpu(m, x, all_sparse(m))
    x[0, 0, 3, 3] = float('nan')
    assert fast.first(x)[0].isnan().sum() == 8*9

def test_errors():
    m,x = sparse(nets['plain']()),torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match='float32.*bfloat16'): fast_cpu(m, x.bfloat16())
    with pytest.raises(ValueError, match='float32.*float16'): fast_cpu(copy.deepcopy(m).half(), x)
    with pytest.raises(ValueError, match='on the processor.*meta'): fast_cpu(copy.deepcopy(m).to('meta'), x)
    class Moody(nn.Module):
        def forward(self, x): return x if x.sum() > 0 else -x
    with pytest.raises(ValueError, match='torch.export.*depends on a tensor'): fast_cpu(Moody(), x)

def test_without_llvmlite(monkeypatch):
    monkeypatch.setattr(kernels, 'llvm', None)
    with pytest.raises(ImportError, match=r"pip install 'fasterprune\[fast\]'"): fast_cpu(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8))

def test_slower_program_is_put_aside(monkeypatch):
    m,x = sparse(nets['plain'](), 0),torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(engine, 'race', lambda *calls, seconds=1.: [2.]*(len(calls)-1) + [1.])
    fast = fast_cpu(m, x)
    with torch.no_grad(): assert torch.equal(fast(x), m(x))
    assert not fast.first.used and 'PyTorch, which is faster' in repr(fast)

def test_multiplications():
    m = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ConvTranspose2d(8, 4, 2, 2), nn.Flatten(2), nn.Linear(64, 5))
    m[0].weight.data[0] = 0
    assert multiplications(m, torch.randn(3, 4, 8, 8)) == {'0': (16*8*18, 16*7*18), '1': (16*8*4*4,)*2, '3': (4*64*5,)*2}
    assert m.training

def test_uses_counts_all_that_is_made_of_an_image_and_leaves_no_trace():
    class Windows(nn.Module):
        def __init__(self): super().__init__(); self.lin,self.drop = nn.Linear(8, 4),nn.Dropout(.5)
        def forward(self, x): return self.lin(input=self.drop(x.flatten(0, 1)))
    m,chance = Windows(),torch.get_rng_state()
    assert uses(m, torch.randn(2, 4, 5, 8, generator=torch.Generator())) == {'lin': 20} and m.training
    assert torch.equal(torch.get_rng_state(), chance)

def test_uses_of_what_is_made_once_for_a_batch():
    class Positions(nn.Module):
        def __init__(self): super().__init__(); self.pe,self.lin = nn.Linear(8, 8),nn.Linear(8, 4)
        def forward(self, t, x): return self.lin(x + t*self.pe(torch.ones(3, 8)))
    assert uses(Positions(), (torch.tensor(1.), torch.randn(16, 3, 8))) == {'pe': 1, 'lin': 3}

@pytest.mark.bad_input
@pytest.mark.parametrize('sparsity,layers,text', [(90, nn.Linear, 'pass 0.9'), (.9, nn.Conv2d, 'no layer to prune'), (.9, 'nope', 'is not in the model')])
def test_by_multiplications_says_what_is_wrong(sparsity, layers, text):
    with pytest.raises(ValueError, match=text): by_multiplications(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 4)), torch.randn(2, 8), sparsity, layers=layers)

def test_by_multiplications_takes_names():
    m,x = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 8, 1)),torch.randn(1, 3, 32, 32)
    r = Sparsifier(m, context=by_multiplications(m, x, .9, layers=['0', '2']), layers=['0', '2']).sparsify(.9)
    assert r.zeros == round(.9*r.n) and list(r.layers) == ['0', '2']

def test_by_multiplications_reaches_both_targets():
    m,x = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1)),torch.randn(1, 3, 32, 32)
    names = ['0', '2', '4']
    shapes,dense = [m.get_submodule(n).weight.shape for n in names],[multiplications(m, x)[n][0] for n in names]
    context = by_multiplications(m, x, .9, .15)
    kept,sizes = 1 - np.array(context(.9, shapes, names)),np.array([s.numel() for s in shapes])
    assert abs(kept@sizes/sizes.sum() - .1) < 1e-3 and abs(kept@dense/sum(dense) - .15) < 1e-3
    assert all(0 <= s < 1 for s in context(.3, shapes, names))

def test_half_of_lamps_multiplications_unless_told_otherwise():
    m,x = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(32, 64, 3, padding=1)),torch.randn(1, 3, 32, 32)
    def left(fraction):
        copied = copy.deepcopy(m)
        Sparsifier(copied, context='lamp' if fraction is None else by_multiplications(m, x, .95, *fraction)).sparsify(.95)
        return sum(n for _,n in multiplications(copied, x).values())
    assert abs(left(())/left(None) - .5) < .05

# networks as people have them, of odd sizes and one to five images; `benchmarks/engine.py equal` has twelve, in full width and from timm too

def shallow(block): return lambda m: m.resnet.ResNet(getattr(m.resnet, block), [1, 1, 1, 1], num_classes=10)
def narrow(name, **kw): return lambda m: getattr(m, name)(num_classes=10, **kw)

known = dict(resnet=shallow('BasicBlock'), bottleneck=shallow('Bottleneck'), mobilenet_v2=narrow('mobilenet_v2', width_mult=.25), mobilenet_v3=narrow('mobilenet_v3_small', width_mult=.5),
    squeezenet=narrow('squeezenet1_1'), shufflenet=narrow('shufflenet_v2_x0_5'), mnasnet=narrow('mnasnet0_5'),
    densenet=lambda m: m.DenseNet(8, (2, 2, 2), 16, num_classes=10))

@pytest.mark.model
@pytest.mark.parametrize('name', known)
def test_known_networks(name):
    i = list(known).index(name)
    m = known[name](pytest.importorskip('torchvision').models)
    check(sparse(m, .9), torch.randn(1 + i % 5, 3, 65 + 7*i, 96))

@pytest.mark.model
@pytest.mark.parametrize('name', ['efficientnet_lite0', 'convnext_atto', 'regnety_002', 'ghostnet_050'])
def test_known_networks_of_timm(name):
    check(sparse(pytest.importorskip('timm').create_model(name), .9), torch.randn(2, 3, 67, 96))

class Writes(nn.Module):
    "Its input is scaled where it lies"
    def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    def forward(self, x): return self.net(x.div_(2).sub_(.1))

@torch.no_grad()
@pytest.mark.parametrize('size', [(2, 3, 9, 9), (5, 3, 9, 9), (3, 3, 12, 12)])
def test_a_network_that_writes_to_its_input_does_so_once(size, always_faster):
    m = sparse(Writes()); fast = fast_cpu(m, torch.randn(2, 3, 9, 9), all_sparse(m))
    assert fast.first.used and fast.items == 2
    for _ in range(2):
        x = torch.randn(size); a,b = x.clone(),x.clone()
        torch.testing.assert_close(fast(a), m(b)); assert torch.equal(a, b) and not torch.equal(a, x)

class Gated(nn.Module):
    "A gate that is infinite or NaN for some images, before a padded layer; memory is used again"
    def __init__(self): super().__init__(); self.a,self.b,self.c,self.gate = nn.Conv2d(3, 16, 3, padding=1),nn.Conv2d(16, 16, 3, padding=1),nn.Conv2d(16, 16, 3, padding=1),nn.Linear(16, 16)
    def forward(self, x):
        y = self.b(self.a(x).relu()).relu()
        g = self.gate(y.mean((2, 3)))[..., None, None]
        return self.b(self.c(y*g).relu().sort(2)[0]).relu()*g

@torch.no_grad()
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_an_image_of_nan_spoils_neither_its_neighbour_nor_the_next_call(bad, always_faster):
    m = sparse(Gated(), .3); x = torch.randn(3, 3, 9, 9); fast = fast_cpu(m, x, all_sparse(m)); assert fast.first.used
    y = torch.cat([x[:1], torch.full_like(x[:1], bad), x[2:]])
    got,wanted = fast(y),m(y)
    assert not wanted[1].isfinite().any() and not got[1].isfinite().any()
    torch.testing.assert_close(got[::2], wanted[::2], rtol=1e-4, atol=1e-4)
    for _ in range(2): torch.testing.assert_close(fast(x), m(x), rtol=1e-4, atol=1e-4)

def first_nets(): return sparse(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))

@pytest.mark.parametrize('mode', [torch.inference_mode, lambda: torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad, torch.enable_grad], ids=['inference', 'autocast', 'no_grad', 'enable_grad'])
def test_whatever_mode_a_program_is_made_in_it_can_be_used_in_another(mode, always_faster):
    m = first_nets(); a,b,c = torch.randn(2, 3, 9, 9),torch.randn(3, 3, 9, 9),torch.randn(2, 3, 14, 14)
    with torch.no_grad(): wanted = [m(x) for x in (a, b, c)]
    with mode(): fast = fast_cpu(m, a, all_sparse(m)); inside = [fast(x) for x in (a, b, c)]
    outside = [fast(x) for x in (a, b, c)]
    for got in (inside, outside): torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5) # types, too
    with mode(): torch.testing.assert_close(fast(a.clone()), wanted[0], rtol=1e-4, atol=1e-5)
    assert fast.first.used and not any(t.is_inference() or t.requires_grad for t in outside)

@torch.no_grad()
def test_memory_is_the_processors_whatever_the_defaults_are(always_faster):
    m,x = first_nets(),torch.randn(2, 3, 9, 9)
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64); fast = fast_cpu(m, x, all_sparse(m))
        assert fast.first.used; torch.testing.assert_close(fast(x), m(x))
    finally: torch.set_default_dtype(old)
    with torch.device('meta'): p,l = Planes((1, 3, 4, 4), 1),TapLayer(Conv(torch.ones(2, 3, 3, 3, device='cpu'), padding=(1, 1)), Planes((1, 3, 4, 4), 1), Planes((1, 2, 4, 4), 1))
    assert p.data.device.type == l.bias.device.type == l.mask.device.type == 'cpu'

def test_what_can_be_neither_copied_nor_pickled_says_so():
    fast = fast_cpu(first_nets(), torch.randn(2, 3, 9, 9))
    for f in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r'write it with save\(\)'): f(fast)
