"Tables and figures from the JSON lines in this folder: python results/make.py"
import re
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np
from fasterprune.experiments import Results, by_label, paired, plot_accuracy, plot_params, row_label, summarize, write_report

here = Path(__file__).parent

def rows(name): return Results(here/name).rows() if (here/name/'results.jsonl').exists() else []

def save(plot, rows, file, **size):
    ax = plt.subplots(**size)[1]
    plot(rows, ax)
    ax.figure.savefig(file, dpi=120, bbox_inches='tight', facecolor='white')
    plt.close(ax.figure)

def heading(rows):
    "What the rows have in common, and what not"
    keys = ('data', 'images', 'size', 'arch', 'epochs', 'bs', 'lr', 'augment', 'granularity', 'device')
    return ', '.join(f"{k} {'/'.join(map(str, sorted({r.get(k) for r in rows if r.get(k) is not None})))}" for k in keys) + f", seeds {', '.join(map(str, sorted({r['seed'] for r in rows})))}"

def quick():
    "All schedules, locally; then the contexts"
    every = rows('quick')
    dense,local = ([r for r in every if (r['schedule'] == 'dense') == d and r['context'] == 'local'] for d in (True, False))
    write_report(dense+local, here/'quick', heading(dense+local), times=False)
    names = {r['schedule'] for r in every if r['context'] != 'local'}
    some = dense + [r for r in every if r['schedule'] in names]
    if not names: return
    best = next(iter(by_label(some, .95)))
    (here/'quick'/'contexts.md').write_text(f'{heading(some)}\n\n{summarize(some, False)}\n\n{paired(some, best)}\n')
    save(plot_accuracy, some, here/'quick'/'contexts.png', figsize=(7, 1.2+.3*len({row_label(r) for r in some})))

def params():
    if every := rows('params'):
        (here/'params'/'table.md').write_text(f'{heading(every)}\n\n{summarize(every, False)}\n')
        save(plot_params, every, here/'params'/'params.png', figsize=(7, 3))

def advice():
    "The advised recipe against the paper's own settings, one change after the other, on seeds that nothing was chosen by"
    every = [dict(r, schedule=f"{r['schedule']}, lr {r['lr']:g}" if r['schedule'] != 'dense' else 'dense') for r in rows('advice')]
    if not every: return
    text = [heading(every)]
    dense = {}
    for r in every:
        if r['schedule'] == 'dense': dense.setdefault(r['lr'], {})[r['seed']] = 100*r['accuracy']
    text.append('\n'.join(f"Dense at lr {lr:g}: {np.mean(list(a.values())):.2f} ± {np.std(list(a.values()), ddof=1):.2f} % ({len(a)} seeds)." for lr,a in sorted(dense.items())))
    pruned = [r for r in every if r['schedule'] != 'dense']
    text += [summarize(pruned, False), paired(pruned, 'onecycle, lr 0.01 lamp')]
    (here/'advice'/'table.md').write_text('\n\n'.join(text)+'\n')

def readme():
    "Put the tables where README.md names their files"
    def table(m): return f"<!-- {m[1]} -->\n{(here/m[1]).read_text().partition(chr(10))[2].strip()}\n<!-- end -->"
    text = (here/'README.md').read_text()
    (here/'README.md').write_text(re.sub(r'<!-- (\S+\.md) -->.*?<!-- end -->', table, text, flags=re.S))

if __name__ == '__main__': quick(); params(); advice(); readme()
