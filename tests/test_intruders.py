"Zeros stay zero and targets are met, whoever else writes, looks, validates or stops: other callbacks, other networks, other endings."
import copy, warnings
from functools import partial
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from fastai.basics import Callback, CancelEpochException, CancelFitException, CancelValidException, CrossEntropyLossFlat, DataLoaders, Learner, params
from fastai.callback.all import FetchPredsCallback, GradientAccumulation, GradientClip
from fastai.optimizer import Lamb, OptimWrapper, SGD
from fasterprune.all import *
from fasterprune.members import PrunedLayer
from conftest import conv_net, fit

local = partial(SparsifyCallback, context='local')
def convs(model): return [m for m in model.modules() if isinstance(m, nn.Conv2d)]
def zeros(model): return [int((m.weight == 0).sum()) for m in convs(model)]
def wanted(model, s): return [round(s*m.weight.numel()) for m in convs(model)]
def told(f):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always'); f()
    return ' '.join(str(w.message) for w in ws)

class Memory(Callback):
    "In each forward pass, what was zero in an earlier training pass is zero"
    order = 2_000_000
    def before_fit(self): self.seen = None
    def after_pred(self):
        now = [m.weight == 0 for m in convs(self.model)]
        if self.seen is not None: assert all((n | ~old).all() for n,old in zip(now, self.seen)), 'a zero came back'
        if self.training: self.seen = now if self.seen is None else [n | old for n,old in zip(now, self.seen)]

class Noise(Callback):
    "Writes to all weights, past PyTorch's count of writes if `hidden`"
    def __init__(self, event, order, hidden=False): self.event,self.order,self.hidden = event,order,hidden
    def _write(self):
        for p in self.learn.model.parameters(): (p.data if self.hidden else p.detach()).add_(.01*torch.ones_like(p))
    def before_batch(self): self._at('before_batch')
    def after_step(self): self._at('after_step')
    def after_batch(self): self._at('after_batch')
    def before_epoch(self): self._at('before_epoch')
    def before_validate(self): self._at('before_validate')
    def after_fit(self): self._at('after_fit')
    def _at(self, event):
        if event == self.event: self._write()

@pytest.mark.situation
@pytest.mark.parametrize('how', [dict(context='lamp'), dict(context='erk'), dict(context='local', granularity='filter'), dict(context='local', granularity='filter', coupled=True)],
                         ids=['lamp', 'erk', 'filter', 'coupled'])
@pytest.mark.parametrize('order', [-50, 45, 70])
@pytest.mark.parametrize('event,hidden', [('before_batch', False), ('after_step', True), ('after_batch', True), ('before_epoch', False), ('before_validate', False), ('after_fit', False)])
def test_another_callback_writes_to_the_weights(learner, event, hidden, order, how):
    learn = learner()
    cb = SparsifyCallback(.5, schedule=sched_agp, **how)
    fit(learn, 2, cbs=[cb, Noise(event, order, hidden), Memory()])
    granularity = how.get('granularity', 'weight')
    assert float(measured_sparsity(learn.model, granularity=granularity)) == pytest.approx(.5, abs=.01)
    assert learn.recorder.values[-1][-1] == pytest.approx(.5, abs=.01)

@pytest.mark.situation
def test_an_average_is_swapped_in_for_validation(learner):
    class Average(Callback):
        order = 60
        def before_fit(self): self.mean = None
        def after_step(self):
            now = [p.detach().clone() for p in self.model.parameters()]
            self.mean = now if self.mean is None else [.9*a + .1*b for a,b in zip(self.mean, now)]
        def before_validate(self): self._swap()
        def after_validate(self): self._swap()
        def _swap(self):
            now = [p.detach().clone() for p in self.model.parameters()]
            with torch.no_grad(): [p.copy_(a) for p,a in zip(self.model.parameters(), self.mean)]
            self.mean = now
    learn = learner()
    fit(learn, 3, cbs=[local(.8), Average(), Memory()])
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.situation
def test_the_model_is_replaced(learner):
    class Swap(Callback):
        order = -30
        def before_epoch(self):
            if self.epoch == 1: self.learn.model = copy.deepcopy(self.learn.model); self.learn.create_opt()
    learn = learner()
    fit(learn, 3, cbs=[local(.8), Swap()])
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.situation
@pytest.mark.parametrize('epoch,new', [(1, lambda: nn.Conv2d(16, 16, 1)), (2, lambda: nn.Conv2d(16, 16, 1).double().float())])
def test_a_layer_is_replaced(learner, epoch, new):
    class Swap(Callback):
        order = -30
        def before_epoch(self):
            if self.epoch == epoch: self.model[6] = new(); self.learn.create_opt()
    learn = learner()
    fit(learn, 3, cbs=[local(.8), Swap()])
    assert zeros(learn.model) == wanted(learn.model, .8)

def test_a_layer_of_another_shape_takes_its_place(learner):
    class Swap(Callback):
        order = -30
        def before_epoch(self):
            if self.epoch == 1: self.model[6] = nn.Conv2d(16, 16, 3, padding=1); self.learn.create_opt()
    with pytest.raises(ValueError, match='has no 6 of the same shape'): fit(learner(), 3, cbs=[local(.8), Swap()])

@pytest.mark.fault
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_pruned_weights_that_others_make_infinite(learner, value):
    class Spoil(Callback):
        order = 70
        def after_batch(self):
            for m in convs(self.learn.model): m.weight.data[m.weight == 0] = value
    learn = learner()
    fit(learn, 3, cbs=[local(.8), Spoil(), Memory()])
    assert zeros(learn.model) == wanted(learn.model, .8) and all(m.weight.isfinite().all() for m in convs(learn.model))

def test_whoever_comes_last_of_all_writes_in_vain(learner):
    learn = learner()
    fit(learn, 2, cbs=[local(.8), Noise('after_fit', 10**12)])
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.fault
@pytest.mark.parametrize('order', [-50, 0, 70])
@pytest.mark.parametrize('stop', [KeyboardInterrupt, CancelFitException])
def test_stopped_right_after_a_step(learner, order, stop):
    class Stop(Callback):
        def after_step(self):
            if self.learn.train_iter == 8: raise stop
    Stop.order = order
    learn = learner()
    try: fit(learn, 2, cbs=[local(.8, schedule=sched_oneshot), Stop()])
    except KeyboardInterrupt: pass
    assert zeros(learn.model) == wanted(learn.model, .8)
    assert not any('sparsify' in type(cb).__name__.lower() for cb in learn.cbs) and not hasattr(learn, 'sparsify_first')

@pytest.mark.fault
def test_interrupted_inside_the_optimizer(learner):
    learn = learner()
    class Halfway(Callback):
        def before_step(self):
            if self.learn.train_iter != 8: return
            for p in self.learn.model.parameters(): p.data.add_(.1) # some of the step is done
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=[local(.8, schedule=sched_oneshot), Halfway()])
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.fault
def test_after_an_interruption_nothing_is_masked_any_more(learner):
    class Stop(Callback):
        def after_step(self):
            if self.learn.train_iter == 8: raise KeyboardInterrupt
    learn = learner(cbs=local(.8, schedule=sched_oneshot))
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=Stop())
    assert zeros(learn.model) == wanted(learn.model, .8)
    for m in convs(learn.model): nn.init.normal_(m.weight)
    with learn.no_bar(), learn.no_logging(): learn.validate(), learn.get_preds(), learn.lr_find(num_it=3, show_plot=False)
    assert zeros(learn.model) == [0]*3
    fit(learn, 2)
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.situation
@pytest.mark.parametrize('event', ['after_backward', 'before_step', 'after_step'])
@pytest.mark.parametrize('order', [-50, 60])
def test_gradients_of_pruned_weights_are_zero_for_every_reader(learner, event, order):
    seen = []
    def look(self): seen.extend(float(m.weight.grad[m.weight == 0].abs().sum()) for m in convs(self.model) if (m.weight == 0).any())
    look_cb = type('Look', (Callback,), {event: look, 'order': order})
    fit(learner(), cbs=[SparsifyCallback(.8, schedule=sched_oneshot), look_cb()])
    assert seen and max(seen) == 0

def test_gradients_under_autocast_are_zero_too(learner):
    seen = []
    class Bf16(Callback):
        order = 10
        def before_batch(self): self.cast = torch.autocast('cpu', dtype=torch.bfloat16); self.cast.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.cast.__exit__(None, None, None)
        def after_backward(self): seen.extend(float(m.weight.grad[m.weight == 0].abs().sum()) for m in convs(self.model) if (m.weight == 0).any())
    learn = learner()
    fit(learn, cbs=[local(.8, schedule=sched_oneshot), Bf16(), Memory()])
    assert seen and max(seen) == 0 and zeros(learn.model) == wanted(learn.model, .8)

def test_a_hook_on_the_optimizer_sees_masked_gradients(learner):
    learn,seen = learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),[]
    learn.create_opt()
    def look(*_): seen.extend(float(m.weight.grad[m.weight == 0].abs().sum()) for m in convs(learn.model) if (m.weight == 0).any())
    learn.opt.opt.register_step_pre_hook(look)
    fit(learn, cbs=SparsifyCallback(.8, schedule=sched_oneshot))
    assert seen and max(seen) == 0

def test_an_optimizer_that_looks_at_norms_sees_masked_gradients(learner):
    learn = learner(opt_func=Lamb)
    norms = []
    learn.create_opt()
    step = learn.opt.step
    def spy():
        norms.extend(float(m.weight.grad[m.weight == 0].abs().sum()) for m in convs(learn.model) if (m.weight == 0).any())
        step()
    learn.opt.step = spy
    fit(learn, cbs=SparsifyCallback(.8, schedule=sched_oneshot))
    assert norms and max(norms) == 0

@pytest.mark.situation
@pytest.mark.parametrize('event', ['after_train', 'after_batch', 'after_validate', 'before_epoch'])
@pytest.mark.parametrize('what', ['validate', 'get_preds'])
def test_looking_inside_a_fit(learner, event, what):
    "`lambda` schedule: the last step is the one that counts"
    class Look(Callback):
        busy = False
        def _look(self):
            if self.busy or self.learn.train_iter % 3: return
            self.busy = True
            getattr(self.learn, what)()
            self.busy = False
    setattr(Look, event, Look._look)
    learn = learner()
    fit(learn, 3, cbs=[local(.8, schedule=lambda start, end, pos: start + (end-start)*pos), Look(), Memory()])
    assert zeros(learn.model) == wanted(learn.model, .8)

def test_predictions_fetched_by_fastai_itself(learner):
    learn = learner()
    fit(learn, 2, cbs=[local(.8), FetchPredsCallback()])
    assert zeros(learn.model) == wanted(learn.model, .8)
    assert all(len(row) == len(learn.recorder.metric_names)-2 for row in learn.recorder.values)

@pytest.mark.situation
def test_two_callbacks_have_a_column_each(learner):
    learn = learner()
    fit(learn, 2, cbs=[local(.5, 'filter', exclude='0'), SparsifyCallback(.9, layers=nn.Linear)])
    names,rows = learn.recorder.metric_names,learn.recorder.values
    assert list(names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'sparsity 2', 'time']
    assert all(len(r) == len(names)-2 for r in rows)
    assert rows[-1][-2] == pytest.approx(.5, abs=.01) and rows[-1][-1] == pytest.approx(.9, abs=.02)

def test_a_cancelled_validation_leaves_the_column_where_it_is(learner):
    class Stop(Callback):
        def after_pred(self):
            if not self.training: raise CancelValidException
    learn = learner()
    fit(learn, 2, cbs=[local(.8), Stop()])
    assert [dict(zip(learn.recorder.metric_names[1:], row))['sparsity'] for row in learn.recorder.values][-1] == pytest.approx(.8, abs=.01)

def test_a_schedule_that_ends_elsewhere_is_told(learner):
    learn = learner()
    assert 'ends at a sparsity of 40.00%, not at its target of 80.00%' in told(lambda: fit(learn, cbs=local(.8, schedule=lambda start, end, pos: end/2*pos)))
    assert zeros(learn.model) == wanted(learn.model, .4)

def test_one_callback_on_two_learners(learner):
    cb = local(.8)
    a,b = learner(cbs=cb),learner(seed=1, cbs=cb)
    for learn in (a, b, a):
        fit(learn, 2)
        assert zeros(learn.model) == wanted(learn.model, .8)

def test_a_second_copy_gets_the_same_zeros(learner):
    learn = learner()
    mean = copy.deepcopy(learn.model)
    class Mean(Callback):
        def after_step(self):
            for a,b in zip(mean.parameters(), self.model.parameters()): a.data.lerp_(b.detach(), .1)
            self.learn.sparsify.sparsifier.apply_to(mean)
    fit(learn, 3, cbs=[local(.8), Mean()])
    Sparsifier(learn.model).apply_to(mean)
    assert zeros(mean) == wanted(mean, .8)

@pytest.mark.situation
def test_networks_that_train_by_turns(learner):
    "As in a GAN: what is frozen at the end has its target all the same"
    class Turns(Callback):
        order = -20
        def before_batch(self):
            if not self.training: return
            for i,half in enumerate((self.model[:3], self.model[3:])): half.requires_grad_(self.learn.iter % 2 == i)
    learn = learner(model=conv_net())
    fit(learn, 3, how='fit', cbs=[local(.8, schedule=sched_iterative), Turns()])
    assert zeros(learn.model) == wanted(learn.model, .8)

def test_zeros_of_an_initialisation_learn(learner):
    learn = learner()
    with torch.no_grad(): learn.model[0].weight[:, 2:] = 0 # two input channels more, as fastai adds them to a pretrained network
    fit(learn, 3, cbs=local(.5))
    assert (learn.model[0].weight[:, 2:] != 0).any()
    assert zeros(learn.model) == wanted(learn.model, .5)

@pytest.mark.parametrize('granularity', ['column', 'shared_kernel', 'shared_weight'])
def test_input_channels_that_were_pruned_are_kept(learner, granularity):
    linear = granularity != 'shared_kernel'
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3)) if linear else conv_net(16))
    name = '1' if linear else '3'
    fit(learn, 2, cbs=SparsifyCallback(.5, granularity, layers=name))
    gone = learn.model.get_submodule(name).weight == 0
    assert gone.sum() == gone.numel()//2
    fit(learn, 2, cbs=KeepSparsity())
    assert torch.equal(learn.model.get_submodule(name).weight == 0, gone)

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_zeros_of_a_pruning_are_taken_over(granularity):
    m = conv_net(16)
    Sparsifier(m, granularity).sparsify(.5)
    before = zeros(m)
    assert [g.n_pruned/g.n for g in Sparsifier(m, granularity).groups] == [.5]*3
    assert zeros(m) == before

@pytest.mark.fault
def test_the_last_epoch_is_cancelled(learner):
    class Stop(Callback):
        def after_step(self):
            if self.epoch == 2 and self.iter == 3: raise CancelEpochException
    learn = learner()
    fit(learn, 3, cbs=[local(.8, schedule=lambda start, end, pos: start + (end-start)*pos), Stop()])
    assert zeros(learn.model) == wanted(learn.model, .8)

@pytest.mark.fault
def test_gradients_that_never_step(learner):
    learn = learner()
    said = told(lambda: fit(learn, cbs=[local(.8, criteria=taylor), GradientAccumulation(1000)]))
    assert zeros(learn.model) == wanted(learn.model, .8) or 'nothing was pruned' in said

def test_a_schedule_that_overshoots_is_cut_off(learner):
    bump = lambda start, end, pos: end*pos + .4*(abs(pos-.55) < .03)
    learn = learner(n=480)
    assert 'clipped' in told(lambda: fit(learn, 3, cbs=local(.5, schedule=bump)))
    assert zeros(learn.model) == wanted(learn.model, .5)

@pytest.mark.parametrize('criteria', [gradient_magnitude, movement, random_score])
def test_what_has_just_come_back_counts_at_the_end(learner, criteria):
    learn = learner(n=240)
    fit(learn, 3, cbs=local(.8, criteria=criteria, schedule=sched_onecycle, regrow=True))
    assert zeros(learn.model) == wanted(learn.model, .8)

def test_filters_that_come_back_learn_again(learner):
    learn = learner(n=800, opt_func=partial(SGD, mom=.9))
    fit(learn, 4, cbs=local(.6, 'filter', schedule=sched_dsd, regrow=True))
    assert float(measured_sparsity(learn.model, granularity='filter')) == 0
    assert all((m.weight.flatten(1).abs().amax(1) > 1e-6).all() for m in convs(learn.model))

def test_weights_that_moved_between_two_calls_are_masked_again():
    m = nn.Sequential(nn.Conv2d(4, 8, 3))
    dense,sp = copy.deepcopy(m.state_dict()),Sparsifier(m)
    sp.sparsify(.5)
    m.load_state_dict(dense)
    assert sp.sparsify(.5).zeros == 144

def test_a_pattern_on_weights_that_have_zeros_is_complete_and_says_so(learner):
    learn = learner()
    Sparsifier(learn.model, exclude='0').sparsify(.3)
    said = told(lambda: fit(learn, 3, cbs=SparsifyCallback(.5, '2:4', exclude='0')))
    lots = [(learn.model[i].weight != 0).unflatten(1, (-1, 4)).sum(2) for i in (3, 6)]
    assert all((l <= 2).all() for l in lots) and 'more zeros than the pattern asks for' in said

@pytest.mark.parametrize('context', ['erk', lambda sparsity, shapes, sizes: [1.]+[.5]*(len(sizes)-1)])
def test_a_target_that_cannot_be_met_is_said(context):
    m = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(20)], nn.Conv2d(1, 4, 3))
    assert 'too few blocks' in told(lambda: Sparsifier(m, context=context).sparsify(.9))

def test_means_that_overflow_end():
    m = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    nn.init.zeros_(m[1].weight)
    r = Sparsifier(m, 'filter', 'global', small_final).sparsify(.75)
    assert float(r) >= .75

def test_infinite_weights_become_plain_zeros():
    m = nn.Sequential(nn.Conv2d(2, 4, 3))
    sp = Sparsifier(m); sp.sparsify(.5)
    gone = ~sp.masks['0']
    with torch.no_grad(): m[0].weight[gone] = float('inf')
    sp.apply()
    assert (m[0].weight[gone] == 0).all() and not torch.signbit(m[0].weight[gone]).any()

@pytest.mark.parametrize('make', [lambda: local(.5, 'filter'), lambda: local(.5, criteria=wanda), lambda: local(.5, 'filter', coupled=True), KeepSparsity])
def test_loaders_of_pytorch(make, tmp_path):
    ds = TensorDataset(torch.randn(64, 4, 6, 6), torch.arange(64) % 3)
    dls = DataLoaders(TorchLoader(ds, 16), TorchLoader(ds, 16))
    learn = Learner(dls, conv_net(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    fit(learn, 1, cbs=make())

def test_weights_that_are_standardised_on_the_way_are_told():
    class Standardised(nn.Conv2d):
        def forward(self, x): return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)
    assert 'another weight' in told(lambda: Sparsifier(nn.Sequential(Standardised(2, 4, 3))).sparsify(.5))

def test_a_layer_with_a_memory_is_not_run_to_look_at_it():
    class Observed(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer('highest', torch.ones(()))
            self.calls = 0
        def forward(self, x):
            self.calls += 1
            self.highest.mul_(.9).add_(.1*x.abs().max())
            return super().forward(x + torch.randn(()))
    net = nn.Sequential(Observed(2, 4, 3)).train()
    sp,chance = Sparsifier(net),torch.get_rng_state()
    for s in (.2, .5, .8): sp.update(s)
    assert net[0].calls == 0 and net[0].highest == 1 and torch.equal(torch.get_rng_state(), chance) and net[0].training

def test_a_shared_weight_is_excluded_under_each_of_its_names():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    Sparsifier(net, layers=nn.Linear, exclude='0').sparsify(.5)
    assert (net[1].weight != 0).all() and (net[2].weight == 0).sum() == 32

def test_a_schedule_that_overshoots_is_told_in_each_fit(learner):
    cb,learn = local(.5, schedule=lambda s, e, p: 1.1*e*p),learner()
    for _ in range(2): assert 'more than its target' in told(lambda: fit(learn, 1, cbs=cb))

def test_keep_sparsity_keeps_zero_channels_beside_a_living_norm(learner):
    learn = learner()
    fit(learn, 2, cbs=local(.5, 'filter', layers='0'))
    with torch.no_grad(): learn.model[0].weight[(learn.model[0].weight != 0).flatten(1).any(1).nonzero()[0]] = 0 # its norm lives
    norm = learn.model[1]
    gone = (norm.weight == 0) & (norm.bias == 0)
    fit(learn, 2, cbs=KeepSparsity())
    assert gone.sum() == 4 and (norm.weight[gone] == 0).all() and (norm.bias[gone] == 0).all()

def test_keep_given_masks(learner):
    learn = learner()
    masks = {n: torch.rand_like(m.weight) > .7 for n,m in find_layers(learn.model).items()}
    fit(learn, 2, cbs=KeepSparsity(masks=masks))
    for n,m in find_layers(learn.model).items(): assert torch.equal(m.weight != 0, masks[n])

def test_a_learner_on_our_batches_is_exported(tmp_path):
    from fastai.basics import load_learner
    from fasterprune.experiments import load_data, small_resnet
    learn = Learner(load_data('digits', bs=512), small_resnet(1, 10), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    fit(learn, 1, cbs=local(.5, 'filter', coupled=True))
    learn.export('small.pkl')
    again = load_learner(tmp_path/'small.pkl')
    assert len(again.dls.train.dataset) == 0 and zeros(again.model) == zeros(learn.model)

# whoever writes, however, at any event

def hidden_write(learn):
    for p in learn.model.parameters(): p.data.add_(.01)
def through_numpy(learn):
    for p in learn.model.parameters():
        a = p.detach().numpy()
        a += .01
def new_parameters(learn):
    for m in convs(learn.model): m.weight = nn.Parameter(m.weight.detach() + .01)
def copied_layers(learn):
    for i,m in enumerate(learn.model):
        if isinstance(m, nn.Conv2d): learn.model[i] = copy.deepcopy(m)
    hidden_write(learn)
def copied_model(learn):
    learn.model = copy.deepcopy(learn.model)
    hidden_write(learn)

class At(Callback):
    "Calls a function at one event"
    def __init__(self, event, f, order):
        self.order,self.f = order,f
        setattr(self, event, self._call)
    def _call(self): self.f(self.learn)

@pytest.mark.situation
@pytest.mark.parametrize('event', ['before_validate', 'after_train', 'after_batch', 'after_validate', 'after_fit', 'before_epoch'])
@pytest.mark.parametrize('write', [hidden_write, through_numpy, new_parameters, copied_layers, copied_model])
@pytest.mark.parametrize('order', [-80, 2000])
def test_whoever_writes_however(learner, write, event, order):
    learn = learner()
    fit(learn, 2, cbs=[local(.5, schedule=sched_agp), At(event, write, order), Memory()])
    assert zeros(learn.model) == wanted(learn.model, .5)

def test_a_network_of_another_kind_is_left_alone_and_it_is_said(learner):
    learn,other = learner(),nn.Sequential(nn.Conv2d(4, 3, 6), nn.Flatten())
    def swap(learn): learn.model = other
    text = told(lambda: fit(learn, 2, cbs=[local(.5, schedule=sched_agp), At('after_fit', swap, -80)]))
    assert 'zeros are not kept in the present learn.model, a Sequential' in text
    assert learn.model is other and not (other[0].weight == 0).any()
