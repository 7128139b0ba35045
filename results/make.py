"Tables and figures from the JSON lines in this folder: python results/make.py"
import re
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from fasterprune.experiments.pictures import markdown, plot_accuracy, plot_curves, plot_params, write_report
from fasterprune.experiments.results import Results
from fasterprune.experiments.summary import by_label, levels, paired, summarize

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
    values = {k: '/'.join(map(str, sorted({r.get(k) for r in rows if r.get(k) is not None}))) for k in keys}
    seeds = ', '.join(map(str, sorted({r['seed'] for r in rows})))
    return ', '.join(f'{k} {v}' for k,v in values.items()) + f', seeds {seeds}'

def report(rows, reference=None): return '\n\n'.join([heading(rows), markdown(summarize(rows, False)), markdown(paired(rows, reference))]) + '\n'

def usual(r):
    "Not one-cycle with other contexts, nor fasterai, which has no LAMP: they are in a table of their own"
    return r['schedule'] not in ('onecycle', 'fasterai') or r['context'] == 'lamp'

def quick():
    "Schedules and rivals, each with its own context or LAMP; then one-cycle with each context"
    every = rows('quick')
    write_report([r for r in every if usual(r)], here/'quick', heading(every), 'onecycle_log', times=False)
    save(plot_curves, [r for r in every if usual(r) and r['sparsity'] in (0., .95)], here/'quick'/'sparsity.png', figsize=(8, 4))
    some = [r for r in every if r['schedule'] in ('dense', 'onecycle', 'onecycle_log', 'fasterai') and r['sparsity'] in (0., .95, .98)]
    (here/'quick'/'contexts.md').write_text(report(some, 'onecycle_log lamp'))
    save(plot_accuracy, some, here/'quick'/'contexts.png', figsize=(7, 3.6))

def params():
    every = rows('params')
    (here/'params'/'table.md').write_text(f'{heading(every)}\n\n{markdown(summarize(every, False))}\n')
    save(plot_params, every, here/'params'/'params.png', figsize=(7, 3))

methods = dict(dense='dense', straight='ours, straight through', onecycle_log='ours', onecycle='one-cycle (paper)', agp80='AGP to 80 %', agp='AGP', oneshot='one-shot', iterative='iterative')

def paper_row(arch, data, sparsity, seed, rows):
    "Accuracies of one start in one cell of the paper's table, the best pruned one in bold, and two ranks"
    found = {r['schedule']: 100*r['accuracy'] for r in rows if r['seed'] == seed and r['sparsity'] in (0., sparsity)}
    cells = {m: f'{found[m]:.1f}' if m in found else '' for m in methods}
    ranked = sorted((m for m in found if m != 'dense'), key=found.get, reverse=True)
    cells[ranked[0]] = f'**{cells[ranked[0]]}**'
    ranked = [m for m in ranked if m != 'straight'] # it costs more than the others
    ranks = [f'{ranked.index(m)+1} of {len(ranked)}' if len(ranked) == 6 else '' for m in ('onecycle_log', 'onecycle')]
    return f'| {arch} | {data} | {sparsity:.0%} | {seed} | ' + ' | '.join([*cells.values(), *ranks]) + ' |'

def paper():
    "A row for each network, data set, sparsity and start"
    every = [r for r in rows('paper') if r['precision'] == 'bf16']
    head = ['network', 'data', 'sparsity', 'seed', *methods.values(), 'rank of ours', "rank of the paper's"]
    lines = [heading(every), '', f"| {' | '.join(head)} |", f"|{'|'.join(['---']*len(head))}|"]
    for arch,data in sorted({(r['arch'], r['data']) for r in every}):
        mine = [r for r in every if (r['arch'], r['data']) == (arch, data)]
        lines += [paper_row(arch, data, *cell, mine) for cell in sorted({(r['sparsity'], r['seed']) for r in mine if r['sparsity']})]
    (here/'paper'/'table.md').write_text('\n'.join(lines) + '\n')

def others():
    "Folders that need no more than the usual report: digits, the multiplicative step"
    for folder in sorted(f.parent for f in here.glob('*/results.jsonl')):
        if folder.name in ('quick', 'params', 'tickets', 'paper'): continue
        every = rows(folder.name)
        write_report(every, folder, heading(every), reference(every), times=False)

def reference(rows):
    "The default among the contestants"
    labels = [l for s in levels(rows) for l in by_label(rows, s)]
    return next((l for l in labels if l.startswith('onecycle_log')), None)

def readme():
    "Put the tables where README.md names their files"
    def table(m): return f"<!-- {m[1]} -->\n{(here/m[1]).read_text().partition(chr(10))[2].strip()}\n<!-- end -->"
    text = (here/'README.md').read_text()
    (here/'README.md').write_text(re.sub(r'<!-- (\S+\.md) -->.*?<!-- end -->', table, text, flags=re.S))

if __name__ == '__main__': quick(); params(); paper(); others(); readme()
