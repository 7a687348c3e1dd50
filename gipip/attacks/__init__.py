"""Gradient inversion attacks: one file an attack, one optimisation loop (loop.py).

Every module of this folder is imported, so that a new attack is one new file: a class
of `gipip.attacks.base.Attack` with a `name` is found here, on the command line and in
the tests.
"""

import importlib
import pkgutil

from gipip.attacks.base import ATTACKS, Attack
from gipip.attacks.view import Reconstruction

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ATTACKS", "Attack", "Reconstruction"]
