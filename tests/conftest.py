"Small fakes: networks and Learners on made data, no downloads."
import os, re
os.environ.setdefault('OMP_NUM_THREADS', '1')
import fastai.callback.schedule, pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import DataLoaders, Learner, CrossEntropyLossFlat, accuracy, set_seed

torch.set_num_threads(1)

def conv_net(width=8):
    "Channels in multiples of four behind the first layer, a group, a depthwise layer, BatchNorm, a bias."
    return nn.Sequential(
        nn.Conv2d(4, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2*width, 3, stride=2, groups=2), nn.BatchNorm2d(2*width), nn.ReLU(),
        nn.Conv2d(2*width, 2*width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width, 3))

def make_learner(seed=0, model=None, n=48, bs=8, **kwargs):
    set_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 4, 6, 6) + y.view(-1, 1, 1, 1)
    ds = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu')
    return Learner(dls, conv_net() if model is None else model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)

@pytest.fixture
def learner(tmp_path):
    def make(*args, **kwargs): return make_learner(*args, path=tmp_path, **kwargs)
    return make

def fit(learn, n=2, lr=1e-2, how='fit_one_cycle', **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, how)(n, lr, **kwargs)

def shown(value): return re.sub(r' at 0x\w+', '', str(value)) # the name of a test is the same in each process

def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

# what the tests stand for, counted and printed at the end of each run
kinds = dict(situation='training situations passed', fault='faults survived', bad_input='bad inputs answered', model='models that people use')

def pytest_configure(config):
    for k,text in kinds.items(): config.addinivalue_line('markers', f'{k}: counted under "{text}"')

def pytest_terminal_summary(terminalreporter, config):
    passed = [r for r in terminalreporter.stats.get('passed', []) if r.when == 'call']
    counts = {k: sum(k in r.keywords for r in passed) for k in kinds}
    terminalreporter.write_line(', '.join(f'{text}: {counts[k]}' for k,text in kinds.items()))
