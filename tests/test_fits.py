"Where a fit begins and ends: errors and Ctrl-C, callbacks that are switched off, come in the middle, or are there twice"
import copy, pickle
import pytest, torch
from torch import nn
from fastai.basics import Callback, CancelFitException, params
from fastai.callback.all import GradientAccumulation
from fasterprune.all import *
from fasterprune.events import ZerosCallback
from conftest import conv_net, fit, same, state

pytestmark = [pytest.mark.filterwarnings('ignore::UserWarning')]
pruning = [lambda: SparsifyCallback(.8), lambda: StraightThrough(.8), KeepSparsity]
convs = lambda m: [l for l in m.modules() if isinstance(l, nn.Conv2d)]
def zeros(m): return sum(int((l.weight == 0).sum()) for l in convs(m))
def wanted(m, s=.8): return round(s*sum(l.weight.numel() for l in convs(m)))

class At(Callback):
    "Does something at an event of a training epoch"
    def __init__(self, event, epoch, do, order=60): self.event,self.epoch_,self.do,self.order,self.done = event,epoch,do,order,False
    def __call__(self, event):
        if event == self.event and not self.done and self.learn.epoch == self.epoch_ and (self.learn.training or 'epoch' in event or 'valid' in event):
            self.done = True
            self.do(self.learn)

def stop(error):
    def do(learn): raise error('stop')
    return do

class Counted(Callback):
    "Zeros at each forward pass of a training"
    run_valid = False
    def before_fit(self): self.seen = []
    def after_pred(self): self.seen.append(zeros(self.learn.model))

@pytest.mark.fault
@pytest.mark.parametrize('where', ['in learn.cbs', 'passed to fit'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('make', pruning)
def test_stopped_in_the_middle_of_a_step(learner, make, error, where):
    learn,steps = learner(),[]
    if make is KeepSparsity: fit(learn, 2, cbs=SparsifyCallback(.8))
    learn.create_opt()
    real,counted = learn.opt.step,Counted()
    def step():
        real()
        steps.append(1)
        if len(steps) == 15: raise error
    learn.opt.step,cb = step,make()
    if where == 'in learn.cbs': learn.add_cb(cb)
    with pytest.raises(error): fit(learn, 3, how='fit', cbs=[counted] + [cb]*(where == 'passed to fit'))
    learn.opt.step = real
    assert zeros(learn.model) == counted.seen[-1] > 700
    before = state(learn)
    learn.validate()
    assert same(before, state(learn)) # nothing is left to do
    fit(learn, 2, cbs=make() if where == 'passed to fit' else None)
    assert zeros(learn.model) == (counted.seen[-1] if make is KeepSparsity else wanted(learn.model))

@pytest.mark.fault
@pytest.mark.parametrize('event', ['before_epoch', 'after_batch', 'after_train', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('make', pruning)
def test_an_interrupted_fit_does_not_touch_other_weights(learner, make, event):
    learn = learner(cbs=make())
    dense = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=At(event, 2, stop(KeyboardInterrupt)))
    learn.model.load_state_dict(dense)
    learn.validate()
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ZerosCallback)])
    assert same(dense, state(learn)) and '_do_fit' not in vars(learn)

@pytest.mark.fault
@pytest.mark.parametrize('event', ['after_batch', 'after_epoch'])
def test_an_error_that_is_caught_in_a_validation_inside(learner, event):
    class Fails(Callback):
        def before_validate(self):
            if self.learn.nested: raise RuntimeError('caught')
    def validate(learn):
        learn.nested = True
        try: learn.validate()
        except RuntimeError: pass
        learn.nested = False
    learn = learner()
    learn.nested = False
    fit(learn, 3, cbs=[SparsifyCallback(.8), Fails(), At(event, 1, validate, order=-50)])
    assert zeros(learn.model) == wanted(learn.model)

@pytest.mark.situation
@pytest.mark.parametrize('make', pruning)
def test_switched_off_for_a_fit(learner, make):
    learn,counted = learner(cbs=make()),Counted()
    cb = learn.cbs.filter(lambda cb: isinstance(cb, ZerosCallback))[0]
    for fits in range(2): # in the second one it has been at work before
        cb.run = False
        learn.model,learn.opt = conv_net(),None
        fit(learn, 2, cbs=counted)
        assert set(counted.seen) == {0} and zeros(learn.model) == 0
        fit(learn, 2)
        assert zeros(learn.model) == (0 if make is KeepSparsity else wanted(learn.model))

@pytest.mark.situation
@pytest.mark.parametrize('event', ['before_epoch', 'before_batch', 'after_batch', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('make', pruning)
def test_added_in_the_middle_of_a_fit(learner, make, event):
    learn = learner()
    if make is KeepSparsity: fit(learn, 2, cbs=SparsifyCallback(.8))
    fit(learn, 4, cbs=At(event, 1, lambda learn: learn.add_cb(make())))
    if make is not KeepSparsity: assert zeros(learn.model) == wanted(learn.model)
    learn.validate()

@pytest.mark.situation
def test_the_same_callback_in_the_learner_and_in_fit(learner):
    cb = SparsifyCallback(.8)
    learn = learner(cbs=cb)
    fit(learn, 2, cbs=cb)
    learn.model,learn.opt = conv_net(),None
    fit(learn, 2)
    assert zeros(learn.model) == wanted(learn.model)

@pytest.mark.situation
@pytest.mark.parametrize('make', pruning)
def test_nothing_is_left_of_a_fit(learner, make):
    "The callback in the Learner holds no network: neither after a fit nor after an error"
    for stopped in (False, True):
        learn = learner(cbs=make())
        if stopped:
            with pytest.raises(RuntimeError): fit(learn, 3, cbs=At('after_batch', 1, stop(RuntimeError)))
        else: fit(learn, 2)
        cb = learn.cbs.filter(lambda cb: isinstance(cb, ZerosCallback))[0]
        held = {k: v for k,v in vars(cb).items() if k not in ('_learn', 'learn')}
        assert len(pickle.dumps({k: v for k,v in held.items() if not callable(v) and k != 'how'})) < 2000, held

@pytest.mark.situation
@pytest.mark.parametrize('context', ['local', 'erk', 'global', 'lamp'])
@pytest.mark.parametrize('make', [SparsifyCallback, StraightThrough])
@pytest.mark.parametrize('epoch', [1, 3])
def test_layers_that_are_frozen_late(learner, make, context, epoch):
    learn = learner(splitter=lambda m: [params(m[:3]), params(m[3:6]), params(m[6:])])
    fit(learn, 4, cbs=[make(.8, context=context), At('before_epoch', epoch, lambda learn: learn.freeze())])
    got,n = measured_sparsity(learn.model),wanted(learn.model)
    if context == 'local': assert [round(.8*l.weight.numel()) for l in convs(learn.model)] == [int((l.weight == 0).sum()) for l in convs(learn.model)]
    else: assert got.zeros == n

@pytest.mark.situation
def test_frozen_by_turns(learner):
    "What one part lags behind is not asked of the other"
    learn = learner(splitter=lambda m: [params(m[:3]), params(m[3:])])
    class Turns(Callback):
        run_valid = False
        def before_fit(self): self.most = 0
        def before_epoch(self):
            for p in self.learn.model[0].parameters(): p.requires_grad_(self.epoch % 2 == 0)
            for i in (3, 6): self.learn.model[i].weight.requires_grad_(self.epoch % 2 == 1)
        def after_batch(self):
            asked = self.learn.sparsify.scheduled(min(1., self.learn.pct_train + 1/self.learn.n_epoch/self.learn.n_iter))
            self.most = max(self.most, float((self.learn.model[0].weight == 0).float().mean()) - asked)
    turns = Turns()
    fit(learn, 6, cbs=[SparsifyCallback(.8, context='global'), turns])
    assert zeros(learn.model) == wanted(learn.model) and turns.most < .02

@pytest.mark.situation
def test_gradients_between_accumulated_batches(learner):
    class Reads(Callback):
        run_valid = False
        def before_fit(self): self.seen = []
        def before_batch(self):
            w = self.learn.model[3].weight
            if w.grad is not None: self.seen.append(bool((w.grad[w == 0] != 0).any()))
    learn,reads = learner(),Reads()
    fit(learn, 2, cbs=[SparsifyCallback(.8, schedule=lambda start, end, pos: end), GradientAccumulation(24), reads])
    assert len(reads.seen) > 4 and not any(reads.seen)

@pytest.mark.situation
def test_zeros_are_kept_in_a_network_that_runs_with_its_loss_only(learner):
    "Single weights need no look at how the network is connected"
    class Chatty(nn.Module):
        def __init__(self): super().__init__(); self.net = conv_net()
        def forward(self, x, target=None):
            if target is None and not self.training: raise ValueError('no target')
            return self.net(x)
    class Target(Callback):
        def before_batch(self): self.learn.xb = (*self.xb, self.y)
    learn = learner(model=Chatty())
    fit(learn, 2, cbs=[Target(), SparsifyCallback(.8)])
    before = zeros(learn.model)
    fit(learn, 2, cbs=[Target(), KeepSparsity()])
    assert zeros(learn.model) == before == wanted(learn.model)

def test_weights_that_did_not_come_back_are_told(learner):
    learn = learner()
    with pytest.warns(UserWarning, match='let back in are still zero'): fit(learn, 3, cbs=SparsifyCallback(.9, schedule=sched_dsd, regrow=True))
    assert 0 < zeros(learn.model) < 100

@pytest.mark.bad_input
@pytest.mark.parametrize('make', pruning)
def test_no_batch_to_train_with(learner, make):
    learn = learner(n=6, bs=8)
    with pytest.warns(UserWarning, match='makes no batch'): fit(learn, 1, cbs=make())
    assert zeros(learn.model) == 0
