"Models that people use, with small inputs: they prune exactly, or say clearly why not. FASTERPRUNE_FULL=1 adds the slow ones."
import os, warnings
import pytest, torch, torchvision
from torch import nn
from fasterprune.all import *
from fasterprune.flow import following_norms
from conftest import fit

slow = pytest.mark.skipif(not os.environ.get('FASTERPRUNE_FULL'), reason='slow: FASTERPRUNE_FULL=1 runs it')
make = lambda name, **kw: lambda: torchvision.models.get_model(name, weights=None, num_classes=5, **kw)
def xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=5)
def unet():
    from fastai.vision.all import DynamicUnet
    body = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
    return DynamicUnet(body, 3, (64, 64))
def vision_head():
    from fastai.vision.all import create_vision_model, resnet18
    return create_vision_model(resnet18, 5, pretrained=False)

both = (nn.Conv2d, nn.Linear)
models = [('resnet18', make('resnet18'), 64, nn.Conv2d), pytest.param('resnet50', make('resnet50'), 64, nn.Conv2d, marks=slow), pytest.param('vgg16_bn', make('vgg16_bn'), 32, both, marks=slow),
    ('mobilenet_v3_small', make('mobilenet_v3_small'), 64, nn.Conv2d), pytest.param('mobilenet_v3_large', make('mobilenet_v3_large'), 64, nn.Conv2d, marks=slow), pytest.param('densenet121', make('densenet121'), 64, nn.Conv2d, marks=slow),
    pytest.param('efficientnet_b0', make('efficientnet_b0'), 64, nn.Conv2d, marks=slow), pytest.param('convnext_tiny', make('convnext_tiny'), 64, both, marks=slow), pytest.param('vit_b_16', make('vit_b_16', image_size=32), 32, nn.Linear, marks=slow),
    ('squeezenet1_1', make('squeezenet1_1'), 64, nn.Conv2d), ('xresnet18', xresnet, 64, nn.Conv2d), ('DynamicUnet', unet, 64, nn.Conv2d), ('vision_learner head', vision_head, 64, both)]

@pytest.mark.model
@pytest.mark.parametrize('name,make,size,layers', models)
@pytest.mark.parametrize('granularity,context', [('weight', 'local'), ('weight', 'global'), ('filter', 'local')])
def test_prunes_exactly(name, make, size, layers, granularity, context):
    torch.manual_seed(0); m = make(); x = torch.randn(2, 3, size, size)
    state = {k: v.clone() for k,v in m.state_dict().items() if 'running' in k or 'tracked' in k}
    sp = Sparsifier(m, granularity, context, layers=layers, sample=x)
    assert all(torch.equal(m.state_dict()[k], v) for k,v in state.items()) # looking for what follows what left no trace
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); r = sp.sparsify(.5)
    n,dead = [g.n for g in sp.groups],[g.n_pruned for g in sp.groups]
    assert sum(dead) == (round(.5*sum(n)) if context == 'global' else sum(min(round(.5*k), k-1) for k in n))
    for g,row in zip(sp.groups, r.rows): assert row[5] == g.n_pruned or row[5] == g.n # the head of a vision transformer starts at zero
    m.eval()
    with torch.no_grad(): assert m(x).isfinite().all()
    if granularity == 'filter': _dead_filters_are_silent(m, sp, x)

def _remember(where, name):
    def hook(m, inp, out): where[name] = out.clone()
    return hook

def _dead_filters_are_silent(m, sp, x):
    out,norms = {},{}
    for g in sp.groups:
        g.layers[0].module.register_forward_hook(_remember(out, g.name))
        for d in g.dependents:
            if d.module is not g.layers[0].module and d.channels.tolist() == list(range(g.n)): d.module.register_forward_hook(_remember(norms, g.name))
    with torch.no_grad(): m(x)
    for l in sp.groups:
        if l.name not in out: continue
        dead = ~l.mask
        channel = lambda o: o.movedim(-1 if isinstance(l.layers[0].module, nn.Linear) else 1, 0)
        assert (channel(out[l.name])[dead] == 0).all(), l.name
        if l.name in norms: assert (channel(norms[l.name])[dead] == 0).all(), l.name

def test_the_right_batchnorm_is_found_where_order_would_mislead():
    class PreAct(nn.Module):
        "BatchNorm before each convolution: the norm that comes next in the code sees a sum, not the convolution"
        def __init__(self):
            super().__init__()
            self.c0,self.b1,self.c1,self.b2,self.c2 = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3, padding=1)
        def forward(self, x):
            x = self.c0(x)
            x = x + self.c1(self.b1(x).relu())
            return x + self.c2(self.b2(x).relu())
    m = PreAct()
    for sample in (None, (torch.randn(2, 3, 8, 8),)):
        found = following_norms(m, [m.c0, m.c1, m.c2], sample)
        assert {layer: [row[0] for row in rows] for layer,rows in found.items()} == {m.c0: [m.b1], m.c1: [], m.c2: []}

@pytest.mark.model
def test_weight_norm_and_spectral_norm_say_why_not():
    for f in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm):
        m = nn.Sequential(nn.Conv2d(3, 4, 3), f(nn.Conv2d(4, 4, 3)))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(ValueError, match='weight of layer 1 is computed from other parameters'): Sparsifier(m)
        r = Sparsifier(m, exclude='1').sparsify(.5)
        assert [x[0] for x in r.rows] == ['0']

@pytest.mark.model
def test_data_parallel(learner):
    from conftest import conv_net
    learn = learner(model=nn.DataParallel(conv_net()))
    fit(learn, cbs=SparsifyCallback(.8))
    assert float(measured_sparsity(learn.model.module)) == pytest.approx(.8, abs=.005)

@pytest.mark.model
@slow
def test_compiled(learner):
    from conftest import conv_net
    net = conv_net(); learn = learner(model=torch.compile(net))
    keys = list(net.state_dict())
    fit(learn, cbs=SparsifyCallback(.8))
    assert float(measured_sparsity(net)) == pytest.approx(.8, abs=.005) and list(net.state_dict()) == keys

@pytest.mark.model
def test_a_layer_replaced_between_two_fits(learner):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.8, context='local'))
    learn.model[3] = nn.Conv2d(8, 16, 3, stride=2); learn.create_opt()
    fit(learn, cbs=SparsifyCallback(.8, context='local'))
    for r in measured_sparsity(learn.model).rows: assert r[3] == round(.8*r[2])

@pytest.mark.model
def test_a_model_moved_to_double_or_channels_last_in_between(learner):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    sp = Sparsifier(m); sp.sparsify(.3); zero = m[0].weight == 0
    m.to(memory_format=torch.channels_last); sp.sparsify(.6)
    assert (m[0].weight[zero] == 0).all()
    m.double(); r = sp.sparsify(.8)
    assert (m[0].weight[zero] == 0).all() and [x[3] for x in r.rows] == [round(.8*x[2]) for x in r.rows]
