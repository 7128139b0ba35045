"""Does the training wait for its images? Time for the batches of an epoch, for the model's steps alone, and for both: python benchmarks/loading.py

The images are random: what they show makes no difference to the time. The model alone trains on one batch, again and again."""
import json, platform, time
from datetime import datetime, timezone
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from fastcore.script import call_parse
from fastai.vision.augment import aug_transforms
from fasterprune.experiments.batches import tensor_dls
from fasterprune.experiments.keys import versions
from fasterprune.experiments.models import make_model

def seconds(f, device):
    if device.type == 'cuda': torch.cuda.synchronize(device)
    start = time.perf_counter()
    f()
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return time.perf_counter()-start

def measure(arch, pixels, size, bs, augment, batches, rounds, device):
    "Median milliseconds a batch over interleaved rounds: loading alone, model alone, both"
    images = torch.randint(0, 256, (bs*batches, 3, pixels, pixels), dtype=torch.uint8), torch.randint(0, 10, (bs*batches,))
    dl = tensor_dls(images, images, bs=bs, pad=pixels//8 if augment == 'shift' else 0, flip=augment == 'shift', size=size, device=device, tfms=aug_transforms() if augment == 'fastai' else ()).train
    model = make_model(arch, 3, 10).to(device).train()
    opt = torch.optim.Adam(model.parameters(), fused=device.type == 'cuda')
    def step(x, y):
        opt.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    def load():
        for b in dl: pass
    def both():
        for x,y in dl: step(x, y)
    fixed = next(iter(dl))
    def alone():
        for _ in range(batches): step(*fixed)
    for f in (load, alone): f() # warm up
    times = np.median([[seconds(f, device) for f in (load, alone, both)] for _ in range(rounds)], axis=0)*1e3/batches
    return dict(arch=arch, pixels=pixels, size=size, bs=bs, augment=augment, load=times[0], model=times[1], both=times[2])

@call_parse
def main(
    device:str='cpu', # cpu or cuda
    batches:int=20, # Batches in an epoch
    rounds:int=5, # Epochs measured
    out:Path=Path(__file__).parent/'results', # Folder for loading_DEVICE.json and .md
):
    "Time of loading and of the model, with the quick recipe, CIFAR's own 32 pixels, and (on a GPU) the paper's recipe."
    device = torch.device(device)
    cases = [('small', 16, 16, 64, 'shift'), ('small', 32, 32, 64, 'shift'), ('resnet18_32', 32, 32, 64, 'shift'), ('resnet18', 32, 224, 32, 'fastai')]
    if device.type == 'cpu': cases[-2:] = [('resnet18', 32, 32, 64, 'shift'), ('resnet18', 32, 64, 32, 'fastai')]
    rows = [measure(*c, batches, rounds, device) for c in cases]
    lines = ['| network | images, pixels | augmentation | batch | loading alone (ms) | model alone (ms) | both (ms) | loading / model |', '|---|---|---|---:|---:|---:|---:|---:|']
    for r in rows: lines.append(f"| {r['arch']} | {r['pixels']} → {r['size']} | {r['augment']} | {r['bs']} | {r['load']:.1f} | {r['model']:.1f} | {r['both']:.1f} | {r['load']/r['model']:.1%} |")
    info = dict(device=torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine(), threads=torch.get_num_threads(), versions=versions(), date=datetime.now(timezone.utc).strftime('%Y-%m-%d'))
    Path(out).mkdir(exist_ok=True); out = Path(out)
    (out/f'loading_{device.type}.json').write_text(json.dumps(dict(rows=rows, **info), indent=1))
    text = '\n'.join(lines)
    (out/f'loading_{device.type}.md').write_text(f"Milliseconds a batch, medians of {rounds} epochs of {batches} batches, {info['device']}, {info['threads']} thread(s), {info['date']}:\n\n{text}\n")
    print(text)
