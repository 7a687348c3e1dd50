"""In how many batches the features of every image are recovered from the last layer's gradient.

    python benchmarks/features.py                        # about four minutes on one core
    python benchmarks/features.py --batches 2            # a try
    python benchmarks/features.py --photographs imagenet64-…  # 256 of them too: a data set of
                                                              # gipip.prepare_imagenet

Tuning images of CIFAR-10, batches with and without repeated labels, untrained and trained clients.
A batch is `exact` when `recover_features` says so; `rounding` is the share whose residual is no
more than float32's rounding, even if an image is lost in it; `images` the share of images whose
foretold error is below 1 %. `worst error` is the largest true error in an exact batch.
Writes benchmarks/results/features.csv.
"""

import argparse
import time
from collections.abc import Iterator

import pandas as pd
import torch
from reports import RESULTS
from scipy.optimize import linear_sum_assignment

import gipip
from gipip.attacks.features import ROUNDING
from gipip.federation.models import last_linear

CLIENTS = [("convnet16", 0), ("convnet", 0), ("resnet18", 0)]
TRAINED = [("convnet16", epochs) for epochs in (40, 60, 80, 100)]


def true_errors(model: gipip.ClientModel, batch: gipip.LabeledImages, features: torch.Tensor):
    """Relative errors of the features of each image; images of one label may be swapped."""
    with torch.no_grad():
        _, truth = last_linear(model.network, model.normalize(batch.images))
    errors = torch.cdist(features, truth.double()) / truth.norm(dim=1)
    return errors[linear_sum_assignment(errors.nan_to_num(1e9).clamp(max=10))]


def row(model: gipip.ClientModel, batches: Iterator[gipip.LabeledImages]) -> dict:
    """What is recovered of the batches."""
    found = []
    for batch in batches:
        update = gipip.Client(model).share(batch)
        started = time.perf_counter()
        recovered = gipip.recover_features(model, update)
        found.append(
            {
                "exact": recovered.status == "exact",
                "rounding": recovered.residual < ROUNDING,
                "images": (recovered.errors < 0.01).double().mean().item(),
                "seconds": time.perf_counter() - started,
                "worst error": true_errors(model, batch, recovered.features).max().item(),
            }
        )
    table = pd.DataFrame(found)
    return {
        "batches": len(table),
        **table[["exact", "rounding", "images", "seconds"]].mean().round(3),
        "worst error": table.loc[table["exact"], "worst error"].max(),
    }


def cifar10(batches: int) -> Iterator[dict]:
    data = gipip.load_dataset("cifar10")
    for name, epochs in CLIENTS + TRAINED:
        model = gipip.load_model(name, epochs=epochs) if epochs else gipip.build_model(name)
        for size in (1, 2, 4, 8):
            for distinct in (True, False):
                drawn = (data.tuning(size, seed, distinct) for seed in range(batches))
                about = {"network": name, "epochs": epochs, "B": size, "distinct labels": distinct}
                yield about | row(model, drawn)


def photographs(name: str) -> Iterator[dict]:
    data = gipip.load_dataset(name)
    model = gipip.build_model("resnet18", 1000, image_size=64, mean=data.mean, std=data.std)
    for size in (8, 64, 256):
        about = {"network": "resnet18, ImageNet", "epochs": 0, "B": size, "distinct labels": True}
        yield about | row(model, iter([data.private(size)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(cifar10(options.batches))
    if options.photographs:
        rows += photographs(options.photographs)
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "features.csv", index=False, float_format="%.3g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
