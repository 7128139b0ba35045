"Other devices than the CPU, without one: fake tensors say where everything is, and stop where the host asks for a value."
import pytest, torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fasterprune import keys, selection
from fasterprune.contexts import lamp, unscaled
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
