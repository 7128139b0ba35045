"Schedules: golden values, what is refused, and a schedule squeezed into a part of the training."
import math
from functools import partial
import pytest
from fastai.callback.schedule import sched_cos, sched_lin
from fasterprune.schedules import (check_schedule, sched_agp, sched_between, sched_dsd, sched_imp, sched_iterative, sched_onecycle,
                                   sched_oneshot, schedule_name)

rising = [sched_oneshot, sched_iterative, sched_agp, sched_onecycle, sched_imp, partial(sched_onecycle, beta=6.),
          partial(sched_iterative, n_steps=7)]

@pytest.mark.parametrize('sched', [*rising, sched_cos, sched_lin, sched_between(sched_agp, .2, .8)], ids=schedule_name)
def test_the_target_is_reached_and_never_passed(sched):
    for end in (0., .5, .98):
        assert check_schedule(sched, end, n_steps=1000) is sched
        assert sched(0., end, 1.) == pytest.approx(end)

def at(pos, value, width=1e-4): return lambda start, end, p: value if abs(p-pos) < width else end*p

@pytest.mark.parametrize('value, text', [(float('nan'), 'gave nan at pos=0.55'), (1.2, 'gave 1.2 at pos=0.55'),
                                         (-.5, 'gave -0.5 at pos=0.55'),
                                         ('x', "gave 'x' at pos=0.55"), (True, 'gave True at pos=0.55'), (None, 'gave None at pos=0.55')])
def test_a_spike_anywhere_is_found(value, text):
    with pytest.raises(ValueError, match=text): check_schedule(at(.55, value), .5)

def test_a_spike_at_a_step_is_found_if_the_steps_are_known():
    spike = at(137/1377, math.nan)
    check_schedule(spike, .5)
    with pytest.raises(ValueError, match='gave nan'): check_schedule(spike, .5, n_steps=1377)

@pytest.mark.parametrize('bad', ['cos', None, 3, float, lambda pos: pos, lambda: .5, lambda a, b, c, d: .5])
def test_no_schedule_at_all(bad):
    with pytest.raises(TypeError, match=r'a schedule is a function \(start, end, pos\)'): check_schedule(bad)

def test_what_goes_down_needs_to_be_allowed():
    with pytest.raises(ValueError, match='regrow=True'): check_schedule(sched_dsd)
    check_schedule(sched_dsd, regrow=True)
    check_schedule(sched_between(sched_dsd, .1, .9), regrow=True)

def test_between():
    s = sched_between(sched_lin, .25, .75)
    assert [s(.1, .9, p) for p in (0, .2499, .25, .5, .75, 1)] == pytest.approx([.1, .1, .1, .5, .9, .9])
    assert schedule_name(s) == 'lin 25%-75%' and schedule_name(sched_between(sched_imp, .5)) == 'imp 50%'
    with pytest.raises(TypeError, match='a schedule is a function'): sched_between('cos', .1)
    for a,b in [(-.1, 1), (.5, .5), (.2, 1.1), (math.nan, 1)]:
        with pytest.raises(ValueError, match='0 <= start_pct < end_pct <= 1'): sched_between(sched_lin, a, b)
