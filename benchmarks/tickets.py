"""Whose lottery tickets are the best? Tickets found along each schedule, rewound, trained by themselves: python benchmarks/tickets.py

Each finder gets one round of training; `imp x3` gets three, each pruning as much of what is left. A ticket is then trained on the budget of one round,
on the same batches as the dense network of the same seed. Beside the finders stand the controls: one-cycle's masks shuffled within the layers, and one-cycle's masks with
other first weights. It can be stopped at any time. `--recipe quick` and `--recipe paper` are the comparison on CIFAR-10, the latter for a GPU."""
from pathlib import Path
from datetime import datetime, timezone
import numpy as np
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, default_device, set_seed
from fastcore.script import call_parse
from fasterprune.experiments.baselines import find_schedule
from fasterprune.experiments.data import load_data
from fasterprune.experiments.keys import run_key, versions
from fasterprune.experiments.models import make_model
from fasterprune.experiments.pictures import markdown
from fasterprune.experiments.plan import recipes
from fasterprune.experiments.results import Results
from fasterprune.experiments.summary import by_label, paired
from fasterprune.lottery import find_ticket, restarted, shuffled, train_ticket
from fasterprune.schedules import sched_imp
from fasterprune.sparsity import measured_sparsity

finders = dict(imp=sched_imp) | {n: find_schedule(n) for n in ('oneshot', 'agp', 'cosine70', 'onecycle')}
contestants = ('dense', *finders, 'imp x3', 'onecycle shuffled', 'onecycle restarted')

def learner(dls, arch, seed):
    set_seed(seed, reproducible=True)
    return Learner(dls, make_model(arch, dls.train.x.shape[1], dls.c), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def score(learn): return dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))['accuracy']

def run(name, dls, arch, epochs, lr, sparsity, rewind, seed):
    "From a new network to the accuracy of its trained ticket"
    learn = learner(dls, arch, seed)
    with learn.no_bar(), learn.no_logging():
        if name == 'dense':
            for dl in dls.loaders: dl.rng.seed(seed)
            set_seed(seed, reproducible=True)
            learn.fit_one_cycle(epochs, lr)
            found = score(learn)
        else:
            finder,_,how = name.partition(' ')
            ticket = find_ticket(learn, epochs, lr, sparsity, rounds=3 if how == 'x3' else 1, rewind_epoch=rewind, schedule=finders[finder], seed=seed)
            found = score(learn)
            if how == 'shuffled': ticket = shuffled(ticket, seed)
            if how == 'restarted': ticket = restarted(ticket, learner(dls, arch, seed+1000).model)
            train_ticket(learn, ticket, epochs, lr, seed=seed)
    s = measured_sparsity(learn.model)
    return dict(accuracy=float(score(learn)), accuracy_found=float(found), measured=float(s), zeros=s.zeros, weights=s.n)

def table(rows):
    lines = ['| ticket found by | accuracy when found (%) | accuracy of the ticket, trained (%) | minus dense, same seed (points) | sparsity measured (%) | seeds |', '|---|---:|---:|---:|---:|---:|']
    sd = lambda v: f'{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}' if len(v) > 1 else f'{np.mean(v):.2f}'
    dense = {r['seed']: r['accuracy'] for r in rows if r['schedule'] == 'dense'}
    if dense: lines.append(f"| dense, no ticket | | {sd([100*a for a in dense.values()])} | | 0.00 | {len(dense)} |")
    for name,g in by_label(rows, max(r['sparsity'] for r in rows)).items():
        lines.append(f"| {name} | {sd([100*r['accuracy_found'] for r in g])} | {sd([100*r['accuracy'] for r in g])} | {sd([100*(r['accuracy']-dense[r['seed']]) for r in g])} | {100*np.mean([r['measured'] for r in g]):.2f} | {len(g)} |")
    return '\n'.join(lines)

@call_parse
def main(
    recipe:str='digits', # Data, network and budget: digits, quick or paper
    path:str=None, # Folder with the data
    epochs:int=None, # Budget of a round; the recipe's if not given
    sparsity:float=0.95, # Of the tickets
    rewind:int=0, # Rewind to the end of so many epochs
    seeds:int=3, # How many
    device:str=None, # cpu or cuda; the best there is if not given
    out:Path=Path(__file__).parent.parent/'results'/'tickets', # Folder for results.jsonl and table.md
):
    "Compare the lottery tickets that the schedules find."
    c = recipes[recipe]
    epochs = epochs or c['epochs']
    results,dls = Results(out),None
    settings = dict(data=c['data'], arch=c['arch'], epochs=epochs, lr=c['lr'], bs=c['bs'], size=c['size'], images=c['images'], augment=c['augment'], rewind=rewind)
    todo = {}
    for seed in range(seeds):
        for name in contestants:
            row = dict(settings, schedule=name, sparsity=0. if name == 'dense' else sparsity, seed=seed)
            todo[run_key(row)] = row
    for key,row in todo.items():
        if key in {r['key'] for r in results.rows()}: continue
        if dls is None: dls = load_data(c['data'], path, c['size'], c['bs'], None if c['arch'] == 'small' else 3, device or default_device(), c['augment'], c['images'])
        r = run(row['schedule'], dls, c['arch'], epochs, c['lr'], sparsity, rewind, row['seed'])
        results.add(dict(key=key, **row, **r, versions=versions(), device=str(dls.device), date=datetime.now(timezone.utc).strftime('%Y-%m-%d')))
        print(f"seed {row['seed']} {row['schedule']}: found {100*r['accuracy_found']:.2f} %, trained {100*r['accuracy']:.2f} %", flush=True)
    rows = [r for r in results.rows() if r['key'] in todo]
    heading = f"{c['data']}, {c['arch']}, {epochs} epochs a round, lr {c['lr']:g}, rewound to epoch {rewind}, sparsity {sparsity:g}; {rows[0]['device']}, {rows[0]['date']}"
    text = f'{heading}\n\n{table(rows)}\n\n{markdown(paired(rows))}\n'
    (Path(out)/f'table_rewind{rewind}.md').write_text(text)
    print(text)
