"Building blocks of many networks, trained sixty steps with filters pruned on the way, and cut: the same outputs on inputs of any kind."
import warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterprune.all import *
from conftest import fit

def conv_norm(i, o, k=3, groups=1, act=nn.ReLU): return nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, groups=groups, bias=False), nn.BatchNorm2d(o), act())

class NormAct(nn.BatchNorm2d):
    "A norm with its activation inside, as timm has it"
    def forward(self, x): return F.silu(super().forward(x))

class Block(nn.Module):
    "Layers by name, joined by any code"
    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name,layer in layers.items(): setattr(self, name, layer)
    def forward(self, x): return self.run(self, x)

def dense(m, x):
    for layer in (m.a, m.b): x = torch.cat([x, layer(x)], 1)
    return m.c(x)
def in_place(m, x):
    out = m.b(m.n2(m.a(m.n1(x))))
    out += x
    return out
def parts(m, x):
    a,b = m.a(x).chunk(2, 1)
    return m.c(torch.cat([a, m.b(b) + b], 1))
def scales(m, x):
    a,b,c = m.a(x).split(4, 1)
    b = m.b(b)
    return F.relu(x + m.d(torch.cat([a, b, m.c(b+c)], 1)))
def shuffle(m, x):
    n,c,h,w = x.shape
    x = torch.cat([x[:, :c//2], m.a(x[:, c//2:])], 1)
    return x.view(n, 2, c//2, h, w).transpose(1, 2).reshape(n, c, h, w)
def spatial(m, x):
    x = m.a(x)
    return x * m.b(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
def selective(m, x):
    both = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.c(both.sum(1).mean((2, 3), keepdim=True))
    return (both*weights.view(len(x), 2, -1, 1, 1).softmax(1)).sum(1)
def tokens(m, x):
    n,c,h,w = x.shape
    y = x.flatten(2).transpose(1, 2)
    y = y + m.a(m.n(y).transpose(1, 2)).transpose(1, 2)
    return (y + m.b(F.gelu(m.c(y)))).transpose(1, 2).view(n, c, h, w)
def attention(m, x):
    y = m.n(x.flatten(2).transpose(1, 2))
    q,k,v = m.a(y).view(*y.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape)
    return x + m.b(y).transpose(1, 2).view(x.shape)
def training_branch(m, x):
    y = m.a(x)
    if m.training: m.seen = m.c(y)
    return m.b(y)

w = 12
blocks = dict(
    concatenated=lambda: Block(dense, a=nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 6, 3, padding=1)), b=nn.Sequential(nn.BatchNorm2d(w+6), nn.ReLU(), nn.Conv2d(w+6, 6, 3, padding=1)), c=conv_norm(w+12, w, 1)),
    fused_norms_and_in_place_sum=lambda: Block(in_place, n1=NormAct(w), a=nn.Conv2d(w, w, 3, padding=1), n2=NormAct(w), b=nn.Conv2d(w, w, 3, padding=1)),
    threshold=lambda: Block(lambda m,x: m.b(F.relu(m.a(x) - .2)), a=conv_norm(w, w), b=nn.Conv2d(w, w, 1)),
    inverted_residual=lambda: Block(lambda m,x: x + m.c(m.b(m.a(x))), a=conv_norm(w, 3*w, 1, act=nn.Hardswish), b=conv_norm(3*w, 3*w, groups=3*w), c=nn.Conv2d(3*w, w, 1)),
    gate=lambda: Block(lambda m,x: m.c(m.a(x) * m.b(m.a(x).mean((2, 3), keepdim=True)).sigmoid()), a=conv_norm(w, w), b=nn.Conv2d(w, w, 1), c=nn.Conv2d(w, w, 1)),
    ghost=lambda: Block(lambda m,x: m.c(torch.cat([m.a(x), m.b(m.a(x))], 1)), a=conv_norm(w, 6, 1), b=conv_norm(6, 6, groups=6), c=nn.Conv2d(w, w, 1)),
    parts=lambda: Block(parts, a=conv_norm(w, w, 1), b=conv_norm(6, 6), c=conv_norm(w, w, 1)),
    scales=lambda: Block(scales, a=conv_norm(w, w, 1), b=conv_norm(4, 4), c=conv_norm(4, 4), d=nn.Conv2d(w, w, 1)),
    shuffle=lambda: Block(shuffle, a=conv_norm(6, 6)),
    spatial_attention=lambda: Block(spatial, a=conv_norm(w, w), b=nn.Conv2d(2, 1, 7, padding=3)),
    selective_kernels=lambda: Block(selective, a=conv_norm(w, w), b=conv_norm(w, w, 5), c=nn.Conv2d(w, 2*w, 1)),
    channel_attention=lambda: Block(lambda m,x: x * m.a(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(), a=nn.Conv1d(1, 1, 3, padding=1)),
    pixel_shuffle=lambda: Block(lambda m,x: F.avg_pool2d(m.b(F.pixel_shuffle(m.a(x), 2)), 2), a=nn.Conv2d(w, 4*w, 1), b=conv_norm(w, w)),
    unet=lambda: Block(lambda m,x: m.c(torch.cat([x, m.b(F.max_pool2d(m.a(x), 2))], 1)), a=conv_norm(w, 2*w), b=nn.ConvTranspose2d(2*w, w, 2, 2), c=conv_norm(2*w, w)),
    mixer=lambda: Block(tokens, n=nn.LayerNorm(w), a=nn.Linear(36, 36), c=nn.Linear(w, 24), b=nn.Linear(24, w)),
    attention=lambda: Block(attention, n=nn.LayerNorm(w), a=nn.Linear(w, 3*w), b=nn.Linear(w, w)),
    group_norm=lambda: Block(lambda m,x: x + m.b(F.relu(m.n(m.a(x)))), a=nn.Conv2d(w, w, 3, padding=1), n=nn.GroupNorm(4, w), b=nn.Conv2d(w, w, 1)),
    layer_norm_over_channels=lambda: Block(lambda m,x: x + m.b(F.gelu(m.c(m.n(m.a(x).movedim(1, -1))))).movedim(-1, 1), a=nn.Conv2d(w, w, 3, padding=1, groups=w), n=nn.LayerNorm(w), c=nn.Linear(w, 4*w), b=nn.Linear(4*w, w)),
    weight_norm=lambda: Block(lambda m,x: m.b(m.a(x)), a=conv_norm(w, w), b=nn.utils.parametrizations.weight_norm(nn.Conv2d(w, w, 1))),
    gated_linear=lambda: Block(lambda m,x: m.b(F.glu(m.a(x), 1)), a=nn.Conv2d(w, 2*w, 1), b=nn.Conv2d(w, w, 1)),
    picked=lambda: Block(lambda m,x: m.b(m.a(x)[:, [0, 3, 5]]), a=conv_norm(w, w), b=nn.Conv2d(3, w, 1)),
    used_twice=lambda: Block(lambda m,x: m.b(torch.cat([m.a(x), m.a(x.flip(3))], 1)), a=conv_norm(w, w), b=nn.Conv2d(2*w, w, 1)),
    training_branch=lambda: Block(training_branch, a=conv_norm(w, w), b=conv_norm(w, w), c=nn.Conv2d(w, 2, 1)),
    recurrent=lambda: Block(lambda m,x: x + m.b(m.a(x).mean(2).transpose(1, 2))[0].transpose(1, 2)[:, :, None], a=conv_norm(w, w), b=nn.GRU(w, w, batch_first=True)),
)
def network(name):
    torch.manual_seed(0)
    return nn.Sequential(conv_norm(4, w), blocks[name](), conv_norm(w, w), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 3))

cases = [(name, True) for name in blocks] + [(name, False) for name in list(blocks)[::4]]

@pytest.mark.model
@pytest.mark.parametrize('name,coupled', cases)
def test_trained_and_cut(learner, name, coupled):
    learn = learner(model=network(name), n=240)
    exclude = ['5', '1.b'] if name == 'weight_norm' else '5'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', layers=(nn.Conv2d, nn.Linear, nn.ConvTranspose2d), exclude=exclude, coupled=coupled))
        m,x = learn.model.eval(),torch.randn(2, 4, 6, 6)
        small = shrink(m, x)
    for layer in (l for l in m.modules() if isinstance(l, (nn.Conv2d, nn.Linear))): assert (layer.weight != 0).any()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in m.parameters())
    with torch.no_grad():
        for inputs in (torch.randn(5, 4, 6, 6), 20*torch.rand(2, 4, 6, 6)-3, torch.full((2, 4, 6, 6), 5.)):
            a,b = m(inputs),small(inputs)
            assert (a-b).abs().max() <= 1e-4*a.abs().max() + 1e-6
    small.train()(torch.randn(4, 4, 6, 6)).sum().backward()
