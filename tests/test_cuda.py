"On a GPU: the same masks as on a CPU, and no waiting in ordinary steps. Skipped where there is none."
import copy, pytest, torch, torchvision
from torch import nn
from fasterprune.surgery import shrink
from fasterprune.sparsifier import Sparsifier
from fasterprune.sparsity import measured_sparsity
from fasterprune.storage import load_sparse, save_sparse
from conftest import conv_net, fit, make_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('context', ['local', 'erk', 'global', 'lamp'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_same_masks_as_on_a_cpu(context, granularity, dtype):
    torch.manual_seed(0)
    here = conv_net(32).to(dtype)
    there = copy.deepcopy(here).cuda()
    sample = dict(sample=torch.randn(4, 4, 6, 6).to(dtype)) if granularity == 'filter' else {}
    a,b = Sparsifier(here, granularity, context, **sample), Sparsifier(there, granularity, context, **{k: v.cuda() for k,v in sample.items()})
    for s in (.1, .5, .8):
        a.sparsify(s); b.sparsify(s)
        for p,q in zip(a.groups, b.groups): assert torch.equal(p.mask, q.mask.cpu()) and p.n_pruned == q.n_pruned
    for p,q in zip(here.parameters(), there.parameters()): assert torch.equal(p, q.cpu())

def test_ordinary_steps_do_not_wait():
    model = torchvision.models.resnet18(num_classes=10).cuda()
    sp = Sparsifier(model)
    sp.update(.9)
    model(torch.randn(2, 3, 64, 64, device='cuda')).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: sp.apply(); sp.apply_grad(); sp.record_grad()
    finally: torch.cuda.set_sync_debug_mode('default')

def test_a_selecting_step_waits_once():
    from warnings import catch_warnings, simplefilter
    sp = Sparsifier(torchvision.models.resnet18(num_classes=10).cuda())
    sp.update(.5)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with catch_warnings(record=True) as seen:
            simplefilter('always'); sp.update(.6)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len([w for w in seen if 'synchroniz' in str(w.message)]) <= 1

@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
def test_fit_in_mixed_precision(half, tmp_path):
    from fasterprune.callback import SparsifyCallback
    learn = make_learner(path=tmp_path)
    learn.dls.to('cuda'); learn.model.cuda()
    fit(getattr(learn, half)(), 2, cbs=SparsifyCallback(.8))
    n = sum(m.weight.numel() for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d))
    assert abs(measured_sparsity(learn.model).zeros - .8*n) <= 2

def test_small_files_and_small_networks(tmp_path):
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)).cuda().eval(),torch.randn(2, 3, 16, 16).cuda()
    Sparsifier(m, 'filter', sample=x, coupled=True).sparsify(.5)
    save_sparse(m, tmp_path/'f'); before = [p.clone() for p in m.parameters()]
    with torch.no_grad(): m[0].weight += 1
    load_sparse(tmp_path/'f', m)
    assert all(torch.equal(a, b) and b.is_cuda for a,b in zip(before, m.parameters()))
    small = shrink(m, x)
    assert small[0].out_channels == 32 and next(small.parameters()).is_cuda
    with torch.no_grad(): assert (small(x)-m(x)).abs().max() <= 1e-2*m(x).abs().max()

def test_two_of_four_becomes_torchs_own_sparse_weight():
    from torch.sparse import to_sparse_semi_structured
    torch.manual_seed(0); m,x = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).half().cuda(),torch.randn(64, 128).half().cuda()
    Sparsifier(m, '2:4', layers=nn.Linear).sparsify(.5)
    dense = m(x)
    for l in (m[0], m[2]): l.weight = nn.Parameter(to_sparse_semi_structured(l.weight))
    assert torch.allclose(m(x), dense, atol=1e-2)
