"""What an iteration of an attack costs, in forward and backward passes of the client on
the same batch, for each engine.

    python benchmarks/iteration.py                                   # minutes on a quiet core
    python benchmarks/iteration.py --device cuda                     # on a GPU, with "cudagraph"
    python benchmarks/iteration.py --models lenet --iterations 5     # does it work at all?

After every iteration the client's own forward and backward pass is timed, so that both
see the same moment of a busy machine. Where all gradients are formed the arithmetic
needs 7/3 of it: a forward pass, twice as much backward, and four times as much for the
derivative of that by the images. Adds to benchmarks/results/iteration.json, where rows
of another machine stay.
"""

import argparse
import statistics
import time

import torch
from reports import machine, write_rows

import gipip
from gipip.federation.client import local_update
from gipip.federation.models import trainable
from gipip.progress import quiet

WARM_UP = 5  # iterations that record or capture


def passes(model: gipip.ClientModel, batch: gipip.LabeledImages, device: str):
    """A function that computes the client's gradient once and gives the seconds it took."""
    parameters, inputs, labels = (
        trainable(model.network),
        model.normalize(batch.images.to(device)),
        batch.labels.to(device),
    )

    def once() -> float:
        started = now(device)
        local_update(model.network, parameters, inputs, labels)
        return now(device) - started

    return once


def now(device: str) -> float:
    """Seconds, after the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    attack: gipip.Attack,
    model: gipip.ClientModel,
    batch: gipip.LabeledImages,
    engine: str,
    device: str,
) -> dict[str, float]:
    """Milliseconds of an iteration and of a pass, and their ratio: medians, and the
    ratio's quartiles.
    """
    once = passes(model, batch, device)
    iterations, references, last = [], [], 0.0

    def watch(iteration: int, images: torch.Tensor, cost: float) -> None:
        nonlocal last
        iterations.append(now(device) - last)
        references.append(once())
        last = now(device)

    update = gipip.Client(model).share(batch)
    with quiet():
        last = now(device)
        attack(model, update, engine=engine, watch=watch, watch_every=1)
    iterations, references = iterations[WARM_UP:], references[WARM_UP:]
    ratios = [a / b for a, b in zip(iterations, references, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "iteration ms": 1e3 * statistics.median(iterations),
        "pass ms": 1e3 * statistics.median(references),
        "passes": middle,
        "passes low": low,
        "passes high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["convnet", "resnet18"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--engines",
        nargs="+",
        help="eager, traced, cudagraph (by default those that the device has)",
    )
    parser.add_argument("--attacks", nargs="+", default=["IG", "GIPIP"], choices=["IG", "GIPIP"])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1, as in a sweep)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engines = arguments.engines or [
        "eager",
        "traced",
        *(["cudagraph"] if arguments.device == "cuda" else []),
    ]
    data, prior = gipip.load_dataset("cifar10"), gipip.load_prior()
    settings = {"iterations": arguments.iterations + WARM_UP, "tv_weight": 3e-3}
    attacks = {
        "IG": gipip.InvertingGradients(**settings),
        "GIPIP": gipip.GIPIP(prior=prior, **settings),
    }
    where, rows = machine(arguments.device, arguments.threads), []
    for name in arguments.models:
        model = gipip.build_model(name).to(arguments.device)
        for size in arguments.batch_sizes:
            for attack in arguments.attacks:
                for engine in engines:
                    numbers = measure(
                        attacks[attack],
                        model,
                        data.tuning(batch_size=size),
                        engine,
                        arguments.device,
                    )
                    rows.append(
                        {
                            "model": name,
                            "batch size": size,
                            "attack": attack,
                            "engine": engine,
                            **numbers,
                            **where,
                        }
                    )
                    about = f"{numbers['iteration ms']:.1f} ms, {numbers['passes']:.2f} passes"
                    print(f"{name} B={size} {attack} {engine}: {about}", flush=True)
    write_rows("iteration", rows, keys=("model", "batch size", "attack", "engine", "machine"))


if __name__ == "__main__":
    main()
