"""Gradient inversion attacks in federated learning, reproduced and fairly judged.

`import gipip` gives what the notebooks use; the README shows it in ten lines.
"""

from gipip.attacks import ATTACKS
from gipip.attacks.base import Attack
from gipip.attacks.view import Reconstruction
from gipip.attacks.dlg import DLG
from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import Dataset, LabeledImages, load_dataset
from gipip.data.imagenet import Prepared, prepare_imagenet
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.statistics import Interval, bootstrap_interval, paired_difference, verdict
from gipip.experiments.sweep import (
    Result,
    Results,
    ResultStore,
    Run,
    Scenario,
    execute,
    shipped_results,
    sweep,
)
from gipip.explorer import explore
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.defenses import DPSGD, Clipping, GaussianNoise, Soteria, Sparsification
from gipip.federation.models import ClientModel, build_model, client_model, load_model
from gipip.federation.training import train_federated
from gipip.priors import (
    AnomalyScore,
    Autoencoder,
    GenerativePrior,
    load_generator,
    load_prior,
    train_autoencoder,
    train_generator,
)

__version__ = "0.1.0"

__all__ = [
    "ATTACKS",
    "AnomalyScore",
    "Attack",
    "Autoencoder",
    "Client",
    "ClientModel",
    "Clipping",
    "DLG",
    "DPSGD",
    "Dataset",
    "FedAvg",
    "GIAS",
    "GIPIP",
    "GaussianNoise",
    "GenerativePrior",
    "GradInversion",
    "Interval",
    "InvertingGradients",
    "LabeledImages",
    "LatentSearch",
    "Prepared",
    "Reconstruction",
    "Result",
    "ResultStore",
    "Results",
    "Run",
    "Scenario",
    "SharedUpdate",
    "Soteria",
    "Sparsification",
    "bootstrap_interval",
    "build_model",
    "client_model",
    "evaluate",
    "execute",
    "explore",
    "load_dataset",
    "load_generator",
    "load_model",
    "load_prior",
    "paired_difference",
    "prepare_imagenet",
    "shipped_results",
    "sweep",
    "train_autoencoder",
    "train_federated",
    "train_generator",
    "verdict",
]
