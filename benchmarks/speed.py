"""What pruning costs: steps, whole runs, memory, selection and import, beside the peers in the same run.

    pip install . && pip install fasterai==0.4.1      # the peer is optional
    OMP_NUM_THREADS=1 python benchmarks/speed.py --out benchmarks/results/speed-cpu-1thread

Every comparison is interleaved: in each round each contestant makes one step on the same batch, in random order, and is
compared with the dense step of that round. Reported are the median of these ratios and their quartiles. On the CPU the time
is the processor's (`time.process_time`), so that other work on the machine counts as little as possible. An earlier version
takes part when its package lies somewhere on PYTHONPATH as `oldprune`. Writes OUT.json and OUT.md.
"""
import argparse, copy, json, platform, random, subprocess, sys, time, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch, torchvision, torch.nn.utils.prune as tp
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import sched_lin
from torch.utils.data import TensorDataset
import fasterprune
from fasterprune.all import SparsifyCallback, Sparsifier, StraightThrough, sched_onecycle

def convs(m): return [x for x in m.modules() if isinstance(x, nn.Conv2d)]

class TorchPrune(Callback):
    "torch.nn.utils.prune, its L1Unstructured masks computed anew whenever the schedule has moved"
    order = 51
    def __init__(self, context, schedule): self.context,self.schedule,self.last = context,schedule,None
    def before_batch(self):
        if not self.training: return
        s = self.schedule(0., .95, self.pct_train)
        if s == self.last: return
        self.last,ms = s,convs(self.model)
        for m in ms:
            if not hasattr(m, 'weight_orig'): tp.identity(m, 'weight')
        if self.context == 'local':
            for m in ms: m.weight_mask = tp.L1Unstructured(s).compute_mask(m.weight_orig.detach(), torch.ones_like(m.weight_mask))
        else:
            flat = torch.cat([m.weight_orig.detach().flatten() for m in ms])
            mask = tp.L1Unstructured(s).compute_mask(flat, torch.ones_like(flat))
            for m,k in zip(ms, mask.split([m.weight_orig.numel() for m in ms])): m.weight_mask = k.view_as(m.weight_orig)

class AoPrune(Callback):
    "torch.ao.pruning.WeightNormSparsifier, single weights"
    order = 51
    def __init__(self, schedule): self.schedule,self.sp,self.last = schedule,None,None
    def before_batch(self):
        if not self.training: return
        if self.sp is None:
            from torch.ao.pruning import WeightNormSparsifier
            self.sp = WeightNormSparsifier(sparsity_level=0., sparse_block_shape=(1, 1), zeros_per_block=1)
            names = {m: n for n,m in self.model.named_modules()}
            self.sp.prepare(self.model, [{'tensor_fqn': names[m]+'.weight'} for m in convs(self.model)])
        s = self.schedule(0., .95, self.pct_train)
        if s == self.last: return
        self.last = s
        for g in self.sp.groups: g['sparsity_level'] = s
        self.sp.step()

def contestants(schedule, min_change, only=None):
    "From name to the callbacks of a contestant"
    kw = dict(schedule=schedule) if min_change is None else dict(schedule=schedule, min_change=min_change)
    res = {'dense': lambda: []}
    for c in ('lamp', 'local', 'global'): res[f'fasterprune {c}'] = lambda c=c: [SparsifyCallback(.95, context=c, **kw)]
    if min_change == 0: res['fasterprune StraightThrough'] = lambda: [StraightThrough(.95, schedule=schedule, every=4)]
    if min_change is None:
        res['fasterprune, all defaults'] = lambda: [SparsifyCallback(.95)]
        res['fasterprune StraightThrough, all defaults'] = lambda: [StraightThrough(.95)]
    try:
        from oldprune.callback import SparsifyCallback as Old
        from oldprune import __version__ as old
        old_kw = dict(schedule=schedule) if min_change is None else dict(schedule=schedule, resolution=min_change)
        for c in ('local', 'global'): res[f'fasterprune {old} {c}'] = lambda c=c: [Old(.95, context=c, **old_kw)]
    except ImportError: pass
    try:
        from fasterai.sparse.sparsify_callback import SparsifyCallback as Peer
        from fasterai.core.criteria import large_final
        from fasterai.core.schedule import Schedule
        for c in ('local', 'global'): res[f'fasterai 0.4.1 {c}'] = lambda c=c: [Peer(95, 'weight', c, large_final, Schedule(schedule))]
    except ImportError as e: print('fasterai is not here:', e, file=sys.stderr)
    for c in ('local', 'global'): res[f'torch.nn.utils.prune {c}'] = lambda c=c: [TorchPrune(c, schedule)]
    res['torch.ao.pruning'] = lambda: [AoPrune(schedule)]
    return {k: v for k,v in res.items() if only is None or k in only}

class Driver:
    "A Learner whose training loop is stepped by hand"
    def __init__(self, model, cbs, n_steps, dev, amp=None):
        n = 2*max(n_steps, 1000) # an epoch of ordinary length
        ds = TensorDataset(torch.zeros(1, 3, 8, 8).expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.long))
        self.learn = Learner(DataLoaders.from_dsets(ds, ds, bs=2, num_workers=0, device=dev), model.to(dev), loss_func=CrossEntropyLossFlat(), cbs=cbs)
        if amp: self.learn.to_bf16()
        l = self.learn
        l.remove_cb(ProgressCallback)
        l.create_opt(); l.opt.set_hypers(lr=1e-3, wd=1e-2)
        l.n_epoch,l.epoch,l.dl,l.n_iter = 1,0,l.dls.train,len(l.dls.train)
        for e in ('before_fit', 'before_epoch', 'before_train'): l(e)
        self.cuda = torch.device(dev).type == 'cuda'
    def step(self, i, batch, pct):
        self.learn.pct_train = pct
        if self.cuda:
            a,b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(); a.record(); self.learn.one_batch(i, batch); b.record(); torch.cuda.synchronize()
            return a.elapsed_time(b)/1e3
        t = time.process_time()
        self.learn.one_batch(i, batch)
        return time.process_time()-t

def race(arch, schedule, pcts, min_change, args, only=None, warm=3):
    "Step all contestants through `pcts`, interleaved; from name to the times of the steps"
    set_seed(0)
    model = getattr(torchvision.models, arch)(num_classes=10)
    ds = {n: Driver(copy.deepcopy(model), make(), len(pcts), args.device, args.amp) for n,make in contestants(schedule, min_change, only).items()}
    size = args.size
    batches = [(torch.randn(args.bs, 3, size, size, device=args.device), torch.randint(0, 10, (args.bs,), device=args.device)) for _ in range(4)]
    times,rng = {n: [] for n in ds}, random.Random(0)
    for i,pct in enumerate([pcts[0]]*warm + list(pcts)):
        names = list(ds); rng.shuffle(names)
        for n in names:
            try: t = ds[n].step(i+1, batches[i%4], pct)
            except RuntimeError as e: # a peer that cannot do it leaves the race, and the table says why
                if n == 'dense' or 'fasterprune' in n: raise
                failed[n] = str(e).split(':', 1)[-1].strip()
                del ds[n],times[n]
                continue
            if i >= warm: times[n].append(t)
        if sys.stderr.isatty(): print(f'\r{arch} {i}/{len(pcts)+warm} ', end='', file=sys.stderr)
    return times, {n: state_bytes(d) for n,d in ds.items()}

def state_bytes(d):
    "Bytes that pruning keeps per weight in scope: buffers and parametrisations on the model, masks and copies in a sparsifier"
    model = d.learn.model
    n = sum(m.weight.numel() for m in convs(model))
    bn = sum(b.numel()*b.element_size() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for b in m.buffers())
    extra = sum(b.numel()*b.element_size() for b in model.buffers()) - bn
    extra += sum(m.weight.numel()*m.weight.element_size() for m in convs(model) if hasattr(m, 'weight_orig')) # the masked copy
    for cb in d.learn.cbs:
        sp = getattr(cb, 'sparsifier', None)
        if isinstance(sp, Sparsifier):
            extra += sum(g.mask.nbytes for g in sp.groups if g.mask is not None) + sum(t.nbytes for l in sp.layers for t in l.state.values())
            extra += sum(d.nbytes for d in (getattr(cb, '_dense', None) or {}).values())
            extra += sum(s.kept.nbytes for s in getattr(cb, '_shown', {}).values() if s.kept is not None)
    return extra/n

failed = {}

def ratios(times):
    "Median and quartiles of the ratios to the dense step of the same round"
    dense = np.array(times['dense'])
    return {n: [round(float(q), 3) for q in np.percentile(np.array(t)/dense, [50, 25, 75])] for n,t in times.items()}

def part_steps(args):
    "A large network races in groups of two beside the dense one: all at once would not fit into memory"
    out,names = {},[n for n in contestants(sched_lin, 0.) if n != 'dense' and (not args.only or n in args.only)]
    for arch in args.archs:
        big = arch.startswith('vgg')
        n = max(8, args.steps//3) if big else args.steps
        for kind,pcts in (('re-selecting', np.linspace(.5, .9, n)), ('ordinary', [.9]*n)):
            res = out[f'{arch}, {kind} step'] = dict(ratios={}, steps=n, state_bytes_per_weight={})
            for group in ([names[i:i+2] for i in range(0, len(names), 2)] if big else [names]):
                t,mem = race(arch, sched_lin, pcts, 0., args, only=['dense', *group], warm=4) # four are a round of StraightThrough
                res['ratios'] |= ratios(t)
                res['dense_ms'] = round(1e3*float(np.median(t['dense'])), 1)
                res['state_bytes_per_weight'] |= {k: round(v, 2) for k,v in mem.items() if 'fasterprune 0' not in k} # an old one is not counted
    return out

def part_run(args):
    "A whole fit_one_cycle with default settings, and with re-selection at every batch beside the peer"
    pcts = np.arange(args.run_steps)/args.run_steps
    ours = dict(only=['dense', 'fasterprune, all defaults', 'fasterprune StraightThrough, all defaults'])
    t,_ = race('resnet18', sched_onecycle, pcts, None, args, warm=0, **ours)
    total = {n: sum(v)/sum(t['dense']) for n,v in t.items() if n != 'dense'}
    if args.only: return dict(ratio_of_total_time={k: round(v, 3) for k,v in total.items()}, steps=args.run_steps, steps_every_batch=0)
    n = max(50, args.run_steps//10)
    every,_ = race('resnet18', sched_onecycle, np.arange(n)/n, 0., args, warm=0, only=['dense', 'fasterprune lamp', 'fasterprune local', 'fasterprune global', 'fasterai 0.4.1 local', 'fasterai 0.4.1 global'])
    total |= {f'{k}, every batch': sum(v)/sum(every['dense']) for k,v in every.items() if k != 'dense'}
    return dict(ratio_of_total_time={k: round(v, 3) for k,v in total.items()}, steps=args.run_steps, steps_every_batch=n)

def part_select(args):
    "One global re-selection from 0.5 to 0.51, from 10⁵ to 10⁸ weights, each size in a process of its own"
    code = """if 1:
        import sys, time, resource, numpy as np, torch
        from torch import nn
        from fasterprune.sparsifier import Sparsifier
        n = int(float(sys.argv[1])); c = max(1, n//9//1000)
        m = nn.Sequential(*[nn.Conv2d(c//4 or 1, 1000, 3, bias=False) for _ in range(4)])
        sp = Sparsifier(m, context='global'); sp.update(.5)
        total = sum(l.n for l in sp.layers)
        base = int([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1])
        open('/proc/self/clear_refs', 'w').write('5') # start the count of the peak anew
        ts = []
        for i in range(int(sys.argv[2])):
            t = time.perf_counter(); sp.update(.5 + .01*(i+1)); ts.append(time.perf_counter()-t)
        peak = int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])
        print(total, np.median(ts), (peak-base)*1024/(4*total))"""
    rows = []
    for n in (1e5, 1e6, 1e7, 1e8):
        w,t,extra = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(n), '9' if n < 1e8 else '3'], capture_output=True, text=True, check=True).stdout.split()
        rows.append(dict(weights=int(w), ms=round(1e3*float(t), 2), ns_per_weight=round(1e9*float(t)/int(w), 2), extra_memory_over_weights=round(float(extra), 2)))
    return rows

def part_import(args):
    "Seconds to import fasterprune.all over fastai's basics and callbacks, interleaved"
    res = {'fastai.basics, fastai.callback.all': [], 'fasterprune.all': [], 'fasterprune.sparsifier': [], 'torch': []}
    for _ in range(5):
        for mods,ts in res.items():
            t = time.perf_counter(); subprocess.run([sys.executable, '-W', 'ignore', '-c', f'import {mods}'], check=True); ts.append(time.perf_counter()-t)
    return {k: dict(median_s=round(float(np.median(v)), 2), min_s=round(min(v), 2), max_s=round(max(v), 2)) for k,v in res.items()}

def markdown(r):
    "Tables for people"
    lines = [f"*{r['command']}; {r['machine']}; torch {r['torch']}, {r['threads']} thread(s), {r['date']}; batch {r['bs']}, {r['size']}×{r['size']} inputs, fastai's Adam. Ratios to the dense step of the same round ({'GPU' if r.get('device', 'cpu') != 'cpu' else 'processor'} time): median [quartiles].*", '']
    if steps := r.get('steps'):
        names = [n for n in next(iter(steps.values()))['ratios'] if n != 'dense']
        mem = next(v['state_bytes_per_weight'] for v in steps.values() if 'state_bytes_per_weight' in v)
        lines += ['| | ' + ' | '.join(steps) + ' | state, bytes a weight |', '|---|' + '---:|'*(len(steps)+1)]
        for n in names: lines.append(f'| {n} | ' + ' | '.join('{:.3f} [{:.3f}, {:.3f}]'.format(*v['ratios'][n]) for v in steps.values()) + f" | {mem.get(n, '')} |")
        lines += [f"| {n} | raises: {why} |" for n,why in r.get('failed', {}).items()]
        lines += ['| *dense step, ms* | ' + ' | '.join(f"*{v['dense_ms']:.0f}*" for v in steps.values()) + ' | |', '']
    if run := r.get('run'):
        every = f"; re-selecting at every batch: {run['steps_every_batch']} steps" if run['steps_every_batch'] else ''
        lines += [f"| whole run of ResNet-18 with one-cycle pruning to 0.95 ({run['steps']} steps{every}) | time / dense |", '|---|---:|']
        lines += [f'| {k} | {v:.3f} |' for k,v in run['ratio_of_total_time'].items()] + ['']
    if sel := r.get('select'):
        lines += ['| weights, one global re-selection | ms | ns a weight | extra memory / weights |', '|---:|---:|---:|---:|']
        lines += [f"| {s['weights']:,} | {s['ms']:.1f} | {s['ns_per_weight']:.2f} | {s['extra_memory_over_weights']:.2f} |" for s in sel] + ['']
    if imp := r.get('import'):
        lines += ['| import | seconds, median [min, max] |', '|---|---:|'] + [f"| {k} | {v['median_s']:.2f} [{v['min_s']:.2f}, {v['max_s']:.2f}] |" for k,v in imp.items()]
    return '\n'.join(lines) + '\n'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--parts', default='steps,run,select,import'); p.add_argument('--archs', default='resnet18,vgg16_bn')
    p.add_argument('--steps', type=int, default=30); p.add_argument('--run-steps', type=int, default=1000)
    p.add_argument('--bs', type=int, default=32); p.add_argument('--size', type=int, default=32)
    p.add_argument('--only', default='', help='names of contestants, with commas between; all if empty')
    p.add_argument('--device', default='cpu'); p.add_argument('--amp', action='store_true', help='bfloat16 mixed precision'); p.add_argument('--out', default='speed')
    args = p.parse_args()
    args.archs,args.only = args.archs.split(','),[n for n in args.only.split(',') if n]
    out = Path(args.out)
    result = json.loads(out.with_suffix('.json').read_text()) if out.with_suffix('.json').exists() else {}
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    result.update(command=' '.join(['python benchmarks/speed.py', *sys.argv[1:]]) if args.only else 'python benchmarks/speed.py', machine=f"{torch.cuda.get_device_name() if args.device != 'cpu' else cpu}", threads=torch.get_num_threads(), torch=torch.__version__,
                  fasterprune=fasterprune.__version__, date=str(date.today()), bs=args.bs, size=args.size, device=args.device)
    for part in args.parts.split(','):
        t = time.time(); result[part] = globals()[f'part_{part}'](args)
        result['failed'] = failed or result.get('failed', {})
        out.with_suffix('.json').write_text(json.dumps(result, indent=1)); out.with_suffix('.md').write_text(markdown(result))
        print(f'{part}: {time.time()-t:.0f} s', flush=True)
    print(markdown(result))
