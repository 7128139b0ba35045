"""All that needs a GPU, in one script: tests, 2:4, the cost of a step, latency, and the paper's table.

    python benchmarks/gpu.py --path DIR_WITH_CIFAR10 --out benchmarks/results/gpu       # at most 9 minutes
    python benchmarks/gpu.py --tiny                                                     # a dry run on the CPU

Made for one data-centre GPU on a machine that is lent for minutes and has nothing but PyTorch 2.11 and torchvision 0.26.
What else is imported is carried as wheels and installed without an index, PyTorch left as it is:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels \\
        fastai fastcore fastprogress fastdownload fasttransform plum-dispatch beartype zstandard pytest iniconfig pluggy
    pip install --no-index --no-deps wheels/*.whl .     # pip check then names what else the machine lacks

The parts run in this order, each within its own share of the time, and every figure is in OUT/gpu.json and OUT/gpu.md as
soon as it is known. A part that fails leaves its error there and the next one runs. The table trains several networks side
by side, images in the GPU's memory; it stops by the clock, its rows are lines of OUT/results.jsonl, and another call
trains those that are missing.
"""
import argparse, copy, json, os, signal, subprocess, sys, time, traceback, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch, torchvision
from torch import nn
from fastai.callback.schedule import sched_lin
import fasterprune
from fasterprune.callback import SparsifyCallback
from fasterprune.cost import measure_latency
from fasterprune.experiments import Results
from fasterprune.sparsifier import Sparsifier
from fasterprune.surgery import shrink
from speed import Driver

here = Path(__file__).resolve().parent
begun = time.monotonic()

class Figures:
    "What is known so far, on disk"
    def __init__(self, args):
        self.args,self.rows = args,[]
        gpu = torch.cuda.get_device_name() if args.device == 'cuda' else 'no GPU: a dry run'
        self.about = dict(device=gpu, torch=torch.__version__, torchvision=torchvision.__version__, fasterprune=fasterprune.__version__,
                          date=str(date.today()), command='python benchmarks/gpu.py' + (' --tiny' if args.tiny else ''))
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self): return 60*self.args.minutes - (time.monotonic()-begun)

    def add(self, part, name, value, goal=''):
        self.rows.append(dict(part=part, name=name, value=value, goal=goal, at=round(time.monotonic()-begun, 1)))
        print(f"{self.rows[-1]['at']:6.1f} s  {part}: {name}: {value}" + (f'   (goal: {goal})' if goal else ''), flush=True)
        (self.args.out/'gpu.json').write_text(json.dumps(dict(self.about, rows=self.rows), indent=1, ensure_ascii=False))
        lines = [f'*{", ".join(f"{k} {v}" for k,v in self.about.items())}*', '', '| part | figure | value | goal |', '|---|---|---:|---:|']
        (self.args.out/'gpu.md').write_text('\n'.join(lines + ['| {part} | {name} | {value} | {goal} |'.format(**r) for r in self.rows]) + '\n')

def part_tests(f):
    "The tests marked for CUDA, and the selection's own; skipped where there is no GPU"
    which = ['tests/test_cuda.py', 'tests/test_devices.py::test_a_gpu_chooses_as_the_cpu_does']
    path = os.pathsep.join([str(here.parent), os.environ.get('PYTHONPATH', '')])
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *which], cwd=here.parent, env=os.environ | dict(PYTHONPATH=path),
                         capture_output=True, text=True, timeout=max(5, min(300 if f.args.tiny else 90, f.left()/2)))
    for line in [l for l in run.stdout.splitlines() if l.startswith(('FAILED', 'ERROR'))]: f.add('tests', 'failed', line)
    counts = [l for l in run.stdout.splitlines() if 'passed' in l or 'skipped' in l or 'failed' in l]
    f.add('tests', 'marked for CUDA', counts[-1].strip('= ') if counts else run.stderr.strip().splitlines()[-1], 'all passed')

def part_semi_structured(f):
    "2:4 through PyTorch's own sparse weights: the same outputs, and the time of one linear layer"
    n = 64 if f.args.tiny else 8192
    torch.manual_seed(0)
    layer,x = nn.Linear(n, n, bias=False).half().to(f.args.device),torch.randn(n, n, device=f.args.device).half()
    Sparsifier(layer, '2:4', layers=nn.Linear).sparsify(.5)
    fits = (layer.weight.unflatten(1, (-1, 4)) != 0).sum(2).unique().tolist()
    f.add('2:4', 'weights left of every four', fits, '[2]')
    if f.args.device == 'cpu': return f.add('2:4', "PyTorch's own sparse weight", 'needs a GPU')
    from torch.sparse import to_sparse_semi_structured
    sparse = copy.deepcopy(layer)
    sparse.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()))
    with torch.no_grad(): f.add('2:4', 'largest difference of outputs, relative', f'{float((sparse(x)-layer(x)).abs().max()/layer(x).abs().max()):.1e}', '≤ 1e-2')
    times = [measure_latency(m, x).median for m in (layer, sparse)]
    f.add('2:4', f'time of a {n}×{n} layer, sparse / dense', f'{times[1]/times[0]:.2f}', '< 1')

def contestants(tiny): return {f'{kind} {c}': (kind, c) for kind in ('ordinary', 'selecting') for c in ('lamp', 'local', 'global')[:1 if tiny else 3]}

def drivers(arch, f, steps):
    "A dense training and ours, from the same weights, channels last"
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(num_classes=10).to(memory_format=torch.channels_last)
    def make(cbs): return Driver(copy.deepcopy(model), cbs, steps, f.args.device, amp=f.args.device == 'cuda')
    ours = {n: make([SparsifyCallback(.95, context=c, schedule=sched_lin, min_change=0.)]) for n,(_,c) in contestants(f.args.tiny).items()}
    return dict(dense=make([])) | ours

def part_steps(f):
    "Interleaved steps: ordinary, and with a selection in each; every ratio is to the dense step of the same round"
    for arch in f.args.archs:
        bs,size,steps = (2, 32, 2) if f.args.tiny else (128, 224, 30)
        ds = drivers(arch, f, steps)
        batch = (torch.randn(bs, 3, size, size, device=f.args.device).to(memory_format=torch.channels_last), torch.randint(0, 10, (bs,), device=f.args.device))
        times,rng,warm = {n: [] for n in ds},np.random.default_rng(0),1 if f.args.tiny else 5
        for i in range(warm+steps):
            for n in rng.permutation(list(ds)):
                t = ds[n].step(i+1, batch, .5 + (.4*i/(warm+steps) if n.startswith('selecting') else 0))
                if i >= warm: times[n].append(t)
            if f.left() < 200 and i >= warm+3 and not f.args.tiny: break # the table wants its time
        f.add('steps', f'{arch}, dense step, ms', f"{1e3*np.median(times['dense']):.2f}")
        for n,t in times.items():
            low,mid,high = np.percentile(np.array(t)/np.array(times['dense']), [25, 50, 75])
            if n != 'dense': f.add('steps', f'{arch}, {n} / dense', f'{mid:.3f} [{low:.3f}, {high:.3f}]', '≤ 1.01' if n.startswith('ordinary') else '≤ 1.05')
        memory(arch, ds['selecting lamp'], f)
        del ds
        whole_run(arch, batch, f)

def memory(arch, driver, f):
    "What a selection takes for a moment, beside the weights of the network"
    if f.args.device == 'cpu': return f.add('steps', f'{arch}, memory for a moment / weights', 'needs a GPU', '≤ 1.5')
    sp,weights = driver.learn.sparsify.sparsifier,sum(p.nbytes for p in driver.learn.model.parameters())
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sp.update(.94)
    torch.cuda.synchronize()
    f.add('steps', f'{arch}, memory for a moment / weights', f'{(torch.cuda.max_memory_allocated()-before)/weights:.2f}', '≤ 1.5')

def whole_run(arch, batch, f):
    "A whole one-cycle run with the default settings, in blocks that alternate with the dense network; the clock is read at the ends of blocks"
    blocks,n = (2, 2) if f.args.tiny else (10, 40)
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(num_classes=10).to(memory_format=torch.channels_last)
    ds = {k: Driver(copy.deepcopy(model), cbs, blocks*n, f.args.device, amp=f.args.device == 'cuda') for k,cbs in (('dense', []), ('ours', [SparsifyCallback(.95)]))}
    def block(d, b):
        start = time.perf_counter()
        for i in range(n):
            d.learn.pct_train = (b*n+i)/(blocks*n)
            d.learn.one_batch(b*n+i, batch)
        if f.args.device == 'cuda': torch.cuda.synchronize()
        return time.perf_counter()-start
    for d in ds.values(): d.learn.pct_train = 0.; d.learn.one_batch(0, batch)
    total,done = dict(dense=0., ours=0.),0
    for b in range(blocks):
        for k in (('dense', 'ours') if b % 2 else ('ours', 'dense')): total[k] += block(ds[k], b)
        done += 1
    f.add('steps', f'{arch}, whole run of {blocks*n} steps / dense', f"{total['ours']/total['dense']:.3f}", '≤ 1.01 (of 1,000 steps and more)')

def part_latency(f):
    "Networks of which half of the coupled filters were cut out, beside the dense ones"
    for arch in f.args.archs:
        bs,size,n = (2, 32, 2) if f.args.tiny else (128, 224, 30)
        torch.manual_seed(0)
        m,x = getattr(torchvision.models, arch)(num_classes=10).to(f.args.device).eval(),torch.randn(bs, 3, size, size, device=f.args.device)
        pruned = copy.deepcopy(m)
        Sparsifier(pruned, 'filter', sample=x[:2], coupled=True).sparsify(.5)
        small = shrink(pruned, x[:2], round_to=8)
        kinds = {'float32': torch.float32} if f.args.tiny else {'float32': torch.float32, 'float16, channels last': torch.float16}
        for kind,dtype in kinds.items():
            last = torch.channels_last if 'last' in kind else torch.contiguous_format
            times = [measure_latency(copy.deepcopy(net).to(dtype).to(memory_format=last), x.to(dtype).to(memory_format=last), n, 3).median for net in (m, small)]
            f.add('latency', f'{arch}, {kind}, batch {bs}: half of the filters cut / dense', f'{times[1]/times[0]:.2f} ({1e3*times[0]:.2f} ms → {1e3*times[1]:.2f} ms)')

def table_settings(args):
    "What the child process trains, in this order"
    base = dict(out=str(args.out), device=args.device, workers=args.workers, sparsities=[.95], seeds=3, path=args.path, recipe='paper', data='cifar10', arch='resnet18_32',
                size=None, augment='shift', bs=128, lr=3e-3, epochs=25, precision='bf16')
    if args.tiny: base |= dict(recipe='digits', data='digits', arch='small', path=None, bs=64, lr=1e-2, epochs=1, seeds=1, precision='float32')
    paper = dict(schedules='onecycle,oneshot' if args.tiny else 'onecycle,oneshot,iterative,agp', context='local')
    return [base | paper, base | dict(schedules='onecycle_log', context='lamp')]

def part_table(f):
    "Trainings side by side in a process group of their own, which is ended when the time is over; finished rows are safe"
    if f.args.path is None and not f.args.tiny: return f.add('table', 'CIFAR-10', 'give --path, the folder that holds it')
    before,results = {r['key'] for r in Results(f.args.out).rows()},Results(f.args.out)
    code = 'import sys, json; from fasterprune.experiments import compare\nfor s in json.loads(sys.argv[1]): compare(**s)'
    child = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, json.dumps(table_settings(f.args))], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try: _,errors = child.communicate(timeout=max(1, f.left()-10))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL) # the group that was started here
        _,errors = child.communicate()
        f.add('table', 'stopped', 'by the clock; call again for the rest')
    else:
        if child.returncode: f.add('table', 'failed', (errors.strip().splitlines() or ['without a word'])[-1])
    rows = results.rows()
    f.add('table', 'trainings', f'{len(rows)-len(before)} new, {len(rows)} in all')
    groups = {}
    for r in rows: groups.setdefault((str(r['schedule']), str(r['context'])), []).append(r)
    for (schedule,context),rs in groups.items():
        accuracies = 100*np.array([r['accuracy'] for r in rs])
        f.add('table', f"{rs[0]['data']}, {rs[0]['arch']}, {schedule}" + ('' if schedule == 'dense' else f", {context}, {rs[0]['sparsity']:.0%}"),
              f'{accuracies.mean():.2f}' + (f' ± {accuracies.std(ddof=1):.2f}' if len(rs) > 1 else '') + f' % (n={len(rs)}), zeros {np.mean([r["measured"] for r in rs]):.4f}')

parts = dict(tests=part_tests, semi_structured=part_semi_structured, steps=part_steps, latency=part_latency, table=part_table)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--path', help='the folder that holds CIFAR-10'); p.add_argument('--out', type=Path, default=None)
    p.add_argument('--minutes', type=float, default=9.); p.add_argument('--parts', default=','.join(parts)); p.add_argument('--workers', type=int, default=None, help='trainings side by side')
    p.add_argument('--tiny', action='store_true', help='tiny sizes, on the CPU: is the script in order?')
    args = p.parse_args()
    args.device = 'cpu' if args.tiny else 'cuda'
    if not args.tiny and not torch.cuda.is_available(): sys.exit('there is no GPU here; --tiny is a dry run on the CPU')
    args.out = args.out or (Path('gpu-dry-run') if args.tiny else here/'results'/'gpu')
    args.workers = args.workers or (1 if args.tiny else min(6, os.cpu_count() or 1))
    args.archs = ['resnet18'] if args.tiny else ['resnet18', 'resnet50']
    f = Figures(args)
    for name in args.parts.split(','):
        try: parts[name](f)
        except Exception as e: f.add(name, 'failed', f'{type(e).__name__}: {e}'.splitlines()[0]); traceback.print_exc()
    f.add('all', 'seconds', round(time.monotonic()-begun, 1), f'≤ {60*args.minutes:g}')

if __name__ == '__main__': main()
