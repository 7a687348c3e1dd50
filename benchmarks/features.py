"""In how many batches the features of every image are recovered from the last layer's gradient.

    python benchmarks/features.py                        # about eight minutes on one core
    python benchmarks/features.py --batches 2            # a try
    python benchmarks/features.py --photographs imagenet64-…  # 256 of them too: a data set of
                                                              # gipip.prepare_imagenet

Tuning images of CIFAR-10, batches with and without repeated labels, untrained and trained clients.
A batch is `exact` when `recover_features` says so; `rounding` is the share whose residual is no
more than float32's rounding, even if an image is lost in it; `images` the share of images whose
foretold error is below 1 %. `worst error` is the largest true error in an exact batch, `error` the
median of the true relative errors of all images, `foretold` that of the errors that the attacker
expects. Under Soteria, of the features that it leaves. `decoded`: the PSNR of the images that a
decoder in closed form makes of the features of defended batches.
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
from gipip.federation.models import in_mode, last_linear

CLIENTS = [("convnet16", 0), ("convnet", 0), ("resnet18", 0)]
TRAINED = [("convnet16", epochs) for epochs in (40, 60, 80, 100)]
DEFENCES = {
    "none": {},
    "labels withheld": {"labels": "withheld"},
    "BatchNorm in train mode": {"mode": "train"},
    "clip 0.1": {"defenses": [gipip.Clipping(max_norm=0.1)]},
    "clip 0.1, noise 1e-5": {
        "defenses": [gipip.Clipping(max_norm=0.1), gipip.GaussianNoise(std=1e-5)]
    },
    **{
        f"noise {std:g}": {"defenses": [gipip.GaussianNoise(std=std)]} for std in (1e-4, 1e-3, 1e-2)
    },
    "DP-SGD": {"defenses": [gipip.DPSGD(max_norm=1, noise_multiplier=1e-3)]},
    **{
        f"sparsity {share}": {"defenses": [gipip.Sparsification(sparsity=share)]}
        for share in (0.5, 0.9)
    },
    "Soteria 20 %": {"defenses": [gipip.Soteria(pruned=0.2)]},
    **{f"{steps} local steps": {"fedavg": gipip.FedAvg(steps=steps)} for steps in (2, 4, 8)},
    "8 local steps on 2 images": {"fedavg": gipip.FedAvg(steps=8, batch_size=2)},
}


def paired(distances: torch.Tensor) -> torch.Tensor:
    """The distance of each image to its own: images of one label may be swapped."""
    return distances[linear_sum_assignment(distances.nan_to_num(1e9).clamp(max=10))]


def true_errors(model, batch, recovered, mode: str = "eval") -> torch.Tensor:
    """Relative errors of each image's features, of those that are known."""
    with torch.no_grad():
        _, truth = last_linear(in_mode(model, mode).network, model.normalize(batch.images))
    truth, features = truth[:, recovered.known].double(), recovered.features[:, recovered.known]
    return paired(torch.cdist(features, truth) / truth.norm(dim=1))


def decoded_psnr(decoder: gipip.FeatureDecoder, batch, recovered) -> float:
    expected, _ = decoder.expected(recovered.features, recovered.covariance, recovered.known)
    images = decoder(expected.float()).flatten(1)
    distances = torch.cdist(images, batch.images.flatten(1)) / images.shape[1] ** 0.5
    return (-20 * paired(distances).log10()).mean().item()


def row(model: gipip.ClientModel, batches: Iterator, decoder=None, **options) -> dict:
    """What is recovered of the batches that a client shares with these options."""
    found, errors = [], []
    for batch in batches:
        update = gipip.Client(model).share(batch, **options)
        started = time.perf_counter()
        recovered = gipip.recover_features(model, update)
        seconds = time.perf_counter() - started
        own = true_errors(model, batch, recovered, update.mode)
        errors.append(torch.stack([own, recovered.errors]))
        found.append(
            {
                "exact": recovered.status == "exact",
                "rounding": recovered.residual < ROUNDING,
                "images": (recovered.errors < 0.01).double().mean().item(),
                "seconds": seconds,
                "worst error": own.max().item(),
                "decoded": decoded_psnr(decoder, batch, recovered) if decoder else None,
            }
        )
    table = pd.DataFrame(found)
    error, foretold = torch.cat(errors, dim=1).median(dim=1).values.tolist()
    return {
        "batches": len(table),
        **table[["exact", "rounding", "images", "seconds"]].mean().round(3),
        "worst error": table.loc[table["exact"], "worst error"].max(),
        "error": error,
        "foretold": foretold,
        "decoded": table["decoded"].mean(),
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


def defended(batches: int) -> Iterator[dict]:
    data, model = gipip.load_dataset("cifar10"), gipip.build_model("convnet16")
    decoders = {
        mode: gipip.train_decoder(model, data.auxiliary(), steps=0, mode=mode)
        for mode in ("eval", "train")
    }
    for size in (4, 8):
        for defence, options in DEFENCES.items():
            drawn = (data.tuning(size, seed) for seed in range(batches))
            about = {"network": "convnet16", "epochs": 0, "B": size, "distinct labels": True}
            decoder = decoders[options.get("mode", "eval")]
            yield about | {"defence": defence} | row(model, drawn, decoder, **options)


def photographs(name: str) -> Iterator[dict]:
    data = gipip.load_dataset(name)
    model = gipip.build_model("resnet18", 1000, image_size=64, mean=data.mean, std=data.std)
    for size in (8, 64, 256):
        about = {"network": "resnet18, ImageNet", "epochs": 0, "B": size, "distinct labels": True}
        yield about | row(model, iter([data.private(size)]))
    for size in (16, 32, 64):
        drawn = (data.tuning(size, seed, distinct_labels=False) for seed in range(3))
        about = {"network": "resnet18, ImageNet", "epochs": 0, "B": size, "distinct labels": False}
        yield about | row(model, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*cifar10(options.batches), *defended(options.batches)]
    if options.photographs:
        rows += photographs(options.photographs)
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "features.csv", index=False, float_format="%.3g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
