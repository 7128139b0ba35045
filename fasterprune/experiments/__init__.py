"""The comparison: data, networks, contestants, trainings, results, and the command that does it all"""
_homes = dict(load_data='data', make_model='models', small_resnet='models', compare='study', Results='results', summarize='results', paired='results',
              plot_accuracy='results', plot_curves='results', plot_params='results')
__all__ = list(_homes)

def __getattr__(name):
    "Nothing is imported before it is asked for: fastai and torchvision take their time"
    if name not in _homes: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'.{_homes[name]}', __name__), name)

def __dir__(): return sorted([*globals(), *_homes])
