"""What the features attack gains over tuned GI-PIP, on tuning images, with as many iterations.

    python benchmarks/refinement.py convnet resnet18      # about two hours on one quiet core
    python benchmarks/refinement.py convnet16 --iterations 20 --batches 1  # a try

Batches of 4 and 8 of CIFAR-10, one untrained client of each network. A row for each arm: means over
images, `gain` (dB over GI-PIP on the same batches), and seconds of an attack. Goes on where it was.
Writes benchmarks/results/refinement.csv.
"""

import argparse
from collections.abc import Iterable

import pandas as pd
from reports import RESULTS

import gipip
from gipip.experiments.arms import runs

SIZES = (4, 8)
METRICS = ["psnr", "ssim", "lpips", "identified", "seconds"]
OPPONENT = "GI-PIP, tuned"


def arms(condition: str, decoder: gipip.FeatureDecoder, iterations: int) -> dict:
    """Attacks by name."""
    score, about = gipip.load_prior().with_offset(0), {"iterations": iterations}
    return {
        OPPONENT: [gipip.GIPIP.tuned(condition, prior=score, **about)],
        "decoded": [gipip.FeatureInversion(prior=decoder, iterations=0)],
        "refined": [gipip.FeatureInversion(prior=decoder, **about)],
        "refined, with AS": [gipip.FeatureInversion(prior=decoder, score=score, **about)],
    }


def rows(model: str, size: int, iterations: int, batches: int, store: str) -> Iterable[dict]:
    about = {"model": model, "batch_size": size, "pool": "tuning"}
    scenarios = [gipip.Scenario(seed=seed, **about) for seed in range(batches)]
    auxiliary = gipip.load_dataset("cifar10").auxiliary()
    decoder = gipip.train_decoder(scenarios[0].client_model(), auxiliary, store=store)
    todo = runs(scenarios, arms(scenarios[0].condition, decoder, iterations))
    frame = gipip.sweep(todo, store=store, workers=1).frame()
    means = frame.groupby("arm", sort=False)[METRICS].mean()
    means["gain"] = means["psnr"] - means.loc[OPPONENT, "psnr"]
    given = {"model": model, "batch size": size, "iterations": iterations}
    for arm, measured in means.iterrows():
        yield given | {"images": size * batches, "arm": arm, **measured.round(3)}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--iterations", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--store", default="results")
    asked = parser.parse_args()
    found: list[dict] = []
    for iterations in asked.iterations:
        for model in asked.models:
            for size in SIZES:
                found += rows(model, size, iterations, asked.batches, asked.store)
                pd.DataFrame(found).to_csv(RESULTS / "refinement.csv", index=False)
                print(pd.DataFrame(found).tail(4).to_string(), flush=True)


if __name__ == "__main__":
    main()
