"Lottery tickets: rounds, rewinding, what is kept, what survives."
import copy, os, re, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest, torch
from torch import nn
from fasterprune.criteria import magnitude
from fasterprune.lottery import Ticket, find_ticket, load_ticket, restarted, save_ticket, shuffled, train_ticket
from fasterprune.schedules import sched_agp, sched_between, sched_imp, sched_onecycle, sched_oneshot
from fasterprune.sparsifier import Sparsifier
from fasterprune.sparsity import measured_sparsity
from conftest import conv_net, fit, make_learner, same, state

def quietly(f, learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return f(learn, *args, **kwargs)

def zeros(model): return {n: (m.weight == 0) for n,m in model.named_modules() if isinstance(m, nn.Conv2d)}

@pytest.mark.parametrize('schedule', [sched_onecycle, sched_imp, sched_between(sched_oneshot, .4), sched_agp])
@pytest.mark.parametrize('context', ['local', 'global'])
def test_exact_in_each_round_and_rewound_to_the_beginning(learner, schedule, context):
    learn = learner()
    before = state(learn)
    ticket = quietly(find_ticket, learn, 2, 1e-2, sparsity=.8, rounds=2, schedule=schedule, context=context, seed=0)
    n = [m.numel() for m in ticket.masks.values()]
    dead = [int((~m).sum()) for m in ticket.masks.values()]
    assert dead == [round(.8*i) for i in n] if context == 'local' else sum(dead) == round(.8*sum(n))
    assert same(ticket.start, before)
    for name,m in ticket.masks.items(): assert torch.equal(learn.model.get_submodule(name).weight, before[name+'.weight']*m)
    rest = {k: v for k,v in state(learn).items() if k.removesuffix('.weight') not in ticket.masks}
    assert all(torch.equal(v, before[k]) for k,v in rest.items()) # BatchNorm and its running statistics, biases, the head

def test_rounds_prune_the_same_fraction_of_the_survivors_and_masks_are_nested(learner, tmp_path):
    quietly(find_ticket, learner(), 1, 1e-2, sparsity=.875, rounds=3, schedule=sched_imp, path=tmp_path, seed=0)
    a,b,c = (load_ticket(tmp_path/f'round_{r}.pt') for r in (1, 2, 3))
    assert [round(float(t), 2) for t in (a, b, c)] == [.5, .75, .88]
    for n in a.masks: assert not (b.masks[n] & ~a.masks[n]).any() and not (c.masks[n] & ~b.masks[n]).any()

def test_the_first_imp_round_is_dense_training_and_one_magnitude_cut(learner):
    "The oracle: train densely with the same seed, cut by hand"
    ticket = quietly(find_ticket, learner(seed=3), 2, 1e-2, sparsity=.75, context='local', schedule=sched_imp, seed=5)
    dense = learner(seed=3)
    from fastai.torch_core import set_seed
    set_seed(5)
    for dl in dense.dls.loaders: dl.rng.seed(5)
    fit(dense, 2)
    for n,m in ticket.masks.items():
        w = dense.model.get_submodule(n).weight.detach().abs().flatten()
        kept = torch.zeros_like(w, dtype=torch.bool)
        kept[w.argsort()[round(.75*len(w)):]] = True
        assert torch.equal(m.flatten(), kept)

def test_rewinding_to_an_epoch_takes_the_state_at_its_end(learner):
    from fastai.callback.core import Callback
    class At(Callback):
        order,seen = 95,[]
        def after_epoch(self): self.seen.append(state(self.learn))
    at,learn = At(),learner()
    ticket = quietly(find_ticket, learn, 3, 1e-2, sparsity=.5, rewind_epoch=2, schedule=sched_imp, seed=0, cbs=at)
    assert same(ticket.start, at.seen[1]) and ticket.rewind_epoch == 2 and ticket.start['1.num_batches_tracked'] == 12

def test_up_to_the_epoch_of_rewinding_nothing_is_pruned(learner):
    "Not even by a schedule that prunes at once: a shuffled mask keeps weights that were pruned in the search, and they begin alive"
    learn = learner()
    ticket = quietly(find_ticket, learn, 3, 1e-2, sparsity=.9, rounds=2, rewind_epoch=1, schedule=sched_oneshot_at_start, seed=0)
    for n,m in ticket.masks.items():
        assert (ticket.start[f'{n}.weight'] != 0).all() and not m.all()
    assert float(ticket) == pytest.approx(.9, abs=.01)

def sched_oneshot_at_start(start, end, pos): return end

def test_training_a_ticket_begins_at_its_epoch_and_keeps_its_masks(learner):
    from fastai.callback.core import Callback
    class Watch(Callback):
        order = 95
        def before_fit(self): self.steps,self.ok = 0,True
        def before_batch(self):
            if self.training: self.first = getattr(self, 'first', self.pct_train)
        def after_batch(self):
            if not self.training: return
            self.steps += 1
            self.ok &= all((self.learn.model.get_submodule(n).weight[~m] == 0).all() for n,m in self.masks.items())
    learn,watch = learner(),Watch()
    ticket = quietly(find_ticket, learn, 3, 1e-2, sparsity=.5, rewind_epoch=1, seed=0)
    watch.masks = ticket.masks
    quietly(train_ticket, learn, ticket, 3, 1e-2, cbs=watch, seed=0)
    assert watch.steps == 2*len(learn.dls.train) and watch.first == pytest.approx(1/3) and watch.ok
    for n,z in zeros(learn.model).items(): assert torch.equal(z, ~ticket.masks[n])
    assert not [c for c in learn.cbs if 'Ticket' in type(c).__name__]

def test_a_layer_that_begins_at_zero_can_still_learn(learner):
    "Zero by initialisation is not zero by mask"
    net = conv_net()
    nn.init.zeros_(net[6].weight)
    learn = learner(model=net)
    ticket = quietly(find_ticket, learn, 2, 1e-2, sparsity=.5, context='local', rounds=2, seed=0)
    assert not learn.model[6].weight.any() and int(ticket.masks['6'].sum()) == round(.5*ticket.masks['6'].numel())
    quietly(train_ticket, learn, ticket, 2, 1e-2, seed=0)
    w,m = learn.model[6].weight,ticket.masks['6']
    assert not w[~m].any() and (w[m] != 0).float().mean() > .5 # some have no gradient: their inputs or outputs are silent

class Odd(nn.Module):
    "Layers without weights, without biases, with weights that are no conv's, and buffers"
    def __init__(self):
        super().__init__()
        self.conv,self.act,self.pool = nn.Conv2d(4, 8, 3, bias=False),nn.PReLU(),nn.AdaptiveAvgPool2d(1)
        self.bn,self.free = nn.BatchNorm2d(8, affine=False),nn.BatchNorm2d(8, track_running_stats=False)
        self.emb,self.head = nn.Embedding(4, 8),nn.Linear(8, 3)
        self.register_buffer('scale', torch.ones(1)); self.gain = nn.Parameter(torch.ones(8))
    def forward(self, x):
        x = self.pool(self.free(self.bn(self.act(self.conv(x))))).flatten(1)
        return self.head(x*self.gain*self.scale + self.emb(torch.zeros(len(x), dtype=torch.long)))

def test_layers_without_weights_or_biases(learner):
    learn = learner(model=Odd())
    before = state(learn)
    ticket = quietly(find_ticket, learn, 1, 1e-2, sparsity=.5, rounds=2, rewind_epoch=0, seed=0)
    assert list(ticket.masks) == ['conv'] and same(ticket.start, before)
    quietly(train_ticket, learn, ticket, 1, 1e-2, seed=0)
    assert not torch.equal(learn.model.emb.weight, before['emb.weight'])
    assert float(measured_sparsity(learn.model)) == pytest.approx(.5, abs=.01)

def test_whole_filters_stay_silent(learner):
    learn = learner()
    ticket = quietly(find_ticket, learn, 1, 1e-2, sparsity=.5, granularity='filter', exclude=('3', '6'), seed=0)
    dead = ~ticket.masks['0'].flatten(1).any(1)
    assert int(dead.sum()) == 4 and ticket.masks['0'][~dead].all()
    quietly(train_ticket, learn, ticket, 1, 1e-2, seed=0)
    assert not learn.model[0].weight[dead].any() and not learn.model[1].weight[dead].any() and not learn.model[1].bias[dead].any()

def test_linear_layers_too(learner):
    learn = learner()
    ticket = quietly(find_ticket, learn, 1, 1e-2, sparsity=.5, layers=(nn.Conv2d, nn.Linear), seed=0)
    quietly(train_ticket, learn, ticket, 1, 1e-2, seed=0)
    assert torch.equal(learn.model[10].weight == 0, ~ticket.masks['10'])

def test_saved_and_loaded_in_torchs_safe_mode(learner, tmp_path):
    ticket = quietly(find_ticket, learner(), 1, 1e-2, sparsity=.5, seed=0)
    again = load_ticket(save_ticket(ticket, tmp_path/'new/folder/t.pt'))
    assert same(again.masks, ticket.masks) and same(again.start, ticket.start) and again.settings == ticket.settings
    assert [f.name for f in (tmp_path/'new/folder').iterdir()] == ['t.pt']
    a,b = learner(seed=7),learner(seed=7)
    for l,t in ((a, ticket), (b, again)): quietly(train_ticket, l, t, 1, 1e-2, seed=0)
    assert same(state(a), state(b))

@pytest.mark.fault
def test_a_disk_that_fills_up_leaves_the_old_file(learner, tmp_path, monkeypatch):
    ticket = quietly(find_ticket, learner(), 1, 1e-2, sparsity=.5, seed=0)
    save_ticket(ticket, tmp_path/'t.pt')
    def full(fd): raise OSError(28, 'No space left on device') # when half of it is written
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): save_ticket(ticket, tmp_path/'t.pt')
    assert [f.name for f in tmp_path.iterdir()] == ['t.pt'] and same(load_ticket(tmp_path/'t.pt').masks, ticket.masks)

search = '''
    import sys; sys.path.insert(0, {here!r})
    from conftest import make_learner
    from fasterprune.lottery import *
    from fasterprune.schedules import sched_imp
    learn = make_learner()
    with learn.no_bar(), learn.no_logging(): find_ticket(learn, 8, 1e-2, sparsity=.9, rounds=6, rewind_epoch=1, schedule=sched_imp, path={path!r}, seed=0)
'''

@pytest.mark.fault
def test_killed_between_and_within_rounds(learner, tmp_path):
    code = textwrap.dedent(search.format(here=str(Path(__file__).parent), path=str(tmp_path/'rounds')))
    p = subprocess.Popen([sys.executable, '-c', code])
    for _ in range(2000):
        time.sleep(.05)
        if (tmp_path/'rounds'/'round_2.pt').exists() or p.poll() is not None: break
    p.send_signal(signal.SIGKILL); p.wait()
    left = {f.name for f in (tmp_path/'rounds').iterdir()}
    assert {'round_1.pt', 'round_2.pt'} <= left
    how = dict(n_epoch=8, lr_max=1e-2, sparsity=.9, rounds=6, rewind_epoch=1, schedule=sched_imp, seed=0)
    resumed = quietly(find_ticket, learner(), path=tmp_path/'rounds', **how)
    whole = quietly(find_ticket, learner(), **how)
    assert same(resumed.masks, whole.masks) and same(resumed.start, whole.start)

def test_controls(learner):
    learn = learner()
    ticket = quietly(find_ticket, learn, 1, 1e-2, sparsity=.5, seed=0)
    s = shuffled(ticket, 1)
    assert [int(m.sum()) for m in s.masks.values()] == [int(m.sum()) for m in ticket.masks.values()] and same(s.masks, shuffled(ticket, 1).masks)
    assert not same(s.masks, ticket.masks) and not same(s.masks, shuffled(ticket, 2).masks)
    other = conv_net()
    r = restarted(ticket, other)
    assert same(r.masks, ticket.masks) and torch.equal(r.start['0.weight'], other[0].weight) and r.rewind_epoch == 0

def test_a_dict_of_linear_layers(learner):
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3)))
    ticket = quietly(find_ticket, learn, 1, 1e-2, sparsity={'1': .5}, seed=0)
    assert list(ticket.masks) == ['1'] and float(ticket) == .5

@pytest.mark.parametrize('sparsity', [.3, .5])
@pytest.mark.parametrize('layer,dim', [(nn.Conv2d(8, 12, 3), 1), (nn.ConvTranspose2d(8, 12, 3), 0), (nn.ConvTranspose2d(8, 6, 3), 0)])
def test_a_shuffled_pattern_is_still_one(layer, dim, sparsity):
    net = nn.Sequential(layer)
    sp = Sparsifier(net, '2:4', layers=type(layer))
    sp.sparsify(sparsity)
    mask = shuffled(Ticket(sp.masks, net.state_dict(), dict(granularity='2:4')), 3).masks['0']
    def lots(mask): return mask.movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert torch.equal(lots(mask), lots(sp.masks['0'])) and not torch.equal(mask, sp.masks['0'])

@pytest.mark.bad_input
@pytest.mark.parametrize('kwargs,text', [
    (dict(sparsity=90), 'pass 0.9'), (dict(rounds=0), 'at least 1'), (dict(rewind_epoch=2), 'from 0 to 1'), (dict(rewind_epoch=-1), 'from 0 to 1'),
    (dict(context='layer'), 'local, erk, global, lamp'), (dict(layers=nn.Conv3d), 'no layer to prune'), (dict(schedule='agp'), 'a schedule is a function'), (dict(exclude='nope'), 'is not in the model')])
def test_mistakes_are_found_before_anything_is_trained(learner, kwargs, text):
    learn = learner()
    before = state(learn)
    with pytest.raises((ValueError, TypeError), match=re.escape(text)): quietly(find_ticket, learn, 2, 1e-2, **kwargs)
    assert same(state(learn), before) and learn.opt is None

@pytest.mark.bad_input
def test_a_ticket_for_another_network(learner):
    ticket = quietly(find_ticket, learner(), 1, 1e-2, sparsity=.5, seed=0)
    other = conv_net(width=4)
    before = {k: v.clone() for k,v in other.state_dict().items()}
    with pytest.raises(ValueError, match='does not fit this model: 0'): ticket.apply(other)
    with pytest.raises(ValueError, match='does not fit this model'): ticket.apply(nn.Sequential(*conv_net(), nn.Linear(3, 3)))
    assert same(other.state_dict(), before)

@pytest.mark.bad_input
def test_a_ticket_for_a_network_without_such_layers_or_without_memory():
    m = conv_net(); ticket = Ticket({'0': m[0].weight > 0}, m.state_dict())
    with pytest.raises(ValueError, match='does not fit this model: 0'): ticket.apply(nn.Sequential(nn.ReLU(), *conv_net()))
    with pytest.raises(ValueError, match='does not fit this model: 0, 0.weight'): ticket.apply(conv_net().to('meta'))

def test_masks_of_numbers_are_masks():
    m = conv_net(); kept = m[0].weight > 0
    t = Ticket({'0': kept.float()}, copy.deepcopy(m.state_dict()))
    assert torch.equal(t.apply(m)[0].weight != 0, kept) and float(t) == float((~kept).sum())/kept.numel()

@pytest.mark.fault
def test_a_changed_byte_in_a_ticket_is_found(tmp_path):
    "torch.load does not look at the checksums"
    m = conv_net(); file = save_ticket(Ticket({'0': m[0].weight > 0}, m.state_dict()), tmp_path/'t.pt'); data = file.read_bytes()
    at = data.index(m[6].weight.detach().numpy().tobytes())
    for bad in (data[:at+5] + bytes([data[at+5] ^ 1]) + data[at+6:], data[:-100], data[:100], b'', b'x'*500):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='is no ticket: it cannot be read'): load_ticket(file)

def test_settings_of_every_kind_can_be_saved_and_taken_up(learner, tmp_path):
    how = dict(n_epoch=1, lr_max=slice(1e-3, 1e-2), sparsity={'0': .5, '3': .75}, rounds=2, schedule=sched_between(sched_agp, .2), criteria=magnitude, path=tmp_path, seed=0)
    ticket = quietly(find_ticket, learner(), **how)
    assert {n: round((~m).float().mean().item(), 2) for n,m in ticket.masks.items()} == {'0': .5, '3': .75}
    assert {n: round((~m).float().mean().item(), 2) for n,m in load_ticket(tmp_path/'round_1.pt').masks.items()} == {'0': .29, '3': .5}
    assert same(quietly(find_ticket, learner(), **how).masks, ticket.masks)

@pytest.mark.parametrize('granularity,coupled', [('filter', False), ('filter', True), ('2:4', False)])
def test_controls_of_blocks_train_with_the_zeros_of_the_ticket(learner, granularity, coupled):
    ticket = quietly(find_ticket, learner(), 2, 1e-2, sparsity=.5, granularity=granularity, coupled=coupled, rounds=2, exclude='0' if ':' in granularity else (), seed=0)
    assert float(ticket) == pytest.approx(.5, abs=.05)
    for t in (shuffled(ticket, 3), restarted(shuffled(ticket, 4), conv_net())):
        learn = learner()
        quietly(train_ticket, learn, t, 2, 1e-2, seed=0)
        for n,mask in t.masks.items():
            w = learn.model.get_submodule(n).weight
            assert torch.equal(w != 0, mask)
            if ':' in granularity: assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        if granularity == 'filter':
            gone = ~t.masks['0'].flatten(1).any(1)
            assert gone.any() and not learn.model[1].weight[gone].any() and not learn.model[1].bias[gone].any()

@pytest.mark.fault
def test_a_round_that_fails_leaves_no_ticket(learner, tmp_path):
    from fastai.callback.core import Callback
    class Crash(Callback):
        def after_step(self):
            if self.learn.train_iter == 5: raise RuntimeError('crash')
    with pytest.raises(RuntimeError, match='crash'): quietly(find_ticket, learner(), 2, 1e-2, sparsity=.8, path=tmp_path, seed=0, cbs=Crash())
    assert not list(tmp_path.iterdir())

@pytest.mark.situation
def test_a_module_with_an_extra_state(tmp_path):
    class Counts(nn.Sequential):
        n = 0
        def forward(self, x):
            self.n += 1
            return super().forward(x)
        def get_extra_state(self): return {'n': self.n}
        def set_extra_state(self, state): self.n = state['n']
    learn = make_learner(model=Counts(*conv_net()))
    ticket = quietly(find_ticket, learn, 2, 1e-2, sparsity=.5)
    save_ticket(ticket, tmp_path/'t.pt')
    quietly(train_ticket, learn, load_ticket(tmp_path/'t.pt'), 1, 1e-2)
    assert learn.model.n == 12 and ticket.start['_extra_state'] == {'n': 0} # 6 batches of training, 6 of validation

@pytest.mark.bad_input
def test_a_sparsity_in_the_place_of_the_epochs(learner):
    with pytest.raises(ValueError, match=r'n_epoch got 0.8.*sparsity=0.8'): find_ticket(learner(), .8, 2)
