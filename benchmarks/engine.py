"""Zeros that save time: sparse networks on one thread of a processor, by PyTorch, torch.compile, ONNX Runtime, OpenVINO and fasterprune.

    pip install "fasterprune[fast]" timm onnx onnxruntime onnxscript openvino
    OMP_NUM_THREADS=1 python benchmarks/engine.py run                       # all networks, sparsities and batches; rows that are there are kept
    OMP_NUM_THREADS=1 python benchmarks/engine.py run --arch resnet18 --sparsity .9 --batch 1 --again     # these rows afresh
    OMP_NUM_THREADS=1 python benchmarks/engine.py equal                     # outputs against PyTorch: networks, odd sizes, batches
    python benchmarks/engine.py table                                       # the tables from the rows

The networks are untrained and their smallest weights zero: time depends on where zeros are, not on what the network has learned.
In each round every contestant, and fasterprune at every sparsity, runs once, in random order; the ratios are taken from the least time of each, and the median of the ratios round by round is given too.
On one thread, time is the processor's time of the process, which is the time on the clock if nothing else runs, and hardly changes if something does.
"""
import argparse, functools, json, os, platform, random, tempfile, time, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch, torchvision
from torch import nn
import fasterprune
from fasterprune.allocation import multiplications, uses
from fasterprune.engine import fast_cpu
from fasterprune.kernels import vector_width

here = Path(__file__).parent/'results/engine'
archs = 'resnet18', 'resnet50', 'vgg16_bn', 'mobilenet_v2', 'efficientnet_lite0'

def build(arch, size=224, **kw):
    torch.manual_seed(0)
    if hasattr(torchvision.models, arch): m = getattr(torchvision.models, arch)(**kw)
    else:
        import timm
        m = timm.create_model(arch)
    for b in m.modules():
        if not isinstance(b, nn.BatchNorm2d): continue
        nn.init.uniform_(b.weight, .5, 1.5), nn.init.normal_(b.bias, 0, .1), nn.init.normal_(b.running_mean, 0, .1), nn.init.uniform_(b.running_var, .5, 1.5)
    return m.eval()

def lamp(w):
    "LAMP scores: a weight's square over the sum of the squares that are not smaller"
    s,order = w.flatten().double().square().sort()
    return torch.empty_like(s).index_copy_(0, order, s/s.flip(0).cumsum(0).flip(0))

def densities(weights, sparsity, allocation):
    if allocation == 'local': return [1 - sparsity]*len(weights)
    kept = (1 - sparsity)*sum(w.numel() for w in weights)
    if allocation == 'lamp':
        scores = [lamp(w) for w in weights]
        threshold = torch.cat(scores).topk(round(kept)).values[-1]
        return [float((s >= threshold).double().mean()) for s in scores]
    raw = np.array([sum(w.shape)/w.numel() for w in weights])
    low,high = 0.,1e9
    for _ in range(200):
        e = (low + high)/2
        low,high = (low, e) if sum(min(1, e*r)*w.numel() for r,w in zip(raw, weights)) > kept else (e, high)
    return [min(1., e*r) for r in raw]

@torch.no_grad()
def prune(m, sparsity, allocation='local'):
    weights = [l.weight for l in m.modules() if isinstance(l, nn.Conv2d)]
    for w,d in zip(weights, densities(weights, sparsity, allocation)):
        zeros = w.numel() - round(d*w.numel())
        w.view(-1)[w.abs().flatten().topk(zeros, largest=False).indices] = 0
    return m

# contestants

def onnx_session(m, x):
    import onnxruntime as ort
    path = Path(tempfile.mkdtemp())/'m.onnx'
    torch.onnx.export(m, (x,), path, dynamo=False, input_names=['x'], output_names=['y'])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    session,x = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider']),x.numpy()
    return lambda: session.run(None, {'x': x})[0]

def openvino_call(m, x):
    import openvino as ov
    model = ov.compile_model(ov.convert_model(m, example_input=x), 'CPU', dict(INFERENCE_NUM_THREADS=torch.get_num_threads(), INFERENCE_PRECISION_HINT='f32', PERFORMANCE_HINT='LATENCY'))
    return lambda: model(x)[0]

def compiled(m, x):
    torch._dynamo.reset()
    c = torch.compile(m)
    c(x)
    return lambda: c(x)

def contestants(m, x, others):
    calls = {'PyTorch': lambda: m(x)}
    for name,make in (('torch.compile', compiled), ('ONNX Runtime', onnx_session), ('OpenVINO', openvino_call)):
        if name not in others: continue
        try: calls[name] = make(m, x)
        except Exception as e: print(f'  without {name}: {type(e).__name__}: {str(e)[:120]}', flush=True)
    return calls

def interleaved(calls, rounds, warm=2):
    "From name to the seconds of each round"
    times,clock = {n: [] for n in calls},time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for r in range(-warm, rounds):
        for n in random.sample(list(calls), len(calls)):
            t = clock(); calls[n](); t = clock() - t
            if r >= 0: times[n].append(t)
    return times

# rows

def measure(arch, batch, wanted, args):
    "Rows of a network, one for each (allocation, sparsity) of `wanted`, all in the same rounds; the others run it with 90 % zeros, which they multiply by"
    x = torch.randn(batch, 3, args.size, args.size)
    nets = {w: prune(build(arch), w[1], w[0]) for w in wanted}
    fast = {w: fast_cpu(m, x) for w,m in nets.items()}
    with torch.no_grad():
        others = contestants(prune(build(arch), .9), x, args.others)
        times = interleaved({**others, **{w: functools.partial(f, x) for w,f in fast.items()}}, args.rounds or (20 if batch == 1 else 6))
        for w in wanted: yield row(arch, batch, w, nets[w], fast[w], x, {n: times[n] for n in others} | {'fasterprune': times[w]}, args.size)

def row(arch, batch, wanted, m, fast, x, times, size):
    ops,ours,expected = np.array(list(multiplications(m, x).values())).sum(0),np.array(times['fasterprune']),m(x)
    return dict(arch=arch, allocation=wanted[0], sparsity=wanted[1], batch=batch, size=size, rounds=len(ours), error=float((expected - fast(x)).abs().max()/expected.abs().max()),
        left=float(ops[1]/ops[0]), used=fast.first.used, plan={w: list(fast.plan.values()).count(w) for w in ('sparse', 'dense')},
        ms={n: dict(least=1e3*min(t), median=1e3*float(np.median(t))) for n,t in times.items()},
        ratio={n: dict(least=min(t)/ours.min(), median=float(np.median(np.array(t)/ours))) for n,t in times.items() if n != 'fasterprune'}, machine=machine())

def machine():
    name = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    return dict(date=str(date.today()), version=fasterprune.__version__, torch=torch.__version__, threads=torch.get_num_threads(), processor=name, floats_a_vector=vector_width(), load=os.getloadavg()[0])

def rows(): return json.loads((here/'rows.json').read_text()) if (here/'rows.json').exists() else []
def key(r): return r['arch'], r['allocation'], r['sparsity'], r['batch'], r['size'], *(r['machine'][k] for k in ('threads', 'floats_a_vector', 'processor'))
def keep(new):
    here.mkdir(parents=True, exist_ok=True)
    kept = [r for r in rows() if key(r) != key(new)] + [new]
    (here/'rows.json').write_text(json.dumps(sorted(kept, key=lambda r: (archs.index(r['arch']) if r['arch'] in archs else 9, r['batch'], r['allocation'] != 'local', r['allocation'], r['sparsity'])), indent=1))

def run(args):
    there = set() if args.again else {key(r) for r in rows()}
    for batch in args.batch:
        for arch in args.arch:
            wanted = [('local', s) for s in args.sparsity]
            if arch == 'resnet18' and batch == 1: wanted += [(a, s) for a in ('erk', 'lamp') for s in args.sparsity if s >= .9]
            todo = [w for w in wanted if (arch, *w, batch, args.size, *(machine()[k] for k in ('threads', 'floats_a_vector', 'processor'))) not in there]
            if len(todo) < len(wanted): print(f'{arch}, batch {batch}: {len(wanted) - len(todo)} of {len(wanted)} rows are in {here.name}/rows.json and are kept; --again measures them afresh')
            for r in measure(arch, batch, todo, args) if todo else ():
                keep(r)
                print(arch, batch, r['allocation'], r['sparsity'], {n: f"{v['least']:.1f} ms" for n,v in r['ms'].items()}, {n: f"{v['least']:.2f}x" for n,v in r['ratio'].items()}, f"error {r['error']:.0e}", flush=True)
    table(args)

# equal outputs

nets = ('resnet18', 'mobilenet_v2', 'mobilenet_v3_small', 'squeezenet1_1', 'shufflenet_v2_x1_0', 'regnet_y_400mf', 'efficientnet_lite0', 'mnasnet_100',
    'convnext_atto', 'densenet121', 'vgg11_bn', 'resnext50_32x4d')

def equal(args):
    out = []
    for i,arch in enumerate(args.nets or nets):
        batch,h,w = 1 + i % 5,65 + 7*i,96 + 5*i # from one image to five, sizes odd and even
        m,x = prune(build(arch), args.sparsity[0]),torch.randn(batch, 3, h, w)
        with torch.no_grad(): program,wanted = fast_cpu(m, x, dict.fromkeys(uses(m, x), 'sparse')).first,m(x) # all layers sparse, faster or not
        error = float((program(x)[0] - wanted).abs().max()/wanted.abs().max())
        by_torch = sorted({name.rstrip('_0123456789') for name,how,*_ in program.report if how == 'PyTorch'})
        out.append(dict(arch=arch, batch=batch, height=h, width=w, sparsity=args.sparsity[0], error=error, by_pytorch=by_torch, machine=machine()))
        print(arch, (batch, h, w), f'error {error:.1e}', by_torch, flush=True)
        keep_equal(out, args.sparsity[0])

def keep_equal(out, sparsity):
    here.mkdir(parents=True, exist_ok=True)
    (here/'equal.json').write_text(json.dumps(out, indent=1))
    lines = [[r['arch'], f"{r['batch']}×3×{r['height']}×{r['width']}", f"{r['error']:.0e}", ', '.join(r['by_pytorch'])] for r in out]
    write('equal', ['network', 'input', 'largest difference, relative', 'operations left to PyTorch'], lines, f"{sparsity:.0%} of the weights of each convolution zero, every layer run sparse, one thread of a 2-core x86-64 server without a GPU, {vectors[vector_width()]} (`benchmarks/engine.py equal`)")

# tables

def markdown(head, lines): return '\n'.join(['| ' + ' | '.join(head) + ' |', '|---' + '|---:'*(len(head)-1) + '|', *('| ' + ' | '.join(l) + ' |' for l in lines)])

def write(name, head, lines, text):
    (here/f'{name}.md').write_text(f'{markdown(head, lines)}\n\n*{text}, {date.today()}, torch {torch.__version__}.*\n')

def line(r, names):
    def cell(what, n):
        if n not in r[what]: return '–'
        least = r[what][n]['least']
        return f'{least:.1f}' if what == 'ms' else f"{least:.2f} ({r[what][n]['median']:.2f})"
    zero = f"{r['sparsity']:.0%}" + (f" {r['allocation']}" if r['sparsity'] else '')
    return [f"{r['arch']}, {r['batch']}", zero, f"{r['left']:.0%}", *(cell('ms', n) for n in names), *(cell('ratio', n) for n in names[:-1])]

vectors = {4: 'four floats a vector', 8: 'AVX2: eight floats a vector', 16: 'AVX-512: sixteen floats a vector'}

def table(args):
    "One table for each kind of processor, and each number of threads"
    by = {}
    for r in rows(): by.setdefault((r['machine']['floats_a_vector'], r['machine']['threads'], r['machine']['processor']), []).append(r)
    parts = []
    for (floats,threads,_),own in sorted(by.items(), reverse=True):
        names = [n for n in ('PyTorch', 'torch.compile', 'ONNX Runtime', 'OpenVINO', 'fasterprune') if any(n in r['ms'] for r in own)]
        head = ['network, batch', 'weights zero', 'multiplications left', *(f'{n}, ms' for n in names), *(f'times as fast as {n}' for n in names[:-1])]
        dates,m = sorted({r['machine']['date'] for r in own}),own[-1]['machine']
        text = (f"{own[0]['size']}×{own[0]['size']} pixels, threads: {threads}, of a 2-core x86-64 server without a GPU ({m['processor']}, {vectors[floats]}), other work running beside it; least "
            f"{'processor time' if threads == 1 else 'time'} of interleaved rounds, ratios of the least times, and in brackets the median of the ratios round by round "
            f"(`benchmarks/engine.py run`), {' and '.join(dates)}, torch {m['torch']}.")
        parts.append('\n'.join([markdown(head, [line(r, names) for r in own]), '', f'*{text}*']))
    (here/'speed.md').write_text('\n\n'.join(parts) + '\n')
    print('\n\n'.join(parts))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('command', choices=['run', 'equal', 'table'])
    p.add_argument('--arch', nargs='+', default=archs, help='networks of torchvision or timm')
    p.add_argument('--nets', nargs='+', help='networks for equal')
    p.add_argument('--sparsity', nargs='+', type=float, default=[0., .5, .8, .9, .95])
    p.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    p.add_argument('--size', type=int, default=224, help='pixels of a side')
    p.add_argument('--rounds', type=int, help='interleaved rounds: 20 for batch 1, else 6')
    p.add_argument('--others', nargs='*', default=['torch.compile', 'ONNX Runtime', 'OpenVINO'], help='contestants besides PyTorch: torch.compile, ONNX Runtime, OpenVINO')
    p.add_argument('--again', action='store_true', help='measure rows afresh that are there')
    args = p.parse_args()
    globals()[args.command](args)
