"Selection: three ways with equal masks, nothing written to, little memory, and an end whatever comes in."
import tracemalloc, warnings
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from fasterprune import keys
from fasterprune.contexts import lamp, unscaled
from fasterprune.selection import BadScores, select, select_groups, select_on_device, select_sorted

bounded = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
draws = dict(
    normal=lambda rng, n: np.abs(rng.standard_normal(n)), ties=lambda rng, n: rng.integers(0, 3, n)*1., equal=lambda rng, n: np.ones(n),
    zeros=lambda rng, n: np.where(rng.random(n) < .9, 0., rng.random(n)), negative_zeros=lambda rng, n: rng.choice([0., -0., 1.], n),
    heavy=lambda rng, n: np.exp(rng.standard_normal(n)*20), rising=lambda rng, n: np.sort(rng.random(n)),
    infinite=lambda rng, n: np.where(rng.random(n) < .3, np.inf, rng.random(n)), tiny=lambda rng, n: rng.random(n)*1e-42)

class Lazy:
    "Scores that are computed when a slice is asked for"
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, part): return self.x[part].numpy() + 0

@st.composite
def problems(draw, max_size=4000):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = draw(st.lists(st.one_of(st.integers(0, 5), st.integers(1, max_size)), min_size=1, max_size=4))
    if not sum(sizes): sizes.append(3)
    double = draw(st.booleans())
    scores = [torch.from_numpy(draws[draw(st.sampled_from(sorted(draws)))](rng, n)) for n in sizes]
    scores = [s if double else s.float() for s in scores]
    if draw(st.booleans()): scores = [s * 10.**draw(st.integers(-3, 3)) for s in scores] # arrays that are emptied
    masks = None
    if draw(st.booleans()):
        density = draw(st.sampled_from([0., .1, .9]))
        masks = [draw(st.sampled_from([None, m])) for m in (torch.from_numpy(rng.random(n) < density) for n in sizes)]
    return scores, masks, draw(st.floats(0, 1))

def as_tuple(got): return [m.tolist() for m in got.masks], got.n_pruned, got.rescued

@bounded
@given(problems(), st.booleans())
def test_the_three_ways_agree(problem, lazy):
    scores,masks,q = problem
    n,pruned = sum(map(len, scores)),sum(int((~m).sum()) for m in masks or [] if m is not None)
    k = pruned + round(q*(n-pruned))
    before = [s.clone() for s in scores], [m if m is None else m.clone() for m in masks or []]
    oracle = select_sorted(scores, k, masks, allow_inf=True)
    shown = [Lazy(s) for s in scores] if lazy else scores
    ways = [select_on_device(scores, k, masks, allow_inf=True), select(shown, k, masks, allow_inf=True)]
    with pytest.MonkeyPatch.context() as patch: # as for rows of millions
        patch.setattr(keys, '_short', 0)
        ways.append(select_on_device(scores, k, masks, allow_inf=True))
    for got in ways: assert as_tuple(got) == as_tuple(oracle)
    assert all(torch.equal(a, b) for a,b in zip(before[0], scores)) # nothing that was passed in has changed
    assert all(a is b is None or torch.equal(a, b) for a,b in zip(before[1], masks or []))
    free = [len(s) if m is None else int(m.sum()) for s,m in zip(scores, masks or [None]*len(scores))]
    assert sum(oracle.n_pruned) == min(k, n - sum(f > 0 for f in free)) # exactly k, or all but one of each array
    assert oracle.n_pruned == [int((~m).sum()) for m in oracle.masks]
    for f,m,old in zip(free, oracle.masks, masks or [None]*len(scores)):
        assert bool(f) == bool(m.any()) and (old is None or not (m & ~old).any()) # no array is emptied, nothing pruned comes back

@bounded
@given(problems(300))
def test_what_stays_scores_at_least_what_goes(problem):
    scores,_,q = problem
    got = select(scores, round(q*sum(map(len, scores))), allow_inf=True)
    gone = [s[~m] for s,m in zip(scores, got.masks)]
    top = max((float(g.max()) for g in gone if len(g)), default=-1.)
    for i,(s,m) in enumerate(zip(scores, got.masks)):
        kept = s[m]
        if len(kept) > 1 or i not in got.rescued and len(kept): assert float(kept.min()) >= top or len(kept) == 1
        if i in got.rescued: assert len(kept) == 1 and float(kept) == float(s.max())

def test_pruned_stays_pruned_when_less_is_asked():
    s,m = torch.rand(100),torch.rand(100) < .5
    for way in (select, select_on_device, select_sorted): assert torch.equal(way([s], 3, [m]).masks[0], m)

@pytest.mark.parametrize('way', [select, select_on_device, select_sorted])
@pytest.mark.parametrize('bad, allow_inf', [(float('nan'), False), (float('nan'), True), (-1., False), (-1., True),
                                            (float('inf'), False), (-float('inf'), True)])
def test_what_is_no_score_is_named(way, bad, allow_inf):
    scores = [torch.rand(200_000), torch.rand(300_000)]
    scores[1][123_456] = bad
    with pytest.raises(BadScores) as e: way(scores, 100_000, allow_inf=allow_inf)
    assert e.value.index == 1 and not (e.value.lo >= 0 and e.value.hi < float('inf'))

def test_the_group_is_named():
    good,bad = torch.rand(1000),torch.full((1000,), float('nan'))
    with pytest.raises(BadScores) as e: select_groups(([s], 10, None) for s in (good, good, bad))
    assert (e.value.group, e.value.index) == (2, 0)

@pytest.mark.parametrize('way', [select, select_on_device, select_sorted])
def test_infinite_scores_end(way):
    "Means that overflowed: everything in one array is infinite, and some of it must go"
    scores = [torch.rand(8), torch.full((8,), torch.inf)]
    got = way(scores, 12, allow_inf=True)
    assert got.n_pruned == [7, 5] and got.rescued == [0]

def relative(scores): return scores / scores.where(scores < torch.inf, 0).amax().clamp(min=1e-30)

@bounded
@given(problems(30_000), st.booleans(), st.sampled_from([lamp, relative]))
def test_the_three_ways_agree_on_contexts(problem, lazy, context):
    scores,masks,q = problem
    if context is relative or scores[0].dtype == torch.float64: # squares must not vanish
        scores = [torch.where(s < torch.inf, s.clamp(max=1e30), s) for s in scores]
    n,pruned = sum(map(len, scores)),sum(int((~m).sum()) for m in masks or [] if m is not None)
    k = pruned + round(q*(n-pruned))
    oracle = select_sorted(scores, k, masks, True, context)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        shown = [Lazy(s) for s in scores] if lazy else scores
        ways = [select_on_device(scores, k, masks, True, context), select(shown, k, masks, True, context)]
    for got in ways:
        assert got.n_pruned == oracle.n_pruned and got.rescued == oracle.rescued
        assert all(torch.equal(a, b) for a,b in zip(got.masks, oracle.masks))

@bounded
@given(problems(3000))
def test_single_precision_keeps_the_count_and_a_millionth(problem):
    "Where a device has no float64: what changes places compares equal but for rounding errors"
    scores,masks,q = problem
    scores = [torch.where(s < torch.inf, s.clamp(max=1e30), 0).float() for s in scores]
    n,pruned = sum(map(len, scores)),sum(int((~m).sum()) for m in masks or [] if m is not None)
    k = pruned + round(q*(n-pruned))
    wide,keys._wide = keys._wide,lambda device: torch.float32
    try: got = select_on_device(scores, k, masks, context=lamp)
    finally: keys._wide = wide
    oracle = select_sorted(scores, k, masks, context=lamp)
    assert sum(got.n_pruned) == sum(oracle.n_pruned)
    compared = [lamp(s if m is None else torch.where(m, s, 0.)) for s,m in zip(scores, masks or [None]*len(scores))]
    moved = [c[a != b] for c,a,b in zip(compared, got.masks, oracle.masks)]
    moved = torch.cat(moved)
    if len(moved): assert moved.max()-moved.min() <= 1e-6*moved.max() or moved.max() < 1e-30

def test_single_precision_of_millions():
    "The sums of millions of squares are pairwise, so the bound of a millionth holds for large layers too"
    torch.manual_seed(0)
    scores = [torch.randn(n).abs()*unit for n,unit in ((2_400_000, .01), (600_000, .02), (9_408, .1))]
    k = round(.95*sum(map(len, scores)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, '_wide', lambda device: torch.float32)
        got = select_on_device(scores, k, context=lamp)
    oracle = select_sorted(scores, k, context=lamp)
    assert sum(got.n_pruned) == sum(oracle.n_pruned) == k
    moved = torch.cat([lamp(s)[a != b] for s,a,b in zip(scores, got.masks, oracle.masks)])
    assert not len(moved) or moved.max()-moved.min() <= 1e-6*moved.max()
    assert len(moved) <= 1e-5*sum(map(len, scores))

@pytest.mark.parametrize('density', [1., .05])
@pytest.mark.parametrize('context', [unscaled, lamp])
def test_memory_is_small_and_linear(density, context):
    "Beside the new masks, little is made, however many scores there are"
    for n in (2*10**6, 16*10**6):
        parts = torch.rand(n).split(n//8)
        masks = [torch.rand(len(x)) < density for x in parts] if density < 1 else None
        tracemalloc.start() # counts numpy's memory, masks included
        select([Lazy(x) for x in parts], round((1-density/2)*n), masks, context=context)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak-n < (.1 if context is unscaled else .2)*4*n + 2**22, (peak-n)/(4*n) # and a few slices
