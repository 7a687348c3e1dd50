"""Gradient inversion attacks in federated learning, reproduced and fairly judged.

`import gipip` gives what the notebooks use; the README shows it in ten lines.
"""

from gipip.attacks import ATTACKS, DLG, GIPIP, Attack, InvertingGradients, Reconstruction
from gipip.data import Dataset, LabeledImages, load_dataset
from gipip.experiments import Result, Results, ResultStore, Run, Scenario, execute, sweep
from gipip.explorer import explore
from gipip.federation import Client, SharedUpdate
from gipip.metrics import Interval, bootstrap_interval, evaluate, paired_difference, verdict
from gipip.models import ClientModel, build_model, client_model
from gipip.priors import AnomalyScore, Autoencoder, load_prior, train_autoencoder

__version__ = "0.1.0"

__all__ = [
    "ATTACKS", "AnomalyScore", "Attack", "Autoencoder", "Client", "ClientModel", "DLG", "Dataset", "GIPIP", "Interval",
    "InvertingGradients", "LabeledImages", "Reconstruction", "Result", "ResultStore", "Results", "Run", "Scenario",
    "SharedUpdate", "bootstrap_interval", "build_model", "client_model", "evaluate", "execute", "explore", "load_dataset",
    "load_prior", "paired_difference", "sweep", "train_autoencoder", "verdict",
]  # fmt: skip
