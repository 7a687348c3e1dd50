"""What an attack takes where a person at the command line or the explorer chooses nothing."""

import contextlib

from gipip.attacks.base import Attack
from gipip.attacks.gipip import GIPIP
from gipip.attacks.presets import tuned
from gipip.data.datasets import Dataset
from gipip.errors import DataError
from gipip.experiments.arms import EQUAL
from gipip.federation.models import ClientModel, Mode
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.base import Prior
from gipip.priors.decoder import FeatureDecoder, train_decoder


def priors_for(
    kind: type[Attack],
    data: Dataset,
    client: ClientModel | None = None,
    mode: Mode = "eval",
    score: AnomalyScore | None = None,
) -> dict[str, Prior]:
    """Settings of an attack that say what it knows of natural images; empty if it takes none.

    What ships for `data`, an anomaly score at c = 0; or, in closed form within seconds,
    a decoder for the `client` in its `mode`, fitted to the auxiliary images of `data`.
    `score`: takes the place of the shipped one. Raises DataError when nothing fits.
    """
    if "prior" not in kind.model_fields:
        return {}
    wanted = kind.model_fields["prior"].annotation
    name = data.name.split("-")[0]
    if wanted is FeatureDecoder and client is not None:
        decoder = train_decoder(client, data.auxiliary(), mode=mode, steps=0)
        return {"prior": decoder, "score": score or load_prior(name).with_offset(0)}
    if wanted is AnomalyScore:
        return {"prior": score or load_prior(name).with_offset(0)}
    granted = "cifar10-3.8%" if name == "cifar10" else name  # as many images as in the paper
    return {"prior": wanted.shipped(granted)}  # type: ignore[union-attr]


def tuned_for(kind: type[Attack], condition: str) -> dict:
    """The settings of an attack that were tuned for a `Scenario.condition`; of GIPIP
    else those at the baseline's λ_TV. Empty when none ship.
    """
    for arm in (kind.__name__, EQUAL) if kind is GIPIP else (kind.__name__,):
        with contextlib.suppress(DataError):
            return tuned(arm, condition)
    return {}
