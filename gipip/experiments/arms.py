"""From arms to a verdict, in the few words that all notebooks share.

An *arm* is a named attack; a comparison gives the same private batches to all of its
arms. A *condition* is what weights are tuned for (`Scenario.condition`).

    sweep, save = start(store, figures, workers)
    scenarios = first_batches(6, model="convnet16", batch_size=4)
    results = sweep(runs(scenarios, {"IG": …, "GIPIP": …}))
    captioned(results.table())
    save("02_images", pictures({arm: results.select(arm=arm) for arm in ("IG", "GIPIP")}))
    claims = judge(results, 1, "GIPIP − IG", "GIPIP", "IG")
    save("02_effect", forest(claims, "psnr"))
    verdicts("02_inversion", claims, figures)
    found("02_inversion_claims")
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from gipip.attacks.base import Attack
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.evaluation.anomalies import auroc
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.published import published
from gipip.evaluation.statistics import Interval, paired_difference
from gipip.experiments.claims import Claim, compare, save_claims
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.sweep import sweep
from gipip.federation.defenses import DPSGD, Defense, GaussianNoise, Soteria, Sparsification
from gipip.figures import image_grid, paired_effect, published_bars, save_figure, use_style
from gipip.priors import AnomalyScore

Images = Float[Tensor, "batch 3 height width"]

FIGURES = Path(__file__).parents[2] / "figures"
"""Figures and tables of the full run, in a checkout; a wheel has none."""

CLAIMS = (
    "1 The anomaly score improves inversion",
    "2 With 3.8 % auxiliary data better than GAN-based inversion with up to 100 %",
    "3 It generalises better than GAN-based inversion",
    "4 It is the stronger threat under defences and local training",
    "5 Photographs of ImageNet are recovered with 16.12 dB",
)
"""What the paper claims, as the notebooks judge it."""

EQUAL = "GIPIP at equal TV weight"
"""The arm of data/tuned.json that adds the anomaly score (c = 0) to tuned Inverting
Gradients and changes nothing else.
"""


def start(store: Path | str, figures: Path | str, workers: int) -> tuple[Callable, Callable]:
    """`sweep` and `save_figure` with a notebook's settings; sets the style of figures."""
    use_style()
    return partial(sweep, store=store, workers=workers), partial(save_figure, folder=figures)


class Frames:
    """Keeps the candidates of an attack under way, as `images`: {iteration: images}. Pass
    it as `watch`.
    """

    def __init__(self) -> None:
        self.images: dict[int, Images] = {}

    def __call__(self, iteration: int, images: Images, cost: float) -> None:
        self.images[iteration] = images


def first_batches(count: int, **about) -> list[Scenario]:
    """Scenarios on the first `count` batches; `about`: the other fields of `Scenario`."""
    return [Scenario(seed=seed, **about) for seed in range(count)]


def runs(scenarios: Iterable[Scenario], arms: Mapping[str, Attack]) -> list[Run]:
    """Every arm on every scenario."""
    return [Run(arm, scenario, attack) for scenario in scenarios for arm, attack in arms.items()]


def with_and_without(condition: str, prior: AnomalyScore, **changes) -> dict[str, Attack]:
    """{"without": tuned Inverting Gradients, "with": the same λ_TV and the anomaly
    score with its tuned weight, c = 0} for a condition.

    `changes`: settings of both attacks. Raises DataError when no weights are shipped.
    """
    baseline = InvertingGradients.tuned(condition, **changes)
    ours = GIPIP.tuned(condition, arm=EQUAL, prior=prior.with_offset(0), **changes)
    return {"without": baseline, "with": ours}


def equal_tv(scenarios: Iterable[Scenario], prior: AnomalyScore, **changes) -> list[Run]:
    """`with_and_without` on every scenario, with the weights tuned for its condition."""
    todo = []
    for scenario in scenarios:
        todo += runs([scenario], with_and_without(scenario.condition, prior, **changes))
    return todo


def labelled(column: str, named: Mapping[Any, Results]) -> pandas.DataFrame:
    """The frames of named results, one below the other, with the name in a `column`."""
    frames = []
    for name, results in named.items():
        frames.append(results.frame())
        frames[-1][column] = name
    return pandas.concat(frames, ignore_index=True)


def captioned(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table without those of its columns that say the same in every row: these are
    printed above it. One of a single row stays whole.
    """
    same = [name for name in frame if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    for name in same:
        print(f"{name}: {frame[name].iloc[0]}")
    return frame.drop(columns=same)


def pictures(named: Mapping[str, Results], columns: int = 8, **options) -> Figure:
    """The private images and, in a row each, what was recovered of them, with its PSNR:
    the first `columns` images that all rows have. `options`: of `image_grid`.
    """
    columns = min(columns, *(len(results.truth) for results in named.values()))
    rows = {"private": next(iter(named.values())).truth[:columns]}
    captions = {}
    for name, results in named.items():
        rows[name] = results.images[:columns]
        captions[name] = [f"{psnr:.1f} dB" for psnr in results.frame()["psnr"][:columns]]
    return image_grid(rows, captions, **options)


def beside_published(chart: str, named: Mapping[Any, Results], here: str, **options) -> Figure:
    """One of the paper's charts of SSIM (see `published`) beside that of the arms
    "without" and "with" here, of results named by their places on its axis.
    """
    frame = labelled(chart, named).rename(columns={"arm": "anomaly score"})
    frame = frame[frame["anomaly score"].isin(["without", "with"])]
    options["titles"] = ("published: ImageNet 64×64, ResNet18", f"here: {here}, equal λTV")
    return published_bars(frame, published(chart), chart, "ssim", "anomaly score", **options)


def defended(kind: str, strength: float) -> Defense:
    """A defence by the name that tables give it: "noise" of standard deviation, "sparsity"
    or "Soteria" of share, or "DP-SGD" (C = 1) of noise multiplier `strength`.
    """
    kinds: dict[str, Callable[..., Defense]] = {
        "noise": partial(GaussianNoise, std=strength),
        "sparsity": partial(Sparsification, sparsity=strength),
        "Soteria": partial(Soteria, pruned=strength),
        "DP-SGD": partial(DPSGD, max_norm=1.0, noise_multiplier=strength),
    }
    return kinds[kind]()


def judge(results: Results, claim: int, compared: str, arm: str, baseline: str) -> list[Claim]:
    """The paper's `claim` (of CLAIMS, from 1) judged in PSNR and SSIM: one arm − another
    in each condition of the results. Each is named by `compared` and the condition, as
    "GIPIP − IG, convnet, B = 4".
    """
    claims = []
    for condition in dict.fromkeys(result.run.scenario.condition for result in results):
        text = ", ".join([compared, *condition.replace("=", " = ").split("/")[1:]])
        ours, theirs = ({"condition": condition, "arm": name} for name in (arm, baseline))
        claims += compare(results, CLAIMS[claim - 1], text, ours, theirs)
    return claims


def judge_losses(
    results: Results, claim: int, compared: str, more: tuple[str, str], less: tuple[str, str]
) -> list[Claim]:
    """As `judge`, whether from the first arm of `more` to its second more is lost than
    from the first arm of `less` to its second, on the same images.
    """
    claims = []
    for metric in ("psnr", "ssim"):
        wide = results.frame().pivot_table(metric, ["batch", "image"], "arm")
        losses = (wide[before] - wide[after] for before, after in (more, less))
        effect = paired_difference(*losses, groups=wide.index.get_level_values("batch"))
        claims.append(Claim(CLAIMS[claim - 1], compared, metric, len(wide), effect))
    return claims


def forest(claims: Iterable[Claim], metric: str) -> Figure:
    """A forest plot of the differences that judge the claims by one metric. The words
    with which all of them begin are in the axis label.
    """
    drawn = {claim.compared: claim.difference for claim in claims if claim.metric == metric}
    shared = os.path.commonprefix(list(drawn)).rpartition(", ")[0]
    named = {compared.removeprefix(f"{shared}, "): effect for compared, effect in drawn.items()}
    unit, decimals = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3)}[metric]
    return paired_effect(named, ": ".join(filter(None, [unit, shared])), decimals=decimals)


def verdicts(notebook: str, claims: Sequence[Claim], figures: Path | str) -> pandas.DataFrame:
    """The claims' table, written to `figures` (see `save_claims`)."""
    return _rounded(save_claims(notebook, claims, figures))


def found(name: str) -> pandas.DataFrame | None:
    """What the full run found: the table figures/`name`.csv that ships with the
    notebooks, such as "02_inversion_claims"; of claims the differences and verdicts.

    Where there is no such file, as in an installed package, it says so and gives None.
    """
    path = FIGURES / f"{name}.csv"
    if path.is_file():
        return _rounded(pandas.read_csv(path))
    print(f"The full run's figures/{name}.csv is in the repository, not in a package.")
    return None


def aurocs(
    priors: Mapping[str, AnomalyScore], natural: Images, spoiled: Mapping[str, Images]
) -> pandas.DataFrame:
    """How well each prior tells each kind of spoiled images from natural ones: a row
    for each pair, with the columns prior, anomaly, images and AUROC.
    """
    rows = []
    for (name, prior), (kind, images) in itertools.product(priors.items(), spoiled.items()):
        area = auroc(prior(natural), prior(images))
        rows.append({"prior": name, "anomaly": kind, "images": len(images), "AUROC": area})
    return pandas.DataFrame(rows)


def flat_psnr(images: Images) -> float:
    """Mean PSNR of the best constant picture of each image: what knows only its mean colour."""
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    return evaluate(flat, images)["psnr"].mean()


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; AssertionError, with the claim, for one that does not."""
    if not holds:
        raise AssertionError(f"Not so: {claim}.")
    print(claim)


def _rounded(table: pandas.DataFrame) -> pandas.DataFrame:
    if "verdict" in table:
        ends = table[["mean", "low", "high", "batches"]].to_numpy().tolist()
        table = table.assign(mean=[f"{Interval(*row):+.3f}" for row in ends])
        table = table.drop(columns=["low", "high"]).rename(columns={"mean": "difference"})
    return captioned(table.round(3))
