"Property-based: random networks, sparsities, granularities and contexts keep the contracts."
import warnings
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fasterprune.all import *
from fasterprune.contexts import apportion
from fasterprune.granularity import nm_pattern, weight_view
from fasterprune.scores import layer_scores
from fasterprune.selection import select_in_slices

common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile('fasterprune', max_examples=150, **common); settings.load_profile('fasterprune')
types = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

@st.composite
def layers(draw):
    cls = draw(st.sampled_from(types))
    g = 1 if cls is nn.Linear else draw(st.sampled_from([1, 1, 2, 4]))
    i,o = g*draw(st.integers(1, 6)),g*draw(st.integers(1, 6))
    if draw(st.integers(0, 9)) == 0: i,o,g = 1,1,1 # a one-weight layer
    return cls(i, o) if cls is nn.Linear else cls(i, o, draw(st.integers(1, 3)), groups=g)

@st.composite
def networks(draw, max_layers=4):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ls = draw(st.lists(layers(), min_size=1, max_size=max_layers))
    if draw(st.booleans()): ls.append(ls[0]) # a shared module
    net = nn.Sequential(*ls)
    how = draw(st.sampled_from(['normal', 'normal', 'ties', 'equal', 'tiny', 'zeros in it']))
    with torch.no_grad():
        for m in ls:
            if isinstance(m, types):
                if how == 'ties': m.weight.copy_(torch.randint(-2, 3, m.weight.shape))
                if how == 'equal': m.weight.fill_(.5)
                if how == 'tiny': m.weight.mul_(1e-30)
                if how == 'zeros in it': m.weight.mul_(torch.rand_like(m.weight) > .2)
    return net.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])))

sparsities = st.one_of(st.floats(0, .999), st.sampled_from([0., .5, .9, .999]))

def masks(net): return [m.weight.detach() != 0 for _,m in find_layers(net, types).items()]

@given(networks(), sparsities, st.sampled_from(['local', 'erk', 'global', 'lamp']), st.sampled_from(['weight', 'filter']), st.booleans())
def test_exact_counts_and_no_layer_is_emptied(net, sparsity, context, granularity, twice):
    pre = measured_sparsity(net, types, granularity=granularity)
    full = [r[5] == r[4] for r in pre.rows]  # zero altogether: not taken over
    sp = Sparsifier(net, granularity, context, layers=types)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = masks(net)
        if twice: sp.sparsify(sparsity/2)
        r = sp.sparsify(sparsity)
    floor = [0 if f else row[5] for row,f in zip(pre.rows, full)]
    n,dead = [row[4] for row in r.rows],[g.n_pruned for g in sp.groups]
    if context == 'local': assert dead == [max(a, min(round(sparsity*i), i-1)) for i,a in zip(n, floor)]
    else: assert sum(dead) == max(sum(floor), min(round(sparsity*sum(n)), sum(i-1 for i in n))) or (context == 'erk' and any(floor))
    for g,row,f in zip(sp.groups, r.rows, full):
        if not f and not _accidental(net): assert row[5] == g.n_pruned # counted in the weights as well
        assert g.n_pruned < g.n or g.n == 1 and g.n_pruned == 0
    for a,b in zip(before, masks(net)): assert not (b & ~a).any() # nothing that was zero came back

def _accidental(net): # zeros that are there by chance, in half precision or among ties, may lie in blocks that are alive
    return any((m.weight == 0).any() and m.weight.dtype in (torch.float16, torch.bfloat16) or m.weight.unique().numel() < 6 for m in net if isinstance(m, types))

@given(networks(3), st.lists(sparsities, min_size=2, max_size=5), st.sampled_from(['local', 'erk', 'global', 'lamp']), st.sampled_from([magnitude, small_final, squared, random_score, movement]))
def test_masks_only_shrink(net, steps, context, criteria):
    sp = Sparsifier(net, context=context, criteria=criteria, layers=types)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        old = None
        for s in steps:
            sp.update(s)
            new = list(sp.masks.values())
            if old: assert not any((b & ~a).any() for a,b in zip(old, new))
            old = new
            with torch.no_grad(): # a step that revives everything
                for l in sp.layers: l.weight.add_(.01)
            sp.apply()
            for l,k in zip(sp.layers, new): assert (l.weight[~k] == 0).all()

@given(networks(3), st.sampled_from([magnitude, small_final, squared, large_init, movement, movement_magnitude, random_score]))
def test_scoring_leaves_weights_untouched(net, criteria):
    sp = Sparsifier(net, criteria=criteria, layers=types)
    before = [l.weight.clone() for l in sp.layers]
    for l in sp.layers: layer_scores(l, criteria, sp._inputs(l, {}))[:]
    assert all(torch.equal(a, l.weight) for a,l in zip(before, sp.layers))

@given(networks(4), st.floats(0.01, .95))
def test_the_global_threshold_is_that_of_a_sort(net, sparsity):
    sp = Sparsifier(net, context='global', layers=types)
    k = round(sparsity*sum(l.n for l in sp.layers))
    flat = np.concatenate([l.weight.double().abs().flatten().numpy() for l in sp.layers])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); sp.update(sparsity)
    if told or not k or any(g.mask is None for g in sp.groups): return
    t = np.sort(flat)[k-1]
    kept = np.concatenate([m.flatten().numpy() for m in sp.masks.values()])
    if (~kept).sum() == k and all((l.weight.double().abs() > 0).any() for l in sp.layers):
        maxima = [g.n_pruned < g.n-1 for g in sp.groups] # where a layer is down to its last block, that one was protected
        if all(maxima): assert flat[kept].min() >= t - 1e-12 and (flat > t).sum() <= kept.sum()

@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.sampled_from(['normal', 'ties', 'equal', 'heavy tail']), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_kth_smallest_is_that_of_a_sort(sizes, how, q, seed, some):
    rng = np.random.default_rng(seed)
    draw = dict(normal=lambda n: np.abs(rng.standard_normal(n, dtype=np.float32)), ties=lambda n: rng.integers(0, 3, n).astype(np.float32), equal=lambda n: np.ones(n, np.float32), **{'heavy tail': lambda n: np.exp(rng.standard_normal(n)*20).clip(max=1e38).astype(np.float32)})[how]
    xs = [draw(n*7) for n in sizes]
    alive = [rng.random(len(x)) < .3 for x in xs] if some else None
    flat = np.concatenate([x[a] for x,a in zip(xs, alive)] if some else xs)
    if not len(flat): return
    k = max(1, round(q*len(flat)))
    masks = [torch.from_numpy(a) for a in alive] if some else [None]*len(xs)
    found = select_in_slices(xs, k + sum(int((~m).sum()) for m in masks if m is not None), masks)
    gone = np.concatenate([x[~m.numpy() if old is None else (old & ~m).numpy()] for x,m,old in zip(xs, found.masks, masks)])
    if found.rescued or len(gone) < k: return # each array keeps its best
    best = sum(len(x) > 0 for x in xs)
    assert np.abs(np.sort(gone) - np.sort(flat)[:k]).max() == 0 or k > len(flat)-best-1

@given(st.integers(0, 10**6), st.floats(.05, .95), st.sampled_from(['2:4', '1:4', '1:2', '3:8']), st.sampled_from(['local', 'global']))
def test_patterns_hold_at_the_end_and_on_the_way(seed, part, pattern, context):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Linear(16, 5), nn.Conv2d(16, 4, 1, groups=2))
    sp = Sparsifier(net, pattern, context, layers=types)
    n,m = nm_pattern(pattern)
    sp.update(part*(1-n/m))
    def lots(): return [weight_view(sp.model.get_submodule(name), mask).unflatten(2, (-1, m)).sum(3) for name,mask in sp.masks.items()]
    kept = lots()
    assert all((k >= n).all() for k in kept)
    sp.update(1-n/m)
    assert all((k == n).all() for k in lots())
