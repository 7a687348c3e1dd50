"""What the updates of your own federated learning give away: attacked within a given
time, judged beside pictures that need no attack, and written down as one page.

    audit = gipip.audit(model, images, labels, defenses=[gipip.GaussianNoise(std=1e-3)], minutes=10)
    audit.page  # results/audit/audit.html; beside it audit.json

What a defence leaves of updates is a *condition*; a *case* is one update, of one batch,
under one condition. Every finished attack is kept: the same call loads it, and goes on
with what is left.
"""

import base64
import copy
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

import gipip
from gipip.data.datasets import LabeledImages, described, load_dataset
from gipip.errors import BatchSizeError, DataError, DefenseError
from gipip.evaluation.recovery import LEVELS, linkable, recovery, summary
from gipip.evaluation.references import REFERENCES, references
from gipip.experiments.sweep import provenance
from gipip.experiments.timed import Case, Result, Work
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.models import ClientModel, Images, Mode, check_client_model
from gipip.progress import progress

_SHARE = 0.85  # of the time is for attacks; then their pictures are measured
_SHOWN = 12  # pictures of an attack
_TEMPLATE = Path(__file__).with_name("audit.html")


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    `page`: one self-contained HTML file, to hand on. `findings`: what it says, as data,
    which also stand in `audit.json` beside it. `frame`: a row for each condition,
    attack and image (see `gipip.evaluation.recovery`); empty without private images.
    """

    page: Path
    findings: dict[str, Any]
    frame: pandas.DataFrame

    def __str__(self) -> str:
        lines = []
        for condition in self.findings["conditions"]:
            verdict = condition["verdict"]
            lines.append(f"{condition['name']}: {verdict['risk']} risk. {verdict['summary']}")
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
    train: Callable[[list], float] | None = None,
    minutes: float = 10,
    seeds: int = 2,
    folder: Path | str = "results/audit",
) -> Audit:
    """What a client with `model` gives away of `images`: attacked, judged, and written
    as `folder`/audit.html and audit.json.

    `images`: float32 in [0, 1], (count, channels, height, width), with `labels`, or
    LabeledImages. They are taken in batches of `batch_size`; a rest is left out.
    `updates`: captured ones to attack, instead of those that a client is simulated to
    share; without images there are only reconstructions and no measures. `defenses`:
    each, a defence or a list of them, is compared with none. `fedavg`, `mode`: as of
    `Client.share`. `share_labels`: by default the attacker has to infer them.
    `auxiliary`: other images of the kind, which the attacker owns; by default
    CIFAR-10's 1,900 that ship, scaled. `train(defenses)`: trains under such a list,
    empty for none, and gives the accuracy in [0, 1]. `minutes`: for all attacks
    together, from which the number of iterations follows; the time of `train` comes on
    top. `seeds`: random starts of an attack, at most; the one of lowest
    attacker-visible cost counts.

    What is finished is kept in `folder`: after an interruption, or when the time was
    too short, the same call goes on. Raises DataError, LabelError, BatchSizeError,
    ModelError, DefenseError or UpdateError for what cannot be used, before any attack;
    GipipError when no attack is possible.
    """
    if not (math.isfinite(minutes) and minutes > 0 and seeds >= 1):
        raise DataError(f"Expected minutes > 0 and seeds ≥ 1; got {minutes} and {seeds}.")
    ends = time.time() + _SHARE * 60 * minutes
    check_client_model(model)
    model = copy.deepcopy(model).to(_device())
    if isinstance(images, Tensor):
        images = LabeledImages(images, labels)  # type: ignore[arg-type]  # which says what is wrong
    policies = {_name(each): each for each in ([], *map(_as_list, defenses))}
    if len(policies) <= len(defenses):
        raise DefenseError(f"A defence is given twice: {list(map(str, defenses))}. Give each once.")
    if updates:
        cases = _captured(model, updates, images)
    else:
        told: dict[str, Any] = {"labels": "given" if share_labels else "withheld"}
        share = partial(Client(model).share, fedavg=fedavg, mode=mode, **told)
        cases = _simulated(share, images, batch_size, policies)
    known = _auxiliary(auxiliary, cases[0].share().image_shape)
    work = Work(model, cases, Path(folder), minutes, seeds, ends, known)
    results = work.results()
    accuracies = {}
    if train and not updates:
        for name, policy in progress(policies.items(), description="training", unit="training"):
            accuracies[name] = work.accuracy(name, partial(train, policy))
    return _written(work, results, accuracies)


# What is attacked -----------------------------------------------------------------


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _as_list(policy: Any) -> list[Any]:
    return list(policy) if isinstance(policy, Sequence) else [policy]


def _name(policy: Sequence[Any], otherwise: str = "no defence") -> str:
    return ", then ".join(map(str, policy)) or otherwise


def _simulated(
    share: Callable[..., SharedUpdate],
    images: LabeledImages | None,
    batch_size: int,
    policies: dict[str, list[Any]],
) -> list[Case]:
    """What a client shares of each batch under each policy."""
    count = 0 if images is None else len(images)
    if images is None or not 1 <= batch_size <= count:
        raise BatchSizeError(
            f"Expected at least one batch of {batch_size} images, or captured updates; got {count} "
            "images."
        )
    rows = torch.arange(count // batch_size * batch_size).split(batch_size)
    cases = []
    for name, policy in policies.items():
        for batch, part in enumerate(images[each] for each in rows):
            cases.append(Case(name, batch, partial(share, part, defenses=policy), part))
        cases[-1].share()  # raises what is wrong before any attack
    return cases


def _captured(
    model: ClientModel, updates: SharedUpdate | Sequence[SharedUpdate], images: LabeledImages | None
) -> list[Case]:
    """The updates, with the images behind them, in the same order, if they are known."""
    updates = [updates] if isinstance(updates, SharedUpdate) else updates
    sizes = [update.batch_size for update in updates]
    if images is not None and len(images) != sum(sizes):
        raise BatchSizeError(
            f"{len(images)} images for updates of {sizes}. Expected all images behind the updates, "
            "in the same order, or none."
        )
    rows, cases = torch.arange(sum(sizes)).split(sizes), []
    for batch, update in enumerate(updates):
        update.check(model)
        part = None if images is None else images[rows[batch]]
        name = _name(update.defenses, "as captured")
        cases.append(Case(name, batch, partial(_on_device, update), part))
    return cases


def _on_device(update: SharedUpdate) -> SharedUpdate:
    gradients = tuple(gradient.to(_device()) for gradient in update.gradients)
    labels = None if update.labels is None else update.labels.to(_device())
    return replace(update, gradients=gradients, labels=labels)


def _auxiliary(given: LabeledImages | None, shape: tuple[int, ...]) -> LabeledImages:
    """The attacker's images, as large as the private ones."""
    if given is None:
        pool = load_dataset("cifar10").auxiliary()
        images = pool.images if shape[0] == 3 else pool.images.mean(dim=1, keepdim=True)
        scaled = interpolate(images, shape[-2:], mode="bilinear", antialias=True)
        return LabeledImages(scaled.clamp(0, 1), pool.labels)
    if tuple(given.pixels.shape[1:]) != shape:
        found = f"{described(given.pixels)}, the private ones {shape}"
        raise DataError(f"The auxiliary images are {found}. Scale them to the same size.")
    return given[given.shuffled("audit")]


# Judging --------------------------------------------------------------------------


def _condition(work: Work, name: str, results: list[Result], frame: pandas.DataFrame) -> dict:
    """All that was found under one condition; the most successful attack is first."""
    rows = frame[frame["condition"] == name]
    own = [result for result in results if result.case.condition == name]
    attacks = []
    for arm in _ranked(rows) or dict.fromkeys(result.arm for result in own):
        abouts = [result.about for result in own if result.arm == arm]
        seconds = sum(about["seconds"] for about in abouts)
        attacks.append({"name": arm} | abouts[0] | {"seconds": seconds})
        if len(rows):
            attacks[-1] |= summary(rows[rows["arm"] == arm])
    obstacles = {arm: why for (condition, arm), why in work.obstacles.items() if condition == name}
    found = {"name": name, "attacks": attacks, "obstacles": obstacles}
    found["exact"] = _exact(work, name)
    return found | {"verdict": _verdict(found, frame)}


def _ranked(rows: pandas.DataFrame) -> list[str]:
    """Names of arms, the best first: by mean level, then by SSIM."""
    if rows.empty:
        return []
    numbered = rows.assign(level=rows["level"].cat.codes)
    means = numbered.groupby("arm", sort=False)[["level", "ssim"]].mean()
    return means.sort_values(["level", "ssim"], ascending=False).index.tolist()


def _exact(work: Work, condition: str) -> dict[str, Any]:
    """Over all batches of a condition: counts, and the last obstacle of each kind."""
    total: dict[str, Any] = dict.fromkeys(("images", "labels", "claimed", "confirmed"), 0)
    for case in work.cases:
        if case.condition == condition:
            for name, value in work.exact(case).items():
                total[name] = value if isinstance(value, str) else total[name] + value
    return total


def _verdict(found: dict[str, Any], frame: pandas.DataFrame) -> dict[str, Any]:
    """The risk, in one word, and what it follows from."""
    exact, reasons = found["exact"], []
    sure = exact["confirmed" if len(frame) else "claimed"]
    if sure:
        reasons.append(
            f"The features of {sure} of {exact['images']} images are recovered to within 1 %: what "
            "the model's last layer sees of them, the server has."
        )
    if frame.empty or not found["attacks"]:
        text = "Without the private images nobody can say how close the pictures come."
        if not found["attacks"]:
            text = "No attack is finished. The same call goes on."
        return {"risk": "unknown", "summary": text, "reasons": reasons}
    best = found["attacks"][0]
    levels = best["levels"]
    rows = frame[(frame["condition"] == found["name"]) & (frame["arm"] == best["name"])]
    for level in ("content", "outline"):
        if levels[level]:
            text = f"{levels[level]} of {best['images']} images are at the level “{level}”"
            reasons.append(f"{text}: {LEVELS[level]} ({best['name']}).")
    linked = linkable(rows, frame)
    if "identified" in best:
        among = f"among {rows['candidates'].max():.0f} candidates"
        than = "more" if linked else "not surely more"
        text = f"{rows['identified'].sum():.0f} of {best['images']} pictures identify their image"
        reasons.append(f"{text} {among}, {than} than mean colours do.")
    risk, text = "low", "Nothing but colours was recovered within this time."
    if levels["outline"] or linked or sure:
        risk, text = "medium", "No image is recovered clearly, but something of them is."
    if levels["content"]:
        risk, text = "high", "Private images are recovered well enough to tell what is on them."
    return {"risk": risk, "summary": text, "reasons": reasons}


# Writing --------------------------------------------------------------------------


def _written(work: Work, results: list[Result], accuracies: dict[str, float]) -> Audit:
    truths = {case.batch: case.truth.images for case in work.cases if case.truth}
    frame, lines = pandas.DataFrame(columns=["condition"]), []
    if truths:
        named = {(each.case.condition, each.arm, each.case.batch): each.images for each in results}
        frame = recovery(named, truths, work.auxiliary.images)
        for name in REFERENCES:
            lines.append({"name": name} | summary(frame[frame["arm"] == name]))
    conditions = []
    for name in dict.fromkeys(case.condition for case in work.cases):
        found = _condition(work, name, results, frame)
        conditions.append(found | {"accuracy": accuracies.get(name)})
    findings = _about(work) | {"conditions": conditions, "references": lines}
    findings = json.loads(json.dumps(findings))  # as they are read again
    pictures = [_pictures(found, results, frame) for found in conditions]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text())
    page = work.folder / "audit.html"
    page.write_text(template.render(findings, pictures=pictures))
    page.with_suffix(".json").write_text(json.dumps(findings, indent=1))
    return Audit(page, findings, frame)


def _about(work: Work) -> dict[str, Any]:
    """What was attacked, by whom, for how long."""
    update, made = work.update, provenance()
    steps = update.fedavg.steps if update.fedavg else 0
    made |= {"gipip": gipip.__version__, "threads": torch.get_num_threads()}
    return {
        "made": made,
        "model": type(work.model.network).__name__,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "size": "×".join(map(str, work.shape[1:])),
        "batches": len({case.batch for case in work.cases}),
        "batch_size": work.size,
        "training": f"{steps} local steps (FedAvg)" if steps else "one gradient (FedSGD)",
        "mode": update.mode,
        "labels": "withheld" if update.labels is None else "shared",
        "minutes": work.minutes,
        "plan": work.plan,
        "left": work.left,
        "levels": LEVELS,
    }


def _pictures(found: dict, results: list[Result], frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """For each attack, in order, its pictures, worst cases first."""
    rows = frame[frame["condition"] == found["name"]]
    if len(rows):
        rows = rows.sort_values(["level", "ssim"], ascending=False)
    groups = []
    for attack in found["attacks"]:
        which = (found["name"], attack["name"])
        own = [each for each in results if (each.case.condition, each.arm) == which]
        if len(rows):
            best = rows[rows["arm"] == attack["name"]].head(_SHOWN).to_dict("records")
            shown = [_beside(own, row) for row in best]
        else:
            images = itertools.chain.from_iterable(result.images for result in own)
            shown = [{"recovered": _png(image)} for image in itertools.islice(images, _SHOWN)]
        groups.append({"name": attack["name"], "images": shown})
    return groups


def _beside(results: list[Result], row: dict) -> dict[str, Any]:
    """What was measured of an image, with the pictures to compare."""
    [result] = [each for each in results if each.case.batch == row["batch"]]
    truth = result.case.truth.images[[row["image"]]]  # type: ignore[union-attr]  # it is measured
    pictures = {name: _png(images[0]) for name, images in references(truth, truth[0]).items()}
    recovered = _png(result.images[row["matched"]])
    return {**row, **pictures, "private": _png(truth[0]), "recovered": recovered}


def _png(image: Tensor) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
