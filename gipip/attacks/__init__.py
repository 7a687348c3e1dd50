"""Gradient inversion attacks: one file an attack, one optimisation loop (base.py)."""

from gipip.attacks.base import Attack, Reconstruction
from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients

ATTACKS = {attack.__name__: attack for attack in (DLG, InvertingGradients, GIPIP)}

__all__ = ["ATTACKS", "Attack", "DLG", "GIPIP", "InvertingGradients", "Reconstruction"]
