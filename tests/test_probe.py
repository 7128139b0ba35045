"Looking at a network leaves no trace."
import copy, threading
import pytest, torch
from torch import nn
from fasterprune.couplings import find_couplings
from fasterprune.probe import Patience, as_inputs, copied, input_scale, unwrap, untouched
from fasterprune.flow import following_norms, live_channels

def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
x = torch.randn(4, 3, 9, 9)

class Merging(nn.Linear):
    "Merges something into its weight in eval(), and takes it out again in train()"
    merged = False
    def train(self, mode=True):
        if mode == self.merged: self.weight.data.add_(.1 if self.merged is False else -.1)
        self.merged = not mode
        return super().train(mode)

def test_what_a_layer_merges_in_evaluation_is_taken_out_bit_by_bit():
    m = nn.Sequential(Merging(50, 50), nn.ReLU(), Merging(50, 2)); before = copy.deepcopy(m.state_dict())
    for _ in range(3):
        with untouched(m): assert m[0].merged and not m[0].training
        assert m.training and m[0].training and not m[0].merged
        assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

@pytest.mark.fault
def test_a_run_that_fails_leaves_no_hook_no_mode_and_no_mark():
    m = net(); m[0].weight.requires_grad_(False); m[1].eval()
    mine = m[0].register_forward_hook(lambda *_: None)
    bad = torch.randn(2, 5, 9, 9)
    rng,marks,modes = torch.get_rng_state(),[p.requires_grad for p in m.parameters()],[l.training for l in m.modules()]
    for look in (following_norms, input_scale):
        with pytest.raises((ValueError, RuntimeError)): look(m, [m[0]], bad)
    with pytest.raises(ValueError, match='sample is a batch of inputs'): live_channels(m, bad)
    assert [len(l._forward_hooks)+len(l._forward_pre_hooks) for l in m.modules()] == [0, 1, 0, 0, 0] and mine.id in m[0]._forward_hooks
    assert torch.equal(rng, torch.get_rng_state())
    assert marks == [p.requires_grad for p in m.parameters()] and modes == [l.training for l in m.modules()]

@pytest.mark.fault
def test_a_long_look_tells_shows_a_bar_and_can_be_stopped(monkeypatch, capsys):
    monkeypatch.setattr(Patience, 'wait', 0)
    m = net()
    with pytest.warns(UserWarning, match='1 of 3 layers .*Ctrl-C .*pass the backbone'): find_couplings(m, x)
    assert '2/2' in capsys.readouterr().out
    def stop(*_): raise KeyboardInterrupt
    mine,before = m[2].register_forward_hook(stop),copy.deepcopy(m.state_dict())
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning): find_couplings(m, x)
    assert [len(l._forward_hooks)+len(l._forward_pre_hooks) for l in m.modules()] == [0, 0, 0, 1, 0] and mine.id in m[2]._forward_hooks
    assert all(l.training for l in m.modules()) and all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

@pytest.mark.parametrize('how', ['shell', 'in place', 'a part', 'nested'])
def test_a_compiled_network_that_has_run_is_seen_through(how):
    n = net()
    m = dict(shell=lambda: torch.compile(n, backend='eager'), nested=lambda: nn.DataParallel(torch.compile(n, backend='eager')))
    if how in m: m = m[how]()
    else:
        m = n if how == 'in place' else nn.Sequential(n)
        if how == 'in place': n.compile(backend='eager')
        else: m[0] = torch.compile(n, backend='eager')
    with torch.no_grad(): m.eval()(x)
    assert how == 'a part' or unwrap(m) is n
    assert following_norms(m, [n[0]], x)[n[0]] == [(n[1], [0, 1, 2, 3], [0, 1, 2, 3])]
    assert input_scale(m, [n[3]], x)[n[3]].shape[1] == 4 and set(live_channels(m, x)) == {n[0], n[3]}

def test_inputs_of_every_kind_are_copies():
    for sample in (x, (x,), [x]): assert torch.equal(as_inputs(sample, net())[0], x)
    images,extra = as_inputs(([x, x], {'mask': x}), net())
    assert len(images) == 2 and torch.equal(extra['mask'], x)
    class Scales(nn.Sequential):
        def forward(self, x): return super().forward(x.mul_(2))
    y = x.clone(); live_channels(Scales(*net()), y); assert torch.equal(x, y)
    with pytest.raises(ValueError, match='pass sample='): as_inputs(None, net())

@pytest.mark.bad_input
def test_layers_that_do_not_run_and_what_cannot_be_copied_are_named():
    m = nn.ModuleDict(dict(used=net(), idle=nn.Conv2d(3, 4, 3))); m.forward = lambda x: m['used'](x)
    with pytest.raises(ValueError, match=r"layer idle, which did not run on the sample: leave it out with exclude=\['idle'\]"): input_scale(m, [m['idle']], x)
    n = net(); n[2].lock = threading.Lock()
    with pytest.raises(ValueError, match='cannot be copied: 2.lock'): copied(n)

def test_attention_shows_all_its_layers():
    m = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert {m.linear1, m.linear2} <= set(live_channels(m, torch.randn(2, 5, 8)))
    assert torch.backends.mha.get_fastpath_enabled()
