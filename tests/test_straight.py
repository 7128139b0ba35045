"StraightThrough: the network computes with pruned weights, the optimizer moves the dense ones, and nobody else ever sees them"
import copy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.callback.all import FetchPredsCallback, GradientClip, SaveModelCallback
from fastai.optimizer import SGD
from fasterprune.all import *
from fasterprune.straight import soft_threshold
from conftest import conv_net, fit
from test_callback import Watch
from test_intruders import Noise

convs = lambda m: [l for l in m.modules() if isinstance(l, nn.Conv2d)]
def sparsity(m): return float(measured_sparsity(m))

class Seen(Callback):
    "What is in the network at each event of a training"
    run_valid = True
    def before_fit(self): self.at = {}
    def look(self, event): self.at.setdefault(event, []).append(sparsity(self.learn.model))
    def before_batch(self): self.look('before_batch')
    def after_pred(self): self.look('after_pred')
    def after_backward(self): self.look('after_backward')
    def before_step(self): self.look('before_step')
    def after_step(self): self.look('after_step')
    def after_batch(self): self.look('after_batch')
    def before_validate(self): self.look('before_validate')

flat = lambda start, end, pos: end

def kept(dense, s):
    "Where the largest are, by a sort"
    mask = torch.ones(dense.numel(), dtype=torch.bool)
    mask[dense.abs().flatten().sort(stable=True).indices[:round(s*dense.numel())]] = False
    return mask.view_as(dense)

@pytest.mark.parametrize('soft', [True, False])
def test_against_a_loop_in_plain_pytorch(learner, soft):
    learn = learner(opt_func=partial(SGD, mom=.9))
    net,s = copy.deepcopy(learn.model),.6
    batches = []
    class Keep(Callback):
        order = 100
        def before_batch(self): batches.append((self.x.clone(), self.y.clone())) if self.training else None
    fit(learn, 2, .05, how='fit', cbs=[StraightThrough(s, 'local', schedule=flat, soft=soft), Keep()])

    dense = [l.weight.detach().clone() for l in convs(net)]
    momentum = {}
    for x,y in batches:
        for l,d in zip(convs(net), dense): l.weight.data = soft_threshold(d*kept(d, s), d) if soft else d*kept(d, s)
        net.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        for l,d in zip(convs(net), dense): l.weight.data = d
        for p in net.parameters():
            momentum[p] = .9*momentum.get(p, 0) + p.grad
            p.data = p.data - .05*momentum[p]
        dense = [l.weight.data for l in convs(net)]
    for l,d,got in zip(convs(net), dense, convs(learn.model)):
        m = got.weight != 0
        assert int(m.sum()) == m.numel() - round(s*m.numel())
        last = torch.where(m, d, 0.) # the masks are those of the last batch
        if not soft: torch.testing.assert_close(got.weight.data, last, rtol=1e-4, atol=1e-6)
        else: torch.testing.assert_close(got.weight.data, soft_threshold(last, d), rtol=1e-3, atol=1e-5)

def test_what_everybody_sees_is_pruned(learner):
    learn,seen = learner(),Seen()
    fit(learn, 2, cbs=[StraightThrough(.75, 'local', schedule=flat), seen])
    want = sum(round(.75*l.weight.numel()) for l in convs(learn.model))/sum(l.weight.numel() for l in convs(learn.model))
    for event,found in seen.at.items(): assert found[2:] == [pytest.approx(want)]*len(found[2:]), event # before the first batch the network is dense

def test_the_step_moves_pruned_weights_too(learner):
    learn,moved = learner(opt_func=partial(SGD, mom=0., wd=0.)),[]
    class InStep(Callback):
        def before_fit(self):
            step = self.learn.opt.step
            def watched(*args, **kwargs):
                w = self.learn.model[0].weight
                moved.append((sparsity(self.learn.model), int((w.grad != 0).sum())))
                return step(*args, **kwargs)
            self.learn.opt.step = watched
    fit(learn, 1, cbs=[StraightThrough(.9, 'local', schedule=flat), InStep()])
    assert all(s == 0 for s,_ in moved) and all(n > .5*learn.model[0].weight.numel() for _,n in moved)

@pytest.mark.fault
@pytest.mark.parametrize('where', ['before_batch', 'after_pred', 'after_backward', 'before_step', 'step', 'after_step', 'after_batch', 'before_validate'])
@pytest.mark.parametrize('what', [KeyboardInterrupt, CancelFitException, CancelBatchException, CancelStepException])
def test_stopped_anywhere_it_is_pruned(learner, where, what):
    if what is CancelStepException and where not in ('before_step', 'step') or what is CancelBatchException and where in ('before_validate', 'after_batch'):
        pytest.skip('fastai does not catch this here')
    learn = learner()
    class Stop(Callback):
        order = 90
        def before_fit(self):
            real = self.learn.opt.step
            def step(*args, **kwargs):
                if where == 'step' and self.learn.train_iter == 4: raise what()
                return real(*args, **kwargs)
            self.learn.opt.step = step
        def __call__(self, event):
            if event == where and self.learn.train_iter == 4 and (self.training or event == 'before_validate'): raise what()
            return super().__call__(event)
    try: fit(learn, 1 if where != 'before_validate' else 2, cbs=[StraightThrough(.75, 'local', schedule=flat), Stop(), Watch()])
    except KeyboardInterrupt: pass
    assert [int((l.weight == 0).sum()) for l in convs(learn.model)] == [round(.75*l.weight.numel()) for l in convs(learn.model)]

@pytest.mark.situation
@pytest.mark.parametrize('event,hidden,order', [(e, h, o) for e,h in [('before_batch', False), ('after_step', True), ('after_batch', True), ('before_epoch', False), ('before_validate', False), ('after_fit', False)] for o in (-50, 45, 70)])
def test_others_write(learner, event, hidden, order):
    learn = learner()
    fit(learn, 2, cbs=[StraightThrough(.5, 'global'), Noise(event, order, hidden), Watch()])
    assert measured_sparsity(learn.model).zeros == round(.5*measured_sparsity(learn.model).n)

@pytest.mark.situation
def test_saved_epochs_and_predictions_inside(learner, tmp_path):
    learn = learner()
    fit(learn, 3, cbs=[StraightThrough(.8, 'global', schedule=flat), SaveModelCallback(every_epoch=True), FetchPredsCallback(), Watch()])
    for i in range(3):
        net = conv_net()
        net.load_state_dict(torch.load(learn.path/learn.model_dir/f'model_{i}.pth'))
        assert sparsity(net) == pytest.approx(.8, abs=.002)

@pytest.mark.situation
def test_a_second_fit_and_frozen_layers(learner):
    learn = learner()
    fit(learn, 2, cbs=StraightThrough(.5))
    cb = StraightThrough(.8, exclude='0')
    first = learn.model[0].weight.detach().clone()
    learn.model[3].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match='frozen'): fit(learn, 2, cbs=cb)
    zeros = measured_sparsity(learn.model)
    assert zeros.layers['6'] == pytest.approx(.8, abs=.01) and not torch.equal(first, learn.model[0].weight)
    assert cb._dense is None # the copy is gone

@pytest.mark.fault
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_criterion_that_fails_in_the_middle(learner, error):
    learn,calls = learner(),[]
    def failing(weight):
        calls.append(1)
        if len(calls) > 20: raise error('no more')
        return weight.abs()
    with pytest.raises(error): fit(learn, 2, cbs=StraightThrough(.75, 'local', failing, schedule=flat))
    assert [int((l.weight == 0).sum()) for l in convs(learn.model)] == [round(.75*l.weight.numel()) for l in convs(learn.model)]

def test_the_weights_are_copied_once(learner, monkeypatch):
    learn,copied,real = learner(),[],torch.Tensor.clone
    weights = {l.weight.untyped_storage().data_ptr() for l in convs(learn.model)}
    def clone(t, *args, **kwargs):
        if t.untyped_storage().data_ptr() in weights: copied.append(t)
        return real(t, *args, **kwargs)
    monkeypatch.setattr(torch.Tensor, 'clone', clone)
    fit(learn, 2, cbs=StraightThrough(.75))
    assert len(copied) == len(weights)

def test_criteria_that_look_at_gradients(learner):
    learn = learner()
    fit(learn, 2, cbs=[StraightThrough(.7, 'global', taylor), GradientClip(.1), Watch()])
    assert measured_sparsity(learn.model).zeros == round(.7*measured_sparsity(learn.model).n)

@pytest.mark.bad_input
def test_errors():
    with pytest.raises(ValueError, match='sparsity'): StraightThrough(1.5)
    with pytest.raises(ValueError, match='context'): StraightThrough(.5, 'lamb')
    with pytest.raises(TypeError, match='granularity'): StraightThrough(.5, granularity='filter')

def test_soft_threshold():
    w = torch.randn(1000).double()
    mask = w.abs() > 1
    got = soft_threshold(w*mask, w)
    assert torch.equal(got != 0, mask) and bool((got.abs() <= w.abs()).all()) and torch.equal(got.sign(), w.sign()*mask)
    t = w[~mask].abs().max()
    torch.testing.assert_close(got[mask].abs()**3, w[mask].abs()**3 - t**3)
    for dtype in (torch.half, torch.bfloat16):
        w_ = w.to(dtype)
        mask = w_.abs() > 1
        low = soft_threshold(w_*mask, w_)
        assert low.dtype == dtype and torch.equal(low != 0, mask)
