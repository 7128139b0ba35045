"""How small, and how fast? Sizes of files; parameters, FLOPs and latency of networks whose zero filters were cut; exports; accuracy.

    pip install ".[onnx]" && pip install fasterai==0.4.1      # the peer is optional
    OMP_NUM_THREADS=1 python benchmarks/small.py sizes               # a pruned ResNet-18 in files of all kinds
    OMP_NUM_THREADS=1 python benchmarks/small.py speed               # saving and loading a ResNet-50
    OMP_NUM_THREADS=1 python benchmarks/small.py latency --arch resnet18
    OMP_NUM_THREADS=1 python benchmarks/small.py export              # PyTorch, TorchScript, torch.export, ONNX
    OMP_NUM_THREADS=1 python benchmarks/small.py accuracy --path cifar-10-batches-py

Each command writes a JSON file of rows and a table in Markdown into benchmarks/results/small. `latency` and `accuracy` keep rows that are
there and say so; --again measures them afresh. Timings of one command are
interleaved: in each round every contestant runs once, in random order; given are medians with quartiles.
"""
import argparse, copy, io, json, platform, random, sys, tempfile, time, warnings, zipfile
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch, torchvision, zstandard
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import fasterprune
from fasterprune.packing import entropy_bound
from fasterprune.surgery import shrink
from fasterprune.sparsifier import Sparsifier
from fasterprune.storage import load_sparse, save_sparse

here = Path(__file__).parent/'results/small'
both = (nn.Conv2d, nn.Linear)

def machine(): return dict(date=str(date.today()), version=fasterprune.__version__, torch=torch.__version__, threads=torch.get_num_threads(), system=platform.machine(), gpu=torch.cuda.is_available())
def footer(text): return f"\n*{text}, {date.today()}, torch {torch.__version__}, {torch.get_num_threads()} thread of a {platform.machine()} server (AMD EPYC, 2 cores, no GPU).*\n"

def write(name, rows, head, lines, text):
    here.mkdir(parents=True, exist_ok=True)
    (here/f'{name}.json').write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1))
    table = '\n'.join(['| ' + ' | '.join(head) + ' |', '|---' + '|---:'*(len(head)-1) + '|', *('| ' + ' | '.join(l) + ' |' for l in lines)])
    (here/f'{name}.md').write_text(table + '\n' + footer(text))
    print(table)

def interleaved(contestants, rounds, warm=1):
    "From name to the seconds of each round"
    times = {n: [] for n in contestants}
    for r in range(-warm, rounds):
        for n in random.sample(list(contestants), len(contestants)):
            t = time.perf_counter(); contestants[n](); t = time.perf_counter()-t
            if r >= 0: times[n].append(t)
    return times

def quart(ts): return np.percentile(ts, [25, 50, 75]).tolist()
def say(q, f='{:.1f}'): return f"{f.format(q[1])} ({f.format(q[0])}–{f.format(q[2])})"

# files

def saved(x):
    f = io.BytesIO(); torch.save(x, f); return len(f.getvalue())

def sizes(args):
    torch.manual_seed(0)
    m = torchvision.models.resnet18()
    if args.state: m.load_state_dict(torch.load(args.state), strict=False)
    dense = saved(m.state_dict())
    rows = []
    for s in (.5, .8, .9, .95):
        Sparsifier(m).sparsify(s)
        state,pruned = m.state_dict(),{f'{n}.weight' for n,l in m.named_modules() if isinstance(l, nn.Conv2d)}
        data = io.BytesIO(); torch.save(state, data); data = data.getvalue()
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as z: z.writestr('model.pth', data)
        mask = {k: (np.packbits(t.numpy() != 0), t[t != 0]) if k in pruned else t for k,t in state.items()}
        path = Path(tempfile.mkdtemp())/'f'
        bound = sum(t.numel()*entropy_bound((t == 0).float().mean().item()) if k in pruned else t.nbytes*8 for k,t in state.items())/8
        ways = {'`torch.save`': len(data), 'zip -9 of it': len(zipped.getvalue()), 'zstd of it': len(zstandard.ZstdCompressor(level=3).compress(data)), 'zstd -19 of it': len(zstandard.ZstdCompressor(level=19).compress(data)),
            'COO tensors': saved({k: t.to_sparse() if k in pruned else t for k,t in state.items()}), 'CSR tensors': saved({k: t.flatten(1).to_sparse_csr() if k in pruned else t for k,t in state.items()}),
            'bit mask and values': sum(sum(x.nbytes for x in t) if isinstance(t, tuple) else t.nbytes for t in mask.values()), '**`save_sparse`**': save_sparse(m, path), 'entropy bound': round(bound)}
        rows += [dict(sparsity=s, way=w, bytes=b, ratio=dense/b, to_bound=b/bound) for w,b in ways.items()]
    by = {(r['sparsity'], r['way']): r for r in rows}
    ss = sorted({r['sparsity'] for r in rows})
    cell = lambda r: f"{r['bytes']/1e6:.2f} ({r['ratio']:.1f}×)"
    write(f"sizes{'-trained' if args.state else ''}", rows, ['MB (times smaller than the dense file)', *(f'{s:.0%} sparse' for s in ss)], [[w, *(cell(by[s, w]) for s in ss)] for w in dict.fromkeys(r['way'] for r in rows)],
        f"ResNet-18 of torchvision, 1,000 classes, its convolutions pruned (`benchmarks/small.py sizes`), {'trained' if args.state else 'as initialised'}")

def speed(args):
    torch.manual_seed(0); rows,lines = [],[]
    m,folder = torchvision.models.resnet50(),Path(tempfile.mkdtemp())
    for s in (0., .5, .9):
        if s: Sparsifier(m).sparsify(s)
        torch.save(m.state_dict(), folder/'a'); save_sparse(m, folder/'b')
        times = interleaved({'torch.save': lambda: torch.save(m.state_dict(), folder/'a'), 'torch.load': lambda: m.load_state_dict(torch.load(folder/'a')), 'save_sparse': lambda: save_sparse(m, folder/'b'), 'load_sparse': lambda: load_sparse(folder/'b', m)}, 9)
        q = {n: [1e3*x for x in quart(ts)] for n,ts in times.items()}
        rows.append(dict(sparsity=s, ms=q, bytes={n: (folder/n).stat().st_size for n in 'ab'}))
        lines.append([f'{s:.0%}', *(say(q[n], '{:.0f}') for n in ('torch.save', 'save_sparse', 'torch.load', 'load_sparse')), *(f"{(folder/n).stat().st_size/1e6:.1f}" for n in 'ab')])
    write('speed', rows, ['ResNet-50, sparsity', '`torch.save`, ms', '`save_sparse`, ms', '`torch.load`, ms', '`load_sparse`, ms', 'MB', 'MB, sparse'], lines, "Medians and quartiles of 9 interleaved rounds (`benchmarks/small.py speed`); loading includes `load_state_dict`")

# networks

def build(arch):
    torch.manual_seed(0); m = getattr(torchvision.models, arch)().eval()
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.uniform_(b.weight, .5, 1.5); nn.init.normal_(b.bias, 0, .1)
    return m

def cut(arch, s, x, round_to=1):
    m = build(arch)
    Sparsifier(m, 'filter', layers=both, sample=x, coupled=True).sparsify(s)
    return shrink(m, x, round_to)

def peer(arch, s, x):
    from contextlib import redirect_stdout
    from fasterai.core.criteria import large_final
    from fasterai.prune.pruner import Pruner
    m = build(arch)
    with redirect_stdout(io.StringIO()): Pruner(m, s, 'local', large_final, example_inputs=x).prune_model()
    return m.eval()

def facts(m, x):
    with FlopCounterMode(display=False) as f, torch.no_grad(): m(x)
    return dict(params=sum(p.numel() for p in m.parameters()), macs=f.get_total_flops()//2, bytes=saved(m.state_dict()))

def _tell_kept(file, n):
    "A benchmark that has nothing to do says so"
    if n: print(f'{n} of the settings are measured already, in {file.name}, and are kept; add --again to measure them afresh')

def latency(args):
    out,x = here/f'latency-{args.arch}.json',torch.randn(1, 3, 224, 224)
    rows = json.loads(out.read_text())['rows'] if out.exists() else []
    if args.again: rows = [r for r in rows if (r['sparsity'], r['batch']) not in {(s, b) for s in args.sparsity for b in args.batch}]
    todo = [(s, b) for s in args.sparsity for b in args.batch if not any((r['sparsity'], r['batch']) == (s, b) for r in rows)]
    _tell_kept(out, len(args.sparsity)*len(args.batch) - len(todo))
    for s,batch in todo:
        nets = {'dense': build(args.arch), 'shrunk': cut(args.arch, s, x), 'shrunk, multiples of 16': cut(args.arch, s, x, 16)}
        try: nets['fasterai 0.4.1'] = peer(args.arch, s, x)
        except ImportError as e: print('fasterai is not here:', e, file=sys.stderr)
        xs = torch.randn(batch, 3, 224, 224)
        with torch.no_grad(): times = interleaved({n: lambda m=m: m(xs) for n,m in nets.items()}, args.rounds or (21 if batch == 1 else 5))
        for n,ts in times.items():
            rows.append(dict(arch=args.arch, sparsity=s, batch=batch, net=n, ms=[1e3*q for q in quart(ts)], faster=quart(np.array(times['dense'])/ts), rounds=len(ts), **facts(nets[n], x)))
        _latency_table(args.arch, rows)
    if not todo: print((here/f'latency-{args.arch}.md').read_text())

def _latency_table(arch, rows):
    by = {(r['net'], r['sparsity'], r['batch']): r for r in rows}
    lines = []
    for s in sorted({r['sparsity'] for r in rows}):
        for n in dict.fromkeys(r['net'] for r in rows):
            here_ = [by[n, s, b] for b in sorted({r['batch'] for r in rows}) if (n, s, b) in by]
            if not here_ or n == 'dense' and s != min(r['sparsity'] for r in rows): continue
            r = here_[0]
            times = {q['batch']: f"{say(q['ms'], '{:.0f}')}" + ('' if n == 'dense' else f", {say(q['faster'], '{:.2f}')}×") for q in here_}
            lines.append([n if n == 'dense' else f'{s:.0%} of the filters, {n}', f"{r['params']/1e6:.2f}", f"{r['macs']/1e9:.2f}", f"{r['bytes']/1e6:.1f}", *(times.get(b, '') for b in sorted({r['batch'] for r in rows}))])
    write(f'latency-{arch}', rows, [arch, 'million parameters', 'billion multiply-adds', 'MB', *(f'batch {b}: ms, times faster than dense' for b in sorted({r['batch'] for r in rows}))], lines,
        "224×224 pixels; medians (quartiles) of interleaved rounds, the ratios taken round by round (`benchmarks/small.py latency`)")

# exports

def export(args):
    import onnxruntime
    rows,lines,x,folder = [],[],torch.randn(1, 3, 224, 224),Path(tempfile.mkdtemp())
    dense = build('resnet18')
    sparse = copy.deepcopy(dense); Sparsifier(sparse, 'filter', layers=both, sample=x, coupled=True).sparsify(.5)
    nets,runs = {'dense': dense, 'sparse': sparse, 'shrunk': shrink(sparse, x)},{}
    opts = onnxruntime.SessionOptions(); opts.intra_op_num_threads = opts.inter_op_num_threads = 1
    for n,m in nets.items():
        torch.save(m.state_dict(), folder/f'{n} PyTorch'); runs[n, 'PyTorch'] = lambda m=m: m(x)
        ts = torch.jit.freeze(torch.jit.trace(m, x)); ts.save(folder/f'{n} TorchScript'); ts = torch.jit.load(folder/f'{n} TorchScript'); runs[n, 'TorchScript'] = lambda ts=ts: ts(x)
        torch.export.save(torch.export.export(m, (x,)), folder/f'{n} torch.export'); ep = torch.export.load(folder/f'{n} torch.export').module(); runs[n, 'torch.export'] = lambda ep=ep: ep(x)
        torch.onnx.export(m, (x,), folder/f'{n} ONNX', dynamo=True, external_data=False, verbose=False)
        sess = onnxruntime.InferenceSession(folder/f'{n} ONNX', opts, providers=['CPUExecutionProvider']); runs[n, 'ONNX Runtime'] = lambda s=sess: torch.from_numpy(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        ref = sparse(x)
        diff = {k: ((f() - (dense(x) if k[0] == 'dense' else ref)).abs().max()/ref.abs().max()).item() for k,f in runs.items()}
        times = interleaved(runs, 21, warm=3)
    for n,how in runs:
        size = (folder/f"{n} {how.replace(' Runtime', '')}").stat().st_size
        q,f = quart(times[n, how]),quart(np.array(times['dense', how])/times[n, how])
        rows.append(dict(net=n, how=how, bytes=size, ms=[1e3*v for v in q], faster=f, difference=diff[n, how]))
        lines.append([f'{how}, {n}', f'{size/1e6:.1f}', say([1e3*v for v in q]), '' if n == 'dense' else say(f, '{:.2f}'), f'{diff[n, how]:.0e}'])
    order = {h: i for i,h in enumerate(['PyTorch', 'TorchScript', 'torch.export', 'ONNX Runtime'])}
    lines.sort(key=lambda l: order[l[0].rsplit(', ', 1)[0]])
    write('export', rows, ['ResNet-18, half of the filters', 'MB', 'ms, batch 1', 'times faster than dense', 'largest difference to PyTorch, relative'], lines, "Medians (quartiles) of 21 interleaved rounds, 224×224 pixels (`benchmarks/small.py export`)")

# accuracy

def accuracy(args):
    from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
    from fasterprune.all import SparsifyCallback
    from fasterprune.experiments import load_data, small_resnet
    out = here/f"accuracy{'' if args.path else '-digits'}.json"
    rows = json.loads(out.read_text())['rows'] if out.exists() else []
    if args.again: rows = [r for r in rows if r['seed'] >= args.seeds]
    for seed in range(args.seeds):
        for s,coupled in [(0., False), (.5, True), (.5, False), (.3, True)]:
            if any((r['sparsity'], r['coupled'], r['seed']) == (s, coupled, seed) for r in rows): _tell_kept(out, 1); continue
            set_seed(seed, reproducible=True)
            dls = load_data('cifar10', args.path, bs=128) if args.path else load_data('digits')
            set_seed(seed, reproducible=True)
            net = small_resnet(3 if args.path else 1, 10)
            learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(args.epochs, 1e-2, cbs=SparsifyCallback(s, 'filter', coupled=coupled) if s else None)
                before = learn.validate()
                params = sum(p.numel() for p in net.parameters())
                if s: learn.shrink()
                after = learn.validate()
            rows.append(dict(sparsity=s, coupled=coupled, seed=seed, epochs=args.epochs, masked=before[1], shrunk=after[1], loss=[before[0], after[0]], params=params, left=sum(p.numel() for p in learn.model.parameters())))
            _accuracy_table(rows, args)

def _accuracy_table(rows, args):
    lines = []
    for s,coupled in dict.fromkeys((r['sparsity'], r['coupled']) for r in rows):
        rs = [r for r in rows if (r['sparsity'], r['coupled']) == (s, coupled)]
        ms = lambda k: f"{100*np.mean([r[k] for r in rs]):.2f}" + (f" ± {100*np.std([r[k] for r in rs], ddof=1):.2f}" if len(rs) > 1 else '')
        lines.append(['dense' if not s else f"{s:.0%} of the filters, {'coupled' if coupled else 'each layer for itself'}", f"{np.mean([r['left'] for r in rs])/1e3:.1f}", ms('masked'), ms('shrunk'), str(len(rs))])
    write(f"accuracy{'' if args.path else '-digits'}", rows, ['small residual network', 'thousand parameters', 'accuracy before the cut, %', 'after it, %', 'runs'], lines,
        f"{'CIFAR-10' if args.path else 'The digits'}, {args.epochs} epochs, accuracy after the last epoch on the test images, mean ± standard deviation over seeds (`benchmarks/small.py accuracy`)")

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['sizes', 'speed', 'latency', 'export', 'accuracy'])
    p.add_argument('--arch', default='resnet18'); p.add_argument('--sparsity', type=float, nargs='+', default=[.3, .5, .7]); p.add_argument('--batch', type=int, nargs='+', default=[1, 32]); p.add_argument('--rounds', type=int)
    p.add_argument('--state', help='a trained state dict for `sizes`'); p.add_argument('--path', help='folder of CIFAR-10'); p.add_argument('--epochs', type=int, default=4); p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--again', action='store_true', help='latency and accuracy: measure afresh what is measured already')
    args = p.parse_args()
    torch.set_num_threads(1); random.seed(0)
    globals()[args.what](args)
