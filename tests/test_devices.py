"Other devices than the CPU, without one: fake tensors say where everything is, and stop where the host asks for a value."
import copy, itertools, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fasterprune import cost, keys, selection, sparsifier
from fasterprune.callback import SparsifyCallback
from fasterprune.contexts import lamp, unscaled
from fasterprune.granularity import granularities
from fasterprune.probe import input_scale
from fasterprune.sparsifier import Sparsifier
from fasterprune.sparsity import measured_sparsity
from fasterprune.surgery import cut_channels
from conftest import conv_net, fit
from test_ranks import criteria
from fasterprune.selection import select, select_groups

def squared_share(scores): return scores / scores.amax()

class Watch(TorchDispatchMode):
    "The devices and dtypes of all tensors that are made"
    def __init__(self):
        super().__init__()
        self.devices,self.dtypes = set(),set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.devices.add(t.device.type); self.dtypes.add(t.dtype)
        return out

class Questions:
    "Counts how often the host asks, and answers for the device"
    def __init__(self): self.n = 0
    def __call__(self, started):
        self.n += 1
        rows = torch.cat([s.rows for s in started])
        assert rows.dtype == torch.long
        with pytest.raises(DataDependentOutputException): rows.tolist()
        return [[1, 0, 0, 0]]*len(rows)

sizes = [432, 36_864, 1, 0, 2048]

def arrays(masked): return [torch.rand(n) for n in sizes], [torch.rand(n) < .5 if masked else None for n in sizes]

@pytest.fixture
def questions(monkeypatch):
    q = Questions()
    monkeypatch.setattr(selection, 'answers', q)
    return q

@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('context', [unscaled, lamp, squared_share])
@pytest.mark.parametrize('masked', [False, True])
def test_a_device_is_asked_once(double, context, masked, questions, monkeypatch):
    if not double: monkeypatch.setattr(keys, '_wide', lambda device: torch.float32) # as on Apple's GPUs, of which there are no fakes
    with FakeTensorMode(), torch.device('cuda'):
        scores,masks = arrays(masked)
        with Watch() as seen: got = select(scores, 20_000, masks, context=context)
    assert questions.n == 1
    assert seen.devices == {'cuda'}, 'nothing is made elsewhere'
    assert (torch.float64 in seen.dtypes) == (double and context is lamp)
    for m,n in zip(got.masks, sizes): assert isinstance(m, FakeTensor) and m.device.type == 'cuda' and m.dtype == torch.bool and m.shape == (n,)

def test_apples_gpus_have_no_double_precision():
    assert keys._wide(torch.device('mps')) == torch.float32 and keys._wide(torch.device('cuda')) == torch.float64

def test_many_groups_ask_once_in_all(questions):
    with FakeTensorMode(), torch.device('cuda'):
        scores,masks = arrays(True)
        with Watch() as seen: got = select_groups(([s], len(s)//2, [m]) for s,m in zip(scores, masks) if len(s))
    assert questions.n == 1 and len(got) == len(sizes)-1
    assert seen.devices == {'cuda'} and torch.float64 not in seen.dtypes

@pytest.mark.parametrize('context', [unscaled, lamp])
def test_unpatched_it_stops_at_the_one_question(context):
    with FakeTensorMode(), torch.device('cuda'):
        started = keys.start_on_device(*arrays(True)[:1], 20_000, by_tail=getattr(context, 'by_tail', None))
        with pytest.raises(DataDependentOutputException): keys.answers([started])
        with pytest.raises(DataDependentOutputException): select(arrays(False)[0], 20_000, context=context)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('context', [unscaled, lamp])
def test_a_gpu_chooses_as_the_cpu_does(context):
    torch.manual_seed(0)
    scores = [torch.randn(n).abs()*unit for n,unit in ((9408, .1), (2_359_296, .01), (147_456, .03))]
    masks = None
    for k in (10**6, 2*10**6, 2_400_000):
        cpu = select(scores, k, masks, context=context)
        gpus = [select([s.cuda() for s in scores], k, masks and [m.cuda() for m in masks], context=context) for _ in range(2)]
        for gpu in gpus: assert gpu[1:] == cpu[1:] and all(torch.equal(a, b.cpu()) for a,b in zip(cpu.masks, gpu.masks))
        masks = cpu.masks

# The whole engine, as it is called in a training

class Residual(nn.Module):
    "Two layers that write the same channels, each with a norm, and one that writes others"
    def __init__(self):
        super().__init__()
        self.a,self.na,self.b,self.nb,self.c = nn.Conv2d(4, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        x = self.na(self.a(x)).relu()
        return self.head(self.c(x + self.nb(self.b(x))).relu().mean((2, 3)))

def started(context, granularity, criterion, sample):
    "A `Sparsifier` in the middle of a training on the CPU; and what it will ask of the inputs of each layer"
    torch.manual_seed(0)
    coupled,model = granularity == 'coupled',Residual()
    kw = dict(granularity='filter', coupled=True) if coupled else dict(granularity=granularity)
    sp = Sparsifier(model, context=context, criteria=criterion, sample=sample, **kw)
    model(sample).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.01*torch.randn_like(p))
    sp.record_grad(); sp.update(.2, sample)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.01*torch.randn_like(p))
    return sp, input_scale(model, [l.module for l in sp.layers], sample)

def moved(sp, device):
    "Everything that it holds becomes fake"
    def fake(t): return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    for m in sp.model.modules():
        for name,p in m._parameters.items():
            if p is None: continue
            m._parameters[name] = nn.Parameter(fake(p))
            m._parameters[name].grad = fake(p.grad)
        for name,b in m._buffers.items(): m._buffers[name] = fake(b)
    for g in sp.groups:
        g.mask = fake(g.mask)
        for d in g.dependents: d.channels,d.of = fake(d.channels),fake(d.of)
    for l in sp.layers: l.state = {k: fake(v) for k,v in l.state.items()}

class Host:
    "Instead of `tolist`: counts the questions, and gives an answer in the shape of the truth"
    def __init__(self): self.n = 0
    def __call__(self, t):
        self.n += 1
        return [[1, 0, 0, 0]]*len(t) if t.ndim == 2 else [0]*len(t)
    def asked(self):
        n,self.n = self.n,0
        return n

contexts = dict(local='local', erk='erk', **{'global': 'global'}, lamp='lamp', own_shares=lambda sparsity, sizes: [sparsity]*len(sizes), own_scores=squared_share)
pools = [g for g in granularities(nn.Conv2d)] + ['coupled', '2:4']
every_criterion = [(c, g, f) for c,g,f in itertools.product(contexts, ['weight', 'kernel', 'filter', 'coupled', '2:4'], criteria)]
every_granularity = [(c, g, criteria[0]) for c,g in itertools.product(contexts, pools)]
cases = dict.fromkeys((c, g, f) for c,g,f in every_criterion+every_granularity if g != '2:4' or c in ('local', 'global'))

def steps(case, host):
    "Questions asked in an ordinary step, a selecting step and a count; and what was made meanwhile"
    context,granularity,criterion = case
    sample = torch.randn(2, 4, 8, 8)
    sp,act = started(contexts[context], granularity, criterion, sample)
    with pytest.MonkeyPatch.context() as monkeypatch, FakeTensorMode(), torch.device('cuda'):
        moved(sp, 'cuda')
        act = {m: torch.empty(v.shape) for m,v in act.items()}
        monkeypatch.setattr(sparsifier, 'input_scale', lambda *args: act) # a forward pass, which asks nothing by itself
        monkeypatch.setattr(sparsifier, 'as_inputs', lambda *args: ())
        with Watch() as seen:
            sp.apply_grad(); sp.record_grad(); sp.apply(); sp.apply(moved=True)
            ordinary = host.asked()
            assert sp.update(.5, sample)
            selecting = host.asked()
            sp.measure()
    return ordinary, selecting, host.asked(), seen

@pytest.mark.parametrize('granularity', pools)
@pytest.mark.parametrize('context', contexts)
def test_a_training_step_asks_nothing_and_a_selecting_one_asks_once(context, granularity, monkeypatch):
    host = Host()
    monkeypatch.setattr(FakeTensor, 'tolist', lambda t: host(t))
    mine = [c for c in cases if c[:2] == (context, granularity)]
    for case in mine:
        ordinary,selecting,counting,seen = steps(case, host)
        assert (ordinary, selecting, counting) == (0, 1, 1), case
        assert seen.devices == {'cuda'}, case
        assert context == 'lamp' or torch.float64 not in seen.dtypes, case
    assert mine or granularity == '2:4'

def test_cutting_needs_no_double_precision_either():
    model,x = Residual(),torch.randn(2, 4, 8, 8)
    with Watch() as seen:
        Sparsifier(model, 'filter', sample=x, coupled=True).sparsify(.5)
        small,_ = cut_channels(model, x)
    assert small.a.out_channels == 4 and torch.float64 not in seen.dtypes

@pytest.mark.parametrize('device', ['cpu', 'cuda:1', 'mps:0'])
def test_the_clock_waits_for_the_device_of_the_model(device, monkeypatch):
    order = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda d: order.append(str(d)))
    cost._seconds(lambda x: order.append(x), ['forward'], torch.device(device))
    assert order == (['forward'] if device == 'cpu' else [device, 'forward', device])

# Compiled networks

def compiled(how, net, backend='eager'):
    if how == 'in place': net.compile(backend=backend)
    return torch.compile(net, backend=backend) if how == 'shell' else net

@pytest.mark.situation
@pytest.mark.parametrize('how', ['not', 'shell', 'in place'])
@pytest.mark.parametrize('before', ['validate', 'fit'])
def test_filters_of_a_compiled_network_that_has_run_die_with_their_norms(learner, how, before):
    net = conv_net()
    learn = learner(model=compiled(how, net))
    with learn.no_bar(), learn.no_logging(): learn.validate() if before == 'validate' else learn.fit(1)
    fit(learn, 2, cbs=SparsifyCallback(.5, 'filter', 'local', exclude='3'))
    assert [r[0] for r in measured_sparsity(learn.model, exclude='3').rows] == ['0', '6'], 'the names of the network itself'
    zero = (net[0].weight == 0).flatten(1).all(1)
    assert zero.sum() == 4 and torch.equal(net[1].weight == 0, zero) and torch.equal(net[1].bias == 0, zero)
    assert (net[3].weight != 0).all() and (net[4].weight != 0).all(), 'what is excluded stays dense'

@pytest.mark.situation
@pytest.mark.parametrize('criterion', [c for c in criteria if c.__name__ in ('magnitude', 'wanda', 'movement')])
@pytest.mark.parametrize('how', ['shell', 'in place'])
def test_masks_cause_no_compilation_of_their_own(learner, how, criterion):
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters
    def compilations(cbs):
        torch._dynamo.reset(); counters.clear()
        count = CompileCounter()
        learn = learner(model=compiled(how, conv_net(), count))
        fit(learn, 3, cbs=cbs)
        return count.frame_count, sum(counters['graph_break'].values()), learn
    frames,breaks,learn = compilations(SparsifyCallback(.8, criteria=criterion, min_change=0))
    assert (frames, breaks) == compilations(None)[:2] and frames > 0
    assert len(learn.recorder.sparsity_scheduled) == 19 and float(measured_sparsity(learn.model)) == pytest.approx(.8, abs=.01)

# Weights in half precision

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('criterion', criteria)
def test_half_precision_is_scored_in_single(criterion, granularity, dtype):
    "The same masks as for the same numbers in float32, whose squares and products do not vanish"
    torch.manual_seed(0)
    half = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).to(dtype)
    with torch.no_grad():
        for p in half.parameters(): p.mul_(.02)
    nets,sample = (half, copy.deepcopy(half).float()),torch.randn(2, 8, 9, 9).to(dtype)
    made = [Sparsifier(n, granularity, criteria=criterion) for n in nets]
    for p,q in zip(*(n.parameters() for n in nets)):
        p.grad = (1e-5*torch.randn(p.shape)).to(dtype)
        with torch.no_grad(): p.add_((.002*torch.randn(p.shape)).to(dtype))
        q.data,q.grad = p.detach().float(),p.grad.float()
    for sp in made:
        sp.record_grad()
        sp.update(.7, sample.to(sp.groups[0].weight.dtype))
    known = made[0].groups[:1] if criterion.__name__ == 'wanda' else made[0].groups # the inputs of later layers are rounded
    for g,h in zip(known, made[1].groups): assert torch.equal(g.mask, h.mask)
    for g,row in zip(made[0].groups, made[0].measure().rows):
        assert g.n_pruned == round(.7*g.n) == int((~g.mask).sum()) <= row[5]
        assert (made[0].masks[g.name] | (g.weight == 0)).all()

# The script for the day on which there is a GPU

def test_the_gpu_script_runs_dry_and_goes_on_where_it_stopped(tmp_path):
    root = Path(__file__).parent.parent
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
    def figures(*args):
        run = subprocess.run([sys.executable, 'benchmarks/gpu.py', '--tiny', '--out', str(tmp_path), *args], cwd=root, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads((tmp_path/'gpu.json').read_text())['rows']
    rows = figures('--parts', 'semi_structured,steps,latency,table') # the tests marked for CUDA are skipped in this very run
    assert list(dict.fromkeys(r['part'] for r in rows)) == ['2:4', 'steps', 'latency', 'table', 'all'] and not [r for r in rows if r['name'] == 'failed']
    assert {r['goal'] for r in rows if r['part'] == 'steps'} >= {'≤ 1.01', '≤ 1.05', '≤ 1.5'}
    assert [r['value'] for r in rows if r['name'] == 'trainings'] == ['4 new, 4 in all']
    lines = (tmp_path/'results.jsonl').read_text().splitlines()
    (tmp_path/'results.jsonl').write_text('\n'.join(lines[:-1])+'\n') # as if the clock had stopped it
    assert [r['value'] for r in figures('--parts', 'table') if r['name'] == 'trainings'] == ['1 new, 4 in all']
