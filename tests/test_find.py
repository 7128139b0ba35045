"sparsity_find: what it measures, that it leaves no trace, what it suggests; loggers."
import copy, pickle, random, sys, types
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, Recorder, accuracy, error_rate
from fastai.callback.all import CSVLogger, MixedPrecision, SaveModelCallback
from fasterprune.all import *
from conftest import conv_net, fit, make_learner, same, shown, state

def trace(learn):
    "All that must be as before"
    d = lambda o: {k: copy.copy(v) for k,v in vars(o).items() if isinstance(v, (int, float, str, list, type(None)))}
    rng = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist(),[dl.rng.getstate() for dl in learn.dls.loaders]
    return state(learn),pickle.dumps(learn.opt.state_dict()) if learn.opt else None,[m.training for m in learn.model.modules()],[p.requires_grad for p in learn.model.parameters()], \
           {k: id(v) for k,v in vars(learn).items()},[(cb, d(cb)) for cb in learn.cbs],[d(m) for m in learn.metrics],rng

def unchanged(a, b): return same(a[0], b[0]) and a[1:] == b[1:]

@pytest.fixture
def trained(learner):
    def make(**kw):
        learn = learner(**kw)
        fit(learn, 3)
        return learn
    return make

@pytest.mark.situation
@pytest.mark.parametrize('kw', [{}, dict(by_layer=True), dict(granularity='filter', context='global', criteria=taylor), dict(criteria=wanda, n_batches=2), dict(granularity='2:4', exclude='0')], ids=shown)
def test_nothing_changes(trained, kw):
    learn = trained()
    before = trace(learn)
    learn.sparsity_find((.25, .5), show_plot=False, **kw)
    assert unchanged(before, trace(learn))
    learn.sparsity_report(latency=1)
    assert unchanged(before, trace(learn))

class Boom(Callback):
    "Raises at the n-th event of a kind; counts where nobody looks, for its own attributes are put back after each rung"
    order = 20
    def __init__(self, event, n, ex): self.event,self.n,self.ex = event,n,ex; Boom.seen = 0
    def _at(self, event):
        Boom.seen += event == self.event
        if event == self.event and Boom.seen == self.n: raise self.ex
    def before_validate(self): self._at('before_validate')
    def before_batch(self): self._at('before_batch')
    def after_pred(self): self._at('after_pred')
    def after_validate(self): self._at('after_validate')

@pytest.mark.fault
@pytest.mark.parametrize('event,n,rungs', [('before_validate', 3, 2), ('before_batch', 8, 1), ('after_pred', 8, 1), ('after_validate', 2, 1)])
def test_ctrl_c_gives_what_was_measured(trained, event, n, rungs):
    learn = trained()
    learn.add_cb(Boom(event, n, KeyboardInterrupt)); before = trace(learn)
    found = learn.sparsity_find((.25, .5, .75), show_plot=False)
    assert len(found.rows) == rungs and f'stopped after {rungs} of 4 rungs' in repr(found) and found.within in found.sparsities
    assert unchanged(before, trace(learn))

@pytest.mark.fault
def test_an_error_changes_nothing_either(trained):
    learn = trained()
    learn.add_cb(Boom('after_pred', 9, RuntimeError('boom'))); before = trace(learn)
    with pytest.raises(RuntimeError, match='boom'): learn.sparsity_find((.25, .5), show_plot=False)
    assert unchanged(before, trace(learn))
    learn.remove_cb(Boom); fit(learn, 1) # and the Learner works
    with pytest.raises(KeyboardInterrupt):
        with learn.added_cbs(Boom('before_validate', 1, KeyboardInterrupt)): learn.sparsity_find(show_plot=False) # nothing was measured yet

def test_the_rungs_are_what_pruning_by_hand_gives(trained):
    learn = trained(bs=16)
    found = learn.sparsity_find((.3, .6), context='global', show_plot=False)
    for s,m,loss,acc in found.rows:
        model = copy.deepcopy(learn.model)
        sp = Sparsifier(model, context='global')
        if s: sp.sparsify(s)
        by_hand = Learner(learn.dls, model, loss_func=learn.loss_func, metrics=accuracy)
        with by_hand.no_bar(): assert list(by_hand.validate()) == pytest.approx([loss, acc])
        assert m == float(sp.measure())

def test_the_first_batches_only(trained):
    learn = trained(bs=16)
    found = learn.sparsity_find((.5,), n_batches=1, show_plot=False)
    x,y = learn.dls.valid.one_batch()
    learn.model.eval()
    with torch.no_grad(): assert found.metrics[0] == pytest.approx((learn.model(x).argmax(1) == y).float().mean().item())

def test_callbacks_that_write_keep_still(trained, tmp_path):
    learn = trained(cbs=[CSVLogger(), SaveModelCallback(), SparsifyCallback(.5)])
    files = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    learn.sparsity_find((.9,), show_plot=False)
    assert files and {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == files

def test_no_recorder_no_metrics_no_progress(trained):
    learn = trained()
    learn.metrics = []
    found = learn.sparsity_find((.5,), show_plot=True)
    assert (found.metric, found.bigger, found.names) == ('valid_loss', False, ['valid_loss']); plt.close('all')
    learn.metrics = [error_rate, accuracy]; assert not learn.sparsity_find((.5,), show_plot=False).bigger
    assert learn.sparsity_find((.5,), metric='accuracy', show_plot=False).bigger
    learn.remove_cb(Recorder); found = learn.sparsity_find((.5,), show_plot=False)
    assert len(found.rows) == 2 and not hasattr(learn, 'recorder')

def test_a_data_parallel_and_a_half_pruned_model(trained):
    learn = trained()
    learn.model = nn.DataParallel(learn.model)
    assert set(learn.sparsity_find((.5,), by_layer=True, show_plot=False).spread(.5)) == {'0', '3', '6'}
    Sparsifier(learn.model.module).sparsify(.6)
    assert learn.sparsity_find((.5, .8), show_plot=False).measured == pytest.approx([.6, .6, .8], abs=.01) # what is measured is said

@given(st.lists(st.integers(1, 1024), min_size=1, max_size=12), st.integers(1, 32))
def test_within_keeps_its_promise(metrics, tol):
    metrics,tol = [1., *(m/1024 for m in metrics)],tol/64 # numbers without rounding
    s = [i/(len(metrics)) for i in range(len(metrics))]
    got = s.index(within(s, metrics, None, tol=tol))
    assert all(m >= 1-tol for m in metrics[:got+1])
    assert got == len(s)-1 or metrics[got+1] < 1-tol
    errors = [2-m for m in metrics]
    assert within(s, errors, None, bigger=False, tol=tol) == s[got]

@given(st.integers(1, 98))
def test_knee_of_a_straight_break(i):
    s = [k/100 for k in range(100)]
    m = [1-.0001*k if k <= i else 1-.0001*i-(k-i)*.01 for k in range(100)]
    assert knee(s, m, None) == s[i]
    assert knee(s, [-v for v in m], None, bigger=False) == s[i]

def sensitivity(sizes, seed):
    rng = np.random.default_rng(seed)
    s = [0., .5, .8, .95]
    curves = {f'l{i}': SparsityCurve([(a, a, float(l), 0.) for a,l in zip(s, rng.normal(0, .3, 4) + np.array([0, .1, .5, 2])*rng.random())], ['valid_loss', 'accuracy'], 'accuracy', True, 4) for i in range(len(sizes))}
    return LayerSensitivity(curves, {f'l{i}': n for i,n in enumerate(sizes)}, len(sizes))

@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.floats(0, .9999), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_the_spread_hits_the_total_exactly(sizes, total, seed):
    sens,wanted = sensitivity(sizes, seed),round(total*sum(sizes))
    if wanted > sum(sizes)-len(sizes):
        with pytest.raises(ValueError, match='keeps at least one of its blocks'): sens.spread(total)
        return
    got = sens.spread(total)
    assert sum(round(s*n) for s,n in zip(got.values(), sizes)) == wanted
    assert all(0 <= s < 1 for s in got.values())

def test_the_robust_layer_gives_more():
    curve = lambda losses: SparsityCurve([(s, s, l) for s,l in zip((0., .5, .9), losses)], ['valid_loss'], 'valid_loss', False, 3)
    sens = LayerSensitivity(dict(weak=curve([1., 3., 9.]), strong=curve([1., 1.1, 1.2]), broken=curve([1., float('nan'), float('inf')])), dict(weak=100, strong=100, broken=100), 3)
    got = sens.spread(.4)
    assert got['broken'] < got['weak'] < got['strong'] and list(sens.rise())[0] == 'strong'
    assert sens.spread(0) == dict(weak=0, strong=0, broken=0)

def test_what_is_found_goes_into_the_callback_as_it_is(trained):
    learn = trained()
    sens = learn.sparsity_find((.5, .9), by_layer=True, show_plot=False)
    target = sens.spread(.7)
    fit(learn, cbs=SparsifyCallback(target))
    n = sum(l.n for l in Sparsifier(learn.model).layers)
    assert measured_sparsity(learn.model).zeros == round(.7*n)
    again = make_learner(); fit(again, cbs=SparsifyCallback(.7, context=sens.share)) # the same as a context
    assert measured_sparsity(again.model).layers == pytest.approx(measured_sparsity(learn.model).layers, abs=.01) and measured_sparsity(again.model).zeros == round(.7*n)

def test_filters_and_their_own_sizes(trained):
    sens = trained().sparsity_find((.5,), 'filter', by_layer=True, show_plot=False)
    assert list(sens.sizes.values()) == [8, 16, 16]
    assert sum(round(s*n) for s,n in zip(sens.spread(.5).values(), (8, 16, 16))) == 20

def test_results_look_good_and_travel(trained):
    learn = trained()
    found,sens = learn.sparsity_find((.5, .9), suggest_funcs=partial(within, tol=.5), show_plot=False),learn.sparsity_find((.5, .9), by_layer=True, show_plot=False)
    assert found.suggested._fields == ('within',) and learn.sparsity_find((.5,), suggest_funcs=None, show_plot=False).suggested == ()
    for o in (found, sens):
        again = pickle.loads(pickle.dumps(copy.copy(o)))
        assert repr(again) == repr(o) and '<table>' in o._repr_html_() and '|---' in o._repr_markdown_()
        ax = o.plot(); assert ax.get_title() and ax.get_xlabel() and ax.get_ylabel()
    assert list(found.to_frame().columns) == ['sparsity', 'measured', 'valid_loss', 'accuracy'] and len(sens.to_frame()) == 9
    plt.close('all')

@pytest.mark.bad_input
@pytest.mark.parametrize('kw,text', [
    (dict(sparsities=(90,)), 'pass 0.9'), (dict(granularity='blocks'), 'known are weight'), (dict(context='layer'), 'local, erk, global, lamp'), (dict(criteria=movement), 'there are none without a training'),
    (dict(layers=nn.Conv3d), 'no layer to prune'), (dict(metric='f1'), 'this Learner measures valid_loss, accuracy'), (dict(n_batches=0), 'at least 1'), (dict(granularity='2:4', context='erk', exclude='0'), "use 'local' or 'global'")])
def test_bad_input(learner, kw, text):
    learn = learner(); before = trace(learn)
    with pytest.raises((ValueError, TypeError)) as e: learn.sparsity_find(**kw)
    assert text in str(e.value) and unchanged(before, trace(learn))

def test_an_unfinished_sensitivity_says_so(trained):
    learn = trained()
    with learn.added_cbs(Boom('before_validate', 4, KeyboardInterrupt)): sens = learn.sparsity_find((.5,), by_layer=True, show_plot=False)
    assert list(sens.curves) == ['0', '3'] and 'stopped after 2 of 3 layers' in repr(sens)
    with pytest.raises(ValueError, match='stopped before it had looked at 6'): sens.spread(.5)
    with pytest.raises(ValueError, match='use the same granularity'): fit(learn, cbs=SparsifyCallback(.5, context=sens.share, exclude='0'))

# ---- loggers: the column goes through fastai's recorder

def test_tensorboard(trained, tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed: pip install tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = trained()
    fit(learn, 2, cbs=[SparsifyCallback(.8), TensorBoardCallback(log_dir=tmp_path/'tb', trace_model=False, log_preds=False)])
    events = EventAccumulator(str(tmp_path/'tb')); events.Reload()
    logged = [e.value for e in events.Scalars('sparsity')]
    assert len(logged) == 2 and logged[-1] == pytest.approx(float(measured_sparsity(learn.model)))

def test_wandb_by_a_stand_in(trained, monkeypatch):
    "Weights & Biases itself wants an account: a stand-in for its module records what fastai's callback sends"
    sent,stand_in = [],types.ModuleType('wandb')
    stand_in.__dict__.update(run=types.SimpleNamespace(step=0, summary={}), config=types.SimpleNamespace(update=lambda *a, **k: None), log=lambda d, step=None: sent.append(d), watch=lambda *a, **k: None, unwatch=lambda *a: None)
    monkeypatch.setitem(sys.modules, 'wandb', stand_in); monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    wandb = pytest.importorskip('fastai.callback.wandb')
    learn = trained()
    monkeypatch.setattr(learn, 'gather_args', dict) # fastai 2.8.12 cannot format a data set of tensors
    fit(learn, 2, cbs=[SparsifyCallback(.8), wandb.WandbCallback(log=None, log_preds=False, log_model=False)])
    logged = [d['sparsity'] for d in sent if 'sparsity' in d]
    assert len(logged) == 2 and logged[-1] == pytest.approx(float(measured_sparsity(learn.model)))

def test_plot_sparsity_shows_the_loss(learner):
    learn = learner()
    fit(learn, cbs=SparsifyCallback(.8))
    ax = learn.recorder.plot_sparsity()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['sparsity, scheduled', 'sparsity, measured', 'learning rate', 'training loss']
    assert {a.get_ylabel() for a in ax.figure.axes} == {'sparsity', 'learning rate', 'training loss'}
    plt.close('all')

def test_errors_are_to_be_small_and_scores_large():
    from fastai.metrics import exp_rmspe, mae, msle, mse, rmse, R2Score, F1Score, Dice, Perplexity
    from fasterprune.find import _bigger_is_better
    import fastai.basics as fb
    def name(m): return fb.mk_metric(m).name
    assert not any(_bigger_is_better(name(m)) for m in (msle, exp_rmspe, mse, rmse, mae, Perplexity(), fb.error_rate))
    assert all(_bigger_is_better(name(m)) for m in (fb.accuracy, R2Score(), F1Score(), Dice()))
