"Where channels go and what is zero is proved by structure, whatever the sample says."
import pytest, torch
from torch import nn
from torch.nn import functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from fasterprune.flow import following_norms, live_channels

class Code(nn.Module):
    "Two convolutions and a norm, joined by any code"
    def __init__(self, forward, n_in=8, norm=None):
        super().__init__()
        self.a,self.b,self.c,self.norm,self.run = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(n_in, 4, 1),norm or nn.BatchNorm2d(8),forward
    def forward(self, x): return self.run(self, x)
x = torch.randn(3, 3, 8, 8)
every = list(range(8))

def into_buffer(m, x):
    out = torch.zeros(len(x), 8, 8, 8)
    out[:, :4] = m.a(x)[:, 4:]
    out[:, 4:] = m.b(x)[:, 4:]
    return m.norm(out)

follows = dict( # name: code, the rows of `a`, the rows of `b`
    direct=(lambda m,x: m.norm(m.a(x)), [(every, every)], []),
    keyword=(lambda m,x: m.norm(input=m.a(input=x)), [(every, every)], []),
    relu=(lambda m,x: m.norm(F.relu(m.a(x), inplace=True)*2+1), [(every, every)], []),
    pooled=(lambda m,x: m.norm(F.avg_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 2)), [(every, every)], []),
    flipped=(lambda m,x: m.norm(m.a(x).flip(1)), [(every, every[::-1])], []),
    halves=(lambda m,x: m.norm(torch.cat([m.a(x)[:, :4], m.b(x)[:, 4:]], 1)), [(every[:4], every[:4])], [(every[4:], every[4:])]),
    buffer=(into_buffer, [(every[:4], every[4:])], [(every[4:], every[4:])]),
    sum=(lambda m,x: m.norm(m.a(x) + m.b(x)), [], []),
    in_place_sum=(lambda m,x: m.norm(m.a(x).add_(m.b(x))), [], []),
    sum_in_a_view=(lambda m,x: (lambda y: (y[:, :4].add_(m.b(x)[:, :4]), m.norm(y))[1])(m.a(x)), [(every[4:], every[4:])], []),
    same_twice=(lambda m,x: m.norm(m.a(x) + m.a(-x)), [(every, every)], []),
    both=(lambda m,x: m.norm(m.a(x)) + m.norm(m.b(x)), [], []),
    softmax=(lambda m,x: m.norm(m.a(x).softmax(1)), [], []),
    functional=(lambda m,x: m.norm(F.conv2d(x, m.a.weight, padding=1)), [], []),
)
@pytest.mark.parametrize('name', follows)
def test_a_norm_follows_what_it_is_made_of_and_nothing_else(name):
    code,a,b = follows[name]
    m = Code(code)
    assert following_norms(m, [m.a, m.b], x) == {m.a: [(m.norm, *row) for row in a], m.b: [(m.norm, *row) for row in b]}

def test_norms_behind_a_flattening_and_over_positions():
    m = Code(lambda m,x: m.norm(m.a(x).flatten(1)), norm=nn.BatchNorm1d(8*64))
    assert following_norms(m, [m.a], x)[m.a] == [(m.norm, list(range(512)), [i//64 for i in range(512)])]
    m = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    assert following_norms(m, [m[0]], torch.randn(3, 5, 4))[m[0]] == []
    m = nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, affine=True))
    assert following_norms(m, [m[0]], torch.randn(3, 3, 9))[m[0]] == [(m[1], [0, 1, 2, 3], [0, 1, 2, 3])]

def zero(m, *filters):
    with torch.no_grad():
        for i in filters: m.weight[i] = 0; m.bias[i] = 0
    return m

lives = dict( # code between `a`, whose filters 0 and 1 are zero, and `c`: which inputs of `c` are live for certain
    plain=(lambda m,x: m.c(m.a(x)), [0, 1]),
    relu=(lambda m,x: m.c(F.gelu(m.a(x).relu())), [0, 1]),
    sigmoid=(lambda m,x: m.c(m.a(x).sigmoid()), []),
    threshold=(lambda m,x: m.c(F.relu(m.a(x) - 5)), []),
    gate=(lambda m,x: m.c(m.a(x) * m.b(x).mean((2, 3), keepdim=True).sigmoid()), [0, 1]),
    sum=(lambda m,x: m.c(m.a(x) + m.b(x)), []),
    sum_of_zeros=(lambda m,x: m.c(m.a(x) + zero(m.b, 1)(x)), [1]),
    masked=(lambda m,x: m.c(m.a(x) * torch.tensor([1.]*7 + [0.]).view(-1, 1, 1)), [0, 1, 7]),
    padded=(lambda m,x: m.c(F.pad(m.a(x), (1, 1, 1, 1), value=1.)), []),
    pooled=(lambda m,x: m.c(F.interpolate(F.max_pool2d(m.a(x), 2), scale_factor=2, mode='bilinear')), [0, 1]),
    norm=(lambda m,x: m.c(m.norm(m.a(x))), [0, 1]),
    random=(lambda m,x: m.c(m.a(x) + torch.rand(1)*0), []),
    unknown=(lambda m,x: m.c(torch.cumsum(m.a(x), 1)), []),
)
@pytest.mark.parametrize('name', lives)
def test_zero_is_what_is_zero_whatever_comes_in(name):
    code,dead = lives[name]
    m = Code(code); zero(m.a, 0, 1)
    for sample in (x, x*0, x-100): assert (~live_channels(m, sample)[m.c]).nonzero().flatten().tolist() == dead

def test_a_norm_with_a_shift_is_alive():
    m = Code(lambda m,x: m.c(m.norm(m.a(x)).relu())); zero(m.a, 0, 1, 2, 3)
    with torch.no_grad(): m.norm.bias[1] = -1.; m.norm.running_mean[2] = 1.; m.norm.weight[3] = 0.
    assert live_channels(m, x)[m.c].tolist() == [False, True, True, False] + [True]*4

@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 999), st.sampled_from([F.relu, F.silu, F.hardtanh, torch.sigmoid, lambda t: t-1, lambda t: t*0]), st.booleans())
def test_nothing_that_is_called_zero_is_ever_other_than_zero(seed, act, norm):
    torch.manual_seed(seed)
    m = Code(lambda m,x: m.c(act(m.norm(m.a(x)) if norm else m.a(x)) * m.b(x))).eval()
    with torch.no_grad():
        for t in (m.a.weight, m.a.bias, m.b.weight, m.b.bias, m.norm.weight, m.norm.bias, m.norm.running_mean): t[torch.rand(8) < .5] = 0
    live,seen = live_channels(m, x)[m.c],torch.zeros(8, dtype=torch.bool)
    def note(m, args): seen.logical_or_((args[0] != 0).transpose(0, 1).flatten(1).any(1))
    m.c.register_forward_pre_hook(note)
    for i in range(4): m(torch.randn(2, 3, 8, 8)*10**i)
    assert not (seen & ~live).any()
