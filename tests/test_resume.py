"Killed at any moment and resumed from the last checkpoint: the same masks and weights as if nothing had happened."
import multiprocessing, os, random, signal, time
import pytest, torch
from fastai.basics import Callback, set_seed
from fastai.callback.all import SaveModelCallback
from fasterprune.all import *
from conftest import conv_net, fit, make_learner, same, shown, state

n_epochs = 6
fresh = multiprocessing.get_context('forkserver') # a process that has used autograd's threads must not be forked
fresh.set_forkserver_preload(['conftest', 'fasterprune.all'])

class SameOrder(Callback):
    "The batches of an epoch depend on its number alone"
    def before_train(self): set_seed(100+self.epoch); self.dls.train.rng.seed(self.epoch)

class Slow(Callback):
    def before_batch(self): time.sleep(.03)

def train(path, how, start=0, slow=False):
    learn = make_learner(path=path)
    if start: fit(learn, 0); learn.load(f'model_{start-1}', with_opt=True)
    fit(learn, n_epochs, cbs=[SparsifyCallback(.9, **how), SaveModelCallback(every_epoch=True, with_opt=True), SameOrder(), *([Slow()] if slow else [])], start_epoch=start)
    return learn

def last_checkpoint(path):
    "The newest checkpoint that is whole: a kill can tear the one being written"
    for k in reversed(range(n_epochs)):
        try: torch.load(path/f'models/model_{k}.pth', weights_only=False); return k+1
        except Exception: pass
    return 0

@pytest.mark.fault
@pytest.mark.parametrize('how', [dict(), dict(context='global'), dict(context='erk', granularity='kernel'), dict(granularity='filter'), dict(context='lamp', schedule=sched_agp)], ids=shown)
@pytest.mark.parametrize('kill', range(3))
def test_sigkill_and_resume(tmp_path, how, kill):
    how,whole = {k: v for k,v in how.items()},tmp_path/'whole'
    reference = train(whole, how)
    rng = random.Random(f'{how} {kill}')
    p = fresh.Process(target=train, args=(tmp_path/'killed', how, 0, True))
    p.start()
    end = time.monotonic()+120
    while p.is_alive() and time.monotonic() < end and not (tmp_path/'killed/models/model_0.pth').exists(): time.sleep(.005)
    assert p.is_alive() and (tmp_path/'killed/models/model_0.pth').exists(), 'the training ended, or never came to its first checkpoint'
    time.sleep(rng.uniform(0, .2))
    os.kill(p.pid, signal.SIGKILL); p.join(60)
    assert p.exitcode == -signal.SIGKILL and not (tmp_path/f'killed/models/model_{n_epochs-1}.pth').exists(), 'the kill fell outside the training'
    start = last_checkpoint(tmp_path/'killed')
    again = train(tmp_path/'killed', how, start)
    assert same(state(reference), state(again))
    got = measured_sparsity(again.model, granularity=how.get('granularity', 'weight'))
    n,dead = [r[4] for r in got.rows],[r[5] for r in got.rows]
    assert sum(dead) == (round(.9*sum(n)) if how.get('context') != 'local' else sum(min(round(.9*k), k-1) for k in n))

@pytest.mark.parametrize('epoch', range(3))
def test_a_checkpoint_from_the_middle_loads_into_the_plain_network(tmp_path, epoch):
    fit(make_learner(path=tmp_path), 3, cbs=[SparsifyCallback(.9), SaveModelCallback(every_epoch=True)])
    net = conv_net()
    net.load_state_dict(torch.load(tmp_path/f'models/model_{epoch}.pth'), strict=True)
    assert epoch < 2 or float(measured_sparsity(net)) == pytest.approx(.9, abs=.005)

@pytest.mark.parametrize('how', ['keep', 'more'])
def test_a_sparse_checkpoint_is_trained_on(tmp_path, how):
    a = make_learner(path=tmp_path); fit(a, cbs=SparsifyCallback(.6)); a.save('sparse')
    zeros = [m.weight == 0 for _,m in find_layers(a.model).items()]
    b = make_learner(seed=7, path=tmp_path); b.load('sparse')
    fit(b, cbs=KeepSparsity() if how == 'keep' else SparsifyCallback(.9))
    assert all((m.weight[z] == 0).all() for z,(_,m) in zip(zeros, find_layers(b.model).items()))
    assert float(measured_sparsity(b.model)) == pytest.approx(.6 if how == 'keep' else .9, abs=.005)
    assert how == 'keep' or min(s for _,s in b.recorder.sparsity_measured) >= .595 # it starts at the sparsity that is there
