"""Several attacks at once in one process, against one after another: when does it pay?

python benchmarks/together.py                                        # about five
minutes on one core of a quiet machine
    python benchmarks/together.py --models lenet --iterations 5          # does it work at all?

The same attacks on different updates of one model, one CPU thread; both ways take
turns. Adds to benchmarks/results/together.json.
"""

import argparse
import statistics
import time

import torch
from reports import machine, write_rows

import gipip
from gipip.progress import quiet


def seconds(
    attack: gipip.Attack, model: gipip.ClientModel, updates: list[gipip.SharedUpdate], together: int
) -> float:
    started = time.perf_counter()
    attack.many(model, updates, together=together)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["lenet", "convnet16", "convnet"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--attacks", type=int, default=8, help="on so many updates (8)")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, attack, rows = (
        gipip.load_dataset("cifar10"),
        gipip.InvertingGradients(iterations=arguments.iterations),
        [],
    )
    for name in arguments.models:
        model = gipip.build_model(name).to(arguments.device)
        for size in arguments.batch_sizes:
            updates = [
                gipip.Client(model).share(data.tuning(batch_size=size, seed=seed))
                for seed in range(arguments.attacks)
            ]
            ratios = []
            with quiet():
                for _ in range(arguments.repetitions):
                    alone, together = (
                        seconds(attack, model, updates, count) for count in (1, arguments.attacks)
                    )
                    ratios.append(alone / together)
            speedup = {
                "speed-up": statistics.median(ratios),
                "speed-up low": min(ratios),
                "speed-up high": max(ratios),
            }
            rows.append(
                {
                    "model": name,
                    "batch size": size,
                    "attacks": arguments.attacks,
                    **speedup,
                    **machine(arguments.device),
                }
            )
            print(
                f"{name} B={size}: {arguments.attacks} at once are {speedup['speed-up']:.2f} times as fast",
                flush=True,
            )
    write_rows("together", rows, keys=("model", "batch size", "attacks", "machine"))


if __name__ == "__main__":
    main()
