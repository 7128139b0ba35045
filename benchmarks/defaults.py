"""What should the defaults be? Schedules, allocations, blocks, what lies beyond, and the closest peer.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py --path DIR_WITH_CIFAR10 --block schedules98 --seeds 0,1
    python benchmarks/defaults.py --report

CIFAR-10, 6,000 training images, the small residual network of `fasterprune.experiments`, 8 epochs of the one-cycle policy,
accuracy at the last epoch on all 10,000 test images. For a seed, every method starts from the same weights and sees the same
batches. Resumable: each training is a line of OUT/runs.jsonl, found again by its settings. `--fasterai DIR` says where the
peer is installed (pip install --no-deps --target DIR fasterai==0.4.1)."""
import argparse, hashlib, json, math, sys, time, warnings
from contextlib import redirect_stdout
from datetime import date
from functools import partial
from io import StringIO
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from scipy import stats
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.schedule import sched_cos
from fasterprune import experiments as ex
from fasterprune.callback import SparsifyCallback
from fasterprune.criteria import magnitude, squared, taylor
from fasterprune.experiments.keys import versions
from fasterprune.schedules import sched_agp, sched_between, sched_onecycle
from fasterprune.sparsity import measured_sparsity
from fasterprune.straight import StraightThrough

# ---------------------------------------------------------------------------------------------------- schedules

def in_time(start, end, pos, alpha=14., beta=5., tau=.75):
    "One-cycle, steeper for higher targets: at `tau` it is as near to its final density as it would be on the way to 80 %"
    late = math.log(max(1., (end-start) / (1-end) / 4))
    return sched_onecycle(start, end, pos, alpha + late/tau, beta)

def steeper(start, end, pos, alpha=14., beta=5.):
    "The same, with the steepest moment where it was"
    k = 1 + math.log(max(1., (end-start) / (1-end) / 4)) / (.75*alpha-beta)
    return sched_onecycle(start, end, pos, alpha*k, beta*k)

def log_density(start, end, pos, sched):
    "`sched` in the logarithm of the density; in this form it is `end` to the last bit at the end"
    return end - (1-end) * (((1-start)/(1-end)) ** (1-sched(0., 1., pos)) - 1)

schedules = dict(
    onecycle=sched_onecycle, onecycle75=sched_between(sched_onecycle, 0, .75), onecycle60=sched_between(sched_onecycle, 0, .6),
    cosine70=sched_between(sched_cos, 0, .7), agp80=sched_between(sched_agp, 0, .8), agp60=sched_between(sched_agp, 0, .6),
    in_time=in_time, in_time5=partial(in_time, tau=.5), in_time35=partial(in_time, tau=.35), steeper=steeper,
    logcos70=sched_between(partial(log_density, sched=sched_cos), 0, .7), logcos80=sched_between(partial(log_density, sched=sched_cos), 0, .8),
    logonecycle=partial(log_density, sched=sched_onecycle), logonecycle75=sched_between(partial(log_density, sched=sched_onecycle), 0, .75),
    logonecycle4=partial(log_density, sched=partial(sched_onecycle, beta=4.)), logonecycle3=partial(log_density, sched=partial(sched_onecycle, beta=3.)),
    logonecycle85=sched_between(partial(log_density, sched=sched_onecycle), 0, .85))
criteria = dict(magnitude=magnitude, squared=squared, taylor=taylor)

# ---------------------------------------------------------------------------------------------------- beyond: one small callback each

class Average(Callback):
    "The weights of the last 30 % of the training, averaged (EMA), with the zeros of the last step"
    order = 70
    def __init__(self, start=.7, decay=.98): self.start,self.decay,self.mean = start,decay,None
    def after_step(self):
        if self.pct_train < self.start: return
        now = {k: v for k,v in self.model.state_dict().items() if v.is_floating_point()}
        if self.mean is None: self.mean = {k: v.clone() for k,v in now.items()}
        for k,v in now.items(): self.mean[k].lerp_(v, 1-self.decay)
    def before_validate(self):
        for k,v in self.model.state_dict().items():
            if self.epoch == self.n_epoch-1 and k in self.mean: v.copy_(torch.where(v == 0, v, self.mean[k]))

class Grow(Callback):
    "As in RigL: in the middle half, the smallest of the kept weights are exchanged for pruned ones with the largest gradient"
    order = 55
    def __init__(self, share=.1, every=20, start=.25, end=.75): self.share,self.every,self.start,self.end = share,every,start,end
    def after_backward(self):
        if self.train_iter % self.every or not self.start <= self.pct_train < self.end: return
        share = self.share * (1+math.cos(math.pi*(self.pct_train-self.start)/(self.end-self.start))) / 2
        sparsifier = self.learn.sparsify.sparsifier
        sparsifier.masks = {l.name: self.exchanged(l, sparsifier.masks[l.name], share) for l in sparsifier.layers}
    def exchanged(self, layer, mask, share):
        n_pruned = int((~mask).sum())
        n = min(round(share*(mask.numel()-n_pruned)), n_pruned)
        drop = layer.weight.abs().masked_fill(~mask, math.inf).reshape(-1).topk(n, largest=False).indices
        grow = layer.module.weight.grad.abs().masked_fill(mask, -1).reshape(-1).topk(n).indices
        flat = mask.reshape(-1).clone()
        flat[drop],flat[grow] = False,True
        return flat.view(mask.shape)

class Multiply(Callback):
    "HAM's multiplicative step: `w *= exp(-lr*α*sign(w)*grad)`"
    order = 40
    def __init__(self, alpha): self.alpha = alpha
    def after_step(self):
        with torch.no_grad():
            for p in self.model.parameters():
                if p.ndim > 1 and p.grad is not None: p.mul_(torch.exp(-self.opt.hypers[-1]['lr']*self.alpha*p.sign()*p.grad))

extras = dict(average=Average, grow=Grow, ham400=partial(Multiply, 400.), ham100=partial(Multiply, 100.))

# ---------------------------------------------------------------------------------------------------- one training

base = dict(method='ours', sparsity=.95, granularity='weight', context='lamp', criteria='magnitude', schedule='logonecycle', coupled=False,
            extra='', lr=1e-2, epochs=8, images=6000, size=16, data='cifar10')
dense = base | dict(method='dense', sparsity=0., context='', schedule='', criteria='')
paper = dict(context='local', schedule='onecycle')

def peer(sparsity):
    "fasterai's own callback, with the settings of its documentation's first example"
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_onecycle as theirs
    from fasterai.sparse.sparsify_callback import SparsifyCallback as Theirs
    return Theirs(sparsity, 'weight', 'local', large_final, Schedule(theirs))

def callbacks(c):
    extra = [extras[e]() for e in c['extra'].split(',') if e]
    if c['method'] == 'dense': return extra
    if c['method'] == 'fasterai': return [peer(c['sparsity'])]
    if c['method'] == 'straight': return [StraightThrough(c['sparsity'])]
    return [SparsifyCallback(c['sparsity'], c['granularity'], c['context'], criteria[c['criteria']], schedules[c['schedule']], coupled=c['coupled']), *extra]

class LastOnly(Callback):
    "Validate after the last epoch only"
    order = -20
    def before_validate(self):
        if self.epoch < self.n_epoch-1: raise CancelValidException()

def train(dls, c, seed):
    set_seed(seed, reproducible=True)
    for dl in dls.loaders: dl.rng.seed(seed)
    model = ex.small_resnet(3, dls.c).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(), redirect_stdout(StringIO()): learn.fit_one_cycle(c['epochs'], c['lr'], cbs=[LastOnly(), *callbacks(c)])
    values = dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    nm = ':' in c['granularity']
    counted = measured_sparsity(model, granularity='weight' if nm else c['granularity'])
    each = [round(float((m.weight == 0).float().mean()), 4) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return dict(accuracy=float(values['accuracy']), loss=float(values['valid_loss']), measured=float(counted), layers=each, seconds=round(time.perf_counter()-start, 1))

# ---------------------------------------------------------------------------------------------------- blocks of trainings

def vary(**kw): return base | kw
def over(key, values, **kw): return [base | kw | {key: v} for v in values]

screen = ['in_time', 'onecycle75', 'onecycle', 'logcos70', 'in_time35', 'cosine70', 'agp80', 'steeper', 'logonecycle', 'onecycle60']
blocks = dict(
    dense=[dense],
    schedules98=[dense, *over('schedule', screen, sparsity=.98)],
    schedules99=over('schedule', screen, sparsity=.99),
    kernels=over('context', ['local', 'erk', 'global', 'lamp'], granularity='kernel', sparsity=.9),
    filters=over('context', ['local', 'erk', 'global', 'lamp'], granularity='filter', sparsity=.5),
    straight=[dense, *over('sparsity', [.95, .98, .9, .99, .8], method='straight', schedule='agp80')],
    coupled=over('context', ['local', 'erk', 'global', 'lamp'], granularity='filter', coupled=True, sparsity=.5),
    screenshot=[dense, *(vary(method=m, sparsity=s, **kw) for s in (.95, .98, .9, .99, .8) for m,kw in (('ours', {}), ('ours', paper), ('fasterai', paper)))])

def key(c, seed): return hashlib.sha256(json.dumps(c | dict(seed=seed), sort_keys=True).encode()).hexdigest()[:12]
def rows(file): return [json.loads(l) for l in file.read_text().splitlines()] if file.exists() else []

# ---------------------------------------------------------------------------------------------------- the report

sizes = [3*16*9, 16*16*9, 16*16*9, 16*32*9, 32*32*9, 16*32, 32*64*9, 64*64*9, 32*64] # weights of the convolutions, in the order of `layers`

def group(rs, **want):
    "From seed to accuracy in points, for the rows whose settings are these (and those of the base where nothing is said)"
    want = (dense if want.get('method') == 'dense' else base) | want
    return {r['seed']: 100*r['accuracy'] for r in rs if all(r[k] == v for k,v in want.items())}

def mean_sd(v): return f'{np.mean(v):.1f}' + (f' ± {np.std(v, ddof=1):.1f}' if len(v) > 1 else '') + f' ({len(v)})' if v else '-'

def difference(a, b):
    "Mean of a-b over the seeds that both have, with its 95 % t interval"
    d = [a[s]-b[s] for s in a if s in b]
    if not d: return '-'
    if len(d) < 2: return f'{d[0]:+.1f} (1)'
    half = stats.t.ppf(.975, len(d)-1) * np.std(d, ddof=1) / math.sqrt(len(d))
    return f'{np.mean(d):+.1f} [{np.mean(d)-half:+.1f}, {np.mean(d)+half:+.1f}] ({len(d)})'

def table(head, lines): return '\n'.join(['| '+' | '.join(l)+' |' for l in [head, ['---']*len(head), *lines]]) + '\n'

def of(rs, **want):
    want = base | want
    return [r for r in rs if all(r[k] == v for k,v in want.items())]

def report(out):
    rs = rows(out/'runs.jsonl')
    chose,fresh,text = [r for r in rs if r['seed'] < 10],[r for r in rs if r['seed'] >= 10],[]
    def add(title, head, lines): text.append(f'### {title}\n\n' + table(head, [[str(c) for c in l] for l in lines if any(c not in ('', '-') for c in l[1:])]))
    best = dict(schedule='logonecycle')
    for which,part in (('seeds that chose (0 to 2)', chose), ('fresh seeds (10 and up)', fresh)):
        ref = {s: group(part, sparsity=s, **best) for s in (.95, .98, .99)}
        names = sorted({r['schedule'] for r in part if r['context'] == 'lamp' and r['granularity'] == 'weight'}, key=lambda n: (n != 'logonecycle', n))
        cells = []
        for n in names:
            line = [n]
            for s,r in ref.items():
                a = group(part, sparsity=s, schedule=n)
                line += [mean_sd(list(a.values())), '' if n == 'logonecycle' else difference(a, r)]
            cells.append(line)
        add(f'LAMP, single weights: schedules, {which}', ['schedule', *(c for s in ref for c in (f'{s:.0%}', '− log one-cycle'))], cells)
    d = group(fresh, method='dense')
    lines = []
    for s in (.8, .9, .95, .98, .99):
        ours,old,peer_ = group(fresh, sparsity=s, **best),group(fresh, sparsity=s, **paper),group(fresh, sparsity=s, method='fasterai', **paper)
        lines.append([f'{s:.0%}', mean_sd(list(ours.values())), mean_sd(list(old.values())), mean_sd(list(peer_.values())), difference(ours, old), difference(ours, peer_), difference(ours, d)])
    add(f'Accuracy against sparsity, fresh seeds; dense {mean_sd(list(d.values()))}', ['sparsity', 'LAMP, log one-cycle', 'local, one-cycle (0.1, the paper)', 'fasterai 0.4.1', 'ours − 0.1', 'ours − fasterai', 'ours − dense'], lines)
    for which,part in (('seeds that chose (0 and 1)', chose), ('fresh seeds (10 and 11)', fresh)):
        lines = []
        kinds = sorted({(r['granularity'], r['coupled'], r['sparsity']) for r in part if r['granularity'] != 'weight'})
        for g,t,s in kinds:
            for c,k in [(c, 'magnitude') for c in ('local', 'erk', 'global', 'lamp')] + [('local', 'squared'), ('lamp', 'squared')]:
                want = dict(granularity=g, coupled=t, sparsity=s, context=c, criteria=k, **best)
                found = of(part, **want)
                zeros = [100*sum(n*z for n,z in zip(sizes, r['layers']))/sum(sizes) for r in found]
                lines.append([f"{'coupled ' if t else ''}{g} {s:g}", f"{c}{', squared' if k == 'squared' else ''}" if found else '', mean_sd([100*r['accuracy'] for r in found]), f'{np.mean(zeros):.0f} %' if found else '',
                              '' if c == 'local' and k == 'magnitude' else difference(group(part, **want), group(part, **want | dict(context='local', criteria='magnitude')))])
        add(f'Blocks, {which}', ['blocks', 'allocation', 'accuracy', 'zero weights', '− local'], lines)
    lines = []
    for s in (.95, .98):
        for kw in (dict(extra='average'), dict(extra='grow'), dict(extra='ham400'), dict(lr=3e-2)):
            a,b = group(fresh, sparsity=s, **best, **kw),group(fresh, sparsity=s, **best)
            lines.append([f'{s:.0%}', ', '.join(f'{k} {v}' for k,v in kw.items()) if a else '', mean_sd(list(a.values())), difference(a, b), difference(group(fresh, method='dense', **kw), d)])
    add('Beyond, fresh seeds', ['sparsity', 'change', 'accuracy', '− without', 'the same, dense − dense'], [l for l in lines if l[1]])
    lines = [[f"{r['size']} px", r['seed'], r['method'], r['sparsity'], r['context'], r['schedule'], f"{100*r['accuracy']:.1f}"] for r in rs if r['size'] != base['size']]
    add('At other image sizes', ['size', 'seed', 'method', 'sparsity', 'context', 'schedule', 'accuracy'], lines)
    worst = max((abs(r['measured']-r['sparsity']), r['granularity']) for r in rs if r['method'] == 'ours' and r['granularity'] == 'weight')
    text.append(f"{len(rs)} trainings, {sum(r['seconds'] for r in rs)/3600:.1f} hours. Measured sparsity of our own single weights: off by at most {worst[0]:.5f} from what was asked (rounding to whole weights).\n")
    print('\n'.join(text))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--path', default='cifar10', help='a folder with the files of CIFAR-10'); p.add_argument('--out', type=Path, default=Path(__file__).parent/'results/defaults')
    p.add_argument('--block', action='append', default=[]); p.add_argument('--seeds', default='0,1'); p.add_argument('--fasterai', default='')
    p.add_argument('--runs', help='settings as a JSON list of changes to the base'); p.add_argument('--report', action='store_true', help='print the tables of OUT/README.md'); p.add_argument('--size', type=int, default=16)
    args = p.parse_args()
    if args.report: return report(args.out)
    if args.fasterai: sys.path.append(args.fasterai)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file,seeds,loaded = args.out/'runs.jsonl',[int(s) for s in args.seeds.split(',')],{}
    todo = [c for b in args.block for c in blocks[b]] + [(dense if r.get('method') == 'dense' else base) | r for r in json.loads(args.runs or '[]')]
    for seed in seeds:
        for c in todo:
            if args.size != base['size']: c = c | dict(size=args.size)
            if key(c, seed) in {r['key'] for r in rows(file)}: continue
            what = c['data'], c['size'], c['images']
            if what not in loaded: loaded[what] = ex.load_data(c['data'], args.path, size=c['size'] if c['size'] < 32 else None, bs=64, images=c['images'])
            r = train(loaded[what], c, seed)
            row = dict(key=key(c, seed), **c, seed=seed, **r, threads=torch.get_num_threads(), versions=versions(), date=str(date.today()))
            with open(file, 'a') as f: f.write(json.dumps(row)+'\n')
            changed = {k: v for k,v in c.items() if v != base[k]}
            print(f"{time.strftime('%H:%M:%S')} seed {seed} {changed}: {100*r['accuracy']:.2f} at {r['measured']:.4f}, {r['seconds']} s", flush=True)

if __name__ == '__main__': main()
