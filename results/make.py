"Tables and figures from the JSON lines in this folder: python results/make.py"
import re
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from fasterprune.experiments.pictures import markdown, plot_accuracy, plot_params, write_report
from fasterprune.experiments.results import Results
from fasterprune.experiments.summary import by_label, paired, summarize

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

def quick():
    "All schedules, locally; then the contexts"
    every = rows('quick')
    dense = [r for r in every if r['schedule'] == 'dense']
    local = dense + [r for r in every if r['schedule'] != 'dense' and r['context'] == 'local']
    write_report(local, here/'quick', heading(local), times=False)
    names = {r['schedule'] for r in every if r['context'] != 'local'}
    some = dense + [r for r in every if r['schedule'] in names]
    if not names: return
    labels = list(by_label(some, .95))
    (here/'quick'/'contexts.md').write_text(report(some, labels[0]))
    save(plot_accuracy, some, here/'quick'/'contexts.png', figsize=(7, 1.2+.3*len(labels)))

def params():
    every = rows('params')
    if not every: return
    (here/'params'/'table.md').write_text(f'{heading(every)}\n\n{markdown(summarize(every, False))}\n')
    save(plot_params, every, here/'params'/'params.png', figsize=(7, 3))

def advice():
    "The advised recipe against the paper's own settings, one change after the other, on seeds that nothing was chosen by"
    every = rows('advice')
    if every: (here/'advice'/'table.md').write_text(report(every, 'onecycle lr 0.01 lamp'))

def rivals():
    "Every rival in one table"
    every = rows('rivals')
    if every: write_report(every, here/'rivals', heading(every), times=False)

def readme():
    "Put the tables where README.md names their files"
    def table(m): return f"<!-- {m[1]} -->\n{(here/m[1]).read_text().partition(chr(10))[2].strip()}\n<!-- end -->"
    text = (here/'README.md').read_text()
    (here/'README.md').write_text(re.sub(r'<!-- (\S+\.md) -->.*?<!-- end -->', table, text, flags=re.S))

if __name__ == '__main__': quick(); params(); advice(); rivals(); readme()
