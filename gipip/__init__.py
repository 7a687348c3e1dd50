"""Gradient inversion attacks in federated learning, reproduced and fairly judged.

`import gipip` gives what the notebooks use; the README shows it in ten lines. The
names, and where they are, stand in `__init__.pyi`; each is imported when it is first
asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
