"Which channels are coupled, which stay, and that what is cut gives the same outputs."
import copy, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fasterprune.channels import ChannelGraph
from fasterprune.surgery import shrink

class Code(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 4, 1)
        for name,layer in layers.items(): setattr(self, name, layer)
        self.run = forward
    def forward(self, *x): return self.run(self, *x)
x = torch.randn(3, 3, 8, 8)

def group(m, sample=x, name='a'):
    graph = ChannelGraph(m, sample)
    return next(g for g in graph.groups() if name in [w[0] for w in g.writers])
def writers(g): return {w[0] for w in g.writers}

@pytest.mark.parametrize('code', [lambda m,x: m.c(m.a(x) + m.b(x)), lambda m,x: m.c(m.a(x).add_(m.b(x))), lambda m,x: m.c(m.a(x) * m.b(x).mean((2, 3), keepdim=True)),
                                  lambda m,x: m.c(torch.maximum(m.a(x), m.b(x)).relu())])
def test_filters_that_meet_are_coupled(code):
    g = group(Code(code))
    assert writers(g) == {'a', 'b'} and [r[0] for r in g.readers] == ['c'] and g.whole and not g.dense and not g.others

stays = dict( # code in which the filters of `a` cannot be cut, and a word of the reason
    output=(lambda m,x: (m.a(x), m.c(m.a(x))), 'output'),
    in_a_dict=(lambda m,x: {'features': [m.a(x)], 'out': m.c(m.a(x)), 'n': None}, 'output'),
    picked=(lambda m,x: m.c(m.a(x)[:, [0, 1, 2, 3, 4, 5, 6, 7]]), 'index counts'),
    split=(lambda m,x: m.c(torch.cat(m.a(x).split([5, 3], 1), 1)), 'split'),
    chunk=(lambda m,x: m.c(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), 'split'),
    shuffled=(lambda m,x: m.c(m.a(x).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)), 'view'),
    pixel_shuffle=(lambda m,x: m.c(F.pixel_shuffle(m.a(x), 2).repeat(1, 4, 1, 1)), 'pixel_shuffle'),
    mean=(lambda m,x: m.c(m.a(x) * m.a(x).mean(1, keepdim=True)), 'mean'),
    layer_norm=(lambda m,x: m.c(m.a(x) + F.layer_norm(m.a(x), [8, 8, 8])), 'layer_norm'),
    scale=(lambda m,x: m.c(m.a(x) * torch.arange(8.).view(-1, 1, 1)), 'constant'),
    input_too=(lambda m,x: m.c(m.a(x) + torch.cat([x, x, x], 1)[:, :8]), 'add'),
    functional=(lambda m,x: m.c(m.a(x)) + F.conv2d(m.a(x), m.c.weight), 'convolution'),
)
@pytest.mark.parametrize('name', stays)
def test_filters_that_cannot_be_cut_say_why(name):
    code,reason = stays[name]
    g = group(Code(code))
    assert any(reason in why for why in g.others), g.others
    m = Code(code).eval()
    with torch.no_grad(): m.a.weight[::2] = 0; m.a.bias[::2] = 0
    with pytest.warns(UserWarning, match=r'left in.* a \(4 of 8\)'): small = shrink(m, x) # a line, and no error
    assert small.a.out_channels == 8

def test_grouped_shared_and_computed_weights_stay():
    m = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1))
    m[3].weight = m[2].weight
    why = [g.others for g in ChannelGraph(m, x).groups()]
    assert [w[0] for w in why[:4]] == ['layer 1 is a grouped convolution']*2 + ['layer 2 shares its weight', 'layer 3 shares its weight']
    assert why[4][0] == 'layer 4 computes its weight'

def test_an_encoder_used_twice_and_branches_of_training():
    twin = Code(lambda m,p,q: m.c(torch.cat([m.a(p), m.a(q)], 1)), c=nn.Conv2d(16, 4, 1))
    g = group(twin, (x, x+1))
    assert not g.others and [r[2:] for r in g.readers if r[0] == 'c'] == [(list(range(16)), list(range(8))*2)]
    m = Code(lambda m,x: (m.c(m.a(x)), m.b(x)) if m.training else m.c(m.a(x)))
    assert not group(m).others and m.training
    m = Code(lambda m,x: (m.c(m.a(x)), m.aux(m.a(x))) if m.training else m.c(m.a(x)), aux=nn.Conv2d(8, 2, 1))
    assert group(m).others == ['layer aux runs only in training']
    with torch.no_grad(): m.a.weight[:3] = 0; m.a.bias[:3] = 0
    with pytest.warns(UserWarning, match='aux runs only in training'): shrink(m, x).train()(x)

def test_parts_that_are_coupled_leave_the_rest_prunable():
    m = Code(lambda m,x: m.d(torch.cat([m.a(x), m.b(x)], 1) + m.e(x)), d=nn.Conv2d(16, 2, 1), e=nn.Conv2d(3, 16, 3, padding=1))
    assert group(m).dense == group(m, name='e').dense == 'coupled in parts only'

def test_what_is_cut_gives_the_same_outputs_and_gates_couple_nothing():
    torch.manual_seed(0)
    m = Code(lambda m,x: m.c(m.norm(m.a(x)).relu() * m.gate(x).sigmoid() + m.norm2(m.up(m.b(x)))), norm=nn.BatchNorm2d(8), norm2=nn.BatchNorm2d(8),
             gate=nn.Conv2d(3, 1, 3, padding=1), up=nn.ConvTranspose2d(8, 8, 3, padding=1)).eval()
    g = group(m)
    assert writers(g) == {'a', 'up'} and not g.others
    with torch.no_grad():
        for n in (m.norm, m.norm2): nn.init.normal_(n.bias); n.weight[[1, 4]] = 0; n.bias[[1, 4]] = 0
        m.a.weight[[1, 4]] = 0; m.up.weight[:, [1, 4]] = 0; m.b.weight[2] = 0; m.b.bias[2] = 0
    before = copy.deepcopy(m.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error'); small = shrink(m, x)
    assert [small.a.out_channels, small.up.weight.shape, small.norm2.num_features, small.c.in_channels] == [6, (7, 6, 3, 3), 6, 6]
    for i in (x, 10*x): assert torch.allclose(small(i), m(i), atol=1e-4)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

@pytest.mark.bad_input
def test_outputs_of_all_kinds_are_compared():
    kinds = dict(bools=lambda y: (y, y > 0), empty=lambda y: (y, y[:0]), none=lambda y: {'y': y, 'loss': None}, infinite=lambda y: (y, y/0))
    for out in kinds.values():
        m = Code(lambda m,x: out(m.c(m.a(x)))).eval()
        with torch.no_grad(): m.a.weight[:3] = 0; m.a.bias[:3] = 0
        assert shrink(m, x).a.out_channels == 5
