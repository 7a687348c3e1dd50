"""Gradient inversion attacks in federated learning, reproduced and fairly judged.

`import gipip` gives what the notebooks use; the README shows it in ten lines. `__init__.pyi` is the
list of it. Each name is imported when it is first asked for, so that the command line is quick and
a script loads only what it needs.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
