"""What the updates of your own federated learning give away: attacked within a given time, judged
beside pictures that need no attack, and written down as one page.

    audit = gipip.audit(model, images, labels, defenses=[gipip.GaussianNoise(std=1e-3)], minutes=10)
    audit.page  # results/audit/audit.html; beside it audit.json

What a defence leaves of an update is a *condition*; a *case* is one update, of one batch under one
condition. Every finished attack is kept: the same call loads it, and goes on with what is left.
"""

import base64
import copy
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import pandas
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

import gipip
from gipip.attacks.base import Attack
from gipip.attacks.checkpoints import Checkpoint
from gipip.attacks.feature_inversion import FeatureInversion
from gipip.attacks.features import recovered
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.labels import infer_labels
from gipip.data.datasets import LabeledImages, described, load_dataset
from gipip.errors import (
    BatchSizeError,
    DamagedFileError,
    DataError,
    DefenseError,
    GipipError,
    OutOfTime,
)
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.references import REFERENCES, references
from gipip.evaluation.statistics import bootstrap_interval, paired_difference
from gipip.experiments.sweep import provenance
from gipip.experiments.version import code_version
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.models import (
    ClientModel,
    Images,
    Mode,
    last_linear,
    model_fingerprint,
    prepared,
)
from gipip.files import canonical_json, fingerprint, read_tensors, set_aside, write_tensors
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.decoder import FeatureDecoder, train_decoder
from gipip.progress import progress, quiet

METRICS = ("psnr", "ssim", "lpips", "identified")
LEVELS = {
    "nothing": "no closer than its mean colour",
    "colour": "closer than its mean colour: colours and light",
    "outline": "closer than its own 4×4 thumbnail: outlines, an object may be guessed",
    "content": "closer than its own 8×8 thumbnail: a person can tell what is on it",
}
"""How much of an image is recovered, from least to most."""

_LINES = {"colour": "mean colour", "outline": "4×4 thumbnail", "content": "8×8 thumbnail"}
_EXACT = 0.01  # relative error of an image's features
_MOST_ITERATIONS, _ENOUGH_ITERATIONS = 300, 100
_TUNED_SIZES = (1, 4, 8)  # of batches, for which weights ship
_SHOWN = 12
_TEMPLATE = Path(__file__).with_name("audit.html")
_FINEST = 2**22  # pixels of all candidates together, for the memory of LPIPS


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    `page`: one self-contained HTML file, to hand on; `findings`: what it says, as data; it stands
    in `audit.json` beside it. `frame`: a row for each condition, attack and image; empty without
    private images.
    """

    page: Path
    findings: dict[str, Any]
    frame: pandas.DataFrame

    def __str__(self) -> str:
        lines = []
        for condition in self.findings["conditions"]:
            verdict = condition["verdict"]
            lines.append(f"{condition['name']}: {verdict['risk']}. {verdict['summary']}")
        return "\n".join([*lines, f"Page: {self.page}"])


def audit(
    model: ClientModel,
    images: LabeledImages | Images | None = None,
    labels: Tensor | None = None,
    *,
    updates: SharedUpdate | Sequence[SharedUpdate] = (),
    defenses: Sequence[Any] = (),
    fedavg: FedAvg | None = None,
    mode: Mode = "eval",
    share_labels: bool = False,
    batch_size: int = 4,
    auxiliary: LabeledImages | None = None,
    train: Callable[[Sequence[Any]], float] | None = None,
    minutes: float = 10,
    seeds: int = 2,
    folder: Path | str = "results/audit",
) -> Audit:
    """What a client with `model` gives away of `images`: attacked, judged, and written as
    `folder`/audit.html and audit.json.

    `images`: float32 in [0, 1], (count, 3, height, width), with `labels`, or LabeledImages; the
    client's batches hold `batch_size` of them. `updates`: captured ones to attack, instead of those
    that a client is simulated to share; without images there are only reconstructions and no
    measures. `defenses`: each, a defence or a list of them, is compared with none. `fedavg`,
    `mode`: as of `Client.share`. `share_labels`: by default the attacker has to infer them.
    `auxiliary`: other images of the same kind, which the attacker owns; by default CIFAR-10's 1,900
    that ship, scaled. `train(defenses)`: trains under such a list, empty for none, and gives the
    accuracy in [0, 1]; its time comes on top. `minutes`: for all attacks together, from which the
    number of iterations follows. `seeds`: random starts of each attack; the one of lowest
    attacker-visible cost counts.

    What is finished is kept in `folder`: after an interruption, or when the time was too short, the
    same call goes on. Raises DataError, LabelError, BatchSizeError, ModelError, DefenseError or
    UpdateError for what cannot be used, before any attack.
    """
    if not (math.isfinite(minutes) and minutes > 0) or seeds < 1:
        raise DataError(f"Expected minutes > 0 and seeds ≥ 1; got {minutes} and {seeds}.")
    ends = time.time() + 60 * minutes
    updates = [updates] if isinstance(updates, SharedUpdate) else list(updates)
    truth = _as_images(images, labels)
    options: dict[str, Any] = {"fedavg": fedavg, "mode": mode}
    options["labels"] = "given" if share_labels else "withheld"
    model = copy.deepcopy(model).to("cuda" if torch.cuda.is_available() else "cpu")
    if updates:
        cases = _captured(model, updates, truth)
    else:
        cases = _simulated(model, truth, batch_size, defenses, options)
    work = _Work(model, cases, Path(folder), minutes, seeds, ends, auxiliary)
    work.attack()
    costs = _accuracies(train, defenses, work) if train and not updates else {}
    return _written(work, costs)


# What is attacked -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    """One update: of which condition, of which batch, and what the batch held, if it is known."""

    condition: str
    batch: int
    share: Callable[[], SharedUpdate]  # made when it is needed: a large model's fill the memory
    truth: LabeledImages | None

    @cached_property
    def fingerprint(self) -> str:
        update = self.share()
        tensors = dict(zip(update.parameter_names, update.gradients, strict=True))
        if update.labels is not None:
            tensors["labels"] = update.labels
        about = [update.mode, str(update.fedavg), update.batch_size, update.model_fingerprint]
        return fingerprint(tensors, canonical_json(about))


def _as_images(images: Any, labels: Tensor | None) -> LabeledImages | None:
    if images is None or isinstance(images, LabeledImages):
        return images
    if labels is None:
        raise DataError("Expected the images' labels: gipip.audit(model, images, labels).")
    return LabeledImages(images, labels)


def _simulated(
    model: ClientModel,
    images: LabeledImages | None,
    batch_size: int,
    defenses: Sequence[Any],
    options: dict[str, Any],
) -> list[_Case]:
    """What a client shares of each batch, without a defence and under each."""
    if images is None or not 1 <= batch_size <= len(images):
        found = "none" if images is None else len(images)
        raise BatchSizeError(
            f"Expected at least one batch of {batch_size} images, or captured updates; got {found}."
        )
    client, cases = Client(model), []
    for policy in ([], *map(_as_list, defenses)):
        name = ", then ".join(map(str, policy)) or "no defence"
        if any(case.condition == name for case in cases):
            raise DefenseError(f"The defence {name!r} is given twice. Give each once.")
        for batch, part in enumerate(_parts(images, [batch_size] * (len(images) // batch_size))):
            share = partial(client.share, part, defenses=policy, **options)
            cases.append(_Case(name, batch, share, part))
    for case in cases:
        if case.batch == 0:
            case.share()  # raises what is wrong before any attack
    return cases


def _as_list(policy: Any) -> list[Any]:
    return list(policy) if isinstance(policy, Sequence) else [policy]


def _parts(images: LabeledImages, sizes: Iterable[int]) -> Iterator[LabeledImages]:
    start = 0
    for size in sizes:
        yield images[start : start + size]
        start += size


def _captured(
    model: ClientModel, updates: Sequence[SharedUpdate], images: LabeledImages | None
) -> list[_Case]:
    """The updates, with the images behind them, in the same order, if they are known."""
    sizes = [update.batch_size for update in updates]
    if images is not None and len(images) != sum(sizes):
        raise BatchSizeError(
            f"{len(images)} images for updates of {sizes}. Expected all images behind the updates, "
            "in the same order, or none."
        )
    truth = [None] * len(sizes) if images is None else _parts(images, sizes)
    cases = []
    for batch, (update, part) in enumerate(zip(updates, truth, strict=True)):
        update.check(model)
        name = ", then ".join(update.defenses) or "as captured"
        cases.append(_Case(name, batch, partial(_same, update), part))
    return cases


def _same(update: SharedUpdate) -> SharedUpdate:
    return update


# Attacking ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """A finished attack on a case."""

    case: _Case
    arm: str
    images: Images
    about: dict[str, Any]

    @property
    def cost(self) -> float:
        """That the attacker sees."""
        return math.inf if self.about["cost"] is None else self.about["cost"]


@dataclass(eq=False)
class _Work:
    """The attacks of an audit: planned, run within the time, kept in a folder one by one."""

    model: ClientModel
    cases: list[_Case]
    folder: Path
    minutes: float
    seeds: int
    ends: float
    given: LabeledImages | None  # auxiliary images

    def __post_init__(self) -> None:
        first = self.cases[0].share()
        self.shape, self.size, self.mode = first.image_shape, first.batch_size, first.mode
        self.conditions = list(dict.fromkeys(case.condition for case in self.cases))
        self.auxiliary = _auxiliary(self.given, self.shape)
        self.pieces: list[_Piece] = []
        self.impossible: dict[tuple[str, str], str] = {}  # condition and arm: why
        self.left = 0

    # Who attacks ----------------------------------------------------------------------

    @cached_property
    def score(self) -> AnomalyScore | None:
        """The shipped one for images of about this size."""
        score = load_prior("cifar10" if max(self.shape[-2:]) <= 48 else "imagenet64")
        return None if score.network.misfit(self.shape) else score.with_offset(0)

    @cached_property
    def decoder(self) -> FeatureDecoder | str:
        """Of features, in closed form; or the reason why there is none."""
        auxiliary = self.auxiliary[: self.plan["auxiliary"]]
        options: dict[str, Any] = {"mode": self.mode, "store": self.folder}
        try:
            return train_decoder(self.model, auxiliary, copies=2, steps=0, **options)
        except GipipError as error:
            return str(error)

    def matching(self, **settings) -> InvertingGradients:
        """Gradient matching, with the weights tuned for CIFAR-10 and the nearest batch size."""
        nearest = max(size for size in _TUNED_SIZES if size <= self.size)
        condition = f"cifar10/convnet/B={nearest}"
        if self.score is None:
            return InvertingGradients.tuned(condition, **settings)
        return GIPIP.tuned(condition, prior=self.score, **settings)

    def attacks(self) -> Iterator[tuple[str, Attack]]:
        """By the names of their arms. Those that cost nothing come first, further seeds last."""
        iterations = self.plan["iterations"]
        if isinstance(self.decoder, FeatureDecoder):
            features = FeatureInversion(prior=self.decoder, score=self.score, iterations=0)
            yield "features, decoded", features
            fewer = {"iterations": math.ceil(iterations / 3)}  # as its start is near
            yield "features, refined", features.model_copy(update=fewer)
        for seed in range(self.plan["seeds"]):
            attack = self.matching(iterations=iterations, seed=seed)
            name = "Inverting Gradients" if self.score is None else "GI-PIP"
            yield name, attack
            yield (
                f"{name}, smoother",
                attack.model_copy(update={"tv_weight": 10 * attack.tv_weight}),
            )

    # When -----------------------------------------------------------------------------

    @cached_property
    def plan(self) -> dict[str, int]:
        """How many iterations and seeds an attack gets, and a decoder how many auxiliary images, so
        that all fits into the time. Kept, so that the same call goes on with the same attacks.
        """
        about = [model_fingerprint(self.model), self.shape, self.size, self.minutes, self.seeds]
        path = self.folder / "plans" / f"{fingerprint({}, canonical_json(about))[:16]}.json"
        if not path.exists():
            planned = self.planned(60 * self.minutes)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(planned))
        return json.loads(path.read_text())

    def planned(self, seconds: float) -> dict[str, int]:
        """A tenth of the time for a decoder, about half of it for iterations: the rest is for what
        cannot be foreseen.
        """
        setup, iteration = self.measured()
        started = time.perf_counter()
        with torch.no_grad():
            self.model(self.auxiliary[:16].images.to(next(self.model.parameters())))
        image = (time.perf_counter() - started) / 16
        count = min(seconds / 10 / image / 2, 3e8 / self.auxiliary.pixels[0].numel() / 2)
        for seeds in range(self.seeds, 0, -1):
            full = len(self.cases) * (2 * seeds + 1 / 3)
            free = 0.55 * seconds - setup * len(self.cases) * (2 * seeds + 2)
            iterations = int(free / full / iteration)
            if iterations >= _ENOUGH_ITERATIONS:
                break
        iterations = min(max(iterations, 10), _MOST_ITERATIONS)
        return {"auxiliary": max(16, int(count)), "iterations": iterations, "seeds": seeds}

    def measured(self) -> tuple[float, float]:
        """Seconds until an attack on the first case begins, and of an iteration."""
        clock = [time.perf_counter()]
        attack = self.matching(iterations=6)
        with quiet():
            attack(self.model, self.cases[0].share(), watch=partial(_tick, clock), watch_every=1)
        iterations = [later - sooner for sooner, later in pairwise(clock[1:])]
        return clock[1] - clock[0], median(iterations)

    # How ------------------------------------------------------------------------------

    def attack(self) -> None:
        """Everything, or as much as the time allows."""
        todo = [(case, *named) for named in self.attacks() for case in self.cases]
        total, done = sum(attack.iterations for _, _, attack in todo), 0
        with progress(total=total, description="attacks", unit="iteration") as bar:
            for case, arm, attack in todo:
                self.attempt(case, arm, attack, partial(_advance, bar, done))
                done += attack.iterations
                _advance(bar, done)
        if not self.pieces:
            reasons = "; ".join(sorted({*self.impossible.values()})) or "the time was too short"
            raise GipipError(f"No attack was possible: {reasons}.")

    def attempt(self, case: _Case, arm: str, attack: Attack, watch: Callable) -> None:
        about = [case.fingerprint, type(attack).__name__, attack.model_dump(mode="json")]
        key = fingerprint({}, canonical_json(about) + code_version(type(attack)))[:32]
        checkpoint = Checkpoint(self.folder / "unfinished" / key, self.ends, run=key)
        path = self.folder / "attacks" / f"{key}.safetensors"
        try:
            with quiet():
                make = partial(self.computed, case, attack, watch, checkpoint)
                tensors, details = _kept(path, make)
        except OutOfTime:
            self.left += 1
        except GipipError as error:
            self.impossible[case.condition, arm] = str(error)
        else:
            checkpoint.remove()
            self.pieces.append(_Piece(case, arm, tensors["images"], details))

    def computed(
        self, case: _Case, attack: Attack, watch: Callable, checkpoint: Checkpoint
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if time.time() >= self.ends:
            raise OutOfTime("The time is over.")
        found = attack(self.model, case.share(), watch=watch, checkpoint=checkpoint)
        if found.interrupted:  # half a result must not be stored as a whole one
            raise KeyboardInterrupt
        details = {
            "assumptions": found.assumptions,
            "settings": attack.model_dump(mode="json"),
            "cost": found.cost if math.isfinite(found.cost) else None,
            "seconds": found.seconds,
            "engine": found.engine,
            "notes": found.notes,
        }
        return {"images": found.images, "labels": found.labels}, details

    def chosen(self) -> list[_Piece]:
        """Of the seeds of each arm on each case the one of lowest attacker-visible cost."""
        best: dict[tuple[str, str, int], _Piece] = {}
        for piece in sorted(self.pieces, key=attrgetter("cost")):
            best.setdefault((piece.arm, piece.case.condition, piece.case.batch), piece)
        return list(best.values())

    # What needs no iterations ---------------------------------------------------------

    def exact(self, case: _Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Labels and features that the last layer gives away, or why it does not."""
        path = self.folder / "features" / f"{case.fingerprint[:32]}.safetensors"
        return _kept(path, partial(self.recovered, case.share()))

    def recovered(self, update: SharedUpdate) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, about = {}, {}
        try:
            tensors["inferred"] = infer_labels(self.model, replace(update, labels=None)).cpu()
        except GipipError as error:
            about["labels"] = str(error)
        try:
            found = recovered(self.model, update)
        except GipipError as error:
            return tensors, about | {"features": str(error)}
        tensors |= {"features": found.features, "errors": found.errors}
        return tensors, about | {"status": found.status}

    @torch.no_grad()
    def true_errors(self, case: _Case, features: Tensor) -> Tensor:
        """Relative errors of recovered features, each matched to an image."""
        assert case.truth
        model = copy.deepcopy(self.model).train(self.mode == "train")
        inputs, _ = prepared(model, case.truth)
        truth = last_linear(model.network, inputs)[1].cpu().double()
        errors = torch.cdist(features, truth) / truth.norm(dim=1)
        rows, columns = linear_sum_assignment(errors.nan_to_num(10).clamp(max=10))
        return errors[rows, columns]


def _auxiliary(given: LabeledImages | None, shape: tuple[int, ...]) -> LabeledImages:
    """The attacker's images, as large as the private ones."""
    if given is None:
        pool = load_dataset("cifar10").auxiliary()
        scaled = interpolate(pool.images, shape[-2:], mode="bilinear", antialias=True)
        return LabeledImages(scaled.clamp(0, 1), pool.labels)
    if tuple(given.pixels.shape[1:]) != shape:
        found = f"{described(given.pixels)}, the private ones {shape}"
        raise DataError(f"The auxiliary images are {found}. Scale them to the same size.")
    return given[given.shuffled("audit")]


def _tick(clock: list[float], *_) -> None:
    clock.append(time.perf_counter())


def _advance(bar: Any, done: int, more: int = 0, *_) -> None:
    """So many iterations of earlier attacks, and of the present one."""
    bar.update(done + more - bar.n)


def _kept(path: Path, compute: Callable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of a file, or what is computed instead, and kept there."""
    if path.exists():
        try:
            return read_tensors(path)
        except DamagedFileError as error:
            aside = set_aside(path).name
            warnings.warn(f"{error} It is set aside as {aside} and computed again.", stacklevel=2)
    tensors, about = compute()
    write_tensors(path, tensors, about)
    return tensors, about


# Judging --------------------------------------------------------------------------


def _frame(work: _Work) -> pandas.DataFrame:
    """A row for each condition, arm and image: how close, and how much of it was recovered. What
    needs no attack are arms as well, of the condition "".
    """
    truths = {case.batch: case.truth.images for case in work.cases if case.truth}
    if not truths:
        return pandas.DataFrame()
    mean = work.auxiliary.images.mean(dim=0)
    room = max(1, _FINEST // math.prod(work.shape[-2:]))
    pool = torch.cat([*truths.values(), work.auxiliary[:1000].images])
    pool = pool[: max(room, sum(map(len, truths.values())))]
    frames = []
    for batch, truth in truths.items():
        for arm, images in references(truth, mean).items():
            about: dict[str, Any] = {"condition": "", "arm": arm, "batch": batch}
            frames.append(evaluate(images, truth, pool=pool).assign(**about))
    for piece in progress(work.chosen(), description="measuring", unit="attack"):
        about = {"condition": piece.case.condition, "arm": piece.arm, "batch": piece.case.batch}
        table = evaluate(piece.images, truths[piece.case.batch], pool=pool)
        frames.append(table.assign(**about))
    return _with_levels(pandas.concat(frames, ignore_index=True))


def _with_levels(frame: pandas.DataFrame) -> pandas.DataFrame:
    """With the level of each row: that of the highest line that it passes."""
    level = pandas.Series("nothing", frame.index)
    for name, line in _LINES.items():
        lines = frame[frame["arm"] == line].set_index(["batch", "image"])
        lines = lines.loc[list(zip(frame["batch"], frame["image"], strict=True))]
        lines.index = frame.index
        passed = frame["ssim"] > lines["ssim"]
        passed &= (frame["psnr"] > lines["psnr"]) | (frame["lpips"] < lines["lpips"])
        level[passed] = name
    return frame.assign(level=level)


def _measures(part: pandas.DataFrame) -> dict[str, Any]:
    """Means with intervals over batches, as [mean, low, high], and how many reach each level."""
    measures: dict[str, Any] = {"images": len(part), "batches": part["batch"].nunique()}
    for name in METRICS:
        if part[name].notna().all():
            interval = bootstrap_interval(part[name], groups=part["batch"])
            measures[name] = [None if math.isnan(value) else float(value) for value in interval[:3]]
    counts = part["level"].value_counts()
    return measures | {"levels": {name: int(counts.get(name, 0)) for name in LEVELS}}


def _strength(part: pandas.DataFrame) -> tuple[float, float]:
    return float(part["level"].map(list(LEVELS).index).mean()), float(part["ssim"].mean())


def _condition(work: _Work, name: str, frame: pandas.DataFrame) -> dict[str, Any]:
    """All that was found under one condition."""
    found: dict[str, Any] = {"name": name, "exact": _exact(work, name), "attacks": []}
    pieces = [piece for piece in work.chosen() if piece.case.condition == name]
    for arm in dict.fromkeys(piece.arm for piece in pieces):
        about = next(piece.about for piece in pieces if piece.arm == arm)
        seconds = sum(piece.about["seconds"] for piece in pieces if piece.arm == arm)
        attack = {"name": arm, **about, "seconds": seconds}
        if len(frame):
            part = frame[(frame["condition"] == name) & (frame["arm"] == arm)]
            attack |= _measures(part) | {"strength": _strength(part)}
        found["attacks"].append(attack)
    found["attacks"].sort(key=lambda attack: attack.get("strength", ()), reverse=True)
    for (condition, arm), reason in work.impossible.items():
        if condition == name:
            found["attacks"].append({"name": arm, "impossible": reason})
    return found | {"verdict": _verdict(found, frame)}


def _exact(work: _Work, condition: str) -> dict[str, Any]:
    """Of how many images the labels and features are recovered, without any iteration."""
    counts: dict[str, Any] = dict.fromkeys(("images", "labels", "claimed", "confirmed"), 0)
    for case in work.cases:
        if case.condition != condition:
            continue
        tensors, about = work.exact(case)
        counts["images"] += case.share().batch_size
        if case.truth and "inferred" in tensors:
            counts["labels"] += _common(tensors["inferred"], case.truth.labels)
        if "features" in tensors:
            counts["claimed"] += int((tensors["errors"] < _EXACT).sum())
        if case.truth and "features" in tensors:
            errors = work.true_errors(case, tensors["features"])
            counts["confirmed"] += int((errors < _EXACT).sum())
        counts |= {"no " + what: about[what] for what in ("labels", "features") if what in about}
    return counts


def _common(labels: Tensor, others: Tensor) -> int:
    """How many of the labels are the same, in whichever order."""
    return sum(min(int((labels == c).sum()), int((others == c).sum())) for c in labels.unique())


def _verdict(found: dict[str, Any], frame: pandas.DataFrame) -> dict[str, Any]:
    """The risk, in one word, and what it follows from."""
    exact, reasons = found["exact"], []
    known = "confirmed" if len(frame) else "claimed"
    if exact[known]:
        reasons.append(
            f"The features of {exact[known]} of {exact['images']} images are recovered to within "
            "1 %: what the network's last layer sees of them, the server has."
        )
    if not len(frame):
        summary = "Without the private images nobody can say how close the pictures come."
        return {"risk": "unknown", "summary": summary, "reasons": reasons}
    strongest = found["attacks"][0]
    images, levels = strongest["images"], strongest["levels"]
    for level in ("content", "outline"):
        if levels[level]:
            text = f"{levels[level]} of {images} images come {LEVELS[level]} ({strongest['name']})."
            reasons.append(text)
    linkable = _linkable(found["name"], strongest["name"], frame)
    if "identified" in strongest:
        share = round(strongest["identified"][0] * images)
        among = f"among {frame['candidates'].max():.0f} candidates"
        than = "more" if linkable else "not surely more"
        text = f"{share} of {images} images are identified {among}, {than} than by mean colour."
        reasons.append(text)
    if levels["content"]:
        risk, summary = "high", "Private images are recovered well enough to tell what is on them."
    elif levels["outline"] or linkable or exact["confirmed"]:
        risk, summary = "medium", "No image is recovered clearly, but something of them is."
    else:
        risk, summary = "low", "Nothing but colours was recovered within this time."
    return {"risk": risk, "summary": summary, "reasons": reasons}


def _linkable(condition: str, arm: str, frame: pandas.DataFrame) -> bool:
    """Whether images are identified more often than by their mean colour, surely."""
    keyed = frame.set_index(["batch", "image"])["identified"]
    ours = keyed[((frame["condition"] == condition) & (frame["arm"] == arm)).to_numpy()]
    lines = keyed[(frame["arm"] == "mean colour").to_numpy()].loc[ours.index]
    if ours.isna().any():
        return False
    return paired_difference(ours, lines, groups=ours.index.get_level_values(0)).low > 0


# Writing --------------------------------------------------------------------------


def _accuracies(
    train: Callable[[Sequence[Any]], float], defenses: Sequence[Any], work: _Work
) -> dict[str, float]:
    """What `train` reaches under each condition; kept, as it may take long."""
    path = work.folder / "accuracies.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    policies = ([], *map(_as_list, defenses))
    found = {}
    pairs = list(zip(work.conditions, policies, strict=True))
    for name, policy in progress(pairs, description="training", unit="training"):
        key = f"{model_fingerprint(work.model)[:16]} {name}"
        if key not in known:
            known[key] = float(train(policy))
            path.write_text(json.dumps(known, indent=1))
        found[name] = known[key]
    return found


def _written(work: _Work, accuracies: Mapping[str, float]) -> Audit:
    frame = _frame(work)
    conditions = [_condition(work, name, frame) for name in work.conditions]
    for condition in conditions:
        condition["accuracy"] = accuracies.get(condition["name"])
    lines = [
        {"name": name} | _measures(frame[(frame["arm"] == name)])
        for name in REFERENCES
        if len(frame)
    ]
    findings = _about(work) | {"conditions": conditions, "references": lines}
    pictures = {
        name: _pictures(work, conditions[i], frame) for i, name in enumerate(work.conditions)
    }
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = template.from_string(_TEMPLATE.read_text())
    page = template.render(findings, pictures=pictures)
    for name, text in (("audit.json", json.dumps(findings, indent=1)), ("audit.html", page)):
        (work.folder / name).write_text(text)
    return Audit(work.folder / "audit.html", findings, frame)


def _about(work: _Work) -> dict[str, Any]:
    """What was attacked, by whom, for how long."""
    update, model = work.cases[0].share(), work.model
    local = "one gradient (FedSGD)"
    if update.fedavg:
        local = f"{update.fedavg.steps} local steps (FedAvg)"
    return {
        "made": provenance() | {"gipip": gipip.__version__, "threads": torch.get_num_threads()},
        "model": type(model.network).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size": "×".join(map(str, work.shape[:0:-1])),
        "batches": len({case.batch for case in work.cases}),
        "batch_size": update.batch_size,
        "training": local,
        "BatchNorm": update.mode,
        "labels": "withheld" if update.labels is None else "shared",
        "minutes": work.minutes,
        "plan": work.plan,
        "left": work.left,
        "auxiliary": "given" if work.given else "CIFAR-10, scaled",
        "levels": LEVELS,
    }


def _pictures(
    work: _Work, condition: dict[str, Any], frame: pandas.DataFrame
) -> list[dict[str, Any]]:
    """Of each attack that was possible, best first, the images, worst cases first."""
    groups = []
    for attack in condition["attacks"]:
        pieces = [
            piece
            for piece in work.chosen()
            if (piece.case.condition, piece.arm) == (condition["name"], attack["name"])
        ]
        if pieces:
            shown = [picture for piece in pieces for picture in _shown(piece, frame)]
            shown.sort(key=lambda picture: picture.get("order", ()), reverse=True)
            groups.append({"name": attack["name"], "images": shown[:_SHOWN]})
    return groups


def _shown(piece: _Piece, frame: pandas.DataFrame) -> Iterator[dict[str, Any]]:
    """The pictures of a piece, as data URIs, with what was measured."""
    if not piece.case.truth:
        for image in piece.images:
            yield {"reconstruction": _png(image)}
        return
    truth = piece.case.truth.images
    thumbnails = references(truth, truth[0])
    wanted = {"condition": piece.case.condition, "arm": piece.arm, "batch": piece.case.batch}
    rows = frame[(frame[list(wanted)] == pandas.Series(wanted)).all(axis=1)]
    for row in rows.to_dict("records"):
        index = row["image"]
        measured = {str(name): value for name, value in row.items()}
        yield measured | {
            "truth": _png(truth[index]),
            "reconstruction": _png(piece.images[row["matched"]]),
            "thumbnails": {
                side: _png(thumbnails[f"{side} thumbnail"][index]) for side in ("8×8", "4×4")
            },
            "order": (list(LEVELS).index(row["level"]), row["ssim"]),
        }


def _png(image: Tensor) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
