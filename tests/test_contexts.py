"Contexts and criteria: plain functions, found by the names of their parameters."
import functools, math
from functools import partial
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from fasterprune.contexts import apportion, check_context, erk, lamp, layer_shares, one_threshold, share_out, uniform, unscaled
from fasterprune.criteria import check_criteria, elementwise, is_elementwise, large_init_large_final, magnitude, random_score, wanda

bounded = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
layer = st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3, 7]))

@bounded
@given(st.floats(0, .99), st.lists(layer, min_size=1, max_size=6))
def test_erk_adds_up(sparsity, shapes):
    shapes = [(o, i, k, k) for o,i,k in shapes]
    sizes = [math.prod(s) for s in shapes]
    got = erk(sparsity, shapes, sizes)
    assert all(0 <= s <= 1 for s in got) and np.dot(got, sizes) == pytest.approx(sparsity*sum(sizes), rel=1e-6, abs=1e-6)

@bounded
@given(st.integers(1, 200), st.lists(st.floats(0, 50), min_size=1, max_size=8), st.integers(0, 99))
def test_apportion_adds_up_within_bounds(total, ideal, seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 5, len(ideal)); high = low + rng.integers(0, 60, len(ideal))
    got = apportion(total, ideal, low, high)
    assert all(l <= g <= h for l,g,h in zip(low, got, high))
    if low.sum() <= total <= high.sum(): assert sum(got) == total

def test_apportion_takes_as_many_passes_as_layers(monkeypatch):
    "Not as many as blocks: 500,000 of them are to be moved here"
    class Counted:
        def __getattr__(self, name):
            passes.append(name == 'argsort' or name == 'where')
            return getattr(np, name)
    passes = []
    monkeypatch.setattr('fasterprune.contexts.np', Counted())
    assert apportion(900_000, [300_000., 600_000., 0.], [800_000, 0, 0], [999_999]*3) == [800_000, 100_000, 0] and sum(passes) <= 3

@bounded
@given(st.floats(0, .99), st.lists(st.integers(2, 5000), min_size=1, max_size=8))
def test_equal_shares_add_up_to_the_total(sparsity, sizes):
    most = [n-1 for n in sizes]
    got = share_out([sparsity]*len(sizes), sparsity, sizes, [0]*len(sizes), most)
    assert sum(got) == min(round(sparsity*sum(sizes)), sum(most))

@bounded
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=300), st.integers(0, 99))
def test_lamp_is_its_formula(values, seed):
    s = torch.tensor(values)
    got,sq = lamp(s),(s.double()/max(values+[1e-300])).square()
    for i in range(len(s)):
        tail = sq[s >= s[i]].sum()
        ties = s == s[i] # the sum of equal ones depends on their order
        if ties.sum() == 1 and tail > 0: assert got[i] == pytest.approx(float(sq[i]/tail), rel=1e-6, abs=1e-200)
    assert ((got >= 0) & (got <= 1)).all()
    if s.max() > 0: assert got.max() == 1

def test_lamp_of_huge_numbers_is_finite():
    assert lamp(torch.tensor([1e300, 3e307, 0.], dtype=torch.float64)).isfinite().all()
    assert lamp(torch.tensor([1e-300, 1e-310], dtype=torch.float64)).tolist()[0] == 1.

def scaled(sparsity, sizes, factor): return [sparsity*factor]*len(sizes)
def by_size(*, scores): return scores

@pytest.mark.parametrize('context', [uniform, erk, partial(scaled, factor=.5), lambda names: [0.]*len(names),
                                     lambda shapes, sparsity: [sparsity]*len(shapes)])
def test_shares(context):
    assert check_context(context) is context and not one_threshold(context)

@pytest.mark.parametrize('context', [unscaled, lamp, by_size, lambda scores: scores, lambda scores, power=2: scores**power])
def test_one_threshold(context):
    assert check_context(context) is context and one_threshold(context)

@pytest.mark.parametrize('bad', ['layer', '', None, 3, dict, ('local',), max, torch.abs, lambda: 0, lambda weight: 0,
                                 lambda scores, sparsity: 0, lambda *args: 0])
def test_no_context(bad):
    with pytest.raises(ValueError, match='context got .* it is one of local, erk, global, lamp, or a function'): check_context(bad)

@pytest.mark.parametrize('answer', [[.5], [None, .5], [.5, 1.1], [.5, -.1], [.5, math.nan], [.5, 'x'], .5, None, 'ab'])
def test_a_context_that_answers_nonsense(answer):
    with pytest.raises(ValueError, match='must give one sparsity in .0, 1. for each of 2 layers'):
        layer_shares(lambda sizes: answer, .5, [(1,), (2,)], [1, 2], ['a', 'b'])

def test_the_elementwise_mark_is_not_copied():
    @functools.wraps(magnitude)
    def normalised(weight): return magnitude(weight) / magnitude(weight).sum()
    @elementwise
    @functools.wraps(magnitude)
    def doubled(weight): return 2*magnitude(weight)
    assert is_elementwise(magnitude) and is_elementwise(doubled)
    assert not is_elementwise(normalised) and not is_elementwise(partial(normalised)) and not is_elementwise(wanda)

def test_a_partial_is_elementwise_unless_it_holds_a_tensor():
    assert is_elementwise(partial(large_init_large_final, alpha=2.))
    assert is_elementwise(partial(partial(large_init_large_final), alpha=torch.tensor(2.)))
    assert not is_elementwise(partial(large_init_large_final, init=torch.ones(3)))

@pytest.mark.parametrize('bad', [torch.abs, 'magnitude', None, abs, lambda x: x, lambda: 0, lambda *weight: 0, torch.Tensor,
                                 lambda weight, /: weight])
def test_no_criterion(bad):
    with pytest.raises(TypeError, match='a criterion is a function'): check_criteria(bad)

def test_what_a_criterion_wants():
    assert check_criteria(partial(random_score, seed=1)) == ('weight', 'name') and check_criteria(wanda) == ('weight', 'act')
