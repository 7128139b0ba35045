"A later fit without a callback loses zeros: it is said, and only then"
import copy, warnings
import pytest
from torch import nn
from fasterprune.all import *
from conftest import conv_net, fit

def told(learn, **kwargs):
    "What a fit says of zeros that will be lost"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learn, 1, **kwargs)
    return [str(w.message) for w in said if 'they will be lost' in str(w.message)]

def pruned(learner, **kwargs):
    learn = learner(**kwargs)
    fit(learn, 1, cbs=SparsifyCallback(.8))
    return learn

@pytest.mark.situation
def test_it_is_said_once(learner):
    learn = pruned(learner)
    said = told(learn)
    assert len(said) == 1 and 'KeepSparsity' in said[0] and float(measured_sparsity(learn.model)) < .1
    assert told(learn) == []

@pytest.mark.situation
def test_whoever_has_pruned(learner):
    learn = learner()
    Sparsifier(learn.model, layers=(nn.Conv2d, nn.Linear)).sparsify(.5)
    assert said_share(told(learn)) == pytest.approx(50, abs=1)

def said_share(said): return float(said[0].partition('%')[0])

@pytest.mark.situation
@pytest.mark.parametrize('cbs', [KeepSparsity, lambda: SparsifyCallback(.9), lambda: StraightThrough(.9)])
def test_not_if_something_keeps_them(learner, cbs):
    learn = pruned(learner)
    assert told(learn, cbs=cbs()) == [] and len(told(learn)) == 1

@pytest.mark.situation
def test_not_of_dense_networks(learner):
    learn = learner()
    assert told(learn) == []
    fit(learn, 1, cbs=SparsifyCallback(.8))
    learn.model = conv_net()
    learn.opt = None
    assert told(learn) == []

@pytest.mark.situation
def test_not_while_nothing_is_lost(learner):
    learn = pruned(learner)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*will be lost')
        with learn.no_bar(): learn.lr_find(num_it=3, show_plot=False)
        learn.validate()
    for l in learn.model.modules():
        if isinstance(l, nn.Conv2d): l.weight.requires_grad_(False)
    learn.opt = None # Adam would go on moving them by its averages
    assert told(learn) == [] # frozen
    assert float(measured_sparsity(learn.model)) == pytest.approx(.8, abs=.01)
    for p in learn.model.parameters(): p.requires_grad_(True)
    assert len(told(learn)) == 1

@pytest.mark.situation
def test_after_loading_and_cutting(learner):
    learn,other = pruned(learner),learner()
    file = learn.save_sparse('zeros')
    other.load_sparse(file)
    assert len(told(other)) == 1
    learn.shrink()
    assert len(told(learn)) == 1 and len(told(learn)) == 0

@pytest.mark.situation
@pytest.mark.parametrize('other', [lambda learn, again: copy.deepcopy(learn), lambda learn, again: again.load(learn.save('plain').stem),
                                   lambda learn, again: load_sparse(learn.save_sparse('zeros'), again)], ids=['copy', 'load', 'load_sparse'])
def test_of_copies_and_files(learner, other):
    assert len(told(other(pruned(learner), learner()))) == 1

@pytest.mark.situation
def test_not_of_a_fit_of_no_epochs(learner):
    learn = pruned(learner)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*will be lost')
        with learn.no_bar(): learn.fit(0)
    assert len(told(learn)) == 1

@pytest.mark.situation
def test_not_of_weights_that_begin_at_zero(learner):
    learn = learner()
    nn.init.zeros_([m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1].weight)
    assert told(learn) == []

@pytest.mark.situation
def test_lazy_layers_are_left_alone(learner):
    net = conv_net()
    net[0] = nn.LazyConv2d(net[0].out_channels, net[0].kernel_size, stride=net[0].stride, padding=net[0].padding)
    assert told(learner(model=net)) == []
