"""What an attacker learns from auxiliary images."""

from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior, train_autoencoder

__all__ = ["AnomalyScore", "Autoencoder", "load_prior", "train_autoencoder"]
