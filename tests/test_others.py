"What other callbacks and Learners do behind our back, found by trying: pruned weights are zero wherever somebody looks"
import copy, inspect
from functools import partial
from types import MethodType, SimpleNamespace
import pytest, torch
from torch import nn
from fastai.basics import Callback, CancelEpochException, CancelFitException, CancelStepException, Learner
from fastai.callback.all import GradientClip, SaveModelCallback
from fastai.learner import Recorder
from fastai.optimizer import SGD
from fasterprune.all import *
from fasterprune.layers import tell_computed
from fasterprune.others import reads_gradients, writes_weights
from conftest import conv_net, fit

flat = lambda start, end, pos: end
line = lambda start, end, pos: start + (end-start)*pos
def convs(m): return [l for l in m.modules() if isinstance(l, nn.Conv2d)]
def zeros(m): return [int((l.weight == 0).sum()) for l in convs(m)]
def wanted(m, s): return sum(round(s*l.weight.numel()) for l in convs(m))
both = pytest.mark.parametrize('callback', [SparsifyCallback, StraightThrough])

def noise(cb):
    for p in cb.learn.model.parameters(): p.data.add_(.01)

def watched(learn):
    "The zeros at each forward pass, from the second on (before the first batch the network is dense)"
    seen = []
    learn.model.register_forward_pre_hook(lambda m, i: seen.append(sum(zeros(m))))
    return seen

@pytest.mark.situation
@both
@pytest.mark.parametrize('event', ['before_batch', 'after_batch', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('how', ['handed over', 'put in'])
def test_functions_that_write(learner, callback, event, how):
    learn = learner()
    seen,cb = watched(learn),Callback(**{event: noise}) if how == 'handed over' else Callback()
    if how == 'put in': setattr(cb, event, lambda: noise(cb))
    fit(learn, 3, cbs=[callback(.8, context='local', schedule=flat), cb])
    assert len(seen) > 20 and set(seen[1:]) == {wanted(learn.model, .8)}

@pytest.mark.situation
@both
def test_a_learner_with_a_step_of_its_own(learner, callback):
    class Noisy(Learner):
        def _do_grad_opt(self):
            super()._do_grad_opt()
            noise(SimpleNamespace(learn=self))
    plain = learner()
    learn = Noisy(plain.dls, plain.model, loss_func=plain.loss_func, path=plain.path)
    seen = watched(learn)
    fit(learn, 3, cbs=callback(.8, context='local', schedule=flat))
    assert set(seen[1:]) == {wanted(learn.model, .8)}

@pytest.mark.situation
@both
@pytest.mark.parametrize('when', ['before_epoch', 'after_train'])
def test_a_writer_that_comes_in_the_middle(learner, callback, when):
    class Writes(Callback):
        def after_batch(self): noise(self)
    class Brings(Callback):
        def before_epoch(self):
            if when == 'before_epoch' and self.epoch == 1: self.learn.add_cb(Writes())
        def after_train(self):
            if when == 'after_train' and self.epoch == 1: self.learn.add_cb(Callback(before_validate=noise))
    Brings.__module__ = 'fastai.made_up' # one that is trusted
    learn = learner()
    seen = watched(learn)
    fit(learn, 3, cbs=[callback(.8, context='local', schedule=flat), Brings()])
    assert set(seen[1:]) == {wanted(learn.model, .8)}

@pytest.mark.situation
@both
def test_a_step_that_is_put_into_the_learner(learner, callback):
    learn = learner()
    seen,step = watched(learn),learn._do_grad_opt
    def noisy(self):
        step()
        noise(SimpleNamespace(learn=self))
    learn._do_grad_opt = MethodType(noisy, learn)
    fit(learn, 3, cbs=callback(.8, context='local', schedule=flat))
    assert set(seen[1:]) == {wanted(learn.model, .8)}

@pytest.mark.situation
@both
def test_a_validation_after_somebody_wrote(learner, callback):
    class Writes(Callback):
        def after_batch(self):
            if not self.training: return
            noise(self)
            self.learn.validate()
    learn = learner()
    seen = watched(learn)
    fit(learn, 2, cbs=[callback(.8, context='local', schedule=flat), Writes()])
    assert set(seen[1:]) == {wanted(learn.model, .8)}

@pytest.mark.situation
@both
def test_an_epoch_that_is_left_out_beside_validations_at_the_start(learner, callback):
    class Validates(Callback):
        busy = False
        def before_epoch(self):
            if self.busy: return
            self.busy = True
            self.learn.validate()
            self.busy = False
    class Skips(Callback):
        order = -1
        def before_epoch(self):
            if self.epoch == 1: raise CancelEpochException
    learn = learner()
    fit(learn, 4, how='fit', cbs=[callback(.8, context='local', schedule=line), Validates(), Skips()])
    assert sum(zeros(learn.model)) == wanted(learn.model, .8)

@pytest.mark.bad_input
@both
def test_an_error_in_the_second_callback_leaves_the_model_as_it_was(learner, callback):
    learn = learner()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='nosuch'): fit(learn, 1, cbs=[callback(.5, schedule=flat), SparsifyCallback(.5, layers='nosuch')])
    with pytest.raises(ValueError, match='two StraightThrough'): fit(learn, 1, cbs=[StraightThrough(.5, schedule=flat), StraightThrough(.7, layers='0')])
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.situation
@both
@pytest.mark.parametrize('event,kw', [('after_epoch', dict(every_epoch=True)), ('after_fit', dict(at_end=True))])
def test_files_are_pruned_though_somebody_wrote_before(learner, callback, event, kw):
    class Writes(Callback):
        order = 20
        def __call__(self, name):
            if name == event: noise(self)
    learn = learner()
    fit(learn, 2, cbs=[callback(.8, context='local', schedule=flat), Writes(), SaveModelCallback(**kw)])
    files = sorted((learn.path/learn.model_dir).glob('model*.pth'))
    for f in files:
        net = conv_net()
        net.load_state_dict(torch.load(f))
        assert sum(zeros(net)) == wanted(net, .8)
    assert len(files) == (2 if 'every_epoch' in kw else 1)

@pytest.mark.situation
@both
def test_a_small_file_is_pruned_though_somebody_wrote_before(learner, callback):
    class Saves(Callback):
        order = 20
        def after_epoch(self):
            noise(self)
            files.append(self.learn.save_sparse(f'small_{self.epoch}'))
    files,learn,net = [],learner(),conv_net()
    fit(learn, 2, cbs=[callback(.8, context='local', schedule=flat), Saves()])
    for f in files:
        load_sparse(f, net)
        assert sum(zeros(net)) == wanted(net, .8)
    assert len(files) == 2

@pytest.mark.situation
def test_an_older_epoch_that_was_loaded_is_saved_as_it_is(learner):
    class Saves(Callback):
        order = 70
        def after_fit(self): self.learn.save('final', with_opt=False)
    learn,net = learner(),conv_net()
    with pytest.warns(UserWarning, match='loads the best epoch'):
        fit(learn, 4, cbs=[SparsifyCallback(.9, context='local', schedule=line), FirstEpoch(), Saves()])
    net.load_state_dict(torch.load(learn.path/learn.model_dir/'final.pth'))
    assert sum(zeros(net)) < wanted(net, .5) and sum(zeros(net)) == sum(zeros(learn.model))

class FirstEpoch(SaveModelCallback):
    "As if the first epoch had been the best"
    def after_epoch(self):
        if self.epoch == 0: self._save(self.fname)

@pytest.mark.situation
@both
def test_another_network_is_saved_as_it_is(learner, callback):
    teacher = conv_net()
    class Saves(Callback):
        def after_batch(self):
            if not self.training: return
            own,self.learn.model = self.learn.model,teacher
            self.learn.save('teacher', with_opt=False)
            self.learn.model = own
    fit(learner(), 2, cbs=[callback(.8, schedule=flat), Saves()])
    assert sum(zeros(teacher)) == 0

@pytest.mark.situation
def test_a_copy_of_a_learner_saves_its_own_network(learner):
    learn = learner(cbs=SparsifyCallback(.5))
    other = copy.copy(learn)
    other.model = conv_net(16)
    assert len(torch.load(other.save('two', with_opt=False))['0.weight']) == 16
    assert list(inspect.signature(learn.save).parameters) == ['file', 'with_opt', 'pickle_protocol']

@pytest.mark.fault
@both
def test_an_error_after_a_cancelled_fit_does_not_touch_other_weights(learner, callback):
    class Early(Callback):
        def after_epoch(self): raise CancelFitException
    class Broken(Callback):
        def after_fit(self): raise OSError('disk full')
    learn = learner(cbs=callback(.8))
    with pytest.raises(OSError): fit(learn, 4, cbs=[Early(), Broken()])
    net = conv_net()
    learn.model.load_state_dict(net.state_dict())
    learn.remove_cb(callback)
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.fault
@both
def test_a_step_that_is_cancelled_after_its_work(learner, callback):
    seen = []
    class Stop(Callback):
        def before_fit(self):
            real = self.learn.opt.step
            def step(*args, **kwargs):
                real(*args, **kwargs)
                if self.learn.train_iter > 3: raise CancelStepException
            self.learn.opt.step = step
        def after_cancel_step(self): seen.append(sum(zeros(self.learn.model)))
    learn = learner(opt_func=partial(SGD, mom=.9))
    fit(learn, 2, cbs=[callback(.8, context='local', schedule=lambda s, e, p: e*min(1, 2*p)), Stop()])
    assert len(seen) > 5 and seen[-1] == wanted(learn.model, .8)

@pytest.mark.situation
@both
def test_a_validation_before_the_step(learner, callback):
    seen = []
    class Validates(Callback):
        def before_step(self): self.learn.validate()
        def after_batch(self): seen.append(sum(zeros(self.learn.model)))
    learn = learner(opt_func=partial(SGD, mom=.9))
    fit(learn, 2, cbs=[callback(.8, context='local', schedule=flat), Validates()])
    assert len(seen) > 5 and set(seen[1:]) == {wanted(learn.model, .8)}

def test_who_reads_gradients(learner):
    class Clips(Learner):
        def _step(self): super()._step()
    class Listens(Callback):
        def __call__(self, event): super().__call__(event)
    learn = learner()
    learn.create_opt()
    assert not reads_gradients(learn, [Recorder()]) and reads_gradients(learn, [Listens()]) and reads_gradients(learn, [GradientClip()])
    own = Clips(learn.dls, learn.model, loss_func=learn.loss_func)
    own.create_opt()
    assert reads_gradients(own, []) and writes_weights(own, [])

def test_a_weight_that_is_computed_is_told(learner):
    learn = learner()
    Sparsifier(learn.model).sparsify(.5)
    nn.utils.parametrizations.weight_norm(learn.model[3])
    with pytest.warns(UserWarning, match='compute their weight from other parameters, so its zeros are not kept: 3'): fit(learn, 1, cbs=KeepSparsity())

def test_computed_weights_are_looked_at_without_a_trace(learner):
    class Packed(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            del self.weight
        def forward(self, x): return x
    learn = learner()
    net = nn.Sequential(learn.model, Packed(3, 3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    Sparsifier(net[0]).sparsify(.5)
    before = net[2].parametrizations.weight[0]._u.clone()
    tell_computed(net.train())
    assert torch.equal(net[2].parametrizations.weight[0]._u, before)

@pytest.mark.situation
@both
def test_a_weight_that_is_computed_from_the_middle_of_a_fit_on(learner, callback):
    class Changes(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 5: nn.utils.parametrizations.spectral_norm(self.learn.model[3])
    with pytest.raises(ValueError, match='no 3 of the same shape'): fit(learner(), 2, cbs=[callback(.8), Changes()])

def test_two_straight_throughs_on_one_shared_weight(learner):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match='would be pruned by two'): fit(learner(model=net), 1, cbs=[StraightThrough(.5, layers='0'), StraightThrough(.5, layers='2')])
