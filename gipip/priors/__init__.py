"""What an attacker learns from auxiliary images."""

from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior, train_autoencoder
from gipip.priors.gan import GenerativePrior, Generator, load_generator, train_generator

__all__ = [
    "AnomalyScore",
    "Autoencoder",
    "GenerativePrior",
    "Generator",
    "load_generator",
    "load_prior",
    "train_autoencoder",
    "train_generator",
]
