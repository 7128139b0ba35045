"""Accuracy at equal milliseconds: which share of the zeros for each layer gives the most accuracy for the time that the network takes?

    pip install "fasterprune[fast]"
    OMP_NUM_THREADS=1 python benchmarks/allocation.py train --path DIR_WITH_CIFAR10     # rows that are there are kept; --again for new ones
    OMP_NUM_THREADS=1 python benchmarks/allocation.py time                              # the milliseconds of every network, all interleaved
    python benchmarks/allocation.py draw                                                # table and picture

The small residual network of `fasterprune.experiments` on 6,000 photographs of CIFAR-10 at 16×16 pixels, 8 epochs of the one-cycle
policy, accuracy after the last epoch on all 10,000 test photographs. For a seed, every way starts from the same weights and sees the
same batches. `ours` is `by_multiplications` with half of the multiplications that LAMP leaves at the same sparsity, and `straight` the same with
`StraightThrough`; `filters` cuts whole
filters, coupled, out of the network, which PyTorch and the engine then run as a smaller dense one. Each training leaves its weights in
a sparse file under --nets, from which `time` measures: all networks in turn, in random order, least processor time of one thread.
"""
import argparse, json, math, os, random, tempfile, time, warnings
from collections import defaultdict
from datetime import date
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from fastai.basics import CancelValidException, Callback, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback import schedule # gives the Learner its fit_one_cycle
from fasterprune import experiments
from fasterprune.allocation import by_multiplications, multiplications
from fasterprune.callback import SparsifyCallback
from fasterprune.engine import fast_cpu
from fasterprune.kernels import vector_width
from fasterprune.sparsifier import Sparsifier
from fasterprune.sparsity import measured_sparsity
from fasterprune.straight import StraightThrough
from fasterprune.storage import load_sparse, save_sparse
from fasterprune.surgery import shrink

here = Path(__file__).parent/'results/allocation'
size,images,epochs = 16,6000,8
wanted = [('lamp', .95), ('ours', .95), ('straight', .95), ('local', .95), ('erk', .95), ('filters', .5), ('dense', 0.),
    *((way, s) for s in (.9, .98) for way in ('lamp', 'ours', 'local', 'erk')), ('filters', .7)]
labels = dict(local='local', erk='ERK', lamp='LAMP', ours='by_multiplications', straight='by_multiplications, StraightThrough', filters='filters cut', dense='dense')

def network(seed):
    set_seed(seed, reproducible=True)
    return experiments.small_resnet(3, 10)

# training

class LastOnly(Callback):
    "Validates after the last epoch only"
    order = -20
    def before_validate(self):
        if self.epoch < self.n_epoch-1: raise CancelValidException()

def pruning(way, sparsity, model, sample):
    "The callbacks of a way"
    if way == 'dense': return []
    if way == 'filters': return [SparsifyCallback(sparsity, 'filter', coupled=True)]
    if way not in ('ours', 'straight'): return [SparsifyCallback(sparsity, context=way)]
    return [dict(ours=SparsifyCallback, straight=partial(StraightThrough, every=1))[way](sparsity, context=by_multiplications(model, sample, sparsity))]

def train(dls, way, sparsity, seed, nets):
    model,sample = network(seed),torch.randn(1, 3, size, size)
    for dl in dls.loaders: dl.rng.seed(seed)
    learn = Learner(dls, model.to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=[LastOnly(), *pruning(way, sparsity, model, sample)])
    seconds,reached = time.process_time() - start,learn.recorder.values[-1][2] # train_loss, valid_loss, accuracy, …
    model,zeros = model.to(memory_format=torch.contiguous_format),measured_sparsity(model)
    if way == 'filters': model = shrink(model, sample)
    file = f'{way}-{sparsity}-{seed}.safetensors.zst'
    bytes_ = save_sparse(model, nets/file)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return dict(way=way, sparsity=sparsity, seed=seed, accuracy=reached, measured=float(zeros), left=left_of(model, sample), each=[float((m.weight == 0).float().mean()) for m in convolutions],
        seconds=seconds, bytes=bytes_, file=file, size=size, images=images, epochs=epochs, date=str(date.today()), torch=torch.__version__)

def left_of(model, sample):
    "The multiplications that are left, as a fraction of the whole network's"
    own = np.array(list(multiplications(model, sample).values())).sum(0)[1]
    return float(own/np.array(list(multiplications(network(0), sample).values())).sum(0)[0])

# rows

def rows(): return [json.loads(l) for l in (here/'runs.jsonl').read_text().splitlines()] if (here/'runs.jsonl').exists() else []
def key(r): return r['way'], r['sparsity'], r['seed']

def write(new):
    here.mkdir(parents=True, exist_ok=True)
    by = {key(r): r for r in rows()} | {key(r): r for r in new}
    (here/'runs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in by.values()))

def run_train(args):
    args.nets.mkdir(parents=True, exist_ok=True)
    todo = [(*w, seed) for seed in args.seeds for w in wanted if args.ways is None or w[0] in args.ways]
    todo = [w for w in todo if args.sparsities is None or w[1] in args.sparsities]
    there = set() if args.again else {key(r) for r in rows()}
    left = [w for w in todo if w not in there]
    if len(left) < len(todo): print(f'{len(todo) - len(left)} of {len(todo)} rows are in {here.name}/runs.jsonl and are kept; --again measures them afresh')
    if not left: return
    dls = experiments.load_data('cifar10', args.path, size=size, bs=64, images=images)
    for w in left:
        r = train(dls, *w, args.nets)
        write([r])
        print(f"{r['way']:8} {r['sparsity']:.2f} seed {r['seed']}: {r['accuracy']:.2%}, {r['left']:.1%} of the multiplications, {r['seconds']:.0f} s", flush=True)

# time

def fast_networks(args, batch):
    "From key to the engine's network, of those whose weights are at hand"
    nets = {}
    for r in rows():
        if not (args.nets/r.get('file', '-')).exists(): print(f"without {key(r)}: its file is not in --nets; train it with --again"); continue
        model = load_sparse(args.nets/r['file'], network(0)).eval()
        nets[key(r)] = fast_cpu(model, torch.randn(batch, 3, size, size))
    return nets

@torch.no_grad()
def least_times(nets, batch, rounds):
    "The least milliseconds of each network, and of PyTorch with its model"
    x,least = torch.randn(batch, 3, size, size),defaultdict(lambda: math.inf)
    calls = {(k, how): f for k,n in nets.items() for how,f in (('fast', n), ('eager', n.model))}
    for _ in range(rounds):
        for k in random.sample(list(calls), len(calls)):
            start = time.thread_time()
            calls[k](x)
            least[k] = min(least[k], 1e3*(time.thread_time() - start))
    return least

def run_time(args):
    torch.set_num_threads(1)
    new = {key(r): dict(r, ms={}) for r in rows()}
    for batch in (1, 16):
        nets = fast_networks(args, batch)
        for (k,how),ms in least_times(nets, batch, args.rounds).items(): new[k]['ms'][f'{how} {batch}'] = ms
    for r in new.values(): r.update(floats_a_vector=vector_width(), timed=str(date.today()))
    write([r for r in new.values() if r['ms']])

# table and picture

def spread(values):
    mean = f'{np.mean(values):.1f}'
    return mean + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else '') + f' ({len(values)})'

def groups():
    "From way to sparsity to rows"
    by = defaultdict(lambda: defaultdict(list))
    for r in rows(): by[r['way']][r['sparsity']].append(r)
    return by

def mean(rs, what): return float(np.mean([what(r) for r in rs]))

def table(by):
    yield '| | weights zero | accuracy, % (seeds) | multiplications left | ms, 1 picture | ms, 16 pictures | PyTorch, ms, 16 | bytes |'
    yield '|---' + '|---:'*7 + '|'
    for way in labels:
        for s,rs in sorted(by[way].items()):
            timed,stored = ([r for r in rs if k in r] for k in ('ms', 'bytes'))
            ms = [f"{mean(timed, lambda r: r['ms'][n]):.2f}" if timed else '' for n in ('fast 1', 'fast 16', 'eager 16')]
            zero = f'{s:.0%} of the filters' if way == 'filters' else f"{s:.0%}"
            cells = labels[way],zero,spread([100*r['accuracy'] for r in rs]),f"{mean(rs, lambda r: r['left']):.1%}",*ms,f"{mean(stored, lambda r: r['bytes']):,.0f}" if stored else ''
            yield '| ' + ' | '.join(cells) + ' |'

def paired(by, a, b, sparsity):
    "Mean and standard deviation of the difference in points of accuracy, over the seeds that both have"
    first,second = ({r['seed']: 100*r['accuracy'] for r in by[w][sparsity]} for w in (a, b))
    d = [first[s] - second[s] for s in first if s in second]
    return f'{np.mean(d):+.2f} ± {np.std(d, ddof=1):.2f} points over {len(d)} seeds' if len(d) > 1 else f'{np.mean(d):+.2f} points, one seed'

def footer(by):
    r = [r for r in rows() if 'ms' in r][-1]
    lamp,ours = (mean(by[w][.95], lambda r: r['left']) for w in ('lamp', 'ours'))
    vectors = f"{r.get('floats_a_vector')} floats a vector"
    yield f"At 95 %, by_multiplications against LAMP, seed by seed: {paired(by, 'ours', 'lamp', .95)}, with {ours/lamp:.2f} times the multiplications."
    if by['straight']: yield f"The same with StraightThrough, against LAMP with SparsifyCallback: {paired(by, 'straight', 'lamp', .95)}."
    yield ''
    yield (f"*{images:,} photographs of CIFAR-10 at {size}×{size} pixels, {epochs} epochs, accuracy after the last epoch on 10,000 (`benchmarks/allocation.py`); least processor time of interleaved "
           f"rounds with other work running beside them, one thread of a 2-core x86-64 server without a GPU, {vectors}, {r['date']}, torch {r['torch']}.*")

def draw(by, file):
    import matplotlib.pyplot as plt
    fig,axes = plt.subplots(1, 2, figsize=(9.5, 4), layout='constrained', sharey=True)
    for ax,x,label in zip(axes, (lambda r: 100*r['left'], lambda r: r['ms']['fast 16']), ('multiplications left (%)', 'milliseconds for 16 pictures, with fast_cpu')):
        for i,way in enumerate(w for w in labels if any('ms' in r for rs in by[w].values() for r in rs)):
            found = {s: [r for r in rs if 'ms' in r] for s,rs in by[way].items()}
            points = sorted((mean(rs, x), mean(rs, lambda r: 100*r['accuracy']), s) for s,rs in found.items() if rs)
            at,acc,_ = zip(*points)
            ax.plot(at, acc, 'os^Dv*'[i] + '-', color=f'C{i}', ms=6, label=labels[way])
            for a,b,s in points: ax.annotate(f'{s:.0%}' if s else '', (a, b), textcoords='offset points', xytext=(5, -9), fontsize=7, color=f'C{i}')
        ax.set_xscale('log')
        ticks = [1, 2, 5, 10, 20, 50, 100] if ax is axes[0] else [.2, .5, 1, 2, 5, 10]
        low,high = ax.get_xlim()
        ax.set_xticks([t for t in ticks if low <= t <= high], [f'{t:g}' for t in ticks if low <= t <= high])
        ax.minorticks_off()
        ax.set(xlabel=label)
        ax.grid(alpha=.3)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].set_ylabel('accuracy at the last epoch (%)')
    axes[0].legend(frameon=False)
    fig.savefig(file, dpi=130)

def run_draw(args):
    by = groups()
    text = '\n'.join([*table(by), '', *footer(by)]) + '\n'
    (here/'allocation.md').write_text(text)
    print(text)
    if any('ms' in r for r in rows()): draw(by, here/'allocation.png')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('command', choices=['train', 'time', 'draw'])
    p.add_argument('--path', help='folder with CIFAR-10 in the format of its authors (cifar-10-batches-py)')
    p.add_argument('--nets', type=Path, default=Path(tempfile.gettempdir())/'fasterprune-allocation', help='folder for the trained weights')
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--ways', nargs='+', choices=list(labels))
    p.add_argument('--sparsities', nargs='+', type=float)
    p.add_argument('--rounds', type=int, default=30, help='interleaved rounds of time')
    p.add_argument('--again', action='store_true', help='train rows afresh that are there')
    args = p.parse_args()
    globals()[f'run_{args.command}'](args)
