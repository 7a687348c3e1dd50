"""How good a reconstruction is after how much time: attacks as their public code runs
them, and with gipip's settings.

    python benchmarks/quality.py     # about twenty minutes on two quiet cores
    python benchmarks/quality.py --model lenet --images 1 --released 50 --counts 20  # a try

Single private images of CIFAR-10 (B = 1), untrained client in eval mode, one CPU thread
an attack. The released attacks run with the double backward that public implementations
use, once with all their iterations, and are looked at on the way. gipip's schedule ends
with its iterations, so that each number of iterations is an attack of its own. Looking
costs no time: the clock stands still meanwhile. Writes benchmarks/results/quality.json.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from reports import machine, write_rows

import gipip
from gipip.progress import quiet


def attacks(model: str, released: int, counts: list[int]) -> list[tuple[str, gipip.Attack, str]]:
    """Name, attack and engine of every arm."""
    prior, arms = gipip.load_prior(), []
    arms += [("DLG, as released", gipip.DLG.as_released(iterations=min(300, released)), "eager")]
    arms += [
        (
            "IG, as released",
            gipip.InvertingGradients.as_released("cifar10", 1, iterations=released),
            "eager",
        )
    ]
    arms += [
        (
            "GIPIP, as released",
            gipip.GIPIP.as_released("cifar10", 1, prior=prior, iterations=released),
            "eager",
        )
    ]
    for count in counts:
        arms += [
            (
                "IG, gipip",
                gipip.InvertingGradients.tuned(f"cifar10/{model}/B=1", iterations=count),
                "auto",
            )
        ]
        arms += [
            (
                "GIPIP, gipip",
                gipip.GIPIP.tuned(f"cifar10/{model}/B=1", prior=prior, iterations=count),
                "auto",
            )
        ]
    return arms


def course(name: str, attack: gipip.Attack, engine: str, model_name: str, seed: int) -> list[dict]:
    """PSNR of one image against the seconds spent: at fifty places on the way of a
    released attack, at the end of gipip's.
    """
    torch.set_num_threads(1)
    model = gipip.build_model(model_name)
    batch = gipip.load_dataset("cifar10").private(batch_size=1, seed=seed)
    update = gipip.Client(model).share(batch)
    rows, stopped = [], 0.0

    def look(iteration: int, images: torch.Tensor, cost: float) -> None:
        nonlocal stopped
        here = time.perf_counter()
        rows.append(row(iteration, here - started - stopped, images))
        stopped += time.perf_counter() - here

    def row(iteration: int, seconds: float, images: torch.Tensor) -> dict:
        psnr = float(gipip.evaluate(images, batch.images)["psnr"].iloc[0])
        return {
            "arm": name,
            "model": model_name,
            "seed": seed,
            "iteration": iteration,
            "seconds": seconds,
            "psnr": psnr,
        }

    with quiet():
        started = time.perf_counter()
        if engine == "eager":
            attack(
                model,
                update,
                engine=engine,
                watch=look,
                watch_every=max(1, attack.iterations // 50),
            )
        else:
            reconstruction = attack(model, update, engine=engine)
            rows.append(row(attack.iterations, reconstruction.seconds, reconstruction.images))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="convnet", help="a network that gipip ships tuned weights for (convnet)"
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument(
        "--released",
        type=int,
        default=10_000,
        help="iterations of IG and GIPIP as released (10,000)",
    )
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[30, 100, 300, 1000],
        help="iterations of gipip's attacks",
    )
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    where, rows = machine(), []
    arms = attacks(arguments.model, arguments.released, arguments.counts)
    runs = [(*arm, arguments.model, seed) for arm in arms for seed in range(arguments.images)]
    runs.sort(key=lambda run: run[1].iterations, reverse=True)
    with ProcessPoolExecutor(
        arguments.workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for found in pool.map(course, *zip(*runs, strict=True)):
            rows += [row | where for row in found]
            last = found[-1]
            reached = f"{last['psnr']:.1f} dB after {last['seconds']:.0f} s"
            print(f"{last['arm']}, image {last['seed']}: {reached}", flush=True)
    write_rows("quality", rows, keys=("arm", "model", "seed", "iteration", "machine"))


if __name__ == "__main__":
    main()
