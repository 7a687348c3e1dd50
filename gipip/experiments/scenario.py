"""What is attacked, and how: everything that a result depends on, as data."""

import functools
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from gipip.attacks.base import Attack
from gipip.data.datasets import Dataset, LabeledImages, load_dataset
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.defenses import AnyDefense
from gipip.federation.models import ClientModel, build_model, load_model, model_fingerprint
from gipip.files import canonical_json, fingerprint


class Scenario(BaseModel):
    """One private batch of one client: what is attacked.

    `pool`: "private" for what is reported, "tuning" for choosing weights. `classes`:
    only images of these (none given: of all). `seed`: which batch of the pool.
    `model_seed`: the weights of an untrained client; `epochs`: above 0 the trained one
    that ships. `mode`: BatchNorm in eval or train mode. `labels`, `statistics`: shared
    with the update, or withheld. `fedavg`: local training before sharing. `defenses`:
    what the client does to its update, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "cifar10"
    pool: Literal["private", "tuning"] = "private"
    classes: tuple[int, ...] = ()
    model: str = "convnet"
    model_seed: int = 0
    epochs: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    seed: int = 0
    distinct_labels: bool = True
    mode: Literal["eval", "train"] = "eval"
    labels: Literal["given", "withheld"] = "given"
    statistics: Literal["shared", "withheld"] = "withheld"
    fedavg: FedAvg | None = None
    defenses: tuple[AnyDefense, ...] = ()

    def batch(self) -> LabeledImages:
        """The private (or tuning) images."""
        draw = getattr(_dataset(self.dataset, self.classes), self.pool)
        return draw(self.batch_size, seed=self.seed, distinct_labels=self.distinct_labels)

    def client_model(self) -> ClientModel:
        """The client's model, the same for the same seed or number of epochs."""
        if self.epochs:
            return load_model(self.model, self.dataset, self.epochs)
        data = _dataset(self.dataset)
        return build_model(
            self.model,
            data.num_classes,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            seed=self.model_seed,
        )

    def update(self, model: ClientModel) -> SharedUpdate:
        """What the client shares."""
        return Client(model).share(
            self.batch(),
            mode=self.mode,
            labels=self.labels,
            statistics=self.statistics,
            fedavg=self.fedavg,
            defenses=self.defenses,
        )

    @property
    def condition(self) -> str:
        """What attack weights are tuned for, as a key of data/tuned.json: data set,
        model, batch size, defences, local steps.

        Not in it: which images and labels, the seeds, BatchNorm's mode, and the local
        steps' mini-batches and learning rate.
        """
        parts = [self.dataset.split("-")[0], self.model, f"B={self.batch_size}"]
        if self.epochs:
            parts[1] += f"@{self.epochs}"
        if self.fedavg:
            parts.append(f"FedAvg {self.fedavg.steps}")
        return "/".join([*parts, *map(str, self.defenses)])


@functools.cache
def _dataset(name: str, classes: tuple[int, ...] = ()) -> Dataset:
    data = load_dataset(name)
    return data.restricted(classes) if classes else data


@dataclass(frozen=True)
class Run:
    """One attack on one scenario. `arm` names the attack in tables and figures; it is
    no part of the result's key.
    """

    arm: str
    scenario: Scenario
    attack: Attack

    def config(self) -> dict:
        """Everything the result depends on, as JSON."""
        attack = {"name": type(self.attack).__name__, **self.attack.model_dump(mode="json")}
        return {"scenario": self.scenario.model_dump(mode="json"), "attack": attack}

    def key(self) -> str:
        """Hash of the configuration and of the fingerprints of private images, client
        weights and prior (which the attack names).
        """
        model, batch = _fingerprints(self.scenario)
        content = canonical_json(self.config() | {"model": model, "batch": batch})
        return fingerprint({}, content)[:32]


@functools.cache
def _fingerprints(scenario: Scenario) -> tuple[str, str]:
    about = scenario.model_dump(include={"dataset", "model", "model_seed", "epochs"})
    return _weights_fingerprint(**about), scenario.batch().fingerprint


@functools.cache
def _weights_fingerprint(**about) -> str:
    return model_fingerprint(Scenario(**about).client_model())
