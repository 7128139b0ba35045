"""How often to re-select: does selecting the weights anew at every batch buy anything?

    OMP_NUM_THREADS=1 python benchmarks/resolution.py --path DIR_WITH_CIFAR10 --out benchmarks/results/resolution
    OMP_NUM_THREADS=1 python benchmarks/resolution.py --data digits --epochs 20 --seeds 6 --out benchmarks/results/resolution-digits

Trains the small residual network on CIFAR-10 photographs (a seeded part of them), or on the digits, with one-cycle pruning at several
resolutions, from the same start and on the same batches, several seeds each; resumable. Writes OUT/results.jsonl and OUT/table.md."""
import argparse, time, warnings
from datetime import date
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from fasterprune import experiments as ex
from fasterprune.callback import SparsifyCallback

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--data', default='cifar10'); p.add_argument('--path'); p.add_argument('--out', default='resolution'); p.add_argument('--images', type=int, default=10_000)
p.add_argument('--epochs', type=int, default=5); p.add_argument('--seeds', type=int, default=3); p.add_argument('--device', default='cpu')
p.add_argument('--sparsity', type=float, default=.95); p.add_argument('--schedule', default='onecycle')
args = p.parse_args()
resolutions = [0., .01, .02, .05]

bs = 64 if args.data == 'digits' else 128
dls = ex.load_data(args.data, args.path, bs=bs, device=args.device)
if args.images < len(dls.train.x):
    part = torch.from_numpy(np.random.default_rng(0).permutation(len(dls.train.x))[:args.images])
    dls = ex.tensor_dls((dls.train.x[part], dls.train.y[part]), (dls.valid.x, dls.valid.y), bs=bs, pad=4, flip=True, device=args.device)
images = len(dls.train.x)
results = ex.Results(args.out)

class Counting(SparsifyCallback):
    "Counts how often the weights were selected anew, and what that took"
    def before_fit(self): super().before_fit(); self.n_selected,self.seconds = 0,0.
    def _prune(self, pos=None):
        before,t = [l.n_dead for l in self.sparsifier.layers],time.perf_counter()
        super()._prune(pos)
        self.seconds += time.perf_counter()-t
        self.n_selected += before != [l.n_dead for l in self.sparsifier.layers]
    def after_fit(self): super().after_fit(); Counting.last = self.n_selected,self.seconds

for seed in range(args.seeds):
    for res in [None, *resolutions]:
        config = dict(data=args.data, images=images, epochs=args.epochs, schedule='dense' if res is None else args.schedule, sparsity=args.sparsity, resolution=res, seed=seed)
        key = ex.run_key(config)
        if key in {r['key'] for r in results.rows()}: continue
        ex.SparsifyCallback = partial(Counting, resolution=res)
        r = ex.run_one(config['schedule'], args.sparsity, seed=seed, dls=dls, device=args.device, epochs=args.epochs)
        n,s = (0, 0.) if res is None else Counting.last
        del r['curve']
        results.add(dict(key=key, **config, **r, selections=n, pruning_seconds=round(s, 3), versions=ex.versions(), threads=torch.get_num_threads(), date=str(date.today())))
        print(config, f"{100*r['accuracy']:.2f} %, {n} selections, {r['seconds']:.0f} s", flush=True)

rows = results.rows()
of = lambda res: [r for r in rows if r['resolution'] == res]
every = {r['seed']: r['accuracy'] for r in of(0.)}
lines = [f"*python benchmarks/resolution.py; {args.data}, {images:,} training images, {args.epochs} epochs, batch {bs}, small residual network, {args.schedule} to {args.sparsity}; {rows[0]['threads']} thread(s), {rows[0]['date']}*", '',
         '| resolution | accuracy, last epoch (%) | paired difference to every batch (points) | selections | seeds |', '|---:|---:|---:|---:|---:|']
lines += [f"| dense | {ex._mean_sd([100*r['accuracy'] for r in of(None)])} | | | {len(of(None))} |"]
for res in sorted({r['resolution'] for r in rows if r['resolution'] is not None}):
    diff = [100*(r['accuracy']-every[r['seed']]) for r in of(res)]
    lines.append(f"| {res:g}{' (every batch)' if res == 0 else ''} | {ex._mean_sd([100*r['accuracy'] for r in of(res)])} | {'' if res == 0 else ex._mean_sd(diff)} | {np.mean([r['selections'] for r in of(res)]):.0f} of {of(res)[0]['steps']} steps | {len(of(res))} |")
(Path(args.out)/'table.md').write_text('\n'.join(lines)+'\n')
print('\n'.join(lines))
