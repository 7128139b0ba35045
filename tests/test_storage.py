"Small files: nothing is lost, nothing is believed, nothing is left half done."
import copy, hashlib, json, os, pickle, random, stat, struct, subprocess, sys, threading, tracemalloc
import numpy as np, pytest, torch, zstandard
from collections import OrderedDict
from pathlib import Path
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load as load_arrays, save as save_arrays
from torch import nn
from fasterprune.all import *
from fasterprune.packing import *
from fasterprune.storage import _head, _mark, _name, pack_state, unpack_state
from conftest import conv_net, fit

def bits(t): return t.detach().resolve_conj().resolve_neg().flatten().clone().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
def same_bits(a, b): return list(a) == list(b) and all((a[k].dtype, a[k].shape, bits(a[k])) == (b[k].dtype, b[k].shape, bits(b[k])) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)

dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.complex128, torch.bool,
          torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]

@st.composite
def tensors(draw):
    dtype,shape = draw(st.sampled_from(dtypes)),draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 64]), max_size=3))
    n,rng = int(np.prod(shape)),np.random.default_rng(draw(st.integers(0, 10**6)))
    raw = rng.integers(0, 256, n*dtype.itemsize, dtype=np.uint8) # any bits at all: NaN payloads, subnormals, infinities
    if dtype == torch.bool: raw %= 2
    words = raw.reshape(n, dtype.itemsize)
    words[rng.random(n) < draw(st.sampled_from([0, .5, .9, .999, 1]))] = 0
    if draw(st.booleans()) and dtype != torch.bool: words[rng.random(n) < .3] = [0]*(dtype.itemsize-1) + [128] # -0.0
    t = torch.from_numpy(words.reshape(-1)).view(dtype).reshape(shape)
    if t.ndim > 1 and draw(st.booleans()): t = t.transpose(0, 1) # not contiguous
    if t.ndim > 0 and draw(st.booleans()): t = t[::2]
    if dtype.is_complex and draw(st.booleans()): t = t.conj()
    return t

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=['Cs'])), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5)
states = st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), max_size=8), tensors() | values, max_size=5)

patient = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow]) # a busy machine, and Hypothesis without its files, are no faults of ours

@settings(max_examples=200, **patient)
@given(states)
def test_nothing_is_lost(state):
    back = unpack_state(pack_state(state))
    assert same_bits(state, back)

@settings(max_examples=50, **patient)
@given(st.lists(st.integers(0, 3000), unique=True))
def test_gaps_round_trip(places):
    places = np.array(sorted(places), dtype=np.int64)
    assert unpack_gaps(pack_gaps(places)).tolist() == places.tolist()

def test_zeros_with_a_sign_cost_one_bit_and_plain_ones_none():
    torch.manual_seed(0)
    w = torch.randn(200_000); w[torch.rand(len(w)) < .9] = 0.
    plain,signed = len(pack_state({'w': w})),len(pack_state({'w': torch.where(w == 0, torch.randn(len(w)).sign()*0., w)}))
    assert plain*8/len(w) < entropy_bound(.9) and 0 < (signed-plain)*8/len(w) < 1.2

def test_a_training_ends_with_plain_zeros(learner):
    learn = learner(); fit(learn, cbs=SparsifyCallback(.8))
    for m in learn.model.modules():
        if isinstance(m, nn.Conv2d): assert (m.weight == 0).float().mean() > .7 and not torch.signbit(m.weight[m.weight == 0]).any()

@pytest.mark.parametrize('sparsity', [0., .5, .8, .9, .99])
@pytest.mark.parametrize('granularity', ['weight', 'filter', 'kernel'])
def test_within_the_bound(sparsity, granularity):
    torch.manual_seed(0); m = nn.Sequential(nn.Conv2d(64, 128, 3, bias=False), nn.Conv2d(128, 128, 3, bias=False))
    r = Sparsifier(m, granularity).sparsify(sparsity)
    assert len(pack_state(m.state_dict()))*8 < 1.05*sum(row[2]*entropy_bound(row[3]/row[2]) for row in r.rows) + 8*1000

def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(300, 300),nn.Linear(300, 300); self.b.weight = self.a.weight
    torch.manual_seed(0); m,other = Tied(),Tied()
    assert save_sparse(m, tmp_path/'f') < 1.1*300*300*4
    load_sparse(tmp_path/'f', other)
    assert other.a.weight is other.b.weight and torch.equal(m.a.weight, other.a.weight)

def test_the_container_is_what_it_says():
    m = conv_net(); data = pack_state(m.state_dict())
    raw = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read() # as the tool `zstd -d` does, which skips our header
    arrays = load_arrays(raw)
    assert {k.split(':', 1)[1] for k in arrays} == set(m.state_dict()) and all(a.dtype == np.uint8 for a in arrays.values())

# files that are not right

def sealed(raw, version=1, size=None, frame=None):
    "A file with a right checksum, whatever is in it"
    head = _head.pack(_mark, _head.size-8+32, _name, version, len(raw) if size is None else size)
    frame = zstandard.ZstdCompressor(level=1).compress(raw) if frame is None else frame
    return head + hashlib.sha256(head+frame).digest() + frame

def container(entries, arrays=None): return save_arrays(arrays or {}, {'fasterprune': entries if isinstance(entries, str) else json.dumps(entries)})

@pytest.mark.fault
def test_thousands_of_mutations():
    torch.manual_seed(0); m = conv_net(); Sparsifier(m).sparsify(.9)
    data,rnd = pack_state(m.state_dict()),random.Random(0)
    for _ in range(4000):
        d = bytearray(data); how = rnd.randrange(5)
        if how == 0: d[rnd.randrange(len(d))] ^= 1 << rnd.randrange(8)
        elif how == 1: d = d[:rnd.randrange(len(d))]
        elif how == 2: i = rnd.randrange(len(d)); d[i:i+rnd.randrange(1, 50)] = rnd.randbytes(rnd.randrange(50))
        elif how == 3: d += rnd.randbytes(rnd.randrange(1, 50))
        else: i,j = sorted(rnd.sample(range(len(d)), 2)); d[i:j] = d[i:j][::-1]
        if d == data: continue
        with pytest.raises(ValueError): unpack_state(bytes(d))

@pytest.mark.fault
def test_thousands_of_mutations_behind_a_right_checksum():
    "Someone who can compute checksums can store any weights, but not make the reader do more than raise a ValueError"
    torch.manual_seed(0); m = conv_net(); Sparsifier(m).sparsify(.9)
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(pack_state(m.state_dict())[_head.size+32:])
    frame,rnd,read = pack_state(m.state_dict())[_head.size+32:],random.Random(1),0
    for k in range(4000):
        d = bytearray(raw if k % 2 else frame); i = rnd.randrange(min(len(d), rnd.choice([64, 4000, 10**9])))
        d[i:i+rnd.randrange(3)] = rnd.randbytes(rnd.randrange(3)) if rnd.random() < .5 else rnd.choice([b'0', b'9', b'-1', b'"', b'[', b'{}', b'null', b'1e9', b'float64', b'gaps'])
        try: state = unpack_state(sealed(bytes(d)) if k % 2 else sealed(b'', size=len(raw), frame=bytes(d)), limit=10**6)
        except ValueError: continue
        read += 1
        assert all(isinstance(t, (torch.Tensor, int, float, str, bool, list, dict, type(None))) for t in state.values())
    assert read < 4000

f32 = dict(dtype='float32', shape=[4])
u8 = lambda *shape: np.ones(shape, np.uint8)
wrong = {
    'no values': container({'a': f32}), 'too few values': container({'a': f32}, {'values:a': u8(4, 3)}), 'values of another size': container({'a': f32}, {'values:a': u8(8, 4)}),
    'flat values': container({'a': f32}, {'values:a': u8(16)}), 'floats': container({'a': f32}, {'values:a': np.ones((4, 4), np.float32)}),
    'gap too far': container({'a': f32}, {'values:a': u8(4, 1), 'gaps:a': np.array([4], np.uint8)}), 'more gaps than values': container({'a': f32}, {'values:a': u8(4, 1), 'gaps:a': u8(2)}),
    'mask too short': container({'a': f32}, {'values:a': u8(4, 1), 'bits:a': u8(0)}), 'mask of more': container({'a': f32}, {'values:a': u8(4, 1), 'bits:a': np.array([255], np.uint8)}),
    'signs too long': container({'a': f32}, {'values:a': u8(4, 1), 'gaps:a': np.zeros(1, np.uint8), 'signs:a': u8(9)}),
    'negative shape': container({'a': dict(dtype='float32', shape=[-1])}), 'broken shape': container({'a': dict(dtype='float32', shape=[.5])}), 'no shape': container({'a': dict(dtype='float32', shape='4')}),
    'overflowing shape': container({'a': dict(dtype='float32', shape=[2**62, 2**62])}), 'unknown type': container({'a': dict(dtype='float33', shape=[4])}), 'code for a type': container({'a': dict(dtype='load', shape=[4])}),
    'same as nothing': container({'a': dict(same='b')}), 'same as itself': container({'a': dict(same='a')}), 'array of nobody': container({}, {'values:a': u8(4, 4)}), 'nameless array': container({}, {'a': u8(4, 4)}),
    'not JSON': container('{'), 'a list': container([]), 'deep JSON': container('['*100_000), 'no metadata': save_arrays({'a': u8(2)}), 'not a container': b'hello', 'nothing': b'',
}

@pytest.mark.bad_input
@pytest.mark.parametrize('name', wrong)
def test_a_right_checksum_on_wrong_content(name):
    with pytest.raises(ValueError): unpack_state(sealed(wrong[name]), limit=10**6)

@pytest.mark.bad_input
@pytest.mark.parametrize('change,text', [
    (lambda d: b'', 'it is empty'), (lambda d: pickle.dumps({}), 'not a file that save_sparse wrote'), (lambda d: b'PK\x03\x04' + d, 'looks like one of torch.save'), (lambda d: d[:30], 'not a file that save_sparse wrote'),
    (lambda d: d[:100], 'was the file cut off'), (lambda d: d + b'x', 'was the file cut off'), (lambda d: d[:19] + b'\x02' + d[20:], 'install a newer one')])
def test_files_that_are_not_right(tmp_path, change, text):
    m = conv_net(); save_sparse(m, tmp_path/'f'); before = copy.deepcopy(m.state_dict())
    (tmp_path/'f').write_bytes(change((tmp_path/'f').read_bytes()))
    with pytest.raises(ValueError, match=text): load_sparse(tmp_path/'f', m)
    assert same_bits(before, m.state_dict())

@pytest.mark.fault
def test_a_bomb_is_not_unpacked():
    small = zstandard.ZstdCompressor().compress(b'\0'*10**8)
    assert len(small) < 20_000
    with pytest.raises(ValueError, match='100,000,000 bytes, and 1,000 are expected'): unpack_state(sealed(b'', size=10**8, frame=small), limit=1000)
    with pytest.raises(ValueError, match='two sizes'): unpack_state(sealed(b'', size=10, frame=small), limit=1000) # a header that lies
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(b'\0'*10**8)
    with pytest.raises(ValueError): unpack_state(sealed(b'', size=1000, frame=nameless), limit=1000)
    wide = container({'a': dict(dtype='complex128', shape=[10**9])}, {'values:a': u8(8, 0), 'gaps:a': u8(0)}) # nothing in it, and 16 GB to make
    with pytest.raises(ValueError, match='16,000,000,000 bytes'): unpack_state(sealed(wide), limit=10**6)

@pytest.mark.fault
def test_a_small_file_takes_little_memory(tmp_path):
    "Whatever a right checksum is put on: a few megabytes at the most, as the model has only a few kilobytes"
    m = Extra({'steps': 1}); state = m.state_dict()
    entries = {k: dict(dtype='float32', shape=list(t.shape)) for k,t in state.items() if k != '_extra_state'}
    values = {f'values:{k}': np.zeros((4, state[k].numel()), np.uint8) for k in entries}
    def with_extra(text): return container(json.dumps(entries)[:-1] + ', "_extra_state": {"json": ' + text + '}}', values)
    bombs = dict(gaps=container(entries, values | {'gaps:lin.weight': np.full(10**7, 255, np.uint8)}), shape=container(entries | {'lin.weight': dict(dtype='float64', shape=[10**9])}, values),
                 wide=with_extra('[' + '[[]],'*10**6 + '0]'), deep=with_extra('['*10**5 + ']'*10**5), many=container({f'k{i}': {'json': 0} for i in range(10**4)}))
    before = copy.deepcopy(state)
    for name,raw in bombs.items():
        (tmp_path/'f').write_bytes(sealed(raw)); size = (tmp_path/'f').stat().st_size
        tracemalloc.start()
        try:
            with pytest.raises(ValueError): load_sparse(tmp_path/'f', m)
            assert tracemalloc.get_traced_memory()[1] < 40e6 + 3*size, name
        finally: tracemalloc.stop()
    assert same_bits(before, m.state_dict())

def test_an_entry_of_two_kinds_is_none(tmp_path):
    m = nn.Linear(1, 4, bias=False)
    with pytest.raises(ValueError, match='unknown kind'): unpack_state(sealed(container({'weight': dict(dtype='float32', shape=[4, 1], json=[1])}, {'values:weight': u8(4, 4)})))

@pytest.mark.fault
@pytest.mark.skipif(sys.platform == 'win32', reason='files have no limit there')
def test_a_file_that_cannot_grow_any_more_leaves_the_old_one(tmp_path):
    code = f"""
import resource, signal
from torch import nn
from fasterprune.storage import save_sparse
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try: save_sparse(nn.Conv2d(32, 32, 3), {str(tmp_path/'f')!r})
except OSError as e: print(e.errno)
"""
    (tmp_path/'f').write_bytes(b'old')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120).stdout
    assert out.split() == ['27'] and os.listdir(tmp_path) == ['f'] and (tmp_path/'f').read_bytes() == b'old'

class Extra(nn.Module):
    def __init__(self, extra, fails=False): super().__init__(); self.lin,self.z,self.extra,self.fails = nn.Linear(3, 3),nn.Linear(3, 3),extra,fails
    def get_extra_state(self): return self.extra
    def set_extra_state(self, extra):
        if self.fails: self.fails = False; raise RuntimeError('not today')
        self.extra = extra

def test_extra_state_is_stored_if_JSON_knows_it(tmp_path):
    a,b = Extra({'steps': [1, 2.5, None, 'ü']}),Extra({})
    save_sparse(a, tmp_path/'f'); load_sparse(tmp_path/'f', b)
    assert a.extra == b.extra and same_bits(a.state_dict(), b.state_dict())
    for bad in ({1, 2}, {1: 2}, (1, 2), float('nan'), object()):
        with pytest.raises(TypeError, match="'_extra_state'"): save_sparse(Extra(bad), tmp_path/'g')
    assert os.listdir(tmp_path) == ['f']

@pytest.mark.fault
def test_an_error_in_the_middle_of_loading_leaves_the_model_as_it_was(tmp_path):
    save_sparse(Extra(1), tmp_path/'f')
    m = Extra(2, fails=True); before = copy.deepcopy(m.state_dict())
    with pytest.raises(RuntimeError, match='not today'): load_sparse(tmp_path/'f', m)
    assert same_bits(before, m.state_dict())

@pytest.mark.bad_input
@pytest.mark.parametrize('make,text', [
    (lambda: conv_net(12), r'0.weight is float32 of shape \(8, 4, 3, 3\) in the file and float32 of shape \(12, 4, 3, 3\) in the model'), (lambda: conv_net().half(), 'convert the model first'),
    (lambda: nn.Sequential(*conv_net(), nn.Linear(3, 3)), 'it has no 11.weight, 11.bias'), (lambda: conv_net()[:-1], 'it has 10.bias, 10.weight, which the model lacks')])
def test_models_that_do_not_fit(tmp_path, make, text):
    save_sparse(conv_net(), tmp_path/'f'); m = make(); before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=text): load_sparse(tmp_path/'f', m)
    assert same_bits(before, m.state_dict())

@pytest.mark.bad_input
@pytest.mark.parametrize('part', ['all', 'some'])
def test_a_model_without_memory_is_not_said_to_be_loaded(tmp_path, part):
    "load_state_dict warns, does nothing and returns"
    save_sparse(conv_net(), tmp_path/'f'); m = conv_net(); before = m[1].weight.clone()
    (m if part == 'all' else m[0]).to('meta')
    with pytest.raises(ValueError, match=r"no memory for 0.weight.*to_empty"): load_sparse(tmp_path/'f', m)
    if part == 'some': assert torch.equal(m[1].weight, before)
    m = m.to_empty(device='cpu'); load_sparse(tmp_path/'f', m); save_sparse(m, tmp_path/'g')
    assert (tmp_path/'f').read_bytes() == (tmp_path/'g').read_bytes()

class MaybeTied(nn.Module):
    def __init__(self, tied):
        super().__init__(); self.a,self.b = nn.Linear(3, 3, bias=False),nn.Linear(3, 3, bias=False)
        if tied: self.b.weight = self.a.weight

@pytest.mark.bad_input
def test_two_values_for_one_tensor_are_not_loaded(tmp_path):
    "One of the two would be lost"
    a,b = MaybeTied(False),MaybeTied(True); before = b.a.weight.clone(); save_sparse(a, tmp_path/'f')
    with pytest.raises(ValueError, match='a.weight and b.weight are different in the file and one tensor in the model'): load_sparse(tmp_path/'f', b)
    assert torch.equal(b.a.weight, before)
    with torch.no_grad(): a.a.weight[0, 0] = float('nan'); a.b.weight.copy_(a.a.weight)
    save_sparse(a, tmp_path/'f'); load_sparse(tmp_path/'f', b); assert same_bits(a.state_dict(), b.state_dict()) # equal values may be tied

@pytest.mark.bad_input
@pytest.mark.parametrize('t', [torch.eye(3).to_sparse(), torch.empty(3, device='meta'), torch.quantize_per_tensor(torch.ones(3), .1, 0, torch.qint8)], ids=['sparse', 'meta', 'quantized'])
def test_tensors_that_cannot_be_stored(t):
    with pytest.raises(TypeError, match="the entry 'odd' of the state dict"): pack_state({'odd': t})

def test_wrapped_models_are_the_models_in_them(tmp_path, learner):
    learn = learner(); other = conv_net()
    save_sparse(nn.DataParallel(learn.model), tmp_path/'a'); load_sparse(tmp_path/'a', torch.compile(other))
    assert same_bits(learn.model.state_dict(), other.state_dict())
    save_sparse(other, tmp_path/'b'); assert load_sparse(tmp_path/'b', learn) is learn
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes() # and the same model gives the same file

def test_a_model_with_all_that_modules_have(tmp_path):
    "Half precision, channels last, integers, a buffer without elements, an attribute called `model`, a parameter that is not trained"
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last).bfloat16(); self.alone = nn.Parameter(torch.randn(()), requires_grad=False)
            self.register_buffer('none', torch.zeros(0)); self.register_buffer('ids', torch.arange(5)); self.register_buffer('hidden', torch.ones(3), persistent=False)
    a,b = Odd(),Odd()
    save_sparse(a, tmp_path/'f'); load_sparse(tmp_path/'f', b)
    assert same_bits(a.state_dict(), b.state_dict()) and b.model.weight.is_contiguous(memory_format=torch.channels_last) and not b.alone.requires_grad

@pytest.mark.fault
def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    m = conv_net(); save_sparse(m, tmp_path/'f'); old = (tmp_path/'f').read_bytes()
    def full(*args): raise OSError(28, 'No space left on device')
    for broken in ('fsync', 'replace'):
        with monkeypatch.context() as mp:
            mp.setattr(os, broken, full)
            with pytest.raises(OSError): save_sparse(conv_net(4), tmp_path/'f')
        assert os.listdir(tmp_path) == ['f'] and (tmp_path/'f').read_bytes() == old
    with pytest.raises(FileNotFoundError): save_sparse(m, tmp_path/'nowhere'/'f')
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'nofile', m)

@pytest.mark.fault
@pytest.mark.skipif(sys.platform == 'win32', reason='no pipes with a name there')
def test_a_pipe_stays_a_pipe(tmp_path):
    "As does a device: a file in the place of /dev/null would break the machine"
    os.mkfifo(tmp_path/'pipe'); m,got = conv_net(),[]; save_sparse(m, tmp_path/'f')
    reader = threading.Thread(target=lambda: got.append((tmp_path/'pipe').read_bytes()), daemon=True); reader.start()
    save_sparse(m, tmp_path/'pipe'); assert stat.S_ISFIFO(os.stat(tmp_path/'pipe').st_mode)
    reader.join(60); assert got == [(tmp_path/'f').read_bytes()]
    assert sorted(os.listdir(tmp_path)) == ['f', 'pipe']

def test_the_file_has_usual_permissions_and_links_are_followed(tmp_path):
    m = conv_net(); save_sparse(m, tmp_path/'f'); (tmp_path/'usual').write_text('')
    assert (tmp_path/'f').stat().st_mode == (tmp_path/'usual').stat().st_mode
    os.symlink(tmp_path/'f', tmp_path/'link'); save_sparse(conv_net(4), tmp_path/'link')
    assert (tmp_path/'link').is_symlink() and load_sparse(tmp_path/'f', conv_net(4))

def test_nothing_of_pickle_or_fastai_is_needed():
    code = "import sys, pickle; pickle.loads = pickle.load = pickle.dumps = pickle.dump = None\nimport fasterprune.storage as s, torch; d = s.unpack_state(s.pack_state({'a': torch.eye(3)})); assert (d['a'] == torch.eye(3)).all(); print('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'

@pytest.mark.parametrize('of', [lambda f: f, str, lambda f: f.resolve(), lambda f: str(f.resolve()).removesuffix('.safetensors.zst'), lambda f: 'sub/net',
                                lambda f: 'sub/net.safetensors.zst'], ids=['returned', 'text', 'absolute', 'without ending', 'name', 'name with ending'])
@pytest.mark.parametrize('home', ['absolute', 'relative'])
def test_a_learner_reads_what_it_says_it_has_written(learner, tmp_path, monkeypatch, of, home):
    monkeypatch.chdir(tmp_path)
    learn = learner()
    if home == 'relative': learn.path = Path('.')
    file = learn.save_sparse('sub/net')
    assert file.is_file() and file.parent.name == 'sub'
    before = [p.clone() for p in learn.model.parameters()]
    with torch.no_grad(): learn.model[0].weight += 1
    learn.load_sparse(of(file))
    assert all(map(torch.equal, before, learn.model.parameters()))
    assert learn.save_sparse(of(file)).resolve() == file.resolve() and len(list(tmp_path.rglob('*.zst'))) == 1
