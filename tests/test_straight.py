"StraightThrough: the network computes with pruned weights, the optimizer moves the dense ones, and nobody else ever sees them"
import copy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException
from fastai.callback.all import FetchPredsCallback, GradientAccumulation, GradientClip, SaveModelCallback
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
@pytest.mark.parametrize('every', [1, 3])
def test_against_a_loop_in_plain_pytorch(learner, soft, every):
    learn = learner(opt_func=partial(SGD, mom=.9))
    net,s = copy.deepcopy(learn.model),.6
    batches = []
    class Keep(Callback):
        order = 100
        def before_batch(self): batches.append((self.iter, self.x.clone(), self.y.clone())) if self.training else None
    fit(learn, 2, .05, how='fit', cbs=[StraightThrough(s, 'local', schedule=flat, every=every, soft=soft), Keep()])

    dense = [l.weight.detach().clone() for l in convs(net)]
    momentum = {}
    for i,x,y in batches:
        if i % every == 0:
            masks = [kept(d, s) for d in dense]
            ts = [d[~m].abs().max() for d,m in zip(dense, masks)]
        for l,d,m,t in zip(convs(net), dense, masks, ts): l.weight.data = soft_threshold(d*m, t) if soft else d*m
        net.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        for l,d in zip(convs(net), dense): l.weight.data = d
        for p in net.parameters():
            momentum[p] = .9*momentum.get(p, 0) + p.grad
            p.data = p.data - .05*momentum[p]
        dense = [l.weight.data for l in convs(net)]
    for d,m,t,got in zip(dense, masks, ts, convs(learn.model)):
        assert torch.equal(got.weight != 0, m) and int(m.sum()) == m.numel() - round(s*m.numel())
        if not soft: torch.testing.assert_close(got.weight.data, d*m, rtol=1e-4, atol=1e-6)
        else: torch.testing.assert_close(got.weight.data, soft_threshold(d*m, t), rtol=1e-3, atol=1e-5)

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

@pytest.mark.fault
@pytest.mark.parametrize('what', [CancelBatchException, CancelEpochException, CancelTrainException, CancelFitException])
@pytest.mark.parametrize('callback', [StraightThrough, SparsifyCallback])
def test_cancelled_in_the_step_everybody_sees_it_pruned(learner, callback, what):
    "From the next event on: an average of weights that is taken there has no weights that are pruned"
    learn = learner()
    class Stop(Callback):
        def before_fit(self):
            real = self.learn.opt.step
            def step(*args, **kwargs):
                real(*args, **kwargs)
                if self.learn.train_iter == 4: raise what()
            self.learn.opt.step = step
    class Look(Callback):
        order = -100
        def __call__(self, event):
            if 'after_cancel' in event or event in ('after_batch', 'before_validate', 'after_fit'): seen[event] = zeros()
    def zeros(): return [int((l.weight == 0).sum()) for l in convs(learn.model)]
    seen,want = {},[round(.75*l.weight.numel()) for l in convs(learn.model)]
    fit(learn, 1, cbs=[callback(.75, context='local', schedule=flat), Stop(), Look()])
    assert len([e for e in seen if 'after_cancel' in e]) == 1 and all(z == want for z in seen.values()), seen

def test_two_of_them(learner):
    learn = learner()
    with pytest.raises(ValueError, match="0 .*would be pruned by two StraightThrough.*remove one"): fit(learn, 1, cbs=[StraightThrough(.5), StraightThrough(.7, layers='0')])
    fit(learn, 2, cbs=[StraightThrough(.5, layers='0'), StraightThrough(.7, exclude='0')])
    first,*rest = convs(learn.model)
    assert int((first.weight == 0).sum()) == round(.5*first.weight.numel())
    assert sum(int((l.weight == 0).sum()) for l in rest) == round(.7*sum(l.weight.numel() for l in rest))

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
    with pytest.raises(error): fit(learn, 2, cbs=StraightThrough(.75, 'local', failing, schedule=flat, every=1))
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
    with pytest.raises(ValueError, match='every got 0'): StraightThrough(.5, every=0)
    with pytest.raises(TypeError, match='granularity'): StraightThrough(.5, granularity='filter')

def test_soft_threshold():
    w = torch.randn(1000).double()
    mask = w.abs() > 1
    t = w[~mask].abs().max()
    got = soft_threshold(w*mask, t)
    assert torch.equal(got != 0, mask) and bool((got.abs() <= w.abs()).all()) and torch.equal(got.sign(), w.sign()*mask)
    torch.testing.assert_close(got[mask].abs()**3, w[mask].abs()**3 - t**3)
    assert torch.equal(soft_threshold(w, 10.).sign(), w.sign()) # what is below the threshold is small, and not zero
    for dtype in (torch.half, torch.bfloat16):
        low = (w*mask).to(dtype)
        assert soft_threshold(low, t).dtype == dtype and torch.equal(soft_threshold(low, t) != 0, low != 0)

@pytest.mark.situation
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'every second'])
@pytest.mark.parametrize('s', [.3, .9])
def test_the_layout_of_the_weights_changes_nothing(learner, layout, s):
    "Few kept weights are softened in another way than many"
    learn,other = learner(),learner()
    for l in convs(other.model):
        if layout == 'channels_last': l.to(memory_format=torch.channels_last)
        elif layout == 'every second':
            wide = torch.zeros(*l.weight.shape[:3], 2*l.weight.shape[3])
            wide[..., ::2] = l.weight.detach()
            l.weight.data = wide[..., ::2]
    for l in (learn, other): fit(l, 1, cbs=StraightThrough(s, 'local', schedule=flat))
    for a,b in zip(convs(learn.model), convs(other.model)): torch.testing.assert_close(a.weight, b.weight, rtol=1e-2, atol=1e-4)

@pytest.mark.parametrize('schedule', [flat, lambda start, end, pos: end*pos])
def test_selections_are_made_every_so_many_batches(learner, schedule, monkeypatch):
    learn,made,real = learner(),[],Sparsifier.update
    monkeypatch.setattr(Sparsifier, 'update', lambda *args, **kwargs: made.append(kwargs.get('anew')) or real(*args, **kwargs))
    fit(learn, 1, cbs=StraightThrough(.9, schedule=schedule, every=4))
    n = len(learn.dls.train)
    assert made.count(True) == (-(-n//4) if schedule is flat else n) # a schedule that moves fast is followed

def and_filters(): return SparsifyCallback(.5, 'filter', exclude='0')
@pytest.mark.situation
@pytest.mark.parametrize('others', [[KeepSparsity], [and_filters], [and_filters, KeepSparsity]], ids=lambda fs: '-'.join(f.__name__ for f in fs))
@pytest.mark.parametrize('first', [True, False], ids=['first', 'last'])
@pytest.mark.parametrize('accumulate', [False, True], ids=['', 'accumulation'])
def test_zeros_of_others_count_in_whatever_order(learner, others, first, accumulate):
    learn = learner(model=conv_net(16))
    Sparsifier(learn.model).sparsify(.5)
    gone = [l.weight == 0 for l in convs(learn.model)]
    mine,theirs = StraightThrough(.9, 'local'),[f() for f in others]
    class Look(Callback):
        "What others have pruned is zero in every forward pass"
        def after_pred(self):
            for l,m in ((l, g.mask) for cb in theirs for g in cb.sparsifier.groups for l in g.layers if g.mask is not None):
                broken.append(int((l.weight != 0).logical_and(~l.over_weight(m)).sum()) if l.blocks.single else int((l.weight.flatten(1)[~m] != 0).sum()))
    broken,more = [],[Look(), *([GradientAccumulation(24)] if accumulate else [])]
    fit(learn, 3, cbs=[mine, *theirs, *more] if first else [*theirs, mine, *more])
    assert len(broken) > 10 and not any(broken)
    zeros = measured_sparsity(learn.model)
    assert zeros.zeros == sum(round(.9*l.weight.numel()) for l in convs(learn.model))
    if KeepSparsity in others: assert all((l.weight[g] == 0).all() for l,g in zip(convs(learn.model), gone))

def test_the_parameters_have_their_own_tensor_outside_the_step(learner):
    learn,seen = learner(),set()
    class Where(Callback):
        def __call__(self, event):
            if self.training and event != 'before_step': seen.add((event, *(l.weight.data_ptr() for l in convs(self.learn.model))))
    before = tuple(l.weight.data_ptr() for l in convs(learn.model))
    fit(learn, 2, cbs=[StraightThrough(.75), Where()])
    assert len(seen) > 5 and {s[1:] for s in seen} == {before}

@pytest.mark.situation
@pytest.mark.parametrize('change', [lambda m: m.to(memory_format=torch.channels_last), lambda m: m.load_state_dict(conv_net().state_dict()),
                                    lambda m: m.to(torch.float64).to(torch.float32)], ids=['layout', 'other weights', 'new tensors'])
def test_the_weights_are_replaced_in_the_middle(learner, change):
    learn = learner()
    class Change(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 7: change(self.learn.model)
    fit(learn, 2, cbs=[StraightThrough(.75), Change(), Watch()])
    zeros = measured_sparsity(learn.model)
    assert zeros.zeros == round(.75*zeros.n)

@pytest.mark.fault
@pytest.mark.parametrize('where', ['before it is put there', 'after it was taken'])
def test_interrupted_between_two_layers(learner, where, monkeypatch):
    "The network is left as it was before the step, or after it: nothing is pruned or softened twice"
    learn = learner(opt_func=partial(SGD, mom=0., wd=0.))
    put,seen = StraightThrough._put_dense,[]
    def stopping(self, layer):
        if self.learn.train_iter == 5 and layer is list(self._shown)[1]:
            if where == 'before it is put there': self._aside[layer] = layer.module.weight.data
            else:
                first = list(self._shown)[0]
                first.module.weight.data = self._aside[first]
            raise KeyboardInterrupt
        put(self, layer)
    class Look(Callback):
        def after_backward(self): seen[:] = [l.weight.detach().clone() for l in convs(self.learn.model)]
    monkeypatch.setattr(StraightThrough, '_put_dense', stopping)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=[StraightThrough(.9, 'local', schedule=flat), Look()])
    for l,w in zip(convs(learn.model), seen): torch.testing.assert_close(l.weight.detach(), w)
    assert [int((l.weight == 0).sum()) for l in convs(learn.model)] == [round(.9*l.weight.numel()) for l in convs(learn.model)]
