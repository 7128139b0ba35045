"Two ranks (gloo, DistributedDataParallel on the CPU): the same masks and the same weights on both, whatever decides them."
import json, os, sys, time, warnings
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fasterprune.all import *

criteria = [magnitude, small_final, squared, large_init, small_init, large_init_large_final, small_init_small_final, magnitude_increase, movement, movement_magnitude,
            updating_magnitude_increase, updating_movement, updating_movement_magnitude, gradient_magnitude, taylor, wanda, random_score]
trainings = [dict(criteria=c) for c in criteria] + [dict(context=c) for c in ('erk', 'global', 'lamp')] + [dict(context='global', criteria=c) for c in (taylor, wanda, random_score)] + \
            [dict(granularity='filter', criteria=wanda), dict(granularity='kernel', context='global')] + \
            [dict(kind=StraightThrough, context=c, criteria=taylor if c == 'global' else magnitude) for c in ('local', 'global', 'lamp')]

def learner(rank, net):
    g = torch.Generator().manual_seed(rank) # each rank sees data of its own
    y = torch.arange(32) % 3
    x = torch.randn(32, 4, 6, 6, generator=g) * (1+rank) + y.view(-1, 1, 1, 1)
    ds = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu')
    return Learner(dls, DistributedDataParallel(net), loss_func=CrossEntropyLossFlat())

def train(rank, how):
    kind = how.get('kind', SparsifyCallback)
    how = {k: v for k,v in how.items() if k != 'kind'}
    from conftest import conv_net
    set_seed(0); net = conv_net()
    learn = learner(rank, net)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=kind(**{'sparsity': .8, **how}))
    return net

def shrunk(rank):
    "Filters pruned, cut, and trained on: how many channels are left, and are the ranks' weights the same before and after?"
    from test_surgery import res
    learn = learner(rank, res())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(.5, 'filter', 'local', coupled=True))
    learn.shrink()
    net = learn.model.module
    before = [p.detach().clone() for p in net.parameters()]
    same = [all(map(equal, before))]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    same.append(all(equal(p.detach()) for p in net.parameters()))
    return dict(wrapped=isinstance(learn.model, DistributedDataParallel), channels=net.stem.out_channels, same=same, trained=not any(map(torch.equal, before, net.parameters())))

def equal(t):
    both = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(both, t.contiguous())
    return torch.equal(*both)

def worker(rank, folder):
    sys.path.insert(0, os.path.dirname(__file__))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    res = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for how in trainings:
            net = train(rank, how)
            r = measured_sparsity(net, granularity=how.get('granularity', 'weight'))
            res.append(dict(weights=all(equal(p.detach()) for p in net.parameters()), masks=all(equal((p == 0).byte()) for p in net.parameters()), dead=sum(x[5] for x in r.rows), n=[x[4] for x in r.rows]))
        with torch.no_grad():
            net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)); net[1].weight *= 1e-9
        Sparsifier(net, context='global').sparsify(.9) # has something to say
    res.append(shrunk(rank))
    res.append(sum('would have lost every block' in str(w.message) for w in told))
    with open(f'{folder}/{rank}.part', 'w') as f: json.dump(res, f)
    os.replace(f'{folder}/{rank}.part', f'{folder}/{rank}.json')
    for _ in range(600): # leave together, and without gloo's own goodbye: its threads sometimes abort a process that is done
        if all(os.path.exists(f'{folder}/{r}.json') for r in range(2)): break
        time.sleep(.1)
    os._exit(0)

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [json.loads((folder/f'{r}.json').read_text()) for r in range(2)]

@pytest.mark.situation
@pytest.mark.parametrize('i', range(len(trainings)), ids=['-'.join(getattr(v, '__name__', v) for v in t.values()) for t in trainings])
def test_ranks_agree(results, i):
    for rank in results:
        assert rank[i]['masks'] and rank[i]['weights']
        n,one = rank[i]['n'],trainings[i].get('context', 'local') != 'local'
        assert rank[i]['dead'] == (round(.8*sum(n)) if one else sum(round(.8*k) for k in n))

def test_only_the_first_rank_talks(results): assert results[0][-1] >= 1 and results[1][-1] == 0

@pytest.mark.situation
def test_the_small_network_is_averaged_too(results):
    for rank in results: assert rank[-2] == dict(wrapped=True, channels=4, same=[True, True], trained=True)
