"""The names that gipip gives, for type checkers and for its own lazy imports."""

from .attacks import ATTACKS as ATTACKS
from .attacks.base import Attack as Attack
from .attacks.dlg import DLG as DLG
from .attacks.gias import GIAS as GIAS, LatentSearch as LatentSearch
from .attacks.gipip import GIPIP as GIPIP
from .attacks.gradinversion import GradInversion as GradInversion
from .attacks.inverting_gradients import InvertingGradients as InvertingGradients
from .attacks.view import Reconstruction as Reconstruction
from .data.datasets import (
    Dataset as Dataset,
    LabeledImages as LabeledImages,
    load_dataset as load_dataset,
)
from .data.imagenet import Prepared as Prepared, prepare_imagenet as prepare_imagenet
from .evaluation.metrics import evaluate as evaluate
from .evaluation.statistics import (
    Interval as Interval,
    bootstrap_interval as bootstrap_interval,
    paired_difference as paired_difference,
    verdict as verdict,
)
from .experiments.sweep import (
    Result as Result,
    Results as Results,
    ResultStore as ResultStore,
    Run as Run,
    Scenario as Scenario,
    execute as execute,
    shipped_results as shipped_results,
    sweep as sweep,
)
from .explorer import explore as explore
from .federation.client import Client as Client, FedAvg as FedAvg, SharedUpdate as SharedUpdate
from .federation.defenses import (
    DPSGD as DPSGD,
    Clipping as Clipping,
    GaussianNoise as GaussianNoise,
    Soteria as Soteria,
    Sparsification as Sparsification,
)
from .federation.models import (
    ClientModel as ClientModel,
    build_model as build_model,
    client_model as client_model,
    load_model as load_model,
)
from .federation.training import train_federated as train_federated
from .priors.autoencoder import (
    AnomalyScore as AnomalyScore,
    Autoencoder as Autoencoder,
    load_prior as load_prior,
    train_autoencoder as train_autoencoder,
)
from .priors.gan import (
    GenerativePrior as GenerativePrior,
    load_generator as load_generator,
    train_generator as train_generator,
)

__version__: str
