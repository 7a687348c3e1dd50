"""Gradient inversion attacks: one file an attack, one optimisation loop (base.py)."""

from gipip.attacks.base import Attack, Reconstruction
from gipip.attacks.dlg import DLG
from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients

ATTACKS = {
    attack.__name__: attack
    for attack in (DLG, InvertingGradients, GIPIP, LatentSearch, GIAS, GradInversion)
}

__all__ = [
    "ATTACKS",
    "Attack",
    "DLG",
    "GIAS",
    "GIPIP",
    "GradInversion",
    "InvertingGradients",
    "LatentSearch",
    "Reconstruction",
]
