"""Which settings should I use? One base, and one thing changed at a time, on the digits and on CIFAR-10 photographs.

    OMP_NUM_THREADS=1 python benchmarks/settings.py --data digits --seeds 5
    OMP_NUM_THREADS=1 python benchmarks/settings.py --data cifar10 --path DIR_WITH_CIFAR10 --seeds 3

Trains the small residual network of `fasterprune.experiments`, for each seed from the same start and on the same batches;
the photographs are shrunk to 16×16 pixels, so that all of it takes half an hour of one core. Resumable: each
training is a line of OUT/results.jsonl. The page nbs/tutorials/settings.ipynb reads the file and answers from it."""
import argparse, time, warnings
from datetime import date
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, params, set_seed
from fastai.callback.schedule import sched_cos
from fasterprune.experiments.batches import tensor_dls
from fasterprune.experiments.data import load_data
from fasterprune.experiments.keys import run_key, versions
from fasterprune.experiments.models import small_resnet
from fasterprune.experiments.results import Results
from fasterprune.callback import SparsifyCallback
from fasterprune.keep import KeepSparsity
from fasterprune.schedules import sched_between, sched_agp, sched_onecycle, sched_onecycle_log, sched_oneshot
from fasterprune.sparsifier import Sparsifier
from fasterprune.sparsity import measured_sparsity

schedules = dict(oneshot=sched_between(sched_oneshot, .4), agp=sched_between(sched_agp, .2), cosine70=sched_between(sched_cos, 0, .7), onecycle=sched_onecycle, onecycle_log=sched_onecycle_log)
sizes = dict(digits=dict(images=1347, pixels=8, epochs=12, small=337), cifar10=dict(images=3000, pixels=16, epochs=6, small=750)) # small: images of a new task, for a pretrained network

def base(data): return dict(data=data, images=sizes[data]['images'], pixels=sizes[data]['pixels'], epochs=sizes[data]['epochs'], lr=1e-2, schedule='onecycle', alpha=14., beta=5.,
                            sparsity=.95, context='local', exclude='', how='scratch', lr_mult=1)

def studies(data):
    "From the name of a question to the settings that are compared; a setting that several questions share is trained once"
    b,few = base(data), data == 'cifar10'
    vary = lambda **kw: b | kw
    dense = lambda **kw: b | dict(schedule='dense', sparsity=0.) | kw
    task = dict(images=sizes[data]['small'], epochs=8)
    defaults = dict(context='lamp', schedule='onecycle_log')
    full = dict(
        budget=[f(epochs=e) for e in ((2, 6) if few else (3, 6, 12, 24)) for f in (dense, *(partial(vary, schedule=s) for s in ('oneshot', 'agp', 'cosine70', 'onecycle')))],
        alpha_beta=[vary(alpha=a, beta=c) for a,c in [(14., 0.), (14., 2.), (14., 3.5), (14., 5.), (14., 6.), (14., 8.), (7., 2.5), (28., 10.)]],
        context=[vary(sparsity=s, context=c) for s in (.9, .95) for c in ('local', 'erk', 'global', 'lamp')],
        layers=[vary(exclude=x) for x in ('', '0', '2.short,3.short', '0,2.short,3.short')],
        lr=[f(lr=l) for l in (1e-3, 3e-3, 1e-2, 3e-2) for f in (dense, vary)],
        pretrained=[f(how=h, lr_mult=m, **task) for h,m,fs in [('scratch', 1, 2), ('fit', 1, 1), ('fine_tune', 100, 1), ('fine_tune', 4, 2), ('prune, fine_tune', 4, 1), ('fine_tune, prune', 4, 1)]
                    for f in (dense, partial(vary, sparsity=.9, **defaults))[2-fs:]])
    if not few: return full
    left_out = [dict(beta=b) for b in (0., 3.5, 6., 8.)] + [dict(alpha=a) for a in (7., 28.)] + [dict(sparsity=.9, how='scratch', epochs=6), dict(context='lamp', epochs=6), dict(exclude='0,2.short,3.short'), dict(lr=1e-3), dict(lr=3e-3)]
    return {k: [c for c in cs if not any(all(c[n] == v for n,v in o.items()) for o in left_out)] for k,cs in full.items()} # photographs take longer: fewer settings

class Data:
    "The data of one experiment: all classes, or the first half (to pretrain) and the second half (the new task)"
    def __init__(self, data, path, device):
        d = load_data(data, path, bs=64, device=device)
        self.train,self.valid,self.device = (d.train.x, d.train.y),(d.valid.x, d.valid.y),device
        if data != 'digits': self.train,self.valid = (self.shrink(xy, sizes[data]['pixels']) for xy in (self.train, self.part(self.valid, 1000)))
        self.kw,self.made = dict(pad=self.train[0].shape[-1]//8, flip=d.train.flip),{}
    def shrink(self, xy, size): return torch.cat([F.interpolate(x.float(), (size, size), mode='bilinear', antialias=True).round().byte() for x in xy[0].split(1000)]), xy[1]
    def part(self, xy, n): i = torch.from_numpy(np.random.default_rng(0).permutation(len(xy[0]))[:n]); return xy[0][i], xy[1][i]
    def half(self, xy, second): i = (xy[1] >= 5) == second; return xy[0][i], xy[1][i] - 5*second
    def __call__(self, n, second=None):
        "DataLoaders with `n` training images; `second`: of the second half of the classes, or of the first"
        if (n, second) not in self.made:
            t,v = (self.train, self.valid) if second is None else (self.half(self.train, second), self.half(self.valid, second))
            self.made[n, second] = tensor_dls(self.part(t, n), v, bs=64 if second is None else 32, device=self.device, **self.kw)
        return self.made[n, second]

def learner(dls, seed):
    set_seed(seed, reproducible=True)
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, small_resnet(dls.train.x.shape[1], dls.c), loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=lambda m: [params(m[:-1]), params(m[-1:])])

bodies = {}
def body(data, c, seed):
    "The layers of a network that was trained, dense, on the first half of the classes"
    if (c['data'], seed) not in bodies:
        learn = learner(data(sizes[c['data']]['images'], False), seed)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
        bodies[c['data'], seed] = {k: v.clone() for k,v in learn.model[:-1].state_dict().items()}
    return bodies[c['data'], seed]

def sparsity_elsewhere(model, total, exclude):
    "The sparsity of the other layers at which the model as a whole has `total`"
    n,left = measured_sparsity(model).n, measured_sparsity(model, exclude=exclude).n
    return total*n/left

def train(data, c, seed):
    learn = learner(data(c['images'], True if c['images'] == sizes[c['data']]['small'] else None), seed)
    if c['how'] != 'scratch': learn.model[:-1].load_state_dict(body(data, c, seed)); set_seed(seed, reproducible=True)
    n,lr,exclude,pruned = c['epochs'],c['lr'],[x for x in c['exclude'].split(',') if x],c['schedule'] != 'dense'
    schedule = partial(sched_onecycle, alpha=c['alpha'], beta=c['beta']) if c['schedule'] == 'onecycle' else schedules.get(c['schedule'])
    s = sparsity_elsewhere(learn.model, c['sparsity'], exclude)
    prune = lambda: SparsifyCallback(s, context=c['context'], schedule=schedule, exclude=exclude, min_change=.01) if pruned else None
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        if c['how'] in ('scratch', 'fit'): learn.fit_one_cycle(n, lr, cbs=prune())
        elif c['how'] == 'fine_tune': learn.fine_tune(n-1, lr, lr_mult=c['lr_mult'], cbs=prune())
        elif c['how'] == 'prune, fine_tune':
            Sparsifier(learn.model, context=c['context']).sparsify(s)
            learn.fine_tune(n-1, lr, lr_mult=c['lr_mult'], cbs=KeepSparsity())
        else: # 'fine_tune, prune': one budget, two halves
            learn.fine_tune(n//2-1, lr, lr_mult=c['lr_mult'])
            learn.fit_one_cycle(n-n//2, slice(lr/c['lr_mult'], lr), cbs=prune())
    counted,values = measured_sparsity(learn.model),dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    return dict(accuracy=float(values['accuracy']), valid_loss=float(values['valid_loss']), zeros=counted.zeros, weights=counted.n, measured=float(counted), seconds=round(time.perf_counter()-start, 2))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='digits', choices=list(sizes)); p.add_argument('--path'); p.add_argument('--out', default='benchmarks/results/settings')
    p.add_argument('--seeds', type=int, default=5); p.add_argument('--first', type=int, default=0); p.add_argument('--device', default='cpu')
    args = p.parse_args()
    results,data = Results(Path(args.out)),Data(args.data, args.path, args.device)
    todo = [(seed, name, c) for seed in range(args.first, args.seeds) for name,cs in studies(args.data).items() for c in cs]
    for i,(seed,name,c) in enumerate(todo):
        key = run_key(c | dict(seed=seed))
        if key in {r['key'] for r in results.rows()}: continue
        r = train(data, c, seed)
        results.add(dict(key=key, **c, seed=seed, **r, versions=versions(), threads=torch.get_num_threads(), date=str(date.today())))
        print(f"[{i+1}/{len(todo)}] {name} {({k: v for k,v in c.items() if v != base(args.data)[k]})} seed {seed}: {100*r['accuracy']:.2f} % at {r['measured']:.4f}, {r['seconds']} s", flush=True)

if __name__ == '__main__': main()
