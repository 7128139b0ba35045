"""The comparison: data, networks, contestants, trainings, results, and the command that does it all"""
_homes = dict(
    data=('load_data',), batches=('tensor_dls',), models=('make_model', 'small_resnet'),
    baselines=('schedules', 'find_schedule'), run=('Settings',), results=('Results',), summary=('summarize', 'paired'),
    pictures=('plot_accuracy', 'plot_curves', 'plot_params', 'write_report'),
    study=('compare', 'Comparison'), cli=('fasterprune_compare', 'fasterprune_find_params'))
_home_of = {name: home for home,names in _homes.items() for name in names}
__all__ = list(_home_of)

def __getattr__(name):
    "Nothing is imported before it is asked for: fastai and torchvision take their time"
    if name not in _home_of: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from fasterprune.docs import document
    return document(getattr(import_module(f'{__name__}.{_home_of[name]}'), name))

def __dir__(): return sorted({*globals(), *_home_of})
