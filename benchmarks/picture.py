"""The picture on the first page: accuracy against sparsity, drawn from the rows of benchmarks/defaults.py.

    python benchmarks/picture.py

Reads benchmarks/results/defaults/runs.jsonl and writes nbs/images/accuracy_sparsity.png."""
import argparse, json
from collections import defaultdict
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np

root = Path(__file__).parent.parent
ways = { # (method, context, schedule) to label, color and marker
    ('straight', 'lamp', 'agp80'): ('fasterprune, StraightThrough', 'C3', 'D'),
    ('ours', 'lamp', 'logonecycle'): ('fasterprune, defaults (LAMP)', 'C0', 'o'),
    ('ours', 'local', 'onecycle'): ("fasterprune, the paper's settings", 'C1', 's'),
    ('fasterai', 'local', 'onecycle'): ('fasterai 0.4.1, as in its documentation', 'C2', '^')}

def fits(row, first_seed):
    "Single weights at 16 pixels, nothing extra, and a seed that chose nothing"
    plain = row['granularity'] == 'weight' and not row['extra'] and row['criteria'] in ('', 'magnitude')
    return plain and row['seed'] >= first_seed and (row['size'], row['images'], row['epochs']) == (16, 6000, 8)

def read(file, first_seed=10):
    "From way to sparsity to accuracies by seed, in percent, and the dense ones"
    pruned,dense = defaultdict(lambda: defaultdict(dict)),{}
    for row in map(json.loads, file.read_text().splitlines()):
        if not fits(row, first_seed): continue
        if row['method'] == 'dense': dense.setdefault(row['seed'], 100*row['accuracy'])
        way = row['method'], row['context'], row['schedule']
        if way in ways: pruned[way][row['sparsity']].setdefault(row['seed'], 100*row['accuracy'])
    return pruned, dense

def mean_sd(values):
    v = np.array(list(values))
    return v.mean(), v.std(ddof=1) if len(v) > 1 else 0.

def draw_dense(ax, dense):
    m,sd = mean_sd(dense.values())
    ax.axhline(m, color='gray', ls='--', lw=1.2, label='dense')
    ax.axhspan(m-sd, m+sd, color='gray', alpha=.15, lw=0)

def draw(ax, by_sparsity, way, shift):
    "One line; its points stand a little apart from the others'"
    label,color,marker = ways[way]
    at = sorted(by_sparsity)
    means,sds = zip(*[mean_sd(by_sparsity[s].values()) for s in at])
    x = [place[s]+shift for s in at]
    ax.errorbar(x, means, sds, color=color, marker=marker, ms=5, capsize=3, lw=1.8, label=label)

levels = (.8, .9, .95, .98, .99)
place = {s: i for i,s in enumerate(levels)}

def table(pruned, dense):
    "The numbers of the picture, in Markdown"
    def cell(values): return '{:.1f} ± {:.1f} ({})'.format(*mean_sd(values), len(values)) if values else ''
    yield '| | ' + ' | '.join(f'{s:.0%}' for s in levels) + ' |'
    yield '|---|' + '---:|'*len(levels)
    yield '| dense | ' + ' | '.join([cell(dense.values())]*len(levels)) + ' |'
    for way,(label,*_) in ways.items(): yield f'| {label} | ' + ' | '.join(cell(pruned[way][s].values()) for s in levels) + ' |'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', type=Path, default=root/'benchmarks/results/defaults/runs.jsonl')
    p.add_argument('--out', type=Path, default=root/'nbs/images/accuracy_sparsity.png')
    args = p.parse_args()
    pruned,dense = read(args.rows)
    fig,ax = plt.subplots(figsize=(7.2, 4), layout='constrained')
    draw_dense(ax, dense)
    for i,way in enumerate(ways): draw(ax, pruned[way], way, .05*(i-1.5))
    ax.set_xticks(range(len(levels)), [f'{s:.0%}' for s in levels])
    ax.set(xlabel='sparsity: weights that are zero', ylabel='accuracy at the last epoch (%)')
    ax.grid(axis='y', alpha=.3)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, loc='lower left')
    fig.savefig(args.out, dpi=130)
    print('\n'.join(table(pruned, dense)))
