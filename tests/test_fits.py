"Where a fit begins and ends: errors and Ctrl-C, callbacks that are switched off, come in the middle, or are there twice"
import copy, pickle
import pytest, torch
from torch import nn
from fastai.basics import Callback, CancelEpochException, CancelTrainException, params
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
    batch = None # any, or a number
    def __init__(self, event, epoch, do, order=60): self.event,self.epoch_,self.do,self.order,self.done = event,epoch,do,order,False
    def __call__(self, event):
        if event.endswith('batch') and self.batch not in (None, self.learn.iter): return
        if event == self.event and not self.done and self.learn.epoch == self.epoch_ and (self.learn.training or not event.endswith('batch')):
            self.done = True
            self.do(self.learn)

def stop(error):
    def do(learn): raise error('stop')
    return do

def pickled(learn):
    with learn.removed_cbs([cb for cb in learn.cbs if isinstance(cb, At)]): return pickle.loads(pickle.dumps(learn))

def adding(make):
    "To be done in the middle of a fit"
    def add(learn):
        if make is KeepSparsity: Sparsifier(learn.model).sparsify(.8)
        learn.add_cb(make())
    return add

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
@pytest.mark.parametrize('event', ['before_epoch', 'after_batch', 'after_train', 'before_validate', 'after_epoch', 'after_fit'])
@pytest.mark.parametrize('make', pruning)
def test_an_interrupted_fit_does_not_touch_other_weights(learner, make, event):
    learn = learner(cbs=make())
    dense = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, cbs=At(event, 3, stop(KeyboardInterrupt)))
    learn.model.load_state_dict(dense)
    learn.validate()
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ZerosCallback)])
    assert same(dense, state(learn)) and '_do_fit' not in vars(learn)

class Broken(Callback):
    "Breaks a validation inside of a fit, just after it was announced; somebody catches that"
    on,order = False,70
    def before_fit(self):
        if self.on: raise RuntimeError('broken')
    def validate(self, learn):
        self.on = True
        try: learn.validate()
        except RuntimeError: pass
        self.on = False

line = lambda start, end, pos: start + (end-start)*pos

@pytest.mark.fault
@pytest.mark.parametrize('event,batch', [('before_epoch', 0), ('after_batch', 0), ('after_batch', 5), ('after_epoch', 0)])
@pytest.mark.parametrize('make', [SparsifyCallback, StraightThrough])
def test_an_error_that_is_caught_in_a_validation_inside(learner, make, event, batch):
    learn,broken = learner(),Broken()
    at = At(event, 2, lambda learn: broken.validate(learn), order=-50)
    at.batch = batch
    fit(learn, 3, cbs=[make(.8, schedule=line), broken, at])
    assert at.done and zeros(learn.model) == wanted(learn.model)

@pytest.mark.situation
def test_twice_in_a_learner_with_a_validation_in_the_last_batch(learner):
    cb = SparsifyCallback(.8, schedule=line)
    learn,at = learner(cbs=[cb, cb]),At('after_batch', 1, lambda learn: learn.validate(), order=-50)
    at.batch = 5
    fit(learn, 2, cbs=at)
    assert at.done and zeros(learn.model) == wanted(learn.model)

@pytest.mark.fault
@pytest.mark.parametrize('make', pruning)
def test_switched_off_after_a_fit_that_did_not_begin(learner, make):
    learn,broken = learner(cbs=make()),Broken()
    broken.on = True
    with pytest.raises(RuntimeError): fit(learn, 1, cbs=broken)
    for cb in learn.cbs: cb.run = not isinstance(cb, ZerosCallback)
    fit(learn, 2)
    assert zeros(learn.model) == 0

@pytest.mark.situation
@pytest.mark.parametrize('how', [copy.deepcopy, pickled])
@pytest.mark.parametrize('make', pruning)
def test_a_copy_made_in_the_middle_of_a_fit(learner, make, how):
    "It is in no fit: neither its schedule nor its masks go on"
    copies,learn = [],learner(cbs=make())
    fit(learn, 4, how='fit', cbs=At('after_epoch', 1, lambda learn: copies.append(how(learn))))
    other = copies[0]
    other.remove_cbs([cb for cb in other.cbs if isinstance(cb, At)])
    other.model,other.opt = conv_net(16),None
    fit(other, 2)
    for l in [learn, other]: assert zeros(l.model) == (0 if make is KeepSparsity else wanted(l.model))

@pytest.mark.fault
@pytest.mark.parametrize('make', pruning)
def test_stopped_after_it_came_in_the_middle(learner, make):
    learn = learner()
    learn.create_opt()
    real,steps,counted = learn.opt.step,[],Counted()
    def step():
        real()
        steps.append(1)
        if len(steps) == 15: raise KeyboardInterrupt
    learn.opt.step = step
    with pytest.raises(KeyboardInterrupt): fit(learn, 4, how='fit', cbs=[At('before_epoch', 1, adding(make)), counted])
    learn.opt.step = real
    assert zeros(learn.model) == counted.seen[-1] > 100
    dense = conv_net().state_dict()
    learn.model.load_state_dict(dense)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ZerosCallback)])
    assert same(dense, state(learn)) and not {'_do_fit', 'one_batch'} & set(vars(learn))

@pytest.mark.situation
def test_another_one_stays(learner):
    learn = learner(cbs=SparsifyCallback(.5, layers='0'))
    fit(learn, 1, cbs=SparsifyCallback(.8, layers='3')) # it goes, the guard stays
    learn.model,learn.opt = conv_net(),None
    counted = Counted()
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=[counted, At('after_step', 2, stop(KeyboardInterrupt), order=float('-inf'))])
    assert zeros(learn.model) >= counted.seen[-1] > 50

@pytest.mark.situation
@pytest.mark.parametrize('order', ['first', 'last'])
def test_one_callback_leaves_two_learners(learner, order):
    cb = SparsifyCallback(.8)
    a,b = learner(cbs=cb),learner(cbs=cb)
    for l in ([a, b] if order == 'first' else [b, a]): l.remove_cb(cb)
    for l in (a, b):
        fit(l, 1)
        assert zeros(l.model) == 0 and not {'_do_fit', 'one_batch'} & set(vars(l))

@pytest.mark.bad_input
def test_removed_from_the_wrong_learner(learner):
    cb = SparsifyCallback(.8)
    a,b = learner(cbs=cb),learner(cbs=cb)
    a.remove_cb(cb) # it works for the last one
    with pytest.raises(RuntimeError, match='add a new one'): fit(b, 1)

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
    if make is KeepSparsity and event == 'before_batch': pytest.skip('it begins at the next batch, when the zeros are gone')
    learn = learner()
    fit(learn, 4, cbs=At(event, 1, adding(make)))
    before = zeros(learn.model)
    assert abs(before - wanted(learn.model)) < 2 # local for one of them, lamp for the others
    fit(learn, 1) # it has come to stay
    assert zeros(learn.model) == before

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

@pytest.mark.situation
def test_gradients_of_layers_that_thaw(learner):
    "A network with dense weights inside never computes anything"
    class Turns(Callback):
        def before_epoch(self):
            for i,on in ((0, self.epoch == 0), (3, self.epoch == 1), (6, False)): self.learn.model[i].weight.requires_grad_(on)
    learn,counted = learner(),Counted()
    fit(learn, 2, cbs=[StraightThrough(.8, 'local', taylor, schedule=lambda start, end, pos: end), Turns(), counted])
    first,both = (sum(round(.8*learn.model[i].weight.numel()) for i in which) for which in ((0,), (0, 3)))
    assert counted.seen == [0] + [first]*6 + [both]*5 # scored after the first backward pass

@pytest.mark.situation
@pytest.mark.parametrize('event,error', [('before_epoch', CancelEpochException), ('before_train', CancelEpochException), ('before_train', CancelTrainException)])
@pytest.mark.parametrize('make', [SparsifyCallback, StraightThrough])
def test_a_last_epoch_that_is_cancelled(learner, make, event, error):
    learn = learner()
    fit(learn, 3, cbs=[make(.8, schedule=line), At(event, 2, stop(error))])
    assert zeros(learn.model) == wanted(learn.model)

@pytest.mark.fault
def test_an_error_in_a_batch_of_a_validation_that_is_caught(learner):
    "The fit goes on as it was; the history is that of one fit"
    class Fails(Callback):
        def after_pred(self):
            if not self.learn.training and self.learn.nested: raise RuntimeError('caught')
    def validate(learn):
        learn.nested = True
        try: learn.validate()
        except RuntimeError: pass
        learn.nested = False
    learn = learner()
    learn.nested = False
    fit(learn, 3, cbs=[SparsifyCallback(.8, schedule=line), Fails(), At('after_epoch', 1, validate, order=-50)])
    assert zeros(learn.model) == wanted(learn.model) and len(learn.recorder.sparsity_scheduled) == 3*6 + 1

@pytest.mark.fault
def test_the_guard_stays_when_another_one_goes(learner):
    learn = learner(cbs=SparsifyCallback(.5))
    fit(learn, 1, cbs=KeepSparsity())
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=At('after_epoch', 1, stop(KeyboardInterrupt)))
    dense = conv_net().state_dict()
    learn.model.load_state_dict(dense)
    learn.remove_cb(learn.sparsify)
    assert same(dense, state(learn))
