"""Every way to train × every companion × every optimizer × every context: exact sparsity, zeros in every forward pass, nothing left behind.

The default run takes a selection in which every pair of values meets; FASTERPRUNE_FULL=1 runs the whole product."""
import itertools, os, warnings
from contextlib import nullcontext
from functools import partial
import pytest, torch
from fastai.basics import Callback, params
from fastai.callback.all import CSVLogger, CutMix, EarlyStoppingCallback, FetchPredsCallback, GradientAccumulation, GradientClip, MixUp, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.optimizer import Adam, Lamb, OptimWrapper, SGD, ranger
from fasterprune.all import *
from conftest import make_learner
from test_callback import Watch

target = .8

# ways to train: what to call with the callbacks
def one_cycle(l, cbs): l.fit_one_cycle(3, 1e-2, cbs=cbs())
def plain_fit(l, cbs): l.fit(3, 1e-2, cbs=cbs())
def flat_cos(l, cbs): l.fit_flat_cos(3, 1e-2, cbs=cbs())
def sgdr(l, cbs): l.fit_sgdr(2, 1, 1e-2, cbs=cbs())
def fine_tune(l, cbs): l.fine_tune(3, 1e-2, cbs=cbs())
def two_fits(l, cbs): l.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(.4)); l.fit_one_cycle(3, 1e-2, cbs=cbs())
def resume(l, cbs):
    l.fit_one_cycle(1, 1e-2, cbs=SparsifyCallback(.2)); l.save('crashed'); l.load('crashed')
    l.fit_one_cycle(3, 1e-2, cbs=cbs(), start_epoch=1)
def frozen_groups(l, cbs): l.freeze_to(1); l.fit_one_cycle(3, slice(1e-4, 1e-2), cbs=cbs())
ways = dict(fit=plain_fit, fit_one_cycle=one_cycle, fit_flat_cos=flat_cos, fit_sgdr=sgdr, fine_tune=fine_tune, two_fits=two_fits, resume_with_start_epoch=resume, frozen_groups_and_discriminative_rates=frozen_groups)

# companions
class CpuBf16(Callback):
    "bfloat16 autocast on the CPU; fastai's own MixedPrecision is for CUDA"
    order = MixedPrecision.order
    def before_batch(self): self.ctx = torch.autocast('cpu', dtype=torch.bfloat16); self.ctx.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.ctx.__exit__(None, None, None)

class SkippingScaler:
    "A GradScaler that finds an overflow at every third step"
    def __init__(self): self.n = 0
    def scale(self, loss): return loss*1024
    def step(self, opt):
        self.n += 1
        for g in opt.param_groups:
            for p in g['params']:
                if p.grad is not None: p.grad.mul_(float('inf') if self.n % 3 == 0 else 1/1024)
        if self.n % 3: opt.step()
    def update(self): pass
    def get_scale(self): return 1024.

class Fp16WithSkippedSteps(MixedPrecision):
    "fastai's mixed precision with a fake scaler, on the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = nullcontext(),SkippingScaler(),[]
    def before_batch(self): pass
    def after_loss(self): pass

companions = dict(plain=lambda: [], accumulation_last_batch_not_stepping=lambda: [GradientAccumulation(28)], clip=lambda: [GradientClip(.1)], bf16=lambda: [CpuBf16()], fp16_skipped_steps=lambda: [Fp16WithSkippedSteps()],
    mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()], early_stopping=lambda: [EarlyStoppingCallback(min_delta=100., patience=1)], save_best=lambda: [SaveModelCallback()], save_every_epoch=lambda: [SaveModelCallback(every_epoch=True, with_opt=True)],
    reduce_lr_on_plateau=lambda: [ReduceLROnPlateau(patience=1)], csv_logger=lambda: [CSVLogger()], channels_last=lambda: [ChannelsLast()])
optimizers = dict(sgd=partial(SGD, mom=.9, wd=.01), adam=Adam, ranger=ranger, lamb=Lamb, adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
contexts_tried = {'local': lambda: SparsifyCallback(target, context='local'), 'global': lambda: SparsifyCallback(target, context='global'), 'straight': lambda: StraightThrough(target, 'global')}
axes = (ways, companions, optimizers, contexts_tried)

def pairwise(axes):
    "A short list of combinations in which each pair of values of two axes occurs; greedy, always the same"
    need = {((i, a), (j, b)) for (i, x),(j, y) in itertools.combinations(enumerate(axes), 2) for a in x for b in y}
    res,everything = [],list(itertools.product(*axes))
    pairs = {c: {((i, c[i]), (j, c[j])) for i,j in itertools.combinations(range(len(c)), 2)} for c in everything}
    while need:
        best = max(everything, key=lambda c: len(pairs[c] & need))
        res.append(best); need -= pairs[best]
    return res

everything = list(itertools.product(*axes))
selection = everything if os.environ.get('FASTERPRUNE_FULL') else pairwise(axes)

def test_the_selection_has_every_pair():
    for (i, x),(j, y) in itertools.combinations(enumerate(axes), 2):
        assert {(c[i], c[j]) for c in selection} == set(itertools.product(x, y))

@pytest.mark.situation
@pytest.mark.parametrize('way,companion,opt,context', selection, ids=['-'.join(c) for c in selection])
def test_lifecycle(tmp_path, way, companion, opt, context):
    learn = make_learner(opt_func=optimizers[opt], path=tmp_path, splitter=lambda m: [params(m[:3]), params(m[3:8]), params(m[8:])])
    if way == 'resume_with_start_epoch' and companion in ('early_stopping', 'save_best', 'reduce_lr_on_plateau'):
        # fastai's own trackers cannot skip epochs, with or without pruning
        with pytest.raises(IndexError), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, cbs=companions[companion](), start_epoch=1)
        pytest.skip("fastai's own trackers cannot skip epochs")
    model,keys,cbs,metrics = learn.model,list(learn.model.state_dict()),[type(c) for c in learn.cbs],list(learn.metrics)
    with warnings.catch_warnings(record=True) as told, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        ways[way](learn, lambda: [contexts_tried[context](), Watch(), *companions[companion]()])
    told = ' '.join(str(w.message) for w in told)
    got = measured_sparsity(model)
    frozen = [n for n,m in find_layers(model).items() if not m.weight.requires_grad]
    n,zeros = sum(r[2] for r in got.rows if r[0] not in frozen), sum(r[3] for r in got.rows if r[0] not in frozen)
    exact = sum(round(target*r[2]) for r in got.rows if r[0] not in frozen) if context == 'local' else round(target*n)
    # the sparsity is exact; where a companion ends the training early or brings an older epoch back, it is that moment's, and it is said
    if companion == 'early_stopping' and zeros != exact: assert 'stopped early' in told and float(got) == pytest.approx(learn.recorder.sparsity_measured[-1][1])
    elif companion == 'save_best' and zeros != exact:
        assert 'loads the best epoch' in told
        assert any(float(got) == pytest.approx(v[list(learn.recorder.metric_names)[1:].index('sparsity')]) for v in learn.recorder.values if len(v) > 2)
    else: assert zeros == exact
    if way == 'frozen_groups_and_discriminative_rates': assert frozen and got.layers['0'] == 0
    # nothing is left behind
    assert list(model.state_dict()) == keys and [type(c) for c in learn.cbs] == cbs and list(learn.metrics) == metrics
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not hasattr(learn, 'sparsify')

# companions that write to weights, fetch predictions or validate inside, with every way to share the sparsity out

class Writes(Callback):
    "An average is swapped in for validation, and noise is added to all weights after each batch"
    order = 70
    def before_fit(self): self.mean = None
    def after_batch(self):
        if not self.training: return
        now = [p.detach().add_(.001) for p in self.model.parameters()]
        self.mean = [p.clone() for p in now] if self.mean is None else [.9*a + .1*b for a,b in zip(self.mean, now)]
    def before_validate(self): self._swap()
    def after_validate(self): self._swap()
    def _swap(self):
        if self.mean is None: return
        now = [p.detach().clone() for p in self.model.parameters()]
        for p,a in zip(self.model.parameters(), self.mean): p.data.copy_(a)
        self.mean = now

class Validates(Callback):
    busy = False
    def after_train(self): self._look()
    def after_batch(self):
        if self.training and self.learn.iter == 2: self._look()
    def _look(self):
        if self.busy: return
        self.busy = True
        self.learn.validate()
        self.busy = False

intruders = dict(writes_weights=Writes, fetches_predictions=FetchPredsCallback, validates_inside=Validates)
kinds_of_sharing = dict(local=dict(context='local'), lamp=dict(context='lamp'), erk=dict(context='erk'), filters=dict(context='local', granularity='filter'),
                        filters_global=dict(context='global', granularity='filter'), coupled_filters=dict(context='local', granularity='filter', coupled=True))
intruded = [c for c in itertools.product(ways, intruders, kinds_of_sharing)]
if not os.environ.get('FASTERPRUNE_FULL'): intruded = pairwise((ways, intruders, kinds_of_sharing))

@pytest.mark.situation
@pytest.mark.parametrize('way,intruder,how', intruded, ids=['-'.join(c) for c in intruded])
def test_lifecycle_with_intruders(tmp_path, way, intruder, how):
    learn = make_learner(opt_func=optimizers['sgd'], path=tmp_path, splitter=lambda m: [params(m[:3]), params(m[3:8]), params(m[8:])])
    how = dict(granularity='weight', coupled=False) | kinds_of_sharing[how]
    anew = how['granularity'] == 'filter' and way in ('two_fits', 'resume_with_start_epoch') # single weights of the fit before come back
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('ignore')
        ways[way](learn, lambda: [SparsifyCallback(.6, **how), intruders[intruder](), *([] if anew else [Watch()])])
    rows = [r for r in measured_sparsity(learn.model, granularity=how['granularity']).rows if learn.model.get_submodule(r[0]).weight.requires_grad]
    n,zero = [r[4] for r in rows],[r[5] for r in rows]
    if how['context'] == 'local': assert zero == [round(.6*k) for k in n]
    else: assert sum(zero) == round(.6*sum(n))
    # fastai itself writes the numbers of a validation inside an epoch into the row of the epoch
    if intruder != 'validates_inside': assert all(len(row) == len(learn.recorder.metric_names)-2 for row in learn.recorder.values if row)

@pytest.mark.parametrize('companion', ['plain', 'accumulation_last_batch_not_stepping', 'clip', 'bf16', 'fp16_skipped_steps', 'mixup', 'early_stopping', 'channels_last'])
@pytest.mark.parametrize('granularity,criteria,tied', [('filter', magnitude, False), ('weight', wanda, False), ('filter', wanda, True), ('filter', taylor, True), ('kernel', taylor, False), ('weight', movement, False)])
def test_other_blocks_and_criteria(tmp_path, companion, granularity, criteria, tied):
    "The companions that change a step must get on with samples looked at, gradients recorded and BatchNorms pruned along"
    learn = make_learner(opt_func=partial(SGD, mom=.9, wd=.01), path=tmp_path)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('ignore')
        learn.fit_one_cycle(3, 1e-2, cbs=[SparsifyCallback(.6, granularity, 'global', criteria, coupled=tied), Watch(), *companions[companion]()])
    rows = measured_sparsity(learn.model, granularity=granularity).rows
    n,dead = sum(r[4] for r in rows), sum(r[5] for r in rows)
    if companion == 'early_stopping': assert dead/n in [pytest.approx(v) for _,v in learn.recorder.sparsity_measured]
    else: assert dead == round(.6*n)

def test_the_page_is_about_these_tests():
    "The page of situations names every value of every axis, and how many combinations there are"
    import json, re
    from pathlib import Path
    page = ''.join(''.join(c['source']) for c in json.loads((Path(__file__).parent.parent/'nbs/tutorials/situations.ipynb').read_text())['cells'] if c['cell_type'] == 'markdown')
    rows = re.findall(r'^\| `(\w+)` \|', page, re.M)
    assert sorted(rows) == sorted([*ways, *companions, *optimizers, *contexts_tried])
    impossible = sum(c[0] == 'resume_with_start_epoch' and c[1] in ('early_stopping', 'save_best', 'reduce_lr_on_plateau') for c in everything)
    assert f'{len(everything):,} combinations' in page and f'{len(everything)-impossible:,} of them pass' in page and f'{impossible} are not possible' in page
    assert f'{len(pairwise(axes))} combinations in which every pair' in page
