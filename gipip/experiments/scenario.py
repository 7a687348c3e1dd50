"""What is attacked, and with what: a Scenario × an attack is a Run."""

import functools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from gipip.attacks.base import Attack
from gipip.data.datasets import Dataset, LabeledImages, load_dataset
from gipip.experiments.version import code_version
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.defenses import AnyDefense
from gipip.federation.models import ClientModel, build_model, load_model, model_fingerprint
from gipip.files import canonical_json, fingerprint

Seed = Annotated[int, Field(ge=0, lt=2**63)]


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
    model_seed: Seed = 0
    epochs: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    seed: Seed = 0
    distinct_labels: bool = True
    mode: Literal["eval", "train"] = "eval"
    labels: Literal["given", "withheld"] = "given"
    statistics: Literal["shared", "withheld"] = "withheld"
    fedavg: FedAvg | None = None
    defenses: tuple[AnyDefense, ...] = ()

    def batch(self) -> LabeledImages:
        """The private (or tuning) images."""
        draw = getattr(_dataset(self.dataset, self.classes), self.pool)
        return draw(
            batch_size=self.batch_size, seed=self.seed, distinct_labels=self.distinct_labels
        )

    def candidates(self) -> LabeledImages:
        """The images among which a reconstruction should find its own: all of the batch's pool.

        Of a pool of more than 1,000 that many, each class in proportion, and the batch.
        """
        pool = getattr(_dataset(self.dataset, self.classes), f"{self.pool}_pool")
        rows, own = pool.shuffled("candidates"), set(self.batch().indices.tolist())
        others = [row for row in rows[1000:] if int(pool.indices[row]) in own]
        return pool[rows[:1000] + others]

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
        model = f"{self.model}@{self.epochs}" if self.epochs else self.model
        parts = [self.dataset.split("-")[0], model, f"B={self.batch_size}"]
        if self.fedavg:
            parts.append(f"FedAvg {self.fedavg.steps}")
        return "/".join([*parts, *map(str, self.defenses)])


@functools.cache
def _dataset(name: str, classes: tuple[int, ...] = ()) -> Dataset:
    data = load_dataset(name)
    return data.restricted(classes) if classes else data


@dataclass(frozen=True)
class Run:
    """One attack on one scenario. `arm` names it in tables and figures, not in the result's key."""

    arm: str
    scenario: Scenario
    attack: Attack

    def config(self) -> dict:
        """Everything the result depends on but data, weights and code, as JSON."""
        attack = {"name": type(self.attack).__name__, **self.attack.model_dump(mode="json")}
        return {"scenario": self.scenario.model_dump(mode="json"), "attack": attack}

    def key(self, code: str | None = None) -> str:
        """Hash of the configuration, the private images, the client's weights, the
        prior (which the attack names) and the version of the `code` that computes, by
        default the present one's.
        """
        version = code_version(type(self.attack)) if code is None else code
        return result_key(self.config(), self.scenario, version)


def result_key(config: dict, scenario: Scenario, code: str) -> str:
    """32 hex digits, from the `config` of a run on a scenario: see `Run.key`."""
    model, batch = _fingerprints(scenario)
    about = config | {"model": model, "batch": batch}
    return fingerprint({}, canonical_json(about) + code)[:32]


@functools.cache
def _fingerprints(scenario: Scenario) -> tuple[str, str]:
    about = scenario.model_dump(include={"dataset", "model", "model_seed", "epochs"})
    return _weights_fingerprint(**about), scenario.batch().fingerprint


@functools.cache
def _weights_fingerprint(**about) -> str:
    return model_fingerprint(Scenario(**about).client_model())
