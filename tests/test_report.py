"The report: totals against independent counts, any kind of model, pictures."
import io, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from fasterprune.cost import *
from fasterprune.pictures import *
from fasterprune.report import *
from fasterprune.sparsifier import Sparsifier
from conftest import conv_net, make_learner, same, state

def counted(model):
    "Parameters, zeros and bytes, by numpy"
    ps,sd = [p.detach().numpy() for p in model.parameters()],{k: v.numpy() for k,v in model.state_dict().items()}
    return sum(p.size for p in ps), sum(int((p == 0).sum()) for p in ps), sum(v.nbytes for v in sd.values())

@given(st.sampled_from(['weight', 'kernel', 'filter', 'shared_kernel']), st.floats(0, .95), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_totals_are_those_of_numpy(granularity, sparsity, seed):
    torch.manual_seed(seed)
    m = conv_net()
    Sparsifier(m, granularity).sparsify(sparsity)
    r = sparsity_report(m)
    assert (r.total('params'), r.total('zeros'), r.total('bytes')) == counted(m)
    convs = [v.numpy() for v in m.state_dict().values() if v.ndim == 4]
    assert r.total('zeros', in_scope=True) == sum(int((w == 0).sum()) for w in convs)
    assert [l.zero_filters for l in r.layers] == [int((w.detach().flatten(1).numpy() == 0).all(1).sum()) for w in (m[0].weight, m[3].weight, m[6].weight, m[10].weight)]
    assert r.sparsity_in_scope == r.total('zeros', True)/sum(w.size for w in convs)
    assert r.total('sparse_bytes') <= r.total('bytes')

def test_bytes_are_those_of_a_file(tmp_path):
    m = conv_net(64)
    torch.save(m.state_dict(), tmp_path/'m.pth')
    extra = (tmp_path/'m.pth').stat().st_size - sparsity_report(m).total('bytes')
    assert 0 < extra < 600*len(m.state_dict()) # names and headers

def test_the_formula_is_the_size_of_packed_bits():
    w = torch.randn(37, 5); w[torch.rand(37, 5) < .8] = 0
    packed = len(np.packbits(w.numpy() != 0).tobytes()) + len(w[w != 0].numpy().tobytes())
    assert sparse_bytes(w) == packed < dense_bytes(w) == w.numpy().nbytes
    assert sparse_bytes(w.bfloat16()) == len(np.packbits(w.numpy() != 0)) + 2*int((w != 0).sum())
    assert sparse_bytes(torch.zeros(0)) == 0 and sparse_bytes(torch.tensor(0)) == 1

@pytest.mark.parametrize('layer,x,flops', [
    (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6), 2 * 2*6*6 * 8*4*9), (nn.Conv2d(4, 8, 3, stride=2, groups=2), (1, 4, 7, 7), 2 * 3*3 * 8*2*9),
    (nn.ConvTranspose2d(4, 8, 2), (1, 4, 5, 5), 2 * 5*5 * 4*8*4), (nn.Conv1d(3, 5, 3), (2, 3, 8), 2 * 2*6 * 5*3*3), (nn.Linear(7, 3), (4, 7), 2 * 4 * 7*3)])
def test_flops_by_hand(layer, x, flops):
    m = nn.Sequential(layer)
    r = sparsity_report(m, torch.randn(x), layers=type(layer))
    assert r.total('flops') == r.layers[0].flops == flops
    Sparsifier(m, layers=type(layer)).sparsify(.5)
    r = sparsity_report(m, torch.randn(x), layers=type(layer))
    w = layer.weight.detach()
    assert r.layers[0].effective_flops*w.numel() == flops*int((w != 0).sum()) and r.total('flops') == flops

def test_a_layer_used_twice_counts_once_and_works_twice():
    c = nn.Conv2d(4, 4, 3, padding=1); tied = nn.Conv2d(4, 4, 3, padding=1); tied.weight = c.weight
    m = nn.Sequential(c, nn.ReLU(), c, tied)
    r = sparsity_report(m, torch.randn(1, 4, 5, 5))
    assert [l.params for l in r.layers] == [144] and r.layers[0].flops == r.total('flops') == 3 * 2*25*144
    assert (r.total('params'), r.total('bytes')) == (144+4+4, 4*(144+8))

def test_looking_leaves_no_trace():
    m = conv_net(); m.train(); m[1].eval()
    before,modes,rng = {k: v.clone() for k,v in m.state_dict().items()},[x.training for x in m.modules()],torch.get_rng_state()
    sparsity_report(nn.Sequential(m, nn.Dropout()), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)), latency=2)
    assert same(before, m.state_dict()) and modes == [x.training for x in m.modules()] and torch.equal(rng, torch.get_rng_state())
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
    with pytest.raises(RuntimeError): sparsity_report(m, torch.randn(2, 3, 6, 6))
    assert modes == [x.training for x in m.modules()]

class Attention(nn.Module):
    def __init__(self): super().__init__(); self.embed,self.layer = nn.Embedding(11, 8),nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x): return self.layer(self.embed(x))

def test_a_transformer_has_no_conv_and_its_attention_is_counted():
    m = Attention()
    r = sparsity_report(m, torch.randint(0, 11, (2, 5)))
    assert 'no layer is in scope' in repr(r) and r.total('params') == counted(m)[0]
    # tokens × (in, out and two linear projections), and the products of queries with keys and of these with values
    assert r.total('flops') == 2*10*(8*24 + 8*8 + 8*16 + 16*8) + 2*2*2*(5*5*8)
    assert sparsity_report(m, layers=nn.Linear).total('params', in_scope=True) > 0
    assert torch.backends.mha.get_fastpath_enabled()

class Products(nn.Module):
    "Attention and nothing else"
    def __init__(self, **kw): super().__init__(); self.kw = kw
    def forward(self, q, k, v): return nn.functional.scaled_dot_product_attention(q, k, v, **self.kw)

@pytest.mark.parametrize('q,k,v,kw', [
    ((2, 3, 10, 4), (2, 3, 10, 4), (2, 3, 10, 4), {}), ((2, 3, 10, 4), (2, 3, 7, 4), (2, 3, 7, 5), {}), ((2, 10, 4), (2, 10, 4), (2, 10, 4), {}),
    ((2, 3, 10, 4), (2, 3, 10, 4), (2, 3, 10, 4), dict(is_causal=True)), ((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), dict(enable_gqa=True))], ids=str)
def test_every_form_of_attention_is_counted(q, k, v, kw):
    "Fused or not: which form runs is PyTorch's choice, and depends on its version"
    wanted = 2 * int(np.prod(q[:-1])) * k[-2] * (q[-1] + v[-1])
    inputs = torch.randn(q), torch.randn(k), torch.randn(v)
    assert count_flops(Products(**kw), inputs)[''] == wanted
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): assert count_flops(Products(**kw), inputs)[''] == wanted

@pytest.mark.parametrize('m,x', [(nn.ReLU(), torch.ones(1)), (nn.Sequential(), torch.ones(1)), (nn.BatchNorm2d(3), torch.ones(1, 3, 2, 2)), (nn.Conv2d(1, 1, 1, bias=False), torch.ones(1, 1, 1, 1)),
                                 (nn.GRU(2, 3), torch.ones(1, 1, 2)), (nn.Conv2d(2, 2, 1).half(), torch.ones(1, 2, 2, 2).half()), (nn.DataParallel(nn.Conv2d(2, 2, 1)), torch.ones(1, 2, 2, 2)),
                                 (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), torch.ones(1, 2))], ids=lambda m: type(m).__name__)
def test_odd_models(m, x):
    r = sparsity_report(m, x, latency=1)
    assert r.total('params') == sum(p.numel() for p in m.parameters()) and r.total('flops') >= 0
    for text in (repr(r), r._repr_html_(), r._repr_markdown_(), repr(r.compare(r)), r.compare(r)._repr_html_()): assert 'total' in text and 'nan' not in text
    assert r.to_frame().params.sum() == r.total('params')

def test_what_was_cut_and_what_changed_compare():
    big,small = conv_net(8),conv_net(4)
    c = sparsity_report(big).compare(sparsity_report(small))
    assert '288 → 144' in repr(c) and 'FLOPs' not in repr(c)
    c = sparsity_report(nn.Sequential(big[0])).compare(sparsity_report(big))
    assert '– → 288' in repr(c) or '– → ' in repr(c)
    assert list(c.to_frame().columns.levels[0]) == ['before', 'after']

@pytest.mark.bad_input
@pytest.mark.parametrize('f,text', [
    (lambda: sparsity_report(conv_net(), latency=True), 'pass sample='), (lambda: sparsity_report(conv_net(), layers=nn.Conv3d), 'no layer to prune'),
    (lambda: sparsity_report(conv_net(), exclude='nope'), "exclude names 'nope'"), (lambda: sparsity_report(nn.LazyLinear(3)), 'has no values yet'),
    (lambda: sparsity_report(conv_net()).compare(3), 'compare got int; give another report'), (lambda: measure_latency(conv_net(), torch.ones(1), n=0), 'at least one pass'),
    (lambda: plot_kernels(nn.ReLU()), 'it draws one layer'), (lambda: plot_layers(sparsity_report(nn.ReLU())), 'no convolution or linear layer')])
def test_bad_input(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in str(e.value)

def test_pictures():
    m = conv_net()
    Sparsifier(m).sparsify(.75)
    ax = plot_layers(sparsity_report(m))
    bars = {b.get_x(): b.get_height() for b in ax.containers[0]}
    assert ax.get_title() and ax.get_ylabel() == 'sparsity' and set(bars.values()) == {.75}
    assert [t.get_text() for t in ax.get_xticklabels()] == ['0', '3', '6', '10']
    fig,own = plt.subplots()
    assert plot_weights(conv_net(), m, ax=own) is own
    n = sum(b.get_height() for b in own.containers[1])
    assert n == sum(int((x.weight != 0).sum()) for x in (m[0], m[3], m[6])) and '75.0% are zero' in own.get_legend_handles_labels()[1][1]
    image = plot_kernels(m[0]).images[0].get_array()
    assert int(np.nansum(image)) == int((m[0].weight != 0).sum()) and '75.0%' in plt.gca().get_title()
    for layer in (nn.Linear(3, 4), nn.Conv1d(2, 3, 5), nn.Conv3d(2, 2, 3), nn.ConvTranspose2d(2, 4, 3, groups=2)): assert int(np.nansum(plot_kernels(layer).images[0].get_array())) == layer.weight.numel()
    layer = nn.Conv2d(4, 8, 3); w = layer.weight.clone()
    axs = plot_granularities(layer, .5, ['weight', 'kernel', '2:4'])
    assert [a.get_title() for a in axs] == ['weight', 'kernel', '2:4'] and torch.equal(w, layer.weight)
    assert [int(np.nansum(a.images[0].get_array())) for a in axs] == [144, 144, 144]
    plt.close('all')

def test_report_needs_no_fastai_and_no_pandas_or_matplotlib():
    code = "import sys; import fasterprune.report; print([m for m in ('fastai', 'pandas', 'matplotlib', 'torchvision', 'nbdev') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_fast_network_is_timed_beside_the_model():
    "Any callable: what `fast_cpu` makes is one"
    m,x,calls = conv_net(),torch.randn(3, 4, 8, 8),[]
    def fast(x): calls.append(x.shape); return m(x)
    r = sparsity_report(m, x, latency=2, fast=fast)
    assert set(calls) == {x.shape} and (len(r.latency.times), len(r.fast_latency.times)) == (2, 2)
    assert 'latency with fast_cpu' in repr(r) and 'latency with fast_cpu' not in repr(sparsity_report(m, x, latency=1))
    assert sparsity_report(m, x, fast=fast).fast_latency.batch == 3

def test_multiplications_that_are_left_are_told():
    m = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    m[1].weight.data.zero_()
    assert f'multiplications left: {1/5:.1%}' in repr(sparsity_report(m, torch.ones(1, 1, 8, 8)))
