"""Networks that people use, trained sixty steps with half of their filters pruned, coupled, and cut: are the outputs the same?

    pip install timm
    OMP_NUM_THREADS=1 python benchmarks/models.py                    # all of them, two minutes each
    OMP_NUM_THREADS=1 python benchmarks/models.py densenet121 unet

Inputs are made: patches of noise whose brightness depends on the class, 64×64 pixels, batches of 8. Outputs are compared on some of them, on
noise in another range, and on a constant. Each network is a line of OUT/models.jsonl, written anew if it is run again; OUT/models.md is the table."""
import argparse, json, time, traceback, warnings
from datetime import date
from pathlib import Path
import torch, torchvision
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
import fastai.callback.schedule # gives the Learner its fit_one_cycle
from fasterprune.callback import SparsifyCallback
from fasterprune.surgery import shrink

n_out,size = 5,64

def of_timm(name, **kwargs):
    def make():
        import timm
        return timm.create_model(name, num_classes=n_out, **kwargs)
    return make

def resnet_with(attention):
    def make():
        from timm.models.resnet import BasicBlock, ResNet
        return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=n_out, block_args=dict(attn_layer=attention))
    return make

def of_torchvision(name, **kwargs): return lambda: torchvision.models.get_model(name, weights=None, num_classes=n_out, **kwargs)

def unet():
    from fastai.vision.all import DynamicUnet
    body = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
    return nn.Sequential(DynamicUnet(body, 8, (size, size)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))

class WithHeads(nn.Module):
    "A network with further heads in training: their sum"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        out = self.net(x)
        return out if isinstance(out, torch.Tensor) else sum(o for o in out if o is not None)

timm_names = '''ese_vovnet19b_dw ese_vovnet39b efficientnet_lite0 fbnetc_100 resnetv2_50 ghostnet_100 cspresnet50 res2net50_26w_4s skresnet18
    seresnet18 convmixer_768_32 hardcorenas_a regnetx_002 dpn48b nf_resnet26 repvgg_a0 convnext_atto dla34 hrnet_w18_small xception41'''.split()
networks = {n: of_timm(n) for n in timm_names} | dict(
    densenet121=of_torchvision('densenet121'), mixer_s32=of_timm('mixer_s32_224', img_size=size), resnet18_cbam=resnet_with('cbam'),
    resnet18_eca=resnet_with('eca'), shufflenet=of_torchvision('shufflenet_v2_x1_0'), mobilenet_v3=of_torchvision('mobilenet_v3_small'), unet=unet,
    googlenet=lambda: WithHeads(of_torchvision('googlenet', init_weights=True, aux_logits=True)()))

class TrainOnly(Callback):
    def before_validate(self): raise CancelValidException

def made_images(n=480):
    "Noise in two sizes, and a brightness that depends on the class"
    y = torch.randint(0, n_out, (n,))
    coarse = torch.randn(n, 3, size//4, size//4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return .5*coarse + .3*torch.randn(n, 3, 1, 1) + .3*y.view(-1, 1, 1, 1), y

def difference(a, b, x):
    "The largest relative difference of the outputs, on three kinds of inputs"
    kinds = (x[100:105], 20*torch.rand(2, 3, size, size)-3, torch.full((2, 3, size, size), 5.))
    with torch.no_grad(): pairs = [(a(i), b(i)) for i in kinds]
    return max(float((p-q).abs().max()/p.abs().max()) for p,q in pairs)

def run(name):
    set_seed(0)
    model,(x,y) = networks[name](),made_images()
    ds,head = TensorDataset(x, y),[n for n,m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == n_out]
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings(record=True) as told, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        prune = SparsifyCallback(.5, 'filter', coupled=True, layers=(nn.Conv2d, nn.Linear), exclude=head)
        learn.fit_one_cycle(1, 1e-3, cbs=[prune, TrainOnly()])
        begin = time.perf_counter()
        small = shrink(model, x[:2])
    seconds,diff = round(time.perf_counter()-begin, 1),difference(model.eval(), small.eval(), x)
    small.train()(x[:4]).sum().backward()
    size_of = lambda m: sum(p.numel() for p in m.parameters())
    return dict(name=name, parameters=size_of(model), left=size_of(small), difference=diff, seconds=seconds, date=str(date.today()),
                told=[str(w.message)[:200] for w in told if 'dense' in str(w.message)])

def table(rows):
    lines = ['| network | parameters, million | left after the cut | largest relative difference |', '|---|---:|---:|---:|']
    for r in rows: lines.append(f"| {r['name']} | {r['parameters']/1e6:.2f} | {r['left']/1e6:.2f} | " +
                                (r['error'] if 'error' in r else f"{r['difference']:.0e}") + ' |')
    return '\n'.join(lines) + '\n'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', default=list(networks)); p.add_argument('--out', default='benchmarks/results')
    args = p.parse_args()
    torch.set_num_threads(1)
    file = Path(args.out)/'models.jsonl'
    rows = {r['name']: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for name in args.names:
        try: rows[name] = run(name)
        except Exception as e:
            traceback.print_exc()
            rows[name] = dict(name=name, parameters=0, left=0, error=f'{type(e).__name__}: {e}'[:200])
        print(json.dumps(rows[name]), flush=True)
        file.write_text(''.join(json.dumps(r)+'\n' for r in rows.values()))
        (Path(args.out)/'models.md').write_text(table(rows.values()))
