"C2 to C16 inside fastai's training loop."
import copy, pickle, warnings
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from PIL import Image
from fastai.basics import Callback, CancelFitException, Recorder, accuracy, load_learner, params, set_seed
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, MixUp, SaveModelCallback
from fastai.optimizer import Adam, Lamb, OptimWrapper, RAdam, RMSProp, SGD, ranger
from fastai.vision.all import ImageDataLoaders, Resize, resnet18, vision_learner
from fasterprune.all import *
from conftest import conv_net, fit, same, state

class Watch(Callback):
    "Look at every forward pass: pruned weights must be zero, pruned weights stay pruned, keys never change"
    order = 70
    def before_fit(self): self.passes,self.keys,self.zeros = 0,list(self.model.state_dict()),None
    def after_pred(self):
        sp = next(cb for cb in self.learn.cbs if isinstance(cb, (SparsifyCallback, KeepSparsity))).sparsifier
        assert list(self.model.state_dict()) == self.keys
        zeros = [l.weight == 0 for l in sp.layers]
        if self.zeros and not sp.regrow: assert all((z | ~old).all() for z,old in zip(zeros, self.zeros)), 'a zero came back'
        if all(g.mask is not None for g in sp.groups):
            self.passes += 1
            for name,mask in sp.masks.items(): assert (sp.model.get_submodule(name).weight[~mask] == 0).all()
            self.zeros = zeros

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9, wd=.1), Adam, partial(Adam, wd=.1, decouple_wd=False), RAdam, ranger, Lamb, RMSProp, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('cbs', [(), (GradientClip(.1),), (GradientAccumulation(20),), (MixUp(),)])
def test_zeros_stay_zero(learner, opt, cbs):
    learn,watch = learner(opt_func=opt),Watch()
    fit(learn, n=2, cbs=[SparsifyCallback(.8, context='local'), watch, *cbs])
    assert watch.passes > 4
    for r in measured_sparsity(learn.model).rows: assert r[3] == round(.8*r[2])

def test_dead_gradients_do_not_count_in_the_norm(learner):
    norms = []
    class Norms(Callback):
        order = GradientClip.order-1
        def before_step(self):
            dead = [p.grad[p == 0].abs().max().item() for p in (self.model[3].weight, self.model[6].weight) if (p == 0).any()]
            norms.extend(dead)
    fit(learner(), cbs=[SparsifyCallback(.8), Norms(), GradientClip(1.)])
    assert norms and max(norms) == 0

def test_sparsity_zero_is_bit_for_bit_the_plain_training(learner):
    a,b = learner(),learner()
    set_seed(5); fit(a)
    set_seed(5); fit(b, cbs=SparsifyCallback(0.))
    assert same(state(a), state(b))

def test_same_seed_same_masks(learner):
    ws = []
    for _ in range(2):
        learn = learner(); set_seed(1); fit(learn, cbs=SparsifyCallback(.9, 'weight', 'global', taylor)); ws.append(state(learn))
    assert same(*ws)

@pytest.mark.parametrize('cbs', [{'attached': True}, {'attached': False}])
def test_looking_changes_nothing(learner, cbs):
    cb = SparsifyCallback(.9)
    learn = learner(cbs=cb if cbs['attached'] else None)
    before,kw = state(learn),{} if cbs['attached'] else {'cbs': cb}
    def look(learn, **kw):
        set_seed(3)
        with learn.no_bar():
            assert len(learn.validate(**kw)) == 2
            learn.get_preds(**kw); learn.summary(); learn.lr_find(num_it=8, show_plot=False)
        return torch.get_rng_state()
    assert torch.equal(look(learn, **kw), look(learner())) # not one random number more or less
    assert same(before, state(learn))
    fit(learn, cbs=None if cbs['attached'] else cb)
    zeros = measured_sparsity(learn.model).zeros
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False); learn.validate(**kw)
    assert measured_sparsity(learn.model).zeros == zeros

class Stop(Callback):
    order = 80
    def __init__(self, event, at, ex): self.event,self.at,self.ex = event,at,ex
    def _maybe(self, event):
        if event == self.event and self.learn.train_iter == self.at: raise self.ex
    def before_batch(self): self._maybe('before_batch')
    def after_pred(self): self._maybe('after_pred')
    def after_backward(self): self._maybe('after_backward')
    def after_step(self): self._maybe('after_step')

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'after_step'])
@pytest.mark.parametrize('how', [('weight', magnitude), ('filter', wanda)])
def test_interrupt_leaves_a_plain_model(learner, event, how):
    learn = learner()
    keys,hooks = list(learn.model.state_dict()),lambda: sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in learn.model.modules())
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[SparsifyCallback(.9, how[0], 'local', how[1]), Stop(event, 5, KeyboardInterrupt)])
    assert list(learn.model.state_dict()) == keys and hooks() == 0
    assert not any('sparsif' in k for k in vars(learn.model))
    pickle.loads(pickle.dumps(learn.model)); copy.deepcopy(learn.model)
    fit(learn, cbs=SparsifyCallback(.9, how[0], 'local', how[1])) # and the next fit works, attached or not
    for r in measured_sparsity(learn.model, granularity=how[0]).rows: assert r[5] == min(round(.9*r[4]), r[4]-1)

def test_interrupted_lr_find_does_not_switch_the_callback_off(learner):
    learn = learner(cbs=SparsifyCallback(.9))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(Stop('after_step', 3, KeyboardInterrupt)): learn.lr_find(show_plot=False)
    if hasattr(learn, 'lr_finder'): learn.remove_cb(learn.lr_finder)
    fit(learn)
    assert float(measured_sparsity(learn.model)) == pytest.approx(.9, abs=.01)

def test_filters_die_whole_and_stay_so_with_keep_sparsity(learner):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.5, 'filter', 'local'))
    def silent():
        learn.model.eval()
        with torch.no_grad(): return [(learn.model[:i](torch.randn(4, 4, 6, 6)).abs().amax((0,2,3)) == 0) for i in (2, 5, 7)]
    before = silent()
    assert [s.sum().item() for s in before] == [4, 8, 8]
    fit(learn, cbs=[KeepSparsity(), Watch()])
    assert all(torch.equal(a, b) for a,b in zip(before, silent()))

def test_frozen_layers_are_not_pruned(learner):
    learn = learner(splitter=lambda m: [params(m[:6]), params(m[6:])])
    learn.freeze()
    with pytest.warns(UserWarning, match='2 of 3 layers to prune are frozen'): fit(learn, cbs=SparsifyCallback(.9))
    assert measured_sparsity(learn.model).layers['0'] == 0 and measured_sparsity(learn.model).layers['6'] == pytest.approx(.9, abs=.01)

def test_fine_tune_prunes_once(learner):
    learn = learner(splitter=lambda m: [params(m[:8]), params(m[8:])])
    seen = []
    class See(Callback):
        order = 80
        def after_step(self): seen.append(float(measured_sparsity(self.model)))
    with pytest.warns(UserWarning, match='3 of 3 layers to prune are frozen'): fit(learn, 3, how='fine_tune', cbs=[SparsifyCallback(.9), See()])
    assert max(seen[:6]) == 0 and seen == sorted(seen) and float(measured_sparsity(learn.model)) == pytest.approx(.9, abs=.005)

@pytest.mark.parametrize('context', ['local', 'global', 'erk'])
def test_resume_is_the_same_as_no_crash(learner, context):
    def order(learn, epoch): # the same data order in both trainings
        class Order(Callback):
            def before_train(self): set_seed(100+self.epoch); self.dls.train.rng.seed(self.epoch)
        return Order()
    a = learner(); fit(a, 4, cbs=[SparsifyCallback(.9, 'weight', context), SaveModelCallback(every_epoch=True, with_opt=True), order(a, 0)])
    b = learner(); fit(b, 0); b.load('model_1', with_opt=True)
    fit(b, 4, cbs=[SparsifyCallback(.9, 'weight', context), order(b, 2)], start_epoch=2)
    assert same(state(a), state(b))

def test_the_table_shows_what_was_counted(learner, capsys):
    learn = learner()
    with learn.no_bar(): learn.fit_one_cycle(2, cbs=[SparsifyCallback(.9, 'filter', 'local'), CSVLogger()])
    log = pd.read_csv(learn.path/'history.csv')
    assert list(log.columns) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'sparsity', 'time']
    assert log.sparsity.iloc[-1] == pytest.approx(float(measured_sparsity(learn.model)))
    assert len(learn.recorder.values[-1]) == 4
    learn.recorder.plot_sparsity()

def test_stopping_early_is_told(learner):
    class Never(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch == 0: raise CancelFitException
    with pytest.warns(UserWarning, match='stopped early, at a sparsity of .* instead of 90.00%'): fit(learner(), 4, cbs=[SparsifyCallback(.9), Never()])

def test_reloading_a_denser_epoch_is_told(learner):
    learn = learner()
    class Worse(Callback):
        order = Recorder.order+2
        def after_validate(self): self.recorder.log[2] = float(self.epoch) # the first epoch is the best
    with pytest.warns(UserWarning, match='SaveModelCallback loads the best epoch, whose sparsity is'):
        fit(learn, 4, cbs=[SparsifyCallback(.9), Worse(), SaveModelCallback()])
    assert float(measured_sparsity(learn.model)) < .85

def test_vision_learner_with_image_files(tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(8): Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.25, seed=0, item_tfms=Resize(32), bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, cbs=SparsifyCallback(0.9, context='local'))
    for r in measured_sparsity(learn.model).rows: assert r[3] == round(.9*r[2])
    learn.add_cb(SparsifyCallback(0.9, context='local'))
    learn.export()
    again = load_learner(tmp_path/'export.pkl')
    assert measured_sparsity(again.model).zeros == measured_sparsity(learn.model).zeros
    with again.no_bar(): again.predict(tmp_path/'a'/'0.png')
    with learn.no_bar(): learn.predict(tmp_path/'a'/'0.png'); learn.show_results()

def test_zero_initialised_layers_are_not_taken_as_pruned(learner):
    net = conv_net(); nn.init.zeros_(net[6].weight); nn.init.constant_(net[6].bias, .1) # its ReLU lets the gradient through
    learn = learner(model=net)
    fit(learn, cbs=SparsifyCallback(.5, context='local'))
    assert measured_sparsity(learn.model).layers['6'] == pytest.approx(.5, abs=.01)

def test_more_zeros_than_asked_is_told(learner):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.9))
    with pytest.warns(UserWarning, match='already has .* zeros, more than'): fit(learn, cbs=SparsifyCallback(.5))
    assert float(measured_sparsity(learn.model)) == pytest.approx(.9, abs=.005)

def test_without_a_recorder(learner):
    learn = learner(); learn.remove_cb(Recorder)
    cb = SparsifyCallback(.8)
    with learn.no_bar(): learn.fit(2, cbs=cb)
    assert float(measured_sparsity(learn.model)) == pytest.approx(.8, abs=.005) and cb.sparsity_measured[-1][1] == pytest.approx(.8, abs=.005)

def test_the_norm_of_the_gradients_leaves_out_dead_filters_with_all_that_is_theirs(learner):
    seen = []
    class Look(Callback):
        order = GradientClip.order-1
        def before_step(self):
            for conv,bn in ((self.model[0], self.model[1]), (self.model[3], self.model[4])):
                dead = (conv.weight == 0).flatten(1).all(1)
                if dead.any(): seen.extend([bn.weight.grad[dead].abs().max().item(), bn.bias.grad[dead].abs().max().item(), conv.weight.grad[dead].abs().max().item()])
    fit(learner(), cbs=[SparsifyCallback(.5, 'filter'), Look(), GradientClip(1.)])
    assert seen and max(seen) == 0
def test_it_prunes_before_the_forward_pass_and_exactly_before_the_last_validation(learner):
    seen = {}
    class See(Callback):
        order = 80
        def after_pred(self):
            if self.training: seen.setdefault('first forward', float(measured_sparsity(self.model)))
            elif self.epoch == 1: seen.setdefault('last validation', measured_sparsity(self.model).zeros)
        def before_step(self): seen['pct'] = self.pct_train
    learn = learner()
    fit(learn, cbs=[SparsifyCallback(.8, schedule=sched_oneshot), See()])
    assert seen['first forward'] == pytest.approx(.8, abs=.005)
    learn = learner(); seen.clear()
    fit(learn, cbs=[SparsifyCallback(.8, schedule=sched_agp, end_epoch=None), See()])
    assert seen['first forward'] == 0 and seen['pct'] < 1 # the schedule ends after the last step, and yet
    assert seen['last validation'] == measured_sparsity(learn.model).zeros == sum(round(.8*r[2]) for r in measured_sparsity(learn.model).rows)

def test_what_is_kept_is_one_byte_a_weight_at_most():
    for criteria,copies in ((magnitude, 0), (random_score, 0), (wanda, 0), (movement, 1), (updating_movement, 1), (taylor, 1)):
        m = conv_net()
        m(torch.randn(2, 4, 6, 6)).sum().backward()
        sp = Sparsifier(m, criteria=criteria, sample=torch.randn(2, 4, 6, 6)); sp.record_grad(); sp.update(.5, torch.randn(2, 4, 6, 6))
        for g in sp.groups: assert g.mask.nbytes == g.weight.numel()
        for l in sp.layers:
            assert sum(t.nbytes for t in l.state.values()) == copies*l.weight.nbytes
    for name in ('kernel', 'filter'):
        sp = Sparsifier(conv_net(), name); sp.update(.5)
        assert all(g.mask.nbytes == g.n for g in sp.groups) # one byte a block
def test_fine_tune_with_a_later_start(learner):
    learn = learner(splitter=lambda m: [params(m[:8]), params(m[8:])])
    with pytest.warns(UserWarning, match='are frozen'): fit(learn, 3, how='fine_tune', cbs=SparsifyCallback(.9, start_epoch=1)) # one frozen epoch: no room, and no need, for the schedule
    assert float(measured_sparsity(learn.model)) == pytest.approx(.9, abs=.005)

def slow_layers(learn, *args, how='fit_one_cycle', cbs=None, **kwargs):
    "What is told of layers that learn more slowly than the head"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); fit(learn, 2, *args, how=how, cbs=cbs or SparsifyCallback(.9), **kwargs)
    return [str(w.message) for w in told if 'more slowly' in str(w.message)]

def test_pruning_layers_that_hardly_learn_is_told(learner):
    "At the rates of `fine_tune`, once; not at one rate for all, nor where nothing is left to prune"
    halves = partial(learner, splitter=lambda m: [params(m[:8]), params(m[8:])])
    learn = halves()
    said, = slow_layers(learn, how='fine_tune')
    assert said.startswith('3 layers to prune learn up to 100 times more slowly than the head') and 'lr_mult' in said
    assert slow_layers(learn, how='fine_tune') == [] # its zeros are all there already
    assert slow_layers(halves(), how='fine_tune', lr_mult=4) == slow_layers(halves()) == []

@pytest.mark.parametrize('how', [('weight', wanda), ('filter', magnitude)])
def test_looking_at_a_sample_inside_autocast_leaves_nothing_in_its_cache(learner, how):
    "autocast keeps casts of the weights: made without gradients or before the pruning, they would be used in the forward pass that follows"
    from test_lifecycle import CpuBf16
    seen = []
    class See(Callback):
        order = 80
        def after_pred(self):
            if not self.training or seen: return
            torch.clear_autocast_cache()
            with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16): seen.append((self.pred - self.model(*self.xb)).abs().max().item())
        def before_step(self): assert all(p.grad is not None for p in self.model.parameters())
    fit(learner(), 1, cbs=[CpuBf16(), SparsifyCallback(.8, how[0], 'local', how[1], sched_oneshot), See()])
    assert seen[0] == 0 # the forward pass saw the pruned weights
